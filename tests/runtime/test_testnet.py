"""The agent on the testnet as a whole: cycles, kills, and what it halts at. The exchange is on 127.0.0.1.

AGENT_KILLS is how often the agent is killed.
"""

import collections
import os
import random
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, on_the_default_stack
from market.standin import Fault

from covered_call.candidates.schema import Candidate
from covered_call.runtime import live, testnet
from covered_call.runtime.agent import main
from covered_call.runtime.engine import Agent
from covered_call.runtime.journal import opened, read
from covered_call.runtime.paper import Begun, rebuilt
from covered_call.runtime.policies import Rule
from covered_call.runtime.state import CLOSE, SELL_CALL, Intention
from covered_call.runtime.testnet import Halt

from .account import KEY, SECRET, TOO_LITTLE, AccountExchange, calls
from .agent_kills import CONFIG
from .markets import DAY, FREELY, fixed
from .moments import moment
from .test_broker import account, held, name_of, quick, sent, venue_of  # noqa: F401 quick is a fixture

pytestmark = on_the_default_stack
PATIENT = CONFIG.replace("fill_timeout: 0.08", "fill_timeout: 5")


@pytest.fixture
def exchange(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with AccountExchange() as exchange:
        exchange.summaries = {"BTC": calls()}
        monkeypatch.setattr(testnet, "connected", lambda: account(exchange))
        monkeypatch.setattr(live, "NAP", 0.01)
        yield exchange


def run(cycles: int = 1, config: str = PATIENT) -> None:
    with open("agent.yaml", "w") as file:
        file.write(config)
    main(["testnet", "--config", "agent.yaml", "--live", "--cycles", str(cycles)])


def fails(cycles: int = 1, config: str = PATIENT) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(cycles, config)
    return str(stopped.value)


def positions(folder="out/agent/testnet") -> dict[str, float]:
    portfolio, _ = rebuilt(read(folder))
    found: dict[str, float] = collections.defaultdict(float)
    for one in portfolio.positions:
        found[one.instrument] += one.units
    return {name: round(units, 9) for name, units in found.items()}


def test_a_cycle_sells_on_the_testnet_and_the_next_knows_of_it(exchange, capsys, caplog):
    run(2)
    said = capsys.readouterr().out
    assert said.count("  filled at ") == 2 and "orders: filled 2" in said
    assert positions() == exchange.sizes() == {name_of(exchange, 2): -0.6}
    assert "equity before orders 92,5" in said and SECRET not in said and KEY not in said
    lines = [line for line in read("out/agent/testnet") if "intention" in line]
    assert lines[1]["portfolio"]["margin_used_pct"] == pytest.approx(10.0)
    assert "The account has 2 BTC, and holdings says 1000: what is covered by it is not" in caplog.text


def test_a_halt_is_one_line_and_what_was_under_way_is_looked_up_at_the_next_start(exchange, capsys, caplog):
    exchange.faults = lambda number: Fault(code=TOO_LITTLE) if exchange.requests[number][0] == "sell" else None
    assert fails().startswith("error: The account on the testnet has too little for the order")
    exchange.faults = lambda number: Fault(status=503) if exchange.requests[number][0] == "get_order_state" else None
    assert "Start again." in fails() and "was not sent before the agent ended" in caplog.text
    exchange.faults = lambda number: None
    run()
    assert "is filled: before the agent ended" in caplog.text or "before the agent ended" in caplog.text
    assert positions() == exchange.sizes() and len({one["label"] for one in exchange.orders.values()}) == len(
        exchange.orders
    )


def test_positions_that_differ_halt_and_nothing_is_ordered(exchange):
    exchange.held["BTC-26MAR27-100000-C"] = -0.1
    assert "BTC-26MAR27-100000-C: -0.1 there, 0 in the log" in fails()
    assert not exchange.orders and not sent(exchange, "get_book_summary_by_currency")
    run(config=PATIENT.replace("reprices: 2", "reprices: 2, on_difference: adopt"))
    assert len(exchange.orders) >= 1 and positions() == exchange.sizes()  # the chain that it had halted at is fresh


def test_wrong_credentials_are_one_line_without_them(exchange, monkeypatch):
    monkeypatch.setattr(testnet, "connected", lambda: account(exchange, "wrong secret"))
    message = fails()
    assert "does not take the key of DERIBIT_TESTNET_KEY" in message
    assert KEY not in message and "wrong secret" not in message


def test_the_file_kill_cancels_and_vetoes(exchange, capsys):
    os.makedirs("out/agent/testnet")
    open("out/agent/testnet/KILL", "w").close()
    run()
    assert "vetoed, kill_switch: " in capsys.readouterr().out and not exchange.orders
    assert len(sent(exchange, "cancel_all")) == 1


def test_an_outage_of_the_account_is_a_cycle_without_a_decision(exchange, capsys):
    exchange.faults = lambda number: Fault(status=503) if exchange.requests[number][0] == "get_positions" else None
    run()
    assert "503" in capsys.readouterr().out and not list(read("out/agent/testnet"))


def test_a_line_that_cannot_be_written_is_no_order(exchange, monkeypatch):
    from covered_call.runtime import journal

    monkeypatch.setattr(journal.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 0})())
    assert "the disk is nearly full, so no order was sent" in fails()
    assert not exchange.orders


