r"""The Frechet distance between the features of generated and of real images.

With the features of the Inception network as torch-fidelity defines them this is the FID, and with its spatial
features the sFID. With any other features it is neither, and it is never called so here.
The value falls with the number of samples, so that number is part of its name: `fid@50000`. To first order

    E d_n = d_inf + c / n                                                                  (1)

and d_inf is the intercept of a line through the distances of subsets, against 1 / n.

Source: Heusel et al. 2017, arXiv:1706.08500; (1) Chong and Forsyth 2020, arXiv:1911.07023:
15 sizes from n / 10 to n.
"""

import warnings

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import Labels
from fmlightning.metrics.features.base import Choice, FeatureMetric, size_of
from fmlightning.metrics.features.classifier import Classifier
from fmlightning.metrics.features.collectors import FeatureBuffer, Features, Moments
from fmlightning.metrics.features.gaussian import FeatureGaussian, frechet_distance
from fmlightning.metrics.features.networks import FeatureNetwork, Layers
from fmlightning.metrics.metric import by_name
from fmlightning.metrics.reference import ReferenceData

NAMES = {"inception": "fid", "spatial": "sfid"}
SIZES = 15
COVERED = 0.95


class Frechet(FeatureMetric):
    """The Frechet distance to the training images, beside that of held-out real ones.

    Args:
        features: `inception` gives `fid@N`, and `spatial` `sfid@N`; `digits`, the features of a small classifier
            trained here on the training images, gives `frechet_digits@N` and the classifier's accuracy on the classes
            named; `auto` is inception where its weights are found and digits otherwise; or a network of one's own.
        num_samples: N, at most the number of held-out images if their score is to stand beside it.
        weights: file of Inception weights; by default $FMLIGHTNING_INCEPTION, then the cache of torch.hub.
        sha256: digest that this file must have; by default it begins as the published one does.
        extrapolate: whether to give d_inf of (1) too, as `fid@inf`.
        bootstrap: resamplings of the generated images for an interval that covers 95 %, `fid@N_low` to `fid@N_high`;
            0 for none. With either of these two, N features are held in memory rather than their moments.
    """

    higher_is_better = by_name(fid=False, sfid=False, frechet=False, accuracy=True)
    correct: Tensor
    labelled: Tensor

    def __init__(
        self,
        features: Choice | FeatureNetwork = "auto",
        num_samples: int = 350,
        weights: str | None = None,
        sha256: str | None = None,
        extrapolate: bool = False,
        bootstrap: int = 0,
    ) -> None:
        super().__init__(features, num_samples, weights, sha256)
        if bootstrap < 0:
            raise ValueError(f"bootstrap={bootstrap} must not be negative")
        if extrapolate and num_samples < 10 * SIZES:
            raise ValueError(
                f"extrapolate=true takes num_samples of {10 * SIZES} or more, not {num_samples}"
            )
        self.extrapolate, self.bootstrap = extrapolate, bootstrap
        self.name = self.named(NAMES, "frechet")
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("labelled", torch.tensor(0), dist_reduce_fx="sum")

    @property
    def classifier(self) -> Classifier | None:
        return self.network if isinstance(self.network, Classifier) else None

    def fit_features(self, real: ReferenceData) -> None:
        width, n = self.widths[self.layer], self.num_samples
        if n <= width:
            warnings.warn(
                f"{self.name}@{n}: with no more samples than its {width} features the covariance is singular; compare "
                "it only with the same number of samples",
                stacklevel=1,
            )
        count = size_of(real, "reference")
        make = lambda: self.gaussian(real, "reference", count)._asdict()  # noqa: E731
        self.reference = FeatureGaussian(**self.cached(real, "gaussian", make))
        held_out = size_of(real, "test")
        if held_out >= n:
            distance = frechet_distance(self.reference, self.gaussian(real, "test", n))
            self.real[f"{self.name}@{n}_real"] = distance
        if self.classifier is not None and real.num_classes:
            self.real[f"accuracy@{held_out}_real"] = self.real_accuracy(real, held_out)
        self.generated = self.collector(n, keep=self.extrapolate or self.bootstrap > 0)

    def collector(self, count: int, keep: bool = False) -> Moments | FeatureBuffer:
        """The features themselves where they are fewer than their moments would be, or where they are requested."""
        if keep or count <= self.widths[self.layer]:
            found: Moments | FeatureBuffer = FeatureBuffer()
        else:
            found = Moments(self.center())
        found.to(self.device).update(*self.nothing())
        return found

    def center(self) -> Tensor:
        """A point near the features, the same on every process."""
        reference = getattr(self, "reference", None)
        return torch.zeros(self.widths[self.layer]) if reference is None else reference.mean

    def gaussian(self, real: ReferenceData, split: str, count: int) -> FeatureGaussian:
        collector = self.collector(count)
        for layers, index, _ in self.stream(real, split, count):
            collector.update(layers[self.layer], index)
        return as_gaussian(collector.compute())

    def real_accuracy(self, real: ReferenceData, count: int) -> float:
        hits = MeanMetric().to(self.device)
        hits.update(*self.nothing()[1:], weight=0)
        for layers, _, y in self.stream(real, "test", count):
            assert y is not None
            hits.update(layers["logits"].argmax(1).eq(y).float())
        return float(hits.compute())

    def update_features(self, layers: Layers, index: Labels, y: Labels | None) -> None:
        self.generated.update(layers[self.layer], index)
        if self.classifier is not None and y is not None:
            self.correct += (layers["logits"].argmax(1) == y).sum()
            self.labelled += len(y)

    def compute(self) -> dict[str, float]:
        found = self.generated.compute()
        name = f"{self.name}@{self.num_samples}"
        distance = frechet_distance(self.reference, as_gaussian(found))
        values = {name: distance}
        if isinstance(found, Tensor) and self.bootstrap:
            low, high = interval(self.reference, found, distance, self.bootstrap)
            values |= {f"{name}_low": low, f"{name}_high": high}
        if isinstance(found, Tensor) and self.extrapolate:
            values[f"{self.name}@inf"] = extrapolated(self.reference, found)
        if self.labelled > 0:
            values[f"accuracy@{int(self.labelled)}"] = float(self.correct / self.labelled)
        return {**values, **self.real}


