"""The benchmark of real quotes, on a chain whose quotes are Black-Scholes at a vol of 60 %."""

import datetime
import math
import re
from statistics import NormalDist

import pytest
from conftest import SCRIPT, import_script

from tests.market.chains import START, snap, write_history

NAME = "BTC-8JAN26-105000-C"
SPOT, STRIKE = 100_000.0, 105_000.0


def value(days: float, iv: float) -> float:
    """USD of that call at that spot."""
    deviation = iv * math.sqrt(days / 365)
    d1 = math.log(SPOT / STRIKE) / deviation + deviation / 2
    return SPOT * NormalDist().cdf(d1) - STRIKE * NormalDist().cdf(d1 - deviation)


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys) -> list[list[str]]:
    """The cells of its table. Sold on the first three days, the last of which is paid out 1,000 USD, as all are."""
    quotes = [dict.fromkeys([NAME], (value(7 - day, 0.6) / SPOT,) * 3) for day in range(7)]
    snaps = [snap(day, SPOT, its) for day, its in enumerate(quotes)]
    days = [datetime.date(2025, 12, 25) + datetime.timedelta(days=day) for day in range(15)]
    (tmp_path / "spots_BTC.csv").write_text("date,price\n" + "".join(
        f"{day},{106_000 if day == datetime.date(2026, 1, 8) else SPOT}\n" for day in days))  # fmt: skip
    (tmp_path / "dvol.csv").write_text("date,dvol\n" + "".join(f"{day},60\n" for day in days))
    words = ["--chains", write_history(tmp_path / "c.parquet", snaps), "--spots", tmp_path / "spots_{underlying}.csv"]
    path = SCRIPT.parent / "benchmarks" / "real_quotes.py"
    monkeypatch.setattr("sys.argv", [str(path), *map(str, words), "--dvol", str(tmp_path / "dvol.csv")])
    import_script(path).main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| BTC")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_same_trades_are_paid_at_quotes_at_dvol_and_at_a_fixed_vol(printed):
    hold, roll = printed
    assert START.date() == datetime.date(2026, 1, 1)
    sold = int(hold[4])
    assert hold[:2] == ["BTC", "hold_to_expiry"] and hold[5] == hold[4] and sold > 1
    paid = 1000 + 0.00015 * 106_000 + 30  # and both fees, of which none is capped

    def mean(iv: float) -> str:
        return f"{sum(value(7 - day, iv) - paid for day in range(sold)) / sold / SPOT * 100:+.2f}"

    assert {hold[6], *hold[9:12]} == {mean(0.6)} and hold[12] == mean(0.7) != mean(0.6)
    assert hold[7] == f"none: {sold / sold:.1f} blocks" and re.fullmatch(r"(\S+ ?){2,3}", hold[8])
    assert roll[11:] == ["", ""]  # what is rolled has no such price
