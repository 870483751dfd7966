from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from globenc_lightning.analysis import Reader
from globenc_lightning.errors import GlobEncError
from globenc_lightning.planning import examined, find, plan, units_of
from globenc_lightning.probe import ProbeSet
from globenc_lightning.task.kinds import Decision
from globenc_lightning.task.replaying import Part, Replay
from globenc_lightning.task.steps import steps_of
from tests.task.zoo import PAD, HeadInStep, InBatch, NoLossInValidation, Recurrent, TaggerOnActive, classes, pair, text


def padded(size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    ids, mask = (F.pad(one, (0, 5), value=PAD) for one in text(10, size))
    return ids, mask, classes(10, size=size)


def prepared(module: Any, batch: Any, wanted: int) -> tuple[Reader, ProbeSet]:
    module.log = lambda *_, **__: None
    reader = Reader(module)
    return reader, find(reader, ProbeSet.from_parts([Part(batch, 0, 0, wanted)]), steps_of(module))


def test_padding_is_cut_off_where_it_changes_nothing() -> None:
    reader, probe = prepared(HeadInStep(), padded(), 6)
    (chunk,) = plan(reader, probe, range(6))
    assert chunk.batch[0].shape[1] == int(padded()[1].any(0).sum()) < padded()[0].shape[1]


def test_padding_stays_where_the_head_sees_it() -> None:
    reader, probe = prepared(Recurrent(), padded(), 6)
    (chunk,) = plan(reader, probe, range(6))
    assert chunk.batch[0].shape == padded()[0].shape


def test_examples_that_are_not_wanted_are_left_out() -> None:
    _, probe = prepared(HeadInStep(), padded(), 2)
    assert len(probe.parts[0].batch[0]) == 2


def test_negatives_in_the_batch_stay() -> None:
    reader, probe = prepared(InBatch(), pair(10), 2)
    assert len(probe.parts[0].batch["anchor"]["input_ids"]) == 5
    (chunk,) = plan(reader, probe, range(2))
    assert len(chunk.batch["anchor"]["input_ids"]) == 5
    assert chunk.kept == (0, 1)


def test_a_batch_is_divided_where_it_is_too_large() -> None:
    reader, probe = prepared(HeadInStep(), padded(), 6)
    reader.max_tokens = 2 * padded()[0].shape[1]
    chunks = plan(reader, probe, range(6))
    assert [chunk.examples for chunk in chunks] == [(0, 1), (2, 3), (4, 5)]


def test_a_head_that_begins_at_zero_proves_nothing() -> None:
    module = Recurrent()
    with torch.no_grad():
        module.head.weight.zero_()
    reader, probe = prepared(module, padded(), 2)
    assert len(probe.parts[0].batch[0]) == 6
    (chunk,) = plan(reader, probe, range(2))
    assert chunk.batch[0].shape == padded()[0].shape


def test_a_plan_is_proven_again_once_the_weights_have_moved() -> None:
    module = Gated()
    reader, probe = prepared(module, padded(), 6)
    (first,) = plan(reader, probe, range(6))
    assert first.batch[0].shape[1] < padded()[0].shape[1]
    with torch.no_grad():
        module.gate.fill_(1.0)
    (second,) = plan(reader, probe, range(6))
    assert second.batch[0].shape == padded()[0].shape
    assert plan(reader, probe, range(6))[0] is second


class Gated(HeadInStep):
    """The padding takes part in the logits as soon as the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        found: Tensor = self.head(hidden[:, 0] + self.gate * hidden.sum(1))
        return found


def test_a_plan_that_holds_stays() -> None:
    reader, probe = prepared(HeadInStep(), padded(), 6)
    first = plan(reader, probe, range(6))
    assert plan(reader, probe, range(6)) is first
    assert plan(reader, probe, range(6)) is first


def test_the_training_step_tells_what_validation_does_not() -> None:
    reader, _ = prepared(NoLossInValidation(), padded(), 6)
    assert reader.replay is not None
    assert reader.replay.step.name == "training_step"


def test_the_reason_of_the_first_step_is_told() -> None:
    module = NoLossInValidation()
    module.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    probe = ProbeSet.from_parts([Part(padded(), 0, 0, 6)])
    with pytest.raises(GlobEncError, match="validation_step computes no loss that depends on an encoder"):
        find(Reader(module), probe, steps_of(module)[:1])


def test_a_batch_with_as_many_counting_tokens_as_texts_is_told_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def tagged(size: int, counted: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = text(10, size)
        labels = torch.full_like(ids, -100)
        labels[:, 1] = 1
        labels[0, 1 : 1 + counted] = 2
        if counted == 2:
            labels[1, 1] = -100
        return ids, mask, labels

    module = TaggerOnActive()
    module.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    parts = [Part(tagged(4, 3), 0, 0, 4), Part(tagged(5, 2), 1, 0, 5)]
    reader = Reader(module)
    reader.replay = Replay(steps_of(module)[0])
    examined(reader, ProbeSet.from_parts(parts))
    assert {decision.kind for decision, _ in reader.decisions} == {"token classification"}


def test_the_units_of_some_examples() -> None:
    decision = Decision("token classification", torch.arange(12.0).view(12, 1), torch.arange(12), width=3)
    part = units_of(decision, [2, 0], 4)
    assert part is not None
    assert part.logits.flatten().tolist() == [6, 7, 8, 0, 1, 2]
    assert part.labels is not None
    assert part.labels.tolist() == [6, 7, 8, 0, 1, 2]
    assert units_of(Decision("loss", torch.zeros(1, 1)), [0], 4) is None
