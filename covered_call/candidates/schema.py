"""What a decision is, and what its values may be: one list of rules, for a row of a file and for a decision that a
program makes.

State and outcome are separate types: a prompt is rendered from the state alone.
"""

import collections
import datetime
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

COLUMNS = (
    "decision_time", "underlying", "spot", "instrument", "strike", "dte", "delta", "score", "iv", "ivrv_ratio",
    "exit_style", "trade_executed", "chosen", "action", "strategy", "reward", "pnl_vs_hodl", "max_drawdown_pct",
)  # fmt: skip
OPTIONAL_COLUMNS = ("strategy", "max_drawdown_pct")  # of which nothing is decided: a file may be without them
# Of a backtest at real quotes: prices in USD a coin and contracts, which are for its readers, and outcome_days.
QUOTE_COLUMNS = ("bid", "ask", "mark", "open_interest")
QUOTED_COLUMNS = (*QUOTE_COLUMNS, "outcome_days")
# Of a chain as a whole, where a file is made of snapshots: context_columns may name them.
ATM_IV = "atm_iv"
CHAIN_COLUMNS = ("put_call_oi", ATM_IV)
KEY = ("decision_time", "underlying", "exit_style")  # of a decision
NO_CANDIDATES = "NO_CANDIDATES"
SELL_CALL, SKIP, NO_TRADE = "SELL_CALL", "SKIP", "NO_TRADE"
MAX_DTE = 36_500  # days; a hundred years keeps the expiry a valid date
MAX_IV = 5.0  # a fraction a year; above it an iv is taken for a percentage
MAX_NAME = 100  # characters of an instrument, an underlying or an exit style
UTC = datetime.UTC
FLAGS = {"0": 0, "0.0": 0, "False": 0, "1": 1, "1.0": 1, "True": 1}  # what a cell of trade_executed and chosen means


class Candidate(NamedTuple):
    """One call option as it stood at decision time: money in USD, dte in days, iv as a fraction a year."""

    instrument: str
    strike: float
    dte: float
    delta: float
    score: float
    iv: float | None
    ivrv_ratio: float | None


Context = Mapping[str, float | str | None]  # words as words; None where unknown


class Opinion(NamedTuple):
    """What a model of outcomes, which was fitted before, expects of selling each call of a decision.

    Args:
        fitted_before: no outcome that it was fitted on ended after this; None where there is no such model.
        of: by instrument the net outcome that it expects, in % of spot, and the probability that it is positive.
    """

    fitted_before: datetime.datetime | None
    of: Mapping[str, tuple[float, float]]

    @classmethod
    def from_dict(cls, state: dict) -> "Opinion":
        """Raises CandidatesError unless it is what to_dict gives."""
        time = state.get("fitted_before") if isinstance(state, dict) else None
        of = state.get("of") if isinstance(state, dict) else None
        parsed = iso_time(time) if isinstance(time, str) else None
        if not isinstance(of, dict) or (time is not None and parsed is None):
            raise CandidatesError(f"opinion: {shown(state)} is no dict of fitted_before and, by instrument, of.")
        both = {name: tuple(pair) if isinstance(pair, (list, tuple)) else (pair,) for name, pair in of.items()}
        return cls(None if parsed is None else utc(parsed), both)

    def to_dict(self) -> dict:
        time = self.fitted_before
        return {"fitted_before": time and time.isoformat(), "of": {name: list(pair) for name, pair in self.of.items()}}


