"""The report of an evaluation: a table for the terminal, report.md and metrics.json, and a plot for each question."""

import datetime
import importlib.metadata
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure as Plot

from covered_call import atomic
from covered_call.candidates.columns import time_of
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.evaluation import metrics
from covered_call.evaluation.cases import MIN_CORRELATION, Cases
from covered_call.evaluation.metrics import METRICS, Figure
from covered_call.evaluation.money import ALL, Result, play
from covered_call.evaluation.resampling import MIN_BLOCKS, REPLICATES
from covered_call.evaluation.rows import MODEL, Q_SCORER, TEACHER, Row
from covered_call.tables import align, markdown
from covered_call.value_model.learning import Gates, gates_text
from covered_call.value_model.walk_forward import Comparison, comparison_json, draw_reliability, png


class Study(NamedTuple):
    """What the Q-scorer predicted beside what came, by exit style: see walk_forward.compare and candidate_pairs.

    ``doubtful`` are the exit styles whose computed outcomes do not follow the recorded ones.
    """

    metadata: dict
    doubtful: list[str]
    compared: dict[str, Comparison]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]

    def sentences(self) -> list[str]:
        doubt = " WARNING: these are computed outcomes, which do not follow the recorded ones here."
        return [
            f"{Q_SCORER}, {style}: {compared.sentence()}{doubt if style in self.doubtful else ''}"
            for style, compared in self.compared.items()
        ]


class Evaluation(NamedTuple):
    """All that a report tells: what was judged on which decisions, and how each policy did there.

    Args:
        model: the folder of the tuned model; None if the baselines alone are judged.
        rows: the picks of each policy at ``cases``, the decisions of ``split``.
        rule: the one of ``rows`` that agrees most with the teacher.
        notes: what a reader of the figures must know beside them.
        study: None if there is no Q-scorer.
    """

    model: str | None
    split: str
    files: list[str]
    config: CoveredCallCandidatesConfig
    cases: Cases
    rows: list[Row]
    rule: Row
    results: list[Result]
    notes: list[str]
    study: Study | None


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def show(metric: str, figure: Figure, with_interval: bool = True) -> str:
    """0.931 [0.901, 0.955]; -12 to 30 where only bounds are known; n/a where it is not defined."""
    if math.isnan(figure.low) or math.isnan(figure.high):
        return "n/a"
    form = METRICS[metric].format
    text = format(figure.low, form)
    if figure.high > figure.low:
        text += f" to {figure.high:{form}}"
    if with_interval and figure.interval:
        text += f" [{figure.interval[0]:{form}}, {figure.interval[1]:{form}}]"
    return text


HEAD = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced",
    "trade_rate": "trade rate",
    "coverage": "coverage",
    "mean_pnl": "P&L a decision",
    "minus_teacher": "minus teacher",
}


def terminal_table(evaluation: Evaluation) -> str:
    """The policies of each exit style, most like the teacher first."""
    blocks = []
    for result in evaluation.results:
        group, figures = result.group, result.figures
        if group.name != ALL:
            continue
        cells = [["", *HEAD.values()]]
        for name, found in figures.items():
            short = ("balanced_accuracy", "trade_rate", "coverage")
            cells.append([name, *(show(metric, found[metric], metric not in short) for metric in HEAD)])
        blocks.append(f"\n{describe(evaluation.split, result)}\n\n{align(cells)}")
        if MODEL in figures:
            differs = show("minus_best_rule", figures[MODEL]["minus_best_rule"])
            blocks.append(f"\nP&L a decision, {MODEL} minus best rule: {differs}")
    return "\n".join(
        [
            *blocks,
            "\nBest accuracy first; [95 % intervals]; P&L vs HODL in USD a unit of underlying; 'a to b' are bounds",
            f"where outcomes are unknown. The best rule is: {evaluation.rule.name}.",
        ]
    )


