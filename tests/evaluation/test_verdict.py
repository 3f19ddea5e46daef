"""The verdict's sentences: what is shown, what is not, and why."""

import math

import numpy as np
import pytest

from covered_call.evaluation.luck import Luck
from covered_call.evaluation.metrics import Figure
from covered_call.evaluation.money import Group, Held, Result
from covered_call.evaluation.verdict import said_of, sentences

FEW = Luck(9, {"teacher": {"model": 0.01, "Q-scorer": 0.4}})


def said(low: float, high: float, interval, name: str = "model", fitted_here: bool = False) -> str:
    return said_of(name, "teacher", Figure(low, high, interval), FEW, fitted_here)


ONE = "one of 9 policies and thresholds compared"


@pytest.mark.parametrize(
    "sentence, expected",
    [
        (
            said(0.01, 0.01, (-0.29, 0.26)),
            f"beats the teacher by 0.010 % of spot a decision, 95 % interval [-0.290, +0.260]: not shown, {ONE}.",
        ),
        (
            said(0.2, 0.2, (0.1, 0.3)),
            "beats the teacher by 0.200 % of spot a decision, 95 % interval [+0.100, +0.300]: shown, "
            f"{ONE} (p = 0.010 against luck).",
        ),
        (
            said(0.2, 0.2, (0.1, 0.3), name="Q-scorer"),
            "beats the teacher by 0.200 % of spot a decision, 95 % interval [+0.100, +0.300]: not shown, for it is "
            f"{ONE}, and the best of so many does as well by luck (p = 0.40).",
        ),
        (
            said(-0.2, -0.2, (-0.3, -0.1)),
            f"falls short of the teacher by 0.200 % of spot a decision, 95 % interval [-0.300, -0.100]: shown, {ONE}.",
        ),
        (
            said(-0.1, 0.2, (-0.3, 0.4)),
            "minus the teacher is -0.100 to +0.200 % of spot a decision, 95 % interval [-0.300, +0.400]: not shown, "
            f"{ONE}.",
        ),
        (
            said(0.1, 0.2, None),
            "beats the teacher by 0.100 to 0.200 % of spot a decision: not shown, for the data are too short for an "
            "interval (9 policies and thresholds compared).",
        ),
        (
            said(0.2, 0.2, (0.1, 0.3), fitted_here=True),
            "beats the teacher by 0.200 % of spot a decision: not shown, for it was fitted on these decisions.",
        ),
        (said(math.nan, 0.2, None), "against the teacher: not known, for outcomes are missing."),
    ],
    ids=["not shown", "shown", "luck", "worse", "bounds", "short", "fitted", "unknown"],
)
def test_a_sentence_says_what_is_shown_and_of_how_many(sentence, expected):
    who = "The Q-scorer" if "p = 0.40" in expected else "The model"
    assert sentence == f"{who} {expected}"


def result(**figures: dict[str, Figure]) -> Result:
    times = np.arange(2) * 86_400_000_000
    return Result(Group("BTC", "hold_to_expiry", "all", np.arange(2)), times, 1, figures, Held(1.0, 1, 0))


def test_the_teacher_comes_first_and_a_copy_of_it_is_told_once():
    same, worse = Figure(0.0, 0.0, (0.0, 0.0)), Figure(-0.5, -0.5, (-0.9, 0.1))
    found = {
        "teacher": {"mean_percent": worse, "percent_minus_teacher": same},
        "score rule": {"mean_percent": worse, "percent_minus_teacher": same},
        "Q-scorer": {"mean_percent": same, "percent_minus_teacher": Figure(0.5, 0.5, (-0.1, 0.9))},
    }
    said = sentences(result(**found), FEW, "score rule", set())
    assert [text.split(" % of")[0].split(":")[0] for text in said] == [
        "The teacher falls short of never selling by 0.500",
        "The rule 'score rule' earns what the teacher does",
        "The Q-scorer beats the teacher by 0.500",
        "The Q-scorer earns what never selling does",
    ]


def test_a_model_is_set_against_the_best_rule_too():
    better = {
        name: Figure(0.1, 0.1, None) for name in ("mean_percent", "percent_minus_teacher", "percent_minus_best_rule")
    }
    said = sentences(result(teacher=better, model=better), FEW, "score rule", {"model"})
    assert said[-1].startswith("The model beats the rule 'score rule' by 0.100") and "fitted on these" in said[-1]
