"""The transformer: published sizes, patches, positions, what it starts as, keyed dropout, compilation."""

import math

import pytest
import torch
from jaxtyping import config
from torch import nn

from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.dit import (
    DiT,
    Size,
    TokenAttention,
    angles,
    patchify,
    rotate,
    unpatchify,
    waves,
)
from fmlightning.nets.embeddings import Dropout
from fmlightning.nets.size import multiply_adds, parameter_count

G = Key(12)
SMALL = Size(width=16, depth=2, heads=2, patch=2)
POSITIONS = ("sincos", "rope")


def inputs(n=5, shape=(1, 8, 8)):
    g = G.generator()
    x = torch.randn(n, *shape, generator=g)
    return x, torch.rand(n, generator=g), torch.randint(0, 5, (n,), generator=g)


def fresh(size=SMALL, **settings):
    with seeded(G):
        return DiT(size, **{"in_channels": 1, "num_classes": 5, **settings})


def network(size=SMALL, **settings):
    """A network none of whose layers is zero any more."""
    net = fresh(size, **settings)
    with seeded(G.fold(1)):
        for layer in net.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    return net


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


# Peebles & Xie 2023, table 4, for latents of 4 x 32 x 32: parameters in millions, and Gflops, a multiply-add being one
PUBLISHED = {
    "S/2": (33, 6.06),
    "B/2": (130, 23.01),
    "L/2": (458, 80.71),
    "XL/2": (675, 118.64),
    "XL/4": (675, 29.05),
    "XL/8": (676, 7.39),
}
# of the authors' class, of which SiT's is a copy, built from timm's parts
EXACT = {
    "S/2": 32_963_360,
    "S/4": 32_945_024,
    "S/8": 33_148_160,
    "B/2": 130_512_416,
    "B/4": 130_475_648,
    "B/8": 130_881_536,
    "L/2": 458_102_816,
    "L/4": 458_053_760,
    "L/8": 458_594_816,
    "XL/2": 675_129_632,
    "XL/4": 675_074_432,
    "XL/8": 675_683_072,
}


def published(name):
    with torch.device("meta"):
        return DiT(name, in_channels=4, num_classes=1000)


