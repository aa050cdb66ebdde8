"""Held-out points: at a time and a source point keyed by each sample's index, the same in every run."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from fmlightning.data.order import Batch, Shard
from fmlightning.flow.keys import Key, KeyedStreams
from fmlightning.flow.objectives.objective import Draw, Recipe


@dataclass(frozen=True)
class HeldOut:
    """What a model is validated and tested on.

    Args:
        recipe: of the run.
        batch_size: of training; pairs are found among as many points.
        shard: this process among all.
    """

    recipe: Recipe
    batch_size: int
    shard: Shard

    def draw(self, batch: Batch, key: Key) -> Draw:
        """This process's part of a block; a block that is paired is gathered, and each process pairs all of it."""
        x1, y, index = batch["x1"], batch.get("y"), batch["index"]
        if self.recipe.coupling.identity or self.shard.world_size == 1:
            return self.of(x1, y, key.streams(index), batch.get("x0"))
        x1, index = gathered(x1), gathered(index)
        y = None if y is None else gathered(y)
        mine = self.shard.rows(len(index))
        draw = self.of(x1, y, key.streams(index)).rows(mine)
        return draw._replace(streams=key.streams(index[mine]))

    def of(
        self, x1: Tensor, y: Tensor | None, streams: KeyedStreams, x0: Tensor | None = None
    ) -> Draw:
        """Points keyed by each sample's index, paired in blocks as large as a training batch unless x0 is given."""
        recipe, shape = self.recipe, x1.shape[1:]
        x0 = recipe.source.sample_keyed(streams, shape) if x0 is None else x0
        if not recipe.coupling.identity:
            i, j = self.pairs(x0, x1, y, int(streams.index[0]))
            x0, x1, y = x0[i], x1[j], None if y is None else y[j]
        low, high = recipe.objective.t_range(recipe.path)
        # one time at least, at which the metrics of a velocity are taken
        numbers = (2, *range(8, 7 + recipe.objective.num_times))
        times = [low + (high - low) * streams.uniform((), stream=n) for n in numbers]
        noise = streams.normal(shape, stream=3) if recipe.path.stochastic else None
        return Draw(x0, x1, torch.stack(times, 1), noise, y, None, streams)

    def pairs(self, x0: Tensor, x1: Tensor, y: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
        """Pairs within each block: what the training pairs are, and never one huge problem."""
        coupling, parts = self.recipe.coupling, []
        size = max(self.batch_size, coupling.ot_batch_size or 1)
        for block in torch.arange(len(x1), device=x1.device).split(size):
            generator = Key(0).fold("coupling", first + int(block[0])).generator()
            labels = None if y is None else y[block]
            i, j = coupling.pairs(x0[block], x1[block], labels, generator)
            parts.append((block[i], block[j]))
        of_x0, of_x1 = zip(*parts, strict=True)
        return torch.cat(of_x0), torch.cat(of_x1)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, which need not have equally many."""
    return torch.cat(gather_all_tensors(rows))
