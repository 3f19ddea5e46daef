"""What an agent.yaml names: several policies, a Q-scorer that is replaced meanwhile, and what contradicts."""

import datetime
import json
import os
import re
import shutil
from dataclasses import fields
from typing import ClassVar

import pytest
from conftest import ROOT, on_the_default_stack, python
from language_model.test_policy import save_run
from markets import CONFIG, rich_if_volatile

from covered_call import atomic
from covered_call.candidates.context_lines import OPINION_TOLD
from covered_call.candidates.prompts import version_with
from covered_call.runtime import configured as configured_policies
from covered_call.runtime.agent import steps_of
from covered_call.runtime.agent_config import ConfigError, read_config
from covered_call.runtime.answers import Said
from covered_call.runtime.configured import Policies, fusion_of, policies_of
from covered_call.runtime.contradictions import LIMITS
from covered_call.runtime.engine import Agent
from covered_call.runtime.experience import Experience
from covered_call.runtime.journal import opened, read
from covered_call.runtime.paper import begin
from covered_call.runtime.policies import Rule
from covered_call.runtime.risk import CODES, RiskRules
from covered_call.value_model.learning import Gates, fit
from covered_call.value_model.opinions import fitted_before
from covered_call.value_model.scorer import save
from runtime.markets import BEGUN, FREELY, quoted_states
from runtime.server import Server, completion
from runtime.test_agent import configured, fails, said_by, week
from runtime.test_chain import spots, vols, with_context_of

pytestmark = on_the_default_stack


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# A file that is replaced


@pytest.fixture(scope="module")
def fitted():
    return fit(rich_if_volatile(range(60)), rich_if_volatile(range(60, 80), seed=1), CONFIG)


def cycles(here, change) -> list[dict]:
    """The log's lines of three decisions of a Q-scorer, before the second of which ``change`` is called."""
    config = read_config(configured("policy: {q: q.zip}"))
    shutil.rmtree(here / "log", ignore_errors=True)
    with policies_of(config) as policies, opened(here / "log") as journal:
        about = {"versions": policies.versions}
        agent = Agent(policies.sources, FREELY, None, BEGUN, journal, about, ranges=policies.ranges)
        for number, state in enumerate(quoted_states(3)):
            if number == 1:
                change()
            agent.cycle(state)
    return list(read(here / "log"))


def test_a_file_that_is_replaced_decides_from_the_next_cycle_on_and_its_hash_says_so(here, fitted):
    save(fitted, "q.zip")
    shut = fitted.with_gates(Gates(threshold=99.0))
    before, *after = cycles(here, lambda: save(shut, "q.zip"))
    (hash_before,) = {before["versions"]["q"]}
    assert {line["versions"]["q"] for line in after} != {hash_before} and len(after) == 2
    assert after[0]["versions"]["q"].startswith("sha256:") and after[0]["versions"] == after[1]["versions"]
    assert before["proposals"][0]["reason"] != "threshold" == after[0]["proposals"][0]["reason"]


