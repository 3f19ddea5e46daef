"""One measurement of gpu_memory.py, in a process of its own; it prints its figures as a line of JSON.

    python benchmarks/gpu_work.py step '{"quantization": "int4", "batch": 1, "tokens": 512, ...}'    # see Job

Memory is in GiB: the peak of what PyTorch allocated on the GPU, or of the resident memory of the process on a CPU.
"""

# ruff: noqa: E402

import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UNSLOTH = sys.argv[1:2] == ["unsloth"]
if UNSLOTH:
    from unsloth import FastModel  # before all others, which it changes

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

if not UNSLOTH:  # whose environment need not have what these import
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from accelerate.utils import gather_object
    from peft import get_peft_model

    from covered_call.candidates.prompts import ranking_messages
    from covered_call.candidates.schema import Candidate, Decision
    from covered_call.language_model.loading import chat_ids, load_base
    from covered_call.language_model.policy import Policy
    from covered_call.training.dpo import PreferenceTrainer
    from covered_call.training.examples import EpochSampler
    from covered_call.training.preflight import describe_model, make_plan, memory_for
    from covered_call.training.recipe import DPO, SFT, parse_recipe
    from covered_call.training.trainers import AnswerTrainer, load_model, lora_config

GIB = 2**30
LOAD_LIMIT = 1.5
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
EXTRAS = ("liger-kernel", "unsloth")  # told where they are installed
STACKS = {"default": ".venv", "current": ".venv-current"}
REPOSITORY = Path(__file__).parents[1]
FSDP = REPOSITORY / "configs" / "accelerate" / "fsdp_qlora.yaml"
IGNORE = -100  # the label of a token that carries no loss
ANSWER_LENGTH = 3  # tokens
ANSWERS = [*map(str, range(1, 10)), "NO_TRADE"]
LEARNING_RATE = 2e-4
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
PHI3_LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


class Job(NamedTuple):
    """What is measured.

    Args:
        batch: records of a step.
        tokens: of each record, its answer included.
        steps: of the optimiser; the first is not timed.
        scored: records or decisions whose answers are scored.
        model: a folder with the base and a tokenizer.
        cap_gib: what PyTorch may take of the GPU; None: all.
        gpu: False for the CPU.
    """

    quantization: str
    batch: int
    tokens: int
    steps: int
    scored: int
    model: str
    cap_gib: float | None
    gpu: bool


# ---------------------------------------------------------------------------------------------------------------------
# Data


def answer_ids() -> dict[str, tuple[int, ...]]:
    """Tokens of each answer; as in a real tokenizer, all end alike."""
    return {answer: (100 + place, *range(200, 198 + ANSWER_LENGTH), 2) for place, answer in enumerate(ANSWERS)}


def random_records(records: int, tokens: int, answers: list[str] = ANSWERS) -> Dataset:
    """Records of random tokens that end in one of these answers in turn, as examples.py makes them."""
    rng, known = np.random.default_rng(0), answer_ids()
    labels = [answers[place % len(answers)] for place in range(records)]
    prompts = rng.integers(300, 32000, (records, tokens - ANSWER_LENGTH)).tolist()
    return Dataset.from_dict(
        {
            "input_ids": [[*prompt, *known[label]] for prompt, label in zip(prompts, labels, strict=True)],
            "labels": [[IGNORE] * len(prompts[0]) + [*known[label]] for label in labels],
            "label": labels,
            "answers": [answers] * records,
            "decision_id": [str(place) for place in range(records)],
            "task": ["per_decision_ranking"] * records,
        }
    )


def decision_of(tokens: int, tokenizer=None) -> "Decision":
    """A decision of as many candidates as fit in a prompt of so many tokens, at most one fewer than ANSWERS, and of
    digits that fill it; of one candidate if not even that fits, and of all without a tokenizer."""
    time = datetime.datetime(2024, 9, 1, tzinfo=datetime.UTC)
    candidates = [
        Candidate(f"BTC-08SEP24-{60 + n}000-C", 1000.0 * (60 + n), 7.0, 0.3 - n / 50, 3.5 - n / 4, 0.7, 0.93)
        for n in range(len(ANSWERS) - 1)
    ]
    decision = Decision(time, "BTC", "hold_to_expiry", 58466.0, tuple(candidates))
    if tokenizer is None:
        return decision
    while prompt_tokens(tokenizer, decision) > tokens and len(decision.candidates) > 1:
        decision = decision._replace(candidates=decision.candidates[:-1])
    spare = max(0, tokens - prompt_tokens(tokenizer, decision))
    return decision._replace(exit_style=decision.exit_style + "7" * spare)  # each digit is a token


