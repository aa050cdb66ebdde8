r"""The oracle: everything a flow on a Gaussian mixture should learn, in closed form.

For data q = sum_k w_k N(m_k, s_k^2 I), a Gaussian source and the independent coupling, the path stays a mixture:

    p_t(x) = sum_k w_k N(x; alpha m_k, V_k I),   V_k = alpha^2 s_k^2 + sigma^2 + gamma^2            (1)
    r_k(x) = w_k N(x; alpha m_k, V_k I) / p_t(x)                                                    (2)
    u_t(x) = sum_k r_k a_k,   a_k = alpha' m_k + (B_k / V_k) (x - alpha m_k),   B_k = V_k' / 2      (3)
    score  = sum_k r_k b_k,   b_k = -(x - alpha m_k) / V_k                                          (4)
    div u  = sum_k r_k [D B_k / V_k + (a_k - u) . (b_k - score)]                                    (5)
    E[x1|x] = sum_k r_k [m_k + (alpha s_k^2 / V_k) (x - alpha m_k)],   E[x0|x] = -sqrt(V) score     (6)

with V = sigma^2 + gamma^2. A finite data set is s_k = 0. The conditional loss exceeds the true one by
C = E tr Cov[u_t | x_t], whatever the network; in component k, u_t has the variance c_k left per dimension:

    tr Cov[u_t | x] = sum_k r_k (D c_k + |a_k - u|^2)                                               (7)
    c_k = [s_k^2 (alpha' sigma - alpha sigma')^2 + s_k^2 (alpha' gamma - alpha gamma')^2
           + (sigma gamma' - sigma' gamma)^2] / V_k

Source: Lipman et al. 2024, arXiv:2412.06264, sec. 4; (7) is the conditional variance of jointly Gaussian
variables, written as a sum of squares so that nothing cancels.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmlightning.flow.objectives.cfm import mean_square
from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.paths.path import T_EPS
from fmlightning.flow.paths.predictions import Prediction, check
from fmlightning.flow.shapes import (
    Field,
    Labels,
    PerSample,
    Points,
    Times,
    expand_like,
    flat,
    require_like,
    require_time,
    require_times,
)
from fmlightning.flow.sources import Gaussian, Source
from fmlightning.flow.toys import EightGaussians

CHUNK = 2**18
"""Numbers in the largest intermediate, (rows, D, K): chosen to stay in a processor's cache."""

Weights = Float[Tensor, "B K"]


