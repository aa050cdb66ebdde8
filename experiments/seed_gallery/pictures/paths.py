r"""Conditional and marginal: what the network is shown, and what it learns.

For one data point x1 the path and its velocity are those of a Gaussian that shrinks onto x1:

    p_t(x | x1) = N(x; t x1, (1 - t)^2 I),   u_t(x | x1) = (x1 - x) / (1 - t)       (1)

For all data, both are averages over the data that may have led to x, the marginalisation trick:

    p_t(x) = E_q[p_t(x | x1)],   u_t(x) = E[u_t(x | x1) | x_t = x]                  (2)

Source: Lipman et al. 2023, arXiv:2210.02747, eqs. 6 and 8.
"""

from collections.abc import Iterator

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.shapes import Points
from fmlightning.flow.theory.mixture import GaussianMixture, MixturePath
from fmlightning.metrics.figures import DATA as RED
from fmlightning.metrics.figures import MODEL as BLUE
from fmlightning.metrics.figures import finish

from .scene import DATA, F64, KEY, LIMITS, PALE, Detail, at, dots, noise, shade, stream

PATH_TIMES = (0.0, 0.25, 0.5, 0.75, 0.97)
VELOCITY_TIMES = (0.1, 0.4, 0.65, 0.85)
ONE = DATA.means[18:19]
"""The data point of the conditional path, (1, 2)."""
CONDITIONAL = GaussianMixture.of_points(ONE).along(Linear())
MARGINAL = DATA.along(Linear())


def draw(detail: Detail) -> Iterator[tuple[str, Figure]]:
    yield "paths.png", paths(detail)
    yield "velocities.png", velocities(detail)


def paths(detail: Detail) -> Figure:
    """Densities of (1) above those of (2), each with the same source points on their conditional ways."""
    figure = Figure(figsize=(11, 4.9), layout="constrained")
    axes = figure.subplots(2, len(PATH_TIMES))
    x0 = noise(detail.particles)[:150]
    x1 = DATA.sample(x0.shape, KEY.fold("data").generator(), F64)
    targets = (ONE.expand_as(x0), x1)
    for row, path, x1 in zip(axes, (CONDITIONAL, MARGINAL), targets, strict=True):
        for axis, t in zip(row, PATH_TIMES, strict=True):
            shade(axis, lambda x, p=path, t=t: p.log_prob(x, at(t)), detail.side, PALE)
            dots(axis, path.path.sample(x0, x1, at(t)).xt, RED, 3, 0.8)
            finish(axis, f"t = {t:g}", LIMITS)
    for axis in axes[0]:
        cross(axis)
    axes[0, 0].set_ylabel("one data point: $p_t(x\\,|\\,x_1)$")
    axes[1, 0].set_ylabel("all data: $p_t(x)$")
    return figure


def velocities(detail: Detail) -> Figure:
    """Velocities of (1), those of (2), and at one point how the one averages to the other."""
    figure = Figure(figsize=(10.4, 8.2), layout="constrained")
    axes = figure.subplots(3, len(VELOCITY_TIMES))
    for column, t in zip(axes.T, VELOCITY_TIMES, strict=True):
        for axis, path in zip(column[:2], (CONDITIONAL, MARGINAL), strict=True):
            shade(axis, lambda x, p=path, t=t: p.log_prob(x, at(t)), detail.side, PALE)
            stream(axis, path.velocity, t)
        cross(column[0])
        average(column[2], MARGINAL, t)
        for axis in column:
            finish(axis, f"t = {t:g}", LIMITS)
    names = ("one data point: $u_t(x\\,|\\,x_1)$", "all data: $u_t(x)$", "the average at a point")
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name)
    return figure


def cross(axis: Axes) -> None:
    axis.plot(*ONE[0].tolist(), marker="x", color="k", markersize=8, markeredgewidth=2, zorder=4)


def average(axis: Axes, path: MixturePath, t: float) -> None:
    """Conditional velocities at one point to data drawn by their chance, and the marginal one.

    Both are drawn times 1 - t: on this path a conditional one then ends at its x1, the mean at E[x1 | x].
    """
    x = at(t) * ONE + (1 - t) * torch.tensor([[1.2, -1.9]], dtype=F64)
    x1 = possible_data(path, x, t)
    start, end = x[0].tolist(), x[0] + (1 - t) * path.velocity(x, at(t))[0]
    shade(axis, DATA.log_prob, 120, "Reds")
    for point in x1.tolist():
        axis.plot(*zip(start, point, strict=True), color="k", linewidth=0.6, alpha=0.25)
    axis.annotate("", end.tolist(), start, zorder=5,
                  arrowprops={"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.8, "mutation_scale": 9,
                              "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    axis.plot(*start, "o", color="k", markersize=4, zorder=4)


def possible_data(path: MixturePath, x: Points, t: float, count: int = 80) -> Tensor:
    """Draws of x1 given x_t = x: of a component by its responsibility, then within it."""
    generator = KEY.fold("possible").generator()
    law, alpha, var = path.mixture, path.path.alpha(at(t)), path.path.variance(at(t))
    k = torch.multinomial(path.responsibilities(x, at(t))[0], count, True, generator=generator)
    s2 = law.stds[k, None] ** 2
    total = alpha**2 * s2 + var
    centre = law.means[k] + alpha * s2 / total * (x - alpha * law.means[k])
    return centre + (s2 * var / total).sqrt() * torch.randn(
        count, 2, generator=generator, dtype=F64
    )
