r"""Change of path: train on one path, sample along another.

Two paths with the ratios alpha / std and abar / sbar pass through the same distributions, up to scale, in another
time. With t(r) where the ratios agree and s the ratio of the scales,

    alpha(t) / std(t) = abar(r) / sbar(r),   s = sbar(r) / std(t) = abar(r) / alpha(t),   x_r = s x_t       (1)

the field of the second path follows from that of the first:

    ubar(x, r) = (s' / s) x + s t' u(x / s, t)                                                              (2)
    t' = Dbar / (D s^2),   D = alpha' std - alpha std'                                                      (3)

Either form of s and of its derivative divides by zero at one end, and the other holds there. Where (3) is 0 / 0
itself, because the ratio of the trained path starts flat (alpha'(0) = 0, as of t^2), u is zero, t' infinite and
their product has a limit that no value of u tells. Between such an end and `EDGE` beside it the field is that at
`EDGE`, so that it starts where the path does and particles end within 1e-5 of where they should. With gamma > 0 on
either path, (2) needs a Gaussian source that is independent of the data.

Source: Lipman et al. 2024, arXiv:2412.06264, sec. 4.6; (3) is the derivative of (1).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fmlightning.flow.guidance import GuidedField
from fmlightning.flow.models import Model, NetworkField, require_one_noise
from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.paths.predictions import affine
from fmlightning.flow.shapes import Labels, Points, Times, expand_like, require_times

EDGE = 1e-4
"""How close to an end at which (3) is singular the field is taken: closer, t' would magnify a network's error."""


class Change(NamedTuple):
    """Where a time r of one path lies on the other: time, scale, and their derivatives in r."""

    t: Tensor
    s: Tensor
    d_t: Tensor
    d_s: Tensor


class ScheduleTransformedField(Model):
    """The field of a trained network along another path, equation (2).

    Where the ratios of the two paths have different ranges, it exists only for the times that both reach.

    Args:
        field: the trained field.
        path: the curves of the path to sample along.

    Attributes:
        t_range: the times of the new path at which the field exists.
        regular: the part of the interval where (3) is finite; outside it the field is that of its nearest end.
        floor: abar / sbar where sampling starts, the share of the data that starting from noise alone leaves
            out: no tolerance removes it. 0 where the ratio starts from zero.

    Raises:
        ValueError: the paths have no ratio in common; or one has gamma > 0 and the field another source or
            coupling.
    """

    offers = frozenset({"velocity"})

    def __init__(self, field: NetworkField | GuidedField, path: AffinePath) -> None:
        super().__init__()
        trained = affine(field.path, "a change of path")
        for each in (trained, path):
            require_one_noise("a change of path", each, field.source, field.independent)
        self.field, self.trained, self.path = field, trained, path
        self.source, self.independent = field.source, field.independent
        self.t_range = common_range(field, path)
        self.regular = regular_range(trained, path, self.t_range)
        self.floor = float(
            path.alpha_over_sigma(torch.tensor(self.t_range[0], dtype=torch.float64))
        )
        self.source, self.independent = field.source, field.independent

    def velocity(self, x: Points, r: Times, y: Labels | None = None) -> Points:
        """The velocity at x (B, *S) and r, (B,) or ().

        Raises:
            ValueError: r lies outside the interval. On other devices than the CPU the velocity is nan there, which
                solvers report.
        """
        c = self.change(x, r)
        s = expand_like(c.s, x)
        v = self.field(x / s, c.t, y)
        return expand_like(c.d_s, x) / s * x + s * expand_like(c.d_t, x) * v

    def data(self, x: Points, r: Times, y: Labels | None = None) -> Points:
        """E[x1 | x_r = x], the step that ends sampling where the field stops short of r = 1."""
        c = self.change(x, r)
        return self.field.data(x / expand_like(c.s, x), c.t, y)

    def change(self, x: Points, r: Times) -> Change:
        require_times(r, len(x))
        outside = self.outside(r)
        c = change(self.trained, self.path, r.double().clamp(*self.regular))
        c = c._replace(s=c.s.where(~outside, torch.nan))
        return Change(*(value.to(x.dtype) for value in c))

    def outside(self, r: Times) -> Tensor:
        """Where r lies outside the interval by more than its rounding."""
        low, high = self.t_range
        rounding = torch.finfo(r.dtype).eps
        outside = (r < low - rounding) | (r > high + rounding)
        if r.device.type == "cpu" and bool(outside.any()):
            raise ValueError(
                f"r from {float(r.min()):g} to {float(r.max()):g} leaves [{low:g}, {high:g}], the times of "
                f"{self.path} whose ratio of data to noise the field trained on {self.field.path} has seen: "
                "sample inside `t_range`"
            )
        return outside

    def extra_repr(self) -> str:
        low, high = self.t_range
        return (
            f"from {self.field.path} to {self.path} on [{low:g}, {high:g}], floor={self.floor:.2g}"
        )


def change(trained: AffinePath, sampled: AffinePath, r: Times) -> Change:
    """Equations (1) and (3) at times r of the path sampled along."""
    t = trained.alpha_over_sigma_inverse(sampled.alpha_over_sigma(r))
    alpha, d_alpha, std, d_std = curves(trained, t)
    abar, d_abar, sbar, d_sbar = curves(sampled, r)
    data_end = abar > sbar
    s = torch.where(data_end, abar / alpha, sbar / std)
    d_t = (d_abar * sbar - abar * d_sbar) / (d_alpha * std - alpha * d_std) / s**2
    d_s = torch.where(
        data_end, (d_abar - s * d_alpha * d_t) / alpha, (d_sbar - s * d_std * d_t) / std
    )
    return Change(t, s, d_t, d_s)


def curves(path: AffinePath, t: Times) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return path.alpha(t), path.d_alpha(t), path.std(t), path.d_std(t)


def common_range(field: NetworkField | GuidedField, path: AffinePath) -> tuple[float, float]:
    """The times of the new path whose ratio the trained field has."""
    trained = field.path.alpha_over_sigma(torch.tensor(field.t_range, dtype=torch.float64))
    low, high = path.alpha_over_sigma_inverse(trained).tolist()
    low, high = max(low, path.t_range[0]), min(high, path.t_range[1])
    if not low < high:
        raise ValueError(
            f"{path} and {field.path} have no signal-to-noise ratio in common: sampling along one "
            "with a network trained on the other needs paths whose ratios overlap"
        )
    return low, high


def regular_range(
    trained: AffinePath, sampled: AffinePath, t_range: tuple[float, float]
) -> tuple[float, float]:
    """The interval, off the ends where (3) is singular."""
    low, high = t_range
    ends = change(trained, sampled, torch.tensor([low, high], dtype=torch.float64))
    finite = torch.stack(ends).isfinite().all(0).tolist()
    return low if finite[0] else low + EDGE, high if finite[1] else high - EDGE
