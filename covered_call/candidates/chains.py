"""Chains: a call from its sale on, and those that are sold after it, to the settlement of the last."""

from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import DAY, Columns
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.pricing import (
    DAYS_PER_YEAR,
    Calls,
    Sales,
    black_scholes_call,
    delivery_cost,
    pick,
    premium_of,
    trading_cost,
)
from covered_call.candidates.series import HOUR
from covered_call.candidates.settlement import ROLL_MIN_SCORE, Rule
from covered_call.candidates.spots import Spots

NEVER = np.iinfo(np.int64).max  # of places: after all of them
MIN_YEARS = 1e-6  # of time value that a mark of the teacher's clock has at least


class Rolls(NamedTuple):
    """(D,) each: the candidates of a decision that a chain may roll into, NaN where there is none.

    ``other`` is the best one by its score that is not ``best``'s instrument: what is rolled into is never the same.
    """

    nearest: Calls  # to roll_delta
    best: Calls
    other: Calls


class Legs(NamedTuple):
    """Calls (C,) from their sale to their settlement."""

    strike: np.ndarray
    iv: np.ndarray
    expiry: np.ndarray  # int64, microseconds since 1970
    listed: np.ndarray  # int64, the day on which it expires by the files: with the strike its instrument
    premium: np.ndarray  # USD, before costs
    spot: np.ndarray  # USD, at the sale
    exit: np.ndarray  # int64, the first place at which the rule buys it back, NEVER where it does not
    mature: np.ndarray  # int64, the place at which it is settled, if it was not bought back
    settles: np.ndarray  # bool, whether there is a price for that
    cut: np.ndarray  # bool, whether the files end before


class Nodes(NamedTuple):
    """(N,) int64: the leg that a chain which rolls at each place goes on with, -1 for none; ``other`` where ``best``
    is the very call that was bought back."""

    best: np.ndarray
    other: np.ndarray
    legs: Legs


class Outcomes(NamedTuple):
    """Of C chains: P&L vs HODL in USD a unit of underlying before costs, and costs; NaN where unknown."""

    gross: np.ndarray
    costs: np.ndarray
    label_end: np.ndarray  # int64, microseconds since 1970: of the last price that it rests on
    cut: np.ndarray  # bool: the files end before the chain does, and the outcome is its mark there


class Segment(NamedTuple):
    """Of some chains the call that is open from one place to another."""

    chain: np.ndarray  # (K,) int64, which
    legs: Legs  # (K,)
    begin: np.ndarray  # (K,) int64, the place of its sale
    end: np.ndarray  # (K,) int64, the place at which it is bought back, or settled
    paid: np.ndarray  # (K,) USD that this took, with costs
    received: np.ndarray  # (K,) USD that its sale brought, net of costs


def follow(
    sales: Sales,
    stop: np.ndarray,
    stop_time: np.ndarray,
    rule: Rule,
    spots: Spots,
    nodes: Nodes,
    options: CoveredCallCandidatesConfig,
    trail: list[Segment],
) -> Outcomes:
    """What each chain brings that begins with one of these sales.

    Args:
        stop: (C,) the place at which what is open is bought back, NEVER for none.
        stop_time: (C,) the time that stands for, which may not be that of the place.
        trail: takes in what was open when, call after call.
        nodes: where they are empty, calls are held, and of one whose expiry the files do not reach nothing is known.
    """
    rolls, rows = len(nodes.best) > 0, np.arange(len(stop))
    legs = legs_of(sales, expiries(sales), rule if rolls else rule._replace(max_rolls=0), spots)
    gross, costs, final = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    label_end, cut = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    begin = first = spots.search(sales.underlying, sales.time, "right") - 1
    left_to_roll = rule.max_rolls if rolls else 0
    while len(rows):
        closed = close_legs(legs, stop[rows], stop_time[rows], left_to_roll > 0, rule, spots, options)
        opening = trading_cost(legs.premium, legs.spot, options)
        cut[rows] = closed.unknown & legs.cut & rolls
        gross[rows] += np.where(closed.unknown & ~cut[rows], np.nan, legs.premium - closed.value)
        costs[rows] += opening + closed.costs
        final[rows], label_end[rows] = closed.place, closed.label_end
        trail.append(Segment(rows, legs, begin, closed.place, closed.value + closed.costs, legs.premium - opening))
        its = np.flatnonzero(closed.bought)
        following = next_of(closed.place[its], pick(legs, its), nodes, rule) if rolls else np.full(len(its), -1)
        its = its[following >= 0]
        rows, begin, legs = rows[its], closed.place[its], pick(nodes.legs, following[following >= 0])
        left_to_roll -= 1
    if rolls:
        gross[spots.gaps[final] > spots.gaps[first]] = np.nan
    costs[np.isnan(gross)] = np.nan
    return Outcomes(gross, costs, label_end, cut)


