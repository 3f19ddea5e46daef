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
import collections
import copy
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure as Plot
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import metrics
import q_scorer
from baselines import Pick, Policy, fit_baselines, fit_threshold, highest, never_sell, scores
from covered_call_candidates import (
    CHATS,
    FEATURES,
    HOLD_TO_EXPIRY,
    NO_TRADE,
    RECORDS,
    SELL_CALL,
    SKIP,
    CandidatesError,
    CoveredCallCandidatesConfig,
    Decision,
    Ghost,
    LoggedDecision,
    Outcome,
    PreferenceConfig,
    as_recorded,
    find_csvs,
    iso_time,
    present_in_order,
    read_candidates,
    split_decisions,
    utc,
)
from metrics import METRICS, Figure, Played
from q_scorer import QScorer, QScorerError

logger = logging.getLogger("evaluate_policy")

SPLITS = ("train", "validation", "test")
SHUFFLES = 4
LEAST_CORRELATION = 0.95  # of computed with recorded outcomes; below it the report says not to trust the computed ones

MODEL, TEACHER, HODL, RANDOM = "model", "teacher", "never sell (HODL)", "random (expected)"
Q_SCORER = "Q-scorer"


# ---------------------------------------------------------------------------------------------------------------------
# Money: what each answer to a decision would have brought, in USD against holding, for each unit of underlying


class Case(NamedTuple):
    """A decision, what the teacher did, and what is known of the outcome of each candidate.

    ``recorded`` is the teacher's own outcome; ``computed`` has one for each candidate; None where unknown. ``worst``
    and ``best`` are the extremes recorded in that year for that underlying and exit style: in all years if there are
    none in that one, NaN if there are none at all.
    """

    decision: Decision
    chosen: Pick
    recorded: float | None
    computed: tuple[float | None, ...]
    worst: float
    best: float


def make_cases(logged: list[LoggedDecision]) -> list[Case]:
    """A case for each decision, with the extremes of recorded outcomes from all of them."""
    recorded = collections.defaultdict(list)
    for entry in logged:
        if recorded_pnl(entry) is not None:
            for market in markets(entry.decision):
                recorded[market].append(recorded_pnl(entry))
    cases = []
    for entry in logged:
        outcomes = next((recorded[market] for market in markets(entry.decision) if market in recorded), [math.nan])
        computed = tuple(ghost.pnl_vs_hodl for ghost in entry.ghosts)
        cases.append(Case(entry.decision, entry.chosen, recorded_pnl(entry), computed, min(outcomes), max(outcomes)))
    return cases


def recorded_pnl(entry: LoggedDecision) -> float | None:
    return None if entry.chosen is None else entry.outcomes[entry.chosen].pnl_vs_hodl


def markets(decision: Decision) -> tuple[tuple, tuple]:
    """Whose recorded outcomes tell what others may have been: those of the year, or else those of all years."""
    return (
        (decision.underlying, decision.exit_style, decision.decision_time.year),
        (decision.underlying, decision.exit_style),
    )


def outcome(case: Case, pick: Pick) -> float | None:
    """0 for no trade, what was recorded where the teacher did the same, else what can be computed, else None."""
    if pick is None:
        return 0.0
    if pick == case.chosen and case.recorded is not None:
        return case.recorded
    return case.computed[pick]


def bounds(case: Case, pick: Pick) -> tuple[float, float]:
    """Least and most of an outcome: itself where it is known, else the year's worst and best recorded one."""
    known = outcome(case, pick)
    return (case.worst, case.best) if known is None else (known, known)


def difference(case: Case, pick: Pick, other: Pick) -> tuple[float, float]:
    """Bounds of the P&L of one answer minus another's, like with like: both as recorded, or else both as computed.

    The teacher's own settlement may differ from the formula of computed outcomes; a computed outcome minus a recorded
    one would count that as skill. No trade is 0 in either.
    """
    if pick == other:
        return 0.0, 0.0
    computed = [0.0 if one is None else case.computed[one] for one in (pick, other)]
    recorded = [0.0 if one is None else case.recorded if one == case.chosen else None for one in (pick, other)]
    for mine, its in (recorded, computed):
        if mine is not None and its is not None:
            return mine - its, mine - its
    (low, high), (its_low, its_high) = bounds(case, pick), bounds(case, other)
    return low - its_high, high - its_low


def regret(case: Case, pick: Pick) -> float:
    """What the best answer, no trade included, would have added, all as computed; NaN where one is unknown."""
    if None in case.computed:
        return math.nan
    return max([0.0, *case.computed]) - (0.0 if pick is None else case.computed[pick])


def comparable(cases: list[Case], config: CoveredCallCandidatesConfig) -> list[Case]:
    """The cases, without their recorded outcomes where costs or a horizon are set, of which those do not know."""
    return cases if as_recorded(config) else [case._replace(recorded=None) for case in cases]


