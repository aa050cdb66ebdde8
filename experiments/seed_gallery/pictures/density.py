r"""The probability path as a film of densities, on three paths to the same data.

    p_t = law of alpha(t) x1 + sigma(t) x0,   x1 ~ q,   x0 ~ N(0, I)                (1)

OT: alpha = t, sigma = 1 - t. VP keeps alpha^2 + sigma^2 = 1, VE keeps alpha = 1 and adds noise.

Source: Lipman et al. 2023, arXiv:2210.02747, sec. 4.1.
"""

from collections.abc import Iterator

from matplotlib.figure import Figure

from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.paths.schedules import Linear, VarianceExploding, VariancePreserving
from fmlightning.metrics.figures import finish

from .scene import DATA, DENSE, EXTENT, LIMITS, Detail, Film, at, over_plane, shade, snapshot

STRIP = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PATHS: dict[str, AffinePath] = {
    "OT": Linear(),
    "VP": VariancePreserving(),
    "VE": VarianceExploding(0.01, 5.0),
}


def draw(detail: Detail) -> Iterator[tuple[str, Figure | Film]]:
    yield "density.png", strip(detail)
    times = [k / (detail.frames - 1) for k in range(detail.frames)]
    yield "density.gif", Film([snapshot(frame(t, detail), detail.dpi) for t in times])


def strip(detail: Detail) -> Figure:
    """One path a row, time from left to right."""
    figure = Figure(figsize=(10.6, 5.6), layout="constrained")
    axes = figure.subplots(len(PATHS), len(STRIP))
    for row, (name, schedule) in zip(axes, PATHS.items(), strict=True):
        path = DATA.along(schedule)
        for axis, t in zip(row, STRIP, strict=True):
            shade(axis, lambda x, p=path, t=t: p.log_prob(x, at(t)), detail.side, "magma")
            finish(axis, f"t = {t:g}", LIMITS)
        row[0].set_ylabel(name)
    return figure


def frame(t: float, detail: Detail) -> Figure:
    """The OT and the VP path at one time, in bands of equal density."""
    figure = Figure(figsize=(6.0, 3.3))
    axes = figure.subplots(1, 2)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.9, wspace=0.03)
    levels = [DENSE * (k / 16) ** 2 for k in range(17)]
    for axis, name in zip(axes, ("OT", "VP"), strict=True):
        path = DATA.along(PATHS[name])
        density = over_plane(lambda x, p=path: p.log_prob(x, at(t)).exp(), detail.side)
        sides = [-EXTENT + 2 * EXTENT * k / (detail.side - 1) for k in range(detail.side)]
        axis.contourf(sides, sides, density, levels=levels, cmap="magma", extend="max")
        finish(axis, f"{name}   t = {t:.2f}", LIMITS)
    return figure
