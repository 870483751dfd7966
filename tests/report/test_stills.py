import copy
import io
import pickle
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image

from globenc_lightning import METHODS, GlobEncCallback
from globenc_lightning.measurement import History, about, history_entry
from globenc_lightning.report import canvas, curves, fonts, stills
from globenc_lightning.report.heatmap import TABLE
from tests.report.test_fonts import RARE, write_font
from tests.report.test_images import LENGTHS, measured, probe
from tests.training import Sentences, SpoilsOne, Steps, build_trainer, fit, loader, tokenizer

SVG = "{http://www.w3.org/2000/svg}"
ODD = ("##ing", "<script>alert(1)</script>", "$x^2$", "a&b", "\n", "中文", "\u202e", "שלום")


def history(
    steps: Sequence[int] = (0, 5, 9), missing: Sequence[int] = (), methods: Sequence[str] = METHODS, **options: Any
) -> History:
    from globenc_lightning.settings import Settings

    found = [measured(seed=seed, methods=methods, **options) for seed in range(len(steps))]
    entries = [history_entry(one, step, 0) for one, step in zip(found, steps, strict=True)]
    told = about(found[-1], probe(torch.tensor([2, 1, 0])), Settings(methods), "texts that were given")
    return History(entries, replace(told, tokens=(*told.tokens[:2], ODD)), missing)


def texts(path: Path) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.parse(path).iter(f"{SVG}text")]


def fills(path: Path) -> dict[str, int]:
    """How many rectangles of each colour the drawing has."""
    found: dict[str, int] = {}
    for one in ElementTree.parse(path).iter(f"{SVG}path"):
        style = dict(part.split(": ") for part in one.get("style", "").split("; ") if ": " in part)
        found[style.get("fill", "")] = found.get(style.get("fill", ""), 0) + one.get("d", "").count("M")
    return found


@pytest.mark.parametrize("name", ["still.svg", "still.png", "STILL.SVG"])
def test_both_formats_are_written_and_the_path_comes_back(name: str, tmp_path: Path) -> None:
    for save in (history().save_sentence, history().save_correlation):
        path = save(str(tmp_path / name))
        assert path == tmp_path / name
        start = path.read_bytes()[:8]
        assert start == (b"\x89PNG\r\n\x1a\n" if name.endswith("png") else b"<?xml ve")


def test_a_sentence_shows_its_tokens_steps_rho_and_what_it_is(tmp_path: Path) -> None:
    made = history(missing=[7])
    for entry, rho in zip(made[:2], (-0.456, float("nan")), strict=True):
        entry.rho[list(entry.correlation).index("N-Enc"), 2, -1] = rho
    shown = texts(made.save_sentence(tmp_path / "a.svg", 2))
    assert "Example 2: the last layer's readout over training" in shown
    assert "N-Enc, unnormalised rollout, first token's row; label 0" in shown
    for token in ODD:
        assert canvas.visible(token, canvas.LABEL_LIMIT) in shown
    assert [one for one in shown if one in ("0", "5", "7", "9")][-4:] == ["0", "5", "7", "9"]
    assert "−0.46" in shown
    assert "undefined" in shown
    assert "no value" in shown


def test_a_sentence_has_the_colours_of_its_values(tmp_path: Path) -> None:
    made = history()
    table = canvas.colour_table(TABLE)
    for method in ("N-Enc", "W"):
        found = fills(made.save_sentence(tmp_path / "a.svg", 0, method=method))
        expected: dict[str, int] = {}
        for entry in made:
            row = entry.rows[method][0].double().numpy()
            for share in row / row.max():
                colour = "#" + bytes(table[round(float(share) * 255)].tolist()).hex()
                expected[colour] = expected.get(colour, 0) + 1
        # The colour scale adds one rectangle to some.
        assert all(count <= found[colour] <= count + 1 for colour, count in expected.items())
        assert sum(expected.values()) == 3 * LENGTHS[0]


