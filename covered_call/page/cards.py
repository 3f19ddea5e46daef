"""Decisions to be read, each in some ten seconds: what was known, what was answered and why, and, apart from that and
marked as hindsight, what came of it."""

import math
from typing import NamedTuple

from covered_call.candidates.context_lines import context_block
from covered_call.candidates.prompts import fields_of_state, opinion_of_candidate, opinion_of_decision
from covered_call.candidates.schema import Candidate, Decision
from covered_call.tables import markdown

HINDSIGHT = "Hindsight, not known when this was decided"
MOST_CALLS = 6  # that a card shows
FIRST_LINES = 3  # of the market's context: returns, vols, trend
HEAD = [
    "no.",
    "call",
    "sold by",
    "strike, USD",
    "DTE, days",
    "delta",
    "score, points",
    "IV, 1 = 100 % a year",
    "IV / realised vol",
]
OPINION = "outcome model, of spot"  # where the prompt has an opinion
UNITS = (
    "USD are those of one coin. In the market's context vols are a year's, 1 = 100 %, returns and distances are of "
    "the price, RSI is from 0 to 100, a place in a range or a rank from 0 to 1, and what is over a mean is a ratio."
)


class Card(NamedTuple):
    """A decision. The texts of ``said`` are on a line each, the first one is the answer.

    Args:
        context: of the market, as the prompt says it; ``more`` is what can be left for later.
        calls: texts of the candidates, their head first, numbered as a prompt numbers them; ``left_out`` counts the
            others.
        explanation: why, in words; "" where there are none.
        hindsight: what came of it.
    """

    title: str
    said: list[str]
    context: list[str]
    more: list[str]
    calls: list[list[str]]
    left_out: int
    explanation: str
    hindsight: list[str]


def make_card(
    title: str,
    decision: Decision,
    sold: dict[str, int | None],
    said: list[str],
    hindsight: list[str],
    explanation: str = "",
    context: list[str] | None = None,
) -> Card:
    """
    Args:
        decision: its candidates in the order of the prompt.
        sold: by whom which of them is sold, from 0.
        context: lines that stand for those of the decision, where it has none.
    """
    lines = [*(context_lines(decision) or context or []), *filter(None, [opinion_of_decision(decision).strip()])]
    places = shown_places(decision.candidates, [place for place in sold.values() if place is not None])
    calls = [[*HEAD, OPINION] if decision.opinion else HEAD, *(call_row(decision, place, sold) for place in places)]
    left_out = len(decision.candidates) - len(places)
    return Card(title, said, lines[:FIRST_LINES], lines[FIRST_LINES:], calls, left_out, explanation, hindsight)


def context_lines(decision: Decision) -> list[str]:
    return [line.strip().removeprefix("- ") for line in context_block(decision.context).splitlines()[1:]]


def shown_places(candidates: tuple[Candidate, ...], sold: list[int]) -> list[int]:
    """Those that somebody sells, and of the others those of the highest score, in the prompt's order."""
    order = sorted(range(len(candidates)), key=lambda place: (place not in sold, -candidates[place].score))
    return sorted(order[:MOST_CALLS])


def call_row(decision: Decision, place: int, sold: dict[str, int | None]) -> list[str]:
    candidate = decision.candidates[place]
    its = fields_of_state(candidate)
    by = ", ".join(name for name, pick in sold.items() if pick == place)
    numbers = (its[name] for name in ("strike", "dte", "delta", "score", "iv", "ivrv_ratio"))
    opinion = filter(None, [opinion_of_candidate(decision, candidate, "{opinion}")])
    return [str(place + 1), candidate.instrument, by, *numbers, *opinion]


def title_of(number: int, decision: Decision) -> str:
    when = f"{decision.decision_time:%Y-%m-%d %H:%M} UTC"
    return f"{number}. {when}, {decision.underlying} at {decision.spot:,.2f} USD"


def pnl_text(usd: float, spot: float) -> str:
    """Of one coin's worth of calls; unknown where it is NaN."""
    return "unknown" if math.isnan(usd) else f"{usd:+,.2f} USD, {100 * usd / spot:+.2f}% of spot"


def left_out_text(card: Card) -> str:
    """They have lower scores than those that are shown and that nobody sells."""
    if not card.left_out:
        return ""
    return f"And {card.left_out:,} more call{'s' if card.left_out > 1 else ''}, of lower score."


def card_markdown(card: Card, level: int = 4) -> str:
    answer, *others = card.said
    parts = [
        f"{'#' * level} {card.title}",
        f"**{answer}**",
        *others,
        "; ".join([*card.context, *card.more]),
        markdown(card.calls) if len(card.calls) > 1 else "No call was offered.",
        left_out_text(card),
        f"Its explanation: {card.explanation}" if card.explanation else "",
        f"> **{HINDSIGHT}.** {' '.join(card.hindsight)}",
    ]
    return "\n\n".join(filter(None, parts))
