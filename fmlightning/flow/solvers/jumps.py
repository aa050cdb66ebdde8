r"""Jumps: sampling by a flow map, in as many evaluations as there are jumps.

    x_{j+1} = X_{t_j, t_{j+1}}(x_j),    X_{s,t}(x) = x + (t - s) u(x, s, t)                              (1)

A perfect map is exact in one jump; a learned one gains from a few. Between two jumps a state is on the straight line
between them, so that states on the way cost nothing.

With `renoise` each jump goes to the end of the path, and the path carries its result back to t_{j+1} with fresh noise,
as consistency models are sampled (Song et al. 2023, arXiv:2303.01469, algorithm 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.shapes import Labels, Points, at
from fmlightning.flow.solvers.ode import saved_times
from fmlightning.flow.solvers.solution import Solution
from fmlightning.flow.solvers.solver import Solver, ends, finish, path_start
from fmlightning.flow.solvers.time_grids import TimeGrid, UniformGrid


@dataclass(frozen=True)
class Jumps(Solver):
    """Jumps of a flow map, equation (1).

    Args:
        num_steps: how many; each is one evaluation.
        grid: the times between them.
        renoise: whether each jump goes to the end, and is carried back with fresh noise.
    """

    num_steps: int = 1
    grid: TimeGrid = field(default_factory=UniformGrid)
    renoise: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"jump"})

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be positive")

    @property
    def name(self) -> str:
        return "jumps"

    @property
    def evaluations(self) -> int:
        return self.num_steps

    def refined(self) -> "Jumps":
        return replace(self, num_steps=2 * self.num_steps)

    def check(self, model: Any) -> None:
        super().check(model)
        if self.renoise and not (model.source is None or model.source.gaussian):
            raise ValueError(
                f"renoise=true carries samples back with Gaussian noise, and the source is {model.source}"
            )

    def sample(
        self,
        model: Any,
        x0: Points,
        *,
        y: Labels | None = None,
        t0: float | None = None,
        t1: float | None = None,
        save_at: int | Sequence[float] = 0,
        noise: Points | None = None,
        streams: KeyedStreams | None = None,
    ) -> Solution:
        t0, t1 = ends(model, t0, t1)
        times = self.grid.points(self.num_steps, t0, t1, model.path)
        x = path_start(model, x0, t0, noise)
        states = [x]
        for step, (s, t) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
            to = t1 if self.renoise else t
            x = model.jump(x, at(s, like=x), at(to, like=x), y)
            if self.renoise and t != t1:
                if streams is None:
                    raise ValueError("renoise=true draws noise: pass streams, one for each sample")
                fresh = streams.normal(x.shape[1:], stream=step, dtype=x.dtype)
                x = model.path.sample(fresh, x, at(t, like=x).expand(len(x))).xt
            states.append(x)
        saved = saved_times(save_at, t0, t1)
        on_the_way = between(times, states, saved)
        return finish(model, Solution(x, self.num_steps, saved, on_the_way), t1, y)


def between(times: torch.Tensor, states: list[Points], saved: torch.Tensor) -> torch.Tensor:
    """The states at some times, on the straight lines between those at others."""
    if not len(saved):
        return states[0].new_empty(0, *states[0].shape)
    ascending = times[-1] >= times[0]
    order = times if ascending else -times
    found = []
    for time in saved if ascending else -saved:
        right = int(torch.searchsorted(order, time).clamp(1, len(order) - 1))
        share = float((time - order[right - 1]) / (order[right] - order[right - 1]))
        found.append(torch.lerp(states[right - 1], states[right], share))
    return torch.stack(found)
