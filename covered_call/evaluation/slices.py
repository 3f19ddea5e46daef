"""Where the money comes from: regimes of the market at the decisions, and buckets of the calls that are sold."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from covered_call.candidates.columns import DAY, Columns
from covered_call.candidates.decisions import Decisions
from covered_call.evaluation.cases import Cases, outcome
from covered_call.evaluation.metrics import Figure
from covered_call.evaluation.rows import Row
from covered_call.resampling import Draws, as_it_was, interval, share

WINDOW = 30  # days, of trend and realised vol
DAYS_PER_YEAR = 365
TREND = ("30-day trend up", "30-day trend down")
VOL = ("low realised vol", "middle realised vol", "high realised vol")
BUCKETS = {
    "delta": ((0.0, 0.15), (0.15, 0.2), (0.2, 0.25), (0.25, 0.3), (0.3, 0.35), (0.35, 1.0)),
    "dte": ((0.0, 3.0), (3.0, 7.0), (7.0, 14.0), (14.0, 30.0), (30.0, math.inf)),
}


def regimes(decisions: Decisions, columns: Columns) -> dict[str, np.ndarray]:
    """(D,) bool for each regime: which of the judged decisions fall into it, by what was known at their time.

    The trend is the sign of the return over WINDOW days; realised vols are cut into thirds of the judged decisions of
    that underlying. A decision with a shorter history than that is in none.
    """
    trend, vol = np.full((2, len(columns)), math.nan)
    third = np.full(len(columns), -1)
    for code in np.unique(columns.underlying).tolist():
        history = decisions.underlying == code
        daily = daily_states(decisions.time[history], decisions.spot[history])
        its = columns.underlying == code
        found = daily.reindex(columns.time[its] // DAY)
        trend[its], vol[its] = found["trend"], found["vol"]
        known = its & ~np.isnan(vol)
        if known.any():
            third[known] = np.searchsorted(np.quantile(vol[known], (1 / 3, 2 / 3)), vol[known], side="left")
    return dict(zip(TREND, (trend >= 0, trend < 0), strict=True)) | {name: third == i for i, name in enumerate(VOL)}


def daily_states(time: np.ndarray, spot: np.ndarray) -> pd.DataFrame:
    """By day since 1970 the return and the realised vol of the WINDOW days before, from each day's first spot."""
    priced = spot > 0
    first = pd.Series(spot[priced], index=time[priced] // DAY).groupby(level=0).first()
    if first.empty:
        return pd.DataFrame({"trend": [], "vol": []}, dtype=float)
    days = first.reindex(range(first.index[0], first.index[-1] + 1))
    returns = days.map(math.log).diff()
    vol = returns.rolling(WINDOW, min_periods=2 * WINDOW // 3).std() * math.sqrt(DAYS_PER_YEAR)
    return pd.DataFrame({"trend": days / days.shift(WINDOW) - 1, "vol": vol})


class Bucket(NamedTuple):
    """The calls that a policy sold in a range of delta or dte: how many with a known outcome, and what one brought on
    average, in % of spot."""

    policy: str
    kind: str
    low: float
    high: float
    trades: int
    percent: Figure


MIN_TRADES = 10  # of a bucket, for an interval


def buckets(rows: list[Row], cases: Cases, places: np.ndarray, times: np.ndarray, draws: Draws | None) -> list[Bucket]:
    """Those that are not empty, policy by policy."""
    asked = [
        (row, kind, low, high) for row in rows if not row.at_random for kind in BUCKETS for low, high in BUCKETS[kind]
    ]
    sums = np.concatenate([sums_of(cases, places, times, *one) for one in asked], axis=1)
    observed, drawn = as_it_was(len(times)).sums(sums)[0], draws.sums(sums) if draws else None
    found = []
    for i, (row, kind, low, high) in enumerate(asked):
        total, trades = observed[2 * i : 2 * i + 2].tolist()
        if trades:
            enough = drawn is not None and trades >= MIN_TRADES
            means = share(*drawn[:, 2 * i : 2 * i + 2].T) if enough else None
            percent = Figure(total / trades, total / trades, None if means is None else interval(means, means))
            found.append(Bucket(row.name, kind, low, high, int(trades), percent))
    return found


def sums_of(
    cases: Cases, places: np.ndarray, times: np.ndarray, row: Row, kind: str, low: float, high: float
) -> np.ndarray:
    """(T, 2): P&L in % of spot, and trades, of a policy in a bucket, which holds its lower end."""
    columns, picks = cases.columns, row.picks[places]
    of, picks = places[picks >= 0], picks[picks >= 0]
    value = np.abs(columns.numbers[kind][columns.offsets[of] + picks])
    percent = 100 * outcome(cases, of, picks) / columns.spot[of]
    inside = (low <= value) & (value < high) & ~np.isnan(percent)
    time = np.searchsorted(times, columns.time[of[inside]])
    sides = (percent[inside], np.ones(inside.sum()))
    return np.stack([np.bincount(time, weights, len(times)) for weights in sides], axis=1)
