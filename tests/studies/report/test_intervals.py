"""The statistics of a report against scipy, published examples and brute force."""

import itertools
import math

import pytest
import torch
from scipy import stats

from fmlightning.flow.keys import Key
from fmlightning.studies.report.intervals import Estimate, holm


def draws(n: int, number: int) -> list[float]:
    return torch.randn(n, generator=Key(number).generator(), dtype=torch.float64).tolist()


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_is_students(n):
    values = draws(n, n)
    estimate = Estimate.of(values)
    low, high = stats.t.interval(0.95, n - 1, loc=stats.tmean(values), scale=stats.sem(values))
    # both are float64; the quantile is good to 1e-12 or so
    assert estimate.mean - estimate.half_width == pytest.approx(low, abs=1e-10)
    assert estimate.mean + estimate.half_width == pytest.approx(high, abs=1e-10)
    assert estimate.std == pytest.approx(stats.tstd(values), rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_p_of_differences_is_the_paired_t_test(n):
    a, b = draws(n, 10 + n), draws(n, 20 + n)
    known = stats.ttest_rel(a, b)
    estimate = Estimate.of([x - y for x, y in zip(a, b, strict=True)])
    assert estimate.p == pytest.approx(known.pvalue, rel=1e-9)
    low, high = known.confidence_interval(0.95)
    assert estimate.mean - estimate.half_width == pytest.approx(low, abs=1e-10)
    assert estimate.mean + estimate.half_width == pytest.approx(high, abs=1e-10)
    # the interval excludes 0 where p says so
    assert (estimate.p < 0.05) == (abs(estimate.mean) > estimate.half_width)


def test_one_seed_has_no_interval_and_no_evidence():
    estimate = Estimate.of([3.0])
    assert (estimate.mean, estimate.std, estimate.half_width, estimate.n) == (3.0, None, None, 1)
    assert estimate.p == 1.0
    assert estimate.prediction(1, 0.01) is None


def test_differences_without_spread():
    assert Estimate.of([0.0, 0.0, 0.0]).p == 1.0
    assert Estimate.of([0.2, 0.2, 0.2]).std == 0.0  # 3e-17 by the sum of squares
    assert Estimate.of([0.1, 0.1, 0.1]).p == 0.0
    # 0.1 + 0.2 - 0.3 and its like: equal up to rounding
    assert Estimate.of([0.3 - 0.1, 0.2, 0.4 - 0.2]).p == 0.0


def test_a_score_that_is_not_finite_has_no_mean():
    assert math.isnan(Estimate.of([1.0, math.nan]).mean)


def test_holm_on_a_published_example():
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") of R: 0.03 0.06 0.06 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_holm_is_the_closure_of_bonferroni(k):
    """A hypothesis is rejected where every set of hypotheses that holds it is, by the smallest p times the size."""
    p = (torch.rand(k, generator=Key(k).generator(), dtype=torch.float64) / k).tolist()
    sets = [s for r in range(1, k + 1) for s in itertools.combinations(range(k), r)]
    closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(k)]  # fmt: skip
    assert holm(p) == pytest.approx(closed, rel=1e-12)


def test_holm_of_none():
    assert holm([]) == []


@pytest.mark.parametrize(("n", "further"), [(3, 1), (5, 1), (5, 3)])
def test_a_prediction_interval_holds_as_often_as_it_says(n, further):
    """Simulated: n known runs and further ones of the same law, 99 %."""
    rounds = 20_000
    x = torch.randn(rounds, n + further, generator=Key(n).generator(), dtype=torch.float64)
    scale = Estimate(0.0, 1.0, n).prediction(further, 0.01)
    apart = (x[:, n:].mean(1) - x[:, :n].mean(1)).abs()
    inside = (apart <= scale * x[:, :n].std(1)).double().mean()
    # four standard errors of a share of 0.99
    assert float(inside) == pytest.approx(0.99, abs=4 * math.sqrt(0.99 * 0.01 / rounds))
