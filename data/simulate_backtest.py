"""Simulate a covered-call backtest and write it as two CSV files, one per exit style.

Nothing here is market data. A GJR-GARCH path with jumps stands in for BTC, a smile of implied vols on a
strike grid stands in for Deribit's weekly calls, and a threshold rule stands in for the teacher. Both files
hold the same path, candidates and scores; only the outcome of the sold call differs. Same seed, same bytes.

    python data/simulate_backtest.py --output_dir data/sample
"""

import argparse
import csv
import os
from datetime import date, timedelta
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from arch.univariate import GARCH, ConstantMean, StudentsT
from scipy.special import ndtr

UNDERLYING = "BTC"
DAYS_PER_YEAR = 365
SETTLEMENT_DAYS = 30  # the path goes on this long after the last decision, so that every option settles

DEFAULT_SEED = 349  # picked by eye among a few hundred: its path has BTC's growth, crashes and final level

# Price path: log returns in percent a day
START_SPOT = 3700.0
DRIFT = 0.12
GJR_GARCH = (0.24, 0.08, 0.03, 0.88)  # omega, alpha, gamma (falls raise vol a little more), beta
STUDENT_DF = 5.0
JUMPS_PER_YEAR = 8
JUMP_MEAN, JUMP_SD = -1.0, 6.0

# Implied vol: in weekly Deribit chains the vol relative to at-the-money is close to 1 - 0.07 z + 0.045 z^2,
# with z = log(strike / spot) / (atm_iv * sqrt(years)). The wings are flat: a parabola that went on would lift
# the delta of far strikes back into the candidates' range.
VOL_RISK_PREMIUM = 0.05
SKEW, CURVATURE = -0.07, 0.045
MAX_MONEYNESS = 2.5
ATM_IV_NOISE, QUOTE_IV_NOISE = 0.06, 0.005
REALISED_VOL_DAYS = 30

# Candidates
TARGET_DTE = 7
TARGET_DELTA = 0.25
MIN_DELTA, MAX_DELTA = 0.15, 0.35
MAX_CANDIDATES = 10
STRIKE_STEPS = (5, 10, 25, 50, 100, 250, 500, 1000, 2000, 5000, 10000, 25000)
MAX_RELATIVE_STEP = 0.02
MISSING_QUOTE, MISSING_CHAIN = 0.06, 0.012  # probability that one quote, or a whole day's chain, is absent

# Teacher
BASE_SCORE = 3.9
DELTA_WEIGHT, DTE_WEIGHT = 20.0, 0.1  # a unit of delta, a day
IVRV_WEIGHT = 5.0
YIELD_WEIGHT, TYPICAL_YIELD = 50.0, 0.01  # premium / spot
SCORE_THRESHOLD = 3.0
TAKE_PROFIT = 0.70  # tp_and_roll buys a call back once this share of its premium is captured

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
    """What became of one sold call: USD per 1 BTC held, and the drawdown in percent."""

    reward: float
    pnl_vs_hodl: float
    max_drawdown_pct: float


PLACEHOLDER = Candidate("NO_CANDIDATES", 0.0, 0, 0.0, 0.0, None, None)
UNKNOWN = Outcome(0.0, 0.0, 0.0)


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


# Exit styles


def max_drawdown_pct(equity):
    """Largest fall from a running peak in percent (>= 0) of a positive equity series, shape (days + 1,)."""
    return float(100 * np.max(1 - equity / np.maximum.accumulate(equity)))


def hold_to_expiry_outcome(spots, strike, iv):
    """Outcome of selling a call against 1 BTC at spots[0] and holding it until it expires at spots[-1].

    spots: daily USD prices from the decision to expiry, shape (dte + 1,). strike in USD, iv annualised.
    pnl_vs_hodl = premium - max(0, spots[-1] - strike), the premium by Black-Scholes at iv;
    reward = pnl_vs_hodl + spots[-1] - spots[0]. The drawdown is that of BTC plus the short call, repriced
    each day at the entry iv.
    """
    years = np.arange(len(spots) - 1, -1, -1) / DAYS_PER_YEAR
    values = black_scholes_call(spots, strike, years, iv)
    pnl = values[0] - values
    return Outcome(float(pnl[-1] + spots[-1] - spots[0]), float(pnl[-1]), max_drawdown_pct(spots + pnl))


