"""What every command begins with, before anything that pip installed is imported: hence the standard library alone."""

import argparse
import logging
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager


def begin() -> None:
    """From here on a missing package is one line that says how to enter the environment."""
    sys.excepthook = explain
    # Said by bitsandbytes when it is imported on some CPUs, of a kernel from the Hub that it does without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda r: "gemm_4bit_forward" not in str(r.msg))


def explain(kind: type[BaseException], error: BaseException, traceback) -> None:
    if not isinstance(error, ModuleNotFoundError):
        sys.__excepthook__(kind, error, traceback)
        return
    # The path of a package's __main__.py is no command: as a script, it would take its own folder for the libraries'.
    command = "-m covered_call" if sys.argv[0].endswith("__main__.py") else sys.argv[0]
    print(
        f"error: {sys.executable} has no package {error.name}. `make run` sets up an environment with all of them in "
        f".venv: enter it with `source .venv/bin/activate`, or run .venv/bin/python {command} ...",
        file=sys.stderr,
    )


def start_logging(level: int = logging.WARNING) -> None:
    """Log lines as plain text on standard error, each once."""
    logging.basicConfig(level=level, format="%(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it prints its own


@contextmanager
def plain_errors(args: argparse.Namespace, *kinds: type[Exception]) -> Generator[None]:
    """What a verb's user can mend ends it with one line, in the words of its command line, and exit status 1.

    Args:
        kinds: the errors that say themselves what to do. Of the system's own, a full disk say, they are not.
    """
    try:
        yield
    except kinds as error:
        sys.exit(f"error: {as_typed(error, args)}")
    except OSError as error:
        sys.exit(f"error: {disk_trouble(error) or error}")


def disk_trouble(error: BaseException | None) -> str | None:
    """What a full disk, or a folder that cannot be written, is to its user; None for any other error.

    Libraries wrap the system's error in one of their own, or only quote it.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror}. Is the folder there, has the disk room, and may it be written?"
        if any(words in str(error) for words in ("(os error 28)", "inline_container.cc")):  # safetensors' and torch's
            return f"A file could not be written. Is the disk full? ({error})"
        error = error.__cause__
    return None


def as_typed(error: Exception, args: argparse.Namespace) -> str:
    """A message about options, such as duplicates="latest", as its command line has them: --duplicates latest."""
    value = r"""\((?P<many>.*?)\)|"(?P<one>.*?)"|'(?P<other>.*?)'|[^\s,:;]+"""

    def as_flag(found: re.Match) -> str:
        inner = next((text for text in found.group("many", "one", "other") if text is not None), found[2])
        return f"--{found[1]} {inner.replace(',', '') if found['many'] else inner}"

    return re.sub(rf"(?<![\w/.-])({'|'.join(vars(args))})=({value})", as_flag, str(error))
