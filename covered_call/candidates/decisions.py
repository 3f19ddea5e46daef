"""All decisions of some files: read, each of them once, in order of time, with their outcomes."""

import array
import collections
import dataclasses
import functools
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from covered_call.candidates.analogues import analogues_of, check_rule, join_pools, pick_pool, pool_of
from covered_call.candidates.chains import Rolls, no_rolls, rolls_of
from covered_call.candidates.columnar import Doubt, InPieces, Said, scan, scan_in_pieces
from covered_call.candidates.columns import (
    OPINION,
    OUTCOME_DAYS,
    Columns,
    Grounds,
    ascend,
    columns_of,
    in_batches,
    label_ends,
    time_of,
)
from covered_call.candidates.context import Known, Prices, by_underlying, context_of, vols_at_target
from covered_call.candidates.context_lines import ANALOGUES
from covered_call.candidates.context_ohlcv import Bars, read_bars
from covered_call.candidates.csv_rows import check_header
from covered_call.candidates.explanations import grounds_of
from covered_call.candidates.opinions import opinions_on, read_opinions
from covered_call.candidates.options import CoveredCallCandidatesConfig, horizon_columns
from covered_call.candidates.outcomes import TP_AND_ROLL, Basis, Replay, net_of
from covered_call.candidates.pricing import Calls, Sales
from covered_call.candidates.prompts import present_in_order
from covered_call.candidates.reading import read_file, warn_of_no_offset
from covered_call.candidates.schema import ATM_IV, CandidatesError, Decision, printable, shown
from covered_call.candidates.spool import Spool
from covered_call.candidates.spots import Spots
from covered_call.candidates.terms import Fit, Trades, settle
from covered_call.candidates.vols import UNDERLYING, series_of

logger = logging.getLogger(__name__)

CHECKED = 16  # stretches of decisions, of some thousand candidates each


