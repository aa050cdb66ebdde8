"""The curves of every path against autodiff, their ends, and their signal-to-noise ratios."""

import math

import pytest
import torch

from fmlightning.flow.paths.affine import AffinePath, bisect
from fmlightning.flow.paths.schedules import (
    Curves,
    IndependentCFM,
    Linear,
    LinearVP,
    Polynomial,
    SchrodingerBridge,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)

SCHEDULES = {
    "linear": Linear(),
    "linear sigma_min": Linear(sigma_min=0.1),
    "icfm": IndependentCFM(noise_std=0.3),
    "bridge": SchrodingerBridge(noise_std=0.7),
    "vp": VariancePreserving(),
    "vp beta_min=0": VariancePreserving(beta_min=0.0, beta_max=5.0),
    "ve": VarianceExploding(),
    "trigonometric": Trigonometric(),
    "polynomial 2": Polynomial(n=2.0),
    "polynomial 1.5": Polynomial(n=1.5),
    "linear vp": LinearVP(),
    "curves": Curves(lambda t: t**2 * (3 - 2 * t), lambda t: (1 - t) ** 2),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
INSIDE = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


def autodiff(curve, t):
    t = t.clone().requires_grad_()
    value = curve(t)
    return torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)


@every
@pytest.mark.parametrize("name", ["alpha", "sigma", "gamma", "std"])
def test_derivatives_are_those_of_autodiff(schedule, name):
    written = getattr(schedule, f"d_{name}")(INSIDE)
    # float64 rounding: factors of up to 50 log(5000) in the exploding path
    torch.testing.assert_close(
        written, autodiff(getattr(schedule, name), INSIDE), rtol=1e-11, atol=1e-12
    )


@every
def test_half_d_variance_is_half_the_derivative_of_the_variance(schedule):
    truth = autodiff(schedule.variance, INSIDE) / 2
    torch.testing.assert_close(schedule.half_d_variance(INSIDE), truth, rtol=1e-11, atol=1e-12)


@every
def test_half_d_variance_is_finite_at_the_ends_and_continuous(schedule):
    for dtype in (torch.float32, torch.float64):
        assert schedule.half_d_variance(ENDS.to(dtype)).isfinite().all()
    near = torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
    # the steepest is t^1.5, whose derivative grows like 1.5 sqrt(t): 5e-5 at t = 1e-9
    torch.testing.assert_close(
        schedule.half_d_variance(ENDS), schedule.half_d_variance(near), rtol=1e-6, atol=1e-4
    )


@every
def test_the_path_ends_at_the_data(schedule):
    alpha, sigma, gamma, *_ = schedule(ENDS)
    left = getattr(schedule, "sigma_min", 0.0) if isinstance(schedule, Linear) else 0.0
    assert alpha[1] == 1
    assert sigma[1] == pytest.approx(left, abs=1e-15)
    assert gamma[1] == (0.3 if isinstance(schedule, IndependentCFM) else 0)


@every
def test_the_path_starts_at_the_source(schedule):
    alpha, sigma, gamma, *_ = schedule(ENDS)
    start = {
        VariancePreserving: math.exp(-schedule.integrated_rate(ENDS)[0] / 2)
        if isinstance(schedule, VariancePreserving)
        else 0.0,
        VarianceExploding: 1.0,
    }.get(type(schedule), 0.0)
    assert alpha[0] == pytest.approx(start, rel=1e-12)
    if not isinstance(schedule, VarianceExploding):
        assert sigma[0] == pytest.approx(math.sqrt(1 - start**2), rel=1e-12)
    assert gamma[0] == (0.3 if isinstance(schedule, IndependentCFM) else 0)


def test_published_values_of_the_diffusion_paths():
    t = torch.zeros((), dtype=torch.float64)
    # Song et al. 2021: exp(-(0.1 + 20) / 4)
    assert VariancePreserving().alpha(t) == pytest.approx(math.exp(-5.025), rel=1e-12)
    assert VarianceExploding().sigma(t) == pytest.approx(math.sqrt(50**2 - 0.01**2), rel=1e-12)
    # the largest target: sigma_max log(sigma_max / sigma_min)
    assert -VarianceExploding().d_sigma(t) == pytest.approx(50 * math.log(5000), rel=1e-6)


