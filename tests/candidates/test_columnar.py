"""Files that are read as columns: what is read so, that it is the same, and where what was read is kept."""

import csv
import errno
import gc
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from attack.columns import outcome, row_by_row, taken
from conftest import SCRIPT, decision, no_candidates, on_the_default_stack, write_csv
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from covered_call import load_candidates
from covered_call.candidates import csv_blocks
from covered_call.candidates.builder import Backtest
from covered_call.candidates.columns import logged_of
from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import CandidatesError
from covered_call.candidates.spool import Spool

OPTIONS = CoveredCallCandidatesConfig()


def history(days: int = 12, **cells) -> list[dict]:
    """Decisions of 1 to 4 candidates, some sold, one without any."""
    rows = [
        one
        for day in range(days)
        for one in decision(day, day % 2 or None, strikes=range(100, 101 + day % 4), spot=100 + day, **cells)
    ]
    return [*rows, no_candidates(days, **{name: cells[name] for name in cells if name == "exit_style"})]


def both_ways(path: Path) -> tuple:
    """What the row parser makes of it, and whether the file was read as columns, with the same result."""
    with taken() as files:
        fast = outcome(path, OPTIONS)
    with row_by_row():
        slow = outcome(path, OPTIONS)
    assert fast == slow
    return slow, bool(files)


# --- What is read as columns


def quoted(content: bytes) -> bytes:
    return b"\n".join(b",".join(b'"%s"' % cell for cell in line.split(b",")) for line in content.split())


WRITINGS = {
    "as it is": lambda content: content,
    "CRLF": lambda content: content.replace(b"\n", b"\r\n"),
    "a BOM": lambda content: b"\xef\xbb\xbf" + content,
    "blank lines": lambda content: content.replace(b"\n", b"\n\n") + b"\n\n",
    "no line end at the end": lambda content: content.rstrip(b"\n"),
    "quotes": quoted,
    "gzip": gzip.compress,
    "times without an offset": lambda content: content.replace(b"+00:00", b""),
    "another offset": lambda content: content.replace(b"T00:00:00+00:00", b"T05:30:00+05:30"),
    "blank and NaN numbers": lambda content: content.replace(b",0.7,", b",,").replace(b",0.0,", b",NaN,"),
}


@pytest.mark.parametrize("block", [150, 1 << 22])
@pytest.mark.parametrize("writing", WRITINGS)
def test_other_writings_of_a_table_are_read_as_columns_too(tmp_path, monkeypatch, writing, block):
    monkeypatch.setattr(csv_blocks, "BLOCK", block)  # 150 bytes are less than a row
    path = tmp_path / "a.csv"
    path.write_bytes(WRITINGS[writing](Path(write_csv(tmp_path / "plain.csv", history())).read_bytes()))
    (decisions, said), as_columns = both_ways(path)
    assert as_columns and len(decisions) == 13
    assert [line for line in said if "has no offset" in line] == (
        [f"{path}, line 2: decision_time has no offset; such times are read as UTC."] if "without" in writing else []
    )


ODD = {  # of a row, what the row parser takes and Arrow, or a parser that looks at lines alone, may not
    "blanks around words": lambda row: row | {"underlying": " BTC\t", "action": f"{row['action']} "},
    "numbers in other words": lambda row: (
        row | {"dte": f" +{row['dte']}", "iv": f"0{row['iv']}", "score": f"{row['score']}e0"}
    ),
    "blanks around a spot": lambda row: row | {"spot": f" {row['spot']} "},
    "a note of two lines": lambda row: row | {"strategy": 'as "planned",\r\nor not'},
    "a long note": lambda row: row | {"strategy": "x" * 40_000},
}


@pytest.mark.parametrize("block", [150, 1_500, 1 << 22])
@pytest.mark.parametrize("odd", ODD)
def test_a_row_that_is_written_oddly_is_read_with_the_columns_of_the_others(tmp_path, monkeypatch, odd, block):
    monkeypatch.setattr(csv_blocks, "BLOCK", block)
    rows = [ODD[odd](row) if place in (3, 4, 17, 27) else row for place, row in enumerate(history(16))]
    rows[-4:] = [row | {"decision_time": row["decision_time"].removesuffix("+00:00")} for row in rows[-4:]]
    (decisions, said), as_columns = both_ways(Path(write_csv(tmp_path / "a.csv", rows)))
    assert decisions == logged_of(read_decisions([write_csv(tmp_path / "plain.csv", history(16))], OPTIONS).columns())
    lines = len(rows) + 4 * (odd == "a note of two lines") - 2
    assert as_columns and any(f"line {lines}: decision_time has no offset" in line for line in said)


