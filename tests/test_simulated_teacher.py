"""The teacher's rule of the simulator: it gives back the real files, and the package computes what it records."""

import csv
from datetime import date, timedelta

import numpy as np
import pytest
from conftest import REAL_DATA, SCRIPT, import_script, needs_real_data
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from covered_call.candidates.builder import Backtest
from covered_call.candidates.decisions import recorded_trades
from covered_call.candidates.options import CoveredCallCandidatesConfig

sim = import_script(SCRIPT.parent / "data" / "simulate_backtest.py")
HOLD, ROLL = "hold_to_expiry", "tp_and_roll"
START = date(2024, 1, 1)


def read(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path, rows: list[dict]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def walk(seed: int, days: int, vol=0.6, spot=60_000.0) -> dict[date, float]:
    """Daily spots from START, of this vol a year."""
    returns = np.random.default_rng(seed).normal(0, vol / np.sqrt(365), days)
    prices = np.round(spot * np.exp(np.cumsum(returns)), 2)
    return {START + timedelta(days=day): float(price) for day, price in enumerate(prices)}


def simulate(folder, spots, ivs=0.7, underlying="BTC", days=None) -> dict[str, str]:
    """{exit style: path} of the first days."""
    end = START + timedelta(days=(days or len(spots)) - 1)
    sim.simulate_teacher(folder, underlying, spots, ivs, START, end)
    return {style: str(next(folder.glob(f"training_candidates_*_{style}_teacher.csv"))) for style in (HOLD, ROLL)}


def computed_of(path: str, **options):
    """By the package: its decisions, their recorded trades, and what it computes for them."""
    decisions = Backtest([path], CoveredCallCandidatesConfig(**options)).decisions
    trades = recorded_trades(decisions)
    ((_, style),) = decisions.fits
    return decisions, trades, decisions.replay.of_sales(trades.sales, style).gross


# --- Against the real files


@pytest.fixture(scope="module")
def real() -> dict[str, list[dict]]:
    return {style: read(next(REAL_DATA.glob(f"training_candidates_BTC_*_{style}_*.csv"))) for style in (HOLD, ROLL)}


@pytest.fixture(scope="module")
def remade(real, tmp_path_factory) -> dict[str, list[dict]]:
    """From nothing but the spots of the real files, through the command line."""
    folder = tmp_path_factory.mktemp("remade")
    spots = {row["decision_time"]: row["spot"] for row in real[HOLD]}
    series = write(folder / "spots.csv", [{"time": time, "spot": spot} for time, spot in spots.items()])
    sim.main(["--rule", "teacher", "--spots", series, "--output_dir", str(folder)])
    return {style: read(next(folder.glob(f"*_{style}_teacher.csv"))) for style in (HOLD, ROLL)}


def by_call(rows: list[dict]) -> dict[tuple, dict]:
    return {(row["decision_time"], row["instrument"]): row for row in rows}


@needs_real_data
@pytest.mark.parametrize("style", [HOLD, ROLL])
def test_the_real_candidates_and_answers_come_of_the_spots_alone(real, remade, style):
    expected, found = by_call(real[style]), by_call(remade[style])
    assert found.keys() == expected.keys() and len(found) == 644
    for key, row in found.items():
        for name in ("underlying", "spot", "strike", "dte", "iv", "exit_style", "trade_executed", "chosen", "action"):
            assert row[name] == expected[key][name]
        assert float(row["delta"]) == pytest.approx(float(expected[key]["delta"]), abs=1e-12)


@needs_real_data
@pytest.mark.parametrize("style", [HOLD, ROLL])
def test_the_real_scores_are_given_back_from_the_fiftieth_day_on(real, remade, style):
    expected, found = by_call(real[style]), remade[style]
    fiftieth = sorted({row["decision_time"] for row in found})[49]
    late = [row for row in found if row["decision_time"] >= fiftieth]
    assert len(late) == 443
    for row in late:
        same = expected[row["decision_time"], row["instrument"]]
        for name in ("score", "ivrv_ratio"):
            assert float(row[name]) == pytest.approx(float(same[name]), abs=1e-9)
    in_order = [row["instrument"] for row in real[style] if row["decision_time"] >= fiftieth]
    assert [row["instrument"] for row in late] == in_order


@needs_real_data
@pytest.mark.parametrize("style, trades", [(HOLD, 116), (ROLL, 122)])
def test_the_real_outcomes_are_given_back(real, remade, style, trades):
    """Of the last seven calls that are held, the spots at expiry are not in the file."""
    expected = by_call(real[style])
    sold = [row for row in remade[style] if row["chosen"] == "1" and row["pnl_vs_hodl"]]
    assert len(sold) == trades
    for row in sold:
        same = expected[row["decision_time"], row["instrument"]]
        for name in ("pnl_vs_hodl", "reward", "max_drawdown_pct"):
            assert float(row[name]) == pytest.approx(float(same[name]), abs=0.01 if "pct" not in name else 1e-9)


# --- Against the package


@settings(max_examples=20, phases=[Phase.generate])  # to make a failing one smaller takes minutes, and tells no more
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 1.2), st.floats(0.4, 1.2), st.sampled_from(["BTC", "ETH"]))
def test_the_package_computes_every_recorded_trade(tmp_path_factory, seed, vol, iv, underlying):
    spots = walk(seed, 130, vol, {"BTC": 60_000.0, "ETH": 2_500.0}[underlying])
    for style, path in simulate(tmp_path_factory.mktemp("made"), spots, iv, underlying, days=120).items():
        decisions, trades, computed = computed_of(path)
        assume(len(trades.recorded) >= 20)
        assert decisions.replay.terms[style].preset == "teacher" and decisions.fits[underlying, style].follows
        unknown = np.isnan(computed)  # of the last seven days alone, and where nothing is marked at the file's end
        last = int(decisions.time[-1]) - 7 * 86_400_000_000
        assert unknown.tolist() == (trades.sales.time > last).tolist() if style == HOLD else not unknown.any()
        assert np.abs(computed - trades.recorded)[~unknown].max() < 0.01


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("style", [HOLD, ROLL])
def test_trades_paid_at_another_vol_than_is_logged_are_not_trusted_and_the_vol_is_found(tmp_path, seed, style):
    """The column says what was realised; the trades were paid at 0.70."""
    rows = read(simulate(tmp_path, walk(seed, 230), days=220)[style])
    for row in rows:
        row["iv"] = 0.7 / float(row["ivrv_ratio"]) if row["ivrv_ratio"] else 0.6
    path = write(tmp_path / "rewritten.csv", rows)
    decisions, *_ = computed_of(path)
    fit = decisions.fits["BTC", style]
    assert not fit.follows and "computed outcomes count as unknown" in fit.sentence("BTC", style)
    decisions, trades, computed = computed_of(path, pricing_iv="fit")
    assert decisions.replay.terms[style].vols.constant == 0.7 and decisions.fits["BTC", style].follows
    assert np.nanmax(np.abs(computed - trades.recorded)) < 0.01
    assert np.isnan(computed).sum() <= 7