def describe(split: str, result: Result) -> str:
    group = result.group
    name = "" if group.name == ALL else f", {group.name}"
    span = f"{result.first.date()} to {result.last.date()}"
    return f"{group.exit_style}{name}: {len(group.places)} decisions of {split}, {span}"


def markdown_table(figures: dict[str, dict[str, Figure]], names: list[str]) -> str:
    """The figures of these names for each policy."""
    head = ["", *(name.replace("_", " ") for name in names)]
    return markdown([head, *([row, *(show(name, found[name]) for name in names)] for row, found in figures.items())])


# ---------------------------------------------------------------------------------------------------------------------
# Report
IMITATION = list(METRICS)[: list(METRICS).index("coverage")]
MONEY = [
    "coverage",
    "total_pnl",
    "mean_pnl",
    "mean_pnl_known",
    "hit_rate",
    "worst_month",
    "max_drawdown",
    "mean_regret",
]
DIFFERENCES = ["minus_teacher", "minus_best_rule"]
HOW = """\
P&L is in USD for each unit of underlying, against holding it (HODL = 0), at the time of the decision. Where a policy \
did as the teacher, its outcome is the recorded one. Where it sold another call, the outcome is computed: for \
hold_to_expiry the Black-Scholes premium less what the call pays at the spot at expiry, which is that of the decision \
nearest to it, at most {tolerance:g} hours away; for tp_and_roll a replay, {take_profit:.0%} of the premium taken as \
profit and then a roll into the call nearest to delta {roll_delta:g}. It is unknown where iv or that spot is missing, \
for any other exit style, and for tp_and_roll unless the replay follows the recorded trades (correlation at least \
{correlation:g}). An unknown outcome never counts as zero: totals, means, worst month and drawdown are then bounds, \
`a to b`, with the unknown ones replaced by the worst and by the best outcome that the teacher recorded in that year \
(in all years, if there is none in that one). These \
bounds hold if no other call did worse, or better, than all of those. `mean pnl known` and `hit rate` leave the \
unknown ones out. Differences and regret \
compare like with like: a computed outcome with a computed one.

Intervals hold 95 % of {replicates:,} resamples of a moving-block bootstrap over decision times, in blocks that span \
the longest option's life; bounds have the interval of both ends. There is none where the data hold fewer than \
{blocks} blocks. The random policy is an expectation: each answer with the same probability."""
TEXT, METRICS_FILE, CALIBRATION, RELIABILITY = "report.md", "metrics.json", "calibration.png", "q_scorer.png"
EQUITY = "equity_{style}.png"
LINES: dict[str, dict[str, Any]] = {  # of the equity plot; that of a rule is dashed
    TEACHER: {"color": "tab:grey", "linewidth": 5, "alpha": 0.5},
    Q_SCORER: {"color": "tab:green"},
    MODEL: {"color": "tab:blue"},
}


def how_measured(config: CoveredCallCandidatesConfig) -> str:
    return HOW.format(
        tolerance=config.expiry_tolerance, take_profit=config.take_profit, roll_delta=config.roll_delta,
        correlation=MIN_CORRELATION, replicates=REPLICATES, blocks=MIN_BLOCKS,
    )  # fmt: skip


def report_files(evaluation: Evaluation) -> dict[str, str | bytes]:
    """The files of a report by their names, metrics.json first."""
    plots = draw(evaluation)
    figures = json.dumps(as_json(evaluation), indent=2, allow_nan=False)
    return {METRICS_FILE: figures, TEXT: report_text(evaluation, list(plots)), **plots}


def write_report(folder: Path, files: dict[str, str | bytes]) -> None:
    """All of a report or nothing of it, and nothing of the one that was there, such as the plots of another model."""
    old = []
    if (folder / METRICS_FILE).is_file():  # else the folder is not one that reports go to
        plots = (EQUITY.format(style="*"), CALIBRATION, RELIABILITY)
        old = [path.name for pattern in plots for path in folder.glob(pattern)]
    atomic.write_together(folder, files, old)


