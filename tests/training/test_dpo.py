"""Preferences: what to start from, the preflight, training, resuming and what is saved."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    REAL_DATA,
    REAL_PHI3,
    decision,
    needs_real_data,
    needs_real_phi3,
    python,
    unasked,
    write_csv,
)
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from covered_call import tuning
from covered_call.candidates.context_lines import SPOT
from covered_call.candidates.prompts import version_with
from covered_call.evaluation import evaluate
from covered_call.language_model.manifest import PolicyError, hash_of
from covered_call.language_model.policy import Policy
from covered_call.training.dpo import add_pairs, on_both
from covered_call.training.runs import RecipeError

from .conftest import (
    NO_CHECKPOINTS,
    OFTEN,
    QUICK_PAIRS,
    adapter,
    difference,
    fine_tune,
    killed,
    manifest_of,
    trainer_of,
)

LN2 = math.log(2)


# --- What to start from


def test_an_adapter_brings_its_base_its_quantisation_and_its_lora(
    pair_words, pair_base, pair_corpus, tmp_path, monkeypatch
):
    eight = fine_tune(pair_base, pair_corpus, tmp_path / "eight", "--quantization", "int8", "--lora_r", "4")
    more = ["--adapter", eight, "--model_name_or_path", "nowhere", "--lora_r", "9"]
    trainer = trainer_of(monkeypatch, "dpo", *pair_words, *more)
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["base_model"], manifest["quantization"]) == (str(pair_base), "int8")
    assert manifest["recipe"]["lora_r"] == 4 == trainer.model.peft_config["default"].r


def changed(start, tmp_path, **changes) -> str:
    """The start with another manifest."""
    shutil.copytree(start, tmp_path / "changed")
    (tmp_path / "changed" / "manifest.json").write_text(json.dumps(manifest_of(start) | changes))
    return str(tmp_path / "changed")


@pytest.mark.parametrize(
    "changes, error",
    [
        (
            {"task": "per_candidate", "tasks": ["per_candidate"]},
            "is a fine-tune of per_candidate: pairs are answers to per_decision_rank",
        ),
        ({"prompt_version": "another"}, "tuned on prompts of version another"),
        ({"finished": None}, "has not finished"),
        ({"base_revision": "sha256:0"}, "not the one that .* was tuned on"),
        ({"adapter": False}, "of all weights.*only an adapter can be gone on with"),
        ({"recipe": {"candidate_order": "csv"}}, "was shown candidates in csv order: set candidate_order"),
        (
            {"context": [*SPOT], "prompt_version": version_with(SPOT)},
            "was told ret_1d, .*these options tell nothing",
        ),
        (
            {"splits": {"train": {"to": "2024-11-15T00:00:00+00:00"}}},
            "up to 2024-11-15, and validation begins on 2024-11-04",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused_with_the_reason(changes, error, pair_words, start, tmp_path):
    with pytest.raises((RecipeError, PolicyError), match=error):
        tuning.run("dpo", [*pair_words, "--adapter", changed(start, tmp_path, **changes)])
    assert not (tmp_path / "out").exists()


# --- Preflight


def test_a_dry_run_counts_the_pairs_and_trains_nothing(pair_words, pair_base, start, tmp_path, capsys):
    tuning.run("dpo", [*pair_words, "--dry_run", "--adapter", str(start)])
    text = capsys.readouterr().out
    assert f"Preflight of preference on {pair_base}, int4, from {start}" in text
    assert re.search(r"^train +63 +63 +2024-09-01 2024-11-02 +49.2%  NO_TRADE 32, 1 31$", text, re.MULTILINE)
    assert re.search(r"^chosen +as above, against 1 32, NO_TRADE 31 in train$", text, re.MULTILINE)
    assert "on which alone each record's loss is" in text and "no second model" in text
    assert re.search(r"^steps +3 of 8 records: 0.4 epochs; micro-batches of 8, ", text, re.MULTILINE)
    assert not (tmp_path / "out").exists()


@needs_real_phi3
def test_the_phi3_recipe_passes_its_preflight_on_the_real_tokenizer(pair_words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = pair_words[pair_words.index("--data_files") + 1]
    paths = ["--model_name_or_path", str(REAL_PHI3), "--data_files", files, "--output_dir", str(tmp_path / "out")]
    tuning.run("dpo", ["--config", "preference", "--adapter", "", "--dry_run", *paths])
    text = capsys.readouterr().out
    assert "25,165,824 of 3,846,245,376 are trained" in text
    assert "told apart by their tokens through <|end|>" in text
    assert text.count("that a card of 6 GB leaves") == 2


def test_a_record_longer_than_max_length_stops_the_run_with_the_length_it_needs(pair_words):
    with pytest.raises(RecipeError, match="longer than max_length 50: .* in train, .*would be cut off") as error:
        tuning.run("dpo", [*pair_words, "--max_length", "50", "--dry_run"])
    needed = int(re.search(r"Set max_length to (\d+)", str(error.value))[1])
    tuning.run("dpo", [*pair_words, "--max_length", str(needed), "--dry_run"])
    with pytest.raises(RecipeError, match="longer than max_length"):
        tuning.run("dpo", [*pair_words, "--max_length", str(needed - 1), "--dry_run"])


def test_what_a_model_was_tuned_on_first_and_then_is_what_it_knows():
    first = {"underlyings": ["BTC"], "exit_styles": ["a"], "numbers": {"dte": [1.0, 7.0], "iv": [0.7, 0.7]}}
    then = {"underlyings": ["BTC"], "exit_styles": ["b"], "numbers": {"dte": [3.0, 9.0]}}
    both = {"underlyings": ["BTC"], "exit_styles": ["a", "b"], "numbers": {"dte": [1.0, 9.0], "iv": [0.7, 0.7]}}
    assert on_both(first, then) == both


def test_a_pair_of_a_decision_that_is_in_another_split_is_an_error():
    ranking = Dataset.from_dict({"decision_id": ["a", "b"]})
    pairs = Dataset.from_dict({"decision_id": ["b"], "answers": [["1", "NO_TRADE"]]})
    assert add_pairs("test", ranking, pairs)["pair"] == [None, ["1", "NO_TRADE"]]
    with pytest.raises(RecipeError, match="test: the pair of b belongs to another split"):
        add_pairs("test", ranking.select([0]), pairs)


# --- Training


def result(folder: Path, who: str, split: str = "validation") -> dict:
    return next(r for r in manifest_of(folder)["results"] if (r["split"], r["answers_by"]) == (split, who))


def test_the_answers_that_paid_more_gain_on_the_teachers(pair_words, start, tmp_path, capsys):
    """A market that rises each day past the call that the teacher sells, and never to the other one."""
    rows = []
    for day in range(80):
        spot = 58000 + 400 * day
        market = {"dte": 1.0, "spot": float(spot), "iv": 0.3, "exit_style": "hold_to_expiry", "pnl_vs_hodl": -400.0}
        rows += decision(day, sold=0, strikes=(spot - 2000, spot + 1000), **market)
    files = ["--data_files", write_csv(tmp_path / "rising.csv", rows), "--settlement", "intrinsic"]
    longer = ["--max_steps", "20", "--learning_rate", "0.01"]
    once = [word.replace("1", "20") for word in OFTEN]
    tuning.run("dpo", [*pair_words, *longer, *files, "--adapter", str(start), *once])
    tuned, before = (result(tmp_path / "out", who) for who in ("tuned model", "its start"))
    assert before["pairs_won"] == 0 and before["dpo_loss"] == pytest.approx(LN2)
    assert tuned["pairs_won"] == 1 and tuned["dpo_loss"] < 0.62
    assert (before["accuracy"], tuned["accuracy"]) == (1, 0)
    printed = capsys.readouterr().out
    table = printed.split("answers by")[-1]
    for who in ("tuned model", "its start", "its base, untuned"):
        assert re.search(rf"^test +\d+ +\d+  {who}( +[\d.]+){{3}} +-( +[\d.]+){{2}}$", table, re.MULTILINE)
    assert re.search(r"^test +\d+ +\d+  always \w+( +[\d.]+){3} +- +- +-$", table, re.MULTILINE)
    doubt = "the computed outcomes of BTC hold_to_expiry do not follow the recorded ones"  # as a load warns, too
    assert f"checkpoint by dpo_loss, not by money: {doubt}\n" in printed
    assert "Computed against recorded outcomes on " in printed


@pytest.mark.parametrize("quantization", ["int4", "int8", "none"])
def test_what_is_saved_decides(quantization, pair_words, pair_corpus, tmp_path):
    tuning.run("dpo", [*pair_words, "--quantization", quantization, "--learning_rate", "0.01"])
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "tokenizer.json", "recipe.yaml", "README.md", "calibration.json"}
    assert "training.png" in names and not names & {"unfinished", "ref", "training_args.bin"}
    policy = Policy.load(folder)
    assert policy.task == "per_decision_ranking" and policy.manifest["quantization"] == quantization
    tuned = [p.abs().max() for name, p in policy.model.named_parameters() if "lora_B" in name]
    assert max(tuned) > 0
    evaluate.main(["--model", str(folder), "--output_dir", str(tmp_path / "report"), "--data_files", pair_corpus])
    card = (folder / "README.md").read_text()
    test = result(folder, "tuned model", "test")
    assert f"| {test['accuracy']:.3f} | {test['balanced_accuracy']:.3f} | {test['trade_rate']:.3f} |" in card
    assert "- dpo" in card and "no evidence of profit" in card


def test_evaluation_while_training_goes_to_the_log_and_the_best_step_is_kept(pair_words, start, tmp_path, capsys):
    tuning.run("dpo", [*pair_words, *OFTEN, "--adapter", str(start)])
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    evaluated = [entry for entry in state["log_history"] if "eval_dpo_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [1, 2, 3]
    names = {"eval_pairs_won", "eval_accuracy", "eval_balanced_accuracy", "eval_trade_rate", "eval_outside"}
    assert all(names | {"eval_mean_pnl", "eval_mean_percent"} <= entry.keys() for entry in evaluated)
    best = max(evaluated, key=lambda entry: entry["eval_mean_percent"])
    manifest = manifest_of(tmp_path / "out")
    assert manifest["best_step"] == best["step"]
    value = f"{best['eval_mean_percent']:.3f} on {manifest['splits']['validation']['records']} validation records"
    why = f"its P&L vs HODL in % of spot, {value}, is the highest of 3 evaluations."
    assert manifest["why_saved"] == f"Kept is step {best['step']} of 3: {why}"
    printed = capsys.readouterr().out
    assert re.search(r"^checkpoint the best on validation by mean_percent$", printed, re.MULTILINE)
    assert f"\n{manifest['why_saved']}\nSaved in" in printed
    assert manifest["why_saved"] in (tmp_path / "out" / "README.md").read_text()
    kept = adapter(tmp_path / "out" / f"checkpoint-{best['step']}")
    assert difference(adapter(tmp_path / "out"), kept) == 0


# --- Resuming and saving


RESUMED = ["--max_steps", "12", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
RESUMED += ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
RESUMED += ["--disable_dropout", "false", "--collapse_patience", "0", "--save_total_limit", "9"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_weights(pair_words, pair_base, pair_corpus, tmp_path):
    """From a fine-tune with dropout, killed in the second epoch."""
    dropping = fine_tune(pair_base, pair_corpus, tmp_path / "start", "--lora_dropout", "0.2")
    folder, words = tmp_path / "out", [*pair_words, *RESUMED, "--adapter", str(dropping)]
    killed("dpo", words, folder / "checkpoint-8" / "trainer_state.json")
    assert not (folder / "adapter_model.safetensors").exists()
    done = python("-m", "covered_call", "prefer", *words, cwd=tmp_path)
    assert "Going on from" in done.stderr and done.returncode == 0, done.stderr
    assert not unasked(done.stderr)
    tuning.run("dpo", [*words, "--output_dir", str(tmp_path / "whole")])
    assert difference(adapter(folder), adapter(tmp_path / "whole")) == 0
    assert difference(adapter(folder / "checkpoint-2"), adapter(folder)) > 1e-4
    assert manifest_of(folder)["results"] == manifest_of(tmp_path / "whole")["results"]


def test_a_run_is_not_gone_on_with_from_another_start_or_with_other_costs(pair_words, start, tmp_path, monkeypatch):
    words = [*pair_words, "--adapter", changed(start, tmp_path)]
    trainer_of(monkeypatch, "dpo", *words)
    with pytest.raises(RecipeError, match=r"another run .*recipe.fee: 0.0, now 0.01"):
        tuning.run("dpo", [*pair_words, "--fee", "0.01"])
    weights = tmp_path / "changed" / "adapter_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(PolicyError, match="adapter_model.safetensors is not the file that was saved"):
        tuning.run("dpo", words)
    manifest = manifest_of(weights.parent)
    manifest["files"][weights.name] = hash_of(weights)
    (weights.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match="another run .*start.sha256"):
        tuning.run("dpo", words)


def test_the_manifest_names_the_start_and_the_recipe_can_be_run_again(preferred, start, tmp_path):
    manifest = manifest_of(preferred)
    assert manifest["start"]["adapter"] == str(start) and manifest["method"] == "dpo"
    assert manifest["base_revision"] == manifest_of(start)["base_revision"]
    assert manifest["splits"]["train"]["records"] == 63
    assert manifest["tuned_on"]["exit_styles"] == ["hold_to_expiry"]
    again = yaml.safe_load((preferred / "recipe.yaml").read_text())
    assert (again["beta"], again["fee"], again["adapter"]) == (0.2, 0.0003, str(start))
    tuning.run("dpo", ["--config", str(preferred / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    assert difference(adapter(preferred), adapter(tmp_path / "again")) == 0


def test_a_result_can_be_started_from_again(pair_words, preferred, tmp_path):
    tuning.run("dpo", [*pair_words, "--fee", "0.0003", "--adapter", str(preferred)])
    assert result(tmp_path / "out", "its start")["pairs_won"] == result(preferred, "tuned model")["pairs_won"]


@needs_real_data
def test_the_tiny_recipe_builds_its_base_and_runs_on_a_real_file(tmp_path, capsys):
    tuning.run(
        "dpo",
        ["--config", "tiny_dpo", "--data_files", str(REAL_DATA / "*hold*.csv"), *QUICK_PAIRS, *NO_CHECKPOINTS]
        + ["--tiny_base_steps", "3", "--output_dir", str(tmp_path / "out")]
        + ["--model_name_or_path", str(tmp_path / "tiny")],
    )
    assert "tuned model" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
