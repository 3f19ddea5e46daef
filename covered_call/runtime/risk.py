"""What stops an order: one small rule for each risk, all evaluated, all that are broken returned with their numbers.

An entry has to keep all of them. An exit takes risk away: the kill switch alone stops it.

What a quote does not say (a bid, an ask, the open interest, an implied vol that is limited) stops an entry. What the
account or the past does not say (margin, peaks, IV/RV, a level) is a note: the rule was not applied, and the log says
so.
"""

import datetime
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from covered_call.candidates.schema import UTC, Candidate, CandidatesError, named_call, shown
from covered_call.runtime.state import ENTRIES, EXITS, Intention, MarketState, Portfolio, Quote, Veto

ROUNDED = 1e-9  # coins or percent: what floats round away breaks no limit
ENTRY_MARGIN = 0.9  # of the margin that is allowed: from there on nothing new is sold
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@dataclass(frozen=True)
class RiskRules:
    """The limits, and their defaults.

    Args:
        without: codes of rules that are not applied; the kill switch always is.
        kill_switch: stops every order, exits too.
        max_positions: short calls of an underlying at once; 6 in research.
        expiry_share: of the holdings, what calls of one expiry may be short of.
        max_margin_pct: of the margin; entries stop at ENTRY_MARGIN of it.
        max_net_delta: coins of an underlying, after the trade.
        daily_drawdown_pct: of this UTC day's peak; 0: not applied.
        max_drawdown_pct, dd_buffer: of the peak of all times, and the share of it that has to be left.
        consecutive_losses: of the last closed trades.
        loss_cooldown_days: after the last closed trade the vetoes for losses are lifted: else nothing would be traded
            again, and they would stay.
        min_win_rate, win_rate_trades, min_trades: of so many closed trades, once there are so many.
        max_spread_pct: of the middle. Of the real BTC candidates that were looked at, 5 % passes 18 %.
        min_open_interest: contracts.
        min_premium_usd: of the bid, a coin.
        max_iv, min_iv: at the money, a fraction a year; None: not applied.
        min_ivrv: of the call, where it is known; 1.2 in production.
        near_level, near_level_pct: whether nothing is sold from so close below a broken resistance on: see
            market.teacher.Broken.
        blocked_hours, blocked_weekdays: UTC, 0 to 23 and Mon to Sun.
        max_age_s, max_clock_skew_s: of a snapshot.
        drift_stops: whether a feature outside a policy's training is a veto, not a note.

    Raises:
        CandidatesError: for a value that cannot be.
    """

    without: Collection[str] = ()
    kill_switch: bool = False
    max_positions: int = 1
    expiry_share: float = 1.0
    max_margin_pct: float = 80.0
    max_net_delta: float = 5.0
    daily_drawdown_pct: float = 0.0
    max_drawdown_pct: float = 25.0
    dd_buffer: float = 0.2
    consecutive_losses: int = 3
    loss_cooldown_days: float = 7.0
    min_win_rate: float = 0.4
    win_rate_trades: int = 50
    min_trades: int = 10
    max_spread_pct: float = 5.0
    min_open_interest: float = 50.0
    min_premium_usd: float = 50.0
    max_iv: float | None = None
    min_iv: float | None = None
    min_ivrv: float = 1.0
    near_level: bool = False
    near_level_pct: float = 0.2
    blocked_hours: Collection[int] = ()
    blocked_weekdays: Collection[str] = ()
    max_age_s: float = 900.0
    max_clock_skew_s: float = 5.0
    drift_stops: bool = False

    def __post_init__(self):
        choices = {"without": set(ENTRY_RULES), "blocked_hours": set(range(24)), "blocked_weekdays": set(WEEKDAYS)}
        for name, known in choices.items():
            strange = [one for one in getattr(self, name) if one not in known]
            if strange:
                raise CandidatesError(f"{name}: {shown(strange[0])} is none of {', '.join(map(str, sorted(known)))}.")
        for name in ("consecutive_losses", "min_trades", "max_drawdown_pct"):
            if not getattr(self, name) > 0:
                raise CandidatesError(
                    f"{name}={getattr(self, name)!r}: give a number above 0, or name its rule in without."
                )


