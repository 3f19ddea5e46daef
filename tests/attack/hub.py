"""Faults of a Hub against the verb publish: it must end with a repo that is whole and a success, or as it was and one
error.

A fault is a kind (silence, nonsense, refusals, lies) at a place (a request that publishing makes), once or always,
while datasets or a model are pushed to a repo that is new, older or the same. Each is drawn from the seed and its
number alone. Time limits are a few seconds here, and nothing else of publishing is changed.
"""

import contextlib
import copy
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from conftest import decision, no_candidates, write_csv
from hub_standin import BREAK, DRIP, HANG, LOSE, PRETEND, TRICKLE, WRITER, Answer, Changed, Hub
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, logging

from covered_call.candidates.prompts import PROMPT_VERSION
from covered_call.publishing import hub as publish_hub
from covered_call.publishing import publish
from covered_call.publishing.dataset import build

HANDLED, UNCLEAR, WRONG = "handled", "unclear", "wrong"
LIMITS = {"SILENCE": 1, "ANSWER": 3, "PATIENCE": 1, "ASKING": 8}  # seconds
TOO_LONG = 60  # seconds: a hang
WHAT_TO_DO = re.compile(
    r"run this again|the same command|take another|take a token|check the|hf auth login|delete (that|it)"
    r"|make it private|wait a little|is HF_ENDPOINT right",
    re.IGNORECASE,
)
REPO = "user/repo"
CARD = "---\nlicense: cc-by-4.0\n---\n\n# My calls\n\nOptions.\n"

# ---------------------------------------------------------------------------------------------------------------------
# Faults

PLACES = {
    "whoami": r"GET /api/whoami-v2",
    "repo_info": rf"GET /api/\w+/{REPO}",
    "head": rf"GET /api/\w+/{REPO}/revision/.*",
    "create_repo": r"POST /api/repos/create",
    "create_branch": r"POST /api/.*/branch/.*",
    "tree": r"GET /api/.*/tree/.*",
    "yaml": r"POST /api/validate-yaml",
    "preupload": r"POST /api/.*/preupload/.*",
    "lfs_batch": r"POST /.*/info/lfs/objects/batch",
    "lfs_put": r"PUT /lfs/.*",
    "lfs_verify": r"POST /lfs-verify/.*",
    "commit": r"POST /api/.*/commit/.*",
}


def says(text: str, status: int = 403) -> Answer:
    return Answer(b"{}", status, {"X-Error-Message": text})


def page(status: int = 200, **headers) -> Answer:
    return Answer(
        b"<html><body><h1>Welcome to this hotel</h1></body></html>", status, {"Content-Type": "text/html"} | headers
    )


def to(where: str, status: int = 302) -> Answer:
    return Answer(b"", status, {"Location": where})


