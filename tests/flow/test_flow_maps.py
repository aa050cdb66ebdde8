"""Flow maps against the exact map of a mixture: identities, planted bugs, stopped gradients, jumps."""

import copy
import math

import pytest
import torch

from fmlightning.flow.couplings.coupling import Independent
from fmlightning.flow.flow_maps import AverageVelocity, FlowMapField, takes_two_times
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
from fmlightning.flow.objectives.alpha_flow import AlphaFlow
from fmlightning.flow.objectives.cfm import CFM
from fmlightning.flow.objectives.eulerian import ESD
from fmlightning.flow.objectives.flow_map import AdaptiveWeight, Pair, parts
from fmlightning.flow.objectives.lagrangian import LSD
from fmlightning.flow.objectives.mean_flow import MeanFlow
from fmlightning.flow.objectives.objective import Draw, Nets, Recipe
from fmlightning.flow.objectives.progressive import PSD
from fmlightning.flow.objectives.time_pairs import DyadicPairs, SortedPairs, ToTheEnd
from fmlightning.flow.objectives.time_samplers import LogitNormal, Uniform
from fmlightning.flow.paths.schedules import (
    IndependentCFM,
    Linear,
    Trigonometric,
    VariancePreserving,
)
from fmlightning.flow.solvers.jumps import Jumps
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import generate
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.flow_map import AverageOracle, ExactFlowMap, MixtureFlowMap
from fmlightning.flow.theory.mixture import GaussianMixture
from fmlightning.nets.dit import DiT, Size
from fmlightning.nets.mlp import TimeMLP
from fmlightning.nets.unet import UNet

