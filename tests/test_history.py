import copy
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from globenc_lightning import measurement
from globenc_lightning.functional import METHODS
from globenc_lightning.history import About, History, HistoryEntry
from globenc_lightning.measurement import Measurement, history_entry
from tests.neutrality import equal


def measured(examples: int = 6, layers: int = 12, seed: int = 0) -> Measurement:
    """Figures of sentences of 10 to 49 tokens, the same lengths whatever the seed."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [10 + (17 * index) % 40 for index in range(examples)]
    return Measurement(
        correlation={method: torch.rand(examples, layers, generator=draw).double() for method in METHODS},
        rows=[{method: torch.rand(layers, length, generator=draw) for method in METHODS} for length in lengths],
        last={},
        saliency=[torch.rand(length, generator=draw) for length in lengths],
        predicted=torch.randint(3, (examples,), generator=draw),
        probability=torch.rand(examples, generator=draw),
        reconstruction_error=torch.zeros(layers, dtype=torch.float64),
        readout="cls",
        rule="post-LN",
        calls=1,
        encoder="bert",
        head_reads="readout",
        names=[tuple(map(str, range(length))) for length in lengths],
        score=torch.rand(examples, generator=draw),
        position=[0] * examples,
        answers=[(index % 3,) for index in range(examples)],
        ids=[torch.arange(length) for length in lengths],
    )


def history(validations: int, examples: int = 6) -> History:
    made = History()
    for step in range(validations):
        made.append(history_entry(measured(examples, seed=step), step, step // 2))
    return made


def as_earlier_versions_wrote_it(found: Measurement, entry: HistoryEntry) -> dict[str, Any]:
    """The state of an entry before rows were packed, from the same measurement."""
    return {
        "step": entry.step,
        "epoch": entry.epoch,
        "methods": list(found.correlation),
        "by_example": torch.stack(list(found.correlation.values())),
        "rows": torch.stack(
            [torch.cat([rows[method][-1] for rows in found.rows]) for method in found.correlation],
        ),
        "lengths": [len(one) for one in found.saliency],
        "saliency": torch.cat(found.saliency),
        "predicted": found.predicted,
        "score": found.score,
        "position": list(found.position),
        "answers": [list(one) for one in found.answers],
        "probability": found.probability,
        "texts": list(entry.texts),
        "validation": entry.validation,
    }


def stored(state: Any) -> tuple[bytes, Any]:
    """A state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file.getvalue(), torch.load(file, weights_only=True)


def same(left: History, right: History) -> bool:
    return len(left) == len(right) and all(
        equal(vars(one), vars(other)) for one, other in zip(left, right, strict=True)
    )


def test_a_history_survives_a_checkpoint_to_the_last_bit() -> None:
    made = history(3)
    made.missing_steps.append(2)
    made.reasons.append((2, "why"))
    found = History.from_state_dict(stored(made.state_dict())[1])
    assert same(found, made)
    assert (found.missing_steps, found.reasons, found.start) == ([2], [(2, "why")], 0)


def test_a_checkpoint_of_an_earlier_version_gives_the_same_entries() -> None:
    found = measured()
    entry = history_entry(found, 7, 2)
    state = as_earlier_versions_wrote_it(found, entry)
    assert equal(vars(HistoryEntry.from_state_dict(stored(state)[1])), vars(entry))
    # The first versions kept less.
    few = {name: state[name] for name in ("step", "epoch", "methods", "by_example", "rows", "lengths", "saliency")}
    first = HistoryEntry.from_state_dict({**few, "predicted": state["predicted"]})
    assert equal(first.rows, entry.rows)
    assert (first.texts, first.answers, first.validation) == ([], [], True)


def test_what_is_asked_for_has_its_public_form() -> None:
    found = measured()
    entry = history_entry(found, 7, 2)
    assert list(entry.rows) == list(entry.by_example) == list(METHODS)
    for method in METHODS:
        assert torch.equal(entry["by_example"][method], found.correlation[method].float().double())
        assert isinstance(entry.rows[method], list)
        for example, row in enumerate(entry.rows[method]):
            expected = found.rows[example][method][-1]
            torch.testing.assert_close(row, expected, rtol=0, atol=float(expected.max()) / 131070 * 1.01)
            assert torch.equal(entry.row(method, example), row)
            assert entry.length(example) == len(row)
    assert [len(one) for one in entry.saliency] == [len(one) for one in found.saliency]
    mean = torch.stack([one.float().double().mean(0) for one in found.correlation.values()])
    torch.testing.assert_close(torch.stack(list(entry.correlation.values())), mean, rtol=0, atol=1e-12)


