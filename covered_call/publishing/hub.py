"""The Hub: one commit that makes a repo hold certain files, or none; with deadlines, and errors in plain words.

Before it, a last look at every byte: no token and no path of this machine is shared.
"""

import hashlib
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory, hf_request_event_hook

from covered_call.candidates.schema import printable


class PublishError(Exception):
    """What was asked cannot be shared as it is; the message says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Deadlines: the Hub's own client has none, and lets a server say how long to wait before the next try
SILENCE = 60  # seconds without a byte, either way
ANSWER = 120  # seconds for a whole answer, besides those that sending takes
SLOWEST = 10_000  # bytes a second of an upload, on average
PATIENCE = 120  # seconds for which what fails is tried again
ASKING = 600  # seconds for all questions before and after the commit: a listing may have pages without end
TRANSIENT = (408, 429, 500, 502, 503, 504)


class GaveUp(httpx2.TransportError):
    """A deadline has passed. Not of the kinds of error after which the Hub's client tries again."""


@dataclass
class Patience:
    """What the requests of one piece of work share: until when they may go on, and since when they fail."""

    until: float = float("inf")
    failing_since: float | None = None
    given_up: GaveUp | None = None

    def give_up(self, why: str) -> None:
        self.given_up = GaveUp(why)
        raise self.given_up

    def check(self) -> None:
        if self.given_up:
            raise self.given_up
        if time.monotonic() > self.until:
            self.give_up("the questions before and after the upload have taken too long")

    def failed(self, began: float, why: str, wait: int = 0) -> None:
        """Notes a request that failed, after which the Hub wants ``wait`` seconds of rest."""
        now = time.monotonic()
        self.failing_since = self.failing_since or max(began, now - SILENCE)  # what broke late was well until then
        if now + wait - self.failing_since > PATIENCE:
            rest = f" and wants {wait:,} s of rest" if wait else ", and trying again did not help"
            self.give_up(f"{why}{rest}")

    def judge(self, began: float, answer: httpx2.Response) -> None:
        if answer.status_code in TRANSIENT:
            self.failed(began, f"it answers {answer.status_code}", wanted_rest(answer.headers))
        else:
            self.failing_since = None


def wanted_rest(headers: httpx2.Headers) -> int:
    """The seconds for which an overloaded Hub wants to be left alone."""
    limit, retry = parse_ratelimit_headers(headers), headers.get("Retry-After", "").strip()
    return max(limit.reset_in_seconds if limit else 0, int(retry) if retry.isdecimal() else 0)


class HubClient(httpx2.Client):
    """The Hub's own client, but that every request ends: with an answer, or with an error in finite time."""

    def __init__(self, patience: Patience):
        super().__init__(event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True)
        self.patience = patience

    def send(self, request: httpx2.Request, **options) -> httpx2.Response:
        self.patience.check()
        request.extensions["timeout"] = httpx2.Timeout(SILENCE).as_dict()  # some callers ask for none
        began = time.monotonic()
        try:
            answer = self.send_in_time(request, options)
        except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            self.patience.failed(began, str(error) or type(error).__name__)
            raise
        self.patience.judge(began, answer)
        return answer

    def send_in_time(self, request: httpx2.Request, options: dict) -> httpx2.Response:
        """Sends it in a thread, which is left to itself at the deadline.

        A limit on each wait would not do: names may be looked up for ever, and a byte now and then passes any limit.
        """
        done, outcome = threading.Event(), []

        def work():
            try:
                outcome.append(super(HubClient, self).send(request, **options))
            except BaseException as error:
                outcome.append(error)
            done.set()

        threading.Thread(target=work, daemon=True).start()
        limit = ANSWER + int(request.headers.get("Content-Length", 0)) / SLOWEST
        if not done.wait(limit):
            self.patience.give_up(f"no whole answer within {limit:,.0f} s")
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]


@contextmanager
def deadlines(seconds: float = float("inf")) -> Generator[None]:
    """Deadlines for all that the Hub's client asks meanwhile, ``seconds`` for all of it together."""
    patience, with_xet = Patience(time.monotonic() + seconds), constants.HF_HUB_DISABLE_XET
    set_client_factory(lambda: HubClient(patience))
    constants.HF_HUB_DISABLE_XET = True  # an upload client of its own, over which these deadlines have no power
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = with_xet
        set_client_factory(default_client_factory)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
