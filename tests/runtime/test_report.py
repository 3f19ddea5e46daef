"""What a log is told of: counts that add up, whatever is in it, and what is said of a log that cannot be read."""

import json
import tempfile
from pathlib import Path

import pytest
from conftest import on_the_default_stack
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from covered_call.page.cards import card_markdown
from covered_call.runtime.agent import main
from covered_call.runtime.engine import Agent
from covered_call.runtime.journal import opened, plain, read
from covered_call.runtime.last_day import cards_of
from covered_call.runtime.logged import FATES, read_log
from covered_call.runtime.outcomes_log import Settled, add_outcomes, read_outcomes
from covered_call.runtime.paper import BOUGHT_BACK, Adopted, Closed, line_of
from covered_call.runtime.policies import LanguageModel, Querying, Rule, Said
from covered_call.runtime.report import figures_of, report_of
from covered_call.runtime.state import Proposal
from runtime.logs import days, say, settle, write_log
from runtime.markets import BEGUN, DAY, FREELY, START, quoted_state
from runtime.moments import position

pytestmark = on_the_default_stack


def fails(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return str(stopped.value)


def figures(folder) -> dict:
    return figures_of(read_log(folder))


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("decisions_????????.jsonl")
    return path


# --- What is counted


FAILED = say(None, 0.0, error="no answer")


@pytest.fixture
def two(tmp_path):
    """A model and a rule over six days: agreed, on nothing too; another call each; one alone, twice; failed."""
    llm = [say(0), say(None), say(0), say(1), say(None), FAILED]
    rule = [say(0, 0.9, "rule"), say(None, 0.9, "rule"), say(1, 0.9, "rule"), say(None, 0.9, "rule"),
        say(0, 0.9, "rule"), say(0, 0.9, "rule")]  # fmt: skip
    llm[2] = llm[2]._replace(cached=True)
    llm[4] = llm[4]._replace(cached=True, asked=False)
    write_log(tmp_path / "log", llm, rule, vetoes={0: ("spread", "no_bid"), 3: ("spread",)})
    return tmp_path / "log"


def test_how_the_first_policy_and_the_second_stand(two):
    assert figures(two)["pair"] == {
        "first": "llm", "second": "rule", "decisions": 6, "agreement": 2, "disagreement": 1, "first_only": 1,
        "second_only": 1, "unanswered": 1,
    }  # fmt: skip


def test_how_often_each_policy_was_asked_answered_and_failed(two):
    found = figures(two)["policies"]
    llm, rule = found["llm"], found["rule"]
    assert (llm["asked"], llm["cache_hits"], llm["not_asked"], llm["errors"]) == (5, 1, 1, 1)
    assert llm["query_rate"] == pytest.approx(4 / 6) and llm["error_rate"] == pytest.approx(1 / 5)
    assert llm["would_sell"] == 3 and llm["mean_confidence"] == pytest.approx(0.8)
    assert (rule["asked"], rule["query_rate"], rule["error_rate"], rule["mean_confidence"]) == (6, 1.0, 0.0, 0.9)


def test_a_model_says_whether_it_was_asked_and_the_others_which_call_they_like_best(tmp_path):
    def fails(decision):
        raise ValueError("no answer")

    rules = Querying(query_cooldown=2, query_interval=2, max_errors=1, error_cooldown=1)
    answers = iter([lambda decision: Said(decision.candidates[0].instrument, 0.9, 0.8, False)] * 1 + [fails] * 9)
    model, never = LanguageModel(lambda decision: next(answers)(decision), rules), Rule(99.0)
    with opened(tmp_path / "log") as journal:
        list(Agent([model, never], FREELY, None, BEGUN, journal, {"mode": "shadow"}).run(days(4)))
    entries = read_log(tmp_path / "log").entries
    # Answered; not asked, the answer used again; failed; left alone for a step.
    asked = [(one.line["proposals"][0]["asked"], bool(one.line["proposals"][0]["error"])) for one in entries]
    assert asked == [(True, False), (False, False), (True, True), (False, True)]
    assert [one.asked for one in entries] == [True, False, False, False]
    assert all(one.line["proposals"][1]["best"] == one.decision.candidates[0].instrument for one in entries)
    found = figures(tmp_path / "log")["policies"]["llm"]
    assert (found["asked"], found["not_asked"], found["errors"]) == (2, 2, 1)


def test_fates_vetoes_and_methods(two):
    found = figures(two)
    # The model decides but where it failed: of the days 0 and 3 the sale was stopped.
    assert found["decisions_by_fate"] == {"taken": 2, "not filled": 0, "vetoed": 2, "rejected": 1, "not asked": 1}
    assert found["trade_rate"] == pytest.approx(2 / 6)
    assert found["vetoes"] == {"spread": 2, "no_bid": 1}
    assert found["fusion"] == {"llm": 5, "fallback": 1}


def test_latencies_are_of_what_was_measured(two):
    found = figures(two)["latency_s"]
    assert {part: its["n"] for part, its in found.items()} == {"state": 6, "plan": 6, "llm": 5, "rule": 6}
    assert all(its["p50"] <= its["p95"] <= its["max"] for its in found.values())


def test_the_trades_of_a_paper_run_and_its_orders(tmp_path):
    states = days(9)
    write_log(tmp_path / "log", [say(0)] * 9, mode="paper", states=states)
    found = figures(tmp_path / "log")
    assert found["orders"] == {"filled": 9} and found["latency_s"]["order"]["n"] == 9
    price = states[0].quotes[states[0].decision.candidates[0].instrument].bid
    assert found["closed"]["trades"] == 2  # those of the first two days have expired, at their strike
    assert found["closed"]["pnl_usd"] == pytest.approx(2 * 0.1 * (price - min(30, price / 8)))


def test_parts_that_were_bought_back_are_counted_and_what_was_adopted_is_unknown_from_then_on(tmp_path, capsys):
    states = days(4)
    write_log(tmp_path / "log", [say(None)] * 4, states=states)
    path = the_file(tmp_path / "log")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = [state.decision.decision_time for state in states]
    sold = position("X", units=-0.2)
    ended = Closed(times[1], "X", sold.entry_time, BOUGHT_BACK, 10.0, -1.0, 7.0, False, 0.1)
    events = [[], [ended, ended._replace(units=None, pnl_usd=-2.0)], [Adopted(times[2], (sold,))],
        [ended._replace(time=times[3], units=None, pnl_usd=900.0)]]  # fmt: skip
    for line, its in zip(lines, events, strict=True):
        line["events"] = plain([line_of(one) for one in its])
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = figures(tmp_path / "log")["closed"]
    assert found == {"trades": 1, "parts": 1, "pnl_usd": 5.0, "adoptions": 1, "unknown_from": plain(times[2])}
    main(["report", str(tmp_path / "log")])
    page = capsys.readouterr().out
    assert "closed 1 trade(s) and 1 part(s) of others, which brought +5.00 USD net of fees" in page
    assert f"adopted, first at {times[2]:%Y-%m-%d %H:%M} UTC: what the portfolio brought is unknown from then" in page


def test_drift_is_counted_by_policy_and_number(tmp_path):
    ranges = {"q": {"dte": [1.0, 2.0], "delta": [0.0, 1.0]}, "llm": {"delta": [0.0, 1.0]}}
    with opened(tmp_path / "log") as journal:
        agent = Agent([Rule()], FREELY, None, BEGUN, journal, {"mode": "shadow"}, ranges=ranges)
        list(agent.run(days(3)))
    assert figures(tmp_path / "log")["drift"] == {"q": {"decisions": 3, "dte": 3}}


one_says = st.builds(
    lambda pick, confidence, error, asked: Proposal("", None if error else pick, confidence, error=error, asked=asked),
    st.sampled_from([None, 0, 1]), st.floats(0, 1), st.sampled_from([None, None, "no"]), st.booleans(),
)  # fmt: skip


@pytest.mark.no_cover
@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(1, 6), st.booleans(), st.sampled_from(["shadow", "paper"]))
def test_counts_add_up(data, count, two, mode):
    names = ["llm", "rule"][: 2 if two else 1]
    said = [[data.draw(one_says)._replace(source=name) for _ in range(count)] for name in names]
    vetoes = {day: data.draw(st.sampled_from([(), ("spread",), ("spread", "stale")])) for day in range(count)}
    pnl = [[data.draw(st.sampled_from([None, -5.0, 0.0, 7.0])) for _ in range(2)] for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        states = write_log(Path(folder, "log"), *said, vetoes=vetoes, mode=mode)
        settle(Path(folder, "log"), states, pnl)
        found = plain(report_of(read_log(Path(folder, "log")), read_outcomes(Path(folder, "log"))))
    assert sum(found["decisions_by_fate"].values()) == found["decisions"] == count
    assert sum(found["fusion"].values()) == count
    assert found["trade_rate"] == found["decisions_by_fate"]["taken"] / count
    assert found["decisions_by_fate"]["vetoed"] <= sum(found["vetoes"].values()) or not found["vetoes"]
    for its in found["policies"].values():
        assert its["asked"] + its["not_asked"] == its["decisions"] == count
        assert its["errors"] + its["cache_hits"] <= its["asked"]
    if two:
        its = found["pair"]
        kinds = ("agreement", "disagreement", "first_only", "second_only", "unanswered")
        assert sum(its[kind] for kind in kinds) == its["decisions"] == count
    if found["audit"]:
        fates = found["audit"]["BTC"]["fates"]
        assert sum(its["offered"] for its in fates.values()) == 2 * count
        assert sum(its["known"] for its in fates.values()) == sum(value is not None for row in pnl for value in row)
        assert fates["taken"]["offered"] == found["decisions_by_fate"]["taken"]
        missed = found["audit"]["BTC"]["missed"]
        assert sum(missed["by"].values()) == missed["missed"] <= missed["positive"] <= count
        means = [its["known"] * (its["mean_usd"] or 0.0) for its in fates.values()]
        assert sum(means) == pytest.approx(sum(value or 0.0 for row in pnl for value in row))


# --- What is written


def test_a_page_its_numbers_and_a_picture(two, capsys):
    states = days(6)
    settle(two, states, [(100.0, -50.0)] * 6)
    main(["report", str(two)])
    page = capsys.readouterr().out
    assert page.startswith("# Agent report: shadow, 2025-01-03 08:00 to 2025-01-08 08:00 UTC\n")
    for part in ("| 6 | 2 | 0 | 2 | 1 | 1 | 33.3 % |", "| llm | 5 | 66.7 % | 1 | 1 | 20.0 % | 3 | 0.800 |",
            "| 2 (33.3 %) | 1 (16.7 %) | 1 (16.7 %) | 1 (16.7 %) | 1 (16.7 %) |", "| spread | 2 |",
            "## Audit: BTC"):  # fmt: skip
        assert part in page
    assert (two / "report.md").read_text() + "\n" == page
    assert json.loads((two / "report.json").read_text())["version"] == 1
    assert imread(two / "report.png").shape[:2] == (960, 1320)


def test_fates_are_in_the_order_of_the_table(two, capsys):
    main(["report", str(two)])
    assert f"| decisions | {' | '.join(FATES)} | trade rate |" in capsys.readouterr().out


# --- The decisions of the last day


def test_the_last_day_is_read_decision_by_decision_with_what_came_of_it_apart(tmp_path, capsys):
    """Of six hours apart: the last one, of five, is a day and more after the first."""
    states = [quoted_state(START + number * DAY / 4, 100_000.0) for number in range(6)]
    llm, rule = [say(0)] * 6, [say(1, 0.9, "rule")] * 5 + [FAILED._replace(source="rule")]
    write_log(tmp_path / "log", llm, rule, vetoes={4: ("spread",)}, states=states)
    pnl = [(100.0, -50.0)] * 4 + [(-2_000.0, 500.0), (None, 700.0)]
    settle(tmp_path / "log", states, pnl)
    cards = cards_of(read_log(tmp_path / "log"), read_outcomes(tmp_path / "log"))
    first, second = (one.instrument for one in states[5].decision.candidates)
    assert [card.title.split(" UTC")[0] for card in cards] == [
        "1. 2025-01-04 14:00", "2. 2025-01-04 08:00", "3. 2025-01-04 02:00", "4. 2025-01-03 20:00"
    ]  # fmt: skip
    last, vetoed, taken = cards[:3]
    assert last.said[0].startswith(f"SELL_CALL {first}") and last.said[0].endswith("; taken.")
    assert last.said[1:] == [f"llm proposes {first}, confidence 0.8 of 1.", "rule failed: no answer."]
    assert {row[1]: row[2] for row in last.calls[1:]} == {first: "llm, agent", second: ""}
    assert last.hindsight == ["What was sold: not settled yet.", "1 of 2 calls are settled."]
    assert vetoed.said[-1] == "Veto spread: 2 against 1. spread"
    assert vetoed.hindsight[0].startswith("What was stopped: -2,000.00 USD, -2.00% of spot")
    assert vetoed.hindsight[1:] == [
        "Not selling is 0.",
        f"The best of the calls, {states[4].decision.candidates[1].instrument}: +500.00 USD, +0.50% of spot.",
    ]
    assert taken.hindsight[0].startswith("What was sold: +100.00 USD, +0.10% of spot, against holding; known at 2025")
    assert taken.hindsight[1:] == ["It was the best of the calls."]
    main(["report", str(tmp_path / "log")])
    page = capsys.readouterr().out
    assert page.index("## Audit") < page.index("## Decisions of the last day") < page.index(f"### {last.title}")
    html = (tmp_path / "log" / "report.html").read_text()
    assert html.count('<div class="hindsight"') == html.count("<article") == 4
    apart = [part.split("</div>")[0] for part in html.split('<div class="hindsight"')[1:]]
    assert all("Hindsight, not known when this was decided" in part for part in apart)
    assert "-2,000.00 USD" in apart[1] and html.count("-2,000.00 USD") == 1


def test_of_what_can_never_be_known_it_is_said_why_and_a_loss_of_all_calls_is_told(tmp_path):
    states = days(2)
    states[1] = states[1]._replace(decision=states[1].decision._replace(decision_time=START + DAY / 2))
    write_log(tmp_path / "log", [say(0), say(None)], states=states)
    settle(tmp_path / "log", states, [(None, None), (-5.0, 0.0)])
    decision = states[0].decision
    add_outcomes(tmp_path / "log", [
        Settled(decision.decision_id, decision.candidates[0].instrument, None, None, None, "log", "no spot at expiry")
    ])  # fmt: skip
    rejected, lost = cards_of(read_log(tmp_path / "log"), read_outcomes(tmp_path / "log"))
    assert rejected.hindsight == ["Not selling is 0.", "No call did better than not selling."]
    assert lost.hindsight == ["What was sold: never to be known, no spot at expiry.", "0 of 2 calls are settled."]


def test_a_decision_without_calls_and_one_that_nothing_is_known_of(tmp_path):
    state = quoted_state(START, 100_000.0)
    empty = state._replace(decision=state.decision._replace(candidates=()))
    write_log(tmp_path / "log", [say(None)], states=[empty])
    (card,) = cards_of(read_log(tmp_path / "log"), read_outcomes(tmp_path / "log"))
    assert len(card.calls) == 1 and card.hindsight == ["Not selling is 0.", "0 of 0 calls are settled."]
    assert "No call was offered." in card_markdown(card)


# --- A log that cannot be read


def test_an_empty_folder_and_a_log_without_a_decision(tmp_path):
    assert "there is no decisions_YYYYMMDD.jsonl. Give the folder that the agent called its Log." in fails(
        "report", str(tmp_path)
    )
    (tmp_path / "decisions_20250101.jsonl").write_text("")
    assert "its log has no whole decision" in fails("report", str(tmp_path))


def test_half_a_last_line_is_left_out_and_said(two, capsys):
    whole = figures(two)
    with open(the_file(two), "a") as file:
        file.write('{"schema_version": 1, "deci')
    assert {**figures(two), "torn": False} == whole
    main(["report", str(two)])
    assert "The log ends in half a line, which is left out" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [("report",), ("settle",), ("export", "--to_csv", "runs"), ("diff", "other")])
