"""The audit of a log against a count by hand."""

import math

import numpy as np
import pytest
from conftest import on_the_default_stack

from covered_call.runtime.audit import figures_of
from covered_call.runtime.logged import read_log
from covered_call.runtime.outcomes_log import read_outcomes
from covered_call.runtime.report import main
from runtime.logs import say, settle, write_log

pytestmark = on_the_default_stack


def audited(folder) -> dict:
    return figures_of(read_log(folder).entries, read_outcomes(folder))


@pytest.fixture
def small(tmp_path):
    """Four days, each of which ends otherwise; two calls a day, at a spot of 100,000."""
    policy = [
        say(0, 0.8, q_usd=450.0),  # sells the first
        say(None, 0.6, best=1, q_usd=110.0),  # sells nothing, and likes the second best
        say(0, 0.9, q_usd=210.0),  # would sell the first, and is stopped
        say(None, 0.5, asked=False, cached=True),  # was not asked
    ]
    states = write_log(tmp_path / "log", policy, vetoes={2: ("spread",)})
    settle(tmp_path / "log", states, [(500.0, -200.0), (100.0, 300.0), (-1000.0, None), (50.0, -50.0)])
    return tmp_path / "log"


def test_each_candidate_counts_once_by_what_became_of_it(small):
    fates = audited(small)["fates"]
    counts = {fate: (its["offered"], its["known"]) for fate, its in fates.items()}
    assert counts == {"taken": (1, 1), "not filled": (0, 0), "vetoed": (1, 1), "rejected": (4, 3), "not asked": (2, 2)}
    rejected = fates["rejected"]  # -200, 100 and 300
    assert rejected["hit_rate"] == pytest.approx(2 / 3)
    assert rejected["mean_usd"] == pytest.approx(200 / 3) and rejected["median_usd"] == 100.0
    assert rejected["mean_percent"] == pytest.approx(0.2 / 3) and rejected["median_percent"] == pytest.approx(0.1)
    assert fates["taken"]["mean_usd"] == 500.0 and fates["vetoed"]["mean_percent"] == -1.0
    assert fates["not asked"]["hit_rate"] == 0.5 and fates["not asked"]["mean_usd"] == 0.0
    assert math.isnan(fates["not filled"]["mean_usd"])


def test_what_was_taken_less_what_was_rejected_without_an_interval_of_so_few(small):
    found = audited(small)["taken_less_rejected"]
    assert found["usd"] == pytest.approx(500 - 200 / 3) and found["percent"] == pytest.approx(0.5 - 0.2 / 3)
    assert found["interval_usd"] is found["interval_percent"] is None and not found["anti_selection"]
    assert found["why_no_interval"] == "1 taken and 3 rejected are settled, and 10 of each are the least"


def test_missed_positives_are_told_by_why(small):
    assert audited(small)["missed"] == {"positive": 3, "missed": 2, "by": {"rejected": 1, "not asked": 1}}


def test_a_veto_is_worth_what_it_stopped(small, tmp_path):
    spread = audited(small)["vetoes"]["spread"]
    assert (spread["stopped"], spread["known"], spread["mean_usd"], spread["alone"]["known"]) == (1, 1, -1000.0, 1)
    states = write_log(tmp_path / "two", [say(0), say(1)], vetoes={0: ("spread", "no_bid"), 1: ("no_bid",)})
    settle(tmp_path / "two", states, [(400.0, 0.0), (0.0, -100.0)])
    found = audited(tmp_path / "two")["vetoes"]
    assert {code: (its["stopped"], its["mean_usd"], its["alone"]["known"]) for code, its in found.items()} == {
        "spread": (1, 400.0, 0), "no_bid": (2, 150.0, 1),
    }  # fmt: skip
    assert found["no_bid"]["alone"]["mean_usd"] == -100.0


