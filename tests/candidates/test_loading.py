"""Loading: columns, every way to name the files, the cache, and overlapping runs."""

import datetime
import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import (
    COLUMNS,
    SCRIPT,
    decision,
    import_script,
    no_candidates,
    python,
    row,
    runs_scripts,
    time,
    write_csv,
)

from covered_call.candidates.schema import CandidatesError

CONFIGS = ("per_candidate", "per_decision_ranking")
ONE = {"splits": "train"}

# A trade, a step without candidates, and a decision that was not traded although a candidate was on offer.
HISTORY = [
    *decision(0, sold=1, spot=58466.5),
    no_candidates(1),
    *decision(2, strikes=(0.55,), iv="", ivrv_ratio="nan", reward="", pnl_vs_hodl="nan", max_drawdown_pct="0.0"),
]


@pytest.fixture(params=["load_candidates", pytest.param("load_dataset", marks=runs_scripts)])
def load_either(request, tmp_path):
    """Both ways to load: our function, and load_dataset on a script (with the trust flag that it asks for)."""

    def load(name="per_candidate", script=SCRIPT, **options):
        options = {"cache_dir": str(tmp_path / "arrow"), **options}
        if request.param == "load_dataset":
            return datasets.load_dataset(str(script), name, trust_remote_code=True, **options)
        return import_script(script).load_candidates(name, **options)

    return load


@pytest.fixture
def history(tmp_path) -> str:
    return write_csv(tmp_path / "history.csv", HISTORY)


def spots(loaded) -> set[float]:
    return set(loaded["train"]["spot"])


# --- Columns


def test_per_candidate_columns(load_either, history):
    train = load_either(data_files=history, **ONE)["train"]
    numbers = ("strike", "dte", "delta", "score", "iv", "ivrv_ratio", "spot", "reward", "pnl_vs_hodl",
               "max_drawdown_pct", "counterfactual_pnl_vs_hodl")  # fmt: skip
    text = datasets.Value("string")
    assert train.features == datasets.Features(
        {
            "messages": [{"role": text, "content": text}],
            "decision_id": text,
            "decision_time": datasets.Value("timestamp[us, tz=UTC]"),
            "underlying": text,
            "exit_style": text,
            "label": text,
            "trade_executed": datasets.Value("bool"),
            "instrument": text,
            **dict.fromkeys(numbers, datasets.Value("float64")),
        }
    )


def test_ranking_columns(load_either, history):
    train = load_either("per_decision_ranking", data_files=history, **ONE)["train"]
    text, number = datasets.Value("string"), datasets.Value("float64")
    one = {"instrument": text, "strike": number, "dte": number, "delta": number, "score": number, "iv": number,
           "ivrv_ratio": number, "spot": number, "reward": number, "pnl_vs_hodl": number,
           "max_drawdown_pct": number, "counterfactual_pnl_vs_hodl": number}  # fmt: skip
    assert train.features["candidates"] == datasets.Features({"candidates": [one]})["candidates"]
    assert train.features["chosen_index"] == datasets.Value("int32")
    assert list(train.features) == [
        "messages", "decision_id", "decision_time", "underlying", "exit_style", "label", "trade_executed",
        "candidates", "chosen_index",
    ]  # fmt: skip


def test_per_candidate_rows_hold_the_files_numbers(load_either, history):
    rows = load_either(data_files=history, **ONE)["train"].to_list()
    assert [one["label"] for one in rows] == ["SKIP", "SELL_CALL", "SKIP", "SKIP"]
    assert [one["trade_executed"] for one in rows] == [True, True, True, False]
    assert rows[1] | {"messages": None} == {
        "messages": None,
        "decision_id": "BTC|2024-09-01T00:00:00+00:00|tp_and_roll",
        "decision_time": datetime.datetime(2024, 9, 1, tzinfo=datetime.UTC),
        "underlying": "BTC",
        "exit_style": "tp_and_roll",
        "label": "SELL_CALL",
        "trade_executed": True,
        "instrument": "BTC-63000-C",
        "strike": 63000.0,
        "dte": 7.0,
        "delta": 0.23514593117822502,
        "score": 3.25,
        "iv": 0.7,
        "ivrv_ratio": 0.9306217222978382,
        "spot": 58466.5,
        "reward": -3214.59,
        "pnl_vs_hodl": 744.26,
        "max_drawdown_pct": 6.94,
        "counterfactual_pnl_vs_hodl": None,  # the file ends before it expires
    }
    assert (rows[3]["strike"], rows[3]["iv"], rows[3]["ivrv_ratio"]) == (0.55, None, None)


