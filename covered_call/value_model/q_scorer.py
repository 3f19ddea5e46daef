"""What would selling this call bring? Gradient boosting on counterfactual outcomes, used as a policy.

    python q_scorer.py                                                   # on the simulated sample
    python q_scorer.py --data_files 'runs/*.csv' --optimize              # search threshold and gates on validation
    python q_scorer.py --data_files 'runs/*.csv' --horizon 3 --fee 0.0003 --positive_weight 1.5
    python evaluate_policy.py --baselines-only --q_scorer out/q_scorer/q_scorer.zip

A regressor predicts each candidate's net outcome (``q_sell``; holding is worth 0), a classifier the probability that
it is positive. The best candidate is sold if both like it enough, else nothing is. Outcomes are learnt as a share of
spot, and thresholds are in % of spot: the same number then means the same at 4,000 and at 100,000 USD, and for any
underlying. What is told of outcomes is in USD a unit of underlying, as everywhere else.

The test split is never looked at. A saved file is a zip of numbers and text: loading one runs no code of its own.
"""

import argparse
import os
import sys
from pathlib import Path

from covered_call import atomic
from covered_call.candidates.builder import fingerprint
from covered_call.candidates.reading import hashes_of
from covered_call.candidates.schema import CandidatesError
from covered_call.command_line import as_typed, disk_trouble, start_logging
from covered_call.data_options import Help, add_data_options, data_options, flags, read_splits, typed
from covered_call.tables import align
from covered_call.value_model.gate_search import draw_grid, grid_csv, optimize, search_json, search_lines
from covered_call.value_model.scorer import (
    FILE_NAME,
    Fitted,
    Gates,
    calibrate,
    check_weight,
    gates_text,
    learn,
    to_bytes,
)
from covered_call.value_model.walk_forward import FOLDS, fold_json, fold_rows, walk_forward

GRID, PICTURE = "grid.csv", "grid.png"


def run(asked: argparse.Namespace) -> None:
    gates = Gates(asked.threshold or 0.0, asked.min_confidence or 0.0, asked.min_abs_return or 0.0)
    gates.check()
    check_weight(asked.positive_weight)
    files, config = data_options(asked, {})
    folder = Path(asked.output_dir)
    with atomic.locked(folder):
        print(f"Reading {len(files)} file(s) ...", flush=True)
        config.data_files = fingerprint(files)
        _, splits = read_splits(files, config)
        fitted, made = fit_all(asked, gates, config, splits["train"], splits.get("validation", []))
        hashes = {os.path.basename(path): sha256 for path, sha256 in hashes_of(config.data_files).items()}
        fitted = fitted._replace(metadata=fitted.metadata | {"data_files": hashes})
        # Where a scorer stands, a grid beside it is that scorer's.
        old = (GRID, PICTURE) if (folder / FILE_NAME).is_file() else ()
        atomic.write_together(folder, {FILE_NAME: to_bytes(fitted), **made}, old)
    print(f"Saved {', '.join(str(folder / name) for name in (FILE_NAME, *made))}: {gates_text(fitted.gates)}")
    print(
        f"Next: judge it on the test split: python evaluate_policy.py --baselines-only --q_scorer {folder / FILE_NAME}"
    )


def fit_all(asked: argparse.Namespace, gates: Gates, config, train: list, validation: list) -> tuple[Fitted, dict]:
    """Prints what was learnt and how it held; returns the scorer, and by name the files that go with it."""
    print("Learning, calibrating ...", flush=True)
    fitted, search, made, more = learn(train, config, asked.positive_weight), None, {}, {}
    if asked.optimize:
        print("Searching for gates ...", flush=True)
        fitted, search = optimize(fitted, validation, config)
        made, more = {GRID: grid_csv(search.grid), PICTURE: draw_grid(search)}, {"optimize": search_json(search)}
    else:
        fitted = calibrate(fitted, validation, config).with_gates(gates)
    for name in ("train", "validation"):
        print(split_sentence(name, fitted.metadata[name]))
    print(f"Offset fitted on validation: {100 * fitted.metadata['offset']:+.3f} % of spot")
    folds = []
    if asked.folds:
        print(f"Walking forward in {asked.folds} folds ...", flush=True)
        folds = walk_forward([*train, *validation], asked.folds, config, asked.positive_weight, gates)
        table = align(fold_rows(folds))
        print(f"\nWalk forward over train and validation, {gates_text(gates)}; money in USD:\n\n{table}\n")
    if search:
        print("\n".join(search_lines(search)))
    return fitted._replace(metadata=fitted.metadata | {"walk_forward": list(map(fold_json, folds))} | more), made


def split_sentence(name: str, found: dict) -> str:
    return (
        f"{name}: {found['decisions']:,} decisions, {found['from'][:10]} to {found['to'][:10]}; {found['known']:,} of "
        f"{found['candidates']:,} outcomes are known, the other {found['unknown']:,} are left out"
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add_data_options(parser)
    parser.set_defaults(hindsight=False)
    model = parser.add_argument_group("model")
    model.add_argument(
        *flags("positive_weight"), type=float, default=1.0, metavar="W",
        help="what a positive outcome weighs in the regression, beside 1 for another; default: %(default)g",
    )  # fmt: skip
    for name, placeholder, what in (
        ("threshold", "PERCENT", "sell only above this predicted net outcome, in %% of spot"),
        ("min_confidence", "SHARE", "sell only at this probability of a positive outcome or more, from 0 to 1"),
        ("min_abs_return", "PERCENT", "sell only where the predicted net outcome is this far from 0, in %% of spot"),
    ):
        model.add_argument(*flags(name), type=float, metavar=placeholder, help=f"{what}; default: 0")
    model.add_argument(
        "--optimize", action="store_true",
        help=f"search for these three on validation, and save what was tried as {GRID} and {PICTURE}",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument(
        "--folds", type=int, default=FOLDS, metavar="N",
        help="blocks of time of the walk forward, 0 for none; default: %(default)s",
    )  # fmt: skip
    run.add_argument(
        *flags("output_dir"), metavar="DIR", default="out/q_scorer", help=f"for {FILE_NAME}; default: %(default)s"
    )
    asked = parser.parse_args(arguments)
    if asked.optimize and (asked.threshold, asked.min_confidence, asked.min_abs_return) != (None, None, None):
        parser.error("--optimize finds threshold, min_confidence and min_abs_return: do not give them too.")
    if asked.folds < 0:
        parser.error(f"--folds {asked.folds}: give 0 or more.")
    return typed(parser, asked)


def main(arguments: list[str] | None = None) -> None:
    start_logging()
    asked = parse_arguments(arguments)
    try:
        run(asked)
    except CandidatesError as error:
        sys.exit(f"error: {as_typed(error, asked)}")
    except OSError as error:
        sys.exit(f"error: {disk_trouble(error) or error}")
