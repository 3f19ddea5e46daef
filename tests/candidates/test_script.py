"""The generated loading script: current, alone, in two versions side by side, in other processes."""

import pickle
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT, decision, import_script, python, runs_scripts, write_csv

from covered_call import CandidatesError, load_candidates
from covered_call.candidates.script import script

ROOM = ROOT / "covered_call" / "candidates"
LOAD = """
from datasets import load_dataset
options = {{"trust_remote_code": True, "data_files": {files!r}, "splits": "train"}}
loaded = load_dataset({script!r}, "per_decision_ranking", **options, {more})["train"]
for record in loaded:
    print(record["messages"][1]["content"].splitlines()[1], record["label"])
"""
WORK = """
import multiprocessing
from datasets import load_dataset

def labels(streamed):
    return [record["label"] for record in streamed]

if __name__ == "__main__":
    options = {{"trust_remote_code": True, "data_files": {files!r}, "splits": "train", "streaming": True}}
    streamed = load_dataset({script!r}, "per_decision_ranking", **options)["train"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.apply(labels, [streamed]), sep=chr(10))
"""


def run(cwd: Path, script: Path | str, files: str, more: str = "", path: str = "") -> list[str]:
    """What a process of its own loads from a script: the second line of each prompt, with its answer."""
    code = LOAD.format(script=str(script), files=files, more=more)
    ran = python("-c", code, cwd=cwd, PYTHONPATH=path)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.fixture
def files(tmp_path) -> str:
    return write_csv(tmp_path / "a.csv", [one for day in range(6) for one in decision(day, day % 3)])


def checkout(folder: Path, title: str) -> Path:
    """The room and its script in a folder of their own, with another title in the prompts."""
    room = folder / "covered_call" / "candidates"
    shutil.copytree(ROOM, room)
    prompts = room / "prompts.py"
    prompts.write_text(prompts.read_text(encoding="utf-8").replace("Underlying: ", title), encoding="utf-8")
    (folder / SCRIPT.name).write_text(script(room), encoding="utf-8")
    return folder / SCRIPT.name


ROWS = ["Underlying: BTC 1", "Underlying: BTC 2", "Underlying: BTC 3"] * 2


def test_the_script_is_current():
    assert SCRIPT.read_text(encoding="utf-8") == script(), "run `make script`"


def test_two_modules_with_one_name_are_not_made_into_a_script(tmp_path):
    room = tmp_path / "candidates"
    shutil.copytree(ROOM, room)
    with open(room / "splits.py", "a", encoding="utf-8") as file:
        file.write("\n\ndef money(value):\n    return value\n")
    with pytest.raises(ValueError, match="number_texts.py and splits.py both define money"):
        script(room)


def test_nothing_in_the_package_imports_the_script():
    for path in (ROOT / "covered_call").rglob("*.py"):
        assert "import covered_call_candidates" not in path.read_text(encoding="utf-8")
        assert "from covered_call_candidates" not in path.read_text(encoding="utf-8")


def test_a_script_older_than_the_modules_beside_it_says_make_script(tmp_path, files):
    path = checkout(tmp_path / "repo", "Underlying: ")
    old = import_script(path)
    assert old.load_candidates("per_candidate", data_files=files, splits="train", cache_dir=str(tmp_path / "arrow"))
    edited = tmp_path / "repo" / "covered_call" / "candidates" / "prompts.py"
    edited.write_text(edited.read_text(encoding="utf-8").replace("Underlying: ", "Asset: "), encoding="utf-8")
    with pytest.raises(old.CandidatesError, match="older than .*run `make script`"):
        old.load_candidates("per_candidate", data_files=files, splits="train", cache_dir=str(tmp_path / "arrow"))


def test_the_script_and_the_package_make_the_same_rows(tmp_path, files):
    for name in ("per_candidate", "per_decision_ranking", "preference", "q_values"):
        options = {"data_files": files, "splits": "train", "horizon": 1.0, "min_edge_pct": 0.0}
        if name != "preference":
            del options["min_edge_pct"]
        theirs = import_script(SCRIPT).load_candidates(name, cache_dir=str(tmp_path / "theirs"), **options)
        ours = load_candidates(name, cache_dir=str(tmp_path / "ours"), **options)
        assert ours["train"].to_list() == theirs["train"].to_list()
        assert ours["train"].features == theirs["train"].features


@runs_scripts
@pytest.mark.parametrize("more", ["", "num_proc=2", "streaming=True"])
def test_a_script_alone_in_an_empty_folder_loads(tmp_path, files, more):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(SCRIPT, alone)
    assert run(alone, f"./{SCRIPT.name}", files, more) == ROWS


@runs_scripts
def test_two_checkouts_that_differ_each_render_their_own_prompts(tmp_path, files):
    for title in ("Asset: ", "Coin: "):
        path = checkout(tmp_path / title[0], title)
        assert run(tmp_path, path, files) == [row.replace("Underlying: ", title) for row in ROWS]
    # The package of this checkout is importable, and still each runs its own.
    assert run(tmp_path, tmp_path / "A" / SCRIPT.name, files, path=str(ROOT))[0] == "Asset: BTC 1"


@runs_scripts
def test_a_prompt_that_is_edited_in_one_process_is_rendered_anew(tmp_path, files):
    import datasets

    shown = []
    for title in ("Asset: ", "Coin: "):
        shutil.rmtree(tmp_path / "repo", ignore_errors=True)
        path = checkout(tmp_path / "repo", title)
        options = {"data_files": files, "splits": "train", "cache_dir": str(tmp_path / "arrow")}
        loaded = datasets.load_dataset(str(path), "per_decision_ranking", trust_remote_code=True, **options)
        shown.append(loaded["train"][0]["messages"][1]["content"].splitlines()[1])
    assert shown == ["Asset: BTC", "Coin: BTC"]


@runs_scripts
def test_a_worker_process_unpickles_what_it_is_to_render(tmp_path, files):
    """As a data loader's workers do, with the decisions of the script's own classes."""
    (tmp_path / "main.py").write_text(WORK.format(script=str(SCRIPT), files=files), encoding="utf-8")
    ran = python(tmp_path / "main.py", cwd=tmp_path, PYTHONPATH="")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["1", "2", "3"] * 2


def test_decisions_of_the_package_are_pickled(files):
    from covered_call.candidates.builder import Backtest
    from covered_call.candidates.options import CoveredCallCandidatesConfig

    logged = Backtest([files], CoveredCallCandidatesConfig()).logged
    assert pickle.loads(pickle.dumps(logged)) == logged


def test_an_error_of_the_script_is_the_scripts_own():
    module = import_script(SCRIPT)
    with pytest.raises(module.CandidatesError):
        module.load_candidates("no_such_config")
    with pytest.raises(CandidatesError):
        load_candidates("no_such_config")
