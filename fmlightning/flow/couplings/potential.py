r"""The dual potential of a data set: which data point each source point is carried to.

    k(x0) = argmax_k g_k - |x0 - x_k|^2                                                            (1)

for data x_1 ... x_N and a number g_k for each, or with the probabilities exp((g_k - |x0 - x_k|^2) / reg) where
reg > 0. `semidiscrete` fits g.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fmlightning.flow.shapes import Labels, Points, flat

BLOCK = 2**24
"""Numbers of the matrix of (1) that are held at a time."""


@dataclass(frozen=True, eq=False)
class Potential:
    """A data set with its dual potential.

    Args:
        x1: the data, (N, *S).
        g: the potential, (N,); equation (1) says which point each x0 goes to.
        reg: weight of the entropy.
    """

    x1: Tensor = field(repr=False)
    g: Float[Tensor, " N"] = field(repr=False)
    reg: float = 0.0

    def targets(self, x0: Points, generator: torch.Generator) -> Labels:
        """The k(x0) of (1) for each source point; the generator is drawn from for reg > 0 alone."""
        x0 = flat(x0).to(self.x1)
        size = max(1, BLOCK // max(1, len(x0)))
        best, found = x0.new_full((len(x0),), -math.inf), torch.zeros(len(x0), dtype=torch.int64)
        found = found.to(x0.device)
        for first, scores in self.scores(x0, size):
            if self.reg:
                # a dtype of its own: torch's default one changes during a step in double precision
                u = torch.rand(
                    scores.shape, generator=generator, device=generator.device, dtype=scores.dtype
                )
                scores = scores - self.reg * (-u.to(scores.device).log()).log()
            value, place = scores.max(1)
            found = torch.where(value > best, place + first, found)
            best = torch.maximum(value, best)
        return found

    def scores(self, x0: Float[Tensor, "B D"], size: int) -> Iterator[tuple[int, Tensor]]:
        """g_k - |x0 - x_k|^2 + |x0|^2 in blocks of the data, each with its first k."""
        first = 0
        for x1, g in zip(flat(self.x1).split(size), self.g.split(size), strict=True):
            yield first, torch.addmm((g - x1.double().square().sum(1)).to(x1), x0, x1.T, alpha=2)
            first += len(x1)

    def counts(self, x0: Points, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Number of source points in each cell."""
        return torch.bincount(self.targets(x0, generator), minlength=len(self.g)).double()
