"""Cells as the jobs of an array on a SLURM cluster, through submitit.

A job does what `fmlightning sweep` does for a cell on one machine. Before its time is over, and where it is
preempted, submitit sends it USR2: the training stops after its step and saves, and submitit puts the same job back
into the queue, where it goes on from the checkpoint to the bit. Lightning's own requeueing is off.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmlightning.cli.config_files import read
from fmlightning.runs.directory import read_json
from fmlightning.studies.sweep.file import require_known
from fmlightning.studies.sweep.job import Job, Step
from fmlightning.studies.sweep.plan import Plan
from fmlightning.studies.sweep.status import write_whole

if TYPE_CHECKING:
    from submitit import AutoExecutor
    from submitit.helpers import DelayedSubmission

POLL = 0.2
"""Seconds between two polls of the child."""

TIMEOUTS = 1000
"""Number of times that a job may run into its time limit; submitit's three are too few for a long training."""


@dataclass(frozen=True)
class Cluster:
    """Queue and resources of the jobs.

    Attributes:
        cluster: slurm, or local to run the jobs on this machine.
        time: minutes, after which a job goes back into the queue.
        gpus_per_node: one process each; 0 trains on the CPU.
        parallel: jobs of the array at a time.
        warn: seconds before the end at which a job saves: enough for a step, its validation and a checkpoint.
        setup: lines of shell before the job, such as `module load cuda`.
    """

    cluster: str = "slurm"
    partition: str | None = None
    time: int = 240
    nodes: int = 1
    gpus_per_node: int = 1
    cpus_per_task: int | None = None
    memory_gb: float | None = None
    parallel: int = 64
    warn: int = 300
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: tuple[str, ...] = ()

    def parameters(self) -> dict[str, Any]:
        """The settings by submitit's names."""
        shared: dict[str, Any] = {
            "timeout_min": self.time,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_task": self.cpus_per_task,
            "mem_gb": self.memory_gb,
        }
        own = {
            "partition": self.partition,
            "array_parallelism": self.parallel,
            "signal_delay_s": self.warn,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "setup": list(self.setup) or None,
        }
        if self.cluster == "local":
            return shared
        tasks = {"tasks_per_node": max(1, self.gpus_per_node)}
        return shared | tasks | {f"slurm_{name}": value for name, value in own.items()}

    @property
    def devices(self) -> tuple[str, ...]:
        """Options of a training for its share."""
        devices = max(1, self.gpus_per_node)
        return (f"--trainer.devices={devices}", f"--trainer.num_nodes={self.nodes}")


def read_cluster(path: Path | None) -> Cluster:
    """The settings of a cluster.

    Raises:
        ValueError: what is wrong with the file.
    """
    if path is None:
        return Cluster()
    try:
        content = read(str(path)) or {}
        if not isinstance(content, dict):
            raise ValueError("holds no settings, such as `partition: gpu`")
        require_known(content, tuple(Cluster.__dataclass_fields__), "")
        for name, value in content.items():
            require_type(name, value)
        return Cluster(
            **content | ({"setup": tuple(content["setup"])} if "setup" in content else {})
        )
    except ValueError as error:
        raise ValueError(f"--cluster {path}: {error}") from error


def require_type(name: str, value: Any) -> None:
    least = {
        "time": 1,
        "nodes": 1,
        "gpus_per_node": 0,
        "cpus_per_task": 1,
        "parallel": 1,
        "warn": 1,
    }
    if name in least and (type(value) is not int or value < least[name]):
        raise ValueError(f"{name}: {value} must be a whole number from {least[name]} on")
    if name == "memory_gb" and (type(value) not in (int, float) or value <= 0):
        raise ValueError(f"{name}: {value} must be a number above 0")
    if name == "cluster" and value not in ("slurm", "local"):
        raise ValueError(f"cluster: {value} must be slurm or local")
    if name == "setup" and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        raise ValueError(f"setup: {value} must be a list of lines")
    if name in ("partition", "account", "qos", "constraint") and not isinstance(value, str):
        raise ValueError(f"{name}: {value} must be text")


