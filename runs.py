"""The folder of a run: what it was begun with, where it goes on from, and whether its files are those it saved.

Neither torch nor transformers is imported here, so that a folder can be judged in a moment.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from types import NoneType

import atomic
from covered_call_candidates import PROMPT_VERSION

logger = logging.getLogger("runs")

MANIFEST, CALIBRATION, RECIPE, CHECKPOINT = "manifest.json", "calibration.json", "recipe.yaml", "checkpoint-"
# What changes nothing that comes out of a run: it may go on with another.
NOT_OF_THE_RUN = (
    "dry_run", "overwrite_output_dir", "output_dir", "batch_tokens", "gradient_checkpointing", "model_init_kwargs",
)  # fmt: skip
SHARING = ("hub_", "push_to_hub")  # how the keys begin that say where a run is shared, and by whom: a token is one
QUANTIZATIONS = ("int4", "int8", "none")
TEMPERATURES = 0.05, 20.0  # between which a calibration looks


class RecipeError(ValueError):
    """The recipe cannot run as it is; the message says what to change."""


class PolicyError(ValueError):
    """A model, its tokenizer or its folder cannot be used as it is; the message says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Begin and go on


def held(folder: str | os.PathLike, by_this: bool) -> AbstractContextManager:
    """Holds the folder for this run, if this process is the one of the run that is to; see atomic.locked."""
    return atomic.locked(Path(folder).resolve()) if by_this else contextlib.nullcontext()


def of_the_run(keys: dict) -> dict:
    """The keys that decide what comes out of a run, on every level: these alone are written, compared and shown."""
    return {
        key: of_the_run(value) if isinstance(value, dict) else value
        for key, value in keys.items()
        if key not in NOT_OF_THE_RUN and not key.startswith(SHARING)
    }


def open_run(folder: Path, manifest: dict, overwrite: bool) -> Path | None:
    """Prepares the output folder, and returns the checkpoint to go on from, if this very run was begun there.

    Raises:
        RecipeError: if the folder holds a finished run, another run, or something else.
    """
    folder = Path(folder).resolve()  # of a link, what it leads to is deleted and made again
    begun = begun_run(folder)
    if begun and overwrite:
        atomic.delete_folder(folder)
        begun = None
    if begun is None:
        atomic.unfinished(folder)  # called for what it removes: the rest of a folder that was being deleted
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(folder / MANIFEST, json.dumps(manifest, indent=2))
        return None
    refuse_finished(folder, begun)
    then, now = flat(begun), flat(manifest)
    changes = [
        f"{key}: {then.get(key)!r}, now {now.get(key)!r}" for key in now | then if then.get(key) != now.get(key)
    ]
    if changes:
        raise RecipeError(
            f"{folder} holds another run that was begun ({'; '.join(changes)}). Give the same command to go on with "
            "it, another output_dir, or --overwrite_output_dir to delete it first."
        )
    return last_checkpoint(folder)


def refuse_finished(folder: Path, begun: dict) -> None:
    if begun["finished"]:
        raise RecipeError(
            f"{folder} holds a run that finished on {begun['finished']}. Give another output_dir, or "
            "--overwrite_output_dir to delete it first."
        )


def begun_run(folder: Path) -> dict | None:
    """The manifest of the run in a folder, None if there is nothing; RecipeError if there is something else.

    Nothing is also what a run left that was killed before its manifest was whole.
    """
    if not folder.exists() or folder.is_dir() and all(is_left_over(path) for path in folder.iterdir()):
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and {"prompt_version", "finished"} <= manifest.keys():
            return manifest
    except (OSError, ValueError):
        pass  # another program's file, or none
    raise RecipeError(f"{folder} is no run of train_sft.py and not empty: give another output_dir.")


def is_left_over(path: Path) -> bool:
    """Whether atomic.write was killed while it made a manifest here."""
    return re.fullmatch(rf"\.{re.escape(MANIFEST)}\.\d+\.tmp", path.name) is not None


