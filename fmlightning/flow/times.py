r"""When to look: the law of training times, and the grids of solvers.

A training law is given by its quantile function, so that one keyed uniform number makes one time:

    t = t_min + (t_max - t_min) quantile(u),  u ~ U(0, 1)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fmlightning.flow.shapes import PerSample


class TimeSampler(ABC):
    """A law on (0, 1), placed on the interval of the path."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Times from uniform numbers: the inverse of the distribution function."""

    def draw(self, u: PerSample, interval: tuple[float, float] = (0.0, 1.0)) -> PerSample:
        """Training times of one batch from independent uniform numbers, (B,)."""
        low, high = interval
        return low + (high - low) * self.quantile(u)


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Every time equally often: the CFM loss as written."""

    def quantile(self, u: Tensor) -> Tensor:
        return u


class TimeGrid(ABC):
    """Where a fixed-step solver stops: a map of [0, 1] to itself that keeps both ends."""

    @abstractmethod
    def warp(self, s: Tensor) -> Tensor:
        """Increasing, with warp(0) = 0 and warp(1) = 1."""

    def points(self, num_steps: int, t0: float, t1: float) -> Tensor:
        """`num_steps + 1` times from t0 to t1 in float64, in either direction.

        The warp belongs to the direction from noise to data, whichever way the grid runs.
        """
        s = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        low, high = min(t0, t1), max(t0, t1)
        grid = low + (high - low) * self.warp(s)
        grid[0], grid[-1] = low, high  # exactly: solvers compare the ends
        return grid if t0 <= t1 else grid.flip(0)


@dataclass(frozen=True)
class UniformGrid(TimeGrid):
    """Equal steps."""

    def warp(self, s: Tensor) -> Tensor:
        return s


@dataclass(frozen=True)
class ShiftedGrid(TimeGrid):
    """Steps moved towards the noise: a noise level n = 1 - t becomes shift n / (1 + (shift - 1) n).

    Source: Esser et al. 2024 (SD3), arXiv:2403.03206, eq. 23.

    Args:
        shift: positive; 1 is the uniform grid, 3 is usual for large images.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift={self.shift} must be positive; 1 leaves the grid uniform")

    def warp(self, s: Tensor) -> Tensor:
        n = 1 - s
        return 1 - self.shift * n / (1 + (self.shift - 1) * n)
