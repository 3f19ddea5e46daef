"""Fine-tunes a language model to answer as the teacher did: LoRA on an int4 or int8 base, loss on the answer only.

    python train_sft.py --config tiny              # CPU, minutes: a tiny Phi-3 it builds itself
    python train_sft.py --config ranking           # Phi-3-mini on a CUDA GPU
    python train_sft.py --config ranking --dry_run # only check that it would work
    python train_sft.py --config tiny --data_files 'runs/*.csv' --max_steps 50
    accelerate launch train_sft.py --config ranking

A recipe is a YAML file in configs/; every key of it can be given on the command line too, which wins. A run that was
killed goes on from its last checkpoint when the same command is given again.
"""

if __name__ == "__main__":  # before all that takes long to import, or is missing outside of the environment
    import command_line

    command_line.begin()

    import first_checks

    first_checks.check(first_checks.SFT_RECIPES)

import datetime
import difflib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, concatenate_datasets
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from sklearn.metrics import accuracy_score, recall_score
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import is_fsdp_enabled
from trl import SFTConfig, SFTTrainer

import atomic
from command_line import disk_trouble, quiet, start_logging
from covered_call_candidates import (
    NO_TRADE,
    PROMPT_VERSION,
    SKIP,
    CandidatesError,
    admissible_answers,
    find_csvs,
    fingerprint,
    hashes_of,
    load_candidates,
)
from first_checks import (
    SFT_RECIPES,
    check_base,
    check_data_keys,
    check_model_keys,
    in_words_of_the_command_line,
    no_model,
    read_recipe,
    with_recipe_path,
)
from loading import (
    answer_tokens,
    base_revision,
    context_limit,
    control_beside,
    control_in,
    control_tokens,
    encode,
    half_precision,
    load_base,
    load_config,
    load_tokenizer,
)
from memory import CONTEXT_GIB, Plan, Work, choose, count_parameters, memory_there
from policy import fit_temperature
from publish import PublishError, check_login, push_model
from recipe_help import RecipeParser, data_key, plain
from run_card import SFT_PANELS, Panel, fill_card, plot_course
from runs import (
    CALIBRATION,
    CHECKPOINT,
    MANIFEST,
    RECIPE,
    PolicyError,
    RecipeError,
    begun_run,
    hash_of,
    held,
    of_the_run,
    open_run,
)
from scoring import ROW_TOKENS, Scored, head_at, score_answers
from tiny_phi3 import build_tiny_base, tiny_base_path
from training_log import talk_plainly

logger = logging.getLogger("train_sft")

CARD, PLOT = "README.md", "training.png"
ROLES = ("system", "user", "assistant")
IGNORE = -100  # the label of a token that carries no loss
ZERO_GRADIENT_STEPS = 20
AUTO = "auto"
ALIKE, NEAR = 8, 512  # records of like length that come together, out of so many neighbours of an epoch's order


class TrainingStopped(RuntimeError):
    """Training went wrong in a way that more steps do not mend; the message says how."""


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


@dataclass
class DataArguments:
    """What load_candidates is called with; what is not given takes its default there."""

    dataset_config: str = field(metadata={"help": "What is asked: per_candidate or per_decision_ranking."})
    data_files: list[str] | None = data_key("data_files")
    data_dir: str | None = data_key("data_dir")
    underlying: str | None = data_key("underlying")
    exit_style: str | None = data_key("exit_style")
    candidate_order: str | None = field(
        default=None,
        metadata={
            "help": "instrument, csv, or shuffle: the training split, in another order each epoch; validation and "
            "test stay in instrument order; default: instrument",
            "metavar": "ORDER",
        },
    )
    splits: list[float] | None = data_key("splits")
    validation_from: str | None = data_key("validation_from")
    test_from: str | None = data_key("test_from")
    purge: bool | None = data_key("purge")
    duplicates: str | None = data_key("duplicates")
    on_bad_rows: str | None = data_key("on_bad_rows")
    max_iv: float | None = data_key("max_iv")
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
# Load


def check_model(model: ModelArguments) -> None:
    """Raises RecipeError at once if there is no such model here, nor a way to download it, or FSDP cannot take it."""
    if is_fsdp_enabled() and model.quantization == "int8":
        raise RecipeError("quantization: FSDP cannot shard int8 weights. Use int4, or launch without FSDP.")
    if model.tiny_base_steps:
        return
    check_base(model.model_name_or_path)
    try:
        load_config(model.model_name_or_path)
    except OSError as error:
        raise no_model(model.model_name_or_path) from error
    except ValueError as error:
        raise RecipeError(f"{model.model_name_or_path} cannot be used: {str(error).splitlines()[0]}") from error


def load_splits(data: DataArguments, files: list[str], seed: int) -> DatasetDict:
    """The splits as load_candidates makes them, with an error for one that is too small to train or choose on."""
    splits = load_candidates(**loading_options(data), data_files=files, seed=seed)
    for split in ("train", "validation"):
        if split not in splits:
            raise RecipeError(f"The {split} split is empty: give more data, or set splits, or validation_from.")
    return splits


