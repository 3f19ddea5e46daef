"""Rows per second and memory of loading a large candidate file, beside load_dataset("csv").map(...).

    python benchmarks/loading_speed.py [--rows 300000]

Each contender runs in a process of its own with an empty cache. The plain one renders the same prompts row by row;
it checks nothing, cannot group a decision's rows, and makes one split.
"""

import argparse
import csv
import datetime
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call.candidates.builder import load_candidates  # noqa: E402
from covered_call.candidates.prompts import candidate_messages  # noqa: E402
from covered_call.candidates.schema import COLUMNS, SELL_CALL, SKIP, Candidate, Decision  # noqa: E402


def write_csv(path: str, rows: int, candidates: int = 5) -> None:
    """An hourly backtest with five candidates a decision; the first is sold."""
    draw, start = random.Random(0), datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in range(rows):
            decision, place = divmod(row, candidates)
            at, spot, strike = start + datetime.timedelta(hours=decision), 50000.0 + decision, 52000.0 + 1000 * place
            expiry = at + datetime.timedelta(days=7)
            outcome = [draw.gauss(0, 1000), draw.gauss(0, 500), draw.uniform(0, 10)] if place == 0 else [0.0, 0.0, 0.0]
            writer.writerow(
                [at.isoformat(), "BTC", spot, f"BTC-{expiry:%d%b%y}-{strike:.0f}-C".upper(), strike, 7.0]
                + [draw.uniform(0.1, 0.4), draw.uniform(0, 6), draw.uniform(0.4, 0.9), draw.uniform(0.7, 1.5)]
                + ["hold_to_expiry", 1, int(place == 0), SKIP if place else SELL_CALL, "", *outcome]
            )


def load_package(path: str, cache: str) -> int:
    return sum(load_candidates(data_files=path, cache_dir=cache, purge=False).num_rows.values())


def load_plain(path: str, cache: str) -> int:
    table = datasets.load_dataset("csv", data_files=path, cache_dir=cache, split="train")
    return table.map(render).num_rows


def render(row: dict) -> dict:
    candidate = Candidate(*(row[name] for name in Candidate._fields))
    at = pd.Timestamp(row["decision_time"]).to_pydatetime()
    decision = Decision(at, row["underlying"], row["exit_style"], row["spot"], (candidate,))
    return {"messages": [*candidate_messages(decision, candidate), {"role": "assistant", "content": row["action"]}]}


CONTENDERS = {"load_candidates": load_package, 'load_dataset("csv").map': load_plain}


def measure(name: str, path: str) -> dict:
    """Runs one contender in its own process; it prints its figures as JSON."""
    command = [sys.executable, "-W", "ignore", __file__, "--contender", name, "--csv", path]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def contend(name: str, path: str) -> None:
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        rows = CONTENDERS[name](path, cache)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": rows, "seconds": seconds, "peak_mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000, help="of the file; default: %(default)s")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--csv", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        return contend(args.contender, args.csv)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "training_candidates_BTC.csv")
        write_csv(path, args.rows)
        print(f"datasets {datasets.__version__}, {args.rows} rows, {Path(path).stat().st_size / 2**20:.0f} MiB\n")
        print("| | rows/s | seconds | peak resident MiB |\n|---|---|---|---|")
        for name in CONTENDERS:
            result = measure(name, path)
            print(
                f"| `{name}` | {result['rows'] / result['seconds']:,.0f} | {result['seconds']:.1f} "
                f"| {result['peak_mib']:.0f} |"
            )


if __name__ == "__main__":
    main()
