"""DPM-Solver++(2M): the published formula, where it is exact, its order, both directions, and what it refuses."""

import math

import pytest
import torch

from fmlightning.flow.guidance import Guidance, GuidedField
from fmlightning.flow.keys import Key
from fmlightning.flow.likelihood import log_prob
from fmlightning.flow.models import NetworkField
from fmlightning.flow.paths.schedules import (
    Curves,
    IndependentCFM,
    Linear,
    LinearVP,
    Polynomial,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from fmlightning.flow.solvers.ode import LogSNRGrid, ODESolver
from fmlightning.flow.solvers.sampling import generate
from fmlightning.flow.solvers.time_grids import CustomGrid, EDMGrid, UniformGrid
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork

MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.5], [-0.5, -2.0]], [0.5, 0.4, 0.7])
SCHEDULES = [
    Linear(),
    Linear(0.1),
    Trigonometric(),
    VariancePreserving(),
    VarianceExploding(0.05, 5.0),
    LinearVP(),
    Polynomial(2.0),
    IndependentCFM(0.3),
]


def normal(n=8):
    return torch.randn(n, 2, generator=Key(0).generator(), dtype=torch.float64)


def start(path, n=8):
    """Points at the start of a path, of its own spread."""
    low = torch.tensor(path.t_range[0], dtype=torch.float64)
    return path.path.std(low) * normal(n)


def solve(path, num_steps, grid=UniformGrid(), ends=None, **settings):  # noqa: B008 - frozen
    solver = ODESolver("dpmpp_2m", num_steps, grid=grid, **settings)
    return solver.solve(path, start(path), *(ends or path.t_range))


