"""Several sources in one training: exact shares, an order that resumes, and a model of several tasks."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
from conftest import decision, read_candidates, write_csv
from hypothesis import given
from hypothesis import strategies as st

from covered_call import tuning
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.evaluation import evaluate
from covered_call.language_model.manifest import PolicyError, hash_of, read_temperature
from covered_call.language_model.policy import Policy, fit_temperature
from covered_call.training.examples import EpochSampler
from covered_call.training.first_checks import read_start
from covered_call.training.keys import DataArguments
from covered_call.training.mixture import MixtureSampler, read_sources
from covered_call.training.runs import RecipeError
from covered_call.training.sources import Source

from .conftest import NO_CHECKPOINTS, OFTEN, QUICK, adapter, difference, killed, manifest_of, paths, trainer_of
from .test_sources import chat, pair, written

RANKING, CANDIDATE = "per_decision_ranking", "per_candidate"
SUMS = [chat(f"How much is {n} plus {n}?", str(2 * n)) for n in range(300, 340)]


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("sums") / "sums.jsonl", *SUMS)


def mix(sums: str, ranking=0.5, candidate=0.3, others=0.2) -> list[str]:
    entries = [{"config": RANKING, "share": ranking}, {"config": CANDIDATE, "share": candidate}]
    return ["--dataset_config", RANKING, "--mix", json.dumps([*entries, {"data": sums, "share": others}])]


# --- The order of an epoch


def sampler_of(sizes, shares, seed=0, copies=1) -> MixtureSampler:
    samplers = [EpochSampler([True] * size, "none", seed) for size in sizes]
    samplers[0].copies = copies
    return MixtureSampler([Source(str(i), share, True) for i, share in enumerate(shares)], samplers, seed)


@given(st.integers(5, 80), st.integers(5, 80), st.integers(1, 9), st.integers(0, 3), st.integers(1, 3))
def test_each_epoch_has_exact_shares_and_none_comes_again_before_all_came(one, other, tenths, seed, copies):
    shares = [tenths / 10, 1 - tenths / 10]
    sampler = sampler_of([one, other], shares, seed, copies)
    drawn = [[], []]
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == one + other
        for source, places in enumerate(drawn):
            its = [place for place in order if (place >= one * copies) == bool(source)]
            assert abs(len(its) - shares[source] * (one + other)) < 1
            places += [(place - one * copies) if source else place % one for place in its]
    for size, places in zip((one, other), drawn, strict=True):
        counts = Counter(places)
        assert max(counts.values()) - min(counts.get(n, 0) for n in range(size)) <= 1


def test_an_epoch_is_a_law_of_the_seed_and_the_epoch():
    def order(seed, epoch) -> list[int]:
        sampler = sampler_of([40, 60], [0.5, 0.5], seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4) and order(0, 3) != order(1, 3)


def test_a_share_that_takes_no_record_is_refused():
    with pytest.raises(RecipeError, match="0.001 of 20 records is none of 1"):
        sampler_of([10, 10], [0.999, 0.001])


def test_a_cap_keeps_so_many_of_each_market_evenly_spaced(tmp_path):
    rows = [
        row
        for day in range(30)
        for style in ("tp_and_roll", "hold_to_expiry")
        for row in decision(day, exit_style=style)
    ]
    rows += [row for day in range(30, 90) for row in decision(day)]
    path = write_csv(tmp_path / "a.csv", rows)
    data = DataArguments(dataset_config=RANKING, data_files=[path], max_records_per_market=10)
    train = read_sources(data, data.backtest(), seed=0).asked[RANKING]["train"]
    whole = DataArguments(dataset_config=RANKING, data_files=[path])
    of_all = read_sources(whole, whole.backtest(), seed=0).asked[RANKING]["train"]
    assert Counter(train["exit_style"]) == {"tp_and_roll": 10, "hold_to_expiry": 10}
    for style in ("tp_and_roll", "hold_to_expiry"):
        kept, there = (
            [day for day, its in zip(split["decision_time"], split["exit_style"], strict=True) if its == style]
            for split in (train, of_all)
        )
        tenth = len(there) / 10
        assert all(number * tenth - 1 < there.index(day) < (number + 1) * tenth for number, day in enumerate(kept))


def test_a_cap_does_not_keep_the_best_candidate_of_each_decision_alone(tmp_path):
    """Every sixth record is of the first candidate of three."""
    path = write_csv(tmp_path / "a.csv", [row for day in range(99) for row in decision(day)])
    data = DataArguments(dataset_config=CANDIDATE, data_files=[path])
    whole = read_sources(data, data.backtest(), seed=0).asked[CANDIDATE]["train"]
    assert len(whole) % 6 == 0 and len(set(whole["instrument"][::6])) == 1
    data = DataArguments(dataset_config=CANDIDATE, data_files=[path], max_records_per_market=len(whole) // 6)
    train = read_sources(data, data.backtest(), seed=0).asked[CANDIDATE]["train"]
    assert len(train) == len(whole) // 6
    assert min(Counter(train["instrument"]).values()) > len(train) / 5 and len(set(train["instrument"])) == 3


# --- A training


@pytest.fixture(scope="module")
def both(corpus_base, corpus, sums, tmp_path_factory):
    """A finished run on both tasks and on sums."""
    folder = tmp_path_factory.mktemp("mixed") / "out"
    more = [*mix(sums), "--learning_rate", "0.001"]
    tuning.run("sft", ["--config", "tiny", *QUICK, *NO_CHECKPOINTS, *paths(corpus_base, corpus, folder), *more])
    return folder


def test_the_preflight_has_a_line_a_source_and_judges_each_task_apart(words, sums, capsys):
    tuning.run("sft", [*words, *mix(sums), "--dry_run"])
    said = capsys.readouterr().out
    assert re.search(r"^source +share +records +an epoch takes +run goes through it +sha256$", said, re.MULTILINE)
    digest = hash_of(sums).removeprefix("sha256:")[:12]
    assert re.search(rf"^{re.escape(sums)} +0\.2 +40 +\d+ +\d\.\d times +{digest}$", said, re.MULTILINE)
    for name in ("train, ranking", "train, candidate", "validation, ranking", "test, candidate"):
        assert re.search(rf"^{name} +\d", said, re.MULTILINE)
    assert "loss       each token of an answer counts the same, whatever its source" in said


def test_a_model_of_two_tasks_answers_either(both):
    manifest = manifest_of(both)
    assert manifest["tasks"] == [RANKING, CANDIDATE] and manifest["task"] == RANKING
    sources = {source["source"]: source for source in manifest["mix"]}
    takes = [source["in_an_epoch"] for source in manifest["mix"]]
    assert [round(take / sum(takes), 2) for take in takes] == [0.5, 0.3, 0.2]
    (path,) = [name for name in sources if name.endswith(".jsonl")]
    assert sources[path]["sha256"] == hash_of(path) and sources[path]["records"] == 40
    assert Policy.load(both).task == RANKING
    policy = Policy.load(both, task=CANDIDATE)
    assert policy.task == CANDIDATE and "iv" in policy.manifest["tuned_on"]["numbers"]
    assert policy.temperature == json.loads((both / "calibration.json").read_text())["tasks"][CANDIDATE]["temperature"]
    with pytest.raises(
        PolicyError, match=r"task='preference': .* was tuned on per_decision_ranking and per_candidate"
    ):
        Policy.load(both, task="preference")


def test_the_table_and_the_card_tell_the_tasks_apart(both):
    rows = {(r["task"], r["split"], r["answers_by"]) for r in manifest_of(both)["results"]}
    assert {(task, "test", "tuned model") for task in (RANKING, CANDIDATE)} <= rows
    assert (CANDIDATE, "validation", "always SKIP") in rows
    card = (both / "README.md").read_text()
    assert "1..N or NO_TRADE and, asked for one of them, SELL_CALL or SKIP" in card and "`sums.jsonl`" in card


def test_a_task_of_its_own_is_calibrated_and_the_other_is_left(both, tmp_path):
    folder = shutil.copytree(both, tmp_path / "out")
    before = read_temperature(folder, RANKING)
    path = write_csv(tmp_path / "a.csv", [row for day in range(6) for row in decision(day, 1)])
    logged = read_candidates([path], CoveredCallCandidatesConfig())
    fitted = fit_temperature(Policy.load(folder, task=CANDIDATE), logged)
    assert read_temperature(folder, CANDIDATE) == fitted and read_temperature(folder, RANKING) == before
    assert read_temperature(folder) == before


@pytest.mark.slow
def test_an_evaluation_judges_each_task_in_a_folder_of_its_own(both, corpus, tmp_path, capsys):
    given = ["--model", str(both), "--data_files", corpus, "--output_dir"]
    evaluate.main([*given, str(tmp_path / "each")])
    assert all((tmp_path / "each" / task / "metrics.json").is_file() for task in (RANKING, CANDIDATE))
    evaluate.main([*given, str(tmp_path / "one"), "--task", CANDIDATE])
    assert (tmp_path / "one" / "metrics.json").is_file() and not (tmp_path / "one" / CANDIDATE).exists()
    with pytest.raises(SystemExit, match="error: --task per_candidate is that of a model"):
        evaluate.main(["--baselines-only", "--data_files", corpus, "--task", CANDIDATE])


def test_questions_are_answered_by_what_the_model_writes(both, sums, tmp_path, capsys):
    evaluate.main(["--model", str(both), "--questions", sums, "--output_dir", str(tmp_path / "asked")])
    assert re.search(r"^all +40 +\d+\.\d% +0\.0% to ", capsys.readouterr().out, re.MULTILINE)
    found = json.loads((tmp_path / "asked" / "questions.json").read_text())
    assert len(found["answers"]) == 40 and found["exact_match"][0]["questions"] == 40
    with pytest.raises(SystemExit, match="it takes a model to answer them"):
        evaluate.main(["--baselines-only", "--questions", sums])


def test_while_it_trains_each_task_is_measured_and_one_is_chosen_by(words, sums, tmp_path):
    tuning.run("sft", [*words, *mix(sums), *OFTEN, "--max_eval_records", "6"])
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "eval_ranking_balanced_accuracy" in entry]
    assert len(logged) == 3 and all("eval_candidate_loss" in entry for entry in logged)
    best = max(logged, key=lambda entry: entry["eval_ranking_balanced_accuracy"])
    assert state["best_metric"] == best["eval_ranking_balanced_accuracy"]


def test_weighed_by_record_each_has_the_same_share_of_the_loss_of_whatever_step(words, sums, monkeypatch):
    more = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--weight_by", "record"]
    trainer = trainer_of(monkeypatch, "sft", *words, *mix(sums), *more)
    loader, tokens = iter(trainer.get_train_dataloader()), set()
    for _ in range(6):
        batches, items = trainer.get_batch_samples(loader, 2, "cpu")
        lengths = [(batch["labels"] >= 0).sum(1) for batch in batches]
        weights = [trainer.weights_of(batch["labels"]) for batch in batches]
        shares = torch.cat([one * length / items for one, length in zip(weights, lengths, strict=True)])
        assert shares.tolist() == pytest.approx([1 / 16] * 16)
        tokens.add(int(torch.cat(lengths).sum()))
    assert len(tokens) > 1


def test_an_epoch_of_a_training_has_the_shares_of_the_recipe(words, sums, monkeypatch):
    trainer = trainer_of(monkeypatch, "sft", *words, *mix(sums))
    tasks = Counter(trainer.train_dataset[place]["task"] for place in list(trainer.sampler))
    total = sum(tasks.values())
    assert [
        abs(tasks[name] - share * total) < 1 for name, share in ((RANKING, 0.5), (CANDIDATE, 0.3), (sums, 0.2))
    ] == [True] * 3


def test_its_cost_is_of_the_records_that_it_draws_and_of_both_tasks_evaluated(words, sums, monkeypatch, capsys):
    more = ["--max_eval_records", "4", *OFTEN, "--tokens_per_second", "1", "--per_device_train_batch_size", "16"]
    trainer = trainer_of(monkeypatch, "sft", *words, *mix(sums, 0.1, 0.1, 0.8), *more)
    drawn = [len(trainer.train_dataset[place]["input_ids"]) for place in list(trainer.sampler)]
    training, evaluation = 3 * 16 * sum(drawn) / len(drawn), 3 * sum(map(len, trainer.eval_dataset["input_ids"]))
    assert set(trainer.eval_dataset["task"]) == {RANKING, CANDIDATE}
    assert f"training {training / 3600:.2f}, evaluations {evaluation / 3600:.2f}, " in capsys.readouterr().out


RESUMED = ["--max_steps", "10", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"]
RESUMED += ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
RESUMED += ["--lora_dropout", "0.2", "--candidate_order", "shuffle", "--collapse_patience", "0"]


@pytest.mark.slow
def test_a_mixed_run_that_is_killed_goes_on_and_ends_with_the_same_weights(words, sums, tmp_path):
    folder, given = tmp_path / "out", [*words, *mix(sums), *RESUMED, "--save_total_limit", "9"]
    killed("sft", given, folder / "checkpoint-6" / "trainer_state.json")
    assert not (folder / "adapter_model.safetensors").exists()
    tuning.run("sft", given)
    tuning.run("sft", [*given, "--output_dir", str(tmp_path / "whole")])
    assert difference(adapter(folder), adapter(tmp_path / "whole")) == 0
    assert manifest_of(folder)["results"] == manifest_of(tmp_path / "whole")["results"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--mix", f"[{{config: {CANDIDATE}, share: 1}}]", "--dataset_config", RANKING], "is not in the mix"),
        (["--mix", f"[{{config: {CANDIDATE}, share: 0.5}}, {{data: no.jsonl, share: 0.5}}]"], "no file no.jsonl"),
        ([*mix("no.jsonl"), "--explain", "true"], "explain: of a mix answers stand alone. Remove mix, or explain."),
        (["--weight_by", "line"], "weight_by: 'line' is none of token, record"),
    ],
)
def test_a_mix_that_cannot_be_trained_is_refused_before_anything_is_read(more, message, words, tmp_path):
    with pytest.raises(RecipeError, match=message):
        tuning.run("sft", [*words, *more])
    assert not (tmp_path / "out").exists()


def test_a_control_token_in_a_file_is_named_with_its_line(words, tmp_path):
    path = written(tmp_path / "bad.jsonl", SUMS[0], chat("How much is <|end|>?", "2"))
    with pytest.raises(RecipeError, match=r"bad\.jsonl, line 2: .*<\|end\|>.*Correct the line"):
        tuning.run("sft", [*words, *mix(path)])


def test_a_file_that_changed_is_another_run(words, tmp_path, monkeypatch):
    path = written(tmp_path / "sums.jsonl", *SUMS)
    trainer_of(monkeypatch, "sft", *words, *mix(path))
    written(tmp_path / "sums.jsonl", *SUMS[:-1], chat("How much is 1 plus 1?", "2"))
    with pytest.raises(RecipeError, match="another run that was begun .*sha256"):
        tuning.run("sft", [*words, *mix(path)])


# --- Pairs


def pair_mix(path) -> list[str]:
    return ["--mix", json.dumps([{"config": "preference", "share": 0.75}, {"data": path, "share": 0.25}])]


PAIRS = [pair(f"How much is {n} plus {n}?", str(2 * n), str(2 * n + 1)) for n in range(300, 330)]


def test_pairs_of_a_file_are_preferred_beside_those_of_the_backtest(pair_words, tmp_path, capsys):
    path = written(tmp_path / "pairs.jsonl", *PAIRS)
    tuning.run("dpo", [*pair_words, *pair_mix(path)])
    assert re.search(rf"^{re.escape(path)} +0\.25 +30 +\d+ ", capsys.readouterr().out, re.MULTILINE)
    manifest = manifest_of(tmp_path / "out")
    assert manifest["tasks"] == [RANKING] and "600" not in manifest["labels"]
    takes = {source["source"]: source["in_an_epoch"] for source in manifest["mix"]}
    assert abs(takes[path] - 0.25 * sum(takes.values())) < 1
    assert Policy.load(tmp_path / "out").task == RANKING


@pytest.mark.slow
def test_mixed_pairs_that_are_killed_go_on_and_end_with_the_same_weights(pair_words, tmp_path):
    """In the second epoch, of which each source has an order of its own."""
    path = written(tmp_path / "pairs.jsonl", *PAIRS)
    steps = ["--max_steps", "10", "--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "9"]
    batch = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--collapse_patience", "0"]
    often = ["--eval_strategy", "steps", "--save_strategy", "steps"]
    folder, given = tmp_path / "out", [*pair_words, *pair_mix(path), *steps, *batch, *often]
    killed("dpo", given, folder / "checkpoint-6" / "trainer_state.json")
    assert not (folder / "adapter_model.safetensors").exists()
    tuning.run("dpo", given)
    tuning.run("dpo", [*given, "--output_dir", str(tmp_path / "whole")])
    states = [
        json.loads((one / "checkpoint-10" / "trainer_state.json").read_text()) for one in (folder, tmp_path / "whole")
    ]
    assert states[0]["epoch"] == states[1]["epoch"] > 1
    assert difference(adapter(folder), adapter(tmp_path / "whole")) == 0
    assert manifest_of(folder)["results"] == manifest_of(tmp_path / "whole")["results"]


def test_a_model_of_both_tasks_can_be_gone_on_with(both):
    start = read_start(str(both))
    assert start["task"] == RANKING and "iv" not in start["tuned_on"]["numbers"]


def test_pairs_that_ask_what_is_judged_are_refused(pair_words, pair_corpus, tmp_path, load):
    asked = load(RANKING, data_files=pair_corpus)["test"][0]["messages"][:-1]
    path = written(tmp_path / "pairs.jsonl", {"prompt": asked, "chosen": "1", "rejected": "NO_TRADE"})
    with pytest.raises(RecipeError, match=r"pairs\.jsonl, line 1: .* repeats a prompt of the test split"):
        tuning.run("dpo", [*pair_words, *pair_mix(path)])
