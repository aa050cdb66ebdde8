"""Two processes take the optimisation path of one."""

import json

import pytest
import torch

QUICK = (
    "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false", "--trainer.max_steps=12",
    "--data.val_size=100", "--data.test_size=200", "--trainer.val_check_interval=6",
    "--evaluation.judges=[{class_path: Wasserstein, init_args: {subsets: 2, size: 100}}]",
    "--trainer.log_every_n_steps=3", "--model.solver={method: euler, num_steps: 4}",
)  # fmt: skip


@pytest.mark.parametrize("coupling", ["Independent", "MinibatchOT"])
def test_two_processes_train_as_one(command, tmp_path, coupling):
    runs = []
    for devices in (1, 2):
        run = tmp_path / f"on{devices}"
        result = command(
            "fit", "--config", "configs/toy/moons.yaml", "--config", "configs/trainer/cpu2.yaml", *QUICK,
            f"--model.coupling={coupling}", f"--trainer.devices={devices}", f"--run_dir={run}",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        runs.append(run)
    weights = [
        torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in runs
    ]
    for name, value in weights[0].items():
        # float32 gradients are summed in another order, and AdamW divides by their size: 1e-4 over 12 steps
        torch.testing.assert_close(weights[1][name], value, atol=1e-4, rtol=1e-3)
    rows = [(r / "metrics.csv").read_text().splitlines() for r in runs]
    assert len(rows[0]) == len(rows[1])
    scores = [json.loads((r / "evaluation.json").read_text())["metrics"] for r in runs]
    assert scores[0]["w2_floor"] == scores[1]["w2_floor"]
    assert scores[1]["w2"] == pytest.approx(scores[0]["w2"], rel=1e-3)


def test_a_batch_that_cannot_be_shared_out_is_refused(command, tmp_path):
    result = command(
        "fit", "--config", "configs/toy/moons.yaml", "--config", "configs/trainer/cpu2.yaml", *QUICK,
        "--data.batch_size=33", f"--run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.returncode != 0
    assert "data.batch_size=33" in result.stderr
    assert "2 processes" in result.stderr


def test_images_score_the_same_on_two_processes(command, tmp_path):
    """The states of the Frechet distance are sums over processes: no real image counts twice."""
    scores = []
    for devices in (1, 2):
        run = tmp_path / f"on{devices}"
        result = command(
            "fit", "--config", "configs/images/digits.yaml", "--config", "configs/trainer/cpu2.yaml",
            "--trainer.max_steps=3", "--samples.at_end=false", "--trajectories.at_end=false",
            "--wandb.mode=disabled", "--model.solver.num_steps=3", f"--trainer.devices={devices}", f"--run_dir={run}",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        scores.append(json.loads((run / "evaluation.json").read_text())["metrics"])
    # float32 gradients and features are summed in another order
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
