"""What bars of price and volume say of the market at a decision: read from a file, and seen up to then."""

import os
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from covered_call.candidates.columns import DAY, microseconds
from covered_call.candidates.context_lines import CANDLES
from covered_call.candidates.schema import CandidatesError, iso_time, shown, utc
from covered_call.candidates.series import HOUR

BARS = {"1d": DAY, "1h": HOUR}  # microseconds
LONGER = {"1d": 7, "1h": 24}  # bars of the longer frame
OF_BAR = ("open", "high", "low", "close", "volume")
SEEN = 250  # bars that are looked at
VOLUME_BARS, SPREAD_BARS, PATTERN_BARS = 50, 20, 20  # of the means, and of what a pattern is looked for in
VERY_HIGH, HIGH, LOW, VERY_LOW = 2.0, 1.3, 0.6, 0.3  # of a volume over its mean
WIDE, NARROW = 1.3, 0.6  # of a bar's range over its mean
LONG_WICK = 1.5  # over the body
MOVED = 0.10  # a change of volume that counts
TIGHT = 0.08  # highest over lowest, less 1, of a market without a trend
NEAR_HIGH, NEAR_LOW = 0.97, 1.07  # of the highest, and of the lowest
END_OF_BAR = 0.25


class Bars(NamedTuple):
    """The bars of one underlying, each of OF_BAR (N,) by its place in an even grid of time; NaN where none is."""

    values: dict[str, np.ndarray]
    begin: int  # of the first bar, microseconds since 1970
    bar: str  # of BARS
    offset: int  # microseconds from the time that a decision is labelled with to that of its price


