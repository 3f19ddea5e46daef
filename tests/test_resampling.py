"""Orders of decision times drawn in blocks, and what depends on their order, against the plain way of counting it."""

import numpy as np
import pytest
from arch.bootstrap import MovingBlockBootstrap
from conftest import on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st

from covered_call.resampling import (
    Draws,
    as_it_was,
    block_length,
    draw,
    drawdowns,
    month_starts,
    worst_months,
)

pytestmark = on_the_default_stack


def orders(draws: Draws) -> np.ndarray:
    """(orders, T): the times one by one."""
    made = [[start + i for start, length in zip(row, lengths(draws), strict=True) for i in range(length)]
            for row in draws.starts]  # fmt: skip
    return np.array(made)


def lengths(draws: Draws) -> list[int]:
    return [length for _, length in draws.blocks]


def test_a_block_spans_the_longest_time_to_a_label_end():
    times = np.arange(30)
    assert block_length(times, times + 7) == 8
    ends = times + 1
    ends[5] = 17  # one chain of rolls that goes on
    assert block_length(times, ends) == 13
    assert block_length(np.array([0, 30]), np.array([7, 37])) == 1


def test_too_few_blocks_give_no_resamples():
    assert draw(39, 8) is None
    assert orders(draw(40, 8, replicates=3)).shape == (3, 40)


@pytest.mark.parametrize("times, block", [(40, 8), (43, 8), (60, 1)])
def test_the_draws_are_those_of_arch(times, block):
    bootstrap = MovingBlockBootstrap(block, np.arange(times), seed=0)
    expected = [drawn for (drawn,), _ in bootstrap.bootstrap(20)]
    draws = draw(times, block, replicates=20)
    np.testing.assert_array_equal(orders(draws), expected)
    counts = [np.bincount(row, minlength=times) for row in expected]
    np.testing.assert_array_equal(draws.counts(slice(None)), counts)
    values = np.random.default_rng(0).normal(size=(times, 3))
    np.testing.assert_allclose(draws.sums(values), [values[row].sum(0) for row in expected])


@given(st.integers(1, 12), st.lists(st.floats(-1e3, 1e3), min_size=12, max_size=70))
def test_falls_and_months_are_those_of_the_whole_path(block, steps):
    steps, size = np.array(steps)[:, None], len(steps)
    rng = np.random.default_rng(size)
    starts = rng.integers(size - block + 1, size=(5, -(-size // block)))
    months = np.flatnonzero(np.append(True, rng.random(size - 1) < 0.1))
    for draws in (Draws(starts, block, size), as_it_was(size)):
        paths = steps[orders(draws), 0]
        curve = np.pad(paths.cumsum(1), ((0, 0), (1, 0)))
        falls = (np.maximum.accumulate(curve, axis=1) - curve).max(1)
        np.testing.assert_allclose(drawdowns(steps, draws)[:, 0], falls, atol=1e-9)
        least = np.add.reduceat(paths, months, axis=1).min(1)
        np.testing.assert_allclose(worst_months(steps, months, draws)[:, 0], least, atol=1e-9)


def test_months_begin_where_the_calendar_says():
    days = np.array(["2024-09-29", "2024-09-30", "2024-10-01", "2024-12-01", "2025-12-31"], "datetime64[us]")
    assert month_starts(days.astype(np.int64)).tolist() == [0, 2, 3, 4]
