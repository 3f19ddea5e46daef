"""Files as rows of text, plain or gzip. Every complaint names file, line, column and value, and says what to do."""

import collections
import csv
import gzip
import hashlib
import io
import logging
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import (
    CHAIN_COLUMNS,
    COLUMNS,
    OPTIONAL_COLUMNS,
    QUOTED_COLUMNS,
    CandidatesError,
    printable,
    shown,
)

logger = logging.getLogger(__name__)

MAX_LINE = 1 << 20  # characters of a line: a file without line breaks must not fill the memory
WIDTH = "(row)"  # stands for a column where it is the number of fields that is wrong


class BadRow(CandidatesError):
    """A row, or a decision, that on_bad_rows="skip" may drop."""

    def __init__(self, path: str, line: int, column: str, value, reason: str):
        super().__init__(
            f"{path}, line {line}, column {column}: {shown(value)} {reason}. Correct the file, or drop such decisions "
            'whole with on_bad_rows="skip".'
        )
        self.line = line


class Cells(NamedTuple):
    """One row's text, and where it stands."""

    path: str
    line: int
    values: dict[str, str]

    def bad(self, column: str, reason: str) -> BadRow:
        return BadRow(self.path, self.line, column, self.values[column], reason)


class Hashed(io.RawIOBase):
    """A file's bytes, hashed as they are read."""

    def __init__(self, path: str):
        self.file, self.sha256 = open(path, "rb", buffering=0), hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.file.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def read_cells(path: str, options: CoveredCallCandidatesConfig, expected: str | None = None) -> Iterator[Cells]:
    """The rows of one CSV (plain or gzip, UTF-8 with or without BOM) as text."""
    try:
        with Hashed(path) as content, io.BufferedReader(content, MAX_LINE) as raw:
            text = decoded(path, raw)  # named, for it closes the file when it goes
            yield from cells_of(path, csv.reader(lines(path, text), strict=True), options)
            while raw.read(MAX_LINE):  # what follows the end of a gzip archive counts too
                pass
            if expected not in (None, content.sha256.hexdigest()):
                raise CandidatesError(f"{path} has changed while it was read. Load it again when it is whole.")
    except UnicodeDecodeError as error:
        raise CandidatesError(
            f"{path}, line {first_undecodable_line(path)}: {error.object[error.start : error.start + 1]!r} is not "
            "UTF-8. Save the file as CSV UTF-8."
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CandidatesError(f"{path}: the gzip archive is damaged ({error}). Copy or compress it again.") from None


def decoded(path: str, raw: "io.BufferedReader[Any]") -> io.TextIOWrapper:
    start = raw.peek(4)[:4]
    if start == b"PAR1":
        raise CandidatesError(f"{path} is a Parquet file, not a CSV. Export it as CSV, whatever its name ends in.")
    unpacked = gzip.GzipFile(fileobj=raw) if start[:2] == GZIP else raw
    return io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline="")


GZIP = b"\x1f\x8b"


def lines(path: str, text: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a text, none of which may fill the memory."""
    for number, line in enumerate(iter(lambda: text.readline(MAX_LINE), ""), start=1):
        if len(line) == MAX_LINE:
            raise CandidatesError(
                f"{path}, line {number} is longer than {MAX_LINE:,} characters: no CSV of a backtest. Export it again."
            )
        yield line


def first_undecodable_line(path: str) -> int:
    with open(path, "rb") as raw:
        unpacked = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == GZIP else raw
        for number, line in enumerate(iter(lambda: unpacked.readline(MAX_LINE), b""), start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number


def cells_of(path: str, reader, options: CoveredCallCandidatesConfig) -> Iterator[Cells]:
    rows = 0
    try:
        header = check_header(path, next(reader, None), options.context_columns)
        for line, values in numbered(reader):
            if not values:  # a blank line holds nothing to lose
                continue
            rows += 1
            if reader.line_num > line:
                check_quotes(path, line, header, values)
            if len(values) == len(header):
                yield Cells(path, line, NO_OPTIONAL | dict(zip(header, map(str.strip, values), strict=True)))
            else:
                yield Cells(path, line, {WIDTH: f"{len(values)} fields instead of {len(header)}"})
    except csv.Error as error:
        raise CandidatesError(
            f"{path}, line {reader.line_num}: not readable as CSV ({error}). An unclosed quote, here or above?"
        ) from None
    if not rows:
        raise CandidatesError(f"{path} holds a header and no row. Leave it out, or run the backtest again.")


NO_OPTIONAL = dict.fromkeys((*OPTIONAL_COLUMNS, *QUOTED_COLUMNS), "")


def numbered(reader) -> Iterator[tuple[int, list[str]]]:
    """The reader's rows with the line that each begins on; a quoted cell may span several."""
    line = reader.line_num + 1
    for values in reader:
        yield line, values
        line = reader.line_num + 1


def check_quotes(path: str, line: int, header: list[str], values: list[str]) -> None:
    """Raises CandidatesError if a quote has swallowed rows: as many commas as a row has, or fields that do not fit."""
    for name, value in zip([*header, *[WIDTH] * len(values)], values, strict=False):
        if "\n" in value or "\r" in value:
            if len(values) != len(header) or value.count(",") >= len(header) - 1:
                raise CandidatesError(
                    f"{path}, line {line}, column {name}: a quote begins here that takes in what follows, through the "
                    f"line {line + len(value.splitlines()) - 1}: {shown(value, 80)}. Remove the quote."
                )
            line += len(value.splitlines()) - 1


def check_header(path: str, header: list[str] | None, own: Sequence[str] = ()) -> list[str]:
    if not header:
        raise CandidatesError(f"{path} is empty. Leave it out, or run the backtest again.")
    header = [name.strip() for name in header]
    missing = [name for name in COLUMNS if name not in header and name not in OPTIONAL_COLUMNS]
    if missing:
        raise CandidatesError(
            f"{path}, line 1: column {', '.join(missing)} is missing; the header is {','.join(header)[:300]!r}. "
            f"A candidate file has the columns {','.join(COLUMNS)}."
        )
    missing = [name for name in own if name not in header]
    if missing:
        raise CandidatesError(
            f"{path}, line 1: there is no column {missing[0]!r}, which context_columns names; the header is "
            f"{','.join(header)[:300]!r}."
        )
    known = (*COLUMNS, *QUOTED_COLUMNS, *CHAIN_COLUMNS, *own)
    twice = [name for name, count in collections.Counter(header).items() if count > 1 and name in known]
    if twice:
        raise CandidatesError(f"{path}, line 1: column {', '.join(twice)} stands twice. Remove one of the two.")
    lacking = [name for name in OPTIONAL_COLUMNS if name not in header]
    if lacking:
        logger.warning("%s: column(s) %s are missing, and null.", path, ", ".join(lacking))
    extra = [name for name in header if name not in known]
    if extra:
        logger.warning("%s: column(s) %s are not known and not used.", path, printable(", ".join(extra), 300))
    return header
