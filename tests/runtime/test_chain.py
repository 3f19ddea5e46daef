"""The verb chain: from quotes to the decision of each policy, as printed, and the CSV of it."""

import csv
import datetime
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, decision, load_candidates, no_candidates, write_csv
from language_model.test_policy import save_run
from market.quotes import NOW, as_history, chain, quote, write_harvest
from market.standin import Exchange, summary

from covered_call.candidates.columns import logged_of, time_of
from covered_call.candidates.context_lines import OPINION_TOLD
from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import version_with
from covered_call.candidates.schema import Candidate, Decision
from covered_call.candidates.vols import read_vols
from covered_call.market.snapshot import read_snapshots
from covered_call.market.teacher import read_spots, with_context
from covered_call.runtime.chain import main
from covered_call.runtime.drift import drift_of
from covered_call.value_model.learning import fit
from covered_call.value_model.scorer import save


@pytest.fixture
def snapshot(tmp_path) -> str:
    return write_harvest(tmp_path / "BTC_2025-12-10_0105.parquet", chain())


def fails(arguments, message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    assert str(stopped.value).startswith("error: ") and re.search(message, str(stopped.value)), stopped.value


def spots(tmp_path, count: int = 120) -> str:
    path, last = tmp_path / "spots.csv", datetime.date(2025, 12, 9)
    days = [(last - datetime.timedelta(days=count - 1 - number), 90_000 * 1.001**number) for number in range(count)]
    path.write_text("date,price\n" + "".join(f"{day},{price:.2f}\n" for day, price in days))
    return str(path)


def test_a_chain_is_shown_as_candidates_with_what_the_teacher_sells(snapshot, capsys):
    main(["--snapshot", snapshot])
    said = capsys.readouterr().out
    assert said.startswith(
        "BTC 2025-12-10 01:05:13 UTC, hold_to_expiry: spot 93,000.00 (the forward of the nearest expiry), 6 calls, 3 "
        "candidates (left out: 1 by dte, 2 by delta)\n"
    )
    assert re.search(r"\[1\] +BTC-19DEC25-98000-C +98000 +9\.29 +0\.2\d{3} +0\.4500 +n/a +\d\.\d{4} +[\d,.]+ ", said)
    assert re.search(r"teacher's rule: (NO_TRADE|\[1\] BTC-19DEC25-98000-C) \(best score \d\.\d{4}, ", said)


def test_spots_give_the_ratio_to_realised_vol(snapshot, tmp_path, capsys):
    main(["--snapshot", snapshot, "--spots", spots(tmp_path)])
    assert "n/a" not in capsys.readouterr().out


def test_each_underlying_has_its_own_spots(tmp_path, capsys):
    eth = [quote(f"ETH-19DEC25-{strike}-C", forward=3300.0) for strike in (3500, 3600)]
    path = write_harvest(tmp_path / "both.parquet", [*chain(), *eth])
    text = Path(spots(tmp_path)).read_text()
    fails(
        ["--snapshot", path, "--spots", tmp_path / "spots.csv"], "the chains hold BTC, ETH, each with its own prices"
    )
    (tmp_path / "BTC.csv").write_text(text)
    days = [line.partition(",") for line in text.splitlines()[1:]]
    (tmp_path / "ETH.csv").write_text(
        "date,price\n" + "".join(f"{day},{3300 if number % 2 else 3000}\n" for number, (day, *_) in enumerate(days))
    )
    main(["--snapshot", path, "--spots", str(tmp_path / "{underlying}.csv")])
    ratios = {
        row[0]: float(row[1])
        for row in re.findall(r"\] +(BTC|ETH)-\S+(?: +\S+){4} +(\d+\.\d{4})", capsys.readouterr().out)
    }
    assert ratios["BTC"] > 100 > 1 > ratios["ETH"] > 0  # of a price that hardly moves, and of one that jumps


def test_the_csv_is_one_that_every_other_command_reads(tmp_path, capsys):
    times = [NOW + datetime.timedelta(days=day) for day in range(3)]
    rows = [row for time in times for row in as_history(chain(), time)]
    rows += as_history([quote("BTC-19DEC25-150000-C")], NOW + datetime.timedelta(days=3))
    path = write_harvest(tmp_path / "chains.parquet", rows)
    main(["--snapshot", path, "--out", str(tmp_path / "runs"), "--exit_style",
        "hold_to_expiry", "tp_and_roll"])  # fmt: skip
    paths = sorted((tmp_path / "runs").iterdir())
    assert [re.sub(r"_\d{8}_\d{6}\.csv$", "", path.name) for path in paths] == [
        f"training_candidates_BTC_20251210_20251213_{style}" for style in ("hold_to_expiry", "tp_and_roll")
    ]
    with open(paths[0], newline="") as file:
        first, *_, last = csv.DictReader(file)
    assert first["strategy"] == "snapshot" and first["pnl_vs_hodl"] == "" and float(first["bid"]) > 0
    assert last["instrument"] == "NO_CANDIDATES" and last["action"] == "SKIP"
    assert float(first["atm_iv"]) == 0.45 and float(first["put_call_oi"]) == pytest.approx(1 / 6)
    options = {"data_files": [str(path) for path in paths], "splits": "train", "cache_dir": str(tmp_path / "arrow")}
    rankings = load_candidates("per_decision_ranking", **options)["train"]
    assert len(rankings) == 8 and rankings[6]["messages"][-1]["content"] == "NO_TRADE"
    shape = load_candidates("q_values", context="spot", context_columns=["put_call_oi", "atm_iv"], **options)["train"]
    assert shape[0]["put_call_oi"] == float(first["put_call_oi"]) and shape[0]["atm_iv"] == 0.45
    labels = load_candidates("per_candidate", **options)["train"]["label"]
    assert labels.count("SELL_CALL") == sum(answer != "NO_TRADE" for answer in rankings["label"])


def test_without_the_teacher_nothing_is_labelled_as_sold(snapshot, tmp_path):
    main(["--snapshot", snapshot, "--out", str(tmp_path / "runs"), "--no-teacher"])
    (path,) = (tmp_path / "runs").iterdir()
    with open(path, newline="") as file:
        assert {(row["trade_executed"], row["chosen"], row["action"]) for row in csv.DictReader(file)} == {
            ("0", "0", "SKIP")
        }


@pytest.fixture
def scorer(tmp_path) -> str:
    rows = [row for day in range(80) for row in decision(day, sold=day % 3, spot=58466.0 + 50 * (day % 5), dte=1.0)]
    path = write_csv(tmp_path / "train.csv", [*rows, no_candidates(80)])
    config = CoveredCallCandidatesConfig()
    columns = read_decisions([path], config).columns()
    save(fit(columns, columns, config), tmp_path / "q_scorer.zip")
    return str(tmp_path / "q_scorer.zip")


def test_a_model_and_a_q_scorer_answer_with_probabilities_and_say_where_they_were_not_tuned(
    snapshot, scorer, tmp_path, capsys
):
    (tmp_path / "run").mkdir()
    save_run(tmp_path / "run", "per_decision_ranking", adapter=False)
    main(["--snapshot", snapshot, "--model", str(tmp_path / "run"), "--q_scorer", scorer])
    said = capsys.readouterr().out
    assert "BTC 2025-12-10 01:05:13 UTC, tp_and_roll:" in said  # the one that the model knows
    assert re.search(r"model \S+: (NO_TRADE|\[\d\] BTC-\S+) \(probability 0\.\d{3}, margin 0\.\d{3}\)", said)
    assert "drift: dte 9.288 (tuned on 1 to 7): the answer is a guess" in said
    assert re.search(r"Q-scorer: \S+.* \(best \[\d\]: [+-][\d,.]+ USD expected, P\(positive\) [01]\.\d{3}", said)
    assert re.search(r"drift: dte 9\.288 \(tuned on 1\); delta 0\.\d+ to 0\.\d+ \(tuned on 0\.2351\)", said)
    fails(["--snapshot", snapshot, "--q_scorer", scorer, "--exit_style", "tp_and_roll", "--strict_drift"],
        r"strict_drift: of 1 answer\(s\).*Q-scorer: dte 9\.288")  # fmt: skip


def with_context_of(folder: Path, **told) -> str:
    """A Q-scorer that was fitted with the market's context."""
    rows = [row for day in range(80) for row in decision(day, sold=day % 3, spot=58466.0 + 50 * (day % 5), dte=1.0)]
    config = CoveredCallCandidatesConfig(context="spot", **told)
    columns = read_decisions([write_csv(folder / "train.csv", rows)], config).columns()
    save(fit(columns, columns, config), folder / "q.zip")
    return str(folder / "q.zip")


def vols(folder: Path, first: str, days: int = 60) -> str:
    begin, path = datetime.date.fromisoformat(first), folder / f"dvol_{first}.csv"
    rows = [f"{begin + datetime.timedelta(days=day)},{40 + day % 7}\n" for day in range(days)]
    path.write_text("date,dvol\n" + "".join(rows))
    return str(path)


def test_a_policy_that_was_fitted_with_the_market_s_context_gets_it_of_the_spots(snapshot, tmp_path, capsys):
    asked = ["--snapshot", snapshot, "--q_scorer", with_context_of(tmp_path)]
    fails(asked, "fitted with the market's context.*live, give spots")
    main([*asked, "--spots", spots(tmp_path)])
    assert "Q-scorer: " in capsys.readouterr().out


def test_one_that_was_told_the_market_s_vols_gets_them_of_their_file(snapshot, tmp_path, capsys):
    path = with_context_of(tmp_path, context_vols=vols(tmp_path, "2024-07-01", 200))
    asked = ["--snapshot", snapshot, "--q_scorer", path, "--spots", spots(tmp_path)]
    fails(asked, "fitted with the market's context, and here dvol is not told.*live, give spots, and such vols")
    main([*asked, "--context_vols", vols(tmp_path, "2025-11-01")])
    assert "Q-scorer: " in capsys.readouterr().out
    fails([*asked, "--context_vols", tmp_path / "none.csv"], "--context_vols .*none.csv is no file")


def test_a_model_that_was_tuned_with_an_opinion_gets_it_of_the_q_scorer(snapshot, scorer, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    save_run(tmp_path / "run", "per_decision_ranking", adapter=False)
    tuned_with_opinion(tmp_path / "run")
    asked = ["--snapshot", snapshot, "--model", str(tmp_path / "run")]
    fails(asked, "fitted with the opinion of a model of outcomes, and here is none.*live, give the Q-scorer, too")
    main([*asked, "--q_scorer", scorer])
    assert re.search(r"model \S+: \S+.*probability .*\nQ-scorer: ", capsys.readouterr().out, re.DOTALL)


def tuned_with_opinion(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    told = {"context": [OPINION_TOLD], "prompt_version": version_with([OPINION_TOLD])}
    (folder / "manifest.json").write_text(json.dumps(manifest | told))


def test_what_is_told_live_is_what_a_file_of_the_same_closes_tells(snapshot, tmp_path):
    """A decision a day at the closes' own times, and a vol for each, known a day after."""
    closes = read_spots(spots(tmp_path), "BTC")
    rows = [row for time, price in zip(closes.time.tolist(), closes.number.tolist(), strict=True)
        for row in decision(0, None, decision_time=time_of(time).isoformat(), spot=price)]  # fmt: skip
    path = vols(tmp_path, f"{time_of(int(closes.time[0])).date()}", len(closes.time))
    options = CoveredCallCandidatesConfig(context="spot", context_vols=path, splits="train")
    market = read_vols(path, options.iv_lag)
    entries = logged_of(read_decisions([write_csv(tmp_path / "a.csv", rows)], options).columns())
    for entry in entries[::17]:
        assert (
            with_context(entry.decision._replace(context=None), closes, None, market).context == entry.decision.context
        )
    assert entries[-1].decision.context["dvol_rank_180"] is not None
    (one,) = read_snapshots(snapshot)
    told = with_context(entries[-1].decision, closes, one, market).context
    assert list(told) == [*entries[-1].decision.context, "atm_iv_rank_180", "put_call_oi", "atm_iv"]
    assert told["atm_iv"] == 0.45 and told["atm_iv_rank_180"] is None
    assert np.isnan(next(read_snapshots(write_harvest(tmp_path / "calls.parquet", [quote()]))).put_call_oi)


def test_the_chain_of_this_moment(tmp_path, capsys):
    expiry = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=10)
    names = [
        f"{coin}-{expiry:%-d%b%y}-{strike}-C".upper() for coin in ("BTC", "BTC_USDC") for strike in (96_000, 97_000)
    ]
    with Exchange() as exchange:
        for currency, its, mark in (("BTC", names[:2], 0.012), ("USDC", names[2:], 1100.0)):
            quotes = {"mark_price": mark, "bid_price": 0.97 * mark, "ask_price": 1.03 * mark}
            exchange.summaries[currency] = [summary(name, **quotes) for name in its]
        main(["--live", "BTC", "BTC_USDC", "--url", exchange.url, "--out", str(tmp_path)])
        said = capsys.readouterr().out
        fails(["--live", "ETH", "--url", exchange.url], "Deribit refuses what was asked .currency=ETH")
    assert re.findall(r"^(\S+) .*spot ([\d,.]+) \(the index\), 2 calls, 2 candidates", said, re.MULTILINE) == [
        ("BTC", "92,250.41"), ("BTC_USDC", "92,250.41"),
    ]  # fmt: skip
    assert "1,107.00" in said and "1,100.00" in said  # coin times spot, and dollars
    loaded = load_candidates(
        "per_candidate", data_dir=str(tmp_path), splits="train", cache_dir=str(tmp_path / "arrow")
    )
    assert set(loaded["train"]["underlying"]) == {"BTC", "BTC_USDC"}


def test_a_model_that_knows_another_underlying_refuses(tmp_path):
    (tmp_path / "run").mkdir()
    save_run(tmp_path / "run", "per_candidate", adapter=False)
    rows = [quote(f"ETH-19DEC25-{strike}-C", forward=3300.0) for strike in (3500, 3600)]
    path = write_harvest(tmp_path / "eth.parquet", rows)
    fails(["--snapshot", path, "--model", tmp_path / "run"], "tuned on the underlying BTC, and not on ETH")


def test_the_teacher_on_any_series_of_spots(tmp_path, capsys):
    main(["--preset", "synthetic", "--spots", spots(tmp_path), "--out", str(tmp_path / "runs")])
    assert "UTC" not in capsys.readouterr().out.split("runs")[0]
    paths = sorted((tmp_path / "runs").iterdir())
    assert len(paths) == 2
    decisions = read_decisions([str(paths[0])], CoveredCallCandidatesConfig())
    assert len(decisions.place) == 120 and decisions.fits["BTC", "hold_to_expiry"].median_error < 0.01
    assert {one.hour for one in load_candidates("per_decision_ranking", data_files=str(paths[0]), splits="train",
        cache_dir=str(tmp_path / "arrow"))["train"]["decision_time"]} == {8}  # fmt: skip


def test_vols_by_day_are_used_from_when_they_are_known(tmp_path):
    vols = tmp_path / "dvol.csv"
    vols.write_text("date,dvol\n2025-12-07,40\n")
    main(["--preset", "synthetic", "--spots", spots(tmp_path), "--iv", str(vols), "--out", str(tmp_path / "runs")])
    columns = read_decisions([str(next((tmp_path / "runs").iterdir()))], CoveredCallCandidatesConfig()).columns()
    assert (columns.offsets[1:] - columns.offsets[:-1] > 0).tolist() == [False] * 118 + [True] * 2
    assert set(columns.numbers["iv"].tolist()) == {0.4}


def test_what_cannot_be_used_is_one_error(snapshot, tmp_path):
    fails(["--snapshot", tmp_path / "none.parquet"], "--snapshot .*none.parquet is no file")
    fails(["--snapshot", snapshot, "--max_age", 900], r"the snapshot is [\d,]+ s old, and --max_age 900")
    fails(["--snapshot", snapshot, "--model", tmp_path / "none"], "There is no folder")
    fails(["--snapshot", snapshot, "--q_scorer", tmp_path / "none.zip"], "none.zip is no file")
    fails(["--preset", "synthetic"], "--preset synthetic makes its chains of spots alone")
    fails(["--preset", "synthetic", "--spots", spots(tmp_path), "--iv", "70"], "--iv 70: give a vol above 0")
    bad = write_harvest(tmp_path / "bad.parquet", [*chain(), quote("BTC-19DEC25-99000-C", mark_iv=None)])
    fails(
        ["--snapshot", bad], "bad.parquet, instrument 'BTC-19DEC25-99000-C', column mark_iv: nan.*--on_bad_rows skip"
    )


def test_bad_quotes_that_are_left_out_are_counted(tmp_path, capsys):
    path = write_harvest(tmp_path / "bad.parquet", [*chain(), quote("BTC-19DEC25-99000-C", mark_iv=None)])
    main(["--snapshot", path, "--on_bad_rows", "skip"])
    assert "1 bad row(s) were left out." in capsys.readouterr().out


def test_nothing_is_written_where_a_later_file_is_bad(snapshot, tmp_path):
    bad = write_harvest(tmp_path / "ZZ.parquet", [*chain(), quote("BTC-19DEC25-99000-C", mark_iv=None)])
    fails(["--snapshot", snapshot, bad, "--out", tmp_path / "runs"], "ZZ.parquet")
    assert not (tmp_path / "runs").exists()


def test_without_a_model_torch_is_not_imported(snapshot):
    code = f"""
import sys
from covered_call.market.teacher import read_spots, with_context
from covered_call.runtime.chain import main
main(["--snapshot", {snapshot!r}])
assert "torch" not in sys.modules and "ccxt" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_drift_is_what_lies_outside_with_both_ranges():
    candidates = tuple(Candidate(f"BTC-{n}-C", 60_000.0, 7.0, 0.2351, n, None, math.nan) for n in (3.0, 3.5))
    one = Decision(NOW, "BTC", "tp_and_roll", 58_466.0, candidates)
    numbers = {"dte": [1.0, 7.0], "delta": [0.3, 0.4], "iv": [0.7, 0.7], "ivrv_ratio": [1, 2], "score": [3.0, 3.25]}
    assert drift_of(one, numbers) == ["delta 0.2351 (tuned on 0.3 to 0.4)", "score 3 to 3.5 (tuned on 3 to 3.25)"]
    assert drift_of(one._replace(candidates=()), numbers) == []
