"""A tuned model: what training saved and nothing else, its card, and no word of where things lie on this machine."""

import hashlib
import json
import os
import re
import socket
from pathlib import Path

import pytest
import yaml
from conftest import on_the_default_stack
from hub_standin import WRITER
from huggingface_hub import ModelCard

from covered_call.evaluation import metrics

from .conftest import DATA, LIKE_A_TOKEN, MANIFEST, MODEL_CARD, describe, error_of, files, filled, local

pytestmark = on_the_default_stack


@pytest.fixture
def report(adapter, tmp_path) -> Path:
    """A metrics.json as the verb evaluate writes it."""

    def row(accuracy: float) -> dict:
        found = {name: {"value": 0.5, "low": 0.5, "high": 0.5, "interval": None} for name in metrics.METRICS}
        low = {"value": accuracy, "low": accuracy, "high": accuracy, "interval": [0.1, 0.9]}
        return found | {"accuracy": low, "mean_pnl": {"value": None, "low": None, "high": None, "interval": None}}

    rows = {"model": 0.802, "score rule": 1, "teacher": 1, "never sell (HODL)": 0.1, "random": 0}
    rows = {name: row(accuracy) for name, accuracy in rows.items()}
    group = {"underlying": "BTC", "exit_style": "hold_to_expiry", "group": "all", "decisions": 253}
    group |= {"from": "2025-03-29T00:00:00+00:00", "to": "2025-12-06T00:00:00+00:00"}
    found = {
        "metrics_version": metrics.VERSION,
        "model": str(adapter),
        "split": "test",
        "best_rule": "score rule",
        "verdict": {"BTC, hold_to_expiry": ["The model falls short of the teacher: not shown."]},
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
        "requirements.txt",
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
    assert "**BTC, hold_to_expiry**: 253 decisions, 2025-03-29 to 2025-12-06" in card.text
    assert "- The model falls short of the teacher: not shown." in card.text
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
    assert "no folder that covered-call train saved" in error_of("--adapter", tmp_path, "user/ranking", "--dry-run")


def test_what_lies_in_the_folder_and_training_did_not_save_is_not_pushed_and_named(hub, push, adapter):
    (adapter / "id_rsa").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    (adapter / "notes").mkdir()
    (adapter / "notes" / "idea.md").write_text("mine")
    (adapter / "link.json").symlink_to(adapter.parent / "elsewhere.json")
    (adapter / "model.safetensors").write_bytes(b"of another run")  # has a good name, and no hash in the manifest
    (adapter / "training_args.bin").write_bytes(b"a pickle")
    os.mkfifo(adapter / "pipe")  # whoever opens it waits for ever
    printed = push("--adapter", adapter, "user/ranking")
    pushed = ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "requirements.txt"]
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
        "iv_file": "vols/dvol_{underlying}.csv",
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
    private = (
        str(adapter.parent),
        str(Path.home()),
        WRITER,
        socket.gethostname(),
        "models/",
        "runs/",
        "vols/",
        "out/",
        "../",
    )
    for path, content in pushed.items():
        assert not [text for text in private if text.encode() in content], path
    recipe = yaml.safe_load(pushed["recipe.yaml"])
    assert recipe["model_name_or_path"] == "tiny-phi3" and recipe["data_files"] == ["a.csv", "*.csv"]
    assert recipe["iv_file"] == "dvol_{underlying}.csv"
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


def test_the_card_of_a_branch_says_where_the_model_lies(hub, push, adapter):
    push("--adapter", adapter, "user/ranking", "--revision", "v2")
    card = hub.files("user/ranking", "v2")["README.md"].decode()
    assert 'Policy.load(snapshot_download("user/ranking", revision="v2"))' in card
