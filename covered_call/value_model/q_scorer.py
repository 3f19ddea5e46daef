"""What would selling this call bring? Gradient boosting on counterfactual outcomes, used as a policy.

    covered-call q-scorer                                            # on the simulated sample
    covered-call q-scorer --data_files 'runs/*.csv' --optimize       # search threshold and gates on validation
    covered-call q-scorer --data_files 'runs/*.csv' --horizon 3 --fee 0.0003 --positive_weight 1.5
    covered-call q-scorer --data_files 'runs/*.csv' --deploy out/live/q_scorer.zip
    covered-call q-scorer --settlement simulated --write_opinions out/opinions.parquet
    covered-call evaluate --baselines-only --q_scorer out/q_scorer/q_scorer.zip

A regressor predicts each candidate's net outcome (``q_sell``; holding is worth 0), a classifier the probability that
it is positive. The best candidate is sold if both like it enough, else nothing is. Outcomes are learnt as a share of
spot, and thresholds are in % of spot: the same number then means the same at 4,000 and at 100,000 USD, and for any
underlying. What is told of outcomes is in USD a unit of underlying, as everywhere else.

--deploy puts it where a running chain or agent reads it, in one step, if the walk forward brought more than never
selling. --write_opinions has each scorer of the walk forward say what it expects of the candidates after it, and the
saved one of those of the test split, for the option opinions of a load. Nothing is learnt from the test split. A saved
file is a zip of numbers and text: loading one runs no code of its own.
"""

import argparse
import os
import shlex
from pathlib import Path

from covered_call import atomic
from covered_call.candidates.analogues import check_rule
from covered_call.candidates.data_options import Help, add_data_options, backtest_of, flags, typed
from covered_call.candidates.options import CONTEXT, CoveredCallCandidatesConfig, options_of
from covered_call.candidates.schema import CandidatesError, LoggedDecision
from covered_call.command_line import plain_errors, start_logging
from covered_call.tables import align
from covered_call.value_model.gate_search import draw_grid, grid_csv, optimize, search_json, search_lines
from covered_call.value_model.learning import Fitted, Gates, QScorerError, check_weight, fit_offset, gates_text, learn
from covered_call.value_model.opinions import opinions_file
from covered_call.value_model.scorer import FILE_NAME, save, to_bytes
from covered_call.value_model.walk_forward import FOLDS, Fold, fold_json, fold_rows, pooled, walk_forward

GRID, PICTURE = "grid.csv", "grid.png"


def main(arguments: list[str]) -> None:
    """Fits a scorer on the backtest's outcomes, and saves it; an error is one line and a bad exit."""
    start_logging()
    args = parse_arguments(arguments)
    with plain_errors(args, CandidatesError):
        run(args)


def run(args: argparse.Namespace) -> None:
    gates = Gates(args.threshold or 0.0, args.min_confidence or 0.0, args.min_abs_return or 0.0)
    gates.check()
    check_weight(args.positive_weight)
    backtest = backtest_of(args, {})
    folder = Path(args.output_dir)
    with atomic.locked(folder):
        print(f"Reading {len(backtest.files)} file(s) ...", flush=True)
        train, validation = (backtest.splits.get(name, []) for name in ("train", "validation"))
        if args.write_opinions:
            check_rule(backtest.options, "write_opinions")
        fitted, made, folds = fit_all(args, gates, backtest.options, train, validation)
        print("\n".join(backtest.decisions.checks()))
        hashes = {os.path.basename(path): sha256 for path, sha256 in backtest.hashes.items()}
        fitted = fitted._replace(metadata=fitted.metadata | {"data_files": hashes})
        # Where a scorer stands, a grid beside it is that scorer's.
        old = (GRID, PICTURE) if (folder / FILE_NAME).is_file() else ()
        atomic.write_together(folder, {FILE_NAME: to_bytes(fitted), **made}, old)
    print(f"Saved {', '.join(str(folder / name) for name in (FILE_NAME, *made))}: {gates_text(fitted.gates)}")
    if args.write_opinions:
        parts = [*((fold.fitted, fold.entries) for fold in folds), (fitted, backtest.splits.get("test", []))]
        write_opinions(parts, Path(args.write_opinions))
    if args.deploy:
        deploy(fitted, Path(args.deploy), args.force)
    told = context_words(backtest.options)
    print(
        "Next: judge it on the test split: covered-call evaluate --baselines-only --q_scorer "
        f"{folder / FILE_NAME}{told}"
    )


