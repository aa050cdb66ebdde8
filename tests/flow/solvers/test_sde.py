"""Stochastic samplers: their law against the flow's, against Ornstein-Uhlenbeck, and what they refuse."""

import itertools
import math

import pytest
import torch
from jsonargparse import ArgumentParser

from fmlightning.flow.guidance import Guidance
from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
from fmlightning.flow.paths.schedules import (
    IndependentCFM,
    Linear,
    Polynomial,
    Trigonometric,
    VariancePreserving,
)
from fmlightning.flow.solvers.brownian import BrownianPath
from fmlightning.flow.solvers.diffusions import (
    ConstantDiffusion,
    LinearDiffusion,
    PathDiffusion,
    SigmaDiffusion,
)
from fmlightning.flow.solvers.log_snr_grid import LogSNRGrid
from fmlightning.flow.solvers.ode import ODESolver, SolverError
from fmlightning.flow.solvers.sampling import brownian_streams, generate, sample, source_points
from fmlightning.flow.solvers.score import score
from fmlightning.flow.solvers.sde import Ito, MarginalPreservingSDE, SDESolver
from fmlightning.flow.solvers.solver import Solver
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork
from fmlightning.flow.toys import Moons

MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.5], [-0.5, -2.0]], [0.5, 0.4, 0.7])
METHODS = ["euler_maruyama", "stochastic_heun"]


def start(n, seed=0):
    return torch.randn(n, 2, generator=Key(seed).fold("start").generator(), dtype=torch.float64)


def brownian(x, seed=0, index=None):
    index = torch.arange(len(x)) if index is None else index
    return BrownianPath(Key(seed).fold("sde").streams(index), x)


def same(schedule, diffusion=None):
    return MarginalPreservingSDE(schedule, Gaussian(), True, diffusion or LinearDiffusion())


@pytest.mark.parametrize(
    "schedule", [Linear(), Trigonometric(), VariancePreserving(), IndependentCFM(0.3)], ids=str
)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_score_from_the_velocity_is_the_gradient_of_log_p(schedule, t):
    path, x = MIXTURE.along(schedule), start(50).requires_grad_()
    t = torch.tensor(t, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(path.log_prob(x, t).sum(), x)
    x = x.detach()
    found = score(path.velocity(x, t), x, t, schedule)
    # float64, and std >= 0.05 loses a digit or two
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)


def gaussian_field(path, prediction):
    network, trained = OracleNetwork(path, prediction), {"source": Gaussian(), "independent": True}
    return NetworkField(network, path.path, prediction, **trained)


