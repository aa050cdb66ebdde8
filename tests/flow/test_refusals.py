"""Times, shapes and laws that do not fit are refused as a user has the library: with no annotation checked."""

import math

import pytest
import torch
from jaxtyping import config
from torch import nn

from fmlightning.flow.couplings import Entropic, OTPlanWithReplacement, SchrodingerBridgeCoupling
from fmlightning.flow.keys import Key
from fmlightning.flow.likelihood import divergence, log_prob, start_log_prob
from fmlightning.flow.models import NetworkField
from fmlightning.flow.objectives.cfm import cfm_loss
from fmlightning.flow.paths.gaussian import GaussianPath
from fmlightning.flow.paths.predictions import PREDICTIONS, to_endpoints, to_velocity
from fmlightning.flow.paths.schedules import (
    Curves,
    IndependentCFM,
    Linear,
    Polynomial,
    SchrodingerBridge,
    VariancePreserving,
)
from fmlightning.flow.pixels import dequantise, quantise
from fmlightning.flow.schedule_transform import ScheduleTransformedField
from fmlightning.flow.shapes import expand_like, require_times
from fmlightning.flow.solvers.brownian import BrownianPath
from fmlightning.flow.solvers.diffusions import Diffusion, LinearDiffusion
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sde import MarginalPreservingSDE, SDESolver
from fmlightning.flow.solvers.time_grids import TimeGrid
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork
from fmlightning.flow.toys import Moons

F64 = torch.float64
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [1.5, -0.5]], [0.4, 0.7])
PATH = MIXTURE.along(Linear())
X = torch.randn(4, 2, generator=Key(0).generator(), dtype=F64)
HALF = torch.full((4,), 0.5, dtype=F64)
STRAIGHT = GaussianPath(lambda x1, t: expand_like(t, x1) * x1, lambda x1, t: 1 - t)


@pytest.fixture(autouse=True)
def annotations_off():
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def exact(schedule, prediction="velocity", **trained):
    return NetworkField(
        OracleNetwork(MIXTURE.along(schedule), prediction), schedule, prediction, **trained
    )


TIMED = {
    "AffinePath.sample": lambda t: Linear().sample(X, X, t),
    "AffinePath.velocity": lambda t: Linear().velocity(X, X, t),
    "GaussianPath.sample": lambda t: STRAIGHT.sample(X, X, t),
    "GaussianPath.velocity": lambda t: STRAIGHT.velocity(X, X, t),
    "NetworkField": lambda t: exact(Linear())(X, t),
    "NetworkField.data": lambda t: exact(Linear()).data(X, t),
    "NetworkField.endpoints": lambda t: exact(Linear()).endpoints(X, t),
    "NetworkField.score": lambda t: exact(Linear(), source=Gaussian(), independent=True).score(X, t),
    "ScheduleTransformedField": lambda t: ScheduleTransformedField(exact(Linear()), Polynomial(2.0))(X, t),
    "ScheduleTransformedField.data": lambda t: ScheduleTransformedField(exact(Linear()), Polynomial(2.0)).data(X, t),
    "to_velocity": lambda t: to_velocity("velocity", X, X, t, Linear()),
    "to_velocity of data": lambda t: to_velocity("data", X, X, t, Linear()),
    "to_endpoints": lambda t: to_endpoints("velocity", X, X, t, Linear()),
    "oracle": lambda t: PATH.velocity(X, t),
}  # fmt: skip
timed = pytest.mark.parametrize("name", TIMED)


class Plain(nn.Module):
    """A network that would answer at any time, and in any shape."""

    def __init__(self, width=2):
        super().__init__()
        self.width = width

    def forward(self, x, t, y=None):
        return x[:, : self.width] * t[:, None]


@timed
@pytest.mark.parametrize("t", [-0.1, 1.001, math.nan, math.inf, -math.inf])
def test_times_outside_the_path_are_refused(name, t):
    for times in (torch.tensor(t, dtype=F64), torch.tensor([0.5, 0.5, t, 0.5], dtype=F64)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            TIMED[name](times)


@timed
def test_times_of_another_batch_are_refused_with_both_numbers(name):
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        TIMED[name](HALF[:3])


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan, math.inf])
def test_starts_and_ends_that_are_no_times_are_refused_before_the_loop(t):
    def unseen(x, t):
        raise AssertionError("the field was called")

    field = NetworkField(Plain(), Linear())
    field.network.forward = unseen
    sde = MarginalPreservingSDE(Linear(), Gaussian(), True)
    brownian = BrownianPath(Key(0).streams(torch.arange(4)), X)
    for call in (
        lambda: ODESolver("euler").solve(field, X, 0.5, t),
        lambda: ODESolver("dopri5").solve(field, X, t, 0.5),
        lambda: SDESolver().solve(sde, field, X, brownian, 0.5, t),
        lambda: log_prob(field, X, Gaussian(), Linear(), ODESolver("euler"), t_range=(0.5, t)),
        lambda: start_log_prob(Gaussian(), Linear(), X, t),
        lambda: Linear().start(X, t),
        lambda: PATH.start(t),
        lambda: PATH.marginal(t),
    ):
        with pytest.raises(ValueError, match=r"\[0, 1\]|0 <= low < high <= 1"):
            call()


