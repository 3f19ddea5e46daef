"""The simulated backtest: its files obey the teacher's rules, use no future, and price what they claim."""

import csv
import importlib.util
import math
import sys
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from conftest import on_the_default_stack

pytestmark = on_the_default_stack

SCRIPT = Path(__file__).parents[1] / "data" / "simulate_backtest.py"
spec = importlib.util.spec_from_file_location("simulate_backtest", SCRIPT)
sim = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sim)
COLUMNS = sys.modules["backtest_log"].COLUMNS

START, END, SEED = date(2021, 3, 1), date(2021, 12, 31), 5
HOLD, ROLL = sim.EXIT_STYLES


def simulate(folder, seed=SEED, end=END):
    """{exit style: path} of a simulated backtest."""
    sim.simulate_backtest(folder, seed, START, end)
    return {style: next(folder.glob(f"*_{style}_simulated.csv")) for style in sim.EXIT_STYLES}


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_decision(rows):
    groups = {}
    for row in rows:
        groups.setdefault(row["decision_time"], []).append(row)
    return groups


def traded(rows):
    return [row for row in rows if row["chosen"] == "1"]


def is_placeholder(row):
    return row["instrument"] == "NO_CANDIDATES"


def day_of(row):
    return datetime.fromisoformat(row["decision_time"]).date()


def call_value(spot, strike, days, iv):
    """Black-Scholes once more, from erf, so that the script is not checked against itself."""
    if days == 0:
        return max(0.0, spot - strike)
    sd = iv * math.sqrt(days / 365)
    d1 = math.log(spot / strike) / sd + sd / 2
    normal = [(1 + math.erf(d / math.sqrt(2))) / 2 for d in (d1, d1 - sd)]
    return spot * normal[0] - strike * normal[1]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("backtest"))


@pytest.fixture(scope="module")
def rows(paths):
    return {style: read(path) for style, path in paths.items()}


# The files


def test_same_seed_same_bytes(paths, tmp_path):
    again = simulate(tmp_path)
    assert {style: path.read_bytes() for style, path in paths.items()} == {
        style: path.read_bytes() for style, path in again.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in again.values())


def test_another_seed_another_path(paths, tmp_path):
    other = simulate(tmp_path, seed=SEED + 1)
    assert [row["spot"] for row in read(other[HOLD])] != [row["spot"] for row in read(paths[HOLD])]


def test_names_header_and_line_ends(paths):
    assert paths[HOLD].name == "training_candidates_BTC_20210301_20211231_hold_to_expiry_simulated.csv"
    for path in paths.values():
        header = path.read_bytes().split(b"\r\n")[0].decode()
        assert header == (
            "decision_time,underlying,spot,instrument,strike,dte,delta,score,iv,ivrv_ratio,exit_style,"
            "trade_executed,chosen,action,strategy,reward,pnl_vs_hodl,max_drawdown_pct"
        )
        assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"\r\n")


def test_default_run_reproduces_the_committed_sample(tmp_path, capsys):
    sim.main(["--output-dir", str(tmp_path)])
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in (SCRIPT.parent / "sample").glob("*.csv")}
    assert made == kept and len(made) == 2
    assert sum(map(len, made.values())) < 4 * 2**20
    printed = capsys.readouterr().out
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    assert all(line in readme for line in printed.splitlines()), printed
    for path in tmp_path.iterdir():
        decisions = by_decision(read(path))
        assert len(decisions) == 2532
        best = [float(candidates[0]["score"]) for candidates in decisions.values()]
        assert 0.80 <= np.mean(np.array(best) >= 3) <= 0.84
        empty = sum(is_placeholder(candidates[0]) for candidates in decisions.values())
        assert 0.01 <= empty / len(decisions) <= 0.02


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("old")

    def failing():
        yield ("one",)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        sim.write_csv(path, failing())
    assert path.read_text() == "old"


