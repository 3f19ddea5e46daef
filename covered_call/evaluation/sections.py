"""The content of a report as plain titles, texts and tables: one truth, which each format of it is rendered from."""

import math
import os
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import Terms
from covered_call.candidates.terms import MAX_BIAS, MIN_CORRELATION
from covered_call.evaluation import verdict
from covered_call.evaluation.cases import Cases
from covered_call.evaluation.details import Detail
from covered_call.evaluation.explanations import Judged
from covered_call.evaluation.extremes import Trade, cards_of
from covered_call.evaluation.metrics import DIFFERENCES, IMITATION, IN_PERCENT, IN_USD, METRICS, VERSION, Figure
from covered_call.evaluation.money import ALL, Held, Result
from covered_call.evaluation.rows import MODEL, Q_SCORER, Row, Trial
from covered_call.evaluation.scenarios import FEE, HALF_SPREAD
from covered_call.evaluation.slices import Bucket
from covered_call.page.cards import UNITS, Card
from covered_call.resampling import MIN_BLOCKS, REPLICATES
from covered_call.value_model.learning import Gates, gates_text
from covered_call.value_model.walk_forward import Comparison

EQUITY, COSTS = "equity_{market}.png", "costs_{market}.png"
CALIBRATION, RELIABILITY = "calibration.png", "q_scorer.png"


class Study(NamedTuple):
    """What the Q-scorer predicted beside what came, by exit style, of several underlyings by both: see
    walk_forward.compare and candidate_pairs.

    ``doubtful`` are those whose computed outcomes do not follow the recorded ones.
    """

    metadata: dict
    doubtful: list[str]
    compared: dict[str, Comparison]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]

    def sentences(self) -> list[str]:
        doubt = " WARNING: these are computed outcomes, which do not follow the recorded ones here."
        return [
            f"{Q_SCORER}, {style}: {compared.sentence()}{doubt if style in self.doubtful else ''}"
            for style, compared in self.compared.items()
        ]


class Evaluation(NamedTuple):
    """All that a report tells: what was judged on which decisions, and how each policy did there.

    Args:
        model: the folder of the tuned model; None if the baselines alone are judged.
        terms: on which outcomes are computed, by exit style.
        rows: the picks of each policy at ``cases``, the decisions of ``split``; ``trials`` those at other thresholds.
        rule: the one of ``rows`` that agrees most with the teacher.
        results: of each underlying and exit style all decisions, and then its slices.
        details: of those of all decisions, in their order.
        fitted_here: the policies that were fitted on some of these decisions: of them nothing can be shown here.
        first: what must be read before any figure.
        notes: what a reader of the figures must know beside them.
        study: None if there is no Q-scorer.
        explained: None of a model that gives answers alone.
        said: what the model says of its own answers, by the place of a decision among ``cases``.
    """

    model: str | None
    split: str
    files: list[str]
    config: CoveredCallCandidatesConfig
    terms: dict[str, Terms]
    cases: Cases
    rows: list[Row]
    trials: list[Trial]
    rule: Row
    results: list[Result]
    details: list[Detail]
    fitted_here: set[str]
    first: list[str]
    notes: list[str]
    study: Study | None
    explained: Judged | None
    said: dict[int, str]

    @property
    def overall(self) -> list[tuple[Result, Detail]]:
        return list(zip([one for one in self.results if one.group.name == ALL], self.details, strict=True))

    @property
    def verdicts(self) -> dict[str, list[str]]:
        """By what the decisions are called."""
        return {
            describe(self.split, result): verdict.sentences(result, detail.luck, self.rule.name, self.fitted_here)
            for result, detail in self.overall
        }


class Table(NamedTuple):
    """The first of the rows is the head."""

    caption: str
    rows: list[list[str]]


class Picture(NamedTuple):
    """A file of the report."""

    name: str


Part = str | list[str] | Table | Picture | Card


class Section(NamedTuple):
    """A title of a level, from 1, and what stands below it: a paragraph, a list, a table, a picture or a
    decision."""

    level: int
    title: str
    parts: list[Part]


