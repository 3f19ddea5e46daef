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
import sys
from pathlib import Path

from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub.utils import validate_repo_id

from covered_call.candidates.records import RECORDS
from covered_call.candidates.schema import CandidatesError
from covered_call.candidates.source import HOME
from covered_call.command_line import as_typed, disk_trouble, start_logging
from covered_call.data_options import DATA_OPTIONS, add_data_options, data_options, flags, read_splits, typed
from covered_call.publishing.dataset import (
    OWNED,
    build,
    check_folder,
    check_leaks,
    check_visibility,
    describe_data,
    files_below,
    fill_card,
    listing,
    put_in_place,
    read_card,
    workplace,
)
from covered_call.publishing.hub import check_login, push, tell
from covered_call.publishing.model import REPORT, push_model
from covered_call.publishing.private import CARD, PublishError

DATASET_CARD = HOME / "dataset_card.md"
MAX_SHARD_SIZE = "500MB"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    where = parser.add_argument_group("where to")
    where.add_argument("repo", nargs="?", metavar="USER/NAME", help="the repo on the Hub; made if there is none")
    where.add_argument("--to", metavar="DIR", help="write the files into this folder, and push nothing")
    where.add_argument(
        *flags("dry_run"), action="store_true", help="print files, sizes in bytes, rows and the card, and stop"
    )
    where.add_argument(
        "--revision", metavar="BRANCH", help="push to this branch, made if it is missing; default: main"
    )
    visibility = where.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help="make the repo private; default: of a model")
    visibility.add_argument(
        "--public",
        action="store_true",
        help="make it public; default: of the simulated sample, other data need a word",
    )
    made = parser.add_argument_group("datasets")
    made.add_argument(
        "--configs", nargs="+", choices=list(RECORDS), metavar="CONFIG", help=f"of {', '.join(RECORDS)}; default: all"
    )
    made.add_argument("--card", metavar="FILE", help=f"the card to fill in; default: {DATASET_CARD.name}")
    made.add_argument(
        *flags("max_shard_size"), metavar="SIZE", help=f"of a Parquet file, in memory; default: {MAX_SHARD_SIZE}"
    )
    made.add_argument("--hindsight", action="store_true", help="prompts that print outcomes, and so the answers")
    made.add_argument(*flags("allow_hindsight"), action="store_true", help="share prompts that name their answers")
    add_data_options(parser)
    model = parser.add_argument_group("a tuned model")
    model.add_argument("--adapter", metavar="FOLDER", help="share what train_sft.py saved here, in place of datasets")
    model.add_argument(*flags("data_repo"), metavar="USER/DATA", help="the dataset it was tuned on; default: not said")
    model.add_argument(
        "--report",
        metavar="FILE",
        help=f"its evaluation, for the card; default: {REPORT.as_posix()}, if it is of this model",
    )
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
    card = read_card(asked.card or str(DATASET_CARD), files)
    if target:
        check_folder(target)
    if pushes:
        check_login()
    with workplace(None if asked.dry_run else target) as scratch:
        tell(f"Reading {len(files)} files")
        logged, splits = read_splits(files, config)
        tell("Looking for prompts that name their answer")
        check_leaks(splits, config, names, asked.allow_hindsight)
        folder = scratch / "new"
        built = [build(name, files, config, folder, size) for name in names]
        statistics = describe_data(built, logged, splits, config)
        text = fill_card(card, asked.repo or str(target), asked.revision, statistics, built)
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
    start_logging()
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
    except (PublishError, CandidatesError) as error:
        sys.exit(f"error: {as_typed(error, asked)}")
    except OSError as error:
        sys.exit(f"error: {disk_trouble(error) or error}")
