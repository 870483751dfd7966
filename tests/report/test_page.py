import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.plugin_util import markdown_to_safe_html

from globenc_lightning import METHODS
from globenc_lightning.measurement import About
from globenc_lightning.report import page, publish
from globenc_lightning.report.canvas import visible
from tests.training import events

ODD = (
    "##ing", "|", "a|b", "`", "``", "`a`", "*", "**bold**", "_", "__x__", "<script>alert(1)</script>", "<b>", "&amp;",
    "&", "\\", "\\|", "\n", "a\nb", "\r", "\t", "\x00", "\x1b[0m", " ", "  a ", "", "שלום", "مرحبا", "\u202eabc",
    "中文", "😀", "[link](javascript:x)", "![i](x)", "http://a.b", "$x$", "~~", "> q", "- item", "1.", "# h", "---",
    "\ud800", "é", "▁word", "Ġthe", "a" * 200, "'", '"', "&#124;", "\\`", "\u200d", "\u00a0", "x\u0301",
)  # fmt: skip


def about(**changes: Any) -> About:
    made = About(
        encoder="model.bert",
        rule="post-LN",
        methods=METHODS,
        normalize=False,
        target="predicted",
        readout="cls",
        exclude_special_tokens=False,
        probe="0123456789ab",
        origin="the first 2 examples that the validation showed",
        tokens=(("[CLS]", "a", "##ing", "[SEP]"), ("[CLS]", "b", "[SEP]")),
        labels=(1, 0),
    )
    return replace(made, **changes)


class Rendered(HTMLParser):
    """The cells of the tables that a browser would show, the texts in code apart."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.code: list[list[str]] = []
        self.inside = self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not attrs
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.code.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        if tag == "code":
            self.code[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "code"
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.code[-1][-1] += data
        if self.in_cell:
            self.rows[-1][-1] += data


def rendered(text: str) -> Rendered:
    """As TensorBoard's Text tab renders it, from the bytes of an event file."""
    return Rendered(markdown_to_safe_html(text.encode()))


def test_the_choices_are_all_there() -> None:
    shown = rendered(page.markdown(about()))
    assert shown.rows[1:10] == [
        ["encoder", "model.bert"],
        ["rule", "post-LN, the paper's"],
        ["methods", ", ".join(METHODS)],
        ["drawn in the pictures", "N-Enc"],
        ["rollout", "unnormalised rollout (normalize=False)"],
        ["readout", "cls: first token's row"],
        ["saliency", "L2 norm of gradient \N{MULTIPLICATION SIGN} input of the predicted class"],
        ["special tokens", "counted, as in the paper"],
        ["probe", "0123456789ab: the first 2 examples that the validation showed"],
    ]
    assert shown.rows[10:] == [
        ["example", "label", "tokens"],
        ["0", "1", "[CLS] a ##ing [SEP]"],
        ["1", "0", "[CLS] b [SEP]"],
    ]
    assert shown.code[11] == ["[CLS]", "a", "##ing", "[SEP]"]
    assert set(shown.tags) == {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "code"}


@pytest.mark.parametrize(
    ("changes", "rows", "column"),
    [
        (
            {"task": "regression", "score": "the value", "call": "validation_step: mse_loss", "truths": ("0.5", "")},
            {"decision": "regression", "saliency": "the value", "found in": "validation_step: mse_loss"},
            ["target", "0.5", ""],
        ),
        (
            {"task": "span", "score": "largest start logit + largest end logit", "truths": ("“a|b”, token 2", "")},
            {"decision": "span", "saliency": "the largest start logit + largest end logit"},
            ["true answer", "“a|b”, token 2", ""],
        ),
        (
            {"task": "similarity", "score": "similarity", "text": "text 2 of 2, <b>", "labels": (None, None)},
            {"decision": "similarity", "text that is shown": "text 2 of 2, <b>"},
            None,
        ),
    ],
    ids=["regression", "span", "pair"],
)
def test_the_decision_is_told_in_words(changes: dict[str, Any], rows: dict[str, str], column: list[str] | None) -> None:
    shown = rendered(page.markdown(about(**changes))).rows
    told = {row[0]: row[1] for row in shown}
    for name, text in rows.items():
        assert told[name].endswith(text)
    assert [row[1] for row in shown[-3:]] == column if column else shown[-3] == ["example", "tokens"]
    (columns, plain) = page.tables(about(**changes))["probe"]
    assert [columns[1], *(row[1] for row in plain)] == column if column else list(columns) == ["example", "tokens"]


