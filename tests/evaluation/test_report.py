"""The report's files and plots."""

import re

import numpy as np
from conftest import ROOT
from markets import day

from covered_call.evaluation.metrics import METRICS
from covered_call.evaluation.plots import unknown_from
from covered_call.evaluation.report import write_report


def test_an_equity_line_ends_where_it_is_not_known_and_says_what_it_may_come_to():
    times = [day(number) for number in range(3)]
    low, high = np.array([1.0, -5.0, -20.0]), np.array([1.0, 3.0, 30.0])
    assert unknown_from(times, 1, low, high) == (" (X: not known from 2024-09-02 on; in the end -20.0 to +30.0 %)")
    assert unknown_from(times, 3, low, low) == ""
    assert "nor within what bounds" in unknown_from(times, 1, low * np.nan, high)


def test_a_report_keeps_nothing_of_another_and_touches_no_other_file(tmp_path):
    names = ("metrics.json", "report.md", "equity_hold_to_expiry.png", "calibration.png", "q_scorer.png")
    (tmp_path / "notes.md").write_text("mine")
    write_report(tmp_path, dict.fromkeys(names, "old"))
    new = ("metrics.json", "report.md", "equity_tp_and_roll.png")
    write_report(tmp_path, dict.fromkeys(new, "new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(new, "new") | {
        "notes.md": "mine"
    }


def test_plots_of_yours_in_a_folder_without_a_report_stay(tmp_path):
    (tmp_path / "equity_mine.png").write_text("mine")
    write_report(tmp_path, {"metrics.json": "{}"})
    assert (tmp_path / "equity_mine.png").read_text() == "mine"


def test_the_page_has_each_figure_with_its_direction():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    told = {name: cells[2].strip() for cells in rows for name in re.findall(r"`(\w+)`", cells[1])}
    assert told == {name: metric.better or "neither" for name, metric in METRICS.items()}
