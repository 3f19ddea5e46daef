"""What a finished run saved: its manifest, the hashes of its files, its calibration.

Neither torch nor transformers is imported here, so that a folder can be judged in a moment.
"""

import functools
import hashlib
import json
import math
import os
from pathlib import Path
from types import NoneType
from typing import Any

from covered_call.candidates.columns import Grounds
from covered_call.candidates.explanations import CLAUSES
from covered_call.candidates.prompts import version_with

MANIFEST, CALIBRATION, RECIPE, CHECKPOINT = "manifest.json", "calibration.json", "recipe.yaml", "checkpoint-"
QUANTIZATIONS = ("int4", "int8", "none")
TEMPERATURES = 0.05, 20.0  # between which a calibration looks


class PolicyError(ValueError):
    """A model, its tokenizer or its folder cannot be used as it is; the message says why and what to do."""


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
        raise PolicyError(f"There is no folder {folder}: give one that covered-call train saved.")
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise PolicyError(f"{folder} holds no {MANIFEST}: it is no folder that covered-call train saved.")
    manifest = read_json(path)
    if not {"finished", "prompt_version"} <= manifest.keys():
        raise PolicyError(f"{path} is none that covered-call train saved: it does not say whether a run has finished.")
    if not manifest["finished"]:
        raise PolicyError(f"The run in {folder} has not finished: start it again with the same command.")
    rendered = version_with(context_in(path, manifest))
    if manifest["prompt_version"] != rendered:
        raise PolicyError(
            f"{folder} was tuned on prompts of version {manifest['prompt_version']}, and this code "
            f"now renders version {rendered}. Tune it again, or go back to the code it was tuned with."
        )
    if "files" not in manifest:
        raise PolicyError(f"{folder} was saved by an older version, without hashes of its files: tune it again.")
    check_keys(path, manifest)
    grounds_in(path, manifest)
    check_files(folder, manifest["files"])
    return manifest


def for_task(folder: str | os.PathLike, manifest: dict, task: str | None) -> dict:
    """The manifest of a model as that of one of its tasks, by default the first.

    Raises:
        PolicyError: if it was not tuned on the task.
    """
    tasks = manifest.get("tasks") or [manifest["task"]]
    if task is None or task == manifest["task"]:
        return manifest
    if task not in tasks:
        raise PolicyError(f"task={task!r}: {folder} was tuned on {' and '.join(tasks)}. Give one of them.")
    seen = next((source["tuned_on"] for source in manifest.get("mix") or [] if source["source"] == task), None)
    return {**manifest, "task": task, "tuned_on": seen or manifest["tuned_on"]}


def context_in(path: Path, manifest: dict) -> list[str]:
    """The names of the market's context that the prompts told; none of a model that was tuned without."""
    names = manifest.get("context", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise PolicyError(f"{path}: context is {names!r:.100}. Copy it again, or tune the model again.")
    return names


def grounds_in(path: Path, manifest: dict) -> Grounds | None:
    """What a model's explanations rest on; None of one that gives answers alone."""
    found = manifest.get("explains")
    if found is None:
        return None
    try:
        cuts = {name: [float(cut) for cut in found["cuts"][name]] for name in ("trade", "other")}
        grounds = Grounds(found["formula"], cuts)
        if grounds.formula in CLAUSES and all(len(ends) == 2 for ends in cuts.values()):
            return grounds
    except (KeyError, TypeError, ValueError):
        pass
    raise PolicyError(f"{path}: explains is {found!r:.100}. Copy it again, or tune the model again.")


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


def read_temperature(folder: str | os.PathLike, task: str | None = None) -> float:
    """What the calibration beside a model says of a task, 1 if there is none.

    A hash does not watch over it, for it is fitted anew long after the manifest, and the two could not be replaced in
    one step. Its one number is checked instead.
    """
    path = Path(folder) / CALIBRATION
    if not path.exists():
        return 1.0
    calibration = read_json(path)
    of_task = (calibration.get("tasks") or {}).get(task, calibration)
    found: Any = of_task.get("temperature") if isinstance(of_task, dict) else None
    if not is_temperature(found):
        raise PolicyError(
            f"{path}: the temperature is {found!r}, and a calibration gives {TEMPERATURES[0]} to {TEMPERATURES[1]}. "
            "Delete the file, or calibrate the model again."
        )
    return found


def is_temperature(value: Any) -> bool:
    low, high = TEMPERATURES
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high
