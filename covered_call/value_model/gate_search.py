"""When does the Q-scorer sell? A coarse grid of gates on the first half of validation, its finalists on the second."""

import csv
import io
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure as Plot
from matplotlib.patches import Rectangle

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import net_outcomes
from covered_call.candidates.schema import LoggedDecision
from covered_call.value_model.learning import Fitted, Gates, QScorerError, fit_offset, gates_text, outcomes
from covered_call.value_model.scorer import ABOVE_PREMIUM, OTHER_STYLE, decide
from covered_call.value_model.walk_forward import cut, decision_times, png

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # % of spot
MIN_CONFIDENCES = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
MIN_ABS_RETURNS = (0.0, 0.1, 0.25, 0.5)  # % of spot
FINALISTS = 5
MIN_TRADES = 10  # a cell of the grid with fewer, but some, is luck


class Cell(NamedTuple):
    """What gates brought over the decisions of a window; ``mean_percent`` (of spot) and ``mean_usd`` a decision."""

    threshold: float
    min_confidence: float
    min_abs_return: float
    decisions: int
    sold: int
    mean_percent: float
    mean_usd: float

    @property
    def gates(self) -> Gates:
        return Gates(*self[:3])


class Best(NamedTuple):
    """A decision's best candidate, with its predictions and its net outcome as % of spot and in USD. What is refused
    whatever the gates are, as its prediction cannot be, has -inf for it."""

    percent: float
    confidence: float
    realised_percent: float
    realised_usd: float


class Search(NamedTuple):
    """The grid on the first window, the finalists on the second, in the order of the first, and the winner.

    ``saved`` is the winner on the second window again, with the offset of both windows; ``offsets`` are both offsets,
    as shares of spot.
    """

    grid: list[Cell]
    finals: list[Cell]
    winner: Cell
    saved: Cell
    offsets: tuple[float, float]
    windows: dict


def optimize(
    learnt: Fitted, validation: Sequence[LoggedDecision], config: CoveredCallCandidatesConfig
) -> tuple[Fitted, Search]:
    """The scorer, with the offset of all of ``validation`` and the gates that did best there.

    On the first half of its decision times, purged, an offset is fitted and the grid is ranked; the FINALISTS best of
    it that differ in what they sell, and the default gates, meet in the second half, and the best mean P&L (% of spot
    a decision) wins. Gates with fewer than MIN_TRADES trades in the first half are no finalists, but never selling is.

    Raises:
        QScorerError: if a half holds fewer than MIN_TRADES decisions whose best candidate has a known outcome.
    """
    halves = dict(zip(("first", "second"), cut(validation, 0.5), strict=True))
    too_short = QScorerError(
        f"The validation split has {len(validation)} decisions, too few to search for gates: a half of it holds fewer "
        f"than {MIN_TRADES} known outcomes. Give more data, a longer validation split, or leave --optimize out."
    )
    if not len(outcomes(halves["first"], config)):
        raise too_short
    early = fit_offset(learnt, halves["first"], config)
    bests = {name: known_bests(early, half, config) for name, half in halves.items()}
    if min(map(len, bests.values())) < MIN_TRADES:
        raise too_short
    combinations = itertools.starmap(Gates, itertools.product(THRESHOLDS, MIN_CONFIDENCES, MIN_ABS_RETURNS))
    grid = [measure(gates, bests["first"]) for gates in combinations]
    finals = [measure(gates, bests["second"]) for gates in pick_finalists(grid, bests["first"])]
    winner = max(finals, key=lambda cell: cell.mean_percent)  # the first, so the better of the first window, of equals
    windows = {
        name: {"from": str(times[0].date()), "to": str(times[-1].date()), "decisions": len(bests[name])}
        for name, times in ((name, decision_times(half)) for name, half in halves.items())
    }
    fitted = fit_offset(learnt, validation, config).with_gates(winner.gates)
    saved = measure(winner.gates, known_bests(fitted, halves["second"], config))
    offsets = early.metadata["offset"], fitted.metadata["offset"]
    return fitted, Search(grid, finals, winner, saved, offsets, windows)


def known_bests(fitted: Fitted, entries: Sequence[LoggedDecision], config: CoveredCallCandidatesConfig) -> list[Best]:
    """Of the decisions whose best candidate has a known outcome: the same ones for all gates."""
    found = []
    answers = decide(fitted, [entry.decision for entry in entries])
    for answer, entry in zip(answers, entries, strict=True):
        came = None if answer.best is None else net_outcomes(entry, config)[answer.best].value
        if came is not None and answer.stopped_by != OTHER_STYLE:
            to_percent = 100 / entry.decision.spot
            predicted = -math.inf if answer.stopped_by == ABOVE_PREMIUM else answer.q_sell * to_percent
            found.append(Best(predicted, answer.confidence, came * to_percent, came))
    return found


