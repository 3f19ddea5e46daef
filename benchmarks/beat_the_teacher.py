"""Does anything that learns from outcomes earn more than the teacher? A walk-forward over all periods of the files.

    python benchmarks/beat_the_teacher.py                 # the sample, by year; about half an hour on 2 cores
    python benchmarks/beat_the_teacher.py --no_models     # without the language models: a minute
    python benchmarks/beat_the_teacher.py --data_files 'runs/*.csv' --period month --fee 0.0003 --half_spread 0.02

For each period with enough before it, everything is fitted on what was settled before it (the latest 15 % of those
decision times are the validation split) and decides on it: the teacher's own log, the score rule, the Q-scorer, a tiny
Phi-3 that imitates the teacher (SFT), the same one after preference training (SFT + DPO), and the oracle, which sells
whatever turns out best, if anything does. All are paid alike, in counterfactual outcomes: P&L vs HODL in USD a unit of
underlying, net of the costs that are set. Decisions at which the outcome of some candidate is unknown are left out for
all, and counted.

A period that is finished is kept in --output_dir, and not computed again for the same code, data and options.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call import atomic, tuning  # noqa: E402
from covered_call.candidates.builder import Backtest, find_csvs  # noqa: E402
from covered_call.candidates.columns import columns_of, microseconds  # noqa: E402
from covered_call.candidates.options import CoveredCallCandidatesConfig  # noqa: E402
from covered_call.candidates.schema import CandidatesError, LoggedDecision  # noqa: E402
from covered_call.candidates.splits import split_decisions  # noqa: E402
from covered_call.evaluation import resampling  # noqa: E402
from covered_call.evaluation.baselines import score_rule  # noqa: E402
from covered_call.tables import markdown  # noqa: E402
from covered_call.training.runs import RecipeError, TrainingStopped  # noqa: E402
from covered_call.value_model.learning import fit  # noqa: E402
from covered_call.value_model.scorer import QScorer  # noqa: E402

ROOT = Path(__file__).parents[1]
SAMPLE = str(ROOT / "data" / "sample" / "*.csv")
TEACHER, RULE, Q, SFT, DPO, ORACLE = "teacher", "score rule", "Q-scorer", "SFT tiny", "SFT + DPO tiny", "oracle"
# Of the decision times before a period, the latest 15 % are validation, and at least three weeks, for the purge takes
# one. A period with fewer than two months before it is not tested on.
VALIDATION, MIN_VALIDATION, MIN_TIMES = 0.15, 21, 60
COSTS = ("fee", "half_spread", "slippage")
PERIODS = {"year": "%Y", "quarter": None, "month": "%Y-%m"}


class Fold(NamedTuple):
    """A period with the decisions in it, and where the validation split before it begins."""

    name: str
    entries: list[LoggedDecision]
    validation_from: str
    test_from: str


class Played(NamedTuple):
    """What each policy sold in a period (None: nothing), and what each answer would have brought."""

    picks: dict[str, list[int | None]]
    entries: list[LoggedDecision]
    unknown: int


def period_of(entry: LoggedDecision, period: str) -> str:
    time = entry.decision.decision_time
    return f"{time.year}-Q{(time.month + 2) // 3}" if period == "quarter" else time.strftime(PERIODS[period])


def make_folds(logged: list[LoggedDecision], period: str) -> Iterator[Fold]:
    """Each period with at least MIN_TIMES decision times before it."""
    for name in sorted({period_of(entry, period) for entry in logged}):
        entries = [entry for entry in logged if period_of(entry, period) == name]
        begins = entries[0].decision.decision_time
        before = sorted({e.decision.decision_time for e in logged if e.decision.decision_time < begins})
        if len(before) >= MIN_TIMES:
            validation = max(MIN_VALIDATION, len(before) - round(len(before) * (1 - VALIDATION)))
            yield Fold(name, entries, before[-validation].isoformat(), begins.isoformat())


def decide(fold: Fold, backtest: Backtest, args: argparse.Namespace) -> dict[str, list[int | None]]:
    """The picks of each policy on the fold's decisions, fitted on what lies before them."""
    config = make_config(args, validation_from=fold.validation_from, test_from=fold.test_from)
    splits = split_decisions(backtest.logged, config)
    decisions = [entry.decision for entry in fold.entries]
    scorer = QScorer(fit(splits["train"], splits["validation"], config))
    picks = {
        TEACHER: [entry.chosen for entry in fold.entries],
        RULE: [
            None if pick < 0 else pick
            for pick in score_rule(columns_of(splits["train"])).picks(columns_of(fold.entries)).tolist()
        ],
        Q: [answer.pick for answer in scorer.decide(decisions)],
    }
    if args.models:
        from covered_call.language_model.policy import Policy  # only here: the others need no torch

        sft, dpo = (Path(args.output_dir) / "models" / fold.name / name for name in ("sft", "dpo"))
        train(fold, args, backtest.files, sft, dpo)
        for name, folder in ((SFT, sft), (DPO, dpo)):
            picks[name] = [answer.pick for answer in Policy.load(folder).decide(decisions)]
    return picks


