"""The command line: JSON lines beside the CSV, written whole or not at all."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time as clock
from pathlib import Path

import pytest
from conftest import COLUMNS, decision, messages, no_candidates, python, records, row, time, write_csv

from covered_call.candidates.export import main

GOOD = [*decision(0, 0), *decision(1), no_candidates(2), *decision(3, 2)]


def export(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    return python("-m", "covered_call", "export", *arguments, cwd=cwd)


def chats(path: Path) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def exits_with_one_line(capsys, *arguments) -> str:
    """The message of a refused export."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    text = stop.value.code
    assert isinstance(text, str) and "\n" not in text  # a text is printed, and the exit status is 1
    return text


def test_chats_are_written_beside_the_input_which_is_left_alone(tmp_path):
    source = Path(write_csv(tmp_path / "run_1.csv", GOOD))
    before = source.read_bytes(), source.stat().st_mtime_ns
    ran = export("--input", "run_1.csv", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    names = ["run_1.csv", "run_1_per_candidate.jsonl", "run_1_per_decision_ranking.jsonl"]
    assert files(tmp_path) == names
    assert (source.read_bytes(), source.stat().st_mtime_ns) == before

    candidates, ranking = (chats(tmp_path / name) for name in names[1:])
    assert [chat[2]["content"] for chat in candidates] == ["SELL_CALL", *["SKIP"] * 7, "SELL_CALL"]
    assert [chat[2]["content"] for chat in ranking] == ["1", "NO_TRADE", "NO_TRADE", "3"]


def test_the_summary_counts_records_decisions_labels_and_skipped(tmp_path):
    write_csv(tmp_path / "a.csv", [*GOOD, *decision(4, score="?")])
    ran = export("--input", "a.csv", "--on-bad-rows", "skip", cwd=tmp_path)
    candidates, ranking = ran.stdout.splitlines()
    assert "a_per_candidate.jsonl: 9 records of 4 decisions" in candidates
    assert "SKIP 77.8%" in candidates and "SELL_CALL 22.2%" in candidates
    assert "a_per_decision_ranking.jsonl: 4 records of 4 decisions" in ranking
    assert "NO_TRADE 50.0%" in ranking and "1 25.0%" in ranking and "3 25.0%" in ranking
    assert "Dropped 1 decision(s)" in ran.stdout + ran.stderr
    assert "%|" not in ran.stderr  # the progress bar is for a terminal


def test_nested_lines_hold_what_was_known_and_what_is_answered(tmp_path, capsys):
    source = write_csv(tmp_path / "a.csv", GOOD)
    main(["--input", source, "--format", "nested", "--explain"])
    lines = {
        name: [json.loads(line) for line in (tmp_path / f"a_{name}.jsonl").read_text().splitlines()]
        for name in ("per_candidate", "per_decision_ranking")
    }
    first = lines["per_decision_ranking"][0]
    assert first["input"]["decision_time"] == "2024-09-01T00:00:00+00:00" and first["input"]["spot"] == 58466.0
    assert [call["strike"] for call in first["input"]["candidates"]] == [62000.0, 63000.0, 64000.0]
    assert first["output"]["answer"] == "1" and first["output"]["strength"] in ("WEAK", "MODERATE", "STRONG")
    assert first["output"]["reason"].startswith("Score is 3.50. It is the highest of 3.")
    assert lines["per_decision_ranking"][2]["input"]["candidates"] == []
    assert [len(line["input"]["candidates"]) for line in lines["per_candidate"]] == [1] * 9
    assert not re.search("pnl|reward|drawdown|label", json.dumps(lines))
    main(["--input", source, "--format", "nested"])
    (line, *_) = (tmp_path / "a_per_candidate.jsonl").read_text().splitlines()
    assert json.loads(line)["output"] == {"answer": "SELL_CALL"}


@pytest.mark.parametrize("words", [["--explain"], ["--format", "nested"]])
def test_explanations_and_nested_lines_are_not_for_a_cluster(tmp_path, capsys, words):
    source = write_csv(tmp_path / "a.csv", GOOD)
    said = exits_with_one_line(capsys, "--input", source, "--engine", "ray", "--output_dir", tmp_path / "out", *words)
    assert f"{words[0][2:]} goes with --engine local" in said


def test_lines_are_utf_8_and_not_ascii_escaped(tmp_path):
    path = write_csv(tmp_path / "a.csv", [*GOOD, *decision(4, underlying="Đogé")])
    main(["--input", path])
    text = (tmp_path / "a_per_decision_ranking.jsonl").read_bytes()
    assert "BTC-62000-C — Strike: 62000".encode() in text and "automated Đogé covered-call".encode() in text
    assert b"\\u" not in text and b"\r" not in text and text.endswith(b"}\n")
    assert all(list(json.loads(line)) == ["messages"] for line in text.splitlines())


@pytest.mark.parametrize("name", ["BTC", "A\\B", "\\n", "😀"])
def test_each_line_is_what_json_makes_of_the_chat(tmp_path, name):
    path = write_csv(tmp_path / "a.csv", [*decision(0, 1, underlying=name), no_candidates(1, exit_style=name)])
    main(["--input", path, "--hindsight"])
    for config in ("per_candidate", "per_decision_ranking"):
        lines = (tmp_path / f"a_{config}.jsonl").read_text(encoding="utf-8").splitlines()
        assert lines == messages(records(path, config, hindsight=True))
        assert any(f"Underlying: {name}\n" in chat[1]["content"] for chat in chats(tmp_path / f"a_{config}.jsonl"))


@pytest.mark.parametrize("spelling", ["--output-dir", "--output_dir"])
def test_another_output_folder_is_made(tmp_path, spelling):
    path = write_csv(tmp_path / "a.csv", GOOD)
    main(["--input", path, spelling, str(tmp_path / "new" / "out")])
    assert files(tmp_path / "new" / "out") == ["a_per_candidate.jsonl", "a_per_decision_ranking.jsonl"]
    assert files(tmp_path) == ["a.csv"]


def test_a_compressed_input_is_named_by_its_stem(tmp_path):
    content = Path(write_csv(tmp_path / "a.csv", GOOD)).read_bytes()
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(content))
    main(["--input", str(tmp_path / "a.csv"), str(tmp_path / "b.csv.gz")])
    for config in ("per_candidate", "per_decision_ranking"):
        assert (tmp_path / f"a_{config}.jsonl").read_bytes() == (tmp_path / f"b_{config}.jsonl").read_bytes()


