r"""Eulerian self-distillation: the map forgets where on the way it started.

    d/ds X_{s,t}(x) + grad X_{s,t}(x) v(x, s) = 0,    X_{s,t}(x) = x + (t - s) u(x, s, t)               (1)

It equals v - u + (t - s) (v . grad_x + d_s) u, with the network's own velocity, a constant to the gradient, for v.
The derivative in space, through which the gradient passes, makes training unstable in all published cases: it is here
to be compared with LSD, and MeanFlow is the form of it that trains.

Source: Boffi, Albergo, Vanden-Eijnden 2025, arXiv:2505.18825.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fmlightning.flow.flow_maps import AverageVelocity
from fmlightning.flow.objectives.cfm import mean_square
from fmlightning.flow.objectives.flow_map import FlowMapObjective, Pair
from fmlightning.flow.shapes import PerSample


@dataclass(frozen=True)
class ESD(FlowMapObjective):
    """The squared residual of (1)."""

    second_order: ClassVar[bool] = True

    def off(self, u: AverageVelocity, pair: Pair) -> PerSample:
        x, _, s, t, _ = pair
        with torch.no_grad():
            velocity = u(x, s)
        average, along = u.along((x, s, t), (velocity, torch.ones_like(s), torch.zeros_like(t)))
        return mean_square(velocity - average + pair.h * along)
