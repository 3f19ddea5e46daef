"""Orders on the testnet: where they may go, what is sent, and what becomes of them. The exchange is on 127.0.0.1."""

import datetime
import logging
import socket
import time
import types
from decimal import Decimal

import pytest
from conftest import on_the_default_stack
from market.standin import TOO_MANY_REQUESTS, Exchange, Fault

from covered_call.candidates.schema import CandidatesError, named_call
from covered_call.market import deribit
from covered_call.market.deribit import Outage
from covered_call.runtime import broker, testnet
from covered_call.runtime.broker import BrokerRules, DeribitTestnet, label_of, on_tick, tick_at, whole_steps
from covered_call.runtime.paper import FILLED, PARTLY, UNFILLED, Begun, Closed, apply_all, begin
from covered_call.runtime.state import CLOSE, SELL_CALL, Intention, Portfolio, Quote
from covered_call.runtime.testnet import KEY as KEY_NAME
from covered_call.runtime.testnet import SECRET as SECRET_NAME
from covered_call.runtime.testnet import Account, Halt, check_host, connected

from .account import (
    INDEX,
    KEY,
    NOT_FOUND,
    NOT_OPEN,
    POST_ONLY,
    SECRET,
    TOO_LITTLE,
    UNAUTHORISED,
    AccountExchange,
    calls,
)
from .moments import moment

pytestmark = on_the_default_stack

