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
from covered_call.candidates.records import is_sold
from covered_call.candidates.schema import Decision
from covered_call.evaluation.baselines import Rule, fit_baselines, highest, tops_of
from covered_call.value_model.learning import Fitted, Predicted
from covered_call.value_model.scorer import picks_of

SHUFFLES = 4
MODEL, TEACHER, HODL, RANDOM = "model", "teacher", "never sell (HODL)", "random (expected)"
Q_SCORER = "Q-scorer"


class Said(NamedTuple):
    """B probabilities that a model gave, of what it was calibrated on: an answer to a decision, or to a candidate."""

    of: np.ndarray  # (B,) which of the decisions
    probability: np.ndarray
    right: np.ndarray  # (B,) bool: whether the teacher gave that answer


class Row(NamedTuple):
    """What a policy does at the D decisions that are judged.

    ``picks`` are (D,) places of candidates, -1 for no trade; the uniform random policy has none. ``consistent`` is
    (D,), NaN where it was not tried.
    """

    name: str
    picks: np.ndarray
    consistent: np.ndarray
    said: Said | None = None

    @property
    def at_random(self) -> bool:
        return not len(self.picks)


class Trial(NamedTuple):
    """A policy of the table at another threshold, for the count of what was tried."""

    name: str
    picks: np.ndarray


class Shuffled(NamedTuple):
    """The same decisions with the candidates of each in another order, and the row at which each of them was."""

    columns: Columns
    rows: np.ndarray  # (R,)


def make_rows(
    train: Columns, columns: Columns, fitted: Fitted | None, predicted: Predicted | None, model
) -> tuple[list[Row], list[Trial]]:
    """The teacher, never selling, the baselines and, if there are such, the Q-scorer and the model; and those with a
    threshold at others."""
    none, shuffles, trials = np.full(len(columns), math.nan), shuffles_of(columns), []
    print("Fitting the baselines, and asking them ...", flush=True)
    rows = [
        Row(TEACHER, columns.chosen, none),
        Row(HODL, np.full(len(columns), -1), np.ones(len(columns))),
        Row(RANDOM, np.zeros(0, np.int64), none),
    ]
    for name, rule in fit_baselines(train).items():
        values = rule.values(columns)
        rows.append(rule_row(name, rule, values, columns, shuffles))
        trials += other_thresholds(name, values, columns) if rule.threshold != -math.inf and not rule.by_place else []
    if fitted and predicted:
        rows.append(scorer_row(fitted, predicted, columns, shuffles))
        trials += other_thresholds(Q_SCORER, predicted.values, columns)
    return [*rows, model_row(model, columns, shuffles)] if model else rows, trials


def other_thresholds(name: str, values: np.ndarray, columns: Columns) -> list[Trial]:
    """At each tenth of the highest values of the decisions."""
    tops = tops_of(values, columns)
    levels = np.unique(np.quantile(tops[np.isfinite(tops)], np.arange(1, 10) / 10)) if np.isfinite(tops).any() else []
    return [Trial(f"{name} from {level:g}", highest(values, columns, level)) for level in levels]


def rule_row(name: str, rule: Rule, values: np.ndarray, columns: Columns, shuffles: list[Shuffled]) -> Row:

    def shuffled(one: Shuffled) -> np.ndarray:
        its = rule.values(one.columns) if rule.by_place else values[one.rows]
        return highest(its, one.columns, rule.threshold)

    picks = highest(values, columns, rule.threshold)
    return Row(name, picks, consistency(shuffled, picks, columns, shuffles))


def scorer_row(fitted: Fitted, predicted: Predicted, columns: Columns, shuffles: list[Shuffled]) -> Row:
    def shuffled(one: Shuffled) -> np.ndarray:
        return picks_of(fitted, one.columns, predicted.at(one.rows))

    picks = picks_of(fitted, columns, predicted)
    return Row(Q_SCORER, picks, consistency(shuffled, picks, columns, shuffles))


def model_row(model, columns: Columns, shuffles: list[Shuffled]) -> Row:
    """That of a language model; a ranking one also answers SHUFFLES other orders of the candidates in its prompts."""
    passes = 1 if model.task == "per_candidate" else 1 + SHUFFLES
    steps = [
        f"The model answers {len(columns):,} decisions, pass {one} of {passes} ..." for one in range(passes, 0, -1)
    ]
    print(steps.pop(), flush=True)
    answers = model.decide(decisions_of(columns))
    picks = picks_in(answers)
    if model.task == "per_candidate":  # its prompts show one candidate: the order of the others cannot matter
        scores = [score for answer in answers for score in answer.scores.values()]
        said = Said(columns.decision_of, np.exp(np.array(scores, float)), is_sold(columns))
        return Row(MODEL, picks, np.ones(len(columns)), said)

    as_given = copy.copy(model)
    as_given.candidate_order = "csv"  # or it would put the shuffled candidates into its own order again

    def shuffled(one: Shuffled) -> np.ndarray:
        print(steps.pop(), flush=True)
        return picks_in(as_given.decide(decisions_of(one.columns)))

    probability = np.array([answer.probability for answer in answers])
    said = Said(np.arange(len(columns)), probability, picks == columns.chosen)
    return Row(MODEL, picks, consistency(shuffled, picks, columns, shuffles), said)


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
