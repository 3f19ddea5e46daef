import dataclasses
import re

import numpy as np
import pytest
from conftest import REAL_DATA, ROOT, decision, needs_real_data, on_the_default_stack, records, write_csv
from hypothesis import given
from hypothesis import strategies as st

from covered_call.candidates.builder import Backtest, load_candidates
from covered_call.candidates.columns import RECORDED, Grounds, logged_of
from covered_call.candidates.explanations import (
    CLAUSES,
    NUMBER,
    explain,
    explanations,
    judge_explanation,
    shown_of,
    statements_of,
)
from covered_call.candidates.options import CHATS, CoveredCallCandidatesConfig
from covered_call.candidates.prompts import admissible_answers
from covered_call.candidates.records import RECORDS
from covered_call.candidates.schema import CandidatesError

pytestmark = on_the_default_stack

SAMPLE = sorted(map(str, (ROOT / "data" / "sample").glob("*hold_to_expiry*.csv")))
REAL = sorted(map(str, REAL_DATA.glob("training_candidates_*.csv")))
FILES = [
    pytest.param(SAMPLE, "simulated", id="sample"),
    *(pytest.param([path], "teacher", id=path[-40:-20], marks=needs_real_data) for path in REAL),
]


def backtest_of(files, **options) -> Backtest:
    return Backtest(files, CoveredCallCandidatesConfig(**options))


class Explained:
    """The records of a task with what can be said of each."""

    def __init__(self, files, task, context="none", **options):
        backtest = backtest_of(files, context=context, splits="train", **options)
        self.grounds = backtest.grounds(task)
        self.columns = columns = backtest.decisions.columns()
        config = CoveredCallCandidatesConfig(name=task, explain=True, context=context)
        self.rows = RECORDS[task](columns, config).to_pylist()
        ranking = task == "per_decision_ranking"
        picks = columns.chosen if ranking else columns.place == columns.chosen[columns.decision_of]
        self.said = statements_of(shown_of(columns, task, picks), self.grounds)
        self.sizes = np.diff(columns.offsets) if ranking else np.ones(len(self.rows), int)
        self.task = task

    def judge(self, place, text):
        row = self.rows[place]
        prompt, answers = row["messages"][1]["content"], admissible_answers(self.task, self.sizes[place])
        return judge_explanation(text, prompt, row["label"], answers, self.said, place)

    def text(self, place):
        return self.rows[place]["messages"][2]["content"]


def corrupted(text: str, place: int, digit: int) -> str:
    """With one digit of its numbers changed; its first line is left as it is."""
    first = text.index("\n")
    digits = [match.start() for match in re.finditer(r"\d", text) if match.start() > first]
    if not digits:
        return text
    at = digits[place % len(digits)]
    other = (int(text[at]) + 1 + digit % 9) % 10
    return text[:at] + str(other) + text[at + 1 :]


