"""The recipe parser, the tiny Phi-3, the scoring of answers, and fine-tuning itself, on the CPU."""

import re
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import yaml
from conftest import REAL_DATA, SCRIPT, decision, needs_real_data, no_candidates, python, write_csv
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import train_sft
from covered_call_candidates import CandidatesError, admissible_answers
from tiny_phi3 import build_tiny_base, random_phi3, train_tokenizer

RECIPES = sorted(path.stem for path in train_sft.RECIPES.glob("*.yaml"))
QUICK = ["--tiny_base_steps", "4", "--max_steps", "3", "--logging_steps", "1"]


@pytest.fixture
def csv_file(tmp_path) -> str:
    rows = [row for day in range(60) for row in decision(day, sold=day % 3 if day % 4 else None, dte=1.0)]
    return write_csv(tmp_path / "candidates.csv", [*rows, no_candidates(60)])


@pytest.fixture
def splits(csv_file, load):
    return load("per_candidate", data_files=csv_file)


@pytest.fixture
def ranking(csv_file, load):
    return load("per_decision_ranking", data_files=csv_file)


@pytest.fixture
def tokenizer(splits):
    return train_tokenizer(message["content"] for chat in splits["train"]["messages"] for message in chat)


def parse(*arguments):
    return train_sft.parse_recipe(list(map(str, arguments)))


def recipe(path: Path, **changes) -> Path:
    """The tiny recipe with some keys changed, as a file of its own."""
    keys = yaml.safe_load((train_sft.RECIPES / "tiny.yaml").read_text())
    path.write_text(yaml.safe_dump(keys | changes))
    return path


# --- Recipes


