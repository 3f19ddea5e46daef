"""Records, in tokens and in an order: splits, shuffles, balance, and the base that is built of them."""

import re
import shutil

import numpy as np
import pytest
import yaml
from conftest import decision, no_candidates, write_csv
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from covered_call import tuning
from covered_call.candidates import builder
from covered_call.candidates.builder import load_candidates
from covered_call.candidates.schema import CandidatesError
from covered_call.training import examples
from covered_call.training.examples import EpochSampler, load_splits, shuffle_epochs, thin_out
from covered_call.training.keys import DataArguments
from covered_call.training.runs import RecipeError

from .conftest import paths

# --- Splits


def data_of(path, name="per_candidate", **changes) -> DataArguments:
    return DataArguments(dataset_config=name, data_files=[path], **changes)


def test_a_validation_split_must_have_records(tmp_path):
    path = write_csv(tmp_path / "a.csv", decision(0, sold=1))
    with pytest.raises(RecipeError, match="validation split is empty"):
        load_splits(data_of(path).backtest(), "per_candidate", 0)


def test_a_dataset_config_that_there_is_not_is_named_with_those_there_are(corpus):
    with pytest.raises(CandidatesError, match="'ranking' is no config: choose one of per_candidate, per_decision_"):
        load_splits(data_of(corpus).backtest(), "ranking", 0)


def test_scoring_can_be_limited_to_evenly_spaced_records():
    split = Dataset.from_dict({"n": list(range(100))})
    found = thin_out(split, 5)["n"]
    assert [n // 20 for n in found] == [0, 1, 2, 3, 4] and thin_out(split, 5)["n"] == found
    assert len(set(thin_out(split, 48)["n"])) == 48
    pairs = Dataset.from_dict({"label": ["SELL_CALL", "SKIP"] * 300})  # the best of a decision first
    assert 0.4 < thin_out(pairs, 100)["label"].count("SKIP") / 100 < 0.6
    assert thin_out(split, None) is split and thin_out(split, 100) is split


def shown(split) -> list[list[str]]:
    """The instruments of each prompt, in the order they stand there."""
    return [re.findall(r"\[\d+\] (\S+)", messages[1]["content"]) for messages in split["messages"]]


def test_what_is_rendered_anew_is_cached_only_as_long_as_the_code_is_the_same(corpus, monkeypatch):
    split = load_splits(data_of(corpus, "per_decision_ranking").backtest(), "per_decision_ranking", 0)["train"]
    first, again = (shuffle_epochs(split, 0, copies=1).cache_files for _ in range(2))
    monkeypatch.setattr(examples, "CODE", "edited")
    assert first == again != shuffle_epochs(split, 0, copies=1).cache_files


def test_a_shuffle_is_another_one_each_epoch_and_spares_validation(corpus):
    backtest = data_of(corpus, "per_decision_ranking", candidate_order="shuffle").backtest()
    splits = load_splits(backtest, "per_decision_ranking", 0)
    epochs = shown(shuffle_epochs(splits["train"], 0, copies=3))
    size = len(splits["train"])
    first, second, third = (epochs[i : i + size] for i in (0, size, 2 * size))
    assert first != second and second != third
    assert [sorted(names) for names in first] == [sorted(names) for names in second] == shown(splits["train"])
    assert epochs == shown(shuffle_epochs(splits["train"], 0, copies=3))
    assert all(names == sorted(names) for names in shown(splits["validation"]))


@pytest.mark.parametrize("context", ["none", "spot"])
def test_an_epochs_shuffle_is_that_of_load_candidates_though_nothing_is_read_again(tmp_path, monkeypatch, context):
    """Also of decisions with one candidate or none, blank numbers, and outcomes that are known."""
    rows = [row for day in range(40) for row in decision(day, sold=day % 3 if day % 4 else None, dte=1.5, iv="")]
    rows += [no_candidates(day) for day in range(40, 45)] + decision(45, sold=0, strikes=(0.55,), spot=0.5)
    rows += [row for day in range(46, 70) for row in decision(day, sold=day % 7, strikes=range(60000, 67000, 1000))]
    path, seed = write_csv(tmp_path / "a.csv", rows), 3
    options = {"data_files": path, "splits": (0.8, 0.2, 0.0), "cache_dir": str(tmp_path / "arrow"), "context": context}
    train = load_candidates("per_decision_ranking", seed=seed, **options)["train"]
    ordered = [
        load_candidates("per_decision_ranking", candidate_order="shuffle", seed=seed + epoch, **options)["train"]
        for epoch in range(3)
    ]
    monkeypatch.setattr(builder, "read_decisions", lambda *_: pytest.fail("it read the files"))
    shuffled = shuffle_epochs(train, seed, copies=3)
    assert list(shuffled) == [record for epoch in ordered for record in epoch]
    assert shuffled.features == ordered[0].features and shown(ordered[0]) != shown(ordered[1])


@pytest.mark.parametrize(
    "stage, recipe, more, where_warm",
    [
        ("sft", "tiny", ["--dataset_config", "per_decision_ranking", "--candidate_order", "shuffle"], 0),
        ("dpo", "tiny_dpo", [], 1),  # each time: whether outcomes are exact is no part of what is cached
    ],
)
def test_a_training_reads_its_files_once_and_for_imitation_not_at_all_where_the_cache_is_warm(
    stage, recipe, more, where_warm, pair_corpus, pair_base, tmp_path, monkeypatch
):
    read, original = [], builder.read_decisions
    monkeypatch.setattr(builder, "read_decisions", lambda *given: read.append(given) or original(*given))
    copied = shutil.copy(pair_corpus, tmp_path / "copied.csv")  # whose path no cache knows
    words = ["--config", recipe, "--dry_run", "--tiny_base_steps", "0", "--max_steps", "30", *more]
    words += paths(pair_base, copied, tmp_path / "out")
    tuning.run(stage, words)
    assert len(read) == 1
    tuning.run(stage, words)
    assert len(read) == 1 + where_warm


def test_a_recipe_is_read_once(words, monkeypatch):
    read, original = [], yaml.safe_load
    monkeypatch.setattr(yaml, "safe_load", lambda text: read.append(text) or original(text))
    tuning.run("sft", [*words, "--dry_run"])
    assert len(read) == 1


def test_a_tiny_base_is_built_once(words, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(
        examples, "build_tiny_base", lambda path, *_: built.append(path) or shutil.copytree(base, path)
    )
    base = words[words.index("--model_name_or_path") + 1]
    words[words.index(base)] = str(tmp_path / "tiny")
    tuning.run("sft", [*words, "--dry_run"])
    tuning.run("sft", [*words, "--dry_run"])
    assert len(built) == 1


# --- The order of an epoch


@given(st.lists(st.booleans(), min_size=1), st.integers(0, 9), st.integers(0, 9))
def test_an_epoch_takes_each_record_once_in_an_order_of_its_own(trades, seed, epoch):
    sampler = EpochSampler(trades, "none", seed)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(trades))) and len(sampler) == len(trades)
    again = EpochSampler(trades, "none", seed)
    again.set_epoch(epoch)
    assert list(sampler) == list(again)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5), st.integers(1, 3))
