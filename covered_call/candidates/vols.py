"""At which implied vol premiums and buy-backs are priced; prompts and features keep the file's own."""

import logging
from typing import NamedTuple

import numpy as np

from covered_call.candidates.options import CoveredCallCandidatesConfig, constant_vol
from covered_call.candidates.pricing import Calls
from covered_call.candidates.schema import MAX_IV, CandidatesError, shown
from covered_call.candidates.series import HOUR, Series, read_series

logger = logging.getLogger(__name__)

UNDERLYING = "{underlying}"  # in the name of an iv_file: the name of each
STALE = 72 * HOUR  # of a vol by time: when nothing newer has come for so long, it is unknown


class Vols(NamedTuple):
    """The file's column, or a ``constant``, or one by time; times ``multiple``, and ``shift`` on top."""

    multiple: float = 1.0
    constant: float | None = None
    series: dict[int, Series] | None = None  # by the place of the underlying among the names
    shift: float = 0.0

    def priced(self, calls: Calls, underlying: np.ndarray, time: np.ndarray) -> Calls:
        """The calls (C,) at these vols, NaN where unknown; their underlyings and the times of their sales."""
        if self == Vols():
            return calls
        if self.series is not None:
            iv = self.by_time(underlying, time)
        else:
            iv = calls.iv if self.constant is None else np.full(len(time), self.constant)
        return calls._replace(iv=np.maximum(iv * self.multiple + self.shift, 0.0))

    def scaled(self, by: float) -> "Vols":
        return self._replace(multiple=self.multiple * by, shift=self.shift * by)

    def by_time(self, underlying: np.ndarray, time: np.ndarray) -> np.ndarray:
        found = np.full(len(time), np.nan)
        for code, series in (self.series or {}).items():
            its = np.flatnonzero(underlying == code)
            place = np.searchsorted(series.time, time[its], "right") - 1
            fresh = (place >= 0) & (time[its] - series.time[place] <= STALE)
            found[its] = np.where(fresh, series.number[place], np.nan)
        return found

    def text(self) -> str:
        shift = f", shifted by {self.shift:+g}" if self.shift else ""
        if self.series is not None:
            return f"the vol of iv_file{shift}"
        times = "" if self.multiple == 1 else f" times {self.multiple:g}"
        return (f"a vol of {self.constant:g}" if self.constant is not None else f"the files' iv{times}") + shift


def vols_of(options: CoveredCallCandidatesConfig, names: list[str], underlyings: set[int]) -> Vols:
    """Those that the options name; where they leave them to be fitted, the files' own.

    Raises:
        CandidatesError: for an iv_file that cannot be read or used.
    """
    series = series_of("iv_file", options.iv_file, options.iv_lag, names, underlyings)
    return Vols(constant=constant_vol(options.pricing_iv), series=series, shift=float(options.iv_shift))


def series_of(
    option: str, path: str | None, lag: float, names: list[str], underlyings: set[int]
) -> dict[int, Series] | None:
    """By the place of each underlying among the names, the vols of the file that an option names for it."""
    if path is None:
        return None
    if len(underlyings) > 1 and UNDERLYING not in path:
        several = ", ".join(sorted(names[code] for code in underlyings))
        raise CandidatesError(
            f"{option}={shown(path)}: the files hold {several}, each with a vol of its own. Name the files with "
            f"{UNDERLYING} in the place of the name."
        )
    return {code: read_vols(path.replace(UNDERLYING, names[code]), lag, option) for code in sorted(underlyings)}


def read_vols(path: str, lag: float, option: str = "iv_file") -> Series:
    """Vols as fractions a year, of a CSV that has them so or in points; see read_series."""
    series = read_series(path, option, "vol", lag)
    in_points = series.number > MAX_IV
    if len(set(in_points.tolist())) > 1:
        line = int(series.line[in_points != in_points[series.line.argmin()]].min())
        raise CandidatesError(
            f"{path}, line {line}: some vols are above {MAX_IV:g} and some are not. Give all in points (70) or all as "
            "fractions (0.70)."
        )
    points = bool(in_points.all())
    logger.warning("%s: vols of %s.", path, "points, taken as hundredths" if points else "fractions a year")
    return series._replace(number=series.number / (100 if points else 1))
