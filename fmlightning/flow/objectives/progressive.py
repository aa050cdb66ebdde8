r"""Progressive self-distillation: one jump is two, one after the other.

    u(x, s, t) = g u(x, s, m) + (1 - g) u(X_{s,m}(x), m, t),    m = s + g (t - s)                       (1)

The weights are durations. The right side is a constant to the gradient; no derivative is needed. With g = 1/2 and times
on a grid of powers of two, `DyadicPairs`, it is the self-consistency of shortcut models.

Source: Boffi, Albergo, Vanden-Eijnden 2025, arXiv:2505.18825; Frans et al. 2024, arXiv:2410.12557.
"""

from dataclasses import dataclass

import torch

from fmlightning.flow.flow_maps import AverageVelocity
from fmlightning.flow.objectives.cfm import mean_square
from fmlightning.flow.objectives.flow_map import FlowMapObjective, Pair
from fmlightning.flow.shapes import PerSample, Points


@dataclass(frozen=True)
class PSD(FlowMapObjective):
    """The squared difference of (1).

    Args:
        split: g of (1), in (0, 1); none draws it evenly for each row.
    """

    split: float | None = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split is not None and not 0 < self.split < 1:
            raise ValueError(
                f"split={self.split} must lie in (0, 1), or be null for one drawn for each row"
            )

    def off(self, u: AverageVelocity, pair: Pair) -> PerSample:
        return mean_square(u(pair.x, pair.s, pair.t) - self.target(u, pair))

    @torch.no_grad()
    def target(self, u: AverageVelocity, pair: Pair) -> Points:
        """The right side of (1)."""
        x, _, s, t, drawn = pair
        g = drawn if self.split is None else torch.full_like(s, self.split)
        m, share = s + g * (t - s), g.reshape(pair.h.shape)
        first = u(x, s, m)
        second = u(x + share * pair.h * first, m, t)
        return share * first + (1 - share) * second
