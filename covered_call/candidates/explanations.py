"""Why an answer was given, in a few sentences whose every number is in the prompt, or follows from what is.

Each sentence is a clause with a condition: the same clauses make the texts, and judge those of a model. Nothing here
takes an outcome: what is said is made of what the prompt shows, as it is rounded there.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covered_call.candidates.columns import STATE, Columns, Grounds, columns_of, word_of
from covered_call.candidates.context import TARGET_DELTA, Known, context_of, first_of
from covered_call.candidates.context_lines import filled, text_of
from covered_call.candidates.number_texts import days, each_distinct, exact, money, ratio
from covered_call.candidates.prompts import pick_of
from covered_call.candidates.schema import SELL_CALL, Decision, LoggedDecision
from covered_call.candidates.score_terms import (
    MOST_SCORE,
    PAST,
    PENALTIES,
    TARGET_DTE,
    THRESHOLD,
    penalties_of,
    scores_by,
    simulated_terms,
    teacher_terms,
)

STRENGTHS = ("WEAK", "MODERATE", "STRONG")
STRENGTH, REASON = "\nStrength: ", "\nReason: "
FORMULAS = ("teacher", "simulated")
FITS, CLOSE, LEAST = 0.999, 1e-6, 30  # of the rows that a formula can be tried on: the share, how near, and how many
SLIGHT = 0.005  # less of a score is not told apart from rounding


class Clause(NamedTuple):
    """A sentence, and the name of the condition under which it is true.

    Of ``says``, a name in braces is a number that is computed anew, or a word; the others are constants.
    """

    says: str
    when: str


ABOUT = (
    Clause("No call is offered.", "nothing"),
    Clause("Call {index} has the highest score of {count}.", "best"),
    Clause(f"Score {{score}} is {{gap}} above the threshold {THRESHOLD:.2f}.", "above"),
    Clause(f"Score {{score}} is {{gap}} below the threshold {THRESHOLD:.2f}.", "below"),
    Clause("Score is {score}.", "unmeasured"),
    Clause("It is the highest of {count}.", "highest"),
    Clause("It is number {rank} of {count} by score.", "outscored"),
    Clause("The score does not explain this answer.", "unexplained"),
    Clause("Only one call is sold at a time, and the others are not shown.", "alone"),
)
LOST = (
    Clause("A strike {above_spot} from spot in a bull regime costs {near_strike}.", "near_strike"),
    Clause("A 30-day return of {ret_30d} in a bull regime costs {rally}.", "rally"),
    Clause("A 7-day return of {ret_7d} in a bear regime costs {fall}.", "fall"),
    Clause("A 7-day vol of {rv_7d} costs {calm}.", "calm"),
    Clause("A spot {dist_ma50} from its 50-day mean costs {stretched}.", "stretched"),
)
REST = Clause("Terms not shown here: {rest}.", "rest")
# Where no formula is known, and nothing is left but to compare.
COMPARED = (
    Clause("Delta {delta} is number {delta_rank} of {count}, the highest first.", "ranked"),
    Clause("Delta is {delta}.", "single"),
    Clause("DTE is {dte} days.", "plain"),
    Clause("IV is {ivrv_ratio} times realised vol.", "plain_ivrv"),
    Clause("The 30-day return is {ret_30d} in a {regime} regime.", "plain_regime"),
)


def part_clauses(*most: str) -> tuple[Clause, ...]:
    """The sentences on nearness, time and richness, with what each of them can be at most."""
    near, time, rich = most
    return (
        Clause(f"Delta {{delta}} is {{off}} from the target {TARGET_DELTA:.2f} ({{nearness}}{near}).", "parts"),
        Clause(f"DTE {{dte}} days is on target ({{on_time}}{time}).", "on_target"),
        Clause(f"DTE {{dte}} days is {{late}} from the target {TARGET_DTE:.0f} ({{on_time}}{time}).", "off_target"),
        Clause(f"IV is {{ivrv_ratio}} times realised vol ({{richness}}{rich}).", "parts_ivrv"),
    )


CLAUSES = {
    "teacher": (*ABOUT, *part_clauses(" of 2.00", " of 1.50", " of 3.00"), *LOST, REST, *COMPARED),
    "simulated": (*ABOUT, *part_clauses("", "", ""), REST, *COMPARED),
    None: (*ABOUT, *COMPARED),
}
SCORED = ("nothing", "above", "below", "unmeasured")  # of these each reason has one
NUMBER = r"[+-]?\d+(?:\.\d+)?%?"
SPELT = {"regime": "[a-z]+"}


class Shown(NamedTuple):
    """What prompts show of the (K,) calls that explanations are about, as they round it; NaN where there is none.

    Args:
        numbers: (K,) each: those of the call and of the market, as fractions.
        count: of the calls that are shown.
        index, rank, delta_rank: from 1: the call's place among them, and by score and by delta, the highest first.
        sells: whether the answer is to sell it.
    """

    task: str
    numbers: dict[str, np.ndarray]
    count: np.ndarray
    index: np.ndarray
    rank: np.ndarray
    delta_rank: np.ndarray
    sells: np.ndarray


class Statements(NamedTuple):
    """What can be said of (K,) answers: of each clause whether it is true, and the texts of its numbers.

    Args:
        strength: the words.
        score: (K,) the score that an answer is about, NaN where there is no call.
    """

    clauses: tuple[Clause, ...]
    holds: dict[str, np.ndarray]
    texts: dict[str, pa.StringArray]
    strength: pa.StringArray | None
    score: np.ndarray


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def read_back(values: np.ndarray, text: Callable[[float], str]) -> np.ndarray:
    """(K,) float64: the numbers as a prompt's text gives them back; a percentage is a fraction again."""

    def number(said: str) -> float:
        return float(said.rstrip("%")) / (100 if said.endswith("%") else 1)

    distinct, places = np.unique(values.view(np.int64), return_inverse=True)  # by bits: prompts tell -0.0 from 0.0
    found = [np.nan if np.isnan(value) else number(text(value)) for value in distinct.view(np.float64).tolist()]
    return np.array(found, np.float64)[places] if len(found) else np.zeros(0)


