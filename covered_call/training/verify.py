"""Gates to pass before GPU time is paid for, or where a tuned model has been moved to: each says ok, or what to do.

    covered-call verify runs --config ranking        # the CSVs in runs/, and the recipe that is to be trained on them
    covered-call verify out/ranking                  # a tuned model, moved here perhaps, against its manifest.json
    covered-call verify out/ranking --data_dir runs  # ... and the data it was tuned on
    covered-call verify runs --price_per_hour 2.5 --tokens_per_second 3000 --json gates.json

A folder with a manifest.json is a run: its files, recipe, base and data must be those that the manifest has hashes of.
Any other is one of CSVs. Of both the data are read, counted and looked through for prompts that name their answer, the
preflight of the training is shown, with its tokens and its cost, and 20 steps of the recipe are taken at tiny size on
the CPU. What cannot be told here is unknown, and no failure. The exit status is 1 if a gate fails.
"""

import argparse
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from covered_call import atomic
from covered_call.candidates.builder import Backtest
from covered_call.candidates.columns import Columns
from covered_call.candidates.data_options import FILES, Help, config_of
from covered_call.candidates.leaks import find_leaks, render_splits
from covered_call.candidates.schema import CandidatesError
from covered_call.command_line import plain_errors, start_logging
from covered_call.language_model.manifest import MANIFEST, RECIPE, PolicyError, hash_of, read_manifest
from covered_call.training.first_checks import (
    DPO_RECIPES,
    SFT_RECIPES,
    STAGES,
    Command,
    check_base,
    read_command,
    read_keys,
    read_recipe,
    read_start,
)
from covered_call.training.keys import RANKING, PairArguments
from covered_call.training.runs import RecipeError, TrainingStopped, of_the_run
from covered_call.training.sources import Source

OK, FAIL, UNKNOWN = "ok", "FAIL", "unknown"
MENDED = (RecipeError, CandidatesError, PolicyError, TrainingStopped)
BOTH = (*SFT_RECIPES, *DPO_RECIPES)


class Unknown(Exception):
    """It cannot be told here whether a gate is passed; the message says why, and what would tell."""


class Gate(NamedTuple):
    name: str
    status: str
    said: str


def main(arguments: list[str]) -> int:
    """Prints each gate as it is known; returns 1 if one fails, else 0."""
    start_logging()
    args = parse_arguments(arguments)
    gates, run = [], is_run(Path(args.folder))
    with plain_errors(args, RecipeError, PolicyError):
        for gate in gates_of(Path(args.folder), run, args.config, args.words):
            print(f"{gate.status:<8}{gate.name:<14}{gate.said}", flush=True)
            gates.append(gate)
        if args.json:
            kind = "run" if run else "data"
            found = {"folder": args.folder, "kind": kind, "gates": [gate._asdict() for gate in gates]}
            atomic.write(args.json, json.dumps(found | {"passed": not failed(gates)}, indent=2))
    print(verdict(gates))
    return int(bool(failed(gates)))


def failed(gates: list[Gate]) -> list[str]:
    return [gate.name for gate in gates if gate.status == FAIL]


def verdict(gates: list[Gate]) -> str:
    unknown = [gate.name for gate in gates if gate.status == UNKNOWN]
    open_ones = f" Not known here: {', '.join(unknown)}." if unknown else ""
    if names := failed(gates):
        return f"\nFAILED: {', '.join(names)}.{open_ones}"
    return f"\nPassed: {len(gates) - len(unknown)} gates.{open_ones}"


