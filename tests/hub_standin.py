"""A Hub on 127.0.0.1 that keeps real files and speaks what huggingface_hub's client asks.

It is strict where the Hub is: tokens, rights, the parent of a commit, the hash and size of what is uploaded, the YAML
of a card. Commits are whole or not there. What the Hub does beyond that is not here.

    with Hub() as hub:
        subprocess.run([...], env=hub.environment(home))
        hub.files("user/data")   # path to bytes, at the head of main
"""

import base64
import copy
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
USERS = {WRITER: ("user", "write"), READER: ("user", "read"), STRANGER: ("stranger", "write")}
LARGE = re.compile(r".*\.(parquet|safetensors|bin|png|model)")
PAGE = 3  # files in a page of a listing, so that a client which reads the first alone is found out
# What Hub.interfere answers: the connection is cut before, or after, the deed; success is said, and nothing done;
# nothing is answered, or a byte now and then, of the head or the body, until Hub.release.
BREAK, LOSE, PRETEND, HANG, TRICKLE, DRIP = "break", "lose", "pretend", "hang", "trickle", "drip"


class Answer(NamedTuple):
    """What to answer in the place of the real answer, before or after the deed.

    Args:
        headers: {url} in them is what was asked for.
        length: to announce, if not that of the content.
    """

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = {}
    after: bool = False
    length: int | None = None


class Changed(NamedTuple):
    """The deed is done, and its answer changed."""

    change: Callable[[bytes], bytes]


class Blob(NamedTuple):
    content: bytes
    large: bool

    @property
    def sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.sha1


class Commit(NamedTuple):
    sha: str
    title: str
    files: dict[str, Blob]


