"""What covered calls brought at real quotes, beside the same trades at the market's vol, and at a fixed one.

    python benchmarks/real_quotes.py --chains 'chains/*.parquet' --spots 'vols/spot_{underlying}.csv' \\
        --dvol 'vols/dvol_{underlying}_daily.csv'

A rule is replayed by covered-call backtest's own code. Its trades are then paid in several ways: sold at the bid and
bought back at the ask, both at the middle, both at the mark; and those that are held to expiry at their Black-Scholes
value at the vol of --dvol that was known then, and at 70 % a year. All are settled at the same prices, net of the same
fees. Means are in % of spot at the sale.

The 95 % interval of a mean is the project's own: a moving-block bootstrap over the decision times, whose blocks are as
long as outcomes overlap. Where the data have fewer than five such blocks there is none, and how many there are stands
in its place. What is left to look at are the means of the first, second and last third of the trades.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call import resampling  # noqa: E402
from covered_call.candidates.columns import DAY, microseconds  # noqa: E402
from covered_call.candidates.pricing import (  # noqa: E402
    DAYS_PER_YEAR,
    black_scholes_call,
    delivery_cost,
    trading_cost,
)
from covered_call.candidates.schema import named_call  # noqa: E402
from covered_call.candidates.vols import UNDERLYING, Vols, read_vols  # noqa: E402
from covered_call.market.backtest import Settings, replay  # noqa: E402
from covered_call.market.book import DERIBIT, STYLES  # noqa: E402
from covered_call.market.files import chain_files  # noqa: E402
from covered_call.market.replay import ChainReplay, Log  # noqa: E402
from covered_call.market.snapshot import BadRows  # noqa: E402
from covered_call.tables import markdown  # noqa: E402

HOLD, FIXED_IV = "hold_to_expiry", 0.70
LAG = 24.0  # hours: a day's vol is known at its end
HEAD = ["underlying", "exit style", "decisions", "candidates", "trades", "paid", "bid/ask", "95 %", "by third", "mid",
        "mark", "DVOL", "vol 0.70"]  # fmt: skip


class Paid(NamedTuple):
    """The trades (T,) of a log of which every way is known; money in % of spot."""

    time: np.ndarray  # microseconds since 1970
    end: np.ndarray
    ways: np.ndarray  # (T, 5) bid/ask, mid, mark, DVOL, fixed vol; the last two NaN but for calls that are held


def main() -> None:
    args = parse_arguments()
    settings = Settings(rule=args.rule, spots=args.spots, tolerance=args.tolerance)
    with tempfile.TemporaryDirectory() as folder:
        replays = replay(chain_files(args.chains, "chains"), settings, BadRows(), folder)
        rows = [row(one, log, args.dvol) for one in replays for log in one.logs]
    print(f"Rule {args.rule}: mean of a trade in % of spot, net of fees.\n")
    print(markdown([HEAD, *rows]))
    for one in replays:
        print(f"\n{one.underlying}: {moved(one)}")


def row(replay: ChainReplay, log: Log, dvol: str) -> list[str]:
    paid = paid_of(replay, log, dvol)
    counts = [f"{number:,}" for number in (log.decisions, log.sales, len(log.trades), len(paid.time))]
    cells = [replay.underlying, log.exit_style, *counts]
    if not len(paid.time):
        return [*cells, *[""] * 7]
    means = ["" if np.isnan(mean) else f"{mean:+.2f}" for mean in paid.ways.mean(0)]
    thirds = " ".join(f"{part.mean():+.2f}" for part in np.array_split(paid.ways[:, 0], 3) if len(part))
    return [*cells, means[0], interval_of(paid), thirds, *means[1:]]


def paid_of(replay: ChainReplay, log: Log, dvol: str) -> Paid:
    trades = [trade for trade in log.trades if not np.isnan(trade.pnl).any()]
    time, days, spot = (np.array([getattr(trade, name) for trade in trades]) for name in ("time", "days", "spot"))
    pnl = np.array([trade.pnl[1:] for trade in trades]).reshape(-1, 3)
    vols = Vols(series={0: read_vols(dvol.replace(UNDERLYING, replay.underlying), LAG)})
    ivs = [vols.by_time(np.zeros(len(time), int), time), np.full(len(time), FIXED_IV)]
    priced = [held_at(iv, [trade.instrument for trade in trades], time, spot, replay) for iv in ivs]
    if STYLES[log.exit_style].max_rolls:
        priced = [np.full(len(time), np.nan) for _ in ivs]
    ways = 100 * np.column_stack([pnl, *priced]) / spot[:, None]
    return Paid(time, time + np.rint(days * DAY).astype(np.int64), ways)


def held_at(iv: np.ndarray, names: list[str], time: np.ndarray, spot: np.ndarray, replay: ChainReplay) -> np.ndarray:
    """USD that the same calls bring when they are sold at their value at these vols, and held."""
    named = [named_call(name) for name in names]
    strike = np.array([one[1] for one in named if one])
    expiry = np.array([microseconds(one[2]) for one in named if one])
    settled = np.array([replay.fixings.found[one].price for one in expiry.tolist()])
    premium = black_scholes_call(spot, strike, (expiry - time) / DAY / DAYS_PER_YEAR, iv)
    payoff = np.maximum(settled - strike, 0)
    return premium - trading_cost(premium, spot, DERIBIT) - payoff - delivery_cost(payoff, settled, DERIBIT)


def interval_of(paid: Paid) -> str:
    """Of the mean at bid and ask."""
    block = resampling.block_length(paid.time, paid.end)
    draws = resampling.draw(len(paid.time), block)
    if draws is None:
        return f"none: {len(paid.time) / block:.1f} blocks"
    means = draws.sums(paid.ways[:, :1])[:, 0] / len(paid.time)
    found = resampling.interval(means, means)
    return f"{found[0]:+.2f} to {found[1]:+.2f}" if found else ""


def moved(replay: ChainReplay) -> str:
    """How spot moved from the first expiry that was settled to the last, and the way between."""
    prices = [one.price for _, one in sorted(replay.fixings.found.items()) if not np.isnan(one.price)]
    return (
        f"{prices[0]:,.0f} USD at the first expiry that was settled, {prices[-1]:,.0f} at the last, "
        f"{max(prices):,.0f} and {min(prices):,.0f} at the extremes."
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python benchmarks/real_quotes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", nargs="+", metavar="PARQUET", required=True, help="as covered-call backtest")
    parser.add_argument("--spots", metavar="CSV", required=True, help="prices by day, as covered-call backtest")
    parser.add_argument("--dvol", metavar="CSV", required=True, help="vols by day; {underlying} stands for each name")
    parser.add_argument("--rule", default=Settings().rule, help="as covered-call backtest; default: teacher")
    parser.add_argument(
        "--tolerance", type=float, default=Settings().tolerance, help="hours, as covered-call backtest; default: 6"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
