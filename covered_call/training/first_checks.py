"""What can be known of a training in two seconds: from its command line, recipe, folders, manifests and the Hub.

The commands ask it before they import torch and TRL, which takes ten seconds, and long before they read data.
"""

import argparse
import datetime
import http.client
import logging
import os
import ssl
import threading
import types
import typing
import urllib.error
import urllib.request
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from covered_call.candidates.data_options import flags
from covered_call.candidates.options import PreferenceConfig
from covered_call.candidates.source import HOME
from covered_call.language_model.manifest import for_task, read_manifest
from covered_call.training.keys import RANKING, DataArguments, ModelArguments, PairArguments, StartArguments
from covered_call.training.runs import RecipeError, begun_run, refuse_finished
from covered_call.training.sources import check_files

logger = logging.getLogger(__name__)

RECIPES = HOME / "configs"
SFT_RECIPES, DPO_RECIPES = ("per_candidate", "ranking", "mixed", "tiny_mixed", "tiny"), ("preference", "tiny_dpo")
HELP = ("-h", "--help", "--help_all", "--help-all")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DEADLINE = 3.0  # seconds that the Hub has to answer


class Stage(NamedTuple):
    """A training: the names of its recipes, and the dataclasses of its model's and its data's keys."""

    recipes: tuple[str, ...]
    keys: tuple[type[Any], type[Any]]


STAGES = {
    "sft": Stage(SFT_RECIPES, (ModelArguments, DataArguments)),
    "dpo": Stage(DPO_RECIPES, (StartArguments, PairArguments)),
}


@dataclass
class RunKeys:
    """Of the trainer's keys, those that are looked at here."""

    output_dir: str | None = None
    dry_run: bool = False
    overwrite_output_dir: bool = False
    push_to_hub: bool = False
    hub_token: str | None = None


def check(stage: str, command: "Command") -> None:
    """Looks for what would end a training, in order of what it costs to see.

    Raises:
        RecipeError, CandidatesError, PolicyError: if it cannot work; the message says why.
    """
    if command.asks_help:
        return
    model, data, run = (read_keys(part, command) for part in (*STAGES[stage].keys, RunKeys))
    if run.output_dir:
        check_output(Path(str(run.output_dir)), run.overwrite_output_dir, run.dry_run)
    data.backtest()
    check_files(data.sources)
    if isinstance(data, PairArguments):
        PreferenceConfig(name="preference", **data.pairing()).check()
    start = read_start(str(model.adapter)) if getattr(model, "adapter", None) else None
    if start:
        check_base(start["base_model"], not run.dry_run, start["base_revision"])
    elif not model.tiny_base_steps:
        check_base(str(model.model_name_or_path), not run.dry_run)
    if run.push_to_hub:
        check_sharing(run.hub_token)


# ---------------------------------------------------------------------------------------------------------------------
# Recipe and command line


class Command(NamedTuple):
    """What was typed.

    Args:
        path: of the recipe, None where help is asked for.
        recipe: its keys; it is read once, here.
        words: the rest of the command line, which goes before it.
    """

    path: str | None
    recipe: dict
    words: list[str]

    @property
    def asks_help(self) -> bool:
        return self.path is None


def read_command(arguments: list[str], names: tuple[str, ...]) -> Command:
    """A command line of which --config NAME is one of ``names``, or the path of a recipe.

    Raises:
        RecipeError: if there is no such recipe, or it cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, words = parser.parse_known_args(arguments)
    if set(HELP) & set(words):
        return Command(None, {}, words)
    if known.config is None:
        raise RecipeError(f"Say which recipe: --config NAME, one of {', '.join(names)}, or a path.")
    path = RECIPES / f"{known.config}.yaml" if known.config in names else Path(known.config)
    if not path.is_file():
        raise RecipeError(f"--config {known.config}: neither a file nor one of {', '.join(names)}.")
    return Command(str(path), read_recipe(path), words)


def read_recipe(path: Path) -> dict:
    """The keys of a recipe, dates as text."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} holds no keys: a recipe is a YAML file of `key: value` lines.")
    return {key: str(value) if isinstance(value, datetime.date) else value for key, value in recipe.items()}


class KeyParser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise RecipeError(f"{message}.")


