"""A language model and its tokenizer: chats as token ids, and weights that are quantised while they are read.

Training, evaluation and decisions turn chats into tokens and load models through this file.
"""

import hashlib
import logging
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from jinja2 import TemplateError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from covered_call.candidates.explanations import STRENGTH
from covered_call.candidates.schema import shown
from covered_call.language_model.manifest import QUANTIZATIONS, PolicyError, for_task, read_manifest
from covered_call.language_model.scoring import MemoryFull

# One warning for each 8-bit layer each time it multiplies, of the cast that multiplying in 8 bits begins with.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda r: "inputs will be cast" not in str(r.msg))
# peft asks a model by the old name, each time that an adapter is attached.
warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
ADAPTER = "adapter_model.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; its pad token is never the token that ends an answer."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PolicyError(f"The tokenizer of {name} cannot be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise PolicyError(f"{name} has no chat template: take a model tuned for chat, such as an -instruct one.")
    [(_, answer)] = encode(tokenizer, [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]])
    end = tokenizer.convert_ids_to_tokens(answer[-1])
    for token in (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token):
        if token not in (None, end):
            tokenizer.pad_token = token
            return tokenizer
    raise PolicyError(f"{name} has no token to pad with but {end}, which ends an answer: give its tokenizer one.")


def encode(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
    """For each chat the token ids of its prompt, and of its answer through the token that ends the turn.

    Raises:
        PolicyError: if the chat template takes no such chat, changes the prompt when the answer follows, or ends an
            answer with no special token, so that nothing would teach the model to stop; or for a text in a message
            that the tokenizer reads as a control token.
    """
    prompts = chat_ids(tokenizer, [chat[:-1] for chat in chats], add_generation_prompt=True)
    wholes = chat_ids(tokenizer, chats)
    # Not all_special_ids, which knows only the tokens with a role in the tokenizer: Phi-3's <|end|> has none.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return [(prompt, cut_answer(prompt, whole, special)) for prompt, whole in zip(prompts, wholes, strict=True)]


def chat_ids(tokenizer: Any, chats: list[list[dict]], **options) -> list[list[int]]:
    """The token ids of chats, in which the chat template alone has put control tokens: no message's text has."""
    neutral = {roles_of(chat): [{**message, "content": "x"} for message in chat] for chat in chats}
    try:
        ids = tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **options)["input_ids"]
        plain = tokenizer.apply_chat_template(list(neutral.values()), tokenize=True, return_dict=True, **options)
    except TemplateError as error:
        raise PolicyError(f"The chat template of {tokenizer.name_or_path} refuses this chat: {error}") from None
    control = control_tokens(tokenizer)
    expected = {roles: control_in(row, control) for roles, row in zip(neutral, plain["input_ids"], strict=True)}
    for chat, row in zip(chats, ids, strict=True):
        if strange := control_beside(expected[roles_of(chat)], row, control):
            raise PolicyError(
                f"{shown(chat[-1]['content'])}, or a message before it, holds the text {strange}, which is a control "
                "token of the model: names must not hold it."
            )
    return ids


def roles_of(chat: list[dict]) -> tuple[str, ...]:
    return tuple(message["role"] for message in chat)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that stand for more than their text: the special ones, and those that look it, such as </s>, which
    Phi-3 does not call special, but not the runs of spaces or the words that some tokenizers have beside them."""
    return {
        token: added.content
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special or re.fullmatch(r"[^\w\s].*[^\w\s]", added.content.strip())
    }


def control_in(ids: list[int], control: dict[int, str]) -> list[int]:
    return [token for token in ids if token in control]


def control_beside(template: list[int], ids: list[int], control: dict[int, str]) -> str | None:
    """The control tokens, as text, by which these ids differ from the template's; None if they do not."""
    found = control_in(ids, control)
    if found == template:
        return None
    more, fewer = Counter(found) - Counter(template), Counter(template) - Counter(found)
    return ", ".join(control[token] for token in more or fewer or Counter(found))


