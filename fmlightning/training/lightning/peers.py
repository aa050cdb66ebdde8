"""The processes of a run end together.

A process that dies leaves the others waiting for it, for ever where their backend does not notice. So where Lightning
has started the processes, the first watches the others and they watch the first. Those that are left have GRACE
seconds to end by themselves, and are ended then; process 0 reports what happened, or process 1 if 0 is dead.
Where torchrun or srun has started them, it does all of this. Lightning's own observer watches the others for the
first only, ends it by SIGKILL before it can report, and has nothing for the others when the first has died.
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
"""Seconds between two checks."""

GRACE = 10.0
"""Seconds in which a process may end by itself after another has died."""

ENDING = 360.0
"""The same for one that has begun to end by itself: W&B alone is given 300."""

LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|gloo|nccl|timed out", re.IGNORECASE
)
"""Words of the backends' errors when another process is gone."""


class PeerWatchdog(Callback):
    """Watch the other processes of this machine, from the moment that there are any."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if trainer.world_size > 1 and not PEERS.started:
            PEERS.start(getattr(trainer.strategy.launcher, "procs", []), trainer.global_rank)

    def on_exception(self, *args: Any) -> None:
        PEERS.ending = True


class PeerProcesses:
    """The state of the other processes, as far as this one knows it."""

    def __init__(self) -> None:
        self.started = self.ending = self.reported = False
        self.children: list[subprocess.Popen[bytes]] = []
        self.rank = 0

    def start(self, children: list[subprocess.Popen[bytes]], rank: int) -> None:
        self.started, self.children, self.rank = True, children, rank
        self.parent = os.getppid()
        disable_observer()
        if self.children or self.by_lightning:
            threading.Thread(target=self.watch, name="watch", daemon=True).start()

    @property
    def by_lightning(self) -> bool:
        """True where the first process has started this one."""
        return not self.children and os.environ.get("LOCAL_RANK", "0") != "0" and not external()

    def watch(self) -> None:
        """Wait until a process is gone, and end this one if it does not end by itself."""
        while not (dead := self.dead_peer()):
            time.sleep(PERIOD)
        time.sleep(GRACE)
        if self.ending:
            time.sleep(ENDING)
        self.report(dead)
        self.kill_children()
        os._exit(1)

    def dead_peer(self) -> str:
        """The process that is gone, in words; empty while all are there."""
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

    def report(self, dead: str) -> None:
        """Print the one message: by process 0, or by process 1 if that is dead."""
        if self.reported or (self.rank > 0 and not (self.by_lightning and self.rank == 1 and dead)):
            return
        self.reported = True
        dead = dead or "a process of this run has died"
        print(
            f"error: {dead}, so the run ends; to go on: the same command with --ckpt_path auto",
            file=sys.stderr,
            flush=True,
        )

    def kill_children(self) -> None:
        """Leave no process behind."""
        for child in self.children:
            if child.poll() is None:
                child.kill()


PEERS = PeerProcesses()


def external() -> bool:
    """True where torchrun or srun has started the processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ


def disable_observer() -> None:
    """Retire Lightning's own observer, which kills the first process before it can report."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def ends_for_lost_peer(error: BaseException | None) -> bool:
    """True for the error of a process whose peer is gone; that is then reported, and its children are ended."""
    if not (distributed.is_available() and PEERS.started):
        return False
    while error is not None and not LOST_PEER.search(str(error)):
        error = error.__cause__ or error.__context__
    if error is None:
        return False
    until = time.monotonic() + GRACE
    while not (dead := PEERS.dead_peer()) and not external() and time.monotonic() < until:
        time.sleep(0.1)  # it may take a moment to be seen
    PEERS.report(dead)
    PEERS.kill_children()
    return True
