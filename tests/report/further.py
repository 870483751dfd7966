"""Histories with references, signed scores and faithfulness; ``python -m tests.report.further DIR`` draws one."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from globenc_lightning import METHODS, ProbeSet
from globenc_lightning.measurement import History, HistoryEntry, Measurement, about, history_entry
from globenc_lightning.report.canvas import Picture
from globenc_lightning.report.images import pictures
from globenc_lightning.settings import FURTHER_METHODS, Settings
from tests.further import REFERENCES, with_further
from tests.report.test_images import measured, probe

SETTINGS = Settings(METHODS, references=("saliency", *REFERENCES), signed=True)
MASKED = ("N-Enc", "W")


def found(seed: int, methods: Sequence[str] = METHODS, **options: Any) -> Measurement:
    """A measurement with everything."""
    plain = replace(measured(seed=seed, methods=methods), score=torch.tensor([2.5, -0.3, 0.001]))
    return with_further(plain, seed=seed, **{"masked": MASKED, **options})


def history(steps: Sequence[int] = (0, 5, 9), missing: Sequence[int] = (), **options: Any) -> History:
    """A history of such measurements."""
    return history_of([found(seed, **options) for seed in range(len(steps))], steps, missing)


def history_of(measurements: Sequence[Measurement], steps: Sequence[int], missing: Sequence[int] = ()) -> History:
    """A history of measurements that are given."""
    entries: list[HistoryEntry] = [history_entry(one, step, 0) for one, step in zip(measurements, steps, strict=True)]
    newest = measurements[-1]
    told = about(newest, of_probe(), Settings(tuple(newest.correlation), signed=bool(newest.signed)), "given texts")
    told = replace(told, references=("saliency", *newest.reference_correlation))
    masked = next((tuple(one.faithfulness.gain) for one in measurements if one.faithfulness is not None), ())
    return History(entries, replace(told, faithfulness=masked), missing)


def of_probe() -> ProbeSet:
    """The probe of these measurements."""
    return probe(torch.tensor([2, 1, 0]))


def drawn(made: History, newest: Measurement, settings: Settings = SETTINGS) -> dict[str, Picture]:
    """The pictures for loggers."""
    return pictures(newest, of_probe(), made.latest, made.missing_steps, settings)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    steps = (0, 5, 9, 14, 20)
    methods = (*METHODS, *FURTHER_METHODS)
    every = [found(seed, methods, masked=("N-Enc", "W", "N-Res", *FURTHER_METHODS)) for seed in range(len(steps))]
    made = history_of(every, steps, missing=[12])
    for tag, picture in drawn(made, every[-1], replace(SETTINGS, methods=methods)).items():
        if "heatmap" not in tag and "filmstrip" not in tag:
            Image.fromarray(picture).save(folder / f"{tag.replace('/', '_')}.png")
    made.save_sentence(folder / "still_signed.png", 2, signed=True, dpi=100)
    made.save_sentence(folder / "still_masked.png", 2, masked=True, dpi=100)
    made.save_correlation(folder / "still_correlation.png", reference="HTA", dpi=100)
    made.save_faithfulness(folder / "still_faithfulness.png", dpi=100)
