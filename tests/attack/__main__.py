"""Runs the attacks at full length and writes what came of them into docs/reliability.md.

    python -m tests.attack                         # all: half an hour on two cores
    python -m tests.attack --only csv --count-scale 0.1 --seed 7
    python -m tests.attack --no-table              # print, and leave docs/reliability.md alone

A finding is one line that says what reproduces it; the exit status is 1 if there was any.
"""

import argparse
import atexit
import datetime
import importlib
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator

import datasets

from . import TESTS

COUNTS = {"csv": 20_000, "columns": 20_000, "options": 3_000, "kills": 30, "hub": 300}  # kills: of each writer
WHAT = {
    "csv": 'mutated CSVs, read by default and with on_bad_rows="skip", with and without filters',
    "columns": "mutated CSVs, read as columns against row by row",
    "options": "values of options, and words of command lines",
    "hub": "faults of a Hub while datasets and models are pushed",
}
PAGE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- attack -->", "<!-- /attack -->"
COLUMNS = ("tried", "handled", "unclear", "wrong")
VERSIONS = ("datasets", "trl", "transformers", "torch", "huggingface_hub", "numpy")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(COUNTS), metavar="NAME", help=f"of {', '.join(COUNTS)}")
    parser.add_argument(
        "--count-scale", type=float, default=1.0, metavar="X", help="times the counts that are promised"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn; default: %(default)s")
    parser.add_argument("--no-table", action="store_true", help="leave docs/reliability.md as it is")
    return parser.parse_args(arguments)


def campaigns(names: list[str], scale: float, seed: int, report) -> Iterator[tuple[str, dict[str, int]]]:
    """What was attacked, and what came of it."""
    for name in names:
        module, count = importlib.import_module(f".{name}", __package__), max(1, round(COUNTS[name] * scale))
        if name == "kills":
            for writer, found in module.each(count, seed, report):
                yield f"kills of {module.WRITERS[writer].what}", found
        else:
            yield WHAT[name], module.run(count, seed, report)


def row(what: str, found: dict[str, int], seconds: float) -> str:
    apart = f"{found['not a fault']:,}" if "not a fault" in found else ""
    return f"| {what} | {' | '.join(f'{found[name]:,}' for name in COLUMNS)} | {apart} | {seconds:.0f} s |"


def table(rows: list[str], args: argparse.Namespace) -> str:
    """The rows with what they were measured with."""
    words = [*(["--only", *args.only] if args.only else []), "--seed", str(args.seed)]
    words += ["--count-scale", f"{args.count_scale:g}"] if args.count_scale != 1 else []
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    today = datetime.datetime.now(datetime.UTC).date()
    head = ["| attack | tried | handled | unclear | silently wrong | beside: not a fault | took |", "|" + "---|" * 7]
    how = f"`python -m tests.attack {' '.join(words)}` on {today}: Python {platform.python_version()}, {versions}."
    return "\n".join([how, "", *head, *rows])


def write_table(text: str) -> None:
    """Puts the table in the place of the last one of the same attacks and version of datasets, or after the others."""
    page = PAGE.read_text(encoding="utf-8")
    before, inside, after = re.fullmatch(f"(.*{BEGIN}\n)(.*)({END}.*)", page, re.DOTALL).groups()
    tables = [one.strip() for one in re.split(r"\n(?=`python -m)", inside) if one.strip()]
    kept = [text if measured(one) == measured(text) else one for one in tables]
    PAGE.write_text(before + "\n\n".join(kept if text in kept else [*kept, text]) + "\n" + after, encoding="utf-8")


def measured(table: str) -> list[str]:
    """Which attacks, on which stack."""
    return re.findall(r"--only [a-z ]+|datasets [\d.]+", table.splitlines()[0])


def main(arguments: list[str] | None = None) -> int:
    args, rows, findings = parse_arguments(arguments), [], []
    logging.disable(logging.INFO)

    def report(text: str) -> None:
        findings.append(text)
        print(text.encode(errors="backslashreplace").decode()[:1000], flush=True)

    datasets.disable_progress_bars()
    began = time.monotonic()
    for what, found in campaigns(args.only or list(COUNTS), args.count_scale, args.seed, report):
        rows.append(row(what, found, time.monotonic() - began))
        print(rows[-1], flush=True)
        began = time.monotonic()
    print(table(rows, args))
    if not args.no_table:
        write_table(table(rows, args))
    return int(bool(findings))


if __name__ == "__main__":
    # One thread, so that a fork of this process can train; a home of its own, which conftest makes and this removes.
    os.environ["OMP_NUM_THREADS"] = "1"
    importlib.import_module("conftest")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
    sys.exit(main())
