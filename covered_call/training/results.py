"""TODO."""

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
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from peft import PeftModel
from sklearn.metrics import accuracy_score

from covered_call import atomic
from covered_call.candidates.builder import fingerprint
from covered_call.candidates.prompts import PROMPT_VERSION
from covered_call.candidates.reading import hashes_of
from covered_call.language_model.loading import base_revision
from covered_call.language_model.manifest import CALIBRATION, MANIFEST, RECIPE, hash_of
from covered_call.language_model.policy import fit_temperature
from covered_call.language_model.scoring import Scored
from covered_call.training.card import Panel, fill_card, plot_course
from covered_call.training.examples import EpochSampler
from covered_call.training.recipe import DataArguments, ModelArguments, TrainingArguments
from covered_call.training.runs import RecipeError, of_the_run
from covered_call.training.trainers import AnswerTrainer, ScoringTrainer, balanced_accuracy, predictions

CARD, PLOT = "README.md", "training.png"


# ---------------------------------------------------------------------------------------------------------------------
# Resume and save


def describe_run(
    model: ModelArguments,
    data: DataArguments,
    training: TrainingArguments,
    given: dict,
    hashes: dict[str, str],
    splits: DatasetDict,
    answers: dict[str, tuple[int, ...]],
    sampler: EpochSampler,
    seen: dict,
) -> dict:
    """The manifest: all that decides what comes out of a run. Equal manifests give equal weights.

    Args:
        hashes: of the data files by path, from before they were read.
        splits: as encode_split made them.
        seen: of the training split; see tuned_on.

    Raises:
        RecipeError: if a data file is not any more as it was then.
    """
    for path, digest in hashes_of(fingerprint(list(hashes))).items():
        if digest != hashes[path]:
            raise RecipeError(f"{path} has changed since this run began to read it. Start again when it is whole.")
    return {
        "task": data.dataset_config,
        "base_model": model.model_name_or_path,
        "base_revision": base_revision(model.model_name_or_path),
        "quantization": model.quantization,
        "adapter": bool(model.lora_r),
        "data_files": {os.path.basename(path): digest for path, digest in hashes.items()},
        "prompt_version": PROMPT_VERSION,
        "labels": list(answers),
        "splits": {
            name: {
                "records": sampler.records if name == "train" else len(split),
                "from": min(split["decision_time"]).isoformat(),
                "to": max(split["decision_time"]).isoformat(),
            }
            for name, split in splits.items()
        },
        "recipe": of_the_run({**keys_of(model), **keys_of(data), **given, **training.settled()}),
        "tuned_on": seen,
        "processes": training.world_size,
        "micro_batch": training.per_device_train_batch_size,
        "seed": training.seed,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
        },
        "finished": None,
    }


def keys_of(part: ModelArguments | DataArguments) -> dict:
    """What a recipe can say, with its values."""
    return {key.name: getattr(part, key.name) for key in fields(part) if key.init}


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
    best = trainer.state.best_global_step
    manifest = {
        **manifest,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "steps": trainer.state.global_step,
        "best_step": best,
        "results": results,
        "files": files,
    }
    recipe = {key: value for key, value in manifest["recipe"].items() if value is not None}
    recipe["output_dir"] = trainer.args.output_dir
    atomic.write(folder / RECIPE, yaml.safe_dump(recipe, sort_keys=False))
    atomic.write(folder / CALIBRATION, json.dumps(calibration, indent=2))
    plot_course(trainer.state.log_history, best, folder / PLOT, panels)
    atomic.write(folder / CARD, str(card(manifest, trainer.args.output_dir)))
    atomic.write(folder / MANIFEST, json.dumps(manifest, indent=2))


IMITATES = "It imitates a covered-call backtest (the teacher)"
COPIES = "it copies a rule, on the markets of those dates; agreeing with the teacher is no evidence of profit."


def model_card(manifest: dict, folder: str) -> ModelCard:
    rows = [
        f"| {r['split']} | {r['records']} | {r['answers_by']} | {r['accuracy']:.3f} | {r['balanced_accuracy']:.3f} |"
        for r in manifest["results"]
    ]
    head = ["| split | records | answers by | accuracy | balanced accuracy |", "|---|---|---|---|---|"]
    return fill_card(manifest, folder, "sft", IMITATES, "\n".join([*head, *rows]), COPIES)


def report(trainer: AnswerTrainer, splits: DatasetDict, scored: dict[str, list[Scored]], commonest: str) -> list[dict]:
    """Accuracy and balanced accuracy of the tuned model, of its base, and of always the commonest answer."""
    results = []
    for name in scored:
        split = splits[name]
        answers = {"tuned model": predictions(split, scored[name])}
        if isinstance(trainer.model, PeftModel):
            with trainer.model.disable_adapter():
                answers["its base, untuned"] = predictions(split, trainer.score(split))
        answers[f"always {commonest}"] = [commonest] * len(split)
        for who, given in answers.items():
            results.append(
                {
                    "split": name,
                    "records": len(split),
                    "answers_by": who,
                    "accuracy": float(accuracy_score(split["label"], given)),
                    "balanced_accuracy": balanced_accuracy(split["label"], given),
                }
            )
    return results


def calibrate_on(split: Dataset, scored: list[Scored]) -> dict[str, float]:
    """The temperature that fits the answers' probabilities to the teacher's on this split."""
    targets = [answers.index(label) for answers, label in zip(split["answers"], split["label"], strict=True)]
    return fit_temperature([torch.tensor(one.log_probabilities, dtype=torch.float64) for one in scored], targets)


def table(results: list[dict]) -> str:
    head = f"\n{'split':<12}{'records':>8}  {'answers by':<24}{'accuracy':>9}{'balanced accuracy':>19}"
    lines = [
        f"{r['split']:<12}{r['records']:>8}  {r['answers_by']:<24}{r['accuracy']:>9.3f}{r['balanced_accuracy']:>19.3f}"
        for r in results
    ]
    return "\n".join([head, *lines])


def what_next(folder: str) -> str:
    """The last lines of a training: where its result lies, and what to do with it."""
    quoted = shlex.quote(folder)
    return (
        f"\nSaved in {folder}: the model, its card (README.md), its course ({PLOT}), its recipe ({RECIPE}).\n"
        f"Is it any good?  python evaluate_policy.py --model {quoted}\n"
        f"Decide with it:  from policy import Policy; Policy.load({json.dumps(folder)}).decide(decisions)"
    )
