"""The verb backtest: what each sale brings at quoted prices, to the cent, and what of it is unknown."""

import csv
import datetime
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_DATA, needs_real_data, on_the_default_stack
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates.schema import COLUMNS, named_call
from covered_call.market.backtest import main
from tests.market.chains import START, Snap, harvest_row, snap, write, write_harvest, write_history

pytestmark = on_the_default_stack

CALL, OTHER = "BTC-8JAN26-105000-C", "BTC-14JAN26-111000-C"  # of 7 and 13 days at START
GOOD = {CALL: (0.0100, 0.0110, 0.0105)}  # at 100,000 USD: a bid of 1,000, whose fee is 30
HOLD, ROLL = "hold_to_expiry", "tp_and_roll"


@pytest.fixture
def backtest(tmp_path, capsys):
    """What the verb writes of some snapshots, by exit style, and the last words that it says."""

    def run(snaps: list[Snap], *words: str, chains: str | None = None) -> dict[str, list[dict]]:
        chains = chains or write_history(tmp_path / "chain.parquet", snaps)
        to = tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        main(["--chains", chains, "--to", str(to), *words])
        run.said = capsys.readouterr().out
        run.paths = sorted(to.iterdir())
        return {rows[0]["exit_style"]: rows for rows in map(rows_of, run.paths)}

    return run


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def day_by_day(spots: list[float], quotes: list[dict]) -> list[Snap]:
    return [snap(day, spot, its) for day, (spot, its) in enumerate(zip(spots, quotes, strict=True))]


def quiet(last: float, days: int = 7, quotes=GOOD, spot: float = 100_000.0) -> list[Snap]:
    """A snapshot a day at the same spot, and one at expiry."""
    return day_by_day([spot] * days + [last], [quotes] * days + [FAR])


FAR = {"BTC-27MAR26-150000-C": (0.001, 0.002, 0.0015)}  # never a candidate


def first(rows: list[dict], name: str = CALL) -> dict:
    return next(row for row in rows if row["instrument"] == name)


def money(row: dict) -> float:
    assert row["reward"] == row["pnl_vs_hodl"]
    return float(row["pnl_vs_hodl"])


# --- Settlement and fees


@pytest.mark.parametrize(
    "bid, last, pnl",
    [
        (0.0100, 104_000.0, 970.00),  # 1,000 less the fee of 0.0003 of spot
        (0.0100, 106_000.0, 1000 - 30 - 1000 - 15.90),  # paid out 1,000, and 0.00015 of 106,000
        (0.0010, 105_040.0, 100 - 12.50 - 40 - 5.00),  # each fee at most 12.5 % of the option's price
        (0.0100, 105_000.0, 970.00),  # at the strike it is worth nothing
    ],
)
def test_a_call_is_sold_at_the_bid_and_settled_at_expiry(bid, last, pnl, backtest):
    row = first(backtest(quiet(last, quotes={CALL: (bid, bid + 0.001, bid + 0.0005)}))[HOLD])
    assert money(row) == pytest.approx(pnl, abs=0.005)
    assert float(row["outcome_days"]) == 7
    assert [float(row[name]) for name in ("bid", "ask", "open_interest")] == pytest.approx(
        [100_000 * bid, 100_000 * bid + 100, 12.5]
    )


@pytest.mark.parametrize("sell_at, price", [("bid", 1000), ("mid", 1050), ("mark", 1040)])
def test_the_sale_is_at_the_price_that_is_asked_for(sell_at, price, backtest):
    quotes = {CALL: (0.0100, 0.0110, 0.0104)}
    rows = backtest(quiet(104_000.0, quotes=quotes), "--sell_at", sell_at)[HOLD]
    assert money(first(rows)) == pytest.approx(price - 30, abs=0.005)


def test_the_same_trades_at_mid_and_mark_are_told_beside_it(backtest):
    """The teacher sells on the first three days: later, it is not a candidate."""
    backtest(quiet(104_000.0, quotes={CALL: (0.0100, 0.0110, 0.0104)}), "--exit_style", HOLD)
    found = backtest.said.split("the same trades in all columns:\n")[1].splitlines()[1].split()
    assert found[2:] == ["3", "+970.00", "+0.970", "+1,020.00", "+1.020", "+1,010.00", "+1.010"]