MIXTURE = GaussianMixture([0.3, 0.3, 0.4], [[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], [0.4, 0.5, 0.3])
PATHS = (Linear(), Trigonometric(), VariancePreserving())
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
N = 64


def pair_on(path, n=N):
    """Points of the path at s with the marginal velocity, and times t behind s."""
    generator = Key(0).fold("pair").generator()
    x0 = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x1 = MIXTURE.sample((n, 2), generator, torch.float64)
    s, h, g = torch.rand(3, n, generator=generator, dtype=torch.float64)
    s = 0.05 + s / 2
    x = path.sample(x0, x1, s).xt
    return Pair(x, MIXTURE.along(path).velocity(x, s), s, s + 0.4 * h, g)


class Wrong(AverageVelocity):
    """A bug: what the derivative along the path is multiplied with, and the tangents it is taken along."""

    def __init__(self, inner, sign=1.0, x=1.0, s=1.0, t=0.0):
        super().__init__(inner.network, inner.path)
        object.__setattr__(self, "bug", (sign, x, s, t))

    def along(self, point, tangents):
        sign, x, s, t = self.bug
        w, one, _ = tangents
        value, found = super().along(point, (x * w, s * one, t * one))
        return value, sign * found


def root_mean_square(loss):
    return float(loss.detach().mean().sqrt())


EXACT = {
    "MeanFlow": MeanFlow(),
    "MeanFlow of its own tangent": MeanFlow(tangent="network"),
    "MeanFlow between": MeanFlow(tangent=0.3),
    "LSD": LSD(),
    "ESD": ESD(),
    "PSD": PSD(),
    "PSD, uneven": PSD(split=0.2),
    "PSD, drawn": PSD(split=None),
}


@every_path
@pytest.mark.parametrize("objective", EXACT.values(), ids=EXACT)
def test_the_exact_map_of_the_marginal_velocity_has_no_loss(path, objective):
    """16 Runge-Kutta steps leave 1e-5; each bug below leaves 0.05 and more."""
    if path != Linear() and objective not in (LSD(), MeanFlow()):
        pytest.skip("the others are held on one path")
    u = AverageVelocity(AverageOracle(MIXTURE.along(path), 16), path)
    assert root_mean_square(objective.off(u, pair_on(path, 32))) < 1e-4


BUGS = {
    "sign of the derivative": {"sign": -1.0},
    "no tangent in time": {"s": 0.0},
    "a tangent in the other time": {"t": 1.0},
    "the other time alone": {"s": 0.0, "t": 1.0},
    "no tangent in space": {"x": 0.0},
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
@pytest.mark.parametrize("objective", [MeanFlow(), ESD()], ids=["MeanFlow", "ESD"])
def test_a_bug_in_the_derivative_is_far_above_the_floor(objective, bug):
    u = AverageVelocity(AverageOracle(MIXTURE.along(Linear()), 16), Linear())
    assert root_mean_square(objective.off(Wrong(u, **bug), pair_on(Linear(), 32))) > 0.05


def test_bugs_in_the_other_identities_are_far_above_the_floor():
    u, pair = AverageVelocity(AverageOracle(MIXTURE.along(Linear())), Linear()), pair_on(Linear())
    x, _, s, t, _ = pair
    average, d_t = u.along(
        (x, s, t), (torch.zeros_like(x), torch.zeros_like(s), torch.ones_like(t))
    )
    for teacher in (u(x, t), u(x + pair.h * average, s)):  # at the start, or of another time
        assert float((average + pair.h * d_t - teacher).square().mean().sqrt()) > 0.1
    m, g = s + 0.2 * (t - s), 0.2
    first, second = u(x, s, m), u(x + g * pair.h * u(x, s, m), m, t)
    assert float((average - (0.8 * first + 0.2 * second)).abs().max()) > 0.02  # weights swapped
    assert float((average - (0.2 * first + 0.8 * u(x, m, t))).abs().max()) > 0.02  # from the start


def test_alpha_flow_goes_from_flow_matching_to_mean_flow():
    """The gradient of the scaled loss tends to that of MeanFlow, with an error of the order of alpha."""
    torch.manual_seed(0)
    net, pair = wild(TimeMLP(2, 16, 2, two_times=True)), pair_on(Linear())
    u = AverageVelocity(net, Linear())

    def gradient(objective):
        return torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(objective.off(u, pair).mean(), list(net.parameters()))
            ]
        )

    limit = gradient(MeanFlow())
    apart = [
        float((gradient(AlphaFlow(alpha=a)) - limit).norm() / limit.norm()) for a in (0.02, 0.01)
    ]
    assert apart[1] < 0.1
    assert apart[1] / apart[0] == pytest.approx(0.5, abs=0.1)
    # alpha = 1 is the regression on the conditional velocity
    regression = (u(pair.x, pair.s, pair.t) - pair.v).square().mean(1)
    torch.testing.assert_close(AlphaFlow(alpha=1.0).off(u, pair), regression)


@every_path
def test_the_map_of_one_gaussian_and_of_the_line_have_closed_forms(path):
    pair = pair_on(path)
    one = ExactFlowMap(GaussianMixture([1.0], [[1.0, -1.0]], 0.5).along(path))
    expected = one.of_one_gaussian(pair.x, pair.s, pair.t)
    torch.testing.assert_close(one.jump(pair.x, pair.s, pair.t), expected, rtol=0, atol=1e-7)
    line = ExactFlowMap(GaussianMixture([0.4, 0.6], [[-1.0], [1.2]], [0.3, 0.6]).along(path))
    x = pair.x[:, :1]
    expected = line.by_quantiles(x, pair.s, pair.t)
    torch.testing.assert_close(line.jump(x, pair.s, pair.t), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one dimension"):
        one.by_quantiles(pair.x, pair.s, pair.t)
    with pytest.raises(ValueError, match="one Gaussian"):
        line.of_one_gaussian(x, pair.s, pair.t)


def test_runge_kutta_is_of_fourth_order_and_the_diagonal_is_the_velocity():
    law, pair = MIXTURE.along(Linear()), pair_on(Linear())
    fine = ExactFlowMap(law, 256).jump(pair.x, pair.s, pair.t)
    errors = [
        float((ExactFlowMap(law, n).jump(pair.x, pair.s, pair.t) - fine).abs().max())
        for n in (8, 16)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.7)
    u = AverageVelocity(AverageOracle(law), Linear())
    value, derivative = u.along(
        (pair.x, pair.s, pair.s.clone()),
        (pair.v, torch.ones_like(pair.s), torch.zeros_like(pair.s)),
    )
    torch.testing.assert_close(value, pair.v, rtol=1e-12, atol=1e-12)
    assert derivative.isfinite().all()


# -- networks ---------------------------------------------------------------------------------------


def wild(net):
    """With weights of no special kind, in float64."""
    generator = Key(1).generator()
    for p in net.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float32)
    return net.double().eval()