def cut_answer(prompt: list[int], whole: list[int], special: set[int]) -> list[int]:
    if whole[: len(prompt)] != prompt:
        raise PolicyError(
            "The model's chat template writes another prompt when an answer follows, so that what is learnt would not "
            "be what is asked. Take a model whose template only adds to the prompt."
        )
    for end, token in enumerate(whole[len(prompt) :], start=len(prompt) + 1):
        if token in special:
            return whole[len(prompt) : end]
    raise PolicyError("The model's chat template ends an answer with no special token. Take another model.")


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict], answers: list[str], explained: bool = False
) -> dict[str, tuple[int, ...]]:
    """The token ids of each answer after a prompt, through the end of its turn, or of its line if it is explained.

    Raises:
        PolicyError: if one answer's tokens begin another's, so that their scores could not be told apart. The end
            token, or the line break, is what keeps 1 from beginning 10.
    """
    more = STRENGTH if explained else ""
    chats = [[*prompt, {"role": "assistant", "content": answer + more}] for answer in answers]
    encoded = [ids[: first_line(tokenizer, ids) if explained else None] for _, ids in encode(tokenizer, chats)]
    tokens = {answer: tuple(ids) for answer, ids in zip(answers, encoded, strict=True)}
    for one, short in tokens.items():
        for other, long in tokens.items():
            if one != other and long[: len(short)] == short:
                raise PolicyError(f"The tokens of the answer {one} begin those of {other}: {short} and {long}.")
    return tokens


def first_line(tokenizer: Any, answer: list[int]) -> int:
    """How many tokens the first line of an answer has, with its line break; all, if there is none."""
    breaks = (place for place, token in enumerate(answer, start=1) if "\n" in tokenizer.decode([token]))
    return next(breaks, len(answer))


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_base(
    name: str,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device | str,
    revision: str | None = None,
    sharded: bool = False,
    liger: bool | None = None,
) -> PreTrainedModel:
    """A causal language model, its linear layers quantised while they are read.

    Args:
        quantization: "int4" (NF4 with double quantisation, https://arxiv.org/abs/2305.14314), "int8" (LLM.int8(),
            https://arxiv.org/abs/2208.07339) or "none".
        dtype: of what is not quantised, and of the arithmetic.
        device: where to put it.
        sharded: FSDP will spread it over the GPUs. It is loaded on the CPU, or each GPU would hold the whole of it
            first; its 4-bit weights are stored as ``dtype``, the only way that FSDP takes them.
        liger: whether Liger's kernels compute norms, rotation and MLP on a GPU; None: where they are installed.

    Raises:
        MemoryFull: if there is no room for it.
        PolicyError: if Liger is asked for and not there.
    """
    model: Any = read_base(name, quantization, dtype, "cpu" if sharded else device, revision, sharded)
    if sharded:
        model.hf_device_map = None  # accelerate would take it for a model that is to stay on the CPU
    if sharded or torch.device(device).type == "cuda":  # Triton compiles nothing for a CPU
        use_liger(model, liger)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16, bitsandbytes would repack the weights at the first evaluation and round their
            # scales to bfloat16 for good: training would go on from other weights than a resumed run loads.
            module.support_avx512bf16_for_cpu = False
    return model


def read_base(
    name: str,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device | str,
    revision: str | None,
    sharded: bool,
) -> PreTrainedModel:
    """The model as transformers reads it, with plain errors."""
    full_before = times_full()
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=bits(quantization, dtype, sharded),
            device_map={"": device},
            revision=revision,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise PolicyError(f"{name} cannot be loaded in {quantization}: {error}") from error
    except RuntimeError as error:
        # Transformers raises another error when memory runs out while it quantises, so the allocator is asked too.
        if not isinstance(error, torch.OutOfMemoryError) and times_full() == full_before:
            raise
        raise MemoryFull(
            f"The memory does not hold {name} in {quantization}: close what else uses the GPU, load it in int4, or "
            "take a smaller model."
        ) from error
    model, loaded = found
    if loaded["missing_keys"]:  # transformers draws them at random, and only warns
        raise PolicyError(f"{name} lacks {few(loaded['missing_keys'])}: download or copy it again.")
    return model


def bits(quantization: str, dtype: torch.dtype, sharded: bool) -> BitsAndBytesConfig | None:
    if quantization == "int4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "int8" else None


