"""Numbers by time, such as vols or spots, from a CSV."""

import csv
import math
import os
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import microseconds
from covered_call.candidates.schema import CandidatesError, iso_time, shown, utc

HOUR = 3_600_000_000  # microseconds


class Series(NamedTuple):
    """Numbers (N,) and the times (N,) from which they are known, ascending, in microseconds since 1970."""

    time: np.ndarray
    number: np.ndarray
    line: np.ndarray  # (N,) of the file


def read_series(path: str, option: str, what: str, lag: float = 0.0, day_begins: float = 0.0) -> Series:
    """A CSV with a header, times in its first column and numbers above 0 in its second, in any order. A row whose
    second cell is blank is one of which nothing is known.

    Args:
        option: by which the path was given, for messages.
        what: a number is, such as "vol".
        lag: hours after its time at which a number is known: 24 for the close of a day that is named by its date.
        day_begins: hours after midnight, UTC, that a date stands for.

    Raises:
        CandidatesError: for a file that cannot be read, or a row that is none of these; it names line and column.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise CandidatesError(f"{option}={shown(path)} is no file. Give the path of a CSV of times and {what}s.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [(line, row) for line, row in enumerate(csv.reader(file), start=1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CandidatesError(f"{option}={shown(path)} cannot be read: {error}.") from error
    known = [number_of(path, line, row, what, day_begins) for line, row in rows[1:] if len(row) > 1 and row[1].strip()]
    if not known:
        raise CandidatesError(
            f"{option}={shown(path)}: give a CSV with a header, times in the first column and {what}s in the second."
        )
    time = np.array([time for time, *_ in known]) + round(lag * HOUR)
    order = np.argsort(time, kind="stable")
    twice = np.flatnonzero(np.diff(time[order]) == 0)
    if len(twice):
        raise CandidatesError(f"{path}, line {known[order[twice[0] + 1]][2]}: this time stands there twice.")
    return Series(time[order], *(np.array([one[place] for one in known])[order] for place in (1, 2)))


def number_of(path: str, line: int, row: list[str], what: str, day_begins: float) -> tuple[int, float, int]:
    """The time in microseconds since 1970, the number, and the line."""
    text = row[0].strip()
    time = iso_time(text)
    if time is None:
        raise CandidatesError(f"{path}, line {line}, first column: {shown(row[0])} is no time such as 2024-01-01.")
    try:
        number = float(row[1])
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise CandidatesError(f"{path}, line {line}, second column: {shown(row[1])} is no {what} above 0.")
    return microseconds(utc(time)) + round(day_begins * HOUR) * (len(text) <= len("2024-01-01")), number, line
