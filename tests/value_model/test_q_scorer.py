"""The verb q-scorer: what it saves, what it refuses, and that it never looks at the test split."""

import errno
import os
import re

import numpy as np
import pytest
from conftest import REAL_DATA, needs_real_data, time, write_csv
from markets import SPLITS, day, rich_if_volatile, walk

from covered_call import atomic
from covered_call.candidates import builder
from covered_call.candidates.columns import columns_of
from covered_call.candidates.context_lines import SPOT
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import Candidate, Decision, LoggedDecision
from covered_call.evaluation import audit, evaluate
from covered_call.value_model import q_scorer
from covered_call.value_model.scorer import read


def run(*arguments):
    q_scorer.main([str(argument) for argument in arguments])


def test_optimize_saves_a_scorer_its_grid_and_a_heat_map(backtest, tmp_path, capsys):
    run("--data_files", backtest, *SPLITS, "--optimize", "--folds", 2, "--output_dir", tmp_path)
    printed = capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["grid.csv", "grid.png", "q_scorer.zip"]
    assert (tmp_path / "grid.png").stat().st_size > 10_000
    lines = (tmp_path / "grid.csv").read_text().splitlines()
    assert lines[0].startswith("threshold,min_confidence,min_abs_return") and len(lines) == 1 + 8 * 8 * 4
    metadata = read(tmp_path / "q_scorer.zip").metadata
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
    one, other = (read(tmp_path / name / "q_scorer.zip") for name in ("one", "other"))
    hashes = [fitted.metadata.pop("data_files") for fitted in (one, other)]
    assert hashes[0] != hashes[1]
    assert one.metadata == other.metadata
    for name in ("grid.csv", "grid.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    asked = columns_of(rich_if_volatile(range(40)))
    np.testing.assert_array_equal(one.predict(asked), other.predict(asked))


def test_the_same_command_makes_the_same_file(backtest, tmp_path):
    for name in ("one", "other"):
        run("--data_files", backtest, *SPLITS, "--folds", 0, "--output_dir", tmp_path / name)
    assert (tmp_path / "one" / "q_scorer.zip").read_bytes() == (tmp_path / "other" / "q_scorer.zip").read_bytes()


def test_a_scorer_of_the_market_s_context_is_judged_with_it(backtest, tmp_path, capsys):
    run("--data_files", backtest, *SPLITS, "--context", "spot", "--folds", 0, "--output_dir", tmp_path / "q")
    said = capsys.readouterr().out
    assert said.strip().endswith("q_scorer.zip --context spot")
    assert read(tmp_path / "q" / "q_scorer.zip").metadata["context"] == list(SPOT)
    assert q_scorer.context_words(CoveredCallCandidatesConfig()) == ""
    told = CoveredCallCandidatesConfig(context="spot", context_columns=["a b", "c"], context_vols="d.csv")
    assert q_scorer.context_words(told) == " --context spot --context_columns 'a b' c --context_vols d.csv"


def test_friction_and_horizon_lower_and_shorten_what_is_learnt(backtest, tmp_path):
    run("--data_files", backtest, *SPLITS, "--folds", 0, "--output_dir", tmp_path / "free")
    run("--data_files", backtest, *SPLITS, "--folds", 0, "--output_dir", tmp_path / "dear", "--fee", 0.002)
    run("--data_files", backtest, *SPLITS, "--folds", 0, "--output_dir", tmp_path / "short", "--horizon", 3)
    free, dear, short = (read(tmp_path / name / "q_scorer.zip") for name in ("free", "dear", "short"))
    state = Decision(day(0), "BTC", "hold_to_expiry", 6e4, (Candidate("C", 61800.0, 7.0, 0.2, 3.0, 0.6, 1.0),))
    asked = columns_of([LoggedDecision(state, None, ())])
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


def test_a_folder_that_another_process_writes_is_refused_at_once(backtest, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "read_decisions", lambda *_: pytest.fail("read"))
    with atomic.locked(tmp_path / "out"):
        for command, more in ((q_scorer.main, []), (evaluate.main, ["--baselines-only"])):
            with pytest.raises(SystemExit, match=f"error: .*is being written by process {os.getpid()}"):
                command(["--data_files", backtest, "--output_dir", str(tmp_path / "out"), *more])


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(backtest, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "read_decisions", lambda *_: pytest.fail("read"))
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
    original = builder.fingerprint

    def then_change(paths):
        found = original(paths)
        write_csv(tmp_path / "backtest.csv", walk(61))
        return found

    monkeypatch.setattr(builder, "fingerprint", then_change)
    with pytest.raises(SystemExit, match="error: .*backtest.csv has changed while it was read"):
        run("--data_files", path, *QUICK, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    "verb, command, more",
    [
        ("q-scorer", q_scorer, ["model"]),
        ("evaluate", evaluate, ["what to judge", "model"]),
        ("audit", audit, []),
    ],
)
def test_help_shows_each_option_in_its_group_with_its_unit_and_default(verb, command, more, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"\n    covered-call {verb} --" in text  # an example
    titles = [line for line in text.splitlines() if line.endswith(":") or "one of these" in line]
    for title in ("data", "splits", "outcomes and costs", *more, "run"):
        assert any(line.startswith(title) for line in titles), title
    lines = {line.split()[0]: line for line in re.sub(r"\n {10,}", " ", text).split("\n  ")[1:] if line[:2] == "--"}
    for name, default in (("--fee_cap", "0.125"), ("--expiry_tolerance", "12"), ("--splits", "0.8 0.1 0.1"),
                          ("--take_profit", "as settlement has it"), ("--settlement", "auto"),
                          ("--horizon", "hold it to its expiry"), ("--purge", "true"),
                          ("--max_iv", "5"), ("--duplicates", "error")):  # fmt: skip
        assert f"default: {default}" in lines[name]
    assert verb == "audit" or "default: " in lines["--output_dir"]
    assert "HOURS" in lines["--expiry_tolerance"] and "share of the option's price" in lines["--half_spread"]
    assert "None" not in text and "%%" not in text


def test_what_walked_forward_above_never_selling_is_deployed_in_one_step(backtest, tmp_path, capsys):
    live = tmp_path / "live" / "q_scorer.zip"
    run("--data_files", backtest, *SPLITS, "--folds", 2, "--output_dir", tmp_path / "out", "--deploy", live)
    walked = read(live).metadata["walked"]
    assert walked["mean_pnl"] > 0 and walked["of"] == 2 and os.listdir(live.parent) == [live.name]
    folds = read(live).metadata["walk_forward"]
    assert min(f["mean_pnl"] for f in folds) <= walked["mean_pnl"] <= max(f["mean_pnl"] for f in folds)
    assert live.read_bytes() == (tmp_path / "out" / "q_scorer.zip").read_bytes()
    assert f"Deployed to {live}: walked forward, such scorers brought +" in capsys.readouterr().out


def test_what_did_not_leaves_the_live_file_as_it_was_unless_it_is_forced(backtest, tmp_path, capsys):
    live, words = tmp_path / "q_scorer.zip", ["--data_files", backtest, *SPLITS, "--output_dir", tmp_path / "out"]
    live.write_bytes(b"old")
    never = ["--folds", 2, "--threshold", 99, "--deploy", live]  # it never sells: 0, as never selling brings
    with pytest.raises(SystemExit, match="error: Not deployed to .*brought .0.00 USD a decision over .* or --force"):
        run(*words, *never)
    assert live.read_bytes() == b"old" and (tmp_path / "out" / "q_scorer.zip").is_file()
    run(*words, *never, "--force")
    assert read(live).gates.threshold == 99 and "as forced" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(*words, "--folds", 0, "--deploy", live)
    assert "--deploy asks the walk forward" in capsys.readouterr().err
    run(*words, "--folds", 0, "--deploy", live, "--force")
    assert read(live).metadata["walked"]["mean_pnl"] is None


def test_gates_are_given_or_searched_for(capsys):
    with pytest.raises(SystemExit):
        run("--optimize", "--threshold", "0.1")
    assert "do not give them too" in capsys.readouterr().err


@needs_real_data
def test_a_scorer_is_fitted_and_judged_on_the_real_files(tmp_path, capsys):
    files = str(REAL_DATA / "training_candidates_*.csv")
    run("--data_files", files, "--folds", 2, "--output_dir", tmp_path)
    metadata = read(tmp_path / "q_scorer.zip").metadata
    assert metadata["exit_styles"] == ["hold_to_expiry", "tp_and_roll"] and len(metadata["data_files"]) == 2
    assert metadata["train"]["to"] < metadata["validation"]["from"] and len(metadata["walk_forward"]) == 2
    capsys.readouterr()
    scorer = tmp_path / "q_scorer.zip"
    evaluate.main(
        ["--baselines-only", "--data_files", files, "--output_dir", str(tmp_path), "--q_scorer", str(scorer)]
    )
    printed = capsys.readouterr().out
    assert re.search("Q-scorer, tp_and_roll: It sold at .*", printed) and "WARNING" not in printed
