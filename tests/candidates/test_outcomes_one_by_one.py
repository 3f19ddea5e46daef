"""Counterfactuals are worked out for all candidates at once: here for each alone, as their definition reads."""

import dataclasses
import datetime
import math

import numpy as np
import pytest
from conftest import on_the_default_stack
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates import outcomes
from covered_call.candidates.columns import COUNTERFACTUAL, Columns, columns_of, logged_of
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import Market, black_scholes_call, counterfactuals, roll_places, rolls_of
from covered_call.candidates.schema import UTC, Candidate, Counterfactual, Decision, LoggedDecision, Outcome

DAY = datetime.timedelta(days=1)


def days(number: float) -> datetime.timedelta:
    return datetime.timedelta(microseconds=round(number * 86_400_000_000))


def counterfactual(decisions: list[Decision], decision: Decision, candidate: Candidate, options) -> Counterfactual:
    """Of one candidate, with no more than the decisions' own values."""
    start, name = decision.decision_time, decision.underlying
    prices = {one.decision_time: one.spot for one in decisions if one.underlying == name and one.spot > 0}
    life = candidate.dte if options.horizon is None else min(candidate.dte, options.horizon)
    end, tolerance = start + datetime.timedelta(days=life), datetime.timedelta(hours=options.expiry_tolerance)
    last = min(prices, key=lambda time: (abs(time - end), time))
    follow = {"hold_to_expiry": held, "tp_and_roll": rolled}.get(decision.exit_style)
    if candidate.iv is None or abs(last - end) > tolerance or follow is None:
        return Counterfactual(None, end)
    path = [start, *sorted(time for time in prices if start < time < last), last]
    gap = any(later - earlier > 2 * tolerance for earlier, later in zip(path, path[1:], strict=False))
    chains = {one.decision_time: one.candidates for one in decisions if one[1:3] == decision[1:3]}
    found = None if gap and follow is rolled else follow(decision.spot, candidate, life, path, prices, chains, options)
    return Counterfactual(found if found is not None and math.isfinite(found) else None, max(end, last))


def held(spot, candidate, life, path, prices, chains, options):
    return sale(spot, candidate, options) - buyback(prices[path[-1]], candidate, candidate.dte - life, options)


def rolled(spot, candidate, life, path, prices, chains, options):
    start, *between, last = path
    sold, expiry, booked = candidate, start + days(candidate.dte), sale(spot, candidate, options)
    for time in between:
        left = max(0.0, (expiry - time) / DAY)
        premium, now = worth(spot, sold, sold.dte), worth(prices[time], sold, left)
        if left and not now <= (1 - options.take_profit) * premium:
            continue
        spot, chain = prices[time], chains.get(time)
        booked -= buyback(spot, sold, left, options)
        if not left or not chain:
            return booked
        sold = min(chain, key=lambda other: abs(other.delta - options.roll_delta))
        if sold.iv is None:
            return None
        expiry = time + days(sold.dte)
        booked += sale(spot, sold, options)
    return booked - buyback(prices[last], sold, (expiry - start - days(life)) / DAY, options)


def worth(spot, candidate, left):
    with np.errstate(all="ignore"):
        return float(black_scholes_call(spot, candidate.strike, max(0.0, left) / 365, candidate.iv))


def cost(price, spot, options):
    return min(options.fee * spot, options.fee_cap * price) + options.half_spread * price + options.slippage * spot


def sale(spot, candidate, options):
    premium = worth(spot, candidate, candidate.dte)
    return premium - cost(premium, spot, options)


def buyback(spot, candidate, left, options):
    price = worth(spot, candidate, left)
    return price + (cost(price, spot, options) if left > 0 else 0.0)


def market_of(steps) -> list[LoggedDecision]:
    """Decisions, each so many hours after the one before, ordered by time."""
    time, logged = datetime.datetime(2024, 9, 1, tzinfo=UTC), []
    for hours, underlying, exit_style, spot, candidates in steps:
        time += datetime.timedelta(hours=hours)
        decision = Decision(time, underlying, exit_style, spot or 100.0 * bool(candidates), tuple(candidates))
        logged.append(LoggedDecision(decision, None, (Outcome(None, None, None),) * len(candidates)))
    return logged


def add_counterfactuals(columns: Columns, options) -> Columns:
    """The same decisions, which are all there are, with a counterfactual for each candidate."""
    key = columns.names, columns.underlying, columns.exit_style, columns.time, columns.spot
    market = Market(*key, np.diff(columns.offsets), rolls_of(columns, options), options)
    values, label_end = counterfactuals(columns, market, options)
    return dataclasses.replace(columns, numbers=columns.numbers | {COUNTERFACTUAL: values}, label_end=label_end)


def assert_as_one_by_one(logged: list[LoggedDecision], options, of=slice(None)):
    decisions = [entry.decision for entry in logged]
    found = logged_of(add_counterfactuals(columns_of(logged), options))
    for entry in found[of]:
        expected = [counterfactual(decisions, entry.decision, one, options) for one in entry.decision.candidates]
        assert list(entry.counterfactuals) == expected
    return found


