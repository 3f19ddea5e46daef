"""What the teacher makes of a chain: candidates, scores, and the past that they rest on."""

import math

import numpy as np
import pytest
from conftest import REAL_DATA, needs_real_data, on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st

from covered_call.candidates.columns import DAY
from covered_call.candidates.schema import CandidatesError, check_decision
from covered_call.candidates.series import Series
from covered_call.market.snapshot import BadRows, read_snapshots
from covered_call.market.teacher import (
    PRESETS,
    UNKNOWN,
    Broken,
    Past,
    broken_of,
    offer_of,
    past_of,
    penalties,
    rules_of,
)

from .quotes import chain, quote, write_harvest

pytestmark = on_the_default_stack

BACKTEST = PRESETS["backtest"]
# Of the 14 real snapshots, without history: scores of at least 3, and the best with its score.
REAL = {
    "BTC": ([2, 3, 3, 3, 2, 3, 3], [
        ("BTC-26DEC25-98000-C", 3.4584), ("BTC-19DEC25-97000-C", 3.4992), ("BTC-19DEC25-98000-C", 3.2950),
        ("BTC-19DEC25-97000-C", 3.6491), ("BTC-19DEC25-97000-C", 3.5627), ("BTC-19DEC25-97000-C", 3.6924),
        ("BTC-26DEC25-98000-C", 3.5464),
    ]),
    "ETH": ([2, 4, 3, 3, 3, 2, 2], [
        ("ETH-19DEC25-3600-C", 3.8697), ("ETH-26DEC25-3800-C", 3.6570), ("ETH-26DEC25-3800-C", 3.5119),
        ("ETH-19DEC25-3600-C", 4.1311), ("ETH-19DEC25-3600-C", 4.1346), ("ETH-19DEC25-3600-C", 4.3375),
        ("ETH-19DEC25-3600-C", 3.8995),
    ]),
}  # fmt: skip


@pytest.fixture
def snapshot(tmp_path):
    (found,) = read_snapshots(write_harvest(tmp_path / "chain.parquet", chain()))
    return found


def closes(numbers, last: int = 0) -> Series:
    """One a day, the last at that time."""
    times = last - DAY * np.arange(len(numbers))[::-1]
    return Series(times, np.array(numbers, float), np.arange(len(numbers)))


# ---------------------------------------------------------------------------------------------------------------------
# Candidates


def test_candidates_are_what_the_rules_leave_best_score_first_and_the_best_is_sold(snapshot):
    offer = offer_of(snapshot, BACKTEST)
    names = [one.instrument for one in offer.decision.candidates]
    assert sorted(names) == [f"BTC-19DEC25-{strike}-C" for strike in (96_000, 97_000, 98_000)]
    scores = [one.score for one in offer.decision.candidates]
    assert scores == sorted(scores, reverse=True) and offer.chosen == (0 if scores[0] >= 3 else None)
    assert offer.left_out == {"dte": 1, "delta": 2}
    assert list(snapshot.calls.instrument[offer.rows]) == names
    check_decision(offer.decision)


def test_a_score_by_hand(tmp_path):
    """Nine days and a delta of 0.2909: 0 for IV/RV, 2 * (1 - 0.4087), nothing for the days, 2 * 1.1174 / 1.5."""
    (one,) = read_snapshots(write_harvest(tmp_path / "chain.parquet", [quote(mark_price=0.011174)]))
    (candidate,) = offer_of(one, BACKTEST).decision.candidates
    assert candidate.score == pytest.approx(1.1819 + 1.4899, abs=2e-4)
    (candidate,) = offer_of(one, rules_of("backtest", premium_in_score=False)).decision.candidates
    assert candidate.score == pytest.approx(1.1819, abs=2e-4)
    # With a realised vol of 0.36 the implied one of 0.45 is 1.25 times it: 3 * 0.25 / 0.5 more.
    rich = offer_of(one, BACKTEST, Past(0.36, None, None, None, None)).decision.candidates[0]
    assert rich.ivrv_ratio == pytest.approx(1.25) and rich.score == pytest.approx(1.1819 + 1.4899 + 1.5, abs=2e-4)


def test_an_empty_chain_is_a_decision_without_candidates(snapshot):
    offer = offer_of(snapshot, rules_of("backtest", min_delta=0.34, max_delta=0.341))
    assert offer.decision.candidates == () and offer.chosen is None


