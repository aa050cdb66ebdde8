r"""How far a solver is from the solution: its own error, apart from that of the network.

    sqrt(E |x - x*|^2 / D)                                                                         (1)

with x* the end of the same trajectory, from the same noise, by a solver that is as good as exact. Of samples that
lie right in law (1) may still be large, where a few steps lead a point to another mode.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from fmlightning.flow.shapes import Points


class SolutionError(Metric):
    """The root mean square (1), as `solver_error`; exact over processes."""

    full_state_update = False
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        for name in ("squares", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Points, exact: Points) -> None:
        """Take ends of trajectories, and where they should be."""
        self.squares += (x.double() - exact.double()).square().sum()
        self.count += x.numel()

    def compute(self) -> dict[str, float]:
        if not self.count:
            return {}
        return {"solver_error": float((self.squares / self.count).sqrt())}