@pytest.mark.parametrize(
    "inputs",
    [
        ["--input", "a.csv", "--input", "b.csv"],
        ["--input", "a.csv", "b.csv"],
        ["--input", "*.csv"],
        ["--data-files", "a.csv", "--data_files", "b.csv"],
    ],
)
def test_several_inputs_have_an_export_each(tmp_path, monkeypatch, inputs):
    monkeypatch.chdir(tmp_path)
    for day, name in enumerate("ab"):
        write_csv(tmp_path / f"{name}.csv", decision(day, spot=day + 1))
    main(inputs)
    for day, name in enumerate("ab"):
        assert all(
            f"Spot price: {day + 1}.00" in chat[1]["content"] for chat in chats(Path(f"{name}_per_candidate.jsonl"))
        )
    assert len(files(tmp_path)) == 6


def test_overlapping_runs_may_be_exported_side_by_side(tmp_path):
    paths = [write_csv(tmp_path / f"{name}.csv", GOOD) for name in "ab"]
    main(["--input", *paths])  # an export is one file's, so a decision in two files is no contradiction
    assert len(files(tmp_path)) == 6


@pytest.mark.parametrize(
    "options, kept",
    [
        (["--exit_style", "hold_to_expiry"], {("BTC", "hold_to_expiry"), ("ETH", "hold_to_expiry")}),
        (["--exit-style", "tp_and_roll", "--underlying", "ETH"], {("ETH", "tp_and_roll")}),
    ],
)
def test_filters_keep_what_they_name(tmp_path, options, kept):
    kinds = [(name, style) for name in ("BTC", "ETH") for style in ("hold_to_expiry", "tp_and_roll")]
    rows = [one for name, style in kinds for one in decision(0, underlying=name, exit_style=style)]
    main(["--input", write_csv(tmp_path / "a.csv", rows), *options])
    exported = [chat[1]["content"].splitlines() for chat in chats(tmp_path / "a_per_decision_ranking.jsonl")]
    assert {(lines[1].split(": ")[1], lines[3].split(": ")[1]) for lines in exported} == kept


