"""Several horizons in one build: each column is what q_sell is with that horizon alone."""

import datetime
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import REAL_DATA, ROOT, decision, needs_real_data, read_candidates, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates.builder import Backtest
from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import QValuesConfig
from covered_call.candidates.records import FEATURES, RECORDS
from covered_call.candidates.schema import CandidatesError

STYLES = ("hold_to_expiry", "tp_and_roll")
PRESETS = ("auto", "teacher", "intrinsic", "simulated")


def q_values(paths, **options):
    config = QValuesConfig(name="q_values", **{"splits": "train"} | options)
    config.check()
    return RECORDS["q_values"](read_decisions([str(path) for path in paths], config).columns(), config)


def numbers(table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def assert_as_alone(paths, horizons: list[float], **options) -> None:
    table = q_values(paths, horizons=horizons, **options)
    names = [name for name in table.column_names if re.fullmatch(r"q_sell_.*d", name)]
    for name, days in zip(names, sorted(horizons), strict=True):
        alone = q_values(paths, **options | {"horizon": days})
        assert numbers(table, name).tobytes() == numbers(alone, "q_sell").tobytes(), name
    plain = q_values(paths, **options)
    assert table.select(plain.column_names).equals(plain)


def market(path: Path, seed: int, style: str) -> str:
    """Twelve-hourly decisions on a path that takes profits, defends and rolls."""
    draw = np.random.default_rng(seed)
    spots = (60_000 * np.exp(np.cumsum(draw.normal(0, 0.025, 50)))).round(2).tolist()
    rows = []
    for step, spot in enumerate(spots):
        strikes, sold = [round(spot * up) for up in (0.98, 1.03, 1.1)], step % 3 if step % 4 else None
        rows += decision(step / 2, sold, strikes, exit_style=style, spot=spot, dte=5.0 + step % 3,
            iv="" if step % 11 == 7 else 0.7)  # fmt: skip
    return write_csv(path, rows)


costs = st.fixed_dictionaries(
    {},
    optional={
        "fee": st.sampled_from([0.0003, 0.01]),
        "half_spread": st.sampled_from([0.02, 0.2]),
        "slippage": st.just(0.001),
        "delivery_fee": st.just(0.00015),
        "horizon": st.sampled_from([0, 2, 4.5]),
        "keep_cut": st.just(True),
        "iv_shift": st.just(0.1),
        "expiry_tolerance": st.sampled_from([0, 30]),
        "max_rolls": st.just(1),
    },
)
days = st.sampled_from([0.25, 0.5, 1, 1.5, 2, 3, 5, 6.5, 9, 40]) | st.floats(0.01, 30)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 5),
    style=st.sampled_from(STYLES),
    preset=st.sampled_from(PRESETS),
    horizons=st.lists(days, min_size=1, max_size=3, unique_by=float),
    options=costs,
)
def test_each_column_is_q_sell_of_a_build_with_that_horizon_alone(tmp_path, seed, style, preset, horizons, options):
    path = market(tmp_path / "a.csv", seed, style)
    assert_as_alone([path], horizons, settlement=preset, **options)


def test_the_columns_of_the_sample_are_those_of_builds_with_each_horizon_alone():
    paths = sorted((ROOT / "data" / "sample").glob("*.csv"))
    assert_as_alone(paths, [5, 1, 1.5], fee=0.0003)


@needs_real_data
@pytest.mark.parametrize("preset", PRESETS)
def test_the_columns_of_real_files_are_those_of_builds_with_each_horizon_alone(preset):
    assert_as_alone(sorted(REAL_DATA.glob("*.csv")), [3, 1, 10], settlement=preset, fee=0.0003, half_spread=0.02)


@pytest.mark.parametrize("style", STYLES)
def test_costs_lower_every_column(tmp_path, style):
    path = market(tmp_path / "a.csv", 1, style)
    tables = [q_values([path], horizons=[1, 3], half_spread=share) for share in (0.0, 0.01, 0.1)]
    for name in ("q_sell_1d", "q_sell_3d"):
        cheap, dear, dearest = (numbers(table, name) for table in tables)
        known = ~np.isnan(cheap)
        assert known.sum() > 60 and (cheap[known] > dear[known]).all() and (dear[known] > dearest[known]).all()