def test_help_shows_an_example_and_bad_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        sim.main(["--help"])
    assert "example: python data/simulate_backtest.py" in capsys.readouterr().out
    for arguments, message in (
        (["--start", "2021-01-02", "--end", "2021-01-01"], "before --start"),
        (["--seed", "-1"], "--seed -1"),
        (["--start", "soon"], "--start"),
    ):
        with pytest.raises(SystemExit) as stop:
            sim.main(arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_summary_counts_what_the_file_holds(paths, rows):
    line = sim.summary(paths[HOLD], typed(rows[HOLD]))
    decisions, sold = by_decision(rows[HOLD]), traded(rows[HOLD])
    empty = sum(map(is_placeholder, rows[HOLD]))
    mean = np.mean([float(row["pnl_vs_hodl"]) for row in sold])
    assert f"{len(rows[HOLD])} rows, {len(decisions)} decisions" in line
    assert f"{100 * len(sold) / len(decisions):.1f}% traded" in line
    assert f"{100 * (1 - len(sold) / (len(rows[HOLD]) - empty)):.1f}% of candidates SKIP" in line
    assert f"{empty} NO_CANDIDATES steps" in line and f"{mean:.2f} USD" in line


def typed(rows):
    """The rows as the script holds them, as far as the summary looks."""
    numbers = {"chosen": int, "pnl_vs_hodl": float}
    return [tuple(numbers.get(name, str)(value) for name, value in row.items()) for row in rows]


# The candidates


def test_both_files_share_path_candidates_and_scores(rows):
    shared = COLUMNS[:10] + COLUMNS[11:15]
    assert [[row[name] for name in shared] for row in rows[HOLD]] == [
        [row[name] for name in shared] for row in rows[ROLL]
    ]
    assert all(row["exit_style"] == style for style in sim.EXIT_STYLES for row in rows[style])


def test_a_decision_a_day(rows):
    days = [date.fromisoformat(time[:10]) for time in by_decision(rows[HOLD])]
    assert days == [START + timedelta(days=n) for n in range((END - START).days + 1)]
    assert all(row["decision_time"].endswith("T00:00:00+00:00") for row in rows[HOLD])


def test_candidates_are_calls_near_the_target(rows):
    for candidates in by_decision(rows[HOLD]).values():
        if is_placeholder(candidates[0]):
            continue
        assert 1 <= len(candidates) <= 10
        assert len({row["strike"] for row in candidates}) == len(candidates)
        for row in candidates:
            spot, strike, dte = float(row["spot"]), float(row["strike"]), float(row["dte"])
            assert (2 * spot).is_integer()
            step = sim.strike_step(spot)
            assert strike % step == 0 and 0.007 < step / spot <= 0.02
            expiry = day_of(row) + timedelta(days=dte)
            assert dte.is_integer() and 4 <= dte <= 10 and expiry.weekday() == 4
            assert row["instrument"] == f"BTC-{expiry:%d%b%y}-{strike:.0f}-C".upper()
            assert 0.15 <= float(row["delta"]) <= 0.35
            # Delta is d(value) / d(spot), so a finite difference of the test's own formula finds it.
            bump = 1e-4 * spot
            up, down = (call_value(spot + move, strike, dte, float(row["iv"])) for move in (bump, -bump))
            assert float(row["delta"]) == pytest.approx((up - down) / (2 * bump), abs=1e-5)


def test_at_most_ten_candidates_even_when_vol_is_extreme():
    rng = np.random.RandomState(0)
    sizes = [len(sim.list_candidates(rng, START, 50000.0, 300.0, 0.5)) for _ in range(50)]
    assert max(sizes) == 10


@pytest.mark.parametrize(
    ("spot", "step"), [(3700.0, 50), (9000.0, 100), (30000.0, 500), (58466.0, 1000), (106902.5, 2000)]
)
def test_strike_step_follows_the_price(spot, step):
    assert sim.strike_step(spot) == step


@pytest.mark.parametrize(("weekday", "dte"), list(enumerate([4, 10, 9, 8, 7, 6, 5])))
def test_weekly_expiry_is_the_nearest_friday(weekday, dte):
    monday = date(2024, 9, 2)
    assert sim.days_to_weekly_expiry(monday + timedelta(days=weekday)) == dte


def test_placeholder_rows(rows):
    empty = [row for row in rows[HOLD] if is_placeholder(row)]
    assert empty
    for row in empty:
        assert by_decision(rows[HOLD])[row["decision_time"]] == [row]
        assert float(row["spot"]) > 0
        assert {row[name] for name in ("strike", "dte", "delta", "score")} == {"0.0"}
        assert row["iv"] == row["ivrv_ratio"] == row["strategy"] == ""
        assert (row["trade_executed"], row["chosen"], row["action"]) == ("0", "0", "SKIP")


def test_iv_varies_across_strikes(rows):
    groups = [group for group in by_decision(rows[HOLD]).values() if len(group) > 1]
    assert np.mean([len({row["iv"] for row in group}) > 1 for group in groups]) > 0.95


def test_smile_slopes_down_and_has_flat_wings():
    strikes = np.array([80000.0, 100000.0, 106000.0, 400000.0, 800000.0])
    low, atm, high, wing, far = sim.smile(0.5, 100000.0, strikes, 7 / 365)
    assert low > atm == 0.5 > high
    assert wing == far < 2 * atm


# No look-ahead


def test_ivrv_ratio_is_iv_over_the_last_thirty_days(rows):
    decisions = list(by_decision(rows[HOLD]).values())
    spots = np.array([float(group[0]["spot"]) for group in decisions])
    for day, group in enumerate(decisions):
        if is_placeholder(group[0]):
            continue
        if day < 30:
            assert all(row["ivrv_ratio"] == "" for row in group)
            continue
        log_returns = [math.log(spots[i] / spots[i - 1]) for i in range(day - 29, day + 1)]
        realised = np.std(log_returns, ddof=1) * math.sqrt(365)
        for row in group:
            assert float(row["ivrv_ratio"]) == pytest.approx(float(row["iv"]) / realised, abs=1e-6)


def test_realised_vol_ignores_the_future():
    spots = np.exp(np.random.RandomState(1).standard_normal(80).cumsum() / 30)
    changed = spots.copy()
    changed[51:] *= 3
    before = sim.trailing_realised_vol(spots, 50)
    assert before == sim.trailing_realised_vol(changed, 50) == sim.trailing_realised_vol(spots[:51], 50)
    assert before != sim.trailing_realised_vol(changed, 51)


def test_a_shorter_run_holds_the_same_decisions(rows, tmp_path):
    shorter = read(simulate(tmp_path, end=END - timedelta(days=100))[ROLL])
    assert shorter == rows[ROLL][: len(shorter)]


# The teacher


@pytest.mark.parametrize("style", sim.EXIT_STYLES)
def test_teacher_sells_the_best_score_from_three_up(rows, style):
    sold_any = {True: 0, False: 0}
    for group in by_decision(rows[style]).values():
        scores = [float(row["score"]) for row in group]
        sells = max(scores) >= 3
        sold_any[sells] += 1
        assert scores == sorted(scores, reverse=True)
        assert [row["chosen"] for row in group] == [str(int(sells)), *["0"] * (len(group) - 1)]
        assert [row["action"] == "SELL_CALL" for row in group] == [row["chosen"] == "1" for row in group]
        assert {row["action"] for row in group} <= {"SELL_CALL", "SKIP"}
        assert {row["trade_executed"] for row in group} == {str(int(sells))}
        for row in group:
            outcome = [row["reward"], row["pnl_vs_hodl"], row["max_drawdown_pct"]]
            assert (outcome == ["0.0"] * 3) == (row["chosen"] == "0")
            assert row["strategy"] == ""
    assert min(sold_any.values()) > 10


def test_score_weighs_every_term():
    base = sim.score(0.25, 7, 0.01, 1.0)
    assert sim.score(0.25, 7, 0.01, None) == base
    assert sim.score(0.30, 7, 0.01, 1.0) < base > sim.score(0.20, 7, 0.01, 1.0)
    assert sim.score(0.25, 10, 0.01, 1.0) < base < sim.score(0.25, 7, 0.02, 1.0)
    assert sim.score(0.25, 7, 0.01, 0.8) < base < sim.score(0.25, 7, 0.01, 1.2)


# Prices and outcomes


def test_black_scholes_textbook_value():
    # Hull's example: S = 42, K = 40, r = 10 %, vol 20 %, half a year: 4.76. With a rate of 0 the formula
    # prices on the forward, and discounting brings the rate back.
    discount = math.exp(-0.1 * 0.5)
    assert discount * sim.black_scholes_call(42 / discount, 40.0, 0.5, 0.2) == pytest.approx(4.76, abs=0.005)


def test_black_scholes_limits():
    assert sim.black_scholes_call(100.0, 90.0, 0.0, 0.5) == 10
    assert sim.black_scholes_call(100.0, 100.0, 0.0, 0.5) == 0
    assert sim.black_scholes_call(100.0, 110.0, 0.0, 0.5) == 0
    assert sim.black_scholes_call(100.0, 1e-9, 1.0, 0.5) == pytest.approx(100)
    # At the money: S (2 N(sd / 2) - 1), close to 0.4 S sd.
    assert sim.black_scholes_call(100.0, 100.0, 1.0, 0.2) == pytest.approx(7.9656, abs=1e-4)
    assert sim.black_scholes_delta(100.0, 100.0, 1.0, 0.2) == pytest.approx(0.539828, abs=1e-6)


def test_max_drawdown():
    assert sim.max_drawdown_pct(np.array([100.0, 120.0, 90.0, 150.0, 140.0])) == pytest.approx(25)
    assert sim.max_drawdown_pct(np.array([100.0, 101.0])) == 0


def test_hold_to_expiry_from_the_files_own_spots(rows):
    spots = {day_of(row): float(row["spot"]) for row in rows[HOLD]}
    checked = 0
    for row in traded(rows[HOLD]):
        days, strike, iv = int(float(row["dte"])), float(row["strike"]), float(row["iv"])
        if day_of(row) + timedelta(days=days) not in spots:
            continue
        life = [spots[day_of(row) + timedelta(days=n)] for n in range(days + 1)]
        premium = call_value(life[0], strike, days, iv)
        pnl = premium - max(0.0, life[-1] - strike)
        assert float(row["pnl_vs_hodl"]) == pytest.approx(pnl, abs=1e-4)
        assert float(row["reward"]) == pytest.approx(pnl + life[-1] - life[0], abs=1e-4)
        peak, drawdown = 0.0, 0.0
        for n, spot in enumerate(life):
            equity = spot + premium - call_value(spot, strike, days - n, iv)
            peak = max(peak, equity)
            drawdown = max(drawdown, 100 * (peak - equity) / peak)
        assert float(row["max_drawdown_pct"]) == pytest.approx(drawdown, abs=1e-6)
        checked += 1
    assert checked > 150


def never(day):
    raise AssertionError(f"rolled on day {day}")


def test_tp_and_roll_that_never_takes_profit_equals_holding():
    spots = np.array([100.0, 101.0, 103.0, 104.0, 106.0, 108.0, 109.0, 112.0])
    rolled = sim.tp_and_roll_outcome(spots, 105.0, 0.6, never)
    held = sim.hold_to_expiry_outcome(spots, 105.0, 0.6)
    assert rolled.pnl_vs_hodl == rolled.reward == pytest.approx(held.pnl_vs_hodl)
    assert rolled.pnl_vs_hodl == pytest.approx(call_value(100, 105, 7, 0.6) - 7)
    assert rolled.max_drawdown_pct == pytest.approx(held.max_drawdown_pct)


def test_tp_and_roll_takes_profit_and_rolls_once():
    # 100 -> 92 on day 2 takes the 105 call's profit. The 96 call sold then expires two days after the
    # horizon and is bought back on day 7 at what it is worth.
    spots = np.array([100.0, 100.0, 92.0, 93.0, 94.0, 95.0, 96.0, 97.0])
    days = []

    def roll_call(day):
        days.append(day)
        return 96.0, 7, 0.8

    first = call_value(100, 105, 7, 0.6) - call_value(92, 105, 5, 0.6)
    second = call_value(92, 96, 7, 0.8) - call_value(97, 96, 2, 0.8)
    assert first >= 0.7 * call_value(100, 105, 7, 0.6)
    outcome = sim.tp_and_roll_outcome(spots, 105.0, 0.6, roll_call)
    assert days == [2]
    assert outcome.pnl_vs_hodl == outcome.reward == pytest.approx(first + second)
    # The peak is day 1 and the trough day 2; on the way the short call softened the fall.
    peak = 100 + call_value(100, 105, 7, 0.6) - call_value(100, 105, 6, 0.6)
    assert outcome.max_drawdown_pct == pytest.approx(100 * (1 - (92 + first) / peak))


def test_tp_and_roll_rolls_again_and_settles_a_roll_that_expires_on_the_last_day():
    spots = np.array([100.0, 90.0, 80.0, 90.0])
    calls = {1: (95.0, 2, 0.6), 2: (85.0, 1, 0.6)}
    expected = (
        (call_value(100, 105, 3, 0.6) - call_value(90, 105, 2, 0.6))
        + (call_value(90, 95, 2, 0.6) - call_value(80, 95, 1, 0.6))
        + (call_value(80, 85, 1, 0.6) - 5)
    )
    assert sim.tp_and_roll_outcome(spots, 105.0, 0.6, calls.get).pnl_vs_hodl == pytest.approx(expected)


def test_tp_and_roll_ends_with_a_roll_that_expires_early():
    spots = np.array([100.0, 90.0, 92.0, 120.0])
    expected = call_value(100, 105, 3, 0.6) - call_value(90, 105, 2, 0.6) + call_value(90, 91, 1, 0.6) - 1
    outcome = sim.tp_and_roll_outcome(spots, 105.0, 0.6, {1: (91.0, 1, 0.6)}.get)
    assert outcome.pnl_vs_hodl == pytest.approx(expected)


def test_tp_and_roll_sells_nothing_on_the_last_day():
    spots = np.array([100.0, 90.0, 60.0])
    expected = call_value(100, 105, 2, 0.6) - call_value(90, 105, 1, 0.6)
    expected += call_value(90, 95, 7, 0.6) - call_value(60, 95, 6, 0.6)
    outcome = sim.tp_and_roll_outcome(spots, 105.0, 0.6, {1: (95.0, 7, 0.6)}.__getitem__)
    assert outcome.pnl_vs_hodl == pytest.approx(expected)


def test_tp_and_roll_stays_out_when_nothing_is_quoted():
    spots = np.array([100.0, 90.0, 120.0, 130.0])
    outcome = sim.tp_and_roll_outcome(spots, 105.0, 0.6, lambda day: None)
    assert outcome.pnl_vs_hodl == pytest.approx(call_value(100, 105, 3, 0.6) - call_value(90, 105, 2, 0.6))


def test_tp_and_roll_takes_profit_at_seventy_percent_exactly_where_it_is_crossed():
    premium = call_value(100, 105, 7, 0.6)
    captured = {spot: 1 - call_value(spot, 105, 6, 0.6) / premium for spot in np.arange(90, 100, 0.01)}
    above = max(spot for spot, share in captured.items() if share >= 0.7)
    days = []
    for spot in (above, above + 0.01):
        path = np.array([100.0, spot] + 6 * [spot + 15])
        sim.tp_and_roll_outcome(path, 105.0, 0.6, lambda day, at=spot: days.append(at))
    assert days == [above]


def test_tp_and_roll_replays_from_the_file(rows):
    decisions = {day_of(group[0]): group for group in by_decision(rows[ROLL]).values()}
    checked, rolls = 0, 0
    for row in traded(rows[ROLL]):
        today, days = day_of(row), int(float(row["dte"]))
        if today + timedelta(days=days) not in decisions:
            continue

        def roll_call(day, today=today):
            nonlocal rolls
            group = decisions[today + timedelta(days=day)]
            if is_placeholder(group[0]):
                return None
            rolls += 1
            nearest = min(group, key=lambda quote: abs(float(quote["delta"]) - 0.25))
            return float(nearest["strike"]), int(float(nearest["dte"])), float(nearest["iv"])

        spots = np.array([float(decisions[today + timedelta(days=n)][0]["spot"]) for n in range(days + 1)])
        outcome = sim.tp_and_roll_outcome(spots, float(row["strike"]), float(row["iv"]), roll_call)
        recorded = [float(row[name]) for name in ("reward", "pnl_vs_hodl", "max_drawdown_pct")]
        assert recorded == pytest.approx(list(outcome), abs=1e-5)
        assert row["reward"] == row["pnl_vs_hodl"]
        checked += 1
    assert checked > 150 and rolls > 50
