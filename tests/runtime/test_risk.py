"""What stops an order: each rule on both sides of its limit, what lifts it, and what is only noted."""

import datetime
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
from conftest import on_the_default_stack
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates.schema import CandidatesError
from covered_call.runtime.risk import CODES, RiskRules, notes_of, vetoes_of
from covered_call.runtime.state import CLOSE, HOLD, NO_TRADE, ROLL, Intention

from .moments import CANDIDATES, DAY, LATER, LOW, NOW, account, moment, position, quote, sale, trades

pytestmark = on_the_default_stack

RULES = RiskRules()


def judged(state=None, portfolio=None, intention=None, now=NOW, more=None, asked=vetoes_of, **rules):
    return asked(
        intention or sale(), state or moment(), portfolio or account(), RiskRules(**rules), now, **(more or {})
    )


def codes(*args, **kwargs) -> list[str]:
    return [one.code for one in judged(*args, **kwargs)]


def test_nothing_is_against_a_good_sale():
    assert judged() == []


# ---------------------------------------------------------------------------------------------------------------------
# Each rule, just inside and just outside


class Edge(NamedTuple):
    """A number that a rule looks at, its limit, and a case that has it.

    Args:
        above: whether what lies above the limit is vetoed, or what lies below it.
        at: whether the limit itself is.
        whole: of whole numbers.
        low, high: the range of the numbers.
    """

    build: Callable[[float], dict]
    limit: float
    above: bool
    at: bool
    low: float
    high: float
    whole: bool = False


def with_iv(**limits):
    return lambda v: {"state": moment(atm_iv=v)} | limits


def losses(v):
    return {"portfolio": account(trades=trades(*[50.0] * 10, *[-50.0] * v))}


def wins(v):
    """Of the last 50 trades; none of them ends in a row of losses."""
    return {"portfolio": account(trades=trades(*[50.0] * 9, *[-50.0] * (49 - v), *[0.0] * (v < 50), *[50.0] * v))}


def of_one_expiry(v):
    its = position("BTC-19DEC25-98000-C", -0.2, 7.0)
    return {"portfolio": account(positions=(its,)), "intention": sale(units=v - 0.2), "max_positions": 9,
        "expiry_share": 0.5}  # fmt: skip


def on_the_day(v):
    equity = 100_000 * (1 - v / 100)
    peaks = {"day_peak_usd": 100_000.0, "peak_equity_usd": 100_000.0}
    return {"portfolio": account(equity_usd=equity, **peaks), "daily_drawdown_pct": 5.0, "max_drawdown_pct": 200.0}


EDGES = {
    "kill_switch": Edge(lambda v: {"more": {"killed": v > 0}}, 0, True, False, 0, 1, whole=True),
    "no_equity": Edge(
        lambda v: {"portfolio": account(equity_usd=v, peak_equity_usd=v, day_peak_usd=v)}, 0, False, True, -1e6, 1e6
    ),
    "not_covered": Edge(
        lambda v: {"portfolio": account(positions=(position(units=-0.4),)), "intention": sale(units=v),
            "max_positions": 2, "expiry_share": 9.0}, 0.6, True, False, 0, 9,
    ),
    "max_positions": Edge(
        lambda v: {"portfolio": account(positions=(position(),) * v), "max_positions": 3}, 3, True, True, 0, 8,
        whole=True,
    ),
    "expiry_exposure": Edge(of_one_expiry, 0.5, True, False, 0.2, 1.0),
    "margin": Edge(lambda v: {"portfolio": account(margin_used_pct=v)}, 72, True, True, 0, 100),
    "net_delta": Edge(lambda v: {"portfolio": account(net_delta={"BTC": 0.03 - v})}, 5, True, False, 0, 50),
    "daily_drawdown": Edge(on_the_day, 5, True, True, 0, 90),
    "dd_buffer": Edge(
        lambda v: {"portfolio": account(equity_usd=1e5 * (1 - (1 - v) / 4), peak_equity_usd=1e5)}, 0.2, False, False,
        -1, 1,
    ),
    "consecutive_losses": Edge(losses, 3, True, True, 0, 6, whole=True),
    "win_rate": Edge(wins, 20, False, False, 0, 50, whole=True),
    "spread": Edge(
        lambda v: {"state": moment(quotes=[quote(bid=1000 - 5 * v, ask=1000 + 5 * v)])}, 5, True, False, 0, 150
    ),
    "open_interest": Edge(lambda v: {"state": moment(quotes=[quote(open_interest=v)])}, 50, False, False, 0, 1e4),
    "no_bid": Edge(lambda v: {"state": moment(quotes=[quote(bid=v, ask=1.01 * v)])}, 50, False, False, 1, 1e4),
    "max_iv": Edge(with_iv(max_iv=0.8), 0.8, True, False, 0, 5),
    "min_iv": Edge(with_iv(min_iv=0.3), 0.3, False, False, 0, 5),
    "min_ivrv": Edge(
        lambda v: {"state": moment([CANDIDATES[0]._replace(ivrv_ratio=v)])}, 1.0, False, False, 0, 5
    ),
    "near_level": Edge(
        lambda v: {"state": moment(spot=v, broken_resistance=100_000.0), "near_level": True}, 99_800, True, True, 1e4,
        2e5,
    ),
    "blocked_hours": Edge(
        lambda v: {"now": NOW.replace(hour=v), "blocked_hours": range(14, 24), "max_age_s": 86_400.0,
            "max_clock_skew_s": 86_400.0}, 14, True, True, 0, 23, whole=True,
    ),
    "stale": Edge(lambda v: {"now": NOW + datetime.timedelta(seconds=v)}, 900, True, False, 0, 1e6),
    "drift": Edge(
        lambda v: {"more": {"drift": ["dte 9 (tuned on 7)"] * v}, "drift_stops": True}, 0, True, False, 0, 5,
        whole=True,
    ),
    "duplicate": Edge(
        lambda v: {"more": {"ordered": {sale().decision_id} if v > 0 else {"another"}}}, 0, True, False, 0, 1,
        whole=True,
    ),
}  # fmt: skip
GAP = 1e-6  # no two floats are closer that mean something else: times are whole microseconds


