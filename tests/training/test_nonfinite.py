"""A step whose loss or gradient is not finite changes nothing, is told, and never reaches a checkpoint."""

import csv
import hashlib
import json
import math
import os
import sys

import pytest
import torch
import warm

import fmlightning.training.nonfinite as nonfinite
from fmlightning.data.toy import ToyData
from fmlightning.flow.keys import Key
from fmlightning.training.callbacks.sampling import Samples
from fmlightning.training.module import FlowMatching

QUICK = (
    "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.metrics=[]",
    "--trainer.enable_progress_bar=false", "--data.val_size=64", "--data.test_size=64", "--data.batch_size=32",
    "--trainer.devices=1", "--trainer.limit_val_batches=0", "--checkpoints.save_top_k=-1",
)  # fmt: skip
BAD = 7
TINY = (
    "--model.network.width=16", "--model.network.depth=2", "--trainer.max_steps=12",
    "--checkpoints.every_n_train_steps=5", "--trainer.log_every_n_steps=4",
)  # fmt: skip


def nan_loss(module, loss):
    return loss * math.nan


def infinite_loss_of_a_finite_gradient(module, loss):
    return loss + math.inf


def infinite_gradient_of_a_finite_loss(module, loss):
    weight = next(module.network.parameters())
    return loss + ((weight - weight.detach()) * 1e30 * 1e30).sum()


@pytest.fixture
def spoil(monkeypatch):
    """Make the loss of some batches bad."""

    def call(fault=nan_loss, batches=(BAD,)):
        real = FlowMatching.training_step

        def training_step(self, batch, batch_idx):
            now = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
            loss = real(self, batch, batch_idx)
            return fault(self, loss) if now in batches else loss

        monkeypatch.setattr(FlowMatching, "training_step", training_step)

    return call


@pytest.fixture
def train(fmlightning, tmp_path):
    def call(*overrides, name="run"):
        folder = tmp_path / name
        status, shown = fmlightning(
            "fit", "--config", "configs/toy/moons.yaml", *QUICK, *TINY, f"--run_dir={folder}", *overrides
        )  # fmt: skip
        return status, shown, folder

    return call


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """As on an accelerator, where a look at a number makes the computer wait."""
    monkeypatch.setattr(nonfinite, "reads_at_once", lambda x: False)


def state(run, name="last"):
    """Weights, average and optimiser of a checkpoint."""
    saved = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    average = saved["callbacks"]["EMA"]["shadow"]
    return saved["state_dict"], average, saved["optimizer_states"][0]["state"]


def steps_taken(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def identical(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b)


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def bad_rows(run):
    return {
        int(r["step"]): (float(r["nonfinite/loss"]), float(r["nonfinite/grad_norm"]))
        for r in rows(run)
        if r.get("nonfinite/grad_norm")
    }


def files(run):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (run / "checkpoints").iterdir()
    }


# -- stop ------------------------------------------------------------------------------------------


def test_a_run_stops_at_a_loss_that_is_not_a_number(train, spoil):
    _, _, control = train("--trainer.max_steps=5", "--model.scheduler=null", name="control")
    spoil()
    status, shown, run = train("--model.scheduler=null")
    assert status == 2
    assert f"step {BAD}: the loss is nan and the norm of its gradient nan" in shown
    assert "nonfinite.action skip" in shown
    assert "Traceback" not in shown
    assert set(files(run)) == {"00000005.ckpt", "last.ckpt"}  # the last good one, and nothing later
    assert identical(state(run), state(control))
    loss, norm = bad_rows(run)[BAD]
    assert math.isnan(loss)
    assert math.isnan(norm)
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"


@pytest.mark.usefixtures("on_an_accelerator")
@pytest.mark.parametrize("every", [9, 12], ids=["at-a-checkpoint", "at-the-end"])
def test_a_verdict_that_was_not_read_yet_is_read_before_a_checkpoint(train, spoil, every):
    spoil()
    status, shown, run = train(
        f"--checkpoints.every_n_train_steps={every}", "--trainer.log_every_n_steps=50"
    )
    assert status == 2
    assert f"step {BAD}" in shown
    assert not list((run / "checkpoints").glob("*.ckpt"))