HUB_ERRORS = (httpx2.HTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, RuntimeError, ValueError)
AGAIN = "Run this again; if it stays so, look at https://status.huggingface.co"
LONGEST_SAID = 500  # characters of what a server says


@contextmanager
def in_plain_words(repo: str) -> Generator[None]:
    """Turns what the Hub's client raises into a PublishError that says what to do: only such calls belong inside."""
    try:
        yield
    except (PublishError, KeyboardInterrupt):
        raise
    except HUB_ERRORS as error:
        raise PublishError(plain(error, repo)) from error
    except OSError:
        raise  # of a file here
    except Exception as error:  # nonsense trips the client up in ways of its own: KeyError, TypeError, ...
        raise PublishError(nonsense(error)) from error


def plain(error: BaseException, repo: str) -> str:
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # the client wraps what a thread of an upload met
    if isinstance(error, LocalTokenNotFoundError):
        return "the Hub does not know you: there is no token here. Run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub must not be asked: HF_HUB_OFFLINE is set. Unset it, or write the files with --to DIR."
    if isinstance(error, HfHubHTTPError):
        return refused(error, repo)
    if isinstance(error, httpx2.HTTPError):
        said = redact(str(error) or type(error).__name__)
        return f"the connection to {constants.ENDPOINT} failed ({said}). Check the network and run this again."
    if type(error) is ValueError and "README.md" in str(error):
        return f"{repo}: {redact(str(error))}"
    return nonsense(error)


def nonsense(error: BaseException) -> str:
    said = redact(f"{type(error).__name__}: {error}")
    return f"{constants.ENDPOINT} does not answer as the Hub does ({said}). Is HF_ENDPOINT right? {AGAIN}."


def refused(error: HfHubHTTPError, repo: str) -> str:
    said, status = redact(error.server_message or str(error)), error.response.status_code
    if status in TRANSIENT:
        return f"the Hub is overloaded, or has a fault of its own ({status}: {said}). Wait a little. {AGAIN}."
    return {
        401: "the Hub does not accept your token. Run `hf auth login --force`, or correct HF_TOKEN.",
        403: f"you have no right to write to {repo} ({said}). Take a token that may, or another name.",
        404: f"the Hub has no {repo}, or your token may not see it ({said}). Check the name and the token.",
        409: f"the name {repo} is taken on the Hub by a repo of another type, or by one that your token may not see. "
        "Take another name.",
        412: f"{repo} was changed by somebody else meanwhile, so nothing was pushed. Run this again.",
    }.get(status, f"the Hub refuses ({status}: {said}). {AGAIN}.")


def redact(said: str) -> str:
    """What a server says, on one line and in printable characters, clipped, and without tokens."""
    token = get_token()
    if token:
        said = said.replace(token, "hf_***")
    said = re.sub(r"\bhf_\w{8,}", "hf_***", " ".join(said.split()))
    return printable(said, LONGEST_SAID)


def check_login(token: str | None = None) -> str:
    """The name that the Hub knows you by; raises PublishError before any work if a push could not work."""
    with deadlines(ASKING), in_plain_words("you"):
        name = HfApi(token=token).whoami()["name"]
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
            raise TypeError("it does not say who you are")
        return name


# ---------------------------------------------------------------------------------------------------------------------
# Secrets: a token or a path of this machine goes nowhere
TOKEN = r"hf_[A-Za-z0-9]{20,}"
CHUNK, OVERLAP = 1 << 20, 1 << 12  # bytes read at a time, and of them once more with the next ones


def check_no_secrets(tree: dict[str, Path], token: str | None = None) -> None:
    """Raises PublishError if a file holds a token, or a path of this machine."""
    tokens = [re.escape(one).encode() for one in {token, get_token()} if one]
    folders = b"|".join(re.escape(folder).encode() for folder in private_folders())
    secret = re.compile(b"|".join([TOKEN.encode(), *tokens]))
    either = re.compile(b"|".join([secret.pattern, rb"(?:%s)[/\\][\w.@-]+" % folders]))
    for path, file in tree.items():
        found = next((match[0] for piece in pieces(file) for match in either.finditer(piece)), None)
        if found is None:
            continue
        if secret.fullmatch(found):
            raise PublishError(
                f"{path} holds what looks like a token of the Hub (hf_***), and would give it to every reader. Revoke "
                f"it at https://huggingface.co/settings/tokens, take it out of the file, and run this again."
            )
        raise PublishError(
            f"{path} holds a path of this machine, {found.decode(errors='replace')}: take it out of the file, and "
            "run this again."
        )


