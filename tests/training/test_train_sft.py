"""Recipes, the preflight, fine-tuning, resuming and what is saved, on the CPU."""

import errno
import json
import logging
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import (
    REAL_DATA,
    REAL_PHI3,
    SCRIPT,
    decision,
    needs_real_data,
    needs_real_phi3,
    no_candidates,
    python,
    unasked,
    write_csv,
)
from datasets import Dataset
from hub_standin import READER as READER_TOKEN
from hub_standin import WRITER as WRITER_TOKEN
from hub_standin import Hub
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_policy import FAMILIES
from transformers import AutoConfig, AutoTokenizer, TrainerControl, TrainerState

from covered_call import atomic
from covered_call.candidates.schema import CandidatesError
from covered_call.language_model import loading, tiny_phi3
from covered_call.language_model.loading import answer_tokens, encode, load_tokenizer, load_tuned
from covered_call.language_model.manifest import PolicyError, read_manifest
from covered_call.language_model.policy import check_fits
from covered_call.language_model.scoring import MemoryFull, Scored
from covered_call.language_model.tiny_phi3 import build_tiny_base, random_phi3, tiny_base_path, train_tokenizer
from covered_call.training import card as run_card
from covered_call.training import first_checks, runs
from covered_call import tuning
from covered_call.training import sft as train_sft
from covered_call.training.examples import (
    IGNORE,
    ROLES,
    EpochSampler,
    check_model,
    check_records,
    load_epochs,
    load_splits,
    thin_out,
)
from covered_call.training.memory import Plan
from covered_call.training.preflight import count_steps, memory_for
from covered_call.training.recipe import SFT, DataArguments, TrainingArguments, parse_recipe
from covered_call.training.runs import RecipeError, open_run
from covered_call.training.trainers import (
    AnswerTrainer,
    ScoringTrainer,
    StopOnTrouble,
    TrainingStopped,
    answer_metrics,
    load_model,
)

RECIPES = list(SFT.recipes)
# What a user types, made quick: few steps, nothing logged, no checkpoints.
QUICK = [
    "--tiny_base_steps",
    "4",
    "--max_steps",
    "3",
    "--balance",
    "none",
    "--logging_steps",
    "1",
    "--report_to",
    "none",
]
NO_CHECKPOINTS = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]


@pytest.fixture
def csv_file(tmp_path) -> str:
    rows = [row for day in range(60) for row in decision(day, sold=day % 3 if day % 4 else None, dte=1.0)]
    return write_csv(tmp_path / "candidates.csv", [*rows, no_candidates(60)])


@pytest.fixture
def splits(csv_file, load):
    return load("per_candidate", data_files=csv_file)


@pytest.fixture
def ranking(csv_file, load):
    return load("per_decision_ranking", data_files=csv_file)


@pytest.fixture
def tokenizer(splits, ranking):
    return train_tokenizer(m["content"] for s in (splits, ranking) for chat in s["train"]["messages"] for m in chat)


