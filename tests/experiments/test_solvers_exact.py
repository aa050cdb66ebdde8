"""The table and the figure of solver errors on exact fields, in little."""

import importlib.util
from pathlib import Path

import torch

from fmlightning.flow.keys import Key
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.toys import EightGaussians

FILE = Path(__file__).parents[2] / "experiments" / "solvers_exact" / "errors.py"


def script():
    spec = importlib.util.spec_from_file_location("solver_errors", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_curve_has_its_budgets_and_falls(tmp_path):
    errors = script()
    errors.BUDGETS, errors.TOLERANCES = (8, 64), (1e-2,)
    path = errors.GaussianMixture.of_eight_gaussians(EightGaussians()).along(Linear())
    x0 = torch.randn(8, 2, generator=Key(0).generator(), dtype=torch.float64)
    points = list(errors.errors(path, x0))
    curves = {p.curve for p in points}
    assert len(curves) == 9
    for curve in curves - {"dopri5"}:
        nfe = [p.nfe for p in points if p.curve == curve]
        found = [p.error for p in points if p.curve == curve]
        assert tuple(nfe) == errors.BUDGETS
        assert found[-1] < found[0] / 5  # eight times the evaluations, of order one at least
    text = errors.table(points)
    assert text.count("\n| ") == len(curves) - 1  # the fixed ones under the head
    file = tmp_path / "errors.png"
    errors.figure(dict.fromkeys("abcd", points)).savefig(file, dpi=30)
    assert file.stat().st_size > 1000
