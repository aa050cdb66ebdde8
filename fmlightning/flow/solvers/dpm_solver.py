r"""The exponential multistep method DPM-Solver++(2M), in alpha and sigma.

A velocity says which data point D(x, t) it expects at the end (`predictions`), and in terms of D the flow is
linear in x:

    dx/dt = (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) D                                   (1)

The linear part is solved exactly. With lambda = log(alpha / sigma) and h = lambda_t - lambda_s, a step is

    x_t = (sigma_t / sigma_s) x_s + (alpha_t - sigma_t alpha_s / sigma_s) Dbar                       (2)
    Dbar = D_s + h / (2 h_before) (D_s - D_before)                                                   (3)

In (2) stands alpha_t (1 - e^-h), written so that it holds where lambda is infinite: alpha_0 = 0 and sigma_1 = 0.
Steps from or to such an end, and the first two, have Dbar = D_s and are of order one; that they are few, or D there
hardly moves, keeps the method at order two. One evaluation of the field a step.

It needs a ratio alpha / sigma that rises. It does not need a Gaussian source or an independent coupling: for any
others D is no posterior mean, but (1) is the same flow. On a path with gamma > 0, sigma stands for sqrt(V). Where the
data never move, as on the path of a single point, one step is exact whatever its length.

Source: Lu et al. 2022, arXiv:2211.01095, eq. 4.1 and algorithm 2, with time from noise to data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fmlightning.flow.paths.schedules import Schedule
from fmlightning.flow.shapes import Field, at
from fmlightning.flow.solvers.runge_kutta import Step


class GridPoint(NamedTuple):
    """What a step needs to know of a time: the curves, and D = p v + q x."""

    alpha: float
    sigma: float
    log_snr: float
    p: float
    q: float


@dataclass(frozen=True)
class DPMSolver2M:
    """Equations (2) and (3).

    Args:
        lower_order_final: whether the last step is of order one, as published for fewer than 15 steps; it is in any
            case where no noise is left at the end.
    """

    lower_order_final: bool = False

    def stepper(self, field: Field, schedule: Schedule, grid: Sequence[float]) -> Step:
        """Steps along a grid; each is taken once, in its order.

        Raises:
            ValueError: the ratio alpha / sigma does not rise, or the grid starts where no noise is left.
        """
        places = dict(zip(grid, places_on(schedule, grid), strict=True))
        before: list[tuple[float, Tensor]] = []

        def step(x: Tensor, t0: float, t1: float) -> Tensor:
            start, end = places[t0], places[t1]
            v = field(x, at(t0, x))
            if not math.isfinite(
                start.p + start.q
            ):  # (1) tells nothing of D there, as of t^2 at t = 0
                return torch.add(x, v, alpha=t1 - t0)
            data = expected = start.q * x + start.p * v
            weight = self.weight(start, end, before[-1][0]) if before else 0.0
            if weight and not (self.lower_order_final and t1 == grid[-1]):
                expected = data + weight * (data - before[-1][1])
            before[:] = [(start.log_snr, data)]
            shrink = end.sigma / start.sigma
            return torch.add(shrink * x, expected, alpha=end.alpha - shrink * start.alpha)

        return step

    def weight(self, start: GridPoint, end: GridPoint, log_snr_before: float) -> float:
        """h / (2 h_before); zero where one of them is infinite."""
        h, h_before = end.log_snr - start.log_snr, start.log_snr - log_snr_before
        return h / (2 * h_before) if math.isfinite(h) and math.isfinite(h_before) else 0.0

    def evaluations(self, num_steps: int) -> int:
        """How often the field is called."""
        return num_steps


def places_on(schedule: Schedule, grid: Sequence[float]) -> list[GridPoint]:
    """The places of all times of a grid, in float64."""
    t = torch.tensor(grid, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = (
        curve(t).expand_as(t)
        for curve in (schedule.alpha, schedule.std, schedule.d_alpha, schedule.d_std)
    )
    log_snr = (alpha / sigma).log()
    require_rise(schedule, grid, log_snr if grid[0] < grid[-1] else log_snr.flip(0))
    if not float(sigma[0]) > 0:
        raise ValueError(
            f"method='dpmpp_2m' cannot start at t={grid[0]:g}, where {schedule} has no noise left to tell points "
            "apart: start before it, or take heun2 or dopri5"
        )
    d = d_alpha * sigma - alpha * d_sigma
    columns = (alpha, sigma, log_snr, sigma / d, -d_sigma / d)
    return [GridPoint(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def require_rise(schedule: Schedule, grid: Sequence[float], log_snr: Tensor) -> None:
    """Refuse a ratio that stands still or falls: no step of (2) has its length there."""
    if not bool((log_snr.diff() > 0).all()):
        raise ValueError(
            f"method='dpmpp_2m' needs a ratio alpha / sigma that rises, and that of {schedule} does not on the grid "
            f"from t={grid[0]:g} to {grid[-1]:g}: take heun2 or dopri5"
        )
