"""Samples that are numbers, (B,) with no further dimension, and options of text: every part takes or refuses them."""

import pytest
import torch
from torchdiffeq import odeint

from fmlightning.flow import (
    C2OT,
    Gaussian,
    Key,
    Linear,
    MaximumLikelihood,
    MinibatchOT,
    ODESolver,
    SDESolver,
    cfm_loss,
    log_prob,
)
from fmlightning.flow.solvers.ode import ADAPTIVE, FIXED
from fmlightning.metrics.features.inception_score import Entropies
from fmlightning.metrics.transport import wasserstein2
from fmlightning.training.lightning.checkpoints import Checkpoints


@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
def test_every_method_takes_numbers_as_it_takes_vectors(method):
    if method == "dpmpp_2m":
        pytest.skip("it needs the path of a field")
    solver, x = ODESolver(method, num_steps=10), torch.linspace(-1, 1, 5)

    def field(x, t):
        return 3 * t**2 - x

    found = solver.solve(field, x).x
    assert found.shape == (5,)
    # the same numbers as vectors of one: the same arithmetic
    torch.testing.assert_close(found, solver.solve(field, x[:, None]).x[:, 0], rtol=0, atol=1e-7)


def test_paths_losses_pairs_and_likelihoods_take_numbers():
    generator = Key(0).generator()
    x0, x1 = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    t = torch.full((6,), 0.5, dtype=torch.float64)
    loss = cfm_loss(lambda x, t: 0 * x, Linear(), Linear().sample(x0, x1, t))
    torch.testing.assert_close(loss, (x1 - x0) ** 2)
    i, j = MinibatchOT().pairs(x0, x1, None, generator)
    assert (x0[i].argsort() == x1[j].argsort()).all()  # on the line the optimum is monotone
    found = log_prob(lambda x, t: -x, x1, Gaussian(), Linear(), ODESolver("rk4", 50))
    # dx/dt = -x: x0 = e x1, and the log-determinant is 1; RK4 in 50 steps is exact to 1e-8
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(torch.e * x1) + 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert Gaussian().sample_keyed(Key(0).streams(torch.arange(3)), ()).shape == (3,)


@pytest.mark.parametrize(
    "make",
    [
        lambda text: MinibatchOT(method=text),
        lambda text: C2OT(difference=text),
        lambda text: MaximumLikelihood(divergence=text),
        lambda text: MaximumLikelihood(method=text),
        lambda text: ODESolver(text),
        lambda text: ODESolver(failed=text),
        lambda text: SDESolver(method=text),
        lambda text: Checkpoints(mode=text),
    ],
)
def test_an_option_of_text_is_checked_where_the_object_is_made(make):
    with pytest.raises((ValueError, TypeError), match="noname"):
        make("noname")


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_both_tolerances_are_torchdiffeqs(method):
    """A state near zero is held by atol alone: with rtol in its place the steps would be many more."""
    x = torch.full((1, 1), 1e-6, dtype=torch.float64)
    calls = []

    def field(x, t):
        calls.append(t)
        return 1e-5 * torch.cos(20 * t) * torch.ones_like(x)

    loose = ODESolver(method, rtol=1e-9, atol=1e-4).solve(field, x)
    tight = ODESolver(method, rtol=1e-9, atol=1e-11).solve(field, x)
    assert tight.nfe > 2 * loose.nfe
    calls.clear()
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    odeint(lambda t, x: field(x, t), x, ends, method=method, rtol=1e-9, atol=1e-4)
    assert loose.nfe == len(calls)


def test_the_inception_score_is_the_mean_of_the_parts_exponentials():
    """One part of equal rows, exp(0) = 1, and one of two certain classes, exp(log 2) = 2: their mean is 1.5."""
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [50.0, -50.0], [-50.0, 50.0]])
    score = Entropies(2, 4, 2)
    score.update(logits, torch.arange(4))
    mean, std = score.compute()
    assert float(mean) == pytest.approx(1.5, abs=1e-12)
    assert float(std) == pytest.approx(0.5, abs=1e-12)


def test_numbers_are_transported():
    x = torch.tensor([0.0, 1.0, 2.0])
    assert wasserstein2(x, x + 3) == pytest.approx(3.0)
