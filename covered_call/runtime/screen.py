"""What an agent shows while it is at work, a screen a cycle, and what it says at the end."""

import collections
import datetime

from covered_call.runtime.engine import Cycle
from covered_call.runtime.paper import FILLED
from covered_call.runtime.state import SELL_CALL, Portfolio


def page(cycle: Cycle, drift: dict[str, list[str]]) -> str:
    """A cycle on one screen."""
    state, plan, executions, portfolio = cycle
    decision, intention = state.decision, plan.entry.intention
    lines = [
        f"{decision.underlying} {decision.decision_time:%Y-%m-%d %H:%M:%S} UTC, {decision.exit_style}: spot "
        f"{decision.spot:,.2f}, {len(decision.candidates)} candidates",
        *(f"  {one.source}: {one.error or one.instrument or 'NO_TRADE'}" + ("" if one.error else
            f" (confidence {one.confidence:.3f}; {one.reason})") for one in plan.proposals),
        *(f"  drift, {name}: {'; '.join(found)}: its answer is a guess" for name, found in drift.items()),
        f"  {intention.action} {intention.instrument or ''} by {plan.fused.method}"
        + (f", {intention.units:g} coin(s)" if intention.action == SELL_CALL else "")
        + "".join(f" ({code})" for code in intention.reason_codes if code != plan.fused.method),
        *(f"  vetoed, {one.code}: {one.text}" for one in plan.entry.vetoes),
        *(f"  {one.status}" + (f" at {one.price:,.2f} USD, fee {one.fee_usd:,.2f}" if one.status == FILLED
            else f": {one.reason}") for one in executions),
        *standing_lines(portfolio),
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def standing_lines(portfolio: Portfolio) -> list[str]:
    if portfolio.equity_usd is None and not portfolio.positions:
        return []
    equity = "unknown" if portfolio.equity_usd is None else f"{portfolio.equity_usd:,.2f} USD"
    held = ", ".join(f"{-one.units:g} {one.instrument} sold at {one.entry_price:,.2f}" for one in portfolio.positions)
    return [f"  equity before orders {equity}; open: {held or 'nothing'}; {len(portfolio.trades)} trade(s) closed"]


class Told:
    """Counts of cycles."""

    def __init__(self):
        self.cycles, self.times = 0, []
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def add(self, cycle: Cycle) -> None:
        self.cycles += 1
        self.times.append(cycle.state.decision.decision_time)
        plan = cycle.plan
        self.counts["meant"][plan.entry.intention.action] += 1
        self.counts["by"][plan.fused.method] += 1
        self.counts["vetoed"].update(one.code for one in plan.entry.vetoes)
        self.counts["orders"].update(one.status for one in cycle.executions)
        self.counts["errors"].update(one.source for one in plan.proposals if one.error)

    def lines(self) -> list[str]:
        found = [f"{self.cycles:,} decisions"]
        for name, its in self.counts.items():
            if its:
                found.append(f"  {name}: " + ", ".join(f"{key} {count:,}" for key, count in its.most_common()))
        return found


def result_lines(results: list[float], unknown: int) -> list[str]:
    lines = [
        f"{len(results):,} sales brought {sum(results):+,.2f} USD against holding the coin, at the files' own vols: "
        "no verdict, for which see covered-call evaluate."
    ]
    return [*lines, f"{unknown:,} more were not made: what they bring is unknown."] if unknown else lines


def seen_lines(times: list[datetime.datetime], tuned_to: dict[str, datetime.datetime]) -> list[str]:
    """Which of the decisions a policy was tuned on, or on what came after them."""
    counts = {name: sum(time <= end for time in times) for name, end in tuned_to.items()}
    return [
        f"{count:,} of the decisions are of the time until {tuned_to[name]:%Y-%m-%d}, on which {name} was tuned: what "
        "it does there says little."
        for name, count in counts.items()
        if count
    ]
