"""TODO."""

import copy
import difflib
import logging
import sys
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, NamedTuple

import torch
from trl import DPOConfig, SFTConfig

from covered_call.candidates.options import DATA, OUTCOMES, PAIRS, SPLITS, PreferenceConfig
from covered_call.data_options import recipe_keys
from covered_call.language_model.loading import half_precision
from covered_call.training.first_checks import (
    DPO_RECIPES,
    RANKING,
    SFT_RECIPES,
    check_data_keys,
    check_model_keys,
    check_pair_keys,
    check_start_keys,
    read_recipe,
    with_recipe_path,
)
from covered_call.training.memory import Plan
from covered_call.training.recipe_help import RecipeParser, plain
from covered_call.training.runs import RecipeError

logger = logging.getLogger(__name__)

AUTO = "auto"


# ---------------------------------------------------------------------------------------------------------------------
# Parse


@dataclass
class ModelArguments:
    """The model, how it is quantised, and the adapter."""

    model_name_or_path: str = field(metadata={"help": "A folder, or a name on the Hub."})
    quantization: Literal["int4", "int8", "none"] = field(
        metadata={"help": "Bits of the frozen weights; int4 is NF4, doubly quantised."}
    )
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
        check_model_keys(self)
        if not 0 <= self.lora_dropout < 1:
            raise RecipeError(f"lora_dropout: {self.lora_dropout} is no share: give 0 or more, and less than 1.")


