"""Which proposal is acted on: each branch of each mode, with its boundaries, and that no order changes anything."""

import itertools
import math

import numpy as np
import pytest
from conftest import on_the_default_stack
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates.columns import microseconds
from covered_call.candidates.schema import CandidatesError
from covered_call.runtime import fusion
from covered_call.runtime.fusion import Disagreements, Fusion, fuse, q_confidence, regime_of, rule_confidence

from .moments import CANDIDATES, DAY, HIGH, LATER, LOW, NOW, account, moment, said

pytestmark = on_the_default_stack

FAILED = {"error": "timed out"}


def decided(llm: float, second: float, its=LOW, others=HIGH, state=None, settled=None, **options):
    """The instrument that is sold, and the method."""
    members = [said("llm", its, llm), said("q", others, second)]
    fused = fuse(members, state or moment(), account(), Fusion(**options), settled)
    return fused.proposal.instrument, fused.method


@pytest.mark.parametrize(
    ("llm", "second", "expected"),
    [
        # One is confident above 0.9, where the other doubts: up to 0.6.
        (0.6, 0.91, (HIGH, "second_confident")),
        (0.6, 0.9, (HIGH, "second_weighted")),
        (0.61, 0.91, (HIGH, "second_weighted")),
        (0.91, 0.6, (LOW, "llm_confident")),
        (0.9, 0.6, (HIGH, "second_weighted")),
        (0.91, 0.61, (HIGH, "second_weighted")),
        # Both below 0.5.
        (0.49, 0.49, (None, "both_uncertain")),
        (0.5, 0.49, (HIGH, "second_weighted")),
        (0.49, 0.5, (HIGH, "second_weighted")),
        (0.0, 0.0, (None, "both_uncertain")),
        # 0.3 of the one against 0.7 of the other.
        (0.9, 0.38, (LOW, "llm_weighted")),
        (0.9, 0.39, (HIGH, "second_weighted")),
        (0.7, 0.29, (LOW, "llm_weighted")),
        (0.7, 0.3, (HIGH, "second_weighted")),  # a tie
        (0.69, 0.29, (HIGH, "llm_below_threshold")),
        (0.5, 0.2, (HIGH, "llm_below_threshold")),
        (1.0, 1.0, (HIGH, "second_weighted")),
    ],
)
def test_the_sequence_of_rules(llm, second, expected):
    assert decided(llm, second) == expected


def test_no_trade_is_a_pick_like_others():
    assert decided(0.95, 0.5, its=None) == (None, "llm_confident")
    assert decided(0.5, 0.95, others=None) == (None, "second_confident")
    assert decided(0.2, 0.2, its=None, others=None) == (None, "agreement")


@pytest.mark.parametrize(("llm", "second"), [(0.1, 0.1), (0.95, 0.1), (0.1, 0.95), (0.7, 0.7)])
def test_who_agrees_on_an_instrument_sells_it_however_unsure(llm, second):
    assert decided(llm, second, its=LOW, others=LOW) == (LOW, "agreement")


def test_a_confident_llm_overrides_from_the_threshold_on():
    assert decided(0.95, 0.5, confidence_threshold=0.95) == (LOW, "llm_confident")
    assert decided(0.95, 0.5, confidence_threshold=0.96) == (HIGH, "llm_below_threshold")
    assert decided(0.8, 0.2, confidence_threshold=0.81) == (HIGH, "llm_below_threshold")


def test_the_weight_is_the_llms():
    assert decided(0.8, 0.7, llm_weight=0.5) == (LOW, "llm_weighted")
    assert decided(0.8, 0.8, llm_weight=0.5) == (HIGH, "second_weighted")
    fused = fuse([said("llm", LOW, 0.8), said("q", HIGH, 0.7)], moment(), account(), Fusion(llm_weight=0.25))
    assert fused.weights == {"llm": 0.25, "q": 0.75}


BULL, BEAR = {"distance": 0.06, "month": 0.11}, {"distance": -0.06, "month": -0.11}
CALM = {"distance": 0.04, "month": 0.2, "short_vol": 0.3, "realised_vol": 0.4}


@pytest.mark.parametrize(
    ("context", "regime"),
    [
        (BULL, "trend"),
        (BEAR, "trend"),
        (BULL | {"month": 0.10}, "neutral"),
        (BULL | {"distance": 0.05}, "neutral"),
        (BEAR | {"month": 0.2}, "neutral"),
        (CALM, "range"),
        (CALM | {"distance": -0.04}, "range"),
        (CALM | {"distance": 0.05}, "neutral"),
        (CALM | {"distance": -0.05}, "neutral"),
        (CALM | {"distance": 0.05, "month": 0.0}, "neutral"),
        (CALM | {"short_vol": 0.4}, "neutral"),
        (CALM | {"realised_vol": None}, "neutral"),
        (CALM | {"short_vol": None}, "neutral"),  # which is not 0
        (CALM | {"month": None}, "range"),
        ({}, "neutral"),
    ],
)
def test_regimes(context, regime):
    assert regime_of(context) == regime


