"""From network to samples: training without a framework, keyed generation, every prediction to the end."""

import math

import pytest
import torch
from torch import nn

from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField, evaluate
from fmlightning.flow.objectives.cfm import cfm_loss
from fmlightning.flow.paths.predictions import PREDICTIONS
from fmlightning.flow.paths.schedules import (
    IndependentCFM,
    Linear,
    LinearVP,
    Polynomial,
    SchrodingerBridge,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import generate, path_noise, source_points
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork
from fmlightning.flow.toys import EightGaussians, Moons

MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [1.5, -0.5]], [0.4, 0.7])
SCHEDULES = [
    Linear(),
    Linear(0.1),
    IndependentCFM(0.2),
    SchrodingerBridge(0.5),
    VariancePreserving(),
    VarianceExploding(sigma_max=20.0),
    Trigonometric(),
    Polynomial(2.0),
    LinearVP(),
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def exact(schedule, prediction="velocity"):
    return NetworkField(OracleNetwork(MIXTURE.along(schedule), prediction), schedule, prediction)


def energy_distance(x, y):
    return 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


def test_a_flow_is_trained_and_sampled_in_plain_torch():
    path, source, data, key = Linear(), EightGaussians(), Moons(), Key(0)
    init = key.fold("init").generator()
    network = Plain(64, init)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(1500):
        g = key.fold("train", step).generator()
        x0, x1, t = (
            source.sample((256, 2), g),
            data.sample((256, 2), g),
            torch.rand(256, generator=g),
        )
        loss = cfm_loss(network, path, path.sample(x0, x1, t)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x0 = source_points(source, 0, torch.arange(1000), (2,))
    x1 = generate(NetworkField(network, path), x0, ODESolver("midpoint", 20)).x
    truth = data.sample((1000, 2), key.fold("test").generator())
    # a factor of 15 after this short training, of which half is kept as margin for other machines
    assert energy_distance(x1, truth) < energy_distance(x0, truth) / 8


class Plain(nn.Module):
    """A small network of (x, t), with weights from a generator."""

    def __init__(self, width, generator):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        for layer in self.layers[::2]:
            nn.init.normal_(layer.weight, 0.0, layer.in_features**-0.5, generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y=None):
        return self.layers(torch.cat((x, t[:, None]), 1))


def by_batches(field, solver, size, n=64):
    """Samples 0 to n - 1, in batches; of single ones, three."""
    index = torch.arange(n) if size > 1 else torch.tensor([0, 37, 63])
    points = [source_points(Gaussian(), 5, part, (2,)) for part in index.split(size)]
    return index, torch.cat([generate(field, x0, solver).x for x0 in points])


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_sample_k_is_the_same_at_any_batch_size_with_fixed_steps(size, prediction):
    field, solver = exact(Linear(), prediction), ODESolver("heun2", 20)
    _, whole = by_batches(field, solver, 64)
    index, parts = by_batches(field, solver, size)
    # float32 sums in another order
    torch.testing.assert_close(parts, whole[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7])
def test_sample_k_is_the_same_to_the_tolerance_with_adaptive_steps(size):
    field, solver = exact(Linear()), ODESolver("dopri5", rtol=1e-5, atol=1e-5)
    _, whole = by_batches(field, solver, 64)
    index, parts = by_batches(field, solver, size)
    # the error of a step, times the number of steps and the growth of the flow
    torch.testing.assert_close(parts, whole[index], rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [1, 7])
def test_a_trained_networks_samples_do_not_depend_on_the_batch_either(size):
    field = NetworkField(Plain(32, Key(1).generator()), Trigonometric())
    solver = ODESolver("rk4", 10)
    _, whole = by_batches(field, solver, 64)
    index, parts = by_batches(field, solver, size)
    torch.testing.assert_close(parts, whole[index], rtol=0, atol=1e-5)


@every_schedule
@every_prediction
@pytest.mark.parametrize("method", ["heun2", "dopri5"])
def test_every_prediction_is_sampled_to_the_end(schedule, prediction, method):
    """Solvers that look at both ends of the domain, the exact network, and the last step to the data."""
    field = exact(schedule, prediction)
    seen = []
    field.network.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1][0])))
    x0, index = source_points(Gaussian(), 0, torch.arange(8), (2,)), torch.arange(8)
    solution = generate(
        field,
        x0,
        ODESolver(method, 30, rtol=1e-4, atol=1e-4),
        eps=path_noise(schedule, 0, index, (2,)),
    )
    low, high = field.t_range
    assert solution.nfe == len(seen)
    assert (min(seen), max(seen)) == (pytest.approx(low), pytest.approx(high))
    assert solution.x.isfinite().all()
    assert solution.x.abs().max() < 5


