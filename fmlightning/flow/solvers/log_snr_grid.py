r"""A grid of equal steps of lambda = log(alpha / sigma).

Where D, the expected data point, changes as fast everywhere in lambda, these are the steps that an exponential
method wants (Lu et al. 2022, arXiv:2206.00927, sec. 3.3). lambda is infinite where the data or the noise is gone; the
grid meets such an end in one step of its own. That step is of order one, so its length falls with the number of steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.solvers.time_grids import TimeGrid


@dataclass(frozen=True)
class LogSNRGrid(TimeGrid):
    """Equal steps of the logarithm of the signal-to-noise ratio, on the path of the field.

    Args:
        end_step: length of the step from an end without data, or to one without noise, in parts of a step of the
            uniform grid; up to 1.
    """

    end_step: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.end_step <= 1:
            raise ValueError(f"end_step={self.end_step} must lie in (0, 1]")

    def warp(self, s: Tensor) -> Tensor:
        raise ValueError("LogSNRGrid depends on the path: call points(..., path=...)")

    def points(
        self, num_steps: int, t0: float, t1: float, path: AffinePath | None = None
    ) -> Tensor:
        """`num_steps + 1` times from t0 to t1 in float64, in either direction.

        Raises:
            ValueError: no schedule.
        """
        if path is None:
            raise ValueError(
                "grid=LogSNRGrid takes its steps from a path, and was given a field without one: pass path=... "
                "with it, or take UniformGrid"
            )
        low, high = min(t0, t1), max(t0, t1)
        ends = torch.tensor([low, high], dtype=torch.float64)
        infinite = path.alpha_over_sigma(ends).log().isinf()
        away = (
            torch.tensor([1.0, -1.0], dtype=torch.float64)
            * self.end_step
            * (high - low)
            / num_steps
        )
        first, last = path.alpha_over_sigma(ends + away * infinite).log().tolist()
        inside = path.alpha_over_sigma_inverse(
            equal_steps(first, last, num_steps + 1 - int(infinite.sum())).exp()
        )
        grid = torch.cat((ends[:1][infinite[:1]], inside, ends[1:][infinite[1:]]))
        grid[0], grid[-1] = low, high  # exactly: solvers compare the ends
        return grid if t0 <= t1 else grid.flip(0)


def equal_steps(first: float, last: float, count: int) -> Tensor:
    """Numbers from the first to the last; a single one lies in the middle."""
    if count == 1:
        return torch.tensor([(first + last) / 2], dtype=torch.float64)
    return torch.linspace(first, last, count, dtype=torch.float64)
