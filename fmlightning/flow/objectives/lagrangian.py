r"""Lagrangian self-distillation: where the map arrives, it moves with the flow.

    d/dt X_{s,t}(x) = v(X_{s,t}(x), t),    X_{s,t}(x) = x + (t - s) u(x, s, t)                          (1)

The left side is u + (t - s) d_t u, by one derivative in time and none in space; on the right stands the network's own
velocity, a constant to the gradient.

Source: Boffi, Albergo, Vanden-Eijnden 2025, arXiv:2505.18825, and 2024, arXiv:2406.07507.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fmlightning.flow.flow_maps import AverageVelocity
from fmlightning.flow.objectives.cfm import mean_square
from fmlightning.flow.objectives.flow_map import FlowMapObjective, Pair
from fmlightning.flow.shapes import PerSample


@dataclass(frozen=True)
class LSD(FlowMapObjective):
    """The squared residual of (1)."""

    second_order: ClassVar[bool] = True

    def off(self, u: AverageVelocity, pair: Pair) -> PerSample:
        x, _, s, t, _ = pair
        still = torch.zeros_like(x), torch.zeros_like(s), torch.ones_like(t)
        average, d_t = u.along((x, s, t), still)
        with torch.no_grad():
            velocity = u(x + pair.h * average, t)
        return mean_square(average + pair.h * d_t - velocity)
