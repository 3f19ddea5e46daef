"""What a training leaves: the manifest it is begun with, and in the end the model, its figures and its card."""

import datetime
import importlib.metadata
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from covered_call import atomic
from covered_call.candidates.builder import fingerprint
from covered_call.candidates.context_lines import told_names
from covered_call.candidates.decisions import hashes_of
from covered_call.candidates.prompts import version_with
from covered_call.candidates.source import CODE_HASH
from covered_call.language_model.loading import base_revision
from covered_call.language_model.manifest import CALIBRATION, MANIFEST, RECIPE, hash_of
from covered_call.language_model.policy import best_temperature
from covered_call.language_model.scoring import Scored
from covered_call.language_model.tiny_phi3 import made_tiny, random_phi3
from covered_call.tables import align
from covered_call.training.card import Panel, plot_course
from covered_call.training.examples import Examples, tasks_in, times_in
from covered_call.training.keys import DataArguments, ModelArguments
from covered_call.training.recipe import RunArguments
from covered_call.training.runs import RecipeError, of_the_run, open_run
from covered_call.training.trainers import ScoringTrainer

CARD, PLOT = "README.md", "training.png"


# ---------------------------------------------------------------------------------------------------------------------
# Begin


def describe_run(
    model: ModelArguments, data: DataArguments, training: RunArguments, given: dict, examples: Examples
) -> dict:
    """The manifest: all that decides what comes out of a run. Equal manifests give equal weights.

    Raises:
        RecipeError: if a data file is not any more as it was before it was read.
    """
    hashes, splits, sampler = examples.hashes, examples.splits, examples.sampler
    context = told_names(data.backtest().options)
    for path, digest in hashes_of(fingerprint(list(hashes))).items():
        if digest != hashes[path]:
            raise RecipeError(f"{path} has changed since this run began to read it. Start again when it is whole.")
    return {
        "task": data.dataset_config,
        "tasks": data.configs,
        "base_model": model.model_name_or_path,
        "base_revision": base_revision(model.model_name_or_path),
        "quantization": model.quantization,
        "adapter": bool(model.lora_r),
        "data_files": {os.path.basename(path): digest for path, digest in hashes.items()},
        "prompt_version": version_with(context),
        **({"context": context} if context else {}),
        **({"explains": examples.grounds._asdict()} if examples.grounds else {}),
        "labels": examples.labels,
        "splits": {
            name: {
                "records": sampler.records if name == "train" else len(split),
                "from": min(times_in(split)).isoformat(),
                "to": max(times_in(split)).isoformat(),
            }
            for name, split in splits.items()
        },
        "mix": examples.mix,
        "recipe": of_the_run({**keys_of(model), **keys_of(data), **given, **training.settled()}),
        "tuned_on": examples.seen[data.dataset_config],
        "processes": training.world_size,
        "micro_batch": training.per_device_train_batch_size,
        "seed": training.seed,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
        },
        "finished": None,
    }


def begin_run(training: RunArguments, manifest: dict) -> str | None:
    """The folder of the run as open_run makes it, and the checkpoint to go on from, if there is one."""
    with training.main_process_first():
        overwrite = training.overwrite_output_dir and training.is_first
        checkpoint = open_run(Path(training.output_dir), manifest, overwrite)
    return str(checkpoint) if checkpoint else None


def keys_of(part: ModelArguments | DataArguments) -> dict:
    """What a recipe can say, with its values."""
    return {key.name: getattr(part, key.name) for key in fields(part) if key.init}


# ---------------------------------------------------------------------------------------------------------------------
# Save


def save(
    trainer: ScoringTrainer,
    manifest: dict,
    results: list[dict],
    calibration: dict,
    panels: tuple[Panel, ...],
    card: Callable[[dict, str], ModelCard],
) -> None:
    """Adapter, tokenizer, recipe, calibration, plot, card and, last, the manifest that says the run has finished."""
    folder = Path(trainer.args.output_dir)
    unfinished = folder / "unfinished"
    trainer.save_model(str(unfinished))  # all processes take part; the first one writes
    if not trainer.args.should_save:
        return
    for name in ("training_args.bin", CARD):  # a pickle, of which the recipe is the readable form; PEFT's empty card
        (unfinished / name).unlink(missing_ok=True)
    files = {path.name: hash_of(path) for path in sorted(unfinished.iterdir())}
    for name in files:
        os.replace(unfinished / name, folder / name)
    unfinished.rmdir()
    best, why = best_step(trainer), why_saved(trainer)
    manifest = {
        **manifest,
        "script": f"sha256:{CODE_HASH}",  # of what its loading script, too, is made of
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "steps": trainer.state.global_step,
        "best_step": best,
        "why_saved": why,
        "results": results,
        "files": files,
    }
    recipe = {key: value for key, value in manifest["recipe"].items() if value is not None}
    recipe["output_dir"] = trainer.args.output_dir
    atomic.write(folder / RECIPE, yaml.safe_dump(recipe, sort_keys=False))
    atomic.write(folder / CALIBRATION, json.dumps(calibration, indent=2))
    plot_course(trainer.state.log_history, best, folder / PLOT, panels, why)
    atomic.write(folder / CARD, str(card(manifest, trainer.args.output_dir)))
    atomic.write(folder / MANIFEST, json.dumps(manifest, indent=2))


