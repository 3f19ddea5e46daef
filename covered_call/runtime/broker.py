"""Orders on Deribit's testnet: limits with a label, priced again and again, cancelled at last; and what is held there.

A sale never takes: it is post-only, begins at the price of the rules and comes down to a tick above the bid. A
buy-back is reduce-only and goes up to the ask, which it may take: the exit was decided at it. What is filled counts,
be it a part. An order is known by its label, a hash of its decision: one that got lost on the way is looked up by it,
and so is one that was under way when the agent was killed.
"""

import contextlib
import datetime
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, NamedTuple

from covered_call.candidates.schema import CandidatesError, named_call, shown
from covered_call.candidates.series import Series
from covered_call.market.deribit import Outage, Refused
from covered_call.runtime.paper import (
    BOUGHT_BACK,
    FILLED,
    PARTLY,
    UNFILLED,
    Adopted,
    Event,
    Execution,
    Marked,
    Opened,
    Paper,
    apply_all,
    closed,
    part_of,
    value_of,
)
from covered_call.runtime.state import CLOSE, SELL_CALL, Intention, MarketState, Portfolio, Position
from covered_call.runtime.testnet import ON_THE_WAY, POST_ONLY_REJECT, VALID, Account, Halt, code_of

logger = logging.getLogger(__name__)

PRICES, ON_DIFFERENCE = ("mid", "bid", "mark"), ("halt", "adopt")
POLL = 1.0  # seconds from one look at an order to the next
EXACT = 1e-9  # coins: what floats round away is no difference


@dataclass(frozen=True)
class BrokerRules:
    """How orders are sent.

    Args:
        price: of a sale's first limit: mid, mark, or bid, which is a tick above it.
        fill_timeout: seconds that a limit stands.
        reprices: how often it is priced again, towards the bid, before it is cancelled.
        on_difference: what is done where the exchange holds something else than the log: halt, or adopt what it holds.

    Raises:
        CandidatesError: for a value that cannot be.
    """

    price: str = "mid"
    fill_timeout: float = 60.0
    reprices: int = 3
    on_difference: str = "halt"

    def __post_init__(self):
        for name, choices in (("price", PRICES), ("on_difference", ON_DIFFERENCE)):
            if getattr(self, name) not in choices:
                raise CandidatesError(f"{name}={shown(getattr(self, name))}: choose one of {', '.join(choices)}.")
        if not self.fill_timeout > 0:
            raise CandidatesError(f"fill_timeout={self.fill_timeout!r}: give seconds above 0.")
        if self.reprices < 0 or self.reprices != int(self.reprices):
            raise CandidatesError(f"reprices={self.reprices!r}: give a whole number from 0.")


class Fill(NamedTuple):
    """What an order brought."""

    units: float  # coins
    price: float  # USD a coin
    fee_usd: float


class Book(NamedTuple):
    """A call's best prices at this moment, in coin, None where nobody offers; USD of the coin; the steps of its prices
    and amounts."""

    bid: Decimal | None
    ask: Decimal | None
    mark: Decimal
    index: float
    terms: dict


@contextlib.contextmanager
def unknown_is_a_halt(intention: Intention) -> Generator[None]:
    """Without an answer it is not known what became of an order: the log has it as under way, and it is looked up when
    the agent is started again."""
    try:
        yield
    except Outage as error:
        raise Halt(
            f"What became of the order of {intention.decision_id} is not known: {error} Start again."
        ) from error


def label_of(decision_id: str) -> str:
    return hashlib.sha256(decision_id.encode()).hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------------
# Prices and amounts


def tick_at(terms: dict, price: Decimal) -> Decimal:
    """The step of prices around one: of Deribit's calls 0.0001 coins below 0.005, and 0.0005 above."""
    steps = sorted((exact(one["above_price"]), exact(one["tick_size"])) for one in terms.get("tick_size_steps") or ())
    return next((tick for above, tick in reversed(steps) if price > above), exact(terms["tick_size"]))


def on_tick(terms: dict, price: Decimal, rounding: str) -> Decimal:
    tick = tick_at(terms, price)
    return (price / tick).to_integral_value(rounding) * tick


def exact(value: Any) -> Decimal:
    return Decimal(str(value))


def whole_steps(terms: dict, units: float) -> Decimal:
    """Coins, rounded down to what the exchange takes."""
    step = exact(terms["min_trade_amount"])
    return (exact(units) + exact(EXACT)) // step * step


