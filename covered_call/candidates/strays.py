"""Rows that seem to be another decision's: their time, underlying or exit style is wrong, but valid in itself."""

import bisect
import collections
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from covered_call.candidates.csv_rows import BadRow
from covered_call.candidates.schema import KEY, NO_CANDIDATES, CandidatesError, Decision, shown


@dataclass(slots=True)
class Run:
    """Rows of one decision that stand together in a file; ``key`` is None where it cannot be read whose row it is.

    Of all of them ``line`` (of the first), ``size``, and as text ``spots`` and ``instruments``. Of those that pass the
    filters and can be read ``rows``; how many instruments' names say what they are, ``named``, and which of them
    contradict their rows, ``misnamed``.
    """

    key: Any  # (time, underlying, exit style), or None
    line: int
    wanted: bool
    size: int = 0
    spoilt: bool = False
    named: int = 0
    spots: collections.Counter = field(default_factory=collections.Counter)
    instruments: set = field(default_factory=set)
    rows: list = field(default_factory=list)
    misnamed: list = field(default_factory=list)


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
    return split > 0 and not is_together(split, whole, times.total(), len(times))


def is_together(split: int, whole: int, runs: int, decisions: int) -> bool:
    """Whether so many decisions in pieces are exceptions beside those of several rows that are whole."""
    return whole >= max(3, 2 * split) and runs - decisions <= max(2, RARE * decisions)


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
    if not are_slips(sum(len(run.misnamed) for run in runs), sum(run.named for run in runs)):
        return []
    return [
        Stray(place, owners(runs, place) if column in KEY else [], column, MISNAMED.format(name), line, value)
        for place, run in enumerate(runs)
        for line, column, value, name in run.misnamed
    ]


def are_slips(wrong: int, named: int) -> bool:
    """Whether so many rows that contradict a name are exceptions among all whose names say something."""
    return named >= BESIDE_ONE and 0 < wrong <= max(1, RARE * named)


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
