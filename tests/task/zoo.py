"""Small LightningModules of the kinds that people write, each with the score that explains it, written out by hand.

Nothing of ``globenc_lightning`` is used here. A score goes through the module's own parts, so that a test can compare
what the callback finds with plain gradients.

Axes: ``b`` example, ``s`` token, ``c`` class, ``n`` choice.
"""

from collections import Counter, namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from tests.training import tokenizer, word

PAD, CLS, SEP, FIRST_WORD, VOCABULARY, WIDTH = 0, 2, 3, 4, 60, 32
CLASSES, IGNORED = 3, -100
VALIDATION, TRAINING = (10, 11), (0, 1)
"""The seeds of the batches that are shown, and of those that are trained on."""

_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": PAD}

Batch = Any
Score = Callable[[Any, Batch], Tensor]


def drawn(model: nn.Module, seed: int = 0) -> Any:
    """Draw every parameter anew, widely, so that attention is not uniform and norms do something."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                new = torch.randn(parameter.shape, generator=draw) * 0.2
                parameter.copy_(new if "bias" in name else 1 + new)
            else:
                spread = 0.6 if "embed" in name else 1.2 / parameter.shape[1:].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * spread)
    return model


def bert_config(**changes: Any) -> BertConfig:
    return BertConfig(**{**_SIZES, **changes})


def bert(seed: int = 0) -> Any:
    return drawn(BertModel(bert_config(), add_pooling_layer=False), seed).train()


def linear(width: int, classes: int, seed: int = 5) -> Any:
    return drawn(nn.Linear(width, classes), seed)


# Batches. A seed makes one: 5 examples or 4, of 9 tokens or 8.


def text(seed: int, size: int | None = None, *, full: bool = False, left: bool = False) -> tuple[Tensor, Tensor]:
    """(b, s) ids and mask of texts of several lengths."""
    draw = torch.Generator().manual_seed(seed)
    b, s = (5 - seed % 2) if size is None else size, 9 - seed % 2
    lengths = torch.randint(4, s + 1, (b, 1), generator=draw)
    if full:
        lengths[:] = s
    ids = torch.randint(FIRST_WORD, VOCABULARY, (b, s), generator=draw)
    ids[:, 0] = CLS
    mask = (torch.arange(s) < lengths).long()
    ids = ids.scatter(1, lengths - 1, SEP).masked_fill(mask == 0, PAD)
    return (ids.flip(1), mask.flip(1)) if left else (ids, mask)


def classes(seed: int, count: int = CLASSES, size: int | None = None) -> Tensor:
    """(b,) labels."""
    b = (5 - seed % 2) if size is None else size
    return torch.randint(0, count, (b,), generator=torch.Generator().manual_seed(seed + 100))


def values(seed: int) -> Tensor:
    """(b,) targets of a regression."""
    return torch.rand(5 - seed % 2, generator=torch.Generator().manual_seed(seed + 200)) * 5


def tags(seed: int, count: int = 4) -> Tensor:
    """(b, s) labels of tokens; special tokens and padding do not count."""
    ids, mask = text(seed)
    labels = torch.randint(0, count, ids.shape, generator=torch.Generator().manual_seed(seed + 300))
    return labels.masked_fill((mask == 0) | (ids == CLS) | (ids == SEP), IGNORED)


def hugging_face(seed: int, count: int = CLASSES) -> dict[str, Tensor]:
    ids, mask = text(seed)
    return {"input_ids": ids, "attention_mask": mask, "labels": classes(seed, count)}


def own_names(seed: int) -> dict[str, Tensor]:
    ids, mask = text(seed)
    return {"ids": ids, "mask": mask, "y": classes(seed)}


def triple(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return (*text(seed), classes(seed))


def binary_triple(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return (*text(seed), classes(seed, 2).float())


def value_triple(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return (*text(seed), values(seed))


def several_triple(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return (*text(seed), torch.stack([classes(seed + shift, 2, 5 - seed % 2) for shift in (0, 20, 40, 60)], 1).float())


def tagged_triple(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return (*text(seed), tags(seed))


def pair(seed: int) -> dict[str, dict[str, Tensor]]:
    """Nested: an anchor and a positive, tokenised apart."""
    parts = {}
    for name, shift in (("anchor", 0), ("positive", 50)):
        ids, mask = text(seed + shift)
        parts[name] = {"input_ids": ids, "attention_mask": mask}
    return parts


def sentences(seed: int) -> tuple[list[str], Tensor]:
    """Texts that the step tokenises."""
    ids, mask = text(seed)
    rows = [[word(int(one)) for one in row[kept.bool()][1:-1]] for row, kept in zip(ids, mask, strict=True)]
    return [" ".join(row) for row in rows], classes(seed)


def choices(seed: int, count: int = 3) -> dict[str, Tensor]:
    """(b, n, s): every example has several texts."""
    b = 3
    ids, mask = text(seed, b * count)
    return {
        "input_ids": ids.view(b, count, -1),
        "attention_mask": mask.view(b, count, -1),
        "labels": classes(seed, count, b),
    }


def spans(seed: int) -> dict[str, Tensor]:
    ids, mask = text(seed, full=True)
    ends = mask.sum(1) - 1
    starts = classes(seed, 2, len(ids)) + 1
    return {"input_ids": ids, "attention_mask": mask, "start_positions": starts, "end_positions": ends}


def masked(seed: int) -> dict[str, Tensor]:
    ids, mask = text(seed)
    chosen = torch.zeros_like(mask).bool()
    chosen[:, 2] = True
    chosen[::2, 1] = True
    labels = ids.masked_fill(~chosen, IGNORED)
    return {"input_ids": ids.masked_fill(chosen, 1), "attention_mask": mask, "labels": labels}


def continued(seed: int) -> dict[str, Tensor]:
    ids, mask = text(seed)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def translated(seed: int) -> dict[str, Tensor]:
    ids, mask = text(seed)
    labels, kept = text(seed + 30, len(ids))
    labels = labels[:, :6].masked_fill(kept[:, :6] == 0, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def images(seed: int) -> tuple[Tensor, Tensor]:
    b = 5 - seed % 2
    return torch.randn(b, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), classes(seed)


def sounds(seed: int) -> dict[str, Tensor]:
    b = 5 - seed % 2
    waves = torch.randn(b, 400, generator=torch.Generator().manual_seed(seed))
    return {"input_values": waves, "labels": classes(seed)}


def rarest(labels: Tensor, of: Callable[[int], Tensor]) -> Tensor:
    """(b,) the position of the label of each example that is rarest in all that is shown; the first of these."""
    counts = Counter(label for seed in VALIDATION for label in of(seed).flatten().tolist())
    places = []
    for row in labels.tolist():
        counted = [place for place, label in enumerate(row) if label != IGNORED]
        places.append(min(counted, key=lambda place, row=row: counts[row[place]]))
    return torch.tensor(places)


def at(logits: Tensor, places: Tensor) -> Tensor:
    """(b, s, c), (b,) -> (b,) the largest logit at one position of each example."""
    return logits[torch.arange(len(logits)), places].amax(-1)


def first_labelled(labels: Tensor) -> Tensor:
    return (labels != IGNORED).int().argmax(1)


def mean_of(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


@dataclass
class Example:
    """A batch that is a dataclass."""

    token_ids: Tensor
    padding: Tensor
    label: Tensor
    source: str = "made up"


Named = namedtuple("Named", ["tokens", "mask", "target"])


def as_dataclass(seed: int) -> Example:
    return Example(*triple(seed))


def as_named_tuple(seed: int) -> Named:
    return Named(*triple(seed))


def as_nested(seed: int) -> dict[str, Any]:
    ids, mask = text(seed)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {"inputs": inputs, "target": {"sentiment": classes(seed)}, "index": list(range(len(ids)))}


def as_encoding(seed: int) -> BatchEncoding:
    return BatchEncoding(hugging_face(seed))


# Modules.


class Module(pl.LightningModule):
    """What most of them have in common: one loss in both steps."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: Any = bert()

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=4, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=1e-3)


