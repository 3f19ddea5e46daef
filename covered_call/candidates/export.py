"""The verb export: the records of a backtest as JSON lines, unsplit; or on a cluster, as the splits of a load."""

import argparse
import collections
import datetime
import json
import logging
import os
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils import tqdm

from covered_call import atomic
from covered_call.candidates.builder import find_csvs
from covered_call.candidates.columns import OPINION
from covered_call.candidates.context_lines import context_names
from covered_call.candidates.data_options import Help, add_option, flags, typed
from covered_call.candidates.decisions import Decisions, grounds_for, read_decisions
from covered_call.candidates.options import (
    ANSWERS,
    CHATS,
    CONTEXT,
    DATA,
    OUTCOMES,
    PAIRS,
    PROMPTS,
    SPLITS,
    CoveredCallCandidatesConfig,
    PreferenceConfig,
    check_options,
    kind_of,
    names_of,
    options_of,
)
from covered_call.candidates.prompts import ROLES, filled
from covered_call.candidates.records import RECORDS, more_columns
from covered_call.candidates.schema import Candidate, CandidatesError
from covered_call.command_line import plain_errors

ENGINES, FORMATS = ("local", "ray"), ("messages", "nested")
# Of a decision that stands in two files: each file is exported for itself.
OPTIONS = [
    option
    for option in options_of(CoveredCallCandidatesConfig, DATA, CONTEXT, ANSWERS, PROMPTS)
    if option.name != "duplicates"
]
PAIRING = options_of(PreferenceConfig, PAIRS)
LABELS = {"preference": "chosen_label", "q_values": "source"}  # what the summary counts, of chats the label
# Of what the lines of a chat do not hold.
OF_SPLITS = [option for option in options_of(CoveredCallCandidatesConfig, DATA, SPLITS, OUTCOMES)
    if option not in OPTIONS]  # fmt: skip


LINE = (
    '{{"messages": [{{"role": "system", "content": "{system}"}}, {{"role": "user", "content": "{user}"}}, '
    '{{"role": "assistant", "content": "{assistant}"}}]}}\n'
)


def write_jsonl(
    path: str, decisions: Decisions, config: CoveredCallCandidatesConfig, format: str = "messages"
) -> collections.Counter:
    """Writes one ``{"messages": [...]}``, or ``{"input": {...}, "output": {...}}``, a line, of a config without chats
    the whole record; whole or not at all.

    Returns:
        The counts of its labels.
    """
    if config.explain:
        grounds_for(config.name, decisions, decisions.numbers)
    labels = collections.Counter()
    bar = tqdm(total=len(decisions.place), desc=os.path.basename(path), unit=" decisions", disable=None)
    with atomic.replacing(path) as file, bar:
        for batch in decisions.batches(decisions.numbers):
            records = RECORDS[config.name](decisions.columns(batch), config)
            file.write(lines_of(records, config, format))
            labels.update(records[LABELS.get(config.name, "label")].to_pylist())
            bar.update(len(batch))
    return labels


def json_lines(chats: pa.ListArray) -> pa.Buffer | bytes:
    """What json.dumps makes of each chat as {"messages": ...}, of a system, a user and an assistant message each."""
    if not len(chats):
        return b""
    contents = escaped(chats.values.field("content"))
    places = np.arange(len(contents)).reshape(len(chats), len(ROLES)).T
    lines = filled(LINE, {role: contents.take(pa.array(its)) for role, its in zip(ROLES, places, strict=True)})
    return lines.buffers()[2]


def lines_of(records: pa.Table, config: CoveredCallCandidatesConfig, format: str) -> pa.Buffer | bytes:
    if config.name not in CHATS:
        return record_lines(records)
    return nested_lines(records, config) if format == "nested" else json_lines(records["messages"].combine_chunks())


