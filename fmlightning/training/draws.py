r"""The random numbers of a training step: the source points, the times, the path's own noise, the hidden labels.

Where a step takes few, starting four generators costs more than the numbers. So steps are counted in groups of n, and

    group g: steps n g to n g + n - 1; one tensor of each kind from the key (seed, g), one row of it a step      (1)

n follows from the sizes alone, and is 1 for all but points: the numbers of a step depend on seed and step, and not on
where a run begins, how its steps are taken, or on how many processes.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fmlightning.data.order import steps_per_draw
from fmlightning.flow.keys import Key
from fmlightning.flow.sources import Source


class StepNoise(NamedTuple):
    """The numbers of this process's rows of a batch; those of times are of the whole batch."""

    x0: Tensor | None
    u: Tensor
    eps: Tensor | None
    label: Tensor | None


@dataclass
class Draws:
    """What a training step draws, by step.

    Args:
        key: of training.
        shape: of a global batch, (B, *S).
        rows: this process's rows of it.
        device: where it is drawn.
        source: the law of x0; None where x0 comes with the data.
        gamma: whether the path adds noise of its own.
        labels: whether labels are hidden.
    """

    key: Key
    shape: tuple[int, ...]
    rows: slice
    device: torch.device
    source: Source | None
    gamma: bool
    labels: bool
    drawn: tuple[int, StepNoise] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.together = steps_per_draw(self.shape)

    def __call__(self, step: int) -> StepNoise:
        group, place = divmod(step, self.together)
        if self.drawn is None or self.drawn[0] != group:
            self.drawn = (group, self.group(group))
        x0, u, eps, label = self.drawn[1]
        rows = [None if x is None else x[place] for x in (x0, eps, label)]
        return StepNoise(rows[0], u[place], rows[1], rows[2])

    def group(self, group: int) -> StepNoise:
        """The numbers of a group of steps, equation (1)."""
        n, size, device = self.together, self.shape[0], self.device
        key = self.key.fold(group) if n == 1 else self.key.fold("steps", group)

        def generator(name: str) -> torch.Generator:
            return key.fold(name).generator(device)

        x0 = eps = label = None
        if self.source is not None:
            x0 = self.source.sample((n * size, *self.shape[1:]), generator("x0"))
            x0 = x0.reshape(n, *self.shape)[:, self.rows]
        u = torch.rand(n, size, generator=generator("time"), device=device)
        if self.gamma:
            eps = torch.randn(n, *self.shape, generator=generator("eps"), device=device)
            eps = eps[:, self.rows]
        if self.labels:
            label = torch.rand(n, size, generator=generator("label"), device=device)[:, self.rows]
        return StepNoise(x0, u, eps, label)
