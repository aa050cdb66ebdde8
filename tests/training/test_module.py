"""Every kind of flow trains from the command line, and the module refuses what cannot train."""

import csv
import json

import pytest
import torch

from fmlightning.flow.objectives.cfm import CFM
from fmlightning.nets.mlp import TimeMLP
from fmlightning.training.draws import Draws
from fmlightning.training.module import FlowMatching

SMALL = (
    "toy/moons", "--trainer.max_steps=4", "--trainer.log_every_n_steps=2", "--data.val_size=64",
    "--data.test_size=100", "--model.source=Gaussian", "--model.solver={method: heun2, num_steps: 8}",
    "--evaluation.metrics=[{class_path: Wasserstein, init_args: {subsets: 2, size: 50}}]",
    "--evaluation.at_end=true",
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "predicts", "nfe"),
    [
        # Heun's two evaluations a step, and one more where the field stops short of t = 1
        ("Linear", "velocity", 16),
        ("Linear", "data", 17),
        ("Linear", "noise", 16),
        ("Linear", "score", 16),
        ("VariancePreserving", "velocity", 17),
        ("VarianceExploding", "noise", 17),
        ("Trigonometric", "velocity", 16),
        ("SchrodingerBridge", "velocity", 17),
    ],
)
def test_every_prediction_trains_and_samples(fit, path, predicts, nfe):
    run = fit(*SMALL, f"--model.path={path}", f"--model.objective.prediction={predicts}")
    scores = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert scores["nfe"] == nfe
    losses = [
        row["train/loss"]
        for row in csv.DictReader((run / "metrics.csv").open())
        if row["train/loss"]
    ]
    assert len(losses) == 2
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["interval"][1] < 1) == (nfe == 17)


def test_the_held_out_loss_is_the_mean_of_its_bins(fit):
    run = fit(*SMALL, "--trainer.val_check_interval=4", "--data.val_size=4096")
    row = next(r for r in csv.DictReader((run / "metrics.csv").open()) if r["val/loss"])
    bins = [float(row[f"val/loss_bin{k}"]) for k in range(8)]
    # times are uniform, so each bin has an eighth of the points, give or take its binomial error of 4 %
    assert sum(bins) / 8 == pytest.approx(float(row["val/loss"]), rel=0.05)


def test_the_held_out_loss_does_not_depend_on_the_seed_of_the_run(fit):
    """It does depend on the weights: with a rate of zero they are those of the start, which is the zero velocity."""
    frozen = (*SMALL, "--trainer.val_check_interval=4", "--model.optimizer.lr=0")
    rows = []
    for seed in (0, 1):
        run = fit(*frozen, f"--seed_everything={seed}", name=f"s{seed}")
        rows.append(next(r for r in csv.DictReader((run / "metrics.csv").open()) if r["val/loss"]))
    assert rows[0]["val/loss"] == rows[1]["val/loss"]


def test_labels_are_hidden_as_often_as_asked(fit, monkeypatch):
    seen = []
    call = Draws.__call__

    def spy(self, *batch):
        draw = call(self, *batch)
        seen.append((draw.y == self.num_classes).float().mean())
        return draw

    monkeypatch.setattr(Draws, "__call__", spy)
    fit(
        "images/digits", "--trainer.max_steps=5", "--data.batch_size=400", "--model.class_dropout_prob=0.25",
        "--model.network.channels=8", "--model.network.head_channels=8",
    )  # fmt: skip
    share = torch.stack(seen).mean()
    assert (
        abs(share - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    )  # four standard errors of 2,000 draws


def test_a_score_of_a_toy_source_is_refused():
    from fmlightning.flow.toys import EightGaussians

    with pytest.raises(ValueError, match="Gaussian source"):
        FlowMatching(TimeMLP(), objective=CFM("score"), source=EightGaussians())
