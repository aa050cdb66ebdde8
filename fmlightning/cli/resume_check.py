"""A short run of the real command, once without a break and once killed and resumed: both must end the same."""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from fmlightning.runs.compare import Record, compare
from fmlightning.runs.directory import Run
from fmlightning.runs.metrics_csv import last_step

CONFIG = """\
model:
  network: {class_path: TimeMLP, init_args: {dim: 2, width: 32, depth: 2, dropout: 0.1}}
  source: EightGaussians
  coupling: MinibatchOT
  optimizer: {class_path: AdamW, init_args: {lr: 1.0e-3}}
  scheduler: Cosine
data: {class_path: ToyData, init_args: {target: Moons, batch_size: 64, train_size: 1000, val_size: 256}}
checkpoints: {every_n_train_steps: 50}
trainer:
  devices: 1
  max_steps: 500
  log_every_n_steps: 10
  val_check_interval: 200
  check_val_every_n_epoch: null
  enable_progress_bar: false
  enable_model_summary: false
samples: {at_end: false}
trajectories: {at_end: false}
evaluation: {at_end: false}
wandb: {mode: disabled}
"""
KILL_AT = 60
LIMIT = 600  # seconds, after which something hangs
LAUNCHER = ("SLURM", "TORCHELASTIC", "PMI", "OMPI", "MASTER_", "FMLIGHTNING_DEBUG")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")


class Failed(Exception):
    """A run did not end as it should have."""


class TooLate(Exception):
    """The run ended before it could be killed."""


@dataclass(frozen=True)
class ResumeCheck:
    """The outcome of a check.

    Attributes:
        step: the last that was logged before the kill.
        differing: the parts of the two runs that are not the same to the bit.
        seconds: that it took.
    """

    step: int
    differing: tuple[str, ...]
    seconds: float


def check_resume(accelerator: str = "cpu") -> ResumeCheck:
    """Train, train and kill, resume, and compare; dots on stderr show that it goes on.

    Raises:
        Failed: a run ended with an error.
        TooLate: the machine was too busy to kill the run in time.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fmlightning-") as name, ExitStack() as started:
        folder = Path(name)
        (folder / "config.yaml").write_text(CONFIG)
        whole = Process(folder, "whole", accelerator, started)
        broken = Process(folder, "broken", accelerator, started)
        step = broken.kill_after(KILL_AT)
        again = Process(folder, "broken", accelerator, started)
        for process in (again, whole):
            process.finish()
        rows = compare(Record.read(Run(folder / "whole")), Record.read(Run(folder / "broken")))
    differing = tuple(row.name for row in rows if row.difference)
    return ResumeCheck(step, differing, time.monotonic() - begin)


class Process:
    """`fmlightning fit` in a process of its own, which ends with the check."""

    def __init__(self, folder: Path, name: str, accelerator: str, started: ExitStack) -> None:
        self.run, self.log, self.waited = folder / name, folder / f"{name}.log", 0.0
        command = [sys.executable, "-m", "fmlightning", "fit", "--config", str(folder / "config.yaml")]  # fmt: skip
        command += ["--run_dir", str(self.run), "--trainer.accelerator", accelerator]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--ckpt_path", "auto"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=without_launcher(), cwd=folder,
            )  # fmt: skip
        started.enter_context(self.process)
        started.callback(self.process.kill)

    def kill_after(self, step: int) -> int:
        """`kill -9` once a step is logged; returns the last step that is."""
        while (reached := last_step(self.run / "metrics.csv")) < step:
            if self.process.poll() is not None:
                self.finish()
                raise TooLate
            self.wait(0.02)
        self.process.kill()
        if self.process.wait() >= 0:
            raise TooLate
        return reached

    def finish(self) -> None:
        """Wait for a good end."""
        while self.process.poll() is None:
            self.wait(1.0)
        if self.process.returncode:
            lines = self.log.read_text().strip().splitlines() or ["no message"]
            raise Failed(f"exit status {self.process.returncode}: {lines[-1]}")

    def wait(self, seconds: float) -> None:
        """Sleep, show a dot a second, and give up in the end."""
        if self.waited > LIMIT:
            raise Failed(f"no end after {LIMIT} s")
        before = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        after = self.waited + time.monotonic() - before
        if int(after) > int(self.waited):
            print(".", end="", file=sys.stderr, flush=True)
        self.waited = after


def without_launcher() -> dict[str, str]:
    """The environment without a launcher's variables of other processes."""
    return {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER) and k not in RANKS}
