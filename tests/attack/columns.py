"""The fast way of reading against the row parser: the same decisions, the same words, the same error, on any file."""

import contextlib
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from covered_call.candidates import csv_blocks, decisions
from covered_call.candidates.columns import logged_of
from covered_call.candidates.csv_blocks import Doubt
from covered_call.candidates.csv_rows import check_header
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import CandidatesError

from .csv import Heard
from .spoiling import bases, spoil

BLOCKS = (200, 1_000, 5_000, csv_blocks.BLOCK)  # bytes: small ones are cut amid decisions


def run(count: int, seed: int, report: Callable[[str], None]) -> dict[str, int]:
    """Reads so many mutants both ways; ``not a fault`` counts those that the fast way took."""
    tables, totals = bases(), {"tried": count, "handled": 0, "unclear": 0, "wrong": 0, "not a fault": 0}
    with tempfile.TemporaryDirectory(prefix="attack_columns_") as folder:
        path = Path(folder) / "candidates.csv"
        for number in range(count):
            mutant = spoil(tables, seed, number)
            path.write_bytes(mutant.content)
            options = CoveredCallCandidatesConfig(**mutant.options)
            block = random.Random(f"{seed}|{number}").choice(BLOCKS)
            with mock.patch.object(csv_blocks, "BLOCK", block), taken() as files:
                fast = outcome(path, options)
            with row_by_row():
                slow = outcome(path, options)
            totals["handled" if fast == slow else "wrong"] += 1
            totals["not a fault"] += bool(files)
            if fast != slow:
                report(f"columns: wrong: mutant {number} of seed {seed}, {mutant.base}: {mutant.said}: {fast} {slow}")
    return totals


def outcome(path: Path, options: CoveredCallCandidatesConfig) -> tuple[Any, list[str]]:
    """The decisions of a file, or the error, and what was said meanwhile."""
    heard, logger = Heard(), logging.getLogger("covered_call.candidates")
    logger.addHandler(heard)
    propagated, logger.propagate = logger.propagate, False
    try:
        return logged_of(decisions.read_decisions([str(path)], options).columns()), heard.lines
    except CandidatesError as error:
        return str(error), heard.lines
    except Exception as error:  # of numbers that should have been refused: never what the other way says
        return repr(error), heard.lines
    finally:
        logger.removeHandler(heard)
        logger.propagate = propagated


@contextlib.contextmanager
def row_by_row() -> Iterator[None]:
    def doubt(*arguments):
        raise Doubt("asked for")

    with mock.patch.object(decisions, "scan", doubt):
        yield


@contextlib.contextmanager
def taken() -> Iterator[list[str]]:
    """The files that the fast way takes."""
    found: list[str] = []

    def check(path: str, header: list[str], own: Sequence[str]) -> list[str]:
        found.append(path)
        return check_header(path, header, own)

    with mock.patch.object(decisions, "check_header", check):
        yield found
