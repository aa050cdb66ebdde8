"""Scores against closed forms and other libraries."""

import math

import numpy as np
import pytest
import torch

from fmlightning.data.images.digits import DigitsData
from fmlightning.flow.keys import Key
from fmlightning.flow.pixels import quantise
from fmlightning.metrics.features.classifier import train_classifier
from fmlightning.metrics.features.frechet import Frechet
from fmlightning.metrics.means import BinnedMean
from fmlightning.metrics.transport import Wasserstein, wasserstein2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=Key(seed).generator())


def test_w2_of_a_shift_is_its_length():
    x = normal(300, 2)
    assert wasserstein2(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(5, abs=1e-6)


def test_w2_on_the_line_is_that_of_sorted_samples():
    x, y = normal(400, 1), 2 * normal(400, 1, seed=1) + 1
    expected = math.sqrt(float((x.sort(0).values - y.sort(0).values).double().square().mean()))
    assert wasserstein2(x, y) == pytest.approx(expected, rel=1e-6)


def test_wasserstein_does_not_depend_on_the_order_of_arrival():
    real = [normal(200, 2, seed=s) for s in (1, 2)]
    x, index = normal(200, 2), torch.arange(200)
    scores = []
    for order in (index, index.flip(0)):
        metric = Wasserstein(subsets=4, size=50)
        metric.prepare(*real, None, None)
        for rows in order.split(30):
            metric.update(x[rows], index[rows])
        scores.append(metric.compute())
    assert scores[0] == scores[1]
    assert scores[0].keys() == {"w2", "w2_std", "w2_floor", "w2_floor_std"}


def test_wasserstein_refuses_too_little_data():
    with pytest.raises(ValueError, match="test_size"):
        Wasserstein(subsets=5, size=100).prepare(normal(500, 2), normal(400, 2), None, None)


@pytest.fixture(scope="module")
def digits():
    data = DigitsData()
    reference, held_out = data.eval_samples("reference"), data.eval_samples("test")
    metric = Frechet(features="digits", num_samples=350)
    metric.prepare(reference["x1"], held_out["x1"], (reference["y"], held_out["y"]), data.num_bins)
    return metric, reference, held_out


def test_the_frechet_distance_is_equation_1(digits):
    metric, reference, held_out = digits
    metric.reset()
    metric.update(held_out["x1"], torch.arange(350), held_out["y"])
    score = metric.compute()
    features = [
        metric.classifier.embed(quantise(x["x1"], 17)).double().numpy()
        for x in (reference, held_out)
    ]
    (m1, s1), (m2, s2) = ((f.mean(0), np.cov(f.T)) for f in features)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex))
    expected = np.sum((m1 - m2) ** 2) + np.trace(s1 + s2) - 2 * roots.real.sum()
    # what roots of eigenvalues lose
    assert score["frechet_digits@350"] == pytest.approx(expected, rel=1e-6)
    # held-out real digits are what the `_real` scores are of
    assert score["frechet_digits@350"] == pytest.approx(score["frechet_digits@350_real"], rel=1e-5)
    assert score["accuracy@350"] == pytest.approx(score["accuracy@350_real"])
    assert "fid" not in " ".join(score)


def test_worse_digits_score_worse(digits):
    metric, _, held_out = digits
    metric.reset()
    metric.update(held_out["x1"].roll(2, -1), torch.arange(350), held_out["y"])
    score = metric.compute()
    assert score["frechet_digits@350"] > 3 * score["frechet_digits@350_real"]
    assert score["accuracy@350"] < 0.9


def test_the_classifier_knows_digits_and_is_a_function_of_its_arguments():
    data = DigitsData()
    images, y = data.images["train"][:600], data.targets["train"][:600]
    a, b = (train_classifier(images, y, 17, 10, epochs=8) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    accuracy = (a.logits(data.images["test"]).argmax(1) == data.targets["test"]).float().mean()
    assert accuracy > 0.93  # 600 images and 8 epochs; all of them give about 0.99


def test_images_that_are_not_finite_are_refused(digits):
    metric, _, held_out = digits
    metric.reset()
    with pytest.raises(ValueError, match="not finite"):
        metric.update(held_out["x1"] * math.nan, torch.arange(350), held_out["y"])


def test_binned_means_add_up():
    metric = BinnedMean(4)
    values, position = torch.arange(8.0), torch.linspace(0, 1, 8)
    metric.update(values[:3], position[:3])
    metric.update(values[3:], position[3:])
    mean, bins = metric.compute()
    assert float(mean) == 3.5
    assert bins.tolist() == [0.5, 2.5, 4.5, 6.5]
