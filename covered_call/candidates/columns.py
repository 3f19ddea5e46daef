"""Decisions in columns: what a million of them is kept in, where one alone is a LoggedDecision."""

import dataclasses
import datetime
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from covered_call.candidates.schema import (
    UTC,
    Candidate,
    CandidatesError,
    Context,
    Counterfactual,
    Decision,
    LoggedDecision,
    Opinion,
    Outcome,
    shown,
)

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)
STATE, LOGGED = Candidate._fields[1:], Outcome._fields
RECORDED, OUTCOME_DAYS = LOGGED[:-1], LOGGED[-1]
COUNTERFACTUAL, COSTS = "counterfactual_pnl_vs_hodl", "counterfactual_costs"
# What an Opinion says of a candidate, where opinions are told: % of spot, a probability, microseconds since 1970.
OPINION = ("opinion_expected", "opinion_positive", "opinion_fitted_before")


class Grounds(NamedTuple):
    """What explanations take beside a decision itself; see explanations.grounds_of.

    Args:
        formula: which gives the scores; None if none is known to.
        cuts: of "trade" and "other" answers, the scores at which a third and two thirds of the training split's lie.
    """

    formula: str | None
    cuts: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Columns:
    """D decisions and their R candidates; those of decision i are the rows offsets[i] to offsets[i + 1].

    Money is in USD; a number that is not known is NaN.
    """

    names: tuple[str, ...]  # of underlyings and exit styles: the next two are places in it
    underlying: np.ndarray  # (D,) int32
    exit_style: np.ndarray  # (D,) int32
    time: np.ndarray  # (D,) int64, microseconds since 1970, UTC
    spot: np.ndarray  # (D,) float64
    chosen: np.ndarray  # (D,) int32: the place of the call that was sold, from 0; -1 for no trade
    offsets: np.ndarray  # (D + 1,) int64
    instrument: pa.StringArray  # (R,)
    numbers: dict[str, np.ndarray]  # (R,) float64, by the names of STATE, LOGGED, COUNTERFACTUAL, COSTS, and OPINION
    label_end: np.ndarray  # (R,) int64, microseconds since 1970, UTC: of the last price that an outcome rests on
    context: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # (D,) float64 each, of the market
    grounds: dict[str, Grounds] = dataclasses.field(default_factory=dict)  # by task, if answers are to be explained

    def __len__(self) -> int:
        return len(self.time)

    @functools.cached_property
    def decision_of(self) -> np.ndarray:
        """(R,) int64: the decision of each candidate."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @functools.cached_property
    def place(self) -> np.ndarray:
        """(R,) int64: the place of each candidate among those of its decision, from 0."""
        return np.arange(len(self.decision_of)) - self.offsets[self.decision_of]

    def renamed(self, names: list[str]) -> "Columns":
        """The same with the names of others, to which those that they lack are added."""
        places = places_among(names, self.names)
        return dataclasses.replace(
            self, names=tuple(names), underlying=places[self.underlying], exit_style=places[self.exit_style]
        )

    def take(self, places: np.ndarray) -> "Columns":
        """The decisions at these places."""
        sizes = np.diff(self.offsets)[places]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        rows = np.repeat(self.offsets[places] - offsets[:-1], sizes) + np.arange(offsets[-1])
        by_decision: dict = {name: getattr(self, name)[places] for name in BY_DECISION}
        by_decision["context"] = {name: values[places] for name, values in self.context.items()}
        return dataclasses.replace(self, **by_decision, offsets=offsets).with_rows(rows, self)

    def with_rows(self, rows: np.ndarray, of: "Columns") -> "Columns":
        """The same decisions with the candidates that stand at these rows of another."""
        numbers = {name: values[rows] for name, values in of.numbers.items()}
        return dataclasses.replace(
            self, instrument=of.instrument.take(pa.array(rows)), numbers=numbers, label_end=of.label_end[rows]
        )


def places_among(names: list[str], others: Sequence[str]) -> np.ndarray:
    """int32: where the others stand among the names, to which those that they lack are added."""
    names += [name for name in others if name not in names]
    return np.array([names.index(name) for name in others], np.int32)


def label_ends(columns: Columns) -> np.ndarray:
    """(D,) the last of each decision's candidates, or its own time where it has none."""
    ends, offered = columns.time.copy(), np.diff(columns.offsets) > 0
    if offered.any():
        ends[offered] = np.maximum.reduceat(columns.label_end, columns.offsets[:-1][offered])
    return ends


