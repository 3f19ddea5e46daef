"""Is the tuned model any good? As a copy of the teacher and in money, beside the simplest rules.

    python evaluate_policy.py --model out/ranking --output_dir report
    python evaluate_policy.py --baselines-only --data_files 'runs/*.csv'
    python evaluate_policy.py --baselines-only --q_scorer out/q_scorer/q_scorer.zip   # the one that q_scorer.py saved
    python evaluate_policy.py --audit               # could the answer be read from the prompt?
    python evaluate_policy.py --audit --hindsight   # it can: exit status 1

Everything is judged a decision: what was sold, if anything. The two exit styles are never mixed, for their outcomes
mean different things.
"""

import argparse
import copy
import datetime
import math
import sys
from pathlib import Path

import numpy as np
from datasets.utils import tqdm

from covered_call import atomic
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import as_recorded
from covered_call.candidates.prompts import present_in_order
from covered_call.candidates.schema import NO_TRADE, CandidatesError, Decision, LoggedDecision, iso_time, utc
from covered_call.command_line import as_typed, disk_trouble, start_logging
from covered_call.data_options import OUTCOME_OPTIONS, Help, add_data_options, data_options, flags, read_splits, typed
from covered_call.evaluation import metrics
from covered_call.evaluation.audit import audit
from covered_call.evaluation.baselines import Pick, Policy, fit_baselines, never_sell
from covered_call.evaluation.money import (
    HODL,
    MODEL,
    Q_SCORER,
    RANDOM,
    TEACHER,
    Result,
    Row,
    Validation,
    comparable,
    judge,
    make_cases,
    make_groups,
    trusted,
    validate_styles,
)
from covered_call.evaluation.report import Study, how_measured, report_files, terminal_table, write_report
from covered_call.language_model.manifest import PolicyError, read_manifest
from covered_call.value_model import scorer as value_model
from covered_call.value_model.scorer import QScorer, QScorerError, decide
from covered_call.value_model.walk_forward import candidate_pairs, compare

SPLITS = ("train", "validation", "test")
SHUFFLES = 4


# ---------------------------------------------------------------------------------------------------------------------
# The picks of each policy


def make_row(name: str, policy: Policy, entries: list[LoggedDecision]) -> Row:
    picks = policy([entry.decision for entry in entries])
    return Row(name, picks, consistency(policy, picks, entries), [math.nan] * len(entries))


def consistency(policy: Policy, picks: list[Pick], entries: list[LoggedDecision]) -> list[float]:
    """1.0 for each decision whose pick is the same option in SHUFFLES other orders of its candidates, else 0.0."""
    names = instruments(entries, picks)
    same = np.ones(len(entries))
    for seed in range(SHUFFLES):
        order = CoveredCallCandidatesConfig(candidate_order="shuffle", seed=seed)
        shuffled = [present_in_order(entry, order) for entry in entries]
        others = instruments(shuffled, policy([entry.decision for entry in shuffled]))
        same *= [name == other for name, other in zip(names, others, strict=True)]
    return same.tolist()


def instruments(entries: list[LoggedDecision], picks: list[Pick]) -> list[str | None]:
    return [None if p is None else e.decision.candidates[p].instrument for e, p in zip(entries, picks, strict=True)]


def make_rows(train: list[LoggedDecision], entries: list[LoggedDecision], scorer: QScorer | None, model) -> list[Row]:
    """The teacher, never selling, the baselines and, if there are such, the Q-scorer and the model."""
    unknown = [math.nan] * len(entries)
    rows = [Row(TEACHER, [entry.chosen for entry in entries], unknown, unknown)]
    print("Fitting the baselines, and asking them ...", flush=True)
    rows += [make_row(HODL, never_sell, entries), Row(RANDOM, None, unknown, unknown)]
    rows += [make_row(name, policy, entries) for name, policy in fit_baselines(train).items()]
    if scorer:
        fitted = scorer.fitted
        rows.append(make_row(Q_SCORER, lambda decisions: list(map(pick_of, decide(fitted, decisions))), entries))
    return [*rows, model_row(model, entries)] if model else rows


def model_row(model, entries: list[LoggedDecision]) -> Row:
    passes = 1 if model.task == "per_candidate" else 1 + SHUFFLES
    said = [
        f"The model answers {len(entries):,} decisions, pass {one} of {passes} ..." for one in range(passes, 0, -1)
    ]
    print(said.pop(), flush=True)
    answers = model.decide([entry.decision for entry in entries])
    picks, probabilities = [pick_of(answer) for answer in answers], [answer.probability for answer in answers]
    if model.task == "per_candidate":  # its prompts show one candidate: the order of the others cannot matter
        return Row(MODEL, picks, [1.0] * len(entries), probabilities)

    as_given = copy.copy(model)
    as_given.candidate_order = "csv"  # or it would put the shuffled candidates into its own order again

    def shuffled(decisions: list[Decision]) -> list[Pick]:
        print(said.pop(), flush=True)
        return [pick_of(answer) for answer in as_given.decide(decisions)]

    return Row(MODEL, picks, consistency(shuffled, picks, entries), probabilities)


