r"""Solving dx/dt = v(x, t).

Adaptive methods are torchdiffeq's, fixed steps those of `runge_kutta` and `dpm_solver`: one loop, whose cost is the
field's, and whose stages are known. A solver returns the state at the end, the number of function evaluations it
counted, and only those states on the way that were requested. A descending interval runs the flow backwards.
The field is never called at a time outside the interval.

Time is float64 throughout; the state keeps its precision. The error norm of an adaptive method spans the
whole batch, so its steps, its NFE and, to the tolerance, its result depend on the batch: report its size.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torchdiffeq import odeint

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.paths.path import Path
from fmlightning.flow.paths.predictions import affine
from fmlightning.flow.shapes import Field, Labels, Points, flat, require_time
from fmlightning.flow.solvers.counted import NFECounter as NFECounter
from fmlightning.flow.solvers.counted import TorchdiffeqField
from fmlightning.flow.solvers.dpm_solver import DPMSolver2M
from fmlightning.flow.solvers.failure import (
    freeze_others,
    retry_subsets,
    root_mean_square,
    sizes,
    suspect_samples,
)
from fmlightning.flow.solvers.log_snr_grid import LogSNRGrid as LogSNRGrid
from fmlightning.flow.solvers.runge_kutta import METHODS, Step, integrate_fixed
from fmlightning.flow.solvers.solution import Mask
from fmlightning.flow.solvers.solution import Solution as Solution
from fmlightning.flow.solvers.solution import SolverError as SolverError
from fmlightning.flow.solvers.solver import Solver, TrainedField, ends, finish, path_start
from fmlightning.flow.solvers.time_grids import TimeGrid, UniformGrid

FixedMethod = Literal[
    "euler",
    "midpoint",
    "heun2",
    "heun3",
    "rk4",
    "ab2",
    "ab3",
    "ab4",
    "dpmpp_2m",
    "explicit_adams",
    "implicit_adams",
]
AdaptiveMethod = Literal["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
Method = Literal[FixedMethod, AdaptiveMethod]
FIXED: tuple[str, ...] = get_args(FixedMethod)
ADAMS = {"explicit_adams": 5, "implicit_adams": 4}
"""torchdiffeq's `max_order` for fourth order: its explicit method uses one slope fewer."""
ADAPTIVE: tuple[str, ...] = get_args(AdaptiveMethod)


