"""The verb evaluate: which policies are judged on which decisions, and what is told beside the figures."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import decision, no_candidates, time, write_csv
from markets import SPLITS, walk

from covered_call.candidates import builder
from covered_call.candidates.data_options import backtest_of
from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.evaluation import evaluate, metrics, report
from covered_call.evaluation.metrics import METRICS
from covered_call.evaluation.rows import Row, consistency, model_row, shuffles_of
from covered_call.language_model.scoring import MemoryFull
from covered_call.value_model import q_scorer
from evaluation.stub import Explains, FirstShown, Stub


def test_a_ranking_model_is_shuffled_in_its_prompts_and_not_only_by_the_caller(tmp_path):
    path = write_csv(tmp_path / "a.csv", [row for number in range(30) for row in decision(number, 0)])
    columns = read_decisions([path], CoveredCallCandidatesConfig()).columns()
    model, shuffles = FirstShown(), shuffles_of(columns)
    row = model_row(model, columns, shuffles)
    assert row.picks.tolist() == [0] * 30 and model.candidate_order == "instrument"
    assert np.mean(row.consistent) < 0.2  # (1 / 3) ** 4 is expected
    model.task = "per_candidate"
    row = model_row(model, columns, shuffles)
    assert row.consistent.tolist() == [1.0] * 30
    # Of each candidate it believes what it was calibrated on: 0.9 of the first, 0.2 of the others.
    np.testing.assert_allclose(row.said.probability, [0.9, 0.2, 0.2] * 30)
    np.testing.assert_array_equal(row.said.right, [True, False, False] * 30)


def test_a_pick_that_comes_and_goes_with_the_order_is_not_consistent(tmp_path):
    path = write_csv(tmp_path / "a.csv", [row for number in range(30) for row in decision(number, 0)])
    columns = read_decisions([path], CoveredCallCandidatesConfig()).columns()
    shuffles = shuffles_of(columns)
    picks, none = np.zeros(30, int), np.full(30, -1)
    same = [columns.offsets[:-1] == one.rows[one.columns.offsets[:-1]] for one in shuffles]  # the first is still first
    assert (
        consistency(lambda _: picks, picks, columns, shuffles).tolist() == np.all(same, axis=0).astype(float).tolist()
    )
    assert consistency(lambda _: none, picks, columns, shuffles).tolist() == [0.0] * 30
    assert consistency(lambda _: none, none, columns, shuffles).tolist() == [1.0] * 30


def use(monkeypatch, load_model) -> None:
    """``load_model`` in the place of a tuned model's folder."""
    monkeypatch.setattr(evaluate, "read_manifest", lambda _: {"recipe": {}})
    monkeypatch.setattr(evaluate, "load_model", load_model)


def run(capsys, *arguments) -> tuple[int, str]:
    """What the verb prints, and its exit status: 0, or the one line that it ends with."""
    status = 0
    try:
        evaluate.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out


@pytest.mark.parametrize("given, expected", [([], None), (["--batch_tokens", "900"], 900)])
def test_the_model_reads_as_many_tokens_at_once_as_it_is_told(
    backtest, tmp_path, capsys, monkeypatch, given, expected
):
    loaded = []
    use(monkeypatch, lambda *options: loaded.append(options) or Stub())
    options = ["--model", "out/x", "--data_files", backtest, "--output_dir", tmp_path / "report", *given]
    assert run(capsys, *options)[0] == 0
    assert loaded == [("out/x", expected, None)]  # of a model of one task
    assert run(capsys, *options, "--batch_tokens", "0")[0] == 2


def test_a_gpu_that_is_full_is_a_plain_error(backtest, tmp_path, capsys, monkeypatch):
    def load_model(*_):
        raise MemoryFull("The memory is full")

    use(monkeypatch, load_model)
    assert run(capsys, "--model", "out/x", "--data_files", backtest)[0] == "error: The memory is full"


