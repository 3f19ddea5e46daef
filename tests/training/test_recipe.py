"""Recipes: what they say, what they may not, and the command line over them."""

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from trl import SFTConfig

from covered_call.language_model import loading
from covered_call.training import first_checks
from covered_call.training.examples import check_model
from covered_call.training.keys import DataArguments
from covered_call.training.memory import Plan
from covered_call.training.recipe import DPO, SFT, TrainingArguments, parse_recipe
from covered_call.training.runs import RecipeError

from .conftest import parse, recipe


def test_the_recipes_that_the_readme_names_are_there():
    assert list(SFT.recipes) == ["per_candidate", "ranking", "mixed", "tiny_mixed", "tiny"]


def test_every_recipe_belongs_to_one_of_the_two_scripts():
    found = sorted(path.stem for path in first_checks.RECIPES.glob("*.yaml"))
    assert found == sorted([*SFT.recipes, *DPO.recipes])


@pytest.mark.parametrize("name", SFT.recipes)
def test_every_recipe_parses_and_keeps_the_best_checkpoint(name):
    model, data, training = parse("--config", name, "--use_cpu", "true", "--bf16", "false")
    assert training.output_dir == f"out/{name}"
    assert data.dataset_config == ("per_candidate" if name in ("per_candidate", "tiny") else "per_decision_ranking")
    assert model.quantization == "int4"
    metric = "ranking_balanced_accuracy" if "mixed" in name else "balanced_accuracy"
    assert training.load_best_model_at_end and training.metric_for_best_model == metric
    assert training.save_steps % training.eval_steps == 0


@pytest.mark.parametrize("name", DPO.recipes)
def test_every_recipe_of_preferences_parses_and_keeps_the_best_checkpoint(name):
    model, data, training = parse("--config", name, "--use_cpu", "true", "--bf16", "false", script=DPO)
    assert training.output_dir == f"out/{name}" and training.loss_type == ["sigmoid"]
    assert model.quantization == "int4" and data.dataset_config == "preference"
    assert (training.metric_for_best_model, training.greater_is_better) == ("mean_percent", True)
    assert training.load_best_model_at_end and training.save_steps % training.eval_steps == 0


def test_a_recipe_of_the_other_script_is_not_taken_for_ones_own():
    with pytest.raises(RecipeError, match="ranking: neither a file nor one of preference, tiny_dpo"):
        parse("--config", "ranking", script=DPO)
    with pytest.raises(
        RecipeError, match="preference: neither a file nor one of per_candidate, ranking, mixed, tiny_mixed, tiny"
    ):
        parse_recipe(["--config", "preference"])


@pytest.mark.parametrize("key, value", [("packing", "true"), ("completion_only_loss", "false"), ("pad_token", "x")])
def test_a_key_that_would_break_a_promise_is_refused_with_the_reason(key, value):
    with pytest.raises(RecipeError, match=f"{key}: .* cannot be set: .*Remove it"):
        parse("--config", "tiny", f"--{key}", value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("precompute_ref_log_probs", "true"),
        ("sync_ref_model", "true"),
        ("ld_alpha", "0.5"),
        ("truncation_mode", "keep_end"),
        ("pad_to_multiple_of", "8"),
    ],
)
def test_a_key_that_would_be_overruled_is_refused_with_the_reason(key, value):
    with pytest.raises(RecipeError, match=f"{key}: .* cannot be set: .*Remove it"):
        parse("--config", "tiny_dpo", f"--{key}", value, script=DPO)


def test_a_word_that_belongs_to_no_key_is_named():
    with pytest.raises(RecipeError, match="'runs/b.csv' belongs to no key"):
        parse("--config", "tiny", "--max_steps", "3", "runs/b.csv")


@pytest.mark.parametrize("share", ["nan", "inf", "-0.1", "1"])
def test_a_dropout_that_is_no_share_is_refused(share):
    with pytest.raises(RecipeError, match="lora_dropout: .* is no share"):
        parse("--config", "tiny", "--lora_dropout", share)


def test_a_balance_that_is_none_of_three_is_refused():
    with pytest.raises(RecipeError, match="'up' is none of none, downsample, weight"):
        DataArguments(dataset_config="per_candidate", balance="up")


def test_a_gpu_without_bfloat16_gets_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(SFTConfig, "__post_init__", lambda self: setattr(self, "_n_gpu", 1))
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    arguments = TrainingArguments(bf16=True)
    assert (arguments.bf16, arguments.fp16) == (False, True)
    assert loading.half_precision() == torch.float16  # what a policy is loaded in


def test_one_of_several_gpus_is_used_unless_launched_and_that_is_said(monkeypatch, caplog):
    """Transformers would spread each batch over them: twice the micro-batch, and one of the stacks dies of it."""
    monkeypatch.setattr(SFTConfig, "__post_init__", lambda self: setattr(self, "_n_gpu", 2))
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    arguments = TrainingArguments(use_cpu=True, per_device_train_batch_size="4")
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)
    assert (
        "There are 2 GPUs here, and this run uses one. For all: accelerate launch -m covered_call train ..."
        in caplog.text
    )


def test_the_command_line_wins_over_the_recipe_and_takes_hyphens():
    _, data, training = parse(
        "--config", "tiny", "--learning-rate", "0.5", "--data_files", "a.csv", "b.csv", "--max_steps=7"
    )
    assert (training.learning_rate, data.data_files, training.max_steps) == (0.5, ["a.csv", "b.csv"], 7)


