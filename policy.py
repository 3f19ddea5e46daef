"""A tuned model as a decision function: every admissible answer is scored, none is sampled.

Training, evaluation and decisions turn chats into tokens, load models and score answers through this file.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from jinja2 import TemplateError
from peft import PeftModel
from scipy.optimize import minimize_scalar
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import covered_call_candidates
from covered_call_candidates import (
    NO_TRADE,
    PROMPT_VERSION,
    CoveredCallCandidatesConfig,
    LoggedDecision,
    admissible_answers,
    candidate_messages,
    present_in_order,
    ranking_messages,
)

QUANTIZATIONS = ("int4", "int8", "none")
MANIFEST, CALIBRATION = "manifest.json", "calibration.json"
BATCH_SIZE = 16  # prompts scored together
CHUNK = 2_000  # decisions whose prompts are in memory at a time
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
    if quantization not in QUANTIZATIONS:
        raise PolicyError(f"quantization={quantization!r}: choose one of {', '.join(QUANTIZATIONS)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not manifest["adapter"]:
        return load_base(str(folder), quantization, dtype, {"": device}).eval(), tokenizer, manifest
    revision = pinned_revision(folder, manifest)
    base = load_base(manifest["base_model"], quantization, dtype, {"": device}, revision)
    return PeftModel.from_pretrained(base, folder).eval(), tokenizer, manifest


def pinned_revision(folder: str | os.PathLike, manifest: dict) -> str | None:
    """The commit of the base that an adapter was tuned on; None for a folder, whose weights must still be the same."""
    name, revision = manifest["base_model"], manifest["base_revision"]
    if not os.path.isdir(name):
        return revision
    if base_revision(name) != revision:
        raise PolicyError(f"The model in {name} is not the one that {folder} was tuned on: its weights have changed.")
    return None


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
    """Scores every answer of every prompt, each prompt read once, in batches of like length.

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
    """Two forward passes: the prompts but for their last tokens, and then those with, side by side, all answers.

    Of the first only the keys and values are kept. Prompts are padded on the right, where causal attention never
    looks, so that this long pass needs no mask and skips half of its work. In the short one a mask lets each answer
    see its prompt and itself only, at the positions it would have alone; only there are logits computed.
    """
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    bodies = [prompt[:-1] for prompt in prompts]
    past = read_prompts(model, pad(bodies).to(like.device))
    tails, asked = lay_out(prompts, answers)
    ids, positions, branches = (pad(part) for part in zip(*tails, strict=True))
    within = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    within &= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    before = pad([[1] * len(body) for body in bodies])[:, None].expand(-1, ids.shape[1], -1)
    seen = torch.cat([before == 1, within], dim=-1)[:, None]
    logits = model(
        input_ids=ids.to(like.device),
        attention_mask=torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, MASKED).to(like.device),
        position_ids=positions.to(like.device),
        past_key_values=past,
    ).logits
    at_row, _, at_column, token = torch.tensor(asked, device=logits.device).T
    by_token = logits.float().log_softmax(-1)
    best = by_token.argmax(-1)[at_row, at_column] == token
    return collect(asked, by_token[at_row, at_column, token].tolist(), best.tolist(), answers)


class PromptRead(Exception):
    """The cache holds all that a prompt leaves behind."""


class PromptCache(DynamicCache):
    """Ends the forward pass once the last layer's keys and values are in: what that layer makes of them is not needed.

    It keeps all keys, where a cache made for a model with a sliding window would drop some.
    """

    def __init__(self, layers: int):
        super().__init__()
        self.last_layer = layers - 1
        self.reading = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        held = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.reading and layer_idx == self.last_layer:
            raise PromptRead
        return held


def read_prompts(model: torch.nn.Module, ids: torch.Tensor) -> PromptCache:
    """The keys and values of prompts, shape (prompts, tokens), padded on the right."""
    config = next(module.config for module in model.modules() if hasattr(module, "config"))  # DDP's wrapper has none
    past = PromptCache(config.get_text_config().num_hidden_layers)
    # A sharded model must come to the end of its pass, or it would not give back the shards that it has gathered.
    past.reading = not any(isinstance(m, (FullyShardedDataParallel, FSDPModule)) for m in model.modules())
    with contextlib.suppress(PromptRead):
        model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
    past.reading = False
    return past


