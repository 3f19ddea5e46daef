"""The paper portfolio against counts by hand: fills, fees, settlement, equity and its peaks."""

import json

import numpy as np
import pytest
from conftest import on_the_default_stack

from covered_call.candidates.columns import microseconds
from covered_call.candidates.series import Series
from covered_call.runtime.journal import plain
from covered_call.runtime.paper import (
    BOUGHT_BACK,
    FILLED,
    SETTLED,
    UNFILLED,
    Marked,
    Opened,
    Paper,
    apply,
    apply_all,
    begin,
    buy_back,
    event_of,
    line_of,
    rebuilt,
    sell,
    settle,
)
from covered_call.runtime.state import SELL_CALL, Intention, Quote, Trade
from runtime.markets import BEGUN, DAY, START, call, expiry_after, quoted_state

pytestmark = on_the_default_stack

CALL = call(expiry_after(START, 7), 100_000.0)
QUOTED = {CALL: Quote(CALL, 900.0, 1_000.0, 950.0, 100.0)}
STATE = quoted_state(spot=95_000.0, quotes=QUOTED)
WANTED = Intention(SELL_CALL, "an id", CALL, 0.1)
NOTHING = begin(BEGUN)


def opened(intention: Intention = WANTED, state=STATE) -> Opened:
    execution, (event,) = sell(intention, state)
    assert execution.status == FILLED and isinstance(event, Opened)
    return event


def later(days: float, spot: float, **more):
    return quoted_state(START + days * DAY, spot, **more)


def test_a_call_is_sold_at_the_bid_less_the_fee():
    event = opened()
    fee = 0.1 * 0.0003 * 95_000.0  # of the underlying, which is less than 12.5 % of the price
    assert event.cash_usd == pytest.approx(0.1 * 900.0 - fee)
    position = event.position
    assert position[:3] == (CALL, "BTC", 100_000.0) and position.units == -0.1
    assert position.entry_price == 900.0 and position.entry_fee_usd == pytest.approx(fee)
    assert position.expiry == START + 7 * DAY and position.entry_time == START
    portfolio = apply(NOTHING, event)
    assert portfolio.short_units("BTC") == 0.1 and portfolio.cash_usd == event.cash_usd and not portfolio.trades


def test_the_fee_of_a_cheap_call_is_capped():
    state = STATE._replace(quotes={CALL: Quote(CALL, 8.0, 16.0, 12.0, None)})
    assert opened(state=state).cash_usd == pytest.approx(0.1 * 8.0 * (1 - 0.125))


@pytest.mark.parametrize(
    ("quotes", "limit", "reason"),
    [({}, None, "no bid"), ({CALL: Quote(CALL, None, 1_000.0, 950.0, 1.0)}, None, "no bid"),
     (QUOTED, 900.01, "bid 900.00 is below the limit 900.01")],
)  # fmt: skip
def test_what_nobody_bids_for_is_not_sold(quotes, limit, reason):
    execution, events = sell(WANTED._replace(limit_price=limit), STATE._replace(quotes=quotes))
    assert (execution.status, execution.reason, events) == (UNFILLED, reason, [])
    assert sell(WANTED._replace(limit_price=900.0), STATE)[0].status == FILLED


def test_it_is_bought_back_at_the_ask_and_both_fees_count():
    event = opened()
    state = later(3, 97_000.0, quotes={CALL: Quote(CALL, 500.0, 600.0, 550.0, None)})
    execution, (closed,) = buy_back(event.position, state)
    fees = 0.1 * 0.0003 * (95_000.0 + 97_000.0)
    assert (execution.price, closed.why) == (600.0, BOUGHT_BACK)
    portfolio = apply_all(NOTHING, [event, closed])
    assert portfolio.positions == () and portfolio.cash_usd == pytest.approx(0.1 * (900 - 600) - fees)
    (trade,) = portfolio.trades
    assert trade == Trade(START + 3 * DAY, pytest.approx(portfolio.cash_usd), True)
    assert buy_back(event.position, state, limit=599.0)[0].reason == "ask 600.00 is above the limit 599.00"
    unasked = state._replace(quotes={CALL: Quote(CALL, 500.0, None, 550.0, None)})
    assert buy_back(event.position, unasked)[0] == (UNFILLED, "no ask", None, 0.0)


@pytest.mark.parametrize(("spot", "value", "fee"), [(99_000.0, 0.0, 0.0), (103_000.0, 3_000.0, 0.00015 * 103_000.0),
    (100_010.0, 10.0, 0.125 * 10.0)])  # fmt: skip
def test_at_expiry_it_is_settled_at_its_value_with_the_delivery_fee(spot, value, fee):
    event = opened()
    closed = settle(event.position, spot, START + 7 * DAY)
    entry_fee = 0.1 * 0.0003 * 95_000.0
    assert closed.pnl_usd == pytest.approx(0.1 * (900.0 - value - fee) - entry_fee) and closed.why == SETTLED
    assert apply_all(NOTHING, [event, closed]).cash_usd == pytest.approx(closed.pnl_usd)


