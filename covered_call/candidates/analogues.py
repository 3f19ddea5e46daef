"""What similar decisions brought, of those whose outcomes were settled before: analogues of a decision.

Nothing here looks past the time that it is asked of: no number changes when an outcome does that was not settled then,
or when anything later is left out.
"""

from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import COUNTERFACTUAL, Columns, timedelta_of
from covered_call.candidates.context import first_of
from covered_call.candidates.context_lines import ANALOGUES, NEIGHBOURS, SPOT
from covered_call.candidates.options import FIT, CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import RECORDS, as_recorded
from covered_call.candidates.schema import CandidatesError

POOL = 2_000  # decisions that are looked through: those that were settled last
OF_BEST = ("dte", "delta", "score", "iv", "ivrv_ratio")  # of the best candidate, beside its strike over spot
NEVER_SETTLED = np.iinfo(np.int64).max


class Pool(NamedTuple):
    """D decisions of all markets by what analogues are found of.

    Args:
        market: (D,) the underlying and the exit style: others' outcomes mean something else.
        time, settled: (D,) microseconds since 1970; NEVER_SETTLED where an outcome is unknown.
        features: (D, F) what is known at the decision; NaN where it is not.
        outcome: (D,) of the best candidate, as a share of spot.
    """

    market: np.ndarray
    time: np.ndarray
    settled: np.ndarray
    features: np.ndarray
    outcome: np.ndarray


def check_rule(options: CoveredCallCandidatesConfig, what: str) -> None:
    """Raises CandidatesError where how outcomes are computed is chosen by recorded trades, later ones among them."""
    chosen = options.settlement == "auto" or (options.settlement == RECORDS and not as_recorded(options))
    if chosen or options.pricing_iv == FIT or options.keep_cut:
        given = "keep_cut" if options.keep_cut else "pricing_iv='fit'" if options.pricing_iv == FIT else "settlement"
        given += f"={options.settlement!r}" if given == "settlement" else ""
        raise CandidatesError(
            f"{what}: with {given} outcomes depend on what was recorded later. Give a settlement that is known "
            "beforehand, teacher, intrinsic, simulated or recorded, and neither pricing_iv='fit' nor keep_cut."
        )


def pool_of(columns: Columns, options: CoveredCallCandidatesConfig) -> Pool:
    """Of decisions with their context and outcomes; the best candidate is the one of the highest score, of equals the
    lowest strike."""
    numbers = columns.numbers
    best = first_of(columns, np.ones(len(columns.decision_of), bool), -numbers["score"])
    own = {name: np.append(numbers[name], np.nan)[best] for name in ("strike", *OF_BEST, COUNTERFACTUAL)}
    spot = np.where(columns.spot > 0, columns.spot, np.nan)
    features = [*(columns.context[name] for name in SPOT), own["strike"] / spot, *(own[name] for name in OF_BEST)]
    outcome = own[COUNTERFACTUAL] / spot
    settled = settled_at(columns, options)[best] if len(columns.label_end) else np.zeros(len(columns), np.int64)
    settled = np.maximum(settled, columns.time + 1)  # of a call that expires at once: no decision is told its own
    settled[np.isnan(outcome)] = NEVER_SETTLED
    market = columns.underlying * np.int64(len(columns.names)) + columns.exit_style
    return Pool(market, columns.time, settled, np.column_stack(features), outcome)


def settled_at(columns: Columns, options: CoveredCallCandidatesConfig) -> np.ndarray:
    """(R,) microseconds since 1970 from which on no later price can change an outcome: its last price is known, and
    the call has expired, for a chain that ended early is not known to have ended where the files end before."""
    days = np.maximum(columns.numbers["dte"], float(options.horizon or 0))
    expired = columns.time[columns.decision_of] + timedelta_of(days)
    return np.maximum(columns.label_end, expired)


def join_pools(pools: list[Pool]) -> Pool:
    return Pool(*map(np.concatenate, zip(*pools, strict=True)))


def pick_pool(pool: Pool, rows: np.ndarray) -> Pool:
    return Pool(*(values[rows] for values in pool))


def analogues_of(pool: Pool, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """(K,) each, by the names of ANALOGUES, of these rows of the pool, or of all; NaN where fewer than NEIGHBOURS
    decisions of the same market were settled, and of one without candidates.

    Memory is bounded by POOL and the pool itself: one decision is looked at after another.
    """
    rows = np.arange(len(pool.time)) if rows is None else rows
    found = {name: np.full(len(rows), np.nan) for name in ANALOGUES}
    for market in np.unique(pool.market[rows]):
        its = np.flatnonzero((pool.market == market) & (pool.settled < NEVER_SETTLED))
        its = its[np.lexsort((pool.time[its], pool.settled[its]))]
        asked = np.flatnonzero((pool.market[rows] == market) & ~np.isnan(pool.features[rows, -1 - len(OF_BEST)]))
        ends = np.searchsorted(pool.settled[its], pool.time[rows[asked]], "right")
        for place, end in zip(asked.tolist(), ends.tolist(), strict=True):
            if end >= NEIGHBOURS:
                past = its[max(0, end - POOL) : end]
                near = past[nearest_of(pool.features[past], pool.features[rows[place]])]
                of_near = ((pool.outcome[near] > 0).sum(), pool.outcome[near].mean())
                for name, value in zip(ANALOGUES, of_near, strict=True):
                    found[name][place] = value
    return found


def nearest_of(past: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The places of the NEIGHBOURS nearest to (F,) numbers among those of (P, F), of equals the first.

    The distance is Euclid's, each number over its standard deviation among the past, which is all that was known. What
    is unknown on one side alone counts as one of these, on both as none, and a number that never varied as none.
    """
    there, has = ~np.isnan(past), ~np.isnan(now)
    count = there.sum(axis=0)
    zeroed = np.where(there, past, 0.0)
    mean = zeroed.sum(axis=0) / np.maximum(count, 1)
    variance = (np.where(there, past - mean, 0.0) ** 2).sum(axis=0) / np.maximum(count - 1, 1)
    varies = variance > 1e-18 * mean**2  # beyond what rounding makes of equal numbers
    scale = np.where(varies, 1 / np.where(varies, variance, 1.0), 0.0)
    apart = np.where(there & has, (zeroed - np.where(has, now, 0.0)) ** 2 * scale, varies * (there != has))
    return np.argsort(apart.sum(axis=1), kind="stable")[:NEIGHBOURS]
