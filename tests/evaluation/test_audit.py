"""The verb audit: prompts that name their answer are found, whatever their words."""

import re

import pyarrow as pa
import pytest
from conftest import REAL_DATA, decision, needs_real_data, write_csv

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