def prompt_tokens(tokenizer, decision: "Decision") -> int:
    return len(chat_ids(tokenizer, [ranking_messages(decision)], add_generation_prompt=True)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def peak_gib(gpu: bool) -> float:
    """The peak since it was last reset; that of a CPU's resident memory never is."""
    if gpu:
        return torch.cuda.max_memory_allocated() / GIB
    # Linux starts a process at the peak of its parent, which here is that of the imports, as its own.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_peak(gpu: bool) -> None:
    if gpu:
        torch.cuda.reset_peak_memory_stats()


def loaded(gpu: bool) -> dict[str, float]:
    """The peak of loading, and what stays of it."""
    return {"load_gib": peak_gib(gpu)} | ({"loaded_gib": torch.cuda.memory_allocated() / GIB} if gpu else {})


def outside_gib() -> float:
    """What is taken of the GPU outside PyTorch's allocator: by CUDA itself, paged optimisers, and other programs."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / GIB


class StepClock(TrainerCallback):
    """The peak when training begins, and the time at the end of each step."""

    def __init__(self, gpu: bool):
        self.gpu, self.begin_gib, self.ends = gpu, 0.0, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin_gib = peak_gib(self.gpu)
        reset_peak(self.gpu)

    def on_step_end(self, args, state, control, **kwargs):
        if self.gpu:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def train(trainer, job: Job) -> dict[str, float]:
    """Peak and speed of training, and its loss. The first step, which also sets up kernels and the optimiser's state,
    is not timed."""
    clock = StepClock(job.gpu)
    trainer.add_callback(clock)
    loss = trainer.train().training_loss
    speed = (job.steps - 1) * job.batch / (clock.ends[-1] - clock.ends[0])
    return {"begin_gib": clock.begin_gib, "step_gib": peak_gib(job.gpu), "records_per_second": speed, "loss": loss}


def score(job: Job, name: str, run) -> Iterator[dict[str, float]]:
    """Peak of scoring one decision at a time, and then, with the speed, of as many at once as the memory allows.

    Args:
        run: takes how many tokens may be read together.
    """
    for key, batch_tokens in ((f"{name}_gib", 1), (f"{name}_filled_gib", None)):
        reset_peak(job.gpu)
        start = time.perf_counter()
        run(batch_tokens)
        yield {key: peak_gib(job.gpu), f"{name}_per_second": job.scored / (time.perf_counter() - start)}


# ---------------------------------------------------------------------------------------------------------------------
# What this library does


def read_recipe(job: Job, folder: str, name: str = "ranking", *more: str):
    """The model and training arguments of a recipe, for these few steps; a CPU trains in float32."""
    return parse_recipe(
        ["--config", name, "--model_name_or_path", job.model, "--output_dir", folder]
        + ["--quantization", job.quantization, "--per_device_train_batch_size", str(job.batch)]
        + ["--gradient_accumulation_steps", "1", "--max_steps", str(job.steps), "--max_length", str(job.tokens)]
        + ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
        + ["--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1000"]
        + ([] if job.gpu else ["--use_cpu", "true", "--bf16", "false", "--optim", "adamw_torch"])
        + list(more),
        DPO if name == "preference" else SFT,
    )[::2]


def settle(job: Job, model, training, tokens: int, asked: int) -> dict[str, int]:
    """Checkpoints as few layers as the memory there is asks for, as the preflight does."""
    config = AutoConfig.from_pretrained(job.model)
    work = describe_model(config, model, training, tokens, asked)
    plan = make_plan(work, training, memory_for(training, job.quantization))
    training.settle(plan, job.quantization)
    return {"checkpoint_every": plan.checkpoint_every}


def answer_trainer(job: Job, training, base, adapter):
    records = random_records(job.steps * job.batch * training.world_size, job.tokens)
    return AnswerTrainer(
        model=base,
        args=training,
        train_dataset=records,
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=adapter,
        sampler=EpochSampler([True] * len(records), "none", training.seed),
        answers=answer_ids(),
    )


def measure_step(job: Job, folder: str) -> Iterator[dict]:
    """A step of `covered-call train`."""
    model, training = read_recipe(job, folder)
    yield settle(job, model, training, job.tokens, ANSWER_LENGTH)
    base, adapter = load_model(model, training)
    yield loaded(job.gpu)
    yield train(answer_trainer(job, training, base, adapter), job)


def measure_evaluation(job: Job, folder: str) -> Iterator[dict]:
    """An evaluation of `covered-call train` after its first steps: the optimiser's state is there."""
    model, training = read_recipe(job, folder)
    yield settle(job, model, training, job.tokens, ANSWER_LENGTH)
    base, adapter = load_model(model, training)
    yield loaded(job.gpu)
    trainer, records = answer_trainer(job, training, base, adapter), random_records(job.scored, job.tokens)
    trainer.train()

    def evaluate(batch_tokens: int | None) -> None:
        training.batch_tokens = batch_tokens
        trainer.evaluate(records)

    yield from score(job, "evaluation", evaluate)


def measure_decide(job: Job, folder: str) -> Iterator[dict]:
    """Policy.decide, as after Policy.load: nothing of a training is there."""
    model, training = read_recipe(job, folder)
    base, adapter = load_model(model, training)
    tuned = get_peft_model(base, adapter).eval()
    yield loaded(job.gpu)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    manifest = {"task": "per_decision_ranking", "recipe": {"candidate_order": "instrument"}}
    policy = Policy(None, tuned, tokenizer, manifest)
    decision = decision_of(job.tokens - ANSWER_LENGTH, tokenizer)
    yield {"prompt_tokens": prompt_tokens(tokenizer, decision), "candidates": len(decision.candidates)}

    def decide(batch_tokens: int | None) -> None:
        policy.batch_tokens = batch_tokens
        policy._score([decision] * job.scored)  # the exit style that fills the prompt is longer than a name may be

    yield from score(job, "decide", decide)


def measure_dpo(job: Job, folder: str) -> Iterator[dict]:
    """A step of `covered-call prefer`: a record is a pair, whose answers follow one prompt."""
    model, training = read_recipe(job, folder, "preference", "--adapter", "")
    yield settle(job, model, training, job.tokens + ANSWER_LENGTH, 2 * ANSWER_LENGTH)
    base, adapter = load_model(model, training)
    yield loaded(job.gpu)
    pairs = random_records(job.steps * job.batch, job.tokens, ANSWERS[:2])
    trainer = PreferenceTrainer(
        model=base,
        args=training,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=adapter,
        sampler=EpochSampler([True] * len(pairs), "none", training.seed),
        answers=answer_ids(),
        adapter=None,
        judged={},
    )
    yield train(trainer, job)


def measure_fsdp(job: Job, folder: str) -> Iterator[dict]:
    """`covered-call train` under accelerate launch with configs/accelerate/fsdp_qlora.yaml: the worst of the GPUs."""
    model, training = read_recipe(job, folder, "ranking", "--optim", "adamw_torch")
    yield settle(job, model, training, job.tokens, ANSWER_LENGTH)
    figures = train(answer_trainer(job, training, *load_model(model, training)), job)
    yield {
        "load_gib": max(gather_object([figures["begin_gib"]])),
        "step_gib": max(gather_object([figures["step_gib"]])),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What it is compared with


def plain_trainer(job: Job, folder: str, model, tokenizer, adapter=None) -> SFTTrainer:
    """TRL's trainer with its own defaults, but for what must be the same: batch, learning rate, and 16 bits."""
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=job.batch,
        learning_rate=LEARNING_RATE,
        max_steps=job.steps,
        bf16=job.gpu and model.dtype == torch.bfloat16,
        fp16=job.gpu and model.dtype == torch.float16,
        use_cpu=not job.gpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    records = random_records(job.steps * job.batch, job.tokens).select_columns(["input_ids", "labels"])
    return SFTTrainer(
        model=model, args=arguments, train_dataset=records, processing_class=tokenizer, peft_config=adapter
    )


def measure_trl(job: Job, folder: str) -> Iterator[dict]:
    """TRL's defaults on the same base and adapter."""
    model, training = read_recipe(job, folder)
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    base = load_base(job.model, job.quantization, dtype, training.device, liger=False)
    yield loaded(job.gpu)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    yield train(plain_trainer(job, folder, base, tokenizer, lora_config(model)), job)


def measure_unsloth(job: Job, folder: str) -> Iterator[dict]:
    """Unsloth's defaults on the same base, with an adapter of the same shape."""
    model, tokenizer = FastModel.from_pretrained(
        job.model,
        max_seq_length=job.tokens,
        load_in_4bit=job.quantization == "int4",
        load_in_8bit=job.quantization == "int8",
    )
    yield loaded(job.gpu)
    model = FastModel.get_peft_model(model, target_modules=PHI3_LINEAR, **LORA)
    yield train(plain_trainer(job, folder, model, tokenizer), job)


WORKS = {
    "step": measure_step,
    "trl": measure_trl,
    "unsloth": measure_unsloth,
    "evaluation": measure_evaluation,
    "decide": measure_decide,
    "dpo": measure_dpo,
    "fsdp": measure_fsdp,
}


def measure(work: str, job: Job) -> dict:
    """The figures of one work, up to where memory ran out, in this process, which must be a fresh one on a GPU."""
    result = {"status": "ok"}
    if job.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap_gib * GIB / total))
    result["before_gib"] = peak_gib(job.gpu)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for figures in WORKS[work](job, folder):
                result |= figures
    except (RuntimeError, ValueError) as error:
        if not is_out_of_memory(error, job.gpu):
            raise
        result |= {"status": "OOM", "peak_gib": peak_gib(job.gpu)}
    return result | ({"outside_gib": outside_gib()} if job.gpu else {})


