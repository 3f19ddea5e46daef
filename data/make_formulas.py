"""Questions on the arithmetic of covered calls, each with its answer: chats to mix into a training.

    python data/make_formulas.py --out corpora/formulas.jsonl

writes corpora/formulas.jsonl, to train on, and corpora/formulas_held_out.jsonl, whose templates the first has not: to
judge by. Every number that an answer needs stands in its question; tests/test_formulas.py reads them from there and
computes each answer again. The same seed gives the same bytes. The questions are dedicated to the public domain: CC0
1.0.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

SYSTEM = "You compute what a seller of covered calls needs. Reply with the number alone, rounded as asked."
YEAR = 365
Numbers = dict[str, float]


class Template(NamedTuple):
    """A question with places for its numbers, how many decimals its answer has, the draw and the formula."""

    name: str
    text: str
    decimals: int
    draw: Callable[[np.random.Generator], dict]
    answer: Callable[..., float]


# ---------------------------------------------------------------------------------------------------------------------
# Draws: numbers as they are shown, so that nothing is hidden behind a rounding


def spot_of(rng: np.random.Generator) -> float:
    return float(rng.choice([rng.integers(1_500, 5_000), rng.integers(15_000, 125_000)]))


def call(rng: np.random.Generator) -> Numbers:
    spot = spot_of(rng)
    step = 1_000 if spot > 10_000 else 50
    strike = max(round(spot * (1 + rng.uniform(0.01, 0.15)) / step) * step, step)
    return {"spot": spot, "strike": float(strike), "dte": int(rng.integers(3, 22)), "iv": two(rng.uniform(0.3, 1.1))}


def sale(rng: np.random.Generator) -> Numbers:
    its = call(rng)
    return {**its, "premium": two(its["spot"] * rng.uniform(0.003, 0.03))}


def held_sale(rng: np.random.Generator) -> Numbers:
    its = sale(rng)
    return {**its, "end": float(round(its["spot"] * (1 + rng.normal(0.02, 0.09))))}


def record(rng: np.random.Generator) -> Numbers:
    return {
        "p": two(rng.uniform(0.4, 0.85)),
        "win": two(rng.uniform(0.2, 2.0)),
        "loss": two(rng.uniform(0.2, 3.0)),
    }


def closes(rng: np.random.Generator) -> dict:
    path = spot_of(rng) * np.exp(np.cumsum(rng.normal(0, 0.03, 6)))
    return {"closes": ", ".join(f"{round(close)}" for close in path)}


def equity(rng: np.random.Generator) -> dict:
    return {"values": ", ".join(f"{value:.1f}" for value in 100 * np.exp(np.cumsum(rng.normal(0, 0.04, 6))))}


def vols(rng: np.random.Generator) -> Numbers:
    return {"iv": two(rng.uniform(0.3, 1.1)), "rv": two(rng.uniform(0.25, 0.95))}


def state(rng: np.random.Generator) -> Numbers:
    return {
        "ivrv": two(rng.uniform(0.8, 1.8)),
        "delta": round(float(rng.uniform(0.12, 0.38)), 4),
        "dte": two(rng.uniform(4.5, 9.5)),
        "pct": two(rng.uniform(0.1, 2.2)),
    }


def bull(rng: np.random.Generator) -> Numbers:
    its = {"above": two(rng.uniform(1, 9)), "month": two(rng.uniform(11, 40))}
    return its | {"score": two(rng.uniform(2.6, 8))}


def two(value: float) -> float:
    return round(float(value), 2)


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


def deviation(dte, iv):
    return iv * math.sqrt(dte / YEAR)


def delta_of(spot, strike, dte, iv):
    return float(ndtr(math.log(spot / strike) / deviation(dte, iv) + deviation(dte, iv) / 2))


def value_of(spot, strike, dte, iv):
    """Black and Scholes 1973, at rate 0."""
    below = float(ndtr(math.log(spot / strike) / deviation(dte, iv) - deviation(dte, iv) / 2))
    return spot * delta_of(spot, strike, dte, iv) - strike * below


def overlay(strike, premium, end):
    return premium - max(0.0, end - strike)


def fee_of(spot, premium):
    return min(0.0003 * spot, 0.125 * premium)


def realised_vol(closes):
    return float(np.std(np.diff(np.log([float(close) for close in closes.split(", ")])), ddof=1) * math.sqrt(YEAR))


def drawdown(values):
    path = np.array([float(value) for value in values.split(", ")])
    return float((1 - path / np.maximum.accumulate(path)).max() * 100)


def kelly(p, win, loss):
    return p - (1 - p) * loss / win


def ivrv_term(ivrv):
    return 3 * (min(max(ivrv, 1), 1.5) - 1) / 0.5


def delta_term(delta):
    return 2 * max(0, 1 - abs(delta - 0.25) / 0.10)


def dte_term(dte):
    return 1.5 * max(0, 1 - abs(dte - 7) / 2)


def premium_term(pct):
    return 2 * min(max(pct, 0), 1.5) / 1.5


def bull_penalty(above, month):
    return (1.0 if above < 5 else 0.0) + (0.5 if month > 25 else 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Templates

CALL = "spot {spot:.0f} USD, strike {strike:.0f} USD, {dte} days to expiry, volatility {iv:.2f} a year"
BS = "by Black-Scholes, at rate 0 and with 365 days a year"
SOLD = "A call of strike {strike:.0f} USD was sold for {premium:.2f} USD"
WINS = "Trades win {win:.2f} % with probability {p:.2f}, and else lose {loss:.2f} %"
SCORE = "The teacher's score has a term"

TRAINED = (
    Template(
        "bs_value",
        f"A call: {CALL}. What is it worth {BS}? In USD, 2 decimals.",
        2,
        call,
        value_of,
    ),
    Template(
        "bs_delta",
        f"A call: {CALL}. What is its delta {BS}? 4 decimals.",
        4,
        call,
        delta_of,
    ),
    Template(
        "standard_move",
        "Spot is {spot:.0f} USD and volatility {iv:.2f} a year of 365 days. How many USD are one standard "
        "deviation over {dte} days? 2 decimals.",
        2,
        call,
        lambda spot, strike, dte, iv: spot * deviation(dte, iv),
    ),
    Template(
        "daily_vol",
        "Volatility is {iv:.2f} a year of 365 days. What is it a day, in percent? 2 decimals.",
        2,
        vols,
        lambda iv, rv: 100 * iv / math.sqrt(YEAR),
    ),
    Template(
        "covered_breakeven",
        "A coin was bought at {spot:.0f} USD and a call on it sold for {premium:.2f} USD. Below which price at "
        "expiry do both together lose? In USD, 2 decimals.",
        2,
        sale,
        lambda spot, strike, dte, iv, premium: spot - premium,
    ),
    Template(
        "hodl_breakeven",
        f"{SOLD}. Above which price at expiry would holding the coin alone have been better? In USD, 2 decimals.",
        2,
        sale,
        lambda spot, strike, dte, iv, premium: strike + premium,
    ),
    Template(
        "otm_pct",
        "Spot is {spot:.0f} USD, the strike of a call {strike:.0f} USD. By how many percent of spot is it out of "
        "the money? 2 decimals.",
        2,
        call,
        lambda spot, strike, dte, iv: 100 * (strike / spot - 1),
    ),
    Template(
        "premium_pct",
        "Spot is {spot:.0f} USD, a premium {premium:.2f} USD. What is the premium in percent of spot? 2 decimals.",
        2,
        sale,
        lambda spot, strike, dte, iv, premium: 100 * premium / spot,
    ),
    Template(
        "annualised_premium",
        "Spot is {spot:.0f} USD, the premium of a call of {dte} days {premium:.2f} USD. What is it in percent of "
        "spot a year of 365 days, not compounded? 2 decimals.",
        2,
        sale,
        lambda spot, strike, dte, iv, premium: 100 * premium / spot * YEAR / dte,
    ),
    Template(
        "ivrv",
        "Implied volatility is {iv:.2f}, realised volatility {rv:.2f}. What is IV/RV? 4 decimals.",
        4,
        vols,
        lambda iv, rv: iv / rv,
    ),
    Template(
        "realised_vol",
        "Daily closes: {closes}. What is the realised volatility a year, as the sample standard deviation of "
        "daily log returns times the root of 365? 4 decimals.",
        4,
        closes,
        realised_vol,
    ),
    Template(
        "intrinsic",
        "At expiry the price is {end:.0f} USD, and a call has strike {strike:.0f} USD. What must its seller pay? "
        "In USD, 2 decimals.",
        2,
        held_sale,
        lambda spot, strike, dte, iv, premium, end: max(0.0, end - strike),
    ),
    Template(
        "pnl_vs_hodl",
        f"{SOLD}, and at expiry the price is {{end:.0f}} USD. What is the P&L vs HODL? In USD, 2 decimals.",
        2,
        held_sale,
        lambda spot, strike, dte, iv, premium, end: overlay(strike, premium, end),
    ),
    Template(
        "pnl_vs_hodl_pct",
        f"At spot {{spot:.0f}} USD: {SOLD[0].lower()}{SOLD[1:]}; at expiry the price is {{end:.0f}} USD. What is "
        "the P&L vs HODL in percent of the first spot? 2 decimals.",
        2,
        held_sale,
        lambda spot, strike, dte, iv, premium, end: 100 * overlay(strike, premium, end) / spot,
    ),
    Template(
        "covered_pnl",
        f"A coin was bought at {{spot:.0f}} USD. {SOLD}. At expiry the price is {{end:.0f}} USD. What have coin "
        "and call brought together? In USD, 2 decimals.",
        2,
        held_sale,
        lambda spot, strike, dte, iv, premium, end: overlay(strike, premium, end) + end - spot,
    ),
    Template(
        "fee",
        "Spot is {spot:.0f} USD, a premium {premium:.2f} USD. The fee is 0.03 % of spot, but at most 12.5 % of "
        "the premium. What is it? In USD, 2 decimals.",
        2,
        sale,
        lambda spot, strike, dte, iv, premium: fee_of(spot, premium),
    ),
    Template(
        "take_profit",
        "A call was sold for {premium:.2f} USD. At which value has 80 % of the premium been captured? In USD, 2 "
        "decimals.",
        2,
        sale,
        lambda spot, strike, dte, iv, premium: 0.2 * premium,
    ),
    Template(
        "defence",
        "A call of strike {strike:.0f} USD is bought back in defence once spot over strike is 0.98. From which "
        "spot on? In USD, 2 decimals.",
        2,
        call,
        lambda spot, strike, dte, iv: 0.98 * strike,
    ),
    Template(
        "kelly",
        f"{WINS}. Which share of wealth does Kelly bet, p - (1 - p) * loss / win? 4 decimals.",
        4,
        record,
        kelly,
    ),
    Template(
        "half_kelly",
        f"{WINS}. What is half of Kelly's share, p - (1 - p) * loss / win? 4 decimals.",
        4,
        record,
        lambda p, win, loss: kelly(p, win, loss) / 2,
    ),
    Template(
        "expectancy",
        f"{WINS}. What does a trade bring on average, in percent? 4 decimals.",
        4,
        record,
        lambda p, win, loss: p * win - (1 - p) * loss,
    ),
    Template(
        "drawdown",
        "Equity at each close: {values}. What is the largest fall from a peak, in percent of it? 2 decimals.",
        2,
        equity,
        drawdown,
    ),
    Template(
        "score_ivrv",
        f"{SCORE} 3 * (IV/RV - 1) / 0.5, with IV/RV cut to between 1 and 1.5. What is it at IV/RV {{ivrv:.2f}}? 4 "
        "decimals.",
        4,
        state,
        lambda ivrv, delta, dte, pct: ivrv_term(ivrv),
    ),
    Template(
        "score_delta",
        f"{SCORE} 2 * (1 - |delta - 0.25| / 0.1), never below 0. What is it at delta {{delta:.4f}}? 4 decimals.",
        4,
        state,
        lambda ivrv, delta, dte, pct: delta_term(delta),
    ),
    Template(
        "score_dte",
        f"{SCORE} 1.5 * (1 - |days - 7| / 2), never below 0. What is it at {{dte:.2f}} days? 4 decimals.",
        4,
        state,
        lambda ivrv, delta, dte, pct: dte_term(dte),
    ),
    Template(
        "score_premium",
        f"{SCORE} 2 * premium / 1.5, with the premium in percent of spot cut to between 0 and 1.5. What is it at a"
        f" premium of {{pct:.2f}} %? 4 decimals.",
        4,
        state,
        lambda ivrv, delta, dte, pct: premium_term(pct),
    ),
    Template(
        "bull_penalty",
        "In a bull market the teacher takes 1 off a score if the strike is less than 5 % above spot, and 0.5 if "
        "the return of 30 days is over 25 %. How much at a strike {above:.2f} % above spot and a return of "
        "{month:.2f} %? 1 decimal.",
        1,
        bull,
        lambda above, month, score: bull_penalty(above, month),
    ),
)

HELD_OUT = (
    Template(
        "covered_breakeven_again",
        "You hold one coin that cost {spot:.0f} USD. You have been paid {premium:.2f} USD for a call. At which "
        "price at expiry do you come out even? In USD, 2 decimals.",
        2,
        sale,
        lambda spot, strike, dte, iv, premium: spot - premium,
    ),
    Template(
        "bs_premium_pct",
        f"What is a call worth in percent of spot, {BS}: {CALL}? 2 decimals.",
        2,
        call,
        lambda spot, strike, dte, iv: 100 * value_of(spot, strike, dte, iv) / spot,
    ),
    Template(
        "net_premium",
        "A call on a coin at {spot:.0f} USD brings {premium:.2f} USD. Its fee is 0.03 % of spot, but at most 12.5"
        " % of the premium. What is left of the premium? In USD, 2 decimals.",
        2,
        sale,
        lambda spot, strike, dte, iv, premium: premium - fee_of(spot, premium),
    ),
    Template(
        "score_three_terms",
        f"{SCORE} 3 * (IV/RV - 1) / 0.5, with IV/RV cut to between 1 and 1.5, one 2 * (1 - |delta - 0.25| / 0.1), "
        "and one 1.5 * (1 - |days - 7| / 2), neither of these two below 0. What are the three together at IV/RV "
        f"{{ivrv:.2f}}, delta {{delta:.4f}} and {{dte:.2f}} days? 4 decimals.",
        4,
        state,
        lambda ivrv, delta, dte, pct: ivrv_term(ivrv) + delta_term(delta) + dte_term(dte),
    ),
    Template(
        "penalised_score",
        "A score of {score:.2f} before penalties, in a bull market: 1 less if the strike is less than 5 % above "
        "spot, 0.5 less if the return of 30 days is over 25 %. What is left at a strike {above:.2f} % above spot "
        "and a return of {month:.2f} %? 2 decimals.",
        2,
        bull,
        lambda above, month, score: score - bull_penalty(above, month),
    ),
    Template(
        "given_away",
        f"{SOLD}; at expiry the price is {{end:.0f}} USD. How many USD has the seller lost against holding the "
        "coin, 0 if none? 2 decimals.",
        2,
        held_sale,
        lambda spot, strike, dte, iv, premium, end: max(0.0, -overlay(strike, premium, end)),
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# Write


def question(template: Template, rng: np.random.Generator) -> tuple[str, str]:
    """A question and its answer. Numbers whose answer lies so near a half that rounding is a matter of the last bit
    are drawn again."""
    while True:
        numbers = template.draw(rng)
        exact = template.answer(**numbers)
        scaled = abs(exact) * 10**template.decimals
        if abs(scaled % 1 - 0.5) > 1e-4:
            rounded = round(exact, template.decimals) + 0.0  # no -0
            return template.text.format(**numbers), f"{rounded:.{template.decimals}f}"


def records(templates: tuple[Template, ...], count: int, seed: int) -> list[dict]:
    """``count`` chats of each template, no question twice, mixed."""
    found = []
    for place, template in enumerate(templates):
        rng = np.random.default_rng([seed, place])
        asked: dict[str, str] = {}
        for _ in range(50 * count):
            if len(asked) == count:
                break
            asked.setdefault(*question(template, rng))
        found += [chat(template.name, *both) for both in asked.items()]
    return [found[place] for place in np.random.default_rng(seed).permutation(len(found))]


def chat(template: str, asked: str, answer: str) -> dict:
    roles = {"system": SYSTEM, "user": asked, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in roles.items()], "template": template}


def write(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(unfinished, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("corpora/formulas.jsonl"), metavar="FILE",
        help="where those to train on go, with the others beside it; default: %(default)s")  # fmt: skip
    parser.add_argument("--count", type=int, default=100, help="questions of each template; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")
    args = parser.parse_args()
    held_out = args.out.with_name(f"{args.out.stem}_held_out{args.out.suffix}")
    for path, templates, seed in ((args.out, TRAINED, args.seed), (held_out, HELD_OUT, args.seed + 1_000_000)):
        lines = records(templates, args.count, seed)
        write(path, lines)
        print(f"{path}: {len(lines):,} questions of {len(templates)} templates")


if __name__ == "__main__":
    main()
