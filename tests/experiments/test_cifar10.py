"""The CIFAR-10 sweeps resolve and run, small, on generated files in CIFAR's format."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
import torchvision.datasets
import yaml

from fmlightning.flow.keys import Key
from fmlightning.runs.directory import Run
from fmlightning.studies.sweep.file import read_sweep
from fmlightning.studies.sweep.plan import plan

FOLDER = Path(__file__).parents[2] / "experiments" / "cifar10"
SWEEPS = ("sweep_torchcfm", "sweep_lipman")
IMAGES = 60
"""In each of the five files for training and in that for testing; the whole are more than a published batch."""

SMALL = (
    "--model.network.channels=32", "--model.network.head_channels=32", "--data.batch_size=4",
    "--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--wandb.mode=disabled",
    "--samples.at_end=false", "--trajectories.at_end=false",
)  # fmt: skip


def digest(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """The pickles of CIFAR's layout, with few images; their checksums become the published ones."""
    published = torchvision.datasets.CIFAR10
    folder = tmp_path / "data" / published.base_folder
    folder.mkdir(parents=True)
    for name in ("train_list", "test_list"):
        files = []
        for number, (file, _) in enumerate(getattr(published, name)):
            generator = Key(number).fold(name).generator()
            pixels = torch.randint(0, 256, (IMAGES, 3072), generator=generator).to(torch.uint8)
            batch = {"data": pixels.numpy(), "labels": [(number + k) % 10 for k in range(IMAGES)]}
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
            files.append([file, digest(folder / file)])
        monkeypatch.setattr(published, name, files)
    meta = folder / published.meta["filename"]
    meta.write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}, protocol=2))
    monkeypatch.setattr(published, "meta", {**published.meta, "md5": digest(meta)})
    monkeypatch.setenv("FMLIGHTNING_DATA", str(tmp_path / "data"))


@pytest.fixture
def resolved(cifar, monkeypatch):
    from fmlightning.studies.sweep import resolve

    monkeypatch.setattr("fmlightning.studies.sweep.plan.resolve_in_child", resolve.answer)
    monkeypatch.chdir(FOLDER.parents[1])
    return lambda name: plan(read_sweep(FOLDER / f"{name}.yaml"))


@pytest.mark.parametrize(
    "name", ["sweep_torchcfm", pytest.param("sweep_lipman", marks=pytest.mark.slow)]
)
def test_its_plan_resolves(name, resolved):
    found = resolved(name)
    steps = {"sweep_torchcfm": 400_001, "sweep_lipman": 391_000}
    assert {cell.max_steps for cell in found.cells} == {steps[name]}
    assert found.scores == {"sweep_torchcfm": 3, "sweep_lipman": 1}[name]


def test_each_is_scored_as_published():
    for name in SWEEPS:
        asked = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["evaluate"]
        frechet = asked["metrics"][0]
        assert frechet["class_path"] == "Frechet"
        assert frechet["init_args"] == {"features": "inception", "num_samples": 50_000}
        assert "dopri5" in asked["solvers"]
        assert asked["tolerances"] == [1e-5]


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_each_cell_trains_and_is_scored_small(name, resolved, fmlightning, tmp_path):
    found = resolved(name)
    for number, cell in enumerate(c for c in found.cells if c.seed == found.sweep.seeds[0]):
        words = found.job(cell).fit[3:]  # behind `python -m fmlightning`
        folder = tmp_path / f"cell{number}"
        status, shown = fmlightning(*words, *SMALL, f"--run_dir={folder}")
        assert status == 0, shown
        assert Run(folder).status == "finished"
        # no network of pictures is here: the likelihood is a judge that needs none
        judge = {"class_path": "NegativeLogLikelihood"}
        judge["init_args"] = {
            "size": 2,
            "within": 1e9,
            "divergence": "hutchinson",
            "rtol": 0.1,
            "atol": 0.1,
        }
        status, shown = fmlightning(
            "evaluate", folder, f"--metrics={json.dumps([judge])}", "--solvers=euler", "--nfe=2", "--batch_size=2",
            "--device=cpu",
        )  # fmt: skip
        assert status == 0, shown
        (record,) = json.loads((folder / "evaluations" / "evaluations.json").read_text())
        assert "bits_per_dimension" in record["metrics"]
