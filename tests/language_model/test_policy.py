"""Tokens of chats, the scores of answers, and a policy's decisions."""

import itertools
import json
import math
import re

import pytest
import torch
from conftest import REAL_PHI3, SCRIPT, decision, no_candidates, on_the_default_stack, read_candidates, write_csv
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from covered_call.candidates.context_lines import SPOT
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import PROMPT_VERSION, ranking_messages, version_with
from covered_call.candidates.schema import NO_TRADE, CandidatesError, LoggedDecision
from covered_call.language_model.loading import (
    ADAPTER,
    answer_tokens,
    base_revision,
    control_beside,
    control_tokens,
    encode,
    load_base,
    load_config,
    load_tokenizer,
)
from covered_call.language_model.manifest import PolicyError, hash_of, read_manifest
from covered_call.language_model.policy import Answer, Policy, fit_temperature
from covered_call.language_model.tiny_phi3 import CHAT_TEMPLATE, random_phi3, train_tokenizer

pytestmark = on_the_default_stack  # torch, transformers and peft do it all
TEXTS = ["Score: 3.2029, IV: n/a — SELL_CALL or SKIP, NO_TRADE"] * 3
READER = train_tokenizer(TEXTS)
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "Phi-3": (Phi3Config, Phi3ForCausalLM, CHAT_TEMPLATE),
    "Llama": (LlamaConfig, LlamaForCausalLM, LLAMA_2),
    "Mistral": (MistralConfig, MistralForCausalLM, LLAMA_2),
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM, CHATML),
}
PROMPT = [{"role": "system", "content": "Decide."}, {"role": "user", "content": "Score: 3.2"}]


def chat(answer: str, prompt=PROMPT) -> list[dict]:
    return [*prompt, {"role": "assistant", "content": answer}]


def tokenizer_with(template: str):
    tokenizer = train_tokenizer(TEXTS)
    tokenizer.chat_template = template
    return tokenizer


def small(config_class, model_class):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(READER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=1, bos_token_id=None, eos_token_id=0,
        initializer_range=0.3,  # large enough for a wrong position to show
    )  # fmt: skip
    return model_class(config).eval()


# --- Tokens and names that look like them


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML, LLAMA_2])
@given(answer=st.from_regex(r"[1-9][0-9]?|NO_TRADE|SKIP|SELL_CALL", fullmatch=True))
def test_a_chat_is_its_prompt_and_an_answer_through_one_end_token(template, answer):
    tokenizer = tokenizer_with(template)
    [(prompt, tokens)] = encode(tokenizer, [chat(answer)])
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        PROMPT, tokenize=False, add_generation_prompt=True
    )
    end = tokenizer.eos_token if template == LLAMA_2 else "<|end|>"
    assert tokenizer.decode(tokens).strip() == answer + end
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    assert [token for token in tokens if token in special] == tokens[-1:]


def test_chats_encoded_together_are_those_encoded_alone():
    chats = [chat("SKIP"), chat("10"), chat("NO_TRADE", PROMPT[1:])]
    assert encode(READER, chats) == [encode(READER, [one])[0] for one in chats]


def test_one_answer_may_begin_another_since_the_end_token_follows():
    tokens = answer_tokens(READER, PROMPT, ["1", "10", "100", "NO_TRADE"])
    assert tokens["10"][: len(tokens["1"]) - 1] == tokens["1"][:-1]
    assert len({ids[-1] for ids in tokens.values()}) == 1


def test_answers_that_cannot_be_told_apart_are_refused():
    cut = tokenizer_with(CHAT_TEMPLATE.replace("message['content']", "message['content'][:4]"))
    with pytest.raises(PolicyError, match="answer SELL_CALL begin those of SELL_PUT"):
        answer_tokens(cut, PROMPT, ["SELL_CALL", "SELL_PUT"])


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no system role') }}", "refuses this chat: no system role"),
        ("{{ messages | length }}{{ messages[-1].content }}<|end|>", "another prompt when an answer follows"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token"),
    ],
)
def test_a_chat_template_that_would_not_do_is_refused_with_the_reason(template, message):
    with pytest.raises(PolicyError, match=message):
        encode(tokenizer_with(template), [chat("SKIP")])


