"""A rule replayed over the snapshots of one underlying: when it decides, what it sells, and the log of it as a CSV."""

import collections
import math
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple, TextIO

import numpy as np

from covered_call.candidates.columns import DAY, microseconds, time_of
from covered_call.candidates.schema import CandidatesError, Decision, shown
from covered_call.market.book import KNOWN, STYLES, Book, Conditions, Fixings, Quotes, Results
from covered_call.market.candidate_csv import HEADER, quotes_of, rows_of, write_rows
from covered_call.market.snapshot import BadRows, Snapshot
from covered_call.market.teacher import Offer, Rules

Rule = Callable[[Quotes, Rules], np.ndarray]  # the candidates that it would sell, by their places, the best first


def rule_of(name: str) -> Rule:
    """teacher, never, highest_premium, lowest_delta, or delta:X.

    Raises:
        CandidatesError: for a name that is none of these.
    """
    word, _, number = name.partition(":")
    if word == "delta":
        try:
            target = float(number)
        except ValueError:
            target = math.nan
        if 0 < target < 1:
            return lambda quotes, rules: by(abs(deltas(quotes.offer) - target))
    if name in RULES:
        return RULES[name]
    raise CandidatesError(f"rule={shown(name)}: choose one of {', '.join(RULES)}, or delta:X with X such as 0.25.")


def by(values: np.ndarray) -> np.ndarray:
    """The lowest first; of equals that of the better score."""
    return np.argsort(values, kind="stable")


def deltas(offer: Offer) -> np.ndarray:
    return np.array([candidate.delta for candidate in offer.decision.candidates])


def good_scores(quotes: Quotes, rules: Rules) -> np.ndarray:
    scores = np.array([candidate.score for candidate in quotes.offer.decision.candidates])
    return np.flatnonzero(scores >= rules.threshold)  # which are the best first


RULES: dict[str, Rule] = {
    "teacher": good_scores,
    "highest_premium": lambda quotes, rules: by(-quotes.price["mark"][quotes.offer.rows]),
    "lowest_delta": lambda quotes, rules: by(deltas(quotes.offer)),
    "never": lambda quotes, rules: np.zeros(0, np.int64),
}


class Trade(NamedTuple):
    """A call that the rule sold, and what that brought in USD a coin, net of fees; NaN where unknown."""

    time: int  # microseconds since 1970
    instrument: str
    spot: float  # USD
    pnl: np.ndarray  # (4,) as it was done, and in each of the book's WAYS
    days: float


class Pending(NamedTuple):
    """A decision of which an outcome may not be known yet."""

    decision: Decision
    chosen: int | None
    quoted: np.ndarray  # (N, 4) bid, ask, mark, open interest of the candidates
    sales: range  # their numbers
    shape: tuple[float, float]  # of its chain


class Log:
    """The decisions of one exit style: they are written in their order, each once all its outcomes are known."""

    def __init__(self, exit_style: str, rule: str, terms: Conditions, fixings: Fixings, file: TextIO):
        self.exit_style, self.rule, self.file = exit_style, rule, file
        self.book = Book(STYLES[exit_style], terms, fixings)
        self.pending: collections.deque[Pending] = collections.deque()
        self.results: dict[int, tuple] = {}  # by the number of the sale: the fields of Results, but the number
        self.sales = self.decisions = self.empty = 0
        self.why: collections.Counter[str] = collections.Counter()  # of the candidates' outcomes that are unknown
        self.trades: list[Trade] = []
        write_rows(file, [HEADER])

    def follow(self, quotes: Quotes) -> None:
        self.take_in(self.book.follow(quotes))

    def decide(self, quotes: Quotes, chosen: int | None) -> None:
        rows = quotes.offer.rows
        sales = range(self.sales, self.sales + len(rows))
        self.sales = sales.stop
        decision = quotes.offer.decision._replace(exit_style=self.exit_style)
        self.pending.append(Pending(decision, chosen, quotes_of(quotes.snapshot, rows), sales, quotes.snapshot.shape))
        self.take_in([self.book.sell(quotes, rows, np.array(sales, np.int64))])

    def end(self, time: int) -> None:
        self.take_in(self.book.end(time))

    def take_in(self, several: list[Results]) -> None:
        for results in several:
            self.why.update(why for why in results.why.tolist() if why != KNOWN)
            its = zip(results.pnl, results.drawdown.tolist(), results.days.tolist(), strict=True)
            self.results.update(zip(results.sale.tolist(), its, strict=True))
        while self.pending and all(sale in self.results for sale in self.pending[0].sales):
            self.write(self.pending.popleft())

    def write(self, pending: Pending) -> None:
        decision, chosen, sales = pending.decision, pending.chosen, pending.sales
        self.decisions += 1
        self.empty += not sales
        outcomes = [self.results.pop(sale) for sale in sales]
        known = [(float(pnl[0]), drawdown, days) for pnl, drawdown, days in outcomes]
        write_rows(self.file, rows_of(decision, pending.quoted, self.rule, chosen, known, pending.shape))
        if chosen is not None:
            pnl, _, days = outcomes[chosen]
            instrument = decision.candidates[chosen].instrument
            self.trades.append(Trade(microseconds(decision.decision_time), instrument, decision.spot, pnl, days))