def test_each_rule_has_its_edge():
    assert list(EDGES) == list(CODES)


@pytest.mark.parametrize("code", CODES)
@settings(max_examples=40)
@given(data=st.data())
def test_just_inside_passes_and_just_outside_fails(code, data):
    edge = EDGES[code]
    gap = 1 if edge.whole else GAP * max(1, abs(edge.limit))
    below, above = [(edge.low, edge.limit - gap), (edge.limit + gap, edge.high)]
    good, bad = (below, above) if edge.above else (above, below)
    for (low, high), vetoed in ((good, False), (bad, True), ((edge.limit, edge.limit), edge.at)):
        if low <= high:
            near = high if high <= edge.limit else low
            numbers = st.integers(low, high) if edge.whole else st.floats(low, high)
            for value in (near, data.draw(numbers)):
                found = judged(**edge.build(value))
                assert [one.code for one in found] == [code] * vetoed, value
                assert all(past(one) for one in found)


def past(veto) -> bool:
    """Whether a veto's own numbers say that its limit is broken; what is unknown can keep none."""
    code, value, limit, _ = veto
    if code in ("kill_switch", "duplicate", "blocked_hours"):
        return value == "on" or limit == "once" or str(value) in limit.split(", ")
    if value is None:
        return code in ("no_equity", "no_bid", "spread", "open_interest", "max_iv", "min_iv")
    if code in ("no_equity", "max_positions", "margin", "daily_drawdown", "consecutive_losses", "near_level"):
        return value <= limit if code == "no_equity" else value >= limit - 1e-9
    return value < limit if not EDGES[code].above else value > limit


CHANCES = st.sampled_from([None, 0.0, 0.1, 0.5, 0.9, 1.0, 1.3, 4.0, 49.0, 80.0, 950.0, 1000.0])


@st.composite
def cases(draw) -> dict:
    results = draw(st.lists(st.sampled_from([-10.0, 0.0, 10.0]), max_size=14))
    held = draw(st.lists(st.sampled_from(["BTC-19DEC25-98000-C", "BTC-16DEC25-96000-C"]), max_size=2))
    money = {name: draw(CHANCES) for name in ("equity_usd", "peak_equity_usd", "day_peak_usd", "margin_used_pct")}
    money |= {
        "holdings": {"BTC": draw(st.sampled_from([0.0, 0.1, 1.0]))},
        "net_delta": {"BTC": draw(st.sampled_from([-5, 0]))},
    }
    closed = trades(*results, days_ago=draw(st.sampled_from([1, 9])))
    portfolio = account(**money, positions=tuple(map(position, held)), trades=closed)
    its = quote(bid=draw(CHANCES), ask=draw(CHANCES), open_interest=draw(CHANCES))
    candidate = CANDIDATES[0]._replace(ivrv_ratio=draw(CHANCES))
    state = moment([candidate, *CANDIDATES[1:]], [its], atm_iv=draw(CHANCES), broken_resistance=draw(CHANCES))
    rules = {"max_iv": draw(st.sampled_from([None, 0.8])), "near_level": draw(st.booleans())}
    rules |= {"daily_drawdown_pct": draw(st.sampled_from([0.0, 5.0])), "drift_stops": draw(st.booleans())}
    more = {"killed": draw(st.booleans()), "drift": draw(st.sampled_from([[], ["dte"]]))}
    return {
        "state": state,
        "portfolio": portfolio,
        "more": more,
        "now": NOW + draw(st.sampled_from([0, 1])) * DAY,
    } | rules


