"""How much is sold: by each method, in whole contracts, never above what is free or what the risk allows."""

import math

import numpy as np
import pytest
from conftest import on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from covered_call.candidates.schema import CandidatesError
from covered_call.runtime.risk import vetoes_of
from covered_call.runtime.sizing import METHODS, SizingRules, kelly_share, loss_95, payoff_ratio, round_down, size

from .moments import CANDIDATES, LOW, NOW, account, moment, position, quote, said, sale
from .test_risk import RULES

pytestmark = on_the_default_stack

FREE = {"max_risk_pct": None}


def sized(confidence=0.8, state=None, portfolio=None, payoff=None, **rules):
    return size(said("q", LOW, confidence), state or moment(), portfolio or account(), SizingRules(**rules), payoff)


def test_kellys_rule_by_hand():
    assert kelly_share(0.63, 1.5) == pytest.approx(0.3833, abs=5e-5)
    found = sized(0.63, portfolio=account(holdings={"BTC": 100.0}), payoff=1.5, method="half_kelly", step=1e-4, **FREE)
    assert found.units == pytest.approx(19.1666) and found.wanted == pytest.approx(100 * 0.1917, abs=5e-3)
    assert found.kelly == pytest.approx(0.3833, abs=5e-5) and found.code == ""
    assert kelly_share(0.4, 1.5) == pytest.approx(0) and kelly_share(0.3, 1.5) < 0 and kelly_share(1.0, 0.1) == 1
    assert kelly_share(0.63, None) is None


def test_half_kelly_is_of_what_is_free():
    portfolio = account(holdings={"BTC": 10.0}, positions=(position(units=-5.0),))
    found = sized(0.63, portfolio=portfolio, payoff=1.5, method="half_kelly", **FREE)
    assert (found.units, found.free) == (0.9, 5.0)  # of 0.9583


@pytest.mark.parametrize(("win", "payoff"), [(0.4, 1.5), (0.3, 1.5), (0.0, 9.0)])
def test_a_bet_not_to_take_is_no_trade(win, payoff):
    found = sized(win, payoff=payoff, method="half_kelly")
    assert (found.units, found.code) == (0.0, "kelly")
    assert sized(0.99, method="half_kelly")[:2] == (0.0, "unknown_payoff")


def test_gains_over_losses():
    outcomes = np.array([30.0, 60.0, -20.0, -40.0, 0.0, math.nan])
    assert payoff_ratio(outcomes) == pytest.approx(1.5)
    assert payoff_ratio(outcomes[:2]) is payoff_ratio(outcomes[2:]) is payoff_ratio(outcomes[:0]) is None


def test_a_fixed_size_and_a_share_of_what_is_held():
    assert sized(**FREE).units == 0.1
    assert sized(units=0.37, **FREE).units == 0.3
    portfolio = account(holdings={"BTC": 2.0}, positions=(position(units=-0.5),))
    assert sized(portfolio=portfolio, method="holdings_share", share=0.25, **FREE).units == 0.5
    assert sized(portfolio=portfolio, method="holdings_share", **FREE).units == 1.5  # what is free
    assert sized(portfolio=portfolio, units=9.0, **FREE).units == 1.5


def test_whole_contracts_are_rounded_down():
    for units, step, expected in (
        (0.3, 0.1, 0.3), (0.7, 0.1, 0.7), (0.1 + 0.2, 0.1, 0.3), (0.29999, 0.1, 0.2), (0.0999, 0.1, 0.0),
        (1.99, 1.0, 1.0), (-0.5, 0.1, 0.0), (12.34, 0.01, 12.34),
    ):  # fmt: skip
        assert round_down(units, step) == expected
    ether = moment()._replace(decision=moment().decision._replace(underlying="ETH"))
    found = sized(state=ether, portfolio=account(holdings={"ETH": 2.9}), method="holdings_share", **FREE)
    assert found.units == 2.0


def test_what_is_less_than_a_contract_is_too_small():
    for portfolio in (
        account(holdings={}),
        account(holdings={"BTC": 0.09}),
        account(positions=(position(units=-2.0),)),
    ):
        found = sized(portfolio=portfolio, **FREE)
        assert (found.units, found.code) == (0.0, "too_small")
    assert sized(units=0.05, **FREE).code == "too_small"


