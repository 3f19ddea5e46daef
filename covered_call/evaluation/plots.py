"""A picture for each question that a report answers."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure as Plot

from covered_call.candidates.columns import time_of
from covered_call.evaluation.details import Detail
from covered_call.evaluation.overlay_plots import BEST_RULE, Cost, draw_costs, draw_overlay
from covered_call.evaluation.rows import MODEL, Q_SCORER, TEACHER, Row
from covered_call.evaluation.sections import (
    CALIBRATION,
    COSTS,
    EQUITY,
    RELIABILITY,
    Evaluation,
    calibration_of,
    market_name,
    show,
)
from covered_call.value_model.walk_forward import calibration_bin, draw_reliability


def draw(evaluation: Evaluation) -> dict[str, Plot]:
    """By their names: of each underlying and exit style the overlay and what costs leave of it and, for what is there,
    the calibration of the model and the reliability of the Q-scorer."""
    plots = {}
    for result, detail in evaluation.overall:
        market = market_name(result)
        plots[EQUITY.format(market=market)] = draw_equity(detail, evaluation.rule)
        if detail.costs:
            plots[COSTS.format(market=market)] = draw_costs(costs_of(detail, evaluation.rule))
    if evaluation.rows[-1].name == MODEL:
        plots[CALIBRATION] = draw_calibration(evaluation)
    if evaluation.study:
        plots[RELIABILITY] = draw_reliability(evaluation.study.pairs)
    return plots


def shown(detail: Detail, rule: Row) -> dict[str, str]:
    """The policies that are drawn, and what they are called there."""
    names = {TEACHER: TEACHER, rule.name: f"{BEST_RULE}: {rule.name}", Q_SCORER: Q_SCORER, MODEL: MODEL}
    return {name: label for name, label in names.items() if name in detail.overlays}


def draw_equity(detail: Detail, rule: Row) -> Plot:
    """Of the overlay on one coin, marked at each time."""
    labels = shown(detail, rule)
    curves = {label: np.cumsum(detail.overlays[name].gain) for name, label in labels.items()}
    times: Any = [time_of(time) for time in detail.overlays[TEACHER].time.tolist()]
    return draw_overlay(times, curves, "one coin, % of spot")


def costs_of(detail: Detail, rule: Row) -> list[Cost]:
    return [
        Cost(label, times, figure.low, figure.high, figure.interval)
        for name, label in shown(detail, rule).items()
        for times, figure in detail.costs[name].items()
    ]


def draw_calibration(evaluation: Evaluation) -> Plot:
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
        bins = calibration_bin(probability)
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
    return figure
