"""Does it help to know the market? What learns with no context, with spots, and with the market's vol beside them.

    python benchmarks/context.py                                        # the sample; minutes on 2 cores
    python benchmarks/context.py --data_files 'runs/*.csv' --context_vols 'vols/dvol_{underlying}_daily.csv'

Walking forward, each policy is fitted on what was settled before a block of decision times, and decides on it:

    logistic regression, gradient boosting     imitate the teacher, from the numbers that its prompts tell
    Q-scorer                                   learns what selling brings, and sells what it expects to pay

The answers are held against the teacher's (balanced accuracy: recall of each answer, averaged), and paid in P&L vs
HODL, USD a unit of underlying a decision: as the files say, and with --context_vols at the market's vol, too.
Intervals are of 95 %, from a moving-block bootstrap of the decision times. Nothing here is random but that: another
seed changes nothing.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call import resampling  # noqa: E402
from covered_call.candidates.builder import Backtest, find_csvs  # noqa: E402
from covered_call.candidates.columns import Columns, columns_of, label_ends  # noqa: E402
from covered_call.candidates.options import CoveredCallCandidatesConfig  # noqa: E402
from covered_call.candidates.preferences import at  # noqa: E402
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
    prices = {"the files' vol": {}}
    if args.context_vols:
        levels["spot, dvol"] = {"context": "spot", "context_vols": args.context_vols}
        prices["the market's vol"] = {"iv_file": args.context_vols}
    for price, how in prices.items():
        found = {}
        for level, told in levels.items():
            options = CoveredCallCandidatesConfig(
                splits="train", exit_style=args.exit_style, fee=args.fee, half_spread=args.half_spread, **how, **told
            )
            for policy, judged in judge(files, options, args.folds).items():
                found[policy, level] = judged
        print(f"Paid at {price}\n\n{align(cells_of(found))}\n", flush=True)


def judge(files: list[str], options: CoveredCallCandidatesConfig, folds: int) -> dict[str, Judged]:
    """Of each policy its picks in all blocks."""
    entries = Backtest(files, options).logged
    parts: dict[str, list[Judged]] = {policy: [] for policy in (*IMITATORS, Q_SCORER)}
    for past, block in blocks(entries, folds):
        rules, columns = fit_baselines(columns_of(past)), columns_of(block)
        for policy in IMITATORS:
            parts[policy].append(judged_of(columns, rules[policy].picks(columns), options))
    for fold in walk_forward(entries, folds, dataclasses.replace(options)):
        parts[Q_SCORER].append(judged_of(columns_of(fold.entries), fold.picks, options))
    return {policy: Judged(*map(np.concatenate, zip(*its, strict=True))) for policy, its in parts.items()}


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
    times, place = np.unique(judged.time[known], return_inverse=True)
    ends = np.zeros(len(times), np.int64)
    np.maximum.at(ends, place, judged.ends[known])
    sums = np.stack([np.bincount(place, values[known]), np.bincount(place)], 1)
    drawn = resampling.draw(len(times), resampling.block_length(times, ends))
    text = f"{values[known].mean():+,.1f}"
    if drawn is None:
        return text
    total, count = drawn.sums(sums).T
    low, high = np.quantile(total / count, [0.025, 0.975])
    return f"{text} [{low:+,.1f}, {high:+,.1f}]"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", nargs="+", metavar="CSV", help="default: the sample")
    parser.add_argument("--context_vols", metavar="CSV", help="the market's vols, {underlying} in the name for each")
    parser.add_argument("--exit_style", help="default: all")
    parser.add_argument(
        "--folds", type=int, default=5, metavar="N", help="blocks of time of the walk forward; default: %(default)s"
    )
    parser.add_argument("--fee", type=float, default=0.0, metavar="SHARE", help="of each trade; default: 0")
    parser.add_argument("--half_spread", type=float, default=0.0, metavar="SHARE", help="of the price; default: 0")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
