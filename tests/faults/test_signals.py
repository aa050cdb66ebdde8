"""A run that is sent a signal keeps its work, says so with its exit status, and goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from fmlightning.metrics.evaluator import Evaluator
from fmlightning.runs.signals import EXIT_CODES, SIGNAL_STATE, handle
from fmlightning.training.callbacks.evaluation import Evaluation
from fmlightning.training.lightning.checkpoints import ChecksummedFiles
from fmlightning.training.module import FlowMatching

TOY = (
    "fit", "--config", "configs/toy/moons.yaml", "--wandb.mode=disabled", "--samples.at_end=false",
    "--trajectories.at_end=false", "--trainer.max_steps=24", "--trainer.accumulate_grad_batches=2",
    "--data.steps_per_epoch=20", "--trainer.val_check_interval=8", "--data.val_size=100", "--data.test_size=100",
    "--evaluation.metrics=[{class_path: Wasserstein, init_args: {subsets: 1, size: 100}}]",
    "--evaluation.batch_size=50", "--trainer.log_every_n_steps=1", "--model.solver={method: euler, num_steps: 2}",
)  # fmt: skip
GO_ON = "--ckpt_path=auto"
USR1, USR2, TERM, INT = signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT


@pytest.fixture(autouse=True)
def same_handlers_after():
    """A stopped command leaves its process deaf, and this one goes on."""
    before = {each: signal.getsignal(each) for each in EXIT_CODES}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody stopped."""
    from fmlightning.__main__ import main

    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*TOY, f"--run_dir={run}"]) == 0
    return run


@pytest.fixture
def sending(monkeypatch):
    """`sending((USR1, ...), cls, method, call)`: send the signals to this process before a call of a method."""

    def prepare(signals, cls, method, call):
        kept, calls = getattr(cls, method), []

        def replaced(self, *args, **kwargs):
            calls.append(method)
            if len(calls) == call:
                for each in signals:
                    os.kill(os.getpid(), each)
            return kept(self, *args, **kwargs)

        monkeypatch.setattr(cls, method, replaced)

    return prepare


def saved(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def require_equal(run, whole):
    one, other = saved(run), saved(whole)
    assert one["global_step"] == other["global_step"] == 24
    for a, b in (
        (one["state_dict"], other["state_dict"]),
        (one["callbacks"]["EMA"]["shadow"], other["callbacks"]["EMA"]["shadow"]),
    ):
        assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert (run / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()


PLACES = {
    # what is called when the signals come, how often before, and the step after which the run stops
    "before the first step": (FlowMatching, "configure_optimizers", 1, 1),
    "in the first of two micro-batches": (FlowMatching, "training_step", 9, 5),
    "in the second": (FlowMatching, "training_step", 10, 5),
    "in the last step of an epoch": (FlowMatching, "training_step", 20, 10),
    "in a validation": (FlowMatching, "validation_step", 2, 5),
    "in the last step": (FlowMatching, "training_step", 48, 24),
    "in the final evaluation": (Evaluator, "block", 1, 24),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_stops_after_the_step_and_goes_on(place, whole, sending, fmlightning, tmp_path):
    cls, method, call, step = PLACES[place]
    run = tmp_path / "run"
    sending((USR1,), cls, method, call)
    status, shown = fmlightning(*TOY, f"--run_dir={run}")
    assert status == 75, shown
    assert f"SIGUSR1: stopping after step {step}\n" in shown
    assert GO_ON.replace("=", " ") in shown
    assert json.loads((run / "manifest.json").read_text())["status"] == "stopped"
    assert saved(run)["global_step"] == step
    status, shown = fmlightning(*TOY, f"--run_dir={run}", GO_ON)
    assert status == 0, shown
    require_equal(run, whole)


CODES = [
    ((USR1,), 75, "SIGUSR1"),
    ((USR2,), 75, "SIGUSR2"),
    ((TERM,), 143, "SIGTERM"),
    ((INT,), 130, "SIGINT"),
    ((USR1, USR1, USR2, TERM), 143, "SIGTERM"),  # who wants an end gets it
    ((INT, TERM), 143, "SIGTERM"),
]


@pytest.mark.parametrize(("signals", "code", "name"), CODES, ids=lambda v: str(v))
def test_the_exit_status_says_what_was_asked(signals, code, name, sending, fmlightning, tmp_path):
    run = tmp_path / "run"
    sending(signals, FlowMatching, "training_step", 5)
    status, shown = fmlightning(*TOY, f"--run_dir={run}")
    assert status == code, shown
    assert f"{name}: stopping after step 3\n" in shown
    assert saved(run)["global_step"] == 3


def test_signals_during_the_save_change_nothing(whole, sending, fmlightning, tmp_path):
    run = tmp_path / "run"
    sending((USR1,), FlowMatching, "training_step", 5)
    sending((TERM, USR2, INT), ChecksummedFiles, "save_checkpoint", 1)
    status, shown = fmlightning(*TOY, f"--run_dir={run}")
    assert status == 75, shown
    assert fmlightning(*TOY, f"--run_dir={run}", GO_ON)[0] == 0
    require_equal(run, whole)


def test_a_signal_before_a_command_ends_does_not_change_its_status(sending, fmlightning, tmp_path):
    run = tmp_path / "run"
    sending((USR1,), Evaluation, "write", 1)  # after the last place to stop
    assert fmlightning(*TOY, f"--run_dir={run}")[0] == 0
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"


def test_a_data_worker_leaves_the_signals_to_its_run(monkeypatch):
    monkeypatch.setattr(SIGNAL_STATE, "process", os.getpid() + 1)  # what a forked process sees
    before = SIGNAL_STATE.received
    handle(USR1, None)
    assert SIGNAL_STATE.received == before


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(repository, tmp_path):
    """It comes in the same step, so the run has no time to save; what was saved is whole."""
    run = tmp_path / "run"
    code = (
        "import os, sys; from fmlightning.__main__ import main; from fmlightning.training.module import FlowMatching\n"
        "kept, calls = FlowMatching.training_step, []\n"
        "def step(self, *args):\n"
        "    calls.append(1)\n"
        "    for _ in range(2 if len(calls) == 9 else 0): os.kill(os.getpid(), 2)\n"
        "    return kept(self, *args)\n"
        "FlowMatching.training_step = step\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    argv = [
        sys.executable,
        "-c",
        code,
        *TOY,
        f"--run_dir={run}",
        "--checkpoints.every_n_train_steps=2",
    ]
    result = subprocess.run(argv, cwd=repository, capture_output=True, text=True, timeout=300)
    assert result.returncode == 130, result.stderr
    assert saved(run)["global_step"] == 4
