"""What every candidate would have brought, and what is made of it: counterfactuals, preference pairs, Q-values."""

import datetime
import math
from collections import Counter, namedtuple
from datetime import date

import pytest
from conftest import (
    REAL_DATA,
    SCRIPT,
    decision,
    import_script,
    needs_real_data,
    no_candidates,
    on_the_default_stack,
    read_candidates,
    records,
    row,
    time,
)
from conftest import write_csv as write
from hypothesis import example, given
from hypothesis import strategies as st

from covered_call.candidates.columns import columns_of
from covered_call.candidates.options import CoveredCallCandidatesConfig, PreferenceConfig
from covered_call.candidates.preferences import Pairs, preferred_pairs
from covered_call.candidates.pricing import black_scholes_call
from covered_call.candidates.prompts import admissible_answers, present_in_order
from covered_call.candidates.records import preference_records
from covered_call.candidates.schema import COLUMNS, NO_TRADE, CandidatesError, LoggedDecision
from covered_call.candidates.splits import split_decisions

HOLD = {"exit_style": "hold_to_expiry", "dte": 7.0, "iv": 0.5}
TP = HOLD | {"exit_style": "tp_and_roll"}
WEEK = 7 / 365


def premium(spot: float, strike: float, days: float = 7.0, iv: float = 0.5) -> float:
    return black_scholes_call(spot, strike, days / 365, iv)


def at(day: float, spot: float, strikes=(100, 110), sold=None, **cells) -> list[dict]:
    return decision(day, sold, **HOLD | {"strikes": strikes, "spot": spot} | cells)


def logged(tmp_path, rows: list[dict], **options) -> list[LoggedDecision]:
    return read_candidates([write(tmp_path / "a.csv", rows)], CoveredCallCandidatesConfig(**options))


def counterfactuals(tmp_path, rows: list[dict], **options) -> list[float | None]:
    """Of the first decision."""
    return [counterfactual.pnl_vs_hodl for counterfactual in logged(tmp_path, rows, **options)[0].counterfactuals]


# --- hold_to_expiry


def test_a_held_call_brings_its_premium_less_what_it_pays(tmp_path):
    # At the money: premium = spot * (2 N(sd / 2) - 1), sd = 0.5 * sqrt(7 / 365).
    at_the_money = 100 * math.erf(0.5 * math.sqrt(WEEK) / 2 / math.sqrt(2))
    assert counterfactuals(tmp_path, at(0, 100.0) + at(7, 108.0)) == pytest.approx(
        [at_the_money - 8.0, premium(100, 110)]
    )


def test_a_call_without_time_or_vol_is_worth_its_intrinsic_value():
    assert black_scholes_call(105.0, 100.0, 0.0, 0.5) == black_scholes_call(105.0, 100.0, 0.1, 0.0) == 5.0


def test_the_call_formula_agrees_with_the_simulators_own():
    simulator = import_script(SCRIPT.parent / "data" / "simulate_backtest.py")
    for spot, strike, years, iv in ((100, 90, 0.1, 0.3), (100, 150, 1.0, 0.9), (3e4, 4e4, WEEK, 0.55)):
        assert black_scholes_call(spot, strike, years, iv) == pytest.approx(
            simulator.black_scholes_call(spot, strike, years, iv), rel=1e-9
        )


@pytest.mark.parametrize("gap, hours, known", [
    (0.5, 12, True), (-0.5, 12, True), (0.51, 12, False), (-0.51, 12, False), (0.51, 13, True), (0.1, 2, False),
])  # fmt: skip
def test_the_spot_at_expiry_is_within_the_tolerance(tmp_path, gap, hours, known):
    found = counterfactuals(tmp_path, at(0, 100.0) + at(7 + gap, 108.0), expiry_tolerance=hours)
    assert (found[0] is not None) == known


def test_the_spot_is_of_the_same_underlying_and_never_of_a_placeholder_without_one(tmp_path):
    rows = at(0, 100.0) + at(7, 9.0, underlying="ETH") + [no_candidates(7.1, spot=0, exit_style="hold_to_expiry")]
    assert counterfactuals(tmp_path, rows) == [None, None]


def test_a_placeholder_gives_the_spot_of_its_day(tmp_path):
    rows = at(0, 100.0) + [no_candidates(7, spot=90.0, exit_style="hold_to_expiry")]
    assert counterfactuals(tmp_path, rows) == pytest.approx([premium(100, 100), premium(100, 110)])


