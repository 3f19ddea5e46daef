"""Spots by underlying and time, from the decisions of the files themselves."""

import functools

import numpy as np

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.series import HOUR

WIDEST = 7  # a search looks at 2 ** 7 times at once at most; each power takes 16 bytes a time


class Spots:
    """A place is an index into N spots, which are in the order of underlying and time: ``time`` (N,) in microseconds
    since 1970, ``spot`` (N,) in USD. The places of underlying u are those from bounds[u] to bounds[u + 1].
    """

    def __init__(
        self,
        underlyings: int,
        underlying: np.ndarray,
        time: np.ndarray,
        spot: np.ndarray,
        options: CoveredCallCandidatesConfig,
    ):
        """From the D decisions of all files, by time, ties in the order of the files.

        Args:
            underlyings: how many there may be; ``underlying`` (D,) counts them from 0.
            time: (D,) microseconds since 1970.
            spot: (D,) USD; 0 where there is none.
        """
        self.tolerance = round(options.expiry_tolerance * HOUR)
        # Step by step, for of very many decisions each array that is not there counts.
        same, later = underlying[1:] == underlying[:-1], time[1:] > time[:-1]
        as_given = (np.where(same, later, underlying[1:] > underlying[:-1]) & (spot[1:] > 0)).all()
        if not (as_given and (spot[:1] > 0).all()):
            order = np.flatnonzero(spot > 0)  # a placeholder row may have none
            order = order[np.lexsort((time[order], underlying[order]))]
            last = np.ones(len(order), bool)
            last[:-1] = changes(time[order]) | changes(underlying[order])
            order = order[last]
            underlying, time, spot = underlying[order], time[order], spot[order]
        self.time, self.spot = time, spot
        # Of the same type, or the search would make another array.
        self.bounds = np.searchsorted(underlying, np.arange(underlyings + 1, dtype=underlying.dtype))

    def search(self, underlying: np.ndarray, time: np.ndarray, side) -> np.ndarray:
        """The places (C,) at which these times stand among those of their underlying, as np.searchsorted has them."""
        places = np.zeros(len(time), np.int64)
        for code in np.flatnonzero(np.bincount(underlying)):
            its, (begin, end) = underlying == code, self.bounds[code : code + 2]
            places[its] = begin + np.searchsorted(self.time[begin:end], time[its], side)
        return places

    def nearest(self, underlying: np.ndarray, time: np.ndarray, tolerance: int) -> np.ndarray:
        """The places (C,) of the spots nearest to these times, the earlier of two; -1 if none is near enough."""
        after = self.search(underlying, time, "left")
        far = np.iinfo(np.int64).max
        early, late = np.full(len(time), far), np.full(len(time), far)
        has = after > self.bounds[underlying]
        early[has] = time[has] - self.time[after[has] - 1]
        has = after < self.bounds[underlying + 1]
        late[has] = self.time[after[has]] - time[has]
        return np.where(np.minimum(early, late) <= tolerance, after - (early <= late), -1)

    @functools.cached_property
    def gaps(self) -> np.ndarray:
        """(N,) int32: how many gaps, longer than twice the tolerance, lie before each time."""
        return np.cumsum(np.diff(self.time, prepend=self.time[:1]) > 2 * self.tolerance, dtype=np.int32)

    @functools.cached_property
    def low(self) -> np.ndarray:
        """(levels, N) USD: at [level, place] the lowest of the 2 ** level spots from that place on."""
        return windows(self.spot, np.minimum)

    @functools.cached_property
    def high(self) -> np.ndarray:
        """(levels, N) USD: the highest, likewise."""
        return windows(self.spot, np.maximum)


def changes(values: np.ndarray) -> np.ndarray:
    """Of each value but the last whether the next one is another."""
    return values[1:] != values[:-1]


def windows(spot: np.ndarray, extreme) -> np.ndarray:
    found = [spot]
    for level in range(min(WIDEST, len(spot).bit_length() - 1)):
        half = 1 << level
        found.append(found[-1].copy())
        extreme(found[-2][:-half], found[-2][half:], out=found[-1][:-half])
    return np.array(found)
