"""The U-Net: sizes, what it depends on, what it starts as, keyed dropout, precision, compilation."""

import math

import pytest
import torch
from jaxtyping import config
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.embeddings import Dropout
from fmlightning.nets.size import multiply_adds, parameter_count
from fmlightning.nets.unet import ResBlock, SpatialAttention, UNet, group_norm

G = Key(11)
SMALL = {
    "in_channels": 1,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "head_channels": 8,
    "num_classes": 5,
}
KINDS = {
    "default": {},
    "ddpm": {"scale_shift": False},
    "adm": {"resample": "block"},
    "ddpm++": {"resample": "block", "skip_scale": 0.5**0.5, "init": "edm"},
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


# channels, factors, blocks, attention levels, side, whether adaptive norms and resampling blocks, and the count.
# The counts are those of guided-diffusion's UNetModel as TorchCFM 1.0.7 ships it, built with these arguments.
PUBLISHED = {
    "Ho 2020, TorchCFM: CIFAR-10": (128, (1, 2, 2, 2), 2, (1,), 32, False, 35_746_307),
    "Lipman 2023: CIFAR-10": (256, (1, 2, 2, 2), 2, (1,), 32, True, 171_268_099),
    "Lipman 2023: ImageNet-32": (256, (1, 2, 2, 2), 3, (1, 2), 32, True, 228_149_507),
    "Lipman 2023: ImageNet-64": (192, (1, 2, 3, 4), 3, (1, 2, 3), 64, True, 295_131_267),
    "ADM: ImageNet-64": (192, (1, 2, 3, 4), 3, (1, 2, 3), 64, True, 295_904_454),
    "ADM: ImageNet-128": (256, (1, 1, 2, 3, 4), 2, (2, 3, 4), 128, True, 421_529_606),
    "ADM: ImageNet-256": (256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 256, True, 553_838_086),
}
# as the papers print them: Dhariwal & Nichol 2021, table 4
MILLIONS = {"ADM: ImageNet-64": 296, "ADM: ImageNet-128": 422, "ADM: ImageNet-256": 554}


def published(name):
    channels, mult, blocks, levels, _, adm, _ = PUBLISHED[name]
    kind, classes = KINDS["adm" if adm else "ddpm"], 1000 * name.startswith("ADM")
    with torch.device("meta"):
        return UNet(3, channels, mult, blocks, levels, 64, num_classes=classes, **kind)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_parameters_of_the_published_network(name):
    channels, *_, expected = PUBLISHED[name]
    total = parameter_count(published(name))
    if name.startswith(
        "ADM"
    ):  # theirs predicts a variance as well, and ours has a row for "no label"
        total += 3 * (9 * channels + 1) - 4 * channels
    assert total == expected
    assert round(total / 1e6) == MILLIONS.get(name, round(total / 1e6))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # counted on TorchCFM's UNetModelWrapper, and on the UNetModel it wraps
        ("Ho 2020, TorchCFM: CIFAR-10", 6_221_856_768),
        ("Lipman 2023: CIFAR-10", 28_064_088_064),
        ("Lipman 2023: ImageNet-32", 36_535_533_568),
        ("Lipman 2023: ImageNet-64", 109_656_784_896),
    ],
)
def test_it_has_the_work_of_the_published_network(name, expected):
    side = PUBLISHED[name][4]
    assert multiply_adds(published(name), (3, side, side)) == expected


@pytest.mark.parametrize("kind", ["default", "ddpm", "adm"])
def test_it_starts_at_zero(kind):
    x, t, y = inputs()
    assert torch.equal(fresh(**KINDS[kind])(x, t, y), torch.zeros_like(x))