def is_out_of_memory(error: Exception, gpu: bool) -> bool:
    """Transformers and policy.py raise other errors when memory runs out, so the allocator is asked too."""
    return isinstance(error, torch.OutOfMemoryError) or (gpu and torch.cuda.memory_stats().get("num_ooms", 0) > 0)


def full_precision_at_load(result: dict, weights_gib: float) -> bool:
    """Whether loading took so much more memory than stays allocated that weights must have come unquantised.

    Phi-3-mini's 16-bit weights take 3.4 times as much as its int4 ones, 1.9 times as much as its int8 ones; one matrix
    after the other adds less than a tenth.

    Args:
        weights_gib: estimated, for a model that ran out of memory before it was loaded.
    """
    peak = result.get("load_gib", result.get("peak_gib", 0))
    return peak >= LOAD_LIMIT * result.get("loaded_gib", weights_gib)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Stack(NamedTuple):
    """A Python with its libraries, and the CUDA GPU that it sees."""

    python: str
    versions: dict[str, str]
    device: str | None
    gpus: int


ABSENT = Stack("", {}, None, 0)  # nothing to run


# Versions without their local part: +cpu and +cu130 are the same code. A process's own, for CUDA keeps what it takes.
PROBE = """
import json, sys, torch
from importlib.metadata import distributions
found = {d.name.lower().replace("_", "-"): d.version.split("+")[0] for d in distributions()}
gpu = torch.cuda.is_available()
print(json.dumps({"versions": found, "device": torch.cuda.get_device_name() if gpu else None,
                  "gpus": torch.cuda.device_count()}))
"""


