"""The overlay of a policy, marked at each time: what its short calls are worth on a coin that is held, day by day.

Outcomes of neighbouring decisions overlap, so their sum is no equity. Here each call that is sold ties up one coin
until its outcome is settled, and what all open calls gain or lose from one time to the next is divided by the coins
that this takes.
"""

import math
from typing import NamedTuple

import numpy as np

from covered_call.candidates.chains import Segment, hours, mark
from covered_call.candidates.columns import Columns
from covered_call.candidates.outcomes import HOLD_TO_EXPIRY, Replay
from covered_call.candidates.pricing import Calls, Sales, pick
from covered_call.evaluation.metrics import Figure
from covered_call.evaluation.money import YEAR
from covered_call.resampling import Draws, as_it_was, drawdowns, interval, share


class Overlay(NamedTuple):
    """What the overlay on one coin gained from the time before, in % of spot then; NaN from where it is not known."""

    time: np.ndarray  # (T,) int64, microseconds since 1970
    gain: np.ndarray  # (T,) of the overlay
    spot: np.ndarray  # (T,) of the coin itself

    @property
    def years(self) -> float:
        return max(float(self.time[-1] - self.time[0]) / YEAR, 1e-9)


def make_overlay(
    replay: Replay, columns: Columns, rows: np.ndarray, market: tuple[str, str], span: tuple[int, int], coins: int
) -> Overlay:
    """Args:
    rows: (K,) of the candidates that were sold, all of this underlying and exit style.
    span: the first and the last time, in microseconds since 1970.
    coins: how many it takes: as many as decisions are open at once.
    """
    underlying, style = market
    code = columns.names.index(underlying)
    first, last = replay.spots.search(np.array([code, code]), np.array(span), "left")
    last = min(int(last), int(replay.spots.bounds[code + 1]) - 1)  # or the span ends beyond the files
    spot, size = replay.spots.spot[first : last + 1], last - first + 1
    known, change = np.ones(size, bool), np.zeros(size)
    of, trail = columns.decision_of[rows], []
    calls = Calls(*(columns.numbers[name][rows] for name in Calls._fields))
    vols = replay.terms[style].vols.priced(calls, columns.underlying[of], columns.time[of]).iv
    outcomes = replay.of_sales(Sales(columns.underlying[of], columns.time[of], columns.spot[of], *calls), style, trail)
    # A call that is held beyond the end of the files has no outcome, but marks until then.
    held_on = (style == HOLD_TO_EXPIRY) & (outcomes.label_end > replay.spots.time[last]) & ~np.isnan(vols)
    unknown = np.isnan(outcomes.gross) & ~held_on
    if unknown.any():
        known &= replay.spots.time[first : last + 1] < columns.time[of[unknown]].min()
    for segment in trail:
        place, gained = gains(pick_known(segment, ~unknown), replay, style)
        inside = (place >= first) & (place <= last)
        change += np.bincount(place[inside] - first, gained[inside], size)
    before = np.concatenate([spot[:1], spot[:-1]])
    gain = np.where(known, 100 * change / (coins * before), math.nan)
    return Overlay(replay.spots.time[first : last + 1], gain, 100 * (spot / before - 1))


def pick_known(segment: Segment, known: np.ndarray) -> Segment:
    its = known[segment.chain]
    return Segment(segment.chain[its], pick(segment.legs, its), *(values[its] for values in segment[2:]))


def gains(segment: Segment, replay: Replay, style: str) -> tuple[np.ndarray, np.ndarray]:
    """(N,) places and what each call gained there since the place before, in USD: at its sale it pays its costs, and
    at its end what buying it back, or its settlement, takes."""
    rule, spots = replay.terms[style].rule, replay.spots
    sizes = segment.end - segment.begin + 1
    of = np.repeat(np.arange(len(sizes)), sizes)
    place = segment.begin[of] + np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    legs = pick(segment.legs, of)
    left = np.maximum(legs.expiry + hours(rule.settle_hours) - spots.time[place], 0)
    worth = mark(spots.spot[place], legs, left, rule)
    at_sale, at_end = place == segment.begin[of], place == segment.end[of]
    worth = np.where(at_sale, legs.premium, worth)
    worth[at_end] = segment.paid[of[at_end]]
    before = np.where(at_sale, segment.received[of], np.concatenate([[0.0], worth[:-1]]))
    return place, before - worth


# ---------------------------------------------------------------------------------------------------------------------
# Figures


class Risk(NamedTuple):
    """Of one overlay, a year where it says so; NaN where it is not known from end to end."""

    annual: Figure  # % of spot a year
    sharpe: Figure  # mean over deviation, annualised
    sortino: Figure  # mean over downside deviation, annualised
    max_drawdown: Figure  # % of spot, of the sum of gains
    beta: Figure  # of the gains to the coin's own


def risk_of(overlay: Overlay, draws: Draws | None) -> Risk:
    """Args: draws: of the overlay's times; None for no intervals."""
    if np.isnan(overlay.gain).any() or len(overlay.gain) < 2:
        return Risk(*[Figure(math.nan, math.nan, None)] * len(Risk._fields))
    observed = measure(overlay, as_it_was(len(overlay.gain)))
    drawn = measure(overlay, draws) if draws else None
    return Risk(
        *(
            Figure(float(values[0]), float(values[0]), None if drawn is None else interval(drawn[place], drawn[place]))
            for place, values in enumerate(observed)
        )
    )


def measure(overlay: Overlay, draws: Draws) -> list[np.ndarray]:
    """(orders,) of each figure of Risk.

    Sharpe 1994: mean over standard deviation of the excess over holding. Sortino and Price 1994: over the root of the
    mean square of losses alone.
    """
    gain, spot, count = overlay.gain, overlay.spot, len(overlay.gain)
    moments = [gain, gain**2, np.minimum(gain, 0) ** 2, spot, spot**2, gain * spot]
    mean, square, downside, of_spot, spot_square, product = (draws.sums(np.stack(moments, axis=1)) / count).T
    scale = math.sqrt(count / overlay.years)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    return [
        mean * count / overlay.years,
        scale * share(mean, deviation),
        scale * share(mean, np.sqrt(downside)),
        drawdowns(gain[:, None], draws)[:, 0],
        share(product - mean * of_spot, spot_square - of_spot**2),
    ]