class Decision(NamedTuple):
    """All that a policy may know at one decision: the time (UTC), the market, and its candidates."""

    decision_time: datetime.datetime
    underlying: str
    exit_style: str
    spot: float
    candidates: tuple[Candidate, ...]
    context: Context | None = None  # of the market, by name, where a policy is asked with one
    opinion: Opinion | None = None  # of a model of outcomes, where a policy is asked with one

    @classmethod
    def from_dict(cls, state: dict, max_iv: float | None = None) -> "Decision":
        """A decision from JSON's types: ``decision_time`` is ISO 8601, ``candidates`` a list of dicts by column name.

        ``iv`` and ``ivrv_ratio`` may be missing or None; for ``max_iv`` see check_decision.

        Raises:
            CandidatesError: for a key that is missing or unknown, and for what check_decision refuses.
        """
        state = fields_of(cls, state, "the decision")
        time = state["decision_time"]
        text = time.isoformat() if isinstance(time, datetime.datetime) else time
        parsed = iso_time(text) if isinstance(text, str) else None
        if parsed is None:
            raise CandidatesError(f"decision_time: {shown(time)} {NO_TIME}.")
        rows = state["candidates"]
        if not isinstance(rows, (list, tuple)):
            raise CandidatesError(f"candidates: {shown(rows)} is no list of candidates.")
        known = [fields_of(Candidate, row, f"candidate {place}") for place, row in enumerate(rows, start=1)]
        candidates = tuple(Candidate(**fields) for fields in known)
        fields: dict[str, Any] = state | {"decision_time": utc(parsed), "candidates": candidates}
        if state["opinion"] is not None:
            fields["opinion"] = Opinion.from_dict(state["opinion"])
        decision = cls(**fields)
        check_decision(decision, max_iv)
        return decision

    def to_dict(self) -> dict:
        """What from_dict takes, and json.dumps too."""
        candidates = [candidate._asdict() for candidate in self.candidates]
        state = self._asdict() | {"decision_time": self.decision_time.isoformat(), "candidates": candidates}
        if self.opinion is not None:
            state["opinion"] = self.opinion.to_dict()
        for name in ("context", "opinion"):
            if state[name] is None:
                del state[name]
        return state

    @property
    def decision_id(self) -> str:
        return f"{self.underlying}|{self.decision_time.isoformat()}|{self.exit_style}"

    @property
    def last_expiry(self) -> datetime.datetime:
        return self.decision_time + datetime.timedelta(days=max((c.dte for c in self.candidates), default=0.0))


class Outcome(NamedTuple):
    """What the file says of a candidate afterwards, in USD and percent; None where it is blank or NaN.

    ``outcome_days`` is when: days from the decision to the last price that it rests on. A file that says so has the
    outcomes of calls that were not sold, too.
    """

    reward: float | None
    pnl_vs_hodl: float | None
    max_drawdown_pct: float | None
    outcome_days: float | None = None


class Counterfactual(NamedTuple):
    """What selling a candidate would have brought, sold or not: P&L vs HODL in USD a unit of underlying, net of the
    costs that are set; and these costs. None where unknown; ``label_end`` is the time of the last price it rests on.
    """

    pnl_vs_hodl: float | None
    label_end: datetime.datetime
    costs: float | None = 0.0


class LoggedDecision(NamedTuple):
    """A decision with what the teacher did: ``chosen`` is an index into the candidates, None for no trade."""

    decision: Decision
    chosen: int | None
    outcomes: tuple[Outcome, ...]
    counterfactuals: tuple[Counterfactual, ...] = ()

    @property
    def label_end(self) -> datetime.datetime:
        return max(
            (counterfactual.label_end for counterfactual in self.counterfactuals), default=self.decision.last_expiry
        )


class CandidatesError(ValueError):
    """The files or the options cannot be used as they are; the message says why and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str, limit: int = 4_000) -> str:
    """One line for a terminal: what would steer it is written out, and what is too long is cut."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])
    return text if len(text) < limit else f"{text[:limit]} ..."


def shown(value, limit: int = 200) -> str:
    """A value as a message shows it."""
    text = repr(value[: 2 * limit]) if isinstance(value, (str, bytes)) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


# The least and the most of each number; iv has a limit of its own in the options.
NUMBERS = {
    "spot": (0.0, math.inf), "strike": (0.0, math.inf), "dte": (0.0, MAX_DTE), "delta": (-1.0, 1.0),
    "score": (-math.inf, math.inf), "iv": (0.0, math.inf), "ivrv_ratio": (-math.inf, math.inf),
    "outcome_days": (0.0, MAX_DTE),
}  # fmt: skip
ABOVE_ZERO = ("spot", "strike")
MAY_LACK = ("iv", "ivrv_ratio")
MAY_BE_LEFT_OUT = (*MAY_LACK, "context", "opinion")
NO_TIME = "is not an ISO 8601 time such as 2024-09-01T00:00:00+00:00"
# Every special token of the common chat formats has one of these: <|end|>, <s>, [INST], {{, <｜User｜>. The bar also
# divides the parts of a decision's id, and a quote is one that a CSV lost.
NOT_IN_A_NAME = '<>[]{}|｜"'
DERIBIT_NAME = re.compile(r"([A-Z0-9]+)(?:_[A-Z]+)?-(\d{1,2}[A-Z]{3}\d{2})-(\d+(?:[d.]\d+)?)-C")


