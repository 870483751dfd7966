from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from globenc_lightning import METHODS, ProbeSet
from globenc_lightning.measurement import HistoryEntry, Measurement, history_entry
from globenc_lightning.report.canvas import Picture
from globenc_lightning.report.curves import correlation_by_layer, correlation_over_training, mean_and_interval
from globenc_lightning.report.filmstrip import filmstrip
from globenc_lightning.report.heatmap import layers_by_tokens, tokens_by_tokens
from globenc_lightning.report.images import drawn_method, pictures, rollout_name
from globenc_lightning.settings import Settings

RHO, TIMES = "\N{GREEK SMALL LETTER RHO}", "\N{MULTIPLICATION SIGN}"
LENGTHS = (5, 3, 8)
LAYERS = 4
PREDICTED = "step 12; predicted class 1 (softmax 0.50)"


def probe(labels: Any = None) -> ProbeSet:
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    batch = {"input_ids": torch.arange(10, 10 + mask.numel()).view_as(mask), "attention_mask": mask}
    return ProbeSet.from_batch(batch if labels is None else {**batch, "labels": labels})


def measured(
    seed: int = 0,
    shown: Sequence[int] = (0, 2),
    methods: Sequence[str] = METHODS,
    readout: str = "cls",
    rule: str = "post-LN",
) -> Measurement:
    draw = torch.Generator().manual_seed(seed)

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw) + 0.01

    return Measurement(
        correlation={one: torch.rand(len(LENGTHS), LAYERS, generator=draw, dtype=torch.float64) for one in methods},
        rows=[{one: positive(LAYERS, length) for one in methods} for length in LENGTHS],
        last={index: {one: positive(LENGTHS[index], LENGTHS[index]) for one in methods} for index in shown},
        saliency=[positive(length) for length in LENGTHS],
        predicted=torch.tensor([1, 0, 2]),
        probability=torch.tensor([0.5, 0.6, 0.7]),
        reconstruction_error=torch.zeros(LAYERS, dtype=torch.float64),
        readout=readout,
        rule=rule,
        calls=1,
        encoder="model.bert",
        head_reads="readout",
        names=[probe().names(index, length) for index, length in enumerate(LENGTHS)],
    )


def drawn_of(
    found: Measurement, settings: Settings | None = None, of: ProbeSet | None = None, step: int = 12
) -> dict[str, Picture]:
    return pictures(found, of or probe(), [history_entry(found, step, 0)], [], settings or Settings(METHODS))


def same(left: Picture, right: Picture) -> bool:
    return np.array_equal(left, right)


def test_tags_and_pictures() -> None:
    drawn = drawn_of(measured())
    assert list(drawn) == [
        "globenc/heatmap/layers/example_00",
        "globenc/heatmap/last_layer/example_00",
        "globenc/filmstrip/example_00",
        "globenc/heatmap/layers/example_02",
        "globenc/heatmap/last_layer/example_02",
        "globenc/filmstrip/example_02",
        "globenc/correlation/by_layer",
        "globenc/correlation/over_training",
    ]
    assert all(one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3 for one in drawn.values())


def test_curves_alone_when_no_example_is_shown() -> None:
    assert list(drawn_of(measured(shown=()))) == ["globenc/correlation/by_layer", "globenc/correlation/over_training"]


def test_heatmaps_show_the_rows_and_the_last_map_and_say_what_they_are() -> None:
    found = measured()
    found.correlation["N-Enc"][2, -1] = 0.456
    drawn = drawn_of(found)
    facts = f"step 12; predicted class 2 (softmax 0.70); {RHO} with saliency 0.46"
    assert same(
        drawn["globenc/heatmap/layers/example_02"],
        layers_by_tokens(
            found.rows[2]["N-Enc"].numpy(),
            probe().tokens[2],
            title="Example 2: what each layer's readout is made of",
            subtitle=f"N-Enc, unnormalised rollout, first token's row; {facts}",
        ),
    )
    assert same(
        drawn["globenc/heatmap/last_layer/example_02"],
        tokens_by_tokens(
            found.last[2]["N-Enc"].numpy(),
            probe().tokens[2],
            title="Example 2: all tokens at the last layer",
            subtitle=f"N-Enc, unnormalised rollout; {facts}",
        ),
    )


