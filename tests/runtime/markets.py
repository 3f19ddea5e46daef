"""Quoted decisions that tests of the agent make, and an agent that nothing holds back."""

import datetime
from collections.abc import Callable, Sequence

import numpy as np

from covered_call.candidates.pricing import black_scholes_call
from covered_call.candidates.schema import Candidate, Decision
from covered_call.runtime.engine import Steps, fall_back
from covered_call.runtime.paper import Begun
from covered_call.runtime.risk import after_buy_back
from covered_call.runtime.sizing import Sizing
from covered_call.runtime.state import ENTRIES, Intention, MarketState, Portfolio, Proposal, Quote, Veto


def fixed(units: float) -> Callable[[Proposal, MarketState, Portfolio], Sizing]:
    return lambda proposal, state, portfolio: Sizing(units)


def at_most(positions: int) -> Callable[[Intention, MarketState, Portfolio, datetime.datetime], list[Veto]]:
    """The one rule of an agent that is given no others: so many open calls of an underlying."""

    def vetoes_of(
        intention: Intention, state: MarketState, portfolio: Portfolio, now: datetime.datetime
    ) -> list[Veto]:
        stay = after_buy_back(portfolio, intention, state).positions
        count = sum(one.underlying == state.decision.underlying for one in stay)
        if intention.action not in ENTRIES or count < positions:
            return []
        return [Veto("max_positions", count, positions, f"{count} open call(s), and {positions} are the most")]

    return vetoes_of


def hold(state: MarketState, portfolio: Portfolio, now: datetime.datetime) -> Sequence[Intention]:
    return ()


START = datetime.datetime(2025, 1, 3, 8, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
GRID = np.arange(50_000.0, 180_000.0, 1_000.0)  # the strikes of what may be held
BEGUN = Begun(START, {"BTC": 1.0}, 0.0)
FREELY = Steps(fall_back, fixed(0.1), at_most(999), hold)
ONE = FREELY._replace(vetoes_of=at_most(1))


def expiry_after(time: datetime.datetime, days: int) -> datetime.datetime:
    return (time + days * DAY).replace(hour=8, minute=0, second=0, microsecond=0)


def call(expiry: datetime.datetime, strike: float) -> str:
    return f"BTC-{expiry:%-d%b%y}-{strike:g}-C".upper()


def quoted_state(
    time: datetime.datetime = START, spot: float = 95_000.0, strikes=(100_000.0, 105_000.0), scores=(3.5, 2.0), **more
) -> MarketState:
    """Calls of a week at a vol of 0.6, quoted 3 % around their value, and of what was sold in the week before."""
    candidates, quotes = [], {}
    for back in range(8):
        expiry = expiry_after(time, 7 - back)
        left = (expiry - time) / DAY
        grid = GRID if back else np.array(strikes)
        values = black_scholes_call(spot, grid, max(0.0, left) / 365, 0.6)
        for strike, value in zip(grid.tolist(), values.tolist(), strict=True):
            name = call(expiry, strike)
            quotes[name] = Quote(name, value * 0.97, value * 1.03, value, 100.0)
    for strike, score in zip(strikes, scores, strict=True):
        expiry = expiry_after(time, 7)
        candidates.append(Candidate(call(expiry, strike), strike, (expiry - time) / DAY, 0.25, score, 0.6, None))
    decision = Decision(time, "BTC", more.pop("exit_style", "hold_to_expiry"), spot, tuple(candidates))
    return MarketState(decision, quotes | more.pop("quotes", {}), {}, time)


def quoted_states(count: int) -> list[MarketState]:
    """One a day, on a spot that wanders; strikes follow it."""
    spots = 95_000 * np.exp(np.random.default_rng(3).normal(0, 0.03, count).cumsum())
    return [
        quoted_state(START + number * DAY, float(spot), (round(spot * 1.05, -3), round(spot * 1.1, -3)),
            (3.5, 2.0) if number % 3 else (2.5, 2.0))
        for number, spot in enumerate(spots)
    ]  # fmt: skip
