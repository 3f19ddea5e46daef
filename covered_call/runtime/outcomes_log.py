"""outcomes.jsonl: what selling each candidate of a log would have brought, sold or not, beside the log itself."""

import datetime
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from covered_call import atomic
from covered_call.candidates.schema import is_number, iso_time, shown
from covered_call.runtime.journal import JournalError, plain

FILE_NAME = "outcomes.jsonl"
SCHEMA_VERSION = 1


class Settled(NamedTuple):
    """What is known of a candidate.

    Args:
        pnl_vs_hodl: USD a coin, net of fees; None where it can never be known, and ``why`` says so.
        max_drawdown_pct: of the coin with the call, from a peak; None where it was not to be seen.
        settled_at: the time of the last price that it rests on.
        how: "snapshots", "spots", "log" or "files".
    """

    decision_id: str
    instrument: str
    pnl_vs_hodl: float | None
    max_drawdown_pct: float | None
    settled_at: datetime.datetime | None
    how: str
    why: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.decision_id, self.instrument


Outcomes = dict[tuple[str, str], Settled]  # by decision_id and instrument


def read_outcomes(folder: str | Path) -> Outcomes:
    """Nothing where there is no such file.

    Raises:
        JournalError: for a line that settle did not write; it names the line.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return {}
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    found = [settled_of(text, f"{path}, line {number}") for number, text in lines]
    return {one.key: one for one in found}


def settled_of(text: bytes, where: str) -> Settled:
    try:
        line = json.loads(text)
        version = line.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"it has schema_version {shown(version)}, and this is {SCHEMA_VERSION}")
        found = Settled(**line)
        at = None if found.settled_at is None else iso_time(str(found.settled_at))
        for name in ("pnl_vs_hodl", "max_drawdown_pct"):
            value = getattr(found, name)
            if value is not None and not (is_number(value) and math.isfinite(value)):
                raise ValueError(f"{name} is no number")
        if (found.pnl_vs_hodl is None) == (at is not None):
            raise ValueError("an outcome has a time, and what is unknown has none")
        return found._replace(settled_at=at)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JournalError(
            f"{where}: {shown(text[:200])} is no outcome: {error}. Remove the file, and settle again."
        ) from error


def add_outcomes(folder: str | Path, new: Iterable[Settled]) -> int:
    """Writes those that are not there yet after those that are; returns how many. The file is whole at any moment.

    Raises:
        FolderBusy: if another process is at it.
    """
    path = Path(folder) / FILE_NAME
    with atomic.locked(path.with_suffix("")):
        known = read_outcomes(folder)
        added = {one.key: one for one in new if one.key not in known}
        if added:
            before = path.read_bytes() if path.is_file() else b""
            lines = (json.dumps(plain({"schema_version": SCHEMA_VERSION, **one._asdict()}), allow_nan=False)
                for one in added.values())  # fmt: skip
            atomic.write(path, before + "".join(f"{line}\n" for line in lines).encode())
    return len(added)
