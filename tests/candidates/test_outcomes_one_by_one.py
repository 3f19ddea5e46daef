"""Counterfactuals are worked out for all candidates at once: here for each alone, as their definition reads."""

import dataclasses
import datetime
import math

import numpy as np
import pytest
from conftest import on_the_default_stack
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates import chains
from covered_call.candidates.chains import rolls_of
from covered_call.candidates.columns import COSTS, COUNTERFACTUAL, Columns, columns_of, logged_of
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import Basis, Replay, Terms, net_of
from covered_call.candidates.pricing import black_scholes_call
from covered_call.candidates.schema import UTC, Candidate, Counterfactual, Decision, LoggedDecision, Outcome
from covered_call.candidates.settlement import PRESETS, Rule
from covered_call.candidates.vols import Vols

pytestmark = [
    on_the_default_stack,
    pytest.mark.no_cover,
]  # which coverage slows by half, for lines that other tests run, too

DAY = datetime.timedelta(days=1)
SIMULATED = PRESETS["simulated"]


def days(number: float) -> datetime.timedelta:
    return datetime.timedelta(microseconds=round(number * 86_400_000_000))


def hours(number: float) -> datetime.timedelta:
    return datetime.timedelta(microseconds=round(number * 3_600_000_000))


def counterfactual(decisions: list[Decision], decision: Decision, candidate: Candidate, rule: Rule, options):
    """Of one candidate, with no more than the decisions' own values."""
    start, name, style = decision.decision_time, decision.underlying, decision.exit_style
    prices = {one.decision_time: one.spot for one in decisions if one.underlying == name and one.spot > 0}
    chains = {one.decision_time: one.candidates for one in decisions if one[1:3] == decision[1:3]}
    tolerance = datetime.timedelta(hours=options.expiry_tolerance)
    life, stops = candidate.dte, style == "tp_and_roll" and not rule.own_expiry
    if options.horizon is not None:
        stops = stops or style == "tp_and_roll" or options.horizon < life
        life = options.horizon if style == "tp_and_roll" and rule.own_expiry else min(life, options.horizon)
    end = start + datetime.timedelta(days=life)
    last = nearest(prices, end)
    stop, beyond = last if stops else None, stops and abs(last - end) > tolerance and end > max(prices)
    known = candidate.iv is not None and style in ("hold_to_expiry", "tp_and_roll")
    if not known or (stops and abs(last - end) > tolerance and not beyond):
        return Counterfactual(None, end, None)
    stop = None if beyond else stop
    found = follow(decision, candidate, rule, prices, chains, (stop, end), tolerance, options)
    if beyond and not options.keep_cut:
        return Counterfactual(None, end, None)
    return found._replace(label_end=end) if beyond else found


def nearest(prices: dict, time: datetime.datetime) -> datetime.datetime:
    return min(prices, key=lambda other: (abs(other - time), other))


def follow(decision, candidate, rule, prices, chains, stopping, tolerance, options):
    """One call after the other, as TEACHER and PRESETS say, until the last is settled, bought back, or cut off."""
    lag, rolls, gross, costs = hours(rule.settle_hours), decision.exit_style == "tp_and_roll", 0.0, 0.0
    time, spot, clock, rolled, instrument = decision.decision_time, decision.spot, hours(0), 0, None
    times = sorted(prices)
    while True:
        expiry, listed = time - clock + days(candidate.dte), (time + days(candidate.dte)).date()
        instrument, clock = (candidate.strike, listed), lag
        premium = worth(spot, candidate, candidate.dte / 365)
        opening = cost(premium, spot, options)
        close, how = close_of(
            rule, premium, candidate, expiry, time, prices, stopping, tolerance, options, rolled, rolls
        )
        at = prices[close]
        left = stopping[1] if how == "stop" else close
        left = max(0.0, (expiry + lag - left) / DAY)
        left = 0.0 if how == "settled" and not lag else left
        value = worth(at, candidate, max(left / 365, 1e-6 if lag else 0.0))
        traded = how == "exit" or (how == "stop" and expiry > stopping[1])
        closing = cost(value, at, options) if traded else min(options.delivery_fee * at, options.fee_cap * value)
        costs += opening + closing
        gross += premium - value
        label_end = {"stop": max(stopping[1], close), "settled": max(expiry, close), "exit": close}.get(how, expiry)
        path = [one for one in times if decision.decision_time <= one <= close]
        gap = rolls and any(b - a > 2 * tolerance for a, b in zip(path, path[1:], strict=False))
        if how == "exit" and (found := next_of(chains.get(close, ()), close, instrument, rule, options)) is not None:
            candidate, time, spot, rolled = found, close, at, rolled + 1
            if candidate.iv is None:
                candidate = candidate._replace(iv=math.nan)
            continue
        known = how != "unknown" and not gap and (how != "cut" or (rolls and options.keep_cut))
        known = known and math.isfinite(gross) and math.isfinite(gross - costs)
        return Counterfactual(gross - costs if known else None, label_end, costs if known else None)


