"""A second opinion in the prompt: each of a model that was fitted before, from a file or of a live Q-scorer."""

import dataclasses
import datetime
import functools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import read_candidates, records, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from markets import SPLITS, day, rich_if_volatile, walk

from covered_call.candidates import export
from covered_call.candidates.builder import Backtest
from covered_call.candidates.columns import OPINION, columns_of, logged_of
from covered_call.candidates.context_lines import OPINION_TOLD, told_names
from covered_call.candidates.leaks import find_late_opinions, find_leaks, render_splits
from covered_call.candidates.opinions import OPINIONS, read_opinions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import (
    PROMPT_VERSION,
    candidate_messages,
    ranking_messages,
    shown_to,
    version_with,
)
from covered_call.candidates.scale_out import made_by
from covered_call.candidates.schema import CandidatesError, Decision, LoggedDecision, Opinion
from covered_call.evaluation import audit
from covered_call.training.examples import in_another_order
from covered_call.value_model import q_scorer
from covered_call.value_model.learning import QScorerError
from covered_call.value_model.opinions import fitted_before, opinions_file, with_opinion
from covered_call.value_model.walk_forward import walk_forward

CONFIG = CoveredCallCandidatesConfig(splits="train")


@pytest.fixture(scope="module")
def written(backtest, tmp_path_factory):
    """The file of a walk forward, and the options of a load that tells of it."""
    folder = tmp_path_factory.mktemp("opinions")
    path = folder / "deep" / "opinions.parquet"
    words = ["--data_files", backtest, *SPLITS, "--settlement", "simulated", "--folds", "2"]
    q_scorer.main([*words, "--output_dir", str(folder / "q"), "--write_opinions", str(path)])
    return str(path), {"opinions": str(path), "splits": "train"}


def changed(path: str, tmp_path, **values) -> str:
    """The file with other values in its rows, by the place of each."""
    rows = pq.read_table(path).to_pylist()
    for name, (place, value) in values.items():
        rows[place][name] = value
    new = str(tmp_path / "changed.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=OPINIONS), new)
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Each of a model that was fitted before


def test_a_file_of_the_walk_forward(written, backtest):
    path, options = written
    table = read_opinions(path)
    assert (table["fitted_before"].to_numpy() < table["decision_time"].to_numpy()).all()
    assert len(set(table["fitted_before"].to_pylist())) == 3  # of two folds, and of the test split
    entries = read_candidates([backtest], CoveredCallCandidatesConfig(**options))
    told = [entry.decision.opinion for entry in entries]
    assert told[0] == Opinion(None, {}) and len(told[-1].of) == 2
    assert sum(bool(one.of) for one in told) * 2 == len(table)


def bytes_of(entries: list[LoggedDecision]) -> dict:
    """By decision what a walk forward says."""
    parts = [(fold.fitted, fold.entries) for fold in walk_forward(entries, 2, CONFIG)]
    rows = pq.read_table(pa.BufferReader(opinions_file(parts)[0])).to_pylist()
    return {(row["decision_time"], row["instrument"]): row for row in rows}


@functools.cache
def of_all() -> dict:
    return bytes_of(rich_if_volatile(range(120)))


@pytest.mark.no_cover
@settings(max_examples=8, deadline=None)
@given(st.integers(60, 119), st.integers(0, 2**32 - 1))
def test_outcomes_that_are_not_settled_change_no_opinion(number, seed):
    """Those of the decision itself, and of all that end at its time or later, are other ones."""
    entries, known = rich_if_volatile(range(120)), of_all()
    draw, at = np.random.default_rng(seed), day(number)

    def other(entry: LoggedDecision) -> LoggedDecision:
        if entry.label_end < at:
            return entry
        drawn = [one._replace(pnl_vs_hodl=draw.normal(0, 1e4)) for one in entry.counterfactuals]
        return entry._replace(counterfactuals=tuple(drawn))

    found = bytes_of([other(entry) for entry in entries])
    until = [key for key in known if key[0] <= at]
    assert until and {key: found[key] for key in until} == {key: known[key] for key in until}


def test_the_settled_of_what_was_learnt_is_told(fitted):
    assert fitted_before(fitted) == day(349 + 7)
    old = fitted._replace(metadata=fitted.metadata | {"train": {}})
    with pytest.raises(QScorerError, match="until when it was fitted"):
        fitted_before(old)


def test_a_walk_with_a_rule_that_later_trades_choose_is_refused(backtest, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path / "q"), "--write_opinions", str(tmp_path / "o.parquet")]
    with pytest.raises(SystemExit, match="write_opinions: with --settlement auto outcomes depend"):
        q_scorer.main(["--data_files", backtest, *SPLITS, *words])
    with pytest.raises(SystemExit):
        q_scorer.main(["--folds", "0", "--write_opinions", "o.parquet"])
    assert "give --folds 1 or more" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# A file that cannot be


