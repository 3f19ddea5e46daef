"""Counterfactual outcomes: of every candidate, sold or not, from the prices of the files' own later decisions.

They are labels and stand in columns; no prompt is rendered from them. NO_TRADE brings 0: the coin is held either way.
"""

import functools
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from covered_call.candidates.columns import DAY, Columns, timedelta_of
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import LoggedDecision

HOLD_TO_EXPIRY, TP_AND_ROLL = "hold_to_expiry", "tp_and_roll"
DAYS_PER_YEAR = 365
SECOND = 1_000_000  # microseconds
ROWS_AT_ONCE = 65_536
WIDEST = 10  # a search looks at 2 ** 10 times at once at most


def black_scholes_call(spot, strike, years, iv):
    """Value of a European call in USD at interest rate 0 (Black and Scholes 1973); iv as a fraction a year.

    Takes numbers or arrays. Without time or vol it is the intrinsic value.
    """
    deviation = np.maximum(iv * np.sqrt(years), 1e-12)
    d1 = (np.log(spot) - np.log(strike)) / deviation + deviation / 2
    return spot * ndtr(d1) - strike * ndtr(d1 - deviation)


def trading_cost(price, spot, options: CoveredCallCandidatesConfig):
    """USD that selling or buying back one call at ``price`` costs: fee, half the spread, and slippage.

    Deribit's fee is 0.0003 of the underlying, at most 12.5 % of the option's price. Takes numbers or arrays.
    """
    fee = np.minimum(options.fee * spot, options.fee_cap * price)
    return fee + options.half_spread * price + options.slippage * spot


class Calls(NamedTuple):
    """Calls (C,): strike in USD, dte in days, iv as a fraction a year, NaN where it is unknown."""

    strike: np.ndarray
    dte: np.ndarray
    iv: np.ndarray


class Sales(NamedTuple):
    """Calls (C,), and where and when each is sold."""

    underlying: np.ndarray  # int, its place in the names
    time: np.ndarray  # int64, microseconds since 1970
    spot: np.ndarray  # USD
    strike: np.ndarray
    dte: np.ndarray
    iv: np.ndarray


class Legs(NamedTuple):
    """Calls (C,) from their sale to their exit: to when they are bought back with a profit, or expire."""

    strike: np.ndarray
    iv: np.ndarray
    expiry: np.ndarray  # int64, microseconds since 1970
    income: np.ndarray  # USD that the sale brings, net of costs
    exit: np.ndarray  # int64, place in the market


