r"""Affine paths: six curves, and everything that follows from them.

    x_t = alpha(t) x1 + sigma(t) x0 + gamma(t) eps                              (1)
    u_t = alpha'(t) x1 + sigma'(t) x0 + gamma'(t) eps                           (2)

with eps ~ N(0, I) independent of the pair. For a Gaussian source, x_t given x1 is N(alpha x1, V I) with
V = sigma^2 + gamma^2, and the same velocity reads

    u_t(x | x1) = (V' / 2V) (x - alpha x1) + alpha' x1                          (3)

(with gamma > 0, (3) is the mean of (2) given x_t and x1). `half_d_variance` = V'/2 = sigma sigma' + gamma gamma' is
given as one quantity, because at the ends of several paths it is finite while its factors are not.

Time runs from the source at t = 0 to the data at t = 1, and no curve is ever clipped. Where E|u_t|^2 diverges at an
end, `t_range` names where training and sampling stay, by default 1e-3 away from it.

Source: Lipman et al. 2023, arXiv:2210.02747, eqs. 10-15 and Theorem 3; for gamma, Albergo et al. 2023,
arXiv:2303.08797.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fmlightning.flow.paths.path import Path, PathSample
from fmlightning.flow.shapes import (
    Points,
    Times,
    expand_like,
    require_like,
    require_time,
    require_times,
)

Curve = Callable[[Tensor], Tensor]


class Coefficients(NamedTuple):
    """The six curves at a time."""

    alpha: Tensor
    sigma: Tensor
    gamma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    d_gamma: Tensor


class AffinePath(Path):
    """A path of curves, equations (1) to (3): alpha on the data, sigma on the source, gamma on extra noise."""

    @abstractmethod
    def alpha(self, t: Times) -> Times: ...

    @abstractmethod
    def sigma(self, t: Times) -> Times: ...

    @abstractmethod
    def d_alpha(self, t: Times) -> Times: ...

    @abstractmethod
    def d_sigma(self, t: Times) -> Times: ...

    def gamma(self, t: Times) -> Times:
        return torch.zeros_like(t)

    def d_gamma(self, t: Times) -> Times:
        return torch.zeros_like(t)

    def half_d_variance(self, t: Times) -> Times:
        """sigma sigma' + gamma gamma', finite where the curves allow it."""
        return self.sigma(t) * self.d_sigma(t) + self.gamma(t) * self.d_gamma(t)

    def variance(self, t: Times) -> Times:
        """V = sigma^2 + gamma^2, the variance of x_t given x1 for a standard normal source."""
        return self.sigma(t) ** 2 + self.gamma(t) ** 2

    def std(self, t: Times) -> Times:
        """sqrt(V)."""
        return self.sigma(t) if not self.stochastic else self.variance(t).sqrt()

    def d_std(self, t: Times) -> Times:
        """Derivative of `std`; infinite at the singular end of a path."""
        return self.d_sigma(t) if not self.stochastic else self.half_d_variance(t) / self.std(t)

    @property
    def stochastic(self) -> bool:
        """Whether the path adds noise of its own, gamma > 0."""
        return type(self).gamma is not AffinePath.gamma

    def sample(self, x0: Points, x1: Points, t: Times, noise: Points | None = None) -> PathSample:
        """The point x_t and the conditional velocity u_t of a pair, equations (1) and (2).

            point = Linear().sample(x0, x1, t)

        Args:
            x0: source points, (B, *S).
            x1: data points, (B, *S).
            t: times in [0, 1], (B,) or ().
            noise: standard normal noise, (B, *S); needed by paths with gamma > 0 and unused by the others.

        Raises:
            ValueError: shapes differ, t lies outside [0, 1], or noise is missing.
        """
        require_pair(x0, x1, t)
        require_noise(self, noise, x1)
        xt = expand_like(self.alpha(t), x1) * x1 + expand_like(self.sigma(t), x0) * x0
        ut = expand_like(self.d_alpha(t), x1) * x1 + expand_like(self.d_sigma(t), x0) * x0
        if self.stochastic and noise is not None:
            xt = xt + expand_like(self.gamma(t), noise) * noise
            ut = ut + expand_like(self.d_gamma(t), noise) * noise
        return PathSample(xt, ut, t, x0, x1, noise)

    def velocity(self, xt: Points, x1: Points, t: Times) -> Points:
        """u_t(x | x1) for a Gaussian source, equation (3).

        Raises:
            ValueError: shapes differ, t lies outside [0, 1], or no noise is left at t.
        """
        require_like("xt", xt, "x1", x1)
        require_times(t, len(x1))
        variance = self.variance(t)
        require_width(variance, t)
        rate = expand_like(self.half_d_variance(t) / variance, xt)
        mean, d_alpha = expand_like(self.alpha(t), x1) * x1, expand_like(self.d_alpha(t), x1)
        return rate * (xt - mean) + d_alpha * x1

    def start(self, x0: Points, t: float = 0.0, noise: Points | None = None) -> Points:
        """The points where sampling starts: sigma(t) x0 + gamma(t) noise, the path without its data.

        Raises:
            ValueError: t is no time of a path, or noise is missing.
        """
        require_time("t", t)
        require_noise(self, noise, x0)
        time = torch.tensor(t, dtype=x0.dtype, device=x0.device)
        x = self.sigma(time) * x0
        if not self.stochastic or noise is None:
            return x
        return x + self.gamma(time) * noise

    def start_scales(self, t: float) -> tuple[float, float]:
        require_time("t", t)
        time = torch.tensor(t, dtype=torch.float64)
        return float(self.std(time)), float(self.gamma(time))

    def __call__(self, t: Times) -> Coefficients:
        return Coefficients(
            self.alpha(t),
            self.sigma(t),
            self.gamma(t),
            self.d_alpha(t),
            self.d_sigma(t),
            self.d_gamma(t),
        )

    def alpha_over_sigma(self, t: Times) -> Times:
        """Signal-to-noise ratio alpha / sqrt(V), not squared; infinite where the noise is gone."""
        return self.alpha(t) / self.std(t)

    def alpha_over_sigma_inverse(self, ratio: Times) -> Times:
        """The time at which `alpha_over_sigma` reaches a value; a value that no time reaches gives the nearest end."""
        return bisect(self.alpha_over_sigma, ratio)


def derivative(curve: Curve, t: Times) -> Tensor:
    """The derivative of a curve at each time, by forward-mode autodiff."""
    t = t.contiguous()  # an expanded time is one number in memory, which jvp refuses
    return torch.func.jvp(curve, (t,), (torch.ones_like(t),))[1]


def bisect(curve: Curve, value: Tensor) -> Tensor:
    """Where in [0, 1] an increasing curve reaches a value, in float64; the nearest end if it does not."""
    target = value.double()
    low, high = torch.zeros_like(target), torch.ones_like(target)
    beyond = target <= curve(low)
    for _ in range(60):
        middle = (low + high) / 2
        below = curve(middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(beyond, 0.0, (low + high) / 2).to(value.dtype)


def require_pair(x0: Tensor, x1: Tensor, t: Tensor) -> None:
    require_like("x0", x0, "x1", x1)
    require_times(t, len(x1))


def require_noise(path: Path, noise: Tensor | None, x: Tensor) -> None:
    if not path.stochastic:
        return
    if noise is None:
        raise ValueError(f"{path} has gamma > 0: pass noise, standard normal noise like x1")
    require_like("noise", noise, "the points", x)


def require_width(width: Tensor, t: Tensor) -> None:
    # elsewhere the answer would make the host wait for the device
    if width.device.type == "cpu" and not bool((width > 0).all()):
        raise ValueError(
            f"no noise is left on the path at t={float(t.max()):g}, so x_t = x1 and its velocity does not follow "
            "from x_t: stay before that time, or take `sample`, which knows x0"
        )