class Validation(NamedTuple):
    """Computed against recorded outcomes, over all trades that have both; money in USD."""

    trades: int
    correlation: float
    median_error: float
    median_outcome: float
    mean_error: float

    @property
    def follows(self) -> bool:
        return self.correlation >= LEAST_CORRELATION

    def sentence(self, style: str) -> str:
        if not self.trades:
            return f"No recorded {style} trade has a computed outcome beside it: the computation is unchecked here."
        text = (
            f"Computed against recorded outcomes on {self.trades:,} {style} trades: correlation "
            f"{self.correlation:.4f}, median absolute error {self.median_error:,.2f} USD (median outcome "
            f"{self.median_outcome:,.2f}), computed minus recorded on average {self.mean_error:+,.2f}."
        )
        if self.follows:
            return text
        below = f"the correlation is below {LEAST_CORRELATION}"
        if style == HOLD_TO_EXPIRY:
            return f"{text} WARNING: {below}: do not trust computed outcomes."
        return f"{text} Since {below}, they count as unknown."


def validate(cases: list[Case]) -> Validation:
    pairs = [(c.computed[c.chosen], c.recorded) for c in cases if c.chosen is not None and c.recorded is not None]
    pairs = np.array([pair for pair in pairs if pair[0] is not None]).reshape(-1, 2)
    if not len(pairs):
        return Validation(0, math.nan, math.nan, math.nan, math.nan)
    computed, recorded = pairs.T
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.corrcoef(computed, recorded)[0, 1] if len(pairs) > 1 else math.nan
    error = computed - recorded
    middle = [float(np.median(abs(values))) for values in (error, recorded)]
    return Validation(len(pairs), float(correlation), *middle, float(error.mean()))


def validate_styles(cases: list[Case]) -> dict[str, Validation]:
    styles = sorted({case.decision.exit_style for case in cases})
    return {style: validate([case for case in cases if case.decision.exit_style == style]) for style in styles}


