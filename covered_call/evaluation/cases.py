"""What each answer to a decision would have brought, in USD a unit of underlying, and where that is not known."""

import math
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import COUNTERFACTUAL, Columns, label_ends
from covered_call.candidates.decisions import Decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.preferences import at, best_places, recorded_outcomes
from covered_call.candidates.pricing import DAYS_PER_YEAR, black_scholes_call
from covered_call.candidates.terms import Fit


class Cases(NamedTuple):
    """D decisions with their R candidates, what the teacher did, and what is known of each outcome; NaN where unknown.

    ``worst`` and ``best`` are the extremes of what the teacher's calls brought in that year, of that underlying and
    exit style: in all years if nothing is known of that one, NaN if nothing is known at all.
    """

    columns: Columns
    recorded: np.ndarray  # (D,) the teacher's own outcome
    computed: np.ndarray  # (R,)
    worst: np.ndarray  # (D,)
    best: np.ndarray  # (D,)
    vol: np.ndarray  # (R,) at which each call is priced, as a fraction a year
    premium: np.ndarray  # (R,) of each call before costs: its Black-Scholes value at that vol
    label_end: np.ndarray  # (D,) microseconds since 1970: when the last of its outcomes is known

    @property
    def by_record(self) -> np.ndarray:
        """(D,) bool: whether answers are judged by recorded outcomes, for the teacher's call has no computed one.

        The teacher's settlement may differ from the formula of computed outcomes; so of one decision all answers are
        judged by outcomes of one kind, and a figure of one policy minus that of another is their difference.
        """
        chosen = at(self.columns.chosen, self.computed, self.columns, math.nan)
        return np.isnan(chosen) & ~np.isnan(self.recorded)


class Recorded(NamedTuple):
    """Of all decisions of a backtest, (D,) each: where and when, and the outcome of the call that was sold, net of
    costs; NaN where unknown."""

    underlying: np.ndarray
    exit_style: np.ndarray
    time: np.ndarray
    recorded: np.ndarray

    def take(self, places: np.ndarray) -> "Recorded":
        return Recorded(*(values[places] for values in self))


def recorded_of(decisions: Decisions, config: CoveredCallCandidatesConfig) -> Recorded:
    """A part of the decisions is in memory at a time."""
    parts = [sold_outcomes(decisions.columns(numbers), config) for numbers in decisions.batches(decisions.numbers)]
    return Recorded(decisions.underlying, decisions.exit_style, decisions.time, np.concatenate([np.zeros(0), *parts]))


def sold_outcomes(columns: Columns, config: CoveredCallCandidatesConfig) -> np.ndarray:
    """(D,) of the calls that were sold: what was recorded or, where that is unknown or means something else, what is
    computed."""
    recorded = recorded_outcomes(columns, config)
    return np.where(
        np.isnan(recorded), at(columns.chosen, columns.numbers[COUNTERFACTUAL], columns, math.nan), recorded
    )


def make_cases(decisions: Decisions, columns: Columns, config: CoveredCallCandidatesConfig) -> Cases:
    """Of some of the decisions of a backtest, with extremes from all of them; computed outcomes are there where they
    follow the recorded ones."""
    of_all, recorded = recorded_of(decisions, config), recorded_outcomes(columns, config)
    known = of_all.take(np.flatnonzero(~np.isnan(of_all.recorded)))
    worst, best = np.full((2, len(columns)), math.nan)
    for yearly in (False, True):  # that of the year goes over that of all years
        key, asked = market_of(known, yearly), market_of(columns, yearly)
        markets, place = np.unique(key, return_inverse=True)
        if len(markets):
            found = np.minimum(np.searchsorted(markets, asked), len(markets) - 1)
            has = markets[found] == asked
            for extreme, fold, begin in ((worst, np.minimum, math.inf), (best, np.maximum, -math.inf)):
                extremes = np.full(len(markets), begin)
                fold.at(extremes, place, known.recorded)
                extreme[has] = extremes[found[has]]
    vol, numbers, spot = decisions.replay.vols_of(columns), columns.numbers, columns.spot[columns.decision_of]
    premium = black_scholes_call(spot, numbers["strike"], numbers["dte"] / DAYS_PER_YEAR, vol)
    computed = trusted(columns, decisions.fits)
    return Cases(columns, recorded, computed, worst, best, vol, premium, label_ends(columns))


