"""Attacks on what the project promises of hostile files, options, kills and networks; see docs/reliability.md."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS, TESTS.parent):  # run by hand, nothing has put them there
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
