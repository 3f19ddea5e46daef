"""Could the answer be read from the prompt, or from something as simple as the order or the score?

    covered-call audit --data_files 'runs/*.csv'   # of the prompts as they are trained on: exit status 0
    covered-call audit --hindsight                 # with the teacher's outcomes in them it can: exit status 1

Readers too simple to have learnt anything answer the prompts of each split: by the commonest answer, by the place, by
the score, by single words. And every label and outcome is changed: a prompt that changes with them names its answer.
What can be seen of the labels is told too: the rule that explains them, numbers that never vary, answers that never
occur.
"""

import argparse
import collections
import dataclasses
import math
from collections.abc import Callable

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from covered_call.candidates.builder import Backtest
from covered_call.candidates.columns import OPINION, columns_of, logged_of
from covered_call.candidates.data_options import Help, add_data_options, backtest_of, config_of, typed
from covered_call.candidates.leaks import (
    CHOSEN_INDEX,
    PROMPTED,
    REWARD,
    Corpus,
    find_late_opinions,
    find_leaks,
    find_unsettled,
    render,
    render_splits,
)
from covered_call.candidates.options import CHATS, CoveredCallCandidatesConfig
from covered_call.candidates.prompts import answer_of, present_in_order
from covered_call.candidates.schema import NO_TRADE, SELL_CALL, SKIP, CandidatesError, LoggedDecision
from covered_call.command_line import plain_errors, start_logging
from covered_call.evaluation.baselines import score_rule
from covered_call.evaluation.explanation_audit import audit_explanations
from covered_call.evaluation.labels import findings, fit_rules, label_cells, labels_of
from covered_call.tables import align

SCORE_RULE = "score rule"
Reader = Callable[[Corpus], list[str]]  # an answer to each prompt


def main(arguments: list[str]) -> int:
    """Prints what each reader gets right; returns 1 if prompts name the answer, else 0."""
    start_logging()
    args = parse_arguments(arguments)
    with plain_errors(args, CandidatesError):
        return audit(args)


def audit(args: argparse.Namespace) -> int:
    backtest = backtest_of(args, {})
    print(f"Reading {len(backtest.files)} file(s) ...", flush=True)
    options, leaks, only_score = backtest.options, [], []
    # Read once, in the order of the files, of which those of the prompts can be made.
    shown, backtest = backtest, Backtest(backtest.files, dataclasses.replace(options, candidate_order="csv"))
    splits = {
        name: logged_of(present_in_order(backtest.decisions.columns(numbers), options)) if len(numbers) else []
        for name, numbers in backtest.numbers.items()
    }
    for task in PROMPTED:
        config = config_of(task, options)
        corpora = render_splits(splits, config)
        leaks += find_leaks(corpora, config)
        if task in CHATS:  # else pairs to prefer between: there is no one answer to guess
            cells, right_on_trades = read_corpora(corpora, config)
            only_score.append(all(share == 1.0 for share in right_on_trades))
            print(f"\n{align(cells)}")
    print(f"\n{describe_labels(backtest, options)}\n")
    if args.explain:
        found, told = audit_explanations(shown, {task: shown.grounds(task) for task in CHATS})
        print("\n".join([*found, ""]))
        leaks += told
    if all(only_score):
        print(
            "Whenever the teacher sold, the score rule sold the same call: the teacher is a rule over one number that "
            "the prompt shows, so a model that agrees with it need have learnt no more than to read that number."
        )
    if options.context_columns:
        print(
            f"context_columns: {', '.join(options.context_columns)} stand in the prompts as the files have them. That "
            "they were known at the decision is for you to vouch for."
        )
    leaks += audit_past(backtest, options)
    print("\n".join(leaks) if leaks else "Passed: no prompt names its answer.")
    return int(bool(leaks))


