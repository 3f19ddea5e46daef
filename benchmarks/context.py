"""Does it help to know the market? What learns without a context, with one, and with the market's vol.

    python benchmarks/context.py                                        # the sample; minutes on 2 cores
    python benchmarks/context.py --data_files 'runs/*.csv' --context_vols 'vols/dvol_{underlying}_daily.csv'
    python benchmarks/context.py --exit_style hold_to_expiry --folds 1 --seeds 0 1 2    # the tiny model, too

Walking forward, each policy is fitted on what was settled before a block of decision times, and decides on it:

    logistic regression, gradient boosting     imitate the teacher, from the numbers that its prompts tell
    Q-scorer                                   learns what selling brings, and sells what it expects to pay
    tiny model, one for each of --seeds        imitates the teacher, from the prompts, as in benchmarks/prompts.py

The answers are held against the teacher's (balanced accuracy: recall of each answer, averaged), and paid in P&L vs
HODL, USD a unit of underlying a decision: as the files say, which is at real quotes in those of covered-call backtest,
and with --context_vols at the market's vol, too. USD of several underlyings do not add up: give the files of one. The
intervals are of 95 %, from a moving-block bootstrap of decision times. Nothing else is random, but for the tiny model.

What a tiny model answered is kept in --output_dir, and not asked again.
"""

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from datasets.table import InMemoryTable

sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:2]]

from prompts import STEPS, tiny_answers  # noqa: E402

from covered_call import atomic, resampling  # noqa: E402
from covered_call.candidates.builder import Backtest, find_csvs  # noqa: E402
from covered_call.candidates.columns import Columns, columns_of, label_ends  # noqa: E402
from covered_call.candidates.options import CoveredCallCandidatesConfig  # noqa: E402
from covered_call.candidates.preferences import at  # noqa: E402
from covered_call.candidates.prompts import pick_of  # noqa: E402
from covered_call.candidates.records import ranking_records  # noqa: E402
from covered_call.candidates.schema import CandidatesError  # noqa: E402
from covered_call.evaluation.baselines import fit_baselines  # noqa: E402
from covered_call.tables import align  # noqa: E402
from covered_call.value_model.learning import net_outcomes  # noqa: E402
from covered_call.value_model.walk_forward import blocks, walk_forward  # noqa: E402

IMITATORS = ("logistic regression", "gradient boosting")
Q_SCORER = "Q-scorer"


class Judged(NamedTuple):
    """What a policy picked at D decisions, and what came of it; NaN where that is unknown."""

    time: np.ndarray
    ends: np.ndarray  # of the last price that an outcome rests on
    teacher: np.ndarray
    picks: np.ndarray
    usd: np.ndarray


def main(arguments: list[str] | None = None) -> None:
    logging.getLogger("covered_call").setLevel(logging.ERROR)
    args = parse_arguments(arguments)
    files = find_csvs(args.data_files, None, str(Path(__file__).parents[1]))
    levels = {"none": {}, "spot": {"context": "spot"}}
    prices = {"as the files say": {}}
    if args.context_vols:
        levels["spot, dvol"] = {"context": "spot", "context_vols": args.context_vols}
        prices["at the market's vol"] = {"iv_file": args.context_vols}
    for price, how in prices.items():
        found = {}
        for level, told in levels.items():
            options = CoveredCallCandidatesConfig(
                splits="train", exit_style=args.exit_style, fee=args.fee, half_spread=args.half_spread, **how, **told
            )
            for policy, judged in judge(files, options, args, level.replace(", ", "_")).items():
                found[policy, level] = judged
        print(f"Paid {price}\n\n{align(cells_of(found))}\n", flush=True)