@pytest.mark.parametrize(
    "pad, unk, bos, expected",
    [("<|pad|>", None, None, "<|pad|>"), (None, "<u>", None, "<u>"), ("<|end|>", None, "<s>", "<s>")],
)
def test_the_pad_token_is_never_the_end_of_an_answer(tmp_path, pad, unk, bos, expected):
    tokenizer = tokenizer_with(CHATML)
    tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token = pad, unk, bos
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == expected


def test_a_tokenizer_without_a_token_to_pad_with_or_a_chat_template_is_refused(tmp_path):
    tokenizer = tokenizer_with(LLAMA_2)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "a")
    with pytest.raises(PolicyError, match=r"no token to pad with but <\|endoftext\|>"):
        load_tokenizer(str(tmp_path / "a"))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "b")
    with pytest.raises(PolicyError, match="no chat template"):
        load_tokenizer(str(tmp_path / "b"))


def phi3_like() -> list:
    """Tokenizers, those of the test's families and, where it is, the real Phi-3's, in which </s> is not special."""
    readers = [tokenizer_with(template) for template in (CHAT_TEMPLATE, CHATML, LLAMA_2)]
    return [*readers, load_tokenizer(str(REAL_PHI3))] if REAL_PHI3.is_dir() else readers


def test_no_text_of_a_message_becomes_a_control_token(states):
    """Whatever the model, and whichever of its tokens: in training and in deciding."""
    for tokenizer in phi3_like():
        for text in {added.content for added in tokenizer.added_tokens_decoder.values()}:
            named = states[3]._replace(exit_style=f"x{text}y")
            with pytest.raises(PolicyError, match=f"holds the text .*{re.escape(text)}.*, which is a control token"):
                encode(tokenizer, [chat("1", ranking_messages(states[3])), chat("1", ranking_messages(named))])
            policy = policy_of("per_decision_ranking")
            policy.tokenizer = tokenizer
            with pytest.raises(PolicyError, match="is a control token of the model"):
                policy._score([named])


def test_the_tokens_of_other_text_are_what_the_tokenizer_makes_of_it(states):
    """Angle brackets and all: what is watched for changes no token."""
    for tokenizer in phi3_like():
        for exit_style in ("tp_and_roll", "a < b > c", "<|en", "x  y\n\n[1]", "SELL_CALL"):
            asked = ranking_messages(states[5]._replace(exit_style=exit_style))
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            [(prompt, _)] = encode(tokenizer, [chat("1", asked)])
            assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "ids, said", [([1, 9, 2], None), ([1, 1, 2], "a"), ([1], "b"), ([], "a, b"), ([2, 1], "b, a")]
)
def test_control_tokens_are_those_of_the_template_in_its_order(ids, said):
    assert control_beside([1, 2], ids, {1: "a", 2: "b"}) == said


def test_runs_of_spaces_and_words_that_a_tokenizer_has_added_are_no_control_tokens():
    tokenizer = train_tokenizer(TEXTS)
    tokenizer.add_tokens(["  ", "\n\n", "SELL_CALL", "<think>"])
    control = control_tokens(tokenizer)
    assert {"<think>", "<|end|>", "<|pad|>"} <= set(control.values())
    assert not {"  ", "\n\n", "SELL_CALL"} & set(control.values())


def test_the_prompt_version_is_that_of_these_prompts():
    """Whoever changes a prompt or a number format changes this on purpose: all tuned models then need a new tuning."""
    assert PROMPT_VERSION == "69247da62606"


# --- Decisions


