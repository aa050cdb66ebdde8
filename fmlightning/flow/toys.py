r"""Toy distributions in the plane: any may be the source or the data of a flow.

Each is vectorised, keyed, and carries its parameters, because the literature draws each in several
geometries. The defaults are those of the TorchCFM tutorials.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fmlightning.flow.shapes import PerSample, Points
from fmlightning.flow.sources import Source


class Toy(Source):
    """A distribution in the plane."""

    event_shape = (2,)


@dataclass(frozen=True)
class EightGaussians(Toy):
    """Eight equal Gaussians on a circle.

    Args:
        radius: distance of the centres from the origin.
        std: standard deviation of each. The tutorials of TorchCFM pass 0.316 as a variance, which is this 0.562.
    """

    radius: float = 5.0
    std: float = 0.562

    num_uniforms = 1

    def centres(self, like: Tensor) -> Tensor:
        """The eight centres, (8, 2)."""
        angle = torch.arange(8, dtype=like.dtype, device=like.device) * (math.pi / 4)
        return self.radius * torch.stack((angle.cos(), angle.sin()), -1)

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        return self.centres(z)[(8 * u[:, 0]).long().clamp(max=7)] + self.std * z

    def log_prob(self, x: Points) -> PerSample:
        squares = (x[:, None] - self.centres(x)).square().sum(-1) / self.std**2
        return torch.logsumexp(-squares / 2, 1) - math.log(8 * 2 * math.pi * self.std**2)


@dataclass(frozen=True)
class Moons(Toy):
    """Two interleaved half circles, scikit-learn's `make_moons` times `scale` plus `shift`.

    Args:
        scale: factor on the unit half circles.
        shift: added afterwards, to both coordinates or one number to each.
        noise: standard deviation around the curves, before scaling.
    """

    scale: float = 3.0
    shift: float | tuple[float, float] = -1.0
    noise: float = 0.05

    num_uniforms = 2

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        angle, inner = math.pi * u[:, 1], u[:, 0] < 0.5
        x = torch.where(inner, 1 - angle.cos(), angle.cos())
        y = torch.where(inner, 0.5 - angle.sin(), angle.sin())
        return self.scale * (torch.stack((x, y), -1) + self.noise * z) + z.new_tensor(self.shift)


@dataclass(frozen=True)
class Checkerboard(Toy):
    """Uniform on the eight dark squares of a 4 x 4 board of side `2 * extent`.

    Args:
        extent: half the side of the board.
    """

    extent: float = 4.0

    num_uniforms = 3

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        square = (8 * u[:, 0]).long().clamp(max=7)
        row = square // 2
        column = 2 * (square % 2) + row % 2
        corner = torch.stack((column, row), -1)
        return (corner + u[:, 1:]) * (self.extent / 2) - self.extent

    def log_prob(self, x: Points) -> PerSample:
        cell = ((x + self.extent) / (self.extent / 2)).floor()
        dark = ((cell >= 0) & (cell < 4)).all(1) & (cell.sum(1) % 2 == 0)
        density = torch.full_like(x[:, 0], -math.log(2 * self.extent**2))
        return torch.where(dark, density, -math.inf)


@dataclass(frozen=True)
class SCurve(Toy):
    """The S curve of scikit-learn, seen from the side (its axes 0 and 2).

    Args:
        scale: factor on the curve of width 2 and height 4.
        noise: standard deviation around the curve, before scaling.
    """

    scale: float = 1.0
    noise: float = 0.05

    num_uniforms = 1

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        angle = 3 * math.pi * (u[:, 0] - 0.5)
        curve = torch.stack((angle.sin(), angle.sign() * (angle.cos() - 1)), -1)
        return self.scale * (curve + self.noise * z)


@dataclass(frozen=True)
class Rings(Toy):
    """Concentric circles of equal weight.

    Args:
        radii: radius of each circle.
        noise: standard deviation around the circles.
    """

    radii: tuple[float, ...] = (1.0, 2.0, 3.0)
    noise: float = 0.08

    num_uniforms = 2

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        radii = torch.tensor(self.radii, dtype=z.dtype, device=z.device)
        radius = radii[(len(radii) * u[:, 0]).long().clamp(max=len(radii) - 1)]
        angle = 2 * math.pi * u[:, 1]
        return radius[:, None] * torch.stack((angle.cos(), angle.sin()), -1) + self.noise * z


@dataclass(frozen=True)
class Spirals(Toy):
    """Two interleaved spirals of one and a half turns.

    Args:
        scale: radius of the outer ends.
        noise: standard deviation around the arms.
    """

    scale: float = 4.0
    noise: float = 0.1

    num_uniforms = 2

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        radius = u[:, 1].sqrt()
        angle = math.pi * (3 * radius + (u[:, 0] < 0.5).to(radius))
        arm = radius[:, None] * torch.stack((angle.cos(), angle.sin()), -1)
        return self.scale * arm + self.noise * z


@dataclass(frozen=True)
class SwissRoll(Toy):
    """The spiral sheet of scikit-learn's `make_swiss_roll`, seen from the side (its axes 0 and 2).

    Args:
        scale: factor on the roll, whose outer end is 14.1 from the middle.
        noise: standard deviation around the roll, before scaling.
    """

    scale: float = 0.2
    noise: float = 0.25

    num_uniforms = 1

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        angle = 1.5 * math.pi * (1 + 2 * u[:, 0])
        roll = angle[:, None] * torch.stack((angle.cos(), angle.sin()), -1)
        return self.scale * (roll + self.noise * z)


@dataclass(frozen=True)
class Pinwheel(Toy):
    """Curved arms around the origin: a point r along its arm and s across it is turned by `rate` exp(r).

    Source: Johnson et al. 2016, arXiv:1603.06277, with the parameters of FFJORD, arXiv:1810.01367.

    Args:
        arms: number of arms.
        radial: standard deviation of r, whose mean is 1.
        tangential: standard deviation of s, whose mean is 0.
        rate: how strongly the arms are bent.
        scale: factor on the whole.
    """

    arms: int = 5
    radial: float = 0.3
    tangential: float = 0.1
    rate: float = 0.25
    scale: float = 2.0

    num_uniforms = 1

    def __post_init__(self) -> None:
        if self.arms < 1:
            raise ValueError(f"arms={self.arms} must be at least 1")

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        r, s = 1 + self.radial * z[:, 0], self.tangential * z[:, 1]
        arm = (self.arms * u[:, 0]).floor().clamp(max=self.arms - 1)
        angle = 2 * math.pi / self.arms * arm + self.rate * r.exp()
        turned = (r * angle.cos() - s * angle.sin(), r * angle.sin() + s * angle.cos())
        return self.scale * torch.stack(turned, -1)


@dataclass(frozen=True)
class Funnel(Source):
    """Neal's funnel: x_1 ~ N(0, std^2), and the others ~ N(0, exp(x_1)) given x_1.

    Source: Neal 2003, Annals of Statistics 31(3), sec. 8.

    Args:
        dim: number of dimensions, at least 2.
        std: standard deviation of the first.
    """

    dim: int = 2
    std: float = 3.0

    def __post_init__(self) -> None:
        if self.dim < 2 or not 0 < self.std < math.inf:
            raise ValueError(
                f"dim={self.dim} must be at least 2 and std={self.std} positive: "
                "the first dimension sets the width of the others"
            )

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.dim,)

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        first = self.std * z[:, :1]
        return torch.cat((first, (first / 2).exp() * z[:, 1:]), 1)

    def log_prob(self, x: Points) -> PerSample:
        first, rest = x[:, 0], x[:, 1:]
        squares = (first / self.std).square() + (rest.square().sum(1) * (-first).exp())
        log_scales = math.log(self.std) + (self.dim - 1) * first / 2
        return -squares / 2 - log_scales - self.dim / 2 * math.log(2 * math.pi)
