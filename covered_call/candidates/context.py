"""What is known of the market at a decision: from prices up to then, and the vols of its candidates.

What a number needs and does not have leaves it unknown, which is NaN. Nothing here looks past the time that it is
asked of: no number changes when anything later does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from covered_call.candidates.columns import DAY, Columns
from covered_call.candidates.context_lines import ATM_RANK, MARKET, OF_BARS, SPOT
from covered_call.candidates.context_ohlcv import Bars, context_of_bars
from covered_call.candidates.pricing import DAYS_PER_YEAR
from covered_call.candidates.schema import ATM_IV
from covered_call.candidates.series import HOUR

NEAR = 12 * HOUR  # a price some days back is taken from this far away at most
PRICE_STALE = 36 * HOUR  # of the last price: beyond it the past is unknown
MARKET_STALE = 72 * HOUR  # of the market's
CLOSES = 250  # that are looked at: of those before, Wilder's mean of 14 holds a 40-millionth
MEAN_DAYS = 50
AT_ONCE = 1_024  # decisions whose closes are in memory together: with their levels some 20 MB
TARGET_DELTA = 0.25
RANKED, LEAST_RANKED = 180, 30  # decisions among which a vol is ranked


class Prices(NamedTuple):
    """Prices (N,), or other numbers, and the times (N,) from which they are known, ascending, in microseconds since
    1970."""

    time: np.ndarray
    number: np.ndarray


class Known(NamedTuple):
    """What there is to know, by the place of each underlying among the names: prices, the vols of its decisions (see
    vols_at_target), the market's vols and bars, if files of them are given, and the vols at the money, if the files of
    decisions have them."""

    prices: dict[int, Prices]
    vols: dict[int, Prices]
    market: dict[int, Prices] | None = None
    bars: dict[int, Bars] | None = None
    at_the_money: dict[int, Prices] | None = None


def by_underlying(underlying: np.ndarray, time: np.ndarray, number: np.ndarray) -> dict[int, Prices]:
    """Spots, or vols, of (D,) decisions."""
    places = {code: underlying == code for code in np.unique(underlying).tolist()}
    return {code: prices_of(time[its], number[its]) for code, its in places.items()}


def context_of(columns: Columns, known: Known) -> dict[str, np.ndarray]:
    """(D,) each, by the names of SPOT, and of MARKET, ATM_RANK and OF_BARS if these are known; NaN where unknown."""
    found: dict[str, np.ndarray] = {}
    vols = vols_at_target(columns)
    for code in np.unique(columns.underlying).tolist():
        its = columns.underlying == code
        time, spot = columns.time[its], columns.spot[its]
        of_its = context_of_prices(known.prices.get(code, NOTHING), time, spot)
        of_its["iv_rank_180"] = ranks_of(known.vols.get(code, NOTHING), time, vols[its])
        if known.market is not None:
            of_its |= market_vols(known.market.get(code, NOTHING), time)
        if known.at_the_money is not None:
            of_its[ATM_RANK] = ranks_of(known.at_the_money.get(code, NOTHING), time, columns.context[ATM_IV][its])
        if known.bars is not None:
            of_its |= in_parts(context_of_bars, known.bars[code], time, spot)
        for name, values in of_its.items():
            found.setdefault(name, np.full(len(columns), np.nan))[its] = values
    told = ((MARKET, known.market), ((ATM_RANK,), known.at_the_money), (OF_BARS, known.bars))
    names = (*SPOT, *(name for names, of in told if of is not None for name in names))
    if not found:
        return dict.fromkeys(names, np.zeros(0))
    found["rv_30d"] = np.where(np.isnan(found["rv_30d"]), realised_vol_of(columns), found["rv_30d"])
    found |= shapes_of(columns)
    if known.market is not None:
        found["dvol_rv"] = found["dvol"] / found["rv_30d"]
    return {name: found[name] for name in names}


NOTHING = Prices(np.zeros(0, np.int64), np.zeros(0))


def prices_of(time: np.ndarray, spot: np.ndarray) -> Prices:
    """Of (D,) decisions of one underlying in any order; of several at one time the highest, whatever their order."""
    order = np.lexsort((spot, time))
    order = order[spot[order] > 0]  # a decision without candidates may have none
    last = np.append(np.diff(time[order]) != 0, True)[: len(order)]
    return Prices(time[order][last], spot[order][last])


def context_of_prices(known: Prices, time: np.ndarray, spot: np.ndarray) -> dict[str, np.ndarray]:
    """(D,) each, by the names of OF_PRICES.

    Args:
        known: of one underlying; a day's close is the last of a UTC day, and today's the last one so far.
        time: (D,) microseconds since 1970.
        spot: (D,) USD, at that time.
    """
    return in_parts(part_of, known, time, spot)


def in_parts(make: Callable, known: Any, time: np.ndarray, spot: np.ndarray) -> dict[str, np.ndarray]:
    """What it makes of (D,) decisions, of no more than AT_ONCE at a time."""
    starts = range(0, max(len(time), 1), AT_ONCE)
    parts = [make(known, time[start : start + AT_ONCE], spot[start : start + AT_ONCE]) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def part_of(known: Prices, time: np.ndarray, spot: np.ndarray) -> dict[str, np.ndarray]:
    spot = np.where(spot > 0, spot, np.nan)
    closes = closes_until(known, time, CLOSES)
    returns = returns_of(known, time, spot, (1, 7, 30))
    distance = distance_of(closes, spot)
    return {
        **dict(zip(("ret_1d", "ret_7d", "ret_30d"), returns.T, strict=True)),
        "rv_7d": vols_of_closes(closes, 7),
        "rv_30d": vols_of_closes(closes, 30),
        "dist_ma50": distance,
        "regime": regimes(distance, returns[:, 2]),
        "trend_5d": trends(spot / closes[:, -6] - 1),
        "drawdown_90d": 1 - spot / np.maximum(top_of(closes), spot),
        "range_pos_30d": place_in_range(closes, spot),
        "rsi_14": relative_strength(closes),
        **levels_of(closes, spot),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Of prices


def closes_until(known: Prices, time: np.ndarray, days: int) -> np.ndarray:
    """(D, days) USD: the closes of each day until a time, the last price by then at the end; NaN for a day without
    one, and for all where the last is PRICE_STALE."""
    if not len(known.time):
        return np.full((len(time), days), np.nan)
    last = np.searchsorted(known.time, time, "right") - 1
    day = known.time // DAY
    ends = np.append(day[1:] != day[:-1], True)
    by_day = np.full(day[-1] - day[0] + 1 + days, np.nan)
    by_day[day[ends] - day[0] + days] = known.number[ends]
    places = day[last] - day[0] + days
    closes = by_day[places[:, None] - np.arange(days - 1, -1, -1)]
    closes[:, -1] = known.number[last]  # of this day the last so far, and not its close
    closes[(last < 0) | (time - known.time[last] > PRICE_STALE)] = np.nan
    return closes


def returns_of(known: Prices, time: np.ndarray, spot: np.ndarray, days: tuple[int, ...]) -> np.ndarray:
    """(D, K) of spot over the price nearest to so many days before, as fractions."""
    found = np.full((len(time), len(days)), np.nan)
    last = np.searchsorted(known.time, time, "right") - 1
    fresh = np.flatnonzero(last >= 0)
    fresh = fresh[time[fresh] - known.time[last[fresh]] <= PRICE_STALE]
    for place, count in enumerate(days):
        found[fresh, place] = spot[fresh] / closes_at(known, time[fresh] - count * DAY, last[fresh]) - 1
    return found


def closes_at(known: Prices, times: np.ndarray, last: np.ndarray | int) -> np.ndarray:
    """(K,) USD: the prices nearest to these times, of those up to the place ``last`` of each; NaN where none is
    near."""
    after = np.clip(np.searchsorted(known.time, times), 1, np.maximum(last, 1))
    late = np.minimum(after, last)
    early = times - known.time[after - 1] <= abs(known.time[late] - times)
    nearest = np.where(early, after - 1, late)
    return np.where(abs(known.time[nearest] - times) <= NEAR, known.number[nearest], np.nan)


def vols_of_closes(closes: np.ndarray, days: int) -> np.ndarray:
    """(D,) a year: that of Deribit's index of realised volatility, the standard deviation of daily log returns times
    the root of 365."""
    return np.std(np.diff(np.log(closes[:, -days - 1 :])), axis=1, ddof=1) * np.sqrt(DAYS_PER_YEAR)


def distance_of(closes: np.ndarray, spot: np.ndarray) -> np.ndarray:
    return spot / np.mean(closes[:, -MEAN_DAYS:], axis=1) - 1


def regimes(distance: np.ndarray, month: np.ndarray) -> np.ndarray:
    """(D,) 1 for bull, -1 for bear, 0 for sideways: the teacher's own, from spot's distance from its mean of 50 days
    and its return over 30, as fractions."""
    bull, bear = (distance > 0.05) & (month > 0.10), (distance < -0.05) & (month < -0.10)
    return np.where(np.isnan(distance) | np.isnan(month), np.nan, bull.astype(float) - bear)


def trends(returns: np.ndarray) -> np.ndarray:
    """(D,) from -2 for down to 2 for up."""
    steps = sum((returns > edge).astype(float) - (returns < -edge) for edge in (0.02, 0.05))
    return np.where(np.isnan(returns), np.nan, steps)


def top_of(closes: np.ndarray) -> np.ndarray:
    """(D,) the highest of the last 90 closes, as far as there are any; the last 30 have to be there."""
    top = np.fmax.reduce(closes[:, -90:], axis=1)
    return np.where(np.isnan(closes[:, -30:]).any(axis=1), np.nan, top)


def place_in_range(closes: np.ndarray, spot: np.ndarray) -> np.ndarray:
    """(D,) from 0 at the lowest of 30 closes and spot to 1 at the highest; NaN where all are one."""
    low = np.minimum(closes[:, -30:].min(axis=1), spot)
    width = np.maximum(closes[:, -30:].max(axis=1), spot) - low
    return np.divide(spot - low, width, out=np.full(len(spot), np.nan), where=width > 0)


def relative_strength(closes: np.ndarray, days: int = 14) -> np.ndarray:
    """(D,) 0 to 100: Wilder's index (New Concepts in Technical Trading Systems, 1978), of the closes since the last
    that is missing; 50 where none has changed."""
    up, down, count = (np.zeros(len(closes)) for _ in range(3))
    for change in np.diff(closes).T:
        there = ~np.isnan(change)
        count = np.where(there, count + 1, 0)
        weight = 1 / np.clip(count, 1, days)  # a plain mean of the first, Wilder's then
        for mean, moved in ((up, np.maximum(change, 0)), (down, np.maximum(-change, 0))):
            mean += weight * (np.where(there, moved, 0) - mean)
            mean[~there] = 0
    whole = up + down
    strength = np.divide(100 * up, whole, out=np.full(len(up), 50.0), where=whole > 0)
    return np.where(count >= days, strength, np.nan)


def levels_of(closes: np.ndarray, spot: np.ndarray) -> dict[str, np.ndarray]:
    """(D,) each: how far the nearest level below and above spot is from it, as a fraction.

    A level is where closes have turned: the mean of those of the last 50 that are above, or below, two on either side,
    no further than 1 % apart. Of all the five that most closes came within 0.5 % of count, of equals the nearer.
    """
    window = closes[:, -50:]
    levels = merged(turns_of(window))
    tests = (abs(window[:, None, :] / levels[:, :, None] - 1) <= 0.005).sum(axis=2)
    distance = levels / spot[:, None] - 1
    order = np.lexsort((abs(distance), np.where(np.isnan(levels), 0, -tests)))[:, :5]
    kept = np.take_along_axis(distance, order, axis=1)
    known = ~np.isnan(closes[:, -10:]).any(axis=1)
    below = np.fmax.reduce(np.where(kept < 0, kept, np.nan), axis=1)
    above = np.fmin.reduce(np.where(kept > 0, kept, np.nan), axis=1)
    return {name: np.where(known, one, np.nan) for name, one in (("support", below), ("resistance", above))}


def turns_of(window: np.ndarray) -> np.ndarray:
    """(D, K) the closes that are above, or below, two on either side, ascending; NaN after the last."""
    middle, days = window[:, 2:-2], window.shape[1]
    beside = [window[:, start : days - 4 + start] for start in (0, 1, 3, 4)]
    high = np.logical_and.reduce([middle > one for one in beside])
    low = np.logical_and.reduce([middle < one for one in beside])
    return np.sort(np.where(high | low, middle, np.nan), axis=1)


def merged(prices: np.ndarray) -> np.ndarray:
    """(D, K) the means of those prices (D, K), which ascend, that are no more than 1 % above the first of them."""
    rows, first = np.arange(len(prices)), np.zeros(len(prices))
    level = np.full(len(prices), -1)
    total, count = np.zeros(prices.shape), np.zeros(prices.shape)
    for price in prices.T:
        new = price > 1.01 * first
        first, level = np.where(new, price, first), level + new
        its = rows[~np.isnan(price)]
        total[its, level[its]] += price[its]
        count[its, level[its]] += 1
    return np.divide(total, count, out=np.full(prices.shape, np.nan), where=count > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Of the candidates' own vols


def realised_vol_of(columns: Columns) -> np.ndarray:
    """(D,) what the candidates' IV and IV/RV say of it; NaN where they do not."""
    iv, over = columns.numbers["iv"], columns.numbers["ivrv_ratio"]
    # The teacher writes exactly 1 where it knows no realised vol.
    return lowest(columns, np.divide(iv, over, out=np.full(len(iv), np.nan), where=(over > 0) & (over != 1)))