@pytest.mark.parametrize("t", [math.nan, math.inf])
def test_a_field_without_a_path_may_run_anywhere_but_to_nowhere(t):
    ODESolver("euler", 3).solve(lambda x, t: -x, X, -1.0, 4.0)
    with pytest.raises(ValueError, match="finite time"):
        ODESolver("euler", 3).solve(lambda x, t: -x, X, 0.0, t)


def test_a_grid_that_turns_back_is_refused():
    class Backwards(TimeGrid):
        def map(self, s):
            return s + torch.sin(2 * torch.pi * s) / 2

    with pytest.raises(ValueError, match="does not increase over 10 steps"):
        ODESolver("euler", 10, grid=Backwards()).solve(lambda x, t: -x, X)


def test_times_on_a_device_are_not_looked_at():
    """Elsewhere than on the CPU a look makes the host wait: a meta tensor has no values to look at."""
    require_times(torch.full((4,), 7.0, device="meta"), 4)
    require_times(torch.full((), 7.0, device="meta"))
    require_times(torch.zeros(0), 0)


@pytest.mark.parametrize("schedule", [Linear(), IndependentCFM(0.3)], ids=repr)
def test_nothing_on_a_device_is_looked_at_in_training_and_sampling(schedule):
    """Any look at a value, in a step of training or an evaluation of the field, fails on a meta tensor."""
    x0, x1, eps = torch.zeros(3, 4, 2, device="meta")
    t = torch.zeros(4, device="meta")
    sample = schedule.sample(x0, x1, t, eps)
    cfm_loss(Plain(), schedule, sample).mean()
    field = NetworkField(Plain(), schedule)
    for time in (t, t[0]):
        field(x0, time)
        ScheduleTransformedField(field, Polynomial(2.0))(x0, time)
        schedule.velocity(x0, x1, time)