def test_the_recipes_that_the_readme_names_are_there():
    assert RECIPES == ["per_candidate", "ranking", "tiny"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_learns_the_answer_only(name):
    model, data, training = parse("--config", name, "--use_cpu", "true", "--bf16", "false")
    assert training.completion_only_loss
    assert training.output_dir == f"out/{name}"
    assert data.dataset_config == {"ranking": "per_decision_ranking"}.get(name, "per_candidate")
    assert model.quantization == "int4"


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
    with pytest.raises(train_sft.RecipeError, match=r"lerning_rate, in .*mine\.yaml.*Did you mean learning_rate\?"):
        parse("--config", path)


@pytest.mark.parametrize("words", [["--lora_alfa", "4"], ["--lora-alfa=4"]])
def test_an_unknown_key_on_the_command_line_names_the_nearest(words):
    with pytest.raises(train_sft.RecipeError, match=r"lora_alfa, in the command line.*Did you mean lora_alpha\?"):
        parse("--config", "tiny", *words)


def test_an_abbreviated_key_is_unknown_rather_than_guessed():
    with pytest.raises(train_sft.RecipeError, match="learning_r, .*Did you mean learning_rate"):
        parse("--config", "tiny", "--learning_r", "1")


@pytest.mark.parametrize("words", [[], ["--config", "tinny"]])
def test_a_missing_recipe_names_those_there_are(words):
    with pytest.raises(train_sft.RecipeError, match="per_candidate, ranking, tiny"):
        parse(*words)


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- tiny\n")
    with pytest.raises(train_sft.RecipeError, match="holds no keys"):
        parse("--config", path)


def test_a_quantization_that_is_none_of_three_is_refused_in_a_recipe(tmp_path):
    with pytest.raises(train_sft.RecipeError, match="'int5' is none of int4, int8, none"):
        parse("--config", recipe(tmp_path / "mine.yaml", quantization="int5"))


def test_all_weights_cannot_be_trained_where_they_are_quantised():
    with pytest.raises(train_sft.RecipeError, match="lora_r: 0"):
        parse("--config", "tiny", "--lora_r", "0")


@pytest.mark.parametrize("name", ["per_candidate", "ranking"])
def test_a_phi3_recipe_stops_at_once_without_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(train_sft.RecipeError, match="needs a CUDA GPU.*--config tiny"):
        parse("--config", name)


def test_a_model_that_cannot_be_had_is_named_with_what_to_do():
    model, _, _ = parse("--config", "ranking", "--use_cpu", "true", "--bf16", "false")
    with pytest.raises(train_sft.RecipeError, match="microsoft/Phi-3-mini-4k-instruct.*hf download.*FOLDER"):
        train_sft.check_model(model)


def test_an_error_is_one_line_and_a_bad_exit(tmp_path):
    done = python(SCRIPT.parent / "train_sft.py", "--config", "tiny", "--data_files", "none/*.csv", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: No file matches")
    assert "Traceback" not in done.stderr


def test_help_has_examples(tmp_path):
    done = python(SCRIPT.parent / "train_sft.py", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--config ranking" in done.stdout and "--quantization {int4,int8,none}" in done.stdout


# --- Records


def test_a_validation_split_must_have_records(tmp_path):
    path = write_csv(tmp_path / "a.csv", decision(0, sold=1))
    with pytest.raises(train_sft.RecipeError, match="validation split is empty"):
        train_sft.load_splits(train_sft.DataArguments("per_candidate", data_files=[path]), seed=0)


def test_a_dataset_config_that_there_is_not_is_named_with_those_there_are(csv_file):
    with pytest.raises(CandidatesError, match="'ranking' is no config: choose one of per_candidate, per_decision_"):
        train_sft.load_splits(train_sft.DataArguments("ranking", [csv_file]), seed=0)


def test_scoring_can_be_limited_to_evenly_spaced_records(csv_file):
    splits = train_sft.load_splits(train_sft.DataArguments("per_candidate", [csv_file], max_eval_records=5), seed=0)
    assert len(splits["validation"]) <= 5 < len(splits["train"])


def test_a_record_longer_than_max_length_is_named_with_the_length_it_needs(splits, tokenizer):
    longest = max(len(train_sft.chat_ids(tokenizer, chat)) for chat in splits["train"]["messages"])
    train_sft.check_lengths(splits["train"], tokenizer, longest)
    with pytest.raises(train_sft.RecipeError, match=rf"BTC\|.* tokens long .* Set max_length to {longest} or more"):
        train_sft.check_lengths(splits["train"], tokenizer, longest - 1)


def test_only_the_answer_and_its_end_carry_loss(splits, tokenizer, tmp_path):
    trainer = SFTTrainer(
        model=random_phi3(tokenizer, seed=0),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", completion_only_loss=True
        ),
        train_dataset=train_sft.prompt_completion(splits["train"]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    for labels in batch["labels"]:
        learnt = tokenizer.decode(labels[labels != -100])
        assert re.fullmatch(r"(SELL_CALL|SKIP)<\|end\|>\n<\|endoftext\|>", learnt)


# --- The tiny Phi-3


def test_the_chat_format_is_that_of_phi3(tokenizer):
    chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    asked = "<|system|>\ns<|end|>\n<|user|>\nu<|end|>\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True) == asked
    assert tokenizer.apply_chat_template(chat, tokenize=False) == asked + "a<|end|>\n<|endoftext|>"
    for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>"))


READER = train_tokenizer(["Score: 3.2029, IV: n/a — SELL_CALL or SKIP"] * 3)


@given(st.text())
def test_the_tokenizer_breaks_no_text(text):
    assert READER.decode(READER(text)["input_ids"], clean_up_tokenization_spaces=False) == text


@given(st.integers(0, 10**12))
def test_numbers_are_read_digit_by_digit(number):
    assert READER.tokenize(str(number)) == list(str(number))


def test_a_tiny_base_is_built_once_for_its_data(splits, tmp_path):
    train = train_sft.prompt_completion(splits["train"])
    first = build_tiny_base(str(tmp_path / "tiny"), train, steps=2, seed=0)
    made = (Path(first) / "model.safetensors").stat().st_mtime_ns
    assert build_tiny_base(str(tmp_path / "tiny"), train, steps=2, seed=0) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == made
    assert build_tiny_base(str(tmp_path / "tiny"), train.select(range(20)), steps=2, seed=0) != first
    assert AutoTokenizer.from_pretrained(first).chat_template


# --- Scoring


def test_admissible_answers_are_those_of_the_prompt(splits, ranking):
    assert admissible_answers(splits["train"][0]) == ["SELL_CALL", "SKIP"]
    assert admissible_answers(ranking["train"][0]) == ["1", "2", "3", "NO_TRADE"]
    last = ranking["test"][-1]
    assert last["candidates"] == [] and admissible_answers(last) == ["NO_TRADE"]


def test_scores_in_a_padded_batch_are_the_log_probabilities_of_the_whole_answer(ranking, tokenizer):
    model = random_phi3(tokenizer, seed=0).eval()
    prompts = [ranking["train"][0]["messages"][:-1], ranking["test"][-1]["messages"][:-1]]
    rows = [(prompts[0], "1"), (prompts[1], "NO_TRADE"), (prompts[0], "10")]
    with torch.inference_mode():
        scores = train_sft.score(model, tokenizer, rows)
        for (prompt, answer), batched in zip(rows, scores, strict=True):
            asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            start = len(tokenizer(asked)["input_ids"])
            ids = torch.tensor(tokenizer(asked + answer + "<|end|>\n<|endoftext|>")["input_ids"])
            log_probabilities = model(ids[None]).logits[0].log_softmax(-1)
            alone = sum(log_probabilities[i - 1, ids[i]].item() for i in range(start, len(ids)))
            assert batched == pytest.approx(alone, abs=1e-4)


def test_the_likeliest_answer_is_predicted_and_its_own_rows_are_used(ranking, tokenizer, monkeypatch):
    # Scores by answer, so that each record has its own best one whatever the batch boundaries are.
    liked = {"1": 0.0, "2": 2.0, "3": 1.0, "NO_TRADE": -1.0}
    monkeypatch.setattr(train_sft, "score", lambda model, tokenizer, rows: [liked[answer] for _, answer in rows])
    predicted = train_sft.predict(random_phi3(tokenizer, seed=0), tokenizer, ranking["test"], batch_size=3)
    assert predicted == ["2"] * (len(predicted) - 1) + ["NO_TRADE"]


# --- Fine-tuning


@pytest.mark.parametrize(
    "quantization, layer", [("int4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt), ("none", torch.nn.Linear)]
)
def test_the_base_is_loaded_as_quantised_as_asked(quantization, layer, tokenizer, tmp_path):
    random_phi3(tokenizer, seed=0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _, training = parse(
        "--config", "tiny", "--model_name_or_path", tmp_path / "base", "--quantization", quantization
    )
    base, _, adapter = train_sft.load_model(model, training)
    assert type(base.model.layers[0].self_attn.qkv_proj) is layer
    assert adapter.r == model.lora_r


@pytest.mark.parametrize(
    "name, options",
    [
        ("per_candidate", ["--quantization", "int4"]),
        ("per_decision_ranking", ["--quantization", "int8"]),
        ("per_candidate", ["--quantization", "none", "--lora_r", "0"]),
    ],
)
def test_a_fine_tune_saves_a_model_and_prints_a_table(name, options, csv_file, tmp_path, capsys):
    train_sft.main(
        ["--config", "tiny", "--data_files", csv_file, "--dataset_config", name, *QUICK, *options]
        + ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tmp_path / "tiny")]
    )
    table = capsys.readouterr().out
    for split in ("validation", "test"):
        assert re.search(rf"^{split} +\d+  tuned model +[01]\.\d{{3}} +[01]\.\d{{3}}$", table, re.MULTILINE)
        assert re.search(rf"^{split} +\d+  always \w+", table, re.MULTILINE)
        assert ("its base, untuned" in table) == ("none" not in options)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    if "none" not in options:
        assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").peft_config["default"].r == 16
    assert [path.name.rsplit("-", 1)[0] for path in tmp_path.glob("tiny-*")] == ["tiny"]


def balanced_accuracy(table: str, split: str, who: str) -> float:
    return float(re.search(rf"^{split} +\d+  {who}.* ([\d.]+)$", table, re.MULTILINE).group(1))


def test_the_tiny_recipe_as_shipped_beats_the_majority_answer_on_the_sample(tmp_path, capsys):
    sample = SCRIPT.parent / "data" / "sample" / "*.csv"
    train_sft.main(
        ["--config", "tiny", "--data_files", str(sample), "--output_dir", str(tmp_path / "out")]
        + ["--model_name_or_path", str(tmp_path / "tiny")]
    )
    table = capsys.readouterr().out
    assert balanced_accuracy(table, "test", "always SKIP") == 0.5
    assert balanced_accuracy(table, "test", "tuned model") >= 0.60
    assert balanced_accuracy(table, "validation", "tuned model") >= 0.60


@needs_real_data
def test_the_tiny_recipe_runs_on_a_real_file(tmp_path, capsys):
    train_sft.main(
        ["--config", "tiny", "--data_files", str(REAL_DATA / "*hold*.csv"), *QUICK]
        + ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tmp_path / "tiny")]
    )
    assert "tuned model" in capsys.readouterr().out