def sections_of(evaluation: Evaluation, plots: Collection[str] = ()) -> list[Section]:
    """The verdict, and what it rests on; ``plots`` are the pictures that there are."""
    sections = [Section(1, f"{evaluation.model or 'Baselines'}, {evaluation.split} split", opening(evaluation))]
    details = {result.group[:2]: detail for result, detail in evaluation.overall}
    for result in evaluation.results:
        if result.group.name == ALL:
            sections.append(Section(2, describe(evaluation.split, result), group_parts(result)))
            detail = details[result.group[:2]]
            sections += detail_sections(detail, result.held, market_name(result))
            sections += trade_sections(evaluation, detail)
            slices = [one for one in evaluation.results if one.group[:2] == result.group[:2] and one is not result]
            sections.append(Section(3, "By year, trend and realised vol", [slice_table(one) for one in slices]))
    if CALIBRATION in plots:
        sections.append(Section(2, "Calibration", [*calibration_sentences(evaluation), Picture(CALIBRATION)]))
    if evaluation.study:
        sections.append(Section(2, Q_SCORER, [*study_parts(evaluation.study), Picture(RELIABILITY)]))
    if evaluation.explained:
        sections.append(Section(2, "Explanations", [Table("", evaluation.explained.rows())]))
    meanings = [[name.replace("_", " "), m.better or "neither", m.meaning] for name, m in METRICS.items()]
    head = [f"metric (version {VERSION})", "better", ""]
    how: list[Part] = [
        *how_measured(evaluation.config, evaluation.terms),
        Table("", [head, *meanings]),
    ]
    sections.append(Section(2, "How it is measured", how))
    there = [[part for part in one.parts if not isinstance(part, Picture) or part.name in plots] for one in sections]
    return [one._replace(parts=parts) for one, parts in zip(sections, there, strict=True)]


def opening(evaluation: Evaluation) -> list[Part]:
    """What comes first: warnings of what the model was not tuned on, and the verdict."""
    parts: list = list(evaluation.first)
    for name, sentences in evaluation.verdicts.items():
        parts += [f"**{name}**", sentences]
    parts += [fixed_vol_sentence(evaluation)] if fixed_vol_sentence(evaluation) else []
    parts += ["Read from " + ", ".join(f"`{os.path.basename(path)}`" for path in evaluation.files) + "."]
    parts += [f"The best rule, the baseline that agrees most with the teacher here, is: {evaluation.rule.name}."]
    return [*parts, evaluation.notes]


def fixed_vol_sentence(evaluation: Evaluation) -> str:
    fixed = {f"{detail.fixed_vol:g}" for _, detail in evaluation.overall if detail.fixed_vol is not None}
    if not fixed:
        return ""
    return (
        f"The premiums are of one fixed vol, {' and '.join(sorted(fixed))}, and of no market's: what selling earns "
        "here follows from that number. See the report for what the same picks earn at lower ones."
    )


def describe(split: str, result: Result) -> str:
    """All decisions of an underlying and an exit style."""
    group, span = result.group, f"{result.first.date()} to {result.last.date()}"
    return f"{group.underlying}, {group.exit_style}: {len(group.places):,} decisions of {split}, {span}"


def market_name(result: Result) -> str:
    """Of an underlying and an exit style, as a part of a file's name."""
    text = f"{result.group.underlying}_{result.group.exit_style}".lower()
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter == "_") else "_" for letter in text)


# ---------------------------------------------------------------------------------------------------------------------
# Figures as texts


def show(metric: str, figure: Figure, with_interval: bool = True) -> str:
    """0.931 [0.901, 0.955]; -12 to 30 where only bounds are known; n/a where it is not defined."""
    return show_as(METRICS[metric].format, figure, with_interval)


def show_as(form: str, figure: Figure, with_interval: bool = True) -> str:
    if math.isnan(figure.low) or math.isnan(figure.high):
        return "n/a"
    text = format(figure.low, form)
    if figure.high > figure.low:
        text += f" to {figure.high:{form}}"
    if with_interval and figure.interval:
        text += f" [{figure.interval[0]:{form}}, {figure.interval[1]:{form}}]"
    return text


