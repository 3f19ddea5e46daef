"""Numbers of a whole column are written as Python writes each of them."""

import math
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from covered_call.candidates.number_texts import days, each_distinct, exact, money, ratio, ratios

pytestmark = pytest.mark.no_cover  # which coverage slows by half, for lines that other tests run, too

# Halves of a ten-thousandth: most lie just beside the middle, as floats, and those over a power of 2 exactly on it.
halves = st.integers(-200_000, 200_000).map(lambda number: (number + 0.5) / 10_000)
ties = st.integers(-400_000, 400_000).map(lambda number: number / 2**15)
beside = st.builds(math.nextafter, halves, st.sampled_from([-math.inf, math.inf]))
numbers = st.floats() | st.floats(-10, 10) | halves | ties | beside


def one_by_one(values: list[float], text) -> list[str]:
    return [text(None if math.isnan(value) else value) for value in values]


@given(st.lists(numbers, max_size=30))
@example([0.0, -0.0, -0.00001, 1e-320, 0.00005, 0.03125, 0.09375, -0.03125])
@example(
    [9.9999, 9.99995, 9.999949999999999, math.nextafter(10, 0), 10.0, -10.0, 1e300, math.inf, math.nan, -math.nan]
)
def test_ratios_are_rounded_and_signed_as_python_does(values):
    found = ratios(np.array(values, np.float64)).to_pylist()
    assert found == one_by_one(values, ratio)
    assert found == ["n/a" if math.isnan(value) else f"{value:.4f}" for value in values]


def test_every_ratio_of_five_digits_is_written():
    values = np.arange(100_001) / 10_000
    for signed in (values, -values):
        assert ratios(signed).to_pylist() == [f"{value:.4f}" for value in signed.tolist()]


@given(
    st.lists(st.floats(0, 36_500)), st.lists(st.floats(0, exclude_min=True, allow_infinity=False)), st.lists(numbers)
)
def test_days_strikes_and_money_are_written_as_one_alone_is(lives, strikes, amounts):
    for values, text in ((lives, days), (strikes, exact), (amounts, money)):
        assert each_distinct(np.array(values, np.float64), text).to_pylist() == one_by_one(values, text)


@pytest.mark.parametrize("text", [ratio, money])
def test_zeros_of_either_sign_stay_apart_and_all_that_is_unknown_is_the_same(text):
    other_nan = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_0001))[0]
    values = np.array([0.0, -0.0, math.nan, other_nan, 0.0])
    assert each_distinct(values, text).to_pylist() == [text(0.0), f"-{text(0.0)}", "n/a", "n/a", text(0.0)]
