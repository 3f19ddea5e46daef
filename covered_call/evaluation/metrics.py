"""What is measured of a policy, in one place: names, directions, formulas, and their intervals.

Every figure is computed from the same arrays (``Played``) for an order of decision times: the order that was, and a
thousand orders that a block bootstrap draws, in one vectorised pass.
"""

import datetime
from typing import NamedTuple

import numpy as np
from arch.bootstrap import MovingBlockBootstrap

VERSION = 2  # raise it when a definition changes: figures of two versions are not compared
REPLICATES = 1000
LEVEL = 0.95
MIN_BLOCKS = 5  # with fewer blocks the resamples are too much alike, and the interval would be too narrow
CALIBRATION_BINS = 10


class Metric(NamedTuple):
    """``better`` is "higher", "lower" or "" where neither is; ``format`` prints the figure."""

    better: str
    format: str
    meaning: str


METRICS = {
    "accuracy": Metric("higher", ".3f", "share of decisions answered as the teacher did, NO_TRADE included"),
    "balanced_accuracy": Metric("higher", ".3f", "recall of each answer that the teacher gave, averaged"),
    "macro_f1": Metric("higher", ".3f", "F1 of each answer that the teacher or the policy gave, averaged"),
    "mcc": Metric("higher", ".3f", "Matthews correlation of the answers (Gorodkin's, for several classes)"),
    "sell_precision": Metric("higher", ".3f", "of the calls that the policy sold, the share that the teacher sold"),
    "sell_recall": Metric("higher", ".3f", "of the calls that the teacher sold, the share that the policy sold"),
    "top_1": Metric("higher", ".3f", "where both sold a call, the share in which it was the same"),
    "trade_rate": Metric("", ".3f", "share of decisions at which the policy sold a call"),
    "permutation_consistency": Metric("higher", ".3f", "share of decisions with the same pick in 4 shuffled orders"),
    "calibration_error": Metric("lower", ".3f", "gap between probability and accuracy in 10 bins, by their weight"),
    "coverage": Metric("higher", ".3f", "share of decisions with a known outcome; a call not sold has outcome 0"),
    "total_pnl": Metric("higher", ",.0f", "P&L vs HODL, summed over all decisions"),
    "mean_pnl": Metric("higher", ",.1f", "P&L vs HODL a decision, over all decisions"),
    "mean_pnl_known": Metric("higher", ",.1f", "P&L vs HODL a decision, over those with a known outcome alone"),
    "hit_rate": Metric("higher", ".3f", "of the calls sold with a known outcome, the share with a P&L above 0"),
    "worst_month": Metric("higher", ",.0f", "least P&L vs HODL of a calendar month, by decision time"),
    "max_drawdown": Metric("lower", ",.0f", "largest fall of the cumulative P&L vs HODL from its peak, or from 0"),
    "mean_regret": Metric("lower", ",.1f", "what the best answer in hindsight, NO_TRADE included, would have added"),
    "minus_teacher": Metric("higher", ",.1f", "mean P&L a decision, minus the teacher's at the same decisions"),
    "minus_best_rule": Metric("higher", ",.1f", "mean P&L a decision, minus the best rule's at the same decisions"),
}


class Played(NamedTuple):
    """What a policy did: one entry a decision, or, for a policy that draws, one for each answer it may give.

    All are arrays of shape (entries,). Money is in USD per unit of underlying; ``pnl``, ``minus_teacher`` and
    ``minus_best_rule`` have shape (entries, 2): the least and the most it can be, equal where it is known.
    """

    time: np.ndarray  # which of the decision times, 0 .. T - 1
    teacher: np.ndarray  # answers: 0 is NO_TRADE, from 1 the candidates
    pick: np.ndarray
    weight: np.ndarray  # the probability of this answer; adds up to 1 over the entries of a decision
    consistent: np.ndarray  # 1.0 or 0.0, NaN where it was not tried
    probability: np.ndarray  # that the policy gave its answer, NaN where it gives none
    known: np.ndarray  # whether the outcome is
    pnl: np.ndarray
    regret: np.ndarray  # NaN where unknown
    minus_teacher: np.ndarray
    minus_best_rule: np.ndarray


class Figure(NamedTuple):
    """Least and most that a figure can be (equal where all is known) and its 95 % interval, None where it has none."""

    low: float
    high: float
    interval: tuple[float, float] | None


def figures(played: Played, times: list[datetime.datetime], block: int) -> dict[str, Figure]:
    """All metrics of one policy with their intervals; NaN where a metric is not defined.

    Args:
        times: the decision times, ascending and distinct, shape (T,).
        block: decision times in a block; see block_length.
    """
    months = month_starts(times)
    as_it_was = measure(played, np.arange(len(times))[None], months)
    resampled = resample(len(times), block)
    drawn = {} if resampled is None else measure(played, resampled, months)
    return {
        name: Figure(float(low[0]), float(high[0]), interval(*drawn[name]) if drawn else None)
        for name, (low, high) in as_it_was.items()
    }


def interval(low: np.ndarray, high: np.ndarray) -> tuple[float, float] | None:
    """Percentiles of the resampled figures; a figure with bounds gets its lower bound's lower one and so on."""
    if np.isnan(low).all() or np.isnan(high).all():
        return None
    tail = (1 - LEVEL) / 2
    return float(np.nanquantile(low, tail)), float(np.nanquantile(high, 1 - tail))


