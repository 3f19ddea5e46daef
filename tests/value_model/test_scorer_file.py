"""The Q-scorer's file: what is refused of it, and how a policy that runs takes a new one."""

import copy
import hashlib
import io
import json
import logging
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import sklearn
from conftest import on_the_default_stack
from markets import decide, entry, rich_if_volatile

from covered_call.candidates.columns import columns_of
from covered_call.value_model.learning import Gates, QScorerError
from covered_call.value_model.scorer import MAX_PART, QScorer, read, save

pytestmark = on_the_default_stack


@pytest.fixture
def saved(fitted, tmp_path) -> str:
    save(fitted, tmp_path / "q.zip")
    return str(tmp_path / "q.zip")


def test_a_saved_scorer_decides_the_same_and_tells_what_it_is(fitted, saved, tmp_path):
    asked = rich_if_volatile(range(20), 5)
    assert QScorer.load(saved).decide([one.decision for one in asked]) == decide(fitted, *asked)
    metadata = read(saved).metadata
    assert metadata == fitted.metadata
    for told in ("features", "outcome_options", "offset", "train", "validation", "versions", "gates"):
        assert told in metadata
    assert os.listdir(tmp_path) == ["q.zip"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(fitted, saved, tmp_path, monkeypatch):
    before = (tmp_path / "q.zip").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(fitted.with_gates(Gates(0.3)), saved)
    assert os.listdir(tmp_path) == ["q.zip"] and (tmp_path / "q.zip").read_bytes() == before


def test_who_reads_the_old_file_while_it_is_replaced_reads_on(fitted, saved, tmp_path):
    before = (tmp_path / "q.zip").read_bytes()
    with open(saved, "rb") as reader:
        reader.read(100)
        save(fitted.with_gates(Gates(0.3)), saved)
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
    assert QScorer.load(saved).fitted.predict(columns_of([entry(0, [0.5], [0])]))[0] == pytest.approx(
        fitted.predict(columns_of([entry(0, [0.5], [0])]))[0], abs=0
    )


def test_a_small_file_that_unpacks_to_a_large_one_is_not_unpacked(fitted, saved, monkeypatch):
    metadata, _ = parts(fitted)
    craft(saved, metadata, b" " * (MAX_PART + 1))
    assert os.path.getsize(saved) < 50_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda _, name: b"{}" if "metadata" in name else pytest.fail("read"))
    with pytest.raises(QScorerError, match="trees.json unpacks to 16,777,217 bytes"):
        QScorer.load(saved)
    with open(saved, "ab") as file:
        file.truncate(2 * MAX_PART + 1)  # a hole: it takes no disk
    with pytest.raises(QScorerError, match="more than 33,554,432 bytes"):
        QScorer.load(saved)


def test_what_is_no_scorer_is_refused(saved, tmp_path):
    with pytest.raises(QScorerError, match="is no file: make one with covered-call q-scorer"):
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
    monkeypatch.setattr("covered_call.value_model.scorer.monotonic", lambda: now[0])
    return now


def test_a_replaced_file_is_read_again_after_the_interval_and_not_before(fitted, saved, clock):
    scorer, asked = QScorer.load(saved, check_every=60.0), [entry(0, [0.77], [0]).decision]
    assert scorer.decide(asked)[0].answer == "1"
    save(fitted.with_gates(Gates(threshold=50.0)), saved)
    clock[0] += 59
    assert scorer.decide(asked)[0].answer == "1"
    clock[0] += 1
    assert scorer.decide(asked)[0].stopped_by == "threshold"
    save(fitted, saved)
    clock[0] += 59
    assert scorer.decide(asked)[0].stopped_by == "threshold"
    clock[0] += 1
    assert scorer.decide(asked)[0].answer == "1"


def test_a_file_that_stays_is_not_read_again(saved, monkeypatch):
    scorer = QScorer.load(saved, check_every=0.0)
    monkeypatch.setattr("covered_call.value_model.scorer.read_hashed", lambda _: pytest.fail("read again"))
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
    with caplog.at_level(logging.WARNING, "covered_call.value_model.scorer"):
        for _ in range(3):
            assert scorer.decide(asked) == before
    assert len(caplog.records) == 1 and "goes on with the model it has" in caplog.text
    save(fitted.with_gates(Gates(threshold=50.0)), saved)  # and a whole one is taken again
    assert scorer.decide(asked)[0].stopped_by == "threshold"


@pytest.mark.parametrize("failure", [RuntimeError("odd"), MemoryError(), RecursionError("deep"), UnicodeError("x")])
def test_whatever_goes_wrong_with_a_new_file_the_old_model_stays(fitted, saved, failure, monkeypatch, caplog):
    scorer, asked = QScorer.load(saved, check_every=0.0), [entry(0, [0.77], [0]).decision]
    before = scorer.decide(asked)

    def fail(_):
        raise failure

    save(fitted.with_gates(Gates(threshold=50.0)), saved)
    monkeypatch.setattr("covered_call.value_model.scorer.read_hashed", fail)
    for _ in range(3):
        assert scorer.decide(asked) == before
    assert caplog.text.count("goes on with the model it has") == 1
