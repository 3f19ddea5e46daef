"""What an agent knows at a moment, what its policies propose, and what it means to do: plain data, times in UTC.

Money is in USD. Prices of options are USD a coin; units are coins, below 0 where they are owed.
"""

import datetime
from typing import NamedTuple

from covered_call.candidates.schema import Decision

SELL_CALL, NO_TRADE, CLOSE, ROLL, HOLD = "SELL_CALL", "NO_TRADE", "CLOSE", "ROLL", "HOLD"  # actions
ENTRIES, EXITS = (SELL_CALL,), (CLOSE, ROLL)


class Quote(NamedTuple):
    """An instrument as it is quoted; None where the exchange says nothing."""

    instrument: str
    bid: float | None
    ask: float | None
    mark: float | None
    open_interest: float | None  # contracts

    @property
    def mid(self) -> float | None:
        return None if self.bid is None or self.ask is None else (self.bid + self.ask) / 2


class MarketState(NamedTuple):
    """The decision that a market puts: all that policies may see, and beside it what risk and execution need."""

    decision: Decision
    quotes: dict[str, Quote]  # by instrument: of the candidates, and of what is held
    context: dict[str, float | None]  # of the market as a whole, by name, such as realised_vol; None where unknown
    snapshot_time: datetime.datetime  # when it was quoted


class Position(NamedTuple):
    """A call that was sold and is open."""

    instrument: str
    underlying: str
    strike: float
    expiry: datetime.datetime
    units: float  # below 0
    entry_price: float
    entry_time: datetime.datetime
    rolls: int = 0  # how often its chain was rolled
    entry_fee_usd: float = 0.0  # what its sale cost


class Trade(NamedTuple):
    """A position that was closed, settled or rolled."""

    closed_at: datetime.datetime
    pnl_usd: float  # net of fees
    paper: bool = False


class Portfolio(NamedTuple):
    """What is held at a time; None where it is unknown."""

    time: datetime.datetime
    equity_usd: float | None
    peak_equity_usd: float | None  # of all times
    day_peak_usd: float | None  # of this UTC day
    holdings: dict[str, float]  # coins by underlying
    positions: tuple[Position, ...] = ()
    margin_used_pct: float | None = None
    net_delta: dict[str, float] = {}  # coins, of the open calls, by underlying
    trades: tuple[Trade, ...] = ()  # closed, by time
    cash_usd: float = 0.0  # premiums received, less what was paid

    def short_units(self, underlying: str) -> float:
        """Coins that open calls of an underlying are short of, 0 or above."""
        return -sum(one.units for one in self.positions if one.underlying == underlying)


class Proposal(NamedTuple):
    """What a policy would do."""

    source: str  # "llm", "q", "rule", or what the configuration calls it
    instrument: str | None  # of the call to sell, None for no trade
    confidence: float  # 0 to 1
    margin: float | None = None  # of its probability over the runner-up's
    q_usd: float | None = None  # what it expects the sale to bring, USD a coin
    reason: str = ""
    latency_s: float = 0.0
    cached: bool = False
    error: str | None = None  # why there is no answer: such a proposal never trades
    probabilities: dict[str, float] | None = None  # of all answers, by instrument and "NO_TRADE"; None: it has none
    best: str | None = None  # the call that it likes best, sold or not; None where it does not say
    asked: bool = True  # now; else its last answer is used again, or it was left alone


class Veto(NamedTuple):
    """A rule of risk that an intention breaks."""

    code: str
    value: float | str | None  # what was found
    limit: float | str | None  # what is allowed
    text: str


class Intention(NamedTuple):
    """What the agent means to do, before its order is sent."""

    action: str  # SELL_CALL, NO_TRADE, CLOSE, ROLL, HOLD
    decision_id: str
    instrument: str | None = None
    units: float = 0.0  # coins, above 0
    limit_price: float | None = None  # USD a coin
    reason_codes: tuple[str, ...] = ()
    replaces: str | None = None  # of a roll's sale: the instrument whose buy-back was filled before
