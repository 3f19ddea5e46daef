"""The same picks at other costs and at other vols: what they would have earned, and the vol at which nothing."""

import dataclasses
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import Columns
from covered_call.candidates.decisions import Decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import net_of
from covered_call.evaluation.cases import Cases, picked, years_of
from covered_call.evaluation.metrics import Figure
from covered_call.evaluation.rows import Row
from covered_call.resampling import Draws, as_it_was, interval

HALF_SPREAD, FEE = 0.035, 0.0003  # what trading these calls costs on Deribit: the median half-spread, and its fee
COSTS = (0.0, 1.0, 2.0)
VOLS = (0.7, 0.8, 0.9, 1.0)  # of the iv of the files
LEVELS = (0.3, 0.4, 0.5, 0.6, *VOLS, 1.15, 1.3, 1.6, 2.0)  # between which a break-even is looked for


class Scenarios(NamedTuple):
    """(R,) outcomes of the judged candidates for each multiple of the realistic costs, and of the files' vol."""

    costs: dict[float, np.ndarray]
    vols: dict[float, np.ndarray]


def scenarios_of(decisions: Decisions, cases: Cases, options: CoveredCallCandidatesConfig) -> Scenarios:
    """Those of the cases; all unknown where nothing that is computed counts."""
    columns = cases.columns
    if np.isnan(cases.computed).all():
        return Scenarios(*(dict.fromkeys(levels, cases.computed) for levels in (COSTS, LEVELS)))
    costs = {times: dataclasses.replace(options, half_spread=times * HALF_SPREAD, fee=times * FEE) for times in COSTS}
    replay = decisions.replay
    return Scenarios(
        {times: net_of(replay.changed(other).of_candidates(columns), other) for times, other in costs.items()},
        {vol: net_of(replay.changed(vol=vol).of_candidates(columns), options) for vol in LEVELS},
    )


def comparable_places(cases: Cases, scenarios: Scenarios, places: np.ndarray) -> np.ndarray:
    """Those of these decisions at which every outcome is computed in every scenario: there all can be compared."""
    unknown, of = np.zeros(len(cases.columns), bool), cases.columns.decision_of
    for computed in (cases.computed, *scenarios.costs.values(), *scenarios.vols.values()):
        unknown[of[np.isnan(computed)]] = True
    return places[~unknown[places]]


def percents(row: Row, computed: np.ndarray, columns: Columns, places: np.ndarray) -> np.ndarray:
    """(K,) P&L of a policy's answers in % of spot; 0 for no trade."""
    return 100 * picked(computed, columns, places, row.picks[places]) / columns.spot[places]


def mean_percents(
    rows: list[Row],
    outcomes: dict[float, np.ndarray],
    columns: Columns,
    places: np.ndarray,
    times: np.ndarray,
    draws: Draws | None,
) -> dict[str, dict[float, Figure]]:
    """Of each policy the mean P&L a decision in % of spot, for each of the (R,) outcomes."""
    rows = [row for row in rows if not row.at_random]
    time = np.searchsorted(times, columns.time[places])
    values = [percents(row, computed, columns, places) for row in rows for computed in outcomes.values()]
    sums = np.stack([np.bincount(time, one, len(times)) for one in (*values, np.ones(len(places)))], axis=1)
    observed, drawn = as_it_was(len(times)).sums(sums)[0], draws.sums(sums) if draws else None
    found, column = {}, 0
    for row in rows:
        found[row.name] = {}
        for level in outcomes:
            mean = float(observed[column] / observed[-1])
            means = None if drawn is None else drawn[:, column] / drawn[:, -1]
            found[row.name][level] = Figure(mean, mean, None if means is None else interval(means, means))
            column += 1
    return found


class BreakEven(NamedTuple):
    """Of a policy's trades in a year, None for all: their mean iv, and the one at which they would earn nothing on
    average; NaN where that is beyond what was looked at."""

    policy: str
    year: int | None
    trades: int
    iv: float
    break_even: float


def break_evens(rows: list[Row], vols: dict[float, np.ndarray], cases: Cases, places: np.ndarray) -> list[BreakEven]:
    columns, found = cases.columns, []
    for row in rows:
        its = places[:0] if row.at_random else places[row.picks[places] >= 0]
        if not len(its):
            continue
        iv = cases.vol[columns.offsets[its] + row.picks[its]]
        curve = np.stack([percents(row, computed, columns, its) for computed in vols.values()])
        years = years_of(columns.time[its])
        for year in (None, *np.unique(years).tolist()):
            part = np.ones(len(its), bool) if year is None else years == year
            crossing = zero_of(np.array(list(vols)), curve[:, part].mean(1))
            mean = float(iv[part].mean())
            found.append(BreakEven(row.name, year, int(part.sum()), mean, crossing * mean))
    return found


def zero_of(levels: np.ndarray, means: np.ndarray) -> float:
    """Where means, which rise with the level, pass 0; between two levels on a straight line; NaN if nowhere."""
    above = np.flatnonzero((means[:-1] < 0) & (means[1:] >= 0))
    if not len(above):
        return float("nan")
    i = above[-1]
    return float(levels[i] + (levels[i + 1] - levels[i]) * -means[i] / (means[i + 1] - means[i]))
