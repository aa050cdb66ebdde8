"""Steps that Lightning is not shown are the steps that it would have taken."""

import json
import math
import os
import signal
import sys

import pytest
import torch
import warm
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, Timer
from lightning.pytorch.loggers import Logger

import fmlightning.training.lightning.fast_loop as loop
from fmlightning.data.toy import ToyData
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.mlp import TimeMLP
from fmlightning.runs.signals import EXIT_CODES
from fmlightning.training.lightning.fast_loop import FastLoop
from fmlightning.training.module import FlowMatching

LIGHTNING = 0
"""The length of a stretch at which Lightning takes each step."""

TOY = (
    "toy/moons", "--model.network.width=16", "--model.network.depth=2", "--data.val_size=64", "--data.test_size=64",
    "--data.batch_size=32", "--trainer.max_steps=53", "--trainer.log_every_n_steps=6", "--checkpoints.save_top_k=-1",
    "--checkpoints.every_n_train_steps=20", "--evaluation.metrics=[]",
)  # fmt: skip
RUNS = {
    # validations and ends of epochs off the ends of steps, a schedule, gradients clipped
    "accumulated": (
        *TOY, "--trainer.accumulate_grad_batches=3", "--data.steps_per_epoch=50", "--trainer.val_check_interval=16",
        "--trainer.gradient_clip_val=0.5", "--model.scheduler.warmup_steps=10", "--ema.decay=[0.99,0.9]",
        "--ema.sigma_rel=[0.1]", "--ema.snapshots=7",
    ),
    "by epochs": (
        *TOY, "--trainer.max_steps=-1", "--trainer.max_epochs=3", "--data.steps_per_epoch=17",
        "--trainer.check_val_every_n_epoch=2", "--trainer.val_check_interval=5", "--checkpoints.every_n_epochs=1",
        "--trainer.accumulate_grad_batches=2",
    ),
    # numbers of every kind, pairs solved ahead, the best kept by validation
    "numbers": (
        *TOY, "--model.path=SchrodingerBridge", "--model.coupling=MinibatchOT", "--model.network.dropout=0.2",
        "--data.train_size=400", "--checkpoints.monitor=val/loss", "--trainer.val_check_interval=13",
        "--model.source=Gaussian",
    ),
    # an epoch of 7 batches, and then what is left of the data's 10
    "limited": (*TOY, "--data.steps_per_epoch=10", "--trainer.limit_train_batches=7"),
    "double": (*TOY, "--trainer.precision=64-true", "--trainer.log_every_n_steps=0"),
    "bf16": (*TOY, "--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=0.5"),
    "closure": (
        *TOY, "--model.optimizer={class_path: LBFGS, init_args: {max_iter: 3}}", "--model.scheduler=null",
        "--trainer.limit_val_batches=0",
    ),
}  # fmt: skip


@pytest.fixture
def taken(monkeypatch):
    """Counts the batches that Lightning was not shown."""
    count, real = [], FastLoop.batch

    def batch(self, fetcher):
        real(self, fetcher)
        count.append(self.trainer.global_step)

    monkeypatch.setattr(FastLoop, "batch", batch)
    return count


@pytest.fixture
def train(fit, monkeypatch):
    def call(options, longest, name):
        monkeypatch.setattr(loop, "MAX_BATCHES", longest)
        return fit(*options, name=name)

    return call


def content(run):
    """All that a run leaves behind and that says nothing of when."""
    files = sorted(p.relative_to(run) for p in (run / "checkpoints").iterdir())
    saved = {str(f): torch.load(run / f, weights_only=True) for f in files}
    shots = sorted(p for p in (run / "ema").glob("*.pt")) if (run / "ema").is_dir() else []
    saved |= {p.name: torch.load(p, weights_only=True) for p in shots}
    metrics = run / "metrics.csv"  # not there where nothing is logged
    return {"metrics": metrics.read_text().splitlines() if metrics.exists() else [], **saved}


