"""A training that stands still at a step, so that it can be killed or preempted exactly there."""

import time
from pathlib import Path

from lightning.pytorch import Callback

from fmlightning.runs.signals import SIGNAL_STATE


class Hold(Callback):
    """Wait after a step until a file `go` is there, or a signal has come."""

    def __init__(self, step: int, folder: str) -> None:
        self.step, self.folder = step, Path(folder)

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            (self.folder / "held").touch()
            while not ((self.folder / "go").exists() or SIGNAL_STATE.received):
                time.sleep(0.02)
