"""What might have come instead: decision times drawn anew in blocks, and what sums and paths come to in each draw."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from arch.bootstrap import MovingBlockBootstrap

REPLICATES = 1000
LEVEL = 0.95
MIN_BLOCKS = 5  # with fewer blocks the resamples are too much alike, and the interval would be too narrow
CELLS = 1 << 20  # of counts in memory at a time


class Draws(NamedTuple):
    """Orders of T decision times, each a run of blocks of times that follow one another; the last block is cut off."""

    starts: np.ndarray  # (orders, blocks) int64: the time that each block begins with
    block: int  # times in a block
    size: int  # T

    @property
    def blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        """Of each block where it starts in each order, (orders,), and its length."""
        for place, begin in enumerate(range(0, self.size, self.block)):
            yield self.starts[:, place], min(self.block, self.size - begin)

    def counts(self, rows: slice) -> np.ndarray:
        """(orders, T) float64: how often each time was drawn in these orders."""
        starts = self.starts[rows]
        ends = starts + np.array([length for _, length in self.blocks])
        base = np.arange(len(starts))[:, None] * (self.size + 1)
        cells = len(starts) * (self.size + 1)
        steps = np.bincount((base + starts).ravel(), minlength=cells)
        steps -= np.bincount((base + ends).ravel(), minlength=cells)
        return steps.reshape(len(starts), -1)[:, :-1].cumsum(1).astype(float)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(orders, K): what (T, K) values sum up to in each order."""
        return np.concatenate([self.counts(rows) @ values for rows in self.parts()])

    def parts(self) -> list[slice]:
        """The orders, few enough at a time for memory."""
        step = max(1, CELLS // self.size)
        return [slice(begin, begin + step) for begin in range(0, len(self.starts), step)]


def as_it_was(times: int) -> Draws:
    """The one order that was."""
    return Draws(np.zeros((1, 1), np.int64), times, times)


def draw(times: int, block: int, replicates: int = REPLICATES) -> Draws | None:
    """Orders by the moving-block bootstrap (Kuensch 1989).

    None where there are fewer than MIN_BLOCKS blocks in the data.
    """
    if times < MIN_BLOCKS * max(block, 1):
        return None
    bootstrap = MovingBlockBootstrap(block, np.arange(times), seed=0)
    return Draws(np.stack([drawn[::block] for (drawn,), _ in bootstrap.bootstrap(replicates)]), block, times)


def block_length(times: np.ndarray, ends: np.ndarray) -> int:
    """The most decision times from one to the last label end of its decisions, both counted: outcomes overlap so far.

    Args:
        times: (T,) the decision times, ascending and distinct.
        ends: (T,) the label ends, in the same unit.
    """
    return int((np.searchsorted(times, ends, side="right") - np.arange(len(times))).max())


def overlaps(time: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The distinct times (T,) of decisions, ascending, the place (N,) of each one among them, and how many of them
    overlap (see block_length); of no decisions 0.

    Args:
        time: (N,) of each decision.
        end: (N,) its label end, in the same unit.
    """
    times, place = np.unique(time, return_inverse=True)
    ends = times.copy()
    np.maximum.at(ends, place, end)
    return times, place, block_length(times, ends) if len(times) else 0


def means(values: np.ndarray, place: np.ndarray, draws: Draws) -> np.ndarray:
    """(orders,) the mean of (N,) values in each, by the place (N,) of each one's time; NaN where none was drawn."""
    sums = [np.bincount(place, weights, draws.size) for weights in (values, np.ones(len(values)))]
    total, count = draws.sums(np.stack(sums, 1)).T
    return share(total, count)


def interval(low: np.ndarray, high: np.ndarray) -> tuple[float, float] | None:
    """Percentiles of the resampled figures; a figure with bounds gets its lower bound's lower one and so on."""
    if np.isnan(low).all() or np.isnan(high).all():
        return None
    tail = (1 - LEVEL) / 2
    return float(np.nanquantile(low, tail)), float(np.nanquantile(high, 1 - tail))


# ---------------------------------------------------------------------------------------------------------------------
# Paths: what depends on the order of the times


class Stretches(NamedTuple):
    """Of a cumulative path the stretches of one length, from each start, (starts, K): all but ``total`` are 0 or
    beyond, as where the stretch begins counts too."""

    total: np.ndarray
    peak: np.ndarray  # the highest above the begin
    trough: np.ndarray  # the lowest, as a number below 0
    fall: np.ndarray  # the largest from a peak

    def then(self, other: "Stretches") -> "Stretches":
        """Each followed by another that begins where it ends."""
        return Stretches(
            self.total + other.total,
            np.maximum(self.peak, self.total + other.peak),
            np.minimum(self.trough, self.total + other.trough),
            np.maximum(np.maximum(self.fall, other.fall), self.peak - self.total - other.trough),
        )

    def rows(self, rows) -> "Stretches":
        return Stretches(*(values[rows] for values in self))


def stretches(steps: np.ndarray, length: int) -> Stretches:
    """Those of (T, K) steps, made of ever longer ones: the powers of two in ``length``."""
    power = Stretches(steps, np.maximum(steps, 0), np.minimum(steps, 0), np.maximum(-steps, 0))
    starts, size, done = len(steps) - length + 1, 1, 0
    found = nothing((starts, steps.shape[1]))
    while True:
        if length & size:
            found, done = found.then(power.rows(slice(done, done + starts))), done + size
        if done == length:
            return found
        power, size = power.rows(slice(None, -size)).then(power.rows(slice(size, None))), 2 * size


def nothing(shape: tuple[int, int]) -> Stretches:
    """No step at all, which any stretch may follow."""
    return Stretches(*np.zeros((4, *shape)))


def drawdowns(steps: np.ndarray, draws: Draws) -> np.ndarray:
    """(orders, K): the largest fall of the cumulative path of (T, K) steps from its peak, or from 0."""
    path, made = nothing((len(draws.starts), steps.shape[1])), {}
    for starts, length in draws.blocks:
        if length not in made:
            made[length] = stretches(steps, length)
        path = path.then(made[length].rows(starts))
    return path.fall


def worst_months(steps: np.ndarray, months: np.ndarray, draws: Draws) -> np.ndarray:
    """(orders, K): the least sum of (T, K) steps in a calendar month.

    A resampled path keeps the calendar: its i-th time lies in the month of the i-th.

    Args:
        months: the places at which a month begins, of which 0 is the first.
    """
    curve = np.concatenate([np.zeros((1, steps.shape[1])), steps.cumsum(0)])
    edges = np.unique([*months, *range(0, draws.size, draws.block), draws.size]).tolist()
    sums = {int(begin): np.zeros((len(draws.starts), steps.shape[1])) for begin in months}
    for begin, end in itertools.pairwise(edges):
        starts = draws.starts[:, begin // draws.block] + begin % draws.block
        month = months[np.searchsorted(months, begin, side="right") - 1]
        sums[int(month)] += curve[starts + end - begin] - curve[starts]
    return np.minimum.reduce(list(sums.values()))


def month_starts(times: np.ndarray) -> np.ndarray:
    """The places at which a calendar month begins; ``times`` (T,) in microseconds since 1970."""
    months = times.astype("datetime64[us]").astype("datetime64[M]").astype(int)
    return np.flatnonzero(np.diff(months, prepend=months[0] - 1))


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
