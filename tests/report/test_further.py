"""Pictures, stills and texts of references, signed scores and faithfulness."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from globenc_lightning import METHODS
from globenc_lightning.measurement import About, History, history_entry
from globenc_lightning.report import canvas, curves, further_curves, images, page, scales, signed
from globenc_lightning.settings import REFERENCES, Settings
from tests.report import further
from tests.report.test_curves import pixels_of
from tests.report.test_images import LENGTHS, drawn_of, measured

SVG = "{http://www.w3.org/2000/svg}"
FURTHER_TAGS = [
    "globenc/correlation/integrated-gradients/by_layer",
    "globenc/correlation/integrated-gradients/over_training",
    "globenc/correlation/HTA/by_layer",
    "globenc/correlation/HTA/over_training",
    "globenc/faithfulness/over_training",
    "globenc/faithfulness/sufficiency_over_training",
    "globenc/faithfulness/log_odds_over_training",
]


def texts(path: Path) -> str:
    return " | ".join("".join(one.itertext()) for one in ElementTree.parse(path).iter(f"{SVG}text"))


def moments(made: History) -> further_curves.Moments:
    return images.moments(made.latest, made.missing_steps)


def test_what_was_asked_for_has_pictures_and_nothing_else_has() -> None:
    plain = list(drawn_of(measured()))
    found = further.found(0)
    everything = further.drawn(further.history_of([found], [12]), found)
    assert [tag for tag in everything if tag in plain] == plain
    signed_tags = ["globenc/signed/example_00", "globenc/signed/example_02"]
    assert sorted(tag for tag in everything if tag not in plain) == sorted([*FURTHER_TAGS, *signed_tags])
    for options, tags in (
        ({"references": (), "signed": False, "masked": ()}, []),
        ({"references": ("HTA",), "signed": False, "masked": ()}, FURTHER_TAGS[2:4]),
        ({"references": (), "signed": True, "masked": ()}, signed_tags),
        ({"references": (), "signed": False, "masked": ("W",), "unit": "value"}, FURTHER_TAGS[4:6]),
    ):
        one = further.found(0, **options)  # type: ignore[arg-type]
        shown = further.drawn(further.history_of([one], [12]), one)
        assert sorted(set(shown) - set(plain)) == sorted(tags)
    # The pictures of the saliency are what they were.
    before = drawn_of(measured())
    assert all(np.array_equal(before[tag], everything[tag]) for tag in plain if "correlation" in tag)


def test_a_validation_that_masked_nothing_draws_no_faithfulness_anew() -> None:
    every = [further.found(0), further.found(1, masked=())]
    shown = further.drawn(further.history_of(every, [5, 9]), every[-1])
    assert [tag for tag in shown if "faithfulness" in tag] == []


def test_curves_of_a_reference_are_of_that_reference() -> None:
    made = further.history(missing=[7])
    for reference in further.REFERENCES:
        shown = further_curves.correlation_over_training(moments(made), reference, ["W", "N-Enc"])
        assert shown.x.tolist() == [0, 5, 7, 9]
        for method in ("W", "N-Enc"):
            rho = [entry.reference_rho[reference][method][:, -1].double().numpy() for entry in made]
            mean = [rho[0].mean(), rho[1].mean(), np.nan, rho[2].mean()]
            np.testing.assert_allclose(shown.means[method], mean, rtol=1e-12)
            low, high = stats.t.interval(0.95, 2, loc=rho[2].mean(), scale=stats.sem(rho[2]))
            np.testing.assert_allclose(shown.halves[method][-1], (high - low) / 2, rtol=1e-12)
        layers = further_curves.correlation_by_layer(made[-1], reference, ["W"])
        by_layer = made[-1].reference_rho[reference]["W"].double().mean(0).numpy()
        np.testing.assert_allclose(layers.means["W"], by_layer, rtol=1e-12)
    assert "integrated gradients" in scales.correlation("integrated gradients").name
    assert scales.correlation("saliency") == curves.CORRELATION


@pytest.mark.parametrize("figure", further_curves.FIGURES)
def test_curves_of_faithfulness_are_means_with_their_intervals(figure: str) -> None:
    made = further.history(missing=[7])
    shown = further_curves.faithfulness_over_training(moments(made), figure, ["N-Enc", "W"])
    # A validation that failed is no gap in what need not be measured at every validation.
    assert shown.x.tolist() == [0, 5, 9]
    for method in ("N-Enc", "W"):
        for place, entry in enumerate(made):
            assert entry.faithfulness is not None
            values = getattr(entry.faithfulness, figure)[method].double().numpy()
            values = values[np.isfinite(values)]
            assert len(values) == (3 if figure == "log_odds" else 2)
            low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
            np.testing.assert_allclose(shown.means[method][place], values.mean(), rtol=1e-6)
            np.testing.assert_allclose(shown.halves[method][place], (high - low) / 2, rtol=1e-6)
    caption = " ".join(shown.caption)
    assert "95 % confidence interval" in caption
    if figure == "log_odds":
        assert "n = 3" in caption
        assert "No example is left out." in caption
        assert shown.references == {}
    else:
        assert "n = 2" in caption
        assert "Left out: 1 of 3 examples" in caption
        assert shown.references == {"random": 0.0}
        assert "0: no better than random" in shown.scale.name
    assert "20 %" in shown.scale.name
    # The axis' name ends within the picture.
    assert canvas.text_width(shown.scale.name, canvas.SMALL_SIZE) < curves.WIDTH - 2 * canvas.MARGIN


def test_an_axis_of_gains_holds_every_mean_and_says_where_bands_are_cut() -> None:
    wide = further_curves.faithfulness_over_training(moments(further.history()), "gain", ["N-Enc"])
    assert wide.scale.low >= -1.1
    assert wide.scale.high <= 1.1
    assert "wider than the axis" in " ".join(wide.caption)
    found = further.found(0, left_out=())
    assert found.faithfulness is not None
    for gains in ([1.7, 1.7, 1.8], [-1.4, -1.4, -1.5], [0.3, 0.3, 0.31]):
        figures = replace(found.faithfulness, gain={"N-Enc": torch.tensor(gains)})
        made = further.history_of([replace(found, faithfulness=figures)], [0])
        shown = further_curves.faithfulness_over_training(moments(made), "gain", ["N-Enc"])
        mean = float(shown.means["N-Enc"][0])
        assert shown.scale.low < min(mean, 0)
        assert shown.scale.high > max(mean, 0)
        assert ("wider than the axis" in " ".join(shown.caption)) is (abs(mean) > 1)


def test_no_gain_at_all_is_drawn_as_no_line() -> None:
    made = further.history(left_out=(0, 1, 2))
    shown = further_curves.faithfulness_over_training(moments(made), "gain", ["N-Enc"])
    picture = curves.picture(shown, "title", "")
    assert picture.shape[1] == curves.WIDTH
    assert len(pixels_of(picture, "N-Enc")) == 0
    assert "n = 0" in " ".join(shown.caption)


def test_two_sided_colours_have_nothing_in_the_middle() -> None:
    rows = np.array([[2.0, -1.0, 0.0, np.nan], [-4.0, 1.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    found = signed.two_sided(rows)
    np.testing.assert_allclose(found[0, :3], [1.0, 0.25, 0.5])
    assert np.isnan(found[0, 3])
    np.testing.assert_allclose(found[1], [0.0, 0.625, 0.5, 0.5625])
    np.testing.assert_allclose(found[2], 0.5)
    table = canvas.colour_table(signed.TABLE).astype(int)
    assert table[127:129].min() > 240
    # Blue at one end and red at the other.
    assert table[0, 2] > table[0, 0] + 50
    assert table[-1, 0] > table[-1, 2] + 50


@pytest.mark.parametrize("kind", ["protan", "deutan", "tritan"])
def test_both_sides_can_be_told_apart_by_a_colour_blind_person(kind: str) -> None:
    # Machado, Oliveira & Fernandes 2009, severity 1: what is left of linear red, green and blue.
    matrix = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }[kind]
    table = canvas.colour_table(signed.TABLE) / 255
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(matrix).T, 0, 1)
    shown = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055) * 255
    for share in (0.25, 0.5, 0.75, 1.0):
        against, favour = shown[round(127.5 - 127.5 * share)], shown[round(127.5 + 127.5 * share)]
        assert np.abs(against - favour).max() > 40 * min(1, 2 * share), (kind, share)


def test_signed_scores_are_drawn_in_the_colours_of_their_values_beside_what_they_leave_out() -> None:
    found = further.found(3)
    shown = further.drawn(further.history_of([found], [12]), found)
    table = canvas.colour_table(signed.TABLE)
    for example in (0, 2):
        row = found.signed[example].double().numpy()
        colours = [tuple(table[round(float(part) * 255)]) for part in signed.two_sided(row[None])[0]]
        picture = shown[f"globenc/signed/example_{example:02d}"]
        for colour in colours:
            count = int((picture == np.array(colour)).all(axis=2).sum())
            assert count >= 400, (example, colour)


def test_stills_of_signed_scores_say_the_score_and_what_is_left_out(tmp_path: Path) -> None:
    made = further.history(missing=[7])
    shown = texts(made.save_sentence(tmp_path / "a.svg", 0, signed=True))
    for entry in made:
        for value in (entry.score[0], entry.left_out[0]):
            assert signed.number(float(value)) in shown
    for word in ("score", "left out", "−1", "red raises, blue lowers", "no value", "label 2"):
        assert word in shown
    fills = [
        dict(part.split(": ") for part in one.get("style", "").split("; ") if ": " in part).get("fill")
        for one in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}path")
    ]
    table = canvas.colour_table(signed.TABLE)
    for entry in made:
        for part in signed.two_sided(entry.signed[0].double().numpy()[None])[0]:
            assert "#" + bytes(table[round(float(part) * 255)].tolist()).hex() in fills


def test_a_validation_of_another_text_has_no_contributions_to_these_tokens() -> None:
    made = further.history()
    other = replace(made[1], signed=[torch.ones(2), *made[1].signed[1:]])
    found = signed.timeline([(0, made[0]), (5, other), (7, None), (9, made[2])], 0)
    assert found is not None
    assert np.isnan(found.rows).all(axis=1).tolist() == [False, True, True, False]
    assert np.isnan(found.left_out).tolist() == [False, True, True, False]
    picture = signed.contributions(found, ["a"] * LENGTHS[0], title="t", others=[1])
    flat = picture.reshape(-1, 3)
    assert (flat == np.array(canvas.OTHER_HATCH)).all(axis=1).any()


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.50"), (-0.438, "−0.44"), (0.0, "0.00"), (0.001, "1e−03"), (float("nan"), "–")], ids=str
)
def test_numbers_beside_a_row(value: float, text: str) -> None:
    assert signed.number(value) == text


def test_masked_tokens_are_framed(tmp_path: Path) -> None:
    made = further.history()
    for entry in made:
        assert entry.faithfulness is not None
        entry.faithfulness.masked["N-Enc"][0] = torch.tensor([False, True, True, False, False])
    shown = texts(made.save_sentence(tmp_path / "a.svg", 0, masked=True))
    assert "token that was masked" in shown
    plain = made.save_sentence(tmp_path / "b.svg", 0)
    assert "token that was masked" not in texts(plain)
    # One frame around the two tokens of all three steps, and the one in the key.
    frames = [one for one in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}path") if "#007acc" in str(one.attrib)]
    assert len(frames) == 2


def test_stills_of_curves_are_of_what_was_asked_for(tmp_path: Path) -> None:
    made = further.history()
    for by in ("layer", "training"):
        shown = texts(made.save_correlation(tmp_path / "a.svg", by, reference="HTA"))
        assert "Correlation of rollout and HTA" in shown
        assert "Spearman’s ρ with HTA" in shown
        assert "gradient × input" not in shown
    shown = texts(made.save_faithfulness(tmp_path / "b.svg"))
    assert "gain over masking random tokens" in shown
    assert "random" in shown.split(" | ")
    assert "N-Res" not in shown
    shown = texts(made.save_faithfulness(tmp_path / "b.svg", "log_odds", methods="W", title=""))
    assert "N-Enc" not in shown
    assert "random" not in shown.split(" | ")


@pytest.mark.parametrize(
    ("act", "options", "message"),
    [
        (lambda made, path: made.save_correlation(path, reference="LRP"), {}, "choose from 'saliency', 'integrated"),
        (lambda made, path: made.save_correlation(path, reference="HTA"), {"references": ()}, r"references=\['HTA'\]"),
        (lambda made, path: made.save_faithfulness(path), {"masked": ()}, "faithfulness=True"),
        (lambda made, path: made.save_faithfulness(path, "rho"), {}, "'gain', 'sufficiency_gain', 'log_odds'"),
        (lambda made, path: made.save_faithfulness(path, methods=["N"]), {}, "choose from N-Enc, W"),
        (lambda made, path: made.save_faithfulness(path, methods=[]), {}, "at least one of N-Enc, W"),
        (lambda made, path: made.save_faithfulness(path, "log_odds"), {"unit": "value"}, "the score is a value"),
        (
            lambda made, path: made.save_sentence(path, signed=True),
            {"signed": False},
            r"GlobEncCallback\(signed=True\)",
        ),
        (lambda made, path: made.save_sentence(path, signed=True, masked=True), {}, "leave method= and masked= out"),
        (lambda made, path: made.save_sentence(path, signed=True, method="N"), {}, "leave method= and masked= out"),
        (lambda made, path: made.save_sentence(path, masked=True, method="N"), {}, "choose from N-Enc, W"),
        (lambda made, path: made.save_sentence(path, masked=True), {"masked": ()}, "faithfulness=True"),
    ],
    ids=[
        *("unknown-reference", "no-reference", "not-measured", "unknown-figure", "unknown-method", "no-method"),
        *("log-odds", "not-signed", "signed-masked", "signed-method", "masked-method", "not-masked"),
    ],
)
def test_what_is_not_there_says_what_to_write(
    act: Callable[[Any, Path], Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        act(further.history(**options), tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def told(**options: Any) -> tuple[About, Any]:
    made = further.history(**options)
    assert made.about is not None
    return made.about, made[-1].faithfulness


def test_the_text_says_what_was_asked_for_and_nothing_else() -> None:
    about, figures = told()
    text = page.markdown(about, (), figures)
    for words in (
        "integrated gradients of the logit",
        "hidden token attribution",
        "DecompX",
        "first 20 %",
        "Left out is",
    ):
        assert words in text
    assert "0 is no better than random" in text
    assert "`N-Enc`, `W`" in text
    assert "It takes 5 forward passes" in text
    choices = dict(page.tables(about, (), figures)["choices"][1])  # type: ignore[arg-type]
    assert {
        "compared with HTA, too",
        "compared with integrated gradients, too",
        "signed scores",
        "faithfulness",
    } <= set(choices)
    plain, _ = told(references=(), signed=False, masked=())
    text = page.markdown(plain)
    for words in ("integrated gradients", "HTA", "signed", "masked", "flow", "faithful"):
        assert words not in text
    assert "probability" not in page.markdown(told(unit="value")[0], (), told(unit="value")[1])


def test_an_attention_flow_is_called_one_everywhere(tmp_path: Path) -> None:
    made = further.history()
    assert made.about is not None
    made.about = replace(made.about, aggregation="maxflow")
    assert "unnormalised attention flow" in page.markdown(made.about)
    assert "| rollout |" not in page.markdown(made.about)
    shown = texts(made.save_correlation(tmp_path / "a.svg"))
    assert "Correlation of attention flow and saliency" in shown
    assert "rollout" not in shown
    assert images.rollout_name(Settings(METHODS, aggregation="maxflow", normalize=True)) == (
        "row-normalised attention flow"
    )


def test_charts_are_laid_out_for_what_is_computed() -> None:
    plain = page.layout({"globenc": page.Charted(("N-Enc",))})["globenc"]
    assert list(plain) == ["last layer, all methods", "N-Enc, all layers"]
    charted = page.Charted(("N-Enc",), ("integrated gradients",), ("N-Enc",))
    charts = page.layout({"globenc_2": charted})["globenc_2"]
    patterns = [pattern for _, [pattern] in charts.values()]
    assert patterns == [
        "^globenc_2/spearman/.*$",
        "^globenc_2/spearman_with/integrated-gradients/.*$",
        "^globenc_2/faithfulness/.*$",
        "^globenc_2/sufficiency_gain/.*$",
        "^globenc_2/log_odds/.*$",
        r"^globenc_2/spearman_by_layer/N-Enc/layer_\d+$",
        r"^globenc_2/spearman_with_by_layer/integrated-gradients/N-Enc/layer_\d+$",
    ]


def test_a_text_remembers_what_was_measured_at_an_earlier_validation() -> None:
    # Not every validation masks tokens, and a text that changes each time would be written each time.
    every = [further.found(0), further.found(1, masked=())]
    made = further.history_of(every, [5, 9])
    newest = next(entry.faithfulness for entry in reversed(made) if entry.faithfulness is not None)
    assert made.about is not None
    assert "It takes 5 forward passes" in page.markdown(made.about, (), newest)
    assert history_entry(every[1], 9, 0).faithfulness is None


def test_every_reference_and_any_later_one_has_words() -> None:
    assert set(REFERENCES) <= set(images.REFERENCE_WORDS)
    one = further.found(0, references=("HTA", "exact HTA", "a later one"))
    made = further.history_of([one], [12])
    shown = further.drawn(made, one)
    assert {f"globenc/correlation/{name}/by_layer" for name in ("HTA", "exact-HTA", "a-later-one")} <= set(shown)
    assert made.about is not None
    assert "a later one" in page.markdown(made.about)


def test_contributions_that_one_validation_lacks_leave_a_gap() -> None:
    made = further.history()
    gone = replace(made[2], signed=[torch.empty(0), *made[2].signed[1:]])
    found = signed.timeline([(0, made[0]), (5, made[1]), (9, gone)], 0)
    assert found is not None
    assert np.isnan(found.rows).all(axis=1).tolist() == [False, False, True]
    assert signed.timeline([(9, gone)], 0) is None
    assert signed.timeline([(9, None)], 0) is None
