"""The command over the cycle: what its user reads, and what is said of a configuration that cannot be."""

import dataclasses
import datetime
import os
import re
import signal

import pytest
import yaml
from conftest import ROOT, decision, on_the_default_stack, python, write_csv
from language_model.test_policy import save_run
from market.quotes import NOW, as_history, chain, quote, write_harvest
from markets import CONFIG, rich_if_volatile, walk

from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.runtime import agent
from covered_call.runtime.agent import main
from covered_call.runtime.agent_config import SECTIONS, AgentConfig, ConfigError, read_config
from covered_call.runtime.fusion import MODES
from covered_call.runtime.journal import read
from covered_call.runtime.policies import Querying
from covered_call.runtime.risk import CODES
from covered_call.value_model.learning import fit
from covered_call.value_model.scorer import save

pytestmark = on_the_default_stack


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


WIDE = "risk: {max_spread_pct: 10}\n"  # as the quotes of these tests are
FREE = (
    "risk: {max_positions: 999, without: [not_covered, expiry_exposure, net_delta, win_rate, consecutive_losses, "
    "dd_buffer, min_ivrv]}"
)


def configured(text: str) -> str:
    with open("agent.yaml", "w") as file:
        file.write(text if "risk: {" in text or ": " not in text else f"{text}\n{WIDE}")
    return "agent.yaml"


