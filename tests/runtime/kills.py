"""Paper runs of the command that are killed at random moments, each by a fork of this process, which imports once.

python tests/runtime/kills.py FOLDER KILLS SEED
"""

import datetime
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from covered_call.runtime import agent
from covered_call.runtime.journal import plain, read
from covered_call.runtime.paper import rebuilt

HOURS = 400  # snapshots of a run, an hour apart
CONFIG = """\
policy: {rule: {threshold: 0.0}}
holdings: {BTC: 1.0}
exit: others_live
risk: {max_positions: 5, max_spread_pct: 10, without: [stale, consecutive_losses, win_rate, dd_buffer]}
"""


def write_inputs(folder: Path) -> None:
    """A configuration, and snapshots over which calls are sold, rolled and settled while the price wanders."""
    from market.quotes import NOW, as_history, quote, write_harvest

    rows = []
    for hour in range(HOURS):
        moment = NOW + datetime.timedelta(hours=hour)
        forward = 93_000.0 + 250.0 * (hour % 40)
        names = [f"BTC-{day}-{strike}-C" for day, end in EXPIRIES.items() if end > moment for strike in STRIKES]
        rows += as_history([quote(name, forward=forward, time=moment) for name in names], moment, forward)
    write_harvest(folder / "chains.parquet", rows)
    (folder / "agent.yaml").write_text(CONFIG)


STRIKES = range(94_000, 106_000, 2_000)
EXPIRIES = {
    f"{day}DEC25": datetime.datetime(2025, 12, day, 8, tzinfo=datetime.UTC) for day in (12, 16, 19, 23, 26, 31)
}


def start(folder: Path, log: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(folder)
        agent.main(["paper", "--config", "agent.yaml", "--snapshot", "chains.parquet", "--log", log])
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(code)


def check(log: Path) -> dict[str, int]:
    """That the log is readable, that the portfolio of its events is the one that the agent had in memory, and that no
    order was done twice. Returns counts; "halves" are cycles of which some orders were done and others abandoned."""
    lines, cycle, ended, statuses = list(read(log)), {}, {}, {}
    counts = {"cycles": 0, "orders": 0, "abandoned": 0}
    for number, line in enumerate(lines):
        if "completes" not in line:
            counts["cycles"] += 1
            cycle[line["decision_id"]] = number  # one that was abandoned is decided again
            if number % 25 == 0 or number > len(lines) - 5:
                portfolio, _ = rebuilt(lines[: number + 1])
                owned = plain(portfolio._replace(trades=())._asdict() | {"trades": len(portfolio.trades)})
                assert owned == line["portfolio"], (line["decision_id"], owned, line["portfolio"])
            continue
        status, key = line["execution"]["status"], (cycle[line["completes"]], line["order"])
        assert key not in ended and line["order"] < lines[key[0]]["orders"], f"{line} is of no order, or a second one"
        ended[key] = status
        statuses.setdefault(key[0], set()).add(status == "abandoned")
        counts["abandoned" if status == "abandoned" else "orders"] += 1
    for decision in {line["decision_id"] for line in lines if "decision_id" in line}:
        its = [number for number, line in enumerate(lines) if line.get("decision_id") == decision]
        assert all(True in statuses[number] for number in its[:-1]), f"{decision} was decided twice"
    return counts | {"halves": sum(len(one) == 2 for one in statuses.values())}


def kill(child: int, log: Path, wait: float, at_an_order: bool) -> bool:
    """After so many seconds, or already when an order is under way. Whether it was at work: one that had come to its
    end was not."""
    end = time.monotonic() + wait
    while time.monotonic() < end and not (at_an_order and under_way(log)):
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def under_way(log: Path) -> bool:
    """Whether the last whole line is of a cycle whose orders are not all completed, by its first bytes and last."""
    *_, path = ["", *sorted(map(str, log.glob("decisions_*.jsonl")))]
    if not path:
        return False
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 50_000))
        *_, last, torn = [b"", *file.read().split(b"\n")]
    return not torn and b'"orders": 0' not in last and b'"decision_id"' in last


def main(folder: Path, kills: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder)
    draw, done, run, inside = random.Random(seed), 0, 0, 0
    longest = 0.3
    while done < kills:
        log = folder / f"log{run}"
        before = sum(1 for _ in read(log))
        at_an_order = draw.random() < 0.5
        if not kill(start(folder, log.name), log, 5.0 if at_an_order else draw.uniform(0.05, longest), at_an_order):
            run += 1  # it came to its end: a new one
            continue
        done += 1
        if log.exists():
            inside += check(log)["cycles"] > 0
        longest = min(3.0, longest * 1.5) if sum(1 for _ in read(log)) == before else max(0.3, longest * 0.9)
    for log in ("whole", f"log{run}"):  # one that nobody killed, and what was killed goes on to the end
        assert os.waitpid(start(folder, log), 0)[1] == 0, (folder / "said.txt").read_text()[-2000:]
    whole, killed = (rebuilt(read(folder / name))[0] for name in ("whole", f"log{run}"))
    counts = check(folder / f"log{run}")
    if not counts["halves"]:  # else a roll ended between its two orders, and what is held is another
        assert whole == killed, "the portfolio is not the one of a run that nobody killed"
    print(json.dumps({"kills": done, "inside": inside, "runs": run + 1, "trades": len(whole.trades), **counts}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