@pytest.mark.parametrize("name", EXACT)
def test_it_has_the_parameters_of_the_published_size(name):
    net = published(name)
    tokens, outputs = (32 // net.size.patch) ** 2, 4 * net.size.patch**2
    trained = parameter_count(net) + outputs * (net.size.width + 1)  # theirs predicts a variance
    assert trained + tokens * net.size.width == EXACT[name]  # and counts fixed sines and cosines
    if name in PUBLISHED:  # which the paper's table does not
        assert round(trained / 1e6) == PUBLISHED[name][0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_work_of_the_published_size(name):
    net = published(name)
    width, tokens = net.size.width, (32 // net.size.patch) ** 2
    work = multiply_adds(net, (4, 32, 32), labels=True)
    work += tokens * width * 4 * net.size.patch**2  # the variance
    # with one operation for each element that is normalised the last digit is theirs too
    work += tokens * width * (2 * net.size.depth + 1)
    assert round(work / 1e9, 2) == PUBLISHED[name][1]


def test_a_named_size_is_its_numbers():
    assert Size.named("B/4") == Size(width=768, depth=12, heads=12, patch=4)
    assert DiT("S/16", in_channels=1).size.patch == 16


def test_patches_are_those_of_the_image_and_come_back():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    for i in range(2):
        for j in range(3):
            patch = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(tokens[:, 3 * i + j], patch.flatten(1))
    assert torch.equal(unpatchify(tokens, (2, 3), 2), x)


@pytest.mark.parametrize("positions", POSITIONS)
def test_it_starts_at_zero(positions):
    x, t, y = inputs()
    assert torch.equal(fresh(positions=positions)(x, t, y), torch.zeros_like(x))


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_block_starts_as_the_identity(positions):
    x, t, y = inputs()
    net = fresh(positions=positions)
    with seeded(G.fold(1)):
        net.output.reset_parameters()
    out = net(x, t, y)
    net.blocks = net.blocks[:0]
    assert torch.equal(net(x, t, y), out)


@pytest.mark.parametrize("positions", POSITIONS)
def test_it_depends_on_point_time_and_label(positions):
    x, t, y = inputs()
    net = network(positions=positions)
    out = net(x, t, y)
    for other in (net(x + 0.1, t, y), net(x, t * 0.9, y), net(x, t, (y + 1) % 5)):
        assert bool((out != other).flatten(1).any(1).all())


def shuffled(x, order):
    """The image with its patches in another order."""
    return unpatchify(patchify(x, 2)[:, order], (4, 4), 2)


@pytest.mark.parametrize("positions", POSITIONS)
def test_only_the_positions_tell_one_order_of_the_patches_from_another(positions, monkeypatch):
    x, t, y = inputs()
    order = torch.randperm(16, generator=G.generator())
    net = network(positions=positions)
    assert relative(net(shuffled(x, order), t, y), shuffled(net(x, t, y), order)) > 0.01
    monkeypatch.setattr(DiT, "placed", lambda net, h, grid: (h, None))
    assert relative(net(shuffled(x, order), t, y), shuffled(net(x, t, y), order)) < 1e-5


def test_sines_and_cosines_of_a_place_are_the_stated_ones():
    place = waves(angles((3, 4), 5, 10_000.0, torch.device("cpu"))).double().reshape(3, 4, 20)
    for i, j, k in [(0, 0, 0), (2, 3, 4), (1, 2, 3), (2, 0, 1)]:
        omega = 10_000 ** (-k / 5)
        expected = [
            math.sin(j * omega),
            math.cos(j * omega),
            math.sin(i * omega),
            math.cos(i * omega),
        ]
        assert place[i, j, k::5].tolist() == pytest.approx(expected, abs=1e-6)  # float32


def test_rotated_products_depend_on_the_distance_alone():
    turn = angles((5, 6), 4, 100.0, torch.device("cpu")).double()
    q, k = torch.randn(2, 1, 1, 1, 16, generator=G.generator(), dtype=torch.float64)
    everywhere = (1, 1, 30, 16)
    scores = rotate(q.expand(everywhere), turn) @ rotate(k.expand(everywhere), turn).mT
    scores = scores.reshape(5, 6, 5, 6)  # of (i, j) with (i', j')
    assert torch.allclose(scores[0, 0, 0, 0], (q * k).sum())
    # angles are made in float32
    torch.testing.assert_close(scores[:4, :5, :4, :5], scores[1:, 1:, 1:, 1:], atol=1e-5, rtol=0)
    assert float((scores[0, 0] - scores[0, 0, 0, 0]).abs().flatten()[1:].min()) > 1e-3


def test_attention_with_angles_sees_a_shifted_grid_alike():
    """Of tokens that repeat along a row, RoPE's attention tells only how far apart they are."""
    h = torch.randn(1, 12, 16, generator=G.generator())
    with seeded(G):
        layer = TokenAttention(16, heads=2)
    turn = angles((3, 4), 2, 100.0, h.device)
    # float32 rounding
    torch.testing.assert_close(layer(h, turn), layer(h, turn + turn[5]), atol=1e-5, rtol=1e-5)
    assert relative(layer(h, 2 * turn), layer(h, turn)) > 1e-3


def test_attention_is_softmax_attention_between_tokens():
    x = torch.randn(2, 5, 6, generator=G.generator(), dtype=torch.float64)
    with seeded(G):
        layer = TokenAttention(6, heads=3).double()
    q, k, v = (
        x @ w.mT + b
        for w, b in zip(layer.qkv.weight.split(6), layer.qkv.bias.split(6), strict=True)
    )
    heads = []
    for head in (slice(0, 2), slice(2, 4), slice(4, 6)):
        scores = q[..., head] @ k[..., head].mT / 2**0.5
        heads.append(scores.softmax(-1) @ v[..., head])
    torch.testing.assert_close(layer(x, None), layer.output(torch.cat(heads, 2)))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", [(4, 4), (6, 2), (12, 8)], ids=str)
def test_any_size_that_the_patch_divides(side, positions):
    x, t, y = inputs(2, (1, *side))
    out = network(positions=positions)(x, t, y)
    assert out.shape == x.shape
    assert bool(out.isfinite().all())


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
    out = net(x, t, y, G.streams(index))
    some = [3, 1]
    part = net(x[some], t[some], y[some], G.streams(index[some]))
    assert relative(part, out[some]) < 1e-5  # float32 rounding
    assert relative(net(x, t, y, G.fold(1).streams(index)), out) > 0.01
    with pytest.raises(ValueError, match="streams="):
        net(x, t, y)
    assert torch.equal(net.eval()(x, t, y), net(x, t, y, G.streams(index)))


def test_every_dropout_has_a_stream_of_its_own():
    streams = [m.stream for m in fresh(dropout=0.1).modules() if isinstance(m, Dropout)]
    assert sorted(streams) == [0, 1, 2, 3]


def test_three_steps_from_zero_open_every_parameter():
    x, t, y = inputs()
    y[0] = 5  # the null label learns as well
    net = fresh()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):  # zeros nest: the output, then the gates, then what is behind them
        optimizer.zero_grad()
        (net(x, t, y) - x).square().mean().backward()
        optimizer.step()
    assert [n for n, p in net.named_parameters() if not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("positions", POSITIONS)
def test_bf16_autocast_is_close_and_keeps_the_type(positions):
    x, t, y = inputs()
    net = network(positions=positions)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, y)
    assert half.dtype == x.dtype
    assert relative(half, net(x, t, y)) < 0.03  # bfloat16 has 8 bits: 0.4 % a layer
    assert net.bfloat16()(x.bfloat16(), t, y).dtype == torch.bfloat16


def equal_when_compiled(backend, positions):
    x, t, y = inputs()
    net = network(dropout=0.2, positions=positions).train()
    streams = G.streams(torch.arange(5))
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    return relative(compiled(x, t, y, streams), net(x, t, y, streams))


@pytest.mark.parametrize("positions", ["rope", pytest.param("sincos", marks=pytest.mark.slow)])
def test_compiled_it_is_the_same(positions, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # its checks cannot be compiled
    assert equal_when_compiled("eager", positions) < 1e-5  # float32 rounding


@pytest.mark.slow
@pytest.mark.parametrize("positions", POSITIONS)
def test_compiled_by_inductor_it_is_the_same(positions, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    assert equal_when_compiled("inductor", positions) < 1e-5  # float32 rounding


def test_a_size_that_the_patch_does_not_divide_is_named_with_the_cure():
    with pytest.raises(ValueError, match=r"9 x 8 cannot be cut into patches of side 2: choose"):
        fresh()(torch.zeros(2, 1, 9, 8), torch.zeros(2))


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 8, 8)])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"x has shape \(4.*DiT\(in_channels=1\)"):
        fresh()(torch.zeros(shape), torch.zeros(4))


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        ("B", {}, "size='B' must be one of S, B, L, XL, a slash"),
        ("H/2", {}, "size='H/2' must be one of S, B, L, XL, a slash"),
        ("B/0", {}, "must be at least 1"),
        (SMALL, {"positions": "learned"}, "positions='learned' must be one of sincos, rope"),
        (SMALL, {"in_channels": 0}, "in_channels=0"),
        (SMALL, {"num_classes": -1}, "num_classes=-1"),
        (Size(6, 1, 1, 2), {}, "positions=sincos needs a multiple of 4 as width, which is 6"),
        (Size(12, 1, 2, 2), {"positions": "rope"}, "as width / heads, which is 6"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(size, settings, message):
    with pytest.raises(ValueError, match=message):
        fresh(size, **settings)


def test_heads_that_do_not_share_the_width_are_named():
    with pytest.raises(ValueError, match="heads=3 does not divide width=16"):
        Size(width=16, depth=1, heads=3, patch=2)