SHOWN = {"strike": exact, "dte": days, "delta": ratio, "score": ratio, "iv": ratio, "ivrv_ratio": ratio}


def shown_of(columns: Columns, task: str, picks: np.ndarray) -> Shown:
    """Of the answers to a task's prompts, of which nothing but the state of a decision is taken.

    Args:
        picks: of per_decision_ranking (D,) the place of the call that is sold, -1 for no trade: then it is about the
            highest score; of per_candidate (R,) whether the call is sold.
    """
    state = {name: columns.numbers[name] for name in STATE}
    ranking = task == "per_decision_ranking"
    if ranking:
        sells = picks >= 0
        best = first_of(columns, np.ones(len(columns.decision_of), bool), -state["score"])
        rows = np.where(sells, columns.offsets[:-1] + picks, best)
        of = np.arange(len(columns))
    else:
        sells, rows, of = picks.astype(bool), np.arange(len(columns.decision_of)), columns.decision_of
    names = [name for name in SHOWN if not ranking or columns.context or name not in ("iv", "ivrv_ratio")]
    empty = np.full(len(rows), np.nan)
    numbers = {name: np.append(state[name], np.nan)[rows] for name in names}  # -1 is of no call
    numbers = dict.fromkeys(SHOWN, empty) | {name: read_back(numbers[name], SHOWN[name]) for name in names}
    numbers["spot"] = read_back(columns.spot[of], money)
    for name in (*PAST, "regime"):
        values = columns.context.get(name, np.full(len(columns), np.nan))[of]
        numbers[name] = (
            values if name == "regime" else read_back(values, lambda value, name=name: text_of(name, value))
        )
    return Shown(task, numbers, *places_of(columns, rows, ranking), sells)


def places_of(columns: Columns, rows: np.ndarray, ranking: bool) -> tuple[np.ndarray, ...]:
    """(K,) each: count, index, rank by score and by delta of the calls in these rows, as ``Shown`` has them."""
    if not ranking:
        ones = np.ones(len(rows), np.int64)
        return ones, ones, ones, ones
    ranks = []
    for name in ("score", "delta"):
        shown = read_back(columns.numbers[name], ratio)
        higher = shown > np.append(shown, np.nan)[rows][columns.decision_of]
        ranks.append(1 + np.bincount(columns.decision_of, higher, len(columns)).astype(np.int64))
    return np.diff(columns.offsets), rows - columns.offsets[:-1] + 1, *ranks


