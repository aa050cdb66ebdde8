r"""The interface of every DataModule of the library.

A DataModule states its splits, the shape of a sample and the number of classes before any data is read, and
gives batches `{"x1": (B, *S), "y": (B,)?}` whose order, noise and augmentation are keyed.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from fmlightning.data.order import (
    Batch,
    Epochs,
    EvalBatches,
    Order,
    Shard,
    TrainBatches,
    in_blocks,
    shared_blocks,
)
from fmlightning.data.points import Units
from fmlightning.flow.keys import Key
from fmlightning.flow.labels import LabelOrder, balanced_labels, reference_labels
from fmlightning.flow.shapes import Labels
from fmlightning.flow.sources import PairedSource


class StepBatches(Protocol):
    """Batches by step, each with its x0, until they are closed."""

    def __call__(self, step: int) -> Batch: ...

    def close(self) -> None: ...


class FlowData(LightningDataModule):
    """A data set for a flow.

    Args:
        batch_size: samples in a training step, over all processes.
        eval_batch_size: samples in a block of validation or testing, over all processes.
        seed: of the order and the noise; the command line sets it to `seed_everything`.
    """

    event_shape: tuple[int, ...]
    """The shape of one sample."""

    num_classes: int = 0
    """Number of labels; 0 means none."""

    num_bins: int | None = None
    """Number L of values of a pixel, for images scaled as x = 2 (k + u) / L - 1; None for other data."""

    class_names: tuple[str, ...] = ()

    order: Order | None = None
    """The order of a finite training set; None where a data set has its own way."""

    exhausted: bool = False
    """True where a fixed set holds fewer samples than were asked for, since there are no more."""

    paired: bool = False
    """True where batches bring x0, the point that their x1 is reached from; else the model's source draws it."""

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed = seed
        self.key = Key(seed).fold("data")
        self.start = 0
        self.pool_size = 0
        """Number of held-out samples that are paired with their x0 at a time; 0 pairs none."""
        self.pair: Callable[[Callable[[int], Batch]], StepBatches] | None = None
        """Makes paired batches of a step's batches, where x0 depends on x1."""
        self.pairs: StepBatches | None = None
        self.default_shard = Shard()
        """This process's share where no trainer says so."""
        self.parent: FlowData | None = None
        """The data set that this one is part of."""

    @property
    @abstractmethod
    def splits(self) -> dict[str, str]:
        """Descriptions of train, validation and test."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the training data, for the manifest."""

    @property
    def steps_per_epoch(self) -> int:
        """The batches of an epoch, by default those of `order`."""
        assert self.order is not None
        return self.order.steps_per_epoch

    @abstractmethod
    def train_batch(self, step: int, rows: slice) -> Batch:
        """Rows of the global batch of a training step."""

    @abstractmethod
    def eval_samples(self, split: str) -> Batch:
        """A whole fixed set: "val" or "test", held out, or "reference", which metrics compare with.

        The reference is the training data, or as many fresh samples of a distribution as the test set has.
        """

    def require_fixed_set(self) -> None:
        """Refuse data that is no finite set of fixed points.

        Raises:
            ValueError: training draws samples anew, or changes them at random.
        """
        if getattr(self, "flip", False):
            raise ValueError(
                "data.flip=true mirrors samples at random, and SemidiscreteOT pairs x0 with fixed ones: set it to false"
            )

    def fixed_set(self) -> Batch:
        """All training samples, each as one fixed point."""
        return self.eval_samples("reference")

    def labels(self, index: Tensor, order: LabelOrder = "balanced") -> Tensor | None:
        """The classes to generate for sample numbers, or None without classes; for a given x0, its own."""
        if self.paired:
            y = self.held_out.get("y")
            return None if y is None else y.to(index.device)[index % len(y)]
        if not self.num_classes:
            return None
        if order == "balanced":
            return balanced_labels(index, self.num_classes)
        return reference_labels(index, self.class_counts)

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Samples of the reference in each class; empty without classes, or where samples have those of their x0."""
        if not self.num_classes or self.paired:
            return ()
        return tuple(torch.bincount(self.all_labels(), minlength=self.num_classes).tolist())

    def all_labels(self) -> Labels:
        """The classes of the reference, (N,)."""
        return self.eval_samples("reference")["y"].cpu()

    @cached_property
    def held_out(self) -> Batch:
        """The pairs that sampling starts from, where batches bring x0."""
        return self.eval_samples("test")

    @property
    def source_points(self) -> PairedSource:
        """The x0 that samples start at, where batches bring x0."""
        return PairedSource(self.held_out["x0"])

    # -- what a sample looks like -------------------------------------------------------------------

    @property
    def pixel_data(self) -> "FlowData":
        """The data that metrics and figures compare with: itself, or the images that latents stand for."""
        return self

    def decode(self, x: Tensor) -> Tensor:
        """Generated samples as metrics and figures take them, (B, *pixel_data.event_shape)."""
        return x

    @property
    def units(self) -> Units | None:
        """The units of data that is standardised, which `decode` gives back; None for other data."""
        return None

    def attach_to(self, parent: "FlowData") -> None:
        """Take the batch sizes, the seed and the share of the data set that this one is part of."""
        self.parent, self.seed, self.key = parent, parent.seed, parent.key
        self.batch_size, self.eval_batch_size = parent.batch_size, parent.eval_batch_size
        if self.order is not None:
            self.order = replace(self.order, batch_size=self.batch_size, key=self.key)

    # -- processes and loaders ------------------------------------------------------------------------

    @property
    def shard(self) -> Shard:
        if self.parent is not None:
            return self.parent.shard
        if self.trainer is None:
            return self.default_shard
        return Shard(self.trainer.global_rank, self.trainer.world_size)

    @property
    def device(self) -> torch.device:
        """The device that batches are made on."""
        trainer = (self.parent or self).trainer
        return torch.device("cpu") if trainer is None else trainer.strategy.root_device

    def setup(self, stage: str) -> None:
        """Refuse what the number of processes does not allow, before any stage."""
        self.check(self.shard.world_size)

    def check(self, world_size: int) -> None:
        """Refuse a number of processes that cannot share out a batch."""
        if self.batch_size % world_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} is the global batch and must be a multiple of the "
                f"{world_size} processes"
            )

    def train_dataloader(self) -> TrainBatches:
        """This process's rows of every training batch, from where the run stands."""
        rows = self.shard.rows(self.batch_size)
        epochs = self.epochs

        def batch(number: int) -> Batch:
            return self.train_batch(epochs.place(number), rows)

        if self.pair is not None:
            self.end_pairs()
            self.pairs = self.pair(batch)
        return TrainBatches(self.pairs or batch, self.steps_per_epoch, self.start, epochs.length)

    @property
    def epochs(self) -> Epochs:
        """Which batches of each epoch the trainer takes: all, or as few as it is limited to."""
        trainer: Any = (self.parent or self).trainer
        size, limit = self.steps_per_epoch, 1.0 if trainer is None else trainer.limit_train_batches
        limited = min(limit, size) if isinstance(limit, int) else int(size * limit)
        # with 0 nothing trains, and no batch is asked for
        return Epochs(size, max(1, limited), trainer is not None and trainer.overfit_batches > 0)

    def end_pairs(self) -> None:
        """End the threads that pair batches ahead."""
        if self.pairs is not None:
            self.pairs.close()
        self.pairs = None

    def on_exception(self, exception: BaseException) -> None:
        self.end_pairs()

    def eval_batches(self, split: str) -> EvalBatches:
        """The samples of `eval_samples` in this process's blocks, no sample twice and none left out."""
        samples = self.eval_samples(split)
        return in_blocks(samples, self.eval_blocks(len(samples["x1"])))

    def eval_blocks(self, size: int) -> tuple[Tensor, ...]:
        """The numbers of this process's samples in each block of a fixed set."""
        return shared_blocks(torch.arange(size), self.eval_block, self.shard)

    @property
    def eval_block(self) -> int:
        """Samples in a block: a multiple of those that are paired at a time."""
        if not self.pool_size:
            return self.eval_batch_size
        return max(1, self.eval_batch_size // self.pool_size) * self.pool_size

    def shapes(self, split: str) -> Batch:
        """Tensors of the shapes of `eval_samples`, perhaps without content, for what asks no more."""
        return self.eval_samples(split)

    def preview(self, split: str, size: int) -> Batch:
        """At least `size` of `eval_samples`, spread over the set, or all, for figures."""
        return self.eval_samples(split)

    def val_dataloader(self) -> EvalBatches:
        """The held-out samples of validation, in blocks."""
        return self.eval_batches("val")

    def test_dataloader(self) -> EvalBatches:
        """The held-out samples of testing, in blocks."""
        return self.eval_batches("test")

    def predict_dataloader(self) -> EvalBatches:
        """The blocks of testing, whose indices and labels `predict` generates for."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The number of batches consumed, which is the position in the stream."""
        if self.trainer is None:
            return {}
        # `processed` counts the current batch where callbacks save; `completed` would be one short
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return {"step": progress.processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["step"]


class MadeOfImages(FlowData):
    """Data made of images that lie in another data set: latents of them, or pairs.

    Args:
        images: the images; the batches and the seed are those given here.
        batch_size: as in FlowData, as are the others.

    Raises:
        ValueError: the samples are no images, or are pairs already.
    """

    def __init__(self, images: FlowData, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        if len(images.event_shape) != 3 or images.paired:
            raise ValueError(
                f"data.images={type(images).__name__}: its samples must be images (C, H, W) without an x0"
            )
        images.attach_to(self)
        self.images, self.num_bins = images, images.num_bins
        self.num_classes, self.class_names = images.num_classes, images.class_names

    @property
    def pixel_data(self) -> FlowData:
        return self.images

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.images.trainer = self.trainer

    def teardown(self, stage: str) -> None:
        self.images.teardown(stage)
