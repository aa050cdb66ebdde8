"""Any torch Dataset as training data: points, images, or whatever else is a tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fmlightning.data.images.base import ImageData, LoaderOptions, Splits
from fmlightning.data.images.datasets import (
    PROBES,
    ImageBatch,
    ImageDataset,
    digest,
    hold_out,
    spread,
)
from fmlightning.data.images.decode import BadImage
from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import Labels


class DatasetData(ImageData):
    """The items of a torch Dataset: a tensor, or a tensor and a label.

        data: {class_path: DatasetData, init_args: {train: {class_path: mine.MySet, init_args: {...}}}}

    Tensors of floats are taken as they are, in float32; images of bytes k, (C, H, W), become x = 2 (k + u) / L - 1.
    Items are read by their numbers in a keyed order. An item must be a function of its number: what it draws at random
    is not repeated when a run is resumed.

    Args:
        train: the training set.
        test: the held-out set; null holds `test_size` items of `train` out.
        test_size: items held out for testing where `test` is null, the same for every seed.
        num_classes: how many labels 0, 1, ... there are; 0 ignores the labels.
        num_bins: how many values L a byte of an image has; without effect on floats.
        num_workers: processes that read ahead; the batches do not depend on it. 0 reads in the training process.
        **options: those of ImageData, `labelled` aside.
    """

    title = "a Dataset"
    samples = "samples"

    def __init__(
        self,
        train: Dataset,
        test: Dataset | None = None,
        test_size: int = 500,
        num_classes: int = 0,
        num_bins: int = 256,
        num_workers: int = 2,
        **options: Any,
    ) -> None:
        if num_classes < 0:
            raise ValueError(
                f"data.num_classes={num_classes} must not be negative; 0 has no labels"
            )
        if not 2 <= num_bins <= 256:
            raise ValueError(f"data.num_bins={num_bins} must lie in [2, 256]")
        self.title = type(train).__name__
        items: ImageDataset = Items("train", train, num_classes, num_bins)
        first = items.image(0)
        self.num_bins = None if first.is_floating_point() else num_bins
        if options.get("flip") and first.ndim != 3:
            raise ValueError(
                f"data.flip=true mirrors images (C, H, W), and items are {items.shape}"
            )
        if test is None:
            items, held_out = hold_out(items, test_size, "test_size")
        else:
            held_out = Items("test", test, num_classes, num_bins, like=first)
        splits = Splits({"train": items, "test": held_out}, (), LoaderOptions("fail", num_workers))
        super().__init__(splits, labelled=False, **options)
        self.num_classes = num_classes
        self.class_names = tuple(map(str, range(num_classes)))

    def scaled(self, pixels: Tensor, index: Tensor, noise: Key | None) -> Tensor:
        return pixels if self.num_bins is None else super().scaled(pixels, index, noise)


class Items(ImageDataset):
    """A torch Dataset that is read item by item; each is checked against the first one of the training set."""

    indexed = ("numbers",)
    labels = None  # they come with the items

    def __init__(
        self, split: str, dataset: Any, num_classes: int, num_bins: int, like: Tensor | None = None
    ) -> None:
        self.name = f"data.{split}={type(dataset).__name__}"
        if isinstance(dataset, IterableDataset) or not len(dataset):
            raise ValueError(
                f"{self.name} must have items, each with a number: at least 1, and 0 to len - 1"
            )
        self.dataset, self.num_classes, self.num_bins = dataset, num_classes, num_bins
        self.numbers, self.like = torch.arange(len(dataset)), like
        self.like = self.image(0)
        self.shape = tuple(self.like.shape)

    def __len__(self) -> int:
        return len(self.numbers)

    def image(self, number: int) -> Tensor:
        return self.item(number)[0]

    def item(self, number: int) -> tuple[Tensor, int]:
        """A tensor and its label.

        Raises:
            BadImage: it cannot be read, or is not like the first one.
        """
        place = int(self.numbers[number])
        try:
            found = self.dataset[place]
            x, y = (*found, None)[:2] if isinstance(found, tuple | list) else (found, None)
            self.check(x, y)
        except Exception as error:  # whatever it is, a worker passes on its message alone
            cause = error if isinstance(error, BadImage) else repr(error)
            raise BadImage(f"{self.name}: item {place}: {cause}") from error
        return x.float() if x.is_floating_point() else x, int(y) if self.num_classes else 0

    def check(self, x: Any, y: Any) -> None:
        """Refuse an item that training cannot take."""
        what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        image = isinstance(x, Tensor) and x.dtype == torch.uint8 and x.ndim == 3
        if not image and not (isinstance(x, Tensor) and x.is_floating_point()):
            raise BadImage(
                f"{what} is neither a tensor of floats nor an image (C, H, W) of bytes; the sets of torchvision give "
                "one with transform=torchvision.transforms.PILToTensor"
            )
        if self.like is not None and (x.shape, image) != (
            self.like.shape,
            self.like.dtype == torch.uint8,
        ):
            raise BadImage(
                f"{what} is unlike the first, {self.like.dtype} {tuple(self.like.shape)}: all must be alike"
            )
        if image and int(x.max()) >= self.num_bins:
            raise BadImage(
                f"the pixel value {int(x.max())} is too large for data.num_bins={self.num_bins}"
            )
        if self.num_classes and (y is None or not 0 <= int(y) < self.num_classes):
            raise BadImage(
                f"the label is {y}, and data.num_classes={self.num_classes}: labels run from 0"
            )

    def read(self, order: Labels, positions: Sequence[int], skip: bool) -> ImageBatch:
        index = order[list(positions)]
        x, y = zip(*(self.item(int(number)) for number in index), strict=True)
        return ImageBatch(torch.stack(x), torch.tensor(y), index)

    def digest(self) -> str:
        """A digest of all numbers, and of a few items spread over the set."""
        probes = self.read(torch.arange(len(self)), spread(len(self), PROBES), False)
        return digest(self.numbers, probes.pixels, probes.y)
