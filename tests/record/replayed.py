"""LightningModules that the command line finds by name, and trainings of them whose checkpoints are kept."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytorch_lightning as pl
from pyarrow import parquet
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, BertModel

from globenc_lightning import GlobEncCallback
from globenc_lightning.measurement import HistoryEntry
from globenc_lightning.record.writing import RecordOptions
from tests.training import (
    CLASSES,
    OwnHead,
    Row,
    Sentences,
    Steps,
    TakesTuples,
    as_tuples,
    bert_config,
    build_trainer,
    loader,
    redrawn,
)


class Classifier(Steps):
    """A Hugging Face classifier whose size stands in the hyperparameters."""

    def __init__(self, width: int = 16, layers: int = 3, fails: bool = False) -> None:
        config = bert_config(hidden_size=width, num_hidden_layers=layers)
        super().__init__(redrawn(BertForSequenceClassification(config)).train())
        self.save_hyperparameters()
        self.fails = fails

    def val_dataloader(self) -> DataLoader[Row]:
        if self.fails:
            raise FileNotFoundError("no sentences here")
        return loader(Sentences())


class Headed(OwnHead):
    """A head of one's own; takes no arguments."""


class Tuples(TakesTuples):
    """Its batches are tuples."""


class Needs(Steps):
    """Needs an argument that no checkpoint holds."""

    def __init__(self, classes: int) -> None:
        super().__init__(redrawn(BertForSequenceClassification(bert_config(num_labels=classes))).train())


class Blank(pl.LightningModule):
    """Has an encoder, and neither a step nor a loader."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = BertModel(bert_config())


class Plain(nn.Module):
    """No LightningModule."""


class Data(pl.LightningDataModule):
    """The sentences of the validations."""

    def __init__(self, size: int = 20) -> None:
        super().__init__()
        self.size = size

    def val_dataloader(self) -> DataLoader[Row]:
        return loader(Sentences(self.size))


def tuples(size: int, seed: int) -> DataLoader[Any]:
    return loader(Sentences(size, seed=seed), collate_fn=as_tuples)


def needs() -> Needs:
    return Needs(CLASSES)


def train(
    module: pl.LightningModule, folder: Path, *others: pl.Callback, epochs: int = 3, **options: Any
) -> list[HistoryEntry]:
    """Train with a record in ``folder/own`` and checkpoints in ``folder/checkpoints``; returns the run's history."""
    callback = GlobEncCallback(
        record=RecordOptions(folder / "own", run="run"), **{"num_examples": 6, "heatmap_examples": 0, **options}
    )
    keeps = ModelCheckpoint(folder / "checkpoints", filename="{step}", save_top_k=-1)
    pl.seed_everything(5, verbose=False)
    trainer = build_trainer([callback, *others, keeps], max_epochs=epochs, enable_checkpointing=True)
    if isinstance(module, Tuples):
        loaders: tuple[Any, Any] = tuples(16, 1), tuples(20, 0)
    else:
        loaders = loader(Sentences(16, seed=1)), loader(Sentences())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(module, *loaders)
    return copy.deepcopy(callback.history)


def tables(folder: Path, run: str, kind: str) -> dict[str, pa.Table]:
    """The tables of a run, by the names of their files."""
    return {
        file.name: parquet.read_table(file, partitioning=None)
        for file in sorted((folder / kind / f"run={run}").glob("*.parquet"))
    }
