"""CPU seconds, seconds and memory of loading a large candidate file, beside what one would write first.

    python benchmarks/loading_speed.py                                 # both configs of chats, beside plain ways
    python benchmarks/loading_speed.py --work q_values stream export --beside ../older      # and another checkout
    python benchmarks/loading_speed.py --work per_candidate --only here --rows 30000000 --rounds 1

Each contender runs in a process of its own with an empty cache, in turns with the others; of its rounds the least
counts. "csv + map" is load_dataset("csv") and a map that renders the same prompts row by row; "generator" is a
builder that reads rows with the csv module and yields the same chats. Neither checks anything, knows outcomes or makes
splits, and csv + map cannot even group a decision's rows, so that it has no ranking.
"""

import argparse
import collections
import contextlib
import csv
import datetime
import importlib
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOADED = ("per_candidate", "per_decision_ranking", "q_values", "preference")
TP_AND_ROLL = ("tp_and_roll",)  # per_candidate of a file of that exit style
FIRST, DOUBTED = "first_record", "one_odd_cell"  # of a stream of all; per_candidate of a file that Arrow cannot read
WORKS = (*LOADED, *TP_AND_ROLL, DOUBTED, "export", "stream", FIRST, "evaluate")
VERBS = {"export": "covered_call.candidates.export", "evaluate": "covered_call.evaluation.evaluate"}
CHATS = ("per_candidate", "per_decision_ranking")
COLUMNS = (
    "decision_time", "underlying", "spot", "instrument", "strike", "dte", "delta", "score", "iv", "ivrv_ratio",
    "exit_style", "trade_executed", "chosen", "action", "strategy", "reward", "pnl_vs_hodl", "max_drawdown_pct",
)  # fmt: skip


def write_csv(path: str, rows: int, exit_style: str = "hold_to_expiry", candidates: int = 5) -> None:
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
                + [exit_style, 1, int(place == 0), "SKIP" if place else "SELL_CALL", "", *outcome]
            )


