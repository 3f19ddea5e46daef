"""What policies propose, when the language model is asked, and that no policy can stop the agent."""

import math
import time

import pytest
from conftest import on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st
from markets import CONFIG, decide, rich_if_volatile

from covered_call.candidates.schema import Opinion
from covered_call.language_model.manifest import PolicyError
from covered_call.language_model.policy import Answer
from covered_call.runtime.answers import Said
from covered_call.runtime.engine import Agent
from covered_call.runtime.paper import Opened, apply, begin
from covered_call.runtime.policies import (
    NO_POLICY,
    ExactCache,
    LanguageModel,
    Model,
    Q,
    Querying,
    Rule,
    first_that_answers,
    proposals_of,
)
from covered_call.runtime.state import Position, Proposal
from covered_call.runtime.worker import Worker, WorkerError, answer_of
from covered_call.value_model.learning import Gates, fit
from covered_call.value_model.scorer import QScorer
from runtime.markets import BEGUN, DAY, FREELY, START, quoted_state, quoted_states
from runtime.stubs import Stub, no_policy

pytestmark = on_the_default_stack

NOTHING = begin(BEGUN)
SURE = Proposal("rule", None, 1.0)  # a second policy that gives no reason to ask
IN_DOUBT = Proposal("rule", None, 0.5)
WANTS = Proposal("rule", "BTC-10JAN25-100000-C", 1.0)


@pytest.mark.parametrize(
    ("best", "sells", "confidence"),
    [(3.0, True, 0.5), (2.9, False, 0.5 + 0.5 * 0.1 / 1.5), (4.5, True, 1.0), (9.0, True, 1.0), (0.0, False, 1.0)],
)  # fmt: skip
def test_the_rule_sells_the_best_score_from_its_threshold_on(best, sells, confidence):
    state = quoted_state(scores=(best - 0.5, best))
    proposal = Rule(3.0).propose(state, NOTHING)
    assert proposal.instrument == (state.decision.candidates[1].instrument if sells else None)
    assert proposal.confidence == pytest.approx(confidence) and proposal.source == "rule"


@given(st.permutations(range(4)), st.lists(st.sampled_from([2.0, 3.0, 4.0]), min_size=4, max_size=4))
def test_the_order_of_candidates_changes_no_proposal(order, scores):
    state = quoted_state(strikes=(98_000.0, 99_000.0, 100_000.0, 101_000.0), scores=scores)
    shuffled = tuple(state.decision.candidates[place] for place in order)
    other = state._replace(decision=state.decision._replace(candidates=shuffled))
    assert Rule().propose(other, NOTHING) == Rule().propose(state, NOTHING)


def test_without_a_candidate_no_trade_is_certain():
    state = quoted_state(strikes=(), scores=())
    assert Rule().propose(state, NOTHING)[1:3] == (None, 1.0)


@pytest.fixture(scope="module")
def fitted():
    return fit(rich_if_volatile(range(60)), rich_if_volatile(range(60, 80), seed=1), CONFIG)


def test_the_q_scorer_is_as_sure_of_no_trade_as_it_is_unsure_of_the_sale(fitted):
    entries = rich_if_volatile(range(100, 130), seed=2)
    states = [quoted_state()._replace(decision=one.decision) for one in entries]
    answers = decide(fitted, *entries)
    assert {one.pick is None for one in answers} == {True, False}
    for state, answer in zip(states, answers, strict=True):
        proposal = Q(QScorer(fitted)).propose(state, NOTHING)
        assert proposal.instrument == answer.instrument and proposal.q_usd == answer.q_sell and proposal.error is None
        expected = answer.confidence if answer.pick is not None else 1 - answer.confidence
        assert proposal.confidence == expected
        assert proposal.reason == (answer.stopped_by or f"{answer.q_sell:+,.2f} USD expected")


def test_gates_and_empty_decisions_are_no_trade(fitted):
    shut = QScorer(fitted.with_gates(Gates(threshold=99.0)))
    entry = rich_if_volatile([0])[0]
    state = quoted_state()._replace(decision=entry.decision)
    assert Q(shut).propose(state, NOTHING).reason == "threshold"
    empty = state._replace(decision=entry.decision._replace(candidates=()))
    proposal = Q(shut).propose(empty, NOTHING)
    assert (proposal.instrument, proposal.confidence, proposal.q_usd, proposal.error) == (None, 1.0, None, None)


def test_a_decision_that_a_policy_refuses_is_an_error_and_not_the_end(fitted):
    state = quoted_state()
    broken = state._replace(decision=state.decision._replace(spot=-1.0))
    proposal = Q(QScorer(fitted)).propose(broken, NOTHING)
    assert proposal.instrument is None and "CandidatesError" in str(proposal.error)


