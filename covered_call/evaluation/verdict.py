"""The verdict in plain sentences: who beats whom, in % of spot, and whether that is shown."""

import math

from covered_call.evaluation.luck import LEVEL, Luck
from covered_call.evaluation.metrics import Figure
from covered_call.evaluation.money import Result
from covered_call.evaluation.rows import HODL, MODEL, Q_SCORER, TEACHER

NAMES = {TEACHER: "the teacher", HODL: "never selling", MODEL: "The model", Q_SCORER: "The Q-scorer"}
AGAINST = {TEACHER: "percent_minus_teacher", HODL: "mean_percent"}  # the figure that is the difference


def sentences(result: Result, luck: Luck, rule: str, fitted_here: set[str]) -> list[str]:
    """Of the model, or else of the best rule, and of the Q-scorer against the teacher and never selling; first of the
    teacher against never selling. Of those that were fitted on some of these decisions nothing is shown."""
    figures = result.figures
    subjects = [name for name in ((MODEL if MODEL in figures else rule), Q_SCORER) if name in figures]
    pairs = [(TEACHER, HODL), *((name, other) for name in subjects for other in (TEACHER, HODL))]
    copies = {name for name in subjects if is_nothing(figures[name][AGAINST[TEACHER]])}
    pairs = [(name, other) for name, other in pairs if name not in copies or other == TEACHER]
    found = [(name, other, figures[name][AGAINST[other]]) for name, other in pairs]
    if MODEL in figures:
        found.append((MODEL, rule, figures[MODEL]["percent_minus_best_rule"]))
    return [said_of(name, other, figure, luck, name in fitted_here) for name, other, figure in found]


def said_of(name: str, benchmark: str, figure: Figure, luck: Luck, fitted_here: bool = False) -> str:
    """``figure`` is what the policy earned more than the benchmark, in % of spot a decision."""
    who = NAMES.get(name, f"The rule '{name}'").replace("the teacher", "The teacher")
    whom = NAMES.get(benchmark, f"the rule '{benchmark}'")
    if math.isnan(figure.low) or math.isnan(figure.high):
        return f"{who} against {whom}: not known, for outcomes are missing."
    if is_nothing(figure):
        return f"{who} earns what {whom} does: nothing is shown ({luck.tried} policies and thresholds compared)."
    if figure.low <= 0 <= figure.high:
        by = f"{who} minus {whom} is {figure.low:+.3f} to {figure.high:+.3f}"
    else:
        ends = sorted({abs(figure.low), abs(figure.high)})
        verb = "beats" if figure.low > 0 else "falls short of"
        by = f"{who} {verb} {whom} by {' to '.join(f'{end:.3f}' for end in ends)}"
    by += " % of spot a decision"
    if fitted_here:
        return f"{by}: not shown, for it was fitted on these decisions."
    return by + judged(figure, luck.of(name, benchmark), luck.tried)


def is_nothing(figure: Figure) -> bool:
    return figure.low == figure.high == 0


def judged(figure: Figure, p: float, tried: int) -> str:
    """The interval, the count of what was compared, and whether it is shown."""
    if figure.interval is None:
        return f": not shown, for the data are too short for an interval ({tried} policies and thresholds compared)."
    low, high = figure.interval
    text = f", 95 % interval [{low:+.3f}, {high:+.3f}]"
    count = f"one of {tried} policies and thresholds compared"
    if high < 0:
        return f"{text}: shown, {count}."
    if low <= 0:
        return f"{text}: not shown, {count}."
    if math.isnan(p) or p >= LEVEL:
        return f"{text}: not shown, for it is {count}, and the best of so many does as well by luck (p = {p:.2f})."
    return f"{text}: shown, {count} (p = {p:.3f} against luck)."