@pytest.mark.parametrize("says, right", [(None, 1.0), ("1\nStrength: WEAK\nReason: It won 68% of the time.", 0.0)])
def test_explanations_are_read_back_and_judged(backtest, tmp_path, capsys, monkeypatch, says, right):
    use(monkeypatch, lambda *_: Explains(says))
    out = tmp_path / "report"
    options = ["--model", "out/x", "--data_files", backtest, "--output_dir", out]
    status, printed = run(capsys, *options, "--explanations", 7)
    assert status == 0 and "Explanations of 7 decisions: valid " in printed
    found = json.loads((out / "metrics.json").read_text())["explanations"]
    assert found["decisions"] == 7 and found["true"]["value"] == found["grounded"]["value"] == right
    assert found["true"]["low"] < found["true"]["high"]
    lines = [json.loads(line) for line in (out / "explanations.jsonl").read_text().splitlines()]
    assert [line["true"] for line in lines] == [bool(right)] * 7
    report, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "## Explanations" in report
    assert report.count("Its explanation: Strength: ") == page.count("Its explanation: Strength: ") == 4 * 10
    checked = "it holds" if right else "it is not grounded, true, consistent"
    assert report.count(f" (Checked: {checked}.)") == 4 * 10
    assert run(capsys, *options, "--explanations", 0)[0] == 0
    assert not (out / "explanations.jsonl").exists() and "Its explanation" not in (out / "report.md").read_text()


def test_the_table_has_a_row_for_each_policy_best_first(backtest, tmp_path, capsys, monkeypatch):
    use(monkeypatch, lambda *_: Stub())
    out = tmp_path / "report"
    status, printed = run(capsys, "--model", "out/x", "--data_files", backtest, "--output_dir", out)
    assert status == 0
    found = json.loads((out / "metrics.json").read_text())
    assert found["metrics_version"] == metrics.VERSION and set(found["definitions"]) == set(METRICS)
    overall = [group for group in found["groups"] if group["group"] == "all"]
    assert [group["exit_style"] for group in overall] == ["hold_to_expiry", "tp_and_roll"]
    for group in overall:
        names = list(group["rows"])
        assert set(names) == {
            "model", "teacher", "never sell (HODL)", "random (expected)", "majority answer", "first candidate",
            "highest score", "score rule", "logistic regression", "gradient boosting", "Q-scorer",
        }  # fmt: skip
        accuracies = [group["rows"][name]["accuracy"]["value"] for name in names[:-2]]
        assert accuracies == sorted(accuracies, reverse=True)
        assert group["rows"]["score rule"]["accuracy"]["value"] == 1.0
        assert group["rows"]["model"]["permutation_consistency"]["value"] == 1.0
        assert group["rows"]["first candidate"]["permutation_consistency"]["value"] < 1.0
        assert all(name in printed for name in names)
    steps = ["Reading 1 file(s)", "Fitting the base", *(f"pass {one} of 5" for one in range(1, 6)), "Judging 11 polic"]
    places = [printed.index(step) for step in [*steps, "best rule is", f"Saved in {out}", "Next: "]]
    assert places == sorted(places)  # a long run says what it does, and a finished one where things are
    assert f"covered-call publish --adapter out/x USER/NAME --report {out / 'metrics.json'}" in printed
    report = (out / "report.md").read_text()
    assert str(tmp_path) not in report + (out / "metrics.json").read_text()
    for plot in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (out / plot).stat().st_size > 10_000
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.png", "equity_btc_hold_to_expiry.png", "equity_btc_tp_and_roll.png", "metrics.json",
        "q_scorer.png", "report.html", "report.md",
    ]  # fmt: skip


def test_tp_and_roll_without_counterfactuals_has_bounds(backtest, tmp_path, capsys):
    out = tmp_path / "report"
    run(capsys, "--baselines-only", "--split", "train", "--data_files", backtest, "--output_dir", out)
    [group] = [g for g in json.loads((out / "metrics.json").read_text())["groups"] if g["exit_style"] == "tp_and_roll"
               and g["group"] == "all"]  # fmt: skip
    first = group["rows"]["first candidate"]
    assert first["coverage"]["value"] < 1 and first["mean_pnl"]["value"] is None
    assert first["mean_pnl"]["low"] < first["mean_pnl"]["high"]
    assert first["mean_regret"]["value"] is None
    interval = first["mean_pnl"]["interval"]
    assert interval[0] <= first["mean_pnl"]["low"] and first["mean_pnl"]["high"] <= interval[1]
    never = group["rows"]["never sell (HODL)"]
    assert (never["total_pnl"]["value"], never["coverage"]["value"]) == (0.0, 1.0)


