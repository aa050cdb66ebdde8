r"""Images as points of a flow: what all image data sets have in common.

An image of bytes k becomes x = 2 (k + u) / 256 - 1, (C, H, W) in [-1, 1], mirrored or not. The noise u and the
mirroring are keyed by epoch and sample: they do not depend on the batch, the process or the device.
"""

import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fmlightning.data.images.datasets import (
    ImageBatch,
    ImageDataset,
    InMemoryImages,
    hold_out,
    spread,
)
from fmlightning.data.images.prefetch import FixedReader, ReadAhead, TrainReader, one_more
from fmlightning.data.module import FlowData
from fmlightning.data.order import Batch, Epochs, EvalBatches, Order
from fmlightning.flow.keys import Key
from fmlightning.flow.pixels import dequantise
from fmlightning.flow.shapes import Labels

NUM_BINS = 256
NAMED = 10

OnCorrupt = Literal["fail", "skip"]


@dataclass(frozen=True)
class LoaderOptions:
    """Options of reading images that are not held in memory.

    Args:
        on_corrupt: what to do about a file that is no image: `fail` names it and stops; `skip` names it and takes
            the next good image of the epoch's order in its place.
        num_workers: processes that read ahead; the batches do not depend on it. 0 reads in the training process.
        in_memory: whether to read all images at the start and hold them as bytes.
    """

    on_corrupt: OnCorrupt = "fail"
    num_workers: int = 2
    in_memory: bool = False

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers} must not be negative")

    @property
    def skip(self) -> bool:
        return self.on_corrupt == "skip"


@dataclass(frozen=True)
class Splits:
    """Images with their splits.

    Args:
        sets: the images for `train` and `test`, and for `val` if it has images of its own.
        names: the classes, empty without labels.
        reading: how images that are not held in memory are read.
    """

    sets: dict[str, ImageDataset]
    names: tuple[str, ...] = ()
    reading: LoaderOptions = LoaderOptions()


