"""What networks predict: every conversion closes, agrees with the path, and says where it does not exist."""

import itertools

import pytest
import torch

from fmlightning.flow.keys import Key
from fmlightning.flow.objectives.cfm import cfm_loss, mean_square
from fmlightning.flow.objectives.weightings import EDM, AsVelocity, MinSNR, Unweighted
from fmlightning.flow.paths.predictions import (
    PREDICTIONS,
    check,
    domain,
    target,
    to_endpoints,
    to_velocity,
    velocity_coefficients,
)
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
from fmlightning.flow.shapes import expand_like
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork

SCHEDULES = [
    Linear(),
    Linear(0.1),
    IndependentCFM(0.3),
    SchrodingerBridge(0.7),
    VariancePreserving(),
    VarianceExploding(),
    Trigonometric(),
    Polynomial(2.0),
    LinearVP(),
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [1.5, -0.5]], [0.4, 0.7])


def points(n, *shape, seed=0, dtype=torch.float64):
    return torch.randn(n, *shape, generator=Key(seed).generator(), dtype=torch.float64).to(dtype)


def sample(schedule, n=8, shape=(3,), dtype=torch.float64, low=0.1, high=0.9):
    t = torch.linspace(low, high, n, dtype=torch.float64).to(dtype)
    x0, x1, eps = (points(n, *shape, seed=s, dtype=dtype) for s in range(3))
    return schedule.sample(x0, x1, t, eps)


def from_velocity(prediction, v, x, t, schedule):
    """Equation (1) of the room, in float64 and by its own hand: D, then the prediction asked for."""
    alpha, d_alpha = schedule.alpha(t), schedule.d_alpha(t)
    std, d_std = schedule.std(t), schedule.d_std(t)
    D = d_alpha * std - alpha * d_std
    alpha, d_alpha, std, d_std, D = (expand_like(c, x) for c in (alpha, d_alpha, std, d_std, D))
    return {
        "velocity": v,
        "data": (std * v - d_std * x) / D,
        "noise": (d_alpha * x - alpha * v) / D,
        "score": -(d_alpha * x - alpha * v) / D / std,
    }[prediction]


def convert(source, wanted, value, x, t, schedule):
    """From one prediction to another through the end points."""
    if wanted == "velocity":
        return to_velocity(source, value, x, t, schedule)
    ends = to_endpoints(source, value, x, t, schedule)
    if wanted == "data":
        return ends.x1
    return ends.x0 if wanted == "noise" else -ends.x0 / expand_like(schedule.std(t), x)


@every_schedule
@pytest.mark.parametrize(("first", "second"), list(itertools.product(PREDICTIONS, repeat=2)))
def test_round_trips_close_in_float32(schedule, first, second):
    """first -> second -> velocity is first -> velocity."""
    s = sample(schedule, dtype=torch.float32)
    v = points(8, 3, seed=7, dtype=torch.float32)
    there = from_velocity(first, v.double(), s.xt.double(), s.t.double(), schedule).float()
    other = convert(first, second, there, s.xt, s.t, schedule)
    back = convert(second, first, other, s.xt, s.t, schedule)
    # relative to the terms that are summed: x / std reaches 10 times the state near the ends
    scale = there.abs().amax() + (s.xt / expand_like(schedule.std(s.t), s.xt)).abs().amax()
    assert (back - there).abs().amax() <= 1e-5 * scale


@every_schedule
@every_prediction
def test_predictions_give_the_velocity_they_were_made_from(schedule, prediction):
    s = sample(schedule)
    v = points(8, 3, seed=7)
    output = from_velocity(prediction, v, s.xt, s.t, schedule)
    back = to_velocity(prediction, output, s.xt, s.t, schedule)
    torch.testing.assert_close(back, v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if not s.stochastic], ids=repr)
@every_prediction
def test_the_targets_are_the_pair_itself(schedule, prediction):
    """Without added noise the target of every prediction stands for the pair it came from."""
    s = sample(schedule, shape=(2, 3, 3))
    value = target(prediction, s, schedule)
    ends = to_endpoints(prediction, value, s.xt, s.t, schedule)
    torch.testing.assert_close(ends.x1, s.x1, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ends.x0, s.x0, rtol=1e-9, atol=1e-9)
    velocity = to_velocity(prediction, value, s.xt, s.t, schedule)
    torch.testing.assert_close(velocity, s.ut, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.stochastic], ids=repr)
