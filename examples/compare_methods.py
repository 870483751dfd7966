"""Fine-tune an encoder, and compare GlobEnc with its rivals on held-out sentences: a table and a figure.

    python examples/compare_methods.py                     # all-MiniLM-L6-v2, one epoch, then 96 held-out sentences
    python examples/compare_methods.py --quick             # a few batches and sentences, to see that everything works
    python examples/compare_methods.py --num-examples 200  # more sentences: narrower intervals

Two questions are asked of every method. Does it agree with something else: Spearman's rho of its rollout's row with
gradient x input, with integrated gradients and with the Jacobian (HTA). And does the decision depend on the tokens that
it ranks first: these are masked, and what that does to the probability of the predicted class is compared with masking
as many random tokens. Training, model and sentences are those of ``finetune_sentiment.py``.
"""

import argparse
import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from finetune_sentiment import (
    SentimentClassifier,
    add_training_arguments,
    check_sizes,
    find_model,
    make_loaders,
    make_trainer,
    read_sentences,
    tensorboard_command,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger

from globenc_lightning import METHODS, GlobEncCallback
from globenc_lightning.report.averages import mean_and_interval

QUICK = {"train_size": 64, "val_size": 32, "num_examples": 6, "batch_size": 16}
RIVALS = ("ALTI", "Value-Zeroing")
REFERENCES = ("saliency", "integrated gradients", "HTA")
FLOW_OF = "W-FixedRes"
"""Attention flow (Abnar & Zuidema 2020) is the maximum flow through raw attention with the residual added."""
FLOW = "Attention flow"
GAIN, KEPT, ODDS = "gain", "gain of keeping", "log-odds"
HEADINGS = {
    "saliency": "rho with gradient x input",
    "integrated gradients": "rho with integrated gradients",
    "HTA": "rho with the Jacobian (HTA)",
    GAIN: "first tokens masked: gain over random",
    KEPT: "only first tokens kept: gain over random",
    ODDS: "first tokens masked: drop of the log-odds",
}
"""What each column holds."""


@dataclass(frozen=True)
class Cell:
    """A mean over sentences.

    Attributes:
        mean: The mean; NaN where no sentence has a value.
        half: Half the width of its 95 % interval; NaN for fewer than two sentences.
        n: How many sentences have a value.
    """

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        return "-" if np.isnan(self.mean) else f"{self.mean:.2f} ± {self.half:.2f}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_training_arguments(parser)
    parser.add_argument("--num-examples", type=int, default=96, help="held-out sentences that are compared on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=f"a very short run, as if with {QUICK}")
    parser.add_argument(
        "--output", type=Path, default=Path("comparison"), help="folder of the table, the figure and TensorBoard's run"
    )
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    check_sizes(parser, options, "num_examples")
    options.validations = 1
    return options


def compared(callback: GlobEncCallback, names: Mapping[str, str]) -> dict[str, dict[str, Cell]]:
    """Return the cells of a callback's last analysis: row -> column.

    Args:
        callback: One that has analysed with references and faithfulness.
        names: Its methods, and what their rows are called.
    """
    entry = callback.history[-1]
    if entry.faithfulness is None:
        raise SystemExit(f"The sentences could not be masked: {callback.history.reasons}")
    rows: dict[str, dict[str, Cell]] = {}
    for method, name in names.items():
        values = {"saliency": entry.by_example[method][:, -1]}
        values |= {reference: rho[method][:, -1] for reference, rho in entry.reference_rho.items()}
        values[GAIN] = entry.faithfulness.gain[method]
        values[KEPT] = entry.faithfulness.sufficiency_gain[method]
        values[ODDS] = entry.faithfulness.log_odds[method]
        rows[name] = {column: cell_of(values[column]) for column in HEADINGS}
    return rows


def cell_of(values: torch.Tensor) -> Cell:
    """Return the mean of some sentences' values and its interval; NaN counts as none."""
    mean, half, n, _ = (np.ravel(one)[0] for one in mean_and_interval(values.double().numpy()[:, None]))
    return Cell(float(mean), float(half), int(n))


def ordered(rows: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """Return the rows' names, the one whose first tokens the decision depends on most first."""
    return sorted(rows, key=lambda name: -np.nan_to_num(rows[name][GAIN].mean, nan=-np.inf))


def as_markdown(rows: Mapping[str, Mapping[str, Cell]]) -> str:
    """Return the table: mean ± half of the 95 % interval over sentences."""
    lines = [f"| method | {' | '.join(HEADINGS.values())} |", f"|---|{'---|' * len(HEADINGS)}"]
    lines += [f"| {name} | {' | '.join(str(rows[name][column]) for column in HEADINGS)} |" for name in ordered(rows)]
    return "\n".join(lines)


def write_csv(rows: Mapping[str, Mapping[str, Cell]], path: Path) -> None:
    """Write the figures behind the table: a line per method and column."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "column", "mean", "half_interval", "n"])
        for name in ordered(rows):
            for column, cell in rows[name].items():
                writer.writerow([name, column, f"{cell.mean:.6f}", f"{cell.half:.6f}", cell.n])


def draw(rows: Mapping[str, Mapping[str, Cell]], title: str) -> Figure:
    """Return the figure: a panel per column, a line per method, dots with 95 % intervals."""
    names = ordered(rows)[::-1]
    figure = Figure(figsize=(12.5, 0.34 * len(names) + 1.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(HEADINGS), sharey=True)
    for panel, (column, heading) in zip(panels, HEADINGS.items(), strict=True):
        colour = "#0072b2" if column in REFERENCES else "#b5460f"
        cells = [rows[name][column] for name in names]
        halves = np.nan_to_num([cell.half for cell in cells])
        panel.errorbar(
            [cell.mean for cell in cells],
            range(len(names)),
            xerr=halves,
            fmt="o",
            color=colour,
            markersize=4,
            capsize=2,
        )
        panel.axvline(0, color="#8a8a8a", linewidth=0.8)
        before, _, after = heading.partition(": ")
        lines = f"{before}\n{after}" if after else heading.replace(" with ", " with\n")
        panel.set_title(lines, fontsize=8.5)
        panel.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune, compare, and write the table and the figure.

    Args:
        arguments: The command line; that of the process if not given.
    """
    options = parse_arguments(arguments)
    sentences, label_names = read_sentences(options.data)
    folder = find_model(options.model)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pl.seed_everything(options.seed)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # tokenizing in the loop is fast enough here

    train_loader, val_loader = make_loaders(sentences, folder, options)
    module = SentimentClassifier(folder, label_names, options.learning_rate)
    logger = TensorBoardLogger(options.output, name="runs")
    make_trainer([], logger, len(train_loader), options).fit(module, train_loader, val_loader)

    several = {"references": REFERENCES, "faithfulness": True, "num_examples": options.num_examples}
    all_methods = GlobEncCallback(methods=[*METHODS, *RIVALS], **several)
    flow = GlobEncCallback(methods=[FLOW_OF], aggregation="maxflow", **several)
    print("\nComparing on held-out sentences: the maximum flow takes longest")
    trainer = make_trainer([all_methods, flow], logger, len(train_loader), options)
    (metrics,) = trainer.validate(module, val_loader, verbose=False)

    rows = compared(all_methods, {method: method for method in (*METHODS, *RIVALS)})
    rows |= compared(flow, {FLOW_OF: FLOW})
    options.output.mkdir(parents=True, exist_ok=True)
    count = len(all_methods.history[-1].score)
    title = f"{count} held-out sentences, accuracy {metrics['val_acc']:.2f}: mean and 95 % interval over sentences"
    table = as_markdown(rows)
    (options.output / "table.md").write_text(f"{title}\n\n{table}\n", encoding="utf-8")
    write_csv(rows, options.output / "table.csv")
    draw(rows, title).savefig(options.output / "comparison.png", dpi=150)
    print(f"\n{title}\n\n{table}")
    print(f"\nTable and figure:\n  {options.output}")
    print(f"Look at the sentences with:\n  {tensorboard_command(options.output / 'runs')}")


if __name__ == "__main__":
    main()