def test_the_files_load_by_the_default_pattern(tmp_path, load):
    simulate(tmp_path, walk(0, 60), days=50)
    splits = load("per_decision_ranking", data_dir=str(tmp_path), splits="train")
    assert len(splits["train"]) == 100


# --- The rule itself


def test_the_first_days_have_no_history(tmp_path):
    rows = read(simulate(tmp_path, walk(0, 60))[HOLD])
    first = {(START + timedelta(days=day)).isoformat() for day in range(30)}
    for row in rows:
        assert (row["ivrv_ratio"] == "") == (row["decision_time"][:10] in first)
        if row["decision_time"][:10] in first:
            assert float(row["score"]) == pytest.approx(1.5 + 2 * (1 - abs(float(row["delta"]) - 0.25) / 0.10))


def test_days_before_the_first_decision_are_history_and_those_after_the_last_settle(tmp_path):
    spots = walk(0, 90)
    start, end = START + timedelta(days=60), START + timedelta(days=80)
    sim.simulate_teacher(tmp_path, "BTC", spots, 0.7, start, end)
    rows = read(next(tmp_path.glob(f"*{HOLD}*")))
    assert all(row["ivrv_ratio"] for row in rows) and len({row["decision_time"] for row in rows}) == 21
    assert all(row["pnl_vs_hodl"] not in ("", "0.0") for row in rows if row["chosen"] == "1")


def test_an_unknown_outcome_is_blank_and_a_day_without_a_vol_has_no_candidates(tmp_path):
    spots = walk(0, 40)
    ivs = {day: 0.7 for day in spots if day != START + timedelta(days=3)}
    files = simulate(tmp_path, spots, ivs)
    sold = [row for row in read(files[HOLD]) if row["chosen"] == "1"]
    assert [row["pnl_vs_hodl"] == "" for row in sold] == [False] * (len(sold) - 7) + [True] * 7
    days = {row["decision_time"][:10]: row for row in read(files[ROLL])}
    assert days["2024-01-04"]["instrument"] == "NO_CANDIDATES"
    assert days[max(days)]["trade_executed"] == "0"  # of which no mark is left


