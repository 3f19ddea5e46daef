"""Predicted against realised outcomes, and walking forward."""

import numpy as np
import pytest
from conftest import on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st
from markets import CONFIG, entry, rich_if_volatile

from covered_call.candidates.columns import columns_of
from covered_call.value_model.learning import QScorerError
from covered_call.value_model.walk_forward import HEAD, blocks, compare, comparison_json, fold_rows, walk_forward

pytestmark = on_the_default_stack

# Predicted against realised


def test_predicted_against_realised_by_hand():
    entries = [
        entry(0, [0.5, 0.5], [1.0, -1.0], spot=100.0),  # sold for 1
        entry(1, [0.5, 0.5], [2.0, -3.0], spot=100.0),  # sold for -3
        entry(2, [0.5], [4.0], spot=100.0),  # missed
        entry(3, [0.5], [None], spot=100.0),  # sold, and nobody knows
        entry(4, [0.5], [-4.0], spot=100.0),  # rightly not sold
        entry(5, [], []),
    ]
    picks, predicted = [0, 1, -1, 0, -1, -1], [2.0, 0.0, 0.0, 4.0, -1.0, 9.0, -1.0]
    found = compare(columns_of(entries), np.array(predicted) / 100, np.array(picks), CONFIG)
    assert (found.decisions, found.sold, found.sold_known, found.trade_rate) == (6, 3, 2, 0.5)
    assert (found.predicted, found.realised) == (pytest.approx(3.0), pytest.approx(-1.0))
    assert found.correlation == pytest.approx(-1.0)
    assert (found.candidates, found.positive, found.missed) == (6, 3, 1)
    predicted, realised = [2, 0, 0, 4, -1, -1], [1, -1, 2, -3, 4, -4]
    assert found.candidate_correlation == pytest.approx(np.corrcoef(predicted, realised)[0, 1])
    assert found.mean_pnl == pytest.approx(-2 / 5)
    assert "It sold at 3 of 6 decisions (50.0%)" in found.sentence()
    assert "it predicted 3.0 USD on average, and -1.0 came" in found.sentence()
    assert "At 3 decisions some candidate had a positive outcome; at 1 of them it did not sell" in found.sentence()


def test_where_nothing_was_sold_nothing_is_averaged(fitted):
    entries = [entry(0, [0.25], [None])]
    columns = columns_of(entries)
    found = compare(columns, fitted.predict(columns).values, np.array([0]), CONFIG)
    assert "predicted" not in found.sentence().split(".")[0] and "n/a" in found.sentence()
    assert comparison_json(found)["realised"] is None


# Walking forward


@given(
    st.lists(st.tuples(st.floats(0, 60), st.floats(0, 20), st.floats(0, 30)), min_size=7, max_size=40),
    st.integers(1, 5),
)
def test_nothing_is_learnt_from_that_ends_after_the_block_begins(spans, folds):
    entries = [entry(a, [0.5], [1.0], dte=life, label_end=a + later) for a, life, later in sorted(spans)]
    if len({one.decision.decision_time for one in entries}) <= folds:
        return
    judged, pasts = [], []
    for past, block in blocks(entries, folds):
        begin = min(one.decision.decision_time for one in block)
        for one in past:
            assert one.decision.decision_time < begin
            assert one.counterfactuals[0].label_end < begin
        kept_out = [one for one in entries if one.decision.decision_time < begin and one not in past]
        assert all(one.counterfactuals[0].label_end >= begin for one in kept_out)
        judged.append(block)
        pasts.append(past)
    assert len(judged) == folds
    assert all(set(earlier) <= set(later) for earlier, later in zip(pasts, pasts[1:], strict=False))
    times = [{one.decision.decision_time for one in block} for block in judged]
    assert all(max(earlier) < min(later) for earlier, later in zip(times, times[1:], strict=False))
    first = min(times[0])
    assert [one for block in judged for one in block] == [e for e in entries if e.decision.decision_time >= first]


def test_each_fold_is_judged_by_a_scorer_that_had_seen_nothing_of_it():
    entries = rich_if_volatile(range(300))
    folds = walk_forward(entries, 3, CONFIG)
    assert len(folds) == 3
    for fold in folds:
        begin = fold.entries[0].decision.decision_time.isoformat()
        learnt, offset_on = fold.fitted.metadata["train"], fold.fitted.metadata["validation"]
        assert learnt["to"] < offset_on["from"] <= offset_on["to"] < begin
        assert fold.compared.candidate_correlation > 0.9 and fold.compared.mean_pnl > 0
    sizes = [fold.fitted.metadata["train"]["known"] for fold in folds]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]


def test_what_happens_later_changes_no_earlier_fold():
    entries = rich_if_volatile(range(300))
    other = entries[:225] + [entry(number, [0.5, 0.6], [-9.0, 9.0]) for number in range(225, 300)]
    for one, same in zip(walk_forward(entries, 3, CONFIG)[:2], walk_forward(other, 3, CONFIG), strict=False):
        np.testing.assert_array_equal(one.picks, same.picks)


def test_a_fold_with_too_short_a_past_is_left_out_and_told(caplog):
    folds = walk_forward(rich_if_volatile(range(100)), 9, CONFIG)
    assert 0 < len(folds) < 9
    assert "No fold from 2024-09-11" in caplog.text
    assert [len(row) for row in fold_rows(folds)] == [len(HEAD)] * (len(folds) + 1)


def test_more_folds_than_times_are_refused():
    with pytest.raises(QScorerError, match="folds=5 with 5 decision times"):
        walk_forward(rich_if_volatile(range(5)), 5, CONFIG)
