"""The preflight: what it checks and says before a step is taken, and what it leaves to the memory."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import REAL_PHI3, SCRIPT, needs_real_phi3
from datasets import Dataset
from transformers import AutoConfig

from covered_call import tuning
from covered_call.language_model.loading import answer_tokens, encode, load_tokenizer
from covered_call.language_model.manifest import PolicyError
from covered_call.language_model.policy import check_fits
from covered_call.language_model.tiny_phi3 import train_tokenizer
from covered_call.training.examples import IGNORE
from covered_call.training.memory import Plan
from covered_call.training.preflight import ROLES, check_records, count_steps, memory_for
from covered_call.training.recipe import TrainingArguments
from covered_call.training.runs import RecipeError

from .conftest import difference, parse, trainer_of

READER = train_tokenizer(["Score: 3.2029, IV: n/a — SELL_CALL or SKIP"] * 3)


def test_a_dry_run_prints_the_preflight_and_trains_nothing(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tuning.run("sft", [*words, "--dry_run", "--use_cpu", "false", "--balance", "downsample"])
    text = capsys.readouterr().out
    assert re.search(r"^train +144 +48 +2024-09-01 2024-10-18 +25.0%  SKIP 108, SELL_CALL 36$", text, re.MULTILINE)
    assert re.search(
        r"^tokens +prompt at most \d+, 99 % up to \d+; answer at most \d; record at most \d+, and none is over",
        text,
        re.M,
    )
    assert "through <|end|>, on which alone each record's loss is; the pad token is <|pad|>" in text
    assert "an epoch takes 36 of 36 trades and 36 of 108 non-trades" in text
    assert re.search(r"^parameters 28,672 of [\d,]+ are trained$", text, re.MULTILINE)
    assert re.search(r"^memory .*estimated, not measured", text, re.MULTILINE)
    assert re.search(
        r"^evaluation about \d.\d GiB for the longest row .*, of \d+ tokens at most; .* that a card of 6 GB leaves$",
        text,
        re.MULTILINE,
    )
    assert re.search(
        r"^steps +3 of 32 records: 1.0 epochs; micro-batches of 32, all activations kept$", text, re.MULTILINE
    )
    assert not (tmp_path / "out").exists()


def test_a_record_longer_than_max_length_stops_the_run_with_its_name_and_the_length_it_needs(words):
    with pytest.raises(SystemExit) as stopped:
        tuning.train([*words, "--max_length", "100", "--dry_run"])
    found = re.match(
        r"error: Records longer than max_length 100: 144 of 144 in train, .* The first is BTC\|2024-09-01\S* with \d+ "
        r"tokens; its answer would be cut off. Set max_length to (\d+) or more.$",
        stopped.value.code,
    )
    assert found
    tuning.train([*words, "--max_length", found[1], "--dry_run"])
    with pytest.raises(SystemExit, match="Records longer than max_length"):
        tuning.train([*words, "--max_length", str(int(found[1]) - 1), "--dry_run"])


def test_max_length_beyond_the_models_context_is_refused(words):
    with pytest.raises(RecipeError, match="more than the 2048 tokens that the model sees at once"):
        tuning.run("sft", [*words, "--max_length", "4096", "--dry_run"])


def test_a_record_whose_loss_is_not_its_whole_answer_is_named():
    prompt, (*_, end) = encode(READER, [[{"role": role, "content": "x"} for role in ROLES]])[0]
    row = {"labels": [[IGNORE, 7]], "label": ["SKIP"], "decision_id": ["BTC|2024"], "task": ["per_candidate"]}
    row["input_ids"] = [[*prompt, 7, end]]
    with pytest.raises(RecipeError, match=r"train, BTC\|2024: .* tokens \(7,\), and the answer SKIP is \(7, 2\)"):
        check_records("train", Dataset.from_dict(row), {"SKIP": (7, 2)}, READER)
    row["labels"] = [[IGNORE, 7, 2]]
    totals, learnt = check_records("train", Dataset.from_dict(row), {"SKIP": (7, 2)}, READER)
    assert (totals.tolist(), learnt.tolist()) == ([3], [2])
    row["input_ids"] = [[*prompt, *prompt[:1], 7, end]]
    with pytest.raises(RecipeError, match=r"train, BTC\|2024: a name holds the text <\|system\|>,"):
        check_records("train", Dataset.from_dict(row), {"SKIP": (7, 2)}, READER)


@pytest.mark.parametrize("drop_last, steps", [(False, 4), (True, 3)])
def test_steps_are_counted_as_the_trainer_counts_them(words, monkeypatch, drop_last, steps):
    more = ["--max_steps", "-1", "--num_train_epochs", "2", "--per_device_train_batch_size", "40"]
    more += ["--gradient_accumulation_steps", "2", "--dataloader_drop_last", str(drop_last).lower()]
    trainer = trainer_of(monkeypatch, "sft", *words, *more)
    expected, epochs = count_steps(trainer.args, len(trainer.sampler))
    assert (expected, epochs) == (4, 2)
    trainer.train()
    assert trainer.state.global_step == expected


def test_too_few_records_for_a_batch_are_an_error(words):
    with pytest.raises(RecipeError, match="do not fill a batch"):
        tuning.run("sft", [*words, "--per_device_train_batch_size", "999", "--dataloader_drop_last", "true"])


# --- What a recipe leaves to the memory


def test_processes_plan_for_the_least_of_their_memories(words, monkeypatch):
    """Or they would accumulate differently, and wait for each other for ever."""
    arguments = parse(*words)[2]
    monkeypatch.setattr("covered_call.training.preflight.memory_there", lambda *_: 5.0)
    monkeypatch.setattr("covered_call.training.preflight.gather_object", lambda mine: [*mine, 3.0])
    assert memory_for(arguments, "int4") == 5.0
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    assert memory_for(arguments, "int4") == 3.0


def test_the_micro_batch_is_chosen_said_and_kept(words, tmp_path, capsys, monkeypatch):
    words += ["--per_device_train_batch_size", "auto", "--gradient_accumulation_steps", "12"]
    size = trainer_of(monkeypatch, "sft", *words).args.per_device_train_batch_size
    assert size > 1 and 12 % size == 0
    monkeypatch.setattr("covered_call.training.preflight.memory_there", lambda *_: 0.0)
    tuning.run("sft", [*words, "--dry_run", "--output_dir", str(tmp_path / "other")])
    assert re.search(r"^steps .* 3 of 12 records.*micro-batches of 1, ", capsys.readouterr().out, re.MULTILINE)
    tuning.run("sft", words)  # goes on as it was begun, though less memory is free now
    assert f"micro-batches of {size}, " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["micro_batch"] == size
    again = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (again["per_device_train_batch_size"], again["gradient_accumulation_steps"]) == (size, 12 // size)


def layers_of(trainer) -> list:
    return trainer.model.base_model.model.model.layers


@pytest.mark.parametrize("quantization, reentrant", [("int4", False), ("int8", True)])
@pytest.mark.parametrize("every, computed_twice", [(1, [True, True]), (2, [True, False])])
def test_checkpointing_is_of_the_kind_that_lets_go_and_of_as_many_layers_as_planned(
    words, monkeypatch, quantization, reentrant, every, computed_twice
):
    monkeypatch.setattr("covered_call.training.preflight.choose", lambda *_: Plan(8, every))
    trainer = trainer_of(
        monkeypatch, "sft", *words, "--quantization", quantization, "--gradient_checkpointing", "auto"
    )
    trainer.train()
    assert [layer.gradient_checkpointing for layer in layers_of(trainer)] == computed_twice
    assert layers_of(trainer)[0]._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant


@pytest.mark.parametrize("quantization", ["int4", "int8", "none"])
def test_checkpointing_changes_no_weight(words, monkeypatch, quantization):
    trained = []
    for name in ("true", "false"):
        more = ["--quantization", quantization, "--gradient_checkpointing", name, "--lora_dropout", "0.1"]
        trainer = trainer_of(monkeypatch, "sft", *words, *more, "--overwrite_output_dir")
        trainer.train()
        trained.append({key: one for key, one in trainer.model.named_parameters() if one.requires_grad})
    assert difference(*trained) == 0 and max(one.abs().max() for key, one in trained[0].items() if "lora_B" in key) > 0


# --- The real tokenizer


@pytest.fixture(scope="module")
def phi3():
    return load_tokenizer(str(REAL_PHI3))


@needs_real_phi3
def test_phi3s_answers_end_at_the_end_of_the_turn_and_are_told_apart(phi3):
    prompt = [{"role": "system", "content": "Decide."}, {"role": "user", "content": "Which?"}]
    answers = [*map(str, range(1, 41)), "NO_TRADE", "SELL_CALL", "SKIP"]
    tokens = answer_tokens(phi3, prompt, answers)
    for answer, ids in tokens.items():
        assert phi3.decode(ids).strip() == f"{answer}<|end|>"
        assert phi3.convert_ids_to_tokens(ids[-1]) == "<|end|>" and len(ids) <= 6
    assert phi3.pad_token != "<|end|>"


@needs_real_phi3
def test_phi3s_tokens_of_the_sample(phi3, load):
    """What the recipes' max_length and the memory's estimates rest on."""
    sample = str(SCRIPT.parent / "data" / "sample" / "*.csv")
    lengths = {}
    for name in ("per_candidate", "per_decision_ranking"):
        chats = list(load(name, data_files=sample, splits="train")["train"].select(range(0, 5_000, 5))["messages"])
        lengths[name] = np.array([len(prompt) + len(answer) for prompt, answer in encode(phi3, chats)])
    assert 268 < lengths["per_candidate"].mean() < 274 and lengths["per_candidate"].max() <= 277
    assert 390 < lengths["per_decision_ranking"].mean() < 430 and lengths["per_decision_ranking"].max() <= 794


@needs_real_phi3
@pytest.mark.parametrize("name", ["per_candidate", "ranking"])
@pytest.mark.parametrize("quantization, card", [("int4", "6 GB"), ("int8", "8 GB")])
def test_the_phi3_recipes_pass_their_preflight_on_the_real_tokenizer(
    name, quantization, card, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    paths = ["--model_name_or_path", str(REAL_PHI3), "--data_files", corpus, "--output_dir", str(tmp_path / "out")]
    tuning.run("sft", ["--config", name, "--dry_run", "--quantization", quantization, *paths])
    text = capsys.readouterr().out
    assert "25,165,824 of 3,846,245,376 are trained" in text
    assert "told apart by their tokens through <|end|>, on which alone" in text
    assert text.count(f"that a card of {card} leaves") == 2 and "has only" not in text


@needs_real_phi3
def test_training_and_deciding_know_one_limit_of_length(corpus, tmp_path):
    """Phi-3's window of 2,047 tokens, not its 4,096 positions."""
    paths = ["--model_name_or_path", str(REAL_PHI3), "--data_files", corpus, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(RecipeError, match="max_length 2048 is more than the 2047 tokens that the model sees"):
        tuning.run("sft", ["--config", "ranking", "--dry_run", "--max_length", "2048", *paths])
    with pytest.raises(PolicyError, match="has 2048 tokens, and the model sees 2047"):
        check_fits(AutoConfig.from_pretrained(REAL_PHI3), 2048)