# --- As data sets


@pytest.fixture
def path(tmp_path) -> str:
    return market(tmp_path / "a.csv", 0, "hold_to_expiry")


def test_a_column_for_each_horizon_ascending_and_streamed_as_loaded(load, path):
    options = {"data_files": path, "splits": "train", "horizons": (3, np.float64(1), 1.5)}
    loaded, streamed = load("q_values", **options)["train"], load("q_values", streaming=True, **options)["train"]
    names = ["q_sell_1d", "q_sell_1.5d", "q_sell_3d"]
    assert loaded.column_names == [*FEATURES["q_values"], *names]
    assert all(loaded.features[name] == datasets.Value("float64") for name in names)
    assert streamed.features == loaded.features and list(streamed) == loaded.to_list()
    assert load("q_values", num_proc=2, **options | {"seed": 1})["train"].to_list() == loaded.to_list()
    assert len(set(loaded["q_sell_1d"])) > 60 and None in loaded["q_sell_3d"]


def test_other_horizons_are_other_rows_and_none_are_none(load, path):
    options = {"data_files": path, "splits": "train"}
    one, two, none = (load("q_values", **options, horizons=days)["train"] for days in ([1], [1, 2], None))
    assert [rows.column_names[len(FEATURES["q_values"]) :] for rows in (one, two, none)] == [
        ["q_sell_1d"],
        ["q_sell_1d", "q_sell_2d"],
        [],
    ]
    assert two["q_sell_1d"][:] == one["q_sell_1d"][:] and one["q_sell"][:] == none["q_sell"][:]


def test_the_longest_horizon_is_over_before_the_next_split_begins(load, path):
    options = {"data_files": path, "splits": (0.6, 0.2, 0.2), "horizon": 0.5}
    short = load("q_values", **options)
    long = load("q_values", **options, horizons=[1, 4])
    gap = long["validation"][0]["decision_time"] - long["train"][-1]["decision_time"]
    assert gap > datetime.timedelta(days=4)
    assert short["validation"][0]["decision_time"] - short["train"][-1]["decision_time"] < gap


def test_a_backtest_hands_its_horizons_to_q_values_alone(path, tmp_path):
    backtest = Backtest([path], QValuesConfig(horizons=[2], splits="train"))
    made = {name: backtest.load(name, cache_dir=str(tmp_path / "arrow"))["train"] for name in RECORDS}
    assert {name: rows.column_names[len(FEATURES[name]) :] for name, rows in made.items()} == {
        **dict.fromkeys(RECORDS, []),
        "q_values": ["q_sell_2d"],
    }
    with pytest.raises(CandidatesError, match="^horizons is for the options of the backtest"):
        backtest.load("q_values", cache_dir=str(tmp_path / "arrow"), horizons=[3])


def test_one_by_one_a_decision_is_what_it_is_without(path):
    with_them, without = (read_candidates([path], QValuesConfig(horizons=days)) for days in ([1], None))
    assert with_them == without


@pytest.mark.parametrize("config", [name for name in RECORDS if name != "q_values"])
def test_other_configs_know_no_horizons(load, path, config):
    with pytest.raises(CandidatesError, match=f"^horizons is no option of {config}"):
        load(config, data_files=path, horizons=[1])


@pytest.mark.parametrize("value", [
    [], (), [0], [-1], ["a"], ["1"], [None], [True], [[1]], [1, 1], [1, 1.0], [float("nan")], [float("inf")],
    [36_500.5], [10**400], 3, 3.0, "3", {1}, {1: 2}, range(3), np.array([1, 3]), list(range(1, 22)),
], ids=lambda value: repr(value)[:30])  # fmt: skip
def test_bad_horizons_are_one_clear_error(load, path, value):
    with pytest.raises(CandidatesError, match=r"^horizons=.*: give a list of 1 to 20 different numbers of days"):
        load("q_values", data_files=path, horizons=value)


def test_the_most_horizons_and_the_longest_are_taken(path):
    horizons = [36_500, *range(1, 20)]
    assert q_values([path], horizons=horizons).column_names[-1] == "q_sell_36500d"
