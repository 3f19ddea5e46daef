"""The verb agent export: a log and its outcomes as the CSV that q-scorer, train and prefer learn from.

    covered-call agent settle out/agent/shadow --snapshot 'chains/*.parquet'
    covered-call agent export out/agent/shadow --to_csv runs/
    covered-call q-scorer --data_files 'runs/*.csv'

A file an underlying and exit style, in the layout of covered-call backtest. `chosen` is the sale that the agent took;
in shadow the one that it would have. Each candidate that is settled has its outcome, sold or not, and when that was
known (outcome_days), so that the file is read with settlement="recorded"; what is not settled is blank. Outcomes are
net of fees: read them without further ones.
"""

import argparse
import datetime
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from covered_call import atomic
from covered_call.candidates.columns import DAY, microseconds
from covered_call.candidates.data_options import Help, flags
from covered_call.command_line import plain_errors, start_logging
from covered_call.market.candidate_csv import HEADER, UNKNOWN, file_name, rows_of, write_rows
from covered_call.runtime.journal import JournalError
from covered_call.runtime.logged import TAKEN, Entry, read_log
from covered_call.runtime.outcomes_log import Outcomes, Settled, read_outcomes
from covered_call.runtime.settle import number_or_nan
from covered_call.runtime.state import Quote

STATES = ("all", "flat_only", "hold_only")


class Written(NamedTuple):
    """A file, and what it holds."""

    path: Path
    decisions: int
    candidates: int
    settled: int


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    start_logging()
    with plain_errors(args, JournalError):
        for one in export(args.log, args.to_csv, args.label_states):
            print(f"Wrote {one.path}: {one.decisions:,} decisions, {one.settled:,} of {one.candidates:,} candidates "
                "with an outcome")  # fmt: skip


def export(folder: str, to: str, states: str = "all") -> list[Written]:
    """Raises JournalError for a log that cannot be read, or has no decision of these states."""
    log, outcomes = read_log(folder), read_outcomes(folder)
    groups: dict[tuple[str, str], list[Entry]] = {}
    for one in log.entries:
        if states == "all" or one.flat == (states == "flat_only"):
            groups.setdefault((one.decision.underlying, one.decision.exit_style), []).append(one)
    if not groups:
        raise JournalError(f"{folder}: label_states={states} leaves none of its {len(log.entries):,} decisions.")
    os.makedirs(to, exist_ok=True)
    stamp = f"{datetime.datetime.now(datetime.UTC):%Y%m%d_%H%M%S}"
    return [write(to, stamp, f"agent_{log.mode}", entries, outcomes) for _, entries in sorted(groups.items())]


def write(to: str, stamp: str, strategy: str, entries: list[Entry], outcomes: Outcomes) -> Written:
    first, last = entries[0].decision, entries[-1].decision
    path = Path(to) / file_name(first.underlying, first.exit_style, first.decision_time, last.decision_time, stamp)
    with atomic.replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        write_rows(text, [HEADER])
        for one in entries:
            write_rows(text, lines_of(one, strategy, outcomes))
        text.flush()
        text.detach()
    names = [(one.decision.decision_id, its.instrument) for one in entries for its in one.decision.candidates]
    known = sum(name in outcomes and outcomes[name].pnl_vs_hodl is not None for name in names)
    return Written(path, len(entries), len(names), known)


def lines_of(one: Entry, strategy: str, outcomes: Outcomes) -> Iterator[list]:
    """The cells of a decision."""
    decision, quotes, meant = one.decision, one.quotes, one.meant
    names = [candidate.instrument for candidate in decision.candidates]
    chosen = names.index(str(meant.instrument)) if meant.fate == TAKEN else None
    cells = [cells_of(quotes.get(name)) for name in names]
    known = [outcome_of(one, outcomes.get((decision.decision_id, name))) for name in names]
    return rows_of(decision, np.array(cells, float).reshape(-1, 4), strategy, chosen, known)


def cells_of(quote: Quote | None) -> list[float]:
    return [number_or_nan(value) for value in quote[1:]] if quote else [np.nan] * 4


def outcome_of(one: Entry, settled: Settled | None) -> tuple[float | None, float | None, float | None]:
    if settled is None or settled.settled_at is None:
        return UNKNOWN
    days = (microseconds(settled.settled_at) - microseconds(one.decision.decision_time)) / DAY
    return settled.pnl_vs_hodl, settled.max_drawdown_pct, days


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call agent export", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("log", metavar="LOGDIR", help="the folder of the log")
    parser.add_argument(*flags("to_csv"), metavar="DIR", required=True, help="where the files go")
    parser.add_argument(
        *flags("label_states"), choices=STATES, default=STATES[0],
        help="which decisions: flat_only has those at which no call of the underlying was open, hold_only the others; "
        "default: all",
    )  # fmt: skip
    return parser.parse_args(arguments)
