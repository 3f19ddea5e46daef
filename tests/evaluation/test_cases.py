"""What each answer would have brought, recorded or computed, and where that is not known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import REAL_DATA, decision, needs_real_data, on_the_default_stack, write_csv
from hypothesis import given
from hypothesis import strategies as st
from markets import day

from covered_call.candidates.columns import COUNTERFACTUAL, columns_of, label_ends
from covered_call.candidates.decisions import Decisions, read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import Candidate, Decision, LoggedDecision, Outcome
from covered_call.candidates.terms import fit_of
from covered_call.evaluation.baselines import fit_baselines
from covered_call.evaluation.cases import (
    Cases,
    difference,
    make_cases,
    outcome,
    regret,
    trusted,
)

pytestmark = on_the_default_stack

OPTIONS = CoveredCallCandidatesConfig()


def read(rows: list[dict], tmp_path) -> Decisions:
    return read_decisions([write_csv(tmp_path / "a.csv", rows)], OPTIONS)


def cases_of(decisions: Decisions) -> Cases:
    return make_cases(decisions, decisions.columns(), OPTIONS)


def hold(number: float, spot: float, sold=None, **cells) -> list[dict]:
    cells = {"exit_style": "hold_to_expiry", "spot": spot, "strikes": (100, 110), "dte": 7.0, "iv": 0.5} | cells
    return decision(number, sold, **cells)


def test_without_iv_an_untaken_call_is_unknown(tmp_path):
    rows = hold(0, 100.0, 0, pnl_vs_hodl=0.0, iv="") + hold(7, 108.0, iv="")
    rows[0]["pnl_vs_hodl"] = "3.5"
    cases = cases_of(read(rows, tmp_path))
    assert [outcome_of(cases, place) for place in (0, 1, None)] == [3.5, None, 0.0]


@pytest.mark.parametrize("style", ["tp_and_roll", "hold_to_expiry"])
@pytest.mark.parametrize("off", [1.0, -1.0])
def test_computed_outcomes_count_only_if_they_follow_the_recorded_ones(style, off):
    recorded = np.linspace(-9.0, 9.0, 12)
    columns = case(0, 1.0, (off, 2.0), style=style).columns
    columns.numbers[COUNTERFACTUAL][:] = (off, 2.0)
    kept = trusted(columns, {("BTC", style): fit_of(off * recorded, recorded)})
    np.testing.assert_array_equal(kept, [math.nan] * 2 if off < 0 else [off, 2.0])
    np.testing.assert_array_equal(trusted(columns, {}), [off, 2.0])


def test_costs_are_taken_off_recorded_outcomes_too(tmp_path):
    """Of a call whose trades cannot be computed nothing is known net of costs: beside net outcomes of others a gross
    one would look better than it is."""
    decisions = read(hold(0, 100.0, 0, iv="") + hold(7, 108.0, 0, iv=""), tmp_path)
    cases = [make_cases(decisions, decisions.columns(), config) for config in (OPTIONS, replace(OPTIONS, fee=0.001))]
    assert [outcome_of(one, 0) for one in cases] == [744.26, None]


def test_bounds_are_the_extremes_recorded_that_year_or_else_in_all_years(tmp_path):
    rows = []
    for number, pnl in ((0, -7.0), (1, 5.0), (130, 9.0)):  # two in 2024, one in 2025
        rows += decision(number, 0, pnl_vs_hodl=pnl)
    rows += decision(500)
    cases = cases_of(read(rows, tmp_path))
    assert cases.worst.tolist() == [-7.0, -7.0, 9.0, -7.0] and cases.best.tolist() == [5.0, 5.0, 9.0, 9.0]


def case(chosen, recorded, computed, worst=-100.0, best=50.0, style="hold_to_expiry") -> Cases:
    """One decision; None is no trade, or an outcome that is not known."""
    candidates = tuple(Candidate(f"C-{place}", 1.0, 7.0, 0.2, 3.0, 0.5, None) for place in range(len(computed)))
    decision = Decision(day(0), "BTC", style, 100.0, candidates)
    columns = columns_of([LoggedDecision(decision, chosen, (Outcome(None, None, None),) * len(computed))])
    known = [np.array(values, float) for values in ([recorded], computed, [worst], [best])]
    vol = columns.numbers["iv"]
    return Cases(columns, *known, vol, np.full(len(vol), 1.0), label_ends(columns))


def pick(place) -> np.ndarray:
    return np.array([-1 if place is None else place])


ONE = np.zeros(1, int)  # the decision that is asked for


def outcome_of(cases: Cases, place, of: int = 0) -> float | None:
    [found] = outcome(cases, np.array([of]), pick(place))
    return None if math.isnan(found) else found


def difference_of(cases: Cases, place, other) -> tuple[float, float]:
    return tuple(difference(cases, ONE, pick(place), pick(other))[0])


def test_all_answers_to_a_decision_are_judged_by_outcomes_of_one_kind():
    computed, recorded = case(0, 10.0, (12.0, 30.0)), case(0, 10.0, (None, 30.0))
    assert [outcome_of(computed, place) for place in (0, 1, None)] == [12.0, 30.0, 0.0]
    assert [outcome_of(recorded, place) for place in (0, 1, None)] == [10.0, None, 0.0]
    assert [outcome_of(case(None, None, (None, 30.0)), place) for place in (0, 1)] == [None, 30.0]
    assert (computed.by_record.tolist(), recorded.by_record.tolist()) == ([False], [True])


@given(
    st.one_of(st.none(), st.integers(0, 2)),
    st.one_of(st.none(), st.floats(-1e3, 1e3)),
    st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), min_size=3, max_size=3),
    st.one_of(st.none(), st.integers(0, 2)),
)
def test_a_difference_is_that_of_the_outcomes_in_the_table(chosen, recorded, computed, place):
    cases = case(chosen, recorded, computed)
    mine, its = outcome_of(cases, place), outcome_of(cases, chosen)
    if mine is not None and its is not None:
        assert difference_of(cases, place, chosen) == pytest.approx((mine - its, mine - its))


def test_a_difference_with_an_unknown_outcome_is_bounds():
    unknown = case(0, 10.0, (None, None))
    assert difference_of(unknown, 0, 0) == (0.0, 0.0)
    assert difference_of(unknown, 1, 0) == (-110.0, 40.0)
    assert difference_of(unknown, 1, None) == (-100.0, 50.0)


def regret_of(cases: Cases, place) -> float:
    return regret(cases, ONE, pick(place))[0]


def test_regret_is_against_the_best_answer_and_unknown_where_one_is():
    assert regret_of(case(0, 10.0, (12.0, 30.0)), 0) == 18.0
    assert regret_of(case(0, 10.0, (12.0, 30.0)), None) == 30.0
    assert regret_of(case(0, 10.0, (-12.0, -30.0)), 1) == 30.0
    assert math.isnan(regret_of(case(0, 10.0, (12.0, None)), 0))
    assert regret_of(case(None, None, ()), None) == 0.0


@needs_real_data
def test_real_trades_are_copied_by_the_score_rule_and_recomputed_by_the_formula(tmp_path):
    files = sorted(map(str, REAL_DATA.glob("training_candidates_*.csv")))
    decisions = read_decisions(files, OPTIONS)
    columns = decisions.columns()
    trades = columns.take(np.flatnonzero(columns.chosen >= 0))
    np.testing.assert_array_equal(fit_baselines(columns)["score rule"].picks(trades), trades.chosen)
    assert len(trades) >= 2 * 122
    for style in ("hold_to_expiry", "tp_and_roll"):
        assert decisions.fits["BTC", style].trades >= 116 and decisions.fits["BTC", style].median_error < 0.01
