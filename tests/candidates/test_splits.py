"""Train, validation and test: chronological, a decision time never divided, purged where options outlive a split."""

import datetime
import math

import pytest
from conftest import decision, no_candidates, row, time, write_csv
from hypothesis import given
from hypothesis import strategies as st

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import Candidate, CandidatesError, Decision, LoggedDecision, Outcome, iso_time
from covered_call.candidates.splits import split_decisions

NAMES = ["train", "validation", "test"]
UNKNOWN = Outcome(None, None, None)


def logged(day: float, dtes: list[float], underlying: str) -> LoggedDecision:
    candidates = tuple(Candidate(f"C{index}", 63000.0, dte, 0.2, 3.0, 0.7, 0.9) for index, dte in enumerate(dtes))
    market = Decision(iso_time(time(day)), underlying, "tp_and_roll", 58466.0, candidates)
    return LoggedDecision(market, None, (UNKNOWN,) * len(candidates))


# Days on a coarse grid: several underlyings decide at once, and options expire exactly at a later decision.
steps = st.tuples(st.integers(0, 40), st.sampled_from(["BTC", "ETH"]))
lifetimes = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0, 33.25]), max_size=3)
histories = st.dictionaries(steps, lifetimes, min_size=1, max_size=40).map(
    lambda found: [logged(day, dtes, underlying) for (day, underlying), dtes in sorted(found.items())]
)
fractions = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.6, 0.0, 0.4), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0)])
dates = st.tuples(st.integers(-2, 42), st.integers(-2, 42)).map(sorted)
rules = st.one_of(
    fractions.map(lambda three: {"splits": three}),
    dates.map(lambda two: {"validation_from": time(two[0]), "test_from": time(two[1])}),
)


def split(history: list[LoggedDecision], **options) -> list[list[LoggedDecision]]:
    splits = split_decisions(history, CoveredCallCandidatesConfig(**options))
    assert list(splits) == NAMES
    return list(splits.values())


def times(entries: list[LoggedDecision]) -> list[datetime.datetime]:
    return [entry.decision.decision_time for entry in entries]


@given(histories, rules, st.booleans())
def test_splits_follow_each_other_in_time_and_share_no_decision_time(history, rule, purge):
    train, validation, test = map(times, split(history, purge=purge, **rule))
    for earlier, later in ((train, validation), (validation, test), (train, test)):
        assert not earlier or not later or max(earlier) < min(later)


@given(histories, rules)
def test_without_purge_every_decision_is_in_exactly_one_split(history, rule):
    assert sum(split(history, purge=False, **rule), []) == history


@given(histories, rules)
def test_a_decision_is_purged_exactly_if_an_option_reaches_the_next_splits_first_decision(history, rule):
    whole, kept = split(history, purge=False, **rule), split(history, **rule)
    for place, entries in enumerate(whole):
        # Written out from the definition: expiry against the earliest decision of any later split.
        following = min(times(sum(whole[place + 1 :], [])), default=None)
        outlives = [
            following is not None
            and any(
                entry.decision.decision_time + datetime.timedelta(days=candidate.dte) >= following
                for candidate in entry.decision.candidates
            )
            for entry in entries
        ]
        assert kept[place] == [entry for entry, out in zip(entries, outlives, strict=True) if not out]


@given(histories)
def test_fractions_count_distinct_decision_times(history):
    distinct = len(set(times(history)))
    counts = [len(set(times(entries))) for entries in split(history, purge=False)]
    assert sum(counts) == distinct
    for count, share in zip(counts, (0.8, 0.1, 0.1), strict=True):
        assert abs(count - share * distinct) <= 1


# --- The same through load_candidates


def daily(path, days, **cells) -> str:
    return write_csv(path, [one for day in days for one in decision(day, **{"dte": 0.5, **cells})])


def days(dataset) -> list[float]:
    """The distinct decision days of a split, counted from the first of September."""
    start = iso_time(time(0))
    return sorted({(moment - start) / datetime.timedelta(days=1) for moment in dataset["decision_time"]})


def test_eighty_ten_ten_of_the_distinct_times_of_all_files_together(load, tmp_path):
    files = [
        daily(tmp_path / "a.csv", range(0, 60)),
        daily(tmp_path / "b.csv", range(60, 100)),
        daily(tmp_path / "c.csv", range(0, 50), underlying="ETH"),  # twice the decisions, but no other times
    ]
    splits = load(data_files=files)
    assert [days(splits[name]) for name in NAMES] == [[*range(80)], [*range(80, 90)], [*range(90, 100)]]


def test_explicit_dates_begin_validation_and_test(load, tmp_path):
    path = daily(tmp_path / "a.csv", range(10))
    splits = load(data_files=path, validation_from="2024-09-05", test_from="2024-09-08T00:00:00+00:00")
    assert [days(splits[name]) for name in NAMES] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_train_alone_is_everything(load, tmp_path):
    splits = load(data_files=daily(tmp_path / "a.csv", range(10), dte=7.0), splits="train")
    assert list(splits) == ["train"] and days(splits["train"]) == list(range(10))


# Forty days: train is days 0 to 31, validation 32 to 35, test 36 to 39. The spot at expiry is that of the nearest
# decision: an option that expires at 0.999 is settled at the price of day 1, which the next split shows.
@pytest.mark.parametrize("dte, train, validation", [(0.499, 32, 4), (0.999, 31, 3), (1.0, 31, 3), (2.0, 30, 2)])
def test_an_option_settled_at_the_next_splits_first_decision_is_purged(load, tmp_path, dte, train, validation):
    splits = load(data_files=daily(tmp_path / "a.csv", range(40), dte=dte))
    assert [len(days(splits[name])) for name in NAMES] == [train, validation, 4]


