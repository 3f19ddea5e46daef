"""The keys of a recipe that are not the trainer's: of the model, of what is started from, of the data and the pairs.

Neither torch nor transformers is imported here: the first checks make these before anything heavy is there, and the
training makes them once more.
"""

import argparse
from dataclasses import dataclass, field
from typing import Literal, get_args

from covered_call.candidates.builder import Backtest
from covered_call.candidates.data_options import backtest_of, recipe_keys
from covered_call.candidates.options import ANSWERS, CONTEXT, DATA, OUTCOMES, PAIRS, SPLITS, PreferenceConfig, names_of
from covered_call.language_model.manifest import QUANTIZATIONS
from covered_call.training.runs import RecipeError

RANKING = "per_decision_ranking"
Quantization = Literal["int4", "int8", "none"]
Balance = Literal["none", "downsample", "weight"]
BALANCES = get_args(Balance)


@dataclass
class ModelArguments:
    """The model, how it is quantised, and the adapter."""

    model_name_or_path: str = field(metadata={"help": "A folder, or a name on the Hub."})
    quantization: Quantization = field(metadata={"help": "Bits of the frozen weights; int4 is NF4, doubly quantised."})
    tiny_base_steps: int = field(
        default=0,
        metadata={
            "help": "If above 0 and there is no model in model_name_or_path: make a tiny Phi-3 there, trained for so "
            "many steps in full precision on the training split."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank; 0 trains all weights (with quantization none)."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter counts lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of the adapter's inputs left out."})

    def __post_init__(self):
        if self.quantization not in QUANTIZATIONS:
            raise RecipeError(f"quantization: {self.quantization!r} is none of {', '.join(QUANTIZATIONS)}.")
        if self.lora_r == 0 and self.quantization != "none":
            raise RecipeError(
                f"lora_r: 0 trains all weights, which {self.quantization} freezes: use quantization none."
            )
        if not 0 <= self.lora_dropout < 1:
            raise RecipeError(f"lora_dropout: {self.lora_dropout} is no share: give 0 or more, and less than 1.")


@dataclass
class StartArguments(ModelArguments):
    """What to start from: an adapter that was fine-tuned, or a base with a new one."""

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "A per_decision_ranking fine-tune to start from; base, quantization and LoRA are then its own."
        },
    )
    model_name_or_path: str = field(default="", metadata={"help": "A base, where no adapter is given."})
    quantization: Quantization = field(default="int4", metadata={"help": "int4, int8 or none, of the base."})

    def __post_init__(self):
        super().__post_init__()
        if not (self.adapter or self.model_name_or_path):
            raise RecipeError("Nothing to start from: give adapter, a fine-tune's folder, or model_name_or_path.")
        if self.lora_r == 0:
            raise RecipeError("lora_r: 0 trains all weights; here only an adapter is trained. Give it a rank, as 16.")


@dataclass(kw_only=True)
class DataArguments(recipe_keys(DATA, CONTEXT, ANSWERS, SPLITS)):
    """What load_candidates is called with; what is not given takes its default there."""

    dataset_config: str = field(metadata={"help": f"What is asked: per_candidate or {RANKING}."})
    candidate_order: str | None = field(
        default=None,
        metadata={
            "help": "instrument, csv, or shuffle: the training split, in another order each epoch; validation and "
            "test stay in instrument order; default: instrument",
            "metavar": "ORDER",
        },
    )
    balance: Balance = field(
        default="none",
        metadata={
            "help": "Trades against SKIP or NO_TRADE in the training split: downsample draws as many of either each "
            "epoch, weight gives both the same share of the loss."
        },
    )
    explanation_weight: float = field(
        default=0.3,
        metadata={
            "help": "With explain: what the mean loss of an explanation's tokens counts beside that of its answer's."
        },
    )
    max_eval_records: int | None = field(
        default=None,
        metadata={
            "help": "While training, score at most so many validation records, evenly spaced; default: all.",
            "metavar": "N",
        },
    )

    def __post_init__(self):
        if self.balance not in BALANCES:
            raise RecipeError(f"balance: {self.balance!r} is none of {', '.join(BALANCES)}.")
        if not 0 <= self.explanation_weight <= 10:
            raise RecipeError(f"explanation_weight: {self.explanation_weight} is none: give 0 to 10.")

    def backtest(self) -> Backtest:
        """What the splits are made of, read when it is first asked for; a shuffle is left to the training split.

        Raises:
            CandidatesError: for options that no load takes, and for files that are not there.
        """
        splits = tuple(self.splits) if isinstance(self.splits, list) else self.splits
        return backtest_of(argparse.Namespace(), vars(self) | {"splits": splits})


@dataclass(kw_only=True)
class PairArguments(DataArguments, recipe_keys(OUTCOMES, PAIRS, kind=PreferenceConfig)):
    """Which answers are paired, and what their outcomes are net of; default as in load_candidates."""

    dataset_config: str = field(default="preference", init=False)
    balance: Balance = field(default="none", init=False)  # each answer's own share: benchmarks/pair_balance.py
    explain: bool | None = field(default=None, init=False)  # pairs are of answers alone
    explanation_weight: float = field(default=0.0, init=False)

    def __post_init__(self):
        super().__post_init__()
        if self.candidate_order == "shuffle":
            raise RecipeError(
                "candidate_order: shuffle is for covered-call train; pairs are made in one order, instrument."
            )

    def pairing(self) -> dict:
        """The options of the pairs that are given."""
        return {
            name: getattr(self, name) for name in names_of(PreferenceConfig, PAIRS) if getattr(self, name) is not None
        }
