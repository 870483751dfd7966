"""The README's pictures of a tagging and of a pair run, made of two small real trainings.

``python -m tests.report.pictures docs/images`` writes ``heatmap-tagging.png`` and ``dashboard-pair.png``; the second
one needs chromium (``apt-get install chromium chromium-driver``).
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForTokenClassification, BertModel, PreTrainedTokenizerFast

from globenc_lightning import GlobEncCallback
from tests.report.dashboard.browser import Tab, chromium
from tests.report.dashboard.serving import tensorboard, until_runs
from tests.report.kinds import Batch, named
from tests.training import Steps, events, fit

TAGS = ("O", "PERSON", "PLACE")
PEOPLE = ["Anna", "Boris", "Carla", "David", "Elena", "Paris"]
PLACES = ["Berlin", "Rome", "Lisbon", "Oslo", "Vienna", "Paris"]
VERBS = ["met", "called", "visited", "thanked", "joined"]
ENDS = ["on Monday", "after lunch", "last week", "with a friend"]
SIGHTS = ["river", "museum", "castle", "market", "garden", "harbour"]
OTHERS = ["in", "the", "has", "a", "famous", "where", "is", "which", "city"]
WORDS = sorted({*PEOPLE, *PLACES, *VERBS, *SIGHTS, *" ".join(ENDS).split(), *OTHERS})
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(_ROLES, SPECIAL, strict=True)))


_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token")


def _config(**changes: Any) -> BertConfig:
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    return BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=40, initializer_range=0.15, **sizes, **changes
    )


def _tagged(size: int, seed: int) -> Batch:
    """Sentences in which only the words around it tell whether Paris is a person or a place."""
    draw = random.Random(seed)
    texts, tags = [], []
    for _ in range(size):
        words = [draw.choice(PEOPLE), draw.choice(VERBS), draw.choice(PEOPLE), "in", draw.choice(PLACES)]
        end = draw.choice(ENDS).split()
        texts.append(" ".join([*words, *end]))
        tags.append([-100, 1, 0, 1, 0, 2, *[0] * len(end), -100])
    found = word_tokenizer()(texts, padding=True, return_tensors="pt")
    width = found["input_ids"].shape[1]
    labels = torch.tensor([one + [-100] * (width - len(one)) for one in tags])
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": labels}


def _paired(size: int, seed: int) -> Batch:
    """Questions for a city's sight, and the sentences that answer them."""
    draw = random.Random(seed)
    chosen = draw.sample([(place, sight) for place in PLACES for sight in SIGHTS], size)
    tokenize = word_tokenizer()
    batch: Batch = {}
    for name, text in (("query", "where is the {1} which is in {0}"), ("passage", "the city {0} has a famous {1}")):
        found = tokenize([text.format(*one) for one in chosen], padding=True, return_tensors="pt")
        batch |= {f"{name}_{key}": found[key] for key in ("input_ids", "attention_mask")}
    return batch


class _Retrieval(Steps):
    """A query's and a passage's encoder, trained by in-batch negatives."""

    def __init__(self) -> None:
        super().__init__(BertModel(_config()).train())
        self.passages = BertModel(_config()).train()

    def loss_of(self, batch: Any) -> Tensor:
        rows = [
            encoder(
                input_ids=batch[f"{name}_input_ids"], attention_mask=batch[f"{name}_attention_mask"]
            ).last_hidden_state[:, 0]
            for name, encoder in (("query", self.model), ("passage", self.passages))
        ]
        query, passage = (F.normalize(one, dim=1) for one in rows)
        return F.cross_entropy(10 * query @ passage.T, torch.arange(len(query)))


def _train(module: Steps, batches: Sequence[Batch], probe: Batch, folder: Path, name: str) -> TensorBoardLogger:
    logger = TensorBoardLogger(str(folder), name=None, version=name)
    callback = GlobEncCallback(num_examples=6, tokenizer=word_tokenizer())
    loaders = {key: DataLoader(list(data), batch_size=None) for key, data in (("train", batches), ("val", [probe]))}
    fit(module, callback, **loaders, max_epochs=10, logger=logger, log_every_n_steps=10)
    return logger


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch) / "logs"
        torch.manual_seed(0)
        tagger = Steps(BertForTokenClassification(_config(**named(TAGS))).train())
        logger = _train(tagger, [_tagged(32, seed) for seed in range(1, 31)], _tagged(6, 0), logs, "tagging")
        image = events(logger.log_dir).Images("globenc/heatmap/layers/example_00")[-1]
        (folder / "heatmap-tagging.png").write_bytes(image.encoded_image_string)
        _train(_Retrieval(), [_paired(24, seed) for seed in range(1, 31)], _paired(6, 0), logs, "retrieval")
        with tensorboard(logs, Path(scratch)) as address, chromium() as driver:
            until_runs(address, 2)
            tab = Tab(driver, address).open(run="retrieval", view="tokens")
            tab.driver.switch_to.default_content()
            tab.driver.save_screenshot(str(folder / "dashboard-pair.png"))


if __name__ == "__main__":
    main()