def test_a_line_of_another_version_names_itself_to_every_command(two, verb, monkeypatch):
    monkeypatch.chdir(two.parent)
    text = the_file(two).read_text().splitlines()
    text[2] = text[2].replace('"schema_version": 1', '"schema_version": 7')
    the_file(two).write_text("\n".join(text) + "\n")
    write_log(two.parent / "other", [say(0)] * 2)
    said = fails(verb[0], "log", *verb[1:])
    assert ".jsonl, line 3: " in said and "it has schema_version 7, and this is 1" in said and "\n" not in said
    assert not (two / "report.md").exists() and not Path("runs").exists()


def test_decisions_of_two_modes_are_an_error_and_an_agent_does_not_mix_them(tmp_path):
    write_log(tmp_path / "log", [say(0)] * 2)
    with pytest.raises(ValueError, match="has the log of shadow, and this is paper: give another folder"):
        write_log(tmp_path / "log", [say(0)] * 2, mode="paper", states=days(4)[2:])
    write_log(tmp_path / "other", [say(0)] * 4, mode="paper", states=days(4))
    with open(the_file(tmp_path / "log"), "a") as file:
        file.writelines(the_file(tmp_path / "other").read_text().splitlines(keepends=True)[-2:])
    said = fails("report", str(tmp_path / "log"))
    assert "has decisions of several modes, 2 of shadow and 1 of paper: figures of both would mean nothing" in said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda line: line.pop("fusion"), "has no fusion. No agent wrote it so"),
        (lambda line: line["state"]["decision"].pop("spot"), "the decision has no spot"),
    ],
)
def test_a_line_that_lacks_something_is_named(two, change, reason):
    lines = [json.loads(text) for text in the_file(two).read_text().splitlines()]
    change(lines[1])
    the_file(two).write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = fails("report", str(two))
    assert reason in said and "BTC|2025-01-04T08:00:00+00:00|hold_to_expiry" in said


def test_a_decision_that_was_abandoned_and_taken_anew_counts_once(tmp_path, capsys):
    states = days(2)
    write_log(tmp_path / "log", [say(0)] * 2, mode="paper", states=states)
    lines = list(read(tmp_path / "log"))
    cycle = next(line for line in lines if line.get("decision_id") == states[1].decision.decision_id)
    with opened(tmp_path / "log") as journal:
        journal.append({name: value for name, value in cycle.items() if name not in ("schema_version", "events")})
    found = figures(tmp_path / "log")
    assert (found["decisions"], found["taken_anew"]) == (2, 1)
    assert found["decisions_by_fate"]["not filled"] == 1  # nothing is known of its new order
    main(["report", str(tmp_path / "log")])
    assert "1 decision(s) were abandoned and taken anew" in capsys.readouterr().out
