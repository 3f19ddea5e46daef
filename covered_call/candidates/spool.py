"""Decisions on disk in blocks, of which a few are in memory at a time, however many there are."""

import collections
import contextlib
import dataclasses
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterable

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from covered_call.candidates.columns import BY_DECISION, COSTS, COUNTERFACTUAL, LOGGED, STATE, Columns, Grounds, join
from covered_call.candidates.schema import CandidatesError

READ = (*STATE, *LOGGED)  # of a candidate, from the files; what is computed of it is added later
CANDIDATE = pa.struct([("instrument", pa.string()), *((name, pa.float64()) for name in READ)])
SPOOLED = pa.schema(
    [("underlying", pa.int32()), ("exit_style", pa.int32()), ("time", pa.int64()), ("spot", pa.float64())]
    + [("chosen", pa.int32()), ("candidates", pa.list_(CANDIDATE))]
)
COMPUTED = (COUNTERFACTUAL, COSTS)
PREFIX, LOCK = "covered_call_", "lock"  # of a folder, and of a file in it
IN_MEMORY = 8  # blocks: one of each of some files that go on side by side


class Spool:
    """Blocks of decisions in a folder that goes when its owner does; a pickled one reads what is there.

    The place of a decision is its number, from 0, in the order in which they were added.
    """

    def __init__(self, own: Iterable[str] = ()):
        """own: the columns of the user's that decisions have as a context."""
        with writing():
            self.folder, self.lock = locked_folder()
            remove_those_of_the_killed(self.folder)
        weakref.finalize(self, remove, self.folder, os.getpid())
        self.names: list[str] = []  # of underlyings and exit styles, in all blocks
        self.blocks: list[tuple[str, int]] = []  # the file and its batch
        self.starts = [0]  # the place of each block's first decision; at the end the number of all
        self.schema = pa.schema([*SPOOLED, *((name, pa.float64()) for name in own)])
        self.context = False  # whether there are files of what is computed of each decision, and
        self.computed: pa.Schema | None = None  # of the outcomes, when they are there, too
        self.grounds: dict[str, Grounds] = {}  # by task, if answers are to be explained
        self.recent = collections.OrderedDict()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"recent": collections.OrderedDict(), "lock": None}

    def __len__(self) -> int:
        return self.starts[-1]

    @contextlib.contextmanager
    def part(self) -> Generator[Callable[[Columns], None]]:
        """Takes blocks in; if an error ends it, none of them is kept."""
        name, before = f"rows-{len(self.blocks)}.arrow", (len(self.blocks), len(self.starts))
        try:
            with writing(), pa.OSFile(self.path(name), "w") as file, pa.ipc.new_file(file, self.schema) as writer:

                def append(columns: Columns) -> None:
                    writer.write_batch(self.batch_of(columns, self.schema))
                    self.keep(len(self.blocks), columns)
                    self.blocks.append((name, len(self.blocks) - before[0]))
                    self.starts.append(self.starts[-1] + len(columns))

                yield append
        except BaseException:
            del self.blocks[before[0] :], self.starts[before[1] :]
            self.recent.clear()
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path(name))
            raise

    def compute(self, outcomes: Callable[[Columns], tuple[np.ndarray, ...]], others: Iterable[str] = ()) -> None:
        """Adds to each block what is computed of each candidate.

        Args:
            outcomes: makes of a block the outcomes, the costs in them, the other numbers, and the label ends.
            others: the names of those.
        """
        names = (*COMPUTED, *others)
        schema = pa.schema([*((name, pa.float64()) for name in names), ("label_end", pa.int64())])
        with writing(), pa.OSFile(self.path("outcomes.arrow"), "w") as file:
            with pa.ipc.new_file(file, schema) as writer:
                for number in range(len(self.blocks)):
                    block = self.block(number)
                    computed = outcomes(block)
                    writer.write_batch(pa.record_batch(list(map(pa.array, computed)), schema=schema))
                    self.keep(number, with_computed(block, names, computed))
        self.computed = schema

    def describe(self, context: Callable[[Columns], dict[str, np.ndarray]]) -> None:
        """Adds to each block the context that it makes of its decisions, before the user's own."""
        for number in range(len(self.blocks)):
            found = context(self.block(number))
            with writing(), pa.OSFile(self.path(f"context-{number}.arrow"), "w") as file:
                batch = pa.record_batch({name: pa.array(values) for name, values in found.items()})
                with pa.ipc.new_file(file, batch.schema) as writer:
                    writer.write_batch(batch)
        self.context = True
        self.recent.clear()

    def by_decision(self) -> list[np.ndarray]:
        """(D,) each, of all decisions: underlying, exit_style, time, spot, and the number of candidates, int32.

        They are read again, for the parts that they came in would be in memory beside the whole.
        """
        kinds = (np.int32, np.int32, np.int64, np.float64, np.int32)
        found = [np.empty(len(self), kind) for kind in kinds]
        for (name, index), start, end in zip(self.blocks, self.starts, self.starts[1:], strict=False):
            with pa.memory_map(self.path(name)) as file:  # what is not looked at is not read
                batch = pa.ipc.open_file(file).get_batch(index)
                sizes = np.diff(batch.column("candidates").offsets.to_numpy())
                columns = (*(batch.column(column).to_numpy() for column in BY_DECISION[:-1]), sizes)
                for whole, part in zip(found, columns, strict=True):
                    whole[start:end] = part
        return found

    def take(self, places: np.ndarray) -> Columns:
        """The decisions at these places, in their order."""
        numbers = np.searchsorted(self.starts, places, side="right") - 1
        parts, rank = [], np.empty(len(places), np.int64)
        found = 0
        used = np.unique(numbers).tolist()
        for number, block in zip(used, self.several(used), strict=True):
            its = np.flatnonzero(numbers == number)
            parts.append(block.take(places[its] - self.starts[number]))
            rank[its] = found + np.arange(len(its))
            found += len(its)
        joined = join(parts)
        return joined if len(parts) == 1 else joined.take(rank)

    def several(self, numbers: list[int]) -> Iterable[Columns]:
        return map(self.block, numbers)

    def block(self, number: int) -> Columns:
        known = self.recent.pop(number, None)
        self.keep(number, self.read_block(number) if known is None else known)
        # Some of both may have come since.
        return dataclasses.replace(self.recent[number], names=tuple(self.names), grounds=self.grounds)

    def keep(self, number: int, block: Columns) -> None:
        self.recent[number] = block
        if len(self.recent) > IN_MEMORY:
            self.recent.popitem(last=False)

    def read_block(self, number: int) -> Columns:
        columns = columns_in(self.read_batch(*self.blocks[number]), self.names)
        if self.context:
            found = self.read_batch(f"context-{number}.arrow", 0)
            context = dict(zip(found.schema.names, (column.to_numpy() for column in found.columns), strict=True))
            columns = dataclasses.replace(columns, context=context | columns.context)
        if not self.computed:
            return columns
        computed = self.read_batch("outcomes.arrow", number)
        return with_computed(columns, self.computed.names[:-1], [column.to_numpy() for column in computed.columns])

    def read_batch(self, name: str, index: int) -> pa.RecordBatch:
        with pa.OSFile(self.path(name)) as file:
            return pa.ipc.open_file(file).get_batch(index)

    @staticmethod
    def batch_of(columns: Columns, schema: pa.Schema = SPOOLED) -> pa.RecordBatch:
        """What was read of decisions, as SPOOLED has it, and their own context."""
        rows = pa.StructArray.from_arrays(
            [columns.instrument, *(pa.array(columns.numbers[name]) for name in READ)], fields=list(CANDIDATE)
        )
        arrays = [pa.array(getattr(columns, name)) for name in BY_DECISION]
        lists = pa.ListArray.from_arrays(pa.array(columns.offsets.astype(np.int32)), rows)
        own = [pa.array(columns.context[name]) for name in schema.names[len(SPOOLED) :]]
        return pa.record_batch([*arrays, lists, *own], schema=schema)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def columns_in(batch: pa.RecordBatch, names: Iterable[str]) -> Columns:
    """The decisions of a batch of SPOOLED; the names are those that its codes are places in."""
    candidates = batch.column("candidates")
    rows = candidates.values
    numbers = {name: rows.field(name).to_numpy() for name in READ}
    by_decision = {name: batch.column(name).to_numpy() for name in BY_DECISION}
    offsets = candidates.offsets.to_numpy().astype(np.int64)
    own = {name: batch.column(name).to_numpy() for name in batch.schema.names[len(SPOOLED) :]}
    return Columns(tuple(names), **by_decision, offsets=offsets, instrument=rows.field("instrument"),
        numbers=numbers, label_end=np.zeros(len(rows), np.int64), context=own)  # fmt: skip


