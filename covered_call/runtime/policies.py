"""What each policy proposes: the rule, the Q-scorer, and the language model, which is asked only where that may pay.

Proposals name instruments, not places: the order of candidates changes nothing. A policy that fails makes a proposal
with an ``error``, which never trades; see ``first_that_answers``.
"""

import collections
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import candidate_messages, order_candidates, ranking_messages, shown_to
from covered_call.candidates.schema import Decision
from covered_call.candidates.settlement import ROLL_MIN_SCORE
from covered_call.runtime.answers import Said
from covered_call.runtime.fusion import q_confidence, rule_confidence
from covered_call.runtime.state import MarketState, Portfolio, Proposal
from covered_call.value_model.scorer import NO_CANDIDATE, QScorer

NO_POLICY = "none"  # who decides where every policy has failed
WINS_OF = 50  # the last trades that a win rate is of


class Source(Protocol):
    """A policy as the agent asks it; ``second`` is what the first that is no language model proposes."""

    name: str

    def propose(self, state: MarketState, portfolio: Portfolio, second: Proposal | None = None) -> Proposal: ...


def proposals_of(sources: Sequence[Source], state: MarketState, portfolio: Portfolio) -> list[Proposal]:
    """What each proposes, in their order. A language model is asked after all others, for it depends on what the first
    of them proposes whether it is."""
    others = {one.name: one.propose(state, portfolio) for one in sources if not isinstance(one, LanguageModel)}
    second = next(iter(others.values()), None)
    return [
        one.propose(state, portfolio, second) if isinstance(one, LanguageModel) else others[one.name]
        for one in sources
    ]


def first_that_answers(proposals: Sequence[Proposal]) -> Proposal:
    """The fallback chain: the first without an error; if there is none, no trade."""
    failed = [f"{one.source}: {one.error}" for one in proposals if one.error]
    return next(
        (one for one in proposals if one.error is None), Proposal(NO_POLICY, None, 0.0, reason="; ".join(failed))
    )


# ---------------------------------------------------------------------------------------------------------------------
# The rule and the Q-scorer


class Rule:
    """Sells the best score, of equals the first by instrument and strike, if that is at least the threshold."""

    def __init__(self, threshold: float = ROLL_MIN_SCORE, name: str = "rule"):
        self.threshold, self.name = threshold, name

    def propose(self, state: MarketState, portfolio: Portfolio, second: Proposal | None = None) -> Proposal:
        candidates = sorted(state.decision.candidates, key=lambda one: (one.instrument, one.strike))
        if not candidates:
            return Proposal(self.name, None, 1.0, reason=NO_CANDIDATE)
        best = max(candidates, key=lambda one: one.score)
        confidence = rule_confidence(best.score, self.threshold)
        sold = best.score >= self.threshold
        reason = f"best score {best.score:.4f}, {'at least' if sold else 'below'} {self.threshold:g}"
        its = best.instrument if sold else None
        return Proposal(self.name, its, confidence, reason=reason, best=best.instrument)


class Q:
    """A Q-scorer, which reads its file again when that is replaced."""

    def __init__(self, scorer: QScorer, name: str = "q"):
        self.scorer, self.name = scorer, name

    def propose(self, state: MarketState, portfolio: Portfolio, second: Proposal | None = None) -> Proposal:
        began = time.monotonic()
        try:
            (answer,) = self.scorer.decide([state.decision])
        except Exception as error:  # whatever it is: a policy that fails must not stop the agent
            return failed(self.name, error, began)
        if answer.best is None:
            return Proposal(self.name, None, 1.0, reason=NO_CANDIDATE, latency_s=time.monotonic() - began)
        confidence = q_confidence(answer.confidence, answer.pick is not None)
        reason = answer.stopped_by or f"{answer.q_sell:+,.2f} USD expected"
        best = state.decision.candidates[answer.best].instrument
        return Proposal(
            self.name, answer.instrument, confidence, None, answer.q_sell, reason, time.monotonic() - began, best=best
        )