def test_of_two_snapshots_the_nearest_to_expiry_settles_and_its_distance_is_told(backtest):
    near = [snap(6.9, 104_000.0, FAR), snap(7.05, 106_000.0, FAR)]
    row = first(backtest([*quiet(0)[:6], *near])[HOLD])
    assert money(row) == pytest.approx(-45.90, abs=0.005)
    assert float(row["outcome_days"]) == pytest.approx(7.05)  # it was not known before
    assert "nearest to expiry is 1.20 h from it (median of 1 expiries" in backtest.said
    before = [snap(6.95, 104_000.0, FAR), snap(7.1, 106_000.0, FAR)]
    row = first(backtest([*quiet(0)[:6], *before])[HOLD])
    assert (money(row), float(row["outcome_days"])) == (pytest.approx(970), 7)


def test_without_a_spot_near_expiry_the_outcome_is_unknown(backtest):
    late = [*quiet(0)[:7], snap(7.3, 104_000.0, FAR)]
    rows = backtest(late)[HOLD]
    assert {row["pnl_vs_hodl"] for row in rows if row["instrument"] == CALL} == {""}
    assert rows[0]["max_drawdown_pct"] == rows[0]["outcome_days"] == ""
    assert "hold_to_expiry: outcomes unknown: 5 no spot near expiry." in backtest.said
    assert money(first(backtest(late, "--tolerance", "7.5h")[HOLD])) == pytest.approx(970)


def test_spots_settle_in_place_of_the_index(backtest, tmp_path):
    spots = tmp_path / "spots.csv"
    spots.write_text("date,price\n" + "".join(f"2026-01-{day:02d},{99_000 + day}\n" for day in range(1, 8)))
    with open(spots, "a") as file:
        file.write("2026-01-08,106000\n")
    rows = backtest(quiet(104_000.0), "--spots", str(spots))[HOLD]
    assert money(first(rows)) == pytest.approx(-45.90, abs=0.005)
    assert "from which that index is 2,000.00 USD away" in backtest.said
    # The chains may end before: expiry is all that was left to come, but what was on the way was not seen.
    row = first(backtest(quiet(0)[:7], "--spots", str(spots), "--rule", "never")[HOLD])
    assert money(row) == pytest.approx(-45.90, abs=0.005)
    found = backtest(quiet(0)[:4], "--spots", str(spots))
    assert (money(found[HOLD][0]), found[HOLD][0]["max_drawdown_pct"]) == (pytest.approx(-45.90, abs=0.005), "")
    assert found[ROLL][0]["pnl_vs_hodl"] == ""  # it might have been bought back


def test_spots_that_end_before_any_expiry_leave_outcomes_unknown(backtest, tmp_path):
    spots = tmp_path / "spots.csv"
    spots.write_text("date,price\n2025-12-01,100000\n")
    assert first(backtest(quiet(104_000.0), "--spots", str(spots))[HOLD])["pnl_vs_hodl"] == ""
    assert "--spots has no price near any expiry that was settled" in backtest.said


def test_spots_give_the_realised_vol(backtest, tmp_path):
    days = [datetime.date(2025, 10, 1) + datetime.timedelta(days=day) for day in range(110)]
    prices = 100_000 * np.exp(0.03 * (np.arange(110) % 2))  # up and down by 3 % a day
    spots = tmp_path / "BTC.csv"
    spots.write_text("date,price\n" + "".join(f"{day},{price}\n" for day, price in zip(days, prices, strict=True)))
    row = backtest(quiet(104_000.0), "--spots", str(tmp_path / "{underlying}.csv"))[HOLD][0]
    vol = np.std([0.03, -0.03] * 15, ddof=1) * math.sqrt(365)
    assert float(row["ivrv_ratio"]) == pytest.approx(0.6 / vol)
    assert backtest(quiet(104_000.0))[HOLD][0]["ivrv_ratio"] == ""


# --- Buying back


def test_the_profit_is_taken_at_the_ask_and_the_chain_ends_where_nothing_is_to_be_sold(backtest):
    at_mark = {CALL: (0.0005, 0.0025, 0.0015)}  # 80 % are earned at the mark, not at the ask
    at_ask = {CALL: (0.0005, 0.0015, 0.0010)}
    snaps = day_by_day([100_000.0, 101_000.0, 101_000.0, 99_000.0], [GOOD, at_mark, at_ask, FAR])
    row = first(backtest([*snaps, snap(7, 110_000.0, FAR)], "--rule", "never")[ROLL])
    assert money(row) == pytest.approx(970 - 151.50 - 0.125 * 151.50, abs=0.005)
    assert float(row["outcome_days"]) == 2


