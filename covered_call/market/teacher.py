"""What the teacher makes of a chain: which calls it looks at, what score it gives them, and which one it sells."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from covered_call.candidates.columns import columns_of, contexts_of, floats, time_of, word_of
from covered_call.candidates.columns import known as known_or_none
from covered_call.candidates.context import (
    MEAN_DAYS,
    TARGET_DELTA,
    Known,
    Prices,
    closes_until,
    context_of,
    distance_of,
    levels_of,
    regimes,
    returns_of,
    vols_of_closes,
)
from covered_call.candidates.context_lines import ATM_RANK
from covered_call.candidates.schema import CHAIN_COLUMNS, Candidate, CandidatesError, Decision, LoggedDecision, shown
from covered_call.candidates.score_terms import THRESHOLD, penalties_of, teacher_score, teacher_terms
from covered_call.candidates.series import Series, read_series
from covered_call.candidates.vols import UNDERLYING
from covered_call.market.snapshot import BadRows, QuotedCalls, Snapshot

DAY_BEGINS = 8.0  # hours after midnight, UTC: Deribit's days, and what a date alone means in a file of spots


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which calls of a chain are candidates, how they are scored, and from which score on the best is sold."""

    min_dte: float
    max_dte: float
    min_delta: float
    max_delta: float
    score: str = "backtest"  # or "live"
    threshold: float = THRESHOLD
    premium_in_score: bool = True
    target_dte: float = 7.0
    above_spot: bool = False  # strikes above spot alone
    two_sided: bool = False  # with a bid and an ask alone
    min_premium_usd: float = 0.0
    min_ivrv: float = 0.0  # of those whose IV/RV is known
    max_candidates: int = 10
    best_by: str = "score"  # or "premium": of which more are left out than max_candidates
    min_open_interest: float = 0.0
    max_spread_pct: float = math.inf  # of the middle


# "backtest" is the teacher's, whose files these are; the others are what agents of its kind trade by.
PRESETS = {
    "backtest": Rules(3, 21, 0.15, 0.35),
    "production": Rules(
        5, 10, 0.20, 0.30, score="live", threshold=-math.inf, target_dte=7.5, above_spot=True, two_sided=True,
        min_premium_usd=50, min_ivrv=1.2, max_candidates=5, best_by="premium",
    ),
    "research": Rules(
        1, 21, 0.10, 0.40, score="live", threshold=-math.inf, target_dte=11, above_spot=True, two_sided=True,
        min_premium_usd=50, min_ivrv=1.0,
    ),
    "synthetic": Rules(7, 7, 0.15, 0.35, premium_in_score=False, max_candidates=26),
}  # fmt: skip
BREAKS = 5  # days in which a resistance was broken
LEVEL_DAYS, LEVEL_LEAST = 50, 10  # closes that levels are of, and those of them that have to be there: see levels_of


def read_spots(pattern: str, underlying: str, *others: str) -> Series:
    """Prices by time; a date alone is its 08:00 UTC."""
    if others and UNDERLYING not in pattern:
        raise CandidatesError(
            f"spots={shown(pattern)}: the chains hold {', '.join([*others, underlying])}, each with its own prices. "
            f"Name the files with {UNDERLYING} in the place of the name."
        )
    return read_series(pattern.replace(UNDERLYING, underlying), "spots", "price", day_begins=DAY_BEGINS)


class Past(NamedTuple):
    """What daily closes say of the market at some time, as fractions; None where they do not reach."""

    realised_vol: float | None  # of 30 daily log returns, a year
    short_vol: float | None  # of 7
    distance: float | None  # of spot from the mean of the last 50 closes
    week: float | None  # return of spot over 7 days
    month: float | None  # over 30


UNKNOWN = Past(None, None, None, None, None)