def write_oddly(path: Path) -> None:
    """A name in the middle of the file gets a blank."""
    lines = path.read_text().splitlines(keepends=True)
    cells = lines[len(lines) // 2].split(",")
    cells[COLUMNS.index("underlying")] = " BTC"
    lines[len(lines) // 2] = ",".join(cells)
    path.write_text("".join(lines))


# --- The contenders: each returns how many records, or decisions, it has made


def load(work: str, path: str, folder: str) -> int:
    from covered_call.candidates.builder import load_candidates

    name = "per_candidate" if work in (*TP_AND_ROLL, DOUBTED) else work
    return sum(load_candidates(name, data_files=path, cache_dir=folder, purge=False).num_rows.values())


def stream(path: str, folder: str) -> int:
    from covered_call.candidates.builder import load_candidates

    return sum(1 for _ in load_candidates(data_files=path, cache_dir=folder, streaming=True, splits="train")["train"])


def first_record(path: str, folder: str) -> int:
    from covered_call.candidates.builder import load_candidates

    next(iter(load_candidates(data_files=path, cache_dir=folder, streaming=True, splits="train")["train"]))
    return 1


def keys_alone(work: str, path: str, folder: str) -> int:
    """Reads no more than which decision each row belongs to."""
    import pyarrow.csv

    keys = pyarrow.csv.ConvertOptions(include_columns=["decision_time", "underlying", "exit_style"])
    return sum(map(len, pyarrow.csv.open_csv(path, convert_options=keys)))


def run_verb(verb: str, *words: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        importlib.import_module(VERBS[verb]).main(list(words))
    return 0


def here(work: str, path: str, folder: str) -> int:
    if work == "stream":
        return stream(path, folder)
    if work == FIRST:
        return first_record(path, folder)
    if work == "export":
        return run_verb("export", "--input", path, "--output_dir", folder)
    if work == "evaluate":
        return run_verb("evaluate", "--baselines-only", "--data_files", path, "--output_dir", folder)
    return load(work, path, folder)


def csv_and_map(work: str, path: str, folder: str) -> int:
    import datasets

    table = datasets.load_dataset("csv", data_files=path, cache_dir=folder, split="train")
    return table.map(lambda row: {"messages": chat_of(work, [row])}).num_rows


def generator(work: str, path: str, folder: str) -> int:
    import datasets

    return datasets.Dataset.from_generator(
        lambda: naive_records(work, path), features=features_of(work), cache_dir=folder
    ).num_rows


def naive_records(work: str, path: str) -> Iterator[dict]:
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        for _, its in itertools.groupby(rows, key=lambda row: (row["decision_time"], row["underlying"])):
            decision = list(its)
            for asked in [decision] if work == "per_decision_ranking" else [[row] for row in decision]:
                yield {"messages": chat_of(work, asked)} | {name: asked[0][name] for name in COLUMNS[:4]}


def features_of(work: str):
    import datasets

    text = datasets.Value("string")
    return datasets.Features({"messages": [{"role": text, "content": text}], **dict.fromkeys(COLUMNS[:4], text)})


def chat_of(work: str, rows: list[dict]) -> list[dict]:
    from covered_call.candidates.prompts import candidate_messages, ranking_messages
    from covered_call.candidates.schema import Candidate, Decision

    candidates = tuple(
        Candidate(row["instrument"], *(float(row[name]) for name in Candidate._fields[1:])) for row in rows
    )
    at = datetime.datetime.fromisoformat(str(rows[0]["decision_time"]))
    decision = Decision(at, rows[0]["underlying"], rows[0]["exit_style"], float(rows[0]["spot"]), candidates)
    if work == "per_decision_ranking":
        sold = [place for place, row in enumerate(rows, start=1) if str(row["chosen"]) == "1"]
        asked, answer = ranking_messages(decision), str(sold[0]) if sold else "NO_TRADE"
    else:
        asked, answer = candidate_messages(decision, candidates[0]), rows[0]["action"]
    return [*asked, {"role": "assistant", "content": answer}]


CONTENDERS = {"here": here, "generator": generator, "csv + map": csv_and_map, "keys alone": keys_alone}


def contenders_of(work: str, args: argparse.Namespace) -> list[str]:
    names = ["here"] + (["beside"] if args.beside else [])
    names += ["generator"] if work in CHATS else []
    names += ["csv + map"] if work == "per_candidate" else []
    names += ["keys alone"] if work == FIRST else []
    return [name for name in names if not args.only or name in args.only]


# --- Measuring


def contend(args: argparse.Namespace) -> None:
    """In a process of its own: prints what the work took as JSON."""
    import datasets

    datasets.disable_progress_bars()
    importlib.import_module(VERBS.get(args.work[0], "covered_call.candidates.builder"))  # is not what is measured
    run = CONTENDERS.get(args.contender, here)
    with tempfile.TemporaryDirectory() as folder:
        began, used = time.perf_counter(), cpu_seconds()
        records = run(args.work[0], args.csv, folder)
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - used
    print(json.dumps({"records": records, "seconds": seconds, "cpu": cpu, "peak_mib": peak_mib()}))


def peak_mib() -> float:
    """What this process has held at most. Not its ru_maxrss, which begins with what its parent has held."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def cpu_seconds() -> float:
    return sum(os.times()[:4])


def measure(work: str, contender: str, path: str, args: argparse.Namespace) -> dict:
    checkout = args.beside if contender == "beside" else ROOT
    command = [sys.executable, "-W", "ignore", Path(__file__).resolve(), "--work", work, "--contender", contender]
    environment = os.environ | {"PYTHONPATH": str(Path(checkout).resolve()), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:  # of another checkout the lock files are its own
        done = subprocess.run([*command, "--csv", path], capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        sys.exit(f"{contender}, {work}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000, help="of the file; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of all contenders, in turns; default: %(default)s")
    parser.add_argument(
        "--work", nargs="+", choices=WORKS, default=list(CHATS), help=f"of {', '.join(WORKS)}; default: {CHATS}"
    )
    parser.add_argument("--beside", metavar="DIR", help="another checkout, whose package is a contender too")
    parser.add_argument("--only", nargs="+", choices=[*CONTENDERS, "beside"], help="these contenders alone")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--csv", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.contender:
        return contend(args)
    import datasets

    print(f"datasets {datasets.__version__}, {args.rows:,} rows, the least of {args.rounds} rounds\n")
    print("| work | contender | CPU seconds | here is faster by | seconds | peak resident MiB |\n" + "|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for work in args.work:
            style = "tp_and_roll" if work in TP_AND_ROLL else "hold_to_expiry"
            path = Path(folder) / f"training_candidates_BTC_{style}{'_odd' if work == DOUBTED else ''}.csv"
            if not path.exists():
                write_csv(str(path), args.rows, style)
                if work == DOUBTED:
                    write_oddly(path)
            compare(work, str(path), args)


def compare(work: str, path: str, args: argparse.Namespace) -> None:
    found = collections.defaultdict(list)
    for _ in range(args.rounds):
        for name in contenders_of(work, args):
            found[name].append(measure(work, name, path, args))
    least = {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    for name, run in least.items():
        ratio = f"{run['cpu'] / least['here']['cpu']:.1f}x" if "here" in least else ""
        print(
            f"| {work} | {name} | {run['cpu']:.1f} | {ratio} | {run['seconds']:.1f} | {run['peak_mib']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
