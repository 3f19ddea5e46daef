"""A model that leaves the house: merged, bundled, served, it answers as it did here.

What is merged was taught by heart: which of four coins a decision is of says the answer, as the adapter has it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import decision, on_the_default_stack, write_csv
from peft import LoraConfig, get_peft_model
from runtime.server import Server, completion
from safetensors import safe_open
from transformers.utils.import_utils import is_serve_available

from covered_call.__main__ import main as command
from covered_call.candidates.builder import load_candidates
from covered_call.candidates.columns import logged_of
from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import ranking_messages
from covered_call.candidates.schema import Decision
from covered_call.evaluation import metrics
from covered_call.language_model.loading import base_revision, encode, load_tokenizer
from covered_call.language_model.manifest import hash_of
from covered_call.language_model.policy import Policy
from covered_call.language_model.tiny_phi3 import random_phi3, train_tokenizer
from covered_call.publishing import merge
from covered_call.runtime.remote import UNSAID, Client, Remote
from covered_call.training.examples import tuned_on

from .conftest import MANIFEST, MODEL_CARD

pytestmark = on_the_default_stack  # torch, transformers and peft do it all
COINS = {"BTC": None, "ETH": 0, "SOL": 1, "XRP": 2}  # and what is sold of each
PROMPTS, SPLIT = 20, 18  # of which two are purged between splits


@pytest.fixture(scope="module")
def market(tmp_path_factory) -> Path:
    rows = []
    for day in range(PROMPTS):
        coin = list(COINS)[day % len(COINS)]
        rows += decision(day, sold=COINS[coin], dte=1.0, underlying=coin)
    return Path(write_csv(tmp_path_factory.mktemp("market") / "candidates.csv", rows))


@pytest.fixture(scope="module")
def asked(market) -> list[Decision]:
    read = read_decisions([str(market)], CoveredCallCandidatesConfig())
    return [entry.decision for entry in logged_of(read.columns())]


@pytest.fixture(scope="module")
def taught(market, tmp_path_factory) -> Path:
    """The folder of an adapter, as training leaves it, beside its base."""
    home = tmp_path_factory.mktemp("house")
    cache = str(tmp_path_factory.mktemp("arrow"))
    train = load_candidates("per_decision_ranking", data_files=str(market), splits="train", cache_dir=cache)["train"]
    tokenizer = train_tokenizer(message["content"] for chat in train["messages"] for message in chat)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(random_phi3(tokenizer, seed=0), lora)
    learn(model, tokenizer, encode(tokenizer, train["messages"]))
    folder = home / "ranking"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    tokenizer.save_pretrained(folder)
    model.unload().save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    recipe = {"model_name_or_path": str(home / "base"), "quantization": "int4", "data_files": [str(market)]}
    recipe["dataset_config"] = "per_decision_ranking"
    described = {
        "base_model": str(home / "base"),
        "base_revision": base_revision(str(home / "base")),
        "recipe": {**recipe, "candidate_order": None},
        "tuned_on": tuned_on(train),
        "data_files": {market.name: hash_of(market)},
        "versions": {"torch": torch.__version__},
        "script": "sha256:0",
        "files": {path.name: hash_of(path) for path in sorted(folder.iterdir())},
    }
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | described))
    (folder / "README.md").write_text(MODEL_CARD)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": str(folder)}))
    (folder / "calibration.json").write_text('{"temperature": 2.0}')
    return folder


def learn(model, tokenizer, chats: list[tuple[list[int], list[int]]]) -> None:
    """Base and adapter together, until the answers are known by heart; four prompts a step."""
    wide = max(len(prompt) + len(answer) for prompt, answer in chats)
    tokens = torch.full((len(chats), wide), tokenizer.pad_token_id)
    labels = torch.full((len(chats), wide), -100)
    for row, (prompt, answer) in enumerate(chats):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), [1.0]
    while len(losses) < 200 and max(losses[-5:]) > 0.1:
        part = slice(4 * (len(losses) % 5), 4 * (len(losses) % 5) + 4)
        seen = tokens[part] != tokenizer.pad_token_id
        loss = model(input_ids=tokens[part], attention_mask=seen, labels=labels[part]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())


@pytest.fixture(scope="module")
def merged(taught) -> Path:
    command_in_process("merge", taught)
    return Path(f"{taught}_merged")


def command_in_process(*words) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(list(map(str, words)))
    assert stopped.value.code in (0, None), stopped.value.code


def refusal(*words) -> str:
    with pytest.raises(SystemExit) as stopped:
        command(list(map(str, words)))
    return str(stopped.value.code)


def answers(folder: Path, asked: list[Decision], **options) -> list[str]:
    return [answer.answer for answer in Policy.load(folder, **options).decide(asked)]


RIGHT = [("NO_TRADE", "1", "2", "3")[day % 4] for day in range(PROMPTS)]


# --- Merged


def test_the_merged_model_answers_as_the_adapter_and_the_adapter_is_what_makes_it(taught, merged, asked):
    assert answers(taught, asked) == answers(merged, asked) == RIGHT
    manifest = json.loads((merged / "manifest.json").read_text())
    said = manifest["merged"]
    assert said["from"] == "ranking" and said["adapter"] == hash_of(taught / "adapter_model.safetensors")
    assert said["quantization"] == "int4" and said["prompts"] == said["same"] == SPLIT
    assert 0 < said["probability_moved"] < 0.1
    assert not manifest["adapter"] and manifest["quantization"] == "none"
    base = {"adapter": False, "files": {}, "quantization": "none"}
    (taught.parent / "base" / "manifest.json").write_text(json.dumps(manifest | base))
    try:
        assert answers(taught.parent / "base", asked) != RIGHT
    finally:
        (taught.parent / "base" / "manifest.json").unlink()


def test_all_that_a_server_and_the_house_need_goes_along_in_16_bits(taught, merged):
    with safe_open(merged / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    for name in ("chat_template.jinja", "tokenizer.json", "calibration.json"):
        assert (merged / name).read_bytes() == (taught / name).read_bytes()
    assert not list(merged.glob("adapter_*")) and (merged / "manifest.json").is_file()
    generation = json.loads((merged / "generation_config.json").read_text())
    end = load_tokenizer(str(merged)).convert_tokens_to_ids("<|end|>")
    assert end in generation["eos_token_id"] and generation["do_sample"] is False
    card = (merged / "README.md").read_text()
    assert "library_name: transformers" in card and f'Policy.load("{merged}")' in card
    assert "tuned on a base in int4 and merged into the one in full precision" in card
    assert f"It answers {SPLIT} of {SPLIT} prompts as the adapter does" in card


def test_nothing_is_overwritten_and_a_whole_model_is_not_merged(taught, merged):
    before = (merged / "manifest.json").read_bytes()
    assert f"{merged} is there already, and is not overwritten" in refusal("merge", taught)
    assert (merged / "manifest.json").read_bytes() == before
    assert "is no adapter but a whole model" in refusal("merge", merged, "--to", merged.parent / "again")


def test_a_model_that_answers_otherwise_is_not_written(taught, tmp_path, monkeypatch, capsys):
    real = merge.load_adapter

    def spoilt(base, folder):
        model = real(base, folder)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = -parameter.data
        return model

    monkeypatch.setattr(merge, "load_adapter", spoilt)
    said = refusal("merge", taught, "--to", tmp_path / "merged")
    assert "less than 98%, and nothing was written" in said and "--min_same SHARE" in said
    assert list(tmp_path.iterdir()) == []
    command_in_process("merge", taught, "--to", tmp_path / "merged", "--min_same", 0)
    assert json.loads((tmp_path / "merged" / "manifest.json").read_text())["merged"]["same"] < SPLIT


def test_of_a_model_of_two_tasks_the_prompts_are_of_both(monkeypatch):
    loaded = []

    class Stub:
        def __init__(self, folder, task):
            self.task = task
            loaded.append((str(folder), task))

        def score(self, decisions):
            return [[torch.zeros(2)] * (3 if self.task == "per_candidate" else 1)] * len(decisions)

    monkeypatch.setattr(merge, "Policy", SimpleNamespace(load=Stub))
    asked = {"per_decision_ranking": [None] * 140, "per_candidate": [None] * 50}
    found = merge.compare(Path("ours"), Path("its"), asked)
    assert (found.prompts, found.same, found.probability_moved) == (256, 256, 0.0)
    assert loaded == [(folder, task) for folder in ("ours", "its") for task in asked]


def test_what_fails_on_its_way_leaves_nothing(taught, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(merge, "describe", full)
    assert "No space left on device" in refusal("merge", taught, "--to", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_another_base_than_it_was_tuned_on_is_refused(taught, tmp_path):
    folder = shutil.copytree(taught, tmp_path / "ranking")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"base_revision": "sha256:0"}))
    assert "its weights have changed" in refusal("merge", folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranking"]


# --- Bundled


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty folder, in which the process is."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_bundle_unpacked_in_an_empty_folder_gives_the_answers_of_20_prompts(merged, asked, elsewhere, tmp_path):
    command_in_process("publish", "--adapter", merged, "--to", tmp_path / "shared")
    packed = shutil.make_archive(str(tmp_path / "bundle"), "gztar", tmp_path / "shared")
    shutil.rmtree(tmp_path / "shared")
    shutil.unpack_archive(packed, elsewhere)
    assert answers(Path("."), asked) == RIGHT
    assert Policy.load(".").temperature == 2.0


def test_a_bundle_of_an_adapter_gives_them_beside_its_base(taught, asked, elsewhere, tmp_path):
    command_in_process("publish", "--adapter", taught, "--to", elsewhere / "shared")
    shutil.copytree(taught.parent / "base", elsewhere / "base")
    assert answers(Path("shared"), asked) == RIGHT


def test_a_bundle_holds_all_that_reproduces_it_and_passes_its_gates_there(merged, market, elsewhere, tmp_path):
    figures = {"model": str(merged), "metrics_version": metrics.VERSION, "split": "test", "verdict": {}}
    report = tmp_path / "metrics.json"
    report.write_text(json.dumps(figures | {"groups": [], "notes": [f"of {market}"], "best_rule": "score rule"}))
    command_in_process("publish", "--adapter", merged, "--to", "shared", "--report", report)
    manifest = json.loads(Path("shared/manifest.json").read_text())
    assert manifest["data_files"] == {market.name: hash_of(market)} and manifest["script"] == "sha256:0"
    pinned = Path("shared/requirements.txt").read_text().splitlines()
    assert pinned[0].startswith(f"# Prompts of version {manifest['prompt_version']}; ") and "sha256:0" in pinned[0]
    assert pinned[1:] == [f"torch=={torch.__version__.split('+')[0]}"]
    assert json.loads(Path("shared/metrics.json").read_text())["notes"] == [f"of {market.name}"]
    assert not [path for path in Path("shared").iterdir() if str(market.parent).encode() in path.read_bytes()]
    assert "shared is there already" in refusal("publish", "--adapter", merged, "--to", "shared")
    command_in_process("verify", "shared", "--json", "gates.json")
    gates = {gate["name"]: gate["status"] for gate in json.loads(Path("gates.json").read_text())["gates"]}
    assert gates == dict.fromkeys(("run folder", "recipe", "base", "versions"), "ok") | {"data": "unknown"}


# --- Served


@pytest.fixture
def server(merged):
    """transformers serve, an OpenAI-compatible server of the merged model, on this machine alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "transformers.cli.transformers", "serve", str(merged), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, *words, "--device", "cpu", "--dtype", "float32"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process)
        yield address
    finally:
        process.kill()
        process.communicate()