def test_with_added_noise_the_targets_are_the_whole_noise(schedule):
    s = sample(schedule)
    alpha, std = expand_like(schedule.alpha(s.t), s.xt), expand_like(schedule.std(s.t), s.xt)
    whole = (s.xt - alpha * s.x1) / std
    torch.testing.assert_close(target("noise", s, schedule), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(target("score", s, schedule), -whole / std, rtol=1e-11, atol=1e-11)
    velocity = schedule.velocity(s.xt, s.x1, s.t)
    for prediction in ("data", "noise", "score"):
        value = target(prediction, s, schedule)
        torch.testing.assert_close(
            to_velocity(prediction, value, s.xt, s.t, schedule), velocity, rtol=1e-9, atol=1e-9
        )


def test_noise_eps_that_a_path_does_not_use_changes_no_target():
    s = sample(Linear(), n=2, low=0.0, high=1.0)
    assert torch.equal(target("noise", s, Linear()), s.x0)


@every_schedule
@every_prediction
def test_the_oracles_answers_stand_for_one_velocity(schedule, prediction):
    path, x = MIXTURE.along(schedule), points(8, 2)
    t = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    velocity = to_velocity(prediction, path.exact_prediction(prediction, x, t), x, t, schedule)
    torch.testing.assert_close(velocity, path.velocity(x, t), rtol=1e-8, atol=1e-8)


@every_schedule
@every_prediction
def test_the_domain_is_where_the_conversion_is_finite(schedule, prediction):
    low, high = domain(prediction, schedule)
    assert 0 <= low < high <= 1
    t = torch.linspace(low, high, 1001, dtype=torch.float64)
    assert torch.stack(velocity_coefficients(prediction, schedule, t)).isfinite().all()
    at_end = torch.tensor([0.0, 1.0], dtype=torch.float64)
    exists = torch.stack(velocity_coefficients(prediction, schedule, at_end)).isfinite().all(0)
    inside = [schedule.t_range[0] == 0, schedule.t_range[1] == 1]
    assert [low == 0, high == 1] == (exists & torch.tensor(inside)).tolist()


def test_domains_written_out():
    """Data stops at the data end, noise and score start after the source; a path may forbid more."""
    assert domain("velocity", Linear()) == (0, 1)
    assert domain("data", Linear()) == (0, 0.999)
    assert domain("data", Linear(0.1)) == (0, 1)
    assert domain("noise", Linear()) == domain("score", Linear()) == (0.001, 1)
    assert domain("noise", VariancePreserving()) == (0, 0.999)
    assert domain("noise", VarianceExploding(t_eps=0.01)) == (0, 0.99)


@pytest.mark.parametrize(
    ("prediction", "t", "end"),
    [("data", 1.0, "data end"), ("noise", 0.0, "source end"), ("score", 0.0, "source end")],
)
def test_a_velocity_that_does_not_exist_is_refused_by_time_and_prediction(prediction, t, end):
    x, times = torch.zeros(3, 2), torch.tensor([0.5, t, 0.5])
    with pytest.raises(ValueError, match=rf"'{prediction}' gives no velocity at t={t:g}: .*{end}"):
        to_velocity(prediction, x, x, times, Linear())
    with pytest.raises(ValueError, match=rf"at t={t:g}"):
        to_velocity(prediction, x, x, torch.tensor(t), Trigonometric())


@pytest.mark.parametrize(
    ("prediction", "t", "wanted"),
    [("data", 1.0, "noise"), ("noise", 0.0, "data point"), ("score", 0.0, "data point")],
)
def test_end_points_that_do_not_exist_are_refused_too(prediction, t, wanted):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=rf"'{prediction}' gives no {wanted} at t={t:g}"):
        to_endpoints(prediction, x, x, torch.tensor(t), Linear())


def test_an_unknown_prediction_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="'epsilon' is unknown; choose one of velocity, data, noise"
    ):
        check("epsilon")


@every_schedule
@every_prediction
def test_as_velocity_makes_every_loss_the_velocity_loss(schedule, prediction):
    """The weighted loss of a wrong network is the squared error of the velocity it stands for."""
    s = sample(schedule, shape=(4,))
    network = OracleNetwork(GaussianMixture([1.0], [[0.0] * 4], 1.0).along(schedule), prediction)
    loss = cfm_loss(network, schedule, s, prediction=prediction, weight=AsVelocity())
    wrong = to_velocity(
        prediction, network.path.exact_prediction(prediction, s.xt, s.t), s.xt, s.t, schedule
    )
    right = to_velocity(prediction, target(prediction, s, schedule), s.xt, s.t, schedule)
    torch.testing.assert_close(loss, mean_square(wrong - right), rtol=1e-8, atol=1e-10)


@every_schedule
@pytest.mark.parametrize("weight", [EDM(), MinSNR(), AsVelocity()], ids=repr)
def test_a_weighting_means_the_same_for_every_prediction(schedule, weight):
    """Four networks that make one mistake have one loss."""
    s = sample(schedule, shape=(4,))
    path = GaussianMixture([1.0], [[0.0] * 4], 1.0).along(schedule)
    whole = s._replace(ut=schedule.velocity(s.xt, s.x1, s.t))
    losses = [
        cfm_loss(OracleNetwork(path, p), schedule, whole, prediction=p, weight=weight)
        for p in PREDICTIONS
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-8, atol=1e-10)


def test_weightings_written_out_on_the_linear_path():
    t, linear = torch.tensor([0.25, 0.8], dtype=torch.float64), Linear()
    sigma = (1 - t) / t
    torch.testing.assert_close(AsVelocity()(t, linear, "data"), (1 - t) ** -2)
    torch.testing.assert_close(AsVelocity()(t, linear, "noise"), t**-2)
    torch.testing.assert_close(EDM(0.5)(t, linear, "data"), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    torch.testing.assert_close(MinSNR(5.0)(t, linear, "data"), (sigma**-2).clamp(max=5))
    torch.testing.assert_close(Unweighted()(t, linear, "score"), torch.ones_like(t))
    torch.testing.assert_close(AsVelocity()(t, linear, "velocity"), torch.ones_like(t))


@pytest.mark.parametrize(("make", "name"), [(EDM, "sigma_data"), (MinSNR, "gamma")])
def test_weightings_refuse_settings_by_name(make, name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        make(0.0)