def test_years_and_the_time_after_the_cutoff_are_judged_apart(backtest, tmp_path, capsys):
    out = tmp_path / "report"
    options = ("--baselines-only", "--split", "train", "--splits", "train", "--data_files", backtest)
    run(capsys, *options, "--output_dir", out, "--cutoff", "2024-12-01")
    groups = json.loads((out / "metrics.json").read_text())["groups"]
    counts = {group["group"]: group["decisions"] for group in groups if group["exit_style"] == "tp_and_roll"}
    assert {name: counts[name] for name in list(counts)[:3]} == {"all": 120, "2024": 120, "after 2024-12-01": 28}
    # Of the first 30 days nothing is known; from then on the spot of this backtest only rises.
    assert counts["30-day trend up"] == 90 and "30-day trend down" not in counts
    assert [counts[f"{name} realised vol"] for name in ("low", "middle", "high")] == [34, 33, 33]


def test_a_cutoff_that_is_no_date_is_refused(backtest, capsys):
    status, _ = run(capsys, "--baselines-only", "--data_files", backtest, "--cutoff", "soon")
    assert status == "error: --cutoff soon: give a date such as 2024-01-01."


def test_decisions_that_the_model_may_have_learnt_are_told(backtest, tmp_path, capsys, monkeypatch):
    use(monkeypatch, lambda *_: Stub(tuned_to="2024-12-25T00:00:00+00:00"))
    _, printed = run(capsys, "--model", "x", "--data_files", backtest, "--output_dir", tmp_path / "report")
    assert "not later than the model's training decisions, which end on 2024-12-25" in printed


def test_a_model_on_what_it_was_not_tuned_on_is_told_so_first(backtest, tmp_path, capsys, monkeypatch):
    tuned = {"underlyings": ["ETH"], "exit_styles": ["hold_to_expiry"]}
    use(monkeypatch, lambda *_: Stub(tuned_on=tuned, data_files={"other.csv": "0" * 64}))
    _, printed = run(capsys, "--model", "x", "--data_files", backtest, "--output_dir", tmp_path / "report")
    expected = (
        "WARNING: the model was not tuned on the underlying BTC, the exit style tp_and_roll, the file backtest.csv."
    )
    lines = printed.split("resamples ...")[1].strip().splitlines()
    assert lines[0] == expected
    assert (tmp_path / "report" / "report.md").read_text().splitlines()[2] == expected
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["notes"][0] == expected


def test_the_report_begins_with_the_verdict_and_has_a_table_of_each_question(market, tmp_path, capsys):
    printed = judged(capsys, "--data_files", market, *SPLITS, "--output_dir", tmp_path)
    report, found = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "metrics.json").read_text())
    [(name, said)] = found["verdict"].items()
    assert report.index(name) < report.index(said[0]) < report.index("## ")
    assert all(sentence in printed and "policies and thresholds compared" in sentence for sentence in said)
    titles = (
        "Overlay on one coin",
        "Against luck",
        "Costs",
        "Break-even vol",
        "Calls by delta",
        "Calls by dte",
        "The 10 best trades: ",
        "The 10 worst trades: ",
    )
    places = [report.index(f"### {title}") for title in titles]
    assert places == sorted(places) and "### Vol\n" not in report  # of these files the vol varies
    [detail] = found["details"]
    costs = {
        policy: [of[level]["value"] for level in ("0", "1", "2")] for policy, of in detail["percent_by_costs"].items()
    }
    assert all(a >= b >= c for a, b, c in costs.values()) and costs["highest score"][0] > costs["highest score"][1]
    assert detail["tried"] > 20 and set(detail["p_against_luck"]) == {
        "never sell (HODL)",
        "teacher",
        found["best_rule"],
    }
    percents = [trade["percent"] for trade in detail["best"]]
    assert percents == sorted(percents, reverse=True) and detail["worst"][0]["percent"] < percents[-1]


