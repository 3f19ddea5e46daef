"""By which rule, and at which vol, outcomes are computed: chosen by the recorded trades, or by the options."""

import datetime
import logging

import numpy as np
import pytest
from conftest import REAL_DATA, decision, needs_real_data, read_candidates, row, time
from conftest import write_csv as write

from covered_call.candidates.builder import Backtest
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import net_outcomes
from covered_call.candidates.pricing import black_scholes_call
from covered_call.candidates.schema import CandidatesError
from covered_call.candidates.terms import fit_of

RNG = np.random.default_rng(1)
SPOTS = (60_000 * np.exp(np.cumsum(RNG.normal(0, 0.03, 80)))).round(2).tolist()
EARLY = 16 / 24  # days before its expiry at which that teacher takes a call for settled


def value(spot: float, strike: float, days: float, iv: float = 0.7) -> float:
    return float(black_scholes_call(spot, strike, days / 365, iv))


def teachers_file(path, iv=0.7, paid=0.7, days=80, **cells) -> str:
    """One call is sold each day, is paid for at a vol, and settles 16 hours early: iv is what the file says of it."""
    rows = []
    for day, spot in enumerate(SPOTS[:days]):
        pnl = ""
        if day + 7 < len(SPOTS):
            pnl = str(value(spot, spot * 1.06, 7, paid) - value(SPOTS[day + 7], spot * 1.06, EARLY, paid))
        logged = iv[day] if isinstance(iv, list) else iv
        rows += decision(day, 0, strikes=[spot * 1.06, spot * 1.09], spot=spot, dte=7.0, iv=logged, pnl_vs_hodl=0.0,
            **{"exit_style": "hold_to_expiry"} | cells)  # fmt: skip
        rows[-2]["pnl_vs_hodl"] = pnl
    return write(path, rows)


def options(**given) -> CoveredCallCandidatesConfig:
    config = CoveredCallCandidatesConfig(**given)
    config.check()
    return config


def decisions(paths, **given):
    return Backtest([paths] if isinstance(paths, str) else paths, options(**given)).decisions


def outcomes(paths, **given) -> np.ndarray:
    """Of all candidates, NaN where unknown."""
    return decisions(paths, **given).columns().numbers["counterfactual_pnl_vs_hodl"]


# --- Which rule


def test_the_rule_is_the_one_that_gives_back_the_recorded_trades(tmp_path, caplog):
    path = teachers_file(tmp_path / "a.csv")
    with caplog.at_level(logging.INFO):
        found = decisions(path)
    assert found.replay.terms["hold_to_expiry"].preset == "teacher"
    [said] = [message for message in caplog.messages if "settlement=" in message]
    assert said.startswith("hold_to_expiry: outcomes by settlement='teacher', which are 0.00 USD (median) from those")
    assert "by settlement='simulated'" in said and "by settlement='intrinsic'" in said
    fit = found.fits["BTC", "hold_to_expiry"]
    assert fit.trades == 73 and fit.median_error < 1e-6 and abs(fit.mean_error) < 1e-6 and fit.follows


def test_it_is_chosen_by_the_training_split_alone(tmp_path):
    """Later trades were settled otherwise: that is seen in the check, and changes no choice."""
    path = teachers_file(tmp_path / "a.csv")
    with open(path) as file:
        lines = file.read().splitlines()
    at = lines[0].split(",").index("pnl_vs_hodl")
    for number in range(1, len(lines), 2):
        cells = lines[number].split(",")
        day = number // 2
        if 24 <= day < 73:
            cells[at] = str(value(SPOTS[day], SPOTS[day] * 1.06, 7) - max(0, SPOTS[day + 7] - SPOTS[day] * 1.06))
        lines[number] = ",".join(cells)
    with open(path, "w") as file:
        file.write("\n".join(lines))
    found = decisions(path, splits=(0.3, 0.1, 0.6))
    assert found.replay.terms["hold_to_expiry"].preset == "teacher"
    assert found.fits["BTC", "hold_to_expiry"].mean_error < -20
    assert decisions(path, splits="train").replay.terms["hold_to_expiry"].preset == "simulated"  # as most were settled


