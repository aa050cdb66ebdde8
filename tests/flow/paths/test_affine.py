"""The two forms of the conditional velocity, general Gaussian paths, and what is refused."""

import pytest
import torch
from jaxtyping import TypeCheckError

from fmlightning.flow.keys import Key
from fmlightning.flow.paths.gaussian import GaussianPath
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

PLAIN = [
    Linear(),
    Linear(0.1),
    VariancePreserving(),
    VarianceExploding(),
    Trigonometric(),
    Polynomial(3.0),
    LinearVP(),
]
NOISY = [IndependentCFM(0.3), SchrodingerBridge(0.7)]


def points(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=Key(seed).generator(), dtype=torch.float64)


def times(n, seed=9):
    return 0.02 + 0.96 * torch.rand(n, generator=Key(seed).generator(), dtype=torch.float64)


@pytest.mark.parametrize("schedule", PLAIN, ids=repr)
@pytest.mark.parametrize("shape", [(2,), (3, 4, 5)], ids=str)
def test_both_forms_of_the_velocity_agree(schedule, shape):
    x0, x1, t = points(5, *shape), points(5, *shape, seed=1), times(5)
    path = schedule
    sample = path.sample(x0, x1, t)
    # float64 rounding, times the division by sigma in one form
    torch.testing.assert_close(path.velocity(sample.xt, x1, t), sample.ut, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", NOISY, ids=repr)
def test_with_added_noise_the_second_form_is_the_mean_of_the_first(schedule):
    """x0 and eps given x_t and x1 are Gaussian: regress the velocity on the noise of x_t."""
    n = 200_000
    x0, eps, x1 = points(n, 1), points(n, 1, seed=1), torch.full((n, 1), 0.8, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    path = schedule
    sample = path.sample(x0, x1, t, eps)
    left = sample.ut - path.velocity(sample.xt, x1, t)
    # the remainder is uncorrelated with x_t: 4 standard errors of a mean of n products
    for product in (left, left * sample.xt):
        assert product.mean().abs() < 4 * product.std() / n**0.5


@pytest.mark.parametrize("schedule", [*PLAIN, *NOISY], ids=repr)
def test_the_velocity_is_the_derivative_of_the_point(schedule):
    x0, x1, eps, t = points(4, 3), points(4, 3, seed=1), points(4, 3, seed=2), times(4)
    path = schedule
    _, slope = torch.func.jvp(lambda t: path.sample(x0, x1, t, eps).xt, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.sample(x0, x1, t, eps).ut, slope, rtol=1e-11, atol=1e-11)


def test_a_time_for_each_sample_is_not_a_factor_on_the_last_axis():
    x0, x1, t = points(4, 3, 4, 4), points(4, 3, 4, 4, seed=1), times(4)
    together = Trigonometric().sample(x0, x1, t)
    for k in range(4):
        alone = Trigonometric().sample(x0[k : k + 1], x1[k : k + 1], t[k])
        torch.testing.assert_close(together.xt[k : k + 1], alone.xt, rtol=1e-15, atol=0)


@pytest.mark.parametrize("schedule", [*PLAIN[:3], PLAIN[4]], ids=repr)
@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)], ids=str)
def test_gaussian_path_with_a_schedules_curves_is_the_affine_path(schedule, shape):
    general = GaussianPath(
        lambda x1, t: expand_like(schedule.alpha(t), x1) * x1,
        lambda x1, t: schedule.sigma(t),
        end_tolerance=0.1,  # sigma_min of one of them
    )
    x0, x1, t = points(4, *shape), points(4, *shape, seed=1), times(4)
    ours, theirs = general.sample(x0, x1, t), schedule.sample(x0, x1, t)
    torch.testing.assert_close(ours.xt, theirs.xt, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.ut, theirs.ut, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(general.velocity(ours.xt, x1, t), theirs.ut, rtol=1e-10, atol=1e-10)


def test_gaussian_path_may_bend_and_shrink_with_the_data():
    """A mean on a circle and a scale that depends on the point, written out by hand."""

    def mu(x1, t):
        angle = torch.pi / 2 * t[:, None]
        turned = torch.stack((-x1[:, 1], x1[:, 0]), 1)
        return torch.sin(angle) * x1 + torch.sin(2 * angle) * turned

    def sigma(x1, t):
        return (1 - t) / (1 + x1.square().sum(1) * t)

    path = GaussianPath(mu, sigma)
    x0, x1, t = points(6, 2), points(6, 2, seed=1), times(6)
    sample = path.sample(x0, x1, t)
    h = 1e-5
    slope = (path.sample(x0, x1, t + h).xt - path.sample(x0, x1, t - h).xt) / (2 * h)
    # central differences: h^2 times the third derivative, and 1e-16 / h of rounding
    torch.testing.assert_close(sample.ut, slope, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(path.velocity(sample.xt, x1, t), sample.ut, rtol=1e-10, atol=1e-10)
    later = path.sample(x0, x1, torch.ones_like(t))
    torch.testing.assert_close(later.xt, x1, rtol=0, atol=1e-15)


def test_gaussian_path_takes_one_time_for_the_batch():
    path = GaussianPath(lambda x1, t: t * x1, lambda x1, t: 1 - t)
    x0, x1, t = points(3, 2), points(3, 2, seed=1), torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(path.sample(x0, x1, t).ut, x1 - x0, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "path",
    [Linear(), GaussianPath(lambda x1, t: x1, lambda x1, t: t)],
    ids=["affine", "gaussian"],
)
@pytest.mark.parametrize(
    ("x0", "t", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4), r"3, ?2"),
        (torch.zeros(4, 2), torch.zeros(2), r"one for each sample|f32\[2\]"),
        (torch.zeros(4, 2), torch.full((4,), 1.5), r"from 1\.5 to 1\.5 must lie in \[0, 1\]"),
        (torch.zeros(4, 2), torch.full((4,), torch.nan), "must lie in"),
    ],
)
def test_shapes_and_times_that_do_not_fit_are_refused(path, x0, t, message):
    # the shape check of the annotations, where it is switched on, comes first
    with pytest.raises((ValueError, TypeCheckError), match=message):
        path.sample(x0, torch.zeros(4, 2), t)


@pytest.mark.parametrize("schedule", NOISY, ids=repr)
def test_a_path_with_noise_of_its_own_asks_for_it(schedule):
    path, x = schedule, torch.zeros(4, 2)
    with pytest.raises(ValueError, match="pass eps"):
        path.sample(x, x, torch.full((4,), 0.5))
    with pytest.raises(ValueError, match="pass eps"):
        path.start(x, 0.5)


def test_the_start_law_has_the_variance_of_the_path():
    n = 100_000
    for schedule in (*PLAIN, *NOISY):
        t = schedule.t_range[0]
        x = schedule.start(points(n, 1), t, points(n, 1, seed=1))
        variance = schedule.variance(torch.tensor(t, dtype=torch.float64))
        # a sample variance of n normal numbers has a relative standard error of sqrt(2 / n)
        assert float(x.var() / variance) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
