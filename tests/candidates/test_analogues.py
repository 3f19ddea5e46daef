"""What similar decisions brought: that nothing unsettled is told, which are nearest, and what a prompt says of it."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import decision, on_the_default_stack, read_candidates, records, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates import analogues, export
from covered_call.candidates.analogues import NEVER_SETTLED, Pool, analogues_of, nearest_of, pool_of
from covered_call.candidates.columns import COUNTERFACTUAL, DAY, columns_of
from covered_call.candidates.context_lines import (
    ANALOGUES,
    NEIGHBOURS,
    context_block,
    context_names,
    positives,
    wilson,
)
from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.leaks import find_unsettled
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import CandidatesError

pytestmark = on_the_default_stack
ON = CoveredCallCandidatesConfig(context="spot", analogues=True, settlement="simulated", splits="train")
FEW = mock.patch.object(analogues, "NEIGHBOURS", 2)


def rows_of(steps, style: str) -> list[dict]:
    """A decision after each of some gaps, in quarters of a day."""
    rows, day = [], 0.0
    for gap, spot, dte, iv in steps:
        day += gap / 4
        strikes = [round(spot * share, 2) for share in (1.02, 1.05)]
        rows += decision(day, None, strikes=strikes, spot=spot, dte=dte, iv=iv, exit_style=style)
    for place, row in enumerate(rows):
        row["instrument"] = f"C{place}"
    return rows


def random_rows(days: int, seed: int = 0, style: str = "hold_to_expiry") -> list[dict]:
    rng = np.random.default_rng(seed)
    spots = 60_000 * np.exp(np.cumsum(rng.normal(0, 0.03, days)))
    return rows_of([(4, round(float(spot), 2), 7.0, round(float(rng.uniform(0.4, 0.9)), 3)) for spot in spots], style)


def told(rows: list[dict], options: CoveredCallCandidatesConfig = ON) -> dict[str, list]:
    """By decision its analogues."""
    with tempfile.TemporaryDirectory() as folder:
        found = read_candidates([write_csv(Path(folder) / "a.csv", rows)], options)
    return {one.decision.decision_id: [one.decision.context[name] for name in ANALOGUES] for one in found}


# ---------------------------------------------------------------------------------------------------------------------
# What is not settled

step = st.tuples(
    st.integers(1, 9), st.floats(900, 1100).map(lambda one: round(one, 2)), st.sampled_from([0.6, 1.1, 2.4, 7]),
    st.sampled_from([0.4, 0.6, 0.9]),
)  # fmt: skip


@pytest.mark.no_cover
@settings(max_examples=20, deadline=None)
@given(
    st.lists(step, min_size=8, max_size=25),
    st.floats(0.2, 1),
    st.sampled_from(["gone", "raised", "noise"]),
    st.sampled_from(["hold_to_expiry", "tp_and_roll"]),
    st.sampled_from(["teacher", "intrinsic", "simulated"]),
    st.sampled_from([None, 3.0]),
    st.sampled_from([6.0, 12.0, 40.0]),
)
def test_nothing_after_a_time_changes_the_analogues_of_then(steps, share, how, style, rule, horizon, tolerance):
    """Spots at any times, with gaps, so that the one that is nearest to an expiry may come after it."""
    options = dataclasses.replace(ON, settlement=rule, horizon=horizon, expiry_tolerance=tolerance)
    rows = rows_of(steps, style)
    at = rows[2 * max(1, round(share * (len(steps) - 1)))]["decision_time"]
    early = [row for row in rows if row["decision_time"] <= at]
    rng = np.random.default_rng(0)
    factors = {"raised": lambda: 3.0, "noise": lambda: rng.uniform(0.5, 2)}
    later = [] if how == "gone" else [
        {**row, "spot": float(row["spot"]) * factors[how](), "iv": 0.5} for row in rows if row["decision_time"] > at
    ]  # fmt: skip
    with FEW:
        whole, other = told(rows, options), told(early + spots_alike(later), options)
    assert all(other[key] == whole[key] for key in other if key.split("|")[1] <= at)


def test_a_chain_that_ended_early_is_not_told_before_its_call_expired():
    """Where files end before, nothing is known of it: what they are told of must be told alike."""
    rows = random_rows(50, style="tp_and_roll")
    options = dataclasses.replace(ON, take_profit=0.3, roll_min_score=99.0)  # none rolls
    whole = list(told(rows, options).values())
    for days in range(22, 50, 3):
        assert list(told(rows[: 2 * days], options).values()) == whole[:days]


def spots_alike(rows: list[dict]) -> list[dict]:
    """Of each time one spot."""
    spots = {row["decision_time"]: row["spot"] for row in rows}
    return [{**row, "spot": spots[row["decision_time"]]} for row in rows]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_outcomes_that_are_not_settled_change_nothing(seed, share):
    """Those of the files: the decision's own, and all that end later."""
    columns = columns_with_outcomes()
    row = round(share * (len(columns) - 1))
    unsettled = (columns.label_end > columns.time[row]) | (columns.decision_of == row)
    other = np.random.default_rng(seed).normal(0, 1e4, len(unsettled))
    numbers = columns.numbers | {COUNTERFACTUAL: np.where(unsettled, other, columns.numbers[COUNTERFACTUAL])}
    found = analogues_of(pool_of(dataclasses.replace(columns, numbers=numbers), ON), np.array([row]))
    for name in ANALOGUES:
        np.testing.assert_array_equal(found[name], columns.context[name][[row]])


