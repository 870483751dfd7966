"""A headless browser for the tests of the GlobEnc tab, and the tab as a person uses it."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import numpy as np
import pytest
from numpy.typing import NDArray
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

WIDTH, HEIGHT = 1280, 800
PATIENCE = 60.0
ARTIFACTS = Path(os.environ.get("GLOBENC_TEST_ARTIFACTS", Path(__file__).parents[3] / "test-artifacts"))
"""Where the screenshots go."""

_Value = TypeVar("_Value")


def wait_until(found: Callable[[], _Value], what: str, patience: float = PATIENCE) -> _Value:
    """The first value that is true."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {patience:.0f} s: {what}")


@contextmanager
def chromium(dark: bool = False) -> Iterator[webdriver.Chrome]:
    """Debian's chromium, without a window. Where it is missing, CI fails and other machines skip."""
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if None in paths:
        reason = "no chromium and chromedriver: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = str(paths[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(paths[1])))
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        prefer_dark(driver, dark)
        driver.set_script_timeout(PATIENCE)
        yield driver
    finally:
        driver.quit()


def prefer_dark(driver: webdriver.Chrome, dark: bool) -> None:
    """What the system prefers, as the page is told."""
    feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


class Tab:
    """The GlobEnc tab, as a person uses it.

    Args:
        driver: the browser.
        address: TensorBoard's.
    """

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver = driver
        self.address = address

    def open(self, query: str = "", **link: str | int) -> "Tab":
        """Load the page anew, with a view's address."""
        state = "".join(f"&p.globenc.{name}={quote(str(value), safe='')}" for name, value in link.items())
        return self.visit(f"{self.address}/{query}#globenc{state}")

    def visit(self, url: str) -> "Tab":
        """Load the page anew."""
        self.driver.switch_to.default_content()
        self.driver.get("about:blank")
        self.driver.get(url)
        frame = wait_until(
            lambda: self.driver.find_elements(By.CSS_SELECTOR, "iframe[src*=globenc]"), "the tab's frame"
        )
        self.driver.switch_to.frame(frame[0])
        wait_until(lambda: self.all("main > *"), "something in the tab")
        return self.settled()

    def settled(self) -> "Tab":
        """Wait until what was asked for is on the page."""
        ready = (
            "const main = document.querySelector('main'); return main && main.getAttribute('aria-busy') === 'false';"
        )
        wait_until(lambda: self.script(ready), "the tab to come to rest")
        return self

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def texts(self, selector: str) -> list[str]:
        """What the elements hold, visible or not."""
        return list(
            self.script("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)
        )

    def text(self, selector: str) -> str:
        (text,) = self.texts(selector)
        return text

    def click(self, selector: str) -> None:
        self.all(selector)[0].click()
        self.settled()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)
            self.settled()

    def view(self, name: str) -> None:
        self.click(f".view-button[data-view={name}]")

    def choose(self, field: str, label: str) -> None:
        """Choose in one of the lists above the view, by its visible text."""
        chosen = self.script(
            """
            const [field, label] = arguments;
            const names = [...document.querySelectorAll(".field .field-name")];
            const select = names.find((e) => e.textContent === field).parentElement.querySelector("select");
            const option = [...select.options].find((e) => e.text === label);
            if (!option) return [...select.options].map((e) => e.text);
            select.value = option.value;
            select.dispatchEvent(new Event("change", { bubbles: true }));
            return true;
            """,
            field,
            label,
        )
        assert chosen is True, f"{field}: no {label!r} among {chosen}"
        self.settled()

    def chosen(self, field: str) -> str:
        fields = {
            element.find_element(By.CSS_SELECTOR, ".field-name").get_attribute("textContent"): element
            for element in self.all(".field")
        }
        return str(self.script("return arguments[0].querySelector('select').selectedOptions[0].text", fields[field]))

    def slide(self, position: int) -> None:
        self.script(
            """
            const slider = document.querySelector("input[type=range]");
            slider.value = String(arguments[0]);
            slider.dispatchEvent(new Event("input", { bubbles: true }));
            """,
            position,
        )
        self.settled()

    @property
    def position(self) -> int:
        return int(self.script("return document.querySelector('input[type=range]').value"))

    def colours(self, column: int, sentence: int) -> NDArray[np.int64]:
        """The computed background (k, 3) of a sentence's tokens: the attribution (0) or the saliency (1)."""
        found = self.script(
            """
            const [column, sentence] = arguments;
            const row = document.querySelectorAll(".tokens-view .sentence")[sentence];
            const chips = row.querySelectorAll(".chips")[column].querySelectorAll(".chip");
            return [...chips].map((chip) => getComputedStyle(chip).backgroundColor.match(/[\\d.]+/g).map(Number));
            """,
            column,
            sentence,
        )
        assert all(len(one) == 3 for one in found), "a token without a colour"
        return np.array(found)

    def shot(self, name: str) -> None:
        """Keep a picture of the window."""
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        self.driver.switch_to.default_content()
        self.driver.save_screenshot(str(ARTIFACTS / f"{name}.png"))
        self.driver.switch_to.frame(self.driver.find_element(By.CSS_SELECTOR, "iframe[src*=globenc]"))

    def outer(self, text: str, *arguments: Any) -> Any:
        """A script's answer in TensorBoard's own page."""
        self.driver.switch_to.default_content()
        answer = self.driver.execute_script(text, *arguments)
        self.driver.switch_to.frame(self.driver.find_element(By.CSS_SELECTOR, "iframe[src*=globenc]"))
        return answer

    def link(self) -> str:
        """The address, once it has been brought up to date."""
        time.sleep(0.4)
        return str(self.outer("return location.href"))

    def state(self) -> dict[str, str]:
        """What the address says of the tab."""
        pairs = [part.split("=") for part in self.link().partition("#")[2].split("&") if "=" in part]
        return {unquote(key).removeprefix("p.globenc."): unquote(value) for key, value in pairs}