@dataclass(kw_only=True)
class DataArguments(recipe_keys(DATA, SPLITS)):
    """What load_candidates is called with; what is not given takes its default there."""

    dataset_config: str = field(metadata={"help": "What is asked: per_candidate or per_decision_ranking."})
    candidate_order: str | None = field(
        default=None,
        metadata={
            "help": "instrument, csv, or shuffle: the training split, in another order each epoch; validation and "
            "test stay in instrument order; default: instrument",
            "metavar": "ORDER",
        },
    )
    balance: Literal["none", "downsample", "weight"] = field(
        default="none",
        metadata={
            "help": "Trades against SKIP or NO_TRADE in the training split: downsample draws as many of either each "
            "epoch, weight gives both the same share of the loss."
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
        check_data_keys(self)


# Keys of SFTConfig that would be overruled here in silence, or break what the preflight promises.
REFUSED = {
    "completion_only_loss": "the loss is on the answer only, always",
    "assistant_only_loss": "the loss is on the answer only, always",
    "packing": "a packed record may attend to another where there is no flash attention",
    "padding_free": "a record may attend to another where there is no flash attention",
    "chat_template_path": "it would change the model's own chat format; give a model whose template you want",
    "eos_token": "the end of an answer is taken from the chat template",
    "pad_token": "the pad token is taken from the tokenizer, and is never the end of an answer",
    "loss_type": "the loss is the answer's cross-entropy",
    "label_smoothing_factor": "the loss is the answer's cross-entropy",
    "liger_kernel_config": "of Liger's kernels, those of the norms, the rotation and the MLP are taken, and no other",
    "train_sampling_strategy": "the order of an epoch depends on the seed and the epoch alone, so that it can resume",
    "ignore_data_skip": "a resumed run must see the records it has not seen yet",
    "resume_from_checkpoint": "the same command resumes by itself",
    "per_device_eval_batch_size": "answers are scored by tokens, as the memory allows: see batch_tokens",
    "activation_checkpointing": "say gradient_checkpointing: true, false or auto",
    "auto_find_batch_size": "per_device_train_batch_size: auto finds it before the training",
}


@dataclass
class RunArguments:
    """Mixed into TRL's arguments: what a recipe can say beside them. A GPU is asked for unless use_cpu is set."""

    refused: ClassVar[dict[str, str]] = {}
    tiny_recipe: ClassVar[str] = "tiny"

    dry_run: bool = field(default=False, metadata={"help": "Check everything, print the preflight, train nothing."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete the run in output_dir first."})
    collapse_patience: int = field(
        default=4,
        metadata={"help": "Stop after so many evaluations in a row in which all answers were the same; 0: never."},
    )
    per_device_train_batch_size: str = field(
        default="8",
        metadata={
            "help": "Records of a micro-batch; auto: as many of the gradient_accumulation_steps as the memory holds, "
            "which are then so many fewer, so that a step takes the same records."
        },
    )
    gradient_checkpointing: str = field(
        default=AUTO,
        metadata={
            "help": "true: keep each layer's input alone, and compute the rest twice; false; or auto: true of as few "
            "layers as the memory allows."
        },
    )
    use_liger_kernel: bool | None = field(
        default=None,
        metadata={
            "help": "Liger's kernels of norms, rotation and MLP on a GPU; default: where liger-kernel is installed."
        },
    )
    batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens read together in an evaluation; default: what the free memory holds.",
            "metavar": "N",
        },
    )

    def __post_init__(self):
        for key, reason in self.refused.items():
            default = next(f.default for f in fields(self) if f.name == key)
            if getattr(self, key) not in (default, key == "completion_only_loss"):
                raise RecipeError(f"{key}: {getattr(self, key)!r} cannot be set: {reason}. Remove it.")
        self.awaits_gpu = not self.use_cpu and not torch.cuda.is_available()
        if self.awaits_gpu:
            if not self.dry_run:
                raise RecipeError(
                    "This recipe needs a CUDA GPU and there is none here. Run it on a machine with one (6 GB for "
                    "int4, 8 GB for int8), check it with --dry_run, or try the whole path on this CPU with --config "
                    f"{self.tiny_recipe}."
                )
            self.use_cpu = True
        if self.bf16 and not self.use_cpu and half_precision() == torch.float16:
            logger.warning("This GPU has no bfloat16: using float16.")
            self.bf16, self.fp16 = False, True
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        self.read_automatic()
        # Applied when the model is loaded: TRL would do it later, after a reference was scored, or take its loss too.
        self.liger, self.use_liger_kernel = self.use_liger_kernel, False
        super().__post_init__()
        if self.n_gpu > 1:  # transformers would spread each batch over them, by threads
            logger.warning(
                "There are %d GPUs here, and this run uses one. For all: accelerate launch %s", self.n_gpu, sys.argv[0]
            )
            self._n_gpu = 1
        # On several processes, the few records that do not fill a last batch wait for another epoch's shuffle; the
        # alternative would be to train some twice.
        self.dataloader_drop_last = self.dataloader_drop_last or self.world_size > 1

    def read_automatic(self) -> None:
        """The keys that may say auto as what they are in transformers; ``settle`` closes what is left open."""
        size, checkpointing = str(self.per_device_train_batch_size), str(self.gradient_checkpointing).lower()
        if size != AUTO and not (size.isdecimal() and int(size)):
            raise RecipeError(f"per_device_train_batch_size: {size!r} is neither a number from 1 nor auto.")
        if checkpointing not in (AUTO, "true", "false"):
            raise RecipeError(f"gradient_checkpointing: {checkpointing!r} is none of true, false, auto.")
        self.open_keys = {
            key
            for key, value in (("per_device_train_batch_size", size), ("gradient_checkpointing", checkpointing))
            if value == AUTO
        }
        self.per_device_train_batch_size = 1 if size == AUTO else int(size)
        self.gradient_checkpointing = self.activation_checkpointing = checkpointing != "false"

    def take_login(self) -> str | None:
        """The token to share the run with, which is then no longer here: the Trainer pickles these arguments into each
        checkpoint. Nor does it push each checkpoint as it goes."""
        if self.model_init_kwargs:
            logger.warning("model_init_kwargs is left out: the model is loaded as the other keys say.")
        token, self.hub_token, self.push_to_hub, self.model_init_kwargs = self.hub_token, None, False, None
        return token

    @property
    def records(self) -> int:
        """Of a step on one GPU."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def settled(self) -> dict[str, int]:
        """The keys of a batch, if they were left open, as they are run."""
        if "per_device_train_batch_size" not in self.open_keys:
            return {}
        return {key: getattr(self, key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")}

    def settle(self, plan: Plan, quantization: str) -> None:
        """Takes the plan over; the records of a step stay the same."""
        records = self.records
        self.per_device_train_batch_size = plan.micro_batch
        self.gradient_accumulation_steps = records // plan.micro_batch
        self.gradient_checkpointing = self.activation_checkpointing = bool(plan.checkpoint_every)
        if plan.checkpoint_every:
            # bitsandbytes keeps each input of an int8 layer where only the reentrant kind can let go of it.
            kind = {"use_reentrant": quantization == "int8"}
            given = self.activation_checkpointing_kwargs or {}
            self.activation_checkpointing_kwargs = {**kind, "every_n_layers": plan.checkpoint_every, **given}


@dataclass
class TrainingArguments(RunArguments, SFTConfig):
    """TRL's SFTConfig."""

    refused: ClassVar[dict[str, str]] = REFUSED

    def __post_init__(self):
        self.dataset_kwargs = {"skip_prepare_dataset": True}  # records come tokenised, as the preflight checked them
        super().__post_init__()


class Script(NamedTuple):
    """A command that takes a recipe: what it is called, its help, its own recipes, and their keys."""

    name: str
    description: str
    recipes: tuple[str, ...]
    parts: tuple[type, ...]


SFT = Script(
    "train_sft.py",
    __doc__,
    SFT_RECIPES,
    (ModelArguments, DataArguments, TrainingArguments),
)


def parse_recipe(
    arguments: list[str], script: Script = SFT
) -> tuple[ModelArguments, DataArguments, TrainingArguments, dict]:
    """Recipe and command line as dataclasses, and the keys given in either with their parsed values.

    Raises:
        RecipeError: for an unknown key (it names the nearest) or a value that no key takes.
    """
    parser = RecipeParser(
        script.parts,
        [key.name for key in fields(RunArguments)],
        script.recipes,
        everything=bool({"--help_all", "--help-all"} & set(arguments)),
        description=script.description,
        usage=f"{script.name} --config NAME [--KEY VALUE ...]",
    )
    arguments = with_recipe_path(arguments, script.recipes)
    given = []
    if arguments[0] == "--config":
        given = check_keys(arguments, [action.dest for action in parser._actions])
    *parsed, stray = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if stray:
        raise RecipeError(f"{stray[0]!r} belongs to no key: give --KEY VALUE, and quote a value that holds blanks.")
    return *parsed, {key: plain(value) for part in parsed for key, value in vars(part).items() if key in given}


def check_keys(arguments: list[str], known: list[str]) -> list[str]:
    recipe = read_recipe(arguments[1])
    given = [word[2:].split("=")[0].replace("-", "_") for word in arguments[2:] if word.startswith("--")]
    for where, keys in ((arguments[1], recipe), ("the command line", given)):
        for key in keys:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
                raise RecipeError(f"{key}, in {where}, is not a key of a recipe. Did you mean {nearest}?")
    return [*recipe, *given]


# ---------------------------------------------------------------------------------------------------------------------
# Parse


@dataclass
class StartArguments(ModelArguments):
    """What to start from: an adapter that train_sft.py saved, or a base with a new one."""

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "A per_decision_ranking fine-tune to start from; base, quantization and LoRA are then its own."
        },
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "A base, where no adapter is given."})
    quantization: str = field(default="int4", metadata={"help": "int4, int8 or none, of the base."})

    def __post_init__(self):
        super().__post_init__()
        check_start_keys(self)