@pytest.mark.parametrize("on_bad_rows", ["error", "skip"])
def test_what_is_wrong_in_a_row_that_is_written_oddly_is_said(tmp_path, monkeypatch, on_bad_rows):
    monkeypatch.setattr(csv_blocks, "BLOCK", 1_500)
    rows = history(16)
    rows[20] = ODD["a note of two lines"](rows[20])
    rows[30]["iv"] = " 70 %"
    path = Path(write_csv(tmp_path / "a.csv", rows))
    options = CoveredCallCandidatesConfig(on_bad_rows=on_bad_rows)
    (found, said) = outcome(path, options)
    wrong = "line 33, column iv: '70 %' is not a number" in str(found)
    assert wrong if on_bad_rows == "error" else len(found) == len({row["decision_time"] for row in rows}) - 1
    with row_by_row():
        assert outcome(path, options) == (found, said)


def test_the_line_of_the_first_time_without_an_offset_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_blocks, "BLOCK", 400)
    rows = history()
    rows[9]["decision_time"] = rows[9]["decision_time"].removesuffix("+00:00")
    content = Path(write_csv(tmp_path / "plain.csv", rows)).read_bytes().replace(b"\n", b"\n\n", 5)
    (tmp_path / "a.csv").write_bytes(content)
    (_, said), as_columns = both_ways(tmp_path / "a.csv")
    assert as_columns and [line for line in said if "line 16" in line]


def test_decisions_in_pieces_are_read_as_columns_where_all_are(tmp_path):
    rows = history()
    rows.sort(key=lambda row: (row["instrument"], row["decision_time"]))
    (decisions, _), as_columns = both_ways(Path(write_csv(tmp_path / "a.csv", rows)))
    together = read_decisions([write_csv(tmp_path / "b.csv", history())], OPTIONS)
    assert as_columns and decisions == logged_of(together.columns())


def test_the_sample_is_read_as_columns():
    for path in sorted((SCRIPT.parent / "data" / "sample").glob("*.csv")):
        (decisions, _), as_columns = both_ways(path)
        assert as_columns and len(decisions) == 2532


@on_the_default_stack
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "spot": st.sampled_from(["100", "100.0", "0", "-1", "1e2", "nan", "", " 7"]),
                "iv": st.sampled_from(["", "nan", "NaN", "0", "5", "5.1", "inf", "-0.0", "1_0"]),
                "delta": st.sampled_from(["1", "-1", "1.0000001", "", "0x1", "١"]),
                "dte": st.floats(-1, 40_000).map(str) | st.sampled_from(["0", "36500", "36500.1"]),
                "chosen": st.sampled_from(["0", "1", "True", "2", ""]),
                "trade_executed": st.sampled_from(["0", "1", "0.0", "yes"]),
                "action": st.sampled_from(["SKIP", "SELL_CALL", "skip"]),
                "reward": st.sampled_from(["", "nan", "-inf", "1e400", "nan(1)", "12"]),
                "instrument": st.sampled_from(["BTC-08SEP24-63000-C", "BTC-1-P", "NO_CANDIDATES", "é", "a|b", " x"]),
                "underlying": st.sampled_from(["BTC", "ETH", "btc", ""]),
                "decision_time": st.sampled_from(["2024-09-03", "2024-09-03T00:00:00Z", "9999-12-31", "x"]),
            },
        ),
        max_size=4,
    ),
    st.sampled_from(["error", "skip"]),
)
def test_odd_cells_are_read_alike_either_way(spoilt, on_bad_rows):
    rows = history(8)
    for place, cells in enumerate(spoilt):
        rows[(5 * place + len(cells)) % len(rows)].update(cells)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(write_csv(Path(folder) / "a.csv", rows))
        fast = outcome(path, CoveredCallCandidatesConfig(on_bad_rows=on_bad_rows))
        with row_by_row():
            assert outcome(path, CoveredCallCandidatesConfig(on_bad_rows=on_bad_rows)) == fast


# --- Several files


def test_files_that_go_on_side_by_side_are_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_blocks, "BLOCK", 500)
    styles = [history(exit_style=style) for style in ("hold_to_expiry", "tp_and_roll")]
    paths = [write_csv(tmp_path / f"{place}.csv", rows) for place, rows in enumerate(styles)]
    merged = sorted([*styles[0], *styles[1]], key=lambda row: row["decision_time"])
    one = read_decisions([write_csv(tmp_path / "merged.csv", merged)], OPTIONS)
    assert logged_of(read_decisions(paths, OPTIONS).columns()) == logged_of(one.columns())