@pytest.mark.parametrize(
    ("context", "llm", "second", "expected"),
    [
        (BULL, 0.89, 0.22, (LOW, "llm_weighted")),
        (BULL, 0.89, 0.23, (HIGH, "second_weighted")),
        (CALM, 0.8, 0.89, (LOW, "llm_weighted")),
        (CALM, 0.3, 0.7, (HIGH, "second_weighted")),  # a tie
        ({}, 0.89, 0.38, (LOW, "llm_weighted")),
        ({}, 0.89, 0.39, (HIGH, "second_weighted")),
        (CALM, 0.6, 0.95, (HIGH, "second_confident")),
    ],
)
def test_a_regime_weighs(context, llm, second, expected):
    assert decided(llm, second, state=moment(**context), mode="regime") == expected


def test_one_policy_alone():
    assert decided(0.1, 0.9, mode="llm") == (LOW, "llm")
    assert decided(0.9, 0.1, mode="second") == (HIGH, "second")
    assert decided(0.9, 0.1, mode="shadow") == (HIGH, "shadow")


def test_agreement_alone():
    assert decided(0.9, 0.9, mode="agreement") == (None, "disagreement")
    assert decided(0.9, 0.9, others=None, mode="agreement") == (None, "disagreement")
    assert decided(0.1, 0.1, others=LOW, mode="agreement") == (LOW, "agreement")


@pytest.mark.parametrize("mode", ["rules", "regime", "learned", "agreement", "llm", "second", "shadow", "ensemble"])
def test_who_failed_is_not_there(mode):
    good, bad = said("q", HIGH, 0.6), said("llm", LOW, 0.99, **FAILED)
    fused = fuse([bad, good], moment(), account(), Fusion(mode=mode))
    assert fused.proposal.instrument == (None if mode == "agreement" else HIGH)
    nothing = fuse([bad, good._replace(error="no file")], moment(), account(), Fusion(mode=mode))
    assert nothing.proposal.instrument is None and nothing.proposal.confidence == 0
    assert nothing.method == ("second_failed" if mode in ("second", "shadow") else "all_failed")


@pytest.mark.parametrize(("confidence", "sold"), [(0.7, LOW), (0.69, None)])
def test_an_llm_whose_second_failed_needs_the_threshold(confidence, sold):
    members = [said("llm", LOW, confidence), said("q", HIGH, 0.9, **FAILED)]
    fused = fuse(members, moment(), account(), Fusion())
    assert (fused.proposal.instrument, fused.method) == (sold, "second_failed")


@pytest.mark.parametrize("confidence", [math.nan, -0.1, 1.1, math.inf])
def test_what_is_no_proposal(confidence):
    members = [said("llm", LOW, confidence), said("q", HIGH, 0.6)]
    assert fuse(members, moment(), account(), Fusion()).method == "llm_failed"
    gone = [said("llm", "BTC-19DEC25-99000-C", 0.99), said("q", HIGH, 0.6)]
    assert fuse(gone, moment(), account(), Fusion()).method == "llm_failed"


def test_the_second_is_named_where_several_could_be():
    members = [said("llm", LOW, 0.6), said("q", HIGH, 0.95), said("rule", LATER, 0.95)]
    with pytest.raises(CandidatesError, match="second: q and rule could each"):
        fuse(members, moment(), account(), Fusion())
    assert fuse(members, moment(), account(), Fusion(second="rule")).proposal.instrument == LATER
    assert fuse(members[1:2], moment(), account(), Fusion(mode="second")).proposal.instrument == HIGH


