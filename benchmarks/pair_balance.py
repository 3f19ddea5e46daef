"""What balancing the pairs of DPO does to the money: three ways, three seeds, the checkpoint chosen by loss or money.

    python benchmarks/pair_balance.py               # the sample, about 20 minutes on 2 cores
    python benchmarks/pair_balance.py --data_files 'runs/*.csv' --splits 0.5 0.25 0.25
    python benchmarks/pair_balance.py --seeds 0 --max_steps 25

Each run is the recipe tiny_dpo from one and the same start, on as many pairs as its steps take, drawn

    shares    each answer as often as it was the better one: the default
    cut       the commonest better answer cut by lot to as many as the second: the default before
    edge      in proportion to how much better the better answer was, in % of spot

Of each run the checkpoint of the lowest loss on validation and that of the highest P&L there answer the test split.
They are paid in computed outcomes, net of the recipe's costs; decisions at which one is unknown are left out for all.
Other words go to the recipe. A run that has finished is not repeated: delete --output_dir to measure again.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call import atomic, resampling  # noqa: E402
from covered_call.candidates.builder import Backtest  # noqa: E402
from covered_call.candidates.prompts import pick_of  # noqa: E402
from covered_call.candidates.schema import NO_TRADE, CandidatesError  # noqa: E402
from covered_call.evaluation.cases import Cases, make_cases, outcome  # noqa: E402
from covered_call.language_model.loading import ADAPTER  # noqa: E402
from covered_call.language_model.scoring import Scored  # noqa: E402
from covered_call.tables import markdown  # noqa: E402
from covered_call.training import dpo  # noqa: E402
from covered_call.training.examples import EpochSampler, thin_out  # noqa: E402
from covered_call.training.money import LOSS, MONEY  # noqa: E402
from covered_call.training.preference_trainer import PreferenceTrainer  # noqa: E402
from covered_call.training.preflight import global_batch  # noqa: E402
from covered_call.training.recipe import DPO, parse_recipe  # noqa: E402
from covered_call.training.runs import RecipeError, TrainingStopped  # noqa: E402
from covered_call.training.trainers import predictions  # noqa: E402

ROOT = Path(__file__).parents[1]
SAMPLE = str(ROOT / "data" / "sample" / "*.csv")
BY = {LOSS: min, MONEY: max}  # by which a checkpoint is chosen, and which of its values
START, TEACHER, NEVER = "the start", "the teacher", "never selling"


# ---------------------------------------------------------------------------------------------------------------------
# Which pairs


def by_shares(pairs: Dataset, count: int, rng: np.random.Generator) -> np.ndarray:
    return in_turns(np.arange(len(pairs)), count, rng)


def by_cut(pairs: Dataset, count: int, rng: np.random.Generator) -> np.ndarray:
    answers, of, counts = np.unique(pairs["chosen_label"], return_inverse=True, return_counts=True)
    if len(answers) == 1:
        return by_shares(pairs, count, rng)
    second, most = np.argsort(counts)[-2:]
    lot = rng.permutation(np.flatnonzero(of == most))[: counts[second]]
    return in_turns(np.concatenate([np.flatnonzero(of != most), lot]), count, rng)


def by_edge(pairs: Dataset, count: int, rng: np.random.Generator) -> np.ndarray:
    better, worse, spot = (np.array(pairs[name]) for name in ("chosen_outcome", "rejected_outcome", "spot"))
    edge = (better - worse) / spot
    return rng.choice(len(pairs), count, p=edge / edge.sum())


def in_turns(places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """So many of them by lot, none once more before all were drawn."""
    return np.concatenate([rng.permutation(places) for _ in range(math.ceil(count / len(places)))])[:count]


BALANCES: dict[str, Callable[[Dataset, int, np.random.Generator], np.ndarray]] = {
    "shares": by_shares,
    "cut": by_cut,
    "edge": by_edge,
}


# ---------------------------------------------------------------------------------------------------------------------
# Runs


class Measured(NamedTuple):
    """What a run came to: the share of NO_TRADE among the better answers it was shown, the checkpoint's step and its
    picks on the test split by what it was chosen by, and those of the start."""

    no_trade: float
    steps: dict[str, int]
    picks: dict[str, list[int]]


def start_of(words: list[str]) -> list[str]:
    """The start of all runs as a key of the recipe; the tiny base is built with its seed if it is not there."""
    model, data, training, _ = parse_recipe(words, DPO)
    if model.adapter:
        return []
    dpo.load(model, data, training, None)
    return ["--model_name_or_path", model.model_name_or_path]


def measure(balance: str, seed: int, backtest: Backtest, words: list[str], folder: Path) -> Measured:
    """A run, from its file if it has finished."""
    path = folder / f"{balance}-{seed}.json"
    if not path.is_file():
        found = train(balance, backtest, [*words, "--seed", str(seed), "--output_dir", str(folder / path.stem)])
        atomic.write(path, json.dumps(found._asdict()))
    return Measured(**json.loads(path.read_text(encoding="utf-8")))


def train(balance: str, backtest: Backtest, words: list[str]) -> Measured:
    model, data, training, _ = parse_recipe(words, DPO)
    start = dpo.take_over(model, data, {})
    pairs = dpo.load(model, data, training, start)
    raw = backtest.load("preference", seed=training.seed, **data.pairing())["train"]
    drawn = BALANCES[balance](raw, training.max_steps * global_batch(training), np.random.default_rng(training.seed))
    for sides in (pairs.chosen, pairs.rejected, pairs.splits):
        sides["train"] = sides["train"].select(drawn)
    pairs.sampler = EpochSampler([True] * len(drawn), "none", training.seed)  # all alike
    test = pairs.judged.pop("test")
    pairs.judged["validation"] = thin_out(pairs.judged["validation"], data.max_eval_records)
    dpo.preflight(model, data, training, pairs)
    trainer = dpo.make_trainer(model, data, training, pairs, None)
    picks = {START: picks_of(test, trainer.score(test))}
    trainer.train()
    steps = chosen_steps(trainer)
    for step in sorted(set(steps.values())):
        weights = load_file(Path(training.output_dir) / f"checkpoint-{step}" / ADAPTER)
        set_peft_model_state_dict(trainer.model, weights)
        found = picks_of(test, trainer.score(test))
        picks |= {metric: found for metric, its in steps.items() if its == step}
    return Measured(float(np.mean([label == NO_TRADE for label in raw.select(drawn)["chosen_label"]])), steps, picks)


def chosen_steps(trainer: PreferenceTrainer) -> dict[str, int]:
    """The best step by each of BY that is measured; of equals the first."""
    log = trainer.state.log_history
    found = {metric: [(e[f"eval_{metric}"], e["step"]) for e in log if f"eval_{metric}" in e] for metric in BY}
    return {metric: BY[metric](its, key=lambda one: one[0])[1] for metric, its in found.items() if its}


def picks_of(test: Dataset, scored: list[Scored]) -> list[int]:
    """Places of candidates, -1 for NO_TRADE, in the order of the decisions."""
    picks = [pick_of(answer) for answer in predictions(test, scored)]
    return [-1 if pick is None else pick for pick in picks]


# ---------------------------------------------------------------------------------------------------------------------
# Money


class Paid:
    """The test decisions of which all outcomes are known, and what answers to them bring."""

    def __init__(self, cases: Cases):
        unknown = cases.columns.decision_of[np.isnan(cases.computed)]
        self.cases, self.of = cases, np.flatnonzero(np.bincount(unknown, minlength=len(cases.columns)) == 0)
        if not len(self.of):
            raise CandidatesError("At no test decision are the outcomes of all candidates known, and to be trusted.")
        self.times, self.place = np.unique(cases.columns.time[self.of], return_inverse=True)
        ends = np.zeros(len(self.times), np.int64)
        np.maximum.at(ends, self.place, cases.label_end[self.of])
        self.draws = resampling.draw(len(self.times), resampling.block_length(self.times, ends))

    def usd(self, picks: list[int]) -> np.ndarray:
        return outcome(self.cases, self.of, np.array(picks)[self.of])

    def percent(self, usd: np.ndarray) -> np.ndarray:
        return 100 * usd / self.cases.columns.spot[self.of]

    def interval(self, values: np.ndarray) -> str:
        """The 95 % interval of the mean of values of the decisions, by blocks of time; nothing for too few blocks."""
        if self.draws is None:
            return ""
        by_time = np.bincount(self.place, values, len(self.times))
        sums, counts = self.draws.sums(np.stack([by_time, np.bincount(self.place)], axis=1)).T
        sides = resampling.interval(sums / counts, sums / counts)
        return "" if sides is None else f" [{sides[0]:+.3f}, {sides[1]:+.3f}]"


def row(name: str, by: str, no_trade: str, runs: list[list[int]], start: list[int], paid: Paid) -> list[str]:
    """Of the picks of some seeds: the mean of all, and the least and the most of one."""
    usd = np.array([paid.usd(picks) for picks in runs])
    percent = paid.percent(usd)
    gain = (percent - paid.percent(paid.usd(start))).mean(axis=0)
    sold = np.mean([np.array(picks)[paid.of] >= 0 for picks in runs])
    return [
        name, by, no_trade, f"{sold:.3f}", spread(usd.mean(axis=1), "+,.1f"), spread(percent.mean(axis=1), "+.3f"),
        f"{gain.mean():+.3f}{paid.interval(gain)}",
    ]  # fmt: skip


def spread(values: np.ndarray, layout: str) -> str:
    mean, least, most = (format(value + 0.0, layout) for value in (values.mean(), values.min(), values.max()))
    return mean if least == most else f"{mean} ({least} to {most})"


HEAD = ["pairs", "checkpoint by", "NO_TRADE better", "trade rate", "USD", "% of spot", "minus the start, % of spot"]


def table(found: dict[str, list[Measured]], paid: Paid) -> str:
    start = next(iter(found.values()))[0].picks[START]
    rows = []
    for balance, runs in found.items():
        share = f"{np.mean([run.no_trade for run in runs]):.0%}"
        for metric in BY:
            if metric in runs[0].picks:
                rows.append(row(balance, metric, share, [run.picks[metric] for run in runs], start, paid))
    teacher = paid.cases.columns.chosen.tolist()
    plain = {START: start, TEACHER: teacher, NEVER: [-1] * len(teacher)}
    rows += [row(name, "", "", [picks], start, paid) for name, picks in plain.items()]
    return markdown([HEAD, *rows])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--data_files", nargs="+", default=[SAMPLE], help="default: the sample")
    parser.add_argument("--output_dir", type=Path, default=Path("out/pair_balance"), help="default: %(default)s")
    args, more = parser.parse_known_args(arguments)
    words = ["--config", "tiny_dpo", "--report_to", "none", "--collapse_patience", "0", "--save_total_limit", "99"]
    words += ["--load_best_model_at_end", "false", "--data_files", *args.data_files, *more]
    _, data, training, _ = parse_recipe(words, DPO)
    words, backtest = [*words, *start_of(words)], data.backtest()
    columns = backtest.decisions.columns(backtest.numbers["test"])
    paid = Paid(make_cases(backtest.decisions, columns, backtest.options))
    found = {
        balance: [measure(balance, seed, backtest, words, args.output_dir) for seed in args.seeds]
        for balance in BALANCES
    }
    print("\n".join(["", *backtest.decisions.checks(), ""]))
    print(
        f"Mean P&L vs HODL a decision on the {len(paid.of):,} of {len(columns):,} test decisions with known outcomes, "
        f"net of costs: mean (least to most) of seeds {args.seeds}, {training.max_steps} steps; in brackets 95 % "
        f"intervals by blocks of decisions. {len(BALANCES)} balancings and {len(BY)} choices of a checkpoint were "
        "tried.\n"
    )
    print(table(found, paid))
    for balance, runs in found.items():
        print(f"{balance}: " + "; ".join(f"steps by {metric} {[r.steps.get(metric) for r in runs]}" for metric in BY))


if __name__ == "__main__":
    logging.getLogger("covered_call").setLevel(logging.ERROR)
    try:
        main()
    except (CandidatesError, RecipeError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
