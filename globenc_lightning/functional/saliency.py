"""Gradient x input saliency of the tokens."""

import torch
from torch import Tensor

from globenc_lightning.functional.devices import inverse_power_of_two


def gradient_x_input(gradient: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """Length over the hidden axis of gradient times input, as in Modarressi et al., NAACL 2022, section 4.2.

    Args:
        gradient: (b, k, d) gradient of the target's score with respect to ``hidden``.
        hidden: (b, k, d) the encoder's first hidden states.
        mask: (b, k) true for real tokens.

    Returns:
        (b, k), in units of the score; zero at padding.
    """
    product = gradient * hidden
    # The length squares its input: scale first, by a power of two that changes no digit, or small gradients vanish.
    peak = product.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1)
    factor = inverse_power_of_two(peak)
    length = torch.linalg.vector_norm(product * factor.unsqueeze(-1), dim=-1) / factor
    return torch.where(mask.bool(), length, 0.0)
