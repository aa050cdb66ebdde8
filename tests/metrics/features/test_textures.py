"""Features of textures, and the rule that tells classes by features, against closed forms and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fmlightning.data.images.photos import PhotosData
from fmlightning.flow.keys import Key
from fmlightning.metrics.features.frechet import Frechet
from fmlightning.metrics.features.knn_accuracy import KNNAccuracy
from fmlightning.metrics.features.networks import FeatureNetwork
from fmlightning.metrics.features.textures import Textures


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=Key(seed).generator())


def levels_of(pixels):
    """Pixels as points in [-1, 1] that are read as the same bytes."""
    return 2 * (pixels.float() + 0.5) / 256 - 1


class Means(FeatureNetwork):
    """The mean of each channel, as (B, C)."""

    name = "means"

    def forward(self, pictures):
        return {"features": pictures.float().mean((2, 3))}


def test_the_features_of_noise_are_those_of_its_variance():
    """Of independent pixels, differences have the sum of the variances; an average of four, a quarter of it."""
    sigma, size = 20.0, 256
    pictures = 128 + sigma * normal(4, 3, size, size)
    found = Textures()(pictures.round().clamp(0, 255).byte())["features"].double().mean(0)
    variance = sigma**2 + 1 / 12  # of a byte
    of_colour = torch.tensor([1 / 3, 1 / 2, 3 / 8], dtype=torch.float64) * variance
    expected = [torch.full((1,), 4.0), torch.zeros(2)]
    for halvings in range(int(math.log2(size)) - 1):
        for pixels in (2, 2, 4):
            energy = of_colour * pixels / 4**halvings
            size_of_noise = (energy * 2 / math.pi).sqrt()
            expected += [(energy + 1).log(), (size_of_noise + 1).log() - (energy + 1).log() / 2]
    expected = torch.cat([e.double() for e in expected])
    assert len(found) == len(expected)
    # the first 3 sizes have 4 x 64 x 63 differences or more, whose logarithms stray by 1 / sqrt(8000)
    torch.testing.assert_close(found[:57], expected[:57], rtol=0, atol=0.05)


def test_a_flat_picture_has_finite_features_and_an_edge_is_sparse():
    flat = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    edge = flat.clone()
    edge[..., 16:] = 200
    (flat, edge) = Textures()(torch.cat((flat, edge)))["features"]
    assert len(flat) == 75
    assert not flat[3:].any()
    # one difference in 31 is 123 pixel values
    assert float(edge[3]) == pytest.approx(math.log(123**2 / 31 + 1))
    assert float(edge[6]) == pytest.approx(math.log(123 / 31 + 1) - math.log(123**2 / 31 + 1) / 2)
    assert not torch.equal(flat, edge)


def test_noise_blur_and_foreign_parts_are_further_than_real_patches():
    data = PhotosData()
    train, test = data.sets["train"], data.sets["test"]
    reference, held_out = (levels_of(s.pixels[:600]) for s in (train, test))
    metric = Frechet(Textures(), 500)
    metric.prepare(reference, held_out, None, 256)
    real = train.pixels[600:1100].float()
    noisy = (real + 3 * normal(500, 3, 32, 32)).clamp(0, 255)
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    patched = torch.cat((real[:, :, :16], real.roll(1, 0)[:, :, 16:]), 2)
    found = []
    for x in (real, noisy, blurred, patched):
        metric.reset()
        metric.update(levels_of(x.round()), torch.arange(500))
        found.append(metric.compute()["frechet_textures@500"])
    assert found[0] < metric.real["frechet_textures@500_real"]  # those are of other places
    assert 5 * found[0] < min(found[1:])


def test_the_rule_is_that_of_nearest_neighbours():
    """scikit-learn's, on features of our own choice; five neighbours of two classes make no tie."""
    y = torch.arange(300) % 2
    places = torch.tensor([[90.0, 120, 100], [110, 100, 150]])
    pixels = (places[y] + 35 * normal(300, 3)).round().clamp(0, 255)[:, :, None, None]
    x = levels_of(pixels)
    metric = KNNAccuracy(Means(), 150)
    metric.prepare(x[:150], x[150:], (y[:150], y[150:]), 256)
    metric.update(x[150:], torch.arange(150), y[150:])
    features = pixels[:, :, 0, 0].double().numpy()
    rule = KNeighborsClassifier(5, algorithm="brute").fit(features[:150], y[:150].numpy())
    expected = rule.predict(features[150:])
    share = float(np.mean(expected == y[150:].numpy()))
    assert 0.6 < share < 0.95  # else equal answers say little
    assert metric.taken_for(pixels[150:, :, 0, 0]).tolist() == expected.tolist()
    names = ("accuracy_means@150", "accuracy_means@150_real")
    assert metric.compute() == {name: pytest.approx(share) for name in names}


def test_labels_and_enough_neighbours_are_needed():
    x, y = levels_of(torch.zeros(4, 3, 8, 8)), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="KNNAccuracy tells classes apart"):
        KNNAccuracy(Textures(), 4).check(x, None, 256)
    with pytest.raises(ValueError, match="neighbours=5 exceeds the 4 training images"):
        KNNAccuracy(Means(), 4).prepare(x, x, (y, y), 256)
    with pytest.raises(ValueError, match="between 1 and references=3"):
        KNNAccuracy(Means(), 4, neighbours=5, references=3)
