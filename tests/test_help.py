"""--help of every command, read as its user reads it, and what a Python without the packages is told."""

import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from conftest import SCRIPT, import_script

from covered_call import __main__ as command
from covered_call import __version__
from covered_call.candidates.options import PreferenceConfig, names_of
from covered_call.training.first_checks import DPO_RECIPES, RECIPES, SFT_RECIPES
from covered_call.training.keys import PairArguments
from covered_call.training.recipe import DPO, SFT, RunArguments

ROOT = SCRIPT.parent
SCRIPTS = [
    "data/make_formulas.py",
    "data/simulate_backtest.py",
    *(
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "benchmarks").glob("*.py"))
        if "ArgumentParser(" in path.read_text(encoding="utf-8")
    ),
]
COMMANDS = [*command.VERBS, *SCRIPTS]
HEAVY = {"torch", "datasets", "transformers", "numpy", "pandas", "pyarrow", "sklearn", "yaml"}
# Commands of before, which are verbs now.
GONE = r"\b(train_dpo|evaluate_policy|audit|publish\w*|q_scorer|export|covered_call_candidates)\.py\b"


def help_of(name: str, monkeypatch, capsys, *words: str) -> str:
    """What a verb, or a script that is no verb, prints."""
    words = words or ("--help",)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which a verb sets
    with pytest.raises(SystemExit) as exit:
        if name in command.VERBS:
            command.main([name, *words])
        else:
            path = ROOT / name
            monkeypatch.setattr(sys, "argv", [str(path), *words])
            import_script(path).main()
    assert exit.value.code in (0, None)
    return capsys.readouterr().out


def options(text: str) -> dict[str, str]:
    """Each option of a help, with what is said of it."""
    entries = re.findall(r"^ {2}(-\S.*?)(?: {2,}(\S.*))?$((?:\n {8,}\S.*$)*)", text, re.MULTILINE)
    return {names: " ".join(f"{first} {more}".split()) for names, first, more in entries}


# --- The whole


@pytest.mark.parametrize("words", [["--help"], ["-h"], [], ["--version"]])
def test_the_whole_is_told_in_a_moment_for_nothing_heavy_is_imported(words):
    code = f"import sys; from covered_call.__main__ import main; main({words}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert not HEAVY & set(done.stderr.split())
    if words == ["--version"]:
        assert done.stdout == f"covered-call {__version__}\n"
    else:
        said = re.findall(r"^  (\S+) +(\S.*)$", done.stdout, re.MULTILINE)
        assert [verb for verb, _ in said][: len(command.VERBS)] == list(command.VERBS)
        examples = re.findall(r"^  covered-call (\S+)", done.stdout, re.MULTILINE)
        assert examples and set(examples) <= set(command.VERBS)


def test_the_verbs_are_those_that_the_documents_name():
    verbs = "export verify train prefer q-scorer evaluate audit chain agent harvest backtest merge publish"
    assert list(command.VERBS) == verbs.split()


def test_a_word_that_is_no_verb_is_refused_with_the_verbs(capsys):
    with pytest.raises(
        SystemExit, match=r"error: 'tarin' is no verb: choose one of export, verify, train, .*, publish\. See"
    ):
        command.main(["tarin"])


def test_the_package_is_a_command_without_being_installed(tmp_path):
    """-S leaves out the folder in which pip installs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-S", "-m", "covered_call", "--version"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"covered-call {__version__}\n")


# --- Each command


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_a_word_on_every_option(name, monkeypatch, capsys):
    text = help_of(name, monkeypatch, capsys)
    called = f"covered-call {name}" if name in command.VERBS else f"python {name}"
    body = text.split("\n\n", 1)[1]  # what follows the usage
    assert re.search(rf"{re.escape(called)}( |$)", body, re.MULTILINE), "no example"
    found = options(text)
    assert len(found) > 1 and any(names.startswith("-h") or "--help" in names for names in found)
    assert not [names for names, said in found.items() if not said]
    assert "%(" not in text and "%%" not in text and "default: None" not in text and "==SUPPRESS==" not in text
    assert not re.search(GONE, text)
    if name in command.VERBS:  # all that it sends its reader to is there
        assert set(re.findall(r"covered-call ([\w-]+)", text)) <= set(command.VERBS)


def test_train_sft_is_the_verb_train(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train_sft.py"), "--help"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "train_sft.py"), run_name="__main__")
    assert exit.value.code in (0, None)
    assert capsys.readouterr().out == help_of("train", monkeypatch, capsys)


@pytest.mark.parametrize("name, recipes", [("train", SFT_RECIPES), ("prefer", DPO_RECIPES)])
def test_a_trainings_help_shows_its_own_options_in_groups_and_what_the_recipes_set(name, recipes, monkeypatch, capsys):
    text = help_of(name, monkeypatch, capsys)
    groups = re.findall(r"^(\w[\w ]*)[:;].*\n {2}-", text, re.MULTILINE)
    assert groups == ["run", "model", "data", "splits", "outcomes and costs", "training"]
    shown = {names.split()[0] for names in options(text)}
    for recipe in recipes:
        assert {f"--{key}" for key in yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())} <= shown
    assert len(shown) < 100 and "--adam_beta1" not in shown
    everything = options(help_of(name, monkeypatch, capsys, "--help_all"))
    assert len(everything) > 130 and shown < {names.split()[0] for names in everything}


def test_defaults_and_units_are_said(monkeypatch, capsys):
    found = options(help_of("prefer", monkeypatch, capsys))
    assert found["--purge BOOL"].endswith("default: true") and found["--splits SHARE ..."].endswith(
        "default: 0.8 0.1 0.1"
    )
    assert "percent of spot; default: 0.1" in found["--min_edge_pct PERCENT"]
    assert "Deribit: 0.0003; default: 0" in found["--fee SHARE"] and "DAYS" in " ".join(found)
    assert found["--lora_r N"].endswith("default: 16")
    text = help_of("train", monkeypatch, capsys)
    assert "--config ranking" in text and "--quantization {int4,int8,none}" in text


@pytest.mark.parametrize("script, verb", [(SFT, "train"), (DPO, "prefer")])
def test_every_key_of_ones_own_is_in_a_group(script, verb, monkeypatch, capsys):
    found = {names.split()[0] for names in options(help_of(verb, monkeypatch, capsys))}
    parts = [*script.parts[:2], RunArguments]
    assert {f"--{key.name}" for part in parts for key in fields(part) if key.init} <= found


def test_every_option_of_load_candidates_is_a_key_of_a_recipe():
    own = {key.name for key in fields(PairArguments)}
    assert set(names_of(PreferenceConfig)) - own == {
        "hindsight",
        "seed",
    }  # no outcomes to learn from; the run's


@pytest.mark.parametrize("words", [["train_sft.py"], *(["-m", "covered_call", verb] for verb in command.VERBS)])
def test_a_python_without_the_packages_is_told_how_to_enter_the_environment(words, tmp_path):
    """-S leaves out the folder in which pip installs."""
    given = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-S", *given, "--config", "tiny"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    named = r"-m covered_call" if given[0] == "-m" else rf"\S*{words[0]}"
    assert re.fullmatch(
        r"error: \S+ has no package \w+\. `make run` .* in \.venv: enter it with `source .venv/bin/activate`, or run "
        rf"\.venv/bin/python {named} \.\.\.\n",
        done.stderr,
    )
