"""Harvests that are killed at random moments, each by a fork of this process, so that ccxt is imported once.

python tests/market/kills.py URL FOLDER KILLS SEED
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from covered_call.market import harvest

assert "ccxt" not in sys.modules, "it is an extra: only a client imports it"
import ccxt  # noqa: E402, F401

CURRENCIES = ["BTC", "ETH"]


def start(url: str, folder: Path, *words: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        harvest.main([*CURRENCIES, "--every", "1", "--to", str(folder), "--url", url, *words])
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def listing(folder: Path) -> list[tuple[str, int]]:
    found = []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        try:
            found.append((entry.name, entry.stat().st_size))
        except FileNotFoundError:
            continue
    return sorted(found)


def kill(child: int, folder: Path, rng: random.Random) -> None:
    """At a moment, or just after the folder has changed so many times."""
    end = time.monotonic() + rng.uniform(0, 0.8)
    changes = rng.randint(1, 7) if rng.random() < 0.6 else None
    seen = listing(folder)
    while time.monotonic() < end + 1 if changes else time.monotonic() < end:
        time.sleep(0.0005)
        if changes and (now := listing(folder)) != seen:
            seen, changes = now, changes - 1
            if not changes:
                break
    time.sleep(rng.uniform(0, 0.001))
    os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == -signal.SIGKILL, f"it ended by itself: {(folder.parent / 'log.txt').read_text()[-500:]}"


def check_whole(folder: Path, rows: int) -> None:
    for path in folder.glob("[!.]*.parquet"):
        assert len(pq.read_table(path)) == rows, path
    log = folder / "harvest.jsonl"
    *lines, torn = log.read_text().split("\n") if log.exists() else [""]
    assert all(json.loads(line) for line in lines), torn


def main(url: str, folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        kill(start(url, folder, "--cycles", "20"), folder, rng)  # which it does not reach, but ends an orphan
        check_whole(folder, rows=80)
    assert os.waitpid(start(url, folder, "--cycles", "1"), 0)[1] == 0, (folder.parent / "log.txt").read_text()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
