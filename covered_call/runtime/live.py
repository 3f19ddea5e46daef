"""Chains of this moment: one of each underlying every interval, kept as files, and decided on once.

Cycle k is due at the start + k * interval by the clock of the wall, however long a cycle takes. Chains stand in
chains/ of the log's folder as covered-call harvest writes them, with a harvest.jsonl that has each that was collected
and each that was missed: so an agent that is started again goes on in time, and what it saw can be looked at again.
"""

import argparse
import contextlib
import datetime
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covered_call import atomic
from covered_call.candidates.schema import UTC, CandidatesError
from covered_call.candidates.series import HOUR, Series
from covered_call.market.deribit import PATIENCE, Deribit, DeribitError, Outage
from covered_call.market.harvest import DAYS, NAP, after, harvest, microseconds_now
from covered_call.market.harvest_log import SECOND, HarvestLog, iso
from covered_call.market.snapshot import BadRows, read_snapshots
from covered_call.market.teacher import DAY_BEGINS, Rules
from covered_call.runtime.engine import Agent, Cycle
from covered_call.runtime.replay import states_from
from covered_call.runtime.state import MarketState
from covered_call.runtime.testnet import Halt

logger = logging.getLogger(__name__)

JUMP = 2.0  # seconds by which the clock of the wall and that of the machine may part between two looks
MILLISECOND = datetime.timedelta(milliseconds=1)


def now() -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time.time(), UTC)


def patience_of(interval: float) -> float:
    """Seconds in which a request is tried again, so that the next cycle is not late."""
    return min(PATIENCE, interval / 2)


@dataclass(frozen=True)
class Wanted:
    """What is looked at.

    Args:
        spots: of each underlying its daily closes; those of the exchange's index are put there.
        own_spots: whether the user has given these: then the exchange is not asked for them.
        interval: seconds.
        with_market, vols: of the market's context that decisions get, see states_from.
        max_age: seconds after which a chain that was not decided on, for the agent was killed, is let go.
    """

    underlyings: Sequence[str]
    rules: Rules
    exit_style: str
    on_bad_rows: str
    spots: dict[str, Series]
    own_spots: bool
    interval: float
    max_age: float
    with_market: bool = False
    vols: dict[str, Series] | None = None


class Feed:
    """The chains of a folder, which this process alone may write: see ``opened``."""

    def __init__(self, exchange: Deribit, folder: Path, wanted: Wanted):
        self.exchange, self.folder, self.wanted = exchange, folder, wanted
        self.log = HarvestLog(folder)
        self.asked_on: dict[str, datetime.date] = {}  # by underlying, the last day whose close is known
        for underlying in wanted.underlyings:
            self.log.add_unlogged(underlying)

    def collected(self, underlying: str, due: int) -> MarketState | None:
        """The state of now; None where there is no chain, which is logged and said."""
        try:
            path, said = harvest(
                self.exchange, self.log, underlying, due, self.wanted.interval, self.wanted.on_bad_rows
            )
            state = self.state_of(path, underlying) if path else None
        except Halt:
            raise
        except (DeribitError, CandidatesError) as error:  # of the second the file is there, to be looked at
            state, said = None, f"{underlying} GAP: {error}"
        if state is None:
            print(f"{iso(due)[:19]}  {said}: nothing is decided.", flush=True)
        return state

    def state_of(self, path: Path, underlying: str) -> MarketState | None:
        """What a chain puts to a policy; it was quoted when the exchange says so.

        Raises:
            CandidatesError: for a chain that cannot be decided on.
        """
        bad = BadRows(self.wanted.on_bad_rows)
        snapshots = [one for one in read_snapshots(str(path), bad) if one.underlying == underlying]
        self.learn_spots(underlying)
        wanted = self.wanted
        states = states_from(
            snapshots, wanted.rules, wanted.spots, wanted.exit_style, bad, wanted.with_market, wanted.vols
        )
        state = next(states, None)
        if state is None:
            raise CandidatesError(f"{path}: no spot of {underlying} is known")
        created = (pq.read_schema(path).metadata or {}).get(b"created")
        if not created:
            return state
        return state._replace(snapshot_time=datetime.datetime.fromtimestamp(0, UTC) + float(created) * MILLISECOND)

    def learn_spots(self, underlying: str) -> None:
        """The closes of the days that have ended, as the exchange's index has them; without them IV/RV is unknown."""
        day = (datetime.datetime.fromtimestamp(time.time(), UTC) - datetime.timedelta(hours=8)).date()
        if self.wanted.own_spots or self.asked_on.get(underlying) == day:
            return
        try:
            found = self.exchange.daily_closes(underlying, DAYS, today=True)
        except Halt:
            raise
        except DeribitError as error:
            logger.warning("%s: no new daily closes, so its realised vol may be unknown: %s", underlying, error)
            return
        if len(found):
            self.wanted.spots[underlying] = series_of(found)
            self.asked_on[underlying] = found["date"][-1].as_py()

    def left(self, underlying: str) -> MarketState | None:
        """The state of the last chain, if it is not too old: the agent may have been killed before it decided."""
        files = sorted(self.folder / name for name in self.log.files if name.startswith(f"{underlying}_2"))
        try:
            state = self.state_of(files[-1], underlying) if files else None
        except CandidatesError:
            return None  # which was said when it was collected
        age = time.time() - state.decision.decision_time.timestamp() if state else 0.0
        return state if age <= self.wanted.max_age else None


