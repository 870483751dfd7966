"""Short trainings of random kinds under ``GlobEncCallback``: ``python -m tests.fuzz --count 300 --seed 0``.

Of each: it does not crash, no figure is NaN or infinite without a word, and the model carries no trace afterwards. A
training without figures has to have said why, and the reason has to be true of that combination; the summary counts
the reasons.
"""

import argparse
import logging
import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from globenc_lightning import METHODS, GlobEncCallback
from globenc_lightning.errors import GlobEncWarning
from tests.averaging import NO_AVERAGING, EveryStep
from tests.models import CLASSES, FAMILIES, HEADS, REFUSED, VOCABULARY, build, redraw
from tests.training import Album, Memory, Sentences, Steps, Stream, fit, loader, tokenizer

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PRECISIONS = {"float64": "64-true", "bfloat16": "bf16-true", "float16": "16-true"}
WRITTEN = ("plain", "plain", "forward()", "no_grad", "detach", "checkpoint", "reentrant checkpoint", "autocast")
"""How the user's module calls its encoder."""
OWN_ATTENTION = ("bert", "roberta", "xlm_roberta", "electra", "distilbert", "albert", "gpt2", "llama")
"""Families whose attention may be a function of the user's own."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PRE_LN = {
    "gpt2": ("GPT2Config", "GPT2ForSequenceClassification"),
    "llama": ("LlamaConfig", "LlamaForSequenceClassification"),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification"),
}
"""Encoders that normalise first, two of them causal: the names of their configuration and their classifier."""
NO_RULE = [name for name in REFUSED if name != "fnet"]
"""Encoders that are refused; fnet's Fourier transform takes no bfloat16, with or without us."""


def shows_nothing(kind: dict[str, Any]) -> bool:
    """Whether no row of the validation has a real token."""
    shown = kind["batch_size"] if kind["trainer"]["limit_val_batches"] == 1 else kind["val_rows"]
    rows = range(min(shown, kind["val_rows"]))
    return not kind["given"] and kind["masked"] and set(rows) <= set(kind["empty"])


def knows_no_special_tokens(kind: dict[str, Any]) -> bool:
    return kind["ours"]["exclude_special_tokens"] and not kind["tokenizer"]


REASONS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "exclude_special_tokens without a tokenizer": ("needs to know the special tokens", knows_no_special_tokens),
    "no row of the validation has a real token": ("no example with a real token", shows_nothing),
    "the weights hold NaN": ("hold NaN or infinity", lambda kind: kind["spoiled"] or kind["dtype"] == "float16"),
    # Adam's epsilon is zero in half precision: a head whose gradient vanishes is divided by zero.
    "the head's weights hold NaN": ("score holds NaN or infinity", lambda kind: kind["dtype"] == "float16"),
    "an encoder that no rule covers": ("UnsupportedEncoderError", lambda kind: kind["family"] in NO_RULE),
}
"""Why there may be no figures at all: what the warning says, and of which combinations it is true."""


def second(logits: Tensor, batch: Any) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def drawn(draw: random.Random) -> dict[str, Any]:
    """One random combination, in words and numbers, so that it can be printed."""
    methods = draw.sample(METHODS, draw.randint(1, len(METHODS)))
    return {
        "family": draw.choice([*FAMILIES, *PRE_LN, *FAMILIES, *PRE_LN, draw.choice(NO_RULE)]),
        "attention": draw.choice(["eager", "sdpa", "own"]),
        "dtype": draw.choice(["float32", "float32", "float32", "float64", "bfloat16", "float16"]),
        "written": draw.choice(WRITTEN),
        "hidden states": draw.random() < 0.1,
        "left": draw.random() < 0.3,
        "frozen": draw.random() < 0.2,
        "lengths": draw.choice([(1, 1), (1, 3), (2, 5), (3, 14), (14, 14)]),
        "empty": draw.sample(range(12), draw.choice([0, 0, 1, 4])),
        "masked": draw.random() < 0.9,
        "given": draw.random() < 0.3,
        "val_rows": draw.choice([1, 3, 7, 12]),
        "batch_size": draw.choice([1, 3, 8]),
        "stream": draw.random() < 0.2,
        "averaged": draw.random() < 0.2,
        "tokenizer": draw.random() < 0.3,
        "pictures": draw.random() < 0.3,
        "spoiled": draw.random() < 0.1,
        "ours": {
            "num_examples": draw.choice([1, 2, 5, 16]),
            "methods": methods,
            "target": draw.choice(["predicted", "label", "second"]),
            "readout": draw.choice(["cls", "last", "mean"]),
            "normalize": draw.random() < 0.5,
            "exclude_special_tokens": draw.random() < 0.1,
            "every_n_validations": draw.choice([1, 1, 2]),
            "heatmap_examples": draw.choice([0, 1, 3]),
        },
        "trainer": {
            "max_epochs": draw.choice([1, 2]),
            "val_check_interval": draw.choice([0.5, 1.0]),
            "accumulate_grad_batches": draw.choice([1, 2]),
            "num_sanity_val_steps": draw.choice([-1, 0, 2]),
            "gradient_clip_val": draw.choice([None, 0.5]),
            "precision": draw.choice(["32-true", "32-true", "bf16-mixed"]),
            "limit_val_batches": draw.choice([1.0, 1.0, 1]),
        },
    }