class GaussianMixture(Source):
    """The distribution sum_k w_k N(m_k, s_k^2 I), and with s_k = 0 a finite data set.

        GaussianMixture([0.3, 0.7], [[-1.0, 0.0], [1.0, 0.5]], 0.2)

    Args:
        weights: positive, (K,), summing to one.
        means: centres, (K, *S).
        stds: standard deviation of each component, (K,), or one for all; zero for points.

    Raises:
        ValueError: shapes that do not match, weights that do not sum to one, negative stds.
    """

    num_uniforms = 1

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[Any] | Tensor,
        stds: Sequence[float] | float | Tensor,
    ) -> None:
        self.means = numbers(means)
        self.weights = numbers(weights)
        self.stds = numbers(stds).to(self.means)
        self.validate()
        self.weights = normalised(self.weights).to(self.means)
        self.stds = self.stds.expand(self.weights.shape)
        self.event_shape = tuple(self.means.shape[1:])

    def __repr__(self) -> str:
        content = repr([x.tolist() for x in (self.weights, self.means, self.stds)])
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        return (
            f"GaussianMixture({len(self.weights)} components of shape {self.event_shape}, {digest})"
        )

    @classmethod
    def of_points(cls, x: Points) -> "GaussianMixture":
        """The empirical distribution of a finite data set, (N, *S)."""
        return cls(torch.full((len(x),), 1 / len(x), dtype=torch.float64), x, 0.0)

    @classmethod
    def of_eight_gaussians(cls, toy: EightGaussians) -> "GaussianMixture":
        """The distribution of the toy, with its oracle."""
        means = toy.centres(torch.zeros((), dtype=torch.float64))
        return cls(torch.full((8,), 1 / 8, dtype=torch.float64), means, toy.std)

    def validate(self) -> None:
        K = len(self.weights)
        if self.weights.ndim != 1 or self.means.ndim < 2 or len(self.means) != K:
            raise ValueError(
                f"weights {tuple(self.weights.shape)} and means {tuple(self.means.shape)} do not match; "
                "pass weights (K,) and means (K, *S)"
            )
        if self.stds.shape not in ((), (1,), (K,)):
            raise ValueError(
                f"stds {tuple(self.stds.shape)} must be one number, or one for each of {K} components"
            )
        if not bool(self.means.isfinite().all()):
            raise ValueError(
                f"means must be finite, but {int((~self.means.isfinite()).sum())} of {self.means.numel()} numbers "
                "are not"
            )
        total = float(self.weights.double().sum())
        # each weight is rounded by at most eps / 2 of itself, so their sum by eps / 2; 1e-5 is for weights typed in
        tolerance = max(1e-5, torch.finfo(self.weights.dtype).eps)
        if not (bool((self.weights > 0).all()) and abs(total - 1) < tolerance):
            raise ValueError(
                f"weights must be positive and sum to one, but the smallest is {float(self.weights.min()):g} "
                f"and their sum {total:g}; divide them by their sum and leave empty components out"
            )
        if not bool(((self.stds >= 0) & self.stds.isfinite()).all()):
            raise ValueError(
                f"stds must be finite and not negative, but reach from {float(self.stds.min()):g} to "
                f"{float(self.stds.max()):g}; zero makes a point"
            )

    def to(self, like: Tensor) -> "GaussianMixture":
        """The same distribution on the device and in the precision of a tensor."""
        if (self.means.device, self.means.dtype) == (like.device, like.dtype):
            return self
        moved = copy.copy(self)
        moved.weights = normalised(self.weights.to(like.device)).to(like)
        moved.means, moved.stds = self.means.to(like), self.stds.to(like)
        return moved

    def columns(self) -> Float[Tensor, "D K"]:
        """The centres side by side: sums over many components or few dimensions are fast in this layout."""
        return flat(self.means).T.contiguous()

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        law = self.to(z)
        k = torch.searchsorted(law.weights.cumsum(0), u[:, 0].contiguous())
        k = k.clamp(max=len(law.weights) - 1)  # the weights' rounded sum may lie below u
        return law.means[k] + expand_like(law.stds[k], z) * z

    def log_prob(self, x: Points) -> PerSample:
        """Log-density in nats.

        Raises:
            ValueError: a finite data set has none.
        """
        if not bool((self.stds > 0).all()):
            raise ValueError(
                "a mixture with stds of zero has no density; ask its path for one at t < 1, or pass stds > 0"
            )
        law = self.to(x)
        check_points(x, law)
        difference = flat(x)[:, :, None] - law.columns()
        return log_joint(law.weights, difference, law.stds.square()).logsumexp(1)

    def along(self, path: AffinePath) -> "MixturePath":
        """The path from noise to this distribution."""
        return MixturePath(self, path)


def mixture_of(distribution: Source | None) -> GaussianMixture | None:
    """The mixture that a distribution is, where it is one."""
    if isinstance(distribution, EightGaussians):
        return GaussianMixture.of_eight_gaussians(distribution)
    return distribution if isinstance(distribution, GaussianMixture) else None


class ComponentTerms(NamedTuple):
    """The mixture at time t, seen from points x: what equations (2) to (7) are made of."""

    log_joint: Tensor
    """log w_k N(x; alpha m_k, V_k I), (B, K)"""
    difference: Tensor
    """x - alpha m_k, (B, D, K)"""
    means: Tensor
    """m_k, (D, K)"""
    s2: Tensor
    """s_k^2, (K,)"""
    alpha: Tensor
    """(B, 1)"""
    variance: Tensor
    """V_k, (B, K)"""

    @property
    def r(self) -> Weights:
        """Responsibilities (2)."""
        return torch.softmax(self.log_joint, 1)

    def b(self) -> Tensor:
        """The score of each component, (B, D, K)."""
        return -self.difference / self.variance[:, None]

    def x1(self) -> Tensor:
        """E[x1 | x, k], (B, D, K)."""
        slope = self.alpha * self.s2 / self.variance
        return self.means + slope[:, None] * self.difference


