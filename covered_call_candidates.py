"""Chat datasets from the CSVs of a covered-call backtest: a Hugging Face Datasets loading script.

A backtest (the teacher) logs every call option it looked at and the one it sold. Two configs render those rows for
imitation, two for learning from outcomes, those of calls that were not sold included:

- ``per_candidate``: one chat a candidate, answered SELL_CALL or SKIP;
- ``per_decision_ranking``: one chat a decision, answered 1..N or NO_TRADE;
- ``preference``: the prompt of a ranking, the answer that brought more and one that brought less;
- ``q_values``: one row of numbers a candidate, with what selling it brought.

Load them with ``load_dataset("./covered_call_candidates.py", "per_candidate")`` on datasets 3.6, or on any
version with ``load_candidates("per_candidate")``. As a command, this file exports JSON lines.

The file is self-contained because ``datasets`` copies it, alone, into its module cache.
"""

import argparse
import bisect
import collections
import csv
import dataclasses
import datetime
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

if __name__ == "__main__" and importlib.util.find_spec("datasets") is None:
    sys.exit(
        f"error: {sys.executable} has no package datasets. `make run` sets up an environment with all of them in "
        f".venv: enter it with `source .venv/bin/activate`, or run .venv/bin/python {sys.argv[0]} ..."
    )

import datasets
import numpy as np
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.utils import tqdm
from scipy.special import ndtr

logger = logging.getLogger("covered_call_candidates")

# Read once, at import: the cache key must name the code that is running, not a later edit of the file.
with open(__file__, "rb") as _source:
    CODE_HASH = hashlib.sha256(_source.read()).hexdigest()

COLUMNS = (
    "decision_time", "underlying", "spot", "instrument", "strike", "dte", "delta", "score", "iv", "ivrv_ratio",
    "exit_style", "trade_executed", "chosen", "action", "strategy", "reward", "pnl_vs_hodl", "max_drawdown_pct",
)  # fmt: skip
OPTIONAL_COLUMNS = ("strategy", "max_drawdown_pct")  # of which nothing is decided: a file may be without them
CSV_PATTERNS = ("training_candidates_*.csv", "training_candidates_*.csv.gz")
NO_CANDIDATES = "NO_CANDIDATES"
SELL_CALL, SKIP, NO_TRADE = "SELL_CALL", "SKIP", "NO_TRADE"
MAX_DTE = 36_500  # days; a hundred years keeps the expiry a valid date
MAX_NAME = 100  # characters of an instrument, an underlying or an exit style
MAX_LINE = 1 << 20  # characters of a line: a file without line breaks must not fill the memory
WIDTH = "(row)"  # stands for a column where it is the number of fields that is wrong
SHARDS = 16  # a split's decisions are cut into this many parts, so that num_proc and data loader workers can share
UTC = datetime.UTC


# ---------------------------------------------------------------------------------------------------------------------
# What a decision is. State and outcome are separate types: a prompt is rendered from the state alone.


class Candidate(NamedTuple):
    """One call option as it stood at decision time: money in USD, dte in days, iv as a fraction a year."""

    instrument: str
    strike: float
    dte: float
    delta: float
    score: float
    iv: float | None
    ivrv_ratio: float | None


class Decision(NamedTuple):
    """All that a policy may know at one decision: the time (UTC), the market, and its candidates."""

    decision_time: datetime.datetime
    underlying: str
    exit_style: str
    spot: float
    candidates: tuple[Candidate, ...]

    @classmethod
    def from_dict(cls, state: dict, max_iv: float | None = None) -> "Decision":
        """A decision from JSON's types: ``decision_time`` is ISO 8601, ``candidates`` a list of dicts by column name.

        ``iv`` and ``ivrv_ratio`` may be missing or None; for ``max_iv`` see check_decision.

        Raises:
            CandidatesError: for a key that is missing or unknown, and for what check_decision refuses.
        """
        state = fields_of(cls, state, "the decision")
        time = state["decision_time"]
        text = time.isoformat() if isinstance(time, datetime.datetime) else time
        parsed = iso_time(text) if isinstance(text, str) else None
        if parsed is None:
            raise CandidatesError(f"decision_time: {shown(time)} {NO_TIME}.")
        rows = state["candidates"]
        if not isinstance(rows, (list, tuple)):
            raise CandidatesError(f"candidates: {shown(rows)} is no list of candidates.")
        known = [fields_of(Candidate, row, f"candidate {place}") for place, row in enumerate(rows, start=1)]
        candidates = tuple(Candidate(**fields) for fields in known)
        decision = cls(**state | {"decision_time": utc(parsed), "candidates": candidates})
        check_decision(decision, max_iv)
        return decision

    def to_dict(self) -> dict:
        """What from_dict takes, and json.dumps too."""
        candidates = [candidate._asdict() for candidate in self.candidates]
        return self._asdict() | {"decision_time": self.decision_time.isoformat(), "candidates": candidates}

    @property
    def decision_id(self) -> str:
        return f"{self.underlying}|{self.decision_time.isoformat()}|{self.exit_style}"

    @property
    def last_expiry(self) -> datetime.datetime:
        return self.decision_time + datetime.timedelta(days=max((c.dte for c in self.candidates), default=0.0))


class Outcome(NamedTuple):
    """What the file says of a candidate afterwards, in USD and percent; None where it is blank or NaN."""

    reward: float | None
    pnl_vs_hodl: float | None
    max_drawdown_pct: float | None


class Counterfactual(NamedTuple):
    """What selling a candidate would have brought, sold or not: P&L vs HODL in USD a unit of underlying, net of the
    costs that are set. None where unknown; ``label_end`` is the time of the last price it rests on."""

    pnl_vs_hodl: float | None
    label_end: datetime.datetime


class LoggedDecision(NamedTuple):
    """A decision with what the teacher did: ``chosen`` is an index into the candidates, None for no trade."""

    decision: Decision
    chosen: int | None
    outcomes: tuple[Outcome, ...]
    counterfactuals: tuple[Counterfactual, ...] = ()

    @property
    def label_end(self) -> datetime.datetime:
        return max(
            (counterfactual.label_end for counterfactual in self.counterfactuals), default=self.decision.last_expiry
        )


# ---------------------------------------------------------------------------------------------------------------------
# Prompts. Training, evaluation and a live policy all render through these functions.


def money(value: float | None, unit: str = "") -> str:
    return "n/a" if value is None else f"{value:.2f}{unit}"


