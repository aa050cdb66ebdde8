"""When one process of a run dies, all end, with one message and no process left behind."""

import os
import sys
import time
from pathlib import Path

import pytest
import warm

VICTIM = """
import os, signal, sys, time
from fmlightning.training.callbacks.progress import StepProgress
from fmlightning.training.module import FlowMatching

def on_train_batch_start(self, batch, batch_idx):
    rank, step = self.trainer.global_rank, self.trainer.global_step
    if step == 0:
        os.write(1, f"process {{rank}} {{os.getpid()}}\\n".encode())  # whole, whoever else writes
    if step == 5 and rank == {victim}:
        os.kill(os.getpid(), signal.SIGKILL)
    while step == 5 and {hangs}:  # as where the backend does not notice that the other is gone
        time.sleep(1)

FlowMatching.on_train_batch_start = on_train_batch_start
if __name__ == "__main__":
    from fmlightning.__main__ import main
    sys.exit(main(sys.argv[1:]))
"""

TINY = (
    "fit", "--config", "configs/toy/moons.yaml", "--config", "configs/trainer/cpu2.yaml", "--wandb.mode=disabled",
    "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.metrics=[]", "--data.val_size=64",
    "--data.test_size=64", "--trainer.max_steps=1000000", "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
)  # fmt: skip


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def gone(pids, limit=120):
    until = time.monotonic() + limit
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    return not any(map(alive, pids))


def run(tmp_path, repository, victim, hangs, *launcher):
    script = tmp_path / "victim.py"
    script.write_text(VICTIM.format(victim=victim, hangs=hangs))
    # the run is endless: that this returns at all is what is tested
    result = warm.run(
        [sys.executable, *launcher, str(script), *TINY, f"--run_dir={tmp_path / 'run'}"],
        timeout=400,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    shown = result.stdout + result.stderr
    assert result.returncode != 0, shown
    pids = [int(line.split()[2]) for line in shown.splitlines() if line.startswith("process ")]
    assert len(pids) == 2, shown
    assert gone(pids)
    return shown


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("victim", "hangs"),
    [
        (1, False),
        pytest.param(0, False, marks=pytest.mark.slow),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(0, True, marks=pytest.mark.slow),
    ],
)
def test_all_processes_end_when_one_is_killed(tmp_path, repository, victim, hangs):
    shown = run(tmp_path, repository, victim, hangs)
    assert shown.count("error:") == 1, shown
    assert ("process 1 was killed by SIGKILL" if victim else "process 0 has died") in shown
    assert "--ckpt_path auto" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_ends_them_too(tmp_path, repository, victim):
    shown = run(
        tmp_path, repository, victim, False, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    )  # fmt: skip
    assert "Signal 9 (SIGKILL)" in shown  # by torchrun, which says it at length
    assert shown.count("error: ") <= 1