@dataclass(frozen=True)
class ODESolver(Solver):
    """An ODE method and its settings.

    Args:
        method: fixed-step euler, midpoint, heun2, heun3, rk4 (the 3/8 rule), Adams-Bashforth ab2, ab3, ab4,
            dpmpp_2m (DPM-Solver++(2M), which needs the path of the field), or
            torchdiffeq's explicit_adams and implicit_adams, of fourth order on an even grid (its own default of
            twelve is unstable: an error of 0.46 on dx/dt = -x in 80 steps);
            adaptive dopri5, dopri8, bosh3, fehlberg2, adaptive_heun.
        num_steps: intervals of a fixed-step method. In each, midpoint and heun2 call the field twice, heun3
            three times and rk4 four times; euler, dpmpp_2m and, after their first steps, ab2 to ab4 once.
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance of an adaptive method.
        grid: the times between the steps of a fixed-step method.
        max_num_steps: steps between two saved times after which an adaptive method gives up.
        failed: raise, or nan: samples that cannot be integrated become NaN with a warning, and the others of the
            batch are kept. The NFE then counts the attempts too.
        lower_order_final: whether the last step of dpmpp_2m is of order one.
    """

    method: Method = "dopri5"
    num_steps: int = 50
    rtol: float = 1e-5
    atol: float = 1e-5
    grid: TimeGrid = field(default_factory=UniformGrid)
    max_num_steps: int = 10_000
    failed: Literal["raise", "nan"] = "raise"
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        if self.method not in FIXED + ADAPTIVE:
            raise ValueError(
                f"method={self.method!r} is unknown; choose one of {', '.join(FIXED + ADAPTIVE)}"
            )
        if self.method in ADAMS and self.grid != UniformGrid():
            raise ValueError(
                f"method={self.method!r} has the weights of equal steps: grid={self.grid} needs ab2, ab3, ab4 or a "
                "method of one step"
            )
        if self.failed not in ("raise", "nan"):
            raise ValueError(f"failed={self.failed!r} is unknown: choose raise or nan")
        for name in ("num_steps", "rtol", "atol", "max_num_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    @property
    def name(self) -> str:
        return self.method

    def check(self, model: TrainedField) -> None:
        super().check(model)
        if self.exponential or isinstance(self.grid, LogSNRGrid):
            affine(model.path, f"model.solver with method={self.method!r} and grid={self.grid}")

    @property
    def fixed(self) -> bool:
        return self.method in FIXED

    @property
    def evaluations(self) -> int | None:
        method = self.exponential or METHODS.get(self.method)
        return method.evaluations(self.num_steps) if method else None

    @property
    def exponential(self) -> DPMSolver2M | None:
        """The method that needs the path of the field, if this is it."""
        return DPMSolver2M(self.lower_order_final) if self.method == "dpmpp_2m" else None

    def refined(self) -> "ODESolver":
        """The solver that checks this one: a tenth of the tolerances, or twice the steps."""
        if self.fixed:
            return replace(self, num_steps=2 * self.num_steps)
        return replace(self, rtol=self.rtol / 10, atol=self.atol / 10)

    def sample(
        self,
        model: TrainedField,
        x0: Points,
        *,
        y: Labels | None = None,
        t0: float | None = None,
        t1: float | None = None,
        save_at: int | Sequence[float] = 0,
        noise: Points | None = None,
        streams: KeyedStreams | None = None,
    ) -> Solution:
        """Carry source points to the data along the flow; `streams` are not used."""
        start, end = ends(model, t0, t1)
        x = path_start(model, x0, start, noise)
        solution = self.solve(model.given(y), x, start, end, save_at, path=model.path)
        return finish(model, solution, end, y)

    def solve(
        self,
        field: Field,
        x: Points,
        t0: float = 0.0,
        t1: float = 1.0,
        save_at: int | Sequence[float] = 0,
        inner: Field | None = None,
        path: Path | None = None,
    ) -> Solution:
        """Integrate a field from (x, t0) to t1.

        Args:
            field: `(x, t) -> v` with t a scalar tensor.
            x: the state at t0, (B, *S).
            t0: start; may be later than t1, which runs the flow backwards.
            t1: end.
            save_at: states to return: a number of equally spaced times with both ends, or the times
                themselves. A fixed-step method interpolates linearly between its steps.
            inner: what to call instead at the stages whose slope does not enter the step, as the first of
                midpoint; for fields with parts that only the result needs. Adaptive methods ignore it.
            path: the curves of the field's path, for dpmpp_2m and LogSNRGrid, which need them; taken from a field
                that has them.

        Raises:
            SolverError: the step size underflowed, the steps ran out or the state is not finite.
            ValueError: times outside the interval or, for a field that has a path, outside [0, 1]; an empty
                interval; a velocity of another shape than x; a method or grid without the path that it needs.
        """
        require_ends(field, t0, t1)
        if t0 == t1:
            raise ValueError(f"the interval from t0={t0:g} to t1={t1:g} is empty")
        times = saved_times(save_at, t0, t1)
        if self.evaluations:
            path = path or getattr(field, "path", None)
            grid = self.grid.points(self.num_steps, t0, t1, path).tolist()
            return self.integrate_fixed(field, inner, x, grid, times, path)
        try:
            return self.integrate_adaptive(field, x, t0, t1, times)
        except SolverError as error:
            if self.fixed or self.failed == "raise":
                raise
            return self.rescued(field, x, t0, t1, times, error)

    def rescued(
        self, field: Field, x: Points, t0: float, t1: float, times: Tensor, error: SolverError
    ) -> Solution:
        """An adaptive solution of the samples that have one."""

        def attempt(chosen: Mask) -> Solution:
            return self.integrate_adaptive(
                freeze_others(field, x, chosen), x, t0, t1, times, chosen
            )

        whole = torch.ones(len(x), dtype=torch.bool, device=x.device)
        part, end, states, nfe, failed = retry_subsets(attempt, whole, error)
        warn_of(self.method, failed)
        return Solution(end, nfe, part.times, states)

    def integrate_fixed(
        self,
        field: Field,
        inner: Field | None,
        x: Points,
        grid: list[float],
        times: Tensor,
        path: Path | None,
    ) -> Solution:
        """The solution by a fixed-step method of `runge_kutta` or `dpm_solver`."""
        counted = NFECounter(field)
        counted_inner = counted if inner is None else NFECounter(inner)
        found = integrate_fixed(
            self.stepper(counted, counted_inner, grid, path), x, grid, times.tolist()
        )
        nfe = counted.nfe + (0 if inner is None else counted_inner.nfe)
        end = self.checked(found.x, found.lost_at, nfe)
        return Solution(end, nfe, times.to(x.device), found.states)

    def stepper(
        self, field: NFECounter, inner: NFECounter, grid: list[float], path: Path | None
    ) -> Step:
        if self.exponential is None:
            return METHODS[self.method].stepper(field, inner)
        if path is None or inner is not field:
            raise ValueError(
                "method='dpmpp_2m' integrates the states of a path, and was given a field without one: pass "
                "path=... with it; a likelihood takes heun2 or dopri5"
            )
        return self.exponential.stepper(field, affine(path, "method='dpmpp_2m'"), grid)

    def integrate_adaptive(
        self,
        field: Field,
        x: Points,
        t0: float,
        t1: float,
        times: Tensor,
        chosen: Mask | None = None,
    ) -> Solution:
        """The solution by torchdiffeq; the error norm of an adaptive method may span the chosen samples only."""
        counted = NFECounter(field)
        watched = TorchdiffeqField(counted, min(t0, t1), max(t0, t1))
        stops = torch.cat((torch.tensor([t0, t1], dtype=torch.float64), times)).unique()
        stops = (stops if t0 < t1 else stops.flip(0)).to(x.device)
        try:
            states = odeint(
                watched,
                x,
                stops,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options=self.options(stops, chosen),
            )
        except AssertionError as error:
            whole = torch.ones(len(x), dtype=torch.bool, device=x.device)
            found = suspect_samples(counted.x, counted.v, whole if chosen is None else chosen)
            raise SolverError(
                f"{self.method} stopped at t={float(counted.t):.6g} after {counted.nfe} evaluations: "
                f"{str(error).split(': tensor')[0]}. It seems to be {describe(found, counted)}; "
                f"rtol={self.rtol:g}, atol={self.atol:g}. Loosen the tolerances, narrow the interval, use a "
                "fixed-step method, or keep the other samples with failed=nan.",
                found,
                counted.nfe,
            ) from error
        end = self.checked(states[-1], watched.lost_at(states[-1], t1), counted.nfe)
        keep = torch.isin(stops, times.to(stops.device))
        return Solution(end, counted.nfe, stops[keep], states[keep])

    def checked(self, x: Tensor, lost_at: float | None, nfe: int) -> Tensor:
        """The state at the end, all finite; or, of a fixed-step method that may fail, NaN where it is not."""
        bad = ~flat(x).isfinite().all(1)
        if lost_at is None or self.failed == "raise" or not self.fixed or bool(bad.all()):
            require_finite(self.method, x, lost_at, nfe)
            return x
        warn_of(self.method, bad)
        return torch.where(bad.reshape(-1, *[1] * (x.ndim - 1)), torch.nan, x)

    def options(self, stops: Tensor, chosen: Mask | None = None) -> dict[str, object]:
        """The options of torchdiffeq beside the tolerances."""
        if self.fixed:
            # a grid of its own: torchdiffeq would else keep the state of every step
            points = self.grid.points(self.num_steps, float(stops[0]), float(stops[-1]))
            order = {"max_order": ADAMS[self.method]} if self.method in ADAMS else {}
            return {"grid_constructor": lambda func, y0, t: points.to(t), **order}
        norm = {} if chosen is None else {"norm": root_mean_square(chosen)}
        return norm | {
            "dtype": torch.float64,
            "max_num_steps": self.max_num_steps,
            # else the last step passes t1, where the path may not exist
            "step_t": stops[-1:],
        }


def require_ends(field: Field, *ends: float) -> None:
    """Refuse what is no time, once before the loop: a check at each evaluation would make a GPU wait."""
    trained = isinstance(field, TrainedField)
    for name, t in zip(("t0", "t1"), ends, strict=True):
        if trained:
            require_time(name, t)
        elif not math.isfinite(t):
            raise ValueError(f"{name}={t:g} must be a finite time")


def saved_times(save_at: int | Sequence[float], t0: float, t1: float) -> Tensor:
    """The requested times, each once, in the order of the integration, in float64."""
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
    return times.unique() if t0 < t1 else times.unique().flip(0)


def require_finite(method: str, x: Tensor, lost_at: float | None, nfe: int) -> None:
    if lost_at is None:
        return
    bad = ~flat(x).isfinite().all(1)
    raise SolverError(
        f"{method} lost {int(bad.sum())} of {len(x)} samples (first: {first_of(bad)}): the state is not finite at "
        f"t={lost_at:.6g}; {nfe} evaluations. The field may be singular there, or the steps too large.",
        bad,
        nfe,
    )


def first_of(chosen: Mask, most: int = 5) -> list[int]:
    """The first of the chosen samples."""
    return chosen.nonzero().flatten()[:most].tolist()


def describe(chosen: Mask, last: NFECounter) -> str:
    """The chosen samples, with the state and the velocity of the first where the solver gave up."""
    first = first_of(chosen, 1)[0]
    x, v = (float(sizes(y)[first]) for y in (last.x, last.v))
    more = int(chosen.sum()) - 1
    others = f" and {more} more" if more else ""
    return f"sample {first} of {len(chosen)}{others}: max |x| = {x:.3g}, max |v| = {v:.3g}"


def warn_of(method: str, failed: Mask) -> None:
    warnings.warn(
        f"{method} could not integrate {int(failed.sum())} of {len(failed)} samples (first: {first_of(failed)}): "
        "they are NaN",
        stacklevel=4,
    )
