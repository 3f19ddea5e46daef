"""What the Q-scorer learns from, and when it sells."""

import contextlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import SCRIPT, on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st
from markets import CONFIG, SPOT, decide, entry, rich_if_volatile

from covered_call.candidates.columns import columns_of
from covered_call.candidates.context_lines import SPOT as SPOT_CONTEXT
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import CandidatesError, LoggedDecision
from covered_call.value_model.learning import Gates, Predicted, QScorerError, features, fit, learn
from covered_call.value_model.scorer import QScorer, best_of, save
from covered_call.value_model.walk_forward import candidate_pairs

pytestmark = on_the_default_stack

# Learning


def test_features_have_no_scale_of_their_own():
    small, large = entry(0, [0.5, None], [0, 0], spot=0.5), entry(0, [0.5, None], [0, 0], spot=80_000.0)
    rows = [features(columns_of([one]), ["hold_to_expiry", "tp_and_roll"]) for one in (small, large)]
    assert rows[0].shape == (2, 8)
    np.testing.assert_allclose(*rows)
    assert np.isnan(rows[0][1, 4]) and rows[0][0, 6:].tolist() == [1.0, 0.0]


def test_the_same_market_at_another_price_is_worth_the_same_share(fitted):
    cheap, dear = decide(fitted, entry(0, [0.8], [0], spot=0.5), entry(0, [0.8], [0], spot=100_000.0))
    assert cheap.q_sell / 0.5 == pytest.approx(dear.q_sell / 100_000.0)
    assert cheap.pick == dear.pick == 0


def in_markets(weeks, seed=0) -> list[LoggedDecision]:
    """Decisions whose outcomes are ten times the return of the week before, and follow from nothing else."""
    unknown = dict.fromkeys(SPOT_CONTEXT)
    made = [entry(number, [0.5], [10 * week]) for number, week in enumerate(weeks, start=100 * seed)]
    told = [unknown | {"ret_7d": week, "regime": "bull"} for week in weeks]
    return [
        one._replace(decision=one.decision._replace(context=context)) for one, context in zip(made, told, strict=True)
    ]


def test_a_scorer_learns_from_the_market_s_context_and_is_not_asked_without(tmp_path):
    weeks = np.random.default_rng(0).uniform(-0.2, 0.2, 90)
    config = CoveredCallCandidatesConfig(context="spot")
    fitted = fit(in_markets(weeks), in_markets(weeks[:30], 1), config)
    assert fitted.metadata["context"] == list(SPOT_CONTEXT)
    save(fitted, tmp_path / "q.zip")
    scorer = QScorer.load(tmp_path / "q.zip")
    rise, fall = scorer.decide([one.decision for one in in_markets([0.15, -0.15])])
    assert rise.q_sell > 0 > fall.q_sell and (rise.pick, fall.pick) == (0, None)
    with pytest.raises(QScorerError, match="fitted with the market's context, and here ret_1d is not told"):
        scorer.decide([entry(0, [0.5], [0]).decision])
    plain = fit(in_markets(weeks), in_markets(weeks[:30], 1), CONFIG)
    one, other = decide(plain, *in_markets([0.15, -0.15]))
    assert "context" not in plain.metadata and one.q_sell == other.q_sell


def test_it_sells_the_candidate_that_outcomes_favour_and_nothing_where_none_is_worth_it(fitted):
    rich, poor = decide(fitted, entry(0, [0.3, 0.75], [0, 0]), entry(0, [0.3, 0.25], [0, 0]))
    assert (rich.pick, rich.answer, rich.best, rich.stopped_by) == (1, "2", 1, None)
    assert rich.q_sell == rich.scores["2"] > rich.scores["NO_TRADE"] == 0 > rich.scores["1"]
    assert rich.confidence > 0.9
    assert (poor.pick, poor.answer, poor.stopped_by) == (None, "NO_TRADE", "threshold")
    assert poor.q_sell < 0 and poor.confidence < 0.1


def test_unknown_outcomes_are_left_out_and_counted():
    known = rich_if_volatile(range(60))
    holes = [entry(60 + number, [0.9, 0.9], [None, None]) for number in range(30)]
    with_holes, without = (learn(train, CONFIG) for train in ([*known, *holes], known))
    assert (with_holes.metadata["train"]["known"], with_holes.metadata["train"]["unknown"]) == (120, 60)
    asked = columns_of(rich_if_volatile(range(9), 3))
    np.testing.assert_array_equal(with_holes.predict(asked), without.predict(asked))


