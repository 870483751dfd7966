"""A browser for the tests of the tab; each file of them serves runs of its own at ``address``."""

from collections.abc import Iterator

import pytest
from selenium import webdriver

from tests.report.dashboard.browser import Tab, chromium, prefer_dark


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def tab(driver: webdriver.Chrome, address: str) -> Iterator[Tab]:
    prefer_dark(driver, False)
    driver.get_log("browser")
    yield Tab(driver, address)
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
