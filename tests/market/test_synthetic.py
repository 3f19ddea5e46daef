"""The teacher's own chains: what it would have been offered on any series of spots."""

import collections
import csv
import math

import numpy as np
import pytest
from conftest import REAL_DATA, needs_real_data, on_the_default_stack

from covered_call.candidates.columns import DAY, microseconds
from covered_call.candidates.schema import CandidatesError, iso_time, utc
from covered_call.candidates.series import Series
from covered_call.market import synthetic
from covered_call.market.teacher import PRESETS, offer_of, past_of

pytestmark = on_the_default_stack

RULES = PRESETS["synthetic"]
STYLES = ("hold_to_expiry", "tp_and_roll")


def series(spots) -> Series:
    return Series(1_700_000_000_000_000 + DAY * np.arange(len(spots)), np.array(spots, float), np.arange(len(spots)))


def offers_of(closes: Series, style: str, vol_at=lambda time: 0.7):
    found = synthetic.snapshots(closes, "BTC", vol_at, "spots.csv")
    return [offer_of(one, RULES, past_of(closes, one.time, one.spot), style) for one in found]


def test_strikes_stand_on_a_grid_around_the_spot_and_a_week_from_it():
    (offer,) = offers_of(series([58_466.0]), "hold_to_expiry")
    strikes = sorted(one.strike for one in offer.decision.candidates)
    assert strikes == [61_000, 62_000, 63_000, 64_000]
    assert all(one.dte == 7 and one.iv == 0.7 and 0.15 <= one.delta <= 0.35 for one in offer.decision.candidates)
    assert {one.instrument.split("-")[1] for one in offer.decision.candidates} == {"21NOV23"}


def test_a_day_without_a_vol_has_no_candidates():
    offers = offers_of(series([58_000.0, 58_500.0]), "hold_to_expiry", lambda time: math.nan)
    assert [offer.decision.candidates for offer in offers] == [(), ()]


def test_an_underlying_without_a_grid():
    with pytest.raises(CandidatesError, match="underlying='SOL': the strikes are known of BTC and ETH alone"):
        list(synthetic.snapshots(series([100.0]), "SOL", lambda time: 0.7, "spots.csv"))


def test_outcomes_are_the_teachers_and_unknown_where_the_series_ends():
    offers = offers_of(series(60_000 * np.exp(0.02 * np.sin(np.arange(30)))), "hold_to_expiry")
    found = synthetic.outcomes_of(offers)
    assert [len(one) for one in found] == [len(offer.decision.candidates) for offer in offers]
    known = [one[0] is not None for one in found]
    assert known == [True] * sum(known) + [False] * (30 - sum(known)) and 22 <= sum(known) <= 24


@needs_real_data
@pytest.mark.parametrize("style", STYLES)
def test_a_real_backtest_follows_from_its_spots_alone(style):
    """All its candidates, the scores of those with 50 days before them, and what its trades brought."""
    with open(next(REAL_DATA.glob(f"*_{style}_*.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    spots = {microseconds(utc(iso_time(row["decision_time"]))): float(row["spot"]) for row in rows}
    closes = Series(np.array(list(spots)), np.array(list(spots.values())), np.arange(len(spots)))
    offers = offers_of(closes, style)
    mine = {
        (offer.decision.decision_time.isoformat(), one.instrument): (one, pnl, place == offer.chosen)
        for offer, its in zip(offers, synthetic.outcomes_of(offers), strict=True)
        for place, (one, pnl) in enumerate(zip(offer.decision.candidates, its, strict=True))
    }
    assert mine.keys() == {(row["decision_time"], row["instrument"]) for row in rows} and len(mine) == 644
    checked = collections.Counter()
    for row in rows:
        one, pnl, sold = mine[row["decision_time"], row["instrument"]]
        assert one.strike == float(row["strike"]) and one.delta == pytest.approx(float(row["delta"]), abs=1e-12)
        if microseconds(utc(iso_time(row["decision_time"]))) >= closes.time[49]:
            checked["score"] += 1
            assert one.score == pytest.approx(float(row["score"]), abs=1e-12)
        if row["chosen"] == "1" and pnl is not None:
            checked["pnl"] += 1
            assert sold and pnl == pytest.approx(float(row["pnl_vs_hodl"]), abs=0.01)
    assert checked == {"score": 443, "pnl": {"hold_to_expiry": 116, "tp_and_roll": 122}[style]}