@pytest.mark.parametrize("spot, pnl", [(102_900.0, 970 - 2058 - 30.87), (102_899.0, 970.0)])
def test_it_is_defended_from_98_percent_of_the_strike_on(spot, pnl, backtest):
    snaps = day_by_day([100_000.0, spot, *[100_000.0] * 5], [GOOD, {CALL: (0.018, 0.020, 0.019)}, *[GOOD] * 5])
    row = first(backtest([*snaps, snap(7, 100_000.0, FAR)])[ROLL])
    assert money(row) == pytest.approx(pnl, abs=0.005)


def test_nothing_is_bought_back_in_the_last_two_days_or_without_an_ask(backtest):
    hot = {CALL: (0.030, 0.032, 0.031)}
    calm = [GOOD] * 5
    snaps = day_by_day([100_000.0] * 5 + [104_500.0] * 2, [*calm, hot, hot])  # 2 days to expiry are not more than 2
    row = first(backtest([*snaps, snap(7, 100_000.0, FAR)])[ROLL])
    assert (money(row), float(row["outcome_days"])) == (pytest.approx(970), 7)
    silent = {CALL: (0.030, None, 0.031)}
    snaps = day_by_day([100_000.0, 104_500.0, *[100_000.0] * 5], [GOOD, silent, *[GOOD] * 5])
    assert money(first(backtest([*snaps, snap(7, 100_000.0, FAR)])[ROLL])) == pytest.approx(970)


def test_it_rolls_into_the_best_score_of_another_instrument(backtest):
    """Defended on day 1 at 103,000: bought back at 2,060 and sold anew at 1,545, both with a fee of 30.90."""
    both = {CALL: (0.018, 0.020, 0.019), OTHER: (0.0150, 0.0160, 0.0155)}
    after = {OTHER: (0.0100, 0.0110, 0.0105)}
    snaps = day_by_day([100_000.0, 103_000.0, *[103_000.0] * 11], [GOOD, both, *[after] * 11])
    row = first(backtest([*snaps, snap(13, 107_000.0, FAR)])[ROLL])
    assert money(row) == pytest.approx(970 - 2060 - 30.90 + 1545 - 30.90, abs=0.005)
    assert float(row["outcome_days"]) == 13
    # Without a bid it cannot be sold, and the chain ends.
    both[OTHER] = (None, 0.0160, 0.0155)
    row = first(backtest([*snaps, snap(13, 107_000.0, FAR)])[ROLL])
    assert (money(row), float(row["outcome_days"])) == (pytest.approx(970 - 2060 - 30.90, abs=0.005), 1)


def test_it_never_rolls_into_the_call_that_was_bought_back(backtest):
    """Whose score is the best of all: at 103,000 with 3 days left and a vol of 30 % a year, its delta is near 0.25."""
    defended = snap(4, 103_000.0, {CALL: (0.0150, 0.0160, 0.0155)}, iv=0.3)
    rows = backtest([*quiet(0)[:4], defended, *quiet(104_000.0)[5:]])[ROLL]
    assert (rows[4]["instrument"], float(rows[4]["score"])) == (CALL, pytest.approx(3.88, abs=0.01))
    assert (money(rows[0]), float(rows[0]["outcome_days"])) == (pytest.approx(970 - 1648 - 30.90, abs=0.005), 4)


def test_after_three_rolls_a_call_is_held(backtest):
    """Spot is always at 98 % of what was sold last, and the next call is always there."""
    strikes = (110_000, 116_000, 122_000, 128_000)
    quotes = {f"BTC-16JAN26-{strike}-C": (0.0150, 0.0160, 0.0155) for strike in strikes}
    spots = [0.98 * strike + 1 for strike in (106_000, *strikes)]
    snaps = [snap(day, spot, quotes, iv=0.5) for day, spot in enumerate(spots)]
    snaps += [snap(day, 100_000.0, quotes, iv=0.5) for day in range(5, 15)]
    row = first(backtest([*snaps, snap(15, 100_000.0, FAR)], "--rule", "never")[ROLL], "BTC-16JAN26-110000-C")
    assert float(row["outcome_days"]) == 15  # that of 128,000 is not bought back on day 4
    fee = 0.0003
    pnl = sum(spot * (0.0150 - fee) for spot in spots[:4]) - sum(spot * (0.0160 + fee) for spot in spots[1:4])
    assert money(row) == pytest.approx(pnl, abs=0.005)