def read_bars(path: str, underlying: str, bar: str, offset_hours: float) -> Bars:
    """Bars of a CSV or Parquet file with the columns time (at which a bar begins), open, high, low, close and volume;
    of one with a column underlying those of this one.

    Raises:
        CandidatesError: for a file that cannot be read, or a row that is no bar; it names row and column.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise CandidatesError(f"ohlcv_files={shown(path)} is no file. Give a CSV or Parquet file of bars.")
    try:
        table = pq.read_table(path) if path.endswith(".parquet") else pacsv.read_csv(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CandidatesError(f"ohlcv_files={shown(path)} cannot be read: {error}.") from error
    missing = [name for name in ("time", *OF_BAR) if name not in table.column_names]
    if missing:
        raise CandidatesError(f"{path}: there is no column {missing[0]}. Bars have time, {', '.join(OF_BAR)}.")
    twice = [name for name in ("time", *OF_BAR, "underlying") if table.column_names.count(name) > 1]
    if twice:
        raise CandidatesError(f"{path}: column {twice[0]} stands twice. Remove one of the two.")
    rows = np.arange(len(table))
    if "underlying" in table.column_names:
        rows = rows[np.array([str(one) == underlying for one in table["underlying"].to_pylist()], bool)]
    if not len(rows):
        raise CandidatesError(f"{path}: there is no bar of {underlying}.")
    time = times_of_bars(path, table["time"], rows)
    values = {name: floats_of_bars(path, table[name], name, rows) for name in OF_BAR}
    check_bars(path, values, rows)
    return in_grid(path, time, values, bar, round(offset_hours * HOUR))


def times_of_bars(path: str, column: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """(N,) microseconds since 1970, UTC."""
    if pa.types.is_timestamp(column.type) and not column.null_count:
        return column.cast(pa.timestamp("us", column.type.tz), safe=False).cast(pa.int64()).to_numpy()[rows]
    found = [iso_time(str(column[row].as_py())) for row in rows.tolist()]
    wrong = [row for row, time in zip(rows.tolist(), found, strict=True) if time is None]
    if wrong:
        said = shown(column[wrong[0]].as_py())
        raise CandidatesError(f"{path}, row {wrong[0] + 1}, column time: {said} is no time such as 2024-01-01.")
    return np.array([microseconds(utc(time)) for time in found if time is not None], np.int64)


def floats_of_bars(path: str, column: pa.ChunkedArray, name: str, rows: np.ndarray) -> np.ndarray:
    try:
        return column.cast(pa.float64()).to_numpy()[rows]
    except pa.ArrowException as error:
        raise CandidatesError(f"{path}, column {name}: {error}.") from error


def check_bars(path: str, values: dict[str, np.ndarray], rows: np.ndarray) -> None:
    inside = [(values["low"] <= values[name]) & (values[name] <= values["high"]) for name in ("open", "close")]
    good = {"low": values["low"] > 0, "high": np.isfinite(values["high"]) & inside[0] & inside[1]}
    good["volume"] = (values["volume"] >= 0) & np.isfinite(values["volume"])
    for name, right in good.items():
        if not right.all():
            place = int(np.argmin(right))
            raise CandidatesError(
                f"{path}, row {rows[place] + 1}, column {name}: {values[name][place]:g} is that of no bar: prices are "
                "above 0 and between low and high, and volumes 0 or more."
            )


def in_grid(path: str, time: np.ndarray, values: dict[str, np.ndarray], bar: str, offset: int) -> Bars:
    width, begin = BARS[bar], int(time.min())
    places, rest = np.divmod(time - begin, width)
    if rest.any():
        raise CandidatesError(f"{path}: bars do not begin {bar} apart from each other. Is bar={bar!r} their length?")
    if len(np.unique(places)) < len(places):
        raise CandidatesError(f"{path}: two bars begin at one time. Leave one of them out.")
    grid = {name: np.full(int(places.max()) + 1, np.nan) for name in values}
    for name, its in values.items():
        grid[name][places] = its
    return Bars(grid, begin, bar, offset)


def seen_at(bars: Bars, time: np.ndarray) -> dict[str, np.ndarray]:
    """(D, SEEN) of OF_BAR each, the last bar that had ended by the time of the price at the end; NaN before the
    first."""
    last = (time + bars.offset - bars.begin) // BARS[bars.bar] - 1
    count = len(bars.values["close"])
    places = last[:, None] - np.arange(SEEN - 1, -1, -1)
    outside = (places < 0) | (places >= count)
    places = np.clip(places, 0, count - 1)
    return {name: np.where(outside, np.nan, values[places]) for name, values in bars.values.items()}


def context_of_bars(bars: Bars, time: np.ndarray, spot: np.ndarray) -> dict[str, np.ndarray]:
    """(D,) each, by the names of OF_BARS; NaN where a bar that it needs is missing.

    Args:
        time: (D,) microseconds since 1970, as decisions are labelled.
        spot: (D,) USD, at that label's price.
    """
    seen = seen_at(bars, time)
    close, volume, spread = seen["close"], seen["volume"], seen["high"] - seen["low"]
    with np.errstate(divide="ignore", invalid="ignore"):
        volumes = volume / np.mean(volume[:, -VOLUME_BARS:], axis=1)[:, None]
        spreads = spread / np.mean(spread[:, -SPREAD_BARS:], axis=1)[:, None]
        returns = close[:, 1:] / close[:, :-1] - 1
        changed = volume[:, -1] / volume[:, -2] - 1
        frame = LONGER[bars.bar]
        longer = close[:, -1] / close[:, -frame - 1] - 1
        middle = (seen["high"] + seen["low"] + close)[:, -SPREAD_BARS:] / 3
        weight = volume[:, -SPREAD_BARS:]
        vwap = (middle * weight).sum(axis=1) / weight.sum(axis=1)
    return {
        "volume_ratio": finite(volumes[:, -1]),
        "volume_class": classes(volumes[:, -1], (HIGH, VERY_HIGH), (LOW, VERY_LOW)),
        "spread_ratio": finite(spreads[:, -1]),
        "spread_class": classes(spreads[:, -1], (WIDE,), (NARROW,)),
        "wick": wicks(*(seen[name][:, -1] for name in OF_BAR[:-1])),
        "effort": np.where(returns[:, -1] == 0, 0 * changed, classes(changed, (MOVED,), (-MOVED,))),
        **patterns(seen, volumes, spreads),
        "vwap_distance": finite(np.where(spot > 0, spot, np.nan) / vwap - 1),
        "adx_14": directional_index(seen["high"], seen["low"], close),
        "longer_ret": finite(longer),
        "longer_volume": finite(np.mean(volumes[:, -frame:], axis=1)),
        "longer_trend": classes(longer, (0.02, 0.05), (-0.02, -0.05)),
        **{f"candle_ret_{place}": finite(returns[:, -place]) for place in range(1, CANDLES + 1)},
        **{f"candle_volume_{place}": finite(volumes[:, -place]) for place in range(1, CANDLES + 1)},
    }


def finite(values: np.ndarray) -> np.ndarray:
    """Without what was divided by 0."""
    return np.where(np.isfinite(values), values, np.nan)


def classes(values: np.ndarray, highs: tuple[float, ...], lows: tuple[float, ...]) -> np.ndarray:
    """(D,) how many of the highs it reaches, or of the lows below 0."""
    above = np.sum([values >= edge for edge in highs], axis=0, dtype=float)
    steps = above - np.sum([values <= edge for edge in lows], axis=0)
    return np.where(np.isfinite(values), steps, np.nan)


def wicks(begin: np.ndarray, high: np.ndarray, low: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(D,) 1 for a long upper wick, -1 for a long lower one, 0 for none: the longer one, if it is 1.5 times the
    body."""
    upper, lower = high - np.maximum(begin, end), np.minimum(begin, end) - low
    long = np.maximum(upper, lower) > LONG_WICK * abs(end - begin)
    return np.where(np.isnan(end), np.nan, long * np.sign(upper - lower))


