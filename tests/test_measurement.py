from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from globenc_lightning import METHODS, ProbeSet, attribute
from globenc_lightning.analysis import Reader
from globenc_lightning.errors import NonFiniteError
from globenc_lightning.measurement import HistoryEntry, Measurement, history_entry, measure, put_together
from globenc_lightning.settings import Settings
from tests.training import CLASSES, VOCABULARY, Sentences, classifier, redrawn

EVERYTHING = Settings(METHODS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def without_masks() -> ProbeSet:
    """Six examples of four lengths that cannot be padded, the shortest first: they take four batches."""
    probe = None
    for index, length in enumerate((4, 9, 4, 6, 9, 7)):
        ids = Sentences(1, shortest=length, longest=length, width=length, seed=index).first(1)["input_ids"]
        one = ProbeSet.from_batch({"input_ids": ids})
        probe = one if probe is None else probe.joined(one)
    assert probe is not None
    return probe


@pytest.mark.parametrize("readout", ["cls", "mean"])
@pytest.mark.parametrize("singles", [(0, 2, 4), (1, 3, 5)], ids=["first process", "second process"])
def test_a_share_of_single_tokens_does_not_know_that_a_model_is_causal(readout: str, singles: tuple[int, ...]) -> None:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "pad_token_id": 0}
    model = redrawn(GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=CLASSES))).eval()
    rows = [
        Sentences(1, shortest=length, longest=length, seed=index).first(1)
        for index in range(6)
        for length in [1 if index in singles else 4 + index]
    ]
    probe = ProbeSet.from_batch({key: torch.cat([row[key] for row in rows]) for key in rows[0]})
    settings = Settings(METHODS, readout=readout)
    whole = measure(Reader(model), probe, settings)
    halves = [range(0, 6, 2), range(1, 6, 2)]
    shares = [(half, measure(Reader(model), probe, settings, chosen=half)) for half in halves]
    found = put_together(shares)
    assert found.readout == whole.readout == {"cls": "last", "mean": "mean"}[readout]
    assert (found.rule, found.calls, found.encoder, found.head_reads) == (
        whole.rule,
        whole.calls,
        whole.encoder,
        whole.head_reads,
    )
    for method in METHODS:
        assert_close(found.correlation[method], whole.correlation[method])
        for index in range(6):
            assert_close(found.rows[index][method], whole.rows[index][method])
    # Examples of one token that are analysed one by one tell no more.
    reader = Reader(model, max_tokens=1)
    assert measure(reader, probe, settings).readout == whole.readout


def assert_close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("settings", [EVERYTHING, Settings(("N", "W"), readout="mean", normalize=True)], ids=str)
@pytest.mark.parametrize("masks", [True, False])
def test_every_example_has_the_figures_of_its_sentence_alone(settings: Settings, masks: bool) -> None:
    model = classifier().eval()
    probe = ProbeSet.from_batch(Sentences(6).first(6)) if masks else without_masks()
    assert masks or len(list(probe.batches())) == 4
    found = measure(Reader(model), probe, settings, shown={0: settings.methods, 4: settings.methods[-1:]})
    assert {index: tuple(maps) for index, maps in found.last.items()} == {
        0: tuple(settings.methods), 4: tuple(settings.methods[-1:])
    }  # fmt: skip
    assert tuple(found.correlation) == tuple(settings.methods)
    for index, row in enumerate(probe.rows):
        alone = attribute(
            model,
            {key: value.unsqueeze(0) for key, value in row.items()},
            methods=settings.methods,
            readout=settings.readout,
            normalize=settings.normalize,
        )
        torch.testing.assert_close(found.saliency[index], alone.saliency[0], rtol=1e-4, atol=1e-6)
        assert int(found.predicted[index]) == int(alone.predicted[0])
        assert float(found.probability[index]) == pytest.approx(float(alone.logits.softmax(1).max()), abs=1e-6)
        for method in settings.methods:
            torch.testing.assert_close(
                found.correlation[method][index], alone.correlation[method][0], rtol=0, atol=1e-6, equal_nan=True
            )
            rows, expected = found.rows[index][method], alone.rows[method][0]
            assert rows.shape == expected.shape == (3, len(row["input_ids"]))
            # A rollout is given up to one positive scale per example and layer.
            torch.testing.assert_close(
                rows / rows.amax(1, keepdim=True), expected / expected.amax(1, keepdim=True), rtol=1e-4, atol=1e-5
            )
            if method in found.last.get(index, ()):
                last, whole = found.last[index][method], alone.last[method][0]
                torch.testing.assert_close(last / last.max(), whole / whole.max(), rtol=1e-4, atol=1e-5)


def test_figures_are_detached_and_in_double_precision() -> None:
    shown = dict.fromkeys(range(6), METHODS)
    found = measure(Reader(classifier()), ProbeSet.from_batch(Sentences(6).first(6)), EVERYTHING, shown=shown)
    tensors = [*found.saliency, found.predicted, found.probability, found.reconstruction_error]
    tensors += [one for rows in (*found.rows, *found.last.values()) for one in rows.values()]
    assert not any(one.requires_grad for one in (*tensors, *found.correlation.values()))
    assert {rho.dtype for rho in found.correlation.values()} == {torch.float64}
    assert {tuple(rho.shape) for rho in found.correlation.values()} == {(6, 3)}
    assert found.reconstruction_error.shape == (3,)
    assert 0 < float(found.reconstruction_error.max()) < 1e-4


def test_an_example_s_figures_hold_no_other_s() -> None:
    found = measure(Reader(classifier().eval()), ProbeSet.from_batch(Sentences(6).first(6)), EVERYTHING, {0: METHODS})
    parts = [*found.saliency, *(row for rows in [*found.rows, *found.last.values()] for row in rows.values())]
    assert all(part.untyped_storage().nbytes() == part.numel() * part.element_size() for part in parts)


