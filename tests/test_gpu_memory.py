"""The memory benchmark: on the CPU as a whole, and what it says of Phi-3-mini at full size without building it."""

import json

import pytest
import torch
from conftest import SCRIPT, import_script, python
from transformers import Phi3Config

import train_sft

BENCHMARK = SCRIPT.parent / "benchmarks" / "gpu_memory.py"
gpu_memory = import_script(BENCHMARK)
CONFIG = Phi3Config(**gpu_memory.PHI3_MINI)
# GiB without the CUDA context, from Phi-3-mini's shapes, worked out apart from train_sft.py: by batch size, 512 tokens
EXPECTED = {"int4": {1: 2.7, 2: 3.0, 4: 3.7, 8: 5.1}, "int8": {1: 4.3, 2: 4.7, 4: 5.4, 8: 6.7}}


def ranking(quantization: str = "int4", batch: int = 1):
    model, _, training, _ = train_sft.parse_recipe(
        ["--config", "ranking", "--dry_run", "true", "--quantization", quantization]
        + ["--per_device_train_batch_size", str(batch)]
    )
    return model, training


def test_the_tiny_size_is_measured_on_the_cpu(tmp_path):
    figures = tmp_path / "out" / "figures.json"
    done = python(
        *("-W", "ignore", BENCHMARK, "--size", "tiny", "--model", tmp_path / "model", "--output", figures),
        *("--quantization", "int8", "--batch", 2, "--tokens", 64, "--steps", 2),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"CPU, torch {torch.__version__}, transformers ")
    assert "| int8 | 2 | " in done.stdout
    report = json.loads(figures.read_text())
    assert (report["size"], report["device"], report["tokens"], report["steps"]) == ("tiny", "CPU", 64, 2)
    assert report["versions"].keys() >= {"torch", "transformers", "trl"}
    answers, everywhere = report["results"]
    for result, logits in ((answers, "answers"), (everywhere, "everywhere")):
        assert (result["quantization"], result["batch"], result["logits"]) == ("int8", 2, logits)
        assert result["status"] == "ok"
        assert 0 < result["before_gib"] <= result["load_gib"] <= result["step_gib"] < 8
        assert result["tokens_per_second"] > 0
    assert 0 < answers["estimated_gib"] < everywhere["estimated_gib"]
    assert answers["loss"] == pytest.approx(everywhere["loss"], rel=1e-3)


def test_estimates_need_neither_a_gpu_nor_the_model(tmp_path):
    done = python("-W", "ignore", BENCHMARK, "--estimate", "--quantization", "int4", "--batch", 1, 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| | batch 1 | batch 8 |" in done.stdout
    assert "| int4, logits at the answers | 2.6 | 4.1 |" in done.stdout


@pytest.fixture(scope="module")
def size() -> train_sft.ModelSize:
    model, _ = ranking()
    assert model.lora_r == 16
    return train_sft.count_parameters(CONFIG, model)


def test_the_full_size_is_phi3_mini(size):
    assert size.total == 3_821_079_552


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_the_estimate_agrees_with_one_worked_out_apart(size, quantization, batch):
    model, training = ranking(quantization, batch)
    assert (training.optim, training.gradient_checkpointing, training.bf16) == ("paged_adamw_8bit", True, True)
    estimated = train_sft.estimate_memory(CONFIG, size, model, training, tokens=512, logits_at=512)
    assert sum(estimated.values()) == pytest.approx(EXPECTED[quantization][batch], abs=0.35)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU, on which the full size would be measured")
def test_the_full_size_without_a_gpu_is_a_plain_error(tmp_path):
    done = python("-W", "ignore", BENCHMARK, "--model", tmp_path / "model", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "CUDA GPU" in last
    assert "--size tiny" in last
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "peak, loaded, full",
    [(2.25, 2.0, False), (2.99, 2.0, False), (3.0, 2.0, True), (7.1, 2.1, True), (7.1, 3.7, True), (4.0, 3.7, False)],
)
def test_full_precision_at_load_is_told_by_the_peak(peak, loaded, full):
    assert gpu_memory.full_precision_at_load(peak, loaded) is full


def test_the_table_says_what_went_wrong():
    def results(**cells):
        return [{"quantization": "int4", "batch": 1, "logits": logits} | cells for logits in gpu_memory.LOGITS]

    full, memory, failed = (
        results(status="ok", load_gib=2.0, step_gib=3.0, estimated_gib=1.0, tokens_per_second=1000.0),
        results(status="OOM", load_gib=2.0, estimated_gib=1.0),
        results(status="failed", error="exit status 1: no | luck"),
    )
    full[1] |= {"step_gib": 4.5, "full_precision_at_load": True}
    report = {"size": "full", "device": "a GPU", "versions": {}, "tokens": 512, "results": full + memory + failed}
    assert gpu_memory.table(report).splitlines()[-3:] == [
        "| int4 | 1 | 2.00 | 3.00 | 1.00 | 1,000 | 4.50 | 1.00 | 1,000 | 1.50 | full precision at load |",
        "| int4 | 1 | 2.00 | OOM | 1.00 | OOM | OOM | 1.00 | OOM |  |  |",
        "| int4 | 1 | failed | failed | failed | failed | failed | failed | failed |  | exit status 1: no / luck |",
    ]


@pytest.mark.parametrize("options, named", [(["--steps", "1"], "--steps"), (["--batch", "0"], "--batch")])
def test_options_that_measure_nothing_are_refused(monkeypatch, capsys, options, named):
    monkeypatch.setattr("sys.argv", ["gpu_memory.py", *options])
    with pytest.raises(SystemExit):
        gpu_memory.parse()
    assert f"error: {named} must be at least" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    gpu_memory.build_model(folder, "tiny")
    return folder


def test_the_model_is_built_once_and_never_taken_for_another(tiny):
    weights = tiny / "model.safetensors"
    built = weights.stat().st_mtime_ns
    gpu_memory.build_model(tiny, "tiny")
    assert weights.stat().st_mtime_ns == built
    with pytest.raises(SystemExit, match="not of size full"):
        gpu_memory.build_model(tiny, "full")


def test_running_out_of_memory_is_a_result_and_another_error_is_not(monkeypatch, tiny):
    def load_model(recipe, training):
        raise error

    monkeypatch.setattr(train_sft, "load_model", load_model)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    result = gpu_memory.measure("tiny", tiny, "int4", batch=1, logits="answers", tokens=8, steps=2)
    assert result["status"] == "OOM"
    assert "step_gib" not in result
    error = RuntimeError("a wrong shape")
    with pytest.raises(RuntimeError, match="a wrong shape"):
        gpu_memory.measure("tiny", tiny, "int4", batch=1, logits="answers", tokens=8, steps=2)


def test_an_error_of_transformers_is_told_by_the_allocator(monkeypatch):
    error = RuntimeError("We encountered some issues during automatic conversion of the weights.")
    for count, full in ((0, False), (1, True)):
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda count=count: {"num_ooms": count})
        assert gpu_memory.is_out_of_memory(error, gpu=True) is full