def probe(name: str, python: str) -> Stack:
    """Asks a Python what it has; ends the program if it does not run, or lacks a library."""
    try:
        done = subprocess.run([python, "-W", "ignore", "-c", PROBE], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"error: stack {name}: {python} does not run: {error.strerror}.")
    if done.returncode:
        sys.exit(f"error: stack {name}: {python}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    versions = {library: found["versions"].get(library) for library in LIBRARIES}
    if missing := [library for library, version in versions.items() if version is None]:
        sys.exit(f"error: stack {name}: {python} has no {', '.join(missing)}.")
    versions |= {extra: found["versions"][extra] for extra in EXTRAS if extra in found["versions"]}
    return Stack(python, versions, found["device"], found["gpus"])


def default_stacks() -> dict[str, str]:
    """The two that are tested, where `make` has made them, and this Python if it is neither."""
    folders = {name: REPOSITORY / folder for name, folder in STACKS.items() if (REPOSITORY / folder).is_dir()}
    found = {name: str(folder / "bin" / "python") for name, folder in folders.items()}
    own = Path(sys.prefix).resolve() in [folder.resolve() for folder in folders.values()]
    return found if own else {"this": sys.executable, **found}


def run_apart(python: str, work: str, job: Job) -> dict:
    """``measure`` by another Python; an error is a result too."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(FSDP)] if work == "fsdp" else []
    command = [python, *launch, __file__, work, json.dumps(job._asdict())]
    # On several GPUs the Trainer would spread its batches over them.
    first = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    environment = os.environ | {"PYTHONWARNINGS": "ignore"} | (first if work != "fsdp" else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(done.stderr, file=sys.stderr)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return {"status": "failed", "error": f"exit status {done.returncode}: {last}"}


if __name__ == "__main__":
    figures = measure(sys.argv[1], Job(**json.loads(sys.argv[2])))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(figures))