@pytest.mark.parametrize("spelling", ["--candidate-order", "--candidate_order"])
def test_prompt_options_reach_the_prompts(tmp_path, spelling):
    path = write_csv(tmp_path / "a.csv", decision(0, 1, strikes=(64000, 63000, 62000)))
    main(["--input", path, spelling, "csv", "--hindsight"])
    (chat,) = chats(tmp_path / "a_per_decision_ranking.jsonl")
    assert "  [1] BTC-64000-C" in chat[1]["content"] and "Reward (USD): -3214.59" in chat[1]["content"]
    main(["--input", path])
    (chat,) = chats(tmp_path / "a_per_decision_ranking.jsonl")
    assert "  [1] BTC-62000-C" in chat[1]["content"] and "Reward" not in chat[1]["content"]


def test_help_and_unknown_options(tmp_path):
    shown = export("--help", cwd=tmp_path)
    assert shown.returncode == 0 and "--exit_style" in shown.stdout
    refused = export("--input", "a.csv", "--exit_stile", "x", cwd=tmp_path)
    assert refused.returncode != 0 and "--exit_stile" in refused.stderr and "Traceback" not in refused.stderr


# --- Whole or not at all


def with_old_exports(folder: Path, rows: list[dict]) -> Path:
    for config in ("per_candidate", "per_decision_ranking"):
        (folder / f"a_{config}.jsonl").write_text("old\n")
    return Path(write_csv(folder / "a.csv", rows))


def old_exports_stand_alone(folder: Path) -> bool:
    """Nothing but the input and the two old exports is in the folder."""
    names = ["a.csv", "a_per_candidate.jsonl", "a_per_decision_ranking.jsonl"]
    return files(folder) == names and all((folder / name).read_text() == "old\n" for name in names[1:])