def wrong_number(name: str, value: float, max_iv: float) -> str | None:
    """Why this cannot be the number of that column; None if it can."""
    low, high = NUMBERS.get(name, (-math.inf, math.inf))
    high = max_iv if name == "iv" else high
    if low <= value <= high and math.isfinite(value) and (value or name not in ABOVE_ZERO):
        return None
    if not math.isfinite(value):
        return "is not finite"
    if value == 0:
        return "is zero, and must be above"
    if name == "iv" and value > 0:
        return (
            f"is above {max_iv:g}: iv is a fraction a year, 0.7 for 70 %. If it is a percentage, divide the column by "
            "100; if it is meant, raise the option max_iv"
        )
    return "is negative" if low == 0.0 and value < 0 else f"is outside [{low:g}, {high:g}]"


@functools.lru_cache(maxsize=16_384)
def wrong_name(text: str) -> str | None:
    """Why this cannot be a name that a prompt shows; None if it can."""
    if not text or not text.isprintable():  # a line break would write its own line into the prompt
        return "is blank or not printable text"
    if len(text) > MAX_NAME:
        return f"is longer than {MAX_NAME} characters"
    found = next((character for character in text if character in NOT_IN_A_NAME), None)
    return found and f"holds {found!r}, which names must not: chat formats mark their turns with it"


def wrong_instrument(name: str) -> str | None:
    if name.upper().endswith("-P"):
        return "is a put, and only calls are sold against the coin. Leave puts out"
    return None


def contradicts_name(name: str, underlying: str, strike: float, expiry: datetime.datetime) -> str | None:
    """The column that contradicts an instrument's own name; "" if none does, None if the name says nothing.

    A name such as BTC-08SEP24-63000-C is Deribit's: its expiry is at 08:00 UTC. That of the columns may be up to a day
    from it, for dte may be rounded. BTC_USDC-08SEP24-63000-C is of BTC, and of BTC_USDC.
    """
    named = named_call(name)
    if named is None:
        return None
    if underlying.upper() not in (named[0], name.partition("-")[0]):
        return "underlying"
    if named[1] != strike:
        return "strike"
    return "" if abs(named[2] - expiry) <= ONE_DAY else "decision_time"


ONE_DAY = datetime.timedelta(days=1)


@functools.lru_cache(maxsize=16_384)
def named_call(name: str) -> tuple[str, float, datetime.datetime] | None:
    """Underlying, strike and expiry, as an instrument's own name says them; None where it does not."""
    parts = DERIBIT_NAME.fullmatch(name)
    expiry = parts and expiry_of(parts[2])
    return (parts[1], float(parts[3].replace("d", ".")), expiry) if parts and expiry else None


@functools.lru_cache(maxsize=4096)
def expiry_of(day: str) -> datetime.datetime | None:
    try:
        return datetime.datetime.strptime(day, "%d%b%y").replace(hour=8, tzinfo=UTC)
    except ValueError:
        return None


def check_decision(decision: Decision, max_iv: float | None = None) -> None:
    """Holds a decision that a program makes to the rules for one of a file.

    Args:
        max_iv: as the option of that name; None for its default.

    Raises:
        CandidatesError: names the decision's candidate, the field and its value, and what is wrong with it.
    """
    max_iv = MAX_IV if max_iv is None else max_iv
    if not isinstance(decision, Decision):
        raise CandidatesError(f"{shown(decision)} is no Decision. From a dict: Decision.from_dict.")
    time = decision.decision_time
    if not isinstance(time, datetime.datetime) or time.tzinfo is None or iso_time(time.isoformat()) is None:
        raise CandidatesError(f"decision_time: {shown(time)} is not a datetime with a time zone.")
    for name in ("underlying", "exit_style"):
        check_name(name, getattr(decision, name), "the decision")
    check_context(decision.context)
    check_opinion(decision)
    if not isinstance(decision.candidates, tuple) or not all(isinstance(c, Candidate) for c in decision.candidates):
        raise CandidatesError(f"candidates: {shown(decision.candidates)} is not a tuple of Candidate.")
    if decision.candidates:
        check_number("spot", decision.spot, "the decision", max_iv)
    for place, candidate in enumerate(decision.candidates, start=1):
        where = f"candidate {place} of {decision.decision_id}"
        check_name("instrument", candidate.instrument, where)
        for name in Candidate._fields[1:]:
            check_number(name, getattr(candidate, name), where, max_iv)
    names = collections.Counter(candidate.instrument for candidate in decision.candidates)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise CandidatesError(f"{decision.decision_id}: the instrument {shown(twice[0])} stands there twice.")