def read_keys(part: type[Any], command: Command) -> Any:
    """A dataclass of keys, from the recipe and, before it, the command line."""
    parser = KeyParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    own = [key for key in fields(part) if key.init]
    for key in own:
        parser.add_argument(*flags(key.name), **reading(key.type))
    parser.set_defaults(**{key.name: command.recipe[key.name] for key in own if key.name in command.recipe})
    found = vars(parser.parse_known_args(command.words)[0])
    for key in own:
        if key.name not in found and key.default is MISSING:
            raise RecipeError(f"{key.name} is missing: give it in {command.path}, or on the command line.")
    return part(**found)


def reading(kind) -> dict:
    """How argparse reads a value of this type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(one for one in typing.get_args(kind) if one is not types.NoneType)
    if typing.get_origin(kind) is list:
        return {"nargs": "+", "type": typing.get_args(kind)[0]}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": is_on}
    return {"type": kind if kind in (int, float) else str}


def is_on(word: str) -> bool:
    return word.lower() in ("true", "t", "yes", "y", "1")


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def check_output(folder: Path, overwrite: bool, dry_run: bool) -> None:
    """Raises RecipeError if a run could not be written here, or has been already."""
    begun = begun_run(folder)
    if begun and not (overwrite or dry_run):
        refuse_finished(folder, begun)
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(standing, os.W_OK):
        raise RecipeError(f"{standing} cannot be written: give another output_dir.")


def read_start(folder: str) -> dict:
    """The manifest of the fine-tune that a preference training starts from.

    Raises:
        RecipeError: if it does not answer rankings with an adapter.
        PolicyError: if it has not finished, its prompts are not today's, or a file is not as it was saved.
    """
    start = read_manifest(folder)
    tasks = start.get("tasks") or [start["task"]]
    if RANKING not in tasks or not start["adapter"]:
        raise RecipeError(
            f"{folder} is a fine-tune of {' and '.join(tasks)}{'' if start['adapter'] else ', of all weights'}: "
            f"pairs are answers to {RANKING}, and only an adapter can be gone on with. Make one with covered-call "
            "train --config ranking, or start from a base: model_name_or_path."
        )
    if start.get("explains"):
        raise RecipeError(
            f"{folder} explains its answers, and pairs are of answers alone, which would end where it goes on. Start "
            "from a fine-tune without explain."
        )
    return for_task(folder, start, RANKING)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


def check_base(name: str, weights: bool = False, revision: str | None = None) -> None:
    """Raises RecipeError if a model is not here, and cannot be downloaded.

    Args:
        weights: whether they will be loaded, or only configuration and tokenizer.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise RecipeError(f"{name} holds no config.json: give the folder of a model, or its name on the Hub.")
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise RecipeError(f"There is no folder {name}, and no model on the Hub can be called so.") from None
    told_to_be_offline = constants.HF_HUB_OFFLINE
    if is_reachable():
        return
    needed = (("config.json",), WEIGHTS) if weights else (("config.json",),)
    for names in needed:
        if not any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in names):
            raise no_model(name)
    if not told_to_be_offline:
        logger.warning("%s does not answer: going on with what is in the cache.", constants.ENDPOINT)


def no_model(name: str) -> RecipeError:
    return RecipeError(
        f"There is no model {name} here, nor can it be downloaded. Where there is a network, run: hf download {name}; "
        "or give a folder with the weights: --model_name_or_path FOLDER."
    )


def check_sharing(token: str | None) -> None:
    """Raises RecipeError if nothing could be shared after the training; whether the token is good, the Hub says."""
    if not is_reachable():
        raise RecipeError("push_to_hub: the Hub does not answer, or HF_HUB_OFFLINE is set. Leave push_to_hub out.")
    if not (token or get_token()):
        raise RecipeError("push_to_hub: you are not logged in. Run: hf auth login; or leave push_to_hub out.")


def is_reachable() -> bool:
    """Whether the Hub answers; if not, this process is offline from here on, and does not ask again and again."""
    if constants.HF_HUB_OFFLINE:
        return False
    if answers(constants.ENDPOINT):
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    return False


def answers(address: str) -> bool:
    """Whether a server says anything in time. In a thread, for looking its name up takes as long as it takes."""
    found = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=DEADLINE).close()
            found.append(True)
        except urllib.error.HTTPError:
            found.append(True)
        except (OSError, ValueError, http.client.HTTPException) as error:
            # A certificate that Python does not know is an answer too; the Hub's client brings its own.
            found.append(isinstance(getattr(error, "reason", error), ssl.SSLError))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    return found == [True]
