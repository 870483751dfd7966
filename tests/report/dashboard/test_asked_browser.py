"""What was asked for besides the methods and the saliency, in the tab in a real browser.

Axes: ``b`` sentence, ``k`` token.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from selenium.webdriver.common.action_chains import ActionChains

from benchmarks.dashboard import large_run
from globenc_lightning.measurement import Measurement
from globenc_lightning.report.averages import mean_and_interval
from tests.report.dashboard import browser
from tests.report.dashboard.asked import MASKED, asked_run
from tests.report.dashboard.browser import Tab, contrast, prefer_dark, wait_until
from tests.report.dashboard.serving import tensorboard, until_runs

pytestmark = pytest.mark.slow

ASKED, PLAIN, OTHER = "asked", "plain", "other"
SCRIPT = "<script>window.stolen = 1</script>"
IMAGE = '<img src=x onerror="window.stolen=1">'
ODD = {"names": {2: [SCRIPT, IMAGE]}}
"""Two tokens of the third sentence, wherever they are masked."""
LINES = """
    const chart = document.querySelectorAll(arguments[0])[0];
    const names = [...chart.querySelectorAll(".line-name")];
    return Object.fromEntries(names.map((e) => [...e.querySelectorAll("text")].map((text) => text.textContent)));
"""
POINTS = """
    const line = document.querySelector(arguments[0]).querySelector(`[data-name='${arguments[1]}']`);
    const all = [...line.querySelectorAll("polyline")].map((one) => one.getAttribute("points").trim());
    return all.map((one) => one.split(/\\s+/).map((point) => point.split(",").map(Number)));
"""
CHIPS = """
    const row = document.querySelectorAll(".tokens-view .sentence")[arguments[0]];
    return [...row.querySelectorAll(".chips")[1].querySelectorAll(".chip")].map((e) => {
      const style = getComputedStyle(e);
      const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
      return {
        masked: e.classList.contains("masked"), text: e.textContent, struck: Boolean(e.querySelector("s")),
        line: style.borderBottomWidth === "0px" ? "none" : style.borderBottomStyle,
        ground: rgb(style.backgroundColor), ink: rgb(style.color), outline: style.outlineStyle,
      };
    });
