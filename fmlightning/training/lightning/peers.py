"""The processes of a run end together.

A process that dies leaves the others waiting for it, for ever where their backend does not notice. So where Lightning
has started the processes, the first watches the others and they watch the first. Those that are left have GRACE
seconds to end by themselves, and are ended then; process 0 says what happened, or process 1 if 0 is dead.
Where torchrun or srun has started them, it watches.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import distributed

PERIOD = 0.5
"""Seconds between two looks."""

GRACE = 10.0
"""Seconds in which a process may end by itself after another has died."""

ENDING = 360.0
"""The same for one that has begun to end by itself: W&B alone is given 300."""

LOST = re.compile(r"closed by peer|reset by peer|broken pipe|gloo|nccl|timed out", re.IGNORECASE)
"""What backends say when another process is gone."""


class PeerWatchdog(Callback):
    """Watch the other processes of this machine, from the moment that there are any."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if trainer.world_size > 1 and not WATCH.started:
            WATCH.start(getattr(trainer.strategy.launcher, "procs", []), trainer.global_rank)

    def on_exception(self, *args: Any) -> None:
        WATCH.ending = True


class Watch:
    """What this process knows of the others."""

    def __init__(self) -> None:
        self.started = self.ending = self.said = False
        self.children: list[subprocess.Popen[bytes]] = []
        self.rank = 0

    def start(self, children: list[subprocess.Popen[bytes]], rank: int) -> None:
        self.started, self.children, self.rank = True, children, rank
        self.parent = os.getppid()
        without_observer()
        if self.children or self.by_lightning:
            threading.Thread(target=self.look, name="watch", daemon=True).start()

    @property
    def by_lightning(self) -> bool:
        """Whether the first process has started this one."""
        return not self.children and os.environ.get("LOCAL_RANK", "0") != "0" and not external()

    def look(self) -> None:
        """Wait until a process is gone, and end this one if it does not end by itself."""
        while not (dead := self.dead()):
            time.sleep(PERIOD)
        time.sleep(GRACE)
        if self.ending:
            time.sleep(ENDING)
        self.say(dead)
        self.end()
        os._exit(1)

    def dead(self) -> str:
        """Who is gone, in words; nothing while all are there."""
        if self.by_lightning and os.getppid() != self.parent:
            return "process 0 has died"
        for rank, child in enumerate(self.children, 1):
            status = child.poll()
            if status:
                how = (
                    f"was killed by {signal.Signals(-status).name}" if status < 0 else "has failed"
                )
                return f"process {rank} {how}"
        return ""

    def say(self, dead: str) -> None:
        """The one message: by process 0, or by process 1 if that is dead."""
        if self.said or (self.rank > 0 and not (self.by_lightning and self.rank == 1 and dead)):
            return
        self.said = True
        dead = dead or "a process of this run has died"
        print(
            f"error: {dead}, so the run ends; to go on: the same command with --ckpt_path auto",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        """Leave no process behind."""
        for child in self.children:
            if child.poll() is None:
                child.kill()


WATCH = Watch()


def external() -> bool:
    """Whether torchrun or srun has started the processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ


def without_observer() -> None:
    """Retire Lightning's own observer, which kills the first process without a word."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def left_alone(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone; if so, that has been said."""
    if not (distributed.is_available() and WATCH.started):
        return False
    while error is not None and not LOST.search(str(error)):
        error = error.__cause__ or error.__context__
    if error is None:
        return False
    until = time.monotonic() + GRACE
    while not (dead := WATCH.dead()) and not external() and time.monotonic() < until:
        time.sleep(0.1)  # it may take a moment to be seen
    WATCH.say(dead)
    WATCH.end()
    return True
