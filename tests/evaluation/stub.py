"""A model that needs no weights, in the place of a tuned one."""

import math
from typing import NamedTuple

from covered_call.candidates.columns import Grounds
from covered_call.candidates.explanations import explain
from covered_call.candidates.prompts import answer_of, ranking_messages
from covered_call.language_model.writing import Explanation


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


class Explains(Stub):
    """Says behind its answers what the template says, or something else."""

    def __init__(self, says: str | None = None):
        super().__init__(explains={"formula": None, "cuts": {"trade": [3.0, 4.0], "other": [3.0, 4.0]}})
        self.folder, self.says = "", says

    def explain(self, decisions):
        grounds = Grounds(**self.manifest["explains"])
        labels = [answer_of(self.pick(one)) for one in decisions]
        texts = [self.says or explain(one, label, grounds) for one, label in zip(decisions, labels, strict=True)]
        asked = [ranking_messages(one) if one.candidates else [] for one in decisions]
        return [
            Explanation(*row) for row in zip(decisions, [None] * len(decisions), asked, labels, texts, strict=True)
        ]


class FirstShown(Stub):
    """Sells what its prompt shows first; like the real policy, it shows its own order unless told not to."""

    def pick(self, decision) -> int | None:
        if self.candidate_order == "csv":
            return 0
        return min(range(len(decision.candidates)), key=decision.candidates.__getitem__)
