"""What each policy brought against holding the coin, judged by groups of decisions.

Groups are never mixed: of two exit styles the outcomes mean different things, and so do those of two underlyings.
"""

import datetime
import math
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import DAY, Columns, microseconds, time_of
from covered_call.evaluation import metrics
from covered_call.evaluation.cases import Cases, bounds, difference, markets_of, outcome, picked, regret, years_of
from covered_call.evaluation.metrics import NO_BELIEFS, Beliefs, Figure, Played
from covered_call.evaluation.rows import HODL, TEACHER, Row
from covered_call.resampling import overlaps

ALL = "all"
YEAR = 365.25 * DAY  # microseconds


class Group(NamedTuple):
    """Decisions that are judged together: of one underlying and one exit style all, or a slice of them."""

    underlying: str
    exit_style: str
    name: str
    places: np.ndarray  # (K,) of the decisions that are judged


class Held(NamedTuple):
    """How much the decisions of a group overlap: coins tied up, each from a decision to its label end; and by which
    kind of outcome decisions are judged."""

    mean: float  # from the first decision to the last label end
    most: int  # at once
    by_record: int  # decisions that are judged by recorded outcomes; the others by computed ones


class Result(NamedTuple):
    """A group's figures by row, and the decision times, (T,) in microseconds since 1970, that they rest on."""

    group: Group
    times: np.ndarray
    block: int
    figures: dict[str, dict[str, Figure]]
    held: Held

    @property
    def first(self) -> datetime.datetime:
        return time_of(int(self.times[0]))

    @property
    def last(self) -> datetime.datetime:
        return time_of(int(self.times[-1]))


def make_groups(cases: Cases, cutoff: datetime.datetime | None, regimes: dict[str, np.ndarray]) -> list[Group]:
    columns, groups = cases.columns, []
    for market, inside in markets_of(columns, columns.names).items():
        its = np.flatnonzero(inside)
        slices = {ALL: np.ones(len(its), bool)}
        years = years_of(columns.time[its])
        slices |= {str(year): years == year for year in np.unique(years)}
        after = columns.time[its] > microseconds(cutoff) if cutoff else np.zeros(0)
        slices |= {f"after {cutoff.date()}": after} if cutoff and after.any() else {}
        slices |= {name: of_it[its] for name, of_it in regimes.items() if of_it[its].any()}
        groups += [Group(*market, name, its[rows]) for name, rows in slices.items()]
    return groups


def play(row: Row, rule: Row, cases: Cases, places: np.ndarray, times: np.ndarray) -> Played:
    """The arrays that metrics are computed from, for the decisions at ``places``."""
    columns = cases.columns
    of, picks, weight = places, row.picks, np.ones(len(places))
    if row.at_random:  # each answer that there is
        sizes = np.diff(columns.offsets)[places] + 1
        of, weight = np.repeat(places, sizes), np.repeat(1 / sizes, sizes)
        picks = np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes) - 1
    else:
        picks = picks[places]
    return Played(
        np.searchsorted(times, columns.time[of]),
        columns.chosen[of] + 1,
        picks + 1,
        weight,
        row.consistent[of],
        ~np.isnan(outcome(cases, of, picks)),
        bounds(cases, of, picks),
        regret(cases, of, picks),
        difference(cases, of, picks, columns.chosen[of]),
        difference(cases, of, picks, rule.picks[of]),
        columns.spot[of],
        premium_of(cases, of, picks),
        (cases.label_end - columns.time)[of] / YEAR,
        beliefs_of(row, columns, places, times),
    )


def premium_of(cases: Cases, of: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """(E,) of each call that is sold, 0 for no trade."""
    return picked(cases.premium, cases.columns, of, picks)


def beliefs_of(row: Row, columns: Columns, places: np.ndarray, times: np.ndarray) -> Beliefs:
    if row.said is None:
        return NO_BELIEFS
    its = np.isin(row.said.of, places)
    of, probability, right = (values[its] for values in row.said)
    return Beliefs(np.searchsorted(times, columns.time[of]), probability, right)


def judge(rows: list[Row], rule: Row, cases: Cases, group: Group) -> Result:
    columns, places = cases.columns, group.places
    times, _, block = overlaps(columns.time[places], cases.label_end[places])
    played = {row.name: play(row, rule, cases, places, times) for row in rows}
    figures = metrics.figures(played, times, block)
    return Result(group, times, block, dict(sorted(figures.items(), key=best_first)), held(cases, places))


def held(cases: Cases, places: np.ndarray) -> Held:
    begins, ends = np.sort(cases.columns.time[places]), np.sort(cases.label_end[places])
    open_then = np.arange(1, len(begins) + 1) - np.searchsorted(ends, begins, side="left")
    span = max(int(ends[-1] - begins[0]), 1)
    return Held(float((ends - begins).sum() / span), int(open_then.max()), int(cases.by_record[places].sum()))


def best_first(item: tuple[str, dict[str, Figure]]) -> tuple:
    """The teacher and never selling are what the others are measured by: they come last."""
    name, found = item
    return name in (TEACHER, HODL), -found["accuracy"].low, -np.nan_to_num(found["mean_percent"].low, nan=-math.inf)