def close_of(rule, premium, call, expiry, sold, prices, stopping, tolerance, options, rolled, rolls):
    """When a call is closed, and how: bought back by the rule, stopped, settled, cut off by the file, or unknown."""
    lag, times, final = hours(rule.settle_hours), sorted(prices), max(prices)
    if lag:
        mature = max(time for time in times if time <= expiry + lag)
        how = "cut" if expiry > final else "settled"
        if how == "settled" and (mature <= sold or expiry - mature > 2 * tolerance):
            how = "unknown"
    else:
        mature = nearest(prices, expiry)
        how = "settled"
        if abs(mature - expiry) > tolerance:
            how = "cut" if expiry > final else "unknown"
            mature = min((time for time in times if time >= expiry), default=final)
    how = "unknown" if how == "cut" and not rolls else how
    for time in times:
        if time <= sold or math.isnan(call.iv):
            continue
        if rolled >= rule.max_rolls or not rolls or time > mature or (time == mature and not lag and how != "cut"):
            break
        if expiry + lag - time <= days(rule.min_dte_to_roll) or time >= expiry + lag:
            break
        if stopping[0] is not None and time >= stopping[0]:
            break
        now = worth(prices[time], call, (expiry + lag - time) / DAY / 365)
        if now <= (1 - rule.take_profit) * premium or prices[time] / call.strike >= rule.defend:
            return time, "exit"
    if stopping[0] is not None and stopping[0] <= mature:
        return stopping[0], "stop"
    return mature, how


def next_of(chain, time, instrument, rule, options):
    if rule.roll_min_score is None:
        return min(chain, key=lambda other: abs(other.delta - options.roll_delta), default=None)
    good = [one for one in chain if one.score >= rule.roll_min_score]
    best = max(good, key=lambda one: one.score, default=None)
    if best is None or (best.strike, (time + days(best.dte)).date()) != instrument:
        return best
    return max((one for one in good if (one.strike, (time + days(one.dte)).date()) != instrument),
        key=lambda one: one.score, default=None)  # fmt: skip


def worth(spot, candidate, years):
    with np.errstate(all="ignore"):
        return float(black_scholes_call(spot, candidate.strike, years, candidate.iv))


def cost(price, spot, options):
    return min(options.fee * spot, options.fee_cap * price) + options.half_spread * price + options.slippage * spot


def market_of(steps) -> list[LoggedDecision]:
    """Decisions, each so many hours after the one before, ordered by time."""
    time, logged = datetime.datetime(2024, 9, 1, tzinfo=UTC), []
    for hours, underlying, exit_style, spot, candidates in steps:
        time += datetime.timedelta(hours=hours)
        decision = Decision(time, underlying, exit_style, spot or 100.0 * bool(candidates), tuple(candidates))
        logged.append(LoggedDecision(decision, None, (Outcome(None, None, None),) * len(candidates)))
    return logged


def replay_of(columns: Columns, rule: Rule, options) -> Replay:
    """Of the decisions, which are all there are."""
    key = columns.names, columns.underlying, columns.exit_style, columns.time, columns.spot
    terms = Terms("", rule, Vols())
    return Replay(
        Basis(*key, rolls_of(columns, options)), dict.fromkeys(("hold_to_expiry", "tp_and_roll"), terms), options
    )


def add_counterfactuals(columns: Columns, rule: Rule, options) -> Columns:
    found = replay_of(columns, rule, options).of_candidates(columns)
    numbers = columns.numbers | {COUNTERFACTUAL: net_of(found, options), COSTS: found.costs}
    return dataclasses.replace(columns, numbers=numbers, label_end=found.label_end)


def assert_as_one_by_one(logged: list[LoggedDecision], options, rule=SIMULATED, of=slice(None)):
    decisions = [entry.decision for entry in logged]
    found = logged_of(add_counterfactuals(columns_of(logged), rule, options))
    for entry in found[of]:
        expected = [counterfactual(decisions, entry.decision, one, rule, options) for one in entry.decision.candidates]
        assert [one[:2] for one in entry.counterfactuals] == [one[:2] for one in expected]
        for one, its in zip(entry.counterfactuals, expected, strict=True):
            assert one.costs == its.costs or one.pnl_vs_hodl is None
    return found


def candidates(strike, dte, iv):
    deltas = st.sampled_from([-0.2, 0.1, 0.2, 0.3, 0.4])
    return st.builds(
        Candidate, st.just("C"), strike, dte, deltas, st.sampled_from([-1.0, 3.0, 3.0, 4.0]), iv, st.none()
    )


