r"""The continuity equation, term by term and as a residual.

    d_t p + div(p u) = 0                                                            (1)

A velocity carries p_t if and only if (1) holds: mass that leaves a place was there. The exact field passes. So does
u + w with p w the rotated gradient of p, whose divergence is zero: a path has many velocities. The exact field of an
earlier time fails. Both terms come from autograd, so the zero is found and not put in.

Source: Lipman et al. 2023, arXiv:2210.02747, appendix A.
"""

import math
from collections.abc import Iterator

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.shapes import Field, PerSample, Points
from fmlightning.metrics.figures import finish

from .scene import DATA, LIMITS, PALE, Detail, at, lattice, shade, stream

PATH = DATA.along(Linear())
TIME, LATE = 0.6, 0.1


def exact(x: Points, t: Tensor) -> Points:
    return PATH.velocity(x, t)


def turned(x: Points, t: Tensor) -> Points:
    """u + w, p w = c rot(grad p)."""
    gradient = PATH.score(x, t)
    return exact(x, t) + 0.4 * torch.stack((-gradient[:, 1], gradient[:, 0]), 1)


def late(x: Points, t: Tensor) -> Points:
    """A velocity that is not that of the path: u of an earlier time."""
    return exact(x, t - LATE)


FIELDS: dict[str, Field] = {
    "exact u": exact,
    "u + w, div(p w) = 0": turned,
    f"wrong: u of t - {LATE:g}": late,
}


def draw(detail: Detail) -> Iterator[tuple[str, Figure]]:
    figure = Figure(figsize=(13.2, 6.2), layout="constrained")
    axes = figure.subplots(2, 4)
    x = lattice(detail.side)
    d_t, div = terms(exact, x)
    scale = float(d_t.abs().max())
    heat(axes[0, 0], d_t, scale, "$\\partial_t p$")
    image = heat(axes[1, 0], div, scale, "div(p u), exact u")
    for (upper, lower), (name, field) in zip(axes.T[1:], FIELDS.items(), strict=True):
        shade(upper, lambda x: PATH.log_prob(x, at(TIME)), detail.side, PALE)
        stream(upper, field, TIME)
        finish(upper, name, LIMITS)
        left = residual(field, x)
        heat(lower, left, scale, f"$\\partial_t p$ + div(p v): {largest(left, scale)} of the scale")
    figure.colorbar(image, ax=axes, shrink=0.7, pad=0.01, label="density per unit of time")
    yield "continuity.png", figure


def heat(axis: Axes, values: PerSample, scale: float, title: str) -> AxesImage:
    """A signed function on the lattice, white where it is zero."""
    side = math.isqrt(len(values))
    image = axis.imshow(
        values.reshape(side, side).numpy(), extent=LIMITS, origin="lower", cmap="RdBu_r",
        vmin=-scale, vmax=scale, interpolation="bilinear", aspect="auto",
    )  # fmt: skip
    finish(axis, title, LIMITS)
    return image


def residual(field: Field, x: Points) -> PerSample:
    """The left side of (1)."""
    d_t, div = terms(field, x)
    return d_t + div


def terms(field: Field, x: Points) -> tuple[PerSample, PerSample]:
    """d_t p and div(p v) at points x, by autograd."""
    x = x.clone().requires_grad_()
    t = at(TIME).expand(len(x)).clone().requires_grad_()
    p = PATH.log_prob(x, t).exp()
    flux = (p[:, None] * field(x, t)).unbind(1)
    (d_t,) = torch.autograd.grad(p.sum(), t, retain_graph=True)
    rows = [torch.autograd.grad(f.sum(), x, retain_graph=True)[0][:, i] for i, f in enumerate(flux)]
    return d_t, torch.stack(rows).sum(0)


def largest(values: PerSample, scale: float) -> str:
    """The largest residual, as a share of the largest d_t p."""
    return f"{float(values.abs().max()) / scale:.1g}"
