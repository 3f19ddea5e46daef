"""Paper runs of the command that are killed at random moments; AGENT_PAPER_KILLS=50 for more of them."""

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT, on_the_default_stack, python

pytestmark = [on_the_default_stack, pytest.mark.no_cover]

KILLS = int(os.environ.get("AGENT_PAPER_KILLS", "3"))


@pytest.mark.slow
def test_killed_at_random_moments_the_log_is_readable_and_the_portfolio_the_one_in_memory(tmp_path):
    script = Path(__file__).with_name("kills.py")
    done = python(script, tmp_path / "runs", KILLS, 0, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["kills"] == KILLS and found["trades"] > 5 and found["orders"] > 10