def test_outcomes_are_null_where_the_teacher_did_not_trade(load_either, history):
    candidates = load_either(data_files=history, **ONE)["train"]
    ranking = load_either("per_decision_ranking", data_files=history, **ONE)["train"]
    listed = [one for candidates in ranking["candidates"] for one in candidates]
    for name, value in (("reward", -3214.59), ("pnl_vs_hodl", 744.26), ("max_drawdown_pct", 6.94)):
        assert candidates[name] == [None, value, None, None]
        assert [one[name] for one in listed] == [None, value, None, None]


def test_ranking_rows_list_the_candidates_in_the_prompts_order(load_either, tmp_path):
    rows = [decision(day, sold=2, strikes=(64000, 62000, 63000)) for day in range(8)]
    path = write_csv(tmp_path / "a.csv", [*sum(rows, []), no_candidates(8), *decision(9)])
    orders = {}
    for order in ("instrument", "csv", "shuffle"):
        train = load_either("per_decision_ranking", data_files=path, candidate_order=order, **ONE)["train"].to_list()
        assert [one["chosen_index"] for one in train[8:]] == [None, None]
        assert train[8]["candidates"] == []
        for one in train[:8]:
            assert one["candidates"][one["chosen_index"] - 1]["strike"] == 63000
            assert str(one["chosen_index"]) == one["label"]
            for index, candidate in enumerate(one["candidates"], start=1):
                assert f"  [{index}] {candidate['instrument']} — " in one["messages"][1]["content"]
        orders[order] = [tuple(c["strike"] for c in one["candidates"]) for one in train[:8]]
    assert set(orders["instrument"]) == {(62000, 63000, 64000)} and set(orders["csv"]) == {(64000, 62000, 63000)}
    assert len(set(orders["shuffle"])) > 1


def test_rows_are_in_the_order_of_time(load_either, tmp_path):
    path = write_csv(tmp_path / "a.csv", [*decision(3), *decision(1), *decision(2)])
    ids = load_either("per_decision_ranking", data_files=path, **ONE)["train"]["decision_id"]
    assert [text.split("|")[1] for text in ids] == [time(1), time(2), time(3)]