def test_a_png_has_the_dots_that_were_asked_for(tmp_path: Path) -> None:
    sizes = {}
    for dpi in (100, 300):
        with Image.open(history().save_sentence(tmp_path / f"{dpi}.png", dpi=dpi)) as image:
            sizes[dpi] = image.size
            assert image.info["dpi"] == pytest.approx((dpi, dpi), abs=0.1)
    assert sizes[300] == pytest.approx(tuple(3 * side for side in sizes[100]), abs=3)


@pytest.mark.parametrize("by", ["layer", "training"])
def test_curves_are_the_ones_of_the_loggers_pictures(by: str, tmp_path: Path) -> None:
    """Where the text is rendered differs; the lines, bands and markers are the same to the pixel."""
    made = history(missing=[7])
    title = "A title"
    path = made.save_correlation(tmp_path / "a.png", by, title=title, dpi=100)
    still = np.asarray(Image.open(path).convert("RGB"))
    values = {method: made[-1].by_example[method].numpy() for method in METHODS}
    if by == "layer":
        picture = curves.correlation_by_layer(values, title=title, subtitle="x")
    else:
        from globenc_lightning.report.images import over_training

        steps, means, spread = over_training(made, [7])
        picture = curves.correlation_over_training(steps, means, spread=spread, title=title, subtitle="x")
    assert still.shape == picture.shape
    top = len(canvas.header(title, "x", curves.WIDTH)) + curves.ABOVE
    inside = (slice(top, top + 400), slice(70, 720))
    np.testing.assert_array_equal(still[inside], picture[inside])


def test_curves_name_their_methods_and_values(tmp_path: Path) -> None:
    made = history()
    shown = texts(made.save_correlation(tmp_path / "a.svg"))
    assert "Correlation of rollout and saliency by layer, step 9" in shown
    assert any("L2 gradient × input of the logit of the largest class" in one for one in shown)
    for method in METHODS:
        assert method in shown
        assert f"{float(made[-1].correlation[method][-1]):.2f}" in shown
    shown = texts(made.save_correlation(tmp_path / "a.svg", step=5, methods=["N-Enc", "W"]))
    assert "Correlation of rollout and saliency by layer, step 5" in shown
    assert [one for one in shown if one in METHODS] in (["N-Enc", "W"], ["W", "N-Enc"])
    assert f"{float(made[1].correlation['W'][-1]):.2f}" in shown
    shown = texts(made.save_correlation(tmp_path / "a.svg", "training", methods="N"))
    assert "Correlation of rollout and saliency over training" in shown
    assert "training step" in shown


def test_an_extension_of_the_paper_is_called_so(tmp_path: Path) -> None:
    made = history(rule="pre-LN", readout="last")
    for path in (made.save_sentence(tmp_path / "a.svg"), made.save_correlation(tmp_path / "b.svg")):
        together = " ".join(texts(path))
        assert "pre-LN, an extension of the paper" in together
        assert "last token's row" in together


def test_a_title_of_ones_own_or_none_at_all(tmp_path: Path) -> None:
    for save in (history().save_sentence, history().save_correlation):
        shown = texts(save(tmp_path / "a.svg", title="Mine <&> \x00"))
        assert shown[0] == r"Mine <&> \x00"
        path = save(tmp_path / "b.svg", title="")
        assert not any("rollout" in one for one in texts(path))
        assert float(ElementTree.parse(path).getroot().get("height", "").removesuffix("pt")) < 500


def test_the_same_history_gives_the_same_bytes(tmp_path: Path) -> None:
    made = history(missing=[7])
    for name in ("svg", "png"):
        first = [made.save_sentence(tmp_path / f"a.{name}"), made.save_correlation(tmp_path / f"b.{name}")]
        bytes_of = [path.read_bytes() for path in first]
        again = pickle.loads(pickle.dumps(made))
        again.save_sentence(first[0])
        again.save_correlation(first[1])
        assert [path.read_bytes() for path in first] == bytes_of
    assert b"Matplotlib" not in (tmp_path / "a.svg").read_bytes()


