"""Means with their error bars."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanWithError(Metric):
    """The mean of values and its standard error, exact over processes."""

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Take values (B,)."""
        values = values.double()
        self.count += len(values)
        self.total += values.sum()
        self.squares += values.square().sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean and its standard error: nan for fewer than two values."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        return mean, (variance / (self.count - 1)).sqrt()