def failed(name: str, error: Exception | str, began: float) -> Proposal:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Proposal(name, None, 0.0, latency_s=time.monotonic() - began, error=text)


# ---------------------------------------------------------------------------------------------------------------------
# When a language model is asked


class Querying(NamedTuple):
    """When a language model is asked, and what holds where it is not; steps are decisions."""

    confidence_threshold: float = 0.7  # below it the second policy is in doubt
    query_cooldown: int = 3  # steps without a question, whatever the second policy says
    query_interval: int = 5  # steps after which it is asked in any case
    cache_decay: float = 0.8  # of the confidence, each time an answer is used again
    cache_max_age: float = 300.0  # seconds; of answers to the very same prompt
    cache_size: int = 1_000
    timeout_s: float = 30.0
    max_errors: int = 10  # in a row, after which ...
    error_cooldown: int = 100  # ... it is left alone for so many steps


class Standing(NamedTuple):
    """What of a portfolio is a reason to ask again when it changes."""

    positions: tuple
    cash_usd: float
    win_rate: float | None
    losses: int  # in a row


def standing_of(portfolio: Portfolio) -> Standing:
    results = [trade.pnl_usd for trade in portfolio.trades]
    recent = results[-WINS_OF:]
    losses = next((count for count, pnl in enumerate(reversed(results)) if pnl >= 0), len(results))
    held = tuple((one.instrument, one.entry_time) for one in portfolio.positions)
    won = sum(pnl > 0 for pnl in recent) / len(recent) if recent else None
    return Standing(held, portfolio.cash_usd, won, losses)


class Memory(NamedTuple):
    """What is remembered of the last question."""

    proposal: Proposal
    standing: Standing
    steps: int = 0  # since
    reuses: int = 0


def why_ask(
    memory: Memory | None, second: Proposal | None, portfolio: Portfolio, underlying: str, rules: Querying
) -> str | None:
    """The reason to ask the model now; None where its last answer will do."""
    if memory is None:
        return "never asked"
    if memory.standing != standing_of(portfolio):
        return "the portfolio changed"
    if memory.steps < rules.query_cooldown:
        return None
    if memory.steps >= rules.query_interval:
        return f"{memory.steps} steps since"
    if second is None or second.error or second.confidence < rules.confidence_threshold:
        return "the second policy is in doubt"
    if second.instrument is not None and not portfolio.short_units(underlying):
        return "the second policy wants an entry"
    return None


def used_again(memory: Memory, decision: Decision, rules: Querying) -> Proposal:
    """The last answer with less confidence, or no trade where its call is no longer offered."""
    last, times = memory.proposal, memory.reuses + 1
    offered = last.instrument is None or last.instrument in {one.instrument for one in decision.candidates}
    return last._replace(
        instrument=last.instrument if offered else None,
        confidence=last.confidence * rules.cache_decay**times,
        reason=f"not asked, answer {times} step(s) old used again" + ("" if offered else ": no longer offered"),
        latency_s=0.0,
        cached=True,
        probabilities=None,  # they were of another state
        asked=False,
    )


class ExactCache:
    """Answers by key, the latest ``size`` of them, none older than ``max_age`` seconds."""

    def __init__(self, max_age: float, size: int, clock: Callable[[], float] = time.monotonic):
        self.max_age, self.size, self.clock = max_age, size, clock
        self.kept: collections.OrderedDict[Any, tuple[float, Proposal]] = collections.OrderedDict()

    def get(self, key) -> Proposal | None:
        kept_at, proposal = self.kept.get(key, (-math.inf, None))
        return proposal if self.clock() - kept_at <= self.max_age else None

    def put(self, key, proposal: Proposal) -> None:
        self.kept[key] = (self.clock(), proposal)
        self.kept.move_to_end(key)
        while len(self.kept) > self.size:
            self.kept.popitem(last=False)


# ---------------------------------------------------------------------------------------------------------------------
# The language model