class ChainReplay:
    """The snapshots of one underlying, one after another, and a log for each exit style."""

    def __init__(
        self,
        underlying: str,
        rule: str,
        terms: Conditions,
        at: int | None,
        styles: Sequence[str],
        bad: BadRows,
        folder: str,
    ):
        """Args: at: microseconds after midnight, UTC, of the one decision a day; None decides at every snapshot.
        folder: for the files in which the logs grow, which have no name."""
        self.underlying, self.terms, self.at, self.bad = underlying, terms, at, bad
        self.rule, self.fixings = rule_of(rule), Fixings(terms)
        self.logs = [Log(style, rule, terms, self.fixings, spool(folder)) for style in styles]
        self.waiting: Snapshot | None = None  # until the time of the next one is known
        self.before: int | None = None
        self.first: int | None = None  # time of the first decision, and of the last
        self.last: int | None = None
        self.missed = self.spotless = self.unsold = self.next_best = 0
        self.spot_is: collections.Counter[str] = collections.Counter()

    def take(self, snapshot: Snapshot) -> None:
        """Raises CandidatesError for a snapshot that is not after the one before."""
        if math.isnan(snapshot.spot):
            self.spotless += 1
            return
        if self.waiting is not None:
            if snapshot.time <= self.waiting.time:
                raise CandidatesError(
                    f"{snapshot.source}: the snapshot of {self.underlying} at {time_of(snapshot.time)} is not after "
                    f"that at {time_of(self.waiting.time)} of {self.waiting.source}. Files of one underlying must not "
                    "overlap: leave one of them out."
                )
            self.play(self.waiting, snapshot.time)
        self.waiting = snapshot

    def finish(self) -> None:
        """After the last snapshot."""
        if self.waiting is not None:
            self.play(self.waiting, None)
            for log in self.logs:
                log.end(self.waiting.time)

    def play(self, snapshot: Snapshot, after: int | None) -> None:
        quotes = Quotes(snapshot, self.terms, self.bad)
        self.spot_is[snapshot.spot_is] += 1
        self.fixings.see(quotes.time, quotes.spot)
        for log in self.logs:
            log.follow(quotes)
        if self.decides(quotes.time, after):
            self.decide(quotes)
        self.before = quotes.time

    def decide(self, quotes: Quotes) -> None:
        wanted = self.rule(quotes, self.terms.rules)
        sellable = wanted[~np.isnan(quotes.price[self.terms.sell_at][quotes.offer.rows[wanted]])]
        self.unsold += bool(len(wanted)) and not len(sellable)
        self.next_best += bool(len(sellable)) and sellable[0] != wanted[0]
        for log in self.logs:
            log.decide(quotes, int(sellable[0]) if len(sellable) else None)
        self.first, self.last = self.first or quotes.time, quotes.time

    def decides(self, time: int, after: int | None) -> bool:
        """Whether a snapshot is the nearest to the time of a day's decision, the earlier of two, and near enough."""
        if self.at is None:
            return True
        due = time - (time - self.at) % DAY
        if self.before is not None:
            self.missed += self.missed_between(self.before, time, self.at)
        return any(
            abs(one - time) <= self.terms.tolerance
            and (self.before is None or abs(one - self.before) > abs(one - time))
            and (after is None or abs(one - after) >= abs(one - time))
            for one in (due, due + DAY)
        )

    def missed_between(self, before: int, time: int, at: int) -> int:
        """How many decision times lie between two snapshots and are near to neither."""
        first = before + (at - before) % DAY
        return sum(min(one - before, time - one) > self.terms.tolerance for one in range(first, time, DAY))


def spool(folder: str) -> TextIO:
    return tempfile.TemporaryFile("w+", dir=folder, newline="", encoding="utf-8")
