"""Schedules of the learning rate that know how long training is."""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Decay(LRScheduler):
    """A linear warm-up, then a shape of one's own down to the last step of the run."""

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} must not be negative")
        self.warmup_steps = warmup_steps
        self.total_steps = 0
        super().__init__(optimizer)

    def end_at(self, total_steps: int) -> None:
        """Set the step at which the decay ends: the module passes the run's own."""
        self.total_steps = total_steps

    def factor(self, progress: float) -> float:
        """What multiplies the learning rate after the fraction `progress` of the steps behind the warm-up."""
        return 1.0

    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch
        if step < self.warmup_steps:
            factor = (step + 1) / (self.warmup_steps + 1)
        else:
            length = max(1, self.total_steps - self.warmup_steps)
            factor = self.factor(
                min(1.0, (step - self.warmup_steps) / length) if self.total_steps else 0.0
            )
        return [lr * factor for lr in self.base_lrs]


class Constant(Decay):
    """Warm up, then keep the learning rate."""


class Cosine(Decay):
    """Warm up, then follow half a cosine to zero."""

    def factor(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class LinearDecay(Decay):
    """Warm up, then fall along a line to zero."""

    def factor(self, progress: float) -> float:
        return 1 - progress