def context_words(options: CoveredCallCandidatesConfig) -> str:
    """The options of the market's context as a command line has them: what a scorer is judged with, too."""
    known = {one: getattr(options, one.name) for one in options_of(type(options), CONTEXT)}
    changed = {one.name: value for one, value in known.items() if value != one.default}
    words = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in changed.items()}
    return "".join(f" --{name} {shlex.join(map(str, its))}" for name, its in words.items())


def write_opinions(parts: list[tuple[Fitted, list[LoggedDecision]]], path: Path) -> None:
    content, rows = opinions_file(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, content)
    decisions = sum(len(entries) for _, entries in parts)
    print(f"Saved {path}: opinions on {rows:,} candidates of {decisions:,} decisions, none before the first fold.")


def deploy(fitted: Fitted, path: Path, force: bool) -> None:
    """Replaces the file in one step, for policies that read it meanwhile.

    Raises:
        QScorerError: if the scorers of the walk forward did not bring more than never selling, unless that is forced.
    """
    walked, said = fitted.metadata["walked"], "no outcome that is known"
    mean = walked["mean_pnl"]
    if mean is not None:
        where = f"above 0 in {walked['above']} of {walked['of']} folds"
        said = f"{mean:+,.2f} USD a decision over {walked['decisions']:,}, {where}, and never selling 0"
    if not force and not (mean is not None and mean > 0):
        raise QScorerError(
            f"Not deployed to {path}: walked forward, such scorers brought {said}. Give other data or "
            "options, or --force."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(fitted, path)
    print(f"Deployed to {path}{', as forced' if force else ''}: walked forward, such scorers brought {said}.")


def fit_all(
    args: argparse.Namespace,
    gates: Gates,
    config: CoveredCallCandidatesConfig,
    train: list[LoggedDecision],
    validation: list[LoggedDecision],
) -> tuple[Fitted, dict[str, bytes], list[Fold]]:
    """Prints what was learnt and how it held; returns the scorer, by name the files that go with it, and the folds."""
    print("Learning ...", flush=True)
    fitted, search, made, more = learn(train, config, args.positive_weight), None, {}, {}
    if args.optimize:
        print("Searching for gates ...", flush=True)
        fitted, search = optimize(fitted, validation, config)
        made, more = {GRID: grid_csv(search.grid), PICTURE: draw_grid(search)}, {"optimize": search_json(search)}
    else:
        fitted = fit_offset(fitted, validation, config).with_gates(gates)
    for name in ("train", "validation"):
        print(split_sentence(name, fitted.metadata[name]))
    print(f"Offset fitted on validation: {100 * fitted.metadata['offset']:+.3f} % of spot")
    folds = walk([*train, *validation], args, gates, config) if args.folds else []
    told = {"walk_forward": [fold_json(fold) for fold in folds], "walked": pooled(folds, config)}
    if search:
        print("\n".join(search_lines(search)))
    return fitted._replace(metadata=fitted.metadata | told | more), made, folds


def walk(
    entries: list[LoggedDecision], args: argparse.Namespace, gates: Gates, config: CoveredCallCandidatesConfig
) -> list[Fold]:
    """Prints how scorers that were fitted on the past held, fold by fold."""
    print(f"Walking forward in {args.folds} folds ...", flush=True)
    folds = walk_forward(entries, args.folds, config, args.positive_weight, gates)
    table = align(fold_rows(folds))
    print(f"\nWalk forward over train and validation, {gates_text(gates)}; money in USD:\n\n{table}\n")
    return folds


def split_sentence(name: str, found: dict) -> str:
    return (
        f"{name}: {found['decisions']:,} decisions, {found['from'][:10]} to {found['to'][:10]}; {found['known']:,} of "
        f"{found['candidates']:,} outcomes are known, the other {found['unknown']:,} are left out"
    )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call q-scorer", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add_data_options(parser)
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
    run.add_argument(
        "--deploy", metavar="FILE", help="replace this file too, if the walk forward brought more than never selling"
    )
    run.add_argument(
        *flags("write_opinions"), metavar="FILE",
        help="write, walked forward, what is expected of each candidate: a Parquet file for the option opinions",
    )  # fmt: skip
    run.add_argument("--force", action="store_true", help="deploy whatever the walk forward brought")
    args = parser.parse_args(arguments)
    if args.deploy and not (args.folds or args.force):
        parser.error("--deploy asks the walk forward: give --folds 1 or more, or --force.")
    if args.optimize and (args.threshold, args.min_confidence, args.min_abs_return) != (None, None, None):
        parser.error("--optimize finds threshold, min_confidence and min_abs_return: do not give them too.")
    if args.write_opinions and not args.folds:
        parser.error("--write_opinions walks forward: give --folds 1 or more.")
    if args.folds < 0:
        parser.error(f"--folds {args.folds}: give 0 or more.")
    return typed(parser, args)