def test_what_is_not_held_cannot_be_closed():
    with pytest.raises(ValueError, match="is not held"):
        apply(NOTHING, settle(opened().position, 99_000.0, START))


def marked(portfolio, days, spot, price=None, delta=None):
    return apply(portfolio, Marked(START + days * DAY, {"BTC": spot}, {} if price is None else {CALL: price},
        {} if delta is None else {CALL: delta}))  # fmt: skip


def test_equity_is_what_is_left_if_all_is_bought_back_now():
    portfolio = apply(NOTHING, opened())
    now = marked(portfolio, 1, 96_000.0, 1_100.0, 0.3)
    assert now.equity_usd == pytest.approx(portfolio.cash_usd + 96_000.0 - 0.1 * 1_100.0)
    assert now.net_delta == pytest.approx({"BTC": -0.1 * 0.3}) and now.time == START + DAY
    assert marked(portfolio, 1, 96_000.0).equity_usd is None  # nobody says what the call costs
    assert marked(portfolio, 1, 96_000.0).net_delta == {"BTC": 0}
    assert apply(NOTHING, Marked(START, {}, {}, {})).equity_usd is None


def test_net_deltas_of_two_coins_do_not_add_up():
    event = opened()
    ether = event.position._replace(instrument="ETH-10JAN25-4000-C", underlying="ETH", units=-5.0)
    portfolio = apply_all(NOTHING, [event, event._replace(position=ether)])
    deltas = {CALL: 0.3, ether.instrument: 0.4}
    assert apply(portfolio, Marked(START, {}, {}, deltas)).net_delta == pytest.approx({"BTC": -0.03, "ETH": -2.0})


def test_peaks_are_of_all_times_and_of_the_utc_day():
    hours = [
        (0, 95_000),
        (4 / 24, 97_000),
        (8 / 24, 96_000),
        (16 / 24, 90_000),
        (17 / 24, 91_000),
    ]  # days from 08:00 on
    portfolio, peaks = NOTHING, []
    for days, spot in hours:
        portfolio = marked(portfolio, days, float(spot))
        peaks.append((portfolio.peak_equity_usd, portfolio.day_peak_usd))
    assert peaks == [(95e3, 95e3), (97e3, 97e3), (97e3, 97e3), (97e3, 90e3), (97e3, 91e3)]
    unknown = apply(portfolio, Marked(START + DAY, {}, {}, {}))
    assert (unknown.equity_usd, unknown.peak_equity_usd, unknown.day_peak_usd) == (None, 97e3, 91e3)


def test_the_venue_settles_at_the_first_spot_after_the_expiry_if_that_is_not_late():
    portfolio, venue = apply(NOTHING, opened()), Paper()
    assert venue.settled(portfolio, later(6.9, 103_000.0)) == []
    (closed,) = venue.settled(portfolio, later(7.5, 103_000.0))
    assert closed.price == 3_000.0
    late = later(7.6, 103_000.0, quotes={})
    assert venue.settled(portfolio, late) == []  # by then the price of the expiry is anyone's guess
    stays = apply(portfolio, venue.mark(portfolio, late._replace(quotes={})))
    assert stays.positions and stays.equity_usd is None


def test_closes_say_what_the_price_at_expiry_was_once_they_are_known():
    times = np.array([microseconds(START + number * DAY) for number in range(20)])
    closes = Series(times, 100_000.0 + 100.0 * np.arange(20), np.arange(20))
    portfolio, venue = apply(NOTHING, opened()), Paper({"BTC": closes})
    (closed,) = venue.settled(portfolio, later(9.0, 110_000.0))
    assert closed.price == 700.0 and closed.time == START + 9 * DAY


def test_marks_are_asks_or_the_exchanges_and_those_of_another_market_as_last_seen():
    portfolio, venue = apply(NOTHING, opened()), Paper()
    assert venue.mark(portfolio, STATE).prices == {CALL: 1_000.0}
    unasked = STATE._replace(quotes={CALL: Quote(CALL, 900.0, None, 950.0, None)})
    assert venue.mark(portfolio, unasked).prices == {CALL: 950.0}
    ether = STATE._replace(decision=STATE.decision._replace(underlying="ETH", spot=3_000.0, candidates=()), quotes={})
    spots = {"BTC": 95_000.0, "ETH": 3_000.0}
    assert venue.mark(portfolio, ether) == Marked(START, spots, {CALL: 950.0}, {CALL: 0.25})
    assert venue.mark(portfolio, STATE._replace(quotes={})).prices == {}  # its own market no longer quotes it


def test_events_come_back_from_a_log_as_they_went():
    event = opened()
    events = [
        BEGUN,
        event,
        Marked(START, {"BTC": 0.1 + 0.2}, {CALL: 1 / 3}, {}),
        settle(event.position, 1e5 + 1 / 3, START),
    ]
    lines = [json.loads(json.dumps(plain(line_of(one)))) for one in events]
    assert [event_of(line) for line in lines] == events
    portfolio, last = rebuilt([{"events": lines[:2]}, {}, {"events": lines[2:]}])
    assert portfolio == apply_all(NOTHING, events[1:]) and last == events[2]
