"""A training rehearsed before it costs anything: its preflight, and a few steps at tiny size on the CPU."""

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from covered_call.language_model.loading import load_tokenizer
from covered_call.language_model.manifest import PolicyError
from covered_call.language_model.tiny_phi3 import random_phi3, train_tokenizer
from covered_call.training import dpo, first_checks, sft
from covered_call.training.examples import load_splits
from covered_call.training.first_checks import Command, check_base, read_keys
from covered_call.training.keys import RANKING, DataArguments
from covered_call.training.recipe import parse_command
from covered_call.training.runs import RecipeError
from covered_call.training.trainers import ScoringTrainer

STEPS = 20
CONTEXT = 4096  # tokens that the tiny model sees, at least
READ = 2_000  # prompts that a tokenizer is learnt from, where the recipe's is not here
STAGES = {"sft": sft, "dpo": dpo}
# What of a recipe needs a GPU, or is of no use to a few steps; the rest is as it is.
SMALL = {
    "max_steps": STEPS, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "report_to": "none",
    "load_best_model_at_end": False, "use_cpu": True, "bf16": False, "fp16": False, "optim": "adamw_torch",
    "gradient_checkpointing": False, "disable_tqdm": True, "tiny_base_steps": 0, "dry_run": False,
    "push_to_hub": False,
}  # fmt: skip


def preflight_of(stage: str, command: Command) -> str:
    """What a dry run of this command prints; it raises what that raises."""
    model, data, training, given = parse_command(
        command._replace(words=[*command.words, "--dry_run"]), STAGES[stage].STAGE
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        STAGES[stage].tune(model, data, training, given)
    return printed.getvalue()


def rehearse(stage: str, command: Command, tuned: str | None = None) -> str:
    """Trains a tiny random Phi-3 for STEPS as the recipe says, quantised and adapted like the real one; how it went.

    Args:
        tuned: a folder with the tokenizer, if there is one: else that of the recipe's model, if that is here.

    Raises:
        RecipeError, CandidatesError, PolicyError, TrainingStopped: as the training itself would.
    """
    with tempfile.TemporaryDirectory(prefix="covered_call_rehearsal_") as scratch:
        asked = {**SMALL, "model_name_or_path": f"{scratch}/base", "output_dir": f"{scratch}/run", "adapter": ""}
        words = [*command.words, *(word for key, value in asked.items() for word in typed(stage, key, value))]
        model, data, training, _ = parse_command(command._replace(words=words), STAGES[stage].STAGE)
        tokenizer, whose = find_tokenizer(tuned or named_model(stage, command), data)
        if whose:  # a record has another number of tokens in it
            training.max_length = CONTEXT
        build_base(tokenizer, max(CONTEXT, training.max_length or 0), training.seed, Path(model.model_name_or_path))
        trainer: Any = trainer_of(stage, model, data, training)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        size = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"{len(losses)} steps in {model.quantization} of a random Phi-3, {size / 1e6:.1f} million parameters{whose}: "
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}, all finite"
    )


def typed(stage: str, key: str, value) -> list[str]:
    """A key as it is typed; the adapter to start from is one of a preference training alone."""
    return (
        []
        if key == "adapter" and stage == "sft"
        else [f"--{key}", str(value).lower() if value in (True, False) else str(value)]
    )


def trainer_of(stage: str, model, data, training) -> ScoringTrainer:
    """The trainer as the command makes it, its preflight passed."""
    if stage == "sft":
        examples = sft.load(model, data, training)
        sft.preflight(model, data, training, examples)
        return sft.make_trainer(model, data, training, examples)
    pairs = dpo.load(model, data, training, None)
    dpo.preflight(model, data, training, pairs)
    return dpo.make_trainer(model, data, training, pairs, None)


# ---------------------------------------------------------------------------------------------------------------------
# The tiny model


def named_model(stage: str, command: Command) -> str:
    """What a command starts from, typed or in its recipe: an adapter, if it names one, else a model."""
    keys = read_keys(first_checks.STAGES[stage].keys[0], command)
    return getattr(keys, "adapter", None) or keys.model_name_or_path


def find_tokenizer(name: str, data: DataArguments) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer of a model that is here, or one learnt from the prompts; of that, what is to be said."""
    try:
        if not (Path(name) / "tokenizer_config.json").is_file():
            check_base(name)
        return load_tokenizer(name), ""
    except (RecipeError, PolicyError):
        pass
    task = RANKING if data.dataset_config == "preference" else data.dataset_config
    train = load_splits(data.backtest(), task, 0)["train"]
    chats = train.select(range(min(len(train), READ)))["messages"]
    return train_tokenizer(message["content"] for chat in chats for message in chat), ", its tokens learnt here"


def build_base(tokenizer: Any, context: int, seed: int, folder: Path) -> None:
    model: Any = random_phi3(tokenizer, seed)
    model.config.max_position_embeddings = model.config.original_max_position_embeddings = context
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
