"""The builder of the data sets: which files are read, and under which key they are cached."""

import dataclasses
import functools
import glob
import hashlib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError

from covered_call.candidates.columns import Columns, Grounds, logged_of
from covered_call.candidates.decisions import Decisions, grounds_for, hashes_of, read_decisions
from covered_call.candidates.options import (
    OUTCOMES,
    PATHS,
    CoveredCallCandidatesConfig,
    PreferenceConfig,
    QValuesConfig,
    check_options,
    kind_of,
    names_of,
    options_of,
)
from covered_call.candidates.preferences import preferred_pairs
from covered_call.candidates.records import RECORDS, features_of, more_columns
from covered_call.candidates.schema import CandidatesError, LoggedDecision, printable, shown
from covered_call.candidates.source import CODE_HASH, HOME, check_current
from covered_call.candidates.splits import split_places
from covered_call.candidates.spool import Spool
from covered_call.candidates.vols import UNDERLYING

logger = logging.getLogger(__name__)

CSV_PATTERNS = ("training_candidates_*.csv", "training_candidates_*.csv.gz")
VERSION = datasets.Version("2.0.0")  # of all configs: what their columns are called and mean
SHARDS = 16  # a split's decisions are cut into this many parts, so that num_proc and data loader workers can share
RECORDS_AT_ONCE = 100  # made dicts of a table when they are streamed
STREAMS_TYPED = ("3.6.0", "5.2.0")  # the versions of datasets that TypedExamples has been tried with
table_key = getattr(datasets.builder, "Key", "{}_{}".format)  # of a shard's place and its table's; 3.6 has no class


class TypedExamples(getattr(datasets.iterable_dataset, "_BaseExamplesIterable", object)):
    """Streamed records that are known to have the types of the features.

    Of others the library makes a table each and casts it, which takes most of the time of a stream. What is overridden
    here is the library's own, and not for others to rely on.
    """

    features: Any = None  # the library's is a property

    def __init__(self, ex_iterable, features: datasets.Features | None):
        super().__init__()
        self.ex_iterable, self.features = ex_iterable, features

    def __iter__(self):
        return iter(self.ex_iterable)

    def _iter_arrow(self):
        return self.ex_iterable._iter_arrow()

    @property
    def iter_arrow(self):
        return self._iter_arrow if self.ex_iterable.iter_arrow else None

    @property
    def is_typed(self) -> bool:
        return self.iter_arrow is not None  # datasets 3.6 cannot filter what says that it is

    @property
    def num_shards(self) -> int:
        return self.ex_iterable.num_shards

    def _init_state_dict(self) -> dict:
        self._state_dict = self.ex_iterable._init_state_dict()
        return self._state_dict

    def shuffle_data_sources(self, *how):
        return TypedExamples(self.ex_iterable.shuffle_data_sources(*how), self.features)

    def shard_data_sources(self, *which, **how):
        return TypedExamples(self.ex_iterable.shard_data_sources(*which, **how), self.features)

    def reshard_data_sources(self):
        return self  # the builder knows no smaller shards


