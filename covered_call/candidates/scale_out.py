"""Rendering beyond one machine: Parquet in a shared folder, made by tasks on a Ray cluster.

Plain tasks, and not Ray Data: a part has a name, an order and one content, so that a run that begins again keeps it,
where Ray Data cuts and names blocks as it goes.
"""

import collections
import copy
import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow.parquet as pq

from covered_call.candidates.builder import hash_of_vols
from covered_call.candidates.columns import Columns, in_batches, label_ends
from covered_call.candidates.decisions import Decisions, Reader, outcomes_of, settled
from covered_call.candidates.options import CHATS, PATHS, CoveredCallCandidatesConfig, names_of
from covered_call.candidates.outcomes import Replay
from covered_call.candidates.pieces import Pieces, gather, scan
from covered_call.candidates.records import RECORDS, batches, schema_of
from covered_call.candidates.schema import CandidatesError, shown
from covered_call.candidates.shared_folder import WORK, Folder
from covered_call.candidates.source import CODE_HASH
from covered_call.candidates.splits import say_purged, split_bounds
from covered_call.candidates.spool import COMPUTED, with_computed

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PART = 262_144  # candidates of a part: seconds of work, and less than 1 GiB of a worker's memory
SAVED_EVERY = 5.0  # seconds between two writings of the manifest: what a kill may have done again
TASKS_A_CPU = 2  # that are under way or wait at a node, so that none of them idles
ATTEMPTS = 10  # at a task whose node is lost


class Cluster(Protocol):
    """Where tasks run."""

    def share(self, value: Any) -> Any:
        """A stand-in for a value that many tasks take."""
        ...

    def each(self, function: Callable, calls: Iterable[tuple]) -> Iterator[tuple[tuple, Any]]:
        """Each call with what came of it, in any order."""
        ...


class RayCluster:
    """A Ray cluster that is there already: that of RAY_ADDRESS, or the one that this machine belongs to."""

    def __init__(self):
        try:
            self.ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError:
            raise CandidatesError(
                "engine='ray' needs the package ray: pip install 'covered-call-candidates[ray]', on each node."
            ) from None
        if not self.ray.is_initialized():
            try:
                self.ray.init(address="auto", logging_level=logging.WARNING)
            except ConnectionError as error:
                raise CandidatesError(
                    "No Ray cluster is found. Start one with `ray start --head`, and `ray start --address=HEAD:6379` "
                    f"on each other node, or set RAY_ADDRESS in the environment. ({str(error).splitlines()[0]})"
                ) from None

    def share(self, value: Any) -> Any:
        return self.ray.put(value)

    def each(self, function: Callable, calls: Iterable[tuple]) -> Iterator[tuple[tuple, Any]]:
        task, running = self.ray.remote(max_retries=ATTEMPTS)(function), {}
        for call in calls:
            running[task.remote(*call)] = call
            while len(running) >= TASKS_A_CPU * max(1, int(self.ray.cluster_resources().get("CPU", 1))):
                yield self.next_of(running)
        while running:
            yield self.next_of(running)

    def next_of(self, running: dict) -> tuple[tuple, Any]:
        (done, *_), _ = self.ray.wait(list(running))
        call = running.pop(done)
        try:
            return call, self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, (CandidatesError, OSError)) else error from None


class Part(NamedTuple):
    name: str  # such as train-00017
    places: np.ndarray  # of its decisions, by time
    until: int | None  # microseconds since 1970: outcomes that are not known before are purged; None: all are kept


class Shared(NamedTuple):
    """What the tasks of all parts take: a node holds one copy."""

    pieces: Pieces
    replay: Replay
    options: CoveredCallCandidatesConfig


