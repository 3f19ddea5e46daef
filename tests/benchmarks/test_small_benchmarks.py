"""The benchmarks of loading, of label scoring and of the recipes' options, each at its smallest."""

import json
import re

import pytest
from conftest import SCRIPT, import_script

from covered_call.language_model.manifest import MANIFEST
from covered_call.training.recipe import parse_recipe


def printed_by(name: str, monkeypatch, capsys, *options) -> str:
    path = SCRIPT.parent / "benchmarks" / f"{name}.py"
    monkeypatch.setattr("sys.argv", [str(path), *map(str, options)])
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
    "name", ["training_speed", "label_scoring", "loading_speed", "recipe_options", "gpu_memory", "scale_out"]
)
def test_what_a_benchmark_says_of_itself_names_it(name):
    text = (SCRIPT.parent / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    assert f"python benchmarks/{name}.py" in text