def lowest(columns: Columns, values: np.ndarray) -> np.ndarray:
    """(D,) of (R,) numbers the lowest that is known of each decision."""
    found, offered = np.full(len(columns), np.nan), np.diff(columns.offsets) > 0
    if offered.any():
        found[offered] = np.fmin.reduceat(values, columns.offsets[:-1][offered])
    return found


def vols_at_target(columns: Columns) -> np.ndarray:
    """(D,) the IV of the candidate whose delta is nearest to 0.25, of equals that of the sooner expiry."""
    nearest = first_of(columns, known_vols(columns), off_target(columns), columns.numbers["dte"])
    return vol_at(columns, nearest)


def shapes_of(columns: Columns) -> dict[str, np.ndarray]:
    """(D,) each: iv_skew, the IV at the lowest delta less that at the highest, of the expiry of the candidate nearest
    to a delta of 0.25; iv_term, the IV nearest to that delta at the last expiry less that at the first. NaN where
    there is one alone, or all vols are alike."""
    dte, delta, off = columns.numbers["dte"], columns.numbers["delta"], off_target(columns)
    has = known_vols(columns)
    iv = np.where(has, columns.numbers["iv"], np.nan)
    alike = ~(-lowest(columns, -iv) > lowest(columns, iv))
    target = first_of(columns, has, off, dte)
    of_target = has & (dte == np.append(dte, np.nan)[target][columns.decision_of])
    ends = [first_of(columns, of_target, delta), first_of(columns, of_target, -delta)]
    soon = lowest(columns, np.where(has, dte, np.nan))[columns.decision_of]
    late = -lowest(columns, np.where(has, -dte, np.nan))[columns.decision_of]
    terms = [first_of(columns, has & (dte == late), off), first_of(columns, has & (dte == soon), off)]
    found = {}
    for name, by, (one, other) in (("iv_skew", delta, ends), ("iv_term", dte, terms)):
        same = np.append(by, np.nan)[one] == np.append(by, np.nan)[other]
        found[name] = np.where(alike | same, np.nan, vol_at(columns, one) - vol_at(columns, other))
    return found


