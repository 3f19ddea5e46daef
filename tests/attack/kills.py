"""Every writer is killed at any moment, and the same command given again: it ends as if nothing had happened.

What lies there after the kill is what a reader in between would find: each file of the old version or of the new,
and never a part of one. A run here is a fork of this process, which has imported all there is, so that the kill hits
the work and not the imports. Half the kills come at any moment, half just after something was written.
"""

import collections
import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}

import datasets
from conftest import decision, no_candidates, write_csv

from covered_call.__main__ import main
from covered_call.candidates.builder import load_candidates
from covered_call.candidates.options import CHATS

STEPS = ["--max_steps", "6", "--logging_steps", "1", "--report_to", "none", "--max_eval_records", "20"]
STEPS += ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
STEPS += ["--tiny_base_steps", "0", "--per_device_train_batch_size", "4"]
LONGEST = 300.0  # seconds that a run may take


class Writer(NamedTuple):
    """What writes ``out``: its command, of the new version or, if told so, of an old one that is another.

    ``module`` is imported before the runs, which are forks. ``whole_folder`` says whether it is the folder that is
    exchanged, or each file by itself; ``from_old`` whether it is always or never started over an old version; None is
    every second time.
    """

    what: str
    command: Callable[[Path, bool], None]
    module: str
    whole_folder: bool = False
    from_old: bool | None = None
    trains: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# The writers. Each command works in the folder that it is given, where inputs.csv, other.csv and base lie.


def source(home: Path, old: bool) -> str:
    return str(home / ("other.csv" if old else "inputs.csv"))


def export(home: Path, old: bool) -> None:
    main(["export", "--input", source(home, False), "--output_dir", str(home / "out"), *["--hindsight"] * old])


def cache(home: Path, old: bool) -> None:
    splits = load_candidates(data_files=source(home, old), cache_dir=str(home / "out"))
    (home / "rows.json").write_text(json.dumps({name: split.to_list() for name, split in splits.items()}, default=str))


def train(home: Path, old: bool, *more: str) -> None:
    words = ["--config", "tiny", "--balance", "none", "--model_name_or_path", str(home / "base"), *more]
    main(["train", *words, *STEPS, "--data_files", source(home, old), "--output_dir", str(home / "out")])


def prefer(home: Path, old: bool) -> None:
    words = ["--config", "tiny_dpo", "--model_name_or_path", str(home / "base"), "--warmup_steps", "0"]
    main(["prefer", *words, *STEPS, "--data_files", source(home, old), "--output_dir", str(home / "out")])


def overwrite(home: Path, old: bool) -> None:
    train(home, old, "--overwrite_output_dir")


def learn(home: Path, old: bool) -> None:
    main(["q-scorer", "--data_files", source(home, old), "--folds", "0", "--output_dir", str(home / "out")])


def share(home: Path, old: bool) -> None:
    words = ["--data_files", source(home, old), "--card", str(home / "card.md")]
    main(["publish", *words, "--configs", "per_candidate", "q_values", "--to", str(home / "out")])


def judge(home: Path, old: bool) -> None:
    words = ["--baselines-only", "--data_files", source(home, old)]
    main(["evaluate", *words, "--output_dir", str(home / "out")])


WRITERS = {
    "export": Writer("covered-call export", export, "candidates.export"),
    "cache": Writer("load_candidates, the cache", cache, "candidates.builder", from_old=False),
    "train": Writer("covered-call train", train, "training.sft", from_old=False, trains=True),
    "prefer": Writer("covered-call prefer", prefer, "training.dpo", from_old=False, trains=True),
    "overwrite": Writer(
        "covered-call train --overwrite_output_dir", overwrite, "training.sft", from_old=True, trains=True
    ),
    "q-scorer": Writer("covered-call q-scorer", learn, "value_model.q_scorer"),
    "publish --to": Writer("covered-call publish --to", share, "publishing.publish", whole_folder=True),
    "report": Writer("covered-call evaluate, a report", judge, "evaluation.evaluate"),
}

