"""The Q-scorer: what it learns from, when it sells, walking forward, the search for gates, and its file."""

import contextlib
import copy
import datetime
import errno
import hashlib
import io
import json
import logging
import math
import os
import pickle
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import sklearn
from conftest import REAL_DATA, SCRIPT, decision, needs_real_data, no_candidates, time, write_csv
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from covered_call import atomic
from covered_call.candidates.builder import fingerprint
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import (
    Candidate,
    CandidatesError,
    Counterfactual,
    Decision,
    LoggedDecision,
    Outcome,
)
from covered_call.evaluation import evaluate as evaluate_policy
from covered_call.value_model import gate_search, q_scorer, walk_forward
from covered_call.value_model import scorer as value_model
from covered_call.value_model.boosted_trees import Trees
from covered_call.value_model.scorer import Gates, QScorer, QScorerError

CONFIG = CoveredCallCandidatesConfig()
SPOT = 50_000.0
UNKNOWN = Outcome(None, None, None)


def day(number: float) -> datetime.datetime:
    return datetime.datetime.fromisoformat(time(number))


def entry(number: float, ivs, outcomes, dte=7.0, spot=SPOT, style="hold_to_expiry", until=None) -> LoggedDecision:
    """A decision with a candidate for each iv and its net outcome, in % of spot; None is unknown."""
    candidates = tuple(
        Candidate(f"BTC-{index}-C", spot * (1.05 + 0.05 * index), dte, 0.2, 3.0, iv, None)
        for index, iv in enumerate(ivs)
    )
    ends = day(number + dte if until is None else until)
    counterfactuals = tuple(Counterfactual(None if value is None else value * spot / 100, ends) for value in outcomes)
    state = Decision(day(number), "BTC", style, spot, candidates)
    return LoggedDecision(state, None, (UNKNOWN,) * len(candidates), counterfactuals)


def rich_if_volatile(days, seed=0, noise=0.2) -> list[LoggedDecision]:
    """Of two candidates each day, what one brings is (its iv - 0.5) * 10 % of spot, and some noise."""
    draw = np.random.default_rng(seed)
    made = []
    for number in days:
        ivs = draw.uniform(0.2, 0.8, 2)
        made.append(entry(number, ivs, (ivs - 0.5) * 10 + draw.normal(0, noise, 2)))
    return made


@pytest.fixture(scope="module")
def fitted() -> value_model.Fitted:
    return value_model.fit(rich_if_volatile(range(300)), rich_if_volatile(range(310, 350), 1), CONFIG)


def decide(fitted, *entries, gates=None) -> list[Decision]:
    scorer = QScorer(fitted.with_gates(gates) if gates else fitted)
    return scorer.decide([one.decision for one in entries])


# Learning


def test_features_have_no_scale_of_their_own():
    small, large = entry(0, [0.5, None], [0, 0], spot=0.5), entry(0, [0.5, None], [0, 0], spot=80_000.0)
    rows = [value_model.features([one.decision], ["hold_to_expiry", "tp_and_roll"]) for one in (small, large)]
    assert rows[0].shape == (2, 8)
    np.testing.assert_allclose(*rows)
    assert np.isnan(rows[0][1, 4]) and rows[0][0, 6:].tolist() == [1.0, 0.0]


def test_the_same_market_at_another_price_is_worth_the_same_share(fitted):
    cheap, dear = decide(fitted, entry(0, [0.8], [0], spot=0.5), entry(0, [0.8], [0], spot=100_000.0))
    assert cheap.q_sell / 0.5 == pytest.approx(dear.q_sell / 100_000.0)
    assert cheap.answer == dear.answer == "1"


def test_it_sells_the_candidate_that_outcomes_favour_and_nothing_where_none_is_worth_it(fitted):
    rich, poor = decide(fitted, entry(0, [0.3, 0.75], [0, 0]), entry(0, [0.3, 0.25], [0, 0]))
    assert (rich.answer, rich.best, rich.stopped_by) == ("2", 2, None)
    assert rich.q_sell == rich.scores["2"] > rich.scores["NO_TRADE"] == 0 > rich.scores["1"]
    assert rich.confidence > 0.9
    assert (poor.answer, poor.stopped_by) == ("NO_TRADE", "threshold")
    assert poor.q_sell < 0 and poor.confidence < 0.1


def test_unknown_outcomes_are_left_out_and_counted():
    known = rich_if_volatile(range(60))
    holes = [entry(60 + number, [0.9, 0.9], [None, None]) for number in range(30)]
    with_holes, without = (value_model.learn(train, CONFIG) for train in ([*known, *holes], known))
    assert (with_holes.metadata["train"]["known"], with_holes.metadata["train"]["unknown"]) == (120, 60)
    asked = [one.decision for one in rich_if_volatile(range(9), 3)]
    np.testing.assert_array_equal(with_holes.predict(asked), without.predict(asked))


def test_too_few_known_outcomes_are_an_error_that_counts_them():
    with pytest.raises(QScorerError, match="Of 40 candidates to fit on, 39 have a known outcome: at least 40"):
        value_model.learn([*rich_if_volatile(range(19)), entry(20, [0.5, 0.5], [1.0, None])], CONFIG)
    with pytest.raises(CandidatesError, match="No outcome of the validation split is known"):
        value_model.fit(rich_if_volatile(range(60)), [entry(80, [0.5], [None])], CONFIG)


def test_outcomes_that_all_have_one_sign_can_be_learnt():
    for value, certainty in ((1.0, 1.0), (-1.0, 0.0)):
        train = [entry(number, [0.5], [value]) for number in range(60)]
        [answer] = decide(value_model.learn(train, CONFIG), train[0])
        assert answer.confidence == certainty
        assert answer.q_sell == pytest.approx(value * SPOT / 100)


