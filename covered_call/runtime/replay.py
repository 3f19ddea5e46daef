"""States to decide on: a backtest's decisions, whose calls bring what its files say, and snapshots of chains."""

import datetime
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import logged_of
from covered_call.candidates.decisions import Decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import net_outcomes
from covered_call.candidates.pricing import DAYS_PER_YEAR, black_scholes_call
from covered_call.candidates.schema import CandidatesError, LoggedDecision
from covered_call.candidates.series import Series
from covered_call.market.candidate_csv import quotes_of
from covered_call.market.snapshot import BadRows, Snapshot
from covered_call.market.teacher import UNKNOWN, Broken, Rules, broken_of, offer_of, past_of, with_context
from covered_call.runtime.experience import Brought
from covered_call.runtime.paper import FILLED, SETTLED, UNFILLED, Closed, Event, Execution, Marked, Opened
from covered_call.runtime.state import Intention, MarketState, Portfolio, Position, Quote

DAY_SECONDS = 86_400.0


# ---------------------------------------------------------------------------------------------------------------------
# A backtest


def states_of(logged: Iterable[LoggedDecision]) -> Iterator[MarketState]:
    """A backtest's decisions as they stood; nothing is quoted there, and no outcome is in them."""
    for entry in logged:
        yield MarketState(entry.decision, {}, {}, entry.decision.decision_time)


def logged_in(decisions: Decisions) -> Iterator[LoggedDecision]:
    """One by one, of which no more than a few thousand are in memory."""
    for numbers in decisions.batches(decisions.numbers):
        yield from logged_of(decisions.columns(numbers))


class Sold(NamedTuple):
    """A sale of a backtest as it goes on: what no agent may know before it ends."""

    ends: datetime.datetime
    pnl_usd: float  # a coin, net of the options' costs
    iv: float  # what it is marked at until then


class Recorded:
    """Sells the calls of a backtest at their model's price, which bring what its files say: P&L vs HODL.

    Outcomes are those of ``net_outcomes``: computed by the rule that gives back the recorded trades, or recorded where
    the files end before. A sale without either is not made, and counted in ``unknown``; nor is one without an iv, for
    it has no price. A position of tp_and_roll stands for its whole chain, and is open until that ends.

    Until then positions are marked by Black-Scholes at the iv of their sale.
    """

    def __init__(self, options: CoveredCallCandidatesConfig):
        self.options = options
        self.now: LoggedDecision | None = None
        self.sold: dict[tuple[str, datetime.datetime], Sold] = {}
        self.spots: dict[str, float] = {}
        self.unknown = 0

    def states(self, logged: Iterable[LoggedDecision]) -> Iterator[MarketState]:
        """Those of states_of, while the outcomes of the one that is being decided are kept here."""
        for entry in logged:
            self.now = entry
            yield from states_of([entry])

    def brought(self) -> dict[str, Brought]:
        """By instrument what each candidate of the decision that was just put brings: for whoever asks later."""
        assert self.now is not None
        its = zip(self.now.decision.candidates, net_outcomes(self.now, self.options), self.now.counterfactuals,
            strict=True)  # fmt: skip
        return {one.instrument: Brought(net.value, after.label_end) for one, net, after in its
            if net.value is not None}  # fmt: skip

    def settled(self, portfolio: Portfolio, state: MarketState) -> list[Event]:
        due = [one for one in portfolio.positions if self.sold[key_of(one)].ends <= state.decision.decision_time]
        return [self.end(one) for one in due]

    def rest(self, portfolio: Portfolio) -> list[Closed]:
        """The ends of what is open when the files end."""
        return [self.end(one) for one in portfolio.positions]

    def end(self, position: Position) -> Closed:
        ends, pnl, _ = self.sold.pop(key_of(position))
        pnl *= -position.units
        cash = pnl + position.units * position.entry_price
        return Closed(ends, position.instrument, position.entry_time, SETTLED, None, cash, pnl, paper=True)

    def mark(self, portfolio: Portfolio, state: MarketState) -> Marked:
        time = state.decision.decision_time
        if state.decision.spot > 0:
            self.spots[state.decision.underlying] = state.decision.spot
        prices = {one.instrument: self.value(one, time) for one in portfolio.positions}
        return Marked(time, dict(self.spots), prices, {})

    def value(self, position: Position, time: datetime.datetime) -> float:
        left = max(0.0, (position.expiry - time).total_seconds() / DAY_SECONDS)
        iv, spot = self.sold[key_of(position)].iv, self.spots[position.underlying]
        return float(black_scholes_call(spot, position.strike, left / DAYS_PER_YEAR, iv))

    def sell(self, intention: Intention, state: MarketState, rolls: int) -> tuple[Execution, list[Event]]:
        assert self.now is not None and self.now.decision == state.decision
        decision = state.decision
        place = [one.instrument for one in decision.candidates].index(str(intention.instrument))
        candidate, outcome = decision.candidates[place], net_outcomes(self.now, self.options)[place].value
        if outcome is None or candidate.iv is None:
            self.unknown += 1
            return Execution(UNFILLED, "what it brings is unknown"), []
        price = float(black_scholes_call(decision.spot, candidate.strike, candidate.dte / DAYS_PER_YEAR, candidate.iv))
        expiry = decision.decision_time + datetime.timedelta(days=candidate.dte)
        position = Position(candidate.instrument, decision.underlying, candidate.strike, expiry, -intention.units,
            price, decision.decision_time, rolls)  # fmt: skip
        self.sold[key_of(position)] = Sold(self.now.counterfactuals[place].label_end, outcome, candidate.iv)
        return Execution(FILLED, "", price), [Opened(decision.decision_time, position, price * intention.units)]

    def buy_back(self, intention: Intention, position: Position, state: MarketState) -> tuple[Execution, list[Event]]:
        return Execution(UNFILLED, "of a backtest outcomes are known to their end alone"), []

    def found(self, line: dict, number: int) -> tuple[Execution, list[Event]] | None:
        return None

    def recall(self, last: Marked) -> None:
        """What is open is known to its venue alone."""
        raise CandidatesError(f"The log has a replay until {last.time}. One is made anew: give another folder.")