class CoveredCallCandidates(  # ty: ignore[incompatible-method-override]  # _prepare_split is that of the tables
    datasets.ArrowBasedBuilder, datasets.GeneratorBasedBuilder
):
    """Builds the datasets from candidate CSVs; see CoveredCallCandidatesConfig for the options."""

    config: CoveredCallCandidatesConfig
    DEFAULT_WRITER_BATCH_SIZE = 16_384  # records; of smaller batches a file has more, and reading it maps more
    BUILDER_CONFIG_CLASS = CoveredCallCandidatesConfig
    BUILDER_CONFIGS = [
        CoveredCallCandidatesConfig(
            name="per_candidate",
            version=VERSION,
            description="One chat a candidate option, answered SELL_CALL or SKIP.",
        ),
        CoveredCallCandidatesConfig(
            name="per_decision_ranking",
            version=VERSION,
            description="One chat a decision, answered with a candidate's index, 1..N, or NO_TRADE.",
        ),
        PreferenceConfig(
            name="preference",
            version=VERSION,
            description="One pair of answers a decision: the one that brought most, and a worse one.",
        ),
        QValuesConfig(
            name="q_values",
            version=VERSION,
            description="One row of numbers a candidate option, with what selling it brought.",
        ),
    ]
    DEFAULT_CONFIG_NAME = "per_candidate"

    def __init__(self, *args, data_files=None, data_dir=None, base_path=None, hash=None, backtest=None, **options):
        self.backtest = backtest
        # The library makes a folder's name of it, which it replaces when it prepares the data anew.
        if hash is not None and not re.fullmatch(r"[\w-]+", str(hash)):
            raise CandidatesError(f"hash={shown(hash)}: give letters and digits, or leave it out.")
        base_path = base_path or str(HOME)
        check_current(base_path)
        options = {name: value for name, value in options.items() if value is not None}
        check_options(options.get("config_name", self.DEFAULT_CONFIG_NAME), options)
        # The library makes its cache key from what it is given here. Resolved files with the hash of their
        # content, and the hash of this code, are what make an edited CSV or prompt give new rows; so is that of an
        # iv_file. Its own version is there because an older one cannot read what a newer one wrote: 3.6 knows
        # nothing of the features of 4.
        vols = "".join(hash_of_vols(options.get(name)) for name in PATHS)
        super().__init__(
            *args,
            data_files=backtest.data_files if backtest else fingerprint(find_csvs(data_files, data_dir, base_path)),
            base_path=base_path,
            hash=f"{hash or CODE_HASH}-datasets-{datasets.__version__}{vols}",
            **options,
        )

    def get_exported_dataset_info(self):
        return datasets.DatasetInfo()  # the library would look for it in README.md, and complain that there is none

    def _info(self):
        features = features_of(self.config.name, more_columns(self.config.name, self.config))
        return datasets.DatasetInfo(description=self.config.description or "", features=features)

    def _split_generators(self, dl_manager):
        assert isinstance(self.config.data_files, DataFilesDict)  # as __init__ has made it
        backtest = self.backtest or Backtest(list(self.config.data_files["train"]), self.config)
        self.backtest = None  # num_proc sends the builder to each process
        generators = []
        decisions = backtest.decisions
        if self.config.explain:
            backtest.grounds(self.config.name)
        for name, numbers in backtest.numbers.items():
            numbers = with_record(decisions, numbers, self.config)
            if len(numbers):
                shards = shards_of(decisions, numbers)
                generators.append(datasets.SplitGenerator(name=name, gen_kwargs={"shards": shards}))
            else:  # datasets cannot hold a split without rows
                logger.warning("Split %s is empty, and left out.", name)
        if not generators:
            raise CandidatesError(
                f"No split of {self.config.name} has a record: the files hold no candidate, or no outcome is known, "
                "or the purge took all."
            )
        return generators

    # GeneratorBasedBuilder's own asks for a check of each record's key, which tables have not.
    _download_and_prepare = datasets.DatasetBuilder._download_and_prepare

    def _generate_tables(self, shards):  # ty: ignore[incompatible-method-override]
        for shard_place, shard in enumerate(shards):
            for place, columns in enumerate(shard.columns()):
                yield table_key(shard_place, place), RECORDS[self.config.name](columns, self.config)

    def _generate_examples(self, shards):  # ty: ignore[incompatible-method-override]
        for key, table in self._generate_tables(shards):
            records = (record for batch in table.to_batches(RECORDS_AT_ONCE) for record in batch.to_pylist())
            for place, record in enumerate(records):
                yield f"{key}_{place}", record

    def _get_examples_iterable_for_split(self, split_generator):
        # A stream of tables that is mapped and resumed begins in 3.6 with the next table, and not the next record.
        in_tables = int(datasets.__version__.split(".")[0]) >= 5
        kind = datasets.ArrowBasedBuilder if in_tables else datasets.GeneratorBasedBuilder
        examples = kind._get_examples_iterable_for_split(self, split_generator)
        return TypedExamples(examples, self.info.features) if datasets.__version__ in STREAMS_TYPED else examples


