"""The report of an evaluation: a table for the terminal, report.md and metrics.json, and its pictures."""

import importlib.metadata
import json
import math
import os
from pathlib import Path

from matplotlib.figure import Figure as Plot

from covered_call import atomic
from covered_call.evaluation import metrics
from covered_call.evaluation.details import Detail
from covered_call.evaluation.extremes import Trade
from covered_call.evaluation.metrics import METRICS, Figure
from covered_call.evaluation.money import ALL, Result
from covered_call.evaluation.plots import draw
from covered_call.evaluation.sections import (
    CALIBRATION,
    COSTS,
    EQUITY,
    RELIABILITY,
    Evaluation,
    Part,
    Picture,
    Section,
    Study,
    Table,
    describe,
    figure_rows,
    fixed_vol_sentence,
    sections_of,
    show,
)
from covered_call.page import html
from covered_call.page.cards import Card, card_markdown
from covered_call.page.html import Page, html_of, svg_of
from covered_call.tables import align, markdown
from covered_call.value_model.walk_forward import comparison_json, png

TEXT, METRICS_FILE, PAGE = "report.md", "metrics.json", "report.html"
EXPLANATIONS = "explanations.jsonl"
MOST_SAID = 5  # sentences of a verdict
VERSIONS = ("scikit-learn", "arch", "numpy", "datasets")
HEAD = {
    "accuracy": "accuracy",
    "trade_rate": "trade rate",
    "coverage": "coverage",
    "mean_percent": "% of spot a decision",
    "percent_minus_teacher": "minus teacher",
    "mean_pnl": "USD a decision",
}


def terminal_table(evaluation: Evaluation) -> str:
    """The policies of each underlying and exit style, most like the teacher first, and the verdict."""
    blocks = list(evaluation.first)
    for result in evaluation.results:
        if result.group.name == ALL:
            short = ("trade_rate", "coverage")
            cells = [
                [name, *(show(metric, found[metric], metric not in short) for metric in HEAD)]
                for name, found in result.figures.items()
            ]
            blocks.append(f"\n{describe(evaluation.split, result)}\n\n{align([['', *HEAD.values()], *cells])}\n")
            blocks += evaluation.verdicts[describe(evaluation.split, result)]
    legend = (
        "\nBest accuracy first; [95 % intervals]; P&L vs HODL; 'a to b' are bounds where outcomes are unknown.\n"
        f"The best rule is: {evaluation.rule.name}."
    )
    return "\n".join(filter(None, [*blocks, legend, fixed_vol_sentence(evaluation)]))


def markdown_table(figures: dict[str, dict[str, Figure]], names: list[str]) -> str:
    return markdown(figure_rows(figures, names))


def report_files(evaluation: Evaluation) -> dict[str, str | bytes]:
    """The files of a report by their names, metrics.json first."""
    plots = draw(evaluation)
    sections = sections_of(evaluation, list(plots))
    return {
        METRICS_FILE: json.dumps(as_json(evaluation), indent=2, allow_nan=False),
        TEXT: "\n\n".join(map(section_text, sections)) + "\n",
        PAGE: html_of(page_of(evaluation, sections, plots)),
        **{name: png(figure) for name, figure in plots.items()},
        **({EXPLANATIONS: evaluation.explained.lines()} if evaluation.explained else {}),
    }


def write_report(folder: Path, files: dict[str, str | bytes]) -> None:
    """All of a report or nothing of it, and nothing of the one that was there, such as the plots of another model."""
    old = []
    if (folder / METRICS_FILE).is_file():  # else the folder is not one that reports go to
        plots = (EQUITY.format(market="*"), COSTS.format(market="*"), CALIBRATION, RELIABILITY, PAGE, EXPLANATIONS)
        old = [path.name for pattern in plots for path in folder.glob(pattern)]
    atomic.write_together(folder, files, old)


def section_text(section: Section) -> str:
    return "\n\n".join([f"{'#' * section.level} {section.title}", *filter(None, map(part_text, section.parts))])


def part_text(part: Part) -> str:
    """As GitHub's markdown."""
    if isinstance(part, Table):
        return (f"{part.caption}:\n\n" if part.caption else "") + markdown(part.rows)
    if isinstance(part, Picture):
        return f"![{part.name}]({part.name})"
    if isinstance(part, Card):
        return card_markdown(part)
    return part if isinstance(part, str) else "\n".join(f"- {line}" for line in part)


# ---------------------------------------------------------------------------------------------------------------------
# report.html