def test_few_trades_choose_nothing(tmp_path):
    assert decisions(teachers_file(tmp_path / "a.csv", days=9)).replay.terms["hold_to_expiry"].preset == "simulated"


def test_a_rule_that_is_given_is_taken(tmp_path):
    path = teachers_file(tmp_path / "a.csv")
    early, late = outcomes(path), outcomes(path, settlement="intrinsic")
    spot, strike = SPOTS[0], SPOTS[0] * 1.06
    assert early[0] == pytest.approx(value(spot, strike, 7) - value(SPOTS[7], strike, EARLY))
    assert late[0] == pytest.approx(value(spot, strike, 7) - max(0, SPOTS[7] - strike))
    other = outcomes(path, settle_hours=8)
    assert other[0] == pytest.approx(value(spot, strike, 7) - value(SPOTS[7], strike, 8 / 24))


def test_a_horizon_meets_the_expiry(tmp_path):
    """Each day earlier there is a day's time value more in the call that is bought back."""
    path = teachers_file(tmp_path / "a.csv")
    for days in (1, 6):
        assert outcomes(path, horizon=days)[0] == pytest.approx(
            value(SPOTS[0], SPOTS[0] * 1.06, 7) - value(SPOTS[days], SPOTS[0] * 1.06, 7 - days + EARLY)
        )
    np.testing.assert_array_equal(outcomes(path, horizon=7), outcomes(path))


@needs_real_data
@pytest.mark.parametrize("style, trades", [("hold_to_expiry", 116), ("tp_and_roll", 122)])
def test_each_real_trade_is_computed_to_the_cent(style, trades):
    """Chains that the end of the file cuts off are marked there, as they were recorded."""
    [path] = REAL_DATA.glob(f"*_{style}_*.csv")
    found = decisions(str(path), keep_cut=True)
    columns = found.columns()
    rows = columns.offsets[:-1] + columns.chosen
    its = np.flatnonzero(columns.chosen >= 0)
    computed, recorded = (columns.numbers[name][rows[its]] for name in ("counterfactual_pnl_vs_hodl", "pnl_vs_hodl"))
    known = ~np.isnan(computed)
    assert known.sum() == found.fits["BTC", style].trades == trades
    assert np.abs(computed - recorded)[known].max() < 0.01
    assert found.replay.terms[style].preset == "teacher"


@needs_real_data
def test_real_chains_live_longer_than_their_first_call():
    [path] = REAL_DATA.glob("*_tp_and_roll_*.csv")
    found = decisions(str(path))
    assert (found.label_end - found.time).max() >= 20 * 86_400_000_000


# --- Chains that are cut off


def chain_file(path, days: int) -> str:
    """Each day a call that is worth ever less is sold, until there is nothing more to earn."""
    rows = []
    for day in range(days):
        spot = 60_000 * 0.995**day
        rows += decision(
            day, 0, strikes=[spot * 1.06], spot=spot, dte=7.0, iv=0.7, exit_style="tp_and_roll", score=2.0
        )
    return write(path, rows)


def test_a_chain_that_the_file_cuts_off_is_unknown_unless_its_mark_is_asked_for(tmp_path):
    path = chain_file(tmp_path / "a.csv", 10)
    found, kept = (outcomes(path, settlement="teacher", keep_cut=keep) for keep in (False, True))
    assert np.isnan(found[5:]).all() and not np.isnan(kept[:-1]).any()
    spot, last = 60_000 * 0.995**5, 60_000 * 0.995**9
    assert kept[5] == pytest.approx(value(spot, spot * 1.06, 7) - value(last, spot * 1.06, 3 + EARLY))
    entry = read_candidates([path], options(settlement="teacher"))[5]
    assert entry.label_end - entry.decision.decision_time == datetime.timedelta(
        days=7
    )  # its expiry, later than the file


def test_no_price_after_the_label_end_changes_an_outcome(tmp_path):
    for settlement in ("teacher", "intrinsic", "simulated"):
        before = read_candidates([chain_file(tmp_path / "a.csv", 10)], options(settlement=settlement))
        rows = [row(**cells) for cells in decision(10, 0, strikes=[1e5], spot=9e4, dte=7.0, iv=0.7, score=4.0)]
        path = chain_file(tmp_path / "b.csv", 10)
        with open(path) as file:
            header = file.readline().strip().split(",")
        late = write(tmp_path / "late.csv", [one | {"exit_style": "tp_and_roll"} for one in rows], header)
        after = read_candidates([path, late], options(settlement=settlement))
        for entry, again in zip(before, after, strict=False):
            if entry.counterfactuals[0].pnl_vs_hodl is not None:
                assert again.counterfactuals[0] == entry.counterfactuals[0]