def key_of(position: Position) -> tuple[str, datetime.datetime]:
    return position.instrument, position.entry_time


# ---------------------------------------------------------------------------------------------------------------------
# Snapshots


def states_from(
    snapshots: Iterable[Snapshot],
    rules: Rules,
    closes: dict[str, Series] | None = None,
    exit_style: str = "hold_to_expiry",
    bad: BadRows | None = None,
    with_market: bool = False,
    vols: dict[str, Series] | None = None,
) -> Iterator[MarketState]:
    """What each snapshot puts to a policy, with the quotes of all its calls; a snapshot without a spot is left out.

    Args:
        closes: by underlying, from which the market's past is known.
        with_market: whether decisions get its context (see with_context), for policies that were fitted with one.
        vols: by underlying, the market's own, which are part of that context.
    """
    for snapshot in snapshots:
        if np.isnan(snapshot.spot):
            continue
        series = (closes or {}).get(snapshot.underlying)
        past, broken = UNKNOWN, Broken(None, None)
        if series is not None:
            past = past_of(series, snapshot.time, snapshot.spot)
            broken = broken_of(series, snapshot.time, snapshot.spot)
        decision = offer_of(snapshot, rules, past, exit_style, bad).decision
        if with_market and series is not None:
            decision = with_context(decision, series, snapshot, (vols or {}).get(snapshot.underlying))
        at_the_money = None if np.isnan(snapshot.atm_iv) else snapshot.atm_iv
        context = past._asdict() | broken._asdict() | {"atm_iv": at_the_money}
        yield MarketState(decision, all_quotes(snapshot), context, decision.decision_time)


def all_quotes(snapshot: Snapshot) -> dict[str, Quote]:
    numbers = quotes_of(snapshot, np.arange(len(snapshot.calls.strike))).tolist()
    known = [[None if value != value else value for value in row] for row in numbers]
    names: Sequence[str] = snapshot.calls.instrument.tolist()
    return {name: Quote(name, *row) for name, row in zip(names, known, strict=True)}
