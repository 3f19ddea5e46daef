"""A language model behind a server: what of its answers is a proposal, and that all else is an error and no trade."""

import json
import logging
import math
import socket
import time

import pytest
from conftest import on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st

from covered_call.candidates.prompts import admissible_answers, ranking_messages
from covered_call.runtime.answers import Parsed, ServerError, Token, parsed, scored
from covered_call.runtime.engine import Agent
from covered_call.runtime.fusion import Fusion, fuse
from covered_call.runtime.journal import opened
from covered_call.runtime.paper import begin
from covered_call.runtime.policies import LanguageModel, Model, Querying, Rule
from covered_call.runtime.remote import MOST, TASK, UNSAID, Client, KeyMissing, Remote
from runtime.markets import BEGUN, FREELY, quoted_state
from runtime.server import Server, completion

pytestmark = on_the_default_stack

NOTHING = begin(BEGUN)
SECRET = "sk-0f1e2d3c4b5a"
TWO = quoted_state()  # of which the prompt shows 100000 as 1 and 105000 as 2
TWELVE = quoted_state(strikes=tuple(100_000.0 + 1_000 * n for n in range(12)), scores=(3.5,) * 12)


@pytest.fixture
def server():
    with Server() as one:
        yield one


def client(server, timeout_s=5.0, **keys) -> Client:
    return Client(Remote(server.url, "tuned", **keys), timeout_s)


def proposed(server, state=TWO, timeout_s=5.0, **keys):
    asked = client(server, timeout_s, **keys)
    return LanguageModel(asked.ask, name="openai").propose(state, NOTHING)


def name(state, place: int) -> str:
    return sorted(one.instrument for one in state.decision.candidates)[place - 1]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked and what is answered


def test_it_is_shown_the_prompt_of_the_training_at_temperature_0(server):
    shuffled = TWO._replace(decision=TWO.decision._replace(candidates=TWO.decision.candidates[::-1]))
    server.answer = completion("1")
    assert proposed(server, shuffled).instrument == name(TWO, 1)
    ((path, authorization, body),) = server.requests
    assert (path, authorization) == ("/v1/chat/completions", None)
    assert body["messages"] == ranking_messages(TWO.decision) and body["model"] == "tuned"
    assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0, True, 20)


def test_answers_are_scored_by_the_first_token(server):
    server.answer = completion("2", {"2": 0.6, " 1": 0.1, "1": 0.1, "NO": 0.15, "I": 0.05})
    proposal = proposed(server)
    assert (proposal.instrument, proposal.error) == (name(TWO, 2), None)
    assert proposal.confidence == pytest.approx(0.6) and proposal.margin == pytest.approx(0.4)
    expected = {name(TWO, 1): 0.2, name(TWO, 2): 0.6, "NO_TRADE": 0.15}
    assert proposal.probabilities == pytest.approx(expected)  # of what begins with "I" nobody has any
    server.answer = completion("NO_TRADE", {"NO": 0.9, "1": 0.1})
    proposal = proposed(server)
    assert (proposal.instrument, proposal.error) == (None, None) and proposal.confidence == pytest.approx(0.9)


def test_without_probabilities_the_text_is_read(server):
    for text, pick, confidence in (
        ("2", 2, UNSAID), (" 1\n", 1, UNSAID), ("2 | 0.8 | rich premium", 2, 0.8), ("1|1", 1, 1.0),
        ('{"answer": "2", "confidence": 0.25, "reason": "r"}', 2, 0.25), ('{"answer": 1}', 1, UNSAID),
    ):  # fmt: skip
        server.answer = completion(text)
        proposal = proposed(server)
        assert (proposal.instrument, proposal.confidence, proposal.error) == (name(TWO, pick), confidence, None), text
        assert proposal.probabilities is None
    server.answer = completion("NO_TRADE | 0.9 | calm")
    assert proposed(server, logprobs=False)[1:3] == (None, 0.9)
    assert "logprobs" not in server.requests[-1][2]
    assert proposed(server).reason == "asked: never asked; calm"
    server.answer = completion('{"answer": "2", "confidence": 0.7}', {"{": 0.99, "2": 0.01}, {'"': 1.0})
    assert proposed(server).confidence == 0.7  # the first token says nothing of the answers


