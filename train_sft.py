"""Fine-tunes a language model to answer as the teacher did: LoRA on an int4 or int8 base, loss on the answer only.

    python train_sft.py --config tiny              # CPU, minutes: a tiny Phi-3 it builds itself
    python train_sft.py --config ranking           # Phi-3-mini on a CUDA GPU
    python train_sft.py --config tiny --data_files 'runs/*.csv' --max_steps 50

A recipe is a YAML file in configs/; every key of it can be given on the command line too, which wins.
"""

import argparse
import difflib
import logging
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel
from sklearn.metrics import accuracy_score, recall_score
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import SFTConfig, SFTTrainer, TrlParser

from covered_call_candidates import CandidatesError, admissible_answers, load_candidates
from tiny_phi3 import build_tiny_base

logger = logging.getLogger("train_sft")

RECIPES = Path(__file__).parent / "configs"


class RecipeError(ValueError):
    """The recipe cannot run as it is; the message says what to change."""


@dataclass
class ModelArguments:
    """The model, how it is quantised, and the adapter."""

    model_name_or_path: str = field(metadata={"help": "A Hub name or a local folder."})
    quantization: Literal["int4", "int8", "none"] = field(metadata={"help": "int4 is NF4."})
    tiny_base_steps: int = field(
        default=0,
        metadata={
            "help": "If above 0 and there is no model in model_name_or_path: make a tiny Phi-3 there, trained for so "
            "many steps in full precision on the training split."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank; 0 trains all weights (with quantization none)."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA dropout."})

    def __post_init__(self):
        if self.quantization not in ("int4", "int8", "none"):
            raise RecipeError(f"quantization: {self.quantization!r} is none of int4, int8, none.")
        if self.lora_r == 0 and self.quantization != "none":
            raise RecipeError(
                f"lora_r: 0 trains all weights, which {self.quantization} freezes: use quantization none."
            )


@dataclass
class DataArguments:
    """What load_candidates is called with; what is not given takes its default there."""

    dataset_config: str = field(metadata={"help": "per_candidate or per_decision_ranking."})
    data_files: list[str] | None = field(default=None, metadata={"help": "CSVs or globs; default: data/, or sample."})
    data_dir: str | None = field(default=None, metadata={"help": "A folder of CSVs."})
    underlying: str | None = field(default=None, metadata={"help": "Keep only this one, e.g. BTC."})
    exit_style: str | None = field(default=None, metadata={"help": "Keep only this one, e.g. tp_and_roll."})
    candidate_order: str | None = field(default=None, metadata={"help": "instrument, csv or shuffle (by the seed)."})
    splits: list[float] | None = field(default=None, metadata={"help": "Fractions of train, validation and test."})
    validation_from: str | None = field(default=None, metadata={"help": "A date; goes with test_from."})
    test_from: str | None = field(default=None, metadata={"help": "A date; goes with validation_from."})
    purge: bool | None = field(default=None, metadata={"help": "Leave out decisions that outlive their split."})
    duplicates: str | None = field(default=None, metadata={"help": "error or latest."})
    on_bad_rows: str | None = field(default=None, metadata={"help": "error or skip."})
    max_eval_records: int | None = field(default=None, metadata={"help": "Score at most so many, evenly spaced."})


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's SFTConfig; a GPU is asked for unless use_cpu is set."""

    def __post_init__(self):
        if not self.use_cpu and not torch.cuda.is_available():
            raise RecipeError(
                "This recipe needs a CUDA GPU and there is none here. Run it on a machine with one (6 GB for int4, 8 "
                "GB for int8), or try the whole path on this CPU with --config tiny."
            )
        super().__post_init__()


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, and shows the defaults."""


def parse_recipe(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Recipe and command line as dataclasses; an unknown key in either raises RecipeError with the nearest one."""
    parser = TrlParser(
        (ModelArguments, DataArguments, TrainingArguments),
        description=__doc__,
        usage="train_sft.py --config NAME [--KEY VALUE ...]",
        formatter_class=Help,
        allow_abbrev=False,
    )
    arguments = with_recipe_path(arguments)
    if arguments[0] == "--config":
        check_keys(arguments, [action.dest for action in parser._actions])
    return parser.parse_args_and_config(arguments)