def with_computed(columns: Columns, names: Iterable[str], computed: Iterable[np.ndarray]) -> Columns:
    """The same with what is computed of each candidate: numbers of these names, and the label ends last."""
    *values, label_end = computed
    numbers = columns.numbers | dict(zip(names, values, strict=True))
    return dataclasses.replace(columns, numbers=numbers, label_end=label_end)


@contextlib.contextmanager
def writing() -> Generator[None]:
    """Says where it was written to when the disk is full, or the folder not to be written."""
    try:
        yield
    except OSError as error:
        raise CandidatesError(
            f"What was read of the files cannot be kept in {tempfile.gettempdir()}: {error}. Make room there, or set "
            "TMPDIR in the environment to a folder with room; it takes about as much as the files unpacked."
        ) from error


def locked_folder() -> tuple[str, FileLock]:
    """A new folder, and the lock on it that goes with this process, however that ends."""
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX)
        lock = FileLock(os.path.join(folder, LOCK), thread_local=False)
        with contextlib.suppress(FileNotFoundError):  # another process took it for a dead one's, before it was locked
            lock.acquire()
            if os.path.exists(lock.lock_file):
                return folder, lock
        lock.release()


def remove_those_of_the_killed(mine: str) -> None:
    """Of folders that are this user's alone: another's may be a link to anywhere."""
    owner, own = os.stat(mine).st_uid, os.path.basename(mine)
    for entry in os.scandir(tempfile.gettempdir()):
        if entry.name.startswith(PREFIX) and entry.name != own and entry.is_dir(follow_symlinks=False):
            lock = os.path.join(entry.path, LOCK)
            with contextlib.suppress(Timeout, OSError):  # in use, or gone by now
                if entry.stat(follow_symlinks=False).st_uid == owner and os.path.exists(lock):
                    with FileLock(lock, timeout=0, thread_local=False):
                        shutil.rmtree(entry.path, ignore_errors=True)


def remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