def test_the_longest_option_of_a_decision_counts(load, tmp_path):
    rows = [one for day in range(40) for one in decision(day, dte=0.5)]
    rows[31 * 3 + 1]["dte"] = "1.0"  # the last training day's second option
    splits = load(data_files=write_csv(tmp_path / "a.csv", rows))
    assert days(splits["train"]) == list(range(31))


def test_purge_can_be_switched_off(load, tmp_path):
    splits = load(data_files=daily(tmp_path / "a.csv", range(10), dte=7.0), purge=False)
    assert [days(splits[name]) for name in NAMES] == [list(range(8)), [8], [9]]


def test_the_number_of_purged_decisions_is_logged(load, tmp_path, caplog):
    load(data_files=daily(tmp_path / "a.csv", range(40), dte=3.0))
    assert "Purged 6 decision(s)" in caplog.text and "3 from train, 3 from validation" in caplog.text


@pytest.mark.parametrize("options", [{}, {"splits": (0.5, 0.0, 0.5), "purge": False}])
def test_an_empty_split_is_said_so_and_the_others_load(load, tmp_path, caplog, options):
    # Ten daily decisions on weekly options: the purge leaves nothing but the first training day, and the test day.
    splits = load(data_files=daily(tmp_path / "a.csv", range(10), dte=7.0), **options)
    assert days(splits["train"]) == ([0, 1, 2, 3, 4] if options else [0])
    assert days(splits["test"]) == ([5, 6, 7, 8, 9] if options else [9])
    assert "validation is empty" in caplog.text


def test_decisions_at_one_time_stay_together(load, tmp_path):
    rows = [
        row(decision_time=time(day), dte=0.5, exit_style=style, underlying=name)
        for style in ("hold_to_expiry", "tp_and_roll")
        for name in ("BTC", "ETH")
        for day in range(10)
    ]
    splits = load("per_decision_ranking", data_files=write_csv(tmp_path / "a.csv", rows))
    assert [splits[name].num_rows for name in NAMES] == [4 * 8, 4, 4]


# --- Options that cannot be meant

THREE = "three fractions that add up to 1"
DATES = {"validation_from": "2024-09-05", "test_from": "2024-09-08"}


@pytest.mark.parametrize(
    "options, says",
    [
        ({"splits": (0.8, 0.1)}, THREE),
        ({"splits": (0.8, 0.1, 0.2)}, THREE),
        ({"splits": (1.2, -0.1, -0.1)}, THREE),
        ({"splits": (math.nan, 0.5, 0.5)}, THREE),
        ({"splits": ("0.8", "0.1", "0.1")}, THREE),
        ({"splits": "test"}, THREE),
        ({"splits": 0.8}, THREE),
        ({"splits": 0.8, **DATES}, "splits"),
        ({"splits": (0.5, 0.25, 0.25), **DATES}, "either splits, or validation_from and test_from"),
        ({"validation_from": "2024-09-05"}, "give both"),
        ({"test_from": "2024-09-05"}, "give both"),
        ({"validation_from": "2024-09-08", "test_from": "2024-09-05"}, "is after test_from=2024-09-05"),
        ({"validation_from": "soon", "test_from": "2024-09-05"}, "validation_from='soon' is not a date such as"),
        ({"validation_from": "2024-09-05", "test_from": "9999-12-31T23:00:00-05:00"}, "test_from="),
        ({"candidate_order": "score"}, "candidate_order='score': choose one of instrument, csv, shuffle"),
        ({"duplicates": "first"}, "duplicates='first': choose one of error, latest"),
        ({"on_bad_rows": "ignore"}, "on_bad_rows='ignore': choose one of error, skip"),
    ],
)
def test_an_impossible_option_is_one_clear_error(load, tmp_path, options, says):
    with pytest.raises(CandidatesError) as error:
        load(data_files=daily(tmp_path / "a.csv", range(10)), **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_option_or_config_is_named(load, tmp_path):
    path = daily(tmp_path / "a.csv", range(10))
    with pytest.raises(ValueError, match="exit_stile"):
        load(data_files=path, exit_stile="tp_and_roll")
    with pytest.raises(ValueError, match="'ranking' is no config: choose one of per_candidate, per_decision_ranking"):
        load("ranking", data_files=path)


def test_a_split_of_steps_without_candidates_has_no_candidate_records(load, tmp_path, caplog):
    rows = [row for day in range(10) for row in ([no_candidates(day)] if day == 8 else decision(day, sold=0, dte=0.5))]
    path = write_csv(tmp_path / "a.csv", rows)
    assert sorted(load("per_candidate", data_files=path)) == ["test", "train"]
    assert "validation is empty" in caplog.text
    assert load("per_decision_ranking", data_files=path)["validation"]["label"] == ["NO_TRADE"]


def test_files_without_any_candidate_make_no_candidate_records(load, tmp_path):
    path = write_csv(tmp_path / "a.csv", [no_candidates(day) for day in range(10)])
    with pytest.raises(CandidatesError, match="No split of per_candidate has a record"):
        load("per_candidate", data_files=path)
    assert load("per_decision_ranking", data_files=path).num_rows == {"train": 8, "validation": 1, "test": 1}


@pytest.mark.parametrize("option", ["purge", "hindsight"])
def test_a_switch_must_be_true_or_false(load, tmp_path, option):
    with pytest.raises(CandidatesError, match=f"{option}='no': give True or False"):
        load(data_files=daily(tmp_path / "a.csv", range(10)), **{option: "no"})
