"""The cycle of an agent: state, exits, proposals, fusion, sizing, vetoes, log, order.

``plan_of`` is the pure core: the same state, portfolio, proposals and steps make the same plan. Clock, files and
orders are at the edges, in ``Agent``. Steps are callables, so that an agent is whole without any of them.
"""

import datetime
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from covered_call.candidates.schema import CandidatesError
from covered_call.runtime.drift import drift_of
from covered_call.runtime.fusion import Fused
from covered_call.runtime.journal import ABANDONED, Journal, read
from covered_call.runtime.paper import (
    FILLED,
    Begun,
    Event,
    Execution,
    Marked,
    apply_all,
    begin,
    line_of,
    rebuilt,
)
from covered_call.runtime.policies import Source, first_that_answers, proposals_of
from covered_call.runtime.risk import Note
from covered_call.runtime.sizing import Sizing
from covered_call.runtime.state import (
    HOLD,
    NO_TRADE,
    SELL_CALL,
    Intention,
    MarketState,
    Portfolio,
    Position,
    Proposal,
    Veto,
)

logger = logging.getLogger(__name__)

NO_PROPOSAL, TOO_SMALL = "no_proposal", "too_small"
NOT_SENT, ROLLED = "not_sent", "roll"  # of an order that no venue sees, and the reason of one after a ROLL


class Steps(NamedTuple):
    """What an agent is put together from; each is pure.

    Args:
        fuse: of the proposals, in the order of the policies.
        size: of the fused proposal.
        vetoes_of: of an intention, with the time at which it is looked at.
        exits: what becomes of the positions: CLOSE, or ROLL, after which a SELL_CALL with the reason "roll" may stand,
            which is sent only if the one before it was filled. All of them are looked at by vetoes_of.
        limit: the limit price of a sale, USD a coin; None is whatever the bid is.
        notes_of: what is to be logged of an intention and stops nothing.
    """

    fuse: Callable[[Sequence[Proposal], MarketState, Portfolio], Fused]
    size: Callable[[Proposal, MarketState, Portfolio], Sizing]
    vetoes_of: Callable[[Intention, MarketState, Portfolio, datetime.datetime], list[Veto]]
    exits: Callable[[MarketState, Portfolio, datetime.datetime], Sequence[Intention]]
    limit: Callable[[str, MarketState], float | None] = lambda instrument, state: None
    notes_of: Callable[[Intention, MarketState, Portfolio, datetime.datetime], list[Note]] = lambda *_: []


def fall_back(proposals: Sequence[Proposal], state: MarketState, portfolio: Portfolio) -> Fused:
    """The first policy that answers, named."""
    proposal = first_that_answers(proposals)
    return Fused(proposal, "fallback" if proposals and proposal.source != proposals[0].source else proposal.source)


# ---------------------------------------------------------------------------------------------------------------------
# The pure core


class Order(NamedTuple):
    """An intention that may be sent, with all that speaks against it."""

    intention: Intention
    vetoes: tuple[Veto, ...] = ()
    notes: tuple[Note, ...] = ()


class Plan(NamedTuple):
    """What a cycle means to do."""

    proposals: tuple[Proposal, ...]
    fused: Fused
    sized: Sizing | None  # None where nothing is to be sold
    exits: tuple[Order, ...]
    entry: Order

    @property
    def orders(self) -> tuple[Order, ...]:
        """Those to be sent, in their order."""
        entry = (self.entry,) if self.entry.intention.action == SELL_CALL else ()
        return tuple(one for one in (*self.exits, *entry) if not one.vetoes)


def plan_of(
    state: MarketState, portfolio: Portfolio, proposals: Sequence[Proposal], steps: Steps, now: datetime.datetime
) -> Plan:
    """What the agent means to do.

    Args:
        now: when it is decided, which says how old the state is.
    """
    exits = exits_of(state, portfolio, steps, now)
    fused = steps.fuse(proposals, state, portfolio)
    entry, sized = entry_of(state, portfolio, fused, steps)
    order = judged(entry, state, portfolio, steps, now) if entry.action == SELL_CALL else Order(entry)
    return Plan(tuple(proposals), fused, sized, tuple(exits), order)


def judged(
    intention: Intention, state: MarketState, portfolio: Portfolio, steps: Steps, now: datetime.datetime
) -> Order:
    vetoes = steps.vetoes_of(intention, state, portfolio, now)
    return Order(intention, tuple(vetoes), tuple(steps.notes_of(intention, state, portfolio, now)))


def exits_of(state: MarketState, portfolio: Portfolio, steps: Steps, now: datetime.datetime) -> list[Order]:
    """The exits with what speaks against them. A sale that takes the place of another call does not go where that one
    stays."""
    orders: list[Order] = []
    for one in steps.exits(state, portfolio, now):
        if one.action == HOLD:
            continue
        before = orders[-1].vetoes if one.action == SELL_CALL and orders else ()
        order = judged(one, state, portfolio, steps, now)
        orders.append(order._replace(vetoes=(*before, *order.vetoes)))
    return orders


