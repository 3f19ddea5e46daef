"""The verb agent settle: what each candidate of a log would have brought, as far as that is known by now.

    covered-call agent settle out/agent/shadow --snapshot 'chains/*.parquet'     # the chains of then, and later ones
    covered-call agent settle out/agent/shadow --spots 'spot_{underlying}.csv'   # calls that are held to expiry
    covered-call agent settle out/agent/shadow                                   # the same, by the log's own spots
    covered-call agent settle out/agent/replay --data_files 'runs/*.csv'         # of a replay, by its backtest

A line a candidate, sold or not, is added to outcomes.jsonl beside the log, which itself is not touched; run again, it
adds what has become known since. What selling one coin's worth brought, against holding the coin, is settled by the
code of covered-call backtest: sold at the bid that was logged, bought back at the ask where the exit style says so,
settled at the spot nearest to expiry, net of Deribit's fees. Of a replay it is what the replay itself took for it.
"""

import argparse
import collections
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from covered_call.atomic import FolderBusy
from covered_call.candidates.builder import Backtest, find_csvs
from covered_call.candidates.columns import DAY, microseconds, time_of
from covered_call.candidates.data_options import Help, flags
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import HOLD_TO_EXPIRY, net_outcomes
from covered_call.candidates.schema import CandidatesError, LoggedDecision
from covered_call.candidates.series import HOUR, Series
from covered_call.candidates.source import HOME
from covered_call.command_line import plain_errors, start_logging
from covered_call.market.backtest import Settings, hours
from covered_call.market.book import KNOWN, NO_PRICE, STYLES, Book, Conditions, Fixings, Quotes, Results
from covered_call.market.files import by_first_time, chain_files
from covered_call.market.snapshot import BadRows, QuotedCalls, Snapshot, read_snapshots
from covered_call.market.teacher import PRESETS, read_spots
from covered_call.runtime.journal import JournalError
from covered_call.runtime.logged import Entry, Log, read_log
from covered_call.runtime.outcomes_log import FILE_NAME, Outcomes, Settled, add_outcomes, read_outcomes
from covered_call.runtime.paper import expiry_of
from covered_call.runtime.replay import logged_in

SELL_AT = "bid"
NO_BID = NO_PRICE.format(sell_at=SELL_AT)


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    start_logging()
    with plain_errors(args, CandidatesError, JournalError, FolderBusy):
        run(args)


def run(args: argparse.Namespace) -> None:
    log, known = read_log(args.log), read_outcomes(args.log)
    check_means(log, args)
    why: collections.Counter[str] = collections.Counter()
    new = list(by_files(log, known, args, why) if args.data_files else by_quotes(log, known, args, why))
    added = add_outcomes(args.log, new)
    total = sum(len(one.decision.candidates) for one in log.entries)
    print(f"{len(known) + added:,} of {total:,} candidates are settled, {added:,} of them now: {args.log}/{FILE_NAME}")
    lost = sum(one.pnl_vs_hodl is None for one in [*known.values(), *new])
    if lost:
        print(f"  {lost:,} of them can never be known: {NO_BID}.")
    for reason, count in why.most_common():
        print(f"  {count:,} are not: {reason}.")


def check_means(log: Log, args: argparse.Namespace) -> None:
    """That what is given can settle what is logged."""
    if args.data_files:
        return
    if log.mode == "replay":
        raise JournalError(f"{log.folder} is of a replay, which has no quotes: give the backtest's --data_files.")
    styles = {one.decision.exit_style for one in log.entries}
    if not args.snapshot and styles != {HOLD_TO_EXPIRY}:
        found = ", ".join(sorted(styles))
        raise JournalError(
            f"{log.folder} is of {found}, whose calls may be bought back before their expiry: give --snapshot with "
            "the chains of until then."
        )


# ---------------------------------------------------------------------------------------------------------------------
# By quotes: the book of covered-call backtest


class Sale(NamedTuple):
    """A candidate that was sold to see what it brings."""

    entry: Entry
    place: int