class Note(NamedTuple):
    """A rule of risk that says something, and stops nothing."""

    code: str
    value: float | str | None
    limit: float | str | None
    text: str


class Case(NamedTuple):
    """What is judged, and all that it is judged by.

    Args:
        now: by the clock of whoever orders; with a time zone.
        killed: whether the kill switch is on, wherever it was thrown.
        ordered: decision ids that were ordered before.
        drift: where the decision lies outside a policy's training, as drift.drift_of says it.
        clock_skew_s: of the own clock against the exchange's.
    """

    intention: Intention
    state: MarketState
    portfolio: Portfolio
    now: datetime.datetime
    killed: bool = False
    ordered: Collection[str] = ()
    drift: Sequence[str] = ()
    clock_skew_s: float = 0.0

    @property
    def underlying(self) -> str:
        return self.state.decision.underlying

    @property
    def candidate(self) -> Candidate:
        """The call that is sold. Raises CandidatesError where it is not offered."""
        found = [one for one in self.state.decision.candidates if one.instrument == self.intention.instrument]
        if not found:
            raise CandidatesError(
                f"{self.intention.decision_id}: {shown(self.intention.instrument)} is to be sold, and is not offered."
            )
        return found[0]

    @property
    def quote(self) -> Quote:
        name = self.candidate.instrument
        return self.state.quotes.get(name, Quote(name, None, None, None, None))

    @property
    def held(self) -> float:
        return self.portfolio.holdings.get(self.underlying, 0.0)


Finding = Veto | Note | None


def vetoes_of(
    intention: Intention,
    state: MarketState,
    portfolio: Portfolio,
    rules: RiskRules,
    now: datetime.datetime,
    **more: Any,
) -> list[Veto]:
    """What stops an intention; none for one that orders nothing. more: killed, ordered, drift, clock_skew_s of Case.

    Raises:
        CandidatesError: for a sale of what is not offered.
    """
    case = Case(intention, state, after_buy_back(portfolio, intention, state), now, **more)
    return [one for one in findings(case, rules) if isinstance(one, Veto)]


def notes_of(
    intention: Intention,
    state: MarketState,
    portfolio: Portfolio,
    rules: RiskRules,
    now: datetime.datetime,
    **more: Any,
) -> list[Note]:
    """What is to be logged of an entry and stops nothing: rules that could not be applied, and drift."""
    case = Case(intention, state, after_buy_back(portfolio, intention, state), now, **more)
    return [one for one in findings(case, rules) if isinstance(one, Note)]


def findings(case: Case, rules: RiskRules) -> list[Finding]:
    if case.intention.action in EXITS:
        return [kill_switch(case, rules)]
    if case.intention.action not in ENTRIES:
        return []
    applied = [rule for code, rule in ENTRY_RULES.items() if code not in rules.without]
    return [kill_switch(case, rules), *(rule(case, rules) for rule in applied)]


# ---------------------------------------------------------------------------------------------------------------------
# The account


def kill_switch(case: Case, rules: RiskRules) -> Finding:
    if case.killed or rules.kill_switch:
        return Veto("kill_switch", "on", "off", "The kill switch is on: nothing is ordered.")


def no_equity(case: Case, rules: RiskRules) -> Finding:
    equity = case.portfolio.equity_usd
    if equity is None or not equity > 0:
        return Veto("no_equity", equity, 0.0, f"The equity is {said(equity)}, and must be above 0.")


def not_covered(case: Case, rules: RiskRules) -> Finding:
    units, free = case.intention.units, free_units(case.portfolio, case.underlying)
    if not units <= free + ROUNDED:
        return Veto("not_covered", units, free, f"{units:g} coins are to be sold against, and {free:g} are free.")


