"""harvest.jsonl: a line for each chain that was collected, and for each that was not."""

import datetime
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from covered_call.candidates.schema import UTC, shown

NAME = "harvest.jsonl"
SECOND = 1_000_000  # times are microseconds since 1970: sums of them are exact


class HarvestError(ValueError):
    """A folder of chains, or a file of history, cannot be gone on with; the message says why and what to do."""


class HarvestLog:
    """The log of a folder, which the caller has locked. Lines are appended, each as a whole and on the disk.

    A line has ``underlying`` and ``due``, the time of the cycle; of a chain ``file``, ``harvest_time``, ``rows`` and
    ``skipped``; of a gap ``gap``, which says why, ``missed``, the number of cycles, and ``until``, when the last of
    them was due.

    What a killed process left is put right: half a last line goes, and a chain that was written, but not logged, is.

    Raises:
        HarvestError: for a line or a chain that cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME
        cut_torn_end(self.path)
        self.last_due: dict[str, int] = {}  # of each underlying
        self.files: set[str] = set()
        for number, line in enumerate(lines_of(self.path), start=1):
            try:
                entry = json.loads(line)
                due = microseconds(entry.get("until", entry["due"]))
                self.note(entry["underlying"], due, entry.get("file"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise HarvestError(
                    f"{self.path}, line {number}: {shown(line)} is no line of this log ({error!r}). "
                    "Remove it, or give another folder."
                ) from error

    def note(self, underlying: str, due: int, file: str | None) -> None:
        self.last_due[underlying] = max(due, self.last_due.get(underlying, due))
        self.files |= {file} if file else set()

    def add(self, underlying: str, due: int, **entry) -> None:
        text = json.dumps({"underlying": underlying, "due": iso(due), **entry}) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(text.encode())
            os.fsync(file.fileno())
        self.note(underlying, microseconds(entry.get("until", iso(due))), entry.get("file"))

    def add_gap(self, underlying: str, due: int, every: int, missed: int, why: str) -> None:
        self.add(underlying, due, until=iso(due + (missed - 1) * every), missed=missed, gap=why)

    def add_unlogged(self, underlying: str) -> None:
        """The chains that stand in the folder and not in the log."""
        for path in sorted(self.folder.glob(f"{underlying}_*.parquet")):
            if path.name not in self.files and re.fullmatch(rf"{underlying}_[\d-]+_\d+\.parquet", path.name):
                time, rows, skipped = read_chain(path)
                self.add(underlying, time, file=path.name, harvest_time=iso(time), rows=rows, skipped=skipped)

    def resume(self, underlyings: Iterable[str], every: int, now: int) -> int:
        """When the first cycle is due: an interval after the last of the log, or now, if that has passed. What was
        missed meanwhile is logged as gaps; a first cycle that is late by less than half an interval missed none.

        Raises:
            HarvestError: if the log ends in the future.
        """
        last = {name: self.last_due[name] for name in underlyings if name in self.last_due}
        ahead = next((name for name, due in last.items() if due > now), None)
        if ahead:
            raise HarvestError(
                f"{self.path} has {ahead} at {iso(last[ahead])}, and now it is {iso(now)}. Is the clock right?"
            )
        first = max([now, *(due + every for due in last.values())])
        for name, due in last.items():
            missed = (2 * (first - due) + every) // (2 * every) - 1
            if missed > 0:
                self.add_gap(name, due + every, every, missed, "no harvest was running")
        return first


def cut_torn_end(path: Path) -> None:
    """Removes what follows the last line end: a process was killed, or the disk was full, while it wrote a line."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def read_chain(path: Path) -> tuple[int, int, int]:
    """The time of a chain, its rows, and how many were left out."""
    try:
        times = pq.read_table(path, columns=["harvest_time"])
        metadata = times.schema.metadata or {}
        time = times["harvest_time"][0].cast(pa.timestamp("us", "UTC")).value
        return time, len(times), int(metadata.get(b"skipped_rows", 0))
    except (pa.ArrowException, KeyError, IndexError) as error:
        raise HarvestError(f"{path} is no chain that was collected here ({error}). Move it elsewhere.") from error


def iso(time: int) -> str:
    return (datetime.datetime.fromtimestamp(0, UTC) + datetime.timedelta(microseconds=time)).isoformat()


def microseconds(text: str) -> int:
    return (datetime.datetime.fromisoformat(text) - datetime.datetime.fromtimestamp(0, UTC)) // MICROSECOND


MICROSECOND = datetime.timedelta(microseconds=1)