@pytest.mark.parametrize("prediction", ["velocity", "data", "noise", "score"])
def test_every_network_field_knows_its_score(prediction):
    path, x = MIXTURE.along(Linear()), start(50)
    field = gaussian_field(path, prediction)
    t = torch.tensor(0.6, dtype=torch.float64)
    torch.testing.assert_close(field.score(x, t), path.score(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_a_score_at_the_data_end_is_refused(prediction):
    field = gaussian_field(MIXTURE.along(Linear()), prediction)
    with pytest.raises(ValueError, match="t=1"):
        field.score(start(3), torch.tensor(1.0, dtype=torch.float64))


def test_a_score_where_the_velocity_does_not_tell_is_refused():
    """At t = 0 of a quadratic path the velocity is zero whatever the noise."""
    sde = same(Polynomial(2.0))
    with pytest.raises(ValueError, match="t=0"):
        SDESolver(num_steps=5).solve(
            sde, MIXTURE.along(Polynomial(2.0)), start(4), brownian(start(4))
        )


def energy(x, y):
    """The energy distance of two samples, and its distribution when the labels mean nothing."""
    both = torch.cat((x, y))
    distances = torch.cdist(both, both)
    sign = torch.cat((torch.ones(len(x)), -torch.ones(len(y)))).double()
    generator = Key(3).generator()
    null = [sign[torch.randperm(len(both), generator=generator)] for _ in range(200)]
    signs = torch.stack([sign, *null])
    values = -((signs @ distances) * signs).sum(1)
    return values[0], values[1:]


CASES = {
    "linear": (Linear(), LinearDiffusion()),
    "strong": (Linear(), LinearDiffusion(4.0)),
    "cosine": (Trigonometric(), LinearDiffusion()),
    "noise level": (Trigonometric(), SigmaDiffusion()),
    "gamma": (IndependentCFM(0.3), LinearDiffusion()),
    "constant": (Linear(), ConstantDiffusion(1.0, (0.0, 0.95))),
    "path's own": (Linear(), PathDiffusion((0.02, 1.0))),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_the_law_is_that_of_the_flow(case, method):
    schedule, diffusion = CASES[case]
    path, n = MIXTURE.along(schedule), 1500
    std = float(schedule.std(torch.tensor(0.0)))
    steps = 100 if method == "euler_maruyama" else 40
    solver = SDESolver(method, steps)
    x = solver.solve(same(schedule, diffusion), path.velocity, std * start(n), brownian(start(n))).x
    flow = ODESolver("rk4", 40).solve(path.velocity, std * start(n, seed=1)).x
    law = path.marginal(1.0)
    mean = law.weights @ law.means
    spread = (law.weights * (law.means.square().sum(1) + 2 * law.stds**2)).sum()
    errors = x.std(0) / math.sqrt(n)
    # 4 standard errors, and a hundredth for the bias of the steps
    assert ((x.mean(0) - mean).abs() < 4 * errors + 0.01).all()
    squares = x.square().sum(1)
    assert abs(squares.mean() - spread) < 4 * squares.std() / math.sqrt(n) + 0.05
    distance, null = energy(x, flow)
    # the seeds are fixed; by chance alone one in a hundred sets of seeds would exceed this
    assert distance <= null.quantile(0.99)


def test_without_the_half_the_law_would_be_another():
    """The test above sees a drift of v + g^2 score."""
    path, n = MIXTURE.along(Linear()), 1500

    class Wrong(MarginalPreservingSDE):
        def drift(self, field, x, t, g2):
            return 2 * super().drift(field, x, t, g2) - field(x, t)

    sde = Wrong(Linear(), Gaussian(), True)
    x = SDESolver(num_steps=40).solve(sde, path.velocity, start(n), brownian(start(n))).x
    flow = ODESolver("rk4", 40).solve(path.velocity, start(n, seed=1)).x
    distance, null = energy(x, flow)
    assert distance > null.max()


class Impulses:
    """Noise for a linear SDE's exact law: row i is one standard deviation in step i and zero elsewhere."""

    def __init__(self, rows):
        self.step, self.row = itertools.count(), torch.arange(rows)[:, None]

    def increment(self, t0, t1):
        return math.sqrt(t1 - t0) * (self.row == next(self.step)).double()


def variance_at_the_end(method, num_steps, diffusion, std=0.5):
    """The law of the scheme on one Gaussian, where the drift is linear: a sum of squares, no sampling."""
    path = GaussianMixture([1.0], [[0.0]], std).along(Linear())
    x = torch.zeros(num_steps + 1, 1, dtype=torch.float64)
    x[-1] = 1.0  # the last row has no noise: how far x0 itself is carried
    sde, noise = same(Linear(), diffusion), Impulses(num_steps + 1)
    return SDESolver(method, num_steps).solve(sde, path.velocity, x, noise).x.square().sum()


@pytest.mark.parametrize(("method", "order"), [("euler_maruyama", 1), ("stochastic_heun", 2)])
@pytest.mark.parametrize(
    "diffusion",
    [ConstantDiffusion(math.sqrt(2), (0.0, 0.95)), LinearDiffusion()],
    ids=["constant", "vanishing"],
)
def test_the_bias_falls_with_the_order_of_the_method(method, order, diffusion):
    biases = [abs(float(variance_at_the_end(method, n, diffusion)) / 0.25 - 1) for n in (80, 320)]
    # the interval ends on both grids, so both have their leading term
    assert abs(math.log2(biases[0] / biases[1]) / 2 - order) < 0.2, biases


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_g_is_far_more_biased_on_narrow_data(method):
    """Why g^2 vanishes by default: 0.1 wide, 100 times steeper."""
    constant = ConstantDiffusion(math.sqrt(2), (0.0, 0.95))
    variances = [
        variance_at_the_end(method, 160, d, 0.1) / 0.01 for d in (constant, LinearDiffusion())
    ]
    constant_bias, vanishing_bias = (abs(float(v) - 1) for v in variances)
    assert vanishing_bias < 0.01
    assert constant_bias > 10 * vanishing_bias


@pytest.mark.parametrize("method", METHODS)
def test_the_diffusion_of_the_path_is_nearly_unbiased(method):
    diffusion = PathDiffusion((0.05, 1.0))
    assert abs(variance_at_the_end(method, 160, diffusion, 0.1) / 0.01 - 1) < 0.01


def test_no_noise_is_the_flow():
    path = MIXTURE.along(Linear())
    for method, plain in (("euler_maruyama", "euler"), ("stochastic_heun", "heun2")):
        sde = same(Linear(), LinearDiffusion(0.0))
        x = SDESolver(method, 12).solve(sde, path.velocity, start(20), brownian(start(20))).x
        torch.testing.assert_close(x, ODESolver(plain, 12).solve(path.velocity, start(20)).x)


@pytest.mark.parametrize("method", METHODS)
def test_the_last_step_adds_no_noise(method):
    """Two noises, one state before the last step: one state after it."""
    path = MIXTURE.along(Linear())
    sde, solver = same(Linear()), SDESolver(method, 1)
    a, b = (
        solver.solve(sde, path.velocity, start(9), brownian(start(9), seed)).x for seed in (0, 1)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    two = SDESolver(method, 2)
    a, b = (two.solve(sde, path.velocity, start(9), brownian(start(9), seed)).x for seed in (0, 1))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_depends_on_its_index_and_the_seed_alone(method):
    path, solver, sde = MIXTURE.along(Linear()), SDESolver(method, 10), same(Linear())
    whole = solver.solve(sde, path.velocity, start(32), brownian(start(32))).x
    some = torch.tensor([7, 3, 21])
    part = solver.solve(sde, path.velocity, start(32)[some], brownian(start(3), 0, some)).x
    # the sums of the oracle may round otherwise in another batch
    torch.testing.assert_close(part, whole[some], rtol=0, atol=1e-12)
    other = solver.solve(sde, path.velocity, start(32), brownian(start(32), seed=1)).x
    assert (other - whole).abs().mean() > 0.1


def test_steps_draw_unrelated_noise():
    """With no drift the increments are the noise itself."""
    n, solver = 4000, SDESolver("euler_maruyama", 4)
    states = solver.solve(
        Ito(lambda t: 1.0),
        lambda x, t: 0 * x,
        torch.zeros(n, 1),
        brownian(torch.zeros(n, 1)),
        save_at=5,
    ).states[:, :, 0]
    correlation = torch.corrcoef(states.diff(dim=0))
    torch.testing.assert_close(correlation, torch.eye(4), rtol=0, atol=4 / math.sqrt(n))


@pytest.mark.parametrize(("method", "cost"), [("euler_maruyama", 1), ("stochastic_heun", 2)])
def test_cost_and_states(method, cost):
    calls = []

    def field(x, t):
        calls.append(float(t))
        return MIXTURE.along(Linear()).velocity(x, t)

    solver = SDESolver(method, 8)
    solution = solver.solve(
        same(Linear()), field, start(5), brownian(start(5)), save_at=[0.0, 0.5, 1.0]
    )
    assert solution.nfe == len(calls) == 8 * cost
    assert max(calls) <= 1
    torch.testing.assert_close(solution.states[0], start(5))
    torch.testing.assert_close(solution.states[2], solution.x)


THETA, NOISE, FROM = 2.0, 1.5, 3.0


def moments(method, num_steps):
    """Mean and variance at t = 1 of the scheme on dX = -theta X dt + s dW: no sampling, X is linear in its noise."""
    x = torch.zeros(num_steps + 1, 1, dtype=torch.float64)
    x[-1] = FROM  # the last row has no noise: the mean
    sde, noise = Ito(lambda t: NOISE), Impulses(num_steps + 1)
    end = SDESolver(method, num_steps).solve(sde, lambda x, t: -THETA * x, x, noise).x[:, 0]
    return end[-1], end[:-1].square().sum()


MEAN = FROM * math.exp(-THETA)
VARIANCE = NOISE**2 * (1 - math.exp(-2 * THETA)) / (2 * THETA)


@pytest.mark.parametrize(("method", "order"), [("euler_maruyama", 1), ("stochastic_heun", 2)])
def test_weak_order_on_ornstein_uhlenbeck(method, order):
    coarse, fine = moments(method, 64), moments(method, 256)
    for a, b, truth in zip(coarse, fine, (MEAN, VARIANCE), strict=True):
        slope = math.log2(abs(a - truth) / abs(b - truth)) / 2
        assert abs(slope - order) < 0.2


@pytest.mark.parametrize("method", METHODS)
def test_ornstein_uhlenbeck_by_its_own_noise(method):
    n = 20_000
    x = torch.full((n, 1), FROM, dtype=torch.float64)
    solver, sde = SDESolver(method, 100), Ito(lambda t: NOISE)
    end = solver.solve(sde, lambda x, t: -THETA * x, x, brownian(x)).x
    # 4 standard errors, and the scheme's own bias of at most theta / 100
    assert abs(end.mean() - MEAN) < 4 * math.sqrt(VARIANCE / n) + MEAN * THETA / 100
    assert abs(end.var() - VARIANCE) < (4 * math.sqrt(2 / n) + THETA / 100) * VARIANCE


def test_a_time_dependent_g_gives_the_integral_of_its_square():
    """dX = t dW has variance 1/3; the trapezoid of stochastic Heun adds 1 / (6 K^2)."""
    K = 10
    x = torch.zeros(K, 1, dtype=torch.float64)
    solver, noise = SDESolver("stochastic_heun", K), Impulses(K)
    end = solver.solve(Ito(lambda t: t), lambda x, t: 0 * x, x, noise).x
    assert end.square().sum().item() == pytest.approx(1 / 3 + 1 / (6 * K**2), abs=1e-12)


def test_a_source_that_is_not_gaussian_is_refused():
    with pytest.raises(ValueError, match=r"Moons.*not Gaussian.*Use the Gaussian source"):
        MarginalPreservingSDE(Linear(), Moons(), True)


def test_a_coupling_with_an_unknown_score_is_refused():
    with pytest.raises(ValueError, match=r"optimal transport.*independent coupling"):
        MarginalPreservingSDE(Linear(), Gaussian(), False)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ConstantDiffusion(1.0, (0.0, 1.0)), "vanish like"),
        (lambda: ConstantDiffusion(1.0, (0.9, 0.1)), "low < high"),
        (lambda: ConstantDiffusion(-1.0, (0.0, 0.9)), "negative"),
        (lambda: same(Linear(), PathDiffusion((0.0, 1.0))), "singular"),
        (lambda: LinearDiffusion(-1.0), "negative"),
        (lambda: SDESolver(num_steps=0), "num_steps"),
    ],
)
def test_bad_settings_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.5, 0.5)])
def test_an_sde_does_not_run_backwards(ends):
    with pytest.raises(ValueError, match="forwards"):
        SDESolver().solve(same(Linear()), lambda x, t: x, start(3), brownian(start(3)), *ends)