def patterns(seen: dict[str, np.ndarray], volumes: np.ndarray, spreads: np.ndarray) -> dict[str, np.ndarray]:
    """(D,) each: how many of its signs a pattern shows, 0 for fewer than two. A climax takes three, of
    which the last, that the bar has turned, has to be one."""
    high, low, close = (seen[name][:, -PATTERN_BARS:] for name in ("high", "low", "close"))
    width = high - low
    # Where in its bar a close is, from 0 to 1; of a bar without a range in the middle.
    place = np.divide(close - low, width, out=np.full(width.shape, 0.5), where=width > 0)
    top, bottom = high.max(axis=1)[:, None], low.min(axis=1)[:, None]
    near_high, near_low = close >= NEAR_HIGH * top, close <= NEAR_LOW * bottom
    busy, quiet = volumes[:, -PATTERN_BARS:] >= HIGH, volumes[:, -PATTERN_BARS:] <= LOW
    wick = wicks(*(seen[name][:, -1] for name in OF_BAR[:-1]))
    tight = (top / bottom - 1 <= TIGHT)[:, 0]
    climax = [volumes[:, -1] >= VERY_HIGH, spreads[:, -1] >= WIDE]
    low_end, high_end = place[:, -1] <= END_OF_BAR, place[:, -1] >= 1 - END_OF_BAR
    bought, sold = (busy & (place > 0.5)).sum(axis=1) >= 2, (busy & (place < 0.5)).sum(axis=1) >= 2
    turned = {"buying_climax": low_end | (wick == 1), "selling_climax": high_end | (wick == -1)}
    signs = {
        "accumulation": (2, tight, bought, (quiet & near_low).any(axis=1)),
        "distribution": (2, tight, sold, (quiet & near_high).any(axis=1)),
        "testing": (2, quiet[:, -1], spreads[:, -1] <= NARROW, near_low[:, -1]),
        "buying_climax": (3, *climax, near_high[:, -1], turned["buying_climax"]),
        "selling_climax": (3, *climax, near_low[:, -1], turned["selling_climax"]),
    }
    known = ~np.isnan(volumes[:, -VOLUME_BARS:]).any(axis=1)
    found = {}
    for name, (least, *its) in signs.items():
        strength = np.sum(its, axis=0, dtype=float)
        is_one = (strength >= least) & turned.get(name, True)  # both ends are near in a market without a trend
        found[name] = np.where(known, np.where(is_one, strength, 0), np.nan)
    return found


def directional_index(high: np.ndarray, low: np.ndarray, close: np.ndarray, bars: int = 14) -> np.ndarray:
    """(D,) 0 to 100: Wilder's ADX (New Concepts in Technical Trading Systems, 1978), of the bars since the last that
    is missing; 0 where none has moved."""
    rise, fall = np.diff(high), -np.diff(low)
    before = close[:, :-1]
    moves = (
        np.where((rise > fall) & (rise > 0), rise, 0.0),
        np.where((fall > rise) & (fall > 0), fall, 0.0),
        np.maximum(high[:, 1:], before) - np.minimum(low[:, 1:], before),
    )
    means, index, count = [np.zeros(len(close)) for _ in moves], np.zeros(len(close)), np.zeros(len(close))
    for place in range(rise.shape[1]):
        there = ~np.isnan(moves[2][:, place])
        count = np.where(there, count + 1, 0)
        weight = 1 / np.clip(count, 1, bars)  # a plain mean of the first, Wilder's then
        for mean, moved in zip(means, moves, strict=True):
            mean += weight * (np.where(there, moved[:, place], 0) - mean)
            mean[~there] = 0
        both = means[0] + means[1]
        strength = np.divide(100 * abs(means[0] - means[1]), both, out=np.zeros(len(both)), where=both > 0)
        smoothed = index + (strength - index) / np.clip(count - bars + 1, 1, bars)
        index = np.where(count >= bars, smoothed, 0)
    return np.where(count >= 2 * bars - 1, index, np.nan)
