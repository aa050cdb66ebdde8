"""The Frechet distance against closed forms and arithmetic of 50 digits."""

import mpmath
import pytest
import torch

from fmlightning.flow.keys import Key
from fmlightning.metrics.features.collectors import FeatureBuffer, Moments
from fmlightning.metrics.features.frechet import extrapolated, interval
from fmlightning.metrics.features.gaussian import FeatureGaussian, frechet_distance


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=Key(seed).generator(), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


@pytest.mark.parametrize("rank", [1, 5, 16], ids="rank {}".format)
def test_commuting_covariances(rank):
    """One eigenbasis: the distance is that of the roots of the eigenvalues."""
    d, u = 16, rotation(16)
    a, b = normal(d, seed=1).square(), normal(d, seed=2).square()
    a[rank:] = 0
    m1, m2 = normal(d, seed=3), normal(d, seed=4)
    one, two = (
        FeatureGaussian.from_covariance(m, u @ torch.diag(s) @ u.T) for m, s in ((m1, a), (m2, b))
    )
    expected = (m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert len(one.factor) == rank
    assert frechet_distance(one, two) == pytest.approx(float(expected), rel=1e-10)


def test_covariances_without_a_common_direction_do_not_interact():
    f = normal(5, 12)
    left, right = f.clone(), f.clone()
    left[:, 6:], right[:, :6] = 0, 0
    a, b = (FeatureGaussian(torch.zeros(12, dtype=torch.float64), z) for z in (left, right))
    assert frechet_distance(a, b) == pytest.approx(float(f.square().sum()), rel=1e-12)


def symmetric(values, vectors, f):
    return vectors * mpmath.diag([f(v) for v in values]) * vectors.T


def exact(x, y):
    """Equation 1 of two samples in 50 digits, by roots of matrices."""
    with mpmath.workdps(50):
        (m1, s1), (m2, s2) = moments(x), moments(y)

        def clipped(v):
            return mpmath.sqrt(v if v > 0 else 0)

        root = symmetric(*mpmath.eigsy(s1), clipped)
        common = mpmath.eigsy(root * s2 * root, eigvals_only=True)
        d = x.shape[1]
        trace = sum(s1[i, i] + s2[i, i] for i in range(d)) - 2 * sum(clipped(v) for v in common)
        return float(sum((m1[i] - m2[i]) ** 2 for i in range(d)) + trace)


def moments(x):
    x = mpmath.matrix(x.tolist())
    n = x.rows
    mean = mpmath.matrix([sum(x[i, j] for i in range(n)) / n for j in range(x.cols)])
    z = mpmath.matrix(n, x.cols)
    for i in range(n):
        for j in range(x.cols):
            z[i, j] = x[i, j] - mean[j]
    return mean, z.T * z / (n - 1)


@pytest.mark.parametrize(("n", "d"), [(9, 4), (3, 8), (12, 20), (40, 32)])
def test_fifty_digits_agree(n, d):
    """Samples of more and of fewer points than dimensions; the law is far from round."""
    scale = 2.0 ** -torch.arange(d).fmod(11)
    x, y = normal(n, d) * scale + 3, normal(n + 2, d, seed=1) @ rotation(d, seed=2) + 3.1
    distance = frechet_distance(FeatureGaussian.of(x), FeatureGaussian.of(y))
    assert distance == pytest.approx(exact(x, y), rel=1e-10)


@pytest.mark.parametrize("n", [2, 7, 30, 200])
def test_it_is_zero_from_itself_and_never_negative(n):
    x = normal(n, 30) * 10 + 100
    y = x[torch.randperm(n, generator=Key(1).generator())]
    a, b = FeatureGaussian.of(x), FeatureGaussian.of(y)
    for one, two in ((a, a), (a, b), (b, a)):
        # the traces are about 30 x 100, and rounding is a hundred times that of float64
        assert 0 <= frechet_distance(one, two) < 1e-10


@pytest.mark.parametrize("center", [0.0, 99.0])
def test_moments_of_blocks_are_those_of_the_whole(center):
    x = normal(500, 6) + 100
    metric, kept = Moments(torch.full((6,), center)), FeatureBuffer()
    order = torch.randperm(500, generator=Key(1).generator())
    for rows in order.split(64):
        metric.update(x[rows], rows)
        kept.update(x[rows], rows)
    found = metric.compute()
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-13, atol=0)
    # x^2 of 1e4 in the sums of the first, of 1 in those of the second
    torch.testing.assert_close(
        found.factor.T @ found.factor, x.T.cov(), rtol=0, atol=1e-10 if not center else 1e-13
    )
    assert torch.equal(kept.compute(), x)
    assert frechet_distance(found, FeatureGaussian.of(x)) < 1e-9


def test_extrapolation_takes_the_bias_away():
    """The law itself has distance 1 from the reference, a sample more."""
    d, n = 16, 600
    reference = FeatureGaussian(
        torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    )
    excess, left = [], []
    for seed in range(6):
        x = normal(n, d, seed=seed)
        x[:, 0] += 1
        excess.append(frechet_distance(reference, FeatureGaussian.of(x)) - 1)
        left.append(extrapolated(reference, x) - 1)
    # to first order D / n of the mean and D (D + 1) / (4 n) of the covariance
    bias = (d + d * (d + 1) / 4) / n
    assert sum(excess) / 6 == pytest.approx(bias, rel=0.5)
    # the shifted coordinate alone varies by 2 / sqrt(n) = 0.08, the mean of six by 0.03
    assert abs(sum(left) / 6) < 0.5 * bias


def test_the_interval_is_as_wide_as_the_spread_of_fresh_samples():
    d, n = 8, 60
    reference = FeatureGaussian(
        torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    )
    samples = [normal(n, d, seed=seed) + 0.5 for seed in range(60)]
    distances = torch.tensor([frechet_distance(reference, FeatureGaussian.of(x)) for x in samples])
    widths = []
    for x, distance in zip(samples[:4], distances[:4].tolist(), strict=True):
        low, high = interval(reference, x, distance, 200)
        # resampling alone would add D (D + 1) / (4 n) = 0.3, more than half the width
        assert (low + high) / 2 == pytest.approx(distance, abs=0.2 * (high - low))
        widths.append(high - low)
    # 60 distances know their deviation to 9 %, 200 resamplings the ends of an interval to about as much
    assert sum(widths) / 4 == pytest.approx(2 * 1.96 * float(distances.std()), rel=0.3)