@pytest.mark.parametrize("name", ["vp", "vp beta_min=0", "trigonometric", "linear vp"])
def test_variance_preserving_paths_preserve_variance(name):
    alpha, sigma, *_ = SCHEDULES[name](INSIDE)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-14, atol=0)


def test_singular_ends_are_outside_the_interval_and_no_others():
    """E|u_t|^2 is finite at an end exactly if every derivative is."""
    for name, schedule in SCHEDULES.items():
        low, high = schedule.t_range
        regular = torch.stack(schedule(ENDS)[3:]).isfinite().all(0).tolist()
        assert [low == 0, high == 1] == regular, name
        assert torch.stack(schedule(torch.tensor(schedule.t_range))).isfinite().all(), name


@pytest.mark.parametrize(
    "make", [VariancePreserving, VarianceExploding, LinearVP, SchrodingerBridge]
)
def test_the_margin_is_named_and_can_be_chosen(make):
    assert make().t_range[1] == 1 - 1e-3
    assert make(t_eps=0.01).t_range[1] == 0.99
    with pytest.raises(ValueError, match=r"t_eps=0\.0"):
        make(t_eps=0.0)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_snr_inverse_undoes_snr(schedule, dtype):
    t = INSIDE.to(dtype)
    # alpha and sigma are rounded, and a flat ratio magnifies that by alpha / alpha' / t: at most 100 here
    tolerance = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        schedule.alpha_over_sigma_inverse(schedule.alpha_over_sigma(t)), t, rtol=0, atol=tolerance
    )


@every
def test_snr_inverse_agrees_with_bisection(schedule):
    ratio = torch.logspace(-4, 4, 60, dtype=torch.float64)
    slow = bisect(schedule.alpha_over_sigma, ratio)
    torch.testing.assert_close(schedule.alpha_over_sigma_inverse(ratio), slow, rtol=0, atol=1e-12)
    assert type(
        schedule
    ).alpha_over_sigma_inverse is not AffinePath.alpha_over_sigma_inverse or torch.equal(
        slow, schedule.alpha_over_sigma_inverse(ratio)
    )


@every
def test_ratios_out_of_reach_give_the_nearest_end(schedule):
    beyond = torch.tensor([0.0, math.inf], dtype=torch.float64)
    assert schedule.alpha_over_sigma_inverse(beyond).tolist() == [0.0, 1.0]


@every
def test_snr_increases(schedule):
    assert (schedule.alpha_over_sigma(INSIDE).diff() > 0).all()


def test_curves_of_ones_own_match_the_built_in_path():
    own = Curves(lambda t: torch.sin(math.pi / 2 * t), lambda t: torch.cos(math.pi / 2 * t))
    for mine, theirs in zip(own(INSIDE), Trigonometric()(INSIDE), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-15)


def test_curves_take_one_time_or_many():
    own = SCHEDULES["curves"]
    assert own.d_alpha(torch.tensor(0.5)).shape == ()
    assert own.d_alpha(
        torch.rand(3, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    ).shape == (3,)


def test_curves_whose_ends_do_not_hold_are_refused():
    with pytest.raises(ValueError, match=r"alpha\(0\) = 1, but .* needs 0 there"):
        Curves(lambda t: 1 - t, lambda t: t)
    with pytest.raises(ValueError, match=r"sigma\(1\) = 0\.5"):
        Curves(lambda t: t, lambda t: 1 - t / 2)
    with pytest.raises(ValueError, match=r"sigma\(1\) = nan"):
        Curves(lambda t: t, lambda t: (1 - t) / (1 - t) - t)


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (Linear, {"sigma_min": 1.0}),
        (Linear, {"sigma_min": -0.1}),
        (IndependentCFM, {"noise_std": 0.0}),
        (SchrodingerBridge, {"noise_std": -1.0}),
        (VariancePreserving, {"beta_min": 30.0}),
        (VarianceExploding, {"sigma_min": 0.0}),
        (Polynomial, {"n": 0.5}),
    ],
)
def test_settings_that_make_no_path_are_refused_by_name(make, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        make(**setting)


@every
def test_only_noisy_paths_have_gamma(schedule):
    assert schedule.stochastic == bool((schedule.gamma(INSIDE) != 0).any())


def test_curves_take_one_time_for_a_whole_batch():
    curves = Curves(lambda t: t**2, lambda t: 1 - t**2)
    t = torch.tensor(0.5, dtype=torch.float64).expand(4)
    torch.testing.assert_close(curves.d_alpha(t), 2 * t)
