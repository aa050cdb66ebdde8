r"""The OT path against the diffusion path, from the same source points to the same data.

    OT:  x_t = t x1 + (1 - t) x0                          (1)   a straight line at constant speed
    VP:  x_t = alpha(t) x1 + sqrt(1 - alpha(t)^2) x0      (2)   an arc, nearly all of it after t = 1/2

Straight are the ways to one data point; the flow to all data averages over them and bends on either path.
The board is a mixture of Gaussians, close to the checkerboard of the paper.

Source: Lipman et al. 2023, arXiv:2210.02747, sec. 4.1; midpoint as in its low-cost samples.
"""

from collections.abc import Iterator

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from fmlightning.flow.paths.schedules import Linear, VariancePreserving
from fmlightning.flow.shapes import Points
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.theory.mixture import GaussianMixture, MixturePath
from fmlightning.metrics.figures import MODEL, SOURCE, finish
from fmlightning.metrics.transport import wasserstein2

from .scene import F64, KEY, LIMITS, Detail, dots, noise, shade, timed_tracks


def checkerboard(extent: float = 3.2, per_side: int = 5) -> GaussianMixture:
    """The eight dark squares of a 4 x 4 board of side 2 extent, each a lattice of Gaussians."""
    step = extent / 2 / per_side
    line = (torch.arange(4 * per_side, dtype=F64) + 0.5) * step - extent
    points = torch.cartesian_prod(line, line)
    dark = ((points + extent) // (extent / 2)).sum(1) % 2 == 0
    means = points[dark]
    return GaussianMixture(torch.full((len(means),), 1 / len(means), dtype=F64), means, step / 2)


BOARD = checkerboard()
PATHS = {
    "OT path": BOARD.along(Linear()),
    "diffusion path (VP)": BOARD.along(VariancePreserving()),
}
SOLVERS = (
    ODESolver("euler", num_steps=4),
    ODESolver("midpoint", num_steps=2),
    ODESolver("euler", num_steps=8),
    ODESolver("midpoint", num_steps=4),
)
LINES = 50


def draw(detail: Detail) -> Iterator[tuple[str, Figure]]:
    figure = Figure(figsize=(15.2, 6.3), layout="constrained")
    axes = figure.subplots(2, 2 + len(SOLVERS))
    for row, (name, path) in zip(axes, PATHS.items(), strict=True):
        row[0].set_ylabel(name)
        conditional(row[0], path, detail)
        lines = flow(row[1], path, detail)
        for axis, solver in zip(row[2:], SOLVERS, strict=True):
            samples(axis, path, solver, detail)
    floor = wasserstein2(real("real", detail), real("other", detail))
    figure.supxlabel(f"W2 between two samples of the data of this size: {floor:.2f}", fontsize=10)
    figure.colorbar(lines, ax=axes, label="t", shrink=0.7, pad=0.01)
    yield "comparison.png", figure


def conditional(axis: Axes, path: MixturePath, detail: Detail) -> None:
    """The ways to one data point."""
    x0, times = noise(detail.particles)[:LINES], torch.linspace(0, 1, 121, dtype=F64)
    x1, curve = torch.tensor([[-2.4, 2.4]], dtype=F64).expand_as(x0), path.path
    ways(axis, torch.stack([curve.sample(x0, x1, t).xt for t in times]), times)
    finish(axis, "to one data point", LIMITS)


def flow(axis: Axes, path: MixturePath, detail: Detail) -> LineCollection:
    """The ways of the exact flow, and how much longer they are than the straight line."""
    low, high = path.t_range
    solver = ODESolver("rk4", num_steps=2 * detail.num_steps)
    solution = solver.solve(path.velocity, noise(detail.particles)[:LINES], low, high, save_at=121)
    shade(axis, BOARD.log_prob, detail.side, "Greys")
    lines = ways(axis, solution.states, solution.times)
    finish(axis, f"to all data: {detour(solution.states):.2f} x distance", LIMITS)
    return lines


def ways(axis: Axes, states: Tensor, times: Tensor) -> LineCollection:
    lines = timed_tracks(axis, states, times, "plasma_r")
    dots(axis, states[0], SOURCE, 7)
    dots(axis, states[-1], "k", 7)
    return lines


def samples(axis: Axes, path: MixturePath, solver: ODESolver, detail: Detail) -> None:
    """Where few evaluations take the points of the source."""
    low, high = path.t_range
    solution = solver.solve(path.velocity, noise(detail.particles), low, high)
    shade(axis, BOARD.log_prob, detail.side, "Greys")
    dots(axis, solution.x, MODEL, 4, 0.7)
    title = f"{solver.method}, {solution.nfe} evaluations"
    finish(axis, f"{title}\nW2 = {wasserstein2(solution.x, real('real', detail)):.2f}", LIMITS)


def real(name: str, detail: Detail) -> Points:
    return BOARD.sample((detail.particles, 2), KEY.fold(name).generator(), F64)


def detour(states: Tensor) -> float:
    """Length of the ways over the distance of their ends, both summed over the particles."""
    length = states.diff(dim=0).norm(dim=-1).sum()
    return float(length / (states[-1] - states[0]).norm(dim=-1).sum())
