"""Where a fixed-step solver stops."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fmlightning.flow.paths.schedules import Schedule
from fmlightning.flow.shapes import require_positive


class TimeGrid(ABC):
    """Where a fixed-step solver stops: a map of [0, 1] to itself that keeps both ends."""

    @abstractmethod
    def warp(self, s: Tensor) -> Tensor:
        """Increasing, with warp(0) = 0 and warp(1) = 1."""

    def points(
        self, num_steps: int, t0: float, t1: float, schedule: Schedule | None = None
    ) -> Tensor:
        """`num_steps + 1` times from t0 to t1 in float64, in either direction.

        The warp belongs to the direction from noise to data, whichever way the grid runs.

        Args:
            schedule: the curves of the path, for grids that depend on it; this one does not.
        """
        s = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        low, high = min(t0, t1), max(t0, t1)
        grid = low + (high - low) * self.warp(s)
        grid[0], grid[-1] = low, high  # exactly: solvers compare the ends
        if not bool((grid.diff() > 0).all()) and low < high:
            raise ValueError(
                f"{self} does not increase over {num_steps} steps from {low:g} to {high:g}: take fewer steps, or "
                "milder settings"
            )
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


@dataclass(frozen=True)
class EDMGrid(TimeGrid):
    """EDM's grid: equal steps of sigma^(1 / rho), for the noise level sigma = (1 - t) / t of the linear path.

    t = 1 / (1 + sigma) runs from 1 / (1 + sigma_max) to 1 / (1 + sigma_min), which is stretched to [0, 1] so that
    both ends are kept.
    Source: Karras et al. 2022 (EDM), arXiv:2206.00364, eq. 5.

    Args:
        rho: 1 is equal steps of sigma; the larger, the more steps near the data.
        sigma_min: noise level of the last step.
        sigma_max: noise level of the first step.
    """

    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require_positive(self, "rho", "sigma_min")
        if not self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min} must lie below sigma_max={self.sigma_max}"
            )

    def warp(self, s: Tensor) -> Tensor:
        first, last = (level ** (1 / self.rho) for level in (self.sigma_max, self.sigma_min))
        t = 1 / (1 + (first + s * (last - first)) ** self.rho)
        low, high = 1 / (1 + self.sigma_max), 1 / (1 + self.sigma_min)
        return (t - low) / (high - low)


@dataclass(frozen=True)
class CustomGrid(TimeGrid):
    """A grid of one's own, met exactly with `num_steps` = len(times) - 1 and interpolated linearly otherwise.

    Args:
        times: increasing, from 0 to 1; on a path with a shorter interval they are stretched over it.
    """

    times: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        increasing = all(a < b for a, b in pairwise(self.times))
        if len(self.times) < 2 or self.times[0] != 0 or self.times[-1] != 1 or not increasing:
            raise ValueError(f"times={list(self.times)} must increase from 0 to 1")

    def warp(self, s: Tensor) -> Tensor:
        times = torch.tensor(self.times, dtype=s.dtype, device=s.device)
        place = s * (len(times) - 1)
        left = place.long().clamp(max=len(times) - 2)
        return torch.lerp(times[left], times[left + 1], place - left)
