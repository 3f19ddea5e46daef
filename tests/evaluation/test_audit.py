"""The verb audit: prompts that name their answer are found, whatever their words."""

import re

import pyarrow as pa
import pytest
from conftest import REAL_DATA, decision, needs_real_data, no_candidates, write_csv

from covered_call.candidates.records import RECORDS
from covered_call.evaluation import audit


def run(capsys, *arguments) -> tuple[int, str]:
    status = audit.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out


def test_the_audit_passes_by_default_and_names_the_score_rule(backtest, capsys):
    status, printed = run(capsys, "--data_files", backtest)
    assert status == 0
    assert "Passed: no prompt names its answer." in printed
    assert "need have learnt no more than to read that number" in printed
    assert len(re.findall(r"score rule +1\.000 +1\.000 +1\.000", printed)) == 2


def test_the_audit_of_prompts_with_a_context_passes_and_names_the_columns_of_the_user_s(tmp_path, capsys):
    rows = [row | {"funding": day / 100} for day in range(60) for row in decision(day, day % 3 if day % 4 else None)]
    path = write_csv(tmp_path / "a.csv", rows, [*rows[0]])
    assert audit.main(["--data_files", path, "--context", "spot", "--context_columns", "funding"]) == 0
    said = capsys.readouterr().out
    assert "context_columns: funding stand in the prompts" in said and "Passed: no prompt names its answer." in said


def test_the_audit_fails_with_hindsight(backtest, capsys):
    status, printed = run(capsys, "--hindsight", "--data_files", backtest)
    assert status == 1
    assert len(re.findall(r"patterns of hindsight +1\.000 +1\.000 +1\.000", printed)) == 2
    assert "FAILED" in printed and "hold the block of hindsight" in printed
    assert re.search(r"FAILED: (\d+) of \1 per_decision_ranking prompts change when labels and outcomes do", printed)


def test_the_audit_finds_a_leak_in_words_it_does_not_know(backtest, capsys, monkeypatch):
    original = RECORDS["per_decision_ranking"]

    def leaky(columns, options):
        records = original(columns, options)
        rows = records.to_pylist()
        for row in rows:
            row["messages"][1]["content"] += f" Psst: {row['label']}"
        return pa.Table.from_pylist(rows, records.schema)

    monkeypatch.setitem(RECORDS, "per_decision_ranking", leaky)
    status, printed = run(capsys, "--data_files", backtest)
    assert status == 1
    assert "per_decision_ranking prompts change when labels and outcomes do" in printed


def test_the_audit_finds_the_words_of_an_answer_in_names(tmp_path, capsys):
    rows = [row for number in range(60) for row in decision(number, number % 3 or None)]
    for cells, expected in (({"exit_style": "SELL_CALL BTC"}, 1), ({"instrument": "skip-3"}, 1), ({}, 0),
                            ({"exit_style": "SKIPPERS"}, 0)):  # fmt: skip
        changed = [row | (cells if "exit_style" in cells or not place % 3 else {}) for place, row in enumerate(rows)]
        path = write_csv(tmp_path / "named.csv", changed)
        status, printed = run(capsys, "--data_files", path)
        assert status == expected
        assert ("are words of an answer" in printed) == bool(expected)


def real_files() -> str:
    return str(REAL_DATA / "training_candidates_*.csv")


@needs_real_data
@pytest.mark.parametrize("more, expected", [([], 0), (["--hindsight"], 1)])
def test_the_audit_of_the_real_files(capsys, more, expected):
    status, printed = run(capsys, "--data_files", real_files(), *more)
    assert status == expected
    assert re.search(r"score rule, on trades +1\.000 +1\.000 +1\.000", printed)
    assert "iv is 0.70 on every row: premiums are of a fixed vol." in printed
    assert "dte is 7 on every row." in printed
    assert re.search(r"delta nearest 0\.25 +1\.000 +1\.000 +1\.000", printed)
    assert "100.0% of the trades of train: highest score, delta nearest 0.25, place 1 of the file." in printed
    assert re.search(r"NO_TRADE.* never occur in train: a model cannot learn them", printed)


# --- What can be seen of the labels

SHUFFLED = ((62000, 0.31, 1.0), (64000, 0.12, 3.0), (63000, 0.22, 2.0))  # strike, delta, score