class Closed(NamedTuple):
    """How calls (C,) end."""

    place: np.ndarray  # int64
    bought: np.ndarray  # bool, back by the rule: another may be sold
    unknown: np.ndarray  # bool, whether it was to be settled and there is no price for that
    value: np.ndarray  # USD
    costs: np.ndarray  # USD
    label_end: np.ndarray  # int64


def close_legs(
    legs: Legs, stop: np.ndarray, stop_time: np.ndarray, may_exit: bool, rule: Rule, spots: Spots, options
) -> Closed:
    """Args: stop, stop_time: (C,) as in follow."""
    exits, lag = legs.exit if may_exit else np.full(len(stop), NEVER), hours(rule.settle_hours)
    stops = stop <= np.minimum(exits, legs.mature)
    bought = ~stops & (exits <= legs.mature)
    settled = ~stops & ~bought
    place = np.where(stops, stop, np.where(bought, exits, legs.mature))
    left = legs.expiry + lag - np.where(stops, stop_time, spots.time[place])
    left = np.where(settled & legs.settles & (lag == 0), 0, np.maximum(left, 0))
    spot = spots.spot[place]
    value = mark(spot, legs, left, rule)
    traded, unknown = bought | (stops & (left > lag)), settled & ~legs.settles
    costs = np.where(traded, trading_cost(value, spot, options), delivery_cost(value, spot, options))
    due = np.where(settled, legs.expiry, np.where(stops, stop_time, 0))
    label_end = np.where(unknown, due, np.maximum(due, spots.time[place]))
    return Closed(place, bought, unknown, value, costs, label_end)


def next_of(place: np.ndarray, before: Legs, nodes: Nodes, rule: Rule) -> np.ndarray:
    """(C,) the leg that is sold at each place after another was bought back there, -1 for none."""
    best = nodes.best[place]
    if rule.roll_min_score is None or not len(nodes.legs.strike):
        return best
    same = (nodes.legs.strike[best] == before.strike) & (nodes.legs.listed[best] == before.listed)
    return np.where((best >= 0) & same, nodes.other[place], best)


def mark(spot: np.ndarray, legs: Legs, left: np.ndarray, rule: Rule) -> np.ndarray:
    """USD that the calls are worth, ``left`` microseconds before their expiry."""
    years = np.maximum(left / DAY / DAYS_PER_YEAR, MIN_YEARS if rule.settle_hours else 0.0)
    return black_scholes_call(spot, legs.strike, years, legs.iv)


def hours(number: float) -> int:
    return round(number * HOUR)


def expiries(sales: Sales) -> np.ndarray:
    return sales.time + microseconds_of(sales.dte)


def microseconds_of(days: np.ndarray) -> np.ndarray:
    return np.rint(days * DAY).astype(np.int64)


@np.errstate(all="ignore")
def legs_of(sales: Sales, expiry: np.ndarray, rule: Rule, spots: Spots) -> Legs:
    """Args: expiry: (C,) by the rule's clock, which may be behind that of the files. rule: without rolls no exit is
    looked for."""
    lag, premium = hours(rule.settle_hours), premium_of(sales)
    begin = spots.search(sales.underlying, sales.time, "right")
    end = spots.bounds[sales.underlying + 1] - 1
    if lag:  # settled at the last decision time of its life by that clock
        mature = spots.search(sales.underlying, expiry + lag, "right") - 1
        near = (mature >= begin) & (expiry - spots.time[mature] <= 2 * spots.tolerance)
        cut = expiry > spots.time[end]
    else:
        nearest = spots.nearest(sales.underlying, expiry, spots.tolerance)
        near, cut = nearest >= 0, (nearest < 0) & (expiry > spots.time[end])
        after = np.minimum(spots.search(sales.underlying, expiry, "left"), end)
        mature = np.where(near, nearest, after)
    # A call is bought back before its settlement, or, by the clock that is behind, at the last price that it has.
    within = spots.search(sales.underlying, expiry + lag - round(rule.min_dte_to_roll * DAY), "left")
    limit = np.maximum(np.minimum(within, mature + (cut | (lag > 0))), begin)
    exits, enough = np.full(len(begin), NEVER), (1 - rule.take_profit) * premium
    if rule.max_rolls > 0:
        found = first_exits(sales, expiry + lag, enough, begin, limit, rule, spots)
        exits[found < limit] = found[found < limit]
    listed = expiries(sales) // DAY
    return Legs(sales.strike, sales.iv, expiry, listed, premium, sales.spot, exits, mature, near & ~cut, cut)


