r"""Solving dx/dt = v(x, t) with torchdiffeq.

The solver returns the state at the end, the number of function evaluations it counted, and only those
states on the way that were asked for. A descending interval runs the flow backwards.

Time is float64 throughout; the state keeps its precision. The error norm of an adaptive method spans the
whole batch, so its steps, its NFE and, to the tolerance, its result depend on the batch: report its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torchdiffeq import odeint

from fmlightning.flow.shapes import Field, Points
from fmlightning.flow.times import TimeGrid, UniformGrid

FixedMethod = Literal[
    "euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"
]
AdaptiveMethod = Literal["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
Method = Literal[FixedMethod, AdaptiveMethod]
FIXED: tuple[str, ...] = get_args(FixedMethod)
ADAPTIVE: tuple[str, ...] = get_args(AdaptiveMethod)


class SolverError(RuntimeError):
    """The integration failed: what the solver was doing, and when."""


@dataclass(frozen=True)
class Solution:
    """What an integration returns.

    Attributes:
        x: the state at the end, (B, *S).
        nfe: how often the field was called.
        times: the times of `states`, (K,), in float64.
        states: the states at the times asked for, (K, B, *S); K = 0 if none were.
    """

    x: Tensor
    nfe: int
    times: Tensor
    states: Tensor


class Counted:
    """A field with a counter, in torchdiffeq's order of arguments; it remembers the last time it was called at."""

    def __init__(self, field: Field) -> None:
        self.field, self.nfe, self.t = field, 0, float("nan")

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.nfe += 1
        self.t = t
        return self.field(x, t.to(x.dtype))


@dataclass(frozen=True)
class ODESolver:
    """An ODE method and its settings.

    Args:
        method: fixed-step euler, midpoint, heun2, heun3, rk4 (the 3/8 rule), explicit_adams, implicit_adams;
            adaptive dopri5, dopri8, bosh3, fehlberg2, adaptive_heun.
        num_steps: intervals of a fixed-step method; heun2 evaluates the field twice in each, rk4 four times.
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance of an adaptive method.
        grid: where a fixed-step method stops.
        max_num_steps: steps between two times after which an adaptive method gives up.
    """

    method: Method = "dopri5"
    num_steps: int = 50
    rtol: float = 1e-5
    atol: float = 1e-5
    grid: TimeGrid = field(default_factory=UniformGrid)
    max_num_steps: int = 10_000

    def __post_init__(self) -> None:
        if self.method not in FIXED + ADAPTIVE:
            raise ValueError(
                f"method={self.method!r} is unknown; choose one of {', '.join(FIXED + ADAPTIVE)}"
            )
        for name in ("num_steps", "rtol", "atol", "max_num_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    @property
    def fixed(self) -> bool:
        """Whether the steps are set beforehand."""
        return self.method in FIXED

    def solve(
        self,
        field: Field,
        x: Points,
        t0: float = 0.0,
        t1: float = 1.0,
        save_at: int | Sequence[float] = 0,
    ) -> Solution:
        """Integrate a field from (x, t0) to t1.

        Args:
            field: `(x, t) -> v` with t a scalar tensor.
            x: the state at t0, (B, *S).
            t0: start; may be later than t1, which runs the flow backwards.
            t1: end.
            save_at: states to return: a number of equally spaced times with both ends, or the times
                themselves. A fixed-step method interpolates linearly between its steps.

        Raises:
            SolverError: the step size underflowed, the steps ran out or the state is not finite.
            ValueError: times outside the interval, or an empty interval.
        """
        if t0 == t1:
            raise ValueError(f"the interval from t0={t0:g} to t1={t1:g} is empty")
        saved = saved_times(save_at, t0, t1)
        counted = Counted(field)
        ends = torch.tensor([t0, t1], dtype=torch.float64)
        times = torch.cat((ends, saved)).unique(
            sorted=True
        )  # odeint takes increasing or decreasing times
        times = (times if t0 < t1 else times.flip(0)).to(x.device)
        try:
            states = odeint(
                counted,
                x,
                times,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options=self.options(t0, t1),
            )
        except AssertionError as error:
            raise SolverError(
                f"{self.method} stopped at t={float(counted.t):.6g} after {counted.nfe} evaluations: {error}".split(
                    ": tensor"
                )[0]
                + f". rtol={self.rtol:g}, atol={self.atol:g}; largest |x| at the start {float(x.abs().max()):.3g}."
                " Loosen the tolerances, narrow the interval, or use a fixed-step method."
            ) from error
        end = states[-1]
        finite = end.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            bad = (~finite).nonzero().flatten().tolist()
            raise SolverError(
                f"{self.method} returned values that are not finite for {len(bad)} of {len(x)} samples "
                f"(first: {bad[:5]}) after {counted.nfe} evaluations. The field may be singular between "
                f"t={t0:g} and t={t1:g}, or the steps too large."
            )
        keep = torch.isin(times, saved.to(times.device))
        return Solution(end, counted.nfe, times[keep], states[keep])

    def options(self, t0: float, t1: float) -> dict[str, object]:
        if not self.fixed:
            return {"dtype": torch.float64, "max_num_steps": self.max_num_steps}
        # a grid of its own: torchdiffeq would else keep the state of every step
        points = self.grid.points(self.num_steps, t0, t1)
        options: dict[str, object] = {"grid_constructor": lambda func, y0, t: points.to(t)}
        return options


def saved_times(save_at: int | Sequence[float], t0: float, t1: float) -> Tensor:
    if isinstance(save_at, int):
        if save_at < 0 or save_at == 1:
            raise ValueError(
                f"save_at={save_at} must be 0, a number of times of at least 2, or a list of times"
            )
        return torch.linspace(t0, t1, save_at, dtype=torch.float64)
    times = torch.tensor(list(save_at), dtype=torch.float64)
    low, high = min(t0, t1), max(t0, t1)
    if len(times) and not bool(((times >= low) & (times <= high)).all()):
        raise ValueError(f"save_at={list(save_at)} must lie between t0={t0:g} and t1={t1:g}")
    return times