def test_streams_must_match_the_samples():
    with pytest.raises(ValueError, match="4 streams"):
        SDESolver().sample(
            MIXTURE.along(Linear()), start(3), streams=Key(0).streams(torch.arange(4))
        )


def test_blow_up_names_the_method_and_the_time():
    with pytest.raises(SolverError, match=r"euler_maruyama.*t=0\."):
        SDESolver("euler_maruyama", 400).solve(
            Ito(lambda t: 0.1), lambda x, t: x**2, 3 + start(3).abs(), brownian(start(3))
        )


def test_sampling_is_solving_the_sde_of_the_model():
    """`sample` by hand: the start of the path, the SDE of its curves, the streams of its own key."""
    path, index = MIXTURE.along(IndependentCFM(0.3)), torch.arange(12)
    x0 = source_points(Gaussian(), 3, index, (2,)).double()
    eps = Key(3).fold("sampling", "eps").streams(index).normal((2,)).double()
    solver = SDESolver("euler_maruyama", 16, diffusion=SigmaDiffusion(0.7))
    found = solver.sample(path, x0, noise=eps, streams=brownian_streams(3, index), save_at=3)
    x = x0 + 0.3 * eps  # sigma(0) x0 + gamma(0) eps
    w = BrownianPath(Key(3).fold("sampling", "sde").streams(index), x)
    sde = same(path.path, SigmaDiffusion(0.7))
    truth = solver.solve(sde, path.velocity, x, w, save_at=3)
    torch.testing.assert_close(found.x, truth.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.states, truth.states, rtol=0, atol=1e-12)
    assert found.nfe == solver.evaluations == 16


