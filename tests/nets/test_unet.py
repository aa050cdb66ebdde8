"""The U-Net: sizes, what it depends on, what it starts as, keyed dropout, precision, compilation."""

import pytest
import torch
from jaxtyping import config
from torch import nn

from fmlightning.flow.keys import Key
from fmlightning.flow.seeding import seeded
from fmlightning.nets.embeddings import Dropout
from fmlightning.nets.unet import Attention, Block, UNet, group_norm

G = Key(11)
SMALL = {
    "in_channels": 1,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "head_channels": 8,
    "num_classes": 5,
}


def inputs(n=5, shape=(1, 8, 8)):
    g = G.generator()
    x = torch.randn(n, *shape, generator=g)
    return x, torch.rand(n, generator=g), torch.randint(0, 5, (n,), generator=g)


def fresh(**settings):
    with seeded(G):
        return UNet(**{**SMALL, **settings})


def network(**settings):
    """A network none of whose layers is zero any more."""
    net = fresh(**settings)
    with seeded(G.fold(1)):
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
    return net


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize(
    ("shape", "mult"),
    [((1, 8, 8), (1, 2, 2)), ((1, 28, 28), (1, 2)), ((3, 16, 12), (1, 2, 3)), ((2, 5, 7), (1,))],
    ids=str,
)
def test_any_size_that_its_levels_divide(shape, mult):
    x, t, y = inputs(2, shape)
    levels = (len(mult) - 1,)
    net = network(in_channels=shape[0], channel_mult=mult, attention_levels=levels)
    out = net(x, t, y)
    assert out.shape == x.shape
    assert bool(out.isfinite().all())


def test_it_has_the_parameters_of_the_published_cifar_network():
    with torch.device("meta"):
        net = UNet(3, 128, (1, 2, 2, 2), num_blocks=2, attention_levels=(1,), head_channels=64)
    total = sum(p.numel() for p in net.parameters())
    # Ho et al. 2020 and TorchCFM: 35.7 M, with a shift alone; each channel of a block has a scale here,
    # one row of 512 weights and a bias
    scales = sum(
        layer.out_features // 2 * 513
        for name, layer in net.named_modules()
        if name.endswith("affine")
    )
    assert total - scales == 35_746_307


def test_it_starts_at_zero():
    x, t, y = inputs()
    assert torch.equal(fresh()(x, t, y), torch.zeros_like(x))


def test_it_depends_on_point_time_and_label():
    x, t, y = inputs()
    net = network()
    out = net(x, t, y)
    for other in (net(x + 0.1, t, y), net(x, t * 0.9, y), net(x, t, (y + 1) % 5)):
        assert bool((out != other).flatten(1).any(1).all())


def test_attention_is_softmax_attention_between_pixels():
    x = inputs(2, (6, 4, 3))[0].double()
    with seeded(G):
        layer = Attention(6, head_channels=2).double()
        layer.output.reset_parameters()
    pixels = layer.norm(x).flatten(2)
    weight, bias = layer.qkv.weight[:, :, 0, 0], layer.qkv.bias
    q, k, v = (torch.einsum("oc,bcl->bol", weight, pixels) + bias[:, None]).split(6, 1)
    heads = []
    for head in (slice(0, 2), slice(2, 4), slice(4, 6)):
        scores = torch.einsum("bkl,bkm->blm", q[:, head], k[:, head]) / 2**0.5
        heads.append(torch.einsum("blm,bkm->bkl", scores.softmax(-1), v[:, head]))
    expected = x + layer.output(torch.cat(heads, 1).reshape(x.shape))
    torch.testing.assert_close(layer(x), expected)  # float64 rounding


def test_scale_and_shift_act_on_the_normalised_channels():
    x, e = inputs(2, (4, 6, 6))[0], torch.zeros(2, 3)
    with seeded(G):
        block = Block(4, 4, 3, Dropout(0.0, 0))
        block.conv2.reset_parameters()
    nn.init.zeros_(block.conv2.bias)
    block.affine.bias.data = torch.cat((-torch.ones(4), torch.zeros(4)))
    assert torch.equal(block(x, e, None), x)  # scale -1 leaves nothing, equation (2)
    block.affine.bias.data[4:] = -1000.0
    assert torch.equal(block(x, e, None), x)  # silu(-1000) = 0
    block.affine.bias.data[:] = 0.0
    assert not torch.allclose(block(x, e, None), x)


