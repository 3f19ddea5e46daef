"""Files as columns of text and numbers, a block at a time. What the csv module might read otherwise is doubted."""

import codecs
import contextlib
import csv
import datetime
import gzip
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from datasets.utils import tqdm

from covered_call.candidates.columns import LOGGED, STATE, microseconds
from covered_call.candidates.csv_rows import GZIP, Hashed, check_quotes, numbered
from covered_call.candidates.schema import (
    KEY,
    OPTIONAL_COLUMNS,
    QUOTED_COLUMNS,
    CandidatesError,
    iso_time,
    utc,
    wrong_name,
)

BLOCK = 1 << 22  # bytes that are parsed at once
LONGEST = 1 << 16  # bytes of a line: far below what the csv module takes for a field
WORDS = ("decision_time", "underlying", "spot", "instrument", "exit_style", "trade_executed", "chosen", "action")
READ_NUMBERS = (*STATE, *LOGGED)
PLAIN_TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$"  # which Arrow reads as Python does
PLAIN_WORD = r"^[!-~](?:[ -~]*[!-~])?$"  # of ASCII alone, for Python's blanks are more than Arrow's
QUOTED_CELL = re.compile(rb'(?:^|(?<=[,\n]))"[^"\r\n]*"(?=[,\r\n]|$)')


class Doubt(Exception):
    """What a file holds is not certainly good; the text says what, for whoever wonders why a file is read slowly."""


class OpenQuote(Doubt):
    """A block ends within a quoted cell."""


class Rows(NamedTuple):
    """The rows of a block, R of them in D decisions; texts as places among the distinct ones."""

    time: np.ndarray  # (R,) int64
    codes: dict[str, np.ndarray]  # (R,) of WORDS
    words: dict[str, list[str]]  # the distinct texts of each
    numbers: dict[str, np.ndarray]  # (R,) float64, NaN where blank
    spot: np.ndarray  # (R,) float64
    starts: np.ndarray  # (D,) the first row of each decision
    no_offset: np.ndarray  # (R,) bool: a time that is taken for UTC


def blocks_of(path: str, expected: str | None) -> Iterator[bytes]:
    """The first line, and then the rest in blocks."""
    with contextlib.ExitStack() as stack:
        content = stack.enter_context(Hashed(path))
        raw = stack.enter_context(io.BufferedReader(content, BLOCK))
        file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == GZIP else raw
        yield file.readline(LONGEST)
        bar = tqdm(desc=os.path.basename(path), unit="B", unit_scale=True, disable=None, leave=False)
        stack.enter_context(bar)
        while block := file.read(BLOCK):
            bar.update(len(block))
            yield block
        while raw.read(BLOCK):  # what follows the end of a gzip archive counts too
            pass
        if expected not in (None, content.sha256.hexdigest()):
            raise Doubt("the file has changed")


def whole_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if end:
            yield rest + block[:end]
            rest = b""
        rest += block[end:]
        if len(rest) > LONGEST:
            raise Doubt("a long line")
    if rest:
        yield rest


def header_of(line: bytes, own: Sequence[str] = ()) -> list[str]:
    if not line.endswith(b"\n"):
        raise Doubt("the header")
    certain_lines(line.removeprefix(codecs.BOM_UTF8))
    text = line.decode("utf-8-sig")
    header = [name.strip() for name in next(csv.reader([text]))]
    needed = [*KEY, *WORDS, *READ_NUMBERS, *own]
    missing = [name for name in needed if name not in (*header, *OPTIONAL_COLUMNS, *QUOTED_COLUMNS)]
    if len(set(header)) < len(header) or missing:
        raise Doubt("the header")
    return header


