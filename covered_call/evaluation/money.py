"""What each policy brought against holding the coin, judged by groups of decisions.

Groups are never mixed: of two exit styles the outcomes mean different things, and so do those of two underlyings.
"""

import datetime
import math
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import microseconds, time_of
from covered_call.evaluation import metrics
from covered_call.evaluation.cases import Cases, bounds, difference, outcome, regret, years_of
from covered_call.evaluation.metrics import Figure, Played
from covered_call.evaluation.resampling import block_length
from covered_call.evaluation.rows import HODL, TEACHER, Row

ALL = "all"


class Group(NamedTuple):
    """Decisions that are judged together: of one underlying and one exit style all, or a slice of them."""

    underlying: str
    exit_style: str
    name: str
    places: np.ndarray  # (K,) of the decisions that are judged


class Result(NamedTuple):
    """A group's figures by row, and the decision times, (T,) in microseconds since 1970, that they rest on."""

    group: Group
    times: np.ndarray
    block: int
    figures: dict[str, dict[str, Figure]]

    @property
    def first(self) -> datetime.datetime:
        return time_of(int(self.times[0]))

    @property
    def last(self) -> datetime.datetime:
        return time_of(int(self.times[-1]))


def make_groups(cases: Cases, cutoff: datetime.datetime | None) -> list[Group]:
    columns, groups = cases.columns, []
    for code in np.unique(columns.underlying * len(columns.names) + columns.exit_style).tolist():
        market = divmod(code, len(columns.names))
        its = np.flatnonzero((columns.underlying == market[0]) & (columns.exit_style == market[1]))
        slices = {ALL: np.ones(len(its), bool)}
        years = years_of(columns.time[its])
        slices |= {str(year): years == year for year in np.unique(years)}
        after = columns.time[its] > microseconds(cutoff) if cutoff else np.zeros(0)
        slices |= {f"after {cutoff.date()}": after} if cutoff and after.any() else {}
        names = [columns.names[part] for part in market]
        groups += [Group(*names, name, its[rows]) for name, rows in slices.items()]
    return sorted(groups, key=lambda group: group[:2])


def play(row: Row, rule: Row, cases: Cases, places: np.ndarray, times: np.ndarray) -> Played:
    """The arrays that metrics are computed from, for the decisions at ``places``."""
    columns = cases.columns
    of, picks, weight = places, None if row.picks is None else row.picks[places], np.ones(len(places))
    if picks is None:  # each answer that there is
        sizes = np.diff(columns.offsets)[places] + 1
        of, weight = np.repeat(places, sizes), np.repeat(1 / sizes, sizes)
        picks = np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes) - 1
    return Played(
        np.searchsorted(times, columns.time[of]),
        columns.chosen[of] + 1,
        picks + 1,
        weight,
        row.consistent[of],
        row.probabilities[of],
        ~np.isnan(outcome(cases, of, picks)),
        bounds(cases, of, picks),
        regret(cases, of, picks),
        difference(cases, of, picks, columns.chosen[of]),
        difference(cases, of, picks, rule.picks[of]),
    )


def judge(rows: list[Row], rule: Row, cases: Cases, group: Group) -> Result:
    columns, places = cases.columns, group.places
    times, which = np.unique(columns.time[places], return_inverse=True)
    ends = np.zeros(len(times), np.int64)
    np.maximum.at(ends, which, last_expiries(cases)[places])
    block = block_length(times, ends)
    played = {row.name: play(row, rule, cases, places, times) for row in rows}
    return Result(group, times, block, dict(sorted(metrics.figures(played, times, block).items(), key=best_first)))


def best_first(item: tuple[str, dict[str, Figure]]) -> tuple:
    """The teacher and never selling are what the others are measured by: they come last."""
    name, found = item
    return name in (TEACHER, HODL), -found["accuracy"].low, -np.nan_to_num(found["mean_pnl"].low, nan=-math.inf)


def last_expiries(cases):
    from covered_call.candidates.columns import timedelta_of
    from covered_call.evaluation.baselines import tops_of

    c = cases.columns
    dte = tops_of(c.numbers["dte"], c)
    dte[np.isinf(dte)] = 0
    places_max = dte
    return c.time + timedelta_of(places_max)
