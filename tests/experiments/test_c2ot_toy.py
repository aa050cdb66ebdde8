"""The table of conditional transport, after a fiftieth of its steps: who is better than whom is plain by then."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments" / "c2ot_toy" / "table.py"
STEPS = 400


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("c2ot_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scores(script):
    return {
        (condition, name): script.cell(condition, name, STEPS, seed=0)
        for condition, name in script.CELLS
    }


@pytest.mark.slow
def test_plain_transport_fails_under_conditions_and_conditional_transport_does_not(scores):
    # the published ratios are 25 and 165, and ours after all steps similar; a third of what these steps gave is asked
    for condition, fails_by in (("class", 3), ("x", 4)):
        plain, conditional = scores[condition, "OT"], scores[condition, "C2OT"]
        assert plain["adaptive"] > fails_by * conditional["adaptive"]
        assert plain["adaptive"] > fails_by * scores[condition, "FM"]["adaptive"]


@pytest.mark.slow
def test_transport_makes_one_step_enough_where_the_source_is_the_same_for_all(scores):
    for condition, good, by in (("none", "OT", 5), ("class", "C2OT", 4), ("x", "C2OT", 1.5)):
        assert by * scores[condition, good]["euler1"] < scores[condition, "FM"]["euler1"]


def test_every_cell_trains_and_is_scored(script, monkeypatch):
    monkeypatch.setattr(script, "POINTS", 100)
    for condition, name in script.CELLS:
        found = script.cell(condition, name, steps=3, seed=0)
        assert set(found) == {"euler1", "adaptive"}
        assert all(value > 0 for value in found.values())
    lines = script.table({"x C2OT": [found, found]}).splitlines()
    assert lines[-1].startswith("| x C2OT | ")


def test_pools_are_functions_of_their_key(script):
    first, second = (
        next(script.pools("class", script.COUPLINGS["C2OT"]("class"), script.Key(3)))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    x0, x1, c = first
    # a label tells the moon: the inner one lies below and to the right
    assert x1[c[:, 0] > 0, 0].mean() > x1[c[:, 0] < 0, 0].mean()
    assert len(x0.unique(dim=0)) == script.POOL
