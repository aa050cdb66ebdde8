"""Metrics say in which direction each of their numbers is better."""

import warnings

import pytest
import torch
from features.projection import images, metrics

from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.sources import Gaussian
from fmlightning.metrics.evaluator import computed, evaluate_model, fit_reference, of_samples
from fmlightning.metrics.likelihood import NegativeLogLikelihood
from fmlightning.metrics.metric import SampleMetric, by_name
from fmlightning.metrics.path_energy import PathEnergy
from fmlightning.metrics.reference import ReferenceSamples
from fmlightning.metrics.transport import Wasserstein


class Mean(SampleMetric):
    num_samples = 4
    higher_is_better = by_name(mean=True)

    def prepare(self, reference, held_out, labels, num_bins):
        """There is nothing to fit."""

    def update(self, x, index, y=None):
        """There is nothing to add up."""

    def compute(self):
        return {"mean@4": 1.0, "mean_kind@4": 2.0, "mean_std": 0.5, "other": 3.0}


class Silent(Mean):
    higher_is_better = None


class Drift(torch.nn.Module):
    def forward(self, x, t, y=None):
        return torch.ones_like(x)


def test_a_metric_that_names_no_direction_is_refused():
    with pytest.raises(ValueError, match=r"Silent\.higher_is_better is missing"):
        Silent()


def test_a_name_covers_its_kinds_and_sizes_but_not_its_spread_and_no_unknown_score():
    metric = Mean()
    metric.update(torch.zeros(4, 2), torch.arange(4))
    with pytest.warns(UserWarning, match="does not name other"):
        found = metric.directions(metric.compute())
    assert found == {"mean@4": True, "mean_kind@4": True, "mean_std": None, "other": None}


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_every_metric_here_names_all_its_scores():
    y = torch.arange(101) % 3
    of_images = ReferenceSamples(images(101, 1), images(67, 2), (y, y[:67]), 256)
    x = Gaussian().sample((400, 2), Key(4).generator())
    of_points = ReferenceSamples(x, x + 1)
    plane = [Wasserstein(2, 50), PathEnergy(2, 50, 3), NegativeLogLikelihood(50)]
    found = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*higher_is_better.*")
        for kinds, real in ((metrics(), of_images), (plane, of_points)):
            fit_reference(kinds, real, torch.device("cpu"))
            evaluate_model(kinds, NetworkField(Drift(), Linear()), Gaussian(), Gaussian())
            for metric in of_samples(kinds):
                n = metric.num_samples
                samples = images(n, 3) if real is of_images else x[:n]
                metric.update(samples, torch.arange(n), torch.arange(n) % 3)
            scores = computed(kinds)
            assert scores.values.keys() == scores.higher_is_better.keys()
            found |= scores.higher_is_better
    better = {name for name, direction in found.items() if direction}
    assert {name.partition("@")[0] for name in better} == {
        "accuracy", "accuracy_projection", "classifier_score_projection", "precision_projection", "recall_projection",
    }  # fmt: skip
    worse = {name.partition("@")[0] for name, direction in found.items() if direction is False}
    assert worse == {
        "frechet_projection", "frechet_digits", "kid_projection", "w2", "npe", "nll", "kl",
    }  # fmt: skip
