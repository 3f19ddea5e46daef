"""ChainReplay a rule over collected option chains, paid at their real quotes, and log it as this project's CSV.

    covered-call backtest --chains chains/ --rule teacher --to runs/          # chains that harvest has collected
    covered-call backtest --chains 'chains/*.parquet' --rule delta:0.25 --spots 'spots_{underlying}.csv'
    covered-call backtest --chains chains/ --rule highest_premium --preset production --exit_style hold_to_expiry

Each decision's candidates are sold at their bid, bought back at the ask, and settled at the index nearest to expiry,
net of Deribit's fees: 0.0003 of the underlying a trade, 0.00015 when settled in the money, each at most 12.5 % of the
option's price. All candidates get an outcome, sold or not, in USD a coin; what cannot be known is blank.

    hold_to_expiry   sold, and settled at expiry
    tp_and_roll      bought back when 80 % of the premium is earned at the ask, or when spot is 98 % of the strike or
                     more, while more than 2 days are left, and rolled into the best score of then, at most 3 times

A rule cannot sell what has no bid: then it sells its next choice, or nothing. One file an underlying and exit style is
written, once all chains are read; they are read one snapshot after another, whatever their size.
"""

import argparse
import datetime
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets.utils import tqdm

from covered_call import atomic
from covered_call.candidates.columns import time_of
from covered_call.candidates.data_options import Help, flags
from covered_call.candidates.schema import CandidatesError, shown
from covered_call.candidates.series import HOUR
from covered_call.command_line import plain_errors, start_logging
from covered_call.market.book import SOLD_AT, STYLES, WAYS, Conditions
from covered_call.market.candidate_csv import file_name
from covered_call.market.files import by_first_time, chain_files
from covered_call.market.replay import ChainReplay, Log, rule_of
from covered_call.market.snapshot import BadRows, read_snapshots
from covered_call.market.teacher import PRESETS, read_spots, rules_of
from covered_call.tables import align

ALL = "all"  # snapshots decide
QUOTED_PRESETS = [name for name in PRESETS if name != "synthetic"]  # whose calls no exchange quotes


class Settings(NamedTuple):
    """What is replayed, and how."""

    rule: str = "teacher"
    preset: str = "backtest"
    exit_styles: tuple[str, ...] = tuple(STYLES)
    at: str = "08:00"
    tolerance: float = 6.0  # hours
    sell_at: str = "bid"
    spots: str | None = None
    on_bad_rows: str = "error"


def main(arguments: list[str]) -> None:
    start_logging()
    args = parse_arguments(arguments)
    with plain_errors(args, CandidatesError):
        settings = Settings(**{name: value for name, value in vars(args).items() if name in Settings._fields})
        os.makedirs(args.to, exist_ok=True)
        bad = BadRows(settings.on_bad_rows)
        replays = replay(chain_files(args.chains, "chains"), settings, bad, args.to)
        for path in write_logs(replays, args.to):
            print(f"Wrote {path}")
        print(f"\n{summary(replays, settings, bad)}")


# ---------------------------------------------------------------------------------------------------------------------
# Replaying


def replay(paths: list[str], settings: Settings, bad: BadRows, folder: str) -> list[ChainReplay]:
    """A replay for each underlying of the files, of which no more than a snapshot and what is open are in memory.

    Raises:
        CandidatesError: for files or settings that cannot be used.
    """
    rule_of(settings.rule)
    at, rules, replays = time_of_day(settings.at), rules_of(settings.preset), {}
    bar = tqdm(by_first_time(paths), desc="chains", unit=" files", disable=None)
    for path in bar:
        for snapshot in read_snapshots(path, bad):
            name = snapshot.underlying
            if name not in replays:
                spots = read_spots(settings.spots, name, *replays) if settings.spots else None
                terms = Conditions(rules, settings.sell_at, round(settings.tolerance * HOUR), spots)
                replays[name] = ChainReplay(name, settings.rule, terms, at, settings.exit_styles, bad, folder)
            replays[name].take(snapshot)
            bar.set_postfix_str(f"{name} {time_of(snapshot.time):%Y-%m-%d %H:%M}", refresh=False)
            bar.update(0)
    for one in replays.values():
        one.finish()
    return list(replays.values())


