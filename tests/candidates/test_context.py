"""What is known of the market at a decision: the numbers, that none of them sees what comes later, and the prompts."""

import dataclasses
import functools
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attack.columns import row_by_row
from conftest import (
    REAL_DATA,
    decision,
    needs_real_data,
    no_candidates,
    on_the_default_stack,
    read_candidates,
    records,
    time,
    write_csv,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates.builder import CoveredCallCandidates
from covered_call.candidates.columns import DAY, columns_of, logged_of, words_of
from covered_call.candidates.context import (
    Prices,
    closes_until,
    context_of_prices,
    levels_of,
    prices_of,
    ranks_of,
    realised_vol_of,
    relative_strength,
    shapes_of,
    vols_at_target,
)
from covered_call.candidates.context_lines import OF_BARS, OF_PRICES, SPOT, context_names
from covered_call.candidates.context_ohlcv import (
    BARS,
    Bars,
    context_of_bars,
    directional_index,
    read_bars,
    seen_at,
)
from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.export import main
from covered_call.candidates.leaks import find_leaks, render_splits
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import (
    PROMPT_VERSION,
    candidate_messages,
    ranking_messages,
    shown_to,
    version_with,
)
from covered_call.candidates.scale_out import made_by
from covered_call.candidates.schema import COLUMNS, CandidatesError, Decision
from covered_call.candidates.series import HOUR
from covered_call.market.teacher import Past, penalties

pytestmark = on_the_default_stack

ON = CoveredCallCandidatesConfig(context="spot", splits="train")


def walk(days: int, seed: int = 0, start: float = 60_000.0) -> np.ndarray:
    """(days,) USD: a random walk."""
    return start * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, 0.03, days)))


def rows_of(spots, first: int = 0, **cells) -> list[dict]:
    """A decision a day, at whose spots."""
    return [
        row
        for day, spot in enumerate(spots, start=first)
        for row in decision(day, day % 3 or None, strikes=(70_000, 71_000, 72_000), spot=float(spot), **cells)
    ]


def contexts(paths: list[str], options: CoveredCallCandidatesConfig = ON) -> dict[str, dict]:
    """By decision what is told of the market."""
    return {one.decision.decision_id: one.decision.context for one in read_candidates(paths, options)}


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def daily(spots) -> Prices:
    return Prices(np.arange(len(spots)) * DAY, np.array(spots, float))


def at_end(spots) -> dict[str, float]:
    known = daily(spots)
    return {name: one.item() for name, one in context_of_prices(known, known.time[-1:], known.number[-1:]).items()}


def test_numbers_of_steady_growth():
    found = at_end(100 * 1.01 ** np.arange(120))
    assert found["ret_1d"] == pytest.approx(0.01) and found["ret_30d"] == pytest.approx(1.01**30 - 1)
    assert found["rv_7d"] == pytest.approx(0, abs=1e-9) and found["drawdown_90d"] == 0
    assert (found["regime"], found["trend_5d"], found["range_pos_30d"], round(found["rsi_14"], 9)) == (1, 2, 1, 100)
    assert found["dist_ma50"] == pytest.approx(50 * 0.01 / (1 - 1.01**-50) / 1.01 - 1)
    fall = at_end(100 * 0.99 ** np.arange(120))
    assert (fall["regime"], fall["trend_5d"], fall["range_pos_30d"], fall["rsi_14"]) == (-1, -1, 0, 0)
    assert fall["drawdown_90d"] == pytest.approx(1 - 0.99**89)


def test_what_each_number_needs():
    """Of decisions a day the number of those, from the first on, at which it is unknown."""
    known = daily(walk(120))
    found = context_of_prices(known, known.time, known.number)
    assert list(found) == list(OF_PRICES)
    needs = {"ret_1d": 1, "ret_7d": 7, "ret_30d": 30, "rv_7d": 7, "rv_30d": 30, "dist_ma50": 49, "regime": 49,
        "drawdown_90d": 29, "range_pos_30d": 29, "rsi_14": 14, "trend_5d": 5}  # fmt: skip
    for name, count in needs.items():
        assert np.isnan(found[name]).tolist() == [True] * count + [False] * (120 - count), name
    assert np.isnan(found["support"][:9]).all() and not np.isnan(found["support"][-60:]).all()


def test_flat_prices_have_no_place_in_a_range():
    found = at_end([100.0] * 120)
    assert np.isnan(found["range_pos_30d"]) and (found["rsi_14"], found["trend_5d"], found["regime"]) == (50, 0, 0)


def test_a_day_without_a_price_leaves_unknown_what_needs_it():
    spots = walk(120)
    whole, known = at_end(spots), daily(spots)
    hole = Prices(np.delete(known.time, 100), np.delete(known.number, 100))
    found = context_of_prices(hole, known.time[-1:], known.number[-1:])
    unknown = {name for name in OF_PRICES if np.isnan(found[name][0]) and not np.isnan(whole[name])}
    assert unknown == {"rv_30d", "dist_ma50", "regime", "drawdown_90d", "range_pos_30d"}
    assert found["ret_7d"][0] == whole["ret_7d"] and found["rv_7d"][0] == whole["rv_7d"]
    old = Prices(known.time[:-2], known.number[:-2])  # the last price is two days old
    assert all(np.isnan(one).all() for one in context_of_prices(old, known.time[-1:], known.number[-1:]).values())


