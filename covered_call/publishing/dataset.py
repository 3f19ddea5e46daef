"""The datasets to share: built as Parquet shards, checked, described by a card, and written to a folder."""

import dataclasses
import hashlib
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils import tqdm
from huggingface_hub import DatasetCard, DatasetCardData

from covered_call import atomic
from covered_call.candidates.builder import Backtest, CoveredCallCandidates
from covered_call.candidates.data_options import config_of
from covered_call.candidates.leaks import PROMPTED, find_leaks, render_splits
from covered_call.candidates.options import PATHS, CoveredCallCandidatesConfig, names_of
from covered_call.candidates.records import RECORDS
from covered_call.candidates.source import HOME
from covered_call.candidates.splits import split_places
from covered_call.publishing.hub import PublishError
from covered_call.tables import align, markdown

CARD = "README.md"
SAMPLE = HOME.resolve() / "data" / "sample"
ROWS_A_GROUP = 1000  # a reader holds one row group in memory at a time
SHARD = re.compile(rf"({'|'.join(RECORDS)})/[^/]+-\d{{5}}-of-\d{{5}}\.parquet")
OWNED = re.compile(rf"({'|'.join(RECORDS)})/[^/]+\.parquet")  # in a repo, shards of push_to_hub too, old names and all
LABELS_SHOWN = 12  # the ranking has a label for each place in a list, which may be long
PLACEHOLDERS = re.compile(
    r"\[More Information Needed\]|\{\{.*?\}\}|\b(?:TODO|TBD|FIXME)\b"
    r"|<(?:\.\.\.|…|[A-Z][A-Z0-9 _/-]+|(?:your|insert|add|fill|describe)\b[^<>]*)>"
)
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")


# ---------------------------------------------------------------------------------------------------------------------
# Build: Parquet shards, the same bytes from the same rows whatever version of datasets writes them


class Split(NamedTuple):
    """What was written of a split: its rows, their bytes in memory and on disk, and what the card says of it."""

    rows: int
    nbytes: int
    size: int
    times: str
    decisions: str
    labels: Counter


class Built(NamedTuple):
    """A config as it was written."""

    name: str
    features: Features
    splits: dict[str, Split]


def build(name: str, backtest: Backtest, folder: Path, shard_size: int) -> Built:
    """Renders a config and writes its shards, of about ``shard_size`` bytes in memory, to ``folder``/``name``."""
    with tempfile.TemporaryDirectory(prefix="arrow_", dir=folder.parent) as cache:
        splits = backtest.load(name, cache_dir=cache)
        written = {split: write_split(rows, folder, f"{name}/{split}", shard_size) for split, rows in splits.items()}
        return Built(name, next(iter(splits.values())).features, written)


def write_split(split: Dataset, folder: Path, stem: str, shard_size: int) -> Split:
    number = split.data.nbytes // shard_size + 1
    names = [f"{stem}-{index:05d}-of-{number:05d}.parquet" for index in range(number)]
    (folder / stem).parent.mkdir(parents=True, exist_ok=True)
    nbytes = 0
    for index, name in enumerate(tqdm(names, desc=f"Writing {stem}", unit=" shards", disable=None, leave=False)):
        nbytes += write_shard(split.shard(number, index, contiguous=True), folder / name)
    size = sum((folder / name).stat().st_size for name in names)
    return Split(len(split), nbytes, size, times_of(split), decisions_of(split), labels_of(split))


def write_shard(shard: Dataset, path: Path) -> int:
    """Writes one Parquet file, and returns the bytes that its rows take in memory."""
    # `datasets` would write its own description of the features beside the schema: in words that 3.6 cannot read
    # when a later version writes them. The card's dataset_info describes them in words that all versions read.
    schema = shard.features.arrow_schema.remove_metadata()
    nbytes = 0
    with pq.ParquetWriter(path, schema) as writer:
        for rows in shard.with_format("arrow").iter(ROWS_A_GROUP):
            # Copied: what a slice takes depends on where it begins, and each version of datasets cuts in its own way.
            rows = rows.take(np.arange(len(rows)))
            writer.write_table(rows.cast(schema))
            nbytes += rows.nbytes
    return nbytes


