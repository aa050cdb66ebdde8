"""The noise that a stochastic sampler adds: g^2 as a function of time, chosen without knowing the path."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from fmlightning.flow.paths.schedules import T_EPS, Schedule
from fmlightning.flow.shapes import Times, require_interval


class Diffusion(ABC):
    """The noise of a sampler: g^2 at a time of a path, in the range of times where it acts."""

    t_range: tuple[float, float] = (0.0, 1.0)

    @abstractmethod
    def squared(self, t: Times, path: Schedule) -> Times:
        """g^2."""

    def at(self, t: float, path: Schedule) -> float:
        """g^2 at one time.

        Raises:
            ValueError: it is negative or not finite.
        """
        value = float(self.squared(torch.tensor(t, dtype=torch.float64), path))
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{self} has g^2 = {value:g} at t={t:g}, as at the singular end of a path. Give a t_range without "
                f"that time, for example ({T_EPS:g}, {1 - T_EPS:g}), or use LinearDiffusion()."
            )
        return value


@dataclass(frozen=True)
class LinearDiffusion(Diffusion):
    """g^2 = 2 scale (1 - t).

    Args:
        scale: 1 is the default strength; 0 gives the ODE.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_strength("scale", self.scale)

    def squared(self, t: Times, path: Schedule) -> Times:
        return 2 * self.scale * (1 - t)


@dataclass(frozen=True)
class SigmaDiffusion(Diffusion):
    """g^2 = 2 scale std(t), proportional to the noise that is left on the path.

    Args:
        scale: 1 gives `LinearDiffusion` on the linear path; 0 gives the ODE.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_strength("scale", self.scale)

    def squared(self, t: Times, path: Schedule) -> Times:
        return 2 * self.scale * path.std(t)


@dataclass(frozen=True)
class ConstantDiffusion(Diffusion):
    """A constant g on a range of times.

    Args:
        g: the coefficient of dW.
        t_range: where the noise acts; it must end before t = 1, where the score is too steep for any step.
    """

    g: float
    t_range: tuple[float, float]

    def __post_init__(self) -> None:
        require_strength("g", self.g)
        require_interval(self.t_range)
        if not self.t_range[1] < 1:
            raise ValueError(
                f"a constant g on {self.t_range} is biased however many steps are taken: g^2 has to vanish like "
                "1 - t at the data end. End t_range before t = 1, for example (0, 0.95), or use LinearDiffusion()."
            )

    def squared(self, t: Times, path: Schedule) -> Times:
        return torch.full_like(t, self.g**2)


@dataclass(frozen=True)
class PathDiffusion(Diffusion):
    """The diffusion whose time reversal is the path: g^2 / 2 = (alpha' / alpha) V - V' / 2.

    Args:
        t_range: where the noise acts; the singular end of the path, usually t = 0, must lie outside.
    """

    t_range: tuple[float, float]

    def __post_init__(self) -> None:
        require_interval(self.t_range)

    def squared(self, t: Times, path: Schedule) -> Times:
        return 2 * (path.d_alpha(t) / path.alpha(t) * path.variance(t) - path.half_d_variance(t))


def require_strength(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be finite and not negative; 0 gives the ODE")