def is_run(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def gates_of(folder: Path, run: bool, config: str | None, words: list[str]) -> Iterator[Gate]:
    """The gates of a folder, one after another, as they are asked.

    Raises:
        RecipeError: if it is neither a run nor a folder of CSVs, or the recipe cannot be read.
    """
    if run:
        yield from gates_of_run(folder, config, words)
        return
    if not folder.is_dir():
        raise RecipeError(f"There is no folder {folder}: give it before the keys, a run's, or one of CSVs.")
    if not any(folder.glob("*.csv")) and not any(folder.glob("*.csv.gz")):
        raise RecipeError(f"{folder} holds neither a {MANIFEST} nor a CSV: give a run's folder, or one of CSVs.")
    command = read_command(["--config", config or "ranking", *words, "--data_dir", str(folder)], BOTH)
    yield from gates_of_data(command, None)


def ask(name: str, check: Callable[[], str]) -> Gate:
    try:
        return Gate(name, OK, check())
    except Unknown as reason:
        return Gate(name, UNKNOWN, str(reason))
    except MENDED as error:
        return Gate(name, FAIL, str(error))


# ---------------------------------------------------------------------------------------------------------------------
# A run


def gates_of_run(folder: Path, config: str | None, words: list[str]) -> Iterator[Gate]:
    if config:
        raise RecipeError(f"--config {config}: {folder} is a run, and has its own {RECIPE}.")
    files = ask("run folder", lambda: check_run(folder))
    yield files
    if files.status == FAIL:
        return
    manifest = read_manifest(folder)
    command = read_command(["--config", str(folder / RECIPE), *words], BOTH) if (folder / RECIPE).is_file() else None
    yield ask("recipe", lambda: check_recipe(folder, manifest))
    yield ask("base", lambda: check_its_base(folder, manifest))
    yield ask("versions", lambda: check_versions(manifest.get("versions", {})))
    if command:
        yield from gates_of_data(command, manifest, folder)


def check_run(folder: Path) -> str:
    manifest = read_manifest(folder)
    return f"finished {manifest['finished'][:10]}, prompts of today's version, {len(manifest['files'])} files as saved"


def check_recipe(folder: Path, manifest: dict) -> str:
    if not (folder / RECIPE).is_file():
        raise Unknown(f"there is no {RECIPE}, of which the manifest has a copy: copy the whole folder.")
    saved = as_json(of_the_run(read_recipe(folder / RECIPE)))
    then = as_json({key: value for key, value in manifest["recipe"].items() if value is not None})
    differ = sorted(key for key in saved | then if saved.get(key) != then.get(key))
    if differ:
        raise RecipeError(f"{folder / RECIPE} is not what was run, in {', '.join(differ)}: copy it again.")
    return f"{RECIPE} is what was run"


def as_json(recipe: dict) -> dict:
    return json.loads(json.dumps(recipe, default=str))


def check_its_base(folder: Path, manifest: dict) -> str:
    """Whether what an adapter needs is here, and is what it was tuned on."""
    name, revision = manifest["base_model"], manifest["base_revision"]
    if not manifest["adapter"]:
        return "none is needed: this is a whole model"
    from covered_call.language_model.loading import pinned_revision  # torch, which the gates before it do without

    if os.path.isdir(name):
        pinned_revision(folder, manifest)
        return f"{name} has the weights that it was tuned on"
    try:
        check_base(name, weights=True, revision=revision)
    except RecipeError as error:
        raise Unknown(str(error)) from None
    return f"{name} at {str(revision)[:12]} is here, or can be downloaded"


def check_versions(then: dict[str, str]) -> str:
    differ = [] if then else ["libraries that its manifest does not name"]
    for name, version in then.items():
        try:
            now = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            now = "none"
        differ += [f"{name} {version}, here {now}"] if now != version else []
    if differ:
        raise Unknown(f"tuned with {'; '.join(differ)}: scores may differ in their last digits. See requirements.txt.")
    return f"those it was tuned with: {', '.join(f'{name} {version}' for name, version in then.items())}"


# ---------------------------------------------------------------------------------------------------------------------
# Data


def gates_of_data(command: Command, manifest: dict | None, folder: Path | None = None) -> Iterator[Gate]:
    """The gates of the data that a training reads, and of the training.

    Args:
        manifest: of the run in ``folder``, whose data they are to be; None before a training.
    """
    command, stage = located(command), stage_of(command)
    keys = read_keys(STAGES[stage].keys[1], command)
    task, cap = (RANKING, None) if stage == "dpo" else (keys.dataset_config, keys.max_records_per_market)
    try:
        backtest = keys.backtest()
    except CandidatesError as error:
        yield Gate("data", UNKNOWN if manifest else FAIL, f"{error} Say where they are with --data_dir.")
        return
    if manifest:
        yield ask("data files", lambda: check_hashes(data_hashes(backtest, keys.sources), files_then(manifest)))
    read = ask("data", lambda: describe_data(backtest))
    yield read
    if read.status == FAIL:
        return
    yield ask("counts", lambda: check_counts(backtest, stage, task, cap, manifest))
    yield ask("leaks", lambda: check_leaks(backtest, task))
    yield ask("preflight", lambda: check_preflight(stage, command))
    yield ask("dry training", lambda: check_training(stage, command, folder))


def located(command: Command) -> Command:
    """With the files that were typed in the place of the recipe's, which may be of another machine."""
    given = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in command.words}
    if not given & FILES.keys():
        return command
    return command._replace(recipe={key: value for key, value in command.recipe.items() if key not in FILES})


def stage_of(command: Command) -> str:
    """A recipe of preferences has keys that no other has."""
    own = {"adapter", "beta", *PairArguments.__dataclass_fields__} - STAGES["sft"].keys[1].__dataclass_fields__.keys()
    return "dpo" if own & command.recipe.keys() else "sft"


def data_hashes(backtest: Backtest, sources: list[Source]) -> dict[str, str]:
    """Of each file by its name: the CSVs, and those of a mix that are here."""
    mixed = {source.name: hash_of(source.name) for source in sources if source.is_file and Path(source.name).is_file()}
    return {os.path.basename(path): digest for path, digest in {**backtest.hashes, **mixed}.items()}


def files_then(manifest: dict) -> dict[str, str]:
    """The same as a run's manifest has them."""
    files = [source for source in manifest.get("mix") or [] if source["tuned_on"] is None]
    return {**manifest["data_files"], **{os.path.basename(file["source"]): file["sha256"] for file in files}}


