"""The figures of an agent's report as Markdown."""

import datetime
import math
from collections.abc import Sequence
from typing import Any

from covered_call.page import html
from covered_call.page.cards import UNITS, Card, card_markdown
from covered_call.runtime.last_day import LAST_DAY
from covered_call.runtime.logged import FATES
from covered_call.tables import markdown

NOTHING = "–"


def page_of(found: dict[str, Any], cards: Sequence[Card]) -> str:
    parts = [head(found), policies(found), pair(found), vetoes(found), latency(found), drift(found), *audits(found)]
    parts += [f"## {LAST_DAY}\n\n{UNITS}", *(card_markdown(card, level=3) for card in cards)]
    return "\n\n".join(part for part in parts if part) + "\n"


def html_of(found: dict[str, Any], cards: Sequence[Card]) -> str:
    """The decisions of the last day, to be read in a browser."""
    title, log, fates = head_lines(found)
    section = html.Section(LAST_DAY, [UNITS], [], [], cards)
    made = [f"Made by covered-call agent report, of {found['log']}. All figures are in report.md."]
    return html.html_of(html.Page(title, [fates, log], [], [section], made))


def head_lines(found: dict[str, Any]) -> list[str]:
    """The title, and what is counted."""
    names = ", ".join(f"{name} {count:,}" for name, count in found["underlyings"].items())
    fates = ", ".join(f"{fate} {found['decisions_by_fate'][fate]:,}" for fate in FATES)
    return [
        f"Agent report: {found['mode']}, {found['from']:%Y-%m-%d %H:%M} to {found['to']:%Y-%m-%d %H:%M} UTC",
        f"Log: {found['log']}. Decisions: {names}. Configurations: {counts(found['configurations'])}.",
        f"Of all decisions: {fates}.",
    ]


def head(found: dict[str, Any]) -> str:
    fates = [["decisions", *FATES, "trade rate"], [f"{found['decisions']:,}",
        *(f"{found['decisions_by_fate'][fate]:,}" for fate in FATES), percent(found["trade_rate"])]]  # fmt: skip
    title, log, _ = head_lines(found)
    lines = [
        f"# {title}",
        log,
        markdown(fates),
        f"Fusion: {counts(found['fusion'])}. Orders: {counts(found['orders'])}. Exits: "
        f"{counts(found['exits']['meant'])}; vetoed: {counts(found['exits']['vetoes'])}.",
    ]  # fmt: skip
    lines += closed_lines(found["closed"])
    if found["taken_anew"]:
        lines.append(f"{found['taken_anew']:,} decision(s) were abandoned and taken anew: the last one counts.")
    if found["torn"]:
        lines.append("The log ends in half a line, which is left out: an agent that goes on there repairs it.")
    return "\n\n".join(lines)


def closed_lines(closed: dict[str, Any]) -> list[str]:
    """What the portfolio itself made of it."""
    parts = f" and {closed['parts']:,} part(s) of others" if closed["parts"] else ""
    its = f"The portfolio closed {closed['trades']:,} trade(s){parts}, which brought {usd(closed['pnl_usd'])} USD net "
    lines = [f"{its}of fees, at its own units and exits."] if closed["trades"] or closed["parts"] else []
    if closed["adoptions"]:
        since = datetime.datetime.fromisoformat(closed["unknown_from"])
        lines.append(f"{closed['adoptions']:,} time(s) what the exchange held was adopted, first at "
            f"{since:%Y-%m-%d %H:%M} UTC: what the portfolio brought is unknown from then on.")  # fmt: skip
    return lines


def policies(found: dict[str, Any]) -> str:
    rows = [
        ["policy", "asked", "query rate", "cache hits", "not asked", "error rate", "would sell", "mean confidence"]
    ]
    for name, its in found["policies"].items():
        rows.append([name, f"{its['asked']:,}", percent(its["query_rate"]), f"{its['cache_hits']:,}",
            f"{its['not_asked']:,}", percent(its["error_rate"]), f"{its['would_sell']:,}",
            number(its["mean_confidence"])])  # fmt: skip
    return f"## Policies\n\n{markdown(rows)}"


def pair(found: dict[str, Any]) -> str:
    its = found["pair"]
    if its is None:
        return ""
    labels = {"agreement": "agreement", "disagreement": "disagreement", "first_only": f"{its['first']} only",
        "second_only": f"{its['second']} only", "unanswered": "unanswered"}  # fmt: skip
    cells = [f"{its[name]:,} ({percent(its[name] / its['decisions'])})" for name in labels]
    return (
        f"{its['first']} and {its['second']}: both would sell the same call, or none (agreement); both, but not the "
        f"same (disagreement); one alone; or one failed.\n\n{markdown([list(labels.values()), cells])}"
    )


def vetoes(found: dict[str, Any]) -> str:
    rows = [["veto", "decisions"], *([code, f"{count:,}"] for code, count in found["vetoes"].items())]
    return f"## Vetoes\n\n{markdown(rows)}" if len(rows) > 1 else "## Vetoes\n\nNone."