def max_positions(case: Case, rules: RiskRules) -> Finding:
    count = sum(one.underlying == case.underlying for one in case.portfolio.positions)
    if count >= rules.max_positions:
        text = f"{count} short calls of {case.underlying} are open, and {rules.max_positions} may be."
        return Veto("max_positions", count, rules.max_positions, text)


def expiry_exposure(case: Case, rules: RiskRules) -> Finding:
    candidate = case.candidate
    ends = case.state.decision.decision_time + datetime.timedelta(days=candidate.dte)
    day = expiry_day(candidate.instrument, ends)
    its = [one for one in case.portfolio.positions if one.underlying == case.underlying]
    short = -sum(one.units for one in its if expiry_day(one.instrument, one.expiry) == day)
    units, limit = short + case.intention.units, rules.expiry_share * case.held
    if not units <= limit + ROUNDED:
        return Veto("expiry_exposure", units, limit, f"{units:g} coins would be short by {day}, and {limit:g} may be.")


def margin(case: Case, rules: RiskRules) -> Finding:
    used, limit = case.portfolio.margin_used_pct, ENTRY_MARGIN * rules.max_margin_pct
    if used is None:
        return unknown("margin", limit, "The margin used is unknown")
    if not used < limit:
        return Veto("margin", used, limit, f"{used:.1f} % of the margin is used, and entries stop at {limit:g} %.")


def net_delta(case: Case, rules: RiskRules) -> Finding:
    after = abs(case.portfolio.net_delta.get(case.underlying, 0.0) - case.intention.units * case.candidate.delta)
    if not after <= rules.max_net_delta + ROUNDED:
        text = f"The net delta would be {after:.3f} {case.underlying}, and {rules.max_net_delta:g} may be."
        return Veto("net_delta", after, rules.max_net_delta, text)


def daily_drawdown(case: Case, rules: RiskRules) -> Finding:
    limit = rules.daily_drawdown_pct
    if not limit:
        return None
    lost = below(case.portfolio.equity_usd, case.portfolio.day_peak_usd)
    if lost is None:
        return unknown("daily_drawdown", limit, "The day's peak is unknown")
    if not 100 * lost < limit - ROUNDED:
        text = f"{lost:.2%} are lost today, and entries stop at {limit:g} %."
        return Veto("daily_drawdown", 100 * lost, limit, text)


def dd_buffer(case: Case, rules: RiskRules) -> Finding:
    drawdown = drawdown_of(case.portfolio)
    if drawdown is None:
        return unknown("dd_buffer", rules.dd_buffer, "The drawdown is unknown")
    left = 1 - 100 * drawdown / rules.max_drawdown_pct
    if not left >= rules.dd_buffer - ROUNDED:
        text = (
            f"{drawdown:.2%} are lost since the peak: of the {rules.max_drawdown_pct:g} % that may be, {left:.1%} is "
            f"left, and an entry needs {rules.dd_buffer:.1%}."
        )
        return Veto("dd_buffer", left, rules.dd_buffer, text)


def consecutive_losses(case: Case, rules: RiskRules) -> Finding:
    """Of the account's own trades; a later win on paper lifts it."""
    own = own_trades(case.portfolio)
    streak = next((n for n, one in enumerate(reversed(own)) if not one.pnl_usd < 0), len(own))
    if streak < rules.consecutive_losses or cooled_down(case, rules):
        return None
    if any(one.paper and one.pnl_usd > 0 and one.closed_at > own[-1].closed_at for one in case.portfolio.trades):
        return None
    text = f"The last {streak} trades lost: for {rules.loss_cooldown_days:g} days nothing is sold."
    return Veto("consecutive_losses", streak, rules.consecutive_losses, text)


def win_rate(case: Case, rules: RiskRules) -> Finding:
    """Of a portfolio without positions, wins on paper being wins."""
    last = case.portfolio.trades[-rules.win_rate_trades :]
    if case.portfolio.positions or len(last) < rules.min_trades or cooled_down(case, rules):
        return None
    rate = sum(one.pnl_usd > 0 for one in last) / len(last)
    if not rate >= rules.min_win_rate:
        text = f"{rate:.0%} of the last {len(last)} trades won, and {rules.min_win_rate:.0%} have to."
        return Veto("win_rate", rate, rules.min_win_rate, text)


