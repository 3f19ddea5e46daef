"""The verb harvest: option chains from Deribit at regular times, and the history of spot and implied vol."""

import argparse
import datetime
import logging
import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from covered_call import atomic
from covered_call.candidates.data_options import Help, flags
from covered_call.candidates.schema import UTC
from covered_call.command_line import plain_errors, start_logging
from covered_call.market.deribit import CURRENCY, PATIENCE, TESTNET, Deribit, DeribitError, Outage
from covered_call.market.harvest_log import SECOND, HarvestError, HarvestLog, iso
from covered_call.market.history import extend

EVERY, DAYS = 900, 400
NAP = 0.2  # seconds after which a signal is heeded while nothing is due


class Stop:
    """Whether the user has asked to end, by Ctrl-C or SIGTERM; a second time ends at once."""

    def __init__(self):
        self.asked = False

    def ask(self, number: int, frame) -> None:
        self.asked = True
        signal.signal(number, signal.default_int_handler)
        os.write(2, b"Ending after the cycle in hand.\n")  # for print may be at work already

    def sleep_until(self, due: int) -> None:
        while not self.asked and (left := (due - microseconds_now()) / SECOND) > 0:
            time.sleep(min(NAP, left))


@contextmanager
def stoppable() -> Generator[Stop]:
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def microseconds_now() -> int:
    return time.time_ns() // 1000


# ---------------------------------------------------------------------------------------------------------------------
# Chains


def collect(exchange: Deribit, args: argparse.Namespace) -> None:
    """One chain a currency and cycle, for --cycles or until a signal: cycle k is due at the start + k * --every."""
    folder, every = Path(args.to), round(args.every * SECOND)
    with atomic.locked(folder), stoppable() as stop:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.parquet.*.tmp"):  # of a writer that was killed: this one has the lock
            atomic.remove(left)
        log = HarvestLog(folder)
        for currency in args.currency:
            log.add_unlogged(currency)
        due = log.resume(args.currency, every, microseconds_now())
        if due > microseconds_now():
            print(f"{folder} goes on: the next cycle is due at {iso(due)[:19]}.", flush=True)
        done = 0
        while args.cycles is None or done < args.cycles:
            stop.sleep_until(due)
            if stop.asked:
                break
            done_of = [
                harvest(exchange, log, currency, due, args.every, args.on_bad_rows) for currency in args.currency
            ]
            print(f"{iso(due)[:19]}  {', '.join(said for _, said in done_of)}", flush=True)
            done += 1
            due = after(due, every, log, args.currency)


def harvest(
    exchange: Deribit, log: HarvestLog, currency: str, due: int, every: float, on_bad_rows: str
) -> tuple[Path | None, str]:
    """Collects one chain, or logs a gap; its file, None of a gap, and what to say of it.

    Args:
        every: seconds from one chain to the next.

    Raises:
        DeribitError: for an answer that cannot be used, which the next would not mend; a gap is logged first.
    """
    try:
        chain = exchange.book_summary(currency, on_bad_rows)
    except DeribitError as error:
        log.add_gap(currency, due, 0, 1, str(error))
        if not isinstance(error, Outage):
            raise
        return None, f"{currency} GAP: {error}"
    harvest_time, skipped = chain["harvest_time"][0].value, int(chain.schema.metadata[b"skipped_rows"])
    path = path_of(log.folder, currency, harvest_time, every)
    if path.exists():
        why = f"{path.name} is there already"
        log.add_gap(currency, due, 0, 1, why)
        return None, f"{currency} GAP: {why}"
    with atomic.replacing(path) as file:
        pq.write_table(chain, file)
    log.add(currency, due, file=path.name, harvest_time=iso(harvest_time), rows=len(chain), skipped=skipped)
    return path, f"{currency} {len(chain)} rows" + (f" ({skipped} left out)" if skipped else "")