def test_other_choices_are_told() -> None:
    text = page.markdown(
        about(
            rule="pre-LN",
            methods=("N", "W"),
            normalize=True,
            target="my_<b>_target|",
            readout="last",
            exclude_special_tokens=True,
            labels=(None, None),
        )
    )
    shown = {row[0]: row[1] for row in rendered(text).rows}
    assert shown["rule"] == "pre-LN, an extension that is not in the paper"
    assert shown["drawn in the pictures"] == "W"
    assert shown["rollout"] == "row-normalised rollout (normalize=True)"
    assert shown["readout"] == "last: last token's row"
    assert shown["saliency"].endswith("target my_<b>_target|")
    assert shown["special tokens"] == "left out of the correlation"
    assert shown["example"] == "tokens"
    assert shown["0"] == "[CLS] a ##ing [SEP]"


def test_odd_tokens_survive_tensorboards_rendering() -> None:
    shown = rendered(page.markdown(about(tokens=(ODD, ("plain",)))))
    assert shown.code[11] == [visible(token, page.TOKEN_LIMIT) for token in ODD]
    assert shown.code[12] == ["plain"]
    assert [len(row) for row in shown.rows[10:]] == [3, 3, 3]
    assert not {"script", "b", "a", "img"} & set(shown.tags)
    # What markdown could mistake is shown as it is, and what cannot be seen as an escape.
    for token in ("a|b", "`a`", "**bold**", "<script>alert(1)</script>", "\\|", "שלום", "中文", "😀", "&#124;", "\\`"):
        assert token in shown.code[11]
    assert {r"a\nb", r"\x00", "(empty)", "␣", "‹U+202E›abc", "U+D800"} <= set(shown.code[11])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec=None), max_size=12) | st.text("|`\\<>&*_#[]()!~\n \t\"'", max_size=8), min_size=1
    )
)
def test_any_token_survives_tensorboards_rendering(tokens: list[str]) -> None:
    shown = rendered(page.markdown(about(tokens=(tuple(tokens), ("end",)))))
    assert shown.code[11:] == [[visible(token, page.TOKEN_LIMIT) for token in tokens], ["end"]]


def test_what_is_too_much_is_counted() -> None:
    text = page.markdown(about(tokens=(("x",) * 130,) * 66, labels=(0,) * 66))
    shown = rendered(text)
    assert shown.rows[10] == ["shown one by one", "the first 64 of 66 examples"]
    assert len(shown.rows) == 12 + page.MAX_EXAMPLES
    assert shown.rows[12][2].endswith("x … and 2 more")
    assert "the first 64 of 4,000 examples" in page.markdown(about(tokens=(("x",),) * 4000, labels=(0,) * 4000))
    assert "shown one by one" not in page.markdown(about(tokens=(("x",),) * 64, labels=(0,) * 64))
    assert "2 more examples not shown." in text
    assert "1 more example not shown." in page.markdown(about(tokens=(("x",),) * 65, labels=(0,) * 65))


def test_an_example_without_tokens_is_called_so() -> None:
    assert rendered(page.markdown(about(tokens=((), ("a",))))).rows[11] == ["0", "1", "no tokens"]


WHY = "GlobEncCallback: ValueError: <script>alert(1)</script> | *b* `c` _d_ [x](y)\n    forward=lambda: m(b)\n\x00 end"
SHOWN_WHY = r"ValueError: <script>alert(1)</script> | *b* `c` _d_ [x](y)forward=lambda: m(b)\x00 end"


def test_reasons_stand_alone_before_there_are_figures() -> None:
    text = page.markdown(None, [(4, WHY)])
    shown = rendered(text)
    assert "no figures so far" in text
    assert "**No figures, and why**" in text
    assert shown.rows == [["first at step", "why"], ["4", SHOWN_WHY]]
    assert set(shown.tags) == {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert shown.tags.count("br") == 2


def test_reasons_stand_below_the_figures_each_once() -> None:
    reasons = [(2, "misses by 1.5e-03, allowed"), (4, "misses by 2.25e-02, allowed"), (6, "another")]
    shown = rendered(page.markdown(about(), reasons))
    assert shown.rows[1] == ["encoder", "model.bert"]
    assert shown.rows[-3:] == [["first at step", "why"], ["2", "misses by 1.5e-03, allowed"], ["6", "another"]]
    assert "No figures" not in page.markdown(about())
    many = rendered(page.markdown(None, [(step, f"reason {step}") for step in range(30)]))
    assert len(many.rows) == 2 + page.MAX_REASONS
    assert many.rows[-1] == ["…", "10 more"]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec=None), max_size=30) | st.text("|`\\<>&*_#[]()!~\n \t\"'1.-+=", max_size=20))