@pytest.mark.parametrize("values, words", [
    ({"fitted_before": (3, datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC))},
        "changed.parquet, row 4: fitted_before is after the decision.*leak.*fitted_before 2030-01-01"),
    ({"positive": (0, 1.5)}, "row 1: a value is missing, no number, or no probability .*positive 1.5"),
    ({"expected": (1, float("nan"))}, "row 2: a value is missing"),
    ({"underlying": (2, None)}, "row 3: a value is missing"),
    ({"instrument": (1, "TWICE"), "decision_time": (1, None)}, "row 2: a value is missing"),
])  # fmt: skip
def test_a_row_that_cannot_be(written, backtest, tmp_path, values, words):
    path = changed(written[0], tmp_path, **values)
    with pytest.raises(CandidatesError, match=words):
        read_candidates([backtest], dataclasses.replace(CONFIG, opinions=path))


def test_files_that_cannot_be(written, backtest, tmp_path):
    table = pq.read_table(written[0])
    twice, other, text = (str(tmp_path / name) for name in ("twice.parquet", "other.parquet", "text.parquet"))
    pq.write_table(pa.concat_tables([table, table.slice(5, 1)]), twice)
    pq.write_table(table.drop(["expected"]), other)
    (tmp_path / "text.parquet").write_text("no Parquet")
    at = table["decision_time"][0].as_py()
    two = changed(written[0], tmp_path, fitted_before=(0, at))
    for path, words in (
        (twice, "row 6: this candidate stands there twice|row .*twice"), (other, "no column expected"),
        (text, "cannot be read"), (str(tmp_path / "none.parquet"), "is no file. Make one"),
        (two, "are of several models"),
    ):  # fmt: skip
        with pytest.raises(CandidatesError, match=words):
            read_candidates([backtest], dataclasses.replace(CONFIG, opinions=path))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and records


def test_what_a_prompt_says():
    before = datetime.datetime(2024, 9, 30, 16, tzinfo=datetime.UTC)
    (entry,) = rich_if_volatile([40])
    told = entry.decision._replace(opinion=Opinion(before, {"BTC-0-C": (0.314, 0.577)}))
    asked = candidate_messages(told, told.candidates[0])[1]["content"]
    line = "  - Outcome model: +0.31% of spot expected, P(positive) 0.58 (fitted on decisions before 2024-09-30)\n"
    assert f"\n  - IV/RV ratio: n/a\n{line}\nQuestion:" in asked
    assert "  - Outcome model: n/a\n" in candidate_messages(told, told.candidates[1])[1]["content"]
    asked = ranking_messages(told)[1]["content"]
    head = (
        "Outcome model: expected net outcome in % of spot, and P(positive) (fitted on decisions before 2024-09-30)\n"
    )
    assert f"\n{head}Candidates:\n  [1] BTC-0-C" in asked
    assert "Score: 3.0000, Outcome model: +0.31%, P(positive) 0.58\n" in asked
    assert "Score: 3.0000, Outcome model: n/a\n" in asked
    none = entry.decision._replace(opinion=Opinion(None, {}))
    assert "\nOutcome model: n/a\nCandidates:" in ranking_messages(none)[1]["content"]
    assert Decision.from_dict(told.to_dict()) == told and Decision.from_dict(none.to_dict()) == none
    assert "opinion" not in entry.decision.to_dict()


def test_records_say_it_as_one_decision_does(written, backtest):
    _, options = written
    entries = read_candidates([backtest], CoveredCallCandidatesConfig(**options))
    assert logged_of(columns_of(entries)) == entries
    found = [one["messages"][:2] for one in records(backtest, **options)]
    assert found == [candidate_messages(e.decision, one) for e in entries for one in e.decision.candidates]
    rankings = records(backtest, "per_decision_ranking", **options)
    assert [one["messages"][:2] for one in rankings] == [ranking_messages(entry.decision) for entry in entries]
    rows = records(backtest, "q_values", **options)
    assert rows[0]["opinion_expected"] is None and rows[-1]["opinion_fitted_before"] < rows[-1]["decision_time"]
    plain = CoveredCallCandidatesConfig(splits="train")
    assert all(OPINION[0] not in one for one in records(backtest, "per_candidate", splits="train")[:1])
    assert [one.decision._replace(opinion=None) for one in entries] == [
        one.decision for one in read_candidates([backtest], plain)
    ]


def test_nested_lines_tell_them(written, backtest, tmp_path):
    path, _ = written
    export.main(["--input", backtest, "--output_dir", str(tmp_path), "--opinions", path, "--format", "nested"])
    for task in ("per_candidate", "per_decision_ranking"):
        (lines,) = (file.read_text().splitlines() for file in tmp_path.glob(f"*_{task}.jsonl"))
        first, last = (json.loads(lines[place])["input"]["candidates"][0] for place in (0, -1))
        assert first["opinion_expected"] is None and 0 <= last["opinion_positive"] <= 1
        assert last["opinion_fitted_before"] < json.loads(lines[-1])["input"]["decision_time"]


