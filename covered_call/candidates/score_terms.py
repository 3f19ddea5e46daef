"""What a teacher's score is made of: its terms and what it loses, each by its name."""

import numpy as np

from covered_call.candidates.columns import CONTEXT_WORDS, Columns, number_of_word
from covered_call.candidates.context import TARGET_DELTA
from covered_call.candidates.pricing import DAYS_PER_YEAR, black_scholes_call

THRESHOLD, TARGET_DTE = 3.0, 7.0  # the best score is sold from here on
DELTA_WIDTH, DTE_WIDTH = 0.10, 2.0
MOST_SCORE = 10.0
PAST = ("dist_ma50", "ret_30d", "ret_7d", "rv_7d")  # without all of these nothing is lost
# What each of the penalties takes.
PENALTIES = {"near_strike": 1.0, "rally": 0.5, "fall": 0.5, "calm": 0.5, "stretched": 0.5}
BEAR, BULL = (number_of_word("regime", word) for word in CONTEXT_WORDS["regime"][::2])


def teacher_terms(ivrv, delta, dte, premium_pct=0.0, target_dte: float = TARGET_DTE) -> dict[str, np.ndarray]:
    """(K,) each: how rich the vol is, how near the delta and the days to expiry are to what is wanted, and the
    premium in percent of spot.

    Args:
        ivrv: implied over realised vol; NaN counts as 1.
    """
    ivrv = np.where(np.isnan(ivrv), 1.0, ivrv)
    return {
        "richness": 3 * (np.clip(ivrv, 1, 1.5) - 1) / 0.5,
        "nearness": 2 * np.maximum(0, 1 - abs(abs(delta) - TARGET_DELTA) / DELTA_WIDTH),
        "on_time": 1.5 * np.maximum(0, 1 - abs(dte - target_dte) / DTE_WIDTH),
        "premium": 2 * np.clip(premium_pct, 0, 1.5) / 1.5,
    }


def penalties_of(moneyness: np.ndarray, regime, past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(K,) each, by the names of PENALTIES: strikes close above spot and a steep rise in a bull market, a falling week
    in a bear market, a short vol below 30 % a year, a spot far from its mean. Nothing where the past is unknown.

    Args:
        moneyness: strike over spot.
        regime: as a context has it, of CONTEXT_WORDS.
        past: the numbers of a context that PAST names.
    """
    distance, month, week, short_vol = (past[name] for name in PAST)
    known, bull, bear = ~np.isnan(distance + month + week + short_vol), regime == BULL, regime == BEAR
    holds = {
        "near_strike": bull & (moneyness - 1 < 0.05),
        "rally": bull & (month > 0.25),
        "fall": bear & (week < -0.10),
        "calm": (short_vol > 0) & (short_vol < 0.30),
        "stretched": abs(distance) > 0.20,
    }
    return {name: PENALTIES[name] * (known & its) for name, its in holds.items()}


def teacher_score(terms: dict[str, np.ndarray], lost: dict[str, np.ndarray]) -> np.ndarray:
    return np.clip(sum(terms.values()) - sum(lost.values()), 0, MOST_SCORE)


def simulated_terms(ivrv, delta, dte, premium_yield) -> dict[str, np.ndarray]:
    """(K,) each: the same of the simulated sample's rule (data/simulate_backtest.py), all of which add up.

    Args:
        premium_yield: the premium over spot.
    """
    ivrv = np.where(np.isnan(ivrv), 1.0, ivrv)
    return {
        "richness": 5 * np.clip(ivrv - 1, -0.5, 0.5),
        "nearness": -20 * abs(delta - TARGET_DELTA),
        "on_time": -0.1 * abs(dte - TARGET_DTE),
        "premium": 3.9 + 50 * (premium_yield - 0.01),
    }


def scores_by(formula: str, columns: Columns, context: dict[str, np.ndarray]) -> np.ndarray:
    """(R,) what a formula gives each candidate; NaN where it takes a past that is not known.

    Args:
        formula: "teacher" or "simulated".
        context: (D,) each; see context_of.
    """
    numbers, rows = columns.numbers, columns.decision_of
    spot = columns.spot[rows]
    ivrv, delta, dte = (numbers[name] for name in ("ivrv_ratio", "delta", "dte"))
    if formula == "simulated":
        premium = black_scholes_call(spot, numbers["strike"], dte / DAYS_PER_YEAR, numbers["iv"])
        return np.add.reduce(list(simulated_terms(ivrv, delta, dte, premium / spot).values()))
    past = {name: context[name][rows] for name in PAST}
    lost = penalties_of(numbers["strike"] / spot, context["regime"][rows], past)
    return np.where(np.isnan(sum(past.values())), np.nan, teacher_score(teacher_terms(ivrv, delta, dte), lost))
