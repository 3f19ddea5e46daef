"""The benchmark of what a model reads of a ranking prompt."""

import re

import pytest
from conftest import SCRIPT, decision, import_script, write_csv


@pytest.fixture
def bench():
    return import_script(SCRIPT.parent / "benchmarks" / "prompts.py")


def test_a_prompt_tells_less_of_each_candidate_and_all_else_as_before(bench, load, corpus):
    for context in ("none", "spot"):
        for split in load("per_decision_ranking", data_files=corpus, context=context).values():
            scoreless, deltas = (bench.rewritten(split, template) for template in bench.LESS.values())
            for before, one, other in zip(split, scoreless, deltas, strict=True):
                system, user, answer = before["messages"]
                assert [one["messages"][place] for place in (0, 2)] == [system, answer]
                assert one["label"] == before["label"]
                assert one["messages"][1]["content"] == re.sub(r", Score: [\d.]+", "", user["content"])
                few = re.sub(r"(\[\d+\]) .*(Delta: [\d.]+), .*", r"\1 \2", user["content"])
                assert other["messages"][1]["content"] == few
                assert ("Score" in user["content"]) == bool(before["candidates"])


def test_each_variant_is_a_row_of_its_seeds_and_a_run_that_has_finished_is_not_repeated(
    bench, monkeypatch, capsys, tmp_path, corpus
):
    """With a stand-in for the training: seed 0 is always right, seed 1 never sells."""
    asked = []

    def answers(train, judged, steps, seed, shuffle):
        asked.append((train[0]["messages"][1]["content"], steps, seed, shuffle))
        right = {name: list(split["label"]) for name, split in judged.items()}
        return right if seed == 0 else {name: ["NO_TRADE"] * len(its) for name, its in right.items()}

    monkeypatch.setattr(bench, "tiny_answers", answers)
    words = [
        "--data_files",
        corpus,
        "--exit_style",
        "tp_and_roll",
        "--splits",
        "0.4",
        "0.3",
        "0.3",
        "--seeds",
        "0",
        "1",
        "--steps",
        "7",
    ]
    words += ["--output_dir", str(tmp_path / "kept")]
    bench.main(words)
    printed = capsys.readouterr().out
    texts = [text for text, *_ in asked[:6]]
    assert [its[1:] for its in asked] == [(7, seed, shuffle) for seed in (0, 1) for shuffle in [False] * 5 + [True]]
    assert ["Score" in text for text in texts] == [True, False, False, True, True, True]
    assert ["Market context" in text for text in texts] == [False, False, False, True, False, False]
    for variant in bench.VARIANTS:
        assert f"| {variant}, seeds 0 1 | 0.625 (0.250 to 1.000) | " in printed
    assert "| always NO_TRADE | 0.250 | 0.250 | " in printed and "Steps: 7." in printed
    bench.main([*words, "--variants", "as it is"])
    bench.main([*words, "--report"])
    assert capsys.readouterr().out == 2 * printed and len(asked) == 12


def test_rules_that_read_one_number_stand_beside_them(bench, capsys, tmp_path):
    """A teacher that takes the delta nearest to 0.25, and never the best score."""
    rows = [decision(day, sold=day % 3, dte=1.0, exit_style="hold_to_expiry") for day in range(30)]
    for day, its in enumerate(rows):
        for place, candidate in enumerate(its):
            candidate["delta"] = 0.26 if place == day % 3 else 0.35
            candidate["score"] = 1.0 if place == day % 3 else 3.0
    path = write_csv(tmp_path / "a.csv", sum(rows, []))
    bench.main(
        ["--data_files", path, "--splits", "0.4", "0.3", "0.3", "--report", "--output_dir", str(tmp_path / "no")]
    )
    printed = capsys.readouterr().out
    assert re.search(r"^\| delta nearest 0.25, always sold \| 1.000 \| 1.000 \| 1.000 \| 1.000 \|$", printed, re.M)
    assert re.search(r"^\| highest score, always sold \| 0.000 \| 0.000 \|", printed, re.M)
    assert "seeds" not in printed.split("|", 1)[1]


def test_who_counts_the_candidates_and_reads_no_number_is_a_rule_too(bench, capsys, tmp_path):
    """A teacher that takes the second of two calls, and the first of three."""
    few, many = (61000, 62000), (61000, 62000, 63000)
    rows = [decision(day, sold=day % 2, strikes=few if day % 2 else many, dte=1.0) for day in range(30)]
    words = ["--data_files", write_csv(tmp_path / "a.csv", sum(rows, [])), "--exit_style", "tp_and_roll"]
    bench.main([*words, "--splits", "0.4", "0.3", "0.3", "--report", "--output_dir", str(tmp_path / "no")])
    assert "| commonest place among so many candidates | 1.000 | 1.000 | 1.000 | 1.000 |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_tiny_model_is_trained_and_answers_each_ranking_that_it_is_asked(bench, load, corpus):
    splits = load("per_decision_ranking", data_files=corpus)
    for shuffle in (False, True):
        found = bench.tiny_answers(splits["train"], {"test": splits["test"]}, 2, 0, shuffle)["test"]
        offered = [{"NO_TRADE", *map(str, range(1, 1 + len(row["candidates"])))} for row in splits["test"]]
        assert len(found) == len(offered) and all(one in its for one, its in zip(found, offered, strict=True))
