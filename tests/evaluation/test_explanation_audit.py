import numpy as np
import pytest
from conftest import decision, on_the_default_stack, write_csv
from sklearn.metrics import roc_auc_score

from covered_call.candidates import explanations
from covered_call.candidates.explanations import Clause
from covered_call.evaluation.audit import main
from covered_call.evaluation.explanation_audit import aucs

pytestmark = on_the_default_stack


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory) -> str:
    """A price that swings, so that outcomes of either sign occur in each split."""
    rows = []
    for day in range(120):
        spot = 60000.0 + 4000.0 * np.sin(day)
        rows += decision(day, sold=0 if day % 3 else None, dte=1.0, spot=spot, exit_style="hold_to_expiry")
    return write_csv(tmp_path_factory.mktemp("audit") / "a.csv", rows)


def test_what_explanations_tell_of_an_outcome_stands_beside_what_features_do(csv_file, capsys):
    assert main(["--data_files", csv_file, "--explain"]) == 0
    said = capsys.readouterr().out
    assert "Explanations of per_decision_ranking: " in said and "Explanations of per_candidate: " in said
    assert "AUC of the outcome's sign" in said and "Passed" in said


def test_a_word_of_the_outcome_is_found(csv_file, capsys, monkeypatch):
    spoilt = (Clause("It expired worthless later.", "unmeasured"), *explanations.CLAUSES[None])
    monkeypatch.setitem(explanations.CLAUSES, None, spoilt)
    assert main(["--data_files", csv_file, "--explain"]) == 1
    assert "explanations of per_candidate hold a word of an outcome" in capsys.readouterr().out


def test_an_explanation_made_of_the_outcome_is_found(csv_file, capsys, monkeypatch):
    shown_of = explanations.shown_of

    def hindsight(columns, task, picks):
        shown = shown_of(columns, task, picks)
        brought = columns.numbers["counterfactual_pnl_vs_hodl"]
        rows = columns.offsets[:-1] + shown.index - 1 if task == "per_decision_ranking" else np.arange(len(brought))
        return shown._replace(numbers=shown.numbers | {"dte": np.where(brought[rows] > 0, 1.0, 2.0)})

    monkeypatch.setattr(explanations, "shown_of", hindsight)
    assert main(["--data_files", csv_file, "--explain"]) == 1
    said = capsys.readouterr().out
    assert "explanations of per_candidate change when outcomes do" in said
    assert "explanations of per_candidate tell more of the outcome's sign than the features do" in said


def test_the_auc_of_draws_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    signs, scores, counts = rng.random(40) > 0.4, rng.integers(0, 9, 40) / 9, rng.integers(0, 3, (5, 40)).astype(float)
    for found, weights in zip(aucs(signs, scores, counts), counts, strict=True):
        there = weights > 0
        assert found == pytest.approx(roc_auc_score(signs[there], scores[there], sample_weight=weights[there]))
    assert np.isnan(aucs(np.ones(3, bool), np.arange(3.0), np.ones((1, 3))))
