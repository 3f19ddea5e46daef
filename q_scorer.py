"""What would selling this call bring? Gradient boosting on counterfactual outcomes, used as a policy.

    python q_scorer.py                                                   # on the simulated sample
    python q_scorer.py --data_files 'runs/*.csv' --optimize              # search threshold and gates on validation
    python q_scorer.py --data_files 'runs/*.csv' --horizon 3 --fee 0.0003 --positive_weight 1.5
    python evaluate_policy.py --baselines-only --q_scorer out/q_scorer/q_scorer.zip

A regressor predicts each candidate's net outcome (``q_sell``; holding is worth 0), a classifier the probability that
it is positive. The best candidate is sold if both like it enough, else nothing is. Outcomes are learnt as a share of
spot, and thresholds are in % of spot: the same number then means the same at 4,000 and at 100,000 USD, and for any
underlying. What is told of outcomes is in USD a unit of underlying, as everywhere else.

The test split is never looked at. Load only files that you made yourself: they hold pickled scikit-learn models.
"""

import argparse
import bisect
import csv
import datetime
import hashlib
import io
import itertools
import json
import logging
import math
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import joblib
import numpy as np
import sklearn
from datasets.utils import tqdm
from matplotlib.figure import Figure as Plot
from matplotlib.patches import Rectangle
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

import covered_call_candidates
from covered_call_candidates import (
    NO_TRADE,
    CandidatesError,
    CoveredCallCandidatesConfig,
    LoggedDecision,
    net_outcomes,
)

logger = logging.getLogger("q_scorer")

VERSION = 1  # raise it when a saved file would be read otherwise, or its numbers mean something else
FILE_NAME = "q_scorer.zip"
FEATURES = ["moneyness", "dte", "delta", "score", "iv", "ivrv_ratio", "exit_style"]
OUTCOME_OPTIONS = (
    "fee", "fee_cap", "half_spread", "slippage", "expiry_tolerance", "horizon", "take_profit", "roll_delta",
)  # fmt: skip

# Few, small steps and large leaves: outcomes of neighbouring days share most of their week, and in the sample their
# standard deviation is 4 % of spot around a mean of -0.2 %. Chosen beforehand, not by what they earned.
BOOSTING = {"max_iter": 60, "learning_rate": 0.05, "max_leaf_nodes": 6, "l2_regularization": 10.0, "random_state": 0}
LEAF_SHARE, LEAST_LEAF = 0.05, 20
LEAST_ROWS = 2 * LEAST_LEAF  # of fewer no tree could be grown

FOLDS = 5
CALIBRATION_SHARE = 0.1  # of a fold's past, its latest part, is kept from the models to fit the offset on

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # % of spot
MIN_CONFIDENCES = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
MIN_ABS_RETURNS = (0.0, 0.1, 0.25, 0.5)  # % of spot
FINALISTS = 5
LEAST_TRADES = 10  # a cell of the grid with fewer, but some, is luck

NO_CANDIDATE, OTHER_STYLE = "no candidate", "unknown exit_style"


class QScorerError(CandidatesError):
    """Nothing can be fitted on these data, or a saved file cannot be used; the message says why and what to do."""


class Gates(NamedTuple):
    """When the best candidate is sold.

    Args:
        threshold: its predicted net outcome must be above this, in % of spot.
        min_confidence: the predicted probability of a positive outcome must be at least this.
        min_abs_return: the predicted net outcome, whatever its sign, must be at least this, in % of spot. With a
            threshold of 0 or more it only matters where it is larger than that.
    """

    threshold: float = 0.0
    min_confidence: float = 0.0
    min_abs_return: float = 0.0

    def check(self) -> None:
        """Raises QScorerError for values that cannot be."""
        if not math.isfinite(self.threshold):
            raise QScorerError(f"threshold={self.threshold!r}: give a number, in % of spot.")
        if not 0 <= self.min_confidence <= 1:
            raise QScorerError(f"min_confidence={self.min_confidence!r}: give a probability, from 0 to 1.")
        if not 0 <= self.min_abs_return < math.inf:
            raise QScorerError(f"min_abs_return={self.min_abs_return!r}: give 0 or more, in % of spot.")

    def stop(self, percent: float, confidence: float) -> str | None:
        """The gate that keeps a candidate from being sold, in the order they are asked; None if it may be."""
        if confidence < self.min_confidence:
            return "min_confidence"
        if abs(percent) < self.min_abs_return:
            return "min_abs_return"
        return None if percent > self.threshold else "threshold"


