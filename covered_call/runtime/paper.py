"""A portfolio on paper: filled at the quotes of the moment, with Deribit's fees, and settled at expiry.

What happens to a portfolio is an event, and ``apply`` alone changes one: so the portfolio that is rebuilt from the
events of a log equals the one in memory. Sales are filled at the bid and buy-backs at the ask, at once and in full: a
real order of more than what stands there would do worse.
"""

import datetime
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from covered_call.candidates.columns import microseconds
from covered_call.candidates.context import Prices, closes_at
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.pricing import delivery_cost, trading_cost
from covered_call.candidates.schema import named_call
from covered_call.candidates.series import Series
from covered_call.runtime.state import Intention, MarketState, Portfolio, Position, Trade

# Deribit's own; the spread is paid by the fills themselves.
FEES = CoveredCallCandidatesConfig(fee=0.0003, delivery_fee=0.00015)
SETTLED, BOUGHT_BACK = "settled", "bought_back"
FILLED, PARTLY, UNFILLED = "filled", "partly_filled", "unfilled"
# After an expiry, of a spot that is taken for its price: as the option expiry_tolerance has it.
LATE = datetime.timedelta(hours=12)


class Begun(NamedTuple):
    """What there was before all else."""

    time: datetime.datetime
    holdings: dict[str, float]  # coins by underlying
    cash_usd: float


class Opened(NamedTuple):
    """A call was sold."""

    time: datetime.datetime
    position: Position
    cash_usd: float  # what came in, net of the fee


class Closed(NamedTuple):
    """A position is no more, or a part of it."""

    time: datetime.datetime
    instrument: str
    entry_time: datetime.datetime
    why: str  # SETTLED or BOUGHT_BACK
    price: float | None  # USD a coin: what was paid, or the value at settlement
    cash_usd: float  # what came in, below 0 where it went out
    pnl_usd: float  # of the whole trade, net of fees
    paper: bool
    units: float | None = None  # coins, above 0, where a part was bought back; None: the whole


class Marked(NamedTuple):
    """The market moved: what there is is worth something else."""

    time: datetime.datetime
    spots: dict[str, float]  # USD by underlying
    prices: dict[str, float]  # USD a coin by instrument: what it costs to buy it back
    deltas: dict[str, float]  # by instrument
    margin_used_pct: float | None = None  # as an exchange says it; None where there is no account


class Adopted(NamedTuple):
    """What an exchange says is held took the place of what the log said; what the difference cost is not known."""

    time: datetime.datetime
    positions: tuple[Position, ...]


Event = Begun | Opened | Closed | Marked | Adopted
KINDS: dict[str, type[Any]] = {
    "begun": Begun, "opened": Opened, "closed": Closed, "marked": Marked, "adopted": Adopted,
}  # fmt: skip


class Execution(NamedTuple):
    """What became of an order."""

    status: str  # FILLED, PARTLY, UNFILLED, or what the venue calls it
    reason: str = ""
    price: float | None = None  # USD a coin
    fee_usd: float = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Portfolio -> Portfolio


def begin(event: Begun) -> Portfolio:
    """One without positions, of which nothing is known before its first mark."""
    return Portfolio(event.time, None, None, None, dict(event.holdings), cash_usd=event.cash_usd)


def apply(portfolio: Portfolio, event: Event) -> Portfolio:
    """The portfolio after an event.

    Raises:
        ValueError: if a position is closed that is not held.
    """
    if isinstance(event, Begun):
        return begin(event)
    if isinstance(event, Marked):
        return marked(portfolio, event)
    if isinstance(event, Adopted):
        return portfolio._replace(positions=event.positions)
    cash = portfolio.cash_usd + event.cash_usd
    if isinstance(event, Opened):
        return portfolio._replace(positions=(*portfolio.positions, event.position), cash_usd=cash)
    closed = position_of(portfolio, event.instrument, event.entry_time)
    if closed is None:
        raise ValueError(f"{event.instrument} of {event.entry_time} is not held, and was closed at {event.time}")
    trade = Trade(event.time, event.pnl_usd, event.paper)
    left = (part_of(closed, -closed.units - event.units),) if event.units is not None else ()
    return portfolio._replace(
        positions=tuple(rest for one in portfolio.positions for rest in (left if one is closed else (one,))),
        trades=(*portfolio.trades, trade),
        cash_usd=cash,
    )


def apply_all(portfolio: Portfolio, events: Iterable[Event]) -> Portfolio:
    for event in events:
        portfolio = apply(portfolio, event)
    return portfolio


def part_of(position: Position, units: float) -> Position:
    """So many coins of it, above 0, with their share of what its sale cost."""
    share = units / -position.units
    return position._replace(units=-units, entry_fee_usd=position.entry_fee_usd * share)