def differences(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return [d for k in a for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list | tuple):
        assert len(a) == len(b), where
        return [
            d
            for k, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, f"{where}/{k}")
        ]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [where]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_whoever_takes_its_steps(name, train, taken):
    """Weights, averages, moments, every counter of Lightning's, rows and files: all of it, bit for bit."""
    whole = content(train(RUNS[name], LIGHTNING, "lightning"))
    assert not taken
    longer = (1, 7, 25, 1000) if name == "accumulated" else (1000,)
    for longest in longer:
        taken.clear()
        assert not differences(whole, content(train(RUNS[name], longest, f"longest-{longest}")))
        assert len(taken) > 20 * (longest > 1)  # else nothing was compared


# -- who looks ---------------------------------------------------------------------------------------


class Watcher(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *args):
        self.steps.append(trainer.global_step)


def fit_with(tmp_path, *callbacks, module=None, data=None, **options):
    trainer = Trainer(
        max_steps=12, callbacks=list(callbacks), enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
        use_distributed_sampler=False, **{"logger": False, **options},
    )  # fmt: skip
    FastLoop(trainer, FlowMatching)
    module = module or FlowMatching(TimeMLP(width=16, depth=2))
    data = data or ToyData(batch_size=32, val_size=64, test_size=64, steps_per_epoch=100)
    trainer.fit(module, data)
    return trainer, module


def test_a_callback_of_ones_own_sees_every_batch_and_that_is_said_once(tmp_path, taken, capsys):
    watcher = Watcher()
    fit_with(tmp_path, watcher)
    assert watcher.steps == list(range(1, 13))
    assert not taken
    assert capsys.readouterr().out.count("every step is shown to the callback Watcher") == 1


class Hooked(FlowMatching):
    def on_before_zero_grad(self, optimizer):
        self.seen = getattr(self, "seen", 0) + 1


class Clipped(FlowMatching):
    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        self.seen = getattr(self, "seen", 0) + 1


class NFECounter(Logger):
    """Keeps the step of each row."""

    name = version = "counted"

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_hyperparams(self, params, *args, **options):
        pass

    def log_metrics(self, metrics, step=None):
        self.steps.append((step, sorted(metrics)))


def test_a_monitor_of_the_learning_rate_writes_as_often(tmp_path, taken, monkeypatch):
    """It writes at every batch of a step that is logged."""

    def written(longest):
        monkeypatch.setattr(loop, "MAX_BATCHES", longest)
        monitor, logger = LearningRateMonitor(), NFECounter()
        fit_with(tmp_path, monitor, logger=logger, accumulate_grad_batches=3, log_every_n_steps=4)
        return monitor.lrs, logger.steps

    lightnings = written(LIGHTNING)
    assert not taken
    assert written(1000) == lightnings
    assert len(taken) > 12


@pytest.mark.parametrize(
    ("kind", "hook"), [(Hooked, "on_before_zero_grad"), (Clipped, "configure_gradient_clipping")]
)
def test_a_module_of_ones_own_is_asked_at_every_batch(kind, hook, tmp_path, taken, capsys):
    _, module = fit_with(tmp_path, module=kind(TimeMLP(width=16, depth=2)))
    assert module.seen == 12
    assert not taken
    assert f"{kind.__name__}.{hook}" in capsys.readouterr().out


def test_a_callback_made_from_one_that_is_known_sees_every_batch(tmp_path, taken):
    class Own(Watcher, Timer):
        def __init__(self):
            Timer.__init__(self)
            Watcher.__init__(self)

    own = Own()
    fit_with(tmp_path, own)
    assert own.steps == list(range(1, 13))
    assert not taken


