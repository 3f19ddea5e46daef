"""Files read once, whatever is made of them."""

import pytest
from conftest import decision, no_candidates, write_csv

from covered_call import CandidatesError, load_candidates
from covered_call.candidates import builder
from covered_call.candidates.builder import Backtest
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.records import RECORDS

ROWS = [
    *(one for day in range(40) for one in decision(day, day % 3, dte=3.0, spot=57_000 + 2_000 * (day % 4))),
    no_candidates(41),
]
OPTIONS = {"splits": (0.6, 0.2, 0.2), "horizon": 2.0}


@pytest.fixture
def path(tmp_path) -> str:
    return write_csv(tmp_path / "a.csv", ROWS)


@pytest.fixture
def readings(monkeypatch) -> list[list[str]]:
    """The files of each reading."""
    found, read = [], builder.read_decisions
    monkeypatch.setattr(builder, "read_decisions", lambda files, options: found.append(files) or read(files, options))
    return found


def test_one_reading_serves_every_config_and_gives_the_same_rows(path, tmp_path, readings):
    backtest = Backtest([path], CoveredCallCandidatesConfig(**OPTIONS))
    made = {name: backtest.load(name, cache_dir=str(tmp_path / "once")) for name in RECORDS}
    assert [entry.decision.decision_id for entry in backtest.splits["test"]] and readings == [[path]]
    for name, splits in made.items():
        alone = load_candidates(name, data_files=path, cache_dir=str(tmp_path / "each"), **OPTIONS)
        assert {split: rows.to_list() for split, rows in splits.items()} == {
            split: rows.to_list() for split, rows in alone.items()
        }


def test_what_stands_in_the_cache_is_not_read_at_all(path, tmp_path, readings):
    first = load_candidates("per_candidate", data_files=path, cache_dir=str(tmp_path / "arrow"), **OPTIONS)
    backtest = Backtest([path], CoveredCallCandidatesConfig(**OPTIONS))
    second = backtest.load("per_candidate", cache_dir=str(tmp_path / "arrow"))
    assert len(readings) == 1 and second["train"].to_list() == first["train"].to_list()


def test_options_beside_those_of_the_backtest_are_of_one_config(path, tmp_path, readings):
    backtest = Backtest([path], CoveredCallCandidatesConfig(**OPTIONS))
    few = backtest.load("preference", cache_dir=str(tmp_path / "arrow"), min_edge=500.0)
    more = backtest.load("preference", cache_dir=str(tmp_path / "arrow"), min_edge_pct=0.0)
    assert len(readings) == 1 and len(few["train"]) < len(more["train"])


def test_a_file_that_changes_after_it_was_hashed_is_not_read_as_what_it_was(path, tmp_path):
    backtest = Backtest([path], CoveredCallCandidatesConfig(**OPTIONS))
    assert backtest.hashes.keys() == {path}
    write_csv(tmp_path / "a.csv", ROWS[3:])
    with pytest.raises(CandidatesError, match=r"a\.csv has changed while it was read"):
        backtest.load("per_candidate", cache_dir=str(tmp_path / "arrow"))


def test_a_config_or_an_option_that_there_is_not_is_one_plain_error(path, tmp_path):
    backtest = Backtest([path], CoveredCallCandidatesConfig(**OPTIONS))
    with pytest.raises(CandidatesError, match="'ranking' is no config: choose one of per_candidate"):
        backtest.load("ranking", cache_dir=str(tmp_path / "arrow"))
    with pytest.raises(CandidatesError, match="min_edge is no option of per_candidate"):
        backtest.load("per_candidate", cache_dir=str(tmp_path / "arrow"), min_edge=1.0)