def test_of_a_day_that_goes_on_the_last_price_so_far_is_its_close():
    spots = walk(100 * 4)
    known = Prices(np.arange(400) * DAY // 4, spots)
    closes = closes_until(known, known.time[[202]], 5)[0]  # the third of four of its day
    assert closes.tolist() == [*spots[[187, 191, 195, 199]], spots[202]]
    found = context_of_prices(known, known.time[[202]], spots[[202]])
    assert found["ret_7d"][0] == pytest.approx(spots[202] / spots[202 - 28] - 1)  # of the same hour


def test_relative_strength_is_wilders():
    """With a plain loop over the closes, as the book has it."""
    closes = walk(60)
    moves = np.diff(closes)
    up, down = np.maximum(moves, 0)[:14].mean(), np.maximum(-moves, 0)[:14].mean()
    for move in moves[14:]:
        up, down = (13 * up + max(move, 0)) / 14, (13 * down + max(-move, 0)) / 14
    assert relative_strength(closes[None])[0] == pytest.approx(100 - 100 / (1 + up / down), rel=1e-12)


def test_levels_are_where_closes_have_turned():
    swing = [100, 104, 108, 110, 107, 103, 100, 97, 95, 98, 102, 106, 110.5, 107, 104, 101, 97, 95.5, 98, 100]
    found = levels_of(np.array([swing], float), np.array([100.0]))
    assert found["resistance"][0] == pytest.approx((110 + 110.5) / 2 / 100 - 1)  # 0.5 % apart: one level
    assert found["support"][0] == pytest.approx((95 + 95.5) / 2 / 100 - 1)
    unconfirmed = levels_of(np.array([swing[:14]], float), np.array([107.0]))  # the turn at 110.5 is a day old
    assert unconfirmed["resistance"][0] == pytest.approx(110 / 107 - 1)
    assert np.isnan(levels_of(np.array([[*range(100, 130)]], float), np.array([129.0]))["resistance"][0])


def test_a_vol_is_ranked_among_those_before():
    vols = Prices(np.arange(60) * DAY, np.linspace(0.4, 0.6, 60))
    time = np.array([59, 59, 59, 29]) * DAY
    assert ranks_of(vols, time, np.array([0.7, 0.3, vols.number[10], 0.7]))[:2].tolist() == [1, 0]
    assert ranks_of(vols, time, np.array([0.7, 0.3, vols.number[10], 0.7]))[2] == pytest.approx(10.5 / 59)
    assert np.isnan(ranks_of(vols, time, np.full(4, 0.7))[3])  # of 29
    alike = Prices(vols.time, np.full(60, 0.7))
    assert np.isnan(ranks_of(alike, time, np.full(4, 0.7))).all()


def test_the_shape_of_a_chain_s_vols(tmp_path):
    candidates = [(0.30, 7, 0.62), (0.24, 7, 0.60), (0.18, 7, 0.57), (0.26, 14, 0.65), (0.20, 14, None)]
    rows = [
        row
        for place, (delta, dte, iv) in enumerate(candidates)
        for row in decision(0, None, strikes=(63_000 + place,), delta=delta, dte=dte, iv="" if iv is None else iv)
    ]
    (entry,) = read_candidates([write_csv(tmp_path / "a.csv", rows)], CoveredCallCandidatesConfig(splits="train"))
    columns = columns_of([entry, changed(entry, iv=0.7)])
    shape = shapes_of(columns)
    assert vols_at_target(columns).tolist() == [0.60, 0.7]
    assert shape["iv_skew"][0] == pytest.approx(0.57 - 0.62) and shape["iv_term"][0] == pytest.approx(0.65 - 0.60)
    assert np.isnan(shape["iv_skew"][1]) and np.isnan(shape["iv_term"][1])  # all alike: it says nothing


def changed(entry, **changed):
    """The same with some numbers of all its candidates changed."""
    market = entry.decision
    return entry._replace(
        decision=market._replace(candidates=tuple(one._replace(**changed) for one in market.candidates))
    )


def test_realised_vol_of_the_candidates_own_ratio_but_not_of_the_teacher_s_exactly_1(tmp_path):
    rows = [*decision(0, iv=0.7, ivrv_ratio=1.4), *decision(1, iv=0.7, ivrv_ratio=1.0), *decision(2, iv="")]
    columns = columns_of(read_candidates([write_csv(tmp_path / "a.csv", rows)], CoveredCallCandidatesConfig()))
    assert realised_vol_of(columns)[0] == pytest.approx(0.5) and np.isnan(realised_vol_of(columns)[1:]).all()
    told = contexts([write_csv(tmp_path / "a.csv", rows)])
    assert [one["rv_30d"] for one in told.values()] == [pytest.approx(0.5), None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Point in time


@pytest.mark.no_cover
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(10, 1000)), min_size=2, max_size=150),
    st.data(),
    st.sampled_from(["gone", "raised", "noise"]),
)
def test_nothing_after_a_time_changes_a_number_of_then(steps, data, how):
    """Of prices at any times, up to ten a day or with gaps of days."""
    times = np.cumsum([1 + DAY * gap // 4 for gap, _ in steps])
    spots = np.array([spot for _, spot in steps])
    at = data.draw(st.integers(0, len(steps) - 1))
    later = np.arange(len(steps)) > at
    other = np.where(later, spots * 7 if how == "raised" else data.draw(st.floats(10, 1000)), spots)
    kept = ~later if how == "gone" else np.ones(len(steps), bool)
    asked = times[at : at + 1], spots[at : at + 1]
    for make in (lambda known: context_of_prices(known, *asked), lambda known: {"": ranks_of(known, *asked)}):
        whole, cut = make(prices_of(times, spots)), make(prices_of(times[kept], other[kept]))
        for name, values in whole.items():
            np.testing.assert_array_equal(values, cut[name], err_msg=name)


def varied(spots, seed: int) -> list[dict]:
    """Rows with vols that differ, so that rank and shape are known."""
    rng = np.random.default_rng(seed)
    rows = rows_of(spots)
    for row in rows:
        row["iv"], row["delta"] = round(float(rng.uniform(0.4, 0.9)), 4), round(float(rng.uniform(0.15, 0.35)), 4)
    return rows


def test_a_load_is_told_the_same_whatever_comes_later(tmp_path):
    rows = varied(walk(90), 1)
    whole = contexts([write_csv(tmp_path / "whole.csv", rows)])
    for day in (20, 60):
        early = [row for row in rows if row["decision_time"] <= time(day)]
        later = [
            {**row, "spot": 2 * float(row["spot"]), "iv": 0.5} for row in rows if row["decision_time"] > time(day)
        ]
        for name, its in (("cut", early), ("changed", early + later)):
            told = contexts([write_csv(tmp_path / f"{name}{day}.csv", its)])
            assert all(told[key] == whole[key] for key in contexts([write_csv(tmp_path / "e.csv", early)]))
    last = list(whole.values())[-1]
    assert not [name for name in SPOT if last[name] is None and name not in ("support", "resistance", "iv_term")]


def test_files_in_any_order_and_split_anywhere_tell_the_same(tmp_path):
    rows = varied(walk(60), 2) + [row | {"exit_style": "hold_to_expiry"} for row in varied(walk(60), 2)]
    whole = contexts([write_csv(tmp_path / "whole.csv", rows)])
    parts = [write_csv(tmp_path / f"part{place}.csv", [row for row in rows if lies(row, place)]) for place in range(3)]
    for order in ([0, 1, 2], [2, 0, 1]):
        assert contexts([parts[place] for place in order]) == whole
    assert {tuple(sorted(one)) for one in whole.values()} == {tuple(sorted(SPOT))}


def lies(row: dict, place: int) -> bool:
    """Of a file each: hold_to_expiry, and tp_and_roll before and after the 25th day."""
    if row["exit_style"] == "hold_to_expiry":
        return place == 0
    return place == 1 + (row["decision_time"] >= time(25))


def test_the_history_of_another_underlying_is_not_borrowed(tmp_path):
    before = rows_of(walk(60))
    late = rows_of(walk(5, 3, 3000.0), 55, underlying="ETH")
    for place, row in enumerate(late):
        row["instrument"] = f"ETH-X-{place}-C"
    told = contexts([write_csv(tmp_path / "a.csv", before + late)])
    first = next(context for key, context in told.items() if key.startswith("ETH"))
    assert all(first[name] is None for name in SPOT if name != "rv_30d")
    alone = contexts([write_csv(tmp_path / "b.csv", late)])
    assert alone == {key: context for key, context in told.items() if key.startswith("ETH")}


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and records


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    rows = varied(walk(40), 4)
    return write_csv(tmp_path_factory.mktemp("context") / "a.csv", [*rows, no_candidates(40)])


def test_without_context_nothing_is_another(path):
    options = CoveredCallCandidatesConfig(splits="train")
    plain, told = read_candidates([path], options), read_candidates([path], ON)
    assert [one.decision._replace(context=None) for one in told] == [one.decision for one in plain]
    assert {one.decision.context for one in plain} == {None} and context_names(options) == []
    for name in ("per_candidate", "per_decision_ranking"):
        with_it, without = records(path, name, context="spot"), records(path, name)
        assert all({key: one[key] for key in other if key != "messages"} == {
            key: value for key, value in other.items() if key != "messages"
        } for one, other in zip(with_it, without, strict=True))  # fmt: skip
        assert not any("context" in one["messages"][1]["content"].lower() for one in without)
    assert version_with([]) == PROMPT_VERSION != version_with(SPOT) != version_with([*SPOT, "mine"])


def test_a_live_decision_is_asked_as_a_record_was(path):
    entries = read_candidates([path], ON)
    asked = [one["messages"][:2] for one in records(path, context="spot")]
    assert asked == [candidate_messages(e.decision, one) for e in entries for one in e.decision.candidates]
    asked = [one["messages"][:2] for one in records(path, "per_decision_ranking", context="spot")]
    assert asked == [ranking_messages(entry.decision) for entry in entries]
    assert [Decision.from_dict(entry.decision.to_dict()) for entry in entries] == [one.decision for one in entries]
    assert logged_of(columns_of(entries)) == entries


def test_what_a_prompt_says():
    told = {"ret_1d": 0.0981, "ret_7d": -0.2949, "ret_30d": None, "rv_7d": 0.5951, "rv_30d": 0.4762,
        "dist_ma50": 0.3194, "regime": "bull", "trend_5d": "slight_down", "drawdown_90d": 0.0, "range_pos_30d": 1.0,
        "rsi_14": 86.6939, "support": -0.188, "resistance": None, "iv_rank_180": None, "iv_skew": 0.012,
        "iv_term": None, "funding": 0.0001}  # fmt: skip
    state = {"decision_time": "2024-11-12", "underlying": "BTC", "exit_style": "tp_and_roll", "spot": 89_192.0,
        "candidates": [{"instrument": "A", "strike": 1.0, "dte": 7, "delta": 0.25, "score": 3.0, "iv": 0.7}],
    }  # fmt: skip
    market = Decision.from_dict(state | {"context": told})
    block = """\
Market context (known at decision time):
  - Returns: 1d +9.81%, 7d -29.49%, 30d n/a
  - Realised vol: 7d 0.5951, 30d 0.4762
  - Trend: bull, 5d slight_down, from 50-day mean +31.94%
  - Range: 90d drawdown +0.00%, 30d position 1.0000, RSI 14 86.6939
  - Levels from spot: support -18.80%, resistance n/a
  - IV skew: 0.0120
  - funding: 0.0001
"""
    asked = ranking_messages(market)[1]["content"]
    assert f"(exit_style): tp_and_roll\n{block}Candidates:\n  [1] A" in asked
    assert "Score: 3.0000, IV: 0.7000, IV/RV: n/a\n" in asked
    assert (
        f"tp_and_roll\n{block}Candidate option: A\n" in candidate_messages(market, market.candidates[0])[1]["content"]
    )


@pytest.mark.parametrize("context, words", [
    (["ret_1d"], "no dict of numbers by name"), ({"ret_1d": float("nan")}, "context ret_1d: nan is not finite"),
    ({"regime": "boom"}, "none of bear, sideways, bull"), ({"a\nb": 1.0}, "not printable"),
    ({"mine": "high"}, "'high' is none of its numbers"),
])  # fmt: skip
def test_a_context_that_none_can_be(context, words):
    state = {"decision_time": "2024-11-12", "underlying": "BTC", "exit_style": "x", "spot": 1.0, "candidates": []}
    with pytest.raises(CandidatesError, match=words):
        candidate_messages(Decision.from_dict(state | {"context": context}), None)  # ty: ignore


def test_a_policy_is_shown_what_it_was_fitted_with(path):
    market = read_candidates([path], ON)[-1].decision
    assert shown_to(market, []).context is None and list(shown_to(market, ["rv_7d"]).context) == ["rv_7d"]
    with pytest.raises(CandidatesError, match="mine is not told"):
        shown_to(market, [*SPOT, "mine"])
    with pytest.raises(CandidatesError, match="live, give spots"):
        shown_to(market._replace(context=None), SPOT)


def test_records_have_the_context_as_columns(path, load):
    splits = {name: load(name, data_files=path, context="spot", splits="train")["train"]
        for name in ("per_candidate", "per_decision_ranking", "q_values", "preference")}  # fmt: skip
    for name in ("per_candidate", "per_decision_ranking", "q_values"):
        assert set(SPOT) <= set(splits[name].column_names)
        assert splits[name][-1]["trend_5d"] in ("down", "slight_down", "sideways", "slight_up", "up")
        assert splits[name][0]["ret_7d"] is None
    assert not set(SPOT) & set(splits["preference"].column_names)
    assert "Market context" in splits["preference"][0]["prompt"][1]["content"]
    streamed = load("q_values", data_files=path, context="spot", splits="train", streaming=True)["train"]
    assert list(streamed) == list(splits["q_values"])
    assert len(load("q_values", data_files=path, splits="train")["train"].column_names) == len(
        splits["q_values"].column_names
    ) - len(SPOT)


def test_no_prompt_names_its_answer(path):
    options = CoveredCallCandidatesConfig(context="spot")
    entries = read_candidates([path], options)
    for name in ("per_candidate", "per_decision_ranking"):
        config = dataclasses.replace(options, name=name)
        assert find_leaks(render_splits({"train": entries}, config), config) == []


def test_chats_are_exported_with_it_and_a_cluster_refuses(path, tmp_path):
    main(["--input", path, "--context", "spot", "--output_dir", str(tmp_path)])
    asked = [one["messages"] for one in map(json.loads, (tmp_path / "a_per_candidate.jsonl").read_text().splitlines())]
    assert asked == [one["messages"] for one in records(path, context="spot", splits="train")]
    with pytest.raises(CandidatesError, match="context='spot': a cluster's tasks do not see the market's history"):
        made_by(ON)


def test_another_file_of_vols_or_bars_is_another_key_of_the_cache(path, tmp_path):
    told = {"data_files": path, "config_name": "q_values", "context": "spot", "cache_dir": str(tmp_path)}
    vols = vol_file(tmp_path, 60)
    keys = [CoveredCallCandidates(**told).cache_dir, CoveredCallCandidates(**told, context_vols=vols).cache_dir]
    vol_file(tmp_path, 60, 80.0)
    keys.append(CoveredCallCandidates(**told, context_vols=vols).cache_dir)
    keys.append(CoveredCallCandidates(**told | {"context": "none"}).cache_dir)
    assert len(set(keys)) == 4


# ---------------------------------------------------------------------------------------------------------------------
# The user's own columns, and the market's vols


def own_rows(days: int = 6, **cells) -> list[dict]:
    return [row | {"funding": "" if day == 2 else 0.01 * day, "other": 3} | cells
        for day in range(days) for row in decision(day)]  # fmt: skip


OWN = (*COLUMNS, "funding", "other")


@pytest.mark.parametrize("way", [None, row_by_row])
def test_columns_of_the_users_are_told_as_they_are(tmp_path, way):
    file = write_csv(tmp_path / "a.csv", own_rows(), OWN)
    options = dataclasses.replace(ON, context_columns=["funding", "other"])
    if way:
        with way():
            found = read_candidates([file], options)
    else:
        found = read_candidates([file], options)
    told = [entry.decision.context for entry in found]
    assert [one["funding"] for one in told] == [0.0, 0.01, None, 0.03, 0.04, 0.05]
    assert list(told[0]) == [*SPOT, "funding", "other"]
    asked = ranking_messages(found[1].decision)[1]["content"]
    assert "  - funding: 0.01\n  - other: 3\nCandidates:" in asked
    rows = records(file, "q_values", context="spot", context_columns=["funding"])
    assert [row["funding"] for row in rows[::3]] == [0.0, 0.01, None, 0.03, 0.04, 0.05]


def test_the_files_own_vol_at_the_money_is_ranked_among_those_before(tmp_path):
    """Each underlying's by itself, whatever comes later and however the history is cut into files."""
    vols = np.random.default_rng(0).permutation(40) / 100 + 0.3
    rows = [dict(row, underlying=name, instrument=row["instrument"].replace("BTC", name), atm_iv=scale * vol)
        for day, vol in enumerate(vols) for name, scale in (("BTC", 1), ("ETH", 2))
        for row in decision(day)]  # fmt: skip
    options = dataclasses.replace(ON, context_columns=["atm_iv"])

    def ranks(*parts):
        files = [write_csv(tmp_path / f"{place}.csv", part, (*COLUMNS, "atm_iv")) for place, part in enumerate(parts)]
        return {
            (one.decision.underlying, one.decision.decision_time): one.decision
            for one in read_candidates(files, options)
        }

    found = ranks(rows)
    for name in ("BTC", "ETH"):
        its = [one for (underlying, _), one in sorted(found.items()) if underlying == name]
        expected = [None] * 30 + [np.mean(vols[:day] < vols[day]) for day in range(30, 40)]
        assert [one.context["atm_iv_rank_180"] for one in its] == expected
        assert "  - ATM IV rank of 180: n/a\n" in ranking_messages(its[0])[1]["content"]
    assert ranks(rows[120:], rows[:120]) == found
    shorter = ranks(rows[:-12])
    assert len(shorter) == 76 and shorter.items() <= found.items()


@pytest.mark.parametrize("cells, words", [
    ({"funding": "high"}, "line 2, column funding: 'high' is not a number"),
    ({"funding": "inf"}, "line 2, column funding: 'inf' is not finite"),
])  # fmt: skip
def test_a_number_of_the_users_that_is_none(tmp_path, cells, words):
    file = write_csv(tmp_path / "a.csv", own_rows(**cells), OWN)
    with pytest.raises(CandidatesError, match=words):
        read_candidates([file], dataclasses.replace(ON, context_columns=["funding"]))


def test_two_numbers_of_one_decision(tmp_path):
    rows = own_rows()
    rows[4]["funding"] = 7
    with pytest.raises(CandidatesError, match="line 6, column funding: 7.0 differs from 0.01 on line 5"):
        read_candidates(
            [write_csv(tmp_path / "a.csv", rows, OWN)], dataclasses.replace(ON, context_columns=["funding"])
        )


@pytest.mark.parametrize("given, words", [
    ({"context_columns": ["reward"]}, "'reward'.*a prompt must not tell"),
    ({"context_columns": ["a", "a"]}, "different names"), ({"context_columns": "funding"}, "a list of"),
    ({"context": "all"}, "choose one of none, spot, ohlcv"), ({"context_vols": 3}, "context_vols=3: give"),
    ({"context": "none", "context_columns": ["a"]}, "context_columns goes with context='spot' or 'ohlcv'"),
    ({"context": "none", "context_vols": "dvol.csv"}, "context_vols goes with context='spot' or 'ohlcv'"),
])  # fmt: skip
def test_options_that_cannot_be(given, words):
    with pytest.raises(CandidatesError, match=words):
        dataclasses.replace(ON, **given).check()


def test_a_column_that_is_not_there_or_taken(tmp_path, load):
    file = write_csv(tmp_path / "a.csv", own_rows(), OWN)
    with pytest.raises(CandidatesError, match="line 1: there is no column 'skew', which context_columns names"):
        read_candidates([file], dataclasses.replace(ON, context_columns=["skew"]))
    for name in ("label", "regime"):
        with pytest.raises(CandidatesError, match=f"'{name}': records have a column of that name"):
            records(write_csv(tmp_path / "b.csv", [row | {name: 1} for row in decision()], (*COLUMNS, name)),
                context="spot", context_columns=[name])  # fmt: skip
    horizon = write_csv(tmp_path / "c.csv", [row | {"q_sell_3d": 1} for row in decision()], (*COLUMNS, "q_sell_3d"))
    with pytest.raises(CandidatesError, match="'q_sell_3d': records have a column of that name"):
        load("q_values", data_files=horizon, context="spot", context_columns=["q_sell_3d"], horizons=[3])
    ranked = write_csv(
        tmp_path / "d.csv", [row | {"chosen_index": 1} for row in decision()], (*COLUMNS, "chosen_index")
    )
    with pytest.raises(SystemExit, match="chosen_index: records have a column of that name"):
        main(["--input", ranked, "--context", "spot", "--context_columns", "chosen_index"])
    assert not list(tmp_path.glob("*.jsonl"))  # per_candidate, which has no such column, is not written either


def vol_file(folder, days: int, start: float = 70.0) -> str:
    lines = [f"{time(day)[:10]},{start + day}" for day in range(-days, days)]
    file = folder / "dvol.csv"
    file.write_text("\n".join(["time,vol", *lines]))
    return str(file)


def test_the_market_s_vol_as_it_was_known(tmp_path):
    file = write_csv(tmp_path / "a.csv", rows_of(walk(40), iv=0.7, ivrv_ratio=1.4))
    told = contexts([file], dataclasses.replace(ON, context_vols=vol_file(tmp_path, 60)))
    last = told[f"BTC|{time(39)}|tp_and_roll"]
    assert last["dvol"] == pytest.approx((70 + 38) / 100)  # the close of the day before is known a day later
    assert last["dvol_rv"] == pytest.approx(last["dvol"] / last["rv_30d"]) and last["dvol_rank_180"] == 1.0
    assert list(last) == context_names(dataclasses.replace(ON, context_vols="x"))
    late = contexts([file], dataclasses.replace(ON, context_vols=vol_file(tmp_path, 20)))
    assert late[f"BTC|{time(39)}|tp_and_roll"]["dvol"] is None  # nothing newer for 72 hours
    assert context_names(ON) == list(SPOT)


def test_lines_of_json_take_the_lag_of_the_market_s_vol(tmp_path):
    file, vols = write_csv(tmp_path / "a.csv", rows_of(walk(40))), vol_file(tmp_path, 60)
    words = ["--input", file, "--output_dir", str(tmp_path), "--configs", "per_decision_ranking", "--iv_lag", "0"]
    main([*words, "--context", "spot", "--context_vols", vols])
    last = (tmp_path / "a_per_decision_ranking.jsonl").read_text().splitlines()[-1]
    assert "Market's IV: 1.0900," in last  # that of this very day
    with pytest.raises(SystemExit, match="iv_lag says nothing of lines"):
        main([*words, "--context", "spot"])


# ---------------------------------------------------------------------------------------------------------------------
# Bars


def bars_of(closes, volumes, spread: float = 0.01, bar: str = "1d", offset: int = 0) -> Bars:
    """Bars that begin at 1970, each from the close before."""
    closes, volumes = np.array(closes, float), np.array(volumes, float)
    opens = np.append(closes[:1], closes[:-1])
    values = {"open": opens, "high": np.maximum(opens, closes) * (1 + spread),
        "low": np.minimum(opens, closes) * (1 - spread), "close": closes, "volume": volumes}  # fmt: skip
    return Bars(values, 0, bar, offset)


def of_last(bars: Bars) -> dict:
    end = len(bars.values["close"]) * BARS[bars.bar] - bars.offset
    found = context_of_bars(bars, np.array([end]), bars.values["close"][-1:])
    return {name: words_of(name, one)[0] for name, one in found.items()}


def test_a_bar_with_much_volume_after_a_rise_is_a_climax():
    closes, volumes = [100.0] * 59 + [110.0], [10.0] * 59 + [50.0]
    bars = bars_of(closes, volumes)
    bars.values["high"][-1], bars.values["low"][-1] = 113.0, 99.0
    bars.values["open"][-1], bars.values["close"][-1] = 110.0, 109.5  # long lower wick
    found = of_last(bars)
    assert found["volume_ratio"] == pytest.approx(50 / (10 + 40 / 50)) and found["volume_class"] == "very_high"
    assert (found["spread_class"], found["wick"], found["effort"]) == ("wide", "lower", "validation")
    assert (found["buying_climax"], found["testing"], found["accumulation"]) == (0, 0, 0)  # two of four signs
    bars.values["open"][-1], bars.values["close"][-1] = 112.9, 109.7
    bars.values["high"][-1] = 125.0
    bars.values["close"][:-1] = bars.values["open"][:-1] = 120.0
    bars.values["high"][:-1], bars.values["low"][:-1] = 121.0, 119.0
    bars.values["close"][-1], bars.values["low"][-1] = 121.5, 121.0
    assert of_last(bars)["buying_climax"] == 4 and of_last(bars)["selling_climax"] == 0
    assert list(of_last(bars)) == list(OF_BARS)


def test_a_quiet_narrow_bar_at_the_low_is_a_test_and_busy_closes_above_are_accumulation():
    bars = bars_of([100.0] * 60, [10.0] * 60)
    for place in (-5, -8):
        bars.values["volume"][place], bars.values["close"][place] = 20.0, 100.9
    bars.values["volume"][-1] = 1.0
    bars.values["high"][-1], bars.values["low"][-1] = 100.1, 99.9
    found = of_last(bars)
    assert (found["testing"], found["accumulation"], found["distribution"]) == (3, 3, 2)
    assert (found["volume_class"], found["spread_class"], found["effort"]) == ("very_low", "narrow", "neutral")


def test_vwap_the_longer_frame_and_the_last_bars():
    closes = 100 * 1.01 ** np.arange(60)
    found = of_last(bars_of(closes, np.arange(1, 61), spread=0))
    assert [found["candle_ret_1"], found["candle_ret_10"]] == pytest.approx([0.01, 0.01])
    assert found["candle_volume_2"] == pytest.approx(59 / np.mean(np.arange(11, 61)))
    assert (found["longer_ret"], found["longer_trend"]) == (pytest.approx(1.01**7 - 1), "up")
    middle = (2 * closes + np.append(closes[0], closes[:-1]))[-20:] / 3
    weight = np.arange(41, 61)
    assert found["vwap_distance"] == pytest.approx(closes[-1] / np.average(middle, weights=weight) - 1)
    assert found["adx_14"] == pytest.approx(100)
    assert of_last(bars_of(closes[:26], np.ones(26)))["adx_14"] is None  # 26 bars are too few


def test_the_directional_index_is_wilders():
    """With a plain loop, as the book has it."""
    closes = walk(80, 5)
    values = bars_of(closes, np.ones(80)).values
    high, low = values["high"], values["low"]
    rise, fall = np.diff(high), -np.diff(low)
    plus, minus = np.where((rise > fall) & (rise > 0), rise, 0), np.where((fall > rise) & (fall > 0), fall, 0)
    up, down, strengths = plus[:14].mean(), minus[:14].mean(), []
    for place in range(13, 79):
        if place > 13:
            up, down = (13 * up + plus[place]) / 14, (13 * down + minus[place]) / 14
        strengths.append(100 * abs(up - down) / (up + down))
    index = np.mean(strengths[:14])
    for strength in strengths[14:]:
        index = (13 * index + strength) / 14
    assert directional_index(high[None], low[None], closes[None])[0] == pytest.approx(index, rel=1e-12)


def test_a_bar_counts_once_it_has_ended_at_the_time_of_the_price():
    bars = bars_of(np.arange(100.0, 200.0), np.ones(100), offset=8 * HOUR)
    label = np.array([60 * DAY])  # priced at 08:00, when the bar of day 59 has ended and that of day 60 has not
    assert seen_at(bars, label)["close"][0, -1] == 159.0
    assert seen_at(bars, label - 8 * HOUR)["close"][0, -1] == 159.0
    assert seen_at(bars, label - 8 * HOUR - 1)["close"][0, -1] == 158.0
    assert np.isnan(seen_at(bars, np.array([200 * DAY]))["close"][0, -1])


@pytest.mark.no_cover
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 120), st.integers(0, 10**6), st.sampled_from(["1d", "1h"]), st.floats(-24, 24))
def test_no_bar_that_has_not_ended_changes_a_number(ended, seed, bar, offset):
    width, rng = BARS[bar], np.random.default_rng(seed)
    whole = bars_of(walk(130, seed), rng.uniform(1, 9, 130), bar=bar, offset=round(offset * HOUR))
    time = np.array([ended * width - whole.offset + int(rng.integers(0, width))])
    price = np.array([60_000.0])
    found = context_of_bars(whole, time, price)
    cut = whole._replace(values={name: values[:ended] for name, values in whole.values.items()})
    other = {name: np.append(values[:ended], 7 * values[ended:]) for name, values in whole.values.items()}
    for changed in (cut, whole._replace(values=other)):
        for name, values in context_of_bars(changed, time, price).items():
            np.testing.assert_array_equal(values, found[name], err_msg=name)


