"""Decisions from files: rows as values, checked one by one and against the others of their decision."""

import collections
import datetime
import logging
import math
import os
from typing import Any, NamedTuple

from datasets.utils import tqdm

from covered_call.candidates.csv_rows import WIDTH, BadRow, Cells, read_cells
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import (
    FLAGS,
    MAY_LACK,
    NO_CANDIDATES,
    NO_TIME,
    SELL_CALL,
    SKIP,
    Candidate,
    Decision,
    LoggedDecision,
    Outcome,
    contradicts_name,
    iso_time,
    utc,
    wrong_instrument,
    wrong_name,
    wrong_number,
)
from covered_call.candidates.strays import Run, are_scattered, may_have_its_rows, spoilt_by_strays, whose_is_it

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One parsed row; ``candidate`` is None for the placeholder of a step without candidates."""

    line: int
    spot: float
    candidate: Candidate | None
    outcome: Outcome
    trade_executed: int
    chosen: int
    own: dict[str, float | None] = {}  # the columns of context_columns


def read_file(
    path: str, options: CoveredCallCandidatesConfig, present: dict, expected: str | None
) -> tuple[list[LoggedDecision], int]:
    """The file's good decisions in order of first appearance, and how many bad ones were dropped.

    Args:
        expected: the hash that the file's content must have; None if any will do.
    """

    def complain(problem: BadRow) -> None:
        if options.on_bad_rows == "error":
            raise problem
        logger.info("Skipping: %s", problem)

    runs = read_runs(path, options, present, expected, complain)
    scattered = are_scattered(runs)
    bad = {run.key for run in runs if run.spoilt}  # which may hold a row of their neighbours', too
    spoilt = spoilt_by_strays(path, runs, scattered, complain) - bad
    places = {run.key: place for place, run in enumerate(runs)}
    groups: dict[tuple, list[Row]] = collections.defaultdict(list)
    for run in runs:
        if run.wanted and run.key:
            groups[run.key] += run.rows
    logged = {}
    for key, rows in groups.items():
        if key in spoilt or not rows:
            continue
        try:
            logged[key] = log_decision(path, key, rows)
        except BadRow as problem:
            if key not in bad:
                complain(problem)
            if key not in bad and scattered:  # one of its rows may be another decision's
                raise whose_is_it(path, problem.line) from problem
            spoilt |= {key, *may_have_its_rows(runs, places[key])}
    unknown_rows = sum(run.key is None for run in runs)
    if unknown_rows:
        logger.warning("%s: skipped %d row(s) of which cannot be told whose they are.", path, unknown_rows)
    spoilt |= bad
    good = [entry for key, entry in logged.items() if key not in spoilt]
    return good, len(spoilt & {run.key for run in runs if run.wanted})


def read_runs(
    path: str, options: CoveredCallCandidatesConfig, present: dict, expected: str | None, complain
) -> list[Run]:
    """The file's rows, those of one decision together as far as they stand together."""
    runs: list[Run] = []
    offsets_checked = False
    rows = read_cells(path, options, expected)
    for cells in tqdm(rows, desc=os.path.basename(path), unit=" rows", disable=None, leave=False):
        try:
            key = parse_key(cells)
        except BadRow as problem:
            complain(problem)
            runs.append(Run(None, cells.line, wanted=True, size=1))
            runs[-1].spots.update([cells.values["spot"]] if "spot" in cells.values else [])
            continue
        if not offsets_checked and has_no_offset(cells):
            warn_of_no_offset(path, cells.line)
            offsets_checked = True
        if not runs or runs[-1].key != key:
            passes = all(getattr(options, name) in (None, cells.values[name]) for name in present)
            runs.append(Run(key, cells.line, passes))
        for name, values in present.items():
            values[cells.values[name]] += 1
        add_row(runs[-1], cells, options, complain)
    return runs


def warn_of_no_offset(path: str, line: int) -> None:
    logger.warning("%s, line %d: decision_time has no offset; such times are read as UTC.", path, line)


def add_row(run: Run, cells: Cells, options: CoveredCallCandidatesConfig, complain) -> None:
    run.size += 1
    run.spots[cells.values["spot"]] += 1
    run.instruments.add(cells.values["instrument"])
    if run.wanted:
        try:
            run.rows.append(parse_row(cells, options))
        except BadRow as problem:
            complain(problem)
            run.spoilt = True
        else:
            check_name_of(run, run.rows[-1], cells)


def check_name_of(run: Run, row: Row, cells: Cells) -> None:
    """Notes whether the row goes with its instrument's own name; what follows depends on the rest of the file."""
    if row.candidate:
        time, underlying, _ = run.key
        expiry = time + datetime.timedelta(days=row.candidate.dte)
        name = row.candidate.instrument
        column = contradicts_name(name, underlying, row.candidate.strike, expiry)
        run.named += column is not None
        run.misnamed += [(row.line, column, cells.values[column], name)] if column else []


def parse_key(cells: Cells) -> tuple[datetime.datetime, str, str]:
    if WIDTH in cells.values:
        raise cells.bad(WIDTH, "in the row do not fit the header")
    return parse_time(cells), parse_name(cells, "underlying"), parse_name(cells, "exit_style")


