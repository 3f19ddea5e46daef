"""Tokens of chats, and the scores of answers."""

import pytest
import torch
from conftest import decision, no_candidates, write_csv
from hypothesis import given
from hypothesis import strategies as st
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

from covered_call_candidates import NO_TRADE, PROMPT_VERSION, admissible_answers
from policy import PolicyError, answer_tokens, encode, load_tokenizer, score_answers, score_batch
from tiny_phi3 import CHAT_TEMPLATE, random_phi3, train_tokenizer

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


# --- Tokens


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
    assert sum(token in tokenizer.all_special_ids for token in tokens) == 1


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


def test_the_prompt_version_is_that_of_these_prompts():
    """Whoever changes a prompt or a number format changes this on purpose: all tuned models then need a new tuning."""
    assert PROMPT_VERSION == "69247da62606"


# --- Scores


@pytest.fixture
def decisions(tmp_path, load) -> list[dict]:
    """Ranking records of one to twelve candidates, and one without any."""
    rows = [
        row for day in range(12) for row in decision(day, sold=0, strikes=range(60000, 60000 + 1000 * (day + 1), 1000))
    ]
    path = write_csv(tmp_path / "a.csv", [*rows, no_candidates(12)])
    return list(load("per_decision_ranking", data_files=path, splits="train")["train"])


def scoring_input(records, tokenizer):
    prompts = [prompt for prompt, _ in encode(tokenizer, [row["messages"] for row in records])]
    tokens = answer_tokens(tokenizer, records[0]["messages"][:-1], [*map(str, range(1, 13)), NO_TRADE])
    return prompts, [[tokens[answer] for answer in admissible_answers(row)] for row in records]


@torch.inference_mode()
def one_by_one(model, prompt, answer) -> tuple[float, bool]:
    """Log-probability of an answer after its prompt alone, and whether greedy decoding would write it."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return sum(row[t].item() for row, t in zip(logits, answer, strict=True)), logits.argmax(-1).tolist() == list(
        answer
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_side_by_side_in_a_padded_batch_each_answer_scores_as_alone(decisions, family, attention):
    config_class, model_class, template = FAMILIES[family]
    tokenizer, model = tokenizer_with(template), small(config_class, model_class)
    model.set_attn_implementation(attention)
    prompts, answers = scoring_input(decisions, tokenizer)
    for size in (1, 5):
        scored = score_answers(model, prompts, answers, size)
        for prompt, offered, found in zip(prompts, answers, scored, strict=True):
            expected = [one_by_one(model, prompt, answer) for answer in offered]
            assert found.log_probabilities == pytest.approx([score for score, _ in expected], abs=1e-4)
            assert found.in_set == any(greedy for _, greedy in expected)


def test_an_answer_the_model_would_write_by_itself_counts_as_in_the_set(decisions):
    """Generated greedily, token by token, and then offered as an answer."""
    model = random_phi3(READER, seed=0).eval()
    [(prompt, _)] = encode(READER, [decisions[3]["messages"]])
    written = []
    for _ in range(3):
        written.append(model(torch.tensor([[*prompt, *written]])).logits[0, -1].argmax().item())
    others = [(5, 6), (7, 8, 9)]
    assert score_batch(model, [prompt], [[*others, tuple(written)]])[0].in_set
    assert not score_batch(model, [prompt], [[*others, (*written[:-1], written[-1] + 1)]])[0].in_set


def test_scoring_leaves_half_precision_finite(decisions):
    model = random_phi3(READER, seed=0).eval()
    prompts, answers = scoring_input(decisions, READER)
    exact = [one.log_probabilities for one in score_answers(model, prompts, answers, 5)]
    for dtype, tolerance in ((torch.bfloat16, 0.5), (torch.float16, 0.1)):
        found = [one.log_probabilities for one in score_answers(model.to(dtype), prompts, answers, 5)]
        for row, expected in zip(found, exact, strict=True):
            assert row == pytest.approx(expected, abs=tolerance)
