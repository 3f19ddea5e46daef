"""Does an explanation tell of what came later? Its words, what changes it, and what can be read from it."""

import dataclasses
import re
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from covered_call import resampling
from covered_call.candidates.builder import Backtest
from covered_call.candidates.columns import COUNTERFACTUAL, LOGGED, STATE, Columns, Grounds
from covered_call.candidates.explanations import explanations, shown_of
from covered_call.candidates.options import CHATS

FORBIDDEN = re.compile(r"\b(rewards?|p&l|pnl|outcomes?|expired|later|profits?|loss(es)?|won|lost)\b", re.IGNORECASE)
NO_INTERVAL = (np.nan, np.nan)


class Texts(NamedTuple):
    """The explanations of a split's answers.

    Args:
        features: (K, F) the state of the calls that they are about, the market's context, and whether it is sold.
        outcome: (K,) USD, of the calls that they are about; NaN where it is unknown.
        decision: (K,) the place of each one's decision.
    """

    texts: list[str]
    features: np.ndarray
    outcome: np.ndarray
    decision: np.ndarray


def audit_explanations(backtest: Backtest, grounds: dict[str, Grounds]) -> tuple[list[str], list[str]]:
    """What there is to know of the explanations of both tasks, and what they must not tell.

    Args:
        grounds: by task.
    """
    found, leaks = [], []
    splits = {name: backtest.decisions.columns(numbers) for name, numbers in backtest.numbers.items() if len(numbers)}
    for task in CHATS:
        made = {name: texts_of_answers(columns, task, grounds[task]) for name, columns in splits.items()}
        said = [text for one in made.values() for text in one.texts]
        banned = sum(bool(FORBIDDEN.search(text)) for text in said)
        changed = sum(changed_texts(columns, task, grounds[task]) for columns in splits.values())
        for count, what in ((banned, "hold a word of an outcome"), (changed, "change when outcomes do")):
            leaks += [f"FAILED: {count:,} of {len(said):,} explanations of {task} {what}."] if count else []
        read = read_outcomes(made, splits.get("test"))
        by = grounds[task].formula or "no known formula"
        found.append(f"Explanations of {task}: {len(said):,}, scores by {by}. {read.text}")
        if read.tells:
            leaks.append(f"FAILED: explanations of {task} tell more of the outcome's sign than the features do.")
    return found, leaks


def texts_of_answers(columns: Columns, task: str, grounds: Grounds) -> Texts:
    ranking = task == "per_decision_ranking"
    picks = columns.chosen if ranking else columns.place == columns.chosen[columns.decision_of]
    shown = shown_of(columns, task, picks)
    there = ~np.isnan(shown.numbers["score"])
    decision = np.arange(len(columns)) if ranking else columns.decision_of
    rows = columns.offsets[:-1] + shown.index - 1 if ranking else np.arange(len(decision))
    of = {
        name: np.append(columns.numbers[name], np.nan)[np.where(there, rows, -1)] for name in (*STATE, COUNTERFACTUAL)
    }
    context = [values[decision] for values in columns.context.values()]
    features = np.column_stack([*(of[name] for name in STATE), *context, shown.sells])
    return Texts(explanations(columns, task, picks, grounds).to_pylist(), features, of[COUNTERFACTUAL], decision)


def changed_texts(columns: Columns, task: str, grounds: Grounds) -> int:
    """How many other outcomes change."""
    picks = columns.chosen if task == "per_decision_ranking" else columns.place == columns.chosen[columns.decision_of]
    ones = dict.fromkeys((*LOGGED, COUNTERFACTUAL), np.ones(len(columns.instrument)))
    other = dataclasses.replace(columns, numbers=columns.numbers | ones)
    both = (explanations(one, task, picks, grounds).to_pylist() for one in (columns, other))
    return sum(one != two for one, two in zip(*both, strict=True))


class Read(NamedTuple):
    """What can be read of an outcome's sign, in words, and whether explanations tell more of it than features do."""

    text: str
    tells: bool


def read_outcomes(made: dict[str, Texts], test: Columns | None) -> Read:
    """AUC on the test split of a bag of words of the explanations, and of the numbers that they may be made of, both
    learnt on train, with intervals by resampling decisions in blocks."""
    known = {name: ~np.isnan(one.outcome) for name, one in made.items()}
    signs = {name: made[name].outcome[known[name]] > 0 for name in made}
    if test is None or any(len(set(signs.get(name, np.zeros(0)).tolist())) < 2 for name in ("train", "test")):
        return Read("Whether they tell of an outcome's sign cannot be tried: train and test need both signs.", False)
    scores = []
    words = CountVectorizer(token_pattern=r"\S+", lowercase=False, ngram_range=(1, 2), min_df=2, binary=True)
    numbers = make_pipeline(
        SimpleImputer(keep_empty_features=True), StandardScaler(), LogisticRegression(max_iter=1_000)
    )
    for reader, inputs in (
        (make_pipeline(words, LogisticRegression(max_iter=1_000)), lambda one: np.array(one.texts, object)),
        (numbers, lambda one: one.features),
    ):
        reader.fit(inputs(made["train"])[known["train"]], signs["train"])
        scores.append(reader.predict_proba(inputs(made["test"])[known["test"]])[:, 1])
    return compared(scores, signs["test"], made["test"].decision[known["test"]], test)


def compared(scores: list[np.ndarray], signs: np.ndarray, decision: np.ndarray, columns: Columns) -> Read:
    """The AUC of two readers, the explanations' first."""
    ends = columns.time.copy()
    np.maximum.at(ends, columns.decision_of, columns.label_end)
    times, of_time, block = resampling.overlaps(columns.time, ends)
    draws = resampling.draw(len(times), block)
    plain = [float(aucs(signs, one, np.ones((1, len(signs))))[0]) for one in scores]
    if draws is None:
        return Read(
            f"AUC of the outcome's sign: {plain[0]:.3f}, of features {plain[1]:.3f}; too few for intervals.", False
        )
    counts = (draws.counts(part)[:, of_time[decision]] for part in draws.parts())
    words, features = np.hstack([[aucs(signs, one, its) for one in scores] for its in counts])
    figures = (words, features, words - features)
    (low, high), (its_low, its_high), difference = (resampling.interval(one, one) or NO_INTERVAL for one in figures)
    said = (
        f"AUC of the outcome's sign on test: their words {plain[0]:.3f} [{low:.3f}, {high:.3f}], features "
        f"{plain[1]:.3f} [{its_low:.3f}, {its_high:.3f}], difference [{difference[0]:+.3f}, {difference[1]:+.3f}]."
    )
    return Read(said, bool(difference[0] > 0))


def aucs(signs: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(orders,) the area under the ROC curve, each of (K,) scores drawn as often as ``counts`` (orders, K) says; NaN
    where all drawn are of one sign."""
    order = np.argsort(scores)
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of equal ones the first
    above, below = (np.add.reduceat(counts[:, order] * its[order], starts, axis=1) for its in (signs, ~signs))
    passed = above * (below.cumsum(1) - below / 2)
    return resampling.share(passed.sum(1), above.sum(1) * below.sum(1))
