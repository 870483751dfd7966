"""Rows of several lengths in two tensors: 16-bit shares of each row's largest value, and those values.

A validation of 1,000 sentences has 9,000 rows: a tensor for each of them takes more memory than the numbers in it.

Axes: ``m`` kind of row, ``b`` example, ``t`` the tokens of all examples, one after the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 65535
_OFFSET = 32768
"""Codes are stored as signed numbers, which every version of torch computes with."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows, not negative, that are read back to 1 / 131,070 of their largest value; that one is exact.

    Rows with values that are negative, infinite or NaN are kept as they are, in float32.

    Attributes:
        values: (m, t) int16 shares of ``peaks``; float32 values where there are no peaks.
        peaks: (m, b) float32 largest values; None where the values are kept as they are.
        lengths: (b) how many tokens each example has; entries with the same lengths share one list.
    """

    values: Tensor
    peaks: Tensor | None
    lengths: list[int]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[Tensor]]) -> "Packed":
        """Returns the rows, packed.

        Args:
            rows: (m) sequences of one (k,) per example; k differs between the examples.
        """
        lengths = [len(one) for one in rows[0]]
        values = torch.stack([torch.cat([torch.empty(0), *one]).float() for one in rows])
        # In numpy: of the few numbers of a validation, torch's own would wait for its threads longer than they compute.
        found = values.numpy()
        if not (np.isfinite(found) & (found >= 0)).all():
            return cls(values, None, lengths)
        sizes = np.array(lengths, dtype=np.int64)
        peaks = np.zeros((len(found), len(sizes)), dtype=np.float32)
        if found.size:
            starts = (np.cumsum(sizes) - sizes)[sizes > 0]
            peaks[:, sizes > 0] = np.maximum.reduceat(found, starts, axis=1)
        largest = np.repeat(peaks.astype(np.float64), sizes, axis=1)
        shares = np.divide(found, largest, out=np.zeros_like(largest), where=largest > 0)
        codes = np.rint(shares * LEVELS) - _OFFSET
        return cls(torch.from_numpy(codes.astype(np.int16)), torch.from_numpy(peaks), lengths)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Packed":
        """Returns what :meth:`state_dict` was called on."""
        return cls(state["values"], state["peaks"], state["lengths"])

    def state_dict(self) -> dict[str, Any]:
        """Returns everything in tensors and primitives."""
        return dict(vars(self))

    def rows(self, kind: int) -> list[Tensor]:
        """Returns one (k,) float32 per example, of one kind of row."""
        if self.peaks is None:
            return [one.clone() for one in self.values[kind].split(self.lengths)]
        peaks = self.peaks[kind].unbind()
        parts = self.values[kind].split(self.lengths)
        return [_expanded(part, peak) for part, peak in zip(parts, peaks, strict=True)]

    def row(self, kind: int, example: int) -> Tensor:
        """Returns (k,) float32, one row."""
        start = sum(self.lengths[:example])
        part = self.values[kind, start : start + self.lengths[example]]
        return part.clone() if self.peaks is None else _expanded(part, self.peaks[kind, example])


def _expanded(codes: Tensor, peak: Tensor) -> Tensor:
    """Returns the values that codes (k,) stand for, with the largest as it was."""
    return ((codes.double() + _OFFSET) / LEVELS * peak.double()).float()
