"""Rendering in parts: the same rows as one machine's, whatever is killed, and nothing of another run among them.

All but the cluster itself is tried without Ray, with tasks that run here one after the other.
"""

import datetime
import json
import os
import random
import sys
import threading
import time as clock
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import COLUMNS, REAL_DATA, ROOT, decision, import_script, needs_real_data, no_candidates, time, write_csv
from hypothesis import given
from hypothesis import strategies as st

from covered_call.candidates import pieces, scale_out
from covered_call.candidates.builder import load_candidates
from covered_call.candidates.decisions import Decisions
from covered_call.candidates.export import main
from covered_call.candidates.options import CHATS, CoveredCallCandidatesConfig
from covered_call.candidates.scale_out import MANIFEST, export_parquet, parts_of_splits
from covered_call.candidates.schema import CandidatesError
from covered_call.candidates.shared_folder import WORK, Folder, find_inputs


class Here:
    """Tasks that run in this process, in another order than they were given; ``limit`` ends it as a kill would."""

    def __init__(self, limit: int | None = None):
        self.limit, self.done = limit, []

    def share(self, value):
        return value

    def each(self, function, calls):
        calls = list(calls)
        random.Random(0).shuffle(calls)
        for call in calls:
            if function is scale_out.render:
                if len(self.done) == self.limit:
                    raise KeyboardInterrupt
                self.done.append(call[0].name)
            yield call, function(*call)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(scale_out, "PART", 60)
    monkeypatch.setattr(pieces, "PIECE", 16)
    monkeypatch.setattr(scale_out, "SAVED_EVERY", 0.0)


@pytest.fixture(scope="module")
def backtest(tmp_path_factory) -> list[str]:
    """Files of two underlyings and two exit styles, side by side in time; one of them is read row by row."""
    folder = tmp_path_factory.mktemp("backtest")
    simulate = import_script(ROOT / "data" / "simulate_backtest.py").simulate_backtest
    first = datetime.datetime.fromisoformat(time(0)).date()
    simulate(folder, 3, first, first + datetime.timedelta(days=119))
    rows = [no_candidates(day, underlying="ETH") for day in range(8, 90, 9)]
    for day in set(range(90)) - set(range(8, 90, 9)):
        cells = {"underlying": "ETH", "spot": 60_000 + 100 * (day % 7), "dte": 5.0}
        rows += decision(day, day % 3 if day % 4 else None, **cells)
    write_csv(folder / "training_candidates_ETH_x.csv", rows)
    return sorted(map(str, folder.glob("*.csv")))


def rows_in(place, name: str) -> dict[str, list[dict]]:
    loaded = datasets.load_dataset("parquet", data_dir=f"{place}/{name}", cache_dir=f"{place}_cache")
    return {split: loaded[split].to_list() for split in loaded}


def assert_equal_to_one_machine(place, paths: list[str], folder: Path, **options) -> None:
    for name in CHATS:
        expected = load_candidates(name, data_files=paths, cache_dir=str(folder / "arrow"), **options)
        loaded = datasets.load_dataset("parquet", data_dir=f"{place}/{name}", cache_dir=str(folder / "parquet"))
        assert list(loaded) == list(expected)
        for split in expected:
            assert loaded[split].features == expected[split].features
            assert loaded[split].data.table.combine_chunks().equals(expected[split].data.table.combine_chunks())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"splits": "train"},
        {"purge": False, "candidate_order": "shuffle", "hindsight": True, "seed": 3},
        {"validation_from": time(60), "test_from": time(90), "fee": 0.0003, "horizon": 3.0},
        {"underlying": "BTC", "settlement": "teacher"},
    ],
)
def test_the_rows_are_those_of_one_machine_in_their_order(backtest, tmp_path, options):
    parts = export_parquet(backtest, str(tmp_path / "out"), CoveredCallCandidatesConfig(**options), Here())
    assert len(parts) > 9
    assert_equal_to_one_machine(tmp_path / "out", backtest, tmp_path, **options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST, *CHATS]
