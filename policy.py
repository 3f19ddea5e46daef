"""A tuned model as a decision function: every admissible answer is scored, none is sampled.

Training, evaluation and decisions turn chats into tokens, load models and score answers through this file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from jinja2 import TemplateError
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from covered_call_candidates import PROMPT_VERSION

QUANTIZATIONS = ("int4", "int8", "none")
MANIFEST = "manifest.json"
# What a masked attention score is lowered by: its weight is 0 in every precision, and float16 can still hold it.
MASKED = -3e4


class PolicyError(ValueError):
    """A model, its tokenizer or its folder cannot be used as it is; the message says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; its pad token is never the token that ends an answer."""
    tokenizer = AutoTokenizer.from_pretrained(name)
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
            answer with no special token, so that nothing would teach the model to stop.
    """
    try:
        prompts = chat_ids(tokenizer, [chat[:-1] for chat in chats], add_generation_prompt=True)
        wholes = chat_ids(tokenizer, chats)
    except TemplateError as error:
        raise PolicyError(f"The chat template of {tokenizer.name_or_path} refuses this chat: {error}") from None
    special = set(tokenizer.all_special_ids)
    return [(prompt, cut_answer(prompt, whole, special)) for prompt, whole in zip(prompts, wholes, strict=True)]


def chat_ids(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict]], **options) -> list[list[int]]:
    return tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **options)["input_ids"]


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
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict], answers: list[str]
) -> dict[str, tuple[int, ...]]:
    """The token ids of each answer after a prompt, through the end of its turn.

    Raises:
        PolicyError: if one answer's tokens begin another's, so that their scores could not be told apart. The end
            token is what keeps 1 from beginning 10.
    """
    chats = [[*prompt, {"role": "assistant", "content": answer}] for answer in answers]
    tokens = {answer: tuple(ids) for answer, (_, ids) in zip(answers, encode(tokenizer, chats), strict=True)}
    for one, short in tokens.items():
        for other, long in tokens.items():
            if one != other and long[: len(short)] == short:
                raise PolicyError(f"The tokens of the answer {one} begin those of {other}: {short} and {long}.")
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_base(
    name: str, quantization: str, dtype: torch.dtype, device_map: dict | None, revision: str | None = None
) -> PreTrainedModel:
    """A causal language model, its linear layers quantised while they are read.

    Args:
        quantization: "int4" (NF4 with double quantisation, https://arxiv.org/abs/2305.14314), "int8" (LLM.int8(),
            https://arxiv.org/abs/2208.07339) or "none".
        dtype: of what is not quantised, and of the arithmetic.
        device_map: where to put it; None leaves that to FSDP, which also wants 4-bit weights stored as ``dtype``.
    """
    config = {
        "int4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=torch.uint8 if device_map else dtype,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "none": None,
    }[quantization]
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, quantization_config=config, device_map=device_map, revision=revision
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16, bitsandbytes would repack the weights at the first evaluation and round their
            # scales to bfloat16 for good: training would go on from other weights than a resumed run loads.
            module.support_avx512bf16_for_cpu = False
    return model


