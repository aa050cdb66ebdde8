"""Colour patches of the two photographs that come with scikit-learn: natural images, and no download."""

from typing import Any

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from fmlightning.data.images.base import ImageData, Splits
from fmlightning.data.images.datasets import ImageDataset, InMemoryImages
from fmlightning.flow.keys import Key

SIZE, STRIDE = 32, 4
BANDS = {
    "train": ((0, 128), (192, 256), (320, 448), (512, 640)),
    "test": ((128, 192), (448, 512)),
    "val": ((256, 320),),
}
"""Columns of the photographs, 640 wide; no patch crosses from one band to another, so no pixel is in two splits."""


class PhotosData(ImageData):
    """Patches of 32 x 32 pixels of two photographs, a Chinese palace and a flower; y says of which.

    Every fourth position in each direction is a patch: 16,632 for training, 1,782 for validation and 3,564 for
    testing, from vertical bands that do not overlap.

    Args:
        flip: whether training mirrors every image left to right with probability one half, keyed.
        **options: those of ImageData.
    """

    title = "two photographs"

    def __init__(self, flip: bool = True, **options: Any) -> None:
        photographs = [torch.from_numpy(image.copy()) for image in load_sample_images().images]
        sets: dict[str, ImageDataset] = {}
        for name in BANDS:
            found = patches(photographs, name)
            # in an order that is always the same, so that the first few are not all of one corner
            order = torch.randperm(len(found), generator=Key(0).fold("photos").generator())
            sets[name] = found.subset(order)
        super().__init__(Splits(sets, ("palace", "flower")), flip=flip, **options)


def patches(photographs: list[Tensor], split: str) -> InMemoryImages:
    """All patches of a split, (N, 3, 32, 32), and the photographs that they are of."""
    pixels: list[Tensor] = []
    labels: list[Tensor] = []
    for number, photograph in enumerate(photographs):
        for left, right in BANDS[split]:
            windows = photograph[:, left:right].unfold(0, SIZE, STRIDE).unfold(1, SIZE, STRIDE)
            pixels.append(windows.flatten(0, 1))
            labels.append(torch.full((len(pixels[-1]),), number))
    return InMemoryImages(torch.cat(pixels).contiguous(), torch.cat(labels))
