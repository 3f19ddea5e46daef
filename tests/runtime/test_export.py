"""The loop closed: a log is settled, exported, learnt from, and what was learnt decides; and two logs compared."""

import csv
import datetime
import json
import re
from pathlib import Path

import pytest
from conftest import REAL_DATA, needs_real_data, on_the_default_stack, read_candidates, write_csv
from market.quotes import write_days
from markets import walk

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import CHAIN_COLUMNS, COLUMNS, NO_CANDIDATES, QUOTED_COLUMNS
from covered_call.runtime.agent import main
from covered_call.runtime.diff import diff_of
from covered_call.runtime.export import export
from covered_call.runtime.logged import read_log
from covered_call.value_model import q_scorer
from covered_call.value_model.scorer import QScorer
from runtime.logs import days, say, settle, write_log
from runtime.test_settle import FREE

pytestmark = on_the_default_stack


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def fails(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return str(stopped.value)


# --- The file


def test_the_file_is_of_the_layout_of_the_teacher_with_what_was_taken_and_what_each_brought(here):
    states = write_log(here / "log", [say(1), say(None), say(0)], vetoes={2: ("spread",)})
    settle(here / "log", states, [(500.0, -200.0), (None, 300.0), (10.0, 20.0)], hours=36)
    (one,) = export("log", "runs")
    assert re.fullmatch(
        r"training_candidates_BTC_20250103_20250105_hold_to_expiry_\d{8}_\d{6}\.csv", one.path.name
    )  # fmt: skip
    assert (one.decisions, one.candidates, one.settled) == (3, 6, 5)
    rows = rows_of(one.path)
    assert tuple(rows[0]) == (*COLUMNS, *QUOTED_COLUMNS, *CHAIN_COLUMNS) and {row["strategy"] for row in rows} == {
        "agent_shadow"
    }
    said = [
        tuple(row[name] for name in ("trade_executed", "chosen", "action", "pnl_vs_hodl", "outcome_days"))
        for row in rows
    ]
    assert said == [
        ("1", "0", "SKIP", "500.0", "1.5"), ("1", "1", "SELL_CALL", "-200.0", "1.5"),
        ("0", "0", "SKIP", "", ""), ("0", "0", "SKIP", "300.0", "1.5"),
        ("0", "0", "SKIP", "10.0", "1.5"), ("0", "0", "SKIP", "20.0", "1.5"),  # stopped: nothing was taken
    ]  # fmt: skip
    quote = states[0].quotes[states[0].decision.candidates[0].instrument]
    assert [float(rows[0][name]) for name in ("bid", "ask", "mark", "open_interest")] == list(quote[1:])
    read = read_candidates([str(one.path)], CoveredCallCandidatesConfig(settlement="recorded"))
    assert [(one.decision, one.chosen) for one in read] == [
        (state.decision, chosen) for state, chosen in zip(states, (1, None, None), strict=True)
    ]
    assert [its.pnl_vs_hodl for its in read[1].counterfactuals] == [None, 300.0]


def test_a_decision_without_candidates_is_a_placeholder(here):
    (state,) = days(1)
    write_log(here / "log", [say(None)], states=[state._replace(decision=state.decision._replace(candidates=()))])
    (one,) = export("log", "runs")
    assert [row["instrument"] for row in rows_of(one.path)] == [NO_CANDIDATES] and one.candidates == 0


def test_states_are_told_apart_by_what_was_held(here):
    write_log(here / "log", [say(None), say(0), say(None), say(None)], mode="paper")
    times = {}
    for states in ("all", "flat_only", "hold_only"):
        (one,) = export("log", states, states)
        times[states] = {row["decision_time"][:10] for row in rows_of(one.path)}
    assert times["flat_only"] == {"2025-01-03", "2025-01-04"} and times["hold_only"] == {"2025-01-05", "2025-01-06"}
    assert times["all"] == times["flat_only"] | times["hold_only"]
    write_log(here / "shadow", [say(0)] * 2)
    said = fails("export", "shadow", "--to_csv", "runs", "--label_states", "hold_only")
    assert "label_states hold_only leaves none of its 2 decisions" in said.replace("--", "")


# --- The loop


def test_replay_settle_export_learn_and_decide_with_it(here, capsys):
    write_csv(here / "walk.csv", walk(120))
    Path("agent.yaml").write_text(f"holdings: {{BTC: 99}}\nsizing: {{units: 1.0}}\n{FREE}")
    main(["replay", "--config", "agent.yaml", "--data_files", "walk.csv", "--log", "log"])
    main(["settle", "log", "--data_files", "walk.csv"])
    main(["export", "log", "--to_csv", "learn"])
    q_scorer.main(["--data_files", "learn/*.csv", "--folds", "0", "--output_dir", "q"])
    scorer = QScorer.load("q/q_scorer.zip")
    assert scorer.fitted.metadata["train"]["known"] > 100 and list(scorer.fitted.metadata["data_files"]) == [
        path.name for path in Path("learn").iterdir()
    ]
    (here / "chains").mkdir()
    write_days(here / "chains", 6)
    Path("next.yaml").write_text(f"policy: {{q: q, rule: {{}}}}\n{FREE}")
    capsys.readouterr()
    main(["paper", "--config", "next.yaml", "--snapshot", "chains/*.parquet", "--log", "next"])
    assert "by: q 6" in capsys.readouterr().out
    entries = read_log("next").entries
    assert len({one.line["versions"]["q"] for one in entries}) == 1 and all(one.asked for one in entries)
    its = [one.line["proposals"][0] for one in entries]
    assert all(one["source"] == "q" and one["best"] and one["error"] is None for one in its)


def test_quotes_of_shadow_are_learnt_from_as_well(here, capsys):
    (here / "chains").mkdir()
    write_days(here / "chains", 22)
    Path("agent.yaml").write_text(f"policy: {{rule: {{threshold: 0.0}}}}\n{FREE}")
    main(["shadow", "--config", "agent.yaml", "--snapshot", "chains/*.parquet", "--log", "log"])
    day = datetime.date(2025, 12, 10)
    spots = "".join(f"{day + datetime.timedelta(days=number)},{94_000 + 900 * (number % 5)}\n" for number in range(60))
    Path("spots.csv").write_text(f"date,price\n{spots}")
    main(["settle", "log", "--snapshot", "chains/*.parquet", "--spots", "spots.csv"])
    main(["export", "log", "--to_csv", "learn"])
    said = capsys.readouterr().out
    assert re.search(r"(\d+) of \1 candidates are settled", said)
    (path,) = Path("learn").iterdir()
    read = read_candidates([str(path)], CoveredCallCandidatesConfig())
    assert all(its.pnl_vs_hodl is not None for one in read for its in one.counterfactuals)


@needs_real_data
@pytest.mark.slow
def test_the_loop_on_two_real_months(here, capsys):
    chains = [str(path) for path in sorted((REAL_DATA / "market").glob("chain_BTC*.parquet"))]
    if not chains:
        pytest.skip("no real chains here")
    spots = REAL_DATA / "market" / "spot_{underlying}_0800utc.csv"
    Path("agent.yaml").write_text(f"spots: {spots}\n")
    main(["shadow", "--config", "agent.yaml", "--snapshot", *chains, "--log", "log"])
    main(["settle", "log", "--snapshot", *chains])
    main(["export", "log", "--to_csv", "learn"])
    splits = ["--splits", "0.55", "0.44", "0.01"]  # for the purge takes three weeks at each border
    q_scorer.main(["--data_files", "learn/*.csv", *splits, "--folds", "0", "--output_dir", "q"])
    Path("next.yaml").write_text(f"policy: {{q: q, rule: {{}}}}\nspots: {spots}\n")
    main(["paper", "--config", "next.yaml", "--snapshot", *chains, "--log", "next"])
    main(["settle", "next", "--snapshot", *chains])
    main(["report", "next"])
    found = json.loads(Path("next", "report.json").read_text())
    assert found["fusion"] == {"q": 235} and found["audit"]["BTC"]["q"]["q"][0]["n"] > 0


# --- Two logs


@pytest.fixture
def pair(here):
    """The second differs on each day but the first and the last, and is alone on one more."""
    states = days(6)
    one = [say(0), say(0), say(None), say(0), say(None)]
    two = [say(0), say(1), say(0), say(0), say(None), say(0)]
    write_log(here / "one", one, states=states[:5], config={"risk": {"max_positions": 1}, "exit": "hold"})
    write_log(here / "two", two, states=states, vetoes={3: ("spread",)}, config={"risk": {"max_positions": 3},
        "exit": "hold"})  # fmt: skip
    outcomes = [(100.0, 0.0), (-50.0, 200.0), (30.0, 0.0), (80.0, 0.0), (5.0, 5.0)]
    for folder in ("one", "two"):
        settle(here / folder, states[:5], outcomes)
    return states


def test_what_two_logs_differ_in_is_counted_and_paid(pair):
    found = diff_of("one", "two")
    assert found["configuration"] == {"risk.max_positions": [1, 3]}
    assert found["decisions"] == {"both": 5, "one": 0, "other": 1} and found["other_market"] == 0
    assert found["agreement"] == pytest.approx(2 / 5)
    assert found["kinds"] == {
        "both take the same call": 1, "both take a call, not the same": 1, "the second alone takes one": 1,
        "the first alone takes one": 1, "both take nothing": 1,
    }  # fmt: skip
    money = found["money"]
    assert money["settled"] == 5 and money["pnl_usd"] == [100 - 50 + 80, 100 + 200 + 30]
    assert money["pnl_usd_at_units"] == pytest.approx([13.0, 33.0])  # 0.1 coin each
    assert money["mean_gain_usd"] == pytest.approx((330 - 130) / 5)
    assert [row["gain_usd"] for row in found["differences"]] == [250.0, 30.0, -80.0]
    assert found["why"][1] == {"taken: llm": 2, "vetoed: spread": 1}


def test_the_difference_is_shown_and_written(pair, capsys):
    main(["diff", "one", "two", "--json", "diff.json"])
    said = capsys.readouterr().out
    assert "  risk.max_positions: 1 -> 3\n" in said
    assert "5 decisions are in both, 0 in the first alone, 1 in the other." in said
    assert "first +130.00, second +330.00; at their units +13.00 and +33.00." in said
    assert re.search(r"BTC\|2025-01-06T.*taken: llm +NO_TRADE +vetoed: spread +-80\.00", said)
    assert json.loads(Path("diff.json").read_text())["differences"] == diff_of("one", "two")["differences"]


def test_the_same_log_twice_is_no_difference(pair, capsys):
    found = diff_of("one", "one")
    assert found["agreement"] == 1.0 and found["differences"] == [] and found["money"]["mean_gain_usd"] == 0.0
    main(["diff", "one", "one"])
    assert "The configurations of both are the same." in capsys.readouterr().out


def test_what_is_not_settled_has_no_money_and_logs_of_other_windows_no_difference(here, capsys):
    states = days(4)
    write_log(here / "one", [say(0)] * 2, states=states[:2])
    write_log(here / "two", [say(1)] * 2, states=states[:2])
    main(["diff", "one", "two"])
    assert "What they took is not settled" in capsys.readouterr().out
    write_log(here / "later", [say(0)] * 2, states=states[2:])
    assert "have no decision in common: give two logs of one window" in fails("diff", "one", "later")


def test_another_input_is_said(here, capsys):
    states = days(2)
    write_log(here / "one", [say(0)] * 2, states=states)
    other = [one._replace(decision=one.decision._replace(spot=99_000.0)) for one in states]
    write_log(here / "two", [say(0)] * 2, states=other)
    main(["diff", "one", "two"])
    assert "At 2 of them spot or candidates differ: their input is not the same." in capsys.readouterr().out


def test_a_long_pair_has_an_interval(here, capsys):
    states = write_log(here / "one", [say(None)] * 30)
    write_log(here / "two", [say(0)] * 30)
    settle(here / "two", states, [(float(number), 0.0) for number in range(30)])
    found = diff_of("one", "two")["money"]
    low, high = found["interval_usd"]
    assert low < found["mean_gain_usd"] == 14.5 < high
    main(["diff", "one", "two"])
    assert "... and 10 more: --json has all." in capsys.readouterr().out