def best_step(trainer: ScoringTrainer) -> int | None:
    """The step that is kept; None for the last one, where no best one was asked for."""
    return trainer.state.best_global_step if trainer.args.load_best_model_at_end else None


def why_saved(trainer: ScoringTrainer) -> str:
    """Which step is kept, by which metric, and its value."""
    state, best = trainer.state, best_step(trainer)
    if not best:
        return f"Kept is the last step, {state.global_step}, for no best one was asked for."
    name = str(trainer.args.metric_for_best_model).removeprefix("eval_")
    tried = sum(f"eval_{name}" in entry for entry in state.log_history)
    side = "highest" if trainer.args.greater_is_better else "lowest"
    return (
        f"Kept is step {best} of {state.global_step}: its {METRICS.get(name, name)}, {state.best_metric:.3f} on "
        f"{len(trainer.eval_dataset):,} validation records, is the {side} of {tried} evaluations."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figures


METRICS = {
    "mean_percent": "P&L vs HODL in % of spot",
    "dpo_loss": "DPO loss",
    "balanced_accuracy": "balanced accuracy",
}
RANDOM = "a random base"


def name_of_base(trainer: ScoringTrainer) -> str:
    """What the base is called in tables: the tiny one is not untuned."""
    made = made_tiny(trainer.model.config)
    return f"its base, trained {made['steps']} steps on the answers" if made else "its base, untuned"


def random_base(trainer: ScoringTrainer) -> PreTrainedModel | None:
    """What the tiny base was before its steps, in full precision; None of another base."""
    made = made_tiny(trainer.model.config)
    return random_phi3(trainer.processing_class, made["seed"]).to(trainer.args.device) if made else None


def calibrate_each(split: Dataset, scored: list[Scored], tasks: list[str]) -> dict:
    """The temperature of the first task and, where there are several, that of each under "tasks"."""
    fitted = {
        task: calibrate_on(split.select(places), [scored[place] for place in places])
        for task, places in tasks_in(split).items()
    }
    return {**fitted[tasks[0]], **({"tasks": fitted} if len(fitted) > 1 else {})}


def calibrate_on(split: Dataset, scored: list[Scored]) -> dict[str, float]:
    """The temperature that fits the answers' probabilities to the teacher's on this split."""
    targets = [answers.index(label) for answers, label in zip(split["answers"], split["label"], strict=True)]
    return best_temperature([torch.tensor(one.log_probabilities, dtype=torch.float64) for one in scored], targets)


def cells(results: list[dict], columns: dict[str, str]) -> list[list[str]]:
    """A table of some keys of the results, under their names; a dash where a result has none."""
    shown = [[result.get(key, "-") for key in columns] for result in results]
    return [
        list(columns.values()),
        *([f"{value:.3f}" if isinstance(value, float) else str(value) for value in row] for row in shown),
    ]


def table(results: list[dict], columns: dict[str, str]) -> str:
    texts = ("split", "answers_by")
    right = [place for place, key in enumerate(columns) if key not in texts]
    return f"\n{align(cells(results, columns), right)}"


def what_next(trainer: ScoringTrainer) -> str:
    """The last lines of a training: which step its result is and why, where it lies, and what to do with it."""
    folder = trainer.args.output_dir
    quoted = shlex.quote(folder)
    return (
        f"\n{why_saved(trainer)}\n"
        f"Saved in {folder}: the model, its card (README.md), its course ({PLOT}), its recipe ({RECIPE}).\n"
        f"Is it any good?  covered-call evaluate --model {quoted}\n"
        f"Decide with it:  from covered_call import Policy; Policy.load({json.dumps(folder)}).decide(decisions)"
    )