@every_schedule
@every_prediction
def test_samples_of_the_exact_network_have_the_law_of_the_data(schedule, prediction):
    n = 1000
    index = torch.arange(n)
    x0, eps = source_points(Gaussian(), 0, index, (2,)), path_noise(schedule, 0, index, (2,))
    x = generate(exact(schedule, prediction), x0, ODESolver("rk4", 30), eps=eps).x.double()
    law = MIXTURE.along(schedule).marginal(1.0)
    mean = (law.weights[:, None] * law.means).sum(0)
    variance = (law.weights[:, None] * (law.means**2 + law.stds[:, None] ** 2)).sum(0) - mean**2
    # four standard errors, and the floor of paths that do not start at pure noise
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=4 * 1.3 / n**0.5 + 0.01)
    torch.testing.assert_close(x.var(0), variance, rtol=0, atol=4 * 1.7 * 1.5 / n**0.5 + 0.02)


def test_the_last_step_is_taken_only_where_the_field_stops_short_and_is_counted():
    x0, solver = source_points(Gaussian(), 0, torch.arange(4), (2,)), ODESolver("euler", 10)
    assert generate(exact(Linear()), x0, solver).nfe == 10
    assert generate(exact(Linear(), "data"), x0, solver).nfe == 11


def test_states_on_the_way_come_without_a_second_solve():
    x0, solver = source_points(Gaussian(), 0, torch.arange(4), (2,)), ODESolver("euler", 10)
    solution = generate(exact(Linear()), x0, solver, save_at=3)
    assert solution.nfe == 10
    assert solution.times.tolist() == [0, 0.5, 1]
    assert torch.equal(solution.states[0], x0)
    assert torch.equal(solution.states[-1], solution.x)


def test_a_path_with_noise_of_its_own_starts_with_it():
    x0, schedule = source_points(Gaussian(), 0, torch.arange(4), (2,)), IndependentCFM(0.2)
    with pytest.raises(ValueError, match="pass noise"):
        generate(exact(schedule), x0, ODESolver("euler", 2))
    assert path_noise(Linear(), 0, torch.arange(4), (2,)) is None
    noise = path_noise(schedule, 0, torch.arange(4), (2,))
    assert not torch.allclose(noise, x0)
    assert torch.equal(noise[2:], path_noise(schedule, 0, torch.arange(2, 4), (2,)))


class Recorder(nn.Module):
    def forward(self, x, t, y=None, streams=None):
        self.seen = x, t, y, streams
        return x


def test_the_network_sees_a_time_for_each_sample_and_the_scaled_input():
    network, x = Recorder(), torch.ones(3, 2)
    schedule = VarianceExploding()
    streams = Key(0).streams(torch.arange(3))
    evaluate(network, schedule, x, torch.tensor(0.5), torch.tensor([0, 1, 2]), streams)
    seen_x, seen_t, seen_y, seen_streams = network.seen
    sigma = schedule.sigma(torch.tensor(0.5))
    torch.testing.assert_close(seen_x, x / math.sqrt(1 + float(sigma) ** 2))
    assert seen_t.shape == (3,)
    assert seen_y.tolist() == [0, 1, 2]
    assert seen_streams is streams


@every_prediction
def test_the_exploding_path_keeps_network_inputs_of_unit_size(prediction):
    schedule, n = VarianceExploding(), 4000
    x1, x0 = torch.randn(2, n, 2, generator=Key(0).generator())
    sample = schedule.sample(x0, x1, torch.linspace(0, 0.999, n))
    network = Recorder()
    evaluate(network, schedule, sample.xt, sample.t)
    # 4 standard errors of a second moment
    assert network.seen[0].square().mean() == pytest.approx(1, abs=4 * (2 / (2 * n)) ** 0.5)


def test_labels_are_given_once_to_a_field():
    field, x = NetworkField(Recorder(), Linear()), torch.zeros(3, 2)
    y = torch.tensor([2, 0, 1])
    field.given(y)(x, torch.tensor(0.5))
    assert field.network.seen[2] is y
    field.given(None)(x, torch.tensor(0.5))
    assert field.network.seen[2] is None


@every_schedule
@every_prediction
def test_the_data_expected_is_the_oracles(schedule, prediction):
    x = torch.randn(8, 2, generator=Key(0).generator(), dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    expected = MIXTURE.along(schedule).data(x, t)
    torch.testing.assert_close(
        exact(schedule, prediction).data(x, t), expected, rtol=1e-8, atol=1e-8
    )


def test_an_unknown_prediction_is_refused_when_the_field_is_made():
    with pytest.raises((ValueError, TypeError), match="epsilon"):
        NetworkField(Recorder(), Linear(), "epsilon")