def pad(rows: list[list[int]]) -> torch.Tensor:
    """The rows as one tensor, with zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)


def lay_out(prompts: list[list[int]], answers: list[list[tuple[int, ...]]]) -> tuple[list[tuple], list[tuple]]:
    """Each prompt's last token with its answers side by side after it, and where in that row each answer is read off.

    Returns:
        For each row its token ids, their positions, and whose they are (0 the prompt, from 1 its answers); and, for
        each token of each answer, (row, answer, column that predicts it, token).
    """
    tails, asked = [], []
    for row, (prompt, given) in enumerate(zip(prompts, answers, strict=True)):
        ids, positions, branches = prompt[-1:], [len(prompt) - 1], [0]
        for index, answer in enumerate(given):
            inner = answer[:-1]  # the last token of an answer predicts nothing, so it is left out
            columns = [0, *range(len(ids), len(ids) + len(inner))]
            asked += [(row, index, column, token) for column, token in zip(columns, answer, strict=True)]
            ids = [*ids, *inner]
            positions += range(len(prompt), len(prompt) + len(inner))
            branches += [index + 1] * len(inner)
        tails.append((ids, positions, branches))
    return tails, asked


def collect(asked: list[tuple], by_token: list[float], best: list[bool], answers: list[list]) -> list[Scored]:
    """Adds up the tokens of each answer."""
    totals = [[0.0] * len(given) for given in answers]
    greedy = [[True] * len(given) for given in answers]
    for (row, index, _, _), log_probability, is_best in zip(asked, by_token, best, strict=True):
        totals[row][index] += log_probability
        greedy[row][index] &= is_best
    return [Scored(total, any(would)) for total, would in zip(totals, greedy, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Deciding


class Decision(NamedTuple):
    """What a policy answers to one decision.

    Args:
        answer: "1" to "N", an index into the candidates in the order the caller gave them, or "NO_TRADE".
        probability: of what the model likes best: the answer, unless it abstained.
        margin: that probability less the runner-up's, 1 where there is none.
        scores: log-probabilities (nats), after the temperature. For per_decision_ranking one for each answer, NO_TRADE
            last; their probabilities add up to 1. For per_candidate P(SELL_CALL) of each candidate, "1" to "N", each
            set against its own SKIP, so that they need not add up to anything.
        abstained: the model would have traded, but with a probability below the threshold.
    """

    answer: str
    probability: float
    margin: float
    scores: dict[str, float]
    abstained: bool


@dataclass
class Policy:
    """A tuned model that decides; ``Policy.load`` makes it from a folder that train_sft.py saved.

    Args:
        manifest: what the model was tuned on; see read_manifest.
        temperature: what scores are divided by before they become probabilities; see calibrate.
        threshold: a trade of lower probability becomes NO_TRADE.
        candidate_order: "instrument", or "csv" for the order the caller gives; how the prompts show candidates.
    """

    folder: Path
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    manifest: dict
    temperature: float = 1.0
    threshold: float = 0.0
    candidate_order: str = field(init=False)

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise PolicyError(f"threshold={self.threshold!r}: give a probability, from 0 to 1.")
        # A model tuned on shuffled candidates takes any order: it gets the one it was evaluated in.
        self.candidate_order = "csv" if self.manifest["recipe"]["candidate_order"] == "csv" else "instrument"

    @classmethod
    def load(cls, folder: str | os.PathLike, quantization: str | None = None, threshold: float = 0.0) -> "Policy":
        """A finished fine-tune, adapter or full model, with its calibration if there is one.

        Args:
            quantization: "int4", "int8" or "none"; default as it was tuned.

        Raises:
            PolicyError: if the folder cannot be used with today's prompts (see load_tuned), or for a threshold or
                quantization that cannot be.
        """
        model, tokenizer, manifest = load_tuned(folder, quantization)
        path = Path(folder) / CALIBRATION
        temperature = json.loads(path.read_text(encoding="utf-8"))["temperature"] if path.is_file() else 1.0
        return cls(Path(folder), model, tokenizer, manifest, temperature, threshold)

    @property
    def task(self) -> str:
        """ "per_candidate" or "per_decision_ranking": what the model was tuned to answer."""
        return self.manifest["task"]

    def decide(
        self, decisions: Sequence[covered_call_candidates.Decision], batch_size: int = BATCH_SIZE
    ) -> list[Decision]:
        """An answer to each decision. The candidates may come in any order; answers are in the caller's.

        per_candidate: the candidate with the highest P(SELL_CALL), if that is over 0.5, else NO_TRADE with what is
        left of 1. A tie with NO_TRADE is no trade. A decision without candidates is NO_TRADE for certain.

        Args:
            batch_size: prompts that are scored together; fewer need less memory, and change nothing else.

        Raises:
            PolicyError: for a prompt that is too long for the model, or scores that are not finite.
        """
        return [self._pick(scores) for scores in self.score(decisions, batch_size)]

    def score(
        self, decisions: Sequence[covered_call_candidates.Decision], batch_size: int = BATCH_SIZE
    ) -> list[torch.Tensor]:
        """The model's own log-probabilities, without temperature, of each admissible answer through its end token.

        Returns:
            For each decision of N candidates, in the caller's order, a float64 tensor: per_candidate of shape (N, 2),
            SELL_CALL before SKIP; per_decision_ranking of shape (1, N + 1), NO_TRADE last, or (0, 1) without any.
        """
        decisions, scores = list(decisions), []
        for start in range(0, len(decisions), CHUNK):
            scores += self._score_chunk(decisions[start : start + CHUNK], batch_size)
        return scores

    def _score_chunk(self, decisions: list, batch_size: int) -> list[torch.Tensor]:
        options = CoveredCallCandidatesConfig(candidate_order=self.candidate_order)
        # In the place of outcomes, which no prompt shows, travel the candidates' places in the caller's order.
        shown = [
            present_in_order(LoggedDecision(decision, None, range(len(decision.candidates))), options)
            for decision in decisions
        ]
        asked = [self._prompts(entry.decision) for entry in shown]
        found = iter(self._score_prompts([prompt for prompts in asked for prompt in prompts], batch_size))
        return [
            self._in_callers_order(torch.tensor([next(found) for _ in prompts], dtype=torch.float64), entry.outcomes)
            for prompts, entry in zip(asked, shown, strict=True)
        ]

    def _prompts(self, decision: covered_call_candidates.Decision) -> list[tuple[list[dict], list[str]]]:
        """Each prompt that the decision takes, with its admissible answers; none if there is nothing to choose."""
        if self.task == "per_candidate":
            return [
                (candidate_messages(decision, one), admissible_answers(one._asdict())) for one in decision.candidates
            ]
        return [(ranking_messages(decision), admissible_answers(decision._asdict()))] if decision.candidates else []

    def _score_prompts(self, asked: list[tuple[list[dict], list[str]]], batch_size: int) -> list[list[float]]:
        if not asked:
            return []
        prompts = chat_ids(self.tokenizer, [prompt for prompt, _ in asked], add_generation_prompt=True)
        # Answers read alike after every prompt: train_sft.py has checked that before it tuned.
        tokens = answer_tokens(self.tokenizer, asked[0][0], list({a: None for _, answers in asked for a in answers}))
        answers = [[tokens[answer] for answer in given] for _, given in asked]
        check_fits(self.model.config, max(map(len, prompts)) + max(map(len, tokens.values())))
        scored = score_answers(self.model, prompts, answers, batch_size)
        if not all(math.isfinite(score) for one in scored for score in one.log_probabilities):
            raise PolicyError("The model's scores are not finite: load it in another quantization, or tune it again.")
        return [one.log_probabilities for one in scored]

    def _in_callers_order(self, scores: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        back = sorted(range(len(places)), key=places.__getitem__)
        if self.task == "per_candidate":
            return scores.reshape(-1, 2)[back]
        return scores.reshape(-1, len(places) + 1)[:, [*back, len(places)]]

    def _pick(self, scores: torch.Tensor) -> Decision:
        """A Decision from one decision's row of ``score``."""
        normalised = (scores / self.temperature).log_softmax(-1)
        if not len(normalised):
            return Decision(NO_TRADE, 1.0, 1.0, {} if self.task == "per_candidate" else {NO_TRADE: 0.0}, False)
        if self.task == "per_candidate":
            picks, no_trade = normalised[:, 0], normalised[normalised[:, 0].argmax(), 1]
        else:
            picks, no_trade = normalised[0, :-1], normalised[0, -1]
        named = {str(index): score for index, score in enumerate(picks.tolist(), start=1)}
        either = {NO_TRADE: no_trade.item(), **named}  # first, so that it wins a tie
        answer, runner_up = sorted(either, key=either.get, reverse=True)[:2]
        probability = math.exp(either[answer])
        abstained = answer != NO_TRADE and probability < self.threshold
        return Decision(
            NO_TRADE if abstained else answer,
            probability,
            probability - math.exp(either[runner_up]),
            named if self.task == "per_candidate" else {**named, NO_TRADE: either[NO_TRADE]},
            abstained,
        )


