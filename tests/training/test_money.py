"""The money by which a preference run chooses its checkpoint: whose outcomes count, and where the loss chooses."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from covered_call.candidates.terms import fit_of
from covered_call.training.money import add_outcomes, doubt_about, mean_money, settle_metric

BTC, ETH = ("BTC", "tp_and_roll"), ("ETH", "tp_and_roll")


def candidate(spot: float, outcome: float | None) -> dict:
    return {"spot": spot, "counterfactual_pnl_vs_hodl": outcome}


def fits(error: float = 0.0) -> dict:
    """How computed outcomes follow recorded ones: exactly, or those of ETH off by an error in USD."""
    recorded = np.linspace(-50.0, 50.0, 40)
    return {BTC: fit_of(recorded, recorded), ETH: fit_of(recorded + error, recorded)}


@pytest.fixture
def records() -> Dataset:
    rows = [
        (BTC, [candidate(200.0, 10.0), candidate(200.0, -4.0)]),
        (BTC, [candidate(100.0, 6.0), candidate(100.0, None)]),  # at which not every answer has its price
        (BTC, []),
        (ETH, [candidate(10.0, 1.0)]),
    ]
    return Dataset.from_list(
        [
            {
                "underlying": market[0],
                "exit_style": market[1],
                "candidates": candidates,
                "answers": [*map(str, range(1, len(candidates) + 1)), "NO_TRADE"],
            }
            for market, candidates in rows
        ]
    )


def test_each_answer_has_what_it_brought_and_no_trade_nothing(records):
    split = add_outcomes(records.select_columns(["answers"]), records, fits())
    assert split["outcomes"] == [[10.0, -4.0, 0.0], None, [0.0], [1.0, 0.0]]
    found = mean_money(split, ["2", "1", "NO_TRADE", "1"])  # the second is not counted
    assert found == {"mean_pnl": pytest.approx((-4 + 0 + 1) / 3), "mean_percent": pytest.approx((-2 + 0 + 10) / 3)}
    assert mean_money(split.select([1]), ["1"]) == {}


def test_outcomes_that_do_not_follow_the_recorded_ones_count_as_unknown_and_leave_the_choice_to_the_loss(records):
    off = fits(30.0)
    split = add_outcomes(records.select_columns(["answers"]), records, off)
    assert split["outcomes"] == [[10.0, -4.0, 0.0], None, [0.0], None]
    doubt = doubt_about(split, off)
    assert doubt == "the computed outcomes of ETH tp_and_roll do not follow the recorded ones"
    assert doubt_about(split, {BTC: off[BTC]}) is None
    assert "the outcomes of all candidates known" in doubt_about(split.select([1]), {})


def asked(metric: str, **more) -> SimpleNamespace:
    return SimpleNamespace(metric_for_best_model=metric, greater_is_better=True, load_best_model_at_end=True, **more)


@pytest.mark.parametrize("metric", ["mean_percent", "eval_mean_percent"])
def test_the_metric_is_money_or_in_doubt_the_loss(metric):
    training = asked(metric)
    assert settle_metric(training, None) == "the best on validation by mean_percent"
    assert (training.metric_for_best_model, training.greater_is_better) == (metric, True)
    assert settle_metric(training, "it is unknown") == "by dpo_loss, not by money: it is unknown"
    assert (training.metric_for_best_model, training.greater_is_better) == ("dpo_loss", False)


def test_another_metric_that_was_asked_for_is_left_as_it_is():
    training = asked("accuracy")
    assert settle_metric(training, "it is unknown") == "the best on validation by accuracy"
    assert training.metric_for_best_model == "accuracy"