@pytest.mark.usefixtures("on_an_accelerator")
@pytest.mark.parametrize("optimizer", ["fused", "not fused"])
def test_a_stop_for_another_reason_saves_nothing_after_an_unread_bad_step(
    train, spoil, monkeypatch, optimizer
):
    spoil()
    real = ToyData.train_batch

    def interrupted(self, step, rows):
        if step == BAD + 2:  # between two steps, where else a checkpoint would be saved
            raise KeyboardInterrupt
        return real(self, step, rows)

    monkeypatch.setattr(ToyData, "train_batch", interrupted)
    extra = () if optimizer == "fused" else ("--model.optimizer=AdamW",)
    status, shown, run = train("--trainer.log_every_n_steps=50", *extra)
    assert status == 130, shown
    assert f"step {BAD}" in shown
    assert set(files(run)) == {"00000005.ckpt", "last.ckpt"}


@pytest.mark.usefixtures("on_an_accelerator")
def test_a_verdict_is_read_before_the_model_is_judged(train, spoil, monkeypatch):
    monkeypatch.setattr(
        Samples, "run", lambda *args: pytest.fail("weights after a bad step were judged")
    )
    spoil()
    status, shown, _ = train(
        "--samples.every_n_steps=9", "--trainer.log_every_n_steps=50", "--checkpoints.every_n_train_steps=50"
    )  # fmt: skip
    assert status == 2
    assert f"step {BAD}" in shown


def test_weights_that_are_not_finite_are_not_saved_though_every_gradient_was(train):
    status, shown, run = train(
        "--model.optimizer={class_path: SGD, init_args: {lr: 1.0e39}}", "--model.scheduler=null",
        "--checkpoints.every_n_train_steps=1",
    )  # fmt: skip
    assert status == 2
    assert "a weight is not finite, so no checkpoint is written" in shown
    assert not (run / "checkpoints" / "last.ckpt").exists()


def test_a_rate_that_is_far_too_large_ends_with_one_message(train):
    status, shown, run = train(
        "--model.optimizer.init_args.lr=1e30", "--checkpoints.every_n_train_steps=3"
    )
    assert status == 2
    assert shown.count("error:") == 1
    assert "smaller learning rate" in shown
    for path in (run / "checkpoints").glob("*.ckpt"):
        for value in torch.load(path, weights_only=True)["state_dict"].values():
            assert value.isfinite().all()


# -- skip ------------------------------------------------------------------------------------------

FUSED = "--model.optimizer.init_args.fused=true"
SKIP = ("--nonfinite.action=skip", "--model.scheduler=null")
CASES = {
    "fused": (FUSED,),
    "foreach": ("--model.optimizer.init_args.fused=false",),
    "momentum": ("--model.optimizer={class_path: SGD, init_args: {lr: 0.01, momentum: 0.9}}",),
    "clipped": ("--model.optimizer.init_args.fused=false", "--trainer.gradient_clip_val=0.5"),
    "clipped by value": (
        "--trainer.gradient_clip_val=0.5",
        "--trainer.gradient_clip_algorithm=value",
    ),
    "double": ("--trainer.precision=64-true",),
    "bfloat16": ("--trainer.precision=bf16-mixed",),
}


def skipping_leaves_no_trace(train, spoil, fault, *options):
    """A run whose last step is bad ends as the run that is one step shorter."""
    options = (*SKIP, "--checkpoints.every_n_train_steps=1", *options)
    _, _, control = train(*options, f"--trainer.max_steps={BAD}", name="control")
    spoil(fault)
    status, shown, run = train(*options, f"--trainer.max_steps={BAD + 1}")
    assert status == 0, shown
    assert f"step {BAD}" in shown
    assert "the step was skipped" in shown
    assert steps_taken(run) == steps_taken(control) + 1 == BAD + 1
    assert identical(state(run), state(control))
    assert list(bad_rows(run)) == [BAD]


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_step_leaves_weights_average_and_moments(train, spoil, case):
    skipping_leaves_no_trace(train, spoil, nan_loss, *CASES[case])


