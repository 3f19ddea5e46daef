"""Regimes and buckets against counting by hand."""

import math

import numpy as np
import pytest
from conftest import decision, write_csv

from covered_call.candidates.decisions import Decisions, read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.evaluation.cases import make_cases
from covered_call.evaluation.rows import Row
from covered_call.evaluation.slices import TREND, VOL, buckets, regimes
from covered_call.resampling import draw


def read(rows: list[dict], path) -> Decisions:
    return read_decisions([write_csv(path, rows)], CoveredCallCandidatesConfig())


def test_regimes_look_back_thirty_days_and_no_further_forward(tmp_path):
    spots = [100.0 + day for day in range(60)] + [160.0 - 2 * (day % 2) - day for day in range(60)]
    decisions = read([row for day, spot in enumerate(spots) for row in decision(day, spot=spot)], tmp_path / "a.csv")
    found = regimes(decisions, decisions.columns())
    known = np.arange(len(spots)) >= 30
    up = np.array([day >= 30 and spots[day] >= spots[day - 30] for day in range(len(spots))])
    np.testing.assert_array_equal(found[TREND[0]], up)
    np.testing.assert_array_equal(found[TREND[1]], known & ~up)
    returns = np.diff(np.log(spots))
    vols = np.array(
        [returns[max(0, day - 30) : day].std(ddof=1) if day >= 20 else math.nan for day in range(len(spots))]
    )
    for name, (low, high) in zip(VOL, ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)), strict=True):
        ends = np.nanquantile(vols, [low, high])
        inside = (vols > ends[0] if low else vols >= ends[0]) & (vols <= ends[1])
        np.testing.assert_array_equal(found[name], inside)
    changed = [*spots[:90], *(spot * 3 for spot in spots[90:])]
    later = read([row for day, spot in enumerate(changed) for row in decision(day, spot=spot)], tmp_path / "b.csv")
    np.testing.assert_array_equal(regimes(later, later.columns())[TREND[0]][:90], up[:90])


def test_of_two_underlyings_each_has_its_own_history(tmp_path):
    rows = [row for day in range(40) for row in decision(day, spot=100 + day)]
    rows += [row for day in range(40) for row in decision(day, spot=100 - day, underlying="ETH")]
    decisions = read(rows, tmp_path / "a.csv")
    columns = decisions.columns()
    found = regimes(decisions, columns)
    btc = np.array(columns.names)[columns.underlying] == "BTC"
    assert found[TREND[0]].sum() == (found[TREND[0]] & btc).sum() == 10
    assert found[TREND[1]].sum() == (found[TREND[1]] & ~btc).sum() == 10


def test_buckets_hold_their_lower_end_and_need_ten_trades_for_an_interval(tmp_path):
    deltas = [0.2] * 50 + [0.24] * 3 + [0.25] * 7
    cells = {"strikes": (70000,), "spot": 60000, "pnl_vs_hodl": 600, "iv": ""}
    rows = [row for day, delta in enumerate(deltas) for row in decision(day, 0, delta=delta, **cells)]
    decisions = read(rows, tmp_path / "a.csv")
    columns = decisions.columns()
    cases = make_cases(decisions, columns, CoveredCallCandidatesConfig())
    rows = [Row("teacher", columns.chosen, np.zeros(0)), Row("none", np.full(60, -1), np.zeros(0))]
    rows.append(Row("random", np.zeros(0, int), np.zeros(0)))
    found = buckets(rows, cases, np.arange(60), columns.time, draw(60, 2))
    assert [(one.policy, one.kind, one.low, one.trades) for one in found] == [
        ("teacher", "delta", 0.2, 53), ("teacher", "delta", 0.25, 7), ("teacher", "dte", 7.0, 60),
    ]  # fmt: skip
    assert all(one.percent.low == pytest.approx(1.0) for one in found)
    assert [one.percent.interval is not None for one in found] == [True, False, True]