@torch.inference_mode()
def one_by_one(model, prompt, answer) -> tuple[float, bool]:
    """Log-probability of an answer after its prompt alone, and whether greedy decoding would write it."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return sum(row[t].item() for row, t in zip(logits, answer, strict=True)), logits.argmax(-1).tolist() == list(
        answer
    )


@pytest.fixture
def logged(tmp_path) -> list[LoggedDecision]:
    """Decisions of one to twelve candidates and one of none, in a teacher's order: by score, not by instrument."""
    rows = [
        row
        for day in range(12)
        for row in decision(day, day if day % 2 else None, range(60000 + 1000 * day, 59999, -1000))
    ]
    path = write_csv(tmp_path / "a.csv", [*rows, no_candidates(12)])
    return read_candidates([path], CoveredCallCandidatesConfig())


@pytest.fixture
def states(logged) -> list:
    return [entry.decision for entry in logged]


def policy_of(task: str, folder=None, order=None, **options) -> Policy:
    """A random model, with weights large enough for it to have opinions."""
    model = random_phi3(READER, seed=0).eval()
    model.lm_head.weight.data *= 20
    manifest = {"task": task, "recipe": {"candidate_order": order}, "tuned_on": TUNED_ON}
    return Policy(folder, model, READER, manifest, **options)


TASKS = ["per_candidate", "per_decision_ranking"]
TUNED_ON = {
    "underlyings": ["BTC"],
    "exit_styles": ["tp_and_roll"],
    "numbers": {"dte": [1.0, 7.0], "delta": [0.1, 0.4]},
}


def close(one: list[Answer], other: list[Answer]) -> bool:
    return all(
        a.answer == b.answer
        and [a.probability, a.margin, *a.scores.values()]
        == pytest.approx([b.probability, b.margin, *b.scores.values()], abs=1e-4)
        for a, b in zip(one, other, strict=True)
    )


def permuted(state, order):
    return state._replace(candidates=tuple(state.candidates[i] for i in order))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("task", TASKS)
def test_decided_in_batches_is_decided_one_by_one(states, task, side, monkeypatch):
    policy = policy_of(task, batch_tokens=3_000)
    monkeypatch.setattr(policy.tokenizer, "padding_side", side)
    alone = [policy_of(task, batch_tokens=1).decide([state])[0] for state in states]
    assert close(policy.decide(states), alone)
    monkeypatch.setattr("covered_call.language_model.policy.CHUNK", 4)
    assert close(policy.decide(states), alone)


def test_a_ranking_decision_is_the_model_s_own_probabilities_of_all_answers(states):
    """One by one, each answer through its end token, so that 1 and 10 to 12 are told apart."""
    policy = policy_of("per_decision_ranking", temperature=2.0)
    state = states[11]
    shown = permuted(state, sorted(range(12), key=lambda i: state.candidates[i].instrument))
    answers = [*map(str, range(1, 13)), NO_TRADE]
    tokens = answer_tokens(READER, ranking_messages(shown), answers)
    [(prompt, _)] = encode(READER, [chat("1", ranking_messages(shown))])
    expected = torch.tensor([one_by_one(policy.model, prompt, tokens[answer])[0] for answer in answers]) / 2
    expected = dict(zip(answers, expected.log_softmax(0).tolist(), strict=True))
    [found] = policy.decide([shown])
    assert list(found.scores) == answers
    assert found.scores == pytest.approx(expected, abs=1e-4)
    first, second = sorted(found.scores.values(), reverse=True)[:2]
    assert found.answer == max(expected, key=expected.get)
    assert found.probability == pytest.approx(math.exp(first))
    assert found.margin == pytest.approx(math.exp(first) - math.exp(second))
    assert len({round(score, 6) for score in found.scores.values()}) == 13


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("recipe_order", [None, "instrument", "shuffle"])
def test_the_answer_is_an_index_into_the_callers_order(states, task, recipe_order):
    policy, order = policy_of(task, order=recipe_order), [3, 0, 4, 2, 1]
    [one], [other] = policy.decide([states[4]]), policy.decide([permuted(states[4], order)])
    assert {str(place + 1): other.scores[str(index + 1)] for index, place in enumerate(order)} == {
        name: pytest.approx(score, abs=1e-6) for name, score in one.scores.items() if name != NO_TRADE
    }
    assert other.answer == (NO_TRADE if one.answer == NO_TRADE else str(order.index(int(one.answer) - 1) + 1))


