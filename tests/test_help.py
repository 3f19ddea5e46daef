"""--help of every command, read as its user reads it, and what a Python without the packages is told."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from conftest import SCRIPT, import_script

from covered_call.candidates.options import PreferenceConfig, names_of
from covered_call.training.first_checks import DPO_RECIPES, RECIPES, SFT_RECIPES
from covered_call.training.recipe import DPO, SFT, PairArguments, RunArguments

ROOT = SCRIPT.parent
COMMANDS = [
    "train_sft.py",
    "train_dpo.py",
    "evaluate_policy.py",
    "publish.py",
    "q_scorer.py",
    "covered_call_candidates.py",
    "data/simulate_backtest.py",
    *(
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "benchmarks").glob("*.py"))
        if "ArgumentParser(" in path.read_text(encoding="utf-8")
    ),
]


def help_of(name: str, monkeypatch, capsys, *words: str) -> str:
    path = ROOT / name
    module = sys.modules.get(path.stem) or import_script(path)
    monkeypatch.setattr(sys, "argv", [str(path), *(words or ["--help"])])
    with pytest.raises(SystemExit) as exit:
        module.main()
    assert exit.value.code in (0, None)
    return capsys.readouterr().out


def options(text: str) -> dict[str, str]:
    """Each option of a help, with what is said of it."""
    entries = re.findall(r"^ {2}(-\S.*?)(?: {2,}(\S.*))?$((?:\n {8,}\S.*$)*)", text, re.MULTILINE)
    return {names: " ".join(f"{first} {more}".split()) for names, first, more in entries}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_a_word_on_every_option(name, monkeypatch, capsys):
    text = help_of(name, monkeypatch, capsys)
    assert re.search(rf"python {re.escape(name)}", text), "no example"
    found = options(text)
    assert len(found) > 1 and any(names.startswith("-h") or "--help" in names for names in found)
    assert not [names for names, said in found.items() if not said]
    assert "%(" not in text and "default: None" not in text and "==SUPPRESS==" not in text


@pytest.mark.parametrize("name, recipes", [("train_sft.py", SFT_RECIPES), ("train_dpo.py", DPO_RECIPES)])
def test_a_trainings_help_shows_its_own_options_in_groups_and_what_the_recipes_set(name, recipes, monkeypatch, capsys):
    text = help_of(name, monkeypatch, capsys)
    groups = re.findall(r"^(\w[\w ]*)[:;].*\n {2}-", text, re.MULTILINE)
    costs = ["outcomes and costs"] if name == "train_dpo.py" else []
    assert groups == ["run", "model", "data", "splits", *costs, "training"]
    shown = {names.split()[0] for names in options(text)}
    for recipe in recipes:
        assert {f"--{key}" for key in yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())} <= shown
    assert len(shown) < 80 and "--adam_beta1" not in shown
    everything = options(help_of(name, monkeypatch, capsys, "--help_all"))
    assert len(everything) > 130 and shown < {names.split()[0] for names in everything}


def test_defaults_and_units_are_said(monkeypatch, capsys):
    found = options(help_of("train_dpo.py", monkeypatch, capsys))
    assert found["--purge BOOL"].endswith("default: true") and found["--splits SHARE ..."].endswith(
        "default: 0.8 0.1 0.1"
    )
    assert "percent of spot; default: 0.1" in found["--min_edge_pct PERCENT"]
    assert "Deribit: 0.0003; default: 0" in found["--fee SHARE"] and "DAYS" in " ".join(found)
    assert found["--lora_r N"].endswith("default: 16")
    text = help_of("train_sft.py", monkeypatch, capsys)
    assert "--config ranking" in text and "--quantization {int4,int8,none}" in text


@pytest.mark.parametrize("script", [SFT, DPO])
def test_every_key_of_ones_own_is_in_a_group(script, monkeypatch, capsys):
    found = {names.split()[0] for names in options(help_of(script.name, monkeypatch, capsys))}
    parts = [*script.parts[:2], RunArguments]
    assert {f"--{key.name}" for part in parts for key in fields(part) if key.init} <= found


def test_every_option_of_load_candidates_is_a_key_of_a_recipe():
    own = {key.name for key in fields(PairArguments)}
    assert set(names_of(PreferenceConfig)) - own == {
        "hindsight",
        "seed",
    }  # no outcomes to learn from; the run's


@pytest.mark.parametrize("name", ["train_sft.py", "train_dpo.py", "evaluate_policy.py", "publish.py", "q_scorer.py"])
def test_a_python_without_the_packages_is_told_how_to_enter_the_environment(name, tmp_path):
    """-S leaves out the folder in which pip installs."""
    command = [sys.executable, "-S", str(ROOT / name), "--config", "tiny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: \S+ has no package \w+\. `make run` .* in \.venv: enter it with `source .venv/bin/activate`, or run "
        rf"\.venv/bin/python \S*{name} \.\.\.\n",
        done.stderr,
    )
