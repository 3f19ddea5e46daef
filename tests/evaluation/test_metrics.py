"""Metrics and their intervals against hand-computed cases and scikit-learn."""

import math

import numpy as np
import pytest
from conftest import on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st
from markets import day
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
)

from covered_call.candidates.columns import microseconds
from covered_call.evaluation import metrics
from covered_call.evaluation.metrics import METRICS, NO_BELIEFS, Beliefs, Played
from covered_call.resampling import as_it_was, draw, month_starts

pytestmark = on_the_default_stack

NAN = math.nan


def played(teacher: list[int], pick: list[int], **given) -> Played:
    """One decision a day, known and with P&L 0 unless given."""
    size = len(teacher)
    pnl = np.array(given.pop("pnl", [0.0] * size), float)
    pair = pnl if pnl.ndim == 2 else np.stack([pnl, pnl], axis=1)
    base = Played(
        time=np.arange(size),
        teacher=np.array(teacher),
        pick=np.array(pick),
        weight=np.ones(size),
        consistent=np.full(size, NAN),
        known=pair[:, 0] == pair[:, 1],
        pnl=pair,
        regret=np.full(size, NAN),
        minus_teacher=pair,
        minus_best_rule=pair,
        spot=np.full(size, 100.0),
        premium=np.full(size, NAN),
        years=np.full(size, 0.02),
        beliefs=given.pop("beliefs", NO_BELIEFS),
    )
    return base._replace(**{name: np.array(value) for name, value in given.items()})


def believed(probability: list[float], right: list[bool]) -> Beliefs:
    return Beliefs(np.arange(len(right)), np.array(probability), np.array(right))


def measured(entries: Played, days: int | None = None) -> dict[str, tuple[float, float]]:
    times = times_of(days or len(entries.time))
    found = metrics.measure({"policy": entries}, as_it_was(len(times)), month_starts(times))["policy"]
    return {name: tuple(values[:, 0]) for name, values in found.items()}


def times_of(days: int, every: float = 1) -> np.ndarray:
    """Microseconds since 1970."""
    return np.array([microseconds(day(number * every)) for number in range(days)])


# Imitation


def test_every_metric_states_its_direction_and_is_measured():
    assert {metric.better for metric in METRICS.values()} == {"higher", "lower", ""}
    assert set(measured(played([1], [1]))) == set(METRICS)


def test_imitation_by_hand():
    # The teacher sells 1, 1, 2, nothing, nothing; the policy sells 1, 2, nothing, nothing, 1.
    found = measured(played([1, 1, 2, 0, 0], [1, 2, 0, 0, 1]))
    assert found["accuracy"][0] == pytest.approx(2 / 5)
    assert found["balanced_accuracy"][0] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert found["macro_f1"][0] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    # (2 * 5 - (2*2 + 2*2 + 1*1)) / sqrt((25 - 9) * (25 - 9))
    assert found["mcc"][0] == pytest.approx(1 / 16)
    assert found["sell_precision"][0] == pytest.approx(1 / 3)
    assert found["sell_recall"][0] == pytest.approx(1 / 3)
    assert found["top_1"][0] == pytest.approx(1 / 2)
    assert found["trade_rate"][0] == pytest.approx(3 / 5)


@pytest.mark.filterwarnings("ignore:A single label")
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_imitation_is_what_scikit_learn_says(pairs):
    teacher, pick = map(list, zip(*pairs, strict=True))
    found = {name: values[0] for name, values in measured(played(teacher, pick)).items()}
    assert found["accuracy"] == pytest.approx(accuracy_score(teacher, pick))
    assert found["macro_f1"] == pytest.approx(f1_score(teacher, pick, average="macro", zero_division=0))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(teacher, pick))
    # Not balanced_accuracy_score itself, which warns of answers that only the policy gave.
    given_by_teacher = sorted(set(teacher))
    assert found["balanced_accuracy"] == pytest.approx(
        recall_score(teacher, pick, labels=given_by_teacher, average="macro", zero_division=0)
    )
    if set(pick) <= set(teacher):
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(teacher, pick))
    sells = {"labels": [1, 2, 3], "average": "micro", "zero_division": np.nan}
    assert found["sell_precision"] == pytest.approx(precision_score(teacher, pick, **sells), nan_ok=True)
    assert found["sell_recall"] == pytest.approx(recall_score(teacher, pick, **sells), nan_ok=True)


