"""What options of the recipes do to the tiny model, over three seeds: balance, order of candidates, dropout,
explained answers.

    python benchmarks/recipe_options.py                     # all parts, over an hour on 2 cores
    python benchmarks/recipe_options.py --part ranking --seeds 0 1

Each run is the tiny recipe with one option changed, the base included, which is built anew for each seed. A run that
has finished is not repeated: delete out/recipe_options to measure again.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call import tuning  # noqa: E402
from covered_call.language_model.manifest import MANIFEST  # noqa: E402
from covered_call.training.keys import BALANCES  # noqa: E402

PARTS = {
    "per_candidate": [{"balance": balance} for balance in BALANCES],
    "ranking": [
        {"candidate_order": "instrument", "balance": "none"},
        {"candidate_order": "shuffle", "balance": "none"},
    ],
    "dropout": [{"lora_dropout": dropout} for dropout in (0.0, 0.05)],
    "explained": [{"explain": explained} for explained in (False, True)],
}
DATASETS = {part: "per_decision_ranking" if part == "ranking" else "per_candidate" for part in PARTS}


def tune(part: str, options: dict, seed: int, folder: Path, max_steps: int) -> dict[tuple[str, str], float]:
    """Balanced accuracy and accuracy of the tuned model, by split."""
    manifest = folder / MANIFEST
    if not (manifest.is_file() and json.loads(manifest.read_text())["finished"]):
        changes = {**options, "dataset_config": DATASETS[part], "seed": seed, "max_steps": max_steps}
        words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
        # A collapse is a result here, not a reason to stop.
        words += ["--output_dir", str(folder), "--collapse_patience", "0", "--report_to", "none"]
        tuning.run("sft", ["--config", "tiny", *words])
    results = json.loads(manifest.read_text())["results"]
    tuned = [r for r in results if r["answers_by"] == "tuned model"]
    return {(metric, r["split"]): r[metric] for metric in ("balanced_accuracy", "accuracy") for r in tuned}


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--max_steps", type=int, default=400, help="LoRA steps of a run, default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path("out/recipe_options"), help="default: %(default)s")
    args = parser.parse_args()
    rows = []
    for part in args.part:
        for options in PARTS[part]:
            name = ", ".join(f"{key}: {value}" for key, value in options.items())
            folder = "-".join([part, *map(str, options.values())])
            found = [
                tune(part, options, seed, args.output_dir / f"{folder}-{seed}", args.max_steps) for seed in args.seeds
            ]
            rows.append(f"| {part} | {name} | " + " | ".join(cell([f[key] for f in found]) for key in found[0]) + " |")
    print(f"\nMean (min to max) of seeds {args.seeds}, {args.max_steps} steps\n")
    print("| config | option | balanced accuracy, validation | test | accuracy, validation | test |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
