"""What an agent's decisions were worth, by what became of each candidate: whether it chooses well.

Money is P&L vs HODL of one coin's worth of calls, net of fees, in USD and in % of spot at the decision. Whatever the
agent's size was, each candidate counts once. Only settled candidates count, and how many these are is said.
"""

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from covered_call.candidates.columns import microseconds
from covered_call.resampling import MIN_BLOCKS, Draws, draw, interval, means, overlaps
from covered_call.runtime.logged import FATES, REJECTED, TAKEN, VETOED, Entry
from covered_call.runtime.outcomes_log import Outcomes
from covered_call.value_model.walk_forward import CALIBRATION_BINS, calibration_bin

FEW = 10  # outcomes below which a mean has no interval
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(11))  # % of spot


class Cases(NamedTuple):
    """The settled candidates (R,) of a log."""

    decision: np.ndarray  # int64, the number of its decision
    time: np.ndarray  # int64, microseconds since 1970, of the decision
    end: np.ndarray  # int64, of the last price
    usd: np.ndarray
    percent: np.ndarray  # of spot
    fate: np.ndarray  # str, of FATES
    codes: list[tuple[str, ...]]  # of the vetoes


class Audit(NamedTuple):
    """Cases, and the resamples of their decision times; None where there are too few."""

    cases: Cases
    times: np.ndarray  # (T,) distinct and ascending
    place: np.ndarray  # (R,) of each case's among them
    block: int  # decision times that overlap
    draws: Draws | None


def cases_of(entries: Sequence[Entry], outcomes: Outcomes) -> Cases:
    rows = []
    for number, one in enumerate(entries):
        decision, meant = one.decision, one.meant
        time = microseconds(decision.decision_time)
        for candidate in decision.candidates:
            its = outcomes.get((decision.decision_id, candidate.instrument))
            if its is None or its.pnl_vs_hodl is None or its.settled_at is None:
                continue
            fate = one.fate_of(candidate.instrument)
            codes = meant.codes if fate == VETOED else ()
            percent = 100 * its.pnl_vs_hodl / decision.spot
            rows.append((number, time, microseconds(its.settled_at), its.pnl_vs_hodl, percent, fate, codes))
    *values, codes = zip(*rows, strict=True) if rows else [()] * 7
    kinds = (np.int64, np.int64, np.int64, float, float, object)
    return Cases(*(np.array(its, kind) for its, kind in zip(values, kinds, strict=True)), codes=list(codes))


def audit_of(cases: Cases) -> Audit:
    times, place, block = overlaps(cases.time, cases.end)
    return Audit(cases, times, place, block, draw(len(times), block))


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def figures_of(entries: Sequence[Entry], outcomes: Outcomes) -> dict[str, Any]:
    """All of the audit, as JSON holds it; NaN where nothing is known."""
    audit = audit_of(cases_of(entries, outcomes))
    cases = audit.cases
    offered = {fate: 0 for fate in FATES}
    for one in entries:
        for candidate in one.decision.candidates:
            offered[one.fate_of(candidate.instrument)] += 1
    return {
        "decisions": len(entries),
        "decision_times": len(audit.times),
        "block": audit.block,
        "fates": {fate: {"offered": offered[fate], **money_of(audit, cases.fate == fate)} for fate in FATES},
        "taken_less_rejected": difference_of(audit, cases.fate == TAKEN, cases.fate == REJECTED),
        "missed": missed(entries, cases),
        "vetoes": vetoes_of(entries, audit),
        "confidence": {name: calibration_of(*pairs) for name, pairs in confidences(entries, outcomes).items()},
        "q": {name: thresholds_of(pairs) for name, pairs in predictions(entries, outcomes).items()},
    }


def money_of(audit: Audit, its: np.ndarray) -> dict[str, Any]:
    """Of these cases, (R,) bool."""
    usd, percent = audit.cases.usd[its], audit.cases.percent[its]
    known = len(usd)
    return {
        "known": known,
        "hit_rate": float(np.mean(usd > 0)) if known else math.nan,
        "mean_usd": float(np.mean(usd)) if known else math.nan,
        "median_usd": float(np.median(usd)) if known else math.nan,
        "mean_percent": float(np.mean(percent)) if known else math.nan,
        "median_percent": float(np.median(percent)) if known else math.nan,
        "interval_percent": mean_interval(audit, audit.cases.percent, its),
    }


def mean_interval(audit: Audit, values: np.ndarray, its: np.ndarray) -> tuple[float, float] | None:
    """Of the mean of (R,) values over these; None where there are too few of them, or too few times."""
    if audit.draws is None or its.sum() < FEW:
        return None
    resampled = means(values[its], audit.place[its], audit.draws)
    return interval(resampled, resampled)


