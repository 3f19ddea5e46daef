"""Shares the datasets, or a tuned adapter: Parquet and a card, made from the script and pushed in one commit.

    python publish.py USER/NAME --dry-run                     # what would be pushed; needs no network
    python publish.py USER/NAME                               # the simulated sample, public
    python publish.py USER/NAME --data_files 'runs/*.csv' --card my_card.md --private
    python publish.py --to DIR                                # the same files into a folder
    python publish.py --adapter out/ranking USER/NAME --data_repo USER/DATA --report report/metrics.json

After it ``load_dataset("USER/NAME", "per_candidate")`` works on any version of datasets, with no trust flag. Pushing
again what has not changed makes no commit; a push that fails leaves the repo as it was.
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils import tqdm
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

import metrics
from covered_call_candidates import (
    RECORDS,
    CandidatesError,
    CoveredCallCandidates,
    CoveredCallCandidatesConfig,
    LoggedDecision,
    load_candidates,
    split_decisions,
)
from evaluate_policy import (
    ALL,
    DATA_OPTIONS,
    HODL,
    MODEL,
    PROMPTED,
    TEACHER,
    add_data_options,
    config_of,
    data_options,
    find_leaks,
    markdown_table,
    read_splits,
    render_splits,
    typed,
)

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "data" / "sample"
CARD = "README.md"
MAX_SHARD_SIZE = "500MB"
ROWS_A_GROUP = 1000  # a reader holds one row group in memory at a time
SHARD = re.compile(rf"({'|'.join(RECORDS)})/[^/]+-\d{{5}}-of-\d{{5}}\.parquet")
OWNED = re.compile(rf"({'|'.join(RECORDS)})/[^/]+\.parquet")  # in a repo, shards of push_to_hub too, old names and all
LABELS_SHOWN = 12  # the ranking has a label for each place in a list, which may be long
PLACEHOLDERS = re.compile(
    r"\[More Information Needed\]|\{\{.*?\}\}|\b(?:TODO|TBD|FIXME)\b"
    r"|<(?:\.\.\.|…|[A-Z][A-Z0-9 _/-]+|(?:your|insert|add|fill|describe)\b[^<>]*)>"
)
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")


class PublishError(Exception):
    """What was asked cannot be shared as it is; the message says why and what to do."""


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


def build(name: str, files: list[str], config: CoveredCallCandidatesConfig, folder: Path, shard_size: int) -> Built:
    """Builds a config from the CSVs and writes its shards to ``folder``/``name``."""
    options = {option: getattr(config, option) for option in (*DATA_OPTIONS, "hindsight")}
    with tempfile.TemporaryDirectory(prefix="covered_call_arrow_") as cache:
        logging.disable(logging.WARNING)  # the audit read the same files, and spoke of them, a moment ago
        try:
            splits = load_candidates(name, data_files=files, cache_dir=cache, **options)
        finally:
            logging.disable(logging.NOTSET)
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
            writer.write_table(rows.cast(schema))
            nbytes += rows.nbytes
    return nbytes


def times_of(split: Dataset) -> str:
    if "decision_time" not in split.features:
        return "n/a"
    first_last = pc.min_max(split.data.column("decision_time")).as_py()
    return f"{first_last['min']:%Y-%m-%d} to {first_last['max']:%Y-%m-%d}"


def decisions_of(split: Dataset) -> str:
    if "decision_id" not in split.features:
        return "n/a"
    return f"{pc.count_distinct(split.data.column('decision_id')).as_py():,}"


def labels_of(split: Dataset) -> Counter:
    column = next((name for name in ("label", "chosen_label") if name in split.features), None)
    if column is None:
        return Counter()
    counts = pc.value_counts(split.data.column(column)).to_pylist()
    return Counter({pair["values"]: pair["counts"] for pair in counts})


# ---------------------------------------------------------------------------------------------------------------------
# Check: nothing is shared that names its answers, is described by a card of something else, or was meant to be private


def check_leaks(splits: dict, config: CoveredCallCandidatesConfig, names: list[str], allow: bool) -> None:
    """Raises PublishError if prompts name their answers, as evaluate_policy.py finds it, unless that is allowed."""
    leaks = []
    for name in names:
        if name in PROMPTED:
            of_config = config_of(name, config)
            leaks += find_leaks(render_splits(splits, of_config), of_config)
    if leaks and not allow:
        raise PublishError(f"The leak audit fails. {' '.join(leaks)} To share them all the same: --allow-hindsight.")
    print("\n".join(leaks) if leaks else "Leak audit passed: no prompt names its answer.")


def is_sample(files: list[str]) -> bool:
    return all(Path(path).resolve().is_relative_to(SAMPLE) for path in files)


def check_visibility(asked: argparse.Namespace, files: list[str]) -> bool:
    """Whether the repo is to be private: data that is not the sample needs a word on it."""
    if asked.private or asked.public or is_sample(files):
        return asked.private
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
    DatasetInfosDict({one.name: dataset_info(one) for one in built}).to_dataset_card_data(card.data)
    card.text = fill(card.text, "loading", "Load it", how_to_load(source, revision, built))
    card.text = fill(card.text, "statistics", "Statistics", statistics)
    return str(card)


def fill(text: str, section: str, title: str, content: str) -> str:
    """The text with ``content`` between the comments that mark a section, or at its end if nothing marks it."""
    start, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    if start not in text and end not in text:
        return f"{text.rstrip()}\n\n## {title}\n\n{start}\n{content}\n{end}\n"
    before, *rest = text.split(start)
    if len(rest) != 1 or rest[0].count(end) != 1 or end in before:
        raise PublishError(f"The card must hold {start} and, after it, {end} once each.")
    return f"{before}{start}\n{content}\n{end}{rest[0].split(end)[1]}"


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


def describe_data(
    built: list[Built], logged: list[LoggedDecision], splits: dict, config: CoveredCallCandidatesConfig
) -> str:
    """The statistics of the card: how the splits were made, what each holds, and what was purged."""
    lines = ["| config | split | decision times | decisions | records | labels |", "|---|---|---|---|---|---|"]
    for one in built:
        for name, split in one.splits.items():
            cells = [f"`{one.name}`", name, split.times, split.decisions, f"{split.rows:,}", balance(split.labels)]
            lines.append(f"| {' | '.join(cells)} |")
    purged = describe_purge(logged, splits, config)
    return "\n\n".join(filter(None, [describe_splits(config), "\n".join(lines), purged, describe_options(config)]))


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


def describe_purge(logged: list[LoggedDecision], splits: dict, config: CoveredCallCandidatesConfig) -> str:
    if config.splits == "train":
        return ""
    if not config.purge:
        return "Nothing is purged: options of one split may still be alive when the next begins."
    whole = split_decisions(logged, dataclasses.replace(config, purge=False))
    purged = {name: len(entries) - len(splits[name]) for name, entries in whole.items()}
    counts = " and ".join(f"{count:,} from {name}" for name, count in purged.items() if count)
    return (
        f"Purged decisions: {sum(purged.values()):,} of {len(logged):,}{f', {counts}' if counts else ''}. A decision "
        "is left out if one of its options is still alive when the next split begins, because its outcome lies there."
    )


def describe_options(config: CoveredCallCandidatesConfig) -> str:
    defaults = CoveredCallCandidatesConfig()
    given = {name: getattr(config, name) for name in (*DATA_OPTIONS, "hindsight")}
    given = [f"`{name}={value!r}`" for name, value in given.items() if value != getattr(defaults, name)]
    text = f"Built with {', '.join(given)}." if given else ""
    return f"{text} **The prompts name the teacher's outcomes, and so the answers.**" if config.hindsight else text


# ---------------------------------------------------------------------------------------------------------------------
# A folder


@contextmanager
def folder_to_fill(target: Path | None) -> Iterator[Path]:
    """An empty folder, beside ``target`` if there is one so that it can be renamed to it; gone afterwards."""
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".publish_", dir=target and target.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        yield folder


def check_folder(target: Path) -> None:
    """Raises PublishError if there is anything at ``target`` that was not written here."""
    if target.exists() and not target.is_dir():
        raise PublishError(f"{target} is a file: give a folder.")
    others = [path for path in files_below(target) if path != CARD and not SHARD.fullmatch(path)]
    if others:
        raise PublishError(
            f"{target} holds {others[0]}, which was not written here: give another folder, or empty it."
        )


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def put_in_place(folder: Path, target: Path) -> None:
    """Renames the folder to ``target``; what was there before goes only once the new one is whole."""
    old = folder.with_name("old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(folder, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    print(f"Written to {target}")


def listing(folder: Path) -> str:
    """Each file with its rows and bytes."""
    lines = [("file", "rows", "bytes")]
    for name in files_below(folder):
        rows = f"{pq.read_metadata(folder / name).num_rows:,}" if name.endswith(".parquet") else ""
        lines.append((name, rows, f"{(folder / name).stat().st_size:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}  {rows:>{widths[1]}}  {size:>{widths[2]}}".rstrip() for name, rows, size in lines
    )


# ---------------------------------------------------------------------------------------------------------------------
# Push: one commit on what the repo was a moment ago, or nothing

HUB_ERRORS = (HTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, RuntimeError, ValueError)


def check_login(token: str | None = None) -> str:
    """The name that the Hub knows you by; raises PublishError before any work if a push could not work."""
    with in_plain_words("you"):
        return HfApi(token=token).whoami()["name"]


@contextmanager
def in_plain_words(repo: str) -> Iterator[None]:
    """Turns what the Hub's client raises into a PublishError that says what to do."""
    try:
        yield
    except HUB_ERRORS as error:
        raise PublishError(plain(error, repo)) from error