@pytest.mark.parametrize("cells", [{"iv": ""}, {"exit_style": "stop_loss"}])
def test_without_iv_or_for_another_exit_style_a_counterfactual_is_unknown(tmp_path, cells):
    assert counterfactuals(tmp_path, at(0, 100.0, **cells) + at(7, 108.0, **cells)) == [None, None]


@given(st.floats(1e-300, 1e300), st.floats(1e-300, 1e300), st.floats(0, 36500), st.floats(0, 1e300))
@example(spot=1.0, strike=1.0, dte=36500.0, iv=1e308)
def test_a_counterfactual_is_a_finite_number_or_unknown_whatever_the_file_holds(tmp_path, spot, strike, dte, iv):
    rows = [row(**HOLD | {"spot": spot, "strike": strike, "dte": dte, "iv": iv, "decision_time": time(0)})]
    rows += [no_candidates(math.floor(dte), exit_style="hold_to_expiry", spot=spot)] * (dte >= 1)
    (found,) = counterfactuals(tmp_path, rows, max_iv=math.inf)
    assert found is None or math.isfinite(found)


# --- Costs and horizons


@pytest.mark.parametrize("costs, of_premium, of_spot", [
    ({"fee": 0.0003}, 0.0, 0.0003),
    ({"fee": 0.01}, 0.125, 0.0),  # Deribit's cap binds
    ({"fee": 0.01, "fee_cap": 0.05}, 0.05, 0.0),
    ({"half_spread": 0.02}, 0.02, 0.0),
    ({"slippage": 0.001}, 0.0, 0.001),
    ({"fee": 0.0003, "half_spread": 0.02, "slippage": 0.001}, 0.02, 0.0013),
])  # fmt: skip
def test_costs_are_paid_at_each_trade_and_not_at_expiry(tmp_path, costs, of_premium, of_spot):
    rows = at(0, 100.0, strikes=[100]) + at(3, 101.0, strikes=[100]) + at(7, 108.0, strikes=[100])
    sale = of_premium * premium(100, 100) + of_spot * 100
    assert counterfactuals(tmp_path, rows, **costs) == pytest.approx([premium(100, 100) - sale - 8.0])
    value = premium(101, 100, days=4)
    buyback = of_premium * value + of_spot * 101
    early = counterfactuals(tmp_path, rows, horizon=3, **costs)
    assert early == pytest.approx([premium(100, 100) - sale - value - buyback])


def test_a_horizon_after_expiry_is_expiry(tmp_path):
    rows = at(0, 100.0) + at(7, 108.0)
    assert counterfactuals(tmp_path, rows, horizon=30) == counterfactuals(tmp_path, rows) != [None, None]


@pytest.mark.parametrize("options, message", [
    ({"fee": -0.1}, "fee=-0.1: give a number from 0 to 1"),
    ({"horizon": "week"}, "horizon='week': give a number"),
    ({"half_spread": 1.5}, "half_spread=1.5: give a number from 0 to 1"),
    ({"name": "q_values", "hindsight": True}, "hindsight is for .*, not for q_values"),
])  # fmt: skip
def test_an_option_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(CandidatesError, match=message):
        CoveredCallCandidatesConfig(**options).check()


def test_pairs_have_options_that_other_configs_refuse(load, tmp_path):
    path = write(tmp_path / "a.csv", at(0, 100.0) + at(7, 108.0))
    with pytest.raises(CandidatesError, match="rejected='best': choose one of teacher, worst"):
        load("preference", data_files=path, rejected="best")
    with pytest.raises(ValueError, match="min_edge"):
        load("per_candidate", data_files=path, min_edge=5.0)


def test_a_changed_cost_gives_new_rows(load, tmp_path):
    path = write(tmp_path / "a.csv", at(0, 100.0) + at(7, 108.0))
    free, dear = (
        load("q_values", data_files=path, splits="train", fee=fee)["train"][0]["q_sell"] for fee in (0, 0.001)
    )
    assert dear == pytest.approx(free - 0.1)


# --- tp_and_roll