# --- Ways to name the files


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two CSVs, one of them compressed, and something else."""
    folder = tmp_path / "runs"
    folder.mkdir()
    write_csv(folder / "a.csv", decision(0, spot=1))
    plain = Path(write_csv(tmp_path / "b.csv", decision(1, spot=2)))
    (folder / "b.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (folder / "notes.txt").write_text("not a CSV")
    return folder


def test_data_files_are_a_path_a_list_or_a_glob(load_either, folder):
    a, b = str(folder / "a.csv"), str(folder / "b.csv.gz")
    for data_files, expected in (
        (a, {1}),
        (b, {2}),
        ([a, b], {1, 2}),
        ([a, a], {1}),
        (str(folder / "*.csv"), {1}),
        (str(folder / "*.csv*"), {1, 2}),
        ([str(folder / "a*"), str(folder / "b*")], {1, 2}),
    ):
        assert spots(load_either(data_files=data_files, **ONE)) == expected


def test_data_dir_is_every_csv_in_it(load_either, folder):
    assert spots(load_either(data_dir=str(folder), **ONE)) == {1, 2}


def test_relative_paths_start_at_the_working_directory(load_either, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert spots(load_either(data_files="runs/a.csv", **ONE)) == {1}
    assert spots(load_either(data_files="runs/*.csv*", **ONE)) == {1, 2}
    assert spots(load_either(data_dir="runs", **ONE)) == {1, 2}


def test_files_that_are_not_there_are_named(load_either, tmp_path):
    for options in ({"data_files": str(tmp_path / "none*.csv")}, {"data_dir": str(tmp_path)}):
        with pytest.raises(ValueError, match=f"No file matches {tmp_path}"):
            load_either(**options)


@pytest.mark.parametrize("data_files, says", [([], "data_files"), ({"train": "a.csv"}, "not a dict")])
def test_data_files_of_another_kind_are_refused(load, data_files, says):
    with pytest.raises(CandidatesError, match=says):
        load(data_files=data_files)


@pytest.mark.parametrize("config", CONFIGS)
def test_streaming_gives_the_same_rows(load_either, history, config):
    streamed = load_either(config, data_files=history, streaming=True, **ONE)["train"]
    assert isinstance(streamed, datasets.IterableDataset)
    assert list(streamed) == load_either(config, data_files=history, **ONE)["train"].to_list()


def test_two_processes_give_the_same_rows(load_either, tmp_path):
    path = write_csv(tmp_path / "a.csv", [one for day in range(40) for one in decision(day, day % 3, dte=0.5)])
    alone = load_either(data_files=path, cache_dir=str(tmp_path / "alone"))
    shared = load_either(data_files=path, cache_dir=str(tmp_path / "shared"), num_proc=2)
    assert {name: split.to_list() for name, split in shared.items()} == {
        name: split.to_list() for name, split in alone.items()
    }
    assert alone["train"].num_rows == 96


@runs_scripts
@pytest.mark.parametrize("config", CONFIGS)
def test_load_dataset_and_load_candidates_give_the_same_rows(load, tmp_path, config):
    path = write_csv(tmp_path / "a.csv", [one for day in range(40) for one in decision(day, day % 3, dte=3.0)])
    for options in ({}, {"hindsight": True, "candidate_order": "shuffle", "seed": 5, "splits": (0.6, 0.2, 0.2)}):
        ours = load(config, data_files=path, **options)
        theirs = datasets.load_dataset(str(SCRIPT), config, data_files=path, trust_remote_code=True,
                                       cache_dir=str(tmp_path / "theirs"), **options)  # fmt: skip
        assert list(ours) == list(theirs) == ["train", "validation", "test"]
        assert all(ours[name].to_list() == theirs[name].to_list() for name in ours)


# --- The README's own call, and the default files

PLAIN_CALL = """
from datasets import load_dataset
print(sorted(set(load_dataset({path!r}, "per_candidate", splits="train")["train"]["spot"])))
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the script beside a data folder that holds only the sample."""
    project = tmp_path / "project"
    (project / "data" / "sample").mkdir(parents=True)
    shutil.copy(SCRIPT, project)
    sample = project / "data" / "sample"
    write_csv(sample / "training_candidates_BTC_a_simulated.csv", decision(0, spot=1))
    write_csv(sample / "training_candidates_BTC_b_simulated.csv", decision(1, spot=2))
    return project


@runs_scripts
def test_the_plain_call_works_where_scripts_are_trusted(project):
    ran = python("-c", PLAIN_CALL.format(path="./" + SCRIPT.name), cwd=project, HF_DATASETS_TRUST_REMOTE_CODE="1")
    assert ran.stdout == "[1.0, 2.0]\n", ran.stderr
    assert "reading the simulated sample in " in ran.stderr


@runs_scripts
def test_a_script_is_loaded_by_path_from_another_folder(project, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    call = PLAIN_CALL.format(path=str(project / SCRIPT.name)).replace("splits=", "trust_remote_code=True, splits=")
    ran = python("-c", call, cwd=elsewhere)
    assert ran.stdout == "[1.0, 2.0]\n", ran.stderr


def test_own_csvs_in_data_win_over_the_sample(load_either, project, caplog):
    script = project / SCRIPT.name
    assert spots(load_either(script=script, **ONE)) == {1, 2}
    assert f"reading the simulated sample in {project / 'data' / 'sample'}" in caplog.text

    caplog.clear()
    write_csv(project / "data" / "training_candidates_BTC_own_20251207_225615.csv", decision(0, spot=3))
    own = Path(write_csv(project / "own.csv", decision(1, spot=4)))
    gzipped = project / "data" / "training_candidates_ETH_own_20251207_225615.csv.gz"
    gzipped.write_bytes(gzip.compress(own.read_bytes()))
    write_csv(project / "data" / "notes.csv", decision(2, spot=5))
    assert spots(load_either(script=script, **ONE)) == {3, 4}
    assert f"reading the CSVs in {project / 'data'}." in caplog.text


def test_a_script_without_any_csv_says_so(load_either, project):
    shutil.rmtree(project / "data")
    with pytest.raises(ValueError, match="give data_files"):
        load_either(script=project / SCRIPT.name)


# --- Filters


@pytest.fixture
def mixed(tmp_path) -> str:
    """Two underlyings and two exit styles in one file, at the same times, their rows interleaved."""
    kinds = [(name, style) for name in ("BTC", "ETH") for style in ("hold_to_expiry", "tp_and_roll")]
    decisions = [decision(day, sold=number % 3, underlying=name, exit_style=style, spot=100 * (number + 1))
                 for day in range(3) for number, (name, style) in enumerate(kinds)]  # fmt: skip
    return write_csv(tmp_path / "mixed.csv", [one for several in zip(*decisions, strict=True) for one in several])


@pytest.mark.parametrize(
    "filters, expected",
    [
        ({}, {100, 200, 300, 400}),
        ({"underlying": "ETH"}, {300, 400}),
        ({"exit_style": "tp_and_roll"}, {200, 400}),
        ({"underlying": "BTC", "exit_style": "hold_to_expiry"}, {100}),
        ({"underlying": None, "exit_style": None}, {100, 200, 300, 400}),
    ],
)
def test_filters_keep_whole_decisions(load_either, mixed, filters, expected):
    train = load_either("per_decision_ranking", data_files=mixed, **filters, **ONE)["train"].to_list()
    assert {one["candidates"][0]["spot"] for one in train} == expected
    assert len(train) == 3 * len(expected)
    for one in train:
        assert len(one["candidates"]) == 3
        assert one["decision_id"] == f"{one['underlying']}|{one['decision_time'].isoformat()}|{one['exit_style']}"
        assert f"automated {one['underlying']} covered-call" in one["messages"][0]["content"]
        assert f"Teacher policy (exit_style): {one['exit_style']}\n" in one["messages"][1]["content"]


# --- The same decision in two files


def overlapping(folder: Path, *names: str) -> list[str]:
    """Files that hold day 1 in common, each with a spot that tells it from the others."""
    paths = []
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        rows = [*decision(1, spot=100 + number), *decision(2 + number, spot=200 + number)]
        paths.append(write_csv(folder / name, rows))
    return paths


def test_the_same_decision_in_two_files_is_an_error_that_names_both(load_either, tmp_path):
    first, second = overlapping(tmp_path, "a_20250101_000000.csv", "b_20250102_000000.csv")
    with pytest.raises(ValueError) as error:
        load_either(data_files=[first, second])
    assert first in str(error.value) and second in str(error.value) and 'duplicates="latest"' in str(error.value)


def test_the_later_run_is_kept_by_stamp_whatever_the_names_order(load_either, tmp_path):
    names = ("c_20250101_235959.csv", "a_20250103_000000.csv", "b_20250102_000000.csv")
    paths = overlapping(tmp_path, *names)
    for files in (paths, paths[::-1]):
        assert spots(load_either(data_files=files, duplicates="latest", **ONE)) == {101, 200, 201, 202}


def test_latest_reports_how_many_were_dropped(load, tmp_path, caplog):
    paths = overlapping(tmp_path, "a_20250101_000000.csv", "b_20250102_000000.csv")
    load(data_files=paths, duplicates="latest", **ONE)
    assert "1 decision(s) stood in two files" in caplog.text


def test_latest_needs_stamps_that_differ(load, tmp_path):
    same = overlapping(tmp_path, "x/a_20250101_000000.csv", "y/a_20250101_000000.csv")
    with pytest.raises(CandidatesError, match="carry the same stamp") as error:
        load(data_files=same, duplicates="latest")
    assert all(path in str(error.value) for path in same)
    with pytest.raises(CandidatesError, match="needs a stamp such as .* at the end of the file name"):
        load(data_files=overlapping(tmp_path, "a.csv", "b_20250101_000000.csv"), duplicates="latest")


def test_files_that_share_no_decision_need_no_stamp(load, tmp_path):
    paths = [write_csv(tmp_path / f"{day}.csv", decision(day, spot=day + 1)) for day in range(2)]
    assert spots(load(data_files=paths, duplicates="latest", **ONE)) == {1, 2}


# --- The cache: new rows after any change, and a hit after none


def arrow_files(loaded) -> list[tuple]:
    paths = [file["filename"] for split in loaded.values() for file in split.cache_files]
    assert paths
    return [(path, os.stat(path).st_ino, os.stat(path).st_mtime_ns) for path in paths]


def test_loading_again_unchanged_hits_the_cache(load_either, history):
    first = arrow_files(load_either(data_files=history, **ONE))
    os.utime(history)  # touched, not changed
    assert arrow_files(load_either(data_files=history, **ONE)) == first


def test_an_edited_cell_gives_new_rows(load_either, tmp_path):
    path = tmp_path / "a.csv"
    for spot in (58466, 60000):
        write_csv(path, decision(spot=spot))
        assert spots(load_either(data_files=str(path), **ONE)) == {spot}


def test_an_edited_cell_gives_new_rows_even_with_the_same_size_and_time(load_either, tmp_path):
    path = tmp_path / "a.csv"
    write_csv(path, decision(spot=58466))
    before = path.stat()
    assert spots(load_either(data_files=str(path), **ONE)) == {58466}
    write_csv(path, decision(spot=58467))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert spots(load_either(data_files=str(path), **ONE)) == {58467}


def test_an_added_csv_gives_new_rows(load_either, tmp_path):
    for day in range(3):
        write_csv(tmp_path / f"{day}.csv", decision(day, spot=day + 1))
        assert spots(load_either(data_files=str(tmp_path / "*.csv"), **ONE)) == set(range(1, day + 2))


@pytest.mark.parametrize(
    "option",
    [
        {"hindsight": True},
        {"candidate_order": "csv"},
        {"candidate_order": "shuffle"},
        {"candidate_order": "shuffle", "seed": 1},
        {"underlying": "ETH"},
        {"exit_style": "hold_to_expiry"},
        {"splits": (0.5, 0.25, 0.25)},
        {"splits": "train"},
        {"purge": False},
        {"validation_from": "2024-09-10", "test_from": "2024-09-20"},
    ],
)
def test_a_changed_option_gives_new_rows(load_either, tmp_path, option):
    rows = [one for day in range(40) for name, style in (("BTC", "tp_and_roll"), ("ETH", "hold_to_expiry"))
            for one in decision(day, 0, (64000, 62000, 63000), underlying=name, exit_style=style, dte=1)]  # fmt: skip
    path = write_csv(tmp_path / "a.csv", rows)
    plain, changed = load_either(data_files=path), load_either(data_files=path, **option)
    assert {name: split["messages"] for name, split in plain.items()} != {
        name: split["messages"] for name, split in changed.items()
    }


def test_an_edited_prompt_in_the_script_gives_new_rows(load_either, history, tmp_path):
    script = tmp_path / SCRIPT.name
    text = SCRIPT.read_text(encoding="utf-8")
    for title in ("Underlying: ", "Asset: "):
        script.write_text(text.replace("Underlying: ", title), encoding="utf-8")
        chat = load_either(script=script, data_files=history, **ONE)["train"][0]["messages"]
        assert f"\n{title}BTC\n" in chat[1]["content"]


def test_what_another_datasets_version_cached_is_not_read(load_either, history, tmp_path, monkeypatch):
    """datasets 3.6 cannot read the features that 5 writes beside the rows; map caches in the rows' own folder."""
    with monkeypatch.context() as later:
        later.setattr(datasets, "__version__", "99.0.0")
        theirs = load_either(data_files=history, **ONE)["train"]
    for info in (tmp_path / "arrow").rglob("dataset_info.json"):
        info.write_text(info.read_text(encoding="utf-8").replace('"Value"', '"Tomorrow"'), encoding="utf-8")

    ours = load_either(data_files=history, **ONE)["train"]
    assert ours.to_list() == theirs.to_list()
    mapped = ours.map(lambda record: {"length": len(record["messages"])})
    folders = [{Path(file["filename"]).parent for file in made.cache_files} for made in (ours, mapped, theirs)]
    assert folders[0] == folders[1] != folders[2]


