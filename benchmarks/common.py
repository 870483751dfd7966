"""What the benchmarks share: models, the floor they are compared with, timing in pairs, tables, the machine.

Axes: ``b`` example, ``s`` token, ``d`` hidden.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from globenc_lightning import METHODS, Attributions
from globenc_lightning.functional import gradient_x_input

Run = Callable[[], Any]
Around = Callable[[], AbstractContextManager[Any]]
Inputs = dict[str, Tensor]

METHOD_SETS: dict[str, tuple[str, ...]] = {"N-Enc": ("N-Enc",), "all eight": METHODS}
"""What is asked of the analysis, by the name it has in the tables."""
RIVALS: dict[str, dict[str, Any]] = {
    "ALTI": {"methods": ("ALTI",)},
    "Value-Zeroing": {"methods": ("Value-Zeroing",)},
    "N-Enc, flow": {"methods": ("N-Enc",), "aggregation": "maxflow"},
}
"""What may be asked of it besides, and costs more."""

FEWEST_PAIRS = 3
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Dimensions:
    """The size of a BERT classifier with random weights."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int = 30522
    positions: int = 512


MODELS = {
    "base": Dimensions(12, 768, 12, 3072),
    "large": Dimensions(24, 1024, 16, 4096),
    "minilm": Dimensions(6, 384, 12, 1536),
    # For the tests: runs in no time and says nothing about time.
    "tiny": Dimensions(2, 16, 2, 32, vocabulary=99, positions=64),
}
"""Dimensions by name: BERT-base, a BERT-large-like model, MiniLM."""


def build_model(dimensions: Dimensions, seed: int = 0) -> BertForSequenceClassification:
    """A classifier of two classes with random weights, in eval mode, with sdpa attention.

    Args:
        dimensions: its size.
        seed: of its weights.
    """
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=dimensions.vocabulary,
        hidden_size=dimensions.hidden,
        num_hidden_layers=dimensions.layers,
        num_attention_heads=dimensions.heads,
        intermediate_size=dimensions.intermediate,
        max_position_embeddings=dimensions.positions,
        num_labels=2,  # type: ignore[call-arg]
    )
    model = BertForSequenceClassification._from_config(config, attn_implementation="sdpa")
    model.eval()
    return model


def random_inputs(dimensions: Dimensions, batch: int, length: int, seed: int = 0) -> Inputs:
    """Random token ids (b, s) without padding, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, dimensions.vocabulary, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Floor:
    """The floor: one forward, and one backward from the predicted logit to the first hidden states; nothing else.

    Args:
        model: the model.
        inputs: the batch.
    """

    def __init__(self, model: BertForSequenceClassification, inputs: Inputs) -> None:
        self._model = model
        self._inputs = inputs
        self._hidden: Tensor | None = None

    @contextmanager
    def around(self) -> Iterator[None]:
        """The surroundings of :meth:`run`, whose time is not counted; afterwards the model is as before.

        No parameter takes part in the autograd graph, and the first hidden states require a gradient.
        """
        flags = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        handle = self._model.bert.encoder.layer[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            handle.remove()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def run(self) -> tuple[Tensor, Tensor]:
        """Return the first hidden states and the gradient, (b, s, d) each."""
        logits = self._model(**self._inputs).logits
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise RuntimeError("run() needs around()")
        (gradient,) = torch.autograd.grad(logits.amax(1).sum(), hidden)
        return hidden.detach(), gradient

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._hidden = hidden.requires_grad_()


def check_floor(floor: Floor, found: Attributions) -> None:
    """Make sure that the floor computes the very gradient that an analysis takes.

    Args:
        floor: the floor.
        found: the analysis of the same model and batch.

    Raises:
        RuntimeError: it does not.
    """
    with floor.around():
        hidden, gradient = floor.run()
    saliency = gradient_x_input(gradient, hidden, found.attention_mask)
    if not torch.allclose(saliency, found.saliency, rtol=1e-3, atol=1e-6 * float(saliency.max())):
        raise RuntimeError("the floor and the analysis take different gradients: nothing can be compared")


class Nudge:
    """Moves the weights of all linear maps a little, to and fro: a training step, as far as caches are concerned.

    Args:
        model: whose weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        self._factor = 1.001

    def __call__(self) -> None:
        """Move them."""
        with torch.no_grad():
            for weight in self._weights:
                weight.mul_(self._factor)
        self._factor = 1 / self._factor


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some values."""
        return cls(*(float(value) for value in np.percentile(np.asarray(values, dtype=float), (25, 50, 75))))

    def text(self, digits: int = 3, scale: float = 1.0) -> str:
        """In words: ``median [low-high]``."""
        low, median, high = (f"{value * scale:.{digits}f}" for value in self)
        return f"{median} [{low}-{high}]"


@dataclass(frozen=True)
class Pairs:
    """Seconds of two jobs that were run in alternation: first, second, first, second, ..."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Second over first, pair by pair."""
        return tuple(second / first for first, second in zip(self.first, self.second, strict=True))

    @property
    def differences(self) -> tuple[float, ...]:
        """Second minus first, pair by pair."""
        return tuple(second - first for first, second in zip(self.first, self.second, strict=True))

    def figures(self) -> dict[str, Any]:
        """What goes into the JSON file."""
        return {
            "first_seconds": self.first,
            "second_seconds": self.second,
            "first": Spread.of(self.first)._asdict(),
            "second": Spread.of(self.second)._asdict(),
            "ratio": Spread.of(self.ratios)._asdict(),
        }