CARD = "---\nlicense: cc-by-4.0\npretty_name: My calls\n---\n\n# My calls\n\nMy own words.\n"


def furnish(home: Path) -> None:
    """The inputs of all writers: prices that jump up and down each day, so that each of them has what to learn."""
    for name, days, shift in (("inputs.csv", 90, 0.0), ("other.csv", 80, 500.0)):
        rows = []
        for day in range(days):
            low = day % 2 == 0
            market = {"dte": 1.0, "spot": (58_000.0 if low else 66_000.0) + shift, "exit_style": "hold_to_expiry"}
            rows += decision(day, sold=day % 3 if low else None, **market, pnl_vs_hodl=-4_000.0 if low else 0.0)
        write_csv(home / name, [*rows, no_candidates(days, exit_style="hold_to_expiry")])
    (home / "card.md").write_text(CARD)


def build_base(home: Path) -> None:
    from covered_call.language_model import tiny_phi3

    chats = [
        message["content"]
        for name in CHATS
        for record in load_candidates(
            name, data_files=source(home, False), cache_dir=str(home / "arrow"), splits="train"
        )["train"]
        for message in record["messages"]
    ]
    tokenizer = tiny_phi3.train_tokenizer(chats)
    tiny_phi3.random_phi3(tokenizer, seed=0).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")


# ---------------------------------------------------------------------------------------------------------------------
# Runs and kills


def start(home: Path, command: Callable[[Path], None]) -> int:
    """The command in a process of its own, with caches and temporary files of its own; its words go to log.txt."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(home / "log.txt", "ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(home)
        for name in ("caches", "tmp"):
            (home / name).mkdir(exist_ok=True)
        datasets.config.HF_DATASETS_CACHE = home / "caches"
        tempfile.tempdir = str(home / "tmp")
        command(home)
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int | None:
    """The exit status, minus a signal's number; None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def finish(home: Path, command: Callable[[Path], None]) -> tuple[int | str, float, int]:
    """Runs to the end; its exit status, the seconds it took, and how often its output was seen to change."""
    began, child, changes, seen = time.monotonic(), start(home, command), 0, None
    while (status := ended(child)) is None:
        if time.monotonic() - began > LONGEST:
            kill(child)
            return "stuck", LONGEST, changes
        now = listing(home)
        changes, seen = changes + (now != seen), now
        time.sleep(0.002)
    return status, time.monotonic() - began, changes


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def kill_at_random(rng: random.Random, home: Path, command, seconds: float, changes: int) -> str | None:
    """Starts the command and kills it; says when, or None if it had ended before."""
    by_change = rng.random() < 0.5
    moment, wanted, pause = rng.uniform(0, seconds), rng.randint(1, max(1, changes)), rng.uniform(0, 0.01)
    began, child, count, seen = time.monotonic(), start(home, command), 0, None
    while ended(child) is None:
        if by_change:
            now = listing(home)
            count, seen = count + (now != seen), now
            if count >= wanted:
                time.sleep(pause)
                break
            time.sleep(0.002)
        elif time.monotonic() - began >= moment:
            break
        else:
            time.sleep(min(0.01, max(0.0, moment - (time.monotonic() - began))))
    else:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
        return None
    return f"killed after {time.monotonic() - began:.3f} s of {seconds:.3f}" + (
        f", at change {wanted}" if by_change else ""
    )


def listing(home: Path) -> list[tuple]:
    """All that stands in the output, or beside it under a hidden name, with sizes."""
    found = []
    for top in home.iterdir():
        if top.name == "out" or top.name.startswith("."):
            for folder, _, names in os.walk(top):
                found += [(folder, name, size_of(Path(folder, name))) for name in names] or [(folder, "", 0)]
            if not top.is_dir():
                found.append(("", top.name, size_of(top)))
    return sorted(found)


def size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return -1


