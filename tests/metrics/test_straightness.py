"""Path energy and straightness against curves that have them in closed form."""

import math

import pytest
import torch

from fmlightning.metrics.straightness import Straightness


def along(curve, k=65, batch=3):
    times = torch.linspace(0, 1, k, dtype=torch.float64)
    states = torch.stack([curve(t) for t in times])[:, None].expand(k, batch, 2)
    metric = Straightness()
    metric.update(states, times)
    return metric.compute()


def test_a_straight_line_at_constant_speed_has_1():
    found = along(lambda t: torch.stack((3 * t, 4 * t)))
    assert found == pytest.approx(
        {"path_energy": 25.0, "transport_cost": 25.0, "straightness": 1.0}, rel=1e-12
    )


def test_half_a_circle_has_pi_squared_over_4():
    """Each of the 64 chords has length 2 sin(pi / 128), so the polygon's energy is known exactly too."""
    found = along(lambda t: torch.stack((torch.cos(math.pi * t), torch.sin(math.pi * t))))
    assert found["path_energy"] == pytest.approx(
        64 * 64 * 4 * math.sin(math.pi / 128) ** 2, rel=1e-12
    )
    assert found["transport_cost"] == pytest.approx(4, rel=1e-12)
    # the polygon is short of the circle by (pi / 64)^2 / 12 of it
    assert found["straightness"] == pytest.approx(math.pi**2 / 4, rel=3e-4)


def test_a_straight_line_at_changing_speed_costs_more():
    """x = t^2: the energy is 4/3 of the cost."""
    found = along(lambda t: torch.stack((t**2, 0 * t)), k=1001)
    assert found["straightness"] == pytest.approx(4 / 3, rel=1e-5)


def test_it_is_a_mean_over_samples_in_any_batches():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 8, 1, 2, 2, generator=generator)
    times = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    whole, parts = Straightness(), Straightness()
    whole.update(states, times)
    for part in states.split(3, 1):
        parts.update(part, times)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert Straightness().compute() == {}
