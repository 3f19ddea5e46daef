"""A card, README.md: read, and filled in between the comments that mark its sections."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from huggingface_hub import get_token

from covered_call.candidates.schema import printable

CARD = "README.md"


def load_card(kind: type, path: Path):
    try:
        return kind(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PublishError(f"The card {path} cannot be read ({error}).") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise PublishError(
            f"{path}: what stands between its --- lines is not the YAML of a card ({reason})."
        ) from error


def fill(text: str, section: str, title: str, content: str) -> str:
    """The text with ``content`` between the comments that mark a section, or at its end if nothing marks it."""
    start, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    if start not in text and end not in text:
        return f"{text.rstrip()}\n\n## {title}\n\n{start}\n{content}\n{end}\n"
    before, *rest = text.split(start)
    if len(rest) != 1 or rest[0].count(end) != 1 or end in before:
        raise PublishError(f"The card must hold {start} and, after it, {end} once each.")
    return f"{before}{start}\n{content}\n{end}{rest[0].split(end)[1]}"


class PublishError(Exception):
    """What was asked cannot be shared as it is; the message says why and what to do."""


TOKEN = r"hf_[A-Za-z0-9]{20,}"
LONGEST_SAID = 500  # characters of what a server says
CHUNK, OVERLAP = 1 << 20, 1 << 12  # bytes read at a time, and of them once more with the next ones
PATH_KEYS = ("data_files", "data_dir", "output_dir", "adapter", "resume_from_checkpoint", "chat_template_path")
DROPPED_KEYS = ("logging_dir", "run_name")  # their defaults hold the name of the machine
LOCAL = re.compile(r"/[^/\s]+/|~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\")  # how a path on a machine begins
REST = r"(?:[/\\][^\s\"'`<>|)\],;]*)?"  # of a path within a text
# Paths of any machine within a text; a URL, a closing tag or a share such as 1/2 is none.
ANYWHERE = r"(?:/(?:home|Users)/[\w.-]+|[A-Za-z]:\\Users\\[\w.-]+|(?<![\w/:.<-])/[\w.@+-]+(?=/[\w.@+-]))"


def redact(said: str, tokens: Iterable[str | None] = ()) -> str:
    """What a server says, on one line and in printable characters, clipped, and without tokens."""
    for token in filter(None, (get_token(), *tokens)):
        said = said.replace(token, "hf_***")
    said = re.sub(r"\bhf_\w{8,}", "hf_***", " ".join(said.split()))
    return printable(said, LONGEST_SAID)


# ---------------------------------------------------------------------------------------------------------------------
# Scrub: names in the place of paths


def name_of(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "."


def is_local(text: str) -> bool:
    return bool(LOCAL.match(text)) or ("/" in text and os.path.exists(text))


def scrub(value, local: set[str], key: str = ""):
    """The same value of JSON or YAML, with the names of files and folders in the place of their paths.

    Args:
        local: texts that are known to be paths.

    Raises:
        PublishError: if it holds a hub_token.
    """
    if key == "hub_token" and value:
        raise PublishError("it holds a hub_token")
    if isinstance(value, dict):
        return {name: scrub(one, local, name) for name, one in value.items() if name not in DROPPED_KEYS}
    if isinstance(value, list):
        return [scrub(one, local, key) for one in value]
    if not isinstance(value, str):
        return value
    return name_of(value) if key in PATH_KEYS or value in local or is_local(value) else scrub_text(value, local)


def scrub_text(text: str, local: set[str]) -> str:
    for path in sorted(local, key=len, reverse=True):
        text = text.replace(path, name_of(path))
    here = "|".join(map(re.escape, private_folders()))
    return re.sub(rf"(?:{here}|{ANYWHERE})(?![\w.-]){REST}", lambda found: name_of(found[0]), text)


def private_folders() -> list[str]:
    """The folders of this machine that a path in what is shared may begin with, the longest first."""
    folders = {str(one) for one in (Path.home(), Path.cwd(), tempfile.gettempdir()) if Path(one) != Path(one).parent}
    return sorted(folders, key=len, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# Check: the last look at every byte


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
