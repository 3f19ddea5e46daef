"""What a model's explanations are worth: each is read back, and held to what its prompt shows."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from covered_call.candidates.columns import Grounds
from covered_call.candidates.context_lines import wilson
from covered_call.candidates.explanations import Verdict, judge_explanation, statements_about
from covered_call.candidates.prompts import admissible_answers
from covered_call.candidates.schema import Decision

if TYPE_CHECKING:
    from covered_call.language_model.writing import Explanation  # with torch, which the baselines do without

CHECKS = ("valid", "grounded", "true", "consistent")
MEANINGS = {
    "valid": "an admissible answer, Strength, and a Reason that ends",
    "grounded": "each number of the reason stands in the prompt, or follows from it as its sentence says",
    "true": "each sentence is read back, and its numbers and its claim are right",
    "consistent": "the answer and the strength are those that were decided, and the score is told",
}


class Judged(NamedTuple):
    """Explanations of some decisions, each with its verdict."""

    explanations: list["Explanation"]
    verdicts: list[Verdict]

    @property
    def shares(self) -> dict[str, tuple[float, float, float]]:
        """Of each check the share that passes, with its 95 % interval (Wilson)."""
        found = {}
        for name in CHECKS:
            passed, tried = sum(getattr(one, name) for one in self.verdicts), len(self.verdicts)
            found[name] = (passed / tried, *wilson(passed, tried))
        return found

    @property
    def words(self) -> float:
        return float(np.mean([one.words for one in self.verdicts]))

    def sentence(self) -> str:
        shares = ", ".join(
            f"{name} {share:.3f} [{low:.3f}, {high:.3f}]" for name, (share, low, high) in self.shares.items()
        )
        return f"Explanations of {len(self.verdicts)} decisions: {shares}; {self.words:.0f} words on average."

    def rows(self) -> list[list[str]]:
        """Of a table, the head first."""
        head = [f"of {len(self.verdicts)} explanations", "share", ""]
        shown = {name: f"{share:.3f} [{low:.3f}, {high:.3f}]" for name, (share, low, high) in self.shares.items()}
        return [head, *([name, shown[name], MEANINGS[name]] for name in CHECKS)]

    def texts(self) -> list[str]:
        """Each on a line, without the answer, and which checks it fails."""
        return [told(one, verdict) for one, verdict in zip(self.explanations, self.verdicts, strict=True)]

    def as_json(self) -> dict:
        shares = {name: {"value": value, "low": low, "high": high} for name, (value, low, high) in self.shares.items()}
        return {"decisions": len(self.verdicts), "words": self.words, "meanings": MEANINGS, **shares}

    def lines(self) -> str:
        """A JSON object a line: prompt, text and verdict."""
        rows = [
            {
                "decision_id": one.decision.decision_id,
                "prompt": one.messages[-1]["content"] if one.messages else "",
                "answer": one.label,
                "text": one.text,
                **verdict._asdict(),
            }
            for one, verdict in zip(self.explanations, self.verdicts, strict=True)
        ]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def told(one: "Explanation", verdict: Verdict) -> str:
    lines = (line.strip() for line in one.text.splitlines()[1:])
    reason = ". ".join(filter(None, lines)) or "(none)"
    failed = ", ".join(name for name in CHECKS if not getattr(verdict, name))
    return f"{reason} (Checked: {f'it is not {failed}' if failed else 'it holds'}.)"


def judge_explanations(explanations: Sequence["Explanation"], grounds: Grounds, task: str) -> Judged:
    return Judged(list(explanations), [verdict_on(one, grounds, task) for one in explanations])


def verdict_on(one: "Explanation", grounds: Grounds, task: str) -> Verdict:
    task = task if one.messages else "per_decision_ranking"  # of no candidates nothing is asked
    prompt = one.messages[-1]["content"] if one.messages else ""
    said = statements_about(one.decision, one.label, grounds, task, one.place or 0)
    return judge_explanation(
        one.text, prompt, one.label, admissible_answers(task, len(one.decision.candidates)), said, 0
    )


def some_of(decisions: Sequence[Decision], most: int) -> list[Decision]:
    """At most so many, evenly apart."""
    places = np.unique(np.linspace(0, len(decisions) - 1, min(most, len(decisions))).astype(int))
    return [decisions[place] for place in places.tolist()]
