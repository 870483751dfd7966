"""Trains twice, with and without ``GlobEncCallback``, and compares to the last bit: ``python -m tests.neutrality``.

Prints one row per setting, and exits with 1 if anything differs.
"""

import copy
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import PretrainedConfig

from globenc_lightning import GlobEncCallback
from tests import models
from tests.averaging import NO_AVERAGING, EMAWeightAveraging, EveryStep
from tests.training import (
    Memory,
    OwnHead,
    Row,
    Sentences,
    Steps,
    Stream,
    as_tuples,
    classifier,
    fit,
    loader,
    tokenizer,
    word,
)

COLUMNS = ("parameters", "optimizer", "metrics", "RNG", "batches", "modules")


class Noisy(Steps):
    """Draws from all three random sources in its steps, so that a shifted one shows in the weights."""

    def loss_of(self, batch: Any) -> Tensor:
        scale = 1 + 0.01 * (random.random() + float(np.random.rand()) + float(torch.rand(())))
        return super().loss_of(batch) * scale


class Scheduled(Noisy):
    """Its learning rate follows the metric that the validation logs, and falls at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Cosine(Noisy):
    """Its learning rate changes at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=3e-3, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Compiled(Noisy):
    """Its encoder is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.compile(self.model, backend="eager")


class MachineCode(Noisy):
    """Its encoder is compiled by torch's own default, small enough that this takes seconds."""

    def __init__(self) -> None:
        super().__init__(classifier(num_hidden_layers=1))
        self.model = torch.compile(self.model)


class HiddenStates(OwnHead):
    """Its head reads the last two hidden states, which transformers collects by hooks that it installs once."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        states = self.model(**given, output_hidden_states=True).hidden_states
        self.states = len(states)
        logits: Tensor = self.head(states[-1][:, 0] + states[-2][:, 0])
        return logits


class Attentions(Noisy):
    """Its loss wants attention to be sharp; it is collected by hooks, too."""

    def __init__(self) -> None:
        super().__init__(classifier(attn_implementation="eager"))

    def loss_of(self, batch: Any) -> Tensor:
        output = self.model(**batch, output_attentions=True)
        return output.loss - 0.1 * sum(one.square().mean() for one in output.attentions) * len(output.attentions)


class RefusedHiddenStates(Noisy):
    """An encoder with convolutions, which no rule covers, and whose hidden states are asked for."""

    def __init__(self) -> None:
        super().__init__(models.build("convbert").train())

    def loss_of(self, batch: Any) -> Tensor:
        output = self.model(**batch, output_hidden_states=True)
        loss: Tensor = output.loss + 1e-3 * sum(one.square().mean() for one in output.hidden_states)
        return loss


class LazyHead(OwnHead):
    """Its head knows its width from the first forward on."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(3)


class Remembers(OwnHead):
    """Its forward keeps a list, a table of counts, a tensor and a generator of its own, and makes a module once."""

    def __init__(self) -> None:
        super().__init__()
        self.recent: list[Tensor] = []
        self.counts: dict[str, list[int]] = {"calls": [0]}
        self.running = torch.zeros(16)
        self.draw = torch.Generator().manual_seed(5)
        self.extra: dict[str, nn.Module] = {}
        self.register_buffer("center", torch.zeros(16))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        with torch.no_grad():
            self.counts["calls"][0] += 1
            self.running.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
            self.center = 0.9 * self.center + 0.1 * hidden.mean(0)
            self.recent.append(hidden.mean(0))
            self.recent[:] = self.recent[-3:]
            noise = torch.randn(16, generator=self.draw)
        if not self.extra:
            self.extra["scale"] = nn.Linear(16, 16)
            self.head.register_forward_hook(add_a_little)
        hidden = hidden + 0.1 * self.extra["scale"](
            noise + self.running + self.center + torch.stack(self.recent).mean(0)
        )
        logits: Tensor = self.head(hidden) * (1 + 1e-3 * self.counts["calls"][0])
        return logits