def plain(error: Exception, repo: str) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return "the Hub does not know you: there is no token here. Run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub must not be asked: HF_HUB_OFFLINE is set. Unset it, or write the files with --to DIR."
    if isinstance(error, HfHubHTTPError):
        return refused(error, repo)
    said = " ".join(str(error).split())
    if isinstance(error, HTTPError):
        return f"the connection to {constants.ENDPOINT} failed ({said}). Check the network and run this again."
    return f"{repo}: {said}"


def refused(error: HfHubHTTPError, repo: str) -> str:
    said = " ".join((error.server_message or str(error)).split())
    return {
        401: "the Hub does not accept your token. Run `hf auth login --force`, or correct HF_TOKEN.",
        403: f"you have no right to write to {repo} ({said}). Take a token that may, or another name.",
        404: f"the Hub has no {repo}, or your token may not see it ({said}).",
        409: f"the name {repo} is taken on the Hub by a repo of another type, or by one that your token may not see.",
        412: f"{repo} was changed by somebody else meanwhile, so nothing was pushed. Run this again.",
    }.get(error.response.status_code, f"the Hub refuses ({said}).")


def push(
    tree: dict[str, Path], repo: str, repo_type: str, private: bool, revision: str | None, owned, token=None
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
    api = HfApi(token=token)
    with in_plain_words(repo):
        open_repo(api, repo, repo_type, private)
        parent = head_of(api, repo, repo_type, revision)
        found = api.list_repo_tree(repo, recursive=True, revision=parent, repo_type=repo_type)
        remote = {
            file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in found if isinstance(file, RepoFile)
        }
    if repo_type == "dataset":
        check_no_script(repo, remote)
    changed = [path for path, file in tree.items() if remote.get(path) not in hashes(file)]
    orphans = [path for path in remote if path not in tree and owned(path)]
    if not changed and not orphans:
        print(f"{repo} holds exactly this already: nothing to push.")
        return
    url = commit(api, repo, repo_type, revision, parent, {path: tree[path] for path in changed}, orphans)
    print(
        f"Pushed to {url}: {len(changed)} files written, {len(orphans)} deleted, {len(tree) - len(changed)} as before"
    )


def open_repo(api: HfApi, repo: str, repo_type: str, private: bool) -> None:
    """Makes the repo if there is none; raises PublishError if it is public and must not be."""
    try:
        is_private = api.repo_info(repo, repo_type=repo_type).private
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:  # the client takes that for a missing repo too
            raise PublishError(refused(error, repo)) from error
        # Not exist_ok: a repo that is taken by another type would pass for this one.
        api.create_repo(repo, repo_type=repo_type, private=private)
        return
    if private and not is_private:
        raise PublishError(
            f"{repo} is there already, and public. Make it private in its settings on the Hub, take another name, or "
            "say --public."
        )
    if is_private and not private:
        print(f"{repo} is there already, and private; it stays so.")


def head_of(api: HfApi, repo: str, repo_type: str, revision: str | None) -> str:
    """The commit that the branch stands at; a branch that is missing begins at the main one's."""
    try:
        return api.repo_info(repo, repo_type=repo_type, revision=revision).sha
    except RevisionNotFoundError:
        api.create_branch(repo, branch=revision, repo_type=repo_type)
        return api.repo_info(repo, repo_type=repo_type, revision=revision).sha


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


def commit(
    api: HfApi, repo: str, repo_type: str, revision: str | None, parent: str, files: dict[str, Path], gone: list[str]
) -> str:
    """Writes and deletes all files in one commit on ``parent``, or none of them; returns its address."""
    operations = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
    operations += [CommitOperationDelete(path) for path in gone]
    title = f"Publish {', '.join(sorted({path.split('/')[0] for path in [*files, *gone]}))}"
    try:
        done = api.create_commit(
            repo,
            operations,
            commit_message=title if len(title) <= 80 else f"Publish {len(files)} files",
            repo_type=repo_type,
            revision=revision,
            parent_commit=parent,
        )
    except HUB_ERRORS as error:
        while isinstance(error, RuntimeError) and isinstance(error.__cause__, HUB_ERRORS):
            error = error.__cause__  # the client wraps what a thread of an upload met
        state = state_after(api, repo, repo_type, revision, parent)
        raise PublishError(f"{plain(error, repo)} {state}") from error
    return done.commit_url


def state_after(api: HfApi, repo: str, repo_type: str, revision: str | None, parent: str) -> str:
    """What a commit that failed has left behind: it may have got through before the answer was lost."""
    again = "The same command pushes what is missing."
    try:
        now = api.repo_info(repo, repo_type=repo_type, revision=revision).sha
    except HUB_ERRORS:
        return f"It cannot be asked whether the commit got through: it is there whole, or not at all. {again}"
    return f"Nothing was changed in {repo}. {again}" if now == parent else f"{repo} is now at {now[:7]}. {again}"


# ---------------------------------------------------------------------------------------------------------------------
# A tuned adapter

NOT_SHARED = ("checkpoint-*", "runs", "unfinished*", ".*", "*.tmp", "training_args.bin")
WEIGHTS = ("adapter_*", "model*.safetensors*")  # of an earlier push: those of another kind would be loaded
REPORT = Path("report") / "metrics.json"
REPORTED = ["accuracy", "balanced_accuracy", "trade_rate", "coverage", "mean_pnl", "minus_teacher"]


def push_model(
    folder: str | os.PathLike,
    repo: str,
    private: bool = True,
    revision: str | None = None,
    data_repo: str | None = None,
    report: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> None:
    """Shares a finished fine-tune with its model card in one commit, without checkpoints and logs.

    Args:
        folder: as train_sft.py saved it.
        data_repo: the dataset on the Hub that it was tuned on.
        report: a metrics.json of evaluate_policy.py; default that of ``report/``, if it is of this model.

    Raises:
        PublishError: if the run has not finished, the report is of another model, or the Hub refuses.
    """
    folder = Path(folder)
    manifest = read_finished(folder)
    with tempfile.TemporaryDirectory(prefix="covered_call_card_") as scratch:
        card = Path(scratch) / CARD
        card.write_text(model_card(folder, manifest, repo, data_repo, report), encoding="utf-8")
        tree = {path: folder / path for path in files_below(folder) if is_shared(path)} | {CARD: card}
        print("\n".join(f"{path}  {file.stat().st_size:,} bytes" for path, file in tree.items()))
        if dry_run:
            print(f"\n{card.read_text(encoding='utf-8')}")
            return
        push(tree, repo, "model", private, revision, lambda path: matches(path, WEIGHTS), token)


def read_finished(folder: Path) -> dict:
    from policy import read_manifest  # only here: data are shared without torch
    from scoring import PolicyError

    try:
        return read_manifest(folder)
    except PolicyError as error:
        raise PublishError(str(error)) from error


def is_shared(path: str) -> bool:
    return not any(matches(part, NOT_SHARED) for part in path.split("/"))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def model_card(folder: Path, manifest: dict, repo: str, data_repo: str | None, report: str | None) -> str:
    """The card that train_sft.py wrote, with where the model and its data are on the Hub, and its evaluation."""
    card = load_card(ModelCard, folder / CARD)
    data = "The data it was tuned on are not on the Hub."
    if data_repo:
        card.data["datasets"] = [data_repo]
        data = f"It was tuned on [{data_repo}](https://huggingface.co/datasets/{data_repo}), `{manifest['task']}`."
    if os.path.exists(manifest["base_model"]):
        data += (
            f" Its base, `{manifest['base_model']}`, is a folder on the machine that tuned it, and not shared here."
        )
        print(f"Note: nobody else can load it, for its base, {manifest['base_model']}, is a folder on this machine.")
    card.text = fill(card.text, "loading", "Use it", f"{HOW_TO_DECIDE.format(repo=repo)}\n\n{data}")
    evaluation = read_report(folder, report)
    if evaluation:
        card.text = fill(card.text, "evaluation", "Evaluation", evaluation)
    return str(card)


HOW_TO_DECIDE = """\
```python
from huggingface_hub import snapshot_download
from policy import Policy

policy = Policy.load(snapshot_download("{repo}"))
```"""


def read_report(folder: Path, given: str | None) -> str | None:
    """The figures of a metrics.json for the card; None if none was given and report/ has none of this model."""
    path = Path(given or REPORT)
    if not given and not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        of_this_model = found["model"] is not None and Path(found["model"]).resolve() == folder.resolve()
        if of_this_model and found["metrics_version"] == metrics.VERSION:
            return describe_report(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f"{path} is no metrics.json of evaluate_policy.py ({type(error).__name__}: {error})."
        ) from error
    if given:
        raise PublishError(
            f"{path} is of {found['model'] or 'the baselines alone'}, with metrics of version "
            f"{found['metrics_version']}. Run: python evaluate_policy.py --model {folder}"
        )
    print(f"{path} is not of {folder}: the card is made without it.")
    return None


def describe_report(found: dict) -> str:
    """The model beside the best rule, the teacher and never selling, for each exit style."""
    parts = [
        f"By `evaluate_policy.py` on the {found['split']} split; [95 % intervals]; P&L in USD a unit, against HODL."
    ]
    for group in found["groups"]:
        if group["group"] == ALL:
            since, until = group["from"][:10], group["to"][:10]
            parts.append(f"**{group['exit_style']}**: {group['decisions']:,} decisions, {since} to {until}")
            rows = {name: group["rows"][name] for name in (MODEL, found["best_rule"], TEACHER, HODL)}
            figures = {who: {name: figure(of[name]) for name in REPORTED} for who, of in rows.items()}
            parts.append(markdown_table(figures, REPORTED))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in found["notes"])])