def test_the_reconstruction_error_is_the_largest_of_any_batch() -> None:
    model, probe = classifier().eval(), without_masks()
    reader = Reader(model)
    found = measure(reader, probe, EVERYTHING).reconstruction_error
    errors = [measure(reader, probe_of(probe, index), EVERYTHING).reconstruction_error for index, _ in probe.batches()]
    assert torch.equal(found, torch.stack(errors).amax(0))


def probe_of(probe: ProbeSet, indices: list[int]) -> ProbeSet:
    return ProbeSet.from_batch({"input_ids": torch.stack([probe.rows[index]["input_ids"] for index in indices])})


def test_one_logit_decides_between_two_classes() -> None:
    model = classifier("bert", num_labels=1)
    probe = ProbeSet.from_batch(Sentences(4, labels=False).first(4))
    found = measure(Reader(model), probe, EVERYTHING)
    assert found.task == "binary"
    torch.testing.assert_close(found.probability, torch.sigmoid(found.score))
    assert found.predicted.tolist() == [int(score > 0) for score in found.score]
    assert all(rho.isfinite().all() for rho in found.correlation.values())


def test_an_undefined_example_is_counted_and_left_out_of_the_mean() -> None:
    data = Sentences(5)
    data.rows[3] = Sentences(1, shortest=1, longest=1).rows[0]
    found = measure(Reader(classifier()), ProbeSet.from_batch(data.first(5)), EVERYTHING)
    entry = history_entry(found, 7, 2)
    for method in METHODS:
        rho = found.correlation[method]
        assert rho.isnan().nonzero()[:, 0].unique().tolist() == [3]
        # What is kept of a rho is a float32.
        others = rho[[0, 1, 2, 4]].float().double()
        torch.testing.assert_close(entry.correlation[method], others.mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(entry.sd[method], others.std(0), rtol=0, atol=1e-12)
        assert entry.n[method].tolist() == [4, 4, 4]
        assert entry.undefined[method].tolist() == [1, 1, 1]


def test_an_entry_is_what_is_remembered_of_a_measurement() -> None:
    found = measure(Reader(classifier()), ProbeSet.from_batch(Sentences(5).first(5)), Settings(("N-Enc", "W")))
    entry = history_entry(found, 7, 2)
    assert (entry.step, entry.epoch) == (7, 2)
    assert list(entry.correlation) == ["N-Enc", "W"]
    for method in ("N-Enc", "W"):
        assert torch.equal(entry.by_example[method], found.correlation[method].float().double())
        assert len(entry.rows[method]) == 5
        for row, rows in zip(entry.rows[method], found.rows, strict=True):
            largest = float(rows[method][-1].max())
            torch.testing.assert_close(row, rows[method][-1], rtol=0, atol=largest / 131_000)
            assert float(row.max()) == largest
            # A view would keep every layer's row in memory.
            assert row.untyped_storage().nbytes() == row.nbytes
    for one, other in zip(entry.saliency, found.saliency, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=float(other.max()) / 131_000)
    assert torch.equal(entry.predicted, found.predicted)


def test_an_entry_can_be_read_as_a_mapping_and_not_changed() -> None:
    found = measure(Reader(classifier()), ProbeSet.from_batch(Sentences(2).first(2)), Settings())
    entry = history_entry(found, 7, 2)
    for one in fields(HistoryEntry):
        assert entry[one.name] is getattr(entry, one.name)
    with pytest.raises(FrozenInstanceError):
        entry.step = 8  # type: ignore[misc]


def test_summary_of_a_measurement_without_any_defined_figure() -> None:
    probe = ProbeSet.from_batch(Sentences(3, shortest=1, longest=1).first(3))
    found: Measurement = measure(Reader(classifier()), probe, EVERYTHING)
    for summary in found.summary().values():
        assert summary.mean.isnan().all()
        assert summary.n.tolist() == [0, 0, 0]
        assert summary.undefined.tolist() == [3, 3, 3]


def test_one_reader_follows_the_weights() -> None:
    """What is kept from one measurement to the next is the structure, never a weight."""
    model = classifier()
    reader, probe = Reader(model), ProbeSet.from_batch(Sentences(4).first(4))
    before = measure(reader, probe, EVERYTHING)
    redrawn(model, 5)
    after = measure(reader, probe, EVERYTHING)
    fresh = measure(Reader(model), probe, EVERYTHING)
    for method in METHODS:
        assert not torch.equal(before.correlation[method], after.correlation[method])
        assert torch.equal(fresh.correlation[method], after.correlation[method])


def test_weights_that_become_nan_raise_and_leave_the_reader_usable() -> None:
    model = classifier()
    reader, probe = Reader(model), ProbeSet.from_batch(Sentences(4).first(4))
    before = measure(reader, probe, EVERYTHING)
    weight = model.bert.encoder.layer[1].output.dense.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 2"):
        measure(reader, probe, EVERYTHING)
    with torch.no_grad():
        weight.copy_(kept)
    after = measure(reader, probe, EVERYTHING)
    assert all(torch.equal(before.correlation[method], after.correlation[method]) for method in METHODS)


@pytest.mark.parametrize(("max_tokens", "kept"), [(4096, False), (8, True)])
def test_kernels_are_kept_from_batch_to_batch(max_tokens: int, kept: bool) -> None:
    reader = Reader(classifier().eval(), max_tokens=max_tokens)
    measure(reader, ProbeSet.from_batch(Sentences(6).first(6)), EVERYTHING)
    assert reader.kernels.keep == kept
