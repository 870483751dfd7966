"""Small trainings: sentences of many lengths, encoders whose weights are not all alike, modules of several styles."""

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from globenc_lightning import METHODS, attribute
from globenc_lightning.errors import GlobEncWarning

PAD, UNKNOWN, CLS, SEP = 0, 1, 2, 3
FIRST_WORD = 4
MASK = 7
"""The word that stands for masked ones, in a tokenizer that has such a token."""
VOCABULARY = 60
CLASSES = 3
ODD_WORDS = ("<script>", "a\x07b", "&amp;", "##ing", "*|`", "\u202egnp", "日本", "\U0001f600", "\u200b", "x" * 70)

Row = dict[str, Tensor]
Metrics = Mapping[str, Any]


class Sentences(Dataset[Row]):
    """Rows as ``datasets`` gives them after ``padding="max_length"``: token ids, mask, label."""

    def __init__(
        self,
        size: int = 20,
        *,
        shortest: int = 3,
        longest: int = 11,
        width: int = 14,
        seed: int = 0,
        empty: Sequence[int] = (),
        labels: bool = True,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.rows: list[Row] = []
        for index in range(size):
            length = int(torch.randint(shortest, longest + 1, (1,), generator=draw))
            ids = torch.full((width,), PAD)
            ids[:length] = torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=draw)
            ids[0] = CLS
            if length > 1:
                ids[length - 1] = SEP
            mask = (torch.arange(width) < (0 if index in empty else length)).long()
            row = {"input_ids": ids, "attention_mask": mask}
            if labels:
                row["labels"] = torch.tensor(index % CLASSES)
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return dict(self.rows[index])

    def first(self, size: int) -> Row:
        """The first rows as one batch."""
        return {key: torch.stack([row[key] for row in self.rows[:size]]) for key in self.rows[0]}

    def ids(self, index: int) -> list[int]:
        """A row's token ids without padding."""
        return self.rows[index]["input_ids"][self.rows[index]["attention_mask"].bool()].tolist()


class Stream(IterableDataset[Row]):
    """The same rows from a source that does not know how many there are."""

    def __init__(self, sentences: Sentences) -> None:
        self.sentences = sentences

    def __iter__(self) -> Iterator[Row]:
        return (self.sentences[index] for index in range(len(self.sentences)))


def loader(data: Dataset[Row], batch_size: int = 8, **options: Any) -> DataLoader[Row]:
    return DataLoader(data, batch_size=batch_size, **options)


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw the weights anew, widely: a fresh encoder's attention is uniform and its LayerNorms do nothing."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 1.5 / module.in_features**0.5, generator=draw)
                if module.bias is not None:
                    module.bias.normal_(0, 0.2, generator=draw)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.6, generator=draw)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5, generator=draw)
                module.bias.normal_(0, 0.3, generator=draw)
    return model


def bert_config(**changes: Any) -> BertConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 40, "num_labels": CLASSES}
    return BertConfig(**{**sizes, **changes})