def market_of(decisions: Columns | Recorded, yearly: bool = False) -> np.ndarray:
    """(D,) int64: a number for each underlying and exit style, and year."""
    market = decisions.underlying.astype(np.int64) * CODES + decisions.exit_style
    return market * CODES + years_of(decisions.time) if yearly else market


CODES = 1 << 20  # more than there are names, or years


def years_of(time: np.ndarray) -> np.ndarray:
    return time.astype("datetime64[us]").astype("datetime64[Y]").astype(int) + 1970


# ---------------------------------------------------------------------------------------------------------------------
# Of E answers: (E,) the decisions that they are to, and (E,) picks, -1 for no trade


def outcome(cases: Cases, of: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """(E,) 0 for no trade, else what is computed or, where the decision is judged by records, what was recorded of the
    teacher's call; NaN where unknown."""
    recorded = np.where(picks == cases.columns.chosen[of], cases.recorded[of], math.nan)
    by_record = cases.by_record[of] & (picks >= 0)
    return np.where(by_record, recorded, computed_for(cases, of, picks))


def computed_for(cases: Cases, of: np.ndarray, picks: np.ndarray) -> np.ndarray:
    return picked(cases.computed, cases.columns, of, picks)


def picked(values: np.ndarray, columns: Columns, of: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """(E,) of (R,) values those of the calls that are sold, 0 for no trade."""
    found, sold = np.zeros(len(of)), picks >= 0
    found[sold] = values[columns.offsets[of[sold]] + picks[sold]]
    return found


def bounds(cases: Cases, of: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """(E, 2) least and most of an outcome: itself where it is known, else the year's worst and best recorded one."""
    known = outcome(cases, of, picks)
    return np.stack([np.where(np.isnan(known), side[of], known) for side in (cases.worst, cases.best)], axis=1)


def difference(cases: Cases, of: np.ndarray, picks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(E, 2) bounds of the P&L of one answer minus another's; 0 where they are the same, known or not."""
    mine, its = (bounds(cases, of, answers).T for answers in (picks, others))
    found = np.stack([mine[0] - its[1], mine[1] - its[0]], axis=1)
    return np.where((picks == others)[:, None], 0.0, found)


def regret(cases: Cases, of: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """(E,) what the best answer, no trade included, would have added, all as computed; NaN where one is unknown."""
    best = at(best_places(cases.computed, cases.columns), cases.computed, cases.columns)
    best[cases.columns.decision_of[np.isnan(cases.computed)]] = math.nan
    return best[of] - computed_for(cases, of, picks)


Market = tuple[str, str]  # an underlying and an exit style


def markets_of(decisions: Columns | Recorded, names: tuple[str, ...]) -> dict[Market, np.ndarray]:
    """(D,) bool for each market: which of the decisions are of it."""
    found = {}
    for code in np.unique(market_of(decisions)).tolist():
        underlying, style = divmod(code, CODES)
        its = (decisions.underlying == underlying) & (decisions.exit_style == style)
        found[names[underlying], names[style]] = its
    return dict(sorted(found.items()))


def trusted(columns: Columns, fits: dict[Market, Fit]) -> np.ndarray:
    """(R,) the computed outcomes, NaN in markets where they do not follow the recorded ones."""
    computed = columns.numbers[COUNTERFACTUAL].copy()
    for market, its in markets_of(columns, columns.names).items():
        if market in fits and not fits[market].trusted:
            computed[its[columns.decision_of]] = math.nan
    return computed