def times_of(split: Dataset) -> str:
    if "decision_time" not in split.features:
        return "n/a"
    times = split.data.column("decision_time").unique().to_pylist()
    return f"{min(times):%Y-%m-%d} to {max(times):%Y-%m-%d}"


def decisions_of(split: Dataset) -> str:
    if "decision_id" not in split.features:
        return "n/a"
    return f"{len(split.data.column('decision_id').unique()):,}"


def labels_of(split: Dataset) -> Counter:
    column = next((name for name in ("label", "chosen_label") if name in split.features), None)
    if column is None:
        return Counter()
    counts = split.data.column(column).value_counts().to_pylist()
    return Counter({pair["values"]: pair["counts"] for pair in counts})


# ---------------------------------------------------------------------------------------------------------------------
# Check: nothing is shared that names its answers, is described by a card of something else, or was meant to be private


def check_leaks(backtest: Backtest, names: list[str], allow: bool) -> None:
    """Raises PublishError if prompts name their answers, as the verb audit finds it, unless that is allowed."""
    leaks = []
    for config in (config_of(name, backtest.options) for name in names if name in PROMPTED):
        leaks += find_leaks(render_splits(backtest.splits, config), config)
    if leaks and not allow:
        raise PublishError(f"The leak audit fails. {' '.join(leaks)} To share them all the same: --allow-hindsight.")
    print("\n".join(leaks) if leaks else "Leak audit passed: no prompt names its answer.")


def is_sample(files: list[str]) -> bool:
    return all(Path(path).resolve().is_relative_to(SAMPLE) for path in files)


def check_visibility(files: list[str], private: bool, public: bool) -> bool:
    """Whether the repo is to be private: data that is not the sample needs a word on it."""
    if private or public or is_sample(files):
        return private
    raise PublishError(
        f"{first_of_others(files)} is not of the simulated sample: say --private or --public, as the repo is to be."
    )


def first_of_others(files: list[str]) -> str:
    return os.path.basename(next(path for path in files if not is_sample([path])))


def read_card(path: str, files: list[str]) -> DatasetCard:
    """The card to fill in.

    Raises:
        PublishError: if it cannot be read, has a placeholder left or no licence, or speaks of other data.
    """
    card = load_card(DatasetCard, Path(path))
    found = PLACEHOLDERS.search(Path(path).read_text(encoding="utf-8"))
    if found:
        raise PublishError(f"{path} still holds the placeholder {found[0]!r}: say what belongs there.")
    if card.data.license in (None, [], "", "unknown"):
        raise PublishError(f"{path} states no licence: give it a line such as `license: cc-by-4.0` at its top.")
    claim = None if is_sample(files) else simulated(card)
    if claim:
        raise PublishError(
            f"{path} says that the data are simulated ({claim}), and {first_of_others(files)} is not of the simulated "
            "sample. Copy the card, describe your data in it, and give it with --card."
        )
    return card


def simulated(card: DatasetCard) -> str | None:
    """Where a card says that its data are simulated, if it does."""
    title = re.search(r"^# .*", card.text, re.MULTILINE)
    said = re.search(r"\b(?:this|the) (?:data ?set|data|corpus) (?:is|are) (?:simulated|synthetic)\b", card.text, re.I)
    claims = {
        "its tags": " ".join(map(str, card.data.get("tags") or [])),
        "its pretty_name": str(card.data.get("pretty_name")),
        "its title": title[0] if title else "",
        f"{said[0]!r}" if said else "": said[0] if said else "",
    }
    return next((where for where, text in claims.items() if re.search("simulated|synthetic", text, re.I)), None)


# ---------------------------------------------------------------------------------------------------------------------
# Card: its keys and body are kept; what was built is filled in


def load_card(kind: type, path: Path):
    """A README.md as a card of ``kind``: DatasetCard or ModelCard; PublishError if it is none."""
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