def past_of(closes: Series, time: int, spot: float) -> Past:
    """From the closes that are known at a time, in microseconds since 1970, and the spot of then.

    A missing day leaves what needs it unknown; without all closes of the mean no return counts, either.
    """
    known, times, spots = Prices(closes.time, closes.number), np.array([time]), np.array([spot])
    days = closes_until(known, times, MEAN_DAYS)
    distance = distance_of(days, spots)
    returns = returns_of(known, times, spots, (7, 30))[0] + 0 * distance
    numbers = [vols_of_closes(days, 30), vols_of_closes(days, 7), distance, returns]
    return Past(*known_or_none(np.concatenate(numbers)))


class Broken(NamedTuple):
    """The resistances that spot broke of late.

    That of a day is the nearest level above its close, as it was known then (see context.levels_of). It is broken once
    a later close, or spot, is above it.
    """

    broken_resistances: int | None  # of the last BREAKS days; None where closes are missing
    broken_resistance: float | None  # USD, the lowest of them


def broken_of(closes: Series, time: int, spot: float) -> Broken:
    """From the closes that are known at a time, in microseconds since 1970, and the spot of then."""
    (days,) = closes_until(Prices(closes.time, closes.number), np.array([time]), LEVEL_DAYS + BREAKS)
    if np.isnan(days[-LEVEL_LEAST - BREAKS :]).any() or not spot > 0:
        return Broken(None, None)
    broken = []
    for ago in range(1, BREAKS + 1):
        close = days[-ago - 1]
        (above,) = levels_of(days[None, :-ago], close[None])["resistance"]  # of the close; NaN where there is none
        if max(*days[-ago:], spot) / close - 1 > above:
            broken.append(float(close * (1 + above)))
    return Broken(len(broken), min(broken, default=None))


def with_context(
    decision: Decision, closes: Series, snapshot: Snapshot | None = None, vols: Series | None = None
) -> Decision:
    """The decision with the market's context at its time, as files have it (see context_of): of these closes, of the
    market's vols, and of its candidates, and the shape of the snapshot's chain. What would take the vols of earlier
    decisions is unknown."""
    columns = columns_of([LoggedDecision(decision, None, ())])
    market = None if vols is None else {0: Prices(vols.time, vols.number)}
    known = Known({0: Prices(closes.time, closes.number)}, {}, market)
    (context,) = contexts_of(dataclasses.replace(columns, context=context_of(columns, known)))
    shape = dict(zip(CHAIN_COLUMNS, known_or_none(np.array(snapshot.shape)), strict=True)) if snapshot else {}
    ranked = {ATM_RANK: None} if snapshot else {}
    return decision._replace(context={**(context or {}), **ranked, **shape})


def score_of(calls: QuotedCalls, spot: float, past: Past, rules: Rules) -> np.ndarray:
    """(C,) The teacher's formulas; a realised vol that is not known counts as the implied one."""
    ivrv = calls.iv / past.realised_vol if past.realised_vol else np.ones(len(calls.iv))
    delta = abs(calls.delta)
    if rules.score == "live":
        late = (calls.dte - rules.target_dte) / rules.target_dte
        richness = np.maximum(ivrv - rules.min_ivrv, 0)
        return np.log1p(calls.mark * spot) - 5 * (delta - TARGET_DELTA) ** 2 - 2 * late**2 + richness
    premium_pct = 100 * calls.mark if rules.premium_in_score else 0.0
    terms = teacher_terms(ivrv, calls.delta, calls.dte, premium_pct, rules.target_dte)
    return teacher_score(terms, penalties(calls.strike / spot, past))


def penalties(moneyness: np.ndarray, past: Past) -> dict[str, np.ndarray]:
    """(C,) each: what the scores lose by the market's state; nothing where the past is unknown."""
    _, short_vol, distance, week, month = floats(past)
    regime = regimes(np.array([distance]), np.array([month]))
    return penalties_of(
        moneyness, regime, {"dist_ma50": distance, "ret_30d": month, "ret_7d": week, "rv_7d": short_vol}
    )


def trend_of(distance: float, month: float) -> str | None:
    """ "bull", "bear" or "sideways", from spot's distance from its mean and its return over 30 days, as fractions."""
    return word_of("regime", regimes(np.array([distance]), np.array([month])).item())


