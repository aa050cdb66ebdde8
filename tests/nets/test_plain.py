"""The plain network is the published one, and says what it cannot take."""

import pytest
import torch
from torch import nn

from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.plain import PlainMLP
from fmlightning.nets.size import parameter_count


def test_it_is_three_layers_of_64_with_selu_on_point_and_time():
    with seeded(Key(0)):
        net = PlainMLP()
    by_hand = nn.Sequential(
        nn.Linear(3, 64), nn.SELU(), nn.Linear(64, 64), nn.SELU(), nn.Linear(64, 64), nn.SELU(), nn.Linear(64, 2)
    )  # fmt: skip
    weights = list(net.parameters())
    with torch.no_grad():
        for mine, other in zip(by_hand.parameters(), weights, strict=True):
            mine.copy_(other)
    generator = Key(1).generator()
    x, t = torch.randn(9, 2, generator=generator), torch.rand(9, generator=generator)
    assert torch.equal(net(x, t), by_hand(torch.stack((*x.T, t), 1)))
    assert parameter_count(net) == 3 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 2 + 2


def test_labels_change_nothing():
    net, x, t = PlainMLP(width=8), torch.zeros(4, 2), torch.zeros(4)
    assert torch.equal(net(x, t, torch.arange(4)), net(x, t))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: PlainMLP(width=0), "width=0"),
        (lambda: PlainMLP(activation="sine"), "activation='sine' is unknown; choose one of selu"),
        (lambda: PlainMLP()(torch.zeros(4, 3), torch.zeros(4)), r"takes \(B, 2\)"),
    ],
)
def test_what_cannot_be_is_refused(make, cause):
    with pytest.raises(ValueError, match=cause):
        make()
