r"""Optimal transport that may leave data out.

Outliers bend the plan of optimal transport: each must get its 1/n. With a price on the marginal of the data
instead of a constraint, a point that is too far away from every source point is left out:

    P = argmin <P, C> - reg H(P) + mass KL(P' 1 | 1/n)   subject to   P 1 = 1/n                    (1)

P' 1 is the marginal of the data. The plan has the form exp((f_i + g_j - C_ij) / reg) / n^2, and alternately

    f_i = -reg log mean_j exp((g_j - C_ij) / reg)
    g_j = -reg mass / (reg + mass) log mean_i exp((f_i - C_ij) / reg)                              (2)

The source keeps its distribution, as it must, since sampling draws from it; the data do not.

Source: Chizat et al. 2018, arXiv:1607.05816, sec. 4, with a constraint on one side; for minibatches Eyring et al. 2024,
arXiv:2311.15100.
"""

import math
from dataclasses import dataclass

import torch

from fmlightning.flow.couplings.coupling import (
    Conditions,
    Coupling,
    Matrix,
    Pairs,
    draw_columns,
    refuse_labels,
    squared_distances,
)
from fmlightning.flow.couplings.entropic import require_iterations
from fmlightning.flow.shapes import Points


@dataclass(frozen=True)
class UnbalancedOT(Coupling):
    """Minibatch optimal transport (1) that leaves outliers of the data out.

    Every source point is used once, and for each a data point is drawn from the plan. The distribution of x1 is thereby
    changed, on purpose: far points of the data are rarer than in the data set, and a model never learns the farthest.

    Args:
        mass: price of leaving data out, in squared units of the data: what lies farther than its root from where it
            would be taken is left out; large is balanced, `Entropic`.
        reg: weight of the entropy, in the same units, as in `Entropic`.
        tolerance: relative change of the data's weights in P' 1 at which the iterations (2) stop.
        max_iterations: iterations after which they give up.
    """

    mass: float = 10.0
    reg: float = 1.0
    tolerance: float = 1e-3
    max_iterations: int = 10_000

    def __post_init__(self) -> None:
        for name, value in (("mass", self.mass), ("reg", self.reg)):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name}={value} must be positive and finite; without {name} use "
                    f"{'Entropic' if name == 'mass' else 'MinibatchOT'}"
                )
        require_iterations(self.tolerance, self.max_iterations)

    def pairs(
        self, x0: Points, x1: Points, y: Conditions | None, generator: torch.Generator
    ) -> Pairs:
        refuse_labels(self, y)
        cost = squared_distances(x0, x1)
        plan = unbalanced(cost, self.reg, self.mass, self.tolerance, self.max_iterations)
        j = draw_columns(plan.to(generator.device), generator)
        return torch.arange(len(x0), device=x0.device), j.to(x1.device)


def unbalanced(
    cost: Matrix, reg: float, mass: float, tolerance: float, max_iterations: int
) -> Matrix:
    """The plan (1), by the iterations (2); its rows sum to 1/n.

    Raises:
        ValueError: the iterations did not converge.
    """
    scaled, log_n = cost / reg, math.log(len(cost))
    share = mass / (reg + mass)
    g = torch.zeros_like(cost[0])  # in units of reg, as f
    for _ in range(max_iterations):
        f = log_n - torch.logsumexp(g - scaled, 1)
        before, g = g, share * (log_n - torch.logsumexp(f[:, None] - scaled, 0))
        low, high = (g - before).aminmax()  # a constant in g changes f, and no pair
        change = float(high - low) * max(1.0, reg / mass)
        if change <= tolerance:
            f = log_n - torch.logsumexp(g - scaled, 1)
            return (f[:, None] + g - scaled - 2 * log_n).exp()
    raise ValueError(
        f"UnbalancedOT with mass={mass:g} and reg={reg:g} still changes by {change:.2g} > {tolerance:g} after "
        f"{max_iterations} iterations, for costs from {float(cost.min()):.3g} to {float(cost.max()):.3g}. "
        "Use a larger reg, or more iterations."
    )