def use_liger(model: PreTrainedModel, wanted: bool | None) -> None:
    """Liger's kernels (https://arxiv.org/abs/2410.10989) of what they compute alike, on a GPU: not its losses."""
    if wanted and not is_liger_kernel_available():
        raise PolicyError("use_liger_kernel: liger-kernel is not installed. Run: pip install liger-kernel")
    if wanted is not False and is_liger_kernel_available():
        losses = dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy"), False)
        apply_liger_kernel(model, {**dict.fromkeys(("rope", "rms_norm", "swiglu"), True), **losses})


def times_full() -> int:
    """How often PyTorch has found the GPU's memory full."""
    return torch.cuda.memory_stats().get("num_ooms", 0) if torch.cuda.is_available() else 0


def half_precision() -> torch.dtype:
    """The 16 bits that this GPU computes in, for training and deciding alike: one from before Ampere (2020) only
    emulates bfloat16, slowly."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_config(name: str) -> PretrainedConfig:
    """A model's configuration; PolicyError if transformers does not know such models, for code that comes with one is
    never run."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        raise PolicyError(
            f"{name} is no model that transformers knows by itself, and code that comes with a model is never run "
            "here: take another one."
        ) from error


def few(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first


def context_limit(config: PretrainedConfig) -> int | float:
    """The most tokens of a prompt with its answer: all of them must be seen at once, so a sliding window counts."""
    seen = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((tokens for tokens in seen if tokens), default=math.inf)


def base_revision(name: str) -> str | None:
    """The commit of a Hub model; for a local folder, a hash of its configuration and weights."""
    if not os.path.isdir(name):
        return load_config(name)._commit_hash
    digest = hashlib.sha256()
    for path in sorted(Path(name).iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def load_tuned(
    folder: str | os.PathLike, quantization: str | None = None, task: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, dict]:
    """A finished fine-tune with its tokenizer and manifest, on the GPU if there is one.

    Args:
        quantization: of the base; default as it was tuned.
        task: of those that it was tuned on; the manifest is then that of a model of this task. Default: the first.

    Raises:
        PolicyError: if the run has not finished, the prompts have changed since, the base is another one, or it was
            not tuned on the task.
    """
    manifest = for_task(folder, read_manifest(folder), task)
    quantization = quantization or manifest["quantization"]
    if quantization not in QUANTIZATIONS:
        raise PolicyError(f"quantization={quantization!r}: choose one of {', '.join(QUANTIZATIONS)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = half_precision() if device == "cuda" else torch.float32
    liger = manifest["recipe"].get("use_liger_kernel")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not manifest["adapter"]:
        return load_base(str(folder), quantization, dtype, device, liger=liger).eval(), tokenizer, manifest
    revision = pinned_revision(folder, manifest)
    base = load_base(manifest["base_model"], quantization, dtype, device, revision, liger=liger)
    return load_adapter(base, folder).eval(), tokenizer, manifest


def load_adapter(base: PreTrainedModel, folder: str | os.PathLike) -> PeftModel:
    try:
        model = PeftModel.from_pretrained(base, folder)
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"The adapter in {folder} cannot be read: {error}") from error
    check_adapter(model, folder)
    return model


def check_adapter(model: PeftModel, folder: str | os.PathLike) -> None:
    """Raises PolicyError unless the adapter in a folder has exactly the model's tensors: PEFT leaves what lacks as it
    was drawn, and only warns."""
    with safe_open(Path(folder) / ADAPTER, "pt") as file:
        differ = get_peft_model_state_dict(model, save_embedding_layers=False).keys() ^ file.keys()
    if differ:
        raise PolicyError(f"{Path(folder) / ADAPTER} and its model differ in {few(differ)}: tune the model again.")


def pinned_revision(folder: str | os.PathLike, manifest: dict) -> str | None:
    """The commit of the base that an adapter was tuned on; None for a folder, whose weights must still be the same."""
    name, revision = manifest["base_model"], manifest["base_revision"]
    if not os.path.isdir(name):
        return revision
    if base_revision(name) != revision:
        raise PolicyError(f"The model in {name} is not the one that {folder} was tuned on: its weights have changed.")
    return None
