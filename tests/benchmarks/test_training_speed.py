"""The benchmark of what makes fine-tuning and evaluation faster, small."""

import re

import pytest
from conftest import SCRIPT, import_script, on_the_default_stack

BENCHMARK = SCRIPT.parent / "benchmarks" / "training_speed.py"


@on_the_default_stack
@pytest.mark.slow
def test_each_thing_stands_beside_the_same_work_without_it(monkeypatch, capsys):
    options = ["--records", "16", "--hidden", "64", "--layers", "2", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", [str(BENCHMARK), *options])
    import_script(BENCHMARK).main()
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (.+?) \| [\d,]+ \| [\d,]+ \| \d+\.\d\d \|$", printed, re.MULTILINE)
    assert len(rows) == len(set(rows)) == 7
    assert "hidden size 64, 2 layers; 16 records of each kind; best of 1 round(s)" in printed