def bar_rows(days: int, **cells) -> list[dict]:
    closes = walk(days, 9)
    return [
        {"time": time(day - 60), "open": close, "high": close * 1.01, "low": close * 0.99, "close": close,
         "volume": 10.0 + day % 7, "underlying": name} | cells
        for name in ("ETH", "BTC") for day, close in enumerate(closes)
    ]  # fmt: skip


def bar_file(path, rows: list[dict]) -> str:
    return write_csv(path, rows, list(rows[0]))


def test_bars_of_a_file_are_told(tmp_path):
    path = write_csv(tmp_path / "a.csv", rows_of(walk(20)))
    files = bar_file(tmp_path / "bars.csv", bar_rows(90)), str(tmp_path / "bars.parquet")
    pq.write_table(pa.Table.from_pylist(bar_rows(90)), files[1])
    options = dataclasses.replace(ON, context="ohlcv", ohlcv_files=files[0])
    told = contexts([path], options)
    assert told == contexts([path], dataclasses.replace(options, ohlcv_files=files[1]))
    first = told[f"BTC|{time(0)}|tp_and_roll"]
    assert list(first) == [*SPOT, *OF_BARS] == context_names(options)
    assert first["candle_ret_1"] == pytest.approx(walk(90, 9)[59] / walk(90, 9)[58] - 1)  # ended at this midnight
    rows = records(path, "per_decision_ranking", context="ohlcv", ohlcv_files=files[0])
    asked = rows[0]["messages"][1]["content"]
    assert "\n  - Last bars, the newest first (move, volume): " in asked and "\n  - Patterns (strength): acc" in asked
    assert rows[0]["wick"] in ("lower", "none", "upper") and isinstance(rows[0]["volume_ratio"], float)
    entry = read_candidates([path], options)[0]
    assert ranking_messages(entry.decision)[1]["content"] == asked


