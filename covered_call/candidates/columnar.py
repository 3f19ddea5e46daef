"""Files as columns: the fast way, which takes only what is certainly good. All else is for the row parser to explain.

Every rule here is one of reading.py, csv_rows.py or strays.py, over arrays: where it might be broken, Doubt is raised,
and the file is read again row by row. A block that is only written in an odd way is written anew, and alone, before.
"""

import array
import collections
import contextlib
import csv
import itertools
import zlib
from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from covered_call.candidates.columns import (
    DAY,
    OUTCOME_DAYS,
    RECORDED,
    STATE,
    Columns,
    ascend,
    microseconds,
    timedelta_of,
)
from covered_call.candidates.csv_blocks import (
    BLOCK,
    READ_NUMBERS,
    Doubt,
    OpenQuote,
    Rows,
    blocks_of,
    chosen_rows,
    first_rows,
    header_of,
    line_of,
    lines_in,
    read_block,
    rows_of,
    start_of_last,
    whole_lines,
)
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import (
    ABOVE_ZERO,
    FLAGS,
    MAX_DTE,
    MAY_LACK,
    NO_CANDIDATES,
    NUMBERS,
    SELL_CALL,
    SKIP,
    named_call,
    wrong_instrument,
    wrong_name,
)
from covered_call.candidates.strays import BESIDE_ONE, are_slips, is_together


class InPieces(Doubt):
    """Rows of one decision stand apart."""


class Said(NamedTuple):
    """What is to be said of a file once it is taken: its header, the line of the first time without an offset (None
    if there is none), and how many rows each underlying and each exit style has."""

    header: list[str]
    no_offset: int | None
    rows: dict[str, collections.Counter]


def scan(
    path: str, options: CoveredCallCandidatesConfig, expected: str | None, take: Callable[[Columns], None]
) -> Said:
    """Gives the file's decisions that pass the filters to ``take``, a block at a time and in the file's order.

    Raises:
        InPieces: where the rows of a decision do not stand together: scan_in_pieces may read such a file.
        Doubt: for anything else that is not certainly good; what was taken in before is not to be kept.
    """
    with doubted():
        blocks = blocks_of(path, expected)
        state, left = State(options, header_of(next(blocks), options.context_columns)), b""
        for block, following in itertools.pairwise(itertools.chain(whole_lines(blocks), [b""])):
            left = state.take_in(left + block, take, last=not following)
        state.check_whole_file()
        state.check_neighbours()
    return Said(state.header, state.no_offset, state.rows)


def scan_in_pieces(
    path: str, options: CoveredCallCandidatesConfig, expected: str | None, take: Callable[[Columns], None]
) -> Said:
    """The same for a file in which nothing follows from where a row stands; it is in memory as a whole.

    Raises:
        Doubt: for a file in which decisions stand together but for some, and for all that is not certainly good.
    """
    with doubted():
        blocks = blocks_of(path, expected)
        state, tables = State(options, header_of(next(blocks), options.context_columns)), []
        for block in whole_lines(blocks):
            if block and not block.isspace():
                block, table, rows = read_block(block, state.header, options.context_columns)
                tables.append(table)
                state.look_at_offsets(block, rows)
            state.lines += lines_in(block)
        if not tables:
            raise Doubt("no row")
        rows = together(rows_of(pa.concat_tables(tables).unify_dictionaries()))
        state.note(rows)
        columns = state.columns(rows)
        if len(columns):
            take(columns)
        state.check_whole_file()
    return Said(state.header, state.no_offset, state.rows)


@contextlib.contextmanager
def doubted() -> Generator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise Doubt(str(error)) from error