@pytest.mark.parametrize(
    ("methods", "drawn"), [(METHODS, "N-Enc"), (("N-Enc", "W"), "N-Enc"), (("N", "W"), "W"), (("W",), "W")], ids=str
)
def test_the_method_that_is_drawn(methods: tuple[str, ...], drawn: str) -> None:
    settings = Settings(methods)
    assert drawn_method(settings) == drawn
    found = measured(methods=methods)
    rho = float(found.correlation[drawn][0, -1])
    assert same(
        drawn_of(found, settings)["globenc/heatmap/last_layer/example_00"],
        tokens_by_tokens(
            found.last[0][drawn].numpy(),
            probe().tokens[0],
            title="Example 0: all tokens at the last layer",
            subtitle=f"{drawn}, unnormalised rollout; {PREDICTED}; {RHO} with saliency {rho:.2f}",
        ),
    )


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        (Settings(METHODS, readout="last"), "unnormalised rollout, last token's row"),
        (Settings(METHODS, readout="mean"), "unnormalised rollout, mean of all rows"),
        (Settings(METHODS, normalize=True), "row-normalised rollout, first token's row"),
    ],
    ids=str,
)
def test_the_settings_are_written_on_the_pictures(settings: Settings, how: str) -> None:
    found = measured(readout="cls" if settings.readout == "auto" else settings.readout)
    drawn = drawn_of(found, settings)
    assert how.startswith(rollout_name(settings))
    assert same(
        drawn["globenc/filmstrip/example_00"],
        filmstrip(
            found.rows[0]["N-Enc"][-1:].numpy(),
            probe().tokens[0],
            [12],
            title="Example 0: the last layer's readout over training",
            subtitle=f"N-Enc, {how}",
        ),
    )
    assert same(
        drawn["globenc/correlation/by_layer"],
        correlation_by_layer(
            {method: rho.numpy() for method, rho in found.correlation.items()},
            title="Correlation of rollout and saliency by layer, step 12",
            subtitle=f"{how}; saliency: L2 gradient {TIMES} input of the logit of the largest class",
        ),
    )


def test_the_readout_that_was_read_is_written_where_it_is_not_the_one_asked_for() -> None:
    """In a decoder the last token's row is read."""
    found = measured(readout="last")
    assert same(
        drawn_of(found, Settings(METHODS))["globenc/filmstrip/example_00"],
        filmstrip(
            found.rows[0]["N-Enc"][-1:].numpy(),
            probe().tokens[0],
            [12],
            title="Example 0: the last layer's readout over training",
            subtitle="N-Enc, unnormalised rollout, last token's row",
        ),
    )


def test_an_extension_of_the_paper_is_called_so() -> None:
    found = measured(rule="pre-LN")
    drawn = drawn_of(found)
    rho = float(found.correlation["N-Enc"][0, -1])
    assert same(
        drawn["globenc/heatmap/last_layer/example_00"],
        tokens_by_tokens(
            found.last[0]["N-Enc"].numpy(),
            probe().tokens[0],
            title="Example 0: all tokens at the last layer",
            subtitle="N-Enc (pre-LN, an extension of the paper), unnormalised rollout; "
            f"{PREDICTED}; {RHO} with saliency {rho:.2f}",
        ),
    )
    usual = drawn_of(measured())
    assert not any(same(drawn[tag], usual[tag]) for tag in drawn)


def margin(logits: Tensor, batch: Any) -> Tensor:
    return logits[:, 0]


@pytest.mark.parametrize(("target", "name"), [("label", "logit of the label"), (margin, "target margin")])
def test_the_target_is_written_on_the_curves(target: Any, name: str) -> None:
    found = measured()
    expected = correlation_by_layer(
        {method: rho.numpy() for method, rho in found.correlation.items()},
        title="Correlation of rollout and saliency by layer, step 12",
        subtitle=f"unnormalised rollout, first token's row; saliency: L2 gradient {TIMES} input of the {name}",
    )
    assert same(drawn_of(found, Settings(METHODS, target=target))["globenc/correlation/by_layer"], expected)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.tensor([2, 1, 0]), ", label 2: wrong"),
        (torch.tensor([0.5, 1.5, 2.5]), ""),
        (torch.tensor([[0, 1], [1, 0], [1, 1]]), ""),
    ],
    ids=["classes", "scores", "several"],
)
def test_a_class_label_is_written_beside_the_predicted_class(labels: Tensor, text: str) -> None:
    found = measured()
    found.correlation["N-Enc"][0, -1] = -0.5
    assert same(
        drawn_of(found, of=probe(labels))["globenc/heatmap/last_layer/example_00"],
        tokens_by_tokens(
            found.last[0]["N-Enc"].numpy(),
            probe().tokens[0],
            title="Example 0: all tokens at the last layer",
            subtitle=f"N-Enc, unnormalised rollout; {PREDICTED}{text}; {RHO} with saliency -0.50",
        ),
    )