def nested_lines(records: pa.Table, config: CoveredCallCandidatesConfig) -> bytes:
    """Of each record what was known, and what is answered: {"input": {...}, "output": {"answer": ..., ...}}."""
    given = ["decision_id", "decision_time", "underlying", "exit_style", *context_names(config)]
    of_call = (*Candidate._fields, *(OPINION if config.opinions else ()))
    lines = []
    for row in records.to_pylist():
        calls = [{name: call[name] for name in of_call} for call in row.get("candidates", [row])]
        first = row["candidates"][0] if row.get("candidates") else row
        said = {name: row[name] for name in given} | {"spot": first.get("spot")}
        lines.append({"input": said | {"candidates": calls}, "output": output_of(row["messages"][-1]["content"])})
    return "".join(
        json.dumps(line, ensure_ascii=False, default=datetime.datetime.isoformat) + "\n" for line in lines
    ).encode()


def output_of(text: str) -> dict[str, str]:
    """An answer, with its strength and its reason if it has them."""
    answer, *more = text.split("\n")
    return {"answer": answer} | {name.lower(): said for name, _, said in (line.partition(": ") for line in more)}


def record_lines(records: pa.Table) -> bytes:
    """Each record with all its columns; times as ISO 8601."""
    lines = (
        json.dumps(record, ensure_ascii=False, default=datetime.datetime.isoformat) for record in records.to_pylist()
    )
    return "".join(f"{line}\n" for line in lines).encode()


def escaped(texts: pa.StringArray) -> pa.StringArray:
    """The texts as JSON has them between quotes."""
    content = memoryview(texts.buffers()[2])
    below_space = np.count_nonzero(np.frombuffer(content, np.uint8) < 32)
    content = bytes(content)
    if below_space == content.count(b"\n") and b'"' not in content and b"\\" not in content:
        return pc.replace_substring(texts, "\n", "\\n")
    return pa.array([json.dumps(text, ensure_ascii=False)[1:-1] for text in texts.to_pylist()], pa.string())


def export_paths(source: str, output_dir: str | None, configs: Sequence[str]) -> dict[str, str]:
    stem = re.sub(r"\.csv(\.gz)?$", "", os.path.basename(source))
    folder = os.path.abspath(output_dir or os.path.dirname(source))
    return {name: os.path.join(folder, f"{stem}_{name}.jsonl") for name in configs}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call export",
        description="Exports candidate CSVs as chat JSON lines: <stem>_per_candidate.jsonl and\n"
        "<stem>_per_decision_ranking.jsonl, whole and unsplit. The CSVs are only read. With --configs preference,\n"
        "or q_values, as lines with all columns of these: pairs of answers, or what selling each call would bring.\n"
        "With --engine ray, on a Ray cluster: all CSVs together, as load_candidates splits them, with all columns,\n"
        "as OUTPUT_DIR/per_candidate/train-00000.parquet and so on; run again, it goes on where it ended.",
        epilog="examples: covered-call export --input data/sample/*_tp_and_roll_simulated.csv --output_dir out\n"
        "          covered-call export --engine ray --input 's3://or/folder/*.csv' --output_dir s3://another/folder",
        allow_abbrev=False,
        formatter_class=Help,
    )
    parser.add_argument("--input", "--data_files", "--data-files", nargs="+", action="extend", required=True,
        metavar="CSV", help="a CSV or a glob, with --engine ray also a URI; may be given more than once")  # fmt: skip
    parser.add_argument(*flags("output_dir"), metavar="DIR",
        help="default: beside each input; with --engine ray also a URI, and without default")  # fmt: skip
    parser.add_argument("--configs", nargs="+", choices=tuple(RECORDS), default=list(CHATS), metavar="NAME",
        help=f"what to export, of {', '.join(RECORDS)}; default: {' '.join(CHATS)}")  # fmt: skip
    parser.add_argument("--engine", choices=ENGINES, default="local",
        help="this process, or a Ray cluster that is there already (pip install 'covered-call-candidates[ray]'); "
        "default: %(default)s")  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default="messages",
        help="of a line: a chat, or nested input and output, what was known and what is answered; default: "
        "%(default)s")  # fmt: skip
    for option in OPTIONS:
        add_option(parser, option)
    group = parser.add_argument_group(
        "splits, with --engine ray; outcomes, with it, or of preference, q_values and analogues"
    )
    for option in (*OF_SPLITS, *PAIRING):
        add_option(group, option)
    return typed(parser, parser.parse_args(arguments))


