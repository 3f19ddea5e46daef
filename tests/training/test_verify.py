"""The verb verify: gates of a folder of CSVs before a training, and of a run that was moved."""

import json
import shutil

import pytest
import yaml
from conftest import decision, on_the_default_stack, write_csv

from covered_call.__main__ import main as command
from covered_call.language_model.manifest import hash_of
from covered_call.training import rehearsal, verify
from covered_call.training.examples import load_splits
from covered_call.training.keys import DataArguments

from .test_sources import chat, written

QUICK = ["--max_eval_records", "8"]


@pytest.fixture(autouse=True)
def two_steps(monkeypatch):
    monkeypatch.setitem(rehearsal.SMALL, "max_steps", 2)


@pytest.fixture
def data(corpus, tmp_path):
    """A folder with the small corpus alone."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(corpus, folder)
    return folder


@pytest.fixture
def gates(tmp_path, capsys):
    """The gates of a folder by name, and the exit status."""

    def asked(folder, *words) -> tuple[dict[str, tuple[str, str]], int]:
        report = tmp_path / "gates.json"
        with pytest.raises(SystemExit) as stopped:
            command(["verify", str(folder), "--json", str(report), *map(str, words)])
        found = json.loads(report.read_text())
        printed = capsys.readouterr().out
        for gate in found["gates"]:
            assert f"{gate['status']:<8}{gate['name']:<14}{gate['said']}" in printed
        assert found["passed"] == (stopped.value.code == 0)
        return {gate["name"]: (gate["status"], gate["said"]) for gate in found["gates"]}, stopped.value.code

    return asked


@pytest.fixture
def no_steps(monkeypatch):
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: "as it would")
    monkeypatch.setattr(rehearsal, "preflight_of", lambda *_: "tokens    few")


def test_csvs_pass_all_gates_with_the_recipe_of_a_base_that_is_here(gates, data, corpus_base):
    found, status = gates(
        data, "--config", "tiny", "--model_name_or_path", corpus_base, "--tiny_base_steps", 0, *QUICK
    )
    assert list(found) == ["data", "counts", "leaks", "preflight", "dry training"]
    assert status == 0 and {one for one, _ in found.values()} == {"ok"}
    assert found["data"][1].startswith("61 decisions of 1 file: candidates.csv ")
    assert found["counts"][1].startswith("per_candidate: train 144, validation ")
    assert found["preflight"][1].startswith("prompt at most ")
    assert found["dry training"][1].startswith("2 steps in int4 of a random Phi-3, ")


@on_the_default_stack
def test_the_steps_read_the_tokens_of_a_base_however_it_is_typed(gates, data, corpus_base, monkeypatch):
    monkeypatch.setattr(rehearsal, "preflight_of", lambda *_: "tokens    few")
    found, status = gates(data, "--config", "tiny", f"--model-name-or-path={corpus_base}", *QUICK)
    assert status == 0 and "its tokens learnt here" not in found["dry training"][1]


@on_the_default_stack
def test_without_the_base_its_tokens_are_unknown_and_the_steps_are_taken_all_the_same(gates, data):
    found, status = gates(data)
    assert (
        status == 0 and found["preflight"][0] == "unknown" and "There is no model microsoft" in found["preflight"][1]
    )
    assert found["dry training"][0] == "ok" and "its tokens learnt here" in found["dry training"][1]


def test_a_recipe_of_pairs_is_rehearsed_too(gates, pair_corpus, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    shutil.copy(pair_corpus, folder)
    found, status = gates(folder, "--config", "preference")
    assert status == 0 and found["preflight"][0] == "unknown"
    assert found["dry training"][0] == "ok"


SPOILT = {
    "a row that cannot be": ("data", lambda rows: [*rows[:-1], {**rows[-1], "spot": "-1"}], "spot"),
    "a name that is an answer": (
        "leaks",
        lambda rows: [{**one, "instrument": one["instrument"].replace("BTC-", "SKIP-")} for one in rows],
        "words of an answer",
    ),
    "a teacher that never sold": (
        "counts",
        lambda rows: [{**one, "trade_executed": "0", "chosen": "0", "action": "SKIP"} for one in rows],
        "never sold",
    ),
    "a teacher that sold whatever there was": (
        "counts",
        lambda rows: [one for one in rows if one["trade_executed"] == "1" and one["chosen"] == "1"],
        "sold every candidate",
    ),
    "too few": ("counts", lambda rows: rows[:3], "split is empty"),
}


@on_the_default_stack
@pytest.mark.parametrize("spoilt", SPOILT)
def test_data_that_cannot_be_trained_on_fail_at_their_gate(gates, tmp_path, spoilt, monkeypatch):
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: "as it would")
    gate, change, said = SPOILT[spoilt]
    rows = [one for day in range(40) for one in decision(day, sold=day % 3 if day % 4 else None, dte=1.0)]
    folder = tmp_path / "runs"
    folder.mkdir()
    write_csv(folder / "a.csv", change(rows))
    found, status = gates(folder, "--config", "ranking")
    assert status == 1 and found[gate][0] == "FAIL" and said in found[gate][1]


@on_the_default_stack
def test_a_teacher_that_always_sold_is_no_failure_of_a_ranking_and_is_said(gates, tmp_path, no_steps):
    folder = tmp_path / "runs"
    folder.mkdir()
    write_csv(folder / "a.csv", [one for day in range(40) for one in decision(day, sold=day % 3, dte=1.0)])
    found, status = gates(folder)
    assert status == 0 and found["counts"][1].endswith("records; NO_TRADE never occurs in train")


@on_the_default_stack
def test_a_recipe_that_diverges_fails(gates, data, monkeypatch):
    monkeypatch.setitem(rehearsal.SMALL, "max_steps", 4)
    found, status = gates(data, "--config", "ranking", "--learning_rate", "1e30", "--warmup_steps", 0)
    assert status == 1 and found["dry training"][0] == "FAIL"
    assert "The loss is nan at step" in found["dry training"][1] and "Lower learning_rate" in found["dry training"][1]


@on_the_default_stack
def test_a_folder_that_is_not_there_is_one_line():
    with pytest.raises(SystemExit, match="error: There is no folder tp_and_roll: give it before the keys"):
        verify.main(["--exit_style", "tp_and_roll", "runs"])


@on_the_default_stack
@pytest.mark.parametrize("empty", [True, False])
def test_a_folder_of_neither_kind_is_one_line(tmp_path, empty):
    folder = tmp_path / "other"
    folder.mkdir()
    empty or (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        SystemExit, match="error: .*other holds neither a manifest.json nor a CSV: give a run's folder"
    ):
        verify.main([str(folder)])


# --- A run


def test_a_run_that_was_moved_passes_with_the_data_it_was_tuned_on(gates, own_finished, data):
    found, status = gates(own_finished, "--data_dir", data)
    assert status == 0 and {one for one, _ in found.values()} == {"ok"}
    names = ["run folder", "recipe", "base", "versions", "data files", "data", "counts", "leaks", "preflight"]
    assert list(found) == [*names, "dry training"]


@on_the_default_stack
def test_data_that_are_not_here_are_unknown_and_changed_ones_fail(gates, own_finished, data, no_steps):
    recipe = own_finished / "recipe.yaml"
    found, status = gates(own_finished, "--data_dir", data.parent / "nowhere")
    assert status == 0 and found["data"][0] == "unknown" and "Say where they are with --data_dir" in found["data"][1]
    file = data / "candidates.csv"
    file.write_text(file.read_text().replace("58466.0", "58467.0", 1))
    shutil.copy(file, data / "more.csv")
    file.rename(data / "other.csv")
    (data / "more.csv").rename(file)
    found, status = gates(own_finished, "--data_files", file)
    assert status == 1 and found["data files"] == (
        "FAIL",
        "candidates.csv has changed: copy the files again, or name the right ones with --data_dir.",
    )
    found, status = gates(own_finished, "--data_files", data / "other.csv")
    assert "candidates.csv is missing; other.csv is new" in found["data files"][1]
    recipe.write_text(recipe.read_text() + "max_iv: 2.0\n")
    found, status = gates(own_finished, "--data_dir", data.parent / "nowhere")
    assert status == 1 and found["recipe"][0] == "FAIL" and "not what was run, in max_iv" in found["recipe"][1]


@on_the_default_stack
def test_a_file_of_the_mix_is_looked_at_as_the_csvs_are(gates, own_finished, data, no_steps, tmp_path):
    path = written(tmp_path / "sums.jsonl", chat("How much is 1 plus 1?", "2"))
    mix = [{"config": "per_candidate", "share": 0.5}, {"data": path, "share": 0.5}]
    sources = [("per_candidate", "sha256:0", {}), (path, hash_of(path), None)]
    change(
        own_finished, "mix", mix, [dict(zip(("source", "sha256", "tuned_on"), its, strict=True)) for its in sources]
    )
    found, status = gates(own_finished, "--data_dir", data)
    assert status == 0 and found["data files"] == ("ok", "2 as the manifest has them")
    written(tmp_path / "sums.jsonl", chat("How much is 1 plus 1?", "3"))
    found, status = gates(own_finished, "--data_dir", data)
    assert status == 1 and "sums.jsonl has changed: copy the files again" in found["data files"][1]
    (tmp_path / "sums.jsonl").unlink()
    found, status = gates(own_finished, "--data_dir", data)
    assert status == 1 and "sums.jsonl is missing" in found["data files"][1]


@on_the_default_stack
@pytest.mark.parametrize("task, cap", [("per_candidate", 20), ("per_decision_ranking", 20)])
def test_records_are_counted_as_the_cap_left_them(gates, own_finished, data, no_steps, task, cap):
    keys = DataArguments(dataset_config=task, data_files=[str(data / "candidates.csv")])
    counts = {name: len(split) for name, split in load_splits(keys.backtest(), task, 0, cap).items()}
    assert counts["train"] == cap
    change(own_finished, "dataset_config", task)
    change(own_finished, "max_records_per_market", cap)
    path = own_finished / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest |= {"splits": {name: {**manifest["splits"][name], "records": count} for name, count in counts.items()}}
    path.write_text(json.dumps(manifest))
    found, status = gates(own_finished, "--data_dir", data)
    assert status == 0 and found["counts"][1].startswith(f"{task}: train {cap}, ")
    found, status = gates(own_finished, "--data_dir", data, "--max_records_per_market", cap - 1)
    assert status == 1 and f"train {cap - 1}, then {cap}" in found["counts"][1]


def change(folder, key: str, value, described=None) -> None:
    """A run as if its recipe had had this key; ``described`` is what its manifest says of it beside."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"][key] = value
    path.write_text(json.dumps(manifest | ({key: described} if described else {})))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {key: value}))