class Model(NamedTuple):
    """What tells two models, and two of their prompts, apart."""

    sha: str
    task: str
    candidate_order: str
    context: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: dict) -> "Model":
        """From what read_manifest gives of a tuned model."""
        files = json.dumps(manifest["files"], sort_keys=True)
        order = "csv" if manifest["recipe"].get("candidate_order") == "csv" else "instrument"
        return cls(
            hashlib.sha256(files.encode()).hexdigest(), manifest["task"], order, tuple(manifest.get("context", ()))
        )

    def key_of(self, decision: Decision) -> tuple[str, str]:
        """The hashes of the model and of the prompts that the decision takes."""
        ordered, _ = order_candidates(
            shown_to(decision, self.context), CoveredCallCandidatesConfig(candidate_order=self.candidate_order)
        )
        ranking = self.task != "per_candidate"
        prompts = (
            [ranking_messages(ordered)] if ranking else [candidate_messages(ordered, c) for c in ordered.candidates]
        )
        return self.sha, hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


class LanguageModel:
    """A tuned model, asked at some decisions alone, whose errors and delays the agent survives.

    Args:
        ask: the answer to a decision within some seconds; whatever it raises is an error proposal. TimeoutError says
            that there was none in time. ``Worker.ask`` is one.
        model: of which the exact cache holds answers; None: there is no such cache.
        tell: adds to a decision what else the model is told; whatever it raises is an error proposal, too.
    """

    def __init__(
        self,
        ask: Callable[[Decision], Said],
        rules: Querying | None = None,
        model: Model | None = None,
        name: str = "llm",
        tell: Callable[[Decision], Decision] | None = None,
    ):
        self.tell = tell
        self.ask, self.rules, self.model, self.name = ask, rules or Querying(), model, name
        self.cache = ExactCache(self.rules.cache_max_age, self.rules.cache_size)
        self.memory: dict[str, Memory] = {}  # by underlying
        self.errors_in_a_row = self.left_alone = 0

    def propose(self, state: MarketState, portfolio: Portfolio, second: Proposal | None = None) -> Proposal:
        underlying = state.decision.underlying
        memory = self.memory.get(underlying)
        if memory:
            memory = memory._replace(steps=memory.steps + 1)
            self.memory[underlying] = memory
        if self.left_alone:
            self.left_alone -= 1
            why = f"left alone after {self.rules.max_errors} errors in a row, for {self.left_alone} more step(s)"
            return failed(self.name, why, time.monotonic())._replace(asked=False)
        why = why_ask(memory, second, portfolio, underlying, self.rules)
        if memory and why is None:
            self.memory[underlying] = memory._replace(reuses=memory.reuses + 1)
            return used_again(memory, state.decision, self.rules)
        proposal = self.asked(state.decision, str(why))
        if proposal.error is None:
            self.memory[underlying] = Memory(proposal, standing_of(portfolio))
        return proposal

    def asked(self, decision: Decision, why: str) -> Proposal:
        began = time.monotonic()
        try:
            decision = self.tell(decision) if self.tell else decision
        except Exception as error:
            self.count_error()
            return failed(self.name, error, began)
        key = self.model.key_of(decision) if self.model else None
        found = self.cache.get(key) if key else None
        if found:
            return found._replace(latency_s=time.monotonic() - began, cached=True)
        try:
            said = self.ask(decision)
        except Exception as error:  # whatever it is: a policy that fails must not stop the agent
            self.count_error()
            return failed(self.name, error, began)
        self.errors_in_a_row = 0
        confidence = 1 - said.probability if said.abstained else said.probability
        reason = (
            f"asked: {why}" + (", abstained" if said.abstained else "") + (f"; {said.reason}" if said.reason else "")
        )
        latency = time.monotonic() - began
        proposal = Proposal(self.name, said.instrument, confidence, said.margin, None, reason, latency,
            probabilities=said.probabilities)  # fmt: skip
        if key:
            self.cache.put(key, proposal)
        return proposal

    def count_error(self) -> None:
        self.errors_in_a_row += 1
        if self.errors_in_a_row >= self.rules.max_errors:
            self.errors_in_a_row, self.left_alone = 0, self.rules.error_cooldown
