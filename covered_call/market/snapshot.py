"""Option chains as an exchange quotes them, from Parquet files: one Snapshot for each time and underlying."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.special import ndtr

from covered_call.candidates.columns import DAY, microseconds, time_of
from covered_call.candidates.pricing import DAYS_PER_YEAR
from covered_call.candidates.schema import MAX_IV, CandidatesError, named_call, shown

YEAR = DAYS_PER_YEAR * DAY  # microseconds
BATCH = 65_536  # rows that are read at a time
SECOND = 1_000_000


class Layout(NamedTuple):
    """How an exchange's file, or a collector's, names what is read of it."""

    name: str
    columns: dict[str, str]  # from our word to its column
    optional: tuple[str, ...]  # of our words: a file may be without them
    call: str  # what its option type says of a call
    in_points: bool  # whether its vols are in points: 70 for 70 % a year
    one_time: bool  # whether a file holds a single snapshot


LAYOUTS = (
    Layout(
        "harvest",
        {"time": "harvest_time", "instrument": "instrument_name", "underlying": "underlying", "type": "option_type",
         "strike": "strike", "expiry": "expiry_timestamp", "forward": "underlying_price", "mark": "mark_price",
         "bid": "best_bid_price", "ask": "best_ask_price", "iv": "mark_iv", "open_interest": "open_interest",
         "volume": "volume", "index": "index_price"},
        ("index", "volume"), "C", in_points=True, one_time=True,
    ),
    Layout(
        "history",
        {"time": "timestamp", "instrument": "instrument_name", "type": "option_type", "strike": "strike",
         "expiry": "expiry_datetime", "forward": "futures_price", "mark": "mark_price", "bid": "bid_price",
         "ask": "ask_price", "iv": "implied_volatility", "open_interest": "open_interest", "volume": "volume",
         "index": "index_price"},
        ("index", "volume"), "call", in_points=False, one_time=False,
    ),
)  # fmt: skip


class QuotedCalls(NamedTuple):
    """The calls (C,) of a snapshot, by instrument; NaN where the exchange says nothing.

    Prices are shares of spot: what a coin-settled call is quoted in, and of one that is settled in dollars its price
    over spot. Times spot they are USD a coin.
    """

    instrument: np.ndarray  # str
    strike: np.ndarray  # USD
    expiry: np.ndarray  # int64, microseconds since 1970
    dte: np.ndarray  # days
    forward: np.ndarray  # USD, of its expiry
    mark: np.ndarray
    bid: np.ndarray
    ask: np.ndarray
    iv: np.ndarray  # a fraction a year, of the mark
    delta: np.ndarray  # Black-76
    open_interest: np.ndarray  # contracts
    volume: np.ndarray


class Snapshot(NamedTuple):
    """The calls of one underlying at one time.

    ``underlying`` is as the instruments have it: those of BTC are settled in coin, those of BTC_USDC in dollars.
    """

    source: str  # where it was read
    underlying: str
    time: int  # microseconds since 1970, UTC, whole seconds
    spot: float  # USD
    spot_is: str  # "the index", or what stands for it
    calls: QuotedCalls
    put_call_oi: float = np.nan  # open interest of all puts over that of all calls
    atm_iv: float = np.nan  # of the call nearest to its forward, at the expiry nearest to a week

    @property
    def shape(self) -> tuple[float, float]:
        """By CHAIN_COLUMNS."""
        return self.put_call_oi, self.atm_iv


class BadRow(CandidatesError):
    """A row that no exchange could mean."""


class BadRows:
    """What is done with rows that cannot be: they are an error, or left out and counted."""

    def __init__(self, on_bad_rows: str = "error"):
        self.skip, self.count = on_bad_rows == "skip", 0

    def found(self, source: str, instrument, column: str, value, reason: str) -> None:
        if not self.skip:
            raise BadRow(
                f"{source}, instrument {shown(instrument)}, column {column}: {shown(value)} {reason}. Mend or remove "
                'the row, or leave such rows out with on_bad_rows="skip".'
            )
        self.count += 1


def read_snapshots(path: str, bad: BadRows | None = None) -> Iterator[Snapshot]:
    """The snapshots of a file by time, of which no more than a few are in memory.

    Args:
        bad: what is done with bad rows; they are an error without it.

    Raises:
        CandidatesError: for a file that is no Parquet, has no known layout or no call, and for a bad row.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            read = [column for column in layout_of(path, names).columns.values() if column in names]
            yield from snapshots_in(path, names, file.iter_batches(BATCH, columns=read), bad)
    except (pa.ArrowInvalid, OSError) as error:
        raise CandidatesError(f"{path} cannot be read as Parquet: {error}. Give a file of option quotes.") from error


