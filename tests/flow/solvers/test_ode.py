"""Solvers: their order on the oracle, what they cost, where they look, and how they fail."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torchdiffeq import odeint

from fmlightning.flow.keys import Key
from fmlightning.flow.paths.schedules import Linear, Trigonometric
from fmlightning.flow.solvers.ode import ADAPTIVE, FIXED, ODESolver, SolverError
from fmlightning.flow.solvers.runge_kutta import adams_weights
from fmlightning.flow.solvers.time_grids import ShiftedGrid, UniformGrid
from fmlightning.flow.theory.mixture import GaussianMixture

MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.5], [-0.5, -2.0]], [0.5, 0.4, 0.7])
PATH = MIXTURE.along(Linear())
FREE = [m for m in (*FIXED, *ADAPTIVE) if m != "dpmpp_2m"]
"""What needs no path; the other has tests of its own."""

ORDERS = {
    "euler": 1,
    "midpoint": 2,
    "heun2": 2,
    "heun3": 3,
    "rk4": 4,
    "ab2": 2,
    "ab3": 3,
    "ab4": 4,
}


def points(n=8, seed=0):
    return torch.randn(n, 2, generator=Key(seed).generator(), dtype=torch.float64)


@pytest.fixture(scope="module")
def exact():
    """The flow of the oracle by scipy's DOP853: another code."""

    def field(t, y):
        time = torch.tensor(min(t, 1.0), dtype=torch.float64)
        return PATH.velocity(torch.from_numpy(y).reshape(-1, 2), time).flatten().numpy()

    x = points().flatten().numpy()
    end = solve_ivp(field, (0, 1), x, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return torch.from_numpy(end.copy()).reshape(-1, 2)


def rms(error):
    return float(error.square().mean().sqrt())


def slope(method, grid, exact):
    """Fine enough for the leading term, coarse enough for the 1e-12 of the reference."""
    steps = (128, 512) if method.startswith(("euler", "ab")) else (48, 192)
    errors = [
        rms(ODESolver(method, n, grid=grid).solve(PATH.velocity, points()).x - exact) for n in steps
    ]
    return math.log2(errors[0] / errors[1]) / 2


@pytest.mark.parametrize("method", ORDERS)
def test_error_falls_with_the_order_of_the_method(method, exact):
    assert abs(slope(method, UniformGrid(), exact) - ORDERS[method]) < 0.2


@pytest.mark.parametrize("method", ["heun3", "ab2", "ab3", "ab4"])
def test_uneven_steps_keep_the_order(method, exact):
    assert abs(slope(method, ShiftedGrid(2.0), exact) - ORDERS[method]) < 0.2


@pytest.mark.parametrize(
    "published",
    [(3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)],
)
def test_adams_weights_on_an_even_grid_are_the_published_ones(published):
    times = [0.5 - 0.1 * j for j in range(len(published))]
    assert adams_weights(times, 0.6) == pytest.approx(published, abs=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_weights_integrate_polynomials_on_an_uneven_grid(order):
    times, end = [0.5, 0.41, 0.2, 0.15][:order], 0.63
    w = adams_weights(times, end)
    for m in range(order):
        integral = (end ** (m + 1) - 0.5 ** (m + 1)) / (m + 1)
        slopes = sum(wj * t**m for wj, t in zip(w, times, strict=True))
        assert (end - 0.5) * slopes == pytest.approx(integral, abs=1e-12)


COSTS = {
    "euler": lambda n: n,
    "midpoint": lambda n: 2 * n,
    "heun2": lambda n: 2 * n,
    "heun3": lambda n: 3 * n,
    "rk4": lambda n: 4 * n,
    "ab2": lambda n: n + 1,
    "ab3": lambda n: n + min(n, 2),
    "ab4": lambda n: n + 2 * min(n, 3),
}


def counting(field):
    calls = []

    def counted(x, t):
        calls.append(float(t))
        return field(x, t)

    return counted, calls


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
@pytest.mark.parametrize("method", ORDERS)
def test_fixed_methods_cost_what_they_say(method, num_steps):
    field, calls = counting(PATH.velocity)
    solver = ODESolver(method, num_steps)
    solution = solver.solve(field, points())
    assert solution.nfe == solver.evaluations == len(calls) == COSTS[method](num_steps)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.31), (0.97, 1.0)], ids=str)
