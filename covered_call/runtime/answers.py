"""What a language model's text and the probabilities of its tokens say of the answers that a prompt allows."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from covered_call.candidates.schema import is_number, shown

ROUNDED = 1e-9  # of a probability
AFTER_A_DIGIT = 11  # what may follow: ten digits, and the end
FIELDS = ("answer", "confidence", "reason")


class ServerError(RuntimeError):
    """A server gives no answer, or none that the prompt allows; the message says which."""


class Said(NamedTuple):
    """Of a language model's answer what a proposal is made of."""

    instrument: str | None
    probability: float  # of what it likes best
    margin: float | None  # over the runner-up; None where unknown
    abstained: bool
    probabilities: dict[str, float] | None = None  # by instrument and "NO_TRADE", of those that are known
    reason: str = ""


class Parsed(NamedTuple):
    """An answer as it was written; None is a confidence that it does not state."""

    answer: str
    confidence: float | None = None
    reason: str = ""


def parsed(text: str, answers: Sequence[str]) -> Parsed:
    """The bare answer, ``ANSWER | confidence | reason``, or an object of JSON with these three names.

    Raises:
        ServerError: for anything else, such as an answer that is none of those allowed, or one among other words.
    """
    text = text.strip()
    found = (
        of_json(text) if text.startswith("{") else dict(zip(FIELDS, map(str.strip, text.split("|", 2)), strict=False))
    )
    answer, confidence = found["answer"], found.get("confidence")
    if answer not in answers:
        raise ServerError(f"the answer {shown(text[:80])} is none of {answers[0]} to {answers[-1]}")
    if isinstance(confidence, str):
        try:
            confidence = float(confidence)
        except ValueError:
            confidence = math.nan
    if confidence is not None and not (is_number(confidence) and 0 <= confidence <= 1):
        raise ServerError(f"the confidence in {shown(text[:80])} is no number from 0 to 1")
    reason = found.get("reason", "")
    if not isinstance(reason, str):
        raise ServerError(f"the reason in {shown(text[:80])} is no text")
    return Parsed(answer, None if confidence is None else float(confidence), " ".join(reason.split())[:200])


def of_json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "answer" not in found or not found.keys() <= set(FIELDS):
        raise ServerError(f"{shown(text[:80])} is no object with {', '.join(FIELDS)}")
    number = type(found["answer"]) is int  # {"answer": 3} is as clear as {"answer": "3"}
    return found | {"answer": str(found["answer"]) if number else found["answer"]}


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities


class Token(NamedTuple):
    text: str
    probability: float

    @classmethod
    def of(cls, found: dict) -> "Token":
        """Raises TypeError or ValueError for what is none."""
        text, logprob = found["token"], found["logprob"]
        if not isinstance(text, str) or not is_number(logprob) or not logprob <= ROUNDED:
            raise ValueError("a token without its probability")
        return cls(text, math.exp(min(0.0, logprob)))


class Bounds(NamedTuple):
    """What is certain of an answer's probability, and what it may be at most."""

    low: float = 0.0
    high: float = 0.0

    def plus(self, low: float, high: float) -> "Bounds":
        return Bounds(self.low + low, self.high + high)


def scored(positions: Sequence[Sequence[Token]], answers: Sequence[str]) -> dict[str, float] | None:
    """The probability of each answer that the first tokens tell, the least that it is; None where they tell nothing:
    without probabilities, or where the text begins with something else, such as JSON.

    An answer is told by its first token where no other begins with it: NO is NO_TRADE. Where several do, as 1 and 10
    of a model that writes digit by digit, the token that was taken is followed to the next one. Of one that was not
    taken nothing more is known: each of its answers may have all of its probability, and none has it for certain.

    Raises:
        ServerError: where more than one answer may be the most probable.
    """
    if not positions or not positions[0]:
        return None
    bounds = {answer: Bounds() for answer in answers}
    if not group_of(positions[0][0].text.strip(), answers, positions[0]):
        return None
    spread(positions, "", 1.0, answers, bounds)
    best = max(answers, key=lambda answer: bounds[answer].low)
    rivals = [answer for answer in answers if answer != best and bounds[answer].high > bounds[best].low + ROUNDED]
    if rivals:
        raise ServerError(f"its tokens do not tell {best} from {', '.join(rivals)}: set logprobs: false")
    return {answer: its.low for answer, its in bounds.items()}


def spread(
    positions: Sequence[Sequence[Token]], prefix: str, mass: float, answers: Sequence[str], bounds: dict[str, Bounds]
) -> None:
    """Adds to the bounds what the first position says of answers that begin with ``prefix``, whose probability is
    ``mass``."""
    (taken, *_), rest = positions[0], positions[1:]
    listed = {token.text: token for token in reversed(positions[0])}  # the one that was taken is listed twice
    for token in listed.values():
        text, its = prefix + token.text.strip(), mass * token.probability
        group = [prefix] if ends(prefix, token, answers) else group_of(text, answers, positions[0], prefix)
        if len(group) == 1:
            bounds[group[0]] = bounds[group[0]].plus(its, its)
        elif group and token == taken and rest and rest[0]:
            spread(rest, text, its, answers, bounds)
        elif group and token == taken and text in answers:
            # The text ended here, and how likely that was is not said: no digit was likelier, so of the answers of
            # this group it is the best.
            bounds[text] = bounds[text].plus(its / AFTER_A_DIGIT, its)
        else:
            for answer in group:
                bounds[answer] = bounds[answer].plus(0.0, its)


def ends(prefix: str, token: Token, answers: Sequence[str]) -> bool:
    """Whether an answer is over where this token follows: it goes on with digits alone."""
    return prefix in answers and not token.text[:1].isdigit()


def group_of(text: str, answers: Sequence[str], likely: Sequence[Token], prefix: str = "") -> list[str]:
    """The answers that a token may be the beginning of. One that is a token of its own is not written in two."""
    whole = {prefix + one.text.strip() for one in likely}
    return [answer for answer in answers if answer == text or (answer.startswith(text) and answer not in whole)]