def test_a_call_is_bought_back_once_the_profit_is_taken_and_another_sold(tmp_path):
    rows = at(0, 100.0, strikes=[100], **TP)
    rows += at(1, 99.0, strikes=[100], **TP)  # not yet
    rows += at(2, 90.0, strikes=[92, 95, 99], **TP)
    rows[-3]["delta"], rows[-2]["delta"], rows[-1]["delta"] = "0.5", "0.26", "0.1"
    rows += at(7, 96.0, strikes=[100], **TP)
    first = premium(100, 100) - premium(90, 100, days=5)
    rolled = premium(90, 95) - premium(96, 95, days=2)
    assert premium(90, 100, days=5) < 0.3 * premium(100, 100) < premium(99, 100, days=6)
    days = [rows[0], *at(1, 99.0, strikes=[100], **TP), *rows[2:]]
    days += [one for day in (3, 4, 5, 6) for one in at(day, 95.0, strikes=[100], **TP)]
    assert counterfactuals(tmp_path, days) == pytest.approx([first + rolled])
    assert counterfactuals(tmp_path, days, roll_delta=0.1)[0] == pytest.approx(
        first + premium(90, 99) - premium(96, 99, days=2)
    )
    assert counterfactuals(tmp_path, days, take_profit=1)[0] == pytest.approx(premium(100, 100))  # held, and worthless
    cost = counterfactuals(tmp_path, days)[0] - counterfactuals(tmp_path, days, slippage=0.001)[0]
    assert cost == pytest.approx(0.001 * (100 + 90 + 90 + 96))  # sold, bought back, sold, bought back


def test_where_nothing_is_quoted_nothing_more_is_sold(tmp_path):
    days = at(0, 100.0, strikes=[100], **TP) + [no_candidates(1, spot=80.0, exit_style="tp_and_roll")]
    days += [one for day in range(2, 8) for one in at(day, 200.0, strikes=[100], **TP)]
    assert counterfactuals(tmp_path, days) == pytest.approx([premium(100, 100) - premium(80, 100, days=6)])


def test_a_call_rolled_into_that_expires_first_ends_the_trade(tmp_path):
    days = at(0, 100.0, strikes=[100], **TP) + at(1, 80.0, strikes=[81], **TP | {"dte": 2.0})
    days += [one for day in range(2, 8) for one in at(day, 80.0 + day, strikes=[100], **TP)]
    first = premium(100, 100) - premium(80, 100, days=6)
    assert counterfactuals(tmp_path, days) == pytest.approx([first + premium(80, 81, days=2) - (83 - 81)])


def test_a_call_that_is_worth_nothing_when_it_is_sold_is_rolled_at_the_next_time(tmp_path):
    days = at(0, 100.0, strikes=[100], **TP)
    days += [one for day in range(1, 8) for one in at(day, 80.0, strikes=[100], **TP | {"iv": 1e-9})]
    assert counterfactuals(tmp_path, days) == pytest.approx([premium(100, 100) - premium(80, 100, days=6)])


@pytest.mark.parametrize("spoil", [lambda days: days.pop(3), lambda days: days[1].update(iv="")])
def test_a_gap_in_the_path_or_a_roll_without_a_price_leaves_it_unknown(tmp_path, spoil):
    days = [one for day in range(8) for one in at(day, 100.0 - 20 * (day > 0), strikes=[100], **TP)]
    assert counterfactuals(tmp_path, days)[0] is not None
    spoil(days)
    assert counterfactuals(tmp_path, days)[0] is None


@pytest.mark.parametrize("style", ["hold_to_expiry", "tp_and_roll"])
def test_the_counterfactuals_of_the_simulated_teachers_trades_are_what_it_recorded(tmp_path, style):
    simulator = import_script(SCRIPT.parent / "data" / "simulate_backtest.py")
    simulator.simulate_backtest(tmp_path, 349, date(2020, 1, 1), date(2020, 12, 31))
    entries = read_candidates(list(map(str, tmp_path.glob(f"*{style}*"))), CoveredCallCandidatesConfig())
    pairs = [
        (e.counterfactuals[e.chosen].pnl_vs_hodl, e.outcomes[e.chosen].pnl_vs_hodl)
        for e in entries
        if e.chosen is not None
    ]
    known = [(counterfactual, recorded) for counterfactual, recorded in pairs if counterfactual is not None]
    assert len(known) > 200 and len(pairs) - len(known) <= 10  # the last options settle after the file ends
    for counterfactual, recorded in known:
        assert counterfactual == pytest.approx(recorded, abs=1e-5)


# --- Preference pairs

Pair = namedtuple("Pair", "chosen rejected chosen_outcome rejected_outcome source")


