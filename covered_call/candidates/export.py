"""The same chats as JSON lines, unsplit."""

import argparse
import collections
import glob
import json
import logging
import os
import re
import sys

from datasets.utils import tqdm

from covered_call.candidates.builder import find_csvs
from covered_call.candidates.options import CHATS, CoveredCallCandidatesConfig, check_options
from covered_call.candidates.reading import read_candidates
from covered_call.candidates.records import RECORDS
from covered_call.candidates.schema import CandidatesError, LoggedDecision
from covered_call.command_line import as_typed


def write_jsonl(path: str, logged: list[LoggedDecision], config: CoveredCallCandidatesConfig) -> collections.Counter:
    """Writes one ``{"messages": [...]}`` a line under a temporary name, renames it, and returns the label counts."""
    labels = collections.Counter()
    hidden = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}")
    for left in glob.glob(f"{glob.escape(hidden)}.*.tmp"):  # by an export that was killed
        if has_ended(left.split(".")[-2]):
            os.unlink(left)
    temporary = f"{hidden}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for entry in tqdm(logged, desc=os.path.basename(path), unit=" decisions", disable=None):
                for record in RECORDS[config.name](entry, config):
                    file.write(json.dumps({"messages": record["messages"]}, ensure_ascii=False) + "\n")
                    labels[record["label"]] += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return labels


def has_ended(process: str) -> bool:
    if os.name != "posix" or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)  # which sends nothing
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return False


def export_paths(source: str, output_dir: str | None) -> dict[str, str]:
    stem = re.sub(r"\.csv(\.gz)?$", "", os.path.basename(source))
    folder = os.path.abspath(output_dir or os.path.dirname(source))
    return {name: os.path.join(folder, f"{stem}_{name}.jsonl") for name in CHATS}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Export candidate CSVs as chat JSON lines: <stem>_per_candidate.jsonl and "
        "<stem>_per_decision_ranking.jsonl, whole and unsplit. The CSVs are only read.",
        epilog="example: python covered_call_candidates.py --input data/sample/*_tp_and_roll_simulated.csv "
        "--output_dir out",
        allow_abbrev=False,
    )
    add, defaults = parser.add_argument, CoveredCallCandidatesConfig
    add("--input", "--data_files", "--data-files", nargs="+", action="extend", required=True, metavar="FILE",
        help="a CSV or a glob; may be given more than once")  # fmt: skip
    add("--output_dir", "--output-dir", metavar="DIR", help="default: beside each input")
    add("--underlying", help="keep only this one, e.g. BTC")
    add("--exit_style", "--exit-style", help="keep only this one, e.g. tp_and_roll")
    add("--hindsight", action="store_true", help="print outcomes in the prompts; they name the answer")
    add("--candidate_order", "--candidate-order", default=defaults.candidate_order,
        choices=["instrument", "csv", "shuffle"], help="default: %(default)s")  # fmt: skip
    add("--seed", type=int, default=defaults.seed, help="of the shuffle, default: %(default)s")
    add("--on_bad_rows", "--on-bad-rows", default=defaults.on_bad_rows, choices=["error", "skip"],
        help="or skip decisions with a bad row, whole; default: %(default)s")  # fmt: skip
    add("--max_iv", "--max-iv", type=float, default=defaults.max_iv, metavar="IV",
        help="an iv above this is taken for a percentage, and is bad; default: %(default)s")  # fmt: skip
    return parser.parse_args(arguments)


def export(arguments: argparse.Namespace) -> None:
    sources = find_csvs(arguments.input, None, os.getcwd())
    targets = [path for source in sources for path in export_paths(source, arguments.output_dir).values()]
    if len(set(targets)) < len(targets):
        raise CandidatesError("Two inputs have the same name, so one export would replace the other. Rename one.")
    names = ("underlying", "exit_style", "hindsight", "candidate_order", "seed", "on_bad_rows", "max_iv")
    options = {name: getattr(arguments, name) for name in names}
    check_options("per_candidate", options)
    # All are read before any is written, so that a bad one leaves every export as it was.
    decisions = {source: read_candidates([source], CoveredCallCandidatesConfig(**options)) for source in sources}
    for source, logged in decisions.items():
        for name, path in export_paths(source, arguments.output_dir).items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            labels = write_jsonl(path, logged, CoveredCallCandidatesConfig(name=name, **options))
            balance = ", ".join(f"{label} {count / labels.total():.1%}" for label, count in labels.most_common())
            print(f"{path}: {labels.total()} records of {len(logged)} decisions ({balance})")


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asked = parse_arguments(arguments)
    try:
        export(asked)
    except (CandidatesError, OSError) as error:
        sys.exit(f"error: {as_typed(error, asked)}")