@pytest.mark.parametrize("context", ["none", "spot"])
@pytest.mark.parametrize("task", CHATS)
@pytest.mark.parametrize("files, formula", FILES)
def test_the_texts_of_the_template_pass_and_changed_ones_do_not(files, formula, task, context):
    made = Explained(files, task, context)
    assert made.grounds.formula == formula
    rng, some = np.random.default_rng(0), range(0, len(made.rows), max(1, len(made.rows) // 150))
    for place in some:
        assert all(made.judge(place, made.text(place))[:4]), made.text(place)
    caught = []
    for place in some:
        changed = corrupted(made.text(place), *rng.integers(1_000, size=2).tolist())
        if changed != made.text(place):
            caught.append(not all(made.judge(place, changed)[:4]))
    assert np.mean(caught) >= 0.99


@pytest.fixture(scope="module")
def real():
    return Explained(REAL[:1], "per_decision_ranking", "spot")


@needs_real_data
@given(st.integers(0, 122), st.integers(0, 10**6), st.integers(0, 8))
def test_one_changed_digit_is_caught(real, place, at, digit):
    assert not all(real.judge(place, corrupted(real.text(place), at, digit))[:4])


@needs_real_data
def test_a_real_decision_is_explained_by_its_own_numbers(real):
    place = next(i for i, row in enumerate(real.rows) if row["decision_time"].date().isoformat() == "2024-11-12")
    assert real.text(place).split("\n")[2] == (
        "Reason: Score 5.09 is 2.09 above the threshold 3.00. It is the highest of 6. Delta 0.2388 is 0.0112 from "
        "the target 0.25 (+1.78 of 2.00). DTE 7 days is on target (+1.50 of 1.50). IV is 1.47 times realised vol "
        "(+2.82 of 3.00). A 30-day return of +41.93% in a bull regime costs 0.50. A spot +31.94% from its 50-day "
        "mean costs 0.50."
    )


@needs_real_data
@pytest.mark.parametrize("task", CHATS)
def test_the_parts_of_a_real_score_add_up_to_it(task):
    made = Explained(REAL[:1], task, "spot")
    for place in range(len(made.rows)):
        text = made.text(place)
        score = float(re.search(r"Score (\S+) is", text)[1])
        plus = sum(float(one) for one in re.findall(r"\(([+-]\d+\.\d\d)", text))
        rest = sum(float(one) for one in re.findall(r"not shown here: ([+-]\d+\.\d\d)", text))
        minus = sum(float(one) for one in re.findall(r"costs (\d+\.\d\d)", text))
        assert score == pytest.approx(plus + rest - minus, abs=0.025)  # each of up to four is rounded to 0.01


@pytest.mark.parametrize("task", CHATS)
def test_outcomes_change_no_text(corpus, task):
    backtest = backtest_of([corpus], splits="train")
    grounds, columns = backtest.grounds(task), backtest.decisions.columns()
    picks = columns.chosen if task == "per_decision_ranking" else columns.place == columns.chosen[columns.decision_of]
    other = {name: columns.numbers[name] * -3 + 7 for name in (*RECORDED, "counterfactual_pnl_vs_hodl")}
    changed = dataclasses.replace(columns, numbers=columns.numbers | other)
    assert explanations(changed, task, picks, grounds) == explanations(columns, task, picks, grounds)


def test_scores_that_no_formula_gives_are_compared_alone(corpus):
    made = Explained([corpus], "per_decision_ranking")
    assert made.grounds.formula is None
    text = made.text(1)
    assert text.startswith("2\nStrength: ")
    assert text.split("Reason: ")[1] == (
        "Score is 3.25. It is number 2 of 3 by score. The score does not explain this answer. Delta 0.2351 is number "
        "1 of 3, the highest first. DTE is 1 days."
    )
    assert made.text(60) == "NO_TRADE\nStrength: STRONG\nReason: No call is offered."
    assert made.judge(60, made.text(60))[:4] == (True, True, True, True)


def test_one_decision_is_explained_as_the_records_are(corpus):
    backtest = backtest_of([corpus], splits="train")
    for task in CHATS:
        grounds, rows = backtest.grounds(task), Explained([corpus], task).rows
        texts = iter(row["messages"][2]["content"] for row in rows)
        for entry in logged_of(backtest.decisions.columns()):
            for place in range(1 if task == "per_decision_ranking" else len(entry.decision.candidates)):
                text = next(texts)
                assert explain(entry.decision, text.partition("\n")[0], grounds, task, place) == text


@pytest.mark.parametrize("score, said", [
    (0.205, "Score 0.20 is 2.80 below"), (0.825, "Score 0.82 is 2.18 below"), (4.125, "Score 4.12 is 1.12 above"),
])  # fmt: skip
def test_the_score_as_it_is_said_is_so_far_from_the_threshold(tmp_path, score, said):
    path = write_csv(tmp_path / "a.csv", decision(sold=0, strikes=(62000,), score=score))
    (entry,) = logged_of(backtest_of([path]).decisions.columns())
    assert said in explain(entry.decision, "1", Grounds("teacher", {}))


def test_a_cut_score_is_not_taken_apart_and_neither_is_what_it_loses(tmp_path):
    """1.5 for its time, less 1.0 and 0.5, is 0: but so would be anything below."""
    path = write_csv(tmp_path / "a.csv", decision(sold=None, strikes=(62000,), score=0, delta=0.4, ivrv_ratio=1))
    (entry,) = logged_of(backtest_of([path]).decisions.columns())
    past = {"dist_ma50": 0.3, "ret_30d": 0.15, "ret_7d": 0.0, "rv_7d": 0.5, "regime": "bull"}
    state = entry.decision._replace(context=past, spot=60000.0)
    state = state._replace(candidates=tuple(one._replace(dte=7.0) for one in state.candidates))
    for score, lost in ((0.0, 0), (0.001, 2)):
        one = state._replace(candidates=tuple(call._replace(score=score) for call in state.candidates))
        assert explain(one, "NO_TRADE", Grounds("teacher", {})).count(" costs ") == lost


def test_a_delta_is_written_as_in_the_prompt_whatever_stands_beside_it(tmp_path):
    path = write_csv(tmp_path / "a.csv", [*decision(sold=0, delta=-0.0), *decision(1, sold=0, delta=0.0)])
    columns = backtest_of([path]).decisions.columns()
    texts = explanations(columns, "per_decision_ranking", columns.chosen, Grounds("teacher", {})).to_pylist()
    alone = [explain(one.decision, "1", Grounds("teacher", {})) for one in logged_of(columns)]
    assert ["1" + text for text in texts] == alone
    assert "Delta -0.0000 is" in texts[0] and "Delta 0.0000 is" in texts[1]


def test_without_cuts_there_is_no_strength(tmp_path):
    path = write_csv(tmp_path / "a.csv", decision(sold=0))
    (entry,) = logged_of(backtest_of([path]).decisions.columns())
    assert explain(entry.decision, "1", Grounds("teacher", {})).startswith(
        "1\nReason: Score 3.50 is 0.50 above the threshold 3.00. It is the highest of 3. Delta 0.2351 is 0.0149 from "
    )


@pytest.mark.parametrize("text, passes", [
    ("1\nStrength: STRONG\nReason: Score is 3.50.", (True, True, True)),
    ("1\nStrength: HUGE\nReason: Score is 3.50.", (False, True, True)),
    ("4\nStrength: STRONG\nReason: Score is 3.50.", (False, True, True)),
    ("1\nStrength: STRONG\nReason: Score is 3.50. It is the highest of 3. Delta 0.2351", (False, True, False)),
    ("1\nStrength: STRONG\nReason: Score is 3.50. The strike of 62000 is nice.", (True, True, False)),
    ("1\nStrength: STRONG\nReason: Score is 3.50. The win rate is 68%.", (True, False, False)),
    ("1\nStrength: STRONG\nReason: Score is 3.50. It is number 2 of 3 by score.", (True, True, False)),
    ("1 because", (False, False, False)),
])  # fmt: skip
def test_what_is_wrong_with_a_text_is_told_apart(corpus, text, passes):
    made = Explained([corpus], "per_decision_ranking")
    place = next(i for i, row in enumerate(made.rows) if row["label"] == "1")
    assert made.judge(place, text)[:3] == passes


def test_another_answer_or_strength_is_not_consistent(corpus):
    made = Explained([corpus], "per_decision_ranking")
    text = made.text(1)
    assert made.judge(1, text).consistent
    for wrong in (text.replace("2\n", "3\n", 1), re.sub("Strength: (.)", r"Strength: NOT\1", text)):
        assert not made.judge(1, wrong).consistent
    assert not made.judge(1, text[: text.index("Score")] + "DTE is 1 days.").consistent


def test_a_strength_is_a_third_of_the_training_splits_answers(tmp_path):
    rows = [row for day in range(90) for row in decision(day, sold=0, strikes=(62000,), score=3 + day / 100, dte=1.0)]
    path = write_csv(tmp_path / "a.csv", rows)
    splits = load_candidates(
        "per_decision_ranking", data_files=path, explain=True, splits=(0.5, 0.25, 0.25), cache_dir=str(tmp_path)
    )
    words = {name: [row["messages"][2]["content"].split()[2] for row in split] for name, split in splits.items()}
    assert [words["train"].count(word) for word in ("WEAK", "MODERATE", "STRONG")] == pytest.approx(
        [15, 15, 15], abs=1
    )
    assert set(words["test"]) == {"STRONG"}  # cut where the training split's are


def test_an_option_that_is_off_changes_nothing(corpus):
    assert records(corpus)[0]["messages"][2]["content"] in ("SKIP", "SELL_CALL")


@pytest.mark.parametrize("name", ["preference", "q_values"])
def test_explanations_are_of_chats(corpus, name):
    with pytest.raises(CandidatesError, match=f"explain is for .*, not for {name}"):
        load_candidates(name, data_files=corpus, explain=True)


def test_no_clause_tells_of_an_outcome():
    said = " ".join(clause.says.lower() for clauses in CLAUSES.values() for clause in clauses)
    assert not re.search("reward|p&l|pnl|outcome|expired|later|profit|drawdown", said)
    assert re.fullmatch(NUMBER, "+41.93%")
