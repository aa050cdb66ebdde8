"""The true error of a flow is logged where it is known, and both ways to it agree."""

import csv

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from fmlightning.data.order import Shard
from fmlightning.data.toy import ToyData
from fmlightning.flow.couplings import Independent, MinibatchOT
from fmlightning.flow.keys import Key
from fmlightning.flow.objectives.cfm import CFM, mean_square
from fmlightning.flow.paths.schedules import (
    Linear,
    SchrodingerBridge,
    Trigonometric,
    VariancePreserving,
)
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork
from fmlightning.flow.toys import EightGaussians, Moons
from fmlightning.metrics.means import MeanWithError
from fmlightning.nets.mlp import TimeMLP
from fmlightning.training.callbacks.oracle import OracleError
from fmlightning.training.held_out import HeldOut
from fmlightning.training.module import FlowMatching

LAW = GaussianMixture([0.5, 0.3, 0.2], [[-2.0, 0.0], [1.0, 1.0], [1.0, -2.0]], [0.5, 0.3, 0.8])
SHIFT = torch.tensor([0.3, -0.4])  # of squared length 0.25


class Shifted(nn.Module):
    """The exact velocity and a constant: its true error is known."""

    def __init__(self, exact, shift):
        super().__init__()
        self.exact, self.shift = exact, shift

    def forward(self, x, t, y=None):
        return self.exact(x, t, y) + self.shift


def validated(network, data, **options):
    """What validation logs for a network."""
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[OracleError()],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    module = FlowMatching(network, **options)
    trainer.validate(module, datamodule=data, verbose=False)
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


def held_out(schedule, data):
    """The points of validation, drawn again."""
    module = FlowMatching(TimeMLP(2, 4, 1), path=schedule)
    x1 = data.eval_samples("val")["x1"]
    streams = Key(0).fold("validation").streams(torch.arange(len(x1)))
    return HeldOut(module.recipe, len(x1), Shard()).of(x1, None, streams).on(schedule)


@pytest.mark.parametrize(
    "schedule", [Linear(), Trigonometric(), VariancePreserving(), SchrodingerBridge(0.5)], ids=repr
)
def test_a_shift_of_the_exact_velocity_is_its_error(schedule):
    data = ToyData(LAW, val_size=20_000, eval_batch_size=7000)
    logged = validated(Shifted(OracleNetwork(LAW.along(schedule)), SHIFT), data, path=schedule)
    # float32 velocities reach 20 near the singular ends, with rounding of 1e-6 beside the 0.25
    assert logged["val/fm_error"] == pytest.approx(0.25, abs=1e-4)
    difference = logged["val/cfm_minus_C"] - logged["val/fm_error"]
    assert abs(difference) < 4 * logged["val/cfm_minus_C_se"]  # the other error is below 1e-4


def test_cfm_minus_c_is_the_loss_that_is_logged_less_the_spread():
    data = ToyData(LAW, val_size=5000)
    logged = validated(TimeMLP(2, 8, 2), data)
    point = held_out(Linear(), data)
    C = 2 * LAW.along(Linear()).spread(point.xt.double(), point.t.double()).mean()
    # float32 losses of order 5, summed in float64
    assert logged["val/cfm_minus_C"] == pytest.approx(2 * logged["val/loss"] - float(C), abs=1e-5)


def test_error_bars_are_those_of_the_values():
    data = ToyData(LAW, val_size=5000)
    logged = validated(TimeMLP(2, 8, 2), data)  # an untrained network predicts zero
    point = held_out(Linear(), data)
    path, xt, t = LAW.along(Linear()), point.xt.double(), point.t.double()
    values = {
        "fm_error": 2 * mean_square(path.velocity(xt, t)),
        "cfm_minus_C": 2 * mean_square(point.ut.double()) - 2 * path.spread(xt, t),
    }
    for name, each in values.items():
        assert logged[f"val/{name}"] == pytest.approx(float(each.mean()), rel=1e-5)
        assert logged[f"val/{name}_se"] == pytest.approx(float(each.std()) / 5000**0.5, rel=1e-5)


@pytest.mark.parametrize("predicts", ["data", "noise"])
def test_the_error_is_of_the_velocity_whatever_the_network_predicts(predicts):
    network = OracleNetwork(LAW.along(Linear()), predicts)
    logged = validated(network, ToyData(LAW, val_size=2000), objective=CFM(predicts))
    assert logged["val/fm_error"] < 1e-4  # rounding, divided by the distance to the singular end
    assert abs(logged["val/cfm_minus_C"]) < 4 * logged["val/cfm_minus_C_se"]


def test_eight_gaussians_are_a_mixture():
    toy = EightGaussians()
    path = GaussianMixture.of_eight_gaussians(toy).along(Linear())
    logged = validated(Shifted(OracleNetwork(path), SHIFT), ToyData(toy, val_size=1000))
    assert logged["val/fm_error"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize(
    ("law", "source", "coupling"),
    [
        (Moons(), Gaussian(), Independent()),
        (LAW, EightGaussians(), Independent()),
        (LAW, Gaussian(), MinibatchOT()),
    ],
    ids=["moons", "source", "coupling"],
)
def test_nothing_is_said_where_the_answer_is_not_known(law, source, coupling):
    data = ToyData(law, val_size=64, eval_batch_size=64)
    logged = validated(TimeMLP(2, 8, 1), data, source=source, coupling=coupling)
    assert "val/loss" in logged
    assert not [name for name in logged if "fm_error" in name or "minus" in name]


def test_the_mean_and_its_error_do_not_depend_on_the_blocks():
    x = torch.randn(1000, generator=Key(0).generator(), dtype=torch.float64)
    metric = MeanWithError()
    for block in x.split(300):
        metric.update(block)
    mean, error = metric.compute()
    assert float(mean) == pytest.approx(float(x.mean()), rel=1e-12)
    assert float(error) == pytest.approx(float(x.std()) / 1000**0.5, rel=1e-12)


def rows(run):
    with (run / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("val/fm_error")]


def test_fit_on_a_mixture_logs_both_and_they_agree(fit):
    run = fit(
        "toy/mixture", "--trainer.max_steps=200", "--trainer.val_check_interval=100",
        "--data.val_size=20000",
    )  # fmt: skip
    first, last = rows(run)
    for row in (first, last):
        fm, fm_se, cfm, cfm_se = (
            float(row[f"val/{n}"])
            for n in ("fm_error", "fm_error_se", "cfm_minus_C", "cfm_minus_C_se")
        )
        assert abs(fm - cfm) < 4 * (fm_se**2 + cfm_se**2) ** 0.5
        assert fm > 10 * fm_se
    assert float(last["val/fm_error"]) < float(first["val/fm_error"])


@pytest.mark.slow
def test_two_processes_log_the_same_error_as_one(command, tmp_path):
    found = []
    for devices in (1, 2):
        run = tmp_path / f"devices{devices}"
        result = command(
            "fit", "--config", "configs/toy/mixture.yaml", f"--run_dir={run}", f"--trainer.devices={devices}",
            "--trainer.max_steps=3", "--trainer.val_check_interval=3", "--data.val_size=3000",
            "--data.eval_batch_size=500", "--wandb.mode=disabled", "--samples.at_end=false",
            "--trajectories.at_end=false", "--evaluation.at_end=false",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        found.append({k: float(v) for k, v in rows(run)[0].items() if "fm_error" in k or "_C" in k})
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # gradients are summed in another order