def test_too_few_known_outcomes_are_an_error_that_counts_them():
    with pytest.raises(QScorerError, match="Of 40 candidates to fit on, 39 have a known outcome: at least 40"):
        learn([*rich_if_volatile(range(19)), entry(20, [0.5, 0.5], [1.0, None])], CONFIG)
    with pytest.raises(CandidatesError, match="No outcome of the validation split is known"):
        fit(rich_if_volatile(range(60)), [entry(80, [0.5], [None])], CONFIG)


def test_outcomes_that_all_have_one_sign_can_be_learnt():
    for value, certainty in ((1.0, 1.0), (-1.0, 0.0)):
        train = [entry(number, [0.5], [value]) for number in range(60)]
        [answer] = decide(learn(train, CONFIG), train[0])
        assert answer.confidence == certainty
        assert answer.q_sell == pytest.approx(value * SPOT / 100)


def test_a_weight_on_positive_outcomes_raises_predictions_and_leaves_the_confidence_alone():
    train = rich_if_volatile(range(200), noise=3.0)
    asked = columns_of(train[:20])
    even, weighted = (learn(train, CONFIG, weight).predict(asked) for weight in (1.0, 3.0))
    assert (weighted[0] > even[0]).all()
    np.testing.assert_array_equal(even[1], weighted[1])
    with pytest.raises(QScorerError, match="positive_weight=0.0"):
        learn(train, CONFIG, 0.0)


def test_the_offset_makes_predictions_of_validation_right_on_average():
    validation = [
        one._replace(
            counterfactuals=tuple(came._replace(pnl_vs_hodl=came.pnl_vs_hodl - 700) for came in one.counterfactuals)
        )
        for one in rich_if_volatile(range(310, 350), 1)
    ]
    fitted = fit(rich_if_volatile(range(300)), validation, CONFIG)
    columns = columns_of(validation)
    predicted, realised = candidate_pairs(columns, fitted.predict(columns).values, CONFIG)
    assert predicted.mean() == pytest.approx(realised.mean())
    assert fitted.metadata["offset"] == pytest.approx(-700 / SPOT, abs=0.002)


# Deciding


@pytest.mark.parametrize(
    "gates, stopped_by",
    [
        (Gates(), None),
        (Gates(threshold=1.5), None),
        (Gates(threshold=3.5), "threshold"),
        (Gates(min_abs_return=3.5), "min_abs_return"),
        (Gates(threshold=9, min_confidence=1.0, min_abs_return=9), "min_confidence"),
        (Gates(threshold=9, min_abs_return=9), "min_abs_return"),
    ],
)
def test_the_decision_says_which_gate_stopped_it(fitted, gates, stopped_by):
    [answer] = decide(fitted, entry(0, [0.77], [0]), gates=gates)
    assert 1.5 < 100 * answer.q_sell / SPOT < 3.5
    assert answer.stopped_by == stopped_by
    assert answer.answer == ("NO_TRADE" if stopped_by else "1")
    assert answer.best == 0  # told in any case


def test_a_prediction_at_the_threshold_is_not_sold_and_one_at_a_gate_is():
    percent, confidence = np.array([0.5, 0.5, math.nan]), np.array([1.0, 0.6, 1.0])
    assert Gates(threshold=0.5).stop(percent, confidence).tolist() == ["threshold"] * 3
    assert Gates(0.0, 0.6, 0.5).stop(percent, confidence).tolist() == ["", "", "threshold"]


@pytest.mark.parametrize(
    "gates", [Gates(threshold=math.nan), Gates(min_confidence=1.1), Gates(min_abs_return=-0.1)], ids=str
)
def test_gates_that_cannot_be_are_refused(fitted, gates):
    with pytest.raises(QScorerError, match="give"):
        fitted.with_gates(gates)


def test_decisions_without_candidates_or_of_another_exit_style_are_never_sold(fitted):
    none, other = decide(fitted, entry(0, [], []), entry(0, [0.8], [0], style="tp_and_roll"))
    assert (none.answer, none.stopped_by, none.best) == ("NO_TRADE", "no candidate", None)
    assert (other.answer, other.stopped_by) == ("NO_TRADE", "unknown exit_style")
    assert QScorer(fitted).decide([]) == []


