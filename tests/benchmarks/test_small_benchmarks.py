"""The benchmarks of loading, of label scoring and of the recipes' options, each at its smallest."""

import json
import re

import numpy as np
import pytest
from conftest import SCRIPT, decision, import_script, time, write_csv
from datasets import Dataset
from markets import walk

from covered_call.language_model.manifest import MANIFEST
from covered_call.training.recipe import parse_recipe


def printed_by(name: str, monkeypatch, capsys, *options) -> str:
    path = SCRIPT.parent / "benchmarks" / f"{name}.py"
    monkeypatch.setattr("sys.argv", [str(path), *map(str, options)])
    monkeypatch.syspath_prepend(path.parent)
    import_script(path).main()
    return capsys.readouterr().out


def test_loading_stands_beside_what_one_would_write_first(monkeypatch, capsys):
    options = ("--rows", 500, "--rounds", 1, "--work", "per_candidate")
    printed = printed_by("loading_speed", monkeypatch, capsys, *options)
    rows = re.findall(
        r"^\| per_candidate \| (.+?) \| \d+\.\d \| \d+\.\dx \| \d+\.\d \| (\d+) \|$", printed, re.MULTILINE
    )
    assert [name for name, _ in rows] == ["here", "generator", "csv + map"]
    assert all(int(peak) > 50 for _, peak in rows)
    assert ", 500 rows, " in printed


def test_each_policy_stands_with_each_context_and_its_interval(monkeypatch, capsys, tmp_path):
    path = write_csv(tmp_path / "a.csv", walk(150))
    vols = tmp_path / "vols_BTC.csv"
    vols.write_text("time,vol\n" + "".join(f"{time(day)[:10]},{50 + day % 9}\n" for day in range(-9, 150)))
    monkeypatch.syspath_prepend(SCRIPT.parent / "benchmarks")
    asked = []

    def answers(train, judged, steps, seed):
        """In place of the tiny model, which has a test of its own."""
        asked.append("Market's IV" in train[0]["messages"][1]["content"])
        return {name: ["2"] * len(split) for name, split in judged.items()}

    monkeypatch.setattr("prompts.tiny_answers", answers)
    options = ("--data_files", path, "--folds", 2, "--context_vols", vols, "--seeds", 5, "--output_dir", tmp_path)
    printed = printed_by("context", monkeypatch, capsys, *options)
    rows = re.findall(r"^(\S.*?)  +(none|spot|spot, dvol)  +\d+ of \d+ +\d\.\d{3} +\d\.\d{3} +[+-]", printed, re.M)
    assert len(rows) == 24 and len(set(rows)) == 12 and ("tiny model, seed 5", "spot, dvol") in rows
    assert asked == [False] * 4 + [True] * 2  # once a block and level, whatever is paid
    assert printed.index("Paid as the files say") < printed.index("Paid at the market's vol")


def test_each_policy_stands_with_what_it_is_told_beside_the_context(monkeypatch, capsys, tmp_path):
    path = write_csv(tmp_path / "a.csv", walk(150))
    monkeypatch.syspath_prepend(SCRIPT.parent / "benchmarks")
    asked = []

    def answers(train, judged, steps, seed):
        asked.append([words in judged["block"][-1]["messages"][1]["content"] for words in TOLD])
        return {name: ["2"] * len(split) for name, split in judged.items()}

    monkeypatch.setattr("prompts.tiny_answers", answers)
    options = ("--data_files", path, "--settlement", "simulated", "--folds", 1, "--seeds", 5, "--output_dir", tmp_path)
    printed = printed_by("opinion", monkeypatch, capsys, *options)
    rows = re.findall(r"^(\S.*?)  +(none|analogues|opinion)  +\d+ of \d+ +\d\.\d{3} +\d\.\d{3} +[+-]", printed, re.M)
    assert len(rows) == len(set(rows)) == 11 and ("Q-scorer", "opinion") not in rows
    assert asked == [[False, False], [True, False], [False, True]]
    assert re.match(r"Opinions on [\d,]+ of [\d,]+ candidates, by \d+ scorers", printed)


TOLD = ("Similar settled decisions", "Outcome model")


def test_label_scoring_stands_beside_generating_and_separate_passes(monkeypatch, capsys):
    """That it finds what the separate passes find, the benchmark asserts itself."""
    options = ("--prompts", 6, "--rounds", 1, "--batch_sizes", 2)
    printed = printed_by("label_scoring", monkeypatch, capsys, *options)
    rows = re.findall(r"^\| (.+?) \| \d+ \| \d+\.\dx \| \d+\.\d h \|$", printed, re.MULTILINE)
    assert len(rows) == len(set(rows)) == 4
    assert printed.startswith("6 ranking prompts of ") and "best of 1 round(s)" in printed