def time_of_day(text: str) -> int | None:
    """Microseconds after midnight; None for all times."""
    if text == ALL:
        return None
    if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", text):
        raise CandidatesError(f"at={shown(text)}: give a time of day, UTC, such as 08:00, or {ALL}.")
    return int(text[:2]) * HOUR + int(text[3:]) * HOUR // 60


# ---------------------------------------------------------------------------------------------------------------------
# What is written and said


def write_logs(replays: list[ChainReplay], folder: str) -> list[Path]:
    """A CSV for each underlying and exit style with a decision, named as the teacher's are."""
    stamp, paths = f"{datetime.datetime.now(datetime.UTC):%Y%m%d_%H%M%S}", []
    for replay in replays:
        if replay.first is None or replay.last is None:
            continue
        ends = time_of(replay.first), time_of(replay.last)
        for log in replay.logs:
            path = Path(folder) / file_name(replay.underlying, log.exit_style, *ends, stamp)
            log.file.seek(0)
            with atomic.replacing(path) as file:
                shutil.copyfileobj(log.file.buffer, file)
            paths.append(path)
    return paths


HEAD = [
    "underlying", "exit style", "decisions", "without candidates", "candidates", "of them unknown", "trades",
    "of them unknown",
]  # fmt: skip


def summary(replays: list[ChainReplay], settings: Settings, bad: BadRows) -> str:
    logs = [(replay, log) for replay in replays for log in replay.logs]
    counts = [HEAD, *(count_cells(replay.underlying, log) for replay, log in logs)]
    money = [money_head(settings.sell_at), *(money_cells(replay.underlying, log) for replay, log in logs)]
    said = [line for replay in replays for line in notes(replay, settings)]
    if bad.count:
        said.append(f"{bad.count:,} bad row(s) left out.")
    return "\n".join(
        [align(counts, range(2, len(HEAD))), "", "Mean of a trade, net of fees; the same trades in all columns:",
         align(money, range(2, len(money[0]))), "", *said]
    )  # fmt: skip


def count_cells(underlying: str, log: Log) -> list[str]:
    lost = sum(np.isnan(trade.pnl[0]) for trade in log.trades)
    numbers = [log.decisions, log.empty, log.sales, sum(log.why.values()), len(log.trades), lost]
    return [underlying, log.exit_style, *(f"{number:,}" for number in numbers)]


def money_head(sell_at: str) -> list[str]:
    ways = ["bid/ask", "mid", "mark"]
    as_done = [] if sell_at == "bid" else [f"{sell_at}/ask"]
    return [
        "underlying",
        "exit style",
        "trades",
        *(f"{unit} at {way}" for way in as_done + ways for unit in ("USD", "%")),
    ]


def money_cells(underlying: str, log: Log) -> list[str]:
    """Of the trades that are known at all prices."""
    paid = np.array([trade.pnl for trade in log.trades]).reshape(-1, 1 + len(WAYS))
    spot = np.array([trade.spot for trade in log.trades])
    known = ~np.isnan(paid).any(1)
    first = 1 if log.book.terms.sell_at == "bid" else 0
    cells = [underlying, log.exit_style, f"{known.sum():,}"]
    for way in range(first, paid.shape[1]):
        usd = paid[known, way]
        cells += [f"{usd.mean():+,.2f}", f"{100 * (usd / spot[known]).mean():+.3f}"] if known.any() else ["", ""]
    return cells