def test_the_names_are_still_where_they_were() -> None:
    assert (measurement.History, measurement.HistoryEntry, measurement.About) == (History, HistoryEntry, About)


def tensors_of(entry: HistoryEntry) -> list[Tensor]:
    parts = [entry.rho, entry.predicted, entry.score, entry.probability]
    for one in (entry.correlation, entry.sd, entry.n, entry.undefined):
        parts += one.values()
    assert entry.packed is not None
    return [*parts, entry.packed.values, *([] if entry.packed.peaks is None else [entry.packed.peaks])]


def test_a_large_probe_takes_two_bytes_a_share_and_four_a_rho() -> None:
    made = history(2, examples=1000)
    tokens = sum(len(one) for one in made[0].saliency)
    figures = 9 * (2 * tokens + 4 * 1000) + 8 * 12 * 1000 * 4
    for entry in made:
        tensors = tensors_of(entry)
        # Beside the figures: class, score and probability of each example, and the means.
        assert sum(one.untyped_storage().nbytes() for one in tensors) == figures + 1000 * 16 + 8 * 12 * 32
        # Every tensor takes some hundred bytes more than its numbers.
        assert len(tensors) < 50
    one, two = (len(stored(History(made[:count]).state_dict())[0]) for count in (1, 2))
    # In the file, too; lists that the entries share are in it once.
    assert two - one < figures + 1000 * 16 + 8000


def test_entries_of_one_probe_share_what_is_the_same() -> None:
    made = history(2)
    first, second = made
    assert first.texts is second.texts
    assert first.answers is second.answers
    assert first.packed is not None
    assert second.packed is not None
    assert first.packed.lengths is second.packed.lengths
    found = History.from_state_dict(stored(made.state_dict())[1])
    assert found[0].packed is not None
    assert found[1].packed is not None
    assert found[0].packed.lengths is found[1].packed.lengths
    other = History([first])
    other.append(history_entry(measured(5), 9, 0))
    assert len(other[1].texts) == 5


def test_a_process_that_writes_nothing_keeps_every_rho_and_no_rows() -> None:
    made = history(2)
    whole = copy.copy(made[0])
    made.drop_rows()
    for entry in made:
        assert (entry.rows, entry.saliency, entry.packed) == ({}, [], None)
    assert equal(made[0].by_example, whole.by_example)
    assert same(History.from_state_dict(stored(made.state_dict())[1]), made)


@pytest.mark.parametrize("change", [np.float64("nan"), -0.25])
def test_a_rho_that_is_undefined_or_negative_survives(change: float) -> None:
    found = measured()
    found.correlation["W"][2, 3] = change
    entry = HistoryEntry.from_state_dict(stored(history_entry(found, 0, 0).state_dict())[1])
    assert float(entry.by_example["W"][2, 3]) == pytest.approx(change, nan_ok=True)
    assert int(entry.undefined["W"][3]) == (change != change)


def test_rows_of_references_and_signed_scores_survive_in_one_tensor_each() -> None:
    found = measured()
    references = [{"HTA": torch.rand(len(one)), "exact HTA": torch.rand(len(one))} for one in found.saliency]
    rho = {name: {"W": torch.rand(6, 12).double()} for name in references[0]}
    signed = [torch.randn(len(one)) for one in found.saliency[:-1]] + [torch.empty(0)]
    found = replace(found, references=references, reference_correlation=rho, signed=signed, left_out=torch.rand(6))
    entry = history_entry(found, 1, 0)
    state = entry.state_dict()
    assert [one["values"].dim() for one in (*state["references"].values(), state["signed"])] == [1, 1, 1]
    again = HistoryEntry.from_state_dict(state)
    for name, rows in entry.references.items():
        assert all(map(torch.equal, again.references[name], rows))
        assert all(torch.equal(row, one[name]) for row, one in zip(rows, references, strict=True))
    assert all(map(torch.equal, again.signed, signed))
    assert set(state) - set(history_entry(measured(), 1, 0).state_dict()) == {
        *("reference_rho", "references", "signed", "left_out")
    }