class Decision(NamedTuple):
    """What the scorer answers to one decision, after the fashion of policy.Decision.

    Args:
        answer: "1" to "N", an index into the candidates in the order the caller gave them, or "NO_TRADE".
        best: the index, from 1, of the candidate with the highest q_sell, sold or not; None where there is none.
        q_sell: its predicted net outcome against holding, in USD a unit of underlying; NaN where there is none.
        confidence: the predicted probability that its net outcome is positive; NaN where there is none.
        scores: q_sell of each candidate, "1" to "N", and NO_TRADE, which is worth 0; USD.
        stopped_by: None if it sold, else what kept it from that: "threshold", "min_confidence", "min_abs_return",
            "no candidate", or "unknown exit_style", for one that it was not fitted on.
    """

    answer: str
    best: int | None
    q_sell: float
    confidence: float
    scores: dict[str, float]
    stopped_by: str | None


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def features(decisions: Sequence[covered_call_candidates.Decision], exit_styles: Sequence[str]) -> np.ndarray:
    """One row a candidate, shape (candidates, 6 + exit styles), none with a scale of its own; NaN where missing.

    Strike / spot, dte (days), delta, score, iv, ivrv_ratio, and 1.0 in the column of the decision's exit style.
    """
    rows = [
        (c.strike / d.spot, c.dte, c.delta, c.score, c.iv, c.ivrv_ratio, *(d.exit_style == s for s in exit_styles))
        for d in decisions
        for c in d.candidates
    ]
    return np.array(rows, dtype=float).reshape(len(rows), len(FEATURES) - 1 + len(exit_styles))


def outcomes(entries: Sequence[LoggedDecision], config: CoveredCallCandidatesConfig) -> np.ndarray:
    """Net outcome of selling each candidate as a share of spot, shape (candidates,), in order; NaN where unknown."""
    found = [
        math.nan if net.value is None else net.value / entry.decision.spot
        for entry in entries
        for net in net_outcomes(entry, config)
    ]
    return np.array(found, dtype=float)


class Fitted(NamedTuple):
    """A regressor of outcomes as a share of spot, a classifier of their sign, and all that is told of them.

    ``metadata`` is what JSON can hold; "offset" in it is added to what the regressor says.
    """

    value: HistGradientBoostingRegressor
    positive: HistGradientBoostingClassifier | DummyClassifier
    metadata: dict

    @property
    def gates(self) -> Gates:
        return Gates(**self.metadata["gates"])

    def with_gates(self, gates: Gates) -> "Fitted":
        gates.check()
        return self._replace(metadata=self.metadata | {"gates": gates._asdict()})

    def predict(self, decisions: Sequence[covered_call_candidates.Decision]) -> tuple[np.ndarray, np.ndarray]:
        """Calibrated net outcomes as a share of spot, and confidences, each of shape (candidates,)."""
        rows = features(decisions, self.metadata["exit_styles"])
        if not len(rows):
            return np.zeros(0), np.zeros(0)
        seen = self.positive.classes_.tolist()
        confidence = self.positive.predict_proba(rows)[:, seen.index(True)] if True in seen else np.zeros(len(rows))
        return self.value.predict(rows) + self.metadata["offset"], confidence


def learn(
    train: Sequence[LoggedDecision], config: CoveredCallCandidatesConfig, positive_weight: float = 1.0
) -> Fitted:
    """Fits both models on the known outcomes of ``train``; not calibrated yet, and with no gate but q_sell > 0.

    Args:
        config: the friction and horizon that outcomes are net of.
        positive_weight: what a positive outcome weighs in the regression, beside 1 for another. The confidence stays
            a probability: no weight touches it.

    Raises:
        QScorerError: for fewer than LEAST_ROWS known outcomes, or a weight that is not above 0.
    """
    if not 0 < positive_weight < math.inf:
        raise QScorerError(f"positive_weight={positive_weight!r}: give a number above 0; 1 is symmetric.")
    styles = sorted({entry.decision.exit_style for entry in train})
    target = outcomes(train, config)
    known = ~np.isnan(target)
    if known.sum() < LEAST_ROWS:
        raise QScorerError(
            f"Of {len(target)} candidates to fit on, {known.sum()} have a known outcome: at least {LEAST_ROWS} are "
            "needed. Give more data, or other splits."
        )
    rows, target = features([entry.decision for entry in train], styles)[known], target[known]
    rows[:, np.isnan(rows).all(axis=0)] = 0.0  # scikit-learn fails on a column without a number; no tree asks this one
    positive = target > 0
    options = BOOSTING | {"min_samples_leaf": max(LEAST_LEAF, round(LEAF_SHARE * len(target)))}
    value = HistGradientBoostingRegressor(**options, early_stopping=False)
    value.fit(rows, target, sample_weight=np.where(positive, positive_weight, 1.0))
    both = 0 < positive.sum() < len(positive)
    sign = HistGradientBoostingClassifier(**options, early_stopping=False) if both else DummyClassifier()
    metadata = {
        "version": VERSION,
        "features": FEATURES,
        "exit_styles": styles,
        "target": "net outcome of selling against holding, as a share of spot",
        "outcome_options": {name: getattr(config, name) for name in OUTCOME_OPTIONS},
        "positive_weight": positive_weight,
        "gates": Gates()._asdict(),
        "offset": 0.0,
        "train": describe(train, known),
        "versions": {"scikit-learn": sklearn.__version__, "numpy": np.__version__},
    }
    return Fitted(value, sign.fit(rows, positive), metadata)


