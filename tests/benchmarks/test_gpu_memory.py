"""The memory benchmark: on the CPU as a whole, and what it says of Phi-3-mini at full size without building it."""

import contextlib
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REAL_PHI3, SCRIPT, import_script, needs_real_phi3, on_the_default_stack, python
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer, Phi3Config

from covered_call.training import memory
from covered_call.training.examples import IGNORE
from covered_call.training.memory import Work
from covered_call.training.preflight import longest_row

BENCHMARK = SCRIPT.parent / "benchmarks" / "gpu_memory.py"
gpu_memory = import_script(BENCHMARK)
gpu_work = sys.modules["gpu_work"]
VERSIONS = dict.fromkeys(gpu_work.LIBRARIES, "1.0")
GPU = gpu_work.Stack("python", VERSIONS, "a GPU", 1)


def job(tiny, **changes):
    fields = {"quantization": "int4", "batch": 2, "tokens": 40, "steps": 2, "scored": 2}
    return gpu_work.Job(**fields | {"model": str(tiny), "cap_gib": None, "gpu": False} | changes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    gpu_memory.build_model(folder, "tiny")
    return folder


# --- The command


@on_the_default_stack
@pytest.mark.slow
def test_the_tiny_size_is_measured_on_the_cpu(tmp_path, monkeypatch, capsys):
    """Ours in a process of its own, as all works are; TRL's here, which spares the imports."""
    apart = gpu_memory.run_apart

    def run_apart(python, work, job):
        if work == "step":
            return apart(python, work, job)
        with contextlib.redirect_stdout(None):  # a process of its own says what it finds, and no more
            return gpu_work.measure(work, job)

    monkeypatch.setattr(gpu_memory, "run_apart", run_apart)
    figures = tmp_path / "out" / "figures.json"
    words = [
        *("gpu_memory.py", "--size", "tiny", "--model", tmp_path / "model", "--output", figures),
        *("--work", "step", "trl", "--stack", f"mine={sys.executable}"),
        *("--quantization", "int8", "--batch", 2, "--tokens", 64, "--steps", 2),
    ]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    with pytest.raises(SystemExit) as end:
        gpu_memory.main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    tables = figures.with_suffix(".md").read_text()
    assert printed == tables
    assert f"- mine: CPU; torch {torch.__version__.split('+')[0]}, transformers " in tables
    report = json.loads(figures.read_text())
    assert report["size"] == "tiny"
    ours, trl = report["results"]
    for result, work in ((ours, "step"), (trl, "trl")):
        assert (result["work"], result["stack"], result["quantization"]) == (work, "mine", "int8")
        assert (result["batch"], result["tokens"], result["steps"]) == (2, 64, 2)
        assert (result["status"], result["device"]) == ("ok", "CPU")
        assert 0 < result["before_gib"] <= result["load_gib"] <= result["step_gib"] < 8
        assert result["tokens_per_second"] == pytest.approx(64 * result["records_per_second"])
        # What is learnt from is the same: random answers of a random model.
        assert result["loss"] == pytest.approx(10.4, abs=0.2)
    assert ours["estimated"].keys() == {"load_gib", "step_gib", "checkpoint_every"}
    assert f"| mine | int8 | 64 | 2 | {ours['step_gib']:.2f} | {ours['tokens_per_second']:,.0f} |" in tables
    assert f"| {ours['step_gib'] / trl['step_gib']:.2f} |" in tables


def command(monkeypatch, tmp_path, *options, stacks=None, figures=None) -> tuple[int, str, list]:
    """Runs the command on these stacks, with figures in the place of measurements: status, tables, what was run."""
    ran, output = [], tmp_path / "figures.json"

    def run_apart(python, work, job):
        ran.append((work, job))
        found = figures(work, job) if callable(figures) else figures
        return {"status": "ok"} | (found or {})

    stacks = {"mine": GPU} if stacks is None else stacks
    monkeypatch.setattr(gpu_memory, "run_apart", run_apart)
    monkeypatch.setattr(gpu_memory, "default_stacks", lambda: dict.fromkeys(stacks, "python"))
    monkeypatch.setattr(gpu_memory, "probe", lambda name, python: stacks[name])
    monkeypatch.setattr(gpu_memory, "build_model", lambda folder, size: None)
    monkeypatch.setattr("sys.argv", ["gpu_memory.py", "--output", str(output), *map(str, options)])
    with pytest.raises(SystemExit) as end:
        gpu_memory.main()
    return end.value.code, output.with_suffix(".md").read_text(), ran


def test_without_a_gpu_the_tables_say_what_is_estimated_and_what_is_not_yet_measured(monkeypatch, tmp_path, capsys):
    stacks = {name: GPU._replace(device=None, gpus=0) for name in ("default", "current")}
    status, tables, ran = command(monkeypatch, tmp_path, stacks=stacks)
    assert (status, ran) == (0, [])
    assert "There is no CUDA GPU here" in capsys.readouterr().err
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    for stack in stacks:
        assert sum(line.startswith(f"| {stack} | ") for line in rows) == 18 + 18 + 6 + 1
        assert f"- {stack}: not yet measured; torch 1.0, " in tables
        assert f"| {stack} | int4 | 795 | 1 | needs two GPUs | needs two GPUs |  |" in rows
    missing = "not yet measured"
    estimated = gpu_memory.estimate("full", gpu_memory.Case("step", "", "int4", 795, 2))
    load, step = estimated["load_gib"], estimated["step_gib"]
    assert f"| current | int4 | 795 | 2 | all | {missing} | {load:.2f} | {missing} | {step:.2f} |  |" in rows
    compared = " | ".join([missing] * 6 + ["not installed"] * 2)
    assert f"| default | int8 | 278 | 4 | {compared} |  |" in rows
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert not any("device" in one or "step_gib" in one for one in results)


def full(work, job):
    """Figures of a GPU: the estimates themselves, or a tenth and a half more."""
    case = gpu_memory.Case(work, "mine", job.quantization, job.tokens, job.batch)
    found = {key: gib for key, gib in gpu_memory.estimate("full", case, 1).items() if key.endswith("gib")}
    if work in ("step", "trl", "dpo", "unsloth"):
        found |= {"step_gib": 1.15 * found.get("step_gib", 4), "records_per_second": 2.0}
    return found | {"loaded_gib": 2.3 if job.quantization == "int4" else 3.8, "checkpoint_every": 1}


def test_estimates_stand_beside_what_is_measured_and_large_errors_are_marked(monkeypatch, tmp_path):
    options = ("--quantization", "int4", "--batch", 2, "--tokens", 795)
    status, tables, ran = command(monkeypatch, tmp_path, *options, figures=full)
    assert status == 0
    assert [work for work, _ in ran] == ["step", "trl", "evaluation", "decide", "dpo"]
    assert {job.cap_gib for _, job in ran} == {6 - 0.6}
    estimated = gpu_memory.estimate("full", gpu_memory.Case("step", "", "int4", 795, 2), 1)
    load, step = estimated["load_gib"], estimated["step_gib"]
    measured = f"{load:.2f} | {load:.2f} (+0.0%) | {1.15 * step:.2f} | **{step:.2f} (-13.0%)**"
    assert f"| mine | int4 | 795 | 2 | all | {measured} |  |" in tables
    assert f"| 1,590 | 4.60 | 1,590 | {1.15 * step / 4.6:.2f} | 1.00 | not installed |" in tables
    assert "- mine: a GPU; torch 1.0, " in tables


def test_what_was_measured_is_not_measured_again(monkeypatch, tmp_path):
    options = ("--work", "step", "--quantization", "int4", "--batch", 1, "--tokens", 278)
    run = lambda *more, **changes: command(monkeypatch, tmp_path, *options, *more, figures=full, **changes)  # noqa: E731
    status, tables, ran = run()
    assert len(ran) == 1
    assert run() == (0, tables, [])
    assert len(run("--again")[2]) == 1
    # Another batch joins it, and other libraries or another GPU are another measurement.
    assert len(run("--batch", 1, 2)[2]) == 1
    assert run()[1:] == (tables, [])
    # A machine without a GPU shows what others measured with the same libraries, and keeps all.
    nowhere = GPU._replace(device=None, gpus=0)
    assert run(stacks={"mine": nowhere}) == (0, tables, [])
    assert "not yet measured" in run(stacks={"mine": nowhere._replace(versions={**VERSIONS, "trl": "2.0"})})[1]
    assert run()[1:] == (tables, [])
    assert len(run(stacks={"mine": GPU._replace(device="another GPU")})[2]) == 1
    assert len(run("--steps", 5)[2]) == 1


@pytest.mark.parametrize(
    "figures, status, shown",
    [
        ({"status": "OOM", "load_gib": 2.0, "loaded_gib": 1.9}, 0, "2.00 | **2.20 (+10.1%)** | OOM |"),
        ({"status": "OOM", "peak_gib": 2.1}, 0, "OOM | 2.20 | OOM | "),
        ({"status": "OOM", "peak_gib": 5.3}, 1, " | full precision at load |"),
        ({"load_gib": 7.1, "loaded_gib": 2.1, "step_gib": 7.5}, 1, " | full precision at load |"),
        ({"status": "failed", "error": "no | luck"}, 1, "failed | 2.20 | failed | "),
        ({"status": "failed", "error": "no | luck"}, 1, " | no / luck |"),
    ],
)
def test_the_table_and_the_status_say_what_went_wrong(monkeypatch, tmp_path, figures, status, shown):
    options = ("--work", "step", "--quantization", "int4", "--batch", 1, "--tokens", 278)
    code, tables, ran = command(monkeypatch, tmp_path, *options, figures=figures)
    assert code == status
    assert shown in tables.splitlines()[-1]
    again = command(monkeypatch, tmp_path, *options, figures=figures)[2]
    assert len(again) == (figures["status"] == "failed" if "status" in figures else 0)


def test_figures_of_another_size_are_not_overwritten(monkeypatch, tmp_path):
    (tmp_path / "figures.json").write_text(json.dumps({"size": "tiny", "results": []}))
    monkeypatch.setattr("sys.argv", ["gpu_memory.py", "--output", str(tmp_path / "figures.json")])
    with pytest.raises(SystemExit, match="of size tiny: give another --output"):
        gpu_memory.Report(gpu_memory.parse(), {})


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--steps", "1"], "--steps must be at least"),
        (["--batch", "0"], "--batch must be at least"),
        (["--tokens", "512", "2048"], "--tokens must be more than 3 and at most 2047"),
        (["--stack", "python3"], "--stack takes NAME=PYTHON"),
    ],
)
def test_options_that_measure_nothing_are_refused(monkeypatch, capsys, options, complaint):
    monkeypatch.setattr("sys.argv", ["gpu_memory.py", *options])
    with pytest.raises(SystemExit):
        gpu_memory.parse()
    assert f"error: {complaint}" in capsys.readouterr().err