def test_edm_starts_small_with_the_variances_of_xavier():
    x, t, y = inputs()
    net = fresh(channels=32, head_channels=32, init="edm")
    out = net(x, t, y)
    assert 0 < float(out.detach().abs().max()) < 1e-3  # the last layer's weights are of order 1e-6
    gains = {"conv2": 1e-5, "attention.output": 1e-5, "output": 1e-5, "attention.qkv": 0.2**0.5}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
            weight, area = layer.weight, math.prod(layer.weight.shape[2:])
            expected = gain**2 * 2 / (area * sum(weight.shape[:2]))
            # the mean square of n uniform numbers has a relative standard error of sqrt(0.8 / n)
            error = 4.5 * math.sqrt(0.8 / weight.numel())
            assert float(weight.detach().square().mean()) == pytest.approx(expected, rel=error), (
                name
            )
            assert bool((layer.bias == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_it_depends_on_point_time_and_label(kind):
    x, t, y = inputs()
    net = network(**KINDS[kind])
    out = net(x, t, y)
    for other in (net(x + 0.1, t, y), net(x, t * 0.9, y), net(x, t, (y + 1) % 5)):
        assert bool((out != other).flatten(1).any(1).all())


def test_attention_is_softmax_attention_between_pixels():
    x = inputs(2, (6, 4, 3))[0].double()
    with seeded(G):
        layer = SpatialAttention(6, head_channels=2).double()
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


def test_attention_never_holds_its_scores():
    x = inputs(2, (8, 4, 4))[0].requires_grad_()
    layer = SpatialAttention(8, head_channels=4)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # refuses what this kernel cannot take
        layer(x).sum().backward()


def test_scale_and_shift_act_on_the_normalised_channels():
    x, e = inputs(2, (4, 6, 6))[0], torch.zeros(2, 3)
    with seeded(G):
        block = ResBlock(4, 4, 3, Dropout(0.0, 0))
        block.conv2.reset_parameters()
    nn.init.zeros_(block.conv2.bias)
    block.affine.bias.data = torch.cat((-torch.ones(4), torch.zeros(4)))
    assert torch.equal(block(x, e, None), x)  # scale -1 leaves nothing, equation (2)
    block.affine.bias.data[4:] = -1000.0
    assert torch.equal(block(x, e, None), x)  # silu(-1000) = 0
    block.affine.bias.data[:] = 0.0
    assert not torch.allclose(block(x, e, None), x)


def test_a_shift_alone_acts_before_the_norm():
    x, e = inputs(2, (4, 6, 6))[0], torch.zeros(2, 3)
    with seeded(G):
        block = ResBlock(4, 4, 3, Dropout(0.0, 0), scale_shift=False)
        block.conv2.reset_parameters()
    nn.init.zeros_(block.affine.bias)
    out = block(x, e, None)
    block.affine.bias.data[:] = 100.0  # the same in all channels of a group: its norm takes it away
    assert relative(block(x, e, None), out) < 1e-4  # float32: 100 of 2**24 steps
    block.affine.bias.data = torch.arange(4.0)
    assert relative(block(x, e, None), out) > 0.01


def test_blocks_that_resample_pool_and_repeat():
    x = inputs(2, (4, 6, 6))[0]
    drop = Dropout(0.0, 0)
    down = ResBlock(4, 4, 3, drop, resample=nn.AvgPool2d(2))
    up = ResBlock(4, 4, 3, drop, resample=nn.Upsample(scale_factor=2))
    e = torch.zeros(2, 3)
    small = down(x, e, None)  # the branch starts at zero: this is the skip
    torch.testing.assert_close(small, x.unflatten(3, (3, 2)).unflatten(2, (3, 2)).mean((3, 5)))
    assert torch.equal(up(small, e, None), small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    with seeded(G):
        up.conv2.reset_parameters()
    plain = ResBlock(4, 4, 3, drop)
    plain.load_state_dict(up.state_dict())
    flat = torch.ones(2, 4, 3, 3) * torch.arange(4.0)[:, None, None]  # repeating changes no value,
    inner = plain(
        F.interpolate(flat, scale_factor=2.0), e, None
    )  # so branch and skip are a plain block's
    torch.testing.assert_close(up(flat, e, None), inner)


def test_the_branch_is_resampled_behind_its_nonlinearity():
    x, drop = inputs(2, (4, 6, 6))[0], Dropout(0.0, 0)
    with seeded(G):
        block = ResBlock(4, 4, 3, drop, resample=nn.AvgPool2d(2))
        block.conv2.reset_parameters()
    nn.init.zeros_(block.affine.bias)
    h = block.conv1(F.avg_pool2d(F.silu(block.norm1(x)), 2))
    expected = F.avg_pool2d(x, 2) + block.conv2(F.silu(block.norm2(h)))
    torch.testing.assert_close(block(x, torch.zeros(2, 3), None), expected)


def test_the_skip_scale_multiplies_every_sum():
    x = inputs(2, (4, 6, 6))[0]
    block = ResBlock(4, 4, 3, Dropout(0.0, 0), skip_scale=0.5)
    assert torch.equal(block(x, torch.zeros(2, 3), None), 0.5 * x)
    assert torch.equal(SpatialAttention(4, 2, skip_scale=0.5)(x), 0.5 * x)


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


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_keyed_by_sample(kind):
    x, t, y = inputs()
    net = network(dropout=0.3, **KINDS[kind]).train()
    index = torch.arange(5) + 40
    out = net(x, t, y, G.streams(index))
    some = [3, 1]
    part = net(x[some], t[some], y[some], G.streams(index[some]))
    assert relative(part, out[some]) < 1e-5  # float32 rounding
    assert relative(net(x, t, y, G.fold(1).streams(index)), out) > 0.01
    with pytest.raises(ValueError, match="streams="):
        net(x, t, y)
    assert torch.equal(net.eval()(x, t, y), net(x, t, y, G.streams(index)))


@pytest.mark.parametrize(("resample", "more"), [("conv", 0), ("block", 2)])
def test_every_dropout_has_a_stream_of_its_own(resample, more):
    net = fresh(dropout=0.1, resample=resample)
    streams = [m.stream for m in net.modules() if isinstance(m, Dropout)]
    assert sorted(streams) == list(range(2 + 2 + 4 + more))  # encoder, middle, decoder, resampling


@pytest.mark.parametrize("kind", ["default", "ddpm", "adm"])
def test_three_steps_from_zero_open_every_parameter(kind):
    x, t, y = inputs()
    y[0] = SMALL["num_classes"]  # the null label learns as well
    net = fresh(**KINDS[kind])
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


def equal_when_compiled(backend, **settings):
    x, t, y = inputs()
    net = network(dropout=0.2, **settings).train()
    streams = G.streams(torch.arange(5))
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    return relative(compiled(x, t, y, streams), net(x, t, y, streams))


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddpm", "adm")]


@pytest.mark.parametrize("kind", ["default", "ddpm++", *SLOW])
def test_compiled_it_is_the_same(kind, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # its checks cannot be compiled
    assert equal_when_compiled("eager", **KINDS[kind]) < 1e-5  # float32 rounding


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
        ({"resample": "pool"}, "resample='pool' must be one of conv, block"),
        ({"init": "adm"}, "init='adm' must be one of plain, edm"),
        ({"frequencies": (2.0, 1.0)}, r"frequencies=\(2.0, 1.0\) must be positive, the smallest"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        fresh(**settings)
