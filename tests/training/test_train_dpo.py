"""Preferences: what to start from, the reference, the preflight, training, resuming and what is saved, on the CPU."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import yaml
from conftest import (
    REAL_DATA,
    REAL_PHI3,
    SCRIPT,
    decision,
    needs_real_data,
    needs_real_phi3,
    python,
    unasked,
    write_csv,
)
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_train_sft import adapter, difference
from transformers import AutoTokenizer
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from covered_call.candidates.builder import load_candidates
from covered_call.evaluation import evaluate as evaluate_policy
from covered_call.language_model.manifest import PolicyError, hash_of
from covered_call.language_model.policy import Policy
from covered_call.language_model.scoring import Scored
from covered_call.language_model.tiny_phi3 import random_phi3, train_tokenizer
from covered_call.training import dpo as train_dpo
from covered_call.training import first_checks
from covered_call import tuning
from covered_call.training import sft as train_sft
from covered_call.training.recipe import DPO, SFT, parse_recipe
from covered_call.training.runs import RecipeError

RECIPES = list(DPO.recipes)
LN2 = math.log(2)
# What a user types, made quick: few steps, nothing logged, no checkpoints.
QUICK = [
    "--max_steps",
    "3",
    "--learning_rate",
    "5e-4",
    "--warmup_steps",
    "0",
    "--logging_steps",
    "1",
    "--report_to",
    "none",
]
NO_CHECKPOINTS = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dpo")


@pytest.fixture(scope="module")
def csv_file(home) -> str:
    """A price that jumps up and down each day: it pays to sell at the top, and the teacher sells at the bottom."""
    rows = []
    for day in range(80):
        low = day % 2 == 0
        market = {"dte": 1.0, "spot": 58000.0 if low else 66000.0, "exit_style": "hold_to_expiry"}
        rows += decision(day, sold=0 if low else None, **market, pnl_vs_hodl=-4000.0 if low else 0.0)
    return write_csv(home / "candidates.csv", rows)


@pytest.fixture(scope="module")
def base(home, csv_file) -> Path:
    """The folder of a tiny random Phi-3."""
    train = load_candidates("per_decision_ranking", data_files=csv_file, cache_dir=str(home / "arrow"))["train"]
    tokenizer = train_tokenizer(message["content"] for chat in train["messages"] for message in chat)
    random_phi3(tokenizer, seed=0).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    return home / "base"


def fine_tune(base, csv_file, folder, *more) -> Path:
    """What train_sft.py saves after a few large steps."""
    paths = ["--model_name_or_path", str(base), "--data_files", csv_file, "--output_dir", str(folder)]
    task = ["--dataset_config", "per_decision_ranking", "--balance", "none", "--learning_rate", "0.01"]
    tuning.run("sft", ["--config", "tiny", *QUICK, *NO_CHECKPOINTS, *paths, *task, *more])
    return folder


@pytest.fixture(scope="module")
def start(home, base, csv_file) -> Path:
    return fine_tune(base, csv_file, home / "start")


@pytest.fixture
def words(base, csv_file, tmp_path) -> list[str]:
    return quick_run(base, csv_file, tmp_path / "out")


def quick_run(base, csv_file, folder) -> list[str]:
    """The command line of a quick run on the random base."""
    paths = ["--model_name_or_path", str(base), "--data_files", csv_file, "--output_dir", str(folder)]
    return ["--config", "tiny_dpo", *QUICK, *NO_CHECKPOINTS, "--beta", "0.1", "--tiny_base_steps", "0", *paths]


def parse(*arguments):
    return parse_recipe(list(map(str, arguments)), DPO)[:3]


def trainer_of(monkeypatch, *words) -> train_dpo.PreferenceTrainer:
    """The trainer as main makes it, not yet trained."""
    made = []
    monkeypatch.setattr(train_dpo.PreferenceTrainer, "train", lambda self, **_: made.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        tuning.run("dpo", list(map(str, words)))
    monkeypatch.undo()
    return made[0]


def batch_of(trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


# --- Recipes


def test_every_recipe_belongs_to_one_of_the_two_scripts():
    found = sorted(path.stem for path in first_checks.RECIPES.glob("*.yaml"))
    assert found == sorted([*SFT.recipes, *DPO.recipes])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_keeps_the_best_checkpoint(name):
    model, data, training = parse("--config", name, "--use_cpu", "true", "--bf16", "false")
    assert training.output_dir == f"out/{name}" and training.loss_type == ["sigmoid"]
    assert model.quantization == "int4" and data.dataset_config == "preference"
    assert (training.metric_for_best_model, training.greater_is_better) == ("dpo_loss", False)
    assert training.load_best_model_at_end and training.save_steps % training.eval_steps == 0


def test_a_recipe_of_the_other_script_is_not_taken_for_ones_own():
    with pytest.raises(RecipeError, match="ranking: neither a file nor one of preference, tiny_dpo"):
        parse("--config", "ranking")
    with pytest.raises(RecipeError, match="preference: neither a file nor one of per_candidate, ranking, tiny"):
        parse_recipe(["--config", "preference"])


@pytest.mark.parametrize("key, nearest", [("betta", "beta"), ("min_egde", "min_edge"), ("addapter", "adapter")])
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(RecipeError, match=f"{key}, in the command line.*Did you mean {nearest}"):
        parse("--config", "tiny_dpo", f"--{key}", "1")


@pytest.mark.parametrize(
    "key, value",
    [
        ("precompute_ref_log_probs", "true"),
        ("sync_ref_model", "true"),
        ("ld_alpha", "0.5"),
        ("truncation_mode", "keep_end"),
        ("pad_to_multiple_of", "8"),
    ],
)
def test_a_key_that_would_be_overruled_is_refused_with_the_reason(key, value):
    with pytest.raises(RecipeError, match=f"{key}: .* cannot be set: .*Remove it"):
        parse("--config", "tiny_dpo", f"--{key}", value)


def test_a_recipe_must_say_what_to_start_from():
    with pytest.raises(RecipeError, match="Nothing to start from"):
        parse("--config", "preference", "--adapter", "", "--use_cpu", "true", "--bf16", "false")


def test_all_weights_or_a_shuffle_are_refused():
    with pytest.raises(RecipeError, match="lora_r: 0.*only an adapter"):
        parse("--config", "tiny_dpo", "--lora_r", "0", "--quantization", "none")
    with pytest.raises(RecipeError, match="candidate_order: shuffle"):
        parse("--config", "tiny_dpo", "--candidate_order", "shuffle")


def test_the_phi3_recipe_stops_at_once_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="needs a CUDA GPU.*--config tiny_dpo"):
        parse("--config", "preference")


# --- What to start from


def test_an_adapter_brings_its_base_its_quantisation_and_its_lora(words, base, csv_file, tmp_path):
    eight = fine_tune(base, csv_file, tmp_path / "eight", "--quantization", "int8", "--lora_r", "4")
    tuning.run("dpo", [*words, "--adapter", str(eight), "--model_name_or_path", "nowhere", "--lora_r", "9"])
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["base_model"], manifest["quantization"]) == (str(base), "int8")
    assert manifest["recipe"]["lora_r"] == 4
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_a_fine_tune_of_another_task_is_refused(words, base, csv_file, tmp_path):
    other = fine_tune(base, csv_file, tmp_path / "other", "--dataset_config", "per_candidate")
    with pytest.raises(RecipeError, match="is a fine-tune of per_candidate: pairs are answers to per_decision_rank"):
        tuning.run("dpo", [*words, "--adapter", str(other)])


def changed(start, tmp_path, **changes) -> str:
    """The start with another manifest."""
    shutil.copytree(start, tmp_path / "changed")
    (tmp_path / "changed" / "manifest.json").write_text(json.dumps(manifest_of(start) | changes))
    return str(tmp_path / "changed")


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"prompt_version": "another"}, "tuned on prompts of version another"),
        ({"finished": None}, "has not finished"),
        ({"base_revision": "sha256:0"}, "not the one that .* was tuned on"),
        ({"adapter": False}, "of all weights.*only an adapter can be gone on with"),
        ({"recipe": {"candidate_order": "csv"}}, "was shown candidates in csv order: set candidate_order"),
        (
            {"splits": {"train": {"to": "2024-11-15T00:00:00+00:00"}}},
            "up to 2024-11-15, and validation begins on 2024-11-04",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused_with_the_reason(changes, error, words, start, tmp_path):
    with pytest.raises((RecipeError, PolicyError), match=error):
        tuning.run("dpo", [*words, "--adapter", changed(start, tmp_path, **changes)])
    assert not (tmp_path / "out").exists()


# --- Preflight


def test_a_dry_run_counts_the_pairs_and_trains_nothing(words, start, tmp_path, capsys):
    tuning.run("dpo", [*words, "--dry_run", "--adapter", str(start)])
    text = capsys.readouterr().out
    assert f"Preflight of preference on {start.parent / 'base'}, int4, from {start}" in text
    assert re.search(r"^train +62 +62 +2024-09-01 2024-11-02 +50.0%  NO_TRADE 31, 1 31$", text, re.MULTILINE)
    assert re.search(r"^chosen +as above, against 1 31, NO_TRADE 31 in train$", text, re.MULTILINE)
    assert "on which alone each record's loss is" in text and "no second model" in text
    assert re.search(r"^steps +3 of 8 records: 0.4 epochs; micro-batches of 8, ", text, re.MULTILINE)
    assert not (tmp_path / "out").exists()


@needs_real_phi3
def test_the_phi3_recipe_passes_its_preflight_on_the_real_tokenizer(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = words[words.index("--data_files") + 1]
    paths = ["--model_name_or_path", str(REAL_PHI3), "--data_files", files, "--output_dir", str(tmp_path / "out")]
    tuning.run("dpo", ["--config", "preference", "--adapter", "", "--dry_run", *paths])
    text = capsys.readouterr().out
    assert "25,165,824 of 3,846,245,376 are trained" in text
    assert "told apart by their tokens through <|end|>" in text
    assert text.count("that a card of 6 GB leaves") == 2


def test_a_record_longer_than_max_length_stops_the_run_with_the_length_it_needs(words):
    with pytest.raises(RecipeError, match="longer than max_length 50: .* in train, .*would be cut off") as error:
        tuning.run("dpo", [*words, "--max_length", "50", "--dry_run"])
    needed = int(re.search(r"Set max_length to (\d+)", str(error.value))[1])
    tuning.run("dpo", [*words, "--max_length", str(needed), "--dry_run"])
    with pytest.raises(RecipeError, match="longer than max_length"):
        tuning.run("dpo", [*words, "--max_length", str(needed - 1), "--dry_run"])


def test_what_a_model_was_tuned_on_first_and_then_is_what_it_knows():
    first = {"underlyings": ["BTC"], "exit_styles": ["a"], "numbers": {"dte": [1.0, 7.0], "iv": [0.7, 0.7]}}
    then = {"underlyings": ["BTC"], "exit_styles": ["b"], "numbers": {"dte": [3.0, 9.0]}}
    both = {"underlyings": ["BTC"], "exit_styles": ["a", "b"], "numbers": {"dte": [1.0, 9.0], "iv": [0.7, 0.7]}}
    assert train_dpo.on_both(first, then) == both


def test_a_pair_of_a_decision_that_is_in_another_split_is_an_error():
    ranking = Dataset.from_dict({"decision_id": ["a", "b"]})
    pairs = Dataset.from_dict({"decision_id": ["b"], "answers": [["1", "NO_TRADE"]]})
    assert train_dpo.add_pairs("test", ranking, pairs)["pair"] == [None, ["1", "NO_TRADE"]]
    with pytest.raises(RecipeError, match="test: the pair of b belongs to another split"):
        train_dpo.add_pairs("test", ranking.select([0]), pairs)


# --- The reference, and the loss


@pytest.mark.parametrize("quantization, layer", [("int4", bnb.nn.Linear4bit), ("none", torch.nn.Linear)])
def test_at_the_start_from_a_fine_tune_the_loss_is_ln_2(
    quantization, layer, words, start, base, csv_file, tmp_path, monkeypatch
):
    """The reference is the fine-tune itself: against its base without the adapter, the loss would be another."""
    if quantization != "int4":
        start = fine_tune(base, csv_file, tmp_path / "start", "--quantization", quantization)
    trainer = trainer_of(monkeypatch, *words, "--adapter", start, "--beta", "9")
    attention = trainer.model.base_model.model.model.layers[0].self_attn
    assert isinstance(attention.qkv_proj.base_layer, layer)
    batch = batch_of(trainer)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(LN2, abs=1e-4)
    with trainer.model.disable_adapter():
        assert abs(trainer.compute_loss(trainer.model, dict(batch)).item() - LN2) > 1e-2
    assert trainer.evaluate()["eval_dpo_loss"] == pytest.approx(LN2, abs=1e-9)


def test_the_start_is_the_fine_tune_to_the_bit_in_float32_and_nothing_stands_beside_it(words, start, monkeypatch):
    trainer = trainer_of(monkeypatch, *words, "--adapter", start)
    now = {name.replace(".default", ""): p for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert difference(adapter(start), now) == 0
    assert {p.dtype for p in now.values()} == {torch.float32} and all(p.requires_grad for p in now.values())
    assert list(trainer.model.peft_config) == ["default"] and trainer.ref_model is None


def test_the_reference_is_the_log_probability_of_the_answer_through_its_end(words, monkeypatch):
    trainer = trainer_of(monkeypatch, *words, "--quantization", "none")
    tokenizer = trainer.processing_class
    for row in trainer.train_dataset.select(range(6)):
        for side in ("chosen", "rejected"):
            answer = row[f"{side}_ids"]
            assert re.fullmatch(r"(NO_TRADE|\d)<\|end\|>", tokenizer.decode(answer))
            logits = trainer.model(torch.tensor([row["prompt_ids"] + answer])).logits[0, -len(answer) - 1 : -1]
            scores = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            assert row[f"ref_{side}_logps"] == pytest.approx(scores.sum().item(), abs=1e-4)


@pytest.fixture(scope="module")
def moved(home, base, csv_file, start) -> train_dpo.PreferenceTrainer:
    """A trainer whose model has moved away from its start."""
    words = quick_run(base, csv_file, home / "moved")
    more = ["--adapter", start, "--beta", "7", "--use_weighting", "true"]  # TRL 1 then prepares for weights too
    trainer = trainer_of(pytest.MonkeyPatch(), *words, *more)
    trainer.use_weighting = False
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(5)
    trainer.model.train()
    return trainer


def unlike_pairs(trainer) -> list[dict]:
    """Pairs whose prompts and answers are of different lengths; one answer begins as the one against it."""
    one, two, three = trainer.train_dataset.select(range(3))
    return [
        {**one, "prompt_ids": one["prompt_ids"][:90]},
        {**two, "chosen_ids": [9], "rejected_ids": [9, 8, 7, 6]},
        {**three, "prompt_ids": three["prompt_ids"][:150], "chosen_ids": [5, 4, 3, 2, 1]},
    ]


def losses_of(trainer, pairs) -> list[torch.Tensor]:
    """The loss of the pairs, each read in one row; and TRL's own, of two sequences a pair."""
    collate = DataCollatorForPreference(trainer.processing_class.pad_token_id)
    return [
        trainer.compute_loss(trainer.model, train_dpo.PairCollator(trainer.processing_class.pad_token_id)(pairs)),
        DPOTrainer._compute_loss(trainer, trainer.model, collate(pairs), False),
    ]


