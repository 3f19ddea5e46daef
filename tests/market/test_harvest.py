"""Chains and history from Deribit: what is written, and what becomes of malformed answers, outages and kills.

The exchange is a stand-in on 127.0.0.1. HARVEST_KILLS is how often the harvest is killed.
"""

import datetime
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REAL_DATA, ROOT, needs_real_data, on_the_default_stack

from covered_call import atomic
from covered_call.candidates.vols import read_vols
from covered_call.market import deribit, harvest
from covered_call.market.deribit import SNAPSHOT, Deribit, DeribitError, Outage, Refused

from .standin import DAY, INTERNAL_SERVER_ERROR, TOO_MANY_REQUESTS, Exchange, Fault, chain, summary

pytestmark = on_the_default_stack

NOON = 1_765_368_000  # 2025-12-10 12:00:00 UTC
CHAINS = REAL_DATA / "deribit_chains"


class Clock:
    """Time that passes only when it is slept, or when a request is slow."""

    def __init__(self):
        self.now, self.slept = float(NOON), []

    def time(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return round(self.now * 1e6) * 1000

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(deribit, "time", clock)
    monkeypatch.setattr(harvest, "time", clock)
    return clock


@pytest.fixture
def exchange():
    with Exchange() as exchange:
        exchange.summaries = {"BTC": chain("BTC"), "ETH": chain("ETH")}
        yield exchange


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "harvest.jsonl").read_text().splitlines()]


def at(entry: dict, name: str = "due") -> float:
    """Seconds after NOON."""
    return datetime.datetime.fromisoformat(entry[name]).timestamp() - NOON


