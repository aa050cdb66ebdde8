r"""Certainty of a classifier about each generated image, and variety of its answers over all.

    IS = exp E_x KL(p(y | x) | E_x p(y | x))                                               (1)

It is the mean of (1) over ten parts of the sample, and knows nothing of the training images. With another classifier
than Inception it is no Inception score, and is not called so.

Source: Salimans et al. 2016, arXiv:1606.03498.
"""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from fmlightning.flow.shapes import Labels
from fmlightning.metrics.features.base import FeatureMetric, size_of
from fmlightning.metrics.features.networks import FeatureNetwork, Layers
from fmlightning.metrics.metric import by_name
from fmlightning.metrics.reference import ReferenceData


class InceptionScore(FeatureMetric):
    """`inception_score@N` and its standard deviation over parts; of other classifiers `classifier_score_digits@N`.

    Args:
        features: `inception`; `digits`, the classifier trained here; `auto` is inception where its weights are found
            and digits otherwise; or a network of one's own that has `logits`.
        num_samples: N.
        splits: parts, by the numbers of the images, whose classes are mixed.
        weights: file of Inception weights, as for Frechet.
        sha256: its digest.
    """

    higher_is_better = by_name(inception_score=True, classifier_score=True)

    def __init__(
        self,
        features: Literal["auto", "inception", "digits"] | FeatureNetwork = "auto",
        num_samples: int = 350,
        splits: int = 10,
        weights: str | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__(features, num_samples, weights, sha256)
        if not 1 <= splits <= num_samples:
            raise ValueError(f"splits={splits} must lie between 1 and num_samples={num_samples}")
        self.splits = splits
        self.layer = "logits"
        self.name = self.named({"inception": "inception_score"}, "classifier_score")

    def fit_features(self, real: ReferenceData) -> None:
        self.generated = self.entropies()
        if size_of(real, "test") >= self.num_samples:
            held_out = self.entropies()
            for layers, index, _ in self.stream(real, "test", self.num_samples):
                held_out.update(layers["logits"], index)
            mean, _ = held_out.compute()
            self.real = {f"{self.name}@{self.num_samples}_real": float(mean)}

    def entropies(self) -> "Entropies":
        found = Entropies(self.splits, self.num_samples, self.widths["logits"]).to(self.device)
        found.update(*self.nothing())
        return found

    def update_features(self, layers: Layers, index: Labels, y: Labels | None) -> None:
        self.generated.update(layers["logits"], index)

    def compute(self) -> dict[str, float]:
        mean, std = self.generated.compute()
        name = f"{self.name}@{self.num_samples}"
        return {name: float(mean), f"{name}_std": float(std)} | self.real


class Entropies(Metric):
    """(1) of each part of a sample, from sums of p and of p log p in float64.

    Args:
        splits: parts.
        size: of the sample.
        classes: number of logits.
    """

    full_state_update = False
    counts: Tensor
    p: Tensor
    p_log_p: Tensor

    def __init__(self, splits: int, size: int, classes: int) -> None:
        super().__init__()
        self.ends = torch.arange(1, splits) * size // splits
        for name, shape in (("counts", ()), ("p", (classes,)), ("p_log_p", ())):
            zeros = torch.zeros(splits, *shape, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, index: Labels) -> None:
        part = torch.bucketize(index, self.ends.to(index.device), right=True)
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        self.counts.index_add_(0, part, torch.ones_like(part, dtype=torch.float64))
        self.p.index_add_(0, part, p)
        self.p_log_p.index_add_(0, part, (p * log_p).sum(1))

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean over parts and the standard deviation."""
        q = self.p / self.counts[:, None]
        kl = self.p_log_p / self.counts - torch.special.xlogy(q, q).sum(1)
        return kl.exp().mean(), kl.exp().std(correction=0)
