"""The verb agent report: what an agent did, from its log alone, and what that was worth, once it is settled.

    covered-call agent report out/agent/shadow                # report.md, .json, .png and .html beside the log
    covered-call agent report out/agent/shadow --to out/seen

The audit, of what became of each candidate and what it brought, is part of it where `covered-call agent settle` has
written outcomes.jsonl: one page for a log, whose counts and whose money are of the same decisions.
"""

import argparse
import collections
import json
import math
from typing import Any

import numpy as np

from covered_call import atomic
from covered_call.candidates.data_options import Help
from covered_call.command_line import plain_errors, start_logging
from covered_call.runtime import audit
from covered_call.runtime.journal import JournalError, plain
from covered_call.runtime.last_day import cards_of
from covered_call.runtime.logged import FATES, TAKEN, Entry, Log, read_log
from covered_call.runtime.outcomes_log import Outcomes, read_outcomes
from covered_call.runtime.report_page import html_of, page_of
from covered_call.runtime.report_picture import picture_of

VERSION = 1  # of report.json: raise it when a figure means something else
PAGE, NUMBERS, PICTURE, TO_READ = "report.md", "report.json", "report.png", "report.html"


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    start_logging()
    with plain_errors(args, JournalError):
        log = read_log(args.log)
        outcomes = read_outcomes(args.log)
        found, cards = report_of(log, outcomes), cards_of(log, outcomes)
        page = page_of(found, cards)
        numbers = json.dumps(plain(found), indent=1, allow_nan=False) + "\n"
        files = {PAGE: page, NUMBERS: numbers, PICTURE: picture_of(found), TO_READ: html_of(found, cards)}
        atomic.write_together(args.to or args.log, files)
    print(page)


def report_of(log: Log, outcomes: Outcomes) -> dict[str, Any]:
    """All figures; NaN where nothing is known. The audit is by underlying; None where nothing is settled."""
    by_underlying = {
        name: audit.figures_of([one for one in log.entries if one.decision.underlying == name], outcomes)
        for name in log.underlyings
    }
    return {"version": VERSION, **figures_of(log), "audit": by_underlying if outcomes else None}


def figures_of(log: Log) -> dict[str, Any]:
    entries, lines = log.entries, [one.line for one in log.entries]
    times = [one.decision.decision_time for one in entries]
    fates = collections.Counter(one.fate for one in entries)
    return {
        "log": log.folder,
        "mode": log.mode,
        "decisions": len(entries),
        "from": times[0],
        "to": times[-1],
        "underlyings": dict(collections.Counter(one.decision.underlying for one in entries)),
        "configurations": dict(collections.Counter(line.get("config_hash") or "unknown" for line in lines)),
        "taken_anew": log.again,
        "torn": log.torn,
        "trade_rate": fates[TAKEN] / len(entries),
        "decisions_by_fate": {fate: fates[fate] for fate in FATES},
        "fusion": dict(collections.Counter(line["fusion"]["method"] for line in lines).most_common()),
        "pair": pair_of(entries),
        "policies": policies_of(lines),
        "vetoes": dict(collections.Counter(code for one in entries for code in one.meant.codes).most_common()),
        "exits": exits_of(lines),
        "orders": dict(collections.Counter(its["execution"]["status"] for its in completions(entries))),
        "closed": closed_trades(entries),
        "latency_s": latencies(entries),
        "drift": drift_of(lines),
    }


def completions(entries: list[Entry]) -> list[dict]:
    return [its for one in entries for its in one.completions.values()]


def pair_of(entries: list[Entry]) -> dict[str, Any] | None:
    """How often the first policy, a language model if there is one, and the next would do the same; None without two.

    Of both selling one call, or neither selling any: agreement. Of both selling, but not the same call: disagreement.
    Else one alone would sell, or one of them failed: unanswered.
    """
    pairs = [one.proposals[:2] for one in entries if len(one.proposals) > 1]
    if not pairs:
        return None
    counts = collections.Counter(how_they_stand(*pair) for pair in pairs)
    names = ("agreement", "disagreement", "first_only", "second_only", "unanswered")
    first, second = (one["source"] for one in pairs[0])
    return {"first": first, "second": second, "decisions": len(pairs), **{name: counts[name] for name in names}}


