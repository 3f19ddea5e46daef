"""The overlay on one coin, marked at each time."""

import dataclasses

import numpy as np
import pytest
from conftest import write_csv
from markets import walk

from covered_call.candidates.builder import Backtest
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import net_of
from covered_call.candidates.pricing import Calls, Sales
from covered_call.evaluation.overlay import Overlay, gains, make_overlay, risk_of
from covered_call.resampling import draw

DAY = 86_400_000_000
COSTS = CoveredCallCandidatesConfig(fee=0.0003, half_spread=0.035, delivery_fee=0.00015)


@pytest.fixture(scope="module", params=["hold_to_expiry", "tp_and_roll"])
def path(request, tmp_path_factory) -> tuple[str, str]:
    rows = walk(90, request.param)
    return write_csv(tmp_path_factory.mktemp("overlay") / "a.csv", rows), request.param


def sales_of(columns, rows) -> Sales:
    of, calls = columns.decision_of[rows], [columns.numbers[name][rows] for name in Calls._fields]
    return Sales(columns.underlying[of], columns.time[of], columns.spot[of], *calls)


@pytest.mark.parametrize("settlement", ["teacher", "intrinsic", "simulated"])
def test_what_a_call_gains_from_time_to_time_adds_up_to_its_outcome(path, settlement):
    path, style = path
    options = dataclasses.replace(COSTS, settlement=settlement)
    decisions = Backtest([path], options).decisions
    columns, trail = decisions.columns(), []
    net = net_of(decisions.replay.of_sales(sales_of(columns, slice(None)), style, trail), options)
    total = np.zeros(len(net))
    for segment in trail:
        place, gained = gains(segment, decisions.replay, style)
        sizes = segment.end - segment.begin + 1
        assert len(place) == sizes.sum()
        total += np.bincount(np.repeat(segment.chain, sizes), gained, len(net))
    known = ~np.isnan(net)
    assert known.sum() > 100 and len(trail) > 1 or style == "hold_to_expiry"
    np.testing.assert_allclose(total[known], net[known], atol=1e-6)


def overlay_of(path: str, style: str, rows, coins=1, **options) -> Overlay:
    decisions = Backtest([path], dataclasses.replace(COSTS, **options)).decisions
    columns = decisions.columns()
    span = int(columns.time[0]), int(columns.label_end.max())
    return make_overlay(decisions.replay, columns, np.array(rows, int), ("BTC", style), span, coins)


def test_gains_are_in_percent_of_the_coins_that_are_tied_up(path):
    path, style = path
    one, two = (overlay_of(path, style, range(20), coins) for coins in (1, 2))
    np.testing.assert_allclose(two.gain, one.gain / 2)
    assert len(one.time) == 90 and (np.diff(one.time) == DAY).all() and one.spot[0] == 0
    nothing = overlay_of(path, style, [])
    assert not nothing.gain.any()


def test_a_call_that_is_open_when_the_files_end_is_marked_until_then(path):
    path, style = path
    last = overlay_of(path, style, [2 * 87], settlement="teacher")
    assert not np.isnan(last.gain).any() and last.gain[-1] != 0 and not last.gain[:87].any()


def test_what_is_not_known_is_not_known_from_then_on(path, tmp_path):
    path, style = path
    rows = walk(90, style)
    rows[2 * 40]["iv"] = ""
    unknown = overlay_of(write_csv(tmp_path / "a.csv", rows), style, range(0, 170, 2))
    assert np.isnan(unknown.gain[40:]).all() and not np.isnan(unknown.gain[:40]).any()
    assert all(np.isnan(figure.low) and figure.interval is None for figure in risk_of(unknown, None))


def test_ratios_are_those_of_the_gains():
    rng = np.random.default_rng(0)
    spot = rng.normal(0.1, 3, 400)
    gain = -0.2 * spot + rng.normal(0.05, 1, 400)
    overlay = Overlay(np.arange(400) * DAY, gain, spot)
    risk = risk_of(overlay, draw(400, 5))
    years = 399 / 365.25
    curve = np.concatenate([[0], gain.cumsum()])
    expected = (
        gain.sum() / years,
        gain.mean() / gain.std() * np.sqrt(400 / years),
        gain.mean() / np.sqrt(np.mean(np.minimum(gain, 0) ** 2)) * np.sqrt(400 / years),
        (np.maximum.accumulate(curve) - curve).max(),
        np.cov(gain, spot)[0, 1] / np.var(spot, ddof=1),
    )
    assert [figure.low for figure in risk] == pytest.approx(expected)
    assert all(figure.interval[0] < figure.low < figure.interval[1] for figure in risk)
    assert [figure.interval for figure in risk_of(overlay, None)] == [None] * 5
