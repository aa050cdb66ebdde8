"""The optimiser of a resumed run: its state from the checkpoint, its rate and decay from the command line."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from fmlightning.runs.segments import Changes
from fmlightning.training.lr_schedules import LRSchedule


class CommandLineRate(Callback):
    """Give a resumed optimiser the rate and the decay that were asked for, which a checkpoint would overwrite.

    Args:
        changes: the options that this resume changed.
    """

    def __init__(self, changes: Changes) -> None:
        self.changes = changes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.changes:  # the checkpoint says the same, and may be of a rate that was found
            return
        for optimizer in trainer.optimizers:
            schedules = [c.scheduler for c in trainer.lr_scheduler_configs]
            own = [s for s in schedules if isinstance(s, LRSchedule) and s.optimizer is optimizer]
            if "model.optimizer.weight_decay" in self.changes:
                for group in optimizer.param_groups:
                    group["weight_decay"] = optimizer.defaults["weight_decay"]
            if own:
                follow(own[0], optimizer)
            elif "model.optimizer.lr" in self.changes:
                before, after = self.changes["model.optimizer.lr"]
                scale(optimizer, schedules, after / before)


def follow(schedule: LRSchedule, optimizer: Optimizer) -> None:
    """Set the rate that the schedule has at the step it stands at, for the length and the first rate of now."""
    schedule.base_lrs = [optimizer.defaults["lr"] for _ in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, schedule.get_lr(), strict=True):
        group["initial_lr"], group["lr"] = optimizer.defaults["lr"], lr


def scale(optimizer: Optimizer, schedules: list[Any], factor: float) -> None:
    """Multiply the rate, and the first rates of torch's own schedules."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
        if "initial_lr" in group:
            group["initial_lr"] *= factor
    for schedule in schedules:
        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = [lr * factor for lr in schedule.base_lrs]
