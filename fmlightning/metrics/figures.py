"""Tensors into figures.

Each function returns a matplotlib Figure, drawn without a display and without pyplot's global state.
"""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from fmlightning.flow.shapes import Field, Points

SOURCE, DATA, MODEL = "#7a7a7a", "#d1495b", "#00798c"


def scatter(samples: Points, real: Points, source: Points) -> Figure:
    """Source, generated and real points of the plane, side by side on the same axes."""
    limits = frame(real, samples, source)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (("source", source, SOURCE), ("generated", samples, MODEL), ("real", real, DATA))
    for axis, (title, x, colour) in zip(axes, panels, strict=True):
        axis.scatter(x.cpu()[:, 0], x.cpu()[:, 1], s=3, alpha=0.5, color=colour, linewidths=0)
        finish(axis, title, limits)
    return figure


def plane(samples: Points) -> Figure:
    """Points of the plane on their own."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    axis.scatter(
        samples.cpu()[:, 0], samples.cpu()[:, 1], s=4, alpha=0.6, color=MODEL, linewidths=0
    )
    finish(axis, f"{len(samples)} generated points", frame(samples))
    return figure


def trajectories(
    states: Tensor, real: Points, field: Field, time: float, particles: int = 300
) -> Figure:
    """Particles on their way from source to data, and the velocity field at one time.

    Args:
        states: (K, B, 2), from the source to the data.
        real: points of the data, (N, 2).
        field: `(x, t) -> v`.
        time: when the streamlines on the right are drawn.
        particles: how many paths are drawn.
    """
    states = states.cpu()
    limits = frame(states[0], states[-1], real)
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = LineCollection(
        list(states[:, :particles].transpose(0, 1).numpy()), colors="k", linewidths=0.4, alpha=0.25
    )
    left.add_collection(lines)
    for x, colour, label in (
        (states[0], SOURCE, "t = 0: source"),
        (states[-1], MODEL, "t = 1: generated"),
    ):
        left.scatter(x[:, 0], x[:, 1], s=4, color=colour, label=label, linewidths=0, zorder=3)
    left.legend(loc="upper right", markerscale=3)
    finish(left, f"{min(particles, states.shape[1])} particles and their paths", limits)
    density(right, real, limits, "Reds")
    streamlines(right, field, time, limits, real.device)
    finish(right, f"velocity at t = {time:g} over the density of the data", limits)
    return figure


def path_film(states: Tensor, times: Tensor, truth: Tensor) -> Figure:
    """The density of the model along its flow, above that of the probability path itself.

    Args:
        states: particles carried by the field, (K, B, 2).
        times: (K,).
        truth: samples x_t of the path at the same times, (K, N, 2).
    """
    limits = frame(states.flatten(0, 1), truth.flatten(0, 1))
    figure = Figure(figsize=(2.3 * len(times), 4.9), layout="constrained")
    axes = figure.subplots(2, len(times), squeeze=False)
    rows = (("flow of the model", states, "viridis"), ("probability path", truth, "magma"))
    for row, (name, frames, colours) in zip(axes, rows, strict=True):
        for axis, x, t in zip(row, frames, times.tolist(), strict=True):
            density(axis, x, limits, colours)
            finish(axis, f"t = {t:.2f}", limits)
        row[0].set_ylabel(name)
    return figure


def image_grid(
    generated: Tensor, real: Tensor, names: Sequence[str] = (), columns: int = 10
) -> Figure:
    """Generated images beside real ones, each a grid with one class a column where there are classes.

    Args:
        generated: images in [-1, 1], (N, C, H, W).
        real: the same for real images.
        names: of the classes, shown where they take turns in the columns.
        columns: images in a row.
    """
    shown = columns if names and columns % len(names) == 0 else 0
    labels = [names[i % len(names)] for i in range(shown)]
    upright = max(map(len, labels), default=0) > 3
    figure = Figure(figsize=(10, 6.2 if upright else 5.4), layout="constrained")
    for axis, (title, images) in zip(
        figure.subplots(1, 2), (("generated", generated), ("real", real)), strict=True
    ):
        axis.imshow(tile(images, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title)
        axis.set_yticks([])
        places = [(i + 0.5) * (images.shape[-1] + 1) for i in range(shown)]
        axis.set_xticks(places, labels, rotation=90 if upright else 0)
        axis.tick_params(length=0)
    return figure


def restored(inputs: Tensor, generated: Tensor, truth: Tensor, columns: int = 10) -> Figure:
    """Inputs of sampling, its outputs and the truth; the same place in each grid.

    Args:
        inputs: images in [-1, 1], (N, C, H, W), as are the others.
        columns: images in a row of a grid.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = (("input", inputs), ("generated", generated), ("truth", truth))
    for axis, (title, images) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.imshow(tile(images, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title)
        axis.set_axis_off()
    return figure


def strips(states: Tensor, times: Tensor) -> Figure:
    """Images on their way from noise to data: one sample a row, time from left to right.

    Args:
        states: (K, N, C, H, W).
        times: (K,).
    """
    frames, rows = states.shape[:2]
    figure = Figure(figsize=(0.9 * frames, 0.9 * rows + 0.4), layout="constrained")
    axis = figure.subplots()
    images = states.transpose(0, 1).flatten(0, 1)
    axis.imshow(tile(images, frames), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    width = states.shape[-1] + 1
    axis.set_xticks(
        [(i + 0.5) * width for i in range(frames)], [f"{t:.2f}" for t in times.tolist()]
    )
    axis.set_yticks([])
    axis.tick_params(length=0)
    axis.set_xlabel("t")
    return figure


def tile(images: Tensor, columns: int) -> np.ndarray:
    """Images in [-1, 1] as one array in [0, 1] for imshow, (H', W', 3), on a white grid."""
    images = ((images.float().cpu() + 1) / 2).clamp(0, 1).nan_to_num(nan=0.5)  # grey if it failed
    # other numbers of channels than three have no colours: the first is shown
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    rows = -(-len(images) // columns)
    blank = images.new_ones(rows * columns - len(images), *images.shape[1:])
    images = torch.nn.functional.pad(torch.cat((images, blank)), (0, 1, 0, 1), value=1.0)
    return (
        images.unflatten(0, (rows, columns))
        .permute(0, 3, 1, 4, 2)
        .flatten(0, 1)
        .flatten(1, 2)
        .numpy()
    )


def density(axis: Axes, x: Points, limits: tuple[float, float, float, float], colours: str) -> None:
    """A smooth image of where the points are."""
    left, right, bottom, top = limits
    u, v = x.cpu().double().numpy().T
    counts, _, _ = np.histogram2d(u, v, bins=120, range=((left, right), (bottom, top)))
    axis.imshow(
        np.sqrt(counts.T),
        extent=limits,
        origin="lower",
        cmap=colours,
        interpolation="bilinear",
        aspect="auto",
    )


@torch.no_grad()
def streamlines(
    axis: Axes,
    field: Field,
    time: float,
    limits: tuple[float, float, float, float],
    device: torch.device,
) -> None:
    """The lines of the velocity at one time, darker where it is faster."""
    left, right, bottom, top = limits
    # in float64: matplotlib wants even steps, far from the origin too
    x, y = (
        torch.linspace(*ends, 40, dtype=torch.float64) for ends in ((left, right), (bottom, top))
    )
    grid = torch.cartesian_prod(x, y).to(device, torch.get_default_dtype())
    v = field(grid, torch.tensor(time, device=device)).cpu().unflatten(0, (40, 40)).transpose(0, 1)
    speed = v.norm(dim=-1)
    axis.streamplot(
        x.numpy(), y.numpy(), v[..., 0].numpy(), v[..., 1].numpy(),
        color=speed.numpy(), cmap="Greys", density=1.3, linewidth=0.8, arrowsize=0.8,
    )  # fmt: skip


def frame(*clouds: Points) -> tuple[float, float, float, float]:
    """Limits of the axes, (left, right, bottom, top), around all but the farthest points."""
    x = torch.cat([c.detach().float().cpu() for c in clouds])
    low, high = x.nanquantile(0.002, 0), x.nanquantile(0.998, 0)  # NaN is a sample that failed
    margin = 0.1 * (high - low).clamp(min=1e-3)
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    return left, right, bottom, top


def finish(axis: Axes, title: str, limits: tuple[float, float, float, float]) -> None:
    axis.set(xlim=limits[:2], ylim=limits[2:], xticks=[], yticks=[])
    sides = sorted((limits[1] - limits[0], limits[3] - limits[2]))
    axis.set_aspect("equal" if sides[1] < 20 * sides[0] else "auto")  # columns of unlike units
    axis.set_title(title, fontsize=10)
