"""Counterfactual outcomes: of every candidate, sold or not, from the prices of the files' own later decisions.

They are labels and stand in columns; no prompt is rendered from them. NO_TRADE brings 0: the coin is held either way.
"""

import bisect
import collections
import datetime
import math
from typing import NamedTuple

import numpy as np
from datasets.utils import tqdm
from scipy.special import ndtr

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import UTC, Candidate, Counterfactual, Decision, LoggedDecision

HOLD_TO_EXPIRY, TP_AND_ROLL = "hold_to_expiry", "tp_and_roll"
DAYS_PER_YEAR = 365
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)
SECOND = 1_000_000  # microseconds
DAY = 86_400 * SECOND


def black_scholes_call(spot, strike, years, iv):
    """Value of a European call in USD at interest rate 0 (Black and Scholes 1973); iv as a fraction a year.

    Takes numbers or arrays. Without time or vol it is the intrinsic value.
    """
    deviation = np.maximum(iv * np.sqrt(years), 1e-12)
    d1 = (np.log(spot) - np.log(strike)) / deviation + deviation / 2
    return spot * ndtr(d1) - strike * ndtr(d1 - deviation)


def trading_cost(price: float, spot: float, options: CoveredCallCandidatesConfig) -> float:
    """USD that selling or buying back one call at ``price`` costs: fee, half the spread, and slippage.

    Deribit's fee is 0.0003 of the underlying, at most 12.5 % of the option's price.
    """
    return min(options.fee * spot, options.fee_cap * price) + options.half_spread * price + options.slippage * spot


class Market:
    """Spots and chains by time (in microseconds since 1970), from the decisions of the files themselves."""

    def __init__(self, logged: list[LoggedDecision], options: CoveredCallCandidatesConfig):
        self.tolerance = round(options.expiry_tolerance * 3600 * SECOND)
        spots, self.chains = collections.defaultdict(dict), {}
        for decision in (entry.decision for entry in logged):
            time = microseconds(decision.decision_time)
            if decision.spot > 0:  # a placeholder row may have none
                spots[decision.underlying][time] = decision.spot
            self.chains[time, decision.underlying, decision.exit_style] = decision.candidates
        self.times = {name: np.array(sorted(by_time)) for name, by_time in spots.items()}
        self.spots = {name: np.array([spots[name][time] for time in times]) for name, times in self.times.items()}
        # How many gaps, longer than twice the tolerance, lie before each time.
        self.gaps = {
            name: np.cumsum(np.diff(times, prepend=times[0]) > 2 * self.tolerance)
            for name, times in self.times.items()
        }

    def nearest(self, underlying: str, time: int) -> int | None:
        """The place of the spot nearest to ``time``; None if none is within the tolerance."""
        times = self.times.get(underlying, ())
        place = bisect.bisect_left(times, time)
        near = min(
            (p for p in (place - 1, place) if 0 <= p < len(times)), key=lambda p: abs(times[p] - time), default=None
        )
        return near if near is not None and abs(times[near] - time) <= self.tolerance else None


def microseconds(time: datetime.datetime) -> int:
    return (time - EPOCH) // datetime.timedelta(microseconds=1)


def add_counterfactuals(logged: list[LoggedDecision], options: CoveredCallCandidatesConfig) -> list[LoggedDecision]:
    """The same decisions with a counterfactual for each candidate; unknown for other exit styles than the two."""
    market = Market(logged, options)
    with np.errstate(all="ignore"):  # a number beyond all measure makes an outcome that is not finite: unknown
        return [
            entry._replace(
                counterfactuals=tuple(
                    counterfactual(entry.decision, c, market, options) for c in entry.decision.candidates
                )
            )
            for entry in tqdm(logged, desc="Outcomes", unit=" decisions", disable=None, leave=False)
        ]


def counterfactual(
    decision: Decision, candidate: Candidate, market: Market, options: CoveredCallCandidatesConfig
) -> Counterfactual:
    """The outcome of selling this candidate, until it expires or until the horizon.

    Unknown where iv is blank, or where the files hold no spot near enough to the end.
    """
    life = candidate.dte if options.horizon is None else min(candidate.dte, float(options.horizon))
    end = decision.decision_time + datetime.timedelta(days=life)
    last = market.nearest(decision.underlying, microseconds(end))
    follow = {HOLD_TO_EXPIRY: hold, TP_AND_ROLL: take_profit_and_roll}.get(decision.exit_style)
    if candidate.iv is None or last is None or follow is None:
        return Counterfactual(None, end)
    pnl = follow(decision, candidate, life, last, market, options)
    label_end = max(end, EPOCH + datetime.timedelta(microseconds=int(market.times[decision.underlying][last])))
    return Counterfactual(float(pnl) if pnl is not None and math.isfinite(pnl) else None, label_end)


