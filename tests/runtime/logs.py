"""Logs that tests make: by an agent that says what it is told to, and outcomes as they are wanted."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from covered_call.runtime.engine import Agent, Steps
from covered_call.runtime.journal import opened
from covered_call.runtime.outcomes_log import Settled, add_outcomes
from covered_call.runtime.paper import Paper
from covered_call.runtime.state import MarketState, Proposal, Veto
from runtime.markets import BEGUN, DAY, FREELY, START, quoted_state

SPOT = 100_000.0  # so that 1,000 USD are 1 % of it


class Says:
    """A policy that says one thing after another."""

    def __init__(self, name: str, proposals: Sequence[Proposal]):
        self.name, self.proposals = name, iter(proposals)

    def propose(self, state, portfolio, second=None) -> Proposal:
        return next(self.proposals)


def say(pick: int | None, confidence: float = 0.8, source: str = "llm", best: int | None = None, **more) -> Proposal:
    """Of a pick what stands for the calls of that day's state, which ``write_log`` fills in."""
    return Proposal(source, pick, confidence, best=best, **more)  # type: ignore[arg-type]


def named(proposal: Proposal, state: MarketState) -> Proposal:
    names = [one.instrument for one in state.decision.candidates]
    instrument, best = (None if place is None else names[place] for place in (proposal.instrument, proposal.best))
    return proposal._replace(instrument=instrument, best=best)


def days(count: int) -> list[MarketState]:
    """A state a day, of two calls each."""
    return [quoted_state(START + number * DAY, SPOT) for number in range(count)]


def write_log(
    folder: Path,
    *policies: Sequence[Proposal],
    vetoes: dict[int, tuple[str, ...]] | None = None,
    mode: str = "shadow",
    states: Sequence[MarketState] | None = None,
    steps: Steps = FREELY,
    **about,
) -> list[MarketState]:
    """A log of what the policies say day after day; ``vetoes`` has codes by the day."""
    states = states or days(len(policies[0]))
    numbers = {state.decision.decision_time: number for number, state in enumerate(states)}

    def vetoed(intention, state, portfolio, now) -> list[Veto]:
        return [Veto(code, 2.0, 1.0, code) for code in (vetoes or {}).get(numbers[state.decision.decision_time], ())]

    said = [Says(its[0].source, [named(*pair) for pair in zip(its, states, strict=True)]) for its in policies]
    venue = Paper() if mode == "paper" else None
    with opened(folder, durable=False) as journal:
        agent = Agent(said, steps._replace(vetoes_of=vetoed), venue, BEGUN, journal, {"mode": mode, **about})
        assert len(list(agent.run(states))) == len(states)
    return list(states)


def settle(
    folder: Path, states: Sequence[MarketState], pnl: Sequence[Sequence[float | None]], hours: float = 12
) -> None:
    """Outcomes by the day and the candidate, USD a coin; None is not settled."""
    add_outcomes(folder, [
        Settled(state.decision.decision_id, candidate.instrument, usd, None,
            state.decision.decision_time + datetime.timedelta(hours=hours), "log")
        for state, its in zip(states, pnl, strict=True)
        for candidate, usd in zip(state.decision.candidates, its, strict=True)
        if usd is not None
    ])  # fmt: skip
