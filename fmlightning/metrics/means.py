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


class BinnedMean(Metric):
    """The mean of weightless values, over all and within each of `bins` bins, exact over processes."""

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.add_state("sums", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, position: Tensor) -> None:
        """Take values (B,) at positions in [0, 1], (B,)."""
        bins = (position * self.bins).long().clamp(0, self.bins - 1)
        self.sums.index_add_(0, bins, values.double())
        self.counts.index_add_(0, bins, torch.ones_like(values, dtype=torch.float64))

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean, and the mean of each bin: nan for an empty one."""
        return self.sums.sum() / self.counts.sum(), self.sums / self.counts