def difference_of(audit: Audit, one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """By how much the mean of some cases is above that of others."""
    cases, found = audit.cases, {}
    enough = audit.draws is not None and min(one.sum(), other.sum()) >= FEW
    for unit, values in (("usd", cases.usd), ("percent", cases.percent)):
        gap = values[one].mean() - values[other].mean() if one.any() and other.any() else math.nan
        found[unit], found[f"interval_{unit}"] = float(gap), None
        if enough and audit.draws is not None:
            resampled = [means(values[its], audit.place[its], audit.draws) for its in (one, other)]
            gaps = resampled[0] - resampled[1]
            found[f"interval_{unit}"] = interval(gaps, gaps)
    sides = found["interval_percent"]
    return {**found, "why_no_interval": None if sides else why_no_interval(audit, one, other),
        "anti_selection": bool(sides and sides[1] < 0)}  # fmt: skip


def why_no_interval(audit: Audit, one: np.ndarray, other: np.ndarray) -> str:
    if min(one.sum(), other.sum()) < FEW:
        return f"{one.sum():,} taken and {other.sum():,} rejected are settled, and {FEW} of each are the least"
    return too_short(len(audit.times), audit.block)


def too_short(times: int, block: int) -> str:
    return f"{times:,} decision times are fewer than {MIN_BLOCKS} blocks of {block:,}, over which outcomes overlap"


def missed(entries: Sequence[Entry], cases: Cases) -> dict[str, Any]:
    """The decisions at which some candidate's outcome is above 0, and those of them at which nothing was taken, by
    what became of the sale that was meant."""
    positive = np.unique(cases.decision[cases.usd > 0]).tolist()
    lost = collections.Counter(fate for fate in (entries[number].fate for number in positive) if fate != TAKEN)
    return {"positive": len(positive), "missed": lost.total(), "by": dict(lost)}


def vetoes_of(entries: Sequence[Entry], audit: Audit) -> dict[str, dict]:
    """By code: what the sales that it stopped would have brought; ``alone`` are those that no other rule stopped."""
    codes = [one.meant.codes for one in entries if one.meant.fate == VETOED]
    found = {}
    for code in sorted({code for its in codes for code in its}):
        of = np.array([code in its for its in audit.cases.codes], bool)
        alone = np.array([set(its) == {code} for its in audit.cases.codes], bool)
        found[code] = {"stopped": sum(code in its for its in codes), **money_of(audit, of),
            "alone": money_of(audit, alone)}  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What policies said of what came


def answered(entries: Sequence[Entry]) -> Iterable[tuple[Entry, dict]]:
    """The proposals that were made anew: one that is used again, or failed, says nothing of this decision."""
    for one in entries:
        for proposal in one.line["proposals"]:
            if not proposal["error"] and proposal.get("asked", True) and proposal["confidence"] is not None:
                yield one, proposal


def pnl_of(one: Entry, instrument: str | None, outcomes: Outcomes) -> float | None:
    its = outcomes.get((one.decision.decision_id, instrument or ""))
    return its.pnl_vs_hodl if its else None


def confidences(entries: Sequence[Entry], outcomes: Outcomes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By policy how sure it was, and whether it was right: a sale that brought more than 0; no trade where the call
    that it liked best brought no more. No trade of a policy that names no best call is left out."""
    found: dict[str, list[tuple[float, bool]]] = {}
    for one, proposal in answered(entries):
        sells = proposal["instrument"] is not None
        pnl = pnl_of(one, proposal["instrument"] or proposal.get("best"), outcomes)
        if pnl is not None:
            found.setdefault(proposal["source"], []).append((proposal["confidence"], (pnl > 0) == sells))
    return {name: (np.array([c for c, _ in its]), np.array([r for _, r in its], float)) for name, its in found.items()}


def calibration_of(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Brier's score, the expected calibration error (Naeini et al. 2015), and the bins that have some."""
    bins, count = calibration_bin(confidence), len(confidence)
    used = [(b, np.flatnonzero(bins == b)) for b in range(CALIBRATION_BINS)]
    rows = [
        {"from": b / CALIBRATION_BINS, "to": (b + 1) / CALIBRATION_BINS, "n": len(its),
         "confidence": float(confidence[its].mean()), "right": float(right[its].mean())}
        for b, its in used if len(its)
    ]  # fmt: skip
    error = sum(row["n"] * abs(row["confidence"] - row["right"]) for row in rows) / count
    return {"n": count, "confidence": float(confidence.mean()), "right": float(right.mean()),
        "brier": float(np.mean((confidence - right) ** 2)), "calibration_error": error, "bins": rows}  # fmt: skip


def predictions(entries: Sequence[Entry], outcomes: Outcomes) -> dict[str, np.ndarray]:
    """By policy (K, 2) what it expected of the call that it liked best, and what came, in % of spot."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one, proposal in answered(entries):
        pnl = pnl_of(one, proposal.get("best") or proposal["instrument"], outcomes)
        if proposal["q_usd"] is not None and pnl is not None:
            scale = 100 / one.decision.spot
            found.setdefault(proposal["source"], []).append((proposal["q_usd"] * scale, pnl * scale))
    return {name: np.array(pairs) for name, pairs in found.items()}


def thresholds_of(pairs: np.ndarray) -> list[dict[str, Any]]:
    """Had it sold from each threshold on: how often, what it expected and what came, means in % of spot."""
    rows = []
    for threshold in THRESHOLDS:
        its = pairs[pairs[:, 0] > threshold]
        means = its.mean(0).tolist() if len(its) else [math.nan, math.nan]
        rows.append({"threshold": threshold, "n": len(its), "predicted": means[0], "realised": means[1]})
    return rows
