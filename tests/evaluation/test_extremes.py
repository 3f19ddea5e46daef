"""The best and the worst trades, one by one: the right ones, as the prompt shows them, and what came of them."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from conftest import on_the_default_stack

from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.evaluation.cases import make_cases
from covered_call.evaluation.extremes import cards_of, extremes
from covered_call.evaluation.rows import Row, Said

pytestmark = on_the_default_stack

MOST_WORDS = 40  # in ten seconds, at 240 a minute: https://doi.org/10.1016/j.jml.2019.104047


@pytest.fixture(params=["csv", "instrument"])
def options(request) -> CoveredCallCandidatesConfig:
    return CoveredCallCandidatesConfig(candidate_order=request.param)


@pytest.fixture
def cases(market_of_days, options):
    """By instrument the second call of the file comes first."""
    decisions = read_decisions([market_of_days], options)
    made = make_cases(decisions, decisions.columns(), options)
    names = pa.array([f"BTC-{2 - row % 2}-{row // 2}-C" for row in range(len(made.columns.instrument))])
    return made._replace(columns=replace(made.columns, instrument=names))


def row_of(cases, said: bool = True) -> Row:
    """Sells the second call each day but each third, at a probability of its own."""
    size = len(cases.columns)
    picks = np.where(np.arange(size) % 3 == 0, -1, 1)
    sure = Said(np.arange(size), np.arange(size) / 1_000, np.zeros(size, bool))
    return Row("model", picks, np.full(size, math.nan), sure if said else None)


def test_the_ten_best_trades_are_told_with_what_came_of_them_and_of_the_teachers(cases, options):
    row, columns = row_of(cases), cases.columns
    best, worst = extremes(row, cases, np.arange(len(columns)))
    pnl = np.where(row.picks == 1, cases.computed[1::2], math.nan)
    percent = 100 * pnl / columns.spot
    assert [one.place for one in best] == np.argsort(-percent)[:10].tolist()
    assert [one.place for one in worst] == np.argsort(percent)[:10].tolist()
    for trade, card in zip(best, cards_of(best, row, cases, options, {best[0].place: "Why."}), strict=True):
        place = trade.place
        names, (mine,) = columns.instrument[2 * place : 2 * place + 2].to_pylist(), cases.computed[[2 * place + 1]]
        assert card.said[0].startswith(f"Model sells {names[1]}, premium {trade.premium:,.2f} USD")
        assert card.said[0].endswith(f"probability {place / 1_000:.1%}.")
        assert card.hindsight[0] == f"It brought {mine:+,.2f} USD, {percent[place]:+.2f}% of spot."
        order = names if options.candidate_order == "csv" else sorted(names)
        assert [call[1] for call in card.calls[1:]] == order
        by = {call[1]: call[2] for call in card.calls[1:]}
        assert by == {names[1]: "model", names[0]: "teacher" if place % 2 == 0 else ""}
        if place % 2:
            assert card.said[1] == "Teacher does not sell." and card.hindsight[1] == "Teacher: 0 USD."
        else:
            assert card.said[1] == f"Teacher sells number {order.index(names[0]) + 1}."
            assert card.hindsight[1].startswith("Teacher: ") and card.hindsight[1].endswith("% of spot.")
        assert card.explanation == ("Why." if place == best[0].place else "")


def test_what_is_told_beside_the_table_is_read_in_ten_seconds(cases, options):
    row = row_of(cases)
    for trades in extremes(row, cases, np.arange(len(cases.columns))):
        for card in cards_of(trades, row, cases, options, {}):
            assert len(" ".join([card.title, *card.said, *card.hindsight]).split()) <= MOST_WORDS


def test_the_probability_of_one_that_answers_for_each_call_is_that_of_the_call_it_sells(cases, options):
    columns, row = cases.columns, row_of(cases, said=False)
    (trade, *_), _ = extremes(row, cases, np.arange(len(columns)))
    (card,) = cards_of([trade], row, cases, options, {})
    assert "probability" not in card.said[0]
    sure = np.where(np.arange(2 * len(columns)) == 2 * trade.place + 1, 0.75, 0.1)
    said = Said(columns.decision_of, sure, np.zeros(len(sure), bool))
    (card,) = cards_of([trade], row._replace(said=said), cases, options, {})
    assert card.said[0].endswith("probability 75.0%.")