# ---------------------------------------------------------------------------------------------------------------------
# What can be said


def statements_of(shown: Shown, grounds: Grounds) -> Statements:
    numbers, terms, lost = shown.numbers, *terms_of(shown, grounds)
    rest = numbers["score"] - sum(terms.values()) + sum(lost.values()) if terms else np.zeros(len(shown.sells))
    values = {
        "gap": abs(read_back(numbers["score"], "{:.2f}".format) - THRESHOLD),  # of the score as it is said
        "off": abs(abs(numbers["delta"]) - TARGET_DELTA),
        "late": abs(numbers["dte"] - TARGET_DTE),
        "above_spot": numbers["strike"] / numbers["spot"] - 1,
        "rest": rest,
    }
    values |= numbers | terms | lost
    for name in PLACES:
        values[name] = getattr(shown, name)
    clauses = CLAUSES[grounds.formula]
    wanted = {name for clause in clauses for name in names_of_clause(clause)}
    texts = {
        name: each_distinct(np.asarray(values[name]), lambda value, name=name: say(name, value)) for name in wanted
    }
    holds = conditions(shown, grounds, terms, rest)
    holds |= {name: holds["parts"] & (amount > 0) for name, amount in lost.items()}
    return Statements(clauses, holds, texts, strengths_of(shown, grounds), numbers["score"])


def terms_of(shown: Shown, grounds: Grounds) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(K,) each: the parts of the score that can be told from what is shown, and what it loses; nothing where
    that does not make up the score, for numbers are rounded."""
    numbers = shown.numbers
    of_call = (numbers["ivrv_ratio"], numbers["delta"], numbers["dte"])
    nothing = {name: np.zeros(len(shown.sells)) for name in PENALTIES}
    if grounds.formula is None:
        return {}, nothing
    terms = teacher_terms(*of_call) if grounds.formula == "teacher" else simulated_terms(*of_call, np.nan)
    terms = {name: terms[name] for name in ("nearness", "on_time", "richness")}
    if grounds.formula != "teacher":
        return terms, nothing
    lost = penalties_of(numbers["strike"] / numbers["spot"], numbers["regime"], {name: numbers[name] for name in PAST})
    explained = abs(numbers["score"] - sum(terms.values()) + sum(lost.values())) < SLIGHT
    return terms, {name: np.where(explained, amount, 0.0) for name, amount in lost.items()}


def conditions(shown: Shown, grounds: Grounds, terms: dict, rest: np.ndarray) -> dict[str, np.ndarray]:
    """(K,) bool each, by the names of the clauses' conditions."""
    numbers, ranking = shown.numbers, shown.task == "per_decision_ranking"
    there, ivrv = ~np.isnan(numbers["score"]), ~np.isnan(numbers["ivrv_ratio"])
    high, top = numbers["score"] >= THRESHOLD, shown.rank == 1
    # At its ends a score is cut, and no sum of its parts.
    parts = there & bool(terms) & (numbers["score"] > 0) & (numbers["score"] < MOST_SCORE)
    plain, measured = there & ~parts, there & (grounds.formula is not None)
    by_score = np.where(shown.sells, top & (high | ~measured), ~(high & measured) | (not ranking))
    return {
        "nothing": ~there,
        "best": there & ~shown.sells & ranking,
        "above": measured & high,
        "below": measured & ~high,
        "unmeasured": there & ~measured,
        "highest": there & shown.sells & ranking & top,
        "outscored": there & shown.sells & ranking & ~top,
        "unexplained": there & ~by_score,
        "alone": measured & ~shown.sells & high & (not ranking),
        "parts": parts,
        "on_target": parts & (numbers["dte"] == TARGET_DTE),
        "off_target": parts & (numbers["dte"] != TARGET_DTE),
        "parts_ivrv": parts & ivrv,
        "rest": parts & (abs(rest) >= SLIGHT),
        "ranked": plain & ranking,
        "single": plain & (not ranking),
        "plain": plain,
        "plain_ivrv": plain & ivrv,
        "plain_regime": plain & ~np.isnan(numbers["regime"] + numbers["ret_30d"]),
    }


