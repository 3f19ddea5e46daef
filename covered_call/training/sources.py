"""The key mix of a recipe: the sources that an epoch is drawn from, their shares, and the files among them.

Neither torch nor transformers is imported here; see keys.py.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from covered_call.candidates.schema import shown
from covered_call.training.runs import RecipeError

ROLES = ("system", "user", "assistant")
EXAMPLE = "[{config: per_decision_ranking, share: 0.8}, {data: corpora/formulas.jsonl, share: 0.2}]"
HOW = {
    "messages": 'each line is {"messages": [...]}: roles system, user and assistant, the answer last',
    "prompt": 'each line is {"prompt": [...], "chosen": [...], "rejected": [...]}: a chat up to its user\'s question, '
    "and two answers to it, each one message of the assistant or its text",
}  # fmt: skip


class Source(NamedTuple):
    """What a share of each epoch's records is drawn from: a config of the backtest, or a file of other records."""

    name: str
    share: float
    is_file: bool


class Foreign(NamedTuple):
    """The records of a file: of each the number of its line (of a Parquet, of its row), and what it holds.

    Args:
        sha256: of the bytes that were read.
    """

    path: str
    sha256: str
    lines: list[int]
    records: list[dict]

    def where(self, place: int) -> str:
        return at_line(self.path, self.lines[place])


# ---------------------------------------------------------------------------------------------------------------------
# The key


def read_mix(value: Any, configs: tuple[str, ...]) -> list[dict] | None:
    """The key as a list of plain entries, as it stands in a recipe or, as YAML, on the command line.

    Raises:
        RecipeError: unless each is one of ``configs``, of which there is at least one, or a file, each once, and the
            shares add up to 1.
    """
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # the second of what looks like a date, and is none
            raise RecipeError(f"mix: {shown(value)} is no YAML: give a list such as {EXAMPLE}.") from None
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise RecipeError(f"mix: {shown(value)} is no list of sources: give one such as {EXAMPLE}.")
    sources = [check_source(entry, configs) for entry in value]
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"mix: {twice[0]} stands there twice: give it once, with the share of both.")
    if all(source.is_file for source in sources):
        raise RecipeError(f"mix: there is nothing of the backtest in it: add one of {', '.join(configs)}.")
    total = sum(source.share for source in sources)
    if abs(total - 1) > 1e-6:
        raise RecipeError(f"mix: the shares add up to {total:g}, and an epoch is 1.")
    return [dict(entry) for entry in value]


def check_source(entry: Any, configs: tuple[str, ...]) -> Source:
    if not isinstance(entry, dict) or set(entry) not in ({"config", "share"}, {"data", "share"}):
        raise RecipeError(f"mix: {shown(entry)} is no source: give config or data, and share, as in {EXAMPLE}.")
    share, is_file = entry["share"], "data" in entry
    name = entry["data" if is_file else "config"]
    if not isinstance(name, str) or not is_file and name not in configs:
        wanted = "the path of a file" if is_file else f"one of {', '.join(configs)}"
        raise RecipeError(f"mix: {shown(name)} is not {wanted}.")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise RecipeError(f"mix: the share of {name} is {shown(share)}: give a number above 0, and at most 1.")
    return Source(name, float(share), is_file)


def sources_of(mix: list[dict] | None, otherwise: str) -> list[Source]:
    """The sources of a mix that read_mix has checked; without one, a single config."""
    if mix is None:
        return [Source(otherwise, 1.0, False)]
    return [Source(entry.get("config") or entry["data"], entry["share"], "data" in entry) for entry in mix]


def check_files(sources: Iterable[Source]) -> None:
    """Raises RecipeError for a file that is not there, or holds nothing."""
    for source in sources:
        if source.is_file and not Path(source.name).is_file():
            made = "Make it with python data/make_formulas.py --out " + source.name
            otherwise = "Correct its path, which is seen from the current folder, or leave it out."
            raise RecipeError(
                f"mix: there is no file {source.name}. {made if 'formula' in source.name else otherwise}"
            )
        if source.is_file and not Path(source.name).stat().st_size:
            raise RecipeError(f"mix: {source.name} is empty: fill it, or leave it out.")


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """So many records divided by shares, whose sum is taken as 1, by the largest remainder: none is off by a whole
    record."""
    exact = np.array(shares) / sum(shares) * total
    whole = np.floor(exact + 1e-9).astype(int)
    first = np.argsort(-(exact - whole), kind="stable")[: total - whole.sum()]
    whole[first] += 1
    return whole.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_chats(path: str) -> Foreign:
    """Chats, each with its answer last, under "messages".

    Raises:
        RecipeError: naming file, line and value, if one is not.
    """
    foreign = read_foreign(path)
    chats = []
    for place, record in enumerate(foreign.records):
        chat = record.get("messages") if isinstance(record, dict) else None
        if not is_chat(chat, ("user", "assistant")):
            raise bad_line(foreign, place, "messages")
        chats.append({"messages": plain(chat)})
    return foreign._replace(records=chats)


