"""The walk-forward against the teacher, without the language models: they have tests of their own."""

import datetime
import json
from datetime import date

import pytest
from conftest import SCRIPT, import_script

from covered_call.candidates.builder import Backtest
from covered_call.candidates.options import CoveredCallCandidatesConfig

ROOT = SCRIPT.parent


@pytest.fixture(scope="module")
def benchmark():
    return import_script(ROOT / "benchmarks" / "beat_the_teacher.py")


@pytest.fixture(scope="module")
def simulate():
    return import_script(ROOT / "data" / "simulate_backtest.py").simulate_backtest


@pytest.fixture(scope="module")
def backtest(simulate, tmp_path_factory) -> str:
    """A year and a half of the simulated market."""
    folder = tmp_path_factory.mktemp("backtest")
    simulate(folder, 349, date(2020, 1, 1), date(2021, 6, 30))
    return str(folder / "*.csv")


@pytest.fixture
def run(benchmark, backtest, tmp_path, capsys):
    """From words of the command line to what it prints."""

    def call(*more: str) -> str:
        benchmark.main(["--no_models", "--data_files", backtest, "--output_dir", str(tmp_path / "out"), *more])
        return capsys.readouterr().out

    return call


def test_the_table_has_every_policy_and_the_oracle_is_best_in_each_period(run, tmp_path):
    printed = run()
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    head, *lines = [[cell.strip("| ") for cell in row] for row in rows]
    assert head[-1] == "2021" and {line[0] for line in lines} == {"teacher", "score rule", "Q-scorer", "oracle"}
    last = {line[0]: float(line[-1].replace(",", "")) for line in lines}
    assert last["oracle"] == max(last.values()) > last["teacher"] == last["score rule"]
    assert (tmp_path / "out" / "equity.png").stat().st_size > 10_000
    assert "more with an unknown outcome are left out" in printed


def test_a_finished_period_is_kept_until_the_options_or_the_code_change(run, tmp_path, benchmark, monkeypatch):
    run()
    path = tmp_path / "out" / "2021.json"
    kept = json.loads(path.read_text())
    kept["picks"]["score rule"] = [None] * len(kept["picks"]["score rule"])
    path.write_text(json.dumps(kept))
    assert "| score rule | 0.000 | 0.0" in run()
    run("--fee", "0.0003")
    again = json.loads(path.read_text())
    assert again["settings"]["fee"] == 0.0003 and again["settings"] != kept["settings"]
    path.write_text(json.dumps(kept))
    monkeypatch.setattr(benchmark, "code_hash", lambda _: "another")
    assert "| score rule | 0.000 | 0.0" not in run()


def test_a_change_of_any_module_or_recipe_is_another_code(benchmark, tmp_path):
    """Also of one that is added, or goes to another room."""
    assert {path.name for path in (benchmark.ROOT / "covered_call").iterdir()} > {"candidates", "atomic.py"}
    names = ("covered_call/a.py", "covered_call/room/b.py", "configs/tiny.yaml", "benchmarks/beat_the_teacher.py")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    seen = [benchmark.code_hash(tmp_path)]
    assert benchmark.code_hash(tmp_path) == seen[0]
    for name in (*names, "covered_call/room/c.py"):
        (tmp_path / name).write_text("2")
        seen.append(benchmark.code_hash(tmp_path))
    (tmp_path / names[0]).rename(tmp_path / "covered_call" / "room" / "a.py")
    seen.append(benchmark.code_hash(tmp_path))
    assert len(set(seen)) == len(seen)


def test_a_period_is_fitted_on_what_was_settled_before_it(benchmark):
    config = CoveredCallCandidatesConfig(exit_style="hold_to_expiry")
    logged = Backtest([str(path) for path in ROOT.glob("data/sample/*hold*")], config).logged
    folds = list(benchmark.make_folds(logged, "year"))
    assert [fold.name for fold in folds] == ["2020", "2021", "2022", "2023", "2024", "2025"]
    for fold in folds:
        begins = datetime.datetime.fromisoformat(fold.test_from)
        assert begins == min(entry.decision.decision_time for entry in fold.entries)
        dates = {"validation_from": fold.validation_from, "test_from": fold.test_from}
        splits = benchmark.split_decisions(logged, CoveredCallCandidatesConfig(**dates))
        assert all(entry.label_end < begins for name in ("train", "validation") for entry in splits[name])
        assert min(map(len, splits.values())) > 14


def test_files_too_short_for_a_period_are_refused_with_the_way_out(simulate, benchmark, tmp_path):
    simulate(tmp_path, 349, date(2020, 1, 1), date(2020, 2, 10))
    with pytest.raises(SystemExit, match="^error: no month has 60 decision times before it"):
        benchmark.main(["--no_models", "--data_files", str(tmp_path / "*.csv"), "--period", "month"])