def test_adaptive_methods_count_and_stay_inside_the_interval(method, ends):
    field, calls = counting(PATH.velocity)
    solver = ODESolver(method, rtol=1e-3, atol=1e-3)
    solution = solver.solve(field, points(), *ends)
    assert solution.nfe == len(calls)
    assert solver.evaluations is None
    assert min(ends) <= min(calls)
    assert max(calls) <= max(ends)


def test_a_still_field_does_not_lure_the_first_step_outside():
    """A slope that is nearly zero makes the guess of a first step long."""
    field, calls = counting(lambda x, t: 1e-4 * x)
    ODESolver("dopri5").solve(field, 1 + points().abs())
    assert max(calls) <= 1


@pytest.mark.parametrize("method", FREE)
def test_states_on_the_way_come_without_a_second_solve(method):
    times = [0.0, 0.25, 0.5, 1.0]
    solver = ODESolver(method, num_steps=60, rtol=1e-4, atol=1e-4)
    plain = solver.solve(PATH.velocity, points())
    solution = solver.solve(PATH.velocity, points(), save_at=times)
    assert solution.times.tolist() == times
    assert solution.nfe == plain.nfe
    torch.testing.assert_close(solution.x, plain.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.states[0], points(), rtol=0, atol=0)
    torch.testing.assert_close(solution.states[-1], solution.x, rtol=0, atol=1e-12)
    half = solver.solve(PATH.velocity, points(), 0.0, 0.5).x
    # 60 steps to the whole and to the half differ by the method's error
    atol = 0.1 if method in ("euler", "fehlberg2") else 5e-3
    torch.testing.assert_close(solution.states[2], half, rtol=0, atol=atol)


def test_save_at_a_number_gives_equal_times_in_the_order_of_the_flow():
    solution = ODESolver("heun2", 7).solve(PATH.velocity, points(), 1.0, 0.0, save_at=5)
    assert solution.times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    torch.testing.assert_close(solution.states[0], points())
    torch.testing.assert_close(solution.states[-1], solution.x)


def test_no_states_unless_asked():
    assert ODESolver("euler", 3).solve(PATH.velocity, points()).states.shape == (0, 8, 2)


@pytest.mark.parametrize("schedule", [Linear(), Trigonometric()], ids=str)
@pytest.mark.parametrize(
    "solver", [ODESolver("rk4", 80), ODESolver("dopri5", rtol=1e-9, atol=1e-9)]
)
def test_forward_and_back_returns(solver, schedule):
    field = MIXTURE.along(schedule).velocity
    x1 = solver.solve(field, points()).x
    # both solvers err by about 1e-7 each way on this flow
    torch.testing.assert_close(solver.solve(field, x1, 1.0, 0.0).x, points(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_tighter_tolerance_errs_less(method, exact):
    errors = [
        rms(ODESolver(method, rtol=tol, atol=tol).solve(PATH.velocity, points()).x - exact)
        for tol in (1e-3, 1e-5)
    ]
    # proportional for a method whose error estimate has the order of its error; fehlberg2's has one less
    assert errors[1] < errors[0] / 10


def test_refined_is_a_tenth_of_the_tolerance_or_twice_the_steps():
    assert ODESolver("rk4", 10).refined().num_steps == 20
    finer = ODESolver("dopri5", rtol=1e-4, atol=1e-6).refined()
    assert (finer.rtol, finer.atol) == pytest.approx((1e-5, 1e-7))


def test_precision_of_the_state_is_kept_and_handed_to_the_field():
    seen = []

    def field(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return -x

    for method in ("rk4", "dopri5"):
        assert ODESolver(method).solve(field, points().float()).x.dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float32, torch.Size(()))}


def test_inner_serves_only_the_stages_that_weigh_nothing():
    field, calls = counting(PATH.velocity)
    inner, inner_calls = counting(PATH.velocity)
    for method, spared in {"midpoint": 1, "heun3": 1, "heun2": 0, "rk4": 0, "ab3": 0}.items():
        calls.clear(), inner_calls.clear()
        solution = ODESolver(method, 6).solve(field, points(), inner=inner)
        assert len(inner_calls) == 6 * spared
        assert len(calls) + len(inner_calls) == solution.nfe
        plain = ODESolver(method, 6).solve(PATH.velocity, points())
        torch.testing.assert_close(solution.x, plain.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["heun2", "ab3", "dopri5"])
def test_gradients_pass_through_the_solver(method):
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = ODESolver(method, 200, rtol=1e-8, atol=1e-8).solve(lambda x, t: rate * x, points()).x
    (gradient,) = torch.autograd.grad(x.sum(), rate)
    exact = (points() * math.exp(0.7)).sum()  # d/da of x0 exp(a)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", FREE)
def test_blow_up_names_the_method_and_the_time(method):
    """x' = x^2 from 2 is infinite at t = 1/2; from -1 it is tame."""
    x = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match=rf"{method}.*t=0\.[4-9]"):
        ODESolver(method, 400, max_num_steps=3000).solve(lambda x, t: x**2, x)


