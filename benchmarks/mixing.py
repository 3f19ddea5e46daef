"""What a mixture does: one model for both tasks against two models, a share of formula questions, and its speed.

    python benchmarks/mixing.py                       # three seeds, half an hour on 2 cores
    python benchmarks/mixing.py --part speed --rounds 5
    python benchmarks/mixing.py --part models --seeds 0 --steps 20 --base_steps 20

models: a tiny Phi-3 that has learnt to read both kinds of prompts (--base_steps of 32 records, once, from seed 0) is
tuned whole: no adapter and no 4 bits, which cost time and do not bear on the question. It answers decisions of the
test split. That minutes suffice, of each decision of the sample only the candidates of the highest and of the lowest
score are kept: of two that are as good, one candidate's prompt does not tell which of them is sold.
A model of one task takes half of the steps of a model of both, so that each has seen as many records of its task; with
formulas, a fifth of the same steps goes to these. A run that has finished is not repeated: delete --output_dir to
measure again.

speed: forward and backward of the first steps of an epoch, with a mix and without one, in turns. The mix is of one
config, so that both read records of the same kind, and differ by the mixing alone.
"""

import argparse
import json
import logging
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call import atomic  # noqa: E402
from covered_call.tables import markdown  # noqa: E402
from covered_call.training import sft  # noqa: E402
from covered_call.training.examples import tasks_in  # noqa: E402
from covered_call.training.keys import RANKING, SHORT_NAMES  # noqa: E402
from covered_call.training.preflight import preflight  # noqa: E402
from covered_call.training.recipe import parse_recipe  # noqa: E402
from covered_call.training.trainers import AnswerTrainer, answer_metrics  # noqa: E402