def classifier(family: str = "bert", **changes: Any) -> Any:
    """A sequence classifier with dropout on."""
    if family == "bert":
        return redrawn(BertForSequenceClassification(bert_config(**changes))).train()
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "num_labels": CLASSES}
    if family == "distilbert":
        sizes |= {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}
        return redrawn(DistilBertForSequenceClassification(DistilBertConfig(**sizes))).train()
    sizes |= {"embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24}
    return redrawn(AlbertForSequenceClassification(AlbertConfig(**sizes))).train()


class Steps(pl.LightningModule):
    """Calls ``self.model`` in its steps and has no forward of its own."""

    model: Any

    def __init__(self, model: nn.Module | None = None, **others: Any) -> None:
        super().__init__()
        self.model = classifier() if model is None else model
        for name, value in others.items():
            setattr(self, name, value)

    def loss_of(self, batch: Any) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss_of(batch)
        self.log("train_loss", loss, on_step=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss_of(batch), batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((one for one in self.parameters() if one.requires_grad), lr=3e-3)


class Forwards(Steps):
    """``forward(**batch)`` returns a Hugging Face output."""

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def loss_of(self, batch: Any) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss


class OwnHead(Steps):
    """A model without a head, and a head of one's own."""

    head: Any

    def __init__(self, **others: Any) -> None:
        super().__init__(redrawn(BertModel(bert_config())).train(), **others)
        self.head = redrawn(nn.Linear(16, CLASSES), 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.head(hidden[:, 0])
        return logits

    def loss_of(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])


class PopsLabels(Steps):
    """Takes the labels out of the batch it was given."""

    def loss_of(self, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(self.model(**batch).logits, labels)


class TakesTuples(Steps):
    """Its batches are tuples."""

    def loss_of(self, batch: Any) -> Tensor:
        ids, mask, labels = batch
        loss: Tensor = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss


def as_tuples(rows: Sequence[Row]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask", "labels"))


def build_trainer(callbacks: Iterable[pl.Callback] = (), **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    train: Any = None,
    val: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Train on 16 sentences (two batches) unless told otherwise; ``val=()`` is no validation loader at all."""
    trainer = build_trainer(callbacks, **options)
    train = loader(Sentences(16, seed=1)) if train is None else train
    val = loader(Sentences()) if val is None else val
    with warnings.catch_warnings():
        # Lightning's advice on workers and short loggers; none of it is ours.
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(module, train, None if isinstance(val, tuple) else val)
    return trainer


def final_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Everything that a training leaves behind in a process."""
    return copy.deepcopy(
        {
            "weights": trainer.lightning_module.state_dict(),
            "training": [module.training for module in trainer.lightning_module.modules()],
            "requires_grad": [one.requires_grad for one in trainer.lightning_module.parameters()],
            "grad": [one.grad for one in trainer.lightning_module.parameters()],
            "optimizer": trainer.optimizers[0].state_dict(),
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
            "metrics": {name: value for name, value in trainer.callback_metrics.items() if "globenc" not in name},
        }
    )


class Snapshots(pl.Callback):
    """The weights that each validation's own metrics are computed with."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking and batch_idx == 0 and dataloader_idx == 0:
            self.weights.append(copy.deepcopy(pl_module.state_dict()))


class SpoilsOne(pl.Callback):
    """Lets one validation run with NaN in the encoder's weights."""

    def __init__(self, which: int) -> None:
        self.which = which
        self.count = 0

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.count += 1
            self.kept = copy.deepcopy(pl_module.state_dict())
            if self.count == self.which:
                with torch.no_grad():
                    next(pl_module.parameters()).fill_(float("nan"))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and self.count == self.which:
            pl_module.load_state_dict(self.kept)


class Memory(Logger):
    """Keeps metrics in memory; has no way to show images."""

    def __init__(self, refuses: Callable[[str], bool] = lambda tag: False) -> None:
        super().__init__()
        self.refuses = refuses
        self.points: list[tuple[int | None, str, float]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:
        if any(self.refuses(tag) for tag in metrics):
            raise OSError("disk full")
        self.points += [(step, tag, float(value)) for tag, value in metrics.items()]

    def series(self, tag: str) -> list[tuple[int | None, float]]:
        return [(step, value) for step, name, value in self.points if name == tag]

    def steps(self, tag: str) -> list[int | None]:
        return [step for step, _ in self.series(tag)]

    @property
    def ours(self) -> list[tuple[int | None, str, float]]:
        return [point for point in self.points if point[1].startswith("globenc")]

    @property
    def others(self) -> list[tuple[int | None, str, float]]:
        return [point for point in self.points if not point[1].startswith("globenc")]


class Album(Memory):
    """Keeps metrics and pictures in memory, as TensorBoard's writer takes them."""

    def __init__(self, refuses: Callable[[str], bool] = lambda tag: False) -> None:
        super().__init__(refuses)
        self.images: list[tuple[str, int, np.ndarray]] = []

    @property
    def experiment(self) -> "Album":
        return self

    def add_image(self, tag: str, picture: np.ndarray, step: int, dataformats: str = "CHW") -> None:
        if self.refuses(tag):
            raise OSError("disk full")
        assert dataformats == "HWC"
        self.images.append((tag, step, picture.copy()))

    def tags(self) -> set[str]:
        return {tag for tag, _, _ in self.images}

    def pictures(self, tag: str) -> list[np.ndarray]:
        return [picture for name, _, picture in self.images if name == tag]


def by_hand(module: nn.Module, weights: Mapping[str, Tensor], batch: Row, **settings: Any) -> dict[str, Tensor]:
    """Method -> (b, l) correlations that ``attribute`` finds for these weights."""
    module.load_state_dict(weights)
    return attribute(module, batch, **{"methods": METHODS, **settings}).correlation


def events(folder: str | Path | None) -> EventAccumulator:
    everything = {"images": 0, "tensors": 0, "scalars": 0, "histograms": 0}
    accumulator = EventAccumulator(str(folder), size_guidance=everything)
    accumulator.Reload()
    return accumulator


@contextmanager
def said() -> Iterator[list[str]]:
    """The warnings of ours that are given inside."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield messages
        finally:
            messages += [str(one.message) for one in caught if issubclass(one.category, GlobEncWarning)]


def word(index: int) -> str:
    """The word behind a token id."""
    if index < FIRST_WORD:
        return ("[PAD]", "[UNK]", "[CLS]", "[SEP]")[index]
    return (*ODD_WORDS, *(f"word{number}" for number in range(VOCABULARY)))[index - FIRST_WORD]


def tokenizer(mask: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer for the vocabulary of :class:`Sentences`, odd words in it.

    Args:
        mask: whether it has a mask token: ``MASK``, one of the words.
    """
    vocabulary = {word(index): index for index in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    if mask:
        words.add_special_tokens({"mask_token": word(MASK)})
    return words