def known_vols(columns: Columns) -> np.ndarray:
    """(R,) bool"""
    return ~np.isnan(columns.numbers["iv"])


def off_target(columns: Columns) -> np.ndarray:
    return abs(columns.numbers["delta"] - TARGET_DELTA)


def first_of(columns: Columns, mask: np.ndarray, *by: np.ndarray) -> np.ndarray:
    """(D,) the row of each decision that comes first of those of a mask (R,) by these numbers, and then by strike; -1
    where there is none."""
    rows = np.flatnonzero(mask)
    keys = [*by, columns.numbers["strike"]]
    rows = rows[np.lexsort([*(key[rows] for key in reversed(keys)), columns.decision_of[rows]])][::-1]
    found = np.full(len(columns), -1)
    found[columns.decision_of[rows]] = rows  # backwards, so that the first is written last
    return found


def vol_at(columns: Columns, rows: np.ndarray) -> np.ndarray:
    """(D,) the IV of these rows, NaN of -1."""
    return np.append(columns.numbers["iv"], np.nan)[rows]


def ranks_of(known: Prices, time: np.ndarray, vol: np.ndarray) -> np.ndarray:
    """(D,) 0 to 1: the share of the past 180 decisions whose vol was lower, equal ones by half; NaN for fewer than 30,
    or where all of them are alike.

    Args:
        known: the vols of all decisions of one underlying, by time.
    """
    found = np.full(len(time), np.nan)
    if not len(known.time):
        return found
    before = np.concatenate([np.full(RANKED, np.nan), known.number])
    for start in range(0, len(time), AT_ONCE):
        its = slice(start, start + AT_ONCE)
        now = np.searchsorted(known.time, time[its])  # as many are earlier
        past, own = before[now[:, None] + np.arange(RANKED)], vol[its][:, None]
        count = (~np.isnan(past)).sum(axis=1)
        rank = ((past < own) + 0.5 * (past == own)).sum(axis=1) / np.maximum(count, 1)
        varied = ((past != own) & ~np.isnan(past)).any(axis=1)
        found[its] = np.where((count >= LEAST_RANKED) & varied & ~np.isnan(own[:, 0]), rank, np.nan)
    return found


def market_vols(known: Prices, time: np.ndarray) -> dict[str, np.ndarray]:
    """(D,) each: the market's vol as it was known, a fraction a year, and its rank among the 180 before; dvol_rv, what
    it is beside the realised one, is left to the caller."""
    last = np.searchsorted(known.time, time, "right") - 1
    vol = np.append(known.number, np.nan)[last]
    fresh = last >= 0
    fresh[fresh] = time[fresh] - known.time[last[fresh]] <= MARKET_STALE
    vol = np.where(fresh, vol, np.nan)
    since = np.append(known.time, 0)[last]  # the ranked are those before the one that is known
    return {"dvol": vol, "dvol_rank_180": ranks_of(known, since, vol)}