def pair_of(tmp_path, values, recorded=None, chosen=None, spot=1000.0, **options):
    """The pair of one decision whose candidates have these outcomes, and its teacher's call this recorded one."""
    rows = decision(0, chosen, strikes=range(1, len(values) + 1), spot=spot, pnl_vs_hodl=0.0)
    if chosen is not None:
        rows[chosen]["pnl_vs_hodl"] = "" if recorded is None else str(recorded)
    options = PreferenceConfig(**{"min_edge_pct": 0.0} | options)
    (entry,) = read_candidates([write(tmp_path / "pair.csv", rows)], options)
    found = [
        counterfactual._replace(pnl_vs_hodl=value)
        for counterfactual, value in zip(entry.counterfactuals, values, strict=True)
    ]
    return only_pair([entry._replace(counterfactuals=tuple(found))], options)


def only_pair(entries: list[LoggedDecision], options: PreferenceConfig):
    """What is preferred to what (a place, None for NO_TRADE), their outcomes and their source; None for no pair."""
    has, *sides, chosen_outcome, rejected_outcome, recorded = (one.item() for one in pairs_of(entries, options))
    chosen, rejected = (None if side < 0 else side for side in sides)
    source = "recorded" if recorded else "counterfactual"
    return Pair(chosen, rejected, chosen_outcome, rejected_outcome, source) if has else None


def pairs_of(entries: list[LoggedDecision], options: PreferenceConfig) -> Pairs:
    return preferred_pairs(present_in_order(columns_of(entries), options), options)


def preference_rows(entries: list[LoggedDecision], options: PreferenceConfig) -> list[dict]:
    return preference_records(present_in_order(columns_of(entries), options), options).to_pylist()


@pytest.mark.parametrize("values, chosen, recorded, options, expected", [
    # best against the teacher's
    ([5.0, 9.0, -3.0], 0, None, {}, (1, 0, 9.0, 5.0, "counterfactual")),
    ([5.0, 9.0, -3.0], None, None, {}, (1, None, 9.0, 0.0, "counterfactual")),
    ([-5.0, -9.0], 1, None, {}, (None, 1, 0.0, -9.0, "counterfactual")),
    # ... or, where the teacher's is the best, against the worst
    ([5.0, 9.0, -3.0], 1, None, {}, (1, 2, 9.0, -3.0, "counterfactual")),
    ([-5.0, -9.0], None, None, {}, (None, 1, 0.0, -9.0, "counterfactual")),
    ([5.0, 9.0, -3.0], 0, None, {"rejected": "worst"}, (1, 2, 9.0, -3.0, "counterfactual")),
    # recorded outcomes where both sides have one
    ([-5.0, -9.0], 1, -7.0, {}, (None, 1, 0.0, -7.0, "recorded")),
    ([5.0, 9.0], 1, 8.0, {}, (1, None, 8.0, 0.0, "recorded")),
    ([5.0, 9.0, -3.0], 1, 8.0, {}, (1, 2, 9.0, -3.0, "counterfactual")),  # never one of each
    ([5.0, 9.0, -3.0], 0, 100.0, {}, (1, 0, 9.0, 5.0, "counterfactual")),
    ([-5.0, -9.0], 1, 7.0, {}, None),  # the recorded outcome contradicts the counterfactuals
    # a counterfactual is unknown: only the teacher's call and NO_TRADE are compared
    ([5.0, None], 0, 3.0, {}, (0, None, 3.0, 0.0, "recorded")),
    ([5.0, None], 1, -3.0, {}, (None, 1, 0.0, -3.0, "recorded")),
    ([5.0, None], 0, None, {}, None),
    ([5.0, None], None, None, {}, None),
    # with costs or a horizon, a recorded outcome says nothing
    ([-5.0, -9.0], 1, -7.0, {"fee": 0.1}, (None, 1, 0.0, -9.0, "counterfactual")),
    ([5.0, None], 0, 3.0, {"horizon": 3}, None),
    # edges
    ([5.0, 9.0], 0, None, {"min_edge": 3.9}, (1, 0, 9.0, 5.0, "counterfactual")),
    ([5.0, 9.0], 0, None, {"min_edge": 4.0}, None),
    ([5.0, 9.0], 0, None, {"min_edge": 10**400}, None),
    ([5.0, 9.0], 0, None, {"min_edge_pct": 0.39}, (1, 0, 9.0, 5.0, "counterfactual")),
    ([5.0, 9.0], 0, None, {"min_edge_pct": 0.4}, None),
    ([0.0], None, None, {}, None),
])  # fmt: skip
def test_the_better_answer_is_preferred(tmp_path, values, chosen, recorded, options, expected):
    assert pair_of(tmp_path, values, recorded, chosen, **options) == expected