def notes(replay: ChainReplay, settings: Settings) -> list[str]:
    name, hours, said = replay.underlying, settings.tolerance, []
    if replay.first is None:
        said.append("no decision, so no file is written.")
    if replay.missed:
        said.append(
            f"{replay.missed} decision time(s) without a snapshot within {hours:g} h: no row is written of them."
        )
    if replay.spotless:
        said.append(f"{replay.spotless} snapshot(s) without a spot left out.")
    if replay.next_best or replay.unsold:
        said.append(
            f"no {settings.sell_at} for the rule's first choice at {replay.next_best + replay.unsold} decision(s): "
            f"its next was sold at {replay.next_best}, nothing at {replay.unsold}."
        )
    for log in replay.logs:
        why = ", ".join(f"{count:,} {reason}" for reason, count in log.why.most_common())
        said += [f"{log.exit_style}: outcomes unknown: {why}."] if why else []
    said += [
        f"spot is {what} at {count:,} snapshot(s)." for what, count in replay.spot_is.items() if what != "the index"
    ]
    return [f"{name}: {line}" for line in [*said, *settlement(replay)]]


def settlement(replay: ChainReplay) -> list[str]:
    """How far the prices that were settled at are from those at expiry."""
    found = replay.fixings.found.items()
    off = np.array([abs(one.index_time - expiry) / HOUR for expiry, one in found if not np.isnan(one.index)])
    if not len(off):
        return []
    said = [
        f"the index nearest to expiry is {np.median(off):.2f} h from it (median of {len(off)} expiries; most "
        f"{off.max():.2f} h)."
    ]
    if replay.terms.spots is not None:
        wrong = np.array([abs(one.index - one.price) for _, one in found])
        wrong = wrong[~np.isnan(wrong)]
        away = f"{np.median(wrong):,.2f} USD away (median; most {wrong.max():,.2f} USD)" if len(wrong) else ""
        said.append(
            f"settled at the prices of --spots, from which that index is {away}."
            if away
            else "--spots has no price near any expiry that was settled."
        )
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("covered-call backtest", description=__doc__, formatter_class=Help)
    default = Settings()
    parser.add_argument(
        "--chains", nargs="+", metavar="PARQUET", required=True, help="folders, files, or quoted globs of snapshots"
    )
    parser.add_argument("--to", metavar="DIR", default="runs", help="where the CSVs are written; default: runs")
    parser.add_argument(
        "--rule",
        default=default.rule,
        help="what is sold: teacher (the best score from 3 on), delta:X (the delta nearest to X), highest_premium, "
        "lowest_delta or never; default: teacher",
    )
    parser.add_argument(
        "--preset",
        default=default.preset,
        choices=QUOTED_PRESETS,
        help="whose candidates and scores; default: backtest",
    )
    parser.add_argument(
        *flags("exit_style"),
        dest="exit_styles",
        nargs="+",
        choices=STYLES,
        default=default.exit_styles,
        help="what becomes of a call that is sold; default: both",
    )
    parser.add_argument(
        "--at",
        metavar="TIME",
        default=default.at,
        help="of the day, UTC, at whose nearest snapshot a decision is made; or all: at each snapshot; default: 08:00",
    )
    parser.add_argument(
        "--tolerance",
        metavar="HOURS",
        type=hours,
        default=default.tolerance,
        help="from a decision time or an expiry to the price that stands for it, at most; default: 6",
    )
    parser.add_argument(
        *flags("sell_at"), choices=SOLD_AT, default=default.sell_at, help="the price of a sale; default: bid"
    )
    parser.add_argument(
        "--spots",
        metavar="CSV",
        help="times and prices, to settle at and for realised vols; a date alone is 08:00 UTC; {underlying} stands "
        "for each name; default: the snapshots' index, and no realised vol",
    )
    parser.add_argument(
        *flags("on_bad_rows"), choices=("error", "skip"), default=default.on_bad_rows,
        help="rows that no exchange could mean are an error, or left out and counted; default: error",
    )  # fmt: skip
    return parser.parse_args(arguments)


def hours(text: str) -> float:
    """A decision time is no farther than half a day from each snapshot of its day."""
    number = float(text.removesuffix("h"))
    if not 0 <= number < 12:
        raise argparse.ArgumentTypeError(f"{text}: give hours from 0 to below 12")
    return number