def judge(
    files: list[str], options: CoveredCallCandidatesConfig, args: argparse.Namespace, level: str
) -> dict[str, Judged]:
    """Of each policy its picks in all blocks whose past it can be fitted on.

    Args:
        args: with folds, and the seeds, steps and output_dir of tiny models.
        level: what is told, by the name under which tiny models' answers are kept.
    """
    given = {name: value for name, value in vars(args).items() if name not in ("seeds", "output_dir")}
    digest = hashlib.sha256(json.dumps([files, given]).encode()).hexdigest()
    folder = args.output_dir / digest[:12] / level
    entries = Backtest(files, options).logged
    parts: dict[str, list[Judged]] = {}
    for number, (past, block) in enumerate(blocks(entries, args.folds)):
        known, columns = columns_of(past), columns_of(block)
        try:
            rules = fit_baselines(known)
        except CandidatesError:  # nothing had ended by then: walk_forward leaves such a block out, too
            continue
        picks = {policy: rules[policy].picks(columns) for policy in IMITATORS}
        for seed in args.seeds:
            path = folder / f"{number}-{seed}.json"
            picks[f"tiny model, seed {seed}"] = tiny_picks(known, columns, options, args.steps, seed, path)
        for policy, its in picks.items():
            parts.setdefault(policy, []).append(judged_of(columns, its, options))
    for fold in walk_forward(entries, args.folds, options):
        parts.setdefault(Q_SCORER, []).append(judged_of(columns_of(fold.entries), fold.picks, options))
    return {policy: Judged(*map(np.concatenate, zip(*its, strict=True))) for policy, its in parts.items()}


def tiny_picks(
    past: Columns, block: Columns, options: CoveredCallCandidatesConfig, steps: int, seed: int, path: Path
) -> np.ndarray:
    """(D,) for a block, of a tiny model that was trained on its past; from the file if it is there."""
    if not path.is_file():
        train, judged = (Dataset(InMemoryTable(ranking_records(columns, options))) for columns in (past, block))
        answers = tiny_answers(train, {"block": judged}, steps, seed)["block"]
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, json.dumps(answers))
    picks = map(pick_of, json.loads(path.read_text(encoding="utf-8")))
    return np.array([-1 if pick is None else pick for pick in picks])


def judged_of(columns: Columns, picks: np.ndarray, options: CoveredCallCandidatesConfig) -> Judged:
    usd = at(picks, net_outcomes(columns, options), columns)
    return Judged(columns.time, label_ends(columns), columns.chosen, picks, usd)


def cells_of(found: dict[tuple[str, str], Judged]) -> list[list[str]]:
    """A row a policy and level, decisions whose outcome some level does not know left out of all of the policy's."""
    cells = [["policy", "context", "decisions", "balanced accuracy", "trade rate", "USD a decision", "beside none"]]
    for (policy, level), its in found.items():
        same = [other for (name, _), other in found.items() if name == policy]
        known = np.logical_and.reduce([~np.isnan(one.usd) for one in same])
        gain = its.usd - found[policy, "none"].usd
        cells.append([
            policy, level, f"{known.sum():,} of {len(known):,}", f"{balanced_accuracy(its):.3f}",
            f"{np.mean(its.picks >= 0):.3f}", mean_text(its, its.usd, known),
            "" if level == "none" else mean_text(its, gain, known),
        ])  # fmt: skip
    return cells


def balanced_accuracy(judged: Judged) -> float:
    answers = np.unique(judged.teacher)
    return float(np.mean([np.mean(judged.picks[judged.teacher == one] == one) for one in answers]))


def mean_text(judged: Judged, values: np.ndarray, known: np.ndarray) -> str:
    if not known.any():
        return "unknown"
    times, place, block = resampling.overlaps(judged.time[known], judged.ends[known])
    drawn = resampling.draw(len(times), block)
    text = f"{values[known].mean():+,.1f}"
    if drawn is None:
        return text
    means = resampling.means(values[known], place, drawn)
    low, high = resampling.interval(means, means)
    return f"{text} [{low:+,.1f}, {high:+,.1f}]"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", nargs="+", metavar="CSV", help="default: the sample")
    parser.add_argument("--context_vols", metavar="CSV", help="the market's vols, {underlying} in the name for each")
    parser.add_argument("--exit_style", metavar="STYLE", help="keep these decisions only; default: all")
    parser.add_argument("--fee", type=float, default=0.0, metavar="SHARE", help="of each trade, of spot; default: 0")
    parser.add_argument("--half_spread", type=float, default=0.0, metavar="SHARE", help="of a price; default: 0")
    add_walk(parser, "out/context")
    return parser.parse_args(arguments)


def add_walk(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """What judge takes."""
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="blocks of time; default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], metavar="N", help="of tiny models; default: none")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of a tiny model; default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="default: %(default)s")


if __name__ == "__main__":
    main()
