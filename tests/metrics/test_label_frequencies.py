"""Scores of an unbalanced set: the labels of samples have to be as frequent as those of the reference."""

import pytest
import torch

from fmlightning.flow.labels import balanced_labels, reference_labels
from fmlightning.metrics.evaluator import computed, fit_reference
from fmlightning.metrics.features.frechet import Frechet
from fmlightning.metrics.features.networks import FeatureNetwork
from fmlightning.metrics.reference import ReferenceSamples


class Pixels(FeatureNetwork):
    name = "pixels"
    batch_size = 512
    digest = "pixels"

    def forward(self, images):
        return {"features": images.float().flatten(1)}


def real(y, seed):
    """Images (1, 2, 2) of 256 values whose brightness is their class."""
    noise = torch.randn(len(y), 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return ((y[:, None, None, None] * 1.2 - 0.6) + 0.1 * noise).clamp(-0.99, 0.99)


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_real_images_of_the_dealt_labels_score_at_the_floor():
    """A perfect model of an unbalanced set: with each class in turn it would lose to held-out images by far."""
    counts, n = (113, 17), 260
    y = torch.arange(2).repeat_interleave(torch.tensor(counts))
    metric = Frechet(Pixels(), n)
    data = ReferenceSamples(real(y, 1), real(y.repeat(2), 2), None, 256)
    fit_reference([metric], data, torch.device("cpu"))
    index, found = torch.arange(n), []
    for labels in (reference_labels(index, counts), balanced_labels(index, 2)):
        metric.update(real(labels, 3), index, labels)
        found.append(computed([metric]).values)
    floor = found[0]["frechet_pixels@260_real"]
    dealt, in_turn = (f["frechet_pixels@260"] for f in found)
    assert dealt < 3 * floor
    assert in_turn > 30 * floor