def test_a_policy_that_draws_is_an_expectation():
    # Two decisions of one candidate: NO_TRADE or 1, at even odds; the teacher sold once.
    entries = played([1, 1, 0, 0], [0, 1, 0, 1], time=[0, 0, 1, 1], weight=[0.5] * 4, pnl=[0.0, 10.0, 0.0, -4.0])
    found = measured(entries, days=2)
    assert found["accuracy"][0] == 0.5
    assert found["trade_rate"][0] == 0.5
    assert found["total_pnl"] == (3.0, 3.0)
    assert found["hit_rate"][0] == 0.5


def test_calibration_error_by_hand():
    # 0.95 and 0.95: one right of two, gap 0.45; 0.3: right, gap 0.7.
    beliefs = believed([0.95, 0.95, 0.3], [True, False, True])
    found = measured(played([1, 1, 1], [1, 2, 1], beliefs=beliefs))
    assert found["calibration_error"][0] == pytest.approx((2 * 0.45 + 0.7) / 3)


def test_a_probability_of_one_is_in_the_last_bin():
    assert measured(played([1], [1], beliefs=believed([1.0], [True])))["calibration_error"][0] == 0.0


def test_a_model_is_calibrated_on_what_it_answers():
    """Of a decision with two candidates, two answers: SELL_CALL or SKIP of each."""
    beliefs = Beliefs(np.array([0, 0]), np.array([0.9, 0.4]), np.array([True, False]))
    assert measured(played([1], [1], beliefs=beliefs))["calibration_error"][0] == pytest.approx((0.1 + 0.4) / 2)


def test_permutation_consistency_leaves_out_what_was_not_tried():
    assert measured(played([1, 1, 1], [1, 1, 1], consistent=[1.0, 0.0, NAN]))["permutation_consistency"][0] == 0.5


# Money


def test_money_by_hand():
    # 2024-09-01 to -30 and then October: a gain, two losses, nothing sold, and a gain in October.
    pnl = [100.0, -300.0, -50.0, 0.0] + [0.0] * 26 + [70.0]
    pick = [1, 1, 1, 0] + [0] * 26 + [1]
    found = measured(played(pick, pick, pnl=pnl, regret=[NAN, 30.0, 10.0] + [NAN] * 28))
    assert found["total_pnl"] == (-180.0, -180.0)
    assert found["mean_pnl"][0] == pytest.approx(-180 / 31)
    assert found["worst_month"] == (-250.0, -250.0)
    assert found["max_drawdown"] == (350.0, 350.0)
    assert found["hit_rate"][0] == 0.5
    assert found["mean_regret"][0] == 20.0
    assert found["coverage"][0] == 1.0


def test_a_drawdown_may_begin_at_zero():
    assert measured(played([1], [1], pnl=[-5.0]))["max_drawdown"] == (5.0, 5.0)


def test_unknown_outcomes_are_bounds_and_never_zero():
    found = measured(played([1, 1], [1, 2], pnl=[[10.0, 10.0], [-100.0, 40.0]]))
    assert found["coverage"][0] == 0.5
    assert found["total_pnl"] == (-90.0, 50.0)
    assert found["mean_pnl"] == (-45.0, 25.0)
    assert found["mean_pnl_known"][0] == 10.0
    assert found["hit_rate"][0] == 1.0
    assert found["worst_month"] == (-90.0, 50.0)
    assert found["max_drawdown"] == (0.0, 100.0)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0, 1)), min_size=1, max_size=20))
