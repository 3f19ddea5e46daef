"""Candidates of chains as the CSV that all other commands read."""

import csv
import datetime
import io
import os
from collections.abc import Iterable, Sequence

from covered_call import atomic
from covered_call.candidates.schema import COLUMNS, NO_CANDIDATES, QUOTE_COLUMNS, SELL_CALL, SKIP
from covered_call.market.snapshot import Snapshot
from covered_call.market.teacher import Offer

UNKNOWN = (None,) * 4  # reward, pnl_vs_hodl, max_drawdown_pct, outcome_days


def rows_of(
    snapshot: Snapshot,
    offer: Offer,
    strategy: str,
    chosen: int | None,
    outcomes: Sequence[tuple[float | None, ...]] | None = None,
) -> list[list]:
    """A row for each candidate, of COLUMNS, the quotes and outcome_days, blank where nothing is known; one that says
    NO_CANDIDATES where there is none.

    Args:
        chosen: the candidate that is sold, an index from 0; None for no trade.
        outcomes: of each candidate reward, pnl_vs_hodl, max_drawdown_pct and outcome_days.
    """
    decision = offer.decision
    head = [decision.decision_time.isoformat(), decision.underlying, decision.spot]
    if not decision.candidates:
        blank = [NO_CANDIDATES, 0, 0, 0, 0, None, None, decision.exit_style, 0, 0, SKIP, strategy]
        return [[*head, *blank, *UNKNOWN[:3], *[None] * len(QUOTE_COLUMNS), None]]
    rows = []
    for place, (candidate, row) in enumerate(zip(decision.candidates, offer.rows.tolist(), strict=True)):
        sold = place == chosen
        label = [decision.exit_style, int(chosen is not None), int(sold), SELL_CALL if sold else SKIP, strategy]
        *recorded, days = UNKNOWN if outcomes is None else outcomes[place]
        calls = snapshot.calls
        prices = [float(price[row]) * snapshot.spot for price in (calls.bid, calls.ask, calls.mark)]
        rows.append([*head, *candidate, *label, *recorded, *prices, float(calls.open_interest[row]), days])
    return rows


HEADER = (*COLUMNS, *QUOTE_COLUMNS, "outcome_days")


def file_name(underlying: str, exit_style: str, first: datetime.datetime, last: datetime.datetime, stamp: str) -> str:
    return f"training_candidates_{underlying}_{first:%Y%m%d}_{last:%Y%m%d}_{exit_style}_{stamp}.csv"


def write(path: str | os.PathLike, rows: Iterable[list], columns: Sequence[str] = HEADER) -> None:
    """Whole or not at all. NaN and None are blank."""
    with atomic.replacing(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow(["" if value is None or value != value else value for value in row[: len(columns)]])
        text.detach()
