"""A picture for each question that a report answers."""

import datetime
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Plot

from covered_call.candidates.columns import time_of
from covered_call.evaluation import metrics
from covered_call.evaluation.cases import Cases
from covered_call.evaluation.money import ALL, Result, play
from covered_call.evaluation.rows import MODEL, Q_SCORER, TEACHER, Row
from covered_call.evaluation.sections import (
    CALIBRATION,
    EQUITY,
    RELIABILITY,
    Evaluation,
    calibration_of,
    market_name,
    show,
)
from covered_call.value_model.walk_forward import draw_reliability, png

LINES: dict[str, dict[str, Any]] = {  # of the equity plot; that of a rule is dashed
    TEACHER: {"color": "tab:grey", "linewidth": 5, "alpha": 0.5},
    Q_SCORER: {"color": "tab:green"},
    MODEL: {"color": "tab:blue"},
}


def draw(evaluation: Evaluation) -> dict[str, bytes]:
    """PNGs by their names: the equity for each exit style and, for what is there, the calibration of the model and the
    reliability of the Q-scorer."""
    cases, rows, rule = evaluation.cases, evaluation.rows, evaluation.rule
    overall, plots = [result for result in evaluation.results if result.group.name == ALL], {}
    for result in overall:
        plots[EQUITY.format(market=market_name(result))] = draw_equity(result, rows, rule, cases)
    if rows[-1].name == MODEL:
        plots[CALIBRATION] = draw_calibration(evaluation)
    if evaluation.study:
        plots[RELIABILITY] = draw_reliability(evaluation.study.pairs)
    return plots


def draw_equity(result: Result, rows: list[Row], rule: Row, cases: Cases) -> bytes:
    """Cumulative P&L vs HODL by decision time, in % of the coins that are held at once, as far as it is known; what it
    may come to is said in words."""
    figure = Plot(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="black", linewidth=1, label="never sell (HODL)")
    times: Any = [time_of(time) for time in result.times.tolist()]
    for row in [rows[0], rule, *(row for row in rows if row.name in (Q_SCORER, MODEL))]:
        style = LINES.get(row.name, {"color": "tab:orange", "linestyle": "--"})
        played = play(row, rule, cases, result.group.places, result.times)
        percent = 100 * played.pnl / played.spot[:, None] / max(result.held.mean, 1)
        low, high = (np.bincount(played.time, side, len(result.times)).cumsum() for side in percent.T)
        known = int((low == high).argmin()) if (low != high).any() else len(low)
        name = f"best rule: {row.name}" if row is rule else row.name
        label = name + unknown_from(times, known, low, high)
        axis.plot(times[:known], low[:known], label=label, **style)
        if 0 < known < len(low):
            axis.plot(times[known - 1], low[known - 1], marker="X", markersize=9, color=style["color"])
    axis.set(ylabel="cumulative P&L vs HODL (% of the coins held)", xlabel="decision time")
    market = f"{result.group.underlying}, {result.group.exit_style}"
    axis.set(title=f"{market}: how much more than holding would each have brought?")
    figure.autofmt_xdate()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False)
    return png(figure)


def unknown_from(times: list[datetime.datetime], known: int, low: np.ndarray, high: np.ndarray) -> str:
    if known == len(times):
        return ""
    if np.isnan([low[-1], high[-1]]).any():
        return f" (X: not known from {times[known].date()} on, nor within what bounds)"
    return f" (X: not known from {times[known].date()} on; in the end {low[-1]:+.1f} to {high[-1]:+.1f} %)"


def draw_calibration(evaluation: Evaluation) -> bytes:
    """How often the teacher gave an answer against its probability, in bins; their size by the area of dots."""
    figure = Plot(figsize=(7.5, 7), layout="constrained")
    axis, lessons = figure.subplots(), []
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="as often as it believes")
    for result, _ in evaluation.overall:
        found = calibration_of(evaluation, result)
        if found is None:
            continue
        lesson, probability, right = found
        name = f"{result.group.underlying}, {result.group.exit_style}"
        lessons.append(f"{name}: {lesson}")
        bins = metrics.calibration_bin(probability)
        used, sizes = np.unique(bins, return_counts=True)
        believed = [probability[bins == b].mean() for b in used]
        came = [right[bins == b].mean() for b in used]
        error = show("calibration_error", result.figures[MODEL]["calibration_error"], with_interval=False)
        line_style = "--" if axis.collections else "-"  # two of the same answers would hide each other
        [line] = axis.plot(believed, came, line_style, label=f"{name}, calibration error {error}")
        axis.scatter(believed, came, s=300 * sizes / sizes.sum() + 5, color=line.get_color(), alpha=0.5)
    axis.set(xlabel="probability that the model gives an answer", ylabel="share that the teacher gave")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    title = "Below the line it is too sure, above it not sure enough (dots by their share)"
    axis.set_title("\n".join([title, *lessons]), fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend()
    return png(figure)
