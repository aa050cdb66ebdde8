"""The table of `fmlightning verify`, row by row, and whether its own numbers can be trusted."""

import itertools
import math

import pytest
import torch

from fmlightning.cli import verify as command
from fmlightning.flow.paths.schedules import Linear, SchrodingerBridge, VarianceExploding
from fmlightning.flow.theory import theorems as verify
from fmlightning.flow.theory.sde_bias import DIFFUSIONS
from fmlightning.flow.theory.theorems import SCHEDULES, THEOREMS

SOLVED = (verify.transport, verify.transport_of_samples, verify.mass)
QUICK = (Linear, SchrodingerBridge, VarianceExploding)


def cases():
    """Every row; those that solve an equation are slow but for three unlike paths."""
    for theorem, schedule in itertools.product(THEOREMS, SCHEDULES):
        slow = theorem in SOLVED and not isinstance(schedule, QUICK)
        marks = [pytest.mark.slow] if slow else []
        name = f"{theorem.__name__}-{verify.label(schedule)}"
        yield pytest.param(theorem, schedule, marks=marks, id=name)


@pytest.mark.parametrize(("theorem", "schedule"), list(cases()))
def test_theorem(theorem, schedule):
    row = theorem(schedule)
    assert row.passed, row
    assert math.isfinite(row.value)


@pytest.mark.parametrize("schedule", [Linear(), VarianceExploding()], ids=verify.label)
def test_the_quadrature_has_converged(schedule):
    """Half the spacing moves L_CFM by less than a tenth of what the theorem may be off by."""
    network = verify.Waves(1)
    with torch.no_grad():
        coarse = verify.conditional_loss(network, schedule)
        fine = verify.conditional_loss(network, schedule, 65)
    torch.testing.assert_close(coarse, fine, rtol=1e-7, atol=0)


def test_the_constant_is_not_small():
    """Else L_CFM - L_FM = C would say little."""
    network = verify.Waves(1)
    with torch.no_grad():
        fm, constant = verify.marginal_loss(network, Linear())
    assert fm > 0.1
    assert constant > 0.1


@pytest.mark.parametrize("size", [1e-1, 1e-4, 1e-7])
def test_continuity_sees_small_errors(size):
    """A field that is off by a part in ten million is told from the true one."""
    path = verify.PLANE.along(Linear())
    residual = verify.continuity_residual(
        path, lambda x, t: (1 + size) * path.velocity(x, t), *verify.cloud(path)
    )
    assert size / 100 < residual.median() < 2 * size


def test_the_floor_is_that_of_the_diffusion_paths():
    """Paths with alpha(0) = 0 have none; variance exploding has more than variance preserving."""
    floors = {row.path.split()[0]: row.value for row in map(verify.start_floor, SCHEDULES)}
    assert abs(floors["Linear"]) < 1e-12
    assert 1e-7 < floors["VariancePreserving"] < floors["VarianceExploding"] < 1e-4


def test_the_command_prints_a_table_and_succeeds(capsys, monkeypatch):
    monkeypatch.setattr(verify, "THEOREMS", (verify.continuity, verify.marginalisation))
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert "SchrodingerBridge on [0.001, 0.999]" in printed
    count = 2 * len(SCHEDULES) + len(DIFFUSIONS)
    assert f"{count} of {count} rows pass" in printed


def test_the_command_fails_with_a_row(capsys, monkeypatch):
    monkeypatch.setattr(SchrodingerBridge, "d_alpha", lambda self, t: torch.full_like(t, 1.01))
    monkeypatch.setattr(verify, "THEOREMS", (verify.continuity,))
    assert command.main(["--path", "SchrodingerBridge"]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert command.main(["--path", "Linear"]) == 0
