"""The layout of a record on disk: its files, their columns, and what each column holds.

A record is a folder that one run or many runs share::

    tokens/run=<name>/step-00000049.parquet     attributions: a row per token of each example
    examples/run=<name>/step-00000049.parquet   decisions and correlations: a row per example
    probe/run=<name>/probe.parquet              the text: a row per token of each example
    about/<name>.json                           choices, seed, hyperparameters, versions, what each column is

``run=<name>`` is the partition that pandas, polars, DuckDB and Spark turn into a column ``run``. This module knows
names alone: it imports neither pyarrow nor torch.
"""

import re
import zlib
from pathlib import Path

from globenc_lightning.spelling import hyphenated

SCHEMA = 1
"""The number of this layout; it grows when a reader of today could no longer read what is written."""

TOKENS, EXAMPLES, PROBE, ABOUT = "tokens", "examples", "probe", "about"

TOKEN_COLUMNS = {
    "step": ("int64", "the step at which the figures are logged, that of the validation's own metrics"),
    "example": ("int32", "the number of the example in the probe, from 0"),
    "position": ("int32", "the number of the token in the example, from 0, padding left out"),
    "saliency": ("float", "gradient x input of the explained score, L2 norm over the hidden size"),
}
"""Columns of ``tokens``, before one column ``<method>/<NN>`` for each method and layer: the readout row's share."""

EXAMPLE_COLUMNS = {
    "step": ("int64", "the step at which the figures are logged, that of the validation's own metrics"),
    "epoch": ("int32", "the training's epoch"),
    "example": ("int32", "the number of the example in the probe, from 0"),
    "task": ("string", "the kind of decision"),
    "score": ("float", "the score that is explained, whose gradient the saliency is"),
    "predicted": (
        "int64",
        "the class, token, choice or partner that is decided; a span's first token; null for a value",
    ),
    "label": ("double", "the class, token, choice or value that the data say; a span's first token; null if unknown"),
    "loss": (
        "double",
        "of the decision in the task's usual form: cross entropy, binary cross entropy (mean over labels), squared "
        "error; the module's own loss where the task is loss; null where there is no label",
    ),
    "logits": ("list<float>", "of the decision; empty where it is over a vocabulary of more than 1,000 entries"),
    "text_hash": ("string", "tells one text from another: of its token ids, else of what the step was given"),
    "probability": ("float", "of what is decided; null where it has none"),
    "value": ("double", "of a regression, a similarity or a loss; null for other tasks"),
    "answers": ("list<int64>", "all that is decided: one class, the labels that hold, a span's first and last token"),
    "truths": ("list<double>", "what the data say, in the same form; empty where unknown"),
    "decided_position": ("int32", "the token that the decision is read at; null where it is read at several"),
    "validation": ("bool", "whether a validation asked for it; false for at_steps= and for a replayed checkpoint"),
}
"""Columns of ``examples``, before one column ``rho/<method>/<NN>`` for each method and layer: Spearman's rho."""

FAITHFULNESS_COLUMNS = {
    "gain": (
        "how much more the score falls with the first tokens of {method} masked than with as many random ones, as a "
        "share of the column span; 0 is no better than random; null where span is too small to divide by"
    ),
    "sufficiency_gain": (
        "how much more of the score is kept by the first tokens of {method} alone than by as many random ones, as a "
        "share of the column span; null where it is too small"
    ),
    "log_odds": (
        "log-odds of what is decided on the whole text, less those with the first tokens of {method} masked; null "
        "where unknown"
    ),
}
"""Columns of ``examples`` where faithfulness was asked for: one ``gain/<method>`` for each method, and so on."""

SPAN = ("span", "the score of the whole text less that of the text with every token masked; null where unknown")
"""A column of ``examples`` where faithfulness was asked for."""

SIGNED = ("signed", "the token's signed contribution to the score; see left_out")
"""A column of ``tokens`` where signed scores were asked for."""

LEFT_OUT = ("left_out", "the score less the sum of the example's signed contributions: what biases contribute")
"""A column of ``examples`` where signed scores were asked for."""

MASKING = b"globenc_masking"
"""The key in the metadata of a file of ``examples`` below which it stands how the masked copies were made."""

PROBE_COLUMNS = {
    "example": ("int32", "the number of the example in the probe, from 0"),
    "position": ("int32", "the number of the token in the example, from 0, padding left out"),
    "token_id": ("int64", "its id; null where the encoder is not called with ids"),
    "token": ("string", "the token as the pictures show it"),
    "word": ("int32", "the number of the word that the token belongs to; null for special tokens and where unknown"),
    "special": ("bool", "whether it is a special token; null where no tokenizer is known"),
    "label": ("double", "the label that the probe's data give the example; null where unknown"),
    "text": ("string", "the text that the probe was made of, or its tokens put together; null where unknown"),
}
"""Columns of ``probe``."""

LONGEST_NAME = 160
"""So many characters of a run's name are kept."""

_STEP = re.compile(r"step-(\d+)\.parquet")
_PLAIN = re.compile(r"[^A-Za-z0-9._+-]+")


def attribution_column(method: str, layer: int) -> str:
    """Returns the column of a method's readout row at a layer, counted from 1: ``N-Enc/01``."""
    return f"{method}/{layer:02d}"


def rho_column(method: str, layer: int) -> str:
    """Returns the column of a method's correlation with the saliency at a layer, counted from 1: ``rho/N-Enc/01``."""
    return f"rho/{attribution_column(method, layer)}"


def reference_column(reference: str) -> str:
    """Returns the column of ``tokens`` that holds a further reference: ``reference/integrated-gradients``."""
    return f"reference/{hyphenated(reference)}"


def rho_with_column(reference: str, method: str, layer: int) -> str:
    """Returns the column of a method's correlation with a further reference: ``rho_with/HTA/N-Enc/01``."""
    return f"rho_with/{hyphenated(reference)}/{attribution_column(method, layer)}"


def masked_column(method: str) -> str:
    """Returns the column of ``tokens`` that says which tokens were masked for a method: ``masked/N-Enc``."""
    return f"masked/{method}"


def faithfulness_column(figure: str, method: str) -> str:
    """Returns the column of a figure of faithfulness, one of ``FAITHFULNESS_COLUMNS``: ``gain/N-Enc``."""
    return f"{figure}/{method}"


def parsed_column(column: str) -> tuple[str, int] | None:
    """Returns the method and the layer of such a column, or None if it is another one."""
    method, slash, layer = column.removeprefix("rho/").rpartition("/")
    return (method, int(layer)) if slash and layer.isdigit() else None


def run_name(name: str) -> str:
    """Returns a name that can stand in a path and in a partition: other characters become one hyphen.

    The end of a long name becomes a number that is made of it, since file systems allow 255 characters.
    """
    plain = _PLAIN.sub("-", name).strip("-.") or "run"
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 9]}-{zlib.crc32(plain.encode()):08x}"


def step_file(folder: Path, kind: str, run: str, step: int) -> Path:
    """Returns the file of ``tokens`` or ``examples`` at a step."""
    return folder / kind / f"run={run}" / f"step-{step:08d}.parquet"


def probe_file(folder: Path, run: str) -> Path:
    """Returns the file that holds the probe's text."""
    return folder / PROBE / f"run={run}" / "probe.parquet"


def about_file(folder: Path, run: str) -> Path:
    """Returns the file that holds the choices, the versions and what each column is."""
    return folder / ABOUT / f"{run}.json"


def step_of(file: Path) -> int | None:
    """Returns the step that a file is of, or None if its name tells none."""
    found = _STEP.fullmatch(file.name)
    return int(found[1]) if found else None