@dataclass(frozen=True)
class MixturePath:
    """The marginal path of a mixture along a schedule; itself a field, its exact velocity.

        path = GaussianMixture([1.0], [[2.0, 0.0]], 0.5).along(Linear())
        path.velocity(x, t)

    Everywhere x is (B, *S) and t lies in [0, 1], (B,) or (). Another t or shape is a ValueError. So is a point so far
    away that the square of its distance overflows, 1e19 standard deviations in float32 and 1e154 in float64. On a GPU
    values are not looked at, as the host would have to wait: there such a point gives nan.
    Many points are handled in chunks, so memory stays small unless a gradient is asked for.
    """

    mixture: GaussianMixture
    path: AffinePath

    offers = frozenset({"velocity"})
    source = Gaussian()
    independent = True

    @property
    def t_range(self) -> tuple[float, float]:
        """Where the velocity exists and the theorems hold: the schedule's, short of t = 1 if p_1 has no density."""
        low, high = self.path.t_range
        one = torch.ones((), dtype=torch.float64)
        blurred = bool(self.path.variance(one) > 0) or bool((self.mixture.stds > 0).all())
        return low, high if blurred else min(high, 1 - T_EPS)

    def marginal(self, t: float) -> GaussianMixture:
        """The distribution of x_t: the true start at t = 0, the blurred target at t = 1."""
        require_time("t", t)
        law, time = self.mixture, torch.tensor(t, dtype=torch.float64)
        alpha, variance = self.path.alpha(time), self.path.variance(time)
        stds = ((alpha * law.stds.double()).square() + variance).sqrt()
        return GaussianMixture(normalised(law.weights), alpha * law.means.double(), stds)

    def start(self, t: float = 0.0) -> GaussianMixture:
        """Where sampling starts: the distribution of sigma x0 + gamma eps, the path without its data."""
        require_time("t", t)
        std = self.path.std(torch.tensor(t, dtype=torch.float64))
        zero = torch.zeros_like(self.mixture.means[:1], dtype=torch.float64)
        return GaussianMixture([1.0], zero, std)

    def __call__(self, x: Points, t: Times) -> Points:
        return self.velocity(x, t)

    def log_prob(self, x: Points, t: Times) -> PerSample:
        """log p_t(x) in nats, (1)."""
        return self.per_point(x, t, lambda seen, t: seen.log_joint.logsumexp(1))

    def responsibilities(self, x: Points, t: Times) -> Weights:
        """r_k(x), (2): the chance that x came from component k."""
        return self.per_point(x, t, lambda seen, t: seen.r)

    def velocity(self, x: Points, t: Times) -> Points:
        """u_t(x), (3): what a network that predicts the velocity should learn."""
        return self.per_point(x, t, lambda seen, t: mean(seen.r, self.a(seen, t))).reshape(x.shape)

    def score(self, x: Points, t: Times) -> Points:
        """The gradient of log p_t, (4)."""
        return self.per_point(x, t, lambda seen, t: mean(seen.r, seen.b())).reshape(x.shape)

    def data(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """E[x1 | x_t = x], (6)."""
        check_unlabelled(y)
        return self.per_point(x, t, lambda seen, t: mean(seen.r, seen.x1())).reshape(x.shape)

    def noise(self, x: Points, t: Times) -> Points:
        """E[(x_t - alpha x1) / std | x_t = x], (6): the expected source point where gamma = 0."""

        def values(seen: ComponentTerms, t: Times) -> Tensor:
            return -column(self.path.std(t)) * mean(seen.r, seen.b())

        return self.per_point(x, t, values).reshape(x.shape)

    def given(self, y: Labels | None) -> Field:
        """The field for no labels: it knows none."""
        check_unlabelled(y)
        return self

    def exact_prediction(self, prediction: Prediction, x: Points, t: Times) -> Points:
        """What a perfect network predicts."""
        check(prediction)
        return getattr(self, prediction)(x, t)

    def divergence(self, x: Points, t: Times) -> PerSample:
        """div u_t(x), (5)."""

        def values(seen: ComponentTerms, t: Times) -> Tensor:
            r, a, b = seen.r, self.a(seen, t), seen.b()
            stretch = seen.difference.shape[1] * self.slope(seen, t)
            shear = (deviation(r, a) * deviation(r, b)).sum(1)
            return (r * (stretch + shear)).sum(1)

        return self.per_point(x, t, values)

    def spread(self, x: Points, t: Times, prediction: Prediction = "velocity") -> PerSample:
        """tr Cov[target | x_t = x], (7), divided by the dimension as the losses are.

        Its mean over the path is C, the least conditional loss any network can reach:
        mean(cfm_loss) - mean(spread) estimates the true error without bias. Infinite where E|u_t|^2 is.
        """
        check(prediction)

        def values(seen: ComponentTerms, t: Times) -> Tensor:
            velocity, r = prediction == "velocity", seen.r
            left = self.left_velocity(seen, t) if velocity else self.left_data(seen, t)
            means = self.a(seen, t) if velocity else seen.x1()
            total = (r * (left + deviation(r, means).square().mean(1))).sum(1)
            return total * self.gain(prediction, t) ** 2

        return self.per_point(x, t, values)

    def fm_loss(
        self, field: Field, x: Points, t: Times, prediction: Prediction = "velocity"
    ) -> PerSample:
        """|prediction - truth|^2 / D of each sample: the flow matching loss itself.

        Args:
            field: `(x, t) -> prediction`.
            prediction: what it predicts; `velocity` for every field.
        """
        found = field(x, t)
        require_like("the prediction", found, "x", x)
        return mean_square(found - self.exact_prediction(prediction, x, t))

    def slope(self, seen: ComponentTerms, t: Times) -> Tensor:
        """B_k / V_k, (B, K)."""
        s = self.path
        d_alpha, half_d_variance = column(s.d_alpha(t)), column(s.half_d_variance(t))
        return (seen.alpha * d_alpha * seen.s2 + half_d_variance) / seen.variance

    def a(self, seen: ComponentTerms, t: Times) -> Tensor:
        """The velocity of each component, (B, D, K)."""
        d_alpha = column(self.path.d_alpha(t))[:, None]
        return d_alpha * seen.means + self.slope(seen, t)[:, None] * seen.difference

    def left_velocity(self, seen: ComponentTerms, t: Times) -> Tensor:
        """c_k of (7)."""
        alpha, sigma, gamma, d_alpha, d_sigma, d_gamma = map(column, self.path(t))
        turns = (d_alpha * sigma - alpha * d_sigma) ** 2 + (d_alpha * gamma - alpha * d_gamma) ** 2
        noise = (sigma * d_gamma - d_sigma * gamma) ** 2
        return (seen.s2 * turns + noise) / seen.variance

    def left_data(self, seen: ComponentTerms, t: Times) -> Tensor:
        """The variance of x1 given x and k, per dimension."""
        return seen.s2 * column(self.path.variance(t)) / seen.variance

    def gain(self, prediction: Prediction, t: Times) -> Tensor:
        """How far the target moves with the data point, for a given x."""
        if prediction in ("velocity", "data"):
            return torch.ones_like(t)
        power = 1 if prediction == "noise" else 2
        return self.path.alpha(t) / self.path.std(t) ** power

    def per_point(
        self, x: Points, t: Times, values: Callable[[ComponentTerms, Tensor], Tensor]
    ) -> Float[Tensor, "B ..."]:
        """A function of what is seen from each point, in chunks that fit the cache."""
        law, t = self.mixture.to(x), t.to(x)
        check_points(x, law)
        require_times(t, len(x))
        rows = max(1, CHUNK // law.means.numel())
        if len(x) <= rows:
            return values(self.see(x, t, law), t)
        times = t.split(rows) if t.ndim else [t] * math.ceil(len(x) / rows)
        chunks = zip(x.split(rows), times, strict=True)
        return torch.cat([values(self.see(x, t, law), t) for x, t in chunks])

    def see(self, x: Points, t: Times, law: GaussianMixture) -> ComponentTerms:
        alpha = column(self.path.alpha(t))
        means, s2 = law.columns(), law.stds.square()
        variance = alpha**2 * s2 + column(self.path.variance(t))
        if x.device.type == "cpu" and not bool((variance > 0).all()):
            raise ValueError(
                f"p_t has no density at t={float(t.max()):g}: {type(self.path).__name__} leaves no noise "
                "around the points of a finite data set there. Stay inside `t_range`, or pass stds > 0."
            )
        difference = flat(x)[:, :, None] - alpha[:, None] * means
        joint = log_joint(law.weights, difference, variance)
        require_reach(joint, x)
        return ComponentTerms(joint, difference, means, s2, alpha, variance)


class OracleNetwork(nn.Module):
    """The exact answer in the place of a trained network: `net(x, t)` for `NetworkField` or `cfm_loss`.

    It undoes the scaling that networks' inputs get, and knows no labels.

    Args:
        path: the path whose answer it gives.
        prediction: what to answer with.
    """

    def __init__(self, path: MixturePath, prediction: Prediction = "velocity") -> None:
        super().__init__()
        check(prediction)
        self.path = path
        self.prediction: Prediction = prediction

    def forward(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        check_unlabelled(y)
        scale = self.path.path.input_scale(t)
        x = x if scale is None else x / expand_like(scale, x)
        return self.path.exact_prediction(self.prediction, x, t)


def numbers(values: Any) -> Tensor:
    """A floating-point tensor; what is not a tensor becomes float64."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else values.double()
    return torch.as_tensor(values, dtype=torch.float64)


def normalised(weights: Tensor) -> Tensor:
    """Weights that sum to one, in float64: rounded to fewer digits they do not."""
    weights = weights.double()
    return weights / weights.sum()


def column(c: Times) -> Tensor:
    """Coefficients (B,) or () against the components: (B, 1) or (1, 1)."""
    return c.reshape(-1, 1)


def mean(r: Weights, values: Tensor) -> Float[Tensor, "B D"]:
    """Average over the components."""
    return (r[:, None] * values).sum(2)


def deviation(r: Weights, values: Tensor) -> Tensor:
    """Each component's distance from the average, (B, D, K)."""
    return values - mean(r, values)[..., None]


def log_joint(weights: Tensor, difference: Tensor, variance: Tensor) -> Weights:
    """log w_k N(difference; 0, variance I)."""
    D = difference.shape[1]
    squares = difference.square().sum(1) / variance
    return weights.log() - (squares + D * (2 * torch.pi * variance).log()) / 2


def check_points(x: Points, law: GaussianMixture) -> None:
    if tuple(x.shape[1:]) != law.event_shape:
        raise ValueError(
            f"points of shape {tuple(x.shape[1:])} do not belong to a mixture of shape {law.event_shape}"
        )


def check_unlabelled(y: Labels | None) -> None:
    if y is not None:
        raise ValueError(
            "the oracle of a mixture knows no labels; for one class, make the mixture of its components"
        )


def require_reach(joint: Weights, x: Points) -> None:
    # elsewhere the answer would make the host wait for the device
    if x.device.type == "cpu" and bool((joint.amax(1) == -math.inf).any()):
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(
            f"x reaches {float(x.abs().max()):g}, so far from the mixture that the square of the distance in "
            f"standard deviations overflows {dtype}: pass nearer points{', or float64' if dtype != 'float64' else ''}"
        )