class Books:
    """The candidates of a log's decisions under one underlying, exit style and preset, followed through quotes."""

    def __init__(
        self, entries: list[Entry], known: Outcomes, spots: Series | None, how: str, args: argparse.Namespace
    ):
        one = entries[0]
        rules = PRESETS[one.config.get("preset", Settings().preset)]
        self.terms = Conditions(rules, SELL_AT, round(args.tolerance * HOUR), spots)
        self.fixings = Fixings(self.terms)
        self.book = Book(STYLES[one.decision.exit_style], self.terms, self.fixings)
        self.bad, self.known, self.how = BadRows(args.on_bad_rows), known, how
        self.waiting = collections.deque(entries)
        self.sales: list[Sale] = []
        self.last: int | None = None

    def sell_until(self, time: int) -> Iterator[Settled | str]:
        """Sells the candidates of the decisions of before a time."""
        while self.waiting and microseconds(self.waiting[0].decision.decision_time) < time:
            entry = self.waiting.popleft()
            quotes = Quotes(snapshot_of(entry), self.terms, self.bad)
            self.fixings.see(quotes.time, quotes.spot)
            self.last = max(self.last or quotes.time, quotes.time)
            rows = [row for row, one in enumerate(entry.decision.candidates)
                if (entry.decision.decision_id, one.instrument) not in self.known]  # fmt: skip
            numbers = np.arange(len(self.sales), len(self.sales) + len(rows))
            self.sales += [Sale(entry, row) for row in rows]
            yield from self.settled(self.book.sell(quotes, np.array(rows, np.int64), numbers))

    def follow(self, snapshot: Snapshot) -> Iterator[Settled | str]:
        """What has ended until a snapshot, of which decisions of before it are sold first."""
        if self.last is not None and snapshot.time < self.last:
            raise CandidatesError(f"{snapshot.source}: its snapshot of {snapshot.underlying} at "
                f"{time_of(snapshot.time)} is before another that was read. Files of one underlying must not overlap: "
                "leave one of them out.")  # fmt: skip
        yield from self.sell_until(snapshot.time)
        if not self.sales:
            return  # of before the log
        self.last = snapshot.time
        quotes = Quotes(snapshot, self.terms, self.bad)
        self.fixings.see(quotes.time, quotes.spot)
        for results in self.book.follow(quotes):
            yield from self.settled(results)

    def end(self) -> Iterator[Settled | str]:
        """What the last of all prices settles; what expires after it, or could have been bought back since, waits."""
        yield from self.sell_until(np.iinfo(np.int64).max)
        assert self.last is not None  # for there is a decision
        spots = self.terms.spots
        until = self.last if spots is None else max(self.last, int(spots.time[-1]))
        waits = self.book.take_out(self.book.open.expiry > until, "still open when the prices end")
        for results in [waits, *self.book.end(self.last)]:
            yield from self.settled(results)

    def settled(self, results: Results) -> Iterator[Settled | str]:
        """A line each; why not, where it may be known another time."""
        its = zip(results.sale.tolist(), results.pnl[:, 0].tolist(), results.drawdown.tolist(), results.days.tolist(),
            results.why.tolist(), strict=True)  # fmt: skip
        for number, pnl, drawdown, days, why in its:
            if why not in (KNOWN, NO_BID):
                yield why
                continue
            decision, place = self.sales[number].entry.decision, self.sales[number].place
            ends = None if why else time_of(microseconds(decision.decision_time) + round(days * DAY))
            yield Settled(decision.decision_id, decision.candidates[place].instrument, number_of(pnl),
                number_of(drawdown), ends, self.how, why)  # fmt: skip


def by_quotes(log: Log, known: Outcomes, args: argparse.Namespace, why: collections.Counter[str]) -> Iterator[Settled]:
    """By snapshots, or by spots; without any by the spots of the log's own decisions."""
    groups: dict[str, list[Books]] = {name: [] for name in log.underlyings}
    kinds: dict[tuple, list[Entry]] = {}
    for one in log.entries:
        key = one.decision.underlying, one.decision.exit_style, one.config.get("preset"), one.config.get("spots")
        kinds.setdefault(key, []).append(one)
    for (underlying, _, _, logged), entries in kinds.items():
        path = args.spots or logged
        spots = (
            read_spots(path, underlying, *(name for name in log.underlyings if name != underlying)) if path else None
        )
        how = "snapshots" if args.snapshot else "spots" if spots is not None else "log"
        groups[underlying].append(Books(entries, known, spots, how, args))
    snapshots = snapshots_of(args) if args.snapshot else own_snapshots(log)
    for found in followed(groups, snapshots):
        if isinstance(found, Settled):
            yield found
        else:
            why[found] += 1


def followed(groups: dict[str, list[Books]], snapshots: Iterable[Snapshot]) -> Iterator[Settled | str]:
    seen: set[str] = set()
    for snapshot in snapshots:
        if math.isnan(snapshot.spot):
            continue
        seen.add(snapshot.underlying)
        for books in groups.get(snapshot.underlying, ()):
            yield from books.follow(snapshot)
    missing = sorted(groups.keys() - seen)
    if missing:
        raise CandidatesError(f"No snapshot is of {', '.join(missing)}, of which the log has decisions: give theirs.")
    for books in (one for its in groups.values() for one in its):
        yield from books.end()


def snapshots_of(args: argparse.Namespace) -> Iterator[Snapshot]:
    bad = BadRows(args.on_bad_rows)
    for path in by_first_time(chain_files(args.snapshot, "snapshot")):
        yield from read_snapshots(path, bad)


