"""Lines that are offered for batches of several loaders run as they stand."""

import re
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from globenc_lightning import GlobEncCallback
from tests.encoder.test_advice import arguments
from tests.training import Sentences, Steps, build_trainer, classifier, loader, said

LINE = re.compile(r"GlobEncCallback\(.*\)$", re.MULTILINE)


class Joined(Steps):
    """Two loaders in one batch, and a loss that no function of torch computes on logits that are known."""

    def __init__(self, place: Any) -> None:
        super().__init__(classifier())
        self.place = place

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        parts = batch.values() if isinstance(batch, dict) else batch
        self.guessed = [self.model(**one).logits.argmax(-1).tolist() for one in parts]


class OwnHead(nn.Module):
    """A head beside an encoder, which the step alone calls."""


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("kind", [dict, list])
def test_lines_for_several_loaders_in_one_batch_run(kind: Any, mode: str) -> None:
    def combined() -> Any:
        loaders: list[DataLoader[Any]] = [loader(Sentences(16)), loader(Sentences(16, seed=3))]
        return CombinedLoader(dict(zip("ab", loaders, strict=True)) if kind is dict else loaders, mode)

    def trained(**given: Any) -> tuple[GlobEncCallback, list[str]]:
        torch.manual_seed(0)
        callback = GlobEncCallback(heatmap_examples=0, **given)
        with said() as messages:
            build_trainer([callback], max_epochs=1).fit(Joined(kind), loader(Sentences(16, seed=1)), combined())
        return callback, messages

    callback, messages = trained()
    offered = [line for message in messages for line in LINE.findall(message)]
    assert offered
    for line in offered:
        again, told = trained(**arguments(line))
        assert told == []
        assert len(again.history) == 2
