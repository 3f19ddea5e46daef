"""A slice of each attack of docs/reliability.md, and that the attacks notice what they are there to notice."""

import pytest
from attack import __main__ as attack
from attack import columns, csv, hub, options
from conftest import SCRIPT, on_the_default_stack, python

pytestmark = pytest.mark.no_cover  # which coverage slows by half, for lines that other tests run, too

SOUND = {"unclear": 0, "wrong": 0}


def found_by(run, count: int, seed: int = 1) -> list[str]:
    """The findings; all that was tried was handled if there is none."""
    findings = []
    totals = run(count, seed, findings.append)
    assert totals["tried"] >= count and totals["handled"] + len(findings) == totals["tried"]
    assert bool(findings) == (totals["unclear"] + totals["wrong"] > 0)
    return findings


@on_the_default_stack
def test_mutated_files_are_read_right_or_refused(monkeypatch):
    monkeypatch.setattr(csv, "BOMBS", csv.BOMBS[:1])
    assert found_by(csv.run, 600) == []


@on_the_default_stack
def test_mutated_files_are_read_alike_as_columns_and_row_by_row():
    assert found_by(columns.run, 250) == []


def test_values_of_options_are_meant_or_refused():
    assert found_by(options.run, 80) == []


def test_faults_of_a_hub_leave_a_repo_whole():
    assert found_by(hub.run, 4) == []


@pytest.mark.slow
def test_killed_writers_end_as_if_they_had_not_been(tmp_path):
    """In a process of its own, for a fork of this one, which has run threads, may not work."""
    code = (
        "import tests.attack; from tests.attack import kills; "
        "print([(name, found['tried'], found['handled']) for name, found in "
        "kills.each(2, 1, print, ['export', 'publish --to'])])"
    )
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=str(SCRIPT.parent), OMP_NUM_THREADS="1")
    assert "[('export', 2, 2), ('publish --to', 2, 2)]" in done.stdout, done.stdout + done.stderr


# --- The attacks themselves


@on_the_default_stack
@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry._replace(decision=entry.decision._replace(spot=entry.decision.spot + 1)),
        lambda entry: entry._replace(chosen=None),
        lambda entry: entry._replace(outcomes=entry.outcomes[::-1]),
    ],
    ids=["another spot", "no choice", "outcomes of others"],
)
def test_a_reader_that_changes_a_decision_is_found_out(monkeypatch, spoil):
    monkeypatch.setattr(csv, "BOMBS", ())
    clean = csv.read_candidates

    def read(paths, config):
        entries = clean(paths, config)
        return entries if "clean" in paths[0] else [*entries[:-1], spoil(entries[-1])]

    monkeypatch.setattr(csv, "read_candidates", read)
    assert any("is not what the file said" in finding for finding in found_by(csv.run, 40))


@on_the_default_stack
def test_a_reader_that_loses_a_decision_is_found_out(monkeypatch):
    monkeypatch.setattr(csv, "BOMBS", ())
    clean = csv.read_candidates
    monkeypatch.setattr(csv, "read_candidates", lambda paths, config: clean(paths, config)["mutant" in paths[0] :])
    assert any("decisions lost, 0 counted" in finding for finding in found_by(csv.run, 40))


@on_the_default_stack
def test_columns_that_are_not_checked_are_found_out(monkeypatch):
    for check in ("check_numbers", "State.check_whole_file", "State.check_neighbours"):
        monkeypatch.setattr(f"covered_call.candidates.columnar.{check}", lambda *_: None)
    assert any(finding.startswith("columns: wrong") for finding in found_by(columns.run, 250))


def test_an_option_that_takes_anything_is_found_out(monkeypatch):
    # A text is times nothing, but times many hours it is gigabytes: of the numbers' options none is tried.
    some = ("hindsight", "purge", "duplicates", "on_bad_rows", "candidate_order", "rejected")
    trials = [trial for trial in options.trials() if trial[0] == "option" and trial[2] in some]
    monkeypatch.setattr(options, "trials", lambda: trials)
    monkeypatch.setattr(options.CoveredCallCandidatesConfig, "check", lambda self: None)
    assert found_by(options.run, 10)


def test_a_table_takes_the_place_of_the_one_of_the_same_versions(tmp_path, monkeypatch):
    page = tmp_path / "reliability.md"
    page.write_text(f"Before.\n{attack.BEGIN}\n{attack.END}\nAfter.\n")
    monkeypatch.setattr(attack, "PAGE", page)
    for only, stack, tried in (("csv", "3.6.0", 1), ("csv", "5.2.0", 2), ("kills", "3.6.0", 4), ("csv", "3.6.0", 3)):
        attack.write_table(
            f"`python -m tests.attack --only {only} --seed 0` on a day: datasets {stack}.\n\n| {tried} |"
        )
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith(f"{attack.END}\nAfter.\n")
    assert "| 1 |" not in text and text.index("| 3 |") < text.index("| 2 |") < text.index("| 4 |")