def own_snapshots(log: Log) -> Iterator[Snapshot]:
    """What the log itself says of spot, and of the calls that it shows."""
    return (snapshot_of(one) for one in log.entries)


def snapshot_of(entry: Entry) -> Snapshot:
    """The chain of a decision as far as it is logged: its candidates, in their order."""
    decision, quotes = entry.decision, entry.quotes
    time, spot, its = microseconds(decision.decision_time), decision.spot, decision.candidates
    price = {
        name: np.array([number_or_nan(getattr(quotes[one.instrument], name)) for one in its]) / spot
        for name in ("mark", "bid", "ask")
    }
    interest = np.array([number_or_nan(quotes[one.instrument].open_interest) for one in its])
    expiry = [microseconds(expiry_of(one.instrument, decision.decision_time, one.dte)) for one in its]
    unknown = np.full(len(its), np.nan)
    calls = QuotedCalls(
        np.array([one.instrument for one in its], object), np.array([one.strike for one in its]),
        np.array(expiry, np.int64), np.array([one.dte for one in its]), unknown, price["mark"], price["bid"],
        price["ask"], np.array([number_or_nan(one.iv) for one in its]), np.array([one.delta for one in its]), interest,
        unknown,
    )  # fmt: skip
    return Snapshot("the log", decision.underlying, time, spot, "the index", calls)


def number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def number_of(value: float) -> float | None:
    return None if math.isnan(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# By files: the outcomes of a backtest


def by_files(log: Log, known: Outcomes, args: argparse.Namespace, why: collections.Counter[str]) -> Iterator[Settled]:
    """By a backtest's outcomes, with the options that the agent's configuration has for them."""
    kinds: dict[tuple, dict[str, Entry]] = {}
    for one in log.entries:
        options = one.config.get("outcomes", {})
        kinds.setdefault((one.decision.exit_style, *sorted(options.items())), {})[one.decision.decision_id] = one
    files = find_csvs(args.data_files, None, str(HOME))
    for (style, *options), entries in kinds.items():
        config = CoveredCallCandidatesConfig(**dict(options), exit_style=style, on_bad_rows=args.on_bad_rows)
        left = dict(entries)
        for logged in logged_in(Backtest(files, config).decisions):
            entry = left.pop(logged.decision.decision_id, None)
            if entry:
                yield from of_backtest(entry, logged, config, known, why)
        if len(left) == len(entries):
            given = ", ".join(args.data_files)
            raise JournalError(f"{log.folder}: none of its decisions is in {given}. Give the files of its backtest.")
        if left:
            why["their decision is not in the files"] += sum(len(one.decision.candidates) for one in left.values())


def of_backtest(
    entry: Entry, logged: LoggedDecision, options: CoveredCallCandidatesConfig, known: Outcomes,
    why: collections.Counter[str],
) -> Iterator[Settled]:  # fmt: skip
    decision = entry.decision
    names = [one.instrument for one in logged.decision.candidates]
    if (logged.decision.spot, sorted(names)) != (decision.spot, sorted(one.instrument for one in decision.candidates)):
        raise JournalError(f"{decision.decision_id}: the files have another spot, or other candidates, than the log. "
            "Give the files that it was replayed on.")  # fmt: skip
    its = zip(names, net_outcomes(logged, options), logged.counterfactuals, logged.outcomes, strict=True)
    for place, (name, net, counterfactual, recorded) in enumerate(its):
        if (decision.decision_id, name) in known:
            continue
        if net.value is None:
            why["what it brings is not in the files"] += 1
            continue
        says = place == logged.chosen or recorded.outcome_days is not None
        drawdown = recorded.max_drawdown_pct if says else None
        yield Settled(decision.decision_id, name, net.value, drawdown, counterfactual.label_end, "files")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call agent settle", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("log", metavar="LOGDIR", help="the folder of the log")
    parser.add_argument("--snapshot", nargs="+", metavar="PARQUET", help="files of option quotes, or quoted globs")
    parser.add_argument("--spots", metavar="CSV", help="times and prices to settle at; a date alone is 08:00 UTC; "
        "{underlying} stands for each name; default: those of the agent's configuration, else the snapshots' index, "
        "else the spots of the log's decisions")  # fmt: skip
    parser.add_argument(*flags("data_files"), nargs="+", metavar="CSV", help="files of the backtest that was "
        "replayed, or quoted globs")  # fmt: skip
    parser.add_argument("--tolerance", metavar="HOURS", type=hours, default=Settings().tolerance,
        help="from an expiry to the price that stands for it, at most; default: 6")  # fmt: skip
    parser.add_argument(*flags("on_bad_rows"), choices=("error", "skip"), default="error",
        help="rows that cannot be: an error, or left out and counted; default: error")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.data_files and (args.snapshot or args.spots):
        parser.error("--data_files has outcomes: give no --snapshot and no --spots besides.")
    return args