@given(
    st.lists(st.one_of(st.none(), st.integers(-20, 20).map(float)), min_size=1, max_size=5),
    st.sampled_from(["teacher", "worst"]),
    st.integers(0, 8),
    st.data(),
)
def test_a_pair_is_two_answers_of_one_decision_apart_by_the_edge(tmp_path, values, rejected, edge, data):
    chosen = data.draw(st.one_of(st.none(), st.integers(0, len(values) - 1)))
    recorded = data.draw(st.one_of(st.none(), st.integers(-20, 20).map(float)))
    pair = pair_of(tmp_path, values, recorded, chosen, rejected=rejected, min_edge=float(edge))
    if pair is None:
        return
    assert pair.chosen_outcome - pair.rejected_outcome > edge
    sides = ((pair.chosen, pair.chosen_outcome), (pair.rejected, pair.rejected_outcome))
    for pick, outcome in sides:
        source = {chosen: recorded} if pair.source == "recorded" else dict(enumerate(values))
        assert outcome == (0.0 if pick is None else source[pick])
    if pair.source == "counterfactual":
        assert pair.chosen_outcome == max(0.0, *values)


def week(count: int, path=lambda day: 100.0, sold=0, **cells) -> list[dict]:
    return [one for day in range(count) for one in at(day, path(day), sold=sold, **cells)]


def swinging(day: float) -> float:
    return 100.0 + 15 * math.sin(day / 9) + day / 10


def test_a_preference_record_is_the_rankings_prompt_with_two_answers(load, tmp_path):
    path = write(tmp_path / "a.csv", week(60, swinging, strikes=(95, 100, 105)))
    pairs = load("preference", data_files=path, splits="train")["train"].to_list()
    ranking = {
        one["decision_id"]: one for one in load("per_decision_ranking", data_files=path, splits="train")["train"]
    }
    assert 20 < len(pairs) <= 60
    for pair in pairs:
        same = ranking[pair["decision_id"]]
        assert pair["prompt"] == same["messages"][:2] and pair["teacher_label"] == same["label"]
        for side in ("chosen", "rejected"):
            assert pair[side] == [{"role": "assistant", "content": pair[f"{side}_label"]}]
            assert pair[f"{side}_label"] in admissible_answers("per_decision_ranking", len(same["candidates"]))
        assert pair["chosen_outcome"] - pair["rejected_outcome"] > 0.001 * pair["spot"]


@pytest.mark.parametrize("order", ["instrument", "csv", "shuffle"])
def test_the_labels_of_a_pair_point_into_the_prompts_order(tmp_path, order):
    path = write(tmp_path / "a.csv", week(40, swinging, strikes=(105, 95, 100)))
    by_strike = {}
    for entry in read_candidates([path], CoveredCallCandidatesConfig()):
        for candidate, counterfactual in zip(entry.decision.candidates, entry.counterfactuals, strict=True):
            by_strike[entry.decision.decision_id, candidate.strike] = counterfactual.pnl_vs_hodl
    options = PreferenceConfig(name="preference", candidate_order=order)
    entries = read_candidates([path], options)
    found = preference_rows(entries, options)
    sold = [one for one in found if one["chosen_label"] != NO_TRADE and one["source"] == "counterfactual"]
    assert len(sold) > 5
    for one in sold:
        line = one["prompt"][1]["content"].split(f"[{one['chosen_label']}] ")[1]
        strike = int(line.split("Strike: ")[1].split(",")[0])
        assert one["chosen_outcome"] == by_strike[one["decision_id"], strike]


def test_the_pairs_of_each_split_keep_the_shares_of_the_better_answers(load, tmp_path):
    """On a falling path the lowest strike brings most; on a rising one, nothing does. No pair of these is left out."""

    def path(day: float) -> float:
        return {0: 300.0 - day, 1: 180 * 1.03 ** (day - 120)}[int(120 <= day < 170 or day >= 190)]

    rows = week(220, path, sold=None, strikes=(0.9, 1.0, 1.1))
    for one in rows:
        one["strike"] = float(one["spot"]) * float(one["strike"])
    files = {"data_files": write(tmp_path / "a.csv", rows), "splits": (0.7, 0.2, 0.1)}
    pairs, asked = load("preference", **files), load("per_decision_ranking", **files)
    counts = Counter(pairs["train"]["chosen_label"]).most_common()
    assert len(counts) > 1 and counts[0][1] > counts[1][1]
    assert [len(pairs[name]) for name in ("train", "validation")] == [len(asked["train"]), len(asked["validation"])]


