r"""The affine paths of the literature, each a pair or triple of curves.

Source: the table of Lipman et al. 2024, arXiv:2412.06264, sec. 4, and the papers named below.
"""

import math
from dataclasses import dataclass

import torch

from fmlightning.flow.paths.affine import AffinePath, Curve, derivative
from fmlightning.flow.paths.path import T_EPS
from fmlightning.flow.shapes import Times, require_t_range


@dataclass(frozen=True)
class Linear(AffinePath):
    """Conditional optimal transport: alpha = t, sigma = 1 - (1 - sigma_min) t.

    Source: Lipman et al. 2023, arXiv:2210.02747, eqs. 20-23; `sigma_min = 0` is rectified flow
    (Liu et al. 2022, arXiv:2209.03003).

    Args:
        sigma_min: standard deviation that is left around a data point at t = 1, in [0, 1).
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min={self.sigma_min} must lie in [0, 1)")

    def alpha(self, t: Times) -> Times:
        return t

    def sigma(self, t: Times) -> Times:
        return 1 - (1 - self.sigma_min) * t

    def d_alpha(self, t: Times) -> Times:
        return torch.ones_like(t)

    def d_sigma(self, t: Times) -> Times:
        return torch.full_like(t, self.sigma_min - 1)

    def alpha_over_sigma_inverse(self, ratio: Times) -> Times:
        return (1 / (1 / ratio + 1 - self.sigma_min)).clamp(max=1)


@dataclass(frozen=True)
class IndependentCFM(AffinePath):
    """The path of independent CFM, a straight line in constant noise: alpha = t, sigma = 1 - t, gamma = noise_std = s.

    Both ends are blurred by s: it starts from p0 * N(0, s^2 I) and ends at q * N(0, s^2 I).
    Source: Tong et al. 2024, arXiv:2302.00482, sec. 3.2.

    Args:
        noise_std: standard deviation of the added noise, positive.
    """

    noise_std: float = 0.1

    def __post_init__(self) -> None:
        if not self.noise_std > 0:
            raise ValueError(
                f"noise_std={self.noise_std} must be positive; without noise use Linear"
            )

    def alpha(self, t: Times) -> Times:
        return t

    def sigma(self, t: Times) -> Times:
        return 1 - t

    def gamma(self, t: Times) -> Times:
        return torch.full_like(t, self.noise_std)

    def d_alpha(self, t: Times) -> Times:
        return torch.ones_like(t)

    def d_sigma(self, t: Times) -> Times:
        return torch.full_like(t, -1.0)

    def alpha_over_sigma_inverse(self, ratio: Times) -> Times:
        s2 = self.noise_std**2
        return (1 + s2) / (1 + ((1 + s2) / ratio**2 - s2).clamp(min=s2**2).sqrt())


@dataclass(frozen=True)
class SchrodingerBridge(AffinePath):
    """Brownian bridges between the pair: alpha = t, sigma = 1 - t, gamma = s sqrt(t (1 - t)), s = noise_std.

    With the entropic coupling of weight 2 s^2 this is the Schroedinger bridge.
    Source: Tong et al. 2024, arXiv:2302.00482, sec. 3.2.

    Args:
        noise_std: diffusion of the bridge, positive.
        t_eps: distance kept from both ends, where E|u_t|^2 diverges.
    """

    noise_std: float = 1.0
    t_eps: float = T_EPS

    def __post_init__(self) -> None:
        if not self.noise_std > 0:
            raise ValueError(
                f"noise_std={self.noise_std} must be positive; without noise use Linear"
            )
        check_t_eps(self.t_eps)

    @property
    def t_range(self) -> tuple[float, float]:  # type: ignore[override]
        return self.t_eps, 1 - self.t_eps

    def alpha(self, t: Times) -> Times:
        return t

    def sigma(self, t: Times) -> Times:
        return 1 - t

    def gamma(self, t: Times) -> Times:
        return self.noise_std * (t * (1 - t)).sqrt()

    def d_alpha(self, t: Times) -> Times:
        return torch.ones_like(t)

    def d_sigma(self, t: Times) -> Times:
        return torch.full_like(t, -1.0)

    def d_gamma(self, t: Times) -> Times:
        return self.noise_std * (1 - 2 * t) / (2 * (t * (1 - t)).sqrt())

    def half_d_variance(self, t: Times) -> Times:
        return t - 1 + self.noise_std**2 * (1 - 2 * t) / 2

    def alpha_over_sigma_inverse(self, ratio: Times) -> Times:
        s2 = self.noise_std**2
        return 2 / (2 - s2 + (s2**2 + 4 / ratio**2).sqrt())


@dataclass(frozen=True)
class VariancePreserving(AffinePath):
    """The diffusion path alpha^2 + sigma^2 = 1 with a linear noise rate.

        alpha = exp(-T(1 - t) / 2),  sigma = sqrt(1 - alpha^2),  T(s) = beta_min s + (beta_max - beta_min) s^2 / 2

    alpha(0) = 0.0066 rather than 0: the start distribution N(0, sigma(0)^2 I) is a floor no tolerance removes.
    Source: Song et al. 2021, arXiv:2011.13456; Lipman et al. 2023, arXiv:2210.02747, eq. 19.

    Args:
        beta_min: noise rate at the data end, non-negative.
        beta_max: noise rate at the source end.
        t_eps: distance kept from t = 1, where E|u_t|^2 diverges.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_eps: float = T_EPS

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min < self.beta_max:
            raise ValueError(
                f"beta_min={self.beta_min} and beta_max={self.beta_max} must satisfy 0 <= beta_min < beta_max"
            )
        check_t_eps(self.t_eps)

    @property
    def t_range(self) -> tuple[float, float]:  # type: ignore[override]
        return 0.0, 1 - self.t_eps

    def integrated_rate(self, t: Times) -> Times:
        s = 1 - t
        return self.beta_min * s + (self.beta_max - self.beta_min) * s**2 / 2

    def alpha(self, t: Times) -> Times:
        return torch.exp(-self.integrated_rate(t) / 2)

    def sigma(self, t: Times) -> Times:
        # 1 - exp(-T) cancels near t = 1, expm1 does not
        return torch.sqrt(-torch.expm1(-self.integrated_rate(t)))

    def d_alpha(self, t: Times) -> Times:
        return self.alpha(t) * (self.beta_min + (self.beta_max - self.beta_min) * (1 - t)) / 2

    def d_sigma(self, t: Times) -> Times:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def half_d_variance(self, t: Times) -> Times:
        return -self.alpha(t) * self.d_alpha(t)

    def alpha_over_sigma_inverse(self, ratio: Times) -> Times:
        # T(1 - t) = log(1 + ratio^-2), a quadratic equation in 1 - t
        slope, rate = self.beta_max - self.beta_min, torch.log1p(ratio**-2)
        root = (self.beta_min**2 + 2 * slope * rate).sqrt()
        return (1 - (root - self.beta_min) / slope).clamp(min=0)