# --- Costs


def test_costs_are_taken_off_recorded_outcomes_too(tmp_path):
    path = teachers_file(tmp_path / "a.csv")
    [free], [dear] = (read_candidates([path], options(half_spread=half))[:1] for half in (0.0, 0.035))
    cost = 0.035 * value(SPOTS[0], SPOTS[0] * 1.06, 7)
    assert dear.counterfactuals[0].costs == pytest.approx(cost)
    assert dear.counterfactuals[0].pnl_vs_hodl == pytest.approx(free.counterfactuals[0].pnl_vs_hodl - cost)
    unknown = dear.counterfactuals[0]._replace(pnl_vs_hodl=None)  # then what was recorded is taken, less its costs
    entry = dear._replace(counterfactuals=(unknown, *dear.counterfactuals[1:]))
    net = net_outcomes(entry, options(half_spread=0.035))[0]
    assert net.source == "recorded" and net.value == pytest.approx(dear.outcomes[0].pnl_vs_hodl - cost)
    for other in ({"iv_shift": 0.1}, {"pricing_iv": 0.5}, {"horizon": 3}):  # under which it would mean something else
        assert net_outcomes(entry, options(half_spread=0.035, **other))[0].value is None


def test_a_call_that_is_settled_in_the_money_pays_for_its_delivery(tmp_path):
    path = teachers_file(tmp_path / "a.csv")
    free, dear, capped = (outcomes(path, settlement="intrinsic", delivery_fee=fee) for fee in (0.0, 0.00015, 1.0))
    strikes = np.array([[spot * 1.06, spot * 1.09] for spot in SPOTS[:73]])
    ends = np.array(SPOTS[7:80])[:, None]
    expected = np.minimum(0.00015 * ends, 0.125 * np.maximum(ends - strikes, 0)).ravel()
    assert 0 < (expected > 0).sum() < len(expected)
    np.testing.assert_allclose((free - dear)[:146], expected, atol=1e-9)
    np.testing.assert_allclose((free - capped)[:146], 0.125 * np.maximum(ends - strikes, 0).ravel(), atol=1e-9)


def test_more_costs_never_bring_more(tmp_path):
    path = teachers_file(tmp_path / "a.csv")
    nets = [outcomes(path, fee=0.0003 * times, half_spread=0.035 * times)[:146] for times in (0, 1, 2)]
    assert (nets[0] > nets[1]).all() and (nets[1] > nets[2]).all()


# --- Vols


def test_a_file_that_was_paid_at_another_vol_is_not_trusted_until_it_is_fitted(tmp_path):
    """It logs a vol near the realised one, and was paid at 0.70: what is computed follows, but far too low."""
    iv = np.random.default_rng(2).normal(0.45, 0.02, len(SPOTS)).round(4).tolist()
    path = teachers_file(tmp_path / "a.csv", iv=iv)
    fit = decisions(path).fits["BTC", "hold_to_expiry"]
    assert fit.correlation > 0.95 and fit.mean_error < -300 and not fit.follows
    assert fit.interval[0] < fit.mean_error < fit.interval[1] < 0
    assert "WARNING: the average error is above 5% of the typical outcome, so computed" in fit.sentence("BTC", "x")
    fitted = decisions(path, pricing_iv="fit")
    assert fitted.replay.terms["hold_to_expiry"].text() == "settlement='teacher' at a vol of 0.7"
    assert fitted.fits["BTC", "hold_to_expiry"].follows and fitted.fits["BTC", "hold_to_expiry"].median_error < 0.01