# --- Q-values


def test_q_values_are_the_counterfactuals_or_else_what_was_recorded(load, tmp_path):
    rows = at(0, 100.0, sold=0) + at(7, 108.0, sold=1, iv="")
    path = write(tmp_path / "a.csv", rows)
    table = load("q_values", data_files=path, splits="train")["train"].to_list()
    counterfactual = premium(100, 100) - 8.0
    assert [one["source"] for one in table] == ["counterfactual", "counterfactual", None, "recorded"]
    assert [one["q_sell"] for one in table] == [
        pytest.approx(counterfactual),
        pytest.approx(premium(100, 110)),
        None,
        744.26,
    ]
    assert [one["pnl_vs_hodl"] for one in table] == [744.26, None, None, 744.26]
    assert [one["counterfactual_pnl_vs_hodl"] for one in table][2:] == [None, None]
    assert [one["sold"] for one in table] == [True, False, False, True]
    assert {one["q_hold"] for one in table} == {0.0} and table[0]["strike"] == 100 and "messages" not in table[0]
    gross = load("q_values", data_files=path, splits="train", half_spread=0.01)["train"].to_list()
    assert [one["source"] for one in gross] == ["counterfactual", "counterfactual", None, None]


# --- Splits and prompts


@given(st.integers(20, 60), st.sampled_from([None, 1, 3]), st.sampled_from(["hold_to_expiry", "tp_and_roll"]))
def test_no_outcome_of_a_split_is_known_only_after_the_next_has_begun(tmp_path, count, horizon, style):
    options = {"horizon": horizon, "splits": (0.6, 0.2, 0.2)}
    rows = week(count, swinging, exit_style=style)
    splits = list(split_decisions(logged(tmp_path, rows, **options), CoveredCallCandidatesConfig(**options)).values())
    for earlier, later in zip(splits, splits[1:], strict=False):
        if earlier and later:
            begins = later[0].decision.decision_time
            assert all(entry.label_end < begins for entry in earlier)
            assert begins - earlier[-1].decision.decision_time == datetime.timedelta(days=(horizon or 7) + 1)


@on_the_default_stack
@given(st.lists(st.floats(50, 200), min_size=9, max_size=9), st.lists(st.floats(50, 200), min_size=9, max_size=9))
def test_no_later_price_can_change_a_prompt(tmp_path, one, other):
    """The same decision in two futures: other counterfactuals, other pairs, the same prompt."""
    found = []
    for future in (one, other):
        rows = at(0, 100.0, **TP) + [r for day, spot in enumerate(future, start=1) for r in at(day, spot, **TP)]
        path = write(tmp_path / "a.csv", rows, COLUMNS)
        ranking = records(path, "per_decision_ranking")[0]["messages"][:2]
        options = PreferenceConfig(name="preference")
        pairs = preference_rows(read_candidates([path], options)[:1], options)
        assert [pair["prompt"] for pair in pairs] == [ranking] * len(pairs)
        found.append((ranking, [record["messages"][:2] for record in records(path)][:2]))
    assert found[0] == found[1]


@needs_real_data
def test_the_counterfactuals_of_real_held_trades_follow_what_was_recorded():
    (path,) = map(str, REAL_DATA.glob("*hold_to_expiry*.csv"))
    entries = read_candidates([path], CoveredCallCandidatesConfig())
    pairs = [
        (e.counterfactuals[e.chosen].pnl_vs_hodl, e.outcomes[e.chosen].pnl_vs_hodl)
        for e in entries
        if e.chosen is not None
    ]
    known = [pair for pair in pairs if pair[0] is not None]
    mean = [sum(side) / len(known) for side in zip(*known, strict=True)]
    spread = [[value - m for value in side] for side, m in zip(zip(*known, strict=True), mean, strict=True)]
    covariance = sum(a * b for a, b in zip(*spread, strict=True))
    assert covariance / math.prod(math.sqrt(sum(v * v for v in side)) for side in spread) >= 0.98
    assert len(known) > 100