class ImageData(FlowData):
    """A collection of images as training data.

    Args:
        collection: the images.
        batch_size: samples in a training step, over all processes.
        labelled: whether batches carry the class y.
        flip: whether training mirrors every image left to right with probability one half, keyed.
        dequantise: whether training adds u ~ U(0, 1) to the 256 pixel values k; if not, pixels stand at the middle of
            their bin, u = 1/2. Held-out images always have it, so that bits per dimension mean something.
        val_size: images taken from the training set for validation, the same for every seed; 0 trains on all and
            validates on the test set.
        eval_batch_size: samples in a block of validation or testing.
        seed: of the order, the noise and the flips; the command line sets it to `seed_everything`.
    """

    num_bins: int | None = NUM_BINS
    samples = "images"
    """The name of its samples."""

    def __init__(
        self,
        collection: Splits,
        batch_size: int = 128,
        labelled: bool = True,
        flip: bool = False,
        dequantise: bool = True,
        val_size: int = 0,
        eval_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        self.flip, self.dequantise = flip, dequantise
        sets, names, self.reading = collection.sets, collection.names, collection.reading
        self.ahead: tuple[tuple[slice, Epochs], ReadAhead] | None = None
        self.bad: set[str] = set()
        self.sets = dict(sets)
        if val_size:
            self.sets["train"], self.sets["val"] = hold_out(sets["train"], val_size, "val_size")
        if self.reading.in_memory:
            self.sets = {name: self.hold(images) for name, images in self.sets.items()}
        self.sets.setdefault("val", self.sets["test"])
        self.class_names = names if labelled else ()
        if labelled:
            self.check_labels(len(names))
        self.num_classes = len(self.class_names)
        self.event_shape = self.sets["train"].shape
        self.order: Order = Order(len(self.sets["train"]), batch_size, self.key)

    def check_labels(self, classes: int) -> None:
        for name, images in self.sets.items():
            if images.labels is None:
                raise ValueError(
                    f"data.labelled=true: {self.title} has no labels for {name}; set data.labelled=false"
                )
            low, high = int(images.labels.min()), int(images.labels.max())
            if low < 0:
                raise ValueError(
                    f"data.labelled=true: {self.title} has images without a label in {name}, marked {low}; set "
                    "data.labelled=false, or take another split for it"
                )
            if high >= classes:
                raise ValueError(
                    f"{self.title}: the labels of {name} run from {low} to {high}, and there are {classes} classes; "
                    "its files are of another data set, or damaged"
                )

    @property
    @abstractmethod
    def title(self) -> str:
        """The name of the data set."""

    @property
    def splits(self) -> dict[str, str]:
        words = {n: f"{len(self.sets[n])} {self.samples}" for n in ("train", "val", "test")}
        words["train"] += f" of {self.title}"
        if self.sets["val"] is self.sets["test"]:
            words["val"] = f"the test {self.samples}: data.val_size=0 holds out none for validation"
        return words

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.sets["train"].digest().encode()).hexdigest()

    # -- training -------------------------------------------------------------------------------

    def train_batch(self, step: int, rows: slice) -> Batch:
        block = self.warn_corrupt(self.train_reader(rows)(step))
        epoch = self.order.epoch(step)
        noise = self.key.fold("dequantise", epoch) if self.dequantise else None
        return self.points(block, noise, self.key.fold("flip", epoch) if self.flip else None)

    def train_reader(self, rows: slice) -> Callable[[int], ImageBatch]:
        images = self.sets["train"]
        if isinstance(images, InMemoryImages):
            return TrainReader(images.on(self.device), self.order, rows, False).read
        now = rows, self.epochs
        if self.ahead is None or self.ahead[0] != now:
            reader = TrainReader(images, self.order, rows, self.reading.skip)
            self.ahead = now, self.read_ahead(reader, after=self.epochs.after)
        return self.ahead[1]

    def read_ahead(
        self,
        reader: TrainReader | FixedReader,
        end: int | None = None,
        after: Callable[[int], int] = one_more,
    ) -> ReadAhead:
        pin = self.device.type == "cuda"
        return ReadAhead(reader, self.reading.num_workers, end, pin, after)

    def teardown(self, stage: str) -> None:
        self.ahead = None  # its workers end

    # -- held-out images ------------------------------------------------------------------------

    def eval_batches(self, split: str) -> EvalBatches:
        return self.fixed(split, self.eval_blocks(len(self.split(split))))

    def fixed(self, split: str, blocks: tuple[Tensor, ...]) -> EvalBatches:
        """Some blocks of a fixed set."""

        def batches() -> Iterator[Batch]:
            read, noise = self.fixed_reader(split, blocks), Key(0).fold("dequantise", split)
            for number in range(len(blocks)):
                block = self.warn_corrupt(read(number))
                yield self.points(block, noise) | {"index": block.index.to(self.device)}

        return EvalBatches(len(blocks), batches)

    def eval_samples(self, split: str) -> Batch:
        return self.collect(split, torch.arange(len(self.split(split))))

    def shapes(self, split: str) -> Batch:
        size = len(self.split(split))
        x1 = torch.empty(size, *self.event_shape, device="meta")
        y = torch.empty(size, dtype=torch.int64, device="meta")
        return {"x1": x1, "y": y} if self.num_classes else {"x1": x1}

    def preview(self, split: str, size: int) -> Batch:
        return self.collect(split, torch.tensor(spread(len(self.split(split)), size)))

    def collect(self, split: str, index: Tensor) -> Batch:
        """Some images of a fixed set, on the CPU."""
        blocks = self.fixed(split, index.split(self.eval_batch_size))
        parts = [{name: value.cpu() for name, value in batch.items()} for batch in blocks]
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0] if name != "index"}

    def all_labels(self) -> Labels:
        labels = self.split("reference").labels
        assert labels is not None
        return labels.cpu()

    def split(self, name: str) -> ImageDataset:
        return self.sets["train" if name == "reference" else name]

    def fixed_reader(self, split: str, blocks: tuple[Tensor, ...]) -> Callable[[int], ImageBatch]:
        images = self.split(split)
        if isinstance(images, InMemoryImages):
            return FixedReader(images.on(self.device), blocks, False).read
        reader = FixedReader(images, blocks, self.reading.skip)
        return self.read_ahead(reader, len(blocks))

    def hold(self, images: ImageDataset) -> InMemoryImages:
        """The same images in memory; in place of a bad one, the next good one."""
        blocks = torch.arange(len(images)).split(64)
        read = self.read_ahead(FixedReader(images, blocks, self.reading.skip), len(blocks))
        parts = [self.warn_corrupt(read(number)) for number in range(len(blocks))]
        labels = [part.y for part in parts if part.y is not None]
        return InMemoryImages(
            torch.cat([p.pixels for p in parts]), torch.cat(labels) if labels else None
        )

    # -- from bytes to points -----------------------------------------------------------------------

    def points(self, block: ImageBatch, noise: Key | None, flip: Key | None = None) -> Batch:
        """The images of a block on the device, scaled, and mirrored by `flip`."""
        index = block.index.to(self.device)
        pixels = block.pixels.to(self.device, non_blocking=True)
        if flip is not None:
            mirrored = (flip.streams(index).bits(1) & 1 == 1)[:, :, None, None]
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        batch = {"x1": self.scaled(pixels, index, noise)}
        if self.num_classes and block.y is not None:
            batch["y"] = block.y.to(self.device)
        return batch

    def scaled(self, pixels: Tensor, index: Tensor, noise: Key | None) -> Tensor:
        """Pixel values as points of [-1, 1], each at a place in its bin that `noise` draws, or in the middle."""
        if noise is None:
            u = torch.full(pixels.shape, 0.5, device=self.device)
        else:
            # in float32 a larger u would carry k + u to the next bin
            u = noise.streams(index).uniform(self.event_shape).clamp_(max=1 - 2.0**-16)
        assert self.num_bins is not None
        return dequantise(pixels, u, self.num_bins)

    def warn_corrupt(self, block: ImageBatch) -> ImageBatch:
        """Name each bad file once, the first few at least, and count them."""
        for name in block.bad:
            if name not in self.bad:
                self.bad.add(name)
                n = len(self.bad)
                if n <= NAMED or n & (n - 1) == 0:
                    warnings.warn(f"{name}; skipped, {n} so far", stacklevel=1)
        return block