def fill_card(card: DatasetCard, source: str, revision: str | None, statistics: str, built: list[Built]) -> str:
    """The README.md of the data: what load_dataset needs to know of them, how to load them, and their statistics."""
    card.data["size_categories"] = [size_category(sum(split.rows for one in built for split in one.splits.values()))]
    card.data["configs"] = [
        {
            "config_name": one.name,
            "data_files": [{"split": split, "path": f"{one.name}/{split}-*.parquet"} for split in one.splits],
            **({"default": True} if one.name == default_of(built) else {}),
        }
        for one in built
    ]
    card.data.pop("dataset_info", None)
    card.text = SIGNATURE.sub("\n", card.text)
    DatasetInfosDict({one.name: dataset_info(one) for one in built}).to_dataset_card_data(
        cast(DatasetCardData, card.data)
    )
    card.text = fill(card.text, "loading", "Load it", how_to_load(source, revision, built))
    card.text = fill(card.text, "statistics", "Statistics", statistics)
    return str(card)


def default_of(built: list[Built]) -> str:
    names = [one.name for one in built]
    default = CoveredCallCandidates.DEFAULT_CONFIG_NAME
    return default if default in names else names[0]


def dataset_info(one: Built) -> DatasetInfo:
    splits = SplitDict()
    for name, split in one.splits.items():
        splits[name] = SplitInfo(name, num_bytes=split.nbytes, num_examples=split.rows)
    return DatasetInfo(
        features=one.features,
        splits=splits,
        download_size=sum(split.size for split in one.splits.values()),
        dataset_size=sum(split.nbytes for split in one.splits.values()),
    )


def size_category(rows: int) -> str:
    """The Hub's name for so many rows."""
    return SIZES[min(max(len(str(rows)) - 3, 0), len(SIZES) - 1)]


def how_to_load(source: str, revision: str | None, built: list[Built]) -> str:
    at = f', revision="{revision}"' if revision else ""
    lines = [f'load_dataset("{source}", "{one.name}"{at})' for one in built]
    return "\n".join(["```python", "from datasets import load_dataset", "", *lines, "```"])


def describe_data(built: list[Built], backtest: Backtest) -> str:
    """The statistics of the card: how the splits were made, what each holds, and what was purged."""
    cells = [["config", "split", "decision times", "decisions", "records", "labels"]]
    cells += [
        [f"`{one.name}`", name, split.times, split.decisions, f"{split.rows:,}", balance(split.labels)]
        for one in built
        for name, split in one.splits.items()
    ]
    options = backtest.options
    parts = [describe_splits(options), markdown(cells), describe_purge(backtest), describe_options(options)]
    return "\n\n".join(filter(None, parts))


def balance(labels: Counter) -> str:
    """The share of each label; beyond the first few, of all others together."""
    if not labels:
        return "n/a"
    shown = labels.most_common(LABELS_SHOWN)
    shares = [f"`{label}` {percent(count, labels)}" for label, count in shown]
    if len(labels) > len(shown):
        others = labels.total() - sum(count for _, count in shown)
        shares.append(f"{len(labels) - len(shown)} more {percent(others, labels)}")
    return ", ".join(shares)


def percent(count: int, labels: Counter) -> str:
    return f"{100 * count / labels.total():.1f} %"


def describe_splits(config: CoveredCallCandidatesConfig) -> str:
    if config.splits == "train":
        return "One split, `train`, of all decisions."
    if config.validation_from is not None:
        parts = f"validation begins at {config.validation_from}, test at {config.test_from}"
    else:
        train, validation, test = (f"{100 * part:g} %" for part in config.splits)
        parts = f"{train} of the distinct times train, {validation} validation, {test} test, in this order"
    return f"By decision time: {parts}; the decisions of one time are never divided."


def describe_purge(backtest: Backtest) -> str:
    if backtest.options.splits == "train":
        return ""
    if not backtest.options.purge:
        return "Nothing is purged: options of one split may still be alive when the next begins."
    decisions, unpurged = backtest.decisions, dataclasses.replace(backtest.options, purge=False)
    whole = split_places(decisions.time, decisions.label_end, unpurged)
    purged = {name: len(places) - len(backtest.numbers[name]) for name, places in whole.items()}
    counts = " and ".join(f"{count:,} from {name}" for name, count in purged.items() if count)
    total = f"{sum(purged.values()):,} of {len(decisions.place):,}"
    return (
        f"Purged decisions: {', '.join(filter(None, [total, counts]))}. A decision "
        "is left out if one of its options is still alive when the next split begins, because its outcome lies there."
    )