def test_nothing_of_matplotlib_is_changed_and_the_users_style_plays_no_part(tmp_path: Path) -> None:
    made = history()
    plain = [
        made.save_sentence(tmp_path / "a.svg").read_bytes(),
        made.save_correlation(tmp_path / "b.png").read_bytes(),
    ]
    with matplotlib.rc_context():
        matplotlib.rcParams.update(
            {"font.size": 30, "text.color": "red", "savefig.facecolor": "black", "savefig.bbox": "tight",
             "path.sketch": (1, 100, 2), "svg.fonttype": "path", "axes.prop_cycle": matplotlib.cycler(color=["k"])}
        )  # fmt: skip
        before = dict(matplotlib.rcParams)
        styled = [
            made.save_sentence(tmp_path / "a.svg").read_bytes(),
            made.save_correlation(tmp_path / "b.png").read_bytes(),
        ]
        assert dict(matplotlib.rcParams) == before
    assert styled == plain


def test_letters_that_the_font_does_not_have_are_no_trouble(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history().save_sentence(tmp_path / "a.svg", 2)
        history().save_sentence(tmp_path / "a.png", 2)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sentence", {"path": "a.jpg"}, r"must end in \.svg or \.png; got 'a\.jpg'"),
        ("correlation", {"path": "a"}, r"must end in \.svg or \.png; got 'a'"),
        ("sentence", {"example": 3}, "there is no example 3: the probe has 3, numbered from 0"),
        ("sentence", {"example": -1}, "there is no example -1"),
        ("sentence", {"example": "1"}, "there is no example '1'"),
        ("sentence", {"method": "N-Encc"}, "'N-Encc' was not computed; choose from W, "),
        ("correlation", {"methods": ["W", "X"]}, "'X' was not computed"),
        ("correlation", {"methods": []}, "at least one of W, "),
        ("correlation", {"by": "head"}, "by must be one of 'layer', 'training'; got 'head'"),
        ("correlation", {"step": 4}, r"nothing was analysed at step 4; the steps are 0, 5, 9\."),
        ("correlation", {"by": "training", "step": 5}, "step chooses one for by='layer'"),
        ("sentence", {"dpi": 0}, "dpi must be a whole number from 1 to 1200; got 0"),
        ("correlation", {"dpi": 99.5}, "dpi must be a whole number"),
    ],
)
def test_what_cannot_be_drawn_is_told(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = history()
    save = made.save_sentence if kind == "sentence" else made.save_correlation
    arguments: dict[str, Any] = {"path": tmp_path / "a.svg", **options}
    with pytest.raises(ValueError, match=message):
        save(**arguments)
    assert not list(tmp_path.iterdir())


def test_an_empty_history_is_told(tmp_path: Path) -> None:
    begun = history()
    begun.begin()
    for made in (History(), GlobEncCallback().history, begun):
        for save in (made.save_sentence, made.save_correlation):
            with pytest.raises(ValueError, match="the history is empty: nothing has been analysed yet"):
                save(tmp_path / "a.svg")


def test_a_history_that_is_cleared_begins_anew(tmp_path: Path) -> None:
    made = history(missing=(3,))
    entries = list(made)
    made.begin()
    made.clear()
    assert (list(made), made.latest, made.missing_steps, made.start) == ([], [], [], 0)
    assert made.reasons == []
    made.extend(entries)
    assert made.latest == entries
    assert made.save_sentence(tmp_path / "a.svg", 0).is_file()


def test_many_steps_are_shortened_in_the_message(tmp_path: Path) -> None:
    made = history(steps=range(0, 300, 10))
    with pytest.raises(ValueError, match=r"the steps are 0, 10, .*, 100, …, 290\."):
        made.save_correlation(tmp_path / "a.svg", step=1)


def test_many_validations_and_many_tokens_fit(tmp_path: Path) -> None:
    made = history(steps=range(300), missing=range(300, 330))
    path = made.save_sentence(tmp_path / "a.svg", 0)
    assert float(ElementTree.parse(path).getroot().get("height", "").removesuffix("pt")) < 800


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), "state"])
def test_a_history_travels_with_all_that_its_stills_need(copied: Any, tmp_path: Path) -> None:
    made = history(missing=[7])
    if copied == "state":
        file = io.BytesIO()
        torch.save(made.state_dict(), file)
        file.seek(0)
        again = History.from_state_dict(torch.load(file, weights_only=True))
    else:
        again = copied(made)
    assert isinstance(again, History)
    assert isinstance(again, list)
    assert again.about == made.about
    assert (again.missing_steps, again.start) == ([7], 0)
    for save in ("save_sentence", "save_correlation"):
        one, other = getattr(made, save)(tmp_path / "a.svg"), getattr(again, save)(tmp_path / "b.svg")
        assert one.read_bytes() == other.read_bytes()


