r"""Features gathered over blocks and processes: as moments, in memory that does not grow, or as they are.

    n,   s = sum z,   Q = sum z z^T,   z = f - c                                             (1)
    mean c + s / n,   covariance (Q - s s^T / n) / (n - 1)                                   (2)

in float64. Sums (1) of several processes add up. The centre c is one for all of them: near the mean, (2) takes no
difference of large numbers.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fmlightning.flow.shapes import Labels
from fmlightning.metrics.features.gaussian import FeatureGaussian

Features = Float[Tensor, "N D"]


class Moments(Metric):
    """Mean and covariance (2) of features.

    Args:
        center: c, (D,).
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, center: Float[Tensor, " D"]) -> None:
        super().__init__()
        self.center = center.double()
        size = len(center)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")  # fmt: skip

    def update(self, features: Features, index: Labels) -> None:
        z = features.double() - self.center.to(features.device)
        self.count += len(z)
        self.total += z.sum(0)
        self.squares += z.T @ z

    def compute(self) -> FeatureGaussian:
        center = self.center.to(self.total.device)
        covariance = self.squares - torch.outer(self.total, self.total) / self.count
        return FeatureGaussian.from_covariance(
            center + self.total / self.count, covariance / (self.count - 1)
        )


class FeatureBuffer(Metric):
    """The features themselves, in the order of their numbers."""

    full_state_update = False
    features: list[Tensor]
    numbers: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def update(self, features: Features, index: Labels) -> None:
        self.features.append(features)
        self.numbers.append(index.to(features.device))

    def compute(self) -> Features:
        return dim_zero_cat(self.features)[dim_zero_cat(self.numbers).argsort()]
