"""Whole trainings of encoders that the paper does not speak of: the figures, what is said of them, no trace."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from globenc_lightning import METHODS, GlobEncCallback, attribute
from tests.families import FAMILIES, PARALLEL, POST, PRE, SUBLAYER, build
from tests.training import Row, Sentences, Steps, events, fit, said

RULES = {"gpt_neox": PARALLEL, "falcon": PARALLEL, "gemma3": SUBLAYER, "olmo2": SUBLAYER, "granite": PRE}
RULES |= {"opt": PRE, "opt (norms after)": POST}
SAID = {
    PARALLEL: "adds attention and feed-forward network to the same input (parallel)",
    SUBLAYER: "normalises what its sub-layers give before it is added to the residual stream (sublayer-norm)",
    PRE: "normalises before its sub-layers (pre-LN)",
}


class Classifies(Steps):
    """The cross entropy of a head of its own."""

    def loss_of(self, batch: Row) -> Tensor:
        return F.cross_entropy(
            self.model(**{key: batch[key] for key in ("input_ids", "attention_mask")}), batch["labels"]
        )


def made(name: str) -> pl.LightningModule:
    pl.seed_everything(3, verbose=False)
    return Classifies(build(next(one for one in FAMILIES if one.name == name)).train())


@pytest.mark.parametrize("name", RULES)
def test_a_training_is_analysed_and_otherwise_the_same(name: str, tmp_path: Path) -> None:
    callback = GlobEncCallback(methods=METHODS, num_examples=6)
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    observed = made(name)
    with said() as messages:
        trainer = fit(observed, callback, logger=logger, max_epochs=2)
    alone = made(name)
    fit(alone, max_epochs=2)
    for one, other in zip(observed.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(one, other)

    assert trainer.current_epoch == 2
    assert len(callback.history) >= 2
    rule = RULES[name]
    told = [message for message in messages if "extension" in message]
    assert [SAID[rule] in message for message in told] == ([] if rule == POST else [True])

    # The figures of the last validation, from its weights, outside of any training.
    batch = Sentences().first(6)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = attribute(observed.model.eval(), inputs, methods=METHODS)
    assert found.rule == rule
    for method in METHODS:
        np.testing.assert_allclose(
            np.asarray(callback.history[-1].by_example[method]), found.correlation[method].numpy(), atol=1e-5
        )
    tags = events(tmp_path).Tags()
    assert any("N-Enc" in tag for tag in tags["scalars"])
    assert len(tags["images"]) > 0