"""


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("asked") / "logs"


@pytest.fixture(scope="module")
def measured(logdir: Path) -> dict[str, list[Measurement]]:
    """Runs: of the first, one validation has no masked copies, one no integrated gradients, one no signed scores."""
    large_run(logdir, PLAIN, validations=3, sentences=4, layers=3, tokens=10)
    changes: list[dict[str, Any]] = [ODD, {**ODD, "masked": ()}, {**ODD, "references": ("HTA",)}, ODD, ODD, ODD]
    changes[3] = {**ODD, "signed": False}
    return {
        ASKED: asked_run(logdir, ASKED, changes),
        OTHER: asked_run(logdir, OTHER, [{"unit": "value", "signed": False, "references": ()}] * 3),
    }


@pytest.fixture(scope="module")
def address(logdir: Path, measured: dict[str, list[Measurement]]) -> Iterator[str]:
    with tensorboard(logdir, logdir.parent) as address:
        until_runs(address, 3)
        yield address


def decimals(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def told(tab: Tab, sentence: int) -> str:
    """What is said below the right column of a sentence."""
    return str(tab.script("return document.querySelectorAll('.told')[arguments[0]].textContent", sentence))


def visible(tab: Tab, selector: str) -> bool:
    return bool(
        tab.script("return [...document.querySelectorAll(arguments[0])].some((e) => e.checkVisibility())", selector)
    )


# Nothing asked for


def test_nothing_new_is_seen_where_nothing_was_asked_for(tab: Tab) -> None:
    tab.open(run=PLAIN, view="correlation", reference="HTA", beside="masked", measure="log_odds")
    assert len(tab.all(".correlation-view .card .chart")) == 2
    assert not tab.all(".faithfulness")
    assert [one for one in tab.all(".correlation-view select") if one.is_displayed()] == []
    assert tab.texts(".correlation-view h2") == ["By layer, at step 50", "Over the training, layer 3"]
    tab.view("tokens")
    for selector in (".beside-head select", ".told", ".signed-legend", ".masked-key", ".chip.masked", ".chip.for"):
        assert not visible(tab, selector), selector
    assert "Saliency" in tab.texts(".token-heads h2")


# Correlation


@pytest.mark.parametrize("reference", ["saliency", "HTA", "integrated gradients"])
def test_curves_are_with_the_chosen_reference(tab: Tab, measured: dict[str, list[Measurement]], reference: str) -> None:
    tab.open(run=ASKED, view="correlation")
    title = {"saliency": "Saliency", "HTA": "HTA", "integrated gradients": "Integrated gradients"}[reference]
    tab.choose("Correlated with", title)
    assert tab.state().get("reference", "saliency") == reference

    def rho(one: Measurement) -> Any:
        return one.correlation if reference == "saliency" else one.reference_correlation.get(reference)

    means = {
        method: [None if rho(one) is None else float(rho(one)[method][:, 1].nanmean()) for one in measured[ASKED]]
        for method in ("W", "N-Res", "N-Enc")
    }
    tab.choose("Layer", "2")
    assert tab.texts(".correlation-view .card h2")[0] == f"ρ with {title} over the training, layer 2"
    wanted = {method: decimals(values[-1] or 0.0) for method, values in means.items()}
    assert tab.script(LINES, ".correlation-view .cards .card:nth-child(1) .chart") == wanted
    assert tab.script(LINES, ".correlation-view .cards .card:nth-child(3) .chart").keys() == wanted.keys()
    # Heights are linear in the means, and a validation without the reference is a gap.
    parts = tab.script(POINTS, ".correlation-view .cards .card:nth-child(1)", "N-Enc")
    assert len(parts) == (2 if None in means["N-Enc"] else 1)
    heights = np.array([point[1] for part in parts for point in part])
    there = np.array([one for one in means["N-Enc"] if one is not None])
    slope, offset = np.polyfit(there, heights, 1)
    np.testing.assert_allclose(heights, slope * there + offset, atol=0.05)
    assert slope < 0
    # One sentence's own curve is with the same reference.
    tab.click(".check input")
    own = tab.script(LINES, ".correlation-view .cards .card:nth-child(1) .chart")["sentence 1"]
    assert own == decimals(float(rho(measured[ASKED][-1])["N-Enc"][0, 1]))
    if reference == "integrated gradients":
        tab.slide(2)
        assert "was not computed at this validation" in " ".join(tab.texts(".correlation-view .hint"))


@pytest.mark.parametrize(
    ("name", "label"),
    [("gain", "Gain over random"), ("sufficiency_gain", "Sufficiency gain"), ("log_odds", "Log-odds lost")],
)
def test_faithfulness_is_drawn_beside_rho(
    tab: Tab, measured: dict[str, list[Measurement]], name: str, label: str
) -> None:
    tab.open(run=ASKED, view="correlation")
    tab.choose("Figure", label)
    assert tab.state().get("measure", "gain") == name
    values = {
        method: [
            mean_and_interval(getattr(one.faithfulness, name)[method].numpy())
            for one in measured[ASKED]
            if one.faithfulness is not None
        ]
        for method in MASKED
    }
    wanted = {method: decimals(float(of[-1][0])) for method, of in values.items()}
    random = {} if name == "log_odds" else {"random": "0.00"}
    assert tab.script(LINES, ".faithfulness .chart") == {**wanted, **random}
    (points,) = tab.script(POINTS, ".faithfulness", "N-Enc")
    means = np.array([float(mean) for mean, *_ in values["N-Enc"]])
    assert len(points) == len(means) == 5, "the validation without masked copies is passed over"
    slope, offset = np.polyfit(means, np.array(points)[:, 1], 1)
    np.testing.assert_allclose(np.array(points)[:, 1], slope * means + offset, atol=0.05)
    # The band holds the interval.
    band = tab.script(
        "return document.querySelector(`.faithfulness [data-name='N-Enc'] .band`).getAttribute('points')"
    ).split()
    tops = np.array([float(one.split(",")[1]) for one in band[: len(means)]])
    highs = np.array([float(mean + half) for mean, half, *_ in values["N-Enc"]])
    np.testing.assert_allclose(tops, slope * highs + offset, atol=0.2)
    mean, half, n, left_out = values["N-Enc"][-1]
    said = tab.text(".faithfulness .counts")
    assert f"{decimals(float(mean))} (95 % interval {decimals(float(mean - half))} to " in said
    assert f"mean over {int(n)} of 6 sentences" in said
    assert ("1 left out" in said) == bool(left_out)
    assert ("none is left out" in said) == (not left_out)
    assert "Not asked for: N-Res" in said
    meaning = tab.texts(".faithfulness .hint")[0]
    assert ("0 is no better than random" in meaning) == (name != "log_odds")
    assert ("random tokens are not taken off" in meaning) == (name == "log_odds")
    tab.slide(1)
    assert "Not measured at step 25" in tab.text(".faithfulness .counts")


def test_faithfulness_of_a_value_has_no_log_odds(tab: Tab) -> None:
    tab.open(run=OTHER, view="correlation", measure="log_odds")
    assert tab.chosen("Figure") == "Gain over random"
    assert "the value itself" in tab.text(".faithfulness .counts")
    assert not visible(tab, ".correlation-view .toggle-row > label:not(.check)")


# Tokens


def test_masked_tokens_are_marked_and_can_still_be_read(tab: Tab, measured: dict[str, list[Measurement]]) -> None:
    tab.open(run=ASKED, beside="masked")
    newest = measured[ASKED][-1]
    faithfulness = newest.faithfulness
    assert faithfulness is not None
    for method in ("N-Enc (GlobEnc)", "W"):
        tab.choose("Method", method)
        flags = faithfulness.masked[method.split()[0]]
        for sentence in range(6):
            chips = tab.script(CHIPS, sentence)
            assert [one["masked"] for one in chips] == flags[sentence].tolist()
            for one, token in zip(chips, newest.names[sentence], strict=True):
                # Read aloud with the word; the token stays readable.
                assert one["text"] == (f"masked: {token}" if one["masked"] else token)
                assert one["struck"] == (one["outline"] == "dashed") == one["masked"]
                assert not one["masked"] or contrast(one["ink"][:3], one["ground"][:3]) >= 4.5
            label = tab.script("return document.querySelectorAll('.sentence')[arguments[0]].querySelectorAll('.chips')"
                               "[1].getAttribute('aria-label')", sentence)  # fmt: skip
            names = [name for name, flag in zip(newest.names[sentence], flags[sentence], strict=True) if flag]
            assert label == f"Sentence {sentence + 1}, masked copy: {', '.join(names)} masked"
    tab.choose("Method", "N-Res")
    assert not tab.all(".sentence .chip.masked")
    assert "No tokens were masked in the order of N-Res; they were in that of N-Enc, W." in told(tab, 0)
    assert "No tokens were masked in the order of N-Res" in tab.text(".share")
    tab.slide(1)
    assert "No masked copies were made at this validation." in told(tab, 0)
    tab.slide(5)
    tab.choose("Method", "W")
    # Another step masks other tokens.
    before = [one["masked"] for one in tab.script(CHIPS, 0)]
    tab.slide(0)
    earlier = measured[ASKED][0].faithfulness
    assert earlier is not None
    assert [one["masked"] for one in tab.script(CHIPS, 0)] == earlier.masked["W"][0].tolist() != before


def test_the_masked_copy_s_probability_and_gain_are_said(tab: Tab, measured: dict[str, list[Measurement]]) -> None:
    tab.open(run=ASKED, beside="masked")
    newest = measured[ASKED][-1]
    assert newest.faithfulness is not None
    for sentence in (0, 3):
        whole = float(newest.probability[sentence])
        odds = np.log(whole / (1 - whole)) - float(newest.faithfulness.log_odds["N-Enc"][sentence])
        said = told(tab, sentence)
        assert f"{100 * whole:.1f} % → {100 / (1 + np.exp(-odds)):.1f} %" in said
        gain = float(newest.faithfulness.gain["N-Enc"][sentence])
        assert f"gain over random{'+' if gain > 0 else ''}{decimals(gain)}" in said
        assert f"3 of {len(newest.names[sentence])} tokens" in said
    assert "left out: masking everything costs too little" in told(tab, 1)


def test_odd_tokens_stay_text_in_every_mode(tab: Tab, measured: dict[str, list[Measurement]]) -> None:
    for beside in ("masked", "signed"):
        for position in (0, 3, 5):
            tab.open(run=ASKED, beside=beside)
            tab.slide(position)
            texts = [one["text"].removeprefix("masked: ") for one in tab.script(CHIPS, 2)]
            assert texts == list(measured[ASKED][position].names[2])
            assert tab.script("return window.stolen") is None
            assert not tab.all("main script, main img")


def two_sided(shares: NDArray[np.float64], dark: bool) -> NDArray[np.int64]:
    """The colours of shares of the largest, -1 to 1, worked out anew."""
    (low, high), chroma, hues = ((0.34, 0.8), 0.14, (255, 62)) if dark else ((0.975, 0.5), 0.15, (262, 48))
    t = np.abs(np.floor(128 * (shares + 1) + 0.5) / 128 - 1)
    angle = np.deg2rad(np.where(shares < 0, hues[0], hues[1]))
    lab = np.stack([low + (high - low) * t, chroma * t * np.cos(angle), chroma * t * np.sin(angle)], -1)
    linear = np.clip((lab @ np.linalg.inv(browser._OKLAB).T) ** 3 @ np.linalg.inv(browser._CONES).T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.floor(encoded * 255 + 0.5).astype(np.int64)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_signed_scores_have_two_colours_and_their_sum(
    tab: Tab, measured: dict[str, list[Measurement]], dark: bool
) -> None:
    prefer_dark(tab.driver, dark)
    tab.open("?darkMode=true" if dark else "", run=ASKED, beside="signed")
    newest = measured[ASKED][-1]
    for sentence in range(6):
        values = newest.signed[sentence].double().numpy()
        shares = values / np.abs(values).max()
        chips = tab.script(CHIPS, sentence)
        ground = np.array([one["ground"] for one in chips])
        assert np.abs(ground - two_sided(shares, dark)).max() <= 2
        assert contrast(np.array([one["ink"] for one in chips]), ground).min() >= 4.5
        # The sign is told by the line, too.
        signs = np.where(shares > 0.04, "solid", np.where(shares < -0.04, "dotted", "none"))
        assert [one["line"] for one in chips] == signs.tolist()
        said, rest = told(tab, sentence), float(newest.left_out[sentence])
        for name, value in (("sum", values.sum()), ("left out (biases)", rest), ("score", values.sum() + rest)):
            assert f"{name}{'+' if value > 0 else ''}{decimals(value, 3)}" in said
    legend = tab.all(".signed-legend")[0]
    assert legend.is_displayed()
    assert all(word in legend.text for word in ("against", "for", "0", "+", "−"))
    chip = tab.script("return document.querySelectorAll('.sentence .chips')[1].querySelectorAll('.chip')[2]")
    ActionChains(tab.driver).move_to_element(chip).perform()
    wait_until(lambda: tab.text(".tooltip"), "the box at the pointer")
    value = float(newest.signed[0][2])
    assert f"signed score{'+' if value > 0 else ''}{decimals(value, 3)}" in tab.text(".tooltip")
    tab.slide(3)
    assert "Signed scores are not stored for this sentence at this validation." in told(tab, 0)
    assert "Signed scores: nothing is stored here." in tab.text(".share")


# Viénot, Brettel & Mollon 1999 for protanopia and deuteranopia, as Machado, Oliveira & Fernandes 2009 at severity 1.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", BLIND)
def test_a_colour_blind_person_tells_the_signs(tab: Tab, kind: str, dark: bool) -> None:
    prefer_dark(tab.driver, dark)
    tab.open("?darkMode=true" if dark else "", run=ASKED, beside="signed")
    stops = tab.script(
        "return getComputedStyle(document.querySelector('.signed-legend .scale-bar')).backgroundImage"
        ".match(/rgb\\([^)]*\\)/g).map((one) => one.match(/\\d+/g).map(Number))"
    )
    share = np.array(stops) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(BLIND[kind]).T, 0, 1)
    lab = np.cbrt(seen @ browser._CONES.T) @ browser._OKLAB.T
    # 0.02 in OKLab is what an eye can just tell.
    for place in range(3):
        assert np.linalg.norm(lab[place] - lab[-1 - place]) > 0.08 * (3 - place) / 3, f"step {place}"


def test_the_choice_beside_the_rows_is_kept_in_the_link(tab: Tab, measured: dict[str, list[Measurement]]) -> None:
    tab.open(run=ASKED)
    newest = measured[ASKED][-1]
    select = """
        const select = document.querySelector(".beside-head select");
        select.value = arguments[0];
        select.dispatchEvent(new Event("change", { bubbles: true }));
        return [...select.options].map((one) => one.text);
    """
    names = tab.script(select, "HTA")
    tab.settled()
    assert names == ["Saliency", "Integrated gradients", "HTA", "Masked sentence", "Signed scores"]
    assert tab.state()["reference"] == "HTA"
    for sentence in range(6):
        values = newest.references[sentence]["HTA"].double().numpy()
        found = tab.colours(1, sentence)
        assert np.abs(found - browser.scale(values / values.max())).max() <= 4
    rho = newest.reference_correlation["HTA"]["N-Enc"][:, 2].tolist()
    assert tab.texts(".rho") == [decimals(one) for one in rho]
    tab.script(select, "signed")
    tab.settled()
    assert tab.state()["beside"] == "signed"
    tab.script(select, "saliency")
    tab.settled()
    assert not {"beside", "reference"} & set(tab.state())
    assert not tab.all(".sentence .chip.for, .sentence .chip.against, .sentence .chip.masked")
    assert tab.texts(".rho") == [decimals(one) for one in newest.correlation["N-Enc"][:, 2].tolist()]


def test_what_is_not_stored_is_counted(tab: Tab) -> None:
    tab.open(run=ASKED, reference="integrated gradients")
    assert not tab.all(".share")[0].is_displayed()
    tab.slide(2)
    assert tab.text(".share") == "Integrated gradients: nothing is stored here."
    assert "Integrated gradients is not stored for this sentence" in told(tab, 0)
    assert set(tab.texts(".rho")) == {"undefined"}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("view", "link"),
    [
        ("tokens", {"beside": "masked"}),
        ("tokens", {"beside": "signed"}),
        ("tokens", {"reference": "integrated gradients"}),
        ("correlation", {"reference": "HTA"}),
        ("correlation", {"measure": "log_odds"}),
    ],
    ids=["masked", "signed", "reference", "correlation", "log-odds"],
)
@pytest.mark.parametrize("width", [1280, 800])
def test_what_is_said_fits_and_can_be_read(tab: Tab, view: str, link: dict[str, str], dark: bool, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    prefer_dark(tab.driver, dark)
    try:
        tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        tab.open("?darkMode=true" if dark else "", run=ASKED, view=view, **link)
        found = tab.script(
            """
            const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
            const behind = (e) => {
              for (let at = e; at; at = at.parentElement) {
                const colour = rgb(getComputedStyle(at).backgroundColor);
                if (colour.length === 3) return colour;
              }
              return [255, 255, 255];
            };
            const all = [...document.querySelectorAll(".told, .told .fact, .hint, .legend, .beside-head select")];
            const fits = (e) => e.scrollWidth <= e.clientWidth + 1 || getComputedStyle(e).display === "inline";
            return all.filter((e) => e.checkVisibility()).map((e) => [rgb(getComputedStyle(e).color).slice(0, 3),
                behind(e), e.textContent, fits(e)]);
            """
        )
        assert found
        for ink, ground, text, whole in found:
            assert contrast(ink, ground) >= 4.5, text
            assert whole, text
        assert tab.script("const e = document.scrollingElement; return e.scrollWidth <= e.clientWidth")
        tab.shot(f"asked-{view}-{'-'.join(link.values())}-{width}-{'dark' if dark else 'light'}")
    finally:
        tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "width": 1280})
