"""Records are columns: of the types that the features say, the same in parts as whole, and as one alone."""

import datetime

import datasets
import numpy as np
from conftest import REAL_DATA, decision, needs_real_data, no_candidates, read_candidates, row, time, write_csv
from hypothesis import given
from hypothesis import strategies as st

from covered_call.candidates.columns import Columns, columns_of, logged_of
from covered_call.candidates.options import CoveredCallCandidatesConfig, kind_of
from covered_call.candidates.prompts import (
    candidate_messages,
    order_candidates,
    present_in_order,
    ranking_messages,
)
from covered_call.candidates.records import FEATURES, RECORDS, batches
from covered_call.candidates.schema import UTC, Candidate, Counterfactual, Decision, LoggedDecision, Outcome

ORDERS = ("instrument", "csv", "shuffle")

number = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | number
name = st.text("aZ09é\\😀\uffff-", min_size=1, max_size=5)
candidate = st.builds(
    Candidate, name, st.floats(0, 1e300, exclude_min=True), st.floats(0, 36_500), number, number, maybe, maybe
)


@st.composite
def logged_decision(draw) -> LoggedDecision:
    candidates = tuple(draw(st.lists(candidate, max_size=5, unique_by=lambda one: one.instrument)))
    moment = datetime.datetime(2024, 9, 1, tzinfo=UTC) + datetime.timedelta(microseconds=draw(st.integers(0, 10**13)))
    return LoggedDecision(
        Decision(moment, draw(name), draw(name), draw(number), candidates),
        draw(st.none() | st.integers(0, len(candidates) - 1)) if candidates else None,
        tuple(Outcome(draw(maybe), draw(maybe), draw(maybe)) for _ in candidates),
        tuple(Counterfactual(draw(maybe), moment) for _ in candidates),
    )


decisions = st.lists(logged_decision(), max_size=5)


def ordered(entries: list[LoggedDecision], options: CoveredCallCandidatesConfig) -> Columns:
    return present_in_order(columns_of(entries), options)


@given(decisions, st.sampled_from(ORDERS))
def test_a_record_asks_what_a_live_policy_is_asked(entries, order):
    options = CoveredCallCandidatesConfig(candidate_order=order, seed=3)
    columns = ordered(entries, options)
    live = [order_candidates(entry.decision, options)[0] for entry in entries]
    asked = [chat[:2] for chat in RECORDS["per_candidate"](columns, options)["messages"].to_pylist()]
    assert asked == [candidate_messages(market, one) for market in live for one in market.candidates]
    asked = [chat[:2] for chat in RECORDS["per_decision_ranking"](columns, options)["messages"].to_pylist()]
    assert asked == [ranking_messages(market) for market in live]


@given(decisions, st.sampled_from(ORDERS))
def test_all_that_goes_with_a_candidate_follows_it(entries, order):
    options = CoveredCallCandidatesConfig(candidate_order=order)
    for before, after in zip(entries, logged_of(ordered(entries, options)), strict=True):
        decision, places = order_candidates(before.decision, options)
        assert after.decision == decision
        assert after.chosen == (None if before.chosen is None else places.index(before.chosen))
        assert after.outcomes == tuple(before.outcomes[place] for place in places)
        assert after.counterfactuals == tuple(before.counterfactuals[place] for place in places)


@given(decisions)
def test_what_is_in_order_is_left_alone(entries):
    options = CoveredCallCandidatesConfig()
    columns = ordered(entries, options)
    assert present_in_order(columns, options) is columns


@given(decisions, st.sampled_from(sorted(RECORDS)))
def test_records_are_of_the_types_of_their_features_and_the_same_in_parts(entries, name):
    options = kind_of(name)(name=name)
    columns = ordered(entries, options)
    table = RECORDS[name](columns, options)
    table.validate(full=True)
    assert table.schema == datasets.Features(FEATURES[name]).arrow_schema.remove_metadata()
    alone = [RECORDS[name](columns.take(np.array([place])), options) for place in range(len(columns))]
    assert [record for one in alone for record in one.to_pylist()] == table.to_pylist()


def test_batches_hold_every_decision_once_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("covered_call.candidates.columns.ROWS", 7)
    sizes = [3, 0, 0, 9, 1, 20, 2, 2, 2, 0]
    rows = [
        cells
        for day, size in enumerate(sizes)
        for cells in (decision(day, strikes=range(100, 100 + size)) if size else [no_candidates(day)])
    ]
    entries = read_candidates([write_csv(tmp_path / "a.csv", rows)], CoveredCallCandidatesConfig())
    parts = list(batches(columns_of(entries)))
    assert [entry for part in parts for entry in logged_of(part)] == entries
    assert 2 < len(parts) < len(sizes) and all(len(part) for part in parts)
    assert list(batches(columns_of([]))) == []


def test_an_outcome_is_null_unless_the_teacher_sold_the_call(tmp_path):
    rows = [
        row(decision_time=time(0), instrument=f"BTC-{place}", reward=5.0, trade_executed=1, chosen=int(place == 1),
            action="SELL_CALL" if place == 1 else "SKIP")
        for place in range(3)
    ]  # fmt: skip
    options = CoveredCallCandidatesConfig()
    columns = ordered(read_candidates([write_csv(tmp_path / "a.csv", rows)], options), options)
    assert RECORDS["per_candidate"](columns, options)["reward"].to_pylist() == [None, 5.0, None]
    (candidates,) = RECORDS["per_decision_ranking"](columns, options)["candidates"].to_pylist()
    assert [one["reward"] for one in candidates] == [None, 5.0, None]


@needs_real_data
def test_real_records_are_asked_as_a_live_policy_is():
    options = CoveredCallCandidatesConfig()
    entries = read_candidates([str(path) for path in sorted(REAL_DATA.glob("*.csv"))], options)
    live = [order_candidates(entry.decision, options)[0] for entry in entries]
    asked = [
        chat[:2]
        for part in batches(ordered(entries, options))
        for chat in RECORDS["per_candidate"](part, options)["messages"].to_pylist()
    ]
    assert asked == [candidate_messages(market, one) for market in live for one in market.candidates]
