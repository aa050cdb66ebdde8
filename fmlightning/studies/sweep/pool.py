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

from fmlightning.studies.sweep.cells import Cell
from fmlightning.studies.sweep.children import Child, start
from fmlightning.studies.sweep.journal import SweepState
from fmlightning.studies.sweep.plan import Plan
from fmlightning.studies.sweep.status import Status
from fmlightning.studies.sweep.work import Step, Work

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LOOK = 0.2
"""Seconds between two looks at the children."""

PATIENCE = 600.0
"""Seconds that a child has to end after TERM: one step with its validation and a checkpoint."""


@dataclass
class Job:
    """A cell at work in a slot."""

    work: Work
    slot: int
    step: Step
    process: Child
    began: float = field(default_factory=time.monotonic)


@dataclass
class Pool:
    """Brings the cells of a plan to their end.

    Attributes:
        jobs: how many at a time.
        tell: called with a line whenever a cell has come further.
        look: called again and again, to draw what is going on.
    """

    plan: Plan
    journal: SweepState
    jobs: int
    tell: Callable[[str], None] = print
    look: Callable[["Pool"], None] = lambda pool: None
    running: list[Job] = field(default_factory=list)
    waiting: list[Work] = field(default_factory=list)
    told: set[Path] = field(default_factory=set)
    received: int = 0

    def run(self) -> int:
        """Bring every cell as far as it gets; returns the signal that stopped it, or 0."""
        missing = [c for c in self.plan.cells if self.journal.state[c.run].word != "finished"]
        self.waiting = [self.plan.work(cell) for cell in missing]
        with self.listening():
            try:
                while (self.waiting or self.running) and not self.received:
                    self.fill()
                    self.look(self)
                    time.sleep(LOOK)
                    self.collect()
            finally:
                self.stop()
        return self.received

    def fill(self) -> None:
        """Start cells in free slots, but none that another process trains."""
        for work in list(self.waiting):
            free = set(range(self.jobs)) - {job.slot for job in self.running}
            if not free or self.received:
                return
            found = work.status()
            if found.word == "running":
                self.elsewhere(work.cell, found)
                continue
            self.waiting.remove(work)
            if step := work.next(found):
                self.start(work, min(free), step)
            else:  # another process has finished it
                self.change(work.cell, found)

    def elsewhere(self, cell: Cell, found: Status) -> None:
        if cell.run not in self.told:
            self.told.add(cell.run)
            self.journal.note(cell, found)
            self.tell(f"trained by {found.why}, so this waits for it: {cell.label}")

    def start(self, work: Work, slot: int, step: Step) -> None:
        work.head_log(step)
        env = environment(slot, self.jobs, self.plan.gpus)
        process = start(step.command, work.log, env, fork=not self.plan.gpus)
        self.running.append(Job(work, slot, step, process))
        self.journal.note(work.cell, Status(step.name))

    def collect(self) -> None:
        """See which children have ended, and go on with their cells."""
        for job in list(self.running):
            if job.process.poll() is not None:
                self.running.remove(job)
                self.ended(job)

    def ended(self, job: Job) -> None:
        work, code, seconds = job.work, job.process.wait(), time.monotonic() - job.began
        if code and self.received:  # it was told to
            return self.change(work.cell, Status("interrupted"))
        found = work.after(job.step, code, seconds)
        if found.word == "running":
            self.waiting.append(work)
            self.elsewhere(work.cell, found)
        elif found.word == "trained" and not self.received and (step := work.next(found)):
            self.tell(f"trained in {seconds:.0f} s: {work.cell.label}")
            self.start(work, job.slot, step)
        else:
            self.change(work.cell, found)

    def change(self, cell: Cell, found: Status) -> None:
        """A cell has come as far as it gets now."""
        self.journal.note(cell, found)
        done = len(self.plan.cells) - len(self.waiting) - len(self.running)
        why = f": {found.why}" if found.why else ""
        self.tell(f"[{done}/{len(self.plan.cells)}] {found.word}: {cell.label}: {cell.run}{why}")

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
            for job in self.running:
                kill(job)
        self.received = signum

    def stop(self) -> None:
        """Let the children save and end."""
        if self.running:
            self.tell(f"stopping {len(self.running)} cells; again to stop them at once")
        for job in self.running:
            job.process.terminate()
        for job in list(self.running):
            try:
                job.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                kill(job)
                job.process.wait()
        self.collect()


def kill(job: Job) -> None:
    """End a child and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(job.process.pid, signal.SIGKILL)


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