class Glue(pl.LightningModule):
    """Lightning's tutorial: text classification on GLUE."""

    def __init__(self, labels: int = 2, config: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="config")
        self.config = config or bert_config(num_labels=labels)
        self.model = drawn(AutoModelForSequenceClassification.from_config(self.config)).train()
        self.labels = labels
        self.validation_step_outputs: dict[int, list[dict[str, Tensor]]] = {}

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        outputs = self(**batch)
        loss: Tensor = outputs[0]
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        outputs = self(**batch)
        val_loss, logits = outputs[:2]
        preds = torch.argmax(logits, axis=1) if self.labels > 1 else logits.squeeze()
        labels = batch["labels"]
        kept = self.validation_step_outputs.setdefault(dataloader_idx, [])
        kept.append({"loss": val_loss, "preds": preds, "labels": labels})
        return val_loss

    def on_validation_epoch_end(self) -> None:
        for number, outputs in self.validation_step_outputs.items():
            preds = torch.cat([one["preds"] for one in outputs]).detach().cpu()
            labels = torch.cat([one["labels"] for one in outputs]).detach().cpu()
            loss = torch.stack([one["loss"] for one in outputs]).mean()
            self.log_dict({f"val_loss_{number}": loss, f"agree_{number}": (preds == labels).float().mean()})
        self.validation_step_outputs.clear()

    def configure_optimizers(self) -> Any:
        no_decay = ["bias", "LayerNorm.weight"]
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for n, p in named if not any(nd in n for nd in no_decay)], "weight_decay": 0.01},
            {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-8)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]


class HeadInStep(Module):
    """(ids, mask, y) of a TensorDataset; no forward; the head is applied in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear(WIDTH, CLASSES)
        self.criterion: nn.Module = nn.CrossEntropyLoss()

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        found: Tensor = self.head(hidden[:, 0])
        return found

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        found: Tensor = self.criterion(self.logits(ids, mask), y)
        return found


class Smoothed(HeadInStep):
    """Label smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)


class Weighted(HeadInStep):
    """Class weights."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]))


class Margin(HeadInStep):
    """A hinge over classes."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.MultiMarginLoss()


class OnDataclass(HeadInStep):
    """The batch is a dataclass."""

    def loss(self, batch: Example) -> Tensor:
        return F.cross_entropy(self.logits(batch.token_ids, batch.padding), batch.label)


class OnNamedTuple(HeadInStep):
    """The batch is a named tuple."""

    def loss(self, batch: Named) -> Tensor:
        return F.cross_entropy(self.logits(batch.tokens, batch.mask), batch.target)


class OnNested(HeadInStep):
    """The batch is nested, and names its entries in its own way."""

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        inputs = batch["inputs"]
        logits = self.logits(inputs["input_ids"], inputs["attention_mask"])
        return F.cross_entropy(logits, batch["target"]["sentiment"])


