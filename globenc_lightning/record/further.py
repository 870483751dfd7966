"""What a record holds beside the saliency where it was asked for: references, signed scores, faithfulness.

Each has columns of its own, so that a record without them has none of these columns.

Axes: ``b`` example, ``l`` layer, ``k`` token, ``t`` the tokens of all examples, one after the other.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from globenc_lightning.faithfulness import Faithfulness
from globenc_lightning.measurement import Measurement
from globenc_lightning.record import schema
from globenc_lightning.settings import REFERENCES
from globenc_lightning.spelling import hyphenated

OF_EXAMPLES = ("gain", "sufficiency_gain", "log_odds", "span", "masked")
"""What ``Faithfulness`` holds of each example; all the rest is of the whole analysis."""


def token_columns(measurement: Measurement, dtype: Any) -> dict[str, NDArray[Any]]:
    """Returns the columns of ``tokens``, (t) each.

    Args:
        measurement: the figures.
        dtype: of the references and the signed scores.
    """
    found: dict[str, NDArray[Any]] = {}
    lengths = [len(one) for one in measurement.saliency]

    def whole(rows: Sequence[Tensor]) -> NDArray[Any]:
        # NaN where an example has none, since its signed scores did not add up to its score, say.
        nothing = (torch.full((size,), float("nan")) for size in lengths)
        each = [row.float() if len(row) else none for row, none in zip(rows, nothing, strict=True)]
        return np.asarray(torch.cat(each).numpy().astype(dtype))

    for reference in measurement.reference_correlation:
        rows = [one.get(reference, torch.empty(0)) for one in measurement.references]
        found[schema.reference_column(reference)] = whole(rows)
    if measurement.signed:
        found[schema.SIGNED[0]] = whole(measurement.signed)
    if measurement.faithfulness is not None:
        for method, flags in measurement.faithfulness.masked.items():
            # Of an example that could not be masked, no token was.
            rows = [one if len(one) == size else torch.zeros(size) for one, size in zip(flags, lengths, strict=True)]
            found[schema.masked_column(method)] = torch.cat(rows).bool().numpy()
    return found


def example_columns(pyarrow: Any, measurement: Measurement) -> dict[str, Any]:
    """Returns the columns of ``examples``, (b) each; null where an example has no figure, but for rho, as ever."""
    found: dict[str, Any] = {}
    for reference, by_method in measurement.reference_correlation.items():
        for method, rho in by_method.items():
            for layer, one in enumerate(rho.unbind(1), 1):
                found[schema.rho_with_column(reference, method, layer)] = one.double().numpy()
    if len(measurement.left_out):
        found[schema.LEFT_OUT[0]] = _or_null(pyarrow, measurement.left_out)
    faithfulness = measurement.faithfulness
    if faithfulness is not None:
        found[schema.SPAN[0]] = _or_null(pyarrow, faithfulness.span)
        for figure in schema.FAITHFULNESS_COLUMNS:
            for method, values in getattr(faithfulness, figure).items():
                found[schema.faithfulness_column(figure, method)] = _or_null(pyarrow, values)
    return found


def with_metadata(table: Any, measurement: Measurement) -> Any:
    """Returns the table of examples with what all of its masked copies have in common, in its file's metadata."""
    if measurement.faithfulness is None:
        return table
    told = json.dumps(how_masked(measurement.faithfulness)).encode()
    return table.replace_schema_metadata({**(table.schema.metadata or {}), schema.MASKING: told})


def how_masked(faithfulness: Faithfulness) -> dict[str, Any]:
    """Returns what all masked copies of an analysis have in common, in primitives: unit, share, passes."""
    return {name: value for name, value in vars(faithfulness).items() if name not in OF_EXAMPLES}


