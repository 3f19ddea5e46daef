"""Groups and their figures, against a plain count decision by decision."""

import numpy as np
import pytest
from conftest import decision, on_the_default_stack, write_csv

from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.evaluation.cases import bounds, difference, make_cases
from covered_call.evaluation.money import held, judge, make_groups
from covered_call.evaluation.rows import HODL, TEACHER, Row
from covered_call.resampling import draw

pytestmark = on_the_default_stack


@pytest.fixture
def cases(market_of_days):
    decisions = read_decisions([market_of_days], CoveredCallCandidatesConfig())
    return make_cases(decisions, decisions.columns(), CoveredCallCandidatesConfig())


def make_rows(cases) -> list[Row]:
    size = len(cases.columns)
    some = np.random.default_rng(0).integers(-1, 2, size)
    none = np.full(size, np.nan)
    rows = [Row(TEACHER, cases.columns.chosen, none), Row(HODL, np.full(size, -1), np.ones(size))]
    return [*rows, Row("random (expected)", np.zeros(0, int), none), Row("some", some, np.ones(size))]


def plainly(cases, rows, order, name: str) -> dict[str, float]:
    """The least that each figure can be for an order of decisions, one after the other."""
    row = next(row for row in rows if row.name == name)
    found = {"right": 0.0, "pnl": 0.0, "percent": 0.0, "minus": 0.0, "years": 0.0, "path": []}
    for place in order:
        sizes = np.diff(cases.columns.offsets)
        answers = [row.picks[place]] if len(row.picks) else range(-1, sizes[place])
        step = 0.0
        for pick in answers:
            one, chosen = np.array([place]), cases.columns.chosen[[place]]
            pnl = bounds(cases, one, np.array([pick]))[0, 0] / len(answers)
            found["right"] += (pick == chosen[0]) / len(answers)
            found["percent"] += 100 * pnl / cases.columns.spot[place]
            found["minus"] += difference(cases, one, np.array([pick]), chosen)[0, 0] / len(answers)
            step += pnl
        found["pnl"] += step
        found["path"].append(step)
        found["years"] += (cases.label_end[place] - cases.columns.time[place]) / (365.25 * 86_400_000_000)
    curve = np.cumsum([0.0, *found["path"]])
    size = len(order)
    return {
        "accuracy": found["right"] / size,
        "mean_pnl": found["pnl"] / size,
        "mean_percent": found["percent"] / size,
        "annual_percent": found["percent"] / found["years"],
        "minus_teacher": found["minus"] / size,
        "max_drawdown": (np.maximum.accumulate(curve) - curve).max(),
    }


@pytest.mark.parametrize("name", ["some", "random (expected)", TEACHER])
def test_figures_and_intervals_are_those_of_a_plain_count(cases, name):
    rows, size = make_rows(cases), len(cases.columns)
    [group] = [one for one in make_groups(cases, None, {}) if one.name == "all"]
    result = judge(rows, rows[0], cases, group)
    assert result.block == 8
    # Of the last week nothing is known but the teacher's own: bounds, and of a drawdown the most.
    for metric, value in plainly(cases, rows, range(size), name).items():
        figure = result.figures[name][metric]
        assert (figure.high if metric == "max_drawdown" else figure.low) == pytest.approx(value, rel=1e-9), metric
    draws = draw(size, 8)
    orders = [np.repeat(np.arange(size), row) for row in draws.counts(slice(0, 40)).astype(int)]
    some = [plainly(cases, rows, order, name)["mean_percent"] for order in orders]
    low, high = result.figures[name]["mean_percent"].interval
    assert 0.8 < np.mean([low <= value <= high for value in some]) <= 1.0


def test_underlyings_and_exit_styles_are_judged_apart_and_never_averaged(tmp_path):
    rows = []
    for name, pnl in (("BTC", 100.0), ("ETH", -900.0)):
        for style in ("hold_to_expiry", "tp_and_roll"):
            cells = {"underlying": name, "exit_style": style, "pnl_vs_hodl": pnl, "iv": ""}
            rows += [row for day in range(30) for row in decision(day, 0, **cells)]
    decisions = read_decisions([write_csv(tmp_path / "a.csv", rows)], CoveredCallCandidatesConfig())
    cases = make_cases(decisions, decisions.columns(), CoveredCallCandidatesConfig())
    groups = [group for group in make_groups(cases, None, {}) if group.name == "all"]
    assert [group[:2] for group in groups] == [
        ("BTC", "hold_to_expiry"), ("BTC", "tp_and_roll"), ("ETH", "hold_to_expiry"), ("ETH", "tp_and_roll"),
    ]  # fmt: skip
    assert [len(group.places) for group in groups] == [30] * 4
    policies = make_rows(cases)
    means = [judge(policies, policies[0], cases, group).figures[TEACHER]["mean_pnl"].low for group in groups]
    assert means == pytest.approx([100.0, 100.0, -900.0, -900.0])


def test_coins_are_tied_up_from_a_decision_to_its_label_end(tmp_path):
    rows = [row for day in (0, 1, 2, 20) for row in decision(day, 0, iv="", dte=4)]
    decisions = read_decisions([write_csv(tmp_path / "a.csv", rows)], CoveredCallCandidatesConfig())
    cases = make_cases(decisions, decisions.columns(), CoveredCallCandidatesConfig())
    found = held(cases, np.arange(4))
    assert (found.most, found.by_record) == (3, 4)
    assert found.mean == pytest.approx(4 * 4 / 24)
