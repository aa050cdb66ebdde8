"""Cells in child processes, some at a time: each is trained and then evaluated in one slot."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fmlightning.studies.sweep.cells import SweepCell
from fmlightning.studies.sweep.children import Child, start
from fmlightning.studies.sweep.job import Job, Step
from fmlightning.studies.sweep.journal import SweepState
from fmlightning.studies.sweep.plan import Plan
from fmlightning.studies.sweep.status import Status

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
POLL = 0.2
"""Seconds between two polls of the children."""

PATIENCE = 600.0
"""Seconds that a child has to end after TERM: one step with its validation and a checkpoint."""


@dataclass
class ActiveJob:
    """A cell at work in a slot."""

    job: Job
    slot: int
    step: Step
    process: Child
    began: float = field(default_factory=time.monotonic)


@dataclass
class Pool:
    """Brings the cells of a plan to their end.

    Attributes:
        jobs: how many at a time.
        log: called with a line whenever a cell has come further.
        refresh: called again and again, to draw what is going on.
    """

    plan: Plan
    journal: SweepState
    jobs: int
    log: Callable[[str], None] = print
    refresh: Callable[["Pool"], None] = lambda pool: None
    running: list[ActiveJob] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    reported: set[Path] = field(default_factory=set)
    received: int = 0

    def run(self) -> int:
        """Bring every cell as far as it gets; returns the signal that stopped it, or 0."""
        missing = [c for c in self.plan.cells if self.journal.state[c.run].word != "finished"]
        self.waiting = [self.plan.job(cell) for cell in missing]
        with self.listening():
            try:
                while (self.waiting or self.running) and not self.received:
                    self.fill()
                    self.refresh(self)
                    time.sleep(POLL)
                    self.collect()
            finally:
                self.stop()
        return self.received

    def fill(self) -> None:
        """Start cells in free slots, but none that another process trains."""
        for job in list(self.waiting):
            free = set(range(self.jobs)) - {active.slot for active in self.running}
            if not free or self.received:
                return
            found = job.status()
            if found.word == "running":
                self.elsewhere(job.cell, found)
                continue
            self.waiting.remove(job)
            if step := job.next(found):
                self.start(job, min(free), step)
            else:  # another process has finished it
                self.change(job.cell, found)

    def elsewhere(self, cell: SweepCell, found: Status) -> None:
        if cell.run not in self.reported:
            self.reported.add(cell.run)
            self.journal.note(cell, found)
            self.log(f"trained by {found.why}, so this waits for it: {cell.label}")

    def start(self, job: Job, slot: int, step: Step) -> None:
        job.head_log(step)
        env = environment(slot, self.jobs, self.plan.gpus)
        process = start(step.command, job.log, env, fork=not self.plan.gpus)
        self.running.append(ActiveJob(job, slot, step, process))
        self.journal.note(job.cell, Status(step.name))

    def collect(self) -> None:
        """Collect the children that have ended, and go on with their cells."""
        for active in list(self.running):
            if active.process.poll() is not None:
                self.running.remove(active)
                self.ended(active)

    def ended(self, active: ActiveJob) -> None:
        job, code, seconds = active.job, active.process.wait(), time.monotonic() - active.began
        if code and self.received:  # it was signalled to
            return self.change(job.cell, Status("interrupted"))
        found = job.after(active.step, code, seconds)
        if found.word == "running":
            self.waiting.append(job)
            self.elsewhere(job.cell, found)
        elif found.word == "trained" and not self.received and (step := job.next(found)):
            self.log(f"trained in {seconds:.0f} s: {job.cell.label}")
            self.start(job, active.slot, step)
        else:
            self.change(job.cell, found)

    def change(self, cell: SweepCell, found: Status) -> None:
        """A cell has come as far as it gets now."""
        self.journal.note(cell, found)
        done = len(self.plan.cells) - len(self.waiting) - len(self.running)
        why = f": {found.why}" if found.why else ""
        self.log(f"[{done}/{len(self.plan.cells)}] {found.word}: {cell.label}: {cell.run}{why}")

    # -- signals ------------------------------------------------------------------------------------

    @contextmanager
    def listening(self) -> Iterator[None]:
        heard = [
            kind for kind in STOPS if signal.getsignal(kind) != signal.SIG_IGN
        ]  # not under nohup
        before = {kind: signal.signal(kind, self.take) for kind in heard}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def take(self, signum: int, frame: FrameType | None) -> None:
        """Note a signal; a second one does not wait for the children."""
        if self.received:
            for active in self.running:
                kill(active)
        self.received = signum

    def stop(self) -> None:
        """Let the children save and end."""
        if self.running:
            self.log(f"stopping {len(self.running)} cells; again to stop them at once")
        for active in self.running:
            active.process.terminate()
        for active in list(self.running):
            try:
                active.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                kill(active)
                active.process.wait()
        self.collect()


def kill(active: ActiveJob) -> None:
    """End a child and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(active.process.pid, signal.SIGKILL)


def environment(slot: int, jobs: int, gpus: int) -> dict[str, str]:
    """A share of the machine: a GPU each where there are several, and of a CPU some threads."""
    env = dict(os.environ)
    if jobs > 1 and gpus > 1:
        visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        names = visible.split(",")
        env["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
    if jobs > 1 and "OMP_NUM_THREADS" not in env:
        env["OMP_NUM_THREADS"] = str(max(1, cores() // jobs))
    return env


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