def ratio(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


@functools.lru_cache(maxsize=4096)
def exact(strike: float) -> str:
    """The shortest decimal that is exactly this strike: 63000, 0.55."""
    return np.format_float_positional(strike, trim="-")


def days(dte: float) -> str:
    return str(int(dte)) if dte == int(dte) else f"{dte:.2f}"


def candidate_messages(decision: Decision, candidate: Candidate, hindsight: str = "") -> list[dict]:
    """System and user message that ask for SELL_CALL or SKIP on one candidate of a decision."""
    system = (
        f"You are an automated {decision.underlying} covered-call policy. For each candidate option, decide whether "
        "to SELL_CALL or SKIP based on the state. Do not use hindsight PnL to answer; treat it as teacher labels only."
    )
    user = (
        f"Decision time: {decision.decision_time.isoformat()}\n"
        f"Underlying: {decision.underlying}\n"
        f"Spot price: {money(decision.spot)}\n"
        f"Teacher policy (exit_style): {decision.exit_style}\n"
        f"Candidate option: {candidate.instrument}\n"
        f"  - Strike: {exact(candidate.strike)}\n"
        f"  - DTE (days): {days(candidate.dte)}\n"
        f"  - Delta: {ratio(candidate.delta)}\n"
        f"  - Score: {ratio(candidate.score)}\n"
        f"  - IV: {ratio(candidate.iv)}\n"
        f"  - IV/RV ratio: {ratio(candidate.ivrv_ratio)}\n"
        f"\n{hindsight}"
        "Question: Based only on the information available at decision time (ignore the realized outcome), what "
        "ACTION should the policy take on this candidate? Reply with exactly one token: SELL_CALL or SKIP."
    )
    return chat(system, user)


def ranking_messages(decision: Decision, hindsight: str = "") -> list[dict]:
    """System and user message that ask for 1..N or NO_TRADE over all N candidates, in the order given."""
    system = (
        f"You are an automated {decision.underlying} covered-call strategy. At each decision, you see multiple "
        "candidate options and may either pick exactly one to SELL_CALL or decide NO_TRADE. Choose the single best "
        "candidate index, imitating the teacher policy."
    )
    lines = [
        f"  [{index}] {c.instrument} — Strike: {exact(c.strike)}, DTE: {days(c.dte)}, Delta: {ratio(c.delta)}, "
        f"Score: {ratio(c.score)}\n"
        for index, c in enumerate(decision.candidates, start=1)
    ]
    user = (
        f"Decision time: {decision.decision_time.isoformat()}\n"
        f"Underlying: {decision.underlying}\n"
        f"Spot: {money(decision.spot)}\n"
        f"Teacher policy (exit_style): {decision.exit_style}\n"
        f"Candidates:\n{''.join(lines) or '  (none)' + chr(10)}"
        f"\n{hindsight}"
        "Question: Before seeing the outcome, which candidate index should the policy choose to SELL_CALL? Reply "
        f"with exactly one token: 1, 2, ..., {len(decision.candidates)}, or NO_TRADE."
    )
    return chat(system, user)


def admissible_answers(record: dict) -> list[str]:
    """What may be answered to a record of either config: SELL_CALL and SKIP, or 1..N and NO_TRADE."""
    if "candidates" in record:
        return [*map(str, range(1, len(record["candidates"]) + 1)), NO_TRADE]
    return [SELL_CALL, SKIP]


def candidate_hindsight(outcome: Outcome) -> str:
    """The outcome of a candidate as text. It names the answer: only for corpora that must match the teacher's."""
    return (
        "Risk snapshot (teacher hindsight):\n"
        f"  - Max drawdown on this chain: {money(outcome.max_drawdown_pct, '%')}\n"
        "\n"
        "PnL outcome for this candidate if chosen (teacher hindsight):\n"
        f"  - Reward (USD): {money(outcome.reward)}\n"
        f"  - PnL vs HODL (USD): {money(outcome.pnl_vs_hodl)}\n"
        "\n"
    )


def ranking_hindsight(index: int, outcome: Outcome) -> str:
    """The chosen index (1-based) and its outcome as text; the same warning holds."""
    return (
        "Outcome (teacher hindsight for the chosen candidate only):\n"
        f"  - Chosen candidate index: {index}\n"
        f"  - Reward (USD): {money(outcome.reward)}\n"
        f"  - PnL vs HODL (USD): {money(outcome.pnl_vs_hodl)}\n"
        "\n"
    )


def chat(system: str, user: str) -> list[dict]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def prompt_version() -> str:
    """A hash of what the prompts say and of how they write numbers: a model tuned on one is not asked another."""
    time = datetime.datetime(2024, 9, 1, tzinfo=UTC)
    candidates = (
        Candidate("BTC-08SEP24-63000-C", 63000.0, 7.0, 0.2351, 3.2029, 0.7, 0.9306),
        Candidate("X-0.55-C", 0.55, 7.25, 0.0, -1.0, None, None),
    )
    decision = Decision(time, "BTC", "tp_and_roll", 58466.0, candidates)
    chats = [candidate_messages(decision, candidate) for candidate in candidates]
    chats += [ranking_messages(decision), ranking_messages(decision._replace(candidates=()))]
    return hashlib.sha256(json.dumps([chats, SELL_CALL, SKIP, NO_TRADE]).encode()).hexdigest()[:12]


PROMPT_VERSION = prompt_version()


# ---------------------------------------------------------------------------------------------------------------------
# What a value may be: one list of rules, for a row of a file and for a decision that a program makes.


class CandidatesError(ValueError):
    """The files or the options cannot be used as they are; the message says why and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str, limit: int = 4_000) -> str:
    """One line for a terminal: what would steer it is written out, and what is too long is cut."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])
    return text if len(text) < limit else f"{text[:limit]} ..."


def shown(value, limit: int = 200) -> str:
    """A value as a message shows it."""
    text = repr(value[: 2 * limit]) if isinstance(value, (str, bytes)) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


# The least and the most of each number; iv has a limit of its own in the options.
NUMBERS = {
    "spot": (0.0, math.inf), "strike": (0.0, math.inf), "dte": (0.0, MAX_DTE), "delta": (-1.0, 1.0),
    "score": (-math.inf, math.inf), "iv": (0.0, math.inf), "ivrv_ratio": (-math.inf, math.inf),
}  # fmt: skip
ABOVE_ZERO = ("spot", "strike")
MAY_LACK = ("iv", "ivrv_ratio")
NO_TIME = "is not an ISO 8601 time such as 2024-09-01T00:00:00+00:00"
# Every special token of the common chat formats has one of these: <|end|>, <s>, [INST], {{, <｜User｜>. The bar also
# divides the parts of a decision's id, and a quote is one that a CSV lost.
NOT_IN_A_NAME = '<>[]{}|｜"'
DERIBIT_NAME = re.compile(r"([A-Z0-9]+)(?:_[A-Z]+)?-(\d{1,2}[A-Z]{3}\d{2})-(\d+(?:[d.]\d+)?)-C")


def wrong_number(name: str, value: float, max_iv: float) -> str | None:
    """Why this cannot be the number of that column; None if it can."""
    low, high = NUMBERS.get(name, (-math.inf, math.inf))
    high = max_iv if name == "iv" else high
    if low <= value <= high and math.isfinite(value) and (value or name not in ABOVE_ZERO):
        return None
    if not math.isfinite(value):
        return "is not finite"
    if value == 0:
        return "is zero, and must be above"
    if name == "iv" and value > 0:
        return (
            f"is above {max_iv:g}: iv is a fraction a year, 0.7 for 70 %. If it is a percentage, divide the column by "
            "100; if it is meant, raise the option max_iv"
        )
    return "is negative" if low == 0.0 and value < 0 else f"is outside [{low:g}, {high:g}]"


@functools.lru_cache(maxsize=65_536)
def wrong_name(text: str) -> str | None:
    """Why this cannot be a name that a prompt shows; None if it can."""
    if not text or not text.isprintable():  # a line break would write its own line into the prompt
        return "is blank or not printable text"
    if len(text) > MAX_NAME:
        return f"is longer than {MAX_NAME} characters"
    found = next((character for character in text if character in NOT_IN_A_NAME), None)
    return found and f"holds {found!r}, which names must not: chat formats mark their turns with it"


def wrong_instrument(name: str) -> str | None:
    if name.upper().endswith("-P"):
        return "is a put, and only calls are sold against the coin. Leave puts out"
    return None


def contradicts_name(name: str, underlying: str, strike: float, expiry: datetime.datetime) -> str | None:
    """The column that contradicts an instrument's own name; "" if none does, None if the name says nothing.

    A name such as BTC-08SEP24-63000-C is Deribit's: its expiry is at 08:00 UTC. That of the columns may be up to a day
    from it, for dte may be rounded.
    """
    parts = DERIBIT_NAME.fullmatch(name)
    named = parts and expiry_of(parts[2])
    if not named:
        return None
    if parts[1] != underlying.upper():
        return "underlying"
    if float(parts[3].replace("d", ".")) != strike:
        return "strike"
    return "" if abs(named - expiry) <= ONE_DAY else "decision_time"


ONE_DAY = datetime.timedelta(days=1)


@functools.lru_cache(maxsize=4096)
def expiry_of(day: str) -> datetime.datetime | None:
    try:
        return datetime.datetime.strptime(day, "%d%b%y").replace(hour=8, tzinfo=UTC)
    except ValueError:
        return None


def check_decision(decision: Decision, max_iv: float | None = None) -> None:
    """Holds a decision that a program makes to the rules for one of a file.

    Args:
        max_iv: as the option of that name; None for its default.

    Raises:
        CandidatesError: names the decision's candidate, the field and its value, and what is wrong with it.
    """
    max_iv = CoveredCallCandidatesConfig.max_iv if max_iv is None else max_iv
    if not isinstance(decision, Decision):
        raise CandidatesError(f"{shown(decision)} is no Decision. From a dict: Decision.from_dict.")
    time = decision.decision_time
    if not isinstance(time, datetime.datetime) or time.tzinfo is None or iso_time(time.isoformat()) is None:
        raise CandidatesError(f"decision_time: {shown(time)} is not a datetime with a time zone.")
    for name in ("underlying", "exit_style"):
        check_name(name, getattr(decision, name), "the decision")
    if not isinstance(decision.candidates, tuple) or not all(isinstance(c, Candidate) for c in decision.candidates):
        raise CandidatesError(f"candidates: {shown(decision.candidates)} is not a tuple of Candidate.")
    if decision.candidates:
        check_number("spot", decision.spot, "the decision", max_iv)
    for place, candidate in enumerate(decision.candidates, start=1):
        where = f"candidate {place} of {decision.decision_id}"
        check_name("instrument", candidate.instrument, where)
        for name in Candidate._fields[1:]:
            check_number(name, getattr(candidate, name), where, max_iv)
    names = collections.Counter(candidate.instrument for candidate in decision.candidates)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise CandidatesError(f"{decision.decision_id}: the instrument {shown(twice[0])} stands there twice.")


def checked_decision(state: Decision | dict, max_iv: float | None) -> Decision:
    """A decision, or what Decision.from_dict makes one of, that check_decision has passed."""
    if isinstance(state, dict):
        return Decision.from_dict(state, max_iv)
    check_decision(state, max_iv)
    return state


def is_number(value) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def check_name(name: str, text, where: str) -> None:
    reason = wrong_name(text) if isinstance(text, str) else "is not text"
    if reason is None and text == NO_CANDIDATES:
        reason = "is for files: give a decision without candidates instead"
    if reason is None and name == "instrument":
        reason = wrong_instrument(text)
    if reason:
        raise CandidatesError(f"{where}, {name}: {shown(text)} {reason}.")


def check_number(name: str, value, where: str, max_iv: float) -> None:
    if value is None and name in MAY_LACK:
        return
    if not is_number(value):
        raise CandidatesError(f"{where}, {name}: {shown(value)} is not a number.")
    try:
        reason = wrong_number(name, float(value), max_iv)
    except OverflowError:  # an integer beyond all floats
        reason = "is not finite"
    if reason:
        raise CandidatesError(f"{where}, {name}: {shown(value)} {reason}.")


def fields_of(kind: type, state, where: str) -> dict:
    """The dict of a named tuple's fields; None for those that may be missing."""
    if not isinstance(state, dict):
        raise CandidatesError(f"{where}: {shown(state)} is no dict of {', '.join(kind._fields)}.")
    for name in kind._fields:
        if name not in state and name not in MAY_LACK:
            raise CandidatesError(f"{where} has no {name}: give {', '.join(kind._fields)}.")
    strange = [name for name in state if name not in kind._fields]
    if strange:
        raise CandidatesError(f"{where}: {shown(strange[0])} is not known: give {', '.join(kind._fields)}.")
    return {name: state.get(name) for name in kind._fields}


# ---------------------------------------------------------------------------------------------------------------------
# Reading. Every complaint names file, line, column and value, and says what to do.


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


class Row(NamedTuple):
    """One parsed row; ``candidate`` is None for the placeholder of a step without candidates."""

    line: int
    spot: float
    candidate: Candidate | None
    outcome: Outcome
    trade_executed: int
    chosen: int


@dataclass(slots=True)
class Run:
    """Rows of one decision that stand together in a file; ``key`` is None where it cannot be read whose row it is.

    Of all of them ``line`` (of the first), ``size``, and as text ``spots`` and ``instruments``. Of those that pass the
    filters and can be read ``rows``; how many instruments' names say what they are, ``named``, and which of them
    contradict their rows, ``misnamed``.
    """

    key: tuple | None
    line: int
    wanted: bool
    size: int = 0
    spoilt: bool = False
    named: int = 0
    spots: collections.Counter = field(default_factory=collections.Counter)
    instruments: set = field(default_factory=set)
    rows: list = field(default_factory=list)
    misnamed: list = field(default_factory=list)


def read_candidates(paths: list[str], options: "CoveredCallCandidatesConfig") -> list[LoggedDecision]:
    """All decisions of the files that pass the filters, by decision time, ties in the order of the files.

    Raises CandidatesError for files that cannot be read, and BadRow for rows that cannot be trusted.
    """
    decisions: dict[tuple, tuple[str, LoggedDecision]] = {}
    repeated = collections.defaultdict(list)
    present = {"underlying": collections.Counter(), "exit_style": collections.Counter()}
    hashes = hashes_of(options.data_files)
    skipped = 0
    for path in paths:
        logged, bad = read_file(path, options, present, hashes.get(path))
        skipped += bad
        for entry in logged:
            key = entry.decision[:3]
            if key in decisions:
                repeated[decisions[key][0], path].append(entry.decision.decision_id)
                if options.duplicates == "latest" and not is_later(path, decisions[key][0]):
                    continue
            decisions[key] = (path, entry)
    check_repeated(repeated, options)
    if skipped:
        logger.warning("Dropped %d decision(s) with bad rows, whole (on_bad_rows='skip').", skipped)
    if not decisions:
        raise nothing_left(paths, options, present, skipped)
    say_what_was_filtered(options, present)
    return add_counterfactuals(
        sorted((entry for _, entry in decisions.values()), key=lambda e: e.decision.decision_time), options
    )


def hashes_of(data_files: DataFilesDict | None) -> dict[str, str]:
    """From a path to its content's hash, as ``fingerprint`` noted it; empty where it has not."""
    found = (data_files or {}).get("train", ())
    return {path: digest for path, (digest,) in zip(found, getattr(found, "origin_metadata", ()), strict=False)}


def say_what_was_filtered(options, present: dict[str, collections.Counter]) -> None:
    for name, rows in present.items():
        left = {value: count for value, count in rows.items() if getattr(options, name) not in (None, value)}
        if left:
            values = ", ".join(f"{shown(value)} ({count:,} rows)" for value, count in sorted(left.items()))
            logger.warning("Left out by %s=%r: %s.", name, getattr(options, name), printable(values))


def check_repeated(repeated: dict[tuple[str, str], list[str]], options: "CoveredCallCandidatesConfig") -> None:
    """``repeated`` holds, for two files, the ids of the decisions that both have."""
    if not repeated:
        return
    if options.duplicates == "error":
        (first, second), ids = next(iter(repeated.items()))
        raise CandidatesError(
            f"{first} and {second} both hold decision {ids[0]!r} ({len(ids)} in common). Give one of the two, or keep "
            'the later run of each decision with duplicates="latest" (by the stamp that ends the file name).'
        )
    count = sum(map(len, repeated.values()))
    logger.warning("%d decision(s) stood in two files; the later file's were kept.", count)


def is_later(path: str, other: str) -> bool:
    if stamp(path) == stamp(other):
        raise CandidatesError(
            f"{path} and {other} hold the same decision and carry the same stamp, so neither is the later run. Give "
            "one of the two."
        )
    return stamp(path) > stamp(other)


def stamp(path: str) -> str:
    """The YYYYMMDD_HHMMSS that ends a backtest's file name; it sorts by time."""
    found = re.search(r"_(\d{8}_\d{6})\.csv(\.gz)?$", os.path.basename(path))
    if not found:
        raise CandidatesError(
            f'{path}: duplicates="latest" needs a stamp such as _20251207_225615.csv at the end of the file name. '
            "Rename the file, or leave it out."
        )
    return found.group(1)


def nothing_left(paths, options, present, skipped) -> CandidatesError:
    asked = [f"{name}={shown(getattr(options, name))}" for name in present if getattr(options, name)]
    if skipped or not asked:
        return CandidatesError(f"{', '.join(paths)}: every decision has a bad row. See them with on_bad_rows='error'.")
    found = [f"{name} {shown(', '.join(sorted(values)))[1:-1]}" for name, values in present.items()]
    return CandidatesError(
        f"{', '.join(paths)}: no row is left with {' and '.join(asked)}. The files hold {'; '.join(found)}."
    )


def read_file(path: str, options, present: dict, expected: str | None) -> tuple[list[LoggedDecision], int]:
    """The file's good decisions in order of first appearance, and how many bad ones were dropped.

    Args:
        expected: the hash that the file's content must have; None if any will do.
    """

    def complain(problem: BadRow) -> None:
        if options.on_bad_rows == "error":
            raise problem
        logger.info("Skipping: %s", problem)

    runs = read_runs(path, options, present, expected, complain)
    scattered = are_scattered(runs)
    bad = {run.key for run in runs if run.spoilt}  # which may hold a row of their neighbours', too
    spoilt = spoilt_by_strays(path, runs, scattered, complain) - bad
    places = {run.key: place for place, run in enumerate(runs)}
    groups: dict[tuple, list[Row]] = collections.defaultdict(list)
    for run in runs:
        if run.wanted and run.key:
            groups[run.key] += run.rows
    logged = {}
    for key, rows in groups.items():
        if key in spoilt or not rows:
            continue
        try:
            logged[key] = log_decision(path, key, rows)
        except BadRow as problem:
            if key not in bad:
                complain(problem)
            if key not in bad and scattered:  # one of its rows may be another decision's
                raise whose_is_it(path, problem.line) from problem
            spoilt |= {key, *may_have_its_rows(runs, places[key])}
    unknown_rows = sum(run.key is None for run in runs)
    if unknown_rows:
        logger.warning("%s: skipped %d row(s) of which cannot be told whose they are.", path, unknown_rows)
    spoilt |= bad
    good = [entry for key, entry in logged.items() if key not in spoilt]
    return good, len(spoilt & {run.key for run in runs if run.wanted})


def read_runs(path: str, options, present: dict, expected: str | None, complain) -> list[Run]:
    """The file's rows, those of one decision together as far as they stand together."""
    runs: list[Run] = []
    offsets_checked = False
    rows = read_cells(path, options, expected)
    for cells in tqdm(rows, desc=os.path.basename(path), unit=" rows", disable=None, leave=False):
        try:
            key = parse_key(cells)
        except BadRow as problem:
            complain(problem)
            runs.append(Run(None, cells.line, wanted=True, size=1))
            runs[-1].spots.update([cells.values["spot"]] if "spot" in cells.values else [])
            continue
        if not offsets_checked and iso_time(cells.values["decision_time"]).tzinfo is None:
            logger.warning("%s, line %d: decision_time has no offset; such times are read as UTC.", path, cells.line)
            offsets_checked = True
        if not runs or runs[-1].key != key:
            passes = all(getattr(options, name) in (None, cells.values[name]) for name in present)
            runs.append(Run(key, cells.line, passes))
        for name, values in present.items():
            values[cells.values[name]] += 1
        add_row(runs[-1], cells, options, complain)
    return runs


def add_row(run: Run, cells: Cells, options, complain) -> None:
    run.size += 1
    run.spots[cells.values["spot"]] += 1
    run.instruments.add(cells.values["instrument"])
    if run.wanted:
        try:
            run.rows.append(parse_row(cells, options))
        except BadRow as problem:
            complain(problem)
            run.spoilt = True
        else:
            check_name_of(run, run.rows[-1], cells)


def check_name_of(run: Run, row: Row, cells: Cells) -> None:
    """Notes whether the row goes with its instrument's own name; what follows depends on the rest of the file."""
    if row.candidate:
        time, underlying, _ = run.key
        expiry = time + datetime.timedelta(days=row.candidate.dte)
        name = row.candidate.instrument
        column = contradicts_name(name, underlying, row.candidate.strike, expiry)
        run.named += column is not None
        run.misnamed += [(row.line, column, cells.values[column], name)] if column else []


# --- Rows that seem to be another decision's: their time, underlying or exit style is wrong, but valid in itself.

RARE = 0.02  # of a file's decisions: so many may break an order that counts as one all the same
BESIDE_ONE = 5  # rows of another value beside which a value that stands on one row is a slip


class Stray(NamedTuple):
    """A run that is not to be trusted, the places of those that it may belong to, and what to say of it."""

    place: int
    owners: list[int]
    column: str
    reason: str
    line: int | None = None  # where it is not the run's first row that is strange
    value: str | None = None


def spoilt_by_strays(path: str, runs: list[Run], scattered: bool, complain) -> set[tuple]:
    """The decisions that a stray row may have come from or gone to, and those beside a row that cannot be told whose.

    Raises:
        CandidatesError: where the rows of decisions do not stand together, so that nobody could tell whose it is.
    """
    spoilt = beside_a_bad_row(runs)
    everywhere, together = (unknown, slips, misnamed), (intruders, pieces, lone)
    for find in everywhere if scattered else everywhere + together:
        strays = find(runs)
        for stray in strays:
            run, its = runs[stray.place], [runs[owner] for owner in stray.owners]
            if not any(one.wanted for one in (run, *its)):
                continue
            if run.key is not None:
                value = stray.value or str(dict(zip(KEY, run.key, strict=True))[stray.column])
                complain(BadRow(path, stray.line or run.line, stray.column, value, stray.reason))
            if scattered and stray.column in KEY:
                raise whose_is_it(path, stray.line or run.line)
            spoilt |= {run.key, *(one.key for one in its)}
        if strays:  # what has been found is set aside, or one stray would look like several
            places = {stray.place for stray in strays}
            runs = joined([run for place, run in enumerate(runs) if place not in places])
    return (spoilt | mixed(runs)) - {None}


def may_have_its_rows(runs: list[Run], place: int) -> set[tuple]:
    """The neighbours that may hold a row of a decision that contradicts itself, or of which it may hold one."""
    near = {i for i in neighbours(runs, place) if runs[place].size == 1 or runs[i].size == 1}
    placeholders = {i for i in near if NO_CANDIDATES in runs[i].instruments}
    return {runs[i].key for i in (near - placeholders).union(shared_spots(runs, place))} - {None}


def whose_is_it(path: str, line: int) -> CandidatesError:
    return CandidatesError(
        f"{path}, line {line}: whose row this is cannot be told, for the rows of a decision do not stand together in "
        "this file. Correct the row, or sort the file by decision_time, underlying and exit_style."
    )


def joined(runs: list[Run]) -> list[Run]:
    """The runs, with those of one decision that now stand beside each other as one."""
    found: list[Run] = []
    for run in runs:
        if not found or found[-1].key != run.key:
            found.append(Run(run.key, run.line, run.wanted, spoilt=run.spoilt))
        whole = found[-1]
        whole.size += run.size
        whole.named += run.named
        whole.misnamed += run.misnamed
        whole.spots += run.spots
        whole.instruments |= run.instruments
    return found


def are_scattered(runs: list[Run]) -> bool:
    """Whether nothing follows from where a row stands, for the rows of decisions do not stand together here.

    Where some do not, it takes three decisions of several rows that do, and few exceptions, to call these strays.
    """
    times, rows, last = collections.Counter(), collections.Counter(), None
    for run in runs:
        if run.key is not None:
            times[run.key] += run.key != last
            rows[run.key] += run.size
            last = run.key
    split = sum(count > 1 for count in times.values())
    whole = sum(count == 1 and rows[key] > 1 for key, count in times.items())
    few = whole >= max(3, 2 * split) and times.total() - len(times) <= max(2, RARE * len(times))
    return split > 0 and not few


def beside_a_bad_row(runs: list[Run]) -> set[tuple]:
    """The neighbours that a decision of one row may belong to which is bad in other cells than its key, too."""
    found = set()
    for place, run in enumerate(runs):
        if run.spoilt and run.size == 1:
            legible = all(re.fullmatch(r"[\d.]+", spot) for spot in run.spots)
            found |= {runs[near].key for near in (shared_spots if legible else neighbours)(runs, place)}
    return found


def mixed(runs: list[Run]) -> set[tuple]:
    """The neighbours whose spot is on the lesser part of a decision's rows: these may be theirs."""
    found = set()
    for place, run in enumerate(runs):
        if len(run.spots) > 1:
            most = max(run.spots.values())
            odd = {spot for spot, rows in run.spots.items() if rows < most or rows == 1}
            found |= {runs[near].key for near in neighbours(runs, place) if runs[near].spots.keys() & odd}
    return found


def shared_spots(runs: list[Run], place: int) -> list[int]:
    """The neighbours that share a spot with a run: a row takes that of its decision along wherever it strays.

    Beyond one of a single row, which may be a stray as well, the next; of such at most four in a row.
    """
    found = []
    for step in (-1, 1):
        for near in range(place + step, place + 5 * step, step):
            if not (0 <= near < len(runs) and runs[near].spots.keys() & runs[place].spots):
                break
            found.append(near)
            if runs[near].size > 1:
                break
    return found


def neighbours(runs: list[Run], place: int) -> list[int]:
    return [near for near in (place - 1, place + 1) if 0 <= near < len(runs)]


def owners(runs: list[Run], place: int) -> list[int]:
    return shared_spots(runs, place) or neighbours(runs, place)


def unknown(runs: list[Run]) -> list[Stray]:
    """Rows without a legible key."""
    places = [place for place, run in enumerate(runs) if run.key is None]
    known = [place for place, run in enumerate(runs) if run.key is not None]
    found = []
    for place in places:
        after = bisect.bisect_left(known, place)
        near = [known[i] for i in (after - 1, after) if 0 <= i < len(known)]
        found.append(Stray(place, [i for i in near if runs[i].spots.keys() & runs[place].spots] or near, KEY[0], ""))
    return found


def slips(runs: list[Run]) -> list[Stray]:
    """An underlying or exit style that stands on one row, where others stand on many."""
    found = []
    for part, column in list(enumerate(KEY))[1:]:
        rows = collections.Counter()
        for run in runs:
            rows[run.key[part]] += run.size
        [(common, most)] = rows.most_common(1) or [("", 0)]
        for place, run in enumerate(runs):
            if most >= BESIDE_ONE and rows[run.key[part]] == 1:
                reason = (
                    f"stands on this row alone, and {shown(common)} on {most:,}. If it is right, put the row into a "
                    "file of its own"
                )
                found.append(Stray(place, owners(runs, place), column, reason))
    return found


MISNAMED = "does not go with the instrument {}, whose name says underlying, expiry (decision_time and dte) and strike"


def misnamed(runs: list[Run]) -> list[Stray]:
    """Rows that contradict their instrument's name, in a file where names and rows agree."""
    wrong = sum(len(run.misnamed) for run in runs)
    if not 0 < wrong <= max(1, RARE * sum(run.named for run in runs)) or sum(run.named for run in runs) < BESIDE_ONE:
        return []
    return [
        Stray(place, owners(runs, place) if column in KEY else [], column, MISNAMED.format(name), line, value)
        for place, run in enumerate(runs)
        for line, column, value, name in run.misnamed
    ]


def intruders(runs: list[Run]) -> list[Stray]:
    """A decision of one row amid another's, with the other's spot."""
    return [
        Stray(place, [place - 1], KEY[0], f"makes a decision of one row amid the rows of {id_of(runs[place - 1])}")
        for place in range(1, len(runs) - 1)
        if runs[place].size == 1
        and runs[place - 1].key == runs[place + 1].key
        and runs[place].spots.keys() & (runs[place - 1].spots + runs[place + 1].spots)
    ]


def pieces(runs: list[Run]) -> list[Stray]:
    """Rows of a decision apart from most of its rows, in a file where decisions stand together."""
    places = collections.defaultdict(list)
    for place, run in enumerate(runs):
        places[run.key].append(place)
    found = []
    for its in places.values():
        main = max(its, key=lambda place: runs[place].size)
        reason = f"has other rows of its decision on line {runs[main].line}, with other decisions' rows between"
        found += [Stray(place, [main, *owners(runs, place)], KEY[0], reason) for place in its if place != main]
    return found


def lone(runs: list[Run]) -> list[Stray]:
    """A decision of one row with the spot of a neighbour's, where no decisions of many rows share one."""
    close = [(a, b) for a, b in zip(runs, runs[1:], strict=False) if a.spots.keys() & b.spots]
    if any(min(a.size, b.size) > 1 for a, b in close) or len(runs) - len(close) < BESIDE_ONE:
        return []
    found = []
    for place, run in enumerate(runs):
        near = [i for i in shared_spots(runs, place) if not runs[i].instruments & run.instruments]
        if run.size == 1 and near and NO_CANDIDATES not in run.instruments:
            reason = f"makes a decision of one row that has its spot from {id_of(runs[near[0]])}, beside it"
            found.append(Stray(place, near, KEY[0], reason))
    return found


def id_of(run: Run) -> str:
    return Decision(*run.key, spot=0.0, candidates=()).decision_id


# --- Files as rows of text.


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


def read_cells(path: str, options, expected: str | None = None) -> Iterator[Cells]:
    """The rows of one CSV (plain or gzip, UTF-8 with or without BOM) as text."""
    try:
        with Hashed(path) as content, io.BufferedReader(content, MAX_LINE) as raw:
            text = decoded(path, raw)  # named, for it closes the file when it goes
            yield from cells_of(path, csv.reader(lines(path, text), strict=True))
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


def decoded(path: str, raw: io.BufferedReader) -> io.TextIOWrapper:
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


def cells_of(path: str, reader) -> Iterator[Cells]:
    rows = 0
    try:
        header = check_header(path, next(reader, None))
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


NO_OPTIONAL = dict.fromkeys(OPTIONAL_COLUMNS, "")


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


def check_header(path: str, header: list[str] | None) -> list[str]:
    if not header:
        raise CandidatesError(f"{path} is empty. Leave it out, or run the backtest again.")
    header = [name.strip() for name in header]
    missing = [name for name in COLUMNS if name not in header and name not in OPTIONAL_COLUMNS]
    if missing:
        raise CandidatesError(
            f"{path}, line 1: column {', '.join(missing)} is missing; the header is {','.join(header)[:300]!r}. "
            f"A candidate file has the columns {','.join(COLUMNS)}."
        )
    twice = [name for name, count in collections.Counter(header).items() if count > 1 and name in COLUMNS]
    if twice:
        raise CandidatesError(f"{path}, line 1: column {', '.join(twice)} stands twice. Remove one of the two.")
    lacking = [name for name in OPTIONAL_COLUMNS if name not in header]
    if lacking:
        logger.warning("%s: column(s) %s are missing, and null.", path, ", ".join(lacking))
    extra = [name for name in header if name not in COLUMNS]
    if extra:
        logger.warning("%s: column(s) %s are not known and not used.", path, printable(", ".join(extra), 300))
    return header


# --- Rows as values.

KEY = ("decision_time", "underlying", "exit_style")


def parse_key(cells: Cells) -> tuple[datetime.datetime, str, str]:
    if WIDTH in cells.values:
        raise cells.bad(WIDTH, "in the row do not fit the header")
    return parse_time(cells), parse_name(cells, "underlying"), parse_name(cells, "exit_style")


def parse_row(cells: Cells, options) -> Row:
    trade_executed, chosen = parse_flag(cells, "trade_executed"), parse_flag(cells, "chosen")
    if chosen and not trade_executed:
        raise cells.bad("chosen", "says sold, but trade_executed is 0")
    if cells.values["action"] not in (SELL_CALL, SKIP):
        raise cells.bad("action", f"is neither {SELL_CALL} nor {SKIP}")
    if chosen != (cells.values["action"] == SELL_CALL):
        raise cells.bad("action", f"disagrees with chosen={chosen}")
    outcome = Outcome(*(parse_number(cells, name, options, blank=True) for name in Outcome._fields))
    if parse_name(cells, "instrument") != NO_CANDIDATES:
        spot, candidate = parse_number(cells, "spot", options), parse_candidate(cells, options)
        return Row(cells.line, spot, candidate, outcome, trade_executed, chosen)
    if trade_executed:
        raise cells.bad("trade_executed", f"on a {NO_CANDIDATES} row, where nothing can be sold")
    strike, *_ = (parse_number(cells, name, options, blank=True, zero=True) for name in Candidate._fields[1:])
    if strike:
        raise cells.bad("instrument", "stands for no option, and the row has a strike")
    return Row(cells.line, parse_number(cells, "spot", options, zero=True), None, outcome, trade_executed, chosen)


def parse_candidate(cells: Cells, options) -> Candidate:
    names = Candidate._fields[1:]
    values = (parse_number(cells, name, options, blank=name in MAY_LACK) for name in names)
    candidate = Candidate(cells.values["instrument"], *values)
    reason = wrong_instrument(candidate.instrument)
    if reason:
        raise cells.bad("instrument", reason)
    return candidate


def parse_time(cells: Cells) -> datetime.datetime:
    time = iso_time(cells.values["decision_time"])
    if time is None:
        raise cells.bad("decision_time", NO_TIME)
    return utc(time)


@functools.lru_cache(maxsize=4096)
def iso_time(text: str) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(text)
        utc(time) + datetime.timedelta(days=MAX_DTE)  # at the ends of the calendar there is no UTC time, or no expiry
        return time
    except (ValueError, OverflowError):
        return None


def utc(time: datetime.datetime) -> datetime.datetime:
    """The same time in UTC; one without an offset is taken to be UTC."""
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def parse_name(cells: Cells, column: str) -> str:
    text = cells.values[column]
    reason = wrong_name(text)
    if reason:
        raise cells.bad(column, reason)
    return text


def parse_flag(cells: Cells, column: str) -> int:
    text = cells.values[column]
    if text not in ("0", "1", "0.0", "1.0", "False", "True"):
        raise cells.bad(column, "is neither 0 nor 1")
    return int(text in ("1", "1.0", "True"))


def parse_number(cells: Cells, column: str, options, blank: bool = False, zero: bool = False) -> float | None:
    """A number within the limits of its column.

    Args:
        blank: an empty cell or NaN is None, and not wrong.
        zero: 0 is right, whatever the column.
    """
    text = cells.values[column]
    if blank and not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = None
    if value is None or "_" in text or not text.isascii():  # float() reads 1_000, and the digits of all scripts
        raise cells.bad(column, "is not a number")
    if blank and math.isnan(value) or zero and value == 0:
        return None if blank else value
    reason = wrong_number(column, value, options.max_iv)
    if reason:
        raise cells.bad(column, reason)
    return value


def log_decision(path: str, key: tuple, rows: list[Row]) -> LoggedDecision:
    """One decision from its rows; raises BadRow where they contradict each other."""
    first, chosen, lines = rows[0], None, {}
    for index, row in enumerate(rows):
        for name in ("spot", "trade_executed"):
            value, expected = getattr(row, name), getattr(first, name)
            if value != expected:
                reason = f"differs from {expected!r} on line {first.line} of the same decision"
                raise BadRow(path, row.line, name, value, reason)
        instrument = row.candidate.instrument if row.candidate else NO_CANDIDATES
        if instrument in lines:
            reason = f"also stands on line {lines[instrument]} of the same decision"
            raise BadRow(path, row.line, "instrument", instrument, reason)
        if NO_CANDIDATES in lines or (lines and instrument == NO_CANDIDATES):
            reason = f"and {NO_CANDIDATES} cannot stand in one decision (lines {first.line} and {row.line})"
            raise BadRow(path, row.line, "instrument", instrument, reason)
        lines[instrument] = row.line
        if row.chosen and chosen is not None:
            raise BadRow(path, row.line, "chosen", 1, f"also on line {rows[chosen].line} of the same decision")
        chosen = index if row.chosen else chosen
    if first.trade_executed and chosen is None:
        raise BadRow(path, first.line, "trade_executed", 1, "but no row of the decision has chosen=1")
    candidates = tuple(row.candidate for row in rows if row.candidate)
    outcomes = tuple(row.outcome for row in rows if row.candidate)
    return LoggedDecision(Decision(*key, first.spot, candidates), chosen, outcomes)


def present_in_order(logged: LoggedDecision, options) -> LoggedDecision:
    """The same decision with its candidates in the order that the prompt shows them."""
    candidates = logged.decision.candidates
    order = list(range(len(candidates)))
    if options.candidate_order != "csv":  # a teacher's file is sorted by score: its order gives the answer away
        order.sort(key=lambda i: (candidates[i].instrument, candidates[i].strike))
    if options.candidate_order == "shuffle":
        random.Random(f"{options.seed}|{logged.decision.decision_id}").shuffle(order)
    return LoggedDecision(
        logged.decision._replace(candidates=tuple(candidates[i] for i in order)),
        None if logged.chosen is None else order.index(logged.chosen),
        tuple(logged.outcomes[i] for i in order),
        tuple(logged.counterfactuals[i] for i in order) if logged.counterfactuals else (),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Counterfactuals: the outcome of every candidate, sold or not, from the prices of the files' own later decisions. They are
# labels and stand in columns; no prompt is rendered from them.

HOLD_TO_EXPIRY, TP_AND_ROLL = "hold_to_expiry", "tp_and_roll"
DAYS_PER_YEAR = 365
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)
SECOND = 1_000_000  # microseconds
DAY = 86_400 * SECOND


def black_scholes_call(spot, strike, years, iv):
    """Value of a European call in USD at interest rate 0 (Black and Scholes 1973); iv as a fraction a year.

    Takes numbers or arrays. Without time or vol it is the intrinsic value.
    """
    deviation = np.maximum(iv * np.sqrt(years), 1e-12)
    d1 = (np.log(spot) - np.log(strike)) / deviation + deviation / 2
    return spot * ndtr(d1) - strike * ndtr(d1 - deviation)


def trading_cost(price: float, spot: float, options) -> float:
    """USD that selling or buying back one call at ``price`` costs: fee, half the spread, and slippage.

    Deribit's fee is 0.0003 of the underlying, at most 12.5 % of the option's price.
    """
    return min(options.fee * spot, options.fee_cap * price) + options.half_spread * price + options.slippage * spot


class Market:
    """Spots and chains by time (in microseconds since 1970), from the decisions of the files themselves."""

    def __init__(self, logged: list[LoggedDecision], options):
        self.tolerance = round(options.expiry_tolerance * 3600 * SECOND)
        spots, self.chains = collections.defaultdict(dict), {}
        for decision in (entry.decision for entry in logged):
            time = microseconds(decision.decision_time)
            if decision.spot > 0:  # a placeholder row may have none
                spots[decision.underlying][time] = decision.spot
            self.chains[time, decision.underlying, decision.exit_style] = decision.candidates
        self.times = {name: np.array(sorted(by_time)) for name, by_time in spots.items()}
        self.spots = {name: np.array([spots[name][time] for time in times]) for name, times in self.times.items()}
        # How many gaps, longer than twice the tolerance, lie before each time.
        self.gaps = {
            name: np.cumsum(np.diff(times, prepend=times[0]) > 2 * self.tolerance)
            for name, times in self.times.items()
        }

    def nearest(self, underlying: str, time: int) -> int | None:
        """The place of the spot nearest to ``time``; None if none is within the tolerance."""
        times = self.times.get(underlying, ())
        place = bisect.bisect_left(times, time)
        near = min(
            (p for p in (place - 1, place) if 0 <= p < len(times)), key=lambda p: abs(times[p] - time), default=None
        )
        return near if near is not None and abs(times[near] - time) <= self.tolerance else None


def microseconds(time: datetime.datetime) -> int:
    return (time - EPOCH) // datetime.timedelta(microseconds=1)


def add_counterfactuals(logged: list[LoggedDecision], options) -> list[LoggedDecision]:
    """The same decisions with a counterfactual for each candidate; unknown for other exit styles than the two."""
    market = Market(logged, options)
    with np.errstate(all="ignore"):  # a number beyond all measure makes an outcome that is not finite: unknown
        return [
            entry._replace(
                counterfactuals=tuple(
                    counterfactual(entry.decision, c, market, options) for c in entry.decision.candidates
                )
            )
            for entry in tqdm(logged, desc="Outcomes", unit=" decisions", disable=None, leave=False)
        ]


def counterfactual(decision: Decision, candidate: Candidate, market: Market, options) -> Counterfactual:
    """The outcome of selling this candidate, until it expires or until the horizon.

    Unknown where iv is blank, or where the files hold no spot near enough to the end.
    """
    life = candidate.dte if options.horizon is None else min(candidate.dte, float(options.horizon))
    end = decision.decision_time + datetime.timedelta(days=life)
    last = market.nearest(decision.underlying, microseconds(end))
    follow = {HOLD_TO_EXPIRY: hold, TP_AND_ROLL: take_profit_and_roll}.get(decision.exit_style)
    if candidate.iv is None or last is None or follow is None:
        return Counterfactual(None, end)
    pnl = follow(decision, candidate, life, last, market, options)
    label_end = max(end, EPOCH + datetime.timedelta(microseconds=int(market.times[decision.underlying][last])))
    return Counterfactual(float(pnl) if pnl is not None and math.isfinite(pnl) else None, label_end)


def hold(decision: Decision, candidate: Candidate, life: float, last: int, market: Market, options) -> float:
    """P&L vs HODL of selling and holding: the premium, less what the call is worth ``life`` days later.

    At expiry that is max(0, spot - strike). Before it, the call is bought back at its Black-Scholes value at the entry
    iv. ``last`` is the place of the spot that is taken for the end.
    """
    spot, left = market.spots[decision.underlying][last], candidate.dte - life
    return open_call(decision.spot, candidate, options) - close_call(spot, candidate, left, options)


def premium_of(spot: float, candidate: Candidate) -> float:
    return black_scholes_call(spot, candidate.strike, candidate.dte / DAYS_PER_YEAR, candidate.iv)


def open_call(spot: float, candidate: Candidate, options) -> float:
    """USD that selling the call brings, net of costs."""
    premium = premium_of(spot, candidate)
    return premium - trading_cost(premium, spot, options)


def close_call(spot: float, candidate: Candidate, left: float, options) -> float:
    """USD that buying the call back takes, ``left`` days before its expiry; at expiry it settles without costs."""
    value = black_scholes_call(spot, candidate.strike, max(0.0, left) / DAYS_PER_YEAR, candidate.iv)
    return value + (trading_cost(value, spot, options) if left > 0 else 0.0)


def take_profit_and_roll(
    decision: Decision, candidate: Candidate, life: float, last: int, market: Market, options
) -> float | None:
    """P&L vs HODL of selling, taking profit early and rolling, by the rule of data/simulate_backtest.py.

    At each later decision time: once ``take_profit`` of its premium is captured, the call is bought back and the
    candidate of that time nearest to ``roll_delta`` is sold; if there is none, nothing more is. A call still open
    after ``life`` days is bought back. None where the files leave a gap, or do not price the call to roll into.
    """
    name, start = decision.underlying, microseconds(decision.decision_time)
    times, spots, gaps = market.times[name], market.spots[name], market.gaps[name]
    place = bisect.bisect_right(times, start)
    if gaps[last] > gaps[place - 1]:
        return None
    sold, spot, expiry = candidate, decision.spot, start + round(candidate.dte * DAY)
    booked = open_call(spot, sold, options)
    while True:
        left = np.maximum(0, expiry - times[place:last]) / DAY
        values = black_scholes_call(spots[place:last], sold.strike, left / DAYS_PER_YEAR, sold.iv)
        ends = np.flatnonzero((left == 0) | (values <= (1 - options.take_profit) * premium_of(spot, sold)))
        if not len(ends):
            return booked - close_call(spots[last], sold, (expiry - start - round(life * DAY)) / DAY, options)
        place += int(ends[0])
        spot = spots[place]
        booked -= close_call(spot, sold, left[ends[0]], options)
        chain = market.chains.get((int(times[place]), name, decision.exit_style), ())
        if left[ends[0]] == 0 or not chain:
            return booked
        sold = min(chain, key=lambda other: abs(other.delta - options.roll_delta))
        if sold.iv is None:
            return None
        booked += open_call(spot, sold, options)
        expiry = int(times[place]) + round(sold.dte * DAY)
        place += 1


# ---------------------------------------------------------------------------------------------------------------------
# What an answer brought. NO_TRADE brings 0: the coin is held either way.


class Net(NamedTuple):
    """Net outcome in USD a unit of underlying and where it is from, "counterfactual" or "recorded"; both None where unknown."""

    value: float | None
    source: str | None


class Pair(NamedTuple):
    """Two answers to one decision (an index into the candidates, None for NO_TRADE) and their outcomes in USD.

    Both outcomes are of one ``source``: a teacher that settles otherwise than the formula of the counterfactuals would make a
    recorded outcome minus a counterfactual look like skill.
    """

    chosen: int | None
    rejected: int | None
    chosen_outcome: float
    rejected_outcome: float
    source: str


def net_outcomes(logged: LoggedDecision, options) -> list[Net]:
    """For each candidate its counterfactual, or else what was recorded."""
    found = [Net(counterfactual.pnl_vs_hodl, "counterfactual") for counterfactual in logged.counterfactuals]
    recorded = recorded_outcome(logged, options)
    if recorded is not None and found[logged.chosen].value is None:
        found[logged.chosen] = Net(recorded, "recorded")
    return [Net(None, None) if net.value is None else net for net in found]


def recorded_outcome(logged: LoggedDecision, options) -> float | None:
    """The recorded P&L vs HODL of the call that was sold; None with costs or a horizon, of which it does not know."""
    if logged.chosen is None or not as_recorded(options):
        return None
    return logged.outcomes[logged.chosen].pnl_vs_hodl


def as_recorded(options) -> bool:
    """Whether counterfactuals mean what the recorded outcomes do: until the exit, before costs."""
    return options.horizon is None and options.fee == options.half_spread == options.slippage == 0


def preferred_pair(logged: LoggedDecision, options) -> Pair | None:
    """The answer that brought most against the teacher's, or against the worst; None where no pair is clear.

    Which is best is decided by the counterfactuals of all candidates or, where one is unknown, between the teacher's call and
    NO_TRADE. The pair's outcomes are the recorded ones where both have one.
    """
    counterfactuals, recorded = (
        [counterfactual.pnl_vs_hodl for counterfactual in logged.counterfactuals],
        recorded_outcome(logged, options),
    )
    logged_ones = {None: 0.0} if recorded is None else {None: 0.0, logged.chosen: recorded}
    known = logged_ones if None in counterfactuals else {None: 0.0, **dict(enumerate(counterfactuals))}
    best, worst = max(known, key=known.get), min(known, key=known.get)
    teachers = logged.chosen if logged.chosen in known else best
    rejected = worst if options.rejected == "worst" or teachers == best else teachers
    source = "recorded" if recorded is not None and {best, rejected} <= logged_ones.keys() else "counterfactual"
    outcomes = logged_ones if source == "recorded" else known
    pair = Pair(best, rejected, outcomes[best], outcomes[rejected], source)
    least = max(options.min_edge, options.min_edge_pct / 100 * logged.decision.spot)
    return pair if pair.chosen_outcome - pair.rejected_outcome > least else None


def balance_pairs(entries: list[LoggedDecision], options) -> list[LoggedDecision]:
    """Decisions with a pair, the commonest chosen answer cut by lot to as many as the second: none dominates.

    Indices count in the prompt's order.
    """
    by_label = collections.defaultdict(list)
    for place, entry in enumerate(entries):
        by_label[answer_label(preferred_pair(present_in_order(entry, options), options).chosen)].append(place)
    before = count_labels(by_label)
    commonest = sorted(by_label, key=lambda label: -len(by_label[label]))[:2]
    if len(commonest) == 2:
        most, second = (by_label[label] for label in commonest)
        by_label[commonest[0]] = random.Random(int(options.seed)).sample(most, len(second))
    logger.warning("Pairs of train by the chosen answer: %s; before balancing: %s.", count_labels(by_label), before)
    return [entries[place] for place in sorted(place for places in by_label.values() for place in places)]


def count_labels(by_label: dict[str, list[int]]) -> str:
    return ", ".join(f"{label} {len(places)}" for label, places in sorted(by_label.items()))


def answer_label(pick: int | None) -> str:
    return NO_TRADE if pick is None else str(pick + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Splits: chronological, a decision time never divided, and purged where options outlive the boundary.


def split_decisions(logged: list[LoggedDecision], options) -> dict[str, list[LoggedDecision]]:
    """Decisions by split name. ``logged`` must be sorted by decision time."""
    if options.splits == "train":
        return {"train": logged}
    times = sorted({entry.decision.decision_time for entry in logged})
    starts = split_starts(times, options)
    splits = {"train": [], "validation": [], "test": []}
    names = list(splits)
    purged = collections.Counter()
    for entry in logged:
        place = bisect.bisect_right(starts, entry.decision.decision_time)
        following = bisect.bisect_left(times, starts[place]) if place < len(starts) else len(times)
        # An outcome that is not known before the next split begins would tell of it: keep it out of this one.
        if options.purge and following < len(times) and entry.label_end >= times[following]:
            purged[names[place]] += 1
        else:
            splits[names[place]].append(entry)
    for name, entries in splits.items():
        first_last = [entries[i].decision.decision_time.date() for i in (0, -1)] if entries else []
        logger.info("%s: %d decisions %s", name, len(entries), " to ".join(map(str, first_last)))
    if purged:
        counts = ", ".join(f"{count} from {name}" for name, count in purged.items())
        logger.warning("Purged %d decision(s) whose options live into the next split: %s.", purged.total(), counts)
    return splits


def split_starts(times: list[datetime.datetime], options) -> list[datetime.datetime]:
    """The times from which validation and test begin."""
    if options.validation_from is not None:
        return [parse_option_time(options, name) for name in ("validation_from", "test_from")]
    train, validation, _ = options.splits
    places = [round(len(times) * train), round(len(times) * (train + validation))]
    never = datetime.datetime.max.replace(tzinfo=UTC)
    return [times[place] if place < len(times) else never for place in places]


def parse_option_time(options, name: str) -> datetime.datetime:
    value = getattr(options, name)
    time = iso_time(value.isoformat() if isinstance(value, datetime.date) else str(value))
    if time is None:
        raise CandidatesError(f"{name}={shown(value)} is not a date such as 2024-01-01.")
    return utc(time)


# ---------------------------------------------------------------------------------------------------------------------
# Records: one dataset row each.


def candidate_records(logged: LoggedDecision, options) -> Iterator[dict]:
    logged = present_in_order(logged, options)
    decision = logged.decision
    for index, (candidate, outcome) in enumerate(zip(decision.candidates, logged.outcomes, strict=True)):
        label = SELL_CALL if index == logged.chosen else SKIP
        hindsight = candidate_hindsight(outcome) if options.hindsight else ""
        yield {
            **shared_columns(decision, logged.chosen, candidate_messages(decision, candidate, hindsight), label),
            **candidate_columns(logged, index),
        }


def ranking_records(logged: LoggedDecision, options) -> Iterator[dict]:
    logged = present_in_order(logged, options)
    decision, chosen = logged.decision, logged.chosen
    traded = chosen is not None
    hindsight = ranking_hindsight(chosen + 1, logged.outcomes[chosen]) if options.hindsight and traded else ""
    yield {
        **shared_columns(decision, chosen, ranking_messages(decision, hindsight), answer_label(chosen)),
        "candidates": [candidate_columns(logged, index) for index in range(len(decision.candidates))],
        "chosen_index": chosen + 1 if traded else None,
    }


def preference_records(logged: LoggedDecision, options) -> Iterator[dict]:
    logged = present_in_order(logged, options)
    pair = preferred_pair(logged, options)
    if pair is None:
        return
    decision, sides = logged.decision, {"chosen": pair.chosen, "rejected": pair.rejected}
    yield {
        "prompt": ranking_messages(decision),
        **{name: [{"role": "assistant", "content": answer_label(pick)}] for name, pick in sides.items()},
        **decision_columns(decision),
        "spot": decision.spot,
        **{f"{name}_label": answer_label(pick) for name, pick in sides.items()},
        "teacher_label": answer_label(logged.chosen),
        **{name: getattr(pair, name) for name in ("chosen_outcome", "rejected_outcome", "source")},
    }


def q_records(logged: LoggedDecision, options) -> Iterator[dict]:
    logged = present_in_order(logged, options)
    for index, net in enumerate(net_outcomes(logged, options)):
        columns = candidate_columns(logged, index)
        for name in ("reward", "max_drawdown_pct"):
            del columns[name]
        yield {
            **decision_columns(logged.decision),
            **columns,
            "sold": index == logged.chosen,
            "q_hold": 0.0,
            "q_sell": net.value,
            "source": net.source,
        }


def shared_columns(decision: Decision, chosen: int | None, messages: list[dict], label: str) -> dict:
    return {
        "messages": [*messages, {"role": "assistant", "content": label}],
        **decision_columns(decision),
        "label": label,
        "trade_executed": chosen is not None,
    }


def decision_columns(decision: Decision) -> dict:
    return {
        "decision_id": decision.decision_id,
        "decision_time": decision.decision_time,
        "underlying": decision.underlying,
        "exit_style": decision.exit_style,
    }


def candidate_columns(logged: LoggedDecision, index: int) -> dict:
    """The candidate's numbers; its recorded outcome is unknown, so null, unless the teacher sold it."""
    known = logged.outcomes[index] if index == logged.chosen else Outcome(None, None, None)
    return {
        **logged.decision.candidates[index]._asdict(),
        "spot": logged.decision.spot,
        **known._asdict(),
        "counterfactual_pnl_vs_hodl": logged.counterfactuals[index].pnl_vs_hodl,
    }


RECORDS = {
    "per_candidate": candidate_records,
    "per_decision_ranking": ranking_records,
    "preference": preference_records,
    "q_values": q_records,
}
CHATS = ("per_candidate", "per_decision_ranking")  # the configs whose records are chats with the teacher's answer


def makes_record(logged: LoggedDecision, options) -> bool:
    if options.name == "preference":
        return preferred_pair(present_in_order(logged, options), options) is not None
    return options.name == "per_decision_ranking" or bool(logged.decision.candidates)


# ---------------------------------------------------------------------------------------------------------------------
# The builder.

MESSAGES = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
DECISION_FEATURES = {
    "decision_id": datasets.Value("string"),
    "decision_time": datasets.Value("timestamp[us, tz=UTC]"),
    "underlying": datasets.Value("string"),
    "exit_style": datasets.Value("string"),
}
CANDIDATE_FEATURES = {
    "instrument": datasets.Value("string"),
    **{
        name: datasets.Value("float64")
        for name in (
            "strike", "dte", "delta", "score", "iv", "ivrv_ratio", "spot", "reward", "pnl_vs_hodl", "max_drawdown_pct",
            "counterfactual_pnl_vs_hodl",
        )
    },
}  # fmt: skip
CHAT_FEATURES = {
    "messages": MESSAGES,
    **DECISION_FEATURES,
    "label": datasets.Value("string"),
    "trade_executed": datasets.Value("bool"),
}
FEATURES = {
    "per_candidate": {**CHAT_FEATURES, **CANDIDATE_FEATURES},
    "per_decision_ranking": {
        **CHAT_FEATURES,
        "candidates": [CANDIDATE_FEATURES],
        "chosen_index": datasets.Value("int32"),
    },
    "preference": {
        **dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES),
        **DECISION_FEATURES,
        "spot": datasets.Value("float64"),
        **dict.fromkeys(("chosen_label", "rejected_label", "teacher_label"), datasets.Value("string")),
        **dict.fromkeys(("chosen_outcome", "rejected_outcome"), datasets.Value("float64")),
        "source": datasets.Value("string"),
    },
    "q_values": {
        **DECISION_FEATURES,
        **{name: kind for name, kind in CANDIDATE_FEATURES.items() if name not in ("reward", "max_drawdown_pct")},
        "sold": datasets.Value("bool"),
        **dict.fromkeys(("q_hold", "q_sell"), datasets.Value("float64")),
        "source": datasets.Value("string"),
    },
}


@dataclass
class CoveredCallCandidatesConfig(datasets.BuilderConfig):
    """Options of all configs.

    Args:
        underlying, exit_style: keep only these rows; None keeps all.
        hindsight: put the teacher's outcomes into the prompt, as its own exporter does. They name the answer.
        candidate_order: "instrument" (by name, then strike), "csv", or "shuffle" (fixed by ``seed`` and decision).
        seed: of the shuffle.
        splits: fractions of the distinct decision times for train, validation and test; "train" for one split.
        validation_from, test_from: dates (UTC) from which these splits begin, in place of the fractions.
        purge: leave out decisions whose outcomes end after the next split has begun.
        duplicates: the same decision in two files is an "error", or the "latest" file's is kept.
        on_bad_rows: "error", or "skip" the whole decision, counted.
        max_iv: an iv above this is taken for a percentage, and is bad; raise it for a market that is so wild.
        fee, fee_cap: fee of a trade as a share of the underlying (Deribit: 0.0003), and the most it is as a share of
            the option's price. Fees, spread and slippage are taken off counterfactuals, at each trade.
        half_spread: what a trade loses to the spread, as a share of the option's price.
        slippage: what a trade loses beside it, as a share of the underlying.
        expiry_tolerance: hours that the spot taken for an expiry may be away from it. Half a day: in a daily file
            without gaps no expiry is farther from a decision, and more would add noise of its own to a week's outcome.
        horizon: days after which a counterfactual's call is bought back; None for its expiry.
        take_profit, roll_delta: of the counterfactuals of tp_and_roll: the share of the premium at which a call is bought back,
            and the delta of the one it is rolled into.
    """

    underlying: str | None = None
    exit_style: str | None = None
    hindsight: bool = False
    candidate_order: str = "instrument"
    seed: int = 0
    splits: tuple[float, float, float] | str = (0.8, 0.1, 0.1)
    validation_from: str | None = None
    test_from: str | None = None
    purge: bool = True
    duplicates: str = "error"
    on_bad_rows: str = "error"
    max_iv: float = 5.0
    fee: float = 0.0
    fee_cap: float = 0.125
    half_spread: float = 0.0
    slippage: float = 0.0
    expiry_tolerance: float = 12.0
    horizon: float | None = None
    take_profit: float = 0.70
    roll_delta: float = 0.25

    def check(self) -> None:
        """Raises CandidatesError for a value that no option takes."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name, allowed[0])
            if not isinstance(value, str) or value not in allowed:
                raise CandidatesError(f"{name}={shown(value)}: choose one of {', '.join(allowed)}.")
        for name in ("hindsight", "purge"):
            if not isinstance(getattr(self, name), bool):
                raise CandidatesError(f"{name}={shown(getattr(self, name))}: give True or False.")
        for name in ("underlying", "exit_style"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise CandidatesError(f"{name}={shown(value)}: give a name as the files have it, or leave it out.")
        if not is_number(self.seed) or isinstance(self.seed, (float, np.floating)):
            raise CandidatesError(f"seed={shown(self.seed)}: give a whole number.")
        if self.hindsight and self.name in ("preference", "q_values"):
            raise CandidatesError(
                f"hindsight is for {' and '.join(CHATS)}, not for {self.name}, where outcomes are to be learnt."
            )
        for name, high in LIMITS.items():
            value = getattr(self, name, None)
            if value is None:
                continue
            if not is_number(value) or not 0 <= value <= high:
                raise CandidatesError(f"{name}={shown(value)}: give a number from 0 to {high:g}.")
        self.check_splits()

    def check_splits(self) -> None:
        default = CoveredCallCandidatesConfig.splits
        fractions = tuple(self.splits) if isinstance(self.splits, (tuple, list)) else ()
        real = [is_number(fraction) and fraction >= 0 for fraction in fractions]
        whole = isinstance(self.splits, str) and self.splits == "train"
        if not whole and (real != [True] * 3 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6)):
            raise CandidatesError(
                f"splits={shown(self.splits)}: give three fractions that add up to 1 (train, validation, test), or "
                '"train".'
            )
        dated = (self.validation_from is not None) + (self.test_from is not None)
        if dated == 1:
            raise CandidatesError("validation_from and test_from go together: give both.")
        if dated and fractions != default:
            raise CandidatesError("Give either splits, or validation_from and test_from.")
        if dated and parse_option_time(self, "validation_from") > parse_option_time(self, "test_from"):
            raise CandidatesError(f"validation_from={self.validation_from} is after test_from={self.test_from}.")


# What may be chosen from; of each the first is the default.
CHOICES = {
    "candidate_order": ("instrument", "csv", "shuffle"), "duplicates": ("error", "latest"),
    "on_bad_rows": ("error", "skip"), "rejected": ("teacher", "worst"),
}  # fmt: skip
# The largest value of each option that is a number from 0.
LIMITS = {
    "max_iv": math.inf, "fee": 1, "fee_cap": 1, "half_spread": 1, "slippage": 1, "expiry_tolerance": 24 * MAX_DTE,
    "horizon": MAX_DTE, "take_profit": 1, "roll_delta": 1, "min_edge": math.inf, "min_edge_pct": 100,
}  # fmt: skip


@dataclass
class PreferenceConfig(CoveredCallCandidatesConfig):
    """Options of ``preference`` beside those of all configs.

    Args:
        rejected: "teacher" sets the best answer against the teacher's (against the worst, where the teacher's is the
            best), "worst" always against the worst.
        min_edge, min_edge_pct: a pair is left out unless its outcomes differ by more than this, in USD and in percent
            of spot.
    """

    rejected: str = "teacher"
    min_edge: float = 0.0
    min_edge_pct: float = 0.1


class CoveredCallCandidates(datasets.GeneratorBasedBuilder):
    """Builds the datasets from candidate CSVs; see CoveredCallCandidatesConfig for the options."""

    BUILDER_CONFIG_CLASS = CoveredCallCandidatesConfig
    BUILDER_CONFIGS = [
        CoveredCallCandidatesConfig(
            name="per_candidate",
            version=datasets.Version("2.0.0"),
            description="One chat a candidate option, answered SELL_CALL or SKIP.",
        ),
        CoveredCallCandidatesConfig(
            name="per_decision_ranking",
            version=datasets.Version("2.0.0"),
            description="One chat a decision, answered with a candidate's index, 1..N, or NO_TRADE.",
        ),
        PreferenceConfig(
            name="preference",
            version=datasets.Version("2.0.0"),
            description="One pair of answers a decision: the one that brought most, and a worse one.",
        ),
        CoveredCallCandidatesConfig(
            name="q_values",
            version=datasets.Version("2.0.0"),
            description="One row of numbers a candidate option, with what selling it brought.",
        ),
    ]
    DEFAULT_CONFIG_NAME = "per_candidate"

    def __init__(self, *args, data_files=None, data_dir=None, base_path=None, hash=None, **options):
        # The library makes a folder's name of it, which it replaces when it prepares the data anew.
        if hash is not None and not re.fullmatch(r"[\w-]+", str(hash)):
            raise CandidatesError(f"hash={shown(hash)}: give letters and digits, or leave it out.")
        base_path = base_path or os.path.dirname(os.path.abspath(__file__))
        options = {name: value for name, value in options.items() if value is not None}
        check_options(options.get("config_name", self.DEFAULT_CONFIG_NAME), options)
        # The library makes its cache key from what it is given here. Resolved files with the hash of their
        # content, and the hash of this code, are what make an edited CSV or prompt give new rows. Its own version
        # is there because an older one cannot read what a newer one wrote: 3.6 knows nothing of the features of 4.
        super().__init__(
            *args,
            data_files=fingerprint(find_csvs(data_files, data_dir, base_path)),
            base_path=base_path,
            hash=f"{hash or CODE_HASH}-datasets-{datasets.__version__}",
            **options,
        )

    def get_exported_dataset_info(self):
        return datasets.DatasetInfo()  # the library would look for it in README.md, and complain that there is none

    def _info(self):
        return datasets.DatasetInfo(
            description=self.config.description, features=datasets.Features(FEATURES[self.config.name])
        )

    def _split_generators(self, dl_manager):
        logged = read_candidates(list(self.config.data_files["train"]), self.config)
        generators = []
        for name, entries in split_decisions(logged, self.config).items():
            entries = [entry for entry in entries if makes_record(entry, self.config)]
            if self.config.name == "preference" and name == "train":
                entries = balance_pairs(entries, self.config)
            if entries:
                generators.append(datasets.SplitGenerator(name=name, gen_kwargs={"shards": cut(entries, SHARDS)}))
            else:  # datasets cannot hold a split without rows
                logger.warning("Split %s is empty, and left out.", name)
        if not generators:
            raise CandidatesError(
                f"No split of {self.config.name} has a record: the files hold no candidate, or no outcome is known, "
                "or the purge took all."
            )
        return generators

    def _generate_examples(self, shards):
        for shard in shards:
            for logged in shard:
                for index, record in enumerate(RECORDS[self.config.name](logged, self.config)):
                    yield f"{record['decision_id']}|{index}", record


def cut(entries: list, parts: int) -> list[tuple]:
    """At most ``parts`` contiguous pieces of nearly equal length."""
    size = math.ceil(len(entries) / parts)
    return [tuple(entries[i : i + size]) for i in range(0, len(entries), size)]


def check_options(name: str, options: dict) -> None:
    """Raises CandidatesError for a value that no option of that config takes, before the library sees it."""
    kind = PreferenceConfig if name == "preference" else CoveredCallCandidatesConfig
    kind(name=name, **{option: value for option, value in options.items() if option in options_of(kind)}).check()


def options_of(kind: type) -> list[str]:
    """The options that load_candidates takes for a kind of config, beside data_files and data_dir."""
    its_own = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    return [field.name for field in dataclasses.fields(kind) if field.name not in its_own]


def find_csvs(data_files: str | Iterable[str] | None, data_dir: str | None, base_path: str) -> list[str]:
    """Absolute paths of the CSVs to read: those named, else those in data/, else the simulated sample."""
    if isinstance(data_files, dict):
        raise CandidatesError(
            "data_files takes a path, a glob or a list of them, not a dict: the splits are made by decision time "
            "(see the options splits, validation_from and test_from)."
        )
    if data_files is not None:
        one = isinstance(data_files, (str, bytes, os.PathLike)) or not hasattr(data_files, "__iter__")
        one = one or getattr(data_files, "ndim", 1) == 0  # an array of numpy's that is one value
        patterns = [data_files] if one else list(data_files)
        if not patterns:
            raise CandidatesError("data_files is an empty list: give a path, a glob, or leave it out.")
        folder = "" if data_dir is None else path_of("data_dir", data_dir)
        patterns = [path_of("data_files", pattern) for pattern in patterns]
        return list(dict.fromkeys(path for pattern in patterns for path in match(pattern, folder)))
    if data_dir is not None:
        return match("*.csv", path_of("data_dir", data_dir), or_gzipped=True)
    for folder, what in (("data", "the CSVs"), (os.path.join("data", "sample"), "the simulated sample")):
        place = glob.escape(os.path.join(base_path, folder))
        found = [path for pattern in CSV_PATTERNS for path in glob.glob(os.path.join(place, pattern))]
        if found:
            logger.warning("No data_files given: reading %s in %s.", what, os.path.join(base_path, folder))
            return sorted(map(os.path.abspath, found))
    raise CandidatesError(f"No {CSV_PATTERNS[0]} in {os.path.join(base_path, 'data')} and no sample: give data_files.")


def path_of(option: str, path) -> str:
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else b""
    if not isinstance(text, str) or "\0" in text or any("\ud800" <= character <= "\udbff" for character in text):
        raise CandidatesError(f"{option}={shown(path)}: give a path, a glob such as 'runs/*.csv', or a list of them.")
    return os.path.expanduser(text)


def match(pattern: str, folder: str = "", or_gzipped: bool = False) -> list[str]:
    """Files that a path or glob names, relative to ``folder`` (no glob) or the current one, sorted."""
    path = os.path.abspath(os.path.join(folder, pattern))
    pattern = os.path.join(glob.escape(os.path.abspath(folder)), pattern)
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    found += glob.glob(pattern + ".gz") if or_gzipped else []
    found = sorted(os.path.abspath(one) for one in found if os.path.isfile(one))
    if not found:
        raise CandidatesError(
            f"No file matches {printable(path, 1_000)}. Give a path, a glob such as 'runs/*.csv', or a list."
        )
    return found


def fingerprint(paths: list[str]) -> DataFilesDict:
    """The files with a hash of their content, where ``datasets`` itself would note the time of change."""
    hashes = []
    for path in paths:
        with open(path, "rb") as file:
            hashes.append((hashlib.file_digest(file, "sha256").hexdigest(),))
    return DataFilesDict({"train": DataFilesList(paths, hashes)})


def load_candidates(
    name: str = "per_candidate", *, data_files=None, cache_dir=None, streaming=False, num_proc=None, **options
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Loads a config on any datasets version, with no trust flag.

    Args:
        name: "per_candidate", "per_decision_ranking", "preference" or "q_values".
        data_files: a path, a glob or a list of them; default ``data/training_candidates_*.csv`` beside this script,
            else the simulated sample.
        cache_dir: where the Arrow files go, default the Hugging Face cache.
        streaming: render while iterating, without a cache.
        num_proc: processes that render.
        options: ``data_dir``, and those of CoveredCallCandidatesConfig (PreferenceConfig for "preference").

    Raises:
        CandidatesError: for files or options that cannot be used.
    """
    check_call(name, options, cache_dir=cache_dir, streaming=streaming, num_proc=num_proc)
    try:
        builder = CoveredCallCandidates(config_name=name, data_files=data_files, cache_dir=cache_dir, **options)
        if streaming:
            return builder.as_streaming_dataset()
        builder.download_and_prepare(num_proc=num_proc)
        return builder.as_dataset()
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise plain_error(error) from error


