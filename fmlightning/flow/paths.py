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
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fmlightning.flow.schedules import Schedule, derivative
from fmlightning.flow.shapes import Points, Times, expand_like


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
        c = self.schedule(t)
        xt = expand_like(c.alpha, x1) * x1 + expand_like(c.sigma, x0) * x0
        ut = expand_like(c.d_alpha, x1) * x1 + expand_like(c.d_sigma, x0) * x0
        if self.schedule.has_gamma:
            if eps is None:
                raise ValueError(missing_noise(self.schedule))
            xt = xt + expand_like(c.gamma, eps) * eps
            ut = ut + expand_like(c.d_gamma, eps) * eps
        return PathSample(xt, ut, t, x0, x1, eps)

    def velocity(self, xt: Points, x1: Points, t: Times) -> Points:
        """u_t(x | x1) for a Gaussian source, equation (3)."""
        s = self.schedule
        rate = expand_like(s.half_d_variance(t) / s.variance(t), xt)
        return rate * (xt - expand_like(s.alpha(t), x1) * x1) + expand_like(s.d_alpha(t), x1) * x1

    def start(self, x0: Points, t: float = 0.0, eps: Points | None = None) -> Points:
        """Where sampling starts: sigma(t) x0 + gamma(t) eps, the path without its data."""
        time = torch.tensor(t, dtype=x0.dtype, device=x0.device)
        x = self.schedule.sigma(time) * x0
        if not self.schedule.has_gamma:
            return x
        if eps is None:
            raise ValueError(missing_noise(self.schedule))
        return x + self.schedule.gamma(time) * eps


Curve = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GaussianPath:
    """The path N(mu_t(x1), sigma_t(x1)^2 I) of any mean and scale, equations (4) and (5).

        GaussianPath(lambda x1, t: expand_like(t, x1) * x1, lambda x1, t: 1 - t)  # AffinePath(Linear())

    Derivatives are taken by forward-mode autodiff.

    Args:
        mu: `(x1, t) -> mean`, (B, *S).
        sigma: `(x1, t) -> scale`, (B,) or (), positive before t = 1.
    """

    mu: Curve
    sigma: Curve

    def sample(self, x0: Points, x1: Points, t: Times) -> PathSample:
        """The point x_t and its velocity, with no division: the derivative of (4).

        Args:
            x0: source points, (B, *S).
            x1: data points, (B, *S).
            t: times in [0, 1], (B,) or ().
        """
        require_pair(x0, x1, t)
        mu, d_mu, sigma, d_sigma = self.curves(x1, t)
        return PathSample(mu + sigma * x0, d_mu + d_sigma * x0, t, x0, x1, None)

    def velocity(self, xt: Points, x1: Points, t: Times) -> Points:
        """u_t(x | x1), equation (5)."""
        mu, d_mu, sigma, d_sigma = self.curves(x1, t)
        return d_sigma / sigma * (xt - mu) + d_mu

    def curves(self, x1: Points, t: Times) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean and its derivative, the scale and its derivative, each broadcast over a sample."""

        def mu(t: Tensor) -> Tensor:
            return self.mu(x1, t)

        def sigma(t: Tensor) -> Tensor:
            return expand_like(self.sigma(x1, t), x1)

        return mu(t), derivative(mu, t), sigma(t), derivative(sigma, t)


def require_pair(x0: Tensor, x1: Tensor, t: Tensor) -> None:
    if x0.shape != x1.shape:
        raise ValueError(
            f"x0 {tuple(x0.shape)} and x1 {tuple(x1.shape)} must have one shape (B, *S)"
        )
    if t.shape not in ((), x1.shape[:1]):
        raise ValueError(
            f"t {tuple(t.shape)} must be one time, (), or one for each sample, ({len(x1)},)"
        )
    # elsewhere the answer would make the host wait for the device at every step
    if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t from {float(t.min()):g} to {float(t.max()):g} must lie in [0, 1]")


def missing_noise(schedule: Schedule) -> str:
    return f"{schedule} has gamma > 0: pass eps, standard normal noise like x1"