def test_what_a_module_of_ones_own_logs_is_the_same(tmp_path, taken, monkeypatch):
    class Own(FlowMatching):
        @property
        def nets(self):
            if self.trainer.training and self.trainer.optimizers:  # within a step of training
                weight = next(self.network.parameters())
                self.log("own", weight.detach().sum(), on_step=True, on_epoch=True)
            return super().nets

    def logged(longest):
        monkeypatch.setattr(loop, "MAX_BATCHES", longest)
        with seeded(Key(0)):
            module = Own(TimeMLP(width=16, depth=2))
        data = ToyData(batch_size=32, val_size=64, test_size=64, steps_per_epoch=6)
        trainer, _ = fit_with(tmp_path, module=module, data=data, log_every_n_steps=5)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    lightnings = logged(LIGHTNING)
    assert not taken
    assert {"own_step", "own_epoch"} <= lightnings.keys()
    assert logged(1000) == lightnings
    assert taken


def test_weights_that_an_optimiser_gets_later_forget_their_gradients_too(tmp_path, monkeypatch):
    """As by Lightning's `BaseFinetuning`: a gradient that is never forgotten grows."""

    class Late(FlowMatching):
        def configure_optimizers(self):
            return torch.optim.SGD(list(self.network.parameters())[:2], lr=0.1)

    class Thaw(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                rest = list(module.network.parameters())[2:]
                trainer.optimizers[0].add_param_group({"params": rest})

    def trained(longest):
        monkeypatch.setattr(loop, "MAX_BATCHES", longest)
        with seeded(Key(0)):
            module = Late(TimeMLP(width=16, depth=2))
        data = ToyData(batch_size=32, val_size=64, test_size=64, steps_per_epoch=6)
        fit_with(tmp_path, Thaw(), module=module, data=data)
        return list(module.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained(LIGHTNING), trained(1000), strict=True))


@pytest.mark.parametrize(("interval", "frequency"), [("step", 3), ("epoch", 1), ("epoch", 2)])
def test_a_schedule_of_ones_own_moves_as_often(interval, frequency, tmp_path, taken, monkeypatch):
    class Own(FlowMatching):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            own = {"scheduler": schedule, "interval": interval, "frequency": frequency}
            return {"optimizer": optimizer, "lr_scheduler": own}

    def trained(longest):
        monkeypatch.setattr(loop, "MAX_BATCHES", longest)
        with seeded(Key(0)):
            module = Own(TimeMLP(width=16, depth=2))
        data = ToyData(batch_size=32, val_size=64, test_size=64, steps_per_epoch=10)
        trainer, _ = fit_with(tmp_path, module=module, data=data, accumulate_grad_batches=2)
        schedule = trainer.lr_scheduler_configs[0].scheduler
        return schedule.state_dict(), list(module.parameters())

    lightnings = trained(LIGHTNING)
    assert not taken
    assert not differences(lightnings, trained(1000))
    assert taken


def test_a_hook_of_every_step_can_end_the_run(tmp_path, taken):
    class Ends(Watcher):
        per_step_hooks = ("on_train_batch_end",)

        def next_due_step(self, trainer):
            return math.inf

        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            trainer.should_stop = trainer.global_step == 7

    ends = Ends()
    trainer, _ = fit_with(tmp_path, ends)
    assert ends.steps == list(range(1, 8))
    assert trainer.global_step == 7
    assert 7 in taken