@settings(max_examples=200)
@given(case=cases())
def test_who_is_blocked_is_told_numbers_that_are_past_a_limit(case):
    vetoes, notes = judged(**case), judged(**case, asked=notes_of)
    assert all(past(one) and one.text.endswith(".") for one in vetoes)
    assert len({one.code for one in (*vetoes, *notes)}) == len(vetoes) + len(notes)
    assert [one.code for one in vetoes] == sorted((one.code for one in vetoes), key=CODES.index)
    assert (
        codes(**case, without=[one.code for one in vetoes if one.code != "kill_switch"])
        == ["kill_switch"] * (case["more"]["killed"])
    )


# ---------------------------------------------------------------------------------------------------------------------
# Entries and exits


def worst() -> dict:
    """All is against it."""
    held = (position("BTC-19DEC25-98000-C", -1.0, 7.0),)
    bad = account(
        equity_usd=-1.0, peak_equity_usd=1e6, day_peak_usd=1e6, holdings={}, positions=held, margin_used_pct=99.0,
        net_delta={"BTC": -50.0}, trades=trades(*[-9.0] * 12),
    )  # fmt: skip
    quotes = [quote(bid=None, ask=None, open_interest=0.0)]
    candidates = [CANDIDATES[0]._replace(ivrv_ratio=0.1)]
    return {
        "state": moment(candidates, quotes, atm_iv=3.0, broken_resistance=50_000.0), "portfolio": bad,
        "now": NOW + DAY, "more": {"ordered": {sale().decision_id}, "drift": ["dte"], "killed": True},
        "max_iv": 1.0, "min_iv": 4.0, "near_level": True, "blocked_weekdays": ["Sat"], "daily_drawdown_pct": 1.0,
        "drift_stops": True,
    }  # fmt: skip


def test_all_that_is_against_a_sale_is_said():
    assert codes(**worst()) == [code for code in CODES if code != "win_rate"]  # which is of a flat portfolio


@pytest.mark.parametrize("action", [CLOSE, ROLL])
def test_the_kill_switch_alone_stops_an_exit(action):
    exit = Intention(action, "an id", "BTC-16DEC25-96000-C", 0.1, 500.0)
    assert codes(**worst(), intention=exit) == ["kill_switch"]
    assert codes(intention=exit, kill_switch=True) == ["kill_switch"]
    calm = worst() | {"more": {}}
    assert codes(**calm, intention=exit) == [] == judged(**calm, intention=exit, asked=notes_of)


@pytest.mark.parametrize("action", [NO_TRADE, HOLD])
def test_nothing_is_against_doing_nothing(action):
    assert codes(**worst(), intention=Intention(action, "an id")) == []


def test_a_roll_takes_the_place_of_one_position_alone():
    held = account(positions=(position(units=-0.4), position(units=-0.5)))  # of one call, sold twice
    roll = sale(LATER, 0.6, replaces="BTC-16DEC25-96000-C")
    assert codes(portfolio=held, intention=roll, max_positions=2) == ["not_covered"]
    assert codes(portfolio=held, intention=roll._replace(units=0.5), max_positions=2) == []
    assert codes(portfolio=held, intention=roll._replace(units=0.5)) == ["max_positions"]


def test_a_rolls_sale_takes_the_place_of_what_is_bought_back():
    held = account(positions=(position(units=-1.0),))
    assert codes(portfolio=held, intention=sale(LATER, 1.0)) == ["not_covered", "max_positions"]
    roll = sale(LATER, 1.0, replaces="BTC-16DEC25-96000-C")
    assert codes(portfolio=held, intention=roll) == []
    assert codes(portfolio=held, intention=roll._replace(units=1.1)) == ["not_covered", "expiry_exposure"]


def test_what_is_not_offered_cannot_be_sold():
    with pytest.raises(CandidatesError, match="'BTC-19DEC25-99000-C' is to be sold, and is not offered"):
        judged(intention=sale("BTC-19DEC25-99000-C"))


# ---------------------------------------------------------------------------------------------------------------------
# Losses, and what lifts them


def after_losses(**more) -> list[str]:
    return codes(portfolio=account(trades=trades(-5.0, -5.0, -5.0, **more)))


