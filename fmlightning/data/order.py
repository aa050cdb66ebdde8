r"""The order of training data, as a pure function of (seed, step).

The order does not know how many processes there are: step n uses one global batch, and each process takes
its contiguous rows of it. It has no state either: to resume at step n is to ask for step n.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fmlightning.flow.keys import Key

Batch = dict[str, Tensor]

NUMBERS_PER_DRAW = 2**13
"""Numbers that are drawn at once: as many as take longer than to start a generator and to call what shapes them."""


@dataclass(frozen=True)
class Shard:
    """This process's share: `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1

    def rows(self, batch_size: int) -> slice:
        """The rows of a global batch that belong here."""
        start, stop = (r * batch_size // self.world_size for r in (self.rank, self.rank + 1))
        return slice(start, stop)


@dataclass(frozen=True)
class Order:
    """Epochs of keyed permutations, cut into whole batches; the rest of each permutation is left out.

    Args:
        size: number of samples.
        batch_size: global batch, over all processes.
        key: of the permutations.
    """

    size: int
    batch_size: int
    key: Key

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= self.size:
            raise ValueError(
                f"batch_size={self.batch_size} must lie between 1 and the {self.size} training samples"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.size // self.batch_size

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def positions(self, step: int) -> slice:
        """The places of a step's samples in the permutation of its epoch."""
        start = step % self.steps_per_epoch * self.batch_size
        return slice(start, start + self.batch_size)

    def indices(self, step: int) -> Tensor:
        """The samples of a step, (batch_size,)."""
        return self.permutation(self.epoch(step))[self.positions(step)]

    def permutation(self, epoch: int) -> Tensor:
        return permutation(self.size, self.key.fold("epoch", epoch))


@dataclass(frozen=True)
class Epochs:
    """The steps of the data that a run takes, where its epochs may be shorter.

    Args:
        size: steps of the data in an epoch.
        length: those that are taken of each, the first ones.
        repeated: whether they are taken of the first epoch every time, as for overfitting.
    """

    size: int
    length: int
    repeated: bool = False

    def place(self, number: int) -> int:
        """The step of the data that a run's batch is of."""
        if self.length == self.size and not self.repeated:
            return number
        epoch, position = divmod(number, self.length)
        return position if self.repeated else epoch * self.size + position

    def after(self, place: int) -> int:
        """The step of the data that is taken after another."""
        epoch, position = divmod(place, self.size)
        return self.place(epoch * self.length + position + 1)


@lru_cache(maxsize=2)  # of a million samples it takes as long as a training step
def permutation(size: int, key: Key) -> Tensor:
    return torch.randperm(size, generator=key.generator())


def steps_per_draw(shape: Sequence[int]) -> int:
    """Number of steps whose random numbers are drawn at once, by the shape of a global batch; 1 for images."""
    return max(1, NUMBERS_PER_DRAW // math.prod(shape))


def shared_blocks(index: Tensor, batch_size: int, shard: Shard) -> tuple[Tensor, ...]:
    """This process's rows of each block of a fixed set: as many blocks everywhere, and rows in each.

    Raises:
        ValueError: there are fewer samples than processes.
    """
    if len(index) < shard.world_size:
        raise ValueError(
            f"trainer.devices: {shard.world_size} processes have only {len(index)} held-out samples to share; use "
            "fewer processes or a larger set"
        )
    blocks = list(index.split(batch_size))
    if len(blocks[-1]) < shard.world_size:  # then there is a block before it
        blocks[-2:] = [torch.cat(blocks[-2:])]
    return tuple(block[shard.rows(len(block))] for block in blocks)


class TrainBatches:
    """An endless stream of whole batches, cut into epochs for Lightning.

    Args:
        batch: this process's batch of a step.
        steps_per_epoch: length of an epoch.
        start: the first step, for a resumed run.
        limit: the batches of an epoch that are given; None for all.
    """

    def __init__(
        self,
        batch: Callable[[int], Batch],
        steps_per_epoch: int,
        start: int = 0,
        limit: int | None = None,
    ) -> None:
        self.batch, self.steps_per_epoch, self.step = batch, steps_per_epoch, start
        self.limit = limit or steps_per_epoch

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.step % self.limit, self.limit):
            batch = self.batch(self.step)
            self.step += 1
            yield batch


@dataclass(frozen=True)
class EvalBatches:
    """A fixed set in blocks that are made as they are asked for, as often as they are.

    A batch carries `index`, the position of each sample, from which its noise and time are keyed.

    Args:
        size: how many blocks.
        batches: all of them.
    """

    size: int
    batches: Callable[[], Iterator[Batch]]

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()


def in_blocks(samples: Batch, blocks: Sequence[Tensor]) -> EvalBatches:
    """Samples that are all in memory, by the numbers of each block."""

    def batches() -> Iterator[Batch]:
        for block in blocks:
            yield {name: value[block] for name, value in samples.items()} | {"index": block}

    return EvalBatches(len(blocks), batches)
