"""The walk-forward against the teacher, without the language models: they have tests of their own."""

import csv
import datetime
import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SCRIPT, import_script, on_the_default_stack

from covered_call.candidates.builder import Backtest
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.splits import split_decisions

pytestmark = on_the_default_stack

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
    assert head[-1].startswith("2021") and {line[0] for line in lines} == {
        "teacher", "never sell", "score rule", "delta nearest 0.25", "lowest delta", "highest premium",
        "teacher if iv/rv > 1", "teacher unless trend up", "ridge", "Q-scorer", "oracle",
    }  # fmt: skip
    last = {line[0]: float(line[-1].replace(",", "")) for line in lines}
    assert last["oracle"] == max(last.values()) > last["teacher"] == last["score rule"]
    assert (tmp_path / "out" / "equity.png").stat().st_size > 10_000
    assert "of 9 policies and the teacher" in printed and "more with an unknown outcome are left out" in printed
    assert (
        "Computed against recorded outcomes on " in printed and " is shown to earn more than the teacher." in printed
    )


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


def test_outcomes_are_priced_as_the_options_say_and_a_period_is_kept_until_the_vols_change(run, tmp_path):
    vols = tmp_path / "vols.csv"

    def earned(vol: float) -> tuple[float, dict]:
        days = [date(2020, 1, 1) + datetime.timedelta(days=n) for n in range(600)]
        vols.write_text("time,vol\n" + "".join(f"{day},{vol}\n" for day in days))
        printed = run("--iv_file", str(vols), "--iv_lag", "0")
        assert "at the vol of iv_file" in printed
        line = next(line for line in printed.splitlines() if line.startswith("| teacher |"))
        return float(line.split(" | ")[-1].strip("| ")), json.loads((tmp_path / "out" / "2021.json").read_text())

    (low, first), (high, second) = earned(0.3), earned(1.2)
    assert low < high and first["settings"] != second["settings"] and first["picks"] != second["picks"]
    assert "at a vol of 0.5, shifted by +0.1" in run("--pricing_iv", "0.5", "--iv_shift", "0.1")


def test_outcomes_that_do_not_follow_the_records_are_said_and_not_paid(benchmark, backtest, tmp_path, capsys):
    (path,) = Path(backtest).parent.glob("*hold*.csv")
    rows = list(csv.DictReader(path.open(newline="")))
    for row in rows:
        row["pnl_vs_hodl"] = row["pnl_vs_hodl"] and 2 * float(row["pnl_vs_hodl"])
    with (tmp_path / path.name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(SystemExit, match="^error: no outcome is known that can be trusted"):
        benchmark.main(["--no_models", "--data_files", str(tmp_path / path.name), "--output_dir", str(tmp_path)])
    assert "WARNING: the average error is above 5% of the typical outcome" in capsys.readouterr().out
    options = CoveredCallCandidatesConfig(exit_style="hold_to_expiry")
    logged = benchmark.make_market(Backtest([str(tmp_path / path.name)], options)).logged
    assert not any(one.pnl_vs_hodl for entry in logged for one in entry.counterfactuals)  # what is fitted sees none


def test_plain_policies_sell_what_their_names_say(benchmark, backtest):
    options = CoveredCallCandidatesConfig(exit_style="hold_to_expiry", iv_shift=-0.2)
    market = benchmark.make_market(Backtest([str(path) for path in Path(backtest).parent.glob("*hold*")], options))
    picks, days = benchmark.plain_policies(market), {}
    nearest = benchmark.nearest_rule(market.columns).picks(market.columns)
    for place, entry in enumerate(market.logged):
        decision, sold = entry.decision, entry.chosen
        days[decision.decision_time] = decision.spot
        its = {name: None if made[place] < 0 else decision.candidates[made[place]] for name, made in picks.items()}
        teachers = None if sold is None else decision.candidates[sold]
        assert its["teacher"] == teachers and its["never sell"] is None
        if decision.candidates:
            assert its["lowest delta"].delta == min(candidate.delta for candidate in decision.candidates)
        if nearest[place] >= 0:
            away = [abs(candidate.delta - 0.25) for candidate in decision.candidates]
            assert away[nearest[place]] == min(away)
        ratio = teachers and teachers.ivrv_ratio
        rich = ratio is not None and ratio * (teachers.iv - 0.2) / teachers.iv > 1
        assert its["teacher if iv/rv > 1"] == (teachers if rich else None)
        before = days.get(decision.decision_time - datetime.timedelta(days=30))
        fell = before is None or decision.spot < before
        assert its["teacher unless trend up"] == (teachers if fell else None)
    sold = [int((made >= 0).sum()) for made in picks.values()]
    assert len(set(sold)) > 3 and 0 < (nearest >= 0).sum() < len(nearest)
    premium = market.cases.premium
    for place, pick in enumerate(picks["highest premium"]):
        its = premium[market.columns.offsets[place] : market.columns.offsets[place + 1]]
        assert pick == (its.argmax() if len(its) else -1)


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        (np.resize([0.5, -0.4, 0.6], 200), "shrewd is shown to earn more than the teacher."),
        (np.resize([0.5, -0.4], 200), "Nothing is shown to earn more than the teacher."),
        (np.where(np.arange(200) < 4, 0.5, 0.0), "Nothing is shown to earn more than the teacher."),  # one week's luck
        (np.full(30, 0.5), "Nothing is shown to earn more than the teacher, or"),
    ],
)
def test_the_verdict_needs_an_interval_above_0_and_blocks_as_long_as_the_outcomes(benchmark, gains, says):
    days = np.arange(len(gains))
    blocks = benchmark.Blocks(SimpleNamespace(columns=SimpleNamespace(time=days), label_end=days + 7), days)
    assert blocks.length == 8
    percent = {"teacher": 0 * gains, "never sell": 0 * gains, "shrewd": gains}
    picks = {name: np.where(its != 0, 1, 0) for name, its in percent.items()}
    assert benchmark.verdict(benchmark.Paid(days, picks, percent, percent), blocks).startswith(says)


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
        splits = split_decisions(logged, CoveredCallCandidatesConfig(**dates))
        assert all(entry.label_end < begins for name in ("train", "validation") for entry in splits[name])
        assert min(map(len, splits.values())) > 14


def test_files_too_short_for_a_period_are_refused_with_the_way_out(simulate, benchmark, tmp_path):
    simulate(tmp_path, 349, date(2020, 1, 1), date(2020, 2, 10))
    with pytest.raises(SystemExit, match="^error: no month has 60 decision times before it"):
        benchmark.main(["--no_models", "--data_files", str(tmp_path / "*.csv"), "--period", "month"])
