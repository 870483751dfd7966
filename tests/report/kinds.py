"""A small real training of every kind of decision, to look at what is shown of it.

``python -m tests.report.kinds FOLDER`` writes them into a folder that TensorBoard can be started on.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from globenc_lightning import GlobEncCallback
from tests.training import CLS, FIRST_WORD, SEP, VOCABULARY, Steps, bert_config, classifier, fit, redrawn, tokenizer

Batch = dict[str, Tensor]
ENTITIES = ("O", "B-PER", "I-PER", "B-LOC")
SENTIMENTS = ("negative", "neutral", "positive")
TOPICS = ("sport", "politics", "science", "music")


def named(names: Sequence[str]) -> dict[str, Any]:
    """A configuration's classes and their names."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: place for place, name in enumerate(names)},
    }


def texts(size: int, width: int = 12, seed: int = 0) -> Batch:
    """Token ids between [CLS] and [SEP], padded on the right, and their mask."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD + 10, VOCABULARY, (size, width), generator=draw)
    lengths = torch.randint(8, width + 1, (size,), generator=draw)
    lengths[0] = width
    mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
    ids[:, 0] = CLS
    ids[torch.arange(size), lengths - 1] = SEP
    return {"input_ids": ids * mask, "attention_mask": mask}


class Pairs(Steps):
    """Queries and their passages, told apart by the similarity of two encoders' [CLS]."""

    loss_kind = "in-batch"

    def __init__(self) -> None:
        super().__init__(redrawn(BertModel(bert_config())).train())
        self.passages = redrawn(BertModel(bert_config()), 1).train()

    def loss_of(self, batch: Any) -> Tensor:
        query = self.model(
            input_ids=batch["query_input_ids"], attention_mask=batch["query_attention_mask"]
        ).last_hidden_state[:, 0]
        passage = self.passages(
            input_ids=batch["passage_input_ids"], attention_mask=batch["passage_attention_mask"]
        ).last_hidden_state[:, 0]
        if self.loss_kind == "cosine":
            return (1 - F.cosine_similarity(query, passage)).mean()
        return F.cross_entropy(query @ passage.T, torch.arange(len(query)))


class Cosine(Pairs):
    """The same by cosine similarity."""

    loss_kind = "cosine"


def _model(kind: str) -> Steps:
    if kind in ("similarity", "cosine"):
        return Pairs() if kind == "similarity" else Cosine()
    models: dict[str, Callable[[], Any]] = {
        "classification": lambda: classifier(**named(SENTIMENTS)),
        "multi-label": lambda: redrawn(
            BertForSequenceClassification(bert_config(**named(TOPICS), problem_type="multi_label_classification"))
        ),
        "regression": lambda: redrawn(
            BertForSequenceClassification(bert_config(num_labels=1, problem_type="regression"))
        ),
        "binary": lambda: redrawn(BertForSequenceClassification(bert_config(num_labels=1))),
        "token classification": lambda: redrawn(BertForTokenClassification(bert_config(**named(ENTITIES)))),
        "masked token": lambda: redrawn(BertForMaskedLM(bert_config())),
        "next token": lambda: redrawn(
            GPT2LMHeadModel(
                GPT2Config(vocab_size=VOCABULARY, n_positions=40, n_embd=16, n_layer=3, n_head=2, bos_token_id=CLS)
            )
        ),
        "span": lambda: redrawn(BertForQuestionAnswering(bert_config(num_labels=2))),
        "choice": lambda: redrawn(BertForMultipleChoice(bert_config())),
        "text to text": lambda: redrawn(
            T5ForConditionalGeneration(
                T5Config(
                    vocab_size=VOCABULARY,
                    d_model=16,
                    d_kv=8,
                    d_ff=24,
                    num_layers=3,
                    num_heads=2,
                    decoder_start_token_id=0,
                )
            )
        ),
    }
    return (Logit if kind == "binary" else Steps)(models[kind]().train())


class Logit(Steps):
    """One logit, learned by binary cross-entropy."""

    def loss_of(self, batch: Any) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = self.model(**inputs).logits[:, 0]
        return F.binary_cross_entropy_with_logits(logits, batch["labels"])


def batch_of(kind: str, size: int = 6, seed: int = 0) -> Batch:
    """A batch of a kind's own form, in which the words tell the labels."""
    found = texts(size, seed=seed)
    ids, mask = found["input_ids"], found["attention_mask"]
    place = torch.arange(size)
    if kind == "classification":
        return {**found, "labels": ids[:, 1] % 3}
    if kind == "binary":
        return {**found, "labels": (ids[:, 1] % 2).float()}
    if kind == "multi-label":
        return {**found, "labels": torch.stack([(ids[:, 1] >> bit) % 2 for bit in range(len(TOPICS))], 1).float()}
    if kind == "regression":
        return {**found, "labels": ids[:, 1].float() / VOCABULARY - 0.6}
    if kind == "token classification":
        labels = torch.where(ids % 5 == 0, 1, 0)
        labels[:, 4] = 1 + place % 3
        return {**found, "labels": labels.masked_fill((mask == 0) | (ids < FIRST_WORD), -100)}
    if kind == "masked token":
        labels = torch.full_like(ids, -100)
        chosen = 2 + place % 4
        labels[place, chosen] = ids[place, chosen]
        ids[place, chosen] = 1
        return {**found, "labels": labels}
    if kind == "next token":
        return {**found, "labels": ids.masked_fill(mask == 0, -100)}
    if kind == "span":
        start = 2 + place % 3
        return {**found, "start_positions": start, "end_positions": start + 1}
    if kind == "choice":
        several = [texts(size, width=width, seed=seed + width) for width in (9, 10, 12)]
        padded = [{key: F.pad(value, (0, 12 - value.shape[1])) for key, value in one.items()} for one in several]
        return {**{key: torch.stack([one[key] for one in padded], 1) for key in padded[0]}, "labels": place % 3}
    if kind == "text to text":
        return {**found, "labels": ids[:, 1:5].clone()}
    other = texts(size, width=10, seed=seed + 100)
    return {
        **{f"query_{key}": value for key, value in found.items()},
        **{f"passage_{key}": value for key, value in other.items()},
    }


KINDS = (
    "classification",
    "binary",
    "multi-label",
    "regression",
    "token classification",
    "masked token",
    "next token",
    "span",
    "choice",
    "similarity",
    "cosine",
    "text to text",
)


def train(kind: str, logger: Any = False, *, epochs: int = 3, rate: float = 3e-3, **options: Any) -> GlobEncCallback:
    """Train a small module of one kind with its callback.

    Args:
        kind: one of ``KINDS``.
        logger: Lightning's.
        epochs: how many; each ends in a validation.
        rate: of learning.
        **options: the callback's.
    """
    torch.manual_seed(0)
    module = _model(kind)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=rate)  # type: ignore[method-assign]
    callback = GlobEncCallback(**{"num_examples": 6, "tokenizer": tokenizer(), **options})
    loaders = {
        name: DataLoader([batch_of(kind, seed=seed)], batch_size=None) for name, seed in (("train", 1), ("val", 0))
    }
    fit(module, callback, **loaders, max_epochs=epochs, logger=logger, log_every_n_steps=1)
    return callback


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    options = parser.parse_args(arguments)
    for kind in options.kinds:
        logger = TensorBoardLogger(str(options.folder), name=None, version=kind.replace(" ", "-"))
        train(kind, logger, epochs=6, rate=2e-2)


if __name__ == "__main__":
    main()