# ---------------------------------------------------------------------------------------------------------------------
# The call and the market


def spread(case: Case, rules: RiskRules) -> Finding:
    width, limit = spread_pct(case.quote), rules.max_spread_pct
    if width is None or not width <= limit + ROUNDED:
        found = said(width, ".2f", " %")
        return Veto("spread", width, limit, f"The spread is {found} of the middle, and {limit:g} % may be.")


def open_interest(case: Case, rules: RiskRules) -> Finding:
    found, limit = case.quote.open_interest, rules.min_open_interest
    if found is None or not found >= limit:
        return Veto("open_interest", found, limit, f"The open interest is {said(found)}, and {limit:g} is asked for.")


def no_bid(case: Case, rules: RiskRules) -> Finding:
    bid, limit = case.quote.bid or None, rules.min_premium_usd  # a bid of 0 is none
    if bid is None or not bid >= limit:
        found = said(bid, ",.2f", " USD")
        return Veto("no_bid", bid, limit, f"The bid is {found}, and {limit:,.2f} USD is asked for.")


def max_iv(case: Case, rules: RiskRules) -> Finding:
    iv, limit = case.state.context.get("atm_iv"), rules.max_iv
    if limit is not None and (iv is None or not iv <= limit):
        return Veto("max_iv", iv, limit, f"The implied vol at the money is {said(iv, '.4f')}, and {limit:g} may be.")


def min_iv(case: Case, rules: RiskRules) -> Finding:
    iv, limit = case.state.context.get("atm_iv"), rules.min_iv
    if limit is not None and (iv is None or not iv >= limit):
        text = f"The implied vol at the money is {said(iv, '.4f')}, and {limit:g} is asked for."
        return Veto("min_iv", iv, limit, text)


def min_ivrv(case: Case, rules: RiskRules) -> Finding:
    ratio, limit = case.candidate.ivrv_ratio, rules.min_ivrv
    if ratio is None or math.isnan(ratio):
        return unknown("min_ivrv", limit, "The call's IV/RV is unknown")
    if ratio < limit:
        return Veto("min_ivrv", ratio, limit, f"The call's IV/RV is {ratio:.4f}, and {limit:g} is asked for.")


def near_level(case: Case, rules: RiskRules) -> Finding:
    if not rules.near_level:
        return None
    count, level = (case.state.context.get(name) for name in ("broken_resistances", "broken_resistance"))
    if level is None:
        return None if count == 0 else unknown("near_level", None, "Whether a resistance is broken is unknown")
    spot, limit = case.state.decision.spot, level * (1 - rules.near_level_pct / 100)
    if not spot < limit:
        text = (
            f"Spot is {spot:,.2f}, within {rules.near_level_pct:g} % of a broken resistance, {level:,.2f}, or above."
        )
        return Veto("near_level", spot, limit, text)


def blocked_hours(case: Case, rules: RiskRules) -> Finding:
    now = case.now.astimezone(UTC)
    day = WEEKDAYS[now.weekday()]
    if now.hour in rules.blocked_hours:
        limit = ", ".join(map(str, sorted(rules.blocked_hours)))
        return Veto("blocked_hours", now.hour, limit, f"It is {now:%H:%M} UTC: in hour {now.hour} nothing is sold.")
    if day in rules.blocked_weekdays:
        limit = ", ".join(sorted(rules.blocked_weekdays, key=WEEKDAYS.index))
        return Veto("blocked_hours", day, limit, f"It is {day} in UTC: then nothing is sold.")


def stale(case: Case, rules: RiskRules) -> Finding:
    age = (case.now - case.state.snapshot_time).total_seconds()
    if not age <= rules.max_age_s:
        text = f"The snapshot is {age:,.0f} s old, and {rules.max_age_s:g} s may be."
        return Veto("stale", age, rules.max_age_s, text)
    skew = max(abs(case.clock_skew_s), -age)  # one of the future shows it, too
    if not skew <= rules.max_clock_skew_s:
        text = f"The clock is {skew:,.1f} s off, and {rules.max_clock_skew_s:g} s may be."
        return Veto("stale", skew, rules.max_clock_skew_s, text)


