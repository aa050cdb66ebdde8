r"""What a network predicts, and how it becomes a velocity.

A network may predict the velocity v, the data x1, the noise x0 or the score. With V = sigma^2 + gamma^2,
std = sqrt(V) and D = alpha' std - alpha std', each is the end points in other words:

    x1 = (std v - std' x) / D        x0 = (alpha' x - alpha v) / D        score = -x0 / std       (1)

    v = (std' / std) x + (D / std) x1                                                             (2)
      = (alpha' / alpha) x - (D / alpha) x0
      = (alpha' / alpha) x + (V alpha' / alpha - V' / 2) score

x0 here is the whole noise (x - alpha x1) / std; it is the source point where gamma = 0. Each line of (2)
divides by zero at one end of time. There it raises: nothing is clamped, and `domain` says where the field exists.
`score` is meant for a Gaussian source independent of x1.

Source: Lipman et al. 2024, arXiv:2412.06264, sec. 4.8.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.paths.path import T_EPS, Path, PathSample
from fmlightning.flow.shapes import Points, Times, expand_like, require_like, require_times

Prediction = Literal["velocity", "data", "noise", "score"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


class EndPoints(NamedTuple):
    """What a prediction says the path came from: the data point and the noise."""

    x1: Tensor
    x0: Tensor


def check(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"prediction={prediction!r} is unknown; choose one of {', '.join(PREDICTIONS)}"
        )


def target(prediction: Prediction, sample: PathSample, path: Path) -> Points:
    """The regression target of a network."""
    check(prediction)
    if prediction == "velocity":
        return sample.ut
    if prediction == "data":
        return sample.x1
    path = affine(path, f"prediction={prediction!r}")
    noise = effective_noise(sample, path)
    if prediction == "noise":
        return noise
    return -noise / expand_like(path.std(sample.t), noise)


def effective_noise(sample: PathSample, path: AffinePath) -> Points:
    """(x_t - alpha x1) / std, from its parts: the difference would cancel where std is small."""
    if not path.stochastic or sample.noise is None:
        return sample.x0
    std = path.std(sample.t)
    p, q = path.sigma(sample.t) / std, path.gamma(sample.t) / std
    return expand_like(p, sample.x0) * sample.x0 + expand_like(q, sample.noise) * sample.noise


def velocity_coefficients(
    prediction: Prediction, path: AffinePath, t: Times
) -> tuple[Tensor, Tensor]:
    """The two factors of v = a x + b prediction, equation (2). Infinite or nan where it does not exist."""
    check(prediction)
    if prediction == "velocity":
        return torch.zeros_like(t), torch.ones_like(t)
    alpha, d_alpha = path.alpha(t), path.d_alpha(t)
    std, d_std = path.std(t), path.d_std(t)
    if prediction == "data":
        return d_std / std, d_alpha - alpha * (d_std / std)
    rate = d_alpha / alpha
    if prediction == "noise":
        return rate, d_std - rate * std
    # V'/2 as one quantity: finite where std' is not
    return rate, rate * path.variance(t) - path.half_d_variance(t)


def to_velocity(
    prediction: Prediction, output: Points, xt: Points, t: Times, path: AffinePath
) -> Points:
    """The velocity that a prediction stands for, equation (2).

    Raises:
        ValueError: shapes differ, t lies outside [0, 1], or the conversion does not exist at t.
    """
    require_prediction(output, xt, t)
    if prediction == "velocity":
        return output
    a, b = velocity_coefficients(prediction, path, t)
    require_finite(prediction, "velocity", path, t, a, b)
    return expand_like(a, xt) * xt + expand_like(b, xt) * output


def to_endpoints(
    prediction: Prediction, output: Points, xt: Points, t: Times, path: AffinePath
) -> EndPoints:
    """The data point and the noise that a prediction stands for, equation (1).

    Raises:
        ValueError: shapes differ, t lies outside [0, 1], or the conversion does not exist at t.
    """
    check(prediction)
    require_prediction(output, xt, t)
    alpha, std = path.alpha(t), path.std(t)
    if prediction == "velocity":
        d_alpha, d_std = path.d_alpha(t), path.d_std(t)
        d = d_alpha * std - alpha * d_std
        coefficients = [std / d, -d_std / d, -alpha / d, d_alpha / d]
        require_finite(prediction, "end points", path, t, *coefficients)
        p, q, r, s = (expand_like(c, xt) for c in coefficients)
        return EndPoints(p * output + q * xt, r * output + s * xt)
    if prediction == "data":
        require_finite(prediction, "noise", path, t, 1 / std)
        return EndPoints(output, (xt - expand_like(alpha, xt) * output) / expand_like(std, xt))
    x0 = output if prediction == "noise" else -expand_like(std, xt) * output
    require_finite(prediction, "data point", path, t, 1 / alpha)
    return EndPoints((xt - expand_like(std, xt) * x0) / expand_like(alpha, xt), x0)


def domain(prediction: Prediction, path: Path) -> tuple[float, float]:
    """Where the velocity of a prediction exists: the path's range, off the ends where (2) divides by zero.

    Raises:
        ValueError: a prediction other than the velocity, on a path that is not affine.
    """
    low, high = path.t_range
    if prediction == "velocity":
        return low, high
    path = affine(path, f"prediction={prediction!r}")
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    a, b = velocity_coefficients(prediction, path, ends)
    exists = (a.isfinite() & b.isfinite()).tolist()
    return low if exists[0] else max(low, T_EPS), high if exists[1] else min(high, 1 - T_EPS)


def affine(path: Path, use: str) -> AffinePath:
    """A path that is known to have curves.

    Args:
        use: what asks for them, as the message names it.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(path, AffinePath):
        raise ValueError(
            f"{use} needs a path with curves alpha and sigma, and {type(path).__name__} has none: predict the "
            "velocity and sample by an ODE solver, or take an AffinePath such as Linear"
        )
    return path


def require_prediction(output: Tensor, xt: Tensor, t: Tensor) -> None:
    require_like("the prediction", output, "xt", xt)
    require_times(t, len(xt))


def require_finite(
    prediction: str, wanted: str, path: AffinePath, t: Times, *values: Tensor
) -> None:
    finite = torch.stack([v.isfinite() for v in values]).all(0)
    if not bool(finite.all()):
        where = float(t if t.ndim == 0 else t[~finite][0])
        low, high = domain(prediction, path)  # type: ignore[arg-type]
        end = "the data end" if where > 0.5 else "the source end"
        raise ValueError(
            f"prediction={prediction!r} gives no {wanted} at t={where:g}: {type(path).__name__} is singular at {end}. "
            f"Stay in [{max(low, T_EPS) if math.isclose(where, low) else low:g}, "
            f"{min(high, 1 - T_EPS) if math.isclose(where, high) else high:g}], or predict 'velocity'."
        )