def trusted(cases: list[Case], found: dict[str, Validation]) -> list[Case]:
    """The cases without the computed outcomes of exit styles whose replay does not follow the recorded ones.

    Those of hold_to_expiry stay, flagged: there the formula is what a settlement is, not a guess at a backtest's rule.
    """
    return [
        case
        if case.decision.exit_style == HOLD_TO_EXPIRY or found[case.decision.exit_style].follows
        else case._replace(computed=(None,) * len(case.computed))
        for case in cases
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Rows: the picks of each policy


class Row(NamedTuple):
    """The picks of a policy on the evaluated decisions; ``picks`` None stands for the uniform random one."""

    name: str
    picks: list[Pick] | None
    consistent: list[float]
    probabilities: list[float]


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
    rows += [make_row(HODL, never_sell, entries), Row(RANDOM, None, unknown, unknown)]
    rows += [make_row(name, policy, entries) for name, policy in fit_baselines(train).items()]
    if scorer:
        rows.append(make_row(Q_SCORER, lambda decisions: list(map(pick_of, scorer.decide(decisions))), entries))
    return [*rows, model_row(model, entries)] if model else rows


def model_row(model, entries: list[LoggedDecision]) -> Row:
    answers = model.decide([entry.decision for entry in entries])
    picks, probabilities = [pick_of(answer) for answer in answers], [answer.probability for answer in answers]
    if model.task == "per_candidate":  # its prompts show one candidate: the order of the others cannot matter
        return Row(MODEL, picks, [1.0] * len(entries), probabilities)

    as_given = copy.copy(model)
    as_given.candidate_order = "csv"  # or it would put the shuffled candidates into its own order again

    def shuffled(decisions: list[Decision]) -> list[Pick]:
        return [pick_of(answer) for answer in as_given.decide(decisions)]

    return Row(MODEL, picks, consistency(shuffled, picks, entries), probabilities)


def pick_of(answer) -> Pick:
    return None if answer.answer == NO_TRADE else int(answer.answer) - 1


def best_rule(rows: list[Row], entries: list[LoggedDecision]) -> Row:
    """The baseline that agrees most with the teacher on the evaluated decisions; of equals the simplest."""
    rules = [row for row in rows if row.name not in (TEACHER, HODL, RANDOM, Q_SCORER, MODEL)]
    return max(rules, key=lambda row: sum(p == e.chosen for p, e in zip(row.picks, entries, strict=True)))


def play(row: Row, rule: Row, cases: list[Case], places: list[int], times: list[datetime.datetime]) -> Played:
    """The arrays that metrics are computed from, for the cases at ``places``."""
    place_of_time = {time: place for place, time in enumerate(times)}
    entries = []
    for i in places:
        case = cases[i]
        answers = [None, *range(len(case.decision.candidates))] if row.picks is None else [row.picks[i]]
        for pick in answers:
            entries.append(
                (
                    place_of_time[case.decision.decision_time],
                    answer_number(case.chosen),
                    answer_number(pick),
                    1 / len(answers),
                    row.consistent[i],
                    row.probabilities[i],
                    outcome(case, pick) is not None,
                    bounds(case, pick),
                    regret(case, pick),
                    difference(case, pick, case.chosen),
                    difference(case, pick, rule.picks[i]),
                )
            )
    return Played(*map(np.array, zip(*entries, strict=True)))


def answer_number(pick: Pick) -> int:
    return 0 if pick is None else pick + 1


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


class Group(NamedTuple):
    """Decisions that are judged together: those of one exit style, all of them, of one year, or after the cutoff."""

    exit_style: str
    name: str
    places: list[int]


class Result(NamedTuple):
    """A group's figures by row, and the decision times they rest on."""

    group: Group
    times: list[datetime.datetime]
    block: int
    figures: dict[str, dict[str, Figure]]


ALL = "all"


def make_groups(cases: list[Case], cutoff: datetime.datetime | None) -> list[Group]:
    groups = collections.defaultdict(list)
    for place, case in enumerate(cases):
        style, time = case.decision.exit_style, case.decision.decision_time
        groups[style, ALL].append(place)
        groups[style, str(time.year)].append(place)
        if cutoff and time > cutoff:
            groups[style, f"after {cutoff.date()}"].append(place)
    return [Group(*key, places) for key, places in sorted(groups.items(), key=lambda item: item[0][0])]


def judge(rows: list[Row], rule: Row, cases: list[Case], group: Group) -> Result:
    decisions = [cases[place].decision for place in group.places]
    times = sorted({decision.decision_time for decision in decisions})
    block = metrics.block_length(times, max(d.last_expiry - d.decision_time for d in decisions))
    figures = {row.name: metrics.figures(play(row, rule, cases, group.places, times), times, block) for row in rows}
    return Result(group, times, block, dict(sorted(figures.items(), key=best_first)))


def best_first(item: tuple[str, dict[str, Figure]]) -> tuple:
    """The teacher and never selling are what the others are measured by: they come last."""
    name, found = item
    return name in (TEACHER, HODL), -found["accuracy"].low, -np.nan_to_num(found["mean_pnl"].low, nan=-math.inf)


def read_splits(files: list[str], config: CoveredCallCandidatesConfig) -> tuple[list[LoggedDecision], dict]:
    """All decisions of the files, and those of each split, with their candidates in the order that prompts show."""
    logged = [present_in_order(entry, config) for entry in read_candidates(files, config)]
    return logged, split_decisions(logged, config)


def evaluate(asked: argparse.Namespace) -> int:
    model = load_model(asked.model, asked.batch_tokens) if asked.model else None
    files, config = data_options(asked, model.manifest["recipe"] if model else {})
    cutoff = utc(parse_cutoff(asked.cutoff)) if asked.cutoff else None
    logged, splits = read_splits(files, config)
    entries = splits.get(asked.split)
    if not entries:
        raise CandidatesError(f"The {asked.split} split is empty: give more data, or set splits, or test_from.")
    cases = make_cases(logged)
    found = validate_styles(cases)
    everything = {case.decision[:3]: case for case in comparable(trusted(cases, found), config)}
    cases = [everything[entry.decision[:3]] for entry in entries]
    scorer, trouble = find_scorer(asked, splits, config)
    rows = make_rows(splits["train"], entries, scorer, model)
    rule = best_rule(rows, entries)
    results = [judge(rows, rule, cases, group) for group in make_groups(cases, cutoff)]
    warnings = [*trouble, *warn(asked, entries, results, model)]
    if not as_recorded(config):
        warnings.append("Costs or a horizon are set: all outcomes, the teacher's too, are computed and net of them.")
    learnt = study(scorer, entries, config, found) if scorer else None
    checked = [validation.sentence(style) for style, validation in found.items()]
    print(terminal_table(asked.split, results, rule.name))
    print("\n".join([*checked, *(learnt.sentences() if learnt else ()), *warnings]))
    how = HOW.format(
        tolerance=config.expiry_tolerance, take_profit=config.take_profit, roll_delta=config.roll_delta,
        correlation=LEAST_CORRELATION, replicates=metrics.REPLICATES, blocks=metrics.MIN_BLOCKS,
    )  # fmt: skip
    write_report(Path(asked.output_dir), asked, files, results, rows, rule, cases, [*checked, *warnings], how, learnt)
    print(f"Report in {asked.output_dir}")
    return 0


def load_model(folder: str, batch_tokens: int | None):
    from policy import Policy as TunedPolicy  # only here: the baselines need no torch

    return TunedPolicy.load(folder, batch_tokens=batch_tokens)


def find_scorer(asked: argparse.Namespace, splits: dict, config) -> tuple[QScorer | None, list[str]]:
    """The saved Q-scorer, or one fitted on train and calibrated on validation; and what to know of it.

    Raises:
        QScorerError: for a saved one that cannot be used. Data on which none can be fitted only go without.
    """
    if asked.q_scorer:
        scorer = QScorer.load(asked.q_scorer, check_every=math.inf)
        return scorer, warn_of_scorer(scorer.fitted.metadata, splits[asked.split], config)
    try:
        scorer = QScorer(q_scorer.fit(splits["train"], splits.get("validation", []), config))
    except QScorerError as error:
        return None, [f"There is no {Q_SCORER}. {error}"]
    return scorer, warn_of_scorer(scorer.fitted.metadata, splits[asked.split], config)


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
    its, ours = metadata["outcome_options"], {name: getattr(config, name) for name in q_scorer.OUTCOME_OPTIONS}
    other = [f"{name} {its[name]} (here {ours[name]})" for name in ours if its[name] != ours[name]]
    if other:
        warnings.append(f"WARNING: the {Q_SCORER} learnt outcomes with other options: {', '.join(other)}.")
    return warnings


class Study(NamedTuple):
    """What the Q-scorer predicted beside what came, by exit style: see q_scorer.compare and candidate_pairs.

    ``doubtful`` are the exit styles whose computed outcomes do not follow the recorded ones.
    """

    metadata: dict
    doubtful: list[str]
    compared: dict[str, q_scorer.Comparison]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]

    def sentences(self) -> list[str]:
        doubt = " WARNING: these are computed outcomes, which do not follow the recorded ones here."
        return [
            f"{Q_SCORER}, {style}: {compared.sentence()}{doubt if style in self.doubtful else ''}"
            for style, compared in self.compared.items()
        ]


