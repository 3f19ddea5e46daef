"""What an agent makes of what became of its earlier decisions: no more than was settled by then."""

import datetime
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import on_the_default_stack, write_csv
from markets import CONFIG, rich_if_volatile, walk

from covered_call.runtime import journal
from covered_call.runtime.agent import main
from covered_call.runtime.experience import LEAST, Brought, Experience, Settled
from covered_call.runtime.fusion import MIN_DISAGREEMENTS, Fusion, fuse
from covered_call.value_model import scorer
from covered_call.value_model.learning import fit, outcomes, payoff_of
from runtime.logs import days, named, say, settle, write_log
from runtime.moments import DAY, HIGH, LOW, NOW, account, moment, said
from runtime.server import Server, completion
from runtime.test_agent import configured, said_by

pytestmark = on_the_default_stack

PAIR = ("llm", "rule")
HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# A replay, from end to end

MANY, LATE = 150, 130  # days of a backtest, and the day after which another one differs
BOTH = """\
fusion: {mode: learned}
sizing: {method: half_kelly}
holdings: {BTC: 100.0}
querying: {query_cooldown: 0, query_interval: 0}
risk: {max_positions: 999, without: [not_covered, expiry_exposure, net_delta, win_rate, consecutive_losses, dd_buffer]}
"""


def replayed(rows: list[dict], name: str) -> list[dict]:
    """The log of a model that sells the second call of each day, and a rule that sells the best score."""
    path = write_csv(Path(f"{name}.csv"), rows)
    with Server() as server:
        server.answer = completion("2", {"2": 0.96, "NO": 0.04})
        policy = f"policy: {{openai: {{base_url: '{server.url}', model: tuned}}, rule: {{threshold: 0.0}}}}\n"
        main(["replay", "--config", configured(policy + BOTH), "--data_files", path, "--log", name])
    return [line for line in journal.read(name) if "decision_id" in line]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Of a backtest, and of another that is the same until day LATE."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("replays"))
        rows = walk(MANY)
        first = sorted({row["decision_time"] for row in rows})[LATE]
        other = [row | ({"spot": 1.4 * float(row["spot"]), "pnl_vs_hodl": ""} if row["decision_time"] > first else {})
            for row in rows]  # fmt: skip
        yield replayed(rows, "one"), replayed(other, "other")


def test_a_replay_learns_who_is_right_from_a_hundred_settled_disagreements_on(two):
    counts = [line["fusion"]["learnt_from"] for line in two[0]]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] > MIN_DISAGREEMENTS
    for line in two[0]:
        learnt = line["fusion"]["method"] in ("learned_llm", "learned_second", "llm_below_threshold")
        assert learnt == (line["fusion"]["learnt_from"] >= MIN_DISAGREEMENTS)


def test_a_replay_takes_the_payoff_of_what_was_settled(two):
    first = next(place for place, line in enumerate(two[0]) if line["sizing"]["payoff"] is not None)
    assert LEAST / 2 + 7 <= first < MANY / 2  # two candidates a day, of a week each, and some loss among them
    for line in two[0][:first]:
        assert line["intention"]["reason_codes"] == ["unknown_payoff"]
    assert {line["sizing"]["payoff_of"] for line in two[0]} == {"settled"}
    assert any(line["intention"]["units"] > 0 for line in two[0][first:])


