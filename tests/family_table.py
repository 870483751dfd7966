"""What a run finds of every family, and the page that tells it.

``python -m tests.family_table`` reads every family and writes ``docs/families.md``.
"""

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers

from globenc_lightning import METHODS, Attributions
from globenc_lightning.analysis import Reader, analyze
from globenc_lightning.errors import UnsupportedEncoderError
from globenc_lightning.settings import Settings
from tests.families import FAMILIES, Classifier, build, example_inputs

PAGE = Path(__file__).parents[1] / "docs" / "families.md"

HEADER = """\
# Encoder families

Written by `python -m tests.family_table`, which builds one small encoder of each family with random weights, reads it,
and measures how far the decomposition is from what the layers themselves compute. Nothing here is typed by hand.

Run with transformers {transformers}, torch {torch}, Python {python}.

- **Rule.** *post-LN*: GlobEnc as the paper has it. The other rules are **an extension of the paper**, not part of it;
  in all of them the residual stream is never normalised inside the layer, and the model's final norm acts in the last
  one. *pre-LN*: N-Res, N-ResLN and N-Enc take in attention and residual. *sublayer-norm*: the attention's output passes
  a norm of its own before it is added; every method of norms (N) takes it in, frozen. *parallel*: the feed-forward
  network works on the same input as the attention; N-Res, N-ResLN and N-Enc take in attention and residual. Numbers
  that a sub-layer's output or the residual stream is multiplied by (Granite, MiniCPM, DeepNorm) are taken in by every
  rule but sublayer-norm and parallel.
- **Error.** The largest reconstruction error over the layers, examples and kinds of attention: the distance between the
  decomposition and the layer's own output, each channel relative to its own size. In an analysis more than 1e-4
  (float32) or 1e-9 (float64) is an `UnsupportedEncoderError`, never a picture. Norms that compute in float32 whatever
  they are given (marked \\*) are held to 1e-4 in float64 too. *none*: transformers itself does not run the model in
  float64.
- **Refused.** An `UnsupportedEncoderError` says why, in these words.

| Family | Model class | Rule | Attention | Error, float32 | Error, float64 |
|---|---|---|---|---|---|
"""

REFUSED = """
## Refused

| Family | Model class | Reason |
|---|---|---|
"""


@dataclass(eq=False)
class Run:
    """One family with one kind of attention in one type, read.

    Attributes:
        model: the classifier that was read.
        reader: what is known of it, or None if it was refused.
        found: its attributions, or None.
        reason: why it was refused, or an empty string.
    """

    model: Classifier
    reader: Reader | None
    found: Attributions | None
    reason: str

    @property
    def error(self) -> float:
        """The largest reconstruction error, of the structure pass (all directions) and of the analysis."""
        assert self.reader is not None
        assert self.reader.structure is not None
        assert self.found is not None
        return max(*self.reader.structure.errors, float(self.found.reconstruction_error.max()))


@cache
def run(name: str, attention: str, dtype: torch.dtype) -> Run:
    """Read a family once, whoever asks."""
    family = next(one for one in FAMILIES if one.name == name)
    model = build(family, attention, dtype)
    reader = Reader(model)
    try:
        found = analyze(reader, example_inputs(family, dtype), Settings(METHODS, readout="cls"))
    except UnsupportedEncoderError as error:
        return Run(model, None, None, str(error))
    return Run(model, reader, found, "")


def page() -> str:
    """The page, from a run of every family."""
    supported, refused = [], []
    for family in FAMILIES:
        runs = {variant: run(family.name, *variant) for variant in family.variants}
        one = next(iter(runs.values()))
        start = f"| {family.name} | `{type(one.model.encoder).__name__}` |"
        if one.found is None:
            refused.append(f"{start} {one.reason.replace('|', '/')} |")
            continue
        errors = {}
        for dtype in (torch.float32, torch.float64):
            measured = [seen.error for (_, own), seen in runs.items() if own == dtype]
            errors[dtype] = f"{max(measured):.0e}" if measured else "none"
        kinds = ", ".join(dict.fromkeys(kind for kind, _ in runs)) if family.interface else "its own"
        mark = "" if family.exact else " \\*"
        supported.append(
            f"{start} {one.found.rule} | {kinds} | {errors[torch.float32]} | {errors[torch.float64]}{mark} |"
        )
    header = HEADER.format(
        transformers=transformers.__version__, torch=torch.__version__, python=platform.python_version()
    )
    return header + "\n".join(supported) + "\n" + REFUSED + "\n".join(refused) + "\n"


def written_with(text: str) -> str:
    """The version of transformers that a page was written with."""
    return re.findall(r"^Run with transformers (\S+),", text, flags=re.MULTILINE)[0]


def told(text: str) -> list[tuple[str, str, str]]:
    """What a page says of each family: name, model class, and the rule or the reason."""
    rows = re.findall(r"^\| (.+?) \| `(\w+)` \| (.+?) \|", text, flags=re.MULTILINE)
    return [(name, model, rule) for name, model, rule in rows]


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