def latency(found: dict[str, Any]) -> str:
    rows = [["part", "n", "p50 ms", "p95 ms", "max ms"]]
    for part, its in found["latency_s"].items():
        rows.append([part, f"{its['n']:,}", *(f"{1000 * its[name]:,.2f}" for name in ("p50", "p95", "max"))])
    return f"## Latency\n\n{markdown(rows)}"


def drift(found: dict[str, Any]) -> str:
    lines = [
        f"{name}: beyond what it was tuned on at {its['decisions']:,} of {found['decisions']:,} decisions: "
        + ", ".join(f"{what} {count:,}" for what, count in its.items() if what != "decisions")
        for name, its in found["drift"].items()
    ]
    return "## Drift\n\n" + "\n\n".join(f"{line}." for line in lines) if lines else ""


# ---------------------------------------------------------------------------------------------------------------------
# The audit


def audits(found: dict[str, Any]) -> list[str]:
    if found["audit"] is None:
        return ["## Audit\n\nNothing is settled yet: see covered-call agent settle."]
    return [audit(name, its) for name, its in found["audit"].items()]


def audit(name: str, its: dict[str, Any]) -> str:
    parts = [
        f"## Audit: {name}",
        "P&L vs HODL of one coin's worth of calls, net of fees, by what became of each candidate; "
        f"{its['decisions']:,} decisions.",
        markdown([MONEY_HEAD, *([fate, f"{one['offered']:,}", *money(one)] for fate, one in its["fates"].items())]),
        difference(its["taken_less_rejected"]),
        missed(its["missed"]),
        stopped(its["vetoes"]),
        *(sureness(source, one) for source, one in its["confidence"].items()),
        *(promised(source, rows) for source, rows in its["q"].items()),
    ]
    return "\n\n".join(part for part in parts if part)


MONEY_HEAD = [
    "candidates",
    "offered",
    "settled",
    "hit rate",
    "mean USD",
    "median USD",
    "mean %",
    "median %",
    "95 % of mean %",
]


def money(its: dict[str, Any]) -> list[str]:
    return [f"{its['known']:,}", percent(its["hit_rate"]), usd(its["mean_usd"]), usd(its["median_usd"]),
        signed(its["mean_percent"]), signed(its["median_percent"]), span(its["interval_percent"])]  # fmt: skip


def difference(its: dict[str, Any]) -> str:
    if math.isnan(its["percent"]):
        return "Taken less rejected: unknown, for of one of them nothing is settled."
    said = f"Taken less rejected: {usd(its['usd'])} USD, {signed(its['percent'])} % of spot a coin"
    if its["interval_percent"] is None:
        return f"{said}. No interval: {its['why_no_interval']}."
    said += f" (95 %: {span(its['interval_usd'], usd)} USD, {span(its['interval_percent'])} %)."
    return (
        f"{said} **Anti-selection: what it takes is worth less than what it rejects.**"
        if its["anti_selection"]
        else said
    )


def missed(its: dict[str, Any]) -> str:
    by = f": {counts(its['by'])}" if its["by"] else ""
    return (
        f"Missed positives: at {its['positive']:,} decisions some candidate brought more than 0; at {its['missed']:,} "
        f"of them nothing was taken{by}."
    )


def stopped(vetoes: dict[str, dict]) -> str:
    if not vetoes:
        return ""
    rows = [["veto", "stopped", *MONEY_HEAD[2:], "alone, settled", "alone, mean %"]]
    for code, its in vetoes.items():
        alone = its["alone"]
        rows.append([code, f"{its['stopped']:,}", *money(its), f"{alone['known']:,}", signed(alone["mean_percent"])])
    said = "What each veto stopped; below 0 it saved money. A sale that several stopped counts for each."
    return f"{said}\n\n{markdown(rows)}"


def sureness(source: str, its: dict[str, Any]) -> str:
    rows = [["confidence", "n", "mean", "right"]]
    rows += [[f"{one['from']:.1f} to {one['to']:.1f}", f"{one['n']:,}", number(one["confidence"]),
        number(one["right"])] for one in its["bins"]]  # fmt: skip
    return (
        f"Confidence of {source}: on average {number(its['confidence'])}, and right {number(its['right'])} of "
        f"{its['n']:,} times (a sale that brought more than 0; no trade where its best call did not); Brier score "
        f"{number(its['brier'])}, calibration error {number(its['calibration_error'])}.\n\n{markdown(rows)}"
    )


def promised(source: str, thresholds: Sequence[dict[str, Any]]) -> str:
    rows = [["threshold, % of spot", "n", "predicted %", "realised %"]]
    rows += [[f"{one['threshold']:.2f}", f"{one['n']:,}", signed(one["predicted"]), signed(one["realised"])]
        for one in thresholds]  # fmt: skip
    return f"What {source} predicted of its best call, and what came, from each threshold on.\n\n{markdown(rows)}"


# ---------------------------------------------------------------------------------------------------------------------
# Values


def counts(its: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in its.items()) or "none"


def percent(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{100 * value:.1f} %"


def number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.3f}"


def signed(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:+.3f}"


def usd(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:+,.2f}"


def span(sides: Sequence[float] | None, shown=signed) -> str:
    return "none" if sides is None else f"{shown(sides[0])} to {shown(sides[1])}"
