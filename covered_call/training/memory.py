"""What fine-tuning takes of a GPU's memory, from shapes alone, and what of it can be given up for speed.

Nothing here is measured on a GPU; `benchmarks/gpu_memory.py` sets what it measures beside these estimates.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig

from covered_call.language_model.scoring import free_memory, scoring_bytes

GIB = 2**30
CONTEXT_GIB = 0.6  # what CUDA itself takes of a GPU
CARD_GIB = {"int4": 6, "int8": 8}  # the cards that the recipes are made for
SHARE_PLANNED = 0.85  # of the memory there is: estimates err, and the allocator loses some to fragments
MICRO_TOKENS = 2_048  # of a micro-batch at most: what is left spares checkpoints; which pays more is not measured
LOGIT_BYTES = 20  # of one logit: in 16 bits and in 32, its softmax, and the gradients of these
# Checkpoint every so many layers, from the fastest to what needs least memory; 0: keep all activations.
CHECKPOINTING = (0, 4, 2, 1)


@dataclass
class ModelSize:
    """Parameters: of the base, of its linear layers but the head, of the largest one, of the adapter, and trained."""

    total: int
    linear: int
    largest: int
    adapter: int
    trainable: int


def count_parameters(config: PretrainedConfig, adapter: LoraConfig | None) -> ModelSize:
    """Counts on a model without storage, so that nothing is read or allocated."""
    with init_empty_weights():
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = base.get_output_embeddings()
    linear = [m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    total = sum(parameter.numel() for parameter in base.parameters())
    if adapter is None:
        return ModelSize(total, sum(linear), max(linear), 0, total)
    adapted = get_peft_model(base, adapter, low_cpu_mem_usage=True)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    return ModelSize(total, sum(linear), max(linear), trained, trained)


@dataclass
class Work:
    """What decides how much memory a step takes.

    Args:
        config: of the model.
        size: as count_parameters says.
        quantization: "int4", "int8" or "none".
        width: bytes of a number of the model's arithmetic: 2, or 4 for float32.
        moment: bytes of each of the optimiser's two moments of a parameter.
        dropout: whether the adapter has any.
        tokens: of the longest sequence that is trained on.
        asked: places of it at which logits are computed.
    """

    config: PretrainedConfig
    size: ModelSize
    quantization: str
    width: int
    moment: int
    dropout: bool
    tokens: int
    asked: int

    def step(self, micro_batch: int, checkpoint_every: int) -> dict[str, float]:
        """GiB of GPU memory at the peak of a step, by part; not the CUDA context.

        Activations: each checkpointed layer's input, the inside of the others, one layer's inside while it is computed
        again, and the gradients in its MLP. It errs upwards: these and the logits do not peak at the same moment.
        """
        layers = self.config.get_text_config().num_hidden_layers
        checkpointed = math.ceil(layers / checkpoint_every) if checkpoint_every else 0
        inside = self.layer_bytes()
        token = checkpointed * self.config.get_text_config().hidden_size * self.width
        token += (layers - checkpointed + bool(checkpointed)) * inside + self.transient_bytes()
        vocabulary = self.config.get_text_config().vocab_size
        return {
            **self.resident(),
            "activations": (micro_batch * self.tokens * token + self.unpacked()) / GIB,
            "logits": micro_batch * self.asked * vocabulary * LOGIT_BYTES / GIB,
        }

    def evaluation(self, tokens: int, asked: int) -> float:
        """GiB while the longest row of answers is scored between two steps: see scoring.scoring_bytes.

        Args:
            tokens: of that row.
            asked: places in it at which logits are computed.
        """
        reading = tokens * scoring_bytes(self.config, self.width, asked / tokens) + self.unpacked()
        return sum(self.resident().values()) + reading / GIB

    def resident(self) -> dict[str, float]:
        """GiB that stay. Weights: 4-bit ones take 4 bits, and 8 bits a block of 64 for its doubly quantised scale
        (QLoRA, https://arxiv.org/abs/2305.14314, section 3); 8-bit ones a byte; what is not linear, and the head, 16
        or 32 bits. Trained parameters: in float32, with their gradients and two Adam moments."""
        weight = {"int4": 0.5 + 1 / 64, "int8": 1.0, "none": float(self.width)}[self.quantization]
        weights = self.size.linear * weight + (self.size.total - self.size.linear) * self.width
        return {"weights": weights / GIB, "trained": self.size.trainable * (4 + 4 + 2 * self.moment) / GIB}

    def unpacked(self) -> int:
        """The largest matrix, which is multiplied in 16 bits."""
        return self.size.largest * self.width if self.quantization != "none" else 0

    def layer_bytes(self) -> int:
        """What one decoder layer keeps of a token for its backward pass, with an adapter on every linear layer.

        Counted tensor by tensor on a small model of Phi-3's proportions (tests/training/test_memory.py does so again):
        the inputs of both norms in float32; the inputs of the adapters, queries, keys and values before and after
        their rotation, and what attention makes of them; gate, up, and both products of the MLP. Dropout keeps what it
        let through, and a byte that says so. Where bitsandbytes multiplies in 8 bits it keeps each input once more.
        """
        text = self.config.get_text_config()
        hidden, inner = text.hidden_size, text.intermediate_size
        inputs = 3 * hidden + inner  # of the four linear layers
        kept = 8 * hidden + (9 * hidden + 4 * inner) * self.width
        kept += inputs * (self.width + 1) if self.dropout else 0
        return kept + (inputs * self.width if self.quantization == "int8" else 0)

    def transient_bytes(self) -> int:
        """What a token's gradients take in the MLP of the layer that they have come to."""
        return 4 * self.config.get_text_config().intermediate_size * self.width


class Plan(NamedTuple):
    """How many records a micro-batch takes, and every how many layers one is checkpointed; 0: none is."""

    micro_batch: int
    checkpoint_every: int


def choose(work: Work, records: int, micro_batch: int | None, checkpoint_every: int | None, gib: float | None) -> Plan:
    """The plan for so much memory: as large a micro-batch as pays, then as few checkpoints as fit.

    Args:
        records: of a step on one GPU; micro-batches divide it evenly.
        micro_batch, checkpoint_every: if already decided.
        gib: None for a CPU, whose memory is not asked for.
    """

    def fits(plan: Plan) -> bool:
        return gib is None or sum(work.step(*plan).values()) <= gib * SHARE_PLANNED

    if micro_batch is None:
        sparing = 1 if checkpoint_every is None else checkpoint_every
        sizes = [size for size in range(records, 1, -1) if not records % size and size * work.tokens <= MICRO_TOKENS]
        micro_batch = next((size for size in sizes if fits(Plan(size, sparing))), 1)
    if checkpoint_every is None:
        checkpoint_every = next((every for every in CHECKPOINTING if fits(Plan(micro_batch, every))), 1)
    return Plan(micro_batch, checkpoint_every)


def memory_there(quantization: str, device: torch.device | None) -> float | None:
    """GiB for training: what is free on this GPU; where the GPU is yet to come, what a card that the recipes are made
    for has; None for a CPU, and for a model that is made for no card in particular.

    Args:
        device: None for a GPU to come.
    """
    if device is None:
        return CARD_GIB[quantization] - CONTEXT_GIB if quantization in CARD_GIB else None
    return free_memory(device) / GIB if device.type == "cuda" else None
