r"""Couplings for data with conditions: classes, or numbers.

Sampling draws x0 without looking at the condition c. So training must show every condition the whole distribution of
x0, and plain optimal transport does not: it gives each condition the source points that lie near its data. Let the
source points stand beside the batch, so that x0_i has the condition c_i by chance. Then

    C_ij = |x0_i - x1_j|^2 + w f(c_i, c_j)                                                         (1)

keeps a source point near the condition that chance gave it: f = [c_i != c_j] for classes, and |c_i - c_j|^2 or
1 - cos(c_i, c_j) for numbers. For w = infinity and classes, x0 is independent of the class; of numbers no two
agree, and x0 stays where it is. In between, w trades short paths for a source that is the same for all. It is found
from the share of pairs that are still cheaper than those that chance made,

    r(w) = #{(i, j): C_ij <= |x0_i - x1_i|^2} / n^2                                                (2)

which falls from about a half for w = 0 to 1/n.

Source: Cheng and Schwing 2025, arXiv:2503.10636, sec. 4.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch

from fmlightning.flow.couplings.coupling import (
    Conditions,
    Coupling,
    Matrix,
    Pairs,
    pair_blockwise,
    require_equal,
    require_size,
    squared_distances,
)
from fmlightning.flow.couplings.exact import SOLVERS, MinibatchOT, fastest
from fmlightning.flow.shapes import Points, require_choice

Difference = Literal["squared", "cosine"]


@dataclass(frozen=True)
class ClasswiseOT(Coupling):
    """A coupling within each class: the source points that stand beside a class are paired with its data.

    Which source points those are does not depend on where they lie, so x0 stays independent of the label.

    Args:
        within: the coupling of one class.
        ot_batch_size: points whose classes are paired at a time; null is the global batch. A multiple of it gives
            each class more points to choose from.
    """

    within: Coupling = field(default_factory=MinibatchOT)
    ot_batch_size: int | None = None

    def __post_init__(self) -> None:
        require_size(self.ot_batch_size)
        if self.within.fitted:
            raise ValueError(
                f"within={type(self.within).__name__}: a potential is of the whole data set and not of a class; use "
                "within=MinibatchOT"
            )

    @property
    def independent(self) -> bool:  # type: ignore[override]
        return self.within.independent

    def pairs(
        self, x0: Points, x1: Points, y: Conditions | None, generator: torch.Generator
    ) -> Pairs:
        y = required(self, y)
        require_equal(x0, x1, y)
        if y.is_floating_point():
            raise ValueError(
                "ClasswiseOT pairs within each class, and y holds numbers that are no classes: use C2OT"
            )
        return pair_blockwise(self.ot_batch_size, partial(self.of_classes, generator), x0, x1, y)

    def of_classes(
        self, generator: torch.Generator, x0: Points, x1: Points, y: Conditions | None
    ) -> Pairs:
        y = required(self, y)
        i, j = torch.arange(len(x1), device=x1.device).repeat(2, 1)
        for label in y.unique():
            members = (y == label).nonzero().flatten()
            source, data = self.within.pairs(x0[members], x1[members], None, generator)
            i[members], j[members] = members[source], members[data]
        return i, j


@dataclass(frozen=True)
class C2OT(Coupling):
    """Conditional optimal transport: the assignment of least cost (1).

    For a finite weight x0 is not exactly independent of the condition: source points cross over to another
    condition where that saves more than `w f`. A class-conditional model that must not be biased takes ClasswiseOT.

    Args:
        weight: w of (1); null finds it for each batch by `ratio`.
        ratio: r(w) of (2) that null aims at; large is short paths, small is a source that is the same for all. Pairs
            within a class count too: of ten classes they are more than 0.05, and the pairs are those of ClasswiseOT.
        difference: f of (1) for conditions that are numbers: squared is |c_i - c_j|^2, cosine is 1 - cos(c_i, c_j).
        ot_batch_size: points that are paired at a time, as in MinibatchOT.
    """

    weight: float | None = None
    ratio: float = 0.05
    difference: Difference = "squared"
    ot_batch_size: int | None = None

    def __post_init__(self) -> None:
        require_choice(self, "difference", get_args(Difference))
        require_size(self.ot_batch_size)
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(
                f"weight={self.weight} must be positive and finite; without conditions use MinibatchOT, and for "
                "classes that are never exchanged ClasswiseOT"
            )
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must lie in (0, 1): it is a share of all pairs")

    def pairs(
        self, x0: Points, x1: Points, y: Conditions | None, generator: torch.Generator
    ) -> Pairs:
        y = required(self, y)
        require_equal(x0, x1, y)
        return pair_blockwise(self.ot_batch_size, self.solve, x0, x1, y)

    def solve(self, x0: Points, x1: Points, y: Conditions | None) -> Pairs:
        """The pairs of least cost (1) of one block."""
        cost = squared_distances(x0, x1)
        difference = differences(required(self, y), self.difference).to(cost)
        w = weight_of_ratio(cost, difference, self.ratio) if self.weight is None else self.weight
        solve = SOLVERS[fastest(len(x0), x0[0].numel())]
        return solve(cost + w * difference), torch.arange(len(x1), device=x1.device)


def required(coupling: Coupling, y: Conditions | None) -> Conditions:
    if y is None:
        raise ValueError(
            f"{type(coupling).__name__} needs labels y; for data without labels use MinibatchOT"
        )
    return y


def differences(y: Conditions, of_numbers: Difference) -> Matrix:
    """f(c_i, c_j) of (1), in float64."""
    if not y.is_floating_point():
        return (y[:, None] != y).double()
    if of_numbers == "squared":
        return squared_distances(y, y).clamp(min=0).fill_diagonal_(0)
    norms = y.double().norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise ValueError(
            "difference=cosine: a condition y is zero and has no direction; use difference=squared"
        )
    unit = y.double() / norms
    return (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0)


def weight_of_ratio(cost: Matrix, difference: Matrix, ratio: float) -> float:
    """The smallest w with r(w) <= ratio, exactly: the quantile of the w at which each pair stops being cheaper.

    A pair with the same condition never stops; where those alone are more than `ratio`, the largest such w is taken,
    beyond which nothing changes.
    """
    saved = cost.diagonal()[:, None] - cost
    stops = (saved / difference)[(saved >= 0) & (difference > 0)]
    forever = int(((saved >= 0) & (difference <= 0)).sum())
    allowed = max(0, int(ratio * cost.numel()) - forever)
    if allowed >= len(stops):
        return 0.0
    # just above the pair that is one too many
    return float(stops.kthvalue(len(stops) - allowed).values) * (1 + 1e-9)