def first_exits(sales: Sales, expiry, enough, begin, limit, rule: Rule, spots: Spots) -> np.ndarray:
    """(C,) int64: the first place from ``begin`` to ``limit`` at which a call is worth ``enough`` or less, or is to be
    defended, else limit.

    Whole windows of places are passed over: a call is worth no less at any of them than at the lowest spot of all and
    the last time of all. Single places have their exact price.
    """
    exits, at, level = limit.copy(), begin.copy(), np.zeros(len(begin), np.int64)
    rows = np.flatnonzero((at < limit) & ~np.isnan(enough))
    while len(rows):
        here, room = at[rows], limit[rows] - at[rows]
        wide = np.minimum(level[rows], np.frexp(room)[1] - 1)
        spot, strike = spots.low[wide, here], sales.strike[rows]
        years = (expiry[rows] - spots.time[here + (1 << wide) - 1]) / DAY / DAYS_PER_YEAR
        worth = black_scholes_call(spot, strike, years, sales.iv[rows])
        # What floats round away is a thousandth of this at most; for the smallest of them it is not.
        doubt = np.where(wide > 0, 1e-11 * (spot + strike) + 1e-300, 0.0)
        defended = spots.high[wide, here] / strike >= rule.defend
        found = (wide == 0) & ((worth <= enough[rows]) | defended)
        passed = np.where(wide > 0, (worth > enough[rows] + doubt) & ~defended, ~found)
        exits[rows[found]] = here[found]
        at[rows] = here + (passed << wide)
        level[rows] = np.where(passed, np.minimum(wide + 1, len(spots.low) - 1), wide - 1)
        rows = rows[~found & (at[rows] < limit[rows])]
    return exits


# ---------------------------------------------------------------------------------------------------------------------
# What is rolled into


ROWS_AT_ONCE = 65_536


def parts_of(count: int) -> list[slice]:
    """Slices of rows few enough for memory; one at least."""
    return [slice(begin, begin + ROWS_AT_ONCE) for begin in range(0, max(count, 1), ROWS_AT_ONCE)]


def no_rolls(count: int) -> Rolls:
    nowhere = Calls(*(np.broadcast_to(np.nan, count) for _ in Calls._fields))  # which takes no memory
    return Rolls(nowhere, nowhere, nowhere)


def rolls_of(columns: Columns, options: CoveredCallCandidatesConfig) -> Rolls:
    """Of decisions whose candidates are in the files' order: of equals the first is taken."""
    delta, score = columns.numbers["delta"], columns.numbers["score"]
    min_score = ROLL_MIN_SCORE if options.roll_min_score is None else options.roll_min_score
    listed = (columns.time[columns.decision_of] + microseconds_of(columns.numbers["dte"])) // DAY
    order = np.where(score >= min_score, -score, np.inf)
    best = first_least(order, columns)
    row = (columns.offsets[:-1] + best)[columns.decision_of]
    strike = columns.numbers["strike"]
    same = (best[columns.decision_of] >= 0) & (strike == strike[row]) & (listed == listed[row])
    other = first_least(np.where(same, np.inf, order), columns)
    nearest = first_least(np.abs(delta - options.roll_delta), columns)
    return Rolls(*(calls_at(places, columns) for places in (nearest, best, other)))


def first_least(values: np.ndarray, columns: Columns) -> np.ndarray:
    """(D,) int64: the place in its decision of the least of (R,) values, the first of equals; -1 if none is finite."""
    places = np.full(len(columns), -1)
    begins = columns.offsets[:-1][np.diff(columns.offsets) > 0]
    if len(begins):
        least = np.repeat(np.minimum.reduceat(values, begins), np.diff(begins, append=len(values)))
        rows = np.flatnonzero((values == least) & np.isfinite(values))[::-1]  # of several the first is written last
        places[columns.decision_of[rows]] = columns.place[rows]
    return places


def calls_at(places: np.ndarray, columns: Columns) -> Calls:
    """(D,) the candidates at these places of their decisions, NaN at -1."""
    found, its = Calls(*(np.full(len(columns), np.nan) for _ in Calls._fields)), np.flatnonzero(places >= 0)
    for name, values in found._asdict().items():
        values[its] = columns.numbers[name][columns.offsets[its] + places[its]]
    return found


def nodes_of(spots: Spots, underlying: np.ndarray, places: np.ndarray, rolls: Rolls, rule: Rule) -> Nodes:
    """Args: underlying, places, rolls: (Q,) of the decisions of a style that rolls: where in the market they are, -1
    for nowhere, and what may be rolled into there. Of several at a place the last counts."""
    at = np.full(len(spots.time), -1)
    at[places[places >= 0]] = np.flatnonzero(places >= 0)
    lag, legs, found = hours(rule.settle_hours), [], []
    for calls in (rolls.nearest,) if rule.roll_min_score is None else (rolls.best, rolls.other):
        offered = np.flatnonzero((at >= 0) & ~np.isnan(calls.strike[at]))
        number = np.full(len(spots.time), -1)
        number[offered] = np.arange(len(offered)) + sum(len(leg.strike) for leg in legs)
        for part in parts_of(len(offered)):
            its = offered[part]
            sales = Sales(underlying[at[its]], spots.time[its], spots.spot[its], *pick(calls, at[its]))
            legs.append(legs_of(sales, expiries(sales) - lag, rule, spots))
        found.append(number)
    joined = Legs(*map(np.concatenate, zip(*legs, strict=True)))
    return Nodes(found[0], found[-1], joined)


NO_NODES = Nodes(np.zeros(0, np.int64), np.zeros(0, np.int64), Legs(*(np.zeros(0) for _ in Legs._fields)))
