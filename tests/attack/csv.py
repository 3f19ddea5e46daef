"""Mutated candidate files against the reader: each gives what the file says, or one clear error, and never less.

What a mutant should give is read by the second reader. A file that breaks none of its rules must be read as it
stands. Any other is a fault: it must be refused, or, with on_bad_rows="skip", lose whole decisions that are counted;
a decision that is returned must be the one that stood in the file before it was spoilt.
"""

import collections
import gzip
import itertools
import logging
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from conftest import COLUMNS, read_candidates

from covered_call.candidates.builder import load_candidates
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import CandidatesError

from .second_reader import OUTCOMES, Faulty, Said, moment, understand
from .spoiling import Mutant, bases, clip, spoil, text_of

REMEDY = re.compile(
    r"\b(Correct|Save|Leave|Copy|Export|Remove|Give|Rename|Divide|Drop|drop|See|Put|Write|Check|Sort|Add|Quote|Close|Make|Use|Set|"
    r"Split|Keep|Download|Convert|Replace|Shorten|Unpack|no row is left|unclosed quote|has the columns)\b"
)
LONGEST_MESSAGE = 1_500  # characters beside the path
NOT_A_FAULT, HANDLED, UNCLEAR, WRONG = "not a fault", "handled", "unclear", "wrong"


class Heard(logging.Handler):
    """What the reader says while it works. A row of which nobody can tell whose it is may be two that ran into one."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def dropped(self) -> int:
        found = [pair for line in self.lines for pair in re.findall(r"(Dropped|skipped) (\d+)", line)]
        return sum(int(count) * (2 if word == "skipped" else 1) for word, count in found)


def said_by(entries) -> dict[tuple, Said]:
    """The reader's decisions as the second reader has them."""
    found = {}
    for entry in entries:
        rows = (
            (*candidate, *outcome[: len(OUTCOMES)], int(place == entry.chosen))
            for place, (candidate, outcome) in enumerate(zip(entry.decision.candidates, entry.outcomes, strict=True))
        )
        found[tuple(entry.decision[:3])] = Said(entry.decision.spot, tuple(sorted(rows, key=lambda row: row[0])))
    return found


def counterfactuals_of(entries) -> dict[tuple, list]:
    return {
        (*entry.decision[:3], candidate.instrument): counterfactual.pnl_vs_hodl
        for entry in entries
        for candidate, counterfactual in zip(entry.decision.candidates, entry.counterfactuals, strict=True)
    }


FILTERED = {"underlying": 1, "exit_style": 2}  # a filter's place in a key


def left_out(decisions: Iterable[tuple], filters: dict[str, str]) -> set[str]:
    """The names for which a filter, by itself, leaves decisions out."""
    asked = {FILTERED[name]: value for name, value in filters.items()}
    other = [[place for place, value in asked.items() if key[place] != value] for key in decisions]
    return {key[places[0]] for key, places in zip(decisions, other, strict=True) if len(places) == 1}


def kept(decisions: dict[tuple, Said], options: dict) -> dict[tuple, Said]:
    """Those that the filters leave."""
    asked = [(place, options[name]) for name, place in FILTERED.items() if name in options]
    return {key: said for key, said in decisions.items() if all(key[place] == value for place, value in asked)}


def unclear_because(text: str, path: str, row_is_named: bool) -> str | None:
    """What a message lacks."""
    if path not in text:
        return "does not name the file"
    if not text.isprintable():
        return "is not one line of printable text"
    if len(text) - text.count(path) * len(path) > LONGEST_MESSAGE:
        return f"is {len(text)} characters long"
    if row_is_named and not re.search(r"\bline \d+|\blines \d+", text):
        return "does not name the line"
    return None if REMEDY.search(text) else "does not say what to do"