# --- What is unknown


def test_what_is_open_at_the_end_is_unknown_but_what_was_closed_is_known(backtest):
    snaps = quiet(0)[:4]
    cheap = {CALL: (0.0005, 0.0015, 0.0010)}
    rows = backtest([*snaps, snap(4, 100_000.0, cheap)])
    assert {row["pnl_vs_hodl"] for row in rows[HOLD]} == {""}
    assert money(rows[ROLL][0]) == pytest.approx(970 - 150 - 18.75, abs=0.005)
    rows = backtest(snaps)
    assert {row["pnl_vs_hodl"] for row in rows[ROLL]} == {""}
    assert "tp_and_roll: outcomes unknown: 4 still open at the end of the files." in backtest.said


@pytest.mark.parametrize("hours, known", [(36, True), (37, False)])
def test_after_a_gap_it_is_unknown_whether_it_was_bought_back(hours, known, backtest):
    days = [0, hours / 24, *range(3, 7)]
    rows = backtest([*(snap(day, 100_000.0, GOOD) for day in days), snap(7, 104_000.0, FAR)])
    assert (rows[ROLL][0]["pnl_vs_hodl"] != "") == known
    assert (rows[HOLD][0]["max_drawdown_pct"] != "") == known
    assert money(rows[HOLD][0]) == pytest.approx(970)  # for which nothing matters in between
    assert ("no quotes for 36 h" in backtest.said) == (not known)


def test_an_instrument_that_is_gone_is_a_gap_too(backtest):
    snaps = [snap(day, 100_000.0, GOOD if day in (0, 1, 5, 6) else FAR) for day in range(7)]
    rows = backtest([*snaps, snap(7, 104_000.0, FAR)])
    assert rows[ROLL][0]["pnl_vs_hodl"] == "" and money(rows[HOLD][0]) == pytest.approx(970)


def test_what_has_no_bid_has_no_outcome_and_the_rule_sells_its_next_choice(backtest):
    dear = "BTC-8JAN26-104000-C"
    quotes = {CALL: (0.0100, 0.0110, 0.0105), dear: (None, 0.0140, 0.0135)}
    rows = backtest(quiet(104_000.0, quotes=quotes), "--rule", "highest_premium")[HOLD]
    assert first(rows, dear)["pnl_vs_hodl"] == first(rows, dear)["bid"] == ""
    assert [(row["chosen"], row["action"]) for row in rows[:2] if row["instrument"] == CALL] == [("1", "SELL_CALL")]
    assert (
        "no bid for the rule's first choice at 5 decision(s): its next was sold at 5, nothing at 0." in backtest.said
    )
    quotes[CALL] = (None, 0.0110, 0.0105)
    rows = backtest(quiet(104_000.0, quotes=quotes))[HOLD]
    assert {row["trade_executed"] for row in rows} == {"0"}
    assert "its next was sold at 0, nothing at 5." in backtest.said


def test_the_drawdown_is_that_of_coin_and_call_at_its_mark(backtest):
    """100,000 at first; after the sale 99,920, for the mark is above the bid; then a fall to 90,000 + 970 - 90."""
    cheap = {CALL: (0.0009, 0.0040, 0.0010)}
    snaps = day_by_day([100_000.0, 90_000.0, *[95_000.0] * 5], [GOOD, cheap, *[cheap] * 5])
    row = backtest([*snaps, snap(7, 96_000.0, FAR)])[HOLD][0]
    assert float(row["max_drawdown_pct"]) == pytest.approx(100 * (1 - 90_880 / 100_000))


# --- Decisions


def test_one_decision_a_day_at_the_snapshot_nearest_to_the_time(backtest):
    days = [-0.1, 0.04, 0.5, 0.98, 1.03, 1.5, 2.4, 3.26, 3.9]  # none near the third day
    rows = backtest([snap(day, 100_000.0, FAR) for day in days])[HOLD]
    times = [datetime.datetime.fromisoformat(row["decision_time"]) for row in rows]
    assert [round((time - START).total_seconds() / 86_400, 2) for time in times] == [0.04, 0.98, 3.9]
    assert {row["instrument"] for row in rows} == {"NO_CANDIDATES"}
    assert "BTC: 2 decision time(s) without a snapshot within 6 h: no row is written of them." in backtest.said
    assert len(backtest([snap(day, 100_000.0, FAR) for day in days], "--at", "all")[HOLD]) == len(days)
    assert len(backtest([snap(day, 100_000.0, FAR) for day in days], "--at", "20:00")[HOLD]) == 4


