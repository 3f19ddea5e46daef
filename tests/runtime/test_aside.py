"""doctor, kill, explain, and the command that is told of trades: what their user reads and what they change."""

import datetime
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from conftest import on_the_default_stack
from language_model.test_policy import save_run
from markets import CONFIG, rich_if_volatile

from covered_call.atomic import locked
from covered_call.runtime import doctor, journal
from covered_call.runtime.agent import main
from covered_call.runtime.alerts import Alerts
from covered_call.runtime.engine import Agent
from covered_call.runtime.journal import opened, read
from covered_call.runtime.paper import Paper
from covered_call.runtime.policies import Rule
from covered_call.value_model.learning import fit
from covered_call.value_model.scorer import save
from runtime.account import AccountExchange
from runtime.markets import BEGUN, FREELY, ONE, quoted_states
from runtime.server import Server
from runtime.test_agent import configured, fails, said_by, week

pytestmark = on_the_default_stack
RULE = "policy: {rule: {threshold: 0.0}}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# doctor


def diagnosed(capsys, *lines: str, more: Sequence[str] = ()) -> tuple[dict[str, str], int]:
    """What is said of each thing, and the exit status."""
    status = main(["doctor", "--config", configured("\n".join(lines)), *more])
    said = capsys.readouterr().out.splitlines()
    return {line[5:].partition(":")[0]: line for line in said[:-1]}, status


def write_spots(days: int, until: datetime.date | None = None) -> str:
    until = until or datetime.datetime.now(datetime.UTC).date()
    rows = [f"{until - datetime.timedelta(days=number)},90000\n" for number in range(days)]
    with open("spot_BTC.csv", "w") as file:
        file.write("date,price\n" + "".join(rows))
    return "spots: spot_{underlying}.csv"


def test_where_all_is_well_nothing_is_to_mend(here, capsys):
    save(fit(rich_if_volatile(range(40)), rich_if_volatile(range(40, 50), seed=1), CONFIG), "q.zip")
    with Server() as server:
        policy = f"policy: {{openai: {{base_url: '{server.url}', model: tuned}}, q: q.zip, rule: {{}}}}"
        found, status = diagnosed(capsys, policy, write_spots(60), "fusion: {second: q}")
    assert status == 0 and {line[:4].strip() for line in found.values()} == {"ok"}
    assert set(found) == {"config", "code", "openai", "clock", "q", "spots", "disk"}
    assert "fitted until 2024-10-20" in found["q"] and "has tuned" in found["openai"]


