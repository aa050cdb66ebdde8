"""A field trained on one path, sampled along another: on the exact velocity of a mixture."""

import pytest
import torch

from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
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
from fmlightning.flow.schedule_transform import ScheduleTransformedField, change
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import generate
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork

SCHEDULES = [
    Linear(),
    Linear(0.1),
    IndependentCFM(0.3),
    SchrodingerBridge(0.7),
    VariancePreserving(),
    VarianceExploding(),
    Trigonometric(),
    Polynomial(2.0),
    LinearVP(),
    Curves(lambda t: t**2 * (3 - 2 * t), lambda t: 1 - t),
]
SMOOTH = [Linear(), Trigonometric()]
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [1.5, -0.5]], [0.4, 0.7])
SOLVER = ODESolver("dopri5", rtol=1e-9, atol=1e-9)


def exact(schedule, prediction="velocity"):
    return NetworkField(OracleNetwork(MIXTURE.along(schedule), prediction), schedule, prediction)


def noise(n=64, seed=0):
    return torch.randn(n, 2, generator=Key(seed).generator(), dtype=torch.float64)


@pytest.mark.parametrize("sampled", SCHEDULES, ids=lambda s: f"to {s!r}")
@pytest.mark.parametrize("trained", SCHEDULES, ids=lambda s: f"from {s!r}")
def test_the_changed_field_is_the_exact_field_of_the_other_path(trained, sampled):
    field = ScheduleTransformedField(exact(trained), sampled)
    low, high = field.t_range
    r = torch.linspace(low + 0.02 * (high - low), high - 0.02 * (high - low), 33).double()
    x = noise(33)
    truth = MIXTURE.along(sampled).velocity(x, r)
    # float64 rounding; the times of a ratio that is flat near an end are known to a root of it
    torch.testing.assert_close(field(x, r), truth, rtol=1e-6, atol=1e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("trained", SCHEDULES, ids=lambda s: f"from {s!r}")
@pytest.mark.parametrize("sampled", SCHEDULES, ids=lambda s: f"to {s!r}")
def test_times_and_scales_have_the_derivatives_they_say(trained, sampled):
    low, high = ScheduleTransformedField(exact(trained), sampled).t_range
    r = torch.linspace(low, high, 23, dtype=torch.float64)[2:-2]
    h = 1e-6 * (high - low)
    c, before, after = (change(trained, sampled, r + d) for d in (0, -h, h))
    # central differences of numbers known to 1e-14: 1e-14 / h, and h^2 of a third derivative
    for slope, a, b in ((c.d_t, before.t, after.t), (c.d_s, before.s, after.s)):
        torch.testing.assert_close(
            slope, (b - a) / (2 * h), rtol=1e-5, atol=1e-5 * float(c.s.max())
        )


@pytest.mark.parametrize(
    ("trained", "sampled"), [SMOOTH, SMOOTH[::-1]], ids=["to cosine", "to linear"]
)
def test_particles_are_the_same_up_to_scale_all_along(trained, sampled):
    """x_r = s_r x_t(r), and equal ends where the ratios have equal ranges."""
    field = ScheduleTransformedField(exact(trained), sampled)
    assert field.t_range == (0, 1)
    assert field.floor == 0
    times = [0.0, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0]
    new = SOLVER.solve(field, noise(), save_at=times)
    c = change(trained, sampled, new.times)
    old = SOLVER.solve(exact(trained), noise(), save_at=c.t.tolist())
    for s, ours, theirs in zip(c.s, new.states, old.states, strict=True):
        # 1e-9 a step, a few dozen steps
        torch.testing.assert_close(ours, s * theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(new.x, old.x, rtol=0, atol=1e-6)


FLAT = {
    "square to linear": (Polynomial(2.0), Linear()),
    "square to cosine": (Polynomial(2.0), Trigonometric()),
    "cube to square": (Polynomial(3.0), Polynomial(2.0)),
    "curves to linear": (SCHEDULES[-1], Linear()),
}


@pytest.mark.parametrize(("trained", "sampled"), FLAT.values(), ids=FLAT.keys())
def test_a_path_that_starts_flat_has_the_same_ends(trained, sampled):
    """t' is 0 / 0 or infinite at the start, where the field has a limit."""
    field = ScheduleTransformedField(exact(trained), sampled)
    assert field.t_range == (0, 1)
    assert field.floor == 0
    solver = ODESolver("dopri5", rtol=1e-7, atol=1e-7)
    ours, theirs = (solver.solve(f, noise()).x for f in (field, exact(trained)))
    # EDGE times a step of the solver; it would be 6e-3 from noise alone at a margin of 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    truth = MIXTURE.along(sampled).velocity(noise(), torch.zeros((), dtype=torch.float64))
    start = field(noise(), torch.zeros((), dtype=torch.float64))
    # EDGE times the slope of the field in time
    torch.testing.assert_close(start, truth, rtol=0, atol=2e-3)


def test_no_number_is_made_up_outside_the_interval():
    """On a device nothing is looked at, and the velocity is nan there."""
    field = ScheduleTransformedField(exact(VariancePreserving()), Linear())
    field.outside = lambda r: (r < field.t_range[0]) | (r > field.t_range[1])
    r = torch.tensor([1e-3, 0.5, 0.9999], dtype=torch.float64)
    assert field(noise(3), r).isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("sampled", [Linear(), Trigonometric()], ids=repr)
def test_a_narrower_range_starts_late_and_carries_its_marginal_to_the_same_end(sampled):
    """Diffusion-trained: drawn from the right marginal at the late start, particles end alike."""
    trained = VariancePreserving()
    field = ScheduleTransformedField(exact(trained), sampled)
    low, high = field.t_range
    floor = trained.alpha_over_sigma(torch.tensor(0.0, dtype=torch.float64))
    assert field.floor == pytest.approx(float(floor), rel=1e-9)
    assert 0 < low < 0.01
    assert 0.9 < high < 1
    c = change(trained, sampled, torch.tensor([low, high], dtype=torch.float64))
    start = noise()
    old = SOLVER.solve(exact(trained), start, float(c.t[0]), float(c.t[1])).x
    new = SOLVER.solve(field, c.s[0] * start, low, high).x
    torch.testing.assert_close(new, c.s[1] * old, rtol=0, atol=1e-5)


def test_the_floor_is_printed():
    field = ScheduleTransformedField(exact(VariancePreserving()), Linear())
    assert "floor=0.0066" in repr(field)


@pytest.mark.parametrize(
    "trained", [VariancePreserving(), LinearVP(), SchrodingerBridge(0.7)], ids=repr
)
@pytest.mark.parametrize("prediction", ["velocity", "data", "noise", "score"])
def test_generation_along_another_path_ends_at_the_data(trained, prediction):
    """The whole way, with the last step where the trained field stops short."""
    field = ScheduleTransformedField(exact(trained, prediction), Linear())
    x = generate(field, noise(2000), ODESolver("rk4", 40)).x
    truth = MIXTURE.along(Linear()).marginal(1.0)
    mean = (truth.weights[:, None] * truth.means).sum(0)
    second = (truth.weights[:, None] * (truth.means**2 + truth.stds[:, None] ** 2)).sum(0)
    # 4 standard errors of 2000 samples of unit-sized moments, and the floor
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=4 * 1.3 / 2000**0.5 + 0.02)
    torch.testing.assert_close(x.square().mean(0), second, rtol=0, atol=4 * 2.5 / 2000**0.5 + 0.02)


def test_labels_reach_the_network():
    class Constant(torch.nn.Module):
        def forward(self, x, t, y=None):
            return torch.zeros_like(x) if y is None else y[:, None] + torch.zeros_like(x)

    field = ScheduleTransformedField(NetworkField(Constant(), Linear()), Linear())
    y, x, r = torch.tensor([1, 2, 3]), noise(3), torch.tensor(0.5, dtype=torch.float64)
    assert field.given(y)(x, r)[:, 0].tolist() == pytest.approx([1, 2, 3])
    assert field.given(None)(x, r).abs().max() == 0


def test_paths_without_a_common_ratio_are_refused():
    near = VarianceExploding(0.01, 0.02)
    with pytest.raises(ValueError, match="no signal-to-noise ratio in common"):
        ScheduleTransformedField(exact(near), IndependentCFM(noise_std=10.0))
