"""Guided fields against the exact fields of labelled mixtures."""

import pytest
import torch
from torch import nn

from fmlightning.flow.guidance import Guidance, GuidedField, closest
from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
from fmlightning.flow.paths.schedules import Linear, Trigonometric, VariancePreserving
from fmlightning.flow.solvers.brownian import BrownianPath
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import generate
from fmlightning.flow.solvers.sde import MarginalPreservingSDE, SDESolver
from fmlightning.flow.solvers.solver import TrainedField
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture

CLASSES = (
    GaussianMixture([0.3, 0.7], [[2.0, 1.0], [1.0, -2.0]], 0.5),
    GaussianMixture([1.0], [[-2.0, 0.5]], 0.8),
)
ALL = GaussianMixture(
    [0.15, 0.35, 0.5],
    [[2.0, 1.0], [1.0, -2.0], [-2.0, 0.5]],
    torch.tensor([0.5, 0.5, 0.8]).double(),
)
SCHEDULES = (Linear(), Trigonometric(), VariancePreserving())


class Labelled(nn.Module):
    """The exact answer for each class, and label 2 for none; counts its calls."""

    def __init__(self, schedule, prediction="velocity", laws=(*CLASSES, ALL)):
        super().__init__()
        self.paths = [law.along(schedule) for law in laws]
        self.prediction, self.sizes = prediction, []

    def forward(self, x, t, y):
        self.sizes.append(len(x))
        answers = torch.stack([path.exact_prediction(self.prediction, x, t) for path in self.paths])
        return answers[y, torch.arange(len(x))]


def points(n=64, stream=0):
    generator = Key(3).fold("guidance", stream).generator()
    x = 2 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    t = 0.1 + 0.8 * torch.rand(n, generator=generator, dtype=torch.float64)
    return x, t, torch.arange(n) % 2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("w", [0.0, 1.7, 4.0])
def test_it_is_the_pointwise_form(schedule, w):
    """(alpha'/alpha) x + (sigma D / alpha) grad log[p(x|y)^w p(x)^(1-w)], by autograd of the closed densities."""
    x, t, y = points()
    guided = Guidance(w).cfg(NetworkField(Labelled(schedule), schedule), 2)
    moved = x.clone().requires_grad_()
    given = torch.stack([law.along(schedule).log_prob(moved, t) for law in CLASSES])
    log_density = w * given[y, torch.arange(len(x))] + (1 - w) * ALL.along(schedule).log_prob(
        moved, t
    )
    (score,) = torch.autograd.grad(log_density.sum(), moved)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    d = schedule.d_alpha(t) * sigma - alpha * schedule.d_sigma(t)
    expected = (schedule.d_alpha(t) / alpha)[:, None] * x + (sigma * d / alpha)[:, None] * score
    # float64; the coefficients lose up to three digits at t = 0.1
    torch.testing.assert_close(guided(x, t, y), expected, rtol=1e-9, atol=1e-9)


def test_it_is_not_the_field_of_tilted_data():
    """With Gaussian q(x|y) and q(x), the tilted law is Gaussian too, and its exact field is another one."""
    w, schedule = 2.0, Linear()
    given, free = GaussianMixture([1.0], [[1.0]], 0.5), GaussianMixture([1.0], [[0.0]], 1.0)
    precision = w / 0.25 + (1 - w)
    tilted = GaussianMixture([1.0], [[w * 1.0 / 0.25 / precision]], precision**-0.5)
    guided = Guidance(w).cfg(NetworkField(Labelled(schedule, laws=(given, free)), schedule), 1)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    y = torch.zeros(9, dtype=torch.long)
    apart = [
        (guided(x, t, y) - tilted.along(schedule).velocity(x, t)).abs().max()
        for t in torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
    ]
    assert apart[0] > 0.1
    assert apart[1] > 0.1


def test_one_network_call_on_twice_the_batch():
    network = Labelled(Linear())
    field = Guidance(3.0).cfg(NetworkField(network, Linear()), 2)
    x, _, y = points(10)
    solution = generate(field, x, ODESolver(method="heun2", num_steps=5), y=y)
    assert network.sizes == [20] * solution.nfe == [20] * 10


def test_scale_one_is_the_model_and_zero_the_other_field():
    x, t, y = points()
    field = NetworkField(Labelled(Linear()), Linear())
    assert Guidance(1.0).cfg(field, 2) is field
    other = Guidance(0.0).cfg(field, 2)
    torch.testing.assert_close(other(x, t, y), field(x, t, torch.full_like(y, 2)))


