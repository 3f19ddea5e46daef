"""The verbs train and prefer: check, tune, and share what was tuned if that is asked for."""

import importlib
import sys
from pathlib import Path

from covered_call import atomic
from covered_call.candidates.schema import CandidatesError
from covered_call.command_line import disk_trouble, start_logging
from covered_call.language_model.manifest import PolicyError
from covered_call.training import first_checks
from covered_call.training.runs import RecipeError, held


def train(arguments: list[str]) -> None:
    tune_and_share("sft", first_checks.SFT_RECIPES, arguments)


def prefer(arguments: list[str]) -> None:
    tune_and_share("dpo", first_checks.DPO_RECIPES, arguments)


def tune_and_share(stage: str, recipes: tuple[str, ...], arguments: list[str]) -> None:
    """Runs a stage of training; an error is one line and a bad exit."""
    start_logging()
    first_checks.check(recipes, arguments)  # before torch and TRL are imported, which takes ten seconds
    import torch

    from covered_call.publishing.hub import PublishError
    from covered_call.training.trainers import TrainingStopped

    try:
        run(stage, arguments)
    except (RecipeError, TrainingStopped, CandidatesError, PolicyError, PublishError, atomic.FolderBusy) as error:
        sys.exit(f"error: {first_checks.in_words_of_the_command_line(error)}")
    except torch.OutOfMemoryError as error:
        sys.exit(
            "error: the GPU's memory is full: give --per_device_train_batch_size 1, with gradient_accumulation_steps "
            f"as many as a step has records, --gradient_checkpointing true, or --quantization int4. ({error})"
        )
    except Exception as error:
        if disk_trouble(error):
            sys.exit(f"error: {disk_trouble(error)}")
        raise


def run(stage: str, arguments: list[str]) -> None:
    """A stage of training, "sft" or "dpo", and the push after it; what goes wrong is raised."""
    from covered_call.training.recipe import parse_recipe

    module = importlib.import_module(f"covered_call.training.{stage}")
    *recipe, training, given = parse_recipe(arguments, module.STAGE)
    first = training.process_index == 0
    repo = check_push(training) if training.push_to_hub else None
    token = training.take_login()
    with held(training.output_dir, first and not training.dry_run):
        module.tune(*recipe, training, given)
    if first and repo and not training.dry_run:
        share(training, repo, token)


def check_push(training) -> str:
    """The repo to push to; raises RecipeError before the training if the upload after it could not work."""
    from covered_call.publishing.hub import PublishError, check_login

    try:
        user = check_login(training.hub_token)
    except PublishError as error:
        raise RecipeError(f"push_to_hub: {error} Or leave push_to_hub out.") from error
    name = training.hub_model_id or Path(training.output_dir).name
    return name if "/" in name else f"{user}/{name}"


def share(training, repo: str, token: str | None) -> None:
    """Shares the finished folder in one commit; private unless hub_private_repo is false."""
    from covered_call.publishing.model import push_model

    push_model(training.output_dir, repo, training.hub_private_repo is not False, token=token)
