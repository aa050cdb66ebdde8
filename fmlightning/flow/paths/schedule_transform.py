r"""Change of path: train on one path, sample along another.

Two paths with the ratios alpha / std and abar / sbar pass through the same laws, up to scale, in another
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
from torch import Tensor, nn

from fmlightning.flow.guidance import GuidedField
from fmlightning.flow.models import NetworkField, require_one_noise
from fmlightning.flow.paths.schedules import Schedule
from fmlightning.flow.shapes import Field, Labels, Points, Times, expand_like, require_times

EDGE = 1e-4
"""How close to an end at which (3) is singular the field is taken: closer, t' would magnify a network's error."""


class Change(NamedTuple):
    """Where a time r of one path lies on the other: time, scale, and their derivatives in r."""

    t: Tensor
    s: Tensor
    d_t: Tensor
    d_s: Tensor


class ScheduleTransformedField(nn.Module):
    """The field of a trained network along another path, equation (2).

    Where the ratios of the two paths have different ranges, it exists only for the times that both reach.

    Args:
        field: the trained field.
        schedule: the curves of the path to sample along.

    Attributes:
        interval: the times of the new path at which the field exists.
        regular: the part of the interval where (3) is finite; outside it the field is that of its nearest end.
        floor: abar / sbar where sampling starts, the share of the data that starting from noise alone leaves
            out: no tolerance removes it. 0 where the ratio starts from zero.

    Raises:
        ValueError: the paths have no ratio in common; or one has gamma > 0 and the field another source or
            coupling.
    """

    def __init__(self, field: NetworkField | GuidedField, schedule: Schedule) -> None:
        super().__init__()
        for path in (field.schedule, schedule):
            require_one_noise("a change of path", path, field.source, field.independent)
        self.field, self.schedule = field, schedule
        self.interval = common_interval(field, schedule)
        self.regular = regular_interval(field.schedule, schedule, self.interval)
        self.floor = float(
            schedule.alpha_over_sigma(torch.tensor(self.interval[0], dtype=torch.float64))
        )
        self.source, self.independent = field.source, field.independent

    def forward(self, x: Points, r: Times, y: Labels | None = None) -> Points:
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

    def given(self, y: Labels | None) -> Field:
        """The field for one label of each sample."""
        return self if y is None else lambda x, r: self(x, r, y)

    def change(self, x: Points, r: Times) -> Change:
        require_times(r, len(x))
        outside = self.outside(r)
        c = change(self.field.schedule, self.schedule, r.double().clamp(*self.regular))
        c = c._replace(s=c.s.where(~outside, torch.nan))
        return Change(*(value.to(x.dtype) for value in c))

    def outside(self, r: Times) -> Tensor:
        """Where r lies outside the interval by more than its rounding."""
        low, high = self.interval
        rounding = torch.finfo(r.dtype).eps
        outside = (r < low - rounding) | (r > high + rounding)
        if r.device.type == "cpu" and bool(outside.any()):
            raise ValueError(
                f"r from {float(r.min()):g} to {float(r.max()):g} leaves [{low:g}, {high:g}], the times of "
                f"{self.schedule} whose ratio of data to noise the field trained on {self.field.schedule} has seen: "
                "sample inside `interval`"
            )
        return outside

    def extra_repr(self) -> str:
        low, high = self.interval
        return f"from {self.field.schedule} to {self.schedule} on [{low:g}, {high:g}], floor={self.floor:.2g}"


def change(trained: Schedule, sampled: Schedule, r: Times) -> Change:
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


def curves(schedule: Schedule, t: Times) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return schedule.alpha(t), schedule.d_alpha(t), schedule.std(t), schedule.d_std(t)


def common_interval(field: NetworkField | GuidedField, schedule: Schedule) -> tuple[float, float]:
    """The times of the new path whose ratio the trained field has."""
    trained = field.schedule.alpha_over_sigma(torch.tensor(field.interval, dtype=torch.float64))
    low, high = schedule.alpha_over_sigma_inverse(trained).tolist()
    low, high = max(low, schedule.interval[0]), min(high, schedule.interval[1])
    if not low < high:
        raise ValueError(
            f"{schedule} and {field.schedule} have no signal-to-noise ratio in common: sampling along one "
            "with a network trained on the other needs paths whose ratios overlap"
        )
    return low, high


def regular_interval(
    trained: Schedule, sampled: Schedule, interval: tuple[float, float]
) -> tuple[float, float]:
    """The interval, off the ends where (3) is singular."""
    low, high = interval
    ends = change(trained, sampled, torch.tensor([low, high], dtype=torch.float64))
    finite = torch.stack(ends).isfinite().all(0).tolist()
    return low if finite[0] else low + EDGE, high if finite[1] else high - EDGE