def test_the_next_epoch_shows_them_in_another_order(written, backtest, load):
    record = load("per_decision_ranking", data_files=backtest, **written[1])["train"][-1]
    shuffled = CoveredCallCandidatesConfig(candidate_order="shuffle", seed=1)
    for seed in range(8):
        other = in_another_order(record, dataclasses.replace(shuffled, seed=seed), "", None)
        if other["candidates"] != record["candidates"]:
            break
    lines = [
        line.split(". ", 1)[0].split("] ")[1] for line in record["messages"][1]["content"].split("\n") if "] " in line
    ]
    again = [
        line.split(". ", 1)[0].split("] ")[1] for line in other["messages"][1]["content"].split("\n") if "] " in line
    ]
    assert lines != again and sorted(lines) == sorted(again) and "P(positive)" in lines[0]


def test_an_edited_file_is_loaded_anew(written, backtest, tmp_path, load):
    options = written[1] | {"opinions": changed(written[0], tmp_path)}
    before = load("q_values", data_files=backtest, **options)["train"][-1]["opinion_expected"]
    rows = len(pq.read_table(written[0]))
    changed(written[0], tmp_path, expected=(rows - 1, 7.5))
    assert load("q_values", data_files=backtest, **options)["train"][-1]["opinion_expected"] == 7.5 != before


def test_the_audit_of_prompts_with_an_opinion(written, backtest):
    options = CoveredCallCandidatesConfig(**written[1])
    entries = Backtest([backtest], options).logged
    for name in ("per_candidate", "per_decision_ranking"):
        config = dataclasses.replace(options, name=name)
        assert find_leaks(render_splits({"train": entries}, config), config) == []
    columns = columns_of(entries)
    assert find_late_opinions(columns) == []
    later = columns.numbers | {OPINION[2]: columns.numbers[OPINION[2]] + 1e15}
    (line,) = find_late_opinions(dataclasses.replace(columns, numbers=later))
    assert line.startswith("FAILED: ")


def test_the_audit_says_how_many(written, backtest, capsys):
    code = audit.main(["--data_files", backtest, *SPLITS, "--opinions", written[0], "--context", "spot",
        "--analogues", "--settlement", "simulated"])  # fmt: skip
    said = capsys.readouterr().out
    assert not code and "of 560 candidates have one, of a model that was fitted before" in said
    assert "looked up again with all outcomes changed" in said


# ---------------------------------------------------------------------------------------------------------------------
# Policies


def test_a_policy_is_shown_the_opinion_it_was_fitted_with(fitted):
    (entry,) = rich_if_volatile([400])
    told = with_opinion(entry.decision, fitted)
    assert shown_to(told, []) == entry.decision and shown_to(told, [OPINION_TOLD]) == told
    with pytest.raises(CandidatesError, match="give the Q-scorer, too"):
        shown_to(entry.decision, [OPINION_TOLD])
    assert told_names(CoveredCallCandidatesConfig(opinions="x.parquet")) == [OPINION_TOLD]
    assert len({PROMPT_VERSION, version_with([OPINION_TOLD]), version_with(["ret_1d"])}) == 3


def test_a_live_opinion_is_what_the_scorer_predicts(fitted):
    (entry,) = rich_if_volatile([400])
    opinion = with_opinion(entry.decision, fitted).opinion
    predicted = fitted.predict(columns_of([entry]))
    expected = zip((100 * predicted.values).tolist(), predicted.confidences.tolist(), strict=True)
    assert list(opinion.of.values()) == list(expected) and opinion.fitted_before == day(356)
    (early,) = rich_if_volatile([100])
    with pytest.raises(CandidatesError, match="fitted_before 2025-.*after the decision: a leak"):
        with_opinion(early.decision, fitted)


@pytest.mark.parametrize("opinion, words", [
    ("yes", "no dict of fitted_before"),
    ({"fitted_before": None, "of": {"A": [1, 0.5]}}, "does not say fitted_before"),
    ({"fitted_before": "2020-01-01", "of": {"A": [1, 2]}}, "no % of spot and probability"),
    ({"fitted_before": "2020-01-01", "of": {"A": 1}}, "no % of spot and probability"),
])  # fmt: skip
def test_an_opinion_that_cannot_be(opinion, words):
    (entry,) = rich_if_volatile([40])
    with pytest.raises(CandidatesError, match=words):
        Decision.from_dict(entry.decision.to_dict() | {"opinion": opinion})


def test_two_backtests_of_which_one_has_no_opinions(written, tmp_path):
    """Decisions that the file does not know show n/a."""
    rows = [row | {"underlying": "ETH", "instrument": f"ETH-X-{place}"} for place, row in enumerate(walk(3))]
    file = write_csv(tmp_path / "eth.csv", rows)
    told = read_candidates([file], CoveredCallCandidatesConfig(**written[1]))
    assert [one.decision.opinion for one in told] == [Opinion(None, {})] * 3


def test_a_cluster_s_tasks_do_not_read_the_file():
    with pytest.raises(CandidatesError, match="opinions='o.parquet': a cluster's tasks do not read the file"):
        made_by(CoveredCallCandidatesConfig(opinions="o.parquet"))
