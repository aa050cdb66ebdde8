"""A mirror that dies, hangs or runs out of disk costs a run one message, and nothing else."""

import csv
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import warm

from fmlightning.training import tracking
from fmlightning.training.tracking import Tracking, close_mirror, reachable, wandb_logger

HURT = """
import os, signal, sys
from pathlib import Path
from fmlightning.training.callbacks.progress import StepProgress
from fmlightning.training import tracking

def cores():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\\0")
        except OSError:
            continue
        if words[0].endswith(b"wandb-core") and str(os.getpid()).encode() in words:
            yield int(path.parent.name)

def on_train_batch_end(self, trainer, *args):
    if trainer.global_step == 5:
        (core,) = cores()
        os.kill(core, signal.{signal})
        import xgboost  # of which W&B would like to know; an empty file here
        print("hurt", core, flush=True)

StepProgress.on_train_batch_end = on_train_batch_end
tracking.CLOSE_TIMEOUT["offline"] = {patience}
from fmlightning.__main__ import main
sys.exit(main(sys.argv[1:]))
"""

TINY = (
    "fit", "--config", "configs/toy/moons.yaml", "--wandb.mode=offline", "--samples.at_end=false",
    "--trajectories.at_end=false", "--evaluation.metrics=[]", "--data.val_size=64", "--data.test_size=64",
    "--trainer.max_steps=60", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0",
)  # fmt: skip


def gone(pid, limit=120):
    """Whether a process ends, or has ended and nobody has asked how."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the process in /proc")
@pytest.mark.parametrize(
    ("name", "patience"),
    # the patience of a process that was killed is never needed
    [("SIGKILL", 600), pytest.param("SIGSTOP", 2, marks=pytest.mark.slow)],
)
def test_a_run_outlives_the_process_of_wandb(tmp_path, repository, name, patience):
    script, run = tmp_path / "hurt.py", tmp_path / "run"
    script.write_text(HURT.format(signal=name, patience=patience))
    (tmp_path / "xgboost.py").write_text("")
    result = warm.run(
        [sys.executable, str(script), *TINY, f"--run_dir={run}"],
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    shown = result.stdout + result.stderr
    assert result.returncode == 0, shown
    assert shown.count("W&B is lost") == 1, shown
    assert "Traceback" not in shown
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    with (run / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(60))
    core = int(shown.split("hurt ")[1].split()[0])
    assert gone(core)


@pytest.fixture
def tiny_disk(tmp_path):
    """Two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror that works, in offline mode, with its files in a folder."""

    def call(folder):
        monkeypatch.setenv("WANDB_DIR", str(folder))
        logger = wandb_logger(Tracking(mode="offline"), folder, "test")
        assert reachable(logger)
        return logger

    yield call
    close_mirror()


def test_a_full_disk_is_said_once(mirror, tiny_disk, capsys):
    logger = mirror(tiny_disk)
    for step in range(400):
        logger.log_metrics({"words": "x" * 10_000}, step)
    assert logger.ended.wait(120)
    for step in range(400, 500):
        logger.log_metrics({"more": 1.0}, step)
    close_mirror()
    shown = capsys.readouterr().out
    assert shown.count("W&B is lost") == 1
    assert "no space left" in shown


def test_a_folder_that_is_removed_is_said_once(mirror, tmp_path, capsys):
    import shutil

    logger = mirror(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step)
    assert logger.ended.wait(120)
    assert capsys.readouterr().out.count("W&B is lost") == 1


def test_a_write_that_hangs_holds_nothing_up(mirror, tmp_path, capsys, monkeypatch):
    logger = mirror(tmp_path)
    forever = threading.Event()
    logger.send(forever.wait)
    monkeypatch.setitem(tracking.CLOSE_TIMEOUT, "offline", 0.1)
    for step in range(tracking.MAX_QUEUED + 2):
        logger.log_metrics({"a": 1.0}, step)
    logger.close()
    forever.set()
    assert capsys.readouterr().out.count("W&B is lost (it does not answer)") == 1


def test_what_was_written_before_the_end_is_in_the_file(mirror, tmp_path):
    logger = mirror(tmp_path)
    for step in range(200):
        logger.log_metrics({f"metric_{step}": 1.0}, step)
    close_mirror()
    assert not logger.lost
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    until = (
        time.monotonic() + 120
    )  # W&B writes its last block a moment after it has said that it is done
    while b"metric_199" not in file.read_bytes():
        assert time.monotonic() < until
        time.sleep(0.05)
