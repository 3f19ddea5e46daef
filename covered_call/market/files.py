"""Files of chains: those that patterns name, and their snapshots by time."""

import collections
import glob
import heapq
import os
from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils import tqdm

from covered_call.candidates.schema import CandidatesError, shown
from covered_call.market.snapshot import BadRows, Snapshot, layout_of, read_snapshots, times_of


def chain_files(patterns: Sequence[str], option: str) -> list[str]:
    """The Parquet files that patterns, or folders, name, each once.

    Raises:
        CandidatesError: for one that names none; it says which option had it.
    """
    found = {}
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        inside = os.path.join(glob.escape(path), "*.parquet") if os.path.isdir(path) else path
        its = [path] if os.path.isfile(path) else sorted(glob.glob(inside))
        if not its:
            raise CandidatesError(f"{option}={shown(pattern)} is no file. Give Parquet files, or a folder.")
        found |= dict.fromkeys(its)
    return list(found)


def by_first_time(paths: list[str]) -> list[str]:
    """The files in the order in which they begin."""
    if len(paths) == 1:
        return paths
    bar = tqdm(paths, desc="order of files", unit=" files", disable=None)
    return sorted(paths, key={path: first_time(path) for path in bar}.__getitem__)


def first_time(path: str) -> int:
    """Microseconds since 1970; 0 for a file without rows, of which its reader says what is wrong."""
    try:
        with pq.ParquetFile(path) as file:
            name = layout_of(path, file.schema_arrow.names).columns["time"]
            batch = next(file.iter_batches(1, columns=[name]), None)
    except (pa.ArrowInvalid, OSError) as error:
        raise CandidatesError(f"{path} cannot be read as Parquet: {error}. Give a file of option quotes.") from error
    return int(times_of(path, pa.chunked_array([batch.column(0)]), name)[0]) if batch else 0


def in_time(paths: Sequence[str], bad: BadRows, wanted: Collection[str]) -> Iterator[Snapshot]:
    """The snapshots of these underlyings, of all files by time; a file is opened when its time has come.

    Raises:
        CandidatesError: for an underlying that stands in two files at one time.
    """
    begins = sorted((first_time(path), path) for path in paths)
    waiting = collections.deque((time, place, path) for place, (time, path) in enumerate(begins))
    merged: list[tuple[int, int, Snapshot, Iterator[Snapshot]]] = []
    last: dict[str, Snapshot] = {}
    while waiting or merged:
        while waiting and (not merged or waiting[0][0] <= merged[0][0]):
            _, place, path = waiting.popleft()
            push(merged, place, read_snapshots(path, bad))
        _, place, snapshot, rest = heapq.heappop(merged)
        push(merged, place, rest)
        before = last.get(snapshot.underlying)
        if before and snapshot.time <= before.time:
            raise CandidatesError(
                f"{snapshot.source} has {snapshot.underlying} at a time that {before.source} has, too. Give one."
            )
        last[snapshot.underlying] = snapshot
        if snapshot.underlying in wanted:
            yield snapshot


def push(merged: list, place: int, snapshots: Iterator[Snapshot]) -> None:
    """The next snapshot of a file among those of others; of equal times the file of the lower place is first."""
    snapshot = next(snapshots, None)
    if snapshot:
        heapq.heappush(merged, (snapshot.time, place, snapshot, snapshots))
