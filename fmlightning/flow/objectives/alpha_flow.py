r"""alpha-Flow: from flow matching, alpha = 1, to MeanFlow, alpha -> 0, by a step along the path, not a derivative.

    target = alpha u_s + (1 - alpha) sg u(x + d u_s, s + d, t),    d = alpha (t - s)                    (1)

The loss is |u - target|^2 / alpha: the target tends to u itself, and the gradient of the scaled loss to MeanFlow's.

Source: Zhang et al. 2025, arXiv:2510.20771, eq. 9.
"""

from dataclasses import dataclass

import torch

from fmlightning.flow.flow_maps import AverageVelocity
from fmlightning.flow.objectives.cfm import mean_square
from fmlightning.flow.objectives.flow_map import FlowMapObjective, Pair
from fmlightning.flow.shapes import PerSample, Points


@dataclass(frozen=True)
class AlphaFlow(FlowMapObjective):
    """The loss with target (1).

    Args:
        alpha: in (0, 1]; small is nearly MeanFlow, and its gradient noisier in single precision.
    """

    alpha: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in (0, 1]")

    def off(self, u: AverageVelocity, pair: Pair) -> PerSample:
        return mean_square(u(pair.x, pair.s, pair.t) - self.target(u, pair)) / self.alpha

    @torch.no_grad()
    def target(self, u: AverageVelocity, pair: Pair) -> Points:
        """Equation (1)."""
        x, v, s, t, _ = pair
        ahead = u(x + self.alpha * pair.h * v, s + self.alpha * (t - s), t)
        return torch.lerp(ahead, v, self.alpha)
