"""Semidiscrete transport against quantiles on the line, which are exact, and linear programmes in the plane."""

import math
from statistics import NormalDist

import ot
import pytest
import torch

from fmlightning.flow.couplings import MinibatchOT, Potential, SemidiscreteOT
from fmlightning.flow.couplings import semidiscrete as room
from fmlightning.flow.keys import Key
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.toys import EightGaussians, Moons

KEY = Key(0).fold("semidiscrete")
FINE = SemidiscreteOT(tolerance=1e-3, max_steps=3000)


def draws(source, n, shape, name="test"):
    return source.sample((n, *shape), KEY.fold(name).generator(), dtype=torch.float64)


def fitted(coupling, x1, source):
    return coupling.potential(x1, coupling.fit(x1, source, KEY))


def test_on_the_line_cells_are_the_quantiles_of_the_source():
    """The k-th smallest of N points gets the k-th N-th of N(0, 1): the boundaries are known in closed form."""
    n = 10
    x1 = torch.rand(n, 1, generator=KEY.generator(), dtype=torch.float64).sort(0).values * 5
    potential = fitted(FINE, x1, Gaussian())
    x, g = x1[:, 0], potential.g
    # x0 is as near to both neighbours, g_k - |x0 - x_k|^2 = g_l - |x0 - x_l|^2
    edges = ((x[1:] ** 2 - x[:-1] ** 2) - (g[1:] - g[:-1])) / (2 * (x[1:] - x[:-1]))
    truth = [NormalDist().inv_cdf(k / n) for k in range(1, n)]
    # a chi^2 of 1e-3 is masses off by 3 %, 0.003, over a density of at least 0.17 at the outermost edge
    torch.testing.assert_close(edges, torch.tensor(truth, dtype=torch.float64), rtol=0, atol=0.04)


def test_in_the_plane_cells_are_equal_and_cost_what_a_linear_programme_finds():
    n, m = 16, 6400
    source, x1 = EightGaussians(), draws(Moons(), 16, (2,), "data")
    potential = fitted(FINE, x1, source)
    x0 = draws(source, m, (2,))
    k = potential.targets(x0, KEY.generator())
    masses = torch.bincount(k, minlength=n) / m
    # binomial, 4 standard errors for 16 cells, and 3 % of the fit
    error = 4 * math.sqrt(1 / n / m) + 0.03 / n
    assert ((masses - 1 / n).abs() < error).all()
    ours = (x0 - x1[k]).square().sum(1).mean()
    weights = [torch.full((size,), 1 / size, dtype=torch.float64) for size in (m, n)]
    truth = ot.emd2(*weights, (x0[:, None] - x1).square().sum(-1), numItermax=10**7)
    # the programme equalises the masses of these very points, which are off by 1/sqrt(n m) of themselves: a shift
    # that costs its square; and the cost of a mass that goes elsewhere is at most of order of the cost itself
    assert float(ours) == pytest.approx(float(truth), rel=0.02)
    independent = (x0[:, None] - x1).square().sum(-1).mean()
    assert float(ours) < 0.8 * float(independent)


def test_the_dual_value_is_the_cost():
    """Strong duality, F(g) = E |x0 - x_k|^2 where all cells are equal: the gap is sum_k g_k (1/N - m_k)."""
    source, x1 = Gaussian(), draws(Moons(), 12, (2,), "data")
    potential = fitted(FINE, x1, source)
    x0 = draws(source, 200_000, (2,))
    k = potential.targets(x0, KEY.generator())
    cost = (x0 - x1[k]).square().sum(1).mean()
    dual = ((x0 - x1[k]).square().sum(1) - potential.g[k]).mean() + potential.g.mean()
    # masses are off by 3 % of 1/N each and by chance; g is of the order of the costs
    assert float(dual) == pytest.approx(float(cost), rel=0.03)