def held(portfolio: Portfolio, instrument: str | None) -> Position | None:
    """The position that an exit of an instrument is of: the oldest, and the whole of it."""
    return next((one for one in portfolio.positions if one.instrument == instrument), None)


def entry_of(state: MarketState, portfolio: Portfolio, fused: Fused, steps: Steps) -> tuple[Intention, Sizing | None]:
    """The sale that was proposed, or NO_TRADE with the reason."""
    decision_id, instrument = state.decision.decision_id, fused.proposal.instrument
    if instrument is None or fused.proposal.error:
        return Intention(NO_TRADE, decision_id, reason_codes=(fused.method or NO_PROPOSAL,)), None
    sized = steps.size(fused.proposal, state, portfolio)
    if sized.units <= 0:
        return Intention(NO_TRADE, decision_id, reason_codes=(sized.code or TOO_SMALL,)), sized
    limit = steps.limit(instrument, state)
    return Intention(SELL_CALL, decision_id, instrument, sized.units, limit, (fused.method,)), sized


# ---------------------------------------------------------------------------------------------------------------------
# The edges


class Venue(Protocol):
    """Where orders go, and what is known of the prices of what is held."""

    def settled(self, portfolio: Portfolio, state: MarketState) -> list[Event]:
        """The positions that ended by themselves since the last cycle."""
        ...

    def mark(self, portfolio: Portfolio, state: MarketState) -> Marked: ...

    def sell(self, intention: Intention, state: MarketState, rolls: int) -> tuple[Execution, list[Event]]: ...

    def buy_back(
        self, intention: Intention, position: Position, state: MarketState
    ) -> tuple[Execution, list[Event]]: ...

    def found(self, line: dict, number: int) -> tuple[Execution, list[Event]] | None:
        """What became of an order of a cycle's line that has no completion; None if it never got here."""
        ...

    def recall(self, last: Marked) -> None:
        """What was known when the log ended."""
        ...


class Cycle(NamedTuple):
    """What came of a cycle."""

    state: MarketState
    plan: Plan
    executions: tuple[Execution, ...]  # of the plan's orders
    portfolio: Portfolio  # after it


