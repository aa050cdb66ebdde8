r"""Particles and the flow map, as a grid that the flow deforms.

    d psi_t(x) / dt = u_t(psi_t(x)),   psi_0(x) = x                                 (1)
    p_t(psi_t(x)) |det d psi_t(x) / dx| = p_0(x)                                    (2)

Each cell of the grid keeps its mass p_0(x) dx: by (2) its colour, the mass over the area it has come to cover,
is the density that the map makes.

Source: Lipman et al. 2023, arXiv:2210.02747, eqs. 1-4.
"""

from collections.abc import Iterator

import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from torch import Tensor

from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.sources import Gaussian
from fmlightning.metrics.figures import DATA as RED
from fmlightning.metrics.figures import finish

from .scene import DATA, DENSE, LIMITS, PALE, Detail, Film, dots, lattice, noise, snapshot, tracks

PATH = DATA.along(Linear())
REACH = 3.0
"""Half the side of the grid in the source."""
CELLS, EVERY = 60, 3
"""Cells along a side, and how many of them lie between two lines that are drawn."""


def draw(detail: Detail) -> Iterator[tuple[str, Figure | Film]]:
    times = [k / (detail.frames - 1) for k in range(detail.frames)]
    grid, particles = carried(detail, times)
    shown = [round(share * (len(times) - 1)) for share in (0.0, 0.3, 0.6, 0.8, 1.0)]
    yield "flow_map.png", strip([(times[k], grid[k], particles[: k + 1]) for k in shown])
    frames = zip(times, grid, strict=True)
    pictures = (frame(t, g, particles[: k + 1]) for k, (t, g) in enumerate(frames))
    yield "flow_map.gif", Film([snapshot(picture, detail.dpi) for picture in pictures])


def carried(detail: Detail, times: list[float]) -> tuple[Tensor, Tensor]:
    """Corners of the grid, (K, side, side, 2), and some particles, (K, B, 2), at the times."""
    side = CELLS + 1
    x = torch.cat((lattice(side, REACH), noise(detail.particles)[:24]))
    solver = ODESolver("rk4", num_steps=detail.num_steps)
    states = solver.solve(PATH.velocity, x, save_at=times).states
    return states[:, : side**2].unflatten(1, (side, side)), states[:, side**2 :]


def strip(moments: list[tuple[float, Tensor, Tensor]]) -> Figure:
    figure = Figure(figsize=(12.5, 2.8), layout="constrained")
    for axis, moment in zip(figure.subplots(1, len(moments)), moments, strict=True):
        deformed(axis, *moment)
    return figure


def frame(t: float, grid: Tensor, particles: Tensor) -> Figure:
    figure = Figure(figsize=(3.4, 3.62))
    axis = figure.subplots()
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.94)
    deformed(axis, t, grid, particles)
    return figure


def deformed(axis: Axes, t: float, grid: Tensor, particles: Tensor) -> None:
    """The cells in the colour of (2), and the particles with the way behind them."""
    cells = corners(grid)
    density = mass() / area(cells).clamp(min=1e-12)
    axis.add_collection(PolyCollection(
        list(cells.flatten(0, 1).numpy()), array=density.flatten().sqrt().numpy(), cmap=PALE,
        clim=(0, DENSE**0.5), edgecolors="face", linewidths=0.3,
    ))  # fmt: skip
    for lines in (grid[:, ::EVERY], grid[::EVERY].transpose(0, 1)):
        tracks(axis, lines, colors="#333333", linewidths=0.4)
    tracks(axis, particles, colors=RED, linewidths=0.8)
    dots(axis, particles[-1], RED, 10)
    finish(axis, f"t = {t:.2f}", LIMITS)


def corners(grid: Tensor) -> Tensor:
    """The cells as quadrilaterals, (CELLS, CELLS, 4, 2)."""
    return torch.stack((grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]), 2)


def mass() -> Tensor:
    """The mass of each cell in the source, by its density in the middle."""
    step = 2 * REACH / CELLS
    middle = lattice(CELLS, REACH - step / 2)
    return (Gaussian().log_prob(middle).exp() * step**2).reshape(CELLS, CELLS)


def area(cells: Tensor) -> Tensor:
    """Half the cross product of the diagonals of each quadrilateral, (..., 4, 2)."""
    a, b = (cells[..., 2, :] - cells[..., 0, :]), (cells[..., 3, :] - cells[..., 1, :])
    return (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).abs() / 2
