"""The Hub: one commit or none, whatever it does; tests/attack/hub.py tries many more faults."""

import hashlib
import json
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest
from attack import hub as attack_hub
from hub_standin import BREAK, DRIP, HANG, LOSE, PRETEND, READER, STRANGER, TRICKLE, WRITER, Answer, Changed
from huggingface_hub import get_session
from huggingface_hub.utils._runtime import is_xet_available

from covered_call.publishing import hub as publish_hub

from .conftest import CARD, DATA, LIKE_A_TOKEN, PUBLISH, run


def test_a_card_that_the_hub_does_not_take_is_refused_before_any_upload(hub, refused, data, card):
    Path(card).write_text(CARD.replace("license: cc-by-4.0", "license: [cc-by-4.0]"))
    said = refused(DATA, *data, "--private")
    assert "license must be a string" in said and "Nothing was changed" in said
    assert not any(method == "PUT" for method, _ in hub.requests) and hub.commits(DATA) == []


def test_a_loading_script_in_the_repo_is_named_for_it_would_be_run_in_place_of_the_parquet(hub, push, refused, data):
    push(DATA, *data, "--private")
    hub.put(DATA, {"data.py": b"import datasets"})
    assert "holds a loading script, data.py" in refused(DATA, *data, "--private", "--splits", "train")


# Errors


def test_without_a_token_it_says_how_to_get_one_before_any_work(hub, refused, data):
    said = refused(DATA, *data, "--private", token=None)
    assert "there is no token here" in said and "hf auth login" in said and "HF_TOKEN" in said
    assert hub.repos == {}


def test_the_command_ends_with_status_1_and_one_line_of_error(hub, data, tmp_path):
    done = run([*PUBLISH, DATA, *data, "--private"], hub.environment(tmp_path / "hf_home", "hf_wrong"), tmp_path)
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


def test_a_token_in_the_card_of_the_data_is_not_pushed(hub, refused, data, card):
    Path(card).write_text(f"{CARD}\nDownload with {LIKE_A_TOKEN}.\n")
    assert "README.md holds what looks like a token" in refused(DATA, *data, "--private", "--splits", "train")
    assert hub.repos == {}


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


@pytest.mark.slow
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
