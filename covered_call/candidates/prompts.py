"""Prompts and answers: of one live decision, or of many in columns, from the same templates."""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covered_call.candidates.columns import CONTEXT_WORDS, OPINION, RECORDED, Columns
from covered_call.candidates.context_lines import (
    OPINION_HEAD,
    OPINION_LINE,
    OPINION_SHORT,
    OPINION_TOLD,
    Texts,
    context_block,
    context_blocks,
    filled,
    opinion_head,
    opinion_heads,
    opinion_text,
    opinion_texts,
)
from covered_call.candidates.number_texts import days, each_distinct, exact, iso_times, money, ratio, ratios
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import (
    NO_TRADE,
    SELL_CALL,
    SKIP,
    UTC,
    Candidate,
    CandidatesError,
    Context,
    Decision,
    Opinion,
)

ROLES = ("system", "user", "assistant")
CANDIDATE_SYSTEM = (
    "You are an automated {underlying} covered-call policy. For each candidate option, decide whether to SELL_CALL or "
    "SKIP based on the state. Do not use hindsight PnL to answer; treat it as teacher labels only."
)
CANDIDATE_MARKET = """\
Decision time: {decision_time}
Underlying: {underlying}
Spot price: {spot}
Teacher policy (exit_style): {exit_style}
{context}"""
CANDIDATE_STATE = """\
Candidate option: {instrument}
  - Strike: {strike}
  - DTE (days): {dte}
  - Delta: {delta}
  - Score: {score}
  - IV: {iv}
  - IV/RV ratio: {ivrv_ratio}
{opinion}
{hindsight}Question: Based only on the information available at decision time (ignore the realized outcome), what \
ACTION should the policy take on this candidate? Reply with exactly one token: SELL_CALL or SKIP."""
RANKING_SYSTEM = (
    "You are an automated {underlying} covered-call strategy. At each decision, you see multiple candidate options "
    "and may either pick exactly one to SELL_CALL or decide NO_TRADE. Choose the single best candidate index, "
    "imitating the teacher policy."
)
RANKING_USER = """\
Decision time: {decision_time}
Underlying: {underlying}
Spot: {spot}
Teacher policy (exit_style): {exit_style}
{context}{opinion}Candidates:
{lines}
{hindsight}Question: Before seeing the outcome, which candidate index should the policy choose to SELL_CALL? Reply \
with exactly one token: 1, 2, ..., {count}, or NO_TRADE."""
RANKING_LINE = (
    "  [{index}] {instrument} — Strike: {strike}, DTE: {dte}, Delta: {delta}, Score: {score}{vols}{opinion}\n"
)
RANKING_VOLS = ", IV: {iv}, IV/RV: {ivrv_ratio}"  # where there is a context, whose vols they stand beside
NO_LINES = "  (none)\n"
# The outcomes as text. They name the answer: only for corpora that must match the teacher's.
CANDIDATE_HINDSIGHT = """\
Risk snapshot (teacher hindsight):
  - Max drawdown on this chain: {max_drawdown_pct}

PnL outcome for this candidate if chosen (teacher hindsight):
  - Reward (USD): {reward}
  - PnL vs HODL (USD): {pnl_vs_hodl}

"""
RANKING_HINDSIGHT = """\
Outcome (teacher hindsight for the chosen candidate only):
  - Chosen candidate index: {index}
  - Reward (USD): {reward}
  - PnL vs HODL (USD): {pnl_vs_hodl}

"""


def candidate_messages(decision: Decision, candidate: Candidate, hindsight: str = "") -> list[dict]:
    """System and user message that ask for SELL_CALL or SKIP on one candidate of a decision."""
    fields = fields_of_market(decision) | fields_of_state(candidate) | {"hindsight": hindsight}
    fields["opinion"] = opinion_of_candidate(decision, candidate, OPINION_LINE, with_day=True)
    return chat(CANDIDATE_SYSTEM.format(**fields), (CANDIDATE_MARKET + CANDIDATE_STATE).format(**fields))


def ranking_messages(decision: Decision, hindsight: str = "") -> list[dict]:
    """System and user message that ask for 1..N or NO_TRADE over all N candidates, in the order given."""
    vols = "" if decision.context is None else RANKING_VOLS
    lines = [
        RANKING_LINE.format(
            index=index,
            vols=vols.format(**fields_of_state(candidate)),
            opinion=opinion_of_candidate(decision, candidate, OPINION_SHORT),
            **fields_of_state(candidate),
        )
        for index, candidate in enumerate(decision.candidates, start=1)
    ]
    fields = {"lines": "".join(lines) or NO_LINES, "count": len(decision.candidates), "hindsight": hindsight}
    fields |= fields_of_market(decision) | {"opinion": opinion_of_decision(decision)}
    return chat(RANKING_SYSTEM.format(**fields), RANKING_USER.format(**fields))