def test_losses_are_forgiven_after_a_while():
    assert after_losses(days_ago=6.999) == ["consecutive_losses"]
    assert after_losses(days_ago=7.0) == []
    past = account(trades=trades(-5.0, -5.0, -5.0, days_ago=2.0))
    assert codes(portfolio=past, loss_cooldown_days=2.0) == []
    assert codes(portfolio=past, consecutive_losses=4) == []
    for last in (0.0, 5.0):
        assert codes(portfolio=account(trades=trades(-5.0, -5.0, -5.0, last))) == []


def test_a_win_on_paper_lifts_losses_and_a_loss_on_paper_does_not_count():
    own = trades(-5.0, -5.0, -5.0, days_ago=3.0)
    paper = {pnl: trades(pnl, paper=True) for pnl in (5.0, 0.0, -5.0)}
    assert codes(portfolio=account(trades=own + paper[5.0])) == []
    for pnl in (0.0, -5.0):
        assert codes(portfolio=account(trades=own + paper[pnl])) == ["consecutive_losses"]
    before = trades(5.0, days_ago=9.0, paper=True)
    assert codes(portfolio=account(trades=before + own)) == ["consecutive_losses"]
    assert codes(portfolio=account(trades=own[1:] + paper[-5.0])) == []


def test_an_account_on_paper_alone_has_losses_too():
    assert after_losses(paper=True) == ["consecutive_losses"]
    assert codes(portfolio=account(trades=trades(-5.0, -5.0, -5.0, 5.0, paper=True))) == []


def test_a_win_rate_is_of_enough_trades_of_a_flat_portfolio():
    nine = (*[-5.0, -5.0, 5.0] * 3,)
    assert codes(portfolio=account(trades=trades(*nine))) == []
    ten = trades(-5.0, *nine)
    assert codes(portfolio=account(trades=ten)) == ["win_rate"]
    assert codes(portfolio=account(trades=ten, positions=(position(),)), max_positions=2) == []
    assert codes(portfolio=account(trades=trades(-5.0, *nine, days_ago=7.0))) == []  # else nothing could lift it
    assert codes(portfolio=account(trades=ten), min_win_rate=0.3) == []
    old = trades(*[5.0] * 50, *[-5.0, -5.0, 5.0] * 16, 0.0, 5.0)
    assert codes(portfolio=account(trades=old)) == ["win_rate"]  # the last 50 count
    assert codes(portfolio=account(trades=old), win_rate_trades=100) == []


# ---------------------------------------------------------------------------------------------------------------------
# What is unknown


def test_what_the_account_or_the_past_does_not_say_is_noted():
    state = moment([CANDIDATES[0]._replace(ivrv_ratio=None)])
    unsaid = account(peak_equity_usd=None, day_peak_usd=None, margin_used_pct=None)
    case = {"state": state, "portfolio": unsaid, "daily_drawdown_pct": 5.0, "near_level": True}
    assert codes(**case) == []
    notes = judged(**case, asked=notes_of)
    assert [one.code for one in notes] == ["margin", "daily_drawdown", "dd_buffer", "min_ivrv", "near_level"]
    assert {one.value for one in notes} == {None} and all("not applied" in one.text for one in notes)
    nan = moment([CANDIDATES[0]._replace(ivrv_ratio=math.nan)])
    assert codes(nan) == [] and "min_ivrv" in [one.code for one in judged(nan, asked=notes_of)]


def test_what_a_quote_does_not_say_stops_a_sale():
    state = moment()._replace(quotes={})
    assert codes(state, max_iv=2.0, min_iv=0.1) == ["spread", "open_interest", "no_bid", "max_iv", "min_iv"]
    assert codes(moment(quotes=[quote(ask=None)])) == ["spread"]
    assert codes(moment(quotes=[quote(bid=0.0, ask=0.0)]), min_premium_usd=0.0) == ["spread", "no_bid"]
    assert codes(portfolio=account(equity_usd=None)) == ["no_equity"]


def test_drift_is_noted_unless_it_is_to_stop():
    case = {"more": {"drift": ["dte 9 (tuned on 7)", "iv 0.4 (tuned on 0.7)"]}}
    assert codes(**case) == []
    note = judged(**case, asked=notes_of)[-1]
    assert note[:3] == ("drift", 2, 0) and "dte 9 (tuned on 7); iv 0.4" in note.text
    assert codes(**case, drift_stops=True) == ["drift"]


# ---------------------------------------------------------------------------------------------------------------------
# Days, hours, names


