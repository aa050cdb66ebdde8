"""Unbalanced transport against POT, and an outlier that it leaves out."""

import math

import ot
import pytest
import torch

from fmlightning.flow.couplings import ClasswiseOT, MinibatchOT, UnbalancedOT
from fmlightning.flow.couplings.unbalanced import unbalanced
from fmlightning.flow.keys import Key

KEY = Key(0).fold("unbalanced")


def clouds(n, outlier=None):
    g = KEY.generator()
    x0, x1 = torch.randn(2, n, 2, generator=g, dtype=torch.float64)
    if outlier is not None:
        x1[0] = torch.tensor([outlier, 0.0])
    return x0, x1


@pytest.mark.parametrize(("reg", "mass"), [(0.5, 1.0), (1.0, 10.0), (0.3, 30.0)])
def test_plan_is_pots(reg, mass):
    x0, x1 = clouds(30, outlier=5.0)
    cost = (x0[:, None] - x1).square().sum(-1)
    uniform = torch.full((30,), 1 / 30, dtype=torch.float64)
    truth = ot.unbalanced.sinkhorn_unbalanced(
        uniform, uniform, cost, reg, (math.inf, mass), reg_type="kl", numItermax=100_000, stopThr=1e-14,
    )  # fmt: skip
    plan = unbalanced(cost, reg, mass, tolerance=1e-12, max_iterations=100_000)
    # the plan is unique; entries are about 1/900, and both stop at about 1e-12 of them
    torch.testing.assert_close(plan, truth, rtol=0, atol=1e-11)


def test_the_source_keeps_its_law_and_an_outlier_gets_almost_nothing():
    n = 64
    x0, x1 = clouds(n, outlier=30.0)
    plan = unbalanced((x0[:, None] - x1).square().sum(-1), 0.5, 5.0, 1e-6, 10_000)
    torch.testing.assert_close(plan.sum(1), torch.full_like(plan[0], 1 / n), rtol=1e-12, atol=0)
    # about 700 in squared units away, at a price of 5 each: exp(-140) of its 1/n
    assert plan.sum(0)[0] < 1e-30
    # what it leaves, the others share
    assert plan.sum(0)[1:].sum() == pytest.approx(1, abs=1e-12)


def test_an_outlier_is_never_drawn_where_optimal_transport_always_draws_it():
    x0, x1 = clouds(64, outlier=30.0)
    drawn, always = 0, 0
    for seed in range(50):
        i, j = UnbalancedOT().pairs(x0, x1, None, Key(seed).generator())
        assert i.tolist() == list(range(64))
        drawn += int((j == 0).sum())
        always += int((MinibatchOT().pairs(x0, x1, None, Key(seed).generator())[1] == 0).sum())
    assert (drawn, always) == (0, 50)


def test_a_high_price_is_balanced():
    x0, x1 = clouds(20)
    cost = (x0[:, None] - x1).square().sum(-1)
    plan = unbalanced(cost, 1.0, 1e6, 1e-9, 100_000)
    # masses are off by exp(-g / mass), and g is of the order of the costs, ten
    torch.testing.assert_close(plan.sum(0), torch.full_like(plan[0], 1 / 20), rtol=1e-4, atol=0)


def test_draws_follow_the_plan():
    x0, x1 = clouds(5, outlier=3.0)
    plan = unbalanced((x0[:, None] - x1).square().sum(-1), 1.0, 10.0, 1e-9, 10_000)
    counts, repeats, g = torch.zeros(5, 5, dtype=torch.float64), 3000, Key(1).generator()
    for _ in range(repeats):
        i, j = UnbalancedOT().pairs(x0, x1, None, g)
        counts[i, j] += 1
    # binomial, 4.5 standard errors for 25 cells, and the tolerance of 1e-3 of a cell's fifth
    error = 4.5 * (plan * (0.2 - plan) / repeats / 5).sqrt() + 1e-3
    assert ((counts / repeats / 5 - plan).abs() <= error).all()


def test_what_cannot_be_is_refused():
    x0, x1 = clouds(16)
    with pytest.raises(ValueError, match=r"x0 would depend on the label.*within=UnbalancedOT"):
        UnbalancedOT().pairs(x0, x1, torch.zeros(16, dtype=torch.long), KEY.generator())
    ClasswiseOT(within=UnbalancedOT()).pairs(x0, x1, torch.arange(16) % 2, KEY.generator())
    with pytest.raises(ValueError, match=r"mass=5 and reg=0\.001 still changes by .* larger reg"):
        UnbalancedOT(mass=5.0, reg=1e-3, max_iterations=3).pairs(x0, x1, None, KEY.generator())
    for wrong in ({"mass": 0.0}, {"reg": 0.0}, {"tolerance": 0.0}, {"max_iterations": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0"):
            UnbalancedOT(**wrong)
    assert not UnbalancedOT().independent
