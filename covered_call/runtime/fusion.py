"""Which of several proposals is acted on: one policy's alone, what two agree on, the surer one's, or a vote.

A proposal names an instrument, never a place in a list: no order of candidates or of members changes anything. One
that failed is as if it were not there. The sequence and the numbers of the mode "rules" are those of a published
hybrid agent.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import microseconds
from covered_call.candidates.schema import NO_TRADE, CandidatesError, shown
from covered_call.market.teacher import trend_of
from covered_call.runtime.risk import drawdown_of
from covered_call.runtime.state import MarketState, Portfolio, Proposal

MODES = ("llm", "second", "shadow", "agreement", "rules", "regime", "learned", "ensemble")
VOTE, PROBABILITY = "vote", "probability"  # what an ensemble averages
CONFIDENT, DOUBTFUL, UNCERTAIN = 0.9, 0.6, 0.5  # above, up to, and below
REGIME_LLM_WEIGHTS = {"trend": 0.2, "range": 0.7, "neutral": 0.3}
RANGE = 0.05  # of spot from its mean of 50 days
MIN_DISAGREEMENTS = 100
RULE_WIDTH = 1.5  # of a score from its threshold, where the rule is sure
TIE = 1e-12  # what floats round away


@dataclass(frozen=True)
class Fusion:
    """How proposals become one.

    Args:
        mode: one of MODES.
        llm: the source of the language model's proposals.
        second: that of the policy beside it; None for the only other one.
        llm_weight: of the LLM's confidence against the second's, which weighs the rest of 1; mode rules.
        confidence_threshold: an LLM that overrides the second needs this confidence or more.
        weights: of an ensemble's members, by source; who is not named weighs 1.
        average: "vote", confidence times weight for each pick; "probability", the mean of all answers' probabilities,
            of members that have them.

    Raises:
        CandidatesError: for a value that cannot be.
    """

    mode: str = "rules"
    llm: str = "llm"
    second: str | None = None
    llm_weight: float = 0.3
    confidence_threshold: float = 0.7
    weights: Mapping[str, float] = field(default_factory=dict)
    average: str = VOTE

    def __post_init__(self):
        for name, choices in (("mode", MODES), ("average", (VOTE, PROBABILITY))):
            if getattr(self, name) not in choices:
                raise CandidatesError(f"{name}={shown(getattr(self, name))}: choose one of {', '.join(choices)}.")
        for name in ("llm_weight", "confidence_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise CandidatesError(f"{name}={shown(getattr(self, name))}: give a number from 0 to 1.")
        for source, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise CandidatesError(f"weights: {shown(source)} weighs {weight!r}: give a number from 0 on.")


class Fused(NamedTuple):
    """The proposal to act on, how it was come by, and what each source weighed.

    Args:
        learnt_from: of the mode learned, where two disagree: how many disagreements were settled by then; of too few
            nothing is learnt, and ``method`` is one of the mode rules.
    """

    proposal: Proposal
    method: str
    weights: dict[str, float] = {}
    learnt_from: int | None = None


class Disagreements(NamedTuple):
    """Decisions whose proposals differed, with known outcomes, arrays (K,)."""

    features: np.ndarray  # (K, F) as features_of gives them
    llm_won: np.ndarray  # bool, whether the LLM's pick brought more than the second's; no trade brings 0
    settled_at: np.ndarray  # int64, microseconds since 1970, when both outcomes were known


# ---------------------------------------------------------------------------------------------------------------------
# How sure a policy is


def q_confidence(confidence: float, sells: bool) -> float:
    """Of a Q-scorer's answer. confidence: its probability that the best call's outcome is positive, NaN where there is
    none to sell, and no trade is certain."""
    if math.isnan(confidence):
        return 1.0
    return confidence if sells else 1 - confidence


def rule_confidence(best_score: float | None, threshold: float) -> float:
    """Of the rule that sells the best score from a threshold on: 0.5 at it, 1 from RULE_WIDTH away. Without a
    candidate no trade is certain."""
    if best_score is None:
        return 1.0
    return 0.5 + 0.5 * min(1.0, abs(best_score - threshold) / RULE_WIDTH)


# ---------------------------------------------------------------------------------------------------------------------
# The modes


def fuse(
    members: Iterable[Proposal],
    state: MarketState,
    portfolio: Portfolio,
    options: Fusion,
    settled: Disagreements | None = None,
) -> Fused:
    """One proposal of all members', who are told apart by their sources.

    Where a member failed, the other acts, an LLM only from confidence_threshold on; where all did, there is no trade,
    of confidence 0. A proposal of what is not offered has failed.

    Args:
        settled: for the mode learned; those that were not settled by the decision's time are not looked at.

    Raises:
        CandidatesError: where it is not clear which member is the second.
    """
    members = tuple(members)
    offered = {one.instrument for one in state.decision.candidates}
    able = {one.source: one for one in members if answers(one, offered)}
    if options.mode == "ensemble":
        return ensemble(able, offered, options)
    llm, second = able.get(options.llm), able.get(second_source(members, options) or "")
    if options.mode in ("second", "shadow"):
        return alone(second, options.mode) if second else nobody("second_failed")
    if options.mode == "llm" and llm:
        return alone(llm, "llm")
    if llm is None or second is None:
        return what_is_left(llm, second, options)
    if llm.instrument == second.instrument:
        return Fused(second, "agreement", weights_of(llm, second, 0.5))
    if options.mode == "agreement":
        return nobody("disagreement", weights_of(llm, second, 0.5))
    if options.mode == "learned":
        known = settled_by(settled or NONE_SETTLED, state)
        chance = llm_chance(features_of(llm, second, state, portfolio), known)
        by_rules = by_confidence(llm, second, options.llm_weight, options)
        found = by_rules if chance is None else by_chance(llm, second, chance, options)
        return found._replace(learnt_from=len(known.llm_won))
    weight = REGIME_LLM_WEIGHTS[regime_of(state.context)] if options.mode == "regime" else options.llm_weight
    return by_confidence(llm, second, weight, options)


def answers(one: Proposal, offered: set[str]) -> bool:
    """Whether a proposal is one: without an error, of a confidence that is a probability, and of what is offered."""
    return one.error is None and 0 <= one.confidence <= 1 and (one.instrument is None or one.instrument in offered)


def second_source(members: tuple[Proposal, ...], options: Fusion) -> str | None:
    others = sorted({one.source for one in members} - {options.llm})
    if options.second is not None or not others:
        return options.second
    if len(others) > 1:
        raise CandidatesError(f"second: {' and '.join(others)} could each be beside the LLM: name one of them.")
    return others[0]


def alone(one: Proposal, method: str) -> Fused:
    return Fused(one, method, {one.source: 1.0})


def nobody(method: str, weights: dict[str, float] | None = None) -> Fused:
    """No trade, which no member proposed."""
    return Fused(Proposal("fusion", None, 0.0, reason=method), method, weights or {})


def what_is_left(llm: Proposal | None, second: Proposal | None, options: Fusion) -> Fused:
    """Of two members of which one failed, or both."""
    failed = "all_failed" if llm is second is None else "llm_failed" if llm is None else "second_failed"
    if options.mode == "agreement":
        return nobody(failed)
    if second is not None:
        return alone(second, failed)
    if llm is not None and (llm.instrument is None or llm.confidence >= options.confidence_threshold):
        return alone(llm, failed)
    return nobody(failed)


def weights_of(llm: Proposal, second: Proposal, llm_weight: float) -> dict[str, float]:
    return {llm.source: llm_weight, second.source: 1 - llm_weight}


def by_confidence(llm: Proposal, second: Proposal, llm_weight: float, options: Fusion) -> Fused:
    """Of two that differ. A tie is the second's."""
    weights = weights_of(llm, second, llm_weight)
    if second.confidence > CONFIDENT and llm.confidence <= DOUBTFUL:
        return Fused(second, "second_confident", weights)
    if llm.confidence > CONFIDENT and second.confidence <= DOUBTFUL:
        return override(llm, second, "llm_confident", weights, options)
    if llm.confidence < UNCERTAIN and second.confidence < UNCERTAIN:
        return nobody("both_uncertain", weights)
    if llm.confidence * llm_weight - second.confidence * (1 - llm_weight) > TIE:
        return override(llm, second, "llm_weighted", weights, options)
    return Fused(second, "second_weighted", weights)