def sale_price(book: Book, price: str, share: float, least: float | None) -> Decimal | str:
    """Of a sale that never takes, or why there is none.

    Args:
        share: of the way from the first price (0) to a tick above the bid (1).
        least: USD a coin.
    """
    first = {"mid": None if book.bid is None or book.ask is None else (book.bid + book.ask) / 2, "mark": book.mark,
        "bid": book.bid}[price]  # fmt: skip
    if first is None or book.bid is None:
        return "no bid" if book.bid is None else "nobody asks, so there is no mid"
    end = book.bid + tick_at(book.terms, book.bid)
    wanted = max(end, first + (end - first) * exact(share))
    floor = Decimal(0) if least is None else exact(least) / exact(book.index)
    return on_tick(book.terms, max(wanted, floor), ROUND_CEILING)


def purchase_price(book: Book, price: str, share: float, most: float | None) -> Decimal | str:
    """Of a buy-back, which comes from the mid, or the mark, to the ask; or why there is none."""
    if book.ask is None:
        return "no ask"
    first = book.mark if price == "mark" or book.bid is None else (book.bid + book.ask) / 2
    wanted = min(book.ask, first + (book.ask - first) * exact(share))
    ceiling = wanted if most is None else exact(most) / exact(book.index)
    found = on_tick(book.terms, min(wanted, ceiling), ROUND_FLOOR)
    return found if found > 0 else "the price is below the least"


# ---------------------------------------------------------------------------------------------------------------------
# The venue


