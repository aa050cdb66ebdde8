"""Couplings against brute force, POT and the plans they say they draw from."""

import itertools
import math

import ot
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy.optimize import linear_sum_assignment

from fmlightning.flow.couplings import (
    C2OT,
    ClasswiseOT,
    Entropic,
    Independent,
    MinibatchOT,
    OTPlanWithReplacement,
    SchrodingerBridgeCoupling,
    SemidiscreteOT,
    UnbalancedOT,
    sinkhorn,
    squared_distances,
)
from fmlightning.flow.couplings.exact import WARM_START_SIZE, assignment, fastest
from fmlightning.flow.couplings.warm_start import warm_started
from fmlightning.flow.keys import Key
from fmlightning.flow.toys import EightGaussians, Moons

PLAIN_OT = [MinibatchOT(), OTPlanWithReplacement(), Entropic(), SchrodingerBridgeCoupling()]
ALL = [Independent(), *PLAIN_OT, UnbalancedOT(), SemidiscreteOT(), ClasswiseOT(), C2OT()]


def name(coupling):
    return type(coupling).__name__


def clouds(n, *shape, seed=0, dtype=torch.float32):
    g = Key(seed).generator()
    x0, x1 = torch.randn(2, n, *shape, generator=g, dtype=torch.float64)
    return x0.to(dtype), (x1 + 1).to(dtype)


def labels_for(coupling, n):
    return torch.arange(n) % 3 if isinstance(coupling, ClasswiseOT | C2OT) else None


def draw(coupling, x0, x1, seed=0):
    return coupling.pairs(x0, x1, labels_for(coupling, len(x1)), Key(seed).generator())


def cost_of(i, j, x0, x1):
    return (x0[i].double() - x1[j].double()).flatten(1).square().sum(1).mean()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", range(3))
def test_minibatch_ot_is_the_best_of_all_permutations(n, seed):
    x0, x1 = clouds(n, 2, seed=seed)
    best = min(
        cost_of(torch.tensor(p), torch.arange(n), x0, x1) for p in itertools.permutations(range(n))
    )
    assert cost_of(*draw(MinibatchOT(), x0, x1), x0, x1) == pytest.approx(float(best), rel=1e-12)


@pytest.mark.parametrize("shape", [(2,), (50,), (3, 8, 8)], ids=str)
def test_minibatch_ot_has_the_cost_that_pot_finds(shape):
    x0, x1 = clouds(128, *shape)
    weights = torch.full((128,), 1 / 128, dtype=torch.float64)
    truth = ot.emd2(weights, weights, ot.dist(x0.flatten(1).double(), x1.flatten(1).double()))
    # both are exact; they sum in another order
    assert cost_of(*draw(MinibatchOT(), x0, x1), x0, x1) == pytest.approx(float(truth), rel=1e-9)


def test_minibatch_ot_uses_every_point_once_and_keeps_the_data_in_order():
    i, j = draw(MinibatchOT(), *clouds(64, 2))
    assert i.sort().values.tolist() == j.tolist() == list(range(64))


def test_plan_with_replacement_draws_only_optimal_pairs():
    x0, x1 = clouds(64, 2)
    best = torch.stack(draw(MinibatchOT(), x0, x1), 1).tolist()
    drawn = torch.stack(draw(OTPlanWithReplacement(), x0, x1), 1).tolist()
    assert all(pair in best for pair in drawn)


def test_plan_with_replacement_leaves_a_share_of_1_over_e_unused():
    n = 2000
    i, j = draw(OTPlanWithReplacement(), *clouds(n, 2))
    # the number of empty cells of n balls in n cells has variance n (e - 2) / e^2, about n / 10
    tolerance = 4 * math.sqrt(0.1 / n)
    assert 1 - len(i.unique()) / n == pytest.approx(1 / math.e, abs=tolerance)
    assert 1 - len(j.unique()) / n == pytest.approx(1 / math.e, abs=tolerance)


@pytest.mark.parametrize("reg", [0.1, 1.0, 10.0])
def test_sinkhorn_plan_is_pots(reg):
    cost = squared_distances(*clouds(40, 3))
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    truth = ot.bregman.sinkhorn(
        weights, weights, cost, reg, method="sinkhorn_log", stopThr=1e-13, numItermax=100_000
    )
    plan = sinkhorn(cost, reg, tolerance=1e-12, max_iterations=100_000)
    # both marginals are met to 1e-12 and the plan is unique; entries are about 1/1600
    torch.testing.assert_close(plan, truth, rtol=0, atol=1e-11)