TERMS = {
    "tick_size": 0.0001,
    "tick_size_steps": [{"above_price": 0.005, "tick_size": 0.0005}],
    "min_trade_amount": 0.1,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What waits for an exchange in seconds waits less for one that is on this machine."""
    for module, name, value in ((broker, "POLL", 0.01), (broker, "VALID", 0.2), (broker, "ON_THE_WAY", 0.05),
            (testnet, "VALID", 0.2), (testnet, "ON_THE_WAY", 0.05), (testnet, "WAITS", (0.01, 0.02, 0.05)),
            (deribit, "WAITS", (0.01, 0.02, 0.05))):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def exchange():
    with AccountExchange() as exchange:
        exchange.summaries = {"BTC": calls()}
        yield exchange


def account(exchange: Exchange, secret: str = SECRET) -> Account:
    client = Account(KEY, secret, standin=exchange.url)
    client.api.enableRateLimit = False
    return client


def venue_of(exchange, tmp_path, **rules) -> DeribitTestnet:
    known = {"fill_timeout": 0.15, "reprices": 2} | rules
    return DeribitTestnet(account(exchange), BrokerRules(**known), ["BTC"], (tmp_path / "KILL").exists)


def name_of(exchange, place: int = 1) -> str:
    return exchange.summaries["BTC"][place]["instrument_name"]


def sale(exchange, units: float = 0.2, decision: str = "BTC|one", **more) -> Intention:
    return Intention(SELL_CALL, decision, name_of(exchange), units, **more)


def held(exchange, units: float = 0.2):
    return broker.position_of_call(name_of(exchange), -units, 1_000.0, moment().decision.decision_time)


def methods(exchange) -> list[str]:
    return [method for method, _ in exchange.requests]


def sent(exchange, method: str) -> list[dict]:
    return [params for name, params in exchange.requests if name == method]


# --- Where requests may go


@pytest.mark.parametrize(
    "url",
    [
        "https://www.deribit.com",
        "https://deribit.com",
        "http://test.deribit.com",
        "https://test.deribit.com:8443",
        "https://test.deribit.com.evil.com",
        "https://test.deribit.com@evil.com",
        "https://evil.com/test.deribit.com",
        "https://evil.com#test.deribit.com",
        "https://test.deribit.com\\@evil.com",
        "https://test-deribit.com",
        "https://tеst.deribit.com",  # noqa: RUF001 a Cyrillic letter
        "https://history.test.deribit.com",
        "http://127.0.0.1:80",
        "",
        None,
    ],
)
def test_no_other_host_than_the_testnet_is_taken(url, monkeypatch):
    with pytest.raises(Halt, match="is not https://test.deribit.com"):
        check_host(url)
    monkeypatch.setattr(socket, "create_connection", no_socket)
    monkeypatch.setattr(Account, "url", url)
    with pytest.raises(Halt, match="Nothing was sent"):
        Account(KEY, SECRET)


def no_socket(*_, **__):
    raise AssertionError("a socket was opened")


@pytest.mark.parametrize("standin", ["http://10.0.0.1:80", "https://www.deribit.com", "http://127.0.0.1.evil.com:80"])
def test_what_stands_in_for_the_exchange_in_tests_is_on_this_machine(standin, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", no_socket)
    with pytest.raises(Halt, match="is not https://test.deribit.com"):
        Account(KEY, SECRET, standin=standin)


def test_without_a_stand_in_the_address_is_the_testnets_and_the_session_knows_no_other(monkeypatch):
    asked = []
    monkeypatch.setattr(Account, "ask", lambda self, method, **_: asked.append((method, self.api.secret)))
    client = Account(KEY, SECRET)
    assert client.url == "https://test.deribit.com" and client.api.isSandboxModeEnabled
    assert asked == [("publicGetGetTime", None)]  # before there is a key
    session = client.api.session
    assert list(session.adapters) == ["https://test.deribit.com/"] and not session.trust_env
    monkeypatch.setattr(socket, "create_connection", no_socket)
    client.api.urls = {**client.api.urls, "api": {"rest": "https://www.deribit.com"}}
    with pytest.raises(Halt, match="www.deribit.com' is not https"):
        client.ask_once("privateGetSell")


def test_a_redirect_is_not_followed_to_another_host(exchange):
    client = account(exchange)
    with Exchange() as other:

        def led_away(handler, *_):
            handler.send_response(302)
            handler.send_header("Location", f"{other.url}/api/v2/private/get_positions")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        exchange.server.RequestHandlerClass.do_GET = led_away
        with pytest.raises(Halt, match="was led away"):
            client.ask("privateGetGetPositions", currency="BTC")
        assert not other.requests


def test_a_host_that_does_not_say_that_it_is_the_testnet_gets_no_key(exchange):
    exchange.testnet = False
    with pytest.raises(Halt, match="does not say of itself that it is the testnet"):
        account(exchange)
    assert methods(exchange) == ["get_time"]


def test_keys_are_of_the_environment_alone(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", no_socket)
    monkeypatch.delenv(KEY_NAME, raising=False)
    monkeypatch.setenv(SECRET_NAME, "")
    with pytest.raises(Halt, match="has no DERIBIT_TESTNET_KEY and no DERIBIT_TESTNET_SECRET"):
        connected()


def test_wrong_credentials_halt_and_no_message_has_them(exchange, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(Halt, match="does not take the key of DERIBIT_TESTNET_KEY") as error:
        account(exchange, "another secret").ask("privateGetGetPositions", currency="BTC")
    exchange.faults = lambda number: Fault(content='{"error": {"code": 13009, "message": "' + KEY + SECRET + '"}, '
        '"testnet": true}', status=400)  # fmt: skip
    with pytest.raises(Halt) as quoted:
        Account.ask(account_of_now(exchange), "privateGetGetPositions", currency="BTC")
    causes = repr((error.value.__cause__, quoted.value.__cause__))
    for text in (str(error.value), str(quoted.value), causes, caplog.text):
        assert KEY not in text and SECRET not in text and "another secret" not in text
    assert UNAUTHORISED == 13009


def account_of_now(exchange) -> Account:
    """One that was connected before the faults of now."""
    faults, exchange.faults = exchange.faults, lambda number: None
    client = account(exchange)
    exchange.faults = faults
    return client


# --- Prices and amounts


def test_ticks_and_steps_are_those_of_the_exchange():
    assert tick_at(TERMS, Decimal("0.0049")) == Decimal("0.0001") and tick_at(TERMS, Decimal("0.005")) == Decimal(
        "0.0001"
    )
    assert tick_at(TERMS, Decimal("0.0051")) == Decimal("0.0005")
    assert on_tick(TERMS, Decimal("0.00421"), broker.ROUND_CEILING) == Decimal("0.0043")
    assert on_tick(TERMS, Decimal("0.0521"), broker.ROUND_FLOOR) == Decimal("0.0520")
    assert on_tick({"tick_size": 0.01}, Decimal("0.052"), broker.ROUND_CEILING) == Decimal("0.06")
    assert whole_steps(TERMS, 0.3) == Decimal("0.3") and whole_steps(TERMS, 0.1 + 0.2) == Decimal("0.3")
    assert whole_steps(TERMS, 0.09) == 0 and whole_steps(TERMS | {"min_trade_amount": 1}, 2.7) == 2


BOOK = broker.Book(Decimal("0.0100"), Decimal("0.0140"), Decimal("0.0115"), 100_000.0, TERMS)


@pytest.mark.parametrize(
    ("price", "share", "least", "wanted"),
    [
        ("mid", 0, None, "0.0120"), ("mid", 0.5, None, "0.0115"), ("mid", 1, None, "0.0105"),
        ("mark", 0, None, "0.0115"), ("bid", 0, None, "0.0105"), ("bid", 1, None, "0.0105"),
        ("mid", 1, 1_310.0, "0.0135"),  # never below the limit of the intention
    ],
)  # fmt: skip
def test_a_sale_comes_down_to_a_tick_above_the_bid_and_never_takes(price, share, least, wanted):
    assert broker.sale_price(BOOK, price, share, least) == Decimal(wanted)


@pytest.mark.parametrize(
    ("price", "share", "most", "wanted"),
    [
        ("mid", 0, None, "0.0120"),
        ("mid", 1, None, "0.0140"),
        ("mark", 0, None, "0.0115"),
        ("mid", 1, 1_310.0, "0.0130"),
    ],
)
def test_a_buy_back_goes_up_to_the_ask_and_not_above_its_limit(price, share, most, wanted):
    assert broker.purchase_price(BOOK, price, share, most) == Decimal(wanted)


def test_without_somebody_on_the_other_side_there_is_no_price():
    nobody = BOOK._replace(bid=None, ask=None)
    assert broker.sale_price(nobody, "mid", 0, None) == "no bid"
    assert broker.sale_price(BOOK._replace(ask=None), "mid", 0, None).startswith("nobody asks")
    assert broker.purchase_price(nobody, "mid", 0, None) == "no ask"


@pytest.mark.parametrize(
    ("rules", "message"),
    [({"price": "best"}, "choose one of mid, bid, mark"), ({"fill_timeout": 0}, "give seconds above 0"),
        ({"reprices": 1.5}, "whole number from 0"), ({"on_difference": "ignore"}, "halt, adopt")],
)  # fmt: skip
def test_rules_that_cannot_be_are_said(rules, message):
    with pytest.raises(CandidatesError, match=message):
        BrokerRules(**rules)


# --- Orders


def test_a_sale_is_a_labelled_post_only_limit_and_what_it_brings_is_of_its_trades(exchange, tmp_path):
    execution, (opened,) = venue_of(exchange, tmp_path).sell(sale(exchange), moment(), rolls=2)
    (order,) = sent(exchange, "sell")
    assert order["label"] == label_of("BTC|one") and order["post_only"] == order["reject_post_only"] == "true"
    assert order["type"] == "limit" and order["amount"] == "0.2" and "reduce_only" not in order
    price, fee = float(order["price"]) * INDEX, 0.2 * 0.0003 * INDEX
    assert execution.status == FILLED and execution.price == pytest.approx(price)
    assert execution.fee_usd == pytest.approx(fee) and opened.cash_usd == pytest.approx(0.2 * price - fee)
    position = opened.position
    assert (position.units, position.rolls, position.instrument) == (-0.2, 2, name_of(exchange))
    assert (position.underlying, position.strike, position.expiry) == named_call(position.instrument)
    assert sent(exchange, "ticker") and not sent(exchange, "edit")


def test_the_same_decision_twice_is_one_order(exchange, tmp_path):
    venue = venue_of(exchange, tmp_path)
    first, _ = venue.sell(sale(exchange), moment(), 0)
    again, _ = venue_of(exchange, tmp_path).sell(sale(exchange), moment(), 0)
    assert len(exchange.orders) == 1 and first.price == again.price
    venue.sell(sale(exchange, decision="BTC|two"), moment(), 0)
    assert len(exchange.orders) == 2


def test_one_that_is_known_by_its_trades_alone_is_found(exchange, tmp_path):
    venue = venue_of(exchange, tmp_path)
    venue.sell(sale(exchange), moment(), 0)
    for answer in ([], NOT_FOUND):  # it has forgotten
        exchange.get_order_state_by_label = lambda currency, label, answer=answer: answer
        venue.sell(sale(exchange), moment(), 0)
    assert len(exchange.orders) == 1


def test_it_is_priced_again_towards_the_bid_and_then_cancelled(exchange, tmp_path):
    exchange.matching = lambda order: 0.0
    exchange.summaries["BTC"][1] |= {"bid_price": 0.010, "ask_price": 0.014}
    execution, events = venue_of(exchange, tmp_path).sell(sale(exchange), moment(), 0)
    (order,) = exchange.orders.values()
    prices = [float(one["price"]) for one in sent(exchange, "sell") + sent(exchange, "edit")]
    assert prices == [0.012, 0.0115, 0.0105] and order["order_state"] == "cancelled"
    assert execution.status == UNFILLED and not events and execution.reason == "at 0.012, 0.0115, 0.0105"


def test_a_part_that_is_filled_is_kept(exchange, tmp_path):
    exchange.matching = lambda order: 0.1
    execution, (opened,) = venue_of(exchange, tmp_path).sell(sale(exchange, 0.3), moment(), 0)
    assert execution.status == PARTLY and "0.1 of 0.3 coins" in execution.reason
    assert opened.position.units == -0.1 and [one["order_state"] for one in exchange.orders.values()] == ["cancelled"]


def test_one_that_is_filled_while_it_is_cancelled_or_edited_counts(exchange, tmp_path):
    def filled(number: int):
        if exchange.requests[number][0] in ("edit", "cancel"):
            for order in exchange.orders.values():
                order |= {"order_state": "open"}
                exchange.matching = lambda order: order["amount"]
                exchange.matched(order)

    for reprices in (0, 2):
        exchange.matching, exchange.faults = lambda order: 0.0, filled
        venue = venue_of(exchange, tmp_path, reprices=reprices)
        execution, _ = venue.sell(sale(exchange, decision=f"BTC|{reprices}"), moment(), 0)
        assert execution.status == FILLED
    assert NOT_OPEN in testnet.GONE


def test_a_post_only_order_that_is_rejected_is_priced_by_the_new_book(exchange, tmp_path):
    row = exchange.summaries["BTC"][1]

    def moved(number: int):
        if exchange.requests[number][0] == "sell" and len(sent(exchange, "sell")) == 1:
            row["bid_price"] = row["ask_price"] = round(row["ask_price"] / 0.0005 + 2) * 0.0005  # what asked was taken

    exchange.faults = moved
    execution, (opened,) = venue_of(exchange, tmp_path).sell(sale(exchange), moment(), 0)
    assert str(POST_ONLY) in execution.reason and execution.status == FILLED
    assert len(sent(exchange, "sell")) == 2 and len(exchange.orders) == 1
    assert opened.position.entry_price > row["bid_price"] * INDEX


def test_a_refusal_is_no_order_and_no_halt(exchange, tmp_path):
    exchange.faults = lambda number: Fault(code=10005) if exchange.requests[number][0] == "sell" else None
    execution, events = venue_of(exchange, tmp_path).sell(sale(exchange), moment(), 0)
    assert execution.status == UNFILLED and "10005" in execution.reason and not events
    assert len(sent(exchange, "sell")) == 1


def test_an_amount_below_the_least_and_a_call_that_nobody_bids_for_are_not_sent(exchange, tmp_path):
    venue = venue_of(exchange, tmp_path)
    assert "0.05 coins are below the least amount, 0.1" in venue.sell(sale(exchange, 0.05), moment(), 0)[0].reason
    exchange.summaries["BTC"][1]["bid_price"] = None
    assert venue.sell(sale(exchange), moment(), 0)[0].reason == "at no bid"
    assert not sent(exchange, "sell")


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(cut=True), Fault(status=429, content="slow down")])
def test_an_order_whose_answer_is_lost_is_looked_up_and_not_sent_again(fault, exchange, tmp_path):
    exchange.faults = lambda number: fault if exchange.requests[number][0] == "sell" else None
    execution, _ = venue_of(exchange, tmp_path).sell(sale(exchange), moment(), 0)
    assert execution.status == FILLED and len(exchange.orders) == len(sent(exchange, "sell")) == 1


def test_an_order_that_did_not_arrive_is_sent_again_with_its_label(exchange, tmp_path):
    exchange.faults = lambda number: (
        Fault(code=TOO_MANY_REQUESTS)
        if exchange.requests[number][0] == "sell" and len(sent(exchange, "sell")) < 3
        else None
    )
    execution, _ = venue_of(exchange, tmp_path).sell(sale(exchange), moment(), 0)
    labels = {order["label"] for order in sent(exchange, "sell")}
    assert execution.status == FILLED and len(exchange.orders) == 1 and labels == {label_of("BTC|one")}


def test_one_that_arrives_too_late_is_not_begun_with(exchange, tmp_path, monkeypatch):
    """What was given up must not come to life after it was looked for."""
    venue, exchange.punctual = venue_of(exchange, tmp_path), True
    venue.account.api.timeout = 1000
    monkeypatch.setattr(testnet, "VALID", 1.0)
    exchange.faults = lambda number: (
        Fault(delay=2.5) if exchange.requests[number][0] == "sell" and len(sent(exchange, "sell")) == 1 else None
    )
    execution, _ = venue.sell(sale(exchange), moment(), 0)
    assert execution.status == FILLED and len(sent(exchange, "sell")) == 2
    time.sleep(1)
    assert len(exchange.orders) == 1


def test_without_funds_it_halts(exchange, tmp_path):
    exchange.faults = lambda number: Fault(code=TOO_LITTLE) if exchange.requests[number][0] == "sell" else None
    with pytest.raises(Halt, match="too little for the order"):
        venue_of(exchange, tmp_path).sell(sale(exchange), moment(), 0)
    assert len(sent(exchange, "sell")) == 1


def test_an_outage_before_an_order_is_no_order_and_one_during_it_is_a_halt(exchange, tmp_path):
    venue = venue_of(exchange, tmp_path)
    exchange.faults = lambda number: Fault(status=503) if exchange.requests[number][0] == "ticker" else None
    execution, _ = venue.sell(sale(exchange), moment(), 0)
    assert execution.status == UNFILLED and "not sent" in execution.reason and not exchange.orders
    exchange.faults = lambda number: Fault(status=503) if exchange.requests[number][0] == "get_order_state" else None
    with pytest.raises(Halt, match="is not known: .*Start again"):
        venue.sell(sale(exchange), moment(), 0)
    assert len(exchange.orders) == 1


def test_a_buy_back_is_reduce_only_and_may_be_a_part(exchange, tmp_path):
    exchange.held[name_of(exchange)] = -0.2
    venue, position = venue_of(exchange, tmp_path), held(exchange)._replace(entry_fee_usd=4.0)
    exchange.matching = lambda order: 0.1
    close = Intention(CLOSE, "BTC|one|CLOSE", position.instrument, 0.2)
    execution, (ended,) = venue.buy_back(close, position, moment())
    (order,) = sent(exchange, "buy")
    assert order["reduce_only"] == "true" and "post_only" not in order
    assert execution.status == PARTLY and ended.units == 0.1 and not ended.paper
    price = execution.price
    assert ended.pnl_usd == pytest.approx(0.1 * (1_000 - price) - 2.0 - execution.fee_usd)
    before = begin(Begun(moment().snapshot_time, {"BTC": 1.0}, 0.0))._replace(positions=(position,))
    (left,) = apply_all(before, [ended]).positions
    assert (left.units, left.entry_fee_usd) == (-0.1, 2.0)
    exchange.matching = lambda order: order["amount"]
    _, (rest,) = venue.buy_back(close._replace(decision_id="BTC|two|CLOSE", units=0.1), left, moment())
    after = apply_all(before, [ended, rest])
    assert rest.units is None and not after.positions and len(after.trades) == 2


def test_the_kill_switch_cancels_what_is_open_and_sends_nothing(exchange, tmp_path):
    venue = venue_of(exchange, tmp_path, fill_timeout=60)
    exchange.matching = lambda order: 0.0

    def killed(number: int):
        if len(sent(exchange, "get_order_state")) == 2:
            (tmp_path / "KILL").touch()

    exchange.faults = killed
    execution, _ = venue.sell(sale(exchange), moment(), 0)
    assert execution.status == UNFILLED and {one["order_state"] for one in exchange.orders.values()} == {"cancelled"}
    execution, _ = venue.sell(sale(exchange, decision="BTC|two"), moment(), 0)
    assert "KILL is there" in execution.reason and len(exchange.orders) == 1
    exchange.orders["BTC-1"]["order_state"] = "open"  # of somebody else, say
    venue.heed()
    venue.heed()
    assert exchange.orders["BTC-1"]["order_state"] == "cancelled" and len(sent(exchange, "cancel_all")) == 1
    exchange.held[name_of(exchange)] = -0.2
    exchange.orders["BTC-1"]["order_state"] = "open"
    venue.settled(portfolio(held(exchange)), now_state())
    assert exchange.orders["BTC-1"]["order_state"] == "cancelled" and exchange.sizes()[name_of(exchange)] == -0.2


def test_where_it_is_not_known_whether_an_order_was_sent_it_halts(exchange, tmp_path):
    lost = {"sell": Fault(status=503), "get_order_state_by_label": Fault(status=503)}

    def after_the_first(number: int):
        return lost.get(exchange.requests[number][0]) if sent(exchange, "sell") else None

    exchange.faults = after_the_first
    with pytest.raises(Halt, match="Whether the order .* was sent is not known"):
        venue_of(exchange, tmp_path).sell(sale(exchange), moment(), 0)
    assert len(sent(exchange, "sell")) == 1


def test_an_order_that_the_exchange_is_always_too_busy_for_is_a_halt(exchange, tmp_path):
    exchange.faults = lambda number: Fault(code=TOO_MANY_REQUESTS) if exchange.requests[number][0] == "sell" else None
    with pytest.raises(Halt, match="could not be sent: Deribit gave no answer"):
        venue_of(exchange, tmp_path).sell(sale(exchange), moment(), 0)
    assert not exchange.orders and len(sent(exchange, "sell")) == 3


def test_trades_that_are_not_those_of_the_order_halt(exchange, tmp_path):
    exchange.get_user_trades_by_order = lambda order_id: []
    with pytest.raises(Halt, match=r"0.2 coins are filled, and its trades are others"):
        venue_of(exchange, tmp_path).sell(sale(exchange), moment(), 0)


def test_ctrl_c_typed_twice_cancels_what_is_open(exchange, tmp_path, monkeypatch):
    def typed(seconds: float) -> None:
        raise KeyboardInterrupt

    exchange.matching = lambda order: 0.0
    venue = venue_of(exchange, tmp_path)
    monkeypatch.setattr(broker, "time", types.SimpleNamespace(sleep=typed, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        venue.sell(sale(exchange), moment(), 0)
    assert [order["order_state"] for order in exchange.orders.values()] == ["cancelled"]


def test_what_a_kill_left_open_is_cancelled_and_the_filled_part_counts(exchange, tmp_path):
    exchange.matching = lambda order: 0.1
    venue, intention = venue_of(exchange, tmp_path), sale(exchange)
    line = {"exits": [], "vetoes": [], "intention": intention._asdict(), "portfolio": {"positions": []},
        "state": {"decision": {"decision_time": "2025-12-12T08:00:00+00:00"}}}  # fmt: skip
    assert venue.found(line, 0) is None
    venue.account.place("sell", label_of(intention.decision_id), name_of(exchange), amount="0.2", price="0.0200")
    execution, (opened,) = venue.found(line, 0)
    assert execution.status == PARTLY and opened.position.units == -0.1
    assert [order["order_state"] for order in exchange.orders.values()] == ["cancelled"]


def test_an_outage_while_it_cancels_for_the_kill_switch_is_tried_again(exchange, tmp_path, caplog):
    venue = venue_of(exchange, tmp_path)
    (tmp_path / "KILL").touch()
    exchange.faults = lambda number: Fault(status=503)
    venue.heed()
    assert "no order could be cancelled" in caplog.text
    exchange.faults = lambda number: None
    venue.heed()
    assert "0 orders were cancelled" in caplog.text


def test_the_keys_are_those_of_the_environment(exchange, monkeypatch):
    monkeypatch.setenv(KEY_NAME, KEY)
    monkeypatch.setenv(SECRET_NAME, SECRET)
    monkeypatch.setattr(Account, "ask", lambda self, method, **_: None)
    assert (connected().api.apiKey, connected().api.secret) == (KEY, SECRET)


# --- What is held


def portfolio(*positions) -> Portfolio:
    return Portfolio(now_state().snapshot_time, None, None, None, {"BTC": 1.0}, positions)


def now_state():
    return moment(candidates=(), time=datetime.datetime.now(datetime.UTC))


def test_positions_that_differ_halt_or_are_adopted(exchange, tmp_path):
    name = name_of(exchange)
    exchange.held[name] = -0.3
    venue = venue_of(exchange, tmp_path)
    with pytest.raises(Halt, match=rf"{name}: -0.3 there, -0.2 in the log.*Nothing was ordered"):
        venue.settled(portfolio(held(exchange)), now_state())
    with pytest.raises(Halt, match=f"{name}: -0.3 there, 0 in the log"):
        venue.settled(portfolio(), now_state())
    venue = venue_of(exchange, tmp_path, on_difference="adopt")
    events = venue.settled(portfolio(held(exchange)), now_state())
    (position,) = apply_all(portfolio(held(exchange)), events).positions
    assert (position.units, position.entry_price) == (-0.3, 925.0)
    exchange.held.clear()
    assert not apply_all(portfolio(position), venue.settled(portfolio(position), now_state())).positions
    exchange.held["BTC-PERPETUAL"] = 10.0
    with pytest.raises(Halt, match="BTC-PERPETUAL is held on the testnet, and is no call"):
        venue.settled(portfolio(), now_state())
    exchange.held = {name: -0.2}
    assert not venue.settled(portfolio(held(exchange, 0.1), held(exchange, 0.1)), now_state())


def test_what_expired_is_settled_at_the_price_of_delivery_once_it_is_known(exchange, tmp_path):
    position = broker.position_of_call("BTC-5DEC25-90000-C", -0.2, 1_000.0, moment().snapshot_time)
    venue = venue_of(exchange, tmp_path)
    assert not venue.settled(portfolio(position), now_state())
    exchange.prices["2025-12-05"] = 91_000.0
    (closed,) = venue.settled(portfolio(position), now_state())
    assert isinstance(closed, Closed) and closed.price == 1_000.0 and closed.why == "settled"


def test_marks_have_the_margin_that_is_used(exchange, tmp_path):
    venue = venue_of(exchange, tmp_path)
    name = name_of(exchange)
    state = now_state()._replace(quotes={name: Quote(name, 900.0, 950.0, 925.0, 10.0)})
    marked = venue.mark(portfolio(held(exchange)), state)
    assert marked.margin_used_pct == pytest.approx(10.0) and marked.prices == {name: 950.0}
    assert apply_all(portfolio(held(exchange)), [marked]).margin_used_pct == pytest.approx(10.0)
    exchange.summary = {"equity": 0.0, "initial_margin": 0.0}
    assert venue.mark(portfolio(), state).margin_used_pct is None


def test_calls_that_are_not_settled_in_coin_are_refused(exchange, tmp_path):
    with pytest.raises(Halt, match="BTC_USDC is not settled in coin"):
        DeribitTestnet(account(exchange), BrokerRules(), ["BTC_USDC"], (tmp_path / "KILL").exists)


def test_an_outage_of_the_account_is_said_as_one(exchange, tmp_path):
    venue = venue_of(exchange, tmp_path)
    exchange.faults = lambda number: Fault(status=503)
    with pytest.raises(Outage):
        venue.settled(portfolio(), now_state())