def test_a_file_of_which_columns_are_doubted_stands_among_others(tmp_path):
    rows = history()
    one, other, *_ = decision(20)
    odd = write_csv(tmp_path / "b.csv", [one | {"spot": "58000"}, other | {"spot": "58000.0"}])
    paths = [write_csv(tmp_path / "a.csv", rows), odd, write_csv(tmp_path / "c.csv", decision(30))]
    with taken() as files:
        found = logged_of(read_decisions(paths, OPTIONS).columns())
    assert files == [paths[0], paths[2]]
    with row_by_row():
        assert logged_of(read_decisions(paths, OPTIONS).columns()) == found


# --- Where it is kept


def kept_in(folder: Path) -> list[str]:
    gc.collect()
    return [name for name in os.listdir(folder) if name.startswith("covered_call_")]


@pytest.fixture
def csv_file(tmp_path) -> str:
    return write_csv(tmp_path / "a.csv", history())


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder that temporary files go to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_what_was_read_is_gone_when_it_is_not_needed_any_more(csv_file, load, temporary):
    load(data_files=csv_file)
    assert kept_in(temporary) == []
    stream = load(data_files=csv_file, streaming=True)
    assert len(kept_in(temporary)) == 1 and next(iter(stream["train"]))
    del stream
    assert kept_in(temporary) == []


def test_a_forked_process_leaves_what_its_parent_reads(csv_file, temporary):
    backtest = Backtest([csv_file], OPTIONS)
    assert backtest.decisions and len(kept_in(temporary)) == 1
    child = os.fork()
    if child == 0:
        del backtest.decisions
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(kept_in(temporary)) == 1 and backtest.logged


def test_what_a_killed_process_left_goes_with_the_next_one_and_nothing_else_does(csv_file, temporary):
    code = (
        "import os, signal, sys; from covered_call.candidates.spool import Spool; spool = Spool(); "
        "print(spool.folder, flush=True); sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(SCRIPT.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        folder = process.stdout.readline().strip()
        mine = Spool()
        assert os.path.isdir(folder)  # of a process that lives
        process.communicate("go on\n")
    assert os.path.isdir(folder)
    assert Spool().folder != folder and not os.path.exists(folder) and os.path.isdir(mine.folder)


def test_a_folder_that_another_process_takes_for_a_dead_ones_is_made_anew(temporary, monkeypatch):
    """Between the moments in which it is made and locked."""
    acquire, lost = FileLock.acquire, []

    def late(self, *args, **options):
        if not lost:
            lost.append(os.path.dirname(self.lock_file))
            shutil.rmtree(lost[0])
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", self.lock_file)
        return acquire(self, *args, **options)

    monkeypatch.setattr(FileLock, "acquire", late)
    spool = Spool()
    assert [spool.folder] == [str(path) for path in temporary.iterdir()] and spool.folder not in lost


def test_a_link_to_another_folder_is_left_alone(temporary, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "lock").write_text("mine")
    (temporary / "covered_call_x").symlink_to(other)
    spool = Spool()
    assert os.path.isdir(spool.folder) and (other / "lock").read_text() == "mine"


def test_a_full_disk_is_one_clear_error_that_leaves_nothing(csv_file, load, temporary, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spool, "batch_of", full)
    with pytest.raises(CandidatesError, match=r"cannot be kept in .*temporary: .*No space left.*set TMPDIR"):
        load(data_files=csv_file)
    assert kept_in(temporary) == [] and not list(tmp_path.glob("arrow/**/*.arrow"))


def test_a_folder_that_cannot_be_written_is_one_clear_error(csv_file, load, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(CandidatesError, match="cannot be kept in .*none: .*set TMPDIR"):
        load(data_files=csv_file)


def test_a_csv_written_by_another_program_loads_as_ever(tmp_path):
    """csv's own way to quote and to end lines."""
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(history()[0]), quoting=csv.QUOTE_NONNUMERIC)
        writer.writeheader()
        writer.writerows(history())
    found = load_candidates(data_files=str(tmp_path / "a.csv"), cache_dir=str(tmp_path / "arrow"), splits="train")
    assert found["train"].num_rows == sum(1 for row in history() if row["instrument"] != "NO_CANDIDATES")