# ---------------------------------------------------------------------------------------------------------------------
# The language model


class Told:
    """A model that answers what it is told to, and counts."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), 0

    def __call__(self, decision) -> Said:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


SELL, PASS = Said("BTC-10JAN25-100000-C", 0.9, 0.8, False), Said(None, 0.8, 0.6, False)


def days(count: int):
    return [quoted_state(START + number * DAY, strikes=(100_000.0,), scores=(3.5,)) for number in range(count)]


def asked_at(second, count: int = 11, portfolio=lambda number: NOTHING, **rules) -> list[int]:
    """The steps at which a model is asked."""
    told, steps = Told(PASS), []
    model = LanguageModel(told, Querying(**rules))
    for number, state in enumerate(days(count)):
        before = told.asked
        model.propose(state, portfolio(number), second)
        steps += [number] * (told.asked - before)
    return steps


def test_the_model_is_asked_where_the_second_policy_is_in_doubt_or_wants_an_entry_but_not_within_the_cooldown():
    assert asked_at(SURE) == [0, 5, 10]
    assert asked_at(IN_DOUBT) == [0, 3, 6, 9] == asked_at(WANTS)
    assert asked_at(SURE._replace(confidence=0.7)) == [0, 5, 10]  # from the threshold on it is not in doubt
    assert asked_at(SURE, query_interval=2, query_cooldown=1) == [0, 2, 4, 6, 8, 10]
    assert asked_at(None) == [0, 3, 6, 9]  # nobody else knows


def sold(portfolio, time=START):
    position = Position("BTC-10JAN25-100000-C", "BTC", 100_000.0, START + 7 * DAY, -0.1, 900.0, time)
    return apply(portfolio, Opened(time, position, 90.0))


def test_who_has_sold_already_wants_no_entry_and_a_change_of_the_portfolio_asks_at_once():
    held = sold(NOTHING)
    assert asked_at(WANTS, portfolio=lambda number: held) == [0, 5, 10]
    assert asked_at(SURE, portfolio=lambda number: held if number >= 1 else NOTHING) == [0, 1, 6]


def test_an_answer_that_is_used_again_is_trusted_less_each_time_and_only_while_it_is_offered():
    model = LanguageModel(Told(SELL), Querying())
    states = days(4)
    proposals = [model.propose(state, NOTHING, SURE) for state in [states[0], states[0], states[0], states[1]]]
    assert [one.confidence for one in proposals] == pytest.approx([0.9, 0.72, 0.576, 0.4608])
    assert [one.cached for one in proposals] == [False, True, True, True]
    assert [one.instrument for one in proposals] == [SELL.instrument] * 3 + [None]
    assert "no longer offered" in proposals[-1].reason


MODEL = Model("sha of it", "per_decision_ranking", "instrument")


def test_what_else_a_model_is_told_is_added_before_it_is_asked_and_an_error_of_it_is_a_proposal_s():
    seen = []

    def ask(decision):
        seen.append(decision)
        return SELL

    opinion = Opinion(None, {})
    model = LanguageModel(ask, Querying(), tell=lambda decision: decision._replace(opinion=opinion))
    assert model.propose(days(1)[0], NOTHING).instrument == SELL.instrument and seen[0].opinion == opinion

    def fails(decision):
        raise ValueError("no opinion")

    proposal = LanguageModel(ask, Querying(), tell=fails).propose(days(1)[0], NOTHING)
    assert proposal.error == "ValueError: no opinion" and len(seen) == 1


def test_the_very_same_prompt_has_the_very_same_answer_without_asking():
    told, (state, other) = Told(SELL, PASS), days(2)
    model = LanguageModel(told, Querying(query_cooldown=0, query_interval=0), MODEL)
    first, second = (model.propose(state, NOTHING, SURE) for _ in range(2))
    assert told.asked == 1 and second.cached and second.confidence == first.confidence
    reordered = state._replace(decision=state.decision._replace(candidates=state.decision.candidates[::-1]))
    assert model.propose(reordered, NOTHING, SURE).cached  # prompts have an order of their own
    model.propose(other, NOTHING, SURE)
    assert told.asked == 2


def test_other_models_and_other_prompts_have_other_keys():
    state, other = (one.decision for one in days(2))
    keys = {MODEL.key_of(state), MODEL.key_of(other), MODEL._replace(sha="another").key_of(state),
        MODEL._replace(task="per_candidate").key_of(state)}  # fmt: skip
    assert len(keys) == 4


def test_the_cache_forgets_what_is_old_and_what_is_too_much():
    now = [0.0]
    cache = ExactCache(300.0, 2, lambda: now[0])
    cache.put("a", SURE)
    now[0] = 300.0
    assert cache.get("a") == SURE
    now[0] = 300.1
    assert cache.get("a") is None
    for key in "bcd":
        cache.put(key, SURE)
    assert [cache.get(key) for key in "abcd"] == [None, None, SURE, SURE]


def test_after_errors_in_a_row_the_model_is_left_alone_for_a_while_and_then_asked_again():
    told = Told(*[PolicyError("it is broken")] * 4, SELL)
    model = LanguageModel(told, Querying(max_errors=3, error_cooldown=5))
    proposals = [model.propose(state, NOTHING, IN_DOUBT) for state in days(10)]
    assert told.asked == 5 and all(one.error for one in proposals[:9]) and proposals[9].error is None
    assert ["left alone" in str(one.error) for one in proposals] == [False] * 3 + [True] * 5 + [False] * 2
    assert "PolicyError: it is broken" in str(proposals[0].error)


def test_an_abstention_is_as_sure_as_the_sale_was_unsure():
    proposal = LanguageModel(Told(Said(None, 0.3, 0.1, True))).propose(days(1)[0], NOTHING, SURE)
    assert proposal.instrument is None and proposal.confidence == pytest.approx(0.7)


def test_the_fallback_chain_is_named():
    broken = Proposal("llm", None, 0.0, error="it is broken")
    assert first_that_answers([broken, WANTS]) == WANTS
    nobody = first_that_answers([broken, WANTS._replace(error="so is it")])
    assert (nobody.source, nobody.instrument, nobody.confidence) == (NO_POLICY, None, 0.0)
    assert nobody.reason == "llm: it is broken; rule: so is it"


def test_the_model_is_asked_after_the_second_policy_and_stands_before_it():
    told = Told(SELL)
    found = proposals_of([LanguageModel(told), Rule()], days(1)[0], NOTHING)
    assert [one.source for one in found] == ["llm", "rule"]


# ---------------------------------------------------------------------------------------------------------------------
# In a process of its own


@pytest.fixture(scope="module")
def worker():
    worker = Worker(Stub, timeout_s=60.0)
    yield worker
    worker.stop()


def at(spot: float):
    state = days(1)[0]
    return state._replace(decision=state.decision._replace(spot=spot))


def test_a_hung_model_is_killed_and_the_decision_falls_back_in_time(worker):
    model = LanguageModel(worker.ask)
    worker.wait_until_ready(60.0)
    hung, worker.timeout_s = worker.process, 1.0
    began = time.monotonic()
    (cycle,) = Agent([model, Rule()], FREELY, None, BEGUN).run([at(1.0)])
    assert time.monotonic() - began <= worker.timeout_s + 1.0  # what is promised, so no timing of this machine
    assert not hung.is_alive() and worker.process is not hung
    llm, rule = cycle.plan.proposals
    assert llm.error == "TimeoutError: no answer after 1 s" and cycle.plan.fused == (rule, "fallback", {}, None)
    worker.timeout_s = 60.0
    assert model.propose(at(95_000.0), NOTHING, SURE).confidence == 0.9  # it has been started again


def test_of_a_ranking_all_probabilities_are_told_by_instrument():
    class Ranks:
        def decide(self, decisions):
            scores = {"1": math.log(0.2), "2": math.log(0.7), "NO_TRADE": math.log(0.1)}
            return [Answer(1, "B", 0.7, 0.5, scores, False, ())]

    state = quoted_state()
    first, second = (one.instrument for one in state.decision.candidates)
    kind, answer = answer_of(Ranks(), state.decision)
    assert (kind, answer[:4]) == ("answer", ("B", 0.7, 0.5, False))
    assert answer[4] == pytest.approx({first: 0.2, second: 0.7, "NO_TRADE": 0.1})
    proposal = LanguageModel(Told(Said(*answer))).propose(state, NOTHING)
    assert proposal.probabilities == answer[4]


def test_a_process_that_ends_and_a_policy_that_fails_are_errors(worker):
    with pytest.raises(WorkerError, match="ended by itself .exit status 3"):
        worker.ask(at(2.0).decision)
    with pytest.raises(WorkerError, match="ValueError: not this one"):
        worker.ask(at(3.0).decision)
    assert worker.ask(at(95_000.0).decision).probability == 0.9


def test_a_model_that_cannot_be_loaded_says_why():
    worker = Worker(no_policy, timeout_s=60.0)
    with pytest.raises(WorkerError, match="ValueError: there is no such folder"):
        worker.wait_until_ready(60.0)
    worker.stop()


def test_confidences_are_probabilities(fitted):
    for state in quoted_states(5):
        for proposal in proposals_of([Rule(), Q(QScorer(fitted))], state, NOTHING):
            assert 0 <= proposal.confidence <= 1 and math.isfinite(proposal.confidence)
