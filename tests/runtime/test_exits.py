"""When an open call is bought back, and what is sold next: each reason on both sides of its limit."""

import datetime

import pytest
from conftest import on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st

from covered_call.candidates.schema import CandidatesError
from covered_call.runtime.exits import exits_of
from covered_call.runtime.risk import RiskRules, vetoes_of
from covered_call.runtime.state import CLOSE, HOLD, ROLL, SELL_CALL

from .moments import CANDIDATES, DAY, HIGH, LATER, LOW, NOW, account, moment, position, quote

pytestmark = on_the_default_stack

HELD = "BTC-16DEC25-96000-C"  # sold for 1,000, 4 days left, spot 92,000
SECOND = datetime.timedelta(seconds=1)


def exit(style="tp_and_roll", ask: float | None = 500.0, candidates=CANDIDATES, now=NOW, spot=92_000.0, **held):
    state = moment(candidates, [quote(HELD, ask=ask, bid=None)], spot)
    (found,) = exits_of(state, account(positions=(position(**{"instrument": HELD} | held),)), style, now)
    return found


def why(*args, **kwargs):
    found = exit(*args, **kwargs)
    return found.action, found.reason


def test_the_teachers_profit_is_taken_at_the_ask():
    assert why(ask=200.0) == (ROLL, "take_profit")
    assert why(ask=200.01) == (HOLD, "")
    assert why(ask=60.0, entry_price=300.0) == (ROLL, "take_profit")  # 0.2 * 300 is 59.999999999999986 in floats
    assert why(ask=None) == (HOLD, "")


def test_the_teachers_defence():
    assert why(spot=0.98 * 96_000) == (ROLL, "defence")
    assert why(spot=0.98 * 96_000 - 1) == (HOLD, "")
    assert why(spot=99_000.0, ask=None) == (HOLD, "no_ask")
    assert why(spot=99_000.0, ask=200.0) == (ROLL, "take_profit")


@pytest.mark.parametrize("why_not", [{"spot": 99_000.0}, {"ask": 1.0}])
def test_the_teacher_leaves_the_last_two_days_and_the_fourth_call_alone(why_not):
    assert why(days=2.0, **why_not) == (HOLD, "")
    assert why(days=2.0, now=NOW - SECOND, **why_not)[0] == ROLL
    assert why(rolls=2, **why_not)[0] == ROLL
    assert why(rolls=3, **why_not) == (HOLD, "")


def test_a_roll_is_a_buy_back_and_then_a_sale():
    found = exit(ask=150.0, units=-0.3)
    close, sale = found.intentions
    assert found.action == ROLL and found.position.instrument == HELD
    assert (close.action, close.instrument, close.units, close.limit_price) == (CLOSE, HELD, 0.3, 150.0)
    assert (sale.action, sale.instrument, sale.units, sale.limit_price) == (SELL_CALL, LOW, 0.3, 1000.0)
    assert close.reason_codes == ("take_profit",) and sale.reason_codes == ("roll", "take_profit")
    assert sale.replaces == HELD and close.decision_id != sale.decision_id
    assert vetoes_of(sale, moment(), account(positions=(found.position,)), RiskRules(), NOW) == []


def test_what_is_rolled_into_is_the_best_score_of_another_call():
    scores = [one._replace(score=score) for one, score in zip(CANDIDATES, (2.99, 3.0, 2.5), strict=True)]
    assert exit(ask=1.0, candidates=scores).intentions[1].instrument == HIGH
    same = [CANDIDATES[0]._replace(instrument=HELD, score=9.0), CANDIDATES[2]]
    assert exit(ask=1.0, candidates=same).intentions[1].instrument == LATER
    equal = [one._replace(score=3.5) for one in CANDIDATES]
    assert exit(ask=1.0, candidates=equal[::-1]).intentions[1].instrument == LOW


def test_a_chain_ends_where_nothing_is_good_enough():
    poor = [one._replace(score=2.99) for one in CANDIDATES]
    found = exit(ask=1.0, candidates=poor)
    assert (found.action, found.reason, len(found.intentions)) == (CLOSE, "take_profit", 1)
    assert why(ask=1.0, candidates=()) == (CLOSE, "take_profit")


@pytest.mark.parametrize(
    ("days", "spot", "reason"),
    [
        (1.0, 80_000.0, ""),
        (0.99, 80_000.0, "last_day"),
        (2.0, 96_001.0, "in_the_money"),
        (2.01, 96_001.0, ""),
        (2.0, 96_000.0, ""),
        (1.0, 96_000.0, "near_the_money"),
        (1.0, 96_000 / 1.0201, ""),
        (1.0, 96_000 / 1.0199, "near_the_money"),
        (1.01, 95_900.0, ""),
        (7.0, 200_000.0, ""),
    ],
)
def test_the_other_live_agents_rule(days, spot, reason):
    action, found = why("others_live", days=days, spot=spot)
    assert found == reason and action == (ROLL if reason else HOLD)


def test_what_is_rolled_for_its_expiry_is_rolled_into_a_later_one():
    near = CANDIDATES[0]._replace(instrument="BTC-12DEC25-95000-C", dte=0.5, score=9.0)
    found = exit("others_live", days=0.5, instrument="BTC-12DEC25-96000-C", candidates=[near, *CANDIDATES[1:]])
    assert found.reason == "no_ask"
    quotes = [quote("BTC-12DEC25-96000-C")]
    state, held = moment([near, *CANDIDATES[1:]], quotes), position("BTC-12DEC25-96000-C", days=0.5)
    (found,) = exits_of(state, account(positions=(held,)), "others_live", NOW)
    assert found.intentions[1].instrument == HIGH


@given(
    ask=st.none() | st.floats(0.1, 5000),
    spot=st.floats(1e3, 1e6),
    days=st.integers(-9, 300).map(lambda tenths: tenths / 10),
)
def test_who_holds_holds(ask, spot, days):
    found = exit("hold", ask=ask, spot=spot, days=days)
    assert (found.action, found.intentions) == (HOLD, ()) and found.reason == ("" if days > 0 else "expired")


@pytest.mark.parametrize("style", ["tp_and_roll", "others_live"])
def test_what_has_expired_is_for_settlement(style):
    assert why(style, days=0.0, ask=1.0, spot=99_000.0) == (HOLD, "expired")


def test_each_call_of_the_underlying_is_looked_at():
    calls = (
        position(HELD),
        position(LATER, days=14.0, entry_price=9000.0),
        position("ETH-16DEC25-3000-C", underlying="ETH"),
    )
    found = exits_of(moment(quotes=[quote(HELD)]), account(positions=calls), "tp_and_roll", NOW)
    assert [(one.position.instrument, one.action) for one in found] == [(HELD, HOLD), (LATER, ROLL)]
    unquoted = exits_of(moment(spot=99_000.0), account(positions=calls[:1]), "tp_and_roll", NOW)
    assert [(one.action, one.reason) for one in unquoted] == [(HOLD, "no_ask")]


@given(st.permutations(CANDIDATES))
def test_no_order_of_candidates_changes_a_roll(candidates):
    assert exit(ask=1.0, candidates=candidates) == exit(ask=1.0)


def test_a_style_that_is_none():
    with pytest.raises(CandidatesError, match="exit='roll': choose one of hold, tp_and_roll, others_live"):
        exit("roll")
    assert exits_of(moment(), account(), "hold", NOW + DAY) == []
