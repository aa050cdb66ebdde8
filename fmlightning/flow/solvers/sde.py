r"""Stochastic sampling.

    dX = f(X, t) dt + g(t) dW                                                       (1)

is solved by Euler-Maruyama or, to second order in law, by stochastic Heun. For any g(t) >= 0 the choice

    f = v + (g^2 / 2) grad log p_t                                                  (2)

gives X_t the marginals p_t of the flow dx/dt = v; g = 0 is the flow itself. The score follows from v only if the
source is Gaussian and independent of the data. It grows like 1 / sigma at the data end, so g^2 has to vanish there
like 1 - t: a g that does not carries a bias that many steps remove slowly, and is given an interval to act on.
Outside that interval, and in the last step, g = 0: by (2) the law stays right.

The noise of step n is stream n of those handed in: it depends on (key, sample index, n) and on nothing else.

Source: Song et al. 2021, arXiv:2011.13456; Ma et al. 2024 (SiT), arXiv:2401.08740, sec. 2.4.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.models import at, noise_to_score, require_score
from fmlightning.flow.paths.predictions import to_endpoints
from fmlightning.flow.paths.schedules import T_EPS, Schedule
from fmlightning.flow.shapes import Field, Points, Times, require_interval
from fmlightning.flow.solvers.ode import (
    NFECounter,
    Solution,
    require_ends,
    require_finite,
    saved_times,
)
from fmlightning.flow.solvers.runge_kutta import Step, walk
from fmlightning.flow.solvers.time_grids import TimeGrid, UniformGrid
from fmlightning.flow.sources import Source

Method = Literal["euler_maruyama", "stochastic_heun"]
METHODS: tuple[str, ...] = get_args(Method)


class Diffusion(ABC):
    """How much noise a sampler adds: g^2 as a function of time, on the interval where it acts."""

    interval: tuple[float, float] = (0.0, 1.0)

    @abstractmethod
    def squared(self, t: Times) -> Times:
        """g^2."""

    def at(self, t: float) -> float:
        value = float(self.squared(torch.tensor(t, dtype=torch.float64)))
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{self} has g^2 = {value:g} at t={t:g}, as at the singular end of a path. Name an interval without "
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

    def squared(self, t: Times) -> Times:
        return 2 * self.scale * (1 - t)


@dataclass(frozen=True)
class SigmaDiffusion(Diffusion):
    """g^2 = 2 scale std(t), proportional to the noise that is left on the path.

    Args:
        schedule: the curves of the path.
        scale: 1 gives `LinearDiffusion` on the linear path; 0 gives the ODE.
    """

    schedule: Schedule
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_strength("scale", self.scale)

    def squared(self, t: Times) -> Times:
        return 2 * self.scale * self.schedule.std(t)


@dataclass(frozen=True)
class Constant(Diffusion):
    """A constant g on a named interval.

    Args:
        g: the coefficient of dW.
        interval: where the noise acts; it must end before t = 1, where the score is too steep for any step.
    """

    g: float
    interval: tuple[float, float]

    def __post_init__(self) -> None:
        require_strength("g", self.g)
        require_interval(self.interval)
        if not self.interval[1] < 1:
            raise ValueError(
                f"a constant g on {self.interval} is biased however many steps are taken: g^2 has to vanish like "
                "1 - t at the data end. End the interval before t = 1, for example (0, 0.95), or use LinearDiffusion()."
            )

    def squared(self, t: Times) -> Times:
        return torch.full_like(t, self.g**2)


@dataclass(frozen=True)
class PathDiffusion(Diffusion):
    """The diffusion whose time reversal is the path: g^2 / 2 = (alpha' / alpha) V - V' / 2.

    Args:
        schedule: the curves of the path.
        interval: where the noise acts; the singular end of the path, usually t = 0, must lie outside.
    """

    schedule: Schedule
    interval: tuple[float, float]

    def __post_init__(self) -> None:
        require_interval(self.interval)
        for t in self.interval:
            self.at(t)

    def squared(self, t: Times) -> Times:
        s = self.schedule
        return 2 * (s.d_alpha(t) / s.alpha(t) * s.variance(t) - s.half_d_variance(t))


@runtime_checkable
class SDE(Protocol):
    """Equation (1), as a solver sees it; `drift` calls the field once."""

    def drift(self, field: Field, x: Points, t: Tensor, g2: float) -> Points:
        """f at (x, t), where g^2 is `g2`."""

    def noise(self, t0: float, t1: float, last: bool) -> tuple[float, float]:
        """g^2 at both ends of a step."""


@dataclass(frozen=True)
class Ito:
    """dX = f dt + g dW as written, with noise in every step.

    Args:
        g: the coefficient of dW at a time.
    """

    g: Callable[[float], float]

    def drift(self, field: Field, x: Points, t: Tensor, g2: float) -> Points:
        return field(x, t)

    def noise(self, t0: float, t1: float, last: bool) -> tuple[float, float]:
        return self.g(t0) ** 2, self.g(t1) ** 2


@dataclass(frozen=True)
class MarginalPreservingSDE:
    """The SDE with the marginals of a flow, equation (2).

    Args:
        schedule: the curves of the path the flow was trained on.
        source: the law of x0; Gaussian.
        independent: whether the coupling drew x0 independently of x1.
        diffusion: how much noise to add.

    Raises:
        ValueError: the score of this source or coupling is unknown.
    """

    schedule: Schedule
    source: Source
    independent: bool
    diffusion: Diffusion = field(default_factory=LinearDiffusion)

    def __post_init__(self) -> None:
        require_score(self.source, self.independent)

    def drift(self, field: Field, x: Points, t: Tensor, g2: float) -> Points:
        v = field(x, t)
        return v + (g2 / 2) * score(v, x, t, self.schedule) if g2 else v

    def noise(self, t0: float, t1: float, last: bool) -> tuple[float, float]:
        low, high = self.diffusion.interval
        if last or t0 < low or t1 > high:
            return 0.0, 0.0
        return self.diffusion.at(t0), self.diffusion.at(t1)


def score(v: Points, x: Points, t: Times, schedule: Schedule) -> Points:
    """grad log p_t(x) from the velocity at x, for a Gaussian source independent of the data.

    Raises:
        ValueError: the score does not exist at t.
    """
    return noise_to_score(to_endpoints("velocity", v, x, t, schedule).x0, t, schedule)


@dataclass(frozen=True)
class SDESolver:
    """A stochastic method and its settings.

    Args:
        method: euler_maruyama calls the field once a step and has weak order 1; stochastic_heun, twice and 2.
        num_steps: intervals.
        grid: where it stops.
    """

    method: Method = "stochastic_heun"
    num_steps: int = 250
    grid: TimeGrid = field(default_factory=UniformGrid)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}"
            )
        if not self.num_steps > 0:
            raise ValueError(f"num_steps={self.num_steps} must be positive")

    def solve(
        self,
        sde: SDE,
        field: Field,
        x: Points,
        streams: KeyedStreams,
        t0: float = 0.0,
        t1: float = 1.0,
        save_at: int | Sequence[float] = 0,
    ) -> Solution:
        """Carry x from t0 to t1.

            sde = MarginalPreservingSDE(path, Gaussian(), independent=True)
            SDESolver().solve(sde, velocity, x, key.streams(index))

        Args:
            sde: what to solve.
            field: the velocity of the flow, or the drift f of `Ito`.
            x: the state at t0, (B, *S).
            streams: keyed streams of the samples; keep them apart from those that drew x.
            t0: start.
            t1: end, later than t0.
            save_at: states to return, as in `ODESolver.solve`; linear between steps.

        Raises:
            SolverError: the state is not finite.
            ValueError: the streams do not match x, or the interval is empty or descending.
        """
        require_ends(field, t0, t1)
        if not t0 < t1:
            raise ValueError(f"an SDE runs forwards, but t0={t0:g} is not before t1={t1:g}")
        if len(streams.index) != len(x):
            raise ValueError(f"{len(streams.index)} streams of noise do not match {len(x)} samples")
        times, counted = saved_times(save_at, t0, t1), NFECounter(field)
        step = (euler_maruyama if self.method == "euler_maruyama" else stochastic_heun)(
            sde, counted, streams, t1
        )
        walked = walk(step, x, self.grid.points(self.num_steps, t0, t1).tolist(), times.tolist())
        require_finite(self.method, walked.x, walked.lost_at, counted.nfe)
        return Solution(walked.x, counted.nfe, times.to(x.device), walked.states)


def euler_maruyama(sde: SDE, field: Field, streams: KeyedStreams, end: float) -> Step:
    """x' = x + h f + g sqrt(h) z, with f and g at the start of the step."""
    index = count()

    def step(x: Tensor, t0: float, t1: float) -> Tensor:
        h, (g2, _) = t1 - t0, sde.noise(t0, t1, t1 == end)
        f = sde.drift(field, x, at(t0, x), g2)
        return x + h * f + brownian_increment(x, streams, next(index), g2 * h)

    return step


def stochastic_heun(sde: SDE, field: Field, streams: KeyedStreams, end: float) -> Step:
    """x' = x + h (f + f_hat) / 2 + dW, with f_hat at the end of an Euler-Maruyama step along the same dW."""
    index = count()

    def step(x: Tensor, t0: float, t1: float) -> Tensor:
        h, (start, stop) = t1 - t0, sde.noise(t0, t1, t1 == end)
        dw = brownian_increment(x, streams, next(index), (start + stop) / 2 * h)
        f = sde.drift(field, x, at(t0, x), start)
        f_hat = sde.drift(field, x + h * f + dw, at(t1, x), stop)
        return x + (h / 2) * (f + f_hat) + dw

    return step


def brownian_increment(x: Points, streams: KeyedStreams, stream: int, variance: float) -> Points:
    """Normal noise of a variance, for one step."""
    if variance == 0:
        return torch.zeros_like(x)
    return math.sqrt(variance) * streams.normal(x.shape[1:], stream=stream, dtype=x.dtype)


def require_strength(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be finite and not negative; 0 gives the ODE")
