"""Prompts that name their answer: how they are found, whatever their words."""

import collections
import dataclasses
import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covered_call.candidates.analogues import analogues_of, pool_of
from covered_call.candidates.columns import COUNTERFACTUAL, LOGGED, OPINION, Columns, columns_of
from covered_call.candidates.context_lines import ANALOGUES
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import present_in_order
from covered_call.candidates.records import FEATURES, RECORDS, batches
from covered_call.candidates.schema import NO_TRADE, SELL_CALL, SKIP, Decision, LoggedDecision

PROMPTED = tuple(name for name, features in FEATURES.items() if {"messages", "prompt"} & features.keys())
# What CANDIDATE_HINDSIGHT and RANKING_HINDSIGHT of prompts write.
CHOSEN_INDEX = re.compile(r"Chosen candidate index: (\d+)")
REWARD = re.compile(r"Reward \(USD\): (\S+)")
# As a word of its own: what holds it as a part, such as SKIPPER, names no answer.
ANSWER_IN_NAME = re.compile(rf"(?<![A-Za-z])({SELL_CALL}|{SKIP}|{NO_TRADE})(?![A-Za-z])", re.IGNORECASE)


class Corpus(NamedTuple):
    """The prompts of a split with their answers (none for pairs to prefer between), and the decisions they were
    rendered from."""

    prompts: list[str]
    answers: list[str]
    decision_ids: list[str]  # of each prompt
    entries: list[LoggedDecision]


def render_splits(splits: dict[str, list[LoggedDecision]], config: CoveredCallCandidatesConfig) -> dict[str, Corpus]:
    """The corpora of ``config.name``, one of PROMPTED; an empty split has none."""
    return {name: render(entries, config) for name, entries in splits.items() if entries}


def render(entries: list[LoggedDecision], config: CoveredCallCandidatesConfig) -> Corpus:
    """Of the decisions that have a candidate: the prompts of others hold no name and no number to leak."""
    entries = [entry for entry in entries if entry.decision.candidates]
    return Corpus(*render_columns(columns_of(entries), config), entries)


def render_columns(columns: Columns, config: CoveredCallCandidatesConfig) -> tuple[list[str], list[str], list[str]]:
    """The prompts of a config, their answers, and the ids of their decisions."""
    prompts, answers, ids = [], [], []
    for batch in batches(present_in_order(columns, config)):
        records = RECORDS[config.name](batch, config)
        prompts += prompts_of(records)
        answers += records["label"].to_pylist() if "label" in records.schema.names else []
        ids += records["decision_id"].to_pylist()
    return prompts, answers, ids


def prompts_of(records: pa.Table) -> list[str]:
    """What the user asks in each record: of a chat, or of a prompt with the replies to prefer between."""
    column = records["messages" if "messages" in records.schema.names else "prompt"].combine_chunks()
    if pa.types.is_string(column.type):
        return column.to_pylist()
    by_user = pc.equal(column.values.field("role"), "user")
    ends = np.concatenate([[0], np.cumsum(by_user.to_numpy(zero_copy_only=False))])[column.offsets]
    contents = column.values.field("content").filter(by_user)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), contents), "\n").to_pylist()


def find_leaks(corpora: dict[str, Corpus], config: CoveredCallCandidatesConfig) -> list[str]:
    """One line for each way in which the prompts of ``config.name`` name the answer."""
    task = config.name
    prompts = [prompt for corpus in corpora.values() for prompt in corpus.prompts]
    entries = [entry for corpus in corpora.values() for entry in corpus.entries]
    counts = {
        "hold the block of hindsight": sum(bool(CHOSEN_INDEX.search(p) or REWARD.search(p)) for p in prompts),
        # Whatever its words, a prompt that names the answer changes when the answer does, and nothing else.
        "change when labels and outcomes do": sum(changed_prompts(corpus, config) for corpus in corpora.values()),
    }
    found = [
        f"FAILED: {count:,} of {len(prompts):,} {task} prompts {what}." for what, count in counts.items() if count
    ]
    names = {name for entry in entries for name in names_in(entry.decision)}
    telling = sorted(name for name in names if ANSWER_IN_NAME.search(name))
    if telling:
        found.append(f"FAILED: {len(telling)} names in {task} prompts are words of an answer, such as {telling[0]!r}.")
    return found


ASKED = 50  # decisions whose analogues are looked up again


def find_unsettled(columns: Columns, options: CoveredCallCandidatesConfig) -> list[str]:
    """One line where analogues change with outcomes that were not settled at the decision, its own among them.

    Args:
        columns: all decisions, by time, with their context and outcomes.
    """
    rows = np.unique(np.linspace(0, len(columns) - 1, min(ASKED, len(columns))).astype(int))
    changed, own = 0, {name: columns.context[name] for name in ANALOGUES}
    for row in rows.tolist():
        open_then = (columns.label_end > columns.time[row]) | (columns.decision_of == row)
        other = np.where(
            open_then, 1 - np.nan_to_num(columns.numbers[COUNTERFACTUAL]), columns.numbers[COUNTERFACTUAL]
        )
        others = dataclasses.replace(columns, numbers=columns.numbers | {COUNTERFACTUAL: other})
        found = analogues_of(pool_of(others, options), np.array([row]))
        changed += any(not np.array_equal(own[name][[row]], found[name], equal_nan=True) for name in ANALOGUES)
    if not changed:
        return []
    return [f"FAILED: the analogues of {changed:,} of {len(rows):,} decisions change with outcomes not settled then."]


def find_late_opinions(columns: Columns) -> list[str]:
    """One line where an opinion is of a model that was fitted on what came after the decision."""
    late = columns.numbers[OPINION[2]] > columns.time[columns.decision_of]
    return (
        [f"FAILED: {late.sum():,} opinions are of models that were fitted on what came later."] if late.any() else []
    )


def names_in(decision: Decision) -> list[str]:
    return [decision.underlying, decision.exit_style, *(candidate.instrument for candidate in decision.candidates)]


def changed_prompts(corpus: Corpus, config: CoveredCallCandidatesConfig) -> int:
    """How many of the prompts another label and other outcomes change."""
    columns = columns_of(corpus.entries)
    traded = np.where(columns.chosen < 0, 0, -1)
    another = (np.maximum(columns.chosen, 0) + 1) % np.diff(columns.offsets)
    others = prompts_by_decision(relabel(columns, traded), config)
    # A label may also decide whether there is a record at all: that is no leak of a prompt's text.
    left_out = np.array([entry.decision.decision_id not in others for entry in corpus.entries], bool)
    others |= prompts_by_decision(relabel(columns, another).take(np.flatnonzero(left_out)), config)
    asked = zip(corpus.decision_ids, corpus.prompts, strict=True)
    return sum(key in others and prompt not in others[key] for key, prompt in asked)


def prompts_by_decision(columns: Columns, config: CoveredCallCandidatesConfig) -> dict[str, set[str]]:
    prompts, _, ids = render_columns(columns, config)
    found = collections.defaultdict(set)
    for key, prompt in zip(ids, prompts, strict=True):
        found[key].add(prompt)
    return dict(found)


def relabel(columns: Columns, chosen: np.ndarray) -> Columns:
    """The same decisions with other labels and other outcomes."""
    ones = np.ones(len(columns.instrument))
    numbers = columns.numbers | dict.fromkeys((*LOGGED, COUNTERFACTUAL), ones)
    return dataclasses.replace(columns, chosen=chosen.astype(np.int32), numbers=numbers)
