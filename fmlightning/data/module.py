r"""What every DataModule of the library has in common.

A DataModule states its splits, the shape of a sample and the number of classes before any data is read, and
gives batches `{"x1": (B, *S), "y": (B,)?}` whose order, noise and augmentation are keyed.
"""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor

from fmlightning.data.order import Batch, EvalBatches, Shard, TrainBatches
from fmlightning.flow.keys import Key


class FlowData(LightningDataModule):
    """A data set for a flow.

    Args:
        batch_size: samples in a training step, over all processes.
        eval_batch_size: samples in a block of validation or testing.
        seed: of the order and the noise; the command line sets it to `seed_everything`.
    """

    event_shape: tuple[int, ...]
    """The shape of one sample."""

    num_classes: int = 0
    """How many labels there are; 0 means none."""

    levels: int | None = None
    """Number L of grey levels of images scaled as x = 2 (k + u) / L - 1; None for other data."""

    class_names: tuple[str, ...] = ()

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed = seed
        self.key = Key(seed).fold("data")
        self.start = 0

    @property
    @abstractmethod
    def splits(self) -> dict[str, str]:
        """What train, validation and test are, in words."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the training data, for the manifest."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int: ...

    @abstractmethod
    def train_batch(self, step: int, rows: slice) -> Batch:
        """Rows of the global batch of a training step."""

    @abstractmethod
    def eval_samples(self, split: str) -> Batch:
        """A whole fixed set: "val" or "test", held out, or "reference", which judges compare with.

        The reference is the training data, or as many fresh samples of a law as the test set has.
        """

    def labels(self, index: Tensor) -> Tensor | None:
        """The classes to generate for sample numbers: each in turn, or None without classes."""
        return index % self.num_classes if self.num_classes else None

    @property
    def shard(self) -> Shard:
        if self.trainer is None:
            return Shard()
        return Shard(self.trainer.global_rank, self.trainer.world_size)

    def setup(self, stage: str) -> None:
        world_size = self.shard.world_size
        if self.batch_size % world_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} is the global batch and must be a multiple of the "
                f"{world_size} processes"
            )

    def train_dataloader(self) -> TrainBatches:
        rows = self.shard.rows(self.batch_size)
        return TrainBatches(lambda n: self.train_batch(n, rows), self.steps_per_epoch, self.start)

    def val_dataloader(self) -> EvalBatches:
        return EvalBatches(self.eval_samples("val"), self.eval_batch_size, self.shard)

    def test_dataloader(self) -> EvalBatches:
        return EvalBatches(self.eval_samples("test"), self.eval_batch_size, self.shard)

    def predict_dataloader(self) -> EvalBatches:
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
