"""One process trains a run directory at a time."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fmlightning.runs.lock import lock, lock_file, owner, unlock

HOLDER = """
import sys, time
from pathlib import Path
from fmlightning.runs.lock import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a run directory."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_directory_is_held_by_one_process_until_it_has_gone(tmp_path, holder):
    run = tmp_path / "run"
    assert owner(run).startswith(f"process {holder.pid} on ")
    with pytest.raises(ValueError, match=f"is being trained by process {holder.pid} on "):
        lock(run)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert owner(run) is None
    lock(run)
    assert owner(run).startswith(f"process {os.getpid()} on ")
    unlock()
    assert owner(run) is None
    assert not run.exists()  # the lock lies beside it


def test_to_ask_who_is_there_writes_nothing(tmp_path):
    assert owner(tmp_path / "none" / "run") is None
    assert list(tmp_path.iterdir()) == []


def test_fit_refuses_a_directory_that_another_process_trains(
    tmp_path, holder, fmlightning, repository
):
    config = repository / "configs" / "toy" / "moons.yaml"
    words = ("fit", f"--config={config}", f"--run_dir={tmp_path / 'run'}", "--wandb.mode=disabled")
    status, shown = fmlightning(*words, "--trainer.max_steps=1")
    assert status == 2
    assert f"is being trained by process {holder.pid}" in shown
    assert [p.name for p in tmp_path.iterdir()] == [lock_file(tmp_path / "run").name]


def test_a_place_that_cannot_be_written_is_named_by_its_option(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        ValueError, match=r"run_dir=.*cannot be written \(Permission denied\).*--run_dir"
    ):
        lock(tmp_path / "run")
