"""The data sets: bytes that are the same each time, a folder exchanged whole, a card filled in, no leak."""

import hashlib
import os
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import decision, load_candidates, write_csv
from datasets import load_dataset

from covered_call import atomic
from covered_call.candidates import decisions, records
from covered_call.candidates.builder import CoveredCallCandidates
from covered_call.candidates.leaks import PROMPTED
from covered_call.candidates.options import CHATS, CoveredCallCandidatesConfig
from covered_call.candidates.records import RECORDS
from covered_call.publishing import dataset as publish_dataset
from covered_call.publishing import publish

from .conftest import CARD, DATA, error_of, files, filled, local, run

# Bytes


def test_the_files_are_read_once_for_the_audit_all_configs_and_the_card(data, tmp_path, monkeypatch):
    read, opened = decisions.scan, []
    monkeypatch.setattr(decisions, "scan", lambda path, *more: opened.append(path) or read(path, *more))
    local("--to", tmp_path / "out", *data, "--configs", *RECORDS)
    assert opened == [data[1]]


def test_the_same_rows_make_the_same_bytes(data, tmp_path):
    for folder in ("one", "two"):
        local("--to", tmp_path / folder, *data)
    one, two = (
        {
            path: hashlib.sha256((tmp_path / folder / path).read_bytes()).hexdigest()
            for path in files(tmp_path / folder)
        }
        for folder in ("one", "two")
    )
    assert len(one) == 7
    assert {path for path in one if one[path] != two[path]} == {"README.md"}  # it names its folder


def test_no_file_describes_its_features_in_the_words_of_one_version(data, tmp_path):
    local("--to", tmp_path / "out", *data)
    for path in (tmp_path / "out").rglob("*.parquet"):
        assert b"huggingface" not in (pq.read_schema(path).metadata or {})


# A folder, and a dry run


def test_a_folder_holds_what_a_push_would_and_loads_as_the_rows_of_the_script(
    hub, push, compare, data, csv_file, tmp_path
):
    folder = tmp_path / "out" / "data"
    local("--to", folder, *data)
    assert compare(folder, csv_file) > 0
    assert f'load_dataset("{folder}", "per_candidate")' in (folder / "README.md").read_text()
    push(DATA, *data, "--private")
    pushed = hub.files(DATA)
    assert files(folder) == list(pushed)
    assert all((folder / path).read_bytes() == pushed[path] for path in pushed if path != "README.md")
    assert [path.name for path in folder.parent.iterdir()] == ["data"]  # nothing of the making is left


def test_a_folder_of_an_earlier_run_is_replaced_whole(data, tmp_path):
    folder = tmp_path / "out"
    local("--to", folder, *data, "--max_shard_size", "20KB")
    local("--to", folder, *data, "--configs", "per_candidate")
    assert files(folder) == [
        "README.md",
        *(f"per_candidate/{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")),
    ]