# -- the job ------------------------------------------------------------------------------------------


@dataclass
class Task:
    """The task of a job: a cell, from where it is to its end."""

    job: Job
    process: "subprocess.Popen[bytes] | None" = None

    def __call__(self) -> str:
        """Run step after step; returns the status in which the cell is left."""
        if rank():  # trains with the first process of the job, which then goes on alone
            if not self.job.trained:
                self.run(Step("training", (*self.job.fit, "--ckpt_path=auto")))
            return "helped"
        found = self.job.status()
        while step := self.job.next(found):
            began = time.monotonic()
            code = self.run(step)
            found = self.job.after(step, code, time.monotonic() - began)
            if found.word in (
                "failed",
                "interrupted",
            ):  # an interrupted one was signalled to stop for good
                break
        return found.word

    def run(self, step: Step) -> int:
        self.job.head_log(step)
        with self.job.log.open("ab") as file:
            self.process = subprocess.Popen(
                step.command, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        while (
            code := self.process.poll()
        ) is None:  # `wait` would hold a lock while a signal comes
            time.sleep(POLL)
        return code

    def checkpoint(self) -> "DelayedSubmission":
        """Let the child save and end; submitit calls this in a signal, and puts what it returns into the queue."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process.pid, signal.SIGUSR1)
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Task(self.job))


def rank() -> int:
    """Number of this process in its job."""
    return int(os.environ.get("SLURM_PROCID", 0))


# -- the queue ----------------------------------------------------------------------------------------


def submit(plan: Plan, todo: Sequence[Job], cluster: Cluster) -> dict[str, str]:
    """Send cells as one array; returns the number of the job by run directory, of earlier ones too."""
    sender = executor(plan, cluster)
    with apart(sender.folder / "local.log") if cluster.cluster == "local" else nullcontext():
        jobs = sender.submit_array([Task(job) for job in todo])
    numbers = {str(w.cell.run): str(job.job_id) for w, job in zip(todo, jobs, strict=True)}
    known = submitted(plan) | numbers
    write_whole(plan.folder / "jobs" / "submitted.json", known)
    return known


@contextmanager
def apart(log: Path) -> Iterator[None]:
    """Let jobs of this machine write elsewhere: who reads our output would wait for their end too."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, before in enumerate(kept, 1):
            os.dup2(before, number)
            os.close(before)


def executor(plan: Plan, cluster: Cluster) -> "AutoExecutor":
    """submitit's, with the settings of the cluster.

    Raises:
        ValueError: submitit is not installed, or there is no SLURM here.
    """
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            "--launcher slurm needs submitit: pip install 'fmlightning[slurm]'"
        ) from error
    folder, name = plan.folder / "jobs", cluster.cluster
    try:
        made = submitit.AutoExecutor(folder, cluster=name, **{f"{name}_max_num_timeout": TIMEOUTS})
    except RuntimeError as error:
        raise ValueError(
            f"--launcher slurm: {error}. On a machine without SLURM, `cluster: local` in the file of --cluster runs "
            "the same jobs here"
        ) from error
    made.update_parameters(name=plan.sweep.name, **cluster.parameters())
    return made


def submitted(plan: Plan) -> dict[str, str]:
    """The number of the last job of each run directory."""
    return {
        run: str(job) for run, job in read_json(plan.folder / "jobs" / "submitted.json").items()
    }


def queued(plan: Plan, cluster: Cluster, job: Job) -> bool:
    """Check whether a job for a cell waits or runs."""
    number = submitted(plan).get(str(job.cell.run))
    if number is None:
        return False
    if cluster.cluster == "local":
        return alive(int(number))
    from submitit import SlurmJob

    return not SlurmJob(plan.folder / "jobs", number).done(force_check=True)


def alive(process: int) -> bool:
    """Check that a process of this machine runs, and is not only waiting to be collected."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
