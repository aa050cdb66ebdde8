r"""Texture features of images, which need no training: for images without classes of objects.

Three opponent colours (intensity, red against blue, green against both) are halved in size again and again. At each
size the differences d of neighbours, across, down and of both, say how much there is and how sparse it is:

    log(mean d^2 + 1)                                                                      (1)
    log(mean |d| + 1) - log(mean d^2 + 1) / 2                                              (2)

in pixel values of 256, where the 1 is about the least difference that is seen: how faint the noise of a flat image is
below it does not matter. Of strong Gaussian noise (2) is log sqrt(2 / pi), and it falls where a few edges stand in
flat surroundings. The means of the three colours come first, in units of 32 pixel values.

Source: statistics of filtered images as in Heeger and Bergen 1995, SIGGRAPH 229, and Portilla and Simoncelli 2000,
Int. J. Computer Vision 40, 49, of differences rather than steerable filters; colours of Ohta et al. 1980, Computer
Graphics and Image Processing 13, 222.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fmlightning.metrics.features.networks import FeatureNetwork, Layers, Pixels

OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1 / 2, 0, -1 / 2), (-1 / 4, 1 / 2, -1 / 4))
VISIBLE = 1.0
SMALLEST = 4
"""Images are halved down to this many pixels; smaller ones have too few differences to average."""


class Textures(FeatureNetwork):
    """Colour means, and energies (1) and sparsities (2) of differences: 75 numbers of an image of 32 x 32 pixels."""

    name = "textures"
    batch_size = 256

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("opponent", torch.tensor(OPPONENT))

    @property
    def digest(self) -> str:
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    def forward(self, images: Pixels) -> Layers:
        x = torch.einsum("oc,bchw->bohw", self.opponent, images.expand(-1, 3, -1, -1).float())
        parts = [x.mean((2, 3)) / 32]
        while min(x.shape[2:]) >= SMALLEST:
            parts += [statistic for d in differences(x) for statistic in statistics(d)]
            x = F.avg_pool2d(x, 2)
        return {"features": torch.cat(parts, 1)}


def differences(x: Tensor) -> Iterator[Tensor]:
    """Differences of neighbours across, down, and across of those down."""
    yield x.diff(dim=3)
    yield x.diff(dim=2)
    yield x.diff(dim=2).diff(dim=3)


def statistics(d: Tensor) -> tuple[Tensor, Tensor]:
    """Energy (1) and sparsity (2) of differences (B, C, H, W), each (B, C)."""
    energy = (d.square().mean((2, 3)) + VISIBLE).log()
    return energy, (d.abs().mean((2, 3)) + VISIBLE).log() - energy / 2