def test_sinkhorn_keeps_both_marginals():
    plan = sinkhorn(squared_distances(*clouds(40, 2)), 0.5, tolerance=1e-3, max_iterations=10_000)
    torch.testing.assert_close(plan.sum(0), torch.full_like(plan[0], 1 / 40), rtol=1e-12, atol=0)
    assert (plan.sum(1) - 1 / 40).abs().sum() <= 1e-3


def test_sinkhorn_that_does_not_converge_names_reg_and_the_costs():
    with pytest.raises(ValueError, match=r"reg=0\.001 .* costs from .* larger reg"):
        Entropic(reg=1e-3, max_iterations=5).pairs(*clouds(32, 2), None, Key(0).generator())


def frequencies(coupling, x0, x1, repeats):
    counts = torch.zeros(len(x0), len(x1), dtype=torch.float64)
    g = Key(1).generator()
    for _ in range(repeats):
        i, j = coupling.pairs(x0, x1, None, g)
        counts.index_put_((i, j), torch.ones(len(i), dtype=torch.float64), accumulate=True)
    return counts / repeats / len(x0)


@pytest.mark.parametrize(
    ("coupling", "reg"),
    [(Entropic(1.0), 1.0), (SchrodingerBridgeCoupling(0.7), 0.98)],
    ids=["Entropic", "SchrodingerBridge with weight 2 s^2"],
)
def test_entropic_pairs_follow_the_plan(coupling, reg):
    x0, x1 = clouds(5, 2)
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    cost = (x0[:, None] - x1).double().square().sum(-1)
    truth = ot.bregman.sinkhorn(weights, weights, cost, reg, method="sinkhorn_log")
    repeats = 3000
    # a cell's frequency is binomial: 4.5 standard errors for 25 cells, and the tolerance of Sinkhorn
    error = 4.5 * (truth * (0.2 - truth) / repeats).sqrt() + 1e-3
    assert ((frequencies(coupling, x0, x1, repeats) - truth).abs() <= error).all()


@pytest.mark.parametrize("coupling", PLAIN_OT, ids=name)
def test_both_marginals_are_kept_on_average(coupling):
    x0, x1 = clouds(5, 2)
    drawn = frequencies(coupling, x0, x1, 2000)
    error = 4.5 * math.sqrt(0.2 * 0.8 / 2000 / 5) + 1e-3  # n draws a repeat, each 1/n on a row
    assert ((drawn.sum(0) - 0.2).abs() <= error).all()
    assert ((drawn.sum(1) - 0.2).abs() <= error).all()


def test_little_entropy_is_optimal_transport_and_much_is_independent():
    x0, x1 = clouds(20, 2)
    i, _ = draw(Entropic(reg=1e-2, max_iterations=100_000), x0, x1)
    optimal, _ = draw(MinibatchOT(), x0, x1)
    # the plan still spreads over near ties
    assert (i == optimal).double().mean() > 0.8
    plan = sinkhorn(squared_distances(x0, x1), 1e6, 1e-9, 100)
    torch.testing.assert_close(plan, torch.full_like(plan, 1 / 400), rtol=1e-4, atol=0)


def test_classwise_ot_pairs_within_each_class_optimally():
    x0, x1 = clouds(18, 2)
    y = torch.arange(18) % 3
    i, j = ClasswiseOT().pairs(x0, x1, y, Key(0).generator())
    assert i.sort().values.tolist() == j.tolist() == list(range(18))
    for label in range(3):
        members = (y == label).nonzero().flatten()
        assert set(i[members].tolist()) == set(members.tolist())
        best = min(
            cost_of(members[list(p)], members, x0, x1) for p in itertools.permutations(range(6))
        )
        assert cost_of(i[members], members, x0, x1) == pytest.approx(float(best), rel=1e-12)