def opinion_of_candidate(decision: Decision, candidate: Candidate, template: str, with_day: bool = False) -> str:
    """Nothing where no opinion is told."""
    if decision.opinion is None:
        return ""
    time, of = decision.opinion
    day = time.date().isoformat() if with_day and time is not None else None
    return template.format(opinion=opinion_text(*of.get(candidate.instrument, (None, None)), day))


def opinion_of_decision(decision: Decision) -> str:
    if decision.opinion is None:
        return ""
    time = decision.opinion.fitted_before
    return OPINION_HEAD.format(opinion=opinion_head(None if time is None else time.date().isoformat()))


def fields_of_market(decision: Decision) -> dict[str, str]:
    return {
        "decision_time": decision.decision_time.isoformat(),
        "underlying": decision.underlying,
        "spot": money(decision.spot),
        "exit_style": decision.exit_style,
        "context": context_block(decision.context),
    }


def fields_of_state(candidate: Candidate) -> dict[str, str]:
    numbers = {name: ratio(getattr(candidate, name)) for name in RATIOS}
    return {
        "instrument": candidate.instrument,
        "strike": exact(candidate.strike),
        "dte": days(candidate.dte),
        **numbers,
    }


RATIOS = ("delta", "score", "iv", "ivrv_ratio")


def chat(system: str, user: str) -> list[dict]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def admissible_answers(task: str, candidates: int) -> list[str]:
    """What may be answered to a prompt of a config that shows so many candidates: SELL_CALL and SKIP, or 1..N and
    NO_TRADE."""
    if task == "per_candidate":
        return [SELL_CALL, SKIP]
    return [*map(answer_of, range(candidates)), NO_TRADE]


def answer_of(pick: int | None) -> str:
    """A pick (an index into the candidates from 0, None for no trade) as the answer to a ranking: "3", NO_TRADE."""
    return NO_TRADE if pick is None else str(pick + 1)


def answers_of(picks: np.ndarray) -> pa.StringArray:
    """The same of (K,) picks, -1 for no trade."""
    return pc.if_else(pa.array(picks < 0), NO_TRADE, pa.array(picks + 1).cast(pa.string()))


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


def present_in_order(columns: Columns, options: CoveredCallCandidatesConfig) -> Columns:
    """The same decisions, the candidates of each in the order that prompts show; the very same where that changes
    nothing."""
    if options.candidate_order == "csv":
        return columns
    rows = by_instrument(columns)
    if options.candidate_order == "shuffle":
        rows = rows[shuffled_places(columns, options.seed)]
    if (rows[1:] > rows[:-1]).all():
        return columns
    its_place = np.empty(len(rows), np.int32)
    its_place[rows] = columns.place
    traded = columns.chosen >= 0
    chosen = columns.chosen.copy()
    chosen[traded] = its_place[columns.offsets[:-1][traded] + chosen[traded]]
    return dataclasses.replace(columns, chosen=chosen).with_rows(rows, columns)


def by_instrument(columns: Columns) -> np.ndarray:
    """(R,) int64: the rows of each decision by instrument, as Python compares text, and then by strike."""
    names = columns.instrument.dictionary_encode()
    rank = np.empty(len(names.dictionary), np.int64)
    rank[pc.sort_indices(names.dictionary)] = np.arange(len(rank))  # by UTF-8 bytes, which is by code points
    return np.lexsort((columns.numbers["strike"], rank[names.indices], columns.decision_of))


def shuffled_places(columns: Columns, seed: int) -> np.ndarray:
    """(R,) int64: each decision's rows by lot; a lot of its own, whatever other decisions there are."""
    rows, ends = np.arange(len(columns.instrument)).tolist(), itertools.pairwise(columns.offsets.tolist())
    shuffled = []
    for key, (start, end) in zip(decision_ids(texts_of_market(columns)).to_pylist(), ends, strict=True):
        its_rows = rows[start:end]
        random.Random(f"{seed}|{key}").shuffle(its_rows)
        shuffled += its_rows
    return np.array(shuffled, np.int64)


def decision_ids(market: dict[str, Texts]) -> pa.StringArray:
    """What Decision.decision_id is, of each."""
    return filled("{underlying}|{decision_time}|{exit_style}", market)