def export(args: argparse.Namespace) -> None:
    given = {option.name: getattr(args, option.name) for option in (*OPTIONS, *OF_SPLITS, *PAIRING)}
    options = {name: value for name, value in given.items() if value is not None}
    for name in ("per_candidate", *args.configs):
        check_options(name, options)
    check_said(args, options)
    if args.engine == "ray":
        return export_on_ray(args, options)
    for name in args.configs:
        more_columns(name, config_for(name, options))  # which refuses names that are taken, before any file is written
    sources = find_csvs(args.input, None, os.getcwd())
    targets = [path for source in sources for path in export_paths(source, args.output_dir, args.configs).values()]
    if len(set(targets)) < len(targets):
        raise CandidatesError("Two inputs have the same name, so one export would replace the other. Rename one.")
    # All are read before any is written, so that a bad one leaves every export as it was.
    read = {source: read_decisions([source], config_for("per_candidate", options)) for source in sources}
    for source, decisions in read.items():
        for name, path in export_paths(source, args.output_dir, args.configs).items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            labels = write_jsonl(path, decisions, config_for(name, options), args.format)
            shares = [(label or "unknown", count / labels.total()) for label, count in labels.most_common()]
            balance = ", ".join(f"{label} {share:.1%}" for label, share in shares)
            print(f"{path}: {labels.total()} records of {len(decisions.place)} decisions ({balance})")


def check_said(args: argparse.Namespace, options: dict) -> None:
    """Raises CandidatesError for an option that says nothing of what is exported."""
    priced = set(args.configs) - set(CHATS)
    if args.engine == "ray" and priced:
        raise CandidatesError(f"configs={min(priced)!r} is exported here alone, without engine='ray'.")
    outcomes = {option.name for option in options_of(CoveredCallCandidatesConfig, OUTCOMES)}
    told = priced or options.get("analogues") or args.engine == "ray"
    said = {option.name for option in OPTIONS} | (outcomes if told else set())
    said |= {"iv_lag"} if options.get("context_vols") else set()
    said |= {option.name for option in OF_SPLITS} if args.engine == "ray" else set()
    said |= {option.name for option in PAIRING} if "preference" in args.configs else set()
    late = [name for name in options if name not in said]
    if late and late[0] in names_of(PreferenceConfig, PAIRS):
        raise CandidatesError(f"{late[0]} is of pairs: see configs='preference'.")
    if late:
        raise CandidatesError(
            f"{late[0]} says nothing of lines, which are unsplit, and those of chats without outcomes: see "
            "engine='ray', and configs."
        )


def config_for(name: str, options: dict) -> CoveredCallCandidatesConfig:
    kind = kind_of(name)
    known = names_of(kind)
    return kind(name=name, **{option: value for option, value in options.items() if option in known})


def export_on_ray(args: argparse.Namespace, options: dict) -> None:
    from covered_call.candidates.scale_out import RayCluster, export_parquet
    from covered_call.candidates.shared_folder import find_inputs

    for name, value in (("explain", options.get("explain")), ("format", args.format == "nested")):
        if value:
            raise CandidatesError(f"{name} goes with engine='local': the parts of a cluster are chats with answers.")
    if args.output_dir is None:
        raise CandidatesError("engine='ray' writes into a folder that all nodes see: give it as output_dir.")
    sources, config = find_inputs(args.input), config_for("per_candidate", options)
    counts = export_parquet(sources, args.output_dir, config, RayCluster())
    parts = sum(its["parts"] for its in counts.values())
    for name in CHATS:
        splits = ", ".join(f"{split} {its[name]:,}" for split, its in counts.items() if its[name])
        records = sum(its[name] for its in counts.values())
        print(f"{args.output_dir}/{name}: {records:,} records of {parts} parts ({splits})")


def main(arguments: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(arguments)
    with plain_errors(args, CandidatesError):
        export(args)
