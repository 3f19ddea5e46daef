"""Sharing: against a Hub on 127.0.0.1 that keeps real files, with the real client, in processes of their own."""

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pyarrow.parquet as pq
import pytest
import yaml
from attack import hub as attack_hub
from conftest import REAL_DATA, SCRIPT, decision, load_candidates, needs_real_data, no_candidates, write_csv
from datasets import load_dataset
from hub_standin import (
    BREAK,
    DRIP,
    HANG,
    LOSE,
    PRETEND,
    READER,
    STRANGER,
    TRICKLE,
    WRITER,
    Answer,
    Changed,
    Hub,
)
from huggingface_hub import DatasetCard, ModelCard, constants, get_session
from huggingface_hub.utils._runtime import is_xet_available

from covered_call import atomic
from covered_call.candidates.options import CHATS
from covered_call.candidates.prompts import PROMPT_VERSION
from covered_call.candidates.records import RECORDS
from covered_call.evaluation import metrics
from covered_call.publishing import hub as publish_hub
from covered_call.publishing import publish

REPO = SCRIPT.parent
PUBLISH = REPO / "publish.py"
DATA = "user/data"
CARD = """\
---
license: cc-by-4.0
pretty_name: My calls
my_key: kept
tags:
- options
---

# My calls

My own words, with a <b>tag</b> and a column | of a table.

<!-- statistics -->
old
<!-- /statistics -->

The end.
"""
# Compares a repo, or a folder, with what the script makes of the files; prints how many rows were compared.
COMPARE = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
from datasets import load_dataset
from covered_call_candidates import load_candidates
source, files, *options = sys.argv[1:]
more = dict(option.split("=") for option in options)
rows = 0
for name in more.pop("configs", "per_candidate,per_decision_ranking").split(","):
    made = load_candidates(name, data_files=files)
    read = load_dataset(source, name, **more)
    streamed = load_dataset(source, name, streaming=True, **more)
    assert list(read) == list(streamed) == list(made), (read, made)
    for split in made:
        assert read[split].features == streamed[split].features == made[split].features
        assert read[split].to_list() == list(streamed[split]) == made[split].to_list(), split
        rows += len(made[split])
default, named = (load_dataset(source, *name, **more)["train"] for name in ([], ["per_candidate"]))
assert default.features == named.features
print(rows, "rows are the same")
"""
EVERY = f"configs={','.join(RECORDS)}"


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def csv_file(tmp_path) -> str:
    rows = [row for day in range(60) for row in decision(day, sold=day % 3 if day % 4 else None, dte=1.0)]
    return write_csv(tmp_path / "candidates.csv", [*rows, no_candidates(60)])


@pytest.fixture
def card(tmp_path) -> str:
    (tmp_path / "card.md").write_text(CARD, encoding="utf-8")
    return str(tmp_path / "card.md")


@pytest.fixture
def data(csv_file, card) -> list[str]:
    """The options that name a small corpus, its card and, to be quick, the configs that hold chats."""
    return ["--data_files", csv_file, "--card", card, "--configs", *CHATS]


def run(words, environment: dict, cwd: Path, python: str = sys.executable) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(cwd / "hf_home")} | environment
    return subprocess.run([python, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture
def command(hub, monkeypatch):
    """publish.py in this process against the stand-in, with what its environment would tell the Hub's client."""

    def performed(*words, token=WRITER, patience=1, **environment) -> str:
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(constants, "ENDPOINT", environment.get("HF_ENDPOINT", hub.endpoint))
            patch.setattr(constants, "HF_HUB_OFFLINE", environment.get("HF_HUB_OFFLINE") == "1")
            patch.setattr(publish_hub, "PATIENCE", patience)
            patch.setenv("HF_TOKEN", token) if token else patch.delenv("HF_TOKEN", raising=False)
            local(*words)
        return printed.getvalue()

    return performed


@pytest.fixture
def push(command):
    """publish.py against the stand-in, where it must succeed: returns what it printed."""
    return command


@pytest.fixture
def refused(command):
    """publish.py against the stand-in, where it must fail: returns the one line that says why."""

    def refusal(*words, **options) -> str:
        with pytest.raises(SystemExit) as stopped:
            command(*words, **options)
        said = str(stopped.value)
        assert said.startswith("error: ") and said.isprintable()
        return said

    return refusal


@pytest.fixture
def compare(hub, tmp_path):
    """Reads a repo or folder back in a process of its own, which must find the script's rows and features."""

    def compared(source, files, *options, python=sys.executable, home="reader") -> int:
        words = ["-c", COMPARE, source, files, *options]
        done = run(words, hub.environment(tmp_path / home), tmp_path, python)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[0])

    return compared


def local(*words) -> None:
    """publish.py in this process, where HF_HUB_OFFLINE is set."""
    publish.main(list(map(str, words)))


def error_of(*words) -> str:
    with pytest.raises(SystemExit) as stopped:
        local(*words)
    return str(stopped.value)


def filled(capsys, *words, kind=DatasetCard):
    """The card as a dry run prints it."""
    local(*words, "--dry-run")
    return kind("---\n" + capsys.readouterr().out.split("\n---\n", 1)[1])


# Push and load