def torn():
    content = open("q.zip", "rb").read()
    atomic.write("q.zip", content[: len(content) // 2])


BROKEN = {
    "is not a whole Q-scorer": torn,
    "is not a whole Q-scorer: File is not a zip file": lambda: atomic.write("q.zip", "no scorer"),
    "is no file": lambda: os.remove("q.zip"),
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_file_that_is_broken_or_gone_is_refused_in_one_line_and_the_old_one_kept(here, fitted, caplog, said):
    save(fitted, "q.zip")
    lines = cycles(here, BROKEN[said])
    assert len({line["versions"]["q"] for line in lines}) == 1 and not any(line["errors"] for line in lines)
    (warning,) = caplog.messages  # once, not at every cycle
    assert "goes on with the model it has" in warning and said in warning and "\n" not in warning


def test_a_file_of_another_exit_style_is_refused_and_a_later_good_one_taken(here, fitted, caplog):
    save(fitted, "q.zip")
    other = fitted._replace(metadata=fitted.metadata | {"exit_styles": ["tp_and_roll"]})
    lines = cycles(here, lambda: save(other, "q.zip"))
    assert len({line["versions"]["q"] for line in lines}) == 1
    assert "q.zip was tuned on tp_and_roll, and exit_style is hold_to_expiry" in caplog.text
    save(fitted, "q.zip")

    def twice():
        torn()
        save(fitted.with_gates(Gates(threshold=99.0)), "q.zip")

    assert len({line["versions"]["q"] for line in cycles(here, twice)}) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The market's context


def test_one_that_was_told_the_market_s_vols_is_told_them_over_files_and_over_chains(here, capsys):
    with_context_of(here, context_vols=vols(here, "2024-07-01", 200))  # in days of which train.csv is, in q.zip
    keys = "policy: {q: q.zip}\nexit_style: tp_and_roll\npreset: backtest\nspots: " + spots(here)
    said = fails("shadow", "--config", configured(keys), "--snapshot", week(here / "chains.parquet"))
    assert "fitted with dvol in the market's context, which this agent is not told; give context_vols" in said
    of_chains = configured(f"{keys}\ncontext_vols: {vols(here, '2025-11-01')}")
    said_by(capsys, "shadow", "--config", of_chains, "--snapshot", str(here / "chains.parquet"))
    lines = list(read(here / "out/agent/shadow"))
    told = [line["state"]["decision"]["context"] for line in lines]
    assert len(lines) == 4 and not any(line["errors"] for line in lines)
    assert [one["dvol"] for one in told] == [0.43, 0.44, 0.45, 0.46]  # of the day before
    of_files = configured(f"{keys}\ncontext_vols: {here / 'dvol_2024-07-01.csv'}")
    said_by(capsys, "replay", "--config", of_files, "--data_files", "train.csv", "--log", "replayed")
    lines = list(read(here / "replayed"))
    assert len(lines) == 80 and not any(line["errors"] for line in lines)
    assert all(line["state"]["decision"]["context"]["dvol"] for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# A model that was tuned with the opinion of a Q-scorer


class Stub:
    """Stands for the process of a language model."""

    seen: ClassVar[list] = []

    def __init__(self, load, timeout):
        self.seen.clear()

    def ask(self, decision):
        self.seen.append(decision)
        return Said(None, 0.9, 0.5, False)

    def stop(self):
        pass

    wait_until_ready = stop


def test_it_is_told_by_the_q_scorer_as_it_stands_or_refused(here, fitted, monkeypatch):
    folder = here / "run"
    folder.mkdir()
    save_run(folder, "per_decision_ranking", adapter=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"context": [OPINION_TOLD], "prompt_version": version_with([OPINION_TOLD])}
    manifest["tuned_on"]["exit_styles"] = ["hold_to_expiry"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(configured_policies, "Worker", Stub)
    save(fitted, "q.zip")
    with pytest.raises(ConfigError, match="was tuned with a Q-scorer's opinion: name one under policy.q"):
        with policies_of(read_config(configured("policy: {llm: run}"))):
            pass
    with policies_of(read_config(configured("policy: {llm: run, q: q.zip}"))) as policies:
        assert not policies.with_market
        proposal = policies.sources[0].propose(quoted_states(1)[0], begin(BEGUN))
    (seen,) = Stub.seen
    assert proposal.error is None and seen.opinion.fitted_before == fitted_before(fitted)


# ---------------------------------------------------------------------------------------------------------------------
# Several policies


def openai(server, *lines: str) -> str:
    first = f"policy: {{openai: {{base_url: '{server.url}', model: tuned}}, rule: {{threshold: 3.0}}}}"
    return configured("\n".join([first, *lines]))


def test_a_server_and_the_rule_decide_together_and_all_that_it_said_is_in_the_log(here, capsys):
    path = week(here / "chains.parquet", 2)
    with Server() as server:
        server.answer = completion("2", {"2": 0.96, "NO": 0.04})
        keys = "querying: {query_cooldown: 0, query_interval: 0}"
        said = said_by(capsys, "shadow", "--config", openai(server, keys), "--snapshot", path)
        server.status = 500
        broken = said_by(capsys, "shadow", "--config", "agent.yaml", "--snapshot", path, "--log", "other")
    assert re.search(r"  openai: BTC-19DEC25-97000-C \(confidence 0\.960; asked: never asked\)\n  rule: ", said)
    assert "by llm_weighted" in said or "by second_weighted" in said or "by agreement" in said
    first, _ = read("out/agent/shadow")
    assert first["versions"]["openai"] == f"tuned at {server.url}"
    assert first["proposals"][0]["probabilities"]["NO_TRADE"] == pytest.approx(0.04)
    assert {one["code"] for one in first["notes"]} >= {"margin", "min_ivrv"}
    assert "openai: ServerError: the server answers 500" in broken and "by llm_failed" in broken
    assert "errors: openai 2" in broken


def test_the_source_that_is_fused_is_the_language_model_that_there_is():
    def fused(policy: str, *lines: str):
        return fusion_of(read_config(configured("\n".join([f"policy: {{{policy}}}", *lines]))))

    server = "openai: {base_url: 'http://127.0.0.1:8000/v1', model: m}"
    assert fused("rule: {}") is None and fused(server) is None and fused("rule: {}, q: q.zip") is None
    assert fused(f"{server}, rule: {{}}").llm == "openai" and fused("llm: run, rule: {}").llm == "llm"
    vote = "fusion: {mode: ensemble, weights: {openai: 2}}"
    assert fused(f"llm: run, {server}, rule: {{}}", vote).mode == "ensemble"
    assert fused("rule: {}, q: q.zip", "fusion: {mode: ensemble}").mode == "ensemble"
    assert fused(f"llm: run, {server}, q: q.zip", "fusion: {llm: openai, second: q}").second == "q"


def test_a_run_of_all_policies_but_a_tuned_model_imports_no_torch(here, fitted):
    save(fitted, "q.zip")
    path = week(here / "chains.parquet", 2)
    configured(f"policy: {{openai: {{{LOCAL.replace('8000', '9')}}}, q: q.zip, rule: {{}}}}\nfusion: {{second: q}}")
    check = (
        "import sys; from covered_call.runtime.agent import main\n"
        f"main(['paper', '--config', 'agent.yaml', '--snapshot', {path!r}])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = python("-c", check, cwd=here, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "openai: ServerError: ConnectError" in done.stdout and "2 decisions" in done.stdout


def test_a_key_that_is_not_there_is_said_at_once(here, monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    config = configured("policy: {openai: {base_url: 'http://127.0.0.1:9/v1', model: m, key_variable: A_KEY}}")
    assert "policy.openai, key_variable: the environment has no A_KEY" in fails("replay", "--config", config)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be, and what contradicts

LOCAL = "base_url: 'http://127.0.0.1:8000/v1', model: m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: {openai: http://127.0.0.1}", "policy.openai: 'http://127.0.0.1' has no keys."),
        (f"policy: {{openai: {{{LOCAL}, url: 3}}}}", "'url' is no key of policy.openai. Did you mean"),
        ("policy: {openai: {model: m}}", "base_url is missing: give base_url and model."),
        ("policy: {openai: {base_url: 'ftp://a', model: m}}", "base_url is no address"),
        ("policy: {openai: {base_url: 'http://a:b/v1', model: m}}", "base_url is no address"),
        ("policy: {openai: {base_url: 'https://me:sk-1@a/v1', model: m}}", "keys are for the environment"),
        ("policy: {openai: {base_url: 'https://a/v1?key=sk-1', model: m}}", "keys are for the environment"),
        (f"policy: {{openai: {{{LOCAL}, key_variable: sk-1}}}}", "key_variable is no name of a variable"),
        (f"policy: {{openai: {{{LOCAL}, logprobs: 3}}}}", "logprobs: 3 is not true or false."),
        (f"policy: {{openai: {{{LOCAL}, top_logprobs: 0}}}}", "top_logprobs: 0 is not a whole number from 1 to 100."),
        (f"policy: {{openai: {{{LOCAL}, max_tokens: 1.5}}}}", "max_tokens: 1.5 is not a whole number"),
        (f"policy: {{openai: {{{LOCAL}, candidate_order: shuffle}}}}", "candidate_order: 'shuffle' is not one of"),
        ("on_trade: 3", "on_trade: 3 is not a command."),
        ('on_trade: "mail \'me"', "is not a command."),
        ("on_trade: ''", "on_trade: '' is not a command."),
        ("querying: {timeout_s: 3}", "querying says when a language model is asked, and policy has none"),
        ("fusion: {second: q}", "fusion.second is q, and policy has no such one: name one of rule."),
        ("fusion: {llm: openai}", "fusion.llm is openai, and policy has no such one"),
        ("fusion: {mode: ensemble, weights: {lllm: 2}}", "fusion.weights.lllm is lllm, and policy has no such one"),
        ("fusion: {mode: agreement}", "fusion.mode is agreement, and policy has one entry: add another"),
        ("policy: {rule: {}, q: q.zip}\nfusion: {mode: regime}", "fusion.mode is regime, and policy has no language"),
        (
            "policy: {llm: a, rule: {}, q: b}",
            "fusion.second is open, and policy has rule, q beside the language model",
        ),
        ("policy: {llm: a, rule: {}}\nfusion: {second: llm}", "fusion.second is llm, which is the language model"),
        ("policy: {llm: a, rule: {}}\nfusion: {weights: {llm: 2}}", "fusion.weights is for the mode ensemble"),
        ("policy: {llm: a, rule: {}}\nfusion: {average: vote}", "fusion.average is for the mode ensemble"),
        ("policy: {llm: a, rule: {}}\nfusion: {mode: regime, llm_weight: 0.5}", "fusion.llm_weight is for the modes"),
        ("policy: {q: a, rule: {}}\nfusion: {mode: ensemble, weights: {q: 0, rule: 0}}", "fusion.weights are all 0"),
        ("sizing: {method: holdings_share, units: 0.1}", "sizing.units is for the method fixed"),
        ("sizing: {share: 0.5}", "sizing.share is for the method holdings_share, and method is fixed"),
        ("holdings: {BTC: 0}", "holdings are all 0: there is nothing to sell calls against."),
        ("holdings: {BTC: 1, DOGE: 5}", "sizing.step: the least contract of DOGE is not known here"),
        ("sizing: {units: 0.05}", "sizing.units is 0.05, and the least contract of BTC is 0.1"),
        ("risk: {without: [spread], max_spread_pct: 9}", "risk.max_spread_pct is given, and risk.without leaves out"),
        ("risk: {min_iv: 0.9, max_iv: 0.3}", "risk.min_iv is 0.9, and risk.max_iv is 0.3: no vol keeps both."),
        ("risk: {min_trades: 60}", "risk.min_trades is 60, and risk.win_rate_trades looks at 50"),
        (f"risk: {{blocked_hours: {list(range(24))}}}", "block all there are: for that there is kill_switch: true."),
        ("risk: {blocked_weekdays: [Mon, Tue, Wed, Thu, Fri, Sat, Sun]}", "block all there are"),
        ("sizing: {payoff: 1.5}", "sizing.payoff is for the method half_kelly, and method is fixed: leave it out"),
        ("sizing: {method: half_kelly, payoff: 0}", "payoff=0: give a number above 0"),
        ("risk: {near_level_pct: 0.5}", "risk.near_level_pct is given, and near_level is off"),
    ],
)
def test_what_contradicts_is_one_line_that_says_what_to_do(here, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read_config(configured(text))
    assert (
        str(error.value).startswith("agent.yaml") and "\n" not in str(error.value) and "sk-1" not in str(error.value)
    )


def test_each_limit_is_of_a_rule_that_there_is():
    assert set(LIMITS.values()) <= set(CODES)
    assert {one.name for one in fields(RiskRules)} - set(LIMITS) == {"without", "kill_switch", "loss_cooldown_days"}


def test_two_agents_have_two_folders(here, capsys):
    path, config = week(here / "chains.parquet"), configured("policy: {rule: {}}")
    with atomic.locked("out/agent/paper"):
        said = fails("paper", "--config", config, "--snapshot", path)
        assert f"out/agent/paper is being written by process {os.getpid()}" in said
        said_by(capsys, "shadow", "--config", config, "--snapshot", path)  # another mode has another
    said_by(capsys, "paper", "--config", config, "--snapshot", path)


def test_a_clock_that_jumps_back_sells_nothing_and_leaves_a_log_in_order(here):
    config = read_config(
        configured("policy: {rule: {threshold: 0.0}}\nrisk: {max_positions: 99, without: [no_equity]}")
    )
    states = quoted_states(4)
    times = [one.decision.decision_time for one in states]
    times[1] -= datetime.timedelta(hours=1)
    clock = iter(times)
    with opened(here / "log") as journal:
        steps = steps_of(config, "shadow", here / "log", Policies([], {}, {}, {}, {}, {}), Experience, journal.decided)
        found = list(Agent([Rule(0.0)], steps, None, BEGUN, journal, now=lambda: next(clock)).run(states))
    codes = [[one.code for one in cycle.plan.entry.vetoes] for cycle in found]
    assert [("stale" in its) for its in codes] == [False, True, False, False]
    assert [line["decision_id"] for line in read(here / "log")] == [one.decision.decision_id for one in states]


def test_a_decision_that_stands_in_the_log_is_not_ordered_again(here):
    config = read_config(configured("policy: {rule: {threshold: 0.0}}"))
    (state,) = quoted_states(1)
    for decided, vetoed in (((), False), ({state.decision.decision_id}, True)):
        steps = steps_of(config, "shadow", here / "log", Policies([], {}, {}, {}, {}, {}), Experience, decided)
        (cycle,) = Agent([Rule(0.0)], steps, None, BEGUN).run([state])
        assert ("duplicate" in [one.code for one in cycle.plan.entry.vetoes]) == vetoed