def test_a_python_is_asked_for_its_libraries(tmp_path):
    stack = gpu_work.probe("mine", sys.executable)
    assert stack.versions["torch"] == torch.__version__.split("+")[0]
    assert (stack.device is None) != torch.cuda.is_available()
    with pytest.raises(SystemExit, match="error: stack mine: .*nowhere does not run: No such file"):
        gpu_work.probe("mine", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="error: stack mine: .*No module named 'torch'"):
        gpu_work.probe("mine", sys._base_executable)


# --- Estimates


def test_estimates_need_neither_a_gpu_nor_the_model(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_memory.py", "--estimate", "--quantization", "int4", "--batch", "1", "2"])
    gpu_memory.main()
    lines = capsys.readouterr().out.splitlines()
    assert "not measured" in lines[0]
    head = "| quantization | tokens | at load | step, batch 1 | step, batch 2 | evaluation | Policy.decide |"
    assert lines[3] == head
    assert [line.split(" | ")[1] for line in lines[5:]] == ["278", "512", "795"]


def test_the_full_size_is_phi3_mini():
    size = gpu_memory.work_of("full", "int4").size
    assert size.total == 3_821_079_552


@needs_real_phi3
def test_the_configuration_is_that_of_phi3_mini():
    real = AutoConfig.from_pretrained(REAL_PHI3)
    ours = Phi3Config(**gpu_memory.PHI3_MINI)
    for name in gpu_memory.PHI3_MINI.keys() - {"rope_theta"}:
        assert getattr(ours, name) == getattr(real, name), name
    assert ours.rope_parameters == real.rope_parameters


# Phi-3-mini's shapes, as memory.py says what is made of them; a GiB is 2**30 bytes.
HIDDEN, INNER, LAYERS, WORDS = 3072, 8192, 32, 32064
LINEAR = LAYERS * (HIDDEN * 3 * HIDDEN + HIDDEN * HIDDEN + HIDDEN * 2 * INNER + INNER * HIDDEN)
REST = 2 * WORDS * HIDDEN + (2 * LAYERS + 1) * HIDDEN  # both embeddings and the norms
ADAPTER = LAYERS * 16 * ((HIDDEN + 3 * HIDDEN) + (HIDDEN + HIDDEN) + (HIDDEN + 2 * INNER) + (INNER + HIDDEN))
INPUTS = 3 * HIDDEN + INNER
INSIDE = 8 * HIDDEN + 2 * (9 * HIDDEN + 4 * INNER)  # of a layer, without dropout
UNPACKED = 2 * HIDDEN * 2 * INNER  # gate_up_proj in 16 bits
WEIGHTS = {"int4": LINEAR * (1 / 2 + 1 / 64) + 2 * REST, "int8": LINEAR + 2 * REST}
TRAINED = ADAPTER * (4 + 4 + 1 + 1)


@pytest.mark.parametrize(
    "quantization, batch, tokens", [("int4", 2, 795), ("int8", 2, 795), ("int4", 1, 512), ("int8", 4, 278)]
)
def test_a_step_that_computes_every_layer_twice_takes_what_its_formula_says(quantization, batch, tokens):
    inside = INSIDE + (2 * INPUTS if quantization == "int8" else 0)
    activations = batch * tokens * (LAYERS * 2 * HIDDEN + inside + 2 * 4 * INNER) + UNPACKED
    logits = batch * 3 * WORDS * 20
    by_hand = (WEIGHTS[quantization] + TRAINED + activations + logits) / 2**30
    estimated = gpu_memory.estimate("full", gpu_memory.Case("step", "", quantization, tokens, batch), 1)
    assert estimated["step_gib"] == pytest.approx(by_hand, rel=1e-9)
    assert estimated["load_gib"] == pytest.approx((WEIGHTS[quantization] + UNPACKED) / 2**30, rel=1e-9)


@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_scoring_ten_answers_takes_what_its_formula_says(quantization):
    reading = (792 + 30) * 2 * 6 * (INNER + HIDDEN) + 30 * WORDS * (2 + 4 + 4) + UNPACKED
    evaluation, decide = (
        gpu_memory.estimate("full", gpu_memory.Case(work, "", quantization, 795, 1))[f"{work}_gib"]
        for work in ("evaluation", "decide")
    )
    assert evaluation == pytest.approx((WEIGHTS[quantization] + TRAINED + reading) / 2**30, rel=1e-9)
    assert decide == pytest.approx((WEIGHTS[quantization] + 4 * ADAPTER + reading) / 2**30, rel=1e-9)


def test_the_plan_is_the_card_s_unless_another_was_measured():
    case = gpu_memory.Case("step", "", "int4", 278, 1)
    planned = gpu_memory.estimate("full", case)
    work = Work(**vars(gpu_memory.work_of("full", "int4")) | {"tokens": 278, "asked": 3})
    assert planned["checkpoint_every"] == memory.choose(work, 1, 1, None, 5.4).checkpoint_every
    assert gpu_memory.estimate("full", case, 1)["step_gib"] < gpu_memory.estimate("full", case, 0)["step_gib"]


def test_what_an_evaluation_reads_is_what_the_preflight_says():
    split, known = gpu_work.random_records(4, 40), gpu_work.answer_ids()
    totals = np.array(list(map(len, split["labels"])))
    learnt = np.array([sum(label != IGNORE for label in labels) for labels in split["labels"]])
    row = longest_row(split, totals, learnt, known)
    assert row == (37 + 30, 30)


# --- One measurement


@pytest.mark.parametrize("work, batch", [("evaluation", 1), ("decide", 1), ("dpo", 2), ("fsdp", 1)])
def test_every_work_is_measured_on_the_cpu(tiny, work, batch):
    result = gpu_work.measure(work, job(tiny, batch=batch))
    assert result["status"] == "ok"
    peaks = {"dpo": ("step",), "fsdp": ("step",)}.get(work, (work, f"{work}_filled"))
    assert 0 < result["before_gib"] <= result["load_gib"] <= result[f"{peaks[0]}_gib"] <= result[f"{peaks[-1]}_gib"]
    if work != "fsdp":
        assert result["records_per_second" if work == "dpo" else f"{work}_per_second"] > 0


def test_a_prompt_has_the_tokens_that_are_asked_for(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for tokens in (275, 509, 792):
        decision = gpu_work.decision_of(tokens, tokenizer)
        assert gpu_work.prompt_tokens(tokenizer, decision) == tokens
        assert 1 <= len(decision.candidates) <= 9
    assert len(gpu_work.decision_of(792, tokenizer).candidates) > 4


def test_trl_learns_from_the_same_tokens_with_its_own_defaults(tiny, tmp_path):
    model = gpu_work.load_base(str(tiny), "int8", torch.float32, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    adapter = LoraConfig(target_modules="all-linear")
    trainer = gpu_work.plain_trainer(job(tiny), str(tmp_path), model, tokenizer, adapter)
    assert trainer.args.gradient_checkpointing and not trainer.args.packing
    [first, second] = trainer.get_train_dataloader()
    given = {tuple(row) for batch in (first, second) for row in batch["input_ids"].tolist()}
    assert given == {tuple(row) for row in gpu_work.random_records(4, 40)["input_ids"]}
    assert (first["labels"] != gpu_work.IGNORE).sum() == 2 * 3


def test_the_contenders_train_the_adapter_of_the_recipe(tiny, tmp_path):
    model, training = gpu_work.read_recipe(job(tiny), str(tmp_path))
    assert {"r": model.lora_r, "lora_alpha": model.lora_alpha, "lora_dropout": model.lora_dropout} == gpu_work.LORA
    assert training.learning_rate == gpu_work.LEARNING_RATE
    base = gpu_work.load_base(str(tiny), "none", torch.float32, "cpu")
    linear = {name.split(".")[-1] for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linear == {*gpu_work.PHI3_LINEAR, "lm_head"}


STAND_IN = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


class FastModel:
    def from_pretrained(name, max_seq_length, load_in_4bit, load_in_8bit):
        assert (load_in_4bit, load_in_8bit) == (True, False)
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    def get_peft_model(model, **options):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
"""


@on_the_default_stack
@pytest.mark.slow
def test_unsloth_runs_in_an_environment_without_this_project(tiny, tmp_path):
    """A stand-in of its interface: the real one needs a GPU."""
    (tmp_path / "unsloth.py").write_text(STAND_IN)
    (tmp_path / "covered_call.py").write_text("raise ImportError('not here')")
    (tmp_path / "gpu_work.py").write_bytes((BENCHMARK.parent / "gpu_work.py").read_bytes())
    done = python(tmp_path / "gpu_work.py", "unsloth", json.dumps(job(tiny)._asdict()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == "ok" and result["records_per_second"] > 0


def test_a_measurement_sees_one_gpu_and_fsdp_all(monkeypatch, tiny):
    seen = []

    def run(command, env, **options):
        seen.append((command, env.get("CUDA_VISIBLE_DEVICES")))
        return SimpleNamespace(returncode=1, stdout="", stderr="no\nluck")

    monkeypatch.setattr(gpu_work.subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    results = [gpu_work.run_apart("python", work, job(tiny)) for work in ("step", "fsdp")]
    assert results == [{"status": "failed", "error": "exit status 1: luck"}] * 2
    (alone, one), (launched, all_of_them) = seen
    assert (one, all_of_them) == ("2", "2,3")
    assert alone[0] == "python" and alone[2] == "step" and gpu_work.Job(**json.loads(alone[3])) == job(tiny)
    assert launched[1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
    assert os.path.isfile(launched[4]) and launched[-2] == "fsdp"


def test_the_model_is_built_once_and_never_taken_for_another(tiny):
    weights = tiny / "model.safetensors"
    built = weights.stat().st_mtime_ns
    gpu_memory.build_model(tiny, "tiny")
    assert weights.stat().st_mtime_ns == built
    with pytest.raises(SystemExit, match="not of size full"):
        gpu_memory.build_model(tiny, "full")


@pytest.mark.parametrize(
    "peak, loaded, full",
    [(2.25, 2.0, False), (2.99, 2.0, False), (3.0, 2.0, True), (7.1, 2.1, True), (7.1, 3.7, True), (4.0, 3.7, False)],
)
def test_full_precision_at_load_is_told_by_the_peak(peak, loaded, full):
    assert gpu_work.full_precision_at_load({"load_gib": peak, "loaded_gib": loaded}, 1.0) is full
    assert gpu_work.full_precision_at_load({"peak_gib": peak}, loaded) is full


def test_running_out_of_memory_is_a_result_and_another_error_is_not(monkeypatch, tiny):
    def load_model(recipe, training):
        raise error

    monkeypatch.setattr(gpu_work, "load_model", load_model)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    result = gpu_work.measure("step", job(tiny))
    assert (result["status"], result["checkpoint_every"]) == ("OOM", 0)
    assert "load_gib" not in result and result["peak_gib"] > 0
    error = RuntimeError("a wrong shape")
    with pytest.raises(RuntimeError, match="a wrong shape"):
        gpu_work.measure("step", job(tiny))


def test_an_error_of_transformers_is_told_by_the_allocator(monkeypatch):
    error = RuntimeError("We encountered some issues during automatic conversion of the weights.")
    for count, full in ((0, False), (1, True)):
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda count=count: {"num_ooms": count})
        assert gpu_work.is_out_of_memory(error, gpu=True) is full