def page_of(evaluation: Evaluation, sections: list[Section], plots: dict[str, Plot]) -> Page:
    """The same sections, but for the verdict and the warnings, which have places of their own."""
    said = [
        f"{result.group.underlying}, {result.group.exit_style}: {sentence}"
        for result, _ in evaluation.overall
        for sentence in evaluation.verdicts[describe(evaluation.split, result)][:MOST_SAID]
    ]
    notes = [*evaluation.first, *filter(None, [fixed_vol_sentence(evaluation)]), *evaluation.notes]
    is_warning = ["WARNING: " in note or note == fixed_vol_sentence(evaluation) for note in notes]
    warnings = [note.replace("WARNING: ", "") for note, is_one in zip(notes, is_warning, strict=True) if is_one]
    others = [note for note, is_one in zip(notes, is_warning, strict=True) if not is_one]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    files = ", ".join(os.path.basename(path) for path in evaluation.files)
    made = ["Made by covered-call evaluate.", f"Read from {files}.", f"Versions: {versions}."]
    found = [page_section(one, plots) for one in sections[1:]]
    return Page(sections[0].title, said, warnings, [*found, html.Section("Notes", others, [], [])], made)


def page_section(section: Section, plots: dict[str, Plot]) -> html.Section:
    texts, tables, pictures, cards = [], [], [], []
    for part in section.parts:
        if isinstance(part, Table):
            head, *rows = part.rows
            tables.append(html.Table(part.caption, head, rows))
        elif isinstance(part, Picture):
            pictures.append(html.Plot(svg_of(plots[part.name]), f"{section.title}: {part.name[:-4]}", ""))
        elif isinstance(part, Card):
            cards.append(part)
        else:
            texts += [part] if isinstance(part, str) else part
    return html.Section(section.title, texts, tables, pictures, cards)


# ---------------------------------------------------------------------------------------------------------------------
# metrics.json


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
        "verdict": evaluation.verdicts,
        "notes": [*evaluation.first, *filter(None, [fixed_vol_sentence(evaluation)]), *evaluation.notes],
        "groups": [result_json(result) for result in evaluation.results],
        "details": [detail_json(result, detail) for result, detail in evaluation.overall],
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "q_scorer": study_json(evaluation.study),
        "explanations": evaluation.explained.as_json() if evaluation.explained else None,
    }


def result_json(result: Result) -> dict:
    group = result.group
    return {
        "underlying": group.underlying,
        "exit_style": group.exit_style,
        "group": group.name,
        "decisions": len(group.places),
        "from": result.first.isoformat(),
        "to": result.last.isoformat(),
        "block": result.block,
        "coins_held": result.held.mean,
        "coins_at_most": result.held.most,
        "judged_by_record": result.held.by_record,
        "rows": {
            row: {name: figure_json(figure) for name, figure in found.items()} for row, found in result.figures.items()
        },
    }


def detail_json(result: Result, detail: Detail) -> dict:
    """Figures that are not defined are null."""
    return {
        "underlying": result.group.underlying,
        "exit_style": result.group.exit_style,
        "tried": detail.luck.tried,
        "p_against_luck": detail.luck.p,
        "compared": detail.compared,
        "percent_by_costs": levels_json(detail.costs),
        "percent_by_vol": levels_json(detail.vols),
        "fixed_vol": detail.fixed_vol,
        "break_even_iv": [
            one._asdict() | {"break_even": known(one.break_even), "iv": known(one.iv)} for one in detail.break_evens
        ],
        "buckets": [
            one._asdict() | {"high": known(one.high), "percent": figure_json(one.percent)} for one in detail.buckets
        ],
        "subject": detail.subject,
        "overlay": {
            policy: {name: figure_json(figure) for name, figure in risk._asdict().items()}
            for policy, risk in detail.risks.items()
        },
        **{name: [trade_json(one) for one in getattr(detail, name)] for name in ("best", "worst")},
    }


def trade_json(trade: Trade) -> dict:
    told = trade._asdict() | {"premium": known(trade.premium)}
    return {name: value for name, value in told.items() if name != "place"}


def levels_json(found: dict[str, dict[float, Figure]]) -> dict:
    return {
        policy: {f"{level:g}": figure_json(figure) for level, figure in of.items()} for policy, of in found.items()
    }


def known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def figure_json(figure: Figure) -> dict:
    ends = [None if math.isnan(end) else end for end in (figure.low, figure.high)]
    value = ends[0] if ends[0] == ends[1] else None
    return {"value": value, "low": ends[0], "high": ends[1], "interval": figure.interval}
