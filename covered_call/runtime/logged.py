"""A log as the decisions it is of: what each meant, what became of that, and what was offered besides."""

import collections
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from covered_call.candidates.schema import CandidatesError, Decision, shown
from covered_call.runtime.fusion import Fusion
from covered_call.runtime.journal import JournalError, files_of, read
from covered_call.runtime.state import SELL_CALL, Quote

NEEDED = ("mode", "time", "state", "portfolio", "proposals", "fusion", "intention", "vetoes", "latencies")
# What became of a candidate. Taken is a sale whose order opened a position, in shadow one that would have been sent.
TAKEN, NOT_FILLED, VETOED, REJECTED, NOT_ASKED = "taken", "not filled", "vetoed", "rejected", "not asked"
FATES = (TAKEN, NOT_FILLED, VETOED, REJECTED, NOT_ASKED)


class Meant(NamedTuple):
    """What became of the sale that a decision came to."""

    fate: str  # TAKEN, NOT_FILLED or VETOED; REJECTED where no sale was meant
    instrument: str | None
    codes: tuple[str, ...] = ()  # of its vetoes; where its size was nothing, why


class Entry(NamedTuple):
    """A decision of a log, with what became of its orders, by their numbers."""

    line: dict
    decision: Decision
    completions: dict[int, dict]

    @property
    def quotes(self) -> dict[str, Quote]:
        return {one["instrument"]: Quote(**one) for one in self.line["state"]["quotes"]}

    @property
    def config(self) -> dict[str, Any]:
        return self.line.get("config", {})

    @property
    def opened(self) -> list[dict]:
        """The positions that the order of its entry opened."""
        its = self.completions.get(self.line["orders"] - 1, {}).get("events", ())
        return [event["position"] for event in its if event["event"] == "opened"]

    @property
    def units(self) -> float:
        """Coins that were sold, or in shadow would have been."""
        return -sum(one["units"] for one in self.opened) if self.line["orders"] else self.line["intention"]["units"]

    @property
    def flat(self) -> bool:
        """Whether no call of the underlying was open."""
        held = self.line["portfolio"]["positions"]
        return all(one["underlying"] != self.decision.underlying for one in held)

    @property
    def meant(self) -> Meant:
        line, instrument = self.line, self.line["intention"]["instrument"]
        if line["intention"]["action"] != SELL_CALL:
            wanted = line["fusion"].get("instrument")
            sized = line.get("sizing") and wanted
            return Meant(VETOED, wanted, tuple(line["intention"]["reason_codes"])) if sized else Meant(REJECTED, None)
        if line["vetoes"]:
            return Meant(VETOED, instrument, tuple(one["code"] for one in line["vetoes"]))
        if not line["orders"]:
            return Meant(TAKEN, instrument)
        return Meant(TAKEN if self.opened else NOT_FILLED, instrument)

    @property
    def proposals(self) -> list[dict]:
        """The language model's first, if there is one; else in the order of the configuration."""
        llm = self.config.get("fusion", {}).get("llm", Fusion.llm)
        return sorted(self.line["proposals"], key=lambda one: one["source"] != llm)

    @property
    def asked(self) -> bool:
        """Whether the first policy was asked, and answered."""
        first = self.proposals[0]
        return first.get("asked", True) and not first["error"]

    def fate_of(self, instrument: str | None) -> str:
        """Of FATES, that of a candidate."""
        meant = self.meant
        if meant.instrument and instrument == meant.instrument:
            return meant.fate
        return REJECTED if self.asked else NOT_ASKED

    @property
    def fate(self) -> str:
        """Of FATES, that of the decision; one without a sale was rejected, if its first policy was asked."""
        return self.fate_of(self.meant.instrument)


class Log(NamedTuple):
    """The decisions of a folder, by time."""

    folder: str
    mode: str
    entries: list[Entry]
    again: int  # decisions that were abandoned and taken anew: the last one counts
    torn: bool  # whether it ends in half a line, which is left out

    @property
    def underlyings(self) -> list[str]:
        return sorted({one.decision.underlying for one in self.entries})


def read_log(folder: str | Path) -> Log:
    """Raises JournalError where there is no log, no decision in it, a line that no agent of this version wrote, or
    decisions of two modes."""
    paths = files_of(Path(folder))
    if not paths:
        raise JournalError(
            f"{folder}: there is no decisions_YYYYMMDD.jsonl. Give the folder that the agent called its Log."
        )
    lines = list(read(folder))
    completions: dict[str, dict[int, dict]] = {}
    cycles: dict[str, dict] = {}
    for line in lines:
        if "completes" in line:
            completions.setdefault(line["completes"], {})[line["order"]] = line
        elif "decision_id" in line:
            cycles[line["decision_id"]] = checked(line, folder)
            completions.pop(line["decision_id"], None)  # those of a decision that was abandoned
    if not cycles:
        raise JournalError(f"{folder}: its log has no whole decision. Let the agent decide, or give another folder.")
    entries = [entry_of(line, completions.get(name, {}), folder) for name, line in cycles.items()]
    again = sum("decision_id" in line for line in lines) - len(entries)
    entries.sort(key=lambda one: (one.decision.decision_time, one.decision.decision_id))
    return Log(str(folder), mode_of(entries, folder), entries, again, is_torn(paths[-1]))


def checked(line: dict, folder: str | Path) -> dict:
    lacking = [name for name in NEEDED if name not in line]
    if lacking:
        raise JournalError(f"{folder}: the line of {shown(line['decision_id'])} has no {', '.join(lacking)}. No agent "
            "wrote it so: mend it, or give another folder.")  # fmt: skip
    return line


def entry_of(line: dict, completions: dict[int, dict], folder: str | Path) -> Entry:
    try:
        return Entry(line, Decision.from_dict(line["state"]["decision"], math.inf), completions)
    except CandidatesError as error:
        raise JournalError(f"{folder}: {line['decision_id']}: {error}") from error


def mode_of(entries: Iterable[Entry], folder: str | Path) -> str:
    counts = collections.Counter(one.line["mode"] for one in entries)
    if len(counts) > 1:
        found = " and ".join(f"{count:,} of {mode}" for mode, count in counts.items())
        raise JournalError(
            f"{folder} has decisions of several modes, {found}: figures of both would mean nothing. Put the lines of "
            "each into a folder of their own."
        )
    return next(iter(counts))


def is_torn(path: Path) -> bool:
    content = path.read_bytes()
    return bool(content) and not content.endswith(b"\n")