def sells(gates: Gates, bests: Sequence[Best]) -> list[bool]:
    percent, confidence = np.array([best[:2] for best in bests]).T
    return (gates.stop(percent, confidence) == "").tolist()


def measure(gates: Gates, bests: Sequence[Best]) -> Cell:
    sold = np.array(sells(gates, bests))
    percent, usd = np.array([(best.realised_percent, best.realised_usd) for best in bests]).T
    return Cell(*gates, len(bests), int(sold.sum()), float((percent * sold).mean()), float((usd * sold).mean()))


def pick_finalists(grid: Sequence[Cell], bests: Sequence[Best]) -> list[Gates]:
    """The best gates of the grid that sell different things, and the default ones; of the same the lowest."""
    different = {}
    for cell in sorted(grid, key=lambda cell: cell.gates):
        if cell.sold == 0 or cell.sold >= MIN_TRADES:
            different.setdefault(tuple(sells(cell.gates, bests)), cell)
    ranked = sorted(different.values(), key=lambda cell: -cell.mean_percent)
    return list(dict.fromkeys([*(cell.gates for cell in ranked[:FINALISTS]), Gates()]))


def search_lines(search: Search) -> list[str]:
    first, second = search.windows["first"], search.windows["second"]
    lines = [
        f"Searched {len(search.grid)} gates on {first['decisions']} decisions, {first['from']} to {first['to']}; "
        f"finalists on {second['decisions']}, {second['from']} to {second['to']}:"
    ]
    for cell in search.finals:
        mark = "  <- chosen" if cell == search.winner else ""
        lines.append(f"  {gates_text(cell.gates)}: {brought(cell)}{mark}")
    if search.winner.mean_percent <= 0:
        lines.append("WARNING: none of them earned more than never selling there: do not expect these gates to.")
    before, after = (100 * offset for offset in search.offsets)
    lines.append(
        f"With the offset of both windows, {after:+.3f} % of spot (of the first alone {before:+.3f} %), the chosen "
        f"gates let through on the second: {brought(search.saved)}"
    )
    return lines


def brought(cell: Cell) -> str:
    return f"{cell.sold} trades, {cell.mean_percent:+.3f} % of spot a decision ({cell.mean_usd:+,.1f} USD)"


def search_json(search: Search) -> dict:
    return {
        "windows": search.windows,
        "finalists": [cell._asdict() for cell in search.finals],
        "winner": search.winner._asdict(),
        "saved": search.saved._asdict(),
    }


def grid_csv(grid: Sequence[Cell]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Cell._fields)
    writer.writerows(grid)
    return text.getvalue().encode()


def draw_grid(search: Search) -> bytes:
    """The grid as one heat map, a PNG; the winner has a frame.

    With thresholds of 0 or more, of threshold and min_abs_return only the larger one counts: one axis holds both.
    """
    figure = Plot(figsize=(11, 7), layout="constrained")
    axis = figure.subplots()
    cells = {(max(cell.threshold, cell.min_abs_return), cell.min_confidence): cell for cell in search.grid}
    columns = sorted({*THRESHOLDS, *MIN_ABS_RETURNS})
    values = [[cells[x, y].mean_percent for x in columns] for y in MIN_CONFIDENCES]
    limit = max(np.abs(values).max(), 1e-9)
    image = axis.imshow(values, origin="lower", aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
    for y, confidence in enumerate(MIN_CONFIDENCES):
        for x, percent in enumerate(columns):
            cell = cells[percent, confidence]
            color = "white" if abs(cell.mean_percent) > 0.6 * limit else "black"
            text = f"{cell.mean_percent:+.3f}\n{cell.sold} sold" if cell.sold else "none sold"
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    winner = search.winner
    corner = columns.index(max(winner.threshold, winner.min_abs_return)), MIN_CONFIDENCES.index(winner.min_confidence)
    for color, width in (("black", 6), ("yellow", 3)):  # one of the two shows on any cell
        axis.add_patch(
            Rectangle(
                (corner[0] - 0.5, corner[1] - 0.5),
                1,
                1,
                fill=False,
                edgecolor=color,
                linewidth=width,
                clip_on=False,
                zorder=3,
            )
        )
    axis.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axis.set_yticks(range(len(MIN_CONFIDENCES)), [f"{value:g}" for value in MIN_CONFIDENCES])
    axis.set(xlabel="the larger of threshold and min_abs_return (% of spot)", ylabel="min_confidence")
    first, second = search.windows["first"], search.windows["second"]
    axis.set_title(
        f"Which gates would have brought most in the first half of validation ({first['from']} to {first['to']}, "
        f"{first['decisions']:,} decisions)?\nFrame: the ones that are saved, of the best here those that did best in "
        f"the second half ({second['from']} to {second['to']})",
        fontsize=10,
    )
    figure.colorbar(image, label="mean P&L vs HODL a decision (% of spot)")
    return png(figure)