def test_a_weight_on_positive_outcomes_raises_predictions_and_leaves_the_confidence_alone():
    train = rich_if_volatile(range(200), noise=3.0)
    asked = [one.decision for one in train[:20]]
    even, weighted = (value_model.learn(train, CONFIG, weight).predict(asked) for weight in (1.0, 3.0))
    assert (weighted[0] > even[0]).all()
    np.testing.assert_array_equal(even[1], weighted[1])
    with pytest.raises(QScorerError, match="positive_weight=0.0"):
        value_model.learn(train, CONFIG, 0.0)


def test_the_offset_makes_predictions_of_validation_right_on_average():
    validation = [one._replace(counterfactuals=tuple(g._replace(pnl_vs_hodl=g.pnl_vs_hodl - 700) for g in one.counterfactuals))
                  for one in rich_if_volatile(range(310, 350), 1)]  # fmt: skip
    fitted = value_model.fit(rich_if_volatile(range(300)), validation, CONFIG)
    predicted, realised = walk_forward.candidate_pairs(decide(fitted, *validation), validation, CONFIG)
    assert predicted.mean() == pytest.approx(realised.mean())
    assert fitted.metadata["offset"] == pytest.approx(-700 / SPOT, abs=0.002)


# Deciding


@pytest.mark.parametrize(
    "gates, stopped_by",
    [
        (Gates(), None),
        (Gates(threshold=1.5), None),
        (Gates(threshold=3.5), "threshold"),
        (Gates(min_abs_return=3.5), "min_abs_return"),
        (Gates(threshold=9, min_confidence=1.0, min_abs_return=9), "min_confidence"),
        (Gates(threshold=9, min_abs_return=9), "min_abs_return"),
    ],
)
def test_the_decision_says_which_gate_stopped_it(fitted, gates, stopped_by):
    [answer] = decide(fitted, entry(0, [0.77], [0]), gates=gates)
    assert 1.5 < 100 * answer.q_sell / SPOT < 3.5
    assert answer.stopped_by == stopped_by
    assert answer.answer == ("NO_TRADE" if stopped_by else "1")
    assert answer.best == 1  # told in any case


def test_a_prediction_at_the_threshold_is_not_sold_and_one_at_a_gate_is():
    assert Gates(threshold=0.5).stop(0.5, 1.0) == "threshold"
    assert Gates(0.0, 0.6, 0.5).stop(0.5, 0.6) is None


@pytest.mark.parametrize(
    "gates", [Gates(threshold=math.nan), Gates(min_confidence=1.1), Gates(min_abs_return=-0.1)], ids=str
)
def test_gates_that_cannot_be_are_refused(fitted, gates):
    with pytest.raises(QScorerError, match="give"):
        fitted.with_gates(gates)


def test_decisions_without_candidates_or_of_another_exit_style_are_never_sold(fitted):
    none, other = decide(fitted, entry(0, [], []), entry(0, [0.8], [0], style="tp_and_roll"))
    assert (none.answer, none.stopped_by, none.best) == ("NO_TRADE", "no candidate", None)
    assert (other.answer, other.stopped_by) == ("NO_TRADE", "unknown exit_style")
    assert QScorer(fitted).decide([]) == []


@given(st.lists(st.sampled_from([0.3, 0.31, 0.7, 0.71, None]), min_size=1, max_size=6), st.randoms())
def test_the_order_of_candidates_changes_nothing(fitted, ivs, random):
    given_in = entry(0, ivs, [0.0] * len(ivs)).decision
    order = random.sample(range(len(ivs)), len(ivs))
    shuffled = given_in._replace(candidates=tuple(given_in.candidates[i] for i in order))
    one, other = QScorer(fitted).decide([given_in, shuffled])
    assert given_in.candidates[one.best - 1] == shuffled.candidates[other.best - 1]
    assert (one.q_sell, one.stopped_by) == (other.q_sell, other.stopped_by)


def test_a_decision_is_held_to_the_rules_of_a_file(fitted):
    scorer, good = QScorer(fitted), entry(0, [0.77], [0]).decision
    [candidate] = good.candidates
    for name, value in (("delta", math.nan), ("iv", 45.0), ("score", None), ("strike", -1.0), ("instrument", "a\nb")):
        with pytest.raises(CandidatesError, match=f"{name}: "):
            scorer.decide([good, good._replace(candidates=(candidate._replace(**{name: value}),))])
    with pytest.raises(CandidatesError, match="spot"):
        scorer.decide([good._replace(spot=math.inf)])


def test_a_market_wilder_than_usual_is_no_error_where_the_scorer_was_fitted_on_such_a_one():
    wild = entry(0, [8.0], [0]).decision
    for max_iv, wrong in ((5.0, True), (20.0, False)):
        config = CoveredCallCandidatesConfig(max_iv=max_iv)
        scorer = QScorer(value_model.learn(rich_if_volatile(range(60)), config))
        with pytest.raises(CandidatesError, match="iv") if wrong else contextlib.nullcontext():
            assert len(scorer.decide([wild])) == 1


def test_a_dict_is_a_decision_and_the_answer_names_the_instrument(fitted):
    scorer, good = QScorer(fitted), entry(0, [0.3, 0.75], [0, 0]).decision
    [answer] = scorer.decide([json.loads(json.dumps(good.to_dict()))])
    assert [answer] == scorer.decide([good])
    assert (answer.answer, answer.instrument) == ("2", "BTC-1-C")
    assert scorer.decide([entry(0, [0.3], [0]).decision])[0].instrument is None
    with pytest.raises(CandidatesError, match="spot"):
        scorer.decide([{**good.to_dict(), "spot": "much"}])