@pytest.mark.parametrize(
    "rule, strike",
    [("teacher", 106_000), ("delta:0.2", 108_000), ("delta:0.35", 104_000), ("highest_premium", 104_000),
     ("lowest_delta", 109_000), ("never", None)],
)  # fmt: skip
def test_what_a_rule_sells(rule, strike, backtest):
    quotes = {f"BTC-8JAN26-{one}-C": (0.03 - one / 5e6, 0.04 - one / 5e6, 0.035 - one / 5e6)
              for one in (104_000, 105_000, 106_000, 108_000, 109_000)}  # fmt: skip
    rows = backtest([snap(0, 100_000.0, quotes)], "--rule", rule)[HOLD]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and {row["strategy"] for row in rows} == {rule}
    sold = [float(row["strike"]) for row in rows if row["chosen"] == "1"]
    assert sold == ([strike] if strike else [])


def test_a_teacher_with_no_score_from_3_on_sells_nothing(backtest):
    name = "BTC-15JAN26-110000-C"
    row = backtest([snap(0, 100_000.0, {name: (0.0001, 0.0002, 0.00015)})])[HOLD][0]
    assert (row["instrument"], row["trade_executed"], row["action"]) == (name, "0", "SKIP")


def test_the_files_are_named_and_laid_out_as_the_teachers_are(backtest, load):
    rows = backtest(quiet(104_000.0))
    assert [path.name[:-20] for path in backtest.paths] == [
        f"training_candidates_BTC_20260101_20260108_{style}" for style in (HOLD, ROLL)
    ]
    quoted = ["bid", "ask", "mark", "open_interest", "outcome_days"]
    assert list(rows[HOLD][0]) == [*COLUMNS, *quoted, "put_call_oi", "atm_iv"]
    for path in backtest.paths:
        assert load(data_files=str(path), splits="train")["train"].num_rows == 5
        labels = load("per_decision_ranking", data_files=str(path), splits="train")["train"]["label"]
        assert labels == ["1"] * 3 + ["NO_TRADE"] * 5


# --- Files


def test_a_folder_of_single_snapshots_is_the_same_as_one_file(backtest, tmp_path):
    snaps = quiet(106_000.0)
    one = backtest(snaps)
    assert backtest(snaps, chains=write_harvest(tmp_path / "chains", snaps)) == one
    parts = tmp_path / "parts"
    parts.mkdir()
    write_history(parts / "b.parquet", snaps[:3])
    write_history(parts / "a.parquet", snaps[3:])
    assert backtest(snaps, chains=str(parts)) == one


def test_calls_that_are_settled_in_dollars_are_an_underlying_of_their_own(backtest, load, tmp_path):
    snaps = quiet(104_000.0)
    folder = tmp_path / "chains"
    folder.mkdir()
    for place, one in enumerate(snaps):
        quotes = [(name, *prices) for name, prices in one.quotes.items()]
        quotes += [(name.replace("BTC", "BTC_USDC"), *(1e5 * price for price in prices)) for name, *prices in quotes]
        write(folder / f"{place}.parquet", [harvest_row(one, *quote) for quote in quotes])
    backtest([], "--exit_style", HOLD, chains=str(folder))
    coin, usdc = (rows_of(path)[0] for path in backtest.paths)
    assert (coin["underlying"], usdc["underlying"]) == ("BTC", "BTC_USDC")
    assert load(data_files=str(backtest.paths[1]), splits="train")["train"].num_rows == 5
    assert float(coin["bid"]) == pytest.approx(float(usdc["bid"])) and money(coin) == money(usdc) == pytest.approx(970)


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--rule", "delta:7"],
            r"rule delta:7: choose one of teacher, highest_premium, lowest_delta, never, or delta",
        ),
        (["--at", "8"], "at 8: give a time of day, UTC, such as 08:00, or all"),
        (["--chains", "nowhere/*.parquet"], r"chains nowhere/\*\.parquet is no file"),
        (["--spots", "nowhere.csv"], "spots nowhere.csv is no file"),
    ],
)
def test_what_cannot_be_is_one_line(words, said, backtest):
    with pytest.raises(SystemExit, match=f"error: --{said}"):
        backtest(quiet(104_000.0), *words)


