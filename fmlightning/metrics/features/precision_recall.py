r"""Precision and recall of generated images, by their features.

The set of a sample is the union of balls about its points, each as large as the distance to its k-th nearest neighbour:

    precision: the part of generated images in the set of the real ones                   (1)
    recall: the part of real images in the set of the generated ones                      (2)

Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, with features of VGG-16; those of Inception are used since
Dhariwal and Nichol 2021, arXiv:2105.05233. Values of different features or N do not compare.
"""

import torch
from torch import Tensor

from fmlightning.flow.shapes import Labels
from fmlightning.metrics.features.base import Choice, FeatureMetric, size_of
from fmlightning.metrics.features.collectors import FeatureBuffer, Features
from fmlightning.metrics.features.networks import FeatureNetwork, Layers
from fmlightning.metrics.metric import by_name
from fmlightning.metrics.reference import ReferenceData

ROWS = 1024
"""Points whose distances to all others are in memory at once."""


class PrecisionRecall(FeatureMetric):
    """`precision@N` and `recall@N` of N generated against N training images.

    Args:
        features: `inception`; others, as for Frechet, give `precision_digits@N`, ...
        num_samples: N.
        neighbour: k, which neighbour a ball reaches to.
        weights: file of Inception weights, as for Frechet.
        sha256: its digest.
    """

    higher_is_better = by_name(precision=True, recall=True)

    def __init__(
        self,
        features: Choice | FeatureNetwork = "auto",
        num_samples: int = 350,
        neighbour: int = 3,
        weights: str | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__(features, num_samples, weights, sha256)
        if not 1 <= neighbour < num_samples:
            raise ValueError(
                f"neighbour={neighbour} must lie between 1 and num_samples - 1 = {num_samples - 1}"
            )
        self.neighbour = neighbour
        self.generated = FeatureBuffer()

    def fit_features(self, real: ReferenceData) -> None:
        self.reference = self.reference_features(real, self.num_samples).double()
        if len(self.reference) <= self.neighbour:
            raise ValueError(
                f"evaluation.metrics: neighbour={self.neighbour} exceeds the {len(self.reference)} training images"
            )
        self.radii = reach(self.reference, self.neighbour)
        self.generated.update(*self.nothing())
        if size_of(real, "test") >= self.num_samples:
            self.real = self.scores(self.features_of(real, "test", self.num_samples), "_real")

    def update_features(self, layers: Layers, index: Labels, y: Labels | None) -> None:
        self.generated.update(layers[self.layer], index)

    def compute(self) -> dict[str, float]:
        return self.scores(self.generated.compute()) | self.real

    def scores(self, features: Features, ending: str = "") -> dict[str, float]:
        features = features.double()
        radii = reach(features, self.neighbour)
        values = {
            "precision": covered(features, self.reference, self.radii),
            "recall": covered(self.reference, features, radii),
        }
        return {
            f"{self.named({'inception': name}, name)}@{self.num_samples}{ending}": value
            for name, value in values.items()
        }


def reach(x: Features, k: int) -> Tensor:
    """The distance of each point to its k-th nearest neighbour, itself not counted, (N,)."""
    return torch.cat([torch.cdist(rows, x).kthvalue(k + 1).values for rows in x.split(ROWS)])


def covered(x: Features, centers: Features, radii: Tensor) -> float:
    """The part of the points that lie in one of the balls at least."""
    inside = [(torch.cdist(rows, centers) <= radii).any(1) for rows in x.split(ROWS)]
    return float(torch.cat(inside).double().mean())
