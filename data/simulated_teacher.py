"""The teacher's rule on any series of daily spots: its candidates, its score, and what its two exit styles bring.

One vol prices every call of a day, whatever the market asked for it. A day's label is 00:00 UTC and its price that
of the candle which begins 8 hours later, so that the clock of marks and exits is CLOCK_LAG hours behind: a call is
settled at its Black-Scholes value with that much time left, and not at its intrinsic value.
"""

import csv
import math
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np
from backtest_log import (
    DAYS_PER_YEAR,
    EXIT_STYLES,
    MAX_DELTA,
    MIN_DELTA,
    Candidate,
    Outcome,
    black_scholes_call,
    black_scholes_delta,
    choose,
    decision_rows,
    instrument_name,
    max_drawdown_pct,
)

DAYS_TO_EXPIRY = 7
CLOCK_LAG = 16  # hours
MIN_YEARS = 1e-6

# Strikes: from each spot in USD the step of the grid, and how many steps around the spot there are.
STRIKE_GRIDS = {
    "BTC": ((50_000, 1000), (10_000, 500), (0, 250)),
    "ETH": ((3_000, 50), (1_000, 25), (0, 10)),  # of the teacher's the steps are known; from which spots, is assumed
}
LOWEST_STEP, HIGHEST_STEP = -5, 20

HISTORY_DAYS = 50
VOL_DAYS = (30, 7)  # of the realised and of the short vol
TARGET_DELTA, DELTA_WIDTH = 0.25, 0.10

TAKE_PROFIT, DEFEND, MIN_HOURS_TO_ROLL, MAX_ROLLS = 0.80, 0.98, 48, 3
MAX_FRACTION = 5.0  # vols above it are in points, such as 70


class SeriesError(ValueError):
    """A series that cannot be used; the message says where and why."""


# What a day looks like from the past


class History(NamedTuple):
    """Returns and vols are fractions; None where there are too few days before."""

    realised_vol: float | None
    short_vol: float | None
    distance: float | None  # of the spot from the mean of HISTORY_DAYS, today's among them
    week: float | None  # return
    month: float | None


def history_of(prices):
    """prices: (days,) USD up to today's, NaN on a missing day, which leaves what needs it unknown."""
    vols = [annualised_vol(prices[-days - 1 :]) if len(prices) > days else None for days in VOL_DAYS]
    if len(prices) < HISTORY_DAYS or np.isnan(prices[-HISTORY_DAYS:]).any():
        return History(*vols, None, None, None)
    today = prices[-1]
    distance = today / np.mean(prices[-HISTORY_DAYS:]) - 1
    return History(*vols, distance, today / prices[-8] - 1, today / prices[-31] - 1)


def annualised_vol(prices):
    """Of the log returns between these prices; None if one is missing."""
    vol = np.std(np.diff(np.log(prices)), ddof=1) * np.sqrt(DAYS_PER_YEAR)
    return None if np.isnan(vol) else float(vol)


def score(delta, ivrv_ratio, penalty):
    """0 to 10; the premium counts for nothing. A missing ivrv_ratio (None) counts as 1."""
    richness = 3 * (min(max(1.0 if ivrv_ratio is None else ivrv_ratio, 1.0), 1.5) - 1) / 0.5
    nearness = 2 * max(0.0, 1 - abs(delta - TARGET_DELTA) / DELTA_WIDTH)
    on_time = 1.5  # which it is less of for another number of days
    return min(max(richness + nearness + on_time - penalty, 0.0), 10.0)


def penalty(spot, strike, history):
    """What the score loses by the market's state; nothing without a history."""
    _, short_vol, distance, week, month = history
    if distance is None:
        return 0.0
    lost = 0.0
    if distance > 0.05 and month > 0.10:  # bull
        lost += 1.0 * (strike / spot - 1 < 0.05) + 0.5 * (month > 0.25)
    elif distance < -0.05 and month < -0.10:  # bear
        lost += 0.5 * (week < -0.10)
    return lost + 0.5 * (0 < short_vol < 0.30) + 0.5 * (abs(distance) > 0.20)


# The candidates


def strike_grid(underlying, spot):
    """USD, ascending."""
    step = next(step for least, step in STRIKE_GRIDS[underlying] if spot >= least)
    strikes = round(spot / step) * step + step * np.arange(LOWEST_STEP, HIGHEST_STEP + 1)
    return strikes[strikes > 0].astype(float)


def list_candidates(underlying, today, prices, iv):
    """The calls of a day, best score first; [] without a vol.

    today is a date, prices (days,) USD up to today's, iv a fraction a year or None.
    """
    if iv is None:
        return []
    spot, history = prices[-1], history_of(prices)
    ratio = iv / history.realised_vol if history.realised_vol else None
    strikes = strike_grid(underlying, spot)
    deltas = black_scholes_delta(spot, strikes, DAYS_TO_EXPIRY / DAYS_PER_YEAR, iv)
    candidates = []
    for strike, delta in zip(strikes.tolist(), deltas.tolist(), strict=True):
        if MIN_DELTA <= delta <= MAX_DELTA:
            name = instrument_name(underlying, today + timedelta(days=DAYS_TO_EXPIRY), strike)
            points = score(delta, ratio, penalty(spot, strike, history))
            candidates.append(Candidate(name, strike, DAYS_TO_EXPIRY, delta, float(points), iv, ratio))
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.strike))


# The exit styles


