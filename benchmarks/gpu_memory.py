"""Memory and speed of fine-tuning Phi-3-mini, quantised, on a GPU capped at 6 GB (int4) or 8 GB (int8).

    python benchmarks/gpu_memory.py                            # all that this machine can
    python benchmarks/gpu_memory.py --work step trl --quantization int4 --batch 1 --tokens 795
    python benchmarks/gpu_memory.py --unsloth ../unsloth/bin/python         # beside Unsloth, in its own environment
    python benchmarks/gpu_memory.py --stack nightly=../nightly/bin/python   # on other libraries
    python benchmarks/gpu_memory.py --estimate                 # from shapes alone, anywhere
    python benchmarks/gpu_memory.py --size tiny                # the same path with a tiny Phi-3 on the CPU

It writes out/gpu_memory.json and, as tables, out/gpu_memory.md; what is there of the same device and versions is not
measured again. Without a CUDA GPU the tables say what is estimated, and "not yet measured". On one, it takes 8 GB of
RAM and 8 GB of disk.

The model has Phi-3-mini's public configuration and random weights, which take the memory of trained ones; only the
outliers that int8 multiplies apart in 16 bits are rarer. Each measurement is a process of its own (gpu_work.py). The
exit status is 1 if one failed, or if the model was in full precision on the GPU while it was loaded; running out of
memory is a result.
"""

# ruff: noqa: E402

import argparse
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config, set_seed

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]
from gpu_work import (
    ABSENT,
    ANSWER_LENGTH,
    ANSWERS,
    WORKS,
    Job,
    Stack,
    decision_of,
    default_stacks,
    full_precision_at_load,
    probe,
    run_apart,
)

from covered_call import atomic
from covered_call.candidates.prompts import ranking_messages
from covered_call.language_model.tiny_phi3 import train_tokenizer
from covered_call.training.memory import CARD_GIB, CONTEXT_GIB, GIB, Work, choose
from covered_call.training.preflight import describe_model
from covered_call.training.recipe import parse_recipe

TOLERANCE = 0.10  # of an estimate, beside what is measured
NOT_YET = "not yet measured"
ESTIMATED = """Phi-3-mini; GiB of GPU memory without CUDA's own, estimated from shapes, not measured. In brackets: the
layers that are computed twice, on a card of 6 GB for int4 and of 8 GB for int8."""
SCORING = {"evaluation": "evaluation", "decide": "Policy.decide"}
SCORED = {"full": 64, "tiny": 3}

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
OUTPUTS = {"full": "gpu_memory.json", "tiny": "gpu_memory_tiny.json"}


class Case(NamedTuple):
    """One measurement; see gpu_work.py."""

    work: str
    stack: str
    quantization: str
    tokens: int
    batch: int

    def __str__(self) -> str:
        return f"{self.work}, {self.stack}, {self.quantization}, {self.tokens} tokens, batch {self.batch}"


# ---------------------------------------------------------------------------------------------------------------------
# Model


def build_model(folder: Path, size: str) -> None:
    """Saves a Phi-3 with random weights, and a tokenizer of prompts, in ``folder``, unless they are there."""
    config = Phi3Config(**SHAPES[size])
    if folder.is_dir():
        there = AutoConfig.from_pretrained(folder)
        if (there.num_hidden_layers, there.hidden_size) != (config.num_hidden_layers, config.hidden_size):
            sys.exit(f"error: the model in {folder} is not of size {size}: give another --model folder.")
    else:
        print(f"Building a random Phi-3 in {folder}, once.", file=sys.stderr)
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        unfinished = folder.with_name(f"{folder.name}.tmp")
        model.save_pretrained(unfinished, max_shard_size="5GB")
        os.rename(unfinished, folder)
    if not (folder / "tokenizer_config.json").is_file():
        texts = [message["content"] for message in ranking_messages(decision_of(0))]
        train_tokenizer([*texts, *ANSWERS]).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Estimates


