"""The folder of a run: what it was begun with, where it goes on from, and whether its files are those it saved.

Neither torch nor transformers is imported here, so that a folder can be judged in a moment.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from covered_call import atomic
from covered_call.language_model.manifest import CHECKPOINT, MANIFEST

logger = logging.getLogger(__name__)

# What changes nothing that comes out of a run: it may go on with another.
NOT_OF_THE_RUN = (
    "dry_run", "overwrite_output_dir", "output_dir", "batch_tokens", "gradient_checkpointing", "model_init_kwargs",
    "tokens_per_second", "price_per_hour",
)  # fmt: skip
SHARING = ("hub_", "push_to_hub")  # how the keys begin that say where a run is shared, and by whom: a token is one


class RecipeError(ValueError):
    """The recipe cannot run as it is; the message says what to change."""


class TrainingStopped(RuntimeError):
    """Training went wrong in a way that more steps do not mend; the message says how."""


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
    raise RecipeError(f"{folder} is no run of covered-call train and not empty: give another output_dir.")


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
