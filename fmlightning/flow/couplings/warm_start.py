r"""Warm start of an assignment problem: an approximate dual potential of its columns.

For any v

    sum_j C[i_j, j]   and   sum_j (C[i_j, j] - v_j)                                                (1)

have one minimiser. A solver of shortest augmenting paths carries such a v and begins with 0; the nearer the v that is
taken off beforehand is to that of its end, the shorter its paths. Optimal transport with a little entropy has a v near
by, at the cost of products with a matrix: with K = exp(-C / eps),

    a = 1 / (K b),   b = 1 / (K' a),   u = eps log a,   v = eps log b                              (2)

in turn, first for a coarse eps, and then, with C - u - v for C, for a fine one. They need not converge, nor to be
exact: whatever v is, the assignment found with it is the best.

Source: Jonker and Volgenant 1987, "A shortest augmenting path algorithm"; Cuturi 2013, arXiv:1306.0895; the steps of
eps and the absorption of u and v: Schmitzer 2019, arXiv:1610.06519.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fmlightning.flow.couplings.coupling import Matrix

SCALES = 0.2, 0.02
"""eps, in means of the cost that is left when each row's and column's least is taken off."""

ITERATIONS = 10
"""Iterations (2) for each eps."""


def warm_started(cost: Matrix) -> Matrix:
    """The cost less the dual potential of each column, in the precision of the cost."""
    return cost - dual_potential(cost)


def dual_potential(cost: Matrix) -> Float[Tensor, " B"]:
    """v of (2), in float32, on the device of the cost."""
    left, v = without_least(cost.float())
    # all pairs may cost the same
    mean = left.mean().clamp(min=torch.finfo(left.dtype).tiny)
    for scale in SCALES:
        eps = scale * mean
        k = (left / -eps).exp_()  # every row and column has a one: no sum is empty
        b = torch.ones_like(v)
        for _ in range(ITERATIONS):
            a = (k @ b).reciprocal_()
            b = (k.T @ a).reciprocal_()
        step = b.log_() * eps
        left, least = without_least(left - (a.log_() * eps)[:, None] - step)
        v += step + least
    return v.nan_to_num_(0.0, 0.0, 0.0)  # what left the range of float32 is no help, and no harm


def without_least(cost: Matrix) -> tuple[Matrix, Float[Tensor, " B"]]:
    """The cost less the least of each row and then of each column, and those of the columns."""
    cost = cost - cost.amin(1, keepdim=True)
    least = cost.amin(0)
    return cost - least, least