def gradient(trainer, loss) -> torch.Tensor:
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])


def test_the_loss_is_that_of_the_paper(moved):
    pairs, differences = unlike_pairs(moved), []
    for pair in pairs:
        scores = {}
        for side in ("chosen", "rejected"):
            answer = pair[f"{side}_ids"]
            logits = moved.model(torch.tensor([pair["prompt_ids"] + answer])).logits[0, -len(answer) - 1 : -1]
            scores[side] = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
            scores[side] -= pair[f"ref_{side}_logps"]
        differences.append(scores["chosen"] - scores["rejected"])
    expected = -torch.nn.functional.logsigmoid(7 * torch.stack(differences)).mean().item()
    assert abs(expected - LN2) > 5e-3
    assert losses_of(moved, pairs)[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_types": [name]} for name in ("sigmoid", "ipo", "hinge", "aot", "apo_down", "sft")),
        {"loss_types": ["sigmoid"], "f_divergence_type": "js_divergence"},
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [0.3, 0.7]},
        {"use_weighting": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_loss_gradient_and_metrics_are_those_of_two_sequences_a_pair(settings, moved, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setattr(moved, name, value)
    moved._metrics["train"].clear()
    losses = losses_of(moved, unlike_pairs(moved))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    ours, theirs = (gradient(moved, loss) for loss in losses)
    assert theirs.abs().max() > 1e-3
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    metrics = {name: values for name, values in moved._metrics["train"].items() if name != "num_tokens"}
    assert len(metrics) > 9
    for name, (own, its) in metrics.items():
        assert own == pytest.approx(its, rel=1e-4, abs=5e-5), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_gradient_is_the_same_where_activations_are_computed_twice(reentrant, moved, request):
    pairs, runs = unlike_pairs(moved), []
    expected = gradient(moved, losses_of(moved, pairs)[0])
    moved.model.enable_input_require_grads()
    request.addfinalizer(moved.model.disable_input_require_grads)
    moved.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    request.addfinalizer(moved.model.gradient_checkpointing_disable)
    layer = moved.model.base_model.model.model.layers[0].mlp
    request.addfinalizer(layer.register_forward_pre_hook(lambda *_: runs.append(1)).remove)
    loss = moved.compute_loss(moved.model, train_dpo.PairCollator(0)(pairs))
    assert (gradient(moved, loss) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert len(runs) == 2


def test_a_prompt_is_read_once_for_both_answers_and_logits_are_computed_where_they_are_asked(moved, request):
    read, asked = [], []
    embedding, head = moved.model.get_input_embeddings(), moved.model.get_output_embeddings()
    request.addfinalizer(embedding.register_forward_hook(lambda _, given, __: read.append(given[0])).remove)
    request.addfinalizer(head.register_forward_hook(lambda _, given, __: asked.append(given[0])).remove)
    batch = batch_of(moved)
    moved._metrics["train"].clear()
    before = moved._total_train_tokens
    moved.compute_loss(moved.model, batch)
    pairs = moved.train_dataset.select(list(moved.sampler)[: len(batch["input_ids"])])
    answers = [[len(pair["chosen_ids"]), len(pair["rejected_ids"])] for pair in pairs]
    prompts = [len(pair["prompt_ids"]) for pair in pairs]
    tokens = [prompt + sum(both) - 2 for prompt, both in zip(prompts, answers, strict=True)]
    assert [len(rows) for rows in read] == [len(pairs)] and read[0].shape[1] == max(tokens)
    assert moved._metrics["train"]["num_tokens"] == [before + sum(tokens)]
    assert read[0].numel() < 0.6 * sum(2 * prompt + sum(both) for prompt, both in zip(prompts, answers, strict=True))
    assert [places.shape[:2].numel() for places in asked] == [sum(sum(both) - 1 for both in answers)]


def test_metrics_of_hand_made_pairs():
    two = ["1", "NO_TRADE"]
    split = Dataset.from_dict({"answers": [two] * 3, "pair": [["1", "NO_TRADE"], ["NO_TRADE", "1"], None]})
    start = [Scored([-1.0, -1.0], True)] * 3
    scored = [Scored([-1.0, -3.0], True), Scored([-1.0, -1.5], True), Scored([-9.0, 0.0], True)]
    found = train_dpo.pair_metrics(split, scored, start, beta=0.5)
    assert found["pairs_won"] == 0.5
    assert found["dpo_loss"] == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.25))) / 2)
    assert train_dpo.pair_metrics(split.select([2]), scored[2:], start[2:], beta=0.5) == {}


