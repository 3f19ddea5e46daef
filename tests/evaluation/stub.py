"""A model that needs no weights, in the place of a tuned one."""

import math
from typing import NamedTuple


class Answer(NamedTuple):
    pick: int | None
    scores: dict[str, float]
    probability: float = 0.9


def answer(decision, pick: int | None) -> Answer:
    """With the scores of a model that answers for each candidate: 0.9 of a sale of what it picks, 0.2 of another."""
    places = range(len(decision.candidates))
    return Answer(pick, {str(place + 1): math.log(0.9 if place == pick else 0.2) for place in places})


class Stub:
    """A model that sells the candidate with the highest score, if there is one, at 0.9."""

    def __init__(self, recipe=None, tuned_to="2024-09-10T00:00:00+00:00", **manifest):
        self.manifest = {"recipe": recipe or {}, "splits": {"train": {"to": tuned_to}}, **manifest}
        self.task, self.candidate_order = "per_decision_ranking", "instrument"

    def pick(self, decision) -> int | None:
        return max(range(len(decision.candidates)), key=lambda i: decision.candidates[i].score, default=None)

    def decide(self, decisions):
        return [answer(one, self.pick(one)) for one in decisions]


class FirstShown(Stub):
    """Sells what its prompt shows first; like the real policy, it shows its own order unless told not to."""

    def pick(self, decision) -> int | None:
        if self.candidate_order == "csv":
            return 0
        return min(range(len(decision.candidates)), key=decision.candidates.__getitem__)