def test_a_candidate_without_a_mark_is_an_error_or_left_out(tmp_path):
    rows = [quote(), quote("BTC-19DEC25-98000-C", mark_price=0.0)]
    (one,) = read_snapshots(write_harvest(tmp_path / "chain.parquet", rows))
    with pytest.raises(CandidatesError, match="BTC-19DEC25-98000-C', column mark: 0.0 is no mark above 0"):
        offer_of(one, BACKTEST)
    bad = BadRows("skip")
    assert len(offer_of(one, BACKTEST, bad=bad).rows) == 1 and bad.count == 1


def test_more_than_fit_in_a_prompt_are_left_out_the_lowest_scores_first(tmp_path):
    rows = [quote(f"BTC-19DEC25-{strike}-C") for strike in range(95_500, 99_500, 250)]
    (one,) = read_snapshots(write_harvest(tmp_path / "chain.parquet", rows))
    every = offer_of(one, rules_of("backtest", max_candidates=99)).decision.candidates
    few = offer_of(one, BACKTEST)
    assert few.decision.candidates == every[:10] and few.left_out["max_candidates"] == len(every) - 10 > 0


@pytest.mark.parametrize("changed, left", [
    ({"above_spot": True}, 3), ({"two_sided": True}, 2), ({"min_premium_usd": 1000}, 2),
    ({"min_open_interest": 101}, 1), ({"max_spread_pct": 7}, 1), ({"min_ivrv": 2}, 3),
])  # fmt: skip
def test_each_rule_leaves_out_what_breaks_it(changed, left, tmp_path):
    rows = chain()
    rows[1] |= {"best_bid_price": None, "open_interest": 200.0}
    rows[2] |= {"best_bid_price": rows[2]["mark_price"] * 0.9}
    (one,) = read_snapshots(write_harvest(tmp_path / "chain.parquet", rows))
    assert len(offer_of(one, rules_of("backtest", **changed)).rows) == left


def test_production_sells_by_premium_above_spot_and_where_implied_vol_is_rich(snapshot):
    rich, poor = (Past(vol, None, None, None, None) for vol in (0.3, 0.44))
    offer = offer_of(snapshot, PRESETS["production"], rich)
    assert offer.chosen == 0 and all(0.20 <= one.delta <= 0.30 for one in offer.decision.candidates)
    best, snap = offer.decision.candidates[0], snapshot.calls
    mark = snap.mark[offer.rows[0]] * snapshot.spot
    by_hand = math.log1p(mark) - 5 * (best.delta - 0.25) ** 2 - 2 * ((best.dte - 7.5) / 7.5) ** 2 + (0.45 / 0.3 - 1.2)
    assert best.score == pytest.approx(by_hand)
    assert offer_of(snapshot, PRESETS["production"], poor).decision.candidates == ()


def test_a_preset_that_is_none():
    with pytest.raises(CandidatesError, match="preset='mine': choose one of backtest, production"):
        rules_of("mine")


# ---------------------------------------------------------------------------------------------------------------------
# The past


def test_the_past_of_steady_growth():
    found = past_of(closes([100 * 1.01**day for day in range(60)]), 0, 100 * 1.01**59)
    assert found.realised_vol == pytest.approx(0, abs=1e-9) and found.short_vol == pytest.approx(0, abs=1e-9)
    assert found.week == pytest.approx(1.01**7 - 1) and found.month == pytest.approx(1.01**30 - 1)
    assert found.distance == pytest.approx(50 * 0.01 / (1 - 1.01**-50) / 1.01 - 1)


def test_a_short_a_stale_or_a_holed_past_is_unknown_and_not_0():
    growth = [100 * 1.01**day for day in range(60)]
    assert past_of(closes(growth[:49]), 0, 100.0)[2:] == (None, None, None)
    assert past_of(closes(growth[:20]), 0, 100.0).realised_vol is None
    assert past_of(closes(growth), 2 * DAY, 100.0) == UNKNOWN
    assert past_of(closes(growth), -60 * DAY, 100.0) == UNKNOWN
    whole = closes(growth)
    hole = Series(*(np.delete(values, 40) for values in whole))
    assert past_of(hole, 0, 100.0) == Past(None, past_of(whole, 0, 100.0).short_vol, None, None, None)


