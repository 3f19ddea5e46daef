"""Option chains from files: two layouts, one meaning, and one error for what no exchange could mean."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REAL_DATA, needs_real_data, on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st

from covered_call.candidates.columns import microseconds
from covered_call.candidates.schema import CandidatesError
from covered_call.market.snapshot import YEAR, BadRows, black_76_delta, black_76_price, read_snapshots

from .quotes import NOW, as_history, chain, quote, write_harvest

pytestmark = on_the_default_stack

# Of the 14 real snapshots in the order of their times: the calls that the backtest's filter leaves.
LEFT = {"BTC": [10, 9, 10, 8, 8, 8, 9], "ETH": [8, 8, 8, 8, 8, 7, 8]}


def read(path, bad=None):
    (found,) = read_snapshots(str(path), bad)
    return found


def test_a_snapshot_is_the_calls_of_one_time(tmp_path):
    found = read(write_harvest(tmp_path / "chain.parquet", chain()))
    calls = found.calls
    assert found.underlying == "BTC" and found.time == microseconds(NOW.replace(microsecond=0))
    assert list(calls.instrument) == sorted(calls.instrument) and all(name.endswith("-C") for name in calls.instrument)
    assert (found.spot, found.spot_is) == (93_000, "the forward of the nearest expiry")
    place = list(calls.instrument).index("BTC-19DEC25-97000-C")
    assert calls.iv[place] == 0.45 and calls.dte[place] == pytest.approx(9.288, abs=1e-3)
    assert calls.delta[place] == pytest.approx(0.2909, abs=1e-4)  # N(-0.5507), by hand


def test_both_layouts_say_the_same(tmp_path):
    one = read(write_harvest(tmp_path / "a.parquet", chain()))
    two = read(write_harvest(tmp_path / "b.parquet", as_history(chain(), index=93_000.0)))
    assert two.spot_is == "the index"
    for name in one.calls._fields:
        np.testing.assert_array_equal(getattr(one.calls, name), getattr(two.calls, name), err_msg=name)


def test_a_file_of_many_times_is_read_one_after_another(tmp_path):
    times = [NOW + datetime.timedelta(hours=6 * step) for step in range(5)]
    rows = [row for time in times for row in as_history(chain(), time, index=90_000.0 + time.hour)]
    found = list(read_snapshots(write_harvest(tmp_path / "chain.parquet", rows)))
    assert [one.time for one in found] == [microseconds(time.replace(microsecond=0)) for time in times]
    assert [len(one.calls.strike) for one in found] == [6] * 5
    assert [one.spot for one in found] == [90_000 + time.hour for time in times]


def test_rows_of_one_time_have_each_their_own_index_and_spot_is_the_median(tmp_path):
    rows = as_history(chain())
    for row, index in zip(rows, (92_000.0, 92_500, 99_000, 92_400, 92_600, 92_550, 1), strict=True):
        row["index_price"] = index
    assert read(write_harvest(tmp_path / "chain.parquet", rows)).spot == 92_525  # of the calls, not of the put


def test_of_usdc_calls_prices_are_dollars_and_they_are_an_underlying_of_their_own(tmp_path):
    rows = [*chain(), quote("BTC_USDC-19DEC25-97000-C", mark_price=930.0, best_bid_price=900.0, best_ask_price=960.0)]
    coin, usdc = read_snapshots(write_harvest(tmp_path / "chain.parquet", rows))
    assert (coin.underlying, usdc.underlying) == ("BTC", "BTC_USDC")
    assert usdc.calls.mark.tolist() == [0.01] and usdc.calls.bid[0] * usdc.spot == pytest.approx(900)


def test_a_price_of_0_or_none_is_unknown(tmp_path):
    rows = [quote(best_bid_price=0.0, best_ask_price=None)]
    found = read(write_harvest(tmp_path / "chain.parquet", rows)).calls
    assert np.isnan(found.bid[0]) and np.isnan(found.ask[0]) and found.mark[0] > 0


BAD = {
    "instrument": ({"instrument_name": "BTC-97000"}, "column instrument_name: 'BTC-97000' is no name of a call"),
    "strike": ({"strike": 96_000.0}, "column strike: 96000.0 is not the instrument's own"),
    "expiry": ({"expiry_timestamp": 1767000000.0}, "expiry_timestamp: '2025-12-29 09:20:00.00:00' is not the instr"),
    "underlying": ({"underlying": "ETH"}, "column underlying: 'ETH' is not BTC"),
    "no forward": ({"underlying_price": None}, "column underlying_price: nan is no forward price above 0"),
    "no vol": ({"mark_iv": None}, "column mark_iv: nan is no vol above 0"),
    "a vol of 600": ({"mark_iv": 600.0}, "column mark_iv: 6.0 is above 5 as a fraction a year"),
    "crossed": ({"best_bid_price": 0.02, "best_ask_price": 0.01}, "column best_bid_price: 0.02 is above the ask"),
    "an infinite mark": ({"mark_price": float("inf")}, "column mark_price: inf is not finite"),
    "an infinite forward": ({"underlying_price": float("inf")}, "column underlying_price: inf is not finite"),
    "below 0": ({"mark_price": -0.01}, "column mark_price: -0.01 is below 0"),
}


@pytest.mark.parametrize("cells, message", BAD.values(), ids=BAD)
def test_a_row_that_cannot_be_is_an_error_that_names_it_or_is_left_out_and_counted(cells, message, tmp_path):
    path = write_harvest(tmp_path / "chain.parquet", [*chain()[:2], quote("BTC-19DEC25-99000-C"), quote() | cells])
    with pytest.raises(CandidatesError, match=message) as error:
        read(path)
    assert "chain.parquet, instrument" in str(error.value)
    bad = BadRows("skip")
    assert len(read(path, bad).calls.strike) == 3 and bad.count == 1


def test_an_expiry_that_is_past_and_an_instrument_twice(tmp_path):
    with pytest.raises(CandidatesError, match="BTC-09DEC25-97000-C.*is past at 2025-12-10"):
        read(write_harvest(tmp_path / "a.parquet", [*chain(), quote("BTC-09DEC25-97000-C")]))
    with pytest.raises(CandidatesError, match="'BTC-19DEC25-97000-C' stands twice in the snapshot"):
        read(write_harvest(tmp_path / "b.parquet", [*chain(), quote()]))


def test_vols_that_are_fractions_where_the_layout_has_points_are_said_and_not_guessed(tmp_path):
    rows = [row | {"mark_iv": row["mark_iv"] / 100} for row in chain()]
    with pytest.raises(CandidatesError, match="mark_iv: no vol is above 5, so these are fractions.*by 100"):
        read(write_harvest(tmp_path / "chain.parquet", rows))


def test_two_times_in_one_snapshot(tmp_path):
    rows = [*chain(), *(row | {"harvest_time": NOW + datetime.timedelta(seconds=9)} for row in chain())]
    with pytest.raises(CandidatesError, match="2025-12-10 01:05:13.418603.* stand in one snapshot"):
        list(read_snapshots(write_harvest(tmp_path / "chain.parquet", rows)))


def test_times_that_go_back(tmp_path):
    rows = [*as_history(chain(), NOW + datetime.timedelta(hours=1)), *as_history(chain())]
    with pytest.raises(CandidatesError, match="column timestamp: times go back. Sort"):
        list(read_snapshots(write_harvest(tmp_path / "chain.parquet", rows)))


def test_files_that_are_no_chains(tmp_path):
    (tmp_path / "text.parquet").write_text("no chain")
    with pytest.raises(CandidatesError, match="text.parquet cannot be read as Parquet"):
        read(tmp_path / "text.parquet")
    with pytest.raises(CandidatesError, match="none.parquet cannot be read"):
        read(tmp_path / "none.parquet")
    puts = [row for row in chain() if row["option_type"] == "P"]
    with pytest.raises(CandidatesError, match="puts.parquet holds no call"):
        list(read_snapshots(write_harvest(tmp_path / "puts.parquet", puts)))
    empty = pa.Table.from_pylist(chain()).slice(0, 0)
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(CandidatesError, match="empty.parquet holds no call"):
        list(read_snapshots(str(tmp_path / "empty.parquet")))
    rows = [{name: value for name, value in row.items() if name != "mark_iv"} for row in chain()]
    with pytest.raises(CandidatesError, match="layout harvest it lacks mark_iv; .*layout history it lacks timestamp,"):
        read(write_harvest(tmp_path / "other.parquet", rows))
    rows = [row | {"strike": "high"} for row in chain()]
    with pytest.raises(CandidatesError, match="column strike: .*high.* Give numbers"):
        read(write_harvest(tmp_path / "words.parquet", rows))


@given(forward=st.floats(1e3, 1e5), moneyness=st.floats(0.5, 2), years=st.floats(0.002, 1), iv=st.floats(0.1, 3))
def test_the_delta_is_the_slope_of_the_price(forward, moneyness, years, iv):
    """In dollars at a fixed vol: what one more dollar of the forward adds."""
    strike, step = forward * moneyness, forward * 1e-5
    up, down = ((forward + way) * black_76_price(forward + way, strike, years, iv) for way in (step, -step))
    assert (up - down) / (2 * step) == pytest.approx(black_76_delta(forward, strike, years, iv), abs=1e-4)


@needs_real_data
def test_real_snapshots_price_as_the_exchange_does():
    for underlying, left in LEFT.items():
        found = [read(path) for path in sorted((REAL_DATA / "deribit_chains").glob(f"{underlying}_*.parquet"))]
        for one in found:
            calls = one.calls
            price = black_76_price(calls.forward, calls.strike, (calls.expiry - one.time) / YEAR, calls.iv)
            assert np.abs(price - np.nan_to_num(calls.mark)).max() < 0.0013
        filtered = [
            int(((one.calls.dte >= 3) & (one.calls.dte <= 21) & (abs(one.calls.delta - 0.25) <= 0.10)).sum())
            for one in found
        ]
        assert filtered == left


@needs_real_data
@pytest.mark.parametrize("underlying", ["BTC", "ETH"])
def test_two_months_of_real_snapshots_are_read_whole(underlying):
    found = list(read_snapshots(str(REAL_DATA / "market" / f"chain_{underlying}_6h_2025-12-30_2026-02.parquet")))
    assert len(found) == 235 and all(a.time < b.time for a, b in zip(found, found[1:], strict=False))
    assert all(len(one.calls.strike) > 250 and one.spot_is == "the index" for one in found)