def trade_outcome(prices, chains, day, call, last, max_rolls):
    """Outcome of selling a call on a day, by its last mark: of each day up to `last` within its life.

    prices: (days,) USD, NaN on a missing day. chains: each day's candidates, best first. With rolls left, a call is
    bought back, and the best other one sold, once enough of its premium is earned or the spot is near its strike.
    None if there is no mark.
    """
    strike, iv, expiry, rolled, booked = call.strike, call.iv, 24 * (day + call.dte), 0, 0.0
    listed = day + call.dte
    premium = value_of(prices[day], strike, 24 * call.dte, iv)
    equity = [prices[day] + premium - value_of(prices[day], strike, expiry - tick(day), iv)]
    for later in range(day + 1, last + 1):
        hours = expiry - tick(later)
        if hours < 0:
            break
        if np.isnan(prices[later]):
            continue
        value = value_of(prices[later], strike, hours, iv)
        equity.append(prices[later] + booked + premium - value)
        done = value <= (1 - TAKE_PROFIT) * premium or prices[later] / strike >= DEFEND
        if hours > MIN_HOURS_TO_ROLL and rolled < max_rolls and done:
            booked += premium - value
            others = [one for one in chains[later] if (one.strike, later + one.dte) != (strike, listed)]
            following = choose(others)
            if following is None:
                premium = value  # so that nothing is left open
                break
            strike, iv, listed, rolled = following.strike, following.iv, later + following.dte, rolled + 1
            expiry = tick(later) + 24 * following.dte
            premium = value = value_of(prices[later], strike, 24 * following.dte, iv)
    if len(equity) == 1:
        return None
    pnl, equity = booked + premium - value, np.array(equity)
    if max_rolls:  # whose log counts from the first mark on, and the calls alone
        return Outcome(float(pnl), float(pnl), max_drawdown_pct(equity[1:]))
    return Outcome(float(equity[-1] - equity[0]), float(pnl), max_drawdown_pct(equity))


def tick(day):
    """What the clock of marks and exits shows, in hours since the first day."""
    return 24 * day - CLOCK_LAG


def value_of(spot, strike, hours, iv):
    return black_scholes_call(spot, strike, max(hours / 24 / DAYS_PER_YEAR, MIN_YEARS), iv)


# The log


def teacher_logs(underlying, spots, ivs, start, end):
    """The rows of each exit style, for the days of start..end (dates) that have a spot.

    spots: {date: USD}; the days before start are history, those after end settle what is held. ivs: {date: fraction
    a year}, or one for all; a day without has no candidates.
    """
    first = min(spots)
    days = [first + timedelta(days=number) for number in range((max(spots) - first).days + 1)]
    prices = np.array([spots.get(day, math.nan) for day in days])
    decided = [number for number, day in enumerate(days) if start <= day <= end and day in spots]
    if not decided:
        raise SeriesError(f"no spot from {start} to {end}: the series is of {first} to {max(spots)}")
    chains = [[] for _ in days]
    for number in decided:
        iv = ivs.get(days[number]) if isinstance(ivs, dict) else ivs
        chains[number] = list_candidates(underlying, days[number], prices[: number + 1], iv)
    return {
        style: [
            row
            for number in decided
            for row in teacher_rows(underlying, days[number], prices, chains, number, decided[-1], style)
        ]
        for style in EXIT_STYLES
    }


def teacher_rows(underlying, today, prices, chains, day, last, exit_style):
    """The rows of one decision, the day-th; last is the file's last."""
    call, outcome = choose(chains[day]), None
    if call and exit_style == "tp_and_roll":
        outcome = trade_outcome(prices, chains, day, call, last, MAX_ROLLS)
        call = call if outcome else None  # of the file's last decision no mark is left, and no trade is logged
    elif call:
        settled = day + call.dte < len(prices) and trade_outcome(prices, chains, day, call, len(prices) - 1, 0)
        outcome = settled or Outcome(None, None, None)
    return decision_rows(today, underlying, prices[day], chains[day], exit_style, call, outcome)


# Series from a file


def read_series(path):
    """{date: number above 0} of a CSV with a header, dates or times in its first column, numbers in its second.

    An empty second cell is a missing day. Raises SeriesError for a row that is neither, naming line and column.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [(line, row) for line, row in enumerate(csv.reader(file), start=1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SeriesError(f"{path} cannot be read: {error}") from error
    series, seen = {}, set()
    for line, row in rows[1:]:
        day, number = day_of(path, line, row), number_of(path, line, row)
        if day in seen:
            raise SeriesError(f"{path}, line {line}, column 1: {day} stands there twice")
        seen.add(day)
        if number is not None:
            series[day] = number
    if not series:
        raise SeriesError(f"{path} holds no number: give a header, dates in the first column, numbers in the second")
    return series


def day_of(path, line, row):
    try:
        time = datetime.fromisoformat(row[0].strip())
    except ValueError:
        raise SeriesError(f"{path}, line {line}, column 1: {row[0]!r} is no date such as 2024-09-01") from None
    return (time.astimezone(UTC) if time.tzinfo else time).date()


def number_of(path, line, row):
    text = row[1].strip() if len(row) > 1 else ""
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise SeriesError(f"{path}, line {line}, column 2: {row[1]!r} is no number above 0")
    return number


def read_vols(text):
    """A vol for all days, as a fraction a year, or {date: vol} from a CSV, in points where all are above 5."""
    try:
        vol = float(text)
    except ValueError:
        vols = read_series(text)
        in_points = {vol > MAX_FRACTION for vol in vols.values()}
        if len(in_points) > 1:
            raise SeriesError(f"{text}: some vols are above {MAX_FRACTION:g} and some are not") from None
        return {day: vol / 100 if in_points == {True} else vol for day, vol in vols.items()}
    if not 0 < vol <= MAX_FRACTION:
        raise SeriesError(f"{vol:g} is no vol: give a fraction a year, such as 0.70")
    return vol


def missing_days(series):
    """The dates between the first and the last that have no number."""
    first = min(series)
    days = (first + timedelta(days=number) for number in range((max(series) - first).days))
    return [day for day in days if day not in series]