def chains_in(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


# --- The client


def test_a_chain_has_the_columns_of_the_snapshots_and_null_for_what_is_unknown(exchange, clock):
    exchange.summaries["BTC"] = [
        summary("BTC-26DEC25-90000-C", bid_price=None, interest_rate=None),
        summary("BTC-5JAN26-95500-P", volume=0),
    ]
    table = Deribit(exchange.url).book_summary("BTC")
    assert table.schema.equals(SNAPSHOT)
    call, put = table.to_pylist()
    assert (call["harvest_time"].timestamp(), call["instrument_name"]) == (NOON, "BTC-26DEC25-90000-C")
    assert (call["underlying"], call["option_type"], call["strike"]) == ("BTC", "C", 90_000.0)
    assert (call["expiry"], call["expiry_timestamp"]) == ("2025-12-26", 1_766_736_000.0)
    assert (put["expiry"], put["option_type"], put["volume"]) == ("2026-01-05", "P", 0.0)
    assert (call["underlying_price"], call["mark_price"], call["mark_iv"]) == (92414.82, 0.053129, 46.51)
    assert (call["best_bid_price"], call["best_ask_price"]) == (None, 0.054)
    assert (call["open_interest"], call["index_price"], call["interest_rate"]) == (2418.6, 92250.41, None)
    assert {call[name] for name in SNAPSHOT.names if name.startswith("greek_") or name[3:] == "_iv"} == {None}
    assert exchange.requests == [("get_book_summary_by_currency", {"currency": "BTC", "kind": "option"})]


def test_options_settled_in_usdc_keep_an_underlying_of_their_own(exchange):
    names = ["BTC_USDC-26DEC25-90000-C", "XRP_USDC-26DEC25-2d15-C"]
    exchange.summaries["USDC"] = [summary(name) for name in names]
    client = Deribit(exchange.url)
    both = client.book_summary("USDC")
    assert both["underlying"].to_pylist() == ["BTC_USDC", "XRP_USDC"] and both["strike"][1].as_py() == 2.15
    assert client.book_summary("BTC_USDC")["instrument_name"].to_pylist() == names[:1]
    exchange.summaries["BTC"] = [summary("BTC-26DEC25-90000-C"), summary(names[0])]
    with pytest.raises(DeribitError, match="BTC_USDC-26DEC25-90000-C, instrument_name: is no option of BTC"):
        client.book_summary("BTC")


METADATA = {b"skipped_rows": b"1", b"created": b"1765328713418"}
MALFORMED = [
    ({"mark_price": -0.1}, r"BTC-26DEC25-95000-C, mark_price: -0\.1 is no number of 0 or more"),
    ({"mark_iv": "46.5"}, r"BTC-26DEC25-95000-C, mark_iv: '46\.5' is no number"),
    ({"underlying_price": [92414.82]}, r"BTC-26DEC25-95000-C, underlying_price: \[92414\.82\] is no number"),
    ({"open_interest": True}, r"BTC-26DEC25-95000-C, open_interest: True is no number"),
    ({"mark_iv": None}, r"BTC-26DEC25-95000-C, mark_iv: None is no number"),
    ({"volume": ...}, r"BTC-26DEC25-95000-C, volume: is missing"),
    ({"instrument_name": "BTC-PERPETUAL"}, r"row 2, instrument_name: 'BTC-PERPETUAL' is no name such as"),
    ({"instrument_name": "BTC-31FEB26-95000-C"}, r"row 2, instrument_name: 'BTC-31FEB26-95000-C' is no name"),
    ({"instrument_name": None}, r"row 2, instrument_name: None is no name"),
    ({"instrument_name": "BTC-26DEC25-90000-C"}, r"BTC-26DEC25-90000-C, instrument_name: stands there twice"),
]


@pytest.mark.parametrize("fields, message", MALFORMED)
def test_a_malformed_row_is_named_or_left_out_and_counted(fields, message, exchange, caplog):
    spoilt = {name: value for name, value in summary("BTC-26DEC25-95000-C", **fields).items() if value is not ...}
    exchange.summaries["BTC"] = [summary("BTC-26DEC25-90000-C"), spoilt, summary("BTC-26DEC25-99000-C")]
    client = Deribit(exchange.url)
    with pytest.raises(DeribitError, match=rf"^Deribit's book summary of BTC: {message}"):
        client.book_summary("BTC")
    table = client.book_summary("BTC", on_bad_rows="skip")
    assert table["strike"].to_pylist() == [90_000, 99_000] and table.schema.metadata == METADATA
    assert "1 of 3 rows are left out" in caplog.text


@pytest.mark.parametrize("rows, message", [([], "no option that can be used, of 0"), ([7], "row 1: 7 is no row"),
                                           ({}, "no list of rows"), (None, "no list of rows")])  # fmt: skip
def test_an_answer_without_rows_is_an_error(rows, message, exchange):
    exchange.summaries["BTC"] = rows
    with pytest.raises(DeribitError, match=message):
        Deribit(exchange.url).book_summary("BTC")


FAULTS = [
    Fault(status=429),
    Fault(code=TOO_MANY_REQUESTS),
    Fault(code=INTERNAL_SERVER_ERROR),
    Fault(status=523, content="error code: 523"),
    Fault(status=503, content="<html>Down for maintenance</html>"),
    Fault(content="<html>Down for maintenance</html>"),
    Fault(cut=True),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_is_tried_again_after_growing_waits(fault, exchange, clock):
    exchange.faults = lambda number: fault if number < 3 else None
    assert len(Deribit(exchange.url).book_summary("BTC")) == 80
    assert clock.slept == [1, 2, 4]


def test_an_outage_is_said_when_patience_ends(exchange, clock):
    exchange.faults = lambda number: Fault(status=503)
    with pytest.raises(Outage, match="Deribit gave no answer: .*503 Service Unavailable"):
        Deribit(exchange.url).book_summary("BTC")
    assert clock.slept == [1, 2, 4, 8, 16]
    clock.slept.clear()
    with pytest.raises(Outage):
        Deribit(exchange.url, patience=10).book_summary("BTC")
    assert clock.slept == [1, 2, 4]


def test_a_slow_answer_and_a_server_that_is_not_there_are_outages(exchange):
    exchange.faults = lambda number: Fault(delay=1.5)
    with pytest.raises(Outage, match="no answer"):
        Deribit(exchange.url, patience=0.5).book_summary("BTC")
    with pytest.raises(Outage, match="no answer: .*Connection refused"):
        Deribit("http://127.0.0.1:9", patience=0.5).book_summary("BTC")


def test_what_the_exchange_refuses_is_not_asked_again(exchange, clock):
    with pytest.raises(Refused, match="Deribit refuses what was asked .*-32602"):
        Deribit(exchange.url).book_summary("DOGE")
    assert len(exchange.requests) == 1 and not clock.slept


def test_ccxt_is_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ccxt", None)
    with pytest.raises(SystemExit, match=r"no package ccxt: pip install 'covered-call-candidates\[live\]'"):
        harvest.main(["BTC", "--to", str(tmp_path)])


@needs_real_data
def test_a_real_snapshot_served_comes_back_as_it_was(exchange):
    real = pq.read_table(sorted(CHAINS.glob("BTC_*.parquet"))[1])
    back = {column: field for field, column in deribit.NUMBERS.items()}
    rows = [
        summary(row["instrument_name"], **{back[name]: value for name, value in row.items() if name in back})
        for row in real.to_pylist()
    ]
    exchange.summaries["BTC"] = rows
    found = Deribit(exchange.url).book_summary("BTC")
    assert found.schema.names[:20] == real.schema.names and found.schema.types[:20] == real.schema.types
    assert found.select(real.schema.names[1:]).equals(real.select(real.schema.names[1:]))


# --- History


def days_before(now: int, count: int, hour: int) -> list[tuple[int, float]]:
    """Daily candles that begin at that hour, up to the one that is not finished."""
    last = (now * 1000 - hour * DAY // 24) // DAY * DAY + hour * DAY // 24
    return [(last - back * DAY, 90_000.5 + (last - back * DAY) // DAY % 1000) for back in reversed(range(count))]


def history(exchange, folder, *words) -> None:
    harvest.main(["BTC", "--history", "--to", str(folder), "--url", exchange.url, *words])


@pytest.fixture
def past(exchange, clock):
    exchange.candles["btc_usd"] = days_before(NOON, 50, hour=8)
    exchange.vols["BTC"] = [(tick, 40.25 + tick // DAY % 7) for tick, _ in days_before(NOON, 50, hour=0)]
    return exchange


def test_history_is_written_in_the_layout_of_the_shared_files_without_today(past, tmp_path):
    past.page = 7
    history(past, tmp_path / "h", "--days", "20")
    spot = (tmp_path / "h" / "spot_BTC_0800utc.csv").read_text().splitlines()
    dvol = (tmp_path / "h" / "dvol_BTC_daily.csv").read_text().splitlines()
    assert spot[0] == "date,price_0800utc" and dvol[0] == "date,dvol"
    opens = {tick: value for tick, value in past.candles["btc_usd"]}
    yesterday = NOON * 1000 // DAY * DAY - DAY
    assert spot[-1] == f"2025-12-09,{opens[yesterday + DAY // 3]}"
    assert dvol[-1] == f"2025-12-09,{dict(past.vols['BTC'])[yesterday]}"
    assert len(spot) == 20 and len(dvol) == 20  # with the header; the window begins at noon, twenty days ago
    assert sum(method == "get_volatility_index_data" for method, _ in past.requests) == 3
    series = read_vols(str(tmp_path / "h" / "dvol_BTC_daily.csv"), lag=24)
    assert len(series.number) == 19 and 0.4 < series.number.min() < series.number.max() < 0.47


def test_history_grows_and_no_day_stands_there_twice(past, clock, tmp_path):
    history(past, tmp_path, "--days", "10")
    before = (tmp_path / "spot_BTC_0800utc.csv").read_text()
    clock.now += 3 * 86_400
    past.candles["btc_usd"] = days_before(NOON + 3 * 86_400, 50, hour=8)
    past.vols["BTC"] = [(tick, 40.25 + tick // DAY % 7) for tick, _ in days_before(NOON + 3 * 86_400, 50, hour=0)]
    for _ in range(2):
        history(past, tmp_path, "--days", "10")
        lines = (tmp_path / "spot_BTC_0800utc.csv").read_text().splitlines()
        assert lines[: len(before.splitlines())] == before.splitlines()
        dates = [line.split(",")[0] for line in lines[1:]]
        assert dates == [str(day) for day in np.arange("2025-12-01", "2025-12-13", dtype="M8[D]")]


def test_a_day_that_changed_is_refused_and_the_file_stays(past, tmp_path):
    history(past, tmp_path)
    before = (tmp_path / "spot_BTC_0800utc.csv").read_bytes()
    tick, value = past.candles["btc_usd"][-2]
    past.candles["btc_usd"][-2] = (tick, value + 1)
    with pytest.raises(
        SystemExit, match=rf"error: .*spot_BTC_0800utc.csv: 2025-12-09 is {value} there, and {value + 1}"
    ):
        history(past, tmp_path)
    assert (tmp_path / "spot_BTC_0800utc.csv").read_bytes() == before


@pytest.mark.parametrize(
    "content, message",
    [
        ("date,dvol\n", "line 1: 'date,dvol' is not date,price_0800utc"),
        ("", "line 1"),
        ("date,price_0800utc\n2025-12-01,5\n2025-12-01,5\n", "line 3: '2025-12-01,5' is no new date"),
        ("date,price_0800utc\n2025-12-01\n", "line 2: '2025-12-01' is no new date"),
        ("date,price_0800utc\nyesterday,nan\n", "line 2"),
    ],
)
def test_another_file_is_not_written_over(content, message, past, tmp_path):
    path = tmp_path / "spot_BTC_0800utc.csv"
    path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        history(past, tmp_path)
    assert path.read_text() == content


def test_the_perpetual_stands_in_for_an_index_without_candles_and_it_is_said(past, tmp_path, caplog):
    past.candles["BTC-PERPETUAL"] = past.candles.pop("btc_usd")
    history(past, tmp_path)
    assert "the prices are those of BTC-PERPETUAL, for Deribit has none of btc_usd" in caplog.text
    assert (tmp_path / "spot_BTC_0800utc.csv").exists()


def test_a_currency_without_a_vol_index_has_a_file_of_spots_alone(past, tmp_path, capsys):
    del past.vols["BTC"]
    history(past, tmp_path)
    assert "dvol_BTC_daily.csv: Deribit has no days of it." in capsys.readouterr().out
    assert not (tmp_path / "dvol_BTC_daily.csv").exists()


def test_days_that_begin_at_another_hour_or_have_no_price_are_refused(past):
    good, client = past.candles["btc_usd"], Deribit(past.url)
    past.candles["btc_usd"] = days_before(NOON, 5, hour=0)
    with pytest.raises(DeribitError, match=r"btc_usd: a day begins at 2025-12-06 00:00 UTC, and not at 08:00"):
        client.daily_closes("BTC", 10)
    past.candles["btc_usd"] = [*good[:-3], (good[-3][0], None)]
    with pytest.raises(DeribitError, match="btc_usd: None at 17651.* is no number above 0"):
        client.daily_closes("BTC", 10)
    past.candles["btc_usd"] = good[:-4] + good[-2:]
    assert len(client.daily_closes("BTC", 10)) == 7  # of nine that have ended; two are missing, which is logged
    past.get_volatility_index_data = lambda end_timestamp, **_: {"data": [], "continuation": int(end_timestamp)}
    with pytest.raises(DeribitError, match=r"continuation \d+ leads nowhere"):
        client.vol_index("BTC", 10)


# --- Cycles


def collect(exchange, folder, *words, every: int = 900) -> None:
    harvest.main(["BTC", "ETH", "--every", str(every), "--to", str(folder), "--url", exchange.url, *words])


def test_each_cycle_is_a_file_a_currency_a_line_of_the_log_and_one_of_the_terminal(exchange, clock, tmp_path, capsys):
    def slow(number: int):
        clock.now += 2

    exchange.faults = slow
    collect(exchange, tmp_path / "chains", "--cycles", "3")
    assert chains_in(tmp_path / "chains") == [
        f"{name}_2025-12-10_{minute}.parquet" for name in ("BTC", "ETH") for minute in (1200, 1215, 1230)
    ]
    log = log_of(tmp_path / "chains")
    assert [(entry["underlying"], at(entry)) for entry in log] == [
        (name, 900 * cycle) for cycle in range(3) for name in ("BTC", "ETH")
    ]  # however long the requests took
    assert at(log[1], "harvest_time") == 4 and {entry["rows"] for entry in log} == {80}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"2025-12-10T12:{minute}:00  BTC 80 rows, ETH 80 rows" for minute in ("00", "15", "30")]
    table = pq.read_table(tmp_path / "chains" / log[1]["file"])
    assert table.schema.equals(SNAPSHOT) and set(table["underlying"].to_pylist()) == {"ETH"}
    times = {moment.isoformat() for moment in table["harvest_time"].to_pylist()}
    assert times == {log[1]["harvest_time"]}


def test_chains_within_a_minute_have_seconds_in_their_names(exchange, clock, tmp_path):
    collect(exchange, tmp_path / "close", "--cycles", "2", every=20)
    assert [name[-11:-8] for name in chains_in(tmp_path / "close")] == ["000", "020"] * 2
    clock.now = NOON + 58

    def late(number: int):
        clock.now += 5 if number == 4 else 0  # the first of these arrives within the minute of the second

    exchange.faults = late
    harvest.main(["BTC", "--every", "60", "--cycles", "2", "--to", str(tmp_path / "m"), "--url", exchange.url])
    assert chains_in(tmp_path / "m") == ["BTC_2025-12-10_1201.parquet", "BTC_2025-12-10_120158.parquet"]


def test_a_chain_of_the_same_second_is_not_written_over(exchange, clock, tmp_path):
    def slow(number: int):
        clock.now += 0.95 if number == 0 else 0

    exchange.faults, clock.now = slow, NOON + 0.1
    harvest.main(["BTC", "--every", "1", "--cycles", "3", "--to", str(tmp_path), "--url", exchange.url])
    first, second, third = log_of(tmp_path)
    assert [entry["file"] for entry in (first, third)] == chains_in(tmp_path)
    assert second["gap"] == f"{first['file']} is there already" and second["missed"] == 1


def test_an_outage_is_a_gap_and_the_next_cycle_goes_on(exchange, clock, tmp_path, capsys):
    exchange.faults = lambda number: Fault(status=503) if 2 <= number < 8 else None
    collect(exchange, tmp_path, "--cycles", "2")
    gap, eth = log_of(tmp_path)[2:]
    assert (gap["underlying"], at(gap), gap["missed"]) == ("BTC", 900, 1) and "503" in gap["gap"]
    assert (eth["underlying"], at(eth)) == ("ETH", 900) and "file" in eth
    assert "BTC GAP: Deribit gave no answer" in capsys.readouterr().out
    assert len(chains_in(tmp_path)) == 3


def test_requests_are_not_tried_for_so_long_that_the_next_cycle_is_late(exchange, clock, tmp_path):
    exchange.faults = lambda number: Fault(status=503) if number < 3 else None
    harvest.main(["BTC", "--every", "2", "--cycles", "2", "--to", str(tmp_path), "--url", exchange.url])
    assert [(at(entry), "gap" in entry) for entry in log_of(tmp_path)] == [(0, True), (2, False)]


def test_cycles_that_were_overslept_are_a_gap(exchange, clock, tmp_path):
    def asleep(number: int):
        clock.now += 3000 if number == 1 else 0

    exchange.faults = asleep
    collect(exchange, tmp_path, "--cycles", "2")
    log = log_of(tmp_path)
    assert [(at(entry), "file" in entry) for entry in log] == [(0, True)] * 2 + [(900, False)] * 2 + [(2700, True)] * 2
    assert all(entry["missed"] == 2 and at(entry, "until") == 1800 for entry in log[2:4])


def test_a_malformed_row_ends_the_command_and_is_in_the_log_or_is_skipped(exchange, clock, tmp_path):
    exchange.summaries["ETH"][3] = summary("ETH-26DEC25-3000-C", mark_price=-1)
    with pytest.raises(SystemExit, match=r"ETH-26DEC25-3000-C, mark_price: -1 .*\. --on_bad_rows skip leaves"):
        collect(exchange, tmp_path / "a", "--cycles", "1")
    assert "mark_price: -1" in log_of(tmp_path / "a")[1]["gap"] and len(chains_in(tmp_path / "a")) == 1
    collect(exchange, tmp_path / "b", "--cycles", "1", "--on_bad_rows", "skip")
    assert [(entry["rows"], entry["skipped"]) for entry in log_of(tmp_path / "b")] == [(80, 0), (79, 1)]


def test_a_signal_ends_it_after_the_cycle_in_hand(exchange, clock, tmp_path, capfd):
    for kind in (signal.SIGTERM, signal.SIGINT):
        before, folder = signal.getsignal(kind), tmp_path / kind.name
        exchange.requests.clear()
        exchange.faults = lambda number, kind=kind: os.kill(os.getpid(), kind) if number == 2 else None
        collect(exchange, folder)
        assert [entry["underlying"] for entry in log_of(folder)] == ["BTC", "ETH"] * 2  # asked for while at BTC
        assert len(chains_in(folder)) == 4 and signal.getsignal(kind) == before
        assert "Ending after the cycle in hand." in capfd.readouterr().err


# --- Going on


def test_started_again_in_time_it_waits_for_the_next_cycle(exchange, clock, tmp_path, capsys):
    collect(exchange, tmp_path, "--cycles", "1")
    clock.now += 300
    collect(exchange, tmp_path, "--cycles", "1")
    assert "goes on: the next cycle is due at 2025-12-10T12:15:00" in capsys.readouterr().out
    assert [at(entry) for entry in log_of(tmp_path)] == [0, 0, 900, 900]
    clock.now += 905  # by cron, a little late
    collect(exchange, tmp_path, "--cycles", "1")
    assert [at(entry) for entry in log_of(tmp_path)[4:]] == [1805, 1805]


def test_started_again_too_late_it_logs_what_was_missed(exchange, clock, tmp_path):
    collect(exchange, tmp_path, "--cycles", "1")
    clock.now += 3000
    collect(exchange, tmp_path, "--cycles", "1")
    gap, _, chain, _ = log_of(tmp_path)[2:]
    assert (at(gap), gap["missed"], at(gap, "until"), gap["gap"]) == (900, 2, 1800, "no harvest was running")
    assert at(chain) == 3000 and "file" in chain


def test_what_a_kill_left_is_put_right(exchange, clock, tmp_path):
    collect(exchange, tmp_path, "--cycles", "2")
    log = (tmp_path / "harvest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "harvest.jsonl").write_text("".join(log[:-2]) + log[2][:40])  # the last cycle's lines are lost
    (tmp_path / ".BTC_2025-12-10_1216.parquet.1.tmp").write_bytes(b"PAR1 half")
    collect(exchange, tmp_path, "--cycles", "1")
    found = log_of(tmp_path)
    assert [entry.get("file") for entry in found[2:4]] == [
        "BTC_2025-12-10_1215.parquet",
        "ETH_2025-12-10_1215.parquet",
    ]
    assert [at(entry) for entry in found] == [0, 0, 900, 900, 1800, 1800]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*chains_in(tmp_path), "harvest.jsonl"]
    assert len(chains_in(tmp_path)) == 6


@pytest.mark.parametrize(
    "line", ["nonsense", '{"due": "2025-12-10T12:00:00+00:00"}', "[]", '{"underlying": "BTC", "due": 3}']
)
def test_a_line_of_the_log_that_is_none_is_named(line, exchange, tmp_path):
    (tmp_path / "harvest.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit, match=r"harvest.jsonl, line 1: .* is no line of this log"):
        collect(exchange, tmp_path)
    assert not exchange.requests


def test_a_file_that_is_no_chain_and_a_clock_that_is_behind_are_named(exchange, clock, tmp_path):
    collect(exchange, tmp_path, "--cycles", "1")
    clock.now -= 60
    with pytest.raises(SystemExit, match="has BTC at 2025-12-10T12:00:00.*Is the clock right"):
        collect(exchange, tmp_path)
    (tmp_path / "BTC_2025-12-09_1200.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit, match="BTC_2025-12-09_1200.parquet is no chain that was collected here"):
        collect(exchange, tmp_path)


def test_a_folder_has_one_writer(exchange, tmp_path):
    with atomic.locked(tmp_path / "chains"), pytest.raises(SystemExit, match="is being written by process"):
        collect(exchange, tmp_path / "chains")
    assert not exchange.requests


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_killed_at_random_moments_it_leaves_whole_files_and_a_log_of_all_that_was_missed(exchange, tmp_path):
    folder, kills = tmp_path / "chains", os.environ.get("HARVEST_KILLS", "4")
    command = [sys.executable, str(ROOT / "tests/market/kills.py"), exchange.url, str(folder), kills, "1"]
    environment, limit = os.environ | {"PYTHONPATH": str(ROOT)}, 60 + 5 * int(kills)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr
    log = log_of(folder)
    assert sorted(entry["file"] for entry in log if "file" in entry) == chains_in(folder)
    assert sorted(path.name for path in folder.iterdir()) == [*chains_in(folder), "harvest.jsonl"]
    for name in ("BTC", "ETH"):
        its = [entry for entry in log if entry["underlying"] == name]
        begins, ends = [at(one) for one in its], [at(one, "until" if "until" in one else "due") for one in its]
        assert len(its) >= 2 and np.subtract(begins[1:], ends[:-1]).max() < 1.6, its  # no cycle is missed in silence
        assert np.diff([at(one) for one in its if "file" in one]).min() >= 1, its  # none stands there twice
        assert pa.concat_tables(pq.read_table(path) for path in folder.glob(f"{name}_*")).num_rows >= 80 * 2


# --- The command line


@pytest.mark.parametrize(
    "words, message",
    [
        (["BTC/USD", "--to", "x"], "'BTC/USD' is no currency such as BTC"),
        (["BTC", "--to", "x", "--every", "0.5"], "--every 0.5: give 1 second or more"),
        (["BTC", "--to", "x", "--every", "nan"], "--every nan"),
        (["BTC", "--to", "x", "--cycles", "0"], "--cycles 0: give 1 or more"),
        (["BTC", "--to", "x", "--days", "5"], "--days is of --history"),
        (["BTC"], "--to"),
    ],
)
def test_words_that_say_nothing_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as exit:
        harvest.main(words)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_an_address_that_is_none_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--url test.deribit.com is no address such as https://test.deribit.com"):
        harvest.main(["BTC", "--to", str(tmp_path), "--url", "test.deribit.com"])
