"""What a training leaves: the folder, its manifest, card and plot, and that another is not overwritten."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoConfig

from covered_call import tuning
from covered_call.language_model.loading import load_tuned
from covered_call.language_model.manifest import PolicyError
from covered_call.language_model.tiny_phi3 import random_phi3
from covered_call.training import card as run_card
from covered_call.training import dpo, results, sft
from covered_call.training.runs import RecipeError

from .conftest import adapter, difference, manifest_of, parse, trainer_of


def keys_with(text: str, value, key: str = "") -> set[str]:
    """The keys of JSON under which a text stands, levels joined by dots."""
    if isinstance(value, dict):
        return {found for name, one in value.items() for found in keys_with(text, one, f"{key}.{name}")}
    if isinstance(value, list):
        return {found for one in value for found in keys_with(text, one, key)}
    return {key[1:]} if isinstance(value, str) and text in value else set()


def test_the_saved_folder_is_complete_and_its_recipe_can_be_run_again(finished, corpus_base, corpus, tmp_path):
    folder = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "recipe.yaml",
        "README.md",
        "calibration.json",
    }
    assert not names & {"unfinished", "training_args.bin"} and not list(folder.glob("*.tmp"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["base_model"] == str(corpus_base) and manifest["base_revision"].startswith("sha256:")
    assert manifest["labels"] == ["SELL_CALL", "SKIP"] and manifest["task"] == "per_candidate"
    assert manifest["data_files"].keys() == {"candidates.csv"} and manifest["seed"] == 0
    assert manifest["splits"]["train"] == {
        "records": 144,
        "from": "2024-09-01T00:00:00+00:00",
        "to": "2024-10-18T00:00:00+00:00",
    }
    assert manifest["files"].keys() == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert manifest["tuned_on"] == {
        "underlyings": ["BTC"],
        "exit_styles": ["tp_and_roll"],
        "numbers": {
            "dte": [1.0, 1.0],
            "delta": [0.23514593117822502] * 2,
            "score": [3.0, 3.5],
            "iv": [0.7, 0.7],
            "ivrv_ratio": [0.9306217222978382] * 2,
        },
    }
    # The keys with paths of this machine, which are replaced where a run is shared.
    here = str(folder.parents[1])  # where the session's corpus and base are, too
    paths = {"base_model", "recipe.model_name_or_path", "recipe.data_files"}
    assert keys_with(here, manifest) == paths
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert keys_with(here, recipe) == {"model_name_or_path", "data_files", "output_dir"}
    found = {path.name: keys_with(here, json.loads(path.read_text())) for path in folder.glob("*.json")}
    del found["manifest.json"]
    assert {name: keys for name, keys in found.items() if keys} == {"adapter_config.json": {"base_model_name_or_path"}}
    card = (folder / "README.md").read_text()
    test = next(r for r in manifest["results"] if (r["split"], r["answers_by"]) == ("test", "tuned model"))
    assert f"| test | {test['records']} | tuned model | {test['accuracy']:.3f} |" in card
    assert "no evidence of profit" in card and manifest["prompt_version"] in card
    assert f'Policy.load("{folder}")' in card  # as it was given: it works from where the training was run
    model, data, training = parse("--config", folder / "recipe.yaml")
    assert (training.learning_rate, model.model_name_or_path) == (0.001, str(corpus_base))
    tuning.run("sft", ["--config", str(folder / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    assert difference(adapter(folder), adapter(tmp_path / "again")) == 0


def test_a_tuned_model_is_loaded_only_with_the_prompts_and_the_base_it_was_tuned_on(
    own_finished, corpus_base, tmp_path, monkeypatch
):
    base = shutil.copytree(corpus_base, tmp_path / "base")
    manifest = manifest_of(own_finished) | {"base_model": str(base)}
    (own_finished / "manifest.json").write_text(json.dumps(manifest))
    model, tokenizer, manifest = load_tuned(tmp_path / "out")
    tuned = model.get_submodule("base_model.model.model.layers.0.self_attn.qkv_proj").lora_B.default.weight
    assert tuned.abs().max() > 0 and tokenizer.chat_template and manifest["quantization"] == "int4"
    assert load_tuned(tmp_path / "out", quantization="none")[0] is not None
    monkeypatch.setattr("covered_call.language_model.manifest.version_with", lambda names: "another")
    with pytest.raises(PolicyError, match="tuned on prompts of version .* now renders version another"):
        load_tuned(tmp_path / "out")
    monkeypatch.undo()
    config = AutoConfig.from_pretrained(base)
    config.save_pretrained(base)  # the same, as a file with another time
    load_tuned(tmp_path / "out")
    random_phi3(tokenizer, seed=1).save_pretrained(base)
    with pytest.raises(PolicyError, match="not the one that .* was tuned on"):
        load_tuned(tmp_path / "out")


def test_a_finished_run_is_not_overwritten_without_the_flag(own_finished, words, tmp_path):
    before = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(RecipeError, match="holds a run that finished on .*--overwrite_output_dir"):
        tuning.run("sft", words)
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == before
    tuning.run("sft", [*words, "--overwrite_output_dir"])
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns > before


def test_a_data_file_that_changes_while_a_run_reads_it_stops_the_run(words, corpus, tmp_path, monkeypatch):
    csv_file = shutil.copy(corpus, tmp_path / "candidates.csv")
    words[words.index(corpus)] = str(csv_file)

    def meanwhile(*_) -> str:
        with open(csv_file, "a") as file:
            file.write("\n")
        return ""

    monkeypatch.setattr(sft, "preflight", meanwhile)
    with pytest.raises(RecipeError, match=f"{csv_file} has changed since this run began to read it"):
        tuning.run("sft", words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [sft, dpo])
def test_a_tiny_base_is_called_what_it_is_beside_a_random_one(stage, words, pair_words, monkeypatch):
    """A real base is untuned; the tiny one was trained on the answers, and what it was before stands beside it."""
    name, given, more = ("sft", words, []) if stage is sft else ("dpo", pair_words, [None])
    trainer = trainer_of(monkeypatch, name, *given)
    split = trainer.eval_dataset.select(range(4))
    kept = random_phi3(trainer.processing_class, seed=3)

    def rows() -> list[str]:
        commonest = dict.fromkeys(("per_candidate", "per_decision_ranking"), "SKIP")
        found = stage.report(trainer, {"test": split}, {"test": trainer.score(split)}, *more, commonest)
        return [result["answers_by"] for result in found]

    assert rows() == ["tuned model", "its base, untuned", "always SKIP"]
    trainer.model.config.tiny_base = {"steps": 200, "seed": 3}
    base = "its base, trained 200 steps on the answers"
    assert rows() == ["tuned model", base, "a random base", "always SKIP"]
    random = results.random_base(trainer)
    assert trainer.score(split, random) == trainer.score(split, kept) != trainer.score(split)


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {},
            "step 50 of 100: its balanced accuracy, 0.812 on 3 validation records, is the highest of 2 evaluations.",
        ),
        (
            {"metric_for_best_model": "eval_loss", "greater_is_better": False},
            "its loss, 0.812 on 3 validation records, is the lowest of 1 evaluations.",
        ),
        ({"load_best_model_at_end": False}, "Kept is the last step, 100, for no best one was asked for."),
    ],
)
def test_the_reason_for_the_step_that_is_kept_names_its_metric_and_value(changes, said):
    asked = {"metric_for_best_model": "balanced_accuracy", "greater_is_better": True, "load_best_model_at_end": True}
    log = [{"eval_balanced_accuracy": 0.8}, {"loss": 1.0}, {"eval_balanced_accuracy": 0.812, "eval_loss": 2.0}]
    state = SimpleNamespace(best_global_step=50, global_step=100, best_metric=0.812, log_history=log)
    trainer = SimpleNamespace(args=SimpleNamespace(**asked | changes), state=state, eval_dataset=[None] * 3)
    assert said in results.why_saved(trainer)


def test_each_panel_of_the_plot_asks_one_question_in_one_unit(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(run_card.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 0.5, "eval_accuracy": 0.9, "eval_trade_rate": 0.9}]
    for log in (history, history[:1], []):
        run_card.plot_course(log, 2, tmp_path / "training.png", why="Kept is step 2: for this.")
    labels = [[axis.get_ylabel().split("\n")[0] for axis in figure.axes] for figure in figures]
    assert labels == [["training loss", "validation loss", "share of the records"], *[["training loss"]] * 2]
    assert all(axis.get_title("left").endswith("?") for figure in figures for axis in figure.axes)
    shown = [[line.get_label() for line in axis.lines] for axis in figures[0].axes]
    assert [len(lines) for lines in shown] == [2, 2, 3] and all("saved: step 2" in lines for lines in shown)
    assert {figure.get_suptitle() for figure in figures} == {"Kept is step 2: for this."}
