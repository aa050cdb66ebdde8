"""Training times against their densities, and the grids of solvers against the papers' formulas."""

import math

import pytest
import torch
from scipy import integrate, stats

from fmlightning.flow.keys import Key
from fmlightning.flow.objectives.time_samplers import (
    Beta,
    CosMap,
    LogitNormal,
    Mode,
    Power,
    Stratified,
    Uniform,
)
from fmlightning.flow.solvers.time_grids import CustomGrid, EDMGrid, ShiftedGrid, UniformGrid

LAWS = [
    Uniform(),
    LogitNormal(),
    LogitNormal(1.2, 1.2),
    LogitNormal(-0.5, 0.3),
    Mode(),
    Mode(-0.9),
    CosMap(),
    Beta(2.0, 1.5),
    Beta(0.5, 0.5),
    Power(2.0),
    Power(-0.5),
    Stratified(LogitNormal()),
]
GRIDS = [UniformGrid(), ShiftedGrid(), EDMGrid(), CustomGrid((0.0, 0.5, 0.6, 1.0))]
law = pytest.mark.parametrize("law", LAWS, ids=repr)
grid = pytest.mark.parametrize("grid", GRIDS, ids=repr)


def uniforms(n, seed=0):
    return torch.rand(n, generator=Key(seed).generator(), dtype=torch.float64)


def distribution(law, cells=2000):
    """The integral of the density, by quadrature between points that crowd at both ends."""
    edges = 0.5 - 0.5 * torch.cos(torch.linspace(0, math.pi, cells + 1, dtype=torch.float64))
    nodes, weights = (torch.from_numpy(a) for a in _legendre(6))
    left, width = edges[:-1, None], edges.diff()[:, None]
    mass = (law.density(left + width * (nodes + 1) / 2) * weights * width / 2).sum(1)
    return edges, torch.cat((torch.zeros(1, dtype=torch.float64), mass.cumsum(0)))


def _legendre(n):
    from scipy.special import roots_legendre

    return roots_legendre(n)


@law
def test_densities_integrate_to_one(law):
    def f(t):
        return float(law.density(torch.tensor(t, dtype=torch.float64)))

    total = sum(integrate.quad(f, a, b, limit=200)[0] for a, b in ((0, 0.5), (0.5, 1)))
    # scipy's own error for the laws that are infinite at an end
    assert total == pytest.approx(1, abs=1e-6)


@law
def test_times_follow_their_density(law):
    edges, total = distribution(law)
    times = law.draw(uniforms(20_000))

    def cdf(t):
        right = torch.searchsorted(edges, torch.as_tensor(t)).clamp(1, len(edges) - 1)
        share = (torch.as_tensor(t) - edges[right - 1]) / (edges[right] - edges[right - 1])
        return torch.lerp(total[right - 1], total[right], share).numpy()

    # one test of the seed in a thousand would fail by chance
    assert stats.kstest(times.numpy(), cdf).pvalue > 1e-3


@law
def test_quantiles_increase_and_stay_inside(law):
    u = torch.linspace(1e-6, 1 - 1e-6, 1001, dtype=torch.float64)
    t = law.quantile(u)
    assert (t.diff() > 0).all()
    assert (t > 0).all()
    assert (t < 1).all()


@law
def test_times_are_placed_on_the_interval(law):
    t = law.draw(uniforms(1000), (0.2, 0.7))
    torch.testing.assert_close(t, 0.2 + 0.5 * law.draw(uniforms(1000)), rtol=1e-14, atol=0)


@law
def test_times_keep_precision_and_shape(law):
    assert law.draw(uniforms(7).float()).dtype == torch.float32
    assert law.draw(uniforms(7)).shape == (7,)


def test_sd3s_laws_in_its_own_words():
    """The formulas of the paper, whose time is one minus ours."""
    u = uniforms(100)
    mode = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(1 - Mode(1.29).quantile(u), mode, rtol=1e-12, atol=1e-12)
    cosmap = 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    torch.testing.assert_close(CosMap().quantile(u), cosmap, rtol=1e-11, atol=1e-12)


