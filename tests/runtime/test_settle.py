"""What candidates of a log would have brought: the same as covered-call backtest, paper and replay have it."""

import csv
import datetime
import json
from pathlib import Path

import pytest
from conftest import REAL_DATA, needs_real_data, on_the_default_stack, write_csv
from market.quotes import write_days
from markets import walk

from covered_call.candidates.schema import NO_CANDIDATES
from covered_call.market import backtest
from covered_call.runtime.agent import main
from covered_call.runtime.journal import read
from covered_call.runtime.logged import read_log
from covered_call.runtime.outcomes_log import FILE_NAME, read_outcomes
from runtime.logs import days, say, settle, write_log
from tests.market.chains import Snap, snap, write_history

pytestmark = on_the_default_stack

FREE = (
    "risk: {max_positions: 999, max_spread_pct: 10, without: [not_covered, expiry_exposure, net_delta, win_rate, "
    "consecutive_losses, dd_buffer, min_ivrv, open_interest]}\n"
)
OUTCOME = ("pnl_vs_hodl", "max_drawdown_pct", "outcome_days")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chains").mkdir()
    return tmp_path


def configured(text: str = "") -> str:
    Path("agent.yaml").write_text(f"policy: {{rule: {{threshold: 0.0}}}}\n{FREE}{text}")
    return "agent.yaml"


