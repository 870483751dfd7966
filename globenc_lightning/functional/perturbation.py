"""Which tokens are masked, and what the scores of the masked copies say: comprehensiveness and sufficiency over chance.

Comprehensiveness and sufficiency are those of DeYoung et al., ACL 2020, section 4: what a score loses without the first
tokens of a method, and what it loses with these alone. Between checkpoints they tell how sure a model is, so each is
compared with that of random tokens of the same example, as a share of what the example can lose at all.

Axes: ``b`` example, ``k`` token.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

SHARE = 0.2
"""Which share of an example's tokens is masked."""
LEAST_SPAN = 0.05
"""Examples whose score falls by less than this when everything is masked are left out: a gain is a share of that fall.

A probability's fall is compared with it as it is: one that rises is left out, too, since as a share of that rise, what
the decision loses without a method's first tokens would count against the method. A value may move either way, and its
move is compared with this as a share of the larger of both values."""
LEAST_PROBABILITY = 1e-6
"""Probabilities are kept so far away from 0 and 1 before their log-odds are taken."""


class Gains(NamedTuple):
    """What the copies of one method tell, NaN where an example is left out.

    Attributes:
        comprehensiveness: (b,) the score of the copy without random tokens, less that of the copy without the method's
            first ones, as a share of the span: 0 is chance, and above 0 is better than it.
        sufficiency: (b,) the score of the copy with the method's first tokens alone, less that of the copy with random
            ones alone, as a share of the span.
        log_odds: (b,) log-odds of the whole text, less those of the copy without the method's first tokens.
    """

    comprehensiveness: Tensor
    sufficiency: Tensor
    log_odds: Tensor


def number_masked(count: Tensor, share: float = SHARE) -> Tensor:
    """Returns how many of ``count`` tokens are masked, (b,): the nearest whole number, halves up, at least one.

    None where there is but one token or none: a method has nothing to choose there.

    Args:
        count: (b,) how many tokens of each example may be masked.
        share: which share of them is masked.
    """
    # A share such as .3 has no exact binary form: 5 * .3 + .5 lies just below 2.
    nearest = (count.double() * share + 0.5 + 1e-9).floor().long().clamp(min=1)
    return torch.where(count > 1, nearest, 0)


def first_tokens(row: Tensor, maskable: Tensor, share: float = SHARE) -> Tensor:
    """Returns which tokens are masked, (b, k): those with the largest numbers of a row; of equal ones the first.

    Args:
        row: (b, k) a number per token.
        maskable: (b, k) which tokens may be masked.
        share: which share of these is masked.
    """
    order = row.double().masked_fill(~maskable, float("-inf")).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(row.shape[1], device=row.device).expand(row.shape)
    rank = torch.empty_like(place).scatter_(1, order, place)
    return (rank < number_masked(maskable.sum(1), share).unsqueeze(1)) & maskable


def random_row(ids: Sequence[int]) -> list[float]:
    """Returns a random number per token of a text, which depends on the text alone.

    The same in every process, batch and version of Python: an example's random tokens never change over a training, so
    that gains are paired. No random state is moved.

    Args:
        ids: the ids of the text's real tokens.
    """
    draw = Random(crc32(",".join(map(str, ids)).encode()))
    return [draw.random() for _ in ids]


def span_of(full: Tensor, nothing: Tensor, is_value: bool) -> tuple[Tensor, Tensor]:
    """Returns what the scores lose when every token is masked, (b,), and whether that is enough to share in, (b,).

    A probability that rises has lost nothing; a value may move either way.

    Args:
        full: (b,) scores of the whole texts.
        nothing: (b,) scores of the copies with every token masked.
        is_value: whether the scores are values, which have a scale of their own, and no probabilities.
    """
    span = full - nothing
    if is_value:
        enough = (span.abs() >= LEAST_SPAN * torch.maximum(full.abs(), nothing.abs())) & (span != 0)
    else:
        enough = span >= LEAST_SPAN
    return span, enough & span.isfinite()


def gains(
    full: Tensor,
    nothing: Tensor,
    without: tuple[Tensor, Tensor],
    alone: tuple[Tensor, Tensor],
    is_value: bool = False,
) -> Gains:
    """Returns what the scores of a method's copies tell, against those of the random ones.

    Args:
        full: (b,) scores of the whole texts.
        nothing: (b,) scores of the copies with every token masked.
        without: (b,) scores of the copies without the method's first tokens, and of those without random tokens.
        alone: (b,) scores of the copies with the method's first tokens alone, and of those with random tokens alone.
        is_value: whether the scores are values and no probabilities.
    """
    full, nothing = full.double(), nothing.double()
    (without_first, without_random), (first_alone, random_alone) = (
        [one.double() for one in both] for both in (without, alone)
    )
    span, counts = span_of(full, nothing, is_value)
    share = torch.where(counts, span, float("nan"))
    odds = torch.full_like(full, float("nan")) if is_value else log_odds(full) - log_odds(without_first)
    return Gains((without_random - without_first) / share, (first_alone - random_alone) / share, odds)


def log_odds(probability: Tensor) -> Tensor:
    """Returns the log-odds of probabilities, which are kept ``LEAST_PROBABILITY`` away from 0 and 1."""
    kept = probability.double().clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return torch.log(kept) - torch.log1p(-kept)
