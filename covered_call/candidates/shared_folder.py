"""A folder that all nodes of a cluster see, on a disk or in a store: paths, or URIs that fsspec knows."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Generator
from typing import BinaryIO

import fsspec

from covered_call.candidates.builder import find_csvs
from covered_call.candidates.schema import CandidatesError, printable

WORK = ".work"  # in the folder: what is being written, and what is there for the work alone


class Folder:
    """Its files are whole or not there.

    Unlike atomic.replacing it takes nothing for left over: what a process of this machine does not write, another
    node's may.
    """

    def __init__(self, place: str):
        self.place = place
        self.fs, self.root = filesystem_of(place if is_uri(place) else os.path.abspath(place))

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    @contextlib.contextmanager
    def replacing(self, name: str) -> Generator[BinaryIO]:
        """A file to write in, which takes the place of the one of this name once it is whole."""
        path, unfinished = self.path(name), self.path(f"{WORK}/{uuid.uuid4().hex}.tmp")
        for one in (path, unfinished):
            self.fs.makedirs(os.path.dirname(one), exist_ok=True)
        try:
            with self.fs.open(unfinished, "wb") as file:
                yield file
            self.fs.mv(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.fs.rm(unfinished)
            raise

    def write(self, name: str, content: bytes) -> None:
        with self.replacing(name) as file:
            file.write(content)

    def read(self, name: str) -> bytes | None:
        """None if it is not there."""
        try:
            return self.fs.cat_file(self.path(name))
        except FileNotFoundError:
            return None

    def read_ranges(self, names: list[str], begins: list[int], ends: list[int]) -> list[bytes]:
        """Of each of these files the bytes from one place to another: from a store side by side."""
        return self.fs.cat_ranges([self.path(name) for name in names], begins, ends, on_error="raise")

    def names(self, name: str) -> set[str]:
        """What is in a folder of it."""
        try:
            return {os.path.basename(path) for path in self.fs.ls(self.path(name), detail=False)}
        except FileNotFoundError:
            return set()

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(name), recursive=True)


def is_uri(path: str) -> bool:
    return "://" in path


def filesystem_of(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:  # which says what to install, or what there is
        raise CandidatesError(f"{printable(path)} cannot be opened: {error}") from None


def find_inputs(patterns: list[str]) -> list[str]:
    """The files that paths, URIs and globs of both name, in their order."""
    found = [path for one in patterns for path in (match_uri(one) if is_uri(one) else find_csvs([one], None, ""))]
    return list(dict.fromkeys(found))


def match_uri(pattern: str) -> list[str]:
    fs, path = filesystem_of(pattern)
    found = sorted(path for path, said in fs.glob(path, detail=True).items() if said["type"] == "file")
    if not found:
        raise CandidatesError(f"No file matches {printable(pattern)}. Give a URI, or a glob such as 's3://a/b/*.csv'.")
    return [fs.unstrip_protocol(path) for path in found]


@contextlib.contextmanager
def local_copy(path: str) -> Generator[str]:
    """The path of the file on a disk: of a URI that of a copy, which goes."""
    if not is_uri(path):
        yield path
        return
    fs, name = filesystem_of(path)
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, os.path.basename(name))
        fs.get_file(name, local)
        yield local