def test_what_is_not_there_is_said_with_what_to_do(here, capsys, monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    policy = (
        "policy: {openai: {base_url: 'http://127.0.0.1:9/v1', model: m, key_variable: A_KEY}, q: q.zip, llm: none}"
    )
    found, status = diagnosed(capsys, policy, "spots: none.csv", "fusion: {mode: ensemble}")
    assert status == 1
    assert found["openai"] == "FAIL openai: key_variable: the environment has no A_KEY: export it, or leave it out."
    assert "q.zip is no file: make one with covered-call q-scorer" in found["q"]
    assert "There is no folder none: give one that covered-call train saved" in found["llm"]
    assert found["spots"].startswith("FAIL") and "none.csv' is no file" in found["spots"]
    assert main(["doctor", "--config", configured("polcy: {}")]) == 1
    assert "FAIL config: agent.yaml: 'polcy' is no key" in capsys.readouterr().out


def test_a_q_scorer_of_another_exit_style_is_to_mend(here, capsys):
    save(fit(rich_if_volatile(range(40)), rich_if_volatile(range(40, 50), seed=1), CONFIG), "q.zip")
    found, status = diagnosed(capsys, "policy: {q: q.zip}", "exit_style: tp_and_roll")
    assert status == 1 and "q.zip was tuned on hold_to_expiry, and exit_style is tp_and_roll" in found["q"]


def test_a_server_is_asked_for_its_model_and_its_time(here, capsys):
    with Server() as server:
        policy = f"policy: {{openai: {{base_url: '{server.url}', model: another}}}}"
        server.date = "Wed, 10 Dec 2025 01:05:13 GMT"
        found, status = diagnosed(capsys, policy)
        assert status == 1 and "has no another: name one of its models, such as tuned" in found["openai"]
        assert re.search(r"FAIL clock: \+\d+ s from the server's, and 5 s may be", found["clock"])
        server.date, server.models = "now", "<html>"
        found, status = diagnosed(capsys, policy)
        assert status == 0 and "does not say which models" in found["openai"] and "does not say" in found["clock"]
        server.status = 401
        found, status = diagnosed(capsys, policy)
        assert status == 1 and "answers 401: it asks for a key: see key_variable" in found["openai"]
    found, status = diagnosed(capsys, policy)
    assert status == 1 and "cannot be reached: ConnectError" in found["openai"]
    assert found["clock"].startswith("warn")  # who cannot be reached tells no time, which is no failure of the clock


def test_the_clock_is_compared_with_the_exchange_s_where_chains_are_to_come_from_there(here, capsys, monkeypatch):
    with AccountExchange() as exchange:
        words = ["--live", "--url", exchange.url]
        assert "exchange clock" not in diagnosed(capsys, RULE)[0]
        found, status = diagnosed(capsys, RULE, more=words)
        assert status == 0 and found["exchange clock"] == "ok   exchange clock: within 5 s of Deribit's"
        monkeypatch.setattr(exchange, "get_time", lambda: 1000 * (time.time() - 60))
        found, status = diagnosed(capsys, RULE, more=words)
        assert status == 1 and found["exchange clock"].startswith("FAIL exchange clock: +60 s from Deribit's, and 5 s")
        monkeypatch.setattr(exchange, "get_time", lambda: -1.0)
        assert "is -1.0, and no number of" in diagnosed(capsys, RULE, more=words)[0]["exchange clock"]
    monkeypatch.setattr(doctor, "SECONDS", 0.1)
    found, status = diagnosed(capsys, RULE, more=words)  # nobody is there any more
    assert status == 0 and found["exchange clock"].startswith("warn exchange clock: not compared: Deribit gave no")
    with pytest.raises(SystemExit):
        main(["doctor", "--config", "agent.yaml", "--url", exchange.url])
    assert "--url is of --live" in capsys.readouterr().err


def test_spots_that_do_not_reach_are_said(here, capsys):
    assert found_spots(capsys, write_spots(20)).startswith("warn spots: BTC: 20 closes from ")
    old = write_spots(80, datetime.date(2025, 1, 1))
    assert "to 2025-01-01: too old for decisions of today" in found_spots(capsys, old)
    assert "none are named" in found_spots(capsys, RULE)


@pytest.mark.parametrize(
    "days, said", [(1, "ok   vols: BTC: 10 vols, the last known from"), (9, "warn vols: BTC: 10 vols")]
)
def test_vols_that_have_ended_are_said(here, capsys, days, said):
    until = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=days)
    rows = [f"{until - datetime.timedelta(days=number)},50\n" for number in range(10)]
    (here / "dvol.csv").write_text("date,dvol\n" + "".join(rows))
    found, _ = diagnosed(capsys, RULE, "context_vols: dvol.csv")
    assert found["vols"].startswith(said) and ("too old for decisions of today" in found["vols"]) == (days == 9)


def found_spots(capsys, line: str) -> str:
    found, status = diagnosed(capsys, line)
    assert status == 0
    return found["spots"]