@functools.cache
def work_of(size: str, quantization: str) -> Work:
    """What the ranking recipe's memory depends on, but for the length of its records."""
    model, _, training, _ = parse_recipe(
        # On a GPU too: this process is to take nothing of it.
        ["--config", "ranking", "--use_cpu", "true", "--quantization", quantization]
        + (["--bf16", "false", "--optim", "adamw_torch"] if size == "tiny" else [])
    )
    return describe_model(Phi3Config(**SHAPES[size]), model, training, tokens=1, asked=1)


def estimate(size: str, case: Case, checkpoint_every: int | None = None) -> dict[str, float]:
    """GiB at the peaks of one case of this library's.

    Args:
        checkpoint_every: as it was measured; None: as it would be on the card that the quantisation is made for.
    """
    # A pair's two answers follow one prompt.
    answers = {"dpo": 2, "evaluation": len(ANSWERS), "decide": len(ANSWERS)}.get(case.work, 1)
    asked = answers * ANSWER_LENGTH
    tokens = case.tokens - ANSWER_LENGTH + asked
    work = dataclasses.replace(work_of(size, case.quantization), tokens=tokens, asked=asked)
    resident = work.resident()
    # One matrix after the other, in 16 bits until it is quantised.
    found = {"load_gib": resident["weights"] + work.unpacked() / GIB}
    if case.work in ("step", "dpo"):
        if checkpoint_every is None:
            card = CARD_GIB[case.quantization] - CONTEXT_GIB if size == "full" else None
            checkpoint_every = choose(work, case.batch, case.batch, None, card).checkpoint_every
        step = sum(work.step(case.batch, checkpoint_every).values())
        return found | {"step_gib": step, "checkpoint_every": checkpoint_every}
    if case.work == "evaluation":
        return found | {"evaluation_gib": work.evaluation(tokens, asked)}
    if case.work == "decide":
        # A policy holds the adapter alone, in float32, without gradients or an optimiser's state.
        adapter = 4 * work.size.adapter / GIB - resident["trained"]
        return found | {"decide_gib": work.evaluation(tokens, asked) + adapter}
    return {}


def estimates(options: argparse.Namespace) -> str:
    """What is expected of the full size, which is neither built nor loaded."""
    rows = []
    for quantization in options.quantization:
        for tokens in options.tokens:
            row = {"quantization": quantization, "tokens": str(tokens)}
            for batch in options.batch:
                found = estimate("full", Case("step", "", quantization, tokens, batch))
                row["at load"] = f"{found['load_gib']:.2f}"
                row[f"step, batch {batch}"] = f"{found['step_gib']:.2f} ({twice(found['checkpoint_every'])})"
            for work, name in SCORING.items():
                found = estimate("full", Case(work, "", quantization, tokens, 1))
                row[name] = f"{found[f'{work}_gib']:.2f}"
            rows.append(row)
    return f"{ESTIMATED}\n\n{markdown(rows)}"


# ---------------------------------------------------------------------------------------------------------------------
# All measurements


def all_cases(options: argparse.Namespace, stacks: dict[str, Stack]) -> list[Case]:
    """Whether they can be measured here or not. Evaluations and decisions know no batches."""
    cases = []
    for work in options.work:
        for stack in ["unsloth"] if work == "unsloth" else [name for name in stacks if name != "unsloth"]:
            for quantization in ["int4"] if work == "fsdp" else options.quantization:
                for tokens in [max(options.tokens)] if work in ("dpo", "fsdp") else options.tokens:
                    for batch in [1] if work in (*SCORING, "fsdp") else options.batch:
                        cases.append(Case(work, stack, quantization, tokens, batch))
    return cases


def obstacle(case: Case, stack: Stack, size: str) -> str | None:
    """Why this cannot be measured here."""
    if case.work == "unsloth" and "unsloth" not in stack.versions:
        return "not installed"
    if case.work == "fsdp" and (stack.gpus < 2 or size == "tiny"):
        return "needs two GPUs"
    return NOT_YET if size == "full" and stack.device is None else None


def is_current(result: dict, stack: Stack, options: argparse.Namespace) -> bool:
    """Whether a figure is of this Python's libraries and GPU, where there are any."""
    here = "CPU" if options.size == "tiny" else stack.device
    known = stack.versions in ({}, result["versions"]) and here in (None, result["device"])
    return known and result["steps"] == options.steps