def check_fits(config: PretrainedConfig, length: int) -> None:
    """Raises PolicyError if a prompt with its answer is longer than what the model attends to at once."""
    seen = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    limit = min((tokens for tokens in seen if tokens), default=math.inf)
    if length > limit:
        raise PolicyError(
            f"A prompt with its answer has {length} tokens, and the model sees {limit}: give fewer candidates a "
            "decision, or tune a model with a longer context."
        )


def calibrate(policy: Policy, logged: Sequence[LoggedDecision], batch_size: int = BATCH_SIZE) -> float:
    """Fits the policy's temperature to what the teacher answered, and stores it beside the model for Policy.load.

    The temperature minimises the mean negative log-likelihood (nats) of the teacher's answers
    (https://arxiv.org/abs/1706.04599). It changes probabilities, not which answer a ranking likes best. Take decisions
    that the model was not tuned on: the validation split.

    Raises:
        PolicyError: if no decision has a candidate.
    """
    scores, targets = [], []
    for entry, rows in zip(logged, policy.score([one.decision for one in logged], batch_size), strict=True):
        for index, row in enumerate(rows):
            scores.append(row)
            if policy.task == "per_candidate":
                targets.append(0 if index == entry.chosen else 1)
            else:
                targets.append(len(row) - 1 if entry.chosen is None else entry.chosen)
    if not scores:
        raise PolicyError("None of the decisions to calibrate on has a candidate: give the validation split.")
    fitted = fit_temperature(scores, targets)
    policy.temperature = fitted["temperature"]
    write_text(policy.folder / CALIBRATION, json.dumps(fitted, indent=2))
    return policy.temperature


def fit_temperature(scores: Sequence[torch.Tensor], targets: Sequence[int]) -> dict[str, float]:
    """The temperature with the least mean negative log-likelihood (nats) of the right answers, and that before it.

    Args:
        scores: for each record the log-probabilities of its admissible answers, shape (answers,).
        targets: for each record the index of the right one.
    """
    padded = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True, padding_value=-math.inf)
    target = torch.tensor(targets)

    def nll(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(padded / math.exp(log_temperature), target).item()

    # Within bounds, for answers that are all right would be made certain by a temperature of 0.
    fitted = minimize_scalar(nll, bounds=(math.log(0.05), math.log(20)), method="bounded")
    return {
        "temperature": math.exp(fitted.x),
        "nll_before": nll(0.0),
        "nll_after": float(fitted.fun),
        "records": len(scores),
    }


def write_text(path: Path, text: str) -> None:
    """Under a temporary name first: the file is whole or not there."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