def test_deciding_needs_no_torch():
    code = "import q_scorer, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True, timeout=120)


# The file


@pytest.fixture
def saved(fitted, tmp_path) -> str:
    value_model.save(fitted, tmp_path / "q.zip")
    return str(tmp_path / "q.zip")


def test_a_saved_scorer_decides_the_same_and_tells_what_it_is(fitted, saved, tmp_path):
    asked = rich_if_volatile(range(20), 5)
    assert QScorer.load(saved).decide([one.decision for one in asked]) == decide(fitted, *asked)
    metadata = value_model.read(saved).metadata
    assert metadata == fitted.metadata
    for told in ("features", "outcome_options", "offset", "train", "validation", "versions", "gates"):
        assert told in metadata
    assert os.listdir(tmp_path) == ["q.zip"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(fitted, saved, tmp_path, monkeypatch):
    before = (tmp_path / "q.zip").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        value_model.save(fitted.with_gates(Gates(0.3)), saved)
    assert os.listdir(tmp_path) == ["q.zip"] and (tmp_path / "q.zip").read_bytes() == before


def test_who_reads_the_old_file_while_it_is_replaced_reads_on(fitted, saved, tmp_path):
    before = (tmp_path / "q.zip").read_bytes()
    with open(saved, "rb") as reader:
        reader.read(100)
        value_model.save(fitted.with_gates(Gates(0.3)), saved)
        assert reader.read() == before[100:]
    assert QScorer.load(saved).fitted.gates == Gates(0.3)


def craft(path, metadata: dict | bytes, trees: dict | bytes, **more: bytes):
    """A file like a saved one, with the right hash, whatever is in it."""
    trees = trees if isinstance(trees, bytes) else json.dumps(trees).encode()
    if isinstance(metadata, dict):
        metadata = json.dumps({"trees_sha256": hashlib.sha256(trees).hexdigest(), **metadata}).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"metadata.json": metadata, "trees.json": trees, **more}.items():
            archive.writestr(name, content)


def parts(fitted) -> tuple[dict, dict]:
    return copy.deepcopy(fitted.metadata), {"value": fitted.value.to_json(), "positive": fitted.positive.to_json()}


class Payload:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def pickled_parts(fitted, folder):
    metadata, trees = parts(fitted)
    payload, archive = pickle.dumps(Payload(folder)), io.BytesIO()
    np.savez(archive, trees=np.array([Payload(folder)], dtype=object))
    old = metadata | {"version": 1, "versions": {"scikit-learn": sklearn.__version__, "numpy": np.__version__}}
    return {
        "in place of the trees": (metadata, payload, {}),
        "in place of all": (payload, payload, {}),
        "as version 1 had it": (old, trees, {"models.joblib": payload}),
        "beside them": (metadata | {"offset": None}, trees, {"models.joblib": payload, "trees.pkl": payload}),
        "as numpy's objects": (metadata, archive.getvalue(), {}),
    }


@pytest.mark.parametrize(
    "where", ["in place of the trees", "in place of all", "as version 1 had it", "beside them", "as numpy's objects"]
)
def test_a_file_that_would_run_code_when_unpickled_runs_nothing(fitted, saved, tmp_path, where, caplog):
    """Neither at a load nor at a hot reload, which goes on with the old model."""
    scorer, asked = QScorer.load(saved, check_every=0.0), [entry(0, [0.77], [0]).decision]
    before = scorer.decide(asked)
    metadata, trees, more = pickled_parts(fitted, tmp_path / "owned")[where]
    craft(saved, metadata, trees, **more)
    with pytest.raises(QScorerError, match="not a whole Q-scorer") as refused:
        QScorer.load(saved)
    assert "\n" not in str(refused.value)
    assert scorer.decide(asked) == before and caplog.text.count("goes on with the model it has") == 1
    assert not (tmp_path / "owned").exists()


def at(path: str, value):
    """A change of one place in the two parts of a file: of "metadata" or "trees", and so on inward; None deletes."""

    def change(found: dict) -> None:
        *inward, last = path.split(".")
        for key in inward:
            found = found[key]
        if value is None:
            del found[last]
        else:
            found[last if isinstance(found, dict) else int(last)] = value

    return pytest.param(change, id=f"{path}={value!r:.20}")


@pytest.mark.parametrize(
    "change",
    [
        *(at(f"metadata.{key}", None) for key in ("version", "features", "exit_styles", "offset", "gates", "train",
          "validation", "outcome_options", "train.from", "validation.to", "train.known", "outcome_options.fee",
          "gates.threshold", "max_iv")),
        at("metadata.outcome_options.fee", "free"),
        at("metadata.version", 99),
        at("metadata.features", ["spot"]),
        *(at("metadata.offset", value) for value in (1e308, math.nan, math.inf, True, "0", [0.0], 10**400)),
        *(at("metadata.gates.threshold", value) for value in (math.nan, math.inf, "0", True)),
        *(at("metadata.gates.min_confidence", value) for value in (1.1, -0.1, math.nan)),
        at("metadata.gates.min_abs_return", -1.0),
        at("metadata.gates.luck", 1),
        at("metadata.gates", []),
        at("metadata.exit_styles", "tp_and_roll"),
        at("metadata.exit_styles", [1]),
        at("metadata.train.from", "yesterday"),
        at("metadata.train.from", "2024-01-01"),
        at("metadata.trees_sha256", "0" * 64),
        at("metadata.walk_forward", [math.nan]),
        at("trees.value", None),
        at("trees.value.baseline", math.nan),
        at("trees.value.baseline", 1e308),
        at("trees.positive.value.3", 1e308),
        at("trees.value.threshold.0", math.nan),
        at("trees.value.threshold", [0.0]),
        at("trees.value.feature.0", 7),
        at("trees.value.feature.0", -1),
        at("trees.value.left.0", 10**6),
        at("trees.value.left.3", 0),
        at("trees.value.right.0", 0),
        at("trees.value.left.0", 1.5),
        at("trees.value.missing_left.0", 2),
        at("trees.value.roots.0", -1),
        at("trees.value.roots.1", 0),
        at("trees.value.luck", 1),
    ],
)  # fmt: skip
def test_no_number_or_key_that_cannot_be_gets_in(fitted, saved, change, caplog):
    scorer, asked = QScorer.load(saved, check_every=0.0), [entry(0, [0.77], [0]).decision]
    before = scorer.decide(asked)
    metadata, trees = parts(fitted)
    change({"metadata": metadata, "trees": trees})
    craft(saved, metadata, trees)
    with pytest.raises(QScorerError, match="not a whole Q-scorer: .*Fit it again") as refused:
        QScorer.load(saved)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    assert scorer.decide(asked) == before and caplog.text.count("goes on with the model it has") == 1