def drift(case: Case, rules: RiskRules) -> Finding:
    if case.drift:
        kind = Veto if rules.drift_stops else Note
        return kind("drift", len(case.drift), 0, f"Outside what a policy was tuned on: {'; '.join(case.drift)}.")


def duplicate(case: Case, rules: RiskRules) -> Finding:
    if case.intention.decision_id in case.ordered:
        text = f"{case.intention.decision_id} was ordered before."
        return Veto("duplicate", case.intention.decision_id, "once", text)


ENTRY_RULES: dict[str, Callable[[Case, RiskRules], Finding]] = {
    rule.__name__: rule
    for rule in (
        no_equity, not_covered, max_positions, expiry_exposure, margin, net_delta, daily_drawdown, dd_buffer,
        consecutive_losses, win_rate, spread, open_interest, no_bid, max_iv, min_iv, min_ivrv, near_level,
        blocked_hours, stale, drift, duplicate,
    )
}  # fmt: skip
CODES = ("kill_switch", *ENTRY_RULES)


# ---------------------------------------------------------------------------------------------------------------------
# What several of them ask


def after_buy_back(portfolio: Portfolio, intention: Intention, state: MarketState) -> Portfolio:
    """Without the position that a roll's sale takes the place of, and its delta: the oldest of its instrument, which
    is what a buy-back is of. A delta that the state does not know counted as 0 before, too."""
    gone = next((one for one in portfolio.positions if one.instrument == intention.replaces), None)
    if gone is None:
        return portfolio
    delta = next((one.delta for one in state.decision.candidates if one.instrument == gone.instrument), 0.0)
    left = portfolio.net_delta.get(gone.underlying, 0.0) - gone.units * delta
    return portfolio._replace(
        positions=tuple(one for one in portfolio.positions if one is not gone),
        net_delta={**portfolio.net_delta, gone.underlying: left},
    )


def unknown(code: str, limit: float | None, what: str) -> Note:
    return Note(code, None, limit, f"{what}: the rule was not applied.")


def said(value: float | None, form: str = "g", unit: str = "") -> str:
    return "unknown" if value is None else f"{value:{form}}{unit}"


def free_units(portfolio: Portfolio, underlying: str) -> float:
    """Coins that no open call is short of; below 0 where more was sold than is held."""
    return portfolio.holdings.get(underlying, 0.0) - portfolio.short_units(underlying)


def expiry_day(instrument: str, expiry: datetime.datetime) -> datetime.date:
    """As the instrument's own name says it, where it does: a dte may be rounded."""
    named = named_call(instrument)
    return (named[2] if named else expiry.astimezone(UTC)).date()


def below(equity: float | None, peak: float | None) -> float | None:
    """How much of a peak is lost, as a fraction."""
    return None if equity is None or peak is None or not peak > 0 else (peak - equity) / peak


def drawdown_of(portfolio: Portfolio) -> float | None:
    """Since the peak of all times, as a fraction."""
    return below(portfolio.equity_usd, portfolio.peak_equity_usd)


def own_trades(portfolio: Portfolio):
    """Those of the account: all, where it trades on paper alone."""
    own = [one for one in portfolio.trades if not one.paper]
    return own or list(portfolio.trades)


def cooled_down(case: Case, rules: RiskRules) -> bool:
    own = own_trades(case.portfolio)
    return not own or case.now - own[-1].closed_at >= datetime.timedelta(days=rules.loss_cooldown_days)


def spread_pct(quote: Quote) -> float | None:
    """Of the middle; None without two sides."""
    middle = quote.mid
    if middle is None or quote.ask is None or quote.bid is None or not middle > 0:
        return None
    return 100 * (quote.ask - quote.bid) / middle
