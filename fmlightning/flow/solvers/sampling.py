r"""Drawing from a trained flow: keyed noise -> field -> solver -> samples.

Sample k is a function of (seed, k) and the solver, in whatever batch it is drawn: to rounding with fixed
steps, to its tolerance with adaptive ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fmlightning.flow.keys import Key
from fmlightning.flow.models import TrainedField, at
from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.paths.schedules import Schedule
from fmlightning.flow.shapes import Labels
from fmlightning.flow.solvers.ode import ODESolver, Solution
from fmlightning.flow.sources import Source


def source_points(source: Source, seed: int, index: Tensor, event_shape: Sequence[int]) -> Tensor:
    """The source points of the given samples, (B, *S)."""
    return source.sample_keyed(Key(seed).fold("sampling").streams(index), event_shape)


def path_noise(
    schedule: Schedule, seed: int, index: Tensor, event_shape: Sequence[int]
) -> Tensor | None:
    """The noise that a path with gamma > 0 starts with, (B, *S); None for the others."""
    if not schedule.stochastic:
        return None
    return Key(seed).fold("sampling", "eps").streams(index).normal(event_shape)


@torch.no_grad()
def generate(
    field: TrainedField,
    x0: Tensor,
    solver: ODESolver,
    *,
    y: Labels | None = None,
    save_at: int | Sequence[float] = 0,
    eps: Tensor | None = None,
) -> Solution:
    """Carry source points along the flow to the data.

    The field is integrated over its interval. Where that stops short of t = 1, one more evaluation returns
    the data point the network expects there; it is counted in the NFE.

    Args:
        x0: source points, (B, *S).
        y: class labels, (B,).
        save_at: states to return, as in `ODESolver.solve`; times are those of the interval.
        eps: the noise of a path with gamma > 0 at its start, (B, *S), as from `path_noise`.
    """
    t_min, t_max = field.interval
    start = AffinePath(field.schedule).start(x0, t_min, eps)
    solution = solver.solve(field.given(y), start, t_min, t_max, save_at, schedule=field.schedule)
    if t_max == 1:
        return solution
    x1 = field.data(solution.x, at(t_max, like=start), y)
    return Solution(x1, solution.nfe + 1, solution.times, solution.states)


def sample(
    field: TrainedField,
    source: Source,
    solver: ODESolver,
    index: Tensor,
    event_shape: Sequence[int],
    *,
    seed: int = 0,
    y: Labels | None = None,
    save_at: int | Sequence[float] = 0,
) -> Solution:
    """The samples with the given numbers: `generate` from their own keyed noise.

    Args:
        source: the law at t = 0.
        index: sample numbers, (B,), on the device of the field.
        event_shape: the shape of one sample.
        y: class labels, (B,).
        save_at: states to return, as in `ODESolver.solve`.
    """
    x0 = source_points(source, seed, index, event_shape)
    eps = path_noise(field.schedule, seed, index, event_shape)
    return generate(field, x0, solver, y=y, save_at=save_at, eps=eps)