def test_what_is_settled_after_a_decision_changes_nothing_at_it(two):
    """The price at which the last calls end is another one, and nothing is known of it before."""
    seen = ("fusion", "sizing", "intention", "vetoes")
    one, other = ([{name: line[name] for name in seen} for line in lines] for lines in two)
    assert one[: LATE + 1] == other[: LATE + 1]
    assert [its["sizing"]["payoff"] for its in one[LATE + 1 :]] != [
        its["sizing"]["payoff"] for its in other[LATE + 1 :]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What was settled by then


def taught(count: int, settled_at=NOW) -> Experience:
    """Of disagreements in which the LLM won every other time, where it was the surer one."""
    found = Experience(PAIR)
    for number in range(count):
        won = number % 2 == 0
        proposals = [said("llm", LOW, 0.9 if won else 0.5), said("rule", HIGH, 0.7)]
        found.add(moment(time=NOW - 9 * DAY), account(), proposals,
            {LOW: Brought(1_840.0 if won else -920.0, settled_at), HIGH: Brought(0.0, settled_at)})  # fmt: skip
    return found


def decided(experience: Experience, time=NOW):
    members = [said("llm", LOW, 0.95), said("rule", HIGH, 0.7)]
    found = fuse(members, moment(time=time), account(), Fusion(mode="learned"), experience.settled())
    return found.method, found.learnt_from


def test_a_disagreement_counts_from_the_moment_at_which_both_outcomes_are_known():
    assert decided(taught(100)) == ("learned_llm", 100)
    assert decided(taught(99)) == ("second_weighted", 99)
    assert decided(taught(100, NOW + HOUR)) == ("second_weighted", 0)
    assert decided(taught(100, NOW + HOUR), NOW + HOUR) == ("learned_llm", 100)
    late = taught(99)
    pair = [said("llm", LOW, 0.9), said("rule", HIGH, 0.7)]
    late.add(moment(), account(), pair, {LOW: Brought(1.0, NOW), HIGH: Brought(0.0, NOW + HOUR)})
    assert decided(late)[1] == 99 and decided(late, NOW + HOUR)[1] == 100


@pytest.mark.parametrize(
    ("llm", "second", "brought", "won"),
    [(LOW, None, {LOW: 1.0}, [True]), (None, HIGH, {HIGH: 1.0}, [False]), (LOW, HIGH, {LOW: 2.0, HIGH: 2.0}, [False]),
     (LOW, LOW, {LOW: 1.0}, []), (LOW, HIGH, {LOW: 2.0}, []), (None, None, {LOW: 2.0}, [])],
)  # fmt: skip
def test_no_trade_brings_nothing_and_what_is_not_settled_is_no_disagreement_yet(llm, second, brought, won):
    found = Experience(PAIR)
    its = {name: Brought(usd, NOW) for name, usd in brought.items()}
    found.add(moment(), account(), [said("llm", llm, 0.9), said("rule", second, 0.7)], its)
    assert found.settled().llm_won.tolist() == won


def test_one_that_failed_disagrees_with_nobody():
    found, its = Experience(PAIR), {LOW: Brought(1.0, NOW)}
    found.add(moment(), account(), [said("llm", LOW, 0.0, error="no answer"), said("rule", None, 0.7)], its)
    found.add(moment(), account(), [said("other", LOW, 0.9), said("rule", None, 0.7)], its)
    assert len(found.settled().llm_won) == 0


def test_a_payoff_is_of_enough_outcomes_of_its_own_underlying_in_percent_of_spot():
    """Gains of 2 % and losses of 1 %."""
    assert taught(LEAST // 2).payoff("BTC", NOW) == pytest.approx(2.0)
    assert taught(LEAST // 2 - 1).payoff("BTC", NOW) is None
    assert taught(LEAST).payoff("ETH", NOW) is None and Experience().payoff("BTC", NOW) is None
    assert taught(LEAST, NOW + HOUR).payoff("BTC", NOW) is None
    assert taught(LEAST, NOW + HOUR).payoff("BTC", NOW + HOUR) == pytest.approx(2.0)


# ---------------------------------------------------------------------------------------------------------------------
# A log, and what was settled beside it


def test_a_log_s_outcomes_are_read_once_they_are_settled(tmp_path, caplog):
    folder = tmp_path / "log"
    count = 40
    states = days(count)
    write_log(folder, [say(0)] * count, [say(1, 0.9, "rule")] * count, states=states)
    known = Settled(folder, PAIR)
    assert len(known.now().settled().llm_won) == 0
    settle(folder, states, [[200.0, -100.0] if number % 2 else [-50.0, 300.0] for number in range(count)], hours=12)
    found, ends = known.now(), states[-1].decision.decision_time + 12 * HOUR
    assert found.settled().llm_won.tolist() == [number % 2 == 1 for number in range(count)]
    assert found.payoff("BTC", ends) == pytest.approx(250 / 75)
    gain, loss = (8 * 300 + 7 * 200) / 15, (8 * 50 + 7 * 100) / 15  # of the 15 days before
    assert found.payoff("BTC", states[15].decision.decision_time + 11 * HOUR) == pytest.approx(gain / loss)
    assert found.payoff("BTC", states[14].decision.decision_time + 11 * HOUR) is None  # 28 are settled
    # As it was when it was decided, to the last number.
    live = Experience(PAIR)
    for number, state in enumerate(states):
        its = [named(say(0), state), named(say(1, 0.9, "rule"), state)]
        usd = (200.0, -100.0) if number % 2 else (-50.0, 300.0)
        names = [one.instrument for one in state.decision.candidates]
        at = state.decision.decision_time + 12 * HOUR
        live.add(
            state,
            account(equity_usd=None),
            its,
            {name: Brought(one, at) for name, one in zip(names, usd, strict=True)},
        )
    for one, other in zip(found.settled(), live.settled(), strict=True):
        np.testing.assert_array_equal(one, other)
    (folder / "outcomes.jsonl").write_text("{}\n")
    assert known.now() is found and "goes on with the outcomes that it has" in caplog.text


def test_of_a_confidence_that_is_no_number_nothing_is_learnt(tmp_path):
    states = days(1)
    write_log(tmp_path / "log", [say(0)], [say(1, 0.9, "rule")], states=states)
    (path,) = (tmp_path / "log").glob("decisions_*.jsonl")
    line = json.loads(path.read_text())
    line["proposals"][0]["confidence"] = None
    path.write_text(json.dumps(line) + "\n")
    settle(tmp_path / "log", states, [[1.0, 2.0]])
    assert len(Settled(tmp_path / "log", PAIR).now().settled().llm_won) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Who says what the payoff is


@pytest.fixture(scope="module")
def fitted():
    return fit(rich_if_volatile(range(60)), rich_if_volatile(range(60, 80), seed=1), CONFIG)


def test_a_q_scorer_s_file_says_what_its_training_outcomes_were(fitted, tmp_path):
    known = outcomes(rich_if_volatile(range(60)), CONFIG)
    its = fitted.metadata["train"]["outcomes"]
    assert its["positive"] == pytest.approx(np.mean(known > 0))
    assert its["mean_gain"] == pytest.approx(known[known > 0].mean())
    assert its["mean_loss"] == pytest.approx(-known[known < 0].mean())
    scorer.save(fitted, tmp_path / "q.zip")
    metadata = scorer.read(tmp_path / "q.zip").metadata
    assert payoff_of(metadata) == pytest.approx(its["mean_gain"] / its["mean_loss"])
    for told in ({}, {"mean_gain": None, "mean_loss": 0.1}, {"mean_gain": 0.1, "mean_loss": None}):
        assert payoff_of(metadata | {"train": metadata["train"] | {"outcomes": told}}) is None
    before = dict(metadata["train"])
    del before["outcomes"]
    scorer.save(fitted._replace(metadata=metadata | {"train": before}), tmp_path / "old.zip")
    assert payoff_of(scorer.read(tmp_path / "old.zip").metadata) is None
    scorer.save(fitted._replace(metadata=metadata | {"train": before | {"outcomes": {"mean_gain": "x"}}}),
        tmp_path / "bad.zip")  # fmt: skip
    with pytest.raises(scorer.QScorerError, match="mean_gain"):
        scorer.read(tmp_path / "bad.zip")


KELLY = "holdings: {BTC: 100.0}\nrisk: {max_positions: 999, without: [win_rate, consecutive_losses]}\nsizing: "


@pytest.mark.parametrize(
    ("policy", "sizing", "whose"),
    [("{q: q.zip, rule: {threshold: 0.0}}", "", "q"), ("{q: q.zip, rule: {threshold: 0.0}}", ", payoff: 1.5",
     "sizing.payoff"), ("{rule: {threshold: 0.0}}", "", "settled")],
)  # fmt: skip
def test_the_log_says_whose_payoff_it_was(here, fitted, policy, sizing, whose, capsys):
    scorer.save(fitted, "q.zip")
    config = configured(f"policy: {policy}\n{KELLY}{{method: half_kelly{sizing}}}")
    path = write_csv(here / "walk.csv", walk(8))
    said = said_by(capsys, "replay", "--config", config, "--data_files", path, "--log", "log")
    lines = [line for line in journal.read("log") if line.get("sizing")]
    expected = {"q": payoff_of(fitted.metadata), "sizing.payoff": 1.5, "settled": None}[whose]
    assert lines and {(its["sizing"]["payoff"], its["sizing"]["payoff_of"]) for its in lines} == {(expected, whose)}
    main(["explain", lines[0]["decision_id"], "--log", "log"])
    told = capsys.readouterr().out
    assert (f"(of {whose})" in told) == (expected is not None)
    assert ("unknown_payoff" in told) == (expected is None)
    assert ("BTC: no payoff is known yet" in said) == (expected is None)


def test_the_doctor_says_who_knows_the_payoff(here, fitted, capsys):
    def found(config: str) -> str:
        main(["doctor", "--config", configured(config)])
        return next(line for line in capsys.readouterr().out.splitlines() if "sizing: " in line)

    scorer.save(fitted, "q.zip")
    rule = "policy: {rule: {threshold: 0.0}}\n"
    assert "ok   sizing: BTC: a payoff of 1.5, of sizing.payoff" in found(
        rule + "sizing: {method: half_kelly, payoff: 1.5}"
    )
    assert re.search(
        r"ok   sizing: BTC: a payoff of \d\.\d+, of q", found("policy: {q: q.zip}\n" + KELLY + "{method: half_kelly}")
    )
    unknown = found(rule + "sizing: {method: half_kelly}")
    assert unknown.startswith("warn sizing: BTC: no payoff is known yet, so nothing is sold: ")
    states = days(20)
    write_log(here / "out/agent/shadow", [say(0)] * 20, states=states)
    settle(here / "out/agent/shadow", states, [[200.0, -100.0]] * 20)
    assert "ok   sizing: BTC: a payoff of 2, settled in out/agent/shadow" in found(
        rule + "sizing: {method: half_kelly}"
    )


def test_the_default_sizing_asks_for_no_payoff(here, capsys):
    main(["doctor", "--config", configured("policy: {rule: {threshold: 0.0}}")])
    assert "sizing:" not in capsys.readouterr().out