def check_call(name, options: dict, cache_dir, streaming, num_proc) -> None:
    """Raises CandidatesError for an argument of load_candidates that is none."""
    if not isinstance(name, str) or name not in RECORDS:
        raise CandidatesError(f"{shown(name)} is no config: choose one of {', '.join(RECORDS)}.")
    known = ["data_dir", *options_of(PreferenceConfig if name == "preference" else CoveredCallCandidatesConfig)]
    strange = [option for option in options if option not in known]
    if strange:
        raise CandidatesError(f"{shown(strange[0])[1:-1]} is no option of {name}: choose from {', '.join(known)}.")
    if cache_dir is not None:
        path_of("cache_dir", cache_dir)
    if not isinstance(streaming, bool):
        raise CandidatesError(f"streaming={shown(streaming)}: give True or False.")
    if num_proc is not None and (isinstance(num_proc, bool) or not isinstance(num_proc, int) or num_proc < 1):
        raise CandidatesError(f"num_proc={shown(num_proc)}: give a whole number from 1, or leave it out.")


def plain_error(error: BaseException) -> CandidatesError:
    """What went wrong while files were read or the cache was written, whatever the library made of it."""
    while error.__cause__ is not None and not isinstance(error, (OSError, CandidatesError)):
        error = error.__cause__
    if isinstance(error, CandidatesError):
        return error
    return CandidatesError(
        f"The data cannot be read, or the cache not be written: {error}. Is the disk full, or the file not yours? "
        "cache_dir, or HF_HOME in the environment, says where the cache is."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Export: the same chats as JSON lines, unsplit.


def write_jsonl(path: str, logged: list[LoggedDecision], config: CoveredCallCandidatesConfig) -> collections.Counter:
    """Writes one ``{"messages": [...]}`` a line under a temporary name, renames it, and returns the label counts."""
    labels = collections.Counter()
    hidden = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}")
    for left in glob.glob(f"{glob.escape(hidden)}.*.tmp"):  # by an export that was killed
        if has_ended(left.split(".")[-2]):
            os.unlink(left)
    temporary = f"{hidden}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for entry in tqdm(logged, desc=os.path.basename(path), unit=" decisions", disable=None):
                for record in RECORDS[config.name](entry, config):
                    file.write(json.dumps({"messages": record["messages"]}, ensure_ascii=False) + "\n")
                    labels[record["label"]] += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return labels