def test_each_option_of_the_recipes_is_a_row_and_a_run_that_has_finished_is_not_repeated(
    monkeypatch, capsys, tmp_path
):
    """With a stand-in for the training itself, which has tests of its own; its command lines are parsed for real."""
    ran = []

    def run(stage, words):
        model, data, training, _ = parse_recipe(words)
        ran.append((stage, data.candidate_order, data.balance, training.seed, training.max_steps))
        results = [
            {"answers_by": "tuned model", "split": split, "balanced_accuracy": 0.5 + training.seed / 10, "accuracy": 1}
            for split in ("validation", "test")
        ]
        folder = tmp_path / training.output_dir
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text(json.dumps({"finished": "today", "results": results}))

    monkeypatch.setattr("covered_call.tuning.run", run)
    options = ("--part", "ranking", "--seeds", 0, 1, "--max_steps", 3, "--output_dir", tmp_path)
    printed = printed_by("recipe_options", monkeypatch, capsys, *options)
    orders = ["instrument", "shuffle"]
    assert ran == [("sft", order, "none", seed, 3) for order in orders for seed in (0, 1)]
    for order in orders:
        known = "0.550 (0.500 to 0.600) | 0.550 (0.500 to 0.600) | 1.000 (1.000 to 1.000) | 1.000 (1.000 to 1.000)"
        assert f"| ranking | candidate_order: {order}, balance: none | {known} |" in printed
    assert printed_by("recipe_options", monkeypatch, capsys, *options) == printed
    assert len(ran) == 4


def test_each_balance_of_pairs_is_paid_by_both_checkpoints_and_a_run_that_has_finished_is_not_repeated(
    monkeypatch, capsys, tmp_path
):
    """With a stand-in for the training: of two seeds, one never sells, and one always as the teacher."""
    rows = []
    for day in range(80):  # a price that jumps up and down each day
        low = day % 2 == 0
        market = {"dte": 1.0, "spot": 58000.0 if low else 66000.0, "exit_style": "hold_to_expiry"}
        rows += decision(day, sold=0 if low else None, **market, pnl_vs_hodl=-4000.0 if low else 0.0)
    path = write_csv(tmp_path / "candidates.csv", rows)
    bench, ran = import_script(SCRIPT.parent / "benchmarks" / "pair_balance.py"), []

    def train(balance, backtest, words):
        seed = int(words[words.index("--seed") + 1])
        ran.append((balance, seed))
        teacher = backtest.decisions.columns(backtest.numbers["test"]).chosen
        picks = {"dpo_loss": [-1] * len(teacher), "mean_percent": np.where(seed, teacher, -1).tolist()}
        return bench.Measured(0.25, {"dpo_loss": 2, "mean_percent": 1}, {"the start": teacher.tolist(), **picks})

    monkeypatch.setattr(bench, "train", train)
    monkeypatch.setattr(bench, "start_of", lambda words: [])
    words = ["--data_files", path, "--seeds", "0", "1", "--output_dir", str(tmp_path)]
    bench.main(words)
    printed = capsys.readouterr().out
    assert ran == [(balance, seed) for balance in ("shares", "cut", "edge") for seed in (0, 1)]
    (start,) = re.findall(r"^\| the teacher \| +\| +\| \S+ \| ([+-][\d.,]+) \|", printed, re.MULTILINE)
    assert "| shares | dpo_loss | 25% | 0.000 | +0.0 | +0.000 | " in printed
    half = float(start.replace(",", "")) / 2
    (mean,) = re.findall(r"^\| edge \| mean_percent \| 25% \| \S+ \| ([+-][\d.,]+) \(", printed, re.MULTILINE)
    assert float(mean.replace(",", "")) == pytest.approx(half, abs=0.1)
    bench.main(words)
    assert capsys.readouterr().out == printed and len(ran) == 6


def test_pairs_are_drawn_by_their_shares_cut_to_the_second_or_by_their_edge():
    bench = import_script(SCRIPT.parent / "benchmarks" / "pair_balance.py")
    labels = ["NO_TRADE"] * 2 + ["1"] * 6 + ["2"]
    outcomes = {"chosen_outcome": [0.0] * 9, "rejected_outcome": [-8.0, *[-1.0] * 8], "spot": [100.0] * 9}
    pairs, rng = Dataset.from_dict({"chosen_label": labels, **outcomes}), np.random.default_rng(0)
    drawn = {name: [labels[one] for one in by(pairs, 9000, rng)] for name, by in bench.BALANCES.items()}
    assert {name: drawn["shares"].count(name) for name in set(labels)} == {"NO_TRADE": 2000, "1": 6000, "2": 1000}
    assert {name: drawn["cut"].count(name) for name in set(labels)} == {"NO_TRADE": 3600, "1": 3600, "2": 1800}
    assert drawn["edge"].count("NO_TRADE") == pytest.approx(9000 * 9 / 16, rel=0.05)
    assert sorted(bench.by_shares(pairs, 9, rng)) == list(range(9))


@pytest.mark.slow
def test_a_cluster_of_one_node_says_what_a_row_costs(monkeypatch, capsys):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'covered-call-candidates[ray]'")
    monkeypatch.syspath_prepend(SCRIPT.parent / "benchmarks")
    printed = printed_by("scale_out", monkeypatch, capsys, "--rows", 2_000, "--files", 2, "--nodes", 1)
    ((rows, work),) = re.findall(
        r"^\| 1 \|.* \| ([\d,]+) \|(?: \d+\.\d\d \|){3}.* (\d+) \| \d+ \|$", printed, re.MULTILINE
    )
    assert int(rows.replace(",", "")) > 0 and 80 < int(work) < 200


@pytest.mark.parametrize(
    "name",
    [
        "training_speed",
        "label_scoring",
        "loading_speed",
        "recipe_options",
        "gpu_memory",
        "pair_balance",
        "scale_out",
        "context",
        "opinion",
        "prompts",
    ],
)
def test_what_a_benchmark_says_of_itself_names_it(name):
    text = (SCRIPT.parent / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    assert f"python benchmarks/{name}.py" in text
