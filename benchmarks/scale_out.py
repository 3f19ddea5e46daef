"""Rows a second of `covered-call export --engine ray` on one node and on two of one CPU each, all on this machine.

    pip install 'covered-call-candidates[ray]'
    python benchmarks/scale_out.py
    python benchmarks/scale_out.py --rows 1000000 --files 100 --exit_style tp_and_roll

The files are of as many underlyings, side by side in time, five candidates a decision. Both configs of chats are
rendered. Each measurement runs in a process of its own. CPU seconds are those of the tasks, and of the head's process:
unlike rows a second they do not depend on what else the machine does.
"""

import argparse
import collections
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loading_speed import peak_mib, write_csv

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    "| nodes | start-up, s | reading, s | head, s | rendering, s | rows/s | CPU µs a row: reading | head | rendering "
    "| peak MiB: head | worker | bytes a row: work | Parquet |"
)
PHASES = ("scan_here", "render")


def write_files(folder: Path, rows: int, files: int, exit_style: str) -> int:
    """Returns how many bytes they have."""
    one = folder / "one.csv"
    write_csv(str(one), rows // files, exit_style)
    text = one.read_text()
    one.unlink()
    return sum(
        (folder / f"training_candidates_U{number:04}.csv").write_text(text.replace("BTC", f"U{number:04}"))
        for number in range(files)
    )


def measure(args: argparse.Namespace) -> dict:
    """In a process of its own: what one export takes on so many nodes."""
    import ray
    from ray.cluster_utils import Cluster

    from covered_call.candidates.options import CoveredCallCandidatesConfig
    from covered_call.candidates.scale_out import RayCluster, export_parquet

    class Timed(RayCluster):
        cpu, seconds, worker = collections.Counter(), collections.Counter(), 0.0

        def each(self, function, calls):
            def timed(*call):
                used = time.process_time()
                result = function(*call)
                return result, time.process_time() - used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

            began = time.perf_counter()
            for call, (result, cpu, peak) in super().each(timed, calls):
                self.cpu[function.__name__] += cpu
                self.worker = max(self.worker, peak / 1024)
                yield call, result
            self.seconds[function.__name__] = time.perf_counter() - began

    def ready():
        import covered_call.candidates.scale_out  # noqa: F401  # what a node's first task waits for

        time.sleep(1)

    began = time.perf_counter()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(args.nodes[0] - 1):
        nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, logging_level="warning")
    cluster = Timed()
    ray.get([ray.remote(ready).remote() for _ in range(args.nodes[0])])
    start_up = time.perf_counter() - began - 1
    folder = Path(args.folder)
    try:
        began, used = time.perf_counter(), time.process_time()
        paths = sorted(map(str, folder.glob("*.csv")))
        options = CoveredCallCandidatesConfig(exit_style=args.exit_style)
        with tempfile.TemporaryDirectory(dir=folder) as out:
            sizes = watch_work(cluster, out)
            export_parquet(paths, out, options, cluster)
            parquet = sum(path.stat().st_size for path in Path(out).rglob("*.parquet"))
        seconds = time.perf_counter() - began
    finally:
        ray.shutdown()
        nodes.shutdown()
    return {
        "start_up": start_up, "seconds": seconds, "head_cpu": time.process_time() - used,
        **{f"{name}_cpu": cluster.cpu[name] for name in PHASES},
        **{f"{name}_seconds": cluster.seconds[name] for name in PHASES},
        "head_mib": peak_mib(), "worker_mib": cluster.worker,
        "work": max(sizes), "parquet": parquet,
    }  # fmt: skip


def watch_work(cluster, out: str) -> list[int]:
    """Takes in the bytes of the folder's work when parts begin to be rendered."""
    sizes, share = [0], cluster.share

    def shared(value):
        sizes.append(sum(path.stat().st_size for path in Path(out).rglob(".work/*")))
        return share(value)

    cluster.share = shared
    return sizes


def measured(args: argparse.Namespace, nodes: int, folder: str) -> dict:
    command = [sys.executable, "-W", "ignore", Path(__file__).resolve(), "--nodes", str(nodes), "--folder", folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_DEDUP_LOGS": "0"}
    command += ["--exit_style", args.exit_style]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{nodes} node(s): {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3_000_000, help="of all files; default: %(default)s")
    parser.add_argument("--files", type=int, default=8, help="an underlying each; default: %(default)s")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], help="of one CPU each; default: 1 2")
    parser.add_argument("--exit_style", default="hold_to_expiry", help="of all files; default: %(default)s")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.folder:
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(args)
        return print(json.dumps(found))
    with tempfile.TemporaryDirectory() as folder:
        size = write_files(Path(folder), args.rows, args.files, args.exit_style)
        said = f"{args.rows:,} rows of {args.exit_style} in {args.files} files ({size / 2**20:,.0f} MiB)"
        print(f"{said}, all nodes on one machine of {os.cpu_count()} CPUs\n\n{HEADER}\n{'|---' * 13}|")
        for nodes in args.nodes:
            print(line_of(nodes, args.rows, measured(args, nodes, folder)), flush=True)


def line_of(nodes: int, rows: int, run: dict) -> str:
    head = run["seconds"] - run["scan_here_seconds"] - run["render_seconds"]
    seconds = [run["start_up"], run["scan_here_seconds"], head, run["render_seconds"]]
    cpu = [run[name] / rows * 1e6 for name in ("scan_here_cpu", "head_cpu", "render_cpu")]
    cells = [
        nodes, *(f"{one:.1f}" for one in seconds), f"{rows / run['seconds']:,.0f}", *(f"{one:.2f}" for one in cpu),
        *(f"{run[name]:,.0f}" for name in ("head_mib", "worker_mib")),
        *(f"{run[name] / rows:.0f}" for name in ("work", "parquet")),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
