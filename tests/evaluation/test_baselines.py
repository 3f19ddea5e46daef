"""The simplest policies: what they are fitted to, and what they pick."""

import math

import numpy as np
import pytest
from conftest import decision, no_candidates, write_csv

from covered_call.candidates.columns import Columns
from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import CandidatesError
from covered_call.evaluation.baselines import Rule, fit_baselines, fit_threshold, scores

OPTIONS = CoveredCallCandidatesConfig()


def read(rows: list[dict], tmp_path) -> Columns:
    return read_decisions([write_csv(tmp_path / "a.csv", rows)], OPTIONS).columns()


def test_the_threshold_is_fitted_halfway_between_scores(tmp_path):
    rows = []
    for number, (top, sold) in enumerate([(2.0, None), (2.9, None), (3.1, 0), (5.0, 0)]):
        rows += decision(number, sold, strikes=(1,), score=top)
    train = read(rows, tmp_path)
    for places, expected in (([0, 1, 2, 3], 3.0), ([2, 3], -math.inf), ([0, 1], math.inf)):
        part = train.take(np.array(places))
        assert fit_threshold(scores(part), part) == pytest.approx(expected)


def test_learned_baselines_take_the_market_s_context(tmp_path):
    """Of a teacher that sells after a day's rise, which no number of a candidate tells."""
    spots = 60_000 + 1_000 * np.random.default_rng(0).choice([0, 1], 80)
    rows = [row for day in range(1, 80) for row in decision(day, 0 if spots[day] > spots[day - 1] else None,
        strikes=(70_000,), spot=float(spots[day]))]  # fmt: skip
    path = write_csv(tmp_path / "a.csv", rows)
    right = {}
    for context in ("none", "spot"):
        columns = read_decisions([path], CoveredCallCandidatesConfig(context=context)).columns()
        train, test = (columns.take(np.arange(*ends)) for ends in ((0, 50), (50, 79)))
        rule = fit_baselines(train)["logistic regression"]
        right[context] = float(np.mean(rule.picks(test) == test.chosen))
    assert right["spot"] == 1.0 > right["none"]


def test_a_decision_without_candidates_is_never_sold(tmp_path):
    rows = decision(0, 0) + decision(1, 0) + [no_candidates(2)]
    entries = read(rows, tmp_path)
    for name, rule in fit_baselines(entries).items():
        assert rule.picks(entries)[2] == -1, name


def test_baselines_pick_as_their_names_say(tmp_path):
    entries = read(decision(0, 2) + decision(1, 2) + decision(2, 0, strikes=(1, 2)), tmp_path)
    baselines = fit_baselines(entries)
    # The third decision has no third candidate.
    assert baselines["majority answer"].picks(entries).tolist() == [2, 2, 0]
    assert baselines["first candidate"].picks(entries).tolist() == [0, 0, 0]
    assert Rule(scores).picks(entries).tolist() == [0, 0, 0]


def test_the_majority_answer_is_one_that_was_given(tmp_path):
    entries = read(decision(0, 1) + decision(1, 1) + decision(2) + decision(3, 1, strikes=(1, 2)), tmp_path)
    rule = fit_baselines(entries)["majority answer"]
    fewer = read(decision(0, 0, strikes=(1,)), tmp_path)
    assert rule.picks(entries).tolist() == [1, 1, 1, 1]
    assert rule.picks(fewer).tolist() == [-1]  # nobody ever sold the first: no trade is the next


def test_without_a_trade_to_learn_from_baselines_say_so(tmp_path):
    with pytest.raises(CandidatesError, match="no baseline can be fitted"):
        fit_baselines(read(decision(0), tmp_path))


def test_a_column_that_is_blank_throughout_is_no_obstacle(tmp_path):
    entries = read([row for number in range(9) for row in decision(number, 0, iv="", ivrv_ratio="")], tmp_path)
    assert fit_baselines(entries)["gradient boosting"].picks(entries).tolist() == [0] * 9