def fails(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return str(stopped.value)


def outcomes_in(pattern: str) -> dict[tuple[str, str], tuple]:
    """What files say of each candidate, in their own digits."""
    rows = [row for path in sorted(Path().glob(pattern)) for row in csv.DictReader(path.open(newline=""))]
    return {(row["decision_time"], row["instrument"]): tuple(row[name] for name in OUTCOME) for row in rows
        if row["instrument"] != NO_CANDIDATES}  # fmt: skip


def exported(log: str) -> dict[tuple[str, str], tuple]:
    main(["export", log, "--to_csv", f"{log}_csv"])
    return outcomes_in(f"{log}_csv/*.csv")


# --- The same as the other commands say


@pytest.mark.parametrize("style", ["hold_to_expiry", "tp_and_roll"])
def test_by_snapshots_each_outcome_is_that_of_the_backtest_digit_for_digit(here, capsys, style):
    write_days(here / "chains", 22)
    backtest.main(["--chains", "chains", "--at", "all", "--exit_style", style, "--to", "runs"])
    config = configured(f"exit_style: {style}\n")
    main(["shadow", "--config", config, "--snapshot", "chains/*.parquet", "--log", "log"])
    main(["settle", "log", "--snapshot", "chains/*.parquet"])
    said = capsys.readouterr().out
    expected = outcomes_in("runs/*.csv")
    settled = sum(bool(pnl) for pnl, *_ in expected.values())
    assert 50 < settled < len(expected)
    assert f"{settled:,} of {len(expected):,} candidates are settled, {settled:,} of them now" in said
    assert exported("log") == expected


def test_a_call_is_not_bought_back_at_the_snapshot_that_it_is_sold_at(here):
    """Its strike is within 2 % of spot from the start: that is defended from the next snapshot on."""
    name = "BTC-8JAN26-101500-C"
    snaps = [snap(day, 100_000.0, {name: (0.01 + day / 1000, 0.012 + day / 1000, 0.011)}, iv=0.2) for day in range(3)]
    write_history(here / "chains" / "chain.parquet", snaps)
    backtest.main(["--chains", "chains", "--at", "all", "--exit_style", "tp_and_roll", "--to", "runs"])
    main(["shadow", "--config", configured("exit_style: tp_and_roll\n"), "--snapshot", "chains/*", "--log", "log"])
    main(["settle", "log", "--snapshot", "chains/*"])
    expected = outcomes_in("runs/*.csv")
    assert exported("log") == expected and expected["2026-01-01T08:00:00+00:00", name][2] == "1.0"


def test_paper_s_own_trades_are_settled_as_paper_settled_them(here, capsys):
    write_days(here / "chains", 22)
    dates = [datetime.date(2025, 11, 1) + datetime.timedelta(days=number) for number in range(90)]
    Path("spot_BTC.csv").write_text("date,price\n" + "".join(f"{day},{94_000 + 500 * day.day}\n" for day in dates))
    config = configured("spots: spot_{underlying}.csv\nsizing: {units: 0.1}\n")
    main(["paper", "--config", config, "--snapshot", "chains/*.parquet", "--log", "log"])
    main(["settle", "log", "--snapshot", "chains/*.parquet"])
    log, outcomes = read_log("log"), read_outcomes("log")
    lines = [line for line in read("log") if line.get("events")]
    opened = {e["position"]["entry_time"]: e for line in lines for e in line["events"] if e["event"] == "opened"}
    closed = [event for line in lines for event in line["events"] if event["event"] == "closed"]
    assert len(closed) > 3
    ids = {one.line["state"]["decision"]["decision_time"]: one.decision.decision_id for one in log.entries}
    for one in closed:
        units = -opened[one["entry_time"]]["position"]["units"]
        expected = outcomes[ids[one["entry_time"]], one["instrument"]].pnl_vs_hodl
        assert expected is not None and one["pnl_usd"] == pytest.approx(units * expected, abs=1e-9)


@pytest.mark.parametrize("options", ["", "outcomes: {fee: 0.0003, delivery_fee: 0.00015}\n"])
def test_a_replay_is_settled_as_it_was_replayed(here, capsys, options):
    write_csv(here / "walk.csv", walk(60))
    config = configured(f"holdings: {{BTC: 99}}\nsizing: {{units: 1.0}}\n{options}")
    main(["replay", "--config", config, "--data_files", "walk.csv", "--log", "log"])
    said = capsys.readouterr().out
    main(["settle", "log", "--data_files", "*.csv"])
    taken = [one for one in read_log("log").entries if one.meant.fate == "taken"]
    outcomes = read_outcomes("log")
    brought = sum(outcomes[one.decision.decision_id, one.meant.instrument].pnl_vs_hodl for one in taken)
    assert f"{len(taken)} sales brought {brought:+,.2f} USD" in said and len(taken) > 20
    assert "are not: what it brings is not in the files." in capsys.readouterr().out


@needs_real_data
@pytest.mark.slow
@pytest.mark.parametrize("style", ["hold_to_expiry", "tp_and_roll"])
def test_on_two_real_months_each_outcome_is_that_of_the_backtest(here, style):
    chains = sorted((REAL_DATA / "market").glob("chain_*.parquet"))
    if not chains:
        pytest.skip("no real chains here")
    spots = str(REAL_DATA / "market" / "spot_{underlying}_0800utc.csv")
    paths = [str(path) for path in chains]
    backtest.main(["--chains", *paths, "--at", "all", "--exit_style", style, "--spots", spots, "--to", "runs"])
    config = configured(f"exit_style: {style}\nspots: {spots}\nholdings: {{BTC: 1.0, ETH: 10.0}}\n")
    main(["shadow", "--config", config, "--snapshot", *paths, "--log", "log"])
    main(["settle", "log", "--snapshot", *paths])
    found = exported("log")
    assert len(found) == 4505 and found == outcomes_in("runs/*.csv")


# --- By now


def test_run_again_it_adds_what_is_known_since_and_never_touches_the_log(here, capsys):
    write_days(here / "chains", 22)
    main(["shadow", "--config", configured(), "--snapshot", "chains/*.parquet", "--log", "log"])
    (path,) = Path("log").glob("decisions_*.jsonl")
    before = path.read_bytes()
    early = sorted(str(path) for path in Path("chains").iterdir())[:12]
    main(["settle", "log", "--snapshot", *early])
    first = Path("log", FILE_NAME).read_bytes()
    main(["settle", "log", "--snapshot", "chains/*.parquet"])
    whole = Path("log", FILE_NAME).read_bytes()
    assert b"" < first < whole and whole.startswith(first)
    main(["settle", "log", "--snapshot", "chains/*.parquet"])
    assert Path("log", FILE_NAME).read_bytes() == whole and path.read_bytes() == before
    assert ", 0 of them now" in capsys.readouterr().out
    Path("log", FILE_NAME).unlink()
    main(["settle", "log", "--snapshot", "chains/*.parquet"])
    assert sorted(whole.splitlines()) == sorted(Path("log", FILE_NAME).read_bytes().splitlines())


def test_what_has_not_expired_waits_even_where_a_price_is_near(here, capsys):
    states = days(6)  # of calls of a week, of which none has expired by then
    write_log(here / "log", [say(0)] * 6, states=states)
    main(["settle", "log"])
    said = capsys.readouterr().out
    assert said.startswith("0 of 12 candidates are settled") and "12 are not: still open when the prices end." in said
    assert not Path("log", FILE_NAME).exists()


def test_a_log_s_own_spots_and_given_ones_settle_what_is_held_to_expiry(here, capsys):
    states = days(9)  # at a spot of 100,000 at each expiry
    write_log(here / "log", [say(0)] * 9, states=states)
    main(["settle", "log"])
    assert capsys.readouterr().out.startswith("4 of 18 candidates are settled, 4 of them now")
    decision = states[0].decision
    sold = states[0].quotes[decision.candidates[0].instrument]
    found = read_outcomes("log")[decision.decision_id, sold.instrument]
    assert found.pnl_vs_hodl == pytest.approx(sold.bid - min(30.0, 0.125 * sold.bid))  # it expired at its strike
    assert (found.how, found.settled_at) == ("log", decision.decision_time + datetime.timedelta(days=7))
    later = [states[0].decision.decision_time.date() + datetime.timedelta(days=day) for day in range(30)]
    Path("spots.csv").write_text("date,price\n" + "".join(f"{day},101000\n" for day in later))
    main(["settle", "log", "--spots", "spots.csv"])
    assert capsys.readouterr().out.startswith("18 of 18 candidates are settled, 14 of them now")
    decision = states[5].decision
    sold = states[5].quotes[decision.candidates[0].instrument]
    found = read_outcomes("log")[decision.decision_id, sold.instrument]
    paid = 1000 + min(0.00015 * 101_000, 0.125 * 1000)
    assert found.pnl_vs_hodl == pytest.approx(sold.bid - min(30.0, 0.125 * sold.bid) - paid) and found.how == "spots"


def test_what_nobody_bids_for_can_never_be_known_and_is_not_asked_again(here, capsys):
    states = days(9)
    name = states[0].decision.candidates[0].instrument
    states[0].quotes[name] = states[0].quotes[name]._replace(bid=None)
    write_log(here / "log", [say(0)] * 9, states=states)
    for new in (4, 0):
        main(["settle", "log"])
        said = capsys.readouterr().out
        assert f"4 of 18 candidates are settled, {new} of them now" in said
        assert "1 of them can never be known: no bid to sell at." in said
    assert read_outcomes("log")[states[0].decision.decision_id, name].pnl_vs_hodl is None


def test_an_outcome_that_another_process_added_meanwhile_stays(here):
    states = write_log(here / "log", [say(0)])
    settle(here / "log", states, [(1.0, None)])
    settle(here / "log", states, [(9.0, 2.0)])
    assert [one.pnl_vs_hodl for one in read_outcomes("log").values()] == [1.0, 2.0]
    assert len(Path("log", FILE_NAME).read_text().splitlines()) == 2


# --- What cannot be


def test_what_cannot_settle_a_log_is_one_line(here):
    write_log(here / "replayed", [say(0)] * 2, mode="replay", states=[one._replace(quotes={}) for one in days(2)])
    assert "is of a replay, which has no quotes: give the backtest's --data_files" in fails("settle", "replayed")
    from runtime.markets import quoted_state

    write_log(here / "rolls", [say(0)], states=[quoted_state(exit_style="tp_and_roll")])
    assert "is of tp_and_roll, whose calls may be bought back" in fails("settle", "rolls")
    write_days(here / "chains", 3)
    write_log(here / "log", [say(0)] * 2)
    assert "--snapshot no.parquet is no file" in fails("settle", "log", "--snapshot", "no.parquet")
    write_csv(here / "walk.csv", walk(60))
    assert "none of its decisions is in walk.csv" in fails("settle", "log", "--data_files", "walk.csv")
    assert "there is no decisions_YYYYMMDD.jsonl" in fails("settle", "chains")
    with pytest.raises(SystemExit):
        main(["settle", "log", "--data_files", "walk.csv", "--spots", "a.csv"])


def test_files_that_overlap_are_said(here):
    states = days(4)
    write_log(here / "log", [say(0)] * 4, states=states)
    name, day = "BTC-31JAN25-120000-C", datetime.timedelta(days=1)
    snaps = [Snap(states[0].decision.decision_time + number * day, 100_000.0, {name: (0.01, 0.02, 0.015)})
        for number in range(4)]  # fmt: skip
    write_history(here / "chains" / "a.parquet", snaps)
    main(["settle", "log", "--snapshot", "chains/a.parquet"])
    write_history(here / "chains" / "b.parquet", snaps[2:])
    assert "Files of one underlying must not overlap" in fails("settle", "log", "--snapshot", "chains/*.parquet")


def test_a_replay_is_settled_by_and_by_as_its_files_come(here, capsys):
    rows = walk(60)
    write_csv(here / "walk.csv", rows)
    main(["replay", "--config", configured("holdings: {BTC: 99}\n"), "--data_files", "walk.csv", "--log", "log"])
    write_csv(here / "half.csv", rows[:60])
    main(["settle", "log", "--data_files", "half.csv"])
    assert "60 are not: their decision is not in the files." in capsys.readouterr().out
    first = read_outcomes("log")
    main(["settle", "log", "--data_files", "walk.csv"])
    whole = read_outcomes("log")
    assert 0 < len(first) < len(whole) and whole == whole | first
    main(["settle", "log", "--data_files", "walk.csv"])
    assert ", 0 of them now" in capsys.readouterr().out and read_outcomes("log") == whole


def test_snapshots_of_another_market_are_said(here):
    write_days(here / "chains", 3)
    states = days(2)
    states = [one._replace(decision=one.decision._replace(underlying="ETH")) for one in states]
    write_log(here / "log", [say(0)] * 2, states=states)
    assert "No snapshot is of ETH, of which the log has decisions" in fails("settle", "log", "--snapshot", "chains/*")


def test_a_backtest_of_other_candidates_is_said(here):
    write_csv(here / "walk.csv", walk(60))
    config = configured("holdings: {BTC: 99}\n")
    main(["replay", "--config", config, "--data_files", "walk.csv", "--log", "log"])
    text = Path("walk.csv").read_text()
    first = text.splitlines()[1].split(",")[2]
    Path("walk.csv").write_text(text.replace(first, "61000"))
    assert "the files have another spot, or other candidates, than the log" in fails(
        "settle", "log", "--data_files", "walk.csv"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 9}, "schema_version 9, and this is 1"),
        ({"pnl_vs_hodl": "much"}, "pnl_vs_hodl is no number"),
        ({"settled_at": None}, "an outcome has a time"),
        ({"price": 3}, "price"),
    ],
)
def test_an_outcome_that_settle_did_not_write_names_its_line(here, change, reason):
    states = write_log(here / "log", [say(0)] * 2)
    settle(here / "log", states, [(1.0, 2.0)] * 2)
    path = here / "log" / FILE_NAME
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, json.dumps(json.loads(rest[0]) | change), *rest[1:]]))
    said = fails("report", "log")
    assert "outcomes.jsonl, line 2: " in said and reason in said and "Remove the file, and settle again." in said
