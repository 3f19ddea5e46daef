"""Options that mean nothing are one plain error each, whatever their type; what they mean is done."""

import argparse
import datetime
import errno
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import decision, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates import builder
from covered_call.candidates.builder import load_candidates
from covered_call.candidates.options import CoveredCallCandidatesConfig, PreferenceConfig, check_options, names_of
from covered_call.candidates.schema import CandidatesError
from covered_call.command_line import as_typed


@pytest.fixture
def csv_file(tmp_path) -> str:
    return write_csv(tmp_path / "a.csv", [cells for day in range(4) for cells in decision(day, 0)])


STRANGE = [
    5, -1, 10**40, 1.5, float("nan"), True, "", "?", "\x1b[2J", b"x", Path("x"), [1], (), {}, {"a": 1}, {1, 2},
    range(3), np.array([0.8, 0.1, 0.1]), np.float64(-1), np.bool_(True), datetime.date(2024, 9, 2), print, object(),
    iter([1]),
]  # fmt: skip


@pytest.mark.parametrize("option", [*names_of(PreferenceConfig), "data_files", "data_dir", "no_such_option"])
@pytest.mark.parametrize("value", STRANGE, ids=lambda value: re.sub(r" at 0x\w+", "", repr(value))[:30])
def test_an_option_is_taken_or_refused_with_its_name(csv_file, tmp_path, monkeypatch, option, value):
    prepared = []
    monkeypatch.setattr(builder.CoveredCallCandidates, "download_and_prepare",
                        lambda self, **_: prepared.append(self))  # fmt: skip
    monkeypatch.setattr(builder.CoveredCallCandidates, "as_dataset", lambda self: None)
    try:
        load_candidates("preference", cache_dir=tmp_path, **{"data_files": csv_file} | {option: value})
    except CandidatesError as error:
        assert str(error).isprintable() and (option in str(error) or "No file matches" in str(error))
    else:
        assert prepared


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"name": ["per_candidate"]}, r"\['per_candidate'\] is no config"),
        ({"cache_dir": 5}, "cache_dir=5: give a path"),
        ({"num_proc": 0}, "num_proc=0: give a whole number from 1"),
        ({"streaming": "yes"}, "streaming='yes': give True or False"),
        ({"no_such": 1}, "no_such is no option of per_candidate: choose from data_dir, underlying"),
        ({"min_edge": 1}, "min_edge is no option of per_candidate"),
        ({"hash": "../../.."}, "hash is no option"),
    ],
)
def test_an_argument_of_load_candidates_that_is_none_is_refused(csv_file, arguments, said):
    with pytest.raises(CandidatesError, match=said):
        load_candidates(**{"data_files": csv_file} | arguments)


def test_a_hash_can_name_no_folder_but_its_own(csv_file, tmp_path):
    for hash in ("../..", "/etc", "a/b", "", "a b"):
        with pytest.raises(CandidatesError, match="hash=.*give letters and digits"):
            builder.CoveredCallCandidates(data_files=csv_file, cache_dir=tmp_path, hash=hash)


def test_numbers_and_dates_of_other_libraries_are_numbers_and_dates(csv_file, load):
    fractions = load(data_files=csv_file, splits=[np.float64(0.5), 0.25, 0.25], fee=np.float32(0.001), purge=False)
    dates = load(data_files=csv_file, validation_from=datetime.date(2024, 9, 3), test_from="2024-09-04", purge=False)
    assert [len(split) for split in fractions.values()] == [len(split) for split in dates.values()] == [6, 3, 3]


def test_a_folder_with_brackets_in_its_name_is_no_pattern(load, tmp_path):
    folder = tmp_path / "a[1]"
    folder.mkdir()
    write_csv(folder / "b.csv", decision(0, 0))
    for options in (
        {"data_dir": folder},
        {"data_dir": str(folder), "data_files": "b.csv"},
        {"data_dir": folder, "data_files": "*.csv"},
    ):
        assert len(load(splits="train", **options)["train"]) == 3


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "denied")])
@pytest.mark.parametrize("where", ["before", "while writing"])
def test_a_cache_that_cannot_be_written_is_one_plain_error(csv_file, load, monkeypatch, error, where):
    def fail(*_, **__):
        raise error

    name = "download_and_prepare" if where == "before" else "_generate_tables"
    monkeypatch.setattr(builder.CoveredCallCandidates, name, fail)
    with pytest.raises(CandidatesError, match=r"or the cache not be written: .*HF_HOME in the environment"):
        load(data_files=csv_file)


@given(st.text(max_size=30), st.integers() | st.floats() | st.none() | st.lists(st.integers()))
@settings(max_examples=100)
def test_no_text_or_number_makes_another_error_than_ours(text, value):
    for name in names_of(CoveredCallCandidatesConfig):
        for tried in (text, value):
            try:
                check_options("per_candidate", {name: tried})
            except CandidatesError as error:
                assert name in str(error) or "splits" in str(error) or "go together" in str(error)


@pytest.mark.parametrize(
    "said, words",
    [
        ('keep the later with duplicates="latest" (by', "keep the later with --duplicates latest (by"),
        ("See them with on_bad_rows='error'.", "See them with --on_bad_rows error."),
        ("line 2: 'x=1' is bad, y=2", "line 2: 'x=1' is bad, y=2"),
        ("splits=(0.5, 0.6): give three", "--splits 0.5 0.6: give three"),
        ("horizon=-1.0: give a number", "--horizon -1.0: give a number"),
        ("runs/horizon=3.csv, line 2: other=1", "runs/horizon=3.csv, line 2: other=1"),
        ("underlying='BTC' and exit_style='roll'", "--underlying BTC and --exit_style roll"),
    ],
)
def test_a_command_names_options_as_its_command_line_does(said, words):
    asked = argparse.Namespace(**dict.fromkeys(names_of(PreferenceConfig)))
    assert as_typed(CandidatesError(said), asked) == words