@pytest.mark.parametrize("prediction", ["velocity", "data", "noise", "score"])
def test_every_network_field_is_sampled_alike(prediction):
    """From the oracle's own predictions; where the interval stops short, one more evaluation ends on the data."""
    path, index = MIXTURE.along(Linear()), torch.arange(16)
    field, solver = gaussian_field(path, prediction), SDESolver("stochastic_heun", 20)
    x0, streams = start(16), brownian_streams(5, index)
    found = generate(field, x0, solver, streams=streams)
    low, high = field.t_range
    truth = solver.sample(path, x0, t0=low, t1=high, streams=streams)
    assert found.nfe == truth.nfe == 40 + (high < 1)
    torch.testing.assert_close(found.x, truth.x, rtol=0, atol=1e-9)  # float64


@pytest.mark.parametrize("solver", [SDESolver("euler_maruyama", 20), ODESolver("heun2", 10)])
def test_a_sample_is_the_same_alone_and_in_a_batch(solver):
    path = MIXTURE.along(Linear())
    whole = sample(path, Gaussian(), solver, torch.arange(40), (2,), seed=1).x
    some = torch.tensor([30, 4])
    part = sample(path, Gaussian(), solver, some, (2,), seed=1).x
    torch.testing.assert_close(part, whole[some], rtol=0, atol=1e-5)  # float32