def test_a_pixel_reaches_the_whole_image():
    x, t, y = inputs(1, (1, 16, 16))
    x.requires_grad_()
    net = network(channel_mult=(1, 2, 2), attention_levels=())
    net(x, t, y)[0, 0, 0, 0].backward()
    assert bool((x.grad != 0).all())


def test_no_labels_are_the_null_label():
    x, t, y = inputs()
    net = network()
    null = torch.full_like(y, net.num_classes)
    torch.testing.assert_close(net(x, t), net(x, t, null), atol=1e-5, rtol=1e-5)


def test_a_network_without_labels_ignores_them():
    x, t, y = inputs()
    net = network(num_classes=0)
    assert torch.equal(net(x, t, y), net(x, t))


def test_dropout_is_keyed_by_sample():
    x, t, y = inputs()
    net = network(dropout=0.3).train()
    index = torch.arange(5) + 40
    out = net(x, t, y, G.rows(index))
    some = [3, 1]
    part = net(x[some], t[some], y[some], G.rows(index[some]))
    assert relative(part, out[some]) < 1e-5  # float32 rounding
    assert relative(net(x, t, y, G.fold(1).rows(index)), out) > 0.01
    with pytest.raises(ValueError, match="rows="):
        net(x, t, y)
    assert torch.equal(net.eval()(x, t, y), net(x, t, y, G.rows(index)))


def test_every_dropout_has_a_stream_of_its_own():
    streams = [m.stream for m in fresh(dropout=0.1).modules() if isinstance(m, Dropout)]
    assert sorted(streams) == list(range(2 + 2 + 4))  # encoder, middle, decoder


def test_three_steps_from_zero_open_every_parameter():
    x, t, y = inputs()
    y[0] = SMALL["num_classes"]  # the null label learns as well
    net = fresh()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(
        3
    ):  # zeros nest: the output, then the blocks' last layers, then what is behind them
        optimizer.zero_grad()
        (net(x, t, y) - x).square().mean().backward()
        optimizer.step()
    assert [n for n, p in net.named_parameters() if not p.grad.abs().sum() > 0] == []
    learned = net.label.rows.weight.grad.abs().sum(1) > 0
    assert set(learned.nonzero().flatten().tolist()) == set(y.tolist())


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 10, 24, 40, 52, 128, 200, 1024])
def test_groups_divide_any_channels(channels):
    groups = group_norm(channels).num_groups
    assert channels % groups == 0
    assert groups <= 32


def test_bf16_autocast_is_close_and_keeps_the_type():
    x, t, y = inputs()
    net = network()
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, y)
        half.square().sum().backward()
    assert half.dtype == x.dtype
    # bfloat16 has 8 bits: 0.4 % a layer, about twenty layers deep, growing as their root
    assert relative(half, net(x, t, y)) < 0.03
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def equal_when_compiled(backend):
    x, t, y = inputs()
    net = network(dropout=0.2).train()
    rows = G.rows(torch.arange(5))
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    return relative(compiled(x, t, y, rows), net(x, t, y, rows))


def test_compiled_it_is_the_same(monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # its checks cannot be compiled
    assert equal_when_compiled("eager") < 1e-5  # float32 rounding


@pytest.mark.slow
def test_compiled_by_inductor_it_is_the_same(monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    assert equal_when_compiled("inductor") < 1e-5  # float32 rounding


def test_a_size_that_cannot_be_halved_is_named_with_the_cure():
    net = fresh(channel_mult=(1, 2, 2))
    with pytest.raises(ValueError, match=r"30 x 28 .* by 4\. Resize or pad them to 32 x 28"):
        net(torch.zeros(2, 1, 30, 28), torch.zeros(2))


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 8, 8)])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"x has shape \(4.*UNet\(in_channels=1\)"):
        fresh()(torch.zeros(shape), torch.zeros(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_levels": (2,)}, r"attention_levels=\(2,\) must lie between 0 and 1"),
        ({"head_channels": 5}, "head_channels=5 does not divide the 16 channels"),
        ({"channel_mult": ()}, r"channel_mult=\(\) must be at least 1"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"channels": 7}, "features=7 must be even"),
        ({"num_classes": -1}, "num_classes=-1"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        fresh(**settings)
