"""The verb publish: what is pushed is what loads, on both stacks; and what it asks before it pushes."""

import os
import re
from pathlib import Path

import pytest
from conftest import REAL_DATA, load_candidates, needs_real_data, on_the_default_stack

from covered_call.candidates.records import RECORDS

from .conftest import CARD, DATA, EVERY, PUBLISH, REPO, error_of, local, run

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


PUSH_EACH = """
import sys
from covered_call import load_candidates
for name in ("per_candidate", "per_decision_ranking"):
    splits = load_candidates(name, data_files=sys.argv[1])
    splits.push_to_hub("user/data", name, private=True, set_default=name == "per_candidate")
"""


@pytest.mark.slow
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


@on_the_default_stack
@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(os.path.exists, STACKS)),
    reason=f"needs the environments of both stacks, {' and '.join(STACKS)}: make test test-current",
)
def test_what_each_stack_pushes_both_read_and_neither_would_push_again(hub, compare, data, csv_file, tmp_path):
    version = ["-c", "from importlib.metadata import version; print(version('datasets'))"]
    assert len({run(version, {}, tmp_path, stack).stdout for stack in STACKS}) == 2
    for index, (first, second) in enumerate((STACKS, STACKS[::-1])):
        repo = f"user/data{index}"
        for stack in (first, second):
            words = [*PUBLISH, repo, *data, "--private", "--configs", *RECORDS]
            done = run(words, hub.environment(tmp_path / "hf_home"), tmp_path, stack)
            assert done.returncode == 0, done.stderr
        assert len(hub.commits(repo)) == 1
        for number, stack in enumerate(STACKS):
            assert compare(repo, csv_file, EVERY, python=stack, home=f"reader_{index}_{number}") > 0


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


# The command line


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
    assert "covered-call publish USER/NAME --dry-run" in printed and "--adapter out/ranking" in printed


# The real files


@needs_real_data
def test_the_real_files_load_from_a_folder_as_the_rows_of_the_script(card, compare, tmp_path, capsys):
    real = str(REAL_DATA / "training_candidates_*.csv")
    local("--to", tmp_path / "out", "--data_files", real, "--card", card)
    rows = compare(tmp_path / "out", real, EVERY)
    counted = re.findall(r"parquet +([\d,]+) +[\d,]+$", capsys.readouterr().out, re.MULTILINE)
    assert rows == sum(int(count.replace(",", "")) for count in counted) > 1000