def test_a_roll_is_a_close_and_then_a_sale_and_none_without_the_close(exchange, tmp_path):
    position = held(exchange)
    exchange.held[position.instrument] = -0.2
    into = name_of(exchange, 2)

    def left(state, portfolio, now):
        (its,) = portfolio.positions
        close = Intention(CLOSE, f"{state.decision.decision_id}|CLOSE", its.instrument, -its.units, None, ("defence",))
        sale = Intention(
            SELL_CALL, f"{state.decision.decision_id}|ROLL", into, 0.2, None, ("roll",), position.instrument
        )
        return close, sale

    steps = FREELY._replace(exits=left, vetoes_of=lambda *_: [])
    venue, begun = venue_of(exchange, tmp_path), Begun(moment().snapshot_time, {"BTC": 1.0}, 0.0)
    agent = Agent([Rule(3.0)], steps, venue, begun)
    agent.portfolio = agent.portfolio._replace(positions=(position,))
    found = []
    for day, filled in enumerate((0.0, 0.1, 0.2)):  # coins of each order
        exchange.matching = lambda order, filled=filled: filled
        cycle = agent.cycle(moment(candidates=(), time=moment().snapshot_time + day * DAY))
        found.append([one.status for one in cycle.executions])
    assert found == [["unfilled", "not_sent"], ["partly_filled", "not_sent"], ["filled", "filled"]]
    assert {name: units for name, units in exchange.sizes().items() if units} == {into: -0.2}
    (rolled,) = agent.portfolio.positions
    assert (rolled.instrument, rolled.units, rolled.rolls) == (into, -0.2, 1) and len(agent.portfolio.trades) == 2


def test_a_roll_that_was_cut_short_has_its_close_in_the_log_at_the_next_start(exchange, tmp_path, caplog):
    exchange.matching = lambda order: order["amount"]
    name, into = name_of(exchange), name_of(exchange, 2)
    offered = Candidate(name, 97_000.0, 9.0, 0.25, 4.0, 0.5, None)

    def left(state, portfolio, now):
        close = Intention(CLOSE, f"{state.decision.decision_id}|CLOSE", name, 0.2, None, ("defence",))
        sale = Intention(SELL_CALL, f"{state.decision.decision_id}|ROLL", into, 0.2, None, ("roll",), name)
        return (close, sale) if portfolio.positions else ()

    steps = FREELY._replace(exits=left, vetoes_of=lambda *_: [], size=fixed(0.2))
    begun = Begun(moment().snapshot_time, {"BTC": 1.0}, 0.0)
    with opened(tmp_path / "log") as journal:
        agent = Agent([Rule(3.0)], steps, venue_of(exchange, tmp_path), begun, journal)
        agent.cycle(moment(candidates=(offered,)))
        exchange.faults = lambda number: (
            Fault(status=503) if exchange.requests[number][0] == "get_user_trades_by_order" else None
        )
        with pytest.raises(Halt, match=r"CLOSE is not known: .* Start again"):
            agent.cycle(moment(candidates=(), time=moment().snapshot_time + DAY))
        assert len(journal.pending) == 2
    exchange.faults = lambda number: None
    with opened(tmp_path / "log") as journal:
        again = Agent([Rule(3.0)], steps, venue_of(exchange, tmp_path), begun, journal)
        assert not journal.pending and not again.portfolio.positions and len(again.portfolio.trades) == 1
        assert "its order 0 is filled: before the agent ended" in caplog.text
        assert "its order 1 was not sent before the agent ended" in caplog.text
        assert not {name: size for name, size in exchange.sizes().items() if size}
        assert again.portfolio == rebuilt(read(tmp_path / "log"))[0]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_killed_at_random_moments_no_order_is_sent_twice_and_the_log_is_what_is_held(exchange, tmp_path):
    kills, rng, lock = os.environ.get("AGENT_KILLS", "4"), random.Random(5), threading.Lock()

    def faults(number: int) -> Fault | None:
        with lock:
            if exchange.requests[number][0] not in ("sell", "edit", "cancel", "get_order_state"):
                return None
            return Fault(delay=rng.choice([0, 0, 0.02, 0.2]), late=rng.choice([0, 0, 0.02, 0.2]),
                cut=rng.random() < 0.1)  # fmt: skip

    exchange.faults, exchange.punctual = faults, True
    exchange.matching = lambda order: {0: 0.3, 1: 0.1, 2: 0.0, 3: 0.2}[len(order["label"].strip("0123456789")) % 4]
    command = [sys.executable, str(ROOT / "tests/runtime/agent_kills.py"), exchange.url, str(tmp_path), kills, "1"]
    environment, limit = os.environ | {"PYTHONPATH": str(ROOT)}, 120 + 20 * int(kills)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr
    labels = collections.Counter(order["label"] for order in exchange.orders.values())
    assert labels and set(labels.values()) == {1}
    assert {order["order_state"] for order in exchange.orders.values()} <= {"filled", "cancelled"}
    assert positions(tmp_path / "log") == {name: size for name, size in exchange.sizes().items() if size}
    with opened(tmp_path / "log") as journal:
        assert not journal.pending and len(journal.decided) >= len(exchange.orders)
    said = (tmp_path / "said.txt").read_text()
    assert SECRET not in said and KEY not in said