def test_premiums_of_one_fixed_vol_are_told_first_and_tried_at_others(tmp_path, capsys):
    rows = walk(280)
    for row in rows:
        row |= {"iv": "0.7", "pnl_vs_hodl": ""}
    printed = judged(
        capsys, "--data_files", write_csv(tmp_path / "fixed.csv", rows), *SPLITS, "--output_dir", tmp_path / "out"
    )
    report = (tmp_path / "out" / "report.md").read_text()
    for text in (printed, report.split("## ")[0]):
        assert "The premiums are of one fixed vol, 0.7, and of no market's" in text
    [detail] = json.loads((tmp_path / "out" / "metrics.json").read_text())["details"]
    levels = [detail["percent_by_vol"]["highest score"][level]["value"] for level in ("0.7", "0.8", "0.9", "1")]
    assert levels == sorted(levels) and "### Vol\n" in report


def test_what_was_fitted_on_these_decisions_shows_nothing(market, tmp_path, capsys):
    printed = judged(capsys, "--data_files", market, *SPLITS, "--split", "train", "--output_dir", tmp_path)
    said = [line for line in printed.splitlines() if line.startswith(("The rule", "The Q-scorer"))]
    assert said and all("fitted on these decisions" in line or "nothing is shown" in line for line in said)


def test_the_data_are_those_of_the_recipe_unless_the_command_line_says_other(backtest):
    recipe = {"data_files": [backtest], "splits": [0.5, 0.2, 0.3], "exit_style": "tp_and_roll", "purge": None,
              "candidate_order": "shuffle", "lora_r": 4}  # fmt: skip
    made = backtest_of(evaluate.parse_arguments(["--model", "x"]), recipe)
    files, config = made.files, made.options
    assert (files, config.splits, config.exit_style) == ([backtest], [0.5, 0.2, 0.3], "tp_and_roll")
    assert config.candidate_order == "instrument"  # only the training split is shuffled
    args = evaluate.parse_arguments(
        ["--model", "x", "--validation-from", "2024-10-01", "--test_from", "2024-11-01", "--purge", "false"]
    )
    config = backtest_of(args, recipe).options
    assert (config.validation_from, config.test_from, config.purge) == ("2024-10-01", "2024-11-01", False)


def test_an_empty_split_is_an_error_that_says_so(tmp_path, capsys):
    path = write_csv(tmp_path / "short.csv", decision(0, 0))
    status, _ = run(capsys, "--baselines-only", "--data_files", path)
    assert status.startswith("error: The test split is empty")
    path = write_csv(tmp_path / "long.csv", [row for number in range(30) for row in decision(number, 0)])
    status, _ = run(capsys, "--baselines-only", "--data_files", path, "--splits", "0", "0.5", "0.5")
    assert status.startswith("error: The train split is empty, and the baselines are fitted on it")


