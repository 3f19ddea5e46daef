"""What a tuned model must be compared with: the simplest policies, fitted on the training split alone.

A pick is the place of the call to sell among the candidates of a decision, from 0; in arrays -1 is NO_TRADE.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from covered_call.candidates.columns import OPINION, Columns
from covered_call.candidates.records import is_sold
from covered_call.candidates.schema import CandidatesError

Values = Callable[[Columns], np.ndarray]  # (R,) a number for each candidate
NUMBERS = ["spot", "strike", "dte", "delta", "score", "iv", "ivrv_ratio"]


class Rule(NamedTuple):
    """Sells the candidate of the highest value (the first of equals), if that is at least ``threshold``.

    ``by_place`` says that the value of a candidate is its place's, whatever stands there.
    """

    values: Values
    threshold: float = -math.inf
    by_place: bool = False

    def picks(self, columns: Columns) -> np.ndarray:
        """(D,) int64"""
        return highest(self.values(columns), columns, self.threshold)


def fit_baselines(train: Columns) -> dict[str, Rule]:
    """All baselines but the random one, the simpler first. ``train`` is in the order that prompts show.

    Raises:
        CandidatesError: if the training split holds no trade, or nothing but trades, so that nothing can be fitted.
    """
    sold = is_sold(train)
    if not 0 < sold.sum() < len(sold):
        raise CandidatesError(
            f"The training split has {len(train)} decisions, and not both a call that was sold and one that was not: "
            "no baseline can be fitted. Give more data, or other splits."
        )
    told = told_in(train)
    return {
        "majority answer": majority_answer(train),
        "first candidate": Rule(lambda columns: -columns.place, by_place=True),
        "highest score": Rule(scores),
        "score rule": score_rule(train),
        "logistic regression": classifier(logistic_regression(told), train, sold),
        "gradient boosting": classifier(gradient_boosting(told), train, sold),
    }


def majority_answer(train: Columns) -> Rule:
    """The answer that the teacher gave most often, among those that a decision has."""
    answers, first, counts = np.unique(train.chosen, return_index=True, return_counts=True)
    ranked = answers[np.lexsort((first, -counts))]
    rank = dict(zip(ranked.tolist(), range(0, -len(ranked), -1), strict=True))
    worth = np.full(1 + int(ranked.max(initial=0)), -math.inf)
    worth[ranked[ranked >= 0]] = [rank[place] for place in ranked.tolist() if place >= 0]

    def values(columns: Columns) -> np.ndarray:
        known = columns.place < len(worth)
        return np.where(known, worth[np.where(known, columns.place, 0)], -math.inf)

    return Rule(values, rank.get(-1, -len(ranked)), by_place=True)


def score_rule(train: Columns) -> Rule:
    return Rule(scores, fit_threshold(scores(train), train))


def highest(values: np.ndarray, columns: Columns, threshold: float = -math.inf) -> np.ndarray:
    """(D,) int64: the place of the highest of (R,) values, -1 where it is below the threshold, or there is none."""
    tops = tops_of(values, columns)
    rows = np.flatnonzero(values == tops[columns.decision_of])[::-1]  # backwards, so that the first is written last
    picks = np.full(len(columns), -1)
    picks[columns.decision_of[rows]] = columns.place[rows]
    return np.where(tops >= threshold, picks, -1)


def tops_of(values: np.ndarray, columns: Columns) -> np.ndarray:
    """(D,) the highest of the values of each decision, -inf where it has no candidate."""
    tops, begins = np.full(len(columns), -math.inf), columns.offsets[:-1]
    offered = np.diff(columns.offsets) > 0
    if offered.any():
        tops[offered] = np.maximum.reduceat(values, begins[offered])
    return tops


def fit_threshold(values: np.ndarray, train: Columns) -> float:
    """The threshold with which (R,) values agree most often with the teacher; the lowest of equally good ones.

    It lies halfway between two values that occur, or is -inf or inf.
    """
    picks, sold = highest(values, train), train.chosen >= 0
    gain = (~sold).astype(float) - (sold & (train.chosen == picks))  # of not selling
    levels, place = np.unique(tops_of(values, train), return_inverse=True)
    # What is gained where all levels below the i-th are not sold.
    gains = np.concatenate([[0.0], np.cumsum(np.bincount(place, gain))])
    edges = np.concatenate([[-math.inf], (levels[:-1] + levels[1:]) / 2, [math.inf]])
    return float(edges[gains.argmax()])


def scores(columns: Columns) -> np.ndarray:
    return columns.numbers["score"]


def features(columns: Columns) -> pd.DataFrame:
    """What a prompt tells of each candidate, one row each; NaN where it is missing."""
    rows = columns.decision_of
    numbers = columns.numbers | {"spot": columns.spot[rows]}
    styles = pd.Categorical.from_codes(columns.exit_style[rows], columns.names)
    context = {name: values[rows] for name, values in columns.context.items()}
    numbers = {name: numbers[name] for name in told_in(columns) if name in numbers}
    return pd.DataFrame({"exit_style": styles, **numbers, **context})


def told_in(columns: Columns) -> list[str]:
    """The numbers that prompts tell of a candidate and its market."""
    return [*NUMBERS, *(name for name in OPINION[:2] if name in columns.numbers), *columns.context]


def logistic_regression(told: list[str]):
    numbers = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler())
    return make_pipeline(in_columns(numbers, told), LogisticRegression(max_iter=1000))


def gradient_boosting(told: list[str]):
    return make_pipeline(in_columns("passthrough", told), HistGradientBoostingClassifier(random_state=0))


def in_columns(numbers, told: list[str]):
    styles = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return make_column_transformer((numbers, told), (styles, ["exit_style"]))


def classifier(model, train: Columns, sold: np.ndarray) -> Rule:
    """Sells the candidate that is likeliest to be one the teacher sells, above a threshold fitted on train too."""
    known = features(train)
    empty = [name for name in told_in(train) if known[name].isna().all()]
    model.fit(known.fillna(dict.fromkeys(empty, 0.0)), sold)  # trees fail on a column without a number

    def likelihoods(columns: Columns) -> np.ndarray:
        rows = features(columns)
        return model.predict_proba(rows)[:, 1] if len(rows) else np.zeros(0)

    return Rule(likelihoods, fit_threshold(likelihoods(train), train))