def pieces(file: Path) -> Iterator[bytes]:
    """The bytes of a file, in pieces that overlap."""
    with open(file, "rb") as opened:
        before = b""
        while chunk := opened.read(CHUNK):
            yield before + chunk
            before = chunk[-OVERLAP:]


def private_folders() -> list[str]:
    """The folders of this machine that a path in what is shared may begin with, the longest first."""
    folders = {str(one) for one in (Path.home(), Path.cwd(), tempfile.gettempdir()) if Path(one) != Path(one).parent}
    return sorted(folders, key=len, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# Push: one commit on what the repo was a moment ago, or nothing


class Target(NamedTuple):
    """Where to push: the branch is made if it is missing, None is the main one."""

    api: HfApi
    repo: str
    repo_type: str
    revision: str | None

    @property
    def place(self) -> dict:
        return {"repo_id": self.repo, "repo_type": self.repo_type}


class Addition(CommitOperationAdd):
    """A file that is known to differ from the repo's: if the Hub says that it is to be left out, the push fails.

    The client would leave it out without a word: for a .gitignore in the repo, or an answer that names a wrong hash.
    """

    def __setattr__(self, name: str, value) -> None:
        if name == "_should_ignore" and value:
            raise PublishError(
                f"the Hub would leave {self.path_in_repo} out of the commit, as a .gitignore in the repo may tell it. "
                "Delete that there, and run this again."
            )
        super().__setattr__(name, None if name == "_remote_oid" else value)


def push(
    tree: dict[str, Path],
    repo: str,
    repo_type: str,
    private: bool,
    revision: str | None,
    owned: Callable[[str], object],
    token: str | None = None,
) -> None:
    """Makes the repo hold the files of ``tree``, in one commit, or in none if it does already.

    Args:
        tree: files by path in the repo.
        private: of a repo that is made; one that is there keeps its visibility.
        revision: a branch, made if it is missing.
        owned: from a path to whether the file is one of ours, to be deleted if it is not in ``tree``.

    Raises:
        PublishError: says why nothing was pushed, and what to do.
    """
    tell(f"Looking through {len(tree)} files, {sum(file.stat().st_size for file in tree.values()):,} bytes")
    check_no_secrets(tree, token)
    target, wanted = Target(HfApi(token=token), repo, repo_type, revision), {path: hashes(tree[path]) for path in tree}
    with deadlines(ASKING):
        open_repo(target, private)
        parent = head_of(target)
        remote = files_at(target, parent)
    if repo_type == "dataset":
        check_no_script(repo, remote)
    changed, orphans = differences(wanted, remote, owned)
    if not changed and not orphans:
        print(f"{repo} holds exactly this already: nothing to push.")
        return
    tell(f"Pushing {len(changed)} files to {repo}")
    oid, url = commit(target, parent, {path: tree[path] for path in changed}, orphans)
    with deadlines(ASKING):
        check_arrived(target, oid, wanted, owned)
    print(
        f"Pushed to {url}: {len(changed)} files written, {len(orphans)} deleted, {len(tree) - len(changed)} as before"
    )


def tell(step: str) -> None:
    """Says on standard error what takes a while."""
    print(f"{step} ...", file=sys.stderr, flush=True)


def differences(
    wanted: dict[str, tuple[str, str]], remote: dict[str, str], owned: Callable[[str], object]
) -> tuple[list[str], list[str]]:
    """The files that the repo lacks or has otherwise, and those of ours that it should not have."""
    changed = [path for path, known in wanted.items() if remote.get(path) not in known]
    return changed, [path for path in remote if path not in wanted and owned(path)]


def open_repo(target: Target, private: bool) -> None:
    """Makes the repo if there is none; raises PublishError if it is public and must not be."""
    repo = target.repo
    with in_plain_words(repo):
        is_private, made = visibility(target), False
        if is_private is None:
            # Not exist_ok: a repo that is taken by another type would pass for this one.
            target.api.create_repo(**target.place, private=private)
            is_private, made = visibility(target), True
        if not isinstance(is_private, bool):
            raise TypeError(f"it does not say whether {repo} is private")
    if private and not is_private:
        there = "was made public, though it was asked to be private" if made else "is there already, and public"
        raise PublishError(
            f"{repo} {there}. Make it private in its settings on the Hub, take another name, or say --public."
        )
    if is_private and not private:
        print(f"{repo} is there already, and private; it stays so.")


def visibility(target: Target) -> bool | None:
    """Whether the repo is private; None if there is none."""
    try:
        return target.api.repo_info(**target.place).private
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:  # the client takes that for a missing repo too
            raise PublishError(refused(error, target.repo)) from error
        return None


def head_of(target: Target) -> str:
    """The commit that the branch stands at; a branch that is missing begins at the main one's."""
    with in_plain_words(target.repo):
        try:
            head = target.api.repo_info(**target.place, revision=target.revision).sha
        except RevisionNotFoundError:
            if target.revision is None:
                raise
            target.api.create_branch(target.repo, branch=target.revision, repo_type=target.repo_type)
            head = target.api.repo_info(**target.place, revision=target.revision).sha
        if not (isinstance(head, str) and re.fullmatch("[0-9a-f]{40}", head)):
            raise TypeError(f"it names no commit of {target.repo}, but {head!r}")
        return head


def files_at(target: Target, commit: str) -> dict[str, str]:
    """What the repo held at a commit: the Hub's name for the content of each file."""
    with in_plain_words(target.repo):
        found = target.api.list_repo_tree(**target.place, recursive=True, revision=commit)
        files = [file for file in found if isinstance(file, RepoFile)]
        remote = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
        if not all(isinstance(text, str) for text in (*remote, *remote.values())):
            raise TypeError(f"it lists files of {target.repo} without a name, or a hash")
        return remote


def check_no_script(repo: str, remote: dict[str, str]) -> None:
    script = f"{repo.split('/')[-1]}.py"
    if script in remote:
        raise PublishError(
            f"{repo} holds a loading script, {script}, which datasets would run, or refuse, in place of the Parquet. "
            "Delete it on the Hub first."
        )


def hashes(path: Path) -> tuple[str, str]:
    """What the Hub knows a file by: the SHA-256 of a large one, git's name of any other."""
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            sha1.update(chunk)
    return sha256.hexdigest(), sha1.hexdigest()


def commit(target: Target, parent: str, files: dict[str, Path], gone: list[str]) -> tuple[str, str]:
    """Writes and deletes all files in one commit on ``parent``, or none of them; returns its name and address."""
    additions = [Addition(path, str(file)) for path, file in files.items()]
    deletions = [CommitOperationDelete(path) for path in gone]
    title = f"Publish {', '.join(sorted({path.split('/')[0] for path in [*files, *gone]}))}"
    try:
        with deadlines(), in_plain_words(target.repo):
            done = target.api.create_commit(
                **target.place,
                operations=[*additions, *deletions],
                commit_message=title if len(title) <= 80 else f"Publish {len(files)} files",
                revision=target.revision,
                parent_commit=parent,
            )
            return done.oid, done.commit_url
    except PublishError as error:
        raise PublishError(f"{error} {state_after(target, parent)}") from error


def state_after(target: Target, parent: str) -> str:
    """What a commit that failed has left behind: it may have got through before the answer was lost."""
    again = "The same command pushes what is missing."
    try:
        with deadlines(ASKING):
            now = head_of(target)
    except PublishError:
        return f"It cannot be asked whether the commit got through: it is there whole, or not at all. {again}"
    return (
        f"Nothing was changed in {target.repo}. {again}"
        if now == parent
        else f"{target.repo} is now at {now[:7]}. {again}"
    )


def check_arrived(
    target: Target, oid: str, wanted: dict[str, tuple[str, str]], owned: Callable[[str], object]
) -> None:
    """Raises PublishError if the repo does not hold at its new commit what was pushed: success was said, not seen."""
    try:
        changed, orphans = differences(wanted, files_at(target, oid), owned)
    except PublishError as error:
        raise PublishError(f"the commit was taken, but cannot be read back: {error}") from error
    if changed or orphans:
        raise PublishError(
            f"the Hub says that it took the commit, and does not have {[*changed, *orphans][0]} as it was pushed. "
            "Run this again: what is missing is pushed."
        )
