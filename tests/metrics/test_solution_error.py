"""A solver's own error, on a flow that is known: x(1) = 3 x(0)."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from scipy.integrate import solve_ivp

from fmlightning.cli.load import TrainedFlow
from fmlightning.flow.determinism import seeded
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import sample, source_points
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork
from fmlightning.metrics.solution_error import SolutionError
from fmlightning.nets.plain import PlainMLP
from fmlightning.studies.evaluate.grid import Cell
from fmlightning.studies.evaluate.reference import Reference

LAW = GaussianMixture([1.0], [[0.0, 0.0]], [3.0])
INDEX, SEED = torch.arange(500), 5


@pytest.fixture
def flow():
    field = NetworkField(OracleNetwork(LAW.along(Linear())), Linear())
    return TrainedFlow(field, Gaussian(), ODESolver(), Guidance(), 0.0, (2,), 0, None, SEED)


def cell(method="euler", num_steps=10):
    return Cell(ODESolver(method, num_steps=num_steps), Guidance())


def test_the_reference_is_the_solution(flow):
    ends = Reference(1e-10, SEED).ends(flow, flow.field, cell(), INDEX, None)
    x0 = source_points(Gaussian(), SEED, INDEX, (2,)).double()
    assert ends.dtype == torch.float64
    assert (ends - 3 * x0).abs().max() < 1e-8  # dopri5 at 1e-10


def test_the_reference_calls_the_network_in_float64(flow):
    """As scipy solves it; a network in float32 would be off by its rounding, 1e-7."""
    with seeded(Key(1)):
        flow = replace(flow, field=NetworkField(PlainMLP(activation="tanh"), Linear()))
    ends = Reference(1e-11, SEED).ends(flow, flow.field, cell(), INDEX[:3], None)
    assert all(p.dtype == torch.float32 for p in flow.field.parameters())
    exact = deepcopy(flow.field).double()

    def slope(t, x):
        with torch.no_grad():
            v = exact(torch.from_numpy(x).reshape(3, 2), torch.tensor(t, dtype=torch.float64))
        return v.flatten().numpy()

    x0 = source_points(Gaussian(), SEED, INDEX[:3], (2,)).double().flatten().numpy()
    found = solve_ivp(slope, (0, 1), x0, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    assert abs(ends.flatten().numpy() - found).max() < 1e-9


def test_it_is_solved_once_for_all_solvers(flow):
    reference = Reference(1e-6, SEED)
    first = reference.ends(flow, flow.field, cell("euler"), INDEX, None)
    assert reference.ends(flow, flow.field, cell("rk4", 3), INDEX, None) is first
    assert reference.ends(flow, flow.field, cell(), INDEX[:9], None) is not first


def test_eulers_error_is_that_of_its_product(flow):
    """A step multiplies x by 1 + h std'/std."""
    n = 10
    factor = math.prod(
        1 + (10 * t - 1) / (9 * t**2 + (1 - t) ** 2) / n for t in (k / n for k in range(n))
    )
    solution = sample(flow.field, Gaussian(), cell().solver, INDEX, (2,), seed=SEED)
    error = SolutionError()
    for part in INDEX.split(128):
        ends = Reference(1e-10, SEED).ends(flow, flow.field, cell(), part, None)
        error.update(solution.x[part], ends)
    x0 = source_points(Gaussian(), SEED, INDEX, (2,)).double()
    expected = abs(factor - 3) * float(x0.square().mean().sqrt())
    assert error.compute()["solver_error"] == pytest.approx(expected, rel=1e-5)  # float32
    assert SolutionError().compute() == {}


METRICS = '--metrics=[{"class_path": "Wasserstein", "init_args": {"subsets": 1, "size": 100}}]'


def test_evaluate_scores_it_where_it_is_asked(fit, fmlightning):
    run = fit(
        "toy/moons", "--trainer.max_steps=20", "--data.test_size=100", "--data.val_size=64", "--evaluation.metrics=[]"
    )  # fmt: skip
    options = (METRICS, "--device=cpu", "--solvers=rk4,explicit_adams", "--nfe=8,32")
    options = (*options, "--grids=UniformGrid,EDMGrid")

    def evaluated(*more):
        status, shown = fmlightning("evaluate", run, *options, *more)
        assert status == 0, shown
        return json.loads((run / "evaluations" / "evaluations.json").read_text())

    plain, scored = evaluated(), evaluated("--reference=1e-8")
    assert not any("solver_error" in r["metrics"] for r in plain)
    errors = {(r["method"], r["budget"], r["grid"]): r["metrics"]["solver_error"] for r in scored}
    # of fourth order: a quarter of the step leaves far less than a tenth
    coarse, fine = (
        errors["rk4", "2 steps", "UniformGrid()"],
        errors["rk4", "8 steps", "UniformGrid()"],
    )
    assert 0 < fine < coarse / 10
    # an Adams method of torchdiffeq has equal steps, and no other grid
    assert {grid for method, _, grid in errors if method == "explicit_adams"} == {"UniformGrid()"}
    assert len(errors) == len(scored) == 6
    for a, b in zip(plain, scored, strict=True):
        assert b["metrics"] | {"solver_error": 0} == a["metrics"] | {"solver_error": 0}