@given(st.lists(st.sampled_from([0.3, 0.31, 0.7, 0.71, None]), min_size=1, max_size=6), st.randoms())
def test_the_order_of_candidates_changes_nothing(fitted, ivs, random):
    given_in = entry(0, ivs, [0.0] * len(ivs)).decision
    order = random.sample(range(len(ivs)), len(ivs))
    shuffled = given_in._replace(candidates=tuple(given_in.candidates[i] for i in order))
    one, other = QScorer(fitted).decide([given_in, shuffled])
    assert given_in.candidates[one.best] == shuffled.candidates[other.best]
    assert (one.q_sell, one.stopped_by) == (other.q_sell, other.stopped_by)


def test_a_decision_is_held_to_the_rules_of_a_file(fitted):
    scorer, good = QScorer(fitted), entry(0, [0.77], [0]).decision
    [candidate] = good.candidates
    for name, value in (("delta", math.nan), ("iv", 45.0), ("score", None), ("strike", -1.0), ("instrument", "a\nb")):
        with pytest.raises(CandidatesError, match=f"{name}: "):
            scorer.decide([good, good._replace(candidates=(candidate._replace(**{name: value}),))])
    with pytest.raises(CandidatesError, match="spot"):
        scorer.decide([good._replace(spot=math.inf)])


def test_a_market_wilder_than_usual_is_no_error_where_the_scorer_was_fitted_on_such_a_one():
    wild = entry(0, [8.0], [0]).decision
    for max_iv, wrong in ((5.0, True), (20.0, False)):
        config = CoveredCallCandidatesConfig(max_iv=max_iv)
        scorer = QScorer(learn(rich_if_volatile(range(60)), config))
        with pytest.raises(CandidatesError, match="iv") if wrong else contextlib.nullcontext():
            assert len(scorer.decide([wild])) == 1


def test_a_dict_is_a_decision_and_the_answer_names_the_instrument(fitted):
    scorer, good = QScorer(fitted), entry(0, [0.3, 0.75], [0, 0]).decision
    [answer] = scorer.decide([json.loads(json.dumps(good.to_dict()))])
    assert [answer] == scorer.decide([good])
    assert (answer.answer, answer.instrument) == ("2", "BTC-1-C")
    assert scorer.decide([entry(0, [0.3], [0]).decision])[0].instrument is None
    with pytest.raises(CandidatesError, match="spot"):
        scorer.decide([{**good.to_dict(), "spot": "much"}])


def test_deciding_needs_no_torch():
    code = "from covered_call import QScorer; import sys; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True, timeout=120)


def test_a_prediction_above_the_premium_is_refused_where_the_call_is_held(fitted):
    """A call far out of the money brings a fraction of a percent at most; its iv alone would promise 2.5 %."""
    far = entry(0, [0.75], [0])
    candidate = far.decision.candidates[0]._replace(strike=2 * SPOT)
    held, rolled = (
        far._replace(decision=far.decision._replace(candidates=(candidate,), exit_style=style))
        for style in ("hold_to_expiry", "tp_and_roll")
    )
    [answer] = decide(fitted, held)
    assert (answer.pick, answer.stopped_by, answer.best) == (None, "above the premium", 0)
    assert 100 * answer.q_sell / SPOT > 1
    both = fit([*rich_if_volatile(range(300)), rolled], rich_if_volatile(range(310, 350), 1), CONFIG)
    assert decide(both, rolled)[0].pick == 0  # what is rolled earns several premiums


def test_of_equal_predictions_the_more_confident_is_best_and_then_the_higher_strike_and_the_later_name():
    columns = columns_of([entry(0, [0.5] * 4, [0] * 4), entry(1, [0.5] * 2, [0] * 2), entry(2, [], [])])
    confidences = np.array([0.5, 0.9, 0.9, 0.1, 0.2, 0.8])
    assert best_of(columns, Predicted(np.array([1.0, 1, 1, 1, 2, 1]), confidences)).tolist() == [2, 0, -1]
    columns.numbers["strike"][2] = columns.numbers["strike"][1]
    assert best_of(columns, Predicted(np.ones(6), confidences)).tolist() == [2, 1, -1]
    columns.numbers["strike"][1] += 1
    assert best_of(columns, Predicted(np.ones(6), confidences)).tolist() == [1, 1, -1]