def check_hashes(now: dict[str, str], then: dict[str, str]) -> str:
    changed = [f"{name} has changed" for name in then if name in now and now[name] != then[name]]
    changed += [f"{name} is missing" for name in then if name not in now]
    changed += [f"{name} is new" for name in now if name not in then]
    if changed:
        raise CandidatesError(f"{'; '.join(changed)}: copy the files again, or name the right ones with --data_dir.")
    return f"{len(then)} as the manifest has them"


def describe_data(backtest: Backtest) -> str:
    decisions = backtest.decisions
    found = [f"{os.path.basename(path)} {digest[:19]}" for path, digest in backtest.hashes.items()]
    files = "file" if len(found) == 1 else "files"
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{len(decisions.place):,} decisions of {len(found)} {files}: {', '.join(found[:3])}{more}"


def check_counts(backtest: Backtest, stage: str, task: str, cap: int | None, manifest: dict | None) -> str:
    """Records of each split, of train at most ``cap`` a market; CandidatesError if training would have none, or they
    are not those of the manifest."""
    for split in ("train", "validation"):
        if not len(backtest.numbers.get(split, ())):
            raise CandidatesError(f"The {split} split is empty: give more data, or set splits, or validation_from.")
    splits = {split: backtest.decisions.columns(numbers) for split, numbers in backtest.numbers.items()}
    train = splits["train"]
    trades = int((train.chosen >= 0).sum())
    if trades in (0, len(train.instrument)):
        what = "sold every candidate" if trades else "never sold"
        raise CandidatesError(f"In train the teacher {what}: there is no choice to learn.")
    found = {split: len(its) if task == RANKING else len(its.instrument) for split, its in splits.items()}
    found["train"] = count_capped(train, task, cap)
    if manifest and stage == "sft" and not manifest.get("mix"):  # these count pairs, or several tasks
        check_records(found, {split: its["records"] for split, its in manifest["splits"].items()})
    never = "; NO_TRADE never occurs in train" if task == RANKING and trades == len(train) else ""
    return f"{task}: {', '.join(f'{name} {count:,}' for name, count in found.items())} records{never}"


def count_capped(train: Columns, task: str, cap: int | None) -> int:
    """Records as cap_markets leaves them."""
    of = slice(None) if task == RANKING else train.decision_of
    _, counts = np.unique(np.stack([train.underlying[of], train.exit_style[of]]), axis=1, return_counts=True)
    return int(np.minimum(counts, cap or counts).sum())


def check_records(found: dict[str, int], then: dict[str, int]) -> None:
    differ = [
        f"{split} {found.get(split, 0):,}, then {then[split]:,}" for split in then if found.get(split) != then[split]
    ]
    if differ:
        raise CandidatesError(f"Records differ: {'; '.join(differ)}. Give the options it was tuned with.")


def check_leaks(backtest: Backtest, task: str) -> str:
    config = config_of(task, backtest.options)
    leaks = find_leaks(render_splits(backtest.splits, config), config)
    if leaks:
        raise CandidatesError(" ".join(leaks))
    return "no prompt names its answer"


def check_preflight(stage: str, command: Command) -> str:
    """The preflight of the training itself, which counts tokens; it needs the base's configuration and tokenizer."""
    try:
        keys = read_keys(STAGES[stage].keys[0], command)
        start = read_start(str(keys.adapter)) if getattr(keys, "adapter", None) else None
        if start or not keys.tiny_base_steps:
            check_base(start["base_model"] if start else str(keys.model_name_or_path))
    except (RecipeError, PolicyError) as error:
        raise Unknown(f"token lengths: {error}") from None
    from covered_call.training.rehearsal import preflight_of  # torch and trl, which the gates before it do without

    shown = preflight_of(stage, command)
    print(shown)
    return next(line.removeprefix("tokens").strip() for line in shown.splitlines() if line.startswith("tokens"))


def check_training(stage: str, command: Command, folder: Path | None) -> str:
    from covered_call.training.rehearsal import rehearse

    return rehearse(stage, command, str(folder) if folder else None)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """What was typed for the gates; in ``words`` the keys for the recipe."""
    parser = argparse.ArgumentParser(
        prog="covered-call verify", description=__doc__, formatter_class=Help, allow_abbrev=False,
        usage="covered-call verify FOLDER [--config NAME] [--json FILE] [--KEY VALUE ...]",
        epilog="Any key of a recipe can be given too, as to covered-call train: --data_dir, --splits ...",
    )  # fmt: skip
    parser.add_argument("folder", metavar="FOLDER", help="a run's, or one of CSVs")
    parser.add_argument(
        "--config", metavar="NAME",
        help=f"the recipe to be trained on the CSVs: {', '.join(BOTH)}, or the path of one; default: ranking",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the gates here too, as JSON; default: not")
    args, args.words = parser.parse_known_args(arguments)
    return args
