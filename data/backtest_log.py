"""What both rules of simulate_backtest.py share: a backtest's columns and how they are written, and Black-Scholes.

It knows nothing of the package covered_call: tests check the package against it.
"""

import csv
import os
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

DAYS_PER_YEAR = 365
MIN_DELTA, MAX_DELTA = 0.15, 0.35
SCORE_THRESHOLD = 3.0

EXIT_STYLES = ("hold_to_expiry", "tp_and_roll")
COLUMNS = (
    "decision_time",
    "underlying",
    "spot",
    "instrument",
    "strike",
    "dte",
    "delta",
    "score",
    "iv",
    "ivrv_ratio",
    "exit_style",
    "trade_executed",
    "chosen",
    "action",
    "strategy",
    "reward",
    "pnl_vs_hodl",
    "max_drawdown_pct",
)


class Candidate(NamedTuple):
    """One quoted call, named as the file's columns are. dte is in whole days, ivrv_ratio may be None."""

    instrument: str
    strike: float
    dte: int
    delta: float
    score: float
    iv: float
    ivrv_ratio: float | None


class Outcome(NamedTuple):
    """What became of one sold call: USD per coin held, and the drawdown in percent; None where it is unknown."""

    reward: float | None
    pnl_vs_hodl: float | None
    max_drawdown_pct: float | None


PLACEHOLDER = Candidate("NO_CANDIDATES", 0.0, 0, 0.0, 0.0, None, None)
NOT_SOLD = Outcome(0.0, 0.0, 0.0)


# Black-Scholes, r = 0


def _d1_and_sd(spot, strike, years, iv):
    sd = iv * np.sqrt(years)
    # At expiry sd is 0 and d1 becomes +-huge, so the formulas below end in the intrinsic value.
    return np.log(spot / strike) / np.maximum(sd, 1e-12) + sd / 2, sd


def black_scholes_call(spot, strike, years, iv):
    """Value of a European call in USD, interest rate 0 (Black and Scholes 1973).

    spot and strike in USD, years to expiry >= 0, iv annualised (0.6 = 60 %), as scalars or arrays that
    broadcast. At years = 0 it is the intrinsic value max(0, spot - strike).
    """
    d1, sd = _d1_and_sd(spot, strike, years, iv)
    return spot * ndtr(d1) - strike * ndtr(d1 - sd)


def black_scholes_delta(spot, strike, years, iv):
    """Delta N(d1) of that call, 0 to 1; the same arguments as `black_scholes_call`."""
    return ndtr(_d1_and_sd(spot, strike, years, iv)[0])


def max_drawdown_pct(equity):
    """Largest fall from a running peak in percent (>= 0) of a positive equity series, shape (days + 1,)."""
    return float(100 * np.max(1 - equity / np.maximum.accumulate(equity)))


# The log


def instrument_name(underlying, expiry, strike):
    """Deribit's name with a two-digit day, such as BTC-08SEP24-63000-C."""
    return f"{underlying}-{expiry:%d%b%y}-{strike:.0f}-C".upper()


def choose(candidates):
    """The call the teacher sells: the first of the best-first list, if its score reaches SCORE_THRESHOLD."""
    return candidates[0] if candidates and candidates[0].score >= SCORE_THRESHOLD else None


def decision_rows(day, underlying, spot, candidates, exit_style, call, outcome):
    """The rows of one decision as tuples in the order of COLUMNS; a placeholder where nothing is quoted.

    day is a date. outcome is that of call, the candidate that is sold; both None for no trade.
    """
    for candidate in candidates or [PLACEHOLDER]:
        chosen = candidate is call
        yield (
            f"{day}T00:00:00+00:00",
            underlying,
            float(spot),
            candidate.instrument,
            candidate.strike,
            float(candidate.dte),
            candidate.delta,
            candidate.score,
            candidate.iv,
            candidate.ivrv_ratio,
            exit_style,
            int(call is not None),
            int(chosen),
            "SELL_CALL" if chosen else "SKIP",
            None,
            *(outcome if chosen else NOT_SOLD),
        )


def write_csv(path, rows):
    """Write COLUMNS and `rows` to `path`, which is never seen half-written."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    os.replace(temporary, path)


def summary(path, rows):
    """One line on what a file holds; shares of trades are per decision, of SKIP per candidate."""
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    decisions = len({row["decision_time"] for row in rows})
    empty = sum(row["instrument"] == PLACEHOLDER.instrument for row in rows)
    sold = [row["pnl_vs_hodl"] for row in rows if row["chosen"]]
    pnl = [value for value in sold if value is not None]
    candidates = len(rows) - empty
    skipped = 1 - len(sold) / candidates if candidates else 0.0
    mean_pnl = f"{np.mean(pnl):.2f} USD" if pnl else "n/a"
    unknown = f" ({len(sold) - len(pnl)} unknown)" if len(pnl) < len(sold) else ""
    return (
        f"{path.name}: {len(rows)} rows, {decisions} decisions, {len(sold) / decisions:.1%} traded, "
        f"{skipped:.1%} of candidates SKIP, {empty} NO_CANDIDATES steps, "
        f"mean pnl_vs_hodl of trades {mean_pnl}{unknown}"
    )
