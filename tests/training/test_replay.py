"""A run is a function of its config: repeated, resumed or split over processes, it is the same run."""

import csv

import pytest
import torch
from lightning.pytorch import seed_everything

TOY = (
    "toy/moons",
    "--trainer.max_steps=24",
    "--data.steps_per_epoch=10",
    "--trainer.val_check_interval=5",
)
DIGITS = (
    "images/digits", "--trainer.max_steps=18", "--trainer.log_every_n_steps=3", "--data.batch_size=100",
    "--model.network.channels=8", "--model.network.head_channels=8", "--model.network.dropout=0.2",
    "--model.class_dropout_prob=0.3", "--trainer.val_check_interval=6",
)  # fmt: skip


def final_state(run):
    """Weights, average and optimiser at the end of a run."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        "weights": checkpoint["state_dict"],
        "average": checkpoint["callbacks"]["EMA"]["shadow"],
        "moments": checkpoint["optimizer_states"][0]["state"],
        "schedule": checkpoint["lr_schedulers"],
    }


def identical(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("config", [TOY, DIGITS], ids=["toy", "digits"])
def test_one_seed_is_one_run_whatever_the_global_random_state(fit, config, monkeypatch):
    runs = []
    for number in (1, 2):

        def otherwise(seed, workers=True, number=number):
            seed_everything(
                number, workers=workers
            )  # what Lightning would seed; nothing of ours may read it
            return seed

        monkeypatch.setattr("lightning.pytorch.cli.seed_everything", otherwise)
        runs.append(fit(*config, name=f"run{number}"))
    assert identical(*map(final_state, runs))
    assert (
        runs[0].joinpath("metrics.csv").read_text() == runs[1].joinpath("metrics.csv").read_text()
    )


def test_another_seed_is_another_run(fit):
    a, b = (final_state(fit(*TOY, f"--seed_everything={seed}", name=f"s{seed}")) for seed in (0, 1))
    assert not identical(a["weights"], b["weights"])


@pytest.mark.parametrize(
    ("config", "step"),
    # mid-epoch, and exactly at the end of an epoch: batches per epoch are 10 and 12
    [
        (TOY, 7),
        (TOY, 10),
        (TOY, 17),
        (DIGITS, 7),
        pytest.param(DIGITS, 12, marks=pytest.mark.slow),
    ],
    ids=["toy-7", "toy-epoch-end", "toy-17", "digits-7", "digits-epoch-end"],
)
def test_a_stopped_and_resumed_run_ends_like_one_that_was_not(fit, trained, config, step):
    whole = trained(*config, name="whole")
    part = fit(
        *config,
        f"--checkpoints.every_n_train_steps={step}",
        "--checkpoints.save_top_k=-1",
        name="part",
    )
    kept = part / "checkpoints" / f"{step:08d}.ckpt"
    resumed = fit(*config, f"--ckpt_path={kept}", name="resumed")
    assert identical(final_state(whole), final_state(resumed))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("step", [7, 10], ids=["within an epoch", "at its end"])
def test_a_resumed_run_has_every_row_of_metrics_once(fit, trained, step, every):
    options = (*TOY, f"--trainer.log_every_n_steps={every}")
    whole = trained(*options, name="whole")
    part = fit(
        *options, f"--checkpoints.every_n_train_steps={step}", "--checkpoints.save_top_k=-1",
        name="part",
    )  # fmt: skip
    kept = part / "checkpoints" / f"{step:08d}.ckpt"
    fit(*options, f"--ckpt_path={kept}", name="part")
    rows = [list(csv.DictReader((run / "metrics.csv").open())) for run in (whole, part)]
    assert rows[0] == rows[1]


def test_a_run_that_goes_on_from_each_end_of_an_epoch_has_the_same_rows(fit):
    options = (
        "toy/moons", "--trainer.max_steps=-1", "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=1",
        "--trainer.val_check_interval=1.0", "--data.steps_per_epoch=4", "--trainer.log_every_n_steps=1",
        "--checkpoints.every_n_train_steps=null", "--checkpoints.every_n_epochs=1", "--checkpoints.save_top_k=-1",
    )  # fmt: skip
    whole = fit(*options, name="whole")
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    for step in (4, 8):
        kept = whole / "checkpoints" / f"{step:08d}.ckpt"
        resumed = fit(*options, f"--ckpt_path={kept}", name=f"from{step}")
        there = list(csv.DictReader((resumed / "metrics.csv").open()))
        assert there == [row for row in rows if int(row["step"]) >= step]