def test_without_a_candidate_nobody_is_asked(server):
    empty = quoted_state(strikes=(), scores=())
    assert proposed(server, empty)[1:3] == (None, 1.0) and not server.requests


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


ANSWERS = admissible_answers(TASK, 12)


def told(*positions: dict[str, float]) -> dict[str, float]:
    found = scored([[Token(*one) for one in position.items()] for position in positions], ANSWERS)
    return {answer: value for answer, value in found.items() if value}


def test_1_and_10_stay_apart():
    whole = {"10": 0.5, "1": 0.3, "11": 0.1, "12": 0.1}
    assert told(whole) == pytest.approx({"10": 0.5, "1": 0.3, "11": 0.1, "12": 0.1})
    digits = ({"1": 0.8, "2": 0.15, "NO": 0.05}, {"0": 0.5, "<|end|>": 0.3, "1": 0.15, "9": 0.05})
    expected = {"10": 0.4, "1": 0.24, "11": 0.12, "2": 0.15, "NO_TRADE": 0.05}  # 19 is no answer
    assert told(*digits) == pytest.approx(expected)
    second = ({"1": 0.4, "2": 0.35, "3": 0.25}, {"0": 0.51, "<|end|>": 0.49})
    found = told(*second)
    assert max(found, key=found.get) == "2"  # though the text is 10
    blank = ({" ": 0.99, "x": 0.01}, {"3": 0.9, "4": 0.1})
    assert told(*blank)["3"] == pytest.approx(0.99 * 0.9)


def test_what_tokens_do_not_tell_is_an_error_or_the_least_that_it_may_be():
    # The one that was taken is sure enough, whoever of 1, 10, 11 and 12 has the rest.
    assert told({"5": 0.6, "1": 0.4}) == pytest.approx({"5": 0.6})
    with pytest.raises(ServerError, match="do not tell 5 from 1, 10, 11, 12"):
        told({"5": 0.45, "2": 0.05, "1": 0.46})
    # The text ended after 1, and the server does not say how likely that was: at least as likely as each digit.
    assert told({"1": 0.99, "2": 0.01}) == pytest.approx({"1": 0.09, "2": 0.01})
    with pytest.raises(ServerError, match="do not tell 2 from 1: set logprobs: false"):
        told({"1": 0.6, "2": 0.4})
    nine = scored([[Token("1", 0.6), Token("2", 0.4)]], admissible_answers(TASK, 9))
    assert (nine["1"], nine["2"]) == (0.6, 0.4)  # with fewer than ten nothing is shared


def test_a_server_that_writes_digit_by_digit_is_understood(server):
    server.answer = completion("12", {"1": 0.9, "2": 0.1}, {"2": 0.7, "<|end|>": 0.2, "0": 0.1}, {"<|end|>": 1.0})
    proposal = proposed(server, TWELVE)
    assert proposal.instrument == name(TWELVE, 12) and proposal.confidence == pytest.approx(0.63)


@given(st.lists(st.dictionaries(st.sampled_from(["1", "10", "0", "2", "NO", " ", "", "x", "<e>", "9"]),
    st.floats(0.001, 1.0), min_size=1, max_size=6), max_size=4), st.integers(1, 30))  # fmt: skip
def test_no_answer_has_more_than_its_tokens_have(positions, candidates):
    answers = admissible_answers(TASK, candidates)
    shares = [{text: value / sum(one.values()) for text, value in one.items()} for one in positions]
    try:
        found = scored([[Token(*one) for one in share.items()] for share in shares], answers)
    except ServerError:
        return
    if found is not None:
        assert set(found) == set(answers) and math.fsum(found.values()) <= 1 + 1e-9 and min(found.values()) >= 0


# ---------------------------------------------------------------------------------------------------------------------
# The parser


