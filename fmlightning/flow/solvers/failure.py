r"""Samples that cannot be integrated.

The error norm of an adaptive method spans the batch, so one sample whose steps become too small stops all of them.
Here a batch that failed is split into the suspects and the rest, and each part is integrated with
its own norm, until a part succeeds or is a single sample. Only what fails alone is given up.

The field is still called with the whole batch, as it may hold the labels of all; the other samples are frozen
meanwhile.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fmlightning.flow.shapes import Field, Points, flat
from fmlightning.flow.solvers.solution import Mask, Solution, SolverError

MOST = 32
"""Failures in one batch after which the rest is not tried: then it is the field or the solver that is wrong."""


def retry_subsets(
    attempt: Callable[[Mask], Solution], whole: Mask, error: SolverError
) -> tuple[Solution, Tensor, Tensor, int, Mask]:
    """Integrate those samples of a failed batch that can be.

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
    for chosen, result, calls in parts(attempt, whole, error):
        nfe += calls
        if result is None:
            failed = failed | chosen
            if int(failed.sum()) > MOST:
                raise error
            continue
        solved = result
        mask = chosen.reshape(-1, *[1] * (result.x.ndim - 1))
        blank = torch.full_like(result.x, torch.nan)
        x = torch.where(mask, result.x, blank if x is None else x)
        before = torch.full_like(result.states, torch.nan) if states is None else states
        states = torch.where(mask, result.states, before)
    if solved is None or x is None or states is None:
        raise error
    return solved, x, states, nfe, failed


def parts(
    attempt: Callable[[Mask], Solution], chosen: Mask, error: SolverError
) -> Iterator[tuple[Mask, Solution | None, int]]:
    """The parts of samples that failed together, each with its solution, or None, and its evaluations."""
    if int(chosen.sum()) == 1:
        yield chosen, None, 0
        return
    for part in split(chosen, error.suspects):
        try:
            solution = attempt(part)
        except SolverError as again:
            yield torch.zeros_like(chosen), None, again.nfe
            yield from parts(attempt, part, again)
        else:
            yield part, solution, solution.nfe


def split(chosen: Mask, suspects: Mask | None) -> tuple[Mask, Mask]:
    """The suspects and the others, or two halves where there are no suspects or nothing else."""
    first = chosen & suspects if suspects is not None else torch.zeros_like(chosen)
    if not bool(first.any()) or bool((first == chosen).all()):
        place = chosen.cumsum(0)
        first = chosen & (place <= place[-1] // 2)
    return first, chosen & ~first


def suspect_samples(x: Points, v: Points, chosen: Mask) -> Mask:
    """The samples whose state or velocity is not finite, or else the fastest."""
    finite = flat(x).isfinite().all(1) & flat(v).isfinite().all(1)
    if bool((chosen & ~finite).any()):
        return chosen & ~finite
    speed = torch.where(chosen, sizes(v), -1.0)
    return chosen & (speed == speed.max())


def sizes(x: Points) -> Tensor:
    """The largest element of each sample, (B,)."""
    return flat(x.detach()).abs().amax(1)


def freeze_others(field: Field, x: Points, chosen: Mask) -> Field:
    """A field that moves the chosen samples and freezes the others at x."""
    mask = chosen.reshape(-1, *[1] * (x.ndim - 1))

    def moved(state: Tensor, t: Tensor) -> Tensor:
        v = field(torch.where(mask, state, x), t)
        return torch.where(mask, v, torch.zeros_like(v))

    return moved


def root_mean_square(chosen: Mask) -> Callable[[Tensor], Tensor]:
    """The error norm of the chosen samples, as if there were no others."""
    return lambda error: error[chosen].square().mean().sqrt()