class Offer(NamedTuple):
    """A decision that a snapshot puts, its candidates best score first, and what the teacher sells."""

    decision: Decision
    rows: np.ndarray  # (N,) where the candidates stand among the snapshot's calls
    chosen: int | None
    left_out: dict[str, int]  # by the rule that a call did not keep: how many


def offer_of(
    snapshot: Snapshot,
    rules: Rules,
    past: Past = UNKNOWN,
    exit_style: str = "hold_to_expiry",
    bad: BadRows | None = None,
) -> Offer:
    """Raises CandidatesError for a candidate without a mark, unless ``bad`` leaves it out."""
    calls, spot, bad = snapshot.calls, snapshot.spot, bad or BadRows()
    ratio = calls.iv / past.realised_vol if past.realised_vol else np.full(len(calls.iv), np.nan)
    rows, left_out = keep(snapshot, rules, ratio)
    for row in rows[np.isnan(calls.mark[rows])].tolist():
        bad.found(snapshot.source, calls.instrument[row], "mark", 0.0, "is no mark above 0")
    rows = rows[~np.isnan(calls.mark[rows])]
    scores = score_of(QuotedCalls(*(values[rows] for values in calls)), spot, past, rules)
    by = scores if rules.best_by == "score" else calls.mark[rows]
    best = np.sort(np.argsort(-by, kind="stable")[: rules.max_candidates])
    if len(best) < len(rows):
        left_out["max_candidates"] = len(rows) - len(best)
    order = best[np.lexsort((calls.strike[rows[best]], -scores[best]))]
    candidates = tuple(
        Candidate(
            calls.instrument[row], float(calls.strike[row]), float(calls.dte[row]), float(calls.delta[row]),
            float(scores[place]), float(calls.iv[row]), None if math.isnan(ratio[row]) else float(ratio[row]),
        )
        for place, row in zip(order.tolist(), rows[order].tolist(), strict=True)
    )  # fmt: skip
    decision = Decision(time_of(snapshot.time), snapshot.underlying, exit_style, spot, candidates)
    sells = bool(candidates) and candidates[0].score >= rules.threshold
    return Offer(decision, rows[order], 0 if sells else None, left_out)


def keep(snapshot: Snapshot, rules: Rules, ratio: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """The calls that keep all rules, and of the others how many break each, the first that they break."""
    calls, spot = snapshot.calls, snapshot.spot
    middle = (calls.ask + calls.bid) / 2
    keeps = {
        "dte": (calls.dte >= rules.min_dte) & (calls.dte <= rules.max_dte),
        "delta": (abs(calls.delta) >= rules.min_delta) & (abs(calls.delta) <= rules.max_delta),
        "above_spot": (calls.strike > spot) | (not rules.above_spot),
        "two_sided": ~np.isnan(middle) | (not rules.two_sided),
        "min_premium_usd": (calls.mark * spot >= rules.min_premium_usd) | (not rules.min_premium_usd),
        "min_ivrv": ~(ratio < rules.min_ivrv),
        "min_open_interest": (calls.open_interest >= rules.min_open_interest) | (not rules.min_open_interest),
        "max_spread_pct": ~(100 * (calls.ask - calls.bid) > rules.max_spread_pct * middle)
        & (~np.isnan(middle) | np.isinf(rules.max_spread_pct)),
    }
    good, left_out = np.ones(len(calls.strike), bool), {}
    for name, its in keeps.items():
        if lost := int((good & ~its).sum()):
            left_out[name] = lost
        good &= its
    return np.flatnonzero(good), left_out


def rules_of(preset: str, **changed) -> Rules:
    """A preset with some of its rules changed.

    Raises:
        CandidatesError: for a preset that is none.
    """
    if preset not in PRESETS:
        raise CandidatesError(f"preset={shown(preset)}: choose one of {', '.join(PRESETS)}.")
    return dataclasses.replace(PRESETS[preset], **changed)