@pytest.mark.parametrize("underlying, spot, step", [
    ("BTC", 60_000, 1000), ("BTC", 20_000, 500), ("BTC", 9_000, 250), ("ETH", 3_500, 50), ("ETH", 2_000, 25),
    ("ETH", 200, 10),
])  # fmt: skip
def test_strikes_lie_around_the_spot(underlying, spot, step):
    strikes = sim.teacher_logs.__globals__["strike_grid"](underlying, spot + 0.3 * step)
    assert strikes.tolist() == [spot + step * i for i in range(-5, 21)]


# --- The series


@pytest.mark.parametrize("lines, said", [
    (["2024-01-01,1", "soon,2"], "spots.csv, line 3, column 1: 'soon' is no date"),
    (["2024-01-01,1", "2024-01-02,dear"], "spots.csv, line 3, column 2: 'dear' is no number above 0"),
    (["2024-01-01,-1"], "spots.csv, line 2, column 2: '-1' is no number above 0"),
    (["2024-01-01,nan"], "spots.csv, line 2, column 2: 'nan' is no number above 0"),
    (["2024-01-01,1", "2024-01-01T08:00:00+00:00,2"], "spots.csv, line 3, column 1: 2024-01-01 stands there twice"),
    (["2024-01-01,", "2024-01-02"], "spots.csv holds no number"),
    (["1999-01-01,5"], "no spot from 2019-01-01 to 2025-12-06"),
])  # fmt: skip
def test_a_bad_series_is_one_error_with_its_place(tmp_path, capsys, lines, said):
    path = tmp_path / "spots.csv"
    path.write_text("\n".join(["date,price", *lines]))
    with pytest.raises(SystemExit) as stop:
        sim.main(["--rule", "teacher", "--spots", str(path), "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and said in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, said", [
    (["--iv", "70"], "70 is no vol: give a fraction a year"),
    (["--iv", "nowhere.csv"], "nowhere.csv cannot be read"),
    (["--spots", "nowhere.csv"], "nowhere.csv cannot be read"),
])  # fmt: skip
def test_what_cannot_be_used_is_named(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit):
        sim.main(["--rule", "teacher", "--output_dir", str(tmp_path / "out"), *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments, said", [
    (["--iv", "0.5"], "--iv goes with --rule teacher"),
    (["--underlying", "ETH"], "--underlying goes with --rule teacher"),
    (["--spots", "a.csv"], "--spots goes with --rule teacher"),
    (["--rule", "teacher"], "give an --output_dir"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_refused(capsys, arguments, said):
    with pytest.raises(SystemExit):
        sim.main(arguments)
    assert said in capsys.readouterr().err


def test_missing_days_are_said_and_left_out(tmp_path, capsys):
    lines = [f"{day},{price}" for day, price in walk(0, 40).items()]
    lines[20] = lines[20].split(",")[0] + ","
    del lines[10]
    path = tmp_path / "spots.csv"
    path.write_text("\n".join(["date,price", *lines]))
    sim.main(["--rule", "teacher", "--spots", str(path), "--output_dir", str(tmp_path)])
    assert "2 day(s) have no spot: 2024-01-11, 2024-01-21\n" in capsys.readouterr().out
    days = {row["decision_time"][:10] for row in read(next(tmp_path.glob(f"*{HOLD}*")))}
    assert len(days) == 38 and not days & {"2024-01-11", "2024-01-21"}


@pytest.mark.parametrize("points", [1, 100])
def test_vols_by_date_are_fractions_or_points(tmp_path, points):
    spots = walk(0, 40)
    vols = write(
        tmp_path / "vols.csv", [{"date": day, "vol": (0.5 + i / 100) * points} for i, day in enumerate(spots)]
    )
    series = write(tmp_path / "spots.csv", [{"date": day, "usd": usd} for day, usd in spots.items()])
    sim.main(["--rule", "teacher", "--spots", series, "--iv", vols, "--output_dir", str(tmp_path)])
    rows = read(next(tmp_path.glob(f"*{HOLD}*")))
    for row in rows:
        day = (date.fromisoformat(row["decision_time"][:10]) - START).days
        assert float(row["iv"]) == pytest.approx(0.5 + day / 100)


def test_the_oracle_stands_alone():
    for path in (SCRIPT.parent / "data").glob("*.py"):
        assert "import covered_call" not in (text := path.read_text()) and "from covered_call" not in text