def read_pairs(path: str) -> Foreign:
    """Prompts with two answers as text, "chosen" and "rejected"; errors as of read_chats."""
    foreign = read_foreign(path)
    pairs = []
    for place, record in enumerate(foreign.records):
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not is_chat(prompt, ("user",)):
            raise bad_line(foreign, place, "prompt")
        answers = [answer_in(record.get(side)) for side in ("chosen", "rejected")]
        if None in answers:
            raise bad_line(foreign, place, "prompt")
        if answers[0] == answers[1]:
            raise RecipeError(f"{foreign.where(place)}: chosen and rejected are both {shown(answers[0])}. Correct it.")
        pairs.append({"prompt": plain(prompt), "chosen": answers[0], "rejected": answers[1]})
    return foreign._replace(records=pairs)


def read_foreign(path: str) -> Foreign:
    """The lines of a JSONL, or the rows of a Parquet, as they are."""
    check_files([Source(path, 1.0, True)])
    content = Path(path).read_bytes()
    rows = parquet_rows(path, content) if content[:4] == b"PAR1" else json_rows(path, content)
    if not rows:
        raise RecipeError(f"mix: {path} holds no records: fill it, or leave it out.")
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return Foreign(path, digest, [line for line, _ in rows], [record for _, record in rows])


def parquet_rows(path: str, content: bytes) -> list[tuple[int, Any]]:
    try:
        return list(enumerate(pq.read_table(io.BytesIO(content)).to_pylist(), start=1))
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(f"{path} is a Parquet that cannot be read: {error}. Make it again.") from error


def json_rows(path: str, content: bytes) -> list[tuple[int, Any]]:
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append((number, parse(line)))
            except (ValueError, RecursionError) as error:
                text = shown(line.decode("utf-8", "replace"))
                raise RecipeError(f"{at_line(path, number)}: {text} is no JSON ({error}). Correct it.") from None
    return rows


def parse(line: bytes) -> Any:
    """Raises ValueError for what is no JSON, or holds half a character, which no tokenizer reads; RecursionError for
    brackets without end."""
    found = json.loads(line.decode("utf-8"))
    json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def is_chat(chat: Any, end: tuple[str, ...]) -> TypeGuard[list[dict]]:
    """Whether these are messages with text, of which the last are of these roles."""
    return (
        isinstance(chat, list)
        and all(isinstance(one, dict) and one.get("role") in ROLES and is_text(one.get("content")) for one in chat)
        and tuple(one["role"] for one in chat[-len(end) :]) == end
    )


def answer_in(side: Any) -> str | None:
    if isinstance(side, list) and len(side) == 1 and is_chat(side, ("assistant",)):
        return side[0]["content"]
    return side if is_text(side) else None


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def plain(chat: list[dict]) -> list[dict]:
    return [{"role": message["role"], "content": message["content"]} for message in chat]


def at_line(path: str, number: int) -> str:
    return f"{path}, line {number}"


def bad_line(foreign: Foreign, place: int, key: str) -> RecipeError:
    value = shown(json.dumps(foreign.records[place], ensure_ascii=False, default=str))
    return RecipeError(f"{foreign.where(place)}: {value}: {HOW[key]}. Correct it.")


# ---------------------------------------------------------------------------------------------------------------------
# What must not be learnt


def questions_of(prompt: list[dict]) -> list[str]:
    """What a user asks in it, blanks apart: the same question after another word of the system is the same."""
    return [" ".join(message["content"].split()) for message in prompt if message["role"] == "user"]


def spellings_of(prompt: list[dict]) -> list[str]:
    """A question as a chat may have it: alone, or behind the words of the system where a model has no such role."""
    return [*questions_of(prompt), " ".join(" ".join(message["content"] for message in prompt).split())]


def check_apart(files: Iterable[Foreign], judged: dict[str, list[list[dict]]]) -> None:
    """Raises RecipeError if a record of a file asks what a decision asks that is judged.

    Args:
        judged: the prompts of each split by its name.
    """
    asked = {
        spelling: split for split, prompts in judged.items() for prompt in prompts for spelling in spellings_of(prompt)
    }
    for foreign in files:
        for place, record in enumerate(foreign.records):
            prompt = record["messages"][:-1] if "messages" in record else record["prompt"]
            if again := next((question for question in questions_of(prompt) if question in asked), None):
                raise RecipeError(
                    f"{foreign.where(place)}: {shown(again)} repeats a prompt of the {asked[again]} split, on which "
                    "the model is judged. Remove the line."
                )
