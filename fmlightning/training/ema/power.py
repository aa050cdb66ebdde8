r"""Averages of weights whose width is chosen after training.

The average of the weights theta up to step t under a power function, and its update:

    theta_hat(t) = integral_0^t p_t(tau) theta(tau) dtau,     p_t(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)    (1)
    theta_hat(t) = beta theta_hat(t - 1) + (1 - beta) theta(t),        beta = (1 - 1/t)^(gamma + 1)              (2)

Its width is the standard deviation of p_t, relative to t, and gives gamma as the root of a cubic:

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)                                            (3)

Snapshots theta_hat_i of (1) at several t_i, for two gamma, are enough to make another width at any step T: with the
coefficients x that minimise || p - sum_i x_i p_i ||, so that

    A x = b,      A_ij = <p_i, p_j>,      b_i = <p_i, p>,      theta_hat ~ sum_i x_i theta_hat_i                 (4)

    <p_a, p_b> = (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (s / u)^(gamma of u) / u,
                                                                          s = min(t_a, t_b), u = max(t_a, t_b)   (5)

With theta constant between steps, (2) is (1) exactly.

Source: Karras et al. 2024, arXiv:2312.02696, sec. 3 and appendix C, Algorithm 3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WIDEST = 0.28
"""A little below 1 / (2 sqrt 3), the width of the mean of all steps, gamma = 0."""


class Profile(NamedTuple):
    """A power function up to a step, equation (1)."""

    step: float
    gamma: float

    def __call__(self, tau: Tensor) -> Tensor:
        """Its weight at times tau, zero after the step."""
        t, g = self.step, self.gamma
        return torch.where(tau <= t, (g + 1) * (tau / t) ** g / t, 0)


def require_width(sigma_rel: float, option: str) -> None:
    """Refuse a width that no power function has.

    Raises:
        ValueError: it does not lie in (0, 0.28].
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(
            f"{option}={sigma_rel} must lie in (0, {WIDEST}]: it is the width of the average, relative to the length "
            "of training, and that of the mean of all steps is 0.289"
        )


def width(gamma: float) -> float:
    """sigma_rel of an exponent, equation (3)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def exponent(sigma_rel: float) -> float:
    """gamma of a width in (0, 0.28], by bisection of (3), which falls from gamma = 0 on."""
    low, high = 0.0, 1 / sigma_rel  # as width(gamma) < 1 / gamma
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def power_decay(step: int, gamma: float) -> float:
    """beta of equation (2), for steps counted from 1."""
    return (1 - 1 / step) ** (gamma + 1)


def inner(a: Profile, b: Profile) -> float:
    """The inner product (5) of two profiles."""
    early, late = sorted((a, b))
    factor = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return factor * (early.step / late.step) ** late.gamma / late.step


def coefficients(snapshots: Sequence[Profile], wanted: Profile) -> Tensor:
    """The x of equation (4), float64; snapshots after the wanted step take part as well."""
    matrix = torch.tensor(
        [[inner(p, q) for q in snapshots] for p in snapshots], dtype=torch.float64
    )
    right = torch.tensor([[inner(p, wanted)] for p in snapshots], dtype=torch.float64)
    scale = matrix.diagonal().rsqrt()  # unit functions: their lengths differ by orders of magnitude
    scaled = scale[:, None] * matrix * scale
    # by singular values, as neighbours are nearly parallel
    found = torch.linalg.lstsq(scaled, scale[:, None] * right, driver="gelsd").solution
    return scale * found[:, 0]


def fit_error(snapshots: Sequence[Profile], wanted: Profile, x: Tensor) -> float:
    """|| p - sum_i x_i p_i || / || p ||: how far the profile that was made is from the one that was asked for."""
    cross = sum(2 * float(c) * inner(p, wanted) for c, p in zip(x, snapshots, strict=True))
    square = sum(
        float(c) * float(d) * inner(p, q)
        for c, p in zip(x, snapshots, strict=True)
        for d, q in zip(x, snapshots, strict=True)
    )
    total = inner(wanted, wanted)
    return (max(0.0, total - cross + square) / total) ** 0.5
