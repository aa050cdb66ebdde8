r"""The bias of a stochastic sampler, without sampling.

On one Gaussian the drift of the SDE is linear, so the end of a scheme is a sum: what it makes of x0 plus what it
makes of each step's noise. Its variance is the sum of the squares, exact for any number of steps.

    bias(N) = variance at t = 1 / variance of the data - 1                                        (1)

falls with the order of the scheme: for Euler-Maruyama it halves when the steps double.
"""

import itertools

import torch
from torch import Tensor

from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.solvers.diffusions import ConstantDiffusion, Diffusion, PathDiffusion
from fmlightning.flow.solvers.sde import MarginalPreservingSDE, SDESolver
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture

F64 = torch.float64
WIDTH = 0.5
DIFFUSIONS: dict[str, Diffusion] = {
    "constant g": ConstantDiffusion(2**0.5, (0.0, 0.95)),
    "the path's own g": PathDiffusion((0.05, 1.0)),
}


class Impulses:
    """The noise of a linear scheme taken apart: row i is one standard deviation in step i, and zero elsewhere."""

    def __init__(self, num_rows: int) -> None:
        self.step, self.row = itertools.count(), torch.arange(num_rows)[:, None]

    def increment(self, t0: float, t1: float) -> Tensor:
        return (t1 - t0) ** 0.5 * (self.row == next(self.step)).to(F64)


def variance_bias(diffusion: Diffusion, num_steps: int) -> float:
    """Equation (1) for Euler-Maruyama on the linear path and data of width 0.5."""
    path = GaussianMixture([1.0], [[0.0]], WIDTH).along(Linear())
    x = torch.zeros(num_steps + 1, 1, dtype=F64)
    x[-1] = 1.0  # the last row has no noise: how far x0 itself is carried
    sde = MarginalPreservingSDE(Linear(), Gaussian(), True, diffusion)
    end = (
        SDESolver("euler_maruyama", num_steps)
        .solve(sde, path.velocity, x, Impulses(num_steps + 1))
        .x
    )
    return float(end.square().sum()) / WIDTH**2 - 1
