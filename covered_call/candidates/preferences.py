"""Pairs of answers to one decision: the one that brought more, and one that brought less."""

import collections
import logging
import random
from typing import Any, NamedTuple

from covered_call.candidates.options import PreferenceConfig
from covered_call.candidates.outcomes import recorded_outcome
from covered_call.candidates.prompts import answer_of, present_in_order
from covered_call.candidates.schema import LoggedDecision

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """Two answers to one decision (an index into the candidates, None for NO_TRADE) and their outcomes in USD.

    Both outcomes are of one ``source``: a teacher that settles otherwise than the formula of the counterfactuals would
    make a recorded outcome minus a counterfactual look like skill.
    """

    chosen: int | None
    rejected: int | None
    chosen_outcome: float
    rejected_outcome: float
    source: str


def preferred_pair(logged: LoggedDecision, options: PreferenceConfig) -> Pair | None:
    """The answer that brought most against the teacher's, or against the worst; None where no pair is clear.

    Which is best is decided by the counterfactuals of all candidates or, where one is unknown, between the teacher's
    call and NO_TRADE. The pair's outcomes are the recorded ones where both have one.
    """
    computed = {place: one.pnl_vs_hodl for place, one in enumerate(logged.counterfactuals)}
    recorded = recorded_outcome(logged, options)
    logged_ones: dict[int | None, Any] = {None: 0.0} if recorded is None else {None: 0.0, logged.chosen: recorded}
    known: dict[int | None, Any] = logged_ones if None in computed.values() else {None: 0.0, **computed}
    best, worst = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    teachers = logged.chosen if logged.chosen in known else best
    rejected = worst if options.rejected == "worst" or teachers == best else teachers
    source = "recorded" if recorded is not None and {best, rejected} <= logged_ones.keys() else "counterfactual"
    outcomes = logged_ones if source == "recorded" else known
    pair = Pair(best, rejected, outcomes[best], outcomes[rejected], source)
    min_gain = max(options.min_edge, options.min_edge_pct / 100 * logged.decision.spot)
    return pair if pair.chosen_outcome - pair.rejected_outcome > min_gain else None


def balance_pairs(entries: list[LoggedDecision], options: PreferenceConfig) -> list[LoggedDecision]:
    """Decisions with a pair, the commonest chosen answer cut by lot to as many as the second: none dominates.

    Indices count in the prompt's order.
    """
    by_label = collections.defaultdict(list)
    for place, entry in enumerate(entries):
        pair = preferred_pair(present_in_order(entry, options), options)
        if pair:
            by_label[answer_of(pair.chosen)].append(place)
    before = count_labels(by_label)
    commonest = sorted(by_label, key=lambda label: -len(by_label[label]))[:2]
    if len(commonest) == 2:
        most, second = (by_label[label] for label in commonest)
        by_label[commonest[0]] = random.Random(int(options.seed)).sample(most, len(second))
    logger.warning("Pairs of train by the chosen answer: %s; before balancing: %s.", count_labels(by_label), before)
    return [entries[place] for place in sorted(place for places in by_label.values() for place in places)]


def count_labels(by_label: dict[str, list[int]]) -> str:
    return ", ".join(f"{label} {len(places)}" for label, places in sorted(by_label.items()))