def test_the_solver_that_checks_another_refines_the_same_samples():
    """Twice the steps along one Brownian path: nearer to the limit than another path, by far."""
    path, solver = MIXTURE.along(Linear()), SDESolver("stochastic_heun", 32)
    index = torch.arange(100)
    coarse, fine = (sample(path, Gaussian(), s, index, (2,)).x for s in (solver, solver.refined()))
    other = sample(path, Gaussian(), solver, index, (2,), seed=1).x
    assert solver.refined().num_steps == 64
    assert (coarse - fine).norm(dim=1).median() < 0.1 * (coarse - other).norm(dim=1).median()


def test_the_times_of_an_integration_may_be_given():
    path, x0 = MIXTURE.along(Linear()), start(6)
    for solver in (SDESolver(num_steps=8), ODESolver("heun2", 8)):
        made = solver.sample(
            path,
            x0,
            t0=0.2,
            t1=0.8,
            save_at=[0.2, 0.8],
            streams=brownian_streams(0, torch.arange(6)),
        )
        torch.testing.assert_close(made.states[0], 0.8 * x0)  # sigma = 1 - t
        last = torch.tensor(0.8, dtype=torch.float64)
        torch.testing.assert_close(made.x, path.data(made.states[1], last))
        assert made.nfe == 17


