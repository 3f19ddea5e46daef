"""The rows of the table: what each policy picks on the decisions that are judged."""

import copy
import math

import numpy as np

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import order_candidates
from covered_call.candidates.schema import Decision, LoggedDecision
from covered_call.evaluation.baselines import Pick, Policy, fit_baselines, never_sell
from covered_call.evaluation.money import HODL, MODEL, Q_SCORER, RANDOM, TEACHER, Row
from covered_call.value_model.scorer import QScorer, decide

SHUFFLES = 4


def make_rows(train: list[LoggedDecision], entries: list[LoggedDecision], scorer: QScorer | None, model) -> list[Row]:
    """The teacher, never selling, the baselines and, if there are such, the Q-scorer and the model."""
    decisions, unknown = [entry.decision for entry in entries], [math.nan] * len(entries)
    rows = [Row(TEACHER, [entry.chosen for entry in entries], unknown, unknown)]
    print("Fitting the baselines, and asking them ...", flush=True)
    rows += [make_row(HODL, never_sell, decisions), Row(RANDOM, [], unknown, unknown)]
    rows += [make_row(name, policy, decisions) for name, policy in fit_baselines(train).items()]
    if scorer:
        fitted = scorer.fitted
        rows.append(make_row(Q_SCORER, lambda asked: [answer.pick for answer in decide(fitted, asked)], decisions))
    return [*rows, model_row(model, decisions)] if model else rows


def make_row(name: str, policy: Policy, decisions: list[Decision]) -> Row:
    picks = policy(decisions)
    return Row(name, picks, consistency(policy, picks, decisions), [math.nan] * len(decisions))


def model_row(model, decisions: list[Decision]) -> Row:
    """That of a language model; a ranking one also answers SHUFFLES other orders of the candidates in its prompts."""
    passes = 1 if model.task == "per_candidate" else 1 + SHUFFLES
    said = [
        f"The model answers {len(decisions):,} decisions, pass {one} of {passes} ..." for one in range(passes, 0, -1)
    ]
    print(said.pop(), flush=True)
    answers = model.decide(decisions)
    picks, probabilities = [answer.pick for answer in answers], [answer.probability for answer in answers]
    if model.task == "per_candidate":  # its prompts show one candidate: the order of the others cannot matter
        return Row(MODEL, picks, [1.0] * len(decisions), probabilities)

    as_given = copy.copy(model)
    as_given.candidate_order = "csv"  # or it would put the shuffled candidates into its own order again

    def shuffled(decisions: list[Decision]) -> list[Pick]:
        print(said.pop(), flush=True)
        return [answer.pick for answer in as_given.decide(decisions)]

    return Row(MODEL, picks, consistency(shuffled, picks, decisions), probabilities)


def consistency(policy: Policy, picks: list[Pick], decisions: list[Decision]) -> list[float]:
    """1.0 for each decision whose pick is the same option in SHUFFLES other orders of its candidates, else 0.0."""
    names = instruments(decisions, picks)
    same = np.ones(len(decisions))
    for seed in range(SHUFFLES):
        order = CoveredCallCandidatesConfig(candidate_order="shuffle", seed=seed)
        shuffled = [order_candidates(decision, order)[0] for decision in decisions]
        others = instruments(shuffled, policy(shuffled))
        same *= [name == other for name, other in zip(names, others, strict=True)]
    return same.tolist()


def instruments(decisions: list[Decision], picks: list[Pick]) -> list[str | None]:
    return [None if p is None else d.candidates[p].instrument for d, p in zip(decisions, picks, strict=True)]


def best_rule(rows: list[Row], entries: list[LoggedDecision]) -> Row:
    """The baseline that agrees most with the teacher on the evaluated decisions; of equals the simplest."""
    rules = [row for row in rows if row.name not in (TEACHER, HODL, RANDOM, Q_SCORER, MODEL)]
    return max(rules, key=lambda row: sum(p == e.chosen for p, e in zip(row.picks, entries, strict=True)))
