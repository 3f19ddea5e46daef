"""decisions_YYYYMMDD.jsonl: what an agent saw, meant and did, on the disk before an order is sent.

The log is append-only, so a cycle is completed by lines of its own. There are two kinds:

- a **cycle**: ``decision_id``, ``orders`` (how many it will send) and all that was known and meant. It is on the disk
  before the first order is sent.
- a **completion**: ``completes`` (the decision_id) and ``order`` (which of them, from 0), with what became of it.
  Orders that have none were under way when the process was killed: see ``Journal.pending``.

Every line has ``schema_version``. A file is named after the UTC day on which its lines were written.
"""

import contextlib
import datetime
import json
import logging
import math
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from covered_call import atomic
from covered_call.candidates.schema import UTC, shown

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
ROOM = 1 << 20  # bytes that must be free before an order is sent: what became of it has to be written down, too
ABANDONED = "abandoned"  # of an order: it was never sent, so its decision may be taken again


class JournalError(ValueError):
    """A log cannot be read, or not be written; the message says why and what to do."""


@contextlib.contextmanager
def opened(folder: str | os.PathLike, durable: bool = True) -> Generator["Journal"]:
    """The log of a folder, which this process alone may write.

    Args:
        durable: each line is on the disk before ``write`` returns; else they are at the end, which does where no order
            is sent, as in a replay.

    Raises:
        FolderBusy: if another agent is at work there.
        JournalError: for a line that no agent wrote.
    """
    with atomic.locked(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        journal = Journal(Path(folder), durable)
        try:
            yield journal
        finally:
            journal.close()


class Journal:
    """See ``opened``. What a killed process left is put right: half a last line is moved into a file beside it.

    Args:
        torn: how many half lines were moved away now.
        pending: (decision_id, order) of the orders that were meant and of which nothing more is known, in their order.
        decided: the ids of the decisions that were taken and not abandoned.
        last: the last cycle; None of a new log.
    """

    def __init__(self, folder: Path, durable: bool = True):
        self.folder, self.durable = folder, durable
        self.pending: dict[tuple[str, int], dict] = {}
        self.decided: set[str] = set()
        self.last: dict | None = None
        self.file: Any = None
        self.path: Path | None = None
        paths = files_of(folder)
        self.torn = move_torn_end(paths[-1]) if paths else 0
        if self.torn:
            logger.warning("%s ended in half a line: it was moved into %s.", paths[-1], torn_path(paths[-1]).name)
        self.last_day = paths[-1].stem if paths else ""
        for line in read(folder):
            self.note(line)

    def note(self, line: dict) -> None:
        if "completes" in line:
            self.pending.pop((line["completes"], line["order"]), None)
            if line["execution"]["status"] == ABANDONED:
                self.decided.discard(line["completes"])
            return
        self.last = line
        self.decided.add(line["decision_id"])
        self.pending |= {(line["decision_id"], order): line for order in range(line["orders"])}

    def write(self, cycle: dict) -> None:
        """Takes a cycle down, before its orders are sent.

        Raises:
            JournalError: if it cannot be: then none must be sent.
        """
        if cycle["orders"] and shutil.disk_usage(self.folder).free < ROOM:
            raise JournalError(
                f"{self.folder}: the disk is nearly full, so no order was sent. Make room and start again."
            )
        try:
            self.append(cycle)
        except OSError as error:
            raise JournalError(
                f"{self.folder}: {cycle['decision_id']} could not be written down ({error.strerror}), so no order was "
                "sent. Make room, or give another folder, and start again."
            ) from error

    def complete(self, decision_id: str, order: int, **what) -> None:
        """Takes down what became of an order; ``what`` holds its ``execution``, which has a ``status``."""
        try:
            self.append({"completes": decision_id, "order": order, **what})
        except OSError as error:
            raise JournalError(
                f"{self.folder}: what became of order {order} of {decision_id} could not be written down "
                f"({error.strerror}). Make room and start again: the log is then compared with what is held."
            ) from error

    def append(self, line: dict) -> None:
        line = plain({"schema_version": SCHEMA_VERSION, **line})
        text = (json.dumps(line, allow_nan=False) + "\n").encode()
        self.turn_the_page()
        size = self.file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[self.file.write(rest) :]
            if self.durable:
                os.fsync(self.file.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # half a line: whoever reads meanwhile should not see it
                self.file.truncate(size)
            raise
        self.note(line)

    def turn_the_page(self) -> None:
        """Opens the file of today; a clock that went back goes on in the last one, so that lines stay in order."""
        day = max(f"decisions_{datetime.datetime.now(UTC):%Y%m%d}", self.last_day)
        if self.file is None or day != self.last_day:
            self.close()
            self.last_day, self.path = day, self.folder / f"{day}.jsonl"
            self.file = open(self.path, "ab", buffering=0)
            if self.durable:
                sync_folder(self.folder)

    def close(self) -> None:
        if self.file:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(folder: str | os.PathLike) -> Iterator[dict]:
    """All whole lines of a folder in the order in which they were written; half a last one is left out.

    Raises:
        JournalError: for a line that no agent of this version wrote.
    """
    for path in files_of(Path(folder)):
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield parsed(line, f"{path}, line {number}")


def parsed(text: bytes, where: str) -> dict:
    try:
        line = json.loads(text)
        version = line["schema_version"]
        known = ("completes", "order", "execution") if "completes" in line else ("decision_id", "orders")
        if version == SCHEMA_VERSION and all(name in line for name in known):
            return line
        reason = f"it has schema_version {shown(version)}, and this is {SCHEMA_VERSION}"
        reason = reason if version != SCHEMA_VERSION else f"it lacks one of {', '.join(known)}"
    except (ValueError, KeyError, TypeError) as error:
        reason = repr(error)
    raise JournalError(
        f"{where}: {shown(text[:200])} is no line of this log: {reason}. Mend it, or give another folder."
    )


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("decisions_" + "[0-9]" * 8 + ".jsonl"))


def torn_path(path: Path) -> Path:
    return path.with_suffix(".torn")


def move_torn_end(path: Path) -> int:
    """Moves what follows the last line end into a file beside it; returns how many half lines that were."""
    with open(path, "rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end == len(content):
            return 0
        with open(torn_path(path), "ab") as aside:  # on the disk before it goes from here
            aside.write(content[end:] + b"\n")
            aside.flush()
            os.fsync(aside.fileno())
        file.truncate(end)
        os.fsync(file.fileno())
    return 1


def sync_folder(folder: Path) -> None:
    """A new file's name is on the disk once its folder is; on Windows folders cannot be opened, nor need to be."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def plain(value: Any) -> Any:
    """What JSON can say: a named tuple is an object, a time is ISO 8601, NaN and infinity are null."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    return [plain(one) for one in value]