def candidate_chats(
    columns: Columns, market: dict[str, Texts], answers: pa.StringArray, hindsight: bool
) -> pa.ListArray:
    """(R,) the messages of candidate_messages, and the answer to each."""
    rows = pa.array(columns.decision_of)
    heads = filled(CANDIDATE_SYSTEM + CANDIDATE_MARKET, market).take(rows)
    blocks = filled(CANDIDATE_HINDSIGHT, texts_of_outcomes(columns.numbers)) if hindsight else ""
    more = {"head": heads, "hindsight": blocks, "answer": answers, "opinion": ""}
    if OPINION[0] in columns.numbers:
        more["opinion"] = filled(OPINION_LINE, {"opinion": opinion_texts(columns.numbers, days=True)})
    texts = filled("{head}" + CANDIDATE_STATE + "{answer}", texts_of_state(columns, *RATIOS) | more)
    system = lengths(filled(CANDIDATE_SYSTEM, market))[columns.decision_of]
    return cut_chats(texts, system, lengths(answers))


def ranking_chats(
    columns: Columns,
    market: dict[str, Texts],
    answers: pa.StringArray | None,
    hindsight: bool = False,
) -> pa.ListArray:
    """(D,) the messages of ranking_messages and, where there are answers, the answer to each."""
    states = texts_of_state(columns, *(RATIOS if columns.context else RATIOS[:2]))
    vols = filled(RANKING_VOLS, states) if columns.context else ""
    said, head = opinions_of_ranking(columns)
    lines = filled(RANKING_LINE, states | {"index": answers_of(columns.place), "vols": vols, "opinion": said})
    # A decision's lines stand side by side, so that together they are one text.
    offsets = offsets_of(lines)[columns.offsets]
    lines = pa.StringArray.from_buffers(len(columns), pa.py_buffer(offsets), lines.buffers()[2])
    sizes = np.diff(columns.offsets)
    fields = market | {
        "lines": pc.if_else(pa.array(sizes > 0), lines, NO_LINES),
        "count": pa.array(sizes).cast(pa.string()),
        "hindsight": ranking_blocks(columns) if hindsight else "",
        "opinion": head,
    }
    system = lengths(filled(RANKING_SYSTEM, fields))
    if answers is None:
        return cut_chats(filled(RANKING_SYSTEM + RANKING_USER, fields), system)
    texts = filled(RANKING_SYSTEM + RANKING_USER + "{answer}", fields | {"answer": answers})
    return cut_chats(texts, system, lengths(answers))


def opinions_of_ranking(columns: Columns) -> tuple[Texts, Texts]:
    """(R,) what is said of each candidate, and (D,) of each decision; nothing where no opinion is told."""
    if OPINION[0] not in columns.numbers:
        return "", ""
    before, offered = np.full(len(columns), np.nan), np.diff(columns.offsets) > 0
    if offered.any():
        before[offered] = np.fmax.reduceat(columns.numbers[OPINION[2]], columns.offsets[:-1][offered])
    said = filled(OPINION_SHORT, {"opinion": opinion_texts(columns.numbers, days=False)})
    return said, filled(OPINION_HEAD, {"opinion": opinion_heads(before)})


def ranking_blocks(columns: Columns) -> pa.StringArray:
    """(D,) the hindsight of a ranking; nothing where nothing was sold."""
    traded = columns.chosen >= 0
    sold = columns.offsets[:-1][traded] + columns.chosen[traded]
    outcomes = texts_of_outcomes({name: columns.numbers[name][sold] for name in RECORDED})
    blocks = filled(RANKING_HINDSIGHT, outcomes | {"index": answers_of(columns.chosen[traded])})
    return pc.replace_with_mask(pa.array([""] * len(columns), pa.string()), traded, blocks)


def texts_of_market(columns: Columns) -> dict[str, Texts]:
    """(D,) each: what fields_of_market gives for one."""
    names = pa.array(columns.names, pa.string())
    return {
        "decision_time": iso_times(columns.time),
        "underlying": names.take(pa.array(columns.underlying)),
        "spot": each_distinct(columns.spot, money),
        "exit_style": names.take(pa.array(columns.exit_style)),
        "context": context_blocks(columns.context),
    }


def texts_of_state(columns: Columns, *of_ratios: str) -> dict[str, pa.StringArray]:
    """(R,) each: what fields_of_state gives for one, with those of the ratios that are asked for."""
    numbers = columns.numbers
    texts = {name: each_distinct(numbers[name], text) for name, text in (("strike", exact), ("dte", days))}
    return {"instrument": columns.instrument, **texts, **{name: ratios(numbers[name]) for name in of_ratios}}


