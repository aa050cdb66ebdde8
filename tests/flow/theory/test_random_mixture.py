"""The scattered mixture: its law, its oracle in many dimensions, and what it does not depend on."""

import pytest
import torch
from scipy import stats

from fmlightning.flow.keys import Key
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.theory.random_mixture import RandomGaussianMixture


def test_its_centres_are_as_far_as_asked():
    law = RandomGaussianMixture(dim=64, components=64, spread=2.0)
    assert stats.kstest((law.means.flatten() / 2).numpy(), "norm").pvalue > 1e-3


def test_its_samples_have_its_density():
    """The log-density of its samples, beside that of the same number of scipy's draws of the mixture."""
    law, n = RandomGaussianMixture(dim=16, components=3, std=0.5), 4000
    ours = law.sample((n, 16), Key(0).generator(), torch.float64)
    noise = stats.norm.rvs(size=(n, 16), random_state=0, scale=0.5)
    theirs = law.means[torch.arange(n) % 3] + torch.from_numpy(noise)
    a, b = law.log_prob(ours).numpy(), law.log_prob(theirs).numpy()
    assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_its_oracle_obeys_the_continuity_equation_in_ten_dimensions():
    """d log p / dt + div u + u . score = 0, by autograd."""
    path = RandomGaussianMixture(dim=10, components=4).along(Linear())
    x = 2 * torch.randn(6, 10, generator=Key(1).generator(), dtype=torch.float64)
    t = torch.full((6,), 0.4, dtype=torch.float64, requires_grad=True)
    (rate,) = torch.autograd.grad(path.log_prob(x, t).sum(), t)
    x.requires_grad_()
    v = path.velocity(x, t.detach())
    parts = [torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(10)]
    score = path.score(x, t.detach())
    left = rate + torch.stack(parts).sum(0) + (v * score).sum(1)
    size = rate.abs() + torch.stack(parts).sum(0).abs() + (v * score).sum(1).abs()
    assert (left / size).abs().max() < 1e-10  # rounding


def test_the_seed_of_the_centres_is_its_own():
    assert torch.equal(RandomGaussianMixture(seed=1).means, RandomGaussianMixture(seed=1).means)
    assert not torch.equal(RandomGaussianMixture(seed=1).means, RandomGaussianMixture(seed=2).means)


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"components": 0}, {"spread": -1.0}, {"std": -1.0}])
def test_sizes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RandomGaussianMixture(**wrong)
