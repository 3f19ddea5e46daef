"""Rows that stand under another decision than their own, though each cell is valid: none is lost in silence."""

import csv
import datetime
import random

import pytest
from conftest import (
    REAL_DATA,
    decision,
    needs_real_data,
    on_the_default_stack,
    read_candidates,
    records,
    time,
    write_csv,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import CandidatesError

pytestmark = [
    on_the_default_stack,
    pytest.mark.no_cover,
]  # which coverage slows by half, for lines that other tests run, too

RANKING = "per_decision_ranking"
# A decision a day, of three rows, each day at a spot of its own: lines 2 to 4, 5 to 7, ...
DAYS = 20
ROWS = [cells for day in range(DAYS) for cells in decision(day, day % 3, spot=50_000 + 10 * day)]


def spoilt(changes: dict[int, dict]) -> list[dict]:
    return [cells | changes.get(line, {}) for line, cells in enumerate(ROWS, start=2)]


def days(path: str, **options) -> list[int]:
    found = records(path, RANKING, **options)
    assert all(len(one["candidates"]) == 3 for one in found)
    return sorted((one["decision_time"] - datetime.datetime.fromisoformat(time(0))).days for one in found)


STRAYS = [
    ("amid its own run, at a new time", {9: {"decision_time": time(2.5)}}, 9, "decision_time", [2]),
    ("amid its own run, at another's time", {9: {"decision_time": time(7)}}, 9, "decision_time", [2, 7]),
    ("the last of its run, at a new time", {10: {"decision_time": time(2.5)}}, 10, "decision_time", [2]),
    ("the last of its run, at the next one's time", {10: {"decision_time": time(3)}}, 10, "spot", [2, 3]),
    ("the first of its run, at a far time", {8: {"decision_time": time(9)}}, 8, "decision_time", [2, 9]),
    ("a misspelt exit style", {10: {"exit_style": "tp_and_rol1"}}, 10, "exit_style", [2]),
    ("another underlying", {8: {"underlying": "ETH"}}, 8, "underlying", [2]),
]


@pytest.mark.parametrize(
    "changes, line, column, gone", [case[1:] for case in STRAYS], ids=[case[0] for case in STRAYS]
)
def test_a_stray_row_is_an_error_or_both_its_decisions_are_dropped(tmp_path, caplog, changes, line, column, gone):
    path = write_csv(tmp_path / "a.csv", spoilt(changes))
    for options in ({}, {"underlying": "BTC", "exit_style": "tp_and_roll"}):
        with pytest.raises(CandidatesError, match=r"a\.csv, line \d+, column ") as error:
            records(path, **options)
        assert column in str(error.value)
    assert days(path, on_bad_rows="skip") == [day for day in range(DAYS) if day not in gone]
    assert "Dropped" in caplog.text


def test_a_row_named_otherwise_than_its_columns_is_a_stray_where_all_others_agree(tmp_path):
    def named(day: int) -> list[dict]:
        expiry = datetime.datetime.fromisoformat(time(day + 7))
        rows = decision(day, spot=50_000 + day)
        return [one | {"instrument": f"BTC-{expiry:%d%b%y}-{one['strike']}-C".upper()} for one in rows]

    rows = [cells for day in range(9) for cells in named(day)]
    rows[4] |= {"decision_time": time(5)}
    with pytest.raises(
        CandidatesError, match="line 6, column decision_time: .* does not go with the instrument BTC-09SEP24-63000-C"
    ):
        records(write_csv(tmp_path / "time.csv", rows))
    rows[4] |= {"decision_time": time(1), "strike": "65000"}
    with pytest.raises(CandidatesError, match="line 6, column strike: '65000' does not go with the instrument BTC-"):
        records(write_csv(tmp_path / "strike.csv", rows))
    # Where names mean something else throughout, nothing follows from them.
    assert records(write_csv(tmp_path / "other.csv", [cells | {"dte": "30"} for cells in named(0) + named(1)]))


def test_in_a_file_in_any_order_a_row_of_unknown_decision_is_an_error_in_both_modes(tmp_path):
    rows = spoilt({9: {"decision_time": "?"}})
    random.Random(0).shuffle(rows)
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(CandidatesError, match=r"line \d+: whose row this is cannot be told.*sort the file"):
        records(path, on_bad_rows="skip")


def test_what_filters_leave_out_is_counted_and_named(tmp_path, caplog):
    path = write_csv(tmp_path / "a.csv", [*decision(0), *decision(0, underlying="ETH"), *decision(1)])
    assert len(records(path, underlying="BTC")) == 6
    assert "Left out by underlying='BTC': 'ETH' (3 rows)." in caplog.text


def moved(rows: list[dict], place: int, kind: str, rng: random.Random) -> dict:
    """A row under a time, an underlying or an exit style that is not its own, each valid in itself."""
    cells, times = rows[place], sorted({cells["decision_time"] for cells in rows})
    if kind == "underlying":
        return cells | {"underlying": "ETH"}
    if kind == "exit_style":
        return cells | {"exit_style": rng.choice(["hold_to_expiry", "tp_and_roll", "tp_and_rol1"])}
    if kind == "another's time":
        return cells | {"decision_time": rng.choice(times)}
    shift = datetime.timedelta(minutes=rng.randrange(-5_000, 5_000) * 2 + 1)
    return cells | {"decision_time": (datetime.datetime.fromisoformat(cells["decision_time"]) + shift).isoformat()}


KINDS = ["underlying", "exit_style", "another's time", "a new time"]


def check_no_harm(path, rows: list[dict], place: int, kind: str, rng: random.Random) -> None:
    def load(rows: list[dict], **options) -> dict:
        found = read_candidates([write_csv(path, rows)], CoveredCallCandidatesConfig(**options))
        return {one.decision.decision_id: one[:3] for one in found}

    clean = load(rows)
    spoilt = [*rows[:place], moved(rows, place, kind, rng), *rows[place + 1 :]]
    for options in ({}, {"on_bad_rows": "skip"}, {"exit_style": rows[place]["exit_style"]}):
        try:
            left = load(spoilt, **options)
        except CandidatesError:
            continue
        assert all(clean.get(name) == entry for name, entry in left.items())


@given(st.integers(0, len(ROWS) - 1), st.sampled_from(KINDS), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_no_decision_is_left_a_candidate_short_wherever_a_row_strays(tmp_path, place, kind, rng):
    check_no_harm(tmp_path / "a.csv", ROWS, place, kind, rng)


@needs_real_data
@given(st.integers(0, 299), st.sampled_from(KINDS), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_no_decision_of_a_real_file_is_left_a_candidate_short(tmp_path, place, kind, rng):
    with open(next(REAL_DATA.glob("*hold_to_expiry*.csv")), newline="") as file:
        rows = list(csv.DictReader(file))[:300]
    check_no_harm(tmp_path / "a.csv", rows, place, kind, rng)