def measure_apart(case: Case, stack: Stack, options: argparse.Namespace) -> dict:
    """One measurement in a process of its own."""
    full = options.size == "full"
    job = Job(
        quantization=case.quantization,
        batch=case.batch,
        tokens=case.tokens,
        steps=options.steps,
        scored=SCORED[options.size],
        model=str(options.model),
        cap_gib=CARD_GIB[case.quantization] - CONTEXT_GIB if full and case.work != "fsdp" else None,
        gpu=full,
    )
    about = {"device": stack.device if full else "CPU", "versions": stack.versions, "steps": options.steps}
    return case._asdict() | about | run_apart(stack.python, case.work, job)


def is_wrong_at_load(case: Case, result: dict, size: str) -> bool:
    if size == "tiny" or case.work in ("unsloth", "fsdp"):
        return False
    return full_precision_at_load(result, work_of(size, case.quantization).resident()["weights"])


# ---------------------------------------------------------------------------------------------------------------------
# Report


class Report:
    """What was measured, in a file that outlives an interruption."""

    def __init__(self, options: argparse.Namespace, stacks: dict[str, Stack]):
        self.options, self.stacks, self.measured = options, stacks, {}
        if options.output.is_file():
            self.read()

    def read(self) -> None:
        there = json.loads(self.options.output.read_text(encoding="utf-8"))
        if there["size"] != self.options.size:
            sys.exit(f"error: {self.options.output} is of size {there['size']}: give another --output.")
        for one in there["results"]:
            if "device" in one:  # measured, then or before
                self.measured[Case(*(one[name] for name in Case._fields))] = one

    def is_measured(self, case: Case) -> bool:
        return self.row(case)["status"] in ("ok", "OOM")

    def row(self, case: Case) -> dict:
        """All that is known of a case; a status without figures says why there are none."""
        result, stack = self.measured.get(case), self.stacks[case.stack]
        if not result or not is_current(result, stack, self.options):
            result = {"status": obstacle(case, stack, self.options.size) or NOT_YET}
        row = case._asdict() | result
        row.pop("wrong", None)
        row["estimated"] = estimate(self.options.size, case, row.get("checkpoint_every"))
        if "records_per_second" in row:
            row["tokens_per_second"] = row["records_per_second"] * case.tokens
        if "device" in row and is_wrong_at_load(case, row, self.options.size):
            row["wrong"] = "full precision at load"
        return row

    def write(self, cases: list[Case]) -> None:
        """The figures of these cases, and what the file held of others or of other libraries; then the tables."""
        rows = {case: self.row(case) for case in cases}
        kept = [result for case, result in self.measured.items() if "device" not in rows.get(case, {})]
        path = self.options.output
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, json.dumps({"size": self.options.size, "results": [*rows.values(), *kept]}, indent=2))
        atomic.write(path.with_suffix(".md"), self.tables(cases) + "\n")

    def tables(self, cases: list[Case]) -> str:
        """All tables of these cases in Markdown."""
        rows = [self.row(case) for case in cases]
        parts = [self.heading(rows)]
        for works, table in TABLES:
            if lines := [table(self, row) for row in rows if row["work"] in works]:
                parts.append(markdown(lines))
        return "\n\n".join(parts)

    def heading(self, rows: list[dict]) -> str:
        """What was measured where."""
        memory = "GPU memory that PyTorch allocated" if self.options.size == "full" else "resident memory"
        lines = [
            f"Phi-3-mini, {self.options.size} size, random weights. GiB: peaks of {memory}. Estimates are from shapes"
            f" alone; **bold**: off by more than {TOLERANCE:.0%}.",
            "",
        ]
        for name, stack in self.stacks.items():
            measured = [row for row in rows if row["stack"] == name and "device" in row]
            if versions := stack.versions or (measured and measured[0]["versions"]):
                devices = ", ".join(sorted({row["device"] for row in measured})) or NOT_YET
                lines.append(f"- {name}: {devices}; {', '.join(' '.join(version) for version in versions.items())}")
        for key, text in (("before_gib", BEFORE), ("outside_gib", OUTSIDE)):
            if most := max((row.get(key, 0) for row in rows), default=0):
                lines.append(f"- {most:.2f} GiB {text}")
        return "\n".join(lines)

    def other(self, row: dict, work: str) -> dict:
        """The same records in another's hands."""
        stack = "unsloth" if work == "unsloth" else row["stack"]
        return self.row(Case(work, stack, row["quantization"], row["tokens"], row["batch"]))