def describe_options(config: CoveredCallCandidatesConfig) -> str:
    defaults = CoveredCallCandidatesConfig()
    given = {name: getattr(config, name) for name in names_of(CoveredCallCandidatesConfig)}
    given |= {name: os.path.basename(given[name]) for name in PATHS if given[name]}
    given = [f"`{name}={value!r}`" for name, value in given.items() if value != getattr(defaults, name)]
    text = f"Built with {', '.join(given)}." if given else ""
    return f"{text} **The prompts name the teacher's outcomes, and so the answers.**" if config.hindsight else text


# ---------------------------------------------------------------------------------------------------------------------
# A folder: made beside its place, and exchanged with what is there if that was made here too
SIGNATURE = re.compile(
    r"\n<!-- covered-call publish wrote this file; SHA-256 of what is above: ([0-9a-f]{64}) -->\n\Z"
)


@contextmanager
def workplace(target: Path | None) -> Generator[Path]:
    """An empty folder, gone afterwards; beside ``target`` if there is one, so that it can be renamed to it.

    Raises:
        FolderBusy: if another process is writing ``target``.
    """
    if target is None:
        with tempfile.TemporaryDirectory(prefix="covered_call_publish_") as scratch:
            yield Path(scratch)
        return
    with atomic.locked(target):
        scratch = atomic.unfinished(target)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch)


def check_folder(target: Path) -> None:
    """Raises PublishError if there is anything at ``target`` that was not written here, or has been changed since.

    A link is refused: the folder would take its place, and what it leads to would stay as it was.
    """
    if target.is_symlink():
        raise PublishError(f"{target} is a link, to {os.readlink(target)}: give the folder itself.")
    if target.exists() and not target.is_dir():
        raise PublishError(f"{target} is a file: give a folder.")
    others = [path for path in leaves_below(target) if path != CARD and not SHARD.fullmatch(path)]
    links = [path for path in leaves_below(target) if not (target / path).is_file() or (target / path).is_symlink()]
    if others or links:
        raise PublishError(
            f"{target} holds {[*others, *links][0]}, which was not written here: give another folder, or empty it."
        )
    if leaves_below(target) and not is_signed(target / CARD):
        raise PublishError(
            f"{target / CARD} was not written here, or was changed since: give another folder, or move it away; as "
            "--card, it may be filled in again."
        )


def leaves_below(folder: Path) -> list[str]:
    """All that is in a folder but the folders that hold something."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir()))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def files_below(folder: Path) -> list[str]:
    return [path for path in leaves_below(folder) if (folder / path).is_file()]


def sign(card: str) -> str:
    """The card with a last line by which check_folder knows it, unless it is changed."""
    text = f"{card.rstrip()}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- covered-call publish wrote this file; SHA-256 of what is above: {digest} -->\n"


def is_signed(card: Path) -> bool:
    try:
        text = card.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    found = SIGNATURE.search(text)
    return found is not None and hashlib.sha256(text[: found.start()].encode()).hexdigest() == found[1]


def put_in_place(folder: Path, target: Path) -> None:
    """Renames the folder to ``target``; what was there before goes only once the new one is whole."""
    check_folder(target)  # once more, for the making took its time
    (folder / CARD).write_bytes(sign((folder / CARD).read_text(encoding="utf-8")).encode())
    atomic.replace_folder(folder, target)
    print(f"Written to {target}")


def listing(folder: Path) -> str:
    """Each file with its rows and bytes."""
    cells = [["file", "rows", "bytes"]]
    for name in files_below(folder):
        rows = f"{pq.read_metadata(folder / name).num_rows:,}" if name.endswith(".parquet") else ""
        cells.append([name, rows, f"{(folder / name).stat().st_size:,}"])
    return align(cells, right=(1, 2))
