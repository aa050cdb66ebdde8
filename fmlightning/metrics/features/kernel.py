r"""The kernel distance between the features of generated and of real images: a squared MMD without bias.

    k(x, y) = (x . y / D + 1)^3                                                            (1)
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)      (2)

It is taken as the mean over random subsets. It may be slightly negative where the distributions are alike.

Source: Binkowski et al. 2018, arXiv:1801.01401.
"""

import torch
from torch import Tensor

from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import Labels
from fmlightning.metrics.features.base import Choice, FeatureMetric, size_of
from fmlightning.metrics.features.collectors import FeatureBuffer, Features
from fmlightning.metrics.features.networks import FeatureNetwork, Layers
from fmlightning.metrics.metric import by_name
from fmlightning.metrics.reference import ReferenceData

NAMES = {"inception": "kid"}
SUBSET = 1000


class KernelDistance(FeatureMetric):
    """The mean of (2) over subsets, `kid@N`, and its standard deviation over them, `kid@N_std`.

    Args:
        features: `inception` gives `kid@N`; others, as for Frechet, `kid_digits@N`, ...
        num_samples: N, of generated images and as many of the training images.
        subsets: how many.
        subset_size: images of either kind in one; by default 1000, or half of num_samples if that is less.
        weights: file of Inception weights, as for Frechet.
        sha256: its digest.
    """

    higher_is_better = by_name(kid=False)

    def __init__(
        self,
        features: Choice | FeatureNetwork = "auto",
        num_samples: int = 350,
        subsets: int = 100,
        subset_size: int | None = None,
        weights: str | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__(features, num_samples, weights, sha256)
        self.subsets = subsets
        self.subset_size = subset_size or min(SUBSET, max(2, num_samples // 2))
        if subsets < 1 or not 2 <= self.subset_size <= num_samples:
            raise ValueError(
                f"subsets={subsets} must be at least 1, and subset_size={subset_size} lie between 2 and num_samples="
                f"{num_samples}"
            )
        self.name = self.named(NAMES, "kid")
        self.generated = FeatureBuffer()

    def fit_features(self, real: ReferenceData) -> None:
        self.reference = self.reference_features(real, self.num_samples)
        if len(self.reference) < self.subset_size:
            raise ValueError(
                f"evaluation.metrics: subset_size={self.subset_size} exceeds the {len(self.reference)} training images"
            )
        self.generated.update(*self.nothing())
        if size_of(real, "test") >= self.num_samples:
            held_out = self.features_of(real, "test", self.num_samples)
            self.real = self.distance(held_out, "_real")

    def update_features(self, layers: Layers, index: Labels, y: Labels | None) -> None:
        self.generated.update(layers[self.layer], index)

    def compute(self) -> dict[str, float]:
        return self.distance(self.generated.compute()) | self.real

    def distance(self, features: Features, ending: str = "") -> dict[str, float]:
        values = kernel_distances(features, self.reference, self.subsets, self.subset_size)
        name = f"{self.name}@{self.num_samples}"
        scores = {f"{name}{ending}": float(values.mean())}
        return scores if ending else scores | {f"{name}_std": float(values.std(correction=0))}


def kernel_distances(x: Features, y: Features, subsets: int, size: int) -> Tensor:
    """(2) of each of some subsets of two samples."""
    values = []
    for number in range(subsets):
        rows = [subset(len(z), size, "xy"[i], number).to(z.device) for i, z in enumerate((x, y))]
        values.append(mmd2(x[rows[0]].double(), y[rows[1]].double()))
    return torch.stack(values)


def subset(n: int, size: int, side: str, number: int) -> Tensor:
    return torch.randperm(n, generator=Key(0).fold("subset", side, number).generator())[:size]


def mmd2(x: Features, y: Features) -> Tensor:
    """Equation (2)."""
    xy = kernel(x, y).mean()
    return without_diagonal(kernel(x, x)) + without_diagonal(kernel(y, y)) - 2 * xy


def kernel(x: Features, y: Features) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def without_diagonal(k: Tensor) -> Tensor:
    """The mean of all entries off the diagonal."""
    n = len(k)
    return (k.sum() - k.trace()) / (n * (n - 1))