def certain_lines(block: bytes) -> None:
    """Raises Doubt unless all parsers agree on where cells of these lines begin and end."""
    if b"\0" in block or (b"\r" in block and block.count(b"\r") != block.count(b"\r\n")):
        raise Doubt("a line end")
    if not block.isascii():
        block.decode("utf-8")
    if b'"' in block and block.count(b'"') != 2 * sum(1 for _ in QUOTED_CELL.finditer(block)):
        raise Doubt("a quote")
    half = LONGEST // 2
    if any(block.find(b"\n", start, start + half) < 0 for start in range(0, len(block) - half, half)):
        raise Doubt("a long line")


def read_block(block: bytes, header: list[str], own: Sequence[str] = ()) -> tuple[bytes, pa.Table, Rows]:
    """The rows of whole lines, and the lines: written anew where they are not certainly understood as they are.

    Args:
        own: numeric columns of the user's, which are read too.

    Raises:
        OpenQuote: where the last row may go on in the lines that follow.
        Doubt or pa.ArrowInvalid: where the row parser may not take them, either.
    """
    try:
        table = parse(block, header, own)
        return block, table, rows_of(table)
    except (Doubt, pa.ArrowInvalid):
        block = plainly_written(block, header, (*READ_NUMBERS, *own))
        table = parse(block, header, own)
        return block, table, rows_of(table)


def plainly_written(block: bytes, header: list[str], numbers: Sequence[str]) -> bytes:
    """The same rows in one way of writing: each cell as the row parser understands it, on the line that its row begins
    on, and nothing in the columns that are not read. What it might complain of is doubted."""
    if b"\0" in block or block.count(b"\r") != block.count(b"\r\n"):
        raise Doubt("a line end")
    if any(len(line) > LONGEST for line in block.split(b"\n")):
        raise Doubt("a long line")
    reader, lines = csv.reader(io.StringIO(block.decode("utf-8"), newline=""), strict=True), []
    try:
        for line, values in numbered(reader):
            if values and len(values) != len(header):
                raise Doubt("fields that do not fit the header")
            if reader.line_num > line:
                check_quotes("", line, header, values)
            cells = (
                plain_cell(name, text.strip(), name in numbers) for name, text in zip(header, values, strict=False)
            )
            lines += [",".join(cells), *[""] * (reader.line_num - line)]
    except CandidatesError as error:
        raise Doubt("a quote") from error
    except csv.Error as error:
        raise (OpenQuote if reader.line_num == block.count(b"\n") else Doubt)(str(error)) from error
    return "\n".join([*lines, ""]).encode()


def plain_cell(name: str, text: str, number_is_read: bool) -> str:
    if name in WORDS:
        if any(one in text for one in '"\r\n'):
            raise Doubt(f"{name}: a quote or a line end")
        return f'"{text}"' if "," in text else text  # of spots the text counts, too
    if not number_is_read or not text:
        return ""
    if "_" in text or not text.isascii():  # see reading.parse_number
        raise Doubt(f"{name}: no number")
    try:
        number = float(text)
    except ValueError:
        raise Doubt(f"{name}: no number") from None
    return "" if math.isnan(number) else repr(number)


def parse(block: bytes, header: list[str], own: Sequence[str] = ()) -> pa.Table:
    """The columns that are read, texts as dictionaries; ArrowInvalid where a number is none."""
    certain_lines(block)
    words = {name: pa.dictionary(pa.int32(), pa.string()) for name in WORDS}
    read = [name for name in (*READ_NUMBERS, *own) if name in header]
    with pacsv.open_csv(  # which reads here, where read_csv waits for a thread: longer than a small file takes
        pa.BufferReader(block),
        pacsv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=header),
        pacsv.ParseOptions(newlines_in_values=False),
        pacsv.ConvertOptions(
            column_types=words | dict.fromkeys(read, pa.float64()),
            include_columns=[*WORDS, *read],
            null_values=["", "nan", "NaN"],
        ),
    ) as reader:
        return reader.read_all()


