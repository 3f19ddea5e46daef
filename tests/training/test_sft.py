"""Whole fine-tunes: tables, kills, other models, several processes, and the tiny recipe as it is shipped."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import REAL_DATA, SCRIPT, needs_real_data, on_the_default_stack, python
from language_model.test_policy import FAMILIES
from transformers import AutoTokenizer

from covered_call import tuning
from covered_call.language_model.loading import load_tuned
from covered_call.language_model.manifest import read_manifest
from covered_call.training import results
from covered_call.training.trainers import AnswerTrainer

from .conftest import NO_CHECKPOINTS, OFTEN, QUICK, adapter, difference, killed, manifest_of


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
    assert saved.startswith(f"Saved in {folder}: ") and f"covered-call evaluate --model {folder}" in judge
    assert f'Policy.load("{folder}")' in decide
    model, tokenizer, manifest = load_tuned(tmp_path / "out")
    assert tokenizer.chat_template and manifest["task"] == name
    assert manifest["adapter"] == ("none" not in options)


def balanced_accuracy(table: str, split: str, who: str) -> float:
    return float(re.search(rf"^{split} +\d+  {who}.* ([\d.]+)$", table, re.MULTILINE).group(1))


@on_the_default_stack
@pytest.mark.slow(minutes=4)
def test_the_tiny_recipe_as_shipped_beats_the_majority_answer_on_the_sample(tmp_path, capsys):
    sample = SCRIPT.parent / "data" / "sample" / "*.csv"
    tuning.run(
        "sft",
        ["--config", "tiny", "--data_files", str(sample), "--output_dir", str(tmp_path / "out")]
        + ["--model_name_or_path", str(tmp_path / "tiny")],
    )
    table = capsys.readouterr().out
    assert balanced_accuracy(table, "test", "always SKIP") == 0.5
    assert balanced_accuracy(table, "test", "tuned model") >= 0.60
    assert balanced_accuracy(table, "validation", "tuned model") >= 0.60


@pytest.mark.slow
@needs_real_data
def test_the_tiny_recipe_runs_on_a_real_file(tmp_path, capsys):
    tuning.run(
        "sft",
        ["--config", "tiny", "--data_files", str(REAL_DATA / "*hold*.csv"), *QUICK, *NO_CHECKPOINTS]
        + ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tmp_path / "tiny")],
    )
    assert "tuned model" in capsys.readouterr().out


# --- Killed


RESUMED = ["--max_steps", "12", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"]
RESUMED += ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
RESUMED += ["--lora_dropout", "0.2", "--balance", "downsample", "--candidate_order", "shuffle"]
RESUMED += ["--dataset_config", "per_decision_ranking", "--collapse_patience", "0", "--save_total_limit", "9"]


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_weights(words, tmp_path, caplog):
    """Killed twice, in the first and in a later epoch, with dropout, accumulation and an order a law of the epoch."""
    folder, whole = tmp_path / "out", tmp_path / "whole"
    for checkpoint in ("checkpoint-2", "checkpoint-8"):
        killed("sft", [*words, *RESUMED], folder / checkpoint / "adapter_model.safetensors")
        assert not (folder / "adapter_model.safetensors").exists()
    tuning.run("sft", [*words, *RESUMED])
    assert "Going on from" in caplog.text
    tuning.run("sft", [*words, *RESUMED, "--output_dir", str(whole)])
    assert difference(adapter(folder), adapter(whole)) == 0
    assert difference(adapter(folder / "checkpoint-2"), adapter(folder)) > 1e-4
    assert manifest_of(folder)["results"] == manifest_of(whole)["results"]


FASTER = ["--learning_rate", "0.01"]


def test_a_run_killed_after_its_last_step_takes_no_other_and_saves_its_best_model(words, tmp_path, monkeypatch):
    """Killed while it saved, moved since, and of three steps the first was the best."""
    folder, moved = tmp_path / "out", tmp_path / "moved"
    with monkeypatch.context() as killed:
        renames = iter(["of the manifest", "of the first file"])
        killed.setattr(results.os, "replace", lambda old, new: next(renames) and shutil.move(old, new))
        with pytest.raises((StopIteration, RuntimeError)):
            tuning.run("sft", [*words, *OFTEN, *FASTER])
    assert (folder / "unfinished").is_dir()
    state = folder / "checkpoint-3" / "trainer_state.json"
    best = {"best_global_step": 1, "best_model_checkpoint": str(folder / "checkpoint-1")}
    state.write_text(json.dumps(json.loads(state.read_text()) | best))
    folder.rename(moved)
    monkeypatch.setattr(AnswerTrainer, "training_step", lambda *_: pytest.fail("a fourth step"))
    tuning.run("sft", [*words, *OFTEN, *FASTER, "--output_dir", str(moved)])
    assert not (moved / "unfinished").exists() and not (moved / "checkpoint-4").exists()
    manifest = read_manifest(moved)
    assert (manifest["steps"], manifest["best_step"]) == (3, 1)
    assert difference(adapter(moved), adapter(moved / "checkpoint-1")) == 0
    assert difference(adapter(moved), adapter(moved / "checkpoint-3")) > 1e-4


# --- Other models, and more than one process


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_any_causal_model_with_a_chat_template_can_be_tuned(family, words, corpus_base, tmp_path):
    config_class, model_class, template = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(corpus_base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "other")
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model_class(config).save_pretrained(tmp_path / "other")
    words[words.index(str(corpus_base))] = str(tmp_path / "other")
    tuning.run("sft", words)
    tuned = load_tuned(tmp_path / "out")[0]
    assert max(p.abs().max().item() for name, p in tuned.named_parameters() if "lora_B" in name) > 0


SPY = """
import json, os, sys
from covered_call import tuning
from covered_call.training.trainers import AnswerTrainer

original = AnswerTrainer.compute_loss

def compute_loss(self, model, inputs, *args, **kwargs):
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    with open(f"seen-{os.environ.get('RANK', 'alone')}.jsonl", "a") as file:
        file.write(json.dumps([self.state.global_step, rows]) + "\\n")
    return original(self, model, inputs, *args, **kwargs)

AnswerTrainer.compute_loss = compute_loss
saved = AnswerTrainer.save_model
def save_model(self, *args, **kwargs):
    if self.args.should_save:
        open("saves", "a").write("x")
    saved(self, *args, **kwargs)
AnswerTrainer.save_model = save_model
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


@pytest.mark.slow
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
