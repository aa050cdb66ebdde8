"""Metrics of images through the features of a network: the parts that they share."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from fmlightning.flow.pixels import quantise
from fmlightning.flow.shapes import Labels, Points
from fmlightning.metrics.features.classifier import classifier_of
from fmlightning.metrics.features.collectors import FeatureBuffer, Features
from fmlightning.metrics.features.networks import (
    VARIABLE,
    WEIGHTS,
    FeatureNetwork,
    Layers,
    WeightsFile,
    hub_folder,
    inception,
    inception_weights,
    verified,
)
from fmlightning.metrics.metric import SampleMetric
from fmlightning.metrics.reference import ReferenceData, ReferenceSamples, rank_and_size, spread
from fmlightning.runs.cache import Tensors, cached

Choice = Literal["auto", "inception", "spatial", "digits"]


class FeatureMetric(SampleMetric):
    """Scores of images by features.

    Args:
        features: `inception` or its `spatial` features; `digits`, those of a small classifier trained here on the
            training images; `auto` is inception where its weights are found and digits otherwise; or a network of
            one's own.
        num_samples: N, at most the number of held-out images if their score is to stand beside it.
        weights: file of Inception weights; by default $FMLIGHTNING_INCEPTION, then the cache of torch.hub.
        sha256: digest that this file must have; by default it begins as the published one does.
    """

    def __init__(
        self,
        features: Choice | FeatureNetwork,
        num_samples: int,
        weights: str | None,
        sha256: str | None,
    ) -> None:
        super().__init__()
        if num_samples < 2:
            raise ValueError(f"num_samples={num_samples}: a covariance takes at least 2")
        self.num_samples = num_samples
        self.layer = "spatial" if features == "spatial" else "features"
        self.weights: WeightsFile | None = None
        self.network: FeatureNetwork | None = None
        self.real: dict[str, float] = {}
        if isinstance(features, FeatureNetwork):
            self.network, self.kind = features, features.name
        else:
            self.weights = chosen_weights(features, weights, sha256)
            self.kind = features if features != "auto" else "inception"
            self.kind = self.kind if self.weights else "digits"

    def named(self, published: dict[str, str], other: str) -> str:
        """The name of a score: published ones are for the Inception network alone."""
        name = published.get(self.kind, f"{other}_{self.kind}") if self.weights else None
        return name or f"{other}_{self.kind}"

    def provenance(self) -> dict[str, str]:
        return {"inception_sha256": self.weights.sha256} if self.weights else {}

    def check(self, held_out: Points, y: Labels | None, num_bins: int | None) -> None:
        if num_bins is None or held_out.ndim != 4:
            raise ValueError(
                f"evaluation.metrics: {type(self).__name__} scores images; for points in the plane use Wasserstein"
            )
        if y is None and self.kind == "digits" and self.network is None:
            raise ValueError(
                f"evaluation.metrics: {type(self).__name__} with features=digits trains a classifier and needs "
                "labelled data; name Inception weights or take labelled data"
            )

    # -- real images ------------------------------------------------------------------------------

    def prepare(
        self,
        reference: Points,
        held_out: Points,
        labels: tuple[Labels, Labels] | None,
        num_bins: int | None,
    ) -> None:
        self.fit_reference(ReferenceSamples(reference, held_out, labels, num_bins))

    def fit_reference(self, real: ReferenceData) -> None:
        """Take the real images, in blocks; of the reference, what an earlier run has kept."""
        shapes = real.shapes("test")
        self.check(shapes["x1"], shapes.get("y"), real.num_bins)
        assert real.num_bins is not None
        self.num_bins = real.num_bins
        if self.network is None:
            weights = self.weights
            self.network = inception(weights) if weights else classifier_of(real, self.device)
        self.network.to(self.device)
        if self.weights and rank_and_size()[0] == 0:
            print(f"Inception weights: {self.weights.path}, sha256 {self.weights.sha256}")
        black = torch.zeros(0, *shapes["x1"].shape[1:], device=self.device)
        self.widths = {name: layer.shape[1] for name, layer in self.layers(black).items()}
        if self.layer not in self.widths:
            raise ValueError(f"features={self.kind} has no layer {self.layer}: choose another one")
        self.real = {}
        self.fit_features(real)

    @abstractmethod
    def fit_features(self, real: ReferenceData) -> None:
        """Take from the real images the features that `compute` needs."""

    def layers(self, x: Points) -> Layers:
        """The layers of the network for images."""
        assert self.network is not None
        return self.network.layers(quantise(x, self.num_bins), self.num_bins)

    def stream(
        self, real: ReferenceData, split: str, count: int
    ) -> Iterator[tuple[Layers, Labels, Labels | None]]:
        """This process's share of `count` images spread over a split, their numbers and classes."""
        chosen = spread(size_of(real, split), count)
        for batch in real.eval_batches(split):
            index = batch["index"].cpu()
            place = torch.searchsorted(chosen, index).clamp(max=count - 1)
            mine = (chosen[place] == index).nonzero().flatten()
            if len(mine):
                x, y = batch["x1"], batch.get("y")
                rows = mine.to(x.device)
                yield (
                    self.layers(x[rows].to(self.device)),
                    place[mine].to(self.device),
                    None if y is None else y[rows].to(self.device),
                )

    def features_of(self, real: ReferenceData, split: str, count: int) -> Features:
        """The features of `count` images spread over a split, on every process."""
        kept = FeatureBuffer().to(self.device)
        kept.update(*self.nothing())
        for layers, index, _ in self.stream(real, split, count):
            kept.update(layers[self.layer], index)
        return kept.compute()

    def reference_features(self, real: ReferenceData, count: int) -> Features:
        """Those of the reference; `count` of them or all."""
        count = min(count, size_of(real, "reference"))
        make = lambda: {"features": self.features_of(real, "reference", count)}  # noqa: E731
        return self.cached(real, f"features-{count}", make)["features"]

    def cached(self, real: ReferenceData, what: str, make: Callable[[], Tensors]) -> Tensors:
        """Something made of the reference, kept for the runs to come."""
        assert self.network is not None
        name = None
        if real.fingerprint is not None:
            name = f"{self.layer}-{what}-{real.fingerprint[:24]}-{self.network.digest[:24]}"
        return cached(name, make, self.device)

    def nothing(self) -> tuple[Tensor, Tensor]:
        """No features: what a process without a share has to say."""
        width = self.widths[self.layer]
        empty = torch.zeros(0, width, device=self.device)
        return empty, torch.zeros(0, dtype=torch.int64, device=self.device)

    # -- generated images ---------------------------------------------------------------------------

    def update(self, x: Points, index: Labels, y: Labels | None = None) -> None:
        if not bool(x.isfinite().all()):
            raise ValueError("generated images are not finite: no distance is computed")
        self.update_features(self.layers(x), index, y)

    @abstractmethod
    def update_features(self, layers: Layers, index: Labels, y: Labels | None) -> None:
        """Take the layers of the network for generated images."""

    def reset(self) -> None:
        super().reset()
        for child in self.children():
            if isinstance(child, Metric):
                child.reset()


def chosen_weights(features: Choice, weights: str | None, sha256: str | None) -> WeightsFile | None:
    """The Inception weights that a choice of features rests on.

    Raises:
        ValueError: there are none, or they are not what they should be.
    """
    if features == "digits":
        return None
    path = inception_weights(weights)
    if path is None and features != "auto":
        raise ValueError(
            f"features={features!r} needs the file {WEIGHTS} of torch-fidelity: put it in {hub_folder()}, name it in "
            f"${VARIABLE} or in weights, or choose features='digits'"
        )
    return None if path is None else verified(path, sha256)


def size_of(real: ReferenceData, split: str) -> int:
    return len(real.shapes(split)["x1"])
