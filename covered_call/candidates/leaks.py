"""Prompts that name their answer: how they are found, whatever their words."""

import re
from typing import NamedTuple

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.records import FEATURES, RECORDS
from covered_call.candidates.schema import NO_TRADE, SELL_CALL, SKIP, Counterfactual, Decision, LoggedDecision, Outcome

PROMPTED = tuple(name for name, features in FEATURES.items() if {"messages", "prompt"} & features.keys())
# What prompts.candidate_hindsight and ranking_hindsight write.
CHOSEN_INDEX = re.compile(r"Chosen candidate index: (\d+)")
REWARD = re.compile(r"Reward \(USD\): (\S+)")
# As a word of its own: what holds it as a part, such as SKIPPER, names no answer.
ANSWER_IN_NAME = re.compile(rf"(?<![A-Za-z])({SELL_CALL}|{SKIP}|{NO_TRADE})(?![A-Za-z])", re.IGNORECASE)


class Corpus(NamedTuple):
    """The prompts of a split with their answers (none for pairs to prefer between), and the decisions they were
    rendered from."""

    prompts: list[str]
    answers: list[str]
    entries: list[LoggedDecision]


def render_splits(splits: dict[str, list[LoggedDecision]], config: CoveredCallCandidatesConfig) -> dict[str, Corpus]:
    """The corpora of ``config.name``, one of PROMPTED; an empty split has none."""
    return {name: render(entries, config) for name, entries in splits.items() if entries}


def render(entries: list[LoggedDecision], config: CoveredCallCandidatesConfig) -> Corpus:
    """Of the decisions that have a candidate: the prompts of others hold no name and no number to leak."""
    entries = [entry for entry in entries if entry.decision.candidates]
    records = [record for entry in entries for record in RECORDS[config.name](entry, config)]
    answers = [record["label"] for record in records if "label" in record]
    return Corpus([prompt_of(record) for record in records], answers, entries)


def prompt_of(record: dict) -> str:
    """What the user asks in a record: of a chat, or of a prompt with the replies to prefer between."""
    prompt = record["messages"] if "messages" in record else record["prompt"]
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] == "user")


def find_leaks(corpora: dict[str, Corpus], config: CoveredCallCandidatesConfig) -> list[str]:
    """One line for each way in which the prompts of ``config.name`` name the answer."""
    task = config.name
    prompts = [prompt for corpus in corpora.values() for prompt in corpus.prompts]
    entries = [entry for corpus in corpora.values() for entry in corpus.entries]
    counts = {
        "hold the block of hindsight": sum(bool(CHOSEN_INDEX.search(p) or REWARD.search(p)) for p in prompts),
        # Whatever its words, a prompt that names the answer changes when the answer does, and nothing else.
        "change when labels and outcomes do": sum(changed_prompts(entry, config) for entry in entries),
    }
    found = [
        f"FAILED: {count:,} of {len(prompts):,} {task} prompts {what}." for what, count in counts.items() if count
    ]
    names = {name for entry in entries for name in names_in(entry.decision)}
    telling = sorted(name for name in names if ANSWER_IN_NAME.search(name))
    if telling:
        found.append(f"FAILED: {len(telling)} names in {task} prompts are words of an answer, such as {telling[0]!r}.")
    return found


def names_in(decision: Decision) -> list[str]:
    return [decision.underlying, decision.exit_style, *(candidate.instrument for candidate in decision.candidates)]


def changed_prompts(entry: LoggedDecision, config: CoveredCallCandidatesConfig) -> int:
    """How many of a decision's prompts another label and other outcomes change."""
    prompts = render([entry], config).prompts
    traded, another = 0 if entry.chosen is None else None, ((entry.chosen or 0) + 1) % len(entry.outcomes)
    for chosen in (traded, another):
        others = render([relabel(entry, chosen)], config).prompts
        if others:  # a label may also decide whether there is a record at all: that is no leak of a prompt's text
            return sum(prompt not in others for prompt in prompts)
    return 0


def relabel(entry: LoggedDecision, chosen: int | None) -> LoggedDecision:
    """The same decision with another label and other outcomes."""
    counterfactuals = tuple(Counterfactual(1.0, counterfactual.label_end) for counterfactual in entry.counterfactuals)
    return LoggedDecision(entry.decision, chosen, (Outcome(1.0, 1.0, 1.0),) * len(entry.outcomes), counterfactuals)