def test_chains_that_overlap_are_refused_and_nothing_is_left(backtest, tmp_path):
    folder = tmp_path / "chains"
    folder.mkdir()
    write_history(folder / "a.parquet", quiet(104_000.0))
    write_history(folder / "b.parquet", quiet(104_000.0)[2:])
    with pytest.raises(
        SystemExit, match=r"b\.parquet: the snapshot of BTC at 2026-01-03 .* is not after .*a\.parquet"
    ):
        backtest([], chains=str(folder))
    assert not [path for to in tmp_path.glob("runs*") for path in to.iterdir()]


def test_bad_rows_are_an_error_or_left_out_and_counted(backtest):
    snaps = quiet(104_000.0)
    snaps[2] = snap(2, 100_000.0, {CALL: (0.0120, 0.0110, 0.0105)} | FAR)
    with pytest.raises(SystemExit, match=r"column bid_price: 0\.012 is above the ask: crossed.* --on_bad_rows skip"):
        backtest(snaps)
    rows = backtest(snaps, "--on_bad_rows", "skip")[HOLD]
    assert "1 bad row(s) left out." in backtest.said and rows[2]["instrument"] == "NO_CANDIDATES"


# --- A plain loop that knows the rules, and nothing of the package's code


def hours(time: datetime.datetime) -> float:
    return (time - START).total_seconds() / 3600


def one_chain(snaps: list[Snap], offers: list[list[dict]], place: int, name: str, max_rolls: int):
    """P&L, drawdown and days of what is sold at the bid at a place; None where unknown."""
    spot, (bid, _, mark) = snaps[place].spot, snaps[place].quotes[name]
    if bid is None:
        return None, None, None
    premium, begin, rolls = bid * spot, hours(snaps[place].time), 0
    cash = premium - fee(premium, spot)
    path, blurred, seen, marked, now = [spot, spot + cash - mark * spot], False, begin, begin, begin
    _, strike, expiry = named_call(name)
    for one in snaps[place + 1 :]:
        now, spot = hours(one.time), one.spot
        blurred |= min(now, hours(expiry)) - marked > 36
        if rolls < max_rolls and min(now, hours(expiry) - 48) - seen > 36:
            return None, None, None
        if one.time >= expiry:
            break
        if name not in one.quotes:
            continue
        seen, (_, ask, mark) = now, one.quotes[name]
        if mark is not None:
            marked = now
            path.append(spot + cash - mark * spot)
        if rolls == max_rolls or ask is None or hours(expiry) - now <= 48:
            continue
        if ask * spot > (1 - 0.8) * premium and spot / strike < 0.98:
            continue
        cash -= ask * spot + fee(ask * spot, spot)
        path.append(spot + cash)
        good = [row["instrument"] for row in offers[snaps.index(one)] if float(row["score"]) >= 3]
        good = [other for other in good if other != name and one.quotes[other][0] is not None]
        if not good:
            return cash, None if blurred else fall(path), (now - begin) / 24
        name, rolls, marked = good[0], rolls + 1, now
        _, strike, expiry = named_call(name)
        premium = one.quotes[name][0] * spot
        cash += premium - fee(premium, spot)
        path.append(spot + cash - one.quotes[name][2] * spot)
    else:
        if rolls < max_rolls and now < hours(expiry) - 48:
            return None, None, None
        blurred |= hours(expiry) - marked > 36
    nearest = min(snaps, key=lambda one: abs(one.time - expiry))
    if abs(nearest.time - expiry) > datetime.timedelta(hours=6):
        return None, None, None
    payoff = max(nearest.spot - strike, 0.0)
    cash -= payoff + min(0.00015 * nearest.spot, 0.125 * payoff)
    path.append(nearest.spot + cash)
    return cash, None if blurred else fall(path), (hours(max(expiry, nearest.time)) - begin) / 24


def fee(price: float, spot: float) -> float:
    return min(0.0003 * spot, 0.125 * price)


def fall(path: list[float]) -> float:
    return max(100 * (1 - value / max(path[: place + 1])) for place, value in enumerate(path))