def test_bounds_hold_whatever_the_unknown_outcome_was(triples):
    pnl = [sorted(pair[:2]) for pair in triples]
    truth = [low + share * (high - low) for (low, high), (*_, share) in zip(pnl, triples, strict=True)]
    sold = [1] * len(pnl)
    bounds, true = measured(played(sold, sold, pnl=pnl)), measured(played(sold, sold, pnl=truth))
    for name in ("total_pnl", "mean_pnl", "worst_month", "max_drawdown"):
        assert bounds[name][0] - 1e-6 <= true[name][0] <= bounds[name][1] + 1e-6


def test_money_in_percent_by_hand():
    """Three decisions at a spot of 100, and one at 50: each ties up a coin for 0.02 years, and one sold nothing."""
    found = measured(
        played(
            [1, 1, 1, 0],
            [1, 1, 1, 0],
            pnl=[3.0, -1.0, 2.0, 0.0],
            spot=[100.0, 100.0, 50.0, 50.0],
            premium=[4.0, 2.0, 2.0, 0.0],
        )
    )
    assert found["mean_percent"] == pytest.approx(((3 - 1 + 4) / 4,) * 2)
    assert found["annual_percent"] == pytest.approx((6 / 0.08,) * 2)
    assert found["premium_captured"][0] == pytest.approx(4 / 8)
    assert found["turnover"][0] == pytest.approx(3 / 0.08)
    assert found["worst_5_percent"] == (-1.0, -1.0)
    assert found["percent_minus_teacher"][0] == pytest.approx(6 / 4)


def test_premiums_that_are_not_known_are_left_out_of_what_was_captured():
    found = measured(played([1, 1], [1, 1], pnl=[3.0, -1.0], premium=[6.0, NAN]))
    assert found["premium_captured"][0] == 0.5


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 3)), min_size=1, max_size=80))
def test_the_expected_shortfall_is_the_mean_of_the_worst_twentieth(pairs):
    pnl, weight = np.array(pairs).T
    size = len(pnl)
    found = measured(played([1] * size, [1] * size, pnl=pnl, weight=weight))["worst_5_percent"]
    order = np.argsort(pnl)
    left, total = 0.05 * weight.sum(), 0.0
    for place in order:
        part = min(left, weight[place])
        left, total = left - part, total + part * pnl[place]
    assert found == pytest.approx((total / (0.05 * weight.sum()),) * 2, abs=1e-6)


# Intervals


def test_blocks_widen_the_interval_of_outcomes_that_overlap():
    sold, pnl = [1] * 240, np.repeat(np.random.default_rng(0).normal(size=30), 8) * 100
    widths = []
    for block in (1, 8):
        found = metrics.figures({"policy": played(sold, sold, pnl=pnl)}, times_of(240), block)["policy"]
        low, high = found["mean_pnl"].interval
        assert low < pnl.mean() < high
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_a_metric_that_is_not_defined_has_no_interval():
    found = metrics.figures({"policy": played([0] * 60, [0] * 60)}, times_of(60), 8)["policy"]
    assert math.isnan(found["hit_rate"].low) and found["hit_rate"].interval is None


def test_a_shortfall_of_resamples_is_nearly_that_of_each():
    pnl = np.random.default_rng(2).normal(size=400) * 10
    one, draws = played([1] * 400, [1] * 400, pnl=pnl), draw(400, 5)
    found = metrics.measure({"policy": one}, draws, month_starts(times_of(400)))["policy"]["worst_5_percent"][0]
    worst = []
    for row in draws.counts(slice(None)).astype(int):
        worst.append(np.sort(np.repeat(pnl, row))[:20].mean())
    np.testing.assert_allclose(found, worst, rtol=0.03)
    assert np.abs(found - worst).mean() < 0.05
