"""A sample that cannot be integrated is named, and the others of its batch can be kept."""

import warnings

import pytest
import torch

from fmlightning.flow.solvers.failure import MOST
from fmlightning.flow.solvers.ode import ODESolver, SolverError

GOOD, BAD = [0, 1, 3, 5], [2, 4]


def blows_up(x, t):
    """dx/dt = x^2 from x0: x = x0 / (1 - x0 t) is infinite at t = 1 / x0."""
    return x.square()


def start():
    """Six samples, of which numbers 2 and 4 do not reach t = 1."""
    x = torch.tensor([0.1, 0.5, 2.0, -1.0, 1.6, 0.3], dtype=torch.float64)
    return x[:, None].repeat(1, 3)


def turns_nan_at_one_half(x, t):
    bad = torch.tensor([False, False, True, False, True, False])[:, None]
    return torch.where(bad & (t > 0.5), torch.nan, -x)


def never_settles(x, t):
    """Numbers 2 and 4 oscillate so fast that any number of steps runs out."""
    bad = torch.tensor([False, False, True, False, True, False])[:, None]
    return torch.where(bad, 1e7 * torch.cos(1e7 * t), -x)


FIELDS = {"blow-up": blows_up, "nan": turns_nan_at_one_half, "steps": never_settles}


def times_of(name):
    return {"blow-up": r"t=0\.(49|5|62)", "nan": r"t=0\.5", "steps": r"t=[0-9.e-]+ after"}[name]


@pytest.mark.parametrize("name", FIELDS)
def test_the_error_names_time_sample_and_state(name):
    solver = ODESolver("dopri5", max_num_steps=400 if name != "steps" else 60)
    with pytest.raises(SolverError, match=times_of(name)) as caught:
        solver.solve(FIELDS[name], start())
    message = str(caught.value)
    assert "sample 2 of 6" in message or "sample 4 of 6" in message
    assert "max |x| = " in message
    assert "failed=nan" in message
    assert set(caught.value.suspects.nonzero().flatten().tolist()) <= set(BAD)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_the_others_are_what_they_are_without_the_failed_ones(name, method):
    solver = ODESolver(method, max_num_steps=400 if name != "steps" else 60, failed="nan")
    field, x = FIELDS[name], start()
    with pytest.warns(UserWarning, match=r"2 of 6 samples \(first: \[2, 4\]\)"):
        solution = solver.solve(field, x, save_at=3)
    assert solution.x[BAD].isnan().all()
    assert solution.states[:, BAD].isnan().all()
    assert solution.states.shape == (3, 6, 3)

    def rest(y, t):  # the same field, with copies of good samples where the bad ones were
        whole = x.clone()
        whole[GOOD] = y
        whole[BAD] = y[:2]
        return field(whole, t)[GOOD]

    alone = solver.solve(rest, x[GOOD], save_at=3)
    # the same steps, because the error norm is that of the others alone: equal but for rounding
    torch.testing.assert_close(solution.x[GOOD], alone.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solution.states[:, GOOD], alone.states, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solution.times, alone.times)
    assert solution.nfe > alone.nfe  # the attempts count


def test_the_blow_up_agrees_with_its_closed_form_where_there_is_one():
    x = start()
    with pytest.warns(UserWarning, match="NaN"):
        solution = ODESolver("dopri8", rtol=1e-9, atol=1e-9, failed="nan").solve(blows_up, x)
    torch.testing.assert_close(solution.x[GOOD], (x / (1 - x))[GOOD], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["euler", "rk4", "ab2", "explicit_adams"])
def test_a_fixed_step_method_keeps_the_others_as_well(method):
    x, solver = start(), ODESolver(method, num_steps=20, failed="nan")
    with pytest.warns(UserWarning, match=r"2 of 6"):
        solution = solver.solve(turns_nan_at_one_half, x)
    assert solution.x[BAD].isnan().all()
    with pytest.raises(SolverError, match="2 of 6"):
        ODESolver(method, num_steps=20).solve(turns_nan_at_one_half, x)
    alone = solver.solve(lambda y, t: -y, x)
    torch.testing.assert_close(solution.x[GOOD], alone.x[GOOD], rtol=0, atol=0)