@functools.cache
def columns_with_outcomes():
    with tempfile.TemporaryDirectory() as folder:
        return read_decisions([write_csv(Path(folder) / "a.csv", random_rows(70))], ON).columns()


def test_the_audit_finds_analogues_of_what_was_not_settled(monkeypatch):
    columns = columns_with_outcomes()
    assert find_unsettled(columns, ON) == []
    honest = analogues.settled_at
    monkeypatch.setattr(analogues, "settled_at", lambda *given: honest(*given) - 10 * DAY)
    leaking = dataclasses.replace(columns, context=columns.context | analogues_of(pool_of(columns, ON)))
    (line,) = find_unsettled(leaking, ON)
    assert line.startswith("FAILED: the analogues of ")


def test_settled_is_what_has_expired():
    """Of a decision a day that expires after 7, 20 are settled from the 27th on."""
    known = [one[0] is not None for one in told(random_rows(40)).values()]
    assert known == [False] * 26 + [True] * 14


def test_a_call_that_expires_at_once_tells_no_outcome_of_its_own(tmp_path):
    rows = [row | {"dte": 0.0} for row in random_rows(40)]
    columns = read_decisions([write_csv(tmp_path / "a.csv", rows)], ON).columns()
    assert not np.isnan(columns.context["analogues_mean"][20:]).any()
    assert np.isnan(columns.context["analogues_mean"][:20]).all()
    assert find_unsettled(columns, ON) == []


def test_an_outcome_tells_of_its_own_market_alone():
    rows = random_rows(40)
    alone = told(rows)
    both = told(rows + [{**row, "instrument": f"H{row['instrument']}"} for row in random_rows(40, 0, "tp_and_roll")])
    assert {key: both[key] for key in alone} == alone


@pytest.mark.parametrize("more, word", [
    ({"settlement": "auto"}, "settlement='auto'"), ({"pricing_iv": "fit"}, "pricing_iv='fit'"),
    ({"keep_cut": True}, "keep_cut"), ({"settlement": "recorded", "horizon": 3.0}, "settlement='recorded'"),
])  # fmt: skip
def test_a_rule_that_later_trades_choose_is_refused(tmp_path, more, word):
    file = write_csv(tmp_path / "a.csv", random_rows(3))
    with pytest.raises(CandidatesError, match=f"analogues: with {word} outcomes depend on what was recorded later"):
        read_candidates([file], dataclasses.replace(ON, **more))