def report_text(evaluation: Evaluation, plots: list[str]) -> str:
    parts = [f"# {evaluation.model or 'Baselines'}, {evaluation.split} split"]
    parts += ["Read from " + ", ".join(f"`{os.path.basename(path)}`" for path in evaluation.files) + "."]
    parts += [f"The best rule, the baseline that agrees most with the teacher here, is: {evaluation.rule.name}."]
    parts += ["\n".join(f"- {note}" for note in evaluation.notes)]
    for result in evaluation.results:
        parts += group_text(result, evaluation.split, plots)
    parts += [f"![{plot}]({plot})" for plot in plots if plot == CALIBRATION]
    if evaluation.study:
        parts += [f"## {Q_SCORER}", *study_text(evaluation.study), f"![{RELIABILITY}]({RELIABILITY})"]
    parts += ["## How it is measured", how_measured(evaluation.config)]
    meanings = [[name.replace("_", " "), m.better or "neither", m.meaning] for name, m in METRICS.items()]
    parts += [markdown([[f"metric (version {metrics.VERSION})", "better", ""], *meanings])]
    return "\n\n".join(parts) + "\n"


def group_text(result: Result, split: str, plots: list[str]) -> list[str]:
    group, times, block, figures = result
    title = f"{describe(split, result)} (blocks of {block})"
    if group.name != ALL:
        return [f"### {title}", markdown_table(figures, ["accuracy", "coverage", "mean_pnl", *DIFFERENCES])]
    parts = [f"## {title}"]
    for what, names in (("Imitation", IMITATION), ("Money", MONEY), ("Differences", DIFFERENCES)):
        parts += [f"{what}:", markdown_table(figures, names)]
    return parts + [f"![{plot}]({plot})" for plot in plots if group.exit_style in plot]


def study_text(study: Study) -> list[str]:
    meta = study.metadata
    fitted = (
        f"Learnt from {meta['train']['known']:,} known outcomes, {meta['train']['from'][:10]} to "
        f"{meta['train']['to'][:10]}; offset of {100 * meta['offset']:+.3f} % of spot, fitted on "
        f"{meta['validation']['known']:,}, {meta['validation']['from'][:10]} to {meta['validation']['to'][:10]}; "
        f"{gates_text(Gates(**meta['gates']))}."
    )
    return [fitted, "\n".join(f"- {sentence}" for sentence in study.sentences())]


def study_json(study: Study | None) -> dict | None:
    """None where there is no Q-scorer; figures that are not defined are null."""
    if study is None:
        return None
    compared = {style: comparison_json(found) for style, found in study.compared.items()}
    return {"fitted": study.metadata, "by_exit_style": compared}


def as_json(evaluation: Evaluation) -> dict:
    return {
        "metrics_version": metrics.VERSION,
        "definitions": {name: {"better": m.better, "meaning": m.meaning} for name, m in METRICS.items()},
        "model": evaluation.model,
        "split": evaluation.split,
        "data_files": [os.path.basename(path) for path in evaluation.files],
        "best_rule": evaluation.rule.name,
        "notes": evaluation.notes,
        "groups": [result_json(result) for result in evaluation.results],
        "versions": {name: importlib.metadata.version(name) for name in ("scikit-learn", "arch", "numpy", "datasets")},
        "q_scorer": study_json(evaluation.study),
    }


def result_json(result: Result) -> dict:
    group, times, block, figures = result
    return {
        "underlying": group.underlying,
        "exit_style": group.exit_style,
        "group": group.name,
        "decisions": len(group.places),
        "from": result.first.isoformat(),
        "to": result.last.isoformat(),
        "block": block,
        "rows": {row: {name: figure_json(figure) for name, figure in found.items()} for row, found in figures.items()},
    }


def figure_json(figure: Figure) -> dict:
    ends = [None if math.isnan(end) else end for end in (figure.low, figure.high)]
    value = ends[0] if ends[0] == ends[1] else None
    return {"value": value, "low": ends[0], "high": ends[1], "interval": figure.interval}