@pytest.fixture
def base(tokenizer, tmp_path) -> Path:
    """The folder of a tiny random Phi-3."""
    random_phi3(tokenizer, seed=0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def words(base, csv_file, tmp_path) -> list[str]:
    """The command line of a quick run on the random base."""
    paths = ["--model_name_or_path", str(base), "--data_files", csv_file, "--output_dir", str(tmp_path / "out")]
    return ["--config", "tiny", *QUICK, *NO_CHECKPOINTS, *paths]


def parse(*arguments):
    return parse_recipe(list(map(str, arguments)))[:3]


def recipe(path: Path, **changes) -> Path:
    """The tiny recipe with some keys changed, as a file of its own."""
    keys = yaml.safe_load((first_checks.RECIPES / "tiny.yaml").read_text())
    path.write_text(yaml.safe_dump(keys | changes))
    return path


def trainer_of(words, monkeypatch, *more) -> AnswerTrainer:
    """The trainer as main makes it, not yet trained."""
    made = []
    monkeypatch.setattr(AnswerTrainer, "train", lambda self, **_: made.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        tuning.run("sft", [*words, *more])
    monkeypatch.undo()
    return made[0]


def adapter(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


# --- Recipes


def test_the_recipes_that_the_readme_names_are_there():
    assert RECIPES == ["per_candidate", "ranking", "tiny"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_keeps_the_best_checkpoint(name):
    model, data, training = parse("--config", name, "--use_cpu", "true", "--bf16", "false")
    assert training.output_dir == f"out/{name}"
    assert data.dataset_config == {"ranking": "per_decision_ranking"}.get(name, "per_candidate")
    assert model.quantization == "int4"
    assert training.load_best_model_at_end and training.metric_for_best_model == "balanced_accuracy"
    assert training.save_steps % training.eval_steps == 0


@pytest.mark.parametrize("key, value", [("packing", "true"), ("completion_only_loss", "false"), ("pad_token", "x")])
def test_a_key_that_would_break_a_promise_is_refused_with_the_reason(key, value):
    with pytest.raises(RecipeError, match=f"{key}: .* cannot be set: .*Remove it"):
        parse("--config", "tiny", f"--{key}", value)


def test_a_word_that_belongs_to_no_key_is_named():
    with pytest.raises(RecipeError, match="'runs/b.csv' belongs to no key"):
        parse("--config", "tiny", "--max_steps", "3", "runs/b.csv")


@pytest.mark.parametrize("share", ["nan", "inf", "-0.1", "1"])
def test_a_dropout_that_is_no_share_is_refused(share):
    with pytest.raises(RecipeError, match="lora_dropout: .* is no share"):
        parse("--config", "tiny", "--lora_dropout", share)


def test_a_balance_that_is_none_of_three_is_refused():
    with pytest.raises(RecipeError, match="'up' is none of none, downsample, weight"):
        DataArguments("per_candidate", balance="up")


def test_a_gpu_without_bfloat16_gets_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(train_sft.SFTConfig, "__post_init__", lambda self: setattr(self, "_n_gpu", 1))
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    arguments = TrainingArguments(bf16=True)
    assert (arguments.bf16, arguments.fp16) == (False, True)
    assert loading.half_precision() == torch.float16  # what a policy is loaded in


def test_one_of_several_gpus_is_used_unless_launched_and_that_is_said(monkeypatch, caplog):
    """Transformers would spread each batch over them: twice the micro-batch, and one of the stacks dies of it."""
    monkeypatch.setattr(train_sft.SFTConfig, "__post_init__", lambda self: setattr(self, "_n_gpu", 2))
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    arguments = TrainingArguments(use_cpu=True, per_device_train_batch_size="4")
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)
    assert "There are 2 GPUs here, and this run uses one. For all: accelerate launch" in caplog.text


def test_the_command_line_wins_over_the_recipe_and_takes_hyphens():
    _, data, training = parse(
        "--config", "tiny", "--learning-rate", "0.5", "--data_files", "a.csv", "b.csv", "--max_steps=7"
    )
    assert (training.learning_rate, data.data_files, training.max_steps) == (0.5, ["a.csv", "b.csv"], 7)


def test_a_recipe_is_found_by_path_too(tmp_path):
    path = recipe(tmp_path / "mine.yaml", lora_r=2, learning_rate="1e-4", validation_from="2024-01-01")
    model, data, training = parse(f"--config={path}")
    assert (model.lora_r, training.learning_rate, data.validation_from) == (2, 1e-4, "2024-01-01")


def test_an_unknown_key_in_a_recipe_names_the_nearest(tmp_path):
    path = recipe(tmp_path / "mine.yaml", lerning_rate=1.0)
    with pytest.raises(RecipeError, match=r"lerning_rate, in .*mine\.yaml.*Did you mean learning_rate\?"):
        parse("--config", path)


@pytest.mark.parametrize("words", [["--lora_alfa", "4"], ["--lora-alfa=4"]])
def test_an_unknown_key_on_the_command_line_names_the_nearest(words):
    with pytest.raises(RecipeError, match=r"lora_alfa, in the command line.*Did you mean lora_alpha\?"):
        parse("--config", "tiny", *words)


def test_an_abbreviated_key_is_unknown_rather_than_guessed():
    with pytest.raises(RecipeError, match="learning_r, .*Did you mean learning_rate"):
        parse("--config", "tiny", "--learning_r", "1")


@pytest.mark.parametrize("words", [[], ["--config", "tinny"]])
def test_a_missing_recipe_names_those_there_are(words):
    with pytest.raises(RecipeError, match="per_candidate, ranking, tiny"):
        parse(*words)


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- tiny\n")
    with pytest.raises(RecipeError, match="holds no keys"):
        parse("--config", path)


def test_a_quantization_that_is_none_of_three_is_refused_in_a_recipe(tmp_path):
    with pytest.raises(RecipeError, match="'int5' is none of int4, int8, none"):
        parse("--config", recipe(tmp_path / "mine.yaml", quantization="int5"))


def test_all_weights_cannot_be_trained_where_they_are_quantised():
    with pytest.raises(RecipeError, match="lora_r: 0"):
        parse("--config", "tiny", "--lora_r", "0")


@pytest.mark.parametrize("name", ["per_candidate", "ranking"])
def test_a_phi3_recipe_stops_at_once_without_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="needs a CUDA GPU.*--config tiny"):
        parse("--config", name)


def test_a_model_that_cannot_be_had_is_named_with_what_to_do():
    model, _, _ = parse("--config", "ranking", "--use_cpu", "true", "--bf16", "false")
    with pytest.raises(RecipeError, match="microsoft/Phi-3-mini-4k-instruct.*hf download.*FOLDER"):
        check_model(model)


def test_an_error_is_one_line_and_a_bad_exit(tmp_path):
    done = python(SCRIPT.parent / "train_sft.py", "--config", "tiny", "--data_files", "none/*.csv", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: No file matches")
    assert "Traceback" not in done.stderr


# --- Records


def options(path, name="per_candidate", **changes) -> tuple:
    return DataArguments(name, **changes), [path], 0


def test_a_validation_split_must_have_records(tmp_path):
    path = write_csv(tmp_path / "a.csv", decision(0, sold=1))
    with pytest.raises(RecipeError, match="validation split is empty"):
        load_splits(*options(path))


def test_a_dataset_config_that_there_is_not_is_named_with_those_there_are(csv_file):
    with pytest.raises(CandidatesError, match="'ranking' is no config: choose one of per_candidate, per_decision_"):
        load_splits(*options(csv_file, "ranking"))


def test_scoring_can_be_limited_to_evenly_spaced_records():
    split = Dataset.from_dict({"n": list(range(100))})
    assert thin_out(split, 5)["n"] == [0, 20, 40, 60, 80]
    assert thin_out(split, None) is split and thin_out(split, 100) is split


def shown(split) -> list[list[str]]:
    """The instruments of each prompt, in the order they stand there."""
    return [re.findall(r"\[\d+\] (\S+)", messages[1]["content"]) for messages in split["messages"]]


def test_a_shuffle_is_another_one_each_epoch_and_spares_validation(csv_file):
    data, files, seed = options(csv_file, "per_decision_ranking", candidate_order="shuffle")
    splits = load_splits(data, files, seed)
    epochs = shown(load_epochs(data, files, seed, copies=3))
    size = len(splits["train"])
    first, second, third = (epochs[i : i + size] for i in (0, size, 2 * size))
    assert first != second and second != third
    assert [sorted(names) for names in first] == [sorted(names) for names in second] == shown(splits["train"])
    assert epochs == shown(load_epochs(data, files, seed, copies=3))
    assert all(names == sorted(names) for names in shown(splits["validation"]))


@given(st.lists(st.booleans(), min_size=1), st.integers(0, 9), st.integers(0, 9))
def test_an_epoch_takes_each_record_once_in_an_order_of_its_own(trades, seed, epoch):
    sampler = EpochSampler(trades, "none", seed)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(trades))) and len(sampler) == len(trades)
    again = EpochSampler(trades, "none", seed)
    again.set_epoch(epoch)
    assert list(sampler) == list(again)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5), st.integers(1, 3))
def test_downsampling_takes_as_many_of_either_kind_from_the_epochs_own_copy(trades, others, epoch, copies):
    sampler = EpochSampler([True] * trades + [False] * others, "downsample", seed=0)
    sampler.copies = copies
    sampler.set_epoch(epoch)
    start = epoch % copies * (trades + others)
    taken = [index - start for index in sampler]
    assert len(set(taken)) == len(taken) == len(sampler) == 2 * min(trades, others)
    assert sum(index < trades for index in taken) == min(trades, others)
    assert 0 <= min(taken) and max(taken) < trades + others


def test_downsampling_lets_other_records_have_their_turn():
    sampler = EpochSampler([True] * 5 + [False] * 100, "downsample", seed=0)
    seen = set()
    for epoch in range(10):
        sampler.set_epoch(epoch)
        seen |= set(sampler)
    assert len(seen) > 40


LENGTHS = st.lists(st.integers(1, 900), min_size=1, max_size=90)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
def test_records_of_like_length_come_together_each_once_by_a_law_of_seed_and_epoch(lengths, step, seed, epoch):
    def order() -> list[int]:
        sampler = EpochSampler([True] * len(lengths), "none", seed)
        sampler.group(np.array(lengths), step)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order()) == list(range(len(lengths))) and order() == order()


def padding(order: list[int], lengths: np.ndarray, micro_batch: int) -> float:
    """The share of the tokens read that is padding."""
    batches = lengths[np.array(order)].reshape(-1, micro_batch)
    return 1 - batches.sum() / (batches.max(1).sum() * micro_batch)