def tp_and_roll_outcome(spots, strike, iv, roll_call):
    """Outcome of selling a call against 1 BTC, taking profit early and rolling, until the first one's expiry.

    spots: daily USD prices from the decision to the first call's expiry, shape (dte + 1,). strike in USD, iv
    annualised. Each later day the call is repriced by Black-Scholes at its entry iv; once TAKE_PROFIT of its
    premium is captured it is bought back, and roll_call(day) names the call to sell that day as (strike, dte,
    iv), or None to sell nothing more. A call still open on the last day is bought back at its value.
    pnl_vs_hodl is the sum over all calls; reward equals it, as in the files of this exit style.
    """
    last = len(spots) - 1
    expiry, booked, pnl = last, 0.0, np.zeros(len(spots))
    premium = black_scholes_call(spots[0], strike, expiry / DAYS_PER_YEAR, iv)
    for day in range(1, last + 1):
        value = black_scholes_call(spots[day], strike, (expiry - day) / DAYS_PER_YEAR, iv)
        pnl[day:] = booked + premium - value  # and so it stays if nothing more is sold
        if day in (expiry, last):
            break
        if value <= (1 - TAKE_PROFIT) * premium:
            call = roll_call(day)
            if call is None:
                break
            booked = pnl[day]
            strike, dte, iv = call
            expiry = day + dte
            premium = black_scholes_call(spots[day], strike, dte / DAYS_PER_YEAR, iv)
    return Outcome(float(pnl[-1]), float(pnl[-1]), max_drawdown_pct(spots + pnl))


# The simulated market


def random_stream(seed, stream):
    """A stream of its own for each source of chance, so that a longer run repeats a shorter one's start."""
    # RandomState's streams are frozen across numpy versions; Generator's are not.
    return np.random.RandomState([seed, stream])


def simulate_path(seed, days):
    """Daily spots in USD and the GARCH variance of each day's next return in percent^2, both shape (days,).

    GJR-GARCH(1,1,1) with Student-t innovations (Glosten, Jagannathan and Runkle 1993), plus compound Poisson
    jumps of normal size (Merton 1976).
    """
    innovations = StudentsT(seed=random_stream(seed, 0))
    model = ConstantMean(volatility=GARCH(p=1, o=1, q=1), distribution=innovations)
    simulated = model.simulate([DRIFT, *GJR_GARCH, STUDENT_DF], nobs=days)
    jumps = random_stream(seed, 1).poisson(JUMPS_PER_YEAR / DAYS_PER_YEAR, days)
    sizes = JUMP_MEAN * jumps + JUMP_SD * np.sqrt(jumps) * random_stream(seed, 2).standard_normal(days)
    log_returns = (simulated["data"].to_numpy() + sizes) / 100
    prices = START_SPOT * np.exp(np.concatenate([[0.0], np.cumsum(log_returns[:-1])]))
    return np.round(2 * prices) / 2, simulated["volatility"].to_numpy() ** 2


def forecast_vol(variance, days):
    """Annualised vol expected over the next `days`, from the GARCH variance of the next day (percent^2)."""
    omega, alpha, gamma, beta = GJR_GARCH
    persistence = alpha + gamma / 2 + beta
    long_run = omega / (1 - persistence)
    garch = long_run + (variance - long_run) * np.mean(persistence ** np.arange(days))
    jumps = JUMPS_PER_YEAR / DAYS_PER_YEAR * (JUMP_MEAN**2 + JUMP_SD**2)
    return np.sqrt((garch + jumps) * DAYS_PER_YEAR) / 100


def trailing_realised_vol(spots, day):
    """Annualised vol of the REALISED_VOL_DAYS log returns up to spots[day]; None where there are fewer."""
    if day < REALISED_VOL_DAYS:
        return None
    log_returns = np.diff(np.log(spots[day - REALISED_VOL_DAYS : day + 1]))
    return np.std(log_returns, ddof=1) * np.sqrt(DAYS_PER_YEAR)