BEFORE = "of it before loading, of Python and its libraries, which no estimate counts"
OUTSIDE = f"of the GPU at most outside PyTorch's allocator, for which {CONTEXT_GIB} are left"


def markdown(rows: list[dict[str, str]]) -> str:
    """A table of rows that all have the same columns."""
    head = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(row.values())} |" for row in rows)])


def cell(row: dict, key: str, form: str = ".2f") -> str:
    """A measured figure, or why there is none."""
    return format(row[key], form) if key in row else row["status"]


def expected(row: dict, key: str) -> str:
    """An estimate, with its error where it can be told: resident memory holds more than the model."""
    text = f"{row['estimated'][key]:.2f}"
    if key not in row or row["device"] == "CPU":
        return text
    error = row["estimated"][key] / row[key] - 1
    return f"**{text} ({error:+.1%})**" if abs(error) > TOLERANCE else f"{text} ({error:+.1%})"


def twice(checkpoint_every: int) -> str:
    """Which layers are computed twice."""
    return {0: "none", 1: "all"}.get(checkpoint_every, f"1 in {checkpoint_every}")


def ratio(one: dict, other: dict, key: str) -> str:
    lacking = next((row for row in (one, other) if key not in row), None)
    return lacking["status"] if lacking else f"{one[key] / other[key]:.2f}"


def where(row: dict, *names: str) -> dict[str, str]:
    return {name: str(row[name]) for name in ("stack", "quantization", "tokens", *names)}


def remarks(*rows: dict) -> dict[str, str]:
    """What went wrong, as the last column."""
    found = [row[key] for row in rows for key in ("wrong", "error") if key in row]
    return {"": "; ".join(dict.fromkeys(found)).replace("|", "/")}


def step_row(report: Report, row: dict) -> dict[str, str]:
    return {
        **where(row, "batch"),
        "layers computed twice": twice(row["estimated"]["checkpoint_every"]),
        "at load": cell(row, "load_gib"),
        "load, estimated": expected(row, "load_gib"),
        "in a step": cell(row, "step_gib"),
        "step, estimated": expected(row, "step_gib"),
        **remarks(row),
    }


def trl_row(report: Report, row: dict) -> dict[str, str]:
    ours, unsloth = report.other(row, "step"), report.other(row, "unsloth")
    return {
        **where(row, "batch"),
        "in a step": cell(ours, "step_gib"),
        "tokens/s": cell(ours, "tokens_per_second", ",.0f"),
        "TRL's defaults: in a step": cell(row, "step_gib"),
        "TRL: tokens/s": cell(row, "tokens_per_second", ",.0f"),
        "memory, ours / TRL": ratio(ours, row, "step_gib"),
        "tokens/s, ours / TRL": ratio(ours, row, "tokens_per_second"),
        "Unsloth: in a step": cell(unsloth, "step_gib"),
        "Unsloth: tokens/s": cell(unsloth, "tokens_per_second", ",.0f"),
        **remarks(row, unsloth),
    }


def scored_row(report: Report, row: dict) -> dict[str, str]:
    key = f"{row['work']}_gib"
    return {
        "": SCORING[row["work"]],
        **where(row),
        "at load": cell(row, "load_gib"),
        "one decision at a time": cell(row, key),
        "estimated": expected(row, key),
        "as many as memory allows": cell(row, f"{row['work']}_filled_gib"),
        "decisions/s": cell(row, f"{row['work']}_per_second", ".1f"),
        "remarks": remarks(row)[""],
    }