class Agent:
    """Decides state after state, and writes each down before it acts.

    Args:
        sources: the policies, in the order in which one stands in for another: see proposals_of.
        venue: None sends nothing: shadow.
        begins: what there is at the start of a new log; of one that goes on it must be the same.
        journal: None writes nothing.
        about: of every line: mode, config_hash, versions.
        now: the clock; None takes the time of each state, as a replay does.
        ranges: by policy the numbers that it was tuned on: what lies beyond them is logged. See drift_of.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        steps: Steps,
        venue: Venue | None,
        begins: Begun,
        journal: Journal | None = None,
        about: dict | None = None,
        now: Callable[[], datetime.datetime] | None = None,
        ranges: dict[str, dict[str, list[float]]] | None = None,
    ):
        self.sources, self.steps, self.venue, self.journal = sources, steps, venue, journal
        self.about, self.now, self.ranges = about or {}, now, ranges or {}
        self.portfolio, self.unwritten = begin(begins), [line_of(begins)]
        if journal:
            self.go_on(journal, begins)

    def go_on(self, journal: Journal, begins: Begun) -> None:
        """From where the log ends. Orders that were under way are abandoned, but those that the venue knows.

        Raises:
            CandidatesError: if the log is of another mode, or began with another portfolio.
        """
        # Of another's log nothing is touched: its orders under way are for the venue of its own mode to look up.
        mode, before = self.about.get("mode"), journal.last and journal.last.get("mode")
        if before and before != mode:
            raise CandidatesError(
                f"{journal.folder} has the log of {before}, and this is {mode}: give another folder."
            )
        first = next((event for line in read(journal.folder) for event in line.get("events", ())), None)
        if first and (first["holdings"], first["cash_usd"]) != (begins.holdings, begins.cash_usd):
            raise CandidatesError(
                f"{journal.folder}: its log began with {first['holdings']} and {first['cash_usd']:g} USD, and this is "
                f"{begins.holdings} and {begins.cash_usd:g} USD. Give another folder, or the portfolio it began with."
            )
        for (decision_id, order), line in list(journal.pending.items()):
            found = self.venue.found(line, order) if self.venue else None
            what = (
                "was not sent before the agent ended" if found is None else f"is {found[0].status}: {found[0].reason}"
            )
            logger.warning("%s: its order %d %s.", decision_id, order, what)
            execution, events = found or (Execution(ABANDONED, "the agent ended before"), [])
            journal.complete(decision_id, order, execution=execution, events=[line_of(one) for one in events])
        if first is None:
            return
        if journal.last and journal.last.get("config_hash") != self.about.get("config_hash"):
            logger.warning("%s: its last decision was taken with another configuration.", journal.folder)
        portfolio, last = rebuilt(read(journal.folder))
        assert portfolio is not None
        self.portfolio, self.unwritten = portfolio, []
        if last and self.venue:
            self.venue.recall(last)

    def run(self, states: Iterable[MarketState]) -> Iterator[Cycle]:
        """A cycle for each state that was not decided already.

        Raises:
            CandidatesError: for one of before the portfolio's last mark: what was held then is not known any more.
        """
        for state in states:
            if self.journal and state.decision.decision_id in self.journal.decided:
                continue
            if self.venue and state.decision.decision_time < self.portfolio.time:
                raise CandidatesError(
                    f"{state.decision.decision_id} is of before {self.portfolio.time.isoformat()}, up to when the "
                    "portfolio is known. Give states by time, or another folder for the log."
                )
            yield self.cycle(state)

    def cycle(self, state: MarketState) -> Cycle:
        """Raises JournalError, before an order is sent, if it cannot be written down."""
        began = time.perf_counter()
        events = self.venue.settled(self.portfolio, state) if self.venue else []
        portfolio = apply_all(self.portfolio, events)
        if self.venue:
            events = [*events, self.venue.mark(portfolio, state)]
            portfolio = apply_all(portfolio, events[-1:])
        seen = time.perf_counter()
        proposals = proposals_of(self.sources, state, portfolio)
        proposed = time.perf_counter()
        now = self.now() if self.now else state.decision.decision_time
        plan = plan_of(state, portfolio, proposals, self.steps, now)
        latencies = {"state": seen - began, "plan": time.perf_counter() - proposed}
        latencies |= {one.source: one.latency_s for one in proposals}
        self.write(state, plan, portfolio, [*self.unwritten, *map(line_of, events)], latencies, now)
        self.portfolio, self.unwritten = portfolio, []
        return Cycle(state, plan, self.send(state, plan), self.portfolio)

    def write(
        self,
        state: MarketState,
        plan: Plan,
        portfolio: Portfolio,
        events: list[dict],
        latencies: dict[str, float],
        now: datetime.datetime,
    ) -> None:
        if not self.journal:
            return
        decision = state.decision
        shown = {one.instrument for one in (*decision.candidates, *portfolio.positions)}
        quotes = [quote for name, quote in state.quotes.items() if name in shown]
        seen = {"decision": decision.to_dict(), "quotes": quotes, "context": state.context,
            "snapshot_time": state.snapshot_time}  # fmt: skip
        owned = portfolio._replace(trades=())._asdict() | {"trades": len(portfolio.trades)}
        self.journal.write({
            "decision_id": decision.decision_id, "time": now, **self.about,
            "orders": len(plan.orders) if self.venue else 0, "state": seen, "portfolio": owned, "events": events,
            "proposals": plan.proposals, "fusion": {**plan.fused._asdict(), "proposal": plan.fused.proposal.source,
                "instrument": plan.fused.proposal.instrument},
            "sizing": plan.sized, "exits": plan.exits, "intention": plan.entry.intention,
            "vetoes": plan.entry.vetoes, "notes": plan.entry.notes, "latencies": latencies, "drift": self.drift(state),
            "errors": [f"{one.source}: {one.error}" for one in plan.proposals if one.error],
        })  # fmt: skip

    def drift(self, state: MarketState) -> dict[str, list[str]]:
        """By policy, where the decision lies beyond what it was tuned on."""
        return {name: found for name, its in self.ranges.items() if (found := drift_of(state.decision, its))}

    def send(self, state: MarketState, plan: Plan) -> tuple[Execution, ...]:
        """The plan's orders, one after another; each is completed in the log before the next one goes."""
        if not self.venue:
            return ()
        executions: list[Execution] = []
        rolled: Position | None = None
        for number, order in enumerate(plan.orders):
            began = time.perf_counter()
            execution, events, rolled = self.sent(order.intention, state, rolled)
            if self.journal:
                self.journal.complete(
                    state.decision.decision_id, number, execution=execution, events=[line_of(one) for one in events],
                    latencies={"order": time.perf_counter() - began},
                )  # fmt: skip
            self.portfolio = apply_all(self.portfolio, events)
            executions.append(execution)
        return tuple(executions)

    def sent(
        self, intention: Intention, state: MarketState, rolled: Position | None
    ) -> tuple[Execution, list[Event], Position | None]:
        """What becomes of an order, and the position that it closed so that another may take its place."""
        assert self.venue is not None
        if intention.action == SELL_CALL:
            if ROLLED in intention.reason_codes and rolled is None:
                return Execution(NOT_SENT, "what it was to take the place of is not closed"), [], None
            rolls = rolled.rolls + 1 if rolled and ROLLED in intention.reason_codes else 0
            return *self.venue.sell(intention, state, rolls), None
        position = held(self.portfolio, intention.instrument)
        if position is None:
            return Execution(NOT_SENT, f"{intention.instrument} is not held"), [], None
        execution, events = self.venue.buy_back(intention, position, state)
        return execution, events, position if execution.status == FILLED else None