ROOT = Path(__file__).parents[1]
SAMPLE = sorted((ROOT / "data" / "sample").glob("*.csv"))
FORMULAS = ROOT / "data" / "make_formulas.py"
CANDIDATE = "per_candidate"
BOTH = f"[{{config: {RANKING}, share: 0.5}}, {{config: {CANDIDATE}, share: 0.5}}]"
WITH_FORMULAS = f"[{{config: {RANKING}, share: 0.4}}, {{config: {CANDIDATE}, share: 0.4}}, {{data: FILE, share: 0.2}}]"
# Of each model what it is, its recipe's keys, and its share of the steps.
MODELS = {
    "ranking": ("rankings alone", ["--dataset_config", RANKING], 0.5),
    "candidate": ("candidates alone", ["--dataset_config", CANDIDATE], 0.5),
    "both": ("one model for both", ["--dataset_config", RANKING, "--mix", BOTH], 1.0),
    "formulas": ("both, 0.2 formulas", ["--dataset_config", RANKING, "--mix", WITH_FORMULAS], 1.0),
}
WHOLE = ["--config", "tiny", "--quantization", "none", "--lora_r", "0", "--eval_strategy", "no"]
WHOLE += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--report_to", "none"]
METRICS = {"balanced_accuracy": "balanced accuracy", "loss": "loss, nats"}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def trainer_of(words: list[str]) -> tuple[AnswerTrainer, sft.Examples]:
    model, data, training, _ = parse_recipe(words)
    examples = sft.load(model, data, training)
    preflight(model, data, training, examples)
    return sft.make_trainer(model, data, training, examples), examples


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The metrics of each task's test records, from their file if the run has finished."""
    path = args.output_dir / f"{name}-{seed}.json"
    if not path.is_file():
        _, keys, share = MODELS[name]
        steps = math.ceil(args.steps * share)
        words = [
            *words_of(args),
            *with_file(keys, args),
            "--seed",
            str(seed),
            "--output_dir",
            str(args.output_dir / path.stem),
        ]
        trainer, examples = trainer_of([*words, "--max_steps", str(steps)])
        trainer.train()
        split = examples.splits["test"]
        scored = trainer.score(split)
        found = {
            SHORT_NAMES[task]: answer_metrics(split.select(places), [scored[place] for place in places])
            for task, places in tasks_in(split).items()
        }
        atomic.write(path, json.dumps(found))
        print(f"{name}, seed {seed}: {found}", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def thinned(folder: Path) -> str:
    """The sample with the first and the last candidate of each decision alone, whose rows are sorted by score."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for source in SAMPLE:
        rows = pd.read_csv(source, dtype=str, keep_default_na=False)
        kept = rows.groupby("decision_time", sort=False).nth([0, -1])
        atomic.write(folder / "data" / source.name, kept.to_csv(index=False))
    return str(folder / "data" / "*.csv")


def words_of(args: argparse.Namespace) -> list[str]:
    base = ["--model_name_or_path", args.base or "none", "--tiny_base_steps", "0"]
    data = ["--data_files", args.data, "--balance", "downsample", "--max_records_per_market", "1500"]
    return [*WHOLE, *base, *data, "--per_device_train_batch_size", "16", "--learning_rate", "1e-3"]


def with_file(keys: list[str], args: argparse.Namespace) -> list[str]:
    return [key.replace("FILE", str(args.formulas)) for key in keys]


def base_of(args: argparse.Namespace) -> str:
    """The folder of the base, which is trained on both tasks and, that it can read them, formulas."""
    keys = [*words_of(args), *with_file(MODELS["formulas"][1], args), "--output_dir", str(args.output_dir)]
    own = ["--model_name_or_path", str(args.output_dir / "tiny-phi3"), "--tiny_base_steps", str(args.base_steps)]
    model, data, training, _ = parse_recipe([*keys, *own])
    sft.load(model, data, training)
    return model.model_name_or_path


def compare_models(args: argparse.Namespace) -> None:
    columns = [(task, metric) for task in SHORT_NAMES.values() for metric in METRICS]
    rows = [["model", *(f"{task}s: {METRICS[metric]}" for task, metric in columns)]]
    for name, (what, _, _) in MODELS.items():
        found = [measure(name, seed, args) for seed in args.seeds]
        rows.append([what, *(cell([one[t][metric] for one in found if t in one]) for t, metric in columns)])
    print(f"\nMean (min to max) of seeds {args.seeds}, {args.steps} steps of 16 records\n\n{markdown(rows)}")


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def compare_speed(args: argparse.Namespace) -> None:
    """A mix of one config alone, drawn as a mix, beside the same config without one: the same records, the same work
    but for the mixing."""
    alone = ["--dataset_config", CANDIDATE]
    mixes = {"no mix": [], "a mix": ["--mix", f"[{{config: {CANDIDATE}, share: 1.0}}]"]}
    made = {
        name: trainer_of([*words_of(args), *alone, *mix, "--output_dir", str(args.output_dir / "speed")])[0]
        for name, mix in mixes.items()
    }
    seconds = {name: [] for name in made}
    for number in range(args.rounds + 1):
        for name, trainer in made.items():
            taken = steps_of(trainer, args.steps_of_a_round, number)
            seconds[name] += [taken] if number else []  # the first round warms up
    rates = {name: [args.steps_of_a_round * 16 / taken for taken in its] for name, its in seconds.items()}
    rows = [["", "records a second, median", "least to most"]]
    rows += [[name, f"{median(its):.1f}", f"{min(its):.1f} to {max(its):.1f}"] for name, its in rates.items()]
    ratios = [mixed / plain for mixed, plain in zip(rates["a mix"], rates["no mix"], strict=True)]
    print(f"\n{markdown(rows)}\n\nA mix has {median(ratios):.3f} of the throughput, median of {args.rounds} rounds")
    print(f"({min(ratios):.3f} to {max(ratios):.3f}), {args.steps_of_a_round} steps of 16 records each.")


def steps_of(trainer: AnswerTrainer, steps: int, epoch: int) -> float:
    """Seconds of an epoch's order and of its first batches through forward and backward."""
    trainer.sampler.set_epoch(epoch)
    trainer.model.train()
    began = time.perf_counter()
    batches = iter(trainer.get_train_dataloader())
    for _ in range(steps):
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(next(batches))).backward()
    trainer.model.zero_grad()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"models": compare_models, "speed": compare_speed}
    parser.add_argument("--part", choices=parts, nargs="+", default=list(parts), help="default: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=480, help="of a model of both tasks; default: %(default)s")
    parser.add_argument("--base_steps", type=int, default=600, help="of the base; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed; default: %(default)s")
    parser.add_argument(
        "--steps_of_a_round", type=int, default=30, metavar="N", help="steps that are timed; default: %(default)s"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("out/mixing"), help="default: %(default)s")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args.formulas = args.output_dir / "formulas.jsonl"
    words = [sys.executable, str(FORMULAS), "--out", str(args.formulas)]
    print(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout, end="")
    args.data, args.base = thinned(args.output_dir), ""
    args.base = base_of(args)
    for part in args.part:
        parts[part](args)


if __name__ == "__main__":
    main()