def test_prompts_show_the_order_that_the_model_was_tuned_on(states, monkeypatch):
    shown = []
    target = "covered_call.language_model.policy.ranking_messages"
    monkeypatch.setattr(target, lambda one: shown.append(one) or ranking_messages(one))
    policy_of("per_decision_ranking").decide([states[2]])
    policy_of("per_decision_ranking", order="csv").decide([states[2]])
    assert [one.instrument for one in shown[0].candidates] == ["BTC-60000-C", "BTC-61000-C", "BTC-62000-C"]
    assert shown[1] == states[2]


def with_scores(policy: Policy, *scores: list[list[float]]) -> Policy:
    """The policy with a model that says this of each decision, over and over."""
    logs = [torch.tensor(one, dtype=torch.float64).log() for one in scores]
    policy._score = lambda decisions: [one for one, _ in zip(itertools.cycle(logs), decisions, strict=False)]
    return policy


def test_per_candidate_sells_the_likeliest_if_it_is_likelier_sold_than_not(states):
    policy = with_scores(
        policy_of("per_candidate"), [[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]], [[0.3, 0.7], [0.1, 0.9]], [[0.5, 0.5]]
    )
    sold, skipped, tied = policy.decide([states[2]] * 3)
    assert (sold.answer, sold.instrument, sold.abstained) == ("2", "BTC-61000-C", False)
    assert skipped.instrument is None
    assert (sold.probability, sold.margin) == pytest.approx((0.9, 0.3))
    assert {name: math.exp(score) for name, score in sold.scores.items()} == pytest.approx(
        {"1": 0.6, "2": 0.9, "3": 0.2}
    )
    assert (skipped.answer, skipped.abstained) == (NO_TRADE, False)
    assert (skipped.probability, skipped.margin) == pytest.approx((0.7, 0.4))
    assert tied.answer == NO_TRADE


def test_below_the_threshold_a_trade_becomes_no_trade_and_says_so(states):
    scores = [[0.6, 0.3, 0.1]], [[0.8, 0.1, 0.1]], [[0.2, 0.2, 0.6]]
    unsure, sure, idle = with_scores(policy_of("per_decision_ranking", threshold=0.7), *scores).decide(states[:3])
    assert (unsure.answer, unsure.abstained, sure.answer, sure.abstained) == (NO_TRADE, True, "1", False)
    assert (unsure.probability, unsure.margin) == pytest.approx((0.6, 0.3))
    assert (idle.answer, idle.abstained) == (NO_TRADE, False)
    with pytest.raises(PolicyError, match=r"threshold=1.5: give a probability"):
        policy_of("per_candidate", threshold=1.5)


@pytest.mark.parametrize("task", TASKS)
def test_without_candidates_there_is_no_trade_for_certain_and_the_model_is_not_asked(states, task):
    policy = policy_of(task)
    policy.model = None
    [found] = policy.decide([states[12]])
    assert (found.answer, found.probability, found.margin, found.abstained) == (NO_TRADE, 1.0, 1.0, False)
    assert policy.decide([]) == []


def in_a_market(state, **told):
    return state._replace(context=dict.fromkeys(SPOT) | told)