def study(scorer: QScorer, entries: list[LoggedDecision], config, found: dict[str, Validation]) -> Study:
    compared, pairs = {}, {}
    for style in sorted({entry.decision.exit_style for entry in entries}):
        its = [entry for entry in entries if entry.decision.exit_style == style]
        answers = scorer.decide([entry.decision for entry in its])
        compared[style] = q_scorer.compare(answers, its, config)
        pairs[style] = q_scorer.candidate_pairs(answers, its, config)
    doubtful = [style for style in compared if found[style].trades and not found[style].follows]
    return Study(scorer.fitted.metadata, doubtful, compared, pairs)


def parse_cutoff(text: str) -> datetime.datetime:
    time = iso_time(text)
    if time is None:
        raise CandidatesError(f"cutoff={text!r} is not a date such as 2024-01-01.")
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
# Tables


def show(metric: str, figure: Figure, with_interval: bool = True) -> str:
    """0.931 [0.901, 0.955]; -12 to 30 where only bounds are known; n/a where it is not defined."""
    if math.isnan(figure.low) or math.isnan(figure.high):
        return "n/a"
    form = METRICS[metric].format
    text = format(figure.low, form)
    if figure.high > figure.low:
        text += f" to {figure.high:{form}}"
    if with_interval and figure.interval:
        text += f" [{figure.interval[0]:{form}}, {figure.interval[1]:{form}}]"
    return text


HEAD = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced",
    "trade_rate": "sells",
    "coverage": "known",
    "mean_pnl": "P&L a decision",
    "minus_teacher": "minus teacher",
}


def terminal_table(split: str, results: list[Result], rule: str) -> str:
    """The policies of each exit style, most like the teacher first."""
    blocks = []
    for group, times, _, figures in results:
        if group.name != ALL:
            continue
        cells = [["", *HEAD.values()]]
        for name, found in figures.items():
            short = ("balanced_accuracy", "trade_rate", "coverage")
            cells.append([name, *(show(metric, found[metric], metric not in short) for metric in HEAD)])
        blocks.append(f"\n{describe(split, group, times)}\n\n{align(cells)}")
        if MODEL in figures:
            differs = show("minus_best_rule", figures[MODEL]["minus_best_rule"])
            blocks.append(f"\nP&L a decision, {MODEL} minus best rule: {differs}")
    return "\n".join(
        [
            *blocks,
            "\nBest accuracy first; [95 % intervals]; P&L vs HODL in USD a unit of underlying; 'a to b' are bounds",
            f"where outcomes are unknown. The best rule is: {rule}.",
        ]
    )


def describe(split: str, group: Group, times: list[datetime.datetime]) -> str:
    name = "" if group.name == ALL else f", {group.name}"
    return (
        f"{group.exit_style}{name}: {len(group.places)} decisions of {split}, {times[0].date()} to {times[-1].date()}"
    )


