"""What each answer would have brought, recorded or computed, and where that is not known."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
from conftest import REAL_DATA, decision, needs_real_data, read_candidates, write_csv

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.evaluation.baselines import fit_baselines
from covered_call.evaluation.money import (
    Case,
    comparable,
    difference,
    make_cases,
    outcome,
    regret,
    trusted,
    validate,
    validate_styles,
)

OPTIONS = CoveredCallCandidatesConfig()


def logged(rows: list[dict], tmp_path):
    return read_candidates([write_csv(tmp_path / "a.csv", rows)], OPTIONS)


def hold(number: float, spot: float, sold=None, **cells) -> list[dict]:
    cells = {"exit_style": "hold_to_expiry", "spot": spot, "strikes": (100, 110), "dte": 7.0, "iv": 0.5} | cells
    return decision(number, sold, **cells)


def test_without_iv_an_untaken_call_is_unknown(tmp_path):
    rows = hold(0, 100.0, 0, pnl_vs_hodl=0.0, iv="") + hold(7, 108.0, iv="")
    rows[0]["pnl_vs_hodl"] = "3.5"
    case = make_cases(logged(rows, tmp_path))[0]
    assert (outcome(case, 0), outcome(case, 1), outcome(case, None)) == (3.5, None, 0.0)


@pytest.mark.parametrize("style", ["tp_and_roll", "hold_to_expiry"])
@pytest.mark.parametrize("off", [1.0, -1.0])
def test_a_replay_counts_only_if_it_follows_the_recorded_trades(style, off):
    """Settling at expiry is no guess at a rule: there, a bad correlation is flagged, and the outcomes stay."""
    cases = [case(0, value, (off * value, 2.0), style=style) for value in (1.0, 5.0, -9.0)]
    found = validate_styles(cases)
    kept = trusted(cases, found)[0].computed
    assert kept == ((None, None) if off < 0 and style == "tp_and_roll" else (off, 2.0))
    assert ("count as unknown" in found[style].sentence(style)) == (kept == (None, None))
    assert ("WARNING" in found[style].sentence(style)) == (off < 0 and style == "hold_to_expiry")


def test_with_costs_all_outcomes_are_computed_ones(tmp_path):
    """A recorded outcome knows of no cost: beside net ones, the teacher would look better than it is."""
    entries = logged(hold(0, 100.0, 0) + hold(7, 108.0, 0), tmp_path)
    gross, net = comparable(make_cases(entries), OPTIONS), comparable(make_cases(entries), replace(OPTIONS, fee=0.001))
    assert (outcome(gross[0], 0), outcome(net[0], 0)) == (744.26, entries[0].counterfactuals[0].pnl_vs_hodl)


def test_bounds_are_the_extremes_recorded_that_year_or_else_in_all_years(tmp_path):
    rows = []
    for number, pnl in ((0, -7.0), (1, 5.0), (130, 9.0)):  # two in 2024, one in 2025
        rows += decision(number, 0, pnl_vs_hodl=pnl)
    rows += decision(500)
    cases = make_cases(logged(rows, tmp_path))
    assert [(case.worst, case.best) for case in cases] == [(-7.0, 5.0), (-7.0, 5.0), (9.0, 9.0), (-7.0, 9.0)]


def case(chosen, recorded, computed, worst=-100.0, best=50.0, style="hold_to_expiry") -> Case:
    class Stub(NamedTuple):
        exit_style: str = style

    return Case(Stub(), chosen, recorded, computed, worst, best)


def test_the_recorded_outcome_stands_where_policy_and_teacher_agree():
    assert outcome(case(0, 10.0, (12.0, 30.0)), 0) == 10.0
    assert outcome(case(0, 10.0, (12.0, 30.0)), 1) == 30.0
    assert outcome(case(0, None, (12.0, 30.0)), 0) == 12.0


def test_differences_compare_like_with_like():
    both = case(0, 10.0, (12.0, 30.0))
    assert difference(both, 0, 0) == (0.0, 0.0)
    assert difference(both, 1, 0) == (18.0, 18.0)  # 30 - 12, both computed
    assert difference(both, None, 0) == (-10.0, -10.0)  # recorded
    assert difference(both, 1, None) == (30.0, 30.0)


def test_a_difference_with_an_unknown_outcome_is_bounds():
    unknown = case(0, 10.0, (None, None))
    assert difference(unknown, 0, 0) == (0.0, 0.0)
    assert difference(unknown, 1, 0) == (-110.0, 40.0)
    assert difference(unknown, 1, None) == (-100.0, 50.0)


def test_regret_is_against_the_best_answer_and_unknown_where_one_is():
    assert regret(case(0, 10.0, (12.0, 30.0)), 0) == 18.0
    assert regret(case(0, 10.0, (12.0, 30.0)), None) == 30.0
    assert regret(case(0, 10.0, (-12.0, -30.0)), 1) == 30.0
    assert math.isnan(regret(case(0, 10.0, (12.0, None)), 0))
    assert regret(case(None, None, ()), None) == 0.0


def test_the_formula_is_validated_and_a_bad_one_flagged():
    good = [case(0, value, (value + 1.0,)) for value in (1.0, 5.0, -9.0)]
    found = validate(good)
    assert (found.trades, found.median_error, found.median_outcome) == (3, 1.0, 5.0)
    assert found.mean_error == pytest.approx(1.0) and found.correlation == pytest.approx(1.0)
    assert "WARNING" not in found.sentence("hold_to_expiry")
    bad = [case(0, value, (other,)) for value, other in ((1.0, 5.0), (5.0, 1.0), (2.0, 2.0))]
    assert "WARNING: the correlation is below 0.95" in validate(bad).sentence("hold_to_expiry")
    assert "WARNING" in validate(good[:1]).sentence("hold_to_expiry")  # one trade shows nothing
    assert "unchecked" in validate([case(None, None, ())]).sentence("hold_to_expiry")


@needs_real_data
def test_real_trades_are_copied_by_the_score_rule_and_recomputed_by_the_formula(tmp_path):
    files = sorted(map(str, REAL_DATA.glob("training_candidates_*.csv")))
    entries = read_candidates(files, OPTIONS)
    trades = [entry for entry in entries if entry.chosen is not None]
    rule = fit_baselines(entries)["score rule"]
    assert rule([entry.decision for entry in trades]) == [entry.chosen for entry in trades]
    assert len(trades) >= 2 * 122
    found = validate_styles(make_cases(entries))
    assert found["hold_to_expiry"].correlation >= 0.98
    assert not found["tp_and_roll"].follows  # that backtest rolls by another rule than the replay