def candidates(strike, dte, iv):
    deltas = st.sampled_from([-0.2, 0.1, 0.2, 0.3, 0.4])
    return st.builds(Candidate, st.just("C"), strike, dte, deltas, st.just(0.0), iv, st.none())


# As a whole it rounds to another microsecond than its fraction of a day alone does.
LONG = 32_767.116875678512
common = st.tuples(
    st.sampled_from([12, 12, 24]),
    st.just("BTC"),
    st.just("tp_and_roll"),
    st.sampled_from([60.0, 80.0, 100.0, 120.0]),
    st.lists(candidates(st.just(90.0), st.sampled_from([0.0, 1.0, 2.0, 5.0]), st.just(0.5)), min_size=1, max_size=2),
)
strange = st.tuples(
    st.sampled_from([0, 1, 24, 24, 24, 24.0001, 60]),
    st.sampled_from(["BTC", "BTC", "BTC", "ETH"]),
    st.sampled_from(["tp_and_roll", "tp_and_roll", "hold_to_expiry", "stop_loss"]),
    st.sampled_from([0.0, 60.0, 80.0, 95.0, 100.0, 110.0]) | st.floats(1e-300, 1e300),
    st.lists(
        candidates(
            st.sampled_from([90.0, 100.0, 110.0]) | st.floats(1e-300, 1e300),
            st.sampled_from([0.0, 1.0, 2.5, 7.0, 1 / 3, LONG]) | st.floats(0, 10),
            st.sampled_from([None, 0.0, 0.3, 0.9]) | st.floats(0, 1e300),
        ),
        max_size=3,
    ),
)
configs = st.builds(
    CoveredCallCandidatesConfig,
    fee=st.sampled_from([0.0, 0.0003, 0.1]),
    half_spread=st.sampled_from([0.0, 0.02]),
    slippage=st.sampled_from([0.0, 0.001]),
    expiry_tolerance=st.sampled_from([0, 1, 12, 48, 1000]),
    horizon=st.sampled_from([None, 0, 1, 2.5, 30]),
    take_profit=st.sampled_from([0, 0.3, 0.7, 1]),
    roll_delta=st.sampled_from([0, 0.25, 1]),
)


@on_the_default_stack
@settings(max_examples=300)
@given(st.lists(common, min_size=1, max_size=25) | st.lists(strange, min_size=1, max_size=25), configs)
def test_all_at_once_is_as_one_by_one(some, options):
    assert_as_one_by_one(market_of(some), options)


def walk(count: int, vol: float, dte: float, strikes=(1.0, 1.01, 1.05)) -> list[LoggedDecision]:
    """Hourly decisions on a random path."""
    spots = 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, vol, count)))
    chains = [
        [Candidate(f"C{up}", spot * up, dte, 0.3 * (up == 1.01), 0.0, 0.5, None) for up in strikes]
        for spot in spots.tolist()
    ]
    return market_of([(1, "BTC", "tp_and_roll", *one) for one in zip(spots.tolist(), chains, strict=True)])


@pytest.mark.parametrize(
    "vol, dte, count", [(0.0005, 7.0, 500), (0.005, 7.0, 500), (0.03, 7.0, 500), (0.001, 90.0, 2500)]
)
def test_a_profit_is_taken_at_its_first_hour(vol, dte, count):
    logged = walk(count, vol, dte)
    found = assert_as_one_by_one(logged, CoveredCallCandidatesConfig(), slice(0, count // 3, count // 20))
    assert found[0].counterfactuals[0].pnl_vs_hodl is not None


def test_many_candidates_are_worked_out_in_parts(monkeypatch):
    logged, options = walk(300, 0.01, 2.0), CoveredCallCandidatesConfig()
    whole = add_counterfactuals(columns_of(logged), options)
    monkeypatch.setattr(outcomes, "ROWS_AT_ONCE", 7)
    assert logged_of(add_counterfactuals(columns_of(logged), options)) == logged_of(whole)


def test_no_candidates_at_all_have_no_outcomes():
    found = add_counterfactuals(
        columns_of(market_of([(1, "BTC", "tp_and_roll", 0.0, [])] * 2)), CoveredCallCandidatesConfig()
    )
    assert len(found) == 2 and len(found.label_end) == 0


def test_the_call_to_roll_into_is_the_first_of_those_nearest_to_the_delta():
    chains = [[0.1, 0.4], [], [0.3, 0.2, 0.3], [0.5, 0.26]]
    chains = [[Candidate("C", 100.0, 7.0, delta, 0.0, 0.5, None) for delta in deltas] for deltas in chains]
    columns = columns_of(market_of([(24, "BTC", "tp_and_roll", 100.0, chain) for chain in chains]))
    assert roll_places(columns, CoveredCallCandidatesConfig(roll_delta=0.25)).tolist() == [0, -1, 0, 1]


def test_a_cost_beyond_all_floats_leaves_the_outcome_unknown():
    call = Candidate("C", 1.0, 0.0, 0.3, 0.0, 0.5, None)
    options = CoveredCallCandidatesConfig(half_spread=1.0, slippage=1.0)
    (found,) = assert_as_one_by_one(market_of([(1, "BTC", "hold_to_expiry", 1.7e308, [call])]), options)
    assert found.counterfactuals[0].pnl_vs_hodl is None