def test_a_push_is_one_commit_that_loads_as_the_rows_and_features_of_the_script(hub, push, compare, data, csv_file):
    printed = push(DATA, *data, "--private", "--configs", *RECORDS)
    assert len(hub.commits(DATA)) == 1 and hub.repos[DATA].private
    assert f"Pushed to {hub.endpoint}/datasets/{DATA}/commit/" in printed
    assert list(hub.files(DATA)) == [
        "README.md",
        *(f"{name}/{split}-00000-of-00001.parquet" for name in RECORDS for split in ("test", "train", "validation")),
    ]
    made = [split for name in RECORDS for split in load_candidates(name, data_files=csv_file).values()]
    assert compare(DATA, csv_file, EVERY) == sum(map(len, made)) > 200


def test_pushing_again_unchanged_makes_no_commit_and_says_so(hub, push, data):
    push(DATA, *data, "--private")
    uploads = sum(path.startswith("/lfs/") for _, path in hub.requests)
    assert "holds exactly this already: nothing to push" in push(DATA, *data, "--private")
    assert len(hub.commits(DATA)) == 1
    assert sum(path.startswith("/lfs/") for _, path in hub.requests) == uploads


def test_only_what_changed_is_written(hub, push, data, card):
    push(DATA, *data, "--private")
    Path(card).write_text(CARD.replace("The end.", "The very end."))
    assert "1 files written, 0 deleted, 6 as before" in push(DATA, *data, "--private")
    assert "The very end." in hub.files(DATA)["README.md"].decode()
    assert len(hub.commits(DATA)) == 2


def test_fewer_shards_splits_and_configs_leave_no_orphan_and_files_of_others_stay(hub, push, compare, data, csv_file):
    push(DATA, *data, "--private", "--max_shard_size", "20KB")
    assert len(hub.files(DATA)) > 8
    others = {
        "notes.txt": b"mine",
        "per_candidate/train-notes.md": b"mine",
        "extra/train-00000-of-00001.parquet": b"x",
    }
    hub.put(DATA, others | {"per_candidate/train-00000-of-00001-c0ffee.parquet": b"of an old push_to_hub"})
    push(DATA, *data, "--private", "--splits", "train", "--configs", "per_candidate")
    assert set(hub.files(DATA)) == {"README.md", "per_candidate/train-00000-of-00001.parquet", *others}
    assert len(hub.commits(DATA)) == 3
    push(DATA, *data, "--private")
    assert compare(DATA, csv_file) > 0


def test_many_shards_load_as_one_split(hub, push, compare, data, csv_file):
    push(DATA, *data, "--private", "--max_shard_size", "20KB")
    assert sum(path.startswith("per_candidate/train-") for path in hub.files(DATA)) > 2
    assert compare(DATA, csv_file) > 0


def test_a_revision_is_a_branch_of_its_own(hub, push, compare, data, csv_file):
    push(DATA, *data, "--private")
    main = hub.files(DATA)
    push(DATA, *data, "--private", "--revision", "v2", "--max_shard_size", "20KB")
    assert hub.files(DATA) == main and hub.files(DATA, "v2") != main
    assert 'load_dataset("user/data", "per_candidate", revision="v2")' in hub.files(DATA, "v2")["README.md"].decode()
    assert compare(DATA, csv_file, "revision=v2") > 0


PUSH_EACH = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
from covered_call_candidates import load_candidates
for name in ("per_candidate", "per_decision_ranking"):
    splits = load_candidates(name, data_files=sys.argv[1])
    splits.push_to_hub("user/data", name, private=True, set_default=name == "per_candidate")