def days_to_weekly_expiry(today):
    """Days to the Friday nearest to TARGET_DTE days ahead: an int from 4 to 10."""
    friday = 4
    to_friday = (friday - today.weekday()) % 7
    return min((to_friday, to_friday + 7), key=lambda days: abs(days - TARGET_DTE))


def strike_step(spot):
    """Distance of listed strikes in USD: the largest usual step that is at most MAX_RELATIVE_STEP of spot."""
    return max(step for step in STRIKE_STEPS if step == STRIKE_STEPS[0] or step <= MAX_RELATIVE_STEP * spot)


def instrument_name(expiry, strike):
    """Deribit's name with a two-digit day, such as BTC-08SEP24-63000-C."""
    return f"{UNDERLYING}-{expiry:%d%b%y}-{strike:.0f}-C".upper()


def smile(atm_iv, spot, strikes, years):
    """Implied vols of `strikes` (USD, shape (n,)): a parabola in standardised moneyness; same shape."""
    z = np.clip(np.log(strikes / spot) / (atm_iv * np.sqrt(years)), -MAX_MONEYNESS, MAX_MONEYNESS)
    return atm_iv * (1 + SKEW * z + CURVATURE * z**2)


def score(delta, dte, premium_yield, ivrv_ratio):
    """The teacher's liking for a call; higher is better, most best scores lie between 1.5 and 6.5.

    premium_yield is premium / spot; a missing ivrv_ratio (None) counts as neutral 1.0. Delta decides between
    the calls of one day, the other terms move the whole day's level.
    """
    richness = np.clip((1.0 if ivrv_ratio is None else ivrv_ratio) - 1, -0.5, 0.5)
    level = BASE_SCORE + IVRV_WEIGHT * richness + YIELD_WEIGHT * (premium_yield - TYPICAL_YIELD)
    return level - DELTA_WEIGHT * abs(delta - TARGET_DELTA) - DTE_WEIGHT * abs(dte - TARGET_DTE)


def list_candidates(rng, today, spot, variance, realised_vol):
    """The day's candidates, best score first; [] where nothing is quoted.

    today is a date, spot in USD, variance the GARCH variance of the next return (percent^2), realised_vol
    annualised or None.
    """
    dte = days_to_weekly_expiry(today)
    years = dte / DAYS_PER_YEAR
    atm_noise, chain_draw = rng.standard_normal(), rng.random_sample()
    atm_iv = forecast_vol(variance, dte) * (1 + VOL_RISK_PREMIUM) * np.exp(ATM_IV_NOISE * atm_noise)

    step = strike_step(spot)
    strikes = np.arange(spot // step + 1, 2 * spot // step) * step
    noise = 1 + QUOTE_IV_NOISE * rng.standard_normal(len(strikes))
    # Four decimals, as Deribit quotes vols; what follows uses the rounded vol, so the file explains itself.
    ivs = np.round(smile(atm_iv, spot, strikes, years) * noise, 4)
    deltas = np.round(black_scholes_delta(spot, strikes, years, ivs), 6)
    quoted = (rng.random_sample(len(strikes)) >= MISSING_QUOTE) & (chain_draw >= MISSING_CHAIN)
    eligible = np.flatnonzero(quoted & (deltas >= MIN_DELTA) & (deltas <= MAX_DELTA))
    nearest = eligible[np.argsort(abs(deltas[eligible] - TARGET_DELTA), kind="stable")][:MAX_CANDIDATES]

    candidates = []
    for strike, iv, delta in zip(strikes[nearest], ivs[nearest], deltas[nearest], strict=True):
        ratio = None if realised_vol is None else round(float(iv / realised_vol), 6)
        premium_yield = black_scholes_call(spot, strike, years, iv) / spot
        points = round(float(score(delta, dte, premium_yield, ratio)), 6)
        name = instrument_name(today + timedelta(days=dte), strike)
        candidates.append(Candidate(name, float(strike), dte, float(delta), points, float(iv), ratio))
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.strike))


