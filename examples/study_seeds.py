"""Fine-tune an encoder with several seeds, record GlobEnc attributions, and compare the runs.

    python examples/study_seeds.py                      # three seeds, some minutes on two cores
    python examples/study_seeds.py --quick              # a few batches each, to see that everything works
    python examples/study_seeds.py --seeds 0 1 2 3 4    # more seeds: narrower intervals

Every run is that of ``finetune_sentiment.py``, on the same sentences: a seed decides the weights of the new head, the
order of the batches and dropout. ``GlobEncCallback(record=folder)`` keeps every figure in one folder of Parquet files;
``study.load(folder)`` reads them. Needs ``pip install 'globenc-lightning[record,examples]'``.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from finetune_sentiment import (
    RhoTable,
    SentimentClassifier,
    add_training_arguments,
    check_sizes,
    find_model,
    make_loaders,
    make_trainer,
    read_sentences,
    tensorboard_command,
)
from pytorch_lightning.loggers import TensorBoardLogger

from globenc_lightning import GlobEncCallback, study
from globenc_lightning.record.command import main as globenc
from globenc_lightning.record.writing import RecordOptions

QUICK = {"train_size": 64, "val_size": 32, "num_examples": 4, "batch_size": 16, "validations": 2}
SPLIT_SEED = 0
"""Of the split into training and held-out sentences, which is the same in all runs: the probe has to be."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_training_arguments(parser, train_size=1600, val_size=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each")
    parser.add_argument("--validations", type=int, default=5, help="validations of each run, each with GlobEnc")
    parser.add_argument("--num-examples", type=int, default=32, help="held-out sentences that are analysed")
    parser.add_argument("--quick", action="store_true", help=f"very short runs, as if with {QUICK}")
    parser.add_argument(
        "--output", type=Path, default=Path("study"), help="folder of the record, the figures and TensorBoard's runs"
    )
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    check_sizes(parser, options, "validations", "num_examples")
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        parser.error("--seeds have to be different numbers from 0")
    if (options.output / "record").exists():
        parser.error(
            f"{options.output / 'record'} is there already, and its runs would be mixed with those of today: choose "
            "another --output, or remove it"
        )
    return options


def train(
    seed: int, rows: Sequence[tuple[str, int]], names: Sequence[str], folder: str, options: argparse.Namespace
) -> None:
    """Fine-tune once, and record it.

    Args:
        seed: Of the new head's weights, the order of the batches and dropout.
        rows: Texts with their classes.
        names: The labels.
        folder: Folder of the encoder.
        options: The command line.
    """
    split = argparse.Namespace(**{**vars(options), "seed": SPLIT_SEED})
    train_loader, val_loader = make_loaders(rows, folder, split)
    pl.seed_everything(seed)
    recorded = GlobEncCallback(
        num_examples=options.num_examples,
        at_steps="log",  # early training is where most happens: steps 1, 2, 4, ... before the first validation, too
        record=RecordOptions(options.output / "record", run=f"seed-{seed}"),
    )
    logger = TensorBoardLogger(options.output, name="runs", version=f"seed-{seed}")
    trainer = make_trainer([recorded, RhoTable(recorded)], logger, len(train_loader), options)
    trainer.fit(SentimentClassifier(folder, names, options.learning_rate), train_loader, val_loader)


def print_findings(record: Path) -> None:
    """Print what a study of the last step says: rho, drift and agreement, with intervals.

    Args:
        record: Folder of the record.
    """
    runs = study.load(record)
    methods, layer = runs.recorded_methods, runs.layers
    tables = [("rho with the saliency", runs.correlations(methods, layer), "rho")]
    tables.append(("drift since the first analysis", runs.drift("first", methods=methods, layers=layer), "drift"))
    if len(runs) > 1:
        tables.append(("agreement between seeds", runs.agreement(methods=methods, layers=layer), "agreement"))
    print(f"\nAt the last step, layer {layer}: mean and 95 % interval")
    for title, frame, value in tables:
        if not len(frame):
            continue
        last = frame[frame["step"] == frame["step"].max()]
        found = runs.summary(last, value, ["method"]).set_index("method")
        told = found.iloc[0]
        print(f"{title} (n = {told['runs']} runs, {told['examples']} sentences; interval over {told['over']})")
        for method in methods:
            mean, low, high = found.loc[method, ["mean", "low", "high"]]
            print(f"  {method:10} {mean:6.3f}  [{low:6.3f}, {high:6.3f}]")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with each seed, and compare the runs.

    Args:
        arguments: The command line; that of the process if not given.

    Returns:
        The exit status: 0 unless the record could not be shown.
    """
    options = parse_arguments(arguments)
    rows, names = read_sentences(options.data)
    folder = find_model(options.model)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # tokenizing in the loop is fast enough here

    for seed in options.seeds:
        train(seed, rows, names, folder, options)

    record = options.output / "record"
    print()
    shown = globenc(["show", str(record), "--save", str(options.output / "figures"), "--format", "png"])
    print_findings(record)
    print(f"\nThe record, for pandas, polars or DuckDB:\n  {record}")
    print(f"Look at heatmaps and curves of all runs with:\n  {tensorboard_command(options.output / 'runs')}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