def pick_of(answer) -> Pick:
    return None if answer.answer == NO_TRADE else int(answer.answer) - 1


def best_rule(rows: list[Row], entries: list[LoggedDecision]) -> Row:
    """The baseline that agrees most with the teacher on the evaluated decisions; of equals the simplest."""
    rules = [row for row in rows if row.name not in (TEACHER, HODL, RANDOM, Q_SCORER, MODEL)]
    return max(rules, key=lambda row: sum(p == e.chosen for p, e in zip(row.picks, entries, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(asked: argparse.Namespace) -> int:
    # What can be known in a moment comes first: a model takes long to load, and longer to answer.
    cutoff = utc(parse_cutoff(asked.cutoff)) if asked.cutoff else None
    recipe = read_manifest(asked.model)["recipe"] if asked.model else {}
    files, config = data_options(asked, recipe)
    saved = QScorer.load(asked.q_scorer, check_every=math.inf) if asked.q_scorer else None
    folder = Path(asked.output_dir)
    with atomic.locked(folder):
        print(f"Reading {len(files)} file(s) ...", flush=True)
        logged, splits = read_splits(files, config)
        if not splits.get(asked.split):
            raise CandidatesError(f"The {asked.split} split is empty: give more data, or set splits, or test_from.")
        write_report(folder, judge_all(asked, files, config, cutoff, logged, splits, saved))
    print(f"\nSaved in {folder}: report.md (all figures, plots, and how it is measured) and metrics.json.")
    print(what_next(asked))
    return 0


def judge_all(
    asked: argparse.Namespace,
    files: list[str],
    config: CoveredCallCandidatesConfig,
    cutoff: datetime.datetime | None,
    logged: list[LoggedDecision],
    splits: dict[str, list[LoggedDecision]],
    saved: QScorer | None,
) -> dict[str, str | bytes]:
    """Prints the table and what to know beside it; returns the files of the report."""
    entries = splits[asked.split]
    model = load_model(asked.model, asked.batch_tokens) if asked.model else None
    cases = make_cases(logged)
    found = validate_styles(cases)
    everything = {case.decision[:3]: case for case in comparable(trusted(cases, found), config)}
    cases = [everything[entry.decision[:3]] for entry in entries]
    scorer, trouble = find_scorer(saved, splits, asked.split, config)
    rows = make_rows(splits["train"], entries, scorer, model)
    rule = best_rule(rows, entries)
    groups = make_groups(cases, cutoff)
    print(f"Judging {len(rows)} policies, with {metrics.REPLICATES:,} resamples ...", flush=True)
    bar = tqdm(groups, desc="Judging", unit=" groups", disable=None, leave=False)
    results = [judge(rows, rule, cases, group) for group in bar]
    warnings = [*trouble, *warn(asked, entries, results, model)]
    if not as_recorded(config):
        warnings.append("Costs or a horizon are set: all outcomes, the teacher's too, are computed and net of them.")
    learnt = study(scorer, entries, config, found) if scorer else None
    checked = [validation.sentence(style) for style, validation in found.items()]
    print(terminal_table(asked.split, results, rule.name))
    print("\n".join([*checked, *(learnt.sentences() if learnt else ()), *warnings]))
    notes, how = [*checked, *warnings], how_measured(config)
    return report_files(asked, files, results, rows, rule, cases, notes, how, learnt)


def what_next(asked: argparse.Namespace) -> str:
    if asked.model:
        report = Path(asked.output_dir) / "metrics.json"
        return (
            f"Next: share it, figures and all: python publish.py --adapter {asked.model} USER/NAME --report {report}"
        )
    return "Next: tune a model on these data (python train_sft.py --config ranking), and judge it with --model."


def load_model(folder: str, batch_tokens: int | None):
    print(f"Loading {folder} ...", flush=True)
    from policy import Policy as TunedPolicy  # only here: the baselines need no torch

    return TunedPolicy.load(folder, batch_tokens=batch_tokens)


def find_scorer(saved: QScorer | None, splits: dict, split: str, config) -> tuple[QScorer | None, list[str]]:
    """The saved Q-scorer, or one fitted on train and calibrated on validation; and what to know of it.

    Data on which none can be fitted go without.
    """
    try:
        scorer = saved or QScorer(value_model.fit(splits["train"], splits.get("validation", []), config))
    except QScorerError as error:
        return None, [f"There is no {Q_SCORER}. {error}"]
    return scorer, warn_of_scorer(scorer.fitted.metadata, splits[split], config)


def warn_of_scorer(metadata: dict, entries: list[LoggedDecision], config) -> list[str]:
    warnings = []
    for split, what in (("train", " learnt from"), ("validation", "'s offset, and perhaps its gates, were fitted on")):
        first, last = (datetime.datetime.fromisoformat(metadata[split][end]) for end in ("from", "to"))
        seen = sum(first <= entry.decision.decision_time <= last for entry in entries)
        if seen:
            warnings.append(
                f"WARNING: {seen} of these {len(entries)} decisions are of the time that the {Q_SCORER}{what}: "
                f"{first.date()} to {last.date()}."
            )
    its, ours = metadata["outcome_options"], {name: getattr(config, name) for name in OUTCOME_OPTIONS}
    other = [f"{name} {number(its[name])} (here {number(ours[name])})" for name in ours if its[name] != ours[name]]
    if other:
        warnings.append(f"WARNING: the {Q_SCORER} learnt outcomes with other options: {', '.join(other)}.")
    return warnings


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def study(scorer: QScorer, entries: list[LoggedDecision], config, found: dict[str, Validation]) -> Study:
    compared, pairs = {}, {}
    for style in sorted({entry.decision.exit_style for entry in entries}):
        its = [entry for entry in entries if entry.decision.exit_style == style]
        answers = decide(scorer.fitted, [entry.decision for entry in its])
        compared[style] = compare(answers, its, config)
        pairs[style] = candidate_pairs(answers, its, config)
    doubtful = [style for style in compared if found[style].trades and not found[style].follows]
    return Study(scorer.fitted.metadata, doubtful, compared, pairs)


def parse_cutoff(text: str) -> datetime.datetime:
    time = iso_time(text)
    if time is None:
        raise CandidatesError(f"cutoff={text!r}: give a date such as 2024-01-01.")
    return time


def warn(asked: argparse.Namespace, entries: list[LoggedDecision], results: list[Result], model) -> list[str]:
    """What a reader of the figures must know beside them."""
    warnings = []
    if asked.split == "train":
        warnings.append("WARNING: these are the decisions that the baselines, and the model, were fitted on.")
    elif model:
        until = datetime.datetime.fromisoformat(model.manifest["splits"]["train"]["to"])
        seen = sum(entry.decision.decision_time <= until for entry in entries)
        if seen:
            warnings.append(
                f"WARNING: {seen} of these {len(entries)} decisions are not later than the model's training "
                f"decisions, which end on {until.date()}: it may have learnt them."
            )
    for group, times, block, _ in results:
        if len(times) < metrics.MIN_BLOCKS * block:
            warnings.append(
                f"{group.exit_style}, {group.name}: no intervals, for {len(times)} decision times are fewer than "
                f"{metrics.MIN_BLOCKS} blocks of {block}."
            )
    return warnings


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    title = parser.add_argument_group("what to judge (one of these)")
    what = title.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="a folder that train_sft.py or train_dpo.py saved")
    what.add_argument(*flags("baselines_only"), action="store_true", help="the simplest rules alone, without a model")
    what.add_argument("--audit", action="store_true", help="no policy: look for prompts that name their answer")
    add_data_options(parser, "with --model, what it was tuned with")
    model = parser.add_argument_group("model and Q-scorer")
    model.add_argument(
        *flags("batch_tokens"), type=positive, metavar="N",
        help="tokens that the model reads at once; fewer need less memory and change nothing else; default: what fits "
        "in the GPU's free memory",
    )  # fmt: skip
    model.add_argument(
        *flags("q_scorer"), metavar="FILE", help="judge the one that q_scorer.py saved; default: one fitted on train"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--split", choices=SPLITS, default="test", help="the decisions to judge on; default: %(default)s")
    run.add_argument(
        "--cutoff",
        metavar="DATE",
        help="the model's knowledge ends here: judge later decisions apart too; default: none",
    )
    run.add_argument("--hindsight", action="store_true", help="with --audit: prompts as rendered with hindsight")
    run.add_argument(
        *flags("output_dir"), metavar="DIR", default="report", help="where the report goes; default: %(default)s"
    )
    asked = parser.parse_args(arguments)
    if asked.hindsight and not asked.audit:
        parser.error("--hindsight goes with --audit: a model is judged on prompts that do not name the answer.")
    return typed(parser, asked)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: give 1 or more")
    return number


def main(arguments: list[str] | None = None) -> None:
    start_logging()
    asked = parse_arguments(arguments)
    try:
        sys.exit(audit(asked) if asked.audit else evaluate(asked))
    except (CandidatesError, PolicyError) as error:
        sys.exit(f"error: {as_typed(error, asked)}")
    except OSError as error:
        sys.exit(f"error: {disk_trouble(error) or error}")