def train(fold: Fold, args: argparse.Namespace, files: list[str], sft: Path, dpo: Path) -> None:
    """A tiny Phi-3 tuned to rank as the teacher did, and then on preferences; each in a minute or two."""
    data = ["--data_files", *files, "--exit_style", args.exit_style]
    data += ["--validation_from", fold.validation_from, "--test_from", fold.test_from]
    common = ["--overwrite_output_dir", "--seed", str(args.seed), "--report_to", "none", "--disable_tqdm", "true"]
    base = ["--config", "tiny", "--dataset_config", "per_decision_ranking", "--balance", "none"]
    tuning.run("sft", [*base, *data, *common, "--max_steps", str(args.sft_steps), "--output_dir", str(sft)])
    costs = [word for name in COSTS for word in (f"--{name}", str(getattr(args, name)))]
    preferences = ["--config", "tiny_dpo", "--adapter", str(sft), "--max_steps", str(args.dpo_steps)]
    tuning.run("dpo", [*preferences, *data, *costs, *common, "--output_dir", str(dpo)])


def make_config(args: argparse.Namespace, **options) -> CoveredCallCandidatesConfig:
    costs = {name: getattr(args, name) for name in COSTS}
    return CoveredCallCandidatesConfig(exit_style=args.exit_style, **costs, **options)


def code_hash(root: Path) -> str:
    """SHA-256 of all that a fold's picks are made by: this file, the package and its recipes, with their names."""
    parts = (("benchmarks", "beat_the_teacher.py"), ("covered_call", "**/*.py"), ("configs", "**/*.yaml"))
    paths = [path for folder, pattern in parts for path in sorted((root / folder).glob(pattern))]
    found = hashlib.sha256()
    for path in paths:
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def play(fold: Fold, backtest: Backtest, args: argparse.Namespace) -> Played:
    """The fold's picks, from a file if they were computed before."""
    path = Path(args.output_dir) / f"{fold.name}.json"
    settings = {
        **{name: getattr(args, name) for name in ("exit_style", "models", "sft_steps", "dpo_steps", "seed", *COSTS)},
        "files": list(backtest.hashes.values()),
        "code": code_hash(ROOT),
        "fold": [fold.validation_from, fold.test_from],
    }
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("settings") != settings:
        kept = {"settings": settings, "picks": decide(fold, backtest, args)}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, json.dumps(kept))
    known = [
        all(counterfactual.pnl_vs_hodl is not None for counterfactual in entry.counterfactuals)
        for entry in fold.entries
    ]
    picks = {
        name: [pick for pick, keep in zip(made, known, strict=True) if keep] for name, made in kept["picks"].items()
    }
    entries = [entry for entry, keep in zip(fold.entries, known, strict=True) if keep]
    picks[ORACLE] = [best_in_hindsight(entry) for entry in entries]
    return Played(picks, entries, known.count(False))


def best_in_hindsight(entry: LoggedDecision) -> int | None:
    worth = [counterfactual.pnl_vs_hodl for counterfactual in entry.counterfactuals]
    return int(np.argmax(worth)) if worth and max(worth) > 0 else None


def paid(entries: list[LoggedDecision], picks: list[int | None]) -> np.ndarray:
    """P&L vs HODL of each decision in USD, shape (decisions,)."""
    return np.array(
        [0.0 if p is None else e.counterfactuals[p].pnl_vs_hodl for e, p in zip(entries, picks, strict=True)]
    )


def with_interval(pnl: np.ndarray, block: int) -> str:
    """Mean, and its 95 % interval by the moving-block bootstrap of an evaluation."""
    draws = resampling.draw(len(pnl), block)
    if draws is None:
        return f"{pnl.mean():,.1f}"
    means = draws.sums(pnl[:, None])[:, 0] / len(pnl)
    low, high = resampling.interval(means, means)
    return f"{pnl.mean():,.1f} [{low:,.1f}, {high:,.1f}]"


