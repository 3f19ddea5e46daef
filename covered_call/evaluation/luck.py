"""Against luck: of so many policies and thresholds that were tried, one looks good by chance.

The p-values are those of a studentised reality check over all that were tried (White 2000, Hansen 2005): how often the
best of as many policies that are worth nothing does as well, in the same resamples as the intervals.
"""

import math
from typing import NamedTuple

import numpy as np

from covered_call.evaluation.cases import Cases, difference
from covered_call.evaluation.rows import HODL, TEACHER, Row, Trial
from covered_call.resampling import Draws, share

LEVEL = 0.05  # of p below which a result is called shown


class Luck(NamedTuple):
    """How many policies and thresholds were compared, and the p-value of each policy against each benchmark."""

    tried: int
    p: dict[str, dict[str, float]]  # by benchmark and by policy; nothing where the data are too short for resamples

    def of(self, policy: str, benchmark: str) -> float:
        return self.p.get(benchmark, {}).get(policy, math.nan)


def against_luck(
    rows: list[Row],
    trials: list[Trial],
    rule: Row,
    cases: Cases,
    places: np.ndarray,
    times: np.ndarray,
    draws: Draws | None,
) -> Luck:
    """Against never selling, the teacher and the best rule. An outcome that is not known counts as the least that it
    can be; ``draws`` are resamples of the times, or None."""
    policies = {row.name: row.picks for row in rows if not row.at_random}
    tried = policies | {trial.name: trial.picks for trial in trials}
    count = len(tried) - len({HODL, TEACHER})
    if draws is None:
        return Luck(count, {})
    found = {}
    for benchmark in (HODL, TEACHER, rule.name):
        others = {name: picks for name, picks in tried.items() if name not in (benchmark, HODL)}
        gains = [gains_of(picks, policies[benchmark], cases, places, times) for picks in others.values()]
        p = reality_check(np.stack(gains, axis=1), draws)
        found[benchmark] = {name: float(one) for name, one in zip(others, p, strict=True) if name in policies}
    return Luck(count, found)


def gains_of(picks: np.ndarray, others: np.ndarray, cases: Cases, places: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(T,) by how much picks did better than others, at the least, in % of spot."""
    gain = difference(cases, places, picks[places], others[places])[:, 0]
    percent = np.nan_to_num(100 * gain / cases.columns.spot[places], nan=-100.0)  # of what nothing is known
    return np.bincount(np.searchsorted(times, cases.columns.time[places]), percent, len(times))


def reality_check(gains: np.ndarray, draws: Draws) -> np.ndarray:
    """(K,) p-values, from (T, K) gains over a benchmark, that no policy is better than it, each for its own policy.

    The least of them is that of Hansen's test for superior predictive ability: policies that are surely worse are not
    recentred. A policy that never differs from the benchmark gets 1.
    """
    size = len(gains)
    means, drawn = gains.mean(0), draws.sums(gains) / size
    scale = np.sqrt(size) * drawn.std(0)
    differs = scale > 1e-12 * np.maximum(1, abs(means))
    scale = np.where(differs, scale, 1.0)
    t = np.where(differs, math.sqrt(size) * means / scale, -math.inf)
    worse = t < -math.sqrt(2 * math.log(max(math.log(size), 1)))
    noise = math.sqrt(size) * (drawn - np.where(worse, 0.0, means)) / scale
    best = np.maximum(0, np.where(differs, noise, -math.inf).max(1))
    return np.where(t > 0, (best[:, None] >= t).mean(0), 1.0)


def placebo(cases: Cases, block: int, seed: int) -> Cases:
    """The cases with outcomes of other times: what a policy earns on them, it earns by luck.

    Outcomes, as shares of spot less the mean of their place, are dealt out anew in blocks of ``block`` decisions; a
    candidate gets that of the candidate at its place. What selling earns on average, without any choice, is taken out.
    """
    columns, rng = cases.columns, np.random.default_rng(seed)
    starts = rng.permutation(np.arange(0, len(columns), block))
    order = np.concatenate([np.arange(start, min(start + block, len(columns))) for start in starts])
    sizes = np.diff(columns.offsets)
    its = order[columns.decision_of]
    rows = columns.offsets[its] + np.minimum(columns.place, np.maximum(sizes[its], 1) - 1)
    shares = cases.computed / columns.spot[columns.decision_of]
    known, places = ~np.isnan(shares), columns.place
    sums, counts = (np.bincount(places[known], weights, 1 + places.max()) for weights in (shares[known], None))
    shares = (shares - share(sums, counts)[places])[np.minimum(rows, len(shares) - 1)]
    shares[sizes[its] == 0] = math.nan
    computed = shares * columns.spot[columns.decision_of]
    return cases._replace(computed=computed, recorded=np.full(len(columns), math.nan))
