"""The best and the worst trades of a policy, to be read one by one.

Best and worst are by P&L vs HODL in % of spot, which is against not selling: a decision not to sell is 0, and never
among them. What the teacher did, and what that brought, stands beside each.
"""

import math
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import Columns, logged_of, time_of
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import order_candidates
from covered_call.evaluation.cases import Cases, outcome
from covered_call.evaluation.money import premium_of
from covered_call.evaluation.rows import TEACHER, Row
from covered_call.page.cards import Card, make_card, pnl_text, title_of

EXTREMES = 10


class Trade(NamedTuple):
    """A decision at which a policy sold a call: money in USD a unit; ``place`` is where it stands among all."""

    time: str
    instrument: str
    spot: float
    premium: float
    pnl: float
    percent: float
    place: int


def extremes(row: Row, cases: Cases, places: np.ndarray) -> tuple[list[Trade], list[Trade]]:
    """The policy's EXTREMES best trades, and its worst, by % of spot; the worst first of these."""
    columns, picks = cases.columns, row.picks[places]
    of, picks = places[picks >= 0], picks[picks >= 0]
    pnl, premium = outcome(cases, of, picks), premium_of(cases, of, picks)
    percent = 100 * pnl / columns.spot[of]
    order = np.argsort(percent, kind="stable")[: int((~np.isnan(percent)).sum())]

    def trades(which: np.ndarray) -> list[Trade]:
        names = columns.instrument.take(columns.offsets[of[which]] + picks[which]).to_pylist()
        when = [time_of(time).isoformat(timespec="minutes")[:16] for time in columns.time[of[which]].tolist()]
        money = np.stack([columns.spot[of], premium, pnl, percent], axis=1)[which].tolist()
        rows = zip(when, names, money, of[which].tolist(), strict=True)
        return [Trade(time, name, *usd, place) for time, name, usd, place in rows]

    return trades(order[::-1][:EXTREMES]), trades(order[:EXTREMES])


# ---------------------------------------------------------------------------------------------------------------------
# To be read


def cards_of(
    trades: list[Trade], row: Row, cases: Cases, options: CoveredCallCandidatesConfig, explained: dict[int, str]
) -> list[Card]:
    """
    Args:
        row: of the policy whose trades these are.
        explained: its own explanations, by the place of the decision.
    """
    its = logged_of(cases.columns.take(np.array([trade.place for trade in trades], np.int64)))
    # As Policy shows them: a model tuned on shuffled candidates is asked in the order of instruments.
    shown = CoveredCallCandidatesConfig(candidate_order="csv" if options.candidate_order == "csv" else "instrument")
    cards = []
    for number, (trade, logged) in enumerate(zip(trades, its, strict=True), 1):
        decision, order = order_candidates(logged.decision, shown)
        pick, teacher = int(row.picks[trade.place]), logged.chosen
        sold = {row.name: order.index(pick), TEACHER: None if teacher is None else order.index(teacher)}
        said = answers(trade, sold, row.name, probability(row, cases.columns, trade.place))
        came = hindsight(trade, cases, pick, teacher)
        cards.append(make_card(title_of(number, decision), decision, sold, said, came, explained.get(trade.place, "")))
    return cards


def answers(trade: Trade, sold: dict[str, int | None], name: str, sure: float | None) -> list[str]:
    premium = "" if math.isnan(trade.premium) else f", premium {trade.premium:,.2f} USD"
    sureness = "" if sure is None else f", probability {sure:.1%}"
    answer = f"{name[0].upper()}{name[1:]} sells {trade.instrument}{premium}{sureness}."
    mine, its = sold[name], sold[TEACHER]
    if name == TEACHER or mine == its:
        return [answer, "Teacher sells the same."]
    return [answer, "Teacher does not sell." if its is None else f"Teacher sells number {its + 1}."]


def probability(row: Row, columns: Columns, place: int) -> float | None:
    """That of its answer, of per_candidate that of selling this call; None of a policy that says none."""
    if row.said is None:
        return None
    its = row.said.probability[row.said.of == place]
    return float(its[0] if len(row.said.of) == len(columns) else its[row.picks[place]])


def hindsight(trade: Trade, cases: Cases, pick: int, teacher: int | None) -> list[str]:
    """What the answer brought, what the teacher's did, and what the best of the calls would have."""
    of = np.array([trade.place])
    its = float(outcome(cases, of, np.array([-1 if teacher is None else teacher]))[0])
    came = [f"It brought {pnl_text(trade.pnl, trade.spot)}."]
    if teacher != pick:
        came.append(f"Teacher: {'0 USD' if teacher is None else pnl_text(its, trade.spot)}.")
    return [*came, *best_text(trade, cases, pick, teacher)]


def best_text(trade: Trade, cases: Cases, pick: int, teacher: int | None) -> list[str]:
    """What the best of the calls would have brought, where all of them are computed."""
    rows = slice(*cases.columns.offsets[trade.place : trade.place + 2].tolist())
    computed = cases.computed[rows]
    if np.isnan(computed).any():
        return []
    best = int(computed.argmax())
    if computed[best] <= 0:
        return ["No call beat holding."]
    if best in (pick, teacher):
        return ["It was the best call." if best == pick else "Teacher's was the best call."]
    name = cases.columns.instrument[rows][best].as_py()
    return [f"Best call, {name}: {pnl_text(float(computed[best]), trade.spot)}."]
