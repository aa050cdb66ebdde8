r"""What becomes of samples that cannot be integrated.

The error norm of an adaptive method spans the batch, so one sample whose steps become too small stops all of them.
Here a batch that failed is split into the samples that look guilty and the rest, and each part is integrated with
its own norm, until a part succeeds or is a single sample. Only what fails alone is given up.

The field is still called with the whole batch, as it may hold the labels of all; the other samples rest meanwhile.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fmlightning.flow.shapes import Field, Points
from fmlightning.flow.solvers.solution import Mask, Solution, SolverError

MOST = 32
"""Failures in one batch after which the rest is not tried: then it is the field or the solver that is wrong."""


def retry_subsets(
    attempt: Callable[[Mask], Solution], whole: Mask, error: SolverError
) -> tuple[Solution, Tensor, Tensor, int, Mask]:
    """Integrate what can be of a batch that failed.

    Args:
        attempt: integrates the chosen samples, and may leave anything in place of the others.
        whole: the samples of the batch.
        error: how it failed.

    Returns: some part's solution; the state and the saved states of all, NaN where it failed; all evaluations
        together; which failed.

    Raises:
        SolverError: all failed, or too many.
    """
    x = states = solved = None
    nfe, failed = error.nfe, torch.zeros_like(whole)
    for rows, result, calls in parts(attempt, whole, error):
        nfe += calls
        if result is None:
            failed = failed | rows
            if int(failed.sum()) > MOST:
                raise error
            continue
        solved = result
        there = rows.reshape(-1, *[1] * (result.x.ndim - 1))
        blank = torch.full_like(result.x, torch.nan)
        x = torch.where(there, result.x, blank if x is None else x)
        before = torch.full_like(result.states, torch.nan) if states is None else states
        states = torch.where(there, result.states, before)
    if solved is None or x is None or states is None:
        raise error
    return solved, x, states, nfe, failed


def parts(
    attempt: Callable[[Mask], Solution], rows: Mask, error: SolverError
) -> Iterator[tuple[Mask, Solution | None, int]]:
    """The parts of samples that failed together, each with its solution, or None, and its evaluations."""
    if int(rows.sum()) == 1:
        yield rows, None, 0
        return
    for part in split(rows, error.suspects):
        try:
            solution = attempt(part)
        except SolverError as again:
            yield torch.zeros_like(rows), None, again.nfe
            yield from parts(attempt, part, again)
        else:
            yield part, solution, solution.nfe


def split(rows: Mask, suspects: Mask | None) -> tuple[Mask, Mask]:
    """The guilty and the others, or two halves where that tells nothing."""
    first = rows & suspects if suspects is not None else torch.zeros_like(rows)
    if not bool(first.any()) or bool((first == rows).all()):
        place = rows.cumsum(0)
        first = rows & (place <= place[-1] // 2)
    return first, rows & ~first


def suspect_samples(x: Points, v: Points, rows: Mask) -> Mask:
    """The samples whose state or velocity is not finite, or else the fastest."""
    finite = x.flatten(1).isfinite().all(1) & v.flatten(1).isfinite().all(1)
    if bool((rows & ~finite).any()):
        return rows & ~finite
    speed = torch.where(rows, sizes(v), -1.0)
    return rows & (speed == speed.max())


def sizes(x: Points) -> Tensor:
    """The largest element of each sample, (B,)."""
    return x.detach().flatten(1).abs().amax(1)


def only(field: Field, x: Points, rows: Mask) -> Field:
    """A field that moves the chosen samples and lets the others rest at x."""
    there = rows.reshape(-1, *[1] * (x.ndim - 1))

    def moved(state: Tensor, t: Tensor) -> Tensor:
        v = field(torch.where(there, state, x), t)
        return torch.where(there, v, torch.zeros_like(v))

    return moved


def root_mean_square(rows: Mask) -> Callable[[Tensor], Tensor]:
    """The error norm of the chosen samples, as if there were no others."""
    return lambda error: error[rows].square().mean().sqrt()
