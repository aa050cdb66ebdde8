"""What is said of ratios: intervals, verdicts, equal work, power laws."""

import math

import pytest
import torch
from powers import exponent, grown, words
from ratios import (
    Interval,
    interval,
    require_equal_losses,
    require_equal_work,
    row,
    verdict,
)

from fmlightning.flow.keys import Key


def ratios(n, spread, seed=0):
    return (spread * torch.randn(n, generator=Key(seed).generator())).exp().tolist()


@pytest.mark.parametrize("n", [6, 7, 9, 15, 25, 40])
def test_the_interval_is_the_narrowest_that_encloses_the_median_often_enough(n):
    low, high = interval(ratios(n, 0.2))[1:]
    ordered = sorted(ratios(n, 0.2))
    k = ordered.index(low) + 1
    assert ordered.index(high) + 1 == n + 1 - k

    def coverage(k):
        """Of r_(k) to r_(n+1-k): neither fewer than k values below the median nor fewer than k above it."""
        return 1 - 2 * sum(math.comb(n, j) for j in range(k)) / 2**n

    assert coverage(k) >= 0.95 > coverage(k + 1)


def test_a_few_pairs_are_all_of_the_interval():
    assert interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


@pytest.mark.parametrize("n", [7, 15])
def test_the_interval_covers_the_median_as_often_as_it_says(n):
    covered = sum(
        low <= 1 <= high for _, low, high in (interval(ratios(n, 0.3, k)) for k in range(1000))
    )
    assert covered / 1000 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 1000)  # four standard errors


@pytest.mark.parametrize(
    ("low", "high", "bar", "expected"),
    [
        (1.0, 1.2, {"at_least": 1.0}, "met"),
        (0.9, 1.2, {"at_least": 1.0}, "not resolved"),
        (0.8, 0.99, {"at_least": 1.0}, "missed"),
        (0.7, 1.0, {"at_most": 1.0}, "met"),
        (0.7, 1.1, {"at_most": 1.0}, "not resolved"),
        (1.01, 1.1, {"at_most": 1.0}, "missed"),
        (0.5, 0.6, {}, ""),
    ],
)
def test_a_bar_is_met_when_the_interval_excludes_failure(low, high, bar, expected):
    ratio = Interval((low + high) / 2, low, high)
    assert verdict(ratio, 6, **bar) == expected
    assert verdict(ratio, 5, **bar) == ("not resolved" if bar else "")


def test_a_ratio_of_seconds_is_a_speed_and_one_of_amounts_is_not():
    pairs = [(1.0, 2.0), (1.5, 3.0), (2.0, 4.0)] * 2
    fast = row("a", "b", pairs, at_least=1.5)
    assert (fast["ratio"], fast["low"], fast["high"]) == (2, 2, 2)
    assert (fast["bar"], fast["verdict"], fast["pairs"]) == (">= 1.5", "met", 6)
    small = row("a", "b", pairs, quantity="memory", at_most=0.4)
    assert (small["ratio"], small["verdict"]) == (0.5, "missed")
    assert row("a", "b", pairs)["bar"] is None
    assert row("a", "b", pairs, steps=7)["steps"] == 7


def test_the_ratio_is_taken_in_each_pair():
    """A machine that slows down tenfold half way leaves the ratio alone."""
    pairs = [(1.0, 1.5)] * 4 + [(10.0, 15.0)] * 4
    assert row("a", "b", pairs)["ratio"] == 1.5


WORK = {"steps": 100, "parameters": 2_245_763, "dropout": 0.1}


@pytest.mark.parametrize(
    "other",
    [
        {**WORK, "steps": 99},
        {**WORK, "dropout": 0.0},
        {**WORK, "rows": 2},
        {"steps": 100, "parameters": 2_245_763},
        {**WORK, "parameters": None},
        {**WORK, "steps": float("nan")},
    ],
    ids=str,
)
def test_unequal_work_is_refused(other):
    require_equal_work(WORK, dict(WORK))
    for a, b in ((WORK, other), (other, WORK)):
        with pytest.raises(ValueError, match=r"unequal work: (steps|dropout|rows|parameters) is"):
            require_equal_work(a, b)


def test_work_may_differ_by_a_stated_share():
    require_equal_work({"cost": 1.0001}, {"cost": 1.0}, rtol=1e-3)
    with pytest.raises(ValueError, match=r"cost is 1\.01"):
        require_equal_work({"cost": 1.01}, {"cost": 1.0}, rtol=1e-3)
    with pytest.raises(ValueError, match="method"):
        require_equal_work({"method": "a"}, {"method": "b"}, rtol=1.0)


def test_losses_may_differ_as_seeds_do():
    require_equal_losses([1.0, 1.2, 0.8], [1.1, 1.3, 0.9])
    with pytest.raises(ValueError, match="differ by more than seeds do"):
        require_equal_losses([1.0, 1.02, 0.98], [1.5, 1.52, 1.48])
    with pytest.raises(ValueError, match="differ by more"):
        require_equal_losses([math.nan], [1.0])


def test_a_power_law_has_its_exponent():
    sizes = [10.0, 20.0, 40.0, 80.0]
    assert exponent(sizes, [3 * n**1.7 for n in sizes]) == pytest.approx((1.7, 1.7, 1.7))
    found = grown("a", "n", {2: [4.0, 4.0], 4: [16.0, 16.0]})
    assert found["exponent"] == pytest.approx(2)
    assert found["ms"] == {2: 4000.0, 4: 16000.0}
    assert words(found) == "a: seconds ~ n^2.00 [2.00, 2.00]"


def test_its_interval_covers_the_truth_as_often_as_it_says():
    sizes, covered = [2.0**k for k in range(6)] * 2, 0
    for seed in range(300):
        noise = ratios(len(sizes), 0.3, seed)
        times = [n**1.5 * e for n, e in zip(sizes, noise, strict=True)]
        _, low, high = exponent(sizes, times)
        covered += low <= 1.5 <= high
    # exact for normal noise; four standard errors of 95 % of 300
    assert abs(covered / 300 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 300)
