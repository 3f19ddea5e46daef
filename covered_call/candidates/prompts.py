"""Prompts and answers. Training, evaluation and a live policy all render and read through these functions."""

import datetime
import functools
import hashlib
import json
import random
import re

import numpy as np

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import NO_TRADE, SELL_CALL, SKIP, UTC, Candidate, Decision, LoggedDecision, Outcome


def money(value: float | None, unit: str = "") -> str:
    return "n/a" if value is None else f"{value:.2f}{unit}"


def ratio(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


@functools.lru_cache(maxsize=4096)
def exact(strike: float) -> str:
    """The shortest decimal that is exactly this strike: 63000, 0.55."""
    return np.format_float_positional(strike, trim="-")


def days(dte: float) -> str:
    return str(int(dte)) if dte == int(dte) else f"{dte:.2f}"


def candidate_messages(decision: Decision, candidate: Candidate, hindsight: str = "") -> list[dict]:
    """System and user message that ask for SELL_CALL or SKIP on one candidate of a decision."""
    system = (
        f"You are an automated {decision.underlying} covered-call policy. For each candidate option, decide whether "
        "to SELL_CALL or SKIP based on the state. Do not use hindsight PnL to answer; treat it as teacher labels only."
    )
    user = (
        f"Decision time: {decision.decision_time.isoformat()}\n"
        f"Underlying: {decision.underlying}\n"
        f"Spot price: {money(decision.spot)}\n"
        f"Teacher policy (exit_style): {decision.exit_style}\n"
        f"Candidate option: {candidate.instrument}\n"
        f"  - Strike: {exact(candidate.strike)}\n"
        f"  - DTE (days): {days(candidate.dte)}\n"
        f"  - Delta: {ratio(candidate.delta)}\n"
        f"  - Score: {ratio(candidate.score)}\n"
        f"  - IV: {ratio(candidate.iv)}\n"
        f"  - IV/RV ratio: {ratio(candidate.ivrv_ratio)}\n"
        f"\n{hindsight}"
        "Question: Based only on the information available at decision time (ignore the realized outcome), what "
        "ACTION should the policy take on this candidate? Reply with exactly one token: SELL_CALL or SKIP."
    )
    return chat(system, user)


def ranking_messages(decision: Decision, hindsight: str = "") -> list[dict]:
    """System and user message that ask for 1..N or NO_TRADE over all N candidates, in the order given."""
    system = (
        f"You are an automated {decision.underlying} covered-call strategy. At each decision, you see multiple "
        "candidate options and may either pick exactly one to SELL_CALL or decide NO_TRADE. Choose the single best "
        "candidate index, imitating the teacher policy."
    )
    lines = [
        f"  [{index}] {c.instrument} — Strike: {exact(c.strike)}, DTE: {days(c.dte)}, Delta: {ratio(c.delta)}, "
        f"Score: {ratio(c.score)}\n"
        for index, c in enumerate(decision.candidates, start=1)
    ]
    user = (
        f"Decision time: {decision.decision_time.isoformat()}\n"
        f"Underlying: {decision.underlying}\n"
        f"Spot: {money(decision.spot)}\n"
        f"Teacher policy (exit_style): {decision.exit_style}\n"
        f"Candidates:\n{''.join(lines) or '  (none)' + chr(10)}"
        f"\n{hindsight}"
        "Question: Before seeing the outcome, which candidate index should the policy choose to SELL_CALL? Reply "
        f"with exactly one token: 1, 2, ..., {len(decision.candidates)}, or NO_TRADE."
    )
    return chat(system, user)


def admissible_answers(task: str, candidates: int) -> list[str]:
    """What may be answered to a prompt of a config that shows so many candidates: SELL_CALL and SKIP, or 1..N and
    NO_TRADE."""
    if task == "per_candidate":
        return [SELL_CALL, SKIP]
    return [*map(answer_of, range(candidates)), NO_TRADE]


def answer_of(pick: int | None) -> str:
    """A pick (an index into the candidates from 0, None for no trade) as the answer to a ranking: "3", NO_TRADE."""
    return NO_TRADE if pick is None else str(pick + 1)


def pick_of(answer: str) -> int | None:
    """The pick that an answer to a ranking names; ValueError if it is none."""
    if answer == NO_TRADE:
        return None
    if not re.fullmatch(r"[1-9]\d*", answer, re.ASCII):
        raise ValueError(f"{answer!r} is neither 1..N nor {NO_TRADE}")
    return int(answer) - 1


def order_candidates(decision: Decision, options: CoveredCallCandidatesConfig) -> tuple[Decision, list[int]]:
    """The decision with its candidates in the order that prompts show, and the place that each of them had."""
    candidates = decision.candidates
    order = list(range(len(candidates)))
    if options.candidate_order != "csv":  # a teacher's file is sorted by score: its order gives the answer away
        order.sort(key=lambda i: (candidates[i].instrument, candidates[i].strike))
    if options.candidate_order == "shuffle":
        random.Random(f"{options.seed}|{decision.decision_id}").shuffle(order)
    return decision._replace(candidates=tuple(candidates[i] for i in order)), order


def present_in_order(logged: LoggedDecision, options: CoveredCallCandidatesConfig) -> LoggedDecision:
    """The same with all that goes with each candidate."""
    decision, order = order_candidates(logged.decision, options)
    return LoggedDecision(
        decision,
        None if logged.chosen is None else order.index(logged.chosen),
        tuple(logged.outcomes[i] for i in order),
        tuple(logged.counterfactuals[i] for i in order) if logged.counterfactuals else (),
    )


def candidate_hindsight(outcome: Outcome) -> str:
    """The outcome of a candidate as text. It names the answer: only for corpora that must match the teacher's."""
    return (
        "Risk snapshot (teacher hindsight):\n"
        f"  - Max drawdown on this chain: {money(outcome.max_drawdown_pct, '%')}\n"
        "\n"
        "PnL outcome for this candidate if chosen (teacher hindsight):\n"
        f"  - Reward (USD): {money(outcome.reward)}\n"
        f"  - PnL vs HODL (USD): {money(outcome.pnl_vs_hodl)}\n"
        "\n"
    )


def ranking_hindsight(index: int, outcome: Outcome) -> str:
    """The chosen index (1-based) and its outcome as text; the same warning holds."""
    return (
        "Outcome (teacher hindsight for the chosen candidate only):\n"
        f"  - Chosen candidate index: {index}\n"
        f"  - Reward (USD): {money(outcome.reward)}\n"
        f"  - PnL vs HODL (USD): {money(outcome.pnl_vs_hodl)}\n"
        "\n"
    )


def chat(system: str, user: str) -> list[dict]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def prompt_version() -> str:
    """A hash of what the prompts say and of how they write numbers: a model tuned on one is not asked another."""
    time = datetime.datetime(2024, 9, 1, tzinfo=UTC)
    candidates = (
        Candidate("BTC-08SEP24-63000-C", 63000.0, 7.0, 0.2351, 3.2029, 0.7, 0.9306),
        Candidate("X-0.55-C", 0.55, 7.25, 0.0, -1.0, None, None),
    )
    decision = Decision(time, "BTC", "tp_and_roll", 58466.0, candidates)
    chats = [candidate_messages(decision, candidate) for candidate in candidates]
    chats += [ranking_messages(decision), ranking_messages(decision._replace(candidates=()))]
    return hashlib.sha256(json.dumps([chats, SELL_CALL, SKIP, NO_TRADE]).encode()).hexdigest()[:12]


PROMPT_VERSION = prompt_version()