def as_gaussian(found: FeatureGaussian | Features) -> FeatureGaussian:
    return found if isinstance(found, FeatureGaussian) else FeatureGaussian.of(found)


def extrapolated(reference: FeatureGaussian, features: Features) -> float:
    """d_inf of (1), by least squares; it may be negative, as an unbiased estimate of a small number may."""
    n, device = len(features), features.device
    sizes = torch.linspace(n / 10, n, SIZES).round().long().tolist()
    distances = []
    for number, size in enumerate(sizes):
        generator = Key(0).fold("extrapolate", number).generator()
        rows = torch.randperm(n, generator=generator)[:size]
        distances.append(frechet_distance(reference, FeatureGaussian.of(features[rows.to(device)])))
    x = 1 / torch.tensor(sizes, dtype=torch.float64)
    y = torch.tensor(distances, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())


def interval(
    reference: FeatureGaussian, features: Features, distance: float, resamplings: int
) -> tuple[float, float]:
    """Spread of the distance at this n over other samples of the model, by resampling.

    Resampling repeats images, which adds a bias of its own as large as that of (1): so the spread is taken about its
    mean.
    """
    n, device = len(features), features.device
    distances = []
    for number in range(resamplings):
        generator = Key(0).fold("bootstrap", number).generator()
        rows = torch.randint(n, (n,), generator=generator).to(device)
        distances.append(frechet_distance(reference, FeatureGaussian.of(features[rows])))
    d = torch.tensor(distances, dtype=torch.float64)
    ends = torch.tensor(((1 - COVERED) / 2, (1 + COVERED) / 2), dtype=torch.float64)
    low, high = (distance + (d - d.mean()).quantile(ends)).clamp(min=0).tolist()
    return low, high