def figure(saved: dict) -> metrics.Figure:
    low, high = (float("nan") if saved[end] is None else saved[end] for end in ("low", "high"))
    return metrics.Figure(low, high, saved["interval"])


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("repo", nargs="?", metavar="USER/NAME", help="the repo on the Hub; made if there is none")
    add("--to", metavar="DIR", help="write the files into a folder, and push nothing")
    add("--dry-run", "--dry_run", action="store_true", help="print files, sizes, rows and the card, and stop")
    add("--revision", metavar="BRANCH", help="push to this branch, made if it is missing; default: main")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help="make the repo private")
    visibility.add_argument(
        "--public", action="store_true", help="make it public; must be said of data other than the sample"
    )
    made = parser.add_argument_group("datasets")
    made.add_argument("--configs", nargs="+", choices=list(RECORDS), metavar="CONFIG", help=f"of {', '.join(RECORDS)}")
    made.add_argument("--card", metavar="FILE", help="default: dataset_card.md")
    made.add_argument("--max_shard_size", "--max-shard-size", metavar="SIZE", help=f"default: {MAX_SHARD_SIZE}")
    made.add_argument("--hindsight", action="store_true", help="prompts that print outcomes, and so the answers")
    made.add_argument("--allow-hindsight", "--allow_hindsight", action="store_true", help="share leaking prompts")
    add_data_options(parser, "as for train_sft.py; default: the CSVs in data/, else the simulated sample")
    model = parser.add_argument_group("a tuned model")
    model.add_argument("--adapter", metavar="FOLDER", help="share what train_sft.py saved; private unless --public")
    model.add_argument("--data_repo", "--data-repo", metavar="USER/DATA", help="the dataset it was tuned on")
    model.add_argument("--report", metavar="FILE", help=f"default: {REPORT.as_posix()}, if it is of this model")
    return check_arguments(parser, typed(parser, parser.parse_args(arguments)))