def override(llm: Proposal, second: Proposal, method: str, weights: dict[str, float], options: Fusion) -> Fused:
    if llm.confidence >= options.confidence_threshold:
        return Fused(llm, method, weights)
    return Fused(second, "llm_below_threshold", weights)


def regime_of(context: Mapping[str, float | None]) -> str:
    """ "trend", "range" or "neutral", from the context's names, which are those of market.teacher.Past; what is not
    known is neutral."""
    distance, month, short_vol, realised_vol = (
        context.get(name) for name in ("distance", "month", "short_vol", "realised_vol")
    )
    if distance is not None and month is not None and trend_of(distance, month) != "sideways":
        return "trend"
    calm = short_vol is not None and realised_vol is not None and short_vol < realised_vol
    return "range" if calm and distance is not None and abs(distance) < RANGE else "neutral"


# ---------------------------------------------------------------------------------------------------------------------
# Learned of past disagreements

NONE_SETTLED = Disagreements(np.zeros((0, 0)), np.zeros(0, bool), np.zeros(0, np.int64))
FEATURES = ("llm_confidence", "second_confidence", "both_sell", "trend", "range", "realised_vol", "drawdown")


def features_of(llm: Proposal, second: Proposal, state: MarketState, portfolio: Portfolio) -> tuple[float, ...]:
    """FEATURES of a disagreement, NaN where unknown. Of two that agree on an instrument there is nothing to learn:
    what they may agree on here is that a call is sold."""
    regime, drawdown = regime_of(state.context), drawdown_of(portfolio)
    realised_vol = state.context.get("realised_vol")
    return (
        llm.confidence,
        second.confidence,
        float(llm.instrument is not None and second.instrument is not None),
        float(regime == "trend"),
        float(regime == "range"),
        math.nan if realised_vol is None else realised_vol,
        math.nan if drawdown is None else drawdown,
    )