def test_nothing_half_written_is_left_when_the_report_fails(backtest, tmp_path, capsys, monkeypatch):
    out = tmp_path / "report"
    monkeypatch.setattr(report, "html_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main(["--baselines-only", "--data_files", backtest, "--output_dir", str(out)])
    assert list(tmp_path.iterdir()) == [Path(backtest)]


def test_what_is_wrong_is_said_before_a_model_is_loaded_or_a_file_read(backtest, tmp_path, capsys, monkeypatch):
    use(monkeypatch, lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(builder, "read_decisions", lambda *_: pytest.fail("read"))
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.zip").write_text("no zip")
    for more, message in (
        (["--cutoff", "soon"], "--cutoff soon: give a date"),
        (["--data_files", str(tmp_path / "none.csv")], "No file matches .*none.csv"),
        (["--fee", "2"], "--fee 2.0: give a number from 0 to 1"),
        (["--q_scorer", str(tmp_path / "none.zip")], "none.zip is no file"),
        (["--q_scorer", str(tmp_path / "broken.zip")], "broken.zip is not a whole Q-scorer"),
        (["--output_dir", str(tmp_path / "file")], "file"),
        (["--output_dir", str(tmp_path / "file" / "report")], "file"),
    ):
        status, _ = run(capsys, "--model", "out/x", "--data_files", backtest, *more)
        assert re.match(f"error: .*{message}", status) and "\n" not in status


def test_a_model_folder_that_is_missing_is_called_missing(backtest, tmp_path, capsys):
    status, _ = run(capsys, "--model", tmp_path / "nowhere", "--data_files", backtest)
    assert re.match("error: There is no folder .*nowhere", status)


def test_a_full_disk_is_one_line_and_leaves_the_old_report_whole(backtest, tmp_path, capsys, monkeypatch):
    report.write_report(tmp_path, {"metrics.json": "old", "report.md": "old"})
    monkeypatch.setattr(evaluate, "report_files", lambda *_: {"metrics.json": "new", "report.md": "new"})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    status, _ = run(capsys, "--baselines-only", "--data_files", backtest, "--output_dir", tmp_path)
    assert re.match("error: .*metrics.json: No space left on device", status) and "\n" not in status
    assert [(tmp_path / name).read_text() for name in ("metrics.json", "report.md")] == ["old", "old"]
    assert not list(tmp_path.glob(".*"))


def test_hindsight_goes_with_the_audit_alone(capsys):
    status, _ = run(capsys, "--baselines-only", "--hindsight")
    assert status == 2


# The Q-scorer beside the other policies


def judged(capsys, *arguments) -> str:
    status, printed = run(capsys, *arguments, "--baselines-only")
    assert status == 0
    return printed


def fit_scorer(*arguments) -> None:
    q_scorer.main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def market(tmp_path_factory) -> str:
    return write_csv(tmp_path_factory.mktemp("market") / "backtest.csv", walk(280))


def test_an_evaluation_has_a_row_and_a_section_for_the_q_scorer(market, tmp_path, capsys):
    printed = judged(capsys, "--data_files", market, *SPLITS, "--output_dir", tmp_path)
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


def test_an_evaluation_takes_the_saved_scorer_with_its_gates(market, tmp_path, capsys):
    options = ("--data_files", market, *SPLITS)
    fit_scorer(*options, "--folds", 0, "--threshold", 50, "--output_dir", tmp_path)
    judged(capsys, *options, "--q_scorer", tmp_path / "q_scorer.zip", "--output_dir", tmp_path / "report")
    section = json.loads((tmp_path / "report" / "metrics.json").read_text())["q_scorer"]
    assert section["by_exit_style"]["hold_to_expiry"]["sold"] == 0
    assert (
        section["by_exit_style"]["hold_to_expiry"]["missed"] == section["by_exit_style"]["hold_to_expiry"]["positive"]
    )
    assert section["fitted"]["gates"]["threshold"] == 50


def test_an_evaluation_warns_of_decisions_that_the_scorer_was_fitted_on_and_of_other_options(market, tmp_path, capsys):
    options = ("--data_files", market, *SPLITS, "--output_dir", tmp_path)
    printed = judged(capsys, *options, "--split", "validation")
    assert re.search(r"WARNING: (\d+) of these \1 decisions are of the time that the Q-scorer's offset", printed)
    fit_scorer(*options, "--folds", 0, "--horizon", 3)
    printed = judged(capsys, *options, "--q_scorer", tmp_path / "q_scorer.zip")
    assert "WARNING: the Q-scorer learnt outcomes with other options: horizon 3 (here none)." in printed


def test_data_on_which_no_scorer_can_be_fitted_are_judged_without_one(tmp_path, capsys):
    rows = [row for number in range(60) for row in decision(number, number % 3 or None, pnl_vs_hodl="", iv="")]
    path = write_csv(tmp_path / "blank.csv", [*rows, no_candidates(60)])
    printed = judged(capsys, "--data_files", path, "--output_dir", tmp_path / "report")
    assert "There is no Q-scorer. Of" in printed
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert found["q_scorer"] is None and "Q-scorer" not in found["groups"][0]["rows"]


def test_a_saved_scorer_that_cannot_be_used_stops_the_evaluation(market, tmp_path, capsys):
    (tmp_path / "q.zip").write_text("no zip")
    with pytest.raises(SystemExit, match="error: .*not a whole Q-scorer"):
        evaluate.main(["--baselines-only", "--data_files", market, "--q_scorer", str(tmp_path / "q.zip")])


def test_on_its_training_split_every_baseline_was_fitted(market):
    columns = read_decisions([market], CoveredCallCandidatesConfig()).columns()
    rows = [Row(name, columns.chosen, np.zeros(0)) for name in ("teacher", "never sell (HODL)", "score rule")]
    assert evaluate.fitted_on("train", columns, rows, None, None) == {"score rule"}
    assert evaluate.fitted_on("test", columns, rows, None, None) == set()
    assert evaluate.fitted_on("test", columns, rows, None, Stub(tuned_to=time(3))) == {"model"}
