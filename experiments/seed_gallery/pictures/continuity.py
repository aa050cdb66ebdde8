r"""The continuity equation, term by term and as a residual.

    d_t p + div(p u) = 0                                                            (1)

A velocity carries p_t if and only if (1) holds: mass that leaves a place was there. The exact field passes. So does
u + w with p w the rotated gradient of p, whose divergence is zero: a path has many velocities. The exact field of an
earlier time fails. Both terms come from autograd, so the zero is found and not put in.

Source: Lipman et al. 2023, arXiv:2210.02747, eq. 26.
"""

from collections.abc import Iterator

import torch
from matplotlib.figure import Figure

from fmlightning.flow.schedules import Linear
from fmlightning.flow.shapes import Field, PerSample, Points
from fmlightning.plotting import finish, streamlines

from .scene import DATA, LIMITS, Detail, at, lattice, shade

PATH = DATA.along(Linear())
TIME, LATE = 0.6, 0.1


def exact(x: Points, t: torch.Tensor) -> Points:
    return PATH.velocity(x, t)


def turned(x: Points, t: torch.Tensor) -> Points:
    """u + w, p w = c rot(grad p)."""
    gradient = PATH.score(x, t)
    return exact(x, t) + 0.2 * torch.stack((-gradient[:, 1], gradient[:, 0]), 1)


def late(x: Points, t: torch.Tensor) -> Points:
    """A velocity that is not that of the path: u of an earlier time."""
    return exact(x, t - LATE)


FIELDS: dict[str, Field] = {
    "exact u": exact,
    "u + w, div(p w) = 0": turned,
    f"wrong: u of t - {LATE:g}": late,
}


def draw(detail: Detail) -> Iterator[tuple[str, Figure]]:
    figure = Figure(figsize=(13.2, 5.6), layout="constrained")
    axes = figure.subplots(2, 4)
    x = lattice(detail.side)
    change = terms(exact, x)[0]
    scale = float(change.abs().max())
    for axis in axes[0, 1:]:
        shade(axis, lambda x: PATH.log_prob(x, at(TIME)), detail.side, "Blues")
    for column, (name, field) in zip(axes.T[1:], FIELDS.items(), strict=True):
        streamlines(column[0], field, TIME, LIMITS, torch.device("cpu"))
        finish(column[0], name, LIMITS)
    panels = [(axes[0, 0], "$\\partial_t p$", change),
              (axes[1, 0], "div(p u), exact u", terms(exact, x)[1])]  # fmt: skip
    for axis, field in zip(axes[1, 1:], FIELDS.values(), strict=True):
        residual = sum(terms(field, x))
        panels.append((axis, f"residual: at most {largest(residual, scale)}", residual))
    for axis, title, values in panels:
        image = axis.imshow(
            values.reshape(detail.side, detail.side), extent=LIMITS, origin="lower",
            cmap="RdBu_r", vmin=-scale, vmax=scale, interpolation="bilinear", aspect="auto",
        )  # fmt: skip
        finish(axis, title, LIMITS)
    figure.colorbar(image, ax=axes[:, 3], shrink=0.7, label="density per unit of time")
    yield "continuity.png", figure


def terms(field: Field, x: Points) -> tuple[PerSample, PerSample]:
    """d_t p and div(p v) at points x, by autograd."""
    x = x.clone().requires_grad_()
    t = at(TIME).expand(len(x)).clone().requires_grad_()
    p = PATH.log_prob(x, t).exp()
    flux = (p[:, None] * field(x, t)).unbind(1)
    (d_t,) = torch.autograd.grad(p.sum(), t, retain_graph=True)
    rows = [torch.autograd.grad(f.sum(), x, retain_graph=True)[0][:, i] for i, f in enumerate(flux)]
    return d_t, torch.stack(rows).sum(0)


def largest(residual: PerSample, scale: float) -> str:
    """The largest residual, as a share of the largest d_t p."""
    return f"{float(residual.abs().max()) / scale:.1g} of the scale"
