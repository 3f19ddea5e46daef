"""What the tests of publishing share: a Hub on 127.0.0.1, a small corpus and a small tuned model to push to it."""

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPT
from hub_standin import WRITER, Hub
from huggingface_hub import DatasetCard, constants

from covered_call.candidates.options import CHATS
from covered_call.candidates.prompts import PROMPT_VERSION
from covered_call.candidates.records import RECORDS
from covered_call.publishing import hub as publish_hub
from covered_call.publishing import publish

REPO = SCRIPT.parent
PUBLISH = ["-m", "covered_call", "publish"]  # for a process of its own
DATA = "user/data"
CARD = """\
---
license: cc-by-4.0
pretty_name: My calls
my_key: kept
tags:
- options
---

# My calls

My own words, with a <b>tag</b> and a column | of a table.

<!-- statistics -->
old
<!-- /statistics -->

The end.
"""
# Compares a repo, or a folder, with what the script makes of the files; prints how many rows were compared.
COMPARE = """
import sys
from datasets import load_dataset
from covered_call import load_candidates
source, files, *options = sys.argv[1:]
more = dict(option.split("=") for option in options)
rows = 0
for name in more.pop("configs", "per_candidate,per_decision_ranking").split(","):
    made = load_candidates(name, data_files=files)
    read = load_dataset(source, name, **more)
    streamed = load_dataset(source, name, streaming=True, **more)
    assert list(read) == list(streamed) == list(made), (read, made)
    for split in made:
        assert read[split].features == streamed[split].features == made[split].features
        assert read[split].to_list() == list(streamed[split]) == made[split].to_list(), split
        rows += len(made[split])
default, named = (load_dataset(source, *name, **more)["train"] for name in ([], ["per_candidate"]))
assert default.features == named.features
print(rows, "rows are the same")
"""
EVERY = f"configs={','.join(RECORDS)}"


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="session")
def csv_file(corpus) -> str:
    return corpus


@pytest.fixture
def card(tmp_path) -> str:
    (tmp_path / "card.md").write_text(CARD, encoding="utf-8")
    return str(tmp_path / "card.md")


@pytest.fixture
def data(csv_file, card) -> list[str]:
    """The options that name a small corpus, its card and, to be quick, the configs that hold chats."""
    return ["--data_files", csv_file, "--card", card, "--configs", *CHATS]


def run(words, environment: dict, cwd: Path, python: str = sys.executable) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(cwd / "hf_home"), "PYTHONPATH": str(REPO)}
    env |= {"USE_TORCH": "0"} | environment  # which datasets would import to no end, in seconds
    return subprocess.run([python, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture
def command(hub, monkeypatch):
    """The verb in this process against the stand-in, with what its environment would tell the Hub's client."""

    def performed(*words, token=WRITER, patience=1, **environment) -> str:
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(constants, "ENDPOINT", environment.get("HF_ENDPOINT", hub.endpoint))
            patch.setattr(constants, "HF_HUB_OFFLINE", environment.get("HF_HUB_OFFLINE") == "1")
            patch.setattr(publish_hub, "PATIENCE", patience)
            patch.setenv("HF_TOKEN", token) if token else patch.delenv("HF_TOKEN", raising=False)
            local(*words)
        return printed.getvalue()

    return performed


@pytest.fixture
def push(command):
    """The verb against the stand-in, where it must succeed: returns what it printed."""
    return command


@pytest.fixture
def refused(command):
    """The verb against the stand-in, where it must fail: returns the one line that says why."""

    def refusal(*words, **options) -> str:
        with pytest.raises(SystemExit) as stopped:
            command(*words, **options)
        said = str(stopped.value)
        assert said.startswith("error: ") and said.isprintable()
        return said

    return refusal


@pytest.fixture
def compare(hub, tmp_path):
    """Reads a repo or folder back in a process of its own, which must find the script's rows and features."""

    def compared(source, files, *options, python=sys.executable, home="reader") -> int:
        words = ["-c", COMPARE, source, files, *options]
        done = run(words, hub.environment(tmp_path / home), tmp_path, python)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[0])

    return compared


def local(*words) -> None:
    """The verb in this process, where HF_HUB_OFFLINE is set."""
    publish.main(list(map(str, words)))


def error_of(*words) -> str:
    with pytest.raises(SystemExit) as stopped:
        local(*words)
    return str(stopped.value)


def filled(capsys, *words, kind=DatasetCard):
    """The card as a dry run prints it."""
    local(*words, "--dry-run")
    return kind("---\n" + capsys.readouterr().out.split("\n---\n", 1)[1])


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


LIKE_A_TOKEN = "hf_" + "aB3" * 11 + "x"
MANIFEST = {
    "finished": "2026-11-21T00:00:00+00:00",
    "prompt_version": PROMPT_VERSION,
    "task": "per_decision_ranking",
    "base_model": "microsoft/Phi-3-mini-4k-instruct",
    "base_revision": "f39ac1d28e925b323eae81227eaba4464caced4e",
    "quantization": "int4",
    "adapter": True,
    "recipe": {"model_name_or_path": "microsoft/Phi-3-mini-4k-instruct", "data_files": None},
    "splits": {"train": {"to": "2024-07-08T00:00:00+00:00"}},
    "tuned_on": {"underlyings": ["BTC"], "exit_styles": ["tp_and_roll"], "numbers": {}},
}
MODEL_CARD = """\
---
base_model: microsoft/Phi-3-mini-4k-instruct
library_name: peft
---

# ranking

Use it:

<!-- loading -->
here
<!-- /loading -->

Limits: it copies a rule.
"""


def describe(folder: Path, **changes) -> None:
    """Writes the manifest, with the hashes of the files that are there."""
    saved = [
        path for path in folder.glob("*") if re.search("^(adapter_|model|tokenizer)", path.name) and path.is_file()
    ]
    files = {path.name: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in saved}
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | {"files": files} | changes))


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder as training leaves it."""
    folder = tmp_path / "ranking"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "runs").mkdir()
    names = ("adapter_model.safetensors", "checkpoint-5/optimizer.pt", "runs/events", "x.tmp")
    for name in names:
        (folder / name).write_bytes(name.encode())
    (folder / "adapter_config.json").write_text(json.dumps({"r": 16}))
    describe(folder)
    (folder / "README.md").write_text(MODEL_CARD)
    return folder
