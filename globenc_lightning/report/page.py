"""A run's choices and its probe in words: for TensorBoard's Text tab, and for other loggers that take texts or tables.

Tokens stand in code. TensorBoard renders markdown with Python-Markdown and strips all but plain tags; whatever markdown
might take for its own is written as an entity, in a `<code>` element.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from globenc_lightning.faithfulness import Faithfulness
from globenc_lightning.measurement import About
from globenc_lightning.report import further_texts
from globenc_lightning.report.canvas import visible
from globenc_lightning.report.images import (
    EXTENSION,
    READOUT_NAMES,
    aggregate_name,
    drawn_method,
    rollout_name,
    target_words,
)
from globenc_lightning.report.publish import Tables
from globenc_lightning.settings import TARGETS
from globenc_lightning.spelling import hyphenated

REASON_COLUMNS = ("first at step", "why")
MAX_EXAMPLES = 64
"""So many examples are shown one by one, in texts and in the tab; means and curves are of the whole probe."""
MAX_TOKENS = 128
TOKEN_LIMIT = 80
MAX_REASONS = 20

FAITHFULNESS_CHARTS = {
    "faithfulness: gain over random tokens": "faithfulness",
    "sufficiency: gain over random tokens": "sufficiency_gain",
    "log-odds lost by masking": "log_odds",
}
"""Title of a chart -> the tags that it shows."""

_TRUTH = {"regression": "target", "span": "true answer", "multi-label": "labels"}
_PLAIN = re.compile(r"[\w#.,:;!?/'\"()\[\]{}+=%@$^~*-]+")
_WORD = re.compile(r"[^\W_]")
_READABLE = re.compile(r"[^\W_]|[ ,;/'\"%?]")
_DIGITS = re.compile(r"[0-9.]+e[-+][0-9]+")

Reason = tuple[int, str]
"""A step, and why there are no figures at it."""


def markdown(about: About | None, reasons: Sequence[Reason] = (), faithfulness: Faithfulness | None = None) -> str:
    """Write what a run's figures are of, and why there are none.

    Args:
        about: All of it; None before there are figures.
        reasons: Why there are no figures, and at which steps.
        faithfulness: The newest figures of masked copies, or None.

    Returns:
        Markdown: a table of the choices, one of the sentences, and one of the reasons.
    """
    why = [] if not reasons else ["**No figures, and why**", "", *_table(REASON_COLUMNS, _reasons(reasons, prose))]
    if about is None:
        return "\n".join(["**GlobEnc: this run has no figures so far**", "", *why]) + "\n"
    choices, sentences = _choices(about, code, faithfulness), _sentences(about)
    lines = ["**GlobEnc: what the figures of this run are of**", "", *_table(("choice", "value"), choices), ""]
    lines += [f"**The probe: {_counted(len(about.tokens), 'example')}**", "", *_table(_columns(about), sentences)]
    left_out = _left_out(about)
    lines += ["", left_out] if left_out else []
    return "\n".join([*lines, "", *why] if why else lines) + "\n"


def tables(about: About | None, reasons: Sequence[Reason] = (), faithfulness: Faithfulness | None = None) -> Tables:
    """Return the same as plain tables, for loggers that show tables: ``choices``, ``probe`` and ``reasons``."""
    why: Tables = {"reasons": (REASON_COLUMNS, _reasons(reasons, str))} if reasons else {}
    if about is None:
        return why
    plain = [
        [
            str(number),
            *([] if not _has_labels(about) else [_label(about, number, visible)]),
            " ".join(map(visible, one)),
        ]
        for number, one in enumerate(about.tokens[:MAX_EXAMPLES])
    ]
    chosen = _choices(about, str, faithfulness)
    return {
        "choices": (("choice", "value"), [[name, re.sub("[*`]", "", value)] for name, value in chosen]),
        "probe": (_columns(about), plain),
        **why,
    }


class Charted(NamedTuple):
    """What a callback computes, as far as charts are laid out for it.

    Attributes:
        methods: The methods.
        references: What they are compared with besides the saliency.
        faithfulness: The methods whose first tokens are masked.
    """

    methods: Sequence[str]
    references: Sequence[str] = ()
    faithfulness: Sequence[str] = ()


def layout(charted: Mapping[str, Charted]) -> dict[str, dict[str, list[Any]]]:
    """Lay out TensorBoard's Custom Scalars tab.

    Args:
        charted: What every callback of a Trainer computes, by its tag.

    Returns:
        What ``SummaryWriter.add_custom_scalars`` takes: a category per callback; in it one chart with the last layer's
        rho of all methods, one for each further reference, those of faithfulness, and one per method with all its
        layers.
    """
    return {tag: _charts(tag, one) for tag, one in charted.items()}


def _charts(tag: str, charted: Charted) -> dict[str, list[Any]]:
    charts = {"last layer, all methods": f"^{tag}/spearman/.*$"}
    for reference in charted.references:
        charts[f"last layer, all methods, with {reference}"] = f"^{tag}/spearman_with/{hyphenated(reference)}/.*$"
    if charted.faithfulness:
        charts |= {title: f"^{tag}/{name}/.*$" for title, name in FAITHFULNESS_CHARTS.items()}
    for method in charted.methods:
        charts[f"{method}, all layers"] = rf"^{tag}/spearman_by_layer/{method}/layer_\d+$"
        for reference in charted.references:
            below = f"^{tag}/spearman_with_by_layer/{hyphenated(reference)}"
            charts[f"{method}, all layers, with {reference}"] = rf"{below}/{method}/layer_\d+$"
    return {title: ["Multiline", [tags]] for title, tags in charts.items()}


def code(token: str) -> str:
    """Write a token as code that markdown leaves alone, every part of it visible.

    Args:
        token: Any string.

    Returns:
        A code span, or a `<code>` element where a character might mean something to markdown, a table or a browser.
    """
    text = visible(token, TOKEN_LIMIT)
    if _PLAIN.fullmatch(text):
        return f"`{text}`"
    return f"<code>{''.join(one if _WORD.match(one) else f'&#{ord(one)};' for one in text)}</code>"


def prose(text: str) -> str:
    """Write a text of several lines into a table's cell, every character of it as itself.

    Args:
        text: Any string.

    Returns:
        Markdown with line breaks, and an entity for whatever might mean something to markdown or a browser.
    """
    lines = [visible(line.strip()) for line in text.splitlines() if line.strip()]
    return "<br>".join("".join(one if _READABLE.match(one) else f"&#{ord(one)};" for one in line) for line in lines)


def _reasons(reasons: Sequence[Reason], written: Any) -> list[list[str]]:
    """Each reason once, with the first step at which it was met."""
    first: dict[str, Reason] = {}
    for step, text in reasons:
        # The same refusal tells another error at every step.
        first.setdefault(_DIGITS.sub("", text), (step, text.removeprefix("GlobEncCallback: ")))
    rows = [[str(step), written(text)] for step, text in [*first.values()][:MAX_REASONS]]
    more = len(first) - len(rows)
    return [*rows, ["…", f"{more} more"]] if more else rows


def _choices(about: About, as_code: Any, faithfulness: Faithfulness | None) -> list[tuple[str, str]]:
    extension = EXTENSION[about.rule]
    target = target_words(about.target, about.score)
    if about.target not in TARGETS:
        target = f"the target {as_code(about.target)}"
    special = "left out of the correlation" if about.exclude_special_tokens else "counted, as in the paper"
    # Earlier versions kept no score and knew classifiers alone.
    decision = [("decision", about.task)] if about.score else []
    found = [("found in", as_code(about.call))] if about.call else []
    text = [("text that is shown", as_code(about.text))] if about.text else []
    return [
        *decision,
        *found,
        ("encoder", as_code(about.encoder)),
        *text,
        ("rule", _rule(about.rule) if extension else "post-LN, the paper's"),
        ("methods", ", ".join(map(as_code, about.methods))),
        ("drawn in the pictures", as_code(drawn_method(about))),
        (aggregate_name(about), f"{rollout_name(about)} (normalize={about.normalize}){_flow(about)}"),
        ("readout", f"{about.readout}: {READOUT_NAMES[about.readout]}"),
        ("saliency", f"L2 norm of gradient × input of {target}"),
        *further_texts.choices(about, target, as_code, faithfulness),
        ("special tokens", special),
        ("probe", f"{as_code(about.probe)}: {about.origin}"),
        *([("shown one by one", shown_words(len(about.tokens)))] if len(about.tokens) > MAX_EXAMPLES else []),
    ]


def _flow(about: About) -> str:
    """What an attention flow is; nothing of a rollout."""
    if about.aggregation != "maxflow":
        return ""
    return (
        ": the largest flow from the row that is read to each token, with the maps as capacities (Abnar & Zuidema 2020)"
    )


def _rule(rule: str) -> str:
    """An extension of the paper, and which terms it takes in where its name does not say so."""
    terms = {
        "sublayer-norm": ": attention through its own norm, residual, the last norm",
        "parallel": ": attention, residual, the last norm; not the feed-forward network, which works on the same input",
    }
    return f"{rule}, **an extension that is not in the paper**{terms.get(rule, '')}"


def shown_words(size: int) -> str:
    """Returns which examples of a large probe are shown one by one, in words; empty where all of them are."""
    return f"the first {MAX_EXAMPLES} of {size:,} examples" if size > MAX_EXAMPLES else ""


def _sentences(about: About) -> list[list[str]]:
    rows = []
    for number, tokens in enumerate(about.tokens[:MAX_EXAMPLES]):
        shown = " ".join(map(code, tokens[:MAX_TOKENS])) or "no tokens"
        if len(tokens) > MAX_TOKENS:
            shown += f" … and {len(tokens) - MAX_TOKENS} more"
        label = [_label(about, number, prose)] if _has_labels(about) else []
        rows.append([str(number), *label, shown])
    return rows


def _has_labels(about: About) -> bool:
    return any(about.truths) or any(label is not None for label in about.labels)


def _label(about: About, number: int, written: Any) -> str:
    """What the data say of an example; earlier versions kept classes alone."""
    if about.truths:
        return written(about.truths[number]) if about.truths[number] else ""
    label = about.labels[number]
    return "" if label is None else str(label)


def _columns(about: About) -> list[str]:
    return ["example", *([_TRUTH.get(about.task, "label")] if _has_labels(about) else []), "tokens"]


def _left_out(about: About) -> str:
    more = len(about.tokens) - MAX_EXAMPLES
    return f"{_counted(more, 'more example')} not shown." if more > 0 else ""


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
