"""What became of an agent's earlier decisions, which the learned fusion and Kelly's rule rest on, walking forward: of
each question only what was settled by its time is looked at.

Of a log it is what covered-call agent settle wrote beside it, of a replay what the replay itself took for outcomes.
"""

import datetime
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import microseconds
from covered_call.runtime.fusion import FEATURES, Disagreements, answers, features_of
from covered_call.runtime.journal import JournalError
from covered_call.runtime.logged import Entry, read_log
from covered_call.runtime.outcomes_log import FILE_NAME, Outcomes, read_outcomes
from covered_call.runtime.sizing import payoff_ratio
from covered_call.runtime.state import MarketState, Portfolio, Proposal

logger = logging.getLogger(__name__)

LEAST = 30  # settled outcomes of an underlying: of fewer no payoff is told


class Brought(NamedTuple):
    """What selling a candidate brought."""

    usd: float  # a coin, against holding it
    settled_at: datetime.datetime


class Experience:
    """Decisions of before, with the outcomes of their candidates.

    Args:
        pair: the sources of the language model and of the policy beside it, whose disagreements are kept; None: none
            are.
    """

    def __init__(self, pair: tuple[str, str] | None = None):
        self.pair = pair
        self.outcomes: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}  # when settled, and shares of spot
        self.disagreements: list[tuple[tuple[float, ...], bool, int]] = []  # as in Disagreements

    def add(
        self,
        state: MarketState,
        portfolio: Portfolio,
        proposals: Sequence[Proposal],
        brought: Mapping[str, Brought],
    ) -> None:
        """A decision as it was put, and what its candidates brought, by instrument."""
        if brought:
            times = np.array([microseconds(one.settled_at) for one in brought.values()], np.int64)
            shares = np.array([one.usd / state.decision.spot for one in brought.values()])
            self.outcomes.setdefault(state.decision.underlying, []).append((times, shares))
        pair = self.disagreeing(state, proposals)
        if pair is None:
            return
        nothing = Brought(0.0, state.decision.decision_time)
        its = [brought.get(one.instrument) if one.instrument else nothing for one in pair]
        if its[0] is not None and its[1] is not None:
            settled_at = microseconds(max(one.settled_at for one in its if one))
            won = its[0].usd > its[1].usd
            self.disagreements.append((features_of(*pair, state, portfolio), won, settled_at))

    def disagreeing(self, state: MarketState, proposals: Sequence[Proposal]) -> tuple[Proposal, Proposal] | None:
        """The two of the pair, if both answered, and not the same."""
        offered = {one.instrument for one in state.decision.candidates}
        able = {one.source: one for one in proposals if answers(one, offered)}
        llm, second = (able.get(name) for name in self.pair or ("", ""))
        return (llm, second) if llm and second and llm.instrument != second.instrument else None

    def payoff(self, underlying: str, time: datetime.datetime) -> float | None:
        """The mean gain over the mean loss of what was settled by a time, in % of spot; None where that is too
        little."""
        its = self.outcomes.get(underlying, ())
        known = [shares[times <= microseconds(time)] for times, shares in its]
        found = np.concatenate(known) if known else np.zeros(0)
        return payoff_ratio(found) if len(found) >= LEAST else None

    def settled(self) -> Disagreements:
        """All of them: llm_chance looks at those that were settled in time."""
        features, won, settled_at = zip(*self.disagreements, strict=True) if self.disagreements else ((), (), ())
        rows = np.array(features, float).reshape(-1, len(FEATURES))
        return Disagreements(rows, np.array(won, bool), np.array(settled_at, np.int64))


class Settled:
    """The experience of a log's folder, read again once ``covered-call agent settle`` has written there."""

    def __init__(self, folder: str | Path, pair: tuple[str, str] | None = None):
        self.folder, self.pair = Path(folder), pair
        self.stamp = self.stamp_now()
        self.experience = read_experience(self.folder, pair)

    def stamp_now(self) -> tuple | None:
        try:
            found = (self.folder / FILE_NAME).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def now(self) -> Experience:
        """A file that cannot be read is said once, and the last one goes on."""
        stamp = self.stamp_now()
        if stamp != self.stamp:
            self.stamp = stamp
            try:
                self.experience = read_experience(self.folder, self.pair)
            except JournalError as error:
                logger.warning("The agent goes on with the outcomes that it has: %s", error)
        return self.experience


def read_experience(folder: str | Path, pair: tuple[str, str] | None = None) -> Experience:
    """Nothing where nothing is settled.

    Raises:
        JournalError: for a log or outcomes that cannot be read.
    """
    found, outcomes = Experience(pair), read_outcomes(folder)
    for entry in read_log(folder).entries if outcomes else ():
        state = MarketState(entry.decision, {}, entry.line["state"]["context"], entry.decision.decision_time)
        found.add(state, portfolio_of(entry), proposals_of(entry), brought_by(entry, outcomes))
    return found


def brought_by(entry: Entry, outcomes: Outcomes) -> dict[str, Brought]:
    names = [one.instrument for one in entry.decision.candidates]
    its = {name: outcomes.get((entry.decision.decision_id, name)) for name in names}
    return {
        name: Brought(one.pnl_vs_hodl, one.settled_at)
        for name, one in its.items()
        if one and one.pnl_vs_hodl is not None and one.settled_at is not None
    }


def portfolio_of(entry: Entry) -> Portfolio:
    """As far as features_of looks at it."""
    its = entry.line["portfolio"]
    return Portfolio(
        entry.decision.decision_time, its["equity_usd"], its["peak_equity_usd"], its["day_peak_usd"], its["holdings"]
    )


def proposals_of(entry: Entry) -> list[Proposal]:
    """Of a confidence that is no number there is none."""
    unknown = {"confidence": math.nan}
    return [Proposal(**(one if one["confidence"] is not None else one | unknown)) for one in entry.line["proposals"]]
