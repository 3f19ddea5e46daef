"""Calls that are sold at quoted prices: what is open, and what each sale has brought once it is over.

A sale begins a chain: the call that is sold, and those that are sold after it was bought back, to the end of the last.
"""

import functools
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import DAY
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.pricing import delivery_cost, pick, trading_cost
from covered_call.candidates.series import HOUR, Series
from covered_call.candidates.settlement import PRESETS, Rule
from covered_call.market.snapshot import BadRows, Snapshot
from covered_call.market.teacher import UNKNOWN, Offer, Rules, offer_of, past_of

# By the teacher's rules, and settled at expiry.
STYLES = {"hold_to_expiry": PRESETS["intrinsic"]._replace(max_rolls=0), "tp_and_roll": PRESETS["intrinsic"]}
DERIBIT = CoveredCallCandidatesConfig(fee=0.0003, delivery_fee=0.00015)  # what trading there costs
GAP = 36 * HOUR  # without a quote for longer, what was to be seen in between is unknown
SOLD_AT = ("bid", "mid", "mark")
# At which prices the same trades are paid: of each sale, and of each buy-back. Before them stands what was done.
WAYS = (("bid", "ask"), ("mid", "mid"), ("mark", "mark"))
# Why an outcome is unknown.
KNOWN, NO_PRICE, NO_QUOTES, NO_FIXING, NO_MORE = (
    "",
    "no {sell_at} to sell at",
    "no quotes for 36 h in which it might have been bought back",
    "no spot near expiry",
    "still open at the end of the files",
)


class Conditions(NamedTuple):
    """What all sales of a replay have in common."""

    rules: Rules
    sell_at: str  # of SOLD_AT
    tolerance: int  # microseconds from an expiry to the price that it is settled at, at most
    spots: Series | None  # what is settled at; the snapshots' index without it


class Quotes:
    """A snapshot, its prices in USD a coin by name, (C,) each, and what the teacher makes of it."""

    def __init__(self, snapshot: Snapshot, terms: Conditions, bad: BadRows):
        calls, self.snapshot, self.terms, self.bad = snapshot.calls, snapshot, terms, bad
        self.time, self.spot = snapshot.time, snapshot.spot
        prices = {"bid": calls.bid, "ask": calls.ask, "mid": (calls.bid + calls.ask) / 2, "mark": calls.mark}
        self.price = {name: share * self.spot for name, share in prices.items()}
        self.row = {name: row for row, name in enumerate(calls.instrument.tolist())}

    @functools.cached_property
    def offer(self) -> Offer:
        spots = self.terms.spots
        past = past_of(spots, self.time, self.spot) if spots is not None else UNKNOWN
        return offer_of(self.snapshot, self.terms.rules, past, bad=self.bad)

    @functools.cached_property
    def sold(self) -> np.ndarray:
        """(C, 4) USD that selling brings, net of the fee: as it is done, and in each of the WAYS."""
        price = np.stack([self.price[name] for name in (self.terms.sell_at, *(sale for sale, _ in WAYS))], 1)
        return price - trading_cost(price, self.spot, DERIBIT)

    @functools.cached_property
    def bought(self) -> np.ndarray:
        """(C, 4) USD that buying back takes, with the fee, likewise."""
        price = np.stack([self.price[name] for name in ("ask", *(back for _, back in WAYS))], 1)
        return price + trading_cost(price, self.spot, DERIBIT)

    @functools.cached_property
    def rolls(self) -> list[int]:
        """The calls that a chain may roll into, the best score first."""
        scores = [candidate.score for candidate in self.offer.decision.candidates]
        sellable = ~np.isnan(self.price[self.terms.sell_at])
        threshold = self.terms.rules.threshold
        its = zip(self.offer.rows.tolist(), scores, strict=True)
        return [row for row, score in its if score >= threshold and sellable[row]]


class Fixing(NamedTuple):
    """The price of an underlying at an expiry."""

    price: float  # USD; NaN where none is near enough
    time: int  # of it, microseconds since 1970
    index: float  # USD, of the nearest snapshot, whether it is settled at or not
    index_time: int


class Fixings:
    """The prices of an underlying at the expiries that calls were settled at."""

    def __init__(self, terms: Conditions):
        self.terms, self.seen = terms, []
        self.found: dict[int, Fixing] = {}  # by expiry

    def see(self, time: int, spot: float) -> None:
        """Of all snapshots one after another, before anything of one is settled."""
        self.seen = [*self.seen[-1:], (time, spot)]

    def at(self, expiry: int) -> Fixing:
        """Of an expiry that has passed, or that no later snapshot follows."""
        if expiry not in self.found:
            times, prices = (np.array(values) for values in zip(*self.seen, strict=True))
            index = nearest(times, prices, expiry, self.terms.tolerance)
            spots = self.terms.spots
            price = nearest(spots.time, spots.number, expiry, self.terms.tolerance) if spots is not None else index
            self.found[expiry] = Fixing(*price, *index)
        return self.found[expiry]