KINDS = {
    **{name: (lambda rng, word=name: word) for name in (BREAK, LOSE, PRETEND, HANG, TRICKLE, DRIP)},
    **{f"status {code}": (lambda rng, code=code: code) for code in (
        400, 401, 402, 403, 404, 405, 408, 409, 410, 412, 413, 416, 418, 422, 429, 500, 501, 502, 503, 504, 507, 599)},
    **{f"empty {code}": (lambda rng, code=code: Answer(b"", code)) for code in (200, 201, 204, 206, 304, 404, 500)},
    "429, rest an hour": lambda rng: Answer(b"", 429, {"Retry-After": "3600"}),
    "429, rest for ever": lambda rng: Answer(b"", 429, {"ratelimit": '"api";r=0;t=999999999'}),
    "503, rest for ever": lambda rng: Answer(b"", 503, {"Retry-After": "9" * 30}),
    "503, rest in words": lambda rng: Answer(b"", 503, {"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}),
    "a page": lambda rng: page(),
    "a page and 404": lambda rng: page(404),
    "a page and 502": lambda rng: page(502),
    "a circle": lambda rng: to("?"),
    "to nowhere": lambda rng: to("http://127.0.0.1:9/"),
    "to nothing": lambda rng: Answer(b"", 302),
    "to a file": lambda rng: to("file:///etc/passwd"),
    "moved, post again": lambda rng: to("?", 307),
    "not JSON": lambda rng: Answer(b'{"sha": '),
    "no text": lambda rng: Answer(b"\xff\xfe\x00\x80" * 20),
    "deep": lambda rng: Answer(b"[" * 200_000),
    "huge number": lambda rng: Answer(b'{"size": ' + b"9" * 6000 + b"}"),
    "not zipped": lambda rng: Answer(b"plain", 200, {"Content-Encoding": "gzip"}),
    "zipped nonsense": lambda rng: Answer(gzip.compress(b"nonsense"), 200, {"Content-Encoding": "gzip"}),
    "longer than said": lambda rng: Answer(b'{"name": "user"}', length=5),
    "shorter than said": lambda rng: Answer(b'{"name": "user"}', length=500),
    "shorter than said, done": lambda rng: Answer(b'{"name": "user"}', length=500, after=True),
    "a page, done": lambda rng: page()._replace(after=True),
    "500, done": lambda rng: Answer(b"", 500, after=True),
    "escapes": lambda rng: says("\x1b[31mred\x9b2J"),
    "100 KB": lambda rng: Answer(json.dumps({"error": "x" * 100_000}).encode(), 400),
    "the token": lambda rng: says(f"Bearer {WRITER} is wrong"),
    "pages without end": lambda rng: Answer(b"[]", 200, {"Link": '<{url}>; rel="next"'}),
    **{f"JSON {text}": (lambda rng, text=text: Answer(text.encode())) for text in (
        "null", "[]", "{}", '"text"', "42", "true", "[null]", "[{}]", '{"files": [{}]}', '{"objects": [{}]}')},
    **{f"spoilt {number}": (lambda rng: Changed(functools.partial(spoil, seed=rng.random()))) for number in range(12)},
    **{f"cut {number}": (lambda rng: Changed(functools.partial(cut, seed=rng.random()))) for number in range(2)},
}  # fmt: skip


def cut(content: bytes, seed: float) -> bytes:
    return content[: random.Random(seed).randrange(len(content))] if content else b""


def spoil(content: bytes, seed: float) -> bytes:
    """One value of the real answer is another, or gone."""
    rng = random.Random(seed)
    try:
        answer = json.loads(content)
    except ValueError:
        return content + b"?"
    slots = list(slots_of(answer))
    if not slots:
        return b'{"spoilt": true}'
    container, key = rng.choice(slots)
    if rng.random() < 0.3:
        del container[key]
    else:
        container[key] = rng.choice([other(container[key]), None, [], {}, "", -1, True, "\x1b[0m"])
    return json.dumps(answer).encode()


def slots_of(value) -> Iterator[tuple]:
    if isinstance(value, dict | list):
        for key, one in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from slots_of(one)


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return (
            hashlib.sha256(value.encode()).hexdigest()[: len(value)]
            if re.fullmatch("[0-9a-f]+", value)
            else value + "x"
        )
    return value[1:] if isinstance(value, list) else {}


# ---------------------------------------------------------------------------------------------------------------------
# What is published, and into what


class Scene(NamedTuple):
    kind: str  # data or model
    repo: str  # none, older or same
    branch: str | None


class Ended(NamedTuple):
    code: object  # None or 0, a message, or an exception that nobody caught
    printed: str
    hung: bool


class Stage:
    """A Hub, what is to be pushed, and the repos as they are before."""

    def __init__(self, folder: Path, hub: Hub):
        self.folder, self.hub = folder, hub
        rows = [row for day in range(8) for row in decision(day, sold=day % 3, dte=1.0)]
        self.csv = write_csv(folder / "candidates.csv", [*rows, no_candidates(8)])
        (folder / "card.md").write_text(CARD)
        self.adapter = write_adapter(folder / "ranking", b"weights")
        self.older = write_adapter(folder / "older" / "ranking", b"older weights")
        self.states, self.wanted = {}, {}

    def command(self, scene: Scene, older: bool = False) -> list[str]:
        branch = ["--revision", scene.branch] if scene.branch else []
        if scene.kind == "model":
            return ["--adapter", str(self.older if older else self.adapter), REPO, *branch]
        splits = ["--splits", "train"] if older else []
        files = ["--data_files", self.csv, "--card", str(self.folder / "card.md"), "--private"]
        return [REPO, *files, "--configs", "per_candidate", "per_decision_ranking", *splits, *branch]

    def set(self, scene: Scene) -> None:
        """Puts the Hub into the state before; what is wanted after it is found once, by a push without a fault."""
        begun = scene._replace(branch=None)
        if begun not in self.states:
            self.hub.repos, self.hub.objects = {}, {}
            for older in {"none": [], "older": [True], "same": [False]}[scene.repo]:
                self.must(self.command(begun, older))
            self.states[begun] = self.hub.repos, self.hub.objects
        self.back_to(begun)
        if scene not in self.wanted:
            self.must(self.command(scene))
            self.wanted[scene] = self.files(scene)
            self.back_to(begun)

    def back_to(self, begun: Scene) -> None:
        self.hub.repos, self.hub.objects = copy.deepcopy(self.states[begun])

    def must(self, command: list[str]) -> None:
        ended = perform(command)
        assert ended.code in (None, 0) and not ended.hung, ended

    def files(self, scene: Scene) -> dict | None:
        """What the branch holds; None if there is no such branch, or repo."""
        repo = self.hub.repos.get(REPO)
        branch = scene.branch or "main"
        return self.hub.files(REPO, branch) if repo and branch in repo.branches else None


def write_adapter(folder: Path, weights: bytes) -> Path:
    folder.mkdir(parents=True)
    files = {"adapter_config.json": b'{"r": 16}', "adapter_model.safetensors": weights}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = {
        "finished": "2026-11-21T00:00:00+00:00",
        "prompt_version": PROMPT_VERSION,
        "task": "per_decision_ranking",
        "base_model": "microsoft/Phi-3-mini-4k-instruct",
        "base_revision": "0" * 40,
        "quantization": "int4",
        "adapter": True,
        "recipe": {},
        "splits": {"train": {"to": "2024-07-08T00:00:00+00:00"}},
        "tuned_on": {"underlyings": ["BTC"], "exit_styles": ["tp_and_roll"], "numbers": {}},
        "files": {name: f"sha256:{hashlib.sha256(content).hexdigest()}" for name, content in files.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# ranking\n")
    return folder


def perform(command: list[str]) -> Ended:
    """The verb in a thread of its own, so that a hang is seen."""
    ended, printed = [], io.StringIO()

    def work():
        try:
            publish.main(command)
            ended.append(None)
        except SystemExit as stopped:
            ended.append(stopped.code)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work, daemon=True)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        thread.start()
        thread.join(TOO_LONG)
    return Ended(ended[0] if ended else None, printed.getvalue(), not ended)


@contextlib.contextmanager
def quick() -> Iterator[Hub]:
    """A Hub for this process, short limits, and each set of shards built once."""
    logging.set_verbosity_error()
    disable_progress_bars()
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(Hub())
        for name, seconds in LIMITS.items():
            stack.enter_context(mock.patch.object(publish_hub, name, seconds))
        stack.enter_context(mock.patch.multiple(constants, ENDPOINT=hub.endpoint, HF_HUB_OFFLINE=False))
        stack.enter_context(mock.patch.dict(os.environ, HF_TOKEN=WRITER))
        stack.enter_context(mock.patch.object(publish, "build", once(build)))
        stack.enter_context(mock.patch.object(publish, "check_leaks", lambda *_: None))
        yield hub


def once(build: Callable) -> Callable:
    kept = {}

    def built(name, backtest, folder, size):
        key = (name, repr(backtest.options))
        if key not in kept:
            one = build(name, backtest, folder, size)
            kept[key] = one, {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        one, shards = kept[key]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for shard, content in shards.items():
            (folder / name / shard).write_bytes(content)
        return one

    return built


# ---------------------------------------------------------------------------------------------------------------------
# Try, and judge


class Fault(NamedTuple):
    place: str
    kind: str
    times: int | None  # None: always
    scene: Scene


def faults(seed: int) -> Iterator[tuple[Fault, random.Random]]:
    """Every kind at every place, in an order and in scenes that the seed gives; endless."""
    rng = random.Random(seed)
    for round_ in itertools.count():
        pairs = list(itertools.product(PLACES, KINDS))
        rng.shuffle(pairs)
        for place, kind in pairs:
            repo = "none" if place == "create_repo" else rng.choice(["none", "older", "older", "same"])
            branch = "v2" if place == "create_branch" else rng.choice([None, None, "v2"])
            scene = Scene(rng.choice(["data", "model"]), repo, branch)
            yield Fault(place, kind, rng.choice([1, 1, None]), scene), random.Random(f"{seed} {round_} {place} {kind}")


def attempt(stage: Stage, fault: Fault, rng: random.Random) -> tuple[str | None, str]:
    """The verdict, and why; None if publishing never came to the place of the fault."""
    stage.set(fault.scene)
    before, main = stage.files(fault.scene), stage.files(fault.scene._replace(branch=None))
    met = itertools.count()

    def interfere(method: str, path: str):
        if not re.fullmatch(PLACES[fault.place], f"{method} {path}"):
            return None
        number = next(met)
        return KINDS[fault.kind](rng) if fault.times is None or number < fault.times else None

    stage.hub.interfere = interfere
    try:
        ended = perform(stage.command(fault.scene))
    finally:
        stage.hub.interfere = lambda method, path: None
        stage.hub.release()
    if next(met) == 0:
        return None, ""
    return judge(stage, fault.scene, ended, before, main)


def judge(stage: Stage, scene: Scene, ended: Ended, before: dict | None, main: dict | None) -> tuple[str, str]:
    after = stage.files(scene)
    said = f"{ended.printed}{ended.code}"
    if ended.hung:
        return WRONG, f"it hung for {TOO_LONG} s"
    if ended.code in (None, 0) and after != stage.wanted[scene]:
        return WRONG, f"success, and the repo is not what was to be pushed: {difference(after, stage.wanted[scene])}"
    new = [{}, main] if before is None else []  # a repo, or branch, that was made and not filled
    if after not in (before, stage.wanted[scene], *new):
        return WRONG, f"a repo that is half written: {difference(after, stage.wanted[scene])}"
    if scene.branch and main is not None and stage.files(scene._replace(branch=None)) != main:
        return WRONG, "the main branch was changed"
    if WRITER in said:
        return WRONG, "the token was printed"
    if isinstance(ended.code, BaseException):
        return UNCLEAR, "".join(traceback.format_exception_only(ended.code)).strip()
    if ended.code not in (None, 0) and not is_clear(str(ended.code)):
        return UNCLEAR, f"says {str(ended.code)[:400]!r}"
    return HANDLED, ""


def is_clear(said: str) -> bool:
    one_line = said.startswith("error: ") and said.isprintable() and len(said) < 1500
    return one_line and WHAT_TO_DO.search(said) is not None


def difference(found: dict | None, wanted: dict) -> str:
    return ", ".join(
        sorted(path for path in {**(found or {}), **wanted} if (found or {}).get(path) != wanted.get(path))
    )


def run(count: int, seed: int, report: Callable[[str], None]) -> dict[str, int]:
    """Tries ``count`` faults that publishing meets; ``report`` is told of each that was not handled."""
    totals = Counter(tried=0, handled=0, unclear=0, wrong=0)
    with tempfile.TemporaryDirectory(prefix="attack_hub_") as folder, quick() as hub:
        stage = Stage(Path(folder), hub)
        for fault, rng in faults(seed):
            if totals["tried"] == count:
                return dict(totals)
            verdict, why = attempt(stage, fault, rng)
            if verdict:
                totals.update(["tried", verdict])
            if verdict in (UNCLEAR, WRONG):
                report(f"hub: {verdict}: {fault}: {why}")