def test_an_option_of_the_skip_kind_is_part_of_the_cache_key(load, tmp_path):
    path = write_csv(tmp_path / "a.csv", [*decision(0), *decision(1, spot="?")])
    assert load(data_files=path, on_bad_rows="skip", **ONE)["train"].num_rows == 3
    with pytest.raises(CandidatesError, match="line 5, column spot"):
        load(data_files=path, **ONE)


# --- Size

LOAD_AND_MEASURE = """
import re, sys
sys.path.insert(0, sys.argv[1])
from covered_call_candidates import load_candidates
loaded = load_candidates("per_decision_ranking", data_files="big.csv", splits="train", cache_dir="arrow")
# Not its ru_maxrss, which begins with what its parent, these tests, has held.
print(loaded["train"].num_rows, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
def test_three_hundred_thousand_rows_load_in_less_than_a_gibibyte(tmp_path):
    with open(tmp_path / "big.csv", "w", encoding="utf-8") as file:
        file.write(",".join(COLUMNS) + "\n")
        cells = list(row(instrument="{name}", strike="{strike}", delta="{delta}", decision_time="{time}").values())
        line = ",".join(cells) + "\n"
        for hour in range(30_000):
            values = {"time": time(hour / 24), "delta": 0.2 + hour * 1e-9}
            file.writelines(
                line.format(name=f"BTC-{hour}-{strike}-C", strike=float(strike), **values)
                for strike in range(60_000, 70_000, 1_000)
            )
    ran = python("-c", LOAD_AND_MEASURE, SCRIPT.parent, cwd=tmp_path)
    decisions, kibibytes = map(int, ran.stdout.split())
    assert decisions == 30_000
    assert kibibytes < 1024 * 1024


def test_processes_that_build_the_same_cache_at_once_all_end_right(tmp_path):
    path = write_csv(tmp_path / "a.csv", HISTORY)
    code = (
        "import sys; from covered_call import load_candidates as load; print(flush=True); sys.stdin.readline(); "
        "rows = load(data_files=sys.argv[1], splits='train', cache_dir=sys.argv[2])['train']; "
        "print(len(rows), rows._fingerprint)"
    )
    command = [sys.executable, "-c", code, path, str(tmp_path / "arrow")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    at_once = [subprocess.Popen(command, cwd=SCRIPT.parent, **pipes) for _ in range(3)]
    for process in at_once:
        process.stdout.readline()  # it is ready
    for process in at_once:
        process.stdin.write("go on\n")
        process.stdin.flush()
    said = [process.communicate() for process in at_once]
    assert [process.returncode for process in at_once] == [0, 0, 0], said
    assert {out for out, _ in said} == {said[0][0]} and said[0][0].split()[0] == str(len(HISTORY) - 1)
