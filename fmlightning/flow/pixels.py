r"""Images with L pixel values as points of a flow.

    x = 2 (k + u) / L - 1,   k in {0, ..., L - 1},   u ~ U(0, 1)                           (1)

fills [-1, 1] without gaps, so that a density exists and bits per dimension mean something. Training,
sampling and likelihood all use this one scaling.

Source: Theis et al. 2016, arXiv:1511.01844, sec. 3.1.
"""

import torch
from torch import Tensor

from fmlightning.flow.shapes import require_like


def dequantise(pixels: Tensor, u: Tensor, num_bins: int) -> Tensor:
    """Equation (1), from integer pixel values k and uniform numbers u of the same shape."""
    require_like("u", u, "pixels", pixels)
    x = pixels + u
    return x.mul_(2).div_(num_bins).sub_(1)  # in place: x is new, and a batch of images large


def quantise(x: Tensor, num_bins: int) -> Tensor:
    """Pixel values k: the inverse of (1) for any u; values outside [-1, 1] are clamped.

    Args:
        num_bins: 2 to 256, as pixel values are bytes.
    """
    if not 2 <= num_bins <= 256:
        raise ValueError(
            f"num_bins={num_bins} must lie in [2, 256]: pixel values are kept as bytes"
        )
    return ((x + 1) / 2 * num_bins).floor().clamp(0, num_bins - 1).to(torch.uint8)
