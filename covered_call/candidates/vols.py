"""At which implied vol premiums and buy-backs are priced; prompts and features keep the file's own."""

import csv
import logging
import math
import os
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import microseconds
from covered_call.candidates.market import HOUR
from covered_call.candidates.options import CoveredCallCandidatesConfig, constant_vol
from covered_call.candidates.pricing import Calls
from covered_call.candidates.schema import MAX_IV, CandidatesError, iso_time, shown, utc

logger = logging.getLogger(__name__)

UNDERLYING = "{underlying}"  # in the name of an iv_file: the name of each
STALE = 72 * HOUR  # of a vol by time: when nothing newer has come for so long, it is unknown


class Series(NamedTuple):
    """Vols (N,) as fractions a year, and the times (N,) from which they are known, in microseconds since 1970."""

    time: np.ndarray
    vol: np.ndarray


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
            found[its] = np.where(fresh, series.vol[place], np.nan)
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
    series = None
    if options.iv_file is not None:
        if len(underlyings) > 1 and UNDERLYING not in options.iv_file:
            several = ", ".join(sorted(names[code] for code in underlyings))
            raise CandidatesError(
                f"iv_file={shown(options.iv_file)}: the files hold {several}, each with a vol of its own. Name the "
                f"files with {UNDERLYING} in the place of the name."
            )
        series = {
            code: read_series(options.iv_file.replace(UNDERLYING, names[code]), options.iv_lag)
            for code in sorted(underlyings)
        }
    return Vols(constant=constant_vol(options.pricing_iv), series=series, shift=float(options.iv_shift))


def read_series(path: str, lag: float) -> Series:
    """A CSV with a header, times in its first column and vols in its second, in any order.

    Args:
        lag: hours after its time at which a vol is known: 24 for the close of a day that is named by its date.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise CandidatesError(f"iv_file={shown(path)} is no file. Give the path of a CSV of times and vols.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [(line, row) for line, row in enumerate(csv.reader(file), start=1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CandidatesError(f"iv_file={shown(path)} cannot be read: {error}.") from error
    known = [vol_of(path, line, row) for line, row in rows[1:] if len(row) > 1 and row[1].strip()]
    if not known:
        raise CandidatesError(
            f"iv_file={shown(path)}: give a CSV with a header, times in the first column and vols in the second."
        )
    in_points = {vol > MAX_IV for _, vol, _ in known}
    if len(in_points) > 1:
        line = next(line for line, vol, _ in known if (vol > MAX_IV) != (known[0][1] > MAX_IV))
        raise CandidatesError(
            f"{path}, line {line}: some vols are above {MAX_IV:g} and some are not. Give all in points (70) or all as "
            "fractions (0.70)."
        )
    points = True in in_points
    logger.warning("%s: vols of %s.", path, "points, taken as hundredths" if points else "fractions a year")
    time = np.array([time for *_, time in known]) + round(lag * HOUR)
    order = np.argsort(time, kind="stable")
    twice = np.flatnonzero(np.diff(time[order]) == 0)
    if len(twice):
        raise CandidatesError(f"{path}, line {known[order[twice[0] + 1]][0]}: this time stands there twice.")
    return Series(time[order], np.array([vol for _, vol, _ in known])[order] / (100 if points else 1))


def vol_of(path: str, line: int, row: list[str]) -> tuple[int, float, int]:
    """The line, its vol, and its time in microseconds since 1970."""
    time = iso_time(row[0].strip())
    if time is None:
        raise CandidatesError(f"{path}, line {line}, first column: {shown(row[0])} is no time such as 2024-01-01.")
    try:
        vol = float(row[1])
    except ValueError:
        vol = math.nan
    if not (0 < vol < math.inf):
        raise CandidatesError(f"{path}, line {line}, second column: {shown(row[1])} is no vol above 0.")
    return line, vol, microseconds(utc(time))
