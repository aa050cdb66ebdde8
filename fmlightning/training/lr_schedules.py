"""Schedules of the learning rate that know how long training is.

paper                                    here
Lipman et al. 2023, 32 x 32 images       LinearDecay(45000), which is PolynomialDecay(45000, power=1)
Tong et al. 2024, CIFAR-10               Constant(5000)
Ma et al. 2024 (SiT)                     none: the rate is constant
Karras et al. 2024 (EDM2)                InverseSquareRoot(warmup_steps, constant_steps=70000)
Loshchilov & Hutter 2017                 Cosine(warmup_steps)
"""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class LRSchedule(LRScheduler):
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step from a checkpoint: the rate, the length and the shape are those of the command line."""
        super().load_state_dict({**state_dict, **{k: vars(self)[k] for k in self.own()}})

    def own(self) -> list[str]:
        """The names of what a schedule is made with."""
        counters = (
            "last_epoch",
            "_step_count",
            "_is_initial",
            "_get_lr_called_within_step",
            "_last_lr",
        )
        return [k for k in vars(self) if k not in ("optimizer", *counters)]

    def factor(self, progress: float) -> float:
        """The factor of the learning rate after the fraction `progress` of the steps behind the warm-up."""
        return 1.0

    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch
        warms = step < self.warmup_steps
        factor = (step + 1) / (self.warmup_steps + 1) if warms else self.factor_at(step)
        return [lr * factor for lr in self.base_lrs]

    def factor_at(self, step: int) -> float:
        """The factor of the learning rate at a step behind the warm-up."""
        length = max(1, self.total_steps - self.warmup_steps)
        return self.factor(
            min(1.0, (step - self.warmup_steps) / length) if self.total_steps else 0.0
        )


class Constant(LRSchedule):
    """Warm up, then keep the learning rate."""


class Cosine(LRSchedule):
    """Warm up, then follow half a cosine to zero."""

    def factor(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class LinearDecay(LRSchedule):
    """Warm up, then fall along a line to zero."""

    def factor(self, progress: float) -> float:
        return 1 - progress


class PolynomialDecay(LRSchedule):
    """Warm up, then fall to a last rate: final + (1 - final) (1 - progress)^power, in parts of the first.

    Args:
        optimizer: whose rate it sets.
        warmup_steps: length of the warm-up.
        power: 1 is a line, more falls faster at first.
        final: the last rate, in parts of the first.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        power: float = 1.0,
        final: float = 0.0,
    ) -> None:
        if not power > 0:
            raise ValueError(f"power={power} must be positive; 1 is a line")
        if not 0 <= final <= 1:
            raise ValueError(f"final={final} is a part of the first rate, in [0, 1]")
        self.power, self.final = power, final
        super().__init__(optimizer, warmup_steps)

    def factor(self, progress: float) -> float:
        return self.final + (1 - self.final) * (1 - progress) ** self.power


class InverseSquareRoot(LRSchedule):
    """Warm up, keep the rate, and from `constant_steps` on let it fall as 1 / sqrt(step); it needs no last step.

    Source: Karras et al. 2024 (EDM2), arXiv:2312.02696, app. B; 70,000 steps are of its presets for 512 x 512.

    Args:
        optimizer: whose rate it sets.
        warmup_steps: length of the warm-up.
        constant_steps: the step from which the rate falls.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, constant_steps: int = 70_000
    ) -> None:
        if constant_steps < 1:
            raise ValueError(f"constant_steps={constant_steps} must be positive")
        self.constant_steps = constant_steps
        super().__init__(optimizer, warmup_steps)

    def factor_at(self, step: int) -> float:
        return 1 / math.sqrt(max(step / self.constant_steps, 1.0))