def test_classwise_ot_leaves_the_source_of_each_class_alone_where_plain_ot_skews_it():
    """Two classes on either side: plain OT gives each class the source points of its side."""
    n = 2000
    x0 = torch.randn(n, 2, generator=Key(0).generator())
    y = torch.arange(n) % 2
    x1 = torch.randn(n, 2, generator=Key(1).generator()) + torch.stack((10.0 * y, 0.0 * y), 1)
    right = (y == 1).nonzero().flatten()
    i, _ = ClasswiseOT().pairs(x0, x1, y, Key(2).generator())
    skewed, _ = MinibatchOT().pairs(x0, x1, None, Key(2).generator())
    assert x0[i[right], 0].mean().abs() < 4 / math.sqrt(n / 2)
    # the mean of the right half of a normal law is sqrt(2 / pi)
    assert x0[skewed[right], 0].mean() == pytest.approx(math.sqrt(2 / math.pi), abs=0.1)


@pytest.mark.parametrize("coupling", PLAIN_OT, ids=name)
def test_plain_ot_refuses_labels_with_the_reason_and_the_cure(coupling):
    with pytest.raises(ValueError, match=r"x0 would depend on the label.*ClasswiseOT"):
        coupling.pairs(*clouds(4, 2), torch.zeros(4, dtype=torch.long), Key(0).generator())


def test_classwise_ot_needs_labels():
    with pytest.raises(ValueError, match="needs labels"):
        ClasswiseOT().pairs(*clouds(4, 2), None, Key(0).generator())


@pytest.mark.parametrize("coupling", ALL, ids=name)
def test_pairs_depend_on_inputs_and_generator_only(coupling):
    x0, x1 = clouds(30, 2)
    torch.rand(3)
    state = torch.get_rng_state()
    first, second = draw(coupling, x0, x1, seed=5), draw(coupling, x0, x1, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("coupling", ALL, ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_images_and_low_precision_give_indices(coupling, dtype):
    x0, x1 = clouds(12, 3, 4, 4, dtype=dtype)
    i, j = draw(coupling, x0 / 4, x1 / 4)
    assert x0[i].shape == x1[j].shape == x1.shape
    assert i.dtype == j.dtype == torch.long


def test_image_pairs_are_those_of_the_flattened_images():
    x0, x1 = clouds(32, 3, 4, 4)
    flat = draw(MinibatchOT(), x0.flatten(1), x1.flatten(1))
    assert torch.equal(draw(MinibatchOT(), x0, x1)[0], flat[0])


@pytest.mark.parametrize("coupling", ALL, ids=name)
def test_only_the_independent_coupling_says_so(coupling):
    assert coupling.independent == isinstance(coupling, Independent)
    assert ClasswiseOT(within=Independent()).independent


@pytest.mark.parametrize("coupling", ALL, ids=name)
def test_only_a_fitted_coupling_has_a_potential(coupling):
    assert coupling.fitted == isinstance(coupling, SemidiscreteOT)
    if not coupling.fitted:
        x1, g = clouds(4, 2)[1], torch.zeros(4, dtype=torch.float64)
        with pytest.raises(ValueError, match=f"{name(coupling)} .* fits no potential"):
            coupling.fit(x1, Moons(), Key(0))
        with pytest.raises(ValueError, match=f"{name(coupling)} .* has no potential"):
            coupling.potential(x1, g)


def test_batches_that_do_not_match_and_broken_points_are_refused():
    x0, x1 = clouds(4, 2)
    # the shape check of the annotations, where it is switched on, comes first
    with pytest.raises((ValueError, TypeCheckError), match=r"4, ?2"):
        draw(MinibatchOT(), x0[:3], x1)
    with pytest.raises(ValueError, match="not finite"):
        draw(MinibatchOT(), x0 / 0, x1)


@pytest.mark.parametrize("make", [Entropic, SchrodingerBridgeCoupling])
def test_no_entropy_is_refused(make):
    with pytest.raises(ValueError, match="use MinibatchOT"):
        make(0.0)


@pytest.mark.parametrize(
    "coupling", [Independent(), ClasswiseOT()], ids=["independent", "classwise"]
)
def test_batches_of_two_sizes_are_refused_by_every_coupling(coupling):
    x = torch.zeros(6, 2)
    y = torch.zeros(6, dtype=torch.long)
    for x0, x1, labels in ((x[:4], x, y), (x, x[:4], y[:4]), (x, x, y[:3])):
        with pytest.raises((ValueError, TypeCheckError)):  # the annotations may come first
            coupling.pairs(x0, x1, labels, Key(0).generator())


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)], ids=str)
def test_both_solvers_find_the_same_permutation(shape):
    x0, x1 = clouds(300, *shape)
    i, _ = draw(MinibatchOT(method="assignment"), x0, x1)
    # optima of points at random are unique, and their differences far above rounding
    assert torch.equal(draw(MinibatchOT(method="simplex"), x0, x1)[0], i)
    assert torch.equal(draw(MinibatchOT(), x0, x1)[0], i)