@given(st.one_of(st.text(max_size=60), st.text("0123456789NO_TRADE|{}\"': .,answerconfi", max_size=40)))
def test_whatever_is_answered_is_an_answer_or_an_error(text):
    try:
        found = parsed(text, ANSWERS)
    except ServerError as error:
        assert len(str(error)) < 300 and "\n" not in str(error)
        return
    assert found.answer in ANSWERS and (found.confidence is None or 0 <= found.confidence <= 1)


@given(st.integers(1, 60), st.data(), st.floats(0, 1), st.text(max_size=20).filter(lambda text: text.strip() == text))
def test_every_answer_that_is_allowed_comes_back_from_each_form(candidates, data, confidence, reason):
    answers = admissible_answers(TASK, candidates)
    answer = data.draw(st.sampled_from(answers))
    reason = " ".join(reason.split())
    assert parsed(f" {answer}\n", answers) == Parsed(answer)
    assert parsed(f"{answer} | {confidence!r} | {reason}", answers) == Parsed(answer, confidence, reason)
    text = json.dumps({"answer": answer, "confidence": confidence, "reason": reason})
    assert parsed(text, answers) == Parsed(answer, confidence, reason)


GARBAGE = [
    "", "I would sell 2.", "3", "0", "-1", "01", "2.", "SELL_CALL", "no_trade", "1 or 2", "1 | high | it is rich",
    "1 | 1.5 | sure", "1 | nan | sure", "1 | -0.1", "1 |", "{", "{}", '{"pick": 1}', '{"answer": 1.0}',
    '{"answer": null}',
    '{"answer": true}', '{"answer": ["1"]}', '{"answer": "1", "confidence": "high"}', '{"answer": "1", "reason": 3}',
    '{"answer": "1", "size": 99}', '{"answer": "1"} {"answer": "2"}', "[1]", "```1```", "١", "1\u0000",
]  # fmt: skip


@pytest.mark.parametrize("text", GARBAGE)
def test_anything_else_is_an_error_and_never_a_trade(text):
    with pytest.raises(ServerError):
        parsed(text, admissible_answers(TASK, 2))


BODIES = ["", "not JSON", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}',
    '{"choices": [{"message": {"content": "1"}, "logprobs": {"content": [{"token": "1"}]}}]}',
    '{"choices": [{"message": {"content": "1"}, "logprobs": {"content": [{"token": "1", "logprob": 5.0}]}}]}',
    "[" * 100_000, b"\xff\xfe\x00"]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_no_completion_is_an_error(server, body):
    server.answer = body
    proposal = proposed(server)
    assert proposal.instrument is None and "ServerError: no chat completion" in proposal.error
    assert len(proposal.error) < 300


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "answers 401: look at A_KEY"), (403, "answers 403: look at A_KEY"), (404, "answers 404: look at base_url"),
     (429, "answers 429: it is asked too much"), (500, "answers 500: *** is what you sent"), (302, "answers 302")],
)  # fmt: skip
def test_a_status_is_an_error_without_the_key(server, monkeypatch, status, said):
    monkeypatch.setenv("A_KEY", SECRET)
    server.status, server.answer = status, f"{SECRET} is what you sent"
    proposal = proposed(server, key_variable="A_KEY")
    assert said in proposal.error and proposal.instrument is None and SECRET not in repr(proposal)
    assert len(server.requests) == 1 and server.requests[0][1] == f"Bearer {SECRET}"  # nothing is asked twice


def test_nobody_there_and_an_answer_without_end_are_errors(server):
    server.answer = completion("1" + " " * MOST)
    assert f"more than {MOST:,} bytes" in proposed(server).error
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = Client(Remote(f"http://127.0.0.1:{free.getsockname()[1]}/v1", "tuned"), 5.0)
    assert "ConnectError" in LanguageModel(nobody.ask).propose(TWO, NOTHING).error