def simulate_market(seed, start, decisions):
    """Spots in USD and each day's candidates, both `decisions` + SETTLEMENT_DAYS days long from `start`."""
    days = decisions + SETTLEMENT_DAYS
    spots, variances = simulate_path(seed, days)
    rng = random_stream(seed, 3)
    chains = [
        list_candidates(
            rng, start + timedelta(days=day), spots[day], variances[day], trailing_realised_vol(spots, day)
        )
        for day in range(days)
    ]
    return spots, chains


# The teacher and its log


def choose(candidates):
    """The call the teacher sells: the first of the best-first list, if its score reaches SCORE_THRESHOLD."""
    return candidates[0] if candidates and candidates[0].score >= SCORE_THRESHOLD else None


def trade_outcome(spots, chains, day, call, exit_style):
    """Outcome of selling `call` on `day`; a roll sells that day's candidate nearest to TARGET_DELTA."""

    def roll_call(days_later):
        candidates = chains[day + days_later]
        if not candidates:
            return None
        nearest = min(candidates, key=lambda candidate: abs(candidate.delta - TARGET_DELTA))
        return nearest.strike, nearest.dte, nearest.iv

    life = spots[day : day + call.dte + 1]
    if exit_style == "hold_to_expiry":
        return hold_to_expiry_outcome(life, call.strike, call.iv)
    return tp_and_roll_outcome(life, call.strike, call.iv, roll_call)


def decision_rows(start, spots, chains, day, exit_style):
    """The rows of one decision as tuples in the order of COLUMNS; a placeholder where nothing is quoted."""
    call = choose(chains[day])
    outcome = trade_outcome(spots, chains, day, call, exit_style) if call else UNKNOWN
    decision_time = f"{start + timedelta(days=day)}T00:00:00+00:00"
    for candidate in chains[day] or [PLACEHOLDER]:
        chosen = candidate is call
        yield (
            decision_time,
            UNDERLYING,
            float(spots[day]),
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
            # Six decimals: another CPU's last bit must not change the file.
            *(round(value, 6) for value in (outcome if chosen else UNKNOWN)),
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
    pnl = [row["pnl_vs_hodl"] for row in rows if row["chosen"]]
    candidates = len(rows) - empty
    skipped = 1 - len(pnl) / candidates if candidates else 0.0
    mean_pnl = f"{np.mean(pnl):.2f} USD" if pnl else "n/a"
    return (
        f"{path.name}: {len(rows)} rows, {decisions} decisions, {len(pnl) / decisions:.1%} traded, "
        f"{skipped:.1%} of candidates SKIP, {empty} NO_CANDIDATES steps, "
        f"mean pnl_vs_hodl of trades {mean_pnl}"
    )


def simulate_backtest(output_dir, seed, start, end):
    """Write one CSV per exit style for the daily decisions of start..end (dates, both included).

    Returns the summary lines; creates `output_dir` where it is missing.
    """
    decisions = (end - start).days + 1
    spots, chains = simulate_market(seed, start, decisions)
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for exit_style in EXIT_STYLES:
        logs = (decision_rows(start, spots, chains, day, exit_style) for day in range(decisions))
        rows = list(chain.from_iterable(logs))
        name = f"training_candidates_{UNDERLYING}_{start:%Y%m%d}_{end:%Y%m%d}_{exit_style}_simulated.csv"
        write_csv(output_dir / name, rows)
        lines.append(summary(output_dir / name, rows))
    return lines


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Simulate a covered-call backtest: one CSV per exit style, reproducible from the seed.",
        epilog="example: python data/simulate_backtest.py --output_dir out --seed 7",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sample = Path(__file__).resolve().parent / "sample"
    day = {"type": date.fromisoformat, "metavar": "YYYY-MM-DD"}
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=sample, help="folder for the CSVs")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="0 to 2**32 - 1")
    parser.add_argument("--start", default="2019-01-01", help="first decision, 00:00 UTC", **day)
    parser.add_argument("--end", default="2025-12-06", help="last decision, 00:00 UTC", **day)
    args = parser.parse_args(argv)
    if args.end < args.start:
        parser.error(f"--end {args.end} is before --start {args.start}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed} is not between 0 and 2**32 - 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    for line in simulate_backtest(args.output_dir, args.seed, args.start, args.end):
        print(line)


if __name__ == "__main__":
    main()
