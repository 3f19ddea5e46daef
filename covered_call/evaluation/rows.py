"""The rows of the table: what each policy picks on the decisions that are judged."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import Columns, logged_of
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import present_in_order
from covered_call.candidates.schema import Decision
from covered_call.evaluation.baselines import Rule, fit_baselines, highest
from covered_call.value_model.learning import Fitted, Predicted
from covered_call.value_model.scorer import picks_of

SHUFFLES = 4
MODEL, TEACHER, HODL, RANDOM = "model", "teacher", "never sell (HODL)", "random (expected)"
Q_SCORER = "Q-scorer"


class Row(NamedTuple):
    """What a policy does at the D decisions that are judged.

    ``picks`` are (D,) places of candidates, -1 for no trade; None for the uniform random policy. ``consistent`` and
    ``probabilities`` are (D,), NaN where there is none.
    """

    name: str
    picks: np.ndarray | None
    consistent: np.ndarray
    probabilities: np.ndarray


class Shuffled(NamedTuple):
    """The same decisions with the candidates of each in another order, and the row at which each of them was."""

    columns: Columns
    rows: np.ndarray  # (R,)


def make_rows(
    train: Columns, columns: Columns, fitted: Fitted | None, predicted: Predicted | None, model
) -> list[Row]:
    """The teacher, never selling, the baselines and, if there are such, the Q-scorer and the model."""
    none, shuffles = np.full(len(columns), math.nan), shuffles_of(columns)
    print("Fitting the baselines, and asking them ...", flush=True)
    rows = [
        Row(TEACHER, columns.chosen, none, none),
        Row(HODL, np.full(len(columns), -1), np.ones(len(columns)), none),
        Row(RANDOM, None, none, none),
        *(rule_row(name, rule, columns, shuffles) for name, rule in fit_baselines(train).items()),
    ]
    if fitted and predicted:
        rows.append(scorer_row(fitted, predicted, columns, shuffles))
    return [*rows, model_row(model, columns, shuffles)] if model else rows


def rule_row(name: str, rule: Rule, columns: Columns, shuffles: list[Shuffled]) -> Row:
    values = rule.values(columns)

    def shuffled(one: Shuffled) -> np.ndarray:
        its = rule.values(one.columns) if rule.by_place else values[one.rows]
        return highest(its, one.columns, rule.threshold)

    picks = highest(values, columns, rule.threshold)
    return Row(name, picks, consistency(shuffled, picks, columns, shuffles), np.full(len(columns), math.nan))


def scorer_row(fitted: Fitted, predicted: Predicted, columns: Columns, shuffles: list[Shuffled]) -> Row:
    def shuffled(one: Shuffled) -> np.ndarray:
        return picks_of(fitted, one.columns, predicted.at(one.rows))

    picks = picks_of(fitted, columns, predicted)
    return Row(Q_SCORER, picks, consistency(shuffled, picks, columns, shuffles), np.full(len(columns), math.nan))


def model_row(model, columns: Columns, shuffles: list[Shuffled]) -> Row:
    """That of a language model; a ranking one also answers SHUFFLES other orders of the candidates in its prompts."""
    passes = 1 if model.task == "per_candidate" else 1 + SHUFFLES
    said = [
        f"The model answers {len(columns):,} decisions, pass {one} of {passes} ..." for one in range(passes, 0, -1)
    ]
    print(said.pop(), flush=True)
    answers = model.decide(decisions_of(columns))
    picks, probabilities = picks_in(answers), np.array([answer.probability for answer in answers])
    if model.task == "per_candidate":  # its prompts show one candidate: the order of the others cannot matter
        return Row(MODEL, picks, np.ones(len(columns)), probabilities)

    as_given = copy.copy(model)
    as_given.candidate_order = "csv"  # or it would put the shuffled candidates into its own order again

    def shuffled(one: Shuffled) -> np.ndarray:
        print(said.pop(), flush=True)
        return picks_in(as_given.decide(decisions_of(one.columns)))

    return Row(MODEL, picks, consistency(shuffled, picks, columns, shuffles), probabilities)


def decisions_of(columns: Columns) -> list[Decision]:
    return [entry.decision for entry in logged_of(columns)]


def picks_in(answers) -> np.ndarray:
    """(D,) int64 of the answers of a model."""
    return np.array([-1 if answer.pick is None else answer.pick for answer in answers], np.int64)


def shuffles_of(columns: Columns) -> list[Shuffled]:
    rows = np.arange(len(columns.instrument), dtype=float)
    marked = dataclasses.replace(columns, numbers=columns.numbers | {ROW: rows})
    orders = [CoveredCallCandidatesConfig(candidate_order="shuffle", seed=seed) for seed in range(SHUFFLES)]
    shuffled = [present_in_order(marked, order) for order in orders]
    return [Shuffled(one, one.numbers[ROW].astype(np.int64)) for one in shuffled]


ROW = "row"


def consistency(
    policy: Callable[[Shuffled], np.ndarray], picks: np.ndarray, columns: Columns, shuffles: list[Shuffled]
) -> np.ndarray:
    """(D,) 1.0 for each decision whose pick is the same option in the other orders of its candidates, else 0.0."""
    same, begins = np.ones(len(columns), bool), columns.offsets[:-1]
    for one in shuffles:
        others = policy(one)
        both = (picks >= 0) & (others >= 0)
        rows = one.rows[begins[both] + others[both]]
        same &= (picks >= 0) == (others >= 0)
        same[both] &= rows == begins[both] + picks[both]
    return same.astype(float)


def best_rule(rows: list[Row], columns: Columns) -> Row:
    """The baseline that agrees most with the teacher on the evaluated decisions; of equals the simplest."""
    rules = [row for row in rows if row.name not in (TEACHER, HODL, RANDOM, Q_SCORER, MODEL)]
    return max(rules, key=lambda row: int((row.picks == columns.chosen).sum()))