@dataclass(frozen=True)
class VarianceExploding(AffinePath):
    """The diffusion path that adds noise to unscaled data: alpha = 1.

        sigma = sigma_min sqrt((sigma_max / sigma_min)^(2 (1 - t)) - 1)

    alpha(0) = 1, so the true start distribution is q * N(0, sigma(0)^2 I); sampling starts from N(0, sigma(0)^2 I), a
    floor of about the data's variance over sigma_max^2. Velocities reach sigma_max log(sigma_max / sigma_min):
    predict noise, and let the network see x / sqrt(1 + sigma^2) as `input_scale` does.
    Source: Song et al. 2021, arXiv:2011.13456; Lipman et al. 2023, arXiv:2210.02747, eq. 18.

    Args:
        sigma_min: noise scale at the data end.
        sigma_max: noise scale at the source end.
        t_eps: distance kept from t = 1, where E|u_t|^2 diverges.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_eps: float = T_EPS

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must satisfy 0 < sigma_min < sigma_max"
            )
        check_t_eps(self.t_eps)

    @property
    def t_range(self) -> tuple[float, float]:  # type: ignore[override]
        return 0.0, 1 - self.t_eps

    @property
    def log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Times) -> Times:
        return torch.ones_like(t)

    def sigma(self, t: Times) -> Times:
        return self.sigma_min * torch.expm1(2 * (1 - t) * self.log_ratio).sqrt()

    def d_alpha(self, t: Times) -> Times:
        return torch.zeros_like(t)

    def d_sigma(self, t: Times) -> Times:
        return self.half_d_variance(t) / self.sigma(t)

    def half_d_variance(self, t: Times) -> Times:
        return -self.log_ratio * self.sigma_min**2 * torch.exp(2 * (1 - t) * self.log_ratio)

    def alpha_over_sigma_inverse(self, ratio: Times) -> Times:
        return (1 - torch.log1p((ratio * self.sigma_min) ** -2) / (2 * self.log_ratio)).clamp(min=0)

    def input_scale(self, t: Times) -> Times | None:
        return 1 / torch.sqrt(1 + self.sigma(t) ** 2)


@dataclass(frozen=True)
class Trigonometric(AffinePath):
    """The cosine, or generalised variance preserving, path: alpha = sin(pi t / 2), sigma = cos(pi t / 2).

    Source: Albergo and Vanden-Eijnden 2023, arXiv:2209.15571; SiT, arXiv:2401.08740.
    """

    def alpha(self, t: Times) -> Times:
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Times) -> Times:
        # sin of the distance to t = 1: exactly zero there, which cos(pi / 2) is not
        return torch.sin(math.pi / 2 * (1 - t))

    def d_alpha(self, t: Times) -> Times:
        return math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Times) -> Times:
        return -math.pi / 2 * self.alpha(t)

    def alpha_over_sigma_inverse(self, ratio: Times) -> Times:
        return 2 / math.pi * torch.atan(ratio)


@dataclass(frozen=True)
class Polynomial(AffinePath):
    """alpha = t^n, sigma = 1 - t^n.

    Source: Lipman et al. 2024, arXiv:2412.06264, sec. 4.

    Args:
        n: the power, at least 1; n = 1 is Linear.
    """

    n: float = 2.0

    def __post_init__(self) -> None:
        if not self.n >= 1:
            raise ValueError(f"n={self.n} must be at least 1, or the velocity is infinite at t = 0")

    def alpha(self, t: Times) -> Times:
        return t**self.n

    def sigma(self, t: Times) -> Times:
        return 1 - t**self.n

    def d_alpha(self, t: Times) -> Times:
        return self.n * t ** (self.n - 1)

    def d_sigma(self, t: Times) -> Times:
        return -self.n * t ** (self.n - 1)

    def alpha_over_sigma_inverse(self, ratio: Times) -> Times:
        return (1 / (1 / ratio + 1)) ** (1 / self.n)


@dataclass(frozen=True)
class LinearVP(AffinePath):
    """Linear in the data, variance preserving: alpha = t, sigma = sqrt(1 - t^2).

    Source: Lipman et al. 2024, arXiv:2412.06264, sec. 4.

    Args:
        t_eps: distance kept from t = 1, where E|u_t|^2 diverges.
    """

    t_eps: float = T_EPS

    def __post_init__(self) -> None:
        check_t_eps(self.t_eps)

    @property
    def t_range(self) -> tuple[float, float]:  # type: ignore[override]
        return 0.0, 1 - self.t_eps

    def alpha(self, t: Times) -> Times:
        return t

    def sigma(self, t: Times) -> Times:
        return ((1 - t) * (1 + t)).sqrt()

    def d_alpha(self, t: Times) -> Times:
        return torch.ones_like(t)

    def d_sigma(self, t: Times) -> Times:
        return -t / self.sigma(t)

    def half_d_variance(self, t: Times) -> Times:
        return -t

    def alpha_over_sigma_inverse(self, ratio: Times) -> Times:
        return (1 + ratio**-2) ** -0.5


class Curves(AffinePath):
    """A path of one's own: two callables of t, differentiated by forward-mode autodiff.

        Curves(lambda t: t**2, lambda t: (1 - t) ** 2)

    Args:
        alpha: scale of the data; alpha(0) = 0 and alpha(1) = 1.
        sigma: scale of the source; sigma(0) = 1 and sigma(1) = 0, or small. Written so that it stays exact
            near its ends: (1 - t) * (1 + t) rather than 1 - t**2.
        t_range: where training and sampling stay, narrower than [0, 1] if a derivative diverges at an end.
        end_tolerance: how far from those values the ends may be, 1e-2 by default: that admits a `sigma_min`
            and the floor of a diffusion path, and refuses curves that are swapped.

    Raises:
        ValueError: the ends do not hold, the ratio alpha / sigma falls on the way, or the interval is no part of
            [0, 1].
    """

    def __init__(
        self,
        alpha: Curve,
        sigma: Curve,
        *,
        t_range: tuple[float, float] = (0.0, 1.0),
        end_tolerance: float = 1e-2,
    ) -> None:
        self.curves = {"alpha": alpha, "sigma": sigma}
        self.t_range = t_range
        require_t_range(t_range)
        for name, ends in (("alpha", (0.0, 1.0)), ("sigma", (1.0, 0.0))):
            for t, expected in zip((0.0, 1.0), ends, strict=True):
                value = float(self.curves[name](torch.tensor(t, dtype=torch.float64)))
                if not abs(value - expected) <= end_tolerance:
                    raise ValueError(
                        f"{name}({t:g}) = {value:.4g}, but a path from the source at t = 0 to the data at t = 1 "
                        f"needs {expected:g} there, within end_tolerance={end_tolerance:g}"
                    )
        require_rise(self)

    def __repr__(self) -> str:
        return f"Curves(t_range={self.t_range})"

    def alpha(self, t: Times) -> Times:
        return self.curves["alpha"](t)

    def sigma(self, t: Times) -> Times:
        return self.curves["sigma"](t)

    def d_alpha(self, t: Times) -> Times:
        return derivative(self.curves["alpha"], t)

    def d_sigma(self, t: Times) -> Times:
        return derivative(self.curves["sigma"], t)


def require_rise(path: AffinePath, count: int = 1000) -> None:
    """Refuse a signal-to-noise ratio that falls: one ratio would be two times, and more data less."""
    t = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    # an angle rather than the ratio, which is infinite at the end
    angle = torch.atan2(path.alpha(t).expand_as(t), path.sigma(t).expand_as(t))
    falls = ~(angle.diff() >= -1e-9)  # rounding, or nan
    if bool(falls.any()):
        k = int(falls.nonzero()[0])
        raise ValueError(
            f"the ratio alpha / sigma falls between t = {float(t[k]):g} and {float(t[k + 1]):g}: a path goes from "
            "noise to data and never back. Choose curves with alpha / sigma increasing."
        )


def check_t_eps(t_eps: float) -> None:
    if not 0 < t_eps < 0.5:
        raise ValueError(f"t_eps={t_eps} must lie in (0, 0.5): the path is singular at its end")
