r"""The Frechet distance between the features of generated and of real images.

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))                                    (1)

for the means m and covariances S of the features. With the features of the Inception network as torch-fidelity
defines them this is the FID. With any other features it is not, and it is never called so here.
The value falls with the number of samples, so that number is part of its name: `fid@50000`.

Source: Heusel et al. 2017, arXiv:1706.08500.
"""

import io
import os
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from fmlightning.flow.levels import quantise
from fmlightning.flow.shapes import Labels, Points
from fmlightning.metrics.classifier import Classifier, train_classifier
from fmlightning.metrics.judge import Judge

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
VARIABLE = "FMLIGHTNING_INCEPTION"


class Inception(nn.Module):
    """The 2,048 pooled features of Inception-v3, from bytes, with torch-fidelity's TF1 resize.

    Args:
        weights: file of torch-fidelity's weights; read with `weights_only=True`, so it runs no code.
    """

    num_features = 2048

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity would unpickle the file as it is; it gets a copy that has been read safely
        safe = io.BytesIO()
        torch.save(torch.load(weights, weights_only=True, map_location="cpu"), safe)
        safe.seek(0)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], safe).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images (B, 1 or 3, H, W)."""
        return self.network(images.expand(-1, 3, -1, -1))[0]


class Frechet(Judge):
    """The Frechet distance to the training images, beside that of held-out real ones.

    Args:
        features: `inception` gives `fid@N`; `digits`, the features of a small classifier trained here on the
            training images, gives `frechet_digits@N` and the classifier's accuracy on the classes asked for;
            `auto` is inception where its weights are found and digits otherwise.
        num_samples: N, at most the number of held-out images if their score is to stand beside it.
        weights: file of Inception weights; by default $FMLIGHTNING_INCEPTION, then the cache of torch.hub.
    """

    correct: Tensor
    labelled: Tensor

    def __init__(
        self,
        features: Literal["auto", "inception", "digits"] = "auto",
        num_samples: int = 350,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if num_samples < 2:
            raise ValueError(f"num_samples={num_samples}: a covariance takes at least 2")
        self.num_samples = num_samples
        self.weights = inception_weights(weights)
        if features == "inception" and self.weights is None:
            raise ValueError(
                f"features='inception' needs the file {WEIGHTS} of torch-fidelity: put it in "
                f"{hub_folder()}, name it in ${VARIABLE} or in weights, or choose features='digits'"
            )
        self.inception = features == "inception" or (
            features == "auto" and self.weights is not None
        )
        self.name = "fid" if self.inception else "frechet_digits"
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("labelled", torch.tensor(0), dist_reduce_fx="sum")

    def prepare(
        self,
        reference: Points,
        held_out: Points,
        labels: tuple[Labels, Labels] | None,
        levels: int | None,
    ) -> None:
        self.check(reference, labels[0] if labels else None, levels)
        assert levels is not None
        self.levels = levels
        self.classifier: Classifier | None = None
        if self.inception:
            assert self.weights is not None
            network: nn.Module = Inception(self.weights)
        else:
            assert labels is not None
            pixels = quantise(reference, levels)
            self.classifier = train_classifier(pixels, labels[0], levels, int(labels[0].max()) + 1)
            network = Embedding(self.classifier)
        if self.num_samples <= network.num_features:  # type: ignore[operator]
            warnings.warn(
                f"{self.name}@{self.num_samples}: with no more samples than its {network.num_features} features the "
                "covariance is singular; compare it only with the same number of samples",
                stacklevel=1,
            )
        self.frechet = FrechetInceptionDistance(network, reset_real_features=False).to(
            reference.device
        )
        self.frechet.orig_dtype = (
            torch.float32
        )  # which `update` sets, and a process without images needs
        # the states are summed over processes, and every process holds all real images: the first counts them
        share = slice(None) if first_process() else slice(0)
        self.take(reference[share], real=True)
        real = held_out[: self.num_samples]
        self.real = {}
        if len(real) == self.num_samples:
            self.take(real[share], real=False)
            self.real[f"{self.name}@{len(real)}_real"] = float(self.frechet.compute())
            self.frechet.reset()
        if self.classifier is not None and labels is not None:
            hits = self.hits(held_out, labels[1])
            self.real[f"accuracy@{len(held_out)}_real"] = float(hits.float().mean())

    def check(self, held_out: Points, y: Labels | None, levels: int | None) -> None:
        if levels is None or held_out.ndim != 4:
            raise ValueError(
                "evaluation.judges: Frechet judges images; for points in the plane use Wasserstein"
            )
        if y is None and not self.inception:
            raise ValueError(
                "evaluation.judges: Frechet with features=digits trains a classifier and needs labelled data; name "
                "Inception weights or take labelled data"
            )

    def images(self, x: Points) -> Tensor:
        """What the feature network sees: grey levels for the classifier, bytes for Inception."""
        k = quantise(x, self.levels)
        return (k.float() * (255 / (self.levels - 1))).round().byte() if self.inception else k

    def take(self, x: Points, real: bool) -> None:
        for part in x.split(256) if len(x) else ():
            self.frechet.update(self.images(part), real=real)

    @torch.no_grad()
    def hits(self, x: Points, y: Labels) -> Tensor:
        assert self.classifier is not None
        return self.classifier(quantise(x, self.levels)).argmax(1) == y

    def update(self, x: Points, index: Labels, y: Labels | None = None) -> None:
        if not len(x):
            return
        if not bool(x.isfinite().all()):
            raise ValueError("generated images are not finite: no distance is computed")
        self.take(x, real=False)
        if self.classifier is not None and y is not None:
            self.correct += self.hits(x, y).sum()
            self.labelled += len(y)

    def compute(self) -> dict[str, float]:
        values = {f"{self.name}@{self.num_samples}": float(self.frechet.compute())}
        if self.labelled > 0:
            values[f"accuracy@{int(self.labelled)}"] = float(self.correct / self.labelled)
        return {**values, **self.real}

    def reset(self) -> None:
        super().reset()
        if hasattr(self, "frechet"):
            self.frechet.reset()


class Embedding(nn.Module):
    """A classifier's features as torchmetrics asks for a feature network."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_features = classifier.num_features

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.classifier.embed(pixels)


def first_process() -> bool:
    """Whether this is the only process, or the first of several."""
    distributed = torch.distributed
    return not (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank()
    )


def hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def inception_weights(path: str | None) -> Path | None:
    """The file of Inception weights, or None if there is none where one is looked for.

    Raises:
        ValueError: a file that was named does not exist.
    """
    named = path or os.environ.get(VARIABLE)
    if named and not Path(named).is_file():
        raise ValueError(f"weights={named}: no such file; it should be {WEIGHTS} of torch-fidelity")
    found = Path(named) if named else hub_folder() / WEIGHTS
    return found if found.is_file() else None