def test_it_acts_in_its_interval_only():
    x, t, y = points()
    field = NetworkField(Labelled(Linear()), Linear())
    guided = Guidance(3.0, t_range=(0.3, 0.6)).cfg(field, 2)
    always = Guidance(3.0).cfg(field, 2)
    inside = (t >= 0.3) & (t <= 0.6)
    torch.testing.assert_close(guided(x, t, y)[inside], always(x, t, y)[inside])
    torch.testing.assert_close(guided(x, t, y)[~inside], field(x, t, y)[~inside])
    assert 10 < inside.sum() < 54
    for time in (0.2, 0.5):
        scalar = torch.tensor(time, dtype=torch.float64)
        expected = (always if time == 0.5 else field)(x, scalar, y)
        torch.testing.assert_close(guided(x, scalar, y), expected)


def test_the_rescaled_field_is_as_close_as_a_factor_can_bring_it():
    x, t, y = points()
    field = NetworkField(Labelled(Linear()), Linear())
    v1, v0 = field(x, t, y), field(x, t, torch.full_like(y, 2))
    s = closest(v0, v1)
    residual = (v1 - s[:, None] * v0).norm(dim=1)
    for other in (0.9, 1.1):
        assert (residual <= (v1 - other * s[:, None] * v0).norm(dim=1)).all()
    # the published form: (1 - w) s v_u + w v_c
    guided = Guidance(2.5, rescale=True).cfg(field, 2)
    torch.testing.assert_close(guided(x, t, y), -1.5 * s[:, None] * v0 + 2.5 * v1)
    assert closest(torch.zeros(1, 2), torch.ones(1, 2)) == 0


def test_it_stands_still_at_the_start():
    x, _, y = points()
    guided = Guidance(2.0, zero_until=0.04).cfg(NetworkField(Labelled(Linear()), Linear()), 2)
    assert (guided(x, torch.tensor(0.02, dtype=torch.float64), y) == 0).all()
    assert (guided(x, torch.tensor(0.04, dtype=torch.float64), y) != 0).all()


def test_autoguidance_pushes_away_from_the_weaker_model():
    x, t, y = points()
    strong = NetworkField(Labelled(Linear()), Linear())
    weak = NetworkField(Labelled(Linear(), "data", laws=(ALL, ALL, ALL)), Linear(), "data")
    guided = Guidance(2.0).autoguide(strong, weak)
    torch.testing.assert_close(guided(x, t, y), 2 * strong(x, t, y) - weak(x, t, y))
    # the data prediction stops short of t = 1, and so do both
    assert guided.t_range == weak.t_range != strong.t_range


@pytest.mark.parametrize("prediction", ["velocity", "data", "noise", "score"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "rk4", "ab3", "dopri5"])
def test_every_solver_and_prediction_ends_in_the_same_place(prediction, method):
    """To 1e-2 in 60 steps of order 2 and more, 3e-2 in 200 of order 1."""
    x, _, y = points(4)
    exact = Guidance(2.0).cfg(NetworkField(Labelled(Linear()), Linear()), 2)
    reference = generate(exact, x, ODESolver(method="dopri5", rtol=1e-8, atol=1e-8), y=y).x
    field = Guidance(2.0).cfg(NetworkField(Labelled(Linear(), prediction), Linear(), prediction), 2)
    assert isinstance(field, TrainedField)
    steps = 200 if method == "euler" else 60
    found = generate(field, x, ODESolver(method, steps, rtol=1e-6, atol=1e-6), y=y).x
    # noise and score start at 1e-3, data ends there: their error is of that order
    tolerance = 3e-2 if method == "euler" else 1e-2
    torch.testing.assert_close(found, reference, rtol=0, atol=tolerance)


def test_the_sde_takes_it():
    x, _, y = points(16)
    field = Guidance(2.0).cfg(NetworkField(Labelled(Linear()), Linear()), 2)
    streams = Key(0).fold("sde").streams(torch.arange(16))
    sde = MarginalPreservingSDE(Linear(), Gaussian(), independent=True)
    found = SDESolver(num_steps=50).solve(sde, field.given(y), x, BrownianPath(streams, x))
    assert found.x.isfinite().all()
    assert found.nfe == 100


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": float("nan")}, "scale"),
        ({"t_range": (0.5, 0.5)}, "t_range"),
        ({"t_range": (0.0, 2.0)}, "t_range"),
        ({"zero_until": 1.0}, "zero_until"),
    ],
)
def test_what_cannot_be_is_refused(options, named):
    with pytest.raises(ValueError, match=f"guidance.{named}"):
        Guidance(**options)


def test_labels_are_asked_for():
    x, t, _ = points()
    field = NetworkField(Labelled(Linear()), Linear())
    with pytest.raises(ValueError, match="needs a model with labels"):
        Guidance(2.0).cfg(field, 0)
    with pytest.raises(ValueError, match="which class"):
        Guidance(2.0).cfg(field, 2)(x, t)
    with pytest.raises(ValueError, match="one path"):
        Guidance(2.0).autoguide(field, NetworkField(Labelled(Trigonometric()), Trigonometric()))
    with pytest.raises(ValueError, match="either"):
        GuidedField(Guidance(2.0), field)