@dataclass(kw_only=True)
class PairArguments(DataArguments, recipe_keys(OUTCOMES, PAIRS, kind=PreferenceConfig)):
    """Which answers are paired, and what their outcomes are net of; default as in load_candidates."""

    dataset_config: str = field(default="preference", init=False)
    balance: str = field(default="none", init=False)  # the pairs come balanced

    def __post_init__(self):
        super().__post_init__()
        check_pair_keys(self)

    def rankings(self) -> DataArguments:
        """The same decisions, with the teacher's answers."""
        ranking = copy.copy(self)
        ranking.dataset_config, ranking.rejected, ranking.min_edge, ranking.min_edge_pct = RANKING, None, None, None
        return ranking


@dataclass
class PreferenceArguments(RunArguments, DPOConfig):
    """TRL's DPOConfig."""

    refused: ClassVar[dict[str, str]] = {
        **{
            key: REFUSED[key]
            for key in (
                "padding_free",
                "pad_token",
                "train_sampling_strategy",
                "ignore_data_skip",
                "resume_from_checkpoint",
                "per_device_eval_batch_size",
                "activation_checkpointing",
                "auto_find_batch_size",
                "liger_kernel_config",
            )
        },
        "label_smoothing_factor": "it is for cross-entropy; DPO's own is label_smoothing",
        "precompute_ref_log_probs": "the reference is scored before the first step, always",
        "sync_ref_model": "the reference is the model at the start, and stays so",
        "ld_alpha": "the reference is scored over whole answers",
        "truncation_mode": "a record that is longer than max_length is an error",
        "pad_to_multiple_of": "rows are padded to the longest",
    }
    tiny_recipe: ClassVar[str] = "tiny_dpo"


DPO = Script(
    "train_dpo.py",
    __doc__,
    DPO_RECIPES,
    (StartArguments, PairArguments, PreferenceArguments),
)