@pytest.mark.parametrize("micro_batch, before", [(2, 0.1), (8, 0.3)])
def test_grouping_leaves_next_to_no_padding(micro_batch, before):
    lengths = np.random.default_rng(0).choice(np.arange(220, 860, 64), 2_048)
    sampler = EpochSampler([True] * len(lengths), "none", 0)
    assert padding(list(sampler), lengths, micro_batch) > before
    sampler.group(lengths, 16)
    assert padding(list(sampler), lengths, micro_batch) < 0.02


def test_grouping_mixes_lengths_within_an_epoch_and_changes_with_it():
    lengths = np.arange(1_000)
    sampler = EpochSampler([True] * 1_000, "none", 0)
    sampler.group(lengths, 16)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    steps = lengths[np.array(first[:992])].reshape(-1, 16).mean(1)
    assert abs(np.corrcoef(np.arange(62), steps)[0, 1]) < 0.3
    assert all(np.diff(lengths[np.array(first[i : i + 16])]).min() >= 0 for i in range(0, 992, 16))


def test_weights_give_both_kinds_the_same_share():
    sampler = EpochSampler([True] * 20 + [False] * 80, "weight", seed=0)
    trade, other = sampler.weights()
    assert 20 * trade == pytest.approx(80 * other) == pytest.approx(50)
    assert EpochSampler([True] * 20 + [False] * 80, "none", seed=0).weights() == [1.0, 1.0]


def test_a_split_without_trades_cannot_be_balanced():
    with pytest.raises(RecipeError, match="needs both trades and non-trades"):
        EpochSampler([False, False], "downsample", seed=0)


# --- Preflight


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


def test_a_record_longer_than_max_length_stops_the_run_with_its_name_and_the_length_it_needs(words, tmp_path):
    script = SCRIPT.parent / "train_sft.py"
    done = python(script, *words, "--max_length", 100, "--dry_run", cwd=tmp_path)
    error = done.stderr.splitlines()[-1]
    found = re.match(
        r"error: Records longer than max_length 100: 144 of 144 in train, .* The first is BTC\|2024-09-01\S* with \d+ "
        r"tokens; its answer would be cut off. Set max_length to (\d+) or more.$",
        error,
    )
    assert found and done.returncode == 1
    assert python(script, *words, "--max_length", found[1], "--dry_run", cwd=tmp_path).returncode == 0
    assert python(script, *words, "--max_length", int(found[1]) - 1, "--dry_run", cwd=tmp_path).returncode == 1


def test_max_length_beyond_the_models_context_is_refused(words):
    with pytest.raises(RecipeError, match="more than the 2048 tokens that the model sees at once"):
        tuning.run("sft", [*words, "--max_length", "4096", "--dry_run"])


def test_a_record_whose_loss_is_not_its_whole_answer_is_named():
    prompt, (*_, end) = encode(READER, [[{"role": role, "content": "x"} for role in ROLES]])[0]
    row = {"labels": [[IGNORE, 7]], "label": ["SKIP"], "decision_id": ["BTC|2024"]}
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
    trainer = trainer_of(words, monkeypatch, *more)
    expected, epochs = count_steps(trainer.args, len(trainer.sampler))
    assert (expected, epochs) == (4, 2)
    trainer.train()
    assert trainer.state.global_step == expected


def test_too_few_records_for_a_batch_are_an_error(words):
    with pytest.raises(RecipeError, match="do not fill a batch"):
        tuning.run("sft", [*words, "--per_device_train_batch_size", "999", "--dataloader_drop_last", "true"])


# --- What a recipe leaves to the memory


def test_a_step_takes_the_same_records_whatever_the_micro_batch():
    arguments = parse("--config", "ranking", "--use_cpu", "true", "--bf16", "false")[2]
    assert (arguments.open_keys, arguments.records) == ({"per_device_train_batch_size", "gradient_checkpointing"}, 16)
    for plan in (Plan(4, 1), Plan(8, 0)):
        arguments.settle(plan, "int4")
        assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (
            plan.micro_batch,
            16 // plan.micro_batch,
        )
        assert arguments.activation_checkpointing is bool(plan.checkpoint_every)
    given = parse("--config", "ranking", "--use_cpu", "true", "--per_device_train_batch_size", "2")[2]
    assert (given.open_keys, given.records) == ({"gradient_checkpointing"}, 32)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("per_device_train_batch_size", "0", "'0' is neither a number from 1 nor auto"),
        ("per_device_train_batch_size", "many", "'many' is neither"),
        ("gradient_checkpointing", "2", "'2' is none of true, false, auto"),
        ("per_device_eval_batch_size", "4", "cannot be set: answers are scored by tokens.*batch_tokens"),
    ],
)
def test_a_batch_that_is_none_is_refused(key, value, message):
    with pytest.raises(RecipeError, match=f"{key}: .*{message}"):
        parse("--config", "tiny", f"--{key}", value)


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
    size = trainer_of(words, monkeypatch).args.per_device_train_batch_size
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
    trainer = trainer_of(words, monkeypatch, "--quantization", quantization, "--gradient_checkpointing", "auto")
    trainer.train()
    assert [layer.gradient_checkpointing for layer in layers_of(trainer)] == computed_twice
    assert layers_of(trainer)[0]._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant


@pytest.mark.parametrize("quantization", ["int4", "int8", "none"])
def test_checkpointing_changes_no_weight(words, tmp_path, quantization):
    for name in ("true", "false"):
        tuning.run("sft", 
            [*words, "--quantization", quantization, "--gradient_checkpointing", name, "--lora_dropout", "0.1"]
            + ["--output_dir", str(tmp_path / name)]
        )
    assert difference(adapter(tmp_path / "true"), adapter(tmp_path / "false")) == 0


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
    name, quantization, card, csv_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    paths = ["--model_name_or_path", str(REAL_PHI3), "--data_files", csv_file, "--output_dir", str(tmp_path / "out")]
    tuning.run("sft", ["--config", name, "--dry_run", "--quantization", quantization, *paths])
    text = capsys.readouterr().out
    assert "25,165,824 of 3,846,245,376 are trained" in text
    assert "told apart by their tokens through <|end|>, on which alone" in text
    assert text.count(f"that a card of {card} leaves") == 2 and "has only" not in text