# ---------------------------------------------------------------------------------------------------------------------
# The judgement


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path below the folder; the locks of caches, which stay, are no content."""
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def content(path: Path) -> bytes:
    """The bytes; of a trainer's log, all but the tokens, which trl counts from 0 again when a run goes on."""
    data = path.read_bytes()
    return re.sub(rb'"num_tokens": [\d.]+', b"", data) if path.name == "trainer_state.json" else data


class Versions(NamedTuple):
    """The files of undisturbed runs; ``varied`` are those that differ from run to run: a time is noted in them."""

    old: dict[str, bytes]
    new: dict[str, bytes]
    varied: set[str]
    seconds: float
    changes: int


def measure(home: Path, writer: Writer) -> Versions:
    """Runs the writer three times: the old version, which is kept as old/, and twice the new one."""
    made = []
    for old in (True, False, False):
        clear(home)
        if writer.from_old and not old:
            shutil.copytree(home / "old", home / "out")
        status, seconds, changes = finish(home, lambda where, old=old: writer.command(where, old))
        if status != 0:
            raise RuntimeError(f"an undisturbed run ended with {status}: {last_words(home)}")
        made.append(contents(home / "out") | extra(home))
        if old:
            shutil.rmtree(home / "old", ignore_errors=True)
            shutil.copytree(home / "out", home / "old")
    old, new, again = made
    if new.keys() != again.keys():
        raise RuntimeError(f"two undisturbed runs differ in {sorted(new.keys() ^ again.keys())}")
    return Versions(old, new, {name for name in new if new[name] != again[name]}, seconds, changes)


def extra(home: Path) -> dict[str, bytes]:
    rows = home / "rows.json"
    return {"rows.json": rows.read_bytes()} if rows.exists() else {}


def clear(home: Path) -> None:
    """Leaves the inputs and the old version alone."""
    for path in home.iterdir():
        if path.name in ("out", "caches", "tmp", "rows.json", "log.txt") or path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def last_words(home: Path) -> str:
    """The end of what the runs printed, less their progress bars."""
    text = (home / "log.txt").read_text(errors="replace") if (home / "log.txt").exists() else ""
    lines = [line.strip() for line in text.splitlines() if not re.search(r"it/s|s/it|%\|", line)]
    return " / ".join([line for line in lines if line][-2:])[-400:]


def broken(home: Path, writer: Writer, versions: Versions, had_old: bool) -> str | None:
    """What a reader would find wrong with the output after a kill."""
    found = {name: data for name, data in contents(home / "out").items() if not hidden(name)}
    old, new = versions.old if had_old else {}, versions.new
    if writer.whole_folder:
        if not differs(found, old, versions.varied) or not differs(found, new, versions.varied):
            return None
        return "the folder is neither the old nor the new version"
    if writer.trains:
        return broken_run(found, old, new)
    if writer.command is cache:
        return None  # only the library reads it, and the second run does
    for name, data in found.items():
        if name not in versions.varied and data not in (old.get(name), new.get(name)):
            return f"{name} is neither the old nor the new one"
        if name.endswith(".json"):
            json.loads(data)
    return None


def broken_run(found: dict[str, bytes], old: dict[str, bytes], new: dict[str, bytes]) -> str | None:
    """A run's folder may be unfinished, but one that says it is finished is whole."""
    if "manifest.json" not in found:
        return "weights without a manifest" if "adapter_model.safetensors" in found else None
    if not json.loads(found["manifest.json"]).get("finished"):
        return None
    weights = found.get("adapter_model.safetensors")
    if weights not in (old.get("adapter_model.safetensors"), new["adapter_model.safetensors"]) or weights is None:
        return "it says that it is finished, with weights of neither version"
    names = (old if weights == old.get("adapter_model.safetensors") else new).keys()
    missing = {name for name in names if "checkpoint" not in name} - found.keys()
    return f"it says that it is finished, without {', '.join(sorted(missing))}" if missing else None


