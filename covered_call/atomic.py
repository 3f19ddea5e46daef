"""Writing that leaves no halves: files and folders are whole or not there, and a folder has one writer at a time.

What a killed process leaves behind is a hidden neighbour, ``.NAME.PID.tmp``, which the next writer of NAME removes.
"""

import ctypes
import datetime
import errno
import glob
import logging
import os
import shutil
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil
from filelock import SoftFileLock, Timeout

logger = logging.getLogger(__name__)

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: see renameat2(2)


class FolderBusy(OSError):
    """Another process is writing the folder; the message says which, and since when."""


def unfinished(path: str | os.PathLike) -> Path:
    """The hidden name under which this process makes ``path``; what killed processes left under theirs is removed."""
    path = Path(path).absolute()
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        writer = left.name.split(".")[-2]
        if not (writer.isdecimal() and psutil.pid_exists(int(writer))):
            remove(left)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | os.PathLike) -> Generator[BinaryIO]:
    """A file to write in, which takes the place of ``path`` once it is whole: a reader, or the next run after a kill,
    sees the old one or the new one."""
    temporary = unfinished(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk names no file by itself
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file whole or not at all; see replacing."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_together(folder: str | os.PathLike, files: dict[str, str | bytes], old: Iterable[str] = ()) -> None:
    """Writes files that belong together, of which a kill leaves no mixture: either the old ones, or new ones alone.

    All are whole on the disk before the first old one goes. The first of ``files`` is replaced in one step, and is
    never missing. The old others, and ``old``, which are only removed, go before it; the new ones come after it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = unfinished(folder / "files")
    try:
        made.mkdir()
        for name, content in files.items():
            write(made / name, content)
        first, *others = files
        for name in {*others, *old} - {first}:
            (folder / name).unlink(missing_ok=True)
        for name in (first, *others):
            os.replace(made / name, folder / name)
    finally:
        remove(made)


def delete_folder(folder: str | os.PathLike) -> None:
    """Deletes a folder in one moment: it is renamed away first, so that a kill leaves the whole of it or nothing."""
    aside = unfinished(folder)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def replace_folder(folder: Path, target: Path) -> None:
    """Puts a folder, on the same disk, in the place of ``target``, whose old content goes once the new is there.

    On Linux the two are exchanged, so that at no moment there is neither; elsewhere the old one is renamed first.
    """
    if not target.exists():
        os.rename(folder, target)
    elif exchange(folder, target):
        shutil.rmtree(folder)
    else:
        aside = unfinished(target)
        os.rename(target, aside)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system or its file system knows no such step."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextmanager
def locked(folder: str | os.PathLike) -> Generator[None]:
    """Holds the folder for this process; the lock stands beside it, for the folder itself may be replaced.

    Raises:
        FolderBusy: if another process that is still running holds it. One that is gone is taken over from, and said.
        OSError: if it cannot be written, or is a file.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        number = errno.EACCES if folder.is_dir() else errno.ENOTDIR
        raise OSError(number, os.strerror(number), str(folder))
    lock = SoftFileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    drop_nameless(Path(lock.lock_file))
    since, holder = started(lock.lock_file), lock.pid
    try:
        lock.acquire()
    except Timeout:
        raise FolderBusy(
            f"{folder} is being written by process {holder or lock.pid}, which began at {since}. Wait for it to end, "
            "or give another folder."
        ) from None
    if since:
        logger.warning("Process %s, which began to write %s at %s, is gone: taking over.", holder, folder, since)
    try:
        yield
    finally:
        lock.release()


def drop_nameless(marker: Path) -> None:
    """Removes a lock that names no process, for it was killed while it made it: else the name is there at once."""
    for _ in range(20):
        try:
            if marker.stat().st_size:
                return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    marker.unlink(missing_ok=True)


def started(marker: str) -> str | None:
    try:
        time = datetime.datetime.fromtimestamp(os.stat(marker).st_mtime, datetime.UTC)
    except OSError:
        return None
    return time.isoformat(timespec="seconds")
