r"""In what order training sees the data, as a pure function of (seed, step).

The order does not know how many processes there are: step n uses one global batch, and each process takes
its contiguous rows of it. It has no state either: to resume at step n is to ask for step n.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fmlightning.flow.keys import Key

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shard:
    """This process's share: `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1

    def rows(self, batch_size: int) -> slice:
        """The rows of a global batch that belong here."""
        local = batch_size // self.world_size
        return slice(self.rank * local, (self.rank + 1) * local)


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

    def indices(self, step: int) -> Tensor:
        """The samples of a step, (batch_size,)."""
        generator = self.key.fold("epoch", self.epoch(step)).generator()
        start = step % self.steps_per_epoch * self.batch_size
        return torch.randperm(self.size, generator=generator)[start : start + self.batch_size]


def shared_blocks(index: Tensor, batch_size: int, shard: Shard) -> tuple[Tensor, ...]:
    """This process's blocks of a fixed set, smaller than `batch_size` where else a process would have none."""
    size = min(batch_size, -(-len(index) // shard.world_size))
    return index.split(max(size, 1))[shard.rank :: shard.world_size]


class TrainBatches:
    """An endless stream of whole batches, cut into epochs for Lightning.

    Args:
        batch: this process's batch of a step.
        steps_per_epoch: length of an epoch.
        start: the first step, for a resumed run.
    """

    def __init__(self, batch: Callable[[int], Batch], steps_per_epoch: int, start: int = 0) -> None:
        self.batch, self.steps_per_epoch, self.step = batch, steps_per_epoch, start

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
            batch = self.batch(self.step)
            self.step += 1
            yield batch


class EvalBatches:
    """A fixed set in fixed blocks, dealt to the processes in turn: no sample twice, none left out.

    A batch carries `index`, the position of each sample, from which its noise and time are keyed.
    """

    def __init__(self, samples: Batch, batch_size: int, shard: Shard) -> None:
        size = len(samples["x1"])
        self.samples = {**samples, "index": torch.arange(size)}
        self.blocks = shared_blocks(torch.arange(size), batch_size, shard)

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Batch]:
        for block in self.blocks:
            yield {name: value[block] for name, value in self.samples.items()}
