"""The toy laws against scikit-learn's, their densities, and the two ways to draw them."""

import math

import pytest
import torch
from scipy import stats
from sklearn import datasets

from fmlightning.flow.keys import Key
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.toys import (
    Checkerboard,
    EightGaussians,
    Funnel,
    Moons,
    Pinwheel,
    Rings,
    SCurve,
    Spirals,
    SwissRoll,
)

TOYS = [
    EightGaussians(),
    Moons(),
    Checkerboard(),
    SCurve(),
    Rings(),
    Spirals(),
    SwissRoll(),
    Pinwheel(),
    Funnel(),
]
KNOWN = [EightGaussians(), Checkerboard(), Gaussian()]
every = pytest.mark.parametrize("toy", TOYS, ids=lambda toy: type(toy).__name__)
known = pytest.mark.parametrize("law", KNOWN, ids=lambda law: type(law).__name__)


def draw(law, n, seed=0):
    return law.sample((n, 2), Key(seed).generator(), torch.float64)


def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'|, of Szekely and Rizzo; zero for equal laws."""
    return 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


def moons(n):
    x, _ = datasets.make_moons(n, noise=0.05, random_state=0)
    return 3 * torch.from_numpy(x) - 1


def s_curve(n):
    x, _ = datasets.make_s_curve(n, noise=0.05, random_state=0)
    return torch.from_numpy(x[:, [0, 2]])


def swiss_roll(n):
    x, _ = datasets.make_swiss_roll(n, noise=0.25, random_state=0)
    return torch.from_numpy(x[:, [0, 2]]) / 5


@pytest.mark.parametrize(
    ("law", "truth"),
    [(Moons(), moons), (SCurve(), s_curve), (SwissRoll(), swiss_roll)],
    ids=["moons", "s", "swiss roll"],
)
def test_toys_have_scikit_learns_law(law, truth):
    """Against the distances of 40 random splits of the pooled points: no further than all but one."""
    n = 600
    ours, theirs = draw(law, n), truth(n)
    observed, pool = energy_distance(ours, theirs), torch.cat((ours, theirs))
    g = Key(1).generator()
    splits = (pool[torch.randperm(2 * n, generator=g)] for _ in range(40))
    null = torch.stack([energy_distance(x[:n], x[n:]) for x in splits])
    assert observed <= null.sort().values[-2]


def test_rings_have_scikit_learns_radii():
    """`make_circles` with the inner circle at one half, by Kolmogorov and Smirnov."""
    theirs, _ = datasets.make_circles(4000, noise=0.05, factor=0.5, random_state=0)
    ours = draw(Rings(radii=(0.5, 1.0), noise=0.05), 4000)
    radii = torch.from_numpy(theirs).norm(dim=1)
    assert stats.ks_2samp(ours.norm(dim=1).numpy(), radii.numpy()).pvalue > 1e-3


def test_eight_gaussians_stand_on_their_circle():
    x = draw(EightGaussians(radius=5.0, std=0.1), 8000)
    slots = (x[:, 1].atan2(x[:, 0]) / (math.pi / 4)).round() % 8
    # 1000 in each, give or take 4 binomial standard errors
    assert ((slots.long().bincount() - 1000).abs() < 4 * (8000 * 7 / 64) ** 0.5).all()
    centres = torch.stack(((slots * math.pi / 4).cos(), (slots * math.pi / 4).sin()), 1)
    left = (x - 5 * centres) / 0.1
    assert stats.kstest(left.flatten().numpy(), "norm").pvalue > 1e-3


def test_the_tutorials_std_is_the_root_of_their_variance():
    # torchdyn draws with covariance sqrt(0.1) I
    assert EightGaussians().std == pytest.approx(0.1**0.25, abs=5e-4)


def test_spirals_arms_have_the_radius_of_their_angle():
    x = draw(Spirals(noise=0.0), 2000)
    radius = x.norm(dim=1) / 4
    wound = (x[:, 1].atan2(x[:, 0]) - 3 * math.pi * radius) % math.pi
    assert torch.minimum(wound, math.pi - wound).max() < 1e-9
    assert stats.kstest((radius**2).numpy(), "uniform").pvalue > 1e-3


def test_pinwheel_unwinds_to_its_gaussians():
    """Turned back by rate exp(r), every point lies on one of the arms, with normal r and s."""
    n = 6000
    x = draw(Pinwheel(), n) / 2
    r = x.norm(dim=1)  # r^2 + s^2 = |x|^2: five turns find r, as s is small
    for _ in range(50):
        back = x[:, 1].atan2(x[:, 0]) - 0.25 * r.exp()
        arm = (back / (2 * math.pi / 5)).round()
        s = x.norm(dim=1) * (back - arm * 2 * math.pi / 5).sin()
        r = (x.square().sum(1) - s.square()).clamp(min=0).sqrt()
    easy = r > 0.4  # nearer to the middle the arms overlap: 2.3 % of the points
    assert easy.double().mean() > 0.95
    assert stats.kstest((s[easy] / 0.1).numpy(), "norm").pvalue > 1e-3
    cut = stats.truncnorm((0.4 - 1) / 0.3, math.inf, loc=1, scale=0.3)
    assert stats.kstest(r[easy].numpy(), cut.cdf).pvalue > 1e-3
    counts = (arm[easy] % 5).long().bincount(minlength=5)
    expected = easy.sum() / 5
    assert ((counts - expected).abs() < 4.5 * (expected * 0.8).sqrt()).all()


