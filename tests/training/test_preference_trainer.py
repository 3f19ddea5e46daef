"""The trainer of preferences: its reference, its loss beside TRL's own, and its metrics."""

import math
import re

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from covered_call.language_model.scoring import Scored
from covered_call.training.preference_trainer import PairCollator, PreferenceTrainer, pair_metrics

from .conftest import adapter, batch_of, difference, fine_tune, pair_run, trainer_of

LN2 = math.log(2)


@pytest.mark.parametrize("quantization, layer", [("int4", bnb.nn.Linear4bit), ("none", torch.nn.Linear)])
def test_at_the_start_from_a_fine_tune_the_loss_is_ln_2(
    quantization, layer, pair_words, start, pair_base, pair_corpus, tmp_path, monkeypatch
):
    """The reference is the fine-tune itself: against its base without the adapter, the loss would be another."""
    if quantization != "int4":
        start = fine_tune(pair_base, pair_corpus, tmp_path / "start", "--quantization", quantization)
    trainer = trainer_of(monkeypatch, "dpo", *pair_words, "--adapter", start, "--beta", "9")
    attention = trainer.model.base_model.model.model.layers[0].self_attn
    assert isinstance(attention.qkv_proj.base_layer, layer)
    batch = batch_of(trainer)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(LN2, abs=1e-4)
    with trainer.model.disable_adapter():
        assert abs(trainer.compute_loss(trainer.model, dict(batch)).item() - LN2) > 1e-2
    assert trainer.evaluate()["eval_dpo_loss"] == pytest.approx(LN2, abs=1e-9)


def test_the_start_is_the_fine_tune_to_the_bit_in_float32_and_nothing_stands_beside_it(pair_words, start, monkeypatch):
    trainer = trainer_of(monkeypatch, "dpo", *pair_words, "--adapter", start)
    now = {name.replace(".default", ""): p for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert difference(adapter(start), now) == 0
    assert {p.dtype for p in now.values()} == {torch.float32} and all(p.requires_grad for p in now.values())
    assert list(trainer.model.peft_config) == ["default"] and trainer.ref_model is None


def test_the_reference_is_the_log_probability_of_the_answer_through_its_end(pair_words, monkeypatch):
    trainer = trainer_of(monkeypatch, "dpo", *pair_words, "--quantization", "none")
    tokenizer = trainer.processing_class
    for row in trainer.train_dataset.select(range(6)):
        for side in ("chosen", "rejected"):
            answer = row[f"{side}_ids"]
            assert re.fullmatch(r"(NO_TRADE|\d)<\|end\|>", tokenizer.decode(answer))
            logits = trainer.model(torch.tensor([row["prompt_ids"] + answer])).logits[0, -len(answer) - 1 : -1]
            scores = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            assert row[f"ref_{side}_logps"] == pytest.approx(scores.sum().item(), abs=1e-4)


@pytest.fixture(scope="module")
def moved(tmp_path_factory, pair_base, pair_corpus, start) -> PreferenceTrainer:
    """A trainer whose model has moved away from its start."""
    words = pair_run(pair_base, pair_corpus, tmp_path_factory.mktemp("moved") / "out")
    more = ["--adapter", start, "--beta", "7", "--use_weighting", "true"]  # TRL 1 then prepares for weights too
    trainer = trainer_of(pytest.MonkeyPatch(), "dpo", *words, *more)
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
        trainer.compute_loss(trainer.model, PairCollator(trainer.processing_class.pad_token_id)(pairs)),
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
    loss = moved.compute_loss(moved.model, PairCollator(0)(pairs))
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
    found = pair_metrics(split, scored, start, beta=0.5)
    assert found["pairs_won"] == 0.5
    assert found["dpo_loss"] == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.25))) / 2)
    assert pair_metrics(split.select([2]), scored[2:], start[2:], beta=0.5) == {}