def position_of(portfolio: Portfolio, instrument: str, entry_time: datetime.datetime) -> Position | None:
    held = (one for one in portfolio.positions if (one.instrument, one.entry_time) == (instrument, entry_time))
    return next(held, None)


def marked(portfolio: Portfolio, event: Marked) -> Portfolio:
    """With the equity that is left if all is bought back now, None where a price is unknown, and its peaks.

    The net delta is of the calls alone, not of the coins that cover them, and coins of two underlyings do not add up;
    one that is unknown counts as 0.
    """
    equity = equity_of(portfolio, event)
    same_day = portfolio.time.date() == event.time.date()
    day_peak = highest(portfolio.day_peak_usd if same_day else None, equity)
    delta = dict.fromkeys((one.underlying for one in portfolio.positions), 0.0)
    for one in portfolio.positions:
        delta[one.underlying] += one.units * event.deltas.get(one.instrument, 0.0)
    return portfolio._replace(
        time=event.time,
        equity_usd=equity,
        peak_equity_usd=highest(portfolio.peak_equity_usd, equity),
        day_peak_usd=day_peak,
        net_delta=delta,
        margin_used_pct=event.margin_used_pct,
    )


def equity_of(portfolio: Portfolio, event: Marked) -> float | None:
    coins = [units * event.spots[name] if name in event.spots else None for name, units in portfolio.holdings.items()]
    owed = [
        one.units * event.prices[one.instrument] if one.instrument in event.prices else None
        for one in portfolio.positions
    ]
    equity = portfolio.cash_usd
    for value in [*coins, *owed]:
        if value is None:
            return None
        equity += value
    return equity


def highest(one: float | None, other: float | None) -> float | None:
    known = [value for value in (one, other) if value is not None]
    return max(known) if known else None


# ---------------------------------------------------------------------------------------------------------------------
# Fills


def sell(intention: Intention, state: MarketState, rolls: int = 0) -> tuple[Execution, list[Event]]:
    """At the bid, if there is one and it is as high as the limit."""
    quote = state.quotes.get(str(intention.instrument))
    bid = quote.bid if quote else None
    if quote is None or bid is None:
        return Execution(UNFILLED, "no bid"), []
    if intention.limit_price is not None and bid < intention.limit_price:
        return Execution(UNFILLED, f"bid {bid:,.2f} is below the limit {intention.limit_price:,.2f}"), []
    decision = state.decision
    candidate = next((one for one in decision.candidates if one.instrument == quote.instrument), None)
    if candidate is None:
        return Execution(UNFILLED, f"{quote.instrument} is not offered"), []
    fee = float(trading_cost(bid, decision.spot, FEES)) * intention.units
    expiry = expiry_of(quote.instrument, decision.decision_time, candidate.dte)
    position = Position(
        quote.instrument, decision.underlying, candidate.strike, expiry, -intention.units, bid, decision.decision_time,
        rolls, fee,
    )  # fmt: skip
    opened = Opened(decision.decision_time, position, bid * intention.units - fee)
    return Execution(FILLED, "", bid, fee), [opened]


def expiry_of(instrument: str, time: datetime.datetime, dte: float) -> datetime.datetime:
    """As the instrument's own name says it, else by its days, for which a file may have whole ones."""
    named = named_call(instrument)
    return named[2] if named else time + datetime.timedelta(days=dte)


def buy_back(position: Position, state: MarketState, limit: float | None = None) -> tuple[Execution, list[Event]]:
    """At the ask, if there is one and it is no higher than the limit."""
    quote = state.quotes.get(position.instrument)
    if quote is None or quote.ask is None:
        return Execution(UNFILLED, "no ask"), []
    if limit is not None and quote.ask > limit:
        return Execution(UNFILLED, f"ask {quote.ask:,.2f} is above the limit {limit:,.2f}"), []
    fee = float(trading_cost(quote.ask, state.decision.spot, FEES)) * -position.units
    time = state.decision.decision_time
    return Execution(FILLED, "", quote.ask, fee), [closed(position, time, BOUGHT_BACK, quote.ask, fee)]


def settle(position: Position, spot: float, time: datetime.datetime) -> Closed:
    """At its value by the price of the underlying at its expiry; ``time`` is when that became known."""
    value = max(0.0, spot - position.strike)
    return closed(position, time, SETTLED, value, float(delivery_cost(value, spot, FEES)) * -position.units)


def closed(position: Position, time: datetime.datetime, why: str, price: float, fee: float) -> Closed:
    cash = position.units * price - fee
    pnl = -position.units * position.entry_price - position.entry_fee_usd + cash
    return Closed(time, position.instrument, position.entry_time, why, price, cash, pnl, paper=True)


# ---------------------------------------------------------------------------------------------------------------------
# The venue