@given(st.lists(st.floats(50, 150), min_size=60, max_size=60), st.floats(0.1, 10), st.integers(1, 20))
def test_nothing_after_a_time_changes_its_past(numbers, factor, later):
    known = closes(numbers)
    time = int(known.time[-later - 1])
    other = Series(known.time, np.where(known.time > time, known.number * factor, known.number), known.line)
    for series in (other, Series(*(values[known.time <= time] for values in known))):
        assert past_of(series, time, 100.0) == past_of(known, time, 100.0)


RIDGE = [100.0] * 20 + [104, 108, 110, 107, 104, 102, 100, 98, 96, 95, 94, 93]  # a high of 110, 10 days ago


def broken(numbers: list[float], spot: float) -> Broken:
    """At the last of a close a day."""
    return broken_of(closes(numbers), 0, spot)


def test_a_resistance_is_broken_once_spot_or_a_later_close_is_above_it():
    assert broken([*RIDGE, 99], 110.0) == (0, None)  # at it, and not above
    assert broken([*RIDGE, 99], 110.01) == (5, pytest.approx(110))
    assert broken([*RIDGE, 111, 105], 105.0) == (
        4,
        pytest.approx(110),
    )  # fallen back: of 4 of 5 days it was a resistance
    assert broken([*RIDGE, 111, *[105] * 4], 105.0) == (1, pytest.approx(110))
    assert broken([*RIDGE, 111, *[105] * 5], 105.0) == (0, None)  # long ago


def test_without_closes_no_resistance_is_known_to_be_whole():
    assert broken(RIDGE[-14:], 120.0) == (None, None) and broken(RIDGE[-15:], 90.0) == (0, None)
    assert broken(RIDGE, math.nan) == (None, None)
    assert broken_of(closes(RIDGE), 2 * DAY, 120.0) == (None, None)  # stale


@given(
    st.lists(st.floats(50, 150), min_size=25, max_size=60), st.floats(50, 200), st.floats(0.1, 9), st.integers(1, 5)
)
def test_no_close_of_later_changes_what_is_broken_now(numbers, spot, factor, later):
    known = closes(numbers)
    time = int(known.time[-later - 1])
    other = known._replace(number=np.where(known.time > time, known.number * factor, known.number))
    assert broken_of(other, time, spot) == broken_of(known, time, spot) != (None, None)


@pytest.mark.parametrize("past, lost", [
    (Past(0.5, 0.5, 0.06, 0.0, 0.11), [1.0, 0.0]), (Past(0.5, 0.5, 0.06, 0.0, 0.26), [1.5, 0.5]),
    (Past(0.5, 0.5, -0.06, -0.11, -0.11), [0.5, 0.5]), (Past(0.5, 0.5, -0.06, -0.09, -0.11), [0, 0]),
    (Past(0.5, 0.29, 0.0, 0.0, 0.0), [0.5, 0.5]), (Past(0.5, 0.5, 0.21, 0.0, 0.0), [0.5, 0.5]), (UNKNOWN, [0, 0]),
    (Past(None, None, 0.5, 0.5, 0.5), [0, 0]),
])  # fmt: skip
def test_what_the_state_of_the_market_costs(past, lost):
    """Of a strike 4 % above spot, and one 6 % above it."""
    assert sum(penalties(np.array([1.04, 1.06]), past).values()).tolist() == lost


# ---------------------------------------------------------------------------------------------------------------------
# Real input


@needs_real_data
@pytest.mark.parametrize("underlying", REAL)
def test_real_snapshots_give_the_known_picks(underlying):
    counts, best = REAL[underlying]
    found = [
        next(read_snapshots(str(path))) for path in sorted((REAL_DATA / "deribit_chains").glob(f"{underlying}_*"))
    ]
    offers = [offer_of(one, BACKTEST) for one in found]
    assert [sum(one.score >= 3 for one in offer.decision.candidates) for offer in offers] == counts
    firsts = [offer.decision.candidates[0] for offer in offers]
    assert [(one.instrument, round(one.score, 4)) for one in firsts] == best
    assert all(offer.chosen == 0 for offer in offers)
    for one in found:
        plain = offer_of(one, rules_of("backtest", premium_in_score=False))
        assert plain.chosen is None and all(candidate.score < 3 for candidate in plain.decision.candidates)
