"""A browser to look at pages with."""

import pytest

from page.chromium import Chromium


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A browser for tests that ``needs_chromium``."""
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
