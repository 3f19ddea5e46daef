"""What can be seen of the labels before anything is trained: the rule that explains them, and what never varies."""

import collections
import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from covered_call.candidates.chains import first_least
from covered_call.candidates.columns import STATE, Columns
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import answer_of, present_in_order
from covered_call.candidates.schema import NO_TRADE

TARGET_DELTAS = [round(0.01 * step, 2) for step in range(5, 51)]
NEAREST, PROMPT_PLACE, FILE_PLACE = "delta nearest {:.2f}", "place {} of the prompt", "place {} of the file"
RULES = ("highest score", NEAREST, PROMPT_PLACE, FILE_PLACE, "lowest strike", "highest strike")


@dataclasses.dataclass
class Labels:
    """Of some decisions: how many trades each rule explains, by its name and what is fitted of it; and the answers."""

    trades: int = 0
    right: collections.Counter[tuple[str, float]] = dataclasses.field(default_factory=collections.Counter)
    answers: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # the prompt's
    candidates: int = 0  # of the decision that has most
    low: dict[str, float] = dataclasses.field(default_factory=dict)  # of each number, NaN where none is known
    high: dict[str, float] = dataclasses.field(default_factory=dict)
    blank: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def share(self, rule: tuple[str, float]) -> float:
        """Of the trades that the rule explains; NaN without any."""
        return self.right[rule] / self.trades if self.trades else math.nan


def labels_of(parts: Iterable[Columns], options: CoveredCallCandidatesConfig) -> Labels:
    """Of decisions whose candidates stand in the order of the files."""
    labels = Labels()
    for columns in parts:
        shown = present_in_order(columns, options)
        count_right(labels, columns, shown)
        answers, counts = np.unique(shown.chosen, return_counts=True)
        for chosen, count in zip(answers.tolist(), counts.tolist(), strict=True):
            labels.answers[answer_of(None if chosen < 0 else chosen)] += count
        labels.candidates = max(labels.candidates, int(np.diff(columns.offsets).max(initial=0)))
        widen(labels, columns)
    return labels


def count_right(labels: Labels, columns: Columns, shown: Columns) -> None:
    """Args: shown: the same decisions with their candidates in the order of the prompts."""
    traded = columns.chosen >= 0
    labels.trades += int(traded.sum())
    numbers, chosen = columns.numbers, columns.chosen[traded]

    def count(name: str, value: float, order: np.ndarray) -> None:
        labels.right[name, value] += int((first_least(order, columns)[traded] == chosen).sum())

    count("highest score", 0, -numbers["score"])
    count("lowest strike", 0, numbers["strike"])
    count("highest strike", 0, -numbers["strike"])
    for target in TARGET_DELTAS:
        count(NEAREST, target, np.abs(numbers["delta"] - target))
    for name, places in ((FILE_PLACE, chosen), (PROMPT_PLACE, shown.chosen[traded])):
        found, counts = np.unique(places, return_counts=True)
        for place, trades in zip(found.tolist(), counts.tolist(), strict=True):
            labels.right[name, place + 1] += trades


def widen(labels: Labels, columns: Columns) -> None:
    """Takes the range of each number in."""
    for name in STATE:
        values = columns.numbers[name]
        known = values[~np.isnan(values)]
        labels.blank[name] += len(values) - len(known)
        if len(known):
            labels.low[name] = min(labels.low.get(name, math.inf), float(known.min()))
            labels.high[name] = max(labels.high.get(name, -math.inf), float(known.max()))


def fit_rules(train: Labels) -> list[tuple[str, float]]:
    """Each rule with what explains most of the trades; of equally good targets that in the middle."""
    fitted = []
    for name in RULES:
        found = {value: count for (rule, value), count in train.right.items() if rule == name}
        best = sorted(value for value, count in found.items() if count == max(found.values()))
        fitted.append((name, best[len(best) // 2] if best else 1))
    return fitted


def label_cells(splits: dict[str, Labels], fitted: list[tuple[str, float]]) -> list[list[str]]:
    """The table of the share of trades that each rule explains, by split."""
    cells = [["trades that are of", *(f"{name} ({labels.trades:,})" for name, labels in splits.items())]]
    for rule in fitted:
        cells.append([text_of(rule), *(f"{labels.share(rule):.3f}" for labels in splits.values())])
    return cells


def text_of(rule: tuple[str, float]) -> str:
    return rule[0].format(rule[1])


def findings(splits: dict[str, Labels], fitted: list[tuple[str, float]]) -> list[str]:
    """A sentence for each thing that somebody who trains on these labels should know."""
    return [*best_rules(splits["train"], fitted), *constants(splits.values()), *never(splits)]


def best_rules(train: Labels, fitted: list[tuple[str, float]]) -> list[str]:
    if not train.trades:
        return ["The teacher sold nothing in train: there is no trade to explain."]
    best = max(train.share(rule) for rule in fitted)
    names = ", ".join(text_of(rule) for rule in fitted if train.share(rule) == best)
    return [f"Explains best what the teacher sells, {best:.1%} of the trades of train: {names}."]


def constants(splits: Iterable[Labels]) -> list[str]:
    """Of numbers that are the same on every row of all splits."""
    said, splits = [], list(splits)
    for name in STATE:
        low = min((labels.low[name] for labels in splits if name in labels.low), default=math.nan)
        high = max((labels.high[name] for labels in splits if name in labels.high), default=math.nan)
        if math.isnan(low):
            said.append(f"{name} is blank on every row.")
        elif low == high:
            where = "wherever it is known" if any(labels.blank[name] for labels in splits) else "on every row"
            value = f"{low:.2f}" if name == "iv" and round(low, 2) == low else f"{low:g}"
            said.append(f"{name} is {value} {where}{': premiums are of a fixed vol' if name == 'iv' else ''}.")
    return said


def never(splits: dict[str, Labels]) -> list[str]:
    """Of answers that some prompt of a split admits and none has."""
    said = []
    for name, labels in splits.items():
        admitted = [NO_TRADE, *(answer_of(place) for place in range(labels.candidates))]
        missing = [answer for answer in admitted if not labels.answers[answer]]
        if missing:
            what = "a model cannot learn" if name == "train" else "nothing there tells whether a model has learnt"
            verb, them = ("occurs", "it") if len(missing) == 1 else ("occur", "them")
            said.append(f"{', '.join(missing)} never {verb} in {name}: {what} {them}.")
    return said
