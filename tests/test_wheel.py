"""The wheel, installed without the checkout: verbs, recipes and the sample are in it."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, on_the_default_stack

# Judged on few decisions: it is the way that is tried, not the model.
WORDS = (
    "--exit_style tp_and_roll --validation_from 2025-11-01 --test_from 2025-11-20 "
    "--tiny_base_steps 2 --max_steps 1 --save_strategy no --eval_strategy no --load_best_model_at_end false"
)


def run(folder, installed, *words) -> str:
    """What a process prints that finds the installed package first, in a folder that holds nothing."""
    env = os.environ | {"PYTHONPATH": str(installed), "HF_HOME": str(folder / "hf_home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@on_the_default_stack
@pytest.mark.slow(minutes=2)
def test_the_wheel_trains_and_evaluates_on_its_own_sample(tmp_path):
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", tmp_path / "dist", ROOT], check=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel], check=True)
    folder = tmp_path / "empty"
    folder.mkdir()
    where = "import covered_call, covered_call_candidates as one; print(covered_call.__file__, one.__file__)"
    assert run(folder, installed, "-c", where).count(str(installed)) == 2
    train = ["train", "--config", "tiny", "--output_dir", "out/tiny", *WORDS.split()]
    assert "Saved in out/tiny" in run(folder, installed, "-m", "covered_call", *train)
    judged = run(
        folder,
        installed,
        "-m",
        "covered_call",
        "evaluate",
        "--baselines_only",
        "--exit_style",
        "tp_and_roll",
        "--output_dir",
        "report",
    )
    assert "tp_and_roll" in judged and (folder / "report" / "report.md").is_file()