def base_revision(name: str) -> str | None:
    """The commit of a Hub model; for a local folder, a hash of its configuration and weights."""
    if not os.path.isdir(name):
        return AutoConfig.from_pretrained(name)._commit_hash
    digest = hashlib.sha256()
    for path in sorted(Path(name).iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def read_manifest(folder: str | os.PathLike) -> dict:
    """What a tuned model was made from; raises PolicyError if it cannot be trusted with today's prompts."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise PolicyError(f"{folder} holds no {MANIFEST}: it is no folder that train_sft.py saved.")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not manifest["finished"]:
        raise PolicyError(f"The run in {folder} has not finished: start it again with the same command.")
    if manifest["prompt_version"] != PROMPT_VERSION:
        raise PolicyError(
            f"{folder} was tuned on prompts of version {manifest['prompt_version']}, and covered_call_candidates.py "
            f"now renders version {PROMPT_VERSION}. Tune it again, or go back to the code it was tuned with."
        )
    return manifest


def load_tuned(
    folder: str | os.PathLike, quantization: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict]:
    """A finished fine-tune with its tokenizer and manifest, on the GPU if there is one.

    Args:
        quantization: of the base; default as it was tuned.

    Raises:
        PolicyError: if the run has not finished, the prompts have changed since, or the base is another one.
    """
    manifest = read_manifest(folder)
    quantization = quantization or manifest["quantization"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not manifest["adapter"]:
        return load_base(str(folder), quantization, dtype, {"": device}).eval(), tokenizer, manifest
    name, revision = manifest["base_model"], manifest["base_revision"]
    local = os.path.isdir(name)
    if local and base_revision(name) != revision:
        raise PolicyError(f"The model in {name} is not the one that {folder} was tuned on: its weights have changed.")
    base = load_base(name, quantization, dtype, {"": device}, revision=None if local else revision)
    return PeftModel.from_pretrained(base, folder).eval(), tokenizer, manifest


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


class Scored(NamedTuple):
    """One prompt's answers: their log-probabilities through the end token, in the order they were given, and whether
    the model, left to itself, would greedily write one of them."""

    log_probabilities: list[float]
    in_set: bool


def score_answers(
    model: torch.nn.Module, prompts: list[list[int]], answers: list[list[tuple[int, ...]]], batch_size: int
) -> list[Scored]:
    """Scores every answer of every prompt in one forward pass a prompt, in batches of like length.

    Args:
        prompts: token ids, the generation prompt included.
        answers: for each prompt, the token ids of its admissible answers, end token included.
    """
    model.eval()
    scored: list[Scored | None] = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)  # too much memory shows first
    with tqdm(total=len(prompts), desc="Scoring answers", unit=" prompts", disable=None, leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = by_length[start : start + batch_size]
            results = score_batch(model, [prompts[i] for i in batch], [answers[i] for i in batch])
            for place, result in zip(batch, results, strict=True):
                scored[place] = result
            bar.update(len(batch))
    return scored


@torch.inference_mode()
def score_batch(
    model: torch.nn.Module, prompts: list[list[int]], answers: list[list[tuple[int, ...]]]
) -> list[Scored]:
    """One forward pass: each row is a prompt and, side by side after it, its answers.

    An attention mask lets every answer see the prompt and itself only, at the positions it would have alone. Rows are
    padded on the left, so that all answers, and the prompt's last token, lie in the last columns: only their logits
    are computed.
    """
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    # The last token of an answer predicts nothing, so it is left out.
    ends = [[token for answer in given for token in answer[:-1]] for given in answers]
    rows = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
    width = max(map(len, rows))
    kept = 1 + max(map(len, ends))
    ids, positions = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    branches = torch.full((len(rows), width), -1)  # -1 padding, 0 the prompt, from 1 its answers
    asked = []  # (prompt, answer, column among the kept, token): one for each token of each answer
    for row, (prompt, given) in enumerate(zip(prompts, answers, strict=True)):
        start = width - len(rows[row])
        ids[row, start:] = torch.tensor(rows[row])
        positions[row, start : start + len(prompt)] = torch.arange(len(prompt))
        branches[row, start : start + len(prompt)] = 0
        column = start + len(prompt)
        for index, answer in enumerate(given):
            end = column + len(answer) - 1
            positions[row, column:end] = torch.arange(len(prompt), len(prompt) + len(answer) - 1)
            branches[row, column:end] = index + 1
            columns = [start + len(prompt) - 1, *range(column, end)]
            asked += [(row, index, c - (width - kept), t) for c, t in zip(columns, answer, strict=True)]
            column = end
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    seen &= torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(len(rows), 1, width, width, dtype=like.dtype).masked_fill(~seen[:, None], MASKED)
    logits = model(
        input_ids=ids.to(like.device),
        attention_mask=mask.to(like.device),
        position_ids=positions.to(like.device),
        logits_to_keep=kept,
        use_cache=False,
    ).logits
    at_row, _, at_column, token = torch.tensor(asked, device=logits.device).T
    by_token = logits.float().log_softmax(-1)[at_row, at_column]
    best = by_token.argmax(-1) == token
    by_token = by_token.gather(1, token[:, None])[:, 0]
    return collect(asked, by_token.tolist(), best.tolist(), answers)


def collect(asked: list[tuple], by_token: list[float], best: list[bool], answers: list[list]) -> list[Scored]:
    """Adds up the tokens of each answer."""
    totals = [[0.0] * len(given) for given in answers]
    greedy = [[True] * len(given) for given in answers]
    for (row, index, _, _), log_probability, is_best in zip(asked, by_token, best, strict=True):
        totals[row][index] += log_probability
        greedy[row][index] &= is_best
    return [Scored(total, any(would)) for total, would in zip(totals, greedy, strict=True)]