def has_ended(process: str) -> bool:
    if os.name != "posix" or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)  # which sends nothing
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return False


def export_paths(source: str, output_dir: str | None) -> dict[str, str]:
    stem = re.sub(r"\.csv(\.gz)?$", "", os.path.basename(source))
    folder = os.path.abspath(output_dir or os.path.dirname(source))
    return {name: os.path.join(folder, f"{stem}_{name}.jsonl") for name in CHATS}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Export candidate CSVs as chat JSON lines: <stem>_per_candidate.jsonl and "
        "<stem>_per_decision_ranking.jsonl, whole and unsplit. The CSVs are only read.",
        epilog="example: python covered_call_candidates.py --input data/sample/*_tp_and_roll_simulated.csv "
        "--output_dir out",
        allow_abbrev=False,
    )
    add, defaults = parser.add_argument, CoveredCallCandidatesConfig
    add("--input", "--data_files", "--data-files", nargs="+", action="extend", required=True, metavar="FILE",
        help="a CSV or a glob; may be given more than once")  # fmt: skip
    add("--output_dir", "--output-dir", metavar="DIR", help="default: beside each input")
    add("--underlying", help="keep only this one, e.g. BTC")
    add("--exit_style", "--exit-style", help="keep only this one, e.g. tp_and_roll")
    add("--hindsight", action="store_true", help="print outcomes in the prompts; they name the answer")
    add("--candidate_order", "--candidate-order", default=defaults.candidate_order,
        choices=["instrument", "csv", "shuffle"], help="default: %(default)s")  # fmt: skip
    add("--seed", type=int, default=defaults.seed, help="of the shuffle, default: %(default)s")
    add("--on_bad_rows", "--on-bad-rows", default=defaults.on_bad_rows, choices=["error", "skip"],
        help="or skip decisions with a bad row, whole; default: %(default)s")  # fmt: skip
    add("--max_iv", "--max-iv", type=float, default=defaults.max_iv, metavar="IV",
        help="an iv above this is taken for a percentage, and is bad; default: %(default)s")  # fmt: skip
    return parser.parse_args(arguments)