def export_parquet(
    paths: list[str], place: str, options: CoveredCallCandidatesConfig, cluster: Cluster
) -> dict[str, collections.Counter]:
    """Writes PLACE/CONFIG/SPLIT-00000.parquet and so on, the records of load_candidates in their order, for both
    configs of chats; parts that an earlier run has finished are kept.

    Args:
        paths: files or URIs of the backtest; all nodes must see them, and the place.

    Returns:
        Of each split how many records of each config it has, in how many parts, and how many decisions were purged.

    Raises:
        CandidatesError: as load_candidates does, and for a place that holds something else.
    """
    folder, made = Folder(place), made_by(options)
    manifest = manifest_in(folder)
    check_same(manifest.get("made", made), made, place)
    decisions, files = read_on(cluster, paths, folder, options, made)
    check_files(manifest.get("files", files), files, place)
    parts = render_on(cluster, decisions, folder, options, {"parts": {}} | manifest | {"made": made, "files": files})
    counts = {split: counts_of(split, parts) for split in split_bounds(decisions.time, options)}
    say_what_came(counts)
    folder.remove(WORK)
    return counts


def read_on(
    cluster: Cluster, paths: list[str], folder: Folder, options: CoveredCallCandidatesConfig, made: dict
) -> tuple[Decisions, list[list[str]]]:
    """All decisions with what computes their outcomes, and of each file its name and the SHA-256 of its content."""
    pieces = Pieces(folder)
    reader = Reader(options, pieces)
    calls = [(path, folder, options, json.dumps(made)) for path in paths]
    scanned = {call[0]: found for call, found in cluster.each(scan_here, calls)}
    files = [[os.path.basename(path), scanned[path].content] for path in paths]
    ends = [gather(reader, pieces, scanned.pop(path)) for path in paths]
    return settled(reader.decisions(paths, ends), reader.rolls, options), files


def scan_here(path: str, folder: Folder, options: CoveredCallCandidatesConfig, made: str):
    check_node(json.loads(made))
    return scan(path, folder, options, made)


def check_node(made: dict) -> None:
    if made["code"] != CODE_HASH:
        raise CandidatesError(
            "A node of the cluster has another version of covered-call-candidates than the machine that the export "
            "was started on. Install the same one on all."
        )


def render_on(
    cluster: Cluster, decisions: Decisions, folder: Folder, options: CoveredCallCandidatesConfig, manifest: dict
) -> dict:
    """Renders the parts that are not there yet, and notes each in the manifest; returns all of them."""
    present = {f"{name}/{file}" for name in CHATS for file in folder.names(name)}
    parts = manifest["parts"] = {
        name: rows for name, rows in manifest["parts"].items() if not {*files_of(name, rows)} - present
    }
    if parts:
        logger.info("%d part(s) are there already, and kept.", len(parts))
    replay = copy.copy(decisions.replay)
    del replay.basis  # of all decisions: what is priced by them is in the spots and the nodes
    shared = cluster.share(Shared(decisions.spool, replay, options))  # ty: ignore[invalid-argument-type]
    saved = save(folder, manifest)
    missing = (part for part in parts_of_splits(decisions, options) if part.name not in parts)
    try:
        for (part, *_), rows in cluster.each(render, ((part, shared) for part in missing)):
            parts[part.name] = rows
            if time.monotonic() - saved > SAVED_EVERY:
                saved = save(folder, manifest)
    finally:
        save(folder, manifest)
    return parts


def parts_of_splits(decisions: Decisions, options: CoveredCallCandidatesConfig) -> Iterator[Part]:
    """All decisions, each in one part, by split and time."""
    times = decisions.time
    for split, (begin, end) in split_bounds(times, options).items():
        until = int(times[end]) if options.purge and end < len(times) else None
        for number, (first, last) in enumerate(in_batches(decisions.size[begin:end], PART)):
            yield Part(f"{split}-{number:05}", decisions.place[begin + first : begin + last], until)


def render(part: Part, shared: Shared) -> dict[str, int]:
    """Writes the part's records of each config; it may be done twice, or by two at once, and gives the same."""
    columns = shared.pieces.take(part.places)
    columns = with_computed(columns, COMPUTED, outcomes_of(columns, shared.replay))
    before = len(columns)
    if part.until is not None:
        columns = columns.take(np.flatnonzero(label_ends(columns) < part.until))
    counts = {"per_candidate": int(columns.offsets[-1]), "per_decision_ranking": len(columns)}
    for name in counts:
        if counts[name]:
            write_records(columns, name, part.name, shared)
    return counts | {"purged": before - len(columns)}


