r"""Couplings with entropy, by Sinkhorn's iterations.

For reg > 0 the plan of least <P, C> - reg H(P) with both marginals uniform is

    P_ij = exp((f_i + g_j - C_ij) / reg)                                                           (1)

and Sinkhorn's iterations find f and g.

Source: Cuturi 2013, arXiv:1306.0895; Peyre and Cuturi 2019, arXiv:1803.00567, sec. 4.4.
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
from fmlightning.flow.shapes import Points


@dataclass(frozen=True)
class Entropic(Coupling):
    """Entropic optimal transport: for each data point a source point is drawn from the plan.

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

    def pairs(
        self, x0: Points, x1: Points, y: Conditions | None, generator: torch.Generator
    ) -> Pairs:
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
        noise_std: s, the diffusion of the bridge, positive.
        tolerance: as in `Entropic`.
        max_iterations: as in `Entropic`.
    """

    noise_std: float = 1.0
    tolerance: float = 1e-3
    max_iterations: int = 10_000

    def __post_init__(self) -> None:
        if not 0 < self.noise_std < math.inf:
            raise ValueError(
                f"noise_std={self.noise_std} must be positive and finite; without noise use MinibatchOT"
            )
        require_iterations(self.tolerance, self.max_iterations)

    def pairs(
        self, x0: Points, x1: Points, y: Conditions | None, generator: torch.Generator
    ) -> Pairs:
        refuse_labels(self, y)
        entropic = Entropic(2 * self.noise_std**2, self.tolerance, self.max_iterations)
        return entropic.pairs(x0, x1, None, generator)


def require_iterations(tolerance: float, max_iterations: int) -> None:
    if not (tolerance > 0 and max_iterations > 0):
        raise ValueError(
            f"tolerance={tolerance} and max_iterations={max_iterations} must be positive: Sinkhorn's iterations "
            "come close to the marginals and never meet them"
        )


def sinkhorn(cost: Matrix, reg: float, tolerance: float, max_iterations: int) -> Matrix:
    """The plan (1), by Sinkhorn's iterations in log space; its columns sum to 1/n, its rows nearly.

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