def test_another_underlying_needs_its_step():
    state = moment()._replace(decision=moment().decision._replace(underlying="SOL"))
    with pytest.raises(CandidatesError, match="step: the least contract of 'SOL' is not known"):
        sized(state=state)
    held = account(holdings={"SOL": 50.0})
    assert sized(state=state, portfolio=held, units=25.0, step=10.0, **FREE).units == 20.0


# ---------------------------------------------------------------------------------------------------------------------
# Risk


def test_what_a_call_may_lose_by_hand():
    """At 92,000, strike 95,000, 7 days, iv 0.5: spot is 11.4 % up at 1.65 deviations, of a bid of 1,000."""
    deviation = 0.5 * math.sqrt(7 / 365)
    spot = 92_000 * math.exp(1.65 * deviation)
    d1 = math.log(spot / 95_000) / deviation + deviation / 2
    value = spot * norm.cdf(d1) - 95_000 * norm.cdf(d1 - deviation)
    assert loss_95(CANDIDATES[0], moment()) == pytest.approx(value - 1000)
    assert 6_000 < value - 1000 < 8_500
    without = moment(quotes=[quote(bid=None)])
    d1 = math.log(92_000 / 95_000) / deviation + deviation / 2
    worth = 92_000 * norm.cdf(d1) - 95_000 * norm.cdf(d1 - deviation)
    assert loss_95(CANDIDATES[0], without) == pytest.approx(value - worth)
    assert loss_95(CANDIDATES[0]._replace(iv=None), moment()) is None


def test_a_size_loses_no_more_than_a_share_of_the_equity():
    rich = account(holdings={"BTC": 50.0}, equity_usd=1e6)
    found = sized(portfolio=rich, units=50.0)
    loss = loss_95(CANDIDATES[0], moment())
    assert found.at_risk == pytest.approx(0.02 * 1e6 / loss) and found.units == math.floor(10 * found.at_risk) / 10
    assert sized(portfolio=rich, units=50.0, max_risk_pct=4.0).units >= 2 * found.units
    assert sized(portfolio=account(equity_usd=10_000.0)).code == "too_small"
    dear = moment(quotes=[quote(bid=50_000.0)])
    assert sized(state=dear, portfolio=rich, units=50.0)[:2] == (50.0, "")  # which cannot lose


@pytest.mark.parametrize("equity", [None, 0.0, -5.0])
def test_a_risk_that_is_unknown_is_no_trade(equity):
    assert sized(portfolio=account(equity_usd=equity)).code == "unknown_risk"
    blank = moment([CANDIDATES[0]._replace(iv=None)])
    assert sized(state=blank)[:2] == (0.0, "unknown_risk") and sized(state=blank, **FREE).units == 0.1


@given(
    st.sampled_from(METHODS), st.floats(0, 1), st.floats(0, 30), st.floats(0, 20), st.floats(0.01, 50),
    st.none() | st.floats(0.1, 20), st.floats(0.1, 9), st.sampled_from([0.01, 0.1, 1.0]),
)  # fmt: skip
def test_no_size_is_above_its_limits(method, confidence, held, short, units, risk, payoff, step):
    positions = (position(units=-short),) if short else ()
    portfolio = account(holdings={"BTC": held}, positions=positions)
    rules = {"method": method, "units": units, "max_risk_pct": risk, "step": step}
    found = sized(confidence, portfolio=portfolio, payoff=payoff, **rules)
    assert (found.units > 0) == (found.code == "")
    assert found.units / step == pytest.approx(round(found.units / step))
    order = sale(LOW, found.units)
    if found.units:
        assert found.units <= min(found.free, found.wanted) + 1e-9
        assert found.at_risk is None or found.units <= found.at_risk + 1e-9
        vetoes = vetoes_of(order, moment(), portfolio, RULES, NOW)
        assert "not_covered" not in [one.code for one in vetoes]


def test_rules_that_cannot_be():
    for rules, match in (
        ({"method": "kelly"}, "method='kelly': choose one of fixed, holdings_share, half_kelly"),
        ({"units": 0.0}, "units=0.0: give a number above 0"),
        ({"step": math.nan}, "step=nan"),
        ({"max_risk_pct": -2}, "max_risk_pct=-2"),
    ):
        with pytest.raises(CandidatesError, match=match):
            SizingRules(**rules)


def test_what_is_not_offered_cannot_be_sized():
    with pytest.raises(CandidatesError, match="is to be sold, and is not offered"):
        size(said("q", "BTC-19DEC25-99000-C", 0.9), moment(), account(), SizingRules())
