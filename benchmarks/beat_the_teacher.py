"""Does anything that learns from outcomes earn more than the teacher? A walk-forward over all periods of the files.

    python benchmarks/beat_the_teacher.py                 # the sample, by year; about half an hour on 2 cores
    python benchmarks/beat_the_teacher.py --no_models     # without the language models: a minute
    python benchmarks/beat_the_teacher.py --data_files 'runs/*.csv' --period month --fee 0.0003 --half_spread 0.02

For each period with enough before it, everything is fitted on what was settled before it (the latest 15 % of those
decision times are the validation split) and decides on it: the teacher's own log, the score rule, the Q-scorer, a tiny
Phi-3 that imitates the teacher (SFT), the same one after preference training (SFT + DPO), and the oracle, which sells
whatever turns out best, if anything does. All are paid alike, in counterfactuals: P&L vs HODL in USD a unit of underlying, net
of the costs that are set. Decisions at which some candidate's counterfactual is unknown are left out for all, and counted.

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

from covered_call import atomic  # noqa: E402
from covered_call.candidates.builder import (
    find_csvs,  # noqa: E402
    fingerprint,  # noqa: E402
)
from covered_call.candidates.options import CoveredCallCandidatesConfig  # noqa: E402
from covered_call.candidates.reading import (
    present_in_order,  # noqa: E402
    read_candidates,  # noqa: E402
)
from covered_call.candidates.schema import (
    CandidatesError,  # noqa: E402
    LoggedDecision,  # noqa: E402
)
from covered_call.candidates.splits import split_decisions  # noqa: E402
from covered_call.evaluation import metrics  # noqa: E402
from covered_call.evaluation.baselines import (
    Pick,  # noqa: E402
    fit_threshold,  # noqa: E402
    highest,  # noqa: E402
    scores,  # noqa: E402
)
from covered_call.evaluation.evaluate import pick_of  # noqa: E402
from covered_call.language_model.policy import Policy  # noqa: E402
from covered_call.training import dpo as train_dpo  # noqa: E402
from covered_call.training import sft as train_sft  # noqa: E402
from covered_call.training.runs import RecipeError  # noqa: E402
from covered_call.training.trainers import TrainingStopped  # noqa: E402
from covered_call.value_model.scorer import (
    QScorer,  # noqa: E402
    fit,  # noqa: E402
)

ROOT = Path(__file__).parents[1]
SAMPLE = str(ROOT / "data" / "sample" / "*.csv")
TEACHER, RULE, Q, SFT, DPO, ORACLE = "teacher", "score rule", "Q-scorer", "SFT tiny", "SFT + DPO tiny", "oracle"
# Of the decision times before a period, the latest 15 % are validation, and at least three weeks, for the purge takes
# one. A period with fewer than two months before it is not tested on.
VALIDATION, LEAST_VALIDATION, LEAST_TIMES = 0.15, 21, 60
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

    picks: dict[str, list[Pick]]
    entries: list[LoggedDecision]
    unknown: int


def period_of(entry: LoggedDecision, period: str) -> str:
    time = entry.decision.decision_time
    return f"{time.year}-Q{(time.month + 2) // 3}" if period == "quarter" else time.strftime(PERIODS[period])


def make_folds(logged: list[LoggedDecision], period: str) -> Iterator[Fold]:
    """Each period with at least LEAST_TIMES decision times before it."""
    for name in sorted({period_of(entry, period) for entry in logged}):
        entries = [entry for entry in logged if period_of(entry, period) == name]
        begins = entries[0].decision.decision_time
        before = sorted({e.decision.decision_time for e in logged if e.decision.decision_time < begins})
        if len(before) >= LEAST_TIMES:
            validation = max(LEAST_VALIDATION, len(before) - round(len(before) * (1 - VALIDATION)))
            yield Fold(name, entries, before[-validation].isoformat(), begins.isoformat())


def decide(
    fold: Fold, logged: list[LoggedDecision], asked: argparse.Namespace, files: list[str]
) -> dict[str, list[Pick]]:
    """The picks of each policy on the fold's decisions, fitted on what lies before them."""
    config = make_config(asked, validation_from=fold.validation_from, test_from=fold.test_from)
    splits = split_decisions(logged, config)
    decisions = [entry.decision for entry in fold.entries]
    scorer = QScorer(fit(splits["train"], splits["validation"], config))
    picks = {
        TEACHER: [entry.chosen for entry in fold.entries],
        RULE: highest(scores, fit_threshold(scores, splits["train"]))(decisions),
        Q: [pick_of(answer) for answer in scorer.decide(decisions)],
    }
    if asked.models:
        sft, dpo = (Path(asked.output_dir) / "models" / fold.name / name for name in ("sft", "dpo"))
        train(fold, asked, files, sft, dpo)
        for name, folder in ((SFT, sft), (DPO, dpo)):
            picks[name] = [pick_of(answer) for answer in Policy.load(folder).decide(decisions)]
    return picks