def test_a_file_of_another_version_is_refused_by_name(fitted, saved):
    metadata, trees = parts(fitted)
    craft(saved, metadata | {"version": 99}, trees)
    with pytest.raises(QScorerError, match="version 99, and this is 2"):
        QScorer.load(saved)
    craft(saved, metadata | {"versions": {"scikit-learn": "0.1"}}, trees)  # which nothing of it needs
    assert QScorer.load(saved).fitted.predict([entry(0, [0.5], [0]).decision])[0] == pytest.approx(
        fitted.predict([entry(0, [0.5], [0]).decision])[0], abs=0
    )


def test_a_small_file_that_unpacks_to_a_large_one_is_not_unpacked(fitted, saved, monkeypatch):
    metadata, _ = parts(fitted)
    craft(saved, metadata, b" " * (value_model.LARGEST_PART + 1))
    assert os.path.getsize(saved) < 50_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda _, name: b"{}" if "metadata" in name else pytest.fail("read"))
    with pytest.raises(QScorerError, match="trees.json unpacks to 16,777,217 bytes"):
        QScorer.load(saved)
    with open(saved, "ab") as file:
        file.truncate(2 * value_model.LARGEST_PART + 1)  # a hole: it takes no disk
    with pytest.raises(QScorerError, match="more than 33,554,432 bytes"):
        QScorer.load(saved)


def test_the_trees_predict_what_scikit_learn_predicts_to_the_last_bit():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(3_000, 4))
    rows[draw.random(rows.shape) < 0.1] = np.nan
    rows[:, 3] = np.where(np.isnan(rows[:, 3]), np.nan, 1.0)  # on which no split is possible but "missing"
    target = np.nan_to_num(rows[:, 0]) + 3 * np.isnan(rows[:, 3]) + draw.normal(size=len(rows))
    options = value_model.BOOSTING | {"min_samples_leaf": 100, "early_stopping": False}
    value = HistGradientBoostingRegressor(**options).fit(rows, target)
    positive = HistGradientBoostingClassifier(**options).fit(rows, target > 0)
    trees = [Trees.from_json(json.loads(json.dumps(Trees.of(model).to_json())), 4) for model in (value, positive)]
    np.testing.assert_array_equal(trees[0].predict(rows), value.predict(rows))
    np.testing.assert_array_equal(expit(trees[1].predict(rows)), positive.predict_proba(rows)[:, 1])
    alone = [trees[0].predict(row[None])[0] for row in rows[:50]]
    np.testing.assert_array_equal(alone, trees[0].predict(rows[:50]))
    assert np.isfinite(trees[0].predict(rows * 1e300)).all()
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="baseline"):
            Trees.from_json(trees[0].to_json() | {"baseline": wrong}, 4)


def test_what_is_no_scorer_is_refused(saved, tmp_path):
    with pytest.raises(QScorerError, match="is no file: make one with python q_scorer.py"):
        QScorer.load(tmp_path / "none.zip")
    whole = (tmp_path / "q.zip").read_bytes()
    for broken in (b"", b"words", whole[:-100], whole[:500] + b"\0\0\0" + whole[503:]):
        (tmp_path / "q.zip").write_bytes(broken)
        with pytest.raises(QScorerError, match="not a whole Q-scorer"):
            QScorer.load(saved)
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr("metadata.json", "[]")
    with pytest.raises(QScorerError, match="not a whole Q-scorer"):
        QScorer.load(saved)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(value_model, "monotonic", lambda: now[0])
    return now


def test_a_replaced_file_is_read_again_after_the_interval_and_not_before(fitted, saved, clock):
    scorer, asked = QScorer.load(saved, check_every=60.0), [entry(0, [0.77], [0]).decision]
    assert scorer.decide(asked)[0].answer == "1"
    value_model.save(fitted.with_gates(Gates(threshold=50.0)), saved)
    clock[0] += 59
    assert scorer.decide(asked)[0].answer == "1"
    clock[0] += 1
    assert scorer.decide(asked)[0].stopped_by == "threshold"
    value_model.save(fitted, saved)
    clock[0] += 59
    assert scorer.decide(asked)[0].stopped_by == "threshold"
    clock[0] += 1
    assert scorer.decide(asked)[0].answer == "1"


def test_a_file_that_stays_is_not_read_again(saved, monkeypatch):
    scorer = QScorer.load(saved, check_every=0.0)
    monkeypatch.setattr(value_model, "read", lambda _: pytest.fail("read again"))
    scorer.decide([entry(0, [0.77], [0]).decision])


