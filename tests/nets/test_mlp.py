"""The TimeMLP: what it depends on, what it starts as, keyed dropout, precision, compilation."""

import pytest
import torch
from jaxtyping import config

from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.mlp import TimeMLP

G = Key(7)


def inputs(n=9, dim=3):
    g = G.generator()
    x = torch.randn(n, dim, generator=g)
    return x, torch.rand(n, generator=g), torch.randint(0, 5, (n,), generator=g)


def fresh(**settings):
    with seeded(G):
        return TimeMLP(**{"dim": 3, "width": 32, "depth": 3, "num_classes": 5, **settings})


def network(**settings):
    """A network whose last layer is not zero any more."""
    net = fresh(**settings)
    with seeded(G.fold(1)):
        torch.nn.init.normal_(net.output.weight)
    return net


def test_it_starts_at_zero():
    x, t, y = inputs()
    assert torch.equal(fresh()(x, t, y), torch.zeros_like(x))


def test_it_depends_on_point_time_and_label():
    x, t, y = inputs()
    net = network()
    out = net(x, t, y)
    assert out.shape == x.shape
    for other in (net(x + 0.1, t, y), net(x, t * 0.9, y), net(x, t, (y + 1) % 5)):
        assert bool((out != other).any(1).all())


def test_each_sample_is_evaluated_alone():
    x, t, y = inputs()
    net = network().double()
    x, t = x.double(), t.double()
    # another batch size may sum in another order: float64 rounding
    torch.testing.assert_close(
        net(x[4:5], t[4:5], y[4:5]), net(x, t, y)[4:5], atol=1e-12, rtol=1e-12
    )


def test_no_labels_are_the_null_label():
    x, t, y = inputs()
    net = network()
    null = torch.full_like(y, net.num_classes)
    torch.testing.assert_close(net(x, t), net(x, t, null), atol=1e-6, rtol=1e-6)


def test_dropout_is_keyed_by_sample():
    x, t, y = inputs()
    net = network(dropout=0.5).train()
    index = torch.arange(9) + 100
    out = net(x, t, y, G.streams(index))
    part = net(x[[5, 2]], t[[5, 2]], y[[5, 2]], G.streams(index[[5, 2]]))
    torch.testing.assert_close(part, out[[5, 2]], atol=1e-5, rtol=1e-5)  # float32 rounding
    assert not torch.allclose(out, net(x, t, y, G.fold(1).streams(index)))
    streams = [layer.stream for layer in net.dropouts]
    assert len(set(streams)) == len(streams) == 3


def test_gradients_reach_every_parameter():
    x, t, y = inputs()
    net = network()
    y[0] = net.num_classes
    net(x, t, y).square().sum().backward()
    assert [n for n, p in net.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_bf16_autocast_is_close_and_keeps_the_type():
    x, t, y = inputs()
    net = network()
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, y)
    assert half.dtype == x.dtype
    exact = net(x, t, y)
    # bfloat16 has 8 bits; errors of 0.4 % a layer, against the size of the output
    assert float((half - exact).detach().norm() / exact.detach().norm()) < 0.02


def test_compiled_it_is_the_same(monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # its checks cannot be compiled
    x, t, y = inputs()
    net = network(dropout=0.5).train()
    streams = G.streams(torch.arange(9))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x, t, y, streams), net(x, t, y, streams), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(4, 2), (4,), (4, 3, 1)])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"x has shape \(4.*TimeMLP\(dim=3\) takes \(B, 3\)"):
        fresh()(torch.zeros(shape), torch.zeros(4))


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        fresh(depth=0)
    with pytest.raises(ValueError, match=r"dropout=1\.5"):
        fresh(dropout=1.5)
