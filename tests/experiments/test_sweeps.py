"""Every sweep of the experiments resolves, and holds what its README says of a published protocol."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import make_moons, make_s_curve

from fmlightning.flow.keys import Key
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.toys import EightGaussians, Moons, SCurve
from fmlightning.metrics.transport import wasserstein2
from fmlightning.studies.sweep.cells import cells
from fmlightning.studies.sweep.file import read_sweep
from fmlightning.studies.sweep.plan import plan

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SWEEPS = sorted(p for p in EXPERIMENTS.glob("*/*.yaml") if p.parent.name != "cifar10")
LONG = {"tong2024_two_dim", "predictions_and_times"}


@pytest.fixture
def resolved(monkeypatch):
    """A sweep's plan, with every cell parsed and built in this process, which has torch already."""
    from fmlightning.studies.sweep import resolve

    monkeypatch.setattr("fmlightning.studies.sweep.plan.resolve_in_child", resolve.answer)
    monkeypatch.chdir(EXPERIMENTS.parent)
    return lambda path: plan(read_sweep(path))


def marked(path):
    """Twenty combinations and more take a while to build."""
    marks = [pytest.mark.slow] if path.parent.name in LONG else []
    return pytest.param(path, id=f"{path.parent.name}-{path.stem}", marks=marks)


