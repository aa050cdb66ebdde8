"""The handwritten digits that come with scikit-learn: real images, and no download."""

import hashlib
from typing import cast

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fmlightning.data.module import FlowData
from fmlightning.data.order import Batch, Order
from fmlightning.flow.keys import Key
from fmlightning.flow.pixels import dequantise

NUM_BINS = 17
VAL, TEST = 150, 350


class DigitsData(FlowData):
    """1,797 digits of 8 x 8 pixels with 17 pixel values, in ten classes.

    One fixed permutation splits them into 1,297 for training, 150 for validation and 350 for testing; it does
    not depend on the seed. Pixels are dequantised and scaled, x = 2 (k + u) / 17 - 1 with u ~ U(0, 1) keyed
    by epoch and sample.

    Source: Alpaydin and Kaynak 1998, UCI Machine Learning Repository.

    Args:
        batch_size: samples in a training step, over all processes.
        labelled: whether batches carry the class y.
        eval_batch_size: samples in a block of validation or testing.
        seed: of the order and the dequantisation; the command line sets it to `seed_everything`.
    """

    event_shape = (1, 8, 8)
    num_bins = NUM_BINS

    def __init__(
        self, batch_size: int = 96, labelled: bool = True, eval_batch_size: int = 350, seed: int = 0
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        self.num_classes = 10 if labelled else 0
        self.class_names = tuple("0123456789") if labelled else ()
        images, labels = digits()
        train = len(labels) - VAL - TEST
        ends = {
            "train": (0, train),
            "val": (train, train + VAL),
            "test": (train + VAL, len(labels)),
        }
        self.images = {name: images[a:b] for name, (a, b) in ends.items()}
        self.targets = {name: labels[a:b] for name, (a, b) in ends.items()}
        self.order: Order = Order(train, batch_size, self.key)
        self.whole_epoch: tuple[Key, Batch] | None = None

    @property
    def splits(self) -> dict[str, str]:
        return {name: f"{len(y)} digits of a fixed split" for name, y in self.targets.items()}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.images["train"].numpy().tobytes()).hexdigest()

    def train_batch(self, step: int, rows: slice) -> Batch:
        epoch, place = self.order.epoch(step), self.order.positions(step)
        key = self.key.fold("dequantise", epoch)
        if self.whole_epoch is None or self.whole_epoch[0] != key:
            # at once, and in its order: the arithmetic of its noise is then a fifth as slow
            self.whole_epoch = key, self.batch("train", self.order.permutation(epoch), key)
        return {name: value[place][rows].clone() for name, value in self.whole_epoch[1].items()}

    def eval_samples(self, split: str) -> Batch:
        split = "train" if split == "reference" else split
        index = torch.arange(len(self.targets[split]))
        return self.batch(split, index, Key(0).fold("dequantise", split))

    def batch(self, split: str, index: Tensor, key: Key) -> Batch:
        pixels = self.images[split][index]
        x1 = dequantise(pixels, key.streams(index).uniform(self.event_shape), NUM_BINS)
        return {"x1": x1, "y": self.targets[split][index]} if self.num_classes else {"x1": x1}


def digits() -> tuple[Tensor, Tensor]:
    """All images, (1797, 1, 8, 8) of 0 to 16, and their labels, in the order of the split."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=Key(0).fold("digits").generator())
    images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    return images[order], cast(Tensor, torch.from_numpy(bunch.target)).long()[order]
