"""Is the tuned model any good? As a copy of the teacher and in money, beside the simplest rules.

    covered-call evaluate --model out/ranking --output_dir report
    covered-call evaluate --baselines-only --data_files 'runs/*.csv'
    covered-call evaluate --baselines-only --q_scorer out/q_scorer/q_scorer.zip   # the one that q-scorer saved
    covered-call evaluate --model out/mixed --task per_candidate                  # of a model of several tasks
    covered-call evaluate --model out/mixed --questions corpora/formulas_held_out.jsonl

Everything is judged a decision: what was sold, if anything. The two exit styles are never mixed, for their outcomes
mean different things.
"""

import argparse
import datetime
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets.utils import tqdm

from covered_call import atomic, resampling
from covered_call.candidates.builder import Backtest
from covered_call.candidates.columns import Columns, logged_of, microseconds
from covered_call.candidates.data_options import OUTCOME_OPTIONS, Help, add_data_options, backtest_of, flags, typed
from covered_call.candidates.options import CHATS, CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import as_recorded
from covered_call.candidates.schema import CandidatesError, Decision, iso_time, utc
from covered_call.candidates.terms import Fit
from covered_call.command_line import plain_errors, start_logging
from covered_call.evaluation.cases import (
    Market,
    make_cases,
    markets_of,
)
from covered_call.evaluation.details import Detail, make_detail
from covered_call.evaluation.explanations import Judged, judge_explanations, some_of
from covered_call.evaluation.money import ALL, Result, judge, make_groups
from covered_call.evaluation.questions import ask_all, read_questions
from covered_call.evaluation.report import report_files, terminal_table, write_report
from covered_call.evaluation.rows import HODL, MODEL, Q_SCORER, RANDOM, TEACHER, Row, best_rule, make_rows
from covered_call.evaluation.scenarios import scenarios_of
from covered_call.evaluation.sections import Evaluation, Study
from covered_call.evaluation.slices import regimes
from covered_call.language_model.manifest import PolicyError, for_task, grounds_in, read_manifest
from covered_call.value_model.learning import Fitted, Predicted, QScorerError, fit
from covered_call.value_model.scorer import QScorer, picks_of
from covered_call.value_model.walk_forward import candidate_pairs, compare

SPLITS = ("train", "validation", "test")


def main(arguments: list[str]) -> None:
    """Judges, prints a table and saves a report; an error is one line and a bad exit."""
    start_logging()
    args = parse_arguments(arguments)
    with plain_errors(args, CandidatesError, PolicyError):
        if args.questions:
            ask(args)
        else:
            for task, folder in tasks_of(args).items():
                evaluate(args, task, folder)


def ask(args: argparse.Namespace) -> None:
    """Only the questions of a file: exact match, of what the model writes itself."""
    if not args.model:
        raise CandidatesError(f"questions={args.questions!r}: it takes a model to answer them. Give --model.")
    read_questions(args.questions)  # before a model is loaded, which takes long
    with atomic.locked(Path(args.output_dir)):
        ask_all(load_model(args.model, args.batch_tokens), args.questions, Path(args.output_dir))


def tasks_of(args: argparse.Namespace) -> dict[str | None, Path]:
    """The tasks to judge a model by, with the folder of each report: a model of several has one for each."""
    folder = Path(args.output_dir)
    if not args.model:
        if args.task:
            raise CandidatesError(f"task={args.task!r} is that of a model: give --model, or leave it out.")
        return {None: folder}
    manifest = read_manifest(args.model)
    if args.task:
        return {for_task(args.model, manifest, args.task)["task"]: folder}
    tasks = manifest.get("tasks", [])
    return {task: folder / task for task in tasks} if len(tasks) > 1 else {None: folder}