def snapshots_in(
    source: str, names: list[str], batches: Iterable[pa.RecordBatch], bad: BadRows | None = None
) -> Iterator[Snapshot]:
    """Those of batches of rows with these columns, as read_snapshots has them of a file."""
    layout, calls = layout_of(source, names), 0
    for table in by_time(source, batches, layout):
        for snapshot in snapshots_of(source, table, layout, bad or BadRows()):
            calls += len(snapshot.calls.strike)
            yield snapshot
    if not calls:
        raise CandidatesError(f"{source} holds no call. Leave it out, or collect it again.")


def layout_of(path: str, names: list[str]) -> Layout:
    lacking = {
        layout.name: [column for word, column in layout.columns.items()
                      if column not in names and word not in layout.optional]
        for layout in LAYOUTS
    }  # fmt: skip
    for layout in LAYOUTS:
        if not lacking[layout.name]:
            return layout
    lacks = "; ".join(f"to be of the layout {name} it lacks {', '.join(its)}" for name, its in lacking.items())
    raise CandidatesError(f"{path} has no layout that is known: {lacks}. Its columns are {', '.join(names)}.")


def by_time(path: str, batches: Iterable[pa.RecordBatch], layout: Layout) -> Iterator[pa.Table]:
    """The rows of each time, with our words for columns."""
    rest = None
    for batch in batches:
        its = {word: batch.column(column) for word, column in layout.columns.items() if column in batch.schema.names}
        table = pa.table(list(its.values()), list(its))
        table = pa.concat_tables([rest, table]) if rest else table
        time = times_of(path, table.column("time"), layout.columns["time"])
        ends = np.flatnonzero(np.diff(time)) + 1
        if (np.diff(time) < 0).any():
            raise CandidatesError(f"{path}, column {layout.columns['time']}: times go back. Sort the file by it.")
        if layout.one_time and len(ends):
            mixed = " and ".join(str(time_of(int(time[place]))) for place in (ends[0] - 1, ends[0]))
            raise CandidatesError(
                f"{path}, column {layout.columns['time']}: {mixed} stand in one snapshot. Give a file each."
            )
        for begin, end in itertools.pairwise([0, *ends.tolist()]):
            yield table.slice(begin, end - begin)
        rest = table.slice(ends[-1] if len(ends) else 0)
    if rest:
        yield rest


def times_of(path: str, column: pa.ChunkedArray, name: str) -> np.ndarray:
    """(R,) int64 microseconds since 1970, of timestamps, or of seconds since then."""
    if column.null_count:
        raise CandidatesError(f"{path}, column {name}: a time is missing. Remove the row, or collect it again.")
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("us", column.type.tz)).cast(pa.int64()).to_numpy()
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        return np.rint(column.to_numpy() * SECOND).astype(np.int64)
    raise CandidatesError(f"{path}, column {name}: {column.type} is no time. Give timestamps, or seconds since 1970.")