def calibrate(fitted: Fitted, validation: Sequence[LoggedDecision], config: CoveredCallCandidatesConfig) -> Fitted:
    """With the offset by which outcomes of ``validation`` were, on average, better than predicted.

    Raises:
        QScorerError: if no outcome there is known.
    """
    target = outcomes(validation, config)
    known = ~np.isnan(target)
    if not known.any():
        raise QScorerError(
            "No outcome of the validation split is known, so that the predictions cannot be calibrated. Give more "
            "data, or other splits."
        )
    predicted, _ = fitted.predict([entry.decision for entry in validation])
    offset = fitted.metadata["offset"] + float(np.mean(target[known] - predicted[known]))
    return fitted._replace(metadata=fitted.metadata | {"offset": offset, "validation": describe(validation, known)})


def fit(
    train: Sequence[LoggedDecision],
    validation: Sequence[LoggedDecision],
    config: CoveredCallCandidatesConfig,
    positive_weight: float = 1.0,
) -> Fitted:
    """Learnt on one split and calibrated on the next; see learn and calibrate for what they raise."""
    return calibrate(learn(train, config, positive_weight), validation, config)


def describe(entries: Sequence[LoggedDecision], known: np.ndarray) -> dict:
    times = [entry.decision.decision_time for entry in entries]
    return {
        "from": min(times).isoformat(),
        "to": max(times).isoformat(),
        "decisions": len(entries),
        "candidates": len(known),
        "known": int(known.sum()),
        "unknown": int((~known).sum()),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Deciding


class QScorer:
    """A policy from a saved file, which it reads again when the file is replaced; ``QScorer(fitted)`` needs no file.

    Args:
        path: the file to watch, if any.
        check_every: seconds between looks at the file's time stamp, at the next ``decide`` after them; 0 looks at
            every one.
    """

    def __init__(self, fitted: Fitted, path: str | os.PathLike | None = None, check_every: float = 60.0):
        self.fitted, self.path, self.check_every = fitted, path, check_every
        self.stamp = stamp(path) if path else None
        self.next_check = monotonic() + check_every

    @classmethod
    def load(cls, path: str | os.PathLike, check_every: float = 60.0) -> "QScorer":
        """Raises QScorerError if the file cannot be used: see read."""
        seen = stamp(path)  # before it is read: if it is replaced meanwhile, the next look sees another stamp
        scorer = cls(read(path), path, check_every)
        scorer.stamp = seen
        return scorer

    def decide(self, decisions: Sequence[covered_call_candidates.Decision]) -> list[Decision]:
        """An answer to each decision: the candidate with the highest q_sell, if no gate stops it.

        The candidates may come in any order; of equal ones the more confident is best, then the higher strike. All
        answers of one call are one model's, also when its file is replaced meanwhile.
        """
        fitted, decisions = self.current(), list(decisions)
        values, confidences = fitted.predict(decisions)
        ends = np.cumsum([len(decision.candidates) for decision in decisions])[:-1]
        parts = zip(decisions, np.split(values, ends), np.split(confidences, ends), strict=True) if decisions else ()
        return [decide_one(*part, fitted) for part in parts]

    def current(self) -> Fitted:
        """The models, from the file again if it has been replaced since the last look."""
        if self.path and monotonic() >= self.next_check:
            self.next_check = monotonic() + self.check_every
            seen = stamp(self.path)
            if seen != self.stamp:
                self.stamp = seen  # remembered also where it is broken: one warning, not one at every look
                self.reload()
        return self.fitted

    def reload(self) -> None:
        try:
            self.fitted = read(self.path)
            logger.info("%s has been replaced, and read again.", self.path)
        except (QScorerError, OSError) as error:
            logger.warning("The Q-scorer goes on with the model it has, for its new file is broken. %s", error)


def decide_one(
    decision: covered_call_candidates.Decision, values: np.ndarray, confidences: np.ndarray, fitted: Fitted
) -> Decision:
    """From predicted outcomes (shares of spot) and confidences of one decision's candidates."""
    scores = {str(i): float(value * decision.spot) for i, value in enumerate(values, start=1)} | {NO_TRADE: 0.0}
    if not len(values):
        return Decision(NO_TRADE, None, math.nan, math.nan, scores, NO_CANDIDATE)

    def rank(i: int) -> tuple:
        return values[i], confidences[i], decision.candidates[i].strike, decision.candidates[i].instrument

    best = max(range(len(values)), key=rank)
    stopped_by = fitted.gates.stop(100 * values[best], confidences[best])
    if decision.exit_style not in fitted.metadata["exit_styles"]:
        stopped_by = OTHER_STYLE  # its outcomes mean something else
    answer = str(best + 1)
    return Decision(
        answer if stopped_by is None else NO_TRADE,
        best + 1,
        scores[answer],
        float(confidences[best]),
        scores,
        stopped_by,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files: one zip, so that what a model is can be read, and refused, before anything is unpickled

METADATA, MODELS = "metadata.json", "models.joblib"


def save(fitted: Fitted, path: str | os.PathLike) -> None:
    """Whole or not at all: a policy that reads the file meanwhile gets the old one or the new one."""
    models, file = io.BytesIO(), io.BytesIO()
    joblib.dump([fitted.value, fitted.positive], models)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in ((METADATA, json.dumps(fitted.metadata, indent=2)), (MODELS, models.getvalue())):
            archive.writestr(zipfile.ZipInfo(name), content)  # with no date: the same model is the same file
    write(path, file.getvalue())


def write(path: str | os.PathLike, content: bytes) -> None:
    """Under a temporary name in the same folder, then renamed."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read(path: str | os.PathLike) -> Fitted:
    """A saved scorer.

    Raises:
        QScorerError: if it is not whole, or was made by another version of this file or of scikit-learn.
    """
    if not os.path.isfile(path):
        raise QScorerError(f"{path} is no file: make one with python q_scorer.py.")
    try:
        with zipfile.ZipFile(path) as archive:
            metadata = json.loads(archive.read(METADATA))
            check_metadata(path, metadata)
            value, positive = joblib.load(io.BytesIO(archive.read(MODELS)))
        fitted = Fitted(value, positive, metadata)
        fitted.gates.check()
    except QScorerError:
        raise
    except Exception as error:  # whatever pickle makes of bytes that are not its own
        raise QScorerError(f"{path} is not a whole Q-scorer: {type(error).__name__}: {error}. Fit it again.") from None
    return fitted


def check_metadata(path: str | os.PathLike, metadata: dict) -> None:
    versions = metadata.get("versions", {})
    for what, its, ours in (
        ("version", metadata.get("version"), VERSION),
        ("features", metadata.get("features"), FEATURES),
        ("scikit-learn version", versions.get("scikit-learn"), sklearn.__version__),
    ):
        if its != ours:
            raise QScorerError(f"{path} was fitted with {what} {its}, and this is {ours}: fit it again.")


def stamp(path: str | os.PathLike) -> tuple | None:
    """What changes when a file is replaced; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


# ---------------------------------------------------------------------------------------------------------------------
# Predicted against realised


class Comparison(NamedTuple):
    """What was predicted beside what came. Money in USD a unit of underlying; correlations are of shares of spot.

    Args:
        decisions: all of them; ``sold`` those at which it sold; ``sold_known`` those of which the outcome is known.
        predicted, realised, correlation: means, and Pearson's correlation, over those sold with a known outcome.
        candidates, candidate_correlation: all candidates with a known outcome, sold or not.
        mean_pnl: realised net outcome a decision, over the decisions at which it is known; not selling is 0.
        positive: decisions at which the best candidate's known net outcome was above 0; ``missed`` those of them at
            which it did not sell.
    """

    decisions: int
    sold: int
    sold_known: int
    predicted: float
    realised: float
    correlation: float
    candidates: int
    candidate_correlation: float
    mean_pnl: float
    positive: int
    missed: int

    @property
    def trade_rate(self) -> float:
        return self.sold / self.decisions if self.decisions else math.nan

    def sentence(self) -> str:
        sold = f"It sold at {self.sold:,} of {self.decisions:,} decisions ({self.trade_rate:.1%})"
        if self.sold_known:
            sold += (
                f"; over the {self.sold_known:,} with a known outcome it predicted {self.predicted:,.1f} USD on "
                f"average, and {self.realised:,.1f} came (correlation {number(self.correlation)})"
            )
        return (
            f"{sold}. Over all {self.candidates:,} candidates with a known outcome, the correlation of predicted with "
            f"realised is {number(self.candidate_correlation)}. At {self.positive:,} decisions some candidate had a "
            f"positive outcome; at {self.missed:,} of them it did not sell."
        )


def comparison_json(compared: Comparison) -> dict:
    """Figures that are not defined are null."""
    found = compared._asdict() | {"trade_rate": compared.trade_rate}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def usd(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:,.1f}"


def compare(
    answers: Sequence[Decision], entries: Sequence[LoggedDecision], config: CoveredCallCandidatesConfig
) -> Comparison:
    """Answers of ``decide`` beside the net outcomes of the same decisions."""
    predicted, realised = candidate_pairs(answers, entries, config)
    sold, positive, missed, pnl = [], 0, 0, []
    for answer, entry in zip(answers, entries, strict=True):
        values = [net.value for net in net_outcomes(entry, config)]
        some_positive = any(value is not None and value > 0 for value in values)
        positive += some_positive
        missed += some_positive and answer.answer == NO_TRADE
        came = 0.0 if answer.answer == NO_TRADE else values[int(answer.answer) - 1]
        pnl += [] if came is None else [came]
        if answer.answer != NO_TRADE and came is not None:
            sold.append((answer.q_sell, came, entry.decision.spot))
    pairs = np.array(sold).reshape(-1, 3)
    shares = pairs[:, :2] / pairs[:, 2:]
    return Comparison(
        decisions=len(answers),
        sold=sum(answer.answer != NO_TRADE for answer in answers),
        sold_known=len(sold),
        predicted=mean(pairs[:, 0]),
        realised=mean(pairs[:, 1]),
        correlation=correlation(*shares.T),
        candidates=len(predicted),
        candidate_correlation=correlation(predicted, realised),
        mean_pnl=mean(pnl),
        positive=int(positive),
        missed=int(missed),
    )


def candidate_pairs(
    answers: Sequence[Decision], entries: Sequence[LoggedDecision], config: CoveredCallCandidatesConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and realised net outcomes of all candidates for which it is known, as shares of spot."""
    predicted = [
        answer.scores[str(index)] / entry.decision.spot
        for answer, entry in zip(answers, entries, strict=True)
        for index in range(1, len(entry.decision.candidates) + 1)
    ]
    realised = outcomes(entries, config)
    known = ~np.isnan(realised)
    return np.array(predicted, dtype=float)[known], realised[known]


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; NaN where one of the two does not vary."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def draw_reliability(path: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Mean realised against mean predicted outcome in tenths of the candidates, by prediction, in % of spot.

    Args:
        pairs: for each exit style the predicted and the realised outcomes, shares of spot.
    """
    figure = Plot(figsize=(7, 6), layout="constrained")
    axis = figure.subplots()
    points = []
    for style, (predicted, realised) in pairs.items():
        tenths = np.array_split(np.argsort(predicted, kind="stable"), 10) if len(predicted) >= 10 else []
        means = np.array([(predicted[tenth].mean(), realised[tenth].mean()) for tenth in tenths]) * 100
        if len(means):
            errors = [100 * realised[tenth].std() / math.sqrt(len(tenth)) for tenth in tenths]
            axis.errorbar(*means.T, yerr=errors, fmt="o-", capsize=3, label=f"{style}, {len(predicted):,} candidates")
            points.append(means)
    if points:
        low, high = np.concatenate(points)[:, 0].min(), np.concatenate(points)[:, 0].max()
        axis.plot([low, high], [low, high], color="grey", linestyle=":", label="as predicted")
        axis.legend()
    axis.axhline(0, color="black", linewidth=1)
    axis.set(xlabel="predicted net outcome (% of spot)", ylabel="realised net outcome (% of spot)")
    axis.set(title="Q-scorer, tenths by prediction (bars: standard error\nas if outcomes did not overlap: they do)")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Walking forward: whatever is judged was decided after everything that was learnt from had ended


class Fold(NamedTuple):
    """A scorer, the decisions that it was judged on, its answers to them, and what came of them."""

    fitted: Fitted
    entries: list[LoggedDecision]
    answers: list[Decision]
    compared: Comparison


def ended_before(entries: Sequence[LoggedDecision], time: datetime.datetime) -> list[LoggedDecision]:
    return [entry for entry in entries if entry.outcome_end < time]


def decision_times(entries: Sequence[LoggedDecision]) -> list[datetime.datetime]:
    return sorted({entry.decision.decision_time for entry in entries})


def cut(entries: Sequence[LoggedDecision], share: float) -> tuple[list[LoggedDecision], list[LoggedDecision]]:
    """The last ``share`` of the decision times, and before it what had ended when they begin."""
    times = decision_times(entries)
    if not times:
        return [], []
    begin = times[min(len(times) - 1, round(len(times) * (1 - share)))]
    return ended_before(entries, begin), [entry for entry in entries if entry.decision.decision_time >= begin]


def blocks(entries: Sequence[LoggedDecision], folds: int) -> Iterator[tuple[list, list]]:
    """For each fold what may be learnt from, and the block to judge on: the decision times in folds + 1 equal parts.

    The past grows from fold to fold. A decision of which an outcome ends at or after the block's first decision time
    is kept out of it.
    """
    times = decision_times(entries)
    if not 1 <= folds < len(times):
        raise QScorerError(f"folds={folds} with {len(times)} decision times: give from 1 to one less than these.")
    begins = [times[len(times) * fold // (folds + 1)] for fold in range(1, folds + 1)]
    parts = [bisect.bisect_right(begins, entry.decision.decision_time) for entry in entries]
    for fold, begin in enumerate(begins, start=1):
        block = [entry for entry, part in zip(entries, parts, strict=True) if part == fold]
        yield ended_before(entries, begin), block


def walk_forward(
    entries: Sequence[LoggedDecision],
    folds: int,
    config: CoveredCallCandidatesConfig,
    positive_weight: float = 1.0,
    gates: Gates = Gates(),  # noqa: B008
) -> list[Fold]:
    """Fits and judges a scorer for each block of decisions, on what had ended before it, never at random.

    The latest CALIBRATION_SHARE of each past is kept for the offset, purged as the blocks are. A fold whose past is
    too short to fit on is left out, with a warning.
    """
    found = []
    for past, block in tqdm(list(blocks(entries, folds)), desc="Walking forward", unit=" folds", disable=None):
        train, calibration = cut(past, CALIBRATION_SHARE)
        try:
            fitted = fit(train, calibration, config, positive_weight).with_gates(gates)
        except QScorerError as error:
            logger.warning("No fold from %s: %s", block[0].decision.decision_time.date(), error)
            continue
        answers = QScorer(fitted).decide([entry.decision for entry in block])
        found.append(Fold(fitted, block, answers, compare(answers, block, config)))
    return found


HEAD = ("fold", "learnt to", "outcomes", "judged from", "to", "decisions", "correlation", "sells", "predicted",
        "realised", "P&L a decision")  # fmt: skip


def fold_rows(folds: Sequence[Fold]) -> list[list[str]]:
    """A line for each fold, the head first: predicted and realised are of what it sold, USD."""
    rows = [list(HEAD)]
    for place, (fitted, entries, _, compared) in enumerate(folds, start=1):
        times = decision_times(entries)
        rows.append(
            [
                str(place),
                fitted.metadata["train"]["to"][:10],
                f"{fitted.metadata['train']['known']:,}",
                str(times[0].date()),
                str(times[-1].date()),
                f"{compared.decisions:,}",
                number(compared.candidate_correlation),
                f"{compared.trade_rate:.3f}",
                *map(usd, (compared.predicted, compared.realised, compared.mean_pnl)),
            ]
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Search for the gates: a coarse grid on the first half of validation, finalists on the second


class Cell(NamedTuple):
    """What gates brought over the decisions of a window; ``mean_percent`` (of spot) and ``mean_usd`` a decision."""

    threshold: float
    min_confidence: float
    min_abs_return: float
    decisions: int
    sold: int
    mean_percent: float
    mean_usd: float

    @property
    def gates(self) -> Gates:
        return Gates(*self[:3])


class Best(NamedTuple):
    """A decision's best candidate, with its predictions and its net outcome as % of spot and in USD."""

    percent: float
    confidence: float
    realised_percent: float
    realised_usd: float


class Search(NamedTuple):
    """The grid on the first window, the finalists on the second, in the order of the first, and the winner.

    ``saved`` is the winner on the second window again, with the offset of both windows; ``offsets`` are both offsets,
    as shares of spot.
    """

    grid: list[Cell]
    finals: list[Cell]
    winner: Cell
    saved: Cell
    offsets: tuple[float, float]
    windows: dict


def optimize(
    learnt: Fitted, validation: Sequence[LoggedDecision], config: CoveredCallCandidatesConfig
) -> tuple[Fitted, Search]:
    """The scorer, calibrated on all of ``validation``, with the gates that did best there.

    The first half of its decision times, purged, calibrates and ranks the grid; the FINALISTS best of it that differ
    in what they sell, and the default gates, meet in the second half, and the best mean P&L (% of spot a decision)
    wins. Gates with fewer than LEAST_TRADES trades in the first half are no finalists, but never selling is.

    Raises:
        QScorerError: if a half holds fewer than LEAST_TRADES decisions whose best candidate has a known outcome.
    """
    halves = dict(zip(("first", "second"), cut(validation, 0.5), strict=True))
    too_short = QScorerError(
        f"The validation split has {len(validation)} decisions, too few to search for gates: a half of it holds fewer "
        f"than {LEAST_TRADES} known outcomes. Give more data, a longer validation split, or leave --optimize out."
    )
    if not len(outcomes(halves["first"], config)):
        raise too_short
    early = calibrate(learnt, halves["first"], config)
    bests = {name: known_bests(early, half, config) for name, half in halves.items()}
    if min(map(len, bests.values())) < LEAST_TRADES:
        raise too_short
    combinations = itertools.starmap(Gates, itertools.product(THRESHOLDS, MIN_CONFIDENCES, MIN_ABS_RETURNS))
    grid = [measure(gates, bests["first"]) for gates in combinations]
    finals = [measure(gates, bests["second"]) for gates in pick_finalists(grid, bests["first"])]
    winner = max(finals, key=lambda cell: cell.mean_percent)  # the first, so the better of the first window, of equals
    windows = {
        name: {"from": str(times[0].date()), "to": str(times[-1].date()), "decisions": len(bests[name])}
        for name, times in ((name, decision_times(half)) for name, half in halves.items())
    }
    fitted = calibrate(learnt, validation, config).with_gates(winner.gates)
    saved = measure(winner.gates, known_bests(fitted, halves["second"], config))
    offsets = early.metadata["offset"], fitted.metadata["offset"]
    return fitted, Search(grid, finals, winner, saved, offsets, windows)


def known_bests(fitted: Fitted, entries: Sequence[LoggedDecision], config: CoveredCallCandidatesConfig) -> list[Best]:
    """Of the decisions whose best candidate has a known outcome: the same ones for all gates."""
    found = []
    answers = QScorer(fitted).decide([entry.decision for entry in entries])
    for answer, entry in zip(answers, entries, strict=True):
        came = net_outcomes(entry, config)[answer.best - 1].value if answer.best else None
        if came is not None and answer.stopped_by != OTHER_STYLE:
            to_percent = 100 / entry.decision.spot
            found.append(Best(answer.q_sell * to_percent, answer.confidence, came * to_percent, came))
    return found


def sells(gates: Gates, bests: Sequence[Best]) -> list[bool]:
    return [gates.stop(best.percent, best.confidence) is None for best in bests]


def measure(gates: Gates, bests: Sequence[Best]) -> Cell:
    sold = np.array(sells(gates, bests))
    percent, usd = np.array([(best.realised_percent, best.realised_usd) for best in bests]).T
    return Cell(*gates, len(bests), int(sold.sum()), float((percent * sold).mean()), float((usd * sold).mean()))


def pick_finalists(grid: Sequence[Cell], bests: Sequence[Best]) -> list[Gates]:
    """The best gates of the grid that sell different things, and the default ones; of the same the lowest."""
    different = {}
    for cell in sorted(grid, key=lambda cell: cell.gates):
        if cell.sold == 0 or cell.sold >= LEAST_TRADES:
            different.setdefault(tuple(sells(cell.gates, bests)), cell)
    ranked = sorted(different.values(), key=lambda cell: -cell.mean_percent)
    return list(dict.fromkeys([*(cell.gates for cell in ranked[:FINALISTS]), Gates()]))


def grid_csv(grid: Sequence[Cell]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Cell._fields)
    writer.writerows(grid)
    return text.getvalue().encode()


def draw_grid(search: Search) -> bytes:
    """The whole grid as heat maps, one for each min_abs_return, as a PNG; the winner has a frame."""
    figure = Plot(figsize=(15, 10), layout="constrained")
    by_gates = {cell.gates: cell for cell in search.grid}
    limit = max(max(abs(cell.mean_percent) for cell in search.grid), 1e-9)
    axes = figure.subplots(2, math.ceil(len(MIN_ABS_RETURNS) / 2), sharex=True, sharey=True).flat
    for axis, least in zip(axes, MIN_ABS_RETURNS, strict=True):
        cells = [[by_gates[Gates(t, c, least)] for t in THRESHOLDS] for c in MIN_CONFIDENCES]
        values = [[cell.mean_percent for cell in row] for row in cells]
        image = axis.imshow(values, origin="lower", aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                dark = abs(cell.mean_percent) > 0.6 * limit
                text = f"{cell.mean_percent:+.2f}\n{cell.sold}"
                axis.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
                if cell.gates == search.winner.gates:
                    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="gold", linewidth=4))
        axis.set_xticks(range(len(THRESHOLDS)), [f"{value:g}" for value in THRESHOLDS])
        axis.set_yticks(range(len(MIN_CONFIDENCES)), [f"{value:g}" for value in MIN_CONFIDENCES])
        axis.set(title=f"min_abs_return {least:g} %", xlabel="threshold (% of spot)", ylabel="min_confidence")
    window = search.windows["first"]
    figure.suptitle(
        f"Mean P&L vs HODL a decision (% of spot), and trades, over {window['decisions']:,} decisions of validation, "
        f"{window['from']} to {window['to']}. Frame: the winner of the second window"
    )
    figure.colorbar(image, ax=figure.axes, label="% of spot a decision")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def run(asked: argparse.Namespace) -> None:
    from evaluate_policy import align, data_options, read_splits  # which imports this file

    gates = Gates(asked.threshold or 0.0, asked.min_confidence or 0.0, asked.min_abs_return or 0.0)
    gates.check()
    files, config = data_options(asked, {})
    _, splits = read_splits(files, config)
    train, validation = splits["train"], splits.get("validation", [])
    print("Learning, calibrating ...", flush=True)
    learnt = learn(train, config, asked.positive_weight)
    if asked.optimize:
        fitted, search = optimize(learnt, validation, config)
    else:
        fitted, search = calibrate(learnt, validation, config).with_gates(gates), None
    for name in ("train", "validation"):
        print(split_sentence(name, fitted.metadata[name]))
    print(f"Offset fitted on validation: {100 * fitted.metadata['offset']:+.3f} % of spot")
    folds = []
    if asked.folds:
        folds = walk_forward([*train, *validation], asked.folds, config, asked.positive_weight, gates)
        table = align(fold_rows(folds))
        print(f"\nWalk forward over train and validation, {gates_text(gates)}; money in USD:\n\n{table}\n")
    folder = Path(asked.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    more = {"data_files": file_hashes(files), "walk_forward": list(map(fold_json, folds))}
    if search:
        print("\n".join(search_lines(search)))
        more["optimize"] = {
            "windows": search.windows,
            "finalists": [cell._asdict() for cell in search.finals],
            "winner": search.winner._asdict(),
            "saved": search.saved._asdict(),
        }
        write(folder / "grid.csv", grid_csv(search.grid))
        write(folder / "grid.png", draw_grid(search))
    save(fitted._replace(metadata=fitted.metadata | more), folder / FILE_NAME)
    print(f"Saved {folder / FILE_NAME}, {gates_text(fitted.gates)}")


def split_sentence(name: str, found: dict) -> str:
    return (
        f"{name}: {found['decisions']:,} decisions, {found['from'][:10]} to {found['to'][:10]}; {found['known']:,} of "
        f"{found['candidates']:,} outcomes are known, the other {found['unknown']:,} are left out"
    )


def gates_text(gates: Gates) -> str:
    return (
        f"threshold {gates.threshold:g} %, min_confidence {gates.min_confidence:g}, min_abs_return "
        f"{gates.min_abs_return:g} %"
    )


def search_lines(search: Search) -> list[str]:
    first, second = search.windows["first"], search.windows["second"]
    lines = [
        f"Searched {len(search.grid)} gates on {first['decisions']} decisions, {first['from']} to {first['to']}; "
        f"finalists on {second['decisions']}, {second['from']} to {second['to']}:"
    ]
    for cell in search.finals:
        mark = "  <- chosen" if cell == search.winner else ""
        lines.append(f"  {gates_text(cell.gates)}: {brought(cell)}{mark}")
    if search.winner.mean_percent <= 0:
        lines.append("WARNING: none of them earned more than never selling there: do not expect these gates to.")
    before, after = (100 * offset for offset in search.offsets)
    lines.append(
        f"Calibrated on both windows, by {after:+.3f} % of spot (on the first alone {before:+.3f} %), the chosen "
        f"gates let through on the second: {brought(search.saved)}"
    )
    return lines


def brought(cell: Cell) -> str:
    return f"{cell.sold} trades, {cell.mean_percent:+.3f} % of spot a decision ({cell.mean_usd:+,.1f} USD)"


def fold_json(fold: Fold) -> dict:
    times = decision_times(fold.entries)
    span = {"from": times[0].isoformat(), "to": times[-1].isoformat()}
    return {"train": fold.fitted.metadata["train"], "judged": span, **comparison_json(fold.compared)}


def file_hashes(files: list[str]) -> dict[str, str]:
    hashes = {}
    for path in files:
        with open(path, "rb") as file:
            hashes[os.path.basename(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    from evaluate_policy import add_data_options, typed

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output_dir", "--output-dir", metavar="DIR", default="out/q_scorer", help="default: %(default)s")
    add("--positive_weight", "--positive-weight", type=float, default=1.0, metavar="W",
        help="of positive outcomes in the regression, beside 1 for others; default: %(default)s")  # fmt: skip
    add("--folds", type=int, default=FOLDS, help="of the walk forward, 0 for none; default: %(default)s")
    add("--optimize", action="store_true", help="search threshold and gates on validation; grid.csv and grid.png")
    for name, what in (
        ("threshold", "sell only above this predicted net outcome, in %% of spot; default: 0"),
        ("min_confidence", "sell only at this probability of a positive outcome or more; default: 0"),
        ("min_abs_return", "sell only where the predicted net outcome is this far from 0, in %% of spot; default: 0"),
    ):
        add(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), type=float, metavar="X", help=what)
    add_data_options(parser, "as for evaluate_policy.py")
    parser.set_defaults(hindsight=False)
    asked = parser.parse_args(arguments)
    if asked.optimize and (asked.threshold, asked.min_confidence, asked.min_abs_return) != (None, None, None):
        parser.error("--optimize finds threshold, min_confidence and min_abs_return: do not give them too.")
    if asked.folds < 0:
        parser.error(f"--folds {asked.folds}: give 0 or more.")
    return typed(parser, asked)


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    asked = parse_arguments(arguments)
    try:
        run(asked)
    except (CandidatesError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