def check_context(context: Context | None) -> None:
    if context is not None and not isinstance(context, Mapping):
        raise CandidatesError(f"context: {shown(context)} is no dict of numbers by name.")
    for name, value in (context or {}).items():
        check_name("context", name, "the decision")
        if isinstance(value, str):
            check_name(f"context {name}", value, "the decision")
        elif value is not None:
            check_number(f"context {name}", value, "the decision", MAX_IV)


def check_opinion(decision: Decision) -> None:
    """Raises CandidatesError for numbers that cannot be, and for one of a model that was fitted on what came later."""
    time, of = decision.opinion or Opinion(None, {})
    if of and time is None:
        raise CandidatesError(f"{decision.decision_id}: its opinion does not say fitted_before.")
    if time is not None and time > decision.decision_time:
        raise CandidatesError(
            f"{decision.decision_id}: its opinion is of a model with fitted_before {time.isoformat()}, which is after "
            "the decision: a leak. Give one of a model that was fitted earlier."
        )
    for name, pair in of.items():
        if len(pair) != 2 or not all(is_number(one) and math.isfinite(one) for one in pair) or not 0 <= pair[1] <= 1:
            raise CandidatesError(
                f"{decision.decision_id}, opinion of {shown(name)}: {shown(pair)} is no % of spot and probability."
            )


def checked_decision(state: Decision | dict, max_iv: float | None) -> Decision:
    """A decision, or what Decision.from_dict makes one of, that check_decision has passed."""
    if isinstance(state, dict):
        return Decision.from_dict(state, max_iv)
    check_decision(state, max_iv)
    return state


def is_number(value) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def check_name(name: str, text, where: str) -> None:
    reason = wrong_name(text) if isinstance(text, str) else "is not text"
    if reason is None and text == NO_CANDIDATES:
        reason = "is for files: give a decision without candidates instead"
    if reason is None and name == "instrument":
        reason = wrong_instrument(text)
    if reason:
        raise CandidatesError(f"{where}, {name}: {shown(text)} {reason}.")


def check_number(name: str, value, where: str, max_iv: float) -> None:
    if value is None and name in MAY_LACK:
        return
    if not is_number(value):
        raise CandidatesError(f"{where}, {name}: {shown(value)} is not a number.")
    try:
        reason = wrong_number(name, float(value), max_iv)
    except OverflowError:  # an integer beyond all floats
        reason = "is not finite"
    if reason:
        raise CandidatesError(f"{where}, {name}: {shown(value)} {reason}.")


def fields_of(kind: type[Candidate] | type[Decision], state, where: str) -> dict[str, Any]:
    """The dict of a named tuple's fields; None for those that may be missing."""
    if not isinstance(state, dict):
        raise CandidatesError(f"{where}: {shown(state)} is no dict of {', '.join(kind._fields)}.")
    for name in kind._fields:
        if name not in state and name not in MAY_BE_LEFT_OUT:
            raise CandidatesError(f"{where} has no {name}: give {', '.join(kind._fields)}.")
    strange = [name for name in state if name not in kind._fields]
    if strange:
        raise CandidatesError(f"{where}: {shown(strange[0])} is not known: give {', '.join(kind._fields)}.")
    return {name: state.get(name) for name in kind._fields}


@functools.lru_cache(maxsize=4096)
def iso_time(text: str) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(text)
        utc(time) + datetime.timedelta(days=MAX_DTE)  # at the ends of the calendar there is no UTC time, or no expiry
        return time
    except (ValueError, OverflowError):
        return None


def utc(time: datetime.datetime) -> datetime.datetime:
    """The same time in UTC; one without an offset is taken to be UTC."""
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
