"""What the tests of the value model share: a scorer, and a backtest to fit others on."""

import pytest
from conftest import write_csv
from markets import CONFIG, rich_if_volatile, walk

from covered_call.value_model.learning import Fitted, fit


@pytest.fixture(scope="session")
def fitted() -> Fitted:
    return fit(rich_if_volatile(range(300)), rich_if_volatile(range(310, 350), 1), CONFIG)


@pytest.fixture(scope="session")
def backtest(tmp_path_factory) -> str:
    return write_csv(tmp_path_factory.mktemp("backtest") / "backtest.csv", walk(280))
