"""A card, README.md: read, and filled in between the comments that mark its sections."""

from pathlib import Path

import yaml

from publish_private import PublishError

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