def test_downsampling_takes_as_many_of_either_kind_from_the_epochs_own_copy(trades, others, epoch, copies):
    sampler = EpochSampler([True] * trades + [False] * others, "downsample", seed=0)
    sampler.copies = copies
    sampler.set_epoch(epoch)
    start = epoch % copies * (trades + others)
    taken = [index - start for index in sampler]
    assert len(set(taken)) == len(taken) == len(sampler) == 2 * min(trades, others)
    assert sum(index < trades for index in taken) == min(trades, others)
    assert 0 <= min(taken) and max(taken) < trades + others


def test_downsampling_lets_other_records_have_their_turn():
    sampler = EpochSampler([True] * 5 + [False] * 100, "downsample", seed=0)
    seen = set()
    for epoch in range(10):
        sampler.set_epoch(epoch)
        seen |= set(sampler)
    assert len(seen) > 40


LENGTHS = st.lists(st.integers(1, 900), min_size=1, max_size=90)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
def test_records_of_like_length_come_together_each_once_by_a_law_of_seed_and_epoch(lengths, step, seed, epoch):
    def order() -> list[int]:
        sampler = EpochSampler([True] * len(lengths), "none", seed)
        sampler.group(np.array(lengths), step)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order()) == list(range(len(lengths))) and order() == order()


def padding(order: list[int], lengths: np.ndarray, micro_batch: int) -> float:
    """The share of the tokens read that is padding."""
    batches = lengths[np.array(order)].reshape(-1, micro_batch)
    return 1 - batches.sum() / (batches.max(1).sum() * micro_batch)


@pytest.mark.parametrize("micro_batch, before", [(2, 0.1), (8, 0.3)])
def test_grouping_leaves_next_to_no_padding(micro_batch, before):
    lengths = np.random.default_rng(0).choice(np.arange(220, 860, 64), 2_048)
    sampler = EpochSampler([True] * len(lengths), "none", 0)
    assert padding(list(sampler), lengths, micro_batch) > before
    sampler.group(lengths, 16)
    assert padding(list(sampler), lengths, micro_batch) < 0.02


def test_grouping_mixes_lengths_within_an_epoch_and_changes_with_it():
    lengths = np.arange(1_000)
    sampler = EpochSampler([True] * 1_000, "none", 0)
    sampler.group(lengths, 16)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    steps = lengths[np.array(first[:992])].reshape(-1, 16).mean(1)
    assert abs(np.corrcoef(np.arange(62), steps)[0, 1]) < 0.3
    assert all(np.diff(lengths[np.array(first[i : i + 16])]).min() >= 0 for i in range(0, 992, 16))


def test_weights_give_both_kinds_the_same_share():
    sampler = EpochSampler([True] * 20 + [False] * 80, "weight", seed=0)
    trade, other = sampler.weights()
    assert 20 * trade == pytest.approx(80 * other) == pytest.approx(50)
    assert EpochSampler([True] * 20 + [False] * 80, "none", seed=0).weights() == [1.0, 1.0]


def test_a_split_without_trades_cannot_be_balanced():
    with pytest.raises(RecipeError, match="needs both trades and non-trades"):
        EpochSampler([False, False], "downsample", seed=0)
