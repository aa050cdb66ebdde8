r"""Probability paths: from a pair of points to a point on the way and its velocity.

    x_t = alpha(t) x1 + sigma(t) x0 + gamma(t) eps                              (1)
    u_t = alpha'(t) x1 + sigma'(t) x0 + gamma'(t) eps                           (2)

For a Gaussian source the path given x1 is N(alpha x1, V I), and the same velocity reads

    u_t(x | x1) = (V' / 2V) (x - alpha x1) + alpha' x1                          (3)

(with gamma > 0, (3) is the mean of (2) given x_t and x1). More generally, for any mean and scale that
depend on x1,

    x_t = mu_t(x1) + sigma_t(x1) x0                                             (4)
    u_t(x | x1) = sigma_t'(x1) / sigma_t(x1) (x - mu_t(x1)) + mu_t'(x1)         (5)

Source: Lipman et al. 2023, arXiv:2210.02747, eqs. 10-15 and Theorem 3; for gamma, Albergo et al. 2023,
arXiv:2303.08797.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fmlightning.flow.paths.schedules import Schedule, derivative
from fmlightning.flow.shapes import (
    Points,
    Times,
    expand_like,
    require_like,
    require_time,
    require_times,
)


class PathSample(NamedTuple):
    """A point on the path with all that it was made of: the input of every objective."""

    xt: Tensor
    ut: Tensor
    t: Tensor
    x0: Tensor
    x1: Tensor
    eps: Tensor | None


@dataclass(frozen=True)
class AffinePath:
    """The path of a schedule, equations (1) to (3)."""

    schedule: Schedule

    def sample(self, x0: Points, x1: Points, t: Times, eps: Points | None = None) -> PathSample:
        """The point x_t and the conditional velocity u_t of a pair.

        Args:
            x0: source points, (B, *S).
            x1: data points, (B, *S).
            t: times in [0, 1], (B,) or ().
            eps: standard normal noise, (B, *S); needed by schedules with gamma > 0 and unused by the others.

        Raises:
            ValueError: shapes differ, t lies outside [0, 1], or eps is missing.
        """
        require_pair(x0, x1, t)
        require_noise(self.schedule, eps, x1)
        s = self.schedule
        xt = expand_like(s.alpha(t), x1) * x1 + expand_like(s.sigma(t), x0) * x0
        ut = expand_like(s.d_alpha(t), x1) * x1 + expand_like(s.d_sigma(t), x0) * x0
        if s.stochastic and eps is not None:
            xt = xt + expand_like(s.gamma(t), eps) * eps
            ut = ut + expand_like(s.d_gamma(t), eps) * eps
        return PathSample(xt, ut, t, x0, x1, eps)

    def velocity(self, xt: Points, x1: Points, t: Times) -> Points:
        """u_t(x | x1) for a Gaussian source, equation (3).

        Raises:
            ValueError: shapes differ, t lies outside [0, 1], or no noise is left at t.
        """
        require_like("xt", xt, "x1", x1)
        require_times(t, len(x1))
        s = self.schedule
        variance = s.variance(t)
        require_width(variance, t)
        rate = expand_like(s.half_d_variance(t) / variance, xt)
        return rate * (xt - expand_like(s.alpha(t), x1) * x1) + expand_like(s.d_alpha(t), x1) * x1

    def start(self, x0: Points, t: float = 0.0, eps: Points | None = None) -> Points:
        """Where sampling starts: sigma(t) x0 + gamma(t) eps, the path without its data."""
        require_time("t", t)
        require_noise(self.schedule, eps, x0)
        time = torch.tensor(t, dtype=x0.dtype, device=x0.device)
        x = self.schedule.sigma(time) * x0
        if not self.schedule.stochastic or eps is None:
            return x
        return x + self.schedule.gamma(time) * eps


Curve = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GaussianPath:
    """The path N(mu_t(x1), sigma_t(x1)^2 I) of any mean and scale, equations (4) and (5).

        GaussianPath(lambda x1, t: expand_like(t, x1) * x1, lambda x1, t: 1 - t)  # AffinePath(Linear())

    Derivatives are taken by forward-mode autodiff. The first points that come are carried to both ends, once,
    to see that the path leads from the source to them.

    Args:
        mu: `(x1, t) -> mean`, (B, *S); 0 at t = 0 and x1 at t = 1.
        sigma: `(x1, t) -> scale`, (B,) or (), positive before t = 1; 1 at t = 0, and at t = 1 zero or small.
        end_tolerance: how far from those values the ends may be, the mean's in units of the largest |x1|; inf
            for a path that starts or ends elsewhere on purpose.

    Raises:
        ValueError: when first used, if the ends do not hold.
    """

    mu: Curve
    sigma: Curve
    end_tolerance: float = 1e-2
    seen: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def sample(self, x0: Points, x1: Points, t: Times) -> PathSample:
        """The point x_t and its velocity, with no division: the derivative of (4).

        Args:
            x0: source points, (B, *S).
            x1: data points, (B, *S).
            t: times in [0, 1], (B,) or ().
        """
        require_pair(x0, x1, t)
        self.require_ends(x1, t)
        mu, d_mu, sigma, d_sigma = self.curves(x1, t)
        return PathSample(mu + sigma * x0, d_mu + d_sigma * x0, t, x0, x1, None)

    def velocity(self, xt: Points, x1: Points, t: Times) -> Points:
        """u_t(x | x1), equation (5).

        Raises:
            ValueError: shapes differ, t lies outside [0, 1], or no noise is left at t.
        """
        require_pair(xt, x1, t)
        self.require_ends(x1, t)
        mu, d_mu, sigma, d_sigma = self.curves(x1, t)
        require_width(sigma, t)
        return d_sigma / sigma * (xt - mu) + d_mu

    def curves(self, x1: Points, t: Times) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean and its derivative, the scale and its derivative, each broadcast over a sample."""

        def mu(t: Tensor) -> Tensor:
            return self.mu(x1, t)

        def sigma(t: Tensor) -> Tensor:
            return expand_like(self.sigma(x1, t), x1)

        mean, scale = mu(t), sigma(t)
        require_like("mu(x1, t)", mean, "x1", x1)
        if scale.ndim and scale.shape[0] != len(x1):
            raise ValueError(
                f"sigma(x1, t) {tuple(scale.shape)} must be one scale, (), or one for each of {len(x1)} points"
            )
        return mean, derivative(mu, t), scale, derivative(sigma, t)

    def require_ends(self, x1: Points, t: Times) -> None:
        """Look at both ends once: at every step the answer would make the host wait for a device."""
        if self.seen:
            return
        for end, mean, scale in ((0.0, torch.zeros_like(x1), 1.0), (1.0, x1, 0.0)):
            time = torch.full_like(t, end)
            apart = float((self.mu(x1, time) - mean).abs().max() / x1.abs().max().clamp(min=1))
            wide = float((self.sigma(x1, time) - scale).abs().max())
            for name, wanted, off in (("mu", "x1" if end else "0", apart), ("sigma", scale, wide)):
                if not off <= self.end_tolerance:
                    raise ValueError(
                        f"{name}(x1, {end:g}) is {off:.4g} off, but a path from the source at t = 0 to the data at "
                        f"t = 1 needs {wanted} there, within end_tolerance={self.end_tolerance:g}"
                    )
        self.seen.append(True)


def require_pair(x0: Tensor, x1: Tensor, t: Tensor) -> None:
    require_like("x0", x0, "x1", x1)
    require_times(t, len(x1))


def require_noise(schedule: Schedule, eps: Tensor | None, x: Tensor) -> None:
    if not schedule.stochastic:
        return
    if eps is None:
        raise ValueError(f"{schedule} has gamma > 0: pass eps, standard normal noise like x1")
    require_like("eps", eps, "the points", x)


def require_width(width: Tensor, t: Tensor) -> None:
    # elsewhere the answer would make the host wait for the device
    if width.device.type == "cpu" and not bool((width > 0).all()):
        raise ValueError(
            f"no noise is left on the path at t={float(t.max()):g}, so x_t = x1 and its velocity does not follow "
            "from x_t: stay before that time, or take `sample`, which knows x0"
        )
