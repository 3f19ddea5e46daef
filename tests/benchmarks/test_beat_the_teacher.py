"""The walk-forward against the teacher, without the language models: they have tests of their own."""

import datetime
import json
from datetime import date

import pytest
from conftest import SCRIPT, import_script, python

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.reading import read_candidates

BENCHMARK = SCRIPT.parent / "benchmarks" / "beat_the_teacher.py"


@pytest.fixture(scope="module")
def backtest(tmp_path_factory) -> str:
    """A year and a half of the simulated market."""
    folder = tmp_path_factory.mktemp("backtest")
    simulator = import_script(SCRIPT.parent / "data" / "simulate_backtest.py")
    simulator.simulate_backtest(folder, 349, date(2020, 1, 1), date(2021, 6, 30))
    return str(folder / "*.csv")


def run(backtest, folder, *more):
    words = ["--no_models", "--data_files", backtest, "--output_dir", folder / "out", *more]
    return python(BENCHMARK, *words, cwd=folder)


def test_the_table_has_every_policy_and_the_oracle_is_best_in_each_period(backtest, tmp_path):
    done = run(backtest, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    head, *lines = [[cell.strip("| ") for cell in row] for row in rows]
    assert head[-1] == "2021" and {line[0] for line in lines} == {"teacher", "score rule", "Q-scorer", "oracle"}
    last = {line[0]: float(line[-1].replace(",", "")) for line in lines}
    assert last["oracle"] == max(last.values()) > last["teacher"] == last["score rule"]
    assert (tmp_path / "out" / "equity.png").stat().st_size > 10_000
    assert "more with an unknown outcome are left out" in done.stdout


def test_a_finished_period_is_kept_until_the_options_change(backtest, tmp_path):
    assert run(backtest, tmp_path).returncode == 0
    path = tmp_path / "out" / "2021.json"
    kept = json.loads(path.read_text())
    kept["picks"]["Q-scorer"] = [None] * len(kept["picks"]["Q-scorer"])
    path.write_text(json.dumps(kept))
    assert "| Q-scorer | 0.000 | 0.0" in run(backtest, tmp_path).stdout
    run(backtest, tmp_path, "--fee", "0.0003")
    again = json.loads(path.read_text())
    assert again["settings"]["fee"] == 0.0003 and again["settings"] != kept["settings"]


def test_a_period_is_fitted_on_what_was_settled_before_it(backtest):
    benchmark = import_script(BENCHMARK)
    config = CoveredCallCandidatesConfig(exit_style="hold_to_expiry")
    logged = read_candidates([str(path) for path in SCRIPT.parent.glob("data/sample/*hold*")], config)
    folds = list(benchmark.make_folds(logged, "year"))
    assert [fold.name for fold in folds] == ["2020", "2021", "2022", "2023", "2024", "2025"]
    for fold in folds:
        begins = datetime.datetime.fromisoformat(fold.test_from)
        assert begins == min(entry.decision.decision_time for entry in fold.entries)
        dates = {"validation_from": fold.validation_from, "test_from": fold.test_from}
        splits = benchmark.split_decisions(logged, CoveredCallCandidatesConfig(**dates))
        assert all(entry.label_end < begins for name in ("train", "validation") for entry in splits[name])
        assert min(map(len, splits.values())) > 14


def test_files_too_short_for_a_period_are_refused_with_the_way_out(tmp_path):
    simulator = import_script(SCRIPT.parent / "data" / "simulate_backtest.py")
    simulator.simulate_backtest(tmp_path, 349, date(2020, 1, 1), date(2020, 2, 10))
    done = run(str(tmp_path / "*.csv"), tmp_path, "--period", "month")
    assert done.returncode == 1 and "error: no month has 60 decision times before it" in done.stderr
