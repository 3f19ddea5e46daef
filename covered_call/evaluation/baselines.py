"""What a tuned model must be compared with: the simplest policies, fitted on the training split alone.

A policy is a function from decisions to picks: for each decision the index of the call to sell, or None.
"""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from covered_call.candidates.schema import CandidatesError, Decision, LoggedDecision

Pick = int | None
Policy = Callable[[list[Decision]], list[Pick]]
Values = Callable[[list[Decision]], list[np.ndarray]]  # a number for each candidate of each decision
NUMBERS = ["spot", "strike", "dte", "delta", "score", "iv", "ivrv_ratio"]


def fit_baselines(train: list[LoggedDecision]) -> dict[str, Policy]:
    """All baselines but the random one, the simpler first. ``train`` is in the order that prompts show.

    Raises:
        CandidatesError: if the training split holds no trade, or nothing but trades, so that nothing can be fitted.
    """
    sold = sold_candidates(train)
    if len(set(sold)) < 2:
        raise CandidatesError(
            f"The training split has {len(train)} decisions, and not both a call that was sold and one that was not: "
            "no baseline can be fitted. Give more data, or other splits."
        )
    return {
        "majority answer": majority_answer(train),
        "first candidate": highest(lambda decisions: [-np.arange(len(d.candidates)) for d in decisions]),
        "highest score": highest(scores),
        "score rule": highest(scores, fit_threshold(scores, train)),
        "logistic regression": classifier(logistic_regression(), train, sold),
        "gradient boosting": classifier(gradient_boosting(), train, sold),
    }


def never_sell(decisions: list[Decision]) -> list[Pick]:
    return [None] * len(decisions)


def majority_answer(train: list[LoggedDecision]) -> Policy:
    """The answer that the teacher gave most often, among those that a decision has."""
    ranked = [answer for answer, _ in Counter(entry.chosen for entry in train).most_common()]

    def pick(decisions: list[Decision]) -> list[Pick]:
        return [next((a for a in ranked if a is None or a < len(d.candidates)), None) for d in decisions]

    return pick


def highest(values: Values, threshold: float = -math.inf) -> Policy:
    """Sells the candidate of the highest value (the first of equals), if that is at least ``threshold``."""

    def pick(decisions: list[Decision]) -> list[Pick]:
        return [int(v.argmax()) if len(v) and v.max() >= threshold else None for v in values(decisions)]

    return pick


def fit_threshold(values: Values, train: list[LoggedDecision]) -> float:
    """The threshold of ``highest`` with which it agrees most often with the teacher; the lowest of equally good ones.

    It lies halfway between two values that occur, or is -inf or inf.
    """
    decisions = [entry.decision for entry in train]
    tops = np.array([v.max() if len(v) else -math.inf for v in values(decisions)])
    picks = highest(values)(decisions)
    right_if_sold = [
        entry.chosen is not None and entry.chosen == pick for entry, pick in zip(train, picks, strict=True)
    ]
    right_if_not = [entry.chosen is None for entry in train]
    gain = np.subtract(right_if_not, right_if_sold, dtype=float)  # of not selling
    levels, place = np.unique(tops, return_inverse=True)
    gains = np.concatenate(
        [[0.0], np.cumsum(np.bincount(place, gain))]
    )  # where all levels below the i-th are not sold
    edges = np.concatenate([[-math.inf], (levels[:-1] + levels[1:]) / 2, [math.inf]])
    return float(edges[gains.argmax()])


def scores(decisions: list[Decision]) -> list[np.ndarray]:
    return [np.array([c.score for c in decision.candidates]) for decision in decisions]


def features(decisions: list[Decision]) -> pd.DataFrame:
    """What a prompt tells of each candidate, one row each; NaN where it is missing."""
    rows = [
        (d.exit_style, d.spot, c.strike, c.dte, c.delta, c.score, c.iv, c.ivrv_ratio)
        for d in decisions
        for c in d.candidates
    ]
    return pd.DataFrame(rows, columns=["exit_style", *NUMBERS]).astype(dict.fromkeys(NUMBERS, float))


def sold_candidates(train: list[LoggedDecision]) -> list[bool]:
    return [index == entry.chosen for entry in train for index in range(len(entry.decision.candidates))]


def logistic_regression():
    numbers = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler())
    return make_pipeline(columns(numbers), LogisticRegression(max_iter=1000))


def gradient_boosting():
    return make_pipeline(columns("passthrough"), HistGradientBoostingClassifier(random_state=0))


def columns(numbers):
    styles = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return make_column_transformer((numbers, NUMBERS), (styles, ["exit_style"]))


def classifier(model, train: list[LoggedDecision], sold: list[bool]) -> Policy:
    """Sells the candidate that is likeliest to be one the teacher sells, above a threshold fitted on train too."""
    known = features([entry.decision for entry in train])
    empty = [name for name in NUMBERS if known[name].isna().all()]
    model.fit(known.fillna(dict.fromkeys(empty, 0.0)), sold)  # trees fail on a column without a number

    def likelihoods(decisions: list[Decision]) -> list[np.ndarray]:
        rows = features(decisions)
        found = model.predict_proba(rows)[:, 1] if len(rows) else np.zeros(0)
        return np.split(found, np.cumsum([len(d.candidates) for d in decisions])[:-1])

    return highest(likelihoods, fit_threshold(likelihoods, train))
