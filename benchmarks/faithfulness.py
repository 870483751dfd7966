"""What masked copies cost, against one bare forward and backward over the same batch.

    python -m benchmarks.faithfulness                              # MiniLM and BERT-base dimensions, b = 16
    python -m benchmarks.faithfulness --model base --batch 8 --length 128 --pairs 9

The floor is that of ``benchmarks.overhead``. Ours is the analysis of a probe as a validation makes it, without masked
copies and with them: five forward passes for one method, two for each further one. Each alternates with the floor, and
the ratio is the median of the pairs' ratios. The forward passes are counted, too.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import (
    MODELS,
    Floor,
    Spread,
    add_models,
    arguments_parser,
    begin,
    build_model,
    finish,
    in_pairs,
    parse,
    positive,
    print_table,
    random_inputs,
)
from globenc_lightning import ProbeSet
from globenc_lightning.analysis import Reader
from globenc_lightning.measurement import measure
from globenc_lightning.settings import Settings

QUICK = {"model": ["minilm"], "batch": [4], "length": [32], "pairs": 3}
METHODS = ("N-Enc", "N-Res", "W")
CASES = {"none": (), "N-Enc": METHODS[:1], "N-Enc, N-Res": METHODS[:2], "N-Enc, N-Res, W": METHODS}


def time_case(name: str, batch: int, length: int, options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Time one model on one batch.

    Args:
        name: of the model's dimensions.
        batch: the number of examples.
        length: how many tokens each has.
        options: the command line.

    Returns:
        The table's rows, and the results.
    """
    model = build_model(MODELS[name])
    inputs = random_inputs(MODELS[name], batch, length)
    floor, probe = Floor(model, inputs), ProbeSet.from_batch(inputs)
    reader, settings = Reader(model, max_tokens=batch * length), Settings(METHODS)
    calls: list[int] = []
    handle = model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    rows, results = [], []
    for title, masked in CASES.items():

        def ours(masked: Sequence[str] = masked) -> None:
            measure(reader, probe, settings, masked=masked)

        ours()
        calls.clear()
        ours()
        passes = len(calls)
        pairs = in_pairs(
            floor.run, ours, pairs=options.pairs, seconds=options.seconds, around_first=floor.around, before=None
        )
        figures = [Spread.of(one).text() for one in (pairs.first, pairs.second, pairs.ratios)]
        rows.append([name, batch, length, title, passes, *figures, len(pairs.first)])
        results.append({"model": name, "batch": batch, "length": length, "masked": title, "passes": passes})
        results[-1] |= pairs.figures()
    handle.remove()
    return rows, results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what was found.

    Args:
        arguments: the command line; that of the process if not given.
    """
    parser = arguments_parser(__doc__, pairs=9, seconds=40.0)
    add_models(parser, ["minilm", "base"])
    parser.add_argument("--batch", nargs="+", type=positive, default=[16], help="examples")
    parser.add_argument("--length", nargs="+", type=positive, default=[32], help="tokens of each")
    options = parse(parser, arguments, QUICK)
    found = begin(options)
    rows, results = [], []
    for name in options.model:
        for batch in options.batch:
            for length in options.length:
                more = time_case(name, batch, length, options)
                rows += more[0]
                results += more[1]
    print_table(
        "Analysis of three methods with masked copies: seconds, and the ratio to the bare forward and backward",
        ["model", "b", "s", "masked", "passes", "bare", "ours", "ratio", "pairs"],
        rows,
    )
    finish(options, found, {"time": results})


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
