"""Agents on the testnet's stand-in that are killed at random moments, each a fork of this process.

python tests/runtime/agent_kills.py URL FOLDER KILLS SEED
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from covered_call.runtime import agent, broker, live, testnet

assert "ccxt" not in sys.modules, "it is an extra: only a client imports it"
import ccxt  # noqa: E402, F401

KEY, SECRET = "AbCdEfGh", "a secret that no message may have"  # as in account.py
CONFIG = """\
policy: {rule: {threshold: 0.0}}
holdings: {BTC: 1000.0}
interval: 1
sizing: {units: 0.3, max_risk_pct: null}
risk:
  max_positions: 9999
  without: [expiry_exposure, net_delta, spread, min_ivrv, no_equity, margin, open_interest, dd_buffer]
broker: {fill_timeout: 0.08, reprices: 2}
"""


def quicken(url: str) -> None:
    """The agent as it is, but that its exchange is on this machine, and quick."""

    def connected() -> testnet.Account:
        account = testnet.Account(KEY, SECRET, standin=url)
        account.api.enableRateLimit = False
        return account

    testnet.connected = connected
    broker.POLL, live.NAP = 0.02, 0.02
    testnet.VALID = broker.VALID = 0.5
    testnet.ON_THE_WAY = broker.ON_THE_WAY = 0.3


def start(folder: Path, cycles: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        words = [
            "--config",
            str(folder / "agent.yaml"),
            "--live",
            "--cycles",
            str(cycles),
            "--log",
            str(folder / "log"),
        ]
        agent.main(["testnet", *words])
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("log/decisions_*.jsonl"))


def kill(child: int, folder: Path, rng: random.Random) -> None:
    """Some moments after the log has grown so many times: a cycle's line is followed by its order."""
    changes, seen, end = rng.randint(0, 5), size_of(folder), time.monotonic() + 15
    while changes and time.monotonic() < end:
        time.sleep(0.001)
        if (now := size_of(folder)) != seen:
            seen, changes = now, changes - 1
    time.sleep(rng.choice([rng.uniform(0, 0.01), rng.uniform(0, 0.3)]))
    os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == -signal.SIGKILL, f"it ended by itself: {(folder / 'said.txt').read_text()[-2000:]}"


def main(url: str, folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    (folder / "agent.yaml").write_text(CONFIG)
    quicken(url)
    for _ in range(kills):
        kill(start(folder, 50), folder, rng)
    assert os.waitpid(start(folder, 1), 0)[1] == 0, (folder / "said.txt").read_text()[-2000:]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