class Case(NamedTuple):
    """A mutant, what its file said before, with the counterfactual outcomes, and what it says now.

    ``now`` is None where the file is at fault; ``left_out`` are the new names that a filter leaves out.
    """

    mutant: Mutant
    before: dict[tuple, Said]
    counterfactuals: dict[tuple, float | None]
    now: dict[tuple, Said] | None
    fault: Faulty | None
    left_out: set[str]

    @property
    def skips(self) -> bool:
        return self.mutant.options["on_bad_rows"] == "skip"


# Else the trades that a mutant lacks may have been those by which the rule of all outcomes is chosen.
RULE = {"settlement": "simulated"}


class Judge:
    """Reads mutants with the reader and compares with what the file said before, and what it says now."""

    def __init__(self, folder: str):
        self.folder, self.heard, self.tables = Path(folder), Heard(), bases()
        self.clean: dict[str, tuple[dict, dict]] = {}

    def before(self, base: str) -> tuple[dict[tuple, Said], dict]:
        """What the file said, by the first reader, with whom the second must agree; and the computed outcomes."""
        if base not in self.clean:
            content = text_of(self.tables[base]).encode()
            entries = read_candidates([self.write("clean.csv", content)], CoveredCallCandidatesConfig(**RULE))
            if understand(content) != said_by(entries):
                raise RuntimeError(f"the two readers disagree on {base}, which nobody has spoilt")
            self.clean[base] = (said_by(entries), counterfactuals_of(entries))
        return self.clean[base]

    def write(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.write_bytes(content)
        return str(path)

    def look_at(self, mutant: Mutant) -> Case:
        before, counterfactuals = self.before(mutant.base)
        filters = {name: value for name, value in mutant.options.items() if name in FILTERED}
        try:
            now, fault = understand(mutant.content, filters), None
        except Faulty as error:
            return Case(mutant, kept(before, filters), counterfactuals, None, error, set())
        new = left_out(now, filters) - left_out(before, filters)
        return Case(mutant, kept(before, filters), counterfactuals, kept(now, filters), fault, new)

    def judge(self, mutant: Mutant, through_load: bool = False) -> tuple[str, str]:
        """A verdict and why."""
        case, path = self.look_at(mutant), self.write("mutant.csv", mutant.content)
        self.heard.lines.clear()
        memory = peak_memory()
        try:
            if through_load:
                load_candidates("q_values", data_files=path, streaming=True, splits="train", **mutant.options)
            entries = read_candidates([path], CoveredCallCandidatesConfig(**RULE, **mutant.options))
        except CandidatesError as error:
            return refused(str(error), path, case)
        except Exception as error:
            return UNCLEAR, f"{type(error).__name__}: {clip(str(error))}"
        if peak_memory() - memory > 200:
            return UNCLEAR, "took more than 200 MB of memory"
        if any(not line.isprintable() or len(line) > LONGEST_MESSAGE + len(path) for line in self.heard.lines):
            return UNCLEAR, "a warning is too long, or not printable"
        return self.compare(entries, case)

    def compare(self, entries, case: Case) -> tuple[str, str]:
        found, expected = said_by(entries), case.before if case.now is None else case.now
        if case.now is not None and found == case.now != case.before:
            said = "".join(self.heard.lines)
            unsaid = [name for name in case.left_out if repr(name)[1:-1] not in said]
            if len(unsaid) > self.heard.dropped():
                return WRONG, f"a filter leaves out {unsaid} without a word"
            return NOT_A_FAULT, ""
        strange = [key for key, said in found.items() if said != expected.get(key)]
        if strange:
            return WRONG, f"{name_of(strange[0])} is not what the file said ({case.fault or 'no fault'})"
        lost = {
            key for key in expected.keys() - found.keys() if case.now is not None or self.is_left(key, case.mutant)
        }
        if lost and (not case.skips or self.heard.dropped() < len(lost)):
            return WRONG, f"{len(lost)} decisions lost, {self.heard.dropped()} counted ({case.fault or 'no fault'})"
        for key, pnl in counterfactuals_of(entries).items():
            if case.now is None and pnl != case.counterfactuals.get(key) and (pnl is not None or not lost):
                return (
                    WRONG,
                    f"the outcome of {key[3]} is {pnl}, and was {case.counterfactuals.get(key)} ({case.fault})",
                )
        return HANDLED, ""

    def is_left(self, key: tuple, mutant: Mutant) -> bool:
        """Whether the file still speaks of a decision; one that is gone with all its rows cannot be missed."""
        table = self.tables[mutant.base]
        own = [row for row in table[1:] if (moment(row[0]), row[1], row[10]) == key]
        if text_of(table).encode().startswith(mutant.content):  # the file ends early
            return any(text_of([row]).encode() in mutant.content for row in own)
        return own[0][0].encode() in mutant.content


def peak_memory() -> float:
    """MB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refused(text: str, path: str, case: Case) -> tuple[str, str]:
    """A verdict on an error."""
    lacks = unclear_because(text, path, type(case.fault) is Faulty and not case.skips and bool(case.before))
    if lacks:
        return UNCLEAR, f"the message {lacks}: {clip(text[:200])}"
    return (HANDLED if case.now in (None, case.before) else NOT_A_FAULT), ""


def name_of(key: tuple) -> str:
    return f"{clip(key[1])} {key[0]:%Y-%m-%d %H:%M} {clip(key[2])}"


def run(count: int, seed: int, report: Callable[[str], None]) -> dict[str, int]:
    """Spoils files until ``count`` faults, or other ways to write the same, have been tried."""
    totals = collections.Counter()
    logger = logging.getLogger("covered_call.candidates")
    with tempfile.TemporaryDirectory(prefix="attack_csv_") as folder:
        judge = Judge(folder)
        logger.addHandler(judge.heard)
        propagated, logger.propagate = logger.propagate, False
        try:
            numbers = itertools.count()
            while totals["tried"] < count:
                number = next(numbers)
                mutant = spoil(judge.tables, seed, number)
                verdict, why = judge.judge(mutant, through_load=number % 100 == 0)
                totals[verdict] += 1
                totals["tried"] += verdict != NOT_A_FAULT
                if verdict in (UNCLEAR, WRONG):
                    which = f"mutant {number} of seed {seed}, {mutant.base}, {mutant.options}"
                    report(f"csv: {verdict}: {which}: {mutant.said}: {why}")
            for verdict, why in bombs(judge):
                totals["tried"] += 1
                totals[verdict] += 1
                if verdict != HANDLED:
                    report(f"csv: {verdict}: {why}")
        finally:
            logger.removeHandler(judge.heard)
            logger.propagate = propagated
    return {name: totals[name] for name in ("tried", HANDLED, UNCLEAR, WRONG, NOT_A_FAULT)}


HEADER = text_of([list(COLUMNS)]).encode()
BOMBS = (("one line", b"", b"x"), ("one row", HEADER, b"1,"), ("one cell", HEADER, b'"' + b"y" * 99))


def bombs(judge: Judge) -> Iterable[tuple[str, str]]:
    """Archives of half a megabyte that unpack to half a gigabyte without a line break."""
    for name, head, piece in BOMBS:
        packed = gzip.compress(head, mtime=0) + gzip.compress(piece * (2**24 // len(piece)), mtime=0) * 32
        path = judge.write("bomb.csv.gz", packed)
        memory, began = peak_memory(), time.monotonic()
        try:
            read_candidates([path], CoveredCallCandidatesConfig())
            verdict = WRONG, f"a bomb of {name} was read"
        except CandidatesError as error:
            lacks = unclear_because(str(error), path, True)
            verdict = (
                (UNCLEAR, f"a bomb of {name}: the message {lacks}: {clip(str(error))}") if lacks else (HANDLED, "")
            )
        except Exception as error:
            verdict = UNCLEAR, f"a bomb of {name}: {type(error).__name__}: {clip(str(error))}"
        grown = peak_memory() - memory
        if verdict[0] == HANDLED and (grown > 100 or time.monotonic() - began > 5):
            verdict = UNCLEAR, f"a bomb of {name} took {grown:.0f} MB and {time.monotonic() - began:.1f} s"
        yield verdict
