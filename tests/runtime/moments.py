"""A moment at which an agent decides, with nothing against a sale; tests change what they are about."""

import datetime

from covered_call.candidates.schema import Candidate, Decision
from covered_call.runtime.state import SELL_CALL, Intention, MarketState, Portfolio, Position, Proposal, Quote, Trade

NOW = datetime.datetime(2025, 12, 12, 8, tzinfo=datetime.UTC)  # a Friday
DAY = datetime.timedelta(days=1)
LOW, HIGH = "BTC-19DEC25-95000-C", "BTC-19DEC25-97000-C"
LATER = "BTC-26DEC25-100000-C"
CANDIDATES = (
    Candidate(LOW, 95_000.0, 7.0, 0.30, 4.0, 0.5, 1.2),
    Candidate(HIGH, 97_000.0, 7.0, 0.25, 3.5, 0.5, 1.3),
    Candidate(LATER, 100_000.0, 14.0, 0.20, 3.2, 0.5, 1.1),
)


def quote(instrument: str = LOW, **more) -> Quote:
    return Quote(
        **{"instrument": instrument, "bid": 1000.0, "ask": 1020.0, "mark": 1010.0, "open_interest": 100.0} | more
    )


def moment(candidates=CANDIDATES, quotes=(), spot: float = 92_000.0, time=NOW, **context) -> MarketState:
    its = {one.instrument: quote(one.instrument) for one in candidates} | {one.instrument: one for one in quotes}
    return MarketState(Decision(time, "BTC", "hold_to_expiry", spot, tuple(candidates)), its, context, time)


def position(instrument: str = "BTC-16DEC25-96000-C", units: float = -0.1, days: float = 4.0, **more) -> Position:
    known = {"underlying": "BTC", "strike": 96_000.0, "entry_price": 1000.0, "entry_time": NOW - 3 * DAY}
    return Position(**{"instrument": instrument, "units": units, "expiry": NOW + days * DAY} | known | more)


def account(**more) -> Portfolio:
    known = {"equity_usd": 92_000.0, "peak_equity_usd": 92_000.0, "day_peak_usd": 92_000.0, "holdings": {"BTC": 1.0}}
    return Portfolio(**{"time": NOW} | known | more)


def trades(*results: float, days_ago: float = 1.0, paper: bool = False) -> tuple[Trade, ...]:
    """Closed an hour apart, the last one so long ago."""
    ends = [NOW - days_ago * DAY - number * DAY / 24 for number in range(len(results))]
    return tuple(Trade(time, pnl, paper) for time, pnl in zip(reversed(ends), results, strict=True))


def sale(instrument: str = LOW, units: float = 0.1, **more) -> Intention:
    return Intention(SELL_CALL, "BTC|2025-12-12|hold", instrument, units, **more)


def said(source: str, instrument: str | None, confidence: float, **more) -> Proposal:
    return Proposal(source, instrument, confidence, **more)