class OnOwnNames(HeadInStep):
    """The batch's entries are called ids, mask and y; forward takes them."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.logits(ids, mask)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch["ids"], batch["mask"]), batch["y"])


class OnTexts(HeadInStep):
    """The step tokenises."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = tokenizer()

    def encoded(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(list(texts), padding=True, return_tensors="pt").to(self.device)

    def loss(self, batch: tuple[list[str], Tensor]) -> Tensor:
        texts, y = batch
        encoded = self.encoded(texts)
        return F.cross_entropy(self.logits(encoded["input_ids"], encoded["attention_mask"]), y)


class WithoutMask(HeadInStep):
    """(ids, y): all texts are of one length, and nobody gives a mask."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, y = batch
        return F.cross_entropy(self.head(self.encoder(ids).last_hidden_state[:, 0]), y)


class ForwardPredicts(HeadInStep):
    """forward is for inference: below no_grad, and it returns class indices."""

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.logits(ids, mask).argmax(-1)


class LinearProbe(HeadInStep):
    """The encoder is frozen, and runs below no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.eval().requires_grad_(False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.encoder(ids, attention_mask=mask).last_hidden_state[:, 0]
        found: Tensor = self.head(features)
        return found

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.cross_entropy(self(ids, mask), y)


class Configured(HeadInStep):
    """The encoder is made in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = None

    def configure_model(self) -> None:
        if self.encoder is None:
            self.encoder = bert()


class SetUp(HeadInStep):
    """The encoder and the head are made in setup."""

    def __init__(self) -> None:
        super().__init__()
        del self.encoder, self.head

    def setup(self, stage: str) -> None:
        if not hasattr(self, "encoder"):
            self.encoder, self.head = bert(), linear(WIDTH, CLASSES)


class SortedByLength(HeadInStep):
    """forward sorts its texts by length, and puts the logits back."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True)
        return self.logits(ids[order], mask[order])[order.argsort()]

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.cross_entropy(self(ids, mask), y)


class ByHand(HeadInStep):
    """Manual optimisation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Measured(HeadInStep):
    """A metric is updated before the loss, and a list behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.seen: list[Tensor] = []
        self.sizes: list[int] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        ids, mask, y = batch
        self.sizes.append(len(y))
        logits = self.logits(ids, mask)
        self.accuracy.update(logits, y)
        loss = self.criterion(logits, y)
        self.seen.append(logits.argmax(-1))
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", loss)


class NoLossInValidation(HeadInStep):
    """Validation counts what is right; only training has a loss."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        ids, mask, y = batch
        self.log("val_accuracy", (self.logits(ids, mask).argmax(-1) == y).float().mean())


class OneLogit(HeadInStep):
    """One logit and BCEWithLogitsLoss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear(WIDTH, 1)
        self.criterion = nn.BCEWithLogitsLoss()

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        found: Tensor = self.criterion(self.logits(ids, mask), y.unsqueeze(1))
        return found


class OneProbability(OneLogit):
    """A sigmoid in forward, squeezed, and BCELoss."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(ids, mask)).squeeze(-1)

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.binary_cross_entropy(self(ids, mask), y)


class Several(OneLogit):
    """A probability for each of four labels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear(WIDTH, 4)

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        found: Tensor = self.criterion(self.logits(ids, mask), y)
        return found


class SeveralProbabilities(Several):
    """detoxify's: sigmoids in forward, BCELoss."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.logits(ids, mask).sigmoid()

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.binary_cross_entropy(self(ids, mask), y)


class Value(HeadInStep):
    """A regression."""

    def __init__(self, criterion: Callable[..., Tensor] = F.mse_loss) -> None:
        super().__init__()
        self.head = linear(WIDTH, 1)
        self.criterion_of_values = criterion

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return self.criterion_of_values(self.logits(ids, mask).squeeze(-1), y)


class OnMean(Value):
    """Mean pooling, a multi-layer head, smooth L1 loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(linear(WIDTH, 16), nn.Tanh(), linear(16, 1))

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.head(mean_of(self.encoder(ids, attention_mask=mask).last_hidden_state, mask))
        return found

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.smooth_l1_loss(self.logits(ids, mask).view(-1), y)


class Focal(HeadInStep):
    """A focal loss, written out with log_softmax."""

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        logs = torch.log_softmax(self.logits(ids, mask), -1)
        own = logs.gather(1, y.unsqueeze(1)).squeeze(1)
        return (-((1 - own.exp()) ** 2) * own).mean()


class FocalOnAttention(Focal):
    """A focal loss behind attention pooling: the first softmax is not the decision."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = linear(WIDTH, 1, 6)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        weights = self.pool(hidden).squeeze(-1).masked_fill(mask == 0, -1e4).softmax(-1)
        found: Tensor = self.head((hidden * weights.unsqueeze(-1)).sum(1))
        return found

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        own = self.logits(ids, mask).softmax(-1)[torch.arange(len(y)), y]
        return -(((1 - own) ** 2) * own.log()).mean()


class FocalOneLogit(OneLogit):
    """A binary focal loss, written out with a sigmoid."""

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        p = torch.sigmoid(self.logits(ids, mask).squeeze(1)).clamp(1e-6, 1 - 1e-6)
        return -(y * (1 - p) ** 2 * p.log() + (1 - y) * p**2 * (1 - p).log()).mean()


class OneHot(HeadInStep):
    """Cross-entropy, written out with logsumexp and one-hot labels."""

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        logits = self.logits(ids, mask)
        return (torch.logsumexp(logits, 1) - (logits * F.one_hot(y, CLASSES)).sum(1)).mean()


class LogProbabilities(HeadInStep):
    """log_softmax in forward, nll_loss in the step."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.log_softmax(self.logits(ids, mask), dim=1)

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.nll_loss(self(ids, mask), y)


class Probabilities(HeadInStep):
    """softmax in forward, and the step takes the logarithm."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.softmax(self.logits(ids, mask), dim=-1)

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.nll_loss(torch.log(self(ids, mask) + 1e-9), y)


class Distilled(HeadInStep):
    """A student that follows a frozen teacher, at a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = drawn(AutoModelForSequenceClassification.from_config(bert_config(num_labels=CLASSES)), 9).eval()
        self.teacher.requires_grad_(False)
        self.student = drawn(AutoModelForSequenceClassification.from_config(bert_config(num_labels=CLASSES)), 3).train()
        del self.encoder, self.head

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        with torch.no_grad():
            told = self.teacher(ids, attention_mask=mask).logits
        own = self.student(ids, attention_mask=mask).logits
        soft = F.kl_div(F.log_softmax(own / 2.0, -1), F.softmax(told / 2.0, -1), reduction="batchmean") * 4.0
        return soft + 0.5 * F.cross_entropy(own, y)


class AttentionPooled(HeadInStep):
    """Attention pooling, and a loss that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Sequential(linear(WIDTH, 8, 6), nn.Tanh(), linear(8, 1, 7))

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        weights = torch.softmax(self.pool(hidden).masked_fill(mask.unsqueeze(-1) == 0, float("-inf")), 1)
        found: Tensor = self.head((hidden * weights).sum(1))
        return found


class MaxPooled(HeadInStep):
    """Max pooling over the real tokens."""

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        found: Tensor = self.head(hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1))
        return found


class Recurrent(HeadInStep):
    """An LSTM over the tokens, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = drawn(nn.LSTM(WIDTH, 12, batch_first=True, bidirectional=True), 4)
        self.head = linear(24, CLASSES)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        found: Tensor = self.head(self.lstm(hidden)[0].mean(1))
        return found


class LastToken(HeadInStep):
    """A Llama whose texts are padded at the left: the last column is read."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(**{key: value for key, value in _SIZES.items() if key != "pad_token_id"})
        self.encoder = drawn(LlamaModel(config)).train()

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        found: Tensor = self.head(hidden[:, -1])
        return found


class HuggingFace(Module):
    """A Hugging Face model with a head, whose loss is taken."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        del self.encoder
        self.model = drawn(model).train()

    def loss(self, batch: Batch) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss


class Images(HuggingFace):
    """(pixels, y) of a torchvision data set."""

    def loss(self, batch: Batch) -> Tensor:
        pixels, y = batch
        return F.cross_entropy(self.model(pixel_values=pixels).logits, y)


class Tagger(HeadInStep):
    """A label per token, by view(-1, c)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear(WIDTH, 4)
        self.dropout = nn.Dropout(0.1)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.head(self.dropout(self.encoder(ids, attention_mask=mask).last_hidden_state))
        return found

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.cross_entropy(self.logits(ids, mask).view(-1, 4), y.view(-1))


class TaggerByClass(Tagger):
    """A label per token, by (b, c, s)."""

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.cross_entropy(self.logits(ids, mask).transpose(1, 2), y)


class TaggerOnActive(Tagger):
    """A label per token; padding and special tokens are taken out before the loss."""

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        active = (mask.view(-1) == 1) & (y.view(-1) != IGNORED)
        return F.cross_entropy(self.logits(ids, mask).view(-1, 4)[active], y.view(-1)[active])


class TaggerFocal(Tagger):
    """A label per token, by a focal loss written out, over the tokens that are labelled."""

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        logs = F.log_softmax(self.logits(ids, mask), dim=-1)
        counted = y != IGNORED
        own = logs.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -((1 - own.exp()) ** 2 * own)[counted].mean()


class Shifted(Module):
    """A causal language model whose step shifts by hand."""

    def __init__(self) -> None:
        super().__init__()
        del self.encoder
        self.gpt = drawn(GPT2LMHeadModel(gpt2_config())).train()

    def loss(self, batch: Batch) -> Tensor:
        logits = self.gpt(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        shifted, labels = logits[..., :-1, :].contiguous(), batch["labels"][..., 1:].contiguous()
        return F.cross_entropy(shifted.view(-1, shifted.size(-1)), labels.view(-1))


class Reader(HeadInStep):
    """Question answering, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qa_outputs = linear(WIDTH, 2)
        del self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        start, end = self.qa_outputs(hidden).split(1, dim=-1)
        return start.squeeze(-1).contiguous(), end.squeeze(-1).contiguous()

    def loss(self, batch: Batch) -> Tensor:
        start, end = self(batch["input_ids"], batch["attention_mask"])
        return (F.cross_entropy(start, batch["start_positions"]) + F.cross_entropy(end, batch["end_positions"])) / 2


class ReaderWithoutLabels(HuggingFace):
    """Question answering; validation takes the spans alone."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        outputs = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        starts, ends = outputs.start_logits.argmax(-1), outputs.end_logits.argmax(-1)
        self.log("exact", ((starts == batch["start_positions"]) & (ends == batch["end_positions"])).float().mean())


class Chooser(HeadInStep):
    """Multiple choice, flattened by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear(WIDTH, 1)

    def loss(self, batch: Batch) -> Tensor:
        ids, mask = (batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
        logits = self.logits(ids, mask).view(batch["input_ids"].shape[:2])
        return F.cross_entropy(logits, batch["labels"])


class Pairs(Module):
    """Two texts: anchor and positive."""

    def embed(self, side: Mapping[str, Tensor]) -> Tensor:
        hidden = self.encoder(**side).last_hidden_state
        return mean_of(hidden, side["attention_mask"])


class InBatch(Pairs):
    """In-batch negatives: every other text of the batch is a negative; two calls."""

    def similarities(self, batch: Batch) -> Tensor:
        left, right = self.embed(batch["anchor"]), self.embed(batch["positive"])
        return F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T

    def loss(self, batch: Batch) -> Tensor:
        scores = self.similarities(batch) * 20.0
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


class InBatchOneCall(InBatch):
    """In-batch negatives with one call of the encoder on both texts."""

    def similarities(self, batch: Batch) -> Tensor:
        both = {name: torch.cat([batch["anchor"][name], batch["positive"][name]]) for name in batch["anchor"]}
        left, right = self.embed(both).chunk(2)
        return F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T


class DensePassages(Pairs):
    """Dense passage retrieval: two encoders, dot products of first tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.question, self.passage = bert(1), bert(2)
        del self.encoder

    def loss(self, batch: Batch) -> Tensor:
        questions = self.question(**batch["anchor"]).last_hidden_state[:, 0]
        passages = self.passage(**batch["positive"]).last_hidden_state[:, 0]
        scores = torch.matmul(questions, passages.transpose(0, 1))
        logs = F.log_softmax(scores, dim=1)
        return F.nll_loss(logs, torch.arange(len(scores)), reduction="mean")


class SimCSE(HeadInStep):
    """Unsupervised SimCSE: the same text twice, dropout differs."""

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, _ = batch
        one = self.encoder(ids, attention_mask=mask).last_hidden_state[:, 0]
        other = self.encoder(ids, attention_mask=mask).last_hidden_state[:, 0]
        scores = F.cosine_similarity(one.unsqueeze(1), other.unsqueeze(0), dim=-1) / 0.05
        return F.cross_entropy(scores, torch.arange(len(ids)))


class SupervisedSimCSE(Module):
    """Supervised SimCSE: (b, 2, s) texts, flattened into one call, and cosines at a temperature."""

    def ends(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, mask = (batch[name].view(-1, batch[name].shape[-1]) for name in ("input_ids", "attention_mask"))
        found = self.encoder(ids, attention_mask=mask).last_hidden_state[:, 0].view(len(batch["input_ids"]), 2, -1)
        return found[:, 0], found[:, 1]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        one, other = self.ends(batch)
        scores = nn.CosineSimilarity(dim=-1)(one.unsqueeze(1), other.unsqueeze(0)) / 0.05
        return F.cross_entropy(scores, torch.arange(len(one)))


class Triplets(Pairs):
    """SPECTER's: anchor, positive, negative, and a triplet loss."""

    def loss(self, batch: Batch) -> Tensor:
        anchor, positive = self.embed(batch["anchor"]), self.embed(batch["positive"])
        return F.triplet_margin_loss(anchor, positive, positive.roll(1, 0), margin=1.0)


class CosineEmbedding(Pairs):
    """nn.CosineEmbeddingLoss."""

    def loss(self, batch: Batch) -> Tensor:
        left, right = self.embed(batch["anchor"]), self.embed(batch["positive"])
        return F.cosine_embedding_loss(left, right, torch.ones(len(left)))


class CosineRegression(Pairs):
    """SBERT for STS: the cosine is to be the given value."""

    def loss(self, batch: Batch) -> Tensor:
        found = torch.cosine_similarity(self.embed(batch["anchor"]), self.embed(batch["positive"]))
        return F.mse_loss(found, torch.linspace(0, 1, len(found)))


class SentencePairClasses(Pairs):
    """SBERT for NLI: classes of (u, v, |u - v|)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear(3 * WIDTH, CLASSES)

    def logits(self, batch: Batch) -> Tensor:
        u, v = self.embed(batch["anchor"]), self.embed(batch["positive"])
        found: Tensor = self.head(torch.cat([u, v, (u - v).abs()], -1))
        return found

    def loss(self, batch: Batch) -> Tensor:
        logits = self.logits(batch)
        return F.cross_entropy(logits, torch.arange(len(logits)) % CLASSES)


class Reranker(HuggingFace):
    """Question and passage in one text; one logit says how well they fit."""

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        kinds = (torch.arange(ids.shape[1]) > 3).long().expand_as(ids)
        logits = self.model(input_ids=ids, attention_mask=mask, token_type_ids=kinds).logits.view(-1)
        return F.binary_cross_entropy_with_logits(logits, y)


class TwoTasks(HeadInStep):
    """Two heads and two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.topic_head = linear(WIDTH, 2, 6)

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state[:, 0]
        sentiment, topic = self.head(hidden), self.topic_head(hidden)
        return F.cross_entropy(sentiment, y) + 0.5 * F.cross_entropy(topic, y % 2)


class SeveralValues(HeadInStep):
    """Root mean squared errors of several values, their mean, as competitions score essays."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear(WIDTH, 4)

    def errors(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.mse_loss(self.logits(ids, mask), y, reduction="none")

    def loss(self, batch: Batch) -> Tensor:
        return (self.errors(batch).mean(0) + 1e-9).sqrt().mean()


class SeveralAbsolute(SeveralValues):
    """The same with absolute errors where they are large."""

    def errors(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return F.smooth_l1_loss(self.logits(ids, mask), y, reduction="none")


class SeveralGaussian(SeveralValues):
    """The likelihood of several values, each with its own spread."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.ones(4))

    def errors(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        values = self.logits(ids, mask)
        return F.gaussian_nll_loss(values, y, self.spread.square().expand_as(values), reduction="none")

    def loss(self, batch: Batch) -> Tensor:
        return self.errors(batch).mean()


class Ordinal(HeadInStep):
    """CORAL: one value, a threshold for each rank, and its loss written out."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear(WIDTH, 1)
        self.thresholds = nn.Parameter(torch.tensor([0.7, -0.6]))

    def ranks(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.logits(ids, mask) + self.thresholds

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        logits, above = self.ranks(ids, mask), (y.unsqueeze(1) > torch.arange(2)).float()
        found = F.logsigmoid(logits)
        return -(found * above + (found - logits) * (1 - above)).sum(1).mean()


class RandomField(Tagger):
    """A conditional random field over the tokens, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.moves = nn.Parameter(torch.linspace(-0.5, 0.5, 16).view(4, 4))

    def likelihood(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        seen, y = self.head(self.encoder(ids, attention_mask=mask).last_hidden_state), y.clamp(min=0)
        total, own = seen[:, 0], seen[:, 0].gather(1, y[:, :1]).squeeze(1)
        for place in range(1, seen.shape[1]):
            real = mask[:, place].bool()
            after = torch.logsumexp(total.unsqueeze(2) + self.moves + seen[:, place].unsqueeze(1), 1)
            total = torch.where(real.unsqueeze(1), after, total)
            step = self.moves[y[:, place - 1], y[:, place]] + seen[:, place].gather(1, y[:, place : place + 1])[:, 0]
            own = own + step * real
        return own - torch.logsumexp(total, 1)

    def loss(self, batch: Batch) -> Tensor:
        return -self.likelihood(batch).mean()


class Prompted(Module):
    """A masked language model that answers a prompt: one word stands for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.model = drawn(BertForMaskedLM(bert_config())).train()
        self.register_buffer("words", torch.tensor([10, 20, 30]))

    def logits(self, batch: Batch) -> Tensor:
        ids, mask, _ = batch
        ids = torch.cat([ids[:, :1], torch.ones_like(ids[:, :1]), ids[:, 1:]], 1)
        mask = torch.cat([mask[:, :1], mask], 1)
        found: Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, 1]
        return found[:, self.words]

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch[2])


class OwnRegression(Value):
    """A squared error that is written out: no loss function is called."""

    def loss(self, batch: Batch) -> Tensor:
        ids, mask, y = batch
        return (self.logits(ids, mask).squeeze(-1) - y).pow(2).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)


def gpt2_config(**changes: Any) -> GPT2Config:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 40}
    return GPT2Config(**{**sizes, "pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP, **changes})


def t5() -> Any:
    config = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    config.decoder_start_token_id = PAD
    return T5ForConditionalGeneration(config)


def bart() -> Any:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": WIDTH, "vocab_size": VOCABULARY}
    special = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP, "decoder_start_token_id": SEP}
    return BartForConditionalGeneration(BartConfig(**sizes, **special, max_position_embeddings=40))


def vit() -> Any:
    sizes = {key: value for key, value in _SIZES.items() if key not in ("vocab_size", "max_position_embeddings")}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=CLASSES))


def wav2vec2() -> Any:
    convolution = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 3, 2)}
    sizes = {**_SIZES, **convolution, "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8}
    config = Wav2Vec2Config(**sizes, num_conv_pos_embedding_groups=4, num_labels=CLASSES, classifier_proj_size=16)
    config.mask_time_prob = 0.0
    config.layerdrop = 0.0
    return Wav2Vec2ForSequenceClassification(config)


# Cases.


@dataclass(frozen=True)
class Case:
    """One module of the zoo.

    Attributes:
        name: for the test's name.
        what: what is fine-tuned, for the table.
        form: the form of its batches, for the table.
        task: what ``about.task`` has to be.
        module: makes it.
        batch: makes the batch of a seed.
        score: (b,) the score of each example, through the module's own parts.
        arguments: what the callback needs.
        encoder: the encoder that is shown.
        call: which of that encoder's calls in ``score`` is shown.
        rows: the row of that call that each example is decided from; row ``i`` for example ``i`` when None.
        loaders: how many validation loaders there are.
        written: how the argument is written, for the table.
        dataset: whether the loader makes its batches of a ``TensorDataset``.
        shares: whether the scores are the examples' shares in one loss of a whole batch.
    """

    name: str
    what: str
    form: str
    task: str
    module: Callable[[], Any]
    batch: Callable[[int], Batch]
    score: Score
    arguments: Mapping[str, Any] = field(default_factory=dict)
    encoder: Callable[[Any], nn.Module] = lambda module: module.encoder
    call: int = 0
    rows: Callable[[Any, Batch], Tensor] | None = None
    loaders: int = 1
    dataset: bool = False
    shares: bool = False

    @property
    def written(self) -> str:
        """The callback's arguments as a user writes them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())

    def validation(self) -> list[Batch]:
        """The batches that are shown, in order."""
        return list(self.loader(VALIDATION))

    def loader(self, seeds: Sequence[int]) -> DataLoader[Any]:
        """A loader of some batches."""
        batches = [self.batch(seed) for seed in seeds]
        if self.dataset:
            return DataLoader(TensorDataset(*batches[0]), batch_size=3)
        return DataLoader(batches, batch_size=None, collate_fn=_unchanged)  # type: ignore[arg-type]


def _unchanged(batch: Batch) -> Batch:
    return batch


def largest(module: Any, batch: Batch) -> Tensor:
    """The largest logit of (ids, mask, y)."""
    found: Tensor = module.logits(batch[0], batch[1]).amax(-1)
    return found


def of_model(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The largest logit of a Hugging Face model in a module."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found: Tensor = module.model(**inputs).logits.amax(-1)
    return found


def text_score(module: Any, batch: Batch) -> Tensor:
    encoded = module.encoded(batch[0])
    return largest(module, (encoded["input_ids"], encoded["attention_mask"]))


def tag_score(module: Any, batch: Batch) -> Tensor:
    return at(module.logits(batch[0], batch[1]), rarest(batch[2], tags))


def hf_tag_score(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return at(logits, rarest(batch["labels"], tags))


def masked_score(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return at(logits, first_labelled(batch["labels"]))


def next_score(gpt: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits = gpt(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return at(logits, batch["attention_mask"].sum(1) - 2)


def span_score(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    out = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return out.start_logits.amax(1) + out.end_logits.amax(1)


def own_span_score(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    start, end = module(batch["input_ids"], batch["attention_mask"])
    return start.amax(1) + end.amax(1)


def choice_logits(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    if hasattr(module, "model"):
        logits: Tensor = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    own: Tensor = module.logits(ids, mask).view(batch["input_ids"].shape[:2])
    return own


def choice_rows(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits = choice_logits(module, batch)
    return torch.arange(len(logits)) * logits.shape[1] + logits.argmax(1)


def generated_score(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return at(module.model(**batch).logits, first_labelled(batch["labels"]))


def own_cosine(module: Any, batch: Batch) -> Tensor:
    return torch.cosine_similarity(module.embed(batch["anchor"]), module.embed(batch["positive"]))


def passage_score(module: Any, batch: Batch) -> Tensor:
    left = module.question(**batch["anchor"]).last_hidden_state[:, 0]
    right = module.passage(**batch["positive"]).last_hidden_state[:, 0]
    return (left * right).sum(-1)


def sorted_rows(module: Any, batch: Batch) -> Tensor:
    return batch[1].sum(1).argsort(descending=True).argsort()


def topic(module: Any, batch: Batch) -> Tensor:
    hidden = module.encoder(batch[0], attention_mask=batch[1]).last_hidden_state[:, 0]
    found: Tensor = module.topic_head(hidden).amax(-1)
    return found


def distilbert() -> Any:
    return DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=48, num_labels=2)


def two_classes(seed: int) -> dict[str, Tensor]:
    return hugging_face(seed, 2)


def value_dict(seed: int) -> dict[str, Tensor]:
    return {**hugging_face(seed), "labels": values(seed)}


def several_dict(seed: int) -> dict[str, Tensor]:
    ids, mask, y = several_triple(seed)
    return {"input_ids": ids, "attention_mask": mask, "labels": y}


def tagged_dict(seed: int) -> dict[str, Tensor]:
    return {**hugging_face(seed), "labels": tags(seed)}


def without_mask(seed: int) -> tuple[Tensor, Tensor]:
    return text(seed, full=True)[0], classes(seed)


def left_triple(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return (*text(seed, left=True), classes(seed))


def bert_of(module: Any) -> Any:
    return module.model.bert


_DICT = "dict of input_ids, attention_mask, labels"
_TUPLE = "tuple (ids, mask, y)"
_PAIR = "nested dict: anchor and positive"

CASES: list[Case] = [
    Case(
        "glue_cola",
        "GLUE, single sentence (Lightning's tutorial)",
        _DICT,
        "classification",
        Glue,
        two_classes,
        of_model,
        encoder=bert_of,
    ),
    Case(
        "glue_sst2_distilbert",
        "GLUE with DistilBERT (Lightning's tutorial)",
        "BatchEncoding",
        "classification",
        lambda: Glue(2, distilbert()),
        lambda seed: BatchEncoding(two_classes(seed)),
        of_model,
        encoder=lambda module: module.model.distilbert,
    ),
    Case(
        "glue_stsb",
        "GLUE, STS-B: one value (Lightning's tutorial)",
        _DICT,
        "regression",
        lambda: Glue(1),
        value_dict,
        of_model,
        encoder=bert_of,
    ),
    Case(
        "glue_mnli",
        "GLUE, MNLI: two validation loaders (Lightning's tutorial)",
        _DICT,
        "classification",
        lambda: Glue(3),
        hugging_face,
        of_model,
        encoder=bert_of,
        loaders=2,
    ),
    Case(
        "tensor_dataset",
        "classes, head in the step, no forward",
        "tuple of a TensorDataset",
        "classification",
        HeadInStep,
        triple,
        largest,
        dataset=True,
    ),
    Case(
        "texts",
        "classes, texts tokenised in the step",
        "(list of texts, y)",
        "classification",
        OnTexts,
        sentences,
        text_score,
    ),
    Case(
        "dataclass",
        "classes",
        "dataclass",
        "classification",
        OnDataclass,
        as_dataclass,
        lambda module, batch: module.logits(batch.token_ids, batch.padding).amax(-1),
    ),
    Case(
        "named_tuple",
        "classes",
        "named tuple",
        "classification",
        OnNamedTuple,
        as_named_tuple,
        lambda module, batch: module.logits(batch.tokens, batch.mask).amax(-1),
    ),
    Case(
        "nested",
        "classes",
        "nested dict with a list in it",
        "classification",
        OnNested,
        as_nested,
        lambda module, batch: module.logits(*batch["inputs"].values()).amax(-1),
    ),
    Case(
        "own_names",
        "classes",
        "dict of ids, mask, y",
        "classification",
        OnOwnNames,
        own_names,
        lambda module, batch: module(batch["ids"], batch["mask"]).amax(-1),
    ),
    Case(
        "without_mask",
        "classes, no mask",
        "tuple (ids, y)",
        "classification",
        WithoutMask,
        without_mask,
        lambda module, batch: module.head(module.encoder(batch[0]).last_hidden_state[:, 0]).amax(-1),
    ),
    Case(
        "forward_predicts",
        "classes, forward returns class indices below no_grad",
        _TUPLE,
        "classification",
        ForwardPredicts,
        triple,
        largest,
    ),
    Case(
        "linear_probe",
        "a head on a frozen encoder below no_grad",
        _TUPLE,
        "classification",
        LinearProbe,
        triple,
        largest,
    ),
    Case(
        "configure_model",
        "classes, encoder made in configure_model",
        _TUPLE,
        "classification",
        Configured,
        triple,
        largest,
    ),
    Case("setup", "classes, encoder made in setup", _TUPLE, "classification", SetUp, triple, largest),
    Case(
        "sorted_by_length",
        "classes, forward sorts by length",
        _TUPLE,
        "classification",
        SortedByLength,
        triple,
        lambda module, batch: module(batch[0], batch[1]).amax(-1),
        rows=sorted_rows,
    ),
    Case("manual_optimization", "classes, manual optimisation", _TUPLE, "classification", ByHand, triple, largest),
    Case(
        "torchmetrics",
        "classes, a metric before the loss and a list behind it",
        _TUPLE,
        "classification",
        Measured,
        triple,
        largest,
    ),
    Case(
        "no_loss_in_validation",
        "classes, validation without a loss",
        _TUPLE,
        "classification",
        NoLossInValidation,
        triple,
        largest,
    ),
    Case("label_smoothing", "classes, label smoothing", _TUPLE, "classification", Smoothed, triple, largest),
    Case("class_weights", "classes, class weights", _TUPLE, "classification", Weighted, triple, largest),
    Case("multi_margin", "classes, multi-class hinge", _TUPLE, "classification", Margin, triple, largest),
    Case("focal", "classes, focal loss written out with log_softmax", _TUPLE, "classification", Focal, triple, largest),
    Case(
        "focal_attention",
        "classes, focal loss behind attention pooling",
        _TUPLE,
        "classification",
        FocalOnAttention,
        triple,
        largest,
    ),
    Case(
        "one_hot",
        "classes, cross-entropy written out with logsumexp",
        _TUPLE,
        "classification",
        OneHot,
        triple,
        largest,
    ),
    Case(
        "log_probabilities",
        "classes, log_softmax in forward, nll_loss",
        _TUPLE,
        "classification",
        LogProbabilities,
        triple,
        largest,
    ),
    Case("probabilities", "classes, softmax in forward", _TUPLE, "classification", Probabilities, triple, largest),
    Case(
        "distillation",
        "a student of a frozen teacher, kl_div and cross-entropy",
        _TUPLE,
        "classification",
        Distilled,
        triple,
        lambda module, batch: module.student(batch[0], attention_mask=batch[1]).logits.amax(-1),
        encoder=lambda module: module.student.bert,
    ),
    Case(
        "mean_pooling", "one value, mean pooling, smooth L1 loss", _TUPLE, "regression", OnMean, value_triple, largest
    ),
    Case("max_pooling", "classes, max pooling", _TUPLE, "classification", MaxPooled, triple, largest),
    Case("attention_pooling", "classes, attention pooling", _TUPLE, "classification", AttentionPooled, triple, largest),
    Case("lstm", "classes, LSTM over the tokens", _TUPLE, "classification", Recurrent, triple, largest),
    Case(
        "gpt2",
        "classes, GPT-2 with a head on the last token",
        _DICT,
        "classification",
        lambda: HuggingFace(GPT2ForSequenceClassification(gpt2_config(num_labels=CLASSES))),
        hugging_face,
        of_model,
        encoder=lambda module: module.model.transformer,
    ),
    Case("llama_left", "classes, Llama padded at the left", _TUPLE, "classification", LastToken, left_triple, largest),
    Case("binary", "two classes, one logit, BCEWithLogitsLoss", _TUPLE, "binary", OneLogit, binary_triple, largest),
    Case(
        "binary_sigmoid",
        "two classes, sigmoid in forward, BCELoss",
        _TUPLE,
        "binary",
        OneProbability,
        binary_triple,
        largest,
    ),
    Case(
        "binary_focal",
        "two classes, focal loss written out with a sigmoid",
        _TUPLE,
        "binary",
        FocalOneLogit,
        binary_triple,
        largest,
    ),
    Case(
        "reranker",
        "query and passage in one text, one logit",
        _TUPLE,
        "binary",
        lambda: Reranker(AutoModelForSequenceClassification.from_config(bert_config(num_labels=1))),
        binary_triple,
        lambda module, batch: module.model(
            input_ids=batch[0],
            attention_mask=batch[1],
            token_type_ids=(torch.arange(batch[0].shape[1]) > 3).long().expand_as(batch[0]),
        ).logits.view(-1),
        encoder=bert_of,
    ),
    Case("multi_label", "several labels, BCEWithLogitsLoss", _TUPLE, "multi-label", Several, several_triple, largest),
    Case(
        "multi_label_sigmoid",
        "several labels, sigmoids in forward",
        _TUPLE,
        "multi-label",
        SeveralProbabilities,
        several_triple,
        largest,
    ),
    Case(
        "multi_label_hf",
        "several labels, Hugging Face's problem_type",
        _DICT,
        "multi-label",
        lambda: HuggingFace(
            AutoModelForSequenceClassification.from_config(
                bert_config(num_labels=4, problem_type="multi_label_classification")
            )
        ),
        several_dict,
        of_model,
        encoder=bert_of,
    ),
    Case("regression_mse", "one value, mse_loss", _TUPLE, "regression", Value, value_triple, largest),
    Case("regression_l1", "one value, l1_loss", _TUPLE, "regression", lambda: Value(F.l1_loss), value_triple, largest),
    Case(
        "regression_huber",
        "one value, huber_loss",
        _TUPLE,
        "regression",
        lambda: Value(F.huber_loss),
        value_triple,
        largest,
    ),
    Case("tagging", "a label per token, view(-1, c)", _TUPLE, "token classification", Tagger, tagged_triple, tag_score),
    Case(
        "tagging_by_class",
        "a label per token, (b, c, s)",
        _TUPLE,
        "token classification",
        TaggerByClass,
        tagged_triple,
        tag_score,
    ),
    Case(
        "tagging_active",
        "a label per token, active tokens taken out",
        _TUPLE,
        "token classification",
        TaggerOnActive,
        tagged_triple,
        tag_score,
    ),
    Case(
        "tagging_hf",
        "a label per token, Hugging Face",
        _DICT,
        "token classification",
        lambda: HuggingFace(BertForTokenClassification(bert_config(num_labels=4))),
        tagged_dict,
        hf_tag_score,
        encoder=bert_of,
    ),
    Case(
        "masked_lm",
        "masked language model",
        _DICT,
        "masked token",
        lambda: HuggingFace(BertForMaskedLM(bert_config())),
        masked,
        masked_score,
        encoder=bert_of,
    ),
    Case(
        "causal_lm",
        "causal language model, Hugging Face's shift",
        _DICT,
        "next token",
        lambda: HuggingFace(GPT2LMHeadModel(gpt2_config())),
        continued,
        lambda module, batch: next_score(module.model, batch),
        encoder=lambda module: module.model.transformer,
    ),
    Case(
        "causal_lm_by_hand",
        "causal language model, shifted by hand",
        _DICT,
        "next token",
        Shifted,
        continued,
        lambda module, batch: next_score(module.gpt, batch),
        encoder=lambda module: module.gpt.transformer,
    ),
    Case(
        "question_answering",
        "question answering, Hugging Face",
        "dict with start and end positions",
        "span",
        lambda: HuggingFace(BertForQuestionAnswering(bert_config())),
        spans,
        span_score,
        encoder=bert_of,
    ),
    Case(
        "question_answering_by_hand",
        "question answering, split by hand",
        "dict with start and end positions",
        "span",
        Reader,
        spans,
        own_span_score,
    ),
    Case(
        "question_answering_no_labels",
        "question answering, validation without labels",
        "dict with start and end positions",
        "span",
        lambda: ReaderWithoutLabels(BertForQuestionAnswering(bert_config())),
        spans,
        span_score,
        encoder=bert_of,
    ),
    Case(
        "multiple_choice",
        "multiple choice, Hugging Face",
        "dict of (b, n, s)",
        "choice",
        lambda: HuggingFace(BertForMultipleChoice(bert_config())),
        choices,
        lambda module, batch: choice_logits(module, batch).amax(1),
        encoder=bert_of,
        rows=choice_rows,
    ),
    Case(
        "multiple_choice_by_hand",
        "multiple choice, flattened by hand",
        "dict of (b, n, s)",
        "choice",
        Chooser,
        choices,
        lambda module, batch: choice_logits(module, batch).amax(1),
        rows=choice_rows,
    ),
    Case("in_batch_negatives", "bi-encoder, in-batch negatives", _PAIR, "similarity", InBatch, pair, own_cosine),
    Case(
        "in_batch_one_call",
        "bi-encoder, both texts in one call",
        _PAIR,
        "similarity",
        InBatchOneCall,
        pair,
        lambda module, batch: module.similarities(batch).diagonal(),
    ),
    Case(
        "dense_passages",
        "two encoders, question and passage (DPR)",
        _PAIR,
        "similarity",
        DensePassages,
        pair,
        passage_score,
        encoder=lambda module: module.question,
    ),
    Case(
        "dense_passages_second",
        "two encoders, the passage's shown",
        _PAIR,
        "similarity",
        DensePassages,
        pair,
        passage_score,
        {"encoder_call": 1},
        encoder=lambda module: module.passage,
    ),
    Case(
        "simcse",
        "supervised SimCSE, both texts in one call",
        "dict of (b, n, s)",
        "similarity",
        SupervisedSimCSE,
        lambda seed: choices(seed, 2),
        lambda module, batch: torch.cosine_similarity(*module.ends(batch)),
        rows=lambda module, batch: 2 * torch.arange(len(batch["input_ids"])),
    ),
    Case(
        "triplet",
        "triplet loss",
        _PAIR,
        "similarity",
        Triplets,
        pair,
        lambda module, batch: F.pairwise_distance(module.embed(batch["anchor"]), module.embed(batch["positive"])),
    ),
    Case("cosine_embedding", "cosine embedding loss", _PAIR, "similarity", CosineEmbedding, pair, own_cosine),
    Case(
        "cosine_regression",
        "SBERT on STS: cosine and mse_loss",
        _PAIR,
        "similarity",
        CosineRegression,
        pair,
        own_cosine,
    ),
    Case(
        "sentence_pair_classes",
        "SBERT on NLI: (u, v, |u - v|)",
        _PAIR,
        "classification",
        SentencePairClasses,
        pair,
        lambda module, batch: module.logits(batch).amax(-1),
    ),
    Case(
        "sentence_pair_second",
        "SBERT on NLI, the second text shown",
        _PAIR,
        "classification",
        SentencePairClasses,
        pair,
        lambda module, batch: module.logits(batch).amax(-1),
        {"encoder_call": 1},
        call=1,
    ),
    Case(
        "t5",
        "text to text, T5",
        _DICT,
        "text to text",
        lambda: HuggingFace(t5()),
        translated,
        generated_score,
        encoder=lambda module: module.model.encoder,
    ),
    Case(
        "bart",
        "text to text, BART",
        _DICT,
        "text to text",
        lambda: HuggingFace(bart()),
        translated,
        generated_score,
        encoder=lambda module: module.model.model.encoder,
    ),
    Case("two_tasks", "two heads and two losses, the first", _TUPLE, "classification", TwoTasks, triple, largest),
    Case(
        "two_tasks_second",
        "two heads and two losses, the second",
        _TUPLE,
        "classification",
        TwoTasks,
        triple,
        topic,
        {"decision": 1},
    ),
    Case(
        "two_tasks_named",
        "two heads and two losses, by the head's name",
        _TUPLE,
        "classification",
        TwoTasks,
        triple,
        topic,
        {"decision": "topic_head"},
    ),
    Case(
        "own_loss",
        "a squared error that is written out",
        _TUPLE,
        "loss",
        OwnRegression,
        value_triple,
        lambda module, batch: module.loss(batch).expand(len(batch[2])) / len(batch[2]),
        shares=True,
    ),
    *(
        Case(
            name,
            f"several values, {what}",
            _TUPLE,
            "loss",
            module,
            several_triple,
            lambda module, batch: module.errors(batch).mean(1),
        )
        for name, what, module in (
            ("several_values", "root mean squared errors", SeveralValues),
            ("several_absolute", "smooth absolute errors", SeveralAbsolute),
            ("several_gaussian", "their likelihood", SeveralGaussian),
        )
    ),
    Case(
        "ordinal",
        "ranks, CORAL by hand",
        _TUPLE,
        "multi-label",
        Ordinal,
        triple,
        lambda module, batch: module.ranks(*batch[:2]).amax(-1),
    ),
    Case(
        "random_field",
        "tagging, a conditional random field by hand",
        _TUPLE,
        "loss",
        RandomField,
        tagged_triple,
        lambda module, batch: module.loss(batch).expand(len(batch[0])) / len(batch[0]),
        shares=True,
    ),
    Case(
        "prompt",
        "a prompt, and a word for each class",
        _TUPLE,
        "classification",
        Prompted,
        triple,
        lambda module, batch: module.logits(batch).amax(-1),
        encoder=lambda module: module.model.bert,
    ),
    Case(
        "images",
        "images, ViT",
        "tuple (pixels, y)",
        "classification",
        lambda: Images(vit()),
        images,
        lambda module, batch: module.model(pixel_values=batch[0]).logits.amax(-1),
        encoder=lambda module: module.model.vit,
    ),
    Case(
        "audio",
        "audio, wav2vec2",
        "dict of input_values, labels",
        "classification",
        lambda: HuggingFace(wav2vec2()),
        sounds,
        of_model,
        encoder=lambda module: module.model.wav2vec2,
    ),
]