@on_the_default_stack
def test_a_file_that_was_cut_short_on_its_way_fails_and_nothing_else_is_asked(gates, own_finished):
    file = own_finished / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found, status = gates(own_finished)
    assert status == 1 and list(found) == ["run folder"]
    assert "is not the file that was saved" in found["run folder"][1] and "Copy it again" in found["run folder"][1]


@on_the_default_stack
def test_other_splits_than_those_of_the_run_fail_their_count(gates, own_finished, data, no_steps):
    found, status = gates(own_finished, "--data_dir", data, "--splits", 0.6, 0.2, 0.2)
    assert status == 1 and found["counts"][0] == "FAIL" and "train " in found["counts"][1]
    assert "Give the options it was tuned with" in found["counts"][1]


@on_the_default_stack
def test_other_libraries_and_a_base_that_is_not_here_are_unknown(gates, own_finished, data, no_steps):
    path = own_finished / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"] |= {"torch": "2.0.0", "no-such-package": "1.0"}
    manifest |= {"base_model": "nobody/no-such-model"}
    path.write_text(json.dumps(manifest))
    found, status = gates(own_finished, "--data_dir", data)
    assert found["versions"][0] == found["base"][0] == "unknown"
    assert (
        "tuned with torch 2.0.0, here 2." in found["versions"][1] and "package 1.0, here none" in found["versions"][1]
    )
    assert "There is no model nobody/no-such-model here" in found["base"][1]


@on_the_default_stack
def test_a_changed_base_fails_and_a_run_takes_no_other_recipe(gates, own_finished, data, no_steps, tmp_path):
    path = own_finished / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"base_revision": "sha256:0"}))
    found, status = gates(own_finished, "--data_dir", data)
    assert status == 1 and found["base"][0] == "FAIL" and "its weights have changed" in found["base"][1]
    with pytest.raises(SystemExit, match="--config tiny: .* is a run, and has its own recipe.yaml"):
        verify.main([str(own_finished), "--config", "tiny"])
    (own_finished / "recipe.yaml").unlink()
    found, status = gates(own_finished)
    assert found["recipe"][0] == "unknown" and "data" not in found
