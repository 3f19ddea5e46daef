"""Shadow and paper over chains of now, from a stand-in exchange, on a clock that passes only when it is slept."""

import datetime
import json
import os
import signal
import time as real_time

import pytest
from conftest import on_the_default_stack
from market.quotes import quote
from market.standin import Exchange, Fault, summary
from market.test_harvest import NOON, Clock, days_before

from covered_call.market import deribit, harvest
from covered_call.runtime import live
from covered_call.runtime.agent import main
from covered_call.runtime.journal import read

pytestmark = on_the_default_stack

START = datetime.datetime.fromtimestamp(NOON, datetime.UTC)
CONFIG = """\
policy: {rule: {threshold: 0.0}}
interval: 300
risk: {max_spread_pct: 10, without: [min_ivrv]}
"""


class Wall(Clock):
    """One whose wall can be put forward or back while the machine's own goes on."""

    def __init__(self):
        super().__init__()
        self.put = 0.0

    def time(self) -> float:
        return self.now + self.put

    def time_ns(self) -> int:
        return round(self.time() * 1e6) * 1000

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        super().sleep(max(seconds, 0.001))


def rows(currency: str = "BTC") -> list[dict]:
    """The quotes of tests of chains as an exchange's answer; of which the backtest's rules take three."""
    found = []
    for strike in (96_000, 97_000, 98_000, 110_000):
        name = f"{currency}-19DEC25-{strike}-C"
        cells = quote(name, time=START)
        found.append(summary(name, underlying_price=93_000.0, mark_price=cells["mark_price"], mark_iv=45.0,
            bid_price=cells["best_bid_price"], ask_price=cells["best_ask_price"], open_interest=100.0,
            estimated_delivery_price=92_500.0))  # fmt: skip
    return found


class Market(Exchange):
    """One that says when it made its rows: as its clock has it, or so long before."""

    def __init__(self, clock: Wall):
        super().__init__()
        self.clock, self.behind = clock, 0.0

    def get_book_summary_by_currency(self, currency: str, kind: str):
        found = super().get_book_summary_by_currency(currency, kind)
        made = round(1000 * (self.clock.now - self.behind))
        return found if isinstance(found, int) else [row | {"creation_timestamp": made} for row in found]


@pytest.fixture
def wall(monkeypatch) -> Wall:
    wall = Wall()
    for module in (deribit, harvest, live):
        monkeypatch.setattr(module, "time", wall)
    return wall


