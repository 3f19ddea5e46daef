"""The teacher's own chains: what it would have been offered on any series of spots, priced at one vol.

No market quoted these calls. They are how the backtest that the teacher's files come from makes its candidates.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from covered_call.candidates.chains import rolls_of
from covered_call.candidates.columns import DAY, columns_of, time_of
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import Basis, Replay, Terms, net_of
from covered_call.candidates.pricing import DAYS_PER_YEAR, black_scholes_call
from covered_call.candidates.schema import CandidatesError, LoggedDecision, Outcome
from covered_call.candidates.series import Series
from covered_call.candidates.settlement import PRESETS
from covered_call.candidates.vols import Vols
from covered_call.market.snapshot import QuotedCalls, Snapshot, black_76_delta
from covered_call.market.teacher import Offer

DTE = 7
# From each spot in USD the step of the strikes, and how many steps around the spot there are. Of ETH the steps are
# the teacher's; from which spots, is assumed.
GRIDS = {
    "BTC": ((50_000, 1000), (10_000, 500), (0, 250)),
    "ETH": ((3_000, 50), (1_000, 25), (0, 10)),
}
LOWEST_STEP, HIGHEST_STEP = -5, 20


def snapshots(closes: Series, underlying: str, vol_at: Callable[[int], float], source: str) -> Iterator[Snapshot]:
    """One for each of the closes.

    Args:
        vol_at: the vol of a time in microseconds since 1970, as a fraction a year; NaN where it is not known.

    Raises:
        CandidatesError: for an underlying whose strikes are not known.
    """
    if underlying not in GRIDS:
        raise CandidatesError(f"underlying={underlying!r}: the strikes are known of {' and '.join(GRIDS)} alone.")
    for time, spot in zip(closes.time.tolist(), closes.number.tolist(), strict=True):
        yield snapshot(underlying, time, spot, vol_at(time), source)


def snapshot(underlying: str, time: int, spot: float, vol: float, source: str) -> Snapshot:
    strike = strikes(underlying, spot) if vol > 0 else np.array([])
    years, name = DTE / DAYS_PER_YEAR, f"{underlying}-{time_of(time + DTE * DAY):%d%b%y}".upper()
    expiry = np.full(len(strike), time + DTE * DAY)
    unknown, spots, vols = (np.full(len(strike), value) for value in (np.nan, spot, vol))
    mark = black_scholes_call(spot, strike, years, vols) / spot
    return Snapshot(source, underlying, time, spot, "the series of spots", QuotedCalls(
        np.array([f"{name}-{one:g}-C" for one in strike.tolist()], object), strike, expiry,
        np.full(len(strike), float(DTE)), spots, mark, unknown, unknown, vols,
        black_76_delta(spots, strike, np.full(len(strike), years), vols),
        unknown, unknown,
    ))  # fmt: skip


def strikes(underlying: str, spot: float) -> np.ndarray:
    """USD, ascending."""
    step = next(step for least, step in GRIDS[underlying] if spot >= least)
    found = round(spot / step) * step + step * np.arange(LOWEST_STEP, HIGHEST_STEP + 1)
    return found[found > 0].astype(float)


def outcomes_of(offers: Sequence[Offer]) -> list[tuple[float | None, ...]]:
    """P&L vs HODL in USD a coin of each offer's candidates, as the teacher settles them; None where unknown. A chain
    that the end of the series cuts off is marked there."""
    logged = [
        LoggedDecision(one.decision, one.chosen, (Outcome(None, None, None),) * len(one.decision.candidates))
        for one in offers
    ]
    columns, options = columns_of(logged), CoveredCallCandidatesConfig(settlement="teacher", keep_cut=True)
    basis = Basis(
        columns.names, columns.underlying, columns.exit_style, columns.time, columns.spot, rolls_of(columns, options)
    )
    terms = {
        style: Terms("teacher", PRESETS["teacher"], Vols()) for style in {one.decision.exit_style for one in offers}
    }
    found = net_of(Replay(basis, terms, options).of_candidates(columns), options).tolist()
    known = [None if np.isnan(one) else one for one in found]
    return [tuple(known[begin:end]) for begin, end in zip(columns.offsets, columns.offsets[1:], strict=False)]
