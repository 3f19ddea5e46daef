"""Pairs of answers to one decision: the one that brought more, and one that brought less."""

import math
import sys
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import COSTS, COUNTERFACTUAL, Columns
from covered_call.candidates.options import CoveredCallCandidatesConfig, PreferenceConfig
from covered_call.candidates.outcomes import as_recorded, has_costs


class Pairs(NamedTuple):
    """Two answers to each of D decisions (a place among its candidates, -1 for NO_TRADE) and their outcomes in USD.

    Both outcomes of a pair are of one source: a teacher that settles otherwise than the formula of the counterfactuals
    would make a recorded outcome minus a counterfactual look like skill.
    """

    has: np.ndarray  # (D,) bool: whether there is a clear pair; if not, the rest says nothing
    chosen: np.ndarray  # (D,) int32
    rejected: np.ndarray  # (D,) int32
    chosen_outcome: np.ndarray  # (D,) float64
    rejected_outcome: np.ndarray  # (D,) float64
    recorded: np.ndarray  # (D,) bool: whether the outcomes are those that the files record; else counterfactuals


def preferred_pairs(columns: Columns, options: PreferenceConfig) -> Pairs:
    """The answer that brought most against the teacher's, or against the worst.

    Which is best is decided by the counterfactuals of all candidates or, where one is unknown, between the teacher's
    call and NO_TRADE. The pair's outcomes are the recorded ones where both have one.
    """
    computed, sold = columns.numbers[COUNTERFACTUAL], columns.chosen
    logged = recorded_outcomes(columns, options)
    has_recorded = ~np.isnan(logged)
    all_known = np.ones(len(columns), bool)
    all_known[columns.decision_of[np.isnan(computed)]] = False
    best = np.where(all_known, best_places(computed, columns), np.where(logged > 0, sold, -1))
    worst = np.where(all_known, best_places(-computed, columns), np.where(logged < 0, sold, -1))
    teachers = np.where(all_known | has_recorded, sold, best)
    rejected = worst if options.rejected == "worst" else np.where(teachers == best, worst, teachers)
    recorded = has_recorded & ((best == sold) | (best < 0)) & ((rejected == sold) | (rejected < 0))
    outcomes = [np.where(recorded & (side >= 0), logged, at(side, computed, columns)) for side in (best, rejected)]
    with np.errstate(over="ignore"):
        gain, share = outcomes[0] - outcomes[1], options.min_edge_pct / 100 * columns.spot
    clear = (gain > as_float(options.min_edge)) & (gain > share)
    return Pairs(clear, best.astype(np.int32), rejected.astype(np.int32), *outcomes, recorded)


def recorded_outcomes(columns: Columns, options: CoveredCallCandidatesConfig) -> np.ndarray:
    """(D,) the recorded P&L vs HODL of the calls that were sold, net of costs; NaN where unknown, see
    outcomes.recorded_outcome."""
    if not as_recorded(options):
        return np.full(len(columns), np.nan)
    net = columns.numbers["pnl_vs_hodl"] - (columns.numbers[COSTS] if has_costs(options) else 0.0)
    return at(columns.chosen, net, columns, otherwise=np.nan)


def at(places: np.ndarray, values: np.ndarray, columns: Columns, otherwise: float = 0.0) -> np.ndarray:
    """(D,) of (R,) values those at these (D,) places; where there is none, below 0, ``otherwise``."""
    found, is_call = np.full(len(columns), otherwise), places >= 0
    found[is_call] = values[columns.offsets[:-1][is_call] + places[is_call]]
    return found


def best_places(values: np.ndarray, columns: Columns) -> np.ndarray:
    """(D,) int64: the place of the largest of (R,) values, -1 where none is above the 0 of NO_TRADE; of equals the
    first."""
    offered = np.diff(columns.offsets) > 0
    most = np.zeros(len(columns))
    most[offered] = np.fmax.reduceat(values, columns.offsets[:-1][offered]) if offered.any() else 0.0
    found = np.flatnonzero(values == most[columns.decision_of])[::-1]  # backwards, so that the first is written last
    best = np.full(len(columns), -1)
    best[columns.decision_of[found]] = columns.place[found]
    return np.where(most > 0, best, -1)


def as_float(number: float) -> float:
    """An integer beyond all floats as infinity."""
    return float(number) if number <= sys.float_info.max else math.inf
