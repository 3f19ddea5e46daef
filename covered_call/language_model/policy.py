"""A tuned model as a decision function: every admissible answer is scored, none is sampled."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.optimize import minimize_scalar
from transformers import PreTrainedTokenizerBase

from covered_call import atomic
from covered_call.candidates.columns import EPOCH, Grounds
from covered_call.candidates.explanations import explain
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import (
    admissible_answers,
    answer_of,
    candidate_messages,
    order_candidates,
    ranking_messages,
    shown_to,
)
from covered_call.candidates.schema import NO_TRADE, SELL_CALL, SKIP, Decision, LoggedDecision, checked_decision
from covered_call.language_model.loading import answer_tokens, chat_ids, context_limit, encode, load_tuned
from covered_call.language_model.manifest import (
    CALIBRATION,
    TEMPERATURES,
    PolicyError,
    grounds_in,
    is_temperature,
    read_json,
    read_temperature,
)
from covered_call.language_model.scoring import score_answers
from covered_call.language_model.writing import MOST_WRITTEN, Explanation, write_on

CHUNK = 2_000  # decisions whose prompts are in memory at a time


class Answer(NamedTuple):
    """What a policy answers to one decision.

    Args:
        pick: the candidate to sell, an index from 0 into the candidates in the order the caller gave them; None for no
            trade.
        instrument: the candidate's, None for NO_TRADE.
        probability: of what the model likes best: the answer, unless it abstained.
        margin: that probability less the runner-up's, 1 where there is none.
        scores: log-probabilities (nats), after the temperature. For per_decision_ranking one for each answer, NO_TRADE
            last; their probabilities add up to 1. For per_candidate P(SELL_CALL) of each candidate, "1" to "N", each
            set against its own SKIP, so that they need not add up to anything.
        abstained: the model would have traded, but with a probability below the threshold.
        outside: the numbers, such as "delta", that are at some candidate beyond all that the model was tuned on: of
            those its answer is a guess. The manifest has the ranges, under "tuned_on".
    """

    pick: int | None
    instrument: str | None
    probability: float
    margin: float
    scores: dict[str, float]
    abstained: bool
    outside: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The pick as the answer to a ranking: "1" to "N", or "NO_TRADE"."""
        return answer_of(self.pick)


