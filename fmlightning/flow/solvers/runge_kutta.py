r"""Fixed-step methods as data, and the walk along a grid that takes them.

A Runge-Kutta step from (x, t) over h is

    k_i = v(x + h sum_{j<i} a_ij k_j, t + c_i h),     x' = x + h sum_i b_i k_i                    (1)

An Adams-Bashforth step of order p calls the field once: it integrates the polynomial through the last p slopes,

    x' = x + h sum_{j<p} w_j k_{n-j},     sum_j w_j s_j^m = 1 / (m + 1),  0 <= m < p              (2)

with s_j = (t_{n-j} - t_n) / h. As (2) is solved for the grid at hand, uneven steps keep the order. The first
p - 1 steps are Runge-Kutta steps, whose first slopes are the history that (2) needs. Order p - 1 suffices for
them, because they are few: each errs by O(h^p) once.

Source: Hairer, Norsett and Wanner 1993, Solving Ordinary Differential Equations I, sec. II.1 and III.5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fmlightning.flow.shapes import Field, Points, at

Step = Callable[[Tensor, float, float], Tensor]
"""`(x, t0, t1) -> x at t1`."""

LOOK_EVERY = 10
"""Steps between two looks at whether the state is finite: one takes a tenth of a small network's step."""


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method, equation (1).

    Args:
        order: of the global error.
        c: times of the stages, as fractions of the step.
        a: weights of the earlier slopes in each stage.
        b: weights of the slopes in the step.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def stepper(self, field: Field, inner: Field) -> Step:
        return lambda x, t0, t1: self.step(field, inner, x, t0, t1)[0]

    def step(
        self, field: Field, inner: Field, x: Points, t0: float, t1: float
    ) -> tuple[Points, Points]:
        """The state at t1 and the slope at t0; `inner` serves the stages that b weighs by zero."""
        slopes: list[Tensor] = []
        for c, row, b in zip(self.c, self.a, self.b, strict=True):
            t = t1 if c == 1 else t0 + c * (t1 - t0)  # the end exactly: a path may stop there
            stage = advance(x, t1 - t0, row, slopes) if row else x
            slopes.append((field if b else inner)(stage, at(t, x)))
        return advance(x, t1 - t0, self.b, slopes), slopes[0]

    def evaluations(self, num_steps: int) -> int:
        """How often the field is called."""
        return len(self.b) * num_steps


@dataclass(frozen=True)
class AdamsBashforth:
    """An explicit multistep method, equation (2).

    Args:
        order: p, the number of slopes it looks back on.
        start: the Runge-Kutta method of the first steps, of order p - 1 at least.
    """

    order: int
    start: RungeKutta

    def stepper(self, field: Field, inner: Field) -> Step:
        times: list[float] = []
        slopes: list[Tensor] = []

        def step(x: Tensor, t0: float, t1: float) -> Tensor:
            times.insert(0, t0)
            if len(times) < self.order:
                x, slope = self.start.step(field, inner, x, t0, t1)
                slopes.insert(0, slope)
                return x
            slopes.insert(0, field(x, at(t0, x)))
            del times[self.order :], slopes[self.order :]
            return advance(x, t1 - t0, adams_weights(times, t1), slopes)

        return step

    def evaluations(self, num_steps: int) -> int:
        """How often the field is called."""
        return num_steps + (len(self.start.b) - 1) * min(num_steps, self.order - 1)


def adams_weights(times: Sequence[float], end: float) -> list[float]:
    """The weights w of equation (2), for slopes at the given times, newest first."""
    now = times[0]
    s = (torch.tensor(times, dtype=torch.float64) - now) / (end - now)
    moments = 1 / torch.arange(1, len(times) + 1, dtype=torch.float64)
    return torch.linalg.solve(torch.linalg.vander(s).T, moments).tolist()


def advance(x: Points, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Points:
    """x + h sum_i weights_i slopes_i."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = torch.add(x, slope, alpha=h * weight)
    return x


EULER = RungeKutta(1, (0.0,), ((),), (1.0,))
MIDPOINT = RungeKutta(2, (0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0))
HEUN2 = RungeKutta(2, (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2))
HEUN3 = RungeKutta(3, (0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4))
RK4 = RungeKutta(
    4,
    (0.0, 1 / 3, 2 / 3, 1.0),
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

METHODS: dict[str, RungeKutta | AdamsBashforth] = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun2": HEUN2,
    "heun3": HEUN3,
    "rk4": RK4,
    "ab2": AdamsBashforth(2, HEUN2),
    "ab3": AdamsBashforth(3, HEUN2),
    "ab4": AdamsBashforth(4, HEUN3),
}


@dataclass(frozen=True)
class FixedSolution:
    """Where a walk came to, what was saved on the way, and when the state was seen not to be finite, if ever."""

    x: Tensor
    states: Tensor
    lost_at: float | None


def walk(step: Step, x: Points, grid: Sequence[float], times: Sequence[float]) -> FixedSolution:
    """Take a step between each two neighbours of a grid.

    Args:
        step: `(x, t0, t1) -> x`.
        x: the state at grid[0], (B, *S).
        grid: increasing or decreasing times.
        times: when to save, in the order of the grid; the state is interpolated linearly between steps.
    """
    sign = 1 if grid[0] < grid[-1] else -1
    pending, states, sums = list(times), [], []
    for k, (t0, t1) in enumerate(pairwise(grid)):
        after = step(x, t0, t1)
        while pending and sign * pending[0] <= sign * t1:
            states.append(between(x, after, (pending.pop(0) - t0) / (t1 - t0)))
        x = after
        if k % LOOK_EVERY == 0:
            # 0, or NaN: the sum of large numbers may be infinite itself
            sums.append(x.detach().mul(0).sum())
    saved = torch.stack(states) if states else x.new_empty(0, *x.shape)
    return FixedSolution(x, saved, lost_at(x, sums, grid[1::LOOK_EVERY], grid[-1]))


def lost_at(x: Tensor, sums: Sequence[Tensor], times: Sequence[float], end: float) -> float | None:
    """When a state was first seen not to be finite, by the sums of some; what is lost once stays lost.

    All are looked at together in the end: a look on the way would make a GPU wait.
    """
    if bool(x.isfinite().all()):
        return None
    good = torch.stack(list(sums)).isfinite().tolist()
    return times[good.index(False)] if False in good else end


def between(x: Tensor, y: Tensor, weight: float) -> Tensor:
    if weight in (0.0, 1.0):
        return y if weight else x
    return torch.lerp(x, y, weight)
