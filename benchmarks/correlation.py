"""What Spearman's rho costs, against a loop over ``scipy.stats.spearmanr``.

    python -m benchmarks.correlation

Ours takes all examples, layers and methods at once, as an analysis does. Two cases: sentences of full length, and
sentences of several lengths in which every third value is a tie. Ends with an error if the two differ by more than
1e-12.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.common import Spread, arguments_parser, begin, finish, in_pairs, parse, positive, print_table
from globenc_lightning.functional import spearman

QUICK = {"examples": 8, "layers": 4, "pairs": 3}
AGREEMENT = 1e-12


class Sample(NamedTuple):
    """Rows (m, b, l, k) of all methods, the saliency (b, k), and the mask (b, k)."""

    rows: Tensor
    saliency: Tensor
    mask: Tensor


def sample(options: argparse.Namespace, *, mixed: bool, seed: int = 0) -> Sample:
    """Random rows and saliencies.

    Args:
        options: the command line.
        mixed: sentences of several lengths and with ties, or all of full length and without.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    b, k = options.examples, options.tokens
    rows = torch.rand(options.methods, b, options.layers, k, generator=generator)
    saliency = torch.rand(b, k, generator=generator)
    lengths = torch.full((b,), k)
    if mixed:
        lengths = torch.randint(max(3, k // 4), k + 1, (b,), generator=generator)
        for values in (rows, saliency):
            values[..., ::3] = values[..., ::3].mul(8).round().div(8)
    return Sample(rows, saliency, torch.arange(k) < lengths.unsqueeze(1))


def ours(given: Sample) -> Tensor:
    """Rho (m, b, l) by the package."""
    return spearman(given.rows, given.saliency.unsqueeze(1), given.mask.unsqueeze(1))


def theirs(given: Sample) -> Tensor:
    """Rho (m, b, l), one after the other by scipy."""
    rows, saliency, lengths = given.rows.numpy(), given.saliency.numpy(), given.mask.sum(1).tolist()
    rho = np.empty(rows.shape[:-1])
    for method, example, layer in np.ndindex(rho.shape):
        n = lengths[example]
        rho[method, example, layer] = spearmanr(rows[method, example, layer, :n], saliency[example, :n]).statistic
    return torch.from_numpy(rho)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what was found.

    Args:
        arguments: the command line; that of the process if not given.
    """
    parser = arguments_parser(__doc__, pairs=7, seconds=60.0)
    parser.add_argument("--examples", type=positive, default=64)
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--methods", type=positive, default=8)
    parser.add_argument("--tokens", type=positive, default=64)
    options = parse(parser, arguments, QUICK)
    found = begin(options)
    rows: list[list[object]] = []
    results: list[dict[str, Any]] = []
    for title, mixed in (("full length", False), ("mixed, with ties", True)):
        given = sample(options, mixed=mixed)
        difference = float((ours(given) - theirs(given)).abs().max())
        pairs = in_pairs(
            lambda given=given: ours(given),  # type: ignore[misc]
            lambda given=given: theirs(given),  # type: ignore[misc]
            pairs=options.pairs,
            seconds=options.seconds,
        )
        first, second = Spread.of(pairs.first).text(2, 1000), Spread.of(pairs.second).text(0, 1000)
        rows.append([title, first, second, Spread.of(pairs.ratios).text(1), len(pairs.first), f"{difference:.1e}"])
        results.append({"sentences": title, "difference": difference, **pairs.figures()})
    print_table(
        f"{options.examples} examples x {options.layers} layers x {options.methods} methods, {options.tokens} tokens: "
        "milliseconds and their ratio, median [quartiles]",
        ["sentences", "ours", "scipy loop", "scipy/ours", "pairs", "largest difference"],
        rows,
    )
    finish(options, found, {"correlation": results})
    # A NaN in only one of the two is a difference too.
    if not all(one["difference"] <= AGREEMENT for one in results):
        raise SystemExit(f"the two differ by more than {AGREEMENT}")


if __name__ == "__main__":
    main()