def flat(manifest: dict) -> dict:
    """What decides what comes out of a run, one level of nesting written into the keys."""
    manifest = of_the_run(manifest)
    parts = {key: value for key, value in manifest.items() if not isinstance(value, dict)}
    for key, value in manifest.items():
        if isinstance(value, dict):
            parts |= {f"{key}.{name}": part for name, part in value.items()}
    return json.loads(json.dumps(parts))


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written whole; its state file is the last thing written."""
    found = [path for path in folder.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not written to its end: deleting it.", path)
            shutil.rmtree(path)
            continue
        logger.warning("Going on from %s.", path)
        return path
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What a finished run saved

# What a manifest must say before its model can be used, with its type; a dot is a level of nesting.
KEYS = {
    "task": str,
    "base_model": str,
    "base_revision": (str, NoneType),
    "quantization": str,
    "adapter": bool,
    "recipe": dict,
    "splits.train.to": str,
    "tuned_on.underlyings": list,
    "tuned_on.exit_styles": list,
    "tuned_on.numbers": dict,
}


def hash_of(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def read_manifest(folder: str | os.PathLike) -> dict:
    """What a tuned model was made from.

    Raises:
        PolicyError: if the run has not finished, its prompts are not today's, or a file is not as it was saved.
    """
    if not Path(folder).is_dir():
        raise PolicyError(f"There is no folder {folder}: give one that train_sft.py saved.")
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise PolicyError(f"{folder} holds no {MANIFEST}: it is no folder that train_sft.py saved.")
    manifest = read_json(path)
    if not {"finished", "prompt_version"} <= manifest.keys():
        raise PolicyError(f"{path} is none that train_sft.py saved: it does not say whether a run has finished.")
    if not manifest["finished"]:
        raise PolicyError(f"The run in {folder} has not finished: start it again with the same command.")
    if manifest["prompt_version"] != PROMPT_VERSION:
        raise PolicyError(
            f"{folder} was tuned on prompts of version {manifest['prompt_version']}, and covered_call_candidates.py "
            f"now renders version {PROMPT_VERSION}. Tune it again, or go back to the code it was tuned with."
        )
    if "files" not in manifest:
        raise PolicyError(f"{folder} was saved by an older version, without hashes of its files: tune it again.")
    check_keys(path, manifest)
    check_files(folder, manifest["files"])
    return manifest


def read_json(path: Path) -> dict:
    """The object in a JSON file; PolicyError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path} cannot be read: {error}. Copy it again, or tune the model again.") from error
    if not isinstance(found, dict):
        raise PolicyError(f"{path} holds no JSON object. Copy it again, or tune the model again.")
    return found


def check_keys(path: Path, manifest: dict) -> None:
    """Raises PolicyError if the manifest lacks what deciding needs, or says it in another form."""
    for key, kind in {**KEYS, "files": dict}.items():
        value = functools.reduce(
            lambda level, name: level.get(name) if isinstance(level, dict) else None, key.split("."), manifest
        )
        if not isinstance(value, kind):
            raise PolicyError(f"{path}: {key} is {value!r}. Copy it again, or tune the model again.")


def check_files(folder: str | os.PathLike, files: dict[str, str]) -> None:
    """Raises PolicyError if a file is not the one whose hash the manifest keeps."""
    for name, digest in files.items():
        path = Path(folder) / Path(name).name
        if not path.is_file():
            raise PolicyError(f"{folder} lacks {name}, which its {MANIFEST} names. Copy it again, or tune it again.")
        if hash_of(path) != digest:
            raise PolicyError(
                f"{path} is not the file that was saved: its content has changed. Copy it again, or tune the model "
                "again."
            )


def read_temperature(folder: str | os.PathLike) -> float:
    """What the calibration beside a model says, 1 if there is none.

    A hash does not watch over it, for it is fitted anew long after the manifest, and the two could not be replaced in
    one step. Its one number is checked instead.
    """
    path = Path(folder) / CALIBRATION
    if not path.exists():
        return 1.0
    found = read_json(path).get("temperature")
    if not is_temperature(found):
        raise PolicyError(
            f"{path}: the temperature is {found!r}, and a calibration gives {TEMPERATURES[0]} to {TEMPERATURES[1]}. "
            "Delete the file, or calibrate the model again."
        )
    return found


def is_temperature(value: object) -> bool:
    low, high = TEMPERATURES
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high