def model_of(kind: dict[str, Any]) -> Any:
    """The classifier of a combination, with weights that are not all alike."""
    family, dtype = kind["family"], DTYPES[kind["dtype"]]
    attention = "eager" if kind["attention"] == "own" else kind["attention"]
    if family in PRE_LN:
        config, classifier = (getattr(transformers, name) for name in PRE_LN[family])
        model = classifier._from_config(config(**SIZES), attn_implementation=attention)
        redraw(model)
    else:
        model = build(family, attention)
    # Before 4.54, transformers sets no other attention on a model that is made.
    if kind["attention"] == "own" and family in OWN_ATTENTION and hasattr(model, "set_attn_implementation"):
        AttentionInterface.register("own", own_attention)
        AttentionMaskInterface.register("own", eager_mask)
        model.set_attn_implementation("own")
    model.config.output_hidden_states = kind["hidden states"]
    return model.to(dtype).train()


def own_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as a user writes it."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    probabilities = torch.softmax(scores, -1)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class Written(Steps):
    """An encoder and a head of one's own, and what people put around the encoder's call."""

    def __init__(self, model: Any, how: str) -> None:
        super().__init__(model, how=how)
        dtype = next(model.parameters()).dtype
        self.head = nn.Linear(32, CLASSES).to(dtype)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        encoder = self.model.base_model
        called = encoder.forward if self.how == "forward()" else encoder
        return called(input_ids, attention_mask=attention_mask)[0]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        given = (input_ids, attention_mask)
        if self.how == "no_grad":
            with torch.no_grad():
                read = self.read(*given)[:, 0]
            return self.head(read)
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.head(self.read(*given)[:, 0]).float()
        if "checkpoint" in self.how:
            hidden = checkpoint(self.read, *given, use_reentrant=self.how.startswith("reentrant"))
        else:
            hidden = self.read(*given)
        return self.head((hidden.detach() if self.how == "detach" else hidden)[:, 0])

    def loss_of(self, batch: Any) -> Tensor:
        logits = self(**{key: value for key, value in batch.items() if key != "labels"})
        return nn.functional.cross_entropy(logits.float(), batch["labels"])