# As a whole it rounds to another microsecond than its fraction of a day alone does.
LONG = 32_767.116875678512
common = st.tuples(
    st.sampled_from([12, 12, 24, 24, 36]),
    st.just("BTC"),
    st.just("tp_and_roll"),
    st.sampled_from([60.0, 80.0, 100.0, 120.0]),
    st.lists(
        candidates(st.sampled_from([80.0, 90.0, 100.0]), st.sampled_from([0.0, 1.0, 2.0, 5.0]), st.just(0.5)),
        min_size=1,
        max_size=2,
    ),
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
    delivery_fee=st.sampled_from([0.0, 0.00015]),
    roll_delta=st.sampled_from([0, 0.25, 1]),
    keep_cut=st.booleans(),
)
rules = st.sampled_from(list(PRESETS.values())) | st.builds(
    Rule,
    settle_hours=st.sampled_from([0.0, 5.0, 16.0, 30.0]),
    take_profit=st.sampled_from([0, 0.3, 0.7, 0.8, 1]),
    defend=st.sampled_from([0.0, 0.9, 0.98, math.inf]),
    min_dte_to_roll=st.sampled_from([0.0, 1.0, 2.0, 2.5]),
    max_rolls=st.sampled_from([0, 1, 3, math.inf]),
    roll_min_score=st.sampled_from([None, 0.0, 3.0]),
    own_expiry=st.booleans(),
)


@settings(max_examples=300)
@given(st.lists(common, min_size=1, max_size=25) | st.lists(strange, min_size=1, max_size=25), configs, rules)
def test_all_at_once_is_as_one_by_one(some, options, rule):
    assert_as_one_by_one(market_of(some), options, rule)


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
    for rule in PRESETS.values():
        found = assert_as_one_by_one(logged, CoveredCallCandidatesConfig(), rule, slice(0, count // 3, count // 20))
    assert found[0].counterfactuals[0].pnl_vs_hodl is not None


def test_many_candidates_are_worked_out_in_parts(monkeypatch):
    logged, options = walk(300, 0.01, 2.0), CoveredCallCandidatesConfig()
    whole = add_counterfactuals(columns_of(logged), SIMULATED, options)
    monkeypatch.setattr(chains, "ROWS_AT_ONCE", 7)
    assert logged_of(add_counterfactuals(columns_of(logged), SIMULATED, options)) == logged_of(whole)


def test_no_candidates_at_all_have_no_outcomes():
    columns = columns_of(market_of([(1, "BTC", "tp_and_roll", 0.0, [])] * 2))
    found = add_counterfactuals(columns, SIMULATED, CoveredCallCandidatesConfig())
    assert len(found) == 2 and len(found.label_end) == 0


def test_the_call_to_roll_into_is_the_first_of_those_nearest_to_the_delta():
    chains = [[0.1, 0.4], [], [0.3, 0.2, 0.3], [0.5, 0.26]]
    chains = [[Candidate("C", 100.0, 7.0, delta, 0.0, 0.5, None) for delta in deltas] for deltas in chains]
    columns = columns_of(market_of([(24, "BTC", "tp_and_roll", 100.0, chain) for chain in chains]))
    columns.numbers["dte"][:] = np.arange(7)
    found = rolls_of(columns, CoveredCallCandidatesConfig(roll_delta=0.25)).nearest.dte
    np.testing.assert_array_equal(found, [0.0, np.nan, 2.0, 6.0])


def test_the_call_to_roll_into_is_the_best_score_of_another_instrument():
    """Of an instrument that is quoted twice neither is another one."""
    chain = [(100.0, 3.0), (110.0, 4.0), (110.0, 3.9), (120.0, 3.5), (130.0, 2.9)]
    calls = [Candidate("C", strike, 7.0, 0.2, score, 0.5, None) for strike, score in chain]
    columns = columns_of(
        market_of([(24, "BTC", "tp_and_roll", 100.0, some) for some in (calls, calls[:1], calls[4:])])
    )
    found = rolls_of(columns, CoveredCallCandidatesConfig())
    np.testing.assert_array_equal(found.best.strike, [110.0, 100.0, np.nan])
    np.testing.assert_array_equal(found.other.strike, [120.0, np.nan, np.nan])
    lower = rolls_of(columns, CoveredCallCandidatesConfig(roll_min_score=2.0))
    np.testing.assert_array_equal(lower.best.strike, [110.0, 100.0, 130.0])


def test_a_cost_beyond_all_floats_leaves_the_outcome_unknown():
    call = Candidate("C", 1.0, 0.0, 0.3, 0.0, 0.5, None)
    options = CoveredCallCandidatesConfig(half_spread=1.0, slippage=1.0)
    (found,) = assert_as_one_by_one(market_of([(1, "BTC", "hold_to_expiry", 1.7e308, [call])]), options)
    assert found.counterfactuals[0].pnl_vs_hodl is None
