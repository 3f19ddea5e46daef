"""What a training refuses before it imports torch or reads data, and what it says of the Hub and of disks."""

import errno
import json
import os
import re
import socket
import threading
import urllib.request

import pytest
from conftest import SCRIPT, decision, python, write_csv
from huggingface_hub import constants

from covered_call import tuning
from covered_call.candidates.prompts import PROMPT_VERSION
from covered_call.command_line import disk_trouble
from covered_call.training import first_checks
from covered_call.training.first_checks import STAGES

from .conftest import recipe

MODEL = "microsoft/Phi-3-mini-4k-instruct"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a CSV, and no cache of the Hub."""
    write_csv(tmp_path / "runs.csv", decision(0, sold=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def refusal(monkeypatch, *words, stage="sft") -> str | None:
    """What the first checks say of a command line; None if it may go on."""
    monkeypatch.setattr(tuning, "tune_and_share", lambda *_: None)
    config = ["--config", STAGES[stage].recipes[-1]] if "--config" not in words else []
    try:
        tuning.in_one_line(stage, [*config, *map(str, words)])
    except SystemExit as exit:
        return exit.code
    return None


def run_in(folder, **manifest) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"prompt_version": PROMPT_VERSION, "finished": None} | manifest))


def test_a_command_that_may_work_goes_on(monkeypatch):
    assert refusal(monkeypatch) is None
    assert refusal(monkeypatch, "--data_files", "runs.csv", "--purge", "--output-dir=new", "--lora_rr", "x") is None
    assert refusal(monkeypatch, "--help") is None
    assert refusal(monkeypatch, stage="dpo") is None


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--config", "tinny"],
            "--config tinny: neither a file nor one of per_candidate, ranking, mixed, tiny_mixed, tiny",
        ),
        (["--config", "runs.csv"], "runs.csv holds no keys"),
        (["--quantization", "int5"], "quantization: 'int5' is none of int4, int8, none"),
        (["--lora_r", "0"], "lora_r: 0 trains all weights, which int4 freezes"),
        (["--lora_r", "four"], "argument --lora_r/--lora-r: invalid int value: 'four'"),
        (["--balance", "up"], "balance: 'up' is none of none, downsample, weight"),
        (["--validation_from", "2024-01-01"], "validation_from and test_from go together"),
        (["--splits", "0.5", "0.1", "0.1"], r"--splits 0\.5 0\.1 0\.1: give three fractions"),
        (["--duplicates", "later"], "--duplicates later: choose one of error, latest"),
        (["--data_files", "none/*.csv"], r"No file matches \S+none/\*\.csv"),
        (["--data_dir", "none"], "No file matches"),
        (["--model_name_or_path", "/nope", "--tiny_base_steps", "0"], "There is no folder /nope, and no model on the"),
        (["--model_name_or_path", ".", "--tiny_base_steps", "0"], r"\. holds no config\.json"),
        (["--model_name_or_path", MODEL, "--tiny_base_steps", "0"], f"There is no model {MODEL} here, .* hf download"),
        (["--output_dir", "runs.csv"], "runs.csv is no run of covered-call train and not empty"),
        (["--output_dir", "."], "is no run of covered-call train and not empty"),
        (["--push_to_hub"], "push_to_hub: the Hub does not answer, or HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_work_is_refused_at_once_in_one_line(words, message, monkeypatch):
    said = refusal(monkeypatch, *words)
    assert re.match(f"error: .*{message}", said) and "\n" not in said


def test_a_recipe_that_is_no_yaml_is_one_line_with_the_place(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("output_dir: 5\n")
    assert "model_name_or_path is missing: give it in mine.yaml, or on" in refusal(
        monkeypatch, "--config", "mine.yaml"
    )
    recipe(tmp_path / "mine.yaml", output_dir=5, data_files=5)
    assert re.match("error: .*data_files", refusal(monkeypatch, "--config", "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("lora_r: 4\nseed: [0\n")
    said = refusal(monkeypatch, "--config", "mine.yaml")
    assert said.startswith("error: mine.yaml is no YAML: ") and "line 3" in said and "\n" not in said


def test_a_finished_run_is_refused_unless_it_is_to_be_overwritten_or_only_checked(tmp_path, monkeypatch):
    run_in(tmp_path / "done", finished="2026-01-01")
    assert "done holds a run that finished on 2026-01-01" in refusal(monkeypatch, "--output_dir", "done")
    assert refusal(monkeypatch, "--output_dir", "done", "--overwrite_output_dir") is None
    assert refusal(monkeypatch, "--output_dir", "done", "--dry_run") is None
    assert refusal(monkeypatch, "--output_dir", "done", "--dry_run", "false").startswith("error: ")
    run_in(tmp_path / "begun")
    assert refusal(monkeypatch, "--output_dir", "begun") is None


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written: give another output_dir" in refusal(monkeypatch, "--output_dir", "some/where")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--adapter", "nowhere"], "There is no folder nowhere"),
        (["--adapter", "."], "holds no manifest.json"),
        (["--adapter", "begun"], "The run in begun has not finished"),
        (["--adapter", "", "--model_name_or_path", ""], "Nothing to start from"),
        (["--candidate_order", "shuffle"], "candidate_order: shuffle is for covered-call train"),
        (["--lora_r", "0", "--quantization", "none"], "only an adapter is trained"),
        (["--fee", "2"], "--fee 2.0: give a number from 0 to 1"),
        (["--min_edge_pct", "200"], "--min_edge_pct 200.0: give a number from 0 to 100"),
        (["--rejected", "best"], "--rejected best: choose one of teacher, worst"),
    ],
)
def test_what_a_preference_training_cannot_start_from_is_refused_at_once(words, message, tmp_path, monkeypatch):
    run_in(tmp_path / "begun")
    assert message in refusal(monkeypatch, *words, stage="dpo")


# --- The Hub


@pytest.fixture
def silent_hub(monkeypatch):
    """A server that takes a connection and says nothing."""
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(first_checks, "DEADLINE", 0.2)
    yield
    server.close()


PHI3 = ["--model_name_or_path", MODEL, "--tiny_base_steps", "0", "--dry_run"]


def test_a_hub_that_does_not_answer_is_asked_once_and_not_again(silent_hub, monkeypatch, capsys, caplog):
    said = refusal(monkeypatch, *PHI3)
    assert said.startswith(f"error: There is no model {MODEL} here, nor can it be downloaded.")
    assert not caplog.messages and not capsys.readouterr().err
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"  # no library asks it either


def test_a_model_in_the_cache_is_taken_where_the_hub_does_not_answer(silent_hub, tmp_path, monkeypatch, caplog):
    snapshot = tmp_path / "hub" / "models--microsoft--Phi-3-mini-4k-instruct" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    assert refusal(monkeypatch, *PHI3) is None
    assert [message.split(": ")[-1] for message in caplog.messages] == ["going on with what is in the cache."]
    assert refusal(monkeypatch, *PHI3, "--dry_run", "false").startswith("error: There is no model")  # its weights
    (snapshot / "model.safetensors").touch()
    assert refusal(monkeypatch, *PHI3, "--dry_run", "false") is None


def test_looking_up_the_hubs_name_has_a_deadline_too(silent_hub, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: done.wait(5) and socket.socket())
    assert not first_checks.is_reachable() and not done.is_set()
    done.set()


@pytest.mark.parametrize("address", ["nowhere", "http://127.0.0.1:1", "https://[::1"])
def test_an_address_of_no_hub_is_no_answer(address, capsys):
    assert not first_checks.answers(address) and not capsys.readouterr().err


def test_a_hub_that_answers_anything_is_there_and_a_push_needs_a_login(silent_hub, monkeypatch):
    monkeypatch.setattr(first_checks, "answers", lambda address: True)
    monkeypatch.setattr(first_checks, "get_token", lambda: None)
    assert refusal(monkeypatch, *PHI3) is None
    assert "push_to_hub: you are not logged in" in refusal(monkeypatch, "--push_to_hub")
    assert refusal(monkeypatch, "--push_to_hub", "--hub_token", "x") is None


def test_what_the_hubs_client_says_is_printed_once(tmp_path):
    code = "from covered_call import command_line; import huggingface_hub.utils.logging as hub; "
    code += "command_line.start_logging(); hub.get_logger('huggingface_hub.utils').warning('Retrying')"
    assert python("-c", code, cwd=tmp_path, PYTHONPATH=str(SCRIPT.parent)).stderr == "Retrying\n"


def test_make_run_hides_no_warnings():
    assert "-W" not in (SCRIPT.parent / "Makefile").read_text(encoding="utf-8")


# --- Nothing heavy before

LIGHT = """
import sys
from covered_call.__main__ import main
try:
    main()