@needs_real_phi3
def test_training_and_deciding_know_one_limit_of_length(csv_file, tmp_path):
    """Phi-3's window of 2,047 tokens, not its 4,096 positions."""
    paths = ["--model_name_or_path", str(REAL_PHI3), "--data_files", csv_file, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(RecipeError, match="max_length 2048 is more than the 2047 tokens that the model sees"):
        tuning.run("sft", ["--config", "ranking", "--dry_run", "--max_length", "2048", *paths])
    with pytest.raises(PolicyError, match="has 2048 tokens, and the model sees 2047"):
        check_fits(AutoConfig.from_pretrained(REAL_PHI3), 2048)


# --- The tiny Phi-3


def test_the_chat_format_is_that_of_phi3(tokenizer):
    chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    asked = "<|system|>\ns<|end|>\n<|user|>\nu<|end|>\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True) == asked
    assert tokenizer.apply_chat_template(chat, tokenize=False) == asked + "a<|end|>\n<|endoftext|>"
    for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>"))


READER = train_tokenizer(["Score: 3.2029, IV: n/a — SELL_CALL or SKIP"] * 3)


@given(st.text())
def test_the_tokenizer_breaks_no_text(text):
    assert READER.decode(READER(text)["input_ids"], clean_up_tokenization_spaces=False) == text


@given(st.integers(0, 10**12))
def test_numbers_are_read_digit_by_digit(number):
    assert READER.tokenize(str(number)) == list(str(number))


def test_a_tiny_base_has_a_place_of_its_own_for_its_data(splits, tmp_path):
    chats = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in splits["train"]["messages"]]
    train = Dataset.from_list(chats)
    path = tiny_base_path(str(tmp_path / "tiny"), train, steps=2, seed=0)
    assert path == tiny_base_path(str(tmp_path / "tiny"), train, steps=2, seed=0)
    assert path != tiny_base_path(str(tmp_path / "tiny"), train.select(range(20)), steps=2, seed=0)
    assert path != tiny_base_path(str(tmp_path / "tiny"), train, steps=2, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of keys of our own
        build_tiny_base(path, train, steps=2, seed=0)
    assert AutoTokenizer.from_pretrained(path).chat_template
    assert [found.name for found in tmp_path.glob("tiny*")] == [Path(path).name]


def test_a_tiny_base_is_built_once(words, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(
        train_sft, "build_tiny_base", lambda path, *_: built.append(path) or shutil.copytree(base, path)
    )
    base = words[words.index("--model_name_or_path") + 1]
    words[words.index(base)] = str(tmp_path / "tiny")
    tuning.run("sft", [*words, "--dry_run"])
    tuning.run("sft", [*words, "--dry_run"])
    assert len(built) == 1


def test_a_tiny_base_that_another_run_builds_is_waited_for(splits, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tiny_phi3, "train_tiny_base", lambda *_: pytest.fail("it was built twice"))
    monkeypatch.setattr(tiny_phi3.time, "sleep", lambda _: (tmp_path / "tiny").mkdir())
    with atomic.locked(tmp_path / "tiny"):
        build_tiny_base(str(tmp_path / "tiny"), splits["train"], steps=2, seed=0)
    assert caplog.text.count("Waiting for another run to build the tiny Phi-3") == 1


# --- Training


@pytest.mark.parametrize(
    "quantization, layer", [("int4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt), ("none", torch.nn.Linear)]
)
def test_the_base_is_quantised_as_asked_and_the_adapter_is_float32(words, monkeypatch, quantization, layer):
    trainer = trainer_of(words, monkeypatch, "--quantization", quantization)
    attention = trainer.model.base_model.model.model.layers[0].self_attn
    assert isinstance(attention.qkv_proj.base_layer, layer)
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    linear = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained}
    assert linear == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def batch_of(trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("name", ["per_candidate", "per_decision_ranking"])
def test_only_the_answer_and_its_end_carry_loss(words, monkeypatch, name):
    trainer = trainer_of(words, monkeypatch, "--dataset_config", name)
    for labels in batch_of(trainer)["labels"]:
        learnt = trainer.processing_class.decode(labels[labels != IGNORE])
        assert re.fullmatch(r"(SELL_CALL|SKIP|NO_TRADE|\d)<\|end\|>", learnt)


@pytest.mark.parametrize("balance", ["none", "weight"])
def test_the_loss_is_that_of_full_logits(words, monkeypatch, balance):
    trainer = trainer_of(words, monkeypatch, "--balance", balance)
    batch = batch_of(trainer)
    logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    by_token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    traded = ["SELL" in trainer.processing_class.decode(row[row >= 0]) for row in targets]
    trade, other = (144 / 72, 144 / 216) if balance == "weight" else (1, 1)
    weights = torch.tensor([trade if sold else other for sold in traded])
    expected = (by_token * weights[:, None]).sum() / (targets >= 0).sum()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_neither_padding_nor_another_record_changes_a_records_loss(words, monkeypatch):
    trainer = trainer_of(words, monkeypatch, "--dataset_config", "per_decision_ranking")
    rows = sorted(trainer.train_dataset, key=lambda row: len(row["input_ids"]))
    pair = [{key: rows[i][key] for key in ("input_ids", "labels")} for i in (0, -1)]
    pair[0]["input_ids"] = pair[0]["input_ids"][20:]  # make one clearly shorter than the other
    pair[0]["labels"] = pair[0]["labels"][20:]
    collate, count = trainer.data_collator, [sum(t >= 0 for t in row["labels"]) for row in pair]
    together = trainer.compute_loss(trainer.model, collate(pair)).item() * sum(count)
    alone = [
        trainer.compute_loss(trainer.model, collate([row])).item() * n for row, n in zip(pair, count, strict=True)
    ]
    assert together == pytest.approx(sum(alone), abs=1e-4)


def test_accumulated_batches_count_every_answer_token_once(words, monkeypatch):
    """Two batches of 8 give the gradient of one of 16, though their answers differ in length."""
    gradients = []
    for size, accumulate in ((16, 1), (8, 2)):
        more = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(accumulate)]
        trainer = trainer_of(
            words, monkeypatch, *more, "--max_steps", "1", "--learning_rate", "0", "--max_grad_norm", "0"
        )
        monkeypatch.setattr(
            StopOnTrouble,
            "on_pre_optimizer_step",
            lambda self, args, state, control, model=None, **_: gradients.append(
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            ),
        )
        trainer.train()
        monkeypatch.undo()
        shutil.rmtree(trainer.args.output_dir)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-4


def test_a_loss_that_is_not_a_number_stops_the_run(words, monkeypatch, tmp_path):
    original = AnswerTrainer.compute_loss
    monkeypatch.setattr(AnswerTrainer, "compute_loss", lambda *a, **k: original(*a, **k) * math.nan)
    with pytest.raises(TrainingStopped, match="loss is nan at step 1. Lower learning_rate"):
        tuning.run("sft", words)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["finished"] is None


def test_a_gradient_that_stays_zero_stops_the_run(words, monkeypatch):
    original = AnswerTrainer.compute_loss
    monkeypatch.setattr(AnswerTrainer, "compute_loss", lambda *a, **k: original(*a, **k) * 0.0)
    with pytest.raises(TrainingStopped, match="zero for 20 steps, up to step 20"):
        tuning.run("sft", [*words, "--max_steps", "30"])


def test_only_zero_gradients_in_a_row_count():
    model, watch = torch.nn.Linear(1, 1), StopOnTrouble()

    def step(gradient: float) -> None:
        model.weight.grad = torch.full((1, 1), gradient)
        watch.on_pre_optimizer_step(None, TrainerState(), None, model=model)

    for gradient in [0.0] * 19 + [0.5] + [0.0] * 19:
        step(gradient)
    with pytest.raises(TrainingStopped, match="zero for 20 steps"):
        step(0.0)


def test_answers_that_collapse_onto_one_class_stop_the_run(words):
    often = ["--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "9", "--learning_rate", "0"]
    with pytest.raises(TrainingStopped, match="last 4 evaluations, up to step 4, every answer was the same"):
        tuning.run("sft", [*words, *often])


@pytest.mark.parametrize("patience, used", [(0, [1, 1, 1, 1, 1]), (3, [1, 1, 2, 1, 1]), (3, [1, 1])])
def test_a_collapse_must_last_as_long_as_the_patience(patience, used):
    state = TrainerState(log_history=[{"eval_answers_used": n} for n in used])
    arguments = type("Arguments", (), {"collapse_patience": patience})
    StopOnTrouble().on_evaluate(arguments, state, TrainerControl())


# --- Evaluation


def test_metrics_of_hand_made_scores():
    three, four = ["1", "2", "NO_TRADE"], ["1", "2", "3", "NO_TRADE"]
    split = Dataset.from_dict(
        {"label": ["1", "NO_TRADE", "NO_TRADE", "2", "NO_TRADE"], "answers": [three, three, three, four, three]}
    )
    half = math.log(0.5)
    scored = [
        Scored([half, 2 * half, 2 * half], True),  # 1: met
        Scored([2 * half, half, 2 * half], True),  # 2: a trade where the teacher made none
        Scored([-9.0, -9.0, -1.0], False),  # NO_TRADE: met
        Scored([half, 2 * half, -99.0, -99.0], True),  # 1 instead of 2
        Scored([2 * half, 2 * half, half], True),  # NO_TRADE: met
    ]
    found = answer_metrics(split, scored)
    assert found["accuracy"] == 0.6
    assert found["balanced_accuracy"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert (found["trade_rate"], found["outside"], found["answers_used"]) == (0.6, 0.2, 3)
    likely = [0.5, 0.25, 1 / (1 + 2 * math.exp(-8)), 1 / 3, 0.5]
    assert found["loss"] == pytest.approx(-np.mean(np.log(likely)), abs=1e-6)


def test_evaluation_while_training_goes_to_the_log_the_plot_and_tensorboard(words, tmp_path):
    often = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    tuning.run("sft", [*words, *often, "--load_best_model_at_end", "true", "--report_to", "tensorboard"])
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    evaluated = [entry for entry in state["log_history"] if "eval_balanced_accuracy" in entry]
    assert [entry["step"] for entry in evaluated] == [1, 2, 3]
    names = {"eval_loss", "eval_accuracy", "eval_balanced_accuracy", "eval_trade_rate", "eval_outside"}
    assert all(names <= entry.keys() for entry in evaluated)
    best = max(evaluated, key=lambda entry: entry["eval_balanced_accuracy"])
    assert state["best_metric"] == best["eval_balanced_accuracy"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["best_step"] == best["step"] == state["best_global_step"]
    kept = adapter(tmp_path / "out" / f"checkpoint-{best['step']}")
    assert difference(adapter(tmp_path / "out"), kept) == 0
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "out").glob("runs/*/events.out.tfevents*"))


# --- Resuming and saving


RESUMED = ["--max_steps", "12", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"]
RESUMED += ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
RESUMED += ["--lora_dropout", "0.2", "--balance", "downsample", "--candidate_order", "shuffle"]
RESUMED += ["--dataset_config", "per_decision_ranking", "--collapse_patience", "0", "--save_total_limit", "9"]


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_weights(words, tmp_path):
    """Killed twice, in the first and in a later epoch, with dropout, accumulation and an order a law of the epoch."""
    script, folder = SCRIPT.parent / "train_sft.py", tmp_path / "out"
    command = [sys.executable, str(script), *words, *RESUMED]
    for checkpoint in ("checkpoint-2", "checkpoint-8"):
        run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (folder / checkpoint / "adapter_model.safetensors").exists():
            assert run.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (folder / "adapter_model.safetensors").exists()
    done = python(script, *words, *RESUMED, cwd=tmp_path)
    assert "Going on from" in done.stderr and done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    assert python(script, *words, *RESUMED, "--output_dir", whole, cwd=tmp_path).returncode == 0
    assert difference(adapter(folder), adapter(whole)) == 0
    assert difference(adapter(folder / "checkpoint-2"), adapter(folder)) > 1e-4
    tables = [json.loads((path / "manifest.json").read_text())["results"] for path in (folder, whole)]
    assert tables[0] == tables[1]


OFTEN = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
OFTEN += ["--load_best_model_at_end", "true", "--learning_rate", "0.01"]


def test_a_run_killed_after_its_last_step_takes_no_other_and_saves_its_best_model(words, tmp_path, monkeypatch):
    """Killed while it saved, moved since, and of three steps the first was the best."""
    folder, moved = tmp_path / "out", tmp_path / "moved"
    with monkeypatch.context() as killed:
        renames = iter(["of the manifest", "of the first file"])
        killed.setattr(train_sft.os, "replace", lambda old, new: next(renames) and shutil.move(old, new))
        with pytest.raises((StopIteration, RuntimeError)):
            tuning.run("sft", [*words, *OFTEN])
    assert (folder / "unfinished").is_dir()
    state = folder / "checkpoint-3" / "trainer_state.json"
    best = {"best_global_step": 1, "best_model_checkpoint": str(folder / "checkpoint-1")}
    state.write_text(json.dumps(json.loads(state.read_text()) | best))
    folder.rename(moved)
    monkeypatch.setattr(AnswerTrainer, "training_step", lambda *_: pytest.fail("a fourth step"))
    tuning.run("sft", [*words, *OFTEN, "--output_dir", str(moved)])
    assert not (moved / "unfinished").exists() and not (moved / "checkpoint-4").exists()
    manifest = read_manifest(moved)
    assert (manifest["steps"], manifest["best_step"]) == (3, 1)
    assert difference(adapter(moved), adapter(moved / "checkpoint-1")) == 0
    assert difference(adapter(moved), adapter(moved / "checkpoint-3")) > 1e-4


def test_a_folder_that_another_run_writes_is_refused_before_anything_is_read(words, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "find_csvs", lambda *_: pytest.fail("it went on"))
    with atomic.locked(tmp_path / "out"), pytest.raises(SystemExit, match="error: .*out is being written by process"):
        train_sft.run(lambda: tuning.run("sft", words))


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_st'), (11, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert runs.last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]


def begun(tmp_path, **changes) -> dict:
    manifest = {"prompt_version": "1", "recipe": {"learning_rate": 0.1}, "versions": {"trl": "1"}, "finished": None}
    open_run(tmp_path / "out", manifest, overwrite=False)
    return manifest | changes


def test_a_run_that_was_begun_is_gone_on_with(tmp_path):
    manifest = begun(tmp_path)
    assert open_run(tmp_path / "out", manifest, overwrite=False) is None
    (tmp_path / "out" / "checkpoint-5").mkdir()
    (tmp_path / "out" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    assert open_run(tmp_path / "out", manifest, overwrite=False).name == "checkpoint-5"
    assert open_run(tmp_path / "out", manifest, overwrite=True) is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_another_run_in_the_same_folder_is_refused_with_what_differs(tmp_path):
    manifest = begun(tmp_path, recipe={"learning_rate": 0.2})
    with pytest.raises(RecipeError, match=r"another run .*\(recipe.learning_rate: 0.1, now 0.2\).*same command"):
        open_run(tmp_path / "out", manifest, overwrite=False)


def test_a_data_file_that_changes_while_a_run_reads_it_stops_the_run(words, csv_file, tmp_path, monkeypatch):
    def meanwhile(*_) -> str:
        with open(csv_file, "a") as file:
            file.write("\n")
        return ""

    monkeypatch.setattr(train_sft, "preflight", meanwhile)
    with pytest.raises(RecipeError, match=f"{csv_file} has changed since this run began to read it"):
        tuning.run("sft", words)
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_overwritten_without_the_flag(words, tmp_path):
    tuning.run("sft", words)
    before = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(RecipeError, match="holds a run that finished on .*--overwrite_output_dir"):
        tuning.run("sft", words)
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == before
    tuning.run("sft", [*words, "--overwrite_output_dir"])
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "error: out/x: No space left on device. Is the "),
        (CandidatesError('Give duplicates="latest".'), "^error: Give --duplicates latest."),  # as it is typed
    ],
)
def test_trouble_ends_in_one_line_of_the_command_lines_words(error, message):
    def command():
        raise error

    with pytest.raises(SystemExit, match=message):
        train_sft.run(command)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        train_sft.run(lambda: 1 / 0)


def test_each_panel_of_the_plot_asks_one_question_in_one_unit(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(run_card.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 0.5, "eval_accuracy": 0.9, "eval_trade_rate": 0.9}]
    for log in (history, history[:1], []):
        run_card.plot_course(log, 2, tmp_path / "training.png")
    labels = [[axis.get_ylabel().split("\n")[0] for axis in figure.axes] for figure in figures]
    assert labels == [["training loss", "validation loss", "share of the records"], *[["training loss"]] * 2]
    assert all(axis.get_title("left").endswith("?") for figure in figures for axis in figure.axes)
    shown = [[line.get_label() for line in axis.lines] for axis in figures[0].axes]
    assert [len(lines) for lines in shown] == [2, 2, 3] and all("saved: step 2" in lines for lines in shown)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name, text",
    [("thesis.tex", "years of work"), ("manifest.json", '{"name": "a web page"}'), ("manifest.json", "-")],
)
def test_a_folder_of_something_else_is_never_touched(tmp_path, overwrite, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match="no run of train_sft.py and not empty"):
        open_run(tmp_path, {"finished": None}, overwrite)
    assert (tmp_path / name).read_text() == text


def keys_with(text: str, value, key: str = "") -> set[str]:
    """The keys of JSON under which a text stands, levels joined by dots."""
    if isinstance(value, dict):
        return {found for name, one in value.items() for found in keys_with(text, one, f"{key}.{name}")}
    if isinstance(value, list):
        return {found for one in value for found in keys_with(text, one, key)}
    return {key[1:]} if isinstance(value, str) and text in value else set()


def test_the_saved_folder_is_complete_and_its_recipe_can_be_run_again(words, base, csv_file, tmp_path):
    tuning.run("sft", [*words, "--learning_rate", "0.001"])
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "recipe.yaml",
        "README.md",
        "calibration.json",
    }
    assert not names & {"unfinished", "training_args.bin"} and not list(folder.glob("*.tmp"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["base_model"] == str(base) and manifest["base_revision"].startswith("sha256:")
    assert manifest["labels"] == ["SELL_CALL", "SKIP"] and manifest["task"] == "per_candidate"
    assert manifest["data_files"].keys() == {"candidates.csv"} and manifest["seed"] == 0
    assert manifest["splits"]["train"] == {
        "records": 144,
        "from": "2024-09-01T00:00:00+00:00",
        "to": "2024-10-18T00:00:00+00:00",
    }
    assert manifest["files"].keys() == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert manifest["tuned_on"] == {
        "underlyings": ["BTC"],
        "exit_styles": ["tp_and_roll"],
        "numbers": {
            "dte": [1.0, 1.0],
            "delta": [0.23514593117822502] * 2,
            "score": [3.0, 3.5],
            "iv": [0.7, 0.7],
            "ivrv_ratio": [0.9306217222978382] * 2,
        },
    }
    # The keys with paths of this machine, which are replaced where a run is shared.
    paths = {"base_model", "recipe.model_name_or_path", "recipe.data_files"}
    assert keys_with(str(tmp_path), manifest) == paths
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert keys_with(str(tmp_path), recipe) == {"model_name_or_path", "data_files", "output_dir"}
    found = {path.name: keys_with(str(tmp_path), json.loads(path.read_text())) for path in folder.glob("*.json")}
    del found["manifest.json"]
    assert {name: keys for name, keys in found.items() if keys} == {"adapter_config.json": {"base_model_name_or_path"}}
    card = (folder / "README.md").read_text()
    test = next(r for r in manifest["results"] if (r["split"], r["answers_by"]) == ("test", "tuned model"))
    assert f"| test | {test['records']} | tuned model | {test['accuracy']:.3f} |" in card
    assert "no evidence of profit" in card and manifest["prompt_version"] in card
    assert f'Policy.load("{folder}")' in card  # as it was given: it works from where the training was run
    model, data, training = parse("--config", folder / "recipe.yaml")
    assert (training.learning_rate, model.model_name_or_path) == (0.001, str(base))
    tuning.run("sft", ["--config", str(folder / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    assert difference(adapter(folder), adapter(tmp_path / "again")) == 0


def test_a_tuned_model_is_loaded_only_with_the_prompts_and_the_base_it_was_tuned_on(
    words, base, tmp_path, monkeypatch
):
    tuning.run("sft", words)
    model, tokenizer, manifest = load_tuned(tmp_path / "out")
    tuned = model.get_submodule("base_model.model.model.layers.0.self_attn.qkv_proj").lora_B.default.weight
    assert tuned.abs().max() > 0 and tokenizer.chat_template and manifest["quantization"] == "int4"
    assert load_tuned(tmp_path / "out", quantization="none")[0] is not None
    monkeypatch.setattr("runs.PROMPT_VERSION", "another")
    with pytest.raises(PolicyError, match="tuned on prompts of version .* now renders version another"):
        load_tuned(tmp_path / "out")
    monkeypatch.undo()
    config = AutoConfig.from_pretrained(base)
    config.save_pretrained(base)  # the same, as a file with another time
    load_tuned(tmp_path / "out")
    random_phi3(tokenizer, seed=1).save_pretrained(base)
    with pytest.raises(PolicyError, match="not the one that .* was tuned on"):
        load_tuned(tmp_path / "out")


def test_a_folder_that_is_no_finished_run_is_not_loaded(tmp_path):
    with pytest.raises(PolicyError, match="holds no manifest.json"):
        load_tuned(tmp_path)
    begun(tmp_path)
    with pytest.raises(PolicyError, match="has not finished"):
        load_tuned(tmp_path / "out")


def test_a_push_that_could_not_work_stops_before_the_training(words, tmp_path):
    done = python(SCRIPT.parent / "train_sft.py", *words, "--push_to_hub", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: push_to_hub: the Hub does not")
    assert not (tmp_path / "out").exists()


def test_push_to_hub_shares_the_finished_run_privately_in_one_commit(words, tmp_path):
    with Hub() as hub:
        environment = {"HF_HUB_OFFLINE": "0", **hub.environment(tmp_path / "hf_home", READER_TOKEN)}
        words = [*words, *OFTEN, "--report_to", "tensorboard", "--push_to_hub", "--hub_token", WRITER_TOKEN]
        done = python(SCRIPT.parent / "train_sft.py", *words, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert not unasked(done.stderr)
        refused = python(SCRIPT.parent / "train_sft.py", *words, cwd=tmp_path, **environment)
        assert "holds a run that finished" in refused.stderr
        assert len(hub.commits("user/out")) == 1 and hub.repos["user/out"].private
        pushed = hub.files("user/out")
    assert {"adapter_model.safetensors", "manifest.json", "recipe.yaml", "calibration.json"} < set(pushed)
    assert pushed["adapter_model.safetensors"] == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert 'Policy.load(snapshot_download("user/out"))' in card and "| validation |" in card
    # No token, neither the one given nor that of the environment, is in any file or line of the run.
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "trainer_state.json", "manifest.json"} < {path.name for path in written}
    assert any("tfevents" in path.name for path in written)
    said = (done.stdout + done.stderr + refused.stdout + refused.stderr).encode()
    for content in (said, *pushed.values(), *(path.read_bytes() for path in written)):
        assert WRITER_TOKEN.encode() not in content and READER_TOKEN.encode() not in content


# --- Several GPUs, full ones, and what is loaded


def test_a_model_that_is_to_be_sharded_is_loaded_on_the_cpu(words, base, monkeypatch):
    monkeypatch.setattr("covered_call.training.examples.is_fsdp_enabled", lambda: True)
    model, data, training = parse(*words)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda", 1))
    sharded, _ = load_model(model, training)
    assert {parameter.device.type for parameter in sharded.parameters()} == {"cpu"}
    assert not sharded.hf_device_map  # accelerate refuses a quantised model that is mapped to another device
    weight = sharded.model.layers[0].self_attn.qkv_proj.weight
    assert weight.dtype == torch.float32 and weight.quant_state is not None  # 4 bits inside what FSDP can flatten


def test_int8_is_refused_under_fsdp_before_anything_is_read(words, monkeypatch):
    monkeypatch.setattr("covered_call.training.examples.is_fsdp_enabled", lambda: True)
    monkeypatch.setattr(train_sft, "find_csvs", lambda *_: pytest.fail("it went on"))
    with pytest.raises(RecipeError, match="FSDP cannot shard int8 weights. Use int4"):
        tuning.run("sft", [*words, "--quantization", "int8"])


def test_int8_does_not_flood_the_log(words, caplog):
    tuning.run("sft", [*words, "--quantization", "int8", "--bf16", "true"])
    assert "MatMul8bitLt" not in caplog.text
    logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert "something else" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("We encountered some issues")])
def test_a_memory_that_is_full_while_loading_is_a_plain_error(words, monkeypatch, error, capsys):
    def from_pretrained(*_, **__):
        raise error

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model, _, training = parse(*words)
    if not isinstance(error, torch.OutOfMemoryError):
        monkeypatch.setattr(loading, "times_full", lambda: 1)  # once, in an evaluation perhaps, and not now
        with pytest.raises(RuntimeError, match="some issues"):
            load_model(model, training)
        full = iter([1, 2])
        monkeypatch.setattr(loading, "times_full", lambda: next(full))
    with pytest.raises(MemoryFull, match="does not hold .*base in int4: .*load it in int4"):
        load_model(model, training)


def test_a_memory_that_is_full_in_a_step_is_a_plain_error(words, monkeypatch):
    def training_step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ScoringTrainer, "training_step", training_step)
    with pytest.raises(SystemExit, match="the GPU's memory is full: give --per_device_train_batch_size 1"):
        train_sft.run(lambda: tuning.run("sft", words))


def test_ligers_kernels_are_taken_on_a_gpu_where_they_are_installed_and_its_losses_never(base, monkeypatch):
    applied = []
    monkeypatch.setattr(loading, "apply_liger_kernel", lambda model, kernels: applied.append(kernels))
    with pytest.raises(PolicyError, match="liger-kernel is not installed. Run: pip install"):
        loading.use_liger(None, True)
    loading.use_liger(None, None)
    assert not applied
    monkeypatch.setattr(loading, "is_liger_kernel_available", lambda: True)
    loading.load_base(str(base), "none", torch.float32, "cpu")
    loading.use_liger(None, False)
    assert not applied
    loading.use_liger(None, None)
    assert [name for name, on in applied[0].items() if on] == ["rope", "rms_norm", "swiglu"]
    assert [name for name, on in applied[0].items() if not on] == ["cross_entropy", "fused_linear_cross_entropy"]
    assert parse("--config", "tiny", "--use_liger_kernel", "false")[2].liger is False
    assert parse("--config", "tiny")[2].use_liger_kernel is False  # TRL's own way would take its losses


def test_a_paged_optimiser_that_was_loaded_is_paged_again(words, tmp_path, monkeypatch):
    """bitsandbytes ends the process when it prefetches what is marked as paged and lies in plain memory."""
    trainer = trainer_of(words, monkeypatch)
    large = torch.nn.Parameter(torch.randn(400, 300))
    optimizer = bnb.optim.PagedAdamW8bit([large])
    state = {"step": 1, "state1": torch.ones(400, 300, dtype=torch.uint8), "state2": torch.full((400, 300), 2).byte()}
    for name in ("state1", "state2"):
        state[name].is_paged, state[name].page_deviceid = True, 0
    optimizer.state[large] = state
    trainer.optimizer, fresh = optimizer, []

    def get_state_buffer(parameter, dtype):
        fresh.append(torch.zeros_like(parameter, dtype=dtype))
        return fresh[-1]

    monkeypatch.setattr(optimizer, "get_state_buffer", get_state_buffer)
    monkeypatch.setattr(transformers.Trainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)
    trainer._load_optimizer_and_scheduler(None)
    assert not fresh
    trainer._load_optimizer_and_scheduler("checkpoint-1")
    loaded = optimizer.state[large]
    assert {id(loaded["state1"]), id(loaded["state2"])} == set(map(id, fresh)) and not hasattr(fresh[0], "is_paged")
    assert (loaded["state1"] == 1).all() and (loaded["state2"] == 2).all() and loaded["step"] == 1


# --- Whole runs


@pytest.mark.parametrize(
    "name, options",
    [
        ("per_candidate", ["--quantization", "int4"]),
        ("per_decision_ranking", ["--quantization", "int8", "--candidate_order", "shuffle", "--max_steps", "6"]),
        ("per_candidate", ["--quantization", "none", "--lora_r", "0"]),
    ],
)
def test_a_fine_tune_saves_a_model_and_prints_a_table(name, options, words, tmp_path, capsys):
    tuning.run("sft", [*words, "--dataset_config", name, *options])
    table = capsys.readouterr().out
    for split in ("validation", "test"):
        assert re.search(rf"^{split} +\d+  tuned model +[01]\.\d{{3}} +[01]\.\d{{3}}$", table, re.MULTILINE)
        assert re.search(rf"^{split} +\d+  always \w+", table, re.MULTILINE)
        assert ("its base, untuned" in table) == ("none" not in options)
    assert re.search(r"^step 1 of \d  loss [\d.]+, learning rate [\d.e-]+$", table, re.MULTILINE) and "{" not in table
    saved, judge, decide = table.splitlines()[-3:]  # the last lines say where it lies, and what to do with it
    folder = tmp_path / "out"
    assert saved.startswith(f"Saved in {folder}: ") and f"evaluate_policy.py --model {folder}" in judge
    assert f'Policy.load("{folder}")' in decide
    model, tokenizer, manifest = load_tuned(tmp_path / "out")
    assert tokenizer.chat_template and manifest["task"] == name
    assert manifest["adapter"] == ("none" not in options)


def balanced_accuracy(table: str, split: str, who: str) -> float:
    return float(re.search(rf"^{split} +\d+  {who}.* ([\d.]+)$", table, re.MULTILINE).group(1))


def test_the_tiny_recipe_as_shipped_beats_the_majority_answer_on_the_sample(tmp_path, capsys):
    sample = SCRIPT.parent / "data" / "sample" / "*.csv"
    tuning.run("sft", 
        ["--config", "tiny", "--data_files", str(sample), "--output_dir", str(tmp_path / "out")]
        + ["--model_name_or_path", str(tmp_path / "tiny")]
    )
    table = capsys.readouterr().out
    assert balanced_accuracy(table, "test", "always SKIP") == 0.5
    assert balanced_accuracy(table, "test", "tuned model") >= 0.60
    assert balanced_accuracy(table, "validation", "tuned model") >= 0.60


@needs_real_data
def test_the_tiny_recipe_runs_on_a_real_file(tmp_path, capsys):
    tuning.run("sft", 
        ["--config", "tiny", "--data_files", str(REAL_DATA / "*hold*.csv"), *QUICK, *NO_CHECKPOINTS]
        + ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tmp_path / "tiny")]
    )
    assert "tuned model" in capsys.readouterr().out


# --- Other models, and more than one process


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_any_causal_model_with_a_chat_template_can_be_tuned(family, words, base, splits, tmp_path):
    config_class, model_class, template = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "other")
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model_class(config).save_pretrained(tmp_path / "other")
    words[words.index(str(base))] = str(tmp_path / "other")
    tuning.run("sft", words)
    tuned = load_tuned(tmp_path / "out")[0]
    assert max(p.abs().max().item() for name, p in tuned.named_parameters() if "lora_B" in name) > 0


SPY = """
import json, os, sys
import train_sft

original = train_sft.AnswerTrainer.compute_loss

def compute_loss(self, model, inputs, *args, **kwargs):
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    with open(f"seen-{os.environ.get('RANK', 'alone')}.jsonl", "a") as file:
        file.write(json.dumps([self.state.global_step, rows]) + "\\n")
    return original(self, model, inputs, *args, **kwargs)

train_sft.AnswerTrainer.compute_loss = compute_loss
saved = train_sft.AnswerTrainer.save_model
def save_model(self, *args, **kwargs):
    if self.args.should_save:
        open("saves", "a").write("x")
    saved(self, *args, **kwargs)
train_sft.AnswerTrainer.save_model = save_model
tuning.run("sft", sys.argv[1:])
"""


def seen(folder: Path, pattern: str) -> dict[int, list[tuple]]:
    """The records of each step, sorted, over all processes."""
    steps = {}
    for path in folder.glob(pattern):
        for line in path.read_text().splitlines():
            step, rows = json.loads(line)
            steps.setdefault(step, []).extend(map(tuple, rows))
    return {step: sorted(rows) for step, rows in steps.items()}


def test_two_processes_train_as_one_with_twice_the_batch(words, tmp_path):
    """The same records at each step, none of them twice in an epoch, the same weights, one save."""
    (tmp_path / "spy.py").write_text(SPY)
    one_epoch = [*words, "--max_steps", "-1", "--num_train_epochs", "1", "--eval_strategy", "epoch"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    path = {"PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
    alone, both = ["--per_device_train_batch_size", "10"], ["--per_device_train_batch_size", "5"]
    one = python("spy.py", *one_epoch, *alone, "--dataloader_drop_last", "true", cwd=tmp_path, **path)
    assert one.returncode == 0, one.stderr
    (tmp_path / "saves").unlink()
    two = python(*launch, "spy.py", *one_epoch, *both, "--output_dir", tmp_path / "two", cwd=tmp_path, **path)
    assert two.returncode == 0, two.stderr
    expected, found = seen(tmp_path, "seen-alone.jsonl"), seen(tmp_path, "seen-[01].jsonl")
    assert len(found) == 14 and found == expected
    everything = [row for rows in found.values() for row in rows]
    assert len(set(everything)) == len(everything) == 140
    assert difference(adapter(tmp_path / "out"), adapter(tmp_path / "two")) < 1e-5
    assert (tmp_path / "saves").read_text() == "x"
    tables = [json.loads((tmp_path / name / "manifest.json").read_text())["results"] for name in ("out", "two")]
    assert tables[0] == tables[1]
    fits = [json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("out", "two")]
    assert fits[0] == pytest.approx(fits[1], abs=1e-4)  # from all scores of validation, shared between processes
    assert two.stdout.count("answers by") == 1 and two.stdout.count("Preflight of") == 1


def test_the_fsdp_config_is_one_that_accelerate_takes():
    config = load_config_from_file(str(first_checks.RECIPES / "accelerate" / "fsdp_qlora.yaml"))
    assert (config.distributed_type, config.mixed_precision, config.num_processes) == ("FSDP", "bf16", 2)
    known = {action.dest for action in launch_command_parser()._actions}
    assert config.fsdp_config.keys() <= known