@pytest.mark.parametrize("broken", [b"half a fi", None], ids=["broken", "gone"])
def test_a_broken_replacement_keeps_the_old_model_and_warns_once(fitted, saved, broken, caplog):
    scorer, asked = QScorer.load(saved, check_every=0.0), [entry(0, [0.77], [0]).decision]
    before = scorer.decide(asked)
    if broken is None:
        os.unlink(saved)
    else:
        with open(saved, "wb") as file:
            file.write(broken)
    with caplog.at_level(logging.WARNING, "q_scorer"):
        for _ in range(3):
            assert scorer.decide(asked) == before
    assert len(caplog.records) == 1 and "goes on with the model it has" in caplog.text
    value_model.save(fitted.with_gates(Gates(threshold=50.0)), saved)  # and a whole one is taken again
    assert scorer.decide(asked)[0].stopped_by == "threshold"


@pytest.mark.parametrize("failure", [RuntimeError("odd"), MemoryError(), RecursionError("deep"), UnicodeError("x")])
def test_whatever_goes_wrong_with_a_new_file_the_old_model_stays(fitted, saved, failure, monkeypatch, caplog):
    scorer, asked = QScorer.load(saved, check_every=0.0), [entry(0, [0.77], [0]).decision]
    before = scorer.decide(asked)

    def fail(_):
        raise failure

    value_model.save(fitted.with_gates(Gates(threshold=50.0)), saved)
    monkeypatch.setattr(value_model, "read", fail)
    for _ in range(3):
        assert scorer.decide(asked) == before
    assert caplog.text.count("goes on with the model it has") == 1


# Predicted against realised


def answer_to(one: LoggedDecision, pick: int | None, *q: float) -> Decision:
    scores = {str(index): value for index, value in enumerate(q, start=1)} | {"NO_TRADE": 0.0}
    best = 1 + int(np.argmax(q)) if q else None
    return Decision("NO_TRADE" if pick is None else str(pick), best, max(q, default=math.nan), 0.5, scores, None)


def test_predicted_against_realised_by_hand():
    entries = [
        entry(0, [0.5, 0.5], [1.0, -1.0], spot=100.0),  # sold for 1
        entry(1, [0.5, 0.5], [2.0, -3.0], spot=100.0),  # sold for -3
        entry(2, [0.5], [4.0], spot=100.0),  # missed
        entry(3, [0.5], [None], spot=100.0),  # sold, and nobody knows
        entry(4, [0.5], [-4.0], spot=100.0),  # rightly not sold
        entry(5, [], []),
    ]
    answers = [
        answer_to(entries[0], 1, 2.0, 0.0),
        answer_to(entries[1], 2, 0.0, 4.0),
        answer_to(entries[2], None, -1.0),
        answer_to(entries[3], 1, 9.0),
        answer_to(entries[4], None, -1.0),
        answer_to(entries[5], None),
    ]
    found = walk_forward.compare(answers, entries, CONFIG)
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
    found = walk_forward.compare(decide(fitted, *entries), entries, CONFIG)
    assert "predicted" not in found.sentence().split(".")[0] and "n/a" in found.sentence()
    assert walk_forward.comparison_json(found)["realised"] is None


# Walking forward


@given(
    st.lists(st.tuples(st.floats(0, 60), st.floats(0, 20), st.floats(0, 30)), min_size=7, max_size=40),
    st.integers(1, 5),
)
def test_nothing_is_learnt_from_that_ends_after_the_block_begins(spans, folds):
    entries = [entry(a, [0.5], [1.0], dte=life, until=a + later) for a, life, later in sorted(spans)]
    if len({one.decision.decision_time for one in entries}) <= folds:
        return
    judged, pasts = [], []
    for past, block in walk_forward.blocks(entries, folds):
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
    folds = walk_forward.walk_forward(entries, 3, CONFIG)
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
    for one, same in zip(
        walk_forward.walk_forward(entries, 3, CONFIG)[:2], walk_forward.walk_forward(other, 3, CONFIG), strict=False
    ):
        assert one.answers == same.answers


def test_a_fold_with_too_short_a_past_is_left_out_and_told(caplog):
    folds = walk_forward.walk_forward(rich_if_volatile(range(100)), 9, CONFIG)
    assert 0 < len(folds) < 9
    assert "No fold from 2024-09-11" in caplog.text
    assert [len(row) for row in walk_forward.fold_rows(folds)] == [len(walk_forward.HEAD)] * (len(folds) + 1)


def test_more_folds_than_times_are_refused():
    with pytest.raises(QScorerError, match="folds=5 with 5 decision times"):
        walk_forward.walk_forward(rich_if_volatile(range(5)), 5, CONFIG)


# The search for gates


def test_the_search_ends_with_gates_that_did_best_in_the_second_window():
    learnt = value_model.learn(rich_if_volatile(range(300)), CONFIG)
    # In validation only what is predicted to bring over 1 % brings anything; the rest loses.
    validation = [
        one._replace(counterfactuals=tuple(
            counterfactual._replace(pnl_vs_hodl=500.0 if candidate.iv > 0.62 else -500.0)
            for counterfactual, candidate in zip(one.counterfactuals, one.decision.candidates, strict=True)
        ))
        for one in rich_if_volatile(range(310, 430), 1)
    ]  # fmt: skip
    fitted, search = gate_search.optimize(learnt, validation, CONFIG)
    assert len(search.grid) == len(gate_search.THRESHOLDS) * len(gate_search.MIN_CONFIDENCES) * len(
        gate_search.MIN_ABS_RETURNS
    )
    assert fitted.gates == search.winner.gates != Gates()
    assert search.winner.mean_percent == max(cell.mean_percent for cell in search.finals) > 0
    assert Gates() in [cell.gates for cell in search.finals]  # no gates are always among them
    alike = {(max(cell.threshold, cell.min_abs_return), *cell[1:2], cell.sold) for cell in search.grid}
    assert len(alike) == len({cell[:2] for cell in alike})  # so that one heat map shows them all
    by_gates = {cell.gates: cell for cell in search.grid}
    assert by_gates[search.winner.gates].mean_percent > by_gates[Gates()].mean_percent
    assert fitted.metadata["offset"] == value_model.calibrate(learnt, validation, CONFIG).metadata["offset"]
    assert search.offsets[1] == fitted.metadata["offset"] != search.offsets[0]
    _, second = walk_forward.cut(validation, 0.5)
    assert search.saved.gates == fitted.gates and search.saved.decisions == len(second)
    assert search.saved.sold == sum(answer.answer != "NO_TRADE" for answer in decide(fitted, *second))


