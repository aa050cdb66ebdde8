"""Sample k is one point, whatever batch it is drawn in."""

import pytest
import torch

from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import generate, sample, source_points
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture

MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.5], [-0.5, -2.0]], [0.5, 0.4, 0.7])
COUNT = 64


def drawn(solver, size):
    """All samples, in batches of a size."""
    field = MIXTURE.along(Linear())
    batches = torch.arange(COUNT).split(size)
    return torch.cat([sample(field, Gaussian(), solver, index, (2,)).x for index in batches])


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_an_adaptive_sample_is_the_same_in_any_batch_to_the_error_of_its_solver(method):
    """The steps are chosen for the whole batch, so each size errs otherwise, and none by more than it may."""
    # in float64, as float32 has no such tolerance: its steps would shrink to nothing
    x0 = source_points(Gaussian(), 0, torch.arange(COUNT), (2,)).double()
    truth = generate(MIXTURE.along(Linear()), x0, ODESolver("dopri8", rtol=1e-10, atol=1e-10)).x
    solver = ODESolver(method, rtol=1e-5, atol=1e-5)
    found = {size: drawn(solver, size) for size in (1, 7, COUNT)}
    errors = {size: float((x - truth).abs().max()) for size, x in found.items()}
    # ten steps, each within 1e-5 (1 + |x|) in the root mean square over the batch, of which one sample may be off by
    # several times; and the field stretches by less than ten
    assert max(errors.values()) < 500 * 1e-5, errors
    for x in found.values():
        assert float((x - found[COUNT]).abs().max()) <= 2 * max(errors.values())


def test_a_fixed_step_sample_is_the_same_in_any_batch():
    whole = drawn(ODESolver("heun2", 20), COUNT)
    for size in (1, 7):
        # the mixture sums over its components in one order or another
        torch.testing.assert_close(drawn(ODESolver("heun2", 20), size), whole, atol=1e-5, rtol=1e-5)
