"""The trainers: the loss, what stops them, their metrics, and the model that they load."""

import json
import logging
import math
import re
import shutil

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import TrainerControl, TrainerState

from covered_call import tuning
from covered_call.language_model import loading
from covered_call.language_model.manifest import PolicyError
from covered_call.language_model.scoring import MemoryFull, Scored
from covered_call.training import sft
from covered_call.training.examples import IGNORE
from covered_call.training.recipe import TrainingArguments
from covered_call.training.runs import RecipeError, TrainingStopped
from covered_call.training.trainers import AnswerTrainer, StopOnTrouble, answer_metrics, load_model

from .conftest import OFTEN, adapter, batch_of, difference, parse, trainer_of


@pytest.mark.parametrize(
    "quantization, layer", [("int4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt), ("none", torch.nn.Linear)]
)
def test_the_base_is_quantised_as_asked_and_the_adapter_is_float32(words, monkeypatch, quantization, layer):
    trainer = trainer_of(monkeypatch, "sft", *words, "--quantization", quantization)
    attention = trainer.model.base_model.model.model.layers[0].self_attn
    assert isinstance(attention.qkv_proj.base_layer, layer)
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    linear = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained}
    assert linear == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("name", ["per_candidate", "per_decision_ranking"])
def test_only_the_answer_and_its_end_carry_loss(words, monkeypatch, name):
    trainer = trainer_of(monkeypatch, "sft", *words, "--dataset_config", name)
    for labels in batch_of(trainer)["labels"]:
        learnt = trainer.processing_class.decode(labels[labels != IGNORE])
        assert re.fullmatch(r"(SELL_CALL|SKIP|NO_TRADE|\d)<\|end\|>", learnt)


@pytest.mark.parametrize("balance", ["none", "weight"])
def test_the_loss_is_that_of_full_logits(words, monkeypatch, balance):
    trainer = trainer_of(monkeypatch, "sft", *words, "--balance", balance)
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
    trainer = trainer_of(monkeypatch, "sft", *words, "--dataset_config", "per_decision_ranking")
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
            monkeypatch, "sft", *words, *more, "--max_steps", "1", "--learning_rate", "0", "--max_grad_norm", "0"
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


# --- What stops a run


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
        tuning.run("sft", [*words, "--max_steps", "30", "--per_device_train_batch_size", "2"])


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


def test_of_several_tasks_the_one_that_collapsed_is_named():
    state = TrainerState(log_history=[{"eval_ranking_answers_used": 3, "eval_candidate_answers_used": 1}] * 3)
    with pytest.raises(TrainingStopped, match="every candidate answer was the same"):
        StopOnTrouble().on_evaluate(type("Arguments", (), {"collapse_patience": 3}), state, TrainerControl())


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
    tuning.run("sft", [*words, *OFTEN, "--report_to", "tensorboard"])
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


# --- Several GPUs, full ones, and what is loaded


def test_a_model_that_is_to_be_sharded_is_loaded_on_the_cpu(words, monkeypatch):
    monkeypatch.setattr("covered_call.training.trainers.is_fsdp_enabled", lambda: True)
    model, data, training = parse(*words)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda", 1))
    sharded, _ = load_model(model, training)
    assert {parameter.device.type for parameter in sharded.parameters()} == {"cpu"}
    assert not sharded.hf_device_map  # accelerate refuses a quantised model that is mapped to another device
    weight = sharded.model.layers[0].self_attn.qkv_proj.weight
    assert weight.dtype == torch.float32 and weight.quant_state is not None  # 4 bits inside what FSDP can flatten


def test_int8_is_refused_under_fsdp_before_anything_is_read(words, monkeypatch):
    monkeypatch.setattr("covered_call.training.examples.is_fsdp_enabled", lambda: True)
    monkeypatch.setattr(sft, "load", lambda *_: pytest.fail("it went on"))
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


def test_ligers_kernels_are_taken_on_a_gpu_where_they_are_installed_and_its_losses_never(corpus_base, monkeypatch):
    applied = []
    monkeypatch.setattr(loading, "apply_liger_kernel", lambda model, kernels: applied.append(kernels))
    with pytest.raises(PolicyError, match="liger-kernel is not installed. Run: pip install"):
        loading.use_liger(None, True)
    loading.use_liger(None, None)
    assert not applied
    monkeypatch.setattr(loading, "is_liger_kernel_available", lambda: True)
    loading.load_base(str(corpus_base), "none", torch.float32, "cpu")
    loading.use_liger(None, False)
    assert not applied
    loading.use_liger(None, None)
    assert [name for name, on in applied[0].items() if on] == ["rope", "rms_norm", "swiglu"]
    assert [name for name, on in applied[0].items() if not on] == ["cross_entropy", "fused_linear_cross_entropy"]
    assert parse("--config", "tiny", "--use_liger_kernel", "false")[2].liger is False
    assert parse("--config", "tiny")[2].use_liger_kernel is False  # TRL's own way would take its losses


def test_a_paged_optimiser_that_was_loaded_is_paged_again(words, tmp_path, monkeypatch):
    """bitsandbytes ends the process when it prefetches what is marked as paged and lies in plain memory."""
    trainer = trainer_of(monkeypatch, "sft", *words)
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
