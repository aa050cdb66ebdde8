"""One line of progress for the whole run, counted in optimiser steps."""

import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class StepProgress(ProgressBar):
    """A bar over optimiser steps on a terminal; elsewhere a line now and then.

    Args:
        refresh_every: steps between two updates; an update costs as much as a step of a small network.
        lines: how many lines a run prints where there is no terminal.
    """

    per_step_hooks = ("on_train_batch_end",)

    def __init__(self, refresh_every: int = 20, lines: int = 10) -> None:
        super().__init__()
        self.refresh_every, self.lines = refresh_every, lines
        self.enabled = True
        self.bar: Progress | None = None

    def disable(self) -> None:
        """Lightning calls this on every process but the first."""
        self.enabled = False

    @property
    def is_enabled(self) -> bool:
        """Lightning asks this where a module prints."""
        return self.enabled

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.total = int(trainer.estimated_stepping_batches)
        self.begin, self.first_step = time.monotonic(), trainer.global_step
        if self.enabled and sys.stdout.isatty():
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(
                *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
            )
            self.task = self.bar.add_task("", total=self.total, completed=self.first_step, text="")
            self.bar.start()

    def next_due_step(self, trainer: Trainer) -> float:
        """None at which it needs more than to be asked in passing."""
        return math.inf

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        step = trainer.global_step
        if self.bar is not None:
            if step % self.refresh_every == 0 or step == self.total:
                self.bar.update(self.task, completed=step, text=self.text(trainer))
        elif (
            self.enabled
            and step % max(1, self.total // self.lines) == 0
            and step != self.first_step
        ):
            self.first_step = step
            print(
                f"step {step}/{self.total}  {time.monotonic() - self.begin:.0f} s  {self.text(trainer)}",
                flush=True,
            )

    def text(self, trainer: Trainer) -> str:
        """The metrics that were logged for the bar."""
        return "  ".join(
            f"{k} {float(v):.4g}" for k, v in sorted(trainer.progress_bar_metrics.items())
        )

    def on_train_end(self, *args: Any) -> None:
        self.stop()

    def on_exception(self, *args: Any) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
