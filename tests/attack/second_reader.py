"""What a candidate file says: the rules of docs/reliability.md once more, sharing nothing with the project's reader.

Short, slow and strict: a file that breaks none of its rules is no fault, however unlikely its numbers.
"""

import collections
import csv
import datetime
import gzip
import io
import itertools
import math
import re
from typing import NamedTuple

from conftest import COLUMNS

NAMES = ("underlying", "exit_style", "instrument")
FEATURES = ("strike", "dte", "delta", "score", "iv", "ivrv_ratio")
OUTCOMES = ("reward", "pnl_vs_hodl", "max_drawdown_pct")
MAY_BE_MISSING = ("strategy", "max_drawdown_pct")
MAY_BE_BLANK = ("iv", "ivrv_ratio", *OUTCOMES)
RANGES = {"spot": (0, math.inf), "strike": (0, math.inf), "dte": (0, 36_500), "delta": (-1, 1), "iv": (0, 5)}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1}
# What chat formats take for a token of their own, in any case: <|end|>, <s>, </s>, [INST], <<SYS>>, <start_of_turn>.
CONTROL = re.compile(r"<\|.*\|>|<\|?/?[a-z_]+\|?>|\[/?[A-Z_]+\]|<<|>>", re.IGNORECASE)
LONGEST_NAME = 100
RARE = 1000  # in a file of so many rows, a name that one row has is a slip


class Faulty(Exception):
    """The file breaks a rule."""


class Unreadable(Faulty):
    """A rule of files, so that no line is to blame."""


class Said(NamedTuple):
    """A decision as the file says it: candidates by name, with their numbers, outcomes and whether it was sold."""

    spot: float
    candidates: tuple[tuple, ...]


def understand(content: bytes, filters: dict[str, str] | None = None) -> dict[tuple, Said | None]:
    """The decisions of a file by time, underlying and exit style; raises Faulty where it breaks a rule.

    Of what the filters leave out only the key must be right; the decision is None.
    """
    rows = [parse(cells, filters or {}) for cells in read(content)]
    runs = [(key, list(run)) for key, run in itertools.groupby(rows, key=lambda row: row[0])]
    together = collections.defaultdict(list)
    for key, run in runs:
        together[key] += run
    split = len(runs) - len(together)
    if split and split < shuffled(together) / 2:
        raise Faulty("a decision in pieces")
    check_rare(rows)
    return {key: decide([row for _, row in run]) if run[0][1] else None for key, run in together.items()}


def shuffled(together: dict) -> float:
    """How often a row of another decision would come between, were the rows in any order."""
    total = sum(map(len, together.values()))
    return sum((len(run) - 1) * (1 - (len(run) - 1) / max(1, total - 1)) for run in together.values())


def check_rare(rows: list[tuple]) -> None:
    for place in (1, 2):
        counts = collections.Counter(key[place] for key, _ in rows)
        if len(rows) >= RARE and min(counts.values()) == 1:
            raise Faulty("a name that one row has")


def read(content: bytes) -> list[dict[str, str]]:
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        table = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True) if row]
    except Exception as error:  # whatever it is, nothing can be read
        raise Unreadable(str(error)) from None
    if len(table) < 2:
        raise Unreadable("no row")
    header = [name.strip() for name in table[0]]
    if any(header.count(name) != 1 and (name in header or name not in MAY_BE_MISSING) for name in COLUMNS):
        raise Unreadable("the header")
    if any(len(row) != len(header) for row in table) or any(
        "\n" in cell or "\r" in cell for row in table for cell in row
    ):
        raise Faulty("a row that does not fit the header")
    blank = dict.fromkeys(MAY_BE_MISSING, "")
    return [blank | {name: cell.strip() for name, cell in zip(header, row, strict=True)} for row in table[1:]]


def parse(cells: dict[str, str], filters: dict[str, str]) -> tuple[tuple, dict | None]:
    """A row's key, and the rest of it; None if the filters leave it out."""
    key = (moment(cells["decision_time"]), name_in(cells, "underlying"), name_in(cells, "exit_style"))
    wanted = all(cells[name] == value for name, value in filters.items())
    return key, numbers_of(cells) if wanted else None


def name_in(cells: dict[str, str], column: str) -> str:
    text = cells[column]
    if not text or not text.isprintable() or "|" in text or len(text) > LONGEST_NAME or CONTROL.search(text):
        raise Faulty(f"{column} {text!r}")
    return text


def numbers_of(cells: dict[str, str]) -> dict:
    placeholder = cells["instrument"] == "NO_CANDIDATES"
    blank = (*MAY_BE_BLANK, *FEATURES) if placeholder else MAY_BE_BLANK
    row = {name: number(name, cells[name], name in blank) for name in ("spot", *FEATURES, *OUTCOMES)}
    row |= {name: FLAGS.get(cells[name]) for name in ("trade_executed", "chosen")}
    row["instrument"] = name_in(cells, "instrument")
    if None in (row["trade_executed"], row["chosen"]):
        raise Faulty("a flag")
    if cells["action"] != ("SELL_CALL" if row["chosen"] else "SKIP") or row["chosen"] > row["trade_executed"]:
        raise Faulty("the action")
    if placeholder and (row["trade_executed"] or any(row[name] for name in FEATURES)):
        raise Faulty("a placeholder with numbers")
    if not placeholder and (row["strike"] == 0 or row["spot"] == 0 or row["instrument"].upper().endswith("-P")):
        raise Faulty("no call")
    return row


def moment(text: str) -> datetime.datetime:
    try:
        found = datetime.datetime.fromisoformat(text)
        found = found.replace(tzinfo=datetime.UTC) if found.tzinfo is None else found.astimezone(datetime.UTC)
        found + datetime.timedelta(days=36_500)
        return found
    except (ValueError, OverflowError):
        raise Faulty(f"time {text!r}") from None


def number(name: str, text: str, blank: bool) -> float | None:
    if blank and text.lower() in ("", "nan", "+nan", "-nan"):
        return None
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if not NUMBER.fullmatch(text) or not low <= float(text) <= high or math.isinf(float(text)):
        raise Faulty(f"{name} {text!r}")
    return float(text)


def decide(rows: list[dict]) -> Said:
    """A decision from its rows, which must not contradict each other."""
    sold = sum(row["chosen"] for row in rows)
    instruments = {row["instrument"] for row in rows}
    if len({(row["spot"], row["trade_executed"]) for row in rows}) > 1 or sold != rows[0]["trade_executed"]:
        raise Faulty("a contradiction")
    if len(instruments) < len(rows) or ("NO_CANDIDATES" in instruments and len(rows) > 1):
        raise Faulty("a candidate twice")
    names = ("instrument", *FEATURES, *OUTCOMES, "chosen")
    candidates = (tuple(row[name] for name in names) for row in rows if row["instrument"] != "NO_CANDIDATES")
    return Said(rows[0]["spot"], tuple(sorted(candidates, key=lambda candidate: candidate[0])))