class State:
    """What is known of a file while it is read."""

    def __init__(self, options: CoveredCallCandidatesConfig, header: list[str]):
        self.options, self.header = options, header
        self.lines = 1  # that are taken in
        self.no_offset: int | None = None
        self.rows = {"underlying": collections.Counter(), "exit_style": collections.Counter()}
        self.names: dict[str, int] = {}
        self.keys = [array.array(kind) for kind in "qii"]  # of each decision time, underlying and exit style
        self.named = self.misnamed = 0  # rows whose instrument's name says what it is, and those that contradict it
        self.last: tuple[str, int, bool] | None = None  # of the last decision its spot, its size, and if it is alone
        self.runs = self.sharing = 0  # decisions, and pairs of neighbours with one spot
        self.many_share = self.lone = False

    def take_in(self, block: bytes, take: Callable[[Columns], None], last: bool) -> bytes:
        """Takes in whole lines, but for a last decision or a quote that may go on: that is left, and returned."""
        if not block or block.isspace():
            self.lines += lines_in(block)
            return b""
        try:
            (block, _, rows), left = read_block(block, self.header, self.options.context_columns), b""
        except OpenQuote:
            if last or len(block) > 8 * BLOCK:
                raise
            return block
        if not last:
            if len(block) > 8 * BLOCK:
                raise Doubt("a decision of very many rows")
            end = rows.starts[-1]
            cut = start_of_last(block, len(rows.time) - end)
            block, left, rows = block[:cut], block[cut:], first_rows(rows, end)
        if len(rows.time):
            self.look_at_offsets(block, rows)
            self.note(rows)
            self.note_spots(rows)
            columns = self.columns(rows)
            if len(columns):
                take(columns)
        self.lines += lines_in(block)
        return left

    def look_at_offsets(self, block: bytes, rows: Rows) -> None:
        if self.no_offset is None and rows.no_offset.any():
            self.no_offset = self.lines + line_of(block, int(np.argmax(rows.no_offset)))

    def note(self, rows: Rows) -> None:
        """Takes down what is judged of the file as a whole."""
        for name, counts in self.rows.items():
            found = np.bincount(rows.codes[name], minlength=len(rows.words[name])).tolist()
            counts.update({text: count for text, count in zip(rows.words[name], found, strict=True) if count})
        codes = [self.codes(rows.words[name])[rows.codes[name][rows.starts]] for name in ("underlying", "exit_style")]
        key = (rows.time[rows.starts], *codes)
        for known, values in zip(self.keys, key, strict=True):
            known.frombytes(values.tobytes())
        if repeats(key):
            raise InPieces("a decision in pieces")
        spots = rows.codes["spot"]
        if (spots != np.repeat(spots[rows.starts], np.diff(rows.starts, append=len(spots)))).any():
            raise Doubt("two spots in a decision")

    def codes(self, texts: list[str]) -> np.ndarray:
        return np.array([self.names.setdefault(text, len(self.names)) for text in texts], np.int32)

    def note_spots(self, rows: Rows) -> None:
        """Neighbours with one spot may hold each other's rows."""
        spots, sizes = rows.codes["spot"][rows.starts], np.diff(rows.starts, append=len(rows.time))
        placeholder = np.array([text == NO_CANDIDATES for text in rows.words["instrument"]])
        alone = (sizes == 1) & ~placeholder[rows.codes["instrument"][rows.starts]]
        share = spots[1:] == spots[:-1]
        texts = rows.words["spot"]
        if self.last is not None:
            before, size, single = self.last
            same = before == texts[spots[0]]
            self.sharing += same
            self.many_share |= bool(same and min(size, sizes[0]) > 1)
            self.lone |= bool(same and (single or alone[0]))
        self.runs, self.sharing = self.runs + len(sizes), self.sharing + int(share.sum())
        self.many_share |= bool((share & (np.minimum(sizes[1:], sizes[:-1]) > 1)).any())
        self.lone |= bool((share & (alone[1:] | alone[:-1])).any())
        self.last = (texts[spots[-1]], int(sizes[-1]), bool(alone[-1]))

    def columns(self, rows: Rows) -> Columns:
        """Those decisions that pass the filters, each row of which is good."""
        sizes = np.diff(rows.starts, append=len(rows.time))
        wanted = np.ones(len(sizes), bool)
        for name in ("underlying", "exit_style"):
            asked = getattr(self.options, name)
            if asked is not None:
                wanted &= (np.array(rows.words[name]) == asked)[rows.codes[name][rows.starts]]
        if not wanted.all():
            rows, sizes = chosen_rows(rows, np.repeat(wanted, sizes), sizes[wanted]), sizes[wanted]
        if not len(sizes):
            return EMPTY
        placeholder = np.array([text == NO_CANDIDATES for text in rows.words["instrument"]])[rows.codes["instrument"]]
        self.check_names(rows, placeholder)
        check_numbers(rows, placeholder, self.options)
        chosen = check_choice(rows, sizes, placeholder)
        self.count_misnamed(rows, ~placeholder)
        underlying, exit_style = (
            self.codes(rows.words[name])[rows.codes[name][rows.starts]] for name in ("underlying", "exit_style")
        )
        left = ~placeholder
        sizes = np.where(placeholder[rows.starts], 0, sizes)
        return Columns(
            tuple(self.names), underlying, exit_style, rows.time[rows.starts], rows.spot[rows.starts], chosen,
            np.concatenate([[0], np.cumsum(sizes)]),
            pa.array(rows.words["instrument"], pa.string()).take(pa.array(rows.codes["instrument"][left])),
            {name: rows.numbers[name][left] for name in READ_NUMBERS},
            np.zeros(left.sum(), np.int64),
            self.own_of(rows),
        )  # fmt: skip

    def own_of(self, rows: Rows) -> dict[str, np.ndarray]:
        """(D,) each: the user's own columns, which have one number a decision."""
        found, sizes = {}, np.diff(rows.starts, append=len(rows.time))
        for name in self.options.context_columns:
            values = rows.numbers[name]
            found[name] = values[rows.starts]
            same = np.array_equal(values, np.repeat(found[name], sizes), equal_nan=True)
            if np.isinf(values).any() or not same:
                raise Doubt(f"{name}: not finite, or two in a decision")
        return found

    def check_names(self, rows: Rows, placeholder: np.ndarray) -> None:
        used = np.unique(rows.codes["instrument"][~placeholder])
        for name in (rows.words["instrument"][code] for code in used):
            if wrong_name(name) or wrong_instrument(name):
                raise Doubt("instrument: no name of a call")

    def count_misnamed(self, rows: Rows, candidates: np.ndarray) -> None:
        names = rows.words["instrument"]
        parts = [named_call(text) for text in names]
        codes, upper = rows.codes["instrument"][candidates], [text.upper() for text in rows.words["underlying"]]
        says = np.array([part is not None for part in parts])[codes]
        strikes = np.array([part[1] if part else np.nan for part in parts])[codes]
        expiries = np.array([microseconds(part[2]) if part else 0 for part in parts], np.int64)[codes]
        owner = np.array([place_of(text, part, upper) for text, part in zip(names, parts, strict=True)])[codes]
        # Two names may differ in their case alone: the first of them stands for both.
        whose = np.array([upper.index(text) for text in upper])[rows.codes["underlying"][candidates]]
        expiry = rows.time[candidates] + timedelta_of(rows.numbers["dte"][candidates])
        right = (owner == whose) & (strikes == rows.numbers["strike"][candidates])
        right &= np.abs(expiries - expiry) <= DAY
        self.named += int(says.sum())
        self.misnamed += int((says & ~right).sum())

    def check_whole_file(self) -> None:
        """What strays.py would find in a file whose rows are good one by one."""
        if not len(self.keys[0]):
            raise Doubt("no row")
        for counts in self.rows.values():
            if max(counts.values()) >= BESIDE_ONE and min(counts.values()) == 1:
                raise Doubt("a name on one row alone")
        if are_slips(self.misnamed, self.named):
            raise Doubt("a row that contradicts its instrument's name")

    def check_neighbours(self) -> None:
        """The same of where its rows stand."""
        if self.lone and not self.many_share and self.runs - self.sharing >= BESIDE_ONE:
            raise Doubt("a decision of one row with its neighbour's spot")
        if repeats(tuple(map(np.asarray, self.keys))):
            raise InPieces("a decision in pieces")