def said(measurement: Measurement, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run's file of choices says of it; nothing where there is nothing of it.

    Not every analysis of a run has all of it: it need not mask tokens, and what was asked for may be refused.

    Args:
        measurement: the newest figures.
        earlier: what the file says so far.
    """
    newest: dict[str, Sequence[str]] = {"references": [*measurement.reference_correlation]}
    if measurement.faithfulness is not None:
        newest["faithfulness"] = [*measurement.faithfulness.gain]
    found: dict[str, Any] = {}
    for name in ("references", "faithfulness"):
        every = [*dict.fromkeys([*earlier.get(name, ()), *newest.get(name, ())])]
        found |= {name: every} if every else {}
    return found | ({"signed": True} if measurement.signed or earlier.get("signed") else {})


def described(recorded: Mapping[str, Any], methods: Sequence[str], layers: int) -> dict[str, dict[str, str]]:
    """Returns what each column holds: kind of file -> column -> text.

    Args:
        recorded: what :func:`said` returned.
        methods: the methods.
        layers: how many layers there are.
    """
    tokens: dict[str, str] = {}
    examples: dict[str, str] = {}
    for reference in recorded.get("references", ()):
        tokens[schema.reference_column(reference)] = f"{MEANINGS.get(reference, reference)}; not negative"
        for method in methods:
            for layer in range(1, layers + 1):
                examples[schema.rho_with_column(reference, method, layer)] = (
                    f"Spearman's rho of the {method} row at layer {layer} with {reference}; NaN where undefined"
                )
    if recorded.get("signed"):
        tokens |= [schema.SIGNED]
        examples |= [schema.LEFT_OUT]
    masked = recorded.get("faithfulness", ())
    examples |= [schema.SPAN] if masked else []
    for method in masked:
        tokens[schema.masked_column(method)] = f"whether the token is among the first of {method}, which were masked"
        for figure, text in schema.FAITHFULNESS_COLUMNS.items():
            examples[schema.faithfulness_column(figure, method)] = text.format(method=method)
    return {schema.TOKENS: tokens, schema.EXAMPLES: examples}


MEANINGS = {
    "integrated gradients": "integrated gradients of the explained score (Sundararajan et al. 2017)",
    **dict.fromkeys(
        ("HTA", "exact HTA"),
        "hidden token attribution (Brunner et al. 2020): how far the row that is read depends on the token",
    ),
}
"""What each reference is, in words."""


def wanted(columns: Sequence[str]) -> list[str]:
    """Returns those of the columns of a file of tokens that :func:`restored` reads."""
    return [one for one in columns if one == schema.SIGNED[0] or one.startswith(("reference/", "masked/"))]


def restored(examples: Any, tokens: Any, per_example: Callable[[str], list[Tensor]]) -> dict[str, Any]:
    """Returns what a history's entry holds besides, as it was when it was written.

    Args:
        examples: the table of examples of an analysis.
        tokens: its table of tokens.
        per_example: gives a column of tokens, one (k,) float32 per example.
    """
    slugs = {hyphenated(one): one for one in REFERENCES}
    names = {schema.reference_column(one): one for one in REFERENCES}
    rho: dict[str, dict[str, list[Tensor]]] = {}
    for column in examples.column_names:
        kind, *named = column.split("/")
        if kind == "rho_with" and len(named) == 3 and named[0] in slugs:
            rho.setdefault(slugs[named[0]], {}).setdefault(named[1], []).append(_values(examples[column]).float())
    parts: dict[str, Any] = {
        "reference_rho": {
            reference: {method: torch.stack(one, 1) for method, one in by_method.items()}
            for reference, by_method in rho.items()
        },
        "references": {names[one]: _known(per_example(one)) for one in tokens.column_names if one in names},
    }
    if schema.SIGNED[0] in tokens.column_names:
        parts["signed"] = _known(per_example(schema.SIGNED[0]))
    if schema.LEFT_OUT[0] in examples.column_names:
        parts["left_out"] = _values(examples[schema.LEFT_OUT[0]])
    faithfulness = _faithfulness(examples, tokens, per_example)
    return parts if faithfulness is None else {**parts, "faithfulness": faithfulness}


def _faithfulness(examples: Any, tokens: Any, per_example: Callable[[str], list[Tensor]]) -> Faithfulness | None:
    if schema.SPAN[0] not in examples.column_names:
        return None
    told: Mapping[str, Any] = json.loads((examples.schema.metadata or {}).get(schema.MASKING, b"{}"))
    known = {one.name for one in fields(Faithfulness)}
    figures: dict[str, dict[str, Tensor]] = {figure: {} for figure in schema.FAITHFULNESS_COLUMNS}
    for column in examples.column_names:
        figure, _, method = column.partition("/")
        if figure in figures and method:
            figures[figure][method] = _values(examples[column])
    masked = {
        column.removeprefix("masked/"): [one.bool() for one in per_example(column)]
        for column in tokens.column_names
        if column.startswith("masked/")
    }
    return Faithfulness(
        gain=figures["gain"],
        sufficiency_gain=figures["sufficiency_gain"],
        log_odds=figures["log_odds"],
        span=_values(examples[schema.SPAN[0]]),
        masked=masked,
        **{name: value for name, value in told.items() if name in known},
    )


def _known(rows: list[Tensor]) -> list[Tensor]:
    """Rows (k,) as they were: an example that has none has an empty one."""
    return [row[:0] if bool(row.isnan().all()) else row for row in rows]


def _or_null(pyarrow: Any, values: Tensor) -> Any:
    """A column in which NaN is null, so that averages in SQL leave it out."""
    return pyarrow.array(values.numpy(), from_pandas=True)


def _values(column: Any) -> Tensor:
    """A column of numbers, NaN for null."""
    return torch.from_numpy(np.array(column.to_numpy()))
