"""The same picks at other costs and vols, against counting by hand."""

import dataclasses

import numpy as np
import pytest
from conftest import write_csv
from markets import walk

from covered_call.candidates.columns import COUNTERFACTUAL
from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.pricing import black_scholes_call, trading_cost
from covered_call.evaluation.cases import make_cases
from covered_call.evaluation.rows import Row
from covered_call.evaluation.scenarios import (
    FEE,
    HALF_SPREAD,
    LEVELS,
    break_evens,
    comparable_places,
    mean_percents,
    scenarios_of,
    zero_of,
)
from covered_call.resampling import draw

OPTIONS = CoveredCallCandidatesConfig()


@pytest.fixture(scope="module", params=["hold_to_expiry", "tp_and_roll"])
def found(request, tmp_path_factory):
    path = write_csv(tmp_path_factory.mktemp("market") / "market.csv", walk(200, request.param))
    decisions = read_decisions([path], OPTIONS)
    columns = decisions.columns()
    return decisions, columns, scenarios_of(decisions, make_cases(decisions, columns, OPTIONS), OPTIONS)


def test_no_costs_and_the_files_own_vol_are_what_is_computed(found):
    _, columns, scenarios = found
    np.testing.assert_allclose(scenarios.costs[0.0], columns.numbers[COUNTERFACTUAL], rtol=1e-12)
    np.testing.assert_allclose(scenarios.vols[1.0], columns.numbers[COUNTERFACTUAL], rtol=1e-12)


def test_costs_are_those_of_a_load_with_these_options(found):
    decisions, columns, scenarios = found
    options = dataclasses.replace(OPTIONS, half_spread=HALF_SPREAD, fee=FEE)
    if decisions.spool.names[columns.exit_style[0]] == "hold_to_expiry":
        numbers, spot = columns.numbers, columns.spot[columns.decision_of]
        premium = black_scholes_call(spot, numbers["strike"], numbers["dte"] / 365, numbers["iv"])
        lost = trading_cost(premium, spot, options)  # at expiry it settles without costs
        np.testing.assert_allclose(scenarios.costs[1.0], numbers[COUNTERFACTUAL] - lost)
    known = ~np.isnan(scenarios.costs[0.0])
    gross, once, twice = (scenarios.costs[times][known] for times in (0.0, 1.0, 2.0))
    assert (once < gross).all() and (twice < once).all()


def test_a_lower_vol_is_a_lower_premium(found):
    decisions, columns, scenarios = found
    if decisions.spool.names[columns.exit_style[0]] != "hold_to_expiry":
        return
    numbers, spot = columns.numbers, columns.spot[columns.decision_of]
    premiums = [
        black_scholes_call(spot, numbers["strike"], numbers["dte"] / 365, vol * numbers["iv"]) for vol in LEVELS
    ]
    for vol, premium in zip(LEVELS, premiums, strict=True):
        lower = premium - premiums[LEVELS.index(1.0)]
        np.testing.assert_allclose(scenarios.vols[vol], numbers[COUNTERFACTUAL] + lower, atol=1e-6)


def test_at_the_break_even_vol_the_trades_earn_nothing(found):
    decisions, columns, scenarios = found
    cases = make_cases(decisions, columns, OPTIONS)
    places = comparable_places(cases, scenarios, np.arange(len(columns)))
    row = Row("first", np.zeros(len(columns), int), np.full(len(columns), np.nan))
    whole, *years = break_evens([row], scenarios.vols, cases, places)
    assert (whole.year, [one.year for one in years]) == (None, [2024, 2025])
    assert whole.trades == sum(one.trades for one in years) == len(places)
    if decisions.spool.names[columns.exit_style[0]] == "hold_to_expiry":
        rows = columns.offsets[places]
        spot, strike, dte, iv = (
            columns.spot[places],
            *(columns.numbers[name][rows] for name in ("strike", "dte", "iv")),
        )
        paid = black_scholes_call(spot, strike, dte / 365, iv) - cases.computed[rows]
        premium = black_scholes_call(spot, strike, dte / 365, iv * whole.break_even / whole.iv)
        assert np.mean((premium - paid) / spot) == pytest.approx(0, abs=2e-4)


def test_the_zero_lies_on_a_straight_line_and_beyond_the_levels_there_is_none():
    levels = np.array([0.5, 1.0, 2.0])
    assert zero_of(levels, np.array([-3.0, -1.0, 1.0])) == pytest.approx(1.5)
    assert np.isnan(zero_of(levels, np.array([1.0, 2.0, 3.0])))
    assert np.isnan(zero_of(levels, np.array([-3.0, -2.0, -1.0])))


def test_means_are_over_decisions_and_no_trade_brings_nothing(found):
    decisions, columns, scenarios = found
    cases = make_cases(decisions, columns, OPTIONS)
    places = comparable_places(cases, scenarios, np.arange(len(columns)))
    assert 0 < len(places) < len(columns)  # of the last week nothing is known
    picks = np.where(np.arange(len(columns)) % 2, -1, 0)
    rows = [Row("half", picks, np.zeros(0)), Row("random", np.zeros(0, int), np.zeros(0))]
    draws = draw(len(places), 8)
    means = mean_percents(rows, scenarios.costs, columns, places, columns.time[places], draws)
    assert list(means) == ["half"] and list(means["half"]) == [0.0, 1.0, 2.0]
    sold = places[places % 2 == 0]
    expected = 100 * np.sum(cases.computed[columns.offsets[sold]] / columns.spot[sold]) / len(places)
    figure = means["half"][0.0]
    assert figure.low == figure.high == pytest.approx(expected)
    assert figure.interval[0] < expected < figure.interval[1]
