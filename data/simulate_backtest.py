"""Simulate a covered-call backtest and write it as two CSV files, one per exit style.

Nothing here is market data. A GJR-GARCH path with jumps stands in for BTC, a smile of implied vols on a
strike grid stands in for Deribit's weekly calls, and a threshold rule stands in for the teacher. Both files
hold the same path, candidates and scores; only the outcome of the sold call differs. Same seed, same bytes.

    python data/simulate_backtest.py --output_dir data/sample

With --rule teacher the rule is another, that of simulated_teacher.py, and the spots may be any.
"""

import argparse
import sys
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from arch.univariate import GARCH, ConstantMean, StudentsT

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for whoever loads this file in another way than by a run

from backtest_log import (  # noqa: E402
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
    summary,
    write_csv,
)
from simulated_teacher import (  # noqa: E402
    STRIKE_GRIDS,
    SeriesError,
    missing_days,
    read_series,
    read_vols,
    teacher_logs,
)

UNDERLYING = "BTC"
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
MAX_CANDIDATES = 10
STRIKE_STEPS = (5, 10, 25, 50, 100, 250, 500, 1000, 2000, 5000, 10000, 25000)
MAX_RELATIVE_STEP = 0.02
MISSING_QUOTE, MISSING_CHAIN = 0.06, 0.012  # probability that one quote, or a whole day's chain, is absent

# Teacher
BASE_SCORE = 3.9
DELTA_WEIGHT, DTE_WEIGHT = 20.0, 0.1  # a unit of delta, a day
IVRV_WEIGHT = 5.0
YIELD_WEIGHT, TYPICAL_YIELD = 50.0, 0.01  # premium / spot
TAKE_PROFIT = 0.70  # tp_and_roll buys a call back once this share of its premium is captured

# Exit styles


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
        name = instrument_name(UNDERLYING, today + timedelta(days=dte), strike)
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


# The log


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


def simulated_rows(start, spots, chains, day, exit_style):
    """The rows of one decision."""
    call, outcome = choose(chains[day]), None
    if call:
        # Six decimals: another CPU's last bit must not change the file.
        outcome = Outcome(*(round(value, 6) for value in trade_outcome(spots, chains, day, call, exit_style)))
    return decision_rows(start + timedelta(days=day), UNDERLYING, spots[day], chains[day], exit_style, call, outcome)


def simulate_backtest(output_dir, seed, start, end):
    """Write one CSV per exit style for the daily decisions of start..end (dates, both included).

    Returns the summary lines; creates `output_dir` where it is missing.
    """
    decisions = (end - start).days + 1
    spots, chains = simulate_market(seed, start, decisions)
    logs = {
        style: [row for day in range(decisions) for row in simulated_rows(start, spots, chains, day, style)]
        for style in EXIT_STYLES
    }
    return write_logs(output_dir, f"{UNDERLYING}_{start:%Y%m%d}_{end:%Y%m%d}", logs, "simulated")


def simulated_spots(seed, start, end):
    """{date: USD} of the path, on to where all that is sold until end is settled."""
    spots, _ = simulate_path(seed, (end - start).days + 1 + SETTLEMENT_DAYS)
    return {start + timedelta(days=day): float(spot) for day, spot in enumerate(spots)}


def simulate_teacher(output_dir, underlying, spots, ivs, start, end):
    """The same by the teacher's rule, for the days of start..end that have a spot.

    spots: {date: USD}; ivs likewise as fractions a year, or one for all days.
    """
    start, end = max(start, min(spots)), min(end, max(spots))
    logs = teacher_logs(underlying, spots, ivs, start, end)
    return write_logs(output_dir, f"{underlying}_{start:%Y%m%d}_{end:%Y%m%d}", logs, "teacher")


def write_logs(output_dir, name, logs, rule):
    """Write the rows of each exit style to a file of its own; returns the summary lines."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for exit_style, rows in logs.items():
        path = output_dir / f"training_candidates_{name}_{exit_style}_{rule}.csv"
        write_csv(path, rows)
        lines.append(summary(path, rows))
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
    parser.add_argument("--rule", choices=("simulated", "teacher"), default="simulated", help="see data/README.md")
    teacher = parser.add_argument_group("with --rule teacher alone")
    teacher.add_argument("--underlying", choices=tuple(STRIKE_GRIDS), default=UNDERLYING, help="whose strikes")
    teacher.add_argument(
        "--spots",
        metavar="CSV",
        help="with a header, a date in the first column and USD in the second; without it, the path of the seed",
    )
    teacher.add_argument("--iv", metavar="VOL", default="0.70", help="of all days, or a CSV of such by date")
    args = parser.parse_args(argv)
    if args.end < args.start:
        parser.error(f"--end {args.end} is before --start {args.start}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed} is not between 0 and 2**32 - 1")
    for name in ("underlying", "spots", "iv"):
        if args.rule == "simulated" and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} goes with --rule teacher")
    if args.rule == "teacher":
        if args.output_dir.resolve() == sample:
            parser.error("--rule teacher: give an --output_dir, for in the sample there is a backtest already")
        read_input(args, parser)
    return args


def read_input(args, parser):
    """Puts the series themselves in the place of their names."""
    try:
        args.spots = read_series(args.spots) if args.spots else simulated_spots(args.seed, args.start, args.end)
        args.iv = read_vols(args.iv)
        if not any(args.start <= day <= args.end for day in args.spots):
            raise SeriesError(f"no spot from {args.start} to {args.end}: those given end on {max(args.spots)}")
    except SeriesError as error:
        parser.error(str(error))
    for name, series in (("spot", args.spots), ("vol", args.iv)):
        missing = missing_days(series) if isinstance(series, dict) else []
        if missing:
            some = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
            print(f"{len(missing)} day(s) have no {name}: {some}")


def main(argv=None):
    args = parse_args(argv)
    if args.rule == "teacher":
        lines = simulate_teacher(args.output_dir, args.underlying, args.spots, args.iv, args.start, args.end)
    else:
        lines = simulate_backtest(args.output_dir, args.seed, args.start, args.end)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
