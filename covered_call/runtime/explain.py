"""The verb agent explain: one logged decision on a screen, from what its lines say."""

import argparse
import difflib
import math
from typing import Any

from covered_call.candidates.columns import Grounds
from covered_call.candidates.data_options import Help
from covered_call.candidates.explanations import explain
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import answer_of, order_candidates
from covered_call.candidates.schema import Decision, shown
from covered_call.command_line import plain_errors, start_logging
from covered_call.runtime.journal import JournalError, read
from covered_call.runtime.state import SELL_CALL

MOST = 12  # candidates that are shown


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    start_logging()
    with plain_errors(args, JournalError):
        print("\n".join(explained(*lines_of(args.log, args.decision_id))))


def lines_of(folder: str, decision_id: str) -> tuple[dict, list[dict]]:
    """The last cycle of a decision, and what completed it since.

    Raises:
        JournalError: if the log has none.
    """
    cycle, completions, known = None, [], []
    for line in read(folder):
        if "completes" in line:
            if line["completes"] == decision_id:
                completions.append(line)
            continue
        known.append(line["decision_id"])
        if line["decision_id"] == decision_id:
            cycle, completions = line, []
    if cycle is None:
        near = difflib.get_close_matches(decision_id, known, n=1, cutoff=0)
        raise JournalError(
            f"{folder} has no decision {shown(decision_id)} among {len(known):,}. "
            + (f"Did you mean {near[0]}?" if near else "Give the folder of a log.")
        )
    return cycle, completions


def explained(cycle: dict, completions: list[dict]) -> list[str]:
    return [
        *head_lines(cycle), *state_lines(cycle["state"]), *portfolio_lines(cycle["portfolio"]),
        *proposal_lines(cycle["proposals"]), *decision_lines(cycle), *execution_lines(cycle, completions),
        *explanation_lines(cycle),
    ]  # fmt: skip


def head_lines(cycle: dict) -> list[str]:
    versions = ", ".join(f"{name} {value[:19]}" for name, value in cycle.get("versions", {}).items())
    return [
        f"{cycle['decision_id']}, decided at {cycle['time']} ({cycle.get('mode', 'no mode')}, configuration "
        f"{cycle.get('config_hash', 'unknown')})", *([f"  versions: {versions}"] if versions else []),
    ]  # fmt: skip


def state_lines(state: dict) -> list[str]:
    decision, quotes = state["decision"], {one["instrument"]: one for one in state["quotes"]}
    known = ", ".join(f"{name} {number(value)}" for name, value in state["context"].items() if value is not None)
    lines = [f"State: spot {number(decision['spot'])}, quoted at {state['snapshot_time']}"]
    lines += [f"  market: {known}"] if known else []
    best = sorted(decision["candidates"], key=lambda one: -one["score"])
    lines += [candidate_line(one, quotes.get(one["instrument"], {})) for one in best[:MOST]]
    more = len(best) - MOST
    return [*lines, f"  and {more} candidates of lower score"] if more > 0 else lines or ["  no candidate"]


def candidate_line(one: dict, quote: dict) -> str:
    numbers = ", ".join(f"{name} {number(one.get(name))}" for name in ("dte", "delta", "score", "iv", "ivrv_ratio"))
    sides = f"bid {number(quote.get('bid'))}, ask {number(quote.get('ask'))}, open interest "
    return f"  {one['instrument']}: {numbers}; {sides}{number(quote.get('open_interest'))}"


def portfolio_lines(portfolio: dict) -> list[str]:
    held = ", ".join(f"{number(units)} {name}" for name, units in portfolio["holdings"].items())
    short = [f"  short {-one['units']:g} {one['instrument']}, sold at {number(one['entry_price'])}"
        for one in portfolio["positions"]]  # fmt: skip
    return [f"Portfolio: {held}; equity {number(portfolio['equity_usd'])} USD, cash {number(portfolio['cash_usd'])} "
        f"USD, {portfolio['trades']} trade(s) closed", *short]  # fmt: skip


def proposal_lines(proposals: list[dict]) -> list[str]:
    lines = ["Proposals:"]
    for one in proposals:
        if one["error"]:
            lines.append(f"  {one['source']}: failed, {one['error']}")
            continue
        more = "".join(f", {name} {number(one[name])}" for name in ("margin", "q_usd") if one[name] is not None)
        lines.append(
            f"  {one['source']}: {one['instrument'] or 'NO_TRADE'}, confidence {number(one['confidence'])}{more}; "
            f"{one['reason'] or 'no reason'} ({1000 * one['latency_s']:.0f} ms{', cached' if one['cached'] else ''})"
        )
    return lines