@pytest.mark.parametrize("rows, words", [
    (lambda: [{"time": "2024-01-01", "open": 1}], "there is no column high"),
    (lambda: bar_rows(3, underlying="SOL"), "there is no bar of BTC"),
    (lambda: bar_rows(3, low=-1), "row 4, column low: -1 is that of no bar"),
    (lambda: bar_rows(3, high=1), "row 4, column high: 1 is that of no bar"),
    (lambda: bar_rows(3, volume=-2), "row 4, column volume: -2 is that of no bar"),
    (lambda: bar_rows(3, close="dear"), "column close: "),
    (lambda: bar_rows(3, time="noon"), "row 4, column time: 'noon' is no time"),
    (lambda: [*bar_rows(3), bar_rows(1)[1] | {"time": ""}], "row 7, column time: None is no time"),
    (lambda: bar_rows(3, time="2024-01-01"), "two bars begin at one time"),
    (lambda: [*bar_rows(3), bar_rows(1)[1] | {"time": time(0.5)}], "bars do not begin 1d apart"),
])  # fmt: skip
def test_a_file_that_holds_no_bars(tmp_path, rows, words):
    with pytest.raises(CandidatesError, match=words):
        read_bars(bar_file(tmp_path / "bars.csv", rows()), "BTC", "1d", 0.0)