def draw(evaluation: Evaluation) -> dict[str, bytes]:
    """PNGs by their names: the equity for each exit style and, for what is there, the calibration of the model and the
    reliability of the Q-scorer."""
    cases, rows, rule = evaluation.cases, evaluation.rows, evaluation.rule
    overall, plots = [result for result in evaluation.results if result.group.name == ALL], {}
    for result in overall:
        name = EQUITY.format(style=re.sub(r"[^a-z0-9_]", "_", result.group.exit_style.lower()))
        plots[name] = draw_equity(result, rows, rule, cases)
    if rows[-1].name == MODEL:
        plots[CALIBRATION] = draw_calibration(overall, rows[-1], rule, cases)
    if evaluation.study:
        plots[RELIABILITY] = draw_reliability(evaluation.study.pairs)
    return plots


def draw_equity(result: Result, rows: list[Row], rule: Row, cases: Cases) -> bytes:
    """Cumulative P&L vs HODL by decision time, as far as it is known; what it may come to is said in words."""
    figure = Plot(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="black", linewidth=1, label="never sell (HODL)")
    times = [time_of(time) for time in result.times.tolist()]
    for row in [rows[0], rule, *(row for row in rows if row.name in (Q_SCORER, MODEL))]:
        style = LINES.get(row.name, {"color": "tab:orange", "linestyle": "--"})
        played = play(row, rule, cases, result.group.places, result.times)
        low, high = (np.bincount(played.time, side, len(result.times)).cumsum() for side in played.pnl.T)
        known = int((low == high).argmin()) if (low != high).any() else len(low)
        name = f"best rule: {row.name}" if row is rule else row.name
        label = name + unknown_from(times, known, low, high)
        axis.plot(times[:known], low[:known], label=label, **style)
        if 0 < known < len(low):
            axis.plot(times[known - 1], low[known - 1], marker="X", markersize=9, color=style["color"])
    axis.set(ylabel="cumulative P&L vs HODL (USD a unit)", xlabel="decision time")
    axis.set(title=f"{result.group.exit_style}: how much more than holding would each have brought?")
    figure.autofmt_xdate()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False)
    return png(figure)


def unknown_from(times: list[datetime.datetime], known: int, low: np.ndarray, high: np.ndarray) -> str:
    if known == len(times):
        return ""
    if np.isnan([low[-1], high[-1]]).any():
        return f" (X: not known from {times[known].date()} on, nor within what bounds)"
    return f" (X: not known from {times[known].date()} on; in the end {low[-1]:,.0f} to {high[-1]:,.0f})"


def draw_calibration(results: list[Result], row: Row, rule: Row, cases: Cases) -> bytes:
    """Agreement with the teacher against the probability of the answer, in bins; their size by the area of dots."""
    figure = Plot(figsize=(6.5, 6.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="as often as it believes")
    for group, times, _, figures in results:
        played = play(row, rule, cases, group.places, times)
        bins = metrics.calibration_bin(played.probability)
        used, sizes = np.unique(bins, return_counts=True)
        probability = [played.probability[bins == b].mean() for b in used]
        agreement = [(played.pick == played.teacher)[bins == b].mean() for b in used]
        error = show("calibration_error", figures[MODEL]["calibration_error"], with_interval=False)
        line_style = "--" if axis.collections else "-"  # two styles with the same answers would hide each other
        [line] = axis.plot(probability, agreement, line_style, label=f"{group.exit_style}, calibration error {error}")
        axis.scatter(probability, agreement, s=300 * sizes / sizes.sum() + 5, color=line.get_color(), alpha=0.5)
    axis.set(xlabel="probability that the model gives its answer", ylabel="share that agrees with the teacher")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.set(
        title="Does the model agree with the teacher as often as it believes?\n(dots by their share of decisions)"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    return png(figure)