def test_stills_of_a_training_and_of_the_one_after_it(tmp_path: Path) -> None:
    callback = GlobEncCallback(methods=("N-Enc", "W"), num_examples=4, tokenizer=tokenizer())
    fit(Steps(), callback, SpoilsOne(2), max_epochs=3, num_sanity_val_steps=0)
    assert [entry.step for entry in callback.history] == [1, 5]
    assert callback.history.missing_steps == [3]
    shown = texts(callback.history.save_sentence(tmp_path / "a.svg", 1))
    assert callback.probe is not None
    assert all(canvas.visible(token, canvas.LABEL_LIMIT) in shown for token in callback.probe.tokens[1])
    assert [one for one in shown if one in "135"][-3:] == ["1", "3", "5"]
    assert "no value" in shown
    fit(Steps(), callback, num_sanity_val_steps=0, val=loader(Sentences()))
    assert len(callback.history) == 4
    assert [entry.step for entry in callback.history.latest] == [0, 1]
    shown = texts(callback.history.save_sentence(tmp_path / "a.svg", 1))
    assert "no value" not in shown
    with pytest.raises(ValueError, match=r"the steps are 0, 1\."):
        callback.history.save_correlation(tmp_path / "a.svg", step=5)


def test_stills_from_a_checkpoint(tmp_path: Path) -> None:
    callback = GlobEncCallback(methods=("N-Enc", "W"), num_examples=4, tokenizer=tokenizer())
    trainer = fit(Steps(), callback, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = GlobEncCallback(methods=("N-Enc", "W"), num_examples=4)
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"][again.state_key]
    again.load_state_dict(state)
    assert again.history.about == callback.history.about
    one, other = callback.history.save_sentence(tmp_path / "a.svg"), again.history.save_sentence(tmp_path / "b.svg")
    assert one.read_bytes() == other.read_bytes()
    assert build_trainer([again]) is not None


def test_a_picture_is_drawn_with_a_font_of_the_machine_and_a_drawing_with_the_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_font(tmp_path / "Rare.ttf", "Rare", RARE)
    known = list(font_manager.fontManager.ttflist)
    made = history()
    assert made.about is not None
    tokens = (*made.about.tokens[:2], (f"▁{RARE}", *ODD[1:]))
    made = History(list(made), replace(made.about, tokens=tokens), ())
    written = {}
    for name, files in (("none", []), ("rare", [file])):
        found = fonts.Fonts(files)
        monkeypatch.setattr(fonts, "installed", lambda outlines=False, found=found: found)
        shown: list[str] = []
        setting = stills._set_texts
        monkeypatch.setattr(
            stills,
            "_set_texts",
            lambda scene, families, to=shown, run=setting: (to.extend(families), run(scene, families)),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            written[name] = made.save_sentence(tmp_path / f"{name}.png", 2, title=RARE).read_bytes()
        monkeypatch.setattr(stills, "_set_texts", setting)
        assert shown == (["DejaVu Sans", "sans-serif"] if name == "none" else ["DejaVu Sans", "Rare", "sans-serif"])
    assert written["none"] != written["rare"]
    assert font_manager.fontManager.ttflist == known
    drawing = made.save_sentence(tmp_path / "a.svg", 2)
    assert f"▁{RARE}" in texts(drawing)
    assert "Rare" not in drawing.read_text().replace("Rare.ttf", "")