def test_a_column_of_bars_that_stands_twice(tmp_path):
    (tmp_path / "bars.csv").write_text("time,open,high,low,close,volume,time\n2024-01-01,1,2,1,2,3,2024-01-02\n")
    with pytest.raises(CandidatesError, match="bars.csv: column time stands twice"):
        read_bars(str(tmp_path / "bars.csv"), "BTC", "1d", 0)


def test_bars_that_are_not_there(tmp_path):
    with pytest.raises(CandidatesError, match="ohlcv_files='none.csv' is no file"):
        read_bars("none.csv", "BTC", "1d", 0.0)
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(CandidatesError, match="cannot be read"):
        read_bars(str(tmp_path / "bad.parquet"), "BTC", "1d", 0.0)
    for alone in ({"context": "ohlcv"}, {"ohlcv_files": "a.csv"}):
        with pytest.raises(CandidatesError, match="context='ohlcv' and ohlcv_files go together"):
            dataclasses.replace(ON, **alone).check()


# ---------------------------------------------------------------------------------------------------------------------
# Real input


@functools.cache
def real():
    files = [str(path) for path in sorted(REAL_DATA.glob("*hold_to_expiry*.csv"))]
    return read_decisions(files, ON).columns()


@needs_real_data
def test_a_real_row():
    place = [str(one)[:10] for one in real().time.astype("datetime64[us]")].index("2024-11-12")
    found = logged_of(real().take(np.array([place])))[0].decision.context
    shown = {name: round(100 * found[name], 2) for name in ("ret_7d", "ret_30d", "dist_ma50")}
    assert shown == {"ret_7d": 29.49, "ret_30d": 41.93, "dist_ma50": 31.94} and found["regime"] == "bull"
    assert (round(found["rv_7d"], 4), round(found["rv_30d"], 4)) == (0.5951, 0.4762)
    assert real().numbers["ivrv_ratio"][real().offsets[place]] == pytest.approx(1.469952, abs=5e-7)


