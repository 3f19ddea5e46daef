"""The verb agent diff: two configurations on one window, decision by decision, and in money where that is settled.

    covered-call agent diff out/agent/one out/agent/other
    covered-call agent diff out/agent/one out/agent/other --json diff.json

Money is P&L vs HODL of one coin's worth of calls, net of fees, of what each took, and 0 where it took nothing: it says
who chooses better, whatever their sizes. Beside it stands the same at the units of each.
"""

import argparse
import collections
import json
import math
from typing import Any, NamedTuple

import numpy as np

from covered_call import atomic
from covered_call.candidates.columns import microseconds
from covered_call.candidates.data_options import Help
from covered_call.candidates.schema import NO_TRADE
from covered_call.command_line import plain_errors, start_logging
from covered_call.resampling import draw, interval, means, overlaps
from covered_call.runtime.audit import too_short
from covered_call.runtime.journal import JournalError, plain
from covered_call.runtime.logged import TAKEN, Entry, Log, read_log
from covered_call.runtime.outcomes_log import Outcomes, read_outcomes
from covered_call.runtime.report_page import counts, percent, usd
from covered_call.tables import align

SHOWN = 20  # differences on the screen; --json has all


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    start_logging()
    with plain_errors(args, JournalError):
        found = diff_of(args.log, args.other)
        if args.json:
            atomic.write(args.json, json.dumps(plain(found), indent=1, allow_nan=False) + "\n")
    print(page_of(found))


class Pair(NamedTuple):
    """A decision that both took."""

    one: Entry
    other: Entry


def diff_of(folder: str, other: str) -> dict[str, Any]:
    """Raises JournalError for a log that cannot be read, and where no decision is in both."""
    logs, outcomes = [read_log(name) for name in (folder, other)], [read_outcomes(name) for name in (folder, other)]
    its, others = ({one.decision.decision_id: one for one in log.entries} for log in logs)
    pairs = [Pair(one, others[name]) for name, one in its.items() if name in others]
    if not pairs:
        raise JournalError(f"{folder} and {other} have no decision in common: give two logs of one window.")
    rows = [row_of(pair, outcomes) for pair in pairs]
    differs = [row for row in rows if row["one"] != row["other"]]
    return {
        "logs": [folder, other],
        "configuration": changed(*logs),
        "decisions": {"both": len(pairs), "one": len(its) - len(pairs), "other": len(others) - len(pairs)},
        "other_market": sum(not same_market(pair) for pair in pairs),
        "agreement": (len(pairs) - len(differs)) / len(pairs),
        "kinds": dict(collections.Counter(kind_of(row) for row in rows).most_common()),
        "why": [dict(collections.Counter(row["why"][place] for row in differs).most_common()) for place in (0, 1)],
        "money": money_of(pairs, rows, outcomes),
        "differences": differs,
    }


def row_of(pair: Pair, outcomes: list[Outcomes]) -> dict[str, Any]:
    """What each took, why, and by how much the other's brought more, a coin."""
    taken = [taken_by(entry) for entry in pair]
    pnl = [pnl_of(entry, known) for entry, known in zip(pair, outcomes, strict=True)]
    return {"decision_id": pair.one.decision.decision_id, "one": taken[0], "other": taken[1],
        "why": [why_of(entry) for entry in pair], "pnl": pnl, "gain_usd": pnl[1] - pnl[0]}  # fmt: skip


def taken_by(entry: Entry) -> str:
    meant = entry.meant
    return str(meant.instrument) if meant.fate == TAKEN else NO_TRADE


def why_of(entry: Entry) -> str:
    """What became of a decision, and by which method or vetoes."""
    meant = entry.meant
    return f"{meant.fate}: {', '.join(meant.codes) or entry.line['fusion']['method']}"


def pnl_of(entry: Entry, outcomes: Outcomes) -> float:
    """USD a coin of what was taken, 0 of nothing, NaN where it is not settled."""
    if entry.meant.fate != TAKEN:
        return 0.0
    found = outcomes.get((entry.decision.decision_id, str(entry.meant.instrument)))
    return math.nan if found is None or found.pnl_vs_hodl is None else found.pnl_vs_hodl


def kind_of(row: dict[str, Any]) -> str:
    one, other = row["one"], row["other"]
    if one == other:
        return "both take nothing" if one == NO_TRADE else "both take the same call"
    if NO_TRADE not in (one, other):
        return "both take a call, not the same"
    return "the second alone takes one" if one == NO_TRADE else "the first alone takes one"


def same_market(pair: Pair) -> bool:
    one, other = (entry.decision for entry in pair)
    return one.spot == other.spot and set(one.candidates) == set(other.candidates)


