r"""Drawing from a trained flow: keyed noise -> model -> solver -> samples.

Sample k is a function of (seed, k) and the solver, in whatever batch it is drawn: to rounding with fixed
steps, to its tolerance with adaptive ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fmlightning.flow.keys import Key, KeyedStreams
from fmlightning.flow.paths.schedules import Schedule
from fmlightning.flow.shapes import Labels
from fmlightning.flow.solvers.solution import Solution
from fmlightning.flow.solvers.solver import Solver, TrainedField
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


def brownian_streams(seed: int, index: Tensor) -> KeyedStreams:
    """The streams that a stochastic solver draws the Brownian paths of the given samples from."""
    return Key(seed).fold("sampling", "sde").streams(index)


@torch.no_grad()
def generate(
    field: TrainedField,
    x0: Tensor,
    solver: Solver,
    *,
    y: Labels | None = None,
    save_at: int | Sequence[float] = 0,
    eps: Tensor | None = None,
    streams: KeyedStreams | None = None,
) -> Solution:
    """Carry source points to the data: `Solver.sample` over the interval of the field, without gradients.

    Args:
        x0: source points, (B, *S).
        y: class labels, (B,).
        save_at: states to return, as in `ODESolver.solve`; times are those of the interval.
        eps: the noise of a path with gamma > 0 at its start, (B, *S), as from `path_noise`.
        streams: keyed streams of the samples, for a stochastic solver, as from `brownian_streams`.
    """
    return solver.sample(field, x0, y=y, save_at=save_at, noise=eps, streams=streams)


def sample(
    field: TrainedField,
    source: Source,
    solver: Solver,
    index: Tensor,
    event_shape: Sequence[int],
    *,
    seed: int = 0,
    y: Labels | None = None,
    save_at: int | Sequence[float] = 0,
) -> Solution:
    """The samples with the given numbers: `generate` from their own keyed noise.

    Args:
        source: the distribution at t = 0.
        index: sample numbers, (B,), on the device of the field.
        event_shape: the shape of one sample.
        y: class labels, (B,).
        save_at: states to return, as in `ODESolver.solve`.
    """
    x0 = source_points(source, seed, index, event_shape)
    eps, streams = (
        path_noise(field.schedule, seed, index, event_shape),
        brownian_streams(seed, index),
    )
    return generate(field, x0, solver, y=y, save_at=save_at, eps=eps, streams=streams)
