"""The verb export: the chats of a backtest as JSON lines, unsplit."""

import argparse
import collections
import json
import logging
import os
import re

from datasets.utils import tqdm

from covered_call import atomic
from covered_call.candidates.builder import find_csvs
from covered_call.candidates.data_options import Help, add_option, flags
from covered_call.candidates.options import (
    CHATS,
    DATA,
    PROMPTS,
    CoveredCallCandidatesConfig,
    check_options,
    options_of,
)
from covered_call.candidates.reading import read_candidates
from covered_call.candidates.records import RECORDS
from covered_call.candidates.schema import CandidatesError, LoggedDecision
from covered_call.command_line import plain_errors

# Of a decision that stands in two files: each file is exported for itself.
OPTIONS = [option for option in options_of(CoveredCallCandidatesConfig, DATA, PROMPTS) if option.name != "duplicates"]


def write_jsonl(path: str, logged: list[LoggedDecision], config: CoveredCallCandidatesConfig) -> collections.Counter:
    """Writes one ``{"messages": [...]}`` a line, whole or not at all, and returns the label counts."""
    labels = collections.Counter()
    with atomic.replacing(path) as file:
        for entry in tqdm(logged, desc=os.path.basename(path), unit=" decisions", disable=None):
            for record in RECORDS[config.name](entry, config):
                line = json.dumps({"messages": record["messages"]}, ensure_ascii=False)
                file.write(f"{line}\n".encode())
                labels[record["label"]] += 1
    return labels


def export_paths(source: str, output_dir: str | None) -> dict[str, str]:
    stem = re.sub(r"\.csv(\.gz)?$", "", os.path.basename(source))
    folder = os.path.abspath(output_dir or os.path.dirname(source))
    return {name: os.path.join(folder, f"{stem}_{name}.jsonl") for name in CHATS}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call export",
        description="Exports candidate CSVs as chat JSON lines: <stem>_per_candidate.jsonl and\n"
        "<stem>_per_decision_ranking.jsonl, whole and unsplit. The CSVs are only read.",
        epilog="example: covered-call export --input data/sample/*_tp_and_roll_simulated.csv --output_dir out",
        allow_abbrev=False,
        formatter_class=Help,
    )
    parser.add_argument("--input", "--data_files", "--data-files", nargs="+", action="extend", required=True,
        metavar="CSV", help="a CSV or a glob; may be given more than once")  # fmt: skip
    parser.add_argument(*flags("output_dir"), metavar="DIR", help="default: beside each input")
    for option in OPTIONS:
        add_option(parser, option)
    return parser.parse_args(arguments)


def export(args: argparse.Namespace) -> None:
    sources = find_csvs(args.input, None, os.getcwd())
    targets = [path for source in sources for path in export_paths(source, args.output_dir).values()]
    if len(set(targets)) < len(targets):
        raise CandidatesError("Two inputs have the same name, so one export would replace the other. Rename one.")
    given = {option.name: getattr(args, option.name) for option in OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    check_options("per_candidate", options)
    # All are read before any is written, so that a bad one leaves every export as it was.
    decisions = {source: read_candidates([source], CoveredCallCandidatesConfig(**options)) for source in sources}
    for source, logged in decisions.items():
        for name, path in export_paths(source, args.output_dir).items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            labels = write_jsonl(path, logged, CoveredCallCandidatesConfig(name=name, **options))
            balance = ", ".join(f"{label} {count / labels.total():.1%}" for label, count in labels.most_common())
            print(f"{path}: {labels.total()} records of {len(logged)} decisions ({balance})")


def main(arguments: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(arguments)
    with plain_errors(args, CandidatesError):
        export(args)
