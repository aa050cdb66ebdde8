"""Couplings under conditions: against brute force, and the law of the source that each condition sees."""

import itertools
import math

import pytest
import torch

from fmlightning.flow.couplings import C2OT, ClasswiseOT, MinibatchOT, SemidiscreteOT
from fmlightning.flow.couplings.conditional import differences, weight_of_ratio
from fmlightning.flow.keys import Key

KEY = Key(0).fold("conditional")


def clouds(n, seed=0):
    g = KEY.fold(seed).generator()
    x0, x1 = torch.randn(2, n, 2, generator=g, dtype=torch.float64)
    return x0, x1 + 1, torch.randn(n, 3, generator=g, dtype=torch.float64)


def pairs(coupling, x0, x1, y):
    return coupling.pairs(x0, x1, y, KEY.generator())


def unlike(y, i, j, difference):
    """The cost of one pair of conditions, in plain Python."""
    if not y.is_floating_point():
        return float(y[i] != y[j])
    a, b = y[i].tolist(), y[j].tolist()
    if difference == "squared":
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
    return 1 - sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


@pytest.mark.parametrize("kind", ["classes", "squared", "cosine"])
@pytest.mark.parametrize("w", [0.5, 5.0])
def test_c2ot_is_the_best_of_all_permutations_at_the_price_of_conditions(kind, w):
    n = 6
    x0, x1, numbers = clouds(n)
    y = torch.arange(n) % 2 if kind == "classes" else numbers
    difference = "cosine" if kind == "cosine" else "squared"

    def cost(p):
        return sum(
            float((x0[p[j]] - x1[j]).square().sum()) + w * unlike(y, p[j], j, difference)
            for j in range(n)
        )

    i, j = pairs(C2OT(weight=w, difference=difference), x0, x1, y)
    assert j.tolist() == list(range(n))
    best = min(map(cost, itertools.permutations(range(n))))
    assert cost(i.tolist()) == pytest.approx(best, rel=1e-12)


def test_a_large_weight_never_exchanges_classes_and_a_small_one_is_plain_transport():
    n = 60
    x0, x1, _ = clouds(n)
    y = torch.arange(n) % 3
    i, j = pairs(C2OT(weight=1e6), x0, x1, y)
    within, data = pairs(ClasswiseOT(), x0, x1, y)
    assert torch.equal(i, within[data.argsort()])
    assert torch.equal(j, data.sort().values)
    assert torch.equal(
        pairs(C2OT(weight=1e-9), x0, x1, y)[0], pairs(MinibatchOT(), x0, x1, None)[0]
    )


def test_a_large_weight_leaves_numbers_where_chance_put_them():
    x0, x1, y = clouds(40)
    assert pairs(C2OT(weight=1e9), x0, x1, y)[0].tolist() == list(range(40))


@pytest.mark.parametrize("ratio", [0.4, 0.1, 0.05, 0.02])
@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_the_weight_meets_its_ratio(ratio, kind):
    n = 100
    x0, x1, numbers = clouds(n)
    y = torch.arange(n) % 100 if kind == "classes" else numbers
    cost = (x0[:, None] - x1).square().sum(-1)
    difference = differences(y, "squared")
    w = weight_of_ratio(cost, difference, ratio)
    cheaper = (cost + w * difference <= cost.diagonal()[:, None]).double().mean()
    # classes that all differ have one price, numbers each their own: no ties either way, so it is met to one pair
    assert float(cheaper) == pytest.approx(ratio, abs=1.5 / n**2)


def test_no_weight_is_needed_where_few_pairs_are_cheaper():
    x0, x1, y = clouds(30)
    cost = (x0[:, None] - x1).square().sum(-1)
    assert weight_of_ratio(cost, differences(y, "squared"), 0.99) == 0


def test_equal_classes_alone_may_be_more_than_the_ratio():
    """Then no weight brings fewer, and the one that is found forbids all exchange."""
    n = 40
    x0, x1, _ = clouds(n)
    y = torch.arange(n) % 2
    assert torch.equal(pairs(C2OT(ratio=0.01), x0, x1, y)[0], pairs(C2OT(weight=1e6), x0, x1, y)[0])


def two_sides(n):
    """Two classes on either side, from one source."""
    x0 = torch.randn(n, 2, generator=KEY.fold("x0").generator())
    y = torch.arange(n) % 2
    x1 = torch.randn(n, 2, generator=KEY.fold("x1").generator()) + torch.stack((10.0 * y, 0 * y), 1)
    return x0, x1, y


def test_a_finite_weight_lets_classes_exchange_source_points():
    """What the class says: the smaller the weight, the more one class sees of its side alone."""
    n = 1000
    x0, x1, y = two_sides(n)

    def mean(w):
        return float(x0[pairs(C2OT(weight=w), x0, x1, y)[0]][y == 1, 0].mean())

    assert abs(mean(1e6)) < 4 / math.sqrt(n / 2)
    # the mean of the right half of a normal law is sqrt(2 / pi)
    assert mean(0.01) == pytest.approx(math.sqrt(2 / math.pi), abs=0.1)
    assert mean(0.01) > mean(10.0) > mean(1e6)
    assert not C2OT(weight=1e6).independent


BLOCKS = [C2OT(weight=3.0, ot_batch_size=8), ClasswiseOT(ot_batch_size=8)]


@pytest.mark.parametrize("coupling", BLOCKS, ids=["C2OT", "ClasswiseOT"])
def test_blocks_are_paired_on_their_own(coupling):
    x0, x1, _ = clouds(20)
    y = torch.arange(20) % 2
    whole = pairs(coupling, x0, x1, y)
    for block in torch.arange(20).split(8):
        part = pairs(coupling, x0[block], x1[block], y[block])
        for k in range(2):
            assert torch.equal(whole[k][block], block[part[k]])


def test_what_cannot_be_paired_is_refused():
    x0, x1, y = clouds(4)
    for coupling in (C2OT(), ClasswiseOT()):
        with pytest.raises(ValueError, match="needs labels"):
            pairs(coupling, x0, x1, None)
    with pytest.raises(ValueError, match="no classes: use C2OT"):
        pairs(ClasswiseOT(), x0, x1, y)
    with pytest.raises(ValueError, match="has no direction; use difference=squared"):
        pairs(C2OT(difference="cosine"), x0, x1, torch.zeros(4, 1))
    with pytest.raises(ValueError, match="not of a class; use within=MinibatchOT"):
        ClasswiseOT(within=SemidiscreteOT())
    for wrong in ({"weight": 0.0}, {"weight": math.inf}, {"ratio": 1.0}, {"ot_batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            C2OT(**wrong)