def pair_row(report: Report, row: dict) -> dict[str, str]:
    return {
        **where(row, "batch"),
        "at load": cell(row, "load_gib"),
        "in a DPO step": cell(row, "step_gib"),
        "estimated": expected(row, "step_gib"),
        "pairs/s": cell(row, "records_per_second"),
        **remarks(row),
    }


def sharded_row(report: Report, row: dict) -> dict[str, str]:
    return {
        **where(row, "batch"),
        "FSDP: each of two GPUs, at load": cell(row, "load_gib"),
        "in a step": cell(row, "step_gib"),
        **remarks(row),
    }


TABLES = (
    (("step",), step_row),
    (("trl",), trl_row),
    (tuple(SCORING), scored_row),
    (("dpo",), pair_row),
    (("fsdp",), sharded_row),
)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="full", help="full: on a CUDA GPU; tiny: on the CPU")
    parser.add_argument("--work", choices=WORKS, nargs="+", default=list(WORKS), help="default: all")
    parser.add_argument("--quantization", choices=CARD_GIB, nargs="+", default=list(CARD_GIB), help="default: both")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--tokens", type=int, nargs="+", default=[278, 512, 795], help="default: 278 512 795")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps, the first untimed; default: 10")
    parser.add_argument(
        "--stack", metavar="NAME=PYTHON", action="append", help="default: .venv, .venv-current, and this Python"
    )
    parser.add_argument("--unsloth", metavar="PYTHON", help="of an environment with Unsloth")
    parser.add_argument("--again", action="store_true", help="measure what was measured before too")
    parser.add_argument("--estimate", action="store_true", help="print what is expected of the full size, and stop")
    parser.add_argument("--output", type=Path, help="JSON; the tables go beside it, as .md; default: in out/, by size")
    parser.add_argument("--model", type=Path, help="folder of the random model; default: in models/, by size")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first is not timed")
    if min(options.batch) < 1:
        parser.error("--batch must be at least 1")
    limit = PHI3_MINI["sliding_window"]
    if not all(ANSWER_LENGTH < tokens <= limit for tokens in options.tokens):
        parser.error(f"--tokens must be more than {ANSWER_LENGTH} and at most {limit}")
    if any("=" not in stack or stack.startswith("unsloth=") for stack in options.stack or []):
        parser.error("--stack takes NAME=PYTHON, and --unsloth the one with Unsloth")
    options.model = (options.model or REPOSITORY / "models" / FOLDERS[options.size]).absolute()
    options.output = options.output or REPOSITORY / "out" / OUTPUTS[options.size]
    return options


def main() -> None:
    options = parse()
    if options.estimate:
        return print(estimates(options))
    named = dict(stack.split("=", 1) for stack in options.stack) if options.stack else default_stacks()
    stacks = {name: probe(name, python) for name, python in named.items()}
    stacks["unsloth"] = probe("unsloth", options.unsloth) if options.unsloth else ABSENT
    report, cases = Report(options, stacks), all_cases(options, stacks)
    due = [case for case in cases if not obstacle(case, stacks[case.stack], options.size)]
    due = [case for case in due if options.again or not report.is_measured(case)]
    if due:
        build_model(options.model, options.size)
    for number, case in enumerate(due, start=1):
        print(f"{number} of {len(due)}: {case}", end=": ", file=sys.stderr, flush=True)
        report.measured[case] = measure_apart(case, stacks[case.stack], options)
        print(report.row(case)["status"], file=sys.stderr)
        report.write(cases)
    report.write(cases)
    print(report.tables(cases))
    rows = [report.row(case) for case in cases]
    print(f"\nWritten to {options.output} and {options.output.with_suffix('.md').name}.", file=sys.stderr)
    if options.size == "full" and not any(stack.device for stack in stacks.values()):
        print(f"There is no CUDA GPU here: what has no figure is {NOT_YET}. Try --size tiny.", file=sys.stderr)
    sys.exit(1 if any(row["status"] == "failed" or "wrong" in row for row in rows) else 0)


if __name__ == "__main__":
    main()