def figure_rows(figures: dict[str, dict[str, Figure]], names: list[str]) -> list[list[str]]:
    """The figures of these names for each policy, the head first."""
    head = ["", *(name.replace("_", " ") for name in names)]
    return [head, *([row, *(show(name, found[name]) for name in names)] for row, found in figures.items())]


def group_parts(result: Result) -> list[Part]:
    tables = (
        ("Money, in % of spot", IN_PERCENT),
        ("Money, in USD a unit", IN_USD),
        ("Differences", DIFFERENCES),
        ("Imitation", IMITATION),
    )
    held, decisions = result.held, len(result.group.places)
    text = (
        f"Each decision ties up one coin until its label end: {held.mean:,.1f} coins at once on average, "
        f"{held.most:,} at most. Outcomes are computed at {decisions - held.by_record:,} decisions and recorded ones "
        f"at {held.by_record:,}; of one decision all policies are judged by outcomes of one kind, so that columns "
        f"subtract. Intervals are of blocks of {result.block:,} decision times."
    )
    made = [Table(caption, figure_rows(result.figures, list(names))) for caption, names in tables]
    return [text, *made]


def slice_table(result: Result) -> Table:
    names = [
        "accuracy",
        "trade_rate",
        "coverage",
        "mean_percent",
        "percent_minus_teacher",
        "mean_pnl",
        "minus_teacher",
    ]
    span = f"{result.first.date()} to {result.last.date()}"
    caption = f"{result.group.name}: {len(result.group.places):,} decisions, {span}"
    return Table(caption, figure_rows(result.figures, names))


# ---------------------------------------------------------------------------------------------------------------------
# Details


def detail_sections(detail: Detail, held: Held, market: str) -> list[Section]:
    sections = [
        Section(3, "Overlay on one coin", [*overlay_parts(detail, held), Picture(EQUITY.format(market=market))])
    ]
    sections.append(Section(3, "Against luck", luck_parts(detail)))
    if detail.costs:
        text = (
            f"Mean P&L in % of spot a decision at {detail.compared:,}, those with every outcome computed; 1x is "
            f"a half-spread of {HALF_SPREAD:.1%} of the option's price and a fee of {FEE:g} of spot, at each trade."
        )
        table = levels_table(detail.costs, "{:g}x costs")
        sections.append(Section(3, "Costs", [text, table, Picture(COSTS.format(market=market))]))
    if detail.vols:
        text = "The same decisions and picks, mean P&L in % of spot, with the premiums of another vol."
        sections.append(Section(3, "Vol", [text, levels_table(detail.vols, "iv x {:g}")]))
    if detail.break_evens:
        sections.append(Section(3, "Break-even vol", break_even_parts(detail)))
    sections += [Section(3, f"Calls by {kind}", bucket_parts(detail.buckets, kind)) for kind in kinds(detail.buckets)]
    return sections


def overlay_parts(detail: Detail, held: Held) -> list[Part]:
    text = (
        "Outcomes of neighbouring decisions overlap, so their sum is no equity. Here each call that is sold ties up "
        f"one of {held.most:,} coins, as many as decisions are open at once, and is marked at each decision time; "
        "gains are those of all open calls, divided by these coins. Sharpe and Sortino ratios are annualised and of "
        "the excess over holding; the drawdown is of the sum of gains; beta is that of the gains to the coin's own."
    )
    head = ["", "% of spot a year", "Sharpe", "Sortino", "max drawdown, % of spot", "beta"]
    forms = ("+.2f", "+.2f", "+.2f", ".2f", "+.3f")
    rows = [
        [name, *(show_as(form, figure) for form, figure in zip(forms, risk, strict=True))]
        for name, risk in detail.risks.items()
    ]
    return [text, Table("", [head, *rows])]


