"""A callback that does one thing every so many optimiser steps, and once at the end of training."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from fmlightning.data.module import FlowData
from fmlightning.training.lightning.scheduled import step_after
from fmlightning.training.module import FlowMatching
from fmlightning.training.nonfinite import guard


class Periodic(Callback):
    """`run` is called on every process.

    Args:
        every_n_steps: optimiser steps between two calls; 0 calls it at the end only.
        at_end: whether to call it at the end of training.
    """

    def __init__(self, every_n_steps: int, at_end: bool) -> None:
        if every_n_steps < 0:
            raise ValueError(
                f"every_n_steps={every_n_steps} must not be negative; 0 is: at the end only"
            )
        self.every_n_steps, self.at_end = every_n_steps, at_end
        self.last = 0

    @abstractmethod
    def run(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> None: ...

    def at_step(self, trainer: Trainer, module: Any) -> None:
        if (found := guard(trainer)) is not None:
            found.read()  # here, where every process is
        self.run(trainer, module, trainer.datamodule)  # type: ignore[attr-defined]
        self.last = trainer.global_step  # not before: what was interrupted is done again

    def next_due_step(self, trainer: Trainer) -> float:
        return step_after(trainer.global_step, self.every_n_steps)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self.last:
            self.at_step(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        # after on_train_end, where the last checkpoint is written: nothing that fails here loses the training
        if self.at_end and trainer.global_step != self.last:
            pl_module.to(trainer.strategy.root_device)  # Lightning has just taken it from there
            self.at_step(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last = state_dict["last"]


def save_figure(trainer: Trainer, name: str, figure: Figure) -> Path:
    """Write a figure to `samples/` of the run directory and mirror it to W&B; call on process 0 only."""
    step = trainer.global_step
    path = Path(trainer.default_root_dir) / "samples" / f"{name}-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=step)
    return path