def said_by(capsys, *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def fails(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return str(stopped.value)


def week(path, days: int = 4) -> str:
    times = [NOW + datetime.timedelta(days=number) for number in range(days)]
    return write_harvest(path, [row for time in times for row in as_history(chain(), time)])


def test_a_replay_tells_what_was_sold_and_what_that_brought(here, capsys):
    path = write_csv(here / "walk.csv", walk(60, "hold_to_expiry"))
    config = configured(f"holdings: {{BTC: 99}}\nsizing: {{units: 1.0}}\n{FREE}\n")
    said = said_by(capsys, "replay", "--config", config, "--data_files", path)
    assert "60 decisions\n  meant: SELL_CALL 30, NO_TRADE 30\n  by: rule 60\n  orders: filled 27, unfilled 3\n" in said
    assert re.search(r"27 sales brought [+-][\d,.]+ USD against holding the coin, at the files' own vols", said)
    assert "3 more were not made: what they bring is unknown.\n" in said
    (folder,) = (here / "out" / "agent").iterdir()
    assert f"Log: {folder.relative_to(here)}" in said and len(list(read(folder))) == 90


def test_one_position_at_most_is_the_default_and_its_vetoes_are_counted(here, capsys):
    path = write_csv(here / "walk.csv", walk(60, "hold_to_expiry"))
    said = said_by(
        capsys,
        "replay",
        "--config",
        configured("holdings: {BTC: 5}\nsizing: {units: 1.0}\nrisk: {without: [min_ivrv]}"),
        "--data_files",
        path,
        "--log",
        "log",
    )
    assert re.search(r"vetoed: .*max_positions \d+", said) and {
        line["config_hash"] for line in read("log") if "mode" in line
    }
    assert "One is made anew" in fails("replay", "--config", "agent.yaml", "--data_files", path, "--log", "log")


def test_a_replay_over_what_a_policy_was_tuned_on_says_so(here, capsys):
    save(fit(rich_if_volatile(range(40)), rich_if_volatile(range(40, 50), seed=1), CONFIG), "q.zip")
    path = write_csv(here / "walk.csv", walk(60, "hold_to_expiry"))
    config = configured("policy: {q: q.zip, rule: {threshold: 3.0}}")
    said = said_by(capsys, "replay", "--config", config, "--data_files", path, "--log", "log")
    assert "  by: q 60\n" in said
    assert re.search(r"50 of the decisions are of the time until 2024-10-20, on which q was tuned", said)
    lines = [line for line in read("log") if "drift" in line]
    assert all(line["drift"]["q"] for line in lines) and lines[0]["versions"]["q"].startswith("sha256:")


def test_shadow_shows_each_cycle_and_sells_nothing_and_goes_on_where_it_ended(here, capsys):
    path = week(here / "chains.parquet")
    config = configured("policy: {rule: {threshold: 0.0}}")
    said = said_by(capsys, "shadow", "--config", config, "--snapshot", path)
    assert said.startswith("BTC 2025-12-10 01:05:13 UTC, hold_to_expiry: spot 92,500.00, 3 candidates\n  rule: BTC-")
    assert "SELL_CALL BTC-19DEC25-" in said and "0.1 coin(s)" in said and "filled" not in said
    assert said.endswith("4 decisions\n  meant: SELL_CALL 4\n  by: rule 4\nLog: out/agent/shadow\n")
    again = said_by(capsys, "shadow", "--config", config, "--snapshot", path)
    assert again == "0 decisions\nAll of these were decided before. Log: out/agent/shadow\n"
    assert len(list(read("out/agent/shadow"))) == 4


def test_paper_sells_at_the_bid_holds_one_call_and_says_what_it_is_worth(here, capsys):
    path = week(here / "chains.parquet")
    config = configured("policy: {rule: {threshold: 0.0}}")
    said = said_by(capsys, "paper", "--config", config, "--snapshot", path)
    assert len(re.findall(r"  filled at [\d,.]+ USD, fee \d\.\d\d\n", said)) == 1
    assert len(re.findall("vetoed, max_positions: 1 short calls of BTC are open", said)) == 3
    assert re.search(r"equity before orders [\d,.]+ USD; open: 0\.1 BTC-19DEC25-\d+-C sold at [\d,.]+; 0 trade", said)
    assert "orders: filled 1" in said


def test_paper_settles_at_the_closes_it_is_given(here, capsys):
    rows = as_history(chain(), NOW) + as_history([quote("BTC-26DEC25-96000-C")], NOW + datetime.timedelta(days=12))
    path = write_harvest(here / "chains.parquet", rows)
    days = [datetime.date(2025, 10, 1) + datetime.timedelta(days=number) for number in range(90)]
    (here / "spot_BTC.csv").write_text("date,price\n" + "".join(f"{day},90000\n" for day in days))
    config = "policy: {rule: {threshold: 0.0}}\nspots: spot_{underlying}.csv"
    said = said_by(capsys, "paper", "--config", configured(config), "--snapshot", path)
    settled = said.partition("2025-12-22")[2]
    assert "1 trade(s) closed" in settled and "unknown" not in settled
    said = said_by(capsys, "paper", "--config", configured(config[:33]), "--snapshot", path, "--log", "other")
    assert "equity before orders unknown" in said and "0 trade(s) closed" in said  # it is too late to know the price


def test_markets_in_two_files_are_decided_in_turn(here, capsys):
    coins = ("BTC", "ETH")
    for coin in coins:
        rows = [row | {"instrument_name": row["instrument_name"].replace("BTC", coin)} for row in chain()]
        times = [NOW + datetime.timedelta(days=number, hours=coins.index(coin)) for number in range(3)]
        write_harvest(here / f"{coin}.parquet", [row for time in times for row in as_history(rows, time)])
    config = configured(
        "policy: {rule: {threshold: 0.0}}\nholdings: {BTC: 1, ETH: 1}\n"
        "sizing: {step: 0.1, max_risk_pct: null}\nrisk: {max_spread_pct: 10, without: [no_equity]}"
    )
    said = said_by(capsys, "paper", "--config", config, "--snapshot", "*.parquet")
    assert re.findall(r"^(\w+) 2025", said, re.MULTILINE) == ["BTC", "ETH"] * 3
    assert "orders: filled 2" in said and len(re.findall("vetoed, max_positions: 1 short", said)) == 4


def test_going_on_with_an_earlier_time_is_an_error_and_with_another_configuration_is_said(here, capsys, caplog):
    late = write_harvest(here / "late.parquet", as_history(chain(), NOW + datetime.timedelta(days=1)))
    early = write_harvest(here / "early.parquet", as_history(chain(), NOW))
    said_by(capsys, "paper", "--config", configured("sizing: {units: 0.1}"), "--snapshot", late)
    assert not caplog.text
    assert "up to when the portfolio is known" in fails("paper", "--config", "agent.yaml", "--snapshot", early)
    said_by(capsys, "paper", "--config", configured("sizing: {units: 0.2}"), "--snapshot", late)
    assert "taken with another configuration" in caplog.text


def test_the_snapshots_of_files_are_taken_by_time(here, capsys):
    later = write_harvest(here / "a.parquet", as_history(chain(), NOW + datetime.timedelta(days=1)))
    write_harvest(here / "b.parquet", as_history(chain(), NOW))
    config = configured("policy: {rule: {}}")
    said = said_by(capsys, "shadow", "--config", config, "--snapshot", "*.parquet")
    assert re.findall(r"BTC (2025-12-\d\d)", said) == ["2025-12-10", "2025-12-11"]
    write_harvest(here / "c.parquet", as_history(chain(), NOW + datetime.timedelta(days=1)))
    assert "at a time that" in fails("shadow", "--config", config, "--snapshot", later, "c.parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polcy: {}", "'polcy' is no key. Did you mean policy?"),
        ("policy: {quality: a}", "'quality' is no key of policy. Did you mean"),
        ("policy: {rule: {treshold: 3}}", "'treshold' is no key of policy.rule. Did you mean threshold?"),
        ("policy: {rule: {threshold: high}}", "policy.rule.threshold: 'high' is not a score."),
        ("policy: {}", "policy: {} is not one of llm, q, rule, openai."),
        ("policy: {llm: 3}", "policy.llm: 3 is not a folder"),
        ("policy: rule", "policy: 'rule' has no keys. Give some of llm, q, rule, openai."),
        ("sizing: {units: 0}", "sizing: units=0: give a number above 0."),
        ("sizing: {units: .nan}", "sizing.units: nan is not a number."),
        ("sizing: {unit: 1}", "'unit' is no key of sizing. Did you mean units?"),
        ("risk: {max_position: 0}", "'max_position' is no key of risk. Did you mean max_positions?"),
        ("risk: {without: [spreads]}", "risk: without: 'spreads' is none of"),
        ("fusion: {mode: both}", "fusion: mode='both': choose one of llm, second"),
        ("exit: never", "exit: 'never' is not one of hold, tp_and_roll"),
        ("holdings: {BTC: lots}", "holdings.BTC: 'lots' is not a number of coins."),
        ("holdings: {BTC: .inf}", "holdings.BTC: inf is not a number of coins."),
        ("holdings: []", "holdings: [] is not coins by underlying"),
        ("exit_style: hold", "exit_style: 'hold' is not one of hold_to_expiry, tp_and_roll."),
        ("preset: synthetic", "preset: 'synthetic' is not one of backtest, production, research."),
        ("spots: 3", "spots: 3 is not a path."),
        ("querying: {timeout: 3}", "'timeout' is no key of querying. Did you mean timeout_s?"),
        ("querying: {timeout_s: -1}", "querying.timeout_s: -1 is not a number from 0."),
        ("outcomes: {fees: 1}", "'fees' is no key of outcomes. Did you mean fee?"),
        ("outcomes: {fee: 7}", "outcomes: fee=7: give a number from 0 to 1."),
        ("just words", "'just words' has no keys."),
        ("a: [", "is no YAML"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_line_that_names_it(here, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read_config(configured(text))
    assert "agent.yaml" in str(error.value) and "\n" not in str(error.value)


def test_the_hash_of_a_configuration_is_that_of_what_it_says(here):
    one = read_config(configured("sizing: {units: 0.2}\nholdings: {BTC: 1}"))
    assert one.sha == read_config(configured("# as before\nholdings: {BTC: 1.0}\nsizing: {units: 0.2}")).sha
    assert one.sha != read_config(configured("sizing: {units: 0.3}")).sha


def test_the_example_of_the_page_has_every_key_with_its_default(here):
    page = (ROOT / "docs" / "agent.md").read_text(encoding="utf-8")
    (here / "agent.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    text = (here / "agent.yaml").read_text()
    found = yaml.safe_load(text)
    whole = yaml.safe_load(text.replace("# querying", "querying"))  # which contradicts a policy without a model
    assert sorted(whole) == sorted(one.name for one in dataclasses.fields(AgentConfig))
    read, default = read_config("agent.yaml"), AgentConfig()
    for key, kind in SECTIONS.items():
        assert kind(**getattr(read, key)) == kind()
    assert Querying(**whole["querying"]) == default.rules_of_querying
    others = [key for key in found if key not in SECTIONS]
    assert [getattr(read, key) for key in others] == [getattr(default, key) for key in others]


def test_every_rule_of_risk_and_every_mode_of_fusion_is_on_the_page():
    page = (ROOT / "docs" / "agent.md").read_text(encoding="utf-8")
    for name in (*CODES, *MODES):
        assert f"`{name}`" in page


def test_what_does_not_go_together_is_said(here, capsys):
    config = configured("policy: {q: none.zip}")
    assert "none.zip is no file: make one with covered-call q-scorer" in fails("replay", "--config", config)
    assert "is no file. Give Parquet files" in fails(
        "shadow", "--config", configured("sizing: {units: 1}"), "--snapshot", "no.parquet"
    )
    for arguments, message in ((["shadow"], "give --snapshot"), (["replay", "--snapshot", "a"], "give no --snapshot"),
            (["paper", "--snapshot", "a", "--data_dir", "b"], "are for replay")):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*arguments, "--config", config])
        assert message in capsys.readouterr().err
    path = week(here / "chains.parquet")
    assert "none is of ETH, which is held" in fails(
        "shadow", "--config", configured("holdings: {ETH: 1}"), "--snapshot", path
    )
    assert "agent.yaml cannot be read" in fails("replay", "--config", "no_agent.yaml")


def test_a_policy_of_another_exit_style_is_said_at_once(here):
    save(fit(rich_if_volatile(range(40)), rich_if_volatile(range(40, 50), seed=1), CONFIG), "q.zip")
    config = configured("policy: {q: q.zip}\nexit_style: tp_and_roll")
    assert "q.zip was tuned on hold_to_expiry, and exit_style is tp_and_roll" in fails("replay", "--config", config)


def test_a_policy_that_was_fitted_with_the_market_s_context_is_told_it(here, capsys):
    rows = [row for day in range(80) for row in decision(day, sold=day % 3, spot=58466.0 + 50 * (day % 5), dte=1.0)]
    path, context = write_csv(here / "train.csv", rows), CoveredCallCandidatesConfig(context="spot")
    columns = read_decisions([path], context).columns()
    fitted = fit(columns, columns, context)
    save(fitted, "q.zip")
    config = configured(f"policy: {{q: q.zip}}\nexit_style: tp_and_roll\n{FREE}")
    assert "80 decisions" in said_by(capsys, "replay", "--config", config, "--data_files", path)
    chains = str(week(here / "chains.parquet"))
    assert "made of spots: give spots" in fails("shadow", "--config", config, "--snapshot", chains)
    own = ["funding", *fitted.metadata["context"][1:]]
    save(fitted._replace(metadata=fitted.metadata | {"context": own}), "q.zip")
    assert "fitted with funding in the market's context" in fails("replay", "--config", config, "--data_files", path)


def test_ctrl_c_ends_after_the_decision(here, capsys, monkeypatch):
    path = week(here / "chains.parquet")
    config = configured("sizing: {units: 0.1}")
    monkeypatch.setattr(agent, "page", lambda cycle, drift: os.kill(os.getpid(), signal.SIGINT) or "shown")
    said = said_by(capsys, "shadow", "--config", config, "--snapshot", path)
    assert said.startswith("Ends after this decision.\nshown\n1 decisions\n")
    assert len(list(read("out/agent/shadow"))) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_help_has_each_mode_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"covered-call agent {mode}" in said for mode in ("replay", "shadow", "paper "))


def test_without_a_language_model_and_an_exchange_neither_torch_nor_ccxt_is_imported(here):
    check = "import sys, covered_call.runtime.agent; assert not {'torch', 'transformers', 'ccxt'} & set(sys.modules)"
    assert python("-c", check, cwd=here, PYTHONPATH=str(ROOT)).returncode == 0


@pytest.mark.slow
def test_a_language_model_decides_in_a_process_of_its_own(here, capsys):
    (here / "run").mkdir()
    save_run(here / "run", "per_decision_ranking", adapter=False)
    path = week(here / "chains.parquet", 2)
    keys = ("policy: {llm: run, rule: {threshold: 3.0}}", "exit_style: tp_and_roll", "querying: {timeout_s: 120}")
    config = configured("\n".join(keys))
    said = said_by(capsys, "shadow", "--config", config, "--snapshot", path)
    assert re.search(r"  llm: \S+ \(confidence 0\.\d{3}; asked: never asked\)\n  rule: ", said)
    assert re.search(r"  llm: \S+ \(confidence 0\.\d{3}; not asked, answer 1 step", said)
    assert "drift, llm: dte 9.288 (tuned on 1 to 7)" in said