def align(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def markdown_table(figures: dict[str, dict[str, Figure]], names: list[str]) -> str:
    lines = [f"| | {' | '.join(names)} |".replace("_", " "), "|---" * (len(names) + 1) + "|"]
    for row, found in figures.items():
        lines.append(f"| {row} | {' | '.join(show(name, found[name]) for name in names)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Report

IMITATION = list(METRICS)[: list(METRICS).index("coverage")]
MONEY = [
    "coverage",
    "total_pnl",
    "mean_pnl",
    "mean_pnl_known",
    "hit_rate",
    "worst_month",
    "max_drawdown",
    "mean_regret",
]
DIFFERENCES = ["minus_teacher", "minus_best_rule"]
HOW = """\
P&L is in USD for each unit of underlying, against holding it (HODL = 0), at the time of the decision. Where a policy \
did as the teacher, its outcome is the recorded one. Where it sold another call, the outcome is computed: for \
hold_to_expiry the Black-Scholes premium less what the call pays at the spot at expiry, which is that of the decision \
nearest to it, at most {tolerance:g} hours away; for tp_and_roll a replay, {take_profit:.0%} of the premium taken as \
profit and then a roll into the call nearest to delta {roll_delta:g}. It is unknown where iv or that spot is missing, \
for any other exit style, and for tp_and_roll unless the replay follows the recorded trades (correlation at least \
{correlation:g}). An unknown outcome never counts as zero: totals, means, worst month and drawdown are then bounds, \
`a to b`, with the unknown ones replaced by the worst and by the best outcome that the teacher recorded in that year \
(in all years, if there is none in that one). These \
bounds hold if no other call did worse, or better, than all of those. `mean pnl known` and `hit rate` leave the \
unknown ones out. Differences and regret \
compare like with like: a computed outcome with a computed one.

Intervals hold 95 % of {replicates:,} resamples of a moving-block bootstrap over decision times, in blocks that span \
the longest option's life; bounds have the interval of both ends. There is none where the data hold fewer than \
{blocks} blocks. The random policy is an expectation: each answer with the same probability."""


def write_report(folder: Path, asked, files, results, rows, rule, cases, notes, how, learnt: Study | None) -> None:
    """metrics.json, report.md and plots: made in a folder of their own, and moved when all are whole."""
    unfinished = folder / f"unfinished.{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        plots = draw(unfinished, results, rows, rule, cases)
        if learnt:
            q_scorer.draw_reliability(unfinished / RELIABILITY, learnt.pairs)
        text = report_text(asked, files, results, rule, notes, plots, how, learnt)
        (unfinished / "report.md").write_text(text, encoding="utf-8")
        figures = as_json(asked, files, results, rule, notes) | {"q_scorer": study_json(learnt)}
        found = json.dumps(figures, indent=2, allow_nan=False)
        (unfinished / "metrics.json").write_text(found, encoding="utf-8")
        for path in unfinished.iterdir():
            os.replace(path, folder / path.name)
    finally:
        for path in unfinished.iterdir():
            path.unlink()
        unfinished.rmdir()


def report_text(
    asked, files, results: list[Result], rule: Row, notes: list[str], plots: list[str], how: str, learnt: Study | None
) -> str:
    parts = [f"# {asked.model or 'Baselines'}, {asked.split} split"]
    parts += ["Read from " + ", ".join(f"`{os.path.basename(path)}`" for path in files) + "."]
    parts += [f"The best rule, the baseline that agrees most with the teacher here, is: {rule.name}."]
    parts += ["\n".join(f"- {note}" for note in notes)]
    for group, times, block, figures in results:
        title = f"{describe(asked.split, group, times)} (blocks of {block})"
        if group.name == ALL:
            parts += [f"## {title}", "Imitation:", markdown_table(figures, IMITATION)]
            parts += ["Money:", markdown_table(figures, MONEY), "Differences:", markdown_table(figures, DIFFERENCES)]
            parts += [f"![{plot}]({plot})" for plot in plots if group.exit_style in plot]
        else:
            parts += [f"### {title}", markdown_table(figures, ["accuracy", "coverage", "mean_pnl", *DIFFERENCES])]
    parts += [f"![{plot}]({plot})" for plot in plots if plot == CALIBRATION]
    if learnt:
        parts += [f"## {Q_SCORER}", *study_text(learnt), f"![{RELIABILITY}]({RELIABILITY})"]
    parts += ["## How it is measured", how]
    meanings = [f"| {name.replace('_', ' ')} | {m.better or 'neither'} | {m.meaning} |" for name, m in METRICS.items()]
    parts += ["\n".join([f"| metric (version {metrics.VERSION}) | better | |", "|---|---|---|", *meanings])]
    return "\n\n".join(parts) + "\n"


RELIABILITY = "q_scorer.png"


def study_text(learnt: Study) -> list[str]:
    meta = learnt.metadata
    fitted = (
        f"Learnt from {meta['train']['known']:,} known outcomes, {meta['train']['from'][:10]} to "
        f"{meta['train']['to'][:10]}; calibrated by {100 * meta['offset']:+.3f} % of spot on "
        f"{meta['validation']['known']:,}, {meta['validation']['from'][:10]} to {meta['validation']['to'][:10]}; "
        f"{q_scorer.gates_text(q_scorer.Gates(**meta['gates']))}."
    )
    return [fitted, "\n".join(f"- {sentence}" for sentence in learnt.sentences())]


def study_json(learnt: Study | None) -> dict | None:
    """None where there is no Q-scorer; figures that are not defined are null."""
    if learnt is None:
        return None
    compared = {style: q_scorer.comparison_json(found) for style, found in learnt.compared.items()}
    return {"fitted": learnt.metadata, "by_exit_style": compared}


def as_json(asked, files, results: list[Result], rule: Row, notes: list[str]) -> dict:
    return {
        "metrics_version": metrics.VERSION,
        "definitions": {name: {"better": m.better, "meaning": m.meaning} for name, m in METRICS.items()},
        "model": asked.model,
        "split": asked.split,
        "data_files": [os.path.basename(path) for path in files],
        "best_rule": rule.name,
        "notes": notes,
        "groups": [
            {
                "exit_style": group.exit_style,
                "group": group.name,
                "decisions": len(group.places),
                "from": times[0].isoformat(),
                "to": times[-1].isoformat(),
                "block": block,
                "rows": {
                    row: {name: figure_json(figure) for name, figure in found.items()}
                    for row, found in figures.items()
                },
            }
            for group, times, block, figures in results
        ],
        "versions": {name: importlib.metadata.version(name) for name in ("scikit-learn", "arch", "numpy", "datasets")},
    }


def figure_json(figure: Figure) -> dict:
    ends = [None if math.isnan(end) else end for end in (figure.low, figure.high)]
    value = ends[0] if ends[0] == ends[1] else None
    return {"value": value, "low": ends[0], "high": ends[1], "interval": figure.interval}


CALIBRATION = "calibration.png"


def draw(folder: Path, results: list[Result], rows: list[Row], rule: Row, cases: list[Case]) -> list[str]:
    """An equity plot for each exit style and, if there is a model, one of its calibration; returns their names."""
    names = []
    for result in (result for result in results if result.group.name == ALL):
        names.append(f"equity_{re.sub(r'[^a-z0-9_]', '_', result.group.exit_style.lower())}.png")
        draw_equity(folder / names[-1], result, rows, rule, cases)
    if rows[-1].name == MODEL:
        names.append(CALIBRATION)
        draw_calibration(folder / CALIBRATION, [r for r in results if r.group.name == ALL], rows[-1], rule, cases)
    return names


def draw_equity(path: Path, result: Result, rows: list[Row], rule: Row, cases: list[Case]) -> None:
    """Cumulative P&L vs HODL by decision time; a band where only bounds are known."""
    figure = Plot(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="black", linewidth=1, label="HODL")
    teacher = rows[0]
    styles = {
        TEACHER: {"color": "tab:grey", "linewidth": 4, "alpha": 0.5},
        Q_SCORER: {"color": "tab:green"},
        MODEL: {"color": "tab:blue"},
    }
    for row in [teacher, rule, *(row for row in rows if row.name in (Q_SCORER, MODEL))]:
        style = styles.get(row.name, {"color": "tab:orange", "linestyle": "--"})
        played = play(row, rule, cases, result.group.places, result.times)
        low, high = (np.bincount(played.time, side, len(result.times)).cumsum() for side in played.pnl.T)
        name = f"best rule: {row.name}" if row is rule else row.name
        if np.array_equal(low, high):
            axis.plot(result.times, low, label=name, **style)
        elif not np.isnan(low).any():
            axis.plot(result.times, np.stack([low, high], axis=1), **style)
            axis.fill_between(result.times, low, high, alpha=0.25, color=style["color"], label=f"{name}, bounds")
    axis.set(ylabel="cumulative P&L vs HODL (USD a unit)", title=f"{result.group.exit_style}, by decision time")
    figure.autofmt_xdate()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def draw_calibration(path: Path, results: list[Result], row: Row, rule: Row, cases: list[Case]) -> None:
    """Agreement with the teacher against the probability of the answer, in bins; their size by the area of dots."""
    figure = Plot(figsize=(6, 6), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    for group, times, _, figures in results:
        played = play(row, rule, cases, group.places, times)
        bins = metrics.calibration_bin(played.probability)
        used, sizes = np.unique(bins, return_counts=True)
        probability = [played.probability[bins == b].mean() for b in used]
        agreement = [(played.pick == played.teacher)[bins == b].mean() for b in used]
        error = show("calibration_error", figures[MODEL]["calibration_error"], with_interval=False)
        line_style = "--" if axis.collections else "-"  # two styles with the same answers would hide each other
        [line] = axis.plot(probability, agreement, line_style, label=f"{group.exit_style}, error {error}")
        axis.scatter(probability, agreement, s=300 * sizes / sizes.sum() + 5, color=line.get_color(), alpha=0.5)
    axis.set(xlabel="probability of the answer", ylabel="share that agrees with the teacher")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), title="Calibration (dots by their share of decisions)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Audit: can the answer be read from the prompt, or from something as simple as the order or the score?

PROMPTED = tuple(name for name, features in FEATURES.items() if {"messages", "prompt"} & features.keys())
CHOSEN_INDEX = re.compile(r"Chosen candidate index: (\d+)")
REWARD = re.compile(r"Reward \(USD\): (\S+)")


class Corpus(NamedTuple):
    """The prompts of a split with their answers, and the decisions they were rendered from."""

    prompts: list[str]
    answers: list[str]
    entries: list[LoggedDecision]


def audit(asked: argparse.Namespace) -> int:
    """Prints what each reader gets right; returns 1 if prompts name the answer, else 0."""
    files, config = data_options(asked, {})
    _, splits = read_splits(files, config)
    leaks, only_score = [], []
    for task in PROMPTED:
        corpora = render_splits(splits, config := config_of(task, config))
        leaks += find_leaks(corpora, config)
        if task not in CHATS:  # pairs to prefer between: there is no one answer to guess
            continue
        readers = make_readers(task, corpora["train"])
        cells = [[task, *corpora]]
        for name, read in readers.items():
            cells.append([name, *(f"{share_right(read, corpus):.3f}" for corpus in corpora.values())])
        # A decision with a high score and no trade may only be the last of a backtest: trades are counted apart.
        traded = [render([e for e in c.entries if e.chosen is not None], config) for c in corpora.values()]
        right = [share_right(readers[SCORE_RULE], corpus) for corpus in traded]
        cells.append([f"{SCORE_RULE}, on trades", *(f"{share:.3f}" for share in right)])
        only_score.append(all(share == 1.0 for share in right))
        print(f"\n{align(cells)}")
    print()
    if all(only_score):
        print(
            "Whenever the teacher sold, the score rule sold the same call: the teacher is a rule over one number that "
            "the prompt shows, so a model that agrees with it need have learnt no more than to read that number."
        )
    print("\n".join(leaks) if leaks else "Passed: no prompt names its answer.")
    return int(bool(leaks))


def share_right(read: Callable[[Corpus], list[str]], corpus: Corpus) -> float:
    return (
        float(np.mean([a == b for a, b in zip(read(corpus), corpus.answers, strict=True)]))
        if corpus.answers
        else math.nan
    )


def config_of(task: str, config: CoveredCallCandidatesConfig) -> CoveredCallCandidatesConfig:
    """The same options for another config; of preferences all pairs, however little their outcomes differ."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(CoveredCallCandidatesConfig)}
    if task == "preference":
        return PreferenceConfig(**shared | {"name": task, "min_edge_pct": 0.0})
    return CoveredCallCandidatesConfig(**shared | {"name": task})


def render_splits(splits: dict[str, list[LoggedDecision]], config: CoveredCallCandidatesConfig) -> dict[str, Corpus]:
    return {name: render(entries, config) for name, entries in splits.items() if entries}


def render(entries: list[LoggedDecision], config: CoveredCallCandidatesConfig) -> Corpus:
    entries = [entry for entry in entries if entry.decision.candidates]
    records = [record for entry in entries for record in RECORDS[config.name](entry, config)]
    return Corpus([prompt_of(record) for record in records], [record.get("label") for record in records], entries)


def prompt_of(record: dict) -> str:
    """What the user asks in a record: of a chat, or of a prompt with the replies to prefer between."""
    prompt = record["messages"] if "messages" in record else record["prompt"]
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] == "user")


SCORE_RULE = "score rule"


def make_readers(task: str, train: Corpus) -> dict[str, Callable[[Corpus], list[str]]]:
    """From a corpus to an answer for each of its prompts; those that need it are fitted on train."""
    if not train.prompts:
        raise CandidatesError("The training split holds no candidate: give more data, or other splits.")
    commonest = collections.Counter(train.answers).most_common(1)[0][0]
    rule = highest(scores, fit_threshold(scores, train.entries))
    return {
        "majority answer": lambda corpus: [commonest] * len(corpus.prompts),
        "always the first": lambda corpus: answers_to(task, corpus.entries, [0] * len(corpus.entries)),
        SCORE_RULE: lambda corpus: answers_to(task, corpus.entries, rule([e.decision for e in corpus.entries])),
        "bag of tokens": bag_of_tokens(train, commonest),
        "patterns of hindsight": lambda corpus: [read_hindsight(task, prompt) for prompt in corpus.prompts],
    }


def answers_to(task: str, entries: list[LoggedDecision], picks: list[Pick]) -> list[str]:
    """Picks as the answers of a task, in the order of its prompts."""
    if task == "per_decision_ranking":
        return [NO_TRADE if pick is None else str(pick + 1) for pick in picks]
    sizes = [len(entry.decision.candidates) for entry in entries]
    return [SELL_CALL if i == pick else SKIP for size, pick in zip(sizes, picks, strict=True) for i in range(size)]


def bag_of_tokens(train: Corpus, commonest: str) -> Callable[[Corpus], list[str]]:
    """A linear classifier of the words, and pairs of words, in the prompt's text."""
    if len(set(train.answers)) == 1:
        return lambda corpus: [commonest] * len(corpus.prompts)
    words = CountVectorizer(token_pattern=r"\S+", lowercase=False, ngram_range=(1, 2), min_df=2, binary=True)
    model = make_pipeline(words, LogisticRegression(max_iter=200)).fit(train.prompts, train.answers)
    return lambda corpus: model.predict(corpus.prompts).tolist()


def read_hindsight(task: str, prompt: str) -> str:
    """The answer as the hindsight block gives it away: it names the index, and only a sold call has a reward."""
    if task == "per_decision_ranking":
        found = CHOSEN_INDEX.search(prompt)
        return found[1] if found else NO_TRADE
    found = REWARD.search(prompt)
    return SELL_CALL if found and found[1] not in ("0.00", "-0.00", "n/a") else SKIP


def find_leaks(corpora: dict[str, Corpus], config: CoveredCallCandidatesConfig) -> list[str]:
    """One line for each way in which the prompts of ``config.name`` name the answer."""
    prompts = [prompt for corpus in corpora.values() for prompt in corpus.prompts]
    named = sum(bool(CHOSEN_INDEX.search(prompt) or REWARD.search(prompt)) for prompt in prompts)
    # Whatever its words, a prompt that names the answer changes when the answer does, and nothing else.
    changed = sum(changed_prompts(entry, config) for corpus in corpora.values() for entry in corpus.entries)
    leaks = {"hold the block of hindsight": named, "change when labels and outcomes do": changed}
    task = config.name
    return [f"FAILED: {count:,} of {len(prompts):,} {task} prompts {what}." for what, count in leaks.items() if count]


def changed_prompts(entry: LoggedDecision, config: CoveredCallCandidatesConfig) -> int:
    """How many of a decision's prompts another label and other outcomes change."""
    prompts = render([entry], config).prompts
    traded, another = 0 if entry.chosen is None else None, ((entry.chosen or 0) + 1) % len(entry.outcomes)
    for chosen in (traded, another):
        others = render([relabel(entry, chosen)], config).prompts
        if others:  # a label may also decide whether there is a record at all: that is no leak of a prompt's text
            return sum(prompt not in others for prompt in prompts)
    return 0


def relabel(entry: LoggedDecision, chosen: Pick) -> LoggedDecision:
    """The same decision with another label and other outcomes."""
    ghosts = tuple(Ghost(1.0, ghost.until) for ghost in entry.ghosts)
    return LoggedDecision(entry.decision, chosen, (Outcome(1.0, 1.0, 1.0),) * len(entry.outcomes), ghosts)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

DATA_OPTIONS = (
    "underlying", "exit_style", "candidate_order", "splits", "validation_from", "test_from", "purge", "duplicates",
    "on_bad_rows", *q_scorer.OUTCOME_OPTIONS,
)  # fmt: skip


def data_options(asked: argparse.Namespace, recipe: dict) -> tuple[list[str], CoveredCallCandidatesConfig]:
    """Files and options: those of the model's recipe, but what the command line gives goes before."""
    given = {name: value for name, value in vars(asked).items() if value is not None}
    for together in (("data_files", "data_dir"), ("splits", "validation_from", "test_from")):
        if any(name in given for name in together):
            recipe = {name: value for name, value in recipe.items() if name not in together}
    merged = {name: value for name, value in (recipe | given).items() if value is not None}
    if recipe.get("candidate_order") == merged.get("candidate_order") == "shuffle":
        del merged["candidate_order"]  # train_sft.py shuffles the training split alone
    files = find_csvs(merged.get("data_files"), merged.get("data_dir"), str(Path(__file__).parent))
    options = {name: merged[name] for name in DATA_OPTIONS if name in merged}
    config = CoveredCallCandidatesConfig(hindsight=asked.hindsight, **options)
    config.check()
    return files, config


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="a folder that train_sft.py saved")
    what.add_argument("--baselines-only", "--baselines_only", action="store_true", help="no model")
    what.add_argument("--audit", action="store_true", help="look for prompts that name their answer")
    add("--hindsight", action="store_true", help="with --audit: prompts as rendered with hindsight")
    add("--split", choices=SPLITS, default="test", help="default: %(default)s")
    add("--cutoff", metavar="DATE", help="the model's knowledge cutoff: decisions after it are also judged apart")
    add("--output_dir", "--output-dir", metavar="DIR", default="report", help="default: %(default)s")
    add(
        "--batch_tokens", "--batch-tokens", type=positive, metavar="N",
        help="tokens that the model reads at once; default: what fits in the GPU's free memory",
    )  # fmt: skip
    add("--q_scorer", "--q-scorer", metavar="FILE", help="that q_scorer.py saved; default: fitted here, on train")
    add_data_options(parser, "as for train_sft.py; default: as the model was tuned")
    asked = parser.parse_args(arguments)
    if asked.hindsight and not asked.audit:
        parser.error("--hindsight goes with --audit: a model is judged on prompts that do not name the answer.")
    return typed(parser, asked)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def add_data_options(parser: argparse.ArgumentParser, description: str) -> None:
    """Options for data_options; typed turns what was given into what it takes."""
    data = parser.add_argument_group("data", description)
    types = {name: {"type": float} for name in q_scorer.OUTCOME_OPTIONS}
    types |= {"data_files": {"nargs": "+"}, "splits": {"nargs": "+"}}
    for name in ("data_files", "data_dir", *DATA_OPTIONS):
        flags = list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))
        data.add_argument(*flags, **types.get(name, {}))


def typed(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> argparse.Namespace:
    """purge as a bool, and splits as fractions or the word train."""
    if asked.purge is not None:
        asked.purge = {"true": True, "false": False}.get(asked.purge.lower(), asked.purge)
    if asked.splits == ["train"]:
        asked.splits = "train"
    elif asked.splits:
        try:
            asked.splits = tuple(map(float, asked.splits))
        except ValueError:
            parser.error(f'--splits {" ".join(asked.splits)}: give three fractions that add up to 1, or "train".')
    return asked


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    asked = parse_arguments(arguments)
    expected = (CandidatesError, OSError)
    if asked.model:
        from scoring import PolicyError

        expected += (PolicyError,)
    try:
        sys.exit(audit(asked) if asked.audit else evaluate(asked))
    except expected as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
