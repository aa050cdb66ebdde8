"""Sampled options: even, keyed, and of the distribution that is asked for."""

import math

import numpy as np
import pytest
from scipy.stats import kstest

from fmlightning.studies.sweep.samples import random, sampled, sobol

OPTIONS = ["a", "b", "c"]


@pytest.mark.parametrize("m", [1, 3, 6])
def test_of_two_to_the_m_points_one_lies_in_each_interval(m):
    """What the shift of the bits has to keep, in every option."""
    points = np.array(sobol(OPTIONS, 2**m, seed=3))
    for column in points.T:
        assert sorted((column * 2**m).astype(int)) == list(range(2**m))


def test_pairs_of_options_are_even_together():
    """A (0, m, 2)-net: of 64 points 4 x 4 boxes hold four each; a shift modulo 1 would not keep that."""
    points = np.array(sobol(["a", "b"], 64, seed=1))
    boxes = (points * 4).astype(int)
    assert set(np.unique(boxes[:, 0] * 4 + boxes[:, 1], return_counts=True)[1]) == {4}


@pytest.mark.parametrize("draw", [sobol, random])
def test_more_points_leave_the_first_as_they_are(draw):
    assert draw(OPTIONS, 20, seed=2)[:7] == draw(OPTIONS, 7, seed=2)
    assert draw(OPTIONS, 7, seed=2) != draw(OPTIONS, 7, seed=3)


@pytest.mark.parametrize("draw", [sobol, random])
def test_an_option_has_its_values_whatever_stands_beside_it_in_the_file(draw):
    alone, beside = draw(["a"], 9, seed=0), draw(["a", "b"], 9, seed=0)
    assert [row[0] for row in beside] == [row[0] for row in alone]


def test_random_points_are_uniform_and_options_are_not_related():
    points = np.array(random(OPTIONS, 4000, seed=0))
    for column in points.T:
        assert kstest(column, "uniform").pvalue > 1e-3  # a sound generator fails once in 1000 keys
    limit = 4 / math.sqrt(4000)  # four standard deviations of a correlation that is 0
    assert np.abs(np.corrcoef(points.T) - np.eye(3)).max() < limit


def test_values_follow_the_inverse_of_their_distribution():
    n = 4096
    content = {
        "n": n,
        "x": {"uniform": [-2, 6]},
        "y": {"log_uniform": [1e-4, 1e-2]},
        "k": {"integers": [3, 6]},
    }
    points = sampled(content)
    x, y, k = (np.array([point[name] for point in points]) for name in "xyk")
    # of an even sequence the mean is right to 1 / n; the six digits of a value add 1e-6
    assert x.mean() == pytest.approx(2, abs=8 / n)
    assert np.log10(y).mean() == pytest.approx(-3, abs=2 / n)
    assert 1e-4 <= y.min() < y.max() <= 1e-2
    assert np.unique(k, return_counts=True)[1].tolist() == [n // 4] * 4
    assert all(type(point["k"]) is int for point in points)
    assert all(float(f"{v:.6g}") == v for v in y)