def hidden(name: str) -> bool:
    """Whether its name says that it is no file for a reader."""
    return any(part.startswith(".") for part in Path(name).parts) or name.endswith(".tmp")


def differs(found: dict[str, bytes], expected: dict[str, bytes], varied: set[str]) -> str | None:
    if more := found.keys() - expected.keys():
        return f"left over: {', '.join(sorted(more))}"[:300]
    if less := expected.keys() - found.keys():
        return f"missing: {', '.join(sorted(less))}"[:300]
    other = [name for name in found if name not in varied and found[name] != expected[name]]
    return f"other bytes: {', '.join(other)}"[:300] if other else None


def kill_once(rng: random.Random, home: Path, writer: Writer, versions: Versions) -> tuple[str, str] | None:
    """A verdict and why; None if the run ended before it was killed."""
    clear(home)
    had_old = writer.from_old if writer.from_old is not None else rng.random() < 0.5
    if had_old:
        shutil.copytree(home / "old", home / "out")
    again = lambda where: writer.command(where, False)  # noqa: E731
    when = kill_at_random(rng, home, again, versions.seconds, versions.changes)
    if when is None:
        return None
    when += " over an old version" if had_old else ""
    found = broken(home, writer, versions, had_old)
    if found:
        return "wrong", f"{when}: {found}"
    status = finish(home, again)[0]  # which refuses a run that had finished all but its exit
    if status != 0 and differs(contents(home / "out") | extra(home), versions.new, versions.varied):
        return "unclear", f"{when}: the same command again ended with {status}: {last_words(home)}"
    found = differs(contents(home / "out") | extra(home), versions.new, versions.varied)
    if found:
        return "wrong", f"{when}: after the same command again, {found}"
    left = [path.name for path in home.iterdir() if path.name.startswith(".")]
    if left:
        return "wrong", f"{when}: after the same command again, left beside the output: {', '.join(sorted(left))}"
    return "handled", when


def attack(name: str, home: Path, count: int, seed: int, report: Callable[[str], None]) -> dict[str, int]:
    """Kills one writer ``count`` times; ``home`` holds the inputs."""
    rng, totals, writer = random.Random(f"{seed}|{name}"), collections.Counter(), WRITERS[name]
    versions = measure(home, writer)
    late = 0
    while totals["tried"] < count and late < 10 + 3 * count:
        verdict = kill_once(rng, home, writer, versions)
        if verdict is None:
            late += 1
            continue
        totals["tried"] += 1
        totals[verdict[0]] += 1
        if verdict[0] != "handled":
            report(f"kills: {name}: {verdict[0]}: kill {totals['tried']} of seed {seed}: {verdict[1]}")
    return {key: totals[key] for key in ("tried", "handled", "unclear", "wrong")}


def each(
    count: int, seed: int, report: Callable[[str], None], names=tuple(WRITERS)
) -> Iterator[tuple[str, dict[str, int]]]:
    """Each writer's name with what came of ``count`` kills of it."""
    with tempfile.TemporaryDirectory(prefix="attack_kills_") as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        furnish(inputs)
        if any(WRITERS[name].trains for name in names) and finish(inputs, build_base)[0] != 0:
            raise RuntimeError(f"no base: {last_words(inputs)}")
        for name in names:
            importlib.import_module(f"covered_call.{WRITERS[name].module}")
            home = Path(folder) / "home"
            shutil.copytree(inputs, home, ignore=shutil.ignore_patterns("caches", "tmp", "arrow", "log.txt"))
            yield name, attack(name, home, count, seed, report)
            shutil.rmtree(home)


def run(count: int, seed: int, report: Callable[[str], None]) -> dict[str, int]:
    """Kills every writer ``count`` times."""
    totals = collections.Counter()
    for _, found in each(count, seed, report):
        totals.update(found)
    return {key: totals[key] for key in ("tried", "handled", "unclear", "wrong")}