class Repo:
    def __init__(self, kind: str, private: bool):
        self.kind, self.private = kind, private
        first = Commit(hashlib.sha1(b"initial").hexdigest(), "initial commit", {".gitattributes": Blob(b"", False)})
        self.branches = {"main": [first]}

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class Hub:
    """The server and what it keeps.

    Args:
        interfere: from method and path to None, one of the words above, a status, an Answer or a Changed; called
            before anything is done.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.announced: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.interfere: Callable[[str, str], str | int | Answer | Changed | None] = lambda method, path: None
        self.released = threading.Event()
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def release(self) -> None:
        """Ends all that hangs."""
        self.released.set()
        self.released = threading.Event()

    def __exit__(self, *_):
        self.release()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """What a client's process must have in its environment before it imports huggingface_hub."""
        known = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return known | ({"HF_TOKEN": token} if token else {})

    def commits(self, repo: str, branch: str = "main") -> list[str]:
        """Titles, without the one that made the repo."""
        return [commit.title for commit in self.repos[repo].branches[branch][1:]]

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        found = self.repos[repo].branches[branch][-1].files
        return {path: blob.content for path, blob in sorted(found.items()) if path != ".gitattributes"}

    def put(self, repo: str, files: dict[str, bytes], title: str = "by hand") -> None:
        """A commit by somebody else."""
        blobs = {path: Blob(content, bool(LARGE.fullmatch(path))) for path, content in files.items()}
        self.add(self.repos[repo], "main", title, self.repos[repo].branches["main"][-1].files | blobs)

    def add(self, repo: Repo, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        commits = repo.branches[branch]
        names = "".join(f"{path} {blob.sha256}\n" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{commits[-1].sha} {title}\n{names}".encode()).hexdigest()
        commits.append(Commit(sha, title, files))
        return commits[-1]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms between its head and its body

    def log_message(self, *_):
        pass

    def answer(self):
        url = urlsplit(self.path)
        self.url_path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append((self.command, self.url_path))
        verdict = self.hub.interfere(self.command, self.url_path)
        if verdict == BREAK:
            self.rfile.read1(1024)  # midway: a part has arrived
            return self.cut()
        body = self.read_body()
        if verdict in (HANG, TRICKLE, DRIP):
            return self.stall(verdict)
        self.verdict = verdict
        try:
            if isinstance(verdict, int):
                raise Refused(verdict, "As the test wants it")
            if isinstance(verdict, Answer) and not verdict.after:
                return self.send(b"", 200, {})
            with self.hub.lock:
                before = copy.deepcopy((self.hub.repos, self.hub.objects)) if verdict == PRETEND else None
                self.route(body)
                if before:
                    self.hub.repos, self.hub.objects = before
        except Refused as refused:
            self.send_json(
                {"error": refused.message, **refused.body},
                refused.status,
                {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})},
            )

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def cut(self):
        """Hangs up, whatever is still being sent."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def stall(self, how: str):
        released = self.hub.released
        try:
            if how == DRIP:
                self.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            elif how == TRICKLE:
                self.connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not released.wait(0.1):
                if how != HANG:
                    self.connection.sendall(b" ")
            self.cut()
        except OSError:  # the client has had enough
            self.close_connection = True

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, content: bytes, status: int, headers: dict[str, str]):
        if self.verdict == LOSE:
            return self.cut()
        length = None
        if isinstance(self.verdict, Answer):
            content, status, headers, _, length = self.verdict
        elif isinstance(self.verdict, Changed):
            content = self.verdict.change(content)
        self.close_connection = self.close_connection or length is not None
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content) if length is None else length)} | headers).items():
            self.send_header(name, value.replace("{url}", self.hub.endpoint + self.path))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, answer, status: int = 200, headers: dict[str, str] | None = None):
        self.send(json.dumps(answer).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def route(self, body: bytes):
        for pattern, name in ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {self.url_path}")
            if found:
                return getattr(self, name)(body, **found.groupdict())
        raise Refused(404, f"The stand-in does not know {self.command} {self.url_path}")

    # Who asks, and for what

    def user(self) -> tuple[str, str] | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if given.removeprefix("Bearer ") not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return USERS[given.removeprefix("Bearer ")]

    def must_write(self, owner: str):
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user != (owner, "write"):
            raise Refused(403, f"You don't have the rights to write to {owner}")

    def repo(self, kind: str | None, repo: str) -> Repo:
        user, found = self.user(), self.hub.repos.get(repo)
        hidden = found and found.private and (user is None or user[0] != repo.split("/")[0])
        if not found or hidden or found.kind != (kind or "models/").rstrip("s/"):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def commit_at(self, kind: str | None, repo: str, revision: str) -> Commit:
        found = self.repo(kind, repo).find(revision)
        if not found:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # API

    def whoami(self, body: bytes):
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        self.send_json({"type": "user", "name": user[0], "auth": {"accessToken": {"role": user[1]}}})

    def create(self, body: bytes):
        asked = json.loads(body)
        user = self.user()
        owner = asked.get("organization") or (user and user[0])
        self.must_write(owner)
        name, kind = f"{owner}/{asked['name']}", asked.get("type", "model")
        url = {"url": f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"}
        if name in self.hub.repos:
            same = self.hub.repos[name].kind == kind
            raise Refused(409, f"You already created this {kind} repo", **(url if same else {}))
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos[name] = Repo(kind, bool(private))
        self.send_json(url)

    def validate_yaml(self, body: bytes):
        found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(found[1]) if found else {}
            names = [config["config_name"] for config in data.get("configs", [])]
            errors = ["configs must differ by name"] if len(set(names)) < len(names) else []
            errors += [] if isinstance(data.get("license", ""), str) else ["license must be a string"]
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            errors = [str(error)]
        status = 400 if errors else 200
        self.send_json({"errors": [{"message": message} for message in errors], "warnings": []}, status)

    def info(self, body: bytes, kind: str, repo: str, revision: str | None = None):
        commit = self.commit_at(kind, repo, revision or "main")
        self.send_json(
            {
                "id": repo,
                "sha": commit.sha,
                "private": self.hub.repos[repo].private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def tree(self, body: bytes, kind: str, repo: str, revision: str, folder: str | None = None):
        files = self.commit_at(kind, repo, revision).files
        inside = f"{folder}/" if folder else ""
        entries = [describe(path, files) for path in below(inside, files, "recursive" in self.query)]
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            url = urlsplit(self.path)
            kept = "".join(f"{key}={value}&" for key, [value] in self.query.items() if key != "cursor")
            headers["Link"] = f'<{self.hub.endpoint}{url.path}?{kept}cursor={start + PAGE}>; rel="next"'
        self.send_json(entries[start : start + PAGE], headers=headers)

    def paths_info(self, body: bytes, kind: str, repo: str, revision: str):
        files = self.commit_at(kind, repo, revision).files
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
        folders = {path for path in asked if any(file.startswith(f"{path}/") for file in files)}
        self.send_json([describe(path, files) for path in asked if path in files or path in folders])

    def refs(self, body: bytes, kind: str, repo: str):
        branches = self.repo(kind, repo).branches
        named = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": commits[-1].sha} for n, commits in branches.items()
        ]
        self.send_json({"branches": named, "converts": [], "tags": []})

    def branch(self, body: bytes, kind: str, repo: str, revision: str):
        self.must_write(repo.split("/")[0])
        branches = self.repo(kind, repo).branches
        if revision in branches:
            raise Refused(409, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        branches[revision] = [self.commit_at(kind, repo, start)]
        self.send_json({})

    # Uploads

    def preupload(self, body: bytes, kind: str, repo: str, revision: str):
        self.must_write(repo.split("/")[0])
        files = self.commit_at(kind, repo, revision).files
        answers = []
        for file in json.loads(body)["files"]:
            large = bool(LARGE.fullmatch(file["path"])) or file["size"] > 10_000_000
            mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(mode | ({"oid": files[file["path"]].etag} if file["path"] in files else {}))
        self.send_json({"files": answers})

    def lfs_batch(self, body: bytes, kind: str | None, repo: str):
        self.must_write(repo.split("/")[0])
        self.repo(kind, repo)
        asked = json.loads(body)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
            raise Refused(422, "Only basic uploads by SHA-256")
        answers = []
        for wanted in asked["objects"]:
            self.hub.announced[wanted["oid"]] = wanted["size"]
            if wanted["oid"] not in self.hub.objects:
                actions = {
                    action: {"href": f"{self.hub.endpoint}/{path}/{wanted['oid']}"}
                    for action, path in (("upload", "lfs"), ("verify", "lfs-verify"))
                }
                wanted = wanted | {"actions": actions}
            answers.append(wanted)
        self.send_json({"transfer": "basic", "objects": answers})

    def lfs_put(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid or len(body) != self.hub.announced.get(oid):
            raise Refused(400, "What was sent is not what was announced")
        self.hub.objects[oid] = body
        self.send_json({})

    def lfs_verify(self, body: bytes, oid: str):
        asked = json.loads(body)
        if asked["oid"] != oid or len(self.hub.objects.get(oid, b"")) != asked["size"]:
            raise Refused(404, "No such object")
        self.send_json({})

    def commit(self, body: bytes, kind: str, repo: str, revision: str):
        self.must_write(repo.split("/")[0])
        found = self.repo(kind, repo)
        if revision not in found.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = [(line["key"], line["value"]) for line in map(json.loads, body.splitlines())]
        head = found.branches[revision][-1]
        if header[1].get("parentCommit") not in (None, head.sha):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        if not operations:
            raise Refused(400, "An empty commit")
        files = dict(head.files)
        for key, value in operations:
            self.apply(key, value, files)
        done = self.hub.add(found, revision, header[1]["summary"], files)
        prefix = f"{self.hub.endpoint}/{'datasets/' if found.kind == 'dataset' else ''}{repo}"
        self.send_json({"success": True, "commitOid": done.sha, "commitUrl": f"{prefix}/commit/{done.sha}"})

    def apply(self, key: str, value: dict, files: dict[str, Blob]):
        path = value["path"]
        if key == "file" and not LARGE.fullmatch(path):
            files[path] = Blob(base64.b64decode(value["content"], validate=True), False)
        elif key == "lfsFile" and len(self.hub.objects.get(value["oid"], b"")) == value["size"]:
            files[path] = Blob(self.hub.objects[value["oid"]], True)
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFile":
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise Refused(400, f"{key} of {path}: not uploaded, or not so")

    # Downloads

    def resolve(self, body: bytes, kind: str | None, repo: str, revision: str, path: str):
        commit = self.commit_at(kind, repo, revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        blob = commit.files[path]
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.send(blob.content, 200, headers)
        start, size = int(asked[1]), len(blob.content)
        stop = min(int(asked[2]) + 1 if asked[2] else size, size)
        if start >= size:
            raise Refused(416, "Range not satisfiable")
        return self.send(
            blob.content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        )


def below(inside: str, files: dict[str, Blob], recursive: bool) -> list[str]:
    """Paths of files and folders in a folder."""
    found = set()
    for path in (path for path in files if path.startswith(inside)):
        parts = path.removeprefix(inside).split("/")
        found |= {inside + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1 if recursive else 2)}
    return sorted(found)


def describe(path: str, files: dict[str, Blob]) -> dict:
    if path not in files:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    blob = files[path]
    entry = {"type": "file", "path": path, "oid": blob.sha1, "size": len(blob.content)}
    if not blob.large:
        return entry
    # git itself keeps a pointer, whose name says nothing of the content
    return entry | {
        "oid": hashlib.sha1(f"pointer to {blob.sha256}".encode()).hexdigest(),
        "lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134},
    }


_API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
_FILES = r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"POST {_API}/preupload/{_REVISION}", "preupload"),
    (rf"POST {_API}/commit/{_REVISION}", "commit"),
    (rf"POST {_API}/branch/{_REVISION}", "branch"),
    (rf"POST {_API}/paths-info/{_REVISION}", "paths_info"),
    (rf"GET {_API}/refs", "refs"),
    (rf"GET {_API}/tree/{_REVISION}(?:/(?P<folder>.+))?", "tree"),
    (rf"GET {_API}(?:/revision/{_REVISION})?", "info"),
    (rf"POST {_FILES}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (r"POST /lfs-verify/(?P<oid>[0-9a-f]{64})", "lfs_verify"),
    (rf"(?:GET|HEAD) {_FILES}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)