class Market:
    """Spots by underlying and time, and the calls that are sold next, from the decisions of the files themselves.

    A place is an index into N spots, which are in the order of underlying and time: ``time`` (N,) in microseconds
    since 1970, ``spot`` (N,) in USD. The places of underlying u are those from bounds[u] to bounds[u + 1].
    """

    def __init__(
        self,
        names: tuple[str, ...],
        underlying: np.ndarray,
        exit_style: np.ndarray,
        time: np.ndarray,
        spot: np.ndarray,
        sizes: np.ndarray,
        roll: Calls,
        options: CoveredCallCandidatesConfig,
    ):
        """From the D decisions of all files, by time, ties in the order of the files. Names and arrays (D,) are as in
        Columns.

        Args:
            sizes: (D,) int, how many candidates each has.
            roll: (D,) those of rolls_of; not read where there is none.
        """
        self.tolerance = round(options.expiry_tolerance * 3600 * SECOND)
        priced = np.flatnonzero(spot > 0)  # a placeholder row may have none
        order = priced[np.lexsort((time[priced], underlying[priced]))]
        last = np.append((np.diff(time[order]) != 0) | (np.diff(underlying[order]) != 0), True)[: len(order)]
        self.time, self.spot = time[order][last], spot[order][last]
        self.bounds = np.searchsorted(underlying[order][last], np.arange(len(names) + 1))
        # How many gaps, longer than twice the tolerance, lie before each time.
        self.gaps = np.cumsum(np.diff(self.time, prepend=self.time[:1]) > 2 * self.tolerance)
        quoted = np.flatnonzero(exit_style == code_of(names, TP_AND_ROLL))
        places = self.nearest(underlying[quoted], time[quoted], 0)
        chain = np.full(len(self.time), -1)
        chain[places[places >= 0]] = quoted[places >= 0]  # the last of several
        sold = np.flatnonzero((chain >= 0) & (sizes[chain] > 0))
        self.roll = np.full(len(self.time), -1)  # (N,) the leg that begins at each place, -1 for none
        self.roll[sold] = np.arange(len(sold))
        chain = chain[sold]
        self.legs = self.sell(Sales(underlying[chain], self.time[sold], self.spot[sold], *pick(roll, chain)), options)

    def sell(self, sales: Sales, options: CoveredCallCandidatesConfig) -> Legs:
        """Legs that go on until the last price of their underlying at most."""
        parts = [pick(sales, rows) for rows in parts_of(len(sales.time))]
        legs = [legs_of(part, self.bounds[part.underlying + 1], self, options) for part in parts]
        return Legs(*map(np.concatenate, zip(*legs, strict=True)))

    def search(self, underlying: np.ndarray, time: np.ndarray, side) -> np.ndarray:
        """The places (C,) at which these times stand among those of their underlying, as np.searchsorted has them."""
        places = np.zeros(len(time), np.int64)
        for code in np.flatnonzero(np.bincount(underlying)):
            its, (begin, end) = underlying == code, self.bounds[code : code + 2]
            places[its] = begin + np.searchsorted(self.time[begin:end], time[its], side)
        return places

    def nearest(self, underlying: np.ndarray, time: np.ndarray, tolerance: int) -> np.ndarray:
        """The places (C,) of the spots nearest to these times, the earlier of two; -1 if none is near enough."""
        after = self.search(underlying, time, "left")
        far = np.iinfo(np.int64).max
        early, late = np.full(len(time), far), np.full(len(time), far)
        has = after > self.bounds[underlying]
        early[has] = time[has] - self.time[after[has] - 1]
        has = after < self.bounds[underlying + 1]
        late[has] = self.time[after[has]] - time[has]
        return np.where(np.minimum(early, late) <= tolerance, after - (early <= late), -1)

    @functools.cached_property
    def low(self) -> np.ndarray:
        """(levels, N) USD: at [level, place] the lowest of the 2 ** level spots from that place on."""
        low = [self.spot]
        for level in range(min(WIDEST, len(self.spot).bit_length() - 1)):
            half = 1 << level
            low.append(low[-1].copy())
            np.minimum(low[-2][:-half], low[-2][half:], out=low[-1][:-half])
        return np.array(low)