@needs_real_data
def test_how_much_of_a_real_file_is_unknown():
    unknown = {name: int(np.isnan(values).sum()) for name, values in real().context.items()}
    assert len(real()) == 123
    assert unknown | {"support": 0, "resistance": 0} == {
        "ret_1d": 1, "ret_7d": 7, "ret_30d": 30, "rv_7d": 7, "rv_30d": 0, "dist_ma50": 49, "regime": 49,
        "trend_5d": 5, "drawdown_90d": 29, "range_pos_30d": 29, "rsi_14": 14, "support": 0, "resistance": 0,
        "iv_rank_180": 123, "iv_skew": 123, "iv_term": 123,
    }  # fmt: skip


@needs_real_data
def test_the_real_score_column_follows_from_the_context():
    """T1, T2 and T3: the teacher's formula over these numbers, on all rows with a history of 50 days."""
    columns, numbers = real(), real().numbers
    context = {name: values[columns.decision_of] for name, values in columns.context.items()}
    known = daily_vols(columns)[columns.decision_of]
    rows = ~np.isnan(known)
    assert rows.sum() == 524 and abs(numbers["iv"] / known / numbers["ivrv_ratio"] - 1)[rows].max() < 1e-12
    ratio = numbers["iv"] / context["rv_30d"]
    score = 3 * (np.clip(ratio, 1, 1.5) - 1) / 0.5 + 1.5 * np.maximum(0, 1 - abs(numbers["dte"] - 7) / 2)
    score += 2 * np.maximum(0, 1 - abs(numbers["delta"] - 0.25) / 0.10)
    moneyness = numbers["strike"] / columns.spot[columns.decision_of]
    told = ("rv_30d", "rv_7d", "dist_ma50", "ret_7d", "ret_30d")
    rows = np.flatnonzero(~np.isnan(context["dist_ma50"]))
    assert len(rows) == 443
    for row in rows:
        past = Past(*(context[name][row] for name in told))
        lost = sum(its.item() for its in penalties(moneyness[row : row + 1], past).values())
        assert np.clip(score[row] - lost, 0, 10) == pytest.approx(numbers["score"][row], abs=1e-12)


def daily_vols(columns) -> np.ndarray:
    """(D,) of the files' own spots alone, without what the candidates' ratios say."""
    known = prices_of(columns.time, columns.spot)
    return context_of_prices(known, columns.time, columns.spot)["rv_30d"]


@needs_real_data
def test_real_files_in_any_order():
    files = [str(path) for path in sorted(REAL_DATA.glob("*.csv"))]
    assert contexts(files) == contexts(random.Random(1).sample(files, len(files)))
