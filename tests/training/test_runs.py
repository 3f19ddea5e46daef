"""The folder of a run: who writes it, what it goes on from, and what of it can be trusted."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import on_the_default_stack

from covered_call import atomic
from covered_call.candidates.prompts import PROMPT_VERSION
from covered_call.language_model.manifest import PolicyError, hash_of, read_manifest, read_temperature
from covered_call.training import runs
from covered_call.training.runs import RecipeError, begun_run, held, of_the_run, open_run

pytestmark = on_the_default_stack

MANIFEST = {
    "task": "per_candidate", "base_model": "a/b", "base_revision": "0", "quantization": "int4", "adapter": True,
    "recipe": {"learning_rate": 0.1}, "splits": {"train": {"to": "2024-10-01T00:00:00+00:00"}},
    "tuned_on": {"underlyings": ["BTC"], "exit_styles": ["tp_and_roll"], "numbers": {}},
    "prompt_version": PROMPT_VERSION, "finished": "2026-11-21T00:00:00+00:00",
}  # fmt: skip


@pytest.fixture
def saved(tmp_path) -> Path:
    """A finished run's folder, with one file of weights."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    files = {"adapter_model.safetensors": hash_of(tmp_path / "adapter_model.safetensors")}
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"files": files}))
    return tmp_path


# --- What is of a run


def test_how_a_run_is_shared_is_not_of_it():
    keys = {"learning_rate": 0.1, "hub_token": "hf_x", "hub_model_id": "a/b", "push_to_hub": True, "output_dir": "out"}
    assert of_the_run(keys) == {"learning_rate": 0.1}
    assert of_the_run({"recipe": keys, "task": "x"}) == {"recipe": {"learning_rate": 0.1}, "task": "x"}


def test_no_token_is_shown_where_a_run_is_refused(tmp_path):
    """Of a manifest that an older version wrote, too."""
    old = MANIFEST | {"finished": None, "recipe": {"learning_rate": 0.1, "hub_token": "hf_old"}}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    now = MANIFEST | {"finished": None, "recipe": {"learning_rate": 0.2, "hub_token": "hf_new"}}
    with pytest.raises(RecipeError, match="learning_rate: 0.1, now 0.2") as error:
        open_run(tmp_path, now, overwrite=False)
    assert "hf_" not in str(error.value)
    now["recipe"]["learning_rate"] = 0.1
    assert open_run(tmp_path, now, overwrite=False) is None  # another token is the same run


# --- One writer a folder


def hold(folder: Path) -> subprocess.Popen:
    """Another process that holds the folder until it is killed."""
    code = "import sys, time; from covered_call import atomic\n"
    code += "with atomic.locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    other = hold(tmp_path / "out")
    try:
        with pytest.raises(atomic.FolderBusy, match=f"out is being written by process {other.pid}, .*another folder"):
            with held(tmp_path / "out", True):
                pytest.fail("it went on")
        (tmp_path / "link").symlink_to(tmp_path / "out")
        with pytest.raises(atomic.FolderBusy), held(tmp_path / "link", True):
            pytest.fail("it went on")
        with held(tmp_path / "out", False):  # of several processes of one run, the first holds it for all
            pass
    finally:
        other.kill()
        other.wait()
    with held(tmp_path / "out", True):  # what a killed run held is taken over
        pass


def test_a_lock_that_names_nobody_is_of_a_process_killed_while_it_made_it(tmp_path):
    (tmp_path / ".out.lock").touch()
    with held(tmp_path / "out", True):
        assert (tmp_path / ".out.lock").stat().st_size
    assert not (tmp_path / ".out.lock").exists()


# --- Killed at any moment


