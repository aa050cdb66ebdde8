r"""Stochastic sampling.

    dX = f(X, t) dt + g(t) dW                                                       (1)

is solved by Euler-Maruyama or, to weak order two, by stochastic Heun. For any g(t) >= 0 the choice

    f = v + (g^2 / 2) grad log p_t                                                  (2)

gives X_t the marginals p_t of the flow dx/dt = v; g = 0 is the flow itself. The score follows from v only if the
source is Gaussian and independent of the data. It grows like 1 / sigma at the data end, so g^2 has to vanish there
like 1 - t: a g that does not carries a bias that many steps remove slowly, and is given a range of times to act on.
Outside that range, and in the last step, g = 0: by (2) the marginals stay right.

W is one path for each sample, a function of (key, sample index, t) whatever the steps (`brownian`): twice the steps
refine the same sample.

Source: Song et al. 2021, arXiv:2011.13456; Ma et al. 2024 (SiT), arXiv:2401.08740, sec. 2.4.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.paths.schedules import Schedule
from fmlightning.flow.shapes import Field, Labels, Points, at
from fmlightning.flow.solvers.brownian import Brownian, BrownianPath
from fmlightning.flow.solvers.counted import NFECounter
from fmlightning.flow.solvers.diffusions import Diffusion, LinearDiffusion
from fmlightning.flow.solvers.ode import require_ends, require_finite, saved_times
from fmlightning.flow.solvers.runge_kutta import Step, walk
from fmlightning.flow.solvers.score import require_score, score
from fmlightning.flow.solvers.solution import Solution
from fmlightning.flow.solvers.solver import Solver, TrainedField, ends, finish, path_start
from fmlightning.flow.solvers.time_grids import TimeGrid, UniformGrid
from fmlightning.flow.sources import Source

Method = Literal["euler_maruyama", "stochastic_heun"]
METHODS: tuple[str, ...] = get_args(Method)


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
        source: the distribution of x0; Gaussian.
        independent: whether the coupling drew x0 independently of x1.
        diffusion: how much noise to add.

    Raises:
        ValueError: the score of this source or coupling is unknown, or the diffusion does not exist on this path.
    """

    schedule: Schedule
    source: Source | None
    independent: bool
    diffusion: Diffusion = field(default_factory=LinearDiffusion)

    def __post_init__(self) -> None:
        require_score(self.source, self.independent)
        for t in self.diffusion.t_range:
            self.diffusion.at(t, self.schedule)

    def drift(self, field: Field, x: Points, t: Tensor, g2: float) -> Points:
        v = field(x, t)
        return v + (g2 / 2) * score(v, x, t, self.schedule) if g2 else v

    def noise(self, t0: float, t1: float, last: bool) -> tuple[float, float]:
        low, high = self.diffusion.t_range
        if last or t0 < low or t1 > high:
            return 0.0, 0.0
        return self.diffusion.at(t0, self.schedule), self.diffusion.at(t1, self.schedule)


