"""The tiny Phi-3: its chat format, its tokenizer, and the place where it stands."""

import warnings
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, Phi3Config

from covered_call import atomic
from covered_call.language_model import tiny_phi3
from covered_call.language_model.tiny_phi3 import build_tiny_base, made_tiny, tiny_base_path, train_tokenizer

READER = train_tokenizer(["Score: 3.2029, IV: n/a — SELL_CALL or SKIP"] * 3)


def test_the_chat_format_is_that_of_phi3(corpus_tokenizer):
    tokenizer = corpus_tokenizer
    chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    asked = "<|system|>\ns<|end|>\n<|user|>\nu<|end|>\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True) == asked
    assert tokenizer.apply_chat_template(chat, tokenize=False) == asked + "a<|end|>\n<|endoftext|>"
    for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>"))


@given(st.text())
def test_the_tokenizer_breaks_no_text(text):
    assert READER.decode(READER(text)["input_ids"], clean_up_tokenization_spaces=False) == text


@given(st.integers(0, 10**12))
def test_numbers_are_read_digit_by_digit(number):
    assert READER.tokenize(str(number)) == list(str(number))


def test_a_tiny_base_has_a_place_of_its_own_for_its_data(corpus, load, tmp_path):
    messages = load("per_candidate", data_files=corpus)["train"]["messages"]
    chats = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in messages]
    train = Dataset.from_list(chats)
    path = tiny_base_path(str(tmp_path / "tiny"), train, steps=2, seed=0)
    assert path == tiny_base_path(str(tmp_path / "tiny"), train, steps=2, seed=0)
    assert path != tiny_base_path(str(tmp_path / "tiny"), train.select(range(20)), steps=2, seed=0)
    assert path != tiny_base_path(str(tmp_path / "tiny"), train, steps=2, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of keys of our own
        build_tiny_base(path, train, steps=2, seed=0)
    assert AutoTokenizer.from_pretrained(path).chat_template
    assert made_tiny(AutoConfig.from_pretrained(path)) == {"steps": 2, "seed": 0}
    assert made_tiny(Phi3Config()) is None
    assert [found.name for found in tmp_path.glob("tiny*")] == [Path(path).name]


def test_a_tiny_base_that_another_run_builds_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tiny_phi3, "train_tiny_base", lambda *_: pytest.fail("it was built twice"))
    monkeypatch.setattr(tiny_phi3.time, "sleep", lambda _: (tmp_path / "tiny").mkdir())
    with atomic.locked(tmp_path / "tiny"):
        build_tiny_base(str(tmp_path / "tiny"), Dataset.from_list([]), steps=2, seed=0)
    assert caplog.text.count("Waiting for another run to build the tiny Phi-3") == 1
