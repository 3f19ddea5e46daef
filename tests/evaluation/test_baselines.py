"""The simplest policies: what they are fitted to, and what they pick."""

import math

import pytest
from conftest import decision, no_candidates, read_candidates, write_csv

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import CandidatesError
from covered_call.evaluation.baselines import fit_baselines, fit_threshold, highest, scores

OPTIONS = CoveredCallCandidatesConfig()


def logged(rows: list[dict], tmp_path):
    return read_candidates([write_csv(tmp_path / "a.csv", rows)], OPTIONS)


def test_the_threshold_is_fitted_halfway_between_scores(tmp_path):
    rows = []
    for number, (top, sold) in enumerate([(2.0, None), (2.9, None), (3.1, 0), (5.0, 0)]):
        rows += decision(number, sold, strikes=(1,), score=top)
    train = logged(rows, tmp_path)
    assert fit_threshold(scores, train) == pytest.approx(3.0)
    assert fit_threshold(scores, train[2:]) == -math.inf
    assert fit_threshold(scores, train[:2]) == math.inf


def test_a_decision_without_candidates_is_never_sold(tmp_path):
    rows = decision(0, 0) + decision(1, 0) + [no_candidates(2)]
    entries = logged(rows, tmp_path)
    for name, policy in fit_baselines(entries).items():
        assert policy([entry.decision for entry in entries])[2] is None, name


def test_baselines_pick_as_their_names_say(tmp_path):
    entries = logged(decision(0, 2) + decision(1, 2) + decision(2, 0, strikes=(1, 2)), tmp_path)
    baselines = fit_baselines(entries)
    decisions = [entry.decision for entry in entries]
    assert baselines["majority answer"](decisions) == [2, 2, 0]  # the third decision has no third candidate
    assert baselines["first candidate"](decisions) == [0, 0, 0]
    assert highest(scores)(decisions) == [0, 0, 0]


def test_without_a_trade_to_learn_from_baselines_say_so(tmp_path):
    with pytest.raises(CandidatesError, match="no baseline can be fitted"):
        fit_baselines(logged(decision(0), tmp_path))


def test_a_column_that_is_blank_throughout_is_no_obstacle(tmp_path):
    entries = logged([row for number in range(9) for row in decision(number, 0, iv="", ivrv_ratio="")], tmp_path)
    assert fit_baselines(entries)["gradient boosting"]([entry.decision for entry in entries]) == [0] * 9