def settled_by(settled: Disagreements, state: MarketState) -> Disagreements:
    """What was settled by the decision's time."""
    known = settled.settled_at <= microseconds(state.decision.decision_time)
    return Disagreements(*(values[known] for values in settled))


def llm_chance(features: tuple[float, ...], known: Disagreements) -> float | None:
    """The probability that the LLM's pick beats the second's, by a logistic regression on what is known. None while
    that is too little, or all of one kind."""
    won = known.llm_won
    if len(won) < MIN_DISAGREEMENTS or won.all() or not won.any():
        return None
    from sklearn.impute import SimpleImputer  # only here: no other mode waits for it
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler(), LogisticRegression())
    return float(model.fit(known.features, won).predict_proba([features])[0, 1])


def by_chance(llm: Proposal, second: Proposal, chance: float, options: Fusion) -> Fused:
    weights = weights_of(llm, second, chance)
    if chance > 0.5:
        return override(llm, second, "learned_llm", weights, options)
    return Fused(second, "learned_second", weights)


# ---------------------------------------------------------------------------------------------------------------------
# A vote


def ensemble(able: dict[str, Proposal], offered: set[str], options: Fusion) -> Fused:
    """The pick with the highest score; of equals no trade, then the first by name."""
    weights = {source: float(options.weights.get(source, 1.0)) for source in sorted(able)}
    voters = {source: able[source] for source, weight in weights.items() if weight > 0}
    if not voters:
        return nobody("all_failed", weights)
    if options.average == PROBABILITY:
        return by_probability(voters, offered, weights)
    votes: dict[str | None, list[float]] = {}
    for source, one in voters.items():
        votes.setdefault(one.instrument, []).append(one.confidence * weights[source])
    pick = best_of({name: math.fsum(its) for name, its in votes.items()})
    confidence = math.fsum(one.confidence for one in voters.values()) / len(voters)
    return Fused(Proposal("ensemble", pick, confidence, reason="ensemble"), "ensemble", weights)


def by_probability(voters: dict[str, Proposal], offered: set[str], weights: dict[str, float]) -> Fused:
    """The most probable answer by the mean of all answers' probabilities; an answer that a member did not give one is
    of probability 0 there. Who has none has no vote."""
    known = {source: one.probabilities for source, one in voters.items() if one.probabilities}
    if not known:
        return nobody("no_probabilities", weights)
    weights = {source: weights[source] for source in known}
    means: dict[str | None, float] = {}
    for name in {NO_TRADE, *offered}:
        its = [(weights[source], probabilities.get(name, 0.0)) for source, probabilities in known.items()]
        means[None if name == NO_TRADE else name] = mean_of(its)
    pick = best_of(means)
    runner_up = max((mean for name, mean in means.items() if name != pick), default=0.0)
    proposal = Proposal("ensemble", pick, means[pick], means[pick] - runner_up, reason="ensemble_probability")
    return Fused(proposal, "ensemble_probability", weights)


def mean_of(weighted: list[tuple[float, float]]) -> float:
    return math.fsum(weight * value for weight, value in weighted) / math.fsum(weight for weight, _ in weighted)


def best_of(scores: dict[str | None, float]) -> str | None:
    return min(scores, key=lambda name: (-round(scores[name], 12), name or ""))
