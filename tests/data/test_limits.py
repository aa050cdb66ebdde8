"""The Trainer's limits: epochs of as many batches as were asked for, in every data class, and resume exact."""

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import TensorDataset

from fmlightning.data.dataset import DatasetData
from fmlightning.data.images.digits import DigitsData
from fmlightning.data.latents.autoencoders import SmallAutoencoder
from fmlightning.data.latents.base import LatentData
from fmlightning.data.pairs.base import CorruptedData
from fmlightning.data.toy import ToyData
from fmlightning.flow.keys import Key


def items(num_workers):
    x = torch.randn(200, 3, generator=Key(0).generator())
    return DatasetData(TensorDataset(x), test_size=40, num_workers=num_workers, batch_size=16)


DATA = {
    "endless": lambda: ToyData(batch_size=16, steps_per_epoch=10),
    "finite": lambda: ToyData(batch_size=16, train_size=170),
    "digits": lambda: DigitsData(batch_size=128),
    "pairs": lambda: CorruptedData(DigitsData(), batch_size=128),
    "latents": lambda: LatentData(DigitsData(), SmallAutoencoder(channels=8, steps=2), batch_size=128),
    "dataset": lambda: items(0),
    "workers": lambda: items(2),
}  # fmt: skip
EPOCH = 10


class Spy(LightningModule):
    """Keeps the batches of a training, and leaves the weights alone."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, number):
        self.seen.append((self.current_epoch, batch["x1"]))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def seen(data, start=0, **options):
    """The batches of a run, each with its epoch."""
    spy = Spy()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, barebones=False, **options,
    )  # fmt: skip
    data.start = start
    trainer.fit(spy, datamodule=data)
    return spy.seen


def same(some, steps, data):
    rows = slice(0, data.batch_size)
    expected = [data.train_batch(step, rows)["x1"] for step in steps]
    data.teardown("fit")
    assert len(some) == len(steps)
    assert all(torch.equal(a, b) for (_, a), b in zip(some, expected, strict=True))


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_every_epoch_has_as_many_batches_as_the_limit(make):
    data = make()
    assert data.steps_per_epoch == EPOCH
    found = seen(data, max_epochs=3, limit_train_batches=4)
    assert [epoch for epoch, _ in found] == 4 * [0] + 4 * [1] + 4 * [2]
    steps = [10 * epoch + n for epoch in range(3) for n in range(4)]
    same(found, steps, data)
    same(seen(data, 6, max_steps=6, limit_train_batches=0.4), steps[6:], data)


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_overfitting_sees_the_same_batches_again(make):
    data = make()
    same(seen(data, max_epochs=3, overfit_batches=2), [0, 1] * 3, data)
    same(seen(data, max_epochs=2, overfit_batches=0.1), [0, 0], data)


@pytest.mark.parametrize(
    "options", [(), ("--model.coupling=MinibatchOT",)], ids=["plain", "paired"]
)
@pytest.mark.parametrize("limit", ["limit_train_batches=4", "overfit_batches=2"])
def test_a_limited_run_resumes_exactly_and_its_schedule_ends(fit, limit, options):
    common = (
        f"--trainer.{limit}", "--trainer.max_steps=-1", "--trainer.max_epochs=3", "--data.steps_per_epoch=10",
        "--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1",
        "--data.batch_size=32", "--checkpoints.every_n_train_steps=3", "--checkpoints.save_top_k=-1",
        "--evaluation.metrics=[]", "--model.scheduler=Cosine", "--model.scheduler.warmup_steps=1", *options,
    )  # fmt: skip
    whole = fit("toy/moons", *common, name="whole")
    last = sorted(p for p in (whole / "checkpoints").glob("0*.ckpt"))
    rates = [
        float(r["train/lr"])
        for r in csv.DictReader((whole / "metrics.csv").open())
        if r["train/lr"]
    ]
    length = 12 if "limit" in limit else 6
    assert len(rates) == length
    assert rates[-1] < 0.1 * max(rates)
    part = fit("toy/moons", *common, f"--ckpt_path={last[0]}", name="part")
    ends = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (whole, part)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == length
    weights = [np.concatenate([v.flatten() for v in end["state_dict"].values()]) for end in ends]
    assert np.array_equal(*weights)
