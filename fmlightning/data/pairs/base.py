"""Pairs of a corrupted and a clean image: a flow from the one to the other restores images."""

import hashlib

import torch
from torch import Tensor

from fmlightning.data.module import FlowData, MadeOfImages
from fmlightning.data.order import Batch, EvalBatches
from fmlightning.data.pairs.corruptions import Corruption, Downsampled
from fmlightning.flow.keys import Key


class CorruptedData(MadeOfImages):
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
        super().__init__(images, batch_size, eval_batch_size, seed)
        self.corruption, self.event_shape = corruption, images.event_shape
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

    def train_batch(self, step: int, rows: slice) -> Batch:
        batch = self.images.train_batch(step, rows)
        index = torch.arange(rows.start, rows.stop, device=batch["x1"].device)
        return self.corrupted(batch, self.key.fold("corruption", step), index)

    def eval_samples(self, split: str) -> Batch:
        batch = self.images.eval_samples(split)
        index = torch.arange(len(batch["x1"]), device=batch["x1"].device)
        return self.corrupted(batch, Key(0).fold("corruption", split), index)

    def eval_batches(self, split: str) -> EvalBatches:
        clean, key = self.images.eval_batches(split), Key(0).fold("corruption", split)
        return EvalBatches(len(clean), lambda: (self.corrupted(b, key, b["index"]) for b in clean))

    def corrupted(self, batch: Batch, key: Key, index: Tensor) -> Batch:
        """A batch with its x0; the noise is keyed by the samples' numbers."""
        return {**batch, "x0": self.corruption(batch["x1"], key.streams(index))}