def test_a_model_is_asked_with_the_context_it_was_tuned_with_and_with_no_other(states, tmp_path):
    told = [in_a_market(state, ret_7d=0.1, mine=3.0) for state in states]
    policy = policy_of("per_decision_ranking")
    plain = policy.decide(states)
    assert policy.decide(told) == plain
    policy.manifest["context"] = [*SPOT]
    within = policy.decide(told)
    assert within != plain and within == policy.decide([in_a_market(state, ret_7d=0.1) for state in states])
    assert within != policy.decide([in_a_market(state, ret_7d=0.2) for state in states])
    with pytest.raises(CandidatesError, match="fitted with the market's context, and here ret_1d is not told"):
        policy.decide(states)
    save_run(tmp_path / "run", "per_decision_ranking", adapter=False)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    for changed in ({"context": [*SPOT]}, {"prompt_version": version_with(SPOT)}):
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest | changed))
        with pytest.raises(PolicyError, match="tuned on prompts of version"):
            read_manifest(tmp_path / "run")
    both = {"context": [*SPOT], "prompt_version": version_with(SPOT)}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest | both))
    assert Policy.load(tmp_path / "run").decide(told)
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest | {"context": "spot"}))
    with pytest.raises(PolicyError, match="context is 'spot'"):
        read_manifest(tmp_path / "run")


def test_what_the_model_cannot_decide_is_refused_with_the_reason(states):
    policy = policy_of("per_decision_ranking")
    policy.model.config.sliding_window = 300
    with pytest.raises(PolicyError, match="tokens, and the model sees 300: give fewer candidates"):
        policy.decide(states)
    policy = policy_of("per_decision_ranking")
    policy.model.lm_head.weight.data *= math.nan
    with pytest.raises(PolicyError, match="scores are not finite"):
        policy.decide(states[:1])


def changed(state, **fields):
    """The decision with another number or name of its first candidate, or of its own."""
    own = {name: value for name, value in fields.items() if name in state._fields}
    first = state.candidates[0]._replace(**{name: value for name, value in fields.items() if name not in own})
    return state._replace(candidates=(first, *state.candidates[1:]), **own)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"delta": math.nan}, "candidate 1 .*delta.*nan"),
        ({"iv": 45.0}, "candidate 1 .*iv.*45"),
        ({"score": None}, "candidate 1 .*score.*None"),
        ({"exit_style": "<|end|>"}, "exit_style"),
        ({"instrument": "BTC-60000-P"}, "put"),
        ({"spot": "58000"}, "spot"),
    ],
)
def test_a_decision_that_no_csv_could_hold_is_refused(states, fields, said):
    for decide in (policy_of("per_candidate").decide, policy_of("per_decision_ranking").score):
        with pytest.raises(CandidatesError, match=said):
            decide([states[0], changed(states[2], **fields)])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"underlying": "ETH"}, r"ETH\|.* was tuned on the underlying BTC, and not on ETH. Tune one on it, or leave"),
        ({"exit_style": "hold_to_expiry"}, "tuned on the exit_style tp_and_roll, and not on hold_to_expiry"),
    ],
)
def test_a_market_that_the_model_was_not_tuned_on_is_refused_with_both_names(states, fields, said):
    candidates = tuple(one._replace(instrument=f"call {i}") for i, one in enumerate(states[2].candidates))
    with pytest.raises(PolicyError, match=said):
        policy_of("per_decision_ranking").decide([states[2]._replace(candidates=candidates, **fields)])


def test_an_answer_names_its_instrument_and_the_numbers_beyond_those_that_were_learnt(states):
    policy = with_scores(policy_of("per_decision_ranking"), [[0.1, 0.8, 0.05, 0.05]])
    within, beyond = policy.decide([states[2], changed(states[2], dte=9.0, delta=0.41)])
    assert (within.answer, within.instrument, within.outside) == ("2", states[2].candidates[1].instrument, ())
    assert beyond.outside == ("dte", "delta")
    assert json.loads(json.dumps(within._asdict()))["instrument"] == within.instrument


@pytest.mark.parametrize("task", TASKS)
def test_a_dict_of_json_decides_as_the_decision_it_is(states, task):
    policy = policy_of(task)
    state = states[3]._replace(candidates=states[3].candidates[::-1])
    assert policy.decide([json.loads(json.dumps(state.to_dict()))]) == policy.decide([state])
    for nonsense in ({}, "BTC", None, {**state.to_dict(), "spott": 1}):
        with pytest.raises(CandidatesError):
            policy.decide([nonsense])


