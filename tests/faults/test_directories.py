"""Which directories are written to: an empty one, or the run's own, wherever it lies; and paths as people type them."""

import json
import os
import shutil

import pytest
import torch
from filelock import FileLock

import fmlightning as package
from fmlightning.runs.directory import Run
from fmlightning.runs.lock import lock_file
from fmlightning.training.module import FlowMatching

QUICK = (
    "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.metrics=[]",
    "--trainer.enable_progress_bar=false", "--trainer.devices=1", "--data.val_size=64", "--data.test_size=64",
    "--model.network.width=16", "--model.network.depth=2", "--trainer.limit_val_batches=0", "--trainer.max_steps=2",
)  # fmt: skip


@pytest.fixture
def start(fmlightning, repository):
    def call(*options, config=repository / "configs/toy/moons.yaml"):
        return fmlightning("fit", "--config", config, *QUICK, *options)

    return call


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "file",
    [
        "checkpoints/last.ckpt",
        "config.yaml",
        "metrics.csv",
        ".notes.tmp",
        "wandb/x",
        "samples/x.png",
    ],
)
@pytest.mark.parametrize("options", [(), ("--rerun",), ("--ckpt_path=auto",)], ids=str)
def test_a_directory_with_files_of_others_is_left_as_it_is(start, tmp_path, file, options):
    folder = tmp_path / "mine"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text("mine")
    before = content(folder)
    status, shown = start(f"--run_dir={folder}", *options)
    assert status == 2
    assert f"run_dir={folder} holds {file.split('/')[0]}, and no run" in shown
    assert content(folder) == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("mine")] == ["mine"]


def test_a_run_that_lost_its_manifest_is_not_trained_over(start, trained):
    run = trained("toy/moons", *QUICK)
    (run / "manifest.json").unlink()
    before = content(run)
    status, shown = start(f"--run_dir={run}")
    assert status == 2
    assert "manifest.json" in shown
    assert content(run) == before


def test_what_is_refused_before_its_first_step_leaves_nothing(start, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("this does not fit")

    monkeypatch.setattr(FlowMatching, "setup", refuse)
    run = tmp_path / "run"
    status, shown = start(f"--run_dir={run}", "--wandb.mode=offline")
    assert status == 2, shown
    assert "this does not fit" in shown
    assert not run.exists()


@pytest.mark.parametrize("how", ["option", "config", "root"])
def test_the_home_directory_may_be_written_as_people_do(start, tmp_path, monkeypatch, how):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    options = ()
    if how == "option":
        options = ("--run_dir=~/x/run",)
    elif how == "config":
        (tmp_path / "place.yaml").write_text("run_dir: ~/x/run")
        options = ("--config", tmp_path / "place.yaml")
    else:
        monkeypatch.setenv("FMLIGHTNING_RUNS", "~/x")
    status, shown = start(*options)
    assert status == 0, shown
    assert not (tmp_path / "~").exists()
    [checkpoint] = (tmp_path / "home/x").rglob("last.ckpt")
    assert (checkpoint.parents[1] / "config.yaml").is_file()
    # and the same again finds it
    status, shown = start(*options)
    assert status == 2
    assert "finished" in shown


def test_a_variable_that_nobody_replaces_is_no_name(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, shown = start("--run_dir=${SCRATCH}/run")
    assert status == 2
    assert "holds a variable" in shown
    assert not list(tmp_path.glob("*{*"))


@pytest.mark.parametrize("named", ["auto", "last", "itself"])
def test_a_moved_run_goes_on_where_it_lies(start, trained, tmp_path, named):
    run = trained("toy/moons", *QUICK)
    text = (run / "config.yaml").read_text()
    moved = shutil.move(run, tmp_path / "moved")
    assert f"run_dir: {tmp_path}" in text or "run_dir: " in text
    path = moved if named == "itself" else named
    status, shown = start(
        f"--ckpt_path={path}", "--trainer.max_steps=4", config=moved / "config.yaml"
    )
    assert status == 0, shown
    assert Run(moved).manifest["start_step"] == 2
    assert torch.load(moved / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert not run.exists()


def test_a_saved_config_alone_is_another_run(start, trained, runs_below_tmp):
    run = trained("toy/moons", *QUICK)
    before = content(run)
    status, shown = start("--seed_everything=1", config=run / "config.yaml")
    assert status == 0, shown
    assert content(run) == before
    [other] = runs_below_tmp.rglob("manifest.json")
    assert json.loads(other.read_text())["seed"] == 1


def test_a_relative_file_of_a_run_is_found_from_elsewhere(start, tmp_path, monkeypatch):
    (tmp_path / "data.csv").write_text("\n".join(f"{k % 7},{k % 11}" for k in range(50)))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    status, shown = start(
        f"--run_dir={run}", "--model.source=PointsFile", "--model.source.file=data.csv"
    )
    assert status == 0, shown
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    assert package.load(run).source.event_shape == (2,)


def test_a_command_that_is_refused_leaves_what_another_has_just_marked(start, tmp_path):
    """Between its mark and its first step a run's directory holds a short manifest, and is locked."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text('{"status": "new", "config_hash": ""}')
    with FileLock(lock_file(run)):
        status, shown = start(f"--run_dir={run}")
    assert status == 2
    assert "is being trained by" in shown
    assert (run / "manifest.json").is_file()
