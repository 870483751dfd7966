"""What a tensor's device can do, and how much of it is worked on at once.

A processor works fastest on what stays in its cache, and pays nothing to start an operation. Another device works
through much at once, and pays for every operation that is started on it.
"""

import torch
from torch import Tensor

CHUNK = 1 << 18
"""How many entries of a (b, h, q, k) tensor a processor works on at once: few enough to stay in its cache."""

CHUNK_ELSEWHERE = 1 << 26
"""The same for any other device: 256 MB in float32."""


def chunk_of(device: torch.device) -> int:
    """Returns how many entries of a (b, h, q, k) tensor are worked on at once."""
    return CHUNK if device.type == "cpu" else CHUNK_ELSEWHERE


def has_float64(device: torch.device) -> bool:
    """Returns whether a device computes in float64; Apple's MPS does not."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def with_float64(tensor: Tensor) -> Tensor:
    """Returns the tensor where float64 exists: on its own device, else on the CPU."""
    return tensor if has_float64(tensor.device) else tensor.cpu()


_BITS = {
    torch.float64: (torch.int64, 52, 1022),
    torch.float32: (torch.int32, 23, 126),
    torch.bfloat16: (torch.int16, 7, 126),
    torch.float16: (torch.int16, 10, 14),
}
"""For each type: integers of its width, how many bits come after the exponent, what is added to the exponent."""


def binary_exponent(values: Tensor) -> Tensor:
    """Returns the exponent of the power of two just above each value, as ``torch.frexp`` does.

    By the bits of the number, since not every device has ``frexp``. It is kept where that power and its inverse are
    normal numbers, and zero has the exponent 0.

    Args:
        values: (...) floating point, not negative.

    Returns:
        (...) integers.
    """
    whole, mantissa, bias = _BITS[values.dtype]
    bits = values.view(whole)
    return ((bits >> mantissa) - bias).clamp_(1 - bias, bias).masked_fill_(bits == 0, 0)


def inverse_power_of_two(values: Tensor) -> Tensor:
    """Returns a power of two that brings each value into [0.5, 1), as far as it is a normal number.

    Multiplying by it changes no digit.

    Args:
        values: (...) floating point, not negative.

    Returns:
        (...) two to the power of minus :func:`binary_exponent`; any power where the value is zero.
    """
    whole, mantissa, bias = _BITS[values.dtype]
    # The bits of the exponent alone, and what they make up together with those of the result.
    exponents = (values.view(whole) & ((2 * bias + 3) << mantissa)).clamp_(1 << mantissa, 2 * bias << mantissa)
    return ((2 * bias + 1 << mantissa) - exponents).view(values.dtype)