def check_arguments(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> argparse.Namespace:
    of_data = ("to", "configs", "card", "max_shard_size", "hindsight", "allow_hindsight", "data_files", "data_dir")
    of_model = ("data_repo", "report")
    stray = [name for name in ((*of_data, *DATA_OPTIONS) if asked.adapter else of_model) if getattr(asked, name)]
    if stray:
        parser.error(f"--{stray[0]} {'does not go' if asked.adapter else 'goes'} with --adapter.")
    if not asked.repo and (asked.adapter or not asked.to):
        parser.error(f"say where to: USER/NAME{'' if asked.adapter else ', or --to DIR'}, before the other options.")
    for repo in filter(None, (asked.repo, asked.data_repo)):
        check_name(parser, repo)
    return asked


def check_name(parser: argparse.ArgumentParser, repo: str) -> None:
    try:
        validate_repo_id(repo)
    except ValueError as error:
        parser.error(str(error))
    if "/" not in repo:
        parser.error(f"{repo!r}: give it with its owner, as USER/NAME.")


def shard_size(asked: argparse.Namespace) -> int:
    text = asked.max_shard_size or MAX_SHARD_SIZE
    try:
        size = convert_file_size_to_int(text)
    except ValueError:
        size = 0
    if size <= 0:
        raise PublishError(f"--max_shard_size {text}: give a size such as 500MB.")
    return size


def publish(asked: argparse.Namespace) -> None:
    """Builds the datasets and pushes them, writes them to a folder, or only shows them."""
    files, config = data_options(asked, {})
    names, size, pushes = asked.configs or list(RECORDS), shard_size(asked), not (asked.to or asked.dry_run)
    target = Path(asked.to).absolute() if asked.to else None
    private = None if target else check_visibility(asked, files)
    card = read_card(asked.card or str(HERE / "dataset_card.md"), files)
    if target:
        check_folder(target)
    if pushes:
        check_login()
    logged, splits = read_splits(files, config)
    check_leaks(splits, config, names, asked.allow_hindsight)
    with folder_to_fill(target) as folder:
        built = [build(name, files, config, folder, size) for name in names]
        statistics = describe_data(built, logged, splits, config)
        text = fill_card(card, asked.repo or asked.to, asked.revision, statistics, built)
        (folder / CARD).write_text(text, encoding="utf-8")
        print(listing(folder))
        if asked.dry_run:
            print(f"\n{text}")
        elif target:
            put_in_place(folder, target)
        else:
            tree = {path: folder / path for path in files_below(folder)}
            push(tree, asked.repo, "dataset", private, asked.revision, OWNED.fullmatch)


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    asked = parse_arguments(arguments)
    try:
        if asked.adapter:
            if not asked.dry_run:
                check_login()
            push_model(
                asked.adapter,
                asked.repo,
                private=not asked.public,
                revision=asked.revision,
                data_repo=asked.data_repo,
                report=asked.report,
                dry_run=asked.dry_run,
            )
        else:
            publish(asked)
    except (PublishError, CandidatesError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