NETS = {
    "MLP": (lambda two: TimeMLP(2, 16, 2, num_classes=3, two_times=two), (2,)),
    "UNet": (
        lambda two: UNet(
            1, 8, (1, 2), 1, (1,), 8, num_classes=3, frequencies=(1.0, 30.0), two_times=two
        ),
        (1, 4, 4),
    ),
    "DiT": (
        lambda two: DiT(
            Size(16, 2, 2, 2), 1, num_classes=3, frequencies=(1.0, 30.0), two_times=two
        ),
        (1, 4, 4),
    ),
}
every_net = pytest.mark.parametrize(("make", "shape"), NETS.values(), ids=NETS)


@every_net
def test_a_second_time_leaves_the_first_weights_and_the_velocity_as_they_are(make, shape):
    torch.manual_seed(3)
    one = make(False)
    torch.manual_seed(3)
    two = make(True)
    assert not takes_two_times(one)
    assert takes_two_times(two)
    own = {k: v for k, v in two.state_dict().items() if not k.startswith("duration")}
    assert own.keys() == one.state_dict().keys()
    assert all(torch.equal(own[k], v) for k, v in one.state_dict().items())
    generator = Key(2).generator()
    for p in one.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
    two.load_state_dict(one.state_dict(), strict=False)
    x, t = torch.randn(5, *shape, generator=generator), torch.linspace(0, 1, 5)
    y = torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(two(x, t, y), one(x, t, y))
    assert torch.equal(two(x, t, y, to=t), one(x, t, y))
    assert torch.equal(
        two(x, t, y, to=t.flip(0)), one(x, t, y)
    )  # untrained, it knows of no other time
    with pytest.raises(ValueError, match="two_times=true"):
        one(x, t, y, to=t)


@every_net
def test_the_derivative_is_that_of_finite_differences(make, shape):
    net, generator = wild(make(True)), Key(4).generator()
    x, w = torch.randn(2, 4, *shape, generator=generator, dtype=torch.float64)
    s, t = torch.full((4,), 0.3, dtype=torch.float64), torch.full((4,), 0.8, dtype=torch.float64)
    u = AverageVelocity(net, Linear(), y=torch.tensor([0, 1, 2, 3]))
    _, found = u.along((x, s, t), (w, torch.ones_like(s), torch.zeros_like(t)))
    h = 1e-5
    expected = (u(x + h * w, s + h, t) - u(x - h * w, s - h, t)) / (2 * h)
    # the error of central differences in float64 is 1e-10, over the size of third derivatives
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float(expected.norm()) > 1e-3


