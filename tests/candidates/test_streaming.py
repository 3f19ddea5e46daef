"""Streaming: the rows of a load, one at a time, through all that a training does with them."""

import itertools
import json
import multiprocessing
import os

import datasets
import pyarrow as pa
import pytest
from conftest import decision, no_candidates, write_csv
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from covered_call.candidates import builder

CONFIGS = ("per_candidate", "per_decision_ranking", "preference", "q_values")
LENGTH = 48 * 3
given_as_tables = pytest.mark.skipif(
    int(datasets.__version__.split(".")[0]) < 5, reason="datasets 3.6 joins no tables of which some lack a value"
)


@pytest.fixture(params=["typed", "as the library would"])
def way(request, monkeypatch):
    """Both ways to stream: that of the versions it was tried with, and that of all others."""
    if request.param != "typed":
        monkeypatch.setattr(builder, "STREAMS_TYPED", ())
    return request.param


@pytest.fixture
def files(tmp_path, monkeypatch) -> str:
    """144 candidates in 16 shards of three decisions, of which two make a table."""
    monkeypatch.setattr("covered_call.candidates.columns.ROWS", 8)
    rows = [one for day in range(48) for one in decision(day, day % 3, spot=50_000 + day, dte=1.0)]
    return write_csv(tmp_path / "a.csv", [*rows, no_candidates(48)])


@pytest.fixture
def streamed(load, files, way) -> datasets.IterableDataset:
    return load(data_files=files, streaming=True, splits="train")["train"]


@pytest.fixture
def rows(load, files) -> list[dict]:
    return load(data_files=files, splits="train")["train"].to_list()


def key(record: dict) -> tuple:
    return record["decision_id"], record["instrument"]


def in_order(records) -> list[dict]:
    return sorted(records, key=key)


# --- The rows


@pytest.mark.parametrize("config", CONFIGS)
def test_the_sample_streams_as_it_loads(load, config):
    loaded, streamed = load(config), load(config, streaming=True)
    assert list(streamed) == list(loaded)
    for name, split in loaded.items():
        assert streamed[name].features == split.features
        assert list(streamed[name]) == split.to_list()


@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_load_what_one_does(load, tmp_path, files, config):
    one, two = (
        load(config, data_files=files, num_proc=count, splits="train", seed=count)["train"] for count in (1, 2)
    )
    assert two.to_list() == one.to_list()
    assert two.features == one.features


def test_the_builder_is_one_of_examples_too(tmp_path, files, rows):
    made = builder.CoveredCallCandidates(data_files=files, splits="train", cache_dir=str(tmp_path / "arrow"))
    assert isinstance(made, datasets.GeneratorBasedBuilder) and isinstance(made, datasets.ArrowBasedBuilder)
    (split,) = made._split_generators(None)
    keys, records = zip(*made._generate_examples(**split.gen_kwargs), strict=True)
    assert list(records) == rows
    assert len(set(keys)) == LENGTH


def test_a_file_has_batches_of_thousands_of_records(load, tmp_path):
    path = write_csv(tmp_path / "a.csv", [one for hour in range(1_200) for one in decision(hour / 24, dte=0.1)])
    train = load("q_values", data_files=path, splits="train")["train"]
    batches = train.data.column("spot").chunks
    assert sum(map(len, batches)) == 3_600 and len(batches) <= builder.SHARDS


# --- What a training does with a stream


@pytest.mark.parametrize("seen", [1, 7, 60, LENGTH - 1])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_stream_that_is_resumed_gives_the_rest_once(load, files, rows, way, seen, mapped):
    def stream():
        made = load(data_files=files, streaming=True, splits="train")["train"]
        return made.map(dict) if mapped else made

    first = stream()
    assert list(itertools.islice(first, seen)) == rows[:seen]
    resumed = stream()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert list(resumed) == rows[seen:]


def test_a_shuffled_stream_gives_each_record_once_in_every_epoch(streamed, rows):
    shuffled = streamed.shuffle(seed=0, buffer_size=30)
    first = list(shuffled)
    shuffled.set_epoch(1)
    second = list(shuffled)
    assert first != second and rows not in (first, second)
    assert in_order(first) == in_order(second) == in_order(rows)


@pytest.mark.parametrize("shuffled", [False, True])
def test_two_workers_of_a_data_loader_give_each_record_once(streamed, rows, shuffled):
    streamed = streamed.shuffle(seed=0, buffer_size=10) if shuffled else streamed
    assert streamed.num_shards == builder.SHARDS
    records = list(DataLoader(streamed, batch_size=None, num_workers=2, collate_fn=dict))
    assert records != rows and in_order(records) == in_order(rows)


def test_two_nodes_give_each_record_once(streamed, rows):
    nodes = [list(split_dataset_by_node(streamed, rank, world_size=2)) for rank in range(2)]
    assert all(nodes) and in_order(sum(nodes, [])) == in_order(rows)


def test_a_stream_is_mapped_filtered_skipped_and_batched(streamed, rows):
    keys = list(map(key, rows))
    assert [tuple(record["key"]) for record in streamed.map(lambda record: {"key": key(record)})] == keys
    assert list(streamed.filter(lambda record: record["dte"] == 1.0)) == rows
    assert list(streamed.skip(5).take(40)) == rows[5:45]
    assert list(streamed.select_columns(["spot"])) == [{"spot": record["spot"]} for record in rows]
    batches = list(streamed.batch(50))
    assert [len(batch["spot"]) for batch in batches] == [50, 50, 44]
    assert [text for batch in batches for text in batch["messages"]] == [record["messages"] for record in rows]
    lengths = streamed.map(lambda batch: {"n": [len(batch["spot"])] * len(batch["spot"])}, batched=True, batch_size=50)
    assert [record["n"] for record in lengths] == [50] * 100 + [44] * 44


def test_a_stream_is_given_as_tables_and_as_arrays(streamed, rows):
    schema = streamed.features.arrow_schema
    tables = streamed.with_format("arrow")
    for given in (tables, tables.map(lambda table: table)):
        assert [record for table in given for record in table.cast(schema).to_pylist()] == rows
    assert [record["spot"] for record in streamed.with_format("numpy")] == [record["spot"] for record in rows]


@given_as_tables
def test_a_stream_is_given_as_tables_of_many_records(streamed, rows):
    tables = list(streamed.with_format("arrow").iter(100))
    assert [len(table) for table in tables] == [100, 44]
    assert pa.concat_tables(tables).to_pylist() == rows


def test_streams_are_joined(streamed, rows):
    assert list(datasets.concatenate_datasets([streamed, streamed])) == rows * 2
    by_turns = datasets.interleave_datasets([streamed.skip(40), streamed])
    assert list(by_turns)[:60] == [record for pair in zip(rows[40:70], rows[:30], strict=True) for record in pair]


def test_another_process_streams_without_the_files(streamed, rows, files):
    os.unlink(files)  # what is to be rendered is in the stream, and no file is hashed again
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(list, [streamed]) == rows
