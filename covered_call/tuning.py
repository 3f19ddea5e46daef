"""The verbs train and prefer: check, tune, and share what was tuned if that is asked for."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

from covered_call import atomic
from covered_call.candidates.options import PreferenceConfig, names_of
from covered_call.candidates.schema import CandidatesError
from covered_call.command_line import as_typed, disk_trouble, start_logging
from covered_call.language_model.manifest import PolicyError
from covered_call.publishing.hub import PublishError, check_login
from covered_call.training import first_checks
from covered_call.training.runs import RecipeError, TrainingStopped, held

PLAIN = (RecipeError, TrainingStopped, CandidatesError, PolicyError, PublishError, atomic.FolderBusy)


def train(arguments: list[str]) -> None:
    in_one_line("sft", arguments)


def prefer(arguments: list[str]) -> None:
    in_one_line("dpo", arguments)


def in_one_line(stage: str, arguments: list[str]) -> None:
    """Runs a stage of training; an error is one line, in the words of the command line, and a bad exit."""
    start_logging()
    try:
        run(stage, arguments)
    except Exception as error:
        said = trouble(error)
        if said is None:
            raise
        sys.exit(f"error: {said}")


def trouble(error: Exception) -> str | None:
    """What an error is to its user; None for a bug, whose traceback is worth more."""
    if isinstance(error, PLAIN):
        return as_typed(error, Namespace(**dict.fromkeys(names_of(PreferenceConfig))))
    torch = sys.modules.get("torch")  # not imported where the first checks have found something
    if torch and isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full: give --per_device_train_batch_size 1, with gradient_accumulation_steps as many "
            f"as a step has records, --gradient_checkpointing true, or --quantization int4. ({error})"
        )
    return disk_trouble(error)


def run(stage: str, arguments: list[str]) -> None:
    """A stage of training, "sft" or "dpo", and the push after it; what goes wrong is raised."""
    command = first_checks.read_command(arguments, first_checks.STAGES[stage].recipes)
    first_checks.check(stage, command)  # before torch and TRL are imported, which takes ten seconds
    tune_and_share(stage, command)


def tune_and_share(stage: str, command: first_checks.Command) -> None:
    from covered_call.training.recipe import parse_command

    module = importlib.import_module(f"covered_call.training.{stage}")
    model, data, training, given = parse_command(command, module.STAGE)
    repo = check_push(training) if training.push_to_hub else None
    token = training.take_login()
    with held(training.output_dir, training.is_first and not training.dry_run):
        module.tune(model, data, training, given)
    if repo and training.is_first and not training.dry_run:
        share(training, repo, token)


def check_push(training) -> str:
    """The repo to push to; raises RecipeError before the training if the upload after it could not work."""
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