KEYS = {"left": Keys.ARROW_LEFT, "right": Keys.ARROW_RIGHT, "up": Keys.ARROW_UP, "down": Keys.ARROW_DOWN}


def scale(values: Any, dark: bool = False) -> NDArray[np.int64]:
    """The colour of every value, worked out anew: even steps of lightness, hue on a Bézier curve, in OKLab."""
    lightness = (0.34, 0.94) if dark else (0.975, 0.32)
    polar = ((0.008, 270), (0.18, 258), (0.04, 215)) if dark else ((0.006, 240), (0.16, 245), (0.13, 280))
    corners = [radius * np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))]) for radius, angle in polar]
    t = (np.floor(np.clip(np.asarray(values, float), 0, 1) * 255 + 0.5) / 255)[..., None]
    ab = (1 - t) ** 2 * corners[0] + 2 * t * (1 - t) * corners[1] + t**2 * corners[2]
    lab = np.concatenate([lightness[0] + (lightness[1] - lightness[0]) * t, ab], axis=-1)
    cones = lab @ np.linalg.inv(_OKLAB).T
    linear = np.clip(cones**3 @ np.linalg.inv(_CONES).T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.floor(encoded * 255 + 0.5).astype(np.int64)


# Ottosson's definition of OKLab: linear sRGB to cones, and the cones' cube roots to lightness and two opponent axes.
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def contrast(one: Any, other: Any) -> NDArray[np.float64]:
    """WCAG's contrast of colours (..., 3) in 0 to 255."""

    def luminance(rgb: Any) -> NDArray[np.float64]:
        share = np.asarray(rgb, float) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return np.asarray(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = (function(luminance(one), luminance(other)) for function in (np.maximum, np.minimum))
    return np.asarray((light + 0.05) / (dark + 0.05))