class Paper:
    """Fills orders by itself, and settles at the spots that it sees or is given.

    Deribit settles at the mean of its index over the half hour before 08:00 UTC. Here it is the close of ``closes``
    that is nearest to the expiry; without one the first spot that is seen after it, if that is at most LATE. Where
    there is neither, the value is unknown: the position stays open, and the equity is unknown.
    """

    def __init__(self, closes: dict[str, Series] | None = None):
        self.closes = {} if closes is None else closes
        self.spots: dict[str, float] = {}
        self.prices: dict[str, float] = {}
        self.deltas: dict[str, float] = {}

    def recall(self, last: Marked) -> None:
        """What was known when the log ended."""
        self.spots, self.prices, self.deltas = dict(last.spots), dict(last.prices), dict(last.deltas)

    def settled(self, portfolio: Portfolio, state: MarketState) -> list[Event]:
        """The positions of the state's underlying whose expiry has come, as far as its price is known."""
        now = state.decision.decision_time
        due = [one for one in portfolio.positions if one.expiry <= now and one.underlying == state.decision.underlying]
        priced = [(one, self.price_at(one, state)) for one in due]
        return [settle(one, price, now) for one, price in priced if price is not None]

    def price_at(self, position: Position, state: MarketState) -> float | None:
        expiry, now = position.expiry, state.decision.decision_time
        closes = self.closes.get(position.underlying)
        if closes is not None:
            close = close_at(closes, expiry, now)
            if close is not None:
                return close
        return state.decision.spot if state.decision.spot > 0 and now - expiry <= LATE else None

    def mark(self, portfolio: Portfolio, state: MarketState) -> Marked:
        """At asks, or marks where nobody asks; what is not quoted now keeps no price."""
        decision = state.decision
        held = [one.instrument for one in portfolio.positions]
        if decision.spot > 0:
            self.spots[decision.underlying] = decision.spot
        whose = {one.instrument: one.underlying for one in portfolio.positions}
        others = {name for name in held if whose[name] != decision.underlying}  # of another chain: as last seen
        quoted = {name: state.quotes[name] for name in held if name in state.quotes}
        prices = {name: one.mark if one.ask is None else one.ask for name, one in quoted.items()}
        known = {name: price for name, price in prices.items() if price is not None}
        self.prices = {name: price for name, price in self.prices.items() if name in others} | known
        deltas = {one.instrument: one.delta for one in decision.candidates if one.instrument in held}
        self.deltas = {name: value for name, value in self.deltas.items() if name in others} | deltas
        return Marked(decision.decision_time, dict(self.spots), dict(self.prices), dict(self.deltas))

    def sell(self, intention: Intention, state: MarketState, rolls: int) -> tuple[Execution, list[Event]]:
        return sell(intention, state, rolls)

    def buy_back(self, intention: Intention, position: Position, state: MarketState) -> tuple[Execution, list[Event]]:
        return buy_back(position, state, intention.limit_price)

    def found(self, line: dict, number: int) -> tuple[Execution, list[Event]] | None:
        """An order is filled as it is sent, so one without a completion was not."""
        return None


def close_at(closes: Series, time: datetime.datetime, now: datetime.datetime) -> float | None:
    """The close nearest to a time, of those that are known now; None where none is near."""
    last = int(np.searchsorted(closes.time, microseconds(now), "right")) - 1
    if last < 0:
        return None
    found = float(closes_at(Prices(closes.time, closes.number), np.array([microseconds(time)]), last)[0])
    return None if found != found else found


# ---------------------------------------------------------------------------------------------------------------------
# Events in a log


def event_of(line: dict) -> Event:
    """An event from what ``line_of`` made of it, after JSON."""
    fields = dict(line)
    kind = KINDS[fields.pop("event")]
    fields = {name: value_of(name, value) for name, value in fields.items()}
    return kind(**fields)


def value_of(name: str, value: Any) -> Any:
    if name in ("time", "entry_time", "expiry"):
        return datetime.datetime.fromisoformat(value)
    if name == "position":
        return Position(**{inner: value_of(inner, one) for inner, one in value.items()})
    if name == "positions":
        return tuple(value_of("position", one) for one in value)
    return value


def line_of(event: Event) -> dict:
    kind = next(name for name, its in KINDS.items() if isinstance(event, its))
    return {"event": kind, **event._asdict()}


def rebuilt(lines: Iterable[dict]) -> tuple[Portfolio | None, Marked | None]:
    """The portfolio after all events of a log's lines, and the last mark among them; None of a log without any."""
    portfolio, last = None, None
    for line in lines:
        for one in line.get("events", ()):
            event = event_of(one)
            portfolio = begin(event) if isinstance(event, Begun) else apply(portfolio, event) if portfolio else None
            last = event if isinstance(event, Marked) else last
    return portfolio, last
