"""Pairs of a corrupted and a clean image: a flow from the one to the other restores images."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fmlightning.data.module import FlowData
from fmlightning.data.order import Batch, Blocks
from fmlightning.data.pairs.corruptions import Corruption, Downsampled
from fmlightning.flow.keys import Key


class CorruptedData(FlowData):
    """Images x1, each with the x0 that a corruption makes of it.

    Batches are `{"x1", "x0", "y"?}`: the model draws no source, and sampling starts from held-out x0.

    Args:
        images: the clean images; the batches and the seed are those given here.
        corruption: Downsampled, Blurred or Noisy.
        batch_size: samples in a training step, over all processes.
        eval_batch_size: samples in a block of validation or testing.
        seed: of the order and the noise; the command line sets it to `seed_everything`.
    """

    paired = True

    def __init__(
        self,
        images: FlowData,
        corruption: Corruption = Downsampled(),  # noqa: B008 - frozen
        batch_size: int = 96,
        eval_batch_size: int = 350,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        if len(images.event_shape) != 3 or images.paired:
            raise ValueError(
                f"data.images={type(images).__name__}: its samples must be images (C, H, W) without an x0"
            )
        images.attach_to(self)
        self.images, self.corruption = images, corruption
        self.event_shape, self.num_bins = images.event_shape, images.num_bins
        self.num_classes, self.class_names = images.num_classes, images.class_names
        corruption.degrade(torch.zeros(1, *self.event_shape))  # refuses sizes that do not fit

    @property
    def splits(self) -> dict[str, str]:
        return {k: f"{words}, each with its {self.corruption}" for k, words in self.images.splits.items()}  # fmt: skip

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.images.fingerprint} {self.corruption}".encode()).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        return self.images.steps_per_epoch

    @property
    def pixel_data(self) -> FlowData:
        return self.images

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.images.trainer = self.trainer

    def teardown(self, stage: str) -> None:
        self.images.teardown(stage)

    def train_batch(self, step: int, rows: slice) -> Batch:
        batch = self.images.train_batch(step, rows)
        index = torch.arange(rows.start, rows.stop, device=batch["x1"].device)
        return self.corrupted(batch, self.key.fold("corruption", step), index)

    def eval_samples(self, split: str) -> Batch:
        batch = self.images.eval_samples(split)
        index = torch.arange(len(batch["x1"]), device=batch["x1"].device)
        return self.corrupted(batch, Key(0).fold("corruption", split), index)

    def eval_batches(self, split: str) -> Blocks:
        return CorruptedBlocks(self, split)

    def corrupted(self, batch: Batch, key: Key, index: Tensor) -> Batch:
        """A batch with its x0; the noise is keyed by the samples' numbers."""
        return {**batch, "x0": self.corruption(batch["x1"], key.streams(index))}


class CorruptedBlocks:
    """Blocks of held-out images, each with its x0."""

    def __init__(self, data: CorruptedData, split: str) -> None:
        self.data, self.key = data, Key(0).fold("corruption", split)
        self.blocks = data.images.eval_batches(split)

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.blocks:
            yield self.data.corrupted(batch, self.key, batch["index"])
