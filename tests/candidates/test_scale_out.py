"""Rendering in parts: the same rows as one machine's, whatever is killed, and nothing of another run among them.

All but the cluster itself is tried without Ray, with tasks that run here one after the other.
"""

import datetime
import json
import os
import random
import sys
import time as clock
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from conftest import (
    COLUMNS,
    REAL_DATA,
    ROOT,
    decision,
    import_script,
    needs_real_data,
    no_candidates,
    python,
    time,
    write_csv,
)
from hypothesis import given
from hypothesis import strategies as st

from covered_call.candidates import pieces, scale_out
from covered_call.candidates.builder import load_candidates
from covered_call.candidates.decisions import Decisions
from covered_call.candidates.export import main
from covered_call.candidates.options import CHATS, CoveredCallCandidatesConfig
from covered_call.candidates.scale_out import MANIFEST, export_parquet, parts_of_splits
from covered_call.candidates.schema import CandidatesError
from covered_call.candidates.shared_folder import WORK, Folder, find_inputs


class Here:
    """Tasks that run in this process, in another order than they were given; ``limit`` ends it as a kill would."""

    def __init__(self, limit: int | None = None):
        self.limit, self.done = limit, []

    def share(self, value):
        return value

    def each(self, function, calls):
        calls = list(calls)
        random.Random(0).shuffle(calls)
        for call in calls:
            if function is scale_out.render:
                if len(self.done) == self.limit:
                    raise KeyboardInterrupt
                self.done.append(call[0].name)
            yield call, function(*call)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(scale_out, "PART", 60)
    monkeypatch.setattr(pieces, "PIECE", 16)


@pytest.fixture(scope="module")
def backtest(tmp_path_factory) -> list[str]:
    """Files of two underlyings and two exit styles, side by side in time; one of them is read row by row."""
    folder = tmp_path_factory.mktemp("backtest")
    simulate = import_script(ROOT / "data" / "simulate_backtest.py").simulate_backtest
    first = datetime.datetime.fromisoformat(time(0)).date()
    simulate(folder, 3, first, first + datetime.timedelta(days=119))
    rows = [no_candidates(day, underlying="ETH") for day in range(8, 90, 9)]
    for day in set(range(90)) - set(range(8, 90, 9)):
        cells = {"underlying": "ETH", "spot": 60_000 + 100 * (day % 7), "dte": 5.0}
        rows += decision(day, day % 3 if day % 4 else None, **cells)
    write_csv(folder / "training_candidates_ETH_x.csv", rows)
    return sorted(map(str, folder.glob("*.csv")))


def rows_in(place, name: str) -> dict[str, list[dict]]:
    loaded = datasets.load_dataset("parquet", data_dir=f"{place}/{name}", cache_dir=f"{place}_cache")
    return {split: loaded[split].to_list() for split in loaded}


def assert_equal_to_one_machine(place, paths: list[str], folder: Path, **options) -> None:
    for name in CHATS:
        expected = load_candidates(name, data_files=paths, cache_dir=str(folder / "arrow"), **options)
        loaded = datasets.load_dataset("parquet", data_dir=f"{place}/{name}", cache_dir=str(folder / "parquet"))
        assert list(loaded) == list(expected)
        for split in expected:
            assert loaded[split].features == expected[split].features
            assert loaded[split].data.table.combine_chunks().equals(expected[split].data.table.combine_chunks())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"splits": "train"},
        {"purge": False, "candidate_order": "shuffle", "hindsight": True, "seed": 3},
        {"validation_from": time(60), "test_from": time(90), "fee": 0.0003, "horizon": 3.0},
        {"underlying": "BTC", "settlement": "teacher"},
    ],
)
def test_the_rows_are_those_of_one_machine_in_their_order(backtest, tmp_path, options):
    cluster = Here()
    export_parquet(backtest, str(tmp_path / "out"), CoveredCallCandidatesConfig(**options), cluster)
    assert len(cluster.done) > 9
    assert_equal_to_one_machine(tmp_path / "out", backtest, tmp_path, **options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST, *CHATS]