def test_a_multiple_of_the_files_vol_is_fitted_too(tmp_path):
    iv = np.linspace(0.4, 0.8, len(SPOTS)).round(3).tolist()
    rows = []
    for day, spot in enumerate(SPOTS):
        rows += decision(day, 0, strikes=[spot * 1.06], spot=spot, dte=7.0, iv=iv[day], exit_style="hold_to_expiry")
        later = SPOTS[min(day + 7, len(SPOTS) - 1)]
        pnl = value(spot, spot * 1.06, 7, iv[day] * 1.25) - value(later, spot * 1.06, EARLY, iv[day] * 1.25)
        rows[-1]["pnl_vs_hodl"] = str(pnl)
    found = decisions(write(tmp_path / "a.csv", rows), pricing_iv="fit")
    assert found.replay.terms["hold_to_expiry"].text() == "settlement='teacher' at the files' iv times 1.25"


def test_a_vol_that_is_given_prices_what_is_computed_and_not_the_prompt(tmp_path):
    path = teachers_file(tmp_path / "a.csv")
    strike = SPOTS[0] * 1.06
    for given, vol in (({"pricing_iv": 0.5}, 0.5), ({"pricing_iv": "0.5"}, 0.5), ({"iv_shift": -0.1}, 0.6)):
        found = decisions(path, **given)
        assert found.replay.terms["hold_to_expiry"].preset == "teacher"  # by the vol that its trades were paid at
        columns = found.columns()
        expected = value(SPOTS[0], strike, 7, vol) - value(SPOTS[7], strike, EARLY, vol)
        assert columns.numbers["counterfactual_pnl_vs_hodl"][0] == pytest.approx(expected)
        assert columns.numbers["iv"][0] == 0.7


def vol_file(path, vols: dict[float, float | str], header="date,vol") -> str:
    lines = [f"{time(day)[:10]},{vol}" for day, vol in vols.items()]
    path.write_text("\n".join([header, *lines]))
    return str(path)


def test_the_markets_vol_is_the_one_that_was_known_at_the_sale(tmp_path, caplog):
    """A day's close is known when the day is over; what is too old is unknown."""
    path = teachers_file(tmp_path / "a.csv", days=20)
    for scale in (1, 100):
        vols = {day: (0.4 + day / 100) * scale for day in range(6)}
        found = outcomes(path, settlement="teacher", iv_file=vol_file(tmp_path / f"vol{scale}.csv", vols))[::2]
        assert np.isnan(found[0])  # day 0's is known on day 1
        for day in (1, 2, 5, 8):
            vol = 0.4 + min(day - 1, 5) / 100
            strike = SPOTS[day] * 1.06
            assert found[day] == pytest.approx(
                value(SPOTS[day], strike, 7, vol) - value(SPOTS[day + 7], strike, EARLY, vol)
            )
        assert np.isnan(found[10:13]).all()
    assert "points, taken as hundredths" in caplog.text and "fractions a year" in caplog.text
    at_once = outcomes(path, settlement="teacher", iv_file=str(tmp_path / "vol1.csv"), iv_lag=0.0)[0]
    assert at_once == pytest.approx(
        value(SPOTS[0], SPOTS[0] * 1.06, 7, 0.4) - value(SPOTS[7], SPOTS[0] * 1.06, EARLY, 0.4)
    )


def test_each_underlying_has_its_own_file_of_vols(tmp_path):
    paths = [teachers_file(tmp_path / f"{name}.csv", underlying=name, days=20) for name in ("BTC", "ETH")]
    for name, vol in (("BTC", 0.5), ("ETH", 0.9)):
        vol_file(tmp_path / f"vol_{name}.csv", {day: vol for day in range(30)})
    found = decisions(paths, settlement="teacher", iv_file=str(tmp_path / "vol_{underlying}.csv"))
    columns = found.columns()
    mean = {
        columns.names[code]: np.nanmean(
            columns.numbers["counterfactual_pnl_vs_hodl"][columns.underlying[columns.decision_of] == code]
        )
        for code in np.unique(columns.underlying)
    }
    assert mean["ETH"] > mean["BTC"] + 500
    with pytest.raises(CandidatesError, match=r"the files hold BTC, ETH, each with a vol of its own.*\{underlying\}"):
        decisions(paths, iv_file=str(tmp_path / "vol_BTC.csv"))