def snapshots_of(path: str, table: pa.Table, layout: Layout, bad: BadRows) -> Iterator[Snapshot]:
    """Those of the rows of one time."""
    is_call = pc.equal(table.column("type"), layout.call)
    puts, table = table.filter(pc.invert(is_call)), table.filter(is_call).sort_by("instrument")
    names = np.array(table.column("instrument").to_pylist(), object)
    whose = np.array([str(name).partition("-")[0] for name in names], object)
    for underlying in np.unique(whose.astype(str)):
        found = snapshot_of(path, table.filter(pa.array(whose == underlying)), str(underlying), layout, bad)
        of_puts = open_interest(puts.filter(pc.starts_with(puts.column("instrument"), f"{underlying}-")), path, layout)
        yield found._replace(put_call_oi=of_puts / (np.nansum(found.calls.open_interest) or np.nan))


def open_interest(puts: pa.Table, path: str, layout: Layout) -> float:
    """Contracts of all puts; NaN where there are none, for then they were not collected."""
    if not len(puts):
        return np.nan
    return float(np.nansum(number_of(path, puts.column("open_interest"), layout.columns["open_interest"])))


def vol_at_the_money(calls: QuotedCalls) -> float:
    if not len(calls.strike):
        return np.nan
    week = calls.expiry == calls.expiry[abs(calls.dte - 7).argmin()]
    return float(calls.iv[week][abs(calls.strike / calls.forward - 1)[week].argmin()])


def snapshot_of(path: str, table: pa.Table, underlying: str, layout: Layout, bad: BadRows) -> Snapshot:
    time = int(times_of(path, table.column("time").slice(0, 1), layout.columns["time"])[0])
    numbers = {
        word: number_of(path, table.column(word), layout.columns[word])
        for word in layout.columns
        if word in table.column_names and word not in NOT_NUMBERS
    }
    expiry = times_of(path, table.column("expiry"), layout.columns["expiry"])
    if layout.in_points:
        check_points(path, numbers["iv"], layout.columns["iv"])
        numbers["iv"] = numbers["iv"] / 100
    instrument = np.array(table.column("instrument").to_pylist(), object)
    whose = table.column("underlying").to_pylist() if "underlying" in table.column_names else [underlying] * len(table)
    good = good_rows(path, layout, bad, underlying, time, instrument, whose, expiry, numbers)
    numbers = {word: values[good] for word, values in numbers.items()}
    expiry, instrument = expiry[good], instrument[good]
    spot, spot_is = spot_of(numbers, expiry)
    for word in ("mark", "bid", "ask"):  # 0 says that there is none
        price = np.where(numbers[word] > 0, numbers[word], np.nan)
        numbers[word] = price / spot if "_" in underlying else price
    years = (expiry - time) / YEAR
    calls = QuotedCalls(
        instrument, numbers["strike"], expiry, (expiry - time) / DAY, numbers["forward"], numbers["mark"],
        numbers["bid"], numbers["ask"], numbers["iv"],
        black_76_delta(numbers["forward"], numbers["strike"], years, numbers["iv"]), numbers["open_interest"],
        numbers.get("volume", np.full(len(expiry), np.nan)),
    )  # fmt: skip
    return Snapshot(path, underlying, time - time % SECOND, spot, spot_is, calls, atm_iv=vol_at_the_money(calls))


NOT_NUMBERS = ("time", "instrument", "underlying", "type", "expiry")


def number_of(path: str, column: pa.ChunkedArray, name: str) -> np.ndarray:
    """(R,) float64, NaN where there is none. One of 32 bits is taken for the decimal that it was rounded from."""
    if pa.types.is_float32(column.type):
        column = column.cast(pa.string())
    try:
        return column.cast(pa.float64()).to_numpy().astype(float)
    except pa.ArrowInvalid as error:
        raise CandidatesError(f"{path}, column {name}: {error}. Give numbers.") from error


def check_points(path: str, iv: np.ndarray, name: str) -> None:
    if len(iv) and np.nanmax(iv, initial=0.0) <= MAX_IV:
        raise CandidatesError(
            f"{path}, column {name}: no vol is above {MAX_IV:g}, so these are fractions, and the layout has points: "
            "70 for 70 % a year. Multiply the column by 100."
        )