def test_a_run_killed_before_its_manifest_was_whole_can_begin_again(tmp_path):
    (tmp_path / f".manifest.json.{os.getpid()}.tmp").write_text('{"fini')
    assert begun_run(tmp_path) is None
    assert open_run(tmp_path, MANIFEST | {"finished": None}, overwrite=True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_run_killed_while_the_one_before_is_deleted_can_begin_again(tmp_path):
    """Whenever it is killed, the folder is an old run's, a new one's, or nothing; what was being deleted goes, too."""
    folder, manifest = tmp_path / "out", MANIFEST | {"finished": None}
    for attempt in range(4):
        open_run(folder, manifest | {"attempt": attempt}, overwrite=True)
        for number in range(800):
            (folder / f"file-{number}").touch()
        process = multiprocessing.get_context("fork").Process(target=open_run, args=(folder, manifest, True))
        process.start()
        time.sleep(attempt * 0.005)
        process.kill()
        process.join()
        assert begun_run(folder) is None or "finished" in begun_run(folder)
    open_run(folder, manifest, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_what_a_link_leads_to_is_overwritten_and_the_link_stays(tmp_path):
    manifest = MANIFEST | {"finished": None}
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large_disk")
    open_run(tmp_path / "out", manifest, overwrite=False)
    (tmp_path / "out" / "old").touch()
    open_run(tmp_path / "out", manifest, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("text", ["[]", "5", '{"prompt_version": 1}', "\udcff", "", None])
def test_a_folder_whose_manifest_is_another_programs_is_no_run(tmp_path, text):
    (tmp_path / "data.csv").touch()
    if text is not None:
        (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeError, match="is no run of covered-call train and not empty"):
        begun_run(tmp_path)


def test_a_checkpoint_by_another_name_is_left_alone(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert runs.last_checkpoint(tmp_path) is None
    assert (tmp_path / "checkpoint-best").is_dir()


# --- Begun, gone on with, and refused


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_st'), (11, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert runs.last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]


def begun(tmp_path, **changes) -> dict:
    manifest = {"prompt_version": "1", "recipe": {"learning_rate": 0.1}, "versions": {"trl": "1"}, "finished": None}
    open_run(tmp_path / "out", manifest, overwrite=False)
    return manifest | changes


def test_a_run_that_was_begun_is_gone_on_with(tmp_path):
    manifest = begun(tmp_path)
    assert open_run(tmp_path / "out", manifest, overwrite=False) is None
    (tmp_path / "out" / "checkpoint-5").mkdir()
    (tmp_path / "out" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    assert open_run(tmp_path / "out", manifest, overwrite=False).name == "checkpoint-5"
    assert open_run(tmp_path / "out", manifest, overwrite=True) is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_another_run_in_the_same_folder_is_refused_with_what_differs(tmp_path):
    manifest = begun(tmp_path, recipe={"learning_rate": 0.2})
    with pytest.raises(RecipeError, match=r"another run .*\(recipe.learning_rate: 0.1, now 0.2\).*same command"):
        open_run(tmp_path / "out", manifest, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name, text",
    [("thesis.tex", "years of work"), ("manifest.json", '{"name": "a web page"}'), ("manifest.json", "-")],
)
def test_a_folder_of_something_else_is_never_touched(tmp_path, overwrite, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match="no run of covered-call train and not empty"):
        open_run(tmp_path, {"finished": None}, overwrite)
    assert (tmp_path / name).read_text() == text


def test_a_folder_that_is_no_finished_run_is_not_loaded(tmp_path):
    with pytest.raises(PolicyError, match="holds no manifest.json"):
        read_manifest(tmp_path)
    begun(tmp_path)
    with pytest.raises(PolicyError, match="has not finished"):
        read_manifest(tmp_path / "out")


# --- What a finished run saved


def test_a_saved_run_is_read(saved):
    assert read_manifest(saved)["task"] == "per_candidate"


@pytest.mark.parametrize("content", [None, b"", b"weigh", b"weightz"])
def test_a_file_that_is_not_as_it_was_saved_is_named(saved, content):
    weights = saved / "adapter_model.safetensors"
    weights.unlink() if content is None else weights.write_bytes(content)
    with pytest.raises(PolicyError, match="adapter_model.safetensors.*Copy it again, or tune"):
        read_manifest(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\udcff", "{}", '{"finished": "x"}'])
def test_a_manifest_that_is_none_is_one_plain_error(saved, text):
    (saved / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PolicyError, match="manifest.json (cannot be read|holds no JSON object|is none that)"):
        read_manifest(saved)


@pytest.mark.parametrize("key", ["task", "adapter", "quantization", "recipe", "splits", "tuned_on", "base_model"])
@pytest.mark.parametrize("value", ["lacks", None, 5, []])
def test_a_manifest_that_lacks_a_key_or_says_it_in_another_form_is_named_with_it(saved, key, value):
    manifest = json.loads((saved / "manifest.json").read_text()) | {key: value}
    if value == "lacks":
        del manifest[key]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PolicyError, match=rf"manifest.json: {key}\S* is .*tune the model again"):
        read_manifest(saved)


def test_a_run_of_an_older_version_is_refused_with_what_to_do(saved):
    (saved / "manifest.json").write_text(json.dumps(MANIFEST))
    with pytest.raises(PolicyError, match="saved by an older version, without hashes of its files: tune it again"):
        read_manifest(saved)


def test_a_folder_that_is_not_there_is_said_not_to_be(tmp_path):
    with pytest.raises(PolicyError, match="There is no folder .*none: give one"):
        read_manifest(tmp_path / "none")


@pytest.mark.parametrize("said", ["-1", "0", "NaN", "Infinity", "1e9", '"1"', "true", "null", "[]", "", "1}}"])
def test_a_temperature_that_no_calibration_gives_is_refused(tmp_path, said):
    (tmp_path / "calibration.json").write_text(f'{{"temperature": {said}}}')
    with pytest.raises(PolicyError, match="calibration.json"):
        read_temperature(tmp_path)


def test_a_temperature_is_read_and_is_1_without_a_calibration(tmp_path):
    assert read_temperature(tmp_path) == 1.0
    (tmp_path / "calibration.json").write_text('{"temperature": 2}')
    assert read_temperature(tmp_path) == 2
