r"""Corruptions of images: from clean x1 to the x0 that a flow is to lead back.

    x0 = C(x1) + noise * eps,   eps ~ N(0, I)                                                     (1)

C alone would leave many x1 at one x0, and one trajectory cannot lead to all of them; the noise makes room.

Source: Albergo et al. 2023, arXiv:2310.03725, sec. 3 (data-dependent couplings).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.shapes import Points

REACH = 3
"""Widths of a blur at which its window ends."""


@dataclass(frozen=True)
class Corruption(ABC):
    """Equation (1).

    Args:
        noise: standard deviation of the noise; 0 switches it off.
    """

    noise: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise={self.noise} must be finite and not negative")

    @abstractmethod
    def degrade(self, x1: Points) -> Points:
        """C of clean images (B, C, H, W)."""

    def __call__(self, x1: Points, streams: KeyedStreams) -> Points:
        """The corrupted images; the noise of each is a function of its row."""
        return self.degrade(x1) + self.noise * streams.normal(x1.shape[1:], dtype=x1.dtype)


@dataclass(frozen=True)
class Noisy(Corruption):
    """Noise alone."""

    noise: float = 0.5

    def degrade(self, x1: Points) -> Points:
        return x1


@dataclass(frozen=True)
class Blurred(Corruption):
    """A Gaussian blur.

    Args:
        width: its standard deviation in pixels.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.width < math.inf:
            raise ValueError(f"width={self.width} must be positive and finite")

    def degrade(self, x1: Points) -> Points:
        return blur(blur(x1, self.width, 2), self.width, 3)


@dataclass(frozen=True)
class Downsampled(Corruption):
    """The means of squares of pixels, in place of each of them.

    Args:
        factor: side of a square; divides height and width.
    """

    factor: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1:
            raise ValueError(f"factor={self.factor} must be at least 1")

    def degrade(self, x1: Points) -> Points:
        height, width = x1.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"factor={self.factor} must divide the {height} x {width} pixels")
        means = F.avg_pool2d(x1, self.factor)
        return means.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


def blur(x: Points, width: float, dim: int) -> Tensor:
    """The weighted means along one dimension; beyond the edge, the image is its outermost pixel."""
    reach = math.ceil(REACH * width)
    steps = torch.arange(-reach, reach + 1, device=x.device)
    weights = (-0.5 * (steps / width) ** 2).exp()
    at = (torch.arange(x.shape[dim], device=x.device)[:, None] + steps).clamp(0, x.shape[dim] - 1)
    windows = x.index_select(dim, at.flatten()).unflatten(dim, at.shape)
    shape = [-1 if d == dim + 1 else 1 for d in range(windows.ndim)]
    return (windows * (weights / weights.sum()).view(shape)).sum(dim + 1)
