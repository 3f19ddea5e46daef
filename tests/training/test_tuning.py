"""The verbs train and prefer: errors in one line, one writer a folder, and the push after a training."""

import errno

import pytest
import torch
from conftest import SCRIPT, python, unasked
from hub_standin import READER as READER_TOKEN
from hub_standin import WRITER as WRITER_TOKEN
from hub_standin import Hub

from covered_call import atomic, tuning
from covered_call.candidates.schema import CandidatesError
from covered_call.training import sft
from covered_call.training.trainers import ScoringTrainer

from .conftest import OFTEN


def test_an_error_is_one_line_and_a_bad_exit(tmp_path):
    done = python(SCRIPT.parent / "train_sft.py", "--config", "tiny", "--data_files", "none/*.csv", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: No file matches")
    assert "Traceback" not in done.stderr


def test_an_error_of_preferences_is_one_line_and_a_bad_exit():
    with pytest.raises(SystemExit, match="^error: There is no folder nowhere"):
        tuning.prefer(["--config", "tiny_dpo", "--adapter", "nowhere"])


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "error: out/x: No space left on device. Is the "),
        (CandidatesError('Give duplicates="latest".'), "^error: Give --duplicates latest."),  # as it is typed
    ],
)
def test_trouble_ends_in_one_line_of_the_command_lines_words(error, message, monkeypatch):
    def command(*_):
        raise error

    monkeypatch.setattr(tuning, "run", command)
    with pytest.raises(SystemExit, match=message):
        tuning.train([])


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(tuning, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuning.train([])


def test_a_memory_that_is_full_in_a_step_is_a_plain_error(words, monkeypatch):
    def training_step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ScoringTrainer, "training_step", training_step)
    with pytest.raises(SystemExit, match="the GPU's memory is full: give --per_device_train_batch_size 1"):
        tuning.train(words)


def test_a_folder_that_another_run_writes_is_refused_before_anything_is_read(words, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load", lambda *_: pytest.fail("it went on"))
    with atomic.locked(tmp_path / "out"), pytest.raises(SystemExit, match="error: .*out is being written by process"):
        tuning.train(words)


def test_a_push_that_could_not_work_stops_before_the_training(words, tmp_path):
    done = python(SCRIPT.parent / "train_sft.py", *words, "--push_to_hub", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: push_to_hub: the Hub does not")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_push_to_hub_shares_the_finished_run_privately_in_one_commit(words, tmp_path):
    with Hub() as hub:
        environment = {"HF_HUB_OFFLINE": "0", **hub.environment(tmp_path / "hf_home", READER_TOKEN)}
        words = [
            *words,
            *OFTEN,
            "--learning_rate",
            "0.01",
            "--report_to",
            "tensorboard",
            "--push_to_hub",
            "--hub_token",
            WRITER_TOKEN,
        ]
        done = python(SCRIPT.parent / "train_sft.py", *words, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert not unasked(done.stderr)
        refused = python(SCRIPT.parent / "train_sft.py", *words, cwd=tmp_path, **environment)
        assert "holds a run that finished" in refused.stderr
        assert len(hub.commits("user/out")) == 1 and hub.repos["user/out"].private
        pushed = hub.files("user/out")
    assert {"adapter_model.safetensors", "manifest.json", "recipe.yaml", "calibration.json"} < set(pushed)
    assert pushed["adapter_model.safetensors"] == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert 'Policy.load(snapshot_download("user/out"))' in card and "| validation |" in card
    # No token, neither the one given nor that of the environment, is in any file or line of the run.
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "trainer_state.json", "manifest.json"} < {path.name for path in written}
    assert any("tfevents" in path.name for path in written)
    said = (done.stdout + done.stderr + refused.stdout + refused.stderr).encode()
    for content in (said, *pushed.values(), *(path.read_bytes() for path in written)):
        assert WRITER_TOKEN.encode() not in content and READER_TOKEN.encode() not in content