def evaluate(args: argparse.Namespace, task: str | None, folder: Path) -> None:
    # What can be known in a moment comes first: a model takes long to load, and longer to answer.
    cutoff = utc(parse_cutoff(args.cutoff)) if args.cutoff else None
    recipe = read_manifest(args.model)["recipe"] if args.model else {}
    backtest = backtest_of(args, recipe)
    saved = QScorer.load(args.q_scorer, check_every=math.inf) if args.q_scorer else None
    with atomic.locked(folder):
        print(f"Reading {len(backtest.files)} file(s) ...", flush=True)
        if not len(backtest.numbers.get(args.split, ())):
            raise CandidatesError(f"The {args.split} split is empty: give more data, or set splits, or test_from.")
        if not len(backtest.numbers["train"]):
            raise CandidatesError("The train split is empty, and the baselines are fitted on it: set other splits.")
        evaluation = judge_all(args, backtest, cutoff, saved, task)
        print(terminal_table(evaluation))
        explained = [evaluation.explained.sentence()] if evaluation.explained else []
        studied = evaluation.study.sentences() if evaluation.study else []
        print("\n".join([*explained, *studied, *evaluation.notes]))
        write_report(folder, report_files(evaluation))
    print(
        f"\nSaved in {folder}: report.html (all figures, plots, and how it is measured), the same as report.md, and "
        "metrics.json."
    )
    print(what_next(args, folder))


def judge_all(
    args: argparse.Namespace,
    backtest: Backtest,
    cutoff: datetime.datetime | None,
    saved: QScorer | None,
    task: str | None,
) -> Evaluation:
    """Every policy on the decisions of the split; says what it does, for it takes long."""
    config = backtest.options
    splits = {name: backtest.decisions.columns(numbers) for name, numbers in backtest.numbers.items() if len(numbers)}
    columns = splits[args.split]
    model = load_model(args.model, args.batch_tokens, task) if args.model else None
    cases, found = make_cases(backtest.decisions, columns, config), backtest.decisions.fits
    fitted, notes = find_scorer(saved, splits, args.split, config)
    predicted = fitted.predict(columns) if fitted else None
    rows, trials = make_rows(splits["train"], columns, fitted, predicted, model)
    rule = best_rule(rows, columns)
    groups = make_groups(cases, cutoff, regimes(backtest.decisions, columns))
    print(f"Judging {len(rows)} policies, with {resampling.REPLICATES:,} resamples ...", flush=True)
    bar = tqdm(groups, desc="Judging", unit=" groups", disable=None, leave=False)
    results = [judge(rows, rule, cases, group) for group in bar]
    scenarios = scenarios_of(backtest.decisions, cases, config)
    overall = [result for result in results if result.group.name == ALL]
    details = [make_detail(result, rows, trials, rule, cases, scenarios, backtest.decisions) for result in overall]
    notes = [*backtest.decisions.checks(), *notes, *warn(args.split, columns, results, model)]
    if not as_recorded(config):
        notes.append(
            "A horizon or another vol is set, of which recorded outcomes do not know: all outcomes, the teacher's "
            "too, are computed."
        )
    study = make_study(fitted, predicted, columns, config, found) if fitted and predicted else None
    fitted_here = fitted_on(args.split, columns, rows, fitted, model)
    first = not_tuned_on(model.manifest, backtest, columns) if model else []
    explained = explanations_by(model, columns, args.explanations) if model else None
    said = explain_trades(model, columns, details) if explained else {}
    return Evaluation(
        args.model, args.split, backtest.files, config, backtest.decisions.replay.terms, cases, rows, trials, rule,
        results, details, fitted_here, first, notes, study, explained, said,
    )  # fmt: skip


def explanations_by(model, columns: Columns, most: int) -> Judged | None:
    """Those of some decisions, judged; None of a model that gives answers alone."""
    if "explains" not in model.manifest or not most:
        return None
    decisions = [entry.decision for entry in logged_of(columns)]
    print(f"Writing {min(most, len(decisions))} explanations ...", flush=True)
    return judged(model, some_of(decisions, most))


def explain_trades(model, columns: Columns, details: list[Detail]) -> dict[int, str]:
    """What a model that explains says of its best and worst trades, by their places, with the checks that it fails."""
    places = sorted({trade.place for detail in details for trade in (*detail.best, *detail.worst)})
    decisions = [entry.decision for entry in logged_of(columns.take(np.array(places, np.int64)))]
    return dict(zip(places, judged(model, decisions).texts(), strict=True))


def judged(model, decisions: list[Decision]) -> Judged:
    grounds = grounds_in(Path(model.folder), model.manifest)
    assert grounds is not None
    return judge_explanations(model.explain(decisions), grounds, model.task)


