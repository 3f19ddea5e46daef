"""Memory and speed of fine-tuning Phi-3-mini, quantised, on a GPU capped at 6 GiB (int4) or 8 GiB (int8).

    python benchmarks/gpu_memory.py                                   # a CUDA GPU, 8 GB of RAM and 8 GB of disk
    python benchmarks/gpu_memory.py --quantization int4 --batch 1 2 --output out/gpu_memory.json
    python benchmarks/gpu_memory.py --estimate                        # from shapes alone, anywhere
    python benchmarks/gpu_memory.py --size tiny                       # a tiny Phi-3 on the CPU: resident memory

The model has Phi-3-mini's public configuration and random weights, which take the memory of trained ones; only the
outliers that int8 multiplies apart in 16 bits are rarer. Each measurement is a process of its own, on the path of
train_sft.py with the ranking recipe: once as it trains, with logits only where there are labels, and once with logits
everywhere. The exit status is 1 if one failed, or if the model was in full precision on the GPU while it was loaded;
running out of memory is a result.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config, TrainerCallback, set_seed

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
import train_sft  # noqa: E402
from policy import write_text  # noqa: E402
from tiny_phi3 import train_tokenizer  # noqa: E402
from train_sft import CONTEXT_GIB, GIB  # noqa: E402

CARD_GIB = {"int4": 6, "int8": 8}
LOAD_LIMIT = 1.5
LOGITS = ("answers", "everywhere")
ANSWER_LENGTH = 3

# https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/config.json
PHI3_MINI = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2} | dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads"), 4
)
SHAPES = {"full": PHI3_MINI, "tiny": PHI3_MINI | TINY}
FOLDERS = {"full": "phi3-mini-random", "tiny": "phi3-tiny-random"}


# ---------------------------------------------------------------------------------------------------------------------
# Model and data


def build_model(folder: Path, size: str) -> None:
    """Saves a Phi-3 with random weights in ``folder``, unless it is there."""
    config = Phi3Config(**SHAPES[size])
    if folder.is_dir():
        there = AutoConfig.from_pretrained(folder)
        if (there.num_hidden_layers, there.hidden_size) != (config.num_hidden_layers, config.hidden_size):
            sys.exit(f"error: the model in {folder} is not of size {size}: give another --model folder.")
        return
    print(f"Building a random Phi-3 in {folder}, once.", file=sys.stderr)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    unfinished = folder.with_name(f"{folder.name}.tmp")
    model.save_pretrained(unfinished, max_shard_size="5GB")
    os.rename(unfinished, folder)


def random_records(records: int, tokens: int) -> tuple[Dataset, dict[str, tuple[int, ...]]]:
    """Records of random tokens that all end in the same labelled answer, and the tokens of that answer."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 32000, (records, tokens))
    ids[:, -ANSWER_LENGTH:] = ids[0, -ANSWER_LENGTH:]
    labels = ids.copy()
    labels[:, :-ANSWER_LENGTH] = train_sft.IGNORE
    answer = tuple(ids[0, -ANSWER_LENGTH:].tolist())
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}), {"1": answer}


# ---------------------------------------------------------------------------------------------------------------------
# One measurement


class LogitsEverywhere(train_sft.AnswerTrainer):
    """The same loss, from the logits of all positions, as transformers computes it by default."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class StepClock(TrainerCallback):
    """The time at the end of each step."""

    def __init__(self, gpu: bool):
        self.gpu, self.ends = gpu, []

    def on_step_end(self, args, state, control, **kwargs):
        if self.gpu:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def measure(size: str, model: Path, quantization: str, batch: int, logits: str, tokens: int, steps: int) -> dict:
    """Loads the model and trains it for a few steps, in this process, which must be a fresh one."""
    gpu = size == "full"
    result = {"quantization": quantization, "batch": batch, "logits": logits, "status": "ok"}
    with tempfile.TemporaryDirectory() as folder:
        recipe, _, training, _ = train_sft.parse_recipe(
            ["--config", "ranking", "--model_name_or_path", str(model), "--output_dir", folder]
            + ["--quantization", quantization, "--per_device_train_batch_size", str(batch)]
            + ["--gradient_accumulation_steps", "1", "--max_steps", str(steps), "--max_length", str(tokens)]
            + ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
            + ["--report_to", "none", "--disable_tqdm", "true"]
            + ([] if gpu else ["--use_cpu", "true", "--bf16", "false", "--optim", "adamw_torch"])
        )
        config = AutoConfig.from_pretrained(recipe.model_name_or_path)
        shapes = train_sft.count_parameters(config, recipe)
        logits_at = tokens if logits == "everywhere" else ANSWER_LENGTH
        estimated = train_sft.estimate_memory(config, shapes, recipe, training, tokens, logits_at)
        result["estimated_gib"] = sum(estimated.values())
        result["device"] = torch.cuda.get_device_name() if gpu else "CPU"
        if gpu:
            # The context lies outside the allocator that the cap holds.
            result["cap_gib"] = cap_memory(CARD_GIB[quantization] - CONTEXT_GIB)
        result["before_gib"] = peak_gib(gpu)
        try:
            base, adapter = train_sft.load_model(recipe, training)
            result["load_gib"] = peak_gib(gpu)
            result["loaded_gib"] = torch.cuda.memory_allocated() / GIB if gpu else None
            result |= take_steps(base, adapter, training, logits, tokens, gpu)
        except RuntimeError as error:
            if not is_out_of_memory(error, gpu):
                raise
            result["status"] = "OOM"
            result.setdefault("load_gib", peak_gib(gpu))
    if gpu:
        loaded = result.get("loaded_gib", estimated["weights"])
        result["full_precision_at_load"] = full_precision_at_load(result["load_gib"], loaded)
    return result


def cap_memory(gib: float) -> float:
    """Makes PyTorch run out of memory above ``gib``, or where the GPU ends."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
    return min(gib, total / GIB)


