"""What the tests share: valid CSV rows to spoil, a small corpus, a tiny base, and a Hugging Face home of their own.

What takes long to make is made once a session, which is once for each process that `make test` starts.
"""

import csv
import datetime
import gc
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# `datasets` reads these once, when it is imported: set them before anything imports it.
for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_TRUST_REMOTE_CODE"):
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
# Tests run side by side, and models as tiny as these gain nothing from a second thread.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "covered_call_candidates.py"
REAL_DATA = Path(__file__).parents[2] / "shared" / "real_data"
REAL_PHI3 = Path(__file__).parents[2] / "shared" / "real_models" / "phi-3-mini"
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from covered_call.candidates.builder import load_candidates  # noqa: E402
from covered_call.candidates.columns import logged_of  # noqa: E402
from covered_call.candidates.decisions import read_decisions  # noqa: E402
from covered_call.candidates.options import CoveredCallCandidatesConfig  # noqa: E402
from covered_call.candidates.records import RECORDS  # noqa: E402
from covered_call.candidates.schema import COLUMNS, LoggedDecision  # noqa: E402

# The same examples on every run and no deadline: a red test is a changed behaviour, never a slow machine.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real backtest files in {REAL_DATA}")
needs_real_phi3 = pytest.mark.skipif(not REAL_PHI3.is_dir(), reason=f"no tokenizer of Phi-3-mini in {REAL_PHI3}")
runs_scripts = pytest.mark.skipif(
    int(datasets.__version__.split(".")[0]) >= 4,
    reason=f"datasets {datasets.__version__} runs no loading scripts: load_dataset on a script needs datasets < 4",
)

# For tests of code that calls neither datasets nor trl, all else being of one version on both stacks: which those are
# was found by tracing which functions of the two each test enters.
on_the_default_stack = pytest.mark.skipif(
    int(datasets.__version__.split(".")[0]) >= 4,
    reason="of datasets and trl, in which alone the stacks differ, it shows nothing but what other tests show on both",
)


def pytest_collection_modifyitems(items):
    """The slowest first, so that in the end no process waits for another's. Coverage does not trace a property's many
    examples, of lines that other tests run, too."""
    for item in items:
        if getattr(item.obj, "is_hypothesis_test", False):
            item.add_marker(pytest.mark.no_cover)
    items.sort(key=lambda item: -sum(mark.kwargs.get("minutes", 1) for mark in item.iter_markers("slow")))


def pytest_collection():
    gc.disable()  # imports make no garbage: to look for it takes a fifth of their time


def pytest_collection_finish():
    """What is imported by now stays: no garbage collection, and each training asks for one, looks through it again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def the_log_as_it_was():
    """A command that a test runs here may quieten the log: the next test hears it again."""
    logger = logging.getLogger("covered_call")
    level = logger.level
    yield
    logger.setLevel(level)


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def load(tmp_path):
    """load_candidates with an Arrow cache of the test's own."""
    return lambda name="per_candidate", **options: load_candidates(name, cache_dir=str(tmp_path / "arrow"), **options)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """The path of a small CSV of 61 decisions, which no test changes: copy it first."""
    rows = [row for day in range(60) for row in decision(day, sold=day % 3 if day % 4 else None, dte=1.0)]
    return write_csv(tmp_path_factory.mktemp("corpus") / "candidates.csv", [*rows, no_candidates(60)])


@pytest.fixture(scope="session")
def corpus_tokenizer(corpus, tmp_path_factory):
    """A tokenizer of the corpus's prompts, of both tasks, which no test changes."""
    from covered_call.language_model.tiny_phi3 import train_tokenizer  # torch, for the tests that need it

    cache = str(tmp_path_factory.mktemp("arrow"))
    tasks = ("per_candidate", "per_decision_ranking")
    train = [load_candidates(task, data_files=corpus, cache_dir=cache)["train"] for task in tasks]
    return train_tokenizer(message["content"] for split in train for chat in split["messages"] for message in chat)


