"""Each way of starting several processes, by its own command; and what a signal to one of them does to all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm

REPOSITORY = Path(__file__).parents[2]
FIT = (sys.executable, "-m", "fmlightning", "fit")
TOY = (
    "--config", "configs/toy/moons.yaml", "--wandb.mode=disabled", "--samples.at_end=false",
    "--trajectories.at_end=false", "--evaluation.at_end=false", "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=5", "--data.val_size=100", "--trainer.val_check_interval=100",
)  # fmt: skip
CPU2 = ("--config", "configs/trainer/cpu2.yaml")
ENDLESS = "--trainer.max_steps=1000000"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def start():
    """Start a command; what still runs at the end of a test is killed, with all it has started."""
    started = []

    def call(argv, **environment):
        process = subprocess.Popen(
            [str(a) for a in argv], cwd=REPOSITORY, env={**os.environ, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def end(process):
    """Its status and all it printed."""
    shown, _ = process.communicate(timeout=300)
    return process.returncode, shown


def wait_for(condition, process):
    """Poll until something is there, for as long as the process lives."""
    deadline = time.monotonic() + 300
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def trains(run):
    """Whether a first row of metrics is there."""
    return (run / "metrics.csv").is_file()


def children(pid):
    """The processes that a process has started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def arguments(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def workers(pid):
    """The runs among the children of a process."""
    return [n for n in children(pid) if "fit" in arguments(n)]


def alive(pid):
    """Whether a process runs, and is not only waiting to be asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def require_stopped(run, shown, name):
    """All that a stopped run leaves: the step that was said is the step that was saved."""
    [said] = [line for line in shown.splitlines() if line.startswith(f"{name}: stopping after")]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert said == f"{name}: stopping after step {saved['global_step']}"
    assert json.loads((run / "manifest.json").read_text())["status"] == "stopped"


def status_of(run):
    return json.loads((run / "manifest.json").read_text())["status"]


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def require_close(run, other):
    for (name, mine), its in zip(weights(run).items(), weights(other).values(), strict=True):
        # AdamW in float32: sums in another order, divided by small numbers, over tens of steps
        torch.testing.assert_close(mine, its, atol=1e-3, rtol=1e-3, msg=name)


# -- trainer.devices --------------------------------------------------------------------------------


def test_a_signal_to_a_process_that_lightning_started_stops_both(start, tmp_path):
    run = tmp_path / "run"
    first = start([*FIT, *TOY, *CPU2, ENDLESS, f"--run_dir={run}"])
    wait_for(lambda: trains(run), first)
    [second] = workers(first.pid)
    os.kill(second, signal.SIGUSR1)
    status, shown = end(first)
    assert status == 75, shown
    require_stopped(run, shown, "SIGUSR1")
    assert not alive(second)


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path):
    run = tmp_path / "run"
    done = warm.run([*FIT, *TOY, *CPU2, "--data.batch_size=33", f"--run_dir={run}"])
    shown = done.stdout + done.stderr
    assert done.returncode == 2
    assert "data.batch_size=33" in shown
    assert shown.count("2 processes") == 1  # it is said before the second is started
    assert not run.exists()


# -- torchrun ---------------------------------------------------------------------------------------


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
            "fmlightning", "fit")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "one process"])
def test_a_signal_under_torchrun_stops_both(start, to, tmp_path):
    """It passes TERM on to all, and nothing else; its own status is never that of the run."""
    run = tmp_path / "run"
    agent = start([*TORCHRUN, *TOY, *CPU2, ENDLESS, f"--run_dir={run}"])
    wait_for(lambda: trains(run), agent)
    if to == "torchrun":
        agent.send_signal(signal.SIGTERM)
    else:
        os.kill(workers(agent.pid)[1], signal.SIGUSR2)
    status, shown = end(agent)
    assert status != 0
    require_stopped(run, shown, "SIGTERM" if to == "torchrun" else "SIGUSR2")


# -- trainer.num_nodes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_nodes_train_as_one_process_and_the_first_keeps_the_books(start, tmp_path):
    few = ("--trainer.max_steps=24", "--trainer.val_check_interval=12")
    options = ("--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=1")
    run, alone = tmp_path / "run", tmp_path / "alone"
    for number in range(2):  # the second time to find out who puts the first run aside
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        argv = [
            *FIT,
            *TOY,
            *few,
            *options,
            "--trainer.num_nodes=2",
            f"--run_dir={run}",
            "--rerun",
        ]
        nodes = [start(argv, **rendezvous, NODE_RANK=str(n)) for n in range(2)]
        shown = [end(node) for node in nodes]
        assert [status for status, _ in shown] == [0, 0], shown
        assert [f"finished: {run}" in text for _, text in shown] == [True, False]
        assert len(list(tmp_path.glob("run.*"))) == number
    status, shown = end(start([*FIT, *TOY, *few, f"--run_dir={alone}"]))
    assert status == 0, shown
    require_close(run, alone)


# -- SLURM ------------------------------------------------------------------------------------------

SBATCH = "configs/trainer/slurm.sbatch"
SRUN = """#!/bin/bash
# what srun does for two tasks of one node, and nothing else
while [[ "$1" == --* ]]; do shift; done
echo "$@" > "$STAND_INS/command"
tasks=()
for n in 0 1; do
  SLURM_PROCID=$n SLURM_LOCALID=$n SLURM_NODEID=0 SLURM_NTASKS=2 "$@" &
  tasks+=($!)
  echo $! > "$STAND_INS/task$n"
done
largest=0
for task in "${tasks[@]}"; do
  wait "$task"; status=$?
  (( status > largest )) && largest=$status
done
exit "$largest"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$STAND_INS/asked"
"""


@pytest.fixture
def slurm(tmp_path):
    """A folder of stand-ins for a cluster's commands, and the environment of a job there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = f'#!/bin/bash\nexec {sys.executable} -m fmlightning "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("fmlightning", command)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "STAND_INS": str(folder), "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "flow", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "127.0.0.1",
    }  # fmt: skip
    return folder, environment