except SystemExit as exit:
    print(exit.code)
print(sorted({"torch", "transformers", "trl", "peft", "accelerate", "matplotlib", "sklearn"} & set(sys.modules)))
"""


@pytest.mark.parametrize("verb, config", [("train", "tiny"), ("prefer", "tiny_dpo")])
def test_a_finished_run_is_refused_before_anything_heavy_is_imported(verb, config, tmp_path):
    run_in(tmp_path / "done", finished="2026-01-01")
    done = python("-c", LIGHT, verb, "--config", config, "--output_dir", "done", cwd=tmp_path)
    said, heavy = done.stdout.splitlines()
    assert "holds a run that finished" in said and heavy == "[]" and not done.stderr


# --- Disks


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "out/x: No space left on device. Is the folder"),
        (PermissionError(errno.EACCES, "Permission denied", "/root"), "/root: Permission denied. Is the folder"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"), "could not be written"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "could not be written"),
    ],
)
def test_a_full_disk_is_told_from_a_bug_also_where_a_library_wraps_it(error, message):
    assert message in disk_trouble(error)
    try:
        raise ValueError("An error occurred while generating the dataset") from error
    except ValueError as wrapped:
        assert message in disk_trouble(wrapped)
    assert disk_trouble(ValueError("a bug")) is None