def code_of(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else -1


def pick(arrays, rows):
    """The named tuple of arrays with these of their rows alone."""
    return type(arrays)(*(values[rows] for values in arrays))


def parts_of(count: int) -> list[slice]:
    """Slices of rows few enough for memory; one at least."""
    return [slice(begin, begin + ROWS_AT_ONCE) for begin in range(0, max(count, 1), ROWS_AT_ONCE)]


def rolls_of(columns: Columns, options: CoveredCallCandidatesConfig) -> Calls:
    """(D,) the candidate of each decision that roll_places finds, NaN where there is none, or where nothing rolls."""
    rolls = Calls(*(np.broadcast_to(np.nan, len(columns)) for _ in Calls._fields))  # which takes no memory
    if TP_AND_ROLL not in columns.names:
        return rolls
    places, rolls = roll_places(columns, options), Calls(*map(np.array, rolls))
    quoted = np.flatnonzero(places >= 0)
    for name, values in rolls._asdict().items():
        values[quoted] = columns.numbers[name][columns.offsets[quoted] + places[quoted]]
    return rolls


def roll_places(columns: Columns, options: CoveredCallCandidatesConfig) -> np.ndarray:
    """(D,) int32: the place in its decision of the candidate nearest to ``roll_delta``, the first of equals; -1 if it
    has none. The candidates must be in the files' order."""
    places = np.full(len(columns), -1, np.int32)
    begins = columns.offsets[:-1][np.diff(columns.offsets) > 0]
    if len(begins):
        away = np.abs(columns.numbers["delta"] - options.roll_delta)
        least = np.repeat(np.minimum.reduceat(away, begins), np.diff(begins, append=len(away)))
        rows = np.flatnonzero(away == least)[::-1]  # of several the first is written last
        places[columns.decision_of[rows]] = columns.place[rows]
    return places


def counterfactuals(
    columns: Columns, market: Market, options: CoveredCallCandidatesConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The outcome of selling each candidate, until it expires or until the horizon, and the time of its last price.

    Any decisions of the market's, with its names, in any order: their R candidates have (R,) float64 P&L vs HODL in
    USD a unit of underlying, NaN where unknown, and (R,) int64 microseconds since 1970.

    Unknown where iv is blank, where the files hold no spot near enough to the end, for other exit styles than the two,
    and where a number beyond all measure makes an outcome that is not finite.
    """
    parts = [outcomes_of(columns, rows, market, options) for rows in parts_of(columns.offsets[-1])]
    values, label_ends = map(np.concatenate, zip(*parts, strict=True))
    return values, label_ends


@np.errstate(all="ignore")
def outcomes_of(columns: Columns, rows: slice, market: Market, options) -> tuple[np.ndarray, np.ndarray]:
    """counterfactuals of some of the rows."""
    of = columns.decision_of[rows]
    calls = Calls(*(columns.numbers[name][rows] for name in Calls._fields))
    sales = Sales(columns.underlying[of], columns.time[of], columns.spot[of], *calls)
    life = calls.dte if options.horizon is None else np.minimum(calls.dte, float(options.horizon))
    end = sales.time + timedelta_of(life)
    last = market.nearest(sales.underlying, end, market.tolerance)
    values, label_end, style = np.full(len(of), np.nan), end.copy(), columns.exit_style[of]
    for name, follow in ((HOLD_TO_EXPIRY, hold), (TP_AND_ROLL, take_profit_and_roll)):
        its = np.flatnonzero((style == code_of(columns.names, name)) & (last >= 0) & ~np.isnan(calls.iv))
        values[its] = follow(pick(sales, its), life[its], last[its], market, options)
        label_end[its] = np.maximum(end[its], market.time[last[its]])
    values[~np.isfinite(values)] = np.nan
    return values, label_end


def microseconds_of(days: np.ndarray) -> np.ndarray:
    return np.rint(days * DAY).astype(np.int64)


def hold(sales: Sales, life: np.ndarray, last: np.ndarray, market: Market, options) -> np.ndarray:
    """P&L vs HODL of selling and holding: the premium, less what the call is worth ``life`` days later.

    At expiry that is max(0, spot - strike). Before it, the call is bought back at its Black-Scholes value at the entry
    iv. ``last`` is the place of the spot that is taken for the end.
    """
    income = open_calls(premium_of(sales), sales, options)
    return income - close_calls(market.spot[last], sales, sales.dte - life, options)


def premium_of(sales: Sales) -> np.ndarray:
    return black_scholes_call(sales.spot, sales.strike, sales.dte / DAYS_PER_YEAR, sales.iv)


def open_calls(premium: np.ndarray, sales: Sales, options: CoveredCallCandidatesConfig) -> np.ndarray:
    """USD that selling the calls brings, net of costs."""
    return premium - trading_cost(premium, sales.spot, options)


def close_calls(spot: np.ndarray, calls: Sales | Legs, left: np.ndarray, options) -> np.ndarray:
    """USD that buying the calls back takes, ``left`` days before their expiry; at expiry they settle without costs."""
    value = black_scholes_call(spot, calls.strike, np.maximum(0.0, left) / DAYS_PER_YEAR, calls.iv)
    return value + np.where(left > 0, trading_cost(value, spot, options), 0.0)


def take_profit_and_roll(sales: Sales, life: np.ndarray, last: np.ndarray, market: Market, options) -> np.ndarray:
    """P&L vs HODL of selling, taking profit early and rolling, by the rule of data/simulate_backtest.py.

    At each later decision time: once ``take_profit`` of its premium is captured, the call is bought back and the
    candidate of that time nearest to ``roll_delta`` is sold; if there is none, nothing more is. A call still open
    after ``life`` days is bought back. NaN where the files leave a gap, or do not price the call to roll into.
    """
    legs, end = legs_of(sales, last, market, options), sales.time + microseconds_of(life)
    booked, rows = legs.income.copy(), np.arange(len(last))
    while len(rows):  # those that have been rolled once more than in the turn before
        open_still = legs.exit >= last[rows]
        its, held = rows[open_still], pick(legs, open_still)
        booked[its] -= close_calls(market.spot[last[its]], held, (held.expiry - end[its]) / DAY, options)
        rows, legs = rows[~open_still], pick(legs, ~open_still)
        left = np.maximum(0, legs.expiry - market.time[legs.exit]) / DAY
        booked[rows] -= close_calls(market.spot[legs.exit], legs, left, options)
        roll = np.where(left > 0, market.roll[legs.exit], -1)
        rows, legs = rows[roll >= 0], pick(market.legs, roll[roll >= 0])
        booked[rows] += legs.income
    first = market.search(sales.underlying, sales.time, "right") - 1
    booked[market.gaps[last] > market.gaps[first]] = np.nan
    return booked


@np.errstate(all="ignore")
def legs_of(sales: Sales, limit: np.ndarray, market: Market, options: CoveredCallCandidatesConfig) -> Legs:
    """``limit`` (C,) is the place from which no exit is looked for: an exit there means none before."""
    premium, expiry = premium_of(sales), sales.time + microseconds_of(sales.dte)
    begin = market.search(sales.underlying, sales.time, "right")
    limit = np.minimum(limit, np.maximum(begin, market.search(sales.underlying, expiry, "left")))
    enough = (1 - options.take_profit) * premium
    exits = first_profits(sales, expiry, enough, begin, limit, market)
    return Legs(sales.strike, sales.iv, expiry, open_calls(premium, sales, options), exits)


def first_profits(sales: Sales, expiry, enough, begin, limit, market: Market) -> np.ndarray:
    """(C,) int64: the first place from ``begin`` to ``limit`` at which a call is worth ``enough`` or less, else limit.

    Whole windows of places are passed over: a call is worth no less at any of them than at the lowest spot of all and
    the last time of all. Single places have their exact price.
    """
    exits, at, level = limit.copy(), begin.copy(), np.zeros(len(begin), np.int64)
    rows = np.flatnonzero((at < limit) & ~np.isnan(enough))
    while len(rows):
        here, room = at[rows], limit[rows] - at[rows]
        wide = np.minimum(level[rows], np.frexp(room)[1] - 1)
        spot, strike = market.low[wide, here], sales.strike[rows]
        years = (expiry[rows] - market.time[here + (1 << wide) - 1]) / DAY / DAYS_PER_YEAR
        worth = black_scholes_call(spot, strike, years, sales.iv[rows])
        # What floats round away is a thousandth of this at most; for the smallest of them it is not.
        doubt = np.where(wide > 0, 1e-11 * (spot + strike) + 1e-300, 0.0)
        found = (wide == 0) & (worth <= enough[rows])
        passed = np.where(wide > 0, worth > enough[rows] + doubt, ~found)
        exits[rows[found]] = here[found]
        at[rows] = here + (passed << wide)
        level[rows] = np.where(passed, np.minimum(wide + 1, len(market.low) - 1), wide - 1)
        rows = rows[~found & (at[rows] < limit[rows])]
    return exits


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
