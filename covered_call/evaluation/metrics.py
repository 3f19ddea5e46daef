"""What is measured of a policy, in one place: names, directions, formulas, and their intervals.

Every figure is computed from the same arrays (``Played``) for an order of decision times: the order that was, and a
thousand orders that a block bootstrap draws. What is a ratio of sums takes one matrix product for all policies.
"""

from typing import NamedTuple

import numpy as np

from covered_call.resampling import (
    Draws,
    as_it_was,
    draw,
    drawdowns,
    interval,
    month_starts,
    share,
    worst_months,
)
from covered_call.value_model.walk_forward import CALIBRATION_BINS, calibration_bin

VERSION = 3  # raise it when a definition changes: figures of two versions are not compared


class Metric(NamedTuple):
    """``better`` is "higher", "lower" or "" where neither is; ``format`` prints the figure."""

    better: str
    format: str
    meaning: str


IMITATION = {
    "accuracy": Metric("higher", ".3f", "share of decisions answered as the teacher did, NO_TRADE included"),
    "balanced_accuracy": Metric("higher", ".3f", "recall of each answer that the teacher gave, averaged"),
    "macro_f1": Metric("higher", ".3f", "F1 of each answer that the teacher or the policy gave, averaged"),
    "mcc": Metric("higher", ".3f", "Matthews correlation of the answers (Gorodkin's, for several classes)"),
    "sell_precision": Metric("higher", ".3f", "of the calls that the policy sold, the share that the teacher sold"),
    "sell_recall": Metric("higher", ".3f", "of the calls that the teacher sold, the share that the policy sold"),
    "top_1": Metric("higher", ".3f", "where both sold a call, the share in which it was the same"),
    "trade_rate": Metric("", ".3f", "share of decisions at which the policy sold a call"),
    "permutation_consistency": Metric("higher", ".3f", "share of decisions with the same pick in 4 shuffled orders"),
    "calibration_error": Metric(
        "lower", ".3f", "gap between probability and how often it is right, in 10 bins, by their weight; of what the "
        "probability is of: an answer to a decision, or to one candidate"
    ),
}  # fmt: skip
IN_PERCENT = {  # of spot at the decision
    "mean_percent": Metric("higher", "+.3f", "P&L vs HODL a decision, in % of spot, over all decisions"),
    "annual_percent": Metric(
        "higher", "+.2f", "the same a year, in % of the coin held: the sum of P&L in % of spot / the coin-years that "
        "all decisions tie up, one coin each until its label end"
    ),
    "worst_5_percent": Metric("higher", "+.2f", "expected shortfall: mean P&L of the worst 5 % of decisions, in %"),
    "premium_captured": Metric("higher", ".3f", "P&L of the calls sold / their premiums, over known outcomes"),
    "turnover": Metric("", ".1f", "calls sold a year for each coin tied up"),
    "hit_rate": Metric("higher", ".3f", "of the calls sold with a known outcome, the share with a P&L above 0"),
    "coverage": Metric("higher", ".3f", "share of decisions with a known outcome; a call not sold has outcome 0"),
}  # fmt: skip
IN_USD = {  # a unit of underlying
    "total_pnl": Metric("higher", ",.0f", "P&L vs HODL, summed over all decisions"),
    "mean_pnl": Metric("higher", ",.1f", "P&L vs HODL a decision, over all decisions"),
    "mean_pnl_known": Metric("higher", ",.1f", "P&L vs HODL a decision, over those with a known outcome alone"),
    "worst_month": Metric("higher", ",.0f", "least P&L vs HODL of a calendar month, by decision time"),
    "max_drawdown": Metric("lower", ",.0f", "largest fall of the cumulative P&L vs HODL from its peak, or from 0"),
    "mean_regret": Metric("lower", ",.1f", "what the best answer in hindsight, NO_TRADE included, would have added"),
}
DIFFERENCES = {
    "percent_minus_teacher": Metric("higher", "+.3f", "mean_percent minus the teacher's at the same decisions"),
    "percent_minus_best_rule": Metric("higher", "+.3f", "mean_percent minus the best rule's at the same decisions"),
    "minus_teacher": Metric("higher", ",.1f", "mean_pnl minus the teacher's at the same decisions, USD"),
    "minus_best_rule": Metric("higher", ",.1f", "mean_pnl minus the best rule's at the same decisions, USD"),
}
METRICS = IMITATION | IN_PERCENT | IN_USD | DIFFERENCES


class Beliefs(NamedTuple):
    """B probabilities that a policy gave, and what came; what they are of is what it was calibrated on."""

    time: np.ndarray  # (B,) which of the decision times
    probability: np.ndarray  # (B,)
    right: np.ndarray  # (B,) bool


