r"""MeanFlow: the average velocity by its identity with the derivative along the path.

    u(x, s, t) = v(x, s) + (t - s) d/ds u(x_s, s, t)                                                    (1)

Time runs from noise to data here, and the START of the interval is differentiated: the sign is plus, and with the
published time, from data to noise, it is minus. The loss is |u - sg(target)|^2 with

    target = u_s + (t - s) (w . grad_x + d_s) u,    w = beta u_s + (1 - beta) u(x, s, s)                (2)

where u_s is the conditional velocity. The tangent w of the derivative may be the conditional one, beta = 1, as MeanFlow
has it, or the network's own, beta = 0, which is the loss of improved MeanFlow: on the exact map the noise of (2) is
(I + beta (A - I)) (u_s - v) with A the Jacobian of the map, so that the best beta depends on where the flow contracts.

Source: Geng et al. 2025, arXiv:2505.13447, eq. 6, 11; improved MeanFlow, arXiv:2512.02012.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fmlightning.flow.flow_maps import AverageVelocity
from fmlightning.flow.objectives.cfm import mean_square
from fmlightning.flow.objectives.flow_map import FlowMapObjective, Pair
from fmlightning.flow.shapes import PerSample, Points

TANGENTS = {"conditional": 1.0, "network": 0.0}


@dataclass(frozen=True)
class MeanFlow(FlowMapObjective):
    """The loss with target (2).

    Args:
        tangent: beta of (2), or its name: conditional is 1, network is 0.
    """

    tangent: Literal["conditional", "network"] | float = "conditional"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tangent, str) and self.tangent not in TANGENTS:
            raise ValueError(
                f"tangent={self.tangent!r} must be one of {', '.join(TANGENTS)}, or a number between them"
            )

    @property
    def beta(self) -> float:
        return TANGENTS[self.tangent] if isinstance(self.tangent, str) else self.tangent

    def off(self, u: AverageVelocity, pair: Pair) -> PerSample:
        return mean_square(u(pair.x, pair.s, pair.t) - self.target(u, pair))

    @torch.no_grad()
    def target(self, u: AverageVelocity, pair: Pair) -> Points:
        """Equation (2), a constant to the gradient."""
        x, v, s, t, _ = pair
        w = v if self.beta == 1 else torch.lerp(u(x, s), v, self.beta)
        _, along = u.along((x, s, t), (w, torch.ones_like(s), torch.zeros_like(t)))
        return v + pair.h * along
