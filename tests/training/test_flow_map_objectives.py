"""Flow maps by the commands: a run is trained, resumed, sampled in jumps and along its diagonal, and scored."""

import json

import numpy as np
import pytest
import torch

from fmlightning.runs.signals import STOP_AFTER

SHORT = (
    "--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1",
    "--model.network.width=16", "--model.network.depth=2", "--data.val_size=64", "--data.test_size=200",
    "--data.batch_size=32", "--evaluation.metrics=[{class_path: Wasserstein, init_args: {subsets: 1, size: 100}}]",
)  # fmt: skip
OBJECTIVES = (
    "LSD",
    "MeanFlow",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("PSD", "ESD", "AlphaFlow")),
)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stopped_run_ends_like_one_that_was_not(
    fit, fmlightning, repository, tmp_path, monkeypatch, objective
):
    whole = fit("few_step/lsd", *SHORT, f"--model.objective={objective}", name="whole")
    command = (
        "fit", "--config", repository / "configs/few_step/lsd.yaml", *SHORT, f"--model.objective={objective}",
        "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.at_end=false",
        f"--run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    monkeypatch.setenv(STOP_AFTER, "2")
    assert fmlightning(*command)[0] == 75
    monkeypatch.delenv(STOP_AFTER)
    status, shown = fmlightning(*command, "--ckpt_path=auto")
    assert status == 0, shown
    one, other = (
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in (whole, tmp_path / "run")
    )
    assert any(k.startswith("network.duration") for k in one)
    assert all(torch.equal(other[k], v) for k, v in one.items())


def test_it_is_sampled_in_jumps_along_its_diagonal_and_scored(trained, fmlightning, tmp_path):
    run = trained("few_step/lsd", *SHORT, "--evaluation.at_end=true")
    assert json.loads((run / "evaluation.json").read_text())["metrics"]["nfe"] == 1
    for name, options in {
        "jumps": ("--solver.num_steps=4",),
        "noise": ("--solver.num_steps=2", "--solver.renoise=true"),
        "diagonal": ("--solver=ODESolver", "--solver.method=heun2", "--solver.num_steps=5"),
        "sde": ("--solver=SDESolver", "--solver.num_steps=5"),
    }.items():
        status, shown = fmlightning("sample", run, "--n=8", f"--out={tmp_path / name}", *options)
        assert status == 0, shown
        assert np.isfinite(np.load(tmp_path / name / "samples.npz")["x"]).all()


def test_a_velocity_run_becomes_a_flow_map(trained, fmlightning, tmp_path, repository):
    run = trained(
        "few_step/lsd", *SHORT, "--model.objective=CFM", "--model.network.two_times=false", "--model.solver=ODESolver"
    )  # fmt: skip
    status, shown = fmlightning(
        "fit", "--config", repository / "configs/few_step/lsd.yaml", *SHORT, "--wandb.mode=disabled",
        f"--init_from={run}", f"--run_dir={tmp_path / 'map'}", "--evaluation.at_end=false",
        "--samples.at_end=false", "--trajectories.at_end=false",
    )  # fmt: skip
    assert status == 0, shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model.network.two_times=false",), "set model.network.two_times=true"),
        (("--model.path=IndependentCFM",), "gamma > 0"),
        (("--model.objective=CFM",), "needs a model that offers jump"),
        (("--model.objective.diagonal=2",), "diagonal=2"),
    ],
)
def test_what_does_not_fit_is_one_message_before_training(
    fmlightning, repository, tmp_path, options, words
):
    status, shown = fmlightning(
        "fit", "--config", repository / "configs/few_step/lsd.yaml", "--wandb.mode=disabled",
        f"--run_dir={tmp_path / 'run'}", *options,
    )  # fmt: skip
    assert status == 2
    assert words in shown
    assert not (tmp_path / "run").exists()