def decision_lines(cycle: dict) -> list[str]:
    """Drift, fusion, sizing, what spoke against it, and what was meant."""
    fusion, sizing, intention = cycle["fusion"], cycle["sizing"], cycle["intention"]
    learnt = fusion.get("learnt_from")
    weights = ", ".join(f"{name} {number(weight)}" for name, weight in fusion["weights"].items())
    lines = [f"  drift, {name}: {'; '.join(found)}" for name, found in cycle.get("drift", {}).items()]
    lines.append(f"Fusion: {fusion['method']}, of {fusion['proposal']}" + (f"; weights {weights}" if weights else "")
        + (f"; {learnt} settled disagreements" if learnt is not None else ""))  # fmt: skip
    if sizing:
        names = ("wanted", "free", "at_risk", "kelly", "payoff")
        known = [name for name in names if sizing.get(name) is not None]  # else no limit
        numbers = (f"{name} {number(sizing[name])}" for name in known)
        code = f", {sizing['code']}" if sizing["code"] else ""
        whose = f" (of {sizing['payoff_of']})" if sizing.get("payoff") is not None else ""
        lines.append(f"Sizing: {number(sizing['units'])} coin(s){code}; {', '.join(numbers)}{whose}")
    lines.append("Vetoes:" if cycle["vetoes"] else "Vetoes: none")
    lines += [f"  {one['code']}: {value(one['value'])} against {value(one['limit'])}. {one['text']}"
        for one in cycle["vetoes"]]  # fmt: skip
    lines += [f"  noted, {one['code']}: {one['text']}" for one in cycle.get("notes", ())]
    return [*lines, f"Intention: {order_text(intention)}"]


def order_text(intention: dict) -> str:
    codes = ", ".join(intention["reason_codes"])
    what = f"{intention['action']} {intention['instrument'] or ''}".strip()
    units = f", {number(intention['units'])} coin(s)" if intention["units"] else ""
    limit = f", limit {number(intention['limit_price'])} USD" if intention["limit_price"] is not None else ""
    return f"{what}{units}{limit} ({codes})"


def execution_lines(cycle: dict, completions: list[dict]) -> list[str]:
    """What became of each order, exits first, as they were sent."""
    exits, entry = cycle["exits"], cycle["intention"]
    sent = [one for one in exits if not one["vetoes"]]
    if entry["action"] == SELL_CALL and not cycle["vetoes"]:
        sent.append({"intention": entry})
    found = {one["order"]: one["execution"] for one in completions}
    lines = [f"  stopped: {order_text(one['intention'])}: {', '.join(veto['code'] for veto in one['vetoes'])}"
        for one in exits if one["vetoes"]]  # fmt: skip
    for place, one in enumerate(sent[: cycle["orders"]]):
        lines.append(f"  {order_text(one['intention'])}: {execution_text(found.get(place))}")
    return [f"Orders: {cycle['orders'] or 'none'}", *lines]


def execution_text(execution: dict | None) -> str:
    if execution is None:
        return "nothing is known of it: the agent ended before it was told"
    price = f" at {number(execution['price'])} USD" if execution.get("price") is not None else ""
    fee = f", fee {number(execution['fee_usd'])} USD" if execution.get("fee_usd") else ""
    reason = f": {execution['reason']}" if execution.get("reason") else ""
    return f"{execution['status']}{price}{fee}{reason}"


def explanation_lines(cycle: dict) -> list[str]:
    answer, *reasons = explanation_of(cycle)
    return [f"Explanation of the answer {answer}:", *(f"  {one}" for one in reasons)]


def explanation_of(cycle: dict) -> list[str]:
    """What the policies came to, as the answer to a ranking, and what is true of it: of the candidates among one
    another, for what a score is made of depends on the chain's rules."""
    decision = Decision.from_dict(cycle["state"]["decision"], math.inf)
    decision, _ = order_candidates(decision, CoveredCallCandidatesConfig())
    names = [one.instrument for one in decision.candidates]
    sold = cycle["fusion"].get("instrument")
    answer = answer_of(names.index(sold) if sold in names else None)
    return explain(decision, answer, Grounds(None, {})).splitlines()


def number(found: Any) -> str:
    return "unknown" if found is None else f"{found:,.4f}".rstrip("0").rstrip(".")


def value(found: Any) -> str:
    return found if isinstance(found, str) else number(found)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call agent explain", description="What was known, proposed, meant and done at one decision, by "
        "an agent's log.", epilog="example:\n  covered-call agent explain "
        "'BTC|2025-12-10T01:05:13.418603+00:00|hold_to_expiry' --log out/agent/shadow", formatter_class=Help,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("decision_id", metavar="DECISION_ID", help="as the log has it")
    parser.add_argument("--log", metavar="DIR", required=True, help="the folder of the log")
    return parser.parse_args(arguments)
