"""Attributions as a piece of HTML for notebooks: coloured tokens, no script, nothing loaded from anywhere.

Every token brings its own background and ink, and everything else takes the notebook's colours, so it reads on light
and on dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from globenc_lightning.measurement import among_real, chances_of, value_of
from globenc_lightning.report import canvas
from globenc_lightning.report.heatmap import TABLE
from globenc_lightning.report.images import EXTENSION, READOUT_NAMES, rollout_name
from globenc_lightning.report.verdicts import MARKS, TokenName, Verdict, named_by, verdict
from globenc_lightning.tokenizers import naming

if TYPE_CHECKING:
    from torch import Tensor

    from globenc_lightning.attributions import Attributions

MAX_EXAMPLES = 8
MAX_TOKENS = 128
TOKEN_LIMIT = 40

_TOKEN = "display:inline-block;margin:1px;padding:0 4px;border-radius:3px;white-space:pre;box-shadow:0 0 0 1px #8888"
_FRAME = ";outline:2px solid #007acc;outline-offset:1px"
_ROW = "margin:2px 0;line-height:1.7"
_NAME = "display:inline-block;min-width:5.5em;opacity:.7"
_NOTE = "margin:4px 0;opacity:.7"


class Html(str):
    """A piece of HTML that a notebook shows as such, and that can be written to a file like any other text."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


def sentences(
    found: Attributions,
    tokens: Any = None,
    *,
    method: str | None = None,
    max_examples: int = MAX_EXAMPLES,
    max_tokens: int = MAX_TOKENS,
) -> Html:
    """Write every example's readout row of the last layer beside its saliency, as coloured tokens.

    Args:
        found: The attributions.
        tokens: A tokenizer, or one sequence of tokens per example, as long as the example with or without its padding;
            token ids, or positions, when None.
        method: One of the methods that were computed; N-Enc, or the last of them, when None.
        max_examples: At most so many examples; the others are counted.
        max_tokens: At most so many tokens of each; the others are counted.

    Returns:
        A `<div>` with inline styles.

    Raises:
        ValueError: If there is no such method, or the tokens do not fit the examples.
    """
    if method is None:
        method = "N-Enc" if "N-Enc" in found.methods else found.methods[-1]
    if method not in found.methods:
        raise ValueError(f"{method!r} was not computed; choose from {', '.join(found.methods)}.")
    masks = _array(found.attention_mask).astype(bool)
    names = _names(found, masks, tokens)
    rows, saliency = _array(found.rows[method][:, -1]), _array(found.saliency)
    rho = _array(found.correlation[method][:, -1])
    parts = []
    token_name = named_by(tokens) if hasattr(tokens, "convert_ids_to_tokens") else None
    for number in range(min(len(masks), max_examples)):
        mask = masks[number]
        said = _verdict(found, number, mask, names[number], token_name)
        value = "undefined" if np.isnan(rho[number]) else f"{rho[number]:.2f}".replace("-", "−")
        parts.append(
            f'<div style="margin:10px 0 2px"><b>Example {number}</b> · {escape(str(said))} · '
            f"ρ = {value}</div>"
            f"{_line(method, rows[number][mask], names[number], max_tokens, said.marked)}"
            f"{_line('saliency', saliency[number][mask], names[number], max_tokens, said.marked)}"
        )
    more = len(masks) - len(parts)
    if more:
        parts.append(f'<div style="{_NOTE}">{more} more example{"s" * (more > 1)} not shown.</div>')
    further = len(found.others)
    if further:
        parts.append(
            f'<div style="{_NOTE}">{further} further call{"s" * (further > 1)} of an encoder: see .others</div>'
        )
    framed = MARKS.get(found.task, "")
    about = (
        f"{escape(method)}{EXTENSION[found.rule]}, last layer, {rollout_name(found)}, {READOUT_NAMES[found.readout]}; "
        "each row is coloured as a share of its largest value; ρ is Spearman’s with the saliency"
        f"{f'; framed: {framed}' if framed else ''}"
    )
    return Html(f'<div style="font-size:13px">{"".join(parts)}<div style="{_NOTE}">{about}.</div></div>')


def _verdict(
    found: Attributions, number: int, mask: NDArray[np.bool_], tokens: Sequence[str], token_name: TokenName | None
) -> Verdict:
    """What an example was decided to be; places are counted among the real tokens."""
    answer = found.answers[number] if found.answers else (int(found.predicted[number]),)
    truth = found.truths[number] if found.truths else ()
    if found.task == "span":
        answer, truth = (among_real(one, found.attention_mask[number]) for one in (answer, truth))
    probability = () if found.probability is None else (float(found.probability[number]),)
    at = -1 if found.position is None else int(found.position[number])
    return verdict(
        found.task,
        answer,
        truth,
        chances=chances_of(found, number) if found.task == "multi-label" else probability,
        value=value_of(found, number),
        position=int(mask[:at].sum()) if at >= 0 else None,
        tokens=tokens,
        token_name=token_name,
        distance=found.distance,
    )


def _line(name: str, values: NDArray[Any], names: Sequence[str], max_tokens: int, marked: Sequence[int] = ()) -> str:
    share = canvas.shares(values[None])[0]
    index = np.round(np.where(np.isnan(share), 0.0, share) * 255).astype(np.intp)
    colours = canvas.colour_table(TABLE)[index]
    shown = "".join(
        f'<span style="{_TOKEN}{_FRAME * (place in marked)};background:{_hex(colour)};color:{_ink(colour)}" '
        f'title="{part:.2f}">'
        f"<bdi>{escape(canvas.visible(token, TOKEN_LIMIT))}</bdi></span>"
        for place, (token, colour, part) in enumerate(zip(names[:max_tokens], colours, share, strict=False))
    )
    more = len(names) - max_tokens
    rest = f' <span style="opacity:.7">… and {more} more</span>' if more > 0 else ""
    return f'<div style="{_ROW}"><span style="{_NAME}">{escape(name)}</span>{shown}{rest}</div>'


def _names(found: Attributions, masks: NDArray[np.bool_], tokens: Any) -> list[list[str]]:
    """What to write for every real token, (b), (k)."""
    ids = None if found.input_ids is None else _array(found.input_ids)
    if tokens is None or hasattr(tokens, "convert_ids_to_tokens"):
        if ids is None:
            return [[str(place) for place in np.flatnonzero(mask)] for mask in masks]
        name = naming(tokens)
        return [name([int(one) for one in row[mask]]) for row, mask in zip(ids, masks, strict=True)]
    given = [[str(token) for token in one] for one in tokens]
    if len(given) != len(masks):
        raise ValueError(f"there are {len(masks)} examples and tokens of {len(given)}; give one sequence per example.")
    names = []
    for number, (one, mask) in enumerate(zip(given, masks, strict=True)):
        real = int(mask.sum())
        if len(one) == real:
            names.append(one)
        elif len(one) >= len(mask):
            names.append([token for token, counts in zip(one, mask, strict=False) if counts])
        else:
            raise ValueError(f"example {number} has {real} tokens; got {len(one)}.")
    return names


def _array(values: Tensor) -> NDArray[Any]:
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()


def _hex(colour: NDArray[np.uint8]) -> str:
    return "#" + "".join(f"{int(channel):02x}" for channel in colour)


def _ink(colour: NDArray[np.uint8]) -> str:
    """Black or white, whichever stands out more from a background (relative luminance as WCAG defines it)."""
    channel = colour.astype(np.float64) / 255
    linear = np.where(channel <= 0.04045, channel / 12.92, ((channel + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "#000000" if luminance > 0.179 else "#ffffff"