def test_a_patient_callback_is_asked_when_it_says(tmp_path, taken):
    class Scheduled(Watcher):
        def next_due_step(self, trainer):
            return (trainer.global_step // 5 + 1) * 5

    patient = Scheduled()
    fit_with(tmp_path, patient)
    assert {5, 10, 12} <= set(patient.steps)
    assert set(patient.steps) | set(taken) == set(range(1, 13))
    assert not set(patient.steps) & set(taken)


@pytest.mark.parametrize("option", [{"profiler": "simple"}, {"fast_dev_run": 3}], ids=str)
def test_what_has_to_see_every_step_does(tmp_path, taken, option):
    fit_with(tmp_path, **option)
    assert not taken


def test_a_second_fit_trains_the_second_module(tmp_path, taken):
    trainer, first = fit_with(tmp_path)
    weights = [p.detach().clone() for p in first.parameters()]
    other = FlowMatching(TimeMLP(width=16, depth=2))
    before = [p.detach().clone() for p in other.parameters()]
    trainer.fit_loop.epoch_loop.max_steps = 24
    trainer.fit(other, ToyData(batch_size=32, val_size=64, test_size=64, steps_per_epoch=100))
    assert all(torch.equal(a, b) for a, b in zip(weights, first.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


# -- stopping ----------------------------------------------------------------------------------------

STOPPED = (
    *(f"--config=configs/{c}.yaml" for c in TOY[:1]), *TOY[1:], "--wandb.mode=disabled", "--samples.at_end=false",
    "--trajectories.at_end=false", "--trainer.accumulate_grad_batches=2", "--data.steps_per_epoch=50",
    "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false", "--trainer.devices=1",
)  # fmt: skip


@pytest.fixture
def same_handlers_after():
    before = {each: signal.getsignal(each) for each in EXIT_CODES}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("same_handlers_after")
def test_a_signal_stops_the_run_after_the_very_step_and_it_goes_on(
    fmlightning, tmp_path, monkeypatch, taken
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert fmlightning("fit", *STOPPED, f"--run_dir={whole}")[0] == 0
    real, calls = FlowMatching.training_step, []

    def training_step(self, *args):
        calls.append(1)
        if len(calls) in (15, 40):  # in the first of two micro-batches, and in the second
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, *args)

    monkeypatch.setattr(FlowMatching, "training_step", training_step)
    for step in (8, 20):
        taken.clear()
        status, shown = fmlightning("fit", *STOPPED, f"--run_dir={run}", "--ckpt_path=auto")
        assert status == 75, shown
        assert f"SIGUSR1: stopping after step {step}\n" in shown
        last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] == step
        assert step in taken or step == 20  # which is saved anyway, and Lightning's
    assert fmlightning("fit", *STOPPED, f"--run_dir={run}", "--ckpt_path=auto")[0] == 0
    ours, theirs = content(run), content(whole)
    assert not differences(ours["metrics"], theirs["metrics"])
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert not differences(
            ours["checkpoints/last.ckpt"][part], theirs["checkpoints/last.ckpt"][part], part
        )
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"


# -- two processes -----------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
import fmlightning.training.lightning.fast_loop as loop
from fmlightning.training.module import FlowMatching
loop.MAX_BATCHES, at = int(sys.argv[1]), int(sys.argv[2])
real = FlowMatching.training_step

def training_step(self, batch, batch_idx):
    if at and self.trainer.global_step == at and self.trainer.global_rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return real(self, batch, batch_idx)

FlowMatching.training_step = training_step
if __name__ == "__main__":
    from fmlightning.__main__ import main
    sys.exit(main(sys.argv[3:]))
"""


def two_processes(tmp_path, repository, longest, at, name, code=0):
    script, run = tmp_path / "two.py", tmp_path / name
    script.write_text(SCRIPT)
    options = [o for o in STOPPED if not o.startswith("--trainer.devices")]
    result = warm.run(
        [sys.executable, str(script), str(longest), str(at), "fit", *options, "--config=configs/trainer/cpu2.yaml",
         f"--run_dir={run}", "--ckpt_path=auto"],
        timeout=600, env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    return run


@pytest.mark.slow
def test_two_processes_take_the_same_steps_and_stop_after_the_same(tmp_path, repository):
    whole = content(two_processes(tmp_path, repository, LIGHTNING, 0, "lightning"))
    assert not differences(whole, content(two_processes(tmp_path, repository, 1000, 0, "long")))
    stopped = two_processes(
        tmp_path, repository, 1000, 9, "stopped", code=75
    )  # all, or it would hang
    step = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 10 <= step <= 53
    ours = content(two_processes(tmp_path, repository, 1000, 0, "stopped"))
    assert not differences(ours["metrics"], whole["metrics"])
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert not differences(
            ours["checkpoints/last.ckpt"][part], whole["checkpoints/last.ckpt"][part], part
        )
