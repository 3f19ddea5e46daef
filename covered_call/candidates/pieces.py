"""Decisions of files that were read one by one, wherever that was: their candidates in pieces in a shared folder."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from covered_call.candidates.chains import Rolls, no_rolls
from covered_call.candidates.columns import Columns, in_batches, places_among
from covered_call.candidates.decisions import Reader
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import TP_AND_ROLL
from covered_call.candidates.pricing import Calls
from covered_call.candidates.schema import CandidatesError
from covered_call.candidates.shared_folder import WORK, Folder, local_copy
from covered_call.candidates.spool import SPOOLED, Spool, columns_in

# Candidates of a piece, some 100 KiB. Of files that go on side by side a part wants a little of each.
PIECE = 1_024
KEPT = ("underlying", "exit_style", "time", "spot", "size")  # of a decision, as Spool.by_decision has them
CALLS = tuple(f"{roll}_{name}" for roll in Rolls._fields for name in Calls._fields)


class Scanned(NamedTuple):
    """What is to be known of a file before any of it is rendered; its candidates are in the folder."""

    content: str  # the SHA-256 of the file
    name: str  # of what is in the folder
    said: dict  # its underlyings and exit styles, the rows of each, and the decisions that were dropped
    arrays: dict[str, np.ndarray]  # of each decision KEPT, and CALLS if it rolls; of each piece its decisions and end


def scan(path: str, folder: Folder, options: CoveredCallCandidatesConfig, made: str) -> Scanned:
    """Reads a file into the folder, if what is made of its content in this way is not there already.

    Args:
        made: all that the result depends on beside the file's content.

    Raises:
        CandidatesError: for a file that cannot be read or trusted.
    """
    with local_copy(path) as local:
        try:
            with open(local, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            name = hashlib.sha256(f"{made}{content}".encode()).hexdigest()
            return known_scan(folder, name, content) or new_scan(local, folder, name, content, options)
        except CandidatesError as error:  # a BadRow, say, which does not travel from one process to another
            raise CandidatesError(str(error).replace(local, path)) from None


def known_scan(folder: Folder, name: str, content: str) -> Scanned | None:
    saved = folder.read(f"{WORK}/{name}.npz")
    if saved is None:
        return None
    with np.load(io.BytesIO(saved), allow_pickle=False) as arrays:
        found = dict(arrays)
    return Scanned(content, name, json.loads(found.pop("said").tobytes()), found)


def new_scan(local: str, folder: Folder, name: str, content: str, options: CoveredCallCandidatesConfig) -> Scanned:
    reader = Reader(options)
    reader.read(local, content)
    with folder.replacing(f"{WORK}/{name}.pieces") as file:
        arrays = write_pieces(reader.spool, file)
    if len(reader.spool):
        arrays |= dict(zip(KEPT, reader.spool.by_decision(), strict=True))
    if len(reader.spool) and TP_AND_ROLL in reader.spool.names:
        calls = ([call for roll in rolls for call in roll] for rolls in reader.rolls)
        arrays |= dict(zip(CALLS, map(np.concatenate, zip(*calls, strict=True)), strict=True))
    said = {"names": reader.spool.names, "present": reader.present, "dropped": reader.dropped}
    saved = io.BytesIO()
    np.savez(saved, allow_pickle=False, said=np.frombuffer(json.dumps(said).encode(), np.uint8), **arrays)
    folder.write(f"{WORK}/{name}.npz", saved.getvalue())
    return Scanned(content, name, said, arrays)


def write_pieces(spool: Spool, file: BinaryIO) -> dict[str, np.ndarray]:
    """Returns how many decisions each piece has, and where its bytes end."""
    decisions, bytes_ = [], []
    for place in spool.blocks:
        batch = spool.read_batch(*place)
        for begin, end in in_batches(np.diff(batch.column("candidates").offsets.to_numpy()), PIECE):
            piece = batch.slice(begin, end - begin).serialize()
            file.write(memoryview(piece))
            decisions.append(end - begin)
            bytes_.append(piece.size)
    return {"decisions": np.array(decisions, np.int64), "ends": np.cumsum(bytes_, dtype=np.int64)}


class Pieces(Spool):
    """What was scanned, file after file. Nothing is added to the folder: what is computed stays with who asks."""

    def __init__(self, folder: Folder):
        self.shared = folder
        self.names = []
        self.files: list[tuple[str, np.ndarray]] = []  # the name of each, and the places of its names among all

        self.kept: list[tuple[np.ndarray, ...]] = []  # of each file's decisions KEPT
        self.file_of, self.begins, self.ends = (np.zeros(0, np.int64) for _ in range(3))  # (P,) of each piece
        self.starts = np.zeros(1, np.int64)  # (P + 1,) the place of its first decision; at the end the number of all

    def __getstate__(self) -> dict:
        return self.__dict__

    def __len__(self) -> int:
        return int(self.starts[-1])

    def add(self, scanned: Scanned) -> np.ndarray:
        """Returns the places of the file's names among those of all."""
        ends, decisions = scanned.arrays["ends"], scanned.arrays["decisions"]
        self.file_of = np.append(self.file_of, np.full(len(ends), len(self.files)))
        self.begins = np.append(self.begins, np.concatenate([[0], ends])[: len(ends)])
        self.ends = np.append(self.ends, ends)
        self.starts = np.append(self.starts, self.starts[-1] + np.cumsum(decisions))
        self.files.append((scanned.name, places_among(self.names, scanned.said["names"])))
        return self.files[-1][1]

    def by_decision(self) -> list[np.ndarray]:
        """As of all spools; they are no longer kept."""
        kept, self.kept = self.kept, []  # or all would be in memory twice, and be sent to each task
        return [np.concatenate(parts) for parts in zip(*kept, strict=True)] if kept else super().by_decision()

    def several(self, numbers: list[int]) -> Iterator[Columns]:
        """Pieces that follow each other in a file are read at once."""
        if not numbers:
            return
        apart = (np.diff(numbers) != 1) | (np.diff(self.file_of[numbers]) != 0)
        runs = np.split(np.array(numbers), np.flatnonzero(apart) + 1)
        files = [self.files[self.file_of[run[0]]] for run in runs]
        begins = [int(self.begins[run[0]]) for run in runs]
        ends = [int(self.ends[run[-1]]) for run in runs]
        found = self.shared.read_ranges([f"{WORK}/{name}.pieces" for name, _ in files], begins, ends)
        for run, (_, codes), begin, content in zip(runs, files, begins, found, strict=True):
            buffer = pa.py_buffer(content)
            for number in run:
                message = buffer.slice(self.begins[number] - begin, self.ends[number] - self.begins[number])
                columns = columns_in(pa.ipc.read_record_batch(message, SPOOLED), self.names)
                by_name = {name: codes[getattr(columns, name)] for name in ("underlying", "exit_style")}
                yield dataclasses.replace(columns, **by_name)


def gather(reader: Reader, pieces: Pieces, scanned: Scanned) -> int:
    """Takes a file in as Reader.read does; returns how many decisions there are now."""
    places, arrays = pieces.add(scanned), scanned.arrays
    if len(arrays["decisions"]):
        underlying, exit_style, *others = (arrays[name] for name in KEPT)
        pieces.kept.append((places[underlying], places[exit_style], *others))
        calls = [arrays[name] for name in CALLS if name in arrays]
        size = len(Calls._fields)
        rolls = (
            Rolls(*(Calls(*calls[start : start + size]) for start in range(0, len(calls), size))) if calls else None
        )
        reader.rolls.append(rolls or no_rolls(len(underlying)))
    for name, rows in scanned.said["present"].items():
        reader.present[name].update(rows)
    reader.dropped += scanned.said["dropped"]
    return len(pieces)