def loading_options(data: DataArguments) -> dict:
    """The options of load_candidates that a recipe gives. A shuffle is for training only: see load_epochs."""
    left_out = ("dataset_config", "balance", "max_eval_records", "data_files", "data_dir")
    options = {name: value for name, value in vars(data).items() if value is not None and name not in left_out}
    if data.candidate_order == "shuffle":
        del options["candidate_order"]
    return {"name": data.dataset_config, **options}


def load_epochs(data: DataArguments, files: list[str], seed: int, copies: int) -> Dataset:
    """The training split ``copies`` times over, each with its candidates shuffled anew."""
    epochs = []
    with quiet():  # the same files were loaded, and spoken of, a moment ago
        for epoch in range(copies):
            options = loading_options(data) | {"candidate_order": "shuffle", "seed": seed + epoch}
            epochs.append(load_candidates(**options, data_files=files)["train"])
    return concatenate_datasets(epochs)


def build_base_if_tiny(model: ModelArguments, train: Dataset, training: TrainingArguments) -> None:
    """Builds the tiny Phi-3 that a recipe with tiny_base_steps asks for, unless it stands there already."""
    if not model.tiny_base_steps or os.path.isdir(model.model_name_or_path):
        return
    chats = train.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns=train.column_names,
        desc="Splitting off the answers",
    )
    path = tiny_base_path(model.model_name_or_path, chats, model.tiny_base_steps, training.seed)
    if not os.path.isdir(path):
        if training.world_size > 1:
            raise RecipeError("The tiny base is built by one process: give this command once with python, --dry_run.")
        build_tiny_base(path, chats, model.tiny_base_steps, training.seed)
    model.model_name_or_path = path