def table(played: dict[str, Played], block: int) -> str:
    entries = [entry for one in played.values() for entry in one.entries]
    picks = {
        name: [p for one in played.values() for p in one.picks[name]] for name in next(iter(played.values())).picks
    }
    pnl = {name: paid(entries, made) for name, made in picks.items()}
    cells = [["", "trade rate", "all", "minus teacher", *played]]
    for name in sorted(pnl, key=lambda name: -pnl[name].mean()):
        trade_rate = np.mean([pick is not None for pick in picks[name]])
        by_period = [f"{paid(one.entries, one.picks[name]).mean():,.1f}" for one in played.values()]
        differs = "" if name == TEACHER else with_interval(pnl[name] - pnl[TEACHER], block)
        cells.append([name, f"{trade_rate:.3f}", with_interval(pnl[name], block), differs, *by_period])
    unknown = sum(one.unknown for one in played.values())
    percent = [
        100 * counterfactual.pnl_vs_hodl / entry.decision.spot
        for entry in entries
        for counterfactual in entry.counterfactuals
    ]
    counts = ", ".join(f"{name} {len(one.entries)}" for name, one in played.items())
    return "\n".join(
        [
            markdown(cells),
            f"\nMean P&L vs HODL a decision, USD a unit of underlying, on {len(entries):,} decisions ({counts}); "
            f"{unknown} more with an unknown outcome are left out. 95 % intervals by blocks of {block} decisions.",
            f"All {len(percent):,} candidates: {np.mean(percent):+.2f} % of spot on average, standard deviation "
            f"{np.std(percent):.2f}.",
        ]
    )


def draw(played: dict[str, Played], path: Path) -> None:
    """Cumulative P&L vs HODL; the oracle, far above, on an axis of its own below."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    entries = [entry for one in played.values() for entry in one.entries]
    times = [entry.decision.decision_time for entry in entries]
    for name in next(iter(played.values())).picks:
        curve = paid(entries, [pick for one in played.values() for pick in one.picks[name]]).cumsum()
        axis = below if name == ORACLE else above
        style = {"color": "grey", "linewidth": 4, "alpha": 0.5} if name == TEACHER else {"linewidth": 1.2}
        axis.plot(times, curve, label=name, **style)
    for axis in (above, below):
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    above.set_ylabel("cumulative P&L vs HODL (USD)")
    below.set_ylabel("(USD)")
    above.set_title("Walk-forward, each period decided by what was fitted before it; never selling is 0")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config = make_config(args)
    config.check()
    backtest = Backtest(find_csvs(args.data_files, None, ""), config)
    folds = list(make_folds(backtest.logged, args.period))
    if not folds:
        sys.exit(
            f"error: no {args.period} has {MIN_TIMES} decision times before it: give more data or a shorter period."
        )
    played = {}
    for fold in folds:
        print(f"{fold.name}: {len(fold.entries)} decisions, fitted on what lies before {fold.test_from}", flush=True)
        played[fold.name] = play(fold, backtest, args)
    played = {name: one for name, one in played.items() if one.entries}
    entries = [entry for one in played.values() for entry in one.entries]
    spans = [(microseconds(entry.decision.decision_time), microseconds(entry.label_end)) for entry in entries]
    block = resampling.block_length(*np.array(spans).T)
    draw(played, Path(args.output_dir) / "equity.png")
    print(f"\n{table(played, block)}\n\nPlot in {args.output_dir}/equity.png")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", nargs="+", default=[SAMPLE], help="default: the sample")
    parser.add_argument("--exit_style", default="hold_to_expiry", help="default: %(default)s")
    parser.add_argument("--period", choices=PERIODS, default="year", help="default: %(default)s")
    parser.add_argument("--no_models", dest="models", action="store_false", help="leave the language models out")
    for name in COSTS:
        parser.add_argument(f"--{name}", type=float, default=0.0, help="as for load_candidates, default: %(default)s")
    for name, steps in (("sft_steps", 100), ("dpo_steps", 200)):
        parser.add_argument(f"--{name}", type=int, default=steps, help="for each period, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the language models, default: %(default)s")
    parser.add_argument("--output_dir", default="out/beat_the_teacher", help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    logging.getLogger("covered_call").setLevel(logging.ERROR)
    try:
        main()
    except (CandidatesError, RecipeError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