def check_keys(arguments: list[str], known: list[str]) -> None:
    with open(arguments[1], encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    if not isinstance(recipe, dict):
        raise RecipeError(f"{arguments[1]} holds no keys: a recipe is a YAML file of `key: value` lines.")
    given = [word[2:].split("=")[0].replace("-", "_") for word in arguments[2:] if word.startswith("--")]
    for where, keys in ((arguments[1], recipe), ("the command line", given)):
        for key in keys:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
                raise RecipeError(f"{key}, in {where}, is not a key of a recipe. Did you mean {nearest}?")


def with_recipe_path(arguments: list[str]) -> list[str]:
    """The command line with --config first and its NAME as the path of a file."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        return rest
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if known.config is None:
        raise RecipeError(f"Say which recipe: --config NAME, one of {', '.join(names)}, or a path.")
    for path in (Path(known.config), RECIPES / f"{known.config}.yaml"):
        if path.is_file():
            return ["--config", str(path), *rest]
    raise RecipeError(f"--config {known.config}: neither a file nor one of {', '.join(names)}.")


def check_model(model: ModelArguments) -> None:
    """Raises RecipeError at once if there is no such model here, nor a way to download it."""
    if model.tiny_base_steps:
        return
    try:
        AutoConfig.from_pretrained(model.model_name_or_path)
    except OSError as error:
        raise RecipeError(
            f"There is no model {model.model_name_or_path} here, nor can it be downloaded. Where there is a network, "
            f"run: hf download {model.model_name_or_path}; or give a folder with the weights: --model_name_or_path "
            "FOLDER."
        ) from error


def load_splits(data: DataArguments, seed: int) -> DatasetDict:
    """The splits, with an error for one that is too small to train or choose on."""
    options = {name: value for name, value in vars(data).items() if value is not None}
    name, limit = options.pop("dataset_config"), options.pop("max_eval_records", None)
    splits = load_candidates(name, seed=seed, **options)
    for split in ("train", "validation"):
        if split not in splits:
            raise RecipeError(f"The {split} split is empty: give more data, or set splits, or validation_from.")
    for split in set(splits) - {"train"}:
        if limit and len(splits[split]) > limit:
            splits[split] = splits[split].select(range(0, len(splits[split]), math.ceil(len(splits[split]) / limit)))
    return splits


def load_model(
    model: ModelArguments, training: TrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, LoraConfig | None]:
    """The base, quantised as asked, its tokenizer, and the adapter to attach."""
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    quantization = {
        "int4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "none": None,
    }[model.quantization]
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    base = AutoModelForCausalLM.from_pretrained(
        model.model_name_or_path, dtype=dtype, quantization_config=quantization, device_map={"": training.device}
    )
    if not model.lora_r:
        return base, tokenizer, None
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules="all-linear",
    )
    return base, tokenizer, adapter


def prompt_completion(split: Dataset) -> Dataset:
    """Chats as TRL's conversational prompt and completion, so that only the answer carries loss."""
    return split.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns=split.column_names,
        desc="Splitting off the answers",
    )