class DeribitTestnet(Paper):
    """Sends orders, and marks and settles as paper does: at asks, and at the exchange's own delivery prices.

    Args:
        killed: whether a file KILL is there; while it is, all orders are cancelled and none is sent. Positions stay.
    """

    def __init__(
        self, account: Account, rules: BrokerRules, underlyings: Collection[str], killed: Callable[[], bool],
        closes: dict[str, Series] | None = None,
    ):  # fmt: skip
        super().__init__(closes)
        strange = next((name for name in underlyings if "_" in name), None)
        if strange:
            raise Halt(f"{strange} is not settled in coin, and only such calls are sold on the testnet.")
        self.account, self.rules, self.killed = account, rules, killed
        self.underlyings = underlyings
        self.terms: dict[str, dict] = {}  # of instruments
        self.heeded = False

    def book(self, instrument: str) -> Book:
        if instrument not in self.terms:
            self.terms[instrument] = self.account.ask("publicGetGetInstrument", instrument_name=instrument)
        found = self.account.ask("publicGetTicker", instrument_name=instrument)
        bid, ask = (exact(found[name]) if found.get(name) else None for name in ("best_bid_price", "best_ask_price"))
        return Book(bid, ask, exact(found["mark_price"]), float(found["index_price"]), self.terms[instrument])

    # What is held

    def settled(self, portfolio: Portfolio, state: MarketState) -> list[Event]:
        """What has expired, and what the exchange holds otherwise, which is compared here, once a cycle."""
        if self.killed():
            self.cancel_all()
        events = super().settled(portfolio, state)
        after, underlying = apply_all(portfolio, events), state.decision.underlying
        time = state.decision.decision_time
        return [*events, *self.reconciled(after, underlying, time)]

    def heed(self) -> None:
        """Between cycles: what is open is cancelled once the file is there."""
        there = self.killed()
        if there and not self.heeded:
            try:
                self.cancel_all()
            except Outage as error:
                logger.warning("KILL is there, and no order could be cancelled: %s", error)
                return
        self.heeded = there

    def cancel_all(self) -> None:
        count = self.account.cancel_all()
        logger.warning("KILL is there: %d orders were cancelled, and none is sent. Positions stay.", count)

    def price_at(self, position: Position, state: MarketState) -> float | None:
        """The exchange's own price of delivery; None until it is known."""
        days = (state.decision.decision_time - position.expiry).days + 2
        found = self.account.ask(
            "publicGetGetDeliveryPrices", index_name=f"{position.underlying.lower()}_usd", count=min(days, 1000)
        )
        prices = {one["date"]: float(one["delivery_price"]) for one in found["data"]}
        return prices.get(f"{position.expiry:%Y-%m-%d}")

    def check(self, portfolio: Portfolio, time: datetime.datetime) -> None:
        """At the start: raises Halt as the cycles do, of which the first may be a day away."""
        try:
            for underlying in self.underlyings:
                self.reconciled(portfolio, underlying, time)
                coins, held = self.summary(underlying)["equity"], portfolio.holdings.get(underlying, 0.0)
                if coins < held:
                    logger.warning(
                        "The account has %g %s, and holdings says %g: what is covered by it is not covered there.",
                        coins, underlying, held,
                    )  # fmt: skip
        except Outage as error:
            logger.warning("What is held is not known yet, and is looked at in the next cycle: %s", error)

    def reconciled(self, portfolio: Portfolio, underlying: str, time: datetime.datetime) -> list[Event]:
        """Raises Halt where the exchange holds something else than the portfolio, unless that is adopted."""
        there = self.positions(underlying, time)
        here: dict[str, float] = {}
        its = [one for one in portfolio.positions if one.underlying == underlying and one.expiry > time]
        for one in its:
            here[one.instrument] = here.get(one.instrument, 0.0) + one.units
        sizes = {name: one["size"] for name, one in there.items()}
        names = [n for n in sorted({*here, *sizes}) if abs(here.get(n, 0.0) - sizes.get(n, 0.0)) > EXACT]
        if not names:
            return []
        text = ", ".join(f"{name}: {sizes.get(name, 0):g} there, {here.get(name, 0):g} in the log" for name in names)
        if self.rules.on_difference != "adopt":
            raise Halt(
                f"The testnet holds something else than the log says: {text}. Mend it there, or go on from what is "
                "there with broker: {on_difference: adopt}. Nothing was ordered."
            )
        logger.warning("What the testnet holds is adopted: %s. What the difference cost is unknown.", text)
        kept = [one for one in portfolio.positions if one not in its or one.instrument not in names]
        return [Adopted(time, (*kept, *(adopted(there[name], time) for name in names if name in there)))]

    def positions(self, underlying: str, time: datetime.datetime) -> dict[str, dict]:
        """By instrument, of what has not expired."""
        found = self.account.ask("privateGetGetPositions", currency=underlying)
        named = {one["instrument_name"]: named_call(one["instrument_name"]) for one in found}
        gone = {name for name, call in named.items() if call and call[2] <= time}
        return {one["instrument_name"]: one for one in found if one["size"] and one["instrument_name"] not in gone}

    def mark(self, portfolio: Portfolio, state: MarketState) -> Marked:
        return super().mark(portfolio, state)._replace(margin_used_pct=self.margin_used(state.decision.underlying))

    def margin_used(self, currency: str) -> float | None:
        found = self.summary(currency)
        return 100 * found["initial_margin"] / found["equity"] if found["equity"] > 0 else None

    def summary(self, currency: str) -> dict:
        return self.account.ask("privateGetGetAccountSummary", currency=currency)

    # Orders

    def sell(self, intention: Intention, state: MarketState, rolls: int) -> tuple[Execution, list[Event]]:
        with unknown_is_a_halt(intention):
            order, why = self.worked("sell", intention)
            return self.outcome(order, why, intention, state.decision.decision_time, rolls)

    def buy_back(self, intention: Intention, position: Position, state: MarketState) -> tuple[Execution, list[Event]]:
        with unknown_is_a_halt(intention):
            order, why = self.worked("buy", intention)
            return self.outcome(order, why, intention, state.decision.decision_time, 0, position)

    def worked(self, side: str, intention: Intention) -> tuple[dict | None, str]:
        """An order that has come to its end, None if there never was one; and what it went through."""
        order, prices = None, []
        steps = int(self.rules.reprices)
        for step in range(steps + 1):
            if self.killed():
                break
            try:
                price, amount = self.terms_of(side, intention, step / steps if steps else 0.0)
                if isinstance(price, str):
                    prices.append(price)
                    break
                order = self.sent(order, side, intention, price, amount)
                prices.append(f"{price.normalize():f}")
            except Refused as error:
                prices.append(f"refused: {error}")
                if code_of(error) != POST_ONLY_REJECT:  # the book moved, and the next price is of the new one
                    break
            except Outage as error:
                if order:
                    raise
                prices.append(f"not sent: {error}")
                break
            order = self.stood(order) if order else None
            if order and order["order_state"] != "open":
                break
        if order and order["order_state"] == "open":
            order = self.account.cancel(order)
        return order, "at " + ", ".join(prices) if prices else "KILL is there"

    def terms_of(self, side: str, intention: Intention, share: float) -> tuple[Decimal | str, Decimal]:
        """The limit and the amount of an order, in coin; or why there is none."""
        book = self.book(str(intention.instrument))
        priced = sale_price if side == "sell" else purchase_price
        amount = whole_steps(book.terms, intention.units)
        if not amount:
            return f"{intention.units:g} coins are below the least amount, {book.terms['min_trade_amount']:g}", amount
        return priced(book, self.rules.price, share, intention.limit_price), amount

    def sent(self, order: dict | None, side: str, intention: Intention, price: Decimal, amount: Decimal) -> dict:
        """At a price: edited where there is an order, so that it stays one and keeps its label."""
        kind: dict[str, Any] = (
            {"post_only": True, "reject_post_only": True} if side == "sell" else {"reduce_only": True}
        )
        if order:
            same = exact(order["price"]) == price
            return order if same else self.account.edit(order, price=f"{price:f}", **kind)
        label = label_of(intention.decision_id)
        return self.account.place(side, label, str(intention.instrument), amount=f"{amount:f}", price=f"{price:f}",
            **kind)  # fmt: skip

    def stood(self, order: dict) -> dict:
        """The order once it has come to its end, or has stood long enough."""
        end = time.monotonic() + self.rules.fill_timeout
        try:
            while order["order_state"] == "open" and time.monotonic() < end and not self.killed():
                time.sleep(min(POLL, self.rules.fill_timeout))
                order = self.account.state(order["order_id"])
        except KeyboardInterrupt:
            self.account.cancel(order)
            raise
        return order

    def outcome(
        self, order: dict | None, why: str, intention: Intention, time: datetime.datetime, rolls: int,
        position: Position | None = None,
    ) -> tuple[Execution, list[Event]]:  # fmt: skip
        """What an order that has come to its end is to the portfolio."""
        fill = self.fill_of(order) if order else None
        if fill is None:
            return Execution(UNFILLED, why), []
        whole = fill.units >= intention.units - EXACT
        said = why if whole else f"{fill.units:g} of {intention.units:g} coins {why}"
        execution = Execution(FILLED if whole else PARTLY, said, fill.price, fill.fee_usd)
        if position is None:
            opened = opened_by(fill, str(intention.instrument), time, rolls)
            return execution, [opened]
        part = None if fill.units >= -position.units - EXACT else fill.units
        its = position if part is None else part_of(position, part)
        ended = closed(its, time, BOUGHT_BACK, fill.price, fill.fee_usd)._replace(paper=False, units=part)
        return execution, [ended]

    def fill_of(self, order: dict) -> Fill | None:
        """From its trades, each at the index of its moment."""
        if not order["filled_amount"]:
            return None
        trades = self.account.trades(order)
        units = sum(one["amount"] for one in trades)
        usd = sum(one["amount"] * one["price"] * one["index_price"] for one in trades)
        return Fill(units, usd / units, sum(one["fee"] * one["index_price"] for one in trades))

    # After a crash

    def found(self, line: dict, number: int) -> tuple[Execution, list[Event]] | None:
        """An order that was under way when the agent ended: looked up by its label, until it cannot appear any more.
        What is open of it is cancelled, and what is filled counts."""
        intention = ordered_in(line)[number]
        label, instrument = label_of(intention.decision_id), str(intention.instrument)
        order = self.account.find(label, instrument)
        if order is None:
            time.sleep(VALID + ON_THE_WAY)
            order = self.account.find(label, instrument)
        if order is None:
            return None
        if order["order_state"] == "open":
            order = self.account.cancel(order)
        held = [value_of("position", one) for one in line["portfolio"]["positions"]]
        moment = datetime.datetime.fromisoformat(line["state"]["decision"]["decision_time"])
        why = "before the agent ended"
        if intention.action == SELL_CALL:
            rolled = next((one for one in held if one.instrument == intention.replaces), None)
            return self.outcome(order, why, intention, moment, rolled.rolls + 1 if rolled else 0)
        position = next(one for one in held if one.instrument == instrument)
        return self.outcome(order, why, intention._replace(action=CLOSE), moment, 0, position)


