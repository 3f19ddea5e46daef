"""The benchmark of what makes fine-tuning and evaluation faster, small."""

import re

from conftest import SCRIPT, python


def test_each_thing_stands_beside_the_same_work_without_it(tmp_path):
    options = ["--records", 16, "--hidden", 64, "--layers", 2, "--rounds", 1]
    done = python("-W", "ignore", SCRIPT.parent / "benchmarks" / "training_speed.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (.+?) \| [\d,]+ \| [\d,]+ \| \d+\.\d\d \|$", done.stdout, re.MULTILINE)
    assert len(rows) == len(set(rows)) == 7
    assert "hidden size 64, 2 layers; 16 records of each kind; best of 1 round(s)" in done.stdout