class OwnForm(Noisy):
    """Takes its batches to pieces: see ``FORMS``."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def loss_of(self, batch: Any) -> Tensor:
        ids, mask, labels = FORMS[self.form][1](batch)
        return super().loss_of({"input_ids": ids, "attention_mask": mask, "labels": labels})


class Tokenises(Noisy):
    """Its batches are texts, which it makes tokens of in its steps, and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = tokenizer()

    def loss_of(self, batch: Any) -> Tensor:
        texts, labels = batch
        encoded = self.words(texts, padding=True, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        return super().loss_of({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)})


class Measures(OwnHead):
    """Updates metrics before its loss and after it, and writes lists and a file behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = MeanMetric(), MulticlassAccuracy(3)
        self.losses: list[float] = []
        self.file = Path(tempfile.mkdtemp()) / "losses.txt"
        self.lines = 0

    def loss_of(self, batch: Any) -> Tensor:
        logits = self(batch["input_ids"], batch["attention_mask"])
        self.before.update(logits.detach().mean())
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        self.after.update(logits, batch["labels"])
        self.losses.append(float(loss))
        with self.file.open("a") as file:
            file.write(f"{float(loss)!r}\n")
        return loss

    def on_validation_epoch_end(self) -> None:
        self.log_dict({"before": self.before.compute(), "after": self.after.compute()})
        self.lines = len(self.file.read_text().splitlines())
        assert self.file.read_text() == "".join(f"{one!r}\n" for one in self.losses)


class Manual(Noisy):
    """Does its optimisation itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer, loss = self.optimizers(), self.loss_of(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class BelowNoGrad(Noisy):
    """Its steps switch gradients off for the encoder."""

    def loss_of(self, batch: Any) -> Tensor:
        with torch.no_grad():
            pooled = self.model.bert(batch["input_ids"], batch["attention_mask"]).pooler_output
        return nn.functional.cross_entropy(self.model.classifier(pooled), batch["labels"])


class ByGraph(Noisy):
    """Its encoder is compiled with gradients traced ahead of time."""

    def __init__(self) -> None:
        super().__init__(classifier(num_hidden_layers=1))
        self.model = torch.compile(self.model, backend="aot_eager")


class OfKind(OwnHead):
    """Decides one kind of thing with a head of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, (width, self.losses) = kind, KINDS[kind]
        self.head = nn.Linear(16, width)

    def loss_of(self, batch: Any) -> Tensor:
        hidden = self.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return self.losses(self.head, hidden, batch["input_ids"], batch["labels"])


KINDS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "binary": (
        1,
        lambda head, hidden, ids, labels: F.binary_cross_entropy_with_logits(
            head(hidden[:, 0])[:, 0], (labels > 0) * 1.0
        ),
    ),
    "multi-label": (
        3,
        lambda head, hidden, ids, labels: F.binary_cross_entropy_with_logits(
            head(hidden[:, 0]), F.one_hot(labels, 3) * 1.0
        ),
    ),
    "regression": (1, lambda head, hidden, ids, labels: F.mse_loss(head(hidden[:, 0]).squeeze(-1), labels * 1.0)),
    "token classification": (
        4,
        lambda head, hidden, ids, labels: F.cross_entropy(head(hidden).flatten(0, 1), (ids % 4).flatten()),
    ),
    "span": (
        2,
        lambda head, hidden, ids, labels: (
            F.cross_entropy(head(hidden)[..., 0], labels) + F.cross_entropy(head(hidden)[..., 1], labels + 1)
        ),
    ),
    "similarity": (
        16,
        lambda head, hidden, ids, labels: F.cross_entropy(
            head(hidden[:, 0]) @ hidden.mean(1).T, torch.arange(len(hidden))
        ),
    ),
    "loss": (3, lambda head, hidden, ids, labels: head(hidden[:, 0]).square().mean()),
    "products": (3, lambda head, hidden, ids, labels: F.cross_entropy(head(hidden[:, 0] * hidden[:, 1]), labels)),
}
"""A head's width, and the loss of each kind of decision."""
REFUSED_KINDS = ("loss", "similarity")
"""One loss of all examples, and similarities of texts with those of the same call, need not have figures."""


@dataclass
class Batch:
    """A batch of a class of its own."""

    parts: tuple[Tensor, ...]


FORMS: dict[str, tuple[Callable[..., Any], Callable[[Any], Sequence[Tensor]]]] = {
    "a tuple": (lambda *parts: parts, lambda batch: batch),
    "a dataclass": (lambda *parts: Batch(parts), lambda batch: batch.parts),
    "nested mappings": (
        lambda ids, mask, labels: {"text": {"ids": ids, "real": mask}, "gold": [labels]},
        lambda batch: (batch["text"]["ids"], batch["text"]["real"], batch["gold"][0]),
    ),
}
"""How a batch is made of ids, mask and labels, and taken to pieces."""


def in_form(form: str) -> dict[str, Any]:
    return shuffled(collate_fn=lambda rows: FORMS[form][0](*as_tuples(rows)))


def texts_and_numbers(rows: Sequence[Row]) -> tuple[list[str], list[int]]:
    return [" ".join(map(word, row["input_ids"][1:4].tolist())) for row in rows], [int(row["labels"]) for row in rows]


def add_a_little(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 0.01


@cache
def no_machine_code() -> str:
    """Why nothing can be compiled here; nothing if it can."""
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception as error:
        return f"torch.compile does not work here: {type(error).__name__}"
    return ""


class Watch(pl.Callback):
    """Writes down every batch, and every random state as it is at its start; the gradients at every validation."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.states: list[Any] = []
        self.gradients: list[Any] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(copy.deepcopy(batch))
        self.states.append(random_states())

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.batches.append(copy.deepcopy(batch))
        self.states.append(random_states())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gradients.append(copy.deepcopy([one.grad for one in pl_module.parameters()]))
        self.states.append([module.training for module in pl_module.modules()])


def random_states() -> list[Any]:
    return [torch.get_rng_state(), np.random.get_state(), random.getstate()]


def own_generator() -> DataLoader[Row]:
    return loader(Sentences(32, seed=1), shuffle=True, generator=torch.Generator().manual_seed(9))


def partly_frozen() -> Steps:
    module = Noisy()
    module.model.bert.embeddings.requires_grad_(False)
    module.model.bert.encoder.layer[0].requires_grad_(False).eval()
    return module


def eager_attention() -> Steps:
    return Noisy(classifier(attn_implementation="eager"))


def shuffled(**options: Any) -> dict[str, Any]:
    return {
        "train": loader(Sentences(32, seed=1), shuffle=True, **options),
        "val": loader(Sentences(), shuffle=True, **options),
    }


def given_probe(**options: Any) -> GlobEncCallback:
    """Measures before the first training step."""
    return GlobEncCallback(Sentences(4, seed=7, labels=False).first(4), heatmap_examples=1, **options)


def compared(**options: Any) -> GlobEncCallback:
    """Compares with more than the saliency."""
    return GlobEncCallback(heatmap_examples=0, num_examples=2, references=("integrated gradients", "HTA"), **options)


def head_of_hidden_states(module: Any, batch: Any) -> Tensor:
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits: Tensor = module.head(module.model(**given, output_hidden_states=True).hidden_states[-1][:, 0])
    return logits


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        make: makes the module.
        data: makes the loaders, anew for each training.
        before: makes the callbacks that come before ours.
        after: makes those that come after it.
        options: of the Trainer.
        ours: makes our callback.
        analysed: how many validations it analyses at the least; none where the encoder is refused.
        impossible: says why this machine cannot do it; nothing if it can.
    """

    make: Callable[[], Steps] = Noisy
    data: Callable[[], dict[str, Any]] = shuffled
    before: Callable[[], list[pl.Callback]] = list
    after: Callable[[], list[pl.Callback]] = list
    options: Mapping[str, Any] = field(default_factory=dict)
    impossible: Callable[[], str] = str
    ours: Callable[[], GlobEncCallback] = lambda: GlobEncCallback(heatmap_examples=1)
    analysed: int = 2


Averaged = partial(Setting, impossible=lambda: NO_AVERAGING)

SETTINGS: dict[str, Setting] = {
    "shuffled loaders": Setting(),
    "sequential loaders": Setting(
        data=lambda: {"train": loader(Sentences(32, seed=1)), "val": loader(Sentences())},
    ),
    "loaders with a generator of their own": Setting(
        data=lambda: {
            "train": own_generator(),
            "val": loader(Sentences(), shuffle=True, generator=torch.Generator().manual_seed(8)),
        }
    ),
    "iterable datasets": Setting(
        data=lambda: {"train": loader(Stream(Sentences(32, seed=1))), "val": loader(Stream(Sentences()))}
    ),
    "loaders with a worker": Setting(data=lambda: shuffled(num_workers=1)),
    "persistent workers": Setting(
        data=lambda: shuffled(num_workers=1, persistent_workers=True), options={"val_check_interval": 0.5}
    ),
    "several validation loaders": Setting(
        data=lambda: {
            "train": own_generator(),
            "val": [loader(Sentences(), shuffle=True), loader(Sentences(9, seed=4), shuffle=True)],
        }
    ),
    "val_check_interval=0.25": Setting(options={"val_check_interval": 0.25}),
    "accumulate_grad_batches, validation in between": Setting(
        options={"accumulate_grad_batches": 3, "val_check_interval": 1}
    ),
    "gradient_clip_val": Setting(make=OwnHead, options={"gradient_clip_val": 0.5}),
    "learning rate by validation loss": Setting(make=Scheduled),
    "learning rate by step": Setting(make=Cosine, options={"val_check_interval": 0.5}),
    "precision=bf16-mixed": Setting(options={"precision": "bf16-mixed"}),
    "precision=bf16-true": Setting(options={"precision": "bf16-true"}),
    "torch.compile": Setting(make=Compiled, options={"val_check_interval": 0.5}),
    "torch.compile, to machine code": Setting(
        make=MachineCode,
        data=lambda: {"train": loader(Sentences(32, seed=1), shuffle=True), "val": loader(Sentences(16))},
        options={"val_check_interval": 0.5},
        impossible=no_machine_code,
    ),
    "eager attention": Setting(make=eager_attention),
    "frozen layers, parts in eval": Setting(make=partly_frozen),
    "no sanity check": Setting(options={"num_sanity_val_steps": 0}),
    "WeightAveraging before ours": Averaged(before=lambda: [EveryStep()], options={"val_check_interval": 0.5}),
    "WeightAveraging after ours": Averaged(after=lambda: [EveryStep()], options={"val_check_interval": 0.5}),
    "EMA before ours": Averaged(before=lambda: [EMAWeightAveraging()], options={"val_check_interval": 0.5}),
    "EMA after ours": Averaged(after=lambda: [EMAWeightAveraging()], options={"val_check_interval": 0.5}),
    "output_hidden_states": Setting(make=HiddenStates),
    "output_hidden_states, given probe, no sanity check": Setting(
        make=HiddenStates, ours=given_probe, options={"num_sanity_val_steps": 0}, analysed=3
    ),
    "output_attentions": Setting(make=Attentions),
    "output_hidden_states of an encoder that is refused": Setting(
        make=RefusedHiddenStates, ours=given_probe, options={"num_sanity_val_steps": 0}, analysed=0
    ),
    "forward= that asks for hidden states": Setting(
        make=OwnHead,
        ours=lambda: given_probe(forward=head_of_hidden_states),
        options={"num_sanity_val_steps": 0},
        analysed=3,
    ),
    "at_steps, and a record": Setting(
        ours=lambda: given_probe(at_steps="log", record=tempfile.mkdtemp()),
        options={"num_sanity_val_steps": 0, "accumulate_grad_batches": 2},
        analysed=4,
    ),
    "at_steps after ours averages the weights": Averaged(
        after=lambda: [EveryStep()], ours=lambda: GlobEncCallback(heatmap_examples=1, at_steps=[1, 3, 5]), analysed=5
    ),
    "LazyLinear, given probe, no sanity check": Setting(
        make=LazyHead, ours=given_probe, options={"num_sanity_val_steps": 0}, analysed=3
    ),
    "a forward that keeps lists, tensors and a generator": Setting(
        make=Remembers, ours=given_probe, options={"num_sanity_val_steps": 0, "val_check_interval": 0.5}, analysed=5
    ),
}
SETTINGS |= {
    f"references, {name}": Setting(make=make, ours=partial(compared, methods=["N-Enc"]), options=options)
    for name, make, options in (
        ("a forward that keeps lists, tensors and a generator", Remembers, {}),
        ("torch.compile, precision=bf16-mixed", Compiled, {"precision": "bf16-mixed"}),
        ("metrics, lists and a file behind the loss", Measures, {}),
        ("an encoder below the step's own no_grad", BelowNoGrad, {}),
    )
}
SETTINGS |= {f"batches as {form}": Setting(make=partial(OwnForm, form), data=partial(in_form, form)) for form in FORMS}
SETTINGS |= {
    f"decision: {kind}": Setting(make=partial(OfKind, kind), analysed=0 if kind in REFUSED_KINDS else 2)
    for kind in KINDS
}
SETTINGS |= {
    "signed scores": Setting(ours=lambda: GlobEncCallback(heatmap_examples=1, signed=True)),
    "signed scores, gradients switched off in between": Setting(
        make=BelowNoGrad, ours=lambda: GlobEncCallback(heatmap_examples=1, signed=True)
    ),
    "signed scores that are refused": Setting(
        make=partial(OfKind, "products"), ours=lambda: GlobEncCallback(heatmap_examples=1, signed=True)
    ),
    "signed scores of a forward that keeps lists and tensors": Setting(
        make=Remembers,
        ours=lambda: given_probe(signed=True),
        options={"num_sanity_val_steps": 0, "val_check_interval": 0.5},
        analysed=5,
    ),
    "signed scores, precision=bf16-true": Setting(
        options={"precision": "bf16-true"}, ours=lambda: GlobEncCallback(heatmap_examples=1, signed=True)
    ),
    "texts that the step makes tokens of": Setting(make=Tokenises, data=lambda: shuffled(collate_fn=texts_and_numbers)),
    "metrics, lists and a file behind the loss": Setting(make=Measures),
    "manual optimisation": Setting(make=Manual),
    "an encoder below the step's own no_grad": Setting(make=BelowNoGrad),
    "torch.compile, gradients traced ahead": Setting(make=ByGraph),
}


Masks = partial(Setting, ours=lambda: GlobEncCallback(heatmap_examples=1, faithfulness=["N-Enc"]))
SETTINGS |= {
    "faithfulness": Masks(),
    "faithfulness, a forward that keeps lists, tensors and a generator": Setting(
        make=Remembers, ours=lambda: given_probe(faithfulness=True), options={"num_sanity_val_steps": 0}, analysed=3
    ),
    "faithfulness by the tokenizer's mask token, texts": Setting(
        make=Tokenises,
        data=lambda: shuffled(collate_fn=texts_and_numbers),
        ours=lambda: GlobEncCallback(heatmap_examples=1, faithfulness=True, tokenizer=tokenizer(mask=True)),
    ),
    "faithfulness, precision=bf16-mixed": Masks(options={"precision": "bf16-mixed"}),
    "faithfulness, torch.compile": Masks(make=Compiled),
    "faithfulness, metrics, lists and a file behind the loss": Masks(make=Measures),
    "faithfulness, an encoder below the step's own no_grad": Masks(make=BelowNoGrad),
    "faithfulness, every second validation, at_steps after ours averages the weights": Averaged(
        after=lambda: [EveryStep()],
        ours=lambda: GlobEncCallback(heatmap_examples=1, at_steps=[1, 3], faithfulness=True, faithfulness_every_n=2),
        analysed=4,
    ),
}


def train(setting: Setting, ours: Sequence[pl.Callback]) -> dict[str, Any]:
    """Everything that a training leaves behind, by the table's columns."""
    pl.seed_everything(3, verbose=False)
    module, data, watch, logger = setting.make(), setting.data(), Watch(), Memory()
    options = {"max_epochs": 2, "log_every_n_steps": 1, **data, **setting.options}
    callbacks = [*setting.before(), *ours, *setting.after(), watch]
    trainer = fit(module, *callbacks, logger=logger, **options)
    generators = [
        one.generator.get_state() for one in data.values() if isinstance(one, DataLoader) and one.generator is not None
    ]
    averages = [
        one._average_model.state_dict()
        for one in callbacks
        if isinstance(getattr(one, "_average_model", None), nn.Module)
    ]
    metrics = {name: value for name, value in trainer.callback_metrics.items() if "globenc" not in name}
    return {
        "parameters": [module.state_dict(), averages, [one.requires_grad for one in module.parameters()]],
        "optimizer": [
            trainer.optimizers[0].state_dict(),
            [one.scheduler.state_dict() for one in trainer.lr_scheduler_configs],
            watch.gradients,
        ],
        "metrics": [metrics, logger.others],
        "RNG": [watch.states, random_states(), generators],
        "batches": watch.batches,
        "modules": modules_of(module),
    }


def modules_of(model: nn.Module) -> dict[str, Any]:
    """What every module is but for its parameters and buffers: its class, hooks and attributes."""
    # A compiled module holds a place in memory.
    return {
        name: [
            type(module).__name__,
            {key: described(value) for key, value in vars(module).items() if key != "_torchdynamo_wrapper_id"},
        ]
        for name, module in model.named_modules()
    }


def described(value: Any, depth: int = 3) -> Any:
    """A value that :func:`equal` can compare: tensors, numbers, states, containers of them; else a name."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, PretrainedConfig) and depth:
        return {key: described(one, depth - 1) for key, one in vars(value).items()}
    if isinstance(value, Mapping) and depth:
        # The numbers of hooks count all that were ever registered.
        return [(key if isinstance(key, str) else 0, described(one, depth - 1)) for key, one in value.items()]
    if isinstance(value, Sequence | set | frozenset) and depth:
        return [described(one, depth - 1) for one in value]
    return getattr(value, "__qualname__", type(value).__name__)


def equal(left: Any, right: Any) -> bool:
    """Equal to the last bit, whatever it is made of; NaN equals NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and _bits(left) == _bits(right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.tobytes() == right.tobytes()
    if isinstance(left, Mapping):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if is_dataclass(left):
        return equal(vars(left), vars(right))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(*pair) for pair in zip(left, right, strict=True))
    return bool(left == right) or (left != left and right != right)


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def compare(setting: Setting, make: Callable[[], GlobEncCallback] | None = None) -> tuple[dict[str, bool], int]:
    """Which parts of a training are the same with and without us, and how many validations were analysed."""
    ours = setting.ours() if make is None else make()
    observed, undisturbed = train(setting, [ours]), train(setting, [])
    return {name: equal(observed[name], undisturbed[name]) for name in COLUMNS}, len(ours.history)


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    width = max(map(len, SETTINGS))
    print(f"{'setting':{width}}  {'  '.join(COLUMNS)}  analysed")
    sound = True
    for name, setting in SETTINGS.items():
        if setting.impossible():
            print(f"{name:{width}}  skipped: {setting.impossible()}", flush=True)
            continue
        same, analysed = compare(setting)
        cells = "  ".join(f"{'equal' if same[column] else 'DIFFERS':{len(column)}}" for column in COLUMNS)
        print(f"{name:{width}}  {cells}  {analysed}", flush=True)
        sound = sound and all(same.values()) and analysed >= setting.analysed
    print("Equal to the last bit everywhere." if sound else "NOT equal everywhere.")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
