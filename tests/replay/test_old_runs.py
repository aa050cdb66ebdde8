"""Runs of an earlier version are read as they were written: loaded, sampled from, and gone on with.

Each folder of `fixtures` has a run that was stopped after step 40 of 80, its export, and `expected.json`: 16 samples,
and the weights at step 80, which that version reached alike with the stop and without. The configs name what may get
another name: the moons are paired ahead of the step, the digits predict data, weighed, with labels hidden from some,
and the third is trained by maximum likelihood.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import table
import torch

import fmlightning

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
KINDS = ("run", "export")


@pytest.fixture
def shop(tmp_path: Path) -> table.Workshop:
    return table.Workshop(tmp_path / "shop")


@pytest.fixture(params=NAMES)
def home(request: pytest.FixtureRequest) -> Path:
    return FIXTURES / request.param


def expected(home: Path) -> dict[str, Any]:
    return json.loads((home / "expected.json").read_text())


def test_run_and_export_load_as_one_field(home: Path) -> None:
    run, export = (fmlightning.load(home / kind) for kind in KINDS)
    shape = np.array(expected(home)["samples"]).shape[1:]
    x, t = torch.ones(4, *shape), torch.linspace(0.1, 0.9, 4)
    assert run(x, t).abs().min() > 0
    assert torch.equal(run(x, t), export(x, t))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_the_same(shop: table.Workshop, home: Path, kind: str) -> None:
    out, before = shop.folder / "samples", expected(home)
    shop.command("sample", str(home / kind), *cases.OLD_SAMPLE, cases.OUT.format(out))
    x = np.load(out / "samples.npz")["x"]
    if table.machine() in before["digests"]:
        assert table.digest([torch.from_numpy(x)]) == before["digests"][table.machine()]["samples"]
    # elsewhere to rounding in float32, which the steps of the solver follow: other instruction sets were seen to
    # differ by 2e-6 of the largest
    np.testing.assert_allclose(x, np.array(before["samples"]), rtol=0, atol=1e-5 * np.abs(x).max())


def test_a_stopped_run_goes_on_to_the_same_weights(shop: table.Workshop, home: Path) -> None:
    if table.machine() not in (before := expected(home)["digests"]):
        pytest.skip(f"{home.name}/expected.json has nothing of {table.machine()}")
    run = shop.folder / "run"
    shutil.copytree(home / "run", run)
    config = str(run / "config.yaml")
    shop.command("fit", "--config", config, cases.RUN_DIR.format(run), cases.RESUMED)
    assert table.checkpoint(run)["global_step"] == 80
    weights = [*table.network(run), *table.averages(run)]
    assert table.digest(weights) == before[table.machine()]["weights"]