def test_funnels_density_is_the_product_of_its_normals():
    law = Funnel(dim=4, std=1.5)
    x = law.sample((50, 4), Key(0).generator(), torch.float64)
    first, rest = x[:, 0].numpy(), x[:, 1:].numpy()
    widths = torch.from_numpy(first).div(2).exp().numpy()[:, None]
    truth = stats.norm.logpdf(first, scale=1.5) + stats.norm.logpdf(rest, scale=widths).sum(1)
    assert law.log_prob(x).numpy() == pytest.approx(truth, rel=1e-12)  # rounding


def test_funnel_has_its_law():
    x = Funnel(dim=3).sample((4000, 3), Key(0).generator(), torch.float64)
    assert stats.kstest((x[:, 0] / 3).numpy(), "norm").pvalue > 1e-3
    whitened = x[:, 1:] / (x[:, :1] / 2).exp()
    assert stats.kstest(whitened.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: Funnel(dim=1), "dim=1"),
        (lambda: Funnel(std=0.0), "std=0.0"),
        (lambda: Pinwheel(arms=0), "arms=0"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(make, cause):
    with pytest.raises(ValueError, match=cause):
        make()


@known
def test_densities_integrate_to_one(law):
    half, cells = 8.0, 800
    axis = (torch.arange(cells, dtype=torch.float64) + 0.5) * (2 * half / cells) - half
    grid = torch.cartesian_prod(axis, axis)
    # smooth or piecewise constant on whole cells: the midpoint rule is exact to rounding and tails
    total = law.log_prob(grid).exp().sum() * (2 * half / cells) ** 2
    assert total == pytest.approx(1, abs=1e-5)


@known
def test_densities_are_those_of_the_samples(law):
    """Mass in the cells of a coarse grid: counted, and integrated."""
    n, half, cells, fine = 20_000, 8.0, 8, 20
    x = draw(law, n)
    step = 2 * half / cells / fine
    axis = (torch.arange(cells * fine, dtype=torch.float64) + 0.5) * step - half
    density = law.log_prob(torch.cartesian_prod(axis, axis)).exp() * step**2
    mass = density.reshape(cells, fine, cells, fine).sum((1, 3)).flatten()
    place = ((x + half) / (2 * half / cells)).long().clamp(0, cells - 1)
    counts = (place[:, 0] * cells + place[:, 1]).bincount(minlength=cells**2)
    heavy = mass > 1e-3
    error = 4.5 * (n * mass * (1 - mass)).sqrt()
    assert ((counts - n * mass).abs()[heavy] < error[heavy]).all()
    assert counts[mass == 0].sum() == 0


def test_a_law_without_a_density_says_so():
    with pytest.raises(ValueError, match="Moons has no known density"):
        Moons().log_prob(torch.zeros(1, 2))


@every
def test_keyed_rows_have_the_law_of_whole_batches(toy):
    rows = toy.sample_keyed(Key(0).streams(torch.arange(3000)), (2,), torch.float64)
    batch = draw(toy, 3000, seed=1)
    for angle in (0.0, 1.0, 2.0):
        line = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        assert stats.ks_2samp((rows @ line).numpy(), (batch @ line).numpy()).pvalue > 1e-3


@every
def test_sample_k_is_the_same_in_any_batch(toy):
    key = Key(3)
    whole = toy.sample_keyed(key.streams(torch.arange(64)), (2,))
    assert torch.equal(toy.sample_keyed(key.streams(torch.tensor([63, 5])), (2,)), whole[[63, 5]])


@every
def test_draws_repeat_and_move_no_global_state(toy):
    state = torch.get_rng_state()
    assert torch.equal(draw(toy, 10, seed=4), draw(toy, 10, seed=4))
    assert torch.equal(state, torch.get_rng_state())


@every
def test_precision_is_as_asked_for(toy):
    assert toy.sample((3, 2), Key(0).generator()).dtype == torch.float32
    assert (
        toy.sample_keyed(Key(0).streams(torch.arange(3)), (2,), torch.float64).dtype
        == torch.float64
    )


@every
def test_another_shape_is_refused(toy):
    with pytest.raises(ValueError, match=r"shape \(2,\), but \(3,\)"):
        toy.sample((4, 3), Key(0).generator())


def test_the_gaussian_source_exists_in_every_shape():
    x = Gaussian().sample_keyed(Key(0).streams(torch.arange(4)), (3, 2, 2), torch.float64)
    truth = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian().log_prob(x), truth, rtol=1e-12, atol=0)