def nearest(times: np.ndarray, prices: np.ndarray, time: int, tolerance: int) -> tuple[float, int]:
    """The price that is nearest in time, the earlier of two, and its time; NaN if that is too far."""
    place = int(abs(times - time).argmin())
    near = abs(int(times[place]) - time) <= tolerance
    return float(prices[place]) if near else np.nan, int(times[place])


class Open(NamedTuple):
    """Chains (K,) that are not over, each with the call that it is short of."""

    sale: np.ndarray  # int64, the number by which it is known
    begin: np.ndarray  # int64, microseconds since 1970
    instrument: np.ndarray  # str
    strike: np.ndarray  # USD
    expiry: np.ndarray  # int64
    premium: np.ndarray  # USD that the call was sold for, before the fee
    rolls: np.ndarray  # int64, how often it was rolled
    cash: np.ndarray  # (K, 4) USD taken in so far, net of fees, as it was done, and in each of the WAYS
    peak: np.ndarray  # USD, of the coin, the cash, and the call at its mark
    fall: np.ndarray  # percent, the largest from a peak; NaN where it was not to be seen
    quoted: np.ndarray  # int64, when the call last stood in a snapshot
    marked: np.ndarray  # int64, when it last had a mark


class Results(NamedTuple):
    """What sales (K,) have brought, in USD a coin, net of fees; NaN where unknown."""

    sale: np.ndarray
    pnl: np.ndarray  # (K, 4) as it was done, and in each of the WAYS
    drawdown: np.ndarray  # percent
    days: np.ndarray  # from the sale to the last price that it rests on
    why: np.ndarray  # str, KNOWN, or why it is unknown


def results_of(its: Open, why: str | np.ndarray, time: int | np.ndarray = 0) -> Results:
    """Args: time: of the last price of those that are known."""
    why = np.broadcast_to(np.asarray(why, object), len(its.sale))
    lost = why != KNOWN
    pnl, fall, days = its.cash.copy(), its.fall.copy(), (time - its.begin) / DAY
    for values in (pnl, fall, days):
        values[lost] = np.nan
    return Results(its.sale, pnl, fall, days, why)


WHOLE, REAL = np.zeros(0, np.int64), np.zeros(0)
NONE_OPEN = Open(WHOLE, WHOLE, np.zeros(0, object), REAL, WHOLE, REAL, WHOLE, np.zeros((0, 1 + len(WAYS))), REAL, REAL,
                 WHOLE, WHOLE)  # fmt: skip


