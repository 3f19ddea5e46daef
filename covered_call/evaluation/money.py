"""What the answers of a policy brought: in money against holding, decision by decision, and judged by exit style.

Everything is judged a decision: what was sold, if anything. The two exit styles are never mixed, for their outcomes
mean different things.
"""

import collections
import datetime
import math
from typing import NamedTuple

import numpy as np

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import HOLD_TO_EXPIRY, as_recorded
from covered_call.candidates.schema import Decision, LoggedDecision
from covered_call.evaluation import metrics
from covered_call.evaluation.baselines import Pick
from covered_call.evaluation.metrics import Figure, Played

MIN_CORRELATION = 0.95  # of computed with recorded outcomes; below it the report says not to trust the computed ones
MODEL, TEACHER, HODL, RANDOM = "model", "teacher", "never sell (HODL)", "random (expected)"
Q_SCORER = "Q-scorer"
ALL = "all"


# ---------------------------------------------------------------------------------------------------------------------
# What each answer to a decision would have brought, in USD for each unit of underlying


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
    extremes = {market: (min(outcomes), max(outcomes)) for market, outcomes in recorded.items()}
    cases = []
    for entry in logged:
        found = (extremes[market] for market in markets(entry.decision) if market in extremes)
        computed = tuple(counterfactual.pnl_vs_hodl for counterfactual in entry.counterfactuals)
        cases.append(
            Case(entry.decision, entry.chosen, recorded_pnl(entry), computed, *next(found, (math.nan, math.nan)))
        )
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
    known = [value for value in case.computed if value is not None]
    if len(known) < len(case.computed):
        return math.nan
    return max([0.0, *known]) - (0.0 if pick is None else known[pick])


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
        return self.correlation >= MIN_CORRELATION

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
        below = f"the correlation is below {MIN_CORRELATION}"
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
# Figures: of each policy, by groups of decisions


class Row(NamedTuple):
    """The picks of a policy on the evaluated decisions; the uniform random one has none."""

    name: str
    picks: list[Pick]
    consistent: list[float]
    probabilities: list[float]


def play(row: Row, rule: Row, cases: list[Case], places: list[int], times: list[datetime.datetime]) -> Played:
    """The arrays that metrics are computed from, for the cases at ``places``."""
    place_of_time = {time: place for place, time in enumerate(times)}
    entries = []
    for i in places:
        case = cases[i]
        answers = [row.picks[i]] if row.picks else [None, *range(len(case.decision.candidates))]
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
    """A pick as a class of Played's arrays, which cannot hold None: 0 is NO_TRADE, from 1 the candidates."""
    return 0 if pick is None else pick + 1


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