def test_an_error_exits_with_one_line_and_leaves_the_old_exports(tmp_path):
    with_old_exports(tmp_path, [*GOOD, *decision(9, spot="much")])
    ran = export("--input", "a.csv", cwd=tmp_path)
    shutil.rmtree(tmp_path / "hf_home", ignore_errors=True)
    assert ran.returncode == 1 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ") and "a.csv, line 12, column spot: 'much' is not a number" in line
    assert old_exports_stand_alone(tmp_path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_exports(tmp_path, monkeypatch, capsys, function):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = with_old_exports(tmp_path, GOOD)
    monkeypatch.setattr(os, function, full)
    assert "No space left on device" in exits_with_one_line(capsys, "--input", path)
    assert old_exports_stand_alone(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
def test_a_killed_export_leaves_the_old_one(tmp_path):
    path = with_old_exports(tmp_path, GOOD)
    with open(path, "w", encoding="utf-8") as file:
        file.write(",".join(COLUMNS) + "\n")
        line = ",".join(row(decision_time="{}", instrument="{}").values()) + "\n"
        for hour in range(1_000):
            file.writelines(line.format(time(hour / 24), f"BTC-{number}-C") for number in range(40))
    command = [sys.executable, "-m", "covered_call", "export", "--input", str(path)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = {"a.csv", "a_per_candidate.jsonl", "a_per_decision_ranking.jsonl"}
    target = tmp_path / "a_per_candidate.jsonl"

    def halfway() -> bool:
        """Some lines are written, wherever they go."""
        beside = [one for one in tmp_path.iterdir() if one.name not in before]
        return target.stat().st_size != 4 or any(one.stat().st_size for one in beside)

    deadline = clock.monotonic() + 60
    while not halfway() and running.poll() is None and clock.monotonic() < deadline:
        clock.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "the export ended before it could be killed"
    assert target.read_text() == "old\n"
    assert (tmp_path / "a_per_decision_ranking.jsonl").read_text() == "old\n"


def test_two_inputs_of_one_name_are_refused_before_anything_is_written(tmp_path, capsys):
    for name in "xy":
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "a.csv", GOOD)
    out = tmp_path / "out"
    text = exits_with_one_line(capsys, "--input", tmp_path / "x/a.csv", tmp_path / "y/a.csv", "--output_dir", out)
    assert "same name" in text and not out.exists()
    main(["--input", str(tmp_path / "x/a.csv"), str(tmp_path / "y/a.csv")])  # in their own folders there is no clash


def test_an_input_that_is_not_there_is_named(tmp_path, capsys):
    assert f"No file matches {tmp_path}/none.csv" in exits_with_one_line(capsys, "--input", tmp_path / "none.csv")


def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", GOOD)
    assert "a.csv" in exits_with_one_line(capsys, "--input", path, "--output_dir", Path(path) / "out")


def test_what_a_killed_export_left_is_gone_after_the_next_and_that_of_a_running_one_is_not(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", GOOD)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (tmp_path / f".a_per_candidate.jsonl.{ended.pid}.tmp").write_text("half")
    (tmp_path / f".a_per_candidate.jsonl.{os.getppid()}.tmp").write_text("at work")
    main(["--input", path])
    assert files(tmp_path) == [
        f".a_per_candidate.jsonl.{os.getppid()}.tmp", "a.csv", "a_per_candidate.jsonl", "a_per_decision_ranking.jsonl",
    ]  # fmt: skip


def test_messages_name_options_as_the_command_line_does(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", [*GOOD[:2], GOOD[2] | {"score": "?"}, *GOOD[3:]])
    said = exits_with_one_line(capsys, "--input", path)
    assert said.endswith("or drop such decisions whole with --on_bad_rows skip.")


# --- Pairs and values


def test_preference_and_q_values_are_lines_with_all_columns(tmp_path, capsys):
    market = {"exit_style": "hold_to_expiry", "dte": 1.0}
    rows = [one for day in range(6) for one in decision(day, sold=0, spot=60000.0 + 4000 * (day % 2), **market)]
    path = write_csv(tmp_path / "a.csv", rows)
    main(["--input", path, "--configs", "preference", "q_values", "--fee", "0.001", "--min_edge", "1"])
    assert files(tmp_path) == ["a.csv", "a_preference.jsonl", "a_q_values.jsonl"]
    pairs, values = (
        [json.loads(line) for line in (tmp_path / f"a_{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("preference", "q_values")
    )
    assert pairs and all(pair["chosen_outcome"] - pair["rejected_outcome"] >= 1 for pair in pairs)
    assert [m["role"] for m in pairs[0]["prompt"]] == ["system", "user"]
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": pairs[0]["chosen_label"]}]
    expected = records(path, "q_values", fee=0.001)
    assert [row["q_sell"] for row in values] == [row["q_sell"] for row in expected]
    assert values[0]["decision_time"] == expected[0]["decision_time"].isoformat()
    assert "records of 6 decisions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--min_edge", "1"], "min_edge is of pairs: see --configs preference"),
        (["--configs", "q_values", "--min_edge", "1"], "min_edge is of pairs"),
        (["--fee", "0.1"], "fee says nothing of lines"),
        (["--configs", "q_values", "--splits", "train"], "splits says nothing of lines"),
        (["--configs", "preference", "--hindsight"], "hindsight is for per_candidate and per_decision_ranking"),
        (["--configs", "q_values", "--engine", "ray", "--output_dir", "x"], "q_values is exported here alone"),
    ],
)
def test_an_option_that_says_nothing_of_what_is_exported_is_refused(words, message, tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", GOOD)
    assert message in exits_with_one_line(capsys, "--input", path, *words)
    assert files(tmp_path) == ["a.csv"]
