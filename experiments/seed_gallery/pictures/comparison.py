r"""The OT path against the diffusion path, from the same source points to the same data.

    OT:  x_t = t x1 + (1 - t) x0                          (1)   a straight line at constant speed
    VP:  x_t = alpha(t) x1 + sqrt(1 - alpha(t)^2) x0      (2)   an arc, most of it in the last third

The marginal velocity of (1) is not straight, but close; Euler's method, whose step is straight, gains by it.

Source: Lipman et al. 2023, arXiv:2210.02747, sec. 4.1 and figures 2, 3 and 6.
"""

from collections.abc import Iterator

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fmlightning.flow.mixture import MixturePath
from fmlightning.flow.ode import ODESolver
from fmlightning.flow.paths import AffinePath
from fmlightning.flow.schedules import Linear, VariancePreserving
from fmlightning.flow.shapes import Points
from fmlightning.metrics.transport import wasserstein2
from fmlightning.plotting import MODEL, SOURCE, finish

from .paths import ONE
from .scene import DATA, F64, KEY, LIMITS, Detail, dots, noise, shade, timed_tracks

PATHS = {"OT path": DATA.along(Linear()), "diffusion path (VP)": DATA.along(VariancePreserving())}
STEPS = (4, 8, 32)
LINES = 40


def draw(detail: Detail) -> Iterator[tuple[str, Figure]]:
    figure = Figure(figsize=(13.6, 5.9), layout="constrained")
    axes = figure.subplots(2, 2 + len(STEPS))
    for row, (name, path) in zip(axes, PATHS.items(), strict=True):
        row[0].set_ylabel(name)
        conditional(row[0], path, detail)
        lines = marginal(row[1], path, detail)
        for axis, num_steps in zip(row[2:], STEPS, strict=True):
            euler(axis, path, num_steps, detail)
    figure.colorbar(lines, ax=axes[:, :2], label="t", shrink=0.7, location="left")
    yield "comparison.png", figure


def conditional(axis: Axes, path: MixturePath, detail: Detail) -> None:
    """The ways to one data point."""
    x0, times = noise(detail.particles)[:LINES], torch.linspace(0, 1, 61, dtype=F64)
    curve = AffinePath(path.schedule)
    states = torch.stack([curve.sample(x0, ONE.expand_as(x0), t).xt for t in times])
    ways(axis, states, times)
    finish(axis, "to one data point", LIMITS)


def marginal(axis: Axes, path: MixturePath, detail: Detail):
    """The ways of the exact flow, and how much longer they are than the straight line."""
    low, high = path.interval
    solver = ODESolver("rk4", num_steps=4 * detail.num_steps)
    solution = solver.solve(path.velocity, noise(detail.particles)[:LINES], low, high, save_at=121)
    shade(axis, DATA.log_prob, detail.side, "Greys")
    lines = ways(axis, solution.states, solution.times)
    finish(axis, f"the flow: {detour(solution.states):.2f} x the distance", LIMITS)
    return lines


def ways(axis: Axes, states: Tensor, times: Tensor):
    lines = timed_tracks(axis, states, times, "plasma")
    dots(axis, states[0], SOURCE, 7)
    dots(axis, states[-1], "k", 7)
    return lines


def euler(axis: Axes, path: MixturePath, num_steps: int, detail: Detail) -> None:
    """Where Euler's method takes the points of the source in few steps."""
    low, high = path.interval
    x = ODESolver("euler", num_steps).solve(path.velocity, noise(detail.particles), low, high).x
    shade(axis, DATA.log_prob, detail.side, "Greys")
    dots(axis, x, MODEL, 4, 0.7)
    real = DATA.sample(tuple(x.shape), KEY.fold("real").generator(), F64)
    finish(axis, f"Euler, {num_steps} steps: W2 = {wasserstein2(x, real):.2f}", LIMITS)


def detour(states: Tensor) -> float:
    """Length of the ways over the distance of their ends, both summed over the particles."""
    length = states.diff(dim=0).norm(dim=-1).sum()
    return float(length / distance(states[0], states[-1]))


def distance(x: Points, y: Points) -> Tensor:
    return (x - y).norm(dim=-1).sum()
