"""The verb publish: shares the datasets, or a tuned model, as Parquet or an adapter with a card, in one commit.

    covered-call publish USER/NAME --dry-run                     # what would be pushed; needs no network
    covered-call publish USER/NAME                               # the simulated sample, public
    covered-call publish USER/NAME --data_files 'runs/*.csv' --card my_card.md --private
    covered-call publish --to DIR                                # the same files into a folder
    covered-call publish --adapter out/ranking --to DIR          # a tuned model, with all that reproduces it
    covered-call publish --adapter out/ranking USER/NAME --data_repo USER/DATA --report report/metrics.json

After it ``load_dataset("USER/NAME", "per_candidate")`` works on any version of datasets, with no trust flag. Pushing
again what has not changed makes no commit; a push that fails leaves the repo as it was.
"""

import argparse
from pathlib import Path

from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import DatasetCard
from huggingface_hub.utils import validate_repo_id

from covered_call.candidates.builder import Backtest
from covered_call.candidates.data_options import DATA_OPTIONS, FILES, Help, add_data_options, backtest_of, flags, typed
from covered_call.candidates.records import RECORDS
from covered_call.candidates.schema import CandidatesError
from covered_call.candidates.source import HOME
from covered_call.command_line import plain_errors, start_logging
from covered_call.publishing.dataset import (
    CARD,
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
from covered_call.publishing.hub import PublishError, check_login, push, tell

DATASET_CARD = HOME / "dataset_card.md"
MAX_SHARD_SIZE = "500MB"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call publish", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add_places(parser)
    add_datasets(parser)
    add_data_options(parser)
    add_model(parser)
    return check_arguments(parser, typed(parser, parser.parse_args(arguments)))


def add_places(parser: argparse.ArgumentParser) -> None:
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


def add_datasets(parser: argparse.ArgumentParser) -> None:
    made = parser.add_argument_group("datasets")
    made.add_argument(
        "--configs", nargs="+", choices=list(RECORDS), metavar="CONFIG", help=f"of {', '.join(RECORDS)}; default: all"
    )
    made.add_argument(
        "--card", metavar="FILE", help=f"the card to fill in; default: {DATASET_CARD.name} of a checkout"
    )
    made.add_argument(
        *flags("max_shard_size"), metavar="SIZE", help=f"of a Parquet file, in memory; default: {MAX_SHARD_SIZE}"
    )
    made.add_argument("--hindsight", action="store_true", help="prompts that print outcomes, and so the answers")
    made.add_argument(*flags("allow_hindsight"), action="store_true", help="share prompts that name their answers")


def add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("a tuned model")
    model.add_argument("--adapter", metavar="FOLDER", help="share what a training saved here, in place of datasets")
    model.add_argument(*flags("data_repo"), metavar="USER/DATA", help="the dataset it was tuned on; default: not said")
    model.add_argument(
        "--report",
        metavar="FILE",
        help="its evaluation, for the card; default: report/metrics.json, if it is of this model",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    of_data = ("configs", "card", "max_shard_size", "hindsight", "allow_hindsight", *FILES, *DATA_OPTIONS)
    of_model = ("data_repo", "report")
    stray = [name for name in (of_data if args.adapter else of_model) if getattr(args, name)]
    if stray:
        parser.error(f"--{stray[0]} {'does not go' if args.adapter else 'goes'} with --adapter.")
    if not args.repo and not args.to:
        parser.error("say where to: USER/NAME, or --to DIR, before the other options.")
    for repo in filter(None, (args.repo, args.data_repo)):
        check_name(parser, repo)
    return args


def check_name(parser: argparse.ArgumentParser, repo: str) -> None:
    try:
        validate_repo_id(repo)
    except ValueError as error:
        parser.error(str(error))
    if "/" not in repo:
        parser.error(f"{repo!r}: give it with its owner, as USER/NAME.")


def shard_size(args: argparse.Namespace) -> int:
    """In bytes."""
    text = args.max_shard_size or MAX_SHARD_SIZE
    try:
        size = convert_file_size_to_int(text)
    except ValueError:
        size = 0
    if size <= 0:
        raise PublishError(f"--max_shard_size {text}: give a size such as 500MB.")
    return size


def card_file(args: argparse.Namespace) -> str:
    """The card to fill in. The one of the sample is in a checkout only: of what is installed no other is made."""
    if not args.card and not DATASET_CARD.is_file():
        raise PublishError(
            f"There is no {DATASET_CARD.name} to fill in, for this is not a checkout: give a card that describes "
            "your data with --card FILE."
        )
    return args.card or str(DATASET_CARD)


def publish(args: argparse.Namespace) -> None:
    """Builds the datasets and pushes them, writes them to a folder, or only shows them."""
    backtest, size = backtest_of(args, {}), shard_size(args)
    target = Path(args.to).absolute() if args.to else None
    private = target is None and check_visibility(backtest.files, args.private, args.public)
    card = read_card(card_file(args), backtest.files)
    if target:
        check_folder(target)
    elif not args.dry_run:
        check_login()
    with workplace(None if args.dry_run else target) as scratch:
        folder = scratch / "new"
        text = make(folder, backtest, card, size, args)
        print(listing(folder))
        if args.dry_run:
            print(f"\n{text}")
        elif target:
            put_in_place(folder, target)
        else:
            tree = {path: folder / path for path in files_below(folder)}
            push(tree, args.repo, "dataset", private, args.revision, OWNED.fullmatch)


def make(folder: Path, backtest: Backtest, card: DatasetCard, size: int, args: argparse.Namespace) -> str:
    """Writes the shards and the filled card into ``folder``, and returns the card."""
    names = args.configs or list(RECORDS)
    tell(f"Reading {len(backtest.files)} files, and looking for prompts that name their answer")
    check_leaks(backtest, names, args.allow_hindsight)
    built = [build(name, backtest, folder, size) for name in names]
    text = fill_card(
        card, args.repo or str(Path(args.to).absolute()), args.revision, describe_data(built, backtest), built
    )
    (folder / CARD).write_text(text, encoding="utf-8")
    return text


def main(arguments: list[str]) -> None:
    start_logging()
    args = parse_arguments(arguments)
    with plain_errors(args, PublishError, CandidatesError):
        if args.adapter:
            share_model(args)
        else:
            publish(args)


def share_model(args: argparse.Namespace) -> None:
    from covered_call.publishing.model import push_model  # imports what evaluates: a second that data need not wait

    if not (args.dry_run or args.to):
        check_login()
    push_model(
        args.adapter,
        args.repo,
        private=not args.public,
        revision=args.revision,
        data_repo=args.data_repo,
        report=args.report,
        dry_run=args.dry_run,
        to=args.to,
    )