NO_BELIEFS = Beliefs(np.zeros(0, int), np.zeros(0), np.zeros(0, bool))


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
    known: np.ndarray  # whether the outcome is
    pnl: np.ndarray
    regret: np.ndarray  # NaN where an outcome is unknown
    minus_teacher: np.ndarray
    minus_best_rule: np.ndarray
    spot: np.ndarray  # USD
    premium: np.ndarray  # USD that selling the call brings before costs; 0 for no trade, NaN where iv is unknown
    years: np.ndarray  # that the decision ties up a coin
    beliefs: Beliefs


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
        found[policy] = metrics_of(its) | of_paths | {"worst_5_percent": shortfalls(played[policy], its)}
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
    tried, compared = ~np.isnan(played.consistent), ~np.isnan(played.regret)
    priced = played.known & sold & ~np.isnan(played.premium)
    to_percent = 100 / played.spot[:, None]
    return {
        "decisions": total(one),
        "right": total(right, played.pick, answers),
        "teacher": total(one, played.teacher, answers),
        "policy": total(one, played.pick, answers),
        "both_sold": total(sold & (played.teacher > 0)),
        "tried": total(tried),
        "consistent": total(np.where(tried, played.consistent, 0.0)),
        **belief_sums(played.beliefs, size),
        "known": total(played.known),
        "known_pnl": total(np.where(played.known, played.pnl[:, 0], 0.0)),
        "known_sold": total(played.known & sold),
        "hits": total(played.known & sold & (played.pnl[:, 0] > 0)),
        "captured": total(np.where(priced, played.pnl[:, 0], 0.0)),
        "premium": total(np.where(priced, played.premium, 0.0)),
        "years": total(played.years),
        "compared": total(compared),
        "regret": total(np.where(compared, played.regret, 0.0)),
        **{name: both(sides) for name, sides in below(played).items()},
        "pnl": both(played.pnl),
        "percent": both(played.pnl * to_percent),
        **{name: both(getattr(played, name)) for name in MINUS},
        **{f"percent_{name}": both(getattr(played, name) * to_percent) for name in MINUS},
    }


MINUS = ("minus_teacher", "minus_best_rule")


def belief_sums(beliefs: Beliefs, size: int) -> dict[str, np.ndarray]:
    """How many there are, and the gap of each bin, by time; nothing where a policy has none."""
    place = beliefs.time * CALIBRATION_BINS + calibration_bin(beliefs.probability)
    gap = np.bincount(place, beliefs.probability - beliefs.right, size * CALIBRATION_BINS)
    given = np.bincount(beliefs.time, minlength=size).astype(float)
    bins = CALIBRATION_BINS if len(place) else 1
    return {"given": given[:, None], "gap": gap.reshape(size, -1)[:, :bins]}


WORST = 0.05  # of the decisions: those that the expected shortfall is the mean of
QUANTILES = (0.01, 0.02, 0.03, 0.04, WORST, 0.06, 0.08, 0.1, 0.15)


def quantiles(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of (E,) values by their weight, one for each of QUANTILES; NaN where a value is."""
    if np.isnan(values).any():
        return np.full(len(QUANTILES), np.nan)
    order = np.argsort(values)
    below = weight[order].cumsum()
    places = np.searchsorted(below, np.array(QUANTILES) * below[-1] * (1 - 1e-12))
    return values[order][places]


def below(played: Played) -> dict[str, np.ndarray]:
    """(E, quantiles) by how much each P&L in % of spot, at the least and at the most, lies below each quantile."""
    sides = {name: 100 * side / played.spot for name, side in zip(("low", "high"), played.pnl.T, strict=True)}
    return {name: np.maximum(quantiles(side, played.weight) - side[:, None], 0) for name, side in sides.items()}


def shortfalls(played: Played, sums: dict[str, np.ndarray]) -> np.ndarray:
    """(2, orders): the expected shortfall, the most that q less the mean below q / WORST is at any q (Rockafellar and
    Uryasev 2000).

    Of the decisions as they were that is exact, for their own quantile is among the q; of a resample it is nearly so.
    """
    found = []
    for name, side in zip(("low", "high"), played.pnl.T, strict=True):
        levels = quantiles(100 * side / played.spot, played.weight)
        found.append((levels - sums[name] / sums["decisions"] / WORST).max(1))
    return np.stack(found)


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
        "premium_captured": share(one["captured"], one["premium"]),
        "turnover": share(sums["policy"][:, 1:].sum(1), one["years"]),
        "mean_regret": share(one["regret"], one["compared"]),
    }
    means = {name: share(sums[of].T, decisions) for name, of in MEANS.items()}
    means["annual_percent"] = share(sums["percent"].T, one["years"])
    return (
        {name: np.stack([values, values]) for name, values in certain.items()} | means | {"total_pnl": sums["pnl"].T}
    )


MEANS = {"mean_pnl": "pnl", "mean_percent": "percent"} | {name: name for name in DIFFERENCES}


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