def luck_parts(detail: Detail) -> list[Part]:
    luck = detail.luck
    text = (
        f"{luck.tried} policies and thresholds were compared on these decisions. Of so many one looks good by chance: "
        "p is how often the best of as many that are worth nothing does as well as this one, in the same resamples as "
        "the intervals (a studentised reality check: White 2000, Hansen 2005). Below 0.05 counts as shown."
    )
    if not luck.p:
        return [text, "The data are too short for resamples, so nothing is shown."]
    benchmarks = list(luck.p)
    policies = list(dict.fromkeys(name for of in luck.p.values() for name in of))
    rows = [[name, *(p_text(luck.of(name, other)) for other in benchmarks)] for name in policies]
    return [text, Table("", [["p, against", *benchmarks], *rows])]


def p_text(p: float) -> str:
    return "" if math.isnan(p) else f"{p:.3f}"


def levels_table(found: dict[str, dict[float, Figure]], head: str) -> Table:
    levels = list(next(iter(found.values())))
    rows = [[name, *(show_as("+.3f", of[level]) for level in levels)] for name, of in found.items()]
    return Table("", [["", *map(head.format, levels)], *rows])


def break_even_parts(detail: Detail) -> list[Part]:
    text = (
        "The iv at which the trades of a policy would have earned nothing on average, and in brackets that at which "
        "they were sold: the market must pay more than the first for such trades to pay. 'beyond' is less than 0.3 or "
        "more than 2 times the iv sold at."
    )
    years = sorted({one.year for one in detail.break_evens if one.year is not None})
    policies = list(dict.fromkeys(one.policy for one in detail.break_evens))
    found = {(one.policy, one.year): one for one in detail.break_evens}
    rows = []
    for name in policies:
        cells = [found.get((name, year)) for year in (None, *years)]
        rows.append([name, *("" if one is None else iv_text(one.break_even, one.iv) for one in cells)])
    return [text, Table("", [["", "all", *map(str, years)], *rows])]


def iv_text(break_even: float, iv: float) -> str:
    return f"{'beyond' if math.isnan(break_even) else f'{break_even:.3f}'} ({iv:.3f})"


def kinds(buckets: list[Bucket]) -> list[str]:
    return list(dict.fromkeys(one.kind for one in buckets))


def bucket_parts(buckets: list[Bucket], kind: str) -> list[Part]:
    text = "Trades with a known outcome, and their mean P&L in % of spot a trade."
    its = [one for one in buckets if one.kind == kind]
    ranges = sorted({(one.low, one.high) for one in its})
    found = {(one.policy, one.low): one for one in its}
    rows = []
    for name in dict.fromkeys(one.policy for one in its):
        cells = [found.get((name, low)) for low, _ in ranges]
        rows.append([name, *("" if one is None else bucket_text(one) for one in cells)])
    head = [f"{low:g} and more" if math.isinf(high) else f"{low:g} to {high:g}" for low, high in ranges]
    return [text, Table("", [["", *head], *rows])]


def bucket_text(bucket: Bucket) -> str:
    return f"{bucket.trades:,}: {show_as('+.3f', bucket.percent)}"


def trade_sections(evaluation: Evaluation, detail: Detail) -> list[Section]:
    """The best and the worst trades of the policy that is told of, in a table, and then one by one."""
    row = next(row for row in evaluation.rows if row.name == detail.subject)
    sections = []
    for kind, trades in (("best", detail.best), ("worst", detail.worst)):
        if trades:
            text = (
                f"Which trades are the {kind} is known in hindsight alone: by P&L vs HODL in % of spot, so against "
                f"not selling, which is 0. Premiums are before costs; what came is P&L vs HODL after them. {UNITS}"
            )
            cards = cards_of(trades, row, evaluation.cases, evaluation.config, evaluation.said)
            sections.append(
                Section(3, f"The {len(trades)} {kind} trades: {detail.subject}", [text, trade_table(trades), *cards])
            )
    return sections


def trade_table(trades: list[Trade]) -> Table:
    head = ["decision time, UTC", "instrument", "spot, USD", "premium, USD", "P&L vs HODL, USD", "% of spot"]
    cells = [
        [
            one.time,
            one.instrument,
            f"{one.spot:,.2f}",
            f"{one.premium:,.2f}",
            f"{one.pnl:+,.2f}",
            f"{one.percent:+.2f}",
        ]
        for one in trades
    ]
    return Table("", [head, *cells])