def place_of(instrument: str, named: tuple | None, underlyings: list[str]) -> int:
    """Of the underlying that an instrument's own name says, -1 for none: BTC_USDC, or else BTC."""
    whose = (instrument.partition("-")[0], named[0]) if named else ()
    return next((underlyings.index(one) for one in whose if one in underlyings), -1)


def repeats(key: tuple[np.ndarray, ...]) -> bool:
    """Whether two of some decisions, of which this is time, underlying and exit style, are the same."""
    if ascend(key[0]):
        return False
    order = np.lexsort(key)
    return bool(np.logical_and.reduce([part[order][1:] == part[order][:-1] for part in key]).any())


def together(rows: Rows) -> Rows:
    """The rows of each decision side by side, decisions by their first row.

    Raises:
        Doubt: where some stand together, see strays.are_scattered.
    """
    key = (rows.codes["exit_style"], rows.codes["underlying"], rows.time)
    order = np.lexsort(key)
    new = np.concatenate([[True], np.logical_or.reduce([part[order][1:] != part[order][:-1] for part in key])])
    first = order[np.flatnonzero(new)]  # lexsort keeps the order of equals
    its = np.empty(len(order), np.int64)
    its[order] = first[np.cumsum(new) - 1]  # of each row its decision's first
    runs = np.flatnonzero(np.diff(its, prepend=-1))
    pieces, sizes = np.bincount(its[runs]), np.bincount(its)
    split, whole = int((pieces > 1).sum()), int(((pieces == 1) & (sizes > 1)).sum())
    if is_together(split, whole, len(runs), len(first)):
        raise Doubt("some decisions in pieces, where others are not")
    starts = np.flatnonzero(np.diff(np.sort(its), prepend=-1))
    return chosen_rows(rows, np.argsort(its, kind="stable"), np.diff(starts, append=len(its)))


