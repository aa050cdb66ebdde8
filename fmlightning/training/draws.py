r"""The draws of a training step: source points, times, the path's own noise, dropped labels.

Where a step takes few numbers, starting four generators costs more than the numbers. So steps are counted in groups of
n, and

    group g: steps n g to n g + n - 1; one tensor of each kind from the key (seed, g), one row of it a step      (1)

n follows from the sizes alone, and is 1 for all but points: the numbers of a step depend on seed and step, and not on
where a run begins, how its steps are taken, or on how many processes.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fmlightning.data.order import Batch, steps_per_draw
from fmlightning.flow.keys import Key
from fmlightning.flow.objectives.objective import Draw, Recipe
from fmlightning.flow.sources import Source


@dataclass
class Draws:
    """What a run is trained on, by step.

    Args:
        recipe: of the run.
        key: of training.
        batch_size: of a global batch.
        rows: this process's rows of it.
        num_classes: the label that stands for a dropped one.
        class_dropout_prob: probability of dropping a label.
        keyed: whether the network takes keyed streams.
    """

    recipe: Recipe
    key: Key
    batch_size: int
    rows: slice
    num_classes: int
    class_dropout_prob: float
    keyed: bool
    noises: "Noises | None" = field(default=None, init=False)

    def __call__(self, batch: Batch, step: int) -> Draw:
        """This process's rows of a global batch; x0 is drawn unless it comes with them."""
        x1, x0, y = batch["x1"], batch.get("x0"), batch.get("y")
        if self.noises is None:
            self.noises = self.noises_like(x1, x0, y)
        noise = self.noises(step)
        x0 = noise.x0 if x0 is None else x0
        assert x0 is not None, "x0 comes with the batch"
        dropped = None
        if y is not None and noise.label is not None:
            dropped = noise.label < self.class_dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        streams = None
        if self.keyed or self.recipe.objective.draws:
            index = torch.arange(self.rows.start, self.rows.stop, device=x1.device)
            streams = self.key.fold(step).fold("network").streams(index)
        return Draw(
            x0, x1, self.times(noise.u, x1), noise.eps, y, dropped, streams, self.rows.start
        )

    def times(self, uniform: list[Tensor], x1: Tensor) -> Tensor:
        """Training times, (B, num_times)."""
        if not uniform:
            return x1.new_empty(len(x1), 0)
        return self.recipe.objective.draw_times(self.recipe, uniform)[self.rows]

    def noises_like(self, x1: Tensor, x0: Tensor | None, y: Tensor | None) -> "Noises":
        """The random numbers of a run whose batches look like this one."""
        assert x0 is not None or self.recipe.coupling.identity, "a coupling brings x0 with x1"
        return Noises(
            self.key,
            (self.batch_size, *x1.shape[1:]),
            self.rows,
            x1.device,
            self.recipe.source if x0 is None else None,
            self.recipe.objective.num_times,
            self.recipe.path.stochastic,
            y is not None and self.class_dropout_prob > 0,
        )


class StepNoise(NamedTuple):
    """The numbers of this process's rows of a batch; those of times are of the whole batch."""

    x0: Tensor | None
    u: list[Tensor]
    eps: Tensor | None
    label: Tensor | None


@dataclass
class Noises:
    """The random numbers of each step.

    Args:
        key: of training.
        shape: of a global batch, (B, *S).
        rows: this process's rows of it.
        device: where it is drawn.
        source: the distribution of x0; None where x0 comes with the data.
        num_times: uniform numbers for times.
        stochastic: whether the path adds noise of its own.
        labels: whether labels are dropped.
    """

    key: Key
    shape: tuple[int, ...]
    rows: slice
    device: torch.device
    source: Source | None
    num_times: int
    stochastic: bool
    labels: bool
    drawn: tuple[int, StepNoise] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.steps_per_draw = steps_per_draw(self.shape)

    def __call__(self, step: int) -> StepNoise:
        group, place = divmod(step, self.steps_per_draw)
        if self.drawn is None or self.drawn[0] != group:
            self.drawn = (group, self.group(group))
        x0, u, eps, label = self.drawn[1]
        x0, eps, label = (None if x is None else x[place] for x in (x0, eps, label))
        return StepNoise(x0, [each[place] for each in u], eps, label)

    def group(self, group: int) -> StepNoise:
        """The numbers of a group of steps, equation (1)."""
        n, size, device = self.steps_per_draw, self.shape[0], self.device
        key = self.key.fold(group) if n == 1 else self.key.fold("steps", group)

        def generator(*name: str | int) -> torch.Generator:
            return key.fold(*name).generator(device)

        x0 = eps = label = None
        if self.source is not None:
            x0 = self.source.sample((n * size, *self.shape[1:]), generator("x0"))
            x0 = x0.reshape(n, *self.shape)[:, self.rows]
        u = [
            torch.rand(n, size, generator=generator("time", *[k] * (k > 0)), device=device)
            for k in range(self.num_times)
        ]
        if self.stochastic:
            eps = torch.randn(n, *self.shape, generator=generator("eps"), device=device)
            eps = eps[:, self.rows]
        if self.labels:
            label = torch.rand(n, size, generator=generator("label"), device=device)[:, self.rows]
        return StepNoise(x0, u, eps, label)
