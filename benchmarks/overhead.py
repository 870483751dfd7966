"""What an analysis costs, against one bare forward and backward over the same batch.

    python -m benchmarks.overhead                                  # BERT-base and MiniLM dimensions, b = 8
    python -m benchmarks.overhead --model base --batch 8 --length 64 --pairs 30
    python -m benchmarks.overhead --methods ALTI Value-Zeroing "N-Enc, flow" --weights still --memory-at
    python -m benchmarks.overhead --full                           # all models, batches and lengths: hours

The floor is the same model on the same batch, with sdpa, in eval mode: a forward, and the gradient of the predicted
logit with respect to the first hidden states alone. Ours is ``attribute(...)`` as a user calls it: maps, rollout,
saliency and correlation. The two alternate, and the ratio is the median of the pairs' ratios.

While the weights stand still, what depends on them alone is kept from one call to the next. ``weights moved`` moves
them before every call, bare and ours, as training steps do between two validations.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import resident
from benchmarks.common import (
    METHOD_SETS,
    MODELS,
    RIVALS,
    Floor,
    Nudge,
    Spread,
    add_models,
    arguments_parser,
    begin,
    build_model,
    check_floor,
    finish,
    in_pairs,
    parse,
    positive,
    print_table,
    random_inputs,
    seconds_of,
)
from globenc_lightning import attribute

QUICK = {"model": ["minilm"], "length": [64], "pairs": 3, "memory_at": []}
FULL = {"model": ["base", "large", "minilm"], "batch": [1, 8, 16], "length": [32, 64, 128, 256]}
WEIGHTS = {"still": False, "moved": True}


class Shape(NamedTuple):
    """How many examples, and how many tokens each."""

    batch: int
    length: int

    @classmethod
    def of(cls, text: str) -> "Shape":
        """Read ``8x128``."""
        batch, _, length = text.partition("x")
        return cls(positive(batch), positive(length))


def time_case(name: str, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Time one model on one batch.

    Args:
        name: of the model's dimensions.
        shape: of the batch.
        options: the command line.

    Returns:
        The first call's seconds, and for each set of methods and each kind of weights the pairs.
    """
    model = build_model(MODELS[name])
    inputs = random_inputs(MODELS[name], *shape)
    floor = Floor(model, inputs)
    seconds_of(floor.run, floor.around)
    bare = seconds_of(floor.run, floor.around)
    # Another model of the same size first, so that the first call's figure holds no import and no warming up.
    attribute(build_model(MODELS[name], seed=1), inputs)
    first = seconds_of(lambda: attribute(model, inputs))
    second = seconds_of(lambda: attribute(model, inputs))
    check_floor(floor, attribute(model, inputs))
    found: dict[str, Any] = {"bare": bare, "first_call": first, "second_call": second, "pairs": {}}
    nudge = Nudge(model)
    for title in options.methods:
        for weights in options.weights:
            asked = {title: {"methods": methods} for title, methods in METHOD_SETS.items()} | RIVALS
            attribute(model, inputs, **asked[title])
            found["pairs"][title, weights] = in_pairs(
                floor.run,
                lambda asked=asked[title]: attribute(model, inputs, **asked),  # type: ignore[misc]
                pairs=options.pairs,
                seconds=options.seconds,
                around_first=floor.around,
                before=nudge if WEIGHTS[weights] else None,
            )
    return found


def time_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all cases and print two tables: the ratios, and what a first call costs."""
    rows, firsts, results = [], [], []
    for name in options.model:
        for shape in (Shape(batch, length) for batch in options.batch for length in options.length):
            if shape.length > MODELS[name].positions:
                print(f"{name}: {shape.length} tokens are more than its {MODELS[name].positions} positions; left out")
                continue
            found = time_case(name, shape, options)
            case = {"model": name, **shape._asdict()}
            for (title, weights), pairs in found["pairs"].items():
                figures = [Spread.of(one).text() for one in (pairs.first, pairs.second, pairs.ratios)]
                rows.append([name, *shape, title, weights, *figures, len(pairs.first)])
                results.append({**case, "methods": title, "weights": weights, **pairs.figures()})
            calls = [found["bare"], found["first_call"], found["second_call"]]
            structure = found["first_call"] - found["second_call"]
            firsts.append([name, *shape, *(f"{one:.3f}" for one in calls), f"{structure:.3f}"])
            results.append({**case, "bare": calls[0], "first_call": calls[1], "second_call": calls[2]})
    print_table(
        "Analysis against the bare forward and backward: seconds and their ratio, median [quartiles]",
        ["model", "b", "s", "methods", "weights", "bare", "ours", "ratio", "pairs"],
        rows,
    )
    print_table(
        "The first call for a model finds out how it is built: N-Enc, seconds, single measurements",
        ["model", "b", "s", "bare", "first call", "second call", "difference"],
        firsts,
    )
    return results


def measure_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure peak memory in fresh processes and print a table."""
    rows, results = [], []
    for name in options.model:
        for shape in options.memory_at:
            floor: resident.Resident | None = None
            for job in resident.JOBS:
                found = resident.in_fresh_process(job, MODELS[name], shape.batch, shape.length, options.threads)
                floor = floor or found
                ratios = (found.peak / floor.peak, found.above / max(1, floor.above))
                sizes = (found.loaded, found.peak, found.above)
                megabytes = [f"{size / resident.MEGABYTE:.0f}" for size in sizes]
                rows.append([name, *shape, job, *megabytes, *(f"{ratio:.2f}" for ratio in ratios)])
                results.append({"model": name, **shape._asdict(), "job": job, **found._asdict(), "ratios": ratios})
    print_table(
        "Peak resident memory in a fresh process: MB, and ratios to the bare pass",
        ["model", "b", "s", "job", "loaded", "peak", "above", "peak/bare", "above/bare"],
        rows,
    )
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what was found.

    Args:
        arguments: the command line; that of the process if not given.
    """
    parser = arguments_parser(__doc__, pairs=15, seconds=40.0)
    add_models(parser, ["base", "minilm"])
    parser.add_argument("--batch", nargs="+", type=positive, default=[8], help="examples")
    parser.add_argument("--length", nargs="+", type=positive, default=[64, 128], help="tokens of each")
    parser.add_argument("--methods", nargs="+", choices=(*METHOD_SETS, *RIVALS), default=list(METHOD_SETS))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--full", action="store_true", help="all models, batches and lengths")
    parser.add_argument(
        "--memory-at", nargs="*", type=Shape.of, default=[Shape(8, 128), Shape(1, 512)], metavar="BxS", help="batches"
    )
    parser.add_argument("--no-time", action="store_true", help="memory alone")
    if parser.parse_known_args(arguments)[0].full:
        parser.set_defaults(**FULL)
    options = parse(parser, arguments, QUICK)
    found = begin(options)
    results = {
        "time": [] if options.no_time else time_all(options),
        "memory": measure_memory(options) if options.memory_at else [],
    }
    finish(options, found, results)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