def audit_past(backtest: Backtest, options: CoveredCallCandidatesConfig) -> list[str]:
    """What is told of others' outcomes, looked at; a line for each way in which it knows what came later."""
    leaks, decisions = [], backtest.decisions
    if options.analogues:
        print("Analogues: looked up again with all outcomes changed that were not settled at the decision.")
        leaks += find_unsettled(decisions.columns(), options)
    if options.opinions:
        columns = decisions.columns()
        before = columns.numbers[OPINION[2]]
        told = ~np.isnan(before)
        print(f"opinions: {told.sum():,} of {len(told):,} candidates have one, of a model that was fitted before.")
        leaks += find_late_opinions(columns)
    return leaks


def describe_labels(backtest: Backtest, options: CoveredCallCandidatesConfig) -> str:
    """A table of the rules that may explain what was sold, and what else there is to know of the labels.

    Args:
        backtest: with the candidates in the order of the files.
        options: which say the order of the prompts.
    """
    decisions = backtest.decisions
    splits = {
        name: labels_of(map(decisions.columns, decisions.batches(numbers)), options)
        for name, numbers in backtest.numbers.items()
        if len(numbers)
    }
    fitted = fit_rules(splits["train"])
    return "\n".join([align(label_cells(splits, fitted)), "", *findings(splits, fitted)])


def read_corpora(
    corpora: dict[str, Corpus], config: CoveredCallCandidatesConfig
) -> tuple[list[list[str]], list[float]]:
    """The table of what each reader gets right by split, and what the score rule gets right of the trades alone."""
    readers = make_readers(config.name, corpora.get("train"))
    cells = [[config.name, *corpora]]
    for name, read in readers.items():
        cells.append([name, *(f"{share_right(read, corpus):.3f}" for corpus in corpora.values())])
    # A decision with a high score and no trade may only be the last of a backtest: trades are counted apart.
    traded = [render([e for e in c.entries if e.chosen is not None], config) for c in corpora.values()]
    right = [share_right(readers[SCORE_RULE], corpus) for corpus in traded]
    return [*cells, [f"{SCORE_RULE}, on trades", *(f"{share:.3f}" for share in right)]], right


def share_right(read: Reader, corpus: Corpus) -> float:
    """NaN where there is nothing to read."""
    if not corpus.answers:
        return math.nan
    return float(np.mean([a == b for a, b in zip(read(corpus), corpus.answers, strict=True)]))


def make_readers(task: str, train: Corpus | None) -> dict[str, Reader]:
    """Those that need it are fitted on train."""
    if train is None or not train.prompts:
        raise CandidatesError("The training split holds no candidate: give more data, or other splits.")
    commonest = collections.Counter(train.answers).most_common(1)[0][0]
    rule = score_rule(columns_of(train.entries))
    return {
        "majority answer": lambda corpus: [commonest] * len(corpus.prompts),
        "always the first": lambda corpus: answers_to(task, corpus.entries, [0] * len(corpus.entries)),
        SCORE_RULE: lambda corpus: answers_to(task, corpus.entries, rule.picks(columns_of(corpus.entries)).tolist()),
        "bag of tokens": bag_of_tokens(train, commonest),
        "patterns of hindsight": lambda corpus: [read_hindsight(task, prompt) for prompt in corpus.prompts],
    }


def answers_to(task: str, entries: list[LoggedDecision], picks: list[int]) -> list[str]:
    """Picks, -1 for no trade, as the answers of a task, in the order of its prompts."""
    if task == "per_decision_ranking":
        return [answer_of(None if pick < 0 else pick) for pick in picks]
    sizes = [len(entry.decision.candidates) for entry in entries]
    return [SELL_CALL if i == pick else SKIP for size, pick in zip(sizes, picks, strict=True) for i in range(size)]


def bag_of_tokens(train: Corpus, commonest: str) -> Reader:
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


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call audit", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    add_data_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--explain", action="store_true", help="also the explanations of answers: what do they tell of?")
    run.add_argument("--hindsight", action="store_true", help="the prompts as rendered with hindsight")
    return typed(parser, parser.parse_args(arguments))