def out_of(place: Path) -> dict[str, bytes]:
    """All files of an export, by name."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*.*") if path.is_file()}


@needs_real_data
def test_real_files_that_roll_come_out_as_on_one_machine(tmp_path):
    paths = sorted(map(str, REAL_DATA.glob("training_candidates_*.csv")))
    export_parquet(paths, str(tmp_path / "out"), CoveredCallCandidatesConfig(), Here())
    assert_equal_to_one_machine(tmp_path / "out", paths, tmp_path)


@given(
    hours=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    sizes=st.lists(st.integers(0, 50), min_size=60, max_size=60),
    options=st.sampled_from([{}, {"splits": "train"}, {"splits": (0.5, 0.5, 0.0)}, {"purge": False}]),
)
def test_parts_hold_every_decision_once_by_time_and_no_time_is_in_two_splits(hours, sizes, options):
    times, places = np.sort(np.array(hours, np.int64)), np.random.default_rng(0).permutation(len(hours))
    columns = {"place": places, "time": times, "size": np.array(sizes[: len(hours)])}
    decisions = Decisions(**dict.fromkeys(Decisions._fields) | columns)
    parts = list(parts_of_splits(decisions, CoveredCallCandidatesConfig(**options)))
    assert np.concatenate([part.places for part in parts]).tolist() == places.tolist()
    assert len({part.name for part in parts}) == len(parts)
    time_of = dict(zip(places.tolist(), times.tolist(), strict=True))
    splits = {}
    for part in parts:
        splits.setdefault(part.name.split("-")[0], set()).update(time_of[place] for place in part.places.tolist())
        assert part.until is None or part.until > max(time_of[place] for place in part.places.tolist())
    assert sum(map(len, splits.values())) == len(set(hours))


# --- Interrupted, and begun again


def test_a_run_that_begins_again_keeps_what_is_finished(backtest, tmp_path):
    options, out, first, second = CoveredCallCandidatesConfig(), tmp_path / "out", Here(limit=4), Here()
    with pytest.raises(KeyboardInterrupt):
        export_parquet(backtest, str(out), options, first)
    before = {path: path.stat().st_mtime_ns for name in CHATS for path in (out / name).iterdir()}
    assert len(before) == 2 * 4 and (out / WORK).is_dir()
    counts = export_parquet(backtest, str(out), options, second)
    assert sorted(first.done + second.done) == sorted(json.loads((out / MANIFEST).read_text())["parts"])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not (out / WORK).exists()
    assert_equal_to_one_machine(out, backtest, tmp_path)
    files = out_of(out)
    third = Here()
    assert export_parquet(backtest, str(out), options, third) == counts and not third.done and out_of(out) == files


def test_the_manifest_grows_while_parts_are_rendered(backtest, tmp_path, monkeypatch):
    known = []

    class Watching(Here):
        def each(self, function, calls):
            for done in super().each(function, calls):
                yield done
                known.append(len(json.loads((tmp_path / "out" / MANIFEST).read_text())["parts"]) if self.done else 0)

    monkeypatch.setattr(scale_out, "SAVED_EVERY", 0.0)
    export_parquet(backtest, str(tmp_path / "out"), CoveredCallCandidatesConfig(), Watching())
    assert known == [0, 0, 0, *range(1, len(known) - 2)]


def test_files_that_were_read_are_not_read_again(backtest, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        export_parquet(backtest, out, CoveredCallCandidatesConfig(), Here(limit=0))
    monkeypatch.setattr(pieces, "Reader", None)
    export_parquet(backtest, out, CoveredCallCandidatesConfig(), Here())
    assert_equal_to_one_machine(out, backtest, tmp_path)


def test_a_part_that_is_gone_or_that_no_manifest_knows_is_rendered_again(backtest, tmp_path):
    out = tmp_path / "out"
    export_parquet(backtest, str(out), CoveredCallCandidatesConfig(), Here())
    files, manifest = out_of(out), json.loads((out / MANIFEST).read_text())
    (out / "per_candidate" / "train-00001.parquet").unlink()
    del manifest["parts"]["train-00002"]
    (out / MANIFEST).write_text(json.dumps(manifest))
    again = Here()
    export_parquet(backtest, str(out), CoveredCallCandidatesConfig(), again)
    assert sorted(again.done) == ["train-00001", "train-00002"] and out_of(out) == files


def test_a_part_is_whole_or_not_there(tmp_path):
    folder = Folder(str(tmp_path))
    folder.write("a", b"old")
    with pytest.raises(KeyboardInterrupt), folder.replacing("a") as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert folder.read("a") == b"old" and not folder.names(WORK)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda paths, options: (paths, options | {"fee": 0.001}), r"made with fee=0\.0, and not 0\.001"),
        (lambda paths, options: (paths, options | {"splits": "train"}), r"made with splits=.*, and not 'train'"),
        (lambda paths, options: (paths[1:], options), "other files: a.csv is missing"),
        (lambda paths, options: ([*paths, paths[0] + "2"], options), "other files: a.csv2 is new"),
        (lambda paths, options: (paths[::-1], options), "other files: their order is another"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path, change, said):
    paths = [write_csv(tmp_path / f"{name}.csv", decision(day, 0)) for day, name in enumerate("abcdef")]
    write_csv(tmp_path / "a.csv2", decision(9, 0))
    options, out = {"purge": False}, tmp_path / "out"
    export_parquet(paths, str(out), CoveredCallCandidatesConfig(**options), Here())
    files = out_of(out)
    paths, options = change(paths, options)
    with pytest.raises(CandidatesError, match=said):
        export_parquet(paths, str(out), CoveredCallCandidatesConfig(**options), Here())
    assert {name: files[name] for name in out_of(out) if not name.startswith(WORK)} == files


def test_changed_input_is_refused(tmp_path):
    path, out = write_csv(tmp_path / "a.csv", decision(0, 0)), tmp_path / "out"
    options = CoveredCallCandidatesConfig(splits="train")
    export_parquet([path], str(out), options, Here())
    write_csv(tmp_path / "a.csv", decision(0, 1))
    with pytest.raises(CandidatesError, match="other files: a.csv has changed. Give another folder, or delete"):
        export_parquet([path], str(out), options, Here())


@pytest.mark.parametrize("name, text", [(MANIFEST, "[]"), (MANIFEST, "{"), ("per_candidate/train.parquet", "")])
def test_a_folder_of_something_else_is_refused(tmp_path, name, text):
    (tmp_path / "out" / "per_candidate").mkdir(parents=True)
    (tmp_path / "out" / name).write_text(text)
    path = write_csv(tmp_path / "a.csv", decision(0, 0))
    with pytest.raises(CandidatesError, match="give another folder"):
        export_parquet([path], str(tmp_path / "out"), CoveredCallCandidatesConfig(), Here())
    assert list(out_of(tmp_path / "out")) == [name]


# --- Files


def test_uris_are_read_and_written(backtest, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in backtest:
        memory.pipe(f"/runs/{os.path.basename(path)}", Path(path).read_bytes())
    found = find_inputs(["memory://runs/*.csv"])
    assert found == [f"memory:///runs/{os.path.basename(path)}" for path in backtest]
    export_parquet(found, "memory://out", CoveredCallCandidatesConfig(), Here())
    export_parquet(backtest, str(tmp_path / "out"), CoveredCallCandidatesConfig(), Here())
    written = {path.removeprefix("/out/"): memory.cat(path) for path in memory.find("/out")}
    assert written == out_of(tmp_path / "out")


def test_a_bad_row_is_told_with_its_uri_and_nothing_is_written():
    memory = fsspec.filesystem("memory")
    header, cells = ",".join(COLUMNS), ",".join(map(str, decision(0, score="much")[0].values()))
    memory.pipe("/bad/a.csv", f"{header}\n{cells}\n".encode())
    with pytest.raises(CandidatesError, match=r"^memory:///bad/a\.csv, line 2, column score: 'much' is not a number"):
        export_parquet(find_inputs(["memory://bad/*"]), "memory://none", CoveredCallCandidatesConfig(), Here())
    assert not memory.find("/none")


def test_what_cannot_be_opened_is_named():
    with pytest.raises(CandidatesError, match=r"No file matches memory://nowhere/\*\.csv"):
        find_inputs(["memory://nowhere/*.csv"])
    with pytest.raises(CandidatesError, match="strange://x cannot be opened: Protocol not known"):
        find_inputs(["strange://x"])


def test_a_decision_in_two_files_is_refused_or_the_later_ones(tmp_path):
    stamps = ("20250101_000000", "20240101_000000")
    paths = [
        write_csv(tmp_path / f"a_{stamp}.csv", [row for day in range(12) for row in decision(day, sold)])
        for sold, stamp in enumerate(stamps)
    ]
    with pytest.raises(CandidatesError, match=r"both hold decision .*12 in common"):
        export_parquet(paths, str(tmp_path / "out"), CoveredCallCandidatesConfig(), Here())
    options = {"duplicates": "latest", "purge": False}
    export_parquet(paths, str(tmp_path / "later"), CoveredCallCandidatesConfig(**options), Here())
    assert_equal_to_one_machine(tmp_path / "later", paths, tmp_path, **options)


def test_bad_decisions_are_dropped_and_an_empty_split_is_left_out(tmp_path, caplog):
    rows = [row for day in range(10) for row in decision(day, 0, dte=3.0)]
    rows[3]["score"] = "much"
    paths, options = [write_csv(tmp_path / "a.csv", rows)], {"on_bad_rows": "skip"}
    export_parquet(paths, str(tmp_path / "out"), CoveredCallCandidatesConfig(**options), Here())
    assert_equal_to_one_machine(tmp_path / "out", paths, tmp_path, **options)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for text in ("Dropped ", "Purged ", "Split validation is empty, and left out."):
        assert sum(line.startswith(text) for line in said) == 3, text  # on one machine, too, with two loads


# --- The command


def refusal(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    return str(stop.value.code)


def test_without_ray_the_command_says_what_to_install(backtest, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refusal(capsys, "--engine", "ray", "--input", *backtest, "--output_dir", tmp_path / "out")
    assert said == (
        "error: --engine ray needs the package ray: pip install 'covered-call-candidates[ray]', on each node."
    )
    assert not (tmp_path / "out").exists()


def test_ray_wants_a_folder_and_lines_take_no_splits(backtest, capsys):
    assert "give it as output_dir" in refusal(capsys, "--engine", "ray", "--input", backtest[0])
    assert "splits says nothing of lines" in refusal(capsys, "--input", backtest[0], "--splits", "train")


def test_the_command_says_what_it_wrote(backtest, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale_out, "RayCluster", Here)
    words = ["--engine", "ray", "--input", *backtest, "--output_dir", str(tmp_path / "out"), "--purge", "false"]
    main([*words, "--splits", "0.5", "0.25", "0.25"])
    candidates, ranking = capsys.readouterr().out.splitlines()
    rows = rows_in(tmp_path / "out", "per_candidate")
    counts = ", ".join(f"{split} {len(its):,}" for split, its in rows.items())
    assert f"per_candidate: {sum(map(len, rows.values())):,} records of " in candidates and counts in candidates
    assert "per_decision_ranking: " in ranking


def test_nothing_of_ray_is_imported_without_the_option(tmp_path):
    path = write_csv(tmp_path / "a.csv", decision(0, 0))
    code = "import sys; from covered_call.candidates.export import main; main(sys.argv[1:]); print(*sys.modules)"
    done = python("-c", code, "--input", path, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert not {"ray", "covered_call.candidates.scale_out"} & set(done.stdout.split())


# --- On a cluster


@pytest.mark.slow(minutes=2)
def test_a_cluster_that_loses_a_node_writes_each_row_once(backtest, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'covered-call-candidates[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the nodes' processes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost, attempts = cluster.add_node(num_cpus=1), tmp_path / "attempts"
    attempts.mkdir()

    class Losing(scale_out.RayCluster):
        """Loses a node once something is rendered on it."""

        def each(self, function, calls):
            def slowly(*call):
                if function is scale_out.render:
                    node = ray.get_runtime_context().get_node_id()
                    (attempts / f"{call[0].name} {node} {os.urandom(4).hex()}").touch()
                    clock.sleep(0.6)
                return function(*call)

            for done in super().each(slowly, calls):
                if lost in cluster.worker_nodes and any(lost.node_id in path.name for path in attempts.iterdir()):
                    clock.sleep(0.3)  # amid its task, or the next one
                    cluster.remove_node(lost, allow_graceful=False)
                yield done

    try:
        ray.init(address=cluster.address)
        export_parquet(backtest, str(tmp_path / "out"), CoveredCallCandidatesConfig(), Losing())
    finally:
        ray.shutdown()
        cluster.shutdown()
    tried = [path.name.split()[0] for path in attempts.iterdir()]
    parts = json.loads((tmp_path / "out" / MANIFEST).read_text())["parts"]
    assert set(tried) == set(parts) and len(tried) > len(parts), "the node was lost between two tasks"
    assert_equal_to_one_machine(tmp_path / "out", backtest, tmp_path)