# --- Training


def result(folder: Path, who: str, split: str = "validation") -> dict:
    return next(r for r in manifest_of(folder)["results"] if (r["split"], r["answers_by"]) == (split, who))


def test_the_answers_that_paid_more_gain_on_the_teachers(words, start, tmp_path, capsys):
    """A market that rises each day past the call that the teacher sells, and never to the other one."""
    rows = []
    for day in range(80):
        spot = 58000 + 400 * day
        market = {"dte": 1.0, "spot": float(spot), "iv": 0.3, "exit_style": "hold_to_expiry", "pnl_vs_hodl": -400.0}
        rows += decision(day, sold=0, strikes=(spot - 2000, spot + 1000), **market)
    files = ["--data_files", write_csv(tmp_path / "rising.csv", rows)]
    longer = ["--max_steps", "20", "--learning_rate", "0.01"]
    tuning.run("dpo", [*words, *longer, *files, "--adapter", str(start)])
    tuned, before = (result(tmp_path / "out", who) for who in ("tuned model", "its start"))
    assert before["pairs_won"] == 0 and before["dpo_loss"] == pytest.approx(LN2)
    assert tuned["pairs_won"] == 1 and tuned["dpo_loss"] < 0.62
    assert (before["accuracy"], tuned["accuracy"]) == (1, 0)
    table = capsys.readouterr().out.split("answers by")[-1]
    for who in ("tuned model", "its start", "its base, untuned"):
        assert re.search(rf"^test +\d+ +\d+  {who} +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", table, re.MULTILINE)
    assert re.search(r"^test +\d+ +\d+  always \w+ +[\d.]+ +[\d.]+ +[\d.]+ +- +-$", table, re.MULTILINE)


