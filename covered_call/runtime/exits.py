"""When a call that was sold is bought back, and what is sold next. Entries are another matter, and do not change here.

hold: never, a call lives to its expiry. tp_and_roll: the teacher's rule on live quotes: it is bought back at the ask
once enough of its premium is earned, or in defence, and rolled. others_live: another live agent's: it is rolled when
its expiry is close.
"""

import datetime
from typing import NamedTuple

from covered_call.candidates.schema import Candidate, CandidatesError, shown
from covered_call.candidates.settlement import ROLL_MIN_SCORE, TEACHER
from covered_call.runtime.risk import expiry_day
from covered_call.runtime.state import CLOSE, HOLD, ROLL, SELL_CALL, Intention, MarketState, Portfolio, Position

STYLES = ("hold", "tp_and_roll", "others_live")
DAY = datetime.timedelta(days=1)
LAST_DAY, IN_THE_MONEY_DAYS = 1.0, 2.0  # of others_live: days to expiry from which on a call is rolled
CLOSE_TO_STRIKE = 0.02  # of spot, out of the money
ROUNDED_UP = 1 + 1e-9  # an ask of the very share of the premium counts, whatever floats round


class Exit(NamedTuple):
    """What becomes of an open call.

    Args:
        action: HOLD, CLOSE or ROLL.
        reason: "take_profit", "defence", "last_day", "in_the_money", "near_the_money"; of HOLD "no_ask" where it would
            be bought back and nobody sells it, "expired", which is for settlement, or "".
        intentions: to be ordered one after the other: nothing, the buy-back, or the buy-back and then a sale. Where
            the buy-back is not filled there is no sale. A sale is an entry, and vetoed as one.
    """

    action: str
    position: Position
    reason: str
    intentions: tuple[Intention, ...] = ()


def exits_of(state: MarketState, portfolio: Portfolio, style: str, now: datetime.datetime) -> list[Exit]:
    """One for each open call of the state's underlying, in the portfolio's order.

    Raises:
        CandidatesError: for a style that is none of STYLES.
    """
    if style not in STYLES:
        raise CandidatesError(f"exit={shown(style)}: choose one of {', '.join(STYLES)}.")
    its = [one for one in portfolio.positions if one.underlying == state.decision.underlying]
    return [exit_of(one, state, style, now) for one in its]


def exit_of(position: Position, state: MarketState, style: str, now: datetime.datetime) -> Exit:
    if position.expiry <= now:
        return Exit(HOLD, position, "expired")
    quote = state.quotes.get(position.instrument)
    ask = quote.ask if quote else None
    days = (position.expiry - now) / DAY
    if style == "tp_and_roll":
        reason = teacher_reason(position, state.decision.spot, ask, days)
    else:
        reason = last_days_reason(position, state.decision.spot, days) if style == "others_live" else ""
    if not reason or ask is None:
        return Exit(HOLD, position, "no_ask" if reason else "")
    into = successor(position, state, later=style == "others_live")
    return close_and_roll(position, state, reason, ask, into)


def teacher_reason(position: Position, spot: float, ask: float | None, days: float) -> str:
    """Why TEACHER buys back, "" if it does not; both only while days are left, and not after its last roll."""
    if days <= TEACHER.min_dte_to_roll or position.rolls >= TEACHER.max_rolls:
        return ""
    enough = (1 - TEACHER.take_profit) * position.entry_price
    if ask is not None and ask <= enough * ROUNDED_UP:
        return "take_profit"
    return "defence" if spot / position.strike >= TEACHER.defend else ""


def last_days_reason(position: Position, spot: float, days: float) -> str:
    if days < LAST_DAY:
        return "last_day"
    if spot > position.strike and days <= IN_THE_MONEY_DAYS:
        return "in_the_money"
    near = spot <= position.strike and (position.strike - spot) / spot < CLOSE_TO_STRIKE
    return "near_the_money" if near and days <= LAST_DAY else ""


def close_and_roll(position: Position, state: MarketState, reason: str, ask: float, into: Candidate | None) -> Exit:
    """The buy-back at the ask, and the sale of as many coins of the successor, if there is one."""
    units = abs(position.units)
    order = f"{state.decision.decision_id}|{{}}|{position.instrument}"  # orders of one cycle are told apart
    close = Intention(CLOSE, order.format(CLOSE), position.instrument, units, ask, (reason,))
    if into is None:
        return Exit(CLOSE, position, reason, (close,))
    quote = state.quotes.get(into.instrument)
    bid = quote.bid if quote else None
    sale = Intention(SELL_CALL, order.format(ROLL), into.instrument, units, bid, ("roll", reason), position.instrument)
    return Exit(ROLL, position, reason, (close, sale))


def successor(position: Position, state: MarketState, later: bool) -> Candidate | None:
    """What is sold next: the best score from ROLL_MIN_SCORE on, of another instrument; of equals the lowest strike.
    None ends the chain. later: of a later expiry alone, where its nearness is what the call is rolled for."""
    good = [
        one
        for one in state.decision.candidates
        if one.score >= ROLL_MIN_SCORE
        and one.instrument != position.instrument
        and (not later or ends(one, state) > expiry_day(position.instrument, position.expiry))
    ]
    return min(good, key=lambda one: (-one.score, one.strike, one.instrument), default=None)


def ends(one: Candidate, state: MarketState) -> datetime.date:
    return expiry_day(one.instrument, state.decision.decision_time + one.dte * DAY)