def test_the_second_window_begins_after_all_outcomes_of_the_first(fitted):
    validation = rich_if_volatile(range(310, 370), 1)
    windows = gate_search.optimize(fitted, validation, CONFIG)[1].windows
    first, second = (
        datetime.date.fromisoformat(windows[name][end]) for name, end in (("first", "to"), ("second", "from"))
    )
    assert (second - first).days == 8  # options live 7 days


def test_finalists_differ_in_what_they_sell_and_a_handful_of_lucky_trades_is_none():
    lucky = [gate_search.Best(0.9, 0.95, 50.0, 1.0)] * (gate_search.LEAST_TRADES - 1)
    bests = [*lucky, *[gate_search.Best(0.25, 0.65, 0.1, 1.0)] * 20, *[gate_search.Best(0.15, 0.55, -0.1, 1.0)] * 20]
    grid = [gate_search.measure(Gates(*gates), bests) for gates in
            [(0.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.2, 0.0, 0.0), (0.3, 0.0, 0.0), (1.0, 0.0, 0.0)]]  # fmt: skip
    assert [cell.sold for cell in grid] == [49, 49, 29, 9, 0]
    assert gate_search.pick_finalists(grid, bests) == [Gates(0.2), Gates(), Gates(1.0)]


def test_a_validation_split_too_short_to_search_is_refused(fitted):
    for validation in ([], rich_if_volatile(range(310, 325), 1)):
        with pytest.raises(QScorerError, match="too few to search for gates"):
            gate_search.optimize(fitted, validation, CONFIG)


# The commands


def walk(days: int, style="hold_to_expiry") -> list[dict]:
    """A decision a day on a spot that wanders; the teacher sells the first call where the day is even."""
    spots = 60_000 * np.exp(np.random.default_rng(7).normal(0, 0.02, days).cumsum())
    rows = []
    for number, spot in enumerate(spots):
        strikes = [round(spot * share) for share in (1.03, 1.06)]
        cells = {"spot": spot, "exit_style": style, "iv": 0.5 + 0.1 * (number % 3), "pnl_vs_hodl": 1.0}
        rows += decision(number, 0 if number % 2 == 0 else None, strikes=strikes, **cells)
        if number % 2:
            rows[-2]["score"] = rows[-1]["score"] = 1.0
    return rows


SPLITS = ("--validation_from", time(120), "--test_from", time(220))


@pytest.fixture(scope="module")
def backtest(tmp_path_factory) -> str:
    return write_csv(tmp_path_factory.mktemp("backtest") / "backtest.csv", walk(280))


def run(*arguments):
    q_scorer.main([str(argument) for argument in arguments])


def test_optimize_saves_a_scorer_its_grid_and_a_heat_map(backtest, tmp_path, capsys):
    run("--data_files", backtest, *SPLITS, "--optimize", "--folds", 2, "--output_dir", tmp_path)
    printed = capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["grid.csv", "grid.png", "q_scorer.zip"]
    assert (tmp_path / "grid.png").stat().st_size > 10_000
    lines = (tmp_path / "grid.csv").read_text().splitlines()
    assert lines[0].startswith("threshold,min_confidence,min_abs_return") and len(lines) == 1 + 8 * 8 * 4
    metadata = value_model.read(tmp_path / "q_scorer.zip").metadata
    assert len(metadata["walk_forward"]) == 2 and metadata["data_files"].keys() == {"backtest.csv"}
    assert metadata["gates"] == {name: metadata["optimize"]["winner"][name] for name in metadata["gates"]}
    for told in ("Walk forward over train and validation", "judged from", "<- chosen", "Saved"):
        assert told in printed