"""


def test_push_to_hub_for_each_config_works_and_no_card_of_ours_merges_the_configs(
    hub, push, compare, data, csv_file, tmp_path
):
    done = run(["-c", PUSH_EACH, csv_file], hub.environment(tmp_path / "hf_home"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(hub.commits(DATA)) == 2 and len(hub.files(DATA)) == 7  # a commit for each config
    rows = compare(DATA, csv_file)
    hub.put(DATA, {"README.md": (REPO / "dataset_card.md").read_bytes()})  # as it is, by hand
    assert compare(DATA, csv_file, home="second") == rows
    push(DATA, *data, "--private")
    assert compare(DATA, csv_file, home="third") == rows
    assert len(hub.files(DATA)) == 7


# As `make` sets them up; BOTH_STACKS=PYTHON:PYTHON names others.
STACKS = os.environ.get("BOTH_STACKS", f"{REPO}/.venv/bin/python:{REPO}/.venv-current/bin/python").split(":")


@pytest.mark.skipif(
    not all(map(os.path.exists, STACKS)),
    reason=f"needs the environments of both stacks, {' and '.join(STACKS)}: make test test-current",
)
def test_what_each_stack_pushes_both_read_and_neither_would_push_again(hub, compare, data, csv_file, tmp_path):
    version = ["-c", "import datasets; print(datasets.__version__)"]
    assert len({run(version, {}, tmp_path, stack).stdout for stack in STACKS}) == 2
    for index, (first, second) in enumerate((STACKS, STACKS[::-1])):
        repo = f"user/data{index}"
        for stack in (first, second):
            words = [PUBLISH, repo, *data, "--private", "--configs", *RECORDS]
            done = run(words, hub.environment(tmp_path / "hf_home"), tmp_path, stack)
            assert done.returncode == 0, done.stderr
        assert len(hub.commits(repo)) == 1
        for number, stack in enumerate(STACKS):
            assert compare(repo, csv_file, EVERY, python=stack, home=f"reader_{index}_{number}") > 0


# Bytes


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


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


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
    assert "My notes." in filled_in and filled_in.count("publish.py wrote this file") == 1


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


KILLED = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
import atomic, publish
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


@pytest.mark.parametrize(
    "text", [None, "---\nlicense: [\n---\n# x\n", "---\n- a\n---\n", CARD + "<!-- statistics -->"]
)
def test_a_card_that_cannot_be_used_is_an_error_that_names_it(data, card, text):
    Path(card).unlink() if text is None else Path(card).write_text(text)
    said = error_of(DATA, *data, "--private", "--dry-run")
    assert said.startswith("error: ") and "\n" not in said and ("card" in said)


def test_a_card_that_the_hub_does_not_take_is_refused_before_any_upload(hub, refused, data, card):
    Path(card).write_text(CARD.replace("license: cc-by-4.0", "license: [cc-by-4.0]"))
    said = refused(DATA, *data, "--private")
    assert "license must be a string" in said and "Nothing was changed" in said
    assert not any(method == "PUT" for method, _ in hub.requests) and hub.commits(DATA) == []


# Before a push


def test_data_other_than_the_sample_are_pushed_only_after_a_word_on_who_may_see_them(hub, refused, data):
    assert "say --private or --public" in refused(DATA, *data)
    assert hub.repos == {} and hub.requests == []


def test_the_sample_is_public_by_default_and_real_data_when_said(hub, push, data):
    push("user/sample", "--configs", "per_decision_ranking")
    push("user/real", *data, "--public")
    assert not hub.repos["user/sample"].private and not hub.repos["user/real"].private


def test_private_and_public_exclude_each_other(data, capsys):
    assert error_of(DATA, *data, "--private", "--public", "--dry-run") == "2"
    assert "not allowed with" in capsys.readouterr().err


def test_what_must_be_private_is_not_pushed_to_a_repo_that_is_public(hub, push, refused, data):
    push(DATA, *data, "--public")
    before = hub.files(DATA)
    said = refused(DATA, *data, "--private", "--splits", "train")
    assert "is there already, and public" in said
    assert hub.files(DATA) == before and not hub.repos[DATA].private


def test_a_private_repo_stays_private(hub, push, data):
    push(DATA, *data, "--private")
    assert "is there already, and private; it stays so" in push(DATA, *data, "--public")
    assert hub.repos[DATA].private


def test_prompts_that_name_their_answers_are_shared_only_when_that_is_allowed(data, capsys):
    said = error_of(DATA, *data, "--private", "--hindsight", "--dry-run")
    assert "The leak audit fails." in said and "hold the block of hindsight" in said and "--allow-hindsight" in said
    card = filled(capsys, DATA, *data, "--private", "--hindsight", "--allow-hindsight")
    assert "Built with `hindsight=True`. **The prompts name the teacher's outcomes, and so the answers.**" in card.text


def test_the_audit_finds_a_leak_in_words_it_does_not_know(data, monkeypatch):
    original = RECORDS["per_candidate"]

    def leaky(entry, options):
        for record in original(entry, options):
            record["messages"][1]["content"] += f" Psst: {record['label']}"
            yield record

    monkeypatch.setitem(RECORDS, "per_candidate", leaky)
    assert "per_candidate prompts change when labels" in error_of(DATA, *data, "--private", "--dry-run")


def test_a_loading_script_in_the_repo_is_named_for_it_would_be_run_in_place_of_the_parquet(hub, push, refused, data):
    push(DATA, *data, "--private")
    hub.put(DATA, {"data.py": b"import datasets"})
    assert "holds a loading script, data.py" in refused(DATA, *data, "--private", "--splits", "train")


# A config of another shape: what is shared is what RECORDS holds, whatever its fields.

PAIRS = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import datasets
import covered_call_candidates as script

def pairs(logged, options):
    [record] = script.ranking_records(logged, options)
    if record["label"] != "NO_TRADE":
        system, user, _ = record["messages"]
        if sys.argv[1] == "leaky":
            user = user | {{"content": user["content"] + record["label"]}}
        names = {{"decision_id": record["decision_id"]}}
        yield names | {{"prompt": [system, user], "chosen": record["label"], "rejected": "NO_TRADE"}}

text = datasets.Value("string")
chat = [{{"role": text, "content": text}}]
script.RECORDS["pairs"] = pairs
script.FEATURES["pairs"] = {{"decision_id": text, "prompt": chat, "chosen": text, "rejected": text}}
script.CoveredCallCandidates.BUILDER_CONFIGS.append(script.CoveredCallCandidatesConfig(name="pairs"))
import publish
publish.main(sys.argv[2:])
"""