def test_hours_and_days_are_utc():
    berlin = NOW.astimezone(datetime.timezone(datetime.timedelta(hours=1)))
    assert berlin.hour == 9
    assert codes(now=berlin, blocked_hours=[9]) == []
    assert [one[:3] for one in judged(now=berlin, blocked_hours=[20, 8])] == [("blocked_hours", 8, "8, 20")]
    assert [one[:3] for one in judged(blocked_weekdays=["Sun", "Fri"])] == [("blocked_hours", "Fri", "Fri, Sun")]


def test_a_clock_that_is_off_is_stale():
    for skew in (5.0, -5.0):
        assert codes(more={"clock_skew_s": skew}) == []
        assert codes(more={"clock_skew_s": skew * 1.001}) == ["stale"]
    assert codes(now=NOW - datetime.timedelta(seconds=5)) == []
    ((_, value, limit, text),) = judged(now=NOW - datetime.timedelta(seconds=6))
    assert (value, limit) == (6.0, 5.0) and "clock is 6.0 s off" in text


def test_the_name_says_which_expiry_it_is():
    same = position("BTC-19DEC25-98000-C", -0.95, days=6.6)
    other = position("BTC-20DEC25-98000-C", -0.85, days=7.0)
    assert codes(portfolio=account(positions=(same,), holdings={"BTC": 2.0}), expiry_share=0.5, max_positions=9) == [
        "expiry_exposure"
    ]
    assert codes(portfolio=account(positions=(other,)), max_positions=9) == []
    unnamed = position("call 1", -0.95, days=6.6)  # 18 December
    assert (
        codes(portfolio=account(positions=(unnamed,), holdings={"BTC": 2.0}), expiry_share=0.5, max_positions=9) == []
    )
    elsewhere = position("ETH-19DEC25-98000-C", -5.0, days=7.0, underlying="ETH")
    assert codes(portfolio=account(positions=(elsewhere,))) == []


def test_the_delta_of_a_call_that_is_rolled_does_not_count_against_the_sale_after_it():
    rolled = position(LOW, units=-1.0)  # of delta 0.3 in this chain
    held = account(positions=(rolled,), net_delta={"BTC": -0.3, "ETH": -9.0}, holdings={"BTC": 1.0})
    rules = {"portfolio": held, "max_positions": 9, "max_net_delta": 0.21}
    roll = sale(LATER, 1.0, replaces=LOW)  # of 0.2
    assert codes(intention=roll, **rules) == []
    ((code, value, _, _),) = judged(intention=roll, **rules | {"max_net_delta": 0.19})
    assert code == "net_delta" and value == pytest.approx(0.2)
    # One that this chain does not offer counted as 0 before: taking it away changes nothing.
    other = position("BTC-16DEC25-96000-C", units=-1.0)
    rules["portfolio"] = account(positions=(other,), net_delta={"BTC": 0.0}, holdings={"BTC": 1.0})
    assert codes(intention=sale(LATER, 1.0, replaces=other.instrument), **rules) == []


def test_where_no_resistance_is_broken_the_rule_applies_and_stops_nothing():
    rules = RiskRules(near_level=True)
    for context, noted in (({"broken_resistances": 0}, []), ({"broken_resistances": None}, ["near_level"])):
        state = moment(broken_resistance=None, **context)
        assert vetoes_of(sale(), state, account(), rules, NOW) == []
        notes = [one.code for one in notes_of(sale(), state, account(), rules, NOW)]
        assert [code for code in notes if code == "near_level"] == noted


def test_a_negative_net_delta_counts_as_a_positive_one():
    assert codes(portfolio=account(net_delta={"BTC": 5.02, "ETH": -90.0})) == []
    ((_, value, limit, _),) = judged(portfolio=account(net_delta={"BTC": 5.5, "ETH": -90.0}))
    assert value == pytest.approx(5.47) and limit == 5


def test_rules_that_cannot_be():
    for rules, match in (
        ({"without": ["spreads"]}, "without: 'spreads' is none of blocked_hours, "),
        ({"without": ["kill_switch"]}, "without: 'kill_switch' is none of"),
        ({"blocked_hours": [24]}, "blocked_hours: 24 is none of 0, 1"),
        ({"blocked_weekdays": ["Monday"]}, "blocked_weekdays: 'Monday' is none of"),
        ({"consecutive_losses": 0}, "consecutive_losses=0: give a number above 0, or name its rule in without"),
    ):
        with pytest.raises(CandidatesError, match=match):
            RiskRules(**rules)


def test_a_rule_that_is_off_says_nothing():
    off = [code for code in CODES if code != "kill_switch"]
    assert codes(**worst(), without=off) == ["kill_switch"]
    assert judged(**worst(), without=off, asked=notes_of) == []