def padded_left(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The rows with their padding in front."""
    moved = []
    for row in rows:
        shift = len(row["input_ids"]) - int(row["attention_mask"].sum())
        moved.append({key: value.roll(shift) if value.dim() else value for key, value in row.items()})
    return moved


def reason(kind: dict[str, Any], messages: list[str]) -> str:
    """Why there are no figures; an AssertionError if nobody said so, or if it is not true of this combination."""
    for name, (words, holds) in REASONS.items():
        if any(words in message for message in messages) and holds(kind):
            return name
    raise AssertionError(f"no figures, and none of the known reasons for it holds: {messages}")


def traces(module: Steps) -> list[Any]:
    """All of a module that an analysis touches."""
    return [
        (
            len(one._forward_hooks) + len(one._forward_pre_hooks) + len(one._backward_hooks),
            sorted(vars(one)),
            one.training,
            [parameter.requires_grad for parameter in one.parameters()],
            getattr(getattr(one, "config", None), "_attn_implementation", None),
        )
        for one in module.model.modules()
    ]


def run(kind: dict[str, Any]) -> str:
    """Train one combination, and check it; what became of it in a word."""
    torch.manual_seed(0)
    dtype = DTYPES[kind["dtype"]]
    model = model_of(kind)
    how = kind["written"]
    if how == "autocast" and (dtype is not torch.float32 or kind["family"].startswith("deberta")):
        # Neither trains without us: halves below autocast, and transformers' mask for DeBERTa.
        how = "forward()"
    module = Steps(model) if how == "plain" else Written(model, how)
    if kind["frozen"]:
        module.model.base_model.requires_grad_(False)
    if kind["spoiled"]:
        with torch.no_grad():
            next(module.model.base_model.parameters()).fill_(float("nan"))
    shortest, longest = kind["lengths"]
    sizes = {"shortest": shortest, "longest": longest, "width": 14}
    empty = [index for index in kind["empty"] if index < kind["val_rows"]]
    val: Any = Sentences(kind["val_rows"], **sizes, empty=empty)
    if kind["left"]:
        val.rows = padded_left(val.rows)
    if not kind["masked"]:
        val.rows = [{key: value for key, value in row.items() if key != "attention_mask"} for row in val.rows]
    ours = dict(kind["ours"])
    ours["target"] = second if ours["target"] == "second" else ours["target"]
    given = Sentences(4, **sizes, seed=5).first(3) if kind["given"] else None
    callback = GlobEncCallback(given, tokenizer=tokenizer() if kind["tokenizer"] else None, **ours)
    logger = Album() if kind["pictures"] else Memory()
    options = dict(kind["trainer"])
    if kind["family"].startswith("deberta") and options["precision"] == "bf16-mixed":
        # transformers masks with the smallest float32, which autocast cannot hold: no training without us, either.
        options["precision"] = "32-true"
    if dtype is not torch.float32:
        options["precision"] = PRECISIONS[kind["dtype"]]
    if kind["hidden states"]:
        # transformers installs hooks of its own in the first forward that asks for hidden states.
        with torch.no_grad():
            model.base_model(torch.full((1, 4), 5))
    before = traces(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(
            module,
            callback,
            *([EveryStep()] if kind["averaged"] and not NO_AVERAGING else []),
            train=loader(Sentences(8, seed=1, **sizes), 2),
            val=loader(Stream(val) if kind["stream"] else val, kind["batch_size"]),
            logger=logger,
            **options,
        )
    messages = [str(one.message) for one in caught if issubclass(one.category, GlobEncWarning)]
    assert trainer.global_step > 0
    assert traces(module) == before, "a trace on the model"
    assert all(math.isfinite(value) for _, _, value in logger.ours), "a figure that is not finite was logged"
    for entry in callback.history:
        for method, rho in entry.by_example.items():
            assert bool((rho.isnan() | (rho.abs() <= 1)).all()), "a correlation outside [-1, 1]"
            assert torch.isfinite(torch.cat(entry.rows[method])).all(), "an attribution that is not finite"
            if rho[:, -1].isnan().any():
                assert any("no rank correlation" in message for message in messages), "NaN without a word"
        assert torch.isfinite(torch.cat(entry.saliency)).all(), "a saliency that is not finite"
    return "analysed" if callback.history else f"announced: {reason(kind, messages)}"


def fuzz(count: int, seed: int) -> Counter[str]:
    """Run so many combinations; an AssertionError or whatever broke, with the combination, is raised as it is found."""
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    for number in range(count):
        kind = drawn(draw)
        try:
            found[run(kind)] += 1
        except Exception as error:
            raise AssertionError(f"combination {number} of seed {seed}: {error}\n{kind}") from error
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("pytorch_lightning", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = fuzz(options.count, options.seed)
    print(f"{options.count} combinations of seed {options.seed}; none crashed or left anything behind:")
    for name, count in sorted(found.items(), key=lambda item: (item[0] != "analysed", item)):
        print(f"{count:6}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
