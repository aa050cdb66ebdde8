"""Time features, the label that stands for none, keyed dropout, keyed weights."""

import math

import pytest
import torch
from torch import nn

from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.embeddings import HALF, ClassEmbedding, Dropout, TimeFeatures

INDEX = torch.tensor([3, 700, 2**33 + 1, 0])
STREAMS = Key(1).streams(INDEX)
SHAPE = (6, 5, 7)  # odd sizes: not all of the last word is used


def dropped(x, streams, p=0.3, stream=2):
    return Dropout(p, stream).train()(x, streams)


def test_time_features_are_the_stated_sines_and_cosines():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    features = TimeFeatures(8, 100.0).double()(t)
    for k in range(4):
        angle = 100 ** (k / 3) * t
        # the frequencies were made in float32: 100 rad with a relative error of 1e-7
        torch.testing.assert_close(features[:, k], angle.sin(), atol=1e-4, rtol=0)
        torch.testing.assert_close(features[:, 4 + k], angle.cos(), atol=1e-4, rtol=0)


def test_frequencies_are_geometric_between_the_two():
    omega = TimeFeatures(64, 1.0, 1e-4).frequencies[:32].double()
    assert omega[0] == pytest.approx(1e-4)
    assert omega[-1] == pytest.approx(1.0)
    ratios = omega[1:] / omega[:-1]
    # made in float32: a power of 1e4 to an exponent that is rounded
    torch.testing.assert_close(ratios, torch.full_like(ratios, 1e4 ** (1 / 31)), atol=0, rtol=2e-6)


def test_time_features_are_exact_for_half_precision_times():
    features = TimeFeatures(16, 1000.0).bfloat16()
    t = torch.rand(50, generator=Key(0).generator()).bfloat16()
    angles = t.double()[:, None] * features.frequencies.double() + features.phases.double()
    out = features(t)
    assert out.dtype == torch.bfloat16
    # only the result is rounded, to 8 bits; angles of 1000 in bfloat16 would be off by 2 radians
    torch.testing.assert_close(out.double(), angles.sin(), atol=2**-8, rtol=0)


def test_an_odd_number_of_features_is_refused():
    with pytest.raises(ValueError, match="features=7 must be even"):
        TimeFeatures(7, 10.0)


def test_no_label_is_the_row_after_the_last():
    label = ClassEmbedding(10, 4)
    assert torch.equal(label(None).expand(3, 4), label(torch.full((3,), 10)))
    with pytest.raises(ValueError, match="num_classes=-1"):
        ClassEmbedding(-1, 4)


def test_dropout_of_a_sample_does_not_depend_on_its_batch():
    x = torch.randn(4, *SHAPE, generator=Key(0).generator())
    whole = dropped(x, STREAMS)
    for order in ([2], [3, 1], [1, 0, 3, 2]):
        assert torch.equal(dropped(x[order], Key(1).streams(INDEX[order])), whole[order])


def test_dropout_differs_between_rows_streams_and_keys():
    ones = torch.ones(4, *SHAPE)
    mask = dropped(ones, STREAMS)
    others = [
        mask.roll(1, 0),
        dropped(ones, STREAMS, stream=3),
        dropped(ones, Key(2).streams(INDEX)),
    ]
    for other in others:
        # two independent masks differ in 2 p (1 - p) = 42 % of 840 elements, s.e. 1.7 %
        differing = (mask != other).float().mean()
        assert abs(float(differing) - 0.42) < 4 * 0.017


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_stated_share_and_the_mean(p):
    n = 500
    ones = torch.ones(n, 1000)
    out = dropped(ones, Key(3).streams(torch.arange(n)), p)
    kept = (out != 0).double()
    error = math.sqrt(p * (1 - p))
    assert abs(float(kept.mean()) - (1 - p)) < 4 * error / math.sqrt(ones.numel())
    # E[dropout(x)] = x, so every element's mean over the samples is 1; 4.9 s.e. for the largest of 1000
    assert float((out.mean(0) - 1).abs().max()) < 4.9 * error / (1 - p) / math.sqrt(n)
    # neighbours, the four lanes of a word and neighbouring words are unrelated
    centred = kept - kept.mean()
    for lag in (1, 2, 3, 4, 500):
        correlation = (centred * centred.roll(lag, 1)).mean() / (p * (1 - p))
        assert abs(float(correlation)) < 4 / math.sqrt(ones.numel())


def test_dropout_divides_by_the_probability_it_rounded_to():
    out = dropped(torch.ones(4, 1000, dtype=torch.float64), STREAMS, p=0.3)
    assert out.unique().tolist() == [0.0, HALF / round(0.7 * HALF)]


def test_dropout_of_half_precision_is_rounded_once():
    x = torch.randn(4, *SHAPE, generator=Key(0).generator()).bfloat16()
    out = dropped(x, STREAMS, p=0.1)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, dropped(x.float(), STREAMS, p=0.1).bfloat16())


def test_dropout_passes_gradients_of_what_it_kept():
    x = torch.randn(4, *SHAPE, generator=Key(0).generator()).requires_grad_()
    out = dropped(x, STREAMS)
    out.sum().backward()
    assert torch.equal(x.grad, (out != 0) * (HALF / round(0.7 * HALF)))


def test_dropout_is_silent_when_evaluating_or_switched_off():
    x = torch.ones(4, 5)
    assert Dropout(0.3, 0).eval()(x, None) is x
    assert Dropout(0.0, 0).train()(x, None) is x


def test_dropout_says_what_it_needs():
    with pytest.raises(ValueError, match=r"streams=key\.streams\(index\)"):
        Dropout(0.3, 0).train()(torch.ones(4, 5), None)
    with pytest.raises(ValueError, match=r"dropout=1.0 must lie in \[0, 1\)"):
        Dropout(1.0, 0)


def test_seeded_builds_the_same_foreign_network_and_leaves_the_global_state():
    def build(seed):
        with seeded(Key(seed).fold("weights")):
            network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LSTM(4, 4))
        return nn.utils.parameters_to_vector(network.parameters())

    before = torch.get_rng_state()
    first = build(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)  # the state outside does not matter
    assert torch.equal(build(0), first)
    assert not torch.equal(build(1), first)
    torch.set_rng_state(before)


def test_seeded_restores_the_state_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(Key(0)):
        torch.rand(1).div_(1 // 0)
    assert torch.equal(torch.get_rng_state(), before)