def published(path, x, times):
    """Algorithm 2 of the paper, word for word, in log-SNR: r, D and the exponential of -h."""
    s = path.path
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = s.alpha(t), s.sigma(t)
    lam = alpha.log() - sigma.log()
    h = lam.diff()
    q = [path.data(x, t[0])]
    x = sigma[1] / sigma[0] * x - alpha[1] * torch.expm1(-h[0]) * q[0]
    for i in range(2, len(t)):
        q.append(path.data(x, t[i - 1]))
        r = h[i - 2] / h[i - 1]
        D = (1 + 1 / (2 * r)) * q[-1] - 1 / (2 * r) * q[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * torch.expm1(-h[i - 1]) * D
    return x


@pytest.mark.parametrize("grid", [UniformGrid(), LogSNRGrid(), EDMGrid()], ids=str)
def test_it_is_the_published_algorithm(grid):
    path = MIXTURE.along(VariancePreserving())
    times = grid.points(12, *path.t_range, path.path).tolist()
    expected = published(path, start(path), times)
    # the same numbers by other operations
    torch.testing.assert_close(solve(path, 12, grid).x, expected, rtol=1e-9, atol=1e-10)


def test_the_log_snr_grid_has_the_steps_that_the_paper_takes():
    s = VariancePreserving()
    t = LogSNRGrid().points(10, *s.t_range, s)
    lam = s.alpha_over_sigma(t).log()
    torch.testing.assert_close(lam.diff(), lam.diff().mean().expand(10), rtol=1e-8, atol=0)
    assert (float(t[0]), float(t[-1])) == s.t_range
    back = LogSNRGrid().points(10, *reversed(s.t_range), s)
    torch.testing.assert_close(back, t.flip(0), rtol=0, atol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_log_snr_grid_keeps_infinite_ends(schedule, num_steps):
    t = LogSNRGrid().points(num_steps, *schedule.t_range, schedule)
    assert len(t) == num_steps + 1
    assert bool((t.diff() > 0).all())
    assert (float(t[0]), float(t[-1])) == schedule.t_range


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != Polynomial(2.0)], ids=str)
def test_a_single_point_is_reached_exactly_whatever_the_steps(schedule, num_steps):
    """There the expected data point does not move: x = alpha m + sigma x0 all along."""
    m = torch.tensor([[1.5, -2.0]], dtype=torch.float64)
    path = GaussianMixture.of_points(m).along(schedule)
    low, high = (torch.tensor(t, dtype=torch.float64) for t in path.t_range)
    x0 = normal()
    x = schedule.alpha(low) * m + schedule.std(low) * x0
    end = ODESolver("dpmpp_2m", num_steps).solve(path, x, *path.t_range).x
    expected = schedule.alpha(high) * m + schedule.std(high) * x0
    torch.testing.assert_close(end, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def exact():
    """Ends by dopri8 at 1e-9, far below the 1e-5 of the finest steps."""
    tight = ODESolver("dopri8", rtol=1e-9, atol=1e-9)
    return {s: tight.solve(MIXTURE.along(s), start(MIXTURE.along(s)), *MIXTURE.along(s).t_range).x
            for s in SCHEDULES}  # fmt: skip


def slope(schedule, grid, exact, **settings):
    path = MIXTURE.along(schedule)
    errors = [
        float((solve(path, n, grid, **settings).x - exact[schedule]).square().mean().sqrt())
        for n in (64, 512)
    ]
    return math.log(errors[0] / errors[1]) / math.log(8)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_error_falls_with_the_square_of_the_steps(schedule, exact):
    assert slope(schedule, EDMGrid(), exact) > 1.8


@pytest.mark.parametrize("schedule", [VariancePreserving(), VarianceExploding(0.05, 5.0)], ids=str)
def test_so_it_does_on_steps_of_equal_log_snr(schedule, exact):
    for lower in (False, True):
        found = slope(schedule, LogSNRGrid(), exact, lower_order_final=lower)
        assert abs(found - 2) < 0.2


@pytest.mark.parametrize("grid", [UniformGrid(), LogSNRGrid()], ids=str)
@pytest.mark.parametrize("schedule", [Linear(), Trigonometric(), Polynomial(2.0)], ids=str)
def test_ends_with_infinite_log_snr_cost_a_logarithm(schedule, grid, exact):
    """Steps beside such an end do not get shorter in lambda: the error is that of order two times log n."""
    assert 1.45 < slope(schedule, grid, exact) < 2.1


def test_an_inner_interval_has_order_two_on_equal_steps():
    path, ends = MIXTURE.along(Linear()), (0.1, 0.9)
    tight = ODESolver("dopri8", rtol=1e-11, atol=1e-11).solve(path, normal(), *ends).x
    errors = [
        float((ODESolver("dpmpp_2m", n).solve(path, normal(), *ends).x - tight).norm())
        for n in (64, 512)
    ]
    assert abs(math.log(errors[0] / errors[1]) / math.log(8) - 2) < 0.1


@pytest.mark.parametrize("schedule", [Linear(), VariancePreserving()], ids=str)
def test_there_and_back_returns(schedule):
    path, (low, _) = MIXTURE.along(schedule), schedule.t_range
    solver, x = ODESolver("dpmpp_2m", 400), start(path)
    there = solver.solve(path, x, low, 0.9).x
    back = solver.solve(path, there, 0.9, low).x
    # order two, and 400 steps of a path of length one: some (1 / 400)^2 each way, times its bends
    torch.testing.assert_close(back, x, rtol=0, atol=2e-3)


def test_it_counts_its_evaluations_and_saves_states():
    path, calls = MIXTURE.along(Linear()), []

    def field(x, t):
        calls.append(float(t))
        return path(x, t)

    solver = ODESolver("dpmpp_2m", 10)
    solution = solver.solve(field, normal(), save_at=[0.0, 0.5, 1.0], path=Linear())
    assert solution.nfe == solver.evaluations == len(calls) == 10
    assert calls == pytest.approx([k / 10 for k in range(10)])
    torch.testing.assert_close(solution.states[0], normal())
    torch.testing.assert_close(solution.states[2], solution.x)
    half = ODESolver("dpmpp_2m", 5).solve(path, normal(), 0.0, 0.5).x
    torch.testing.assert_close(solution.states[1], half)


@pytest.mark.parametrize("prediction", ["velocity", "data", "noise", "score"])
@pytest.mark.parametrize("schedule", [Linear(), VariancePreserving(), VarianceExploding(0.05, 5.0)])
def test_whatever_a_network_predicts_the_samples_are_the_same(prediction, schedule):
    path = MIXTURE.along(schedule)
    field = NetworkField(
        OracleNetwork(path, prediction), schedule, prediction, source=Gaussian(), independent=True
    )
    solver = ODESolver("dpmpp_2m", 64, grid=LogSNRGrid())
    solution = generate(field, normal(), solver)
    exact = generate(field, normal(), ODESolver("dopri5", rtol=1e-9, atol=1e-9)).x
    assert solution.nfe == 64 + (field.t_range[1] < 1)
    # the table of errors: 64 steps of order two on this law
    torch.testing.assert_close(solution.x, exact, rtol=0, atol=2e-2)


def test_labels_and_guidance_pass_through():
    class Labelled(torch.nn.Module):
        def forward(self, x, t, y=None):
            return (y[:, None] - x) / (1 - t[:, None] + 0.1)

    field = NetworkField(Labelled(), Linear())
    y = torch.arange(8)
    for guided in (field, GuidedField(Guidance(2.0), field, null=9)):
        mine = generate(guided, normal(), ODESolver("dpmpp_2m", 200), y=y).x
        other = generate(guided, normal(), ODESolver("heun2", 200), y=y).x
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-2)


