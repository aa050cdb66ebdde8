"""Sets of images, by number: bytes and labels, held whole in memory or read from files as they are asked for."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fmlightning.data.images.decode import BadImage, Decoder
from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import Labels

ON_DEVICE = 4 * 2**30
"""Bytes of the largest set that is kept on the accelerator; CIFAR-10 takes 150 MB, ImageNet at 32 pixels 3.9 GB."""

PROBES = 64


class ImageBatch(NamedTuple):
    """Images of one step."""

    pixels: UInt8[Tensor, "B C H W"]
    y: Labels | None
    index: Labels  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    """The samples that were asked for, from which flips and noise are keyed."""
    bad: tuple[str, ...] = ()
    """Messages about files that could not be read, and were replaced."""


class ImageDataset(ABC):
    """Images of one shape (C, H, W), and their labels where there are any."""

    shape: tuple[int, ...]
    labels: Labels | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, number: int) -> UInt8[Tensor, "C H W"]:
        """One image.

        Raises:
            BadImage: it cannot be read.
        """

    indexed: tuple[str, ...] = ("labels",)
    """Its attributes that have an entry for each image."""

    def subset(self, index: Labels) -> Self:
        part = copy(self)
        for name in self.indexed:
            if (value := getattr(self, name)) is not None:
                setattr(
                    part, name, value[index.numpy() if isinstance(value, np.ndarray) else index]
                )
        return part

    @abstractmethod
    def digest(self) -> str:
        """A digest of pixels and labels, or of as much of them as is read within seconds."""

    def read(self, order: Labels, positions: Sequence[int], skip: bool) -> ImageBatch:
        """The images at some places of an order; in place of a bad one, the next good one of that order.

        Raises:
            BadImage: an image cannot be read and `skip` is false, or there is no good one.
        """
        bad: list[str] = []
        found = [self.next_good(order, position, skip, bad) for position in positions]
        chosen = torch.tensor([number for number, _ in found], dtype=torch.int64)
        pixels = torch.stack([pixels for _, pixels in found])
        y = None if self.labels is None else self.labels[chosen]
        return ImageBatch(pixels, y, order[list(positions)], tuple(bad))

    def next_good(
        self, order: Labels, position: int, skip: bool, bad: list[str]
    ) -> tuple[int, Tensor]:
        for place in range(position, position + len(order)):
            number = int(order[place % len(order)])
            try:
                return number, self.image(number)
            except BadImage as error:
                if not skip:
                    raise
                bad.append(str(error))
        raise BadImage(f"none of the {len(order)} files is a readable image; the last: {bad[-1]}")


class InMemoryImages(ImageDataset):
    """Images held as one tensor of bytes, (N, C, H, W)."""

    indexed = ("pixels", "labels")

    def __init__(self, pixels: UInt8[Tensor, "N C H W"], labels: Labels | None) -> None:
        self.pixels, self.labels = pixels, labels
        _, channels, height, width = pixels.shape
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, number: int) -> Tensor:
        return self.pixels[number]

    def digest(self) -> str:
        return digest(self.pixels, self.labels)

    def on(self, device: torch.device) -> Self:
        """Itself, moved to a device if it is small enough to live there."""
        if self.pixels.device != device and self.pixels.nbytes <= ON_DEVICE:
            self.pixels = self.pixels.to(device)
            self.labels = None if self.labels is None else self.labels.to(device)
        return self

    def read(self, order: Labels, positions: Sequence[int], skip: bool) -> ImageBatch:
        index = order[list(positions)].to(self.pixels.device)
        return ImageBatch(
            self.pixels[index], None if self.labels is None else self.labels[index], index
        )


class ImageFiles(ImageDataset):
    """Image files below a folder, read as they are asked for.

    Args:
        folder: what the names are relative to.
        names: paths of the files.
        labels: their classes, if they have any.
        decoder: how a file becomes pixels.
    """

    indexed = ("names", "labels")

    def __init__(
        self, folder: str, names: Sequence[str], labels: Labels | None, decoder: Decoder
    ) -> None:
        self.folder, self.labels, self.decoder = folder, labels, decoder
        # as one array of bytes: a million Python strings would be copied into every worker
        self.names = np.array([name.encode("utf-8", "surrogateescape") for name in names])
        self.shape = decoder.shape

    def __len__(self) -> int:
        return len(self.names)

    def path(self, number: int) -> str:
        return f"{self.folder}/{self.names[number].decode('utf-8', 'surrogateescape')}"

    def image(self, number: int) -> Tensor:
        path = self.path(number)
        return self.decoder(path, path)

    def digest(self) -> str:
        """A digest of all names and labels, and of the bytes of a few files spread over the set."""
        total = hashlib.sha256(
            f"{self.decoder!r}{self.decoder.background or ''}".encode()
            + b"\0".join(self.names.tolist())
        )
        if self.labels is not None:
            total.update(self.labels.numpy().tobytes())
        for number in spread(len(self), PROBES):
            with open(self.path(number), "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


def digest(*tensors: Tensor | None) -> str:
    """A digest of shapes and contents."""
    total = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            total.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            total.update(tensor.cpu().contiguous().numpy().data)
    return total.hexdigest()


def spread(size: int, count: int) -> list[int]:
    """At most `count` numbers below `size`, both ends among them."""
    return sorted({i * (size - 1) // max(count - 1, 1) for i in range(count)}) if size else []


def hold_out(images: ImageDataset, size: int, option: str) -> tuple[ImageDataset, ImageDataset]:
    """The rest of a set, and `size` images of it; always the same ones, whatever the seed.

    Raises:
        ValueError: there is no image left, or none is held out.
    """
    if not 0 < size < len(images):
        raise ValueError(
            f"data.{option}={size} must lie between 1 and {len(images) - 1}, one less than the images there are"
        )
    order = torch.randperm(len(images), generator=Key(0).fold("held out", option).generator())
    return images.subset(order[size:].sort().values), images.subset(order[:size].sort().values)


def shuffled(images: ImageDataset) -> ImageDataset:
    """A set that lies class after class in one random order: its first images are then as mixed as the whole."""
    generator = Key(0).fold("class after class").generator()
    return images.subset(torch.randperm(len(images), generator=generator))
