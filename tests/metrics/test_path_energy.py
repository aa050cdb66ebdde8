"""The normalised path energy of flows whose energy and distance are known in closed form."""

import math

import pytest
import torch
from scipy.integrate import quad

from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork
from fmlightning.metrics.path_energy import PathEnergy


class Shift(torch.nn.Module):
    """The optimal transport between two laws that differ by their mean."""

    def __init__(self, by):
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(by))

    def forward(self, x, t, y=None):
        return self.by.expand_as(x)


def scored(network, held_out, metric, blocks=1):
    metric.prepare(held_out, held_out, None, None)
    field = NetworkField(network, Linear())
    for rank in range(blocks):
        metric.evaluate_model(field, Gaussian(), None, rank, blocks)
    return metric.compute()


def test_an_optimal_transport_has_the_energy_of_the_distance():
    held_out = Gaussian().sample((2000, 2), Key(1).generator()) + torch.tensor([3.0, 4.0])
    found = scored(Shift([3.0, 4.0]), held_out, PathEnergy(2, 1000, 7))
    assert found["energy"] == pytest.approx(25, rel=1e-6)  # float32
    # the distance of two samples: the mean of 2000 differences is off by sqrt(2 / 2000) in the direction of the shift
    noise = 2 * 5 * math.sqrt(2 / 2000)
    assert found["w2_squared"] == pytest.approx(25, abs=4 * noise)
    assert found["w2_squared_se"] < 3 * noise
    gap = abs(found["energy"] - found["w2_squared"])
    assert found["npe"] == pytest.approx(gap / found["w2_squared"], rel=1e-12)


def test_the_straight_path_to_a_wider_gaussian_goes_a_longer_way():
    """x_t = std(t) x_0 with std^2 = (3 t)^2 + (1 - t)^2, while the optimal transport takes 1 + 2 t."""
    law = GaussianMixture([1.0], [[0.0, 0.0]], [3.0])
    held_out = law.sample((8192, 2), Key(2).generator())

    def speed(t):
        return ((10 * t - 1) / math.sqrt(9 * t**2 + (1 - t) ** 2)) ** 2

    energy, distance = 2 * quad(speed, 0, 1)[0], 2 * (3 - 1) ** 2
    found = scored(OracleNetwork(law.along(Linear())), held_out, PathEnergy(4, 2048, 400))
    # E |x_0|^2 of 8192 points is 2 within 2 / sqrt(8192), relative 1.1 %; Euler's error is below 1 %
    assert found["energy"] == pytest.approx(energy, rel=0.045)
    # the ends of one law were drawn alike: the distance is of the source's points and of the data's, 1.1 % each
    assert found["w2_squared"] == pytest.approx(distance, rel=0.06)
    assert found["npe"] == pytest.approx(energy / distance - 1, abs=0.05)


def test_it_is_the_same_on_any_number_of_processes():
    held_out = Gaussian().sample((600, 2), Key(3).generator())
    alone = scored(Shift([1.0, 0.0]), held_out, PathEnergy(3, 200, 5))
    assert scored(Shift([1.0, 0.0]), held_out, PathEnergy(3, 200, 5), blocks=2) == pytest.approx(
        alone
    )


def test_it_starts_anew():
    held_out = Gaussian().sample((200, 2), Key(4).generator())
    metric = PathEnergy(1, 200, 5)
    first = scored(Shift([2.0, 0.0]), held_out, metric)
    metric.reset()
    assert scored(Shift([1.0, 0.0]), held_out, metric)["energy"] == pytest.approx(1)
    assert first["energy"] == pytest.approx(4)


def test_too_few_points_are_refused():
    with pytest.raises(
        ValueError, match="needs subsets x size = 400 real samples and the data has 100"
    ):
        PathEnergy(2, 200).check(torch.zeros(100, 2), None, None)
    with pytest.raises(ValueError, match="num_steps=0"):
        PathEnergy(num_steps=0)