def fitted_on(split: str, columns: Columns, rows: list[Row], fitted: Fitted | None, model) -> set[str]:
    """The policies that were fitted on some of these decisions."""
    here = {row.name for row in rows} - {TEACHER, HODL, RANDOM, Q_SCORER, MODEL} if split == "train" else set()
    if fitted and any(seen_by(fitted.metadata, columns).values()):
        here.add(Q_SCORER)
    if model and learnt_by(model.manifest, columns):
        here.add(MODEL)
    return here


def seen_by(metadata: dict, columns: Columns) -> dict[str, int]:
    """How many of these decisions are of the time of each split that a Q-scorer was fitted on."""
    found = {}
    for split in ("train", "validation"):
        first, last = (microseconds(datetime.datetime.fromisoformat(metadata[split][end])) for end in ("from", "to"))
        found[split] = int(((columns.time >= first) & (columns.time <= last)).sum())
    return found


def learnt_by(manifest: dict, columns: Columns) -> int:
    """How many of these decisions are not later than the last that a model was tuned on."""
    tuned_to = datetime.datetime.fromisoformat(manifest["splits"]["train"]["to"])
    return int((columns.time <= microseconds(tuned_to)).sum())


def not_tuned_on(manifest: dict, backtest: Backtest, columns: Columns) -> list[str]:
    """In one line what is judged here that the model was not tuned on; none if it was tuned on all of it."""
    tuned, strange = manifest.get("tuned_on", {}), []
    for name, codes in (("underlying", columns.underlying), ("exit style", columns.exit_style)):
        known = tuned.get(f"{name.replace(' ', '_')}s")
        its = sorted(columns.names[code] for code in np.unique(codes))
        strange += [f"the {name} {one}" for one in its if known is not None and one not in known]
    hashes = manifest.get("data_files")
    if hashes is not None:
        others = [path for path, digest in backtest.hashes.items() if digest not in hashes.values()]
        strange += [f"the file {os.path.basename(path)}" for path in others]
    return [f"WARNING: the model was not tuned on {', '.join(strange)}."] if strange else []


def what_next(args: argparse.Namespace, folder: Path) -> str:
    if args.model:
        report = folder / "metrics.json"
        return (
            f"Next: share it, figures and all: covered-call publish --adapter {args.model} USER/NAME --report {report}"
        )
    return "Next: tune a model on these data (covered-call train --config ranking), and judge it with --model."


def load_model(folder: str, batch_tokens: int | None, task: str | None = None):
    print(f"Loading {folder}{f', for {task}' if task else ''} ...", flush=True)
    from covered_call.language_model.policy import Policy  # only here: the baselines need no torch

    return Policy.load(folder, batch_tokens=batch_tokens, task=task)


# ---------------------------------------------------------------------------------------------------------------------
# The Q-scorer


def find_scorer(
    saved: QScorer | None, splits: dict[str, Columns], split: str, config: CoveredCallCandidatesConfig
) -> tuple[Fitted | None, list[str]]:
    """The saved Q-scorer, or one learnt on train with its offset from validation; and what to know of it.

    Data on which none can be fitted go without.
    """
    try:
        fitted = saved.fitted if saved else fit(splits["train"], splits.get("validation", []), config)
    except QScorerError as error:
        return None, [f"There is no {Q_SCORER}. {error}"]
    return fitted, warn_of_scorer(fitted.metadata, splits[split], config)


def warn_of_scorer(metadata: dict, columns: Columns, config: CoveredCallCandidatesConfig) -> list[str]:
    warnings, what = [], {"train": " learnt from", "validation": "'s offset, and perhaps its gates, were fitted on"}
    for split, seen in seen_by(metadata, columns).items():
        if seen:
            first, last = (metadata[split][end][:10] for end in ("from", "to"))
            warnings.append(
                f"WARNING: {seen} of these {len(columns)} decisions are of the time that the {Q_SCORER}{what[split]}: "
                f"{first} to {last}."
            )
    its, ours = metadata["outcome_options"], {name: getattr(config, name) for name in OUTCOME_OPTIONS}
    other = [f"{name} {number(its[name])} (here {number(ours[name])})" for name in ours if its[name] != ours[name]]
    if other:
        warnings.append(f"WARNING: the {Q_SCORER} learnt outcomes with other options: {', '.join(other)}.")
    return warnings