@dataclass
class Policy:
    """A tuned model that decides; ``Policy.load`` makes it from a folder that a training saved.

    Args:
        manifest: what the model was tuned on; see read_manifest.
        temperature: what scores are divided by before they become probabilities; see fit_temperature.
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
        if not is_temperature(self.temperature):
            low, high = TEMPERATURES
            raise PolicyError(f"temperature={self.temperature!r}: give a number from {low} to {high}.")
        # A model tuned on shuffled candidates takes any order: it gets the one it was evaluated in.
        self.candidate_order = "csv" if self.manifest["recipe"].get("candidate_order") == "csv" else "instrument"

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        quantization: str | None = None,
        threshold: float = 0.0,
        batch_tokens: int | None = None,
        task: str | None = None,
    ) -> "Policy":
        """A finished fine-tune, adapter or full model, with its calibration if there is one.

        Args:
            quantization: "int4", "int8" or "none"; default as it was tuned.
            task: "per_candidate" or "per_decision_ranking", of a model that was tuned on both; default the one that
                its checkpoint was chosen by.

        Raises:
            PolicyError: if the folder cannot be used with today's prompts (see load_tuned), or for a threshold,
                a quantization or a task that cannot be.
        """
        temperature = read_temperature(folder, task)
        model, tokenizer, manifest = load_tuned(folder, quantization, task)
        return cls(Path(folder), model, tokenizer, manifest, temperature, threshold, batch_tokens)

    @property
    def task(self) -> str:
        """ "per_candidate" or "per_decision_ranking": what the model was tuned to answer."""
        return self.manifest["task"]

    def decide(self, decisions: Sequence[Decision | dict]) -> list[Answer]:
        """An answer to each decision, or what Decision.from_dict makes one of. The candidates may come in any order;
        answers are in the caller's.

        per_candidate: the candidate with the highest P(SELL_CALL), if that is over 0.5, else NO_TRADE with what is
        left of 1. A tie with NO_TRADE is no trade. A decision without candidates is NO_TRADE for certain.

        Raises:
            CandidatesError: for a decision that no CSV could hold; see check_decision.
            PolicyError: for an underlying or an exit style that the model was not tuned on, a prompt that is too long
                for it or holds a control token, or scores that are not finite.
            MemoryFull: if the memory does not even hold one decision.
        """
        checked = self._check(decisions)
        return [self._pick(decision, one) for decision, one in zip(checked, self._score(checked), strict=True)]

    def score(self, decisions: Sequence[Decision | dict]) -> list[torch.Tensor]:
        """The model's own log-probabilities, without temperature, of each admissible answer through its end token.

        Returns:
            For each decision of N candidates, in the caller's order, a float64 tensor: per_candidate of shape (N, 2),
            SELL_CALL before SKIP; per_decision_ranking of shape (1, N + 1), NO_TRADE last, or (0, 1) without any.
        """
        return self._score(self._check(decisions))

    def explain(self, decisions: Sequence[Decision | dict]) -> list[Explanation]:
        """What the model writes behind its answer to each decision. The answer is scored, as ``decide`` does it, and
        then stands: no text can change it.

        Raises:
            CandidatesError, MemoryFull: as decide does.
            PolicyError: as decide does, and for a model that was tuned to give answers alone.
        """
        grounds = self._grounds
        if grounds is None:
            raise PolicyError(f"{self.folder} gives answers alone: tune a model with explain: true.")
        checked = self._check(decisions)
        answers = [self._pick(decision, one) for decision, one in zip(checked, self._score(checked), strict=True)]
        asked = [self._asked(decision, one) for decision, one in zip(checked, answers, strict=True)]
        written = iter(self._write([one for one in asked if one.messages]))
        nothing = explain(Decision(EPOCH, "-", "-", 0.0, ()), NO_TRADE, grounds)
        return [one._replace(text=next(written) if one.messages else nothing) for one in asked]

    @property
    def _grounds(self) -> Grounds | None:
        return grounds_in(self.folder, self.manifest)

    def _asked(self, decision: Decision, answer: Answer) -> Explanation:
        """The prompt that an explanation answers, and the answer, as the prompt's order has it."""
        options = CoveredCallCandidatesConfig(candidate_order=self.candidate_order)
        ordered, order = order_candidates(decision, options)
        if not order:
            return Explanation(ordered, None, [], NO_TRADE, "")
        if self.task != "per_candidate":
            pick = None if answer.pick is None else order.index(answer.pick)
            return Explanation(ordered, None, ranking_messages(ordered), answer_of(pick), "")
        best = max(range(len(order)), key=lambda place: answer.scores[answer_of(place)])
        place = order.index(best if answer.pick is None else answer.pick)
        label = SKIP if answer.pick is None else SELL_CALL
        return Explanation(ordered, place, candidate_messages(ordered, ordered.candidates[place]), label, "")

    def _write(self, asked: list[Explanation]) -> list[str]:
        if not asked:
            return []
        prompts = chat_ids(self.tokenizer, [one.messages for one in asked], add_generation_prompt=True)
        labels = list(dict.fromkeys(one.label for one in asked))
        tokens = answer_tokens(self.tokenizer, asked[0].messages, labels, explained=True)
        begun = [[*prompt, *tokens[one.label]] for prompt, one in zip(prompts, asked, strict=True)]
        check_fits(self.model.config, max(map(len, begun)) + MOST_WRITTEN)
        [(_, ended)] = encode(self.tokenizer, [[*asked[0].messages, {"role": "assistant", "content": labels[0]}]])
        written = write_on(self.model, self.tokenizer, begun, ended[-1])
        said = ([*tokens[one.label], *more] for one, more in zip(asked, written, strict=True))
        return [str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip() for ids in said]

    def _check(self, decisions: Iterable[Decision | dict]) -> list[Decision]:
        """The decisions, each as strictly looked at as a CSV row, and of what the model was tuned on."""
        checked = []
        for state in decisions:
            decision = checked_decision(state, self.manifest["recipe"].get("max_iv"))
            decision = shown_to(decision, self.manifest.get("context", []))
            for name in ("underlying", "exit_style"):
                known = self.manifest["tuned_on"][f"{name}s"]
                if getattr(decision, name) not in known:
                    raise PolicyError(
                        f"{decision.decision_id}: the model was tuned on the {name} {', '.join(known)}, and not on "
                        f"{getattr(decision, name)}. Tune one on it, or leave such decisions out."
                    )
            checked.append(decision)
        return checked

    def _outside(self, decision: Decision) -> tuple[str, ...]:
        """The numbers that are at some candidate beyond what the model was tuned on."""
        return tuple(
            name
            for name, (low, high) in self.manifest["tuned_on"]["numbers"].items()
            if not all(low <= value <= high for c in decision.candidates if (value := getattr(c, name)) is not None)
        )

    def _score(self, decisions: list[Decision]) -> list[torch.Tensor]:
        scores = []
        for start in range(0, len(decisions), CHUNK):
            scores += self._score_chunk(decisions[start : start + CHUNK])
        return scores

    def _score_chunk(self, decisions: list[Decision]) -> list[torch.Tensor]:
        options = CoveredCallCandidatesConfig(candidate_order=self.candidate_order)
        ordered = [order_candidates(decision, options) for decision in decisions]
        asked = [self._prompts(decision) for decision, _ in ordered]
        found = iter(self._score_prompts(asked))
        return [
            self._in_callers_order(torch.tensor([next(found) for _ in prompts], dtype=torch.float64), order)
            for prompts, (_, order) in zip(asked, ordered, strict=True)
        ]

    def _prompts(self, decision: Decision) -> list[tuple[list[dict], list[str]]]:
        """Each prompt that the decision takes, with its admissible answers; none if there is nothing to choose."""
        answers = admissible_answers(self.task, len(decision.candidates))
        if self.task == "per_candidate":
            return [(candidate_messages(decision, one), answers) for one in decision.candidates]
        return [(ranking_messages(decision), answers)] if decision.candidates else []

    def _score_prompts(self, decisions: list[list[tuple[list[dict], list[str]]]]) -> list[list[float]]:
        """The scores of the answers to each prompt of each decision, one after another."""
        asked = [prompt for prompts in decisions for prompt in prompts]
        if not asked:
            return []
        owners = [number for number, prompts in enumerate(decisions) for _ in prompts]
        prompts = chat_ids(self.tokenizer, [prompt for prompt, _ in asked], add_generation_prompt=True)
        # Answers read alike after every prompt: the preflight of its training has checked that.
        tokens = answer_tokens(
            self.tokenizer,
            asked[0][0],
            list({a: None for _, answers in asked for a in answers}),
            self._grounds is not None,
        )
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

    def _pick(self, decision: Decision, scores: torch.Tensor) -> Answer:
        """The answer to a decision from its row of ``score``."""
        normalised = (scores / self.temperature).log_softmax(-1)
        if not len(normalised):
            certain = {} if self.task == "per_candidate" else {NO_TRADE: 0.0}
            return Answer(None, None, 1.0, 1.0, certain, False, ())
        if self.task == "per_candidate":
            picks, no_trade = normalised[:, 0], normalised[normalised[:, 0].argmax(), 1]
        else:
            picks, no_trade = normalised[0, :-1], normalised[0, -1]
        either: dict[int | None, float] = {
            None: no_trade.item(),
            **dict(enumerate(picks.tolist())),
        }  # first, so that it wins a tie
        pick, runner_up = sorted(either, key=either.__getitem__, reverse=True)[:2]
        probability = math.exp(either[pick])
        abstained = pick is not None and probability < self.threshold
        if abstained:
            pick = None
        named = {answer_of(index): score for index, score in enumerate(picks.tolist())}
        return Answer(
            pick,
            None if pick is None else decision.candidates[pick].instrument,
            probability,
            probability - math.exp(either[runner_up]),
            named if self.task == "per_candidate" else {**named, NO_TRADE: either[None]},
            abstained,
            self._outside(decision),
        )