def test_gradients_pass_through():
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    path = MIXTURE.along(Linear())
    solver = ODESolver("dpmpp_2m", 20)
    end = solver.solve(lambda x, t: path(x, t) + shift, normal(), 0.0, 0.9, path=Linear()).x
    (gradient,) = torch.autograd.grad(end.sum(), shift)
    h = 1e-6
    with torch.no_grad():
        ends = [
            solver.solve(lambda x, t, d=d: path(x, t) + d, normal(), 0.0, 0.9, path=Linear()).x
            for d in (torch.tensor([h, 0.0]), torch.tensor([-h, 0.0]))
        ]
    assert float(gradient[0]) == pytest.approx(float((ends[0] - ends[1]).sum()) / (2 * h), rel=1e-6)


REFUSED = {
    "no path": lambda s: s.solve(lambda x, t: -x, normal()),
    "a likelihood": lambda s: log_prob(MIXTURE.along(Linear()), normal(), Gaussian(), Linear(), s),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_path_is_refused(case):
    with pytest.raises(ValueError, match=r"dpmpp_2m.*path="):
        REFUSED[case](ODESolver("dpmpp_2m"))


def test_the_grid_needs_a_path_too():
    with pytest.raises(ValueError, match=r"LogSNRGrid.*path="):
        ODESolver("euler", grid=LogSNRGrid()).solve(lambda x, t: -x, normal())


def test_other_methods_take_the_log_snr_grid():
    path = MIXTURE.along(VariancePreserving())
    exact = ODESolver("dopri5", rtol=1e-9, atol=1e-9).solve(path, start(path), *path.t_range).x
    found = ODESolver("heun2", 64, grid=LogSNRGrid()).solve(path, start(path), *path.t_range).x
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-2)  # 64 steps of order two


def test_a_start_without_noise_is_refused():
    with pytest.raises(ValueError, match=r"dpmpp_2m.*t=1.*no noise left"):
        ODESolver("dpmpp_2m").solve(MIXTURE.along(Linear()), normal(), 1.0, 0.0)


def test_a_ratio_that_stands_still_is_refused():
    # between 0.4 and 0.6 nothing moves
    def pause(t):
        return torch.where(
            t < 0.4, t / 0.4 / 2, torch.where(t > 0.6, (t - 0.6) / 0.4 / 2 + 0.5, 0.5)
        )

    path = MIXTURE.along(Curves(pause, lambda t: 1 - pause(t)))
    with pytest.raises(ValueError, match=r"ratio alpha / sigma that rises"):
        ODESolver("dpmpp_2m", 20, grid=CustomGrid((0.0, 0.5, 1.0))).solve(path, normal())


def test_a_bad_end_step_is_refused():
    with pytest.raises(ValueError, match="end_step=2"):
        LogSNRGrid(2.0)