def number(value: float | str | None) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def make_study(
    fitted: Fitted,
    predicted: Predicted,
    columns: Columns,
    config: CoveredCallCandidatesConfig,
    fits: dict[Market, Fit],
) -> Study:
    compared, pairs = {}, {}
    picks = picks_of(fitted, columns, predicted)
    markets = markets_of(columns, columns.names)
    several, doubtful = len({underlying for underlying, _ in markets}) > 1, []
    for (underlying, style), inside in markets.items():
        fit, places = fits.get((underlying, style)), np.flatnonzero(inside)
        style = f"{underlying} {style}" if several else style
        doubtful += [style] if fit and not fit.trusted else []
        its, values = columns.take(places), predicted.values[np.isin(columns.decision_of, places)]
        compared[style] = compare(its, values, picks[places], config)
        pairs[style] = candidate_pairs(its, values, config)
    return Study(fitted.metadata, doubtful, compared, pairs)


def warn(split: str, columns: Columns, results: list[Result], model) -> list[str]:
    """What a reader of the figures must know beside them."""
    warnings = []
    if split == "train":
        warnings.append("WARNING: these are the decisions that the baselines, and the model, were fitted on.")
    elif model:
        seen = learnt_by(model.manifest, columns)
        if seen:
            warnings.append(
                f"WARNING: {seen} of these {len(columns)} decisions are not later than the model's training "
                f"decisions, which end on {model.manifest['splits']['train']['to'][:10]}: it may have learnt them."
            )
    return warnings + list(without_intervals(results))


def without_intervals(results: list[Result]) -> Iterator[str]:
    """What is too short for them: a sentence for each underlying and exit style, and one for its slices."""
    short = [one for one in results if len(one.times) < resampling.MIN_BLOCKS * one.block]
    for market, its in itertools.groupby(short, key=lambda one: ", ".join(one.group[:2])):
        its = list(its)
        for whole in [one for one in its if one.group.name == ALL]:
            yield (
                f"{market}: no intervals, for {len(whole.times)} decision times are fewer than "
                f"{resampling.MIN_BLOCKS} blocks of {whole.block}."
            )
        slices = [one.group.name for one in its if one.group.name != ALL]
        if slices:
            yield f"{market}: no intervals for what is too short: {', '.join(slices)}."


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call evaluate", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    title = parser.add_argument_group("what to judge (one of these)")
    what = title.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="a folder that covered-call train or prefer saved")
    what.add_argument(*flags("baselines_only"), action="store_true", help="the simplest rules alone, without a model")
    add_data_options(parser, "with --model, what it was tuned with")
    model = parser.add_argument_group("model and Q-scorer")
    model.add_argument(
        "--task", choices=CHATS, help="of a model of several, judge this one; default: each, in a folder of its own"
    )
    model.add_argument(
        "--questions", metavar="FILE",
        help="judge nothing but the answers that the model writes to the questions of a JSONL, such as those of "
        "python data/make_formulas.py, by exact match; default: none",
    )  # fmt: skip
    model.add_argument(
        *flags("batch_tokens"), type=positive, metavar="N",
        help="tokens that the model reads at once; fewer need less memory and change nothing else; default: what fits "
        "in the GPU's free memory",
    )  # fmt: skip
    model.add_argument(
        "--explanations", type=int, metavar="N", default=100,
        help="of a model that explains: judge what it says of so many decisions, evenly apart; default: %(default)s",
    )  # fmt: skip
    model.add_argument(
        *flags("q_scorer"), metavar="FILE",
        help="judge the one that covered-call q-scorer saved; default: one fitted on train",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--split", choices=SPLITS, default="test", help="the decisions to judge on; default: %(default)s")
    run.add_argument(
        "--cutoff", metavar="DATE",
        help="the model's knowledge ends here: judge later decisions apart too; default: none",
    )  # fmt: skip
    run.add_argument(
        *flags("output_dir"), metavar="DIR", default="report", help="where the report goes; default: %(default)s"
    )
    args = typed(parser, parser.parse_args(arguments))
    if args.explanations < 0:
        parser.error(f"--explanations {args.explanations}: give 0 or more decisions.")
    return args


def parse_cutoff(text: str) -> datetime.datetime:
    time = iso_time(text)
    if time is None:
        raise CandidatesError(f"cutoff={text!r}: give a date such as 2024-01-01.")
    return time


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: give 1 or more")
    return number