def check_fits(config: Any, length: int) -> None:
    """Raises PolicyError if a prompt with its answer is longer than what the model attends to at once."""
    limit = context_limit(config)
    if length > limit:
        raise PolicyError(
            f"A prompt with its answer has {length} tokens, and the model sees {limit}: give fewer candidates a "
            "decision, or tune a model with a longer context."
        )


def fit_temperature(policy: Policy, logged: Sequence[LoggedDecision]) -> float:
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
    fitted = best_temperature(scores, targets)
    policy.temperature = fitted["temperature"]
    atomic.write(policy.folder / CALIBRATION, json.dumps(with_others(policy, fitted), indent=2))
    return policy.temperature


def with_others(policy: Policy, fitted: dict[str, float]) -> dict:
    """A calibration as it is stored; of a model of several tasks, with those of the others."""
    tasks = policy.manifest.get("tasks") or [policy.task]
    if len(tasks) == 1:
        return fitted
    path = policy.folder / CALIBRATION
    stored = read_json(path) if path.exists() else {}
    each = {**stored.get("tasks", {}), policy.task: fitted}
    return {**each.get(tasks[0], {}), "tasks": each}


def best_temperature(scores: Sequence[torch.Tensor], targets: Sequence[int]) -> dict[str, float]:
    """The temperature with the least mean negative log-likelihood (nats) of the right answers, and that before it.

    Args:
        scores: for each record the log-probabilities of its admissible answers, shape (answers,).
        targets: for each record the index of the right one.
    """
    padded = torch.nn.utils.rnn.pad_sequence(list(scores), batch_first=True, padding_value=-math.inf)
    target = torch.tensor(targets)

    def nll(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(padded / math.exp(log_temperature), target).item()

    # Within bounds, for answers that are all right would be made certain by a temperature of 0.
    fitted = minimize_scalar(nll, bounds=tuple(map(math.log, TEMPERATURES)), method="bounded")
    return {
        "temperature": math.exp(fitted.x),
        "nll_before": nll(0.0),
        "nll_after": float(fitted.fun),
        "records": len(scores),
    }
