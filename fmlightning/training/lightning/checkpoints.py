r"""Saving the state of training: at which steps, and in which files.

The checkpoint of step n is written when all of step n is done: its row is in `metrics.csv`, its average is taken,
and the validation that follows it, if any, has run. So a run killed at any moment and resumed from its checkpoint
repeats every step after n, and none before.

The files themselves are those of `runs/checksum.py`: whole or not there, with a checksum that is read first.
"""

import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fmlightning.runs.checkpoint import read_checkpoint
from fmlightning.runs.checksum import append_checksum, recorded_step
from fmlightning.runs.files import atomic_write, clear_unfinished, explain_write_errors
from fmlightning.training.lightning.scheduled import step_after
from fmlightning.training.metrics_file import MetricsFile

LAST = "last.ckpt"
TRAIN_METRICS = ("train/loss", "train/lr")


# -- files ------------------------------------------------------------------------------------------


class ChecksummedFiles(CheckpointIO):
    """The files of Lightning's checkpoints, with a checksum. Only process 0 writes."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with explain_write_errors(path), atomic_write(path) as file:
            torch.save(checkpoint, file)
            append_checksum(file, checkpoint["global_step"])

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def copy_checkpoint(path: Path, to: Path) -> None:
    """Write a checkpoint under a second name: bytes of its own, so that no damage of one touches the other."""
    with path.open("rb") as file, explain_write_errors(to), atomic_write(to) as copy:
        shutil.copyfileobj(file, copy, 1 << 20)


# -- times ------------------------------------------------------------------------------------------


class Checkpoints(Checkpoint):
    """Save the state of training to `last.ckpt`, and beside it the best or the newest under the number of their step.

    Args:
        every_n_train_steps: optimiser steps between two checkpoints; null where the next two say when.
        every_n_epochs: epochs between two checkpoints.
        train_time_interval: time between two checkpoints, such as 0:30:00.
        monitor: the metric that tells the best, any column of metrics.csv: val/loss, eval/w2, ...; null keeps the
            newest. Under one of validation each validation is followed by a checkpoint; any other ranks the
            checkpoints at which it is new.
        mode: whether the best is the min or the max.
        save_top_k: how many are kept beside `last.ckpt`; -1 keeps all. The newest is there in any case, but at 0.
        save_on_exception: whether a run that is stopped between two steps saves them.
        dirpath: where; the command line sets it to the run's own folder.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = 1000,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_on_exception: bool = True,
        dirpath: str | None = None,
    ) -> None:
        counts = {"every_n_train_steps": every_n_train_steps, "every_n_epochs": every_n_epochs}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"checkpoints.{name}={value} must be at least 1, or null")
        if mode not in ("min", "max"):
            raise ValueError(f"checkpoints.mode={mode!r} must be min or max")
        if save_top_k < -1:
            raise ValueError(f"checkpoints.save_top_k={save_top_k} must be at least -1 (all)")
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self.train_time_interval = train_time_interval
        self.monitor, self.mode, self.save_top_k = monitor, mode, save_top_k
        self.save_on_exception = save_on_exception
        self.dirpath = dirpath
        self.kept: dict[str, float] = {}
        self.backup: str | None = None
        self.saved, self.deferred = 0, False

    @property
    def state_key(self) -> str:
        return "Checkpoints"

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "kept": self.kept, "backup": self.backup}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["monitor"] == self.monitor:
            self.kept, self.backup = (
                state_dict["kept"],
                state_dict.get("backup", state_dict.get("spare")),
            )

    # -- start --------------------------------------------------------------------------------------

    def check(self, scores: bool, callbacks: bool) -> None:
        """Refuse early a metric that cannot be there.

        Args:
            scores: whether metrics score the model during training.
            callbacks: whether there are callbacks that may log anything.

        Raises:
            ValueError: nothing logs the metric.
        """
        if self.monitor is None or callbacks:
            return
        group = self.monitor.split("/")[0]
        if self.monitor in TRAIN_METRICS or group == "val":  # validation says its own names
            return
        if group == "eval" and not scores:
            raise ValueError(
                f"checkpoints.monitor={self.monitor} is a score, and none is taken during training: name metrics with "
                "evaluation.metrics, and set evaluation.every_n_steps to a multiple of checkpoints.every_n_train_steps"
            )
        if group != "eval":
            raise ValueError(
                f"checkpoints.monitor={self.monitor} is no metric of this run: choose {', '.join(TRAIN_METRICS)}, "
                "val/loss, or a score of the metrics such as eval/w2"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints")
        if stage == "fit" and trainer.is_global_zero:
            clear_unfinished(self.folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = trainer.ckpt_path
        mine = f"{path} of step {recorded_step(Path(path))}" if path else "step 0"
        first = trainer.strategy.broadcast(mine)
        if not trainer.strategy.reduce_boolean_decision(mine == first):
            raise ValueError(
                f"the processes do not resume from one checkpoint: process 0 from {first}, process "
                f"{trainer.global_rank} from {mine}. The run directory must be the same on all machines"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved, self.since = trainer.global_step, time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning's count of logged steps is one off after some resumes
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    # -- saving -------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        accumulates = trainer.fit_loop.epoch_loop._should_accumulate()
        if trainer.global_step == self.saved or accumulates or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.deferred or self.due(trainer):
            self.deferred = validation_follows(trainer)
            if not self.deferred:
                log_row(trainer)
                self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking and trainer.state.fn == "fit":
            self.require_metric(set(trainer.callback_metrics))
        elif self.deferred:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save(trainer)
        if self.monitor and not self.kept and self.save_top_k and trainer.is_global_zero:
            print(
                f"warning: checkpoints.monitor={self.monitor} was new at no checkpoint: none is the best"
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # an error may be of this process alone, and saving takes all; a stop is of all
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        new = trainer.global_step != self.saved and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.save_on_exception and together and new and between_steps(trainer):
            self.save(trainer)

    def next_due_step(self, trainer: Trainer) -> float:
        """Validations and the ends of epochs are Lightning's own steps, and a clock can wait for one of these."""
        return step_after(trainer.global_step, self.every_n_train_steps)

    def due(self, trainer: Trainer) -> bool:
        step, epoch = trainer.global_step, trainer.current_epoch + 1
        steps, epochs = self.every_n_train_steps, self.every_n_epochs
        ends = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if (steps and step % steps == 0) or (epochs and ends and epoch % epochs == 0):
            return True
        if (self.monitor or "").startswith("val/") and validation_follows(trainer):
            return True
        if self.train_time_interval is None:
            return False
        passed = time.monotonic() - self.since >= self.train_time_interval.total_seconds()
        return trainer.strategy.broadcast(passed)  # the clocks differ

    def save(self, trainer: Trainer) -> None:
        """Write this step's checkpoints.

        `last.ckpt` comes last: until it is there the run resumes from the one before, and does all of this again,
        so no file is forgotten; and at any moment two files are whole.
        """
        self.saved, self.deferred, self.since = trainer.global_step, False, time.monotonic()
        name = f"{trainer.global_step:08d}.ckpt"
        before = {*self.kept, self.backup}
        self.kept = trainer.strategy.broadcast(self.best_with(name, self.score(trainer)))
        # what is not among the best stands in for `last.ckpt`, should that be damaged, until the next is there
        self.backup = name if self.save_top_k and name not in self.kept else None
        named = name in self.kept or name == self.backup
        first = self.folder / (name if named else LAST)
        trainer.save_checkpoint(first, weights_only=False)
        for replaced in before - {*self.kept, self.backup, None}:
            trainer.strategy.remove_checkpoint(self.folder / replaced)  # type: ignore[operator]
        if named:  # the state is gathered once, and its file copied
            if trainer.is_global_zero:
                copy_checkpoint(first, self.folder / LAST)
            trainer.strategy.barrier("copied")

    # -- the best -----------------------------------------------------------------------------------

    def best_with(self, name: str, score: float | None) -> dict[str, float]:
        """The checkpoints to keep, of those that are there and the one to come, the best first."""
        scores = {k: v for k, v in self.kept.items() if (self.folder / k).is_file()}
        if score is not None:
            scores[name] = score
        down = self.mode == "max" or self.monitor is None
        order = sorted(scores, key=lambda k: -scores[k] if down else scores[k])
        return {k: scores[k] for k in order[: None if self.save_top_k == -1 else self.save_top_k]}

    def score(self, trainer: Trainer) -> float | None:
        """The rank of this step's checkpoint: its number, or the monitored metric if it is new."""
        if self.monitor is None:
            return float(trainer.global_step)
        fresh = trainer.strategy.broadcast(metrics_of_this_step(trainer))
        self.require_metric(set(fresh))
        value = fresh.get(self.monitor)
        worst = float("inf") if self.mode == "min" else float("-inf")
        return worst if value is not None and value != value else value

    def require_metric(self, logged: set[str]) -> None:
        """Refuse a monitored metric where others of its group were logged and it was not.

        Raises:
            ValueError: nothing logs the metric.
        """
        group = str(self.monitor).split("/")[0]
        others = sorted(name for name in logged if name.startswith(f"{group}/"))
        if others and self.monitor not in others:
            raise ValueError(
                f"checkpoints.monitor={self.monitor} is no metric of this run: choose among {', '.join(others)}"
            )


def metrics_of_this_step(trainer: Trainer) -> dict[str, float]:
    """The metrics of the step just taken in metrics.csv: scores under its number, the rest under its index."""
    step = trainer.global_step
    found: dict[str, float] = {}
    for logger in trainer.loggers:
        for row in logger.rows[-4:] if isinstance(logger, MetricsFile) else ():
            scores = int(row["step"]) == step
            if scores or int(row["step"]) == step - 1:
                found |= {
                    k: float(v)
                    for k, v in row.items()
                    if k != "step" and v not in (None, "") and k.startswith("eval/") == scores
                }
    return found


def log_row(trainer: Trainer) -> None:
    """Write the row of the step just taken, which Lightning would write after the checkpoint."""
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile):
            logger.log_metrics(connector.metrics["log"], step)  # type: ignore[arg-type]


def validation_follows(trainer: Trainer) -> bool:
    """True where the step just taken is validated."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(
        loop._data_fetcher
    )


def between_steps(trainer: Trainer) -> bool:
    """True where one step is wholly done and the next not begun: only then is there a state to resume from."""
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress.total
    done = progress.ready == progress.processed == progress.completed
    return bool(trainer.training and done and not loop._should_accumulate())
