"""Estimates of memory, beside the bytes of the tensors that live in a small model of Phi-3's proportions."""

import pytest
import torch
from conftest import on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Phi3Config

from covered_call.language_model import scoring
from covered_call.language_model.loading import load_base
from covered_call.language_model.scoring import collate, lay_out, scoring_bytes
from covered_call.training.memory import CHECKPOINTING, GIB, SHARE_PLANNED, ModelSize, Plan, Work, choose, memory_there

pytestmark = on_the_default_stack  # torch, transformers and peft do it all
HIDDEN, INNER = 384, 1024  # Phi-3-mini's 3072 and 8192, an eighth
QUANTIZATIONS = ("int4", "int8", "none")


def config(layers: int) -> Phi3Config:
    return Phi3Config(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, original_max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, str]:
    """Random models by their layers."""
    made = {}
    for layers in (1, 3):
        made[layers] = str(tmp_path_factory.mktemp("model") / str(layers))
        AutoModelForCausalLM.from_config(config(layers), dtype=torch.bfloat16).save_pretrained(made[layers])
    return made


def adapted(folder: str, quantization: str, dropout: float = 0.0):
    """As it is trained: in bfloat16, its adapter in float32."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(load_base(folder, quantization, torch.bfloat16, "cpu"), lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def step_bytes(folder: str, quantization: str, dropout: float, reentrant: bool | None, tokens: int) -> tuple[int, int]:
    """Bytes alive after the forward pass, and the most during both; ``reentrant`` None: no checkpointing."""
    model = adapted(folder, quantization, dropout).train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with LiveBytes() as bytes_of, torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=torch.randint(3, 500, (1, tokens)), use_cache=False, logits_to_keep=1).logits
        forward = bytes_of.live
        logits.float().sum().backward()
    return forward, bytes_of.peak


def token_bytes(folders: dict, layers: int, *options) -> tuple[float, float]:
    """What one token more adds, weights and what else stays left out."""
    short, long = (step_bytes(folders[layers], *options, tokens) for tokens in (128, 384))
    return tuple((b - a) / 256 for a, b in zip(short, long, strict=True))


def kept_by_a_layer(folders: dict, *options) -> float:
    return (token_bytes(folders, 3, *options)[0] - token_bytes(folders, 1, *options)[0]) / 2


def work(quantization: str, layers: int = 3, dropout: bool = False, tokens: int = 256) -> Work:
    size = ModelSize(total=2_000_000, linear=1_500_000, largest=0, adapter=0, trainable=0)
    return Work(config(layers), size, quantization, 2, 1, dropout, tokens, asked=1)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_what_a_layer_keeps_of_a_token_is_what_lives(folders, quantization, dropout):
    found = kept_by_a_layer(folders, quantization, 0.05 if dropout else 0.0, None)
    # On a CPU dropout keeps two bytes where a GPU keeps one.
    found -= 3 * HIDDEN + INNER if dropout else 0
    assert work(quantization, dropout=dropout).layer_bytes() == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("quantization, reentrant", [("int4", False), ("int8", True), ("none", False)])
def test_a_checkpointed_layer_keeps_its_input_alone(folders, quantization, reentrant):
    """int8 with the reentrant kind: with the other, bitsandbytes holds on to the inputs of its linear layers."""
    assert kept_by_a_layer(folders, quantization, 0.0, reentrant) == 2 * HIDDEN


def test_int8_defeats_checkpointing_that_is_not_reentrant(folders):
    """Why ``settle`` asks for the other kind; once this fails, it need not any more."""
    assert kept_by_a_layer(folders, "int8", 0.0, False) > 2 * HIDDEN + 2 * (3 * HIDDEN + INNER) - 1


@pytest.mark.parametrize("quantization, reentrant", [("int4", None), ("int4", False), ("int8", True), ("int8", None)])
def test_the_peak_of_a_step_is_estimated_within_a_tenth(folders, quantization, reentrant):
    found = token_bytes(folders, 3, quantization, 0.0, reentrant)[1]
    estimated = work(quantization).step(1, 0 if reentrant is None else 1)["activations"] * GIB / 256
    assert estimated == pytest.approx(found, rel=0.10)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_reading_a_token_to_score_takes_what_is_said(folders, quantization):
    model = adapted(folders[3], quantization).eval()

    def peak(tokens: int) -> int:
        row = lay_out([list(range(3, 3 + tokens))], [[(5, 6), (7, 8, 9)]])
        with torch.inference_mode(), LiveBytes() as bytes_of:
            scoring.asked_logits(model, collate([row]))
        return bytes_of.peak

    mask = 2 * (384**2 - 128**2)  # in 16 bits; beside a real model's layers it is nothing
    found = (peak(384) - peak(128) - mask) / 256
    assert scoring_bytes(config(3), width=2, asked=0) == pytest.approx(found, rel=0.10)


# --- Plans


def test_a_larger_memory_is_used_for_larger_batches_and_then_for_fewer_checkpoints():
    one = work("int4", layers=32)
    sums = [sum(one.step(*plan).values()) / SHARE_PLANNED for plan in (Plan(1, 1), Plan(8, 1), Plan(8, 2), Plan(8, 0))]
    assert sums == sorted(sums)
    found = [choose(one, 16, None, None, gib) for gib in (0.0, *(gib * 1.0001 for gib in sums))]
    assert found == [Plan(1, 1), Plan(1, 1), Plan(8, 1), Plan(8, 2), Plan(8, 0)]


@given(
    st.integers(1, 64),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([None, 0, 1]),
    st.one_of(st.none(), st.floats(0, 2)),
    st.integers(1, 3_000),
)
def test_a_plan_keeps_the_records_of_a_step_and_what_was_decided(records, size, every, gib, tokens):
    plan = choose(work("int4", layers=32, tokens=tokens), records, size, every, gib)
    assert plan.checkpoint_every in CHECKPOINTING
    assert size in (None, plan.micro_batch) and every in (None, plan.checkpoint_every)
    if size is None:
        assert records % plan.micro_batch == 0
        assert plan.micro_batch == 1 or plan.micro_batch * tokens <= 2_048
    if gib is None and every is None:
        assert plan.checkpoint_every == 0


def test_a_gpu_to_come_is_a_card_that_the_recipe_is_made_for():
    assert [memory_there(quantization, None) for quantization in QUANTIZATIONS] == [5.4, 7.4, None]
    assert memory_there("int4", torch.device("cpu")) is None


def test_on_a_gpu_it_is_what_is_free_there(monkeypatch):
    monkeypatch.setattr("covered_call.training.memory.free_memory", lambda device: {0: 3, 1: 5}[device.index] * GIB)
    assert [memory_there("int4", torch.device("cuda", index)) for index in (0, 1)] == [3, 5]