def test_a_config_without_messages_or_labels_is_shared_like_the_others(data, tmp_path):
    done = run(["-c", PAIRS, "honest", "--to", tmp_path / "out", *data, "pairs"], {"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert done.returncode == 0, done.stderr
    pairs = load_dataset(str(tmp_path / "out"), "pairs", cache_dir=str(tmp_path / "arrow"))
    assert pairs["train"].column_names == ["decision_id", "prompt", "chosen", "rejected"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert re.search(rf"\| `pairs` \| train \| n/a \| {len(pairs['train'])} \| {len(pairs['train'])} \| n/a \|", text)


def test_a_leak_in_a_config_without_messages_is_found(data, tmp_path):
    done = run(["-c", PAIRS, "leaky", "--to", tmp_path / "out", *data, "pairs"], {"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert done.returncode == 1 and "pairs prompts change when labels" in done.stderr


# Errors


def test_without_a_token_it_says_how_to_get_one_before_any_work(hub, refused, data):
    said = refused(DATA, *data, "--private", token=None)
    assert "there is no token here" in said and "hf auth login" in said and "HF_TOKEN" in said
    assert hub.repos == {}


def test_the_command_ends_with_status_1_and_one_line_of_error(hub, data, tmp_path):
    done = run([PUBLISH, DATA, *data, "--private"], hub.environment(tmp_path / "hf_home", "hf_wrong"), tmp_path)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: the Hub does not accept your token.")


def test_a_token_that_the_hub_does_not_accept_is_named(refused, data):
    assert "does not accept your token" in refused(DATA, *data, "--private", token="hf_wrong")


@pytest.mark.parametrize("token", [READER, STRANGER])
def test_no_right_to_write_is_an_error_and_changes_nothing(hub, push, refused, data, token):
    assert "no right to write to user/data" in refused(DATA, *data, "--public", token=token)
    assert hub.repos == {}
    push(DATA, *data, "--public")
    assert "no right to write to user/data" in refused(DATA, *data, "--public", "--splits", "train", token=token)
    assert len(hub.commits(DATA)) == 1


def test_a_name_that_a_model_has_is_said_to_be_taken(hub, refused, data):
    hub.repos[DATA] = type("Model", (), {"kind": "model", "private": False})()
    assert "the name user/data is taken on the Hub by a repo of another type" in refused(DATA, *data, "--private")


def test_offline_is_said(refused, data):
    assert "HF_HUB_OFFLINE is set" in refused(DATA, *data, "--private", HF_HUB_OFFLINE="1")


def test_a_hub_that_cannot_be_reached_is_named(refused, data):
    said = refused(DATA, *data, "--private", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the connection to http://127.0.0.1:9 failed" in said


def test_a_commit_by_somebody_else_meanwhile_is_not_overwritten(hub, push, refused, data):
    push(DATA, *data, "--private")

    def meanwhile(method, path):
        if "/commit/" in path:
            hub.put(DATA, {"theirs.txt": b"theirs"})

    hub.interfere = meanwhile
    assert "was changed by somebody else meanwhile" in refused(DATA, *data, "--private", "--splits", "train")
    assert len(hub.commits(DATA)) == 2 and "per_candidate/test-00000-of-00001.parquet" in hub.files(DATA)


@pytest.mark.parametrize("place", ["/lfs/", "/commit/"])
def test_a_connection_that_breaks_midway_leaves_the_repo_as_it_was_and_the_same_command_mends_it(
    hub, push, refused, compare, data, csv_file, place
):
    push(DATA, *data, "--private", "--splits", "train")
    before = hub.files(DATA)
    hub.interfere = lambda method, path: BREAK if place in path else None
    said = refused(DATA, *data, "--private")
    assert "Nothing was changed in user/data." in said and "The same command" in said
    assert hub.files(DATA) == before
    hub.interfere = lambda method, path: None
    push(DATA, *data, "--private")
    assert len(hub.commits(DATA)) == 2
    assert compare(DATA, csv_file) > 0


def test_a_commit_whose_answer_is_lost_is_not_said_to_have_failed_whole(hub, push, refused, data):
    hub.interfere = lambda method, path: LOSE if "/commit/" in path else None
    said = refused(DATA, *data, "--private")
    assert "user/data is now at" in said and "Nothing was changed" not in said
    hub.interfere = lambda method, path: None
    assert "nothing to push" in push(DATA, *data, "--private")


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "say where to: USER/NAME, or --to DIR"),
        (["data"], "give it with its owner"),
        (["a/b/c"], "Repo id must"),
        ([DATA, "--report", "x.json"], "--report goes with --adapter"),
        ([DATA, "--adapter", "out", "--configs", "per_candidate"], "--configs does not go with --adapter"),
        (["--adapter", "out"], "say where to: USER/NAME"),
        ([DATA, "--configs", "per_day"], "invalid choice: 'per_day'"),
    ],
)
def test_a_command_that_means_nothing_is_a_usage_error(words, said, capsys):
    assert error_of(*words) == "2"
    assert said in capsys.readouterr().err


def test_a_shard_size_that_is_none_is_an_error(data):
    assert "--max_shard_size huge" in error_of(DATA, *data, "--private", "--dry-run", "--max_shard_size", "huge")


def test_the_help_is_in_groups_and_says_units_and_defaults(capsys):
    assert error_of("--help") == "0"
    printed = " ".join(capsys.readouterr().out.split())
    for title in ("where to:", "datasets:", "data:", "splits:", "outcomes and costs:", "a tuned model:"):
        assert title in printed
    for text in ("default: 500MB", "default: dataset_card.md", "default: report/metrics.json", "default: main"):
        assert text in printed
    assert "made if it is missing; default: main" in printed and "of a Parquet file, in memory" in printed


def test_the_help_has_examples(capsys):
    assert error_of("--help") == "0"
    printed = capsys.readouterr().out
    assert "python publish.py USER/NAME --dry-run" in printed and "--adapter out/ranking" in printed


# A tuned adapter

MANIFEST = {
    "finished": "2026-11-21T00:00:00+00:00",
    "prompt_version": PROMPT_VERSION,
    "task": "per_decision_ranking",
    "base_model": "microsoft/Phi-3-mini-4k-instruct",
    "base_revision": "f39ac1d28e925b323eae81227eaba4464caced4e",
    "quantization": "int4",
    "adapter": True,
    "recipe": {"model_name_or_path": "microsoft/Phi-3-mini-4k-instruct", "data_files": None},
    "splits": {"train": {"to": "2024-07-08T00:00:00+00:00"}},
    "tuned_on": {"underlyings": ["BTC"], "exit_styles": ["tp_and_roll"], "numbers": {}},
}
MODEL_CARD = """\
---
base_model: microsoft/Phi-3-mini-4k-instruct
library_name: peft
---

# ranking

Use it:

<!-- loading -->
here
<!-- /loading -->

Limits: it copies a rule.
"""


def describe(folder: Path, **changes) -> None:
    """Writes the manifest, with the hashes of the files that are there."""
    saved = [
        path for path in folder.glob("*") if re.search("^(adapter_|model|tokenizer)", path.name) and path.is_file()
    ]
    files = {path.name: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in saved}
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | {"files": files} | changes))


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder as train_sft.py leaves it."""
    folder = tmp_path / "ranking"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "runs").mkdir()
    names = ("adapter_model.safetensors", "checkpoint-5/optimizer.pt", "runs/events", "x.tmp")
    for name in names:
        (folder / name).write_bytes(name.encode())
    (folder / "adapter_config.json").write_text(json.dumps({"r": 16}))
    describe(folder)
    (folder / "README.md").write_text(MODEL_CARD)
    return folder


@pytest.fixture
def report(adapter, tmp_path) -> Path:
    """A metrics.json as evaluate_policy.py writes it."""

    def row(accuracy: float) -> dict:
        found = {name: {"value": 0.5, "low": 0.5, "high": 0.5, "interval": None} for name in metrics.METRICS}
        low = {"value": accuracy, "low": accuracy, "high": accuracy, "interval": [0.1, 0.9]}
        return found | {"accuracy": low, "mean_pnl": {"value": None, "low": None, "high": None, "interval": None}}

    rows = {"model": 0.802, "score rule": 1, "teacher": 1, "never sell (HODL)": 0.1, "random": 0}
    rows = {name: row(accuracy) for name, accuracy in rows.items()}
    group = {"exit_style": "hold_to_expiry", "group": "all", "decisions": 253}
    group |= {"from": "2025-03-29T00:00:00+00:00", "to": "2025-12-06T00:00:00+00:00"}
    found = {
        "metrics_version": metrics.VERSION,
        "model": str(adapter),
        "split": "test",
        "best_rule": "score rule",
        "notes": ["Computed against recorded."],
        "groups": [group | {"rows": rows}, group | {"group": "2025", "rows": rows}],
    }
    path = tmp_path / "report" / "metrics.json"
    path.parent.mkdir()
    path.write_text(json.dumps(found))
    return path


def test_an_adapter_is_pushed_in_one_commit_privately_without_checkpoints_and_logs(hub, push, adapter):
    push("--adapter", adapter, "user/ranking")
    repo = hub.repos["user/ranking"]
    assert repo.kind == "model" and repo.private and len(hub.commits("user/ranking")) == 1
    assert list(hub.files("user/ranking")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    assert "nothing to push" in push("--adapter", adapter, "user/ranking")
    # Weights of another kind would be loaded beside, or in place of, these; what is not ours stays.
    hub.put("user/ranking", {"model.safetensors": b"old", "mine.txt": b"mine"})
    push("--adapter", adapter, "user/ranking")
    assert "model.safetensors" not in hub.files("user/ranking") and "mine.txt" in hub.files("user/ranking")
    assert len(hub.commits("user/ranking")) == 3


def test_the_card_of_an_adapter_names_its_base_its_data_its_metrics_and_its_limits(adapter, report, capsys):
    options = ["--data_repo", DATA, "--report", report]
    card = filled(capsys, "--adapter", adapter, "user/ranking", *options, kind=ModelCard)
    assert card.data.base_model == MANIFEST["base_model"] and card.data.datasets == [DATA]
    assert 'Policy.load(snapshot_download("user/ranking"))' in card.text and "\nhere\n" not in card.text
    assert "Limits: it copies a rule." in card.text
    assert "**hold_to_expiry**: 253 decisions, 2025-03-29 to 2025-12-06" in card.text
    assert re.search(r"\| model \| 0\.802 \[0\.100, 0\.900\] \| 0\.500 \| .* n/a \|", card.text)
    assert card.text.count("| score rule |") == 1 and "| random |" not in card.text
    assert "- Computed against recorded." in card.text


def test_a_report_of_another_model_is_not_put_on_the_card(adapter, report, capsys, monkeypatch, tmp_path):
    report.write_text(report.read_text().replace(str(adapter), "out/other"))
    assert "is of out/other" in error_of("--adapter", adapter, "user/m", "--report", report, "--dry-run")
    monkeypatch.chdir(tmp_path)  # where report/metrics.json is found without being named
    local("--adapter", adapter, "user/m", "--dry-run")
    printed = capsys.readouterr().out
    assert "is not of" in printed and "## Evaluation" not in printed


@pytest.mark.parametrize(
    "change, said", [({"finished": None}, "has not finished"), ({"prompt_version": "0"}, "prompts of version 0")]
)
def test_an_adapter_that_nobody_could_use_is_not_shared(adapter, change, said):
    describe(adapter, **change)
    assert said in error_of("--adapter", adapter, "user/ranking", "--dry-run")


def test_a_folder_that_is_no_adapter_is_an_error(tmp_path):
    assert "no folder that train_sft.py saved" in error_of("--adapter", tmp_path, "user/ranking", "--dry-run")


def test_what_lies_in_the_folder_and_training_did_not_save_is_not_pushed_and_named(hub, push, adapter):
    (adapter / "id_rsa").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    (adapter / "notes").mkdir()
    (adapter / "notes" / "idea.md").write_text("mine")
    (adapter / "link.json").symlink_to(adapter.parent / "elsewhere.json")
    (adapter / "model.safetensors").write_bytes(b"of another run")  # has a good name, and no hash in the manifest
    (adapter / "training_args.bin").write_bytes(b"a pickle")
    os.mkfifo(adapter / "pipe")  # whoever opens it waits for ever
    printed = push("--adapter", adapter, "user/ranking")
    pushed = ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert list(hub.files("user/ranking")) == pushed
    left_out = "checkpoint-5/, id_rsa, link.json, model.safetensors, notes/, pipe, runs/, training_args.bin, x.tmp"
    assert f"Not shared, for training did not save it to be loaded: {left_out}" in printed


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors", "recipe.yaml"])
def test_a_link_in_the_place_of_a_file_is_refused_by_its_name(hub, refused, adapter, name):
    (adapter / "recipe.yaml").write_text("seed: 0")
    (adapter / name).rename(adapter.parent / "secret")
    (adapter / name).symlink_to(adapter.parent / "secret")
    assert f"{adapter / name} is a link" in refused("--adapter", adapter, "user/ranking")
    assert hub.repos == {}


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_opened(refused, adapter):
    os.mkfifo(adapter / "training.png")
    assert f"{adapter / 'training.png'} is no regular file" in refused("--adapter", adapter, "user/ranking")


def test_a_file_that_is_not_the_one_that_was_saved_is_not_shared(hub, refused, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"swapped")
    assert "adapter_model.safetensors is not the file that was saved" in refused("--adapter", adapter, "user/ranking")
    assert hub.repos == {}


def of_this_machine(adapter: Path) -> dict:
    """What is pushed of an adapter whose every file says where things lie here."""
    base = adapter.parent / "models" / "tiny-phi3"
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 16}))
    (adapter / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(base), "eos_token": "</s>"}))
    recipe = {
        "model_name_or_path": "models/tiny-phi3",
        "data_files": [str(adapter.parent / "runs" / "a.csv"), "runs/*.csv"],
        "data_dir": "../elsewhere/csvs",
        "output_dir": str(adapter),
        "logging_dir": f"out/runs/Nov21_{socket.gethostname()}",
        "resume_from_checkpoint": "~/old/checkpoint-5",
        "learning_rate": 0.002,
        "chat": "a / b",
    }
    start = {"adapter": "out/tiny_ranking", "recipe": {"data_files": str(Path.home() / "x" / "b.csv")}}
    describe(adapter, base_model=str(base), base_revision="sha256:" + "ab" * 32, recipe=recipe, start=start)
    (adapter / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (adapter / "README.md").write_text(
        f"{MODEL_CARD}\nTuned from `{base}` on {adapter.parent}/runs/a.csv, `{Path.home()}/notes.txt`, "
        "/mnt/disk/b.csv and /home/her/c.csv; 1/2 of https://x.org/a/b, SELL/SKIP.\n"
    )
    return recipe


def test_no_byte_that_is_pushed_says_where_things_lie_on_this_machine(hub, push, adapter):
    of_this_machine(adapter)
    before = {path: (adapter / path).read_bytes() for path in files(adapter)}
    push("--adapter", adapter, "user/ranking")
    pushed = hub.files("user/ranking")
    private = (str(adapter.parent), str(Path.home()), WRITER, socket.gethostname(), "models/", "runs/", "out/", "../")
    for path, content in pushed.items():
        assert not [text for text in private if text.encode() in content], path
    recipe = yaml.safe_load(pushed["recipe.yaml"])
    assert recipe["model_name_or_path"] == "tiny-phi3" and recipe["data_files"] == ["a.csv", "*.csv"]
    assert recipe["data_dir"] == "csvs" and recipe["resume_from_checkpoint"] == "checkpoint-5"
    assert recipe["learning_rate"] == 0.002 and recipe["chat"] == "a / b" and "logging_dir" not in recipe
    manifest = json.loads(pushed["manifest.json"])
    assert manifest["base_model"] == "tiny-phi3" and manifest["base_revision"] == "sha256:" + "ab" * 32
    assert manifest["start"] == {"adapter": "tiny_ranking", "recipe": {"data_files": "b.csv"}}
    said = "Tuned from `tiny-phi3` on a.csv, `notes.txt`, b.csv and c.csv; 1/2 of https://x.org/a/b, SELL/SKIP."
    assert said in pushed["README.md"].decode()
    # The hashes are those of the pushed files, so that they can be trusted too; and nothing was changed here.
    assert manifest["files"].keys() == {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"}
    for name, digest in manifest["files"].items():
        assert digest == f"sha256:{hashlib.sha256(pushed[name]).hexdigest()}"
    assert {path: (adapter / path).read_bytes() for path in files(adapter)} == before


def test_a_name_on_the_hub_is_no_path(hub, push, adapter):
    push("--adapter", adapter, "user/ranking")
    manifest = json.loads(hub.files("user/ranking")["manifest.json"])
    assert manifest == json.loads((adapter / "manifest.json").read_text())
    assert hub.files("user/ranking")["adapter_config.json"] == (adapter / "adapter_config.json").read_bytes()


def test_a_path_that_no_name_can_stand_for_is_refused(hub, refused, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b'{"__metadata__":{"from":"%s/x"}}' % bytes(Path.home()))
    describe(adapter)
    said = refused("--adapter", adapter, "user/ranking")
    assert f"adapter_model.safetensors holds a path of this machine, {Path.home()}/x" in said and hub.repos == {}


LIKE_A_TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.mark.parametrize(
    "name, content",
    [
        ("manifest.json", json.dumps({"recipe": {"hub_token": "anything"}})),
        ("recipe.yaml", "training:\n- hub_token: anything\n"),
        ("recipe.yaml", f"comment: see {LIKE_A_TOKEN}\n"),
        ("README.md", f"{MODEL_CARD}\nLog in with {WRITER}.\n"),
        ("adapter_model.safetensors", "x" * (2**20 - 10) + LIKE_A_TOKEN),
    ],
)
def test_nothing_with_a_token_in_it_is_pushed_and_the_message_does_not_show_it(hub, refused, adapter, name, content):
    (adapter / name).write_text(content)
    describe(adapter, **(json.loads(content) if name == "manifest.json" else {}))
    said = refused("--adapter", adapter, "user/ranking")
    assert name in said and "https://huggingface.co/settings/tokens" in said
    assert hub.repos == {} and not any(secret in said for secret in (LIKE_A_TOKEN, WRITER, "anything"))


def test_a_token_in_the_card_of_the_data_is_not_pushed(hub, refused, data, card):
    Path(card).write_text(f"{CARD}\nDownload with {LIKE_A_TOKEN}.\n")
    assert "README.md holds what looks like a token" in refused(DATA, *data, "--private", "--splits", "train")
    assert hub.repos == {}


def test_the_card_of_a_branch_says_where_the_model_lies(hub, push, adapter):
    push("--adapter", adapter, "user/ranking", "--revision", "v2")
    card = hub.files("user/ranking", "v2")["README.md"].decode()
    assert 'Policy.load(snapshot_download("user/ranking", revision="v2"))' in card


# A Hub that is silent, slow or makes no sense; tests/attack/hub.py tries many more


@pytest.fixture
def hasty(monkeypatch):
    for name, seconds in {"SILENCE": 0.5, "ANSWER": 1.5, "ASKING": 4}.items():
        monkeypatch.setattr(publish_hub, name, seconds)


@pytest.mark.parametrize(
    "how, place",
    [(HANG, place) for place in ("whoami", "/api/models/user/ranking", "/tree/", "/lfs/", "/commit/")]
    + [(TRICKLE, "/commit/"), (DRIP, "/tree/")],
)
def test_a_hub_that_connects_and_never_answers_is_given_up(hub, refused, adapter, hasty, how, place):
    hub.interfere = lambda method, path: how if place in path else None
    began = time.monotonic()
    said = refused("--adapter", adapter, "user/ranking")
    assert "the connection to" in said and "Check the network and run this again" in said
    assert time.monotonic() - began < 20


def test_a_listing_without_end_is_given_up(hub, refused, adapter, hasty):
    endless = Answer(b"[]", headers={"Link": '<{url}>; rel="next"'})
    hub.interfere = lambda method, path: endless if "/tree/" in path else None
    assert "have taken too long" in refused("--adapter", adapter, "user/ranking")


def test_a_hub_that_asks_to_wait_for_an_hour_is_not_waited_for(hub, refused, adapter):
    busy = Answer(status=429, headers={"Retry-After": "3600"})
    hub.interfere = lambda method, path: busy if path.startswith("/lfs/") else None
    said = refused("--adapter", adapter, "user/ranking")
    assert "it answers 429 and wants 3,600 s of rest" in said and "Nothing was changed" in said


def test_a_long_upload_that_breaks_is_tried_again_and_one_that_keeps_breaking_is_not():
    patience, now = publish_hub.Patience(), time.monotonic()
    patience.failed(now - 5000, "it broke")
    patience.failing_since -= publish_hub.PATIENCE
    with pytest.raises(publish_hub.GaveUp, match="it broke, and trying again did not help"):
        patience.failed(now, "it broke")
    with pytest.raises(publish_hub.GaveUp):  # the other uploads of the same push too, at once
        patience.check()


def test_uploads_go_through_the_client_that_has_deadlines():
    assert is_xet_available()  # it has an upload client of its own
    with publish_hub.deadlines():
        assert not is_xet_available() and isinstance(get_session(), publish_hub.HubClient)
    assert is_xet_available() and not isinstance(get_session(), publish_hub.HubClient)


def test_a_fault_that_passes_is_waited_for(hub, push, adapter):
    faults = iter([503, BREAK])
    hub.interfere = lambda method, path: next(faults, None) if path.startswith("/lfs/") else None
    push("--adapter", adapter, "user/ranking", patience=30)
    assert len(hub.commits("user/ranking")) == 1


@pytest.mark.parametrize("place", ["/commit/", "/preupload/"])
def test_a_commit_that_the_hub_only_says_it_took_is_no_success(hub, refused, adapter, place):
    leave_out = Changed(lambda content: content.replace(b'"shouldIgnore": false', b'"shouldIgnore": true'))
    hub.interfere = lambda method, path: (PRETEND if place == "/commit/" else leave_out) if place in path else None
    said = refused("--adapter", adapter, "user/ranking")
    assert "cannot be read back" in said or "would leave README.md out of the commit" in said
    assert hub.files("user/ranking") == {}


def test_what_a_server_says_is_shown_clipped_without_escapes_and_tokens(hub, refused, adapter):
    words = f"\x1b[31mBearer {WRITER} {LIKE_A_TOKEN} " + "x" * 5000
    hub.interfere = lambda method, path: Answer(json.dumps({"error": words}).encode(), 400)
    said = refused("--adapter", adapter, "user/ranking")
    assert "\\x1b[31mBearer hf_*** hf_*** xxx" in said and len(said) < 1000


def test_a_slice_of_the_campaign_of_faults_finds_nothing():
    found = []
    assert attack_hub.run(15, 0, found.append) == {"tried": 15, "handled": 15, "unclear": 0, "wrong": 0}, found


def test_the_campaign_sees_what_it_looks_for(monkeypatch):
    """With what mends them undone, faults are found: a success that is none, and a traceback."""
    monkeypatch.setattr(publish_hub, "check_arrived", lambda *_: None)
    monkeypatch.setattr(publish_hub, "HUB_ERRORS", (publish_hub.GaveUp,))
    found = []
    monkeypatch.setattr(attack_hub, "PLACES", {"commit": attack_hub.PLACES["commit"]})
    monkeypatch.setattr(attack_hub, "KINDS", {name: attack_hub.KINDS[name] for name in (PRETEND, BREAK)})
    attack_hub.run(4, 0, found.append)
    assert any("wrong" in line for line in found), found


# The stand-in itself: a wrong client must fail


def ask(hub, method: str, path: str, body: bytes = b"", **headers) -> int:
    request = urllib.request.Request(hub.endpoint + path, body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def test_the_stand_in_refuses_a_wrong_hash_a_wrong_parent_and_a_wrong_token(hub, push, data):
    push(DATA, *data, "--private")
    login = {"Authorization": f"Bearer {WRITER}"}
    oid = hashlib.sha256(b"right").hexdigest()
    batch = {"operation": "upload", "hash_algo": "sha256", "transfers": ["basic"]}
    batch = json.dumps(batch | {"objects": [{"oid": oid, "size": 5}]}).encode()
    assert ask(hub, "POST", "/datasets/user/data.git/info/lfs/objects/batch", batch, **login) == 200
    assert ask(hub, "PUT", f"/lfs/{oid}", b"wrong") == 400
    large = {"key": "lfsFile", "value": {"path": "x.parquet", "oid": oid, "size": 5}}
    for parent, status in (("0" * 40, 412), (hub.repos[DATA].branches["main"][-1].sha, 400)):
        lines = [{"key": "header", "value": {"summary": "x", "parentCommit": parent}}, large]
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        assert ask(hub, "POST", "/api/datasets/user/data/commit/main", body, **login) == status
        assert ask(hub, "POST", "/api/datasets/user/data/commit/main", body, Authorization="Bearer hf_wrong") == 401
    assert ask(hub, "GET", "/datasets/user/data/resolve/main/README.md") == 401
    assert ask(hub, "GET", "/datasets/user/data/resolve/main/README.md", Range="bytes=0-3", **login) == 206
    assert len(hub.commits(DATA)) == 1


# The real files


@needs_real_data
def test_the_real_files_load_from_a_folder_as_the_rows_of_the_script(card, compare, tmp_path, capsys):
    real = str(REAL_DATA / "training_candidates_*.csv")
    local("--to", tmp_path / "out", "--data_files", real, "--card", card)
    rows = compare(tmp_path / "out", real, EVERY)
    counted = re.findall(r"parquet +([\d,]+) +[\d,]+$", capsys.readouterr().out, re.MULTILINE)
    assert rows == sum(int(count.replace(",", "")) for count in counted) > 1000
