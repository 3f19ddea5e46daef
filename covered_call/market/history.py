"""The files of daily history: a CSV of dates and one number, which grows and never changes."""

import csv
import datetime
import math
from pathlib import Path

import pyarrow as pa

from covered_call import atomic
from covered_call.candidates.schema import shown
from covered_call.market.harvest_log import HarvestError


def extend(path: Path, new: pa.Table) -> int:
    """Adds the days that a file does not have yet, in their order; how many there were. The file is whole at any time.

    Args:
        new: ``date`` and one column of numbers, which give the file its header.

    Raises:
        HarvestError: if the file is another one, or has another number for a day.
    """
    header = new.column_names
    old = read(path, header) if path.exists() else {}
    found = dict(zip(new["date"].to_pylist(), new[header[1]].to_pylist(), strict=True))
    for date, value in found.items():
        if old.get(date, value) != value:
            raise HarvestError(
                f"{path}: {date} is {old[date]} there, and {value} on the exchange now: they are not of one source. "
                "Nothing was changed; give another folder with --to, or remove the file."
            )
    merged = old | found
    if len(merged) > len(old):
        rows = "".join(f"{date},{merged[date]}\n" for date in sorted(merged))
        atomic.write(path, f"{','.join(header)}\n{rows}")
    return len(merged) - len(old)


def read(path: Path, header: list[str]) -> dict[datetime.date, float]:
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        head, *rows = [*csv.reader(file)] or [[]]
    if head != header:
        raise HarvestError(f"{path}, line 1: {shown(','.join(head))} is not {','.join(header)}. Is it another file?")
    days = {}
    for line, row in enumerate(rows, start=2):
        try:
            date, value = datetime.date.fromisoformat(row[0]), float(row[1])
        except (ValueError, IndexError):
            date, value = None, math.nan
        if date is None or not math.isfinite(value) or len(row) != 2 or date in days:
            raise HarvestError(
                f"{path}, line {line}: {shown(','.join(row))} is no new date with a number. Mend the line, or remove "
                "the file."
            )
        days[date] = value
    return days