def encode_split(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids of each chat, with labels on its answer alone, and the answers it could have, unless given."""

    def tokens(rows: dict) -> dict:
        encoded = encode(tokenizer, rows["messages"])
        answers = rows.get("answers") or [
            admissible_answers(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)
        ]
        return {
            "input_ids": [prompt + answer for prompt, answer in encoded],
            "labels": [[IGNORE] * len(prompt) + answer for prompt, answer in encoded],
            "answers": answers,
        }

    unused = set(split.column_names) - {"label", "decision_id", "decision_time", "answers"}
    return split.map(tokens, batched=True, remove_columns=list(unused), desc="Tokenising")


def load_model(
    model: ModelArguments, training: TrainingArguments, revision: str | None = None
) -> tuple[PreTrainedModel, LoraConfig | None]:
    """The base, quantised as asked, and the adapter to attach."""
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    name, sharded = model.model_name_or_path, is_fsdp_enabled()
    base = load_base(name, model.quantization, dtype, training.device, revision, sharded, training.liger)
    return base, lora_config(model)


def lora_config(model: ModelArguments) -> LoraConfig | None:
    """LoRA (https://arxiv.org/abs/2106.09685) on every linear layer but the head; None to train all weights."""
    if not model.lora_r:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules="all-linear",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Check


def preflight(
    model: ModelArguments,
    data: DataArguments,
    training: TrainingArguments,
    splits: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    answers: dict[str, tuple[int, ...]],
    sampler: "EpochSampler",
) -> str:
    """Checks that this can be trained, and says what it is, on what, and how long.

    Args:
        splits: as encode_split made them.
        answers: the tokens of each answer.

    Raises:
        RecipeError: for a record that does not fit max_length, or whose loss is not exactly its answer's.
    """
    config = load_config(model.model_name_or_path)
    lengths = {name: check_records(name, split, answers, tokenizer) for name, split in splits.items()}
    check_lengths(splits, lengths, training.max_length, config)
    longest_answer = max(map(len, answers.values()))
    work = describe_model(config, model, training, longest_record(lengths), longest_answer)
    there = memory_for(training, model.quantization)
    plan = make_plan(work, training, there)
    training.settle(plan, model.quantization)
    sampler.group(lengths["train"][0], global_batch(training))
    rows = [longest_row(split, *lengths[name], answers) for name, split in splits.items()]
    facts = {
        "tokens": describe_tokens(lengths, longest_answer, training.max_length),
        "answers": describe_answers(tokenizer, answers),
        "balance": f"{data.balance}: an epoch takes {sampler}",
        **describe_work(training, work, plan, there, max(rows), len(sampler)),
    }
    shown = {**splits, "train": splits["train"].select(range(sampler.records))}
    return lay_out_preflight(
        f"{data.dataset_config} on {model.model_name_or_path}, {model.quantization}", shown, facts
    )


def describe_model(config, model: ModelArguments, training: "RunArguments", tokens: int, asked: int) -> Work:
    """What of a recipe decides the memory; for ``tokens`` and ``asked`` see memory.Work."""
    width = 2 if training.bf16 or training.fp16 else 4
    moment = 1 if "8bit" in training.optim else 4
    size = count_parameters(config, lora_config(model))
    return Work(config, size, model.quantization, width, moment, bool(model.lora_dropout), tokens, asked)


def memory_for(training: "RunArguments", quantization: str) -> float | None:
    """GiB that each process has, or is to have: the same figure for all, whose plans must not differ."""
    gib = memory_there(quantization, None if training.awaits_gpu else training.device)
    return gib if gib is None or training.world_size == 1 else min(gather_object([gib]))


def make_plan(work: Work, training: "RunArguments", there: float | None) -> Plan:
    """What the recipe leaves open, for so many GiB; a run that was begun keeps its micro-batch."""
    begun = None if training.overwrite_output_dir else begun_run(Path(training.output_dir))
    size, every = training.per_device_train_batch_size, int(training.gradient_checkpointing)
    if "per_device_train_batch_size" in training.open_keys:
        size = begun.get("micro_batch") if begun else None
    if "gradient_checkpointing" in training.open_keys:
        every = None
    return choose(work, training.records, size, every, there)


def longest_row(split: Dataset, totals: np.ndarray, learnt: np.ndarray, answers: dict) -> tuple[int, int]:
    """Tokens of the longest row of answers that an evaluation reads, and how many of them are answers'."""
    rows = Counter()
    asked = [sum(len(answers[answer]) for answer in offered) for offered in split["answers"]]
    lengths = totals - learnt + np.array(asked)
    for decision, length in zip(split["decision_id"], lengths.tolist(), strict=True):
        rows[decision] += length
    longest = max(int(lengths.max()), min(max(rows.values()), ROW_TOKENS))
    return longest, math.ceil(longest * max(a / n for a, n in zip(asked, lengths.tolist(), strict=True)))


def longest_record(lengths: dict[str, tuple[np.ndarray, np.ndarray]]) -> int:
    return int(max(total.max() for total, _ in lengths.values()))


def describe_tokens(
    lengths: dict[str, tuple[np.ndarray, np.ndarray]], longest_answer: int, max_length: int | None
) -> str:
    prompts = np.concatenate([total - answer for total, answer in lengths.values()])
    return (
        f"prompt at most {prompts.max()}, 99 % up to {np.percentile(prompts, 99):.0f}; answer at most "
        f"{longest_answer}; record at most {longest_record(lengths)}, and none is over max_length {max_length}"
    )


def describe_answers(tokenizer: PreTrainedTokenizerBase, answers: dict[str, tuple[int, ...]]) -> str:
    endings = {tokenizer.convert_ids_to_tokens(tokens[-1]) for tokens in answers.values()}
    return (
        f"{len(answers)}, told apart by their tokens through {', '.join(sorted(endings))}, on which alone each "
        f"record's loss is; the pad token is {tokenizer.pad_token}"
    )


def describe_work(
    training: "RunArguments", work: Work, plan: Plan, there: float | None, row: tuple[int, int], records: int
) -> dict[str, str]:
    """What is trained, in how much memory, for how long; an epoch takes so many records."""
    steps, epochs = count_steps(training, records)
    size, parts, evaluation = work.size, work.step(*plan), work.evaluation(*row)
    detail = ", ".join(f"{part} {gib:.1f}" for part, gib in parts.items())
    return {
        "parameters": f"{size.trainable:,} of {size.total + size.adapter:,} are trained",
        "memory": f"about {sum(parts.values()):.1f} GiB at the peak of a step, estimated, not measured ({detail})"
        + compare(sum(parts.values()), there, training.awaits_gpu),
        "evaluation": f"about {evaluation:.1f} GiB for the longest row of answers, of {row[0]} tokens at most; more "
        "rows at once as memory allows" + compare(evaluation, there, training.awaits_gpu),
        "steps": f"{steps:,} of {global_batch(training)} records: {epochs:.1f} epochs; {describe_plan(plan)}",
    }


def describe_plan(plan: Plan) -> str:
    kept = {0: "all activations kept", 1: "every layer computed twice"}
    twice = kept.get(plan.checkpoint_every, f"1 layer in {plan.checkpoint_every} computed twice")
    return f"micro-batches of {plan.micro_batch}, {twice}"


def compare(gib: float, there: float | None, awaited: bool) -> str:
    """How an estimate stands to the memory that there is."""
    if there is None:
        return ""
    whose = f"a card of {there + CONTEXT_GIB:.0f} GB leaves" if awaited else "this GPU has"
    return f"; {whose} only {there:.1f}" if gib > there else f", of {there:.1f} that {whose}"


def lay_out_preflight(what: str, splits: dict[str, Dataset], facts: dict[str, str]) -> str:
    return "\n".join(
        [
            f"\nPreflight of {what}\n",
            f"{'split':<11}{'records':>8}{'decisions':>10}  {'from':<11}{'to':<11}{'trades':>7}  answers",
            *(describe_split(name, split) for name, split in splits.items()),
            "",
            *(f"{what:<11}{fact}" for what, fact in facts.items()),
            "",
        ]
    )


def describe_split(name: str, split: Dataset) -> str:
    times = split["decision_time"]
    share = sum(map(is_trade, split["label"])) / len(split)
    return (
        f"{name:<11}{len(split):>8,}{len(set(split['decision_id'])):>10,}  {min(times).date()!s:<11}"
        f"{max(times).date()!s:<11}{share:>7.1%}  {count_labels(split['label'])}"
    )


def count_labels(labels: list[str]) -> str:
    counts = Counter(labels)
    most = ", ".join(f"{label} {count:,}" for label, count in counts.most_common(6))
    return most + (f", {len(counts) - 6} more" if len(counts) > 6 else "")


def is_trade(label: str) -> bool:
    return label not in (SKIP, NO_TRADE)


def check_records(
    name: str, split: Dataset, answers: dict[str, tuple[int, ...]], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each record, and of its answer; RecipeError unless its loss is on exactly its answer's tokens, and its
    control tokens are those of the chat template."""
    totals, learnt = np.zeros(len(split), int), np.zeros(len(split), int)
    control = control_tokens(tokenizer)
    [(prompt, answer)] = encode(tokenizer, [[{"role": role, "content": "x"} for role in ROLES]])
    template = control_in(prompt + answer, control)
    for index, row in enumerate(split.select_columns(["input_ids", "labels", "label", "decision_id"])):
        if strange := control_beside(template, row["input_ids"], control):
            raise RecipeError(
                f"{name}, {row['decision_id']}: a name holds the text {strange}, which is a control token of the "
                "model. Correct the file."
            )
        label_ids = tuple(token for token in row["labels"] if token != IGNORE)
        if label_ids != answers[row["label"]]:
            raise RecipeError(
                f"{name}, {row['decision_id']}: the loss would be on the tokens {label_ids}, and the answer "
                f"{row['label']} is {answers[row['label']]}. The tokenizer reads this answer differently after "
                "different prompts: take another model."
            )
        totals[index], learnt[index] = len(row["labels"]), len(label_ids)
    return totals, learnt


def check_lengths(splits: DatasetDict, lengths: dict, max_length: int | None, config) -> None:
    """Raises RecipeError if a record is longer than max_length, which would cut its answer off, without a word."""
    context = context_limit(config)
    if (max_length or 0) > context:
        raise RecipeError(f"max_length {max_length} is more than the {context} tokens that the model sees at once.")
    limit = max_length or context
    over = {name: np.flatnonzero(total > limit) for name, (total, _) in lengths.items()}
    if not any(map(len, over.values())):
        return
    first = next(name for name, places in over.items() if len(places))
    place = int(over[first][0])
    counts = ", ".join(f"{len(places):,} of {len(splits[name]):,} in {name}" for name, places in over.items())
    raise RecipeError(
        f"Records longer than max_length {limit}: {counts}. The first is {splits[first]['decision_id'][place]} with "
        f"{lengths[first][0][place]} tokens; its answer would be cut off. Set max_length to "
        f"{max(total.max() for total, _ in lengths.values())} or more."
    )


def global_batch(training: TrainingArguments) -> int:
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def count_steps(training: TrainingArguments, records: int) -> tuple[int, float]:
    """Optimiser steps of the run, and how many epochs of so many records they are."""
    batches = records / (training.train_batch_size * training.world_size)
    batches = math.floor(batches) if training.dataloader_drop_last else math.ceil(batches)
    if not batches:
        raise RecipeError(f"{records} records do not fill a batch: lower per_device_train_batch_size.")
    per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
    if training.max_steps > 0:
        return training.max_steps, training.max_steps / per_epoch
    return math.ceil(training.num_train_epochs * per_epoch), training.num_train_epochs


# ---------------------------------------------------------------------------------------------------------------------
# Train


class EpochSampler(torch.utils.data.Sampler):
    """The records of an epoch, in an order that is a law of the seed and the epoch alone.

    Args:
        trades: for each record of the training split, whether the teacher traded.
        balance: with "downsample", an epoch takes as many records of either kind; the others take turns.

    Attributes:
        copies: how many times over the data set holds the split, each differently shuffled inside; epoch e draws
            from copy e.
        lengths: tokens of each record of the data set, if those of like length are to come together.
        step: records of an optimiser step, on all processes.
    """

    def __init__(self, trades: list[bool], balance: str, seed: int):
        self.kinds = [np.flatnonzero(np.array(trades) == kind) for kind in (True, False)]
        self.records, self.balance, self.seed, self.copies, self.epoch = len(trades), balance, seed, 1, 0
        self.lengths, self.step = None, 1
        smaller = min(map(len, self.kinds))
        if balance != "none" and not smaller:
            raise RecipeError(f"balance: {balance} needs both trades and non-trades in the training split.")
        self.takes = [smaller if balance == "downsample" else len(kind) for kind in self.kinds]

    def __len__(self) -> int:
        return sum(self.takes)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        drawn = [rng.permutation(kind)[:take] for kind, take in zip(self.kinds, self.takes, strict=True)]
        start = self.epoch % self.copies * self.records
        return iter(self.alike(start + rng.permutation(np.concatenate(drawn)), rng).tolist())

    def alike(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The order changed so that micro-batches hold records of like length, which need little padding.

        Up to eight of like length come together, and a step takes several such groups, drawn at random and sorted.
        Which records make up a step does not depend on how it is divided into micro-batches and processes. What does
        not fill a step stays last as it was drawn, lest the longest be left out.
        """
        if self.lengths is None:
            return order
        size = max(n for n in range(1, ALIKE + 1) if self.step % n == 0)
        whole = len(order) // self.step * self.step
        groups = []
        for near in np.split(order[:whole], range(NEAR * size // ALIKE, whole, NEAR * size // ALIKE)):
            groups.append(near[np.argsort(self.lengths[near], kind="stable")].reshape(-1, size))
        steps = rng.permutation(np.concatenate(groups)).reshape(-1, self.step)
        by_length = np.argsort(self.lengths[steps], axis=1, kind="stable")
        return np.concatenate([np.take_along_axis(steps, by_length, axis=1).ravel(), order[whole:]])

    def group(self, lengths: np.ndarray, step: int) -> None:
        self.lengths, self.step = lengths, step

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def weights(self) -> list[float]:
        """Loss weight of a trade and of a non-trade: 1 on average, the same total for both."""
        return [self.records / (2 * len(kind)) if self.balance == "weight" else 1.0 for kind in self.kinds]

    def __str__(self) -> str:
        return " and ".join(
            f"{take:,} of {len(kind):,} {name}" + (f" at weight {weight:.2f}" if weight != 1 else "")
            for take, kind, name, weight in zip(
                self.takes, self.kinds, ("trades", "non-trades"), self.weights(), strict=True
            )
        )


class ScoringTrainer:
    """Mixed into a trainer of TRL's: evaluated by scoring answers, in an order of records that can be resumed.

    Args:
        sampler: of the training records.
        answers: the tokens of each answer.
    """

    def __init__(self, *args, sampler: EpochSampler, answers: dict[str, tuple[int, ...]], **kwargs):
        self.sampler, self.answers = sampler, answers
        super().__init__(*args, callbacks=[StopOnTrouble(), FindBest()], **kwargs)
        talk_plainly(self)
        if not self.is_fsdp_enabled:
            # TRL keeps a quantised model's adapter in bfloat16, whose 8 bits swallow small steps, which float16
            # training cannot scale, and which a resumed run would load as float32.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's
        if checkpoint is None or self.is_fsdp_enabled or not getattr(optimizer, "is_paged", False):
            return
        # What was loaded lies in plain memory. On one GPU it would stay there; on several it is still marked as paged,
        # and bitsandbytes ends the process when it prefetches it.
        for parameter, state in optimizer.state.items():
            for name in state.keys() & {"state1", "state2"}:
                paged = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = paged.copy_(state[name])

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        # The run was killed after its last step. The Trainer asks whether that was the last only once it took another.
        self.control.should_training_stop = True

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        return self.sampler

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingStopped(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. Lower learning_rate, or train in "
                "bfloat16. The last checkpoint is kept."
            )
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Metrics of the scores of the admissible answers; see ``measure``."""
        split = self.eval_dataset if eval_dataset is None else eval_dataset
        found = self.measure(split, self.score(split))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, split: Dataset, scored: list[Scored]) -> dict[str, float]:
        return answer_metrics(split, scored)

    def score(self, split: Dataset) -> list[Scored]:
        """The scores of each record's admissible answers, every process taking its share of the decisions."""
        processes = self.accelerator.num_processes
        owners = list(split["decision_id"])
        groups = [list(rows) for _, rows in itertools.groupby(range(len(split)), key=owners.__getitem__)]
        share = math.ceil(len(groups) / processes)
        # A sharded model needs all processes in each pass: one without a share takes the last decision once more.
        start = min(share * self.accelerator.process_index, len(groups) - 1)
        mine = [place for group in groups[start : start + share] for place in group]
        prompts, answers = [], []
        for row in split.select(mine):
            prompts.append([t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORE])
            answers.append([self.answers[answer] for answer in row["answers"]])
        decisions = [owners[place] for place in mine]
        found = score_answers(self.model_wrapped, prompts, answers, decisions, self.args.batch_tokens)
        scored = dict(zip(mine, found, strict=True))
        if processes > 1:
            scored = dict(gather_object(list(scored.items())))
        return [scored[place] for place in range(len(split))]


class AnswerTrainer(ScoringTrainer, SFTTrainer):
    """SFTTrainer with logits only where there are labels."""

    def __init__(self, *args, sampler: EpochSampler, answers: dict[str, tuple[int, ...]], **kwargs):
        trade, other = sampler.weights()
        self.weights = {tokens: trade if is_trade(answer) else other for answer, tokens in answers.items()}
        super().__init__(*args, sampler=sampler, answers=answers, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy of the answers' tokens; the logits of all other positions are never computed."""
        labels = inputs.pop("labels")
        rows, columns = places = (labels[:, 1:] != IGNORE).nonzero().T  # whose next token is an answer's
        with head_at(model, places):
            outputs = model(**inputs, use_cache=False)
        targets = labels[rows, columns + 1]
        by_token = torch.nn.functional.cross_entropy(outputs.logits[0].float(), targets, reduction="none")
        weighted = (by_token * self.weights_of(labels)[rows]).sum()
        if num_items_in_batch is None:
            loss = weighted / len(targets)
        else:  # answer tokens of all processes and accumulated batches; DDP then takes the mean over processes
            loss = weighted / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def weights_of(self, labels: torch.Tensor) -> torch.Tensor:
        answers = [tuple(token for token in row if token != IGNORE) for row in labels.tolist()]
        return torch.tensor([self.weights[answer] for answer in answers], device=labels.device)


def answer_metrics(split: Dataset, scored: list[Scored]) -> dict[str, float]:
    """How the likeliest answers compare with the teacher's.

    loss is the mean negative log-likelihood of the teacher's answer among the admissible ones; trade_rate the share
    of answers that sell; outside the share of records to which the model, left to itself, would write something else
    than an admissible answer; answers_used how many different answers it gave.
    """
    labels = split["label"]
    predicted = predictions(split, scored)
    likelihoods = [torch.tensor(one.log_probabilities).log_softmax(0) for one in scored]
    given = zip(likelihoods, split["answers"], labels, strict=True)
    return {
        "loss": -float(np.mean([row[answers.index(label)] for row, answers, label in given])),
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "trade_rate": float(np.mean([is_trade(answer) for answer in predicted])),
        "outside": float(np.mean([not one.in_set for one in scored])),
        "answers_used": len(set(predicted)),
    }


def predictions(split: Dataset, scored: list[Scored]) -> list[str]:
    """The likeliest admissible answer of each record."""
    return [
        answers[int(np.argmax(one.log_probabilities))] for answers, one in zip(split["answers"], scored, strict=True)
    ]


def balanced_accuracy(labels: list[str], predicted: list[str]) -> float:
    """Mean over the answers that the teacher gave of the share of each that is met."""
    return float(recall_score(labels, predicted, labels=sorted(set(labels)), average="macro", zero_division=0))


class StopOnTrouble(TrainerCallback):
    """Ends a run that learns nothing: no gradient, or one answer to everything."""

    still = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.still = 0 if gradients and torch.nn.utils.get_total_norm(gradients) != 0 else self.still + 1
        if self.still >= ZERO_GRADIENT_STEPS:
            raise TrainingStopped(
                f"The gradient was zero for {self.still} steps, up to step {state.global_step + 1}, so nothing is "
                "learnt. Is learning_rate far too high, or is everything frozen?"
            )

    def on_evaluate(self, args, state, control, **kwargs):
        used = [entry["eval_answers_used"] for entry in state.log_history if "eval_answers_used" in entry]
        if args.collapse_patience and used[-args.collapse_patience :] == [1] * args.collapse_patience:
            raise TrainingStopped(
                f"In the last {args.collapse_patience} evaluations, up to step {state.global_step}, every answer was "
                "the same: the model has collapsed onto one class. Try balance: downsample or weight, another "
                "learning_rate, or more steps between evaluations; collapse_patience 0 lets it go on."
            )


class FindBest(TrainerCallback):
    """Finds the best checkpoint of a resumed run in its folder, which may have been moved, or named from elsewhere.

    The Trainer goes by the path it once had, and where that leads nowhere keeps the last weights.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        best = Path(args.output_dir) / f"{CHECKPOINT}{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)


def thin_out(split: Dataset, limit: int | None) -> Dataset:
    """At most ``limit`` records, evenly spaced."""
    if not limit or len(split) <= limit:
        return split
    return split.select(range(0, len(split), math.ceil(len(split) / limit)))


# ---------------------------------------------------------------------------------------------------------------------
# Resume and save


def describe_run(
    model: ModelArguments,
    data: DataArguments,
    training: TrainingArguments,
    given: dict,
    hashes: dict[str, str],
    splits: DatasetDict,
    answers: dict[str, tuple[int, ...]],
    sampler: EpochSampler,
    seen: dict,
) -> dict:
    """The manifest: all that decides what comes out of a run. Equal manifests give equal weights.

    Args:
        hashes: of the data files by path, from before they were read.
        splits: as encode_split made them.
        seen: of the training split; see tuned_on.

    Raises:
        RecipeError: if a data file is not any more as it was then.
    """
    for path, digest in hashes_of(fingerprint(list(hashes))).items():
        if digest != hashes[path]:
            raise RecipeError(f"{path} has changed since this run began to read it. Start again when it is whole.")
    return {
        "task": data.dataset_config,
        "base_model": model.model_name_or_path,
        "base_revision": base_revision(model.model_name_or_path),
        "quantization": model.quantization,
        "adapter": bool(model.lora_r),
        "data_files": {os.path.basename(path): digest for path, digest in hashes.items()},
        "prompt_version": PROMPT_VERSION,
        "labels": list(answers),
        "splits": {
            name: {
                "records": sampler.records if name == "train" else len(split),
                "from": min(split["decision_time"]).isoformat(),
                "to": max(split["decision_time"]).isoformat(),
            }
            for name, split in splits.items()
        },
        "recipe": of_the_run({**keys_of(model), **keys_of(data), **given, **training.settled()}),
        "tuned_on": seen,
        "processes": training.world_size,
        "micro_batch": training.per_device_train_batch_size,
        "seed": training.seed,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
        },
        "finished": None,
    }


def tuned_on(train: Dataset) -> dict:
    """What the training prompts show of a market: its names, and from where to where each number of a candidate goes.

    Args:
        train: as load_splits makes it of per_candidate or per_decision_ranking.
    """
    ranking = "candidates" in train.column_names
    shown = ["dte", "delta", "score"] if ranking else ["dte", "delta", "score", "iv", "ivrv_ratio"]
    if ranking:
        rows = pd.DataFrame(itertools.chain(*train["candidates"]), columns=shown)
    else:
        rows = train.select_columns(shown).to_pandas()
    ends = rows.astype(float).agg(["min", "max"]).dropna(axis=1)  # of what is always blank there are none
    return {
        "underlyings": sorted(set(train["underlying"])),
        "exit_styles": sorted(set(train["exit_style"])),
        "numbers": {name: ends[name].tolist() for name in ends},
    }


def keys_of(part: ModelArguments | DataArguments) -> dict:
    """What a recipe can say, with its values."""
    return {key.name: getattr(part, key.name) for key in fields(part) if key.init}


def save(
    trainer: ScoringTrainer,
    manifest: dict,
    results: list[dict],
    calibration: dict,
    panels: tuple[Panel, ...],
    card: Callable[[dict, str], ModelCard],
) -> None:
    """Adapter, tokenizer, recipe, calibration, plot, card and, last, the manifest that says the run has finished."""
    folder = Path(trainer.args.output_dir)
    unfinished = folder / "unfinished"
    trainer.save_model(str(unfinished))  # all processes take part; the first one writes
    if not trainer.args.should_save:
        return
    for name in ("training_args.bin", CARD):  # a pickle, of which the recipe is the readable form; PEFT's empty card
        (unfinished / name).unlink(missing_ok=True)
    files = {path.name: hash_of(path) for path in sorted(unfinished.iterdir())}
    for name in files:
        os.replace(unfinished / name, folder / name)
    unfinished.rmdir()
    best = trainer.state.best_global_step
    manifest = {
        **manifest,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "steps": trainer.state.global_step,
        "best_step": best,
        "results": results,
        "files": files,
    }
    recipe = {key: value for key, value in manifest["recipe"].items() if value is not None}
    recipe["output_dir"] = trainer.args.output_dir
    atomic.write(folder / RECIPE, yaml.safe_dump(recipe, sort_keys=False))
    atomic.write(folder / CALIBRATION, json.dumps(calibration, indent=2))
    plot_course(trainer.state.log_history, best, folder / PLOT, panels)
    atomic.write(folder / CARD, str(card(manifest, trainer.args.output_dir)))
    atomic.write(folder / MANIFEST, json.dumps(manifest, indent=2))


IMITATES = "It imitates a covered-call backtest (the teacher)"
COPIES = "it copies a rule, on the markets of those dates; agreeing with the teacher is no evidence of profit."


def model_card(manifest: dict, folder: str) -> ModelCard:
    rows = [
        f"| {r['split']} | {r['records']} | {r['answers_by']} | {r['accuracy']:.3f} | {r['balanced_accuracy']:.3f} |"
        for r in manifest["results"]
    ]
    head = ["| split | records | answers by | accuracy | balanced accuracy |", "|---|---|---|---|---|"]
    return fill_card(manifest, folder, "sft", IMITATES, "\n".join([*head, *rows]), COPIES)


def report(trainer: AnswerTrainer, splits: DatasetDict, scored: dict[str, list[Scored]], commonest: str) -> list[dict]:
    """Accuracy and balanced accuracy of the tuned model, of its base, and of always the commonest answer."""
    results = []
    for name in scored:
        split = splits[name]
        answers = {"tuned model": predictions(split, scored[name])}
        if isinstance(trainer.model, PeftModel):
            with trainer.model.disable_adapter():
                answers["its base, untuned"] = predictions(split, trainer.score(split))
        answers[f"always {commonest}"] = [commonest] * len(split)
        for who, given in answers.items():
            results.append(
                {
                    "split": name,
                    "records": len(split),
                    "answers_by": who,
                    "accuracy": float(accuracy_score(split["label"], given)),
                    "balanced_accuracy": balanced_accuracy(split["label"], given),
                }
            )
    return results


def calibrate_on(split: Dataset, scored: list[Scored]) -> dict[str, float]:
    """The temperature that fits the answers' probabilities to the teacher's on this split."""
    targets = [answers.index(label) for answers, label in zip(split["answers"], split["label"], strict=True)]
    return fit_temperature([torch.tensor(one.log_probabilities, dtype=torch.float64) for one in scored], targets)


def table(results: list[dict]) -> str:
    head = f"\n{'split':<12}{'records':>8}  {'answers by':<24}{'accuracy':>9}{'balanced accuracy':>19}"
    lines = [
        f"{r['split']:<12}{r['records']:>8}  {r['answers_by']:<24}{r['accuracy']:>9.3f}{r['balanced_accuracy']:>19.3f}"
        for r in results
    ]
    return "\n".join([head, *lines])


def what_next(folder: str) -> str:
    """The last lines of a training: where its result lies, and what to do with it."""
    quoted = shlex.quote(folder)
    return (
        f"\nSaved in {folder}: the model, its card (README.md), its course ({PLOT}), its recipe ({RECIPE}).\n"
        f"Is it any good?  python evaluate_policy.py --model {quoted}\n"
        f"Decide with it:  from policy import Policy; Policy.load({json.dumps(folder)}).decide(decisions)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Share


def check_push(training: RunArguments) -> str:
    """The repo to push to; raises RecipeError before the training if the upload after it could not work."""
    try:
        user = check_login(training.hub_token)
    except PublishError as error:
        raise RecipeError(f"push_to_hub: {error} Or leave push_to_hub out.") from error
    name = training.hub_model_id or Path(training.output_dir).name
    return name if "/" in name else f"{user}/{name}"


def push(training: RunArguments, repo: str, token: str | None) -> None:
    """Shares the finished folder in one commit; private unless hub_private_repo is false."""
    push_model(training.output_dir, repo, training.hub_private_repo is not False, token=token)


def main(arguments: list[str] | None = None) -> None:
    model, data, training, given = parse_recipe(sys.argv[1:] if arguments is None else arguments)
    first = training.process_index == 0
    with held(training.output_dir, first and not training.dry_run):
        tune(model, data, training, given)


def tune(model: ModelArguments, data: DataArguments, training: TrainingArguments, given: dict) -> None:
    first, wants_push = training.process_index == 0, training.push_to_hub
    check_model(model)
    repo = check_push(training) if wants_push else None
    token = training.take_login()
    with training.main_process_first():
        files = find_csvs(data.data_files, data.data_dir, str(Path(__file__).parent))
        hashes = hashes_of(fingerprint(files))
        splits = load_splits(data, files, training.seed)
        seen = tuned_on(splits["train"])
        build_base_if_tiny(model, splits["train"], training)
        tokenizer = load_tokenizer(model.model_name_or_path)
        labels, prompt = list(splits["train"]["label"]), splits["train"][0]["messages"][:-1]
        commonest = Counter(labels).most_common(1)[0][0]  # as shown, before any shuffle
        sampler = EpochSampler([is_trade(label) for label in labels], data.balance, training.seed)
        if data.candidate_order == "shuffle" and data.dataset_config == "per_decision_ranking":
            sampler.copies = math.ceil(count_steps(training, len(sampler))[1])
            splits["train"] = load_epochs(data, files, training.seed, sampler.copies)
        splits = DatasetDict({name: encode_split(split, tokenizer) for name, split in splits.items()})
        offered = {answer for split in splits.values() for choices in split["answers"] for answer in choices}
        answers = answer_tokens(tokenizer, prompt, sorted(offered))
    ready = preflight(model, data, training, splits, tokenizer, answers, sampler)
    if first:
        print(ready)
    if training.dry_run:
        return
    manifest = describe_run(model, data, training, given, hashes, splits, answers, sampler, seen)
    with training.main_process_first():
        checkpoint = open_run(Path(training.output_dir), manifest, training.overwrite_output_dir and first)
    set_seed(training.seed)  # the adapter is drawn before the Trainer sets its seed
    base, adapter = load_model(model, training)
    trainer = AnswerTrainer(
        model=base,
        args=training,
        train_dataset=splits["train"],
        eval_dataset=thin_out(splits["validation"], data.max_eval_records),
        processing_class=tokenizer,
        peft_config=adapter,
        sampler=sampler,
        answers=answers,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    scored = {name: trainer.score(splits[name]) for name in ("validation", "test") if name in splits}
    results = report(trainer, splits, scored, commonest)
    calibration = calibrate_on(splits["validation"], scored["validation"])
    save(trainer, manifest, results, calibration, SFT_PANELS, model_card)
    if first:
        print(table(results))
        print(what_next(training.output_dir))
    if first and wants_push:
        push(training, repo, token)


def run(command: Callable[[], None]) -> None:
    """Runs a training from the command line: an error is one line and a bad exit."""
    start_logging()
    try:
        command()
    except (
        RecipeError, TrainingStopped, CandidatesError, PolicyError, PublishError, atomic.FolderBusy, yaml.YAMLError
    ) as error:  # fmt: skip
        sys.exit(f"error: {in_words_of_the_command_line(error)}")
    except torch.OutOfMemoryError as error:
        sys.exit(
            "error: the GPU's memory is full: give --per_device_train_batch_size 1, with gradient_accumulation_steps "
            f"as many as a step has records, --gradient_checkpointing true, or --quantization int4. ({error})"
        )
    except Exception as error:
        if disk_trouble(error):
            sys.exit(f"error: {disk_trouble(error)}")
        raise


if __name__ == "__main__":
    run(main)
