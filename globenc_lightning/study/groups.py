"""Groups of examples: by label, right or wrong, and region of the data map."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from globenc_lightning.record.libraries import load_pandas
from globenc_lightning.study.compare import right_or_wrong
from globenc_lightning.study.frames import examples
from globenc_lightning.study.loading import Run

REGIONS = ("easy", "ambiguous", "hard")


def groups(runs: Sequence[Run]) -> Any:
    """Returns a row per run and example with the groups that it belongs to.

    - ``label``: what the data say;
    - ``right``: whether the last analysis decides so;
    - ``confidence``, ``variability``: mean and standard deviation, over the validations, of the probability that the
      model gives the label (Swayamdipta et al. 2020, Dataset Cartography, section 2; population standard deviation, as
      there), from the logits in the record: softmax, or sigmoid of a single logit;
    - ``region``: ``"ambiguous"`` for the third of the examples with the largest variability; of the others, ``"easy"``
      where the confidence is at least one half, and ``"hard"`` below.

    What cannot be told (a value, several labels, no label, a vocabulary without logits) is missing.

    Columns: run, seed, example, label, right, confidence, variability, region.
    """
    pandas = load_pandas()
    table = examples(runs)
    table["sure"] = [
        _probability(logits, label, task)
        for logits, label, task in zip(table["logits"], table["label"], table["task"], strict=True)
    ]
    last = right_or_wrong(runs).sort_values("step").drop_duplicates(["run", "example"], keep="last")
    watched = table[table["validation"]] if table["validation"].any() else table
    each = watched.groupby(["run", "example"], sort=False)["sure"]
    found = pandas.DataFrame({"confidence": each.mean(), "variability": each.std(ddof=0)}).reset_index()
    labels = table.drop_duplicates(["run", "example"], keep="last")[["run", "seed", "example", "label"]]
    joined = labels.merge(last[["run", "example", "right"]], on=["run", "example"])
    joined = joined.merge(found, on=["run", "example"], how="left")
    joined["region"] = None
    for _, part in joined.groupby("run", sort=False):
        joined.loc[part.index, "region"] = _regions(part["confidence"].to_numpy(), part["variability"].to_numpy())
    return joined.reset_index(drop=True)


def _probability(logits: Sequence[float], label: float | None, task: str) -> float:
    """What a model gives the label of an example."""
    values = np.asarray(logits, dtype=np.float64)
    if not values.size or label is None or np.isnan(label) or task in ("multi-label", "span", "regression"):
        return float("nan")
    if values.size == 1:
        return float(expit(values[0] if label >= 0.5 else -values[0]))
    place = int(label)
    if not 0 <= place < values.size:
        return float("nan")
    shifted = np.exp(values - values.max())
    return float(shifted[place] / shifted.sum())


def _regions(confidence: Any, variability: Any) -> list[str | None]:
    known = np.flatnonzero(~np.isnan(confidence) & ~np.isnan(variability))
    # Ties are broken by the order of the examples, so that a third stays a third.
    order = known[np.argsort(-variability[known], kind="stable")]
    ambiguous = set(order[: round(len(known) / 3)].tolist())
    return [
        None if place not in known else "ambiguous" if place in ambiguous else "easy" if sure >= 0.5 else "hard"
        for place, sure in enumerate(confidence.tolist())
    ]
