"""What the pages show is true: commands and Python blocks run, options and links are there, the example is the code's.

Commands run in a copy of the checkout whose sample is eight months long. There `runs/`, `vols/` and `my_card.md` are
what the pages take for their reader's own. What cannot run on a CPU without the network says so behind its `#`, and is
parsed; what says "minute" there, or needs a model that only such a command makes, runs with the slow tests.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pytest
from conftest import ROOT, on_the_default_stack, python
from market.quotes import chain, write_days, write_harvest
from matplotlib.image import imread

from covered_call import load_candidates
from covered_call.__main__ import VERBS
from covered_call.candidates.options import (
    CoveredCallCandidatesConfig,
    PreferenceConfig,
    QValuesConfig,
    names_of,
    options_of,
)

README = ROOT / "README.md"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("benchmarks/*.md"), ROOT / "data/README.md"]
)
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
ELSEWHERE = re.compile("needs a GPU|needs the network|pushes to the Hub")
SLOW = re.compile(r"\bminutes?\b")
TUNED = re.compile(r"out/(tiny|tiny_explained|ranks|prefers|mine)\b(?!_)")  # folders that only slow commands make
# A training of the pages takes minutes; these steps take it through all that it does.
SHORT = (
    "--max_steps 2 --warmup_steps 1 --eval_steps 1 --save_steps 1 --logging_steps 1 --max_eval_records 8 "
    "--report_to none --overwrite_output_dir"
)

# Reads steps as JSON and runs each as its own process would, imports apart, which take longer than most steps.
RUNNER = """
import contextlib, gc, io, json, runpy, sys, traceback
for step in json.load(sys.stdin):
    gc.freeze()  # what is imported by now, through which each training's collections would look again
    said, status = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if step["words"] is None:
                exec(compile(step["text"], step["place"], "exec"), {"__name__": "__main__"})
            else:
                sys.argv = step["words"]
                if step["words"][0] == "covered-call":
                    from covered_call.__main__ import main
                    main(step["words"][1:])
                else:
                    runpy.run_path(step["words"][0], run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            said.write("" if status == end.code else str(end.code))
        except BaseException:
            status = 1
            traceback.print_exc(file=said)
    if status != step["status"]:
        print(step["place"], step["text"], f"ended with {status}:", said.getvalue()[-3000:], sep="\\n")
"""


class Step(NamedTuple):
    """A command, or a Python block, of a page; ``note`` is what the command's line says behind the #."""

    place: str
    language: str
    text: str
    note: str = ""

    @property
    def elsewhere(self) -> bool:
        return bool(ELSEWHERE.search(self.note))

    @property
    def slow(self) -> bool:
        return bool(SLOW.search(self.note) or TUNED.search(self.text))

    def words(self) -> list[str] | None:
        """As the runner takes it: covered-call VERB ..., or a script with its arguments; None for Python."""
        if self.language == "python":
            return None
        words = shlex.split(self.text)
        if words[:2] == ["accelerate", "launch"]:
            words = ["python", *words[2:]]
        if words[0] == "python" and words[1] == "train_sft.py":
            words = ["covered-call", "train", *words[2:]]
        return words if words[0] == "covered-call" else words[1:]


def blocks(path: Path) -> list[tuple[int, str, str]]:
    """Of each fenced block the number of its first line, its language and its text."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(2)) + 1, block[1], block[2]) for block in found]


def steps(path: Path) -> list[Step]:
    found, name = [], path.relative_to(ROOT).as_posix()
    for first, language, text in blocks(path):
        if language == "python":
            found.append(Step(f"{name}:{first}", language, text))
        elif language == "bash":
            for line, command in enumerate(text.splitlines(), start=first):
                command, _, note = command.partition(" #")
                found.append(Step(f"{name}:{line}", language, command.strip(), note.strip()))
    return found


STEPS = [step for page in PAGES for step in steps(page)]
COMMANDS = [step for step in STEPS if step.language == "bash"]
# make has a test of its own, and what these call is the suite that this test is of.
RUN = [step for step in STEPS if not step.elsewhere and not step.text.startswith(("make ", "python -m "))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the project with less data, and files of a reader's own."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    for name in ("covered_call", "configs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    scripts = [path.relative_to(ROOT).as_posix() for path in (ROOT / "data").glob("*.py")]
    for name in ("covered_call_candidates.py", "train_sft.py", "dataset_card.md", *scripts):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "draw_pipeline.py", folder / "docs")
    (folder / "my_card.md").write_text("---\nlicense: other\n---\n\n# My calls\n\nCalls that my backtest looked at.\n")
    for source in sorted((ROOT / "data" / "sample").glob("*.csv")):
        head, *rows = source.read_text().splitlines(keepends=True)
        for name, first in (("data/sample", "2024-11-01"), ("runs", "2024-03-01")):
            kept = "".join([head, *(row for row in rows if first <= row[:10] < "2025-07-01")])
            (folder / name).mkdir(exist_ok=True)
            (folder / name / source.name).write_text(kept)
    (folder / "vols").mkdir()
    days = np.arange(np.datetime64("2024-01-01"), np.datetime64("2025-07-01"))
    (folder / "vols" / "dvol_BTC_daily.csv").write_text("time,vol\n" + "".join(f"{day},55\n" for day in days))
    days = np.arange(np.datetime64("2025-09-01"), np.datetime64("2026-01-10"))
    spots = "".join(f"{day},{90_000 + 100 * (place % 7)}\n" for place, day in enumerate(days))
    (folder / "vols" / "spot_BTC_0800utc.csv").write_text(f"date,price\n{spots}")
    (folder / "chains").mkdir()
    (folder / "agent.yaml").write_text("holdings: {BTC: 1.0}\n")
    write_harvest(folder / "chains" / "BTC_2025-12-10_0105.parquet", chain())
    write_days(folder / "chains")
    return folder


def run_all(found: list[Step], checkout: Path) -> None:
    """Runs them one after the other in one process, and fails with what went wrong in each."""
    told = []
    for step in found:
        words, status = step.words(), re.search(r"exit status (\d)", step.note)
        text = step.text.replace("USER/NAME", "out/shared") if words is None else step.text
        if words and words[0] == "covered-call" and words[1] in ("train", "prefer"):
            tiny = [] if "--adapter" in words else ["--tiny_base_steps", "2"]
            words = [*words, *SHORT.split(), *tiny]
        if words == ["data/simulate_backtest.py"]:
            words = [*words, "--output-dir", "out/simulated"]  # the sample is to stay short
        told.append({"place": step.place, "text": text, "words": words, "status": int(status[1]) if status else 0})
    # It is a copy of the package that runs here, which coverage would count as another.
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(checkout / "hf_home"), "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(told), cwd=checkout, capture_output=True, text=True,
        timeout=1200, env={**unmeasured, **environment},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr[-3000:]


def runs_here(step: Step) -> bool:
    return "trust_remote_code" not in step.text or int(datasets.__version__.split(".")[0]) < 4


def test_quick_commands_and_python_blocks_run(checkout):
    found = [step for step in RUN if not step.slow and runs_here(step)]
    assert len(found) > 15
    run_all(found, checkout)


@on_the_default_stack
@pytest.mark.slow(minutes=2)
def test_slow_commands_and_what_needs_their_models_run(checkout):
    found = [step for step in RUN if step.slow]
    assert len(found) > 12
    run_all(found, checkout)


@on_the_default_stack
@pytest.mark.slow
def test_tables_that_need_no_language_model_are_what_the_commands_print(tmp_path):
    sample = ["--data_files", str(ROOT / "data" / "sample" / "*.csv"), "--output_dir", tmp_path / "out"]
    for page, verb, *more in (("outcomes.md", "q-scorer"), ("evaluation.md", "evaluate", "--baselines-only")):
        done = python("-m", "covered_call", verb, *more, *sample, cwd=tmp_path, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        table = next(text for _, language, text in blocks(ROOT / "docs" / page) if language == "text")
        lines = [line for line in table.splitlines() if not line.startswith("model ")]
        assert len(lines) > 5 and not set(lines) - set(done.stdout.splitlines())


@pytest.mark.parametrize("step", [pytest.param(step, id=step.place) for step in COMMANDS])
def test_a_command_is_one_that_there_is(step, monkeypatch, capsys):
    """Also those that run nowhere here: their options, recipes and targets are known."""
    words = step.words()
    if step.text.startswith("make "):
        made = subprocess.run(["make", "-n", *shlex.split(step.text)[1:]], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0 and made.stdout, made.stderr
    elif words[0] != "covered-call":
        assert (ROOT / words[0]).is_file() or words[0] == "-m" and words[1] in ("pytest", "tests.attack")
        assert words[:2] != ["-m", "pytest"] or all((ROOT / word).exists() for word in words if "/" in word)
    elif words[1] in ("train", "prefer"):
        recipe = importlib.import_module("covered_call.training.recipe")
        kind = recipe.SFT if words[1] == "train" else recipe.DPO
        assert recipe.parse_recipe([*words[2:], *(["--dry_run"] if "--dry_run" not in words else [])], kind)
    else:
        module = importlib.import_module(f"covered_call.{VERBS[words[1]][0].rpartition('.')[0]}")
        assert isinstance(module.parse_arguments(words[2:]), argparse.Namespace)


def test_every_verb_is_shown():
    shown = {step.words()[1] for step in COMMANDS if step.text.startswith("covered-call")}
    assert shown == set(VERBS)
    assert all(f"`{verb}`" in README.read_text() or f"covered-call {verb}" in README.read_text() for verb in VERBS)


# --- What stands in the pages


def rows_of(table_head: str, text: str) -> list[list[str]]:
    """The cells of each table with this head."""
    tables = re.findall(rf"^{re.escape(table_head)}\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()]


def test_the_options_of_loading_are_those_of_the_dataclass():
    table = rows_of("| option | default | |", (ROOT / "docs" / "loading.md").read_text())
    shared = names_of(CoveredCallCandidatesConfig)
    options = [*options_of(PreferenceConfig), *(one for one in options_of(QValuesConfig) if one.name not in shared)]
    assert [cells[0].strip("`") for cells in table] == [option.name for option in options]
    assert len({cells[0] for cells in table}) == len(table)
    for option, (_, shown, _) in zip(options, table, strict=True):
        expected = f"`{json.dumps(option.default)}`" if isinstance(option.default, str) else f"`{option.default}`"
        assert shown == expected or option.default is None and "`None`" not in shown, option.name
    assert set(shared) < set(names_of(PreferenceConfig)) and set(shared) < set(names_of(QValuesConfig))


def test_the_columns_of_data_are_those_that_are_read():
    from covered_call.candidates.schema import COLUMNS

    table = rows_of("| column | unit | what it means | what is refused |", (ROOT / "docs" / "data.md").read_text())
    assert [cells[0].strip("`") for cells in table] == list(COLUMNS)


def test_the_row_of_the_readme_is_in_the_sample_and_its_chat_is_made_of_it(tmp_path):
    (row,) = [text for _, language, text in blocks(README) if language == "csv"]
    (chat,) = [text for _, language, text in blocks(README) if language == "text"]
    head, line = row.splitlines()
    files = sorted((ROOT / "data" / "sample").glob("*.csv"))
    (file,) = [path for path in files if line in path.read_text().splitlines()]
    assert file.read_text().splitlines()[0] == head
    time, instrument = line.split(",")[0], line.split(",")[3]
    records = load_candidates("per_candidate", data_files=str(file), splits="train", cache_dir=str(tmp_path))["train"]
    (record,) = [one for one in records if one["instrument"] == instrument and time in one["decision_id"]]
    assert "\n\n".join(f"[{said['role']}]\n{said['content']}" for said in record["messages"]) == chat.rstrip("\n")
    assert not {cell for cell in line.split(",")[-3:] if cell in chat}


def test_the_readme_is_short_and_its_tree_is_the_projects():
    text = README.read_text()
    assert len(text.splitlines()) <= 170
    (tree,) = [text for _, language, text in blocks(README) if language == ""]
    named, room = [], ""
    for line in tree.splitlines():
        inside = line.startswith("  ")
        paths = re.match(r"\s*((?:\S+ )*\S+?)(?:  |(?<=\.py) |(?<=\.md) |(?<=\.toml) )", line)[1].split()
        room = room if inside else paths[0]
        named += [f"{room if inside else ''}{path}" for path in paths]
    assert not [path for path in named if not (ROOT / path).exists()]
    rooms = {f"covered_call/{path.parent.name}/" for path in (ROOT / "covered_call").glob("*/__init__.py")}
    assert rooms <= set(named)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    folders = {f"{path.split('/')[0]}/" for path in tracked if "/" in path and not path.startswith(".")}
    assert folders <= set(named)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme():
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README.read_text())}
    assert set(NAMES) - {"README.md"} <= linked


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("CHANGELOG.md", "CONTRIBUTING.md")])
def test_pages_use_the_words_of_today(name):
    text = re.sub(r"<!-- attack -->.*<!-- /attack -->", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(
        r"(?i)\bghosts?\b|ghost_|\| sells \||\bsells  |evaluate_policy|train_dpo\.py|q_scorer\.py|publish\.py", text
    )


def test_the_picture_is_what_its_script_draws_and_opaque(tmp_path):
    done = python(ROOT / "docs" / "draw_pipeline.py", "--output", tmp_path / "new.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept, drawn = imread(ROOT / "docs" / "pipeline.png"), imread(tmp_path / "new.png")
    assert kept.shape == drawn.shape and np.abs(kept - drawn).mean() < 1e-3
    assert kept.shape[2] == 3 or kept[..., 3].min() == 1  # readable on a dark page