@dataclass(frozen=True)
class SDESolver(Solver):
    """Stochastic sampling with the marginals of the flow, for a Gaussian source independent of the data.

    The score is taken from the velocity of the model, whatever the network predicts. Of a guided model it is that of
    the guided velocity, score_0 + w (score_1 - score_0), the gradient of log[p_t(x|y)^w p_t(x)^(1-w)]: guided ODE and
    SDE agree at w = 1 and are two different samplers elsewhere.

    Args:
        method: euler_maruyama calls the field once a step and has weak order 1; stochastic_heun, twice and 2.
        num_steps: intervals.
        grid: where it stops.
        diffusion: how much noise to add.
    """

    method: Method = "stochastic_heun"
    num_steps: int = 250
    grid: TimeGrid = field(default_factory=UniformGrid)
    diffusion: Diffusion = field(default_factory=LinearDiffusion)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}"
            )
        if not self.num_steps > 0:
            raise ValueError(f"num_steps={self.num_steps} must be positive")

    @property
    def name(self) -> str:
        return self.method

    @property
    def evaluations(self) -> int:
        return self.num_steps * (1 if self.method == "euler_maruyama" else 2)

    def refined(self) -> "SDESolver":
        """The solver that checks this one: twice the steps along the same Brownian path."""
        return replace(self, num_steps=2 * self.num_steps)

    def sample(
        self,
        model: TrainedField,
        x0: Points,
        *,
        y: Labels | None = None,
        t0: float | None = None,
        t1: float | None = None,
        save_at: int | Sequence[float] = 0,
        noise: Points | None = None,
        streams: KeyedStreams | None = None,
    ) -> Solution:
        """Carry source points to the data along `MarginalPreservingSDE`.

        Raises:
            SolverError: the state is not finite.
            ValueError: the score of the model's source or coupling is unknown, or there are no streams.
        """
        source, independent = (getattr(model, name, None) for name in ("source", "independent"))
        sde = MarginalPreservingSDE(model.schedule, source, bool(independent), self.diffusion)
        if streams is None:
            raise ValueError(
                "SDESolver draws noise: pass streams=key.streams(index), one index for each sample"
            )
        start, end = ends(model, t0, t1)
        x, brownian = path_start(model, x0, start, noise), BrownianPath(streams, x0)
        solution = self.solve(
            sde, model.given(y), x, brownian, start, end, save_at, schedule=model.schedule
        )
        return finish(model, solution, end, y)

    def solve(
        self,
        sde: SDE,
        field: Field,
        x: Points,
        brownian: Brownian,
        t0: float = 0.0,
        t1: float = 1.0,
        save_at: int | Sequence[float] = 0,
        schedule: Schedule | None = None,
    ) -> Solution:
        """Carry x from t0 to t1 along any SDE; `diffusion` belongs to `sample` alone.

            sde = MarginalPreservingSDE(Linear(), Gaussian(), independent=True)
            SDESolver().solve(sde, velocity, x, BrownianPath(key.streams(index), x))

        Args:
            sde: what to solve.
            field: the velocity of the flow, or the drift f of `Ito`.
            x: the state at t0, (B, *S).
            brownian: W of the samples; its streams must not be those that drew x.
            t0: start.
            t1: end, later than t0.
            save_at: states to return, as in `ODESolver.solve`; linear between steps.
            schedule: the curves of the path, for LogSNRGrid.

        Raises:
            SolverError: the state is not finite.
            ValueError: the interval is empty or descending, or a step shorter than the Brownian path is resolved.
        """
        require_ends(field, t0, t1)
        if not t0 < t1:
            raise ValueError(f"an SDE runs forwards, but t0={t0:g} is not before t1={t1:g}")
        times, counted = saved_times(save_at, t0, t1), NFECounter(field)
        step = (euler_maruyama if self.method == "euler_maruyama" else stochastic_heun)(
            sde, counted, brownian, t1
        )
        grid = self.grid.points(self.num_steps, t0, t1, schedule).tolist()
        walked = walk(step, x, grid, times.tolist())
        require_finite(self.method, walked.x, walked.lost_at, counted.nfe)
        return Solution(walked.x, counted.nfe, times.to(x.device), walked.states)


def euler_maruyama(sde: SDE, field: Field, brownian: Brownian, end: float) -> Step:
    """x' = x + h f + g dW, with f and g at the start of the step."""

    def step(x: Tensor, t0: float, t1: float) -> Tensor:
        h, (g2, _) = t1 - t0, sde.noise(t0, t1, t1 == end)
        x_h = x + h * sde.drift(field, x, at(t0, x), g2)
        return x_h + math.sqrt(g2) * brownian.increment(t0, t1) if g2 else x_h

    return step


def stochastic_heun(sde: SDE, field: Field, brownian: Brownian, end: float) -> Step:
    """x' = x + h (f + f_hat) / 2 + g dW, with f_hat at the end of an Euler-Maruyama step along the same g dW.

    g^2 is the mean of those at both ends.
    """

    def step(x: Tensor, t0: float, t1: float) -> Tensor:
        h, (start, stop) = t1 - t0, sde.noise(t0, t1, t1 == end)
        g = math.sqrt((start + stop) / 2)
        dw = g * brownian.increment(t0, t1) if g else torch.zeros_like(x)
        f = sde.drift(field, x, at(t0, x), start)
        f_hat = sde.drift(field, x + h * f + dw, at(t1, x), stop)
        return x + (h / 2) * (f + f_hat) + dw

    return step
