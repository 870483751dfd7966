"""Lines that are offered for batches of several loaders run as they stand."""

from typing import Any

import pytest
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from transformers import BertModel

from globenc_lightning import GlobEncCallback
from tests.task.test_advice import CALL, arguments
from tests.training import CLASSES, Sentences, Steps, bert_config, build_trainer, loader, redrawn, said


class Joined(Steps):
    """Two loaders in one batch of its validation, which decides by a head beside the encoder and computes no loss."""

    head: Any

    def __init__(self) -> None:
        super().__init__(redrawn(BertModel(bert_config())).train(), head=redrawn(nn.Linear(16, CLASSES), 1))

    def logits(self, batch: Any) -> Tensor:
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found: Tensor = self.head(self.model(**given).last_hidden_state[:, 0])
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.logits(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        parts = batch.values() if isinstance(batch, dict) else batch
        self.guessed = [self.logits(one).argmax(-1).tolist() for one in parts if one is not None]


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("kind", [dict, list])
def test_lines_for_several_loaders_in_one_batch_run(kind: Any, mode: str) -> None:
    def combined() -> Any:
        loaders = [loader(Sentences(16)), loader(Sentences(16, seed=3))]
        return CombinedLoader(dict(zip("ab", loaders, strict=True)) if kind is dict else loaders, mode)

    def trained(**given: Any) -> tuple[GlobEncCallback, list[str]]:
        torch.manual_seed(0)
        callback = GlobEncCallback(heatmap_examples=0, num_examples=8, **given)
        with said() as messages:
            build_trainer([callback], max_epochs=1).fit(Joined(), loader(Sentences(16, seed=1)), combined())
        return callback, messages

    callback, messages = trained()
    assert len(callback.history) == 0
    offered = [line for message in messages for line in CALL.findall(message)]
    assert offered
    for line in offered:
        assert f"batch[{'a' if kind is dict else 0!r}]" in line
        again, told = trained(**arguments(line))
        assert told == []
        assert len(again.history) == 2