def check_lengths(split: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
    """Raises RecipeError if a record is longer than max_length: its answer would be cut off, without a word."""
    lengths = [len(chat_ids(tokenizer, messages)) for messages in tqdm(split["messages"], desc="Measuring lengths")]
    longest = max(lengths)
    logger.info("Tokens a record: at most %d; max_length: %s", longest, max_length)
    if max_length is not None and longest > max_length:
        first = next(i for i, length in enumerate(lengths) if length > max_length)
        raise RecipeError(
            f"{split['decision_id'][first]} is {lengths[first]} tokens long and max_length is {max_length}, which "
            f"would cut off its answer. Set max_length to {longest} or more."
        )


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


@torch.inference_mode()
def predict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: Dataset, batch_size: int) -> list[str]:
    """The likeliest admissible answer of each record.

    Answers are scored, not sampled: the sum of the log-probabilities of an answer's tokens through the end of its
    turn, given the prompt.
    """
    model.eval()
    answers, scores = [admissible_answers(row) for row in split], []
    rows = [(row["messages"][:-1], answer) for row, given in zip(split, answers, strict=True) for answer in given]
    for start in tqdm(range(0, len(rows), batch_size), desc="Scoring answers", disable=None):
        scores += score(model, tokenizer, rows[start : start + batch_size])
    scores = iter(scores)
    return [max(given, key=dict(zip(given, scores, strict=False)).get) for given in answers]


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[tuple[list[dict], str]]
) -> list[float]:
    """Log-probability of each (prompt, answer)."""
    prompts = [chat_ids(tokenizer, prompt, add_generation_prompt=True) for prompt, _ in rows]
    chats = [chat_ids(tokenizer, [*prompt, {"role": "assistant", "content": answer}]) for prompt, answer in rows]
    lengths = [len(chat) - len(prompt) for chat, prompt in zip(chats, prompts, strict=True)]
    longest, kept = max(map(len, chats)), max(lengths)
    # Padded on the left, so that all answers end in the last column and only their logits are computed.
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(chat)) + chat for chat in chats])
    seen = torch.tensor([[0] * (longest - len(chat)) + [1] * len(chat) for chat in chats])
    inputs = {"input_ids": ids, "attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    logits = model(**inputs, logits_to_keep=kept + 1).logits[:, :-1].float().cpu()
    by_token = logits.log_softmax(-1).gather(-1, ids[:, -kept:, None]).squeeze(-1)
    answered = torch.tensor([[0] * (kept - length) + [1] * length for length in lengths])
    return (by_token * answered).sum(1).tolist()


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, splits: DatasetDict, batch_size: int) -> None:
    """Prints accuracy and balanced accuracy of the tuned model, of its base, and of always the commonest answer."""
    commonest = Counter(splits["train"]["label"]).most_common(1)[0][0]
    print(f"\n{'split':<12}{'records':>8}  {'answers by':<24}{'accuracy':>9}{'balanced accuracy':>19}")
    for name in (name for name in ("validation", "test") if name in splits):
        labels = splits[name]["label"]
        answers = {"tuned model": predict(model, tokenizer, splits[name], batch_size)}
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                answers["its base, untuned"] = predict(model, tokenizer, splits[name], batch_size)
        answers[f"always {commonest}"] = [commonest] * len(labels)
        for who, given in answers.items():
            accuracy = accuracy_score(labels, given)
            balanced = recall_score(labels, given, labels=sorted(set(labels)), average="macro", zero_division=0)
            print(f"{name:<12}{len(labels):>8}  {who:<24}{accuracy:>9.3f}{balanced:>19.3f}")


def main(arguments: list[str] | None = None) -> None:
    model, data, training = parse_recipe(sys.argv[1:] if arguments is None else arguments)
    check_model(model)
    splits = load_splits(data, training.seed)
    train = prompt_completion(splits["train"])
    if model.tiny_base_steps and not os.path.isdir(model.model_name_or_path):
        model.model_name_or_path = build_tiny_base(
            model.model_name_or_path, train, model.tiny_base_steps, training.seed
        )
    base, tokenizer, adapter = load_model(model, training)
    check_lengths(splits["train"], tokenizer, training.max_length)
    trainer = SFTTrainer(
        model=base, args=training, train_dataset=train, processing_class=tokenizer, peft_config=adapter
    )
    trainer.train()
    trainer.save_model()
    report(trainer.model, tokenizer, splits, training.per_device_eval_batch_size)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        main()
    except (RecipeError, CandidatesError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