def test_the_folder_of_the_logs_is_looked_at(here, capsys, monkeypatch):
    said_by(capsys, "shadow", "--config", configured(RULE), "--snapshot", week(here / "chains.parquet"))
    found, _ = diagnosed(capsys, RULE)
    assert found["log"].endswith("out/agent/shadow: 4 lines, all whole") and found["lock"].endswith("shadow: free")
    with locked("out/agent/shadow"):
        found, status = diagnosed(capsys, RULE)
    assert status == 0 and f"process {os.getpid()} is at work there" in found["lock"]
    main(["kill", "--config", "agent.yaml"])
    assert "KILL is there: nothing is ordered" in diagnosed(capsys, RULE)[0]["kill"]
    with open(next((here / "out/agent/shadow").glob("*.jsonl")), "a") as file:
        file.write("no JSON\n")
    full = SimpleNamespace(free=journal.ROOM - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    found, status = diagnosed(capsys, RULE)
    assert status == 1 and "line 5" in found["state"] and found["disk"].startswith("FAIL")


def test_a_tuned_model_is_judged_by_its_manifest(here, capsys, monkeypatch):
    (here / "run").mkdir()
    save_run(here / "run", "per_decision_ranking", adapter=False)
    found, status = diagnosed(capsys, "policy: {llm: run}", "exit_style: tp_and_roll")
    assert status == 0 and "run is whole, tuned on today's prompts (per_decision_ranking" in found["llm"]
    assert "gpu" in found
    found, status = diagnosed(capsys, "policy: {llm: run}", "holdings: {BTC: 1, ETH: 5}", "sizing: {units: 1.0}")
    assert status == 1 and "ETH is held, and it was tuned on BTC" in found["llm"]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in doctor.of_gpu("int4").text
    path = here / "run" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt_version": "old"}))
    found, status = diagnosed(capsys, "policy: {llm: run}")
    assert status == 1 and "was tuned on prompts of version old" in found["llm"]


# ---------------------------------------------------------------------------------------------------------------------
# kill


def test_kill_stops_every_order_wherever_the_log_is_and_is_lifted(here, capsys):
    path, config = week(here / "chains.parquet"), configured(RULE)
    said = said_by(capsys, "kill", "--config", config)
    assert said.startswith("out/agent/KILL: written\nNothing is ordered from now on")
    for more in ([], ["--log", "elsewhere"]):
        said = said_by(capsys, "paper", "--config", config, "--snapshot", path, *more)
        assert len(re.findall("vetoed, kill_switch: ", said)) == 4 and "orders: " not in said
    said = said_by(capsys, "kill", "--config", config)
    assert "out/agent/KILL: was there\nout/agent/paper/KILL: written\n" in said
    said = said_by(capsys, "kill", "--config", config, "--lift")
    assert said == "out/agent/paper/KILL: removed\nout/agent/KILL: removed\nOrders may go again.\n"
    assert said_by(capsys, "kill", "--config", config, "--lift") == "out/agent: no KILL was there.\n"
    said = said_by(capsys, "paper", "--config", config, "--snapshot", path, "--log", "third")
    assert "orders: filled 1" in said


def test_the_switch_of_the_configuration_stops_every_order(here, capsys):
    path = week(here / "chains.parquet")
    config = configured(f"{RULE}\nrisk: {{kill_switch: true, max_spread_pct: 10}}")
    assert "kill_switch 4" in said_by(capsys, "paper", "--config", config, "--snapshot", path)


def test_a_switch_that_is_thrown_between_two_cycles_stops_the_next(here, capsys, monkeypatch):
    path, config = week(here / "chains.parquet"), configured(f"{RULE}\nrisk: {{max_positions: 9, max_spread_pct: 10}}")
    from covered_call.runtime import agent

    def thrown(cycle, drift):
        (here / "out/agent/KILL").write_text("")
        return "shown"

    monkeypatch.setattr(agent, "page", thrown)
    said = said_by(capsys, "paper", "--config", config, "--snapshot", path)
    assert "orders: filled 1" in said and "vetoed: kill_switch 3" in said


# ---------------------------------------------------------------------------------------------------------------------
# on_trade


def script(text: str) -> str:
    with open("hook.py", "w") as file:
        file.write(text)
    return f"{sys.executable} hook.py"


def test_each_trade_is_told_as_json_once_it_stands_in_the_log(here, capsys):
    hook = script(
        "import glob, sys; told, (path,) = sys.stdin.read(), glob.glob('out/agent/paper/*.jsonl')\n"
        "assert '\"completes\"' in open(path).read()\nopen('told.jsonl', 'a').write(told)"
    )
    config = configured(f"{RULE}\non_trade: {hook}")
    said = said_by(capsys, "paper", "--config", config, "--snapshot", week(here / "chains.parquet"))
    assert "  on_trade: told 1, failed 0\n" in said
    (line,) = map(json.loads, (here / "told.jsonl").read_text().splitlines())
    (cycle,) = (one for one in read("out/agent/paper") if one.get("orders"))
    assert cycle["intention"].items() <= line.items()
    assert (line["mode"], line["execution"]["status"]) == ("paper", "filled") and line["time"]


def test_nothing_is_told_where_nothing_is_traded(here, capsys):
    config = configured(f"{RULE}\non_trade: {script('raise SystemExit(1)')}")
    said = said_by(capsys, "shadow", "--config", config, "--snapshot", week(here / "chains.parquet"))
    assert "on_trade: told 0, failed 0" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [("import sys; sys.exit('no mail')", "exit status 1, no mail"), ("import time; time.sleep(60)", "it was killed"),
     (None, "FileNotFoundError")],
)  # fmt: skip
def test_a_command_that_fails_is_said_and_counted_and_changes_no_trade(here, caplog, text, said):
    states = quoted_states(3)
    with Alerts("no/such/command" if text is None else script(text), "paper", timeout=0.5) as alerts:
        began, agent = time.monotonic(), Agent([Rule()], ONE, Paper(), BEGUN)
        for cycle in agent.run(states):
            alerts.tell(cycle)
        waited = time.monotonic() - began
    assert (
        alerts.lines() == ["  on_trade: told 1, failed 1"]
        and said in caplog.text
        and "The trade stands" in caplog.text
    )
    assert len(agent.portfolio.positions) == 1
    assert waited < 60  # the command that sleeps was not waited for