def join(parts: Sequence[Columns]) -> Columns:
    """The decisions of all parts, which have the same names."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([part.offsets[-1] for part in parts])
    offsets = [part.offsets[1:] + end - part.offsets[-1] for part, end in zip(parts, ends, strict=True)]
    return Columns(
        parts[0].names,
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in BY_DECISION},
        offsets=np.concatenate([[0], *offsets]),
        instrument=pa.concat_arrays([part.instrument for part in parts]),
        numbers={name: np.concatenate([part.numbers[name] for part in parts]) for name in parts[0].numbers},
        label_end=np.concatenate([part.label_end for part in parts]),
        context={name: np.concatenate([part.context[name] for part in parts]) for name in parts[0].context},
        grounds=parts[0].grounds,
    )


ROWS = 16_384  # candidates that are looked at together: as texts some 10 MB


def in_batches(sizes: np.ndarray, rows: int | None = None) -> list[tuple[int, int]]:
    """Where parts of about so many candidates begin and end; ``sizes`` (D,) says how many each decision has."""
    if not len(sizes):
        return []
    part = np.cumsum(sizes + 1)  # for the prompts of one without candidates take room, too
    part //= rows or ROWS  # in place: of very many decisions an array less
    starts = (np.flatnonzero(part[1:] != part[:-1]) + 1).tolist()
    return list(itertools.pairwise([0, *starts, len(sizes)]))


BY_DECISION = ("underlying", "exit_style", "time", "spot", "chosen")


def columns_of(logged: Sequence[LoggedDecision]) -> Columns:
    """Decisions as columns; what has no counterfactual gets one that is unknown."""
    names = tuple(dict.fromkeys(name for entry in logged for name in entry.decision[1:3]))
    codes = {name: place for place, name in enumerate(names)}
    decisions = [entry.decision for entry in logged]
    candidates = [candidate for decision in decisions for candidate in decision.candidates]
    outcomes = [outcome for entry in logged for outcome in entry.outcomes]
    found = [
        entry.counterfactuals or [Counterfactual(None, EPOCH)] * len(entry.decision.candidates) for entry in logged
    ]
    counterfactuals = [one for its in found for one in its]
    numbers = {name: floats(getattr(candidate, name) for candidate in candidates) for name in STATE}
    numbers |= {name: floats(getattr(outcome, name) for outcome in outcomes) for name in LOGGED}
    numbers[COUNTERFACTUAL] = floats(one.pnl_vs_hodl for one in counterfactuals)
    numbers[COSTS] = floats(one.costs for one in counterfactuals)
    if any(decision.opinion is not None for decision in decisions):
        numbers |= opinions_in(decisions)
    return Columns(
        names,
        np.array([codes[decision.underlying] for decision in decisions], np.int32),
        np.array([codes[decision.exit_style] for decision in decisions], np.int32),
        np.array([microseconds(decision.decision_time) for decision in decisions], np.int64),
        floats(decision.spot for decision in decisions),
        np.array([-1 if entry.chosen is None else entry.chosen for entry in logged], np.int32),
        np.cumsum([0, *(len(decision.candidates) for decision in decisions)], dtype=np.int64),
        pa.array([candidate.instrument for candidate in candidates], pa.string()),
        numbers,
        np.array([microseconds(one.label_end) for one in counterfactuals], np.int64),
        contexts_in([decision.context for decision in decisions]),
    )


def opinions_in(decisions: Sequence[Decision]) -> dict[str, np.ndarray]:
    """(R,) each, by the names of OPINION; NaN where there is none."""
    rows, unknown = [], (None, None)
    for decision in decisions:
        before, of = decision.opinion or Opinion(None, {})
        for candidate in decision.candidates:
            said = of.get(candidate.instrument)
            rows.append((*(said or unknown), None if before is None or said is None else microseconds(before)))
    return {name: floats(row[place] for row in rows) for place, name in enumerate(OPINION)}


def opinion_of(instruments: Sequence[str], expected: Sequence, positive: Sequence, before: Sequence) -> Opinion:
    """From what one decision's rows say; None where unknown."""
    rows = zip(instruments, expected, positive, strict=True)
    of = {name: (one, other) for name, one, other in rows if one is not None and other is not None}
    time = next((one for one in before if one is not None), None)
    return Opinion(None if time is None or not of else time_of(int(time)), of)


def contexts_in(contexts: Sequence[Context | None]) -> dict[str, np.ndarray]:
    """(D,) each: what contexts say, by name, words as numbers; NaN where one does not say it."""
    names = dict.fromkeys(name for context in contexts for name in context or ())
    return {name: floats(number_of_word(name, (context or {}).get(name)) for context in contexts) for name in names}


