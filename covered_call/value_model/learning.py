"""Learning what selling a call brings: the trees, their offset, and the gates that predictions must pass."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import sklearn
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from covered_call.candidates.columns import COUNTERFACTUAL, Columns, columns_of, time_of
from covered_call.candidates.context_lines import context_names
from covered_call.candidates.data_options import OUTCOME_OPTIONS
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import code_of
from covered_call.candidates.preferences import recorded_outcomes
from covered_call.candidates.records import is_sold
from covered_call.candidates.schema import CandidatesError, LoggedDecision
from covered_call.value_model.boosted_trees import Trees

VERSION = 2  # raise it when a saved file would be read otherwise, or its numbers mean something else
FEATURES = ["moneyness", "dte", "delta", "score", "iv", "ivrv_ratio", "exit_style"]
# Few, small steps and large leaves: outcomes of neighbouring days share most of their week, and in the sample their
# standard deviation is 4 % of spot around a mean of -0.2 %. Chosen beforehand, not by what they earned.
BOOSTING = {"max_iter": 60, "learning_rate": 0.05, "max_leaf_nodes": 6, "l2_regularization": 10.0, "random_state": 0}
LEAF_SHARE, MIN_LEAF = 0.05, 20
MIN_ROWS = 2 * MIN_LEAF  # of fewer no tree could be grown
CERTAIN = 1_000.0  # log-odds, of which the probability is 1.0, and of their negative 0.0


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
        most = sys.float_info.max
        for name, low, high, what in (
            ("threshold", -most, most, "a number, in % of spot"),
            ("min_confidence", 0, 1, "a probability, from 0 to 1"),
            ("min_abs_return", 0, most, "0 or more, in % of spot"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise QScorerError(f"{name}={value!r:.40}: give {what}.")

    def stop(self, percent: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        """(N,) the gate that keeps a candidate from being sold, in the order they are asked; "" if it may be."""
        stopped = {
            "min_confidence": confidence < self.min_confidence,
            "min_abs_return": abs(percent) < self.min_abs_return,
            "threshold": ~(percent > self.threshold),
        }
        return np.select(list(stopped.values()), list(stopped), "")


def gates_text(gates: Gates) -> str:
    return (
        f"threshold {gates.threshold:g} %, min_confidence {gates.min_confidence:g}, min_abs_return "
        f"{gates.min_abs_return:g} %"
    )


def in_columns(entries: Columns | Sequence[LoggedDecision]) -> Columns:
    return entries if isinstance(entries, Columns) else columns_of(entries)


def features(columns: Columns, exit_styles: Sequence[str], context: Sequence[str] = ()) -> np.ndarray:
    """One row a candidate, shape (R, 6 + exit styles + context), none with a scale of its own but the user's columns;
    NaN where missing.

    Strike / spot, dte (days), delta, score, iv, ivrv_ratio, 1.0 in the column of the decision's exit style, and what
    is known of the market by these names.

    Raises:
        QScorerError: if the decisions do not have that context.
    """
    missing = [name for name in context if name not in columns.context]
    if missing and len(columns):
        raise QScorerError(
            f"The Q-scorer was fitted with the market's context, and here {missing[0]} is not told. Load files with "
            "the same options (context, context_columns, context_vols); live, give spots, and such vols."
        )
    of, numbers = columns.decision_of, columns.numbers
    state = [numbers["strike"] / columns.spot[of], *(numbers[name] for name in FEATURES[1:-1])]
    styles = [columns.exit_style[of] == code_of(columns.names, style) for style in exit_styles]
    market = [columns.context[name][of] if len(columns) else of for name in context]
    return np.column_stack([*state, *styles, *market]).astype(float)


def net_outcomes(columns: Columns, config: CoveredCallCandidatesConfig) -> np.ndarray:
    """(R,) USD a unit that selling each candidate brings: as computed, else as recorded; NaN where unknown."""
    recorded = np.where(is_sold(columns), recorded_outcomes(columns, config)[columns.decision_of], np.nan)
    computed = columns.numbers[COUNTERFACTUAL]
    return np.where(np.isnan(computed), recorded, computed)


def outcomes(entries: Columns | Sequence[LoggedDecision], config: CoveredCallCandidatesConfig) -> np.ndarray:
    """(R,) the same as a share of spot."""
    columns = in_columns(entries)
    return net_outcomes(columns, config) / columns.spot[columns.decision_of]


class Predicted(NamedTuple):
    """What is predicted of R candidates: net outcomes as shares of spot, and the probability of a positive one."""

    values: np.ndarray
    confidences: np.ndarray

    def at(self, rows: np.ndarray) -> "Predicted":
        return Predicted(self.values[rows], self.confidences[rows])


class Fitted(NamedTuple):
    """Trees of outcomes as a share of spot, trees of the log-odds that they are positive, and what is told of them.

    ``metadata`` is what JSON can hold; "offset" in it is added to what the first say.
    """

    value: Trees
    positive: Trees
    metadata: dict

    @property
    def gates(self) -> Gates:
        return Gates(**self.metadata["gates"])

    def with_gates(self, gates: Gates) -> "Fitted":
        gates.check()
        return self._replace(metadata=self.metadata | {"gates": gates._asdict()})

    def predict(self, columns: Columns) -> Predicted:
        """Net outcomes, the offset added, and confidences."""
        rows = features(columns, self.metadata["exit_styles"], self.metadata.get("context", ()))
        return Predicted(self.value.predict(rows) + self.metadata["offset"], expit(self.positive.predict(rows)))


def learn(
    train: Columns | Sequence[LoggedDecision], config: CoveredCallCandidatesConfig, positive_weight: float = 1.0
) -> Fitted:
    """Fits both models on the known outcomes of ``train``; with no offset yet, and no gate but q_sell > 0.

    Args:
        config: the friction and horizon that outcomes are net of.
        positive_weight: what a positive outcome weighs in the regression, beside 1 for another. The confidence stays
            a probability: no weight touches it.

    Raises:
        QScorerError: for fewer than MIN_ROWS known outcomes, or a weight that is not above 0.
    """
    check_weight(positive_weight)
    train = in_columns(train)
    styles = sorted(train.names[code] for code in np.unique(train.exit_style))
    target = outcomes(train, config)
    known = ~np.isnan(target)
    if known.sum() < MIN_ROWS:
        raise QScorerError(
            f"Of {len(target)} candidates to fit on, {known.sum()} have a known outcome: at least {MIN_ROWS} are "
            "needed. Give more data, or other splits."
        )
    context = context_names(config)
    rows, target = features(train, styles, context)[known], target[known]
    rows[:, np.isnan(rows).all(axis=0)] = 0.0  # scikit-learn fails on a column without a number; no tree asks this one
    positive = target > 0
    options = BOOSTING | {"min_samples_leaf": max(MIN_LEAF, round(LEAF_SHARE * len(target)))}
    value = HistGradientBoostingRegressor(**options, early_stopping=False)
    value.fit(rows, target, sample_weight=np.where(positive, positive_weight, 1.0))
    if 0 < positive.sum() < len(positive):
        sign = Trees.of(HistGradientBoostingClassifier(**options, early_stopping=False).fit(rows, positive))
    else:
        sign = Trees.constant(CERTAIN if positive.all() else -CERTAIN)
    metadata = {
        "version": VERSION,
        "features": FEATURES,
        "exit_styles": styles,
        **({"context": context} if context else {}),
        "target": "net outcome of selling against holding, as a share of spot",
        "max_iv": config.max_iv,
        "outcome_options": {name: getattr(config, name) for name in OUTCOME_OPTIONS},
        "positive_weight": positive_weight,
        "gates": Gates()._asdict(),
        "offset": 0.0,
        "train": {**describe(train, known), "outcomes": gains_and_losses(target)},
        "versions": {"scikit-learn": sklearn.__version__, "numpy": np.__version__},
    }
    return Fitted(Trees.of(value), sign, metadata)


def check_weight(positive_weight: float) -> None:
    if not 0 < positive_weight < math.inf:
        raise QScorerError(f"positive_weight={positive_weight!r}: give a number above 0; 1 is symmetric.")


def fit_offset(
    fitted: Fitted, validation: Columns | Sequence[LoggedDecision], config: CoveredCallCandidatesConfig
) -> Fitted:
    """With the offset by which outcomes of ``validation`` were, on average, better than predicted.

    Raises:
        QScorerError: if no outcome there is known.
    """
    validation = in_columns(validation)
    target = outcomes(validation, config)
    known = ~np.isnan(target)
    if not known.any():
        raise QScorerError(
            "No outcome of the validation split is known, so that no offset can be fitted. Give more "
            "data, or other splits."
        )
    predicted = fitted.predict(validation).values
    offset = fitted.metadata["offset"] + float(np.mean(target[known] - predicted[known]))
    return fitted._replace(metadata=fitted.metadata | {"offset": offset, "validation": describe(validation, known)})


def fit(
    train: Columns | Sequence[LoggedDecision],
    validation: Columns | Sequence[LoggedDecision],
    config: CoveredCallCandidatesConfig,
    positive_weight: float = 1.0,
) -> Fitted:
    """Learnt on one split, with the offset of the next; see learn and fit_offset for what they raise."""
    return fit_offset(learn(train, config, positive_weight), validation, config)


def gains_and_losses(target: np.ndarray) -> dict:
    """Of known outcomes (K,), shares of spot: which share of them is positive, the mean gain and the mean loss, both
    above 0, None where there is none."""
    gains, losses = target[target > 0], -target[target < 0]
    means = {name: float(its.mean()) if len(its) else None for name, its in (("gain", gains), ("loss", losses))}
    return {"positive": float(np.mean(target > 0)), **{f"mean_{name}": mean for name, mean in means.items()}}


def payoff_of(metadata: dict) -> float | None:
    """The mean gain over the mean loss of the training outcomes; None without both, or of a file that has none."""
    found = metadata["train"].get("outcomes", {})
    gain, loss = (found.get(name) for name in ("mean_gain", "mean_loss"))
    return gain / loss if gain and loss else None


def describe(columns: Columns, known: np.ndarray) -> dict:
    """What a split holds; with "settled", when the last of its known outcomes was, and "numbers", from where to where
    each number of a candidate goes."""
    numbers = {name: columns.numbers[name] for name in FEATURES[1:-1] if not np.isnan(columns.numbers[name]).all()}
    return {
        "from": time_of(int(columns.time.min())).isoformat(),
        "to": time_of(int(columns.time.max())).isoformat(),
        "decisions": len(columns),
        "candidates": len(known),
        "known": int(known.sum()),
        "unknown": int((~known).sum()),
        "settled": time_of(int(columns.label_end[known].max())).isoformat(),
        "numbers": {name: [float(np.nanmin(values)), float(np.nanmax(values))] for name, values in numbers.items()},
    }