@pytest.fixture(scope="session")
def corpus_base(corpus_tokenizer, tmp_path_factory) -> Path:
    """The folder of a tiny random Phi-3 with that tokenizer, which no test changes."""
    from covered_call.language_model.tiny_phi3 import random_phi3

    folder = tmp_path_factory.mktemp("models") / "base"
    random_phi3(corpus_tokenizer, seed=0).save_pretrained(folder)
    corpus_tokenizer.save_pretrained(folder)
    return folder


def row(**cells) -> dict:
    """A valid CSV row, not traded, with some of its cells replaced."""
    return {
        "decision_time": "2024-09-01T00:00:00+00:00",
        "underlying": "BTC",
        "spot": "58466.0",
        "instrument": "BTC-08SEP24-63000-C",
        "strike": "63000.0",
        "dte": "7.0",
        "delta": "0.23514593117822502",
        "score": "3.2029186235645004",
        "iv": "0.7",
        "ivrv_ratio": "0.9306217222978382",
        "exit_style": "tp_and_roll",
        "trade_executed": "0",
        "chosen": "0",
        "action": "SKIP",
        "strategy": "",
        "reward": "0.0",
        "pnl_vs_hodl": "0.0",
        "max_drawdown_pct": "0.0",
        **{name: str(value) for name, value in cells.items()},
    }


def time(day: float) -> str:
    return (datetime.datetime(2024, 9, 1, tzinfo=datetime.UTC) + datetime.timedelta(days=day)).isoformat()


def decision(day: float = 0, sold: int | None = None, strikes=(62000, 63000, 64000), **cells) -> list[dict]:
    """The rows of one valid decision, ``day`` days after 2024-09-01; ``sold`` says which one the teacher sold."""
    label = {"chosen": 1, "action": "SELL_CALL", "reward": -3214.59, "pnl_vs_hodl": 744.26, "max_drawdown_pct": 6.94}
    shared = {"decision_time": time(day), "trade_executed": int(sold is not None)}
    name = cells.get("underlying", "BTC")
    return [
        row(**{"instrument": f"{name}-{strike}-C", "strike": strike, "score": 3.5 - 0.25 * index}
            | shared | (label if index == sold else {}) | cells)
        for index, strike in enumerate(strikes)
    ]  # fmt: skip


def no_candidates(day: float = 0, **cells) -> dict:
    """The placeholder row of a step without candidates."""
    blank = {"instrument": "NO_CANDIDATES", "strike": 0, "dte": 0, "delta": 0, "score": 0, "iv": "", "ivrv_ratio": ""}
    return row(**{"decision_time": time(day)} | blank | cells)


def write_csv(path: Path, rows: list[dict], columns=COLUMNS) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def import_script(path: Path):
    """The script at ``path`` as a module of its own, beside the one that the tests import."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stat().st_ino}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def python(*arguments, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """Runs Python in ``cwd`` with a Hugging Face home below it."""
    env = {**os.environ, "HF_HOME": str(cwd / "hf_home"), **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def unasked(output: str) -> list[str]:
    """What a training wrote to standard error beside its bars and what its reader needs."""
    said = r"Purged|Computed against recorded outcomes|Pairs of|Building|Going on|Looking through|Pushing|Process \d+,"
    needed = re.compile(rf"$|.*(\d+%\||\d examples )|({said}) ")
    return [line for line in map(str.strip, re.split(r"[\r\n]+", output)) if not needed.match(line)]


def messages(dataset) -> list[str]:
    """Each record's chat as a line of the exporter."""
    return [json.dumps({"messages": record["messages"]}, ensure_ascii=False) for record in dataset]


def read_candidates(paths: list[str], options: CoveredCallCandidatesConfig) -> list[LoggedDecision]:
    """The decisions of some files, one by one."""
    return logged_of(read_decisions(paths, options).columns())


def records(paths: str | list[str], name: str = "per_candidate", **options) -> list[dict]:
    """The records without an Arrow file between: quick enough for hundreds of generated files."""
    config = CoveredCallCandidatesConfig(name=name, **options)
    columns = read_decisions([paths] if isinstance(paths, str) else paths, config).columns()
    return RECORDS[name](columns, config).to_pylist()