def test_a_changed_field_outside_its_interval_is_refused():
    field = ScheduleTransformedField(exact(VariancePreserving()), Linear())
    low, high = field.t_range
    for r in (low - 1e-3, high + 1e-3):
        for times in (torch.tensor(r, dtype=F64), torch.tensor([0.5, r, 0.5, 0.5], dtype=F64)):
            with pytest.raises(ValueError, match=r"leaves \[0\.00[0-9]+, 0\.9[0-9]+\]"):
                field(X, times)
            with pytest.raises(ValueError, match="leaves"):
                field.data(X, times)
    for end in (low, high):  # the ends themselves, rounded, are inside
        assert field(X.float(), torch.tensor(end, dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_answers_in_another_shape_is_refused_with_both_shapes(prediction):
    network = Plain(width=1)
    field = NetworkField(network, Linear(), prediction, source=Gaussian(), independent=True)
    sample = Linear().sample(X, X, HALF)
    for call in (field, field.endpoints, field.data, field.score):
        with pytest.raises(ValueError, match=r"\(4, 2\).*\(4, 1\)"):
            call(X, HALF)
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(4, 1\)"):
        cfm_loss(network, Linear(), sample, prediction=prediction)
    for convert in (to_velocity, to_endpoints):
        with pytest.raises(ValueError, match=r"\(4, 1\).*\(4, 2\)"):
            convert(prediction, X[:, :1], X, HALF, Linear())


def test_a_field_that_answers_in_another_shape_is_refused_with_both_shapes():
    def narrow(x, t):
        return x[:, :1]

    brownian = BrownianPath(Key(0).streams(torch.arange(4)), X)
    sde = MarginalPreservingSDE(Linear(), Gaussian(), True, LinearDiffusion(0.0))
    for call in (
        lambda: divergence(narrow, X, HALF[0]),
        lambda: divergence(narrow, X, HALF[0], torch.ones_like(X)),
        lambda: ODESolver("rk4", 2).solve(narrow, X),
        lambda: ODESolver("ab3", 5).solve(narrow, X),
        lambda: ODESolver("dopri5").solve(narrow, X),
        lambda: SDESolver(num_steps=2).solve(sde, narrow, X, brownian),
        lambda: log_prob(narrow, X, Gaussian(), Linear(), ODESolver("euler", 2)),
        lambda: PATH.fm_loss(narrow, X, HALF),
    ):
        with pytest.raises(ValueError, match=r"\(4, 1\).*\(4, 2\)"):
            call()


@pytest.mark.parametrize("rows", [1, 3])
def test_points_and_noise_of_another_batch_are_refused_with_both_shapes(rows):
    noisy, plain = IndependentCFM(0.3), Linear()
    few = X[:rows]
    for call in (
        lambda: noisy.sample(X, X, HALF, few),
        lambda: noisy.start(X, 0.5, few),
        lambda: plain.sample(few, X, HALF),
        lambda: plain.velocity(X, few, HALF),
        lambda: plain.velocity(X, few, HALF[0]),
        lambda: STRAIGHT.sample(few, X, HALF),
        lambda: STRAIGHT.velocity(few, X, HALF),
        lambda: divergence(PATH, X, HALF[0], few),
        lambda: dequantise(X, few, 17),
    ):
        with pytest.raises(ValueError, match=rf"\({rows}, 2\).*\(4, 2\)|\(4, 2\).*\({rows}, 2\)"):
            call()


def test_the_velocity_of_a_point_that_has_arrived_is_refused():
    one = torch.tensor(1.0, dtype=F64)
    for path in (Linear(), STRAIGHT):
        with pytest.raises(ValueError, match="no noise is left on the path at t=1"):
            path.velocity(X, X, one)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("trained", "reason"),
    [
        ({"source": Moons(), "independent": True}, r"Moons.*not Gaussian.*Use the Gaussian source"),
        ({"source": Gaussian(), "independent": False}, "coupling.*independent coupling"),
        ({"source": Gaussian()}, "coupling.*independent coupling"),
        ({}, r"was not told.*source=Gaussian\(\), independent=True"),
    ],
    ids=["source", "coupling", "coupling by default", "unknown"],
)
def test_a_score_needs_a_gaussian_source_independent_of_the_data(prediction, trained, reason):
    with pytest.raises(ValueError, match=reason):
        exact(Linear(), prediction, **trained).score(X, HALF)


@pytest.mark.parametrize("schedule", [IndependentCFM(0.3), SchrodingerBridge(0.7)], ids=repr)
@pytest.mark.parametrize(
    "trained", [{"source": Moons(), "independent": True}, {"source": Gaussian()}], ids=str
)
def test_source_and_noise_are_one_noise_only_if_both_are_gaussian_and_free(schedule, trained):
    """With gamma > 0, data, noise and score do not give the velocity, nor one path another's."""
    for prediction in ("data", "noise", "score"):
        with pytest.raises(ValueError, match=r"gamma > 0.*independent"):
            exact(schedule, prediction, **trained)
    with pytest.raises(ValueError, match=r"change of path.*gamma > 0"):
        ScheduleTransformedField(exact(schedule, **trained), Linear())
    with pytest.raises(ValueError, match=r"change of path.*gamma > 0"):
        ScheduleTransformedField(exact(Linear(), **trained), schedule)
    ScheduleTransformedField(exact(Linear(), **trained), Polynomial(2.0))


def test_what_is_refused_would_be_wrong():
    """Under a coupling, E[x1 | x] taken through one noise misses the velocity by a part of its size."""
    n, schedule = 400_000, SchrodingerBridge(1.0)
    g = Key(2).generator()
    x0, eps = torch.randn(2, n, 1, generator=g, dtype=F64)
    t = torch.tensor(0.5, dtype=F64)
    apart = []
    for x1 in (x0, torch.randn(n, 1, generator=g, dtype=F64)):  # the source itself, and one's own
        s = schedule.sample(x0, x1, t, eps)

        def regress(y, x=s.xt):
            return (y * x).mean() / (x * x).mean()  # all is jointly Gaussian: E[y | x] is a line

        x = torch.ones(1, 1, dtype=F64)
        found = to_velocity("data", regress(s.x1) * x, x, t, schedule)
        apart.append(abs(float(found - regress(s.ut) * x)))
    coupled, independent = apart
    assert independent < 4 * 2 / n**0.5
    assert coupled > 0.1


@pytest.mark.parametrize(
    "interval", [(-0.1, 1.0), (0.0, 1.1), (0.9, 0.1), (0.5, 0.5), (0, math.nan)]
)
def test_curves_on_no_interval_are_refused(interval):
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        Curves(lambda t: t, lambda t: 1 - t, t_range=interval)


@pytest.mark.parametrize(
    ("alpha", "sigma"),
    [
        (lambda t: t + torch.sin(4 * torch.pi * t) / 4, lambda t: 1 - t),
        (lambda t: t, lambda t: (1 - t) * torch.exp(8 * t**2)),
        (lambda t: torch.where(t == 0.5, torch.nan, t), lambda t: 1 - t),
    ],
    ids=["alpha", "sigma", "nan"],
)
def test_curves_whose_ratio_falls_are_refused(alpha, sigma):
    with pytest.raises(ValueError, match=r"alpha / sigma falls between t = 0\.\d+ and 0\.\d+"):
        Curves(alpha, sigma)


def test_curves_may_wait():
    """A ratio that stays is a path that waits."""
    Curves(lambda t: (2 * t - 1).clamp(min=0), lambda t: 1 - (2 * t - 1).clamp(min=0))


@pytest.mark.parametrize(
    ("mu", "sigma", "reason"),
    [
        (lambda x1, t: x1, lambda x1, t: 1 - t, r"mu\(x1, 0\) is .* needs 0 there"),
        (lambda x1, t: 0 * x1, lambda x1, t: 1 - t, r"mu\(x1, 1\) is .* needs x1 there"),
        (lambda x1, t: expand_like(t, x1) * x1, lambda x1, t: t, r"sigma\(x1, 0\) is 1 off"),
        (lambda x1, t: expand_like(t, x1) * x1, lambda x1, t: 1 - t / 2, r"sigma\(x1, 1\) is 0\.5"),
        (lambda x1, t: expand_like(t, x1) / 0, lambda x1, t: 1 - t, r"mu\(x1, 0\) is nan"),
    ],
    ids=["mu at 0", "mu at 1", "sigma at 0", "sigma at 1", "nan"],
)
def test_a_gaussian_path_whose_ends_do_not_hold_is_refused(mu, sigma, reason):
    for t in (HALF, HALF[0]):
        with pytest.raises(ValueError, match=reason):
            GaussianPath(mu, sigma).sample(X, X, t)
        with pytest.raises(ValueError, match=reason):
            GaussianPath(mu, sigma).velocity(X, X, t)


def test_the_ends_of_a_gaussian_path_are_looked_at_once_and_may_be_waived():
    calls = []

    def mu(x1, t):
        calls.append(t)
        return expand_like(t, x1) * x1

    path = GaussianPath(mu, lambda x1, t: 1 - 0.9 * t, end_tolerance=0.2)
    path.sample(X, X, HALF)
    first = len(calls)
    path.sample(X, X, HALF)
    assert len(calls) - first == first - 2
    GaussianPath(mu, lambda x1, t: 50 * (1 - t), end_tolerance=math.inf).sample(X, X, HALF)


def test_curves_of_a_gaussian_path_in_another_shape_are_refused():
    narrow = GaussianPath(lambda x1, t: expand_like(t, x1) * x1[:, :1], lambda x1, t: 1 - t)
    few = GaussianPath(lambda x1, t: expand_like(t, x1) * x1, lambda x1, t: 1 - t[:1])
    with pytest.raises(ValueError, match=r"mu.*\(4, 1\).*\(4, 2\)"):
        narrow.curves(X, HALF)
    with pytest.raises(ValueError, match=r"sigma.*\(1, 1\).*4 points"):
        few.curves(X, HALF)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_diffusion_that_is_none_is_refused_where_it_is(value):
    class Own(Diffusion):
        def squared(self, t, path):
            return torch.full_like(t, value)

    with pytest.raises(ValueError, match=r"g\^2 = .* at t=0"):
        MarginalPreservingSDE(Linear(), Gaussian(), True, Own())
    with pytest.raises(ValueError, match="finite and not negative"):
        LinearDiffusion(value)


@pytest.mark.parametrize("make", [Entropic, SchrodingerBridgeCoupling])
@pytest.mark.parametrize(
    "settings", [{"tolerance": 0.0}, {"max_iterations": 0}, {"tolerance": math.nan}]
)
def test_iterations_that_cannot_end_are_refused(make, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make(**settings)
    with pytest.raises(ValueError, match="finite"):
        make(math.inf)


@pytest.mark.filterwarnings("ignore:numItermax")
def test_a_plan_that_is_not_the_best_is_refused():
    x0, x1 = torch.randn(2, 200, 2, generator=Key(1).generator())
    with pytest.raises(ValueError, match="no optimal plan of 200 pairs in max_iterations=5"):
        OTPlanWithReplacement(5).pairs(x0, x1, None, Key(0).generator())


def test_levels_that_no_byte_holds_are_refused():
    with pytest.raises(ValueError, match="num_bins=65536"):
        quantise(X, 65536)
