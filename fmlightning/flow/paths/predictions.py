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

from fmlightning.flow.paths.affine import PathSample
from fmlightning.flow.paths.schedules import T_EPS, Schedule
from fmlightning.flow.shapes import Points, Times, expand_like, require_like, require_times

Prediction = Literal["velocity", "data", "noise", "score"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


class EndPoints(NamedTuple):
    """What a prediction says the path came from: the data point and the noise."""

    x1: Tensor
    x0: Tensor


def check(predicts: str) -> None:
    if predicts not in PREDICTIONS:
        raise ValueError(
            f"predicts={predicts!r} is unknown; choose one of {', '.join(PREDICTIONS)}"
        )


def target(predicts: Prediction, sample: PathSample, schedule: Schedule) -> Points:
    """What the network is regressed on."""
    check(predicts)
    if predicts == "velocity":
        return sample.ut
    if predicts == "data":
        return sample.x1
    noise = effective_noise(sample, schedule)
    if predicts == "noise":
        return noise
    return -noise / expand_like(schedule.std(sample.t), noise)


def effective_noise(sample: PathSample, schedule: Schedule) -> Points:
    """(x_t - alpha x1) / std, from its parts: the difference would cancel where std is small."""
    if not schedule.stochastic or sample.eps is None:
        return sample.x0
    std = schedule.std(sample.t)
    p, q = schedule.sigma(sample.t) / std, schedule.gamma(sample.t) / std
    return expand_like(p, sample.x0) * sample.x0 + expand_like(q, sample.eps) * sample.eps


def velocity_coefficients(
    predicts: Prediction, schedule: Schedule, t: Times
) -> tuple[Tensor, Tensor]:
    """The two factors of v = a x + b prediction, equation (2). Infinite or nan where it does not exist."""
    check(predicts)
    if predicts == "velocity":
        return torch.zeros_like(t), torch.ones_like(t)
    alpha, d_alpha = schedule.alpha(t), schedule.d_alpha(t)
    std, d_std = schedule.std(t), schedule.d_std(t)
    if predicts == "data":
        return d_std / std, d_alpha - alpha * (d_std / std)
    rate = d_alpha / alpha
    if predicts == "noise":
        return rate, d_std - rate * std
    # V'/2 as one quantity: finite where std' is not
    return rate, rate * schedule.variance(t) - schedule.half_d_variance(t)


def to_velocity(
    predicts: Prediction, prediction: Points, xt: Points, t: Times, schedule: Schedule
) -> Points:
    """The velocity that a prediction stands for, equation (2).

    Raises:
        ValueError: shapes differ, t lies outside [0, 1], or the conversion does not exist at t.
    """
    require_prediction(prediction, xt, t)
    if predicts == "velocity":
        return prediction
    a, b = velocity_coefficients(predicts, schedule, t)
    require_finite(predicts, "velocity", schedule, t, a, b)
    return expand_like(a, xt) * xt + expand_like(b, xt) * prediction


def to_endpoints(
    predicts: Prediction, prediction: Points, xt: Points, t: Times, schedule: Schedule
) -> EndPoints:
    """The data point and the noise that a prediction stands for, equation (1).

    Raises:
        ValueError: shapes differ, t lies outside [0, 1], or the conversion does not exist at t.
    """
    check(predicts)
    require_prediction(prediction, xt, t)
    alpha, std = schedule.alpha(t), schedule.std(t)
    if predicts == "velocity":
        d_alpha, d_std = schedule.d_alpha(t), schedule.d_std(t)
        d = d_alpha * std - alpha * d_std
        coefficients = [std / d, -d_std / d, -alpha / d, d_alpha / d]
        require_finite(predicts, "end points", schedule, t, *coefficients)
        p, q, r, s = (expand_like(c, xt) for c in coefficients)
        return EndPoints(p * prediction + q * xt, r * prediction + s * xt)
    if predicts == "data":
        require_finite(predicts, "noise", schedule, t, 1 / std)
        return EndPoints(
            prediction, (xt - expand_like(alpha, xt) * prediction) / expand_like(std, xt)
        )
    x0 = prediction if predicts == "noise" else -expand_like(std, xt) * prediction
    require_finite(predicts, "data point", schedule, t, 1 / alpha)
    return EndPoints((xt - expand_like(std, xt) * x0) / expand_like(alpha, xt), x0)


def domain(predicts: Prediction, schedule: Schedule) -> tuple[float, float]:
    """Where the velocity of a prediction exists: the schedule's interval, off the ends where (2) divides by zero."""
    low, high = schedule.interval
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    a, b = velocity_coefficients(predicts, schedule, ends)
    exists = (a.isfinite() & b.isfinite()).tolist()
    return low if exists[0] else max(low, T_EPS), high if exists[1] else min(high, 1 - T_EPS)


def require_prediction(prediction: Tensor, xt: Tensor, t: Tensor) -> None:
    require_like("the prediction", prediction, "xt", xt)
    require_times(t, len(xt))


def require_finite(
    predicts: str, wanted: str, schedule: Schedule, t: Times, *values: Tensor
) -> None:
    finite = torch.stack([v.isfinite() for v in values]).all(0)
    if not bool(finite.all()):
        where = float(t if t.ndim == 0 else t[~finite][0])
        low, high = domain(predicts, schedule)  # type: ignore[arg-type]
        end = "the data end" if where > 0.5 else "the source end"
        raise ValueError(
            f"predicts={predicts!r} gives no {wanted} at t={where:g}: {type(schedule).__name__} is singular at {end}. "
            f"Stay in [{max(low, T_EPS) if math.isclose(where, low) else low:g}, "
            f"{min(high, 1 - T_EPS) if math.isclose(where, high) else high:g}], or predict 'velocity'."
        )