def ordered_in(line: dict) -> list[Intention]:
    """The orders of a cycle's line, as Plan.orders has them."""
    exits = [one["intention"] for one in line["exits"] if not one["vetoes"]]
    entry = [line["intention"]] if line["intention"]["action"] == SELL_CALL and not line["vetoes"] else []
    return [Intention(**one | {"reason_codes": tuple(one["reason_codes"])}) for one in [*exits, *entry]]


def opened_by(fill: Fill, instrument: str, time: datetime.datetime, rolls: int) -> Opened:
    position = position_of_call(instrument, -fill.units, fill.price, time)._replace(
        rolls=rolls, entry_fee_usd=fill.fee_usd
    )
    return Opened(time, position, fill.units * fill.price - fill.fee_usd)


def position_of_call(instrument: str, units: float, price: float, time: datetime.datetime) -> Position:
    call = named_call(instrument)
    if call is None or not units < 0:
        raise Halt(f"{units:g} {instrument} is held on the testnet, and is no call that was sold: close it there.")
    return Position(instrument, call[0], call[1], call[2], units, price, time)


def adopted(row: dict, time: datetime.datetime) -> Position:
    """Of an exchange's position, at the mean price that it says, in USD of now where it has no others."""
    price = row.get("average_price_usd")
    price = row["average_price"] * row["index_price"] if price is None else price
    return position_of_call(row["instrument_name"], float(row["size"]), float(price), time)