def rows_of(table: pa.Table) -> Rows:
    read = [name for name in table.column_names if name not in WORDS]
    columns = {name: table.column(name).combine_chunks() for name in (*WORDS, *read)}
    codes = {name: columns[name].indices.to_numpy() for name in WORDS}
    texts = {name: columns[name].dictionary.to_pylist() for name in WORDS}
    for name in WORDS:
        if columns[name].null_count or have_blanks_around(columns[name].dictionary):
            raise Doubt(f"{name}: blank, or spaces around it")
    numbers = {name: floats_of(columns[name], name) for name in read}
    numbers |= {name: np.full(len(table), np.nan) for name in READ_NUMBERS if name not in read}
    times, local = times_in(columns["decision_time"].dictionary)
    time, no_offset = times[codes["decision_time"]], local[codes["decision_time"]]
    spot = floats_of(columns["spot"].dictionary.cast(pa.float64()), "spot")[codes["spot"]]
    for name in ("underlying", "exit_style"):
        if any(wrong_name(text) for text in texts[name]):
            raise Doubt(f"{name}: no name")
    parts = (time, codes["underlying"], codes["exit_style"])
    new = np.logical_or.reduce([part[1:] != part[:-1] for part in parts])
    return Rows(time, codes, texts, numbers, spot, np.concatenate([[0], np.flatnonzero(new) + 1]), no_offset)


def have_blanks_around(texts: pa.StringArray) -> bool:
    if pc.all(pc.match_substring_regex(texts, PLAIN_WORD)).as_py():
        return False
    return any(text != text.strip() for text in texts.to_pylist())


def times_in(texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """(K,) int64 microseconds since 1970, UTC, and (K,) bool: which of them have no offset."""
    if pc.all(pc.match_substring_regex(texts, PLAIN_TIME)).as_py() and len(texts):
        times = pc.utf8_slice_codeunits(texts, 0, 19).cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
        for place in (times.argmin(), times.argmax()):  # at the ends of the calendar
            time_in(texts[place].as_py())
        return times, np.zeros(len(times), bool)
    found = [time_in(text) for text in texts.to_pylist()]
    local = [time.tzinfo is None for time in found]
    return np.array([microseconds(utc(time)) for time in found], np.int64), np.array(local, bool)


def time_in(text: str) -> datetime.datetime:
    time = iso_time(text)
    if time is None:
        raise Doubt("decision_time: no time")
    return time


def floats_of(column: pa.Array, name: str) -> np.ndarray:
    """(R,) float64, NaN where blank. Arrow takes more words for NaN than Python does: those that are left are one."""
    values = column.to_numpy(zero_copy_only=False)
    if np.count_nonzero(np.isnan(values)) != column.null_count:
        raise Doubt(f"{name}: NaN")
    return values


def chosen_rows(rows: Rows, mask: np.ndarray, sizes: np.ndarray) -> Rows:
    """Those of a mask, or at these places, in decisions of these sizes."""
    return Rows(
        rows.time[mask],
        {name: codes[mask] for name, codes in rows.codes.items()},
        rows.words,
        {name: values[mask] for name, values in rows.numbers.items()},
        rows.spot[mask],
        np.cumsum(sizes) - sizes,
        rows.no_offset[mask],
    )


def first_rows(rows: Rows, count: int) -> Rows:
    return chosen_rows(rows, np.arange(len(rows.time)) < count, np.diff(rows.starts))


def start_of_last(block: bytes, rows: int) -> int:
    """Where the last so many rows of a block begin; blank lines are none."""
    place = len(block)
    for _ in range(rows):
        while True:
            end, place = place, block.rfind(b"\n", 0, place - 1) + 1
            if block[place:end].strip(b"\r\n"):
                break
    return place


def line_of(block: bytes, row: int) -> int:
    """The number of a row's line among the block's, from 1."""
    full = (number for number, line in enumerate(block.split(b"\n"), start=1) if line.strip(b"\r"))
    return next(number for place, number in enumerate(full) if place == row)


def lines_in(block: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n")))