def requeued(folder):
    """What the job asked `scontrol` for."""
    file = folder / "asked"
    return file.read_text().splitlines() if file.is_file() else []


@pytest.mark.parametrize("status", [0, 2, 75, 130, 137, 143])
def test_a_job_is_queued_again_for_one_status_only(start, slurm, status):
    folder, environment = slurm
    (folder / "srun").write_text(f'#!/bin/bash\necho "$@" > "$STAND_INS/command"\nexit {status}\n')
    ended, shown = end(start(["bash", SBATCH, "--config", "some.yaml"], **environment))
    assert ended == status, shown
    assert requeued(folder) == (["requeue 4242"] if status == 75 else [])
    command = (folder / "command").read_text()
    assert "fmlightning fit --config some.yaml" in command
    assert "--trainer.num_nodes 1 --trainer.devices 2 --ckpt_path auto" in command


@pytest.mark.slow
def test_a_job_that_is_told_of_its_time_limit_goes_on_in_its_next_life(start, slurm, tmp_path):
    folder, environment = slurm
    run, alone = tmp_path / "run", tmp_path / "alone"
    few = ("--trainer.max_steps=600",)
    job = ["bash", SBATCH, *TOY, *few, f"--run_dir={run}"]
    first = start(job, **environment, MASTER_PORT=free_port())
    wait_for(lambda: trains(run), first)
    os.kill(int((folder / "task1").read_text()), signal.SIGUSR1)  # SLURM tells all; one is enough
    status, shown = end(first)
    assert status == 75, shown
    require_stopped(run, shown, "SIGUSR1")
    assert requeued(folder) == ["requeue 4242"]  # once: Lightning asks for nothing
    status, shown = end(start(job, **environment, MASTER_PORT=free_port()))
    assert status == 0, shown
    assert len(requeued(folder)) == 1
    status, shown = end(start([*FIT, *TOY, *few, f"--run_dir={alone}"]))
    assert status == 0, shown
    assert status_of(run) == "finished"
    require_close(run, alone)


# -- an accelerator ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="bf16 is tried where there is an accelerator"
)
def test_bf16_takes_the_same_path_in_two_processes_of_one_gpu(start, tmp_path):
    """Two nodes of one device each, which here is the same device; so they talk through gloo."""
    few = ("--trainer.max_steps=24", "--trainer.val_check_interval=12", "--trainer.precision=bf16-mixed",
           "--trainer.accelerator=gpu", "--trainer.devices=1")  # fmt: skip
    gloo = "init_args: {process_group_backend: gloo}}"
    strategy = f"--trainer.strategy={{class_path: lightning.pytorch.strategies.DDPStrategy, {gloo}"
    run, alone = tmp_path / "run", tmp_path / "alone"
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    argv = [*FIT, *TOY, *few, strategy, "--trainer.num_nodes=2", f"--run_dir={run}"]
    nodes = [start(argv, **rendezvous, NODE_RANK=str(n)) for n in range(2)]
    shown = [end(node) for node in nodes]
    assert [status for status, _ in shown] == [0, 0], shown
    assert end(start([*FIT, *TOY, *few, f"--run_dir={alone}"]))[0] == 0
    for mine, its in zip(weights(run).values(), weights(alone).values(), strict=True):
        # a bfloat16 has 8 bits: 4e-3 of weights near 1, over 24 steps of AdamW
        torch.testing.assert_close(mine, its, atol=2e-2, rtol=2e-2)
