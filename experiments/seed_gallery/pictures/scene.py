r"""What the pictures share: the data, the plane, and how a drawing becomes an image.

The data are two arcs, a mixture of 48 Gaussians, so that density, velocity and score of every path to them are
known in closed form, and nothing in the gallery is trained.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import Field, PerSample, Points
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture

F64 = torch.float64
KEY = Key(0).fold("gallery")
EXTENT = 3.6
LIMITS = (-EXTENT, EXTENT, -EXTENT, EXTENT)
DENSE = 0.26
"""The density that gets the darkest colour: about the highest that occurs on the way."""
PALE = ListedColormap(colormaps["Blues"](np.linspace(0, 0.7, 256)), "pale")
"""Blues light enough for lines and points on top."""


@dataclass(frozen=True)
class Detail:
    """How fine the pictures are.

    Args:
        side: points along a side of a map of the plane.
        particles: points that are carried along.
        frames: of a film.
        num_steps: of the solvers.
        dpi: of the images.
    """

    side: int = 120
    particles: int = 1000
    frames: int = 28
    num_steps: int = 100
    dpi: int = 100


@dataclass(frozen=True)
class Film:
    """Images in their order, shown in a loop that rests on the last."""

    frames: list[Image.Image]
    milliseconds: int = 120
    rest: int = 1500

    def save(self, file: Path) -> None:
        first, *others = shared_palette(self.frames)
        durations = [self.milliseconds] * len(others) + [self.rest]
        first.save(file, save_all=True, append_images=others, duration=durations, loop=0)


def arcs(count: int = 24, radius: float = 2.0, std: float = 0.16) -> GaussianMixture:
    """Two interleaved half circles, each a chain of Gaussians."""
    angle = torch.linspace(0, math.pi, count, dtype=F64)
    upper = torch.stack((angle.cos() - 0.5, angle.sin() - 0.25), 1)
    weights = torch.full((2 * count,), 1 / (2 * count), dtype=F64)
    return GaussianMixture(weights, radius * torch.cat((upper, -upper)), std)


DATA = arcs()


def noise(count: int, *name: str) -> Points:
    """Points of the source, the same wherever they have the same name."""
    return Gaussian().sample((count, 2), KEY.fold("source", *name).generator(), F64)


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=F64)


def lattice(side: int, extent: float = EXTENT) -> Points:
    """Points of the plane row by row, (side^2, 2)."""
    axis = torch.linspace(-extent, extent, side, dtype=F64)
    return torch.cartesian_prod(axis, axis).flip(1)


def over_plane(values: Callable[[Points], PerSample], side: int) -> np.ndarray:
    """A function as a map, (side, side), the lowest row first."""
    return values(lattice(side)).reshape(side, side).numpy()


def shade(
    axis: Axes, log_prob: Callable[[Points], PerSample], side: int, colours: str | Colormap
) -> None:
    """A density, drawn by its square root so that thin regions show."""
    density = over_plane(lambda x: log_prob(x).exp().sqrt(), side)
    axis.imshow(density, extent=LIMITS, origin="lower", cmap=colours, vmin=0, vmax=DENSE**0.5,
                interpolation="bilinear", aspect="auto")  # fmt: skip


def dots(axis: Axes, x: Points, colour: str, size: float = 3, alpha: float = 1) -> None:
    axis.scatter(x[:, 0], x[:, 1], s=size, color=colour, alpha=alpha, linewidths=0, zorder=3)


def tracks(axis: Axes, states: Tensor, **style: object) -> None:
    """The ways of particles, (K, B, 2)."""
    axis.add_collection(LineCollection(list(states.transpose(0, 1).numpy()), **style))


def timed_tracks(axis: Axes, states: Tensor, times: Tensor, colours: str) -> LineCollection:
    """The ways of particles, coloured by the time."""
    segments = torch.stack((states[:-1], states[1:]), 2).flatten(0, 1)
    middle = ((times[:-1] + times[1:]) / 2).repeat_interleave(states.shape[1])
    lines = LineCollection(list(segments.numpy()), array=middle.numpy(), cmap=colours,
                           linewidths=0.8, clim=(0, 1))  # fmt: skip
    axis.add_collection(lines)
    return lines


def stream(axis: Axes, field: Field, t: float, side: int = 40) -> None:
    """The lines of a velocity at one time, thicker where it is faster."""
    v = field(lattice(side), at(t)).reshape(side, side, 2)
    speed = v.norm(dim=-1)
    line = torch.linspace(-EXTENT, EXTENT, side, dtype=F64).numpy()
    axis.streamplot(
        line, line, v[..., 0].numpy(), v[..., 1].numpy(), color="#222222", density=1.1,
        linewidth=(0.3 + 1.2 * speed / speed.max()).numpy(), arrowsize=0.7,
    )  # fmt: skip


def snapshot(figure: Figure, dpi: int) -> Image.Image:
    """The pixels of a figure."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def shared_palette(frames: list[Image.Image], colours: int = 128) -> list[Image.Image]:
    """Frames in the colours of some of them together: one palette, not dithered, keeps the file small."""
    chosen = [*frames[:: max(1, len(frames) // 8)], frames[-1]]
    together = Image.new("RGB", (frames[0].width, len(chosen) * frames[0].height))
    for row, frame in enumerate(chosen):
        together.paste(frame, (0, row * frame.height))
    # the most frequent colours alone would turn the few red points purple
    palette = together.quantize(colours, Image.Quantize.MAXCOVERAGE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
