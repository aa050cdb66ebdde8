"""Brownian paths: their increments, and that each sample has one, whatever the steps."""

import math
from itertools import pairwise

import pytest
import torch

from fmlightning.flow.keys import Key
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.solvers import brownian
from fmlightning.flow.solvers.brownian import DEPTH, RESOLUTION, BrownianPath
from fmlightning.flow.solvers.diffusions import ConstantDiffusion, LinearDiffusion
from fmlightning.flow.solvers.sde import MarginalPreservingSDE, SDESolver
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture

F64 = torch.float64
MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.5], [-0.5, -2.0]], [0.5, 0.4, 0.7])


def path(n, shape=(1,), seed=0, index=None, dtype=F64):
    index = torch.arange(n) if index is None else index
    return BrownianPath(
        Key(seed).fold("w").streams(index), torch.zeros(len(index), *shape, dtype=dtype)
    )


def increments(w, grid):
    return torch.stack([w.increment(a, b) for a, b in pairwise(grid)], 1)


GRIDS = {
    "dyadic": torch.linspace(0, 1, 9),
    "thirds": torch.linspace(0, 1, 4),
    "250 steps": torch.linspace(0, 1, 251)[100:108],
    "uneven": torch.tensor([0.01, 0.013, 0.2, 0.37, 0.3701, 0.95, 1.0]),
    "shortest": torch.tensor([0.3, 0.3 + RESOLUTION, 0.3 + 2 * RESOLUTION, 0.3 + 3.5 * RESOLUTION]),
}


@pytest.mark.parametrize("name", GRIDS)
def test_increments_are_independent_normals_of_the_variance_of_their_step(name):
    n, grid = 10_000, GRIDS[name].double()
    dw = increments(path(n), grid.tolist())[..., 0] / grid.diff().sqrt()
    k = dw.shape[1]
    covariance = dw.T @ dw / n
    # 4.5 standard errors: 1 / sqrt(n) of a correlation, sqrt(2 / n) of a variance; 50 numbers are looked at
    assert (covariance - torch.eye(k)).abs().max() < 4.5 * math.sqrt(2 / n)
    assert dw.mean(0).abs().max() < 4.5 / math.sqrt(n)
    kurtosis = dw.pow(4).mean(0)
    assert (kurtosis - 3).abs().max() < 4.5 * math.sqrt(96 / n)  # Var z^4 = 96


HALVES, DRAWN = brownian.Cell.halves, BrownianPath.normals_at_once
ERRORS = {
    "midpoint": (brownian.Cell, "halves", lambda cell, z: HALVES(cell, 1.1 * z), "dyadic"),
    "bridge": (brownian, "bridge", lambda t, cell, z: cell.left, "shortest"),
    "one number for all": (
        BrownianPath,
        "normals_at_once",
        lambda w, d: DRAWN(w, [0] * len(d)),
        "thirds",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_another_variance_is_noticed(error, monkeypatch):
    """The test above sees a wrong midpoint, a missing bridge and numbers that are not independent."""
    owner, name, wrong, grid = ERRORS[error]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        test_increments_are_independent_normals_of_the_variance_of_their_step(grid)


def test_increments_add_up():
    w = path(50, (3,))
    a, b, whole = w.increment(0.1, 1 / 3), w.increment(1 / 3, 0.7), w.increment(0.1, 0.7)
    torch.testing.assert_close(a + b, whole, rtol=0, atol=1e-14)


def test_one_path_whatever_the_steps():
    """W(t) on dyadic, other and descending times, and where a walk has come from elsewhere: one function of t."""
    times = [0.25, 0.3, 0.5, 0.7, 1.0]
    for grid in (
        torch.linspace(0, 1, 65),
        torch.linspace(0, 1, 11),
        torch.linspace(0, 1, 251),
        torch.tensor([0.0, 0.3, 1.0]),
    ):
        grid = torch.tensor([round(t, 12) for t in grid.double().tolist()], dtype=F64).tolist()
        w, x = path(20, (2,)), torch.zeros(20, 2, dtype=F64)
        for a, b in pairwise(grid):
            x = x + w.increment(a, b)
            if b in times:
                torch.testing.assert_close(x, path(20, (2,)).increment(0.0, b), rtol=0, atol=1e-12)
    back = path(20, (2,))
    for t in (1.0, 0.7, 0.3, 0.5):
        assert torch.equal(back.at(t), path(20, (2,)).at(t))


def test_a_path_belongs_to_its_sample_and_its_key():
    grid, some = [0.0, 0.1, 0.35, 1.0], torch.tensor([17, 3])
    whole = increments(path(32, (2, 2)), grid)
    assert torch.equal(increments(path(0, (2, 2), index=some), grid), whole[some])
    others = [increments(path(32, (2, 2), seed=1), grid), whole.roll(1, 0)]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((whole.flatten(), other.flatten())))[0, 1]) < 0.25