def block_length(times: list[datetime.datetime], longest: datetime.timedelta) -> int:
    """The most decision times within the life of the longest option, both ends counted: outcomes overlap so far."""
    stamps = np.array([time.timestamp() for time in times])
    ends = np.searchsorted(stamps, stamps + longest.total_seconds(), side="right")
    return int((ends - np.arange(len(stamps))).max())


def resample(times: int, block: int, replicates: int = REPLICATES) -> np.ndarray | None:
    """Orders of decision times, shape (replicates, times), by the moving-block bootstrap (Kuensch 1989).

    None where there are fewer than MIN_BLOCKS blocks in the data.
    """
    if times < MIN_BLOCKS * block:
        return None
    bootstrap = MovingBlockBootstrap(block, np.arange(times), seed=0)
    return np.stack([drawn for (drawn,), _ in bootstrap.bootstrap(replicates)])


def month_starts(times: list[datetime.datetime]) -> np.ndarray:
    """The places at which a calendar month begins."""
    months = np.array([time.year * 12 + time.month for time in times])
    return np.flatnonzero(np.diff(months, prepend=-1))


def measure(played: Played, order: np.ndarray, months: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics for each order of decision times: name to [least, most], shape (2, orders)."""
    size = order.shape[1]
    counts = np.stack([np.bincount(row, minlength=size) for row in order])

    def total(values: np.ndarray | float) -> np.ndarray:
        return counts @ np.bincount(played.time, played.weight * values, size)

    def mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
        return share(total(np.where(where, values, 0.0)), total(where))

    sold = played.pick > 0
    both = {
        **imitation(np.tensordot(counts, confusion(played, size), 1)),
        "permutation_consistency": mean(played.consistent, ~np.isnan(played.consistent)),
        "calibration_error": calibration_error(played, total),
        "coverage": share(total(played.known), total(1.0)),
        "mean_pnl_known": mean(played.pnl[:, 0], played.known),
        "hit_rate": mean(played.pnl[:, 0] > 0, played.known & sold),
        "mean_regret": mean(played.regret, ~np.isnan(played.regret)),
    }
    money = [money_of(np.bincount(played.time, played.weight * side, size)[order], months) for side in played.pnl.T]
    bounds = {name: np.sort([part[name] for part in money], axis=0) for name in money[0]}
    for name in ("pnl", "minus_teacher", "minus_best_rule"):
        sides = [share(total(side), total(1.0)) for side in getattr(played, name).T]
        bounds["mean_pnl" if name == "pnl" else name] = np.stack(sides)
    found = {name: np.stack([values, values]) for name, values in both.items()} | bounds
    return {name: found[name] for name in METRICS}


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def confusion(played: Played, size: int) -> np.ndarray:
    """Weight of each (teacher's answer, policy's answer) by decision time, shape (T, answers, answers)."""
    answers = 1 + int(max(played.teacher.max(), played.pick.max()))
    by_time = np.zeros((size, answers, answers))
    np.add.at(by_time, (played.time, played.teacher, played.pick), played.weight)
    return by_time


def imitation(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Agreement with the teacher from confusion matrices of shape (..., answers, answers), as scikit-learn counts it.

    A policy that draws its answers gets ratios of expected counts.
    """
    right, teacher, policy = np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(-1), matrix.sum(-2)
    all_right, everything, same = right.sum(-1), matrix.sum((-2, -1)), right[..., 1:].sum(-1)
    spread = (everything**2 - (policy**2).sum(-1)) * (everything**2 - (teacher**2).sum(-1))
    covariance = all_right * everything - (teacher * policy).sum(-1)
    return {
        "accuracy": share(all_right, everything),
        "balanced_accuracy": np.nanmean(share(right, teacher), axis=-1),
        "macro_f1": np.nanmean(share(2 * right, teacher + policy), axis=-1),
        "mcc": np.nan_to_num(share(covariance, np.sqrt(np.maximum(spread, 0.0)))),
        "sell_precision": share(same, policy[..., 1:].sum(-1)),
        "sell_recall": share(same, teacher[..., 1:].sum(-1)),
        "top_1": share(same, matrix[..., 1:, 1:].sum((-2, -1))),
        "trade_rate": share(policy[..., 1:].sum(-1), everything),
    }


def calibration_error(played: Played, total) -> np.ndarray:
    """Expected calibration error (Naeini et al. 2015) of the probability of the answer given; bins of equal width."""
    given = ~np.isnan(played.probability)
    gap = np.where(given, played.probability - (played.pick == played.teacher), 0.0)
    gaps = [abs(total(gap * (calibration_bin(played.probability) == place))) for place in range(CALIBRATION_BINS)]
    return share(np.sum(gaps, axis=0), total(given))


def calibration_bin(probability: np.ndarray) -> np.ndarray:
    """0 to CALIBRATION_BINS - 1."""
    return np.minimum(np.nan_to_num(probability) * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)


def money_of(path: np.ndarray, months: np.ndarray) -> dict[str, np.ndarray]:
    """Money metrics of paths of P&L by decision time, shape (orders, T).

    A resampled path keeps the calendar: its i-th time lies in the month of the i-th.
    """
    curve = np.pad(path.cumsum(1), ((0, 0), (1, 0)))
    return {
        "total_pnl": path.sum(1),
        "worst_month": np.add.reduceat(path, months, axis=1).min(1),
        "max_drawdown": (np.maximum.accumulate(curve, axis=1) - curve).max(1),
    }
