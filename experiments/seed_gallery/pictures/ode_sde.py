r"""One law, two ways: the flow and an SDE with the same marginals, from the same starts.

    dX = u_t dt                                                                     (1)
    dX = [u_t + (g^2 / 2) grad log p_t] dt + g dW,   g^2 = 2 (1 - t)                (2)

The data are three Gaussians on the line, so that time and place fit in one picture.

Source: Song et al. 2021, arXiv:2011.13456; Ma et al. 2024, arXiv:2401.08740, sec. 2.4.
"""

from collections.abc import Iterator

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.shapes import PerSample, Points
from fmlightning.flow.solvers.brownian import BrownianPath
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sde import MarginalPreservingSDE, SDESolver
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture
from fmlightning.metrics.figures import DATA as RED
from fmlightning.metrics.figures import MODEL as BLUE

from .scene import F64, KEY, Detail, at

LINE = GaussianMixture([0.25, 0.4, 0.35], [[-2.0], [0.2], [1.9]], [0.3, 0.2, 0.35])
PATH = LINE.along(Linear())
REACH = 3.2
CROWD = 10
"""How many times as many particles as in the plane: on the line they are cheap."""


def draw(detail: Detail) -> Iterator[tuple[str, Figure]]:
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(4, 4, 1.7))
    x, y = solutions(detail)
    for axis, name, states, colour in ((left, "ODE", x, BLUE), (middle, "SDE", y, RED)):
        background(axis, detail.side)
        times = np.linspace(0, 1, len(states))
        axis.plot(times, states[:, :14, 0].numpy(), color=colour, linewidth=0.8)
        axis.set(title=f"{name}: the same 14 starts", xlabel="t", ylim=(-REACH, REACH), xlim=(0, 1))
        ends(right, f"{name}: gap {gap(states[-1]):.3f}", states[-1], colour)
    left.set_ylabel("x")
    exact(right)
    yield "ode_sde.png", figure


def solutions(detail: Detail) -> tuple[Tensor, Tensor]:
    """States of (1) and of (2), (K, B, 1)."""
    index = torch.arange(CROWD * detail.particles)
    x0 = Gaussian().sample_keyed(KEY.fold("starts").streams(index), (1,), F64)
    save_at = 2 * detail.num_steps + 1
    x = ODESolver("rk4", detail.num_steps).solve(PATH.velocity, x0, save_at=save_at).states
    sde = MarginalPreservingSDE(PATH.schedule, Gaussian(), independent=True)
    brownian = BrownianPath(KEY.fold("brownian").streams(index), x0)
    solver = SDESolver(num_steps=2 * detail.num_steps)
    return x, solver.solve(sde, PATH.velocity, x0, brownian, save_at=save_at).states


def background(axis: Axes, side: int) -> None:
    """p_t(x) over time and place."""
    x = torch.linspace(-REACH, REACH, side, dtype=F64)[:, None]
    columns = [PATH.log_prob(x, at(t)).exp().sqrt() for t in np.linspace(0, 1, side)]
    axis.imshow(torch.stack(columns, 1).numpy(), extent=(0, 1, -REACH, REACH), origin="lower",
                cmap="Greys", vmin=0, vmax=1.2, interpolation="bilinear", aspect="auto")  # fmt: skip


def ends(axis: Axes, label: str, x: Points, colour: str) -> None:
    axis.hist(x[:, 0].numpy(), bins=90, range=(-REACH, REACH), density=True, histtype="step",
              orientation="horizontal", color=colour, label=label)  # fmt: skip


def exact(axis: Axes) -> None:
    x = torch.linspace(-REACH, REACH, 400, dtype=F64)
    axis.plot(LINE.log_prob(x[:, None]).exp().numpy(), x.numpy(), color="k", linewidth=0.8,
              label="exact")  # fmt: skip
    axis.legend(loc="lower right", fontsize=8, frameon=False)
    axis.set(title="at t = 1", xticks=[])


def gap(x: Points) -> float:
    """The largest gap between the distribution functions of a sample and of the data."""
    x = x[:, 0].sort().values
    steps = torch.arange(len(x) + 1, dtype=F64) / len(x)
    truth = cdf(x)
    return float(torch.maximum((truth - steps[:-1]).abs(), (truth - steps[1:]).abs()).max())


def cdf(x: Tensor) -> PerSample:
    z = (x[:, None] - LINE.means[:, 0]) / LINE.stds
    return (LINE.weights * torch.special.ndtr(z)).sum(1)
