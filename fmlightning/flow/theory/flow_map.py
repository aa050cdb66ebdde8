r"""The exact flow map of a Gaussian mixture.

    d/dt X_{s,t}(x) = v(X_{s,t}(x), t),  X_{s,s}(x) = x,    u(x, s, t) = (X_{s,t}(x) - x) / (t - s)      (1)

Runge-Kutta steps of equal length from s to t sum slopes k_j of the exact velocity:

    X_{s,t}(x) = x + (t - s) sum_j b_j k_j,    u(x, s, t) = sum_j b_j k_j                                (2)

and so u needs no division by t - s: at t = s it is the velocity, with finite derivatives. Two cases have closed forms.
One Gaussian N(m, s^2 I), with F_t^2 = alpha_t^2 s^2 + Var_t:

    X_{s,t}(x) = alpha_t m + (F_t / F_s) (x - alpha_s m)                                                (3)

and one dimension, where the map keeps every quantile: X_{s,t} = Q_t(C_s), C the distribution function.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmlightning.flow.models import Model
from fmlightning.flow.paths.affine import bisect
from fmlightning.flow.shapes import Labels, PerSample, Points, Times, expand_like
from fmlightning.flow.theory.mixture import MixturePath, check_unlabelled

STEPS = 64
"""The error of (2) on mixtures of a few modes of comparable size is then about 1e-6."""


@dataclass(frozen=True, eq=False)
class ExactFlowMap:
    """The flow map along a mixture's path, and its average velocity.

    Args:
        law: the path.
        steps: of Runge-Kutta of order four.
    """

    law: MixturePath
    steps: int = STEPS

    def average_velocity(self, x: Points, s: Times, t: Times) -> Points:
        """u of (2), in the precision of x."""
        h = (t - s) / self.steps
        wide, total = expand_like(h, x), torch.zeros_like(x)
        for step in range(self.steps):
            now, place = s + step * h, x + wide * total
            k1 = self.law.velocity(place, now)
            k2 = self.law.velocity(place + wide * k1 / 2, now + h / 2)
            k3 = self.law.velocity(place + wide * k2 / 2, now + h / 2)
            # rounding may carry the last time beyond t
            k4 = self.law.velocity(place + wide * k3, now + h if step + 1 < self.steps else t)
            total = total + (k1 + 2 * k2 + 2 * k3 + k4) / 6
        return total / self.steps

    def jump(self, x: Points, s: Times, t: Times) -> Points:
        """X_{s,t}(x) of (2)."""
        return x + expand_like(t - s, x) * self.average_velocity(x, s, t)

    def of_one_gaussian(self, x: Points, s: Times, t: Times) -> Points:
        """X_{s,t}(x) of (3), exactly.

        Raises:
            ValueError: the mixture has several components.
        """
        mixture, path = self.law.mixture.to(x), self.law.path
        if len(mixture.means) > 1:
            raise ValueError(f"equation (3) is of one Gaussian, and there are {len(mixture.means)}")

        def seen(time: Times) -> tuple[Tensor, Tensor]:
            spread = (path.alpha(time) * mixture.stds[0]) ** 2 + path.variance(time)
            return expand_like(path.alpha(time), x) * mixture.means[0], expand_like(
                spread.sqrt(), x
            )

        (from_mean, from_std), (to_mean, to_std) = seen(s), seen(t)
        return to_mean + to_std / from_std * (x - from_mean)

    def by_quantiles(self, x: Points, s: Times, t: Times) -> Points:
        """X_{s,t}(x) of a mixture on the line, exactly: no solver, and no derivatives.

        Raises:
            ValueError: it has more than one dimension.
        """
        if self.law.mixture.means[0].numel() != 1:
            raise ValueError("quantiles are of one dimension; take `jump`")
        flat = x.reshape(-1).double()
        at_s, at_t = (time.double().expand(len(flat)) for time in (s, t))
        below = self.distribution(flat, at_s)
        reach = 1 + float(flat.abs().max()) + float(self.law.mixture.means.abs().max())
        reach *= 10 * (1 + float(self.law.mixture.stds.max()))

        def level(share: PerSample) -> PerSample:
            return self.distribution(reach * (2 * share - 1), at_t)

        return (reach * (2 * bisect(level, below) - 1)).reshape(x.shape).to(x.dtype)

    def distribution(self, x: PerSample, t: PerSample) -> PerSample:
        """C_t(x) of a mixture on the line."""
        mixture, path = self.law.mixture, self.law.path
        alpha, variance = path.alpha(t)[:, None], path.variance(t)[:, None]
        std = ((alpha * mixture.stds.double()) ** 2 + variance).sqrt()
        z = (x[:, None] - alpha * mixture.means.double().reshape(1, -1)) / std
        weights = mixture.weights.double()
        return (weights / weights.sum() * torch.special.erfc(-z / math.sqrt(2)) / 2).sum(1)


class MixtureFlowMap(Model):
    """The exact model of a mixture, with its flow map: it stands wherever a trained one can.

    Args:
        law: the path of the mixture.
        steps: of Runge-Kutta in each jump.
    """

    offers = frozenset({"velocity", "jump"})

    def __init__(self, law: MixturePath, steps: int = STEPS) -> None:
        super().__init__()
        self.law, self.map = law, ExactFlowMap(law, steps)
        self.path, self.t_range = law.path, law.t_range
        self.source, self.independent = law.source, law.independent

    def velocity(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        check_unlabelled(y)
        return self.law.velocity(x, t)

    def average_velocity(self, x: Points, s: Times, t: Times, y: Labels | None = None) -> Points:
        """u(x, s, t) of (1)."""
        check_unlabelled(y)
        return self.map.average_velocity(x, s, t)

    def jump(self, x: Points, s: Times, t: Times, y: Labels | None = None) -> Points:
        check_unlabelled(y)
        return self.map.jump(x, s, t)

    def data(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """E[x1 | x_t = x]."""
        return self.law.data(x, t, y)


class AverageOracle(nn.Module):
    """The exact average velocity in the place of a network of two times, without parameters.

    It undoes the scaling that networks' inputs get, and knows no labels.

    Args:
        law: the path of the mixture.
        steps: of Runge-Kutta in each evaluation.
    """

    def __init__(self, law: MixturePath, steps: int = STEPS) -> None:
        super().__init__()
        self.law, self.map = law, ExactFlowMap(law, steps)

    def forward(
        self, x: Points, t: Times, y: Labels | None = None, to: Times | None = None
    ) -> Points:
        check_unlabelled(y)
        scale = self.law.path.input_scale(t)
        x = x if scale is None else x / expand_like(scale, x)
        return self.law.velocity(x, t) if to is None else self.map.average_velocity(x, t, to)
