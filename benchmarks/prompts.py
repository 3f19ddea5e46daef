"""What does a model read of a ranking prompt? The tiny model on prompts that tell less, more, or in another order.

    python benchmarks/prompts.py                             # the sample, hold_to_expiry: half an hour on 2 cores
    python benchmarks/prompts.py --data_files 'runs/*.csv' --splits 0.5 0.25 0.25 --output_dir out/prompts_of_runs
    python benchmarks/prompts.py --variants "as it is" "delta only" --seeds 0
    python benchmarks/prompts.py --report                    # what has finished, in a table

    as it is         what load_candidates renders: candidates by instrument
    without score    each candidate's line without "Score: 4.1006"
    delta only       each candidate's line is its number and its delta; what stands above them stays
    with context     with context="spot"
    csv order        candidates as they stand in the file
    shuffled         candidates in another order each epoch of the training; judged in that of instruments

Prompts are rendered by load_candidates. To tell less, each candidate's line is then found by the template that made
it, and written again by a shorter one. The model is the tiny recipe's, its tokenizer made anew of each variant's
prompts, and all of its weights trained, without an adapter, for few steps. Beside it stand rules that read one number,
or none.

A run that has finished is not repeated: delete --output_dir to measure again.
"""

import argparse
import json
import logging
import math
import re
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call import atomic  # noqa: E402
from covered_call.candidates.builder import Backtest, find_csvs  # noqa: E402
from covered_call.candidates.columns import Columns  # noqa: E402
from covered_call.candidates.options import CoveredCallCandidatesConfig  # noqa: E402
from covered_call.candidates.prompts import RANKING_LINE, answers_of  # noqa: E402
from covered_call.candidates.schema import CandidatesError  # noqa: E402
from covered_call.evaluation.baselines import Rule, fit_threshold, score_rule, scores  # noqa: E402
from covered_call.language_model.loading import answer_tokens  # noqa: E402
from covered_call.language_model.tiny_phi3 import random_phi3, train_tokenizer  # noqa: E402
from covered_call.tables import markdown  # noqa: E402
from covered_call.training.examples import EpochSampler, encode_split, is_trade, shuffle_epochs  # noqa: E402
from covered_call.training.keys import RANKING  # noqa: E402
from covered_call.training.recipe import parse_recipe  # noqa: E402
from covered_call.training.trainers import AnswerTrainer, balanced_accuracy, predictions  # noqa: E402

STEPS, RECORDS = 200, 16  # RECORDS of a step
RATE = 3e-3  # as the tiny recipe trains its base, whose weights all learn too
JUDGED = ("validation", "test")
LESS = {
    "without score": RANKING_LINE.replace(", Score: {score}", ""),
    "delta only": "  [{index}] Delta: {delta}\n",
}
LOADED = {"with context": {"context": "spot"}, "csv order": {"candidate_order": "csv"}}
SHUFFLED = "shuffled"
VARIANTS = ("as it is", *LESS, *LOADED, SHUFFLED)
HEAD = ["prompt, or rule", *(f"{what}, {split}" for what in ("balanced accuracy", "accuracy") for split in JUDGED)]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


FIELD, VOLS = r"[^,\n]*", ".*"  # of a line's fields only the vols, which come last, hold commas


def pattern_of(template: str) -> re.Pattern:
    """What finds a template's texts, its fields as groups."""
    pattern = ""
    for said, name, _, _ in string.Formatter().parse(template):
        pattern += re.escape(said) + (f"(?P<{name}>{VOLS if name == 'vols' else FIELD})" if name else "")
    return re.compile(pattern)


LINE = pattern_of(RANKING_LINE)


def rewritten(split: Dataset, template: str) -> Dataset:
    """The same rankings, each candidate's line by another template."""

    def rewrite(row: dict) -> dict:
        system, user, answer = row["messages"]
        text, count = LINE.subn(lambda found: template.format(**found.groupdict()), user["content"])
        assert count == len(row["candidates"]), user["content"]
        return {"messages": [system, user | {"content": text}, answer]}

    return split.map(rewrite, desc="Rewriting")