@pytest.mark.parametrize(
    ("trained", "reason"),
    [
        ({"source": Gaussian(), "independent": False}, r"optimal transport.*independent coupling"),
        ({"source": Moons(), "independent": True}, r"Moons.*not Gaussian.*Use the Gaussian source"),
        ({}, r"not told of its source.*source=Gaussian\(\)"),
    ],
    ids=["coupled", "source", "unknown"],
)
def test_a_model_whose_score_is_unknown_is_refused_before_any_evaluation(trained, reason):
    class Unseen(torch.nn.Module):
        def forward(self, x, t, y=None):
            raise AssertionError("the network was called")

    field = NetworkField(Unseen(), Linear(), **trained)
    guided = Guidance(2.0).autoguide(field, field)
    for model in (field, guided):
        with pytest.raises(ValueError, match=reason):
            generate(model, start(3), SDESolver(), streams=brownian_streams(0, torch.arange(3)))


def test_steps_shorter_than_the_path_is_resolved_are_refused_before_the_loop():
    def unseen(x, t):
        raise AssertionError("the field was called")

    with pytest.raises(ValueError, match=r"num_steps=70000 on grid=UniformGrid.*fewer steps"):
        SDESolver(num_steps=70_000).solve(same(Linear()), unseen, start(3), brownian(start(3)))


def test_a_config_names_every_part():
    """The solver is chosen and set by text; its diffusion knows of no path until it samples."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--solver", type=Solver, default=ODESolver())
    text = {
        "class_path": "fmlightning.flow.SDESolver",
        "init_args": {
            "method": "euler_maruyama",
            "num_steps": 6,
            "grid": {"class_path": "fmlightning.flow.LogSNRGrid"},
            "diffusion": {
                "class_path": "fmlightning.flow.PathDiffusion",
                "init_args": {"t_range": [0.05, 1.0]},
            },
        },
    }
    solver = parser.instantiate(parser.parse_object({"solver": text})).solver
    expected = SDESolver("euler_maruyama", 6, LogSNRGrid(), PathDiffusion((0.05, 1.0)))
    assert solver == expected
    x = sample(MIXTURE.along(Linear()), Gaussian(), solver, torch.arange(4), (2,)).x
    assert x.isfinite().all()


def test_a_solver_that_draws_needs_streams():
    with pytest.raises(ValueError, match=r"SDESolver.*streams=key\.streams\(index\)"):
        SDESolver().sample(MIXTURE.along(Linear()), start(3))


def test_a_guided_model_has_the_score_of_its_guided_velocity():
    """score_w = score_0 + w (score_1 - score_0): by the oracle's own scores, no noise in the way."""
    strong, weak = (
        MIXTURE.along(Linear()),
        GaussianMixture([1.0], [[0.0, 0.0]], 1.5).along(Linear()),
    )
    fields = [gaussian_field(p, "velocity") for p in (strong, weak)]
    guided = Guidance(3.0).autoguide(*fields)
    x, t = start(20), torch.tensor(0.6, dtype=torch.float64)
    found = score(guided(x, t), x, t, Linear())
    s1, s0 = strong.score(x, t), weak.score(x, t)
    torch.testing.assert_close(found, s0 + 3.0 * (s1 - s0), rtol=1e-9, atol=1e-9)
    index = torch.arange(20)
    assert guided.independent
    assert guided.source == Gaussian()
    made = sample(guided, Gaussian(), SDESolver(num_steps=50), index, (2,))
    assert made.x.isfinite().all()
    assert made.nfe == 100


@pytest.mark.parametrize("solver", [SDESolver("euler_maruyama", 7), ODESolver("rk4", 7)])
def test_what_every_solver_tells(solver):
    assert isinstance(solver, Solver)
    assert solver.needs == {"velocity"}
    assert solver.fixed
    assert solver.name == solver.method
    x0 = start(2)
    made = solver.sample(MIXTURE.along(Linear()), x0, streams=brownian_streams(0, torch.arange(2)))
    assert made.nfe == solver.evaluations == (7 if solver.method == "euler_maruyama" else 28)