class Book:
    """The chains of one exit style."""

    def __init__(self, rule: Rule, terms: Conditions, fixings: Fixings):
        self.rule, self.terms, self.fixings = rule, terms, fixings
        self.open = NONE_OPEN

    def sell(self, quotes: Quotes, rows: np.ndarray, sales: np.ndarray) -> Results:
        """Sells one call each, and returns those that cannot be sold.

        Args:
            rows: (K,) of the snapshot's calls.
            sales: (K,) int64, the numbers by which they are known from now on.
        """
        calls, cash = quotes.snapshot.calls, quotes.sold[rows]
        now, spot = np.full(len(rows), quotes.time), np.full(len(rows), quotes.spot)
        equity = spot + cash[:, 0] - quotes.price["mark"][rows]
        its = Open(
            sales, now, calls.instrument[rows], calls.strike[rows], calls.expiry[rows],
            quotes.price[self.terms.sell_at][rows], np.zeros(len(rows), np.int64), cash, np.maximum(spot, equity),
            100 * (1 - equity / np.maximum(spot, equity)), now, now,
        )  # fmt: skip
        sold = ~np.isnan(its.premium)
        self.open = Open(*map(np.concatenate, zip(self.open, pick(its, sold), strict=True)))
        return results_of(pick(its, ~sold), NO_PRICE.format(sell_at=self.terms.sell_at))

    def follow(self, quotes: Quotes) -> list[Results]:
        """What has ended until a snapshot, or ends there."""
        ended = [self.lose_sight(quotes.time), self.settle(self.open.expiry <= quotes.time)]
        row = np.array([quotes.row.get(name, -1) for name in self.open.instrument.tolist()], np.int64)
        self.see(quotes, row)
        return [*ended, self.buy_back(quotes, row)]

    def end(self, time: int) -> list[Results]:
        """What is left after the last snapshot, which had this time: known are those for which expiry alone was to
        come, and of which there is a price near enough."""
        undecided = self.take_out(self.may_exit & (time < self.last_exit), NO_MORE)
        prices = np.array([self.fixings.at(expiry).price for expiry in self.open.expiry.tolist()], float)
        undecided_too = self.take_out(np.isnan(prices), NO_MORE)
        self.blur(np.iinfo(np.int64).max)
        return [undecided, undecided_too, self.settle(np.ones(len(self.open.sale), bool))]

    @property
    def may_exit(self) -> np.ndarray:
        """(K,) bool: whether a call may be bought back before its expiry."""
        return self.open.rolls < self.rule.max_rolls

    @property
    def last_exit(self) -> np.ndarray:
        """(K,) int64: until when it may."""
        return self.open.expiry - round(self.rule.min_dte_to_roll * DAY)

    def lose_sight(self, time: int) -> Results:
        """Takes out the chains whose call had no quote for too long while it might have been bought back."""
        self.blur(time)
        return self.take_out(self.may_exit & (np.minimum(time, self.last_exit) - self.open.quoted > GAP), NO_QUOTES)

    def blur(self, time: int) -> None:
        """Forgets the drawdown of those whose call had no mark for too long until then."""
        unseen = np.minimum(time, self.open.expiry) - self.open.marked > GAP
        self.open.fall[unseen] = np.nan

    def see(self, quotes: Quotes, row: np.ndarray) -> None:
        """Marks the open calls, which stand in these rows (K,) of the snapshot, -1 for none."""
        its = np.flatnonzero(row >= 0)
        self.open.quoted[its] = quotes.time
        mark = quotes.price["mark"][row[its]]
        its, mark = its[~np.isnan(mark)], mark[~np.isnan(mark)]
        self.open.marked[its] = quotes.time
        self.value(its, quotes.spot + self.open.cash[its, 0] - mark)

    def value(self, its: np.ndarray, equity: np.ndarray) -> None:
        """Takes into the drawdowns what these chains and their coin are worth."""
        peak, fall = self.open.peak, self.open.fall
        peak[its] = np.maximum(peak[its], equity)
        fall[its] = np.maximum(fall[its], 100 * (1 - equity / peak[its]))

    def buy_back(self, quotes: Quotes, row: np.ndarray) -> Results:
        """Buys back at the ask what has earned enough or is to be defended, rolls, and returns what ends with it."""
        has = row >= 0
        ask = np.where(has, quotes.price["ask"][row] if has.any() else np.nan, np.nan)
        enough = ask <= (1 - self.rule.take_profit) * self.open.premium
        defended = ~np.isnan(ask) & (quotes.spot / self.open.strike >= self.rule.defend)
        its = np.flatnonzero(self.may_exit & (quotes.time < self.last_exit) & (enough | defended))
        self.open.cash[its] -= quotes.bought[row[its]]
        self.value(its, quotes.spot + self.open.cash[its, 0])
        into = [next((other for other in quotes.rolls if other != one), -1) for one in row[its].tolist()]
        into, ends = np.array(into, np.int64), np.zeros(len(row), bool)
        self.roll(quotes, its[into >= 0], into[into >= 0])
        ends[its[into < 0]] = True
        return self.take_out(ends, KNOWN, quotes.time)

    def roll(self, quotes: Quotes, its: np.ndarray, into: np.ndarray) -> None:
        """Sells the calls in these rows of the snapshot (I,) for chains that have bought theirs back."""
        calls, chains = quotes.snapshot.calls, self.open
        chains.cash[its] += quotes.sold[into]
        chains.premium[its] = quotes.price[self.terms.sell_at][into]
        for name in ("instrument", "strike", "expiry"):
            getattr(chains, name)[its] = getattr(calls, name)[into]
        chains.quoted[its] = chains.marked[its] = quotes.time
        chains.rolls[its] += 1
        self.value(its, quotes.spot + chains.cash[its, 0] - quotes.price["mark"][into])

    def settle(self, due: np.ndarray) -> Results:
        """Takes out those (K,) that expire."""
        its = np.flatnonzero(due)
        fixings = [self.fixings.at(expiry) for expiry in self.open.expiry[its].tolist()]
        price = np.array([fixing.price for fixing in fixings], float)
        payoff = np.maximum(price - self.open.strike[its], 0)
        self.open.cash[its] -= (payoff + delivery_cost(payoff, price, DERIBIT))[:, None]
        self.value(its, price + self.open.cash[its, 0])
        time = np.maximum(self.open.expiry[its], np.array([fixing.time for fixing in fixings], np.int64))
        why = np.where(np.isnan(price), NO_FIXING, KNOWN)
        return self.take_out(due, why, time)

    def take_out(self, which: np.ndarray, why: str | np.ndarray, time: int | np.ndarray = 0) -> Results:
        """Args: which: (K,) bool. why, time: of those alone; the time is that of the last price."""
        its, self.open = pick(self.open, which), pick(self.open, ~which)
        return results_of(its, why, time)
