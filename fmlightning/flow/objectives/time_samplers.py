r"""When to look: the distribution of training times, and the grids of solvers.

A training distribution is given by its quantile function, so that one keyed uniform number makes one time:

    t = t_min + (t_max - t_min) quantile(u),  u ~ U(0, 1)                                 (1)

and has the density 1 / quantile'(u) at quantile(u). The literature on images often runs time from the data to
the noise; distributions are stated here in our time, from the source at 0 to the data at 1.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from scipy.special import betaincinv
from torch import Tensor

from fmlightning.flow.paths.affine import bisect
from fmlightning.flow.shapes import PerSample, require_positive


class TimeSampler(ABC):
    """A distribution on (0, 1), placed on the interval of the path."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Times from uniform numbers: the inverse of the distribution function."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Probability density on (0, 1)."""

    def draw(self, u: PerSample, t_range: tuple[float, float] = (0.0, 1.0)) -> PerSample:
        """Training times of one batch from independent uniform numbers, (B,)."""
        low, high = t_range
        t = self.quantile(u)
        return t if (low, high) == (0.0, 1.0) else low + (high - low) * t


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Every time equally often: the CFM loss as written."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    """log(t / (1 - t)) ~ N(mean, std^2): the middle of the path more often than its ends.

    On the linear path the noise level sigma = (1 - t) / t of EDM is then log-normal with mean -mean: EDM's
    P_mean = -1.2, P_std = 1.2 is LogitNormal(1.2, 1.2).
    Source: Esser et al. 2024 (SD3), arXiv:2403.03206, eq. 19, with the sign of the mean in our time.

    Args:
        mean: positive looks more often near the data.
        std: spread; small concentrates on one time.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "std")

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-z.square() / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True)
class Mode(TimeSampler):
    """SD3's distribution with heavy tails: the middle of the path for scale > 0, its ends for scale < 0.

        quantile(u) = u + scale (u - sin^2(pi u / 2))

    Symmetric in time. Source: Esser et al. 2024 (SD3), arXiv:2403.03206, eq. 20.

    Args:
        scale: from -1 to 2 / (pi - 2) = 1.75; 0 is uniform, 1.29 is SD3's.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"scale={self.scale} must lie in [-1, {2 / (math.pi - 2):.4g}], or time would run backwards"
            )

    def quantile(self, u: Tensor) -> Tensor:
        return u + self.scale * (u - torch.sin(math.pi / 2 * u) ** 2)

    def density(self, t: Tensor) -> Tensor:
        u = bisect(self.quantile, t)
        return 1 / (1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * u)))


@dataclass(frozen=True)
class CosMap(TimeSampler):
    """The distribution under which the linear path sees the noise levels of the cosine path uniformly.

    Source: Esser et al. 2024 (SD3), arXiv:2403.03206, eq. 21.
    """

    def quantile(self, u: Tensor) -> Tensor:
        s, c = torch.sin(math.pi / 2 * u), torch.sin(math.pi / 2 * (1 - u))
        return s / (s + c)

    def density(self, t: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


@dataclass(frozen=True)
class Beta(TimeSampler):
    """The beta distribution, with density t^(a - 1) (1 - t)^(b - 1) / B(a, b). Drawn on the CPU, by scipy.

    Args:
        a: above 1 avoids the source, below 1 seeks it; 1 is neutral.
        b: the same for the data.
    """

    a: float = 1.0
    b: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "a", "b")

    def quantile(self, u: Tensor) -> Tensor:
        t = betaincinv(self.a, self.b, u.double().cpu().numpy())
        return torch.as_tensor(t, dtype=u.dtype, device=u.device)

    def density(self, t: Tensor) -> Tensor:
        log_norm = math.lgamma(self.a) + math.lgamma(self.b) - math.lgamma(self.a + self.b)
        return t ** (self.a - 1) * (1 - t) ** (self.b - 1) * math.exp(-log_norm)


@dataclass(frozen=True)
class Power(TimeSampler):
    """The density (power + 1) t^power.

    Args:
        power: above -1; positive looks more often near the data, negative near the source, 0 is uniform.
    """

    power: float = 0.0

    def __post_init__(self) -> None:
        if not self.power > -1:
            raise ValueError(
                f"power={self.power} must be above -1, or the distribution has no density"
            )

    def quantile(self, u: Tensor) -> Tensor:
        return u ** (1 / (self.power + 1))

    def density(self, t: Tensor) -> Tensor:
        return (self.power + 1) * t**self.power


@dataclass(frozen=True)
class Stratified(TimeSampler):
    """Times of low discrepancy: each of B equal slices of a distribution gives one time of the batch.

    The slices are dealt out in the order of the independent numbers u, and one shift, their sum modulo 1, is
    shared. As order and sum are independent, each time follows the distribution exactly and slices go to samples at
    random. On several devices, pass the u of the global batch and keep one's own part.

    Source: Kingma et al. 2021 (VDM), arXiv:2107.00630, app. I.1.

    Args:
        of: the distribution.
    """

    of: TimeSampler = field(default_factory=Uniform)

    def quantile(self, u: Tensor) -> Tensor:
        return self.of.quantile(u)

    def density(self, t: Tensor) -> Tensor:
        return self.of.density(t)

    def draw(self, u: PerSample, t_range: tuple[float, float] = (0.0, 1.0)) -> PerSample:
        """Training times of one batch from independent uniform numbers, (B,)."""
        return self.of.draw(stratify(u), t_range)


def stratify(u: PerSample) -> PerSample:
    """(slice + shift) / B: one number in each of B equal slices of (0, 1)."""
    slices, shift = u.argsort(), u.double().sum() % 1
    return ((slices + shift) / len(u)).to(u.dtype)