def test_confidence_beside_what_came(small):
    """0.8 and right; no trade at 0.6 though its best call brought something; 0.9 and wrong. Who was not asked said
    nothing."""
    found = audited(small)["confidence"]["llm"]
    assert (found["n"], found["confidence"], found["right"]) == (3, pytest.approx(2.3 / 3), pytest.approx(1 / 3))
    assert found["brier"] == pytest.approx((0.04 + 0.36 + 0.81) / 3)
    assert found["calibration_error"] == pytest.approx((0.2 + 0.6 + 0.9) / 3)
    assert [(one["from"], one["n"], one["right"]) for one in found["bins"]] == [
        (0.6, 1, 0.0),
        (0.8, 1, 1.0),
        (0.9, 1, 0.0),
    ]


def test_what_was_predicted_beside_what_came_by_threshold(small):
    rows = {one["threshold"]: one for one in audited(small)["q"]["llm"]}
    assert {threshold: one["n"] for threshold, one in rows.items()} == {
        0.0: 3, 0.05: 3, 0.1: 3, 0.15: 2, 0.2: 2, 0.25: 1, 0.3: 1, 0.35: 1, 0.4: 1, 0.45: 0, 0.5: 0,
    }  # fmt: skip
    assert rows[0.0]["predicted"] == pytest.approx((0.45 + 0.11 + 0.21) / 3)
    assert rows[0.0]["realised"] == pytest.approx((0.5 + 0.3 - 1.0) / 3)
    assert rows[0.15]["realised"] == pytest.approx((0.5 - 1.0) / 2) and math.isnan(rows[0.5]["realised"])


def long_log(folder, taken: float, rejected: float, noise: float) -> None:
    """Sixty days of outcomes that end on their own day, around two means."""
    drawn = np.random.default_rng(1).normal(0, noise, (60, 2))
    states = write_log(folder, [say(0)] * 60)
    settle(folder, states, (np.array([taken, rejected]) + drawn).tolist())


def test_a_policy_that_takes_the_worse_is_warned_of(tmp_path, capsys):
    long_log(tmp_path / "log", -300.0, 200.0, 100.0)
    found = audited(tmp_path / "log")["taken_less_rejected"]
    low, high = found["interval_usd"]
    assert found["anti_selection"] and low < found["usd"] < high < 0
    error = 100 * math.sqrt(2 / 60)  # of a difference of two means of 60
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.3)
    main([str(tmp_path / "log")])
    assert "**Anti-selection: what it takes is worth less than what it rejects.**" in capsys.readouterr().out


def test_one_that_may_be_luck_is_not(tmp_path, capsys):
    long_log(tmp_path / "log", -10.0, 0.0, 300.0)
    found = audited(tmp_path / "log")["taken_less_rejected"]
    assert found["interval_percent"][0] < 0 < found["interval_percent"][1] and not found["anti_selection"]
    main([str(tmp_path / "log")])
    said = capsys.readouterr().out
    assert "Anti-selection" not in said and "(95 %: -" in said


def test_outcomes_that_overlap_for_too_long_have_no_interval(tmp_path):
    states = write_log(tmp_path / "log", [say(0)] * 60)
    settle(tmp_path / "log", states, [(1.0, 2.0)] * 60, hours=24 * 20)
    found = audited(tmp_path / "log")["taken_less_rejected"]
    assert found["interval_usd"] is None
    assert found["why_no_interval"] == "60 decision times are fewer than 5 blocks of 21, over which outcomes overlap"


def test_nothing_settled_is_no_figure(tmp_path, capsys):
    write_log(tmp_path / "log", [say(0)] * 3)
    assert math.isnan(audited(tmp_path / "log")["taken_less_rejected"]["usd"])
    main([str(tmp_path / "log")])
    assert "Nothing is settled yet: see covered-call agent settle." in capsys.readouterr().out


def test_a_sale_that_paper_does_not_fill_is_not_taken(tmp_path):
    from runtime.logs import days

    states = days(2)
    name = states[1].decision.candidates[0].instrument
    states[1].quotes[name] = states[1].quotes[name]._replace(bid=None)
    write_log(tmp_path / "log", [say(0), say(0)], mode="paper", states=states)
    settle(tmp_path / "log", states, [(100.0, 0.0), (200.0, 0.0)])
    fates = audited(tmp_path / "log")["fates"]
    assert (fates["taken"]["mean_usd"], fates["not filled"]["mean_usd"]) == (100.0, 200.0)