def test_a_recipe_is_found_by_path_too(tmp_path):
    path = recipe(tmp_path / "mine.yaml", lora_r=2, learning_rate="1e-4", validation_from="2024-01-01")
    model, data, training = parse(f"--config={path}")
    assert (model.lora_r, training.learning_rate, data.validation_from) == (2, 1e-4, "2024-01-01")


def test_an_unknown_key_in_a_recipe_names_the_nearest(tmp_path):
    path = recipe(tmp_path / "mine.yaml", lerning_rate=1.0)
    with pytest.raises(RecipeError, match=r"lerning_rate, in .*mine\.yaml.*Did you mean learning_rate\?"):
        parse("--config", path)


@pytest.mark.parametrize("words", [["--lora_alfa", "4"], ["--lora-alfa=4"]])
def test_an_unknown_key_on_the_command_line_names_the_nearest(words):
    with pytest.raises(RecipeError, match=r"lora_alfa, in the command line.*Did you mean lora_alpha\?"):
        parse("--config", "tiny", *words)


@pytest.mark.parametrize("key, nearest", [("betta", "beta"), ("min_egde", "min_edge"), ("addapter", "adapter")])
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(RecipeError, match=f"{key}, in the command line.*Did you mean {nearest}"):
        parse("--config", "tiny_dpo", f"--{key}", "1", script=DPO)


def test_an_abbreviated_key_is_unknown_rather_than_guessed():
    with pytest.raises(RecipeError, match="learning_r, .*Did you mean learning_rate"):
        parse("--config", "tiny", "--learning_r", "1")


@pytest.mark.parametrize("words", [[], ["--config", "tinny"]])
def test_a_missing_recipe_names_those_there_are(words):
    with pytest.raises(RecipeError, match="per_candidate, ranking, mixed, tiny_mixed, tiny"):
        parse(*words)


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- tiny\n")
    with pytest.raises(RecipeError, match="holds no keys"):
        parse("--config", path)


def test_a_quantization_that_is_none_of_three_is_refused_in_a_recipe(tmp_path):
    with pytest.raises(RecipeError, match="'int5' is none of int4, int8, none"):
        parse("--config", recipe(tmp_path / "mine.yaml", quantization="int5"))


def test_all_weights_cannot_be_trained_where_they_are_quantised():
    with pytest.raises(RecipeError, match="lora_r: 0"):
        parse("--config", "tiny", "--lora_r", "0")


def test_all_weights_or_a_shuffle_are_refused():
    with pytest.raises(RecipeError, match="lora_r: 0.*only an adapter"):
        parse("--config", "tiny_dpo", "--lora_r", "0", "--quantization", "none", script=DPO)
    with pytest.raises(RecipeError, match="candidate_order: shuffle"):
        parse("--config", "tiny_dpo", "--candidate_order", "shuffle", script=DPO)


def test_a_recipe_must_say_what_to_start_from():
    with pytest.raises(RecipeError, match="Nothing to start from"):
        parse("--config", "preference", "--adapter", "", "--use_cpu", "true", "--bf16", "false", script=DPO)


@pytest.mark.parametrize("name", ["per_candidate", "ranking"])
def test_a_phi3_recipe_stops_at_once_without_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="needs a CUDA GPU.*--config tiny"):
        parse("--config", name)


def test_the_phi3_recipe_of_preferences_stops_at_once_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="needs a CUDA GPU.*--config tiny_dpo"):
        parse("--config", "preference", script=DPO)


def test_a_model_that_cannot_be_had_is_named_with_what_to_do():
    model, _, _ = parse("--config", "ranking", "--use_cpu", "true", "--bf16", "false")
    with pytest.raises(RecipeError, match="microsoft/Phi-3-mini-4k-instruct.*hf download.*FOLDER"):
        check_model(model)


# --- What a recipe leaves to the memory


def test_a_step_takes_the_same_records_whatever_the_micro_batch():
    arguments = parse("--config", "ranking", "--use_cpu", "true", "--bf16", "false")[2]
    assert (arguments.open_keys, arguments.records) == ({"per_device_train_batch_size", "gradient_checkpointing"}, 16)
    for plan in (Plan(4, 1), Plan(8, 0)):
        arguments.settle(plan, "int4")
        assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (
            plan.micro_batch,
            16 // plan.micro_batch,
        )
        assert arguments.activation_checkpointing is bool(plan.checkpoint_every)
    given = parse("--config", "ranking", "--use_cpu", "true", "--per_device_train_batch_size", "2")[2]
    assert (given.open_keys, given.records) == ({"gradient_checkpointing"}, 32)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("per_device_train_batch_size", "0", "'0' is neither a number from 1 nor auto"),
        ("per_device_train_batch_size", "many", "'many' is neither"),
        ("gradient_checkpointing", "2", "'2' is none of true, false, auto"),
        ("per_device_eval_batch_size", "4", "cannot be set: answers are scored by tokens.*batch_tokens"),
    ],
)
def test_a_batch_that_is_none_is_refused(key, value, message):
    with pytest.raises(RecipeError, match=f"{key}: .*{message}"):
        parse("--config", "tiny", f"--{key}", value)


def test_the_fsdp_config_is_one_that_accelerate_takes():
    config = load_config_from_file(str(first_checks.RECIPES / "accelerate" / "fsdp_qlora.yaml"))
    assert (config.distributed_type, config.mixed_precision, config.num_processes) == ("FSDP", "bf16", 2)
    known = {action.dest for action in launch_command_parser()._actions}
    assert config.fsdp_config.keys() <= known