@pytest.mark.parametrize("method", ["euler", "ab2", "dopri5"])
def test_a_nan_field_names_the_method_and_the_time(method):
    def field(x, t):
        return x * float("nan") if t > 0.5 else -x

    # a fixed-step method looks after every tenth step
    with pytest.raises(SolverError, match=rf"{method}.*t=0\.(5|60|61)"):
        ODESolver(method, 100).solve(field, points())


def test_the_time_of_a_loss_is_never_before_it():
    """x' = 270 x by Euler's is lost at t = 0.68; the sum of its 20,000 numbers is infinite ten steps earlier."""
    with pytest.raises(SolverError, match=r"t=0\.(68|69|7\d)"):
        ODESolver("euler", 100).solve(lambda x, t: 270 * x, torch.ones(10_000, 2))


def test_lost_samples_are_named():
    x = points(4)
    with pytest.raises(SolverError, match=r"2 of 4 samples \(first: \[1, 3\]\)"):
        ODESolver("euler", 4).solve(lambda x, t: x / torch.tensor([[1], [0], [1], [0]]), x)


def test_too_many_steps_is_an_error():
    with pytest.raises(SolverError, match=r"dopri5.*max_num_steps"):
        ODESolver("dopri5", rtol=1e-9, atol=1e-9, max_num_steps=3).solve(PATH.velocity, points())


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"rtol": -1.0}, {"atol": 0.0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ODESolver(**settings)


def test_an_unknown_method_is_refused_with_the_known_ones():
    solver = ODESolver()
    object.__setattr__(solver, "method", "rk99")  # past the type check of the tests
    with pytest.raises(ValueError, match=r"rk99.*choose one of euler"):
        solver.__post_init__()


@pytest.mark.parametrize("save_at", [1, -1, [0.5, 1.5]])
def test_bad_times_are_refused(save_at):
    with pytest.raises(ValueError, match="save_at"):
        ODESolver("euler").solve(PATH.velocity, points(), save_at=save_at)


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match="empty"):
        ODESolver("euler").solve(PATH.velocity, points(), 0.5, 0.5)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.9, 0.1)], ids=["forward", "back"])
def test_our_own_steps_are_those_of_torchdiffeq(method, ends):
    def field(x, t):
        return torch.sin(3 * x) * (1 + t) - x.flip(1)

    x = torch.randn(5, 2, dtype=torch.float64, generator=Key(0).generator())
    grid, stops = ShiftedGrid(2.0), torch.linspace(*ends, 4, dtype=torch.float64)
    solution = ODESolver(method, num_steps=7, grid=grid).solve(field, x, *ends, save_at=4)
    options = {"grid_constructor": lambda func, y0, t: grid.points(7, *ends)}
    theirs = odeint(lambda t, x: field(x, t), x, stops, method=method, options=options)
    # the same operations in another order
    torch.testing.assert_close(solution.states, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solution.x, theirs[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_the_adams_methods_of_torchdiffeq_are_of_fourth_order(method, exact):
    # implicit_adams iterates to rtol in each step
    errors = [
        rms(ODESolver(method, n, rtol=1e-8, atol=1e-8).solve(PATH.velocity, points()).x - exact)
        for n in (96, 384)
    ]
    assert abs(math.log2(errors[0] / errors[1]) / 2 - 4) < 0.2


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_the_adams_methods_of_torchdiffeq_refuse_an_uneven_grid(method):
    with pytest.raises(ValueError, match="ab2"):
        ODESolver(method, grid=ShiftedGrid(3.0))