def good_rows(
    path: str,
    layout: Layout,
    bad: BadRows,
    underlying: str,
    time: int,
    instrument: np.ndarray,
    whose: list,
    expiry: np.ndarray,
    numbers: dict[str, np.ndarray],
) -> np.ndarray:
    """(R,) bool: the rows of which nothing is wrong; the others are told to ``bad``."""
    wrong: list[tuple[str, np.ndarray, str, Callable[[int], object]]] = []

    def check(word: str, mask: np.ndarray, reason: str, value: Callable[[int], object] | None = None) -> None:
        wrong.append((layout.columns.get(word, word), mask, reason, value or (lambda row: float(numbers[word][row]))))

    named = [named_call(str(name)) for name in instrument]
    says = np.array([(one[1], microseconds(one[2])) if one else (0, 0) for one in named]).reshape(-1, 2)
    expires, name = (lambda row: str(time_of(int(expiry[row])))), (lambda row: instrument[row])
    is_named = says[:, 1] > 0
    check("instrument", ~is_named, "is no name of a call such as BTC-26DEC25-98000-C", name)
    twice = np.concatenate([[False], instrument[1:] == instrument[:-1]]) if len(instrument) else is_named
    check("instrument", twice, "stands twice in the snapshot", name)
    other = np.array([one != underlying for one in whose], bool)
    check("underlying", other, f"is not {underlying}, as the instrument has it", lambda row: whose[row])
    check("strike", ~(numbers["strike"] > 0), "is no strike above 0")
    check("strike", is_named & (says[:, 0] != numbers["strike"]), "is not the instrument's own")
    check("expiry", expiry <= time, f"is past at {time_of(time)}", expires)
    check("expiry", is_named & (abs(says[:, 1] - expiry) > DAY), "is not the instrument's own", expires)
    check("forward", ~(numbers["forward"] > 0), "is no forward price above 0")
    check("iv", ~(numbers["iv"] > 0), "is no vol above 0")
    check("iv", numbers["iv"] > MAX_IV, f"is above {MAX_IV:g} as a fraction a year: are these points?")
    for word in ("mark", "bid", "ask", "open_interest"):
        check(word, numbers[word] < 0, "is below 0")
    for word, values in numbers.items():
        check(word, np.isinf(values), "is not finite", lambda row, values=values: float(values[row]))
    check("bid", (numbers["bid"] > numbers["ask"]) & (numbers["ask"] > 0), "is above the ask: crossed")
    good = np.ones(len(instrument), bool)
    for column, mask, reason, value in wrong:
        for row in np.flatnonzero(mask & good).tolist():
            bad.found(path, instrument[row], column, value(row), reason)
            good[row] = False
    return good


def spot_of(numbers: dict[str, np.ndarray], expiry: np.ndarray) -> tuple[float, str]:
    """USD, and what it is. Rows are fetched one after another, so that each has its own index: the median of them."""
    index = numbers.get("index", np.array([]))
    index = index[index > 0]
    if len(index):
        return float(np.median(index)), "the index"
    if not len(expiry):
        return np.nan, "unknown"
    return float(np.median(numbers["forward"][expiry == expiry.min()])), "the forward of the nearest expiry"


def black_76_delta(forward: np.ndarray, strike: np.ndarray, years: np.ndarray, iv: np.ndarray) -> np.ndarray:
    """N(d1) of Black (1976) at interest rate 0; iv as a fraction a year."""
    deviation = iv * np.sqrt(years)
    return ndtr(np.log(forward / strike) / deviation + deviation / 2)


def black_76_price(forward: np.ndarray, strike: np.ndarray, years: np.ndarray, iv: np.ndarray) -> np.ndarray:
    """Value of a call as a share of the forward: what one that is settled in coin is quoted in."""
    deviation = iv * np.sqrt(years)
    d1 = np.log(forward / strike) / deviation + deviation / 2
    return ndtr(d1) - strike / forward * ndtr(d1 - deviation)
