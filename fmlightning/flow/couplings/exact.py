r"""Exact optimal transport of a batch.

With weights 1/n on both sides a plan of least cost is a permutation: the assignment problem

    min over permutations i of   sum_j C[i_j, j]                                                   (1)

Two solvers find it: scipy's, which adds one pair after the other by a shortest path, from dual potentials that make the
paths short, and POT's network simplex.

Source: Crouse 2016, "On implementing 2D rectangular assignment algorithms"; Bonneel et al. 2011, "Displacement
interpolation using Lagrangian mass transport".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from scipy.optimize import linear_sum_assignment

from fmlightning.flow.couplings.coupling import (
    Conditions,
    Coupling,
    Indices,
    Matrix,
    Pairs,
    draw_columns,
    pair_blockwise,
    refuse_labels,
    require_equal,
    require_size,
    squared_distances,
)
from fmlightning.flow.couplings.warm_start import warm_started, without_least
from fmlightning.flow.shapes import Points, require_choice

Exact = Literal["assignment", "simplex"]
Method = Literal["fastest", "assignment", "simplex"]

SIMPLEX_SIZE, SIMPLEX_DIMENSION = 4096, 3
"""From so many points on and up to so many dimensions the simplex is the faster: `benchmarks/couplings.py`."""

WARM_START_SIZE = 192
"""From so many points on a warm start saves more time than it takes."""


@dataclass(frozen=True)
class MinibatchOT(Coupling):
    """Exact optimal transport of the batch, as a permutation: every point is used once.

    Args:
        ot_batch_size: points that are paired at a time; null is the global batch. A larger one, a multiple of the
            batch, pairs several batches together and then trains on one after the other: closer to the transport of
            the distributions, at a cost of its square and more. A smaller one pairs the batch in blocks, faster.
        method: assignment (scipy), simplex (POT), or the one that is faster at this size; all find the optimum.
    """

    ot_batch_size: int | None = None
    method: Method = "fastest"

    def __post_init__(self) -> None:
        require_size(self.ot_batch_size)
        require_choice(self, "method", get_args(Method))

    def pairs(
        self, x0: Points, x1: Points, y: Conditions | None, generator: torch.Generator
    ) -> Pairs:
        refuse_labels(self, y)
        require_equal(x0, x1, y)
        return pair_blockwise(self.ot_batch_size, self.solve, x0, x1)

    def solve(self, x0: Points, x1: Points, y: Conditions | None = None) -> Pairs:
        """The pairs (1) of one block."""
        known = fastest(len(x0), x0[0].numel()) if self.method == "fastest" else self.method
        return SOLVERS[known](squared_distances(x0, x1)), torch.arange(len(x1), device=x1.device)


@dataclass(frozen=True)
class OTPlanWithReplacement(Coupling):
    """POT's exact plan, sampled n times with replacement as TorchCFM does, for reproducing its figures.

    About 1/e of the batch is not used. For anything else `MinibatchOT` is better.

    Args:
        max_iterations: iterations of POT's network simplex after which it gives up.
    """

    max_iterations: int = 1_000_000

    def __post_init__(self) -> None:
        if not self.max_iterations > 0:
            raise ValueError(f"max_iterations={self.max_iterations} must be positive")

    def pairs(
        self, x0: Points, x1: Points, y: Conditions | None, generator: torch.Generator
    ) -> Pairs:
        refuse_labels(self, y)
        plan = vertex(squared_distances(x0, x1), self.max_iterations, "MinibatchOT")
        plan = plan.to(generator.device)
        # rows are equally heavy: a row, then a column in it, is a pair of the plan
        i = torch.randint(len(x0), (len(x0),), generator=generator, device=generator.device)
        return i.to(x0.device), draw_columns(plan[i], generator).to(x1.device)


def fastest(size: int, dimension: int) -> Exact:
    """The solver that was measured to be the faster."""
    small = dimension <= SIMPLEX_DIMENSION and size >= SIMPLEX_SIZE
    return "simplex" if small else "assignment"


def assignment(cost: Matrix) -> Indices:
    """The permutation (1), by shortest augmenting paths."""
    # what is the same in a row or a column changes no assignment
    reduced = warm_started(cost) if len(cost) >= WARM_START_SIZE else without_least(cost)[0]
    columns = torch.from_numpy(linear_sum_assignment(reduced.cpu().numpy())[1])
    return columns.argsort().to(cost.device)


def simplex(cost: Matrix) -> Indices:
    """The permutation (1), by POT's network simplex."""
    plan = vertex(cost, max(1_000_000, len(cost) ** 2), "method=assignment")
    # a vertex of the polytope of plans with equal weights is a permutation
    return plan.argmax(0).to(cost.device)


SOLVERS: dict[Exact, Callable[[Matrix], Indices]] = {"assignment": assignment, "simplex": simplex}


def vertex(cost: Matrix, max_iterations: int, cure: str) -> Matrix:
    """The plan that POT finds between unit weights, on the CPU.

    Raises:
        ValueError: it did not come to an end.
    """
    import ot  # here, as it takes a second that no other coupling needs

    ones = torch.ones(len(cost), dtype=torch.float64).numpy()  # unlike 1/n these add up exactly
    plan, log = ot.emd(
        ones, ones, cost.cpu().numpy(), numItermax=max_iterations, log=True,
        center_dual=False, check_marginals=False,
    )  # fmt: skip
    if log["warning"] is not None:  # POT would print it and return a plan that is not the best
        raise ValueError(
            f"POT found no optimal plan of {len(cost)} pairs in max_iterations={max_iterations}: allow more, "
            f"or use {cure}"
        )
    return torch.from_numpy(plan)