@pytest.mark.parametrize("text, message", [
    (None, "vol.csv' is no file. Give the path of a CSV"),
    ("date,vol\n2024-09-01,\0\n", "vol.csv"),
    ("", "give a CSV with a header, times in the first column and vols in the second"),
    ("date,vol\n", "give a CSV with a header"),
    ("date,vol\n2024-09-01,0.5\nyesterday,0.5\n", "vol.csv, line 3, first column: 'yesterday' is no time such as"),
    ("date,vol\n2024-09-01,high\n", "vol.csv, line 2, second column: 'high' is no vol above 0"),
    ("date,vol\n2024-09-01,-0.5\n", "line 2, second column: '-0.5' is no vol above 0"),
    ("date,vol\n2024-09-01,inf\n", "line 2, second column: 'inf' is no vol above 0"),
    ("date,vol\n2024-09-01,0.5\n2024-09-02,55\n", "vol.csv, line 3: some vols are above 5 and some are not"),
    ("date,vol\n2024-09-01,0.5\n2024-09-02,0.5\n2024-09-01,0.6\n", "line 4: this time stands there twice"),
])  # fmt: skip
def test_a_file_of_vols_that_cannot_be_used_is_one_clear_error(tmp_path, text, message):
    path = tmp_path / "vol.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CandidatesError, match=message):
        decisions(teachers_file(tmp_path / "a.csv", days=9), iv_file=str(path))


def test_an_edited_file_of_vols_gives_new_rows(load, tmp_path):
    path = teachers_file(tmp_path / "a.csv", days=20)
    q_sell = []
    for vol in (0.5, 0.6, 0.5):
        vols = vol_file(tmp_path / "vol.csv", {day: vol for day in range(30)})
        q_sell.append(load("q_values", data_files=path, splits="train", iv_file=vols)["train"][4]["q_sell"])
    assert q_sell[0] < q_sell[1] and q_sell[0] == q_sell[2]


@pytest.mark.parametrize("given, message", [
    ({"settlement": "early"}, "settlement='early': choose one of auto, teacher, intrinsic, simulated"),
    ({"pricing_iv": "high"}, "pricing_iv='high': give a vol above 0 and up to 5 .*, or fit"),
    ({"pricing_iv": 70}, "pricing_iv=70: give a vol above 0 and up to 5"),
    ({"pricing_iv": 0.0}, "pricing_iv=0.0: give a vol"),
    ({"pricing_iv": True}, "pricing_iv=True: give a vol"),
    ({"pricing_iv": 0.5, "iv_file": "a.csv"}, "Give either pricing_iv or iv_file"),
    ({"iv_file": 5}, "iv_file=5: give the path of a file"),
    ({"iv_shift": -9}, "iv_shift=-9: give a number from -5 to 5"),
    ({"defend": -1}, "defend=-1: give a number from 0 to inf"),
])  # fmt: skip
def test_options_that_cannot_be_used_are_refused(given, message):
    with pytest.raises(CandidatesError, match=message):
        options(**given)


# --- The check


def test_a_fit_says_how_far_and_how_surely_it_is_off():
    recorded = np.linspace(-1000, 1000, 101)
    fit = fit_of(recorded + 30, recorded)
    assert (fit.trades, fit.correlation, fit.median_error, fit.mean_error) == pytest.approx((101, 1.0, 30.0, 30.0))
    assert fit.interval == pytest.approx((30.0, 30.0)) and fit.bias == pytest.approx(30 / fit.median_outcome)
    assert not fit.follows and fit_of(recorded + 20, recorded).follows
    assert not fit_of(-recorded, recorded).follows
    alike = fit_of(np.full(20, -99.0), np.full(20, -100.0))
    assert (
        np.isnan(alike.correlation) and alike.follows and not fit_of(np.full(20, -90.0), np.full(20, -100.0)).follows
    )
    gaps = np.where(np.arange(101) % 2, recorded, np.nan)
    assert fit_of(gaps, recorded).trades == 50
    nothing = fit_of(np.full(3, np.nan), np.ones(3))
    assert nothing.trades == 0 and not nothing.follows and "unchecked" in nothing.sentence("BTC", "tp_and_roll")
    few = fit_of(recorded[:9] + 300, recorded[:9])
    assert few.trusted and not few.follows and "too few to tell" in few.sentence("BTC", "x")
    assert not fit.trusted and "so computed outcomes count as unknown" in fit.sentence("BTC", "x")