EMPTY = Columns((), *(np.zeros(0, kind) for kind in "iiqdi"), offsets=np.zeros(1, np.int64),
    instrument=pa.array([], pa.string()), numbers={}, label_end=np.zeros(0, np.int64))  # fmt: skip


def check_numbers(rows: Rows, placeholder: np.ndarray, options: CoveredCallCandidatesConfig) -> None:
    """Raises Doubt for a number that its column does not take."""
    for name in STATE:
        values, (low, high) = rows.numbers[name], NUMBERS[name]
        good = (values >= low) & (values <= (options.max_iv if name == "iv" else high)) & np.isfinite(values)
        if name in ABOVE_ZERO:
            good &= values != 0
        blank = np.isnan(values)
        good |= blank if name in MAY_LACK else blank & placeholder
        good = np.where(placeholder, (blank | (values == 0)) if name == "strike" else good | (values == 0), good)
        if not good.all():
            raise Doubt(f"{name}: outside its limits")
    for name in RECORDED:
        if np.isinf(rows.numbers[name]).any():
            raise Doubt(f"{name}: not finite")
    days = rows.numbers[OUTCOME_DAYS]
    if not (np.isnan(days) | ((days >= 0) & (days <= MAX_DTE))).all():
        raise Doubt(f"{OUTCOME_DAYS}: outside its limits")
    if not (np.isfinite(rows.spot) & np.where(placeholder, rows.spot >= 0, rows.spot > 0)).all():
        raise Doubt("spot: outside its limits")


def check_choice(rows: Rows, sizes: np.ndarray, placeholder: np.ndarray) -> np.ndarray:
    """(D,) int32: the place of the row that was sold, -1 for no trade; Doubt where rows contradict each other."""
    traded, chosen = (flags_of(rows, name) for name in ("trade_executed", "chosen"))
    if any(text not in (SELL_CALL, SKIP) for text in rows.words["action"]):
        raise Doubt("action: neither of the two")
    sold = np.array([text == SELL_CALL for text in rows.words["action"]])[rows.codes["action"]]
    first = np.repeat(traded[rows.starts], sizes)
    count = np.add.reduceat(chosen, rows.starts)
    if (sold != chosen).any() or (traded != first).any() or (count > traded[rows.starts]).any():
        raise Doubt("chosen, action and trade_executed")
    if (count < traded[rows.starts]).any():
        raise InPieces("a trade of which the row that was sold does not stand with the others")
    if (placeholder & ((traded == 1) | (np.repeat(sizes, sizes) > 1))).any():
        raise Doubt(f"{NO_CANDIDATES} beside candidates, or sold")
    decision_of = np.repeat(np.arange(len(sizes)), sizes)
    pairs = decision_of * len(rows.words["instrument"]) + rows.codes["instrument"]
    if len(np.unique(pairs)) < len(pairs):
        raise Doubt("an instrument twice in a decision")
    found = np.full(len(sizes), -1, np.int32)
    its = np.flatnonzero(chosen)
    found[decision_of[its]] = its - rows.starts[decision_of[its]]
    return found


def flags_of(rows: Rows, name: str) -> np.ndarray:
    values = [FLAGS.get(text, -1) for text in rows.words[name]]
    if -1 in values:
        raise Doubt(f"{name}: neither 0 nor 1")
    return np.array(values)[rows.codes[name]]