@pytest.mark.parametrize(
    "fault", [infinite_loss_of_a_finite_gradient, infinite_gradient_of_a_finite_loss]
)
def test_either_of_loss_and_gradient_is_enough(train, spoil, fault):
    skipping_leaves_no_trace(train, spoil, fault)


@pytest.mark.usefixtures("on_an_accelerator")
@pytest.mark.parametrize(
    "options",
    [
        (FUSED,),
        CASES["foreach"],
        ("--model.optimizer={class_path: SGD, init_args: {lr: 0.01, momentum: 0.9, fused: true}}",),
    ],
    ids=["fused", "waits", "momentum"],
)
def test_a_verdict_on_the_device_leaves_no_trace_either(train, spoil, options):
    skipping_leaves_no_trace(train, spoil, nan_loss, *options)


def test_one_bad_part_of_an_accumulated_gradient_spoils_the_step(train, spoil):
    spoil(batches=(2 * BAD,))  # the first of the two batches of its step
    _, shown, run = train(*SKIP, "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=10")
    assert list(bad_rows(run)) == [BAD], shown
    assert all(value.isfinite().all() for value in state(run)[0].values())


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
def test_a_run_that_skips_resumes_exactly(train, spoil, monkeypatch, late):
    if late:
        monkeypatch.setattr(nonfinite, "reads_at_once", lambda x: False)
    spoil(batches=(3, BAD, 8))
    options = (
        *SKIP, "--trainer.log_every_n_steps=3", "--nonfinite.max_skips=2", "--trainer.max_steps=15"
    )  # fmt: skip
    _, _, whole = train(*options, name="whole")
    for name in ("00000005", "00000010"):
        kept = whole / "checkpoints" / f"{name}.ckpt"
        status, shown, resumed = train(*options, f"--ckpt_path={kept}", name=name)
        assert status == 0, shown
        assert identical(state(resumed), state(whole))
        assert steps_taken(resumed) == steps_taken(whole) == 15
        assert [r["train/loss"] for r in rows(resumed)] == [
            r["train/loss"] for r in rows(whole) if int(r["step"]) >= int(name)
        ]


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
def test_too_many_bad_steps_in_a_row_stop_the_run(train, spoil, monkeypatch, late):
    if late:
        monkeypatch.setattr(nonfinite, "reads_at_once", lambda x: False)
    spoil(batches=(1, 2, 4, 5, 6, 7))
    status, shown, run = train(*SKIP, "--nonfinite.max_skips=3")
    assert status == 2
    assert "nonfinite.max_skips=3" in shown
    assert "step 7" in shown
    assert set(files(run)) <= {"00000005.ckpt", "last.ckpt"}


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
def test_bad_steps_in_a_row_are_counted_across_a_resume(train, spoil, monkeypatch, late):
    if late:
        monkeypatch.setattr(nonfinite, "reads_at_once", lambda x: False)
    spoil(batches=(8, 9, 10))
    options = (*SKIP, "--nonfinite.max_skips=2", "--trainer.log_every_n_steps=50")
    status, _, whole = train(*options, name="whole")
    assert status == 2
    kept = whole / "checkpoints" / "00000010.ckpt"  # two bad steps before it, and one after
    status, shown, _ = train(*options, f"--ckpt_path={kept}", name="resumed")
    assert status == 2
    assert "step 10" in shown


@pytest.mark.parametrize("option", ["--nonfinite.action=ignore", "--nonfinite.max_skips=0"])
def test_options_that_say_nothing_are_refused(train, option):
    status, shown, run = train(option)
    assert status == 2
    assert option.strip("-").split("=")[0] in shown
    assert not run.exists()