def labelled(tmp_path, sold, quotes=SHUFFLED, count=100, **cells) -> str:
    """A file of one decision a day; sold(day) is the place of the call that is sold, or None."""
    rows = []
    for day in range(count):
        made = decision(day, sold(day), strikes=[strike for strike, *_ in quotes], **{"dte": 1.0} | cells)
        for row, (_, delta, score) in zip(made, quotes, strict=True):
            row.update(delta=delta + day % 2 / 100, score=score)
        rows += made
    return write_csv(tmp_path / "labelled.csv", rows)


@pytest.mark.parametrize("place, expected", [
    (0, "delta nearest 0.3, place 1 of the prompt, place 1 of the file, lowest strike"),
    (1, "highest score, delta nearest 0.1, place 3 of the prompt, place 2 of the file, highest strike"),
    (2, "delta nearest 0.2, place 2 of the prompt, place 3 of the file"),
])  # fmt: skip
def test_the_rules_that_explain_the_trades_are_named(tmp_path, capsys, place, expected):
    path = labelled(tmp_path, lambda day: place if day % 5 else None)
    _, printed = run(capsys, "--data_files", path)
    assert "100.0% of the trades of train: " in printed
    named = printed.split("of train: ")[1].split(".\n")[0]
    assert re.sub(r"(0\.\d)\d", r"\1", named) == expected  # of a target the tenth: it is the middle of many


def test_the_target_is_fitted_on_train_and_its_share_is_of_each_split(tmp_path, capsys):
    """Until day 70 the call nearest to 0.22 is sold; afterwards the lowest strike, every other time."""
    path = labelled(tmp_path, lambda day: 2 if day < 70 or day % 2 else 0)
    options = ["--validation_from", "2024-11-10", "--test_from", "2024-11-20"]  # days 70 and 80
    _, printed = run(capsys, "--data_files", path, *options)
    assert re.search(r"trades that are of +train \(69\) +validation \(9\) +test \(20\)", printed)
    assert re.search(r"delta nearest 0\.2\d +1\.000 +0\.444 +0\.500", printed)
    assert re.search(r"lowest strike +0\.000 +0\.556 +0\.500", printed)


def test_numbers_that_never_vary_are_told(tmp_path, capsys):
    _, printed = run(capsys, "--data_files", labelled(tmp_path, lambda day: day % 3, ivrv_ratio=""))
    assert "iv is 0.70 on every row: premiums are of a fixed vol.\n" in printed
    assert "dte is 1 on every row.\n" in printed and "ivrv_ratio is blank on every row.\n" in printed
    assert not re.search(r"^(strike|delta|score) is ", printed, re.MULTILINE)


def test_a_number_that_varies_is_not_told_and_one_that_is_known_at_times_is_said_to_be(tmp_path, capsys):
    rows = [row for day in range(60) for row in decision(day, day % 3, dte=1.0 + day % 2)]
    for row in rows[::2]:
        row["iv"] = ""
    _, printed = run(capsys, "--data_files", write_csv(tmp_path / "a.csv", rows))
    assert "iv is 0.70 wherever it is known" in printed and "dte is" not in printed


def test_answers_that_never_occur_are_told_of_each_split(tmp_path, capsys):
    path = labelled(tmp_path, lambda day: day % 2 if day < 70 else None if day % 2 else 0)
    _, printed = run(capsys, "--data_files", path, "--validation_from", "2024-11-10", "--test_from", "2024-11-25")
    assert "NO_TRADE, 2 never occur in train: a model cannot learn them.\n" in printed
    assert "2, 3 never occur in test: nothing there tells whether a model has learnt them.\n" in printed


def test_where_nothing_was_sold_nothing_is_explained(tmp_path, capsys):
    rows = [row for day in range(40) for row in decision(day, None, dte=1.0)] + [no_candidates(40)]
    _, printed = run(capsys, "--data_files", write_csv(tmp_path / "a.csv", rows))
    assert "The teacher sold nothing in train: there is no trade to explain." in printed
    assert "1, 2, 3 never occur in train" in printed


@pytest.mark.parametrize("order", ["csv", "instrument", "shuffle"])
def test_the_place_in_the_file_is_that_of_the_file_whatever_the_prompts_order(tmp_path, capsys, order):
    path = labelled(tmp_path, lambda day: 1 if day % 5 else None)
    _, printed = run(capsys, "--data_files", path, "--candidate_order", order)
    assert re.search(r"place 2 of the file +1\.000 +1\.000 +1\.000", printed)
    found = re.search(r"place (\d) of the prompt +(\S+)", printed).groups()
    assert order == "shuffle" and float(found[1]) < 0.6 or found == ({"csv": "2", "instrument": "3"}[order], "1.000")