@pytest.mark.parametrize("quantization", ["int4", "int8", "none"])
def test_what_is_saved_decides(quantization, words, csv_file, tmp_path):
    tuning.run("dpo", [*words, "--quantization", quantization, "--learning_rate", "0.01"])
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "tokenizer.json", "recipe.yaml", "README.md", "calibration.json"}
    assert "training.png" in names and not names & {"unfinished", "ref", "training_args.bin"}
    policy = Policy.load(folder)
    assert policy.task == "per_decision_ranking" and policy.manifest["quantization"] == quantization
    tuned = [p.abs().max() for name, p in policy.model.named_parameters() if "lora_B" in name]
    assert max(tuned) > 0
    report = ["--model", str(folder), "--output_dir", str(tmp_path / "report"), "--data_files", csv_file]
    assert evaluate_policy.evaluate(evaluate_policy.parse_arguments(report)) == 0
    card = (folder / "README.md").read_text()
    test = result(folder, "tuned model", "test")
    assert f"| {test['accuracy']:.3f} | {test['balanced_accuracy']:.3f} | {test['trade_rate']:.3f} |" in card
    assert "- dpo" in card and "no evidence of profit" in card


def test_evaluation_while_training_goes_to_the_log_and_the_best_step_is_kept(words, start, tmp_path):
    often = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    tuning.run("dpo", [*words, *often, "--load_best_model_at_end", "true", "--adapter", str(start)])
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    evaluated = [entry for entry in state["log_history"] if "eval_dpo_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [1, 2, 3]
    names = {"eval_pairs_won", "eval_accuracy", "eval_balanced_accuracy", "eval_trade_rate", "eval_outside"}
    assert all(names <= entry.keys() for entry in evaluated)
    best = min(evaluated, key=lambda entry: entry["eval_dpo_loss"])
    assert manifest_of(tmp_path / "out")["best_step"] == best["step"]
    kept = adapter(tmp_path / "out" / f"checkpoint-{best['step']}")
    assert difference(adapter(tmp_path / "out"), kept) == 0


# --- Resuming and saving


RESUMED = ["--max_steps", "12", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
RESUMED += ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
RESUMED += ["--disable_dropout", "false", "--collapse_patience", "0", "--save_total_limit", "9"]


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_weights(words, base, csv_file, tmp_path):
    """From a fine-tune with dropout, killed in the second epoch."""
    dropping = fine_tune(base, csv_file, tmp_path / "start", "--lora_dropout", "0.2")
    script, folder = SCRIPT.parent / "train_dpo.py", tmp_path / "out"
    words = [*words, *RESUMED, "--adapter", str(dropping)]
    run = subprocess.Popen(
        [sys.executable, str(script), *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (folder / "checkpoint-8" / "trainer_state.json").exists():
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (folder / "adapter_model.safetensors").exists()
    done = python(script, *words, cwd=tmp_path)
    assert "Going on from" in done.stderr and done.returncode == 0, done.stderr
    assert not unasked(done.stderr)
    tuning.run("dpo", [*words, "--output_dir", str(tmp_path / "whole")])
    assert difference(adapter(folder), adapter(tmp_path / "whole")) == 0
    assert difference(adapter(folder / "checkpoint-2"), adapter(folder)) > 1e-4
    assert manifest_of(folder)["results"] == manifest_of(tmp_path / "whole")["results"]


def test_a_run_is_not_gone_on_with_from_another_start_or_with_other_costs(words, start, tmp_path, monkeypatch):
    words = [*words, "--adapter", changed(start, tmp_path)]
    trainer_of(monkeypatch, *words)
    with pytest.raises(RecipeError, match=r"another run .*recipe.fee: 0.0, now 0.01"):
        tuning.run("dpo", [*words, "--fee", "0.01"])
    weights = tmp_path / "changed" / "adapter_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(PolicyError, match="adapter_model.safetensors is not the file that was saved"):
        tuning.run("dpo", words)
    manifest = manifest_of(weights.parent)
    manifest["files"][weights.name] = hash_of(weights)
    (weights.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match="another run .*start.sha256"):
        tuning.run("dpo", words)


def test_the_manifest_names_the_start_and_the_recipe_can_be_run_again(words, start, base, tmp_path):
    tuning.run("dpo", [*words, "--adapter", str(start), "--beta", "0.2", "--fee", "0.0003"])
    folder = tmp_path / "out"
    manifest = manifest_of(folder)
    assert manifest["start"]["adapter"] == str(start) and manifest["method"] == "dpo"
    assert manifest["base_revision"] == manifest_of(start)["base_revision"]
    assert manifest["splits"]["train"]["records"] == 62
    assert manifest["tuned_on"]["exit_styles"] == ["hold_to_expiry"]
    again = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (again["beta"], again["fee"], again["adapter"]) == (0.2, 0.0003, str(start))
    tuning.run("dpo", ["--config", str(folder / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    assert difference(adapter(folder), adapter(tmp_path / "again")) == 0


def test_a_result_can_be_started_from_again(words, start, tmp_path):
    tuning.run("dpo", [*words, "--adapter", str(start)])
    first = tmp_path / "out"
    tuning.run("dpo", [*words, "--adapter", str(first), "--output_dir", str(tmp_path / "second")])
    assert result(tmp_path / "second", "its start")["pairs_won"] == result(first, "tuned model")["pairs_won"]


# --- Whole runs


def test_an_error_is_one_line_and_a_bad_exit():
    with pytest.raises(SystemExit, match="^error: There is no folder nowhere"):
        train_sft.run(lambda: tuning.run("dpo", ["--config", "tiny_dpo", "--adapter", "nowhere"]))


@needs_real_data
def test_the_tiny_recipe_builds_its_base_and_runs_on_a_real_file(tmp_path, capsys):
    tuning.run("dpo", 
        ["--config", "tiny_dpo", "--data_files", str(REAL_DATA / "*hold*.csv"), *QUICK, *NO_CHECKPOINTS]
        + ["--tiny_base_steps", "3", "--output_dir", str(tmp_path / "out")]
        + ["--model_name_or_path", str(tmp_path / "tiny")]
    )
    assert "tuned model" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
