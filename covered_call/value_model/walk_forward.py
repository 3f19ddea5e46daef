"""Does the Q-scorer's value model hold in time? Predicted against realised, walking forward.

Whatever is judged was decided after everything that was learnt from had ended.
"""

import bisect
import datetime
import io
import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from datasets.utils import tqdm
from matplotlib.figure import Figure as Plot

from covered_call.candidates.columns import Columns, columns_of
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.preferences import at, best_places
from covered_call.candidates.schema import LoggedDecision
from covered_call.value_model.learning import Fitted, Gates, QScorerError, fit, net_outcomes, outcomes
from covered_call.value_model.scorer import picks_of

logger = logging.getLogger(__name__)

FOLDS = 5
CALIBRATION_BINS = 10
OFFSET_SHARE = 0.1  # of a fold's past, its latest part, is kept from the models to fit the offset on


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
    columns: Columns, values: np.ndarray, picks: np.ndarray, config: CoveredCallCandidatesConfig
) -> Comparison:
    """What was predicted and picked at D decisions beside the net outcomes of their R candidates.

    Args:
        values: (R,) predicted, as shares of spot.
        picks: (D,) places of candidates, -1 for no trade.
    """
    net, sold = net_outcomes(columns, config), picks >= 0
    positive = best_places(net, columns) >= 0
    came = at(picks, net, columns)
    known = sold & ~np.isnan(came)
    predicted, shares = at(picks, values, columns)[known], came[known] / columns.spot[known]
    pairs = candidate_pairs(columns, values, config)
    return Comparison(
        decisions=len(columns),
        sold=int(sold.sum()),
        sold_known=int(known.sum()),
        predicted=mean(predicted * columns.spot[known]),
        realised=mean(came[known]),
        correlation=correlation(predicted, shares),
        candidates=len(pairs[0]),
        candidate_correlation=correlation(*pairs),
        mean_pnl=mean(came[~np.isnan(came)]),
        positive=int(positive.sum()),
        missed=int((positive & ~sold).sum()),
    )


def candidate_pairs(
    columns: Columns, values: np.ndarray, config: CoveredCallCandidatesConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and realised net outcomes of all candidates for which it is known, as shares of spot."""
    realised = outcomes(columns, config)
    known = ~np.isnan(realised)
    return values[known], realised[known]


def mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; NaN where one of the two does not vary."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def calibration_bin(probability: np.ndarray) -> np.ndarray:
    """0 to CALIBRATION_BINS - 1: the bins of the expected calibration error (Naeini et al. 2015), of equal width."""
    return np.minimum(np.nan_to_num(probability) * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)


def draw_reliability(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> Plot:
    """Mean realised against mean predicted outcome in tenths of the candidates, by prediction, in % of spot.

    Args:
        pairs: for each exit style the predicted and the realised outcomes, shares of spot.
    """
    figure = Plot(figsize=(8, 6), layout="constrained")
    axis = figure.subplots()
    predictions = []
    for style, (predicted, realised) in pairs.items():
        tenths = np.array_split(np.argsort(predicted, kind="stable"), 10) if len(predicted) >= 10 else []
        means = np.array([(predicted[tenth].mean(), realised[tenth].mean()) for tenth in tenths]) * 100
        if len(means):
            errors = [100 * realised[tenth].std() / math.sqrt(len(tenth)) for tenth in tenths]
            axis.errorbar(*means.T, yerr=errors, fmt="o", capsize=3, label=f"{style}, {len(predicted):,} candidates")
            predictions += means[:, 0].tolist()
    if predictions:
        ends = [min(predictions), max(predictions)]
        axis.plot(ends, ends, color="grey", linestyle=":", label="as predicted")
        axis.legend()
    axis.axhline(0, color="black", linewidth=1)
    axis.set(xlabel="predicted net outcome (% of spot)", ylabel="realised net outcome (% of spot)")
    axis.set_title(
        "Do calls bring more for which the Q-scorer predicts more?\n"
        "(tenths of the candidates by prediction; bars: standard error as if outcomes did not overlap, but they do)",
        fontsize=10,
    )
    axis.grid(alpha=0.3)
    return figure


def png(figure: Plot) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Folds


class Fold(NamedTuple):
    """A scorer, the decisions that it was judged on, its (D,) picks there, and what came of them."""

    fitted: Fitted
    entries: list[LoggedDecision]
    picks: np.ndarray
    compared: Comparison


def ended_before(entries: Sequence[LoggedDecision], time: datetime.datetime) -> list[LoggedDecision]:
    return [entry for entry in entries if entry.label_end < time]


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

    The latest OFFSET_SHARE of each past is kept for the offset, purged as the blocks are. A fold whose past is
    too short to fit on is left out, with a warning.
    """
    found = []
    for past, block in tqdm(list(blocks(entries, folds)), desc="Walking forward", unit=" folds", disable=None):
        train, latest = cut(past, OFFSET_SHARE)
        try:
            fitted = fit(train, latest, config, positive_weight).with_gates(gates)
        except QScorerError as error:
            logger.warning("No fold from %s: %s", block[0].decision.decision_time.date(), error)
            continue
        columns = columns_of(block)
        predicted = fitted.predict(columns)
        picks = picks_of(fitted, columns, predicted)
        found.append(Fold(fitted, block, picks, compare(columns, predicted.values, picks, config)))
    return found


def pooled(folds: Sequence[Fold], config: CoveredCallCandidatesConfig) -> dict:
    """Over all decisions that were judged and of which it is known, the mean of what came, USD; None of none."""
    came = []
    for fold in folds:
        columns = columns_of(fold.entries)
        its = at(fold.picks, net_outcomes(columns, config), columns)
        came.append(its[~np.isnan(its)])
    known = np.concatenate([np.zeros(0), *came])
    above = sum(mean(its) > 0 for its in came)
    return {"mean_pnl": mean(known) if len(known) else None, "decisions": len(known), "above": above, "of": len(folds)}


HEAD = ("fold", "learnt to", "outcomes", "judged from", "to", "decisions", "correlation", "trade rate",
        "predicted", "realised", "P&L a decision")  # fmt: skip


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


def fold_json(fold: Fold) -> dict:
    times = decision_times(fold.entries)
    span = {"from": times[0].isoformat(), "to": times[-1].isoformat()}
    return {"train": fold.fitted.metadata["train"], "judged": span, **comparison_json(fold.compared)}
