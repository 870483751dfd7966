"""Modules whose checkpoints are replayed: they are named on a command line, as a user's own are."""

from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, BertModel

from tests.training import CLASSES, Sentences, bert_config, loader, redrawn

NAME = "tests.record.modules"


class Classifier(pl.LightningModule):
    """A classifier that is made of its hyperparameters alone."""

    def __init__(self, layers: int = 2, classes: int = CLASSES) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = redrawn(
            BertForSequenceClassification(bert_config(num_hidden_layers=layers, num_labels=classes))
        ).train()

    def loss_of(self, batch: Any) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_of(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss_of(batch), batch_size=8)

    def configure_optimizers(self) -> Any:
        import torch

        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(Sentences())


class OwnHead(Classifier):
    """A head of one's own on the second token, whose step pops the labels."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__(layers)
        self.model = redrawn(BertModel(bert_config(num_hidden_layers=layers))).train()
        self.head = redrawn(nn.Linear(16, CLASSES), 1)

    def loss_of(self, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        hidden = self.model(**batch).last_hidden_state
        return nn.functional.cross_entropy(self.head(hidden[:, 1]), labels)


class NeedsMore(Classifier):
    """Needs an argument that its checkpoints do not hold."""

    def __init__(self, size: int, layers: int = 2) -> None:
        super().__init__(layers)
        self.save_hyperparameters("layers")
        self.hparams.pop("size", None)


class Data(pl.LightningDataModule):
    """Other validation sentences than the module's."""

    def __init__(self, seed: int = 7) -> None:
        super().__init__()
        self.seed = seed

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(Sentences(seed=self.seed))


class NoData(pl.LightningModule):
    """Has no validation loader."""