# -- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [MeanFlow(), MeanFlow(tangent="network"), PSD(), AlphaFlow()], ids=str
)
def test_the_gradient_is_that_of_a_constant_target(objective):
    net, pair = wild(TimeMLP(2, 16, 2, two_times=True)), pair_on(Linear())
    u, parameters = AverageVelocity(net, Linear()), list(net.parameters())
    found = torch.autograd.grad(objective.off(u, pair).mean(), parameters)
    constant = objective.target(AverageVelocity(copy.deepcopy(net), Linear()), pair).detach()
    scale = objective.alpha if isinstance(objective, AlphaFlow) else 1.0
    error = (u(pair.x, pair.s, pair.t) - constant).square().flatten(1).mean(1) / scale
    expected = torch.autograd.grad(error.mean(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("objective", [LSD(), ESD()], ids=str)
def test_no_gradient_reaches_the_teacher(objective):
    """The velocity of a copy in its place gives the same gradient, and the copy gets none."""
    net, pair = wild(TimeMLP(2, 16, 2, two_times=True)), pair_on(Linear())
    other = copy.deepcopy(net)

    class Apart(AverageVelocity):
        def __call__(self, x, s, t=None):
            return AverageVelocity(net if t is not None else other, Linear())(x, s, t)

        def along(self, point, tangents):
            return AverageVelocity(net, Linear()).along(point, tangents)

    parameters = list(net.parameters())
    found = torch.autograd.grad(
        objective.off(AverageVelocity(net, Linear()), pair).mean(), parameters
    )
    loss = objective.off(Apart(net, Linear()), pair).mean()
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(
        g is None for g in torch.autograd.grad(loss, list(other.parameters()), allow_unused=True)
    )


def draw_of(n=12, first=0):
    generator = Key(5).generator()
    x0, x1 = torch.randn(2, 24, 2, generator=generator, dtype=torch.float64)
    times = torch.rand(24, 4, generator=generator, dtype=torch.float64)
    rows = slice(first, first + n)
    return Draw(x0[rows], x1[rows], times[rows], first=first)


def recipe_of(objective):
    return Recipe(Linear(), Gaussian(), Independent(), Uniform(), objective)


def test_all_on_the_diagonal_is_flow_matching():
    net = wild(TimeMLP(2, 16, 2, two_times=True))
    whole, cfm = LSD(diagonal=1.0), CFM()
    parameters = list(net.parameters())
    losses = [o.mean(Nets(net), recipe_of(o), draw_of()) for o in (whole, cfm)]
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
    for a, b in zip(*(torch.autograd.grad(each, parameters) for each in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_rows_are_shared_out_alike_on_any_number_of_processes(share):
    whole = parts(0, 24, share, torch.device("cpu"))
    halves = [parts(first, 12, share, torch.device("cpu")) for first in (0, 12)]
    for k in (0, 1):
        assert whole[k].tolist() == halves[0][k].tolist() + [n + 12 for n in halves[1][k].tolist()]
    assert len(whole[0]) == pytest.approx(24 * share, abs=1)
    assert sorted([*whole[0].tolist(), *whole[1].tolist()]) == list(range(24))


@pytest.mark.parametrize(
    "objective", [LSD(), MeanFlow(adaptive=AdaptiveWeight()), PSD(split=None)], ids=str
)
def test_two_processes_have_the_loss_of_one(objective):
    net = wild(TimeMLP(2, 16, 2, two_times=True))
    whole = objective.mean(Nets(net), recipe_of(objective), draw_of(24))
    halves = [
        objective.mean(Nets(net), recipe_of(objective), draw_of(12, first)) for first in (0, 12)
    ]
    torch.testing.assert_close(whole, sum(halves) / 2, rtol=1e-12, atol=0)


def test_the_adaptive_weight_is_the_published_one_and_a_constant():
    loss = torch.tensor([0.5, 2.0], requires_grad=True)
    weighted = AdaptiveWeight(p=0.5, c=0.1)(loss, 3)
    torch.testing.assert_close(weighted, loss / (3 * loss.detach() + 0.1) ** 0.5)
    (gradient,) = torch.autograd.grad(weighted.sum(), loss)
    torch.testing.assert_close(gradient, (3 * loss.detach() + 0.1) ** -0.5)


@pytest.mark.parametrize(
    "pairs", [SortedPairs(), SortedPairs(LogitNormal()), DyadicPairs(3), ToTheEnd()], ids=str
)
def test_pairs_are_in_order_and_on_the_interval(pairs):
    u, v = torch.rand(2, 2000, generator=Key(6).generator())
    s, t = pairs.draw(u, v, (0.1, 0.9))
    assert (s <= t).all()
    assert s.min() >= 0.1 - 1e-6
    assert t.max() <= 0.9 + 1e-6
    if isinstance(pairs, DyadicPairs):
        steps = ((t - s) / 0.8).unique()
        torch.testing.assert_close(steps.sort().values.unique(), steps)
        assert {round(float(x), 5) for x in steps} == {0.25, 0.5, 1.0}
    if pairs == SortedPairs():  # the triangle: E (t - s) = 1/3 of the interval; 4 standard errors
        assert float((t - s).mean()) == pytest.approx(0.8 / 3, abs=4 * 0.8 * 0.236 / 2000**0.5)


# -- sampling ---------------------------------------------------------------------------------------


def test_one_jump_of_the_exact_map_is_the_whole_flow():
    field, x0 = (
        MixtureFlowMap(MIXTURE.along(Linear())),
        torch.randn(32, 2, generator=Key(7).generator(), dtype=torch.float64),
    )
    reference = generate(field, x0, ODESolver("dopri5", rtol=1e-9, atol=1e-9)).x
    for steps in (1, 2, 4):
        solution = generate(field, x0, Jumps(steps), save_at=3)
        torch.testing.assert_close(solution.x, reference, rtol=0, atol=1e-5)
        assert solution.nfe == steps == Jumps(steps).evaluations
        torch.testing.assert_close(solution.states[0], x0)
        torch.testing.assert_close(solution.states[-1], solution.x)
    # between two jumps a state is on the line between them
    whole = generate(field, x0, Jumps(1), save_at=[0.25]).states[0]
    torch.testing.assert_close(whole, torch.lerp(x0, generate(field, x0, Jumps(1)).x, 0.25))
    assert Jumps(2).refined() == Jumps(4)


def test_noise_between_jumps_keeps_the_law_and_is_keyed():
    field, index = MixtureFlowMap(MIXTURE.along(Linear()), steps=16), torch.arange(1500)
    x0 = torch.randn(1500, 2, generator=Key(8).generator(), dtype=torch.float64)
    solver, streams = Jumps(3, renoise=True), Key(9).streams(index)
    solution = generate(field, x0, solver, streams=streams)
    assert solution.nfe == 3
    weights = MIXTURE.weights.double()
    mean = (weights[:, None] * MIXTURE.means.double()).sum(0)
    # 4 standard errors of a mean with a deviation of about 1.2
    torch.testing.assert_close(solution.x.mean(0), mean, rtol=0, atol=4 * 1.2 / 1500**0.5)
    part = generate(field, x0[7:9], solver, streams=Key(9).streams(index[7:9]))
    torch.testing.assert_close(part.x, solution.x[7:9])
    with pytest.raises(ValueError, match="pass streams"):
        generate(field, x0, solver)


def test_what_offers_no_jump_is_refused():
    x0 = torch.zeros(2, 2)
    one = NetworkField(TimeMLP(2, 8, 1), Linear())
    with pytest.raises(ValueError, match="Jumps needs a model that offers jump"):
        generate(one, x0, Jumps())
    labelled = FlowMapField(TimeMLP(2, 8, 1, num_classes=2, two_times=True), Linear())
    with pytest.raises(ValueError, match="offers jump"):
        generate(Guidance(2.0).cfg(labelled, 2), x0, Jumps(), y=torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Jumps(0), "num_steps=0"),
        (lambda: LSD(diagonal=1.5), "diagonal=1.5"),
        (lambda: MeanFlow(tangent="marginal"), "marginal"),
        (lambda: PSD(split=1.0), "split=1.0"),
        (lambda: AlphaFlow(alpha=0.0), "alpha=0.0"),
        (lambda: DyadicPairs(0), "levels=0"),
        (lambda: AdaptiveWeight(p=0.0), "p=0"),
        (lambda: LSD().check(recipe_of(LSD()), TimeMLP(2, 8, 1), None), "two_times=true"),
        (
            lambda: LSD().check(
                Recipe(IndependentCFM(0.1), Gaussian(), Independent(), Uniform(), LSD()),
                TimeMLP(2, 8, 1, two_times=True), None,
            ),
            "gamma > 0",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_where_it_is_made(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_high_frequencies_are_warned_of():
    net = UNet(1, 8, (1,), 1, (), 8, two_times=True)
    with pytest.warns(UserWarning, match=r"frequencies=\[1, 30\]"):
        LSD().check(recipe_of(LSD()), net, None)