def test_analogues_go_with_a_context(load):
    with pytest.raises(CandidatesError, match="analogues goes with context"):
        load("q_values", analogues=True, settlement="simulated")


# ---------------------------------------------------------------------------------------------------------------------
# Which are nearest


def test_nearest_as_one_by_one():
    rng = np.random.default_rng(3)
    past, now = rng.normal(0, [1, 100, 0.01, 0], (60, 4)), rng.normal(0, [1, 100, 0.01, 1])
    past[rng.random(past.shape) < 0.1] = np.nan
    now[2] = np.nan
    spread = np.nanstd(past, axis=0, ddof=1)

    def distance(row) -> float:
        total = 0.0
        for place in range(3):  # the last does not vary
            if np.isnan(row[place]) != np.isnan(now[place]):
                total += 1
            elif not np.isnan(row[place]):
                total += ((row[place] - now[place]) / spread[place]) ** 2
        return total

    assert nearest_of(past, now).tolist() == sorted(range(60), key=lambda i: (distance(past[i]), i))[:NEIGHBOURS]


def test_of_very_many_the_last_settled_are_looked_through(monkeypatch):
    monkeypatch.setattr(analogues, "POOL", 30)
    count = 60
    numbers = np.repeat(np.arange(count, dtype=float)[:, None], 6, axis=1)
    pool = Pool(
        np.zeros(count, int), np.arange(count), np.arange(count), numbers, np.where(np.arange(count) < 30, 9, 1)
    )
    pool = pool._replace(features=np.append(numbers[:-1], np.zeros((1, 6)), axis=0))  # the last is as the first were
    assert analogues_of(pool, np.array([59]))["analogues_mean"] == [1]
    never = pool._replace(settled=np.full(count, NEVER_SETTLED))
    assert np.isnan(analogues_of(never)["analogues_mean"]).all()


def test_what_they_brought_counted_by_hand():
    """With all settled decisions for neighbours, these are the first 20 of a decision a day."""
    columns = columns_with_outcomes()
    outcome = columns.numbers[COUNTERFACTUAL][::2] / columns.spot  # the first candidate has the highest score
    assert columns.context["analogues_positive"][26] == (outcome[:20] > 0).sum()
    assert columns.context["analogues_mean"][26] == pytest.approx(outcome[:20].mean())


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def test_the_line_of_a_prompt():
    assert positives(13) == "20, 13 positive (0.65 [0.43, 0.82])"
    block = context_block({"analogues_positive": 13.0, "analogues_mean": 0.0021})
    assert block.endswith("  - Similar settled decisions: 20, 13 positive (0.65 [0.43, 0.82]), mean +0.21% of spot\n")
    assert "decisions: n/a, mean n/a of spot" in context_block(dict.fromkeys(ANALOGUES))
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1


def test_lines_of_json_tell_them_and_take_the_rule(tmp_path):
    file = write_csv(tmp_path / "a.csv", random_rows(40))
    words = ["--input", file, "--output_dir", str(tmp_path), "--context", "spot", "--analogues"]
    export.main([*words, "--settlement", "simulated"])
    assert (tmp_path / "a_per_decision_ranking.jsonl").read_text().count("decisions: 20, ") == 14
    with pytest.raises(SystemExit, match="analogues: with --settlement auto"):
        export.main(words)


def test_prompts_and_columns(tmp_path):
    file = write_csv(tmp_path / "a.csv", random_rows(40))
    options = {"context": "spot", "analogues": True, "settlement": "simulated", "splits": "train"}
    (entry,) = read_candidates([file], ON)[-1:]
    record = records(file, "per_decision_ranking", **options)[-1]
    assert "Similar settled decisions: 20, " in record["messages"][1]["content"]
    assert [record[name] for name in ANALOGUES] == [entry.decision.context[name] for name in ANALOGUES]
    assert context_names(ON)[-2:] == list(ANALOGUES)
    assert columns_of([entry]).context["analogues_mean"][0] == record["analogues_mean"]