def strengths_of(shown: Shown, grounds: Grounds) -> pa.StringArray | None:
    """How far the score is from the threshold, on the answer's side of it: thirds of the training split's answers. The
    threshold is the same for all, so that the scores themselves can be cut. None without cuts."""
    if not grounds.cuts:
        return None
    score, ends = (
        shown.numbers["score"],
        np.array([grounds.cuts["other"], grounds.cuts["trade"]])[shown.sells.astype(int)],
    )
    above = (score[:, None] >= ends).sum(axis=1)
    place = np.where(shown.sells, above, 2 - (score[:, None] > ends).sum(axis=1))
    return pa.array(STRENGTHS).take(pa.array(np.where(np.isnan(score), 2, place)))


SIGNED = ("nearness", "on_time", "richness", "rest")
PLACES = ("count", "index", "rank", "delta_rank")


def say(name: str, value: float | None) -> str:
    """A number as an explanation has it: as the prompt does, or to two places."""
    if value is None:
        return ""
    if name == "regime":
        return word_of(name, value) or ""
    if name in PLACES:
        return str(int(value))
    if name in PAST:
        return text_of(name, value)
    if name == "delta" or name == "off":
        return ratio(value)
    if name in ("dte", "late"):
        return days(round(value, 2))
    if name == "above_spot":
        return f"{100 * value:+.2f}%"
    rounded = round(value, 2) + 0.0
    return f"{rounded:+.2f}" if name in SIGNED else f"{rounded:.2f}"


def names_of_clause(clause: Clause) -> list[str]:
    return re.findall(r"{(\w+)}", clause.says)


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def explanations(columns: Columns, task: str, picks: np.ndarray, grounds: Grounds) -> pa.StringArray:
    """(K,) what follows on each answer: the line of its strength, and that of its reason.

    Args:
        picks: as shown_of takes them.
    """
    return texts_of(statements_of(shown_of(columns, task, picks), grounds))


def texts_of(statements: Statements) -> pa.StringArray:
    sentences = []
    for clause in statements.clauses:
        its = statements.holds[clause.when]
        if its.any():
            said = filled(f" {clause.says}", {name: statements.texts[name] for name in names_of_clause(clause)})
            sentences.append(pc.if_else(pa.array(its), said, ""))
    if not len(statements.score):
        return pa.array([], pa.string())
    head = [] if statements.strength is None else [STRENGTH, statements.strength]
    reason = REASON.rstrip()  # each sentence begins with a blank
    return pc.binary_join_element_wise(*head, reason, *sentences, "")


def explain(
    decision: Decision, answer: str, grounds: Grounds, task: str = "per_decision_ranking", place: int = 0
) -> str:
    """An answer with its explanation, of a decision whose candidates stand as its prompt shows them.

    Args:
        grounds: of a model's manifest; Grounds("teacher", {}) says what the teacher's score is made of, and gives no
            strength.
        place: of per_candidate: which candidate is asked about.
    """
    return answer + texts_of(statements_about(decision, answer, grounds, task, place))[0].as_py()


def statements_about(decision: Decision, answer: str, grounds: Grounds, task: str, place: int = 0) -> Statements:
    """What can be said of one answer."""
    if task == "per_candidate":
        decision = decision._replace(candidates=decision.candidates[place : place + 1])
        picks = np.array([answer == SELL_CALL])
    else:
        pick = pick_of(answer)
        picks = np.array([-1 if pick is None else pick])
    return statements_of(shown_of(columns_of([LoggedDecision(decision, None, ())]), task, picks), grounds)


# ---------------------------------------------------------------------------------------------------------------------
# What it rests on


def grounds_of(parts: Iterable[Columns], known: Known, task: str) -> Grounds:
    """Which formula gives the scores of all these decisions, and the thirds of their scores by answer.

    Args:
        known: of their markets.
        task: of whose answers the thirds are.
    """
    errors: dict[str, list[np.ndarray]] = {name: [] for name in FORMULAS}
    scores, sells = [np.zeros(0)], [np.zeros(0, bool)]
    for columns in parts:
        context = context_of(columns, known)
        for name, found in errors.items():
            error = abs(scores_by(name, columns, context) - columns.numbers["score"])
            found.append(error[~np.isnan(error)])
        picks = (
            columns.chosen if task == "per_decision_ranking" else columns.place == columns.chosen[columns.decision_of]
        )
        shown = shown_of(columns, task, picks)
        there = ~np.isnan(shown.numbers["score"])
        scores.append(shown.numbers["score"][there])
        sells.append(shown.sells[there])
    fits = [name for name, found in errors.items() if formula_fits(np.concatenate([np.zeros(0), *found]))]
    return Grounds(fits[0] if fits else None, thirds_of(np.concatenate(scores), np.concatenate(sells)))


