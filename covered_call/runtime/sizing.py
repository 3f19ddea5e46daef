"""How many coins an entry sells calls against: what is asked for, no more than is free or than the risk allows, in
whole contracts."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from covered_call.candidates.pricing import DAYS_PER_YEAR, black_scholes_call
from covered_call.candidates.schema import Candidate, CandidatesError, shown
from covered_call.runtime.risk import free_units
from covered_call.runtime.state import MarketState, Portfolio, Proposal

METHODS = ("fixed", "holdings_share", "half_kelly")
STEPS = {"BTC": 0.1, "ETH": 1.0}  # coins, of Deribit's contracts
DEVIATIONS = 1.65  # of spot, one-sided: 95 %
ROUNDED = 1e-9  # of a step or of a share: what floats round away


@dataclass(frozen=True)
class SizingRules:
    """How much is sold.

    Args:
        method: "fixed"; "holdings_share", of all that is held; "half_kelly", half of what Kelly's rule would put at
            stake, of what is free.
        units: coins; method fixed.
        share: of the holdings; method holdings_share.
        max_risk_pct: of the equity, what a call may lose at most, as loss_95 counts it; None: not limited.
        step: coins of the least contract; None: that of Deribit, of BTC or ETH.
        payoff: a mean gain over a mean loss, for half_kelly; None: as the Q-scorer's training had it, else as what
            is settled beside the log has it.

    Raises:
        CandidatesError: for a value that cannot be.
    """

    method: str = "fixed"
    units: float = 0.1
    share: float = 1.0
    max_risk_pct: float | None = 2.0
    step: float | None = None
    payoff: float | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise CandidatesError(f"method={shown(self.method)}: choose one of {', '.join(METHODS)}.")
        for name in ("units", "share", "max_risk_pct", "step", "payoff"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise CandidatesError(f"{name}={value!r}: give a number above 0.")


class Sizing(NamedTuple):
    """Coins to sell, and how they were come by.

    Args:
        units: whole contracts; 0 is no trade.
        code: of no trade, why: "kelly", "too_small", "unknown_payoff" where Kelly's rule has none, or "unknown_risk"
            where the risk cannot be counted.
        wanted: coins by the method alone.
        free: coins that no call is short of.
        at_risk: coins that max_risk_pct allows; None: it does not limit.
        kelly: the share that Kelly's rule puts at stake; None for another method, or where it is unknown.
        payoff, payoff_of: what it rests on, and who says so: "sizing.payoff", "q" or "settled".
    """

    units: float
    code: str = ""
    wanted: float = 0.0
    free: float = math.inf
    at_risk: float | None = None
    kelly: float | None = None
    payoff: float | None = None
    payoff_of: str = ""


def size(
    proposal: Proposal,
    state: MarketState,
    portfolio: Portfolio,
    rules: SizingRules,
    payoff: float | None = None,
) -> Sizing:
    """Of the sale of a call that is offered. payoff: as payoff_ratio gives it, for half_kelly.

    Raises:
        CandidatesError: for a call that is not offered, and for an underlying whose step is not known.
    """
    underlying = state.decision.underlying
    step, free = step_of(underlying, rules), free_units(portfolio, underlying)
    kelly = kelly_share(proposal.confidence, payoff) if rules.method == "half_kelly" else None
    wanted = wanted_units(rules, portfolio.holdings.get(underlying, 0.0), free, kelly)
    if rules.method == "half_kelly" and (kelly is None or kelly <= ROUNDED):
        return Sizing(0.0, "unknown_payoff" if kelly is None else "kelly", wanted, free, kelly=kelly)
    at_risk = None
    if rules.max_risk_pct is not None:
        at_risk = units_at_risk(candidate_of(proposal, state), state, portfolio, rules.max_risk_pct)
        if at_risk is None:
            return Sizing(0.0, "unknown_risk", wanted, free, kelly=kelly)
    units = round_down(min(wanted, free, math.inf if at_risk is None else at_risk), step)
    at_risk = None if at_risk == math.inf else at_risk
    return Sizing(units, "" if units else "too_small", wanted, free, at_risk, kelly)


def wanted_units(rules: SizingRules, held: float, free: float, kelly: float | None) -> float:
    """Coins, not rounded; 0 where Kelly's rule has no number."""
    if rules.method == "fixed":
        return rules.units
    if rules.method == "holdings_share":
        return rules.share * held
    return 0.0 if kelly is None else 0.5 * max(kelly, 0.0) * max(free, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Kelly's rule


def kelly_share(win: float, payoff: float | None) -> float | None:
    """The share of what is at stake that makes it grow fastest (Kelly 1956): (p * b - q) / b; below 0 for a bet not to
    take. win: the probability p of a gain. payoff: a mean gain over a mean loss, b; without one it is unknown."""
    if payoff is None or not payoff > 0:
        return None
    return (win * payoff - (1 - win)) / payoff


def payoff_ratio(outcomes: np.ndarray) -> float | None:
    """The mean gain over the mean loss of settled outcomes (N,) in money, NaN where one is unknown; None without a
    gain or without a loss. They must be of the training, or settled before the decision."""
    gains, losses = outcomes[outcomes > 0], -outcomes[outcomes < 0]
    return float(gains.mean() / losses.mean()) if len(gains) and len(losses) else None


# ---------------------------------------------------------------------------------------------------------------------
# What it may lose


def units_at_risk(candidate: Candidate, state: MarketState, portfolio: Portfolio, percent: float) -> float | None:
    """Coins whose loss_95 is that share of the equity; infinite where nothing would be lost, None where the loss or
    the equity is unknown."""
    loss, equity = loss_95(candidate, state), portfolio.equity_usd
    if loss is None or equity is None or not equity > 0:
        return None
    return percent / 100 * equity / loss if loss > 0 else math.inf


def loss_95(candidate: Candidate, state: MarketState) -> float | None:
    """USD a coin: the call's Black-Scholes value once spot is DEVIATIONS of its life's standard deviation higher, less
    the bid that its sale brings, or without one the call's value of now.

    The move is taken to come at once: the value at expiry would be its intrinsic part, and less. None without an iv.
    """
    spot, years, iv = state.decision.spot, candidate.dte / DAYS_PER_YEAR, candidate.iv
    if iv is None or math.isnan(iv):
        return None
    quote = state.quotes.get(candidate.instrument)
    bid = quote.bid if quote else None
    premium = black_scholes_call(spot, candidate.strike, years, iv) if bid is None else bid
    moved = spot * math.exp(DEVIATIONS * iv * math.sqrt(years))
    return float(black_scholes_call(moved, candidate.strike, years, iv) - premium)


# ---------------------------------------------------------------------------------------------------------------------
# Contracts


def step_of(underlying: str, rules: SizingRules) -> float:
    if rules.step is None and underlying not in STEPS:
        raise CandidatesError(f"step: the least contract of {shown(underlying)} is not known here: give it in coins.")
    return STEPS[underlying] if rules.step is None else rules.step


def round_down(units: float, step: float) -> float:
    """Whole steps; 0 for less than one."""
    return round(max(math.floor(units / step + ROUNDED), 0) * step, 10)


def candidate_of(proposal: Proposal, state: MarketState) -> Candidate:
    found = [one for one in state.decision.candidates if one.instrument == proposal.instrument]
    if not found:
        raise CandidatesError(f"{shown(proposal.instrument)} is to be sold, and is not offered.")
    return found[0]