def hold(
    decision: Decision,
    candidate: Candidate,
    life: float,
    last: int,
    market: Market,
    options: CoveredCallCandidatesConfig,
) -> float:
    """P&L vs HODL of selling and holding: the premium, less what the call is worth ``life`` days later.

    At expiry that is max(0, spot - strike). Before it, the call is bought back at its Black-Scholes value at the entry
    iv. ``last`` is the place of the spot that is taken for the end.
    """
    spot, left = market.spots[decision.underlying][last], candidate.dte - life
    return open_call(decision.spot, candidate, options) - close_call(spot, candidate, left, options)


def premium_of(spot: float, candidate: Candidate) -> float:
    return black_scholes_call(spot, candidate.strike, candidate.dte / DAYS_PER_YEAR, candidate.iv)


def open_call(spot: float, candidate: Candidate, options: CoveredCallCandidatesConfig) -> float:
    """USD that selling the call brings, net of costs."""
    premium = premium_of(spot, candidate)
    return premium - trading_cost(premium, spot, options)


def close_call(spot: float, candidate: Candidate, left: float, options: CoveredCallCandidatesConfig) -> float:
    """USD that buying the call back takes, ``left`` days before its expiry; at expiry it settles without costs."""
    value = black_scholes_call(spot, candidate.strike, max(0.0, left) / DAYS_PER_YEAR, candidate.iv)
    return value + (trading_cost(value, spot, options) if left > 0 else 0.0)


def take_profit_and_roll(
    decision: Decision, candidate: Candidate, life: float, last: int, market: Market, options
) -> float | None:
    """P&L vs HODL of selling, taking profit early and rolling, by the rule of data/simulate_backtest.py.

    At each later decision time: once ``take_profit`` of its premium is captured, the call is bought back and the
    candidate of that time nearest to ``roll_delta`` is sold; if there is none, nothing more is. A call still open
    after ``life`` days is bought back. None where the files leave a gap, or do not price the call to roll into.
    """
    name, start = decision.underlying, microseconds(decision.decision_time)
    times, spots, gaps = market.times[name], market.spots[name], market.gaps[name]
    place = bisect.bisect_right(times, start)
    if gaps[last] > gaps[place - 1]:
        return None
    sold, spot, expiry = candidate, decision.spot, start + round(candidate.dte * DAY)
    booked = open_call(spot, sold, options)
    while True:
        left = np.maximum(0, expiry - times[place:last]) / DAY
        values = black_scholes_call(spots[place:last], sold.strike, left / DAYS_PER_YEAR, sold.iv)
        ends = np.flatnonzero((left == 0) | (values <= (1 - options.take_profit) * premium_of(spot, sold)))
        if not len(ends):
            return booked - close_call(spots[last], sold, (expiry - start - round(life * DAY)) / DAY, options)
        place += int(ends[0])
        spot = spots[place]
        booked -= close_call(spot, sold, left[ends[0]], options)
        chain = market.chains.get((int(times[place]), name, decision.exit_style), ())
        if left[ends[0]] == 0 or not chain:
            return booked
        sold = min(chain, key=lambda other: abs(other.delta - options.roll_delta))
        if sold.iv is None:
            return None
        booked += open_call(spot, sold, options)
        expiry = int(times[place]) + round(sold.dte * DAY)
        place += 1


class Net(NamedTuple):
    """Net outcome in USD a unit of underlying and where it is from, "counterfactual" or "recorded"; both None where
    unknown."""

    value: float | None
    source: str | None


def net_outcomes(logged: LoggedDecision, options: CoveredCallCandidatesConfig) -> list[Net]:
    """For each candidate its counterfactual, or else what was recorded."""
    found = [Net(counterfactual.pnl_vs_hodl, "counterfactual") for counterfactual in logged.counterfactuals]
    recorded, sold = recorded_outcome(logged, options), logged.chosen
    if recorded is not None and sold is not None and found[sold].value is None:
        found[sold] = Net(recorded, "recorded")
    return [Net(None, None) if net.value is None else net for net in found]


def recorded_outcome(logged: LoggedDecision, options: CoveredCallCandidatesConfig) -> float | None:
    """The recorded P&L vs HODL of the call that was sold; None with costs or a horizon, of which it does not know."""
    if logged.chosen is None or not as_recorded(options):
        return None
    return logged.outcomes[logged.chosen].pnl_vs_hodl


def as_recorded(options: CoveredCallCandidatesConfig) -> bool:
    """Whether counterfactuals mean what the recorded outcomes do: until the exit, before costs."""
    return options.horizon is None and options.fee == options.half_spread == options.slippage == 0
