r"""Couplings: which source point goes with which data point.

Given n source points and n data points, a coupling draws pairs (i, j): x0[i] is carried to x1[j]. With the
uniform weights 1/n on both sides and the cost C_ij = |x0_i - x1_j|^2, optimal transport finds

    P = argmin <P, C> - reg H(P)   subject to   P 1 = 1/n,  P' 1 = 1/n                             (1)

with the entropy H(P) = -sum_ij P_ij log P_ij. For reg = 0 a solution is a permutation; for reg > 0 it is

    P_ij = exp((f_i + g_j - C_ij) / reg)                                                           (2)

and Sinkhorn's iterations find f and g. Pairs are indices, so labels and anything else follow the data; the
data keep their order, j = 0 ... n - 1, wherever the method allows.

In every coupling but `Independent`, x0 depends on x1, and so on a label of x1. A network that is told the label
would then be trained on another source law than the one it is sampled from: such pairs are refused, and
`ClasswiseOT` is the cure.

Source: Tong et al. 2024, arXiv:2302.00482, secs. 3 and 4; Pooladian et al. 2023, arXiv:2304.14772.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fmlightning.flow.shapes import Labels, Points

Indices = Int[Tensor, " B"]
Pairs = tuple[Indices, Indices]
Matrix = Float[Tensor, "B B"]


class Coupling(ABC):
    """A way to pair a batch of source points with a batch of data."""

    independent: bool = False
    """Whether x0 is independent of x1: only then does a velocity give the score."""

    @abstractmethod
    def pairs(self, x0: Points, x1: Points, y: Labels | None, generator: torch.Generator) -> Pairs:
        """Index pairs: x0[i] belongs with x1[j] and y[j].

        Args:
            x0: source points, (B, *S).
            x1: data points, (B, *S).
            y: class labels of x1, (B,), if the network sees them.
            generator: the only source of randomness, drawn from where the plan is not a permutation.

        Raises:
            ValueError: x0 would depend on the labels, or the batches do not match.
        """


@dataclass(frozen=True)
class Independent(Coupling):
    """Every source point with every data point equally: the pairs as they come."""

    independent = True

    def pairs(self, x0: Points, x1: Points, y: Labels | None, generator: torch.Generator) -> Pairs:
        require_equal(x0, x1, y)
        everything = torch.arange(len(x1), device=x1.device)
        return everything, everything


@dataclass(frozen=True)
class MinibatchOT(Coupling):
    """Exact optimal transport of the batch, as a permutation: every point is used once."""

    def pairs(self, x0: Points, x1: Points, y: Labels | None, generator: torch.Generator) -> Pairs:
        refuse_labels(self, y)
        return assignment(squared_distances(x0, x1)), torch.arange(len(x1), device=x1.device)


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

    def pairs(self, x0: Points, x1: Points, y: Labels | None, generator: torch.Generator) -> Pairs:
        import ot  # here, as it takes a second that no other coupling needs

        refuse_labels(self, y)
        uniform = torch.full((len(x0),), 1 / len(x0), dtype=torch.float64)
        plan, log = ot.emd(
            uniform,
            uniform,
            squared_distances(x0, x1).cpu(),
            numItermax=self.max_iterations,
            log=True,
        )
        if log["warning"] is not None:  # POT would print it and return a plan that is not the best
            raise ValueError(
                f"POT found no optimal plan of {len(x0)} pairs in max_iterations={self.max_iterations}: allow more, "
                "or use MinibatchOT"
            )
        plan = plan.to(generator.device)
        # rows are equally heavy: a row, then a column in it, is a pair of the plan
        i = torch.randint(len(x0), (len(x0),), generator=generator, device=generator.device)
        return i.to(x0.device), draw_columns(plan[i], generator).to(x1.device)


@dataclass(frozen=True)
class Entropic(Coupling):
    """Entropic optimal transport, equation (1): for each data point a source point is drawn from the plan.

    Args:
        reg: weight of the entropy, in squared units of the data: small is optimal transport, slowly reached;
            large is independent.
        tolerance: total error of the marginals at which Sinkhorn's iterations stop; the marginals sum to one.
        max_iterations: iterations after which they give up.
    """

    reg: float = 1.0
    tolerance: float = 1e-3
    max_iterations: int = 10_000

    def __post_init__(self) -> None:
        if not 0 < self.reg < math.inf:
            raise ValueError(
                f"reg={self.reg} must be positive and finite; without entropy use MinibatchOT"
            )
        require_iterations(self.tolerance, self.max_iterations)

    def pairs(self, x0: Points, x1: Points, y: Labels | None, generator: torch.Generator) -> Pairs:
        refuse_labels(self, y)
        plan = sinkhorn(squared_distances(x0, x1), self.reg, self.tolerance, self.max_iterations)
        i = draw_columns(plan.T.to(generator.device), generator)
        return i.to(x0.device), torch.arange(len(x1), device=x1.device)


@dataclass(frozen=True)
class SchrodingerBridgeCoupling(Coupling):
    """The ends of the Schroedinger bridge of Brownian motion with diffusion s: `Entropic` with reg = 2 s^2.

    Brownian motion goes from x0 to x1 with density exp(-|x0 - x1|^2 / 2 s^2): with the cost |x0 - x1|^2,
    without its half, the weight is 2 s^2. Goes with the schedule `SchrodingerBridge` of the same s.

    Args:
        s: diffusion of the bridge, positive.
        tolerance: as in `Entropic`.
        max_iterations: as in `Entropic`.
    """

    s: float = 1.0
    tolerance: float = 1e-3
    max_iterations: int = 10_000

    def __post_init__(self) -> None:
        if not 0 < self.s < math.inf:
            raise ValueError(
                f"s={self.s} must be positive and finite; without noise use MinibatchOT"
            )
        require_iterations(self.tolerance, self.max_iterations)

    def pairs(self, x0: Points, x1: Points, y: Labels | None, generator: torch.Generator) -> Pairs:
        refuse_labels(self, y)
        entropic = Entropic(2 * self.s**2, self.tolerance, self.max_iterations)
        return entropic.pairs(x0, x1, None, generator)


@dataclass(frozen=True)
class ClasswiseOT(Coupling):
    """A coupling within each class: the source points that stand beside a class are paired with its data.

    Which source points those are does not depend on where they lie, so x0 stays independent of the label.

    Args:
        within: the coupling of one class.
    """

    within: Coupling = field(default_factory=MinibatchOT)

    @property
    def independent(self) -> bool:  # type: ignore[override]
        return self.within.independent

    def pairs(self, x0: Points, x1: Points, y: Labels | None, generator: torch.Generator) -> Pairs:
        if y is None:
            raise ValueError("ClasswiseOT needs labels y; for data without labels use MinibatchOT")
        require_equal(x0, x1, y)
        i, j = torch.arange(len(x1), device=x1.device).repeat(2, 1)
        for label in y.unique():
            members = (y == label).nonzero().flatten()
            source, data = self.within.pairs(x0[members], x1[members], None, generator)
            i[members], j[members] = members[source], members[data]
        return i, j


def require_equal(x0: Points, x1: Points, y: Labels | None) -> None:
    if x0.shape != x1.shape or (y is not None and len(y) != len(x1)):
        labels = "" if y is None else f" and y {tuple(y.shape)}"
        raise ValueError(
            f"x0 {tuple(x0.shape)}, x1 {tuple(x1.shape)}{labels} must have one shape, with a label for each sample"
        )


def require_iterations(tolerance: float, max_iterations: int) -> None:
    if not (tolerance > 0 and max_iterations > 0):
        raise ValueError(
            f"tolerance={tolerance} and max_iterations={max_iterations} must be positive: Sinkhorn's iterations "
            "come close to the marginals and never meet them"
        )


def refuse_labels(coupling: Coupling, y: Labels | None) -> None:
    if y is not None:
        raise ValueError(
            f"{type(coupling).__name__} with labels: x0 would depend on the label through x1, while sampling "
            "draws it without looking at the label, so every class would come out wrong. "
            f"Use ClasswiseOT(within={type(coupling).__name__}(...)) or Independent."
        )


def squared_distances(x0: Points, x1: Points) -> Matrix:
    """|x0_i - x1_j|^2 in float64, for points of any shape and precision."""
    if x0.shape != x1.shape:
        raise ValueError(
            f"x0 {tuple(x0.shape)} and x1 {tuple(x1.shape)} must have one shape (B, *S)"
        )
    a, b = x0.flatten(1).double(), x1.flatten(1).double()
    cost = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    if not bool(cost.isfinite().all()):
        raise ValueError(
            "x0 or x1 holds values that are not finite: there is no distance between them"
        )
    return cost


def assignment(cost: Matrix) -> Indices:
    """The permutation i that minimises sum_j cost[i_j, j]."""
    # what is the same in a row or a column changes no assignment, and without it the solver
    # was measured 2 to 4 times faster in high dimension
    cost = cost - cost.amin(1, keepdim=True)
    cost = cost - cost.amin(0)
    return torch.from_numpy(linear_sum_assignment(cost.T.cpu().numpy())[1]).to(cost.device)


def draw_columns(weights: Matrix, generator: torch.Generator) -> Indices:
    """A column for each row, with probabilities proportional to the row's weights."""
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def sinkhorn(cost: Matrix, reg: float, tolerance: float, max_iterations: int) -> Matrix:
    """The plan (2), by Sinkhorn's iterations in log space; its columns sum to 1/n, its rows nearly.

    Source: Cuturi 2013, arXiv:1306.0895; Peyre and Cuturi 2019, arXiv:1803.00567, sec. 4.4.

    Args:
        tolerance: largest sum of |row sum - 1/n|.

    Raises:
        ValueError: the iterations did not converge.
    """
    scaled, log_weight = cost / reg, -math.log(len(cost))
    rows = torch.logsumexp(-scaled, 1)
    for _ in range(max_iterations):
        f = log_weight - rows
        g = log_weight - torch.logsumexp(f[:, None] - scaled, 0)
        rows = torch.logsumexp(g - scaled, 1)
        error = float((f + rows - log_weight).expm1().abs().mean())
        if error <= tolerance:
            return (f[:, None] + g - scaled).exp()
    raise ValueError(
        f"Sinkhorn with reg={reg:g} has a marginal error of {error:.2g} > {tolerance:g} after {max_iterations} "
        f"iterations, for costs from {float(cost.min()):.3g} to {float(cost.max()):.3g}. Use a larger reg, "
        "more iterations, or MinibatchOT, which is its limit for reg -> 0."
    )