def parse_row(cells: Cells, options: CoveredCallCandidatesConfig) -> Row:
    trade_executed, chosen = parse_flag(cells, "trade_executed"), parse_flag(cells, "chosen")
    if chosen and not trade_executed:
        raise cells.bad("chosen", "says sold, but trade_executed is 0")
    if cells.values["action"] not in (SELL_CALL, SKIP):
        raise cells.bad("action", f"is neither {SELL_CALL} nor {SKIP}")
    if chosen != (cells.values["action"] == SELL_CALL):
        raise cells.bad("action", f"disagrees with chosen={chosen}")
    outcome = Outcome(*(parse_number(cells, name, options, blank=True) for name in Outcome._fields))
    own = {name: parse_number(cells, name, options, blank=True) for name in options.context_columns}
    if parse_name(cells, "instrument") != NO_CANDIDATES:
        spot, candidate = parse_number(cells, "spot", options), parse_candidate(cells, options)
        return Row(cells.line, spot, candidate, outcome, trade_executed, chosen, own)
    if trade_executed:
        raise cells.bad("trade_executed", f"on a {NO_CANDIDATES} row, where nothing can be sold")
    strike, *_ = (parse_number(cells, name, options, blank=True, zero=True) for name in Candidate._fields[1:])
    if strike:
        raise cells.bad("instrument", "stands for no option, and the row has a strike")
    return Row(cells.line, parse_number(cells, "spot", options, zero=True), None, outcome, trade_executed, chosen, own)


def parse_candidate(cells: Cells, options: CoveredCallCandidatesConfig) -> Candidate:
    names = Candidate._fields[1:]
    values = (parse_number(cells, name, options, blank=name in MAY_LACK) for name in names)
    candidate = Candidate(cells.values["instrument"], *values)
    reason = wrong_instrument(candidate.instrument)
    if reason:
        raise cells.bad("instrument", reason)
    return candidate


def parse_time(cells: Cells) -> datetime.datetime:
    time = iso_time(cells.values["decision_time"])
    if time is None:
        raise cells.bad("decision_time", NO_TIME)
    return utc(time)


def has_no_offset(cells: Cells) -> bool:
    time = iso_time(cells.values["decision_time"])
    return time is not None and time.tzinfo is None


def parse_name(cells: Cells, column: str) -> str:
    text = cells.values[column]
    reason = wrong_name(text)
    if reason:
        raise cells.bad(column, reason)
    return text


def parse_flag(cells: Cells, column: str) -> int:
    value = FLAGS.get(cells.values[column])
    if value is None:
        raise cells.bad(column, "is neither 0 nor 1")
    return value


def parse_number(
    cells: Cells, column: str, options: CoveredCallCandidatesConfig, blank: bool = False, zero: bool = False
) -> Any:
    """A float within the limits of its column, or None where blank allows it.

    Args:
        blank: an empty cell or NaN is None, and not wrong.
        zero: 0 is right, whatever the column.
    """
    text = cells.values[column]
    if blank and not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = None
    if value is None or "_" in text or not text.isascii():  # float() reads 1_000, and the digits of all scripts
        raise cells.bad(column, "is not a number")
    if blank and math.isnan(value) or zero and value == 0:
        return None if blank else value
    reason = wrong_number(column, value, options.max_iv)
    if reason:
        raise cells.bad(column, reason)
    return value


def log_decision(path: str, key: tuple, rows: list[Row]) -> LoggedDecision:
    """One decision from its rows; raises BadRow where they contradict each other."""
    first, chosen, lines = rows[0], None, {}
    for index, row in enumerate(rows):
        both = [(name, getattr(row, name), getattr(first, name)) for name in ("spot", "trade_executed")]
        for name, value, expected in [*both, *((name, value, first.own[name]) for name, value in row.own.items())]:
            if value != expected:
                reason = f"differs from {expected!r} on line {first.line} of the same decision"
                raise BadRow(path, row.line, name, value, reason)
        instrument = row.candidate.instrument if row.candidate else NO_CANDIDATES
        if instrument in lines:
            reason = f"also stands on line {lines[instrument]} of the same decision"
            raise BadRow(path, row.line, "instrument", instrument, reason)
        if NO_CANDIDATES in lines or (lines and instrument == NO_CANDIDATES):
            reason = f"and {NO_CANDIDATES} cannot stand in one decision (lines {first.line} and {row.line})"
            raise BadRow(path, row.line, "instrument", instrument, reason)
        lines[instrument] = row.line
        if row.chosen and chosen is not None:
            raise BadRow(path, row.line, "chosen", 1, f"also on line {rows[chosen].line} of the same decision")
        chosen = index if row.chosen else chosen
    if first.trade_executed and chosen is None:
        raise BadRow(path, first.line, "trade_executed", 1, "but no row of the decision has chosen=1")
    candidates = tuple(row.candidate for row in rows if row.candidate)
    outcomes = tuple(row.outcome for row in rows if row.candidate)
    return LoggedDecision(
        Decision(*key, spot=first.spot, candidates=candidates, context=first.own or None), chosen, outcomes
    )
