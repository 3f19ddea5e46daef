"""The log of decisions: on the disk before an order, whole after any kill, and the portfolio it gives back."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import on_the_default_stack

from covered_call.atomic import FolderBusy
from covered_call.runtime import journal as module
from covered_call.runtime.engine import Agent
from covered_call.runtime.journal import ABANDONED, SCHEMA_VERSION, JournalError, opened, read
from covered_call.runtime.paper import Paper, rebuilt
from covered_call.runtime.policies import Rule
from runtime.markets import BEGUN, FREELY, quoted_states

pytestmark = on_the_default_stack

KILLS = int(os.environ.get("JOURNAL_KILLS", "10"))


def cycle(number: int = 0, orders: int = 1, **more) -> dict:
    return {"decision_id": f"BTC|day {number}|hold_to_expiry", "orders": orders, **more}


def filled(journal, number: int = 0, order: int = 0, **more) -> None:
    journal.complete(cycle(number)["decision_id"], order, execution={"status": "filled"}, **more)


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("decisions_????????.jsonl")
    return path


def test_a_line_is_there_before_its_order_and_is_completed_by_another(tmp_path):
    with opened(tmp_path / "log") as journal:
        journal.write(cycle(price=float("nan")))
        (line,) = the_file(tmp_path / "log").read_text().splitlines()
        assert json.loads(line) == {"schema_version": SCHEMA_VERSION, **cycle(), "price": None}
        assert list(journal.pending) == [(cycle()["decision_id"], 0)]
        filled(journal)
        assert not journal.pending and journal.decided == {cycle()["decision_id"]}
    assert [line.get("completes") for line in read(tmp_path / "log")] == [None, cycle()["decision_id"]]


def test_each_line_is_synced_before_write_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(module.os, "fsync", lambda number: synced.append(number))
    with opened(tmp_path / "log") as journal:
        for number in range(3):
            before = len(synced)
            journal.write(cycle(number))
            assert len(synced) > before


def test_what_was_under_way_is_pending_after_a_restart(tmp_path):
    with opened(tmp_path / "log") as journal:
        journal.write(cycle(0, orders=2))
        filled(journal, 0, order=0)
        journal.write(cycle(1, orders=0))
    with opened(tmp_path / "log") as journal:
        assert list(journal.pending) == [(cycle(0)["decision_id"], 1)]
        journal.complete(cycle(0)["decision_id"], 1, execution={"status": ABANDONED})
        assert journal.decided == {cycle(1)["decision_id"]}  # what was abandoned may be decided again
    with opened(tmp_path / "log") as journal:
        assert not journal.pending and journal.decided == {cycle(1)["decision_id"]}


@pytest.mark.parametrize("kept", [1, 30])
def test_half_a_last_line_is_moved_away_counted_and_said(tmp_path, caplog, kept):
    with opened(tmp_path / "log") as journal:
        journal.write(cycle(0, orders=0))
    path = the_file(tmp_path / "log")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:kept])
    with opened(tmp_path / "log") as journal:
        assert journal.torn == 1 and "half a line" in caplog.text
        journal.write(cycle(1, orders=0))
    assert path.with_suffix(".torn").read_bytes() == whole[:kept] + b"\n"
    assert [line["decision_id"] for line in read(tmp_path / "log")] == [cycle(n)["decision_id"] for n in range(2)]
    with opened(tmp_path / "log") as journal:
        assert journal.torn == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{no json", "no line of this log"), ('{"schema_version": 99, "decision_id": "a", "orders": 0}', "version 99"),
     ('{"schema_version": 1, "orders": 0}', "lacks one of decision_id"), ("[]", "no line of this log")],
)  # fmt: skip
def test_a_line_that_no_agent_wrote_is_an_error_that_names_it(tmp_path, line, reason):
    with opened(tmp_path / "log") as journal:
        journal.write(cycle(0, orders=0))
    with open(the_file(tmp_path / "log"), "a") as file:
        file.write(line + "\n")
    with pytest.raises(JournalError, match=rf"decisions_\d+\.jsonl, line 2: .*{reason}"), opened(tmp_path / "log"):
        pass


def test_a_folder_has_one_agent(tmp_path):
    with opened(tmp_path / "log"), pytest.raises(FolderBusy, match="is being written by process"):
        with opened(tmp_path / "log"):
            pass


def test_a_disk_that_is_nearly_full_is_an_error_before_an_order(tmp_path, monkeypatch):
    with opened(tmp_path / "log") as journal:
        monkeypatch.setattr(module, "ROOM", 1 << 62)
        with pytest.raises(JournalError, match="nearly full, so no order was sent"):
            journal.write(cycle())
        journal.write(cycle(1, orders=0))  # without an order there is nothing to protect
    assert [line["decision_id"] for line in read(tmp_path / "log")] == [cycle(1)["decision_id"]]


class FullFile:
    """A file on a disk that takes 20 bytes more."""

    def __init__(self, file):
        self.file, self.room = file, 20

    def write(self, text) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(bytes(text[: self.room]))
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


class NeverAsked(Paper):
    def sell(self, intention, state, rolls):
        raise AssertionError("an order was sent that is not in the log")


def test_a_full_disk_is_an_error_before_the_order_and_leaves_no_half_line(tmp_path):
    first, second = quoted_states(2)
    with opened(tmp_path / "log") as journal:
        agent = Agent([Rule()], FREELY, Paper(), BEGUN, journal)
        agent.cycle(first)
        journal.file = FullFile(journal.file)
        agent.venue = NeverAsked()
        before = the_file(tmp_path / "log").read_bytes()
        with pytest.raises(JournalError, match="could not be written down .No space left on device., so no order"):
            agent.cycle(second)
        assert the_file(tmp_path / "log").read_bytes() == before


def test_the_portfolio_of_the_log_is_the_one_in_memory(tmp_path):
    states = quoted_states(40)
    with opened(tmp_path / "log", durable=False) as journal:
        agent = Agent([Rule()], FREELY, Paper(), BEGUN, journal)
        for _ in agent.run(states[:25]):
            assert rebuilt(read(tmp_path / "log"))[0] == agent.portfolio
        half = agent.portfolio
    with opened(tmp_path / "log", durable=False) as journal:
        again = Agent([Rule()], FREELY, Paper(), BEGUN, journal)
        assert again.portfolio == half and half.trades and half.positions
        assert len(list(again.run(states))) == 15  # those of before are not decided again
    alone = Agent([Rule()], FREELY, Paper(), BEGUN)
    assert [cycle.portfolio for cycle in alone.run(states)][-1] == again.portfolio


def run_slowly(folder: str, slept: float) -> None:
    """An agent on paper that is killed some time."""

    class Slow(Paper):
        def sell(self, intention, state, rolls):
            time.sleep(slept)
            return super().sell(intention, state, rolls)

    with opened(folder) as journal:
        for _ in Agent([Rule()], FREELY, Slow(), BEGUN, journal).run(quoted_states(60)):
            pass


def test_killed_at_any_moment_nothing_is_lost_and_nothing_is_done_twice(tmp_path):
    """JOURNAL_KILLS=50 for more of them."""
    draw, folder = random.Random(0), tmp_path / "log"
    context, kills = multiprocessing.get_context("fork"), 0
    while kills < KILLS:
        process = context.Process(target=run_slowly, args=(str(folder), 0.02))
        process.start()
        process.join(draw.uniform(0.02, 0.3))
        if process.exitcode == 0:  # it came to the end: begin anew
            folder = tmp_path / f"log{kills}"
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        if folder.exists():
            list(read(folder))  # readable before it is mended, too
    with opened(folder) as journal:
        agent = Agent([Rule()], FREELY, Paper(), BEGUN, journal)
        list(agent.run(quoted_states(60)))
        assert rebuilt(read(folder))[0] == agent.portfolio
    sold = [one["position"]["entry_time"] for line in read(folder) for one in line.get("events", ())
            if one["event"] == "opened"]  # fmt: skip
    assert len(set(sold)) == len(sold)
    alone = Agent([Rule()], FREELY, Paper(), BEGUN)
    list(alone.run(quoted_states(60)))
    assert agent.portfolio == alone.portfolio  # as if it had never been killed
