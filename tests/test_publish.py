"""Sharing: against a Hub on 127.0.0.1 that keeps real files, with the real client, in processes of their own."""

import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pyarrow.parquet as pq
import pytest
from conftest import REAL_DATA, SCRIPT, decision, load_candidates, needs_real_data, no_candidates, write_csv
from datasets import load_dataset
from hub_standin import BREAK, LOSE, READER, STRANGER, WRITER, Hub
from huggingface_hub import DatasetCard, ModelCard

import metrics
import publish
from covered_call_candidates import CHATS, PROMPT_VERSION, RECORDS

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
def push(hub, tmp_path):
    """publish.py against the stand-in: returns what it printed, after checking that it succeeded."""

    def pushed(*words, token=WRITER, **environment) -> str:
        done = run([PUBLISH, *words], hub.environment(tmp_path / "hf_home", token) | environment, tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return pushed


@pytest.fixture
def refused(hub, tmp_path):
    """publish.py against the stand-in, where it must fail: returns the one line that says why."""

    def refusal(*words, token=WRITER, **environment) -> str:
        done = run([PUBLISH, *words], hub.environment(tmp_path / "hf_home", token) | environment, tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ")
        return last

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


def test_a_build_that_fails_leaves_the_folder_as_it_was(data, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    local("--to", folder, *data)
    before = {path: (folder / path).read_bytes() for path in files(folder)}
    monkeypatch.setattr(publish, "describe_data", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        local("--to", folder, *data, "--configs", "per_candidate")
    assert {path: (folder / path).read_bytes() for path in files(folder)} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".publish_")]


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


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder as train_sft.py leaves it."""
    folder = tmp_path / "ranking"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "runs").mkdir()
    names = ("adapter_model.safetensors", "adapter_config.json", "checkpoint-5/optimizer.pt", "runs/events", "x.tmp")
    for name in names:
        (folder / name).write_bytes(name.encode())
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
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
    (adapter / "manifest.json").write_text(json.dumps(MANIFEST | change))
    assert said in error_of("--adapter", adapter, "user/ranking", "--dry-run")


def test_a_folder_that_is_no_adapter_is_an_error(tmp_path):
    assert "no folder that train_sft.py saved" in error_of("--adapter", tmp_path, "user/ranking", "--dry-run")


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
