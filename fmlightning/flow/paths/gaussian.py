r"""Gaussian paths of any mean and scale.

    x_t = mu_t(x1) + sigma_t(x1) x0                                             (1)
    u_t(x | x1) = sigma_t'(x1) / sigma_t(x1) (x - mu_t(x1)) + mu_t'(x1)         (2)

Source: Lipman et al. 2023, arXiv:2210.02747, Theorem 3.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fmlightning.flow.paths.affine import derivative, require_pair, require_width
from fmlightning.flow.paths.path import Path, PathSample
from fmlightning.flow.shapes import Points, Times, expand_like, require_like


class PathCurve(ABC):
    """A mean or a scale of a `GaussianPath`: the class of one's own that a config names; Python takes any function."""

    @abstractmethod
    def __call__(self, x1: Points, t: Times) -> Tensor:
        """The mean, (B, *S), or the scale, (B,) or (), at data points x1 and times t."""


Curve = PathCurve | Callable[..., Any]


@dataclass(frozen=True)
class GaussianPath(Path):
    """The path N(mu_t(x1), sigma_t(x1)^2 I) of any mean and scale, equations (1) and (2).

        GaussianPath(lambda x1, t: expand_like(t, x1) * x1, lambda x1, t: 1 - t)  # Linear()

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

    def sample(self, x0: Points, x1: Points, t: Times, noise: Points | None = None) -> PathSample:
        """The point x_t and its velocity, with no division: the derivative of (1).

        Args:
            x0: source points, (B, *S).
            x1: data points, (B, *S).
            t: times in [0, 1], (B,) or ().
            noise: not used.
        """
        require_pair(x0, x1, t)
        self.require_ends(x1, t)
        mu, d_mu, sigma, d_sigma = self.curves(x1, t)
        return PathSample(mu + sigma * x0, d_mu + d_sigma * x0, t, x0, x1, None)

    def velocity(self, xt: Points, x1: Points, t: Times) -> Points:
        """u_t(x | x1), equation (2).

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
