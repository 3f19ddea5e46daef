"""What is measured of a policy, in one place: names, directions, formulas, and their intervals.

Every figure is computed from the same arrays (``Played``) for an order of decision times: the order that was, and a
thousand orders that a block bootstrap draws. What is a ratio of sums takes one matrix product for all policies.
"""

from typing import NamedTuple

import numpy as np

from covered_call.evaluation.resampling import (
    Draws,
    as_it_was,
    draw,
    drawdowns,
    interval,
    month_starts,
    share,
    worst_months,
)

VERSION = 2  # raise it when a definition changes: figures of two versions are not compared
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
    probability: np.ndarray  # of the answer, NaN where the policy gives none
    known: np.ndarray  # whether the outcome is
    pnl: np.ndarray
    regret: np.ndarray  # NaN where an outcome is unknown
    minus_teacher: np.ndarray
    minus_best_rule: np.ndarray


class Figure(NamedTuple):
    """A metric: least and most it can be (equal where all is known), and a 95 % interval, None for too few blocks."""

    low: float
    high: float
    interval: tuple[float, float] | None


def figures(played: dict[str, Played], times: np.ndarray, block: int) -> dict[str, dict[str, Figure]]:
    """All metrics of each policy with their intervals; NaN where a metric is not defined.

    Args:
        times: the decision times, ascending and distinct, shape (T,), in microseconds since 1970.
        block: decision times in a block; see block_length.
    """
    months, draws = month_starts(times), draw(len(times), block)
    observed = measure(played, as_it_was(len(times)), months)
    drawn = measure(played, draws, months) if draws else {}
    return {
        policy: {
            name: Figure(float(low[0]), float(high[0]), interval(*drawn[policy][name]) if drawn else None)
            for name, (low, high) in found.items()
        }
        for policy, found in observed.items()
    }


def measure(played: dict[str, Played], draws: Draws, months: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """The metrics of each policy for each order of decision times: name to [least, most], shape (2, orders)."""
    answers = 1 + max(int(max(one.teacher.max(), one.pick.max())) for one in played.values())
    by_time = [sums_by_time(one, draws.size, answers) for one in played.values()]
    totals = draws.sums(np.concatenate([values for sums in by_time for values in sums.values()], axis=1))
    steps = np.concatenate([sums["pnl"] for sums in by_time], axis=1)
    paths = {"worst_month": worst_months(steps, months, draws), "max_drawdown": drawdowns(steps, draws)}
    found, begin = {}, 0
    for place, (policy, sums) in enumerate(zip(played, by_time, strict=True)):
        ends = begin + np.cumsum([0, *(values.shape[1] for values in sums.values())])
        its = {name: totals[:, ends[i] : ends[i + 1]] for i, name in enumerate(sums)}
        of_paths = {name: np.sort(values[:, 2 * place : 2 * place + 2].T, axis=0) for name, values in paths.items()}
        found[policy] = metrics_of(its) | of_paths
        begin = ends[-1]
    return {policy: {name: its[name] for name in METRICS} for policy, its in found.items()}


def sums_by_time(played: Played, size: int, answers: int) -> dict[str, np.ndarray]:
    """What the metrics are ratios of, each of shape (T, columns)."""

    def total(values: np.ndarray, kind: np.ndarray | None = None, kinds: int = 1) -> np.ndarray:
        place = played.time if kind is None else played.time * kinds + kind
        return np.bincount(place, played.weight * values, size * kinds).reshape(size, kinds)

    def both(sides: np.ndarray) -> np.ndarray:
        return np.concatenate([total(side) for side in sides.T], axis=1)

    sold, right, one = played.pick > 0, played.pick == played.teacher, np.ones(len(played.time))
    tried, compared, given = (~np.isnan(values) for values in (played.consistent, played.regret, played.probability))
    gap = np.where(given, played.probability - right, 0.0)
    return {
        "decisions": total(one),
        "right": total(right, played.pick, answers),
        "teacher": total(one, played.teacher, answers),
        "policy": total(one, played.pick, answers),
        "both_sold": total(sold & (played.teacher > 0)),
        "tried": total(tried),
        "consistent": total(np.where(tried, played.consistent, 0.0)),
        "given": total(given),
        "gap": total(gap, calibration_bin(played.probability), CALIBRATION_BINS),
        "known": total(played.known),
        "known_pnl": total(np.where(played.known, played.pnl[:, 0], 0.0)),
        "known_sold": total(played.known & sold),
        "hits": total(played.known & sold & (played.pnl[:, 0] > 0)),
        "compared": total(compared),
        "regret": total(np.where(compared, played.regret, 0.0)),
        "pnl": both(played.pnl),
        "minus_teacher": both(played.minus_teacher),
        "minus_best_rule": both(played.minus_best_rule),
    }


def metrics_of(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The metrics that are ratios of sums, (2, orders) each, from sums of shape (orders, columns)."""
    one = {name: values[:, 0] for name, values in sums.items()}
    decisions = one["decisions"]
    certain = {
        **imitation(sums["right"], sums["teacher"], sums["policy"], one["both_sold"]),
        "permutation_consistency": share(one["consistent"], one["tried"]),
        "calibration_error": share(abs(sums["gap"]).sum(1), one["given"]),
        "coverage": share(one["known"], decisions),
        "mean_pnl_known": share(one["known_pnl"], one["known"]),
        "hit_rate": share(one["hits"], one["known_sold"]),
        "mean_regret": share(one["regret"], one["compared"]),
    }
    means = {
        name: share(sums[of].T, decisions)
        for name, of in (("mean_pnl", "pnl"), ("minus_teacher",) * 2, ("minus_best_rule",) * 2)
    }
    return (
        {name: np.stack([values, values]) for name, values in certain.items()} | means | {"total_pnl": sums["pnl"].T}
    )


def imitation(right: np.ndarray, teacher: np.ndarray, policy: np.ndarray, both_sold: np.ndarray) -> dict:
    """Agreement with the teacher, (orders,) each, as scikit-learn counts it.

    A policy that draws its answers gets ratios of expected counts.

    Args:
        right, teacher, policy: (orders, answers) how often both gave that answer, and how often each of them did.
        both_sold: (orders,) how often both sold a call, the same or not.
    """
    all_right, everything, same = right.sum(-1), policy.sum(-1), right[:, 1:].sum(-1)
    spread = (everything**2 - (policy**2).sum(-1)) * (everything**2 - (teacher**2).sum(-1))
    covariance = all_right * everything - (teacher * policy).sum(-1)
    return {
        "accuracy": share(all_right, everything),
        "balanced_accuracy": np.nanmean(share(right, teacher), axis=-1),
        "macro_f1": np.nanmean(share(2 * right, teacher + policy), axis=-1),
        "mcc": np.nan_to_num(share(covariance, np.sqrt(np.maximum(spread, 0.0)))),
        "sell_precision": share(same, policy[:, 1:].sum(-1)),
        "sell_recall": share(same, teacher[:, 1:].sum(-1)),
        "top_1": share(same, both_sold),
        "trade_rate": share(policy[:, 1:].sum(-1), everything),
    }


def calibration_bin(probability: np.ndarray) -> np.ndarray:
    """0 to CALIBRATION_BINS - 1: the bins of the expected calibration error (Naeini et al. 2015), of equal width."""
    return np.minimum(np.nan_to_num(probability) * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
