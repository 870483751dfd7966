"""A training with several tokenizers: the encoder that is shown has its own, which is told once."""

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from globenc_lightning import GlobEncCallback
from globenc_lightning.errors import GlobEncWarning
from tests import models
from tests.test_tokenizers import Words


class Module(pl.LightningModule):
    def __init__(self, tokenizers: dict[str, Any]) -> None:
        super().__init__()
        for name, tokenizer in tokenizers.items():
            setattr(self, name, tokenizer)
        self.bert, self.head = models.build("bert").bert, nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.bert(input_ids, attention_mask=attention_mask).pooler_output)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "tokenizers",
    [
        {"target_tokenizer": Words("de"), "source_tokenizer": Words("en")},
        {"teacher_tok": Words("de"), "bert_tok": Words("en")},
        {"a": Words("de", 500), "b": Words("en", 99)},
    ],
    ids=["source and target", "teacher", "size"],
)
def test_the_tokens_are_named_by_the_encoders_own_tokenizer(tokenizers: dict[str, Any], given: bool) -> None:
    texts = models.batch((9, 5, 7, 8))
    rows = [
        {**{key: value[place] for key, value in texts.items()}, "labels": torch.tensor(place % 2)} for place in range(4)
    ]
    callback = GlobEncCallback(texts if given else None, num_examples=4, heatmap_examples=0)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Module(tokenizers), DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4))
    assert callback.history.about is not None
    assert callback.history.about.tokens[1] == tuple(f"en{token}" for token in texts["input_ids"][1, :5].tolist())
    said = [one for one in caught if issubclass(one.category, GlobEncWarning)]
    assert len(said) == 1
    assert "2 tokenizers are within reach" in str(said[0].message)
    # It points to the line that called the Trainer.
    assert said[0].filename == __file__