def random_snaps(seed: int) -> list[Snap]:
    """Thirty at random distances, with quotes that are wide, and that are missing at times."""
    random = np.random.default_rng(seed)
    gaps = random.choice([3, 6, 12, 20, 30, 40], 30, p=[0.2, 0.3, 0.2, 0.2, 0.06, 0.04])
    spot, snaps = 100_000.0, []
    names = [f"BTC-{day}JAN26-{strike}-C" for day in (9, 16, 23, 30) for strike in range(90_000, 130_000, 4_000)]
    for hour in np.cumsum(gaps).tolist():
        time, quotes = START + datetime.timedelta(hours=hour), dict(FAR)
        spot *= math.exp(random.normal(0, 0.03))
        for name in names:
            _, strike, expiry = named_call(name)
            if expiry <= time or random.random() < 0.05:
                continue
            days = (expiry - time).total_seconds() / 86_400
            mark = max(0.0003, 0.24 * math.sqrt(days / 365) - 0.45 * max(0, math.log(strike / spot)))
            mark += max(0.0, 1 - strike / spot)
            prices = mark * (1 - random.uniform(0.01, 0.3)), mark * (1 + random.uniform(0.01, 0.3)), mark
            quotes[name] = tuple(None if random.random() < 0.1 else price for price in prices)
        snaps.append(Snap(time, spot, quotes))
    return snaps


def cells(row: dict) -> list[float | None]:
    return [float(row[name]) if row[name] else None for name in ("pnl_vs_hodl", "max_drawdown_pct", "outcome_days")]


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000))
def test_a_plain_loop_comes_to_the_same(seed, tmp_path_factory):
    folder, snaps = tmp_path_factory.mktemp("chains"), random_snaps(seed)
    chains, runs = write_history(folder / "c.parquet", snaps), folder / "runs"
    main(["--chains", chains, "--to", str(runs), "--at", "all", "--on_bad_rows", "skip"])
    for path, max_rolls in zip(sorted(runs.iterdir()), (0, 3), strict=True):
        offers: dict[str, list[dict]] = {one.time.isoformat(): [] for one in snaps}
        for row in rows_of(path):
            offers[row["decision_time"]] += [row] if row["instrument"] != "NO_CANDIDATES" else []
        for place, its in enumerate(offers.values()):
            for row in its:
                wanted = one_chain(snaps, list(offers.values()), place, row["instrument"], max_rolls)
                assert cells(row) == [one if one is None else pytest.approx(one, abs=1e-6) for one in wanted]


# --- Real quotes


@needs_real_data
@pytest.mark.parametrize(
    "underlying, time, held, rolled, days",
    [  # computed with pandas and math alone, from the raw quotes; both chains of BTC roll three times
        ("BTC", "2025-12-31T09:18:28+00:00", -571.3049895, -711.0253350, 30.008958),
        ("BTC", "2026-01-25T09:15:16+00:00", 943.9336700, 3041.4912249, 19.014514),
        ("ETH", "2026-01-12T09:25:30+00:00", 48.8828920, 35.0673480, 18.004074),
    ],
)
def test_trades_at_real_quotes(underlying, time, held, rolled, days, backtest):
    name = f"chain_{underlying}_6h_2025-12-30_2026-02.parquet"
    found = backtest([], chains=str(REAL_DATA / "market" / name))
    assert {len({row["decision_time"] for row in rows}) for rows in found.values()} == {60}
    hold, roll = (
        next(row for row in found[style] if row["decision_time"] == time and row["chosen"] == "1")
        for style in (HOLD, ROLL)
    )
    assert (money(hold), money(roll)) == pytest.approx((held, rolled), abs=1e-5)
    assert float(roll["outcome_days"]) == pytest.approx(days, abs=1e-5)


@needs_real_data
def test_a_day_of_real_harvests_ends_before_anything_is_known(backtest):
    rows = backtest([], "--at", "all", chains=str(REAL_DATA / "deribit_chains" / "BTC_*.parquet"))[HOLD]
    assert len(rows) == 62 and {row["pnl_vs_hodl"] for row in rows} == {""}
    assert "BTC: spot is the forward of the nearest expiry at 7 snapshot(s)." in backtest.said
    assert not backtest([], chains=str(REAL_DATA / "deribit_chains"))  # none is near 08:00
    assert backtest.said.count("no decision, so no file is written.") == 2