def texts_of_outcomes(numbers: dict[str, np.ndarray]) -> dict[str, pa.StringArray]:
    """(K,) each, as hindsight shows them."""
    texts = {name: each_distinct(numbers[name], money) for name in ("reward", "pnl_vs_hodl")}
    percent = functools.partial(money, unit="%")
    return texts | {"max_drawdown_pct": each_distinct(numbers["max_drawdown_pct"], percent)}


def lengths(texts: pa.StringArray) -> np.ndarray:
    """(K,) int32, in bytes."""
    return pc.binary_length(texts).to_numpy()


def offsets_of(texts: pa.StringArray) -> np.ndarray:
    """(K + 1,) int32: where each text begins, and the last one ends, in the bytes of them all."""
    return np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]


def cut_chats(texts: pa.StringArray, system: np.ndarray, answer: np.ndarray | None = None) -> pa.ListArray:
    """(K,) chats from the texts of their messages one after another, without a copy.

    Args:
        system: (K,) the bytes of the system message.
        answer: (K,) those of the answer, which ends a text; None if there is none.
    """
    starts = offsets_of(texts)
    begins = [starts[:-1], starts[:-1] + system, *([] if answer is None else [starts[1:] - answer])]
    cuts = np.append(np.column_stack(begins), starts[-1]).astype(np.int32)
    contents = pa.StringArray.from_buffers(len(cuts) - 1, pa.py_buffer(cuts), texts.buffers()[2])
    return chats_of(contents, ROLES[: len(begins)])


def chats_of(contents: pa.StringArray, roles: tuple[str, ...]) -> pa.ListArray:
    """(K,) chats of messages with these roles each, from their contents in a row."""
    place = np.arange(len(contents)) % len(roles)
    messages = pa.StructArray.from_arrays([pa.array(roles).take(pa.array(place)), contents], ["role", "content"])
    ends = np.arange(0, len(contents) + 1, len(roles), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), messages)


def prompt_version(context: Context | None = None, with_opinion: bool = False) -> str:
    """A hash of what the prompts say and of how they write numbers: a model tuned on one is not asked another."""
    time = datetime.datetime(2024, 9, 1, tzinfo=UTC)
    candidates = (
        Candidate("BTC-08SEP24-63000-C", 63000.0, 7.0, 0.2351, 3.2029, 0.7, 0.9306),
        Candidate("X-0.55-C", 0.55, 7.25, 0.0, -1.0, None, None),
    )
    opinion = Opinion(time, {candidates[0].instrument: (0.125, 0.5)}) if with_opinion else None
    decision = Decision(time, "BTC", "tp_and_roll", 58466.0, candidates, context, opinion)
    chats = [candidate_messages(decision, candidate) for candidate in candidates]
    chats += [ranking_messages(decision), ranking_messages(decision._replace(candidates=()))]
    return hashlib.sha256(json.dumps([chats, SELL_CALL, SKIP, NO_TRADE]).encode()).hexdigest()[:12]


PROMPT_VERSION = prompt_version()


def version_with(names: Sequence[str]) -> str:
    """That of prompts that tell what told_names says; PROMPT_VERSION of nothing."""
    if not names:
        return PROMPT_VERSION
    words = {name: said[-1] for name, said in CONTEXT_WORDS.items()}
    context = {name: words.get(name, 0.125) for name in names if name != OPINION_TOLD}
    return prompt_version(context or None, OPINION_TOLD in names)


def shown_to(decision: Decision, names: Sequence[str]) -> Decision:
    """The decision with what a policy was told when it was fitted, see told_names, and nothing beside it.

    Raises:
        CandidatesError: if the decision does not have it.
    """
    context, of_context = decision.context or {}, [name for name in names if name != OPINION_TOLD]
    missing = [name for name in of_context if name not in context]
    if OPINION_TOLD in names and decision.opinion is None:
        raise CandidatesError(
            f"{decision.decision_id}: the policy was fitted with the opinion of a model of outcomes, and here is "
            "none. Load files with opinions; live, give the Q-scorer, too."
        )
    if missing:
        raise CandidatesError(
            f"{decision.decision_id}: the policy was fitted with the market's context, and here {missing[0]} is not "
            "told. Load files with the same options (context, context_columns, context_vols); live, give spots, and "
            "such vols."
        )
    return decision._replace(
        context={name: context[name] for name in of_context} or None,
        opinion=decision.opinion if OPINION_TOLD in names else None,
    )
