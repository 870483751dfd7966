from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from globenc_lightning.task.watching import LossSeen, LossWatch

LOGITS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 1, 0])


def watched(run: Any) -> LossWatch:
    watch = LossWatch(notes=True)
    with watch:
        run()
    return watch


@pytest.mark.parametrize(
    "probabilities",
    [
        lambda x: F.log_softmax(x, -1),
        lambda x: x.log_softmax(dim=1),
        lambda x: torch.log(F.softmax(x, dim=-1)),
        lambda x: torch.log(x.softmax(1) + 1e-9),
        lambda x: (1e-9 + x.softmax(1)).log(),
        lambda x: x.softmax(1).clamp(min=1e-6).log(),
        lambda x: nn.Softmax(dim=1)(x).log(),
    ],
)
def test_probabilities_are_taken_back_to_their_logits(probabilities: Any) -> None:
    (loss,) = watched(lambda: F.nll_loss(probabilities(LOGITS), LABELS)).losses
    assert torch.equal(loss.logits, LOGITS)
    assert loss.squashed == "classes"
    assert loss.target is LABELS


def test_a_number_that_is_no_rounding_is_not_taken_off() -> None:
    (loss,) = watched(lambda: F.nll_loss(torch.log(LOGITS.softmax(1) + 0.5), LABELS)).losses
    assert not torch.equal(loss.logits, LOGITS)


@pytest.mark.parametrize(
    "shape", [lambda x: x.squeeze(1), lambda x: x.view(-1), lambda x: x[:, 0], lambda x: x.flatten()]
)
def test_sigmoids_are_followed_through_other_shapes(shape: Any) -> None:
    column = LOGITS[:, :1]
    (loss,) = watched(lambda: F.binary_cross_entropy(shape(torch.sigmoid(column)), LABELS.clamp(max=1).float())).losses
    assert torch.equal(loss.logits, column[:, 0])
    assert loss.squashed == "labels"


@pytest.mark.parametrize(
    "scaled",
    [lambda x: x * 20, lambda x: 20 * x, lambda x: x / 0.05, lambda x: x * torch.tensor(20.0), lambda x: x.mul(20)],
)
def test_a_temperature_is_taken_off(scaled: Any) -> None:
    (loss,) = watched(lambda: F.cross_entropy(scaled(LOGITS), LABELS)).losses
    assert torch.equal(loss.unscaled, LOGITS)
    assert torch.equal(loss.logits, scaled(LOGITS))


@pytest.mark.parametrize("other", [lambda x: x * -1, lambda x: 1 / x, lambda x: x * LOGITS, lambda x: x * 0])
def test_what_is_no_temperature_stays(other: Any) -> None:
    (loss,) = watched(lambda: F.cross_entropy(other(LOGITS), LABELS)).losses
    assert loss.unscaled is loss.logits


def test_logits_of_a_loss_that_is_written_out() -> None:
    def focal() -> Tensor:
        logs = LOGITS.log_softmax(1)
        own = logs.gather(1, LABELS.unsqueeze(1)).squeeze(1)
        return ((1 - own.exp()) * own).mean()

    watch = watched(focal)
    assert watch.losses == []
    (squashed,) = watch.squashed
    assert squashed.logits is LOGITS
    assert squashed.axis == 1
    assert squashed.target is not None
    assert torch.equal(squashed.target, LABELS)


def test_attention_inside_an_encoder_is_not_kept() -> None:
    watch = LossWatch(notes=True)
    with watch:
        watch.inside = 1
        LOGITS.softmax(1)
        watch.inside = 0
    assert watch.squashed == []


def test_a_step_ends_at_its_loss() -> None:
    after = []

    def step() -> None:
        with LossWatch(lambda losses: len(losses) == 2):
            for _ in range(3):
                F.cross_entropy(LOGITS, LABELS)
                after.append(1)

    with pytest.raises(LossSeen):
        step()
    assert len(after) == 1