def test_no_outcome_of_the_test_split_changes_what_is_learnt_or_chosen(backtest, tmp_path):
    rows = walk(280)
    for row in rows:
        if row["decision_time"] >= time(220):
            row.update(spot=str(float(row["spot"]) * 3), pnl_vs_hodl="-9999.0", reward="-9999.0", iv="2.0")
    altered = write_csv(tmp_path / "backtest.csv", rows)
    for name, path in (("one", backtest), ("other", altered)):
        run("--data_files", path, *SPLITS, "--optimize", "--folds", 2, "--output_dir", tmp_path / name)
    one, other = (value_model.read(tmp_path / name / "q_scorer.zip") for name in ("one", "other"))
    hashes = [fitted.metadata.pop("data_files") for fitted in (one, other)]
    assert hashes[0] != hashes[1]
    assert one.metadata == other.metadata
    for name in ("grid.csv", "grid.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    asked = [entry.decision for entry in rich_if_volatile(range(40))]
    np.testing.assert_array_equal(one.predict(asked), other.predict(asked))


def test_the_same_command_makes_the_same_file(backtest, tmp_path):
    for name in ("one", "other"):
        run("--data_files", backtest, *SPLITS, "--folds", 0, "--output_dir", tmp_path / name)
    assert (tmp_path / "one" / "q_scorer.zip").read_bytes() == (tmp_path / "other" / "q_scorer.zip").read_bytes()


def test_friction_and_horizon_lower_and_shorten_what_is_learnt(backtest, tmp_path):
    run("--data_files", backtest, *SPLITS, "--folds", 0, "--output_dir", tmp_path / "free")
    run("--data_files", backtest, *SPLITS, "--folds", 0, "--output_dir", tmp_path / "dear", "--fee", 0.002)
    run("--data_files", backtest, *SPLITS, "--folds", 0, "--output_dir", tmp_path / "short", "--horizon", 3)
    free, dear, short = (value_model.read(tmp_path / name / "q_scorer.zip") for name in ("free", "dear", "short"))
    asked = [Decision(day(0), "BTC", "hold_to_expiry", 6e4, (Candidate("C", 61800.0, 7.0, 0.2, 3.0, 0.6, 1.0),))]
    assert dear.predict(asked)[0] < free.predict(asked)[0]
    assert dear.metadata["outcome_options"]["fee"] == 0.002 and short.metadata["outcome_options"]["horizon"] == 3.0


@pytest.mark.parametrize(
    "more, message",
    [
        (["--splits", "train"], "No outcome of the validation split is known"),
        (["--min_confidence", "2"], "--min_confidence 2.0: give a probability"),
        (["--positive_weight", "-1"], "--positive_weight -1.0: give a number above 0"),
        (["--duplicates", "oldest"], "--duplicates oldest: choose one of error, latest"),
        (["--data_files", "nothing*.csv"], "No file matches"),
    ],
)
def test_what_cannot_be_done_is_told_without_a_trace(backtest, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as stop:
        run("--data_files", backtest, *more, "--folds", 0, "--output_dir", tmp_path / "out")
    assert str(stop.value).startswith("error: ")
    assert not (tmp_path / "out" / "q_scorer.zip").exists()


QUICK = ("--folds", 0)


def test_a_grid_never_lies_beside_the_scorer_of_another_run(backtest, tmp_path):
    """A run without a search leaves none, and a file of yours where no scorer stands is not taken for one."""
    for name in ("grid.csv", "grid.png"):
        (tmp_path / name).write_text("mine")
    run("--data_files", backtest, *SPLITS, *QUICK, "--output_dir", tmp_path)
    assert (tmp_path / "grid.csv").read_text() == "mine"
    run("--data_files", backtest, *SPLITS, *QUICK, "--optimize", "--output_dir", tmp_path)
    run("--data_files", backtest, *SPLITS, *QUICK, "--output_dir", tmp_path)
    assert os.listdir(tmp_path) == ["q_scorer.zip"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(0, 14))
def test_a_kill_while_files_are_written_leaves_no_mixture(tmp_path, monkeypatch, step):
    """The first is the old or the new one at any moment; another is that one's, or is not there."""
    names = ("first", "second", "third")
    atomic.write_together(tmp_path, dict.fromkeys(names, "old") | {"fourth": "old"})
    calls = iter(range(100))

    def dying(function):
        def call(*arguments, **options):
            if next(calls) == step:
                raise Killed
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(atomic.os, "replace", dying(os.replace))
    monkeypatch.setattr(atomic.Path, "unlink", dying(atomic.Path.unlink))
    with contextlib.suppress(Killed):
        atomic.write_together(tmp_path, dict.fromkeys(names, "new"), old=["fourth"])
    monkeypatch.undo()
    there = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert there["first"] in ("old", "new") and set(there.values()) == {there["first"]}
    atomic.write_together(tmp_path, dict.fromkeys(names, "newer"), old=["fourth"])
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_a_folder_that_another_process_writes_is_refused_at_once(backtest, tmp_path, monkeypatch):
    monkeypatch.setattr(q_scorer, "read_splits", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(evaluate_policy, "read_splits", lambda *_: pytest.fail("read"))
    with atomic.locked(tmp_path / "out"):
        for command, more in ((q_scorer.main, []), (evaluate_policy.main, ["--baselines-only"])):
            with pytest.raises(SystemExit, match=f"error: .*is being written by process {os.getpid()}"):
                command(["--data_files", backtest, "--output_dir", str(tmp_path / "out"), *more])


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(backtest, tmp_path, monkeypatch):
    monkeypatch.setattr(q_scorer, "read_splits", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(atomic.os, "access", lambda *_: False)
    with pytest.raises(SystemExit, match=f"error: {tmp_path}: Permission denied"):
        run("--data_files", backtest, "--output_dir", tmp_path)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(backtest, tmp_path, monkeypatch):
    run("--data_files", backtest, *SPLITS, *QUICK, "--output_dir", tmp_path)
    before = (tmp_path / "q_scorer.zip").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="error: .*q_scorer.zip: No space left on device") as stop:
        run("--data_files", backtest, *SPLITS, *QUICK, "--threshold", 1, "--output_dir", tmp_path)
    assert "\n" not in str(stop.value)
    assert os.listdir(tmp_path) == ["q_scorer.zip"] and (tmp_path / "q_scorer.zip").read_bytes() == before


def test_a_file_that_changes_while_it_is_read_is_not_hashed_as_something_else(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "backtest.csv", walk(60))
    original = fingerprint

    def then_change(paths):
        found = original(paths)
        write_csv(tmp_path / "backtest.csv", walk(61))
        return found

    monkeypatch.setattr(q_scorer, "fingerprint", then_change)
    with pytest.raises(SystemExit, match="error: .*backtest.csv has changed while it was read"):
        run("--data_files", path, *QUICK, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("command, more", [(q_scorer, ["model"]), (evaluate_policy, ["what to judge", "model"])])
def test_help_shows_each_option_in_its_group_with_its_unit_and_default(command, more, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"python {command.__name__}.py " in text  # an example
    titles = [line for line in text.splitlines() if line.endswith(":") or "one of these" in line]
    for title in ("data", "splits", "outcomes and costs", *more, "run"):
        assert any(line.startswith(title) for line in titles), title
    lines = {line.split()[0]: line for line in re.sub(r"\n {10,}", " ", text).split("\n  ")[1:] if line[:2] == "--"}
    for name, default in (("--fee_cap", "0.125"), ("--expiry_tolerance", "12"), ("--splits", "0.8 0.1 0.1"),
                          ("--take_profit", "0.7"), ("--horizon", "hold it to its expiry"), ("--purge", "true"),
                          ("--max_iv", "5"), ("--duplicates", "error"), ("--output_dir", "")):  # fmt: skip
        assert f"default: {default}" in lines[name]
    assert "HOURS" in lines["--expiry_tolerance"] and "share of the option's price" in lines["--half_spread"]
    assert "None" not in text and "%%" not in text


def test_gates_are_given_or_searched_for(capsys):
    with pytest.raises(SystemExit):
        run("--optimize", "--threshold", "0.1")
    assert "do not give them too" in capsys.readouterr().err


# Beside the other policies


def judged(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate_policy.main([*map(str, arguments), "--baselines-only"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_an_evaluation_has_a_row_and_a_section_for_the_q_scorer(backtest, tmp_path, capsys):
    printed = judged(capsys, "--data_files", backtest, *SPLITS, "--output_dir", tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    section = found["q_scorer"]["by_exit_style"]["hold_to_expiry"]
    [group] = [group for group in found["groups"] if group["group"] == "all"]
    assert group["rows"]["Q-scorer"]["trade_rate"]["value"] == pytest.approx(section["trade_rate"])
    assert group["rows"]["Q-scorer"]["permutation_consistency"]["value"] == 1.0
    assert section["decisions"] == 60 and 0 <= section["missed"] <= section["positive"] <= 60
    report = (tmp_path / "report.md").read_text()
    for text in (printed, report):
        assert "Q-scorer, hold_to_expiry: It sold at" in text and "it did not sell." in text
    assert "![q_scorer.png](q_scorer.png)" in report and (tmp_path / "q_scorer.png").stat().st_size > 10_000
    assert "of the time that the Q-scorer" not in printed


def test_an_evaluation_takes_the_saved_scorer_with_its_gates(backtest, tmp_path, capsys):
    options = ("--data_files", backtest, *SPLITS)
    run(*options, "--folds", 0, "--threshold", 50, "--output_dir", tmp_path)
    judged(capsys, *options, "--q_scorer", tmp_path / "q_scorer.zip", "--output_dir", tmp_path / "report")
    section = json.loads((tmp_path / "report" / "metrics.json").read_text())["q_scorer"]
    assert section["by_exit_style"]["hold_to_expiry"]["sold"] == 0
    assert (
        section["by_exit_style"]["hold_to_expiry"]["missed"] == section["by_exit_style"]["hold_to_expiry"]["positive"]
    )
    assert section["fitted"]["gates"]["threshold"] == 50


def test_an_evaluation_warns_of_decisions_that_the_scorer_was_fitted_on_and_of_other_options(
    backtest, tmp_path, capsys
):
    options = ("--data_files", backtest, *SPLITS, "--output_dir", tmp_path)
    printed = judged(capsys, *options, "--split", "validation")
    assert re.search(r"WARNING: (\d+) of these \1 decisions are of the time that the Q-scorer's offset", printed)
    run(*options, "--folds", 0, "--horizon", 3)
    printed = judged(capsys, *options, "--q_scorer", tmp_path / "q_scorer.zip")
    assert "WARNING: the Q-scorer learnt outcomes with other options: horizon 3 (here none)." in printed


def test_data_on_which_no_scorer_can_be_fitted_are_judged_without_one(tmp_path, capsys):
    rows = [row for number in range(60) for row in decision(number, number % 3 or None, pnl_vs_hodl="", iv="")]
    path = write_csv(tmp_path / "blank.csv", [*rows, no_candidates(60)])
    printed = judged(capsys, "--data_files", path, "--output_dir", tmp_path / "report")
    assert "There is no Q-scorer. Of" in printed
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert found["q_scorer"] is None and "Q-scorer" not in found["groups"][0]["rows"]


def test_a_saved_scorer_that_cannot_be_used_stops_the_evaluation(backtest, tmp_path, capsys):
    (tmp_path / "q.zip").write_text("no zip")
    with pytest.raises(SystemExit, match="error: .*not a whole Q-scorer"):
        evaluate_policy.main(["--baselines-only", "--data_files", backtest, "--q_scorer", str(tmp_path / "q.zip")])


# The real files


@needs_real_data
def test_a_scorer_is_fitted_and_judged_on_the_real_files(tmp_path, capsys):
    files = str(REAL_DATA / "training_candidates_*.csv")
    run("--data_files", files, "--folds", 2, "--output_dir", tmp_path)
    metadata = value_model.read(tmp_path / "q_scorer.zip").metadata
    assert metadata["exit_styles"] == ["hold_to_expiry", "tp_and_roll"] and len(metadata["data_files"]) == 2
    assert metadata["train"]["to"] < metadata["validation"]["from"] and len(metadata["walk_forward"]) == 2
    printed = judged(capsys, "--data_files", files, "--output_dir", tmp_path, "--q_scorer", tmp_path / "q_scorer.zip")
    [tp_and_roll] = re.findall("Q-scorer, tp_and_roll: It sold at .*", printed)
    assert "WARNING: these are computed outcomes, which do not follow the recorded ones here." in tp_and_roll
