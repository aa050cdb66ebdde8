"""The comparisons on digits and photographs can be planned as they stand, and train every cell under its own name."""

from pathlib import Path

import pytest

from fmlightning.studies.sweep.file import read_sweep
from fmlightning.studies.sweep.plan import plan

ROOT = Path(__file__).parents[2]
SIZES = {"digits/sweep": 9, "digits/guidance": 3, "photos/sweep": 9}


@pytest.mark.slow  # resolves every cell's config
@pytest.mark.parametrize("name", SIZES)
def test_a_comparison_is_planned(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = plan(read_sweep(ROOT / "experiments" / f"{name}.yaml")).cells
    assert len({cell.run for cell in cells}) == len(cells) == SIZES[name]