def test_any_reason_survives_tensorboards_rendering(reason: str) -> None:
    shown = rendered(page.markdown(None, [(0, f"a{reason}z")]))
    lines = [visible(line.strip()) for line in f"a{reason}z".splitlines() if line.strip()]
    assert shown.rows[1:] == [["0", "".join(lines)]]


def test_reasons_are_a_table_for_those_who_show_tables() -> None:
    assert page.tables(None) == {}
    table = (("first at step", "why"), [["4", WHY.removeprefix("GlobEncCallback: ")]])
    assert page.tables(None, [(4, WHY)]) == {"reasons": table}
    assert list(page.tables(about(), [(4, WHY)])) == ["choices", "probe", "reasons"]


@pytest.mark.parametrize(
    ("rule", "terms"),
    [
        ("sublayer-norm", "attention through its own norm, residual, the last norm"),
        ("parallel", "attention, residual, the last norm; not the feed-forward network, which works on the same input"),
    ],
)
def test_an_extension_says_which_terms_it_takes_in(rule: str, terms: str) -> None:
    shown = {row[0]: row[1] for row in rendered(page.markdown(about(rule=rule))).rows}
    assert shown["rule"] == f"{rule}, an extension that is not in the paper: {terms}"


def test_plain_tables() -> None:
    tables = page.tables(about(tokens=(("a|b", "\n"), ("*",)), rule="pre-LN"))
    assert tables["probe"] == (["example", "label", "tokens"], [["0", "1", r"a|b \n"], ["1", "0", "*"]])
    columns, rows = tables["choices"]
    assert columns == ("choice", "value")
    assert dict(rows)["encoder"] == "model.bert"
    assert dict(rows)["rule"] == "pre-LN, an extension that is not in the paper"
    assert dict(rows)["saliency"] == "L2 norm of gradient \N{MULTIPLICATION SIGN} input of the predicted class"


def test_the_page_goes_through_an_event_file(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="run", version="0")
    text = page.markdown(about(tokens=(ODD, ("plain",))))
    assert publish.log_text(logger, "globenc/about", text, {}, 3)
    logger.finalize("success")
    event = events(logger.log_dir).Tensors("globenc/about/text_summary")[0]
    assert event.step == 3
    assert event.tensor_proto.string_val[0].decode() == text


def test_the_layout_is_read_by_tensorboards_plugin(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="run", version="0")
    tags = [f"globenc{end}" for end in ("", "_2")]
    names = [f"spearman/{method}" for method in METHODS]
    names += [f"spearman_by_layer/{method}/layer_{layer:02d}" for method in METHODS for layer in (1, 2, 12)]
    publish.log_scalars([logger], {f"{tag}/{name}": 0.5 for tag in tags for name in names}, 0)
    assert publish.log_layout(
        logger, page.layout({"globenc": page.Charted(METHODS), "globenc_2": page.Charted(("N", "W"))})
    )
    logger.finalize("success")
    found, read = custom_scalars(tmp_path)
    assert list(found) == ["globenc", "globenc_2"]
    assert list(found["globenc"]) == ["last layer, all methods", *(f"{method}, all layers" for method in METHODS)]
    assert read(found["globenc"]["last layer, all methods"]) == {f"globenc/spearman/{method}" for method in METHODS}
    for tag, methods in (("globenc", METHODS), ("globenc_2", ("N", "W"))):
        for method in methods:
            assert read(found[tag][f"{method}, all layers"]) == {
                f"{tag}/spearman_by_layer/{method}/layer_{layer:02d}" for layer in (1, 2, 12)
            }


def custom_scalars(folder: Path) -> tuple[dict[str, dict[str, list[str]]], Any]:
    """What TensorBoard's Custom Scalars plugin finds below a folder: the charts' patterns, and how it reads one."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
    from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin

    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    plugins: dict[str, Any] = {}
    context = TBContext(
        data_provider=data_provider.MultiplexerDataProvider(multiplexer, str(folder)), plugin_name_to_instance=plugins
    )
    plugins["scalars"] = ScalarsPlugin(context)
    plugin = CustomScalarsPlugin(context)
    found = json.loads(plugin.layout_impl(RequestContext(), ""))
    charts = {
        category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
        for category in found["category"]
    }
    (run,) = multiplexer.Runs()

    def read(patterns: list[str]) -> set[str]:
        (pattern,) = patterns
        answer = plugin.scalars_impl(RequestContext(), run, pattern, "")
        assert answer["regex_valid"]
        return set(answer["tag_to_events"])

    return charts, read


@pytest.mark.parametrize("token", ["word", "##ing", "[CLS]"])
def test_plain_tokens_stay_readable_in_the_source(token: str) -> None:
    assert page.code(token) == f"`{token}`"
