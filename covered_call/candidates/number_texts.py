"""Numbers and times as prompts write them: one of a live decision, or a whole column at once, with the same text."""

import functools
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covered_call.candidates.columns import DAY, known, time_of

UNKNOWN = "n/a"
TABLED = 100_000  # 0.0000 to 9.9999: nearly all ratios
SPLITTER = 2.0**27 + 1  # cuts a float64 into two halves of 26 bits, whose products are exact (Veltkamp)


def money(value: float | None, unit: str = "") -> str:
    return UNKNOWN if value is None else f"{value:.2f}{unit}"


def ratio(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


@functools.lru_cache(maxsize=4096)
def exact(strike: float) -> str:
    """The shortest decimal that is exactly this strike: 63000, 0.55."""
    return np.format_float_positional(strike, trim="-")


def days(dte: float) -> str:
    return str(int(dte)) if dte == int(dte) else f"{dte:.2f}"


def each_distinct(values: np.ndarray, text: Callable[..., str]) -> pa.StringArray:
    """The texts of (K,) float64 or int64 numbers, made once for each that differs in a bit, NaN from None."""
    bits = pa.array(values.view(np.int64)).dictionary_encode()
    distinct = known(bits.dictionary.to_numpy().view(values.dtype))
    return pa.array([text(value) for value in distinct], pa.string()).take(bits.indices)


def iso_times(times: np.ndarray) -> pa.StringArray:
    """What datetime.isoformat says of (K,) microseconds since 1970, UTC."""
    day, rest = np.divmod(times, DAY)
    dates = each_distinct(day, lambda day: time_of(day * DAY).date().isoformat())
    return pc.binary_join_element_wise(dates, each_distinct(rest, lambda rest: time_of(rest).isoformat()[10:]), "")


def ratios(values: np.ndarray) -> pa.StringArray:
    """What ``ratio`` makes of each of (K,) float64 numbers; NaN is unknown."""
    rounded = ten_thousandths(np.fmin(np.abs(values), 10.0))  # NaN becomes 10: of both, the table says "n/a"
    beyond = rounded >= TABLED
    places = np.where(beyond, 2 * TABLED, rounded + TABLED * np.signbit(values))
    texts = table_of_ratios().take(pa.array(places))
    large = beyond & ~np.isnan(values)
    if large.any():
        texts = pc.replace_with_mask(texts, large, pa.array(list(map(ratio, values[large].tolist())), pa.string()))
    return texts


def ten_thousandths(values: np.ndarray) -> np.ndarray:
    """(K,) int64: numbers from 0 to 10, times 10,000, as ``.4f`` rounds them: exactly, ties to even."""
    product = values * 1e4
    whole = np.floor(product)
    above = product - whole - 0.5  # exact, as is what the product itself has lost (Dekker 1971):
    high = SPLITTER * values - (SPLITTER * values - values)
    lost = (high * 1e4 - product) + (values - high) * 1e4
    up = (above > 0) | (above == 0) & ((lost > 0) | (lost == 0) & (whole % 2 == 1))
    return (whole + up).astype(np.int64)


@functools.cache
def table_of_ratios() -> pa.StringArray:
    """The texts of 0, 1, ... 99,999 ten-thousandths, of the same below zero, and "n/a"."""
    digits = np.arange(TABLED)[:, None] // 10 ** np.arange(4, -1, -1) % 10 + ord("0")
    above = np.insert(digits.astype(np.uint8), 1, ord("."), axis=1)
    below = np.insert(above, 0, ord("-"), axis=1)
    return pa.concat_arrays([rows_as_texts(above), rows_as_texts(below), pa.array([UNKNOWN])])


def rows_as_texts(characters: np.ndarray) -> pa.StringArray:
    """The rows of a (K, W) uint8 array of ASCII characters."""
    count, width = characters.shape
    offsets = np.arange(0, (count + 1) * width, width, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(characters))
