"""A tuned model as a decision function: every admissible answer is scored, none is sampled.

Training, evaluation and decisions turn chats into tokens, load models and score answers through this file.
"""

import hashlib
import json
import logging
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
from scoring import MemoryFull, PolicyError, score_answers

# One warning for each 8-bit layer each time it multiplies, of the cast that multiplying in 8 bits begins with.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda r: "inputs will be cast" not in str(r.msg))

QUANTIZATIONS = ("int4", "int8", "none")
MANIFEST, CALIBRATION = "manifest.json", "calibration.json"
CHUNK = 2_000  # decisions whose prompts are in memory at a time


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
    # Not all_special_ids, which knows only the tokens with a role in the tokenizer: Phi-3's <|end|> has none.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
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
    config = {
        "int4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "none": None,
    }[quantization]
    full_before = times_full()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=config,
            device_map={"": "cpu" if sharded else device},
            revision=revision,
        )
    except RuntimeError as error:
        # Transformers raises another error when memory runs out while it quantises, so the allocator is asked too.
        if not isinstance(error, torch.OutOfMemoryError) and times_full() == full_before:
            raise
        raise MemoryFull(
            f"The memory does not hold {name} in {quantization}: close what else uses the GPU, load it in int4, or "
            "take a smaller model."
        ) from error
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


def context_limit(config: PretrainedConfig) -> int | float:
    """The most tokens of a prompt with its answer: all of them must be seen at once, so a sliding window counts."""
    seen = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((tokens for tokens in seen if tokens), default=math.inf)


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
    dtype = half_precision() if device == "cuda" else torch.float32
    liger = manifest["recipe"].get("use_liger_kernel")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not manifest["adapter"]:
        return load_base(str(folder), quantization, dtype, device, liger=liger).eval(), tokenizer, manifest
    revision = pinned_revision(folder, manifest)
    base = load_base(manifest["base_model"], quantization, dtype, device, revision, liger=liger)
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
        batch_tokens: how many tokens are read together; None: what fits in the GPU's free memory. Fewer need less
            memory, and change nothing else.
        candidate_order: "instrument", or "csv" for the order the caller gives; how the prompts show candidates.
    """

    folder: Path
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    manifest: dict
    temperature: float = 1.0
    threshold: float = 0.0
    batch_tokens: int | None = None
    candidate_order: str = field(init=False)

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise PolicyError(f"threshold={self.threshold!r}: give a probability, from 0 to 1.")
        # A model tuned on shuffled candidates takes any order: it gets the one it was evaluated in.
        self.candidate_order = "csv" if self.manifest["recipe"]["candidate_order"] == "csv" else "instrument"

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        quantization: str | None = None,
        threshold: float = 0.0,
        batch_tokens: int | None = None,
    ) -> "Policy":
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
        return cls(Path(folder), model, tokenizer, manifest, temperature, threshold, batch_tokens)

    @property
    def task(self) -> str:
        """ "per_candidate" or "per_decision_ranking": what the model was tuned to answer."""
        return self.manifest["task"]

    def decide(self, decisions: Sequence[covered_call_candidates.Decision]) -> list[Decision]:
        """An answer to each decision. The candidates may come in any order; answers are in the caller's.

        per_candidate: the candidate with the highest P(SELL_CALL), if that is over 0.5, else NO_TRADE with what is
        left of 1. A tie with NO_TRADE is no trade. A decision without candidates is NO_TRADE for certain.

        Raises:
            PolicyError: for a prompt that is too long for the model, or scores that are not finite.
            MemoryFull: if the memory does not even hold one decision.
        """
        return [self._pick(scores) for scores in self.score(decisions)]

    def score(self, decisions: Sequence[covered_call_candidates.Decision]) -> list[torch.Tensor]:
        """The model's own log-probabilities, without temperature, of each admissible answer through its end token.

        Returns:
            For each decision of N candidates, in the caller's order, a float64 tensor: per_candidate of shape (N, 2),
            SELL_CALL before SKIP; per_decision_ranking of shape (1, N + 1), NO_TRADE last, or (0, 1) without any.
        """
        decisions, scores = list(decisions), []
        for start in range(0, len(decisions), CHUNK):
            scores += self._score_chunk(decisions[start : start + CHUNK])
        return scores

    def _score_chunk(self, decisions: list) -> list[torch.Tensor]:
        options = CoveredCallCandidatesConfig(candidate_order=self.candidate_order)
        # In the place of outcomes, which no prompt shows, travel the candidates' places in the caller's order.
        shown = [
            present_in_order(LoggedDecision(decision, None, range(len(decision.candidates))), options)
            for decision in decisions
        ]
        asked = [self._prompts(entry.decision) for entry in shown]
        found = iter(self._score_prompts(asked))
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

    def _score_prompts(self, decisions: list[list[tuple[list[dict], list[str]]]]) -> list[list[float]]:
        """The scores of the answers to each prompt of each decision, one after another."""
        asked = [prompt for prompts in decisions for prompt in prompts]
        if not asked:
            return []
        owners = [number for number, prompts in enumerate(decisions) for _ in prompts]
        prompts = chat_ids(self.tokenizer, [prompt for prompt, _ in asked], add_generation_prompt=True)
        # Answers read alike after every prompt: train_sft.py has checked that before it tuned.
        tokens = answer_tokens(self.tokenizer, asked[0][0], list({a: None for _, answers in asked for a in answers}))
        answers = [[tokens[answer] for answer in given] for _, given in asked]
        check_fits(self.model.config, max(map(len, prompts)) + max(map(len, tokens.values())))
        scored = score_answers(self.model, prompts, answers, owners, self.batch_tokens)
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
    limit = context_limit(config)
    if length > limit:
        raise PolicyError(
            f"A prompt with its answer has {length} tokens, and the model sees {limit}: give fewer candidates a "
            "decision, or tune a model with a longer context."
        )


def calibrate(policy: Policy, logged: Sequence[LoggedDecision]) -> float:
    """Fits the policy's temperature to what the teacher answered, and stores it beside the model for Policy.load.

    The temperature minimises the mean negative log-likelihood (nats) of the teacher's answers
    (https://arxiv.org/abs/1706.04599). It changes probabilities, not which answer a ranking likes best. Take decisions
    that the model was not tuned on: the validation split.

    Raises:
        PolicyError: if no decision has a candidate.
    """
    scores, targets = [], []
    for entry, rows in zip(logged, policy.score([one.decision for one in logged]), strict=True):
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
