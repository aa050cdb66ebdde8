"""A network in another precision: its inside is rounded, and time, path and state are not."""

import pytest
import torch
from torch import nn

from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField, evaluate
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.precision import InPrecision, in_precision
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.nets.mlp import TimeMLP
from fmlightning.nets.unet import UNet

ROUNDING = {"fp64": 1e-6, "fp32": 1e-6, "bf16": 2e-2, "fp16": 3e-3}
"""Relative: of float32 over a few layers, of 8 bits and of 11."""


def filled(network):
    generator = Key(3).generator()
    for p in network.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
    return network.eval()


def mlp():
    return filled(TimeMLP(dim=2, width=32, depth=2))


def points(dtype=torch.float32):
    return torch.randn(16, 2, generator=Key(0).generator(), dtype=torch.float64).to(dtype)


class ComponentTerms(nn.Module):
    """A network that remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.asked = []

    def forward(self, x, t):
        inside = self.layer(x)
        self.asked.append((x.dtype, t.clone(), inside.dtype))
        return inside


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("precision", ROUNDING)
def test_time_comes_exact_and_the_state_keeps_its_precision(precision, state):
    network = ComponentTerms()
    field = in_precision(NetworkField(network, Linear()), precision)
    solution = ODESolver("rk4", 3).solve(field, points(state))
    assert solution.x.dtype == state
    asked = field.network.network.asked
    thirds = [k / 9 for k in range(10)]
    for _, t, inside in asked:
        assert t.dtype == state
        # a ninth in bf16 is off by up to 2e-3
        assert min(abs(float(t[0]) - s) for s in thirds) < 2 * torch.finfo(state).eps
        wanted = {"fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
        assert inside == wanted.get(precision, torch.float32)


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("precision", ROUNDING)
def test_velocities_differ_by_the_rounding_of_the_inside(precision, state):
    plain = NetworkField(mlp().double(), Linear())
    t = torch.tensor(0.37, dtype=state)
    exact = plain(points(state).double(), t.double())
    found = in_precision(NetworkField(mlp(), Linear()), precision)(points(state), t)
    assert found.dtype == state
    error = float((found.double() - exact).abs().max().detach() / exact.abs().max().detach())
    assert error < ROUNDING[precision]
    if precision in ("bf16", "fp16"):
        assert error > 1e-5, "nothing was rounded"


def test_small_steps_are_not_lost_in_the_state():
    """With the state in bf16 a step of 1/1000 of a unit velocity leaves a number near 3 where it is."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.layer.weight.data.zero_()
            self.layer.bias.data.fill_(1.0)

        def forward(self, x, t):
            return self.layer(x)

    field = in_precision(NetworkField(One(), Linear()), "bf16")
    x = torch.full((1, 2), 3.0)
    torch.testing.assert_close(ODESolver("euler", 1000).solve(field, x).x, x + 1, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ROUNDING)
def test_a_unet_runs_in_it(precision):
    net = filled(UNet(1, 8, (1, 2), 1, (1,), 8))
    x, t = torch.randn(2, 1, 8, 8, generator=Key(1).generator()), torch.full((2,), 0.4)
    exact = evaluate(net, Linear(), x, t)
    found = evaluate(InPrecision(net, precision), Linear(), x, t)
    assert found.dtype == x.dtype
    error = float((found - exact).detach().norm() / exact.detach().norm())
    assert error < 2 * ROUNDING[precision]


def test_the_network_given_stays_as_it_is():
    network = mlp()
    in_precision(NetworkField(network, Linear()), "fp64")
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_an_unknown_precision_is_refused():
    wrapped = (
        InPrecision.__init__.__wrapped__ if hasattr(InPrecision.__init__, "__wrapped__") else None
    )
    with pytest.raises((ValueError, TypeError), match="precision"):
        (wrapped or InPrecision.__init__)(InPrecision.__new__(InPrecision), mlp(), "bf17")