def test_the_numbers_drawn_at_once_change_nothing(monkeypatch):
    grid = [0.0, 0.1, 0.35, 1.0]
    whole = increments(path(8, (3,)), grid)
    monkeypatch.setattr(brownian, "CHUNK", 1)
    assert torch.equal(increments(path(8, (3,)), grid), whole)


@pytest.mark.parametrize(("num_steps", "most"), [(64, 1), (250, DEPTH - 5), (1000, DEPTH - 7)])
def test_a_walk_draws_few_numbers_more_than_steps(num_steps, most, monkeypatch):
    drawn = []
    honest = BrownianPath.normals_at_once
    monkeypatch.setattr(
        BrownianPath, "normals_at_once", lambda w, d: drawn.extend(d) or honest(w, d)
    )
    increments(path(1), torch.linspace(0, 1, num_steps + 1, dtype=F64).tolist())
    assert len(drawn) == len(set(drawn)) <= most * num_steps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_coarse_state_has_the_path_of_a_finer_one(dtype):
    """Increments are differences of W in float32 at least, rounded once."""
    grid = torch.linspace(0, 1, 101).tolist()
    coarse, fine = (increments(path(5, dtype=d), grid) for d in (dtype, torch.float32))
    assert torch.equal(coarse, fine.to(dtype))


@pytest.mark.parametrize(
    "ends", [(-0.1, 0.5), (0.5, 1.1), (0.5, 0.2), (0.5, 0.5 + RESOLUTION / 2), (0.1, math.nan)]
)
def test_times_that_the_path_does_not_resolve_are_refused(ends):
    with pytest.raises(ValueError, match=r"Brownian path.*take fewer steps"):
        path(2).increment(*ends)


def strong_errors(sde, field, n, steps, finest):
    """Root mean square distances at the end to the solution of many more steps along the same paths."""
    x = torch.randn(n, 2, generator=Key(2).generator(), dtype=F64)
    *coarse, fine = (
        SDESolver("euler_maruyama", k).solve(sde, field, x, path(n, (2,))).x
        for k in (*steps, finest)
    )
    return [float((end - fine).square().sum(1).mean().sqrt()) for end in coarse]


def slope(steps, errors):
    x, y = (torch.tensor(v, dtype=F64).log() for v in (steps, errors))
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize(
    "diffusion", [LinearDiffusion(), ConstantDiffusion(1.0, (0.0, 0.5))], ids=["linear", "constant"]
)
def test_strong_convergence_along_one_path(diffusion):
    """Order 1, as g depends on time alone, where it vanishes or its range ends on every grid; on other paths, none."""
    sde = MarginalPreservingSDE(Linear(), Gaussian(), True, diffusion)
    field, steps = MIXTURE.along(Linear()).velocity, (20, 44, 90, 180)
    errors = strong_errors(sde, field, 200, steps, 1440)
    # the error of 1,440 steps is an eighth of that of 180 and bends the last point by that much
    assert 0.8 < slope(steps, errors) < 1.3, errors


def test_multiplicative_noise_converges_to_order_one_half():
    """dX = X dW by Euler-Maruyama against Ito's formula, X_1 = exp(W_1 - 1/2): an independent truth for the path."""

    n, steps, ends = 2000, (16, 64, 256), {}
    for k in steps:
        w, x = path(n), torch.ones(n, 1, dtype=F64)
        for a in range(k):
            x = x + x * w.increment(a / k, (a + 1) / k)
        ends[k] = x
    truth = (path(n).at(1.0) - 0.5).exp()
    errors = [float((ends[k] - truth).square().mean().sqrt()) for k in steps]
    assert 0.4 < slope(steps, errors) < 0.65, errors