def save_run(folder, task: str, adapter: bool) -> None:
    """A folder as a training leaves it, untrained: with an adapter on a base beside it, or a full model."""
    model, base = random_phi3(READER, seed=0), folder.with_name("base")
    READER.save_pretrained(folder)
    model.save_pretrained(base if adapter else folder)
    if adapter:
        get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).save_pretrained(folder)
    manifest = {
        "task": task, "adapter": adapter, "base_model": str(base), "quantization": "none", "finished": "today",
        "base_revision": base_revision(str(base)) if adapter else None, "prompt_version": PROMPT_VERSION,
        "recipe": {"candidate_order": None}, "splits": {"train": {"to": "2024-10-01T00:00:00+00:00"}},
        "tuned_on": TUNED_ON, "files": {path.name: hash_of(path) for path in folder.iterdir()},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("adapter", [True, False])
def test_a_saved_run_decides_in_every_quantization(states, tmp_path, adapter):
    save_run(tmp_path / "run", "per_decision_ranking", adapter)
    policy = Policy.load(tmp_path / "run", threshold=0.1, batch_tokens=900)
    assert (policy.task, policy.temperature, policy.threshold) == ("per_decision_ranking", 1.0, 0.1)
    assert policy.batch_tokens == 900
    exact = policy.decide(states)
    assert [len(one.scores) for one in exact] == [*range(2, 14), 1]
    for quantization in ("int8", "int4"):
        rough = Policy.load(tmp_path / "run", quantization).decide(states)
        for one, other in zip(exact, rough, strict=True):
            assert list(one.scores.values()) == pytest.approx(list(other.scores.values()), abs=1.0)
    with pytest.raises(PolicyError, match="quantization='int3': choose one of int4, int8, none"):
        Policy.load(tmp_path / "run", "int3")
    with pytest.raises(PolicyError, match="no folder that covered-call train saved|There is no folder"):
        Policy.load(tmp_path / "base")


def resave(folder, **tensors) -> None:
    """Another adapter in a run's folder, and its hash in the manifest, as if it had been saved so."""
    save_file(tensors, folder / ADAPTER)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][ADAPTER] = hash_of(folder / ADAPTER)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_an_adapter_that_is_not_what_was_saved_is_refused(tmp_path):
    """By its hash; and if even that is right, by its tensors, which PEFT would draw at random where they lack."""
    folder = tmp_path / "run"
    save_run(folder, "per_decision_ranking", adapter=True)
    tensors = load_file(folder / ADAPTER)
    for content in (b"", (folder / ADAPTER).read_bytes()[:-4]):
        (folder / ADAPTER).write_bytes(content)
        with pytest.raises(PolicyError, match="adapter_model.safetensors is not the file that was saved"):
            Policy.load(folder)
    first, *others = tensors
    for names in ([first], others, [*tensors, "base_model.model.x.lora_A.weight"]):
        resave(folder, **{name: tensors.get(name, torch.zeros(1)) for name in names})
        with pytest.raises(PolicyError, match=r"adapter_model.safetensors and its model differ in \S+lora_\S+"):
            Policy.load(folder)
    resave(folder)
    (folder / ADAPTER).write_bytes(b"")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][ADAPTER] = hash_of(folder / ADAPTER)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PolicyError, match="The adapter in .* cannot be read"):
        Policy.load(folder)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_base_that_lacks_a_tensor_is_refused(tmp_path, quantization):
    """Transformers would draw it at random, and only warn."""
    random_phi3(READER, seed=0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PolicyError, match="lacks model.layers.0.mlp.down_proj.weight and 1 more: download"):
        load_base(str(tmp_path), quantization, torch.float32, "cpu")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(PolicyError, match="cannot be loaded in "):
        load_base(str(tmp_path), quantization, torch.float32, "cpu")