def wait_for(address: str, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, process.stderr.read()[-2000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server does not answer")


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="no packages of `pip install transformers[serving]`")
def test_an_openai_compatible_server_of_it_gives_the_answers_of_policy(server, merged, asked):
    given = []
    for one in asked:
        body = {"model": str(merged), "messages": ranking_messages(one), "temperature": 0, "max_tokens": 8}
        request = urllib.request.Request(
            f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            choice = json.load(response)["choices"][0]
        assert choice["finish_reason"] == "stop"
        given.append(choice["message"]["content"])
    assert given == answers(merged, asked) == RIGHT


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="no packages of `pip install transformers[serving]`")
def test_an_agent_s_policy_openai_gets_the_picks_of_policy_from_such_a_server(server, merged, asked):
    """It gives no probabilities, so that the agent's confidence stands for none."""
    client = Client(Remote(f"{server}/v1", str(merged), logprobs=False), 60.0)
    found = [client.ask(one) for one in asked]
    expected = Policy.load(merged).decide(asked)
    assert [one.instrument for one in found] == [one.instrument for one in expected]
    assert {one.probability for one in found} == {UNSAID} and any(one.instrument for one in found)


class Serving(Server):
    """Answers with a model, and says how likely each token was, as vLLM does."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy

    @property
    def answer(self) -> str:
        body = self.requests[-1][2]
        assert (body["temperature"], body["logprobs"]) == (0, True)
        tokenizer = self.policy.tokenizer
        prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_tensors="pt",
            return_dict=True)  # fmt: skip
        made = self.policy.model.generate(**prompt, max_new_tokens=8, do_sample=False, output_scores=True,
            return_dict_in_generate=True)  # fmt: skip
        taken = made.sequences[0, prompt["input_ids"].shape[1] :]
        places = []
        for token, scores in zip(taken.tolist(), made.scores, strict=True):
            if token in tokenizer.all_special_ids:
                break
            likely = scores[0].float().softmax(-1).topk(body["top_logprobs"])
            likely = dict(zip(likely.indices.tolist(), likely.values.tolist(), strict=True))
            order = sorted(likely, key=lambda one: one != token)  # noqa: B023, the loop's own
            places.append({tokenizer.decode([one]): max(likely[one], 1e-30) for one in order})
        return completion(tokenizer.decode(taken, skip_special_tokens=True), *places)

    @answer.setter
    def answer(self, text: str) -> None:
        """What a server says that has no model."""


def test_where_a_server_says_how_likely_tokens_are_the_agent_is_as_sure_as_policy_is(merged, asked):
    """But for the temperature, which was fitted here, and what goes to answers that are none: here up to 5 %."""
    policy = Policy.load(merged)
    policy.temperature = 1.0
    with Serving(policy) as serving:
        client = Client(Remote(serving.url, "ranking"), 60.0)
        found = [client.ask(one) for one in asked]
    expected = policy.decide(asked)
    assert [one.instrument for one in found] == [one.instrument for one in expected]
    for its, own in zip(found, expected, strict=True):
        assert -1e-3 <= own.probability - its.probability <= 0.05
        assert -1e-3 <= own.margin - its.margin <= 0.1
