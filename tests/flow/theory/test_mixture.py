"""The oracle against numerical integration, autograd, exact arithmetic and its own samples."""

from decimal import Decimal, getcontext

import pytest
import torch
from jaxtyping import TypeCheckError

from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField, evaluate
from fmlightning.flow.objectives.cfm import cfm_loss
from fmlightning.flow.paths.predictions import PREDICTIONS
from fmlightning.flow.paths.schedules import (
    IndependentCFM,
    Linear,
    SchrodingerBridge,
    VarianceExploding,
    VariancePreserving,
)
from fmlightning.flow.theory import mixture as room
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork
from fmlightning.flow.theory.theorems import LINE, PLANE, POINTS, SCHEDULES, label
from fmlightning.flow.toys import EightGaussians

F64 = torch.float64
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=label)


def generator(*names):
    return Key(1).fold(*names).generator()


def scalar(t):
    return torch.tensor(t, dtype=F64)


def batch(schedule, n=64, shape=(2,), mixture=PLANE):
    """Likely and unlikely points at times off the ends."""
    g = generator("batch")
    low, high = schedule.t_range
    t = low + (high - low) * (0.02 + 0.96 * torch.rand(n, generator=g, dtype=F64))
    x1 = mixture.sample((n, *shape), g, F64)
    noise = torch.randn(n, *shape, generator=g, dtype=F64)
    grow = (n, *(1,) * len(shape))
    return schedule.alpha(t).reshape(grow) * x1 + 2 * schedule.std(t).reshape(grow) * noise, t


def integrals(schedule, x, t, nodes=1501):
    """p_t(x), E[u_t | x], E[x1 | x] and Var[u_t | x] by summing over x1 and eps; x0 is what is left.

    Only the definition of the path enters: x_t = alpha x1 + sigma x0 + gamma eps and its derivative.
    """
    alpha, sigma, gamma, d_alpha, d_sigma, d_gamma = (float(c) for c in schedule(scalar(t)))
    x1 = torch.linspace(-6, 6, nodes, dtype=F64)[:, None]
    eps = torch.linspace(-8, 8, 201 if gamma else 1, dtype=F64)[None]
    cell = (x1[1, 0] - x1[0, 0]) * (eps[0, 1] - eps[0, 0] if gamma else 1)
    normal = torch.distributions.Normal(scalar(0.0), scalar(1.0))
    data = torch.distributions.Normal(LINE.means[:, 0], LINE.stds)
    q = (LINE.weights * data.log_prob(x1).exp()).sum(1, keepdim=True)
    eps = eps if gamma else torch.zeros(1, 1, dtype=F64)
    x0 = (x - alpha * x1 - gamma * eps) / sigma
    weight = q * normal.log_prob(x0).exp() / sigma * cell
    weight = weight * normal.log_prob(eps).exp() if gamma else weight
    p = weight.sum()
    u = d_alpha * x1 + d_sigma * x0 + d_gamma * eps
    mean_u = (weight * u).sum() / p
    mean_x1 = (weight * x1).sum() / p
    return p, mean_u, mean_x1, (weight * (u - mean_u) ** 2).sum() / p


@every_schedule
@pytest.mark.parametrize("t", [0.15, 0.5, 0.85])
def test_closed_forms_are_the_integrals_they_stand_for(schedule, t):
    path = LINE.along(schedule)
    std = float(path.marginal(t).stds.max())
    for x in (-1.1 * std, 0.3 * std, 2.0 * std):
        p, u, x1, variance = integrals(schedule, x, t)
        at = torch.tensor([[x]], dtype=F64), torch.tensor([t], dtype=F64)
        closed = path.log_prob(*at).exp(), path.velocity(*at), path.data(*at), path.spread(*at)
        for value, truth in zip(closed, (p, u, x1, variance), strict=True):
            # the integrals are cut at 6 and 8 standard deviations
            torch.testing.assert_close(value.squeeze(), truth, rtol=1e-7, atol=1e-9)