def test_the_fit_ends_at_its_tolerance_of_chi2_and_says_when_it_does_not():
    x1 = draws(Moons(), 200, (2,), "data").float()
    potential = fitted(SemidiscreteOT(), x1, EightGaussians())
    n, m = len(x1), 100_000
    counts = torch.zeros(n, dtype=torch.float64)
    for part in range(10):
        counts += potential.counts(
            draws(EightGaussians(), m // 10, (2,), f"fresh {part}"), KEY.generator()
        )
    chi2 = float(n * (counts * (counts - 1)).sum() / (m * (m - 1)) - 1)
    assert chi2 < 0.05 + 4 * 0.014  # the fit itself estimates it with an error of 0.014
    with pytest.raises(
        ValueError, match=r"200 cells have chi\^2 = .* > tolerance=0.0001 after max_steps=3"
    ):
        SemidiscreteOT(tolerance=1e-4, max_steps=3, batch_size=16).fit(x1, EightGaussians(), KEY)


def test_images_of_high_dimension():
    x1 = draws(Gaussian(), 100, (1, 8, 8), "data").float()
    potential = fitted(SemidiscreteOT(), x1, Gaussian())
    x0 = draws(Gaussian(), 256, (1, 8, 8)).float()
    k = potential.targets(x0, KEY.generator())
    paired, independent = (x0 - x1[k]).square(), (x0 - x1[torch.arange(256) % 100]).square()
    assert paired.sum() < 0.9 * independent.sum()


def test_blocks_do_not_change_the_targets(monkeypatch):
    x1, x0 = draws(Moons(), 50, (2,), "data"), draws(Gaussian(), 300, (2,))
    potential = Potential(x1, draws(Gaussian(), 50, (1,), "g")[:, 0])
    whole = potential.targets(x0, KEY.generator())
    naive = (potential.g - (x0[:, None] - x1).square().sum(-1)).argmax(1)
    assert torch.equal(whole, naive)
    monkeypatch.setattr(room, "BLOCK", 300 * 7)
    assert torch.equal(potential.targets(x0, KEY.generator()), naive)


@pytest.mark.parametrize("block", [2**24, 1000 * 2], ids=["whole", "blocks"])
def test_entropy_draws_cells_with_their_probabilities(block, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", block)
    x1, reg, m = draws(Moons(), 5, (2,), "data"), 2.0, 1000
    potential = Potential(x1, draws(Gaussian(), 5, (1,), "g")[:, 0], reg)
    x0 = draws(Gaussian(), 1, (2,))
    truth = ((potential.g - (x0 - x1).square().sum(1)) / reg).softmax(0)
    counts, g = torch.zeros(5, dtype=torch.float64), KEY.fold("draws").generator()
    for _ in range(20):
        counts += potential.counts(x0.expand(m, 2), g)
    error = 4 * (truth * (1 - truth) / (20 * m)).sqrt() + 1e-6
    assert ((counts / (20 * m) - truth).abs() < error).all()


def test_with_entropy_the_cells_have_equal_mass_too():
    x1 = draws(Moons(), 40, (2,), "data")
    potential = fitted(SemidiscreteOT(reg=1.0), x1, Gaussian())
    counts = potential.counts(draws(Gaussian(), 40_000, (2,)), KEY.generator())
    spread = counts.std(correction=0) / counts.mean()
    assert spread < math.sqrt(0.05 + 4 * 0.014) + 4 * math.sqrt(40 / 40_000)


def test_a_key_repeats_the_fit_and_few_points_are_no_trouble():
    x1 = draws(Moons(), 3, (2,), "data")
    first, second = (SemidiscreteOT().fit(x1, Gaussian(), KEY) for _ in range(2))
    assert torch.equal(first, second)
    assert SemidiscreteOT().fit(x1[:1], Gaussian(), KEY).tolist() == [0.0]
    # of two equal points one gets the cell, which is a chi^2 of 2 / 61
    equal = torch.cat((x1, draws(Moons(), 57, (2,), "more"), x1[:1]))
    assert SemidiscreteOT().fit(equal, Gaussian(), KEY).isfinite().all()


def test_points_without_potential_are_paired_in_batches_and_labels_refused():
    x0, x1 = draws(Gaussian(), 20, (2,)), draws(Moons(), 20, (2,), "data")
    ours = SemidiscreteOT().pairs(x0, x1, None, KEY.generator())
    assert torch.equal(ours[0], MinibatchOT().pairs(x0, x1, None, KEY.generator())[0])
    with pytest.raises(ValueError, match=r"x0 would depend on the label.*ClasswiseOT\(\)"):
        SemidiscreteOT().pairs(x0, x1, torch.zeros(20, dtype=torch.long), KEY.generator())
    for wrong in ({"tolerance": 0.0}, {"batch_size": 0}, {"max_steps": 0}, {"rate": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0"):
            SemidiscreteOT(**wrong)
    with pytest.raises(ValueError, match="reg=-1"):
        SemidiscreteOT(reg=-1.0)
    assert not SemidiscreteOT().independent
