"""Does it help to be told what similar decisions brought, or what a model of outcomes expects?

    python benchmarks/opinion.py --settlement simulated                               # the sample; minutes on 2 cores
    python benchmarks/opinion.py --data_files 'runs/*.csv' --settlement teacher
    python benchmarks/opinion.py --settlement simulated --exit_style hold_to_expiry --folds 1 --seeds 0 1 2

Walking forward, each policy is fitted on what was settled before a block of decision times, and decides on it. It is
told of the market's context and, beside it, of nothing more, of analogues, or of the opinions of Q-scorers that were
themselves walked forward (in more folds, so that the past of the first block has some). What policies and columns of
the table are is said in benchmarks/context.py.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from context import Q_SCORER, Judged, add_walk, cells_of, judge  # noqa: E402

from covered_call import atomic  # noqa: E402
from covered_call.candidates.builder import Backtest, find_csvs  # noqa: E402
from covered_call.candidates.options import CoveredCallCandidatesConfig  # noqa: E402
from covered_call.tables import align  # noqa: E402
from covered_call.value_model.opinions import opinions_file  # noqa: E402
from covered_call.value_model.walk_forward import walk_forward  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    logging.getLogger("covered_call").setLevel(logging.ERROR)
    args = parse_arguments(arguments)
    files = find_csvs(args.data_files, None, str(Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "opinions.parquet"
        entries = Backtest(files, options_of(args)).logged
        walked = [(fold.fitted, fold.entries) for fold in walk_forward(entries, args.opinion_folds, options_of(args))]
        content, rows = opinions_file(walked)
        atomic.write(path, content)
        candidates = sum(len(entry.decision.candidates) for entry in entries)
        print(f"Opinions on {rows:,} of {candidates:,} candidates, by {len(walked)} scorers.\n", flush=True)
        levels = {"none": {}, "analogues": {"analogues": True}, "opinion": {"opinions": str(path)}}
        found: dict[tuple[str, str], Judged] = {}
        for level, told in levels.items():
            for policy, judged in judge(files, options_of(args, **told), args, level).items():
                if policy != Q_SCORER or level != "opinion":  # a Q-scorer is told no opinion
                    found[policy, level] = judged
    found = {key: found[key] for key in sorted(found, key=lambda key: key[0])}
    print(align(cells_of(found)), flush=True)


def options_of(args: argparse.Namespace, **told) -> CoveredCallCandidatesConfig:
    return CoveredCallCandidatesConfig(
        splits="train", context="spot", exit_style=args.exit_style, settlement=args.settlement, **told
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", nargs="+", metavar="CSV", help="default: the sample")
    parser.add_argument("--settlement", required=True, help="teacher, intrinsic, simulated or recorded")
    parser.add_argument("--exit_style", help="default: all")
    parser.add_argument("--opinion_folds", type=int, default=11, metavar="N",
        help="blocks of time of the opinions; default: %(default)s")  # fmt: skip
    add_walk(parser, "out/opinion")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
