"""What can be known of a training in two seconds: from its command line, recipe, folders, manifests and the Hub.

The trainings call it before they import torch and TRL, which takes ten seconds, and long before they read data.
"""

import argparse
import datetime
import http.client
import logging
import os
import ssl
import sys
import threading
import urllib.request
from pathlib import Path

import yaml
from huggingface_hub import constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from covered_call.candidates.builder import find_csvs
from covered_call.candidates.options import CoveredCallCandidatesConfig, PreferenceConfig, names_of
from covered_call.candidates.schema import CandidatesError
from covered_call.candidates.source import HOME
from covered_call.command_line import as_typed, disk_trouble, quiet
from covered_call.data_options import DATA_OPTIONS, add_data_options, flags
from covered_call.language_model.manifest import QUANTIZATIONS, PolicyError, read_manifest
from covered_call.training.runs import RecipeError, begun_run, refuse_finished

logger = logging.getLogger(__name__)

RECIPES = HOME / "configs"
SFT_RECIPES, DPO_RECIPES = ("per_candidate", "ranking", "tiny"), ("preference", "tiny_dpo")
BALANCES = ("none", "downsample", "weight")
RANKING = "per_decision_ranking"
HELP = ("-h", "--help", "--help_all", "--help-all")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DEADLINE = 3.0  # seconds that the Hub has to answer


def check(recipes: tuple[str, ...], arguments: list[str]) -> None:
    """Ends a training that cannot work with one line and a bad exit."""
    if set(HELP) & set(arguments):
        return
    try:
        asked = read_keys(arguments, recipes)
        check_model_keys(asked)
        check_data_keys(asked)
        if recipes == DPO_RECIPES:
            check_start_keys(asked)
            check_pair_keys(asked)
        if asked.output_dir:
            check_output(Path(asked.output_dir), asked.overwrite_output_dir, asked.dry_run)
        check_data(asked)
        start = read_start(asked.adapter) if asked.adapter and recipes == DPO_RECIPES else None
        if start:
            check_base(start["base_model"], not asked.dry_run, start["base_revision"])
        elif asked.model_name_or_path and not asked.tiny_base_steps:
            check_base(asked.model_name_or_path, not asked.dry_run)
        if asked.push_to_hub:
            check_sharing(asked.hub_token)
    except (RecipeError, PolicyError, CandidatesError) as error:
        sys.exit(f"error: {in_words_of_the_command_line(error)}")
    except OSError as error:
        sys.exit(f"error: {disk_trouble(error) or error}")


def in_words_of_the_command_line(error: Exception) -> str:
    """A message that speaks of load_candidates' options, as they are typed."""
    return as_typed(error, argparse.Namespace(**dict.fromkeys(names_of(PreferenceConfig))))


# ---------------------------------------------------------------------------------------------------------------------
# Recipe and command line


def with_recipe_path(arguments: list[str], names: tuple[str, ...]) -> list[str]:
    """The command line with --config first and its NAME, one of ``names`` or a path, as the path of a file."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(arguments)
    if set(HELP) & set(rest):
        return rest
    if known.config is None:
        raise RecipeError(f"Say which recipe: --config NAME, one of {', '.join(names)}, or a path.")
    path = RECIPES / f"{known.config}.yaml" if known.config in names else Path(known.config)
    if path.is_file():
        return ["--config", str(path), *rest]
    raise RecipeError(f"--config {known.config}: neither a file nor one of {', '.join(names)}.")


def read_recipe(path: str) -> dict:
    """The keys of a recipe, dates as text."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} holds no keys: a recipe is a YAML file of `key: value` lines.")
    return {key: str(value) if isinstance(value, datetime.date) else value for key, value in recipe.items()}


def read_keys(arguments: list[str], recipes: tuple[str, ...]) -> argparse.Namespace:
    """The keys that are checked here, from the recipe and, before it, the command line; None where neither says."""
    _, path, *words = with_recipe_path(arguments, recipes)
    usage = f"{Path(sys.argv[0]).name} --config NAME [--KEY VALUE ...]"
    parser = argparse.ArgumentParser(usage=usage, add_help=False, allow_abbrev=False, conflict_handler="resolve")
    add_data_options(parser)
    parser.add_argument("--splits", nargs="+", type=float)
    for key in ("output_dir", "model_name_or_path", "adapter", "quantization", "balance", "hub_token"):
        parser.add_argument(*flags(key))
    for key in ("lora_r", "tiny_base_steps"):
        parser.add_argument(*flags(key), type=int)
    for key in ("dry_run", "overwrite_output_dir", "push_to_hub", "purge"):
        parser.add_argument(*flags(key), nargs="?", const=True, type=is_on)
    given = vars(parser.parse_known_args(words)[0])
    recipe = read_recipe(path)
    keys = {key: recipe.get(key) if value is None else value for key, value in given.items()}
    names = ("output_dir", "model_name_or_path", "adapter", "hub_token")
    return argparse.Namespace(**keys | {key: str(keys[key]) for key in names if keys[key] is not None})


def is_on(word: str) -> bool:
    return word.lower() in ("true", "t", "yes", "y", "1")


def check_model_keys(model) -> None:
    """Raises RecipeError for keys of a model that exclude each other; of a recipe in part, None is any value."""
    if model.quantization not in (None, *QUANTIZATIONS):
        raise RecipeError(f"quantization: {model.quantization!r} is none of {', '.join(QUANTIZATIONS)}.")
    if model.lora_r == 0 and model.quantization not in (None, "none"):
        raise RecipeError(f"lora_r: 0 trains all weights, which {model.quantization} freezes: use quantization none.")


def check_start_keys(model) -> None:
    """Raises RecipeError unless the keys of a preference training say what it starts from."""
    if not (model.adapter or model.model_name_or_path):
        raise RecipeError("Nothing to start from: give adapter, a fine-tune's folder, or model_name_or_path.")
    if model.lora_r == 0:
        raise RecipeError("lora_r: 0 trains all weights; here only an adapter is trained. Give it a rank, as 16.")


def check_data_keys(data) -> None:
    if data.balance not in (None, *BALANCES):
        raise RecipeError(f"balance: {data.balance!r} is none of {', '.join(BALANCES)}.")


def check_pair_keys(data) -> None:
    if data.candidate_order == "shuffle":
        raise RecipeError("candidate_order: shuffle is for train_sft.py; pairs are made in one order, instrument.")


# ---------------------------------------------------------------------------------------------------------------------
# Folders and data


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
    if start["task"] != RANKING or not start["adapter"]:
        raise RecipeError(
            f"{folder} is a fine-tune of {start['task']}{'' if start['adapter'] else ', of all weights'}: "
            f"pairs are answers to {RANKING}, and only an adapter can be gone on with. Make one with train_sft.py "
            "--config ranking, or start from a base: model_name_or_path."
        )
    return start


def check_data(asked: argparse.Namespace) -> None:
    """Raises CandidatesError for options that no load takes, and for files that are not there."""
    options = {name: getattr(asked, name) for name in DATA_OPTIONS if getattr(asked, name) is not None}
    if isinstance(asked.splits, list):
        options["splits"] = tuple(asked.splits)
    CoveredCallCandidatesConfig(**options).check()
    with quiet():  # which files are read is said when they are
        find_csvs(asked.data_files, asked.data_dir, str(HOME))


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