def series_of(closes: pa.Table) -> Series:
    """Of closes by date, each known from 08:00 UTC on."""
    dates = closes["date"].to_numpy().astype("M8[us]").astype(np.int64) + round(DAY_BEGINS * HOUR)
    return Series(dates, closes["price_0800utc"].to_numpy(), np.zeros(len(dates), np.int64))


@contextlib.contextmanager
def opened(exchange: Deribit, folder: Path, wanted: Wanted) -> Generator[Feed]:
    """Raises HarvestError for a folder that cannot be gone on with."""
    with atomic.locked(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.parquet.*.tmp"):  # of a process that was killed
            atomic.remove(left)
        yield Feed(exchange, folder, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Time


class Clock:
    """Notices that the clock of the wall was put forward or back, or the machine slept."""

    def __init__(self):
        self.apart = time.time() - time.monotonic()

    def jumped(self) -> float:
        """Seconds since the last look, forward above 0; 0 if it did not."""
        apart = time.time() - time.monotonic()
        jump, self.apart = apart - self.apart, apart
        return jump if abs(jump) > JUMP else 0.0


def wait_until(due: int, every: int, clock: Clock, stop: list, meanwhile: Callable[[], None]) -> int:
    """Sleeps; when the cycle was due at last: of the same times, an earlier one if the clock was put back."""
    while not stop:
        jump = clock.jumped()
        if jump:
            way = "forward, or the machine slept" if jump > 0 else "back"
            print(f"{iso(microseconds_now())[:19]}  The clock went {abs(jump):,.0f} s {way}.", flush=True)
        due -= max(0, due - microseconds_now() - 1) // every * every if jump < 0 else 0
        left = (due - microseconds_now()) / SECOND
        if left <= 0:
            break
        meanwhile()
        time.sleep(min(NAP, left))
    return due


# ---------------------------------------------------------------------------------------------------------------------
# Cycles


def cycles(
    feed: Feed, agent: Agent, stop: list, limit: int | None, meanwhile: Callable[[], None] = lambda: None
) -> Iterator[Cycle]:
    """Those of the agent, until ``stop`` is not empty, or so many intervals have come.

    Args:
        meanwhile: called again and again while nothing is due.
    """
    underlyings, every = list(feed.wanted.underlyings), round(feed.wanted.interval * SECOND)
    clock, done = Clock(), 0
    due = feed.log.resume(underlyings, every, microseconds_now())
    for underlying in underlyings:
        state = feed.left(underlying)
        yield from decided(agent, state, known=True) if state else ()
    if due > microseconds_now():
        print(f"Goes on: the next cycle is due at {iso(due)[:19]}.", flush=True)
    while limit is None or done < limit:
        due = wait_until(due, every, clock, stop, meanwhile)
        if stop:
            break
        for underlying in underlyings:
            state = feed.collected(underlying, due)
            yield from decided(agent, state) if state else ()
        done += 1
        due = after(due, every, feed.log, underlyings)


def decided(agent: Agent, state: MarketState, known: bool = False) -> Iterator[Cycle]:
    """The cycle of a state, or none, which is said: of one that is decided, of a time before what is known, and where
    the exchange does not say what is held. known: that it may be decided is expected."""
    name, at = state.decision.decision_id, f"{state.decision.decision_time:%Y-%m-%dT%H:%M:%S}"
    if agent.journal and name in agent.journal.decided:
        if not known:
            print(f"{at}  {name} was decided before: nothing is decided.", flush=True)
        return
    if agent.venue and state.decision.decision_time < agent.portfolio.time:
        until = agent.portfolio.time
        print(f"{at}  The clock is behind {until:%Y-%m-%dT%H:%M:%S}, up to when the portfolio is known: nothing is "
            "decided.", flush=True)  # fmt: skip
        return
    try:
        cycle = agent.cycle(state)
    except Outage as error:  # before anything was written: after it, it is a Halt
        print(f"{at}  {state.decision.underlying}: {error}: nothing is decided.", flush=True)
        return
    yield cycle


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--live", action="store_true", help="Deribit's chains of now, of each underlying that is "
        "held; until Ctrl-C or SIGTERM, which end it after the cycle")  # fmt: skip
    parser.add_argument(
        "--cycles", type=int, metavar="N", help="of --live: how many intervals; default: until stopped"
    )
    parser.add_argument("--url", metavar="URL", help="of --live in shadow and paper: another address of the API")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """That where chains come from is said, once, and is what the mode takes."""
    given = [name for name in ("snapshot", "live") if getattr(args, name)]
    taken = {"replay": [], "shadow": ["snapshot", "live"], "paper": ["snapshot", "live"], "testnet": ["live"]}[
        args.mode
    ]
    strange = [name for name in given if name not in taken]
    if strange or len(given) != min(1, len(taken)):
        words = {"snapshot": "--snapshot PARQUET", "live": "--live"}
        wanted = f"give {' or '.join(words[name] for name in taken)}" if not strange else f"give no --{strange[0]}"
        parser.error(f"{args.mode}: {wanted}.")
    if not args.live and (args.cycles is not None or args.url):
        parser.error("--cycles and --url are of --live.")
    if args.mode == "testnet" and args.url:
        parser.error("testnet: orders are sent to test.deribit.com alone, so there is no --url.")
    if args.cycles is not None and args.cycles < 1:
        parser.error(f"--cycles {args.cycles}: give 1 or more.")