def hash_of_vols(path: str | None) -> str:
    """Of the content of all files that it may name; those that are missing are an error when they are read."""
    if path is None:
        return ""
    digest = hashlib.sha256()
    pattern = "*".join(map(glob.escape, os.path.expanduser(path).split(UNDERLYING)))
    for found in sorted(filter(os.path.isfile, glob.glob(pattern))):
        with open(found, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"-{digest.hexdigest()[:16]}"


class Shard(NamedTuple):
    """Some decisions of a split, for a process of its own: the places in the spool of each of its batches."""

    spool: Spool
    batches: list[np.ndarray]

    def columns(self) -> Iterator[Columns]:
        return map(self.spool.take, self.batches)


def shards_of(decisions: Decisions, numbers: np.ndarray) -> list[Shard]:
    """At most SHARDS pieces, one after the other, of nearly equal length."""
    size = math.ceil(len(numbers) / SHARDS)
    pieces = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return [Shard(decisions.spool, [decisions.place[its] for its in decisions.batches(piece)]) for piece in pieces]


def with_record(decisions: Decisions, numbers: np.ndarray, options: CoveredCallCandidatesConfig) -> np.ndarray:
    """The numbers of those decisions of which the config has a record."""
    if not isinstance(options, PreferenceConfig):
        has = decisions.size[numbers] > 0
        return numbers if options.name == "per_decision_ranking" or has.all() else numbers[has]
    pairs = [preferred_pairs(decisions.columns(batch), options) for batch in decisions.batches(numbers)]
    return numbers[np.concatenate([np.zeros(0, bool), *(pair.has for pair in pairs)])]


class Backtest:
    """The decisions of some files: read when they are first asked for, and once, whatever is made of them.

    Args:
        options: of reading, outcomes and splits.
    """

    def __init__(self, files: list[str], options: CoveredCallCandidatesConfig):
        self.files, self.options = files, options

    @functools.cached_property
    def data_files(self) -> DataFilesDict:
        """The files with their hashes, as the library takes them."""
        given = self.options.data_files
        return given if isinstance(given, DataFilesDict) else fingerprint(self.files)

    @property
    def hashes(self) -> dict[str, str]:
        """From each file's path to the SHA-256 of its content, as it was when it was first asked for, or read."""
        return hashes_of(self.data_files)

    @functools.cached_property
    def decisions(self) -> Decisions:
        """All of them.

        Raises:
            CandidatesError: as read_decisions does, also for a file that has changed since it was hashed.
        """
        return read_decisions(self.files, dataclasses.replace(self.options, data_files=self.data_files))

    @functools.cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        """Of those of each split, by time; see split_places."""
        return split_places(self.decisions.time, self.decisions.label_end, self.options)

    def grounds(self, task: str) -> Grounds:
        """What explanations of a task's answers rest on, of the training split."""
        return grounds_for(task, self.decisions, self.numbers["train"])

    @functools.cached_property
    def logged(self) -> list[LoggedDecision]:
        """All of them one by one, by decision time, each with its candidates in the order that prompts show."""
        return logged_of(self.decisions.columns())

    @functools.cached_property
    def splits(self) -> dict[str, list[LoggedDecision]]:
        """Those of each split."""
        return {name: [self.logged[number] for number in numbers] for name, numbers in self.numbers.items()}

    def load(self, name: str, cache_dir: str | None = None, num_proc: int | None = None, **options):
        """A config as load_candidates gives it, without reading the files again.

        Args:
            options: beside those of the backtest, such as min_edge. None may be one of reading, outcomes or splits.

        Raises:
            CandidatesError: for options that cannot be used, or a split that would be empty.
        """
        kind = kind_of(name)
        late = [option for option in names_of(kind, OUTCOMES) if options.get(option) is not None]
        if late:
            raise CandidatesError(f"{late[0]} is for the options of the backtest, which computes its outcomes once.")
        both = options_of(kind if isinstance(self.options, kind) else CoveredCallCandidatesConfig)
        shared = {one.name: getattr(self.options, one.name) for one in both}
        changed = {one.name: shared[one.name] for one in both if shared[one.name] != one.default}
        return loaded(name, num_proc, cache_dir=cache_dir, backtest=self, **changed | options)


def find_csvs(data_files: str | Iterable[str] | None, data_dir: str | None, base_path: str) -> list[str]:
    """Absolute paths of the CSVs to read: those named, else those in data/, else the simulated sample."""
    if isinstance(data_files, dict):
        raise CandidatesError(
            "data_files takes a path, a glob or a list of them, not a dict: the splits are made by decision time "
            "(see the options splits, validation_from and test_from)."
        )
    if data_files is not None:
        one = isinstance(data_files, (str, bytes, os.PathLike)) or not hasattr(data_files, "__iter__")
        one = one or getattr(data_files, "ndim", 1) == 0  # an array of numpy's that is one value
        patterns = [data_files] if one else list(data_files)
        if not patterns:
            raise CandidatesError("data_files is an empty list: give a path, a glob, or leave it out.")
        folder = "" if data_dir is None else path_of("data_dir", data_dir)
        patterns = [path_of("data_files", pattern) for pattern in patterns]
        return list(dict.fromkeys(path for pattern in patterns for path in match(pattern, folder)))
    if data_dir is not None:
        return match("*.csv", path_of("data_dir", data_dir), or_gzipped=True)
    for folder, what in (("data", "the CSVs"), (os.path.join("data", "sample"), "the simulated sample")):
        place = glob.escape(os.path.join(base_path, folder))
        found = [path for pattern in CSV_PATTERNS for path in glob.glob(os.path.join(place, pattern))]
        if found:
            say_which(what, os.path.join(base_path, folder))
            return sorted(map(os.path.abspath, found))
    raise CandidatesError(f"No {CSV_PATTERNS[0]} in {os.path.join(base_path, 'data')} and no sample: give data_files.")


@functools.cache  # once, however often a command looks
def say_which(what: str, folder: str) -> None:
    logger.warning("No data_files given: reading %s in %s.", what, folder)


def path_of(option: str, path) -> str:
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else b""
    if not isinstance(text, str) or "\0" in text or any("\ud800" <= character <= "\udbff" for character in text):
        raise CandidatesError(f"{option}={shown(path)}: give a path, a glob such as 'runs/*.csv', or a list of them.")
    return os.path.expanduser(text)


def match(pattern: str, folder: str = "", or_gzipped: bool = False) -> list[str]:
    """Files that a path or glob names, relative to ``folder`` (no glob) or the current one, sorted."""
    path = os.path.abspath(os.path.join(folder, pattern))
    pattern = os.path.join(glob.escape(os.path.abspath(folder)), pattern)
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    found += glob.glob(pattern + ".gz") if or_gzipped else []
    found = sorted(os.path.abspath(one) for one in found if os.path.isfile(one))
    if not found:
        raise CandidatesError(
            f"No file matches {printable(path, 1_000)}. Give a path, a glob such as 'runs/*.csv', or a list."
        )
    return found


def fingerprint(paths: list[str]) -> DataFilesDict:
    """The files with a hash of their content, where ``datasets`` itself would note the time of change."""
    hashes: list[tuple] = []
    for path in paths:
        with open(path, "rb") as file:
            hashes.append((hashlib.file_digest(file, "sha256").hexdigest(),))
    return DataFilesDict({"train": DataFilesList(paths, hashes)})


def load_candidates(
    name: str = "per_candidate", *, data_files=None, cache_dir=None, streaming=False, num_proc=None, **options
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Loads a config on any datasets version, with no trust flag.

    Args:
        name: "per_candidate", "per_decision_ranking", "preference" or "q_values".
        data_files: a path, a glob or a list of them; default ``data/training_candidates_*.csv`` beside this script,
            else the simulated sample.
        cache_dir: where the Arrow files go, default the Hugging Face cache.
        streaming: render while iterating, without a cache.
        num_proc: processes that render.
        options: ``data_dir``, and those of CoveredCallCandidatesConfig (PreferenceConfig for "preference",
            QValuesConfig for "q_values").

    Raises:
        CandidatesError: for files or options that cannot be used.
    """
    return loaded(name, num_proc, streaming, data_files=data_files, cache_dir=cache_dir, **options)


def loaded(
    name: str,
    num_proc: int | None,
    streaming: bool = False,
    *,
    cache_dir=None,
    data_files=None,
    backtest: Backtest | None = None,
    **options,
):
    check_call(name, options, cache_dir=cache_dir, streaming=streaming, num_proc=num_proc)
    try:
        files = {"backtest": backtest} if backtest else {"data_files": data_files}
        builder = CoveredCallCandidates(config_name=name, cache_dir=cache_dir, **files, **options)
        if streaming:
            return builder.as_streaming_dataset()
        builder.download_and_prepare(num_proc=num_proc)
        return builder.as_dataset()
    except (OSError, DatasetGenerationError) as error:
        raise plain_error(error) from error


def check_call(name, options: dict, cache_dir, streaming, num_proc) -> None:
    """Raises CandidatesError for an argument of load_candidates that is none."""
    if not isinstance(name, str) or name not in RECORDS:
        raise CandidatesError(f"{shown(name)} is no config: choose one of {', '.join(RECORDS)}.")
    known = ["data_dir", *names_of(kind_of(name))]
    strange = [option for option in options if option not in known]
    if strange:
        raise CandidatesError(f"{shown(strange[0])[1:-1]} is no option of {name}: choose from {', '.join(known)}.")
    if cache_dir is not None:
        path_of("cache_dir", cache_dir)
    if not isinstance(streaming, bool):
        raise CandidatesError(f"streaming={shown(streaming)}: give True or False.")
    if num_proc is not None and (isinstance(num_proc, bool) or not isinstance(num_proc, int) or num_proc < 1):
        raise CandidatesError(f"num_proc={shown(num_proc)}: give a whole number from 1, or leave it out.")


def plain_error(error: BaseException) -> CandidatesError:
    """What went wrong while files were read or the cache was written, whatever the library made of it."""
    while error.__cause__ is not None and not isinstance(error, (OSError, CandidatesError)):
        error = error.__cause__
    if isinstance(error, CandidatesError):
        return error
    return CandidatesError(
        f"The data cannot be read, or the cache not be written: {error}. Is the disk full, or the file not yours? "
        "cache_dir, or HF_HOME in the environment, says where the cache is."
    )