class Decisions(NamedTuple):
    """D decisions by time, ties in the order of the files; the number of one is its place here.

    What tells them apart is in memory; their candidates are in the spool, in the order that prompts show.
    """

    spool: Spool
    place: np.ndarray  # (D,) int32, in the spool
    underlying: np.ndarray  # (D,) int32, a place among the spool's names
    exit_style: np.ndarray  # (D,) int32, the same
    time: np.ndarray  # (D,) int64, microseconds since 1970, UTC
    spot: np.ndarray  # (D,) float64
    size: np.ndarray  # (D,) int32, its candidates
    label_end: np.ndarray  # (D,) int64, as time: when the last of its outcomes is known
    outcomes: tuple[Replay, dict[tuple[str, str], Fit]] | None = None  # replay and fits, when they are computed

    @property
    def replay(self) -> Replay:
        """What computes their outcomes."""
        assert self.outcomes is not None
        return self.outcomes[0]

    @property
    def fits(self) -> dict[tuple[str, str], Fit]:
        """How computed outcomes fit recorded ones, by underlying and exit style."""
        return self.outcomes[1] if self.outcomes else {}

    def checks(self) -> list[str]:
        """Of each underlying and exit style, how far computed outcomes are from recorded ones, and by which rule."""
        terms = self.replay.terms
        return [
            f"Outcomes of {underlying} {style} are those that the files have, of each candidate."
            if terms[style].recorded
            else f"{fit.sentence(underlying, style)} They are by {terms[style].text()}."
            for (underlying, style), fit in self.fits.items()
        ]

    def columns(self, numbers: np.ndarray | None = None) -> Columns:
        """Those of these numbers, or all, in memory."""
        return self.spool.take(self.place if numbers is None else self.place[numbers])

    def batches(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """The numbers in parts, in their order, each of about so many candidates as fit into memory as texts."""
        for start, end in in_batches(self.size[numbers]):
            yield numbers[start:end]

    @property
    def numbers(self) -> np.ndarray:
        return np.arange(len(self.place))

    def id_of(self, number: int) -> str:
        names = self.spool.names
        key = (time_of(int(self.time[number])), names[self.underlying[number]], names[self.exit_style[number]])
        return Decision(*key, spot=0.0, candidates=()).decision_id


def read_decisions(paths: list[str], options: CoveredCallCandidatesConfig) -> Decisions:
    """All decisions of the files that pass the filters.

    Raises:
        CandidatesError: for files that cannot be read, or contradict each other; BadRow for rows that cannot be
            trusted.
    """
    reader, hashes = Reader(options), hashes_of(options.data_files)
    ends = [reader.read(path, hashes.get(path)) for path in paths]
    return with_outcomes(reader.decisions(paths, ends), reader.rolls, options)


class Reader:
    """Files, one after the other, into a spool."""

    def __init__(self, options: CoveredCallCandidatesConfig, spool: Spool | None = None):
        self.options, self.spool = options, Spool(options.context_columns) if spool is None else spool
        self.rolls: list[Rolls] = []
        self.present = {"underlying": collections.Counter(), "exit_style": collections.Counter()}
        self.dropped = 0

    def read(self, path: str, expected: str | None) -> int:
        """Takes in a file's good decisions that pass the filters; returns how many decisions there are now.

        Args:
            expected: the hash that the file's content must have; None if any will do.
        """
        said = self.scan(scan, path, expected)
        if isinstance(said, InPieces):
            said = self.scan(scan_in_pieces, path, expected)
        if isinstance(said, Doubt):
            logger.debug("%s is read row by row: %s.", path, said)
            logged, bad = read_file(path, self.options, self.present, expected)
            self.dropped += bad
            if logged:
                with self.spool.part() as append:
                    self.keep(columns_of(logged), append)
        else:
            check_header(path, said.header, self.options.context_columns)
            if said.no_offset:
                warn_of_no_offset(path, said.no_offset)
            for name, rows in said.rows.items():
                self.present[name].update(rows)
        return len(self.spool)

    def in_order(self) -> Decisions:
        """All that were read, in the order of the files."""
        columns = self.spool.by_decision()
        return Decisions(self.spool, np.arange(len(self.spool), dtype=np.int32), *columns, label_end=columns[2])

    def scan(self, how, path: str, expected: str | None) -> Said | Doubt:
        """Takes the file in as columns, or leaves all as it was and says why."""
        before = len(self.rolls)
        try:
            with self.spool.part() as append:
                return how(path, self.options, expected, lambda columns: self.keep(columns, append))
        except Doubt as doubt:
            del self.rolls[before:]
            return doubt

    def keep(self, columns: Columns, append) -> None:
        """Takes in decisions whose candidates stand in the file's order."""
        columns = columns.renamed(self.spool.names)
        rolls = TP_AND_ROLL in columns.names
        self.rolls.append(rolls_of(columns, self.options) if rolls else no_rolls(len(columns)))
        append(present_in_order(columns, self.options))

    def decisions(self, paths: list[str], ends: list[int]) -> Decisions:
        """All that were read, each once, by time.

        Args:
            ends: of each file, how many decisions it and those before it have.
        """
        decisions = once(self.in_order(), paths, ends, self.options)
        if self.dropped:
            logger.warning("Dropped %d decision(s) with bad rows, whole (on_bad_rows='skip').", self.dropped)
        if not len(decisions.place):
            raise nothing_left(paths, self.options, self.present, self.dropped)
        say_what_was_filtered(self.options, self.present)
        return decisions


def once(decisions: Decisions, paths: list[str], ends: list[int], options: CoveredCallCandidatesConfig) -> Decisions:
    """By time, and of a decision that stands in several files the one that the option ``duplicates`` says, in the
    place of the first.

    Args:
        ends: of each file, how many decisions it and those before it have.
    """
    if ascend(decisions.time):
        return decisions
    key = (decisions.exit_style, decisions.underlying, decisions.time)
    order = np.lexsort(key)
    again = np.zeros(len(order), bool)
    again[order[1:]] = np.logical_and.reduce([part[order][1:] == part[order][:-1] for part in key])
    if not again.any():
        return taken(decisions, np.argsort(decisions.time, kind="stable"))
    first = np.empty(len(order), np.int64)  # of each decision the number of its first appearance
    first[order] = np.maximum.accumulate(np.where(again[order], 0, np.arange(len(order))))
    first[order] = order[first[order]]
    held, repeated = np.arange(len(order)), collections.defaultdict(list)
    for number in np.flatnonzero(again).tolist():
        holder = held[first[number]]
        path, other = (paths[np.searchsorted(ends, one, side="right")] for one in (number, holder))
        repeated[other, path].append(decisions.id_of(number))
        if options.duplicates == "error" or is_later(path, other):
            held[first[number]] = number
    check_repeated(repeated, options)
    firsts = np.flatnonzero(~again)
    return taken(decisions, held[firsts[np.argsort(decisions.time[firsts], kind="stable")]])


def taken(decisions: Decisions, numbers: np.ndarray) -> Decisions:
    return decisions._replace(**{name: getattr(decisions, name)[numbers] for name in Decisions._fields[1:-1]})


def with_outcomes(decisions: Decisions, rolls: list[Rolls], options: CoveredCallCandidatesConfig) -> Decisions:
    """Computes the outcome of each candidate, at each of the horizons too, into the spool; see settled."""
    if options.context != "none":
        decisions.spool.describe(functools.partial(context_of, known=known_at(decisions, options)))
    decisions = settled(decisions, rolls, options)
    replay, ends, horizons = decisions.replay, array.array("q"), horizon_columns(options)
    replays = [replay.changed(dataclasses.replace(options, horizon=days)) for days in horizons.values()]
    opinions = read_opinions(options.opinions) if options.opinions else None

    def outcomes(columns: Columns) -> tuple[np.ndarray, ...]:
        *computed, label_end = outcomes_of(columns, replay, replays)
        ends.frombytes(label_ends(dataclasses.replace(columns, label_end=label_end)).tobytes())
        told = () if opinions is None else opinions_on(columns, opinions)
        return *computed, *told, label_end

    decisions.spool.compute(outcomes, (*horizons, *(OPINION if opinions is not None else ())))
    if options.analogues:
        tell_analogues(decisions, options)
    return decisions._replace(label_end=np.asarray(ends)[decisions.place])


def tell_analogues(decisions: Decisions, options: CoveredCallCandidatesConfig) -> None:
    """Adds them to the context of each decision in the spool."""
    check_rule(options, "analogues")
    spool = decisions.spool
    pool = join_pools([pool_of(spool.block(number), options) for number in range(len(spool.blocks))])
    found = {name: np.full(len(spool), np.nan) for name in ANALOGUES}
    for name, values in analogues_of(pick_pool(pool, decisions.place)).items():
        found[name][decisions.place] = values
    starts = iter(spool.starts)

    def context(columns: Columns) -> dict[str, np.ndarray]:
        its = slice(start := next(starts), start + len(columns))
        own = {name: values for name, values in columns.context.items() if name not in options.context_columns}
        return own | {name: values[its] for name, values in found.items()}

    spool.describe(context)


def known_at(decisions: Decisions, options: CoveredCallCandidatesConfig) -> Known:
    """What the decisions themselves say of their markets, and the files of vols and bars."""

    def of_each(make: Callable[[Columns], np.ndarray]) -> dict[int, Prices]:
        made = [make(decisions.spool.block(number)) for number in range(len(decisions.spool.blocks))]
        numbers = np.concatenate([np.zeros(0), *made])[decisions.place]
        return by_underlying(decisions.underlying, decisions.time, numbers)

    prices, names = by_underlying(decisions.underlying, decisions.time, decisions.spot), decisions.spool.names
    market = series_of("context_vols", options.context_vols, options.iv_lag, names, set(prices))
    return Known(
        prices,
        of_each(vols_at_target),
        None if market is None else {code: Prices(one.time, one.number) for code, one in market.items()},
        bars_of(options, names, set(prices)),
        of_each(lambda columns: columns.context[ATM_IV]) if ATM_IV in options.context_columns else None,
    )


def bars_of(options: CoveredCallCandidatesConfig, names: list[str], underlyings: set[int]) -> dict[int, Bars] | None:
    """By the place of each underlying among the names."""
    if options.ohlcv_files is None:
        return None
    path, given = options.ohlcv_files, (options.bar, options.label_offset_hours)
    return {code: read_bars(path.replace(UNDERLYING, names[code]), names[code], *given) for code in underlyings}


def grounds_for(task: str, decisions: Decisions, numbers: np.ndarray) -> Grounds:
    """What explanations of a task's answers rest on: of these decisions, which their spool then knows."""
    grounds = decisions.spool.grounds
    if task not in grounds:
        parts = map(decisions.columns, decisions.batches(numbers))
        prices = by_underlying(decisions.underlying, decisions.time, decisions.spot)  # all that a formula takes
        grounds[task] = grounds_of(parts, Known(prices, vols={}), task)
    return grounds[task]


def settled(decisions: Decisions, rolls: list[Rolls], options: CoveredCallCandidatesConfig) -> Decisions:
    """The decisions with what computes their outcomes.

    Args:
        rolls: those of rolls_of, of the decisions in the spool's order; emptied.
    """
    names = tuple(decisions.spool.names)
    roll = rolls[0]  # without decisions that roll none is looked up, and together they would take memory
    if TP_AND_ROLL in names:
        roll = Rolls(*(join_calls(parts, decisions.place) for parts in zip(*rolls, strict=True)))
    rolls.clear()  # or all would be in memory twice
    basis = Basis(names, decisions.underlying, decisions.exit_style, decisions.time, decisions.spot, roll)
    spots = Spots(len(names), decisions.underlying, decisions.time, decisions.spot, options)
    terms, fits = settle(basis, spots, recorded_trades(decisions), options)
    return decisions._replace(outcomes=(Replay(basis, terms, options, spots), fits))


def outcomes_of(columns: Columns, replay: Replay, others: Sequence[Replay] = ()) -> tuple[np.ndarray, ...]:
    """(R,) each: the net outcomes of candidates, the costs in them, the net outcomes by other replays, and when the
    last of all is known."""
    found = [one.of_candidates(columns) for one in (replay, *others)]
    net, *early = (net_of(one, replay.options) for one in found)
    costs = np.where(np.isnan(net), np.nan, found[0].costs)
    return net, costs, *early, np.maximum.reduce([one.label_end for one in found])


def join_calls(parts: Sequence[Calls], places: np.ndarray) -> Calls:
    return Calls(*(np.concatenate(arrays)[places] for arrays in zip(*parts, strict=True)))


def recorded_trades(decisions: Decisions) -> Trades:
    """The calls that were sold and have a recorded outcome; of very many decisions those of CHECKED stretches of time,
    evenly apart."""
    parts = list(decisions.batches(decisions.numbers))
    found = [trades_of(decisions.columns(part)) for part in parts[:: max(1, math.ceil(len(parts) / CHECKED))]]
    sales = Sales(*map(np.concatenate, zip(*(trades.sales for trades in found), strict=True)))
    of_sales = (np.concatenate([getattr(one, name) for one in found]) for name in ("exit_style", "recorded"))
    return Trades(sales, *of_sales, frozenset().union(*(one.unsold for one in found)))


def trades_of(columns: Columns) -> Trades:
    rows = columns.offsets[:-1] + columns.chosen
    its = np.flatnonzero(columns.chosen >= 0)
    its = its[~np.isnan(columns.numbers["pnl_vs_hodl"][rows[its]])]
    calls = [columns.numbers[name][rows[its]] for name in Calls._fields]
    sales = Sales(columns.underlying[its], columns.time[its], columns.spot[its], *calls)
    recorded, sold = columns.numbers["pnl_vs_hodl"], columns.chosen[columns.decision_of] == columns.place
    told = ~sold & ~np.isnan(columns.numbers[OUTCOME_DAYS])
    unsold = frozenset(np.unique(columns.exit_style[columns.decision_of[told]]).tolist())
    return Trades(sales, columns.exit_style[its], recorded[rows[its]], unsold)


def hashes_of(data_files: Any) -> dict[str, str]:
    """From a path to its content's hash, as ``fingerprint`` noted it; empty where it has not."""
    found = (data_files or {}).get("train", ())
    return {path: digest for path, (digest,) in zip(found, getattr(found, "origin_metadata", ()), strict=False)}


def say_what_was_filtered(options: CoveredCallCandidatesConfig, present: dict[str, collections.Counter]) -> None:
    for name, rows in present.items():
        left = {value: count for value, count in rows.items() if getattr(options, name) not in (None, value)}
        if left:
            values = ", ".join(f"{shown(value)} ({count:,} rows)" for value, count in sorted(left.items()))
            logger.warning("Left out by %s=%r: %s.", name, getattr(options, name), printable(values))


def check_repeated(repeated: dict[tuple[str, str], list[str]], options: CoveredCallCandidatesConfig) -> None:
    """``repeated`` holds, for two files, the ids of the decisions that both have."""
    if not repeated:
        return
    if options.duplicates == "error":
        (first, second), ids = next(iter(repeated.items()))
        raise CandidatesError(
            f"{first} and {second} both hold decision {ids[0]!r} ({len(ids)} in common). Give one of the two, or keep "
            'the later run of each decision with duplicates="latest" (by the stamp that ends the file name).'
        )
    count = sum(map(len, repeated.values()))
    logger.warning("%d decision(s) stood in two files; the later file's were kept.", count)


def is_later(path: str, other: str) -> bool:
    if stamp(path) == stamp(other):
        raise CandidatesError(
            f"{path} and {other} hold the same decision and carry the same stamp, so neither is the later run. Give "
            "one of the two."
        )
    return stamp(path) > stamp(other)


def stamp(path: str) -> str:
    """The YYYYMMDD_HHMMSS that ends a backtest's file name; it sorts by time."""
    found = re.search(r"_(\d{8}_\d{6})\.csv(\.gz)?$", os.path.basename(path))
    if not found:
        raise CandidatesError(
            f'{path}: duplicates="latest" needs a stamp such as _20251207_225615.csv at the end of the file name. '
            "Rename the file, or leave it out."
        )
    return found.group(1)


def nothing_left(
    paths: list[str], options: CoveredCallCandidatesConfig, present: dict[str, collections.Counter], skipped: int
) -> CandidatesError:
    filters = [f"{name}={shown(getattr(options, name))}" for name in present if getattr(options, name)]
    if skipped or not filters:
        return CandidatesError(f"{', '.join(paths)}: every decision has a bad row. See them with on_bad_rows='error'.")
    found = [f"{name} {shown(', '.join(sorted(values)))[1:-1]}" for name, values in present.items()]
    return CandidatesError(
        f"{', '.join(paths)}: no row is left with {' and '.join(filters)}. The files hold {'; '.join(found)}."
    )