def test_options_that_cannot_be():
    for options, match in (
        ({"mode": "vote"}, "mode='vote': choose one of llm, second"),
        ({"average": "mean"}, "average='mean'"),
        ({"llm_weight": 1.1}, "llm_weight=1.1"),
        ({"confidence_threshold": math.nan}, "confidence_threshold=nan"),
        ({"weights": {"q": -1.0}}, "'q' weighs -1"),
    ):
        with pytest.raises(CandidatesError, match=match):
            Fusion(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Confidence


def test_how_sure_a_rule_is():
    for best, threshold, expected in (
        (3.0, 3.0, 0.5), (3.75, 3.0, 0.75), (2.25, 3.0, 0.75), (4.5, 3.0, 1.0), (9.0, 3.0, 1.0), (None, 3.0, 1.0),
        (2.0, -math.inf, 1.0), (None, -math.inf, 1.0),
    ):  # fmt: skip
        assert rule_confidence(best, threshold) == pytest.approx(expected)


def test_how_sure_a_q_scorer_is():
    assert q_confidence(0.8, sells=True) == 0.8
    assert q_confidence(0.8, sells=False) == pytest.approx(0.2)
    assert q_confidence(math.nan, sells=False) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Learned


def disagreements(count: int, settled_at=NOW - DAY) -> Disagreements:
    """Where the LLM wins if it is the surer one; what else is known says nothing."""
    draws = np.random.default_rng(0).random((count, len(fusion.FEATURES)))
    draws[::7, 5:] = math.nan
    return Disagreements(draws, draws[:, 0] > draws[:, 1], np.full(count, microseconds(settled_at)))


def test_what_was_settled_decides_from_a_hundred_on():
    assert decided(0.9, 0.7, mode="learned", settled=disagreements(100)) == (LOW, "learned_llm")
    assert decided(0.7, 0.9, mode="learned", settled=disagreements(100)) == (HIGH, "learned_second")
    assert decided(0.9, 0.7, mode="learned", settled=disagreements(99)) == (HIGH, "second_weighted")
    assert decided(0.9, 0.7, mode="learned") == (HIGH, "second_weighted")
    assert decided(0.7, 0.7, others=LOW, mode="learned", settled=disagreements(100)) == (LOW, "agreement")


def test_a_learned_override_needs_the_threshold():
    assert decided(0.65, 0.1, mode="learned", settled=disagreements(200)) == (HIGH, "llm_below_threshold")


def test_nothing_of_the_future_is_learnt():
    known, future = disagreements(100), disagreements(300, NOW + DAY)
    wrong = future._replace(llm_won=~future.llm_won)
    both = Disagreements(*(np.concatenate(pair) for pair in zip(known, wrong, strict=True)))
    state, pair = moment(realised_vol=0.5), [said("llm", LOW, 0.9), said("q", HIGH, 0.7)]
    options = Fusion(mode="learned")
    assert fuse(pair, state, account(), options, both) == fuse(pair, state, account(), options, known)
    assert fuse(pair, state, account(), options, wrong).method == "second_weighted"
    at_the_time = disagreements(100, NOW)
    assert fuse(pair, state, account(), options, at_the_time).method == "learned_llm"


@pytest.mark.parametrize("won", [True, False])
def test_where_one_always_won_there_is_nothing_to_learn(won):
    settled = disagreements(200)._replace(llm_won=np.full(200, won))
    assert decided(0.9, 0.7, mode="learned", settled=settled) == (HIGH, "second_weighted")


def test_features_of_a_disagreement():
    state, portfolio = moment(**CALM), account(equity_usd=90.0, peak_equity_usd=100.0)
    pair = said("llm", LOW, 0.9), said("q", HIGH, 0.7)
    assert fusion.features_of(*pair, state, portfolio) == (0.9, 0.7, 1.0, 0.0, 1.0, 0.4, 0.1)
    alone = fusion.features_of(pair[0], said("q", None, 0.7), moment(**BULL), account(peak_equity_usd=None))
    assert alone[2:5] == (0.0, 1.0, 0.0) and np.isnan(alone[5:]).all()


# ---------------------------------------------------------------------------------------------------------------------
# A vote


def voted(*members, **options):
    return fuse(members, moment(), account(), Fusion(mode="ensemble", **options))


def test_a_vote_adds_confidence_times_weight():
    members = said("llm", LOW, 0.9), said("q", HIGH, 0.5), said("rule", HIGH, 0.5)
    fused = voted(*members)
    assert fused.proposal.instrument == HIGH and fused.proposal.confidence == pytest.approx(1.9 / 3)
    assert fused.weights == {"llm": 1.0, "q": 1.0, "rule": 1.0}
    assert voted(*members, weights={"llm": 1.2}).proposal.instrument == LOW
    assert voted(*members, weights={"q": 0.0}).proposal.instrument == LOW
    assert voted(*members, weights={"q": 0.0}).proposal.confidence == pytest.approx(0.7)


def test_who_failed_has_no_vote():
    fused = voted(said("llm", LOW, 0.4), said("q", HIGH, 0.9, **FAILED))
    assert (fused.proposal.instrument, fused.proposal.confidence, fused.weights) == (LOW, 0.4, {"llm": 1.0})
    assert voted().method == "all_failed"


def test_of_equals_no_trade_then_the_first_by_name():
    assert voted(said("llm", LOW, 0.6), said("q", None, 0.6)).proposal.instrument is None
    assert voted(said("llm", HIGH, 0.6), said("q", LOW, 0.6)).proposal.instrument == LOW


def test_an_average_of_probabilities():
    llm = said("llm", LOW, 0.5, probabilities={LOW: 0.5, HIGH: 0.4, "NO_TRADE": 0.1})
    other = said("openai", "BTC-19DEC25-97000-C", 0.6, probabilities={HIGH: 0.6, LATER: 0.1, "NO_TRADE": 0.3})
    fused = voted(llm, other, said("rule", LATER, 1.0), average="probability")
    assert fused.proposal.instrument == HIGH and fused.proposal.confidence == pytest.approx(0.5)
    assert fused.proposal.margin == pytest.approx(0.25) and set(fused.weights) == {"llm", "openai"}
    heavy = voted(llm, other, average="probability", weights={"llm": 9.0})
    assert heavy.proposal.instrument == LOW and heavy.proposal.confidence == pytest.approx(0.45)
    assert voted(said("rule", LATER, 1.0), average="probability").method == "no_probabilities"


def test_no_probability_sells_what_is_not_offered():
    gone = said("llm", LOW, 0.2, probabilities={"BTC-19DEC25-99000-C": 0.7, LOW: 0.2, "NO_TRADE": 0.1})
    assert voted(gone, average="probability").proposal.instrument == LOW


# ---------------------------------------------------------------------------------------------------------------------
# Orders

PICKS = st.sampled_from([None, LOW, HIGH, LATER, "BTC-19DEC25-99000-C"])
CONFIDENCES = st.sampled_from([0.0, 0.3, 0.49, 0.5, 0.6, 0.61, 0.7, 0.9, 0.91, 1.0, math.nan]) | st.floats(0, 1)
PROBABILITIES = st.none() | st.dictionaries(st.sampled_from([LOW, HIGH, LATER, "NO_TRADE"]), st.floats(0, 1))
SETTLED = disagreements(120)


@st.composite
def gatherings(draw):
    return [
        said(name, draw(PICKS), draw(CONFIDENCES), error=draw(st.sampled_from([None, None, "timed out"])),
            probabilities=draw(PROBABILITIES))
        for name in ("llm", "q", "rule")
    ]  # fmt: skip


def reordered(draw, mapping: dict) -> dict:
    return dict(draw(st.permutations(list(mapping.items()))))


@settings(max_examples=250)
@given(data=st.data(), mode=st.sampled_from(fusion.MODES))
def test_no_order_changes_anything(data, mode):
    draw, members = data.draw, data.draw(gatherings())
    context = draw(st.sampled_from([BULL, CALM, {}]))
    weights = {name: draw(st.sampled_from([0.0, 0.3, 1.0])) for name in ("llm", "q", "rule")}
    average = draw(st.sampled_from([fusion.VOTE, fusion.PROBABILITY]))
    options = Fusion(mode=mode, second="q", weights=weights, average=average)
    fused = fuse(members, moment(**context), account(), options, SETTLED)
    state = moment(draw(st.permutations(CANDIDATES)), **reordered(draw, context))
    state = state._replace(quotes=reordered(draw, state.quotes))
    options = Fusion(mode=mode, second="q", weights=reordered(draw, weights), average=average)
    members = [
        one._replace(probabilities=one.probabilities and reordered(draw, one.probabilities))
        for one in draw(st.permutations(members))
    ]
    assert fuse(members, state, account(), options, SETTLED) == fused


@settings(max_examples=250)
@given(mode=st.sampled_from(fusion.MODES), members=gatherings())
def test_who_failed_changes_nothing(mode, members):
    """Whatever it said before it failed: neither its pick nor its confidence is in the answer."""
    options = Fusion(mode=mode, second="q")
    fused = fuse(members, moment(), account(), options)
    blank = [said(one.source, None, 0.0, error=one.error) if one.error else one for one in members]
    assert fuse(blank, moment(), account(), options) == fused
    able = {one.instrument for one in members if one.error is None and 0 <= one.confidence <= 1}
    assert fused.proposal.instrument in able | {None} and fused.proposal.error is None


def test_every_branch_was_taken():
    """The methods that the pages name, each by some pair of confidences."""
    grid = [0.2, 0.45, 0.55, 0.65, 0.75, 0.95]
    found = {decided(*pair)[1] for pair in itertools.product(grid, repeat=2)} | {decided(0.5, 0.5, others=LOW)[1]}
    assert found == {
        "agreement", "second_confident", "llm_confident", "both_uncertain", "llm_weighted", "second_weighted",
        "llm_below_threshold",
    }  # fmt: skip