def splits_of(variant: str, backtest: Backtest) -> dict[str, Dataset]:
    splits = backtest.load(RANKING)
    if variant in LESS:
        return {name: rewritten(split, LESS[variant]) for name, split in splits.items()}
    return dict(splits)


# ---------------------------------------------------------------------------------------------------------------------
# The tiny model


def tiny_answers(
    train: Dataset, judged: dict[str, Dataset], steps: int, seed: int, shuffle: bool = False
) -> dict[str, list[str]]:
    """What a tiny Phi-3 answers to rankings, trained on others.

    Args:
        train, judged: as per_decision_ranking has them.
        shuffle: the training candidates, anew each epoch.
    """
    sampler = EpochSampler([is_trade(label) for label in train["label"]], "none", seed)
    tokenizer = train_tokenizer(message["content"] for chat in train["messages"] for message in chat)
    with tempfile.TemporaryDirectory() as folder:
        _, _, training, _ = parse_recipe(words_of(steps, seed, folder))
        if shuffle:
            sampler.copies = math.ceil(steps * RECORDS / len(train))
            train = shuffle_epochs(train, seed, sampler.copies)
        examples = encode_split(train, tokenizer, RANKING)
        asked = {name: encode_split(split, tokenizer, RANKING) for name, split in judged.items()}
        sampler.group(np.array([len(ids) for ids in examples["input_ids"]]), RECORDS)
        offered = sorted({one for split in (examples, *asked.values()) for its in split["answers"] for one in its})
        trainer = AnswerTrainer(
            model=random_phi3(tokenizer, seed),
            args=training,
            train_dataset=examples,
            processing_class=tokenizer,
            sampler=sampler,
            answers=answer_tokens(tokenizer, train[0]["messages"][:-1], offered),
        )
        trainer.train()
        return {name: predictions(split, trainer.score(split)) for name, split in asked.items()}


def words_of(steps: int, seed: int, folder: str) -> list[str]:
    changes = {
        "dataset_config": RANKING, "balance": "none", "quantization": "none", "lora_r": 0, "learning_rate": RATE,
        "per_device_train_batch_size": RECORDS, "max_steps": steps, "warmup_steps": steps // 10, "seed": seed,
        "output_dir": folder, "report_to": "none", "eval_strategy": "no", "save_strategy": "no",
        "load_best_model_at_end": "false", "collapse_patience": 0,
    }  # fmt: skip
    return ["--config", "tiny", *(str(word) for key, value in changes.items() for word in (f"--{key}", value))]


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def figures(labels: list[str], answers: list[str]) -> dict[str, float]:
    right = [one == other for one, other in zip(labels, answers, strict=True)]
    return {"balanced accuracy": balanced_accuracy(labels, answers), "accuracy": float(np.mean(right))}


def measure(variant: str, seed: int, backtest: Backtest, steps: int, folder: Path) -> None:
    path = folder / f"{variant.replace(' ', '_')}-{seed}.json"
    if path.is_file():
        return
    splits, began = splits_of(variant, backtest), time.process_time()
    judged = {name: splits[name] for name in JUDGED}
    answers = tiny_answers(splits["train"], judged, steps, seed, variant == SHUFFLED)
    found = {name: figures(judged[name]["label"], its) for name, its in answers.items()}
    said = {"variant": variant, "seed": seed, "steps": steps, "cpu_seconds": time.process_time() - began}
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(said | {"figures": found}))


