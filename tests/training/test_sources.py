"""The key mix: which sources and shares it takes, what a file of records must hold, and what must not be in it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import on_the_default_stack
from hypothesis import given
from hypothesis import strategies as st

from covered_call.training.runs import RecipeError
from covered_call.training.sources import (
    Foreign,
    apportion,
    check_apart,
    check_files,
    read_chats,
    read_mix,
    read_pairs,
    sources_of,
)

pytestmark = on_the_default_stack
CONFIGS = ("per_candidate", "per_decision_ranking")
RANKINGS = {"config": "per_decision_ranking", "share": 0.6}


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def chat(asked: str, answer: str) -> dict:
    return {"messages": [said("system", "Compute."), said("user", asked), said("assistant", answer)]}


def pair(asked: str, chosen, rejected) -> dict:
    return {"prompt": [said("user", asked)], "chosen": chosen, "rejected": rejected}


def written(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# --- The key


def test_a_mix_reads_the_same_from_a_recipe_and_from_the_command_line():
    entries = [RANKINGS, {"data": "a.jsonl", "share": 0.4}]
    assert read_mix(entries, CONFIGS) == read_mix(json.dumps(entries), CONFIGS) == entries
    assert [source.is_file for source in sources_of(entries, "per_candidate")] == [False, True]
    assert [source.name for source in sources_of(None, "per_candidate")] == ["per_candidate"]
    assert read_mix(None, CONFIGS) is None


@pytest.mark.parametrize(
    "mix, message",
    [
        ("[", "is no YAML"),
        ("2024-13-01", "is no YAML"),
        ("tiny", "is no list of sources"),
        ([], "is no list of sources"),
        ([{"config": "per_candidate"}], "is no source: give config or data, and share"),
        ([{"config": "per_candidate", "share": 1, "data": "x"}], "is no source"),
        ([{"config": "q_values", "share": 1}], "'q_values' is not one of per_candidate, per_decision_ranking"),
        ([{"data": 3, "share": 1}], "3 is not the path of a file"),
        (
            [RANKINGS, {"config": "per_candidate", "share": 0}],
            "the share of per_candidate is 0: give a number above 0",
        ),
        ([RANKINGS, {"config": "per_candidate", "share": True}], "the share of per_candidate is True"),
        ([RANKINGS, {"config": "per_candidate", "share": 0.3}], "the shares add up to 0.9"),
        ([RANKINGS, {**RANKINGS, "share": 0.4}], "per_decision_ranking stands there twice"),
        ([{"data": "a.jsonl", "share": 1}], "nothing of the backtest in it: add one of per_candidate"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_with_the_reason(mix, message):
    with pytest.raises(RecipeError, match=message):
        read_mix(mix, CONFIGS)


@pytest.mark.parametrize("shares", [[0.5, 0.2500005, 0.2500005], [0.5, 0.4999992]])
def test_shares_that_add_up_to_1_but_for_a_rounding_divide_all_records(shares):
    found = apportion(2_000_000, shares)
    assert sum(found) == 2_000_000 and all(
        abs(n - share * 2_000_000) < 3 for n, share in zip(found, shares, strict=True)
    )


@given(st.integers(0, 100_000), st.lists(st.integers(1, 1000), min_size=1, max_size=6))
def test_shares_are_exact_to_less_than_a_record_and_add_up(total, weights):
    shares = [weight / sum(weights) for weight in weights]
    found = apportion(total, shares)
    assert sum(found) == total
    assert all(abs(count - total * share) < 1 for count, share in zip(found, shares, strict=True))


# --- Files


def test_a_jsonl_and_a_parquet_of_it_hold_the_same_records(tmp_path):
    records = [chat("1 + 1?", "2"), {**chat("2 + 2?", "4"), "template": "sum"}]
    lines = written(tmp_path / "a.jsonl", records[0]) and written(tmp_path / "a.jsonl", *records)
    pq.write_table(pa.Table.from_pylist([chat("1 + 1?", "2"), chat("2 + 2?", "4")]), tmp_path / "a.parquet")
    one, other = read_chats(lines), read_chats(str(tmp_path / "a.parquet"))
    assert one.records == other.records == [chat("1 + 1?", "2"), chat("2 + 2?", "4")]
    assert one.sha256 != other.sha256 and one.where(1) == f"{lines}, line 2"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"messages": "x"}',
        json.dumps({"messages": [said("user", "?")]}),
        json.dumps({"messages": [said("assistant", "!")]}),
        json.dumps({"messages": [said("user", "?"), said("assistant", " ")]}),
        json.dumps({"messages": [said("tool", "?"), said("user", "?"), said("assistant", "!")]}),
        json.dumps({"messages": [said("user", "\ud83d"), said("assistant", "!")]}),
        pytest.param("[" * 100_000, id="brackets without end"),
    ],
)
def test_a_line_that_is_no_chat_is_named_with_its_file_and_what_it_holds(line, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(chat("?", "!")) + "\n\n" + line + "\n")
    with pytest.raises(RecipeError, match=r"a\.jsonl, line 3: .*Correct it") as error:
        read_chats(str(tmp_path / "a.jsonl"))
    assert line[:3] in str(error.value).replace("\\", "")


def test_a_file_that_is_missing_empty_or_broken_is_refused(tmp_path):
    for text, message in (("", "is empty"), ("\n \n", "holds no records")):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(RecipeError, match=message):
            read_chats(str(tmp_path / "a.jsonl"))
    with pytest.raises(
        RecipeError, match=r"there is no file .*formulas.jsonl\. Make it with python data/make_formulas"
    ):
        check_files(sources_of([RANKINGS, {"data": str(tmp_path / "formulas.jsonl"), "share": 0.4}], ""))
    (tmp_path / "b").write_bytes(b"PAR1 cut short")
    with pytest.raises(RecipeError, match="is a Parquet that cannot be read"):
        read_chats(str(tmp_path / "b"))


def test_a_pair_is_two_answers_as_messages_or_as_text(tmp_path):
    path = written(tmp_path / "p.jsonl", pair("?", [said("assistant", "yes")], "no"))
    assert read_pairs(path).records == [{"prompt": [said("user", "?")], "chosen": "yes", "rejected": "no"}]


@pytest.mark.parametrize(
    "record, message",
    [
        (chat("?", "!"), 'each line is {"prompt"'),
        (pair("?", "yes", None), 'each line is {"prompt"'),
        (pair("?", [said("user", "yes")], "no"), 'each line is {"prompt"'),
        (pair("?", "yes", "yes"), "chosen and rejected are both 'yes'"),
    ],
)
def test_a_line_that_is_no_pair_is_named(record, message, tmp_path):
    with pytest.raises(RecipeError, match=r"p\.jsonl, line 1: ") as error:
        read_pairs(written(tmp_path / "p.jsonl", record))
    assert message in str(error.value)


# --- Apart from what is judged


REPEATED = {"messages": [said("user", "Spot: 1\nWhich?"), *chat("Why?", "2")["messages"]]}


@pytest.mark.parametrize("record", [chat("Spot:  1\nWhich?", "2"), pair("Spot: 1 Which? ", "2", "3"), REPEATED])
def test_a_record_that_asks_what_the_model_is_judged_by_is_refused(record):
    foreign = Foreign("a.jsonl", "", [7], [record])
    judged = {"validation": [], "test": [[said("system", "Another."), said("user", "Spot: 1\nWhich?")]]}
    with pytest.raises(RecipeError, match=r"a\.jsonl, line 7: 'Spot: 1 Which\?' repeats a prompt of the test split"):
        check_apart([foreign], judged)
    folded = Foreign("a.jsonl", "", [7], [{"messages": chat("Another.\n\nSpot: 1\nWhich?", "2")["messages"][1:]}])
    with pytest.raises(RecipeError, match=r"line 7: 'Another\. Spot: 1 Which\?' repeats a prompt of the test split"):
        check_apart([folded], judged)
    judged["test"][0][1] = said("user", "Spot: 2\nWhich?")
    check_apart([foreign], judged)
