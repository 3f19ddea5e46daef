"""A recipe as TRL's arguments: which keys there are, which are refused and why, and what is left to the memory."""

import difflib
import logging
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from trl import DPOConfig, SFTConfig

from covered_call.language_model.loading import half_precision
from covered_call.training.first_checks import STAGES, Command, read_command
from covered_call.training.memory import Plan
from covered_call.training.recipe_help import RecipeParser, plain
from covered_call.training.runs import RecipeError

if TYPE_CHECKING:
    import transformers

    class Mixed(transformers.TrainingArguments):
        """What RunArguments is mixed into; as its base it would bring back the defaults that TRL changes."""

        output_dir: Any  # a str: transformers gives it a name, if nobody does

    TextAtFirst = SwitchAtFirst = Any  # what transformers has, once it was read: see read_automatic
else:
    Mixed, TextAtFirst, SwitchAtFirst = object, str, bool | None

logger = logging.getLogger(__name__)

AUTO = "auto"

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
REFUSED_BY_BOTH = (
    "padding_free", "pad_token", "train_sampling_strategy", "ignore_data_skip", "resume_from_checkpoint",
    "per_device_eval_batch_size", "activation_checkpointing", "auto_find_batch_size", "liger_kernel_config",
)  # fmt: skip


@dataclass
class RunArguments(Mixed):
    """Mixed into TRL's arguments: what a recipe can say beside them. A GPU is asked for unless use_cpu is set."""

    refused: ClassVar[dict[str, str]] = {}
    verb: ClassVar[str] = "train"
    tiny_recipe: ClassVar[str] = "tiny"

    dry_run: bool = field(default=False, metadata={"help": "Check everything, print the preflight, train nothing."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete the run in output_dir first."})
    collapse_patience: int = field(
        default=4,
        metadata={"help": "Stop after so many evaluations in a row in which all answers were the same; 0: never."},
    )
    per_device_train_batch_size: TextAtFirst = field(
        default="8",
        metadata={
            "help": "Records of a micro-batch; auto: as many of the gradient_accumulation_steps as the memory holds, "
            "which are then so many fewer, so that a step takes the same records."
        },
    )
    gradient_checkpointing: TextAtFirst = field(
        default=AUTO,
        metadata={
            "help": "true: keep each layer's input alone, and compute the rest twice; false; or auto: true of as few "
            "layers as the memory allows."
        },
    )
    use_liger_kernel: SwitchAtFirst = field(
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

    tokens_per_second: float | None = field(
        default=None,
        metadata={
            "help": "Tokens that a GPU trains on in a second, as benchmarks/gpu_memory.py measures them: for the "
            "preflight's hours; default: unknown",
            "metavar": "N",
        },
    )
    price_per_hour: float | None = field(
        default=None,
        metadata={
            "help": "What an hour of the machine costs: for the preflight; default: unknown",
            "metavar": "MONEY",
        },
    )

    def __post_init__(self):
        self.refuse()
        self.find_device()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        self.read_automatic()
        # Applied when the model is loaded: TRL would do it later, after a reference was scored, or take its loss too.
        self.liger, self.use_liger_kernel = self.use_liger_kernel, False
        super().__post_init__()
        if self.n_gpu > 1:  # transformers would spread each batch over them, by threads
            logger.warning(
                "There are %d GPUs here, and this run uses one. For all: accelerate launch -m covered_call %s ...",
                self.n_gpu,
                self.verb,
            )
            self._n_gpu = 1
        # On several processes, the few records that do not fill a last batch wait for another epoch's shuffle; the
        # alternative would be to train some twice.
        self.dataloader_drop_last = self.dataloader_drop_last or self.world_size > 1

    def refuse(self) -> None:
        for key, reason in self.refused.items():
            default = next(f.default for f in fields(self) if f.name == key)
            if getattr(self, key) not in (default, key == "completion_only_loss"):
                raise RecipeError(f"{key}: {getattr(self, key)!r} cannot be set: {reason}. Remove it.")

        for key in ("tokens_per_second", "price_per_hour"):
            if (value := getattr(self, key)) is not None and not value > 0:
                raise RecipeError(f"{key}: {value:g} is not above 0: leave it out where it is not known.")

    def find_device(self) -> None:
        """A GPU and its 16 bits; a dry run may go without."""
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
    def is_first(self) -> bool:
        """Whether this process, of several perhaps, is the one that speaks and writes."""
        return self.process_index == 0

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
            given = self.activation_checkpointing_kwargs
            given = given if isinstance(given, dict) else {}  # transformers has read what was typed as JSON
            self.activation_checkpointing_kwargs = {**kind, "every_n_layers": plan.checkpoint_every, **given}


@dataclass
class TrainingArguments(RunArguments, SFTConfig):
    """TRL's SFTConfig."""

    refused: ClassVar[dict[str, str]] = REFUSED

    def __post_init__(self):
        self.dataset_kwargs = {"skip_prepare_dataset": True}  # records come tokenised, as the preflight checked them
        super().__post_init__()


@dataclass
class PreferenceArguments(RunArguments, DPOConfig):
    """TRL's DPOConfig."""

    refused: ClassVar[dict[str, str]] = {
        **{key: REFUSED[key] for key in REFUSED_BY_BOTH},
        "label_smoothing_factor": "it is for cross-entropy; DPO's own is label_smoothing",
        "precompute_ref_log_probs": "the reference is scored before the first step, always",
        "sync_ref_model": "the reference is the model at the start, and stays so",
        "ld_alpha": "the reference is scored over whole answers",
        "truncation_mode": "a record that is longer than max_length is an error",
        "pad_to_multiple_of": "rows are padded to the longest",
    }
    verb: ClassVar[str] = "prefer"
    tiny_recipe: ClassVar[str] = "tiny_dpo"


# ---------------------------------------------------------------------------------------------------------------------
# Parse


class Script(NamedTuple):
    """A training's command: what it is called, its help, its own recipes, and the dataclasses of their keys."""

    name: str
    description: str
    recipes: tuple[str, ...]
    parts: tuple[type[Any], ...]


SFT = Script(
    "covered-call train",
    """Fine-tunes a language model to answer as the teacher did: LoRA on an int4 or int8 base, loss on the answer only.

    covered-call train --config tiny              # CPU, minutes: a tiny Phi-3 it builds itself
    covered-call train --config ranking           # Phi-3-mini on a CUDA GPU
    covered-call train --config ranking --dry_run # only check that it would work
    covered-call train --config tiny --data_files 'runs/*.csv' --max_steps 50
    accelerate launch train_sft.py --config ranking

A recipe is a YAML file in configs/; every key of it can be given on the command line too, which wins. A run that was
killed goes on from its last checkpoint when the same command is given again. `python train_sft.py` is the same.
""",
    STAGES["sft"].recipes,
    (*STAGES["sft"].keys, TrainingArguments),
)
DPO = Script(
    "covered-call prefer",
    """Teaches a model to prefer what paid more: DPO on pairs of answers, from a fine-tune or from a base.

    covered-call prefer --config tiny_dpo                            # CPU, minutes: from a tiny Phi-3 it builds itself
    covered-call prefer --config tiny_dpo --adapter out/tiny_ranking # from a fine-tune of it
    covered-call prefer --config preference                          # from out/ranking, Phi-3-mini on a CUDA GPU
    covered-call prefer --config preference --dry_run                # only check that it would work

Recipes, the preflight, resuming and what is saved are those of covered-call train.
""",
    STAGES["dpo"].recipes,
    (*STAGES["dpo"].keys, PreferenceArguments),
)


def parse_recipe(arguments: list[str], script: Script = SFT) -> tuple:
    """parse_command of a command line."""
    return parse_command(read_command(arguments, script.recipes), script)


def parse_command(command: Command, script: Script) -> tuple:
    """Recipe and command line as dataclasses, and the keys given in either with their parsed values.

    Returns:
        The arguments of model, data and training, and a dict.

    Raises:
        RecipeError: for an unknown key (it names the nearest) or a value that no key takes.
    """
    parser = RecipeParser(
        script.parts,
        [key.name for key in fields(RunArguments)],
        script.recipes,
        everything=bool({"--help_all", "--help-all"} & set(command.words)),
        description=script.description,
        usage=f"{script.name} --config NAME [--KEY VALUE ...]",
    )
    given = [] if command.asks_help else check_keys(command, [action.dest for action in parser._actions])
    parser.set_defaults_with_config(**command.recipe)
    found: tuple[Any, ...] = parser.parse_args_into_dataclasses(command.words, return_remaining_strings=True)
    *parsed, stray = found
    if stray:
        raise RecipeError(f"{stray[0]!r} belongs to no key: give --KEY VALUE, and quote a value that holds blanks.")
    return *parsed, {key: plain(value) for part in parsed for key, value in vars(part).items() if key in given}


def check_keys(command: Command, known: list[str]) -> list[str]:
    """The keys that are given; RecipeError for one that there is not."""
    typed = [word[2:].split("=")[0].replace("-", "_") for word in command.words if word.startswith("--")]
    for where, keys in ((command.path, command.recipe), ("the command line", typed)):
        for key in keys:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
                raise RecipeError(f"{key}, in {where}, is not a key of a recipe. Did you mean {nearest}?")
    return [*command.recipe, *typed]