def rules_of(train: Columns) -> dict[str, Rule]:
    """Simple readers, with thresholds that agree most often with the teacher on the training split."""
    return {
        "score rule": score_rule(train),
        "highest score, always sold": Rule(scores),
        "delta nearest 0.25, with a threshold": Rule(nearness, fit_threshold(nearness(train), train)),
        "delta nearest 0.25, always sold": Rule(nearness),
        "commonest place among so many candidates": by_number(train),
        "first candidate": Rule(lambda columns: -columns.place),
        "always NO_TRADE": Rule(scores, math.inf),
    }


def by_number(train: Columns) -> Rule:
    """What a reader can answer who counts the candidates, and reads no number of any."""
    numbers = np.diff(train.offsets)
    commonest = {one: Counter(train.chosen[numbers == one].tolist()).most_common(1)[0][0] for one in set(numbers)}

    def values(columns: Columns) -> np.ndarray:
        places = np.array([commonest.get(one, -1) for one in np.diff(columns.offsets)])
        return (columns.place == places[columns.decision_of]).astype(float)

    return Rule(values, 0.5)


def nearness(columns: Columns) -> np.ndarray:
    return -np.abs(np.abs(columns.numbers["delta"]) - 0.25)


def rule_rows(backtest: Backtest) -> Iterator[list[str]]:
    of = {name: backtest.decisions.columns(backtest.numbers[name]) for name in ("train", *JUDGED)}
    for name, rule in rules_of(of["train"]).items():
        found = {}
        for split in JUDGED:
            labels, answers = (answers_of(picks).to_pylist() for picks in (of[split].chosen, rule.picks(of[split])))
            found[split] = figures(labels, answers)
        yield row(name, [found])


def row(name: str, runs: list[dict]) -> list[str]:
    return [name, *(spread([run[split][what] for run in runs]) for what in runs[0]["test"] for split in JUDGED)]


def spread(values: list[float]) -> str:
    """The mean, and the least and most of it."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(folder: Path, backtest: Backtest) -> None:
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    rows = []
    for variant in VARIANTS:
        its = [run for run in runs if run["variant"] == variant]
        seeds = " ".join(str(run["seed"]) for run in its)
        rows += [row(f"{variant}, seeds {seeds}", [run["figures"] for run in its])] if its else []
    sizes = ", ".join(f"{len(backtest.numbers[name]):,} of {name}" for name in ("train", *JUDGED))
    steps = sorted({run["steps"] for run in runs})
    print(f"\nDecisions: {sizes}. Steps: {', '.join(map(str, steps))}. Mean (least to most) of the seeds.\n")
    print(markdown([HEAD, *rows, *rule_rows(backtest)]))
    if runs:
        print(f"\n{sum(run['cpu_seconds'] for run in runs) / 60:.0f} CPU minutes in {len(runs)} runs.")


def main(arguments: list[str] | None = None) -> None:
    logging.getLogger("covered_call").setLevel(logging.ERROR)
    args = parse_arguments(arguments)
    files = find_csvs(args.data_files, None, str(Path(__file__).parents[1]))

    def backtest_of(**changes: str) -> Backtest:
        splits = tuple(args.splits)
        return Backtest(files, CoveredCallCandidatesConfig(exit_style=args.exit_style, splits=splits, **changes))

    plain = backtest_of()
    for seed in [] if args.report else args.seeds:
        for variant in args.variants:
            backtest = backtest_of(**LOADED[variant]) if variant in LOADED else plain
            measure(variant, seed, backtest, args.steps, args.output_dir)
    report(args.output_dir, plain)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", nargs="+", metavar="CSV", help="default: the sample")
    parser.add_argument("--exit_style", default="hold_to_expiry", help="default: %(default)s")
    parser.add_argument("--splits", type=float, nargs=3, default=[0.8, 0.1, 0.1], help="default: 0.8 0.1 0.1")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {RECORDS} records, default: {STEPS}")
    parser.add_argument("--output_dir", type=Path, default=Path("out/prompts"), help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="train nothing, lay out what has finished")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except CandidatesError as error:
        sys.exit(f"error: {error}")