@every_schedule
def test_score_and_divergence_are_derivatives(schedule):
    path = PLANE.along(schedule)
    x, t = batch(schedule)
    x.requires_grad_()
    (score,) = torch.autograd.grad(path.log_prob(x, t).sum(), x)
    u = path.velocity(x, t)
    div = sum(torch.autograd.grad(u[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    # rounding, relative to the largest of the batch
    torch.testing.assert_close(
        path.score(x, t), score, rtol=1e-10, atol=1e-10 * float(score.abs().max())
    )
    torch.testing.assert_close(
        path.divergence(x, t), div, rtol=1e-10, atol=1e-10 * float(div.abs().max())
    )


@every_schedule
def test_noise_and_data_make_up_the_point(schedule):
    """x = alpha E[x1 | x] + std E[x0 | x]."""
    path = PLANE.along(schedule)
    x, t = batch(schedule)
    alpha, std = schedule.alpha(t)[:, None], schedule.std(t)[:, None]
    torch.testing.assert_close(alpha * path.data(x, t) + std * path.noise(x, t), x)


@pytest.mark.parametrize(
    "schedule", [Linear(), IndependentCFM(0.3), VarianceExploding()], ids=label
)
def test_fifty_standard_deviations_out_the_values_are_right(schedule):
    """Against 60-digit arithmetic: every exp underflows in float64."""
    getcontext().prec = 60
    t, path = 0.7, LINE.along(schedule)
    law = path.marginal(t)
    x = float(law.means.max() + 50 * law.stds.max())
    terms = [
        Decimal(w) * (-(((Decimal(x) - Decimal(m)) / Decimal(s)) ** 2) / 2).exp() / Decimal(s)
        for w, m, s in zip(
            law.weights.tolist(), law.means[:, 0].tolist(), law.stds.tolist(), strict=True
        )
    ]
    log_p = float(sum(terms).ln()) - float(torch.log(torch.tensor(2 * torch.pi, dtype=F64))) / 2
    r = torch.tensor([float(term / sum(terms)) for term in terms], dtype=F64)
    at = torch.tensor([[x]], dtype=F64), torch.tensor([t], dtype=F64)
    assert float(path.log_prob(*at)) == pytest.approx(log_p, rel=1e-13)
    assert float(path.log_prob(*at)) < -1000
    # responsibilities inherit the rounding of log-densities of about 1250
    torch.testing.assert_close(path.responsibilities(*at)[0], r, rtol=1e-9, atol=1e-12)
    for value in (path.velocity, path.score, path.data, path.noise, path.divergence, path.spread):
        assert value(*at).isfinite().all()


@every_schedule
def test_a_component_far_from_the_others_is_left_alone(schedule):
    """Beside one mode, 100 deviations from the next, the velocity is that of the mode's own Gaussian."""
    alone = GaussianMixture([1.0], [[40.0, 0.0]], 0.4).along(schedule)
    both = GaussianMixture([0.5, 0.5], [[40.0, 0.0], [-40.0, 0.0]], 0.4).along(schedule)
    t = torch.full((9,), 0.95, dtype=F64)
    x = alone.marginal(0.95).sample((9, 2), generator("alone"), F64)
    torch.testing.assert_close(both.velocity(x, t), alone.velocity(x, t), rtol=1e-12, atol=1e-12)


@every_schedule
def test_the_law_at_a_time_is_the_law_of_the_path(schedule):
    """In density, and in the first two moments of points made from the path's definition."""
    path, n = PLANE.along(schedule), 40_000
    for t in (schedule.t_range[0], 0.4, schedule.t_range[1]):
        g = generator("law", str(t))
        x0, eps = torch.randn(2, n, 2, generator=g, dtype=F64)
        xt = schedule.sample(x0, PLANE.sample((n, 2), g, F64), scalar(t), eps).xt
        drawn = path.marginal(t).sample((n, 2), g, F64)
        torch.testing.assert_close(path.marginal(t).log_prob(xt), path.log_prob(xt, scalar(t)))
        for power in (1, 2):
            a, b = xt**power, drawn**power
            error = ((a.var(0) + b.var(0)) / n).sqrt()
            assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all()


def test_end_laws():
    """Diffusion paths carry data in their start; blurring paths leave their noise at the end."""
    exploding = PLANE.along(VarianceExploding())
    std = exploding.start().stds
    torch.testing.assert_close(exploding.marginal(0.0).means, PLANE.means)
    torch.testing.assert_close(exploding.marginal(0.0).stds ** 2, PLANE.stds**2 + std**2)
    preserving = PLANE.along(VariancePreserving())
    torch.testing.assert_close(
        preserving.marginal(0.0).means, 0.00657 * PLANE.means, rtol=1e-3, atol=0
    )
    blurred = PLANE.along(IndependentCFM(0.3))
    torch.testing.assert_close(blurred.marginal(1.0).stds ** 2, PLANE.stds**2 + 0.09)
    torch.testing.assert_close(blurred.start().stds ** 2, torch.tensor([1.09], dtype=F64))
    torch.testing.assert_close(
        PLANE.along(Linear(0.1)).marginal(1.0).stds ** 2, PLANE.stds**2 + 0.01
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "schedule", [Linear(), IndependentCFM(0.3), SchrodingerBridge(), VarianceExploding()], ids=label
)
def test_spread_is_the_conditional_loss_minus_the_true_one(schedule, prediction):
    """For a network that is wrong, in every parameterisation: 4 standard errors."""
    n, g, path = 40_000, generator("spread"), PLANE.along(schedule)
    x0, eps = torch.randn(2, n, 2, generator=g, dtype=F64)
    t = 0.2 + 0.6 * torch.rand(n, generator=g, dtype=F64)
    sample = schedule.sample(x0, PLANE.sample((n, 2), g, F64), t, eps)

    def network(x, t):
        return 0.3 * x.flip(1) + t[:, None]

    cfm = cfm_loss(network, schedule, sample, prediction=prediction)
    fm = path.fm_loss(
        lambda x, t: evaluate(network, schedule, x, t), sample.xt, sample.t, prediction
    )
    left = cfm - fm - path.spread(sample.xt, sample.t, prediction)
    assert left.mean().abs() < 4 * left.std() / n**0.5


@every_schedule
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_oracle_as_a_network_has_no_error(schedule, prediction):
    path = PLANE.along(schedule)
    x, t = batch(schedule)
    field = NetworkField(OracleNetwork(path, prediction), schedule, prediction)
    # conversions divide by alpha or std, down to about 1e-2 here
    torch.testing.assert_close(field(x, t), path.velocity(x, t), rtol=1e-9, atol=1e-9)


def test_a_finite_data_set():
    points = GaussianMixture.of_points(POINTS.means)
    assert torch.equal(points.weights, torch.full((12,), 1 / 12, dtype=F64))
    path = points.along(Linear())
    assert path.t_range == (0.0, 1 - 1e-3)
    x = points.sample((200, 2), generator("points"), F64)
    distance = (x[:, None] - points.means).norm(dim=2)
    assert (distance.min(1).values == 0).all()
    near = scalar(1 - 1e-6)
    torch.testing.assert_close(path.data(x + 1e-7, near), x, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no density"):
        points.log_prob(x)
    with pytest.raises(ValueError, match="t_range"):
        path.velocity(x, scalar(1.0))


def test_eight_gaussians_are_a_mixture():
    toy = EightGaussians(radius=3.0, std=0.4)
    mixture, g = GaussianMixture.of_eight_gaussians(toy), generator("eight")
    x = 2 * toy.sample((500, 2), g, F64)
    torch.testing.assert_close(mixture.log_prob(x), toy.log_prob(x))


def test_samples_follow_the_weights_and_their_row():
    n = 40_000
    streams = Key(3).streams(torch.arange(n))
    x = PLANE.sample_keyed(streams, (2,), F64)
    nearest = PLANE.log_prob(x)
    part = PLANE.sample_keyed(Key(3).streams(torch.arange(100, 107)), (2,), F64)
    assert torch.equal(part, x[100:107])
    # E[-log q] from keyed samples and from a generator agree within 4 standard errors
    other = PLANE.log_prob(PLANE.sample((n, 2), generator("weights"), F64))
    error = ((nearest.var() + other.var()) / n).sqrt()
    assert (nearest.mean() - other.mean()).abs() < 4 * error
    mean = (PLANE.weights[:, None] * PLANE.means).sum(0)
    assert ((x.mean(0) - mean).abs() < 4 * x.std(0) / n**0.5).all()


def test_images_are_vectors_in_another_shape():
    flat = GaussianMixture(PLANE.weights, torch.cat((PLANE.means, PLANE.means.flip(1)), 1), 0.5)
    image = GaussianMixture(PLANE.weights, flat.means.reshape(3, 1, 2, 2), 0.5)
    a, b = flat.along(Linear()), image.along(Linear())
    x, t = batch(
        Linear(), 2, (4,), flat
    )  # width and batch agree: a wrong broadcast would not raise
    y = x.reshape(2, 1, 2, 2)
    for name in ("velocity", "score", "data", "noise"):
        got = getattr(b, name)(y, t)
        assert got.shape == y.shape
        torch.testing.assert_close(got.flatten(1), getattr(a, name)(x, t))
    for name in ("log_prob", "divergence", "spread", "responsibilities"):
        torch.testing.assert_close(getattr(b, name)(y, t), getattr(a, name)(x, t))


def test_chunks_change_nothing(monkeypatch):
    path = PLANE.along(VariancePreserving())
    x, t = batch(path.path, 50)
    names = ("velocity", "log_prob", "divergence", "spread", "data", "responsibilities")
    whole = [getattr(path, name)(x, t) for name in names]
    single = path.velocity(x, scalar(0.3))
    monkeypatch.setattr(room, "CHUNK", 7 * PLANE.means.numel())
    for name, value in zip(names, whole, strict=True):
        assert torch.equal(getattr(path, name)(x, t), value)
    assert torch.equal(path.velocity(x, scalar(0.3)), single)


def test_precision_follows_the_points_even_under_autocast():
    path = PLANE.along(Linear())
    x, t = batch(Linear())
    exact = path.velocity(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        single = path.velocity(x.float(), t.float())
    assert single.dtype == torch.float32
    # float32 rounding of points up to 5 at responsibilities as steep as 1 / V
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("weights", "means", "stds", "message"),
    [
        ([0.5, 0.6], [[0.0], [1.0]], 1.0, "sum to one"),
        ([1.5, -0.5], [[0.0], [1.0]], 1.0, "positive"),
        ([0.5, 0.5], [[0.0], [1.0]], [1.0, -0.1], "negative"),
        ([0.5, 0.5], [[0.0]], 1.0, "do not match"),
        ([0.5, 0.5], [0.0, 1.0], 1.0, "do not match"),
        ([0.5, 0.5], [[0.0], [1.0]], [1.0, 1.0, 1.0], "stds"),
        ([float("nan"), 0.5], [[0.0], [1.0]], 1.0, "sum to one"),
        ([0.5, 0.5], [[0.0], [float("nan")]], 1.0, "means must be finite"),
        ([0.5, 0.5], [[0.0], [float("inf")]], 1.0, "means must be finite"),
        ([0.5, 0.5], [[0.0], [1.0]], float("nan"), "stds must be finite"),
        ([0.5, 0.5], [[0.0], [1.0]], float("inf"), "stds must be finite"),
    ],
)
def test_a_mixture_that_is_none_is_refused(weights, means, stds, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(weights, means, stds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [3, 10, 1000])
def test_weights_are_not_refused_for_their_rounding(K, dtype):
    """They sum to one in the precision they come in, and exactly in the one they are used in."""
    weights = torch.rand(K, generator=generator("rounding"), dtype=F64) + 0.1
    weights = (weights / weights.sum()).to(dtype)
    for precision in (dtype, F64):
        mixture = GaussianMixture(weights, torch.arange(K).to(precision)[:, None], 0.5)
        law = mixture.along(Linear()).marginal(0.5)
        assert float(law.weights.sum()) == pytest.approx(1, abs=1e-14)
        assert float(mixture.to(scalar(0.0)).weights.sum()) == pytest.approx(1, abs=1e-14)
        close = torch.finfo(dtype).eps  # of the weights' own rounding, and of their sum
        torch.testing.assert_close(law.weights, weights.double(), rtol=2 * close, atol=0)


def test_weights_that_are_off_by_more_than_rounding_are_refused():
    with pytest.raises(ValueError, match="sum to one"):
        GaussianMixture(torch.tensor([0.5, 0.48], dtype=torch.bfloat16), [[0.0], [1.0]], 1.0)
    with pytest.raises(ValueError, match="sum to one"):
        GaussianMixture([0.5, 0.499], [[0.0], [1.0]], 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_points_are_answered_or_refused_however_far_away(dtype):
    """Far out the widest component rules, x1 is a part of x, and what cannot be squared is refused."""
    path, t = PLANE.along(Linear()), torch.tensor(0.5, dtype=dtype)
    k = int(PLANE.stds.argmax())
    V = 0.25 * PLANE.stds[k] ** 2 + 0.25
    for far in (1e6, 1e12, 1e18):
        x = torch.tensor([[far, -0.3 * far], [0.1, 0.2]], dtype=dtype)
        slope = float((0.5 * PLANE.stds[k] ** 2 - 0.5) / V)
        # the means, of size one, are lost beside a million
        torch.testing.assert_close(path.velocity(x, t)[0], slope * x[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(path.score(x, t)[0], -x[0] / float(V), rtol=1e-5, atol=0)
        assert path.data(x, t).isfinite().all()
        assert path.divergence(x, t).isfinite().all()
    x = torch.full((2, 2), 1e20 if dtype == torch.float32 else 1e160, dtype=dtype)
    message = {
        torch.float32: "overflows float32.*or float64",
        F64: "overflows float64: pass nearer",
    }
    for name in ("velocity", "score", "log_prob", "responsibilities"):
        with pytest.raises(ValueError, match=message[dtype]):
            getattr(path, name)(x, t)


@pytest.mark.parametrize("t", [-0.1, 1.001, float("nan")])
def test_a_time_outside_the_path_is_refused(t):
    path = PLANE.along(Linear())
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        path.velocity(torch.zeros(3, 2, dtype=F64), scalar(t))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        path.marginal(t)


def test_other_input_that_is_refused():
    path, t = PLANE.along(Linear()), scalar(0.5)
    with pytest.raises(ValueError, match="shape"):
        path.velocity(torch.zeros(3, 4, dtype=F64), t)
    with pytest.raises((ValueError, TypeCheckError)):
        path.velocity(torch.zeros(3, 2, dtype=F64), torch.full((2,), 0.5, dtype=F64))
    with pytest.raises((ValueError, TypeCheckError), match="prediction"):
        OracleNetwork(path, "speed")
    with pytest.raises(ValueError, match="labels"):
        OracleNetwork(path)(torch.zeros(3, 2, dtype=F64), t, torch.zeros(3, dtype=torch.long))