@pytest.fixture
def exchange(wall, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Market(wall) as exchange:
        exchange.summaries = {"BTC": rows("BTC"), "ETH": rows("ETH")}
        exchange.candles["btc_usd"] = days_before(NOON, 60, hour=8)
        exchange.folder = tmp_path
        yield exchange


def run(exchange, mode: str = "shadow", *words: str, cycles: int | None = 1, config: str = CONFIG) -> None:
    with open("agent.yaml", "w") as file:
        file.write(config)
    limit = [] if cycles is None else ["--cycles", str(cycles)]
    main([mode, "--config", "agent.yaml", "--live", "--url", exchange.url, *limit, *words])


def decided(mode: str = "shadow") -> list[dict]:
    return [line for line in read(f"out/agent/{mode}") if "intention" in line]


def times(mode: str = "shadow") -> list[int]:
    """Seconds after NOON, of the decisions."""
    found = [datetime.datetime.fromisoformat(line["state"]["decision"]["decision_time"]) for line in decided(mode)]
    return [round((one - START).total_seconds()) for one in found]


def gaps(mode: str = "shadow") -> list[str]:
    with open(f"out/agent/{mode}/chains/harvest.jsonl") as file:
        return [entry["gap"] for entry in map(json.loads, file) if "gap" in entry]


def test_each_interval_has_a_decision_however_long_a_cycle_takes(exchange, wall, capsys):
    def slow(number: int):
        wall.now += 40

    exchange.faults = slow
    run(exchange, cycles=4)
    said = capsys.readouterr().out
    assert [at // 300 for at in times()] == [0, 1, 2, 3] and max(at % 300 for at in times()) < 90
    assert said.count("SELL_CALL BTC-19DEC25-") == 4 and said.endswith("by: rule 4\nLog: out/agent/shadow\n")
    assert len(list(os.scandir("out/agent/shadow/chains"))) == 5  # with the log of what was collected


def test_paper_sells_on_what_it_fetched_and_goes_on_where_it_ended(exchange, wall, capsys):
    run(exchange, "paper")
    said = capsys.readouterr().out
    assert "  filled at " in said and "open: 0.1 BTC-19DEC25-" in said
    wall.now += 100
    run(exchange, "paper", cycles=2)
    said = capsys.readouterr().out
    assert said.startswith("Goes on: the next cycle is due at 2025-12-10T12:05:00.\n")
    assert times("paper") == [0, 300, 600] and said.count("vetoed, max_positions: 1 short calls") == 2
    assert [line["orders"] for line in decided("paper")] == [1, 0, 0]


def test_the_realised_vol_is_of_the_exchanges_index_and_asked_for_once_a_day(exchange, wall, capsys):
    run(exchange, cycles=3)
    assert [name for name, _ in exchange.requests].count("get_tradingview_chart_data") == 1
    contexts = [line["state"]["context"] for line in decided()]
    assert all(context["realised_vol"] > 0 for context in contexts)
    wall.now = NOON + 86_400 - 4 * 3600 - 60  # before the next close is known, and long after the last
    run(exchange, "shadow", "--log", "later")
    (line,) = [one for one in read("later") if "intention" in one]
    assert line["state"]["context"]["realised_vol"] > 0


def test_without_candles_the_realised_vol_is_unknown_and_it_decides(exchange, wall, capsys, caplog):
    exchange.candles.clear()
    run(exchange)
    assert decided()[0]["state"]["context"]["realised_vol"] is None and "no new daily closes" in caplog.text


def test_spots_that_are_given_are_taken_and_the_exchange_is_not_asked(exchange, wall):
    days = [datetime.date(2025, 10, 1) + datetime.timedelta(days=number) for number in range(71)]
    with open("spots.csv", "w") as file:
        file.write("date,price\n" + "".join(f"{day},{90_000 + 500 * (day.day % 3)}\n" for day in days))
    run(exchange, config=CONFIG + "spots: spots.csv\n")
    assert decided()[0]["state"]["context"]["realised_vol"] > 0
    assert [name for name, _ in exchange.requests] == ["get_book_summary_by_currency"]


def test_each_underlying_that_is_held_is_asked_for(exchange, wall):
    run(exchange, cycles=2, config=CONFIG + "holdings: {BTC: 1, ETH: 10}\n")
    assert [line["state"]["decision"]["underlying"] for line in decided()] == ["BTC", "ETH"] * 2


def test_an_outage_is_a_cycle_without_a_chain_and_is_said_and_logged(exchange, wall, capsys):
    exchange.faults = lambda number: Fault(status=503) if 2 <= number < 8 else None
    run(exchange, cycles=3)
    said = capsys.readouterr().out
    assert "2025-12-10T12:05:00  BTC GAP: Deribit gave no answer" in said and "nothing is decided." in said
    assert [at // 300 for at in times()] == [0, 2] and "503" in gaps()[0]


def test_a_short_failure_is_tried_again(exchange, wall):
    exchange.faults = lambda number: Fault(status=429) if number < 2 else None
    run(exchange)
    assert times() == [3]  # after a second and two more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].update(mark_price=-1), "mark_price: -1"),
        (lambda rows: rows[1].pop("mark_iv"), "mark_iv: is missing"),
        (lambda rows: rows[1].update(bid_price=0.9), "is above the ask: crossed"),
        (lambda rows: rows.clear(), "no option that can be used"),
        (lambda rows: rows.__setitem__(slice(None), [summary("BTC-19DEC25-90000-P")]), "holds no call"),
        (lambda rows: rows.append(dict(rows[0])), "stands there twice"),
    ],
)
def test_a_torn_chain_is_no_trade_and_a_clear_line(change, message, exchange, wall, capsys):
    change(exchange.summaries["BTC"])
    run(exchange, "paper", config=CONFIG)
    said = capsys.readouterr().out
    assert "BTC GAP: " in said and message in said and "nothing is decided." in said and not decided("paper")
    exchange.summaries["BTC"] = rows()
    run(exchange, "paper")
    assert len(decided("paper")) == 1


def test_bad_rows_can_be_left_out(exchange, wall):
    exchange.summaries["BTC"][0]["mark_price"] = -1
    run(exchange, "shadow", "--on_bad_rows", "skip")
    assert len(decided()) == 1


@pytest.mark.parametrize(("behind", "message"), [(1000, "snapshot is 1,0"), (-10, "clock is 10.0 s off")])
def test_a_chain_that_is_stale_or_of_the_future_is_no_trade(behind, message, exchange, wall, capsys):
    exchange.behind = behind
    run(exchange, "paper")
    said = capsys.readouterr().out
    assert "vetoed, stale: The " in said and message in said and "filled" not in said


def test_a_clock_that_is_put_forward_or_back_is_said_and_the_grid_stays(exchange, wall, capsys, monkeypatch):
    sleep = wall.sleep

    def put(seconds: float) -> None:
        sleep(seconds)
        if wall.now == pytest.approx(NOON + 100, abs=0.11):
            wall.put = 1000.0
        if wall.now == pytest.approx(NOON + 250, abs=0.11):
            wall.put = -700.0

    monkeypatch.setattr(wall, "sleep", put)
    run(exchange, "paper", cycles=11)
    said = capsys.readouterr().out
    assert (
        "The clock went 1,000 s forward, or the machine slept.\n" in said and "The clock went 1,700 s back.\n" in said
    )
    assert "is behind 2025-12-10T12:20:00" in said and "up to when the portfolio is known: nothing is decided." in said
    assert times("paper") == [0, 1100, 1200, 1500] and any("took too long" in why for why in gaps("paper"))


def test_what_was_overslept_is_a_gap_and_not_made_up_for(exchange, wall):
    def asleep(number: int):
        wall.now += 1000 if number == 2 else 1

    exchange.faults = asleep
    run(exchange, cycles=3)
    assert [at // 300 for at in times()] == [0, 4, 4]  # one that is late, and the last that was due meanwhile
    assert any("took too long" in why for why in gaps())


def test_ctrl_c_ends_it_after_the_cycle_or_while_it_waits(exchange, wall, capfd, monkeypatch):
    exchange.faults = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 0 else None
    run(exchange, cycles=None)
    assert len(decided()) == 1 and "Ends after this decision.\n" in capfd.readouterr().out
    exchange.faults, sleep = lambda number: None, wall.sleep

    def typed(seconds: float) -> None:
        sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(wall, "sleep", typed)
    run(exchange, cycles=None)
    assert len(decided()) == 1


@pytest.mark.parametrize("mode", ["shadow", "paper"])
def test_a_chain_that_was_fetched_before_a_kill_is_decided_on_while_it_is_fresh(mode, exchange, wall, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "decided", killed)
    with pytest.raises(KeyboardInterrupt):
        run(exchange, mode)
    monkeypatch.undo()
    for module in (deribit, harvest, live):
        monkeypatch.setattr(module, "time", wall)
    folder = real_folder(exchange)
    monkeypatch.chdir(folder)
    wall.now += 20
    run(exchange, mode)
    assert times(mode) == [0, 300]


def real_folder(exchange) -> str:
    """Where the test's files are: what was undone had changed to it."""
    return exchange.folder


def test_words_that_do_not_go_together_are_said(exchange, capsys):
    cases = [
        (["paper"], "paper: give --snapshot PARQUET or --live."),
        (["paper", "--live", "--snapshot", "a"], "paper: give --snapshot PARQUET or --live."),
        (["replay", "--live"], "replay: give no --live."),
        (["testnet"], "testnet: give --live."),
        (["testnet", "--snapshot", "a"], "testnet: give no --snapshot."),
        (["testnet", "--live", "--url", "https://www.deribit.com"], "so there is no --url"),
        (["shadow", "--snapshot", "a", "--cycles", "2"], "--cycles and --url are of --live."),
        (["shadow", "--live", "--cycles", "0"], "--cycles 0: give 1 or more."),
    ]
    for words, message in cases:
        with pytest.raises(SystemExit):
            main([*words, "--config", "agent.yaml"])
        assert message in capsys.readouterr().err, words


@pytest.mark.parametrize(
    ("text", "message"),
    [("interval: 0.5", "interval: 0.5 is not 1 second or more"), ("broker: {prize: mid}", "Did you mean price?"),
        ("broker: {price: best}", "broker: price='best': choose one of"),
        ("broker: {url: https://www.deribit.com}", "'url' is no key of broker")],
)  # fmt: skip
def test_a_configuration_of_these_that_cannot_be_is_said(text, message, exchange):
    with pytest.raises(SystemExit, match="error: ") as stopped:
        run(exchange, config=text)
    assert message in str(stopped.value)


def test_the_folder_of_an_agent_that_is_at_work_is_refused(exchange, wall):
    from covered_call import atomic

    with atomic.locked("out/agent/shadow"), pytest.raises(SystemExit, match="is being written by process"):
        run(exchange)
    assert not exchange.requests and real_time.time() > NOON


def test_what_a_kill_left_half_written_goes(exchange, wall):
    os.makedirs("out/agent/shadow/chains")
    left = "out/agent/shadow/chains/.BTC_2025-12-10_1100.parquet.1.tmp"
    open(left, "w").close()
    run(exchange)
    assert not os.path.exists(left) and len(decided()) == 1


def test_an_exchange_that_does_not_say_when_it_made_its_rows_is_taken_at_its_word_of_now(exchange, wall, capsys):
    exchange.get_book_summary_by_currency = lambda currency, kind: [
        {name: value for name, value in row.items() if name != "creation_timestamp"} for row in rows(currency)
    ]
    run(exchange, "paper")
    assert "  filled at " in capsys.readouterr().out
