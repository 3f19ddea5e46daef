"""The decisions of a log's last day, to be read one by one: what was known, proposed, stopped and meant, and what came
of it, where that is settled."""

import datetime

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import order_candidates
from covered_call.page.cards import Card, make_card, pnl_text, title_of
from covered_call.runtime.explain import explanation_of, number, order_text, value
from covered_call.runtime.logged import NOT_FILLED, TAKEN, VETOED, Entry, Log
from covered_call.runtime.outcomes_log import Outcomes, Settled

LAST_DAY = "Decisions of the last day"
DAY = datetime.timedelta(days=1)
MOST = 48  # that are shown, the last ones


def cards_of(log: Log, outcomes: Outcomes) -> list[Card]:
    """Of the 24 hours up to the last decision, the last one first; at most MOST."""
    end = log.entries[-1].decision.decision_time
    its = [one for one in log.entries if one.decision.decision_time > end - DAY][-MOST:]
    return [card_of(place, one, outcomes) for place, one in enumerate(reversed(its), 1)]


def card_of(place: int, one: Entry, outcomes: Outcomes) -> Card:
    # By instrument, as the prompt of a language model shows them unless it was tuned on another order.
    decision, _ = order_candidates(one.decision, CoveredCallCandidatesConfig())
    names = [candidate.instrument for candidate in decision.candidates]
    sold = {its["source"]: its["instrument"] for its in one.proposals if not its["error"]}
    if one.meant.fate == TAKEN:
        sold["agent"] = one.meant.instrument
    places = {name: names.index(its) if its in names else None for name, its in sold.items()}
    known = one.line["state"]["context"]
    market = [f"{name} {number(its)}" for name, its in known.items() if its is not None]
    said, came = [answer(one), *proposals(one), *vetoes(one)], hindsight(one, outcomes)
    explanation = " ".join(explanation_of(one.line)[1:])
    return make_card(title_of(place, decision), decision, places, said, came, explanation, market)


def answer(one: Entry) -> str:
    fusion = one.line["fusion"]
    return f"{order_text(one.line['intention'])}; fusion {fusion['method']}; {one.meant.fate}."


def proposals(one: Entry) -> list[str]:
    found = []
    for its in one.proposals:
        sure = f"confidence {number(its['confidence'])} of 1"
        what = f"failed: {its['error']}" if its["error"] else f"proposes {its['instrument'] or 'no trade'}, {sure}"
        found.append(f"{its['source']} {what}.")
    return found


def vetoes(one: Entry) -> list[str]:
    return [f"Veto {its['code']}: {value(its['value'])} against {value(its['limit'])}. {its['text']}"
        for its in one.line["vetoes"]]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What came of it


def hindsight(one: Entry, outcomes: Outcomes) -> list[str]:
    """What the sale brought, or would have, and what the best of the calls would have; one coin's worth each, so that
    it is not what the agent's own size brought."""
    decision, meant = one.decision, one.meant
    names = [candidate.instrument for candidate in decision.candidates]
    settled = {
        name: outcomes[decision.decision_id, name] for name in names if (decision.decision_id, name) in outcomes
    }
    told = [f"{BEGAN[meant.fate]} {worth(settled.get(meant.instrument), decision.spot)}."] if meant.instrument else []
    known = {name: its.pnl_vs_hodl for name, its in settled.items() if its.pnl_vs_hodl is not None}
    told += [] if meant.fate == TAKEN else ["Not selling is 0."]
    if not known or len(known) < len(names):
        return [*told, f"{len(known):,} of {len(names):,} calls are settled."]
    best = max(known, key=known.__getitem__)
    return [*told, best_text(best, known[best], decision.spot, best == meant.instrument)]


BEGAN = {TAKEN: "What was sold:", NOT_FILLED: "What was not filled:", VETOED: "What was stopped:"}


def worth(settled: Settled | None, spot: float) -> str:
    if settled is None:
        return "not settled yet"
    if settled.pnl_vs_hodl is None or settled.settled_at is None:
        return f"never to be known, {settled.why}"
    return f"{pnl_text(settled.pnl_vs_hodl, spot)}, against holding; known at {settled.settled_at:%Y-%m-%d %H:%M} UTC"


def best_text(name: str, usd: float, spot: float, was_meant: bool) -> str:
    if usd <= 0:
        return "No call did better than not selling."
    return "It was the best of the calls." if was_meant else f"The best of the calls, {name}: {pnl_text(usd, spot)}."