@pytest.mark.parametrize("name", ["mine.txt", "per_candidate/mine.parquet", ".git/config"])
def test_a_folder_with_anything_else_in_it_is_left_alone(data, tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    assert f"holds {name}, which was not written here" in error_of("--to", tmp_path / "out", *data)
    assert files(tmp_path / "out") == [name]


@pytest.mark.parametrize("name", ["mine", "per_candidate/mine"])
def test_an_empty_folder_of_somebody_else_is_not_lost(data, tmp_path, name):
    local("--to", tmp_path / "out", *data, "--splits", "train")
    (tmp_path / "out" / name).mkdir()
    assert f"holds {name}, which was not written here" in error_of("--to", tmp_path / "out", *data)
    assert (tmp_path / "out" / name).is_dir()


def test_a_readme_of_yours_is_not_overwritten(data, tmp_path):
    card = tmp_path / "out" / "README.md"
    card.parent.mkdir()
    card.write_text(CARD)  # has the sections of ours, and is none
    assert f"{card} was not written here, or was changed since" in error_of("--to", card.parent, *data)
    assert card.read_text() == CARD
    card.unlink()
    local("--to", card.parent, *data, "--splits", "train")
    edited = card.read_text().replace("The end.", "My notes.")
    card.write_text(edited)
    assert "was changed since" in error_of("--to", card.parent, *data)
    assert card.read_text() == edited
    local("--to", tmp_path / "other", *data, "--card", card, "--splits", "train")  # as the message says
    filled_in = (tmp_path / "other" / "README.md").read_text()
    assert "My notes." in filled_in and filled_in.count("covered-call publish wrote this file") == 1


def test_a_link_is_refused_for_it_would_be_replaced_by_a_folder(data, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    assert "out is a link, to real: give the folder itself" in error_of("--to", tmp_path / "out", *data)
    local("--to", tmp_path / "real", *data, "--splits", "train")
    shard = tmp_path / "real" / "per_candidate" / "train-00000-of-00001.parquet"
    shard.rename(tmp_path / "mine.parquet")
    shard.symlink_to(tmp_path / "mine.parquet")
    assert f"holds per_candidate/{shard.name}, which was not" in error_of("--to", tmp_path / "real", *data)
    assert shard.is_symlink() and (tmp_path / "mine.parquet").is_file()


KILLED = """
import os, sys
from covered_call import atomic
from covered_call.publishing import publish
done = atomic.exchange
def exchange(one, other):
    if sys.argv[1] == "after":
        done(one, other)
    os._exit(9)
atomic.exchange = exchange
publish.main(sys.argv[2:])
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_leaves_one_whole_version_and_the_next_run_clears_up(data, tmp_path, moment):
    folder = tmp_path / "runs" / "out"
    local("--to", folder, *data, "--splits", "train")
    done = run(["-c", KILLED, moment, "--to", folder, *data], {"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert done.returncode == 9
    assert len(files(folder)) == {"before": 3, "after": 7}[moment] and len(list(folder.parent.iterdir())) > 1
    local("--to", folder, *data)
    assert len(files(folder)) == 7 and [path.name for path in folder.parent.iterdir()] == ["out"]


def test_two_writers_of_one_folder_do_not_meet(data, tmp_path):
    with atomic.locked(tmp_path / "out"):
        said = error_of("--to", tmp_path / "out", *data)
    assert f"is being written by process {os.getpid()}" in said and not (tmp_path / "out").exists()


def test_a_build_that_fails_leaves_the_folder_as_it_was(data, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    local("--to", folder, *data)
    before = {path: (folder / path).read_bytes() for path in files(folder)}
    monkeypatch.setattr(publish, "describe_data", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        local("--to", folder, *data, "--configs", "per_candidate")
    assert {path: (folder / path).read_bytes() for path in files(folder)} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_dry_run_prints_files_rows_bytes_and_the_card_and_asks_no_network(data, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    local(DATA, *data, "--private", "--dry-run")
    printed = capsys.readouterr().out
    local("--to", tmp_path / "out", *data)
    for path in (tmp_path / "out").rglob("*.parquet"):
        rows, size = pq.read_metadata(path).num_rows, path.stat().st_size
        name = re.escape(path.relative_to(tmp_path / "out").as_posix())
        assert re.search(rf"^{name} +{rows:,} +{size:,}$", printed, re.MULTILINE)
    assert "my_key: kept" in printed and 'load_dataset("user/data", "per_decision_ranking")' in printed


def test_a_dry_run_of_a_folder_writes_nothing(data, tmp_path):
    local("--to", tmp_path / "out", *data, "--dry-run")
    assert not (tmp_path / "out").exists()


# The card


def test_the_card_keeps_its_keys_and_words_and_gets_configs_info_and_figures(data, csv_file, capsys):
    card = filled(capsys, DATA, *data, "--private")
    assert card.data.license == "cc-by-4.0" and card.data.pretty_name == "My calls" and card.data["my_key"] == "kept"
    assert re.findall(r"^(\w+):", card.content, re.MULTILINE) == [
        *("license", "pretty_name", "my_key", "tags", "size_categories", "configs", "dataset_info")
    ]
    assert card.text.startswith(
        "\n# My calls\n\nMy own words, with a <b>tag</b> and a column | of a table.\n\n<!-- sta"
    )
    assert "\nold\n" not in card.text and "The end." in card.text
    assert [config.get("default") for config in card.data["configs"]] == [True, None]
    assert card.data["size_categories"] == ["n<1K"]
    for info, name in zip(card.data["dataset_info"], CHATS, strict=True):
        made = load_candidates(name, data_files=csv_file)
        assert info["config_name"] == name
        assert {s["name"]: s["num_examples"] for s in info["splits"]} == {k: len(v) for k, v in made.items()}
        assert info["dataset_size"] == sum(split["num_bytes"] for split in info["splits"]) > info["download_size"] > 0


def test_the_figures_of_the_card_are_those_of_the_data(tmp_path, card, capsys):
    # Days 0 to 9, of which 8 and 9 are validation and test; options of day 7 live into day 8.
    rows = [row for day in range(10) for row in decision(day, sold=1 if day % 2 else None, strikes=(1, 2), dte=0.5)]
    rows = [row | {"dte": "1.0"} if row["decision_time"].startswith("2024-09-08") else row for row in rows]
    file = write_csv(tmp_path / "ten.csv", rows)
    text = filled(capsys, DATA, "--data_files", file, "--card", card, "--private", "--configs", *CHATS).text
    assert (
        "| `per_candidate` | train | 2024-09-01 to 2024-09-07 | 7 | 14 | `SKIP` 78.6 %, `SELL_CALL` 21.4 % |" in text
    )
    assert (
        "| `per_decision_ranking` | train | 2024-09-01 to 2024-09-07 | 7 | 7 | `NO_TRADE` 57.1 %, `2` 42.9 % |" in text
    )
    assert "| `per_decision_ranking` | test | 2024-09-10 to 2024-09-10 | 1 | 1 | `2` 100.0 % |" in text
    assert "Purged decisions: 1 of 10, 1 from train." in text
    assert "80 % of the distinct times train, 10 % validation, 10 % test" in text and "Built with" not in text


def test_the_card_names_a_file_of_vols_and_not_where_it_lies():
    said = publish_dataset.describe_options(
        CoveredCallCandidatesConfig(iv_file="/home/her/vols/dvol_{underlying}.csv")
    )
    assert said == "Built with `iv_file='dvol_{underlying}.csv'`."


@pytest.mark.parametrize(
    "options, said",
    [
        (["--purge", "false"], "Nothing is purged"),
        (["--splits", "train"], "One split, `train`, of all decisions."),
        (["--validation_from", "2024-10-01", "--test_from", "2024-10-10"], "validation begins at 2024-10-01, test at"),
        (["--candidate_order", "csv"], "Built with `candidate_order='csv'`."),
    ],
)
def test_the_card_says_how_the_data_were_built(data, capsys, options, said):
    assert said in filled(capsys, DATA, *data, "--private", *options).text


@pytest.mark.parametrize(
    "placeholder", ["[More Information Needed]", "{{ data }}", "TODO", "TBD", "<YOUR NAME>", "<...>", "<describe it>"]
)
def test_a_card_with_a_placeholder_left_is_refused(data, card, placeholder):
    Path(card).write_text(CARD + f"\nSource: {placeholder}.\n")
    assert f"still holds the placeholder {placeholder!r}" in error_of(DATA, *data, "--private", "--dry-run")


@pytest.mark.parametrize("licence", ["", "license: unknown\n", "license:\n", "license: []\n"])
def test_a_card_without_a_licence_is_refused(data, card, licence):
    Path(card).write_text(CARD.replace("license: cc-by-4.0\n", licence))
    assert "states no licence" in error_of(DATA, *data, "--private", "--dry-run")


@pytest.mark.parametrize(
    "old, new, where",
    [
        ("My calls\nmy_key", "My calls (simulated)\nmy_key", "its pretty_name"),
        ("- options", "- synthetic", "its tags"),
        ("# My calls", "# My simulated calls", "its title"),
        ("My own words", "This dataset is simulated", "'This dataset is simulated'"),
    ],
)
def test_real_data_are_not_shared_with_a_card_that_calls_them_simulated(data, card, old, new, where):
    Path(card).write_text(CARD.replace(old, new))
    said = error_of(DATA, *data, "--private", "--dry-run")
    assert f"says that the data are simulated ({where})" in said and "give it with --card" in said


def test_the_card_of_the_sample_is_not_for_other_data(csv_file, tmp_path):
    assert "says that the data are simulated" in error_of("--to", tmp_path / "out", "--data_files", csv_file)


def test_where_there_is_no_card_of_the_sample_it_asks_for_one(data, tmp_path, monkeypatch):
    """As in what pip installed from a wheel, which holds the sample, and no card."""
    monkeypatch.setattr(publish, "DATASET_CARD", tmp_path / "dataset_card.md")
    said = error_of("user/sample", "--dry-run")
    assert said.startswith("error: There is no dataset_card.md to fill in") and "--card FILE" in said
    local(DATA, *data, "--private", "--dry-run", "--splits", "train")


@pytest.mark.parametrize(
    "text", [None, "---\nlicense: [\n---\n# x\n", "---\n- a\n---\n", CARD + "<!-- statistics -->"]
)
def test_a_card_that_cannot_be_used_is_an_error_that_names_it(data, card, text):
    Path(card).unlink() if text is None else Path(card).write_text(text)
    said = error_of(DATA, *data, "--private", "--dry-run")
    assert said.startswith("error: ") and "\n" not in said and ("card" in said)


# No prompt names its answer


def test_prompts_that_name_their_answers_are_shared_only_when_that_is_allowed(data, capsys):
    said = error_of(DATA, *data, "--private", "--hindsight", "--dry-run")
    assert "The leak audit fails." in said and "hold the block of hindsight" in said and "--allow-hindsight" in said
    card = filled(capsys, DATA, *data, "--private", "--hindsight", "--allow-hindsight")
    assert "Built with `hindsight=True`. **The prompts name the teacher's outcomes, and so the answers.**" in card.text


def test_the_audit_finds_a_leak_in_words_it_does_not_know(data, monkeypatch):
    original = RECORDS["per_candidate"]

    def leaky(columns, options):
        records = original(columns, options)
        rows = records.to_pylist()
        for row in rows:
            row["messages"][1]["content"] += f" Psst: {row['label']}"
        return pa.Table.from_pylist(rows, records.schema)

    monkeypatch.setitem(RECORDS, "per_candidate", leaky)
    assert "per_candidate prompts change when labels" in error_of(DATA, *data, "--private", "--dry-run")


# A config of another shape: what is shared is what RECORDS holds, whatever its fields.


@pytest.fixture
def pairs(monkeypatch):
    """Adds a config that holds pairs, whose prompts name the answer if told so; gives the options that publish it."""

    def added(leaky: bool) -> list[str]:
        def records_of_pairs(columns, options):
            pairs = []
            for record in records.ranking_records(columns, options).to_pylist():
                if record["label"] != "NO_TRADE":
                    system, user, _ = record["messages"]
                    if leaky:
                        user = user | {"content": user["content"] + record["label"]}
                    names = {"decision_id": record["decision_id"]}
                    pairs.append(names | {"prompt": [system, user], "chosen": record["label"], "rejected": "NO_TRADE"})
            return pa.Table.from_pylist(pairs, datasets.Features(features).arrow_schema)

        text = datasets.Value("string")
        features = {"decision_id": text, "prompt": [{"role": text, "content": text}], "chosen": text, "rejected": text}
        monkeypatch.setitem(RECORDS, "pairs", records_of_pairs)
        monkeypatch.setitem(records.FEATURES, "pairs", features)
        config = CoveredCallCandidatesConfig(name="pairs")
        monkeypatch.setitem(CoveredCallCandidates.builder_configs, "pairs", config)
        # As they are found when the modules are imported.
        prompted = tuple(name for name, fields in records.FEATURES.items() if {"messages", "prompt"} & fields.keys())
        assert prompted == (*PROMPTED, "pairs")
        monkeypatch.setattr(publish_dataset, "PROMPTED", prompted)
        return ["--configs", *CHATS, "pairs"]

    return added


def test_a_config_without_messages_or_labels_is_shared_like_the_others(data, tmp_path, pairs):
    local("--to", tmp_path / "out", *data, *pairs(leaky=False))
    found = load_dataset(str(tmp_path / "out"), "pairs", cache_dir=str(tmp_path / "arrow"))
    assert found["train"].column_names == ["decision_id", "prompt", "chosen", "rejected"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert re.search(rf"\| `pairs` \| train \| n/a \| {len(found['train'])} \| {len(found['train'])} \| n/a \|", text)


def test_a_leak_in_a_config_without_messages_is_found(data, tmp_path, pairs):
    said = error_of("--to", tmp_path / "out", *data, *pairs(leaky=True))
    assert said.startswith("error: ") and "pairs prompts change when labels" in said