# What the words of a context are kept as: their places, the middle one of which is 0. So they have an order, which
# trees and regressions can use.
CONTEXT_WORDS = {
    "regime": ("bear", "sideways", "bull"),
    "trend_5d": ("down", "slight_down", "sideways", "slight_up", "up"),
    "volume_class": ("very_low", "low", "normal", "high", "very_high"),
    "spread_class": ("narrow", "normal", "wide"),
    "wick": ("lower", "none", "upper"),
    "effort": ("anomaly", "neutral", "validation"),
    "longer_trend": ("down", "slight_down", "sideways", "slight_up", "up"),
}


def word_of(name: str, value: float | None) -> str | None:
    """The word that a number of CONTEXT_WORDS stands for."""
    words = CONTEXT_WORDS[name]
    return None if value is None else words[int(value) + len(words) // 2]


def number_of_word(name: str, value: float | str | None) -> float | None:
    """The same backwards; of another name the value itself."""
    if not isinstance(value, str):
        return value
    words = CONTEXT_WORDS.get(name, ())
    if value not in words:
        raise CandidatesError(f"context {name}: {shown(value)} is none of {', '.join(words) or 'its numbers'}.")
    return words.index(value) - len(words) // 2


def words_of(name: str, values: np.ndarray) -> list[float | str | None]:
    """Numbers as Python has them, those of CONTEXT_WORDS as words."""
    return [word_of(name, value) for value in known(values)] if name in CONTEXT_WORDS else known(values)


def contexts_of(columns: Columns) -> list[Context | None]:
    """Of each decision its own, words as words."""
    if not columns.context:
        return [None] * len(columns)
    said = [words_of(name, values) for name, values in columns.context.items()]
    return [dict(zip(columns.context, row, strict=True)) for row in zip(*said, strict=True)]


def logged_of(columns: Columns) -> list[LoggedDecision]:
    """The decisions one by one."""
    rows = zip(columns.instrument.to_pylist(), *(known(columns.numbers[name]) for name in STATE), strict=True)
    candidates = [Candidate(*row) for row in rows]
    outcomes = [Outcome(*row) for row in zip(*(known(columns.numbers[name]) for name in LOGGED), strict=True)]
    ends = map(time_of, columns.label_end.tolist())
    computed = (known(columns.numbers[COUNTERFACTUAL]), ends, known(columns.numbers[COSTS]))
    counterfactuals = [Counterfactual(*row) for row in zip(*computed, strict=True)]
    offsets = columns.offsets.tolist()
    names, fields = columns.names, [getattr(columns, name).tolist() for name in BY_DECISION]
    contexts = contexts_of(columns)
    said = [known(columns.numbers[name]) for name in OPINION if name in columns.numbers]
    logged = []
    of_each = zip(*fields, contexts, strict=True)
    for place, (underlying, exit_style, time, spot, chosen, context) in enumerate(of_each):
        its = slice(offsets[place], offsets[place + 1])
        own = tuple(candidates[its])
        opinion = opinion_of([one.instrument for one in own], *(values[its] for values in said)) if said else None
        decision = Decision(time_of(time), names[underlying], names[exit_style], spot, own, context, opinion)
        sold = None if chosen < 0 else chosen
        logged.append(LoggedDecision(decision, sold, tuple(outcomes[its]), tuple(counterfactuals[its])))
    return logged


def floats(values) -> np.ndarray:
    """Numbers as float64, None as NaN."""
    return np.array(list(values), dtype=np.float64)


def known(values: np.ndarray) -> list:
    """Floats as Python has them, NaN as None."""
    unknown, found = np.flatnonzero(np.isnan(values)), values.tolist()
    for place in unknown.tolist():
        found[place] = None
    return found


def microseconds(time: datetime.datetime) -> int:
    return (time - EPOCH) // datetime.timedelta(microseconds=1)


def ascend(time: np.ndarray) -> bool:
    """Whether each of (D,) times is later than the one before."""
    return bool((time[1:] > time[:-1]).all())  # np.diff would be an array as large


def timedelta_of(days: np.ndarray) -> np.ndarray:
    """Microseconds as datetime.timedelta(days=...) has them, which rounds the fraction of a day alone."""
    fraction, whole = np.modf(days)
    return whole.astype(np.int64) * DAY + np.rint(fraction * DAY).astype(np.int64)


DAY = 86_400_000_000  # microseconds


@functools.lru_cache(maxsize=65_536)
def time_of(time: int) -> datetime.datetime:
    return EPOCH + datetime.timedelta(microseconds=time)