def changed(log: Log, other: Log) -> dict[str, list]:
    """By key what the configurations of the last decisions say, where they differ; the mode is one, too."""
    one, two = ({"mode": its.mode, **flat(its.entries[-1].config)} for its in (log, other))
    return {name: [one.get(name), two.get(name)] for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name) and name != "state_dir"}  # fmt: skip


def flat(config: dict, of: str = "") -> dict[str, Any]:
    found = {}
    for name, value in config.items():
        found |= flat(value, f"{of}{name}.") if isinstance(value, dict) and value else {f"{of}{name}": value}
    return found


def money_of(pairs: list[Pair], rows: list[dict[str, Any]], outcomes: list[Outcomes]) -> dict[str, Any]:
    """Over the decisions at which both are settled."""
    known = [(pair, row) for pair, row in zip(pairs, rows, strict=True) if not math.isnan(row["gain_usd"])]
    sums = [math.fsum(row["pnl"][place] for _, row in known) for place in (0, 1)]
    sized = [math.fsum(row["pnl"][place] * pair[place].units for pair, row in known if row["pnl"][place])
        for place in (0, 1)]  # fmt: skip
    gains = np.array([row["gain_usd"] for _, row in known])
    found = {"settled": len(known), "pnl_usd": sums, "pnl_usd_at_units": sized, "gain_usd": math.fsum(gains),
        "mean_gain_usd": float(gains.mean()) if len(gains) else math.nan}  # fmt: skip
    return found | sides_of([pair for pair, _ in known], gains, outcomes)


def sides_of(pairs: list[Pair], gains: np.ndarray, outcomes: list[Outcomes]) -> dict[str, Any]:
    """The interval of the mean gain a decision, by blocks of decision times as long as outcomes overlap."""
    time = np.array([microseconds(pair.one.decision.decision_time) for pair in pairs], np.int64)
    ends = time.copy()
    for number, pair in enumerate(pairs):
        for entry, known in zip(pair, outcomes, strict=True):
            its = known.get((entry.decision.decision_id, taken_by(entry)))
            if its and its.settled_at:
                ends[number] = max(ends[number], microseconds(its.settled_at))
    times, place, block = overlaps(time, ends)
    draws = draw(len(times), block)
    if draws is None:
        return {"interval_usd": None, "why_no_interval": too_short(len(times), block)}
    resampled = means(gains, place, draws)
    return {"interval_usd": interval(resampled, resampled), "why_no_interval": None}


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def page_of(found: dict[str, Any]) -> str:
    one, other = found["logs"]
    both = found["decisions"]
    lines = [
        f"First: {one}", f"Second: {other}", "",
        *(f"  {name}: {before!r} -> {after!r}" for name, (before, after) in found["configuration"].items()),
        "" if found["configuration"] else "  The configurations of both are the same.",
        f"{both['both']:,} decisions are in both, {both['one']:,} in the first alone, {both['other']:,} in the other.",
        *([f"At {found['other_market']:,} of them spot or candidates differ: their input is not the same."]
            if found["other_market"] else []),
        f"The same was taken at {percent(found['agreement'])} of them: {counts(found['kinds'])}.",
        *(f"Where they differ, the {name}: {counts(why)}." for name, why in zip(("first", "second"), found["why"],
            strict=True) if why),
        money_line(found["money"]), "", *differences(found["differences"]),
    ]  # fmt: skip
    return "\n".join(lines).rstrip()


def money_line(its: dict[str, Any]) -> str:
    if not its["settled"]:
        return "What they took is not settled: see covered-call agent settle."
    one, other = its["pnl_usd"]
    said = (
        f"Money over the {its['settled']:,} decisions of which both are settled, USD a coin: first {usd(one)}, second "
        f"{usd(other)}; at their units {usd(its['pnl_usd_at_units'][0])} and {usd(its['pnl_usd_at_units'][1])}. The "
        f"second less the first: {usd(its['mean_gain_usd'])} a decision"
    )
    sides = its["interval_usd"]
    return (
        f"{said} (95 %: {usd(sides[0])} to {usd(sides[1])})."
        if sides
        else f"{said}; no interval: {its['why_no_interval']}."
    )


def differences(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    cells = [["decision", "first", "why", "second", "why", "second less first, USD"]]
    cells += [[row["decision_id"], row["one"], row["why"][0], row["other"], row["why"][1], usd(row["gain_usd"])]
        for row in rows[:SHOWN]]  # fmt: skip
    more = [f"... and {len(rows) - SHOWN:,} more: --json has all."] if len(rows) > SHOWN else []
    return [align(cells, {5}), *more]


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call agent diff", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("log", metavar="LOG1", help="the folder of one log")
    parser.add_argument("other", metavar="LOG2", help="the folder of the other")
    parser.add_argument("--json", metavar="FILE", help="where all of it goes, with every difference")
    return parser.parse_args(arguments)
