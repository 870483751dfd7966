"""What is written to a logger of what was asked for besides, under the tags of which callback, and what is not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from globenc_lightning.measurement import History
from globenc_lightning.reasons import Reasons
from globenc_lightning.report.output import Destination, Output, by_layer, monitored
from globenc_lightning.report.page import Charted
from globenc_lightning.settings import Settings
from tests.report import further
from tests.training import events

METHODS = ("N-Enc", "W")
PLAIN: dict[str, Any] = {"references": (), "signed": False, "masked": ()}


def written(folder: Path, tag: str = "globenc", charted: Charted | None = None, **options: Any) -> Any:
    """Two validations' results, as they are in the event file."""
    every = [further.found(seed, METHODS, **options) for seed in range(2)]
    made = further.history_of(every, [5, 9])
    assert made.about is not None
    settings = Settings(METHODS, references=made.about.references, signed=made.about.signed)
    logger = TensorBoardLogger(str(folder), name="", version="run")
    output = Output(settings, 1, Reasons("raise"))
    layouts = {} if charted is None else {tag: charted}
    for place, one in enumerate(every):
        so_far = History(made[: place + 1], made.about)
        shown = replace(one, last={0: one.last[0]})
        scalars = {**monitored(one, tag), **by_layer(one, tag)}
        to = Destination([logger], tag, 0.0, layouts)
        output.write(to, shown, further.of_probe(), so_far, None, scalars, [])
    logger.experiment.flush()
    return events(folder / "run")


def tags(log: Any, kind: str) -> set[str]:
    return {tag for tag in log.Tags()[kind] if "dashboard" not in tag}


@pytest.mark.parametrize("prefix", ["globenc", "globenc_2"])
def test_everything_has_its_tags_under_the_callback_s_own_name(prefix: str, tmp_path: Path) -> None:
    log = written(tmp_path / "all", prefix)
    plain = written(tmp_path / "plain", prefix, **PLAIN)
    assert {tag.split("/")[0] for tag in tags(log, "scalars") | tags(log, "images")} == {prefix}
    slugs = ("integrated-gradients", "HTA")
    more = {f"{prefix}/spearman_with/{slug}/{method}" for slug in slugs for method in METHODS}
    more |= {
        f"{prefix}/spearman_with_by_layer/{slug}/{method}/layer_{layer:02d}"
        for slug in slugs
        for method in METHODS
        for layer in range(1, 5)
    }
    more |= {
        f"{prefix}/{one}/{method}" for one in ("faithfulness", "sufficiency_gain", "log_odds") for method in METHODS
    }
    assert tags(log, "scalars") - tags(plain, "scalars") == more
    assert tags(plain, "scalars") <= tags(log, "scalars")
    pictures = {f"{prefix}/correlation/{slug}/{by}" for slug in slugs for by in ("by_layer", "over_training")}
    pictures |= {
        f"{prefix}/faithfulness/{name}"
        for name in ("over_training", "sufficiency_over_training", "log_odds_over_training")
    }
    assert tags(log, "images") - tags(plain, "images") == {*pictures, f"{prefix}/signed/example_00"}
    assert tags(plain, "images") == {
        f"{prefix}/{name}"
        for name in (
            *("heatmap/layers/example_00", "heatmap/last_layer/example_00", "filmstrip/example_00"),
            *("correlation/by_layer", "correlation/over_training"),
        )
    }
    assert [point.step for point in log.Scalars(f"{prefix}/faithfulness/N-Enc")] == [5, 9]
    wanted = [monitored(further.found(seed, METHODS), prefix)[f"{prefix}/faithfulness/N-Enc"] for seed in range(2)]
    assert [point.value for point in log.Scalars(f"{prefix}/faithfulness/N-Enc")] == pytest.approx(wanted)


def test_what_no_example_has_is_not_written_rather_than_zero(tmp_path: Path) -> None:
    log = written(tmp_path, left_out=(0, 1, 2))
    assert "globenc/faithfulness/N-Enc" not in tags(log, "scalars")
    assert "globenc/sufficiency_gain/N-Enc" not in tags(log, "scalars")
    assert "globenc/log_odds/N-Enc" in tags(log, "scalars")


def test_the_text_is_written_once_and_says_what_was_asked_for(tmp_path: Path) -> None:
    log = written(tmp_path)
    points = log.Tensors("globenc/about/text_summary")
    assert [point.step for point in points] == [5]
    text = points[0].tensor_proto.string_val[0].decode()
    assert "It takes 5 forward passes" in text
    assert "DecompX" in text


def test_charts_are_written_for_what_is_computed(tmp_path: Path) -> None:
    charted = Charted(METHODS, ("HTA",), METHODS)
    log = written(tmp_path, charted=charted)
    layout = log.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    for part in (
        b"spearman_with/HTA/",
        b"globenc/faithfulness/",
        b"globenc/log_odds/",
        b"spearman_with_by_layer/HTA/W/",
    ):
        assert part in layout
