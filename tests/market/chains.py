"""Option chains as tests want them: snapshots of a few calls, written as Parquet in one of the two layouts."""

import datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from covered_call.candidates.schema import UTC, named_call

START = datetime.datetime(2026, 1, 1, 8, tzinfo=UTC)


class Snap(NamedTuple):
    """``quotes`` are bid, ask and mark by instrument, in shares of spot (of BTC_USDC in dollars), None for none."""

    time: datetime.datetime
    spot: float
    quotes: dict[str, tuple[float | None, float | None, float | None]]
    iv: float = 0.6


def snap(days: float, spot: float, quotes: dict, **more) -> Snap:
    """A snapshot so many days after START, at 08:00 UTC of 2026-01-01."""
    return Snap(START + datetime.timedelta(days=days), spot, quotes, **more)


def history_row(one: Snap, name: str, bid, ask, mark) -> dict:
    _, strike, expiry = named_call(name)
    return {
        "timestamp": one.time, "instrument_name": name, "option_type": "call", "strike": strike,
        "expiry_datetime": expiry, "futures_price": one.spot, "mark_price": mark, "bid_price": bid, "ask_price": ask,
        "implied_volatility": one.iv, "open_interest": 12.5, "index_price": one.spot,
    }  # fmt: skip


def harvest_row(one: Snap, name: str, bid, ask, mark) -> dict:
    _, strike, expiry = named_call(name)
    return {
        "harvest_time": one.time, "instrument_name": name, "underlying": name.partition("-")[0], "option_type": "C",
        "strike": strike, "expiry_timestamp": expiry, "underlying_price": one.spot, "mark_price": mark,
        "best_bid_price": bid, "best_ask_price": ask, "mark_iv": 100 * one.iv, "open_interest": 12.5,
        "index_price": one.spot,
    }  # fmt: skip


def write_history(path: Path, snaps: list[Snap]) -> str:
    """One file of all snapshots."""
    rows = [history_row(one, name, *prices) for one in snaps for name, prices in one.quotes.items()]
    return write(path, rows)


def write_harvest(folder: Path, snaps: list[Snap]) -> str:
    """A folder with a file for each snapshot."""
    folder.mkdir()
    for one in snaps:
        rows = [harvest_row(one, name, *prices) for name, prices in one.quotes.items()]
        write(folder / f"BTC_{one.time:%Y-%m-%d_%H%M}.parquet", rows)
    return str(folder)


def write(path: Path, rows: list[dict]) -> str:
    types = {name: pa.float64() for name in rows[0] if name.endswith(("bid_price", "ask_price", "mark_price"))}
    columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), path)
    return str(path)