# ---------------------------------------------------------------------------------------------------------------------
# explain


def test_a_decision_is_told_from_the_log_on_a_screen(here, capsys):
    said_by(capsys, "paper", "--config", configured(RULE), "--snapshot", week(here / "chains.parquet"))
    cycles = [line for line in read("out/agent/paper") if "orders" in line]
    sold = said_by(capsys, "explain", cycles[0]["decision_id"], "--log", "out/agent/paper")
    assert sold.startswith(f"{cycles[0]['decision_id']}, decided at 2025-12-10T01:05:13")
    name = cycles[0]["intention"]["instrument"]
    for text in ("State: spot 92,500, quoted at", f"  {name}: dte 9.2", "Portfolio: 1 BTC; equity 92,500 USD",
            f"  rule: {name}, confidence 1; best score", "Fusion: rule, of rule", "Sizing: 0.1 coin(s); wanted 0.1",
            "Vetoes: none", "  noted, margin: The margin used is unknown: the rule was not applied.",
            "  noted, min_ivrv: The call's IV/RV is unknown", f"Intention: SELL_CALL {name}, 0.1 coin(s) (rule)",
            "Orders: 1", "coin(s) (rule): filled at "):  # fmt: skip
        assert text in sold, text
    assert len(sold.splitlines()) < 40
    best = max(cycles[0]["state"]["decision"]["candidates"], key=lambda one: one["score"])
    assert f"  Reason: Score is {best['score']:.2f}. It is the highest of 3. Delta {best['delta']:.4f} is" in sold
    vetoed = said_by(capsys, "explain", cycles[1]["decision_id"], "--log", "out/agent/paper")
    assert "  max_positions: 1 against 1. 1 short calls of BTC are open, and 1 may be." in vetoed
    assert "Orders: none" in vetoed and f"  short 0.1 {name}, sold at " in vetoed
    config = configured("policy: {rule: {threshold: 9.9}}")
    said_by(capsys, "shadow", "--config", config, "--snapshot", week(here / "chains.parquet", 1))
    (cycle,) = read("out/agent/shadow")
    kept = said_by(capsys, "explain", cycle["decision_id"], "--log", "out/agent/shadow")
    assert "Explanation of the answer NO_TRADE:\n  Reason: " in kept


def test_an_order_whose_end_is_not_known_is_said(here, capsys):
    class Dies(Paper):
        def sell(self, intention, state, rolls):
            raise KeyboardInterrupt

    (state,) = quoted_states(2)[1:]
    with opened("log") as journal, pytest.raises(KeyboardInterrupt):
        list(Agent([Rule()], FREELY, Dies(), BEGUN, journal).run([state]))
    said = said_by(capsys, "explain", state.decision.decision_id, "--log", "log")
    assert "nothing is known of it: the agent ended before it was told" in said


def test_a_policy_that_failed_is_told_with_why(here, capsys):
    config = configured("policy: {openai: {base_url: 'http://127.0.0.1:9/v1', model: m}, rule: {}}")
    said_by(capsys, "shadow", "--config", config, "--snapshot", week(here / "chains.parquet", 1))
    (cycle,) = read("out/agent/shadow")
    said = said_by(capsys, "explain", cycle["decision_id"], "--log", "out/agent/shadow")
    assert "  openai: failed, ServerError: ConnectError" in said and "Fusion: llm_failed, of rule" in said


def test_a_decision_that_is_not_there_is_one_line_with_the_nearest(here, capsys):
    said_by(capsys, "shadow", "--config", configured(RULE), "--snapshot", week(here / "chains.parquet", 1))
    said = fails("explain", "BTC|2025-12-10", "--log", "out/agent/shadow")
    assert "has no decision 'BTC|2025-12-10' among 1. Did you mean BTC|2025-12-10T01:05:13" in said
    assert "Give the folder of a log" in fails("explain", "BTC|x", "--log", "none")


@pytest.mark.parametrize("name", ["doctor", "kill", "explain"])
def test_each_has_a_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert f"covered-call agent {name} " in capsys.readouterr().out