def seconds_of(run: Run, around: Around = nullcontext) -> float:
    """How long a job takes, its surroundings not counted."""
    with around():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def in_pairs(
    first: Run,
    second: Run,
    *,
    pairs: int,
    seconds: float,
    around_first: Around = nullcontext,
    around_second: Around = nullcontext,
    before: Run | None = None,
) -> Pairs:
    """Time two jobs in alternation. Both must have been run before.

    Args:
        first: the job that is compared with.
        second: the other job.
        pairs: how many pairs.
        seconds: no new pair is begun after so long, if there are at least three.
        around_first: surroundings of the first job, not timed.
        around_second: surroundings of the second job, not timed.
        before: run before each single job, not timed.

    Returns:
        Their times.
    """
    gc.collect()
    begin = time.perf_counter()
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < pairs:
        if len(times[0]) >= min(FEWEST_PAIRS, pairs) and time.perf_counter() - begin > seconds:
            break
        for job, around, found in ((first, around_first, times[0]), (second, around_second, times[1])):
            if before is not None:
                before()
            found.append(seconds_of(job, around))
    return Pairs(tuple(times[0]), tuple(times[1]))


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent ``p`` of ``cost = c * size ** p``, by least squares on logarithms; NaN if it has none."""
    if len(sizes) < 2 or min(costs) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(np.asarray(sizes, dtype=float)), np.log(np.asarray(costs, dtype=float)), 1)[0])


def arguments_parser(description: str | None, *, pairs: int, seconds: float) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has.

    Args:
        description: the docstring of the command; its first line is shown.
        pairs: default of ``--pairs``.
        seconds: default of ``--seconds``.
    """
    parser = argparse.ArgumentParser(
        description=(description or "").strip().splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few and small cases, to see that it works")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads")
    parser.add_argument("--pairs", type=positive, default=pairs, help="measurements of each figure, at most")
    parser.add_argument("--seconds", type=float, default=seconds, help="begin no further measurement after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return parser


def add_models(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Add ``--model`` to a parser."""
    parser.add_argument(
        "--model", nargs="+", choices=MODELS, default=list(default), metavar="NAME", help="base, large, minilm"
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1, not {value}")
    return value


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """Parse a command line; ``--quick`` changes defaults, and gives way to options beside it."""
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args(arguments)


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on.

    Args:
        threads: how many threads torch may use.
    """
    names = ("globenc-lightning", "torch", "transformers", "pytorch-lightning", "numpy", "scipy")
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "from source"


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Set the number of threads, print the machine, and return it."""
    torch.set_num_threads(options.threads)
    found = machine(options.threads)
    load = "unknown" if found["load"] is None else f"{found['load']:.1f}"
    print(f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, load {load} before the start")
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    return found


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print an aligned table: words to the left, numbers to the right."""
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [any(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    print(f"\n{title}")
    for row in cells:
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        print("  ".join(aligned).rstrip())


def run_fresh(module: str, arguments: Sequence[str]) -> Any:
    """Run a module of this repository in a process of its own.

    Args:
        module: its name.
        arguments: its command line.

    Returns:
        What the JSON in its last line of output says.

    Raises:
        RuntimeError: it failed; what it wrote to its standard error is in the message.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    finished = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def finish(options: argparse.Namespace, found: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write the JSON file, if one was asked for."""
    if options.json is None:
        return
    asked = {name: value for name, value in vars(options).items() if name != "json"}
    content = {"machine": found, "options": asked, "results": results}
    options.json.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Dimensions) else str(value)