def test_logit_normal_is_edms_law_of_noise_levels():
    t = LogitNormal(1.2, 1.2).draw(uniforms(20_000))
    log_sigma = ((1 - t) / t).log()
    assert stats.kstest(log_sigma.numpy(), "norm", (-1.2, 1.2)).pvalue > 1e-3


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_stratified_puts_one_time_in_each_slice_in_random_order(n):
    slices = (Stratified().draw(uniforms(n)) * n).long()
    assert slices.sort().values.tolist() == list(range(n))
    assert n < 3 or slices.tolist() != list(range(n))


def test_each_stratified_time_follows_the_law_wherever_it_stands_in_the_batch():
    draws = torch.stack([Stratified().draw(uniforms(8, seed)) for seed in range(3000)])
    for place in (0, 7):
        assert stats.kstest(draws[:, place].numpy(), "uniform").pvalue > 1e-3


def test_stratified_times_estimate_a_smooth_mean_better():
    def error(law):
        means = torch.stack([law.draw(uniforms(64, s)).square().mean() for s in range(200)])
        return (means - 1 / 3).square().mean().sqrt()

    # 1 / B against 1 / sqrt(B): a factor of about 8 for B = 64
    assert error(Stratified()) < error(Uniform()) / 4


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (LogitNormal, {"std": 0.0}),
        (Mode, {"scale": 1.8}),
        (Mode, {"scale": -1.1}),
        (Beta, {"a": 0.0}),
        (Beta, {"b": -1.0}),
        (Power, {"power": -1.0}),
        (ShiftedGrid, {"shift": 0.0}),
        (EDMGrid, {"sigma_min": 100.0}),
        (EDMGrid, {"rho": 0.0}),
        (CustomGrid, {"times": (0.0, 0.6, 0.5, 1.0)}),
        (CustomGrid, {"times": (0.1, 1.0)}),
        (CustomGrid, {"times": (0.0,)}),
    ],
)
def test_settings_that_make_no_law_or_grid_are_refused_by_name(make, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        make(**setting)


@grid
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (1e-3, 0.999), (0.999, 1e-3)], ids=str)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50])
def test_grids_keep_their_ends_exactly_and_never_turn(grid, ends, num_steps):
    points = grid.points(num_steps, *ends)
    assert len(points) == num_steps + 1
    assert points.dtype == torch.float64
    assert (points[0], points[-1]) == ends
    steps = points.diff()
    assert (steps > 0).all() if ends[0] < ends[1] else (steps < 0).all()


@grid
def test_grids_are_the_same_in_both_directions(grid):
    assert torch.equal(grid.points(10, 0.0, 1.0), grid.points(10, 1.0, 0.0).flip(0))


@grid
def test_the_warp_reaches_both_ends_by_itself(grid):
    ends = grid.map(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        ends, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_shifted_grid_is_sd3s():
    noise = 1 - ShiftedGrid(3.0).points(4, 0.0, 1.0)
    # 3 n / (1 + 2 n) at n = 1, 3/4, 1/2, 1/4, 0
    expected = torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64)
    torch.testing.assert_close(noise, expected, rtol=1e-12, atol=1e-12)
    neutral, uniform = ShiftedGrid(1.0).points(5, 0.0, 1.0), UniformGrid().points(5, 0.0, 1.0)
    torch.testing.assert_close(neutral, uniform, rtol=0, atol=1e-15)


def test_edm_grid_has_edms_noise_levels():
    """Karras et al. 2022, eq. 5; beyond the two ends the stretch moves a level by about 1 / sigma_max."""
    n = 18
    i = torch.arange(n, dtype=torch.float64)
    levels = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    low, high = 1 / (1 + 80), 1 / (1 + 0.002)
    t = EDMGrid().points(n - 1, 0.0, 1.0)
    sigma = 1 / (low + t * (high - low)) - 1
    torch.testing.assert_close(sigma, levels, rtol=1e-9, atol=1e-12)


def test_listed_grid_stops_where_it_is_told_and_interpolates():
    own = CustomGrid((0.0, 0.5, 0.6, 1.0))
    assert own.points(3, 0.0, 1.0).tolist() == pytest.approx([0, 0.5, 0.6, 1])
    assert own.points(6, 0.0, 1.0).tolist() == pytest.approx([0, 0.25, 0.5, 0.55, 0.6, 0.8, 1])