def write_records(columns: Columns, name: str, part: str, shared: Shared) -> None:
    with shared.pieces.shared.replacing(f"{name}/{part}.parquet") as file:
        with pq.ParquetWriter(file, schema_of(name, ()), compression="zstd") as writer:
            for batch in batches(columns):
                writer.write_table(RECORDS[name](batch, shared.options))


# ---------------------------------------------------------------------------------------------------------------------
# The manifest


def made_by(options: CoveredCallCandidatesConfig) -> dict:
    """All that records depend on beside the files; of an option that names a file its content."""
    if options.context != "none":
        raise CandidatesError(
            f"context={shown(options.context)}: a cluster's tasks do not see the market's history. Export on one "
            "machine: engine='local', or load_candidates."
        )
    if options.opinions:
        raise CandidatesError(
            f"opinions={shown(options.opinions)}: a cluster's tasks do not read the file. Export on one machine: "
            "engine='local', or load_candidates."
        )
    given = {name: getattr(options, name) for name in names_of(type(options)) if name not in PATHS}
    said = {"code": CODE_HASH, "part": PART, "options": given | {"iv_file": hash_of_vols(options.iv_file)}}
    return json.loads(json.dumps(said))  # tuples are lists


def manifest_in(folder: Folder) -> dict:
    """That of an earlier run; empty where the folder holds none."""
    text = folder.read(MANIFEST)
    if text is None:
        if any(map(folder.names, CHATS)):
            raise CandidatesError(f"{folder.place} holds {' or '.join(CHATS)} and no {MANIFEST}: give another folder.")
        return {}
    try:
        manifest = json.loads(text)
        return {name: manifest[name] for name in ("made", "files", "parts")}
    except (ValueError, KeyError, TypeError):
        raise CandidatesError(f"{folder.place}/{MANIFEST} is not that of an export: give another folder.") from None


def save(folder: Folder, manifest: dict) -> float:
    """Returns when."""
    folder.write(MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    return time.monotonic()


def check_same(old: dict, new: dict, place: str) -> None:
    changed = [name for name, value in new["options"].items() if old["options"].get(name) != value]
    if changed:
        name = changed[0]
        what = f"{name}={shown(old['options'].get(name))}, and not {shown(new['options'][name])}"
    elif old != new:
        what = "another version of covered-call-candidates"
    else:
        return
    raise CandidatesError(f"{place} holds parts that were made with {what}. Give another folder, or delete it.")


def check_files(old: list, new: list, place: str) -> None:
    if old == new:
        return
    before, now = dict(old), dict(new)
    changed = [name for name in now if name in before and before[name] != now[name]]
    more, less = [name for name in now if name not in before], [name for name in before if name not in now]
    what = f"{changed[0]} has changed" if changed else f"{more[0]} is new" if more else ""
    what = what or (f"{less[0]} is missing" if less else "their order is another")
    raise CandidatesError(
        f"{place} holds parts of other files: {what}. Give another folder, or delete it, to render all anew."
    )


def files_of(part: str, rows: dict) -> list[str]:
    return [f"{name}/{part}.parquet" for name in CHATS if rows[name]]


def counts_of(split: str, parts: dict) -> collections.Counter:
    of_split = [rows for name, rows in parts.items() if name.startswith(f"{split}-")]
    return sum(map(collections.Counter, of_split), collections.Counter(parts=len(of_split)))


def say_what_came(counts: dict[str, collections.Counter]) -> None:
    """Raises CandidatesError where there is no record at all."""
    say_purged(collections.Counter({split: its["purged"] for split, its in counts.items()}))
    empty = [split for split, its in counts.items() if not its["per_decision_ranking"]]
    if len(empty) == len(counts):
        raise CandidatesError("No split has a record: the purge took all.")
    for split in empty:
        logger.warning("Split %s is empty, and left out.", split)
