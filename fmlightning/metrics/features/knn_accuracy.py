r"""Accuracy of the classes of generated images, by the nearest neighbours of their features.

An image is taken for the class that most of its k nearest training images have, in the space of the features. The rule
is not trained, and it asks little of the features: rules that weigh them by how they vary between real images are led
astray by generated ones, which vary otherwise.

Source: Cover and Hart 1967, IEEE Trans. Information Theory 13, 21.
"""

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from fmlightning.flow.shapes import Labels, Points
from fmlightning.metrics.features.base import Choice, FeatureMetric, size_of
from fmlightning.metrics.features.collectors import FeatureBuffer, Features
from fmlightning.metrics.features.networks import FeatureNetwork, Layers
from fmlightning.metrics.metric import by_name
from fmlightning.metrics.reference import ReferenceData


class KNNAccuracy(FeatureMetric):
    """`accuracy_NAME@N`: the part of N images whose neighbours are of the class requested; beside it, of held-out ones.

    Args:
        features: a network such as Textures, whose name is NAME; or as for Frechet.
        num_samples: N.
        neighbours: k; of a tie, the smallest class is taken.
        references: training images that are looked at, at most, spread over the set.
        weights: file of Inception weights, as for Frechet.
        sha256: its digest.
    """

    higher_is_better = by_name(accuracy=True)
    correct: Tensor
    requested: Tensor

    def __init__(
        self,
        features: Choice | FeatureNetwork,
        num_samples: int = 350,
        neighbours: int = 5,
        references: int = 20_000,
        weights: str | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__(features, num_samples, weights, sha256)
        if not 1 <= neighbours <= references:
            raise ValueError(
                f"neighbours={neighbours} must lie between 1 and references={references}"
            )
        self.neighbours, self.references = neighbours, references
        self.name = f"accuracy_{self.kind}"
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("requested", torch.tensor(0), dist_reduce_fx="sum")

    def check(self, held_out: Points, y: Labels | None, num_bins: int | None) -> None:
        super().check(held_out, y, num_bins)
        if y is None:
            raise ValueError(
                "evaluation.metrics: KNNAccuracy tells classes apart, and these data have none; take labelled data"
            )

    def fit_features(self, real: ReferenceData) -> None:
        count = min(self.references, size_of(real, "reference"))
        make = lambda: {"labelled": self.labelled(real, count)}  # noqa: E731
        found = self.cached(real, f"labelled-{count}", make)["labelled"]
        self.known, self.classes = found[:, :-1], found[:, -1].long()
        if len(found) < self.neighbours:
            raise ValueError(
                f"evaluation.metrics: neighbours={self.neighbours} exceeds the {len(found)} training images"
            )
        count, hits = size_of(real, "test"), MeanMetric().to(self.device)
        hits.update(*self.nothing()[1:], weight=0)
        for layers, _, y in self.stream(real, "test", count):
            assert y is not None
            hits.update(self.taken_for(layers[self.layer]).eq(y).float())
        self.real = {f"{self.name}@{count}_real": float(hits.compute())}

    def labelled(self, real: ReferenceData, count: int) -> Tensor:
        """Training images on every process: their features, and their class as a last column."""
        kept = FeatureBuffer().to(self.device)
        empty, none = self.nothing()
        kept.update(torch.cat((empty, empty[:, :1]), 1), none)
        for layers, index, y in self.stream(real, "reference", count):
            assert y is not None
            kept.update(torch.cat((layers[self.layer], y[:, None].float()), 1), index)
        return kept.compute()

    def taken_for(self, features: Features) -> Labels:
        """The class of most neighbours of each."""
        distances = torch.cdist(features.double(), self.known.double())
        nearest = distances.topk(self.neighbours, largest=False).indices
        return self.classes[nearest].mode(1).values

    def update_features(self, layers: Layers, index: Labels, y: Labels | None) -> None:
        if y is not None:
            self.correct += (self.taken_for(layers[self.layer]) == y).sum()
            self.requested += len(y)

    def compute(self) -> dict[str, float]:
        n = int(self.requested)
        found = {f"{self.name}@{n}": float(self.correct / self.requested)} if n else {}
        return found | self.real
