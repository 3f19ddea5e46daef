"""Files that say what selling each candidate brought, sold or not: what a backtest at real quotes writes."""

import logging

import numpy as np
import pytest
from conftest import decision, write_csv

from covered_call.candidates.columns import logged_of
from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.reading import read_file
from covered_call.candidates.schema import COLUMNS, QUOTED_COLUMNS, CandidatesError

HEADER = (*COLUMNS, *QUOTED_COLUMNS)


def quoted(day: int, values=(100.5, -20.25, ""), days=(7.0, 2.5, ""), sold: int | None = 0, **cells) -> list[dict]:
    """A decision of three candidates with these outcomes."""
    rows = decision(day, sold=sold, **cells)
    for row, value, ends in zip(rows, values, days, strict=True):
        known = {"reward": value, "pnl_vs_hodl": value, "max_drawdown_pct": "", "outcome_days": ends}
        row |= known | {"bid": "800", "ask": "", "mark": "810.5", "open_interest": "12"}
    return rows


def outcomes(path: str, **options):
    columns = read_decisions([path], CoveredCallCandidatesConfig(**{"candidate_order": "csv"} | options)).columns()
    return columns.numbers["counterfactual_pnl_vs_hodl"], (
        columns.label_end - columns.time[columns.decision_of]
    ) / 86.4e9


@pytest.fixture
def path(tmp_path) -> str:
    return write_csv(tmp_path / "quoted.csv", [row for day in range(12) for row in quoted(day)], HEADER)


@pytest.mark.parametrize("style", ["hold_to_expiry", "tp_and_roll"])
def test_outcomes_are_the_files_own_of_every_candidate(style, tmp_path, caplog):
    rows = [row for day in range(12) for row in quoted(day, exit_style=style)]
    with caplog.at_level(logging.WARNING):
        found, days = outcomes(write_csv(tmp_path / "quoted.csv", rows, HEADER))
    assert found[:2].tolist() == [100.5, -20.25] and np.isnan(found[2])
    assert days[:2].tolist() == [7.0, 2.5]  # until then a purge keeps decisions apart
    assert not caplog.records  # and the quotes are columns that are known


def test_one_without_its_days_is_unknown_unless_it_was_sold(tmp_path):
    rows = [row for day in range(12) for row in quoted(day, values=(5, 0, 9), days=(7, 7, ""), sold=0)]
    found, _ = outcomes(write_csv(tmp_path / "quoted.csv", rows, HEADER))
    assert found[:2].tolist() == [5, 0] and np.isnan(found[2])
    rows = [row for day in range(12) for row in quoted(day, values=(5, 0, 9), days=("", 7, 7), sold=0)]
    assert outcomes(write_csv(tmp_path / "quoted.csv", rows, HEADER))[0][:3].tolist() == [5, 0, 9]


def test_a_file_without_the_column_is_computed_whatever_it_says_of_calls_that_were_not_sold(tmp_path):
    """One spoilt cell must not turn all outcomes into what stands there."""
    rows = [row for day in range(12) for row in quoted(day)]
    found, _ = outcomes(write_csv(tmp_path / "plain.csv", [{name: row[name] for name in COLUMNS} for row in rows]))
    assert 100.5 not in found.tolist()


def test_costs_are_taken_off_them(path):
    plain, _ = outcomes(path)
    net, _ = outcomes(path, fee=0.0003)
    fee = 0.0003 * 58466
    assert net[0] == pytest.approx(plain[0] - fee)  # of the sale; the call is not bought back
    assert np.isnan(net[2])


@pytest.mark.parametrize(
    "options", [{"settlement": "intrinsic"}, {"pricing_iv": 0.5}, {"horizon": 2.0}, {"iv_shift": 0.1}]
)
def test_where_others_are_asked_for_they_are_computed(options, path):
    assert outcomes(path, **options)[0][0] != 100.5


def test_the_check_of_computed_outcomes_says_whose_they_are(path):
    said = read_decisions([path], CoveredCallCandidatesConfig()).checks()
    assert said == ["Outcomes of BTC tp_and_roll are those that the files have, of each candidate."]


@pytest.mark.parametrize("days", ["-1", "40000", "soon"])
def test_days_that_cannot_be_are_an_error_with_line_and_column(days, tmp_path):
    rows = quoted(0) + quoted(1, days=(7, days, ""))
    with pytest.raises(CandidatesError, match=f"line 6, column outcome_days: '{days}'"):
        outcomes(write_csv(tmp_path / "quoted.csv", rows, HEADER))


def test_both_readers_say_the_same(path):
    options = CoveredCallCandidatesConfig(candidate_order="csv")
    entries, _ = read_file(path, options, {}, None)
    quick = logged_of(read_decisions([path], options).columns())
    assert [entry.outcomes for entry in entries] == [entry.outcomes for entry in quick]
    assert entries[0].outcomes[0].outcome_days == 7.0