def path_of(folder: Path, currency: str, harvest_time: int, every: float) -> Path:
    """BTC_2025-12-10_0105.parquet; with seconds if chains are nearer to each other than a minute, or two of them came
    within one because the exchange was slow."""
    moment = datetime.datetime.fromtimestamp(harvest_time // SECOND, UTC)
    path = folder / f"{currency}_{moment:%Y-%m-%d_%H%M}.parquet"
    if every < 60 or path.exists():
        path = folder / f"{currency}_{moment:%Y-%m-%d_%H%M%S}.parquet"
    return path


def after(due: int, every: int, log: HarvestLog, currencies: list[str]) -> int:
    """When the next cycle is due; those that were overslept are gaps, but the last, which is late."""
    overslept = max((microseconds_now() - due) // every - 1, 0)
    for currency in currencies if overslept else ():
        log.add_gap(currency, due + every, every, overslept, "the cycle before, or the machine's sleep, took too long")
    return due + (overslept + 1) * every


# ---------------------------------------------------------------------------------------------------------------------
# History


def write_history(exchange: Deribit, args: argparse.Namespace) -> None:
    """Extends the files of each currency by the days that have ended since."""
    folder = Path(args.to)
    with atomic.locked(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for currency in args.currency:
            tables: dict[str, pa.Table] = {
                f"spot_{currency}_0800utc.csv": exchange.daily_closes(currency, args.days),
                f"dvol_{currency}_daily.csv": exchange.vol_index(currency, args.days),
            }
            for name, table in tables.items():
                if not len(table):
                    print(f"{folder / name}: Deribit has no days of it.")
                    continue
                added = extend(folder / name, table)
                print(f"{folder / name}: {added} days added, to {table['date'][-1]}.")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call harvest",
        description="Collects option chains from Deribit, one file a currency and time, or the history of spot and\n"
        "implied vol. Public data: it needs no account. It needs ccxt:\n"
        "pip install 'covered-call-candidates[live]'",
        epilog="examples:\n"
        "  covered-call harvest BTC ETH --every 900 --to chains/             until Ctrl-C; again, and it goes on\n"
        "  covered-call harvest BTC --cycles 1 --to chains/                  one chain, from cron\n"
        "  covered-call harvest BTC ETH --history --days 400 --to history/   spot_BTC_0800utc.csv, dvol_BTC_daily.csv",
        allow_abbrev=False,
        formatter_class=Help,
    )
    add = parser.add_argument
    add("currency", nargs="+", metavar="CURRENCY", help="BTC, ETH: options settled in the coin; BTC_USDC: in USDC; "
        "USDC: all that are settled so, in one file")  # fmt: skip
    add("--to", required=True, metavar="DIR", help="the folder of the files; of chains, its harvest.jsonl says what "
        "was collected and what was missed")  # fmt: skip
    add("--every", type=float, default=EVERY, metavar="SECONDS",
        help=f"from one chain to the next, 1 or more; default: {EVERY}")  # fmt: skip
    add("--cycles", type=int, metavar="N", help="how many, now; default: until Ctrl-C or SIGTERM")
    add(*flags("on_bad_rows"), choices=("error", "skip"), default="error", help="an option whose name or numbers are "
        "none ends the command, or is left out and counted; default: error")  # fmt: skip
    add("--history", action="store_true", help="daily spot at 08:00 UTC and daily DVOL, instead of chains")
    add("--days", type=int, metavar="N", help=f"of the history, up to the last that has ended; default: {DAYS}")
    add("--url", help=f"where the API is, if not at the exchange: {TESTNET}, or a proxy")
    args = parser.parse_args(arguments)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.currency = list(dict.fromkeys(name.upper() for name in args.currency))
    strange = next((name for name in args.currency if not CURRENCY.fullmatch(name)), None)
    if strange is not None:
        parser.error(f"{strange!r} is no currency such as BTC or BTC_USDC.")
    if not 1 <= args.every < 1e9:
        parser.error(f"--every {args.every:g}: give 1 second or more.")
    for name in ("cycles", "days"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give 1 or more.")
    if args.days is not None and not args.history:
        parser.error("--days is of --history.")
    args.days = DAYS if args.days is None else args.days


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    start_logging(logging.INFO)
    with plain_errors(args, DeribitError, HarvestError):
        # Where chains follow closely, no request is tried for so long that the next is late.
        exchange = Deribit(args.url, PATIENCE if args.history else min(PATIENCE, args.every / 2))
        (write_history if args.history else collect)(exchange, args)