@pytest.mark.parametrize("slow", [{"delay": 3.0}, {"drip": 0.05}])
def test_what_comes_too_late_is_an_error_in_time_and_the_next_policy_decides(server, slow):
    server.answer = completion("1")
    vars(server).update(slow)
    model = LanguageModel(client(server, timeout_s=0.5).ask, name="openai")
    began = time.monotonic()
    (cycle,) = Agent([model, Rule()], FREELY, None, BEGUN).run([TWO])
    assert time.monotonic() - began <= 1.5  # what is promised, so no timing of this machine
    late, rule = cycle.plan.proposals
    assert late.error == "TimeoutError: no answer after 0.5 s" and cycle.plan.fused == (rule, "fallback", {}, None)


# ---------------------------------------------------------------------------------------------------------------------
# The key


def test_the_key_is_of_the_environment_and_nowhere_in_what_is_told_or_logged(server, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("A_KEY", f" {SECRET}\n")
    asked = client(server, key_variable="A_KEY")
    server.answer = completion(f"1 | 0.9 | I was sent {SECRET}")
    with opened(tmp_path / "log") as journal:
        agent = Agent([LanguageModel(asked.ask, name="openai"), Rule()], FREELY, None, BEGUN, journal)
        (cycle,) = agent.run([TWO])
    assert server.requests[0][1] == f"Bearer {SECRET}"
    assert cycle.plan.proposals[0].reason == "asked: never asked; I was sent ***"
    (path,) = (tmp_path / "log").glob("*.jsonl")
    for text in (path.read_text(), caplog.text, repr(asked), repr(asked.remote), str(cycle)):
        assert SECRET not in text


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "ключ"])
def test_a_key_that_is_none_is_said_by_the_name_of_its_variable(server, monkeypatch, value):
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with pytest.raises(KeyMissing, match="A_KEY") as error:
        client(server, key_variable="A_KEY")
    assert not value or not value.strip() or value not in str(error.value)


def test_no_key_is_sent_that_was_not_asked_for(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    proposed(server)
    assert server.requests[0][1] is None


# ---------------------------------------------------------------------------------------------------------------------
# As any language model


def test_it_is_asked_selectively_cached_and_left_alone_after_errors(server):
    server.answer = completion("1", {"1": 0.9, "2": 0.1})
    remote, rules = Remote(server.url, "tuned"), Querying(query_cooldown=0, query_interval=0)
    model = LanguageModel(Client(remote, 5.0).ask, rules, Model(remote.sha, TASK, "instrument"), "openai")
    first, second = (model.propose(TWO, NOTHING, None) for _ in range(2))
    assert len(server.requests) == 1 and second.cached and second.probabilities == first.probabilities
    lazy = LanguageModel(Client(remote, 5.0).ask, Querying())
    again = [lazy.propose(TWO, NOTHING) for _ in range(2)][1]
    assert again.confidence == pytest.approx(0.72) and again.probabilities is None and len(server.requests) == 2
    server.status = 500
    broken = LanguageModel(Client(remote, 5.0).ask, Querying(max_errors=2, error_cooldown=3))
    assert ["left alone" in str(broken.propose(TWO, NOTHING).error) for _ in range(6)] == [False] * 2 + [True] * 3 + [
        False
    ]
    assert Remote(server.url, "other").sha != remote.sha


def test_two_language_models_and_a_rule_vote_together(server):
    server.answer = completion("2", {"2": 0.8, "1": 0.2})
    remote = Client(Remote(server.url, "tuned"), 5.0)
    other = LanguageModel(lambda decision: (_ for _ in ()).throw(RuntimeError("it is broken")))
    steps = FREELY._replace(fuse=lambda members, state, portfolio: fuse(members, state, portfolio, VOTE))
    sources = [other, LanguageModel(remote.ask, name="openai"), Rule()]
    (cycle,) = Agent(sources, steps, None, BEGUN).run([TWO])
    assert [one.source for one in cycle.plan.proposals] == ["llm", "openai", "rule"]
    assert cycle.plan.fused.proposal.instrument == name(TWO, 2) and cycle.plan.fused.method == "ensemble"
    assert set(cycle.plan.fused.weights) == {"openai", "rule"}


VOTE = Fusion(mode="ensemble", weights={"openai": 2.0})
