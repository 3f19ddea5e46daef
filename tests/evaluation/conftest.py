"""What the tests of an evaluation share: backtests of both exit styles, and of one."""

import pytest
from conftest import decision, write_csv
from markets import walk


@pytest.fixture
def backtest(tmp_path) -> str:
    """120 days of both exit styles; the teacher sells the best score from 3.0, and every seventh score is lower."""
    rows = []
    for number in range(120):
        for style in ("hold_to_expiry", "tp_and_roll"):
            low = number % 7 == 0
            cells = {"exit_style": style, "spot": 60000 + 10 * number, "pnl_vs_hodl": 100 - number}
            made = decision(number, None if low else number % 2, **cells)
            for index, row in enumerate(made):
                row["score"] = (2.0 if low else 4.0) - abs(index - number % 2)
            rows += made
    return write_csv(tmp_path / "backtest.csv", rows)


@pytest.fixture(scope="session")
def market_of_days(tmp_path_factory) -> str:
    """200 days of hold_to_expiry on a spot that wanders, 2024-09-01 to 2025-03-19: two calls a day."""
    return write_csv(tmp_path_factory.mktemp("market_of_days") / "market.csv", walk(200))
