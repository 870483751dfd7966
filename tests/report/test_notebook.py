from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from globenc_lightning import METHODS, Attributions, attribute
from globenc_lightning.report import canvas, notebook
from globenc_lightning.report.heatmap import TABLE
from tests.training import Sentences, classifier, tokenizer
from tests.vocabulary import byte_level_tokenizer

ODD = (
    "<script>alert(1)</script>",
    "a&b",
    '"x"',
    "'",
    "\n",
    "##ing",
    "中文",
    "\u202eabc",
    "שלום",
    "",
    "\ud800",
    "</span>",
)


class Page(HTMLParser):
    """The tokens of a page with their colours, in rows, and all other text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.rows: list[list[tuple[str, str, str]]] = []
        self.text = ""
        self.style: str | None = None
        self.depth = 0
        self.feed(html)
        assert self.depth == 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.depth += 1
        self.tags.add(tag)
        given = dict(attrs)
        assert set(given) <= {"style", "title"}
        if "line-height" in given.get("style", ""):
            self.rows.append([])
        if tag == "bdi":
            self.rows[-1].append(("", self.style or "", ""))
        elif "background" in given.get("style", ""):
            self.style = given["style"]

    def handle_endtag(self, tag: str) -> None:
        self.depth -= 1
        if tag == "span":
            self.style = None

    def handle_data(self, data: str) -> None:
        if self.style is None:
            self.text += data
        else:
            text, style, _ = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, style, "")


def found(size: int = 3, **options: Any) -> Attributions:
    return attribute(
        classifier().eval(), Sentences(size).first(size), methods=options.pop("methods", METHODS), **options
    )


def backgrounds(row: list[tuple[str, str, str]]) -> list[str]:
    return [dict(part.split(":") for part in style.split(";"))["background"] for _, style, _ in row]


def expected(values: np.ndarray) -> list[str]:
    table = canvas.colour_table(TABLE)
    return ["#" + bytes(table[round(float(share) * 255)].tolist()).hex() for share in values / values.max()]


def test_the_last_layer_stands_beside_the_saliency_in_its_own_colours() -> None:
    made = found()
    page = Page(made._repr_html_())
    assert len(page.rows) == 6
    for number in range(3):
        mask = made.attention_mask[number]
        row, saliency = page.rows[2 * number : 2 * number + 2]
        ids = [str(int(one)) for one in made.input_ids[number][mask]]
        assert [text for text, _, _ in row] == [text for text, _, _ in saliency] == ids
        assert backgrounds(row) == expected(made.rows["N-Enc"][number, -1][mask].double().numpy())
        assert backgrounds(saliency) == expected(made.saliency[number][mask].double().numpy())
        rho = float(made.correlation["N-Enc"][number, -1])
        answer, label = int(made.predicted[number]), int(made.truths[number][0])
        said = f"Example {number} · predicted class {answer} (softmax {float(made.probability[number]):.2f}), "
        said += f"label {label}: {'right' if answer == label else 'wrong'} · ρ = {rho:.2f}".replace("= -", "= −")
        assert said in page.text
    assert "N-Enc, last layer, unnormalised rollout, first token's row" in page.text


def test_it_needs_nothing_but_itself() -> None:
    html = found()._repr_html_()
    assert Page(html).tags == {"div", "span", "b", "bdi"}
    assert not any(word in html for word in ("<script", "http", "url(", "class=", "<style"))


def test_odd_tokens_are_text() -> None:
    made = found(2)
    tokens = [[ODD[place % len(ODD)] for place in range(int(mask.sum()))] for mask in made.attention_mask]
    html = made.to_html(tokens)
    page = Page(html)
    for number, one in enumerate(tokens):
        shown = [text for text, _, _ in page.rows[2 * number]]
        assert shown == [canvas.visible(token, notebook.TOKEN_LIMIT) for token in one]
    assert page.tags == {"div", "span", "b", "bdi"}
    html.encode()


def test_tokens_from_a_tokenizer_or_with_the_padding() -> None:
    made = found(4)
    named = [[text for text, _, _ in row] for row in Page(made.to_html(tokenizer())).rows[::2]]
    assert all(row[0] == "[CLS]" and row[-1] == "[SEP]" for row in named)
    width = made.attention_mask.shape[1]
    padded = [[f"t{number}.{place}" for place in range(width)] for number in range(4)]
    shown = [[text for text, _, _ in row] for row in Page(made.to_html(padded)).rows[::2]]
    assert shown == [one[: int(mask.sum())] for one, mask in zip(padded, made.attention_mask, strict=True)]


def test_tokens_of_a_byte_level_tokenizer_are_text() -> None:
    bytewise = byte_level_tokenizer([], 258)
    made = attribute(classifier(vocab_size=260), dict(bytewise(["é ж"], return_tensors="pt")))
    assert [text for text, _, _ in Page(made.to_html(bytewise)).rows[0]] == ["é", "⋯", "▁", "ж", "⋯"]


def test_positions_where_there_are_no_token_ids() -> None:
    page = Page(replace(found(1), input_ids=None).to_html())
    assert [text for text, _, _ in page.rows[0]] == [str(place) for place in range(len(page.rows[0]))]


def test_tokens_that_do_not_fit_are_refused() -> None:
    made = found(2)
    with pytest.raises(ValueError, match="there are 2 examples and tokens of 1; give one sequence per example"):
        made.to_html([["a"]])
    with pytest.raises(ValueError, match=r"example 0 has \d+ tokens; got 1"):
        made.to_html([["a"], ["b"]])
    with pytest.raises(ValueError, match="'X' was not computed; choose from W, "):
        made.to_html(method="X")


def test_what_is_too_much_is_counted() -> None:
    page = Page(found(11)._repr_html_())
    assert len(page.rows) == 2 * notebook.MAX_EXAMPLES
    assert "3 more examples not shown." in page.text
    made = found(2)
    page = Page(made.to_html(max_examples=1, max_tokens=3))
    assert "1 more example not shown." in page.text
    assert f"… and {int(made.attention_mask[0].sum()) - 3} more" in page.text
    assert [len(row) for row in page.rows] == [3, 3]


def test_other_methods_settings_and_rules_are_named() -> None:
    page = Page(found(1, methods=("N", "W"), normalize=True, readout="mean")._repr_html_())
    assert "W, last layer, row-normalised rollout, mean of all rows" in page.text
    assert "N, last layer" in Page(found(1).to_html(method="N")).text
    assert "(pre-LN, an extension of the paper)" in Page(replace(found(1), rule="pre-LN").to_html()).text
    made = found(1)
    assert "1 further call of an encoder" in Page(replace(made, others=(made,)).to_html()).text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision(dtype: torch.dtype) -> None:
    made = found(1)
    other = replace(made, rows={"N-Enc": made.rows["N-Enc"].to(dtype)}, saliency=made.saliency.to(dtype))
    assert len(Page(other._repr_html_()).rows) == 2


def test_an_undefined_rho_and_values_that_are_not_finite() -> None:
    made = found(1)
    rows = made.rows["N-Enc"].clone()
    rows[0, -1, 1] = float("nan")
    undefined = {method: torch.full_like(rho, float("nan")) for method, rho in made.correlation.items()}
    page = Page(replace(made, correlation=undefined, rows={"N-Enc": rows})._repr_html_())
    assert "ρ = undefined" in page.text


def test_ink_stands_out_from_every_colour_of_the_table() -> None:
    def luminance(colour: np.ndarray) -> float:
        channel = colour / 255
        linear = np.where(channel <= 0.04045, channel / 12.92, ((channel + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    for colour in canvas.colour_table(TABLE):
        ink = 0.0 if notebook._ink(colour) == "#000000" else 1.0
        low, high = sorted((luminance(colour.astype(float)), ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_the_page_is_text_that_a_notebook_shows(tmp_path: Path) -> None:
    html = found(1).to_html()
    assert html._repr_html_() == html == str(html)
    (tmp_path / "a.html").write_text(html, encoding="utf-8")


def test_padding_at_the_left_is_left_out() -> None:
    made = found(3)
    lengths = made.attention_mask.sum(1)
    number = int(lengths.argmin())
    length, width = int(lengths[number]), made.attention_mask.shape[1]
    assert length < width

    def one(values: torch.Tensor, shift: int = 0) -> torch.Tensor:
        return values[number : number + 1].roll(shift, -1)

    def alone(shift: int) -> Attributions:
        return replace(
            made,
            attention_mask=one(made.attention_mask, shift),
            input_ids=one(made.input_ids, shift),
            rows={method: one(rows, shift) for method, rows in made.rows.items()},
            saliency=one(made.saliency, shift),
        )

    assert Page(alone(width - length).to_html()).rows == Page(alone(0).to_html()).rows
    assert len(Page(alone(0).to_html()).rows[0]) == length
