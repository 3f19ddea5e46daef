"""A model that needs no weights, in the place of a tuned one."""

from typing import NamedTuple


class Answer(NamedTuple):
    pick: int | None
    probability: float = 0.9


class Stub:
    """A model that sells the candidate with the highest score, if there is one, at 0.9."""

    def __init__(self, recipe=None, tuned_to="2024-09-10T00:00:00+00:00"):
        self.manifest = {"recipe": recipe or {}, "splits": {"train": {"to": tuned_to}}}
        self.task, self.candidate_order = "per_decision_ranking", "instrument"

    def decide(self, decisions):
        return [
            Answer(max(range(len(d.candidates)), key=lambda i: d.candidates[i].score, default=None)) for d in decisions
        ]


class FirstShown(Stub):
    """Sells what its prompt shows first; like the real policy, it shows its own order unless told not to."""

    def decide(self, decisions):
        return [
            Answer(0 if self.candidate_order == "csv" else min(range(len(d.candidates)), key=d.candidates.__getitem__))
            for d in decisions
        ]