def test_a_model_that_brings_code_of_its_own_runs_none_of_it(tmp_path):
    """Nor is it asked whether it may: nobody may be there to answer."""
    random_phi3(READER, seed=0).save_pretrained(tmp_path)
    READER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mine"}
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(PolicyError, match="no model that transformers knows by itself, .*code that comes with"):
        load_config(str(tmp_path))
    with pytest.raises(PolicyError):
        load_base(str(tmp_path), "none", torch.float32, "cpu")
    assert not (tmp_path / "ran").exists()


def test_every_model_config_and_tokenizer_is_loaded_without_code_of_its_own():
    """In so many words, lest an environment or a later default say otherwise."""
    calls = [
        (path.name, call)
        for path in (SCRIPT.parent / "covered_call").rglob("*.py")
        for call in re.findall(r"Auto\w+\.from_(?:pretrained|config)\((?:[^()]|\([^()]*\))*\)", path.read_text())
    ]
    assert len(calls) >= 4
    assert not [found for found in calls if "trust_remote_code=False" not in found[1]]


@pytest.mark.parametrize("temperature", [-1.0, 0.0, math.nan, math.inf, None])
def test_a_temperature_that_no_calibration_gives_makes_no_policy(tmp_path, temperature):
    with pytest.raises(PolicyError, match="temperature="):
        policy_of("per_candidate", temperature=temperature)
    save_run(tmp_path / "run", "per_candidate", adapter=False)
    (tmp_path / "run" / "calibration.json").write_text(json.dumps({"temperature": temperature}))
    with pytest.raises(PolicyError, match="calibration.json: the temperature is .*calibrate the model again"):
        Policy.load(tmp_path / "run")


@pytest.mark.parametrize("task", TASKS)
def test_a_calibrated_temperature_lowers_the_loss_and_is_loaded_again(logged, tmp_path, task):
    save_run(tmp_path / "run", task, adapter=False)
    policy = Policy.load(tmp_path / "run")
    temperature = fit_temperature(policy, logged)
    stored = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert stored["temperature"] == temperature == policy.temperature != 1.0
    assert stored["nll_after"] < stored["nll_before"]
    assert stored["records"] == (78 if task == "per_candidate" else 12)
    assert not list((tmp_path / "run").glob("*.tmp"))
    loaded = Policy.load(tmp_path / "run")
    decisions = [entry.decision for entry in logged]
    assert close(loaded.decide(decisions), policy.decide(decisions))
    if task == "per_decision_ranking":  # what is stored is what decide() says of the teacher's answers
        answers = [NO_TRADE if one.chosen is None else str(one.chosen + 1) for one in logged[:12]]
        given = [one.scores[answer] for one, answer in zip(loaded.decide(decisions), answers, strict=False)]
        assert -sum(given) / 12 == pytest.approx(stored["nll_after"], abs=1e-4)


def test_calibration_finds_the_temperature_that_answers_were_drawn_at(logged, tmp_path):
    """Answers right 3 times in 4, from a model that is sure of them: 0.75 is what it should have said."""
    entries = [logged[1]._replace(chosen=0 if i % 4 else None) for i in range(40)]
    policy = with_scores(policy_of("per_decision_ranking", tmp_path), *[[[0.98, 1e-30, 0.02]]] * 40)
    fit_temperature(policy, entries)
    assert policy.decide([logged[1].decision])[0].probability == pytest.approx(0.75, abs=1e-3)
    policy = with_scores(policy, *[[[0.98, 1e-30, 0.02]]] * 40)
    assert 0.05 <= fit_temperature(policy, [one._replace(chosen=0) for one in entries]) < 1


def test_calibration_on_nothing_is_refused(logged, tmp_path):
    with pytest.raises(PolicyError, match="None of the decisions to calibrate on has a candidate"):
        fit_temperature(policy_of("per_candidate", tmp_path), logged[12:])
