"""Markets with a law that tests know, and what a Q-scorer answers in them."""

import datetime

import numpy as np
from conftest import decision, time

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.pricing import black_scholes_call
from covered_call.candidates.schema import Candidate, Counterfactual, Decision, LoggedDecision, Outcome
from covered_call.value_model.learning import Fitted, Gates
from covered_call.value_model.scorer import Answer, QScorer

CONFIG = CoveredCallCandidatesConfig()
SPOT = 50_000.0
UNKNOWN = Outcome(None, None, None)
SPLITS = ("--validation_from", time(120), "--test_from", time(220))  # of walk(280)


def day(number: float) -> datetime.datetime:
    return datetime.datetime.fromisoformat(time(number))


def entry(number: float, ivs, outcomes, dte=7.0, spot=SPOT, style="hold_to_expiry", label_end=None) -> LoggedDecision:
    """A decision with a candidate for each iv and its net outcome, in % of spot; None is unknown."""
    candidates = tuple(
        Candidate(f"BTC-{index}-C", spot * (1 + 0.001 * index), dte, 0.2, 3.0, iv, None)
        for index, iv in enumerate(ivs)
    )
    ends = day(number + dte if label_end is None else label_end)
    counterfactuals = tuple(Counterfactual(None if value is None else value * spot / 100, ends) for value in outcomes)
    state = Decision(day(number), "BTC", style, spot, candidates)
    return LoggedDecision(state, None, (UNKNOWN,) * len(candidates), counterfactuals)


def rich_if_volatile(days, seed=0, noise=0.2) -> list[LoggedDecision]:
    """Of two candidates each day, what one brings is (its iv - 0.5) * 10 % of spot, and some noise."""
    draw = np.random.default_rng(seed)
    made = []
    for number in days:
        ivs = draw.uniform(0.2, 0.8, 2)
        made.append(entry(number, ivs, (ivs - 0.5) * 10 + draw.normal(0, noise, 2)))
    return made


def walk(days: int, style="hold_to_expiry") -> list[dict]:
    """A decision a day on a spot that wanders; the teacher sells the first call where the day is even.

    What that brought is recorded where it is held, and its expiry is one of the days.
    """
    spots = 60_000 * np.exp(np.random.default_rng(7).normal(0, 0.02, days).cumsum())
    rows = []
    for number, spot in enumerate(spots):
        strikes = [round(spot * share) for share in (1.03, 1.06)]
        cells = {"spot": spot, "exit_style": style, "iv": 0.5 + 0.1 * (number % 3), "dte": 7.0}
        rows += decision(number, 0 if number % 2 == 0 else None, strikes=strikes, **cells)
        rows[-2]["pnl_vs_hodl"] = ""
        if style == "hold_to_expiry" and number % 2 == 0 and number + 7 < days:
            premium = black_scholes_call(spot, strikes[0], 7 / 365, cells["iv"])
            rows[-2]["pnl_vs_hodl"] = str(premium - max(0, spots[number + 7] - strikes[0]))
        if number % 2:
            rows[-2]["score"] = rows[-1]["score"] = 1.0
    return rows


def decide(fitted: Fitted, *entries: LoggedDecision, gates: Gates | None = None) -> list[Answer]:
    scorer = QScorer(fitted.with_gates(gates) if gates else fitted)
    return scorer.decide([one.decision for one in entries])
