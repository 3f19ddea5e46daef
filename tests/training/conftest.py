"""What the tests of training share: quick command lines on small corpora, tiny random bases, and a few finished runs.

The corpora, the bases and the finished runs are made once a session: no test changes them.
"""

import json
import multiprocessing
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import decision, write_csv
from safetensors.torch import load_file

from covered_call import tuning
from covered_call.candidates.builder import load_candidates
from covered_call.language_model.tiny_phi3 import random_phi3, train_tokenizer
from covered_call.training import first_checks
from covered_call.training.preference_trainer import PreferenceTrainer
from covered_call.training.recipe import SFT, parse_recipe
from covered_call.training.trainers import AnswerTrainer

# What a user types, made quick: few steps, nothing logged, no checkpoints.
SHORT = ["--max_steps", "3", "--logging_steps", "1", "--report_to", "none"]
QUICK = ["--tiny_base_steps", "4", "--balance", "none", *SHORT]
QUICK_PAIRS = ["--learning_rate", "5e-4", "--warmup_steps", "0", *SHORT]
NO_CHECKPOINTS = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
OFTEN = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
OFTEN += ["--load_best_model_at_end", "true"]


def paths(base, csv_file, folder) -> list[str]:
    return ["--model_name_or_path", str(base), "--data_files", str(csv_file), "--output_dir", str(folder)]


def parse(*arguments, script=SFT):
    return parse_recipe(list(map(str, arguments)), script)[:3]


def recipe(path: Path, **changes) -> Path:
    """The tiny recipe with some keys changed, as a file of its own."""
    keys = yaml.safe_load((first_checks.RECIPES / "tiny.yaml").read_text())
    path.write_text(yaml.safe_dump(keys | changes))
    return path


def trainer_of(monkeypatch, stage: str, *words):
    """The trainer of a stage, as the command makes it, not yet trained."""
    made = []
    kind = {"sft": AnswerTrainer, "dpo": PreferenceTrainer}[stage]
    monkeypatch.setattr(kind, "train", lambda self, **_: made.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        tuning.run(stage, list(map(str, words)))
    monkeypatch.undo()
    return made[0]


def batch_of(trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def adapter(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def killed(stage: str, words: list[str], written: Path) -> None:
    """Runs a training in a process of its own, which is killed once a file is written."""
    run = multiprocessing.get_context("fork").Process(target=tuning.run, args=(stage, words))
    run.start()
    while not written.exists():
        assert run.is_alive(), "the run ended before it could be killed"
        time.sleep(0.02)
    run.kill()
    run.join()


# --- Answers


@pytest.fixture
def words(corpus_base, corpus, tmp_path) -> list[str]:
    """The command line of a quick run on the random base."""
    return ["--config", "tiny", *QUICK, *NO_CHECKPOINTS, *paths(corpus_base, corpus, tmp_path / "out")]


@pytest.fixture(scope="session")
def finished(corpus_base, corpus, tmp_path_factory) -> Path:
    """The folder of a quick run that has finished."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    more = ["--learning_rate", "0.001"]
    tuning.run("sft", ["--config", "tiny", *QUICK, *NO_CHECKPOINTS, *paths(corpus_base, corpus, folder), *more])
    return folder


@pytest.fixture
def own_finished(finished, tmp_path) -> Path:
    """A copy of it, in the place where ``words`` writes."""
    return shutil.copytree(finished, tmp_path / "out")


# --- Pairs


@pytest.fixture(scope="session")
def pair_corpus(tmp_path_factory) -> str:
    """A price that jumps up and down each day: it pays to sell at the top, and the teacher sells at the bottom."""
    rows = []
    for day in range(80):
        low = day % 2 == 0
        market = {"dte": 1.0, "spot": 58000.0 if low else 66000.0, "exit_style": "hold_to_expiry"}
        rows += decision(day, sold=0 if low else None, **market, pnl_vs_hodl=-4000.0 if low else 0.0)
    return write_csv(tmp_path_factory.mktemp("pairs") / "candidates.csv", rows)


@pytest.fixture(scope="session")
def pair_base(pair_corpus, tmp_path_factory) -> Path:
    """The folder of a tiny random Phi-3 with a tokenizer of these prompts."""
    home = tmp_path_factory.mktemp("models")
    train = load_candidates("per_decision_ranking", data_files=pair_corpus, cache_dir=str(home / "arrow"))["train"]
    tokenizer = train_tokenizer(message["content"] for chat in train["messages"] for message in chat)
    random_phi3(tokenizer, seed=0).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    return home / "base"


def fine_tune(base, csv_file, folder, *more) -> Path:
    """A fine-tune to start from, after a few large steps."""
    task = ["--dataset_config", "per_decision_ranking", "--balance", "none", "--learning_rate", "0.01"]
    words = ["--config", "tiny", "--warmup_steps", "0", *SHORT, *NO_CHECKPOINTS, *paths(base, csv_file, folder)]
    tuning.run("sft", [*words, *task, *more])
    return folder


@pytest.fixture(scope="session")
def start(pair_base, pair_corpus, tmp_path_factory) -> Path:
    return fine_tune(pair_base, pair_corpus, tmp_path_factory.mktemp("start") / "start")


def pair_run(base, csv_file, folder) -> list[str]:
    """The command line of a quick run on the random base."""
    own = ["--beta", "0.1", "--tiny_base_steps", "0"]
    return ["--config", "tiny_dpo", *QUICK_PAIRS, *NO_CHECKPOINTS, *own, *paths(base, csv_file, folder)]


@pytest.fixture
def pair_words(pair_base, pair_corpus, tmp_path) -> list[str]:
    return pair_run(pair_base, pair_corpus, tmp_path / "out")


@pytest.fixture(scope="session")
def preferred(pair_base, pair_corpus, start, tmp_path_factory) -> Path:
    """The folder of a quick preference run from ``start`` that has finished."""
    folder = tmp_path_factory.mktemp("preferred") / "out"
    more = ["--adapter", str(start), "--beta", "0.2", "--fee", "0.0003"]
    tuning.run("dpo", [*pair_run(pair_base, pair_corpus, folder), *more])
    return folder