def test_the_faster_solver_is_the_one_that_was_measured():
    assert fastest(4096, 2) == fastest(8192, 3) == "simplex"
    assert fastest(256, 2) == fastest(8192, 4) == "assignment"


def awkward_costs(n):
    """Problems that a solver may stumble over."""
    x0, x1 = clouds(n, 2, dtype=torch.float64)
    plain = squared_distances(x0, x1)
    far, few = x1.clone(), x1.round()
    far[:3] *= 1e6
    yield "plain", plain
    yield "outliers", squared_distances(x0, far)
    yield "tiny", plain * 1e-30
    yield "huge", plain * 1e30
    yield "beyond float32", plain * 1e40
    yield "many coincide", squared_distances(few.roll(7, 0), few)
    yield "all the same", torch.ones_like(plain)
    yield "negative", plain - 50
    classes = torch.arange(n) % 10
    yield "classes", plain + 1e3 * (classes[:, None] != classes.roll(1))


@pytest.mark.parametrize("n", [WARM_START_SIZE - 1, WARM_START_SIZE + 9])
def test_the_assignment_is_the_best_of_awkward_costs_too(n):
    for what, cost in awkward_costs(n):
        i = assignment(cost)
        assert i.sort().values.tolist() == list(range(n)), what
        # the costs as they are; POT takes differences below 1e-14 for none
        best = cost.numpy()[linear_sum_assignment(cost.numpy())].sum()
        # sums of 200 terms, each rounded to 1e-16 of the largest cost
        assert abs(cost[i, torch.arange(n)].sum() - best) < 1e-13 * cost.abs().max(), what


def test_prices_are_near_those_of_the_best_plan():
    """By the duality of linear programmes, sum_j v_j + sum_i min_j (C_ij - v_j) is at most the least cost for any v."""

    def dual(v):
        return (v.sum() + (cost - v).amin(1).sum()).item()

    x0, x1 = EightGaussians(), Moons()
    generator = Key(0).generator()
    cost = squared_distances(x0.sample((256, 2), generator), x1.sample((256, 2), generator))
    best = cost[assignment(cost), torch.arange(256)].sum().item()
    rows_then_columns = (cost - cost.amin(1, keepdim=True)).amin(0)
    v = (cost - warm_started(cost))[0]
    # four batches: 0.993 to 0.996 of the best, 0.75 to 0.84 without entropy, 0.60 to 0.68 for no prices at all
    assert dual(-v) < dual(torch.zeros_like(v)) < dual(rows_then_columns) < 0.9 * best
    assert 0.98 * best < dual(v) <= best * (1 + 1e-12)


def test_blocks_cost_more_than_the_whole_and_each_is_the_best_of_its_own():
    x0, x1 = clouds(60, 2)
    i, j = draw(MinibatchOT(ot_batch_size=25), x0, x1)
    assert j.tolist() == list(range(60))
    for block in torch.arange(60).split(25):
        best = draw(MinibatchOT(), x0[block], x1[block])[0]
        assert torch.equal(i[block], block[best])
    assert cost_of(i, j, x0, x1) > cost_of(*draw(MinibatchOT(), x0, x1), x0, x1)
    with pytest.raises(ValueError, match="ot_batch_size=0"):
        MinibatchOT(ot_batch_size=0)


def test_images_in_single_precision_cost_as_much_as_in_double():
    x0, x1 = clouds(64, 3, 32, 32)
    exact = squared_distances(x0.double(), x1.double())
    # products of 3,072 terms, each sum rounded to 6e-8 of about 6,000; distances of pairs differ by a hundred
    torch.testing.assert_close(squared_distances(x0, x1), exact, rtol=0, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(squared_distances(x0, x1), exact, rtol=0, atol=0.02)
    ours, truth = (draw(MinibatchOT(), a, b)[0] for a, b in ((x0, x1), (x0.double(), x1.double())))
    assert torch.equal(ours, truth)
