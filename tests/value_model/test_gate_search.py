"""The search for gates on the two halves of validation."""

import datetime

import pytest
from conftest import on_the_default_stack
from markets import CONFIG, decide, entry, rich_if_volatile

from covered_call.value_model.gate_search import (
    MIN_ABS_RETURNS,
    MIN_CONFIDENCES,
    MIN_TRADES,
    THRESHOLDS,
    Best,
    known_bests,
    measure,
    optimize,
    pick_finalists,
    sells,
)
from covered_call.value_model.learning import Gates, QScorerError, fit_offset, learn
from covered_call.value_model.walk_forward import cut

pytestmark = on_the_default_stack


def test_the_search_ends_with_gates_that_did_best_in_the_second_window():
    learnt = learn(rich_if_volatile(range(300)), CONFIG)
    # In validation only what is predicted to bring over 1 % brings anything; the rest loses.
    validation = [
        one._replace(counterfactuals=tuple(
            counterfactual._replace(pnl_vs_hodl=500.0 if candidate.iv > 0.62 else -500.0)
            for counterfactual, candidate in zip(one.counterfactuals, one.decision.candidates, strict=True)
        ))
        for one in rich_if_volatile(range(310, 430), 1)
    ]  # fmt: skip
    fitted, search = optimize(learnt, validation, CONFIG)
    assert len(search.grid) == len(THRESHOLDS) * len(MIN_CONFIDENCES) * len(MIN_ABS_RETURNS)
    assert fitted.gates == search.winner.gates != Gates()
    assert search.winner.mean_percent == max(cell.mean_percent for cell in search.finals) > 0
    assert Gates() in [cell.gates for cell in search.finals]  # no gates are always among them
    alike = {(max(cell.threshold, cell.min_abs_return), *cell[1:2], cell.sold) for cell in search.grid}
    assert len(alike) == len({cell[:2] for cell in alike})  # so that one heat map shows them all
    by_gates = {cell.gates: cell for cell in search.grid}
    assert by_gates[search.winner.gates].mean_percent > by_gates[Gates()].mean_percent
    assert fitted.metadata["offset"] == fit_offset(learnt, validation, CONFIG).metadata["offset"]
    assert search.offsets[1] == fitted.metadata["offset"] != search.offsets[0]
    _, second = cut(validation, 0.5)
    assert search.saved.gates == fitted.gates and search.saved.decisions == len(second)
    assert search.saved.sold == sum(answer.pick is not None for answer in decide(fitted, *second))


def test_the_second_window_begins_after_all_outcomes_of_the_first(fitted):
    validation = rich_if_volatile(range(310, 370), 1)
    windows = optimize(fitted, validation, CONFIG)[1].windows
    first, second = (
        datetime.date.fromisoformat(windows[name][end]) for name, end in (("first", "to"), ("second", "from"))
    )
    assert (second - first).days == 8  # options live 7 days


def test_finalists_differ_in_what_they_sell_and_a_handful_of_lucky_trades_is_none():
    lucky = [Best(0.9, 0.95, 50.0, 1.0)] * (MIN_TRADES - 1)
    bests = [*lucky, *[Best(0.25, 0.65, 0.1, 1.0)] * 20, *[Best(0.15, 0.55, -0.1, 1.0)] * 20]
    grid = [measure(Gates(*gates), bests) for gates in
            [(0.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.2, 0.0, 0.0), (0.3, 0.0, 0.0), (1.0, 0.0, 0.0)]]  # fmt: skip
    assert [cell.sold for cell in grid] == [49, 49, 29, 9, 0]
    assert pick_finalists(grid, bests) == [Gates(0.2), Gates(), Gates(1.0)]


def test_a_validation_split_too_short_to_search_is_refused(fitted):
    for validation in ([], rich_if_volatile(range(310, 325), 1)):
        with pytest.raises(QScorerError, match="too few to search for gates"):
            optimize(fitted, validation, CONFIG)


def test_gates_cannot_let_through_what_is_above_its_premium(fitted):
    near, far = entry(0, [0.75], [1.0]), entry(1, [0.75], [1.0])
    call = far.decision.candidates[0]._replace(strike=2 * far.decision.spot)
    far = far._replace(decision=far.decision._replace(candidates=(call,)))
    assert sells(Gates(threshold=-99.0), known_bests(fitted, [near, far], CONFIG)) == [True, False]