def train(fold: Fold, asked: argparse.Namespace, files: list[str], sft: Path, dpo: Path) -> None:
    """A tiny Phi-3 tuned to rank as the teacher did, and then on preferences; each in a minute or two."""
    data = ["--data_files", *files, "--exit_style", asked.exit_style]
    data += ["--validation_from", fold.validation_from, "--test_from", fold.test_from]
    common = ["--overwrite_output_dir", "--seed", str(asked.seed), "--report_to", "none", "--disable_tqdm", "true"]
    base = ["--config", "tiny", "--dataset_config", "per_decision_ranking", "--balance", "none"]
    train_sft.main([*base, *data, *common, "--max_steps", str(asked.sft_steps), "--output_dir", str(sft)])
    costs = [word for name in COSTS for word in (f"--{name}", str(getattr(asked, name)))]
    preferences = ["--config", "tiny_dpo", "--adapter", str(sft), "--max_steps", str(asked.dpo_steps)]
    train_dpo.main([*preferences, *data, *costs, *common, "--output_dir", str(dpo)])


def make_config(asked: argparse.Namespace, **options) -> CoveredCallCandidatesConfig:
    costs = {name: getattr(asked, name) for name in COSTS}
    return CoveredCallCandidatesConfig(exit_style=asked.exit_style, **costs, **options)


def play(fold: Fold, logged: list[LoggedDecision], asked: argparse.Namespace, files: list[str]) -> Played:
    """The fold's picks, from a file if they were computed before."""
    path = Path(asked.output_dir) / f"{fold.name}.json"
    settings = {
        **{name: getattr(asked, name) for name in ("exit_style", "models", "sft_steps", "dpo_steps", "seed", *COSTS)},
        "files": [digest for (digest,) in fingerprint(files)["train"].origin_metadata],
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))).hexdigest(),
        "fold": [fold.validation_from, fold.test_from],
    }
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("settings") != settings:
        kept = {"settings": settings, "picks": decide(fold, logged, asked, files)}
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


def best_in_hindsight(entry: LoggedDecision) -> Pick:
    worth = [counterfactual.pnl_vs_hodl for counterfactual in entry.counterfactuals]
    return int(np.argmax(worth)) if worth and max(worth) > 0 else None


def paid(entries: list[LoggedDecision], picks: list[Pick]) -> np.ndarray:
    """P&L vs HODL of each decision in USD, shape (decisions,)."""
    return np.array(
        [0.0 if p is None else e.counterfactuals[p].pnl_vs_hodl for e, p in zip(entries, picks, strict=True)]
    )


def with_interval(pnl: np.ndarray, block: int) -> str:
    """Mean, and its 95 % interval by the moving-block bootstrap of evaluate_policy.py."""
    orders = metrics.resample(len(pnl), block)
    if orders is None:
        return f"{pnl.mean():,.1f}"
    low, high = np.quantile(pnl[orders].mean(1), [(1 - metrics.LEVEL) / 2, (1 + metrics.LEVEL) / 2])
    return f"{pnl.mean():,.1f} [{low:,.1f}, {high:,.1f}]"


def table(played: dict[str, Played], block: int) -> str:
    entries = [entry for one in played.values() for entry in one.entries]
    picks = {
        name: [p for one in played.values() for p in one.picks[name]] for name in next(iter(played.values())).picks
    }
    pnl = {name: paid(entries, made) for name, made in picks.items()}
    lines = [
        f"| | sells | all | minus teacher | {' | '.join(played)} |",
        "|---" * (4 + len(played)) + "|",
    ]
    for name in sorted(pnl, key=lambda name: -pnl[name].mean()):
        sells = np.mean([pick is not None for pick in picks[name]])
        by_period = [f"{paid(one.entries, one.picks[name]).mean():,.1f}" for one in played.values()]
        differs = "" if name == TEACHER else with_interval(pnl[name] - pnl[TEACHER], block)
        lines.append(
            f"| {name} | {sells:.3f} | {with_interval(pnl[name], block)} | {differs} | {' | '.join(by_period)} |"
        )
    unknown = sum(one.unknown for one in played.values())
    percent = [
        100 * counterfactual.pnl_vs_hodl / entry.decision.spot
        for entry in entries
        for counterfactual in entry.counterfactuals
    ]
    counts = ", ".join(f"{name} {len(one.entries)}" for name, one in played.items())
    return "\n".join(
        [
            *lines,
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


def main() -> None:
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
    asked = parser.parse_args()
    files = find_csvs(asked.data_files, None, "")
    config = make_config(asked)
    config.check()
    logged = [present_in_order(entry, config) for entry in read_candidates(files, config)]
    folds = list(make_folds(logged, asked.period))
    if not folds:
        sys.exit(
            f"error: no {asked.period} has {LEAST_TIMES} decision times before it: give more data or a shorter period."
        )
    played = {}
    for fold in folds:
        print(f"{fold.name}: {len(fold.entries)} decisions, fitted on what lies before {fold.test_from}", flush=True)
        played[fold.name] = play(fold, logged, asked, files)
    played = {name: one for name, one in played.items() if one.entries}
    entries = [entry for one in played.values() for entry in one.entries]
    longest = max(entry.decision.last_expiry - entry.decision.decision_time for entry in entries)
    block = metrics.block_length([entry.decision.decision_time for entry in entries], longest)
    draw(played, Path(asked.output_dir) / "equity.png")
    print(f"\n{table(played, block)}\n\nPlot in {asked.output_dir}/equity.png")


if __name__ == "__main__":
    logging.getLogger("covered_call_candidates").setLevel(logging.ERROR)
    try:
        main()
    except (CandidatesError, RecipeError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
