"""Bring values of a device home together, and check them then.

A look at a value on a GPU waits until everything that was asked of it is done. So what has to hold is collected while a
batch runs, and looked at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_WIDTH = 16
"""Every tensor begins at a multiple of so many bytes, so that its numbers can be read where they lie."""


def brought_home(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensors on the CPU, detached, by one copy of each device that they are on.

    Args:
        tensors: any, of any type and shape.

    Returns:
        One per tensor, in order; those of the CPU as they are.
    """
    found = [one.detach() for one in tensors]
    for device in dict.fromkeys(one.device for one in found if one.device.type != "cpu"):
        places = [place for place, one in enumerate(found) if one.device == device and one.numel()]
        packed, starts, length = [], [], 0
        for place in places:
            part = found[place].contiguous().reshape(-1).view(torch.uint8)
            starts.append((length, part.numel()))
            rest = -part.numel() % _WIDTH
            packed += [part, *([part.new_empty(rest)] if rest else [])]
            length += part.numel() + rest
        home = torch.cat(packed).cpu() if packed else torch.empty(0, dtype=torch.uint8)
        for place, (start, size) in zip(places, starts, strict=True):
            one = found[place]
            found[place] = home[start : start + size].view(one.dtype).view(one.shape)
        for place, one in enumerate(found):
            if one.device == device:
                found[place] = torch.empty(one.shape, dtype=one.dtype)
    return found


@dataclass(eq=False)
class Checks:
    """What has to hold, on the device until it is looked at.

    Attributes:
        values: what is looked at.
        judges: for each of them, what is done with it once it is on the CPU: it raises where it is not as it has to be.
    """

    values: list[Tensor] = field(default_factory=list)
    judges: list[Callable[[Tensor], None]] = field(default_factory=list)

    def add(self, value: Tensor, judge: Callable[[Tensor], None]) -> None:
        """Note a value, and what judges it."""
        self.values.append(value)
        self.judges.append(judge)

    def settle(self, *others: Tensor) -> list[Tensor]:
        """Look at everything that was noted, in its order, and bring other tensors home with it.

        Args:
            others: tensors that are wanted on the CPU.

        Returns:
            These.

        Raises:
            GlobEncError: what a judge raises.
        """
        values, judges = self.values, self.judges
        self.values, self.judges = [], []
        found = brought_home([*values, *others])
        for value, judge in zip(found, judges, strict=False):
            judge(value)
        return found[len(values) :]
