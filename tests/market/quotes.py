"""Option chains that tests make, in the layouts of real files."""

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from covered_call.candidates.schema import expiry_of
from covered_call.market.snapshot import YEAR, black_76_price

NOW = datetime.datetime(2025, 12, 10, 1, 5, 13, 418603, datetime.UTC)


def quote(
    name: str = "BTC-19DEC25-97000-C",
    iv: float = 45.0,
    forward: float = 93_000.0,
    time: datetime.datetime = NOW,
    **cells,
) -> dict:
    """A row of the layout harvest, with a mark at its vol, and a bid and an ask around it."""
    underlying, day, strike, kind = name.split("-")
    expiry, number = expiry_of(day), float(strike)
    assert expiry is not None
    years = abs((expiry - time).total_seconds()) * 1e6 / YEAR
    mark = float(black_76_price(forward, number, years, iv / 100))
    row = {
        "harvest_time": time, "instrument_name": name, "underlying": underlying, "expiry": f"{expiry:%Y-%m-%d}",
        "expiry_timestamp": expiry.timestamp(), "option_type": kind, "strike": number, "underlying_price": forward,
        "mark_price": round(mark, 6), "best_bid_price": round(mark * 0.97, 4), "best_ask_price": round(mark * 1.03, 4),
        "mark_iv": iv, "open_interest": 100.0, "volume": 1.0,
    }  # fmt: skip
    return row | cells


def chain(**cells) -> list[dict]:
    """Six calls and a put, of which the backtest's rules take three."""
    names = [f"BTC-19DEC25-{strike}-C" for strike in (90_000, 96_000, 97_000, 98_000, 110_000)]
    return [quote(name, **cells) for name in [*names, "BTC-27MAR26-120000-C", "BTC-19DEC25-90000-P"]]


def write_days(folder: Path, count: int = 16) -> None:
    """A snapshot a day at 08:05 from the day of NOW on, of the calls that are alive, while the price wanders."""
    for day in range(count):
        time = NOW.replace(hour=8, minute=5) + datetime.timedelta(days=day)
        forward = 93_000.0 + 1_500 * (day % 4)
        names = [f"BTC-{expiry}-{strike}-C" for expiry in ("19DEC25", "26DEC25", "2JAN26") for strike in STRIKES]
        rows = [quote(name, forward=forward, time=time) for name in names if expiry_of(name.split("-")[1]) > time]
        write_harvest(folder / f"BTC_{time:%Y-%m-%d_%H%M}.parquet", rows)


STRIKES = range(90_000, 110_000, 1_000)


def write_harvest(path: Path, rows: list[dict]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def as_history(rows: list[dict], time: datetime.datetime = NOW, index: float | None = 92_500.0) -> list[dict]:
    """The same quotes in the layout history."""
    return [
        {
            "timestamp": time, "instrument_name": row["instrument_name"],
            "option_type": {"C": "call", "P": "put"}[row["option_type"]], "strike": row["strike"],
            "expiry_datetime": datetime.datetime.fromtimestamp(row["expiry_timestamp"], datetime.UTC),
            "bid_price": row["best_bid_price"], "ask_price": row["best_ask_price"], "mark_price": row["mark_price"],
            "futures_price": row["underlying_price"], "index_price": index,
            "implied_volatility": row["mark_iv"] / 100, "open_interest": row["open_interest"], "volume": row["volume"],
        }
        for row in rows
    ]  # fmt: skip