def test_nothing_is_said_or_changed_where_nothing_fails():
    x, lists = start(), [ODESolver(failed=failed) for failed in ("raise", "nan")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = (solver.solve(lambda y, t: -y, x) for solver in lists)
    assert torch.equal(a.x, b.x)
    assert a.nfe == b.nfe


def test_a_field_that_fails_everywhere_is_an_error_soon():
    calls = 0

    def field(x, t):
        nonlocal calls
        calls += 1
        return x * torch.nan

    with pytest.raises(SolverError):
        ODESolver(failed="nan").solve(field, start())
    with pytest.raises(SolverError):
        ODESolver(failed="nan").solve(field, torch.ones(1000, 2))
    assert calls < 20 * (MOST + 20)


def test_images_and_gradients_pass_through():
    """The state may have any shape, and the samples that are kept can be trained on."""
    x = torch.ones(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    speed = torch.tensor([0.5, 2.0, 0.25], dtype=torch.float64)[:, None, None, None]
    with pytest.warns(UserWarning, match=r"1 of 3"):
        solution = ODESolver(failed="nan", rtol=1e-8, atol=1e-8).solve(
            lambda y, t: speed * y.square(), x
        )
    assert solution.x[1].isnan().all()
    (slope,) = torch.autograd.grad(solution.x[[0, 2]].sum(), x)
    exact = 1 / (1 - speed) ** 2  # the derivative of x0 / (1 - s x0) at x0 = 1
    torch.testing.assert_close(slope[[0, 2]], exact[[0, 2]].expand(2, 1, 2, 2), rtol=1e-5, atol=0)


# -- in a run --------------------------------------------------------------------------------------

QUICK = (
    "--trainer.max_steps=3", "--data.val_size=64", "--data.test_size=64", "--trainer.limit_val_batches=0",
    "--evaluation.metrics=[{class_path: Wasserstein, init_args: {subsets: 2, size: 32}}]", "--evaluation.at_end=true",
    "--model.network.width=8", "--model.network.depth=1", "--model.solver={method: dopri5, failed: nan}",
)  # fmt: skip


@pytest.fixture
def one_sample_blows_up(monkeypatch):
    """Whatever the network says, the first sample of a batch runs away."""
    from fmlightning.flow.models import NetworkField

    real = NetworkField.__call__

    def call(self, x, t, y=None):
        v = real(self, x, t, y)
        return torch.cat((1e3 + 1e3 * x[:1].square(), v[1:]))

    monkeypatch.setattr(NetworkField, "__call__", call)


@pytest.mark.usefixtures("one_sample_blows_up")
def test_scores_of_a_part_are_refused_and_samples_are_kept(fit, fmlightning, tmp_path):
    from fmlightning.cli.sample import main

    with pytest.raises(
        AssertionError, match=r"1 of 64 samples could not be integrated \(numbers \[0\]\)"
    ):
        fit("toy/moons", *QUICK, name="scored")
    assert (tmp_path / "scored" / "checkpoints" / "last.ckpt").exists()  # the training is not lost

    assert main([str(tmp_path / "scored"), "--n", "16"]) == 0
    import numpy as np

    x = np.load(tmp_path / "scored" / "samples" / "samples.npz")["x"]
    assert np.isnan(x[0]).all()
    assert np.isfinite(x[1:]).all()
    status, shown = fmlightning(
        "sample", str(tmp_path / "scored"), "--n", "16", "--solver.failed=raise", "--out", str(tmp_path / "out")
    )  # fmt: skip
    assert status == 2
    assert "sample 0 of 16" in shown
