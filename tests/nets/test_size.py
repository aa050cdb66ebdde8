"""Counts of work against counts by hand, without computing and without a trace."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fmlightning.nets.mlp import TimeMLP
from fmlightning.nets.size import describe, multiply_adds, parameter_count, short
from fmlightning.nets.unet import UNet


class Timed(nn.Module):
    """A layer as a network."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, t, y=None):
        return self.layer(x)


class SelfAttention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(5, 7), (5,), 5 * 7),
        (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 8), 3 * 4 * 9 * 6 * 8),
        (nn.Conv2d(3, 4, 3, padding=1, stride=2), (3, 6, 8), 3 * 4 * 9 * 3 * 4),
        # scores and averages: 10 tokens with 10 tokens, 4 channels, 2 heads
        (SelfAttention(), (2, 10, 4), 2 * (10 * 10 * 4) * 2),
        (nn.SiLU(), (5,), 0),
    ],
    ids=["linear", "conv", "strided", "attention", "none"],
)
def test_the_work_of_a_layer_is_its_multiply_adds(layer, shape, expected):
    assert multiply_adds(Timed(layer), shape) == expected


def test_the_work_of_a_perceptron_is_its_weights():
    net = TimeMLP(dim=3, width=8, depth=2, num_classes=4)
    work = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear))
    assert multiply_adds(net, (3,), labels=True) == work


def test_counting_leaves_the_network_as_it_was():
    net = UNet(1, 8, (1, 2), 1, head_channels=8, dropout=0.1).train()
    before = {n: p.clone() for n, p in net.state_dict().items()}
    state = torch.get_rng_state()
    multiply_adds(net, (1, 8, 8))
    assert net.training
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_counting_compiles_nothing():
    net, calls = TimeMLP(), []
    expected = multiply_adds(net, (2,))
    net.compile(backend=lambda graph, inputs: calls.append(graph) or graph.forward)
    assert multiply_adds(net, (2,)) == expected
    assert calls == []


def test_a_network_that_looks_at_its_numbers_has_no_count():
    class Looks(nn.Module):
        def forward(self, x, t, y=None):
            return x if x.sum() > 0 else -x

    assert multiply_adds(Looks(), (2,)) is None
    assert describe(Looks(), (2,)) == "Looks: 0 parameters"


def test_what_is_printed():
    net = TimeMLP(dim=2, width=128, depth=4)
    assert parameter_count(net) == 18 * 128 + 128 + 3 * (128 * 128 + 128) + 128 * 2 + 2
    assert describe(net, (2,)) == "TimeMLP: 52.2k parameters, 51.7k FLOPs a sample (multiply-adds)"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (999_600, "1M"),
        (35_746_307, "35.7M"),
        (1.2e12, "1.2T"),
    ],
)
def test_numbers_in_three_digits(number, words):
    assert short(number) == words