def test_an_undefined_correlation_is_called_so() -> None:
    found = measured()
    found.correlation["N-Enc"][0] = float("nan")
    assert same(
        drawn_of(found)["globenc/heatmap/last_layer/example_00"],
        tokens_by_tokens(
            found.last[0]["N-Enc"].numpy(),
            probe().tokens[0],
            title="Example 0: all tokens at the last layer",
            subtitle=f"N-Enc, unnormalised rollout; {PREDICTED}; {RHO} with saliency undefined",
        ),
    )


def test_all_correlations_undefined_are_still_drawn() -> None:
    found = measured()
    for rho in found.correlation.values():
        rho.fill_(float("nan"))
    assert len(drawn_of(found)) == 8


def story(steps: Sequence[int]) -> tuple[list[Measurement], list[HistoryEntry]]:
    found = [measured(seed) for seed in range(len(steps))]
    return found, [history_entry(one, step, 0) for one, step in zip(found, steps, strict=True)]


FILMSTRIP: dict[str, Any] = {
    "title": "Example 0: the last layer's readout over training",
    "subtitle": "N-Enc, unnormalised rollout, first token's row",
}


@pytest.mark.parametrize(
    ("analysed", "missing"),
    [((0, 3, 7), ()), ((0, 3, 7), (5,)), ((3, 7), (0, 1)), ((0, 3), (7,)), ((7,), (3, 5))],
    ids=str,
)
def test_filmstrip_has_a_row_per_validation_and_hatches_failed_ones(
    analysed: tuple[int, ...], missing: tuple[int, ...]
) -> None:
    found, history = story(analysed)
    rows = {step: one.rows[0]["N-Enc"][-1].numpy() for step, one in zip(analysed, found, strict=True)}
    steps = sorted((*analysed, *missing))
    picture = pictures(found[-1], probe(), history, missing, Settings(METHODS))["globenc/filmstrip/example_00"]

    def strip(nothing: float) -> Picture:
        shown = [rows.get(step, np.full(LENGTHS[0], nothing)) for step in steps]
        return filmstrip(np.stack(shown), probe().tokens[0], steps, **FILMSTRIP)

    assert same(picture, strip(np.nan))
    assert same(picture, strip(0.0)) is not bool(missing)


@pytest.mark.parametrize("missing", [(), (5,), (0, 9)], ids=str)
def test_curves_over_training_have_a_gap_at_failed_validations(missing: tuple[int, ...]) -> None:
    analysed = (1, 3, 7)
    found, history = story(analysed)
    steps = sorted((*analysed, *missing))
    means, spread = {}, {}
    for method in METHODS:
        figures = {
            step: mean_and_interval(one.correlation[method][:, -1:].numpy())
            for step, one in zip(analysed, found, strict=True)
        }
        means[method] = np.array([figures[step][0][0] if step in figures else np.nan for step in steps])
        spread[method] = np.array([figures[step][1][0] if step in figures else np.nan for step in steps])
    expected = correlation_over_training(
        steps,
        means,
        spread=spread,
        title="Correlation of rollout and saliency over training",
        subtitle=f"unnormalised rollout, first token's row; saliency: L2 gradient {TIMES} input of the logit of the "
        "largest class",
    )
    drawn = pictures(found[-1], probe(), history, missing, Settings(METHODS))
    assert same(drawn["globenc/correlation/over_training"], expected)


def test_nothing_that_is_drawn_from_is_changed() -> None:
    found, history = story((1, 3))
    before = [one.clone() for rows in found[-1].rows for one in rows.values()]
    pictures(found[-1], probe(), history, [2], Settings(METHODS))
    after = [one for rows in found[-1].rows for one in rows.values()]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
