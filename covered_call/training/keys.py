"""The keys of a recipe that are not the trainer's: of the model, of what is started from, of the data and the pairs.

Neither torch nor transformers is imported here: the first checks make these before anything heavy is there, and the
training makes them once more.
"""

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from covered_call.candidates.builder import Backtest
from covered_call.candidates.data_options import backtest_of, recipe_keys
from covered_call.candidates.options import (
    ANSWERS,
    CHATS,
    CONTEXT,
    DATA,
    OUTCOMES,
    PAIRS,
    SPLITS,
    PreferenceConfig,
    names_of,
)
from covered_call.language_model.manifest import QUANTIZATIONS
from covered_call.training.runs import RecipeError
from covered_call.training.sources import Source, read_mix, sources_of

RANKING = "per_decision_ranking"
SHORT_NAMES = {"per_candidate": "candidate", RANKING: "ranking"}  # of the tasks of one model, before their metrics
Quantization = Literal["int4", "int8", "none"]
Balance = Literal["none", "downsample", "weight"]
BALANCES = get_args(Balance)
WeightBy = Literal["token", "record"]
if TYPE_CHECKING:
    TextAtFirst = Any  # a list, once it was read
else:
    TextAtFirst = str | None


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
class DataArguments(recipe_keys(DATA, CONTEXT, ANSWERS, SPLITS, OUTCOMES)):
    """What load_candidates is called with; what is not given takes its default there. Of outcomes prompts tell with
    analogues alone."""

    mixed: ClassVar[tuple[str, ...]] = CHATS  # the configs that a mix may hold

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
    mix: TextAtFirst = field(
        default=None,
        metadata={
            "help": "Sources of an epoch's records, each with its share: configs of the backtest, and files of other "
            "chats; dataset_config is then the task that a checkpoint is chosen by; default: dataset_config alone",
            "metavar": "LIST",
        },
    )
    max_records_per_market: int | None = field(
        default=None,
        metadata={
            "help": "Train on at most so many records of a market, spread over time; default: all.",
            "metavar": "N",
        },
    )
    weight_by: WeightBy = field(
        default="token",
        metadata={
            "help": "What counts the same in the loss: each token of an answer, so that longer answers count for "
            "more, or each record."
        },
    )
    max_eval_records: int | None = field(
        default=None,
        metadata={
            "help": "While training, score at most so many validation records, spread over time; default: all.",
            "metavar": "N",
        },
    )

    def __post_init__(self):
        if self.balance not in BALANCES:
            raise RecipeError(f"balance: {self.balance!r} is none of {', '.join(BALANCES)}.")
        if not 0 <= self.explanation_weight <= 10:
            raise RecipeError(f"explanation_weight: {self.explanation_weight} is none: give 0 to 10.")
        if self.weight_by not in get_args(WeightBy):
            raise RecipeError(f"weight_by: {self.weight_by!r} is none of {', '.join(get_args(WeightBy))}.")
        most = self.max_records_per_market
        if most is not None and (not isinstance(most, int) or most < 1):
            raise RecipeError(f"max_records_per_market: {most!r} is no number of records: give 1 or more.")
        self.mix = read_mix(self.mix, self.mixed)
        if self.mix and self.explain:
            raise RecipeError("explain: of a mix answers stand alone. Remove mix, or explain.")
        if self.mix and self.dataset_config not in self.configs:
            raise RecipeError(
                f"dataset_config: {self.dataset_config} is not in the mix: it is the task that a checkpoint is chosen "
                f"by, so give one of {', '.join(self.configs)}."
            )

    @property
    def sources(self) -> list[Source]:
        """What an epoch is drawn from; without a mix one config."""
        return sources_of(self.mix, self.dataset_config)

    @property
    def configs(self) -> list[str]:
        """Those of the sources, the one that a checkpoint is chosen by first."""
        found = [source.name for source in self.sources if not source.is_file]
        return sorted(found, key=lambda name: name != self.dataset_config)

    def backtest(self) -> Backtest:
        """What the splits are made of, read when it is first asked for; a shuffle is left to the training split.

        Raises:
            CandidatesError: for options that no load takes, and for files that are not there.
        """
        splits = tuple(self.splits) if isinstance(self.splits, list) else self.splits
        return backtest_of(argparse.Namespace(), vars(self) | {"splits": splits})


@dataclass(kw_only=True)
class PairArguments(DataArguments, recipe_keys(PAIRS, kind=PreferenceConfig)):
    """Which answers are paired; default as in load_candidates."""

    mixed: ClassVar[tuple[str, ...]] = ("preference",)
    dataset_config: str = field(default="preference", init=False)
    balance: Balance = field(default="none", init=False)  # each answer's own share: benchmarks/pair_balance.py
    explain: bool | None = field(default=None, init=False)  # pairs are of answers alone
    explanation_weight: float = field(default=0.0, init=False)
    weight_by: WeightBy = field(default="token", init=False)  # DPO's loss is a pair's

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