# -- several processes -------------------------------------------------------------------------------

SPOILED = """
import os, sys
from fmlightning.training.module import FlowMatching
real = FlowMatching.training_step

def training_step(self, batch, batch_idx):
    loss = real(self, batch, batch_idx)
    bad = self.trainer.global_step == 7 and self.trainer.global_rank == 1
    return loss + float("inf") if bad else loss  # the gradient is finite, on every process

FlowMatching.training_step = training_step
from fmlightning.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("action", ["stop", pytest.param("skip", marks=pytest.mark.slow)])
def test_the_loss_of_one_process_is_the_verdict_of_all(tmp_path, repository, action):
    script, run = tmp_path / "spoiled.py", tmp_path / "run"
    script.write_text(SPOILED)
    result = warm.run(
        [
            sys.executable, str(script), "fit", "--config", "configs/toy/moons.yaml",
            "--config", "configs/trainer/cpu2.yaml", *QUICK, *TINY, "--trainer.devices=2",
            f"--nonfinite.action={action}", f"--run_dir={run}",
        ],
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    shown = result.stdout + result.stderr
    assert shown.count("step 7: the loss is inf") == 1, shown
    assert list(bad_rows(run)) == [7]
    if action == "stop":
        assert result.returncode == 2
        assert shown.count("error:") == 1
        assert set(files(run)) == {"00000005.ckpt", "last.ckpt"}
    else:
        assert result.returncode == 0
        assert all(value.isfinite().all() for value in state(run)[0].values())


# -- an accelerator --------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_on_a_gpu(train, spoil, precision):
    skipping_leaves_no_trace(
        train, spoil, nan_loss, f"--trainer.precision={precision}", "--trainer.accelerator=cuda"
    )


def test_gradients_are_held_until_the_end_of_their_step(train, monkeypatch):
    held, end = [], nonfinite.NonFinite.on_train_batch_end

    def watched(guard, *args):
        before = len(guard.gradients)
        end(guard, *args)
        held.append((before > 0, len(guard.gradients)))

    monkeypatch.setattr(nonfinite.NonFinite, "on_train_batch_end", watched)
    status, _, _ = train("--trainer.max_steps=3")
    assert status == 0
    assert held == [(True, 0)] * 3


def norm(optimizer):
    return nonfinite.norm_of(nonfinite.gradients_of(optimizer))


@pytest.mark.parametrize("few", [0, 1_000_000], ids=["tensor by tensor", "in one row"])
@pytest.mark.parametrize(
    "dtypes", [("float32",) * 2, ("float64", "float32"), ("bfloat16",) * 2], ids=str
)
def test_the_norm_is_that_of_all_gradients(monkeypatch, few, dtypes):
    monkeypatch.setattr(nonfinite, "FEW", few)
    generator = Key(0).generator()
    weights = [torch.nn.Parameter(torch.zeros(3, 5, dtype=getattr(torch, d))) for d in dtypes]
    unused = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [unused, weights[0]]}, {"params": weights[1:]}])
    assert norm(optimizer) == 0
    for w in weights:
        w.grad = torch.randn(5, 3, generator=generator).to(w.dtype).T
    exact = torch.cat([w.grad.double().flatten() for w in weights]).norm()
    # sums of 30 squares in float32, each rounded to 6e-8
    torch.testing.assert_close(norm(optimizer).double(), exact, rtol=1e-6, atol=0)  # fmt: skip
    for bad in (math.nan, math.inf):
        weights[1].grad[2, 1] = bad
        assert not norm(optimizer).isfinite()


@pytest.mark.parametrize("few", [0, 1_000_000], ids=["tensor by tensor", "in one row"])
def test_a_gradient_whose_square_is_infinite_would_stop_adam_for_good(monkeypatch, few):
    monkeypatch.setattr(nonfinite, "FEW", few)
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 1e20)
    assert not norm(torch.optim.SGD([weight])).isfinite()
