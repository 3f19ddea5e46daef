"""The plots of report.html, from plain arrays: what the overlay of one coin brought, and what costs leave of it."""

import datetime
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from covered_call.evaluation.rows import HODL, MODEL, Q_SCORER, TEACHER

BEST_RULE = "best rule"  # followed, behind a colon, by the name of the rule
OTHER = "#8c8c8c"
# Told apart by the colour-blind, on white and, as page.css has them, on dark: a test simulates it. Each has a dash of
# its own too, and a wide teacher shows below its copy.
STYLES: dict[str, dict[str, Any]] = {
    TEACHER: {"color": OTHER, "linewidth": 5, "alpha": 0.55},
    BEST_RULE: {"color": "#d55e00", "linestyle": (0, (5, 2))},
    Q_SCORER: {"color": "#8a3ffc", "linestyle": (0, (6, 2, 1, 2))},
    MODEL: {"color": "#0072b2"},
    HODL: {"color": "#000000", "linewidth": 1},
}
LONG_LABEL = 30  # letters: two of them side by side are wider than the plot
MARKERS = {0.0: "o", 1.0: "s", 2.0: "D"}  # by the multiple of costs
LOOK: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "text.parse_math": False,  # names of underlyings and rules are no formulas
}


class Cost(NamedTuple):
    """The mean P&L vs HODL of a policy where each trade costs ``multiple`` of what it is taken to cost, in % of spot a
    decision: the least and the most that it can be, equal where all outcomes are known, NaN where nothing is; and its
    interval, None where there is none."""

    policy: str
    multiple: float
    low: float
    high: float
    interval: tuple[float, float] | None


def style_of(policy: str) -> dict[str, Any]:
    """The same for a policy in every plot; a policy without one of its own is thin and grey."""
    return STYLES.get(policy.split(":")[0], {"color": OTHER, "linewidth": 1})


def draw_overlay(times: list[datetime.datetime], curves: dict[str, np.ndarray], unit: str) -> Figure:
    """Equity of the overlay on one coin, and below it its drawdown; never selling is the line at 0.

    Args:
        times: ascending, shape (T,).
        curves: for each policy its cumulative marked P&L vs HODL at these times, shape (T,), NaN where it is unknown.
        unit: of the curves, such as "% of spot at the start" or "USD a coin".
    """
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        equity, fall = figure.subplots(2, height_ratios=(2, 1), sharex=True)
        for axis in (equity, fall):
            axis.grid(axis="y", alpha=0.3)
            axis.margins(x=0.01)
        for name, curve in (curves | {HODL: np.zeros(len(times))}).items():
            draw_curve(equity, times, curve, label=name + gaps(curve), **style_of(name))
            draw_curve(fall, times, drawdown(curve), **style_of(name))
        equity.set_title(f"Cumulative P&L vs HODL, {unit}")
        fall.set_title(f"Drawdown from its peak, {unit}")
        locator = AutoDateLocator(minticks=3, maxticks=7)
        fall.xaxis.set_major_locator(locator)
        fall.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        for axis in (equity, fall):
            axis.yaxis.set_major_formatter("{x:,g}")
        labels = [name + gaps(curve) for name, curve in curves.items()]
        figure.legend(loc="outside lower left", ncols=1 if max(map(len, labels), default=0) > LONG_LABEL else 2)
    return figure


def draw_curve(axis: Axes, times: list[datetime.datetime], curve: np.ndarray, **style: Any) -> None:
    """A line with holes where it is unknown, and an X where the last of it ends early."""
    axis.plot(np.array(times), curve, **style)
    known = np.flatnonzero(~np.isnan(curve))
    if len(known) and known[-1] < len(curve) - 1:
        axis.plot(times[known[-1]], curve[known[-1]], marker="X", color=style["color"], markersize=8, linestyle="none")


def drawdown(curve: np.ndarray) -> np.ndarray:
    """How far below its peak, or 0, it stands; NaN from the first unknown on, as the peak may have been there."""
    return curve - np.maximum.accumulate(np.maximum(curve, 0.0))


def gaps(curve: np.ndarray) -> str:
    unknown = int(np.isnan(curve).sum())
    return f" (unknown at {unknown:,} of {len(curve):,} times)" if unknown else ""


def draw_costs(rows: list[Cost]) -> Figure:
    """The mean of each policy by what trades cost, with its interval; the first policy on top."""
    policies, multiples = list(dict.fromkeys(row.policy for row in rows)), sorted({row.multiple for row in rows})
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(6.4, 1.4 + 0.62 * len(policies)), layout="constrained")
        axis = figure.subplots()
        axis.axvline(0, **STYLES[HODL])
        for row in rows:
            shift = (multiples.index(row.multiple) - (len(multiples) - 1) / 2) * 0.24
            draw_cost(axis, row, policies.index(row.policy) + shift)
        axis.set_yticks(range(len(policies)), policies)
        axis.set_ylim(len(policies) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title("Mean P&L vs HODL, % of spot a decision, by what trades cost")
        shown = [Line2D([], [], linestyle="none", color="#000000", marker=marker_of(multiple), markersize=6,
                        label="no costs" if multiple == 0 else f"{multiple:g}× costs")
                 for multiple in multiples]  # fmt: skip
        figure.legend(handles=shown, loc="outside lower left", ncols=len(shown), handlelength=1)
    return figure


def draw_cost(axis: Axes, row: Cost, place: float) -> None:
    color = style_of(row.policy)["color"]
    if np.isnan([row.low, row.high]).any():
        axis.text(0, place, " n/a", va="center", fontsize=8, color=color)
        return
    if row.interval:
        axis.plot(row.interval, [place] * 2, color=color, linewidth=1.2)
    ends, marker = [row.low, row.high], marker_of(row.multiple)
    axis.plot(ends, [place] * 2, color=color, linewidth=4, solid_capstyle="butt", marker=marker, markersize=5)


def marker_of(multiple: float) -> str:
    return MARKERS.get(multiple, "^")