def export(arguments: argparse.Namespace) -> None:
    sources = find_csvs(arguments.input, None, os.getcwd())
    targets = [path for source in sources for path in export_paths(source, arguments.output_dir).values()]
    if len(set(targets)) < len(targets):
        raise CandidatesError("Two inputs have the same name, so one export would replace the other. Rename one.")
    names = ("underlying", "exit_style", "hindsight", "candidate_order", "seed", "on_bad_rows", "max_iv")
    options = {name: getattr(arguments, name) for name in names}
    check_options("per_candidate", options)
    # All are read before any is written, so that a bad one leaves every export as it was.
    decisions = {source: read_candidates([source], CoveredCallCandidatesConfig(**options)) for source in sources}
    for source, logged in decisions.items():
        for name, path in export_paths(source, arguments.output_dir).items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            labels = write_jsonl(path, logged, CoveredCallCandidatesConfig(name=name, **options))
            balance = ", ".join(f"{label} {count / labels.total():.1%}" for label, count in labels.most_common())
            print(f"{path}: {labels.total()} records of {len(logged)} decisions ({balance})")


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asked = parse_arguments(arguments)
    try:
        export(asked)
    except (CandidatesError, OSError) as error:
        sys.exit(f"error: {as_typed(error, asked)}")


def as_typed(error: Exception, asked: argparse.Namespace) -> str:
    """A message about options, such as duplicates="latest", as its command line has them: --duplicates latest."""
    value = r"""\((?P<many>.*?)\)|"(?P<one>.*?)"|'(?P<other>.*?)'|[^\s,:;]+"""

    def as_flag(found: re.Match) -> str:
        inner = next((text for text in found.group("many", "one", "other") if text is not None), found[2])
        return f"--{found[1]} {inner.replace(',', '') if found['many'] else inner}"

    return re.sub(rf"(?<![\w/.-])({'|'.join(vars(asked))})=({value})", as_flag, str(error))


if __name__ == "__main__":
    main()