def take_steps(base, adapter, training, logits: str, tokens: int, gpu: bool) -> dict:
    """Peak memory, speed and loss of the recipe's training steps."""
    batch, steps = training.per_device_train_batch_size, training.max_steps
    records, answers = random_records(steps * batch, tokens)
    trainer = {"answers": train_sft.AnswerTrainer, "everywhere": LogitsEverywhere}[logits](
        model=base,
        args=training,
        train_dataset=records,
        processing_class=train_tokenizer(["1 2 3"]),
        peft_config=adapter,
        sampler=train_sft.EpochSampler([True] * len(records), "none", training.seed),
        answers=answers,
    )
    clock = StepClock(gpu)
    trainer.add_callback(clock)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    loss = trainer.train().training_loss
    # The first step, which also sets up kernels and the optimiser's state, is not timed.
    speed = (steps - 1) * batch * tokens / (clock.ends[-1] - clock.ends[0])
    return {"step_gib": peak_gib(gpu), "tokens_per_second": speed, "loss": loss}


def estimates(options: argparse.Namespace) -> str:
    """What the preflight would say of the full size, which is neither built nor loaded; GiB by batch size."""
    config, batches = Phi3Config(**PHI3_MINI), options.batch
    lines = [f"Phi-3-mini, {options.tokens} tokens a record; GiB, estimated, not measured\n"]
    lines += ["| | " + " | ".join(f"batch {batch}" for batch in batches) + " |", "|---" * (len(batches) + 1) + "|"]
    for quantization in options.quantization:
        recipe, _, training, _ = train_sft.parse_recipe(
            ["--config", "ranking", "--dry_run", "true", "--quantization", quantization]
        )
        shapes = train_sft.count_parameters(config, recipe)
        for where, logits_at in (("at the answers", ANSWER_LENGTH), ("everywhere", options.tokens)):
            cells = []
            for batch in batches:
                training.per_device_train_batch_size = batch
                parts = train_sft.estimate_memory(config, shapes, recipe, training, options.tokens, logits_at)
                cells.append(f"{sum(parts.values()):.1f}")
            lines.append(f"| {quantization}, logits {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def peak_gib(gpu: bool) -> float:
    """Peak of PyTorch's allocations on the GPU, or of this process's resident memory."""
    if gpu:
        return torch.cuda.max_memory_allocated() / GIB
    # Linux starts a process at the peak of its parent, which here is that of the imports, as its own.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def is_out_of_memory(error: RuntimeError, gpu: bool) -> bool:
    """Transformers raises another error when memory runs out while it quantises, so the allocator is asked too."""
    return isinstance(error, torch.OutOfMemoryError) or (gpu and torch.cuda.memory_stats().get("num_ooms", 0) > 0)


def full_precision_at_load(peak_gib: float, loaded_gib: float) -> bool:
    """Whether loading took so much more memory than stays allocated that weights must have come unquantised.

    Phi-3-mini's 16-bit weights take 3.4 times as much as its int4 ones, 1.9 times as much as its int8 ones; one matrix
    after the other adds less than a tenth.
    """
    return peak_gib >= LOAD_LIMIT * loaded_gib


# ---------------------------------------------------------------------------------------------------------------------
# All measurements


def measure_apart(options: argparse.Namespace, quantization: str, batch: int, logits: str) -> dict:
    """One measurement in a process of its own; it prints its figures as JSON."""
    command = [sys.executable, "-W", "ignore", __file__, "--size", options.size, "--model", str(options.model)]
    command += ["--quantization", quantization, "--batch", str(batch), "--logits", logits]
    command += ["--tokens", str(options.tokens), "--steps", str(options.steps)]
    # On several GPUs the Trainer would spread its batches over them.
    first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": first_gpu}, capture_output=True, text=True
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(done.stderr, file=sys.stderr)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return {
        **{"quantization": quantization, "batch": batch, "logits": logits, "status": "failed"},
        "error": f"exit status {done.returncode}: {last}",
    }


def table(report: dict) -> str:
    """A Markdown table, a line for each quantisation and batch size."""
    memory = "GPU memory that PyTorch allocated" if report["size"] == "full" else "resident memory of the process"
    lines = [
        f"{report['device']}, " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        f"{report['size']} size, {report['tokens']} tokens a record; GiB, peaks of {memory}",
        "",
        "| quantization | batch | at load | in the step | estimated | tokens/s "
        "| logits everywhere: in the step | estimated | tokens/s | saved | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for pair in zip(report["results"][::2], report["results"][1::2], strict=True):
        cells = [pair[0]["quantization"], str(pair[0]["batch"]), cell(pair[0], "load_gib")]
        for one in pair:
            cells += [cell(one, "step_gib"), cell(one, "estimated_gib"), cell(one, "tokens_per_second", ",.0f")]
        steps = [one["step_gib"] for one in pair if "step_gib" in one]
        saved = f"{steps[1] - steps[0]:.2f}" if len(steps) == 2 else ""
        lines.append(f"| {' | '.join([*cells, saved, remarks(pair)])} |")
    before = max(one.get("before_gib", 0) for one in report["results"])
    if before:
        lines += ["", f"{before:.2f} GiB of it before loading, of Python and its libraries, which no estimate counts."]
    return "\n".join(lines)


def cell(result: dict, key: str, form: str = ".2f") -> str:
    return format(result[key], form) if key in result else result["status"]


def remarks(pair: list[dict]) -> str:
    found = ["full precision at load" for one in pair if one.get("full_precision_at_load")]
    found += [one["error"] for one in pair if "error" in one]
    return "; ".join(dict.fromkeys(found)).replace("|", "/")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="full", help="full: on a CUDA GPU; tiny: on the CPU")
    parser.add_argument("--quantization", choices=CARD_GIB, nargs="+", default=list(CARD_GIB), help="default: both")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    parser.add_argument("--tokens", type=int, default=512, help="of each record; default: 512")
    parser.add_argument("--steps", type=int, default=5, help="optimiser steps, the first untimed; default: 5")
    parser.add_argument("--estimate", action="store_true", help="print what is expected of the full size, and stop")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--model", type=Path, help="folder of the random model; default: below models/, by size")
    parser.add_argument("--logits", choices=LOGITS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first is not timed")
    if min(options.batch) < 1:
        parser.error("--batch must be at least 1")
    limit = PHI3_MINI["max_position_embeddings"]
    if not ANSWER_LENGTH < options.tokens <= limit:
        parser.error(f"--tokens must be more than {ANSWER_LENGTH} and at most {limit}")
    options.model = options.model or REPOSITORY / "models" / FOLDERS[options.size]
    return options


def main() -> None:
    options = parse()
    if options.estimate:
        return print(estimates(options))
    if options.size == "full" and not torch.cuda.is_available():
        sys.exit("error: --size full needs a CUDA GPU and there is none; --size tiny runs the same path on the CPU.")
    if options.logits:
        [quantization], [batch] = options.quantization, options.batch
        run = {name: getattr(options, name) for name in ("size", "model", "logits", "tokens", "steps")}
        return print(json.dumps(measure(**run, quantization=quantization, batch=batch)))
    build_model(options.model, options.size)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "size": options.size,
        "tokens": options.tokens,
        "steps": options.steps,
        "device": "unknown device",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl, bitsandbytes)},
        "results": [],
    }
    for quantization in options.quantization:
        for batch in options.batch:
            for logits in LOGITS:
                result = measure_apart(options, quantization, batch, logits)
                print(f"{quantization}, batch {batch}, logits {logits}: {result['status']}", file=sys.stderr)
                report["device"] = result.pop("device", report["device"])
                report["results"].append(result)
                if options.output:  # each time, so that what is measured outlives an interruption
                    write_text(options.output, json.dumps(report, indent=2))
    print(table(report))
    wrong = [r for r in report["results"] if r["status"] == "failed" or r.get("full_precision_at_load")]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