def calibration_sentences(evaluation: Evaluation) -> list[str]:
    """What a reader should conclude."""
    found = []
    for result, _ in evaluation.overall:
        said, figure = calibration_of(evaluation, result), result.figures[MODEL]["calibration_error"]
        if said:
            found.append(f"{result.group.underlying}, {result.group.exit_style}: {said[0]} Calibration error "
                         f"{show('calibration_error', figure)}.")  # fmt: skip
    return found


def calibration_of(evaluation: Evaluation, result: Result) -> tuple[str, np.ndarray, np.ndarray] | None:
    """Whether the model is too sure, in a sentence; its (B,) probabilities, and (B,) whether it was right."""
    said = evaluation.rows[-1].said
    if evaluation.rows[-1].name != MODEL or said is None:
        return None
    its = np.isin(said.of, result.group.places)
    probability, right = said.probability[its], said.right[its]
    if not len(probability):
        return None
    believed, came = float(probability.mean()), float(right.mean())
    figure = result.figures[MODEL]["calibration_error"]
    off = figure.interval is not None and figure.interval[0] > abs(believed - came) / 2 and abs(believed - came) > 0.02
    lesson = "too sure" if believed > came else "not sure enough"
    conclusion = f"it is {lesson}" if off else "on average it believes about what comes"
    text = (
        f"On average the model gives an answer a probability of {believed:.1%}, and {came:.1%} of these answers are "
        f"the teacher's: {conclusion}."
    )
    return text, probability, right


# ---------------------------------------------------------------------------------------------------------------------
# The Q-scorer, and how it is measured


def study_parts(study: Study) -> list[Part]:
    meta = study.metadata
    fitted = (
        f"Learnt from {meta['train']['known']:,} known outcomes, {meta['train']['from'][:10]} to "
        f"{meta['train']['to'][:10]}; offset of {100 * meta['offset']:+.3f} % of spot, fitted on "
        f"{meta['validation']['known']:,}, {meta['validation']['from'][:10]} to {meta['validation']['to'][:10]}; "
        f"{gates_text(Gates(**meta['gates']))}."
    )
    return [fitted, study.sentences()]


HOW = """\
P&L is against holding the coin (HODL = 0), for each unit of underlying, in USD and in % of spot at the decision. \
Where the market was at 4,000 and at 100,000 in turn, the second says what a coin earned; the verdict is in it. \
Outcomes are computed from the spots of the decisions themselves. {terms} Where the teacher's call has no computed \
outcome, the decision is judged by recorded ones. An outcome is unknown where iv, or a spot within {tolerance:g} \
hours, is missing, for any other exit style, where the end of the files cuts it off, and where computed outcomes do \
not follow the recorded ones (correlation at least {correlation:g}, average error at most {bias:.0%} of the typical \
outcome). An unknown outcome never counts as zero: totals, means, worst month and drawdown are then bounds, `a to b`, \
with the unknown ones replaced by the worst and by the best outcome that the teacher's calls had in that year (in all \
years, if none is known in that one). These bounds hold if no other call did worse, or better, than all of those. \
`mean pnl known`, `hit rate` and `premium captured` leave the unknown ones out.

Intervals hold 95 % of {replicates:,} resamples of a moving-block bootstrap over decision times, in blocks that \
span the longest time from a decision to its label end; bounds have the interval of both ends. There is none where \
the data hold fewer than {blocks} blocks. Underlyings and exit styles are judged apart. Trends are returns over 30 \
days, and realised vols, of 30 days too, are cut into thirds. The random policy is an expectation: each answer with \
the same probability."""


def how_measured(config: CoveredCallCandidatesConfig, terms: dict[str, Terms]) -> list[str]:
    text = HOW.format(
        terms=" ".join(its.sentence(style, config) for style, its in terms.items()), tolerance=config.expiry_tolerance,
        correlation=MIN_CORRELATION, bias=MAX_BIAS, replicates=REPLICATES, blocks=MIN_BLOCKS,
    )  # fmt: skip
    return text.split("\n\n")