def how_they_stand(one: dict, other: dict) -> str:
    if one["error"] or other["error"]:
        return "unanswered"
    if one["instrument"] == other["instrument"]:
        return "agreement"
    if one["instrument"] and other["instrument"]:
        return "disagreement"
    return "first_only" if one["instrument"] else "second_only"


def policies_of(lines: list[dict]) -> dict[str, dict]:
    """Of each policy: how often it was asked, what of that the cache knew, how often its last answer was used again or
    it was left alone, how often it failed, would sell, and how sure it was."""
    found: dict[str, list[dict]] = {}
    for line in lines:
        for one in line["proposals"]:
            found.setdefault(one["source"], []).append(one)
    return {name: policy_of(its) for name, its in found.items()}


def policy_of(proposals: list[dict]) -> dict[str, Any]:
    count = len(proposals)
    asked = [one for one in proposals if one.get("asked", True)]
    failed, cached = (sum(bool(one[key]) for one in asked) for key in ("error", "cached"))
    answers = [one for one in proposals if not one["error"]]
    sure = [one["confidence"] for one in answers if one["confidence"] is not None]
    return {
        "decisions": count,
        "asked": len(asked),
        "query_rate": (len(asked) - cached) / count,
        "cache_hits": cached,
        "not_asked": count - len(asked),
        "errors": failed,
        "error_rate": failed / len(asked) if asked else math.nan,
        "would_sell": sum(one["instrument"] is not None for one in answers),
        "mean_confidence": float(np.mean(sure)) if sure else math.nan,
    }


def exits_of(lines: list[dict]) -> dict[str, Any]:
    orders = [order for line in lines for order in line.get("exits", ())]
    return {
        "meant": dict(collections.Counter(order["intention"]["action"] for order in orders)),
        "vetoes": dict(collections.Counter(veto["code"] for order in orders for veto in order["vetoes"])),
    }


def closed_trades(entries: list[Entry]) -> dict[str, Any]:
    """Those of the portfolio itself, its own units and exits, until what an exchange holds was adopted: from then on
    what the portfolio brought is unknown."""
    lines = [one.line for one in entries] + completions(entries)
    events = [event for line in lines for event in line.get("events", ())]
    adoptions = sorted(event["time"] for event in events if event["event"] == "adopted")
    known = [one for one in events if one["event"] == "closed" and not (adoptions and one["time"] >= adoptions[0])]
    parts = [one for one in known if one.get("units") is not None]
    return {
        "trades": len(known) - len(parts),
        "parts": len(parts),
        "pnl_usd": math.fsum(event["pnl_usd"] for event in known),
        "adoptions": len(adoptions),
        "unknown_from": adoptions[0] if adoptions else None,
    }


def latencies(entries: list[Entry]) -> dict[str, dict]:
    """Seconds by part of a cycle, of a policy where it was asked: how many were measured, p50, p95 and the longest."""
    found: dict[str, list[float]] = {}
    for one in entries:
        idle = {its["source"] for its in one.line["proposals"] if not its.get("asked", True)}
        for its in [one.line, *one.completions.values()]:
            for part, seconds in its.get("latencies", {}).items():
                if part not in idle and seconds is not None:
                    found.setdefault(part, []).append(seconds)
    quantiles = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    return {
        part: {"n": len(its)} | {name: float(np.quantile(its, at)) for name, at in quantiles.items()}
        for part, its in found.items()
    }


def drift_of(lines: list[dict]) -> dict[str, dict]:
    """By policy: at how many decisions something lay beyond what it was tuned on, and which numbers."""
    found: dict[str, collections.Counter[str]] = {}
    for line in lines:
        for name, texts in line.get("drift", {}).items():
            its = found.setdefault(name, collections.Counter())
            its.update({"decisions": 1, **{text.partition(" ")[0]: 1 for text in texts}})
    return {name: dict(its) for name, its in found.items()}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call agent report", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("log", metavar="LOGDIR", help="the folder of the log")
    parser.add_argument("--to", metavar="DIR", help="where the report goes; default: beside the log")
    return parser.parse_args(arguments)