@pytest.mark.parametrize(
    "path", sorted(EXPERIMENTS.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_it_has_cells_and_says_how_it_is_run(path, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    assert cells(read_sweep(path))
    assert f"fmlightning sweep {path.relative_to(EXPERIMENTS.parent)}" in path.read_text()


@pytest.mark.parametrize("path", [marked(path) for path in SWEEPS])
def test_its_plan_resolves(path, resolved):
    found = resolved(path)
    assert found.scores > 0
    assert all(cell.max_steps > 0 for cell in found.cells)


def content(name, file="sweep"):
    return yaml.safe_load((EXPERIMENTS / name / f"{file}.yaml").read_text())


# -- tong2024_two_dim -------------------------------------------------------------------------------


def test_the_full_protocol_is_the_published_one():
    config = yaml.safe_load((EXPERIMENTS.parent / "configs/toy/two_dim_tong2024.yaml").read_text())
    model, data = config["model"], config["data"]["init_args"]
    assert model["network"]["init_args"] == {
        "dim": 2,
        "width": 64,
        "depth": 3,
        "activation": "selu",
    }
    assert model["optimizer"]["class_path"] == "AdamW"
    settings = model["optimizer"]["init_args"]
    assert (settings["lr"], settings["weight_decay"]) == (1e-3, 1e-5)
    assert (data["batch_size"], data["train_size"]) == (512, 10_000)
    # a thousand epochs without the last, smaller batch
    assert config["trainer"]["max_steps"] == 1000 * (10_000 // 512)
    assert (model["solver"]["method"], model["solver"]["num_steps"]) == ("euler", 100)
    assert config["ema"]["decay"] == 0
    full = content("tong2024_two_dim", "sweep_full")
    assert full["seeds"] == [42, 43, 44, 45, 46]
    assert not {k for k in full["set"] if k.startswith(("trainer", "data", "model"))}
    methods = full["axes"]["method"]
    sigma = {
        name: (m["model.path"].get("init_args") or {})
        for name, m in methods.items()
        if isinstance(m["model.path"], dict)
    }
    assert sigma == {
        "FM": {"sigma_min": 0.1}, "I-CFM": {"noise_std": 0.1}, "OT-CFM": {"noise_std": 0.1},
        "SB-CFM": {"noise_std": 1.0},
    }  # fmt: skip


def test_the_small_sweep_differs_by_what_the_readme_lists():
    full, small = (content("tong2024_two_dim", f) for f in ("sweep_full", "sweep"))
    assert small["axes"] == full["axes"]
    assert small["evaluate"] == full["evaluate"]
    assert set(small["set"]) - set(full["set"]) == {
        "trainer.max_steps", "trainer.val_check_interval", "data.batch_size"
    }  # fmt: skip
    text = (EXPERIMENTS / "tong2024_two_dim" / "README.md").read_text()
    for value in (f"{small['set']['trainer.max_steps']:,}", str(small["set"]["data.batch_size"])):
        assert f"| {value} |" in text, value


def law(name, end):
    """The law of an end of a pair in the sweep."""
    pair = content("tong2024_two_dim", "sweep_full")["axes"]["data"][name]
    given = pair[end]
    kinds = {"EightGaussians": EightGaussians, "Moons": Moons, "SCurve": SCurve}
    if isinstance(given, str):
        return kinds[given]()
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in given["init_args"].items()}
    return kinds[given["class_path"]](**settings)


def published(name, count):
    """What the authors' data modules draw."""
    rng = np.random.RandomState(0)
    if name == "N to moons":
        x = make_moons(n_samples=count, noise=0.05, random_state=rng)[0] * 2
        return x - [1, 0]
    if name == "N to s-curve":
        return make_s_curve(n_samples=count, noise=0.05, random_state=rng)[0][:, [0, 2]] * 1.5
    x = make_moons(n_samples=count, noise=0.1, random_state=rng)[0]
    return (x - x.mean()) / x.std() * 7


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("N to moons", "data.target"),
        ("N to s-curve", "data.target"),
        ("moons to 8 Gaussians", "model.source"),
    ],
)
def test_the_laws_are_those_of_the_authors(name, end):
    n = 1500
    theirs = torch.from_numpy(published(name, n))
    ours, others = (
        law(name, end).sample((n, 2), Key(seed).generator(), torch.float64) for seed in (1, 2)
    )
    # as far as two samples of one law are; make_moons deals its angles out evenly, which brings it nearer
    assert wasserstein2(ours, theirs) < 1.25 * wasserstein2(ours, others)
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 4.5 * theirs.std() * math.sqrt(2 / n)


def test_the_standardised_moons_have_the_moments_they_claim():
    """Mean 0 and standard deviation 7, over both coordinates together."""
    toy = law("moons to 8 Gaussians", "model.source")
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    grid = torch.cartesian_prod(torch.tensor([0.25, 0.75], dtype=torch.float64), u)
    curve = toy.transform(grid, torch.zeros(len(grid), 2, dtype=torch.float64))
    assert float(curve.mean()) == pytest.approx(0, abs=1e-3)
    variance = float(curve.var(unbiased=False)) + (toy.scale * toy.noise) ** 2
    assert math.sqrt(variance) == pytest.approx(7, abs=1e-3)


# -- the others ---------------------------------------------------------------------------------------


def test_paths_are_compared_with_the_same_network_and_times():
    for file in ("sweep", "digits"):
        axes = content("lipman2023_paths", file)["axes"]
        assert list(axes) == ["path"]
        assert all(
            set(v) == {"model.path", "model.objective.prediction"} for v in axes["path"].values()
        )
        # a network that predicts VE's velocities would have to reach 50 log(5000)
        assert axes["path"]["VE noise"]["model.objective.prediction"] == "noise"


def test_velocity_without_weight_is_the_weight_of_velocity():
    """Why one combination is left out."""
    from fmlightning.flow.objectives.weightings import AsVelocity, Unweighted

    t = torch.linspace(0.1, 0.9, 5)
    assert torch.equal(AsVelocity()(t, Linear(), "velocity"), Unweighted()(t, Linear(), "velocity"))
    assert {
        "model.objective.prediction": "velocity",
        "model.objective.weighting": "AsVelocity",
    } in content("predictions_and_times")["exclude"]


def test_all_solvers_are_compared():
    from fmlightning.flow.solvers.ode import ADAPTIVE, FIXED

    assert set(content("solvers")["evaluate"]["solvers"]) == {*FIXED, *ADAPTIVE}