def formula_fits(errors: np.ndarray) -> bool:
    return len(errors) >= LEAST and bool((errors <= CLOSE).mean() >= FITS)


def thirds_of(scores: np.ndarray, sells: np.ndarray) -> dict[str, list[float]]:
    """Where the scores of either answer are cut into thirds; of one that does not occur, where those of all are."""
    cuts = {}
    for name, its in (("trade", sells), ("other", ~sells)):
        of = scores[its] if its.any() else scores
        cuts[name] = np.round(np.quantile(of, (1 / 3, 2 / 3)), 4).tolist() if len(of) else [0.0, 0.0]
    return cuts


# ---------------------------------------------------------------------------------------------------------------------
# Judging a text


class Verdict(NamedTuple):
    """Of one text.

    Args:
        valid: whether it has the three lines, an admissible answer, a word for the strength, and an end.
        grounded: whether each number of its reason stands in the prompt, or follows from it as a clause says.
        true: whether each sentence is a clause that is true here, with the right numbers.
        consistent: whether answer and strength are those that were decided, and the score is told, on the right side
            of the threshold if not with the right numbers.
        words: of the reason.
    """

    valid: bool
    grounded: bool
    true: bool
    consistent: bool
    words: int


def judge_explanation(
    text: str, prompt: str, answer: str, admissible: list[str], said: Statements, place: int
) -> Verdict:
    """Holds a text to what can be said.

    Args:
        answer: that was decided.
        said: of the answers that were decided, of which this is at ``place``.
    """
    lines = re.fullmatch(rf"(\S+){STRENGTH}(\S+){REASON}(.*)", text)
    if not lines:
        return Verdict(False, False, False, False, 0)
    first, strength, reason = lines.groups()
    sentences = re.split(r"(?<=\.) ", reason)
    found = [clause_of(sentence, said, place) for sentence in sentences]
    right = said.strength is not None and strength == said.strength[place].as_py()
    about = [clause for clause in said.clauses if clause.when in SCORED and said.holds[clause.when][place]]
    told = any(re.fullmatch(pattern_of(clause), one) for clause in about for one in sentences)
    loose = [number for one, clause in zip(sentences, found, strict=True) if not clause for number in numbers_in(one)]
    return Verdict(
        first in admissible and strength in STRENGTHS and reason.endswith("."),
        set(loose) <= set(numbers_in(prompt)),
        all(found),
        first == answer and right and told,
        len(reason.split()),
    )


def clause_of(sentence: str, said: Statements, place: int) -> Clause | None:
    """The clause that says this, if it is true and its numbers are right."""
    for clause in said.clauses:
        if said.holds[clause.when][place] and (numbers := re.fullmatch(pattern_of(clause), sentence)):
            expected = {name: said.texts[name][place].as_py() for name in numbers.groupdict()}
            if all(same(stated, expected[name]) for name, stated in numbers.groupdict().items()):
                return clause
    return None


def pattern_of(clause: Clause) -> str:
    """What a clause's sentence looks like, whatever its numbers."""
    pieces = re.split(r"{(\w+)}", clause.says)
    slots = [f"(?P<{name}>{SPELT.get(name, NUMBER)})" for name in pieces[1::2]]
    texts = [re.escape(text) for text in pieces[::2]]
    return "".join(text + slot for text, slot in zip(texts, [*slots, ""], strict=True))


def same(stated: str, expected: str) -> bool:
    """Whether two texts say the same number, in the same unit, as it is rounded here; or the same word."""
    if not re.fullmatch(NUMBER, stated):
        return stated == expected
    return stated.endswith("%") == expected.endswith("%") and float(stated.rstrip("%")) == float(expected.rstrip("%"))


def numbers_in(text: str) -> list[str]:
    """Without their sign, as units and dates write one, too."""
    return [number.lstrip("+-").rstrip("%") for number in re.findall(NUMBER, text)]
