"""What else is told of all decisions of an underlying and an exit style, beside the table of each slice."""

from typing import NamedTuple

import numpy as np

from covered_call.candidates.decisions import Decisions
from covered_call.evaluation.cases import Cases
from covered_call.evaluation.extremes import Trade, extremes
from covered_call.evaluation.luck import Luck, against_luck
from covered_call.evaluation.metrics import Figure
from covered_call.evaluation.money import Result
from covered_call.evaluation.overlay import Overlay, Risk, make_overlay, risk_of
from covered_call.evaluation.rows import HODL, MODEL, Row, Trial
from covered_call.evaluation.scenarios import (
    VOLS,
    BreakEven,
    Scenarios,
    break_evens,
    comparable_places,
    mean_percents,
)
from covered_call.evaluation.slices import Bucket, buckets
from covered_call.resampling import draw


class Detail(NamedTuple):
    """Of one underlying and exit style, all decisions.

    Args:
        compared: decisions at which every outcome is computed, at all costs and vols, which the next three rest on;
            with none they are empty.
        costs: of each policy the mean P&L in % of spot, by multiples of the realistic costs.
        vols: the same by multiples of the files' vol; empty where that varies.
        fixed_vol: the one vol of all premiums; None where it varies.
        subject: the policy whose best and worst trades are shown, best first.
        overlays: of each policy, on one coin, marked at each time.
    """

    luck: Luck
    compared: int
    costs: dict[str, dict[float, Figure]]
    vols: dict[str, dict[float, Figure]]
    break_evens: list[BreakEven]
    fixed_vol: float | None
    buckets: list[Bucket]
    subject: str
    best: list[Trade]
    worst: list[Trade]
    overlays: dict[str, Overlay]
    risks: dict[str, Risk]


def make_detail(
    result: Result,
    rows: list[Row],
    trials: list[Trial],
    rule: Row,
    cases: Cases,
    scenarios: Scenarios,
    decisions: Decisions,
) -> Detail:
    places, times, columns = result.group.places, result.times, cases.columns
    draws = draw(len(times), result.block)
    luck = against_luck(rows, trials, rule, cases, places, times, draws)
    known, fixed = comparable_places(cases, scenarios, places), fixed_vol(cases, places)
    traders = [row for row in rows if row.name != HODL]
    costs, vols, break_even = {}, {}, []
    if len(known):
        costs = mean_percents(traders, scenarios.costs, columns, known, times, draws)
        some = {vol: scenarios.vols[vol] for vol in VOLS}
        vols = mean_percents(traders, some, columns, known, times, draws) if fixed else {}
        break_even = break_evens(traders, scenarios.vols, cases, known)
    subject = next((row for row in rows if row.name == MODEL), rule)
    best, worst = extremes(subject, cases, places)
    sold = buckets(traders, cases, places, times, draws)
    overlays = {row.name: overlay_of(row, result, cases, decisions) for row in traders if not row.at_random}
    risks = risks_of(overlays, result)
    return Detail(luck, len(known), costs, vols, break_even, fixed, sold, subject.name, best, worst, overlays, risks)


def overlay_of(row: Row, result: Result, cases: Cases, decisions: Decisions) -> Overlay:
    """From the first decision to the last label end; unknown where computed outcomes do not count."""
    places, columns = result.group.places, cases.columns
    its = places[row.picks[places] >= 0]
    span = int(columns.time[places].min()), int(cases.label_end[places].max())
    rows = columns.offsets[its] + row.picks[its]
    market = result.group[:2]
    overlay = make_overlay(decisions.replay, columns, rows, market, span, result.held.most)
    fit = decisions.fits.get(market)
    if len(rows) and (fit is None or not fit.trusted):
        return overlay._replace(gain=np.full_like(overlay.gain, np.nan))
    return overlay


def risks_of(overlays: dict[str, Overlay], result: Result) -> dict[str, Risk]:
    """With intervals by blocks that span the longest outcome, as those of the other figures do."""
    some = next(iter(overlays.values()))
    longest = result.times[min(result.block, len(result.times)) - 1] - result.times[0]
    block = max(2, int(np.searchsorted(some.time, some.time[0] + longest, "right")))
    draws = draw(len(some.time), block)
    return {name: risk_of(overlay, draws) for name, overlay in overlays.items()}


def fixed_vol(cases: Cases, places: np.ndarray) -> float | None:
    """The vol that every candidate of these decisions is priced at, if they have but one."""
    iv = cases.vol[np.isin(cases.columns.decision_of, places)]
    iv = iv[~np.isnan(iv)]
    return float(iv[0]) if len(iv) and np.ptp(iv) < 1e-9 else None
