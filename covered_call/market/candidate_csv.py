"""Candidates of chains as the CSV that all other commands read."""

import csv
import datetime
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

import numpy as np

from covered_call.candidates.schema import (
    CHAIN_COLUMNS,
    COLUMNS,
    NO_CANDIDATES,
    QUOTED_COLUMNS,
    SELL_CALL,
    SKIP,
    Candidate,
    Decision,
)
from covered_call.market.snapshot import Snapshot

HEADER = (*COLUMNS, *QUOTED_COLUMNS, *CHAIN_COLUMNS)
NOTHING = Candidate(NO_CANDIDATES, 0.0, 0.0, 0.0, 0.0, None, None)
UNKNOWN = (None, None, None)


def quotes_of(snapshot: Snapshot, rows: np.ndarray) -> np.ndarray:
    """(N, 4) bid, ask and mark in USD a coin, and the open interest, of these of its calls; NaN where unknown."""
    calls = snapshot.calls
    prices = [price[rows] * snapshot.spot for price in (calls.bid, calls.ask, calls.mark)]
    return np.stack([*prices, calls.open_interest[rows]], 1)


def rows_of(
    decision: Decision,
    quotes: np.ndarray,
    strategy: str,
    chosen: int | None,
    outcomes: Sequence[tuple[float | None, float | None, float | None]] | None = None,
    shape: Sequence[float | None] = (None, None),
) -> Iterator[list]:
    """The cells of a decision, a row a candidate; a placeholder where there is none.

    Args:
        quotes: (N, 4) of its candidates, as quotes_of has them.
        chosen: the candidate that is sold, an index from 0; None for no trade.
        outcomes: of each candidate P&L vs HODL in USD a coin, the largest drawdown in percent, and days from the
            decision to the last price of them; None or NaN where unknown.
        shape: of its chain, by CHAIN_COLUMNS.
    """
    head = [decision.decision_time.isoformat(), decision.underlying, decision.spot]
    if not decision.candidates:
        yield [
            *head,
            *NOTHING,
            decision.exit_style,
            0,
            0,
            SKIP,
            strategy,
            *UNKNOWN,
            *[None] * len(QUOTED_COLUMNS),
            *shape,
        ]
    known = [UNKNOWN] * len(decision.candidates) if outcomes is None else outcomes
    for place, (candidate, quote, its) in enumerate(zip(decision.candidates, quotes.tolist(), known, strict=True)):
        pnl, drawdown, days = its
        action = [int(chosen is not None), int(place == chosen), SELL_CALL if place == chosen else SKIP]
        yield [*head, *candidate, decision.exit_style, *action, strategy, pnl, pnl, drawdown, *quote, days, *shape]


def file_name(underlying: str, exit_style: str, first: datetime.datetime, last: datetime.datetime, stamp: str) -> str:
    return f"training_candidates_{underlying}_{first:%Y%m%d}_{last:%Y%m%d}_{exit_style}_{stamp}.csv"


def write_rows(file: TextIO, rows: Iterable[Sequence]) -> None:
    """None and NaN are blank."""
    writer = csv.writer(file, lineterminator="\n")
    for row in rows:
        writer.writerow(["" if cell is None or cell != cell else cell for cell in row])
